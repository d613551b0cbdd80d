"""Against a real Milvus Lite server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from pymilvus import DataType, MilvusClient

from commands.embedded import free_port
from consumers.errors import CollectionMismatch, SinkUnavailable, UpdaterError
from consumers.milvus_collection import Collection, collection_name, live_collection, prepare_collection
from consumers.milvus_connection import connect, is_lite
from notellm.settings import MilvusSettings
from tests.consumers.milvus_rows import MODEL_VERSION, milvus_settings

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(own_milvus_settings: MilvusSettings) -> MilvusSettings:
    return own_milvus_settings


@pytest.fixture
def client(settings: MilvusSettings) -> Iterator[MilvusClient]:
    with closing(connect(settings)) as connected:
        yield connected


@pytest.fixture
def name(settings: MilvusSettings) -> str:
    return collection_name(settings, MODEL_VERSION)


def test_the_collection_and_the_alias_are_created_and_found_again(
    client: MilvusClient, settings: MilvusSettings, name: str
) -> None:
    assert live_collection(client, settings) is None
    created = prepare_collection(client, settings, MODEL_VERSION, 4)
    assert (created.name, created.created) == (name, True)
    assert len(created.fill) == 8
    assert prepare_collection(client, settings, MODEL_VERSION, 4) == Collection(name, created.fill, created=False)
    assert live_collection(client, settings) == (name, MODEL_VERSION)
    description = client.describe_collection(settings.alias)
    assert not description["enable_dynamic_field"]
    (index,) = client.list_indexes(name)
    described = client.describe_index(name, index)
    assert (described["index_type"], described["metric_type"]) == ("HNSW", "COSINE")
    assert is_lite(client)


def test_the_alias_is_never_moved(client: MilvusClient, settings: MilvusSettings, name: str) -> None:
    prepare_collection(client, settings, MODEL_VERSION, 4)
    newer = prepare_collection(client, settings, "f" * 16, 4)
    assert newer == Collection(f"{settings.collection_prefix}_" + "f" * 16, newer.fill, created=True)
    assert live_collection(client, settings) == (name, MODEL_VERSION)


def test_a_collection_that_is_dropped_and_created_again_is_another_fill(
    client: MilvusClient, settings: MilvusSettings, name: str
) -> None:
    first = prepare_collection(client, settings, MODEL_VERSION, 4)
    client.drop_alias(settings.alias)
    client.drop_collection(name)
    assert prepare_collection(client, settings, MODEL_VERSION, 4).fill != first.fill


def test_another_dimension_is_refused_with_what_to_do_and_nothing_is_changed(
    client: MilvusClient, settings: MilvusSettings, name: str
) -> None:
    prepare_collection(client, settings, MODEL_VERSION, 4)
    before = client.describe_collection(name)
    with pytest.raises(
        CollectionMismatch, match=f"collection {name}: its dimension is 4, the bundle's is 8; drop it, or"
    ):
        prepare_collection(client, settings, MODEL_VERSION, 8)
    assert client.describe_collection(name) == before


@pytest.mark.parametrize("properties", [{}, {"notellm.model_version": "f" * 16, "notellm.fill": "12345678"}])
def test_a_collection_of_another_model_is_refused_with_what_to_do_and_nothing_is_changed(
    client: MilvusClient, settings: MilvusSettings, properties: dict[str, str], name: str
) -> None:
    schema = client.create_schema(auto_id=False)
    schema.add_field("note_id", DataType.VARCHAR, max_length=64, is_primary=True)
    schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=4)
    client.create_collection(name, schema=schema, properties=properties)
    before = client.describe_collection(name)
    with pytest.raises(CollectionMismatch, match=rf"its model_version is .*'{MODEL_VERSION}'; drop it, or choose"):
        prepare_collection(client, settings, MODEL_VERSION, 4)
    assert client.describe_collection(name) == before
    assert live_collection(client, settings) is None


def test_an_alias_that_is_the_name_of_a_collection_is_refused(
    client: MilvusClient, settings: MilvusSettings, name: str
) -> None:
    client.create_collection(settings.alias, dimension=2)
    with pytest.raises(UpdaterError, match=rf"milvus.alias: '{settings.alias}' is the name of a collection"):
        prepare_collection(client, settings, MODEL_VERSION, 4)


def test_a_collection_whose_creator_died_before_it_had_an_index_gets_one(
    client: MilvusClient, settings: MilvusSettings, name: str
) -> None:
    created = prepare_collection(client, settings, MODEL_VERSION, 4)
    client.release_collection(name)
    (index,) = client.list_indexes(name)
    client.drop_index(name, index)
    assert client.list_indexes(name) == []
    assert prepare_collection(client, settings, MODEL_VERSION, 4).fill == created.fill
    assert len(client.list_indexes(name)) == 1


def test_a_database_that_is_not_there_is_named_by_its_setting(settings: MilvusSettings) -> None:
    with (
        closing(connect(settings.model_copy(update={"database": "other"}))) as client,
        pytest.raises(UpdaterError, match=r"milvus.database: .*'other'.*; create it first"),
    ):
        prepare_collection(client, settings, MODEL_VERSION, 4)


def test_a_server_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(SinkUnavailable, match=r"milvus.uri: .* cannot be reached"):
        connect(milvus_settings(f"http://127.0.0.1:{free_port()}"))
