"""``notellm pairs``: training pairs from what people click one after another."""

from __future__ import annotations

import logging
import signal
import threading
import time
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from commands.console import err, fail, log_to_console, out
from commands.moments import parse_moment, say_moment
from commands.options import ConfigOption, KafkaOption, settings_from
from commands.pairs_diff import diff
from commands.pairs_report import report
from commands.pairs_show import show
from notellm.errors import NoteLLMError
from streams.cooccurrence import PairOptions
from streams.errors import EngineError
from streams.schedule import beats, parse_every
from streams.snapshot import Snapshot

if TYPE_CHECKING:
    from streams.refresh import Refresh

__all__ = ["pairs_app", "refresh"]

DEFAULT_OUT = Path("build/snapshots")
NOTES_TOPIC = "topic"

pairs_app = typer.Typer(
    name="pairs", help="Training pairs from what people click one after another.", no_args_is_help=True
)

for command in (show, diff, report):
    pairs_app.command()(command)


class ClickSource(StrEnum):
    changelog = "changelog"
    topic = "topic"


class EngineName(StrEnum):
    duckdb = "duckdb"
    spark = "spark"


class _Stopped(BaseException):
    """Somebody asked us to end: SIGTERM or Ctrl-C."""


@pairs_app.command()
def refresh(
    context: typer.Context,
    clicks: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file of clicks, JSON Lines or Parquet; may be repeated. Without one they come from Kafka.",
            envvar="NOTELLM_CLI_CLICKS",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        ClickSource,
        typer.Option(
            help="What to read in Kafka: the table that the click app keeps, by its changelog, or the raw topic.",
            envvar="NOTELLM_CLI_SOURCE",
        ),
    ] = ClickSource.changelog,
    notes: Annotated[
        str | None,
        typer.Option(
            help="A file of notes, JSON Lines, or 'topic': the topic of notes in Kafka, which clicks from Kafka take "
            "by default.",
            envvar="NOTELLM_CLI_NOTES",
            show_default=False,
        ),
    ] = None,
    out_folder: Annotated[
        Path, typer.Option("--out", help="The folder of all snapshots.", envvar="NOTELLM_CLI_OUT")
    ] = DEFAULT_OUT,
    window: Annotated[
        str, typer.Option(help="How long before --as-of it begins: 7d, 24h, 90m, or all.", envvar="NOTELLM_CLI_WINDOW")
    ] = "7d",
    as_of: Annotated[
        str,
        typer.Option(
            help="The window's end, which is not in it: now, milliseconds UTC, or a date as ISO 8601 has it.",
            envvar="NOTELLM_CLI_AS_OF",
        ),
    ] = "now",
    every: Annotated[
        str | None,
        typer.Option(
            help="Go on, and refresh again every 30s, 15m, 1h or 1d; a run that fails is named, and the next is tried.",
            envvar="NOTELLM_CLI_EVERY",
            show_default=False,
        ),
    ] = None,
    min_score: Annotated[
        float, typer.Option(help="Pairs below it go.", envvar="NOTELLM_CLI_MIN_SCORE")
    ] = PairOptions().min_score,
    max_score: Annotated[
        float, typer.Option(help="Pairs above it go.", envvar="NOTELLM_CLI_MAX_SCORE")
    ] = PairOptions().max_score,
    top: Annotated[
        int, typer.Option(help="Partners of a note that stay, the best.", envvar="NOTELLM_CLI_TOP")
    ] = PairOptions().top,
    max_distance: Annotated[
        int | None,
        typer.Option(
            help="Count a pair only when so few clicks lie between: 1 is from one click to the next.",
            envvar="NOTELLM_CLI_MAX_DISTANCE",
            show_default=False,
        ),
    ] = None,
    session_gap: Annotated[
        str | None,
        typer.Option(
            help="Count a pair only within a session; a longer pause than this, such as 30m, begins a new one.",
            envvar="NOTELLM_CLI_SESSION_GAP",
            show_default=False,
        ),
    ] = None,
    symmetric: Annotated[
        bool,
        typer.Option("--symmetric", help="Add up both directions of a pair, for both.", envvar="NOTELLM_CLI_SYMMETRIC"),
    ] = False,
    max_notes_per_user: Annotated[
        int | None,
        typer.Option(
            help="Leave out users who clicked more notes in the window.",
            envvar="NOTELLM_CLI_MAX_NOTES_PER_USER",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        EngineName, typer.Option(help="duckdb on this machine, or spark.", envvar="NOTELLM_CLI_ENGINE")
    ] = EngineName.duckdb,
    spark_master: Annotated[
        str,
        typer.Option(
            help="Spark's master, such as spark://host:7077. All of its workers must reach --out by the same path.",
            envvar="NOTELLM_CLI_SPARK_MASTER",
        ),
    ] = "local[*]",
    memory_limit: Annotated[
        str,
        typer.Option(help="What the engine keeps in memory; the rest goes to disk.", envvar="NOTELLM_CLI_MEMORY_LIMIT"),
    ] = "4GB",
    threads: Annotated[
        int, typer.Option(min=0, max=1024, help="Threads of duckdb; 0: one per core.", envvar="NOTELLM_CLI_THREADS")
    ] = 0,
    keep: Annotated[int, typer.Option(min=1, help="Snapshots that stay, the newest.", envvar="NOTELLM_CLI_KEEP")] = 7,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait while another run writes to --out.", envvar="NOTELLM_CLI_WAIT")
    ] = False,
    config: ConfigOption = None,
    kafka: KafkaOption = None,
) -> None:
    """Make a snapshot of training pairs: which note people open after which.

    A snapshot is written whole or not at all. Its clicks have one source: the files of --clicks, or else Kafka.

    \b
    Examples:
      notellm pairs refresh --clicks clicks.jsonl --notes notes.jsonl --window all
      notellm pairs refresh --kafka 127.0.0.1:9092 --every 1h
      notellm pairs refresh --kafka 127.0.0.1:9092 --source topic --as-of 2026-11-24
      notellm pairs refresh --clicks clicks.parquet --notes notes.jsonl --engine spark
    """  # noqa: D301 - the \\b is meant: it keeps the lines of the examples apart
    refreshing = _job_module()
    if clicks and _is_typed(context, "kafka") and notes != NOTES_TOPIC:
        fail("--kafka and --clicks: clicks have one source; give one of the two, or --notes topic as well")
    if clicks and notes is None:
        fail(f"--notes: missing; give a file of notes as JSON Lines, or {NOTES_TOPIC!r} for the topic in Kafka")
    if every is not None and as_of != "now":
        fail(f"--as-of: {as_of!r} is not allowed with --every, where the window ends when a run begins")
    job = refreshing.Refresh(
        out=out_folder,
        clicks=tuple(clicks or ()),
        source=source.value,
        notes=None if notes in (None, NOTES_TOPIC) else Path(str(notes)),
        window=window,
        as_of=None if as_of == "now" else parse_moment(as_of, "--as-of"),
        options=PairOptions(
            min_score=min_score,
            max_score=max_score,
            top=top,
            max_distance=max_distance,
            session_gap_ms=None if session_gap is None else int(parse_every(session_gap, "--session-gap") * 1000),
            symmetric=symmetric,
            max_notes_per_user=max_notes_per_user,
        ),
        settings=settings_from(config, kafka=kafka),
        engine=engine.value,
        spark_master=spark_master,
        memory_limit=memory_limit,
        threads=threads,
        keep=keep,
        wait=wait,
    )
    refreshing.check(job)
    log_to_console()
    # What Kafka's client says of itself again and again, we say once.
    logging.getLogger("streams.librdkafka").setLevel(logging.CRITICAL)
    _Runs(job).go(None if every is None else parse_every(every))


