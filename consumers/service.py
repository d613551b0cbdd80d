"""The updater as a service: everything checked and connected, from settings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from consumers.dead_letters import KafkaDeadLetters
from consumers.kafka_source import KafkaSource, inspect_topic
from consumers.lite_lock import LiteLock
from consumers.milvus_collection import prepare_collection
from consumers.milvus_connection import connect, is_lite, milvus_errors
from consumers.milvus_sink import MilvusSink
from consumers.protocols import Encoder
from consumers.updater import Updater
from consumers.write_stage import Observer
from notellm.settings import Settings

__all__ = ["updater_service"]

log = logging.getLogger(__name__)


@contextmanager
def updater_service(settings: Settings, encoder: Encoder, observer: Observer | None = None) -> Iterator[Updater]:
    """Connect to Kafka and Milvus, prepare the collection, and yield an updater that is ready to :meth:`Updater.run`.

    Raises :class:`notellm.errors.NoteLLMError` in one line when something is not as it must be.
    """
    topic = inspect_topic(settings.kafka, settings.kafka.notes_topic)
    inspect_topic(settings.kafka, settings.kafka.dead_letter_topic)
    client = connect(settings.milvus)
    lock = LiteLock(settings.milvus.uri)
    try:
        with milvus_errors():
            lite = is_lite(client)
        if lite:
            lock.acquire()
        collection = prepare_collection(client, settings.milvus, encoder.model_version, encoder.embedding_dim)
        group_id = ".".join((settings.kafka.group_prefix, settings.milvus.database, collection.name, collection.fill))
        log.info(
            "collection %s (%s), group %s", collection.name, "created" if collection.created else "there", group_id
        )
        yield Updater(
            KafkaSource(settings.kafka, group_id),
            encoder,
            MilvusSink(client, collection.name, settings.milvus.timeout_s),
            KafkaDeadLetters(settings.kafka, encoder.model_version),
            settings.updater,
            source_epoch=topic.epoch,
            topic_partitions=topic.partitions,
            observer=observer,
        )
    finally:
        lock.release()
        client.close()
