"""The Faust app: ``python -m streams.app`` runs a worker that keeps each user's clicks of the window.

What becomes of a record stands in rules.py, how a worker commits in click_worker.py. Faust brings the consumer group,
the table's disks and their recovery from the changelog; it has no say in what is committed, and writes nothing.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final

import faust
import typer
from aiokafka.errors import IllegalStateError  # type: ignore[import-not-found]
from faust.transport.drivers.aiokafka import Consumer
from faust.types import TP
from faust.worker import Worker
from prometheus_client import start_http_server

from notellm.errors import NoteLLMError
from notellm.settings import CONFIG_VARIABLE, Settings, load_settings
from streams.broker_credentials import BrokerCredentials, broker_credentials, unheard_properties
from streams.click_table import ClickTable, Rules
from streams.click_topics import TABLE, prepare_topics
from streams.click_worker import ClickWorker
from streams.clicks_log import KafkaClicksLog
from streams.errors import WorkerError
from streams.kafka_writers import KafkaChangelog, KafkaDeadLetters, Source
from streams.rocksdb_rows import OPTIONS, RocksDBRows
from streams.watchdog import Watchdog

__all__ = ["STALLED", "UNEXPECTED", "Handle", "run"]

log = logging.getLogger("streams.app")

# Exit statuses: 0 after SIGTERM, 1 when it cannot start.
UNEXPECTED: Final = 70
STALLED: Final = 75

# What is done with one record, and its timestamp.
Handle = Callable[[Source, int], None]

_COMMIT_INTERVAL_S = 1.0
_POLLED_RECORDS = 4096
# When it is full, Faust looks again after a second: it must hold more than a second of clicks.
_BUFFERED_RECORDS = 32_768
_LOOK_EVERY = 128
_LOOK_EVERY_S = 0.01
# Kafka may be away when the worker is told to stop.
_LAST_ROUND_S = 20.0
# Our watchdog looks after that.
_NEVER_S = 10.0**9


def main(
    config: Annotated[
        Path | None,
        typer.Option("--config", help="A TOML file with settings.", envvar=CONFIG_VARIABLE, show_default=False),
    ] = None,
    kafka: Annotated[
        str | None,
        typer.Option(
            "--kafka", help="Kafka brokers, host:port.", envvar="NOTELLM_KAFKA_BOOTSTRAP_SERVERS", show_default=False
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="This worker's own folder.", envvar="NOTELLM_STREAMS_DATA", show_default=False),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.", envvar="NOTELLM_CLI_VERBOSE")] = False,
) -> None:
    """Keep each user's clicks of the window: note-clicks -> a RocksDB table and its changelog topic, until SIGTERM.

    Run as many as note-clicks has partitions, each with a --data folder of its own; Kafka shares the partitions out.

    \b
    Exit status: 0 after SIGTERM or Ctrl-C, with everything committed; 1 when it cannot start;
    70 after an unexpected error and 75 when it hangs, with nothing committed that is not done:
    start it again.

    \b
    Examples:
      python -m streams.app --kafka kafka:9092 --data /var/lib/notellm/clicks
      NOTELLM_STREAMS_PORT=0 python -m streams.app --config notellm.toml
    """  # noqa: D301 - the \\b is meant: it keeps the lines apart
    _log_to_console(verbose=verbose)
    try:
        settings = load_settings(config, {"kafka.bootstrap_servers": kafka, "streams.data": data})
        run(settings)
    except NoteLLMError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(1) from None


def run(settings: Settings, wrap: Callable[[Handle], Handle] = lambda handle: handle) -> None:
    """Blocks until SIGTERM or Ctrl-C. Tests ``wrap`` what is done with a record.

    Raises :class:`notellm.errors.NoteLLMError` when the worker cannot start.
    """
    lock = _own_folder(settings.streams.data)
    credentials = broker_credentials(settings.kafka.properties)
    unheard = unheard_properties(settings.kafka.properties)
    if unheard:
        log.info("kafka.properties: Faust's consumer does not take %s; the other clients do", ", ".join(unheard))
    partitions = prepare_topics(settings)
    _serve_metrics(settings)
    app = _app(settings, credentials)
    table = app.Table(TABLE, key_type=bytes, value_type=bytes, partitions=partitions, options=dict(OPTIONS))
    table.on_recover(_say_recovered)
    rules = Rules.of(settings.streams)
    worker = ClickWorker(
        KafkaChangelog(settings),
        KafkaDeadLetters(settings),
        lambda partition: ClickTable(RocksDBRows(table.data, partition), rules),
        KafkaClicksLog(settings),
        longest_pause_s=settings.streams.session_timeout_s,
    )
    consumer = _consumer_class(worker, settings.streams.clicks_topic)
    app.transport.Consumer = consumer
    _agent(app, settings.streams.clicks_topic, worker, wrap(worker.handle))
    Watchdog(
        settings,
        partitions,
        owned=lambda: set(consumer.owned),
        activity=lambda: _recovered(app),
        end=lambda why: _end(STALLED, why),
    ).start()
    log.info(
        "clicks from %s (%d partitions) on %s into %s",
        settings.streams.clicks_topic, partitions, settings.kafka.bootstrap_servers, settings.streams.data,
    )  # fmt: skip
    try:
        Worker(app, quiet=True, override_logging=False, redirect_stdouts=False).execute_from_commandline()
    except SystemExit as ended:
        if ended.code:
            raise
    finally:
        lock.close()
    log.info("stopped; all that was done is committed")


def _app(settings: Settings, credentials: BrokerCredentials | None) -> faust.App:
    streams = settings.streams
    servers = [f"kafka://{server.strip()}" for server in settings.kafka.bootstrap_servers.split(",")]
    session_s = streams.session_timeout_s
    return faust.App(
        streams.app_id,
        broker=servers,
        broker_credentials=_faust_credentials(credentials),
        store="rocksdb://",
        datadir=str(streams.data),
        Monitor=_QuietMonitor,
        web_enabled=False,
        topic_allow_declare=False,  # prepare_topics has made what there is to make
        topic_disable_leader=True,
        table_standby_replicas=0,
        consumer_auto_offset_reset="earliest",
        broker_session_timeout=float(session_s),
        broker_heartbeat_interval=session_s / 6,
        broker_request_timeout=max(90.0, session_s + 10.0),
        broker_commit_interval=_COMMIT_INTERVAL_S,
        broker_commit_livelock_soft_timeout=_NEVER_S,
        stream_processing_timeout=_NEVER_S,
        stream_wait_empty=True,
        broker_max_poll_records=_POLLED_RECORDS,
        stream_buffer_maxsize=_BUFFERED_RECORDS,
    )


def _faust_credentials(credentials: BrokerCredentials | None) -> Any:
    if credentials is None:
        return None
    if not credentials.mechanism:
        return faust.SSLCredentials(credentials.context)
    return faust.SASLCredentials(
        username=credentials.username,
        password=credentials.password,
        ssl_context=credentials.context,
        mechanism=credentials.mechanism,
    )


async def _say_recovered() -> None:
    log.info("the changelog is read")


def _agent(app: faust.App, clicks_topic: str, worker: ClickWorker, handle: Handle) -> None:
    topic = app.topic(
        clicks_topic, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw", allow_empty=True
    )

    @app.agent(topic, name="clicks")  # type: ignore[untyped-decorator]
    async def clicks(stream: Any) -> None:
        seen = 0
        async for event in stream.events():
            record = event.message
            try:
                seen += 1
                if seen % _LOOK_EVERY == 0:
                    while worker.is_full:
                        await asyncio.sleep(_LOOK_EVERY_S)
                    if not app.flow_control.is_active() or record.generation_id != app.consumer_generation_id:
                        continue  # the partitions are being shared out anew: it comes again, here or elsewhere
                if not worker.expects(record):
                    back = worker.missing(record)
                    if back is not None:
                        with suppress(IllegalStateError):  # it is not ours any more
                            await app.consumer.seek(TP(clicks_topic, record.partition), back)
                    continue
                handle(record, -1 if record.timestamp is None else round(record.timestamp * 1000))
            except Exception:
                # Faust would acknowledge the record and go on.
                log.exception("at %s[%d]@%d", record.topic, record.partition, record.offset)
                _end(UNEXPECTED, "an unexpected error; nothing was committed since")


def _consumer_class(worker: ClickWorker, clicks_topic: str) -> Any:
    class ClickConsumer(Consumer):  # type: ignore[misc]
        """Commits what the worker says is done, where Faust's would commit what agents have been handed."""

        logger = logging.getLogger("faust.clicks")
        owned: frozenset[int] = frozenset()
        _over = False

        async def force_commit(
            self, topics: Iterable[TP | str] | None = None, start_new_transaction: bool = True
        ) -> bool:
            del topics, start_new_transaction
            for bookkeeping in (self._acked, self._acked_index, self._gap):
                bookkeeping.clear()  # nobody reads it any more
            self._n_acked = 0
            if self._over:
                return False
            try:
                offsets = await asyncio.wait_for(worker.round(), _LAST_ROUND_S if self.app.should_stop else None)
                if not offsets:
                    return False
                done = await self._commit_offsets(
                    {TP(clicks_topic, partition): offset for partition, offset in offsets.items()}
                )
            except TimeoutError:
                log.warning("Kafka did not take the last clicks within %.0f s: they will be read again", _LAST_ROUND_S)
                return False
            except WorkerError as error:
                _end(UNEXPECTED, str(error))
                raise
            except Exception:
                log.exception("committing")
                _end(UNEXPECTED, "an unexpected error; nothing was committed since")
                raise
            if done:
                worker.committed(offsets)
            return bool(done)

        async def wait_empty(self) -> None:
            await super().wait_empty()
            # Faust closes the tables now, and then wants to commit once more.
            self._over = self.app.should_stop

        async def on_partitions_revoked(self, revoked: set[TP]) -> None:
            await super().on_partitions_revoked(revoked)
            for partition in _of_topic(revoked, clicks_topic):
                worker.let_go(partition)
            type(self).owned -= _of_topic(revoked, clicks_topic)

        async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
            await super().on_partitions_assigned(assigned, generation_id)
            type(self).owned = _of_topic(assigned, clicks_topic)
            log.info("partitions: %s", ", ".join(map(str, sorted(self.owned))) or "none")

    return ClickConsumer


