"""``notellm dev``: Kafka, Milvus and an updater on this machine, to develop against."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from commands.console import err, log_to_console
from commands.embedded import EmbeddedKafka, MilvusLite
from commands.encoders import open_encoder
from commands.options import BundleOption, ConfigOption, ProviderOption, settings_from
from commands.update import stop_on_signals
from consumers.service import updater_service

__all__ = ["dev"]


def dev(
    data: Annotated[
        Path, typer.Option(help="Milvus's data, its log and the env file.", envvar="NOTELLM_CLI_DATA")
    ] = Path("build/dev"),
    port: Annotated[int, typer.Option(help="Milvus's port; 0 takes a free one.", envvar="NOTELLM_CLI_PORT")] = 0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin with an empty Milvus.", envvar="NOTELLM_CLI_FRESH")
    ] = False,
    config: ConfigOption = None,
    bundle: BundleOption = None,
    provider: ProviderOption = None,
) -> None:
    """Start an embedded Kafka, an embedded Milvus and an updater, until Ctrl-C.

    Kafka is librdkafka's built-in cluster: in memory, 4 partitions a topic, no compaction, about the last 5 MB of each
    partition; its topics end with the command. Milvus Lite keeps its rows in --data. DATA/env holds both addresses.

    \b
    Examples:
      notellm dev --fresh
      . build/dev/env && notellm publish data/notes.jsonl
    """  # noqa: D301 - the \\b is meant: it keeps the lines of the examples apart
    log_to_console()
    settings = settings_from(config, bundle=bundle, provider=provider)
    if fresh:
        shutil.rmtree(data / "milvus", ignore_errors=True)
    kafka = EmbeddedKafka()
    kafka.create_topics(settings.kafka.notes_topic, settings.kafka.dead_letter_topic)
    milvus = MilvusLite(data / "milvus", port=port, log=data / "milvus.log")
    milvus.start()
    try:
        settings = settings_from(
            config, kafka=kafka.bootstrap_servers, milvus=milvus.uri, bundle=bundle, provider=provider
        )
        with open_encoder(settings.encoder) as encoder, updater_service(settings, encoder) as updater:
            stop_on_signals(updater.stop)
            _write_env(data / "env", kafka, milvus)
            _say(settings.kafka.notes_topic, data, kafka, milvus)
            updater.run()
    finally:
        (data / "env").unlink(missing_ok=True)
        milvus.stop()
    logging.getLogger(__name__).info("stopped; the embedded Kafka's topics are gone with it")


def _write_env(file: Path, kafka: EmbeddedKafka, milvus: MilvusLite) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(
        f"export NOTELLM_KAFKA_BOOTSTRAP_SERVERS={kafka.bootstrap_servers}\nexport NOTELLM_MILVUS_URI={milvus.uri}\n"
    )
    partial.rename(file)


def _say(topic: str, data: Path, kafka: EmbeddedKafka, milvus: MilvusLite) -> None:
    table = Table(title="notellm dev is ready", show_header=False)
    table.add_row("Kafka", kafka.bootstrap_servers)
    table.add_row("Milvus", milvus.uri)
    table.add_row("in another terminal", f". {data}/env")
    table.add_row("publish", "notellm publish data/notes.jsonl")
    table.add_row("or", f"kcat -P -b {kafka.bootstrap_servers} -t {topic} -X partitioner=murmur2_random -K '|'")
    table.add_row("look", "notellm similar travel-001")
    err.print(table)
