"""The whole loop with the project's own programs: clicks, pairs, a training, its export, and notes that it serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from pymilvus import MilvusClient
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from export.torch_encoder import open_torch_encoder
from notellm.bundle import read_manifest
from notellm.encoder import EncodedNote, NoteEncoder
from notellm.messages import Note
from notellm.note_file import read_notes
from tests.commands.in_process import Done, run_here
from tests.conftest import REPOSITORY
from tests.export.tiny import save_checkpoint
from tests.streams.formula import read_pairs
from tests.support.processes import CommandProcess, wait_until
from training.checkpoint_folder import PROJECTION, read_description
from training.model import add_emb_token

# peft asks transformers for something by its old name.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")]

CATEGORIES = ("food", "pets", "travel")
NOTES_EACH = 28
DIM = 24
NOTE_TOKENS = 64
# The made-up week of clicks ends at the one; from the other on, evaluation asks.
AS_OF, TEST = "2026-02-01", "2026-01-30"
# A tiny model learns to write a category as a hashtag, and its embeddings stay apart: were the temperature not so low,
# the contrastive loss, which can make nothing of these clicks, would soon have them all alike.
SETTINGS = (
    f"--steps 30 --set method=lora --set batch_pairs=8 --set embedding_dim={DIM} --set note_tokens={NOTE_TOKENS} "
    "--set learning_rate=0.003 --set generative_weight=1 --set hashtag_share=0.8 "
    "--set temperature=-3 --set projection_learning_rate=0.0003"
)
# One thread, here and in each program: matrices this small only wait for other threads.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "NOTELLM_OPERATIONS_PORT": "0", "COLUMNS": "400"}
# Each metric, and how many are counted in it.
METRICS = {
    "category.accuracy": "counts.category.notes",
    "category.illegal": "counts.category.notes",
    "hashtags.f1": "counts.hashtags.notes",
    "hashtags.rouge1": "counts.hashtags.notes",
    "neighbours.precision_at_5": "counts.scored",
    "i2i.recall_at_10": "counts.i2i.queries",
}


@dataclass(frozen=True)
class Loop:
    """A folder with notes.jsonl, split.json, clicks.jsonl, the snapshots ``pairs``, ``run`` and ``bundle``."""

    folder: Path
    notes: list[Note]
    split: dict[str, list[str]]

    def path(self, name: str) -> Path:
        return self.folder / name

    def notellm(self, line: str) -> None:
        self.program("-m", "commands", *line.split())

    def program(self, *arguments: str) -> None:
        """Run one in the folder, so that its paths are relative."""
        done = subprocess.run(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=1200,
            cwd=self.folder,
            env={**os.environ, **ENVIRONMENT},
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}:\n{done.stdout}\n{done.stderr}"


def write_notes(file: Path) -> None:
    """The shortest of three categories; their hashtag is one that even a tiny model can learn to write."""
    notes = read_notes(REPOSITORY / "data" / "notes.jsonl", published_at=0)
    short = sorted(notes, key=lambda note: (len((note.title + note.content).encode()), note.note_id))
    chosen = [note for name in CATEGORIES for note in [n for n in short if n.category == name][:NOTES_EACH]]
    lines = [msgspec.structs.replace(note, hashtags=[note.category]) for note in chosen]
    file.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Loop:
    return walk(tmp_path_factory.mktemp("loop"))


def walk(folder: Path) -> Loop:
    """From notes and a base to a bundle, program by program, as a person would type them."""
    save_checkpoint(folder / "tiny-llama", tied=True)
    write_notes(folder / "notes.jsonl")
    notes = read_notes(folder / "notes.jsonl", published_at=0)
    ids = [note.note_id for note in notes]
    split = {"train": ids[0::2], "validation": ids[1::4], "held_out": ids[3::4]}
    (folder / "split.json").write_text(json.dumps(split))
    (folder / "categories.txt").write_text("\n".join(CATEGORIES))
    made = Loop(folder, notes, split)
    made.notellm(
        f"simulate clicks --notes notes.jsonl --clicks 1500 --users 40 --bots 0 --as-of {AS_OF} --out clicks.jsonl"
    )
    made.notellm("pairs refresh --clicks clicks.jsonl --notes notes.jsonl --window all --out pairs")
    data = "--pairs pairs --split split.json --categories categories.txt"
    made.notellm(f"train {data} --base ./tiny-llama --out run {SETTINGS}")
    made.program(str(REPOSITORY / "export" / "to_onnx.py"), "--model", "run", "--out", "bundle")
    return made


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def live(loop: Loop, tmp_path: Path) -> Iterator[MilvusClient]:
    """A client of a Milvus that ``notellm dev`` with the bundle has filled with all notes."""
    dev = CommandProcess(
        tmp_path / "log", "dev", "--data", str(tmp_path / "dev"), "--bundle", str(loop.path("bundle")), env=ENVIRONMENT
    )
    try:
        dev.wait_for("assigned 0 from", seconds=300)
        lines = (tmp_path / "dev" / "env").read_text().splitlines()
        env = dict(line.removeprefix("export ").split("=", 1) for line in lines)
        loop.notellm(f"publish notes.jsonl --kafka {env['NOTELLM_KAFKA_BOOTSTRAP_SERVERS']}")
        with closing(MilvusClient(env["NOTELLM_MILVUS_URI"])) as client:
            wait_until(lambda: settled(client) == len(loop.notes), "all rows with their tags", seconds=300)
            yield client
    finally:
        assert dev.stop() == 0, dev.text()


def settled(client: MilvusClient) -> int:
    if not client.has_collection("notes"):
        return 0
    return int(client.query("notes", filter='text_hash != ""', output_fields=["count(*)"])[0]["count(*)"])


def rows_by_id(client: MilvusClient, *fields: str) -> dict[str, dict[str, Any]]:
    rows = client.query("notes", filter='note_id != ""', output_fields=list(fields), limit=1000)
    return {row["note_id"]: row for row in rows}


def embeddings_by_peft(loop: Loop) -> NDArray[np.float32]:
    """``[N, DIM]``, note by note: the base with the run's adapter as peft itself puts it there, and the projection.

    No line of ours between, but for the prompt's ids.
    """
    base = AutoModelForCausalLM.from_pretrained(loop.path("tiny-llama"), dtype=torch.float32)
    add_emb_token(base, AutoTokenizer.from_pretrained(loop.path("tiny-llama")))
    model = PeftModel.from_pretrained(base, str(loop.path("run"))).eval()
    projection = load_file(loop.path("run") / PROJECTION)
    prompts = NoteEncoder.load(loop.path("bundle"), threads=1).prompts
    found = []
    for note in loop.notes:
        ids = torch.tensor([[*prompts.prefix_ids, *prompts.build(note).ids]])
        with torch.inference_mode():
            hidden = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        vector = projection["weight"] @ hidden + projection["bias"]
        found.append((vector / vector.norm()).numpy())
    return np.stack(found)


class TestServing:
    def test_what_was_trained_is_what_serves(self, loop: Loop, live: MilvusClient) -> None:
        version = read_manifest(loop.path("bundle")).model_version
        rows = rows_by_id(live, "note_id", "embedding", "model_version", "generated_category", "generated_hashtags")
        assert rows.keys() == {note.note_id for note in loop.notes}
        assert {row["model_version"] for row in rows.values()} == {version}
        served = np.array([rows[note.note_id]["embedding"] for note in loop.notes], np.float32)
        assert served.shape == (len(loop.notes), DIM)
        with open_torch_encoder(str(loop.path("run"))) as trained:
            encoded = trained.encode(loop.notes)
        np.testing.assert_allclose(served, np.stack([each.embedding for each in encoded]), atol=1e-4)
        np.testing.assert_allclose(served, embeddings_by_peft(loop), atol=1e-4)
        said = [tags_of(each) for each in encoded]
        kept = [
            (rows[note.note_id]["generated_category"], list(rows[note.note_id]["generated_hashtags"]))
            for note in loop.notes
        ]
        assert sum(one != other for one, other in zip(kept, said, strict=True)) <= 1
        self.nearest_is_the_note_itself(loop, live, version)

    @staticmethod
    def nearest_is_the_note_itself(loop: Loop, live: MilvusClient, version: str) -> None:
        encoder = NoteEncoder.load(loop.path("bundle"), threads=1)
        vectors = [each.embedding.tolist() for each in encoder.encode(loop.notes, embed_only=True)]
        hits = live.search("notes", data=vectors, limit=1, output_fields=["model_version"])
        assert [found[0]["note_id"] for found in hits] == [note.note_id for note in loop.notes]
        note = loop.notes[5]
        done = run_here(
            "embed",
            note.content,
            "--title",
            note.title,
            "--hashtag",
            note.hashtags[0],
            "--bundle",
            str(loop.path("bundle")),
        )
        answer = json.loads(done.stdout)
        assert answer["model_version"] == version
        [[hit]] = live.search("notes", data=[answer["embedding"]], limit=1)
        assert hit["note_id"] == note.note_id
        assert hit["distance"] == pytest.approx(1, abs=1e-4)

    def test_the_bundle_reads_notes_as_the_training_did(self, loop: Loop) -> None:
        manifest = read_manifest(loop.path("bundle"))
        assert manifest.parity.passed
        assert (manifest.embedding_dim, manifest.projection, manifest.base_model) == (DIM, "linear", "tiny-llama")
        assert manifest.prompt_limits.note == NOTE_TOKENS
        assert manifest.categories == list(CATEGORIES)

    def test_only_pairs_within_the_training_part_were_learnt_from(self, loop: Loop) -> None:
        [snapshot] = loop.path("pairs").glob("pairs/*/pairs.parquet")
        pairs = read_pairs(snapshot)
        train = set(loop.split["train"])
        within = [(source, target) for source, target, *_ in pairs if source in train and target in train]
        told = read_description(loop.path("run")).training
        assert (told["notes"], told["pairs"]) == (len(train), len(within))
        assert 0 < len(within) < len(pairs)
        # The second matrix of a LoRA begins as zeros.
        adapter = load_file(loop.path("run") / "adapter_model.safetensors")
        assert all(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)


def tags_of(encoded: EncodedNote) -> tuple[str, list[str]]:
    assert encoded.tags is not None
    return encoded.tags.category, encoded.tags.hashtags


def evaluate(loop: Loop, *arguments: str) -> Done:
    """With all that the loop left, what ``arguments`` say again aside."""
    usual = {
        "--notes": str(loop.path("notes.jsonl")),
        "--split": str(loop.path("split.json")),
        "--clicks": str(loop.path("clicks.jsonl")),
        "--train-end": TEST,
        "--test-start": TEST,
        "--base": "none",
        "--out": "evaluation",
    }
    given = [part for option, value in usual.items() if option not in arguments for part in (option, value)]
    return run_here("evaluate", *given, "--no-baselines", "--json", *arguments)


class TestEvaluate:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("NOTELLM_ENCODER_THREADS", "1")

    def test_run_and_bundle_come_to_the_same(self, loop: Loop, tmp_path: Path) -> None:
        reports = []
        for name, option in (("bundle", "--bundle"), ("run", "--checkpoint")):
            done = evaluate(loop, option, str(loop.path(name)), "--out", str(tmp_path / name))
            assert done.returncode == 0, done.stderr
            reports.append(json.loads(done.stdout))
            assert json.loads((tmp_path / name / "evaluation.json").read_text()) == reports[-1]
            assert (tmp_path / name / "evaluation.png").read_bytes().startswith(b"\x89PNG")
        first, second = reports
        assert first["counts.scored"] == len(loop.split["held_out"]) == first["counts.hashtags.notes"]
        assert first["counts.notes"] == len(loop.notes)
        assert {name: first[name] for name in METRICS.values()} == {name: second[name] for name in METRICS.values()}
        for metric, counted in METRICS.items():
            assert first[metric] == pytest.approx(second[metric], abs=1 / first[counted] + 1e-6), metric
            # It has learnt something, or two that can do nothing would be as good as each other.
            assert (first[metric] == 0) == (metric == "category.illegal"), metric
        self.counted_by_hand(loop, first)

    @staticmethod
    def counted_by_hand(loop: Loop, report: dict[str, float]) -> None:
        held_out = [note for note in loop.notes if note.note_id in loop.split["held_out"]]
        withheld = [msgspec.structs.replace(note, hashtags=[]) for note in held_out]
        said = [tags_of(each) for each in NoteEncoder.load(loop.path("bundle"), threads=1).encode(withheld)]
        right = [category == note.category for (category, _), note in zip(said, held_out, strict=True)]
        assert report["category.accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-6)
        # The author has one hashtag: where it is among those that were said, F1 is 2 / (1 + them).
        made = [{tag.casefold() for tag in tags} for _, tags in said]
        f1 = [2 / (1 + len(tags)) * (note.category in tags) for tags, note in zip(made, held_out, strict=True)]
        assert report["hashtags.f1"] == pytest.approx(sum(f1) / len(f1), abs=1e-6)

    def test_another_part_is_other_notes(self, loop: Loop) -> None:
        report = json.loads(evaluate(loop, "--bundle", str(loop.path("bundle")), "--part", "train").stdout)
        assert report["counts.scored"] == len(loop.split["train"])

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (["--checkpoint", "RUN"], "--bundle and --checkpoint exclude each other; give one"),
            (["--split", "OTHER"], "--notes: no note is left to be scored; is the split of these notes?"),
            (["--split", "NOWHERE"], "--split: NOWHERE cannot be read: No such file or directory"),
            (["--notes", "NOWHERE"], "--notes: NOWHERE cannot be read: No such file or directory"),
            (["--clicks", "NOWHERE"], "--clicks: NOWHERE cannot be read: No such file or directory"),
            (["--train-end", "soon"], "--train-end: 'soon' is"),
            (["--test-start", "2026-01-01"], "--train-end: "),
            (["--out", "NOTES"], "--out: NOTES cannot be written: "),
        ],
    )
    def test_what_is_wrong_is_one_line(self, loop: Loop, tmp_path: Path, arguments: list[str], line: str) -> None:
        other = {part: [f"{part}-{number}" for number in range(9)] for part in loop.split}
        (tmp_path / "other.json").write_text(json.dumps(other))
        paths = {
            "RUN": str(loop.path("run")),
            "NOTES": str(loop.path("notes.jsonl")),
            "OTHER": str(tmp_path / "other.json"),
            "NOWHERE": str(tmp_path / "nowhere"),
        }
        for name, path in paths.items():
            line = line.replace(name, path)
        done = evaluate(loop, "--bundle", str(loop.path("bundle")), *(paths.get(word, word) for word in arguments))
        assert_one_line(done, line)

    @pytest.mark.parametrize("missing", ["--train-end", "--test-start"])
    def test_clicks_take_both_moments(self, loop: Loop, missing: str) -> None:
        given = {"--train-end": TEST, "--test-start": TEST}
        del given[missing]
        done = run_here("evaluate", "--clicks", str(loop.path("clicks.jsonl")), *next(iter(given.items())))
        assert_one_line(done, f"{missing}: is missing; with --clicks it takes both --train-end and --test-start")

    def test_moments_without_clicks_are_no_silence(self) -> None:
        done = run_here("evaluate", "--train-end", TEST)
        assert_one_line(done, f"--train-end: {TEST} says which clicks are meant, but --clicks is missing")

    @pytest.mark.parametrize("option", ["--bundle", "--checkpoint"])
    def test_a_model_that_is_not_there_is_named(self, loop: Loop, tmp_path: Path, option: str) -> None:
        done = evaluate(loop, option, str(tmp_path / "nowhere"))
        assert_one_line(done, "")
        assert str(tmp_path / "nowhere") in done.stderr


def assert_one_line(done: Done, begins: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {begins}")
    assert done.stderr.count("\n") == 1, done.stderr
