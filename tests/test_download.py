"""Published weights from a local hub: what arrives, what survives a broken connection, and what each failure says."""

import builtins
import errno
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from filelock import FileLock
from hub_server import REPOSITORY, HubServer
from random_weights import video_state
from safetensors.torch import save

import cvvae.download
from cvvae.checkpoint import refusal
from cvvae.cli import main
from cvvae.download import CHUNK, PUBLISHED, DownloadError, download

HERE = Path(__file__).parents[1]
NAME = "vae3d_v1-1"
FILE = PUBLISHED[NAME].file
CONTENT = save({name: tensor.half() for name, tensor in video_state("v1").items()})
DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(cvvae.download, "PAUSES", (0, 0))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer({PUBLISHED[NAME].path: CONTENT}) as server:
        yield server


class Cancelled(Exception):
    pass


def fetch(hub: HubServer, folder: Path, **options) -> Path:
    return download(NAME, folder, endpoint=hub.address(), **options)


def cancelled_after(wanted: int):
    """progress and check that give up once ``wanted`` bytes are there."""
    seen = [0]

    def check():
        if seen[0] >= wanted:
            raise Cancelled

    return {"progress": lambda done, total: seen.__setitem__(0, done), "check": check}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def asked_from(hub: HubServer) -> list[str]:
    """Where each request for bytes began."""
    return [headers.get("range", "whole") for headers in hub.headers_of("storage", "GET")]


