"""The docs say what the code does: pages made from it are current, the others name nothing that is gone."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import pkgutil
import re
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
import typer
from prometheus_client import REGISTRY

import consumers
import streams
from commands.app import app
from commands.demo_clicks_check import expect
from commands.simulate import Truth
from consumers.protocols import Row
from notellm import dead_letter
from notellm.clicks import Click, parse_click
from notellm.errors import InvalidMessage, SettingsError
from notellm.messages import LIMITS, Note, NoteRecord, parse_record
from notellm.settings import StreamsSettings, load_settings, variable_names
from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"


def text_of(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def written() -> list[Path]:
    """Every page that people read, README.md included once it is there."""
    return sorted(DOCS.rglob("*.md")) + [page for page in [REPOSITORY / "README.md"] if page.is_file()]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_generate"] = module  # a dataclass looks for its module there
    spec.loader.exec_module(module)
    return module


def command_parameters() -> Iterator[tuple[str, Any, Any]]:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        for full_name, each in [(name, command)] if inner is None else [(f"{name} {n}", c) for n, c in inner.items()]:
            for parameter in each.params:
                if parameter.name != "help":
                    yield full_name, each, parameter


class TestMadePages:
    def test_are_current(self, generate: ModuleType) -> None:
        stale = [
            str(path)
            for path, text in generate.pages().items()
            if not (REPOSITORY / path).is_file() or (REPOSITORY / path).read_text("utf-8") != text
        ]
        assert stale == [], "out of date; run: make docs"

    def test_say_nothing_of_this_checkout(self, generate: ModuleType) -> None:
        assert [path for path, text in generate.pages().items() if str(REPOSITORY) in text] == []

    def test_check_names_the_page_that_is_out_of_date(
        self, generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        wanted = generate.pages()
        for path, text in wanted.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text, "utf-8")
        monkeypatch.setattr(generate, "pages", lambda: wanted)
        monkeypatch.setattr(generate, "REPOSITORY", tmp_path)
        with pytest.raises(typer.Exit) as good:
            generate.main(check=True)
        assert good.value.exit_code == 0
        (tmp_path / "docs" / "metrics.md").write_text("old", "utf-8")
        with pytest.raises(typer.Exit) as stale:
            generate.main(check=True)
        assert stale.value.exit_code == 1
        assert capsys.readouterr().err.startswith("docs/metrics.md is out of date")
        assert (tmp_path / "docs" / "metrics.md").read_text("utf-8") == "old"


class TestEverythingIsDocumented:
    def test_settings(self) -> None:
        page = text_of("configuration.md")
        assert [name for name, variable in variable_names().items() if f"| `{variable}` |" not in page] == []

    def test_example_file_is_allowed(self, tmp_path: Path) -> None:
        [example] = re.findall(r"```toml\n(.*?)```", text_of("configuration.md"), re.DOTALL)
        file = tmp_path / "notellm.toml"
        file.write_text(example, "utf-8")
        settings = load_settings(file)
        assert settings.kafka.properties == tomllib.loads(example)["kafka"]["properties"]

    def test_properties_that_the_updater_owns(self) -> None:
        [row] = re.findall(r"^\| `properties` \|.*$", text_of("configuration.md"), re.M)
        owned = re.findall(r"`([a-z]+\.[a-z.]+)`", row)
        assert len(owned) == 7
        for name in owned:
            with pytest.raises(SettingsError):
                load_settings(None, {"kafka.properties": {name: "x"}})

    def test_metrics(self, generate: ModuleType) -> None:
        for module in pkgutil.iter_modules(consumers.__path__, "consumers."):
            importlib.import_module(module.name)
        for module in pkgutil.iter_modules(streams.__path__, "streams."):
            with suppress(ModuleNotFoundError):  # the Faust app has an environment of its own
                importlib.import_module(module.name)
        declared = {metric.name.removesuffix("_total"): metric for metric in generate.metrics()}
        registered = {metric.name: metric for metric in REGISTRY.collect() if metric.name.startswith("notellm_")}
        assert set(declared) == set(registered)
        assert {name: metric.kind for name, metric in declared.items()} == {
            name: metric.type for name, metric in registered.items()
        }
        page = text_of("metrics.md")
        assert [metric.name for metric in declared.values() if f"`{metric.name}`" not in page] == []

    def test_commands_and_options(self) -> None:
        sections = dict(re.findall(r"^## notellm ([^\n]+)\n(.*?)(?=^## |\Z)", text_of("commands.md"), re.DOTALL | re.M))
        missing = []
        for name, _, parameter in command_parameters():
            flags = parameter.opts if parameter.param_type_name == "option" else [parameter.name.upper()]
            missing += [f"{name} {flag}" for flag in flags if f"`{flag}`" not in sections.get(name, "")]
        assert missing == []

    def test_every_command_has_an_example_in_its_help(self) -> None:
        without = set()
        for name, command, _ in command_parameters():
            _, _, examples = command.help.partition("Examples:")
            if f"notellm {name}" not in examples:
                without.add(name)
        assert without == set()

    def test_every_option_has_a_variable(self) -> None:
        settings = set(variable_names().values()) | {"NOTELLM_CONFIG"}
        wrong = [
            f"{name} {parameter.opts[0]}"
            for name, _, parameter in command_parameters()
            if parameter.param_type_name == "option"
            and parameter.envvar not in settings
            and not str(parameter.envvar).startswith(("NOTELLM_CLI_", "NOTELLM_EXPORT_"))
        ]
        assert wrong == []

    def test_fields_of_the_collection(self) -> None:
        fields = set(re.findall(r"^\| `(\w+)` \|", text_of("collection.md"), re.M))
        assert fields == {field.name for field in dataclasses.fields(Row)}


class TestMessages:
    def test_example_note_passes_the_door_as_it_is(self) -> None:
        example = re.findall(r"```json\n(.*?)```", text_of("messages.md"), re.DOTALL)[0].encode()
        record = parse_record(b"n1", example, 0)
        assert isinstance(record, NoteRecord)
        assert msgspec.to_builtins(record.note) == json.loads(example)
        assert record.trimmed == ()

    def test_every_field_of_a_note(self) -> None:
        section = text_of("messages.md").split("## A note")[1].split("\n## ")[0]
        rows = dict(re.findall(r"^\| `(\w+)` \|(.*)$", section, re.M))
        assert set(rows) == {field.name for field in msgspec.structs.fields(Note)}
        assert f"1 to {LIMITS.id_bytes} bytes" in rows["note_id"]
        assert f"{LIMITS.title} characters" in rows["title"]
        assert f"{LIMITS.category} characters" in rows["category"]
        assert f"{LIMITS.hashtags} of {LIMITS.hashtag} characters" in rows["hashtags"]
        assert f"{LIMITS.attributes} within {LIMITS.attributes_bytes} bytes" in rows["attributes"]

    def test_example_click_passes_the_door_as_it_is(self) -> None:
        section = text_of("messages.md").split("## A click")[1].split("\n## ")[0]
        [example] = re.findall(r"```json\n(.*?)```", section, re.DOTALL)
        assert msgspec.to_builtins(parse_click(b"u1", example.encode())) == json.loads(example)
        assert re.findall(r"```json\n(.*?)```", text_of("click-streams.md"), re.DOTALL) == [example]
        fields = re.findall(r"^\| `(\w+)` \|", section, re.M)
        assert fields == [field.name for field in msgspec.structs.fields(Click)]

    def test_every_reason_of_a_dead_letter(self) -> None:
        assert set(reasons_in_the_code()) == {row[0].strip("`") for row in reason_rows()}

    def test_examples_become_what_the_table_says(self) -> None:
        for reason, _, key, value, message in reason_rows():
            if value == "a valid note":
                continue
            with pytest.raises(InvalidMessage) as error:
                parse_record(None if key == "none" else key.strip("`").encode(), value.strip("`").encode(), 0)
            assert (f"`{error.value.reason}`", str(error.value)) == (reason, message)

    def test_every_header_of_a_dead_letter(self) -> None:
        written = dead_letter.dead_letter_headers(
            topic="notes", partition=0, offset=1, stage="", reason="", error=ValueError(), model_version="m"
        )
        section = text_of("messages.md").split("### Headers")[1]
        listed = re.findall(r"^\| `([\w.]+)` \|", section, re.M)
        assert listed == [*(name for name, _ in written), dead_letter.VALUE_OMITTED]


class TestClickStreams:
    def test_the_worked_example_is_what_the_formula_gives(self) -> None:
        page = text_of("click-streams.md")
        lines = re.findall(r'^\{"user_id": "u\d", .*\}$', page.split("## Pairs: the formula")[1], re.M)
        clicks = [msgspec.json.decode(line, type=Click) for line in lines]
        truth = [
            Truth("click", click.clicked_at, click.user_id.encode(), line.encode())
            for click, line in zip(clicks, lines, strict=True)
        ]
        pairs = expect(truth, 0, 10_000, clicks_per_day=200).pairs
        assert len(pairs) == 4
        for source, target, score in (
            ("travel", "food", "0.8333"),
            ("travel", "music", "0.3333"),
            ("food", "travel", "0.3333"),
        ):
            units, _, rank = pairs[f"{source}-001", f"{target}-001"]
            assert f"{units / 10**12:.4f}" == score
            assert f"│ {score} │" in page
            assert rank in (1, 2)

    def test_every_rule_and_every_limit(self) -> None:
        page, settings = text_of("click-streams.md"), StreamsSettings()
        section = page.split("## What becomes of a record")[1].split("\n## ")[0]
        outcomes = re.findall(r"^\| ([a-z ]+) \|", section, re.M)[1:]
        assert outcomes == ["dead letter", "forget", "late", "future", "duplicate", "accepted", "evicted"]
        assert (settings.allowed_lateness_s, settings.future_tolerance_s) == (86_400, 300), "a day, 5 minutes"
        assert f"`streams.clicks_per_day` ({settings.clicks_per_day})" in section
        assert f"`streams.session_timeout_s` ({settings.session_timeout_s} s)" in page
        assert f"`streams.stall_s` ({settings.stall_s:.0f} s)" in page
        assert f"127.0.0.1:{settings.port}/metrics" in page
        assert f"127.0.0.1:{settings.port}/metrics" in text_of("metrics.md")


class TestJourney:
    def test_names_what_is_there(self) -> None:
        gone = []
        for file, name in journey_steps():
            names = {child for scope in definitions(REPOSITORY / file) for child in scope}
            if name not in names:
                gone.append(f"{file} {name}")
        assert gone == []

    def test_goes_through_fewer_than_ten_files(self) -> None:
        assert 5 < len({file for file, _ in journey_steps()}) < 10


class TestLinks:
    def test_lead_somewhere(self) -> None:
        broken = []
        for page in written():
            for target in links(page):
                path, _, anchor = target.partition("#")
                file = (page.parent / path).resolve() if path else page
                if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
                    broken.append(f"{page.relative_to(REPOSITORY)}: {target}")
        assert broken == []

    def test_every_page_of_docs_can_be_reached(self) -> None:
        readme = REPOSITORY / "README.md"
        if not readme.is_file():
            pytest.skip("README.md is not there")
        reached, left = set(), [readme]
        while left:
            page = left.pop()
            if page in reached or not page.is_file() or page.suffix != ".md":
                continue
            reached.add(page)
            left += [(page.parent / target.partition("#")[0]).resolve() for target in links(page)]
        pages = {page for page in written() if "adr" not in page.parts}
        assert sorted(str(page.relative_to(REPOSITORY)) for page in pages - reached) == []


def reason_rows() -> list[list[str]]:
    """reason, when, key, value, what the header says."""
    section = text_of("messages.md").split("## Dead letters")[1].split("### Headers")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def reasons_in_the_code() -> Iterator[str]:
    """First argument of every InvalidMessage, and every literal ``reason=``."""
    doors = [REPOSITORY / "notellm" / name for name in ("decoding.py", "messages.py", "clicks.py")]
    for file in [*doors, *sorted((REPOSITORY / "consumers").glob("*.py"))]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            match node:
                case ast.Call(func=ast.Name(id="InvalidMessage"), args=[ast.Constant(value=str(reason)), *_]):
                    yield reason
                case ast.keyword(arg="reason", value=ast.Constant(value=str(reason))):
                    yield reason


def journey_steps() -> list[tuple[str, str]]:
    """`path/to/file.py` `Name.method`, in order."""
    return re.findall(r"`([\w/]+\.py)`\s+`([\w.]+)`", text_of("journey.md"))


def definitions(file: Path) -> Iterator[list[str]]:
    """Names that a file defines: functions, classes, and their methods as Class.method."""
    tree = ast.parse(file.read_text("utf-8"))
    yield [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield [f"{node.name}.{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)]


def links(page: Path) -> list[str]:
    """Relative targets of links and pictures; code is left out."""
    prose = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.M)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    found = re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", prose)
    found += re.findall(r"(?:src|href)=\"([^\"]+)\"", prose)
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Headings, as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
