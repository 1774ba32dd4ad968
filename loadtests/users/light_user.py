"""A Locust user that costs little, and is in Locust's statistics like any other."""

import os

from locust import User
from locust.env import Environment
from locust.exception import StopTest
from locust.user.task import LOCUST_STATE_STOPPING, LOCUST_STATE_WAITING

from loadtests.users.light_http import Answer, LightHttp

DEFAULT_HOST = "http://localhost:8000"

_COULD_NOT_RUN = 2  # the exit code


class LightUser(User):
    """A Locust user over one `LightHttp` connection.

    LOADTEST_API_KEY, where set, goes with every request as `Authorization: Bearer`.
    """

    abstract = True
    host: str | None = DEFAULT_HOST
    timeout_seconds = 10.0  # twice the service's own deadline
    connect_timeout_seconds = 5.0

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        api_key = os.environ.get("LOADTEST_API_KEY")
        try:
            self.http = LightHttp(
                self.host or DEFAULT_HOST,
                headers={"Accept": "application/json", "User-Agent": "loadtests"}
                | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
                connect_timeout_seconds=self.connect_timeout_seconds,
                timeout_seconds=self.timeout_seconds,
            )
        except ValueError as exc:
            raise self.could_not_run(str(exc)) from None
        self._fire = environment.events.request.fire

    def stop(self, force: bool = False) -> bool:  # noqa: FBT001, FBT002 - Locust's signature
        """Stop as Locust does, but surely without another request.

        Locust kills a waiting user by way of the event loop; where the wait ends just then, the user has sent a
        request before the kill arrives, and its answer is lost.
        """
        if self._state == LOCUST_STATE_WAITING:
            self._state = LOCUST_STATE_STOPPING
            force = True
        return bool(super().stop(force))

    def on_stop(self) -> None:
        """Hang up."""
        self.http.close()

    def could_not_run(self, why: str) -> StopTest:
        """Locust's way to end a test from a constructor; left alone it would exit with 0, and a master not hear it."""
        stop = StopTest(why)
        self.environment.process_exit_code = _COULD_NOT_RUN
        self.environment.events.user_error.fire(user_instance=self, exception=stop, tb=None)
        return stop

    def report(
        self,
        method: str,
        name: str,
        started_at: float,
        latency_seconds: float,
        answer: Answer | None,
        failure: Exception | None,
    ) -> None:
        """Fire Locust's `request` event, with all that Locust's own clients put into it."""
        self._fire(
            request_type=method,
            name=name,
            response_time=latency_seconds * 1000,
            response_length=0 if answer is None else len(answer.body),
            response=answer,
            context=self.context(),
            exception=failure,
            start_time=started_at,
            url=name,
        )
