"""The table of item to item: from saved runs, several seeds a row, and the mix with co-occurrence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.i2i.__main__ import main
from benchmarks.i2i.mix import MixScorer
from benchmarks.i2i.saved_runs import RunError, SavedRun, read_runs, run_folder, save_run
from benchmarks.i2i.table import make_table, plot_table
from benchmarks.i2i.train_rows import ROWS, DataFolder, row_settings
from training.evaluation.pair_scores import UNIT, pair_scores
from training.evaluation.protocol import clicks_on_notes
from training.note_table import read_note_table
from training.pairs import read_pairs

TRAIN_END, TEST_START = 100, 200
Matrix = NDArray[np.float32]


@pytest.fixture
def data(tmp_path: Path) -> DataFolder:
    """Eight notes on a circle; people go from each to the next, and test as they trained. Note 7 is cold."""
    folder = tmp_path / "circle"
    folder.mkdir()
    notes = [{"note_id": f"n{n}", "title": f"note number {n}", "hashtags": [f"t{n}"]} for n in range(8)]
    clicks = []
    for user in range(12):
        first = user % 6
        for step, moment in enumerate((10, 20, 150, 250)):
            clicks.append({"user_id": f"u{user}", "note_id": f"n{(first + step) % 7}", "clicked_at": moment + user})
    clicks.append({"user_id": "u0", "note_id": "n7", "clicked_at": 300})
    for name, lines in (("notes", notes), ("clicks", clicks)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DataFolder.read(folder, TRAIN_END)


def saved(runs: Path, name: str, seed: int, embeddings: Matrix, sha256: str, **settings: Any) -> None:
    run = SavedRun(
        name=name, row=name, seed=seed, base="smollm2", data_sha256=sha256, train_end=TRAIN_END, steps=2, tokens=50,
        seconds=1.5, device="CPU", commit="abc", command="python -m ...", settings={"seed": seed, **settings},
    )  # fmt: skip
    save_run(run_folder(runs, name, seed), run, embeddings, [(25, 2.0), (50, 1.0)])


def circle() -> Matrix:
    turns = np.arange(8) * 2 * np.pi / 8
    return np.stack([np.cos(turns), np.sin(turns)], axis=1).astype(np.float32)


def useless() -> Matrix:
    """Note n is nearest to itself and then to note 7: no next note is ever first."""
    return np.array([[1.0, 0.1 * n] for n in (0, 9, 1, 8, 2, 7, 3, 4)], np.float32)


def test_the_pairs_are_the_formulas_own(data: DataFolder, tmp_path: Path) -> None:
    data.write_pairs(tmp_path / "pairs.parquet")
    table = read_note_table(data.notes_file)
    pairs = read_pairs(tmp_path / "pairs.parquet", table)
    # Before TRAIN_END each of 12 people went from one note to the next: half a point each.
    found = {(int(a), int(b)): float(s) for a, b, s in zip(pairs.sources, pairs.targets, pairs.scores, strict=True)}
    assert found == {(first, (first + 1) % 7): 1.0 for first in range(6)}


def test_seeds_are_averaged_and_runs_told_apart(data: DataFolder, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    saved(runs, "notellm", 0, circle(), data.sha256)
    saved(runs, "notellm", 1, useless(), data.sha256)
    saved(runs, "contrastive", 0, circle(), data.sha256)
    found = read_runs(runs, data.sha256, TRAIN_END)
    base = {"base": np.random.default_rng(0).normal(size=(8, 80)).astype(np.float32)}
    told: list[str] = []
    table = make_table(data, base, found, test_start=TEST_START, targets="test", tell=told.append)
    at_1 = {name: row.metrics["all"]["recall_at_1"].value for name, row in table.rows.items()}
    one = [make_alone(data, runs, seed) for seed in (0, 1)]
    assert at_1["contrastive"] == one[0]
    assert at_1["notellm"] == pytest.approx(sum(one) / 2)
    assert list(table.rows)[:4] == ["random", "popularity", "tfidf", "cooccurrence"]
    assert list(table.rows)[-1] == "notellm_mixed"
    assert len(table.weights) == 2
    flat = table.flat(found)
    (row,) = [each for each in flat["rows"] if each["name"] == "notellm"]
    assert (row["seeds"], row["tokens"], row["commands"]) == ([0, 1], [50, 50], ["python -m ..."] * 2)
    assert row["recall_at_1"][0] == pytest.approx(at_1["notellm"], abs=1e-5)
    difference = flat["differences"]["notellm"]["contrastive"]["recall_at_1"]
    assert difference[0] == pytest.approx(at_1["notellm"] - at_1["contrastive"], abs=1e-5)
    assert flat["curves"]["notellm-0"] == [(25, 2.0), (50, 1.0)]
    plot_table(table, found, tmp_path / "out" / "i2i.png")
    assert (tmp_path / "out" / "i2i.png").read_bytes().startswith(b"\x89PNG")


def make_alone(data: DataFolder, runs: Path, seed: int) -> float:
    found = {"notellm": [each for each in read_runs(runs, data.sha256, TRAIN_END)["notellm"] if each[0].seed == seed]}
    table = make_table(data, {}, found, test_start=TEST_START, targets="test", tell=lambda line: None)
    return table.rows["notellm"].metrics["all"]["recall_at_1"].value


def test_runs_that_do_not_belong_here_are_refused(data: DataFolder, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    saved(runs, "notellm", 0, circle(), "another")
    with pytest.raises(RunError, match="trained on other notes or clicks"):
        read_runs(runs, data.sha256, TRAIN_END)
    saved(runs, "notellm", 0, circle(), data.sha256)
    with pytest.raises(RunError, match="learnt from clicks before 100, and --train-end is 50"):
        read_runs(runs, data.sha256, 50)
    saved(runs, "notellm", 1, circle(), data.sha256, steps=9)
    with pytest.raises(RunError, match="notellm: its seeds were trained with different settings"):
        read_runs(runs, data.sha256, TRAIN_END)


def test_what_makes_a_row_that_row_is_not_for_set_to_change() -> None:
    changed = {"generative_weight": "0.5", "steps": "7"}
    found = {row: row_settings(row, changed, seed=3) for row in ROWS}
    assert {row: each.generative_weight for row, each in found.items()} == {
        "minilm_tuned": 0, "contrastive": 0, "notellm": 0.5,
    }  # fmt: skip
    assert {(each.steps, each.seed) for each in found.values()} == {(7, 3)}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"settings": ["steps"]}, "--set: 'steps' is not allowed; allowed is name=value with one of steps, "),
        ({"settings": ["seed=1"]}, "--set: 'seed=1' is not allowed"),
        ({"settings": ["steps=0"]}, "--set: steps=0: "),
        ({"row": ["bert"]}, "--row: 'bert' is not allowed; allowed: minilm_tuned, contrastive, notellm"),
        ({"name": "mine"}, "--name: names one row; give exactly one --row"),
        ({"targets": "all"}, "--targets: 'all' is not allowed; allowed: test, validation"),
        ({"test_start": "50"}, "--train-end: 100 is not allowed: it is after --test-start (50)"),
        ({"data": Path("nowhere")}, "nowhere"),
        ({"train": False, "seed": [1]}, "--row, --seed, --set and --name say what to train; give --train as well"),
    ],
)
def test_what_is_wrong_is_one_line(data: DataFolder, tmp_path: Path, given: dict[str, Any], line: str) -> None:
    usual = {"data": data.notes_file.parent, "train_end": "100", "test_start": "200", "train": True}
    with pytest.raises(SystemExit) as caught:
        main(**{**usual, "runs": tmp_path / "runs", **given})
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_that_is_there_is_not_trained_again_nor_taken_for_another(data: DataFolder, tmp_path: Path) -> None:
    usual: dict[str, Any] = {
        "data": data.notes_file.parent, "train_end": "100", "test_start": "200", "train": True, "table": False,
        "runs": tmp_path, "row": ["contrastive"],
    }  # fmt: skip
    settings = row_settings("contrastive", {"steps": 3}, 0).model_dump(exclude={"seed"})
    saved(tmp_path, "contrastive", 0, circle(), data.sha256, **settings)
    main(**usual, settings=["steps=3"])
    with pytest.raises(SystemExit, match="contrastive-0 was trained with other settings"):
        main(**usual, settings=["steps=4"])


def test_the_mix_is_the_cosine_and_a_share_of_the_score(data: DataFolder) -> None:
    ids = [note.note_id for note in data.notes]
    pairs: Any = pair_scores(clicks_on_notes(data.clicks, ids).before(TRAIN_END))
    scores = MixScorer(circle(), pairs, 0.5).scores(np.arange(8))
    slow = np.zeros((8, 8))
    both = (pairs + pairs.T).toarray() / UNIT
    for a in range(8):
        for b in range(8):
            share = both[a, b] / both[a].max() if both[a].max() else 0.0
            slow[a, b] = circle()[a] @ circle()[b] + 0.5 * share
    np.testing.assert_allclose(scores, slow, atol=1e-5)
    # Nobody clicked note 7: its cosines stand alone.
    np.testing.assert_allclose(scores[7], circle() @ circle()[7], atol=1e-5)
