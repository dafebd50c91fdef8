"""Fixtures for the tests inside a real ComfyUI; see tests/helpers/comfy_host.py for how one is found."""

import json

import pytest
from comfy_host import HOSTS, REPOSITORY, Host, Server, find_host, make_base
from drawn import write_video


@pytest.fixture(scope="session", params=HOSTS)
def host(request) -> Host:
    return find_host(request.param)


@pytest.fixture(scope="session")
def server(host, tmp_path_factory):
    base = tmp_path_factory.mktemp("server")
    make_base(base, "comfyui-cv-vae-main")  # as an archive unpacks; nothing may rely on the folder's name
    (base / "custom_nodes" / "stand_ins").symlink_to(REPOSITORY / "tests" / "host" / "stand_ins", target_is_directory=True)
    server = Server(host, base)
    try:
        server.wait_until_up()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def svd_clips(server) -> None:
    """The videos that the workflow adapt_svd asks for, 17 frames each."""
    folder = server.base / "input" / "svd_clips"
    folder.mkdir()
    for seed, name in enumerate("abcd"):
        write_video(folder / f"{name}.mp4", 17, seed=seed)


@pytest.fixture(scope="session")
def workflows() -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((REPOSITORY / "workflows").glob("*.json"))}
