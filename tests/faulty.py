"""A proxy in front of the tests' S3 server that breaks some of its answers."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import urlsplit

FAULTS = ("500", "503", "cut", "500 after", "cut after", "half", "slow")
SLOW_SECONDS = 0.3
Plan = Callable[[str, str], str | None]  # of (method, path): one of FAULTS, or None for an honest answer


class FaultyServer(ThreadingHTTPServer):
    """Forwards each request, unless its plan says otherwise; `after`: the request is carried out, and its answer is lost."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(endpoint).netloc
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.plan: Plan = lambda method, path: None
        self.broken: list[tuple[str, str, str]] = []  # (fault, method, path)
        self._mutex = Lock()

    def fault(self, method: str, path: str) -> str | None:
        with self._mutex:
            fault = self.plan(method, path)
            if fault:
                self.broken.append((fault, method, path))
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.fault(self.command, urlsplit(self.path).path)
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        if fault in ("500", "503"):
            return self._send(int(fault), [], b"<Error><Code>InternalError</Code></Error>")
        if fault == "cut":
            self.close_connection = True
            return None
        connection = http.client.HTTPConnection(self.server.target)
        connection.request(
            self.command, self.path, body, {k: v for k, v in self.headers.items() if k.lower() != "host"}
        )
        answer = connection.getresponse()
        status, headers, data = answer.status, answer.getheaders(), answer.read()
        connection.close()
        if fault == "cut after":
            self.close_connection = True
            return None
        if fault == "500 after":
            return self._send(500, [], b"<Error><Code>InternalError</Code></Error>")
        return self._send(status, headers, data, half=fault == "half")

    def _send(self, status: int, headers: list[tuple[str, str]], data: bytes, *, half: bool = False) -> None:
        self.send_response(status)
        length = str(len(data))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if half else data)
        self.close_connection = half

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer  # noqa: N815 - names of http.server

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextmanager
def faulty_server(endpoint: str) -> Iterator[FaultyServer]:
    """A running one, in front of an endpoint."""
    server = FaultyServer(endpoint)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
