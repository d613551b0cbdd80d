"""``notellm demo --clicks``: from made-up clicks to training pairs, on a real Kafka, and judged at the end."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from confluent_kafka import Consumer, KafkaException, TopicPartition
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from commands.click_simulation import KINDS, Kind, Plan, simulate_clicks
from commands.console import err, fail, out
from commands.demo_clicks_check import Expected, expect
from commands.demo_kafka import demo_clicks_kafka
from commands.pairs_show import show_note
from commands.server_process import ServerProcess
from commands.simulate import Truth, publish_clicks, read_truth, truth_file
from consumers.kafka_client import client_properties, make_client
from notellm.errors import NoteLLMError
from notellm.messages import Note
from notellm.note_file import read_notes
from notellm.settings import Settings, load_settings, variable_names
from streams.report import report_path
from streams.rules import DAY_MS
from streams.snapshot import Snapshot, latest_snapshot
from streams.snapshot_queries import hubs, questions

__all__ = ["demo_clicks"]

_STREAMS_PYTHON = Path(".venv-streams/bin/python")
_USERS, _CLICKS, _DAYS, _FORGETS = 1_000, 20_000, 7, 5
_UNIT = 10**12
_PATIENCE_S = 300.0
_LOOK_S = 0.2
_ANSWER_S = 10.0
_PARTNERS_SHOWN = 5
_LOOKED_AT = 20


def demo_clicks(notes_file: Path, work: Path, kafka: str | None) -> None:
    """Simulate, keep, refresh, show, and check. What is in ``work`` goes first.

    Raises :class:`NoteLLMError` where something is missing, and ends with exit status 1 where the check fails.
    """
    python = _python_with_faust()
    notes = read_notes(notes_file, published_at=0)
    shutil.rmtree(work, ignore_errors=True)
    end_ms = time.time_ns() // 1_000_000
    with demo_clicks_kafka(kafka, work / "kafka") as flags:
        settings = load_settings(None, {**flags, "streams.data": work / "worker", "streams.port": 0})
        plan = Plan(
            users=_USERS,
            clicks=_CLICKS,
            forgets=_FORGETS,
            start_ms=end_ms - _DAYS * DAY_MS,
            end_ms=end_ms,
            allowed_lateness_ms=settings.streams.allowed_lateness_s * 1000,
            future_tolerance_ms=settings.streams.future_tolerance_s * 1000,
        )
        begun = time.monotonic()
        with _worker(python, settings, work / "worker.log") as worker:
            truth = _publish(notes, plan, settings, work / "truth.jsonl")
            _wait_until_kept(settings, worker, len(truth))
        kept_s = time.monotonic() - begun
        dead_letters = _count(settings, settings.streams.dead_letter_topic)
        snapshot = _refresh(settings, notes_file, work / "snapshots", end_ms)
    expected = expect(truth, plan.start_ms, plan.end_ms, settings.streams.clicks_per_day)
    counts = Counter(line.kind for line in truth)
    faults = _faults(snapshot, expected)
    if dead_letters != counts["broken"]:
        faults.append(f"{dead_letters} dead letters, {counts['broken']} broken records were published")
    with questions({"the": snapshot}) as connection:
        popular = [hub for hub in hubs(connection, _LOOKED_AT) if hub.title]  # people like to see titles
    if popular:
        out.print(f"[bold]$ notellm pairs show {popular[0].note_id} --snapshot {work / 'snapshots'}[/]")
        show_note(snapshot, popular[0].note_id, _PARTNERS_SHOWN)
    _conclude(snapshot, expected, counts, dead_letters, kept_s)
    if faults:
        fail("\n".join(faults))
    out.print(
        f"[green]Every click that counts is in the snapshot, and every pair is as the formula says.[/] {snapshot.path}"
    )


def _python_with_faust() -> Path:
    if importlib.util.find_spec("faust") is not None:
        return Path(sys.executable)
    if _STREAMS_PYTHON.is_file():
        return _STREAMS_PYTHON
    raise NoteLLMError(f"{_STREAMS_PYTHON} is not there, which has the Faust app; make it with: make streams")


class _Worker(ServerProcess):
    """The Faust app, as ``python -m streams.app`` starts it."""

    def __init__(self, python: Path, settings: Settings, log: Path) -> None:
        super().__init__("the Faust worker", log)
        self._command: list[str | Path] = [python, "-m", "streams.app"]
        self._environment = {**os.environ, **_as_variables(settings)}

    def start(self) -> None:
        self._run(self._command, lambda: True, env=self._environment)

    def check(self) -> None:
        """Raises :class:`NoteLLMError`, with the end of its log, when it has ended."""
        if not self.is_running:
            raise NoteLLMError(f"{self.name} has ended; the end of {self.log}:\n{self.end_of_log()}")


@contextmanager
def _worker(python: Path, settings: Settings, log: Path) -> Iterator[_Worker]:
    worker = _Worker(python, settings, log)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()


def _as_variables(settings: Settings) -> dict[str, str]:
    """What the demo has chosen, for the processes that it starts; all else they read as it has."""
    chosen = {
        "kafka.bootstrap_servers": settings.kafka.bootstrap_servers,
        "streams.clicks_topic": settings.streams.clicks_topic,
        "streams.dead_letter_topic": settings.streams.dead_letter_topic,
        "streams.app_id": settings.streams.app_id,
        "streams.data": str(settings.streams.data),
        "streams.port": str(settings.streams.port),
    }
    names = variable_names()
    return {names[setting]: value for setting, value in chosen.items()}


def _publish(notes: Sequence[Note], plan: Plan, settings: Settings, truth: Path) -> list[Truth]:
    """In the order of each partition, so of each user."""
    with err.status(f"publishing {plan.clicks:,} clicks, and what comes on top"), truth_file(truth) as tell:
        publish_clicks(simulate_clicks(notes, plan), settings, tell)
    return sorted(read_truth(truth), key=lambda line: (line.partition, line.offset))


def _wait_until_kept(settings: Settings, worker: _Worker, records: int) -> None:
    """Until the worker has committed every record."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    deadline = time.monotonic() + _PATIENCE_S
    with closing(_Offsets(settings)) as offsets, Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("records kept by the Faust worker", total=records)
        while (done := offsets.committed()) < records:
            worker.check()
            if time.monotonic() > deadline:
                raise NoteLLMError(f"{worker.name} has kept {done} of {records} records in {_PATIENCE_S:.0f} s")
            progress.update(task, completed=done)
            time.sleep(_LOOK_S)


