"""Every check of contract.py as a test, on the newest and on the oldest supported ComfyUI."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
from comfy_host import make_base

SCRIPT = Path(__file__).with_name("contract.py")


def names_of_checks() -> list[str]:
    spec = importlib.util.spec_from_file_location("host_contract", SCRIPT)
    contract = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(contract)
    return list(contract.CHECKS)


@pytest.fixture(scope="session")
def results(host, tmp_path_factory) -> dict[str, dict]:
    """Run all checks in one process of the host."""
    base = tmp_path_factory.mktemp("contract")
    pack = make_base(base, "cv-vae")
    done = subprocess.run([host.python, SCRIPT, pack, base], cwd=host.path, env=host.environment(), text=True,
                          capture_output=True, timeout=600)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
    assert lines, f"the host did not run the checks:\n{done.stderr[-3000:]}"
    return {line["check"]: line for line in lines}


@pytest.mark.parametrize("name", names_of_checks())
def test_contract(results, name):
    assert name in results, f"not reached; the last check was {list(results)[-1]}"
    assert results[name]["ok"], results[name]["detail"]
