"""The encoder in a process of its own: a native crash costs a restart, and the note that does it is found.

The model runs code that no ``except`` can catch: a segmentation fault, an out-of-memory kill. So it runs beside the
updater, which keeps its place in the consumer group whatever happens there. When the process ends over a batch, the
batch is halved until one note is left that ends it alone, twice: that note is refused, the others are encoded.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Self, TypeVar

import msgspec
from prometheus_client import Counter, Gauge
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import REGISTRY

from consumers.encoder_wire import Answer, Batch, BuildPrompts, Done, Encode, Failed, Prompts, Ready, Refused, Wire
from consumers.errors import EncoderUnavailable, Stopped, UpdaterError
from notellm.encoder import EncodedBatch
from notellm.errors import EncoderError, NoteRefused
from notellm.messages import Note
from notellm.prompt import Prompt

__all__ = ["EncoderProcess"]

log = logging.getLogger(__name__)
T = TypeVar("T")

RESTARTS = Counter(
    "notellm_encoder_restarts_total", "Times the encoder's process was started again, by what ended it.", ["cause"]
)
READY = Gauge("notellm_encoder_ready", "1 while the encoder's process has a loaded model.")

_STOP_SECONDS = 5.0


class _Crashed(Exception):
    """The process ended, or had to be ended. Its text completes "the encoder's process ..."."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.cause = cause


