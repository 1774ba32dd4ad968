"""The performance test plan's load tests: `locust -f locustfile.py --headless -u 100 -r 10 --run-time 30m`.

The plan's commands name no user class, so the number of users chooses: 100 NormalLoadTest, 500 PeakLoadTest,
1000 StressTest, any other NormalLoadTest. LOADTEST_PROFILE=normal|peak|stress|mixed overrides that, and class names
on the command line override both. The first line says which it is, and why. In the web interface the number of users
that is entered there chooses.

The target is http://localhost:8000 unless `--host` says otherwise; LOADTEST_API_KEY is sent where it is set.
The open model is open_model.py. These users know no proxy: HTTP_PROXY is ignored.
"""

import logging
import os
import random
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from locust import User, between, events, task
from locust.dispatch import UsersDispatcher
from locust.env import Environment
from locust.runners import WorkerRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Locust imports this file by its path

from loadtests.users import profiles
from loadtests.users.order_user import OrderUser

_log = logging.getLogger(__name__)


class NormalLoadTest(OrderUser):
    """Normal order creation: 100 users, at least 10 orders per second."""

    wait_time = between(*profiles.NORMAL.wait_seconds)

    @task
    def create_order(self) -> None:
        """Place an order."""
        self.place_order()


class PeakLoadTest(OrderUser):
    """Holiday shopping traffic: 500 users, at least 50 orders per second."""

    wait_time = between(*profiles.PEAK.wait_seconds)

    @task
    def create_order(self) -> None:
        """Place an order."""
        self.place_order()


class StressTest(OrderUser):
    """The system's limits: 1,000 users, at least 100 orders per second."""

    wait_time = between(*profiles.STRESS.wait_seconds)

    @task
    def create_order(self) -> None:
        """Place an order."""
        self.place_order()


class MixedLoadTest(OrderUser):
    """Customers who browse, order, look at their orders, and cancel some."""

    wait_time = between(*profiles.MIXED.wait_seconds)

    @task(3)
    def list_products(self) -> None:
        """Read the first page of the catalogue."""
        self.read("/products", "/products", self._is_page)

    @task(4)
    def view_product(self) -> None:
        """Read a product."""
        product_id = random.choice(self.product_ids)  # noqa: S311 - not secret
        self.read(f"/products/{product_id}", "/products/{id}", lambda found: _is(found, product_id))

    @task(4)
    def create_order(self) -> None:
        """Place an order, and remember it."""
        if order_id := self.place_order():
            self.own_orders.append(order_id)

    @task(2)
    def look_up_order(self) -> None:
        """Read one of one's own orders; one that is not found was lost, and is a failure."""
        if not self.own_orders:
            self.create_order()
        else:
            order_id = random.choice(self.own_orders)  # noqa: S311 - not secret
            self.read(f"/orders/{order_id}", "/orders/{id}", lambda found: _is(found, order_id))

    @task(1)
    def list_orders(self) -> None:
        """Read the newest orders of the run."""
        path = f"/orders?customer_id={self.customer_id}&limit=20"
        self.read(path, "/orders?customer_id=", self._are_orders)

    @task(1)
    def cancel_own_order(self) -> None:
        """Cancel the newest of one's own orders."""
        if not self.own_orders:
            self.create_order()
        else:
            self.cancel_order(self.own_orders.pop())

    def _is_page(self, found: dict[str, Any]) -> str:
        known = set(self.product_ids)
        items = found.get("items")
        if not isinstance(items, list) or not items:
            return "without products"
        return "" if all(item.get("id") in known for item in items) else "with other products"

    def _are_orders(self, found: dict[str, Any]) -> str:
        items = found.get("items")
        if not isinstance(items, list):
            return "without orders"
        if self.own_orders and not items:
            return "without the orders that were placed"
        same = all(item.get("customer_id") == self.customer_id for item in items)
        return "" if same else "of another customer"


def _is(found: dict[str, Any], wanted: str) -> str:
    return "" if found.get("id") == wanted else "of something else"


class ProfileDispatcher(UsersDispatcher):
    """Spawns users of one class: the one that the number of users chooses when a test starts.

    All classes are known on every node, so that workers, which are not told the choice, can run any.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._chosen: list[type[User]] | None = None

    def new_dispatch(
        self, target_user_count: int, spawn_rate: float, user_classes: list[type[User]] | None = None
    ) -> None:
        """Choose for the first dispatch of a test; users that are added later are of the same class."""
        if self._chosen is None:
            profile, why = profiles.choose(target_user_count, _override())
            self._chosen = [globals()[profile.user_class]]
            _log.info("%s: %s", profile.user_class, why)
        super().new_dispatch(target_user_count, spawn_rate, user_classes or self._chosen)


def describe_choice(options: Namespace) -> str:
    """The first line of a run: which user class it is and why; raises ValueError for a bad LOADTEST_PROFILE."""
    override = _override()
    profile, why = profiles.choose(options.num_users, override)
    if options.user_classes:
        return f"loadtest: {', '.join(options.user_classes)}: named on the command line"
    if options.worker:
        return "loadtest: a worker runs what its master chooses"
    if options.class_picker:
        return "loadtest: the user class is chosen in the web interface"
    if not (options.headless or options.autostart or override):
        return f"loadtest: {profile.user_class}: {why}; the web interface's number of users chooses anew"
    if options.num_users is None and not override:
        profile, why = profiles.choose(1)  # Locust's default
    return f"loadtest: {profile.user_class}: {why}"


def _override() -> str:
    return os.environ.get("LOADTEST_PROFILE", "").strip().lower()


_announced = False


@events.init_command_line_parser.add_listener
def announce(parser: ArgumentParser) -> None:
    """Print the first line; the web interface makes a parser for every page, which is no reason to repeat it."""
    global _announced  # noqa: PLW0603 - once in a process
    options, _ = parser.parse_known_args()
    if _announced or options.list_commands or options.show_task_ratio or options.show_task_ratio_json:
        return
    _announced = True
    try:
        line = describe_choice(options)
    except ValueError as exc:
        parser.error(str(exc))
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - before Locust sets up its log


@events.init.add_listener
def choose_by_users(environment: Environment, **_: Any) -> None:
    """Let the number of users choose, where nothing else does."""
    options = environment.parsed_options
    if options is None or options.user_classes or options.class_picker:
        return
    if not isinstance(environment.runner, WorkerRunner):
        environment.dispatcher_class = ProfileDispatcher
