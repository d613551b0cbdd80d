from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from commands.embedded import free_port
from consumers import operations
from consumers.errors import UpdaterError
from consumers.operations import OperationsServer
from notellm.settings import OperationsSettings
from tests.support.processes import wait_until


def nothing_wrong() -> list[str]:
    return []


@dataclass
class Running:
    """A server whose answers a test may change."""

    port: int
    health: Callable[[], list[str]] = nothing_wrong
    readiness: Callable[[], list[str]] = nothing_wrong
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def ask_health(self) -> list[str]:
        return self.health()

    def ask_readiness(self) -> list[str]:
        return self.readiness()

    def ask(
        self, path: str, method: str = "GET", seconds: float = 5.0, **headers: str
    ) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def raw(self, request: bytes) -> bytes:
        """All that comes back: http.client hides a body that should not be there."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as client:
            client.sendall(request)
            return b"".join(iter(lambda: client.recv(65536), b""))

    def verdict(self, path: str) -> tuple[int, object]:
        response, body = self.ask(path)
        assert response.getheader("Content-Type") == "application/json"
        return response.status, json.loads(body)


@pytest.fixture
def running() -> Iterator[Running]:
    state = Running(free_port())
    settings = OperationsSettings(port=state.port)
    with OperationsServer(settings, state.ask_health, state.ask_readiness, state.registry):
        yield state


def operations_threads() -> int:
    return sum(
        "process_request_thread" in thread.name or thread.name == "operations" for thread in threading.enumerate()
    )


def test_health_and_readiness_are_two_questions(running: Running) -> None:
    running.readiness = lambda: ["Milvus is away since 12 s", "no partition is assigned"]

    assert running.verdict("/healthz") == (200, {"status": "ok"})
    assert running.verdict("/readyz") == (
        503,
        {"status": "unavailable", "reasons": ["Milvus is away since 12 s", "no partition is assigned"]},
    )


def test_it_is_asked_anew_each_time(running: Running) -> None:
    running.health = lambda: ["the poller hangs"]
    assert running.verdict("/healthz")[0] == 503
    running.health = nothing_wrong
    assert running.verdict("/healthz")[0] == 200
    response, _ = running.ask("/healthz")
    assert response.getheader("Cache-Control") == "no-store"


def test_who_cannot_tell_how_it_is_is_not_well(running: Running) -> None:
    def raising() -> list[str]:
        raise RuntimeError("no such thread\nand a second line")

    running.health = raising
    assert running.verdict("/healthz") == (
        503,
        {"status": "unavailable", "reasons": ["RuntimeError: no such thread"]},
    )


def test_a_reason_may_hold_any_character(running: Running) -> None:
    running.health = lambda: ["note 'käse\ud800 旅行'"]
    status, said = running.verdict("/healthz")
    assert status == 503
    assert "旅行" in str(said)


@pytest.mark.parametrize("path", ["/healthz?verbose=1", "/healthz?"])
def test_a_query_changes_nothing(running: Running, path: str) -> None:
    assert running.verdict(path)[0] == 200


@pytest.mark.parametrize("path", ["/", "/health", "/healthz/", "/metrics/x", "//[", "/../etc/passwd", "*"])
def test_other_paths_are_not_there(running: Running, path: str) -> None:
    response, body = running.ask(path)
    assert response.status == 404
    assert body == b"there are /metrics, /healthz and /readyz\n"


@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz", "/nothing"])
def test_head_is_get_without_the_body(running: Running, path: str) -> None:
    running.readiness = lambda: ["not yet"]
    got, body = running.ask(path)
    head, _ = running.ask(path, "HEAD")
    assert running.raw(f"HEAD {path} HTTP/1.0\r\n\r\n".encode()).endswith(b"\r\n\r\n")
    assert head.status == got.status
    assert head.getheader("Content-Length") == str(len(body))
    assert head.getheader("Content-Type") == got.getheader("Content-Type")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_nothing_can_be_changed(running: Running, method: str) -> None:
    response, _ = running.ask("/metrics", method)
    assert response.status == 405
    assert response.getheader("Allow") == "GET, HEAD"


def test_metrics_for_prometheus(running: Running) -> None:
    Counter("test_notes", "Notes.", ["kind"], registry=running.registry).labels("tombstone").inc(3)

    plain, body = running.ask("/metrics")
    assert plain.getheader("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
    [notes] = [family for family in parse_plain(body.decode()) if family.name == "test_notes"]
    assert [(s.labels, s.value) for s in notes.samples if s.name == "test_notes_total"] == [({"kind": "tombstone"}, 3)]

    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"
    openmetrics, body = running.ask("/metrics", Accept=accept)
    assert openmetrics.getheader("Content-Type", "").startswith("application/openmetrics-text; version=1.0.0;")
    assert body.endswith(b"# EOF\n")
    assert [family.name for family in parse_openmetrics(body.decode())] == ["test_notes"]


def test_a_collector_that_raises_gets_an_answer(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def describe(self) -> list[GaugeMetricFamily]:
            return []  # else registering would collect

        def collect(self) -> list[GaugeMetricFamily]:
            raise ValueError("no lag to be had")

    running.registry.register(Broken())
    response, body = running.ask("/metrics")
    assert (response.status, body) == (500, b"ValueError: no lag to be had\n")
    assert "/metrics: ValueError: no lag to be had" in caplog.text
    assert running.verdict("/healthz")[0] == 200


def test_an_accept_that_nobody_can_read_gets_an_answer(running: Running) -> None:
    response, _ = running.ask("/metrics", Accept="application/openmetrics-text; version=one")
    assert response.status in (200, 500)
    assert running.verdict("/healthz")[0] == 200


def test_many_at_once(running: Running) -> None:
    """Each question takes a while, and none waits for another."""
    running.readiness = lambda: time.sleep(0.3) or []

    began = time.monotonic()
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: running.verdict("/readyz"), range(20)))
    assert answers == [(200, {"status": "ok"})] * 20
    assert time.monotonic() - began < 20 * 0.3 / 2


@contextmanager
def dribbling(port: int, every_s: float = 0.1) -> Iterator[tuple[socket.socket, threading.Event]]:
    """A client that sends a header one byte at a time, never silent and never done. The event: it was cut off."""
    client = socket.create_connection(("127.0.0.1", port), timeout=5)
    client.sendall(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
    over, cut_off = threading.Event(), threading.Event()

    def dribble() -> None:
        while not over.wait(every_s):
            try:
                client.sendall(b"x")
            except OSError:
                cut_off.set()
                return

    thread = threading.Thread(target=dribble)
    thread.start()
    try:
        yield client, cut_off
    finally:
        over.set()
        thread.join()
        client.close()


def test_slow_clients_hold_up_nobody(running: Running) -> None:
    with ExitStack() as stack:
        for _ in range(10):
            stack.enter_context(dribbling(running.port))
        began = time.monotonic()
        assert running.verdict("/healthz")[0] == 200
        assert time.monotonic() - began < 1


def test_a_client_that_is_never_done_is_cut_off(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_EXCHANGE_S", 1.0)
    with dribbling(running.port) as (_, cut_off):
        assert cut_off.wait(4), "it went on dribbling"
    wait_until(lambda: operations_threads() == 1, "its thread to end", 5)


def test_a_silent_client_is_cut_off(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert operations._Handler.timeout == operations._SILENCE_S
    monkeypatch.setattr(operations._Handler, "timeout", 0.3)
    with socket.create_connection(("127.0.0.1", running.port), timeout=5) as client:
        began = time.monotonic()
        assert client.recv(1) == b""
        assert time.monotonic() - began < 3


def is_served(running: Running) -> bool:
    try:
        return bool(running.verdict("/healthz")[0] == 200)
    except (http.client.RemoteDisconnected, ConnectionResetError):
        return False


def test_a_flood_of_idle_connections_costs_the_oldest_their_place(running: Running) -> None:
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=5)) for _ in range(100)
        ]
        # On a busy machine those that lost their place take a moment to go, and newcomers are turned away.
        wait_until(lambda: is_served(running), "an answer beside the flood", 5)
        assert clients[0].recv(1) == b""
        wait_until(lambda: operations_threads() <= operations._CONNECTIONS + 1, "threads to end", 5)


def test_questions_that_never_end_take_a_bounded_number_of_threads(running: Running) -> None:
    release = threading.Event()
    running.readiness = lambda: release.wait(20) and []
    try:
        with ExitStack() as stack:
            for _ in range(4 * operations._CONNECTIONS):
                client = stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=5))
                client.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
            wait_until(lambda: operations_threads() > operations._CONNECTIONS, "threads to begin", 5)
            assert operations_threads() <= 2 * operations._CONNECTIONS + 1
    finally:
        release.set()
    wait_until(lambda: operations_threads() == 1, "threads to end", 5)
    assert running.verdict("/readyz")[0] == 200


def test_what_is_no_http_is_no_news(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with socket.create_connection(("127.0.0.1", running.port), timeout=5) as client:
        client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
        client.recv(1000)
    running.ask("/healthz")
    assert running.verdict("/healthz")[0] == 200
    assert caplog.text == ""


def test_it_prints_nothing(running: Running, capfd: pytest.CaptureFixture[str]) -> None:
    for path in ("/metrics", "/healthz", "/nothing"):
        running.ask(path)
    with socket.create_connection(("127.0.0.1", running.port)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")  # and gone, with a reset
    running.ask("/healthz")
    assert capfd.readouterr() == ("", "")


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(
                UpdaterError,
                match=rf"^operations.port \(NOTELLM_OPERATIONS_PORT\): {port} is taken on 127.0.0.1; "
                "choose another port, or 0 to go without",
            ),
            OperationsServer(OperationsSettings(port=port), nothing_wrong, nothing_wrong),
        ):
            pytest.fail("it serves a port that another holds")


def test_an_address_of_another_machine_is_named() -> None:
    # TEST-NET-1: an address that nobody has.
    settings = OperationsSettings(host="192.0.2.1", port=free_port())
    with (
        pytest.raises(
            UpdaterError, match=r"^operations.host, operations.port: cannot listen on '192.0.2.1', port \d+: "
        ),
        OperationsServer(settings, nothing_wrong, nothing_wrong),
    ):
        pytest.fail("it listens")


def test_port_0_is_off() -> None:
    before = threading.active_count()
    with OperationsServer(OperationsSettings(port=0), nothing_wrong, nothing_wrong):
        assert threading.active_count() == before


def test_it_ends_when_left_whoever_is_still_there() -> None:
    port = free_port()
    with dribbling_after_start(port) as cut_off:
        assert cut_off.wait(4)
    wait_until(lambda: operations_threads() == 0, "all threads to end", 5)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
    # And the port can be taken again at once.
    with OperationsServer(OperationsSettings(port=port), nothing_wrong, nothing_wrong):
        assert Running(port).verdict("/healthz")[0] == 200


@contextmanager
def dribbling_after_start(port: int) -> Iterator[threading.Event]:
    """A client that is connected when its server ends."""
    with ExitStack() as stack:
        with OperationsServer(OperationsSettings(port=port), nothing_wrong, nothing_wrong):
            _, cut_off = stack.enter_context(dribbling(port))
            wait_until(lambda: operations_threads() == 2, "the connection to be taken", 5)
        yield cut_off


def test_loopback_is_not_warned_of_and_the_network_is(caplog: pytest.LogCaptureFixture) -> None:
    for host in ("127.0.0.1", "localhost", "::1"):
        with OperationsServer(OperationsSettings(host=host, port=free_port()), nothing_wrong, nothing_wrong):
            pass
    assert caplog.text == ""
    port = free_port()
    with OperationsServer(OperationsSettings(host="0.0.0.0", port=port), nothing_wrong, nothing_wrong):
        assert Running(port).verdict("/healthz")[0] == 200
    assert f"operations.host: 0.0.0.0: whoever reaches port {port} of this machine can read the metrics" in caplog.text
