"""Does learning from pairs cost or help the writing? ``python -m benchmarks.generation --data FOLDER --out-runs RUNS``.

Hashtags and, where notes have them, top-level categories of notes that were held back from all training: the full
model, generation only, the untrained base, and the hashtags of the nearest training note (TF-IDF). A folder with
clicks.jsonl learns from the formula's pairs; one without from *made* pairs of notes that share a rare hashtag.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
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
from benchmarks.i2i.train_rows import DataFolder
from commands.training_progress import TrainingProgress
from export.torch_encoder import open_torch_encoder
from notellm.messages import Note
from notellm.note_file import read_notes
from notellm.settings import TrainingSettings
from training.base_model import SMOLLM2
from training.evaluation.evaluation import EvaluationData, Systems, evaluate
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
    "save_every": 1_000_000,
    "validate_every": 1_000_000,
}
# Pairs of a hashtag that many notes share are no pairs.
_RARE: Final = 30
console = Console(stderr=True)


def main(
    data: Annotated[Path, typer.Option(help="A folder with notes.jsonl, and clicks.jsonl where there are any.")],
    train_end: Annotated[int, typer.Option(help="Clicks before this are learnt from, ms UTC.")] = 2**53,
    runs: Annotated[Path, typer.Option(help="Where the trainings go.")] = Path("build/generation"),
    row: Annotated[list[str] | None, typer.Option(help=f"Only these: {', '.join(ROWS)}.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting of training, name=value.")] = None,
    base: Annotated[str, typer.Option(help="smollm2, or a Hugging Face directory.")] = SMOLLM2,
    scored: Annotated[int, typer.Option(min=10, help="Held-out notes that are asked about.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the split and the training.")] = 0,
    results: Annotated[Path, typer.Option(help="The results' JSON.")] = RESULTS,
) -> None:
    """Train both ways, ask the held-out notes, and write the table."""
    folder = runs / data.name
    notes = _cleaned(data / "notes.jsonl")
    files = _write(folder, data, notes, train_end, seed)
    split = json.loads((folder / "split.json").read_text())
    held_out, learnt = set(split["held_out"]), set(split["train"])
    asked = [note for note in notes if note.note_id in held_out][:scored]
    categories = sorted({note.category for note in notes if note.category}) or ["other"]
    changes = dict(each.split("=", 1) for each in settings or ())
    found: dict[str, Any] = {}
    for name in row or ROWS:
        out = folder / f"{name}-{seed}"
        line = _train(name, out, files, base, categories, changes, seed)
        with ExitStack() as stack:
            roomy = {"token_budget": 65_536, "max_rows": 512} if torch.cuda.is_available() else {}
            model = stack.enter_context(open_torch_encoder(str(out), **roomy))
            question = EvaluationData(
                notes=asked,
                scored=asked,
                learnt=[note for note in notes if note.note_id in learnt],
                categories=categories,
            )
            report = flat_report(evaluate(Systems(model, baselines=True), question, seed=0))
        found[name] = {**report, **line}
    kept = json.loads(results.read_text()) if results.exists() else {}
    kept.setdefault(data.name, {}).update(found)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    _show(data.name, kept[data.name])


def _cleaned(file: Path) -> list[Note]:
    """Notes with text, their top-level category, and no boilerplate among their hashtags."""
    notes = {note.note_id: note for note in read_notes(file, published_at=0)}
    return [
        msgspec.structs.replace(
            note,
            hashtags=[tag for tag in note.hashtags if not BOILERPLATE.search(tag)],
            category=note.category.partition("/")[0],
        )
        for note in notes.values()
        if (note.title + note.content).strip()
    ]


def _write(folder: Path, data: Path, notes: Sequence[Note], train_end: int, seed: int) -> DataFiles:
    """Cleaned notes, a split (80 / 20), pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    files = DataFiles(folder / "pairs.parquet", folder / "notes.jsonl", folder / "split.json")
    if files.pairs.exists():
        return files
    assert files.notes is not None
    assert files.split is not None
    files.notes.write_bytes(b"".join(msgspec.json.encode(note) + b"\n" for note in notes))
    order = np.random.default_rng(seed).permutation(len(notes))
    ids = [notes[place].note_id for place in order]
    cut = len(ids) * 8 // 10
    files.split.write_text(json.dumps({"train": ids[:cut], "validation": [], "held_out": ids[cut:]}))
    if (data / "clicks.jsonl").exists():
        DataFolder.read(data, train_end).write_pairs(files.pairs)
    else:
        partial = folder / ".pairs.parquet"
        pq.write_table(_made_pairs(notes), partial)
        partial.rename(files.pairs)
    return files


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


def _train(
    name: str, out: Path, files: DataFiles, base: str, categories: list[str], changes: dict[str, str], seed: int
) -> dict[str, Any]:
    chosen = TrainingSettings(**{**SHARED, **ROWS[name], **changes, "seed": seed})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    kept = out / "measured.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    began = time.monotonic()
    with TrainingProgress(console, chosen.steps) as progress:
        plan = TrainingPlan(base=base, files=files, out=out, categories=categories, settings=chosen)
        last = train(plan, progress).metrics
    line = {
        "steps": last["step"],
        "tokens": last["tokens"],
        "train_seconds": round(time.monotonic() - began, 1),
        "device": device,
        "commit": commit(),
    }
    kept.write_text(json.dumps(line))
    return line


def _show(name: str, found: dict[str, Any]) -> None:
    columns = ("hashtags.f1", "hashtags.rouge1", "category.accuracy", "category.macro_f1", "neighbours.precision_at_5")
    table = Table("", *columns, title=f"{name}, held-out notes")
    for row, report in found.items():
        table.add_row(row, *(f"{report[column]:.4f}" if column in report else "" for column in columns))
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
