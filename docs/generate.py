"""Pages that are made from the code: ``python docs/generate.py`` writes them, ``--check`` names those out of date.

docs/configuration.md, docs/commands.md, docs/metrics.md and docs/schemas/*.json. The prose of the pages stands below;
every table, and each schema, comes from the code.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import typer
from pydantic import SecretStr

from commands.app import app
from notellm.clicks import Click
from notellm.messages import Note, NoteVector
from notellm.settings import Settings, variable_names

__all__ = [
    "Metric",
    "click_schema",
    "commands_page",
    "configuration_page",
    "metrics",
    "metrics_page",
    "note_schema",
    "note_vector_schema",
    "pages",
]

REPOSITORY = Path(__file__).resolve().parent.parent
_MADE = "<!-- Made by docs/generate.py; edit that, or the code it reads. -->"

# What a validator allows cannot be read from a type. A validator without a line here stops this program.
_IN_WORDS = {
    "kafka.dead_letter_topic": "another topic than `kafka.notes_topic`",
    "streams.dead_letter_topic": "another topic than `streams.clicks_topic`",
    "kafka.properties": (
        "librdkafka's names, but for `bootstrap.servers`, `group.id`, `enable.auto.commit`, `enable.auto.offset.store` "
        "and `auto.offset.reset`, which the updater sets itself, and for `partition.assignment.strategy` and "
        "`group.instance.id`, which are settings of their own"
    ),
    "milvus.uri": "begins with `http://` or `https://`",
}

_CONFIGURATION = """\
# Configuration

A value comes from, the later winning: the defaults below, a TOML file, the environment, flags.

- **File**: `--config FILE`, else the file that `NOTELLM_CONFIG` names, else `notellm.toml` in the working directory,
  where there is one. Each section below is a table of it.
- **Environment**: one variable per setting, `NOTELLM_<SECTION>_<NAME>`.
- **Flags**: `--kafka`, `--milvus`, `--bundle` and `--provider`, where a command has them; see [commands](commands.md).

A name that is not on this page, in the file or in the environment, stops the start; so does a value that is wrong:

```
NOTELLM_KAFKA_TOPIC: unknown setting in the environment; see docs/configuration.md for those there are
updater.batch_notes (NOTELLM_UPDATER_BATCH_NOTES): '0' is not allowed: Input should be greater than or equal to 1
```

```toml
# notellm.toml
[kafka]
bootstrap_servers = "kafka-1:9092,kafka-2:9092"

[kafka.properties]              # any librdkafka property; a name with dots needs its quotes
"security.protocol" = "SASL_SSL"
"sasl.mechanism" = "SCRAM-SHA-512"
"sasl.username" = "notellm"
"sasl.password" = "..."

[milvus]
uri = "http://milvus:19530"
database = "recommendations"

[encoder]
bundle = "bundles/2026-11"
provider = "cuda"
```

**Secrets** are `milvus.token` and what `kafka.properties` holds, such as `sasl.password`. They come from the
environment or the file, never from a flag: every user of the machine could read that in the list of processes. A line
about a wrong setting never shows their value. A file with a password in it is for its owner alone
(`chmod 600 notellm.toml`).

```sh
export NOTELLM_MILVUS_TOKEN=notellm:...
```

`kafka.properties` is the one setting that the environment gives as JSON. It replaces the file's table as a whole, so
give all of it in one place:

```sh
export NOTELLM_KAFKA_PROPERTIES='{"security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN",
  "sasl.username": "notellm", "sasl.password": "..."}'
```

`notellm check` reads all of it, reaches Kafka, Milvus and the bundle, and says what is wrong with each.
"""

_COMMANDS = """\
# Commands

`notellm COMMAND --help` says the same. Results go to standard output, all else to standard error. The exit status is 1
when something is wrong, and a line says what. Every option can be given by the environment instead: a variable that
sets a [setting](configuration.md) is named after it, the others begin with `NOTELLM_CLI_` or `NOTELLM_EXPORT_`. A flag
wins.
"""

_METRICS = """\
# Metrics

Prometheus metrics, each declared beside what it measures. `notellm update` serves those of consumers/ on
`http://127.0.0.1:9464/metrics` (settings `operations.host` and `operations.port`), beside `/healthz` and `/readyz`;
what to watch is in [operations.md](operations.md). A worker of the [click streams](click-streams.md) serves those of
streams/ on `http://127.0.0.1:9466/metrics` (`operations.host` and `streams.port`). A histogram `NAME` is read as
`NAME_bucket`, `NAME_sum` and `NAME_count`.

The encoder's process has the usual process metrics under `notellm_encoder_process_...`, memory among them
(`notellm_encoder_process_resident_memory_bytes`); the updater's own are `process_...`.