class EncoderProcess:
    """See :class:`consumers.protocols.Encoder`. One thread at a time may call it; :attr:`ready` any.

    ``function`` names what loads the model in there, ``"module:function"``; ``arguments`` must fit into JSON.
    """

    def __init__(
        self,
        function: str,
        arguments: dict[str, Any],
        *,
        memory_limit_mb: int = 0,
        start_timeout_s: float = 600.0,
        answer_timeout_s: float = 300.0,
    ) -> None:
        self._command = [function, msgspec.json.encode(arguments).decode(), str(memory_limit_mb)]
        self._start_timeout_s = start_timeout_s
        self._answer_timeout_s = answer_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._about: Ready | None = None
        self._ready = False
        self._answering = False
        self._closed = threading.Event()
        self._memory = ProcessCollector(namespace="notellm_encoder", pid=lambda: self.pid or "none", registry=None)

    def __enter__(self) -> Self:
        self.start()
        REGISTRY.register(self._memory)
        return self

    def __exit__(self, *exception: object) -> None:
        REGISTRY.unregister(self._memory)
        self.close()

    def start(self) -> None:
        """The first start. Raises :class:`EncoderError` that says why it cannot be."""
        try:
            self._start()
        except _Crashed as crash:
            raise EncoderError(str(crash) if crash.cause == "refused" else f"the encoder's process {crash}") from None

    def close(self) -> None:
        """End the process, whatever it is doing; a call that waits for it raises :class:`Stopped`."""
        self._closed.set()
        # Its end is what wakes the call; the connection is that call's.
        self._kill()

    @property
    def ready(self) -> bool:
        """The process is there, with a model that has encoded a note."""
        process = self._process
        return self._ready and process is not None and process.poll() is None

    @property
    def pid(self) -> int | None:
        """Of the process that is there now."""
        process = self._process
        return process.pid if process is not None else None

    @property
    def model_version(self) -> str:
        return self._known.model_version

    @property
    def embedding_dim(self) -> int:
        return self._known.embedding_dim

    @property
    def provider(self) -> str:
        return self._known.provider

    def build_prompts(self, notes: Sequence[Note]) -> list[Prompt]:
        built: list[Prompt | None] = [None] * len(notes)

        def ask(group: list[int]) -> Iterator[tuple[list[int], list[Prompt]]]:
            # Attributes are no part of a prompt, and may be numbers that MessagePack has no room for.
            bare = [msgspec.structs.replace(notes[index], attributes={}) for index in group]
            for answer in self._ask(BuildPrompts(bare)):
                if isinstance(answer, Prompts):
                    yield group, answer.prompts

        for group, prompts in self._find_the_crasher(len(notes), ask):
            for index, prompt in zip(group, prompts, strict=True):
                built[index] = prompt
        return [prompt for prompt in built if prompt is not None]

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[EncodedBatch]:
        embedded: set[int] = set()

        def ask(group: list[int]) -> Iterator[tuple[list[int], EncodedBatch]]:
            for answer in self._ask(Encode([prompts[index] for index in group])):
                if isinstance(answer, Batch):
                    indices = [group[index] for index in answer.indices]
                    batch = EncodedBatch(indices, answer.matrix(), answer.tags)
                    yield ([] if answer.tags is None else indices), batch

        for _, batch in self._find_the_crasher(len(prompts), ask):
            # A row that was embedded before a crash is embedded again after it: told once is enough.
            if batch.tags is not None or not embedded.issuperset(batch.indices):
                embedded.update(batch.indices)
                yield batch

    def _find_the_crasher(
        self, count: int, ask: Callable[[list[int]], Iterator[tuple[list[int], T]]]
    ) -> Iterator[tuple[list[int], T]]:
        """Ask for groups of ``range(count)``, first for all; halve those that end the process.

        ``ask`` yields which indices an answer finishes, and the answer.
        """
        groups = [list(range(count))] if count else []
        ended_it_alone: set[int] = set()
        while groups:
            group = groups.pop()
            left = set(group)
            try:
                for finished, answer in ask(group):
                    left.difference_update(finished)
                    yield finished, answer
            except NoteRefused as refused:
                raise NoteRefused(group[refused.index], str(refused)) from None
            except _Crashed as crash:
                RESTARTS.labels(crash.cause).inc()
                log.warning("the encoder's process %s, over %d notes; starting it again", crash, len(left))
                if len(group) == 1 and left:
                    if group[0] in ended_it_alone:
                        raise NoteRefused(
                            group[0], f"the encoder's process {crash}, twice over this note alone"
                        ) from None
                    # Once may be somebody's kill -9; a crash of the note's own making comes again.
                    ended_it_alone.update(group)
                rest = [index for index in group if index in left]
                middle = len(rest) // 2
                groups += [half for half in (rest[middle:], rest[:middle]) if half]

    def _ask(self, request: BuildPrompts | Encode) -> Iterator[Answer]:
        """The answers to ``request``, up to :class:`Done`. Raises :class:`NoteRefused` or :class:`_Crashed`."""
        if not self._ready:
            self._start_again()
        while self._answering:
            self._receive(self._answer_timeout_s)  # somebody left a stream before its end: these are not ours
        self._send(request)
        while True:
            answer = self._receive(self._answer_timeout_s)
            if isinstance(answer, Done):
                return
            if isinstance(answer, Refused):
                raise NoteRefused(answer.index, answer.detail)
            yield answer

    def _start_again(self) -> None:
        before = self._known
        try:
            self._start()
        except _Crashed as crash:
            raise EncoderUnavailable(f"the encoder's process {crash}") from None
        if self._known.model_version != before.model_version:
            self._end()
            raise UpdaterError(
                f"the bundle was replaced while the updater ran: it was {before.model_version} and is now "
                f"{self._known.model_version}; start the updater again, it will fill that model's own collection"
            )

    def _start(self) -> None:
        if self._closed.is_set():
            raise Stopped("the encoder's process is closed")
        self._end()
        ours, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "consumers.encoder_child", str(theirs.fileno()), *self._command],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # Ctrl-C in the terminal is for the updater.
                start_new_session=True,
            )
        self._connection = ours
        answer = self._receive(self._start_timeout_s)
        assert isinstance(answer, Ready)
        self._about = answer
        self._ready = True
        READY.set(1)

    def _send(self, request: BuildPrompts | Encode) -> None:
        assert self._connection is not None
        self._answering = True
        try:
            self._connection.send_bytes(Wire.encode(request))
        except OSError:
            raise self._reap() from None

    def _receive(self, timeout_s: float) -> Answer:
        assert self._connection is not None
        try:
            if not self._connection.poll(timeout_s):
                self._end()
                raise _Crashed("hung", f"did not answer within {timeout_s:.0f} s")
            answer: Answer = Wire.answer(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise self._reap() from None
        if isinstance(answer, Failed):
            self._reap()
            raise _Crashed(answer.cause, answer.detail if answer.cause == "refused" else f"failed: {answer.detail}")
        if isinstance(answer, Done | Refused):
            self._answering = False
        return answer

    def _reap(self) -> _Crashed:
        """What ended the process."""
        if self._closed.is_set():
            raise Stopped("the encoder's process is closed")
        assert self._process is not None
        try:
            status = self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            status = None
        self._end()
        if status is None:
            return _Crashed("hung", "closed its connection and did not end")
        if status < 0:
            name = signal.Signals(-status).name
            return _Crashed(name, f"was killed by {name}")
        return _Crashed("exit", f"ended with status {status}")

    def _end(self) -> None:
        self._kill()
        self._answering = False
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _kill(self) -> None:
        self._ready = False
        READY.set(0)
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def _known(self) -> Ready:
        if self._about is None:
            raise EncoderError("the encoder's process was not started")
        return self._about
