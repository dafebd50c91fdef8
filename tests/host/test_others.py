"""benchmarks/others.py finds other decoders in a real ComfyUI, and each makes a clip."""

import json
import subprocess

import pytest
from comfy_host import REPOSITORY

pytestmark = pytest.mark.slow


def test_each_decoder_is_timed(host, tmp_path):
    if not (host.path / "comfy" / "ldm" / "cogvideo" / "vae.py").is_file():
        pytest.skip(f"ComfyUI {host.version} has no CogVideoX")
    run = subprocess.run([host.python, REPOSITORY / "benchmarks" / "others.py", "--comfyui", host.path, "--cases", "5x32x32",
                          "--rounds", "1", "--widths", "32", "32", "32", "32", "--device", "cpu", "--dtype", "float32",
                          "--out", tmp_path], cwd=tmp_path, env=host.environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = {each["decoder"]: each for each in json.loads((tmp_path / "others.json").read_text())["measurements"]}
    assert list(found) == ["CV-VAE v1", "CV-VAE sd3", "Wan 2.1", "CogVideoX", "TAEHV"]
    assert all(len(each["seconds"]) == 1 and each["seconds"][0] > 0 for each in found.values())


def test_what_is_no_comfyui_is_refused(host, tmp_path):
    run = subprocess.run([host.python, REPOSITORY / "benchmarks" / "others.py", "--comfyui", tmp_path], cwd=tmp_path,
                         env=host.environment(), capture_output=True, text=True)
    assert run.returncode == 2 and "is not a ComfyUI that knows all of these decoders" in run.stderr
