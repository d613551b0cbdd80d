"""docker-compose.yml as Compose reads it: variables filled in, in every string."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from tests.conftest import REPOSITORY

__all__ = ["COMPOSE_FILE", "compose_file", "variables"]

COMPOSE_FILE = REPOSITORY / "docker-compose.yml"

# $$ is a dollar sign; ${NAME:-default} is all that the file uses, and what else there might be is named.
_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<name>\w+):-(?P<default>[^}]*)\}|(?P<other>.{0,20}))", re.S)


def compose_file(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The file, with ``environment`` where it has a variable, else with the default."""
    document: dict[str, Any] = _filled_in(yaml.safe_load(COMPOSE_FILE.read_text("utf-8")), environment or {})
    return document


def variables() -> dict[str, set[str]]:
    """Every variable and the defaults that the file gives it."""
    found: dict[str, set[str]] = {}
    for match in _VARIABLE.finditer(COMPOSE_FILE.read_text("utf-8")):
        if match["name"]:
            found.setdefault(match["name"], set()).add(match["default"])
    return found


def _filled_in(value: Any, environment: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled_in(content, environment) for key, content in value.items()}
    if isinstance(value, list):
        return [_filled_in(content, environment) for content in value]
    if not isinstance(value, str):
        return value

    def fill_in(match: re.Match[str]) -> str:
        if match["other"] is not None:
            raise ValueError(f"docker-compose.yml: ${match['other']!r} is no ${{NAME:-default}}")
        return "$" if match["dollar"] else environment.get(match["name"], match["default"])

    return _VARIABLE.sub(fill_in, value)
