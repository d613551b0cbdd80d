"""``notellm simulate clicks``: made-up people click on notes, for demos and for load."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, BinaryIO, TypeAlias

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from commands.click_simulation import KINDS, Kind, Plan, SimulatedRecord, simulate_clicks
from commands.console import err, out
from commands.moments import parse_moment, say_moment
from commands.options import ConfigOption, KafkaOption, settings_from
from commands.publisher import RecordPublisher
from notellm.errors import NoteLLMError
from notellm.note_file import read_notes
from notellm.settings import Settings
from streams.rules import DAY_MS

__all__ = ["Tell", "Truth", "publish_clicks", "read_truth", "simulate_app", "truth_file"]

simulate_app = typer.Typer(name="simulate", help="Make up what people would do.", no_args_is_help=True)

# The record, and the partition and offset that it has now.
Tell: TypeAlias = Callable[[SimulatedRecord, int, int], None]

_STEP = 500


class Truth(msgspec.Struct, frozen=True):
    """One line of ``--truth``: a record, what it is, and where Kafka put it (-1 where it went nowhere)."""

    kind: Kind
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    partition: int = -1
    offset: int = -1


@simulate_app.callback()
def simulate() -> None:
    """Make up what people would do."""


@simulate_app.command("clicks")
def simulate_clicks_command(
    notes: Annotated[Path, typer.Option(help="The notes to click on, JSON Lines.", envvar="NOTELLM_CLI_NOTES")] = Path(
        "data/notes.jsonl"
    ),
    clicks: Annotated[
        int,
        typer.Option(
            min=1, max=10**9, help="Clicks of people; all else comes on top.", envvar="NOTELLM_CLI_SIMULATE_CLICKS"
        ),
    ] = 20_000,
    users: Annotated[int, typer.Option(min=1, max=10**8, help="People.", envvar="NOTELLM_CLI_SIMULATE_USERS")] = 1_000,
    days: Annotated[
        int, typer.Option(min=1, max=3650, help="How long it lasts.", envvar="NOTELLM_CLI_SIMULATE_DAYS")
    ] = 7,
    as_of: Annotated[
        str | None,
        typer.Option(
            help="When it ends: now (the default), ms UTC, or a date.",
            envvar="NOTELLM_CLI_SIMULATE_AS_OF",
            show_default=False,
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="When it begins, instead of --as-of.", envvar="NOTELLM_CLI_SIMULATE_START", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Another one, other clicks.", envvar="NOTELLM_CLI_SIMULATE_SEED")
    ] = 0,
    bots: Annotated[
        int,
        typer.Option(min=0, max=10**6, help="Users of 300 to 900 clicks a day.", envvar="NOTELLM_CLI_SIMULATE_BOTS"),
    ] = 1,
    forgets: Annotated[
        int,
        typer.Option(min=0, max=10**8, help="Users to be forgotten on the way.", envvar="NOTELLM_CLI_SIMULATE_FORGETS"),
    ] = 0,
    late: Annotated[
        float, typer.Option(min=0, max=1, help="Late clicks, for each click.", envvar="NOTELLM_CLI_SIMULATE_LATE")
    ] = 0.01,
    future: Annotated[
        float,
        typer.Option(min=0, max=1, help="Clicks of the future, for each click.", envvar="NOTELLM_CLI_SIMULATE_FUTURE"),
    ] = 0.002,
    doubled: Annotated[
        float,
        typer.Option(min=0, max=1, help="Records sent again, for each click.", envvar="NOTELLM_CLI_SIMULATE_DOUBLED"),
    ] = 0.02,
    broken: Annotated[
        float, typer.Option(min=0, max=1, help="Broken records, for each click.", envvar="NOTELLM_CLI_SIMULATE_BROKEN")
    ] = 0.002,
    rate: Annotated[
        float,
        typer.Option(
            min=0, max=10**7, help="Records per second; 0 is as fast as it goes.", envvar="NOTELLM_CLI_SIMULATE_RATE"
        ),
    ] = 0.0,
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Instead of Kafka: a file for 'notellm pairs refresh --clicks'. It gets the clicks of people and "
            "bots, and nothing else.",
            envvar="NOTELLM_CLI_SIMULATE_OUT",
            show_default=False,
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            help="Also write what each record is, a line of JSON each (key and value in base64).",
            envvar="NOTELLM_CLI_SIMULATE_TRUTH",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    kafka: KafkaOption = None,
) -> None:
    """Make up people who click on notes, and publish their clicks to the topic of clicks, or write them to a file.

    Activity is long-tailed; users come back in sessions about what interests them, and interests drift from day to day.
    Bots, late, doubled and broken records, clicks of the future and forgets come on top. The same seed, notes, options
    and --as-of give the same records, byte for byte. Timestamps are those of the made-up time, so the topic must have
    message.timestamp.type=CreateTime, which is Kafka's default, and keep records for longer than --days.

    \b
    Examples:
      notellm simulate clicks --kafka 127.0.0.1:9092
      notellm simulate clicks --users 50000 --clicks 1000000 --seed 7 --out build/clicks.jsonl
      notellm simulate clicks --as-of 2026-11-24 --forgets 5 --rate 500 --truth build/truth.jsonl
    """  # noqa: D301 - the \\b is meant: it keeps the lines of the examples apart
    logging.getLogger("consumers.librdkafka").setLevel(logging.ERROR)  # what it tries again is no news
    settings = settings_from(config, kafka=kafka)
    begin, end = _stretch(as_of, start, days)
    plan = Plan(
        users=users,
        clicks=clicks,
        start_ms=begin,
        end_ms=end,
        seed=seed,
        bots=bots,
        forgets=forgets,
        late=late,
        future=future,
        doubled=doubled,
        broken=broken,
        allowed_lateness_ms=settings.streams.allowed_lateness_s * 1000,
        future_tolerance_ms=settings.streams.future_tolerance_s * 1000,
    )
    records = simulate_clicks(read_notes(notes, published_at=0), plan)
    counts: Counter[Kind] = Counter()
    begun = time.monotonic()
    with ExitStack() as stack:
        tell = stack.enter_context(truth_file(truth)) if truth is not None else None
        shown = _paced(stack.enter_context(_on_screen(records, plan, counts)), rate)
        if out_file is not None:
            _write_clicks(shown, stack.enter_context(_written(out_file, "--out")), tell)
            where = str(out_file)
        else:
            publish_clicks(shown, settings, tell)
            where = f"{settings.streams.clicks_topic} on {settings.kafka.bootstrap_servers}"
    _conclude(counts, plan, where, time.monotonic() - begun)
    if out_file is not None:
        out.print(
            "in the file: the clicks of people and bots, each once; what is wrong with the others only a topic has"
        )


def publish_clicks(records: Iterable[SimulatedRecord], settings: Settings, tell: Tell | None = None) -> None:
    """Publish all, in order; returns once Kafka has them. Raises :class:`NoteLLMError`."""
    publisher = RecordPublisher(settings.kafka, settings.streams.clicks_topic)
    for record in records:
        delivered = None if tell is None else partial(tell, record)
        publisher.publish(record.key, record.value, delivered, timestamp_ms=record.timestamp_ms)
    publisher.flush()


@contextmanager
def truth_file(file: Path) -> Iterator[Tell]:
    """A function that writes lines of :class:`Truth`."""
    with _written(file, "--truth") as stream:

        def tell(record: SimulatedRecord, partition: int, offset: int) -> None:
            line = Truth(record.kind, record.timestamp_ms, record.key, record.value, partition, offset)
            stream.write(msgspec.json.encode(line) + b"\n")

        yield tell


def read_truth(file: Path) -> Iterator[Truth]:
    """In the order of delivery; that of a user's records is their offsets'."""
    decoder = msgspec.json.Decoder(Truth)
    with file.open("rb") as stream:
        for line in stream:
            yield decoder.decode(line)


def _stretch(as_of: str | None, start: str | None, days: int) -> tuple[int, int]:
    if start is None:
        end = parse_moment(as_of or "now", "--as-of")
        begin = end - days * DAY_MS
    elif as_of is None:
        begin = parse_moment(start, "--start")
        end = begin + days * DAY_MS
    else:
        raise NoteLLMError("--start: with --as-of there is one too many; --days says how far apart the two are")
    if begin < 0:
        raise NoteLLMError(f"--days: {days} days before {say_moment(end)} is before 1970")
    return begin, end


def _write_clicks(records: Iterable[SimulatedRecord], stream: BinaryIO, tell: Tell | None) -> None:
    for record in records:
        if record.kind in ("click", "bot") and record.value is not None:
            stream.write(record.value + b"\n")
        if tell is not None:
            tell(record, -1, -1)


@contextmanager
def _written(file: Path, option: str) -> Iterator[BinaryIO]:
    """There once it is whole, and not before."""
    partial_file = file.with_name(f"{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial_file.open("wb") as stream:
            yield stream
        partial_file.replace(file)
    except OSError as error:
        raise NoteLLMError(f"{option}: {file} cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            partial_file.unlink()


@contextmanager
def _on_screen(
    records: Iterable[SimulatedRecord], plan: Plan, counts: Counter[Kind]
) -> Iterator[Iterator[SimulatedRecord]]:
    """The same records, counted, with a progress bar that counts the clicks of people."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("clicks of people", total=plan.clicks)

        def counted() -> Iterator[SimulatedRecord]:
            for record in records:
                counts[record.kind] += 1
                if record.kind == "click" and counts["click"] % _STEP == 0:
                    progress.update(task, completed=counts["click"])
                yield record

        yield counted()


def _paced(records: Iterator[SimulatedRecord], rate: float) -> Iterator[SimulatedRecord]:
    begun = time.monotonic()
    for number, record in enumerate(records):
        if rate:
            time.sleep(max(begun + number / rate - time.monotonic(), 0.0))
        yield record


def _conclude(counts: Counter[Kind], plan: Plan, where: str, seconds: float) -> None:
    table = Table("kind", "records", "what it is", title=f"simulated clicks: {where}")
    table.columns[1].justify = "right"
    for kind, meaning in KINDS.items():
        table.add_row(kind, f"{counts[kind]:,}", meaning)
    table.add_section()
    table.add_row("all", f"{counts.total():,}", f"{counts.total() / max(seconds, 1e-9):,.0f} records/s")
    out.print(table)
    out.print(
        f"{say_moment(plan.start_ms)} to {say_moment(plan.end_ms)}, seed {plan.seed}; "
        f"the same again: --seed {plan.seed} --as-of {plan.end_ms}",
        highlight=False,
    )