class TestWhole:
    def test_it_arrives_under_its_name_with_nothing_beside_it(self, hub, tmp_path):
        assert len(CONTENT) > 4 * CHUNK
        steps = []
        path = fetch(hub, tmp_path / "new" / "vae", progress=lambda *step: steps.append(step))
        assert path == tmp_path / "new" / "vae" / FILE and path.read_bytes() == CONTENT and names(path.parent) == [FILE]
        assert steps == sorted(steps) and steps[0] == (0, len(CONTENT)) and steps[-1] == (len(CONTENT), len(CONTENT))
        assert refusal(path) is None and asked_from(hub) == ["whole"]
        assert path.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o022))

    def test_what_is_there_is_not_fetched_again(self, hub, tmp_path):
        before = fetch(hub, tmp_path).stat()
        hub.seen.clear()
        again = fetch(hub, tmp_path).stat()
        assert (again.st_ino, again.st_mtime_ns) == (before.st_ino, before.st_mtime_ns) and hub.seen == []

    @pytest.mark.parametrize("content", [CONTENT[:-1], b"<html>", save({"w": video_state("v1")["decoder.conv_in.bias"]})])
    def test_another_file_of_that_name_is_left_alone(self, hub, tmp_path, content):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(DownloadError, match="Delete or rename it"):
            fetch(hub, tmp_path)
        assert (tmp_path / FILE).read_bytes() == content and hub.seen == []

    def test_the_token_goes_to_the_hub_and_no_further(self, hub, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        fetch(hub, tmp_path)
        for method in ("HEAD", "GET"):
            assert [headers.get("authorization") for headers in hub.headers_of("hub", method)] == ["Bearer hf_secret"]
        assert [headers.get("authorization") for headers in hub.headers_of("storage", "GET")] == [None]


class TestGoingOn:
    def test_a_cut_connection_is_opened_again_where_it_broke(self, hub, tmp_path):
        hub.cut_after, hub.cuts = 2 * CHUNK + 1000, 2
        assert fetch(hub, tmp_path).read_bytes() == CONTENT
        kept = [int(start.removeprefix("bytes=").removesuffix("-")) for start in asked_from(hub)[1:]]
        assert len(kept) == 2 and 2 * CHUNK <= kept[0] <= hub.cut_after and 2 * CHUNK <= kept[1] - kept[0] <= hub.cut_after

    def test_the_next_download_goes_on_after_a_connection_that_stays_broken(self, hub, tmp_path):
        with pytest.raises(Cancelled):
            fetch(hub, tmp_path, **cancelled_after(CHUNK))
        hub.cut_after, hub.cuts = 0, 99
        with pytest.raises(DownloadError, match=r"broke after 0 of \d MB .*kept: download again"):
            fetch(hub, tmp_path)
        assert len(names(tmp_path)) == 1 and names(tmp_path)[0].endswith(".partial")
        hub.cuts = 0
        hub.seen.clear()
        assert fetch(hub, tmp_path).read_bytes() == CONTENT
        assert asked_from(hub) == [f"bytes={CHUNK}-"] and names(tmp_path) == [FILE]

    def test_a_server_that_cannot_go_on_sends_the_file_again(self, hub, tmp_path):
        hub.ranges, hub.cut_after, hub.cuts = False, 2 * CHUNK, 1
        assert fetch(hub, tmp_path).read_bytes() == CONTENT

    def test_such_a_server_is_not_asked_for_ever(self, hub, tmp_path):
        hub.ranges, hub.cut_after, hub.cuts = False, 2 * CHUNK, 99
        with pytest.raises(DownloadError, match="broke after"):
            fetch(hub, tmp_path)
        assert len(asked_from(hub)) == 4

    def test_an_error_that_passes_is_waited_for(self, hub, tmp_path):
        hub.status["storage"] = 503
        with pytest.raises(DownloadError, match="broke after 0 of .*503"):
            fetch(hub, tmp_path)
        assert len(hub.headers_of("storage", "GET")) == 3

    def test_what_is_left_of_another_version_is_removed(self, hub, tmp_path):
        (tmp_path / f".{FILE}.0123456789ab.partial").write_bytes(b"old")
        fetch(hub, tmp_path)
        assert names(tmp_path) == [FILE]


class TestCancel:
    def test_what_has_arrived_is_kept(self, hub, tmp_path):
        with pytest.raises(Cancelled):
            fetch(hub, tmp_path, **cancelled_after(2 * CHUNK))
        [kept] = tmp_path.iterdir()
        assert kept.name.endswith(".partial") and kept.read_bytes() == CONTENT[:2 * CHUNK]

    def test_it_does_not_wait_for_a_network_that_hangs(self, hub, tmp_path):
        hub.hang.set()
        started = time.monotonic()

        def check():
            if time.monotonic() > started + 0.5:
                raise Cancelled

        with pytest.raises(Cancelled):
            fetch(hub, tmp_path, check=check)
        assert time.monotonic() < started + 1.5

    def test_two_at_once_are_refused(self, hub, tmp_path):
        with pytest.raises(Cancelled):
            fetch(hub, tmp_path, **cancelled_after(CHUNK))
        [partial] = tmp_path.iterdir()
        with FileLock(f"{partial}.lock"), pytest.raises(DownloadError, match="already, from another program"):
            fetch(hub, tmp_path)
        assert fetch(hub, tmp_path).read_bytes() == CONTENT


class TestVerified:
    def test_a_wrong_hash_is_removed(self, hub, tmp_path):
        hub.hash_stated = "0" * 64
        with pytest.raises(DownloadError, match=f"expected {len(CONTENT)} with 0000.*removed. Download again"):
            fetch(hub, tmp_path)
        assert names(tmp_path) == []

    def test_damage_in_an_earlier_download_is_found(self, hub, tmp_path):
        with pytest.raises(Cancelled):
            fetch(hub, tmp_path, **cancelled_after(2 * CHUNK))
        [kept] = tmp_path.iterdir()
        kept.write_bytes(bytes(2 * CHUNK))
        with pytest.raises(DownloadError, match="removed"):
            fetch(hub, tmp_path)
        assert fetch(hub, tmp_path).read_bytes() == CONTENT

    def test_a_server_without_a_hash_is_refused(self, hub, tmp_path):
        hub.hash_stated = "of-git"
        with pytest.raises(DownloadError, match="does not state size and SHA-256"):
            fetch(hub, tmp_path)


class TestDisk:
    def test_room_is_looked_for_before(self, hub, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(10, 9, len(CONTENT) - 1))
        with pytest.raises(DownloadError, match=r"disk of .* is full: \d MB are still to come.*Make room"):
            fetch(hub, tmp_path)
        assert asked_from(hub) == []

    def test_a_disk_that_fills_on_the_way(self, hub, tmp_path, monkeypatch):
        """What fitted is kept, and the download goes on from it once there is room."""
        def open_on_a_small_disk(*arguments):
            file = builtins.open(*arguments)

            class Small:
                def write(self, chunk):
                    if file.tell() + len(chunk) > 2 * CHUNK + 100:
                        raise OSError(errno.ENOSPC, "No space left on device")
                    return file.write(chunk)

                def __getattr__(self, name):
                    return getattr(file, name)

                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    file.close()

            return Small()

        monkeypatch.setattr(cvvae.download, "open", open_on_a_small_disk, raising=False)
        with pytest.raises(DownloadError, match=f"is full.*kept in .{FILE}"):
            fetch(hub, tmp_path)
        assert [path.stat().st_size for path in tmp_path.iterdir()] == [2 * CHUNK]
        monkeypatch.delattr(cvvae.download, "open")
        assert fetch(hub, tmp_path).read_bytes() == CONTENT and asked_from(hub)[-1] == f"bytes={2 * CHUNK}-"


class TestRefused:
    def test_no_network(self, tmp_path):
        with pytest.raises(DownloadError, match=f"127.0.0.1:9 cannot be reached.*HTTPS_PROXY and HF_ENDPOINT.*as .*{FILE}"):
            download(NAME, tmp_path, endpoint="http://127.0.0.1:9")
        assert names(tmp_path) == []

    @pytest.mark.parametrize("status, message", [(401, "token that is no longer"), (403, "token"), (500, "answered 500")])
    def test_the_hub_says_no(self, hub, tmp_path, status, message):
        hub.status["hub"] = status
        with pytest.raises(DownloadError, match=f"{message}.*fetch https://huggingface.co/{REPOSITORY}/resolve/main/{NAME}/"):
            fetch(hub, tmp_path)

    def test_the_storage_says_no(self, hub, tmp_path):
        hub.status["storage"] = 403
        with pytest.raises(DownloadError, match="refuses"):
            fetch(hub, tmp_path)
        assert len(hub.headers_of("storage", "GET")) == 1

    def test_the_file_has_gone(self, hub, tmp_path):
        hub.files.clear()
        with pytest.raises(DownloadError, match="answered 404 .*for what is there now"):
            fetch(hub, tmp_path)

    def test_an_unknown_name(self, tmp_path):
        with pytest.raises(DownloadError, match="'vae4d'; choose one of vae3d_v1-1, vae3d, vae3d_sd3"):
            download("vae4d", tmp_path)

    def test_without_the_package(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(DownloadError, match="needs the Python package huggingface_hub.*pip install"):
            download(NAME, tmp_path)


class TestCommand:
    """The whole command, with the settings that huggingface_hub reads from the environment."""

    def run(self, hub: HubServer, folder: Path, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "cvvae", "download", NAME, "--to", folder], text=True, cwd=HERE,
                              env=os.environ | {"HF_ENDPOINT": hub.address()} | variables, capture_output=True, timeout=120)

    def test_from_the_endpoint(self, hub, tmp_path):
        done = self.run(hub, tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / FILE).read_bytes() == CONTENT and done.stdout.startswith(f"{tmp_path / FILE}: SD 1.x")

    def test_stopping_says_how_to_go_on(self, tmp_path, monkeypatch, capsys):
        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("cvvae.cli.download", interrupt)
        assert main(["download", NAME, "--to", str(tmp_path)]) == 130
        assert "the same command goes on" in capsys.readouterr().err

    def test_offline(self, hub, tmp_path):
        done = self.run(hub, tmp_path, HF_HUB_OFFLINE="1")
        assert done.returncode == 2 and hub.seen == [] and names(tmp_path) == []
        assert done.stderr.splitlines()[-1].startswith("error: HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set")


class TestTable:
    def test_names_are_apart_and_addresses_are_those_of_the_folders(self):
        files = [entry.file for entry in PUBLISHED.values()]
        assert len(set(files)) == len(files) and all(name.startswith("cv-vae_") for name in files)
        for folder, entry in PUBLISHED.items():
            assert entry.entry() == {"name": entry.file, "directory": "vae", "url": entry.url}
            assert entry.url.startswith(f"https://huggingface.co/{REPOSITORY}/resolve/main/{folder}/")
            assert entry.url.endswith(".safetensors")

    def test_the_readme_has_it(self):
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        for folder, entry in PUBLISHED.items():
            assert f"| `{folder}` | `{entry.file}` |" in readme
