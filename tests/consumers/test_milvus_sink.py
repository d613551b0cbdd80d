"""Against a real Milvus Lite server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pymilvus import MilvusClient

from commands.embedded import MilvusLite
from consumers.errors import RowRefused, SinkUnavailable, UpdaterError
from consumers.in_memory import HashEncoder, MemoryTopic
from consumers.milvus_collection import collection_name, id_filter, prepare_collection
from consumers.milvus_connection import connect
from consumers.milvus_sink import MilvusSink
from notellm.settings import MilvusSettings
from tests.consumers.milvus_rows import MODEL_VERSION, all_ids, milvus_settings, row
from tests.consumers.running_updater import RunningUpdater, committed_to_the_end, note, wait_until

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


@pytest.fixture
def client(own_milvus_settings: MilvusSettings) -> Iterator[MilvusClient]:
    with closing(connect(own_milvus_settings)) as connected:
        prepare_collection(connected, own_milvus_settings, MODEL_VERSION, 4)
        yield connected


@pytest.fixture
def alias(own_milvus_settings: MilvusSettings) -> str:
    """What readers ask; and, as there is but one, the collection."""
    return own_milvus_settings.alias


@pytest.fixture
def sink(client: MilvusClient, own_milvus_settings: MilvusSettings) -> MilvusSink:
    return MilvusSink(client, collection_name(own_milvus_settings, MODEL_VERSION), timeout_s=5.0)


def everything_of(client: MilvusClient, alias: str, note_id: str) -> dict[str, Any]:
    (found,) = client.query(alias, filter=id_filter([note_id]), output_fields=["*"])
    return dict(found)


def test_a_row_is_stored_with_every_field_and_found_by_a_readers_own_client(
    shared_milvus: MilvusLite, client: MilvusClient, sink: MilvusSink, alias: str
) -> None:
    sink.upsert([row("n1"), row("n2", embedding=np.array([0, 1, 0, 0], np.float32))])
    stored = everything_of(client, alias, "n1")
    assert stored.pop("embedding") == [1, 0, 0, 0]
    expected = {name: value for name, value in vars(row("n1")).items() if name != "embedding"}
    assert {name: list(value) if name.endswith("hashtags") else value for name, value in stored.items()} == expected
    with closing(MilvusClient(shared_milvus.uri)) as reader:
        ((best, second),) = reader.search(alias, data=[[0.9, 0.1, 0, 0]], limit=2, output_fields=["title"])
    assert (best.id, second.id) == ("n1", "n2")
    assert best.entity["title"] == "Kyoto"


def test_what_is_stored_comes_back_to_be_used_again(sink: MilvusSink) -> None:
    sink.upsert([row("n1", generated_hashtags=[]), row("n2")])
    stored = sink.stored(["n1", "n2", "n3"])
    assert set(stored) == {"n1", "n2"}
    assert (stored["n1"].text_hash, stored["n1"].generated_hashtags) == ("0" * 64, [])
    assert (stored["n2"].generated_hashtags, stored["n2"].generated_category) == (["japan"], "travel")
    assert stored["n1"].embedding.dtype == np.float32
    np.testing.assert_array_equal(stored["n1"].embedding, row("n1").embedding)


def test_whatever_an_id_says_it_means_one_row_and_no_other(client: MilvusClient, sink: MilvusSink, alias: str) -> None:
    sink.upsert([row("bystander"), *(row(note_id) for note_id in HOSTILE_IDS)])
    left = {"bystander", *HOSTILE_IDS}
    assert all_ids(client, alias) == left
    for note_id in HOSTILE_IDS:
        assert set(sink.stored([note_id])) == {note_id}
        sink.upsert([row(note_id, title="edited")])
        assert everything_of(client, alias, note_id)["title"] == "edited"
        sink.delete([note_id])
        left.remove(note_id)
        assert all_ids(client, alias) == left
    assert everything_of(client, alias, "bystander")["title"] == "Kyoto"


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
        found = client.query(alias, filter=expression, output_fields=["note_id"])
        assert {each["note_id"] for each in found} == ids, expression


def test_rows_at_every_limit_are_taken(client: MilvusClient, sink: MilvusSink, alias: str) -> None:
    tags = ["京" * 64] * 32
    full = row(
        "n" * 64, title="京" * 512, category="京" * 128, hashtags=tags, generated_hashtags=tags, source_epoch="e" * 64,
        attributes={"i": 2**63 - 1, "f": 1e308, "none": None, "": "", "nul": "\0", "quoted \"'": "京" * 2000},
    )  # fmt: skip
    sink.upsert([full])
    stored = everything_of(client, alias, full.note_id)
    assert (stored["title"], list(stored["hashtags"]), stored["attributes"]) == (full.title, tags, full.attributes)


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


def test_a_collection_that_was_dropped_stops_the_updater_instead_of_refusing_its_notes(
    client: MilvusClient, sink: MilvusSink, alias: str
) -> None:
    collection = client.describe_alias(alias)["collection_name"]
    client.drop_alias(alias)
    client.drop_collection(collection)
    for call in (lambda: sink.upsert([row()]), lambda: sink.delete(["n1"]), lambda: sink.stored(["n1"])):
        with pytest.raises(UpdaterError, match="start the updater again"):
            call()


@pytest.fixture
def mortal_client(milvus_lite: MilvusLite) -> Iterator[MilvusClient]:
    """Of a server that the test may kill."""
    settings = milvus_settings(milvus_lite.uri)
    with closing(connect(settings)) as connected:
        prepare_collection(connected, settings, MODEL_VERSION, 4)
        yield connected


@pytest.fixture
def mortal_sink(mortal_client: MilvusClient) -> MilvusSink:
    return MilvusSink(mortal_client, f"notes_{MODEL_VERSION}", timeout_s=5.0)


def test_a_killed_server_is_unavailable_and_the_same_client_goes_on_after_its_restart(
    milvus_lite: MilvusLite, mortal_sink: MilvusSink
) -> None:
    sink = mortal_sink
    sink.upsert([row("before")])
    milvus_lite.kill()
    for call in (lambda: sink.upsert([row()]), lambda: sink.delete(["n1"]), lambda: sink.stored(["n1"])):
        with pytest.raises(SinkUnavailable):
            call()
    milvus_lite.start()

    def there() -> bool:
        try:
            # The restarted server has released the collection: this must load it.
            return set(sink.stored(["before"])) == {"before"}
        except SinkUnavailable:
            return False

    wait_until(there, "the server to be there again", 20)
    sink.upsert([row("after")])
    sink.delete(["before"])
    assert set(sink.stored(["before", "after"])) == {"after"}


def test_an_updater_goes_through_a_restart_of_milvus_and_loses_nothing(
    milvus_lite: MilvusLite, mortal_client: MilvusClient, mortal_sink: MilvusSink
) -> None:
    topic = MemoryTopic()
    encoder = HashEncoder(embedding_dim=4, model_version=MODEL_VERSION, seconds_per_note=0.002)
    with RunningUpdater(topic, sink=mortal_sink, encoder=encoder, queue_notes=16, batch_notes=4) as running:
        for number in range(40):
            topic.publish(f"n{number}".encode(), note(f"n{number}", f"note {number}"))
        wait_until(lambda: bool(running.observer.settled_versions), "the first row")
        milvus_lite.kill()
        for number in range(0, 40, 2):
            topic.publish(f"n{number}".encode(), None)
        polls = running.source.polls
        wait_until(lambda: running.source.polls > polls + 20, "polls while Milvus is away")
        milvus_lite.start()
        wait_until(lambda: running.ended or committed_to_the_end(topic), "everything to be committed", 30)
    assert all_ids(mortal_client, "notes") == {f"n{number}" for number in range(1, 40, 2)}
    assert running.dead == []
