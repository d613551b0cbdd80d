"""A run's folder goes on with what it was started with, and is never taken for what it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from notellm.settings import TrainingSettings
from training.checkpoint_folder import DESCRIPTION
from training.errors import TrainingError
from training.run_folder import RunFolder, RunRecord

RECORD = RunRecord(
    base="smollm2",
    data={"pairs": "1" * 64, "notes": "2" * 64},
    processes=1,
    categories=["travel", "food"],
    settings=TrainingSettings().model_dump(),
)


def record(**changes: Any) -> RunRecord:
    return msgspec.structs.replace(RECORD, **changes)


def with_settings(**changes: Any) -> RunRecord:
    return record(settings={**RECORD.settings, **changes})


def start(run: RunFolder, started: RunRecord = RECORD, *, force: bool = False) -> None:
    """As a training begins; and it is over."""
    with run:
        run.open(started, force=force)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Begun, with a line of metrics and a state."""
    folder = RunFolder(tmp_path / "runs" / "mine")
    start(folder)
    folder.add_metrics({"part": "train", "step": 1})
    folder.states.mkdir()
    (folder.states / "state").touch()
    return folder


def refusal(run: RunFolder, started: RunRecord, *, force: bool = False) -> str:
    before = sorted(path.name for path in run.path.iterdir())
    with pytest.raises(TrainingError) as caught:
        start(run, started, force=force)
    assert sorted(path.name for path in run.path.iterdir()) == before
    line = str(caught.value)
    assert line.startswith(f"--out {run.path}: ")
    return line.removeprefix(f"--out {run.path}: ")


def test_it_records_what_the_run_was_started_with(run: RunFolder) -> None:
    assert msgspec.json.decode((run.path / "run.json").read_bytes(), type=RunRecord) == RECORD


def test_the_same_start_finds_all_as_it_was(run: RunFolder) -> None:
    start(RunFolder(run.path))
    assert run.read_metrics() == [{"part": "train", "step": 1}]
    assert (run.states / "state").exists()


def test_an_empty_folder_may_be_there(tmp_path: Path) -> None:
    start(RunFolder(tmp_path))
    assert (tmp_path / "run.json").is_file()


@pytest.mark.parametrize(
    ("started", "named", "was", "now"),
    [
        (record(base="./mine"), "--base", "smollm2", "./mine"),
        (record(processes=8), "processes", 1, 8),
        (record(categories=["food", "travel"]), "--categories", ["travel", "food"], ["food", "travel"]),
        (record(redraw_partners=True), "--redraw-partners", False, True),
        (record(data={**RECORD.data, "pairs": "3" * 64}), "data pairs", "1" * 64, "3" * 64),
        (record(data={**RECORD.data, "split": "3" * 64}), "data split", None, "3" * 64),
        (record(data={"pairs": "1" * 64}), "data notes", "2" * 64, None),
        (with_settings(steps=301), "training.steps", 300, 301),
        (with_settings(learning_rate=1e-5), "training.learning_rate", 3e-4, 1e-5),
        (with_settings(seed=1), "training.seed", 0, 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_start_is_refused_by_the_name_of_what_differs(
    run: RunFolder, started: RunRecord, named: str, was: Any, now: Any
) -> None:
    assert refusal(run, started) == (
        f"was started with {named} {was!r}, now it is {now!r}; "
        "go on with the same, choose another folder, or start anew with --force"
    )


FREE = {
    "save_every": 7,
    "keep_states": 9,
    "validate_every": 3,
    "validation_pairs": 5,
    "chunk_notes": 4,
    "gradient_checkpointing": True,
}


def test_what_a_run_costs_or_tells_may_change_on_the_way_and_nothing_else(run: RunFolder) -> None:
    start(run, with_settings(**FREE))
    assert run.read_metrics() == [{"part": "train", "step": 1}]
    for name in RECORD.settings.keys() - FREE.keys():
        assert f"training.{name} " in refusal(run, with_settings(**{name: "another"}))


def test_a_run_that_is_done_is_trained_anew_only_by_force(run: RunFolder) -> None:
    (run.path / DESCRIPTION).write_bytes(b"{}")
    assert refusal(run, RECORD) == "is done; give --force to train it anew"
    start(run, with_settings(seed=1), force=True)
    assert [path.name for path in run.path.iterdir()] == ["run.json"]
    assert msgspec.json.decode((run.path / "run.json").read_bytes(), type=RunRecord).settings["seed"] == 1


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_something_else_stays_even_by_force(tmp_path: Path, force: bool) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "thesis.tex").write_text("years of work")
    run = RunFolder(tmp_path / "letters")
    assert refusal(run, RECORD, force=force) == "is no run (it holds no run.json); choose another"
    assert (run.path / "thesis.tex").read_text() == "years of work"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(TrainingError) as caught:
        start(RunFolder(tmp_path / "file"), force=True)
    assert str(caught.value) == f"--out {tmp_path / 'file'}: is a file; choose another name"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"base": "\xff"}'], ids=["empty", "list", "bare", "bytes"])
def test_a_damaged_record_is_one_line(run: RunFolder, content: bytes) -> None:
    file = run.path / "run.json"
    file.write_bytes(content)
    with pytest.raises(TrainingError) as caught:
        start(run)
    line = str(caught.value)
    assert line.startswith(f"{file}: cannot be read: ")
    assert line.endswith("; start anew with --force")


def test_lines_of_steps_that_will_be_done_again_go_and_so_does_half_a_line(run: RunFolder) -> None:
    for step in (2, 3, 4):
        run.add_metrics({"part": "train", "step": step, "loss": 0.5})
        run.add_metrics({"part": "validation", "step": step})
    with run.metrics.open("ab") as file:
        file.write(b'{"part":"train","step":3,"lo')
    run.keep_metrics_until(3)
    assert [(line["part"], line["step"]) for line in run.read_metrics()] == [
        ("train", 1), ("train", 2), ("validation", 2), ("train", 3), ("validation", 3)
    ]  # fmt: skip
    run.keep_metrics_until(0)
    assert run.read_metrics() == []


def test_a_run_without_metrics_has_none_to_keep(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "mine")
    start(run)
    run.keep_metrics_until(5)
    assert not run.metrics.exists()


def test_states_go_when_they_are_no_longer_wanted(run: RunFolder) -> None:
    run.remove_states()
    assert not run.states.exists()
    run.remove_states()


@pytest.mark.parametrize("force", [False, True])
def test_two_trainings_never_share_a_folder(run: RunFolder, force: bool) -> None:
    with RunFolder(run.path) as running:
        running.open(RECORD, force=False)
        line = refusal(RunFolder(run.path), RECORD, force=force)
        assert line == "another training runs in it; wait for it, or choose another"
        assert run.read_metrics() == [{"part": "train", "step": 1}]
    start(run)
