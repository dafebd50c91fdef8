"""The published weights: which there are, and one of them fetched from Hugging Face when the user asks for it.

Nothing here runs at import, and nothing else in this library opens a connection.  A file arrives under a temporary
name, from where a broken or cancelled download goes on, is compared with the size and hash that the hub states, and only
then gets its name.

For workflow files: a Load CV-VAE node that is set to one of these files carries, in its ``properties``,
``"models": [PUBLISHED["vae3d_v1-1"].entry()]``.  ComfyUI then offers the download by itself where the file is missing.
"""

import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import refusal

REPOSITORY = "AILab-CVC/CV-VAE"
CHUNK = 2**18  # bytes between two looks at Cancel and the disk
PAUSES = (1, 2, 4, 8)  # seconds before a broken connection is opened again, unless it brought something
TEMPORARY = (408, 429, 500, 502, 503, 504)  # HTTP status codes worth another try


class DownloadError(OSError):
    """Why there is no file now, and what to do about it."""


@dataclass(frozen=True)
class Published:
    """One file of the repository."""

    folder: str  # there
    file: str  # its name here, in ComfyUI's models/vae
    size: str  # about; the exact one is the hub's to state
    latent_channels: int
    made_for: str

    @property
    def path(self) -> str:
        return f"{self.folder}/diffusion_pytorch_model.safetensors"

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{REPOSITORY}/resolve/main/{self.path}"

    def entry(self) -> dict[str, str]:
        """The file as ComfyUI's workflow files name a model."""
        return {"name": self.file, "url": self.url, "directory": "vae"}


PUBLISHED = {entry.folder: entry for entry in (
    Published("vae3d_v1-1", "cv-vae_v1-1.safetensors", "365 MB", 4, "SD 1.x, SD 2.x, SVD and AnimateDiff; the newer one"),
    Published("vae3d", "cv-vae_v1.safetensors", "730 MB", 4, "SD 1.x, SD 2.x, SVD and AnimateDiff; the first release"),
    Published("vae3d_sd3", "cv-vae_sd3.safetensors", "365 or 730 MB", 16, "SD 3 and SD 3.5"),
)}


def download(name: str, folder: str | os.PathLike, progress: Callable[[int, int], object] = lambda done, total: None,
             check: Callable[[], object] = lambda: None, endpoint: str | None = None) -> Path:
    """Fetch the published file ``name``, a key of PUBLISHED, into ``folder``; returns its path.

    A whole file of that name is left as it is, and no connection is opened.  What an earlier download left behind is
    gone on with.  huggingface_hub's settings hold: HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and its other variables.

    progress: called with the bytes that are there and those of the whole file.
    check: called several times a second, also while the network hangs; to cancel, it raises.
    endpoint: the address of another hub, in place of HF_ENDPOINT's.

    Raises DownloadError, and whatever ``check`` raises.
    """
    if name not in PUBLISHED:
        raise DownloadError(f"There is no published file {name!r}; choose one of {', '.join(PUBLISHED)}.")
    published = PUBLISHED[name]
    path = Path(folder) / published.file
    if path.exists():
        if problem := refusal(path):
            raise DownloadError(f"There is a file of that name, which is no whole CV-VAE: {problem} Delete or rename it to "
                                "download it again.")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    hub = _Hub(published, path, endpoint)
    _call(hub.ask, check)
    partial = path.with_name(f".{path.name}.{hub.sha256[:12]}.partial")
    with _alone(partial):
        for other in path.parent.glob(f".{path.name}.*.partial"):
            if other != partial:  # of a version that is no longer there
                other.unlink()
        try:
            _complete(hub, partial, progress, check)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise _disk_full(hub, partial, partial.stat().st_size) from None
        os.replace(partial, path)
    return path


def _complete(hub: "_Hub", partial: Path, progress, check) -> None:
    """Bring ``partial`` to its full size, and compare its hash with the hub's; a wrong one is removed."""
    with open(partial, "ab+") as file:
        digest, done = hashlib.sha256(), 0
        file.seek(0)
        while kept := file.read(2**20):
            check()
            digest.update(kept)
            done += len(kept)
        if hub.size - done > shutil.disk_usage(partial.parent).free:
            raise _disk_full(hub, partial, done)
        failures = 0
        while done < hub.size:
            progress(done, hub.size)
            before, chunks = done, hub.chunks(done)
            try:
                while chunk := _call(lambda chunks=chunks: next(chunks, b""), check):
                    if chunk is RESTART:
                        file.truncate(0)
                        digest, done = hashlib.sha256(), 0
                        continue
                    file.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    if done > hub.size:
                        break
                    progress(done, hub.size)
                broken = "it ended early"
            except _Broken as error:
                broken = error
            finally:
                with suppress(ValueError):  # given up while it waits for the network: its thread ends it
                    chunks.close()
            failures = 0 if done > before else failures + 1
            if failures > len(PAUSES):
                raise DownloadError(f"The connection to {hub.host} broke after {done / 1e6:.0f} of {hub.size / 1e6:.0f} MB "
                                    f"({broken}). What has arrived is kept: download again to go on from there.")
            if done < hub.size:
                _pause(PAUSES[max(failures, 1) - 1], check)
        file.flush()
        os.fsync(file.fileno())
    if done != hub.size or digest.hexdigest() != hub.sha256:
        partial.unlink()
        raise DownloadError(f"What {hub.host} sent for {hub.url} is not the file that it states ({done} bytes with SHA-256 "
                            f"{digest.hexdigest()}, expected {hub.size} with {hub.sha256}), so it was removed. Download "
                            "again; if that does not help, a proxy or mirror on the way changes files: set HF_ENDPOINT to "
                            "another, or to none.")


