"""``notellm update``: the service."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Annotated

import typer

from commands.console import log_to_console
from commands.encoders import load_encoder
from commands.options import BundleOption, ConfigOption, KafkaOption, MilvusOption, ProviderOption, settings_from
from consumers.service import updater_service
from consumers.updater import Updater

__all__ = ["stop_on_signals", "update"]

log = logging.getLogger(__name__)


def update(
    config: ConfigOption = None,
    kafka: KafkaOption = None,
    milvus: MilvusOption = None,
    bundle: BundleOption = None,
    provider: ProviderOption = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.", envvar="NOTELLM_CLI_VERBOSE")] = False,
) -> None:
    """Run the updater: read notes from Kafka, write rows to Milvus, until SIGTERM or Ctrl-C.

    Run as many as you have GPUs; Kafka shares the partitions out among them. (A Milvus Lite server takes one.)

    \b
    Examples:
      notellm update --kafka kafka:9092 --milvus http://milvus:19530 --bundle bundles/mine
      NOTELLM_MILVUS_TOKEN=root:Milvus notellm update --config notellm.toml
    """  # noqa: D301 - the \\b is meant: it keeps the lines of the examples apart
    log_to_console(logging.DEBUG if verbose else logging.INFO)
    settings = settings_from(config, kafka=kafka, milvus=milvus, bundle=bundle, provider=provider)
    encoder = load_encoder(settings.encoder)
    log.info("model_version %s on %s", encoder.model_version, encoder.provider)
    with updater_service(settings, encoder) as updater:
        stop_on_signals(updater)
        updater.run()
    log.info("stopped; all that was acknowledged is committed")


def stop_on_signals(updater: Updater) -> None:
    """SIGTERM and Ctrl-C finish what is in flight, within ``drain_timeout_s``; a second Ctrl-C does not wait."""

    def stop(number: int, frame: FrameType | None) -> None:
        del frame
        log.info("%s: finishing what is in flight", signal.Signals(number).name)
        updater.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
