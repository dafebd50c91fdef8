"""Triton's kernels, in a process of its own: on a GPU where there is one, else step by step in Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from cvvae.engine import passes

HELPERS = Path(__file__).parent / "helpers"


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
@pytest.mark.parametrize("checks", ["not test_engine", pytest.param("test_engine", marks=pytest.mark.slow)])
def test_kernels(checks):
    """The interpreter must be chosen before anything imports Triton."""
    step_by_step = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HELPERS / "fused_checks.py", "-k", checks]
    run = subprocess.run(command, env=os.environ | step_by_step, cwd=HELPERS.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_kernels_compile(dtype):
    """For a GPU, on any machine: the interpreter takes what the compiler does not."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compiled

    from cvvae.engine import fused

    def compiles(kernel, pointers: dict[str, str], constants: dict[str, int]) -> bool:
        names = [parameter.name for parameter in kernel.params]
        types = dict.fromkeys(names, "i32") | dict.fromkeys(("eps", "factor"), "fp32") | pointers
        types |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, {name: types[name] for name in names},
                           {(names.index(name),): value for name, value in constants.items()})
        return bool(compiled(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"])

    data, size = f"*{dtype}", {"COLUMNS": fused.COLUMNS, "CHANNELS": fused.CHANNELS}
    behind = size | {"COLUMNS": fused.AT_A_TIME}
    for on in (False, True):
        assert compiles(fused._bordered, {"x": data, "out": data, "scale": "*fp32", "shift": "*fp32"},
                        size | {"NORMALISED": on, "BLACK_TIME": not on, "BLACK_SPACE": on})
        assert compiles(fused._finished, {"x": data, "y": data, "bias": data, "parts": "*fp32"},
                        behind | {"BIASED": on, "ADDED": on, "MEASURED": True, "PIXELS": fused.MEASURED})
    assert compiles(fused._finished, {"x": data, "y": data, "bias": data, "parts": data},
                    behind | {"BIASED": True, "ADDED": False, "MEASURED": False, "PIXELS": fused.PIXELS})
    assert compiles(fused._interleaved, {"made": data, "bias": data, "out": data}, size)
    for on in (False, True):
        assert compiles(fused._affine, {"parts": "*fp32", "weight": data, "bias": data, "missing": data, "affine": "*fp32"},
                        {"MISSING": on, "SIZE": 4, "PARTS": fused.PARTS})
    assert compiles(fused._shares, {"scores": "*fp32", "shares": data, "sums": "*fp32"}, {"KEYS": fused.KEYS})


def test_a_cpu_has_torchs_own_passes():
    assert passes.passes_for(torch.empty(0)) is passes.EAGER


def test_without_triton_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "cvvae.engine.fused", None)  # its import fails
    passes.can_fuse.cache_clear()
    assert not passes.can_fuse(torch.device("cuda"))
    assert "without its fused kernels" in caplog.text and "ModuleNotFoundError" in caplog.text
    passes.can_fuse.cache_clear()
