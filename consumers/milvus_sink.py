"""Rows into Milvus, by rules that are right on a Milvus server and on Milvus Lite alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from pymilvus import MilvusClient, MilvusException

from consumers.milvus_collection import check_row, id_filter
from consumers.milvus_connection import COLLECTION_NOT_LOADED, milvus_errors
from consumers.protocols import Row, StoredRow

__all__ = ["MilvusSink"]

_REUSED_FIELDS = ["note_id", "text_hash", "embedding", "generated_hashtags", "generated_category"]


class MilvusSink:
    """See :class:`consumers.protocols.Sink`. One of these writes to a collection, never two on Milvus Lite."""

    def __init__(self, client: MilvusClient, collection: str, timeout_s: float) -> None:
        self._client = client
        self._collection = collection
        self._timeout_s = timeout_s

    def stored(self, note_ids: Sequence[str]) -> Mapping[str, StoredRow]:
        with milvus_errors():
            found = self._query(id_filter(list(note_ids)))
        return {
            str(row["note_id"]): StoredRow(
                text_hash=str(row["text_hash"]),
                embedding=np.asarray(row["embedding"], np.float32),
                generated_hashtags=list(row["generated_hashtags"]),
                generated_category=str(row["generated_category"]),
            )
            for row in found
        }

    def upsert(self, rows: Sequence[Row]) -> None:
        for row in rows:
            check_row(row)
        with milvus_errors():
            self._client.upsert(self._collection, [_fields(row) for row in rows], timeout=self._timeout_s)

    def delete(self, note_ids: Sequence[str]) -> None:
        with milvus_errors():
            # Never delete(ids=...): pymilvus puts ids into its filter unescaped.
            self._client.delete(self._collection, filter=id_filter(list(note_ids)), timeout=self._timeout_s)

    def _query(self, expression: str) -> Any:
        try:
            return self._client.query(
                self._collection, filter=expression, output_fields=_REUSED_FIELDS, timeout=self._timeout_s
            )
        except MilvusException as error:
            if error.code != COLLECTION_NOT_LOADED:
                raise
        # A Milvus Lite that was started again has its collections, but has loaded none; its readers wait for this too.
        self._client.load_collection(self._collection, timeout=self._timeout_s)
        return self._client.query(
            self._collection, filter=expression, output_fields=_REUSED_FIELDS, timeout=self._timeout_s
        )


def _fields(row: Row) -> dict[str, Any]:
    return {**asdict(row), "embedding": row.embedding}
