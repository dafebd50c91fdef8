"""Every check of contract.py as a test, on the newest and on the oldest supported ComfyUI."""

from pathlib import Path

import pytest
from host_checks import names_of_checks, run_checks

SCRIPT = Path(__file__).with_name("contract.py")


@pytest.fixture(scope="session")
def results(host, tmp_path_factory) -> dict[str, dict]:
    return run_checks(SCRIPT, host, tmp_path_factory.mktemp("contract"))


@pytest.mark.parametrize("name", names_of_checks(SCRIPT))
def test_contract(results, name):
    assert name in results, f"not reached; the last check was {list(results)[-1]}"
    assert results[name]["ok"], results[name]["detail"]
