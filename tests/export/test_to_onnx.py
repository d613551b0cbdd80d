"""The command: what it prints, and one line for whatever is wrong."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer
from typer.testing import CliRunner, Result

import export.build
from export.errors import ParityError
from export.to_onnx import export as command
from export.to_onnx import parity_table
from notellm.bundle import Manifest, ParityReport, ParityRow
from notellm.categories import read_categories
from notellm.errors import NoteLLMError
from tests.conftest import REPOSITORY
from tests.export.tiny import Tiny

SUPPORTED = "Llama (llama), Qwen2 (qwen2), Qwen3 (qwen3), Mistral (mistral), Gemma 3 (text) (gemma3_text), Phi-3 (phi3)"
SCRIPT = REPOSITORY / "export" / "to_onnx.py"


def run(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(result: Result) -> str:
    """The one line that the command ended with; an exception that escaped would be a traceback."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    return line


def test_help_works_from_any_folder_and_shows_examples(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, SCRIPT, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert "python export/to_onnx.py --model smollm2 --out build/bundles/default" in shown


def test_help_shows_the_examples_as_a_command_of_notellm_too() -> None:
    app = typer.Typer(rich_markup_mode=None)
    app.command("export")(command)
    app.command("other")(lambda: None)
    shown = CliRunner().invoke(app, ["export", "--help"]).output
    lines = [line.strip() for line in shown.splitlines()]
    assert "python export/to_onnx.py --model smollm2 --out build/bundles/default" in lines
    assert "notellm export --model ./my-llama --out bundles/mine --template zh" in lines


def test_an_unknown_architecture_ends_the_process_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    ended = subprocess.run(
        [sys.executable, SCRIPT, "--model", tmp_path, "--out", tmp_path / "bundle"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr == "error: architecture 'gpt2' is not supported; supported: " + SUPPORTED + "\n"
    assert ended.stdout == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.json"]


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    result = run("--model", missing, "--out", tmp_path / "bundle")
    assert error_of(result) == f"error: model '{missing}': there is no such directory"


def test_an_out_that_is_there_is_refused_without_force(tied: Tiny) -> None:
    result = run("--model", tied.checkpoint, "--out", tied.bundle)
    assert error_of(result) == f"error: --out {tied.bundle}: already there; give --force to replace it"


def test_an_out_that_cannot_be_made_is_one_line(tied: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("--model", tied.checkpoint, "--out", tmp_path / "file" / "bundle")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: [Errno ")


def test_an_unknown_template_is_one_line_that_names_the_known_ones(tmp_path: Path) -> None:
    result = run("--model", "smollm2", "--out", tmp_path / "bundle", "--template", "fr")
    assert error_of(result) == "error: template: 'fr' is not known; allowed are en, zh"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no line"),
        (b"\n \n", "no line"),
        (b"travel\nfood\ntravel\n", "'travel' stands there twice"),
        (b"Travel\ntravel\n", "'Travel' stands there twice"),
        ("Ａrt\nart\n".encode(), "'Ａrt' stands there twice"),
        (b"x" * 129, "more than 128 characters"),
        (b"\xff\xfe", "cannot be read as UTF-8 text"),
    ],
)
def test_a_bad_categories_file_is_one_line(tmp_path: Path, content: bytes, complaint: str) -> None:
    file = tmp_path / "categories.txt"
    file.write_bytes(content)
    line = error_of(run("--model", "smollm2", "--out", tmp_path / "bundle", "--categories", file))
    assert line.startswith(f"error: --categories {file}: ")
    assert complaint in line


def test_categories_are_the_lines_that_are_not_blank(tmp_path: Path) -> None:
    file = tmp_path / "categories.txt"
    file.write_bytes("\ufeffart\r\n\r\n art history \n旅行".encode())
    assert read_categories(file) == ["art", "art history", "旅行"]


def test_a_categories_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NoteLLMError, match=r"--categories .*nowhere: cannot be read"):
        read_categories(tmp_path / "nowhere")


def test_without_torch_the_line_names_the_extras_with_their_brackets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "export.build")
    monkeypatch.setitem(sys.modules, "onnx", None)
    line = error_of(run("--model", "smollm2", "--out", tmp_path / "bundle"))
    assert line == "error: export needs onnx; install: pip install 'notellm[train,cpu]'"


def test_a_failed_proof_shows_its_rows_and_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = ParityReport("cpu", [ParityRow("logits", 1e-6, 1e-3, True), ParityRow("embeddings", 0.25, 1e-5, False)])

    def fail(*args: Any, **options: Any) -> Manifest:
        raise ParityError(report)

    monkeypatch.setattr(export.build, "build_bundle", fail)
    result = run("--model", "smollm2", "--out", tmp_path / "bundle")
    assert result.exit_code == 1
    (row,) = [line for line in result.stderr.splitlines() if "FAILED" in line]
    assert "embeddings" in row
    assert "0.25" in row
    assert result.stderr.splitlines()[-1] == "error: parity failed (embeddings); no bundle was written"


def test_each_step_leaves_a_line_with_its_seconds_where_there_is_no_terminal(
    tied: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def two_steps(plan: Any, *, step: Any, say: Any) -> Manifest:
        with step("loading"):
            pass
        with contextlib.suppress(ValueError), step("never done"):
            raise ValueError
        with step("tracing"):
            pass
        return tied.manifest

    monkeypatch.setattr(export.build, "build_bundle", two_steps)
    result = run("--model", "smollm2", "--out", tmp_path / "bundle")
    assert result.exit_code == 0
    assert result.stderr.splitlines()[:2] == ["loading: 0.0 s", "tracing: 0.0 s"]
    assert f"model_version {tied.manifest.model_version}" in " ".join(result.stderr.split())


def test_an_unproven_bundle_is_warned_of_in_lines_that_keep_their_brackets(
    tied: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unproven(plan: Any, *, step: Any, say: Any) -> Manifest:
        assert (plan.precision, plan.provider, plan.graph) == ("fp16", "cuda", "traced")
        say("warning: parity on cuda is UNPROVEN: install: pip install 'notellm[gpu]'")
        parity = ParityReport("cuda", [], "unproven")
        return msgspec.structs.replace(tied.manifest, parity=parity, parity_elsewhere=[tied.manifest.parity])

    monkeypatch.setattr(export.build, "build_bundle", unproven)
    result = run("--model", "smollm2", "--out", tmp_path / "b", "--precision", "fp16", "--provider", "cuda")
    assert result.exit_code == 0
    lines = result.stderr.splitlines()
    assert lines[0] == "warning: parity on cuda is UNPROVEN: install: pip install 'notellm[gpu]'"
    titles = [line.strip() for line in lines if "parity with torch" in line]
    assert titles == ["parity with torch, on cpu"]
    assert "for cuda (UNPROVEN there)" in " ".join(result.stderr.split())


def test_a_row_that_is_only_stated_has_no_verdict_unless_it_is_no_number() -> None:
    report = ParityReport(
        "cpu",
        [ParityRow("share", 0.9, None, True, at_least=True), ParityRow("cosine", 0.5, 0.999, False, at_least=True)],
    )
    verdict = parity_table(report).columns[3]
    assert list(verdict.cells) == ["", "[red]FAILED[/]"]
    assert list(parity_table(report).columns[2].cells) == ["", ">= 0.999"]


@pytest.mark.parametrize(("flag", "value"), [("--precision", "fp8"), ("--provider", "tpu"), ("--graph", "drawn")])
def test_a_value_that_is_not_allowed_is_refused_with_those_that_are(tmp_path: Path, flag: str, value: str) -> None:
    result = run("--model", "smollm2", "--out", tmp_path / "b", flag, value)
    assert result.exit_code == 2
    assert value in result.stderr
    assert flag in result.stderr
