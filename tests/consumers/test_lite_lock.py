from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from commands.embedded import free_port
from consumers.errors import SecondWriter
from consumers.lite_lock import LiteLock

HOLDER = """
import sys, time
from consumers.lite_lock import LiteLock
lock = LiteLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def holder(port: int) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, f"http://127.0.0.1:{port}"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "LOCALHOST", "0.0.0.0"])
def test_a_second_process_is_refused_and_told_who_holds_it(holder: subprocess.Popen[str], port: int, host: str) -> None:
    with pytest.raises(SecondWriter, match=rf"process id {holder.pid} .*stop that one, or use a Milvus server"):
        LiteLock(f"http://{host}:{port}").acquire()


def test_it_is_free_again_when_its_holder_is_killed(holder: subprocess.Popen[str], port: int) -> None:
    holder.kill()
    holder.wait()
    lock = LiteLock(f"http://127.0.0.1:{port}")
    lock.acquire()
    lock.release()


def test_another_server_has_a_lock_of_its_own(holder: subprocess.Popen[str], port: int) -> None:
    for uri in (f"http://127.0.0.1:{free_port()}", f"http://milvus.example:{port}"):
        lock = LiteLock(uri)
        lock.acquire()
        lock.release()


def test_it_can_be_released_and_taken_again(port: int) -> None:
    first, second = LiteLock(f"http://127.0.0.1:{port}"), LiteLock(f"http://127.0.0.1:{port}")
    first.acquire()
    with pytest.raises(SecondWriter):
        second.acquire()
    first.release()
    second.acquire()
    second.release()
    first.release()
