"""Rows into Milvus, by rules that are right on a Milvus server and on Milvus Lite alike."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import numpy as np
from pymilvus import MilvusClient, MilvusException

from consumers.errors import RowRefused, SinkUnavailable
from consumers.milvus_collection import Collection, check_collection, check_row, id_filter
from consumers.milvus_connection import COLLECTION_NOT_LOADED, UNEXPECTED, milvus_errors
from consumers.protocols import Row

__all__ = ["MilvusSink"]

_FIELDS = [field.name for field in fields(Row)]
# A read at this level waits for nothing and shows at least what was there 5 s ago (common.gracefulTime of the server).
# That is too old for what we wrote just now: a read right after a write waits for it, for up to half a second.
_USUAL = "Bounded"
_USUAL_LAG_S = 10.0


class MilvusSink:
    """See :class:`consumers.protocols.Sink`. One of these writes to a collection, never two on Milvus Lite."""

    def __init__(self, client: MilvusClient, collection: Collection, timeout_s: float) -> None:
        self._client = client
        self._collection = collection
        self._name = collection.name
        self._timeout_s = timeout_s
        self._read_level, self._until = _USUAL, 0.0

    def stored(self, note_ids: Sequence[str]) -> Mapping[str, Row]:
        with self._errors():
            found = self._query(id_filter(list(note_ids)))
        return {row.note_id: row for row in map(_row, found)}

    def upsert(self, rows: Sequence[Row]) -> None:
        for row in rows:
            check_row(row, self._collection.embedding_dim)
        with self._errors(), self._write():
            self._client.upsert(self._name, [vars(row) for row in rows], timeout=self._timeout_s)
        self._read_level = "Session"  # of an upsert the client knows the time, which is enough and waits for less

    def delete(self, note_ids: Sequence[str]) -> None:
        with self._errors(), self._write():
            # Never delete(ids=...): pymilvus puts ids into its filter unescaped.
            self._client.delete(self._name, filter=id_filter(list(note_ids)), timeout=self._timeout_s)

    def check(self) -> None:
        check_collection(self._client, self._collection, self._timeout_s)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            with milvus_errors():
                yield
        except RowRefused:
            self.check()  # before a row is blamed: a collection that was changed refuses them all
            raise
        except SinkUnavailable as error:
            if getattr(error.__cause__, "code", None) == UNEXPECTED:
                self.check()  # before it is tried for ever: some servers say this of a changed collection
            raise

    @contextmanager
    def _write(self) -> Iterator[None]:
        """Whatever becomes of the write, the reads that follow are to see it if it is there."""
        try:
            yield
        finally:
            self._read_level, self._until = "Strong", time.monotonic() + _USUAL_LAG_S

    def _query(self, expression: str) -> Any:
        try:
            return self._query_loaded(expression)
        except MilvusException as error:
            if error.code != COLLECTION_NOT_LOADED:
                raise
        # A Milvus Lite that was started again has its collections, but has loaded none; its readers wait for this too.
        self._client.load_collection(self._name, timeout=self._timeout_s)
        return self._query_loaded(expression)

    def _query_loaded(self, expression: str) -> Any:
        return self._client.query(
            self._name,
            filter=expression,
            output_fields=_FIELDS,
            consistency_level=self._read_level if time.monotonic() < self._until else _USUAL,
            timeout=self._timeout_s,
        )


def _row(found: Mapping[str, Any]) -> Row:
    """Plain values, as they were written: the row can be written again."""
    values = {name: found[name] for name in _FIELDS}
    values["embedding"] = np.asarray(found["embedding"], np.float32)
    for name in ("hashtags", "generated_hashtags"):
        values[name] = list(found[name])
    return Row(**values)
