"""An environment without anything that could be an option of a load test: a developer's settings are not tested."""

import pytest

from loadtests import options


def clear_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset every variable that `python -m loadtests` reads."""
    variables = [variable for action in options.parser()._actions if (variable := action.env_var)]
    for name in (*variables, "DSN", "LOADTEST_API_KEY"):
        monkeypatch.delenv(name, raising=False)
