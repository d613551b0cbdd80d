"""The collection of one model version, and the alias that readers use."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pymilvus import CollectionSchema, DataType, FieldSchema, MilvusClient, MilvusException
from pymilvus.milvus_client import IndexParams

from consumers.errors import CollectionGone, CollectionMismatch, RowRefused, UpdaterError
from consumers.milvus_connection import COLLECTION_NOT_FOUND, milvus_errors
from consumers.protocols import Row
from notellm.messages import LIMITS
from notellm.settings import MilvusSettings

__all__ = [
    "Collection",
    "SourceFacts",
    "check_collection",
    "check_row",
    "collection_name",
    "id_filter",
    "inspect_collection",
    "live_collection",
    "prepare_collection",
]

_BYTES_PER_CHARACTER = 4  # Milvus counts a VARCHAR's limit in bytes of UTF-8
_MODEL_VERSION = "notellm.model_version"
_FILL = "notellm.fill"
_SOURCE_TOPIC = "notellm.source_topic"
_SOURCE_PARTITIONS = "notellm.source_partitions"
_SOURCE_EPOCH = "notellm.source_epoch"
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
class SourceFacts:
    """The topic that a collection is filled from. ``epoch`` is the topic's id, empty where the broker tells none."""

    topic: str
    partitions: int
    epoch: str


@dataclass(frozen=True)
class Collection:
    """``fill`` is drawn when the collection is created: one filling of it from the topic, and one consumer group.

    ``source`` is what it was created for; None when that is not known. ``created``: by us, just now.
    """

    name: str
    fill: str
    model_version: str
    embedding_dim: int
    source: SourceFacts | None
    created: bool = False


def collection_name(settings: MilvusSettings, model_version: str) -> str:
    return f"{settings.collection_prefix}_{model_version}"


def prepare_collection(
    client: MilvusClient,
    settings: MilvusSettings,
    model_version: str,
    embedding_dim: int,
    source: SourceFacts | None = None,
) -> Collection:
    """Create or check the collection, load it, and create the alias where there is none; the alias is never moved.

    ``source`` is stored when the collection is created, and then never changed. However many updaters do this at once,
    one has created the collection. Raises :class:`CollectionMismatch` when what is there is not this model's.
    """
    name = collection_name(settings, model_version)
    timeout_s = settings.timeout_s
    with milvus_errors():
        our_fill = None
        if not _exists(client, settings, name):
            our_fill = _create(client, settings, name, model_version, embedding_dim, source)
        description = client.describe_collection(name, timeout=timeout_s)
        collection = _inspect(description, name, model_version, embedding_dim)
        # Its creator may have died before it had an index, or not be that far yet; a second request does no harm.
        if not client.list_indexes(name, "embedding"):
            client.create_index(name, _index(client, settings), timeout=timeout_s)
        # With no timeout: a large collection takes its time.
        client.load_collection(name)
        _ensure_alias(client, settings, name)
    return replace(collection, created=collection.fill == our_fill)


def inspect_collection(
    client: MilvusClient, settings: MilvusSettings, model_version: str, embedding_dim: int
) -> Collection | None:
    """The collection as it is, checked and left alone; None where there is none. Raises :class:`CollectionMismatch`."""
    name = collection_name(settings, model_version)
    with milvus_errors():
        if not _exists(client, settings, name):
            return None
        description = client.describe_collection(name, timeout=settings.timeout_s)
    return _inspect(description, name, model_version, embedding_dim)


def check_collection(client: MilvusClient, collection: Collection, timeout_s: float) -> None:
    """Raises :class:`CollectionGone` or :class:`CollectionMismatch` when it is no longer the one that we prepared."""
    with milvus_errors():
        description = client.describe_collection(collection.name, timeout=timeout_s)
    found = _inspect(description, collection.name, collection.model_version, collection.embedding_dim)
    if found.fill != collection.fill:
        raise CollectionGone(
            f"collection {collection.name} was dropped and made again (its fill is {found.fill}, was "
            f"{collection.fill}); start the updater again to fill the new one"
        )


def live_collection(client: MilvusClient, settings: MilvusSettings) -> tuple[str, str] | None:
    """The alias's collection and its model_version, or None where there is no alias yet."""
    with milvus_errors():
        try:
            name = str(client.describe_alias(settings.alias, timeout=settings.timeout_s)["collection_name"])
        except MilvusException as error:
            if _is_absent(error):
                return None
            raise
        properties = client.describe_collection(name, timeout=settings.timeout_s).get("properties", {})
        return name, str(properties.get(_MODEL_VERSION, ""))


def id_filter(note_ids: list[str]) -> str:
    """``note_id in [...]`` with every id escaped: ids are written by strangers."""
    return f"note_id in {json.dumps(note_ids, ensure_ascii=False)}"


def check_row(row: Row, embedding_dim: int) -> None:
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
    if row.embedding.shape != (embedding_dim,):
        raise RowRefused(f"embedding: its shape is {row.embedding.shape}; allowed is ({embedding_dim},)")
    if not np.isfinite(row.embedding).all():
        raise RowRefused("embedding: holds a number that is not finite")


def _exists(client: MilvusClient, settings: MilvusSettings, name: str) -> bool:
    if client.has_collection(name, timeout=settings.timeout_s):
        return True
    # Of a database that is not there, a server says just that it has no such collection; but this raises.
    client.list_collections(timeout=settings.timeout_s)
    return False


