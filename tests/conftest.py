"""What every test may use: servers that start on demand, and the rule for those that cannot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from commands.embedded import EmbeddedKafka, MilvusLite

if TYPE_CHECKING:
    from tests.export.tiny import Tiny

REPOSITORY = Path(__file__).parent.parent


def missing(reason: str) -> None:
    """A server, program or bundle that a test needs is not here: a failure in CI, a skip on a laptop."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason} (CI is set, so this is a failure)")
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own NOTELLM_ variables must not decide a test."""
    for name in list(os.environ):
        if name.startswith("NOTELLM_"):
            monkeypatch.delenv(name)


@pytest.fixture
def milvus_lite(tmp_path: Path) -> Iterator[MilvusLite]:
    """A fresh Milvus Lite server."""
    server = MilvusLite(tmp_path / "milvus", log=tmp_path / "milvus.log")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def embedded_kafka() -> EmbeddedKafka:
    """A fresh built-in Kafka cluster with the project's topics."""
    kafka = EmbeddedKafka()
    kafka.create_topics("notes", "notes.dead-letter")
    return kafka


@pytest.fixture(scope="session")
def real_bundle() -> Path:
    """The exported smollm2; ``make test`` makes it."""
    path = REPOSITORY / "build" / "bundle"
    if not (path / "notellm.json").is_file():
        missing("build/bundle is not there; make it with: make bundle")
    return path


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny random Llama with tied embeddings and no projection, exported for real."""
    from tests.export.tiny import tiny  # torch, which most tests never load

    return tiny(tmp_path_factory.getbasetemp(), tied=True)


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Another, with untied embeddings and a projection."""
    from tests.export.tiny import tiny

    return tiny(tmp_path_factory.getbasetemp(), tied=False)


@pytest.fixture(scope="session")
def tiny_bundle(untied: Tiny) -> Path:
    """A real bundle: hundreds of notes a second."""
    return untied.bundle


@pytest.fixture(scope="session")
def other_bundle(tied: Tiny) -> Path:
    """A bundle of another model than ``tiny_bundle``."""
    return tied.bundle
