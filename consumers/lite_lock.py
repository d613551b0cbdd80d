"""One updater per Milvus Lite server: several writers that overlap with its flushes lose acknowledged rows."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from consumers.errors import SecondWriter

__all__ = ["LiteLock"]

_LOOPBACK = {"localhost", "127.0.0.1", "0.0.0.0", "::1"}  # noqa: S104 - nothing is bound


class LiteLock:
    """A lock of this machine's, by server address. It ends with the process that holds it, however that ends."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        address = urlsplit(uri)
        host = "loopback" if address.hostname in _LOOPBACK else str(address.hostname)
        digest = hashlib.sha256(f"{host}:{address.port}".encode()).hexdigest()[:16]
        self._file = Path(tempfile.gettempdir()) / f"notellm-lite-{os.getuid()}-{digest}.lock"
        self._stream: IO[str] | None = None

    def acquire(self) -> None:
        """Raises :class:`SecondWriter` when another process holds it."""
        # Not truncated by opening: what stands in it is the holder's process id.
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        stream = os.fdopen(descriptor, "r+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = stream.read().strip() or "unknown"
            stream.close()
            raise SecondWriter(
                f"milvus.uri: {self._uri} is a Milvus Lite server, which takes one writer, and the updater with "
                f"process id {holder} writes to it; stop that one, or use a Milvus server"
            ) from None
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        self._stream = stream

    def release(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
