"""``notellm check``: is everything in place for an updater? What is wrong with what?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer
from rich.markup import escape
from rich.table import Table

from commands.console import out
from commands.encoders import load_encoder
from commands.options import BundleOption, ConfigOption, KafkaOption, MilvusOption, ProviderOption, settings_from
from consumers.errors import SecondWriter
from consumers.kafka_topics import TopicFacts, inspect_topic, topic_warnings
from consumers.lite_lock import LiteLock
from consumers.milvus_collection import Collection, collection_name, inspect_collection, live_collection
from consumers.milvus_connection import connect, is_lite, milvus_errors
from consumers.service import source_warnings
from notellm.bundle import ParityReport, record_parity
from notellm.encoder import NoteEncoder
from notellm.errors import BundleError, NoteLLMError
from notellm.parity import prove_bundle
from notellm.settings import KafkaSettings, Settings

__all__ = ["check"]

_VERDICTS = {"ok": "[green]ok[/]", "warning": "[yellow]WARNING[/]", "fault": "[red]FAULT[/]"}


@dataclass(frozen=True)
class _Finding:
    what: str
    verdict: Literal["ok", "warning", "fault"]
    text: str


class _Looking:
    """What is being looked at, and what was found of it."""

    def __init__(self, what: str, findings: list[_Finding]) -> None:
        self._what = what
        self._findings = findings

    def good(self, text: str) -> None:
        self._findings.append(_Finding(self._what, "ok", text))

    def warn(self, texts: Iterable[str]) -> None:
        self._findings.extend(_Finding(self._what, "warning", text) for text in texts)


def check(
    config: ConfigOption = None,
    kafka: KafkaOption = None,
    milvus: MilvusOption = None,
    bundle: BundleOption = None,
    provider: ProviderOption = None,
) -> None:
    """Read the configuration, reach Kafka, Milvus and the bundle, and say what is wrong with each.

    Changes nothing, but for a bundle whose parity with torch is unproven where it runs, on a GPU say: it is compared
    now, and what was found is kept in the bundle. The exit status is 1 if an updater could not start.

    \b
    Examples:
      notellm check
      notellm check --bundle bundles/mine --provider cuda
      notellm check --kafka kafka:9092 --milvus http://milvus:19530 --bundle bundles/mine
    """  # noqa: D301 - the \\b is meant: it keeps the lines of the examples apart
    findings: list[_Finding] = []

    @contextmanager
    def looking_at(what: str) -> Iterator[_Looking]:
        try:
            yield _Looking(what, findings)
        except NoteLLMError as error:
            # Brokers that are away are one fault, however many topics were looked for.
            known = {finding.text for finding in findings}
            findings.extend(_Finding(what, "fault", line) for line in str(error).splitlines() if line not in known)

    settings: Settings | None = None
    with looking_at("configuration") as look:
        settings = settings_from(config, kafka=kafka, milvus=milvus, bundle=bundle, provider=provider)
        look.good("every setting is known and allowed")
    if settings is not None:
        encoder: NoteEncoder | None = None
        with looking_at("bundle") as look:
            encoder = load_encoder(settings.encoder)
            look.good(_about_bundle(encoder))
        if encoder is not None:
            with looking_at("parity with torch") as look:
                _look_at_parity(encoder, look)
        notes: TopicFacts | None = None
        with looking_at(f"Kafka, {settings.kafka.notes_topic}") as look:
            notes = _look_at_topic(settings.kafka, settings.kafka.notes_topic, look)
        with looking_at(f"Kafka, {settings.kafka.dead_letter_topic}") as look:
            facts = _look_at_topic(settings.kafka, settings.kafka.dead_letter_topic, look)
            look.warn(topic_warnings(settings.kafka, facts))
        collection: Collection | None = None
        with looking_at("Milvus") as look:
            collection = _look_at_milvus(settings, encoder, look)
        if notes is not None:
            with looking_at(f"Kafka, {settings.kafka.notes_topic}") as look:
                look.warn(source_warnings(settings.kafka, notes, collection))
    table = Table("", "what", "finding")
    for finding in findings:
        table.add_row(_VERDICTS[finding.verdict], finding.what, escape(finding.text))
    out.print(table)
    if any(finding.verdict == "fault" for finding in findings):
        raise typer.Exit(1)


def _look_at_topic(settings: KafkaSettings, topic: str, look: _Looking) -> TopicFacts:
    facts = inspect_topic(settings, topic)
    policy = f", cleanup.policy={facts.cleanup_policy}" if facts.cleanup_policy else ""
    look.good(f"{settings.bootstrap_servers}: {facts.partitions} partitions{policy}")
    return facts


def _about_bundle(encoder: NoteEncoder) -> str:
    manifest = encoder.bundle.manifest
    trained = "" if manifest.projection == "linear" else ", untrained (identity projection)"
    return (
        f"{encoder.bundle.path}: {manifest.base_model}, {manifest.precision}, model_version {manifest.model_version}, "
        f"{manifest.embedding_dim} dimensions{trained}; runs on {encoder.provider}"
    )


def _look_at_parity(encoder: NoteEncoder, look: _Looking) -> None:
    """Proven where the bundle runs? If nobody knows, it is compared now, and written into the bundle."""
    report = encoder.bundle.manifest.parity_on(encoder.provider)
    if report is None:
        report = prove_bundle(encoder.bundle.path, encoder.provider)
        look.warn(_record(encoder.bundle.path, report))
    failed = [f"{row.check}: {row.value:.3g}" for row in report.rows if not row.passed]
    if failed:
        raise BundleError(f"not within its bounds on {report.provider}: {'; '.join(failed)}; export it again")
    look.good(f"proven on {report.provider}")


def _record(bundle: Path, report: ParityReport) -> list[str]:
    try:
        record_parity(bundle, report)
    except BundleError as error:
        return [f"what was found cannot be kept: {error}"]
    return []


def _look_at_milvus(settings: Settings, encoder: NoteEncoder | None, look: _Looking) -> Collection | None:
    """The collection of the encoder's model, where there is one already."""
    client = connect(settings.milvus)
    found: Collection | None = None
    try:
        with milvus_errors():
            look.good(f"{settings.milvus.uri}: {client.get_server_version()}")
            lite = is_lite(client)
        if encoder is not None:
            name = collection_name(settings.milvus, encoder.model_version)
            found = inspect_collection(client, settings.milvus, encoder.model_version, encoder.embedding_dim)
            look.good(f"collection {name}: {_there(found)}")
        live = live_collection(client, settings.milvus)
        look.good(f"alias {settings.milvus.alias}: {f'points at {live[0]}' if live else _there(live)}")
        if lite:
            _look_at_lock(settings)
            look.good("Milvus Lite: no other updater writes to it")
    finally:
        client.close()
    return found


def _there(found: object) -> str:
    return "there" if found else "not there yet; the updater creates it"


def _look_at_lock(settings: Settings) -> None:
    lock = LiteLock(settings.milvus.uri)
    try:
        lock.acquire()
    except SecondWriter as error:
        raise SecondWriter(f"{error} (fine, if that is the one you mean to run)") from None
    lock.release()
