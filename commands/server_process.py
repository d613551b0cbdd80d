"""A server that we start, wait for, and end: one process with its log in a file."""

from __future__ import annotations

import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from notellm.errors import NoteLLMError

__all__ = ["ServerProcess"]

_LINES_OF_LOG = 30


class ServerProcess(ABC):
    """``log`` is appended to. Once stopped or killed, it can be started again."""

    def __init__(self, name: str, log: Path, *, start_seconds: float = 60.0, stop_seconds: float = 30.0) -> None:
        self.name = name
        self.log = log
        self._start_seconds = start_seconds
        self._stop_seconds = stop_seconds
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def start(self) -> None:
        """Returns once it takes calls. Raises :class:`NoteLLMError` with the end of its log when it does not."""

    def restart(self) -> None:
        self.stop()
        self.start()

    def _run(
        self,
        command: Sequence[str | Path],
        answers: Callable[[], bool],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                list(map(str, command)),
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal is for us; we end the server when nobody needs it any more.
                start_new_session=True,
            )
        deadline = time.monotonic() + self._start_seconds
        while not answers():
            if not self.is_running or time.monotonic() > deadline:
                self.kill()
                raise NoteLLMError(f"{self.name} did not start; the end of {self.log}:\n{self.end_of_log()}")
            time.sleep(0.1)

    def end_of_log(self) -> str:
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-_LINES_OF_LOG:])

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """As ``kill -9``."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """Tell it to end, and see that it does."""
        if self._process is not None and self.is_running:
            self._process.terminate()
            try:
                self._process.wait(self._stop_seconds)
            except subprocess.TimeoutExpired:
                self.kill()
