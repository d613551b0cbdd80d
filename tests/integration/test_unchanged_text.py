"""Edits that leave the text as it was do not run the model, on the embedded default."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Thread

import msgspec
import pytest
from pymilvus import MilvusClient

from commands.embedded import EmbeddedKafka, MilvusLite
from commands.publisher import NotePublisher
from consumers.service import updater_service
from notellm.encoder import EncodedBatch, NoteEncoder
from notellm.messages import Note
from notellm.prompt import Prompt
from notellm.settings import load_settings
from tests.support.pipeline import short_notes
from tests.support.processes import wait_until

pytestmark = pytest.mark.integration


class CountingEncoder:
    """A real encoder that counts what it is given."""

    def __init__(self, encoder: NoteEncoder) -> None:
        self._encoder = encoder
        self.model_version = encoder.model_version
        self.embedding_dim = encoder.embedding_dim
        self.encoded = 0

    def build_prompts(self, notes: Sequence[Note]) -> list[Prompt]:
        return self._encoder.build_prompts(notes)

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[EncodedBatch]:
        self.encoded += len(prompts)
        return self._encoder.stream(prompts)


def test_edits_of_attributes_run_the_model_0_times(
    embedded_kafka: EmbeddedKafka, milvus_lite: MilvusLite, tiny_bundle: Path
) -> None:
    flags = {"kafka.bootstrap_servers": embedded_kafka.bootstrap_servers, "milvus.uri": milvus_lite.uri}
    settings = load_settings(None, flags)
    encoder = CountingEncoder(NoteEncoder.load(tiny_bundle, threads=1))
    publisher = NotePublisher(settings.kafka)
    notes = short_notes(50)
    client = MilvusClient(milvus_lite.uri)

    def publish(changed: list[Note]) -> None:
        for note in changed:
            publisher.publish(note.note_id.encode(), msgspec.json.encode(note))
        publisher.flush()

    def count(where: str) -> int:
        if not client.has_collection("notes"):
            return 0
        return int(client.query("notes", filter=where, output_fields=["count(*)"])[0]["count(*)"])

    with updater_service(settings, encoder) as updater:
        running = Thread(target=updater.run)
        running.start()
        try:
            publish(notes)
            wait_until(lambda: count('text_hash != ""') == 50, "50 tagged rows")
            assert encoder.encoded == 50
            publish([msgspec.structs.replace(note, attributes={"likes": 1}, category="moved") for note in notes])
            wait_until(lambda: count('category == "moved" and attributes["likes"] == 1') == 50, "50 edited rows")
            assert encoder.encoded == 50, "the text is the same"
            assert count('text_hash != ""') == 50, "and the tags are still vouched for"
            publish([msgspec.structs.replace(notes[0], title="another title", attributes={"likes": 2})])
            wait_until(lambda: count('title == "another title" and text_hash != ""') == 1, "the edited row")
            assert encoder.encoded == 51, "a new text is encoded"
        finally:
            updater.stop()
            running.join()
            client.close()
