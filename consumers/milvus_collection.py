"""The collection of one model version, and the alias that readers use."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass

import numpy as np
from pymilvus import DataType, MilvusClient, MilvusException
from pymilvus.milvus_client import IndexParams

from consumers.errors import CollectionMismatch, RowRefused, UpdaterError
from consumers.milvus_connection import COLLECTION_NOT_FOUND, milvus_errors
from consumers.protocols import Row
from notellm.messages import LIMITS
from notellm.settings import MilvusSettings

__all__ = ["Collection", "collection_name", "id_filter", "inspect_collection", "live_collection", "prepare_collection"]

_BYTES_PER_CHARACTER = 4  # Milvus counts a VARCHAR's limit in bytes of UTF-8
_MODEL_VERSION = "notellm.model_version"
_FILL = "notellm.fill"
_VARCHARS = {
    "note_id": LIMITS.id_bytes,
    "title": LIMITS.title * _BYTES_PER_CHARACTER,
    "category": LIMITS.category * _BYTES_PER_CHARACTER,
    "generated_category": LIMITS.category * _BYTES_PER_CHARACTER,
    "model_version": 16,
    "text_hash": 64,
    "source_epoch": 64,
}
_ARRAYS = ("hashtags", "generated_hashtags")
_INTS = ("published_at", "source_partition", "source_offset")


@dataclass(frozen=True)
class Collection:
    """``fill`` is drawn when the collection is created: one filling of it from the topic, and one consumer group."""

    name: str
    fill: str
    created: bool


def collection_name(settings: MilvusSettings, model_version: str) -> str:
    return f"{settings.collection_prefix}_{model_version}"


def prepare_collection(
    client: MilvusClient, settings: MilvusSettings, model_version: str, embedding_dim: int
) -> Collection:
    """Create or check the collection, load it, and create the alias where there is none; the alias is never moved.

    Raises :class:`CollectionMismatch` when what is there is not this model's.
    """
    name = collection_name(settings, model_version)
    with milvus_errors():
        created = not client.has_collection(name)
        if created:
            _create(client, settings, name, model_version, embedding_dim)
        description = client.describe_collection(name)
        fill = _check(description, name, model_version, embedding_dim)
        if not client.list_indexes(name, "embedding"):  # its creator died before it had one
            client.create_index(name, _index(client, settings))
        client.load_collection(name)
        _ensure_alias(client, settings, name)
    return Collection(name, fill, created)


def inspect_collection(
    client: MilvusClient, settings: MilvusSettings, model_version: str, embedding_dim: int
) -> Collection | None:
    """The collection as it is, checked and left alone; None where there is none. Raises :class:`CollectionMismatch`."""
    name = collection_name(settings, model_version)
    with milvus_errors():
        if not client.has_collection(name):
            return None
        fill = _check(client.describe_collection(name), name, model_version, embedding_dim)
    return Collection(name, fill, created=False)


def live_collection(client: MilvusClient, settings: MilvusSettings) -> tuple[str, str] | None:
    """The alias's collection and its model_version, or None where there is no alias yet."""
    with milvus_errors():
        try:
            name = str(client.describe_alias(settings.alias)["collection_name"])
        except MilvusException as error:
            if _is_absent(error):
                return None
            raise
        properties = client.describe_collection(name).get("properties", {})
        return name, str(properties.get(_MODEL_VERSION, ""))


def id_filter(note_ids: list[str]) -> str:
    """``note_id in [...]`` with every id escaped: ids are written by strangers."""
    return f"note_id in {json.dumps(note_ids, ensure_ascii=False)}"