class _Runs:
    """One run, or one after another, until it is done or somebody asks us to end."""

    def __init__(self, job: Refresh) -> None:
        self._job = job
        self._stop = threading.Event()

    def go(self, every_s: float | None) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            if every_s is None:
                self._run()
                return
            for _ in beats(every_s, self._stop):
                self._try()
        except BaseException:
            # In the middle of a query, DuckDB makes an error of its own of the signal.
            if not self._stop.is_set():
                raise
        if every_s is None:
            fail("stopped; no snapshot was written")
        err.print("stopped")

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        if not self._stop.is_set():
            self._stop.set()
            raise _Stopped

    def _try(self) -> None:
        try:
            self._run()
        except (NoteLLMError, OSError) as error:
            when = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
            line = "; ".join(str(error).splitlines())
            err.print(f"[red]{when}: this refresh failed:[/] {escape(line)}", highlight=False)

    def _run(self) -> None:
        begin = time.monotonic()
        with _progress() as bars:
            snapshot = _job_module().refresh(self._job, _Steps(bars))
        out.print(_summary(snapshot, time.monotonic() - begin))


class _Steps:
    """A bar for each step, as they come."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, step: str, share: float) -> None:
        if step not in self._tasks:
            self._tasks[step] = self._bars.add_task(step, total=1.0)
        self._bars.update(self._tasks[step], completed=share)


def _is_typed(context: typer.Context, name: str) -> bool:
    """Whether an option stands in the command line: its environment variable may be set for other commands."""
    found = context.get_parameter_source(name)
    return found is not None and found.name == "COMMANDLINE"


def _job_module() -> Any:
    """DuckDB and Arrow come with an extra, and all the other commands do without."""
    try:
        from streams import refresh as module  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise EngineError(f"{error.name} is not installed; install the extra: pip install 'notellm[pairs]'") from None
    return module


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


def _summary(snapshot: Snapshot, seconds: float) -> Table:
    found, window = snapshot.statistics, snapshot.manifest.window
    begin = "the beginning" if window.length == "all" else say_moment(window.start)
    table = Table(title=str(snapshot.path), title_justify="left", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right")
    table.add_column("", overflow="fold")
    dropped = ", ".join(f"{count:,} {rule.replace('_', ' ')}" for rule, count in found.dropped.items() if count)
    outside = f"below {snapshot.manifest.settings.min_score:g} or above {snapshot.manifest.settings.max_score:g}"
    for what, number, detail in (
        ("clicks", found.clicks, f"from {begin} to {say_moment(window.end)}"),
        ("dropped", sum(found.dropped.values()), dropped),
        ("users", found.users, ""),
        ("ordered pairs", found.ordered_pairs, ""),
        ("out of bounds", found.below_min + found.above_max, outside),
        ("pairs", found.pairs, f"the top {snapshot.manifest.settings.top} of {found.sources:,} notes"),
        (
            "live notes",
            found.notes.live,
            f"{found.new_notes.with_pair:,} of {found.new_notes.published:,} new ones paired",
        ),
        ("with deleted notes", found.pairs_with_deleted_notes, "pairs that training skips"),
    ):
        table.add_row(what, f"{number:,}", detail)
    engine = snapshot.manifest.engine
    table.caption = f"{seconds:.1f} s with {engine.name} {engine.version}"
    return table
