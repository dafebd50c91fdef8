"""A real ComfyUI to test in: found, given a temporary base directory with the pack in it, and started.

COMFYUI_PATH (default ~/ComfyUI) is the newest host.  COMFYUI_OLDEST_PATH, where it is set, is the oldest supported
one: the tests then run in both, which takes twice as long (scripts/host_matrix.py goes through many).  A host runs
under its own .venv; the oldest shares the newest's where it has none, and both share this interpreter where there is
none at all.  The repository never gets onto a host's sys.path: its nodes/ would hide ComfyUI's nodes.py.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PATHS = {"newest": os.environ.get("COMFYUI_PATH", "~/ComfyUI"), "oldest": os.environ.get("COMFYUI_OLDEST_PATH")}
HOSTS = [which for which, path in PATHS.items() if path]


class Host:
    """An installed ComfyUI."""

    def __init__(self, path: Path, python: Path):
        self.path = path
        self.python = python

    @property
    def version(self) -> str:
        return re.search(r'"(.+)"', (self.path / "comfyui_version.py").read_text())[1]

    def environment(self) -> dict[str, str]:
        # One thread: with more, each small layer waits for a thread that other programs have pushed aside.
        return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


def find_host(which: str) -> Host:
    """The host, or skip the test."""
    path = _path(which)
    if not (path / "main.py").exists():
        pytest.skip(f"no ComfyUI ({which} host) at {path}; set COMFYUI_{'OLDEST_' * (which == 'oldest')}PATH")
    pythons = [_path(name) / ".venv" / "bin" / "python" for name in (which, "newest")]
    return Host(path, next((python for python in pythons if python.exists()), Path(sys.executable)))


def _path(which: str) -> Path:
    return Path(PATHS[which]).expanduser()


def make_base(folder: Path, pack_name: str) -> Path:
    """A base directory for ComfyUI with the pack in custom_nodes under ``pack_name``; returns the pack."""
    for name in ("custom_nodes", "models/vae", "input", "output", "temp", "user/default"):
        (folder / name).mkdir(parents=True)
    pack = folder / "custom_nodes" / pack_name
    pack.symlink_to(REPOSITORY, target_is_directory=True)
    # As after the first visit: otherwise the front end opens its template browser over the canvas.
    (folder / "user/default/comfy.settings.json").write_text('{"Comfy.TutorialCompleted": true}')
    return pack


class Server:
    """A running ComfyUI with the pack."""

    def __init__(self, host: Host, base: Path):
        self.host, self.base = host, base
        [pack] = (path for path in (base / "custom_nodes").iterdir() if path.resolve() == REPOSITORY)
        self.pack = pack.name
        self.log = base / "server.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [host.python, "main.py", "--cpu", "--base-directory", base, "--port", self.port,
                   "--disable-auto-launch", "--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen([str(word) for word in command], cwd=host.path, env=host.environment(),
                                            stdout=log, stderr=subprocess.STDOUT)

    def wait_until_up(self, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}") from None
                time.sleep(0.3)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} answered {error.code}: {error.read().decode()[:3000]}") from None

    def run(self, prompt: dict, seconds: float = 300) -> dict[str, list[Path]]:
        """Queue ``prompt`` and wait; the files each node saved, by node id."""
        return self.saved(self.post("/prompt", {"prompt": prompt})["prompt_id"], seconds)

    def saved(self, prompt_id: str, seconds: float = 300) -> dict[str, list[Path]]:
        deadline = time.monotonic() + seconds
        while not (entry := self.get(f"/history/{prompt_id}").get(prompt_id)):
            assert time.monotonic() < deadline, f"no result after {seconds} s:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.3)
        assert entry["status"]["status_str"] == "success", json.dumps(entry["status"], indent=1)[:5000]
        return {node: [self.base / file["type"] / file["subfolder"] / file["filename"] for file in output["images"]]
                for node, output in entry["outputs"].items() if "images" in output}
