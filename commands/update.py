"""``notellm update``: the service."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Annotated

import typer

from commands.console import log_to_console
from commands.encoders import open_encoder
from commands.options import BundleOption, ConfigOption, KafkaOption, MilvusOption, ProviderOption, settings_from
from consumers.errors import CollectionGone
from consumers.operations import OperationsServer
from consumers.protocols import Encoder
from consumers.service import updater_service
from consumers.updater import Updater
from notellm.settings import Settings

__all__ = ["UpdaterService", "stop_on_signals", "update"]

log = logging.getLogger(__name__)


def update(
    config: ConfigOption = None,
    kafka: KafkaOption = None,
    milvus: MilvusOption = None,
    bundle: BundleOption = None,
    provider: ProviderOption = None,
    in_process: Annotated[
        bool,
        typer.Option(
            "--in-process",
            help="Run the model in this process; for debugging: a native crash then ends the updater.",
            envvar="NOTELLM_ENCODER_IN_PROCESS",
        ),
    ] = False,
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
    settings = settings_from(
        config, kafka=kafka, milvus=milvus, bundle=bundle, provider=provider, in_process=in_process or None
    )
    UpdaterService(settings).run(lambda: open_encoder(settings.encoder))
    log.info("stopped; all that was acknowledged is committed")


class UpdaterService:
    """One updater after another, until it is told to stop: a collection that was dropped is created and filled anew."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._encoder: Encoder | None = None
        self._updater: Updater | None = None
        self._stopping = False

    def run(self, open_encoder: Callable[[], AbstractContextManager[Encoder]]) -> None:
        """Blocks until SIGTERM or Ctrl-C. What operators ask is answered from the first moment on."""
        stop_on_signals(self.stop)
        with OperationsServer(self._settings.operations, self.health, self.readiness), open_encoder() as encoder:
            self._encoder = encoder
            log.info("model_version %s on %s", encoder.model_version, getattr(encoder, "provider", "a test encoder"))
            while not self._stopping:
                try:
                    with updater_service(self._settings, encoder) as self._updater:
                        if not self._stopping:
                            self._updater.run()
                    return
                except CollectionGone as gone:
                    log.warning("%s; creating and filling it again", gone)
                    self._updater = None

    def stop(self) -> None:
        """From a signal handler: an updater that runs finishes its work, else there is nothing to finish."""
        self._stopping = True
        if self._updater is None:
            raise SystemExit(0)
        self._updater.stop()

    def health(self) -> list[str]:
        updater = self._updater
        return updater.health() if updater is not None else []

    def readiness(self) -> list[str]:
        updater = self._updater
        if self._encoder is None:
            return ["loading the model"]
        if not getattr(self._encoder, "ready", True):
            return ["the encoder's process is starting again"]
        return updater.readiness() if updater is not None else ["connecting to Kafka and Milvus"]


def stop_on_signals(stop: Callable[[], None]) -> None:
    """SIGTERM and Ctrl-C finish what is in flight, within ``drain_timeout_s``; a second Ctrl-C does not wait."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        del frame
        log.info("%s: finishing what is in flight", signal.Signals(number).name)
        stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
