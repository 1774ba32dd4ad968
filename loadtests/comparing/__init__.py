"""Two builds side by side, and what a comparison can see on this machine."""