def _of_topic(places: Iterable[TP], topic: str) -> frozenset[int]:
    return frozenset(place.partition for place in places if place.topic == topic)


class _QuietMonitor(faust.Monitor):  # type: ignore[misc]
    """Faust's own metrics take time for every record, and nobody reads them: ours are Prometheus's."""

    logger = logging.getLogger("faust.clicks")

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    on_message_in = on_message_out = on_stream_event_in = on_stream_event_out = _nothing
    on_topic_buffer_full = track_tp_end_offset = _nothing


def _recovered(app: faust.App) -> int:
    recovery = app.tables._recovery  # noqa: SLF001 - the property would make one, in the wrong thread
    return sum(offset or 0 for offset in list(recovery.active_offsets.values())) if recovery is not None else 0


def _serve_metrics(settings: Settings) -> None:
    host, port = settings.operations.host, settings.streams.port
    if port:
        try:
            start_http_server(port, host)
        except OSError as error:
            raise WorkerError(
                f"streams.port (NOTELLM_STREAMS_PORT): cannot listen on {host}, port {port}: {error.strerror}; choose "
                "another port, or 0 to go without /metrics"
            ) from None


def _own_folder(folder: Path) -> Any:
    """An open file; while it is open, no other worker uses the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise WorkerError(f"streams.data: {folder}: cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise WorkerError(f"streams.data: {folder}: another worker uses it; each needs a folder of its own") from None
    return lock


def _end(status: int, why: str) -> None:
    """At once: no destructor, no handler and no task of Faust's gets to commit anything."""
    log.critical("%s; ending with status %d", why, status)
    logging.shutdown()
    os._exit(status)


def _log_to_console(*, verbose: bool) -> None:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    if not verbose:
        for name in ("faust", "mode", "aiokafka"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # librdkafka's own lines repeat what we already say, once per retry.
        logging.getLogger("streams.librdkafka").setLevel(logging.ERROR)


if __name__ == "__main__":
    typer.run(main)
