"""The real Kafka of the tests: the project's own, and what tests do to its topics."""

from __future__ import annotations

import time
from collections.abc import Mapping

from confluent_kafka.admin import AdminClient, NewTopic

from commands.real_kafka import RealKafka
from tests.support.missing import missing

__all__ = ["KafkaElsewhere", "KafkaServer"]


class KafkaServer(RealKafka):
    """Its data, its settings and its log are in ``folder``."""

    def create_topic(self, name: str, partitions: int = 1, config: Mapping[str, str] | None = None) -> None:
        """Returns once its partitions have leaders. ``config`` is the topic's own, ``cleanup.policy`` for instance."""
        admin = self._admin()
        admin.create_topics([NewTopic(name, partitions, 1, config=dict(config or {}))])[name].result(30)
        deadline = time.monotonic() + 30
        while not self._has_leaders(admin, name, partitions):
            assert time.monotonic() < deadline, f"topic {name} got no leaders"
            time.sleep(0.02)

    def delete_topic(self, name: str) -> None:
        """Returns once nobody sees it any more."""
        admin = self._admin()
        admin.delete_topics([name])[name].result(30)
        deadline = time.monotonic() + 30
        while name in admin.list_topics(timeout=10).topics:
            assert time.monotonic() < deadline, f"topic {name} does not go"
            time.sleep(0.02)

    def _has_leaders(self, admin: AdminClient, name: str, partitions: int) -> bool:
        topic = admin.list_topics(name, timeout=10).topics[name]
        return len(topic.partitions) == partitions and all(each.leader >= 0 for each in topic.partitions.values())


class KafkaElsewhere(KafkaServer):
    """A Kafka that somebody else runs (``TEST_KAFKA``): its topics are ours, whether it runs is not."""

    def __init__(self, bootstrap_servers: str) -> None:
        self.bootstrap_servers = bootstrap_servers

    @property
    def is_running(self) -> bool:
        return True

    def start(self) -> None:
        missing("a Kafka that this test may stop; run it without TEST_KAFKA")

    stop = kill = restart = start
