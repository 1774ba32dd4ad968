// Hovering over one chart tells the figures of all of them at that time; everything else needs no script.
const { clock, at, charts } = JSON.parse(document.getElementById("series").textContent);
const plots = [...document.querySelectorAll(".plot[data-time]")];
const hide = () => {
  for (const plot of plots) {
    plot.querySelector(".cursor").hidden = true;
    for (const output of plot.parentElement.querySelectorAll("output")) output.textContent = "";
  }
};
const show = (percent) => {
  let i = 0;
  while (i + 1 < at.length && Math.abs(at[i + 1] - percent) <= Math.abs(at[i] - percent)) i += 1;
  for (const plot of plots) {
    const cursor = plot.querySelector(".cursor");
    cursor.hidden = false;
    cursor.style.left = `${at[i]}%`;
    const figure = plot.parentElement;
    figure.querySelector("output.clock").textContent = clock[i];
    for (const output of figure.querySelectorAll("output[data-label]")) {
      const value = charts[plot.dataset.time][output.dataset.label][i];
      output.textContent = value === null ? "-" : value.toLocaleString("en");
    }
  }
};
for (const plot of plots) {
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    show(((event.clientX - box.left) / box.width) * 100);
  });
  plot.addEventListener("pointerleave", hide);
}
