"""Options that several commands share. Each names the setting it sets; docs/configuration.md lists them all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from notellm.settings import CONFIG_VARIABLE, Settings, load_settings

__all__ = ["BundleOption", "ConfigOption", "KafkaOption", "MilvusOption", "ProviderOption", "settings_from"]

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="A TOML file with settings.", envvar=CONFIG_VARIABLE, show_default=False)
]
KafkaOption = Annotated[
    str | None,
    typer.Option(
        "--kafka", help="Kafka brokers, host:port.", envvar="NOTELLM_KAFKA_BOOTSTRAP_SERVERS", show_default=False
    ),
]
MilvusOption = Annotated[
    str | None,
    typer.Option("--milvus", help="Milvus server, http://host:port.", envvar="NOTELLM_MILVUS_URI", show_default=False),
]
BundleOption = Annotated[
    Path | None,
    typer.Option(
        "--bundle", help="The exported model's directory.", envvar="NOTELLM_ENCODER_BUNDLE", show_default=False
    ),
]
ProviderOption = Annotated[
    str | None,
    typer.Option("--provider", help="auto, cpu or cuda.", envvar="NOTELLM_ENCODER_PROVIDER", show_default=False),
]


def settings_from(
    config: Path | None,
    *,
    kafka: str | None = None,
    milvus: str | None = None,
    bundle: Path | None = None,
    provider: str | None = None,
    in_process: bool | None = None,
) -> Settings:
    """All settings, with these flags on top. Raises :class:`notellm.errors.SettingsError`."""
    flags = {
        "kafka.bootstrap_servers": kafka,
        "milvus.uri": milvus,
        "encoder.bundle": bundle,
        "encoder.provider": provider,
        "encoder.in_process": in_process,
    }
    return load_settings(config, flags)