def check_row(row: Row) -> None:
    """Hold a row against the limits on our side: each is accepted wrongly by one Milvus or another.

    Raises :class:`RowRefused`.
    """
    for field, limit in _VARCHARS.items():
        size = len(getattr(row, field).encode("utf-8", "surrogatepass"))
        if size > limit:
            raise RowRefused(f"{field}: {size} bytes; allowed are {limit}")
    for field in _ARRAYS:
        tags = getattr(row, field)
        if len(tags) > LIMITS.hashtags or any(len(tag) > LIMITS.hashtag for tag in tags):
            raise RowRefused(f"{field}: allowed are {LIMITS.hashtags} of {LIMITS.hashtag} characters")
    if not np.isfinite(row.embedding).all():
        raise RowRefused("embedding: holds a number that is not finite")


def _create(client: MilvusClient, settings: MilvusSettings, name: str, model_version: str, embedding_dim: int) -> None:
    # No dynamic field: on Lite an upsert merges its keys, so one that a new version lacks would stay for ever.
    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    for field, size in _VARCHARS.items():
        schema.add_field(field, DataType.VARCHAR, max_length=size, is_primary=field == "note_id")
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=embedding_dim)
    for field in _ARRAYS:
        schema.add_field(
            field,
            DataType.ARRAY,
            element_type=DataType.VARCHAR,
            max_capacity=LIMITS.hashtags,
            max_length=LIMITS.hashtag * _BYTES_PER_CHARACTER,
        )
    for field in _INTS:
        schema.add_field(field, DataType.INT64)
    schema.add_field("attributes", DataType.JSON)
    # Metadata goes into properties: Lite drops a collection's description.
    properties = {_MODEL_VERSION: model_version, _FILL: uuid.uuid4().hex[:8]}
    try:
        client.create_collection(name, schema=schema, index_params=_index(client, settings), properties=properties)
    except MilvusException:
        if not client.has_collection(name):  # else another updater created it a moment ago
            raise


def _index(client: MilvusClient, settings: MilvusSettings) -> IndexParams:
    index = client.prepare_index_params()
    index.add_index(
        "embedding",
        index_type="HNSW",
        metric_type="COSINE",
        params={"M": settings.hnsw_m, "efConstruction": settings.hnsw_ef_construction},
    )
    return index


def _check(description: dict[str, object], name: str, model_version: str, embedding_dim: int) -> str:
    properties = description.get("properties")
    fields = {field["name"]: field for field in description["fields"]}  # type: ignore[attr-defined]
    advice = "drop it, or choose another milvus.collection_prefix, or another bundle; it was left as it is"
    if not isinstance(properties, dict) or properties.get(_MODEL_VERSION) != model_version or not properties.get(_FILL):
        found = properties.get(_MODEL_VERSION) if isinstance(properties, dict) else None
        raise CollectionMismatch(
            f"collection {name}: its model_version is {found!r}, the bundle's is {model_version!r}; {advice}"
        )
    dim = int(fields.get("embedding", {}).get("params", {}).get("dim", 0))
    if dim != embedding_dim:
        raise CollectionMismatch(
            f"collection {name}: its dimension is {dim}, the bundle's is {embedding_dim}; {advice}"
        )
    missing = sorted({*_VARCHARS, *_ARRAYS, *_INTS, "attributes"} - set(fields))
    if missing:
        raise CollectionMismatch(f"collection {name}: it has no field {missing[0]!r}; {advice}")
    return str(properties[_FILL])


def _ensure_alias(client: MilvusClient, settings: MilvusSettings, name: str) -> None:
    try:
        client.describe_alias(settings.alias)
    except MilvusException as error:
        if not _is_absent(error):
            raise
        if client.has_collection(settings.alias):
            raise UpdaterError(
                f"milvus.alias: {settings.alias!r} is the name of a collection; rename that, or choose another alias"
            ) from None
        try:
            client.create_alias(name, settings.alias)
        except MilvusException:
            client.describe_alias(settings.alias)  # raises, unless another updater created it a moment ago


def _is_absent(error: MilvusException) -> bool:
    """Lite says 100, a server 1600 (alias not found)."""
    return error.code in (COLLECTION_NOT_FOUND, 1600) or "not found" in str(error) or "not exist" in str(error)
