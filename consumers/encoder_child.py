"""The encoder's process: loads a model, proves that it works, and answers until the updater is gone.

``python -m consumers.encoder_child FD MODULE:FUNCTION JSON MEMORY_LIMIT_MB``. Whatever goes wrong that is no
:class:`NoteRefused` ends the process: it is cheaper to start again than to trust a model after that.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Literal

import msgspec

from consumers.encoder_wire import Answer, Batch, BuildPrompts, Done, Failed, Prompts, Ready, Refused, Request, Wire
from consumers.protocols import Encoder
from notellm.encoder import NoteEncoder
from notellm.errors import NoteLLMError, NoteRefused
from notellm.messages import Note

__all__ = ["load_bundle", "main"]

_PROBE = Note(note_id="probe", title="Two days in Kyoto", content="The maple leaves are turning.", hashtags=["kyoto"])


def load_bundle(**arguments: object) -> NoteEncoder:
    """The encoder of a bundle; ``arguments`` are :meth:`NoteEncoder.load`'s."""
    return NoteEncoder.load(**arguments)  # type: ignore[arg-type]


def main(fd: str, function: str, arguments: str, memory_limit_mb: str) -> None:
    # Ctrl-C and a service manager's SIGTERM are for the updater: we end when it closes its side, not before.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if int(memory_limit_mb):
        # Data, not address space: CUDA reserves far more addresses than it ever uses.
        limit = int(memory_limit_mb) << 20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    connection = Connection(int(fd))
    try:
        _serve(connection, _load(function, arguments))
    except (EOFError, ConnectionError):
        pass  # the updater is gone
    except BaseException as error:  # noqa: BLE001 - a Rust panic or a MemoryError is no Exception of ours
        _last_words(connection, error)
        # No clean-up: native threads may be stuck or broken.
        os._exit(1)


def _load(function: str, arguments: str) -> Encoder:
    module, name = function.split(":")
    encoder: Encoder = getattr(importlib.import_module(module), name)(**msgspec.json.decode(arguments))
    # A model that cannot encode a harmless note must not be let loose on strangers' ones: it would refuse them all.
    for _ in encoder.stream(encoder.build_prompts([_PROBE])):
        pass
    return encoder


def _serve(connection: Connection, encoder: Encoder) -> None:
    ready = Ready(encoder.model_version, encoder.embedding_dim, str(getattr(encoder, "provider", "")))
    connection.send_bytes(Wire.encode(ready))
    while True:
        request = Wire.request(connection.recv_bytes())
        for answer in _answers(encoder, request):
            connection.send_bytes(Wire.encode(answer))


def _answers(encoder: Encoder, request: Request) -> Iterator[Answer]:
    try:
        if isinstance(request, BuildPrompts):
            yield Prompts(encoder.build_prompts(request.notes))
        else:
            for batch in encoder.stream(request.prompts):
                yield Batch.of(batch)
        yield Done()
    except NoteRefused as refused:
        yield Refused(refused.index, str(refused))


def _last_words(connection: Connection, error: BaseException) -> None:
    if isinstance(error, NoteLLMError):
        words = Failed("refused", str(error))
    else:
        cause: Literal["memory", "error"] = "memory" if isinstance(error, MemoryError) else "error"
        words = Failed(cause, f"{type(error).__name__}: {error}"[:2000])
    with contextlib.suppress(OSError, MemoryError):  # else the exit status has to say it
        connection.send_bytes(Wire.encode(words))


if __name__ == "__main__":
    main(*sys.argv[1:])
