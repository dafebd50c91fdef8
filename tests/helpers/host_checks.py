"""The scripts of checks that run inside a host, seen from pytest."""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType

from comfy_host import Host, make_base


def load_checks(script: Path) -> ModuleType:
    """``script`` as a module, without the host."""
    spec = importlib.util.spec_from_file_location(f"host_{script.stem}", script)
    contract = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(contract)
    return contract


def names_of_checks(script: Path) -> list[str]:
    return list(load_checks(script).CHECKS)


def run_checks(script: Path, host: Host, base: Path) -> dict[str, dict]:
    """Run all checks of ``script`` in one process of ``host``: what each printed, by its name."""
    pack = make_base(base, "cv-vae")
    done = subprocess.run([host.python, script, pack, base], cwd=host.path, env=host.environment(), text=True,
                          capture_output=True, timeout=600)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
    assert lines, f"the host did not run the checks:\n{done.stderr[-3000:]}"
    return {line["check"]: line for line in lines}
