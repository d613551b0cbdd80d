"""The updater as a service: everything checked and connected, from settings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from pymilvus import MilvusClient

from consumers.dead_letters import KafkaDeadLetters
from consumers.kafka_source import KafkaSource
from consumers.kafka_topics import TopicFacts, ensure_vectors_topic, inspect_topic, topic_warnings
from consumers.lite_lock import LiteLock
from consumers.milvus_collection import Collection, SourceFacts, prepare_collection
from consumers.milvus_connection import connect, is_lite, milvus_errors
from consumers.milvus_sink import MilvusSink
from consumers.note_vectors import KafkaNoteVectors
from consumers.protocols import Encoder
from consumers.updater import Updater
from consumers.write_stage import Observer
from notellm.settings import KafkaSettings, Settings

__all__ = ["source_warnings", "updater_service"]

log = logging.getLogger(__name__)

_VECTORS_CLOSE_SECONDS = 5.0


@contextmanager
def updater_service(settings: Settings, encoder: Encoder, observer: Observer | None = None) -> Iterator[Updater]:
    """Connect to Kafka and Milvus, prepare the collection, and yield an updater that is ready to :meth:`Updater.run`.

    Raises :class:`notellm.errors.NoteLLMError` in one line when something is not as it must be.
    """
    topic = inspect_topic(settings.kafka, settings.kafka.notes_topic)
    dead_letters = inspect_topic(settings.kafka, settings.kafka.dead_letter_topic)
    with ExitStack() as stack:
        client = connect(settings.milvus)
        stack.callback(client.close)
        _lock_lite(settings, client, stack)
        collection = prepare_collection(
            client,
            settings.milvus,
            encoder.model_version,
            encoder.embedding_dim,
            SourceFacts(topic.name, topic.partitions, topic.epoch),
        )
        for warning in [
            *source_warnings(settings.kafka, topic, collection),
            *topic_warnings(settings.kafka, dead_letters),
        ]:
            log.warning(warning)
        group_id = ".".join((settings.kafka.group_prefix, settings.milvus.database, collection.name, collection.fill))
        log.info(
            "collection %s (%s), group %s", collection.name, "created" if collection.created else "there", group_id
        )
        yield Updater(
            KafkaSource(settings.kafka, group_id, delete_retention_ms=topic.delete_retention_ms),
            encoder,
            MilvusSink(client, collection, settings.milvus.timeout_s),
            KafkaDeadLetters(settings.kafka, encoder.model_version),
            settings.updater,
            note_vectors=_note_vectors(settings.kafka, encoder.model_version, topic.partitions, stack),
            source_epoch=topic.epoch,
            topic_partitions=topic.partitions,
            observer=observer,
        )


def source_warnings(settings: KafkaSettings, topic: TopicFacts, collection: Collection | None) -> list[str]:
    """What is not as it should be with the notes topic, now and against what the collection was created for."""
    then = collection.source if collection is not None else None
    if then is None or then.topic != topic.name:
        return topic_warnings(settings, topic)
    return topic_warnings(settings, topic, partitions_then=then.partitions, epoch_then=then.epoch)


def _lock_lite(settings: Settings, client: MilvusClient, stack: ExitStack) -> None:
    """Milvus Lite takes one writer."""
    with milvus_errors():
        lite = is_lite(client)
    if lite:
        lock = LiteLock(settings.milvus.uri)
        lock.acquire()
        stack.callback(lock.release)


def _note_vectors(
    settings: KafkaSettings, model_version: str, partitions: int, stack: ExitStack
) -> KafkaNoteVectors | None:
    if not settings.vectors_topic_prefix:
        return None
    topic = ensure_vectors_topic(settings, model_version, partitions)
    for warning in topic_warnings(settings, topic):
        log.warning(warning)
    vectors = KafkaNoteVectors(settings, model_version, max_message_bytes=topic.max_message_bytes)
    stack.callback(vectors.close, _VECTORS_CLOSE_SECONDS)
    return vectors
