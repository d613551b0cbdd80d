"""A running updater, as an operator sees it: its HTTP endpoint, and the broker's list of its group's members."""

from __future__ import annotations

from urllib.error import HTTPError
from urllib.request import urlopen

from confluent_kafka.admin import AdminClient
from prometheus_client.parser import text_string_to_metric_families

__all__ = ["ask", "members", "metric"]


def ask(port: int, path: str) -> tuple[int, str]:
    """Status and body of a GET."""
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


def metric(port: int, name: str) -> dict[str, float]:
    """The samples of a metric with at most one label: the label's value -> the sample's."""
    _, text = ask(port, "/metrics")
    return {
        next(iter(sample.labels.values()), ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def members(bootstrap_servers: str, group: str) -> dict[str, list[int]]:
    """Who is in the group, and which partitions each has. One that leaves and joins again has another name."""
    admin = AdminClient({"bootstrap.servers": bootstrap_servers, "log_level": 3})
    found = admin.describe_consumer_groups([group], request_timeout=10)[group].result(15)
    return {
        member.member_id: sorted(place.partition for place in member.assignment.topic_partitions)
        for member in found.members
    }
