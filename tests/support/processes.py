"""The project's own commands as processes, so that tests can kill them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["CommandProcess", "run_command", "wait_until"]

# Tests run several updaters at once, which cannot all have the usual port.
_NO_PORT = {"NOTELLM_OPERATIONS_PORT": "0"}


class CommandProcess:
    """``notellm ARGUMENTS...``, or another ``module``, with its output in a file."""

    def __init__(
        self,
        log: Path,
        *arguments: str,
        module: str = "commands",
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, **_NO_PORT, **(env or {})},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def text(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def wait_for(self, words: str, seconds: float = 60.0) -> None:
        """Until ``words`` stand in its output. Fails, with the output, when the process ends before."""
        wait_until(
            lambda: words in self.text() or self._process.poll() is not None,
            f"{words!r} in the output of {self._process.args!r}",
            seconds,
        )
        assert words in self.text(), f"the process ended with {self._process.returncode}:\n{self.text()}"

    def kill(self) -> None:
        """As ``kill -9``."""
        self._process.kill()
        self._process.wait()

    def stop(self, seconds: float = 40.0) -> int:
        """SIGTERM; returns the exit status."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None


def run_command(
    *arguments: str,
    seconds: float = 60.0,
    env: dict[str, str] | None = None,
    stdin: bytes | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``notellm ARGUMENTS...`` to its end, wide enough that no line is folded."""
    done = subprocess.run(
        [sys.executable, "-m", "commands", *arguments],
        input=stdin,
        capture_output=True,
        timeout=seconds,
        env={**os.environ, **_NO_PORT, "COLUMNS": "400", **(env or {})},
        cwd=cwd,
        check=False,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    )


def wait_until(done: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Poll ``done``; fail with ``what`` once the time is up."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.02)
