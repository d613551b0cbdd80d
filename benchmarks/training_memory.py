"""What a large contrastive batch takes: ``python -m benchmarks.training_memory``.

One optimiser step of ``notellm train`` on smollm2, with a batch of 128 notes that fill their budget of 128 tokens, each
way in a process of its own: peak resident memory as the kernel counts it, and the step's seconds. In one piece without
checkpointing the batch would take some 60 GB; that is not run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

RESULTS = Path("build/benchmarks")
NOTE_TOKENS = 128
_WAYS: dict[str, list[str]] = {
    "chunks of 4": ["chunk_notes=4"],
    "chunks of 8": ["chunk_notes=8"],
    "chunks of 16": ["chunk_notes=16"],
    "checkpointing, chunks of 32": ["chunk_notes=32", "gradient_checkpointing=true"],
}


def main(
    notes: Annotated[int, typer.Option(min=4, help="Notes of the batch.")] = 128,
    way: Annotated[list[str] | None, typer.Option(help=f"One of: {'; '.join(_WAYS)}. Default: all.")] = None,
) -> None:
    """Train one step in each way."""
    console = Console()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), notes)
        for name in way or list(_WAYS):
            with console.status(name):
                results.append({"way": name, "notes": notes, **_measure(Path(folder), notes, _WAYS[name])})
            console.print(_line(results[-1]), highlight=False)
    table = Table("way", "peak GiB", "seconds a step", title=f"{notes} notes of {NOTE_TOKENS} tokens, smollm2, float32")
    for row in results:
        table.add_row(row["way"], f"{row['peak_bytes'] / 2**30:.2f}", f"{row['seconds']:.0f}")
    console.print(table)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "training_memory.json").write_text(json.dumps(results, indent=2) + "\n")


def write_data(folder: Path, count: int) -> None:
    """Notes longer than any budget, and pairs that use each of them once."""
    words = " ".join(f"{word} {place}" for place, word in enumerate(["kyoto", "moss", "garden", "rain"] * 100))
    notes = [
        {
            "note_id": f"n{n}",
            "title": f"note {n}",
            "content": words,
            "hashtags": ["rain", f"tag {n}"],
            "category": "travel",
        }
        for n in range(count)
    ]
    pairs = [{"source_id": f"n{n}", "target_id": f"n{n + 1}"} for n in range(0, count, 2)]
    for name, lines in (("notes", notes), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def _measure(folder: Path, notes: int, settings: list[str]) -> dict[str, Any]:
    run = folder / "run"
    chosen = [f"batch_pairs={notes // 2}", f"note_tokens={NOTE_TOKENS}", "projection_start=random", *settings]
    command = [
        sys.executable,
        "-m",
        "commands",
        "train",
        "--pairs",
        folder / "pairs.jsonl",
        "--notes",
        folder / "notes.jsonl",
    ]
    command += ["--out", run, "--steps", "1", "--force", *(part for each in chosen for part in ("--set", each))]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        # wait4 and not wait: only it tells this child's own peak.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(said.decode(errors="replace"))
    line = json.loads((run / "metrics.jsonl").read_bytes().splitlines()[0])
    return {"peak_bytes": usage.ru_maxrss * 1024, "seconds": line["seconds"], "tokens": line["tokens"]}


def _line(row: dict[str, Any]) -> str:
    return f"{row['way']}: {row['peak_bytes'] / 2**30:.2f} GiB, {row['seconds']:.0f} s for {row['tokens']:,} tokens"


if __name__ == "__main__":
    typer.run(main)
