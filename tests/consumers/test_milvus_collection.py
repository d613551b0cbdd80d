"""Against Milvus Lite and against a real Milvus server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from threading import Barrier

import pytest
from pymilvus import CollectionSchema, DataType, MilvusClient

from commands.embedded import MilvusLite, free_port
from consumers.errors import CollectionGone, CollectionMismatch, SinkUnavailable, UpdaterError
from consumers.milvus_collection import (
    Collection,
    SourceFacts,
    _schema,
    check_collection,
    collection_name,
    inspect_collection,
    live_collection,
    prepare_collection,
)
from consumers.milvus_connection import connect, is_lite
from notellm.settings import MilvusSettings
from tests.consumers.milvus_rows import MODEL_VERSION, drop, milvus_settings
from tests.support.milvus_server import MilvusServer

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


SOURCE = SourceFacts("notes", 4, "AbC-d_e")


def test_the_collection_and_the_alias_are_created_and_found_again(
    client: MilvusClient, settings: MilvusSettings, name: str, milvus: MilvusLite | MilvusServer
) -> None:
    assert live_collection(client, settings) is None
    created = prepare_collection(client, settings, MODEL_VERSION, 4)
    assert (created.name, created.created) == (name, True)
    assert len(created.fill) == 8
    assert prepare_collection(client, settings, MODEL_VERSION, 4) == replace(created, created=False)
    assert live_collection(client, settings) == (name, MODEL_VERSION)
    description = client.describe_collection(settings.alias)
    assert not description["enable_dynamic_field"]
    (index,) = client.list_indexes(name)
    described = client.describe_index(name, index)
    assert (described["index_type"], described["metric_type"]) == ("HNSW", "COSINE")
    assert is_lite(client) == isinstance(milvus, MilvusLite)


@pytest.mark.parametrize("source", [SOURCE, SourceFacts("notes", 1, "")])
def test_the_collection_remembers_what_it_was_created_for(
    client: MilvusClient, settings: MilvusSettings, source: SourceFacts
) -> None:
    created = prepare_collection(client, settings, MODEL_VERSION, 4, source)
    assert created.source == source
    again = prepare_collection(client, settings, MODEL_VERSION, 4, SourceFacts("others", 8, "new"))
    assert again.source == source
    assert inspect_collection(client, settings, MODEL_VERSION, 4) == again


def test_of_a_collection_that_was_never_told_its_source_none_is_known(
    client: MilvusClient, settings: MilvusSettings
) -> None:
    assert prepare_collection(client, settings, MODEL_VERSION, 4).source is None
    assert prepare_collection(client, settings, MODEL_VERSION, 4, SOURCE).source is None


@pytest.mark.parametrize("milvus", ["real"], indirect=True)  # of Lite, one updater at a time has the lock
def test_of_updaters_that_start_at_once_one_creates_the_collection_and_all_fill_it(
    settings: MilvusSettings, client: MilvusClient
) -> None:
    updaters = 8
    start = Barrier(updaters)

    def prepare(number: int) -> Collection:
        with closing(connect(settings)) as own:
            start.wait(30)
            return prepare_collection(own, settings, MODEL_VERSION, 4, SourceFacts("notes", number, ""))

    with ThreadPoolExecutor(updaters) as pool:
        prepared = list(pool.map(prepare, range(updaters)))
    (creator,) = (each for each in prepared if each.created)
    assert creator.source == SourceFacts("notes", prepared.index(creator), "")
    assert {replace(each, created=False) for each in prepared} == {replace(creator, created=False)}
    assert live_collection(client, settings) == (creator.name, MODEL_VERSION)
    assert len(client.list_indexes(creator.name)) == 1


def test_the_alias_is_never_moved(client: MilvusClient, settings: MilvusSettings, name: str) -> None:
    prepare_collection(client, settings, MODEL_VERSION, 4)
    newer = prepare_collection(client, settings, "f" * 16, 4)
    assert (newer.name, newer.created) == (f"{settings.collection_prefix}_" + "f" * 16, True)
    assert live_collection(client, settings) == (name, MODEL_VERSION)


def test_a_collection_that_is_dropped_and_created_again_is_another_fill(
    client: MilvusClient, settings: MilvusSettings, name: str
) -> None:
    first = prepare_collection(client, settings, MODEL_VERSION, 4)
    check_collection(client, first, 5.0)
    drop(client, settings, name)
    with pytest.raises(CollectionGone, match="start the updater again"):
        check_collection(client, first, 5.0)
    second = prepare_collection(client, settings, MODEL_VERSION, 4)
    assert second.fill != first.fill
    check_collection(client, second, 5.0)
    with pytest.raises(CollectionGone, match=f"{name} was dropped and made again .*{second.fill}, was {first.fill}"):
        check_collection(client, first, 5.0)


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


def without_title(schema: CollectionSchema) -> None:
    schema.fields[:] = [field for field in schema.fields if field.name != "title"]


def with_short_titles(schema: CollectionSchema) -> None:
    (title,) = (field for field in schema.fields if field.name == "title")
    title.params["max_length"] = 100


def with_few_hashtags(schema: CollectionSchema) -> None:
    (hashtags,) = (field for field in schema.fields if field.name == "hashtags")
    hashtags.params["max_capacity"] = 4


def with_text_for_attributes(schema: CollectionSchema) -> None:
    schema.fields[:] = [field for field in schema.fields if field.name != "attributes"]
    schema.add_field("attributes", DataType.VARCHAR, max_length=8192)


def with_a_field_of_its_own(schema: CollectionSchema) -> None:
    schema.add_field("price", DataType.INT64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_title, "it has no field 'title'"),
        (with_short_titles, "the max_length of its field 'title' is 100, less than 2048"),
        (with_few_hashtags, "the max_capacity of its field 'hashtags' is 4, less than 32"),
        (with_text_for_attributes, "its field 'attributes' is of another type"),
        (with_a_field_of_its_own, "its field 'price' is not one of ours"),
    ],
)
def test_a_collection_that_could_not_take_our_rows_is_refused(
    client: MilvusClient,
    settings: MilvusSettings,
    name: str,
    change: Callable[[CollectionSchema], None],
    said: str,
) -> None:
    schema = _schema(4)
    change(schema)
    properties = {"notellm.model_version": MODEL_VERSION, "notellm.fill": "12345678"}
    client.create_collection(name, schema=schema, properties=properties)
    with pytest.raises(CollectionMismatch, match=f"collection {name}: {said}; drop it, or choose"):
        prepare_collection(client, settings, MODEL_VERSION, 4)
    with pytest.raises(CollectionMismatch, match=said):
        check_collection(client, Collection(name, "12345678", MODEL_VERSION, 4, None), 5.0)


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


@pytest.mark.parametrize("look", [prepare_collection, inspect_collection])
def test_a_database_that_is_not_there_is_named_by_its_setting(
    settings: MilvusSettings, look: Callable[[MilvusClient, MilvusSettings, str, int], object]
) -> None:
    with (
        closing(connect(settings.model_copy(update={"database": "other"}))) as client,
        pytest.raises(UpdaterError, match=r"milvus.database: .*other.*; create it first"),
    ):
        look(client, settings, MODEL_VERSION, 4)


def test_a_server_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(SinkUnavailable, match=r"milvus.uri: .* cannot be reached"):
        connect(milvus_settings(f"http://127.0.0.1:{free_port()}"))
