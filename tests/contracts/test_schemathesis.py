"""Schemathesis against a running service: what it documents is what it does."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from app.auth import new_key
from tests.support.service_process import ServiceProcess

# Every default check is on. Where a status is widened, the schema cannot say what the service knows:
CONFIGURATION = """
[[operations]]
# A valid order may name an unknown product, repeat a product, or reuse the key of another order.
include-name = "POST /orders"
checks.positive_data_acceptance.expected-statuses = ["2xx", 401, 409, 422]

[[operations]]
# A cursor is opaque: text of the right length need not be one.
include-operation-id-regex = "list_"
checks.positive_data_acceptance.expected-statuses = ["2xx", 422]

[[operations]]
# A malformed order of a batch is refused alone, within a 200.
include-name = "POST /orders/batch"
checks.negative_data_rejection.expected-statuses = [200, 400, 401, 413, 415, 422]
"""


@pytest.mark.parametrize(
    "examples", [5, pytest.param(150, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_schemathesis_finds_nothing(
    tmp_path: Path, start_service: Callable[..., ServiceProcess], examples: int
) -> None:
    """Examples, coverage, fuzzing and stateful phases: no finding, and every operation was tested."""
    token, entry = new_key("schemathesis")
    service = start_service(API_KEYS=entry)
    configuration = tmp_path / "schemathesis.toml"
    configuration.write_text(CONFIGURATION)
    found = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("schemathesis")), f"--config-file={configuration}", "run"),
            *(f"{service.url}/openapi.json", f"--header=Authorization: Bearer {token}"),
            *(f"--max-examples={examples}", "--generation-deterministic"),
            *("--continue-on-failure", "--no-color"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=580,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "Operations:       10 selected / 10 total" in found.stdout
    assert "Tested: 10" in found.stdout
    assert service.metric("orders_total", status="error", error_type="internal") == 0
    assert service.metric("orders_total", status="success", error_type="") > 0
