"""The encoder against transformers on the same model and notes: ``python -m benchmarks.encoder``.

Both run in this process, turn by turn, so that a machine that slows down slows both. Ratios of medians are what counts.
The peer does what a service built on transformers would: one forward pass with last-token pooling for the embedding,
``generate`` for the hashtags.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
import typer
from rich.console import Console
from rich.table import Table

from export.checkpoint import Checkpoint, load_checkpoint
from notellm.encoder import NoteEncoder
from notellm.messages import Note, NoteRecord, parse_record
from notellm.prompt import Prompt
from training.base_model import SMOLLM2

RESULTS = Path("build/benchmarks")


def main(
    bundle: Annotated[Path, typer.Option(help="A bundle exported from smollm2.")] = Path("build/bundles/default"),
    notes: Annotated[Path, typer.Option(help="Notes, JSON Lines.")] = Path("data/notes.jsonl"),
    rounds: Annotated[int, typer.Option(min=3, help="How often each is timed.")] = 5,
) -> None:
    """Time embedding and tagging at batch 1 and 8, against transformers."""
    console = Console()
    encoder = NoteEncoder.load(bundle, max_rows=8)
    with console.status("loading the peer"):
        peer = Peer(load_checkpoint(SMOLLM2), encoder)
    sample = _notes(notes)[: 8 * rounds]
    results = []
    for name, size, ours, theirs in (
        ("embed", 1, lambda batch: encoder.encode(batch, embed_only=True), peer.embed),
        ("embed", 8, lambda batch: encoder.encode(batch, embed_only=True), peer.embed),
        ("embed and tag", 1, encoder.encode, peer.embed_and_tag),
        ("embed and tag", 8, encoder.encode, peer.embed_and_tag),
    ):
        batches = [sample[start * size : (start + 1) * size] for start in range(rounds)]
        results.append(_compare(f"{name}, batch {size}", ours, theirs, batches))
        console.print(f"{name}, batch {size}: {results[-1]['ratio']:.2f} x transformers", highlight=False)
    table = Table("task", "notes/s", "transformers", "ratio", title=f"medians of {rounds} rounds, turn by turn")
    for row in results:
        table.add_row(row["task"], f"{row['ours']:.2f}", f"{row['transformers']:.2f}", f"{row['ratio']:.2f}")
    console.print(table)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "encoder.json").write_text(json.dumps(results, indent=2) + "\n")


class Peer:
    """transformers, in float32, as its documentation uses it."""

    def __init__(self, checkpoint: Checkpoint, encoder: NoteEncoder) -> None:
        self._model = checkpoint.model
        self._base: Any = checkpoint.model.base
        self._encoder = encoder
        self._builder = encoder.prompts
        self._tag_tokens = encoder.bundle.manifest.tag_limits.hashtag_tokens

    @torch.no_grad()
    def embed(self, notes: list[Note]) -> object:
        ids, mask = self._padded([self._builder.prefix_ids + prompt.ids for prompt in self._prompts(notes)])
        hidden = self._base.base_model(input_ids=ids, attention_mask=mask).last_hidden_state[:, -1]
        return self._model.embed(hidden)

    @torch.no_grad()
    def embed_and_tag(self, notes: list[Note]) -> object:
        self.embed(notes)
        prompts = [self._builder.prefix_ids + prompt.ids for prompt in self._prompts(notes)]
        for guidance, tokens in ((self._builder.hashtags_ids, self._tag_tokens), (self._builder.category_ids, 2)):
            ids, mask = self._padded([prompt + guidance for prompt in prompts])
            self._base.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        return None

    def _prompts(self, notes: list[Note]) -> list[Prompt]:
        return [self._encoder.prompt(note) for note in notes]

    @staticmethod
    def _padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Left padding, as generate wants it."""
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids, mask


def _compare(
    task: str,
    ours: Callable[[list[Note]], object],
    theirs: Callable[[list[Note]], object],
    batches: list[list[Note]],
) -> dict[str, Any]:
    """Notes per second of both, as medians over ``batches``, after one round that is not counted."""
    speeds: dict[str, list[float]] = {"ours": [], "transformers": []}
    for number, batch in enumerate([batches[0], *batches]):
        for who, run in (("ours", ours), ("transformers", theirs)):
            begin = time.perf_counter()
            run(batch)
            if number:
                speeds[who].append(len(batch) / (time.perf_counter() - begin))
    medians = {who: statistics.median(values) for who, values in speeds.items()}
    return {"task": task, **medians, "ratio": medians["ours"] / medians["transformers"]}


def _notes(file: Path) -> list[Note]:
    found = []
    for line in file.read_bytes().splitlines():
        record = parse_record(msgspec.json.decode(line)["note_id"].encode(), line, 0)
        if isinstance(record, NoteRecord):
            found.append(record.note)
    # Every category in turn, so that a batch is of mixed lengths.
    return [note for start in range(28) for note in found[start::28]]


if __name__ == "__main__":
    typer.run(main)