`operation` is `upsert` or `delete`, `reason` one of the [reasons of dead letters](messages.md#dead-letters), `field`
one of a [note's fields](messages.md#a-note).
"""


def pages() -> dict[Path, str]:
    """Every page that is made here, by its path from the repository's root."""
    return {
        Path("docs/configuration.md"): configuration_page(),
        Path("docs/commands.md"): commands_page(),
        Path("docs/metrics.md"): metrics_page(),
        Path("docs/schemas/click.json"): _json(click_schema()),
        Path("docs/schemas/note.json"): _json(note_schema()),
        Path("docs/schemas/note-vector.json"): _json(note_vector_schema()),
    }


def configuration_page() -> str:
    parts = [_MADE, _CONFIGURATION]
    variables = variable_names()
    for section, field in Settings.model_fields.items():
        model: Any = field.annotation
        properties = model.model_json_schema()["properties"]
        _refuse_unexplained_validators(section, model)
        rows = [
            [
                f"`{name}`",
                f"`{variables[f'{section}.{name}']}`",
                _type(schema),
                _default(model.model_fields[name].get_default(call_default_factory=True)),
                _allowed(f"{section}.{name}", schema),
                _prose(schema["description"]),
            ]
            for name, schema in properties.items()
        ]
        parts.append(f"## [{section}]\n\n{inspect.getdoc(model)}\n")
        parts.append(_table(["name", "variable", "type", "default", "allowed", "what it is"], rows))
    return "\n".join(parts)


def commands_page() -> str:
    parts = [_MADE, _COMMANDS]
    for name, command in _commands().items():
        text, examples = _help_and_examples(command.help)
        usage = " ".join(
            ["notellm", name, "[OPTIONS]"]
            + [f"[{parameter.name.upper()}]" for parameter in command.params if parameter.param_type_name == "argument"]
        )
        rows = [
            [
                ", ".join(f"`{flag}`" for flag in _flags(parameter)),
                _kind(command, parameter),
                _option_default(parameter),
                f"`{parameter.envvar}`" if parameter.envvar else "",
                _prose(parameter.help),
            ]
            for parameter in command.params
            if parameter.name != "help"
        ]
        parts.append(f"## notellm {name}\n\n```\n{usage}\n```\n\n{text}\n\n```sh\n{examples}\n```\n")
        parts.append(_table(["option", "value", "default", "variable", "what it is"], rows))
    return "\n".join(parts)


@dataclass(frozen=True)
class Metric:
    """As it is declared. ``labels`` maps a label to the values that the code gives it, where those are fixed."""

    file: str
    name: str
    kind: str
    help: str
    labels: dict[str, list[str]]


def metrics() -> list[Metric]:
    """Every metric that is declared in consumers/ and streams/, by name."""
    return sorted(
        (
            metric
            for folder in ("consumers", "streams")
            for file in sorted((REPOSITORY / folder).glob("*.py"))
            for metric in _declared(f"{folder}/{file.name}", ast.parse(file.read_text("utf-8")))
        ),
        key=lambda metric: metric.name,
    )


def metrics_page() -> str:
    rows = [
        [
            f"`{metric.name}`",
            metric.kind,
            "; ".join(
                f"`{label}`" + (": " + ", ".join(f"`{value}`" for value in values) if values else "")
                for label, values in metric.labels.items()
            ),
            metric.help,
            f"[{metric.file}](../{metric.file})",
        ]
        for metric in metrics()
    ]
    return "\n".join([_MADE, _METRICS, _table(["name", "type", "labels", "what it is", "declared in"], rows)])


def note_schema() -> dict[str, Any]:
    """JSON Schema of a note's value. Sizes that are cut, not refused, stand in the descriptions only."""
    schema = _schema(Note)
    # -1 is the code's word for "missing", and no value that a message may have.
    del schema["properties"]["published_at"]["default"]
    return schema


def click_schema() -> dict[str, Any]:
    """JSON Schema of a click's value."""
    return _schema(Click)


def note_vector_schema() -> dict[str, Any]:
    """JSON Schema of a note vector's value."""
    return _schema(NoteVector)


def _schema(message: type[msgspec.Struct]) -> dict[str, Any]:
    (_,), components = msgspec.json.schema_components([message], ref_template="#/$defs/{name}")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **components[message.__name__]}


def _json(schema: dict[str, Any]) -> str:
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _refuse_unexplained_validators(section: str, model: Any) -> None:
    for decorator in model.__pydantic_decorators__.field_validators.values():
        for name in decorator.info.fields:
            if f"{section}.{name}" not in _IN_WORDS:
                raise ValueError(f"docs/generate.py: say in _IN_WORDS what the validator of {section}.{name} allows")


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return "choice"
    named = {"integer": "integer", "number": "number", "boolean": "true or false", "object": "table"}
    formats = {"path": "path", "password": "secret text"}
    return formats.get(schema.get("format", ""), named.get(schema["type"], "text"))


def _default(value: Any) -> str:
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if value is None or value in ("", {}, []):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _allowed(setting: str, schema: dict[str, Any]) -> str:
    if setting in _IN_WORDS:
        return _IN_WORDS[setting]
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "pattern" in schema:
        return f"`{schema['pattern']}`"
    if schema.get("minLength"):
        return "not empty"
    low, above, high = schema.get("minimum"), schema.get("exclusiveMinimum"), schema.get("maximum")
    bounds = {"from {:g}": low, "above {:g}": above, "to {}": high}
    return " ".join(words.format(bound) for words, bound in bounds.items() if bound is not None)


def _commands() -> dict[str, Any]:
    """``check``, ``pairs refresh``, ..."""
    group: Any = typer.main.get_command(app)
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        for below, inner in getattr(command, "commands", {}).items():
            found[f"{name} {below}"] = inner
        if not hasattr(command, "commands"):
            found[name] = command
    return found


def _help_and_examples(text: str) -> tuple[str, str]:
    """A command's help without its examples, and the examples."""
    before, marker, after = text.replace("\b\n", "").partition("Examples:")
    examples = [line.strip() for line in after.splitlines() if line.strip()]
    if not marker or not examples:
        raise ValueError(f"no examples in the help that begins {text[:40]!r}")
    return before.strip(), "\n".join(examples)


def _flags(parameter: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        return [parameter.name.upper()]
    return sorted([*parameter.opts, *parameter.secondary_opts], key=len, reverse=True)


def _kind(command: Any, parameter: Any) -> str:
    """``Annotated[list[str] | None, ...]`` -> ``text, repeatable``."""
    annotation = inspect.signature(command.callback, eval_str=True).parameters[parameter.name].annotation
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if inspect.isclass(annotation) and issubclass(annotation, Enum):
        return ", ".join(f"`{choice.value}`" for choice in annotation)
    wanted = [part for part in get_args(annotation) if part is not type(None)] or [annotation]
    repeatable = get_origin(wanted[0]) is list or get_origin(annotation) is list
    inner = (get_args(wanted[0]) or wanted)[0] if repeatable else wanted[0]
    kind = {str: "text", int: "integer", float: "number", Path: "path", bool: "flag"}[inner]
    if parameter.min is not None:
        kind += f", {parameter.min} to {parameter.max}" if parameter.max is not None else f", from {parameter.min}"
    return kind + (", repeatable" if repeatable else "")


def _option_default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if isinstance(value, Path) and value.is_relative_to(REPOSITORY):
        value = value.relative_to(REPOSITORY)  # nothing here may say where this checkout stands
    return "" if value is False else _default(value)


def _declared(file: str, tree: ast.Module) -> Iterator[Metric]:
    for node in tree.body:
        call = node.value if isinstance(node, ast.Assign) else None
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        kind = call.func.id
        if kind not in ("Counter", "Gauge", "Histogram", "Summary", "Info", "Enum"):
            continue
        assert isinstance(node, ast.Assign)
        assert isinstance(node.targets[0], ast.Name)
        name, what, *rest = (ast.literal_eval(argument) for argument in call.args)
        labels = {label: _label_values(tree, node.targets[0].id, place) for place, label in enumerate(*rest or [[]])}
        yield Metric(file, name, kind.lower(), what, labels)


def _label_values(tree: ast.Module, variable: str, place: int) -> list[str]:
    """The literal values of a label, in order; none where one of them is computed."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="labels", value=ast.Name(id=name)), args=args) if name == variable:
                match args[place]:
                    case ast.Constant(value=str(value)):
                        found.add(value)
                    case _:
                        return []
    return sorted(found)


def _prose(text: str) -> str:
    """``<prefix>`` would be taken for HTML."""
    return text.replace("<", "\\<")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    # A bar would end the cell, in code too.
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit status 1 names the pages that are out of date.")
    ] = False,
) -> None:
    """Write the pages that are made from the code."""
    stale = 0
    for path, text in pages().items():
        file = REPOSITORY / path
        if file.is_file() and file.read_text("utf-8") == text:
            continue
        stale += 1
        if check:
            typer.echo(f"{path} is out of date; run: make docs", err=True)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, "utf-8")
            typer.echo(f"wrote {path}")
    raise typer.Exit(1 if check and stale else 0)


if __name__ == "__main__":
    typer.run(main)
