"""What operators look at, over HTTP: ``/metrics`` for Prometheus, ``/healthz`` and ``/readyz`` for whoever restarts us.

Health is "need not be restarted", readiness is "does its work now". Both are answered by callables that return what is
wrong, in words; nothing wrong is 200, anything wrong is 503 with these words as JSON.
"""

from __future__ import annotations

import errno
import json
import logging
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from threading import Lock, Thread
from types import TracebackType
from typing import Any, Self

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.exposition import choose_encoder

from consumers.errors import UpdaterError
from notellm.settings import OperationsSettings

__all__ = ["OperationsServer", "Reasons"]

log = logging.getLogger(__name__)

Reasons = Callable[[], list[str]]

# One client says nothing for so long, or one exchange lasts so long: it is cut off.
_SILENCE_S = 5.0
_EXCHANGE_S = 10.0
# From so many on, a new connection costs the oldest one its place; twice as many, and the new one is turned away.
_CONNECTIONS = 32
_LONGEST_REASON = 500


class OperationsServer:
    """Serves from entering to leaving it, in daemon threads. Port 0 serves nothing.

    Raises :class:`UpdaterError` when it cannot listen where the settings say.
    """

    def __init__(
        self,
        settings: OperationsSettings,
        health: Reasons,
        readiness: Reasons,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._settings = settings
        self._questions = {"/healthz": health, "/readyz": readiness}
        self._registry = registry
        self._server: _Server | None = None

    def __enter__(self) -> Self:
        if self._settings.port:
            self._server = _listen(self._settings, self._answer)
            Thread(
                target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="operations", daemon=True
            ).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _answer(self, path: str, accept: str) -> _Answer:
        if path == "/metrics":
            return self._metrics(accept)
        if path in self._questions:
            return _verdict(self._questions[path])
        return _text(HTTPStatus.NOT_FOUND, "there are /metrics, /healthz and /readyz")

    def _metrics(self, accept: str) -> _Answer:
        try:
            encode, content_type = choose_encoder(accept)
            return _Answer(HTTPStatus.OK, content_type, encode(self._registry))
        except Exception as error:  # noqa: BLE001 - a collector of somebody else's, or an Accept that nobody can read
            log.warning("/metrics: %s", _words(error))
            return _text(HTTPStatus.INTERNAL_SERVER_ERROR, _words(error))


@dataclass(frozen=True)
class _Answer:
    status: HTTPStatus
    content_type: str
    body: bytes


def _verdict(question: Reasons) -> _Answer:
    try:
        reasons = question()
    except Exception as error:  # noqa: BLE001 - who cannot tell how it is, is not well
        reasons = [_words(error)]
    said = {"status": "unavailable", "reasons": reasons} if reasons else {"status": "ok"}
    status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
    return _Answer(status, "application/json", json.dumps(said, ensure_ascii=False).encode("utf-8", "replace") + b"\n")


def _text(status: HTTPStatus, words: str) -> _Answer:
    return _Answer(status, "text/plain; charset=utf-8", f"{words}\n".encode("utf-8", "replace"))


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:_LONGEST_REASON]


def _listen(settings: OperationsSettings, answer: Callable[[str, str], _Answer]) -> _Server:
    host, port = settings.host, settings.port
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        server = _Server(family, address, answer)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UpdaterError(
                f"operations.port (NOTELLM_OPERATIONS_PORT): {port} is taken on {host}; choose another port, or 0 to "
                "go without /metrics, /healthz and /readyz"
            ) from None
        raise UpdaterError(
            f"operations.host, operations.port: cannot listen on {host!r}, port {port}: {error.strerror}; choose an "
            "address of this machine and a port above 1023, or port 0 to go without"
        ) from None
    if not ip_address(str(address[0]).partition("%")[0]).is_loopback:
        log.warning("operations.host: %s: whoever reaches port %d of this machine can read the metrics", host, port)
    return server


class _Server(ThreadingHTTPServer):
    """A thread for each connection, and an end to each: a slow client holds up nobody but itself."""

    request_queue_size = 64

    def __init__(self, family: int, address: Any, answer: Callable[[str, str], _Answer]) -> None:
        self.address_family = family
        self.answer = answer
        self._open: dict[socket.socket, float] = {}  # since when, the oldest first
        self._lock = Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the name servers what this host is called.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = "notellm", int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            turned_away = len(self._open) >= 2 * _CONNECTIONS
            oldest = next(iter(self._open)) if len(self._open) >= _CONNECTIONS else None
            if not turned_away:
                self._open[request] = time.monotonic()
        if oldest is not None:
            _cut_off(oldest)
        if turned_away:
            self.shutdown_request(request)
        else:
            super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Called between requests, and several times a second when there are none."""
        too_old = time.monotonic() - _EXCHANGE_S
        with self._lock:
            expired = [request for request, since in self._open.items() if since < too_old]
        for request in expired:
            _cut_off(request)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        with self._lock:
            still_open = list(self._open)
        for request in still_open:
            _cut_off(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("operations: connection of %s", client_address, exc_info=True)


def _cut_off(request: socket.socket) -> None:
    """Its thread finds the connection ended, and closes it."""
    with suppress(OSError):  # it is over already
        request.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    timeout = _SILENCE_S
    server: _Server

    def do_GET(self) -> None:
        self._reply(with_body=True)

    def do_HEAD(self) -> None:
        self._reply(with_body=False)

    def _reply(self, *, with_body: bool) -> None:
        self._send(self.server.answer(self.path.partition("?")[0], self.headers.get("Accept", "")), with_body=with_body)

    def _send(self, answer: _Answer, *, with_body: bool = True, allow: str = "") -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("Cache-Control", "no-store")
        if allow:
            self.send_header("Allow", allow)
        self.end_headers()
        if with_body:
            self.wfile.write(answer.body)

    def _refuse(self) -> None:
        self._send(_text(HTTPStatus.METHOD_NOT_ALLOWED, "GET and HEAD only"), allow="GET, HEAD")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse  # noqa: N815

    def version_string(self) -> str:
        return "notellm"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the standard library's name
        """No access log: a scrape every few seconds is no news."""
