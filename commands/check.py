"""``notellm check``: is everything in place for an updater? What is wrong with what?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import typer
from rich.markup import escape
from rich.table import Table

from commands.console import out
from commands.encoders import load_encoder
from commands.options import BundleOption, ConfigOption, KafkaOption, MilvusOption, ProviderOption, settings_from
from consumers.errors import SecondWriter
from consumers.kafka_source import inspect_topic
from consumers.lite_lock import LiteLock
from consumers.milvus_collection import collection_name, inspect_collection, live_collection
from consumers.milvus_connection import connect, is_lite, milvus_errors
from notellm.encoder import NoteEncoder
from notellm.errors import NoteLLMError
from notellm.settings import Settings

__all__ = ["check"]


@dataclass(frozen=True)
class _Finding:
    what: str
    fault: bool
    text: str


def check(
    config: ConfigOption = None,
    kafka: KafkaOption = None,
    milvus: MilvusOption = None,
    bundle: BundleOption = None,
    provider: ProviderOption = None,
) -> None:
    """Read the configuration, reach Kafka, Milvus and the bundle, and say what is wrong with each. Changes nothing.

    The exit status is 1 if an updater could not start.

    \b
    Examples:
      notellm check
      notellm check --kafka kafka:9092 --milvus http://milvus:19530 --bundle bundles/mine
    """  # noqa: D301 - the \\b is meant: it keeps the lines of the examples apart
    findings: list[_Finding] = []

    @contextmanager
    def looking_at(what: str) -> Iterator[Callable[[str], None]]:
        try:
            yield lambda text: findings.append(_Finding(what, False, text))
        except NoteLLMError as error:
            # Brokers that are away are one fault, however many topics were looked for.
            known = {finding.text for finding in findings}
            findings.extend(_Finding(what, True, line) for line in str(error).splitlines() if line not in known)

    settings: Settings | None = None
    with looking_at("configuration") as good:
        settings = settings_from(config, kafka=kafka, milvus=milvus, bundle=bundle, provider=provider)
        good("every setting is known and allowed")
    if settings is not None:
        encoder: NoteEncoder | None = None
        with looking_at("bundle") as good:
            encoder = load_encoder(settings.encoder)
            good(_about_bundle(encoder))
        for topic in (settings.kafka.notes_topic, settings.kafka.dead_letter_topic):
            with looking_at(f"Kafka, {topic}") as good:
                facts = inspect_topic(settings.kafka, topic)
                good(f"{settings.kafka.bootstrap_servers}: {facts.partitions} partitions")
        with looking_at("Milvus") as good:
            _look_at_milvus(settings, encoder, good)
    table = Table("", "what", "finding")
    for finding in findings:
        table.add_row("[red]FAULT[/]" if finding.fault else "[green]ok[/]", finding.what, escape(finding.text))
    out.print(table)
    if any(finding.fault for finding in findings):
        raise typer.Exit(1)


def _about_bundle(encoder: NoteEncoder) -> str:
    manifest = encoder.bundle.manifest
    proof = "parity proven" if manifest.parity.passed else "parity NOT proven"
    trained = "" if manifest.projection == "linear" else ", untrained (identity projection)"
    return (
        f"{encoder.bundle.path}: {manifest.base_model}, model_version {manifest.model_version}, "
        f"{manifest.embedding_dim} dimensions, {proof} on {manifest.parity.provider}{trained}; "
        f"runs on {encoder.provider}"
    )


def _look_at_milvus(settings: Settings, encoder: NoteEncoder | None, good: Callable[[str], None]) -> None:
    client = connect(settings.milvus)
    try:
        with milvus_errors():
            good(f"{settings.milvus.uri}: {client.get_server_version()}")
            lite = is_lite(client)
        if encoder is not None:
            name = collection_name(settings.milvus, encoder.model_version)
            found = inspect_collection(client, settings.milvus, encoder.model_version, encoder.embedding_dim)
            good(f"collection {name}: {_there(found)}")
        live = live_collection(client, settings.milvus)
        good(f"alias {settings.milvus.alias}: {f'points at {live[0]}' if live else _there(live)}")
        if lite:
            _look_at_lock(settings)
            good("Milvus Lite: no other updater writes to it")
    finally:
        client.close()


def _there(found: object) -> str:
    return "there" if found else "not there yet; the updater creates it"


def _look_at_lock(settings: Settings) -> None:
    lock = LiteLock(settings.milvus.uri)
    try:
        lock.acquire()
    except SecondWriter as error:
        raise SecondWriter(f"{error} (fine, if that is the one you mean to run)") from None
    lock.release()