class _Offsets:
    """What the worker's group has committed, asked by a consumer that never joins it.

    Not by the admin client, whose list_consumer_group_offsets crashes librdkafka 2.16.1 while a group comes together.
    """

    def __init__(self, settings: Settings) -> None:
        properties = {**client_properties(settings.kafka), "group.id": settings.streams.app_id}
        self._consumer = make_client(Consumer, properties)
        self._places = _places(self._consumer, settings.streams.clicks_topic)

    def committed(self) -> int:
        try:
            found = self._consumer.committed(self._places, timeout=_ANSWER_S)
        except KafkaException:
            return 0  # the group is coming together
        return sum(max(each.offset, 0) for each in found)

    def close(self) -> None:
        self._consumer.close()


def _count(settings: Settings, topic: str) -> int:
    """Records of a topic that nobody has deleted from."""
    consumer = make_client(Consumer, {**client_properties(settings.kafka), "group.id": settings.streams.app_id})
    with closing(consumer):
        places = _places(consumer, topic)
        return sum(consumer.get_watermark_offsets(place, timeout=_ANSWER_S)[1] for place in places)


def _places(consumer: Consumer, topic: str) -> list[TopicPartition]:
    try:
        found = consumer.list_topics(topic, timeout=_ANSWER_S).topics[topic].partitions
    except KafkaException as error:
        raise NoteLLMError(f"--kafka: {error.args[0].str()}") from None
    return [TopicPartition(topic, partition) for partition in found]


def _refresh(settings: Settings, notes_file: Path, out_folder: Path, end_ms: int) -> Snapshot:
    """As a person would type it."""
    typed = ["pairs", "refresh", "--kafka", settings.kafka.bootstrap_servers, "--notes", str(notes_file)]
    typed += ["--out", str(out_folder), "--window", f"{_DAYS}d", "--as-of", str(end_ms)]
    out.print(f"[bold]$ notellm {shlex.join(typed)}[/]", highlight=False)
    done = subprocess.run(
        [sys.executable, "-m", "commands", *typed], env={**os.environ, **_as_variables(settings)}, check=False
    )
    if done.returncode:
        fail("the refresh failed; see above")
    return latest_snapshot(out_folder)


def _faults(snapshot: Snapshot, expected: Expected) -> list[str]:
    """What the snapshot says, and what it holds, against what was published."""
    s = snapshot.statistics
    faults = [
        f"the snapshot counts {said:,} {what}, the published records make {right:,}"
        for what, said, right in (("clicks", s.clicks, expected.clicks), ("users", s.users, expected.users))
        if said != right
    ]
    with questions({"the": snapshot}) as connection:
        rows = connection.execute("SELECT source_id, target_id, score, users, rank FROM the_pairs").fetchall()
    found = {(source, target): (score, users, rank) for source, target, score, users, rank in rows}
    right_pairs = {pair: (units / _UNIT, users, rank) for pair, (units, users, rank) in expected.pairs.items()}
    wrong = sorted(pair for pair in found.keys() | right_pairs.keys() if found.get(pair) != right_pairs.get(pair))
    if wrong:
        pair = wrong[0]
        faults.append(
            f"{len(wrong):,} pairs are not as the formula says; the first: {pair[0]} -> {pair[1]} is "
            f"{found.get(pair)}, it should be {right_pairs.get(pair)} (score, users, rank)"
        )
    return faults


def _conclude(snapshot: Snapshot, expected: Expected, counts: Counter[Kind], dead_letters: int, kept_s: float) -> None:
    table = Table("", "", title="from clicks to pairs", show_header=False)
    table.columns[1].justify = "right"
    for kind in KINDS:
        table.add_row(f"published: {kind}", f"{counts[kind]:,}")
    table.add_section()
    table.add_row("dead letters", f"{dead_letters:,}")
    table.add_row("clicks that count, by what was published", f"{expected.clicks:,}")
    table.add_row("clicks that count, by the snapshot", f"{snapshot.statistics.clicks:,}")
    table.add_row("pairs, by the formula", f"{len(expected.pairs):,}")
    table.add_row("pairs, in the snapshot", f"{snapshot.manifest.rows:,}")
    table.add_section()
    table.add_row("worker's start to its last commit", f"{kept_s:.1f} s")
    out.print(table)
    report = report_path(snapshot)
    if report.is_file():
        out.print(f"the report, with pictures: {report}", highlight=False)