# -- the hub -----------------------------------------------------------------------------------------

RESTART = b"restart"  # in place of a chunk: the server sends the file from its beginning


class _Broken(Exception):
    """The connection failed in a way that another try may mend."""


class _Hub:
    """One file of the hub, through huggingface_hub: its settings, its token, its client."""

    def __init__(self, published: Published, path: Path, endpoint: str | None):
        self.by_hand = f"Or fetch {published.url} with a browser and save it as {path}."
        try:
            import huggingface_hub
            from huggingface_hub import constants, errors, utils
        except ImportError as error:
            raise DownloadError(f"Downloading needs the Python package huggingface_hub 0.25 or newer ({error}): pip install "
                                f"--upgrade huggingface_hub. {self.by_hand}") from None
        self.errors, self.utils, self.timeout = errors, utils, constants.HF_HUB_DOWNLOAD_TIMEOUT
        self.url = huggingface_hub.hf_hub_url(REPOSITORY, published.path, endpoint=endpoint)
        self.host = self.url.split("/")[2]
        self.get_metadata = huggingface_hub.get_hf_file_metadata
        self.size, self.sha256 = 0, ""

    def ask(self) -> None:
        """Size and hash of the file."""
        try:
            facts = self.get_metadata(self.url)
        except Exception as error:
            if not of_the_network(error):
                raise
            raise self.explained(error) from error
        self.size, self.sha256 = facts.size or 0, facts.etag or ""
        if not self.size or len(self.sha256) != 64:
            raise DownloadError(f"{self.host} does not state size and SHA-256 of {self.url}, so what it sends cannot be "
                                f"verified. Unset HF_ENDPOINT, or set it to another mirror. {self.by_hand}")

    def chunks(self, start: int) -> Iterator[bytes]:
        """The file from byte ``start`` on.  Raises _Broken, or DownloadError where another try is of no use."""
        headers = self.utils.build_hf_headers() | {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            with self._opened(headers) as (response, pieces):
                self.utils.hf_raise_for_status(response)
                if start and response.status_code != 206:
                    yield RESTART
                yield from pieces
        except Exception as error:
            if not of_the_network(error):
                raise
            status = getattr(getattr(error, "response", None), "status_code", None)
            if isinstance(error, self.errors.OfflineModeIsEnabled) or status is not None and status not in TEMPORARY:
                raise self.explained(error) from error
            raise _Broken(f"{type(error).__name__}: {error}") from error

    @contextmanager
    def _opened(self, headers: dict[str, str]):
        """The answer and its pieces.  Redirects are followed; the clients keep the token from other hosts."""
        session = self.utils.get_session()
        if callable(getattr(session, "stream", None)):  # httpx, since huggingface_hub 1.0
            with session.stream("GET", self.url, headers=headers, timeout=self.timeout, follow_redirects=True) as response:
                yield response, response.iter_raw(CHUNK)
        else:  # requests
            with session.get(self.url, headers=headers, timeout=self.timeout, stream=True) as response:
                yield response, response.iter_content(CHUNK)

    def explained(self, error: Exception) -> DownloadError:
        errors = self.errors
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.OfflineModeIsEnabled):
            text = "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so nothing is downloaded. Unset it and start again."
        elif isinstance(error, errors.GatedRepoError) or status in (401, 403):
            text = (f"{self.host} refuses {self.url} ({status}). The published files need no account: a token that is no "
                    "longer valid, in HF_TOKEN or from `hf auth login`, is one cause; remove or renew it.")
        elif status is not None:
            text = (f"{self.host} answered {status} for {self.url}. See https://huggingface.co/{REPOSITORY} for what is "
                    "there now, or try again later.")
        else:
            text = (f"{self.host} cannot be reached ({type(error).__name__}: {error}). Check the network, and the variables "
                    "HTTPS_PROXY and HF_ENDPOINT (a mirror), then download again.")
        return DownloadError(f"{text} {self.by_hand}")


def of_the_network(error: Exception) -> bool:
    """requests raises OSErrors; httpx, and what takes its place, do not."""
    return isinstance(error, OSError) or type(error).__module__.startswith("httpx")


# -- waiting -----------------------------------------------------------------------------------------


def _call(function: Callable, check: Callable[[], object]):
    """``function()`` in a thread, which is left to itself when ``check`` raises: the network may hang for long."""
    result: Future = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    check()
    threading.Thread(target=run, daemon=True, name="cv-vae download").start()
    while not wait([result], 0.2).done:
        check()
    return result.result()


def _pause(seconds: float, check: Callable[[], object]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        check()
        time.sleep(0.1)


# -- the disk ----------------------------------------------------------------------------------------


@contextmanager
def _alone(partial: Path):
    """Refuse a second download of the same file; the lock ends with the process."""
    from filelock import FileLock, Timeout  # here, because it comes with huggingface_hub

    lock = FileLock(partial.with_name(f"{partial.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise DownloadError(f"{partial.parent} receives this file already, from another program or window. Wait for it, or "
                            "stop it.") from None
    except NotImplementedError:
        pass  # a disk that knows no locks: the hash tells if two have written
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            os.unlink(lock.lock_file)
        lock.release()


def _disk_full(hub: _Hub, partial: Path, done: int) -> DownloadError:
    free = shutil.disk_usage(partial.parent).free
    return DownloadError(f"The disk of {partial.parent} is full: {(hub.size - done) / 1e6:.0f} MB are still to come, "
                         f"{free / 1e6:.0f} MB are free. Make room and download again; the {done / 1e6:.0f} MB that have "
                         f"arrived are kept in {partial.name}.")
