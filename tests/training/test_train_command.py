"""``notellm train``: what a person gets told, and which of their settings counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands.handmade_snapshot import END, make_snapshot
from tests.commands.in_process import Done, run_here
from tests.training.data_files import json_lines
from tests.training.tiny_set import write_files
from training.base_model import load_notellm
from training.checkpoint_folder import read_description

SMALL = ("steps=1", "batch_pairs=2", "embedding_dim=4", "lora_rank=2", "note_tokens=16", "chunk_notes=4")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_files(folder)
    return folder


def flags_of(data: Path, base: Path | str, out: Path) -> list[str]:
    files = ["--pairs", str(data / "pairs.jsonl"), "--notes", str(data / "notes.jsonl")]
    return ["train", *files, "--base", str(base), "--out", str(out)]


def small(*changes: str) -> list[str]:
    return [part for each in (*SMALL, *changes) for part in ("--set", each)]


def settings_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text())["settings"]
    return found


def error(done: Done) -> str:
    """The one line that it failed with; nothing was printed besides."""
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


class TestErrors:
    def test_without_pairs(self, tmp_path: Path) -> None:
        line = error(run_here("train", "--out", str(tmp_path / "run")))
        assert line == "--pairs: is missing; give a snapshot of 'notellm pairs refresh', or a file of pairs"

    def test_without_out(self) -> None:
        done = run_here("train", "--smoke")
        assert done.returncode == 2
        assert "Missing option '--out'" in done.stderr

    @pytest.mark.parametrize("given", ["steps", "step=5", "training.steps=5", "=5", ""])
    def test_a_set_that_names_no_setting(self, data: Path, tmp_path: Path, given: str) -> None:
        line = error(run_here(*flags_of(data, "smollm2", tmp_path / "run"), "--set", given))
        assert line.startswith(
            f"--set: {given!r} is not allowed; allowed is name=value with one of steps, batch_pairs, "
        )
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("given", "line"),
        [
            ("steps=many", "training.steps (NOTELLM_TRAINING_STEPS): 'many' is not allowed: "),
            ("steps=0", "training.steps (NOTELLM_TRAINING_STEPS): '0' is not allowed: "),
            ("method=qlora", "training.method (NOTELLM_TRAINING_METHOD): 'qlora' is not allowed: "),
            ("learning_rate=", "training.learning_rate (NOTELLM_TRAINING_LEARNING_RATE): '' is not allowed: "),
            ("lora_dropout=1", "training.lora_dropout (NOTELLM_TRAINING_LORA_DROPOUT): '1' is not allowed: "),
        ],
    )
    def test_a_set_with_a_wrong_value(self, data: Path, tmp_path: Path, given: str, line: str) -> None:
        assert error(run_here(*flags_of(data, "smollm2", tmp_path / "run"), "--set", given)).startswith(line)

    def test_pairs_that_are_not_there(self, tmp_path: Path) -> None:
        done = run_here("train", "--pairs", str(tmp_path / "none"), "--out", str(tmp_path / "run"))
        assert error(done).startswith(f"--pairs: {tmp_path / 'none'} is not there")

    def test_a_folder_without_a_snapshot(self, tmp_path: Path) -> None:
        done = run_here("train", "--pairs", str(tmp_path), "--out", str(tmp_path / "run"))
        assert error(done) == f"{tmp_path}: no snapshot there; notellm pairs refresh --out {tmp_path} makes one"

    def test_a_file_of_pairs_without_notes(self, data: Path, tmp_path: Path) -> None:
        pairs = str(data / "pairs.jsonl")
        line = error(run_here("train", "--pairs", pairs, "--out", str(tmp_path / "run")))
        assert line == f"--notes: is needed with a file of pairs ({pairs})"

    def test_no_note_that_is_old_enough(self, data: Path, tmp_path: Path) -> None:
        line = error(run_here(*flags_of(data, "smollm2", tmp_path / "run"), "--train-before", "1"))
        assert line.endswith("pairs.jsonl holds no pair of two notes to learn from (12 skipped)")

    def test_a_split_that_is_none(self, data: Path, tmp_path: Path) -> None:
        line = error(run_here(*flags_of(data, "smollm2", tmp_path / "run"), "--split", str(data / "notes.jsonl")))
        assert line.startswith(f"--split: {data / 'notes.jsonl'} is no split: ")

    def test_categories_of_which_two_are_one(self, data: Path, tmp_path: Path) -> None:
        (tmp_path / "categories.txt").write_text("travel\nfood\nTravel\n")
        done = run_here(*flags_of(data, "smollm2", tmp_path / "run"), "--categories", str(tmp_path / "categories.txt"))
        assert "'travel' stands there twice" in error(done)

    def test_a_base_that_is_not_there(self, data: Path, tmp_path: Path) -> None:
        line = error(run_here(*flags_of(data, "/nowhere/llama", tmp_path / "run")))
        assert line == "model '/nowhere/llama': there is no such directory"

    def test_nothing_to_learn(self, data: Path, tiny_base: Path, tmp_path: Path) -> None:
        nothing = small("generative_weight=0", "contrastive=false")
        line = error(run_here(*flags_of(data, tiny_base, tmp_path / "run"), *nothing))
        assert line == "training.generative_weight: 0 is not allowed with training.contrastive = false"

    def test_an_out_folder_of_something_else(self, data: Path, tiny_base: Path) -> None:
        line = error(run_here(*flags_of(data, tiny_base, data), *small(), "--force"))
        assert line == f"--out {data}: is no run (it holds no run.json); choose another"


def test_a_run_from_pairs_to_a_checkpoint_that_says_what_made_it(
    data: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_base.parent)
    out = tmp_path / "run"
    (tmp_path / "categories.txt").write_text("art\ntravel\nfood\n")
    more = ["--split", str(data / "split.json"), "--categories", str(tmp_path / "categories.txt")]
    done = run_here(*flags_of(data, f"./{tiny_base.name}", out), *more, *small("validate_every=1"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "8 pairs (4 skipped) of 16 notes" in done.stderr
    assert "step 1, validation: contrastive " in done.stderr
    assert f"next: python export/to_onnx.py --model {out} --out BUNDLE" in done.stderr
    description = read_description(out)
    assert description.training["pairs"] == 8
    assert description.prompt is not None
    assert description.prompt.categories == ["art", "travel", "food"]
    # A path from where the command ran, and not from the run's folder.
    monkeypatch.chdir(tmp_path)
    assert load_notellm(str(out)).model.embedding_dim == 4

    again = run_here(*flags_of(data, tiny_base, out), *more, *small("validate_every=1"))
    assert error(again) == f"--out {out}: is done; give --force to train it anew"
    forced = run_here(*flags_of(data, tiny_base, out), *more, *small("seed=3"), "--force")
    assert forced.returncode == 0, forced.stderr
    assert settings_of(out)["seed"] == 3


def test_an_out_folder_of_snapshots_means_its_newest(tiny_base: Path, tmp_path: Path) -> None:
    titles = {f"n{number}": f"title {number}" for number in range(4)}
    make_snapshot(tmp_path / "pairs", [("n0", "n1", 1.0, 2, 1)], titles)
    newest = [("n0", "n1", 1.0, 2, 1), ("n2", "n3", 1.0, 2, 1), ("n3", "gone", 1.0, 2, 1)]
    make_snapshot(tmp_path / "pairs", newest, titles, end=END + 1)
    out = tmp_path / "run"
    folder = ["--pairs", str(tmp_path / "pairs"), "--base", str(tiny_base), "--out", str(out)]
    done = run_here("train", *folder, *small())
    assert done.returncode == 0, done.stderr
    assert "2 pairs (1 skipped) of 4 notes" in done.stderr


class TestSettings:
    """Read from what the run recorded. It fails right after that, for want of a base: the quickest real run."""

    def recorded(self, data: Path, out: Path, *flags: str) -> dict[str, Any]:
        # Settled at once: otherwise the base is looked at first, before anything is recorded.
        flags = (*flags, "--set", "method=lora")
        assert error(run_here(*flags_of(data, "/nowhere", out), *flags)).startswith("model '/nowhere'")
        return settings_of(out)

    def test_the_later_of_file_environment_and_flags_wins(
        self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "mine.toml").write_text("[training]\nsteps = 11\nseed = 11\nlora_rank = 11\nbatch_pairs = 11\n")
        for name in ("STEPS", "SEED", "LORA_RANK"):
            monkeypatch.setenv(f"NOTELLM_TRAINING_{name}", "22")
        flags = ["--config", str(tmp_path / "mine.toml"), "--set", "steps=33", "--set", " seed = 33 "]
        found = self.recorded(data, tmp_path / "run", *flags)
        assert [found[name] for name in ("steps", "seed", "lora_rank", "batch_pairs", "lora_alpha")] == [
            33, 33, 22, 11, 32
        ]  # fmt: skip

    @pytest.mark.parametrize(("flags", "steps"), [([], 300), (["--steps", "7"], 7), (["--set", "steps=8"], 8)], ids=str)
    def test_steps_have_a_flag_of_their_own(self, data: Path, tmp_path: Path, flags: list[str], steps: int) -> None:
        assert self.recorded(data, tmp_path / "run", *flags)["steps"] == steps

    def test_the_last_of_two_counts_and_a_value_may_hold_an_equals_sign(self, data: Path, tmp_path: Path) -> None:
        flags = ["--set", "held_back=one", "--set", "held_back=all", "--set", "lora_targets=a=b"]
        found = self.recorded(data, tmp_path / "run", *flags)
        assert (found["held_back"], found["lora_targets"]) == ("all", "a=b")

    def test_smoke_has_settings_of_its_own_that_give_way_to_what_is_set(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NOTELLM_TRAINING_NOTE_TOKENS", "48")
        run = ["train", "--smoke", "--base", "/nowhere", "--out", str(tmp_path / "run"), "--set", "save_every=50"]
        assert error(run_here(*run)).startswith("model '/nowhere'")
        found = settings_of(tmp_path / "run")
        names = ("steps", "batch_pairs", "temperature", "note_tokens", "save_every", "lora_rank")
        assert [found[name] for name in names] == [14, 16, 2.0, 48, 50, 16]


def test_smoke_that_did_not_learn_says_so(tiny_base: Path, tmp_path: Path) -> None:
    done = run_here("train", "--smoke", "--base", str(tiny_base), "--out", str(tmp_path / "run"), *small())
    assert done.returncode == 1
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"--smoke: recall@1 is {last['recall_at_1']:.2f} and had to pass 0.9: it does not learn" in done.stderr


def test_a_line_of_pairs_that_is_none_stops_it_before_the_folder_is_made(data: Path, tmp_path: Path) -> None:
    pairs = json_lines(tmp_path / "pairs.jsonl", [{"source_id": "note-00"}])
    notes = ["--notes", str(data / "notes.jsonl")]
    line = error(run_here("train", "--pairs", str(pairs), *notes, "--out", str(tmp_path / "run")))
    assert line.startswith(f"--pairs: {pairs}, line 1 is no pair: ")
    assert not (tmp_path / "run").exists()
