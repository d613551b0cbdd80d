"""Against Milvus Lite and against a real Milvus server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from pymilvus import MilvusClient

from commands.embedded import MilvusLite
from consumers.errors import CollectionGone, CollectionMismatch, RowRefused, SinkUnavailable
from consumers.in_memory import HashEncoder, MemoryTopic
from consumers.milvus_collection import Collection, _index, _schema, id_filter, prepare_collection
from consumers.milvus_connection import connect
from consumers.milvus_sink import MilvusSink
from consumers.protocols import Row
from notellm.settings import MilvusSettings
from tests.consumers.milvus_rows import MODEL_VERSION, all_ids, drop, milvus_settings, row
from tests.consumers.running_updater import RunningUpdater, committed_to_the_end, note, wait_until
from tests.support.milvus_server import MilvusServer
from tests.support.tcp_proxy import TcpProxy

pytestmark = pytest.mark.integration

HOSTILE_IDS = [
    'say "hello"',
    "it's",
    "back\\slash",
    '\\"',
    "a') or 1==1 or note_id in ['",
    'a"] or note_id != "" or note_id in ["',
    "{{template}}",
    "%_*",
    "🦊" * 16,  # 64 bytes
    "line\u2028separator",
    "京都",
    " ",
    "null",
]


@dataclass(frozen=True)
class Prepared:
    settings: MilvusSettings
    client: MilvusClient
    collection: Collection


@pytest.fixture(scope="module")
def prepared_by_uri() -> Iterator[dict[str, Prepared]]:
    prepared: dict[str, Prepared] = {}
    yield prepared
    for each in prepared.values():
        drop(each.client, each.settings, each.collection.name)
        each.client.close()


@pytest.fixture
def prepared(milvus: MilvusLite | MilvusServer, prepared_by_uri: dict[str, Prepared]) -> Iterator[Prepared]:
    """Of each Milvus one collection, which every test finds empty: to make one takes a real server seconds."""
    if milvus.uri not in prepared_by_uri:
        own = uuid4().hex[:8]
        settings = milvus_settings(milvus.uri, collection_prefix=f"test_{own}", alias=f"live_{own}")
        client = connect(settings)
        prepared_by_uri[milvus.uri] = Prepared(settings, client, prepare_collection(client, settings, MODEL_VERSION, 4))
    found = prepared_by_uri[milvus.uri]
    yield found
    left = all_ids(found.client, found.collection.name)
    found.client.delete(found.collection.name, filter=id_filter(sorted(left)))


@pytest.fixture
def client(prepared: Prepared) -> MilvusClient:
    return prepared.client


@pytest.fixture
def alias(prepared: Prepared) -> str:
    """What readers ask; and, as there is but one, the collection."""
    return prepared.settings.alias


@pytest.fixture
def sink(prepared: Prepared) -> MilvusSink:
    return MilvusSink(prepared.client, prepared.collection, timeout_s=5.0, consistency_level="Strong")


def everything_of(client: MilvusClient, alias: str, note_id: str) -> dict[str, Any]:
    (found,) = client.query(alias, filter=id_filter([note_id]), output_fields=["*"], consistency_level="Strong")
    return dict(found)


def plain(row: Row) -> dict[str, Any]:
    """A row as Python compares it, types of numbers included (1 is no 1.0)."""
    return {name: value.tolist() if name == "embedding" else repr(value) for name, value in vars(row).items()}


def test_a_row_is_stored_with_every_field_and_found_by_a_readers_own_client(
    milvus: MilvusLite | MilvusServer, client: MilvusClient, sink: MilvusSink, alias: str
) -> None:
    sink.upsert([row("n1"), row("n2", embedding=np.array([0, 1, 0, 0], np.float32))])
    stored = everything_of(client, alias, "n1")
    assert stored.pop("embedding") == [1, 0, 0, 0]
    expected = {name: value for name, value in vars(row("n1")).items() if name != "embedding"}
    assert {name: list(value) if name.endswith("hashtags") else value for name, value in stored.items()} == expected
    with closing(MilvusClient(milvus.uri)) as reader:
        vector = [0.9, 0.1, 0, 0]
        ((best, second),) = reader.search(
            alias, data=[vector], limit=2, output_fields=["title"], consistency_level="Strong"
        )
    assert (best.id, second.id) == ("n1", "n2")
    assert best.entity["title"] == "Kyoto"


FULL = row(
    "n" * 64,
    embedding=np.array([0.1, -0.7, 1e-30, 0.7], np.float32),
    title="京" * 512,
    category="京" * 128,
    hashtags=["京" * 64] * 32,
    generated_hashtags=["京" * 64] * 32,
    source_epoch="e" * 64,
    attributes={
        "i": 2**63 - 1, "minus": -(2**63), "f": 1e308, "third": 1 / 3, "one": 1.0, "yes": True, "none": None, "": "",
        "nul": "\0", "quoted \"'": "京" * 2000, "surrogate pair": "🦊", "escape": "\\u0041 \\ \n\t",
    },
)  # fmt: skip


def test_what_is_stored_comes_back_whole_and_can_be_written_back(sink: MilvusSink) -> None:
    written = {each.note_id: each for each in (FULL, row("n1", hashtags=[], generated_hashtags=[], text_hash=""))}
    sink.upsert(list(written.values()))
    stored = sink.stored([*written, "never there"])
    assert {note_id: plain(each) for note_id, each in stored.items()} == {
        note_id: plain(each) for note_id, each in written.items()
    }
    assert stored["n1"].embedding.dtype == np.float32
    sink.delete(list(written))
    assert sink.stored(list(written)) == {}
    sink.upsert(list(stored.values()))
    again = sink.stored(list(written))
    assert {note_id: plain(each) for note_id, each in again.items()} == {
        note_id: plain(each) for note_id, each in written.items()
    }


def test_a_strong_read_sees_the_write_before_it(sink: MilvusSink) -> None:
    for number in range(5):
        sink.upsert([row("n1", source_offset=number)])
        assert sink.stored(["n1"])["n1"].source_offset == number
    sink.delete(["n1"])
    assert sink.stored(["n1"]) == {}


def test_whatever_an_id_says_it_means_one_row_and_no_other(client: MilvusClient, sink: MilvusSink, alias: str) -> None:
    sink.upsert([row("bystander"), *(row(note_id) for note_id in HOSTILE_IDS)])
    left = {"bystander", *HOSTILE_IDS}
    assert all_ids(client, alias) == left
    for note_id in HOSTILE_IDS:
        assert set(sink.stored([note_id])) == {note_id}
    for note_id in HOSTILE_IDS:
        sink.upsert([row(note_id, title=f"edited {note_id}")])
    stored = sink.stored(["bystander", *HOSTILE_IDS])
    assert {note_id: each.title for note_id, each in stored.items()} == {
        "bystander": "Kyoto",
        **{note_id: f"edited {note_id}" for note_id in HOSTILE_IDS},
    }
    for note_id in HOSTILE_IDS:
        sink.delete([note_id])
        left.remove(note_id)
        assert all_ids(client, alias) == left


def test_deleting_what_is_not_there_is_no_error(client: MilvusClient, sink: MilvusSink, alias: str) -> None:
    sink.upsert([row("n1"), row("n2")])
    sink.delete(["n1", "never there"])
    sink.delete(["n1"])
    assert all_ids(client, alias) == {"n2"}


def test_attributes_are_replaced_whole_and_readers_filter_by_them(
    client: MilvusClient, sink: MilvusSink, alias: str
) -> None:
    sink.upsert([row("n1", attributes={"author_id": "a1", "draft": True}), row("n2", attributes={"author_id": "a2"})])
    sink.upsert([row("n1", attributes={"author_id": "a1", "score": 2})])
    assert everything_of(client, alias, "n1")["attributes"] == {"author_id": "a1", "score": 2}
    for expression, ids in {
        'attributes["author_id"] == "a1"': {"n1"},
        'attributes["score"] > 1': {"n1"},
        'attributes["draft"] == true': set(),
    }.items():
        found = client.query(alias, filter=expression, output_fields=["note_id"], consistency_level="Strong")
        assert {each["note_id"] for each in found} == ids, expression


BEYOND_THE_LIMITS: list[tuple[str, object]] = [
    ("note_id", "京" * 22),
    ("title", "x" * 2049),
    ("title", "lone surrogate \ud800"),
    ("category", "x" * 513),
    ("generated_category", "京" * 171),
    ("source_epoch", "e" * 65),
    ("hashtags", ["tag"] * 33),
    ("generated_hashtags", ["x" * 65]),
    ("embedding", np.array([1, 0, 0, np.nan], np.float32)),
    ("embedding", np.array([1, 0, 0, -np.inf], np.float32)),
    ("embedding", np.ones(5, np.float32)),
]


def test_a_row_beyond_a_limit_is_refused_and_so_is_its_whole_batch(
    client: MilvusClient, sink: MilvusSink, alias: str
) -> None:
    for field, value in BEYOND_THE_LIMITS:
        with pytest.raises(RowRefused, match=field):
            sink.upsert([row("beside"), replace(row(), **{field: value})])
    assert all_ids(client, alias) == set()


def test_a_row_that_milvus_alone_refuses_is_to_blame_when_the_collection_is_as_it_was(
    client: MilvusClient, sink: MilvusSink, alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consumers.milvus_sink.check_row", lambda row, embedding_dim: None)
    sink.check()
    with pytest.raises(RowRefused, match=r"title|length"):
        sink.upsert([row("n1", title="x" * 5000)])
    assert all_ids(client, alias) == set()


@pytest.fixture
def doomed(own_milvus_settings: MilvusSettings) -> Iterator[Prepared]:
    """A collection for a test to drop."""
    with closing(connect(own_milvus_settings)) as client:
        collection = prepare_collection(client, own_milvus_settings, MODEL_VERSION, 4)
        yield Prepared(own_milvus_settings, client, collection)


def test_a_collection_that_was_dropped_ends_the_updater_instead_of_refusing_its_notes(doomed: Prepared) -> None:
    sink = MilvusSink(doomed.client, doomed.collection, timeout_s=5.0, consistency_level="Strong")
    sink.upsert([row("n1")])
    sink.check()
    drop(doomed.client, doomed.settings, doomed.collection.name)
    calls: list[Callable[[], object]] = [
        lambda: sink.upsert([row()]), lambda: sink.delete(["n1"]), lambda: sink.stored(["n1"]), sink.check,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(CollectionGone, match="start the updater again"):
            call()
    prepare_collection(doomed.client, doomed.settings, MODEL_VERSION, 4)
    with pytest.raises(CollectionGone, match="was dropped and made again"):
        sink.check()


@pytest.mark.parametrize("dropped_fields", [["title"], ["title", "text_hash", "attributes"]], ids=len)
def test_a_collection_that_was_changed_ends_the_updater_instead_of_refusing_its_notes(
    doomed: Prepared, dropped_fields: list[str], milvus: MilvusLite | MilvusServer
) -> None:
    sink = MilvusSink(doomed.client, doomed.collection, timeout_s=5.0, consistency_level="Strong")
    properties = doomed.client.describe_collection(doomed.collection.name)["properties"]
    drop(doomed.client, doomed.settings, doomed.collection.name)
    schema = _schema(4)
    schema.fields[:] = [field for field in schema.fields if field.name not in dropped_fields]
    doomed.client.create_collection(
        doomed.collection.name,
        schema=schema,
        index_params=_index(doomed.client, doomed.settings),
        properties={name: properties[name] for name in ("notellm.model_version", "notellm.fill")},
    )
    calls: list[Callable[[], object]] = [lambda: sink.upsert([row()]), sink.check]
    if isinstance(milvus, MilvusServer):
        calls.append(lambda: sink.stored(["n1"]))  # Lite leaves out what it has not
    for call in calls:
        with pytest.raises(CollectionMismatch, match="it has no field 'title'"):
            call()


def test_a_collection_of_another_dimension_ends_the_updater_instead_of_refusing_its_notes(doomed: Prepared) -> None:
    sink = MilvusSink(doomed.client, doomed.collection, timeout_s=5.0, consistency_level="Strong")
    drop(doomed.client, doomed.settings, doomed.collection.name)
    prepare_collection(doomed.client, doomed.settings, MODEL_VERSION, 8)
    with pytest.raises(CollectionMismatch, match="its dimension is 8, the bundle's is 4"):
        sink.upsert([row()])


@pytest.fixture(params=["lite", "real"])
def mortal_milvus(request: pytest.FixtureRequest) -> MilvusLite | MilvusServer:
    """One that the test may kill."""
    server: MilvusLite | MilvusServer = request.getfixturevalue(
        {"lite": "milvus_lite", "real": "milvus_server"}[request.param]
    )
    return server


@pytest.fixture
def mortal(mortal_milvus: MilvusLite | MilvusServer) -> Iterator[Prepared]:
    own = uuid4().hex[:8]
    settings = milvus_settings(mortal_milvus.uri, collection_prefix=f"test_{own}", alias=f"live_{own}")
    with closing(connect(settings)) as client:
        collection = prepare_collection(client, settings, MODEL_VERSION, 4)
        yield Prepared(settings, client, collection)
        drop(client, settings, collection.name)


def test_a_killed_server_is_unavailable_and_the_same_client_goes_on_after_its_restart(
    mortal_milvus: MilvusLite | MilvusServer, mortal: Prepared
) -> None:
    sink = MilvusSink(mortal.client, mortal.collection, timeout_s=5.0, consistency_level="Strong")
    sink.upsert([row("before")])
    mortal_milvus.kill()
    calls: list[Callable[[], object]] = [
        lambda: sink.upsert([row()]), lambda: sink.delete(["n1"]), lambda: sink.stored(["n1"]), sink.check,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(SinkUnavailable):
            call()
    mortal_milvus.start()

    def there() -> bool:
        try:
            # A restarted Lite has released the collection: this must load it.
            return set(sink.stored(["before"])) == {"before"}
        except SinkUnavailable:
            return False

    wait_until(there, "the server to be there again", 60)
    sink.check()
    sink.upsert([row("after")])
    sink.delete(["before"])
    assert set(sink.stored(["before", "after"])) == {"after"}


def test_a_server_that_hangs_is_unavailable_and_goes_on_when_it_answers_again(
    milvus: MilvusLite | MilvusServer,
) -> None:
    own = uuid4().hex[:8]
    with TcpProxy("127.0.0.1", int(milvus.uri.rpartition(":")[2])) as line:
        settings = milvus_settings(f"http://{line.address}", collection_prefix=f"test_{own}", alias=f"live_{own}")
        with closing(connect(settings)) as client:
            collection = prepare_collection(client, settings, MODEL_VERSION, 4)
            sink = MilvusSink(client, collection, timeout_s=1.0, consistency_level="Strong")
            sink.upsert([row("before")])
            for get_in_the_way in (line.stop_forwarding, line.cut):
                line.stop_forwarding()
                get_in_the_way()
                calls: list[Callable[[], object]] = [
                    lambda: sink.upsert([row("n1")]), lambda: sink.delete(["n1"]), lambda: sink.stored(["n1"]),
                    sink.check,
                ]  # fmt: skip
                for call in calls:
                    began = time.monotonic()
                    with pytest.raises(SinkUnavailable):
                        call()
                    assert time.monotonic() - began < 20  # not for ever: pymilvus tries again within its second
                line.resume()

                def there() -> bool:
                    try:
                        sink.upsert([row("after")])
                    except SinkUnavailable:
                        return False
                    return True

                wait_until(there, "the server to be there again", 30)
                assert set(sink.stored(["before", "after"])) == {"before", "after"}
            drop(client, settings, collection.name)


def test_an_updater_goes_through_a_restart_of_milvus_and_loses_nothing(
    mortal_milvus: MilvusLite | MilvusServer, mortal: Prepared
) -> None:
    topic = MemoryTopic()
    encoder = HashEncoder(embedding_dim=4, model_version=MODEL_VERSION, seconds_per_note=0.002)
    sink = MilvusSink(mortal.client, mortal.collection, timeout_s=5.0, consistency_level="Strong")
    with RunningUpdater(topic, sink=sink, encoder=encoder, queue_notes=16, batch_notes=4) as running:
        for number in range(40):
            topic.publish(f"n{number}".encode(), note(f"n{number}", f"note {number}"))
        wait_until(lambda: bool(running.observer.settled_versions), "the first row")
        mortal_milvus.kill()
        for number in range(0, 40, 2):
            topic.publish(f"n{number}".encode(), None)
        polls = running.source.polls
        wait_until(lambda: running.source.polls > polls + 20, "polls while Milvus is away")
        mortal_milvus.start()
        wait_until(lambda: running.ended or committed_to_the_end(topic), "everything to be committed", 60)
    assert all_ids(mortal.client, mortal.settings.alias) == {f"n{number}" for number in range(1, 40, 2)}
    assert running.dead == []