def _create(
    client: MilvusClient,
    settings: MilvusSettings,
    name: str,
    model_version: str,
    embedding_dim: int,
    source: SourceFacts | None,
) -> str:
    """Returns the fill that the collection has if it is ours that was created, and not another updater's."""
    fill = uuid.uuid4().hex[:8]
    # Metadata goes into properties: Lite drops a collection's description.
    properties = {_MODEL_VERSION: model_version, _FILL: fill}
    if source is not None:
        properties |= {
            _SOURCE_TOPIC: source.topic,
            _SOURCE_PARTITIONS: str(source.partitions),
            _SOURCE_EPOCH: source.epoch,
        }
    try:
        client.create_collection(
            name,
            schema=_schema(embedding_dim),
            index_params=_index(client, settings),
            properties=properties,
            timeout=settings.timeout_s,
        )
    except MilvusException:
        # Another updater created it a moment ago; or we did, and something behind that went wrong, which comes again.
        if not client.has_collection(name, timeout=settings.timeout_s):
            raise
    return fill


def _schema(embedding_dim: int) -> CollectionSchema:
    # No dynamic field: on Lite an upsert merges its keys, so one that a new version lacks would stay for ever.
    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
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
    return schema


def _index(client: MilvusClient, settings: MilvusSettings) -> IndexParams:
    index = client.prepare_index_params()
    index.add_index(
        "embedding",
        index_type="HNSW",
        metric_type="COSINE",
        params={"M": settings.hnsw_m, "efConstruction": settings.hnsw_ef_construction},
    )
    return index


def _inspect(description: dict[str, Any], name: str, model_version: str, embedding_dim: int) -> Collection:
    properties = description.get("properties") or {}
    advice = "drop it, or choose another milvus.collection_prefix, or another bundle; it was left as it is"
    if properties.get(_MODEL_VERSION) != model_version or not properties.get(_FILL):
        raise CollectionMismatch(
            f"collection {name}: its model_version is {properties.get(_MODEL_VERSION)!r}, the bundle's is "
            f"{model_version!r}; {advice}"
        )
    fields = {field["name"]: field for field in description["fields"]}
    dim = int(fields.get("embedding", {}).get("params", {}).get("dim", 0))
    if dim != embedding_dim:
        raise CollectionMismatch(
            f"collection {name}: its dimension is {dim}, the bundle's is {embedding_dim}; {advice}"
        )
    for expected in _schema(embedding_dim).fields:
        difference = _difference(expected, fields.pop(expected.name, None))
        if difference:
            raise CollectionMismatch(f"collection {name}: {difference}; {advice}")
    for field, described in fields.items():
        # One that a row may leave out is its owner's business.
        if not described.get("nullable") and described.get("default_value") is None:
            raise CollectionMismatch(f"collection {name}: its field {field!r} is not one of ours; {advice}")
    return Collection(name, str(properties[_FILL]), model_version, embedding_dim, _source(properties))


def _difference(expected: FieldSchema, found: dict[str, Any] | None) -> str:
    """What keeps the field that is there from taking our values; empty when nothing does."""
    field = expected.name
    if found is None:
        return f"it has no field {field!r}"
    kind, element = found["type"], found.get("element_type")
    if kind != expected.dtype or (element is not None and element != expected.element_type):
        return f"its field {field!r} is of another type"
    if bool(found.get("is_primary")) != expected.is_primary:
        return f"its primary key is {'not ' if expected.is_primary else ''}{field!r}"
    for limit, ours in expected.params.items():
        theirs = found.get("params", {}).get(limit, ours)  # Lite does not tell every one
        if int(theirs) < int(ours):
            return f"the {limit} of its field {field!r} is {theirs}, less than {ours}"
    return ""


def _source(properties: dict[str, str]) -> SourceFacts | None:
    topic, partitions, epoch = (properties.get(name) for name in (_SOURCE_TOPIC, _SOURCE_PARTITIONS, _SOURCE_EPOCH))
    if topic is None or partitions is None or not partitions.isdecimal() or epoch is None:
        return None
    return SourceFacts(topic, int(partitions), epoch)


def _ensure_alias(client: MilvusClient, settings: MilvusSettings, name: str) -> None:
    if _alias_exists(client, settings):
        return
    try:
        client.create_alias(name, settings.alias, timeout=settings.timeout_s)
    except MilvusException:
        if _alias_exists(client, settings):  # another updater created it a moment ago
            return
        if client.has_collection(settings.alias, timeout=settings.timeout_s):
            raise UpdaterError(
                f"milvus.alias: {settings.alias!r} is the name of a collection; rename that, or choose another alias"
            ) from None
        raise


def _alias_exists(client: MilvusClient, settings: MilvusSettings) -> bool:
    try:
        client.describe_alias(settings.alias, timeout=settings.timeout_s)
    except MilvusException as error:
        if _is_absent(error):
            return False
        raise
    return True


def _is_absent(error: MilvusException) -> bool:
    """Lite says 100, a server 1600 (alias not found)."""
    return error.code in (COLLECTION_NOT_FOUND, 1600) or "not found" in str(error) or "not exist" in str(error)
