"""Does learning from pairs cost or help the writing? ``python -m benchmarks.generation --data FOLDER``.

Hashtags and, where notes have them, top-level categories of notes that were held back from all training: the full
model, generation only, the untrained base, and the hashtags of the nearest training note (TF-IDF). A folder with
clicks.jsonl learns from the formula's pairs; one without from *made* pairs of notes that share a rare hashtag.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.i2i.saved_runs import commit
from benchmarks.i2i.train_rows import DataFolder, Stopped, open_encoder
from benchmarks.training_options import changes_but_the_seed, check_rows, one_line_errors
from commands.moments import parse_moment
from commands.training_progress import TrainingProgress
from notellm.messages import Note, NoteRecord, parse_record
from notellm.settings import TrainingSettings
from training.base_model import SMOLLM2
from training.evaluation.evaluation import BASE, EvaluationData, Systems, evaluate
from training.evaluation.report import flat_report
from training.train import TrainingPlan, train
from training.training_data import DataFiles

RESULTS = Path("benchmarks/results/generation.json")
# Tags that say something of the platform, not of the note.
BOILERPLATE: Final = re.compile(
    "快手|热门|推广|官方|创作者|主播中心|正能量|商家号|高清视频|同城热点|今天拍点啥"
    "|summer ?(strike|smash|attack|blow|storm)|photosynthe|star plan|firefly|fast hands",
    re.IGNORECASE,
)
ROWS: Final[dict[str, dict[str, Any]]] = {"notellm": {}, "generation": {"contrastive": False}}
SHARED: Final[dict[str, Any]] = {
    "note_tokens": 96,
    "generative_weight": 1.0,
    "held_back": "all",
    "category_hashtags": 0.0,
    "hashtag_share": 0.5,
    "save_every": 100,
    "validate_every": 1_000_000,
}
_TAGGER: Final = "baselines.tfidf."
# Pairs of a hashtag that many notes share are no pairs.
_RARE: Final = 30
console = Console(stderr=True)


def main(
    data: Annotated[Path, typer.Option(help="A folder with notes.jsonl, and clicks.jsonl where there are any.")],
    train_end: Annotated[
        str | None, typer.Option(help="Clicks before this are learnt from: ms UTC, or ISO 8601. Default: all.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where the trainings go.")] = Path("build/generation"),
    row: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(ROWS)}.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting of training, name=value.")] = None,
    base: Annotated[str, typer.Option(help="smollm2, or a Hugging Face directory.")] = SMOLLM2,
    scored: Annotated[int, typer.Option(min=10, help="Held-out notes that are asked about.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the split and the training.")] = 0,
    results: Annotated[Path, typer.Option(help="The results' JSON.")] = RESULTS,
) -> None:
    """Train both ways, ask the held-out notes, and write the table.

    \b
    Examples:
      python -m benchmarks.generation --data build/i2i/microlens --train-end 1606220800000
      python -m benchmarks.generation --data ../shared/data/kuairec --set template=zh --row generation
    """  # noqa: D301 - the \\b is meant: it keeps the lines of the examples apart
    with one_line_errors(Stopped):
        check_rows(row or (), ROWS)
        changes = changes_but_the_seed(settings or ())
        end = 2**53 if train_end is None else parse_moment(train_end, "--train-end")
        notes = {note.note_id: note for note in _cleaned(data / "notes.jsonl")}
        folder = runs / f"{data.name}-{seed}"
        files, split = _write(folder, data, list(notes.values()), end, seed)
        categories = sorted({note.category for note in notes.values() if note.category}) or ["other"]
        asked = [notes[note_id] for note_id in split["held_out"]][:scored]
        question = EvaluationData(asked, asked, [notes[note_id] for note_id in split["train"]], categories)
        found = json.loads(results.read_text()) if results.exists() else {}
        of_data = found.setdefault(f"{data.name}-{seed}", {})
        for name in row or ROWS:
            chosen = TrainingSettings(**{**SHARED, **changes, **ROWS[name], "seed": seed})
            line = _train(folder / name, files, base, categories, chosen)
            of_data[name] = {**_ask(str(folder / name), question, baselines=False), **line}
        of_data[BASE] = _ask(base, question, baselines=True)
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    _show(f"{data.name}, {len(asked):,} held-out notes", of_data)


def _ask(source: str, question: EvaluationData, *, baselines: bool) -> dict[str, float | int]:
    with open_encoder(source, list(question.categories)) as model:
        return flat_report(evaluate(Systems(model, baselines=baselines), question, seed=0))


def _cleaned(file: Path) -> list[Note]:
    """Notes with text, their top-level category, and no boilerplate among their hashtags.

    A post without a word, of which KuaiRec has 2,313, is left out: there is nothing to read in it.
    """
    notes: dict[str, Note] = {}
    for line in file.read_bytes().splitlines():
        post = msgspec.json.decode(line)
        if not (post["title"] + post["content"]).strip():
            continue
        record = parse_record(post["note_id"].encode(), line, 0)
        assert isinstance(record, NoteRecord)
        notes[record.note.note_id] = record.note
    return [
        msgspec.structs.replace(
            note,
            hashtags=[tag for tag in note.hashtags if not BOILERPLATE.search(tag)],
            category=note.category.partition("/")[0],
        )
        for note in notes.values()
    ]


def _write(
    folder: Path, data: Path, notes: Sequence[Note], train_end: int, seed: int
) -> tuple[DataFiles, dict[str, list[str]]]:
    """Cleaned notes, pairs, and a split (80 / 20) in an order drawn by ``seed``."""
    folder.mkdir(parents=True, exist_ok=True)
    notes_file, split_file, pairs_file = folder / "notes.jsonl", folder / "split.json", folder / "pairs.parquet"
    notes_file.write_bytes(b"".join(msgspec.json.encode(note) + b"\n" for note in notes))
    order = np.random.default_rng(seed).permutation(len(notes))
    ids = [notes[place].note_id for place in order]
    cut = len(ids) * 8 // 10
    split: dict[str, list[str]] = {"train": ids[:cut], "validation": [], "held_out": ids[cut:]}
    split_file.write_text(json.dumps(split))
    if (data / "clicks.jsonl").exists():
        DataFolder.read(data, train_end).write_pairs(pairs_file)
    else:
        pq.write_table(_made_pairs(notes), pairs_file)
    return DataFiles(pairs_file, notes_file, split_file), split


def _made_pairs(notes: Sequence[Note]) -> pa.Table:
    """Notes that share a hashtag of 2 to 30 notes; the rarer the tag, the higher the score."""
    by_tag: dict[str, list[str]] = defaultdict(list)
    for note in notes:
        for tag in note.hashtags:
            by_tag[tag.casefold()].append(note.note_id)
    scores: Counter[tuple[str, str]] = Counter()
    for members in by_tag.values():
        if 2 <= len(members) <= _RARE:
            for pair in combinations(members, 2):
                scores[pair] += 1 / len(members)
    pairs = list(scores)
    return pa.table(
        {
            "source_id": [one for one, _ in pairs],
            "target_id": [other for _, other in pairs],
            "score": [scores[pair] for pair in pairs],
        }
    )


def _train(out: Path, files: DataFiles, base: str, categories: list[str], settings: TrainingSettings) -> dict[str, Any]:
    kept = out / "measured.json"
    asked = {"base": base, "settings": settings.model_dump()}
    if kept.exists():
        line = dict(json.loads(kept.read_text()))
        if {name: line[name] for name in asked} != asked:
            raise Stopped(f"{out} was trained with another base or other settings; remove it, or give another --runs")
        return line
    with TrainingProgress(console, settings.steps) as progress:
        outcome = train(TrainingPlan(base, files, out, categories, settings), progress)
    last = outcome.metrics
    if not outcome.done:
        raise Stopped(f"{out}: stopped after step {last['step']}; the same command goes on from there")
    line = {
        **asked,
        "steps": last["step"],
        "tokens": last["tokens"],
        "train_seconds": last["seconds"],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "commit": commit(),
    }
    kept.write_text(json.dumps(line))
    return line


def _show(title: str, found: dict[str, Any]) -> None:
    columns = ("hashtags.f1", "hashtags.rouge1", "category.accuracy", "category.macro_f1")
    table = Table("", *columns, title=title)
    # The tagger stands in the report of the base, which brings the baselines along.
    tagger = {name.removeprefix(_TAGGER): value for name, value in found[BASE].items() if name.startswith(_TAGGER)}
    for row, report in {**found, "TF-IDF tagger": tagger}.items():
        table.add_row(row, *(f"{report[column]:.4f}" if column in report else "" for column in columns))
    Console(width=140).print(table)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
