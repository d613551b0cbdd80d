"""Headers of a dead letter: Kafka Connect's names and ours."""

from __future__ import annotations

from notellm.dead_letter import dead_letter_headers
from notellm.errors import InvalidMessage


def headers(error: Exception) -> dict[str, bytes]:
    found = dead_letter_headers(
        topic="notes",
        partition=3,
        offset=42,
        stage="VALUE_CONVERTER",
        reason="wrong_type",
        error=error,
        model_version="0123456789abcdef",
    )
    assert len(dict(found)) == len(found), "no name twice"
    return dict(found)


def test_headers_are_those_of_kafka_connect_and_two_of_ours() -> None:
    assert headers(InvalidMessage("wrong_type", "title", "Expected `str`, got `int`")) == {
        "__connect.errors.topic": b"notes",
        "__connect.errors.partition": b"3",
        "__connect.errors.offset": b"42",
        "__connect.errors.connector.name": b"notellm",
        "__connect.errors.task.id": b"0",
        "__connect.errors.stage": b"VALUE_CONVERTER",
        "__connect.errors.class.name": b"notellm.errors.InvalidMessage",
        "__connect.errors.exception.class.name": b"notellm.errors.InvalidMessage",
        "__connect.errors.exception.message": b"title: Expected `str`, got `int`",
        "notellm.reason": b"wrong_type",
        "notellm.model_version": b"0123456789abcdef",
    }


def test_message_is_utf8_whatever_the_error_says() -> None:
    message = headers(ValueError("笔记 \ud800"))["__connect.errors.exception.message"]
    assert message.decode("utf-8") == "笔记 ?"
