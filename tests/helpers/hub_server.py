"""A local server that speaks the part of Hugging Face's protocol that downloads use.  Needs the standard library only.

A hub answers HEAD and GET of ``/REPOSITORY/resolve/REVISION/PATH`` with the file's facts in its headers and a redirect to
another host, which sends the bytes, whole or from a Range on.
"""

import contextlib
import hashlib
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

REPOSITORY = "AILab-CVC/CV-VAE"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """files: content by path in the repository.  What goes wrong is set on the attributes, also while it runs."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.seen: list[tuple[str, str, dict[str, str]]] = []  # host ("hub" or "storage"), method, headers
        self.hash_stated: str | None = None  # in place of the true one
        self.status: dict[str, int] = {}  # an error in place of an answer, by host
        self.cut_after: int | None = None  # bytes of a file, after which its connection is closed
        self.cuts = 0  # connections still to be cut; with cut_after
        self.ranges = True  # whether Range is honoured
        self.hang = threading.Event()  # while set, bytes do not come
        self.pace = 0.0  # seconds before each 64 KB

    def __enter__(self) -> "HubServer":
        self.servers = {name: ThreadingHTTPServer(("127.0.0.1", 0), self._handler(name)) for name in ("hub", "storage")}
        for server in self.servers.values():
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.hang.clear()
        for server in self.servers.values():
            server.shutdown()
            server.server_close()

    def address(self, name: str = "hub") -> str:
        host = {"hub": "127.0.0.1", "storage": "localhost"}[name]  # apart, as clients follow redirects within a host
        return f"http://{host}:{self.servers[name].server_port}"

    def headers_of(self, host: str, method: str) -> list[dict[str, str]]:
        return [headers for where, how, headers in self.seen if (where, how) == (host, method)]

    def _handler(self, host: str) -> type:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.answer("HEAD")

            def do_GET(self):
                self.answer("GET")

            def answer(self, method: str) -> None:
                hub.seen.append((host, method, {name.lower(): value for name, value in self.headers.items()}))
                if host in hub.status:
                    return self.head(hub.status[host], {"Content-Length": "0"})
                with contextlib.suppress(ConnectionError):
                    self.redirect() if host == "hub" else self.send()

            def redirect(self) -> None:
                asked = re.fullmatch(rf"/{REPOSITORY}/resolve/[^/]+/(.+)", urlsplit(self.path).path)
                if not asked or asked[1] not in hub.files:
                    return self.head(404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"})
                content = hub.files[asked[1]]
                self.head(302, {
                    "Location": f"{hub.address('storage')}/{asked[1]}", "X-Repo-Commit": COMMIT,
                    "X-Linked-Size": str(len(content)), "ETag": '"of-the-pointer"', "Content-Length": "0",
                    "X-Linked-ETag": f'"{hub.hash_stated or hashlib.sha256(content).hexdigest()}"'})

            def send(self) -> None:
                content = hub.files[self.path.lstrip("/")]
                asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                start = int(asked[1]) if asked and hub.ranges else 0
                rest = content[start:]
                self.head(206 if start else 200, {"Content-Length": str(len(rest)), "Accept-Ranges": "bytes"} | (
                    {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}))
                cut = hub.cut_after is not None and hub.cuts > 0
                hub.cuts -= cut
                end = min(len(rest), hub.cut_after) if cut else len(rest)
                for position in range(0, end, 2**16):
                    time.sleep(hub.pace)
                    while hub.hang.is_set():
                        time.sleep(0.02)
                    self.wfile.write(rest[position:min(position + 2**16, end)])
                if cut:
                    self.close_connection = True

            def head(self, status: int, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_) -> None:
                pass

        return Handler
