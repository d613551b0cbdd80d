"""``notellm embed``: a text's vector, for people who query Milvus themselves."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
import typer

from commands.encoders import load_encoder
from commands.options import BundleOption, ConfigOption, ProviderOption, settings_from
from notellm.errors import NoteLLMError
from notellm.messages import Note, parse_record

__all__ = ["embed", "note_from_text"]


def embed(
    text: Annotated[str, typer.Argument(help="The note's content; '-' is standard input.")] = "",
    title: Annotated[str, typer.Option(help="The note's title.", envvar="NOTELLM_CLI_TITLE")] = "",
    hashtag: Annotated[
        list[str] | None,
        typer.Option("--hashtag", help="One of its hashtags. May be repeated.", envvar="NOTELLM_CLI_HASHTAG"),
    ] = None,
    config: ConfigOption = None,
    bundle: BundleOption = None,
    provider: ProviderOption = None,
) -> None:
    """Print a text's embedding as JSON: {"model_version": "...", "embedding": [...]}.

    \b
    Examples:
      notellm embed "Skip the bus, rent a bike" --title "Two days in Kyoto" --hashtag kyoto
      notellm embed - < note.txt | jq .embedding
    """  # noqa: D301 - the \\b is meant: it keeps the lines of the examples apart
    note = note_from_text(sys.stdin.read() if text == "-" else text, title, hashtag or [])
    encoder = load_encoder(settings_from(config, bundle=bundle, provider=provider).encoder)
    encoded = encoder.encode([note], embed_only=True)[0]
    answer = {"model_version": encoder.model_version, "embedding": encoded.embedding.tolist()}
    sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")


def note_from_text(text: str, title: str, hashtags: list[str]) -> Note:
    """A note that was never published, through the same door as those that were."""
    value = msgspec.json.encode({"note_id": "query", "content": text, "title": title, "hashtags": hashtags})
    record = parse_record(b"query", value, 0)
    if not hasattr(record, "note"):
        raise NoteLLMError("text: missing; give a text, --title or --hashtag")
    return record.note
