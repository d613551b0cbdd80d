"""``notellm demo``: the main job, from end to end, on this machine, and judged at the end; or that of clicks."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread
from typing import Annotated, Any

import msgspec
import typer
from pymilvus import MilvusClient
from rich.table import Table

from commands.checker import Verdict
from commands.console import err, fail, out
from commands.demo_clicks import demo_clicks
from commands.demo_kafka import demo_kafka
from commands.demo_metrics import held_out_metrics
from commands.demo_progress import DemoProgress, on_screen, percentiles
from commands.demo_script import FEWEST_NOTES, Publication, demo_script
from commands.embedded import MilvusLite
from commands.encoders import open_encoder
from commands.ledger import Ledger
from commands.publisher import NotePublisher
from consumers.protocols import Encoder
from consumers.service import updater_service
from notellm.bundle import Manifest, read_manifest
from notellm.errors import NoteLLMError
from notellm.messages import Note, NoteRecord, parse_record
from notellm.note_file import read_notes
from notellm.settings import Settings, load_settings

__all__ = ["demo"]

MODEL = Path("models/smollm2-notellm")
_IDLE_NOTES = 50
_IDLE_TOKENS = 128
_PATIENCE_S = 1800.0


def demo(
    notes: Annotated[Path, typer.Option(help="The notes to publish, JSON Lines.", envvar="NOTELLM_CLI_NOTES")] = Path(
        "data/notes.jsonl"
    ),
    bundle: Annotated[
        Path,
        typer.Option(
            help="The bundle; exported from models/smollm2-notellm where it is not there.",
            envvar="NOTELLM_ENCODER_BUNDLE",
        ),
    ] = Path("build/bundles/default"),
    work: Annotated[
        Path, typer.Option(help="Milvus's data, the ledger and report.json.", envvar="NOTELLM_CLI_WORK")
    ] = Path("build/demo"),
    kafka: Annotated[
        str | None,
        typer.Option(
            "--kafka",
            help="A Kafka of yours, host:port, instead of the embedded one; the demo makes two topics of its own "
            "there, and deletes them at the end.",
            envvar="NOTELLM_CLI_KAFKA",
            show_default=False,
        ),
    ] = None,
    clicks: Annotated[
        bool,
        typer.Option(
            "--clicks",
            help="Show the way of clicks instead: made-up clicks, the Faust app, a snapshot of training pairs, in "
            "WORK/clicks. It takes a real Kafka: --kafka, or Java and the jars that 'make servers' fetches.",
            envvar="NOTELLM_CLI_DEMO_CLICKS",
        ),
    ] = False,
) -> None:
    """Publish notes through an embedded Kafka, watch them become searchable in an embedded Milvus, and check every one.

    Exit status 1 if a note is lost, stale or resurrected, or the dead letters are not exactly the broken records.
    With --clicks: if a click that counts is missing, or a pair is not as the formula says.

    \b
    Examples:
      notellm demo
      notellm demo --notes data/kuairec/notes.jsonl
      notellm demo --kafka 127.0.0.1:9092
      notellm demo --clicks
    """  # noqa: D301 - the \\b is meant: it keeps the lines of the examples apart
    logging.getLogger("consumers").setLevel(logging.ERROR)
    if clicks:
        demo_clicks(notes, work / "clicks", kafka)
        return
    _export_once(bundle)
    script = demo_script(_read(notes))
    shutil.rmtree(work, ignore_errors=True)
    milvus = MilvusLite(work / "milvus", log=work / "milvus.log")
    with demo_kafka(kafka) as flags:
        milvus.start()
        try:
            settings = load_settings(None, {**flags, "milvus.uri": milvus.uri, "encoder.bundle": bundle})
            progress, idle = _run(settings, script, work / "ledger.jsonl")
            _show_neighbours(settings, read_manifest(bundle))
            verdict = _judge(settings, work)
        finally:
            milvus.stop()
    held_out = held_out_metrics(settings.encoder, notes, notes.with_name("split.json"))
    report = {**_report(script, progress, idle, verdict), "held_out": held_out}
    (work / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    _conclude(report, verdict, work)


def _export_once(bundle: Path) -> None:
    if (bundle / "notellm.json").is_file():
        return
    err.print(f"no bundle at {bundle} yet: exporting {MODEL}, once (about 3 minutes)", highlight=False)
    # In a process of its own: what torch needs of memory goes back before the demo begins.
    script = Path(__file__).resolve().parent.parent / "export" / "to_onnx.py"
    done = subprocess.run([sys.executable, str(script), "--model", str(MODEL), "--out", str(bundle)], check=False)
    if done.returncode:
        fail("the export failed; see above")


def _read(file: Path) -> list[Note]:
    notes = read_notes(file, published_at=int(time.time() * 1000))
    if len(notes) < FEWEST_NOTES:
        raise NoteLLMError(f"--notes: {file} holds {len(notes)} notes; the demo needs {FEWEST_NOTES} or more")
    return notes


def _run(settings: Settings, script: list[Publication], ledger_file: Path) -> tuple[DemoProgress, DemoProgress]:
    """Everything between the first record and the last acknowledgement. Returns what was seen under load and idle."""
    watched = _Switch()
    ledger = Ledger(ledger_file, settings.kafka.notes_topic)
    publisher = NotePublisher(settings.kafka)
    with _loaded(settings) as encoder:
        # Now, as an encoder answers one thread at a time, and the updater's is about to be that one.
        short = _short_notes(script, encoder)
        with updater_service(settings, encoder, watched) as updater, _in_background(updater.run, updater.stop) as check:
            load = watched.turn()
            with on_screen(load, err):
                for publication in script:
                    _publish(publisher, ledger, publication)
                    load.published += 1
                    if load.published % 50 == 0:
                        check()
                publisher.flush()
                _wait(lambda: load.settled_count >= sum(not one.broken for one in script), check)
            load.finish()
            idle = watched.turn()
            with on_screen(idle, err):
                for number, note in enumerate(short):
                    again = msgspec.structs.replace(note, note_id=f"idle-{number:03d}")
                    _publish(publisher, ledger, Publication(again.note_id.encode(), msgspec.json.encode(again)))
                    idle.published += 1
                    publisher.flush()
                    _wait(lambda done=number + 1: idle.settled_count >= done, check)  # type: ignore[misc]
            idle.finish()
    ledger.close()
    return load, idle


@contextmanager
def _loaded(settings: Settings) -> Iterator[Encoder]:
    with ExitStack() as stack:
        with err.status("loading the model"):
            encoder = stack.enter_context(open_encoder(settings.encoder))
        yield encoder


class _Switch:
    """An observer that hands on to the phase that is running."""

    def __init__(self) -> None:
        self.now = DemoProgress()

    def turn(self) -> DemoProgress:
        self.now = DemoProgress()
        return self.now

    def searchable(self, change: Any, freshness_ms: float) -> None:
        self.now.searchable(change, freshness_ms)

    def settled(self, change: Any) -> None:
        self.now.settled(change)


def _publish(publisher: NotePublisher, ledger: Ledger, publication: Publication) -> None:
    def delivered(partition: int, offset: int) -> None:
        ledger.add(publication.key, publication.value, partition, offset, broken=publication.broken)

    publisher.publish(publication.key, publication.value, delivered)


def _short_notes(script: list[Publication], encoder: Encoder) -> list[Note]:
    """Whole notes of at most 128 tokens, prompt and all."""
    found: dict[str, Note] = {}
    for publication in script:
        if publication.value is None or publication.broken or publication.key is None:
            continue
        record = parse_record(publication.key, publication.value, 0)
        assert isinstance(record, NoteRecord)
        found.setdefault(record.note.note_id, record.note)
    prompts = zip(found.values(), encoder.build_prompts(list(found.values())), strict=True)
    return [note for note, prompt in prompts if len(prompt.ids) <= _IDLE_TOKENS][:_IDLE_NOTES]


@contextmanager
def _in_background(run: Callable[[], None], stop: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Run the updater in a thread; yields a function that raises what has ended it, if anything has."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as error:  # noqa: BLE001 - raised again, in the main thread
            failures.append(error)

    def check() -> None:
        if failures:
            raise failures[0]

    thread = Thread(target=guarded, name="updater")
    thread.start()
    try:
        yield check
    finally:
        stop()
        thread.join()
    check()


def _wait(done: Callable[[], bool], check: Callable[[], None]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not done():
        check()
        if time.monotonic() > deadline:
            raise NoteLLMError(f"the updater has not finished within {_PATIENCE_S / 60:.0f} minutes")
        time.sleep(0.005)


def _show_neighbours(settings: Settings, manifest: Manifest) -> None:
    """A few notes, read as any reader would: a plain client, through the alias."""
    client = MilvusClient(settings.milvus.uri, timeout=settings.milvus.timeout_s)
    alias = settings.milvus.alias
    fields = ["note_id", "title", "category", "generated_hashtags", "generated_category", "embedding"]
    rows: list[dict[str, Any]] = []
    for category in manifest.categories[::4]:
        rows += client.query(alias, filter=f'category == "{category}" and title != ""', output_fields=fields, limit=1)
    table = Table(
        "note", "generated hashtags", "generated category", "five nearest notes", title="what Milvus shows now"
    )
    for row in rows:
        others = f'note_id != "{row["note_id"]}" and not (note_id like "idle-%")'
        hits = client.search(alias, data=[list(row["embedding"])], filter=others, limit=5, output_fields=["title"])[0]
        nearest = "\n".join(f"{hit.distance:.3f} {hit.id} {hit.get('title')}" for hit in hits)
        note = f"{row['note_id']}\n{row['title'][:40]}"
        table.add_row(note, ", ".join(row["generated_hashtags"]), row["generated_category"], nearest)
    client.close()
    out.print(table)
    if manifest.projection == "identity":
        out.print(
            "[yellow]The base is untrained:[/] its neighbours and tags show that the system works, "
            "not what NoteLLM can do."
        )


def _judge(settings: Settings, work: Path) -> Verdict:
    """The checker runs in a process of its own, and knows the updater only by what it left behind."""
    verdict = work / "verdict.json"
    command = [sys.executable, "-m", "commands.checker", "--ledger", work / "ledger.jsonl", "--out", verdict]
    command += ["--milvus", settings.milvus.uri, "--kafka", settings.kafka.bootstrap_servers]
    command += ["--bundle", settings.encoder.bundle, "--alias", settings.milvus.alias]
    command += ["--dead-letter-topic", settings.kafka.dead_letter_topic]
    with err.status("checking every note against the ledger"):
        subprocess.run(list(map(str, command)), check=False)
    if not verdict.is_file():
        raise NoteLLMError("the checker itself failed; see above")
    return msgspec.json.decode(verdict.read_bytes(), type=Verdict)


def _report(script: list[Publication], load: DemoProgress, idle: DemoProgress, verdict: Verdict) -> dict[str, Any]:
    under_load, alone = percentiles(load.freshness_ms), percentiles(idle.freshness_ms)
    return {
        "published": len(script) + idle.published,
        "live": verdict.live,
        "searchable": verdict.searchable,
        "deleted": verdict.deleted,
        "dead_letters": verdict.dead_letters,
        "lost": verdict.lost,
        "stale": verdict.stale,
        "resurrected": verdict.resurrected,
        "wrong_vectors": verdict.wrong_vectors,
        "notes_per_s": round(load.notes_per_s(), 2),
        "freshness_ms": {"p50": round(under_load[0]), "p99": round(under_load[1])},
        "idle_freshness_ms": {"p50": round(alone[0]), "p99": round(alone[1])},
        "model_version": verdict.model_version,
        "machine": f"{os.cpu_count()} x {_processor()}, {platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _conclude(report: dict[str, Any], verdict: Verdict, work: Path) -> None:
    table = Table("", "", title=f"{work}/report.json", show_header=False)
    for name, value in report.items():
        if name == "held_out":
            continue  # shown as a table of its own
        shown = f"p50 {value['p50']} ms, p99 {value['p99']} ms" if isinstance(value, dict) else str(value)
        table.add_row(name, shown)
    out.print(table)
    if not verdict.good:
        fail(f"the checker found {len(verdict.faults)} faults; the first: {verdict.faults[0]}")
    out.print("[green]Every note is there as it was last published, and nothing else is.[/]")
