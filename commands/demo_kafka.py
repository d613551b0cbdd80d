"""The demo's topics on a Kafka that is somebody's own: of its own name, made before and deleted after."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

from commands.embedded import EmbeddedKafka
from commands.real_kafka import RealKafka, fetched_jars
from consumers.kafka_client import client_properties, make_client
from consumers.kafka_topics import inspect_topic
from notellm.errors import NoteLLMError
from notellm.settings import KafkaSettings, load_settings

__all__ = ["demo_clicks_kafka", "demo_kafka"]

log = logging.getLogger(__name__)

_SERVERS = Path("build/servers")
_PARTITIONS = 4
_REACH_SECONDS = 10.0
_SECONDS = 30.0


@contextmanager
def demo_kafka(address: str | None) -> Iterator[dict[str, str]]:
    """Settings of a Kafka that has the demo's topics: the embedded one, or where there is an ``address``, that one."""
    if address is None:
        kafka = EmbeddedKafka()
        settings = load_settings(None, {"kafka.bootstrap_servers": kafka.bootstrap_servers}).kafka
        kafka.create_topics(settings.notes_topic, settings.dead_letter_topic)
        yield {"kafka.bootstrap_servers": kafka.bootstrap_servers}
        return
    name = f"notellm-demo-{uuid.uuid4().hex[:8]}"
    flags = {
        "kafka.bootstrap_servers": address,
        "kafka.notes_topic": name,
        "kafka.dead_letter_topic": f"{name}.dead-letter",
        "kafka.vectors_topic_prefix": "",  # whatever the environment says: it would stay there
    }
    settings = load_settings(None, flags).kafka
    admin = make_client(AdminClient, client_properties(settings))
    _reach(admin, address)
    topics = [
        NewTopic(settings.notes_topic, _PARTITIONS, -1, config={"cleanup.policy": "compact"}),
        NewTopic(settings.dead_letter_topic, 1, -1),
    ]
    try:
        _create(admin, settings, topics)
        yield flags
    finally:
        _delete(admin, [topic.topic for topic in topics])


@contextmanager
def demo_clicks_kafka(address: str | None, folder: Path) -> Iterator[dict[str, str]]:
    """Settings of a real Kafka that has the topics of ``demo --clicks``; without an ``address`` one is started.

    Faust needs more than the embedded Kafka has. Its own topics, and its consumer group, go in the end as well.
    """
    if address is None:
        server = RealKafka(fetched_jars(_SERVERS / "kafka"), folder)
        server.start()
        try:
            with demo_clicks_kafka(server.bootstrap_servers, folder) as flags:
                yield flags
        finally:
            server.kill()  # nobody wants its data any more
        return
    name = f"notellm-demo-{uuid.uuid4().hex[:8]}"
    flags = {
        "kafka.bootstrap_servers": address,
        "streams.clicks_topic": f"{name}-clicks",
        "streams.dead_letter_topic": f"{name}-clicks.dead-letter",
        "streams.app_id": f"{name}-app",
    }
    settings = load_settings(None, flags).kafka
    admin = make_client(AdminClient, client_properties(settings))
    _reach(admin, address)
    # Made-up clicks are days old: by their age, Kafka would delete them at once where it keeps little.
    topics = [
        NewTopic(flags["streams.clicks_topic"], _PARTITIONS, -1, config={"retention.ms": "-1"}),
        NewTopic(flags["streams.dead_letter_topic"], 1, -1, config={"retention.ms": "-1"}),
    ]
    try:
        _create(admin, settings, topics)
        yield flags
    finally:
        there = admin.list_topics(timeout=_SECONDS).topics
        _delete(admin, [topic for topic in there if topic.startswith(name)])
        for deleted in admin.delete_consumer_groups([flags["streams.app_id"]]).values():
            with suppress(KafkaException, TimeoutError):  # it is not there when nobody joined it
                deleted.result(_SECONDS)


def _reach(admin: AdminClient, address: str) -> None:
    try:
        admin.list_topics(timeout=_REACH_SECONDS)
    except KafkaException as error:
        raise NoteLLMError(f"--kafka: {address!r} cannot be reached: {error.args[0].str()}") from None


def _create(admin: AdminClient, settings: KafkaSettings, topics: list[NewTopic]) -> None:
    for topic, created in admin.create_topics(topics, request_timeout=_SECONDS).items():
        try:
            created.result(_SECONDS)
        except (KafkaException, TimeoutError) as error:
            raise NoteLLMError(
                f"--kafka: {settings.bootstrap_servers!r} does not create topic {topic!r}: {_reason(error)}"
            ) from None
    for new in topics:
        inspect_topic(settings, new.topic)


def _delete(admin: AdminClient, names: list[str]) -> None:
    if not names:
        return
    for topic, deleted in admin.delete_topics(names, request_timeout=_SECONDS).items():
        try:
            deleted.result(_SECONDS)
        except (KafkaException, TimeoutError) as error:
            if isinstance(error, KafkaException) and error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                continue  # it was not created
            log.warning("the demo's topic %s could not be deleted: %s", topic, _reason(error))


def _reason(error: KafkaException | TimeoutError) -> str:
    return str(error.args[0].str()) if isinstance(error, KafkaException) else "no answer"
