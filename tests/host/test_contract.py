"""Every check of the contract scripts as a test."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from host_checks import names_of_checks, run_checks

FOLDER = Path(__file__).parent
SCRIPTS = ("contract", "contract_training", "contract_latents", "contract_weights", "contract_native", "contract_samplers",
           "contract_adaptation")
QUICK = ("contract",)
CHECKS = [pytest.param(script, name, marks=() if script in QUICK else pytest.mark.slow)
          for script in SCRIPTS for name in names_of_checks(FOLDER / f"{script}.py")]


@pytest.fixture(scope="session")
def results(host, tmp_path_factory) -> Callable[[str], dict[str, dict]]:
    """What the checks of a script found; all of them run, in one process of the host, when the first is asked for."""
    return cache(lambda script: run_checks(FOLDER / f"{script}.py", host, tmp_path_factory.mktemp(script)))


@pytest.mark.parametrize("script, name", CHECKS)
def test_contract(results, script, name):
    found = results(script)
    assert name in found, f"not reached; the last check was {list(found)[-1]}"
    assert found[name]["ok"], found[name]["detail"]
