"""``notellm similar``: the nearest notes, read through the alias as any reader would."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import msgspec
import typer
from pymilvus import MilvusClient
from rich.table import Table

from commands.console import fail, out
from commands.embed import note_from_text
from commands.encoders import load_encoder
from commands.options import BundleOption, ConfigOption, MilvusOption, ProviderOption, settings_from
from consumers.milvus_collection import id_filter, live_collection
from consumers.milvus_connection import connect, milvus_errors
from notellm.errors import NoteLLMError
from notellm.settings import Settings

__all__ = ["similar"]

_FIELDS = ["title", "hashtags", "category", "generated_hashtags", "generated_category"]


def similar(
    note_id: Annotated[str | None, typer.Argument(help="A note that is in the collection.")] = None,
    text: Annotated[str | None, typer.Option(help="Or any text, embedded now.", envvar="NOTELLM_CLI_TEXT")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many.", envvar="NOTELLM_CLI_LIMIT")] = 5,
    where: Annotated[
        str,
        typer.Option(
            "--filter", help="A Milvus filter, such as 'category == \"travel\"'.", envvar="NOTELLM_CLI_FILTER"
        ),
    ] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON instead of a table.", envvar="NOTELLM_CLI_JSON")
    ] = False,
    config: ConfigOption = None,
    milvus: MilvusOption = None,
    bundle: BundleOption = None,
    provider: ProviderOption = None,
) -> None:
    """Show the notes nearest to a note, or to a text.

    \b
    Examples:
      notellm similar travel-001
      notellm similar --text "a weekend in Kyoto" --limit 10 --json
      notellm similar travel-001 --filter 'attributes\\["public"] == true'
    """  # noqa: D301 - the \\b is meant: it keeps the lines of the examples apart
    if (note_id is None) == (text is None):
        fail("give either a NOTE_ID or --text")
    settings = settings_from(config, milvus=milvus, bundle=bundle, provider=provider)
    client = connect(settings.milvus)
    live = live_collection(client, settings.milvus)
    if live is None:
        raise NoteLLMError(
            f"milvus.alias: {settings.milvus.alias!r} is not on {settings.milvus.uri}; is an updater running?"
        )
    if note_id is not None:
        vector = _stored_vector(client, settings, note_id)
        own = f"note_id != {msgspec.json.encode(note_id).decode()}"
        where = f"({where}) and {own}" if where else own
    else:
        vector = _text_vector(settings, text or "", *live)
    with milvus_errors():
        hits = client.search(settings.milvus.alias, data=[vector], filter=where, limit=limit, output_fields=_FIELDS)[0]
    rows = [
        {"note_id": hit.id, "similarity": float(hit.distance), **{name: hit.get(name) for name in _FIELDS}}
        for hit in hits
    ]
    if as_json:
        sys.stdout.write(msgspec.json.encode([_plain(row) for row in rows]).decode() + "\n")
    else:
        out.print(_table(rows))


def _stored_vector(client: MilvusClient, settings: Settings, note_id: str) -> list[float]:
    with milvus_errors():
        found = client.query(settings.milvus.alias, filter=id_filter([note_id]), output_fields=["embedding"])
    if not found:
        raise NoteLLMError(f"NOTE_ID: {note_id!r} is not in {settings.milvus.alias!r}")
    return list(found[0]["embedding"])


def _text_vector(settings: Settings, text: str, collection: str, model_version: str) -> list[float]:
    note = note_from_text(text, "", [])
    encoder = load_encoder(settings.encoder)
    if encoder.model_version != model_version:
        raise NoteLLMError(
            f"encoder.bundle: {settings.encoder.bundle} has model_version {encoder.model_version}, the live collection "
            f"{collection} has {model_version}; vectors of two models cannot be compared: use that model's bundle"
        )
    return list(encoder.encode([note], embed_only=True)[0].embedding.tolist())


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if name.endswith("hashtags") else value for name, value in row.items()}


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table()
    for heading in ("note_id", "similarity", "title", "category", "hashtags", "generated"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "note_id")
    for row in rows:
        generated = ", ".join([*row["generated_hashtags"], row["generated_category"]])
        tags = ", ".join(row["hashtags"])
        table.add_row(row["note_id"], f"{row['similarity']:.4f}", row["title"], row["category"], tags, generated)
    return table
