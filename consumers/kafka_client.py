"""Kafka clients: what each of the project is made with, and one clear line when librdkafka will not have it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from confluent_kafka import KafkaException

from consumers.errors import UpdaterError
from notellm.settings import KafkaSettings

__all__ = ["client_properties", "make_client"]

_kafka_log = logging.getLogger("consumers.librdkafka")

Client = TypeVar("Client")


def client_properties(settings: KafkaSettings) -> dict[str, Any]:
    """What every client of the project is made with; the user's own properties win."""
    return {"bootstrap.servers": settings.bootstrap_servers, "client.id": "notellm", **settings.properties}


def make_client(kind: Callable[..., Client], properties: Mapping[str, Any]) -> Client:
    """A Consumer, Producer or AdminClient. Raises :class:`UpdaterError` that names the property that is refused."""
    try:
        return kind(dict(properties), logger=_kafka_log)
    except KafkaException as error:
        raise UpdaterError(f"kafka.properties: {error.args[0].str().strip()}") from None
