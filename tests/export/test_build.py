"""A bundle is there whole and proven, or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from export import build
from export.errors import ExportError, ParityError
from export.work_folder import work_folder
from notellm.bundle import MANIFEST, Manifest, open_bundle
from notellm.errors import BundleError
from notellm.prompt import PromptLimits
from tests.conftest import REPOSITORY
from tests.export.tiny import Tiny, plan, run_export


@pytest.fixture
def graph_of_the_tied_bundle(tied: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of tracing, which takes seconds, the export takes the graph that was traced of the tied checkpoint."""

    def copy(plan: Any, checkpoint: Any, draft: Manifest, path: Path, step: Any) -> Manifest:
        for file in tied.bundle.glob("model.onnx*"):
            shutil.copy(file, path.with_name(file.name))
        return draft

    monkeypatch.setattr(build, "_write_graph", copy)


@pytest.fixture
def other_weights(tied: Tiny, tmp_path: Path) -> Path:
    """The tied checkpoint, but for one matrix that is a little different."""
    folder = shutil.copytree(tied.checkpoint, tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"] *= 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def content(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_an_export_makes_a_bundle_that_opens_and_nothing_else(either: Tiny) -> None:
    assert open_bundle(either.bundle).manifest == either.manifest
    assert sorted(entry.name for entry in either.bundle.parent.iterdir()) == ["bundle", "tiny-llama"]
    assert set(either.manifest.made_with) == {"onnx", "onnxruntime", "tokenizers", "torch", "transformers"}


@pytest.mark.usefixtures("graph_of_the_tied_bundle")
def test_a_graph_of_other_weights_fails_the_proof_and_leaves_nothing(other_weights: Path, tmp_path: Path) -> None:
    parent = tmp_path / "bundles"
    with pytest.raises(ParityError, match=r"parity failed \(embeddings, .*\); no bundle was written") as caught:
        run_export(plan(other_weights, parent / "bundle"))
    assert not caught.value.report.passed
    assert list(parent.iterdir()) == []


@pytest.mark.usefixtures("graph_of_the_tied_bundle")
def test_a_failed_replacement_leaves_the_old_bundle_as_it_was(tied: Tiny, other_weights: Path, tmp_path: Path) -> None:
    out = shutil.copytree(tied.bundle, tmp_path / "bundles" / "bundle")
    before = content(out)
    with pytest.raises(ParityError):
        run_export(plan(other_weights, out, replace=True))
    assert content(out) == before
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.usefixtures("graph_of_the_tied_bundle")
def test_a_replacement_leaves_no_trace_of_the_old_bundle(tied: Tiny, untied: Tiny, tmp_path: Path) -> None:
    out = shutil.copytree(untied.bundle, tmp_path / "bundles" / "bundle")
    (out / "left-over").touch()
    manifest = run_export(plan(tied.checkpoint, out, replace=True))
    assert open_bundle(out).manifest == manifest
    assert manifest.files["model.onnx.data"] == tied.manifest.files["model.onnx.data"]
    assert "left-over" not in content(out)
    assert list(out.parent.iterdir()) == [out]


def test_a_bundle_that_is_there_is_not_replaced_unasked(tied: Tiny) -> None:
    with pytest.raises(ExportError, match="already there; give --force to replace it"):
        run_export(plan(tied.checkpoint, tied.bundle))


def test_what_is_not_a_bundle_is_never_replaced(tied: Tiny, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match=f"is not a bundle \\(it holds no {MANIFEST}\\)"):
        run_export(plan(tied.checkpoint, tmp_path, replace=True))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_prompt_longer_than_the_model_reads_is_refused_before_the_tracing(
    tied: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "trace", lambda *_: pytest.fail("it was traced"))
    with pytest.raises(BundleError, match=r"the model reads 1024; export it with a smaller --note-tokens"):
        run_export(replace(plan(tied.checkpoint, tmp_path / "bundle"), prompt_limits=PromptLimits(note=1000)))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    tied: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.build.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ExportError, match=r"0\.0 GB are free there"):
        run_export(plan(tied.checkpoint, tmp_path / "bundle"))
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_killed_leaves_nothing_and_the_next_one_sweeps_up(tied: Tiny, tmp_path: Path) -> None:
    out, partial = tmp_path / "bundle", tmp_path / ".bundle.partial"
    for number in (signal.SIGTERM, signal.SIGKILL):
        shutil.rmtree(partial, ignore_errors=True)
        process = subprocess.Popen(
            [sys.executable, "export/to_onnx.py", "--model", tied.checkpoint, "--out", out],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        # The tokenizer is there when the tracing begins, which takes seconds.
        while not (partial / "parity.npz").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(number)
        assert process.wait(30) == -number
        assert not out.exists()
        assert partial.exists()
    (partial / "half-written").touch()

    manifest = run_export(plan(tied.checkpoint, out))

    assert open_bundle(out).manifest == manifest
    assert "half-written" not in content(out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]
    # And two whole exports of one checkpoint agree.
    assert manifest.model_version == tied.manifest.model_version


# Two at a time


@pytest.mark.usefixtures("graph_of_the_tied_bundle")
def test_a_second_export_to_the_same_place_ends_with_one_line_and_harms_nothing(tied: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with work_folder(out) as work:
        (work / "half-written").touch()
        with pytest.raises(ExportError, match=r"another export is writing it at this moment"):
            run_export(plan(tied.checkpoint, out))
        assert (work / "half-written").exists()
    assert list(tmp_path.iterdir()) == []
    assert run_export(plan(tied.checkpoint, out)).model_version == tied.manifest.model_version


def test_the_lock_holds_between_processes(tmp_path: Path) -> None:
    program = "import sys\nfrom pathlib import Path\nfrom export.work_folder import work_folder\n"
    program += "with work_folder(Path(sys.argv[1])):\n    print('mine', flush=True)\n    sys.stdin.read()\n"
    command = [sys.executable, "-c", program, tmp_path / "bundle"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(ExportError, match=r"another export"), work_folder(tmp_path / "bundle"):
            pytest.fail("both have it")
        other.kill()
        other.wait(30)
        with work_folder(tmp_path / "bundle") as work:
            assert list(work.iterdir()) == []


def test_a_folder_that_was_renamed_away_between_opening_and_locking_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    honest = fcntl.flock

    def late(lock: int, kind: int) -> None:
        (tmp_path / ".bundle.partial").rename(out)
        (out / MANIFEST).touch()
        honest(lock, kind)

    monkeypatch.setattr("export.work_folder.fcntl.flock", late)
    with pytest.raises(ExportError, match=r"another export"), work_folder(out):
        pytest.fail("it swept a finished bundle")
    assert (out / MANIFEST).exists()


def test_a_bundle_holds_no_path_of_this_machine(tied: Tiny) -> None:
    graph = (tied.bundle / "model.onnx").read_bytes()
    assert str(REPOSITORY).encode() not in graph
    assert b"site-packages" not in graph
