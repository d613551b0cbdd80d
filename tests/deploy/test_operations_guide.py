"""docs/operations.md names metrics, settings and reasons that there are, and leaves out no metric."""

from __future__ import annotations

import ast
import os
import re

import pytest
from prometheus_client.process_collector import ProcessCollector

from notellm.errors import InvalidMessage
from notellm.messages import parse_record
from notellm.settings import variable_names
from tests.conftest import REPOSITORY

GUIDE = (REPOSITORY / "docs" / "operations.md").read_text("utf-8")


def declared_metrics() -> set[str]:
    """The first argument of every Counter, Gauge and Histogram in consumers/."""
    return {
        str(node.args[0].value)
        for file in (REPOSITORY / "consumers").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in ("Counter", "Gauge", "Histogram")
        and isinstance(node.args[0], ast.Constant)
    }


def test_it_names_every_metric_and_no_other() -> None:
    named = set(re.findall(r"\bnotellm_[a-z_]+", GUIDE))
    of_the_encoder = {metric.name for metric in ProcessCollector("notellm_encoder", os.getpid, registry=None).collect()}
    assert len(declared_metrics()) > 10
    assert declared_metrics() <= named
    assert named <= declared_metrics() | of_the_encoder


def test_its_settings_are_settings() -> None:
    named = set(re.findall(r"`((?:kafka|milvus|encoder|updater|operations)\.[a-z_]+)\b", GUIDE))
    assert len(named) > 10
    assert named <= set(variable_names())
    variables = set(re.findall(r"NOTELLM_[A-Z_]+", GUIDE))
    assert variables <= set(variable_names().values())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (None, b"{}"),
        (b"n1", b'{"note_id": 7}'),
        (b"n1", b'{"note_id": "n2", "title": "x"}'),
        (b"n1", b"{"),
        (b"n1", b"null"),
        (b"n1", b'{"note_id": "n1", "title": 1}'),
        (b"n1", b'{"note_id": "n1", "title": "x", "attributes": {"a": 1e999}}'),
        (b"n1", b'{"note_id": "n1"}'),
    ],
)
def test_it_explains_the_reason(key: bytes | None, value: bytes) -> None:
    with pytest.raises(InvalidMessage) as caught:
        parse_record(key, value, 0)
    assert f"`{caught.value.reason}`" in GUIDE


def test_it_explains_no_reason_that_there_is_not() -> None:
    code = "".join(
        path.read_text("utf-8") for folder in ("notellm", "consumers") for path in (REPOSITORY / folder).glob("*.py")
    )
    table = GUIDE[GUIDE.index("| `notellm.reason`") :].split("\n\n")[0]
    reasons = set(re.findall(r"`([a-z]+_[a-z]+)`", table))
    assert len(reasons) == 11
    assert {reason for reason in reasons if f'"{reason}"' not in code} == set()
