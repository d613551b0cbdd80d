"""A dead letter and its headers: Kafka Connect's own names (KIP-298), so that existing tools read them, and ours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

__all__ = ["MODEL_VERSION", "REASON", "VALUE_OMITTED", "DeadLetter", "Headers", "dead_letter_headers"]

Headers = tuple[tuple[str, bytes | None], ...]

REASON = "notellm.reason"
MODEL_VERSION = "notellm.model_version"
VALUE_OMITTED = "notellm.value.omitted.bytes"

_CONNECT = "__connect.errors."


@dataclass(frozen=True)
class DeadLetter:
    """The record as it came, its own headers first and ours behind them."""

    key: bytes | None
    value: bytes | None
    theirs: Headers
    ours: Headers

    def smaller(self) -> Self | None:
        """Without its value; where that was not enough, without all that strangers wrote; then there is no less."""
        if self.value is not None:
            return replace(self, value=None, ours=(*self.ours, (VALUE_OMITTED, str(len(self.value)).encode())))
        if self.key is not None or self.theirs:
            return replace(self, key=None, theirs=())
        return None


def dead_letter_headers(
    *,
    topic: str,
    partition: int,
    offset: int,
    stage: str,
    reason: str,
    error: Exception,
    model_version: str = "",
    connector: str = "notellm",
) -> list[tuple[str, bytes]]:
    """The headers that are added behind the record's own. All values are UTF-8 text, as Connect writes them.

    ``stage`` is Connect's: ``VALUE_CONVERTER`` for a record that is no note, ``TASK_PUT`` for a note that the model or
    Milvus refused. There is no header for an empty ``model_version``: a click is of no model.
    """
    values = {
        _CONNECT + "topic": topic,
        _CONNECT + "partition": str(partition),
        _CONNECT + "offset": str(offset),
        _CONNECT + "connector.name": connector,
        _CONNECT + "task.id": "0",
        _CONNECT + "stage": stage,
        _CONNECT + "class.name": f"{type(error).__module__}.{type(error).__qualname__}",
        _CONNECT + "exception.class.name": f"{type(error).__module__}.{type(error).__qualname__}",
        _CONNECT + "exception.message": str(error),
        REASON: reason,
        **({MODEL_VERSION: model_version} if model_version else {}),
    }
    return [(name, value.encode("utf-8", "replace")) for name, value in values.items()]
