"""Rows for the tests against Milvus Lite and a real Milvus, and how a reader of those tests sees them."""

from __future__ import annotations

from typing import Any

import numpy as np
from pymilvus import MilvusClient

from consumers.protocols import Row
from notellm.settings import MilvusSettings

__all__ = ["MODEL_VERSION", "all_ids", "drop", "milvus_settings", "row"]

MODEL_VERSION = "0123456789abcdef"


def milvus_settings(uri: str, **chosen: Any) -> MilvusSettings:
    return MilvusSettings(uri=uri, timeout_s=5.0, **chosen)


def row(note_id: str = "n1", **fields: Any) -> Row:
    usual: dict[str, Any] = {
        "embedding": np.array([1, 0, 0, 0], np.float32),
        "title": "Kyoto",
        "hashtags": ["kyoto"],
        "category": "travel",
        "generated_hashtags": ["japan"],
        "generated_category": "travel",
        "published_at": 1700000000000,
        "model_version": MODEL_VERSION,
        "text_hash": "0" * 64,
        "source_epoch": "epoch",
        "source_partition": 2,
        "source_offset": 17,
    }
    return Row(note_id, **{**usual, **fields})


def all_ids(client: MilvusClient, collection: str) -> set[str]:
    found = client.query(collection, 'note_id != ""', output_fields=["note_id"], consistency_level="Strong")
    return {each["note_id"] for each in found}


def drop(client: MilvusClient, settings: MilvusSettings, collection: str) -> None:
    """The collection, and the alias that keeps it from being dropped."""
    client.drop_alias(settings.alias)
    client.drop_collection(collection)
