from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch

from export import build
from export.architectures import Architecture
from export.graph import trace
from tests.export.families import save_family
from tests.export.tiny import Tiny
from training.model import NoteLLM


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Matrices this small only wait for other threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["tied", "untied"])
def either(request: pytest.FixtureRequest) -> Tiny:
    """Each of the two in turn."""
    exported: Tiny = request.getfixturevalue(request.param)
    return exported


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint of a family, made once."""
    folder = tmp_path_factory.mktemp("families")

    def made(model_type: str) -> Path:
        path = folder / model_type
        return path if path.is_dir() else save_family(path, model_type)

    return made


@pytest.fixture(scope="session")
def traced() -> dict[tuple[str, str], ir.Model]:
    """Graphs that were traced already, by family and type; see ``trace_once``."""
    return {}


@pytest.fixture
def trace_once(traced: dict[tuple[str, str], ir.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes seconds, and int8 and int4 begin with the very graph of fp32."""

    def remembered(model: NoteLLM, architecture: Architecture) -> ir.Model:
        key = (architecture.name, str(model.base.dtype))
        if key not in traced:
            traced[key] = trace(model, architecture)
        return traced[key].clone()

    monkeypatch.setattr(build, "trace", remembered)
