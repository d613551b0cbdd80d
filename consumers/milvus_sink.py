"""Rows into Milvus, by rules that are right on a Milvus server and on Milvus Lite alike."""

from __future__ import annotations

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


class MilvusSink:
    """See :class:`consumers.protocols.Sink`. One of these writes to a collection, never two on Milvus Lite.

    ``consistency_level`` is that of :meth:`stored`. Bounded may be a moment behind what was just written, and waits for
    nothing; Session and Strong hold each batch up for a quarter of a second (Milvus 2.3). A text that was not seen to
    be there is encoded again, to the same row.
    """

    def __init__(
        self, client: MilvusClient, collection: Collection, timeout_s: float, *, consistency_level: str = "Bounded"
    ) -> None:
        self._client = client
        self._collection = collection
        self._name = collection.name
        self._timeout_s = timeout_s
        self._consistency_level = consistency_level

    def stored(self, note_ids: Sequence[str]) -> Mapping[str, Row]:
        with self._errors():
            found = self._query(id_filter(list(note_ids)))
        return {row.note_id: row for row in map(_row, found)}

    def upsert(self, rows: Sequence[Row]) -> None:
        for row in rows:
            check_row(row, self._collection.embedding_dim)
        with self._errors():
            self._client.upsert(self._name, [vars(row) for row in rows], timeout=self._timeout_s)

    def delete(self, note_ids: Sequence[str]) -> None:
        with self._errors():
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
            consistency_level=self._consistency_level,
            timeout=self._timeout_s,
        )


def _row(found: Mapping[str, Any]) -> Row:
    """Plain values, as they were written: the row can be written again."""
    values = {name: found[name] for name in _FIELDS}
    values["embedding"] = np.asarray(found["embedding"], np.float32)
    for name in ("hashtags", "generated_hashtags"):
        values[name] = list(found[name])
    return Row(**values)
