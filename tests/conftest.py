"""What every test may use: servers that start on demand, and the rule for those that cannot.

All of it runs in a network of its own (see :mod:`tests.support.private_network`), unless ``TEST_KAFKA=host:port`` or
``TEST_MILVUS=http://host:port`` names a server that is outside.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from tests.support.missing import missing
from tests.support.private_network import enter_private_network

# Spark's and other children are forked beside the threads of Milvus's client. gRPC's handlers of a fork would have
# those threads stop and start again, and now and then end the child before it is what it is to be.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

# Nothing is imported up here that starts threads: without root, only a process that has none gets a network of its own.
if TYPE_CHECKING:
    from commands.embedded import EmbeddedKafka, MilvusLite
    from notellm.settings import MilvusSettings
    from tests.export.tiny import Tiny
    from tests.support.kafka_server import KafkaServer
    from tests.support.milvus_server import MilvusServer

__all__ = ["REPOSITORY", "missing"]

REPOSITORY = Path(__file__).parent.parent
SERVERS = REPOSITORY / "build" / "servers"

_network_is_private = False
_network = ""
# The real servers that were started in this session.
_servers: list[KafkaServer | MilvusServer] = []


def pytest_configure() -> None:
    """Before any test module is imported."""
    global _network_is_private, _network  # noqa: PLW0603 - of this process, which has one network
    outside = [name for name in ("TEST_KAFKA", "TEST_MILVUS") if os.environ.get(name)]
    if outside:
        _network = f"the machine's own, as {outside[0]} is set"
        return
    try:
        enter_private_network()
    except OSError as error:
        _network = f"the machine's own: {error}"
    else:
        _network_is_private, _network = True, "private"


def pytest_report_header() -> str:
    return f"network: {_network}"


@pytest.fixture(scope="session")
def kafka_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KafkaServer]:
    """A real Kafka, the same for all tests: each has topics of its own."""
    from tests.support.kafka_server import KafkaElsewhere, KafkaServer

    elsewhere = os.environ.get("TEST_KAFKA")
    if elsewhere:
        yield KafkaElsewhere(elsewhere)
        return
    if shutil.which("java") is None:
        missing("no java for a real Kafka; install version 17 or newer and Maven, and then: make servers")
    if not (SERVERS / "kafka" / "ready").exists():
        missing("build/servers/kafka is not there; with Java and Maven: make servers")
    yield from _running(KafkaServer(SERVERS / "kafka" / "jars", tmp_path_factory.mktemp("kafka")))


@pytest.fixture(scope="session")
def milvus_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusServer]:
    """A real Milvus, the same for all tests: each has collections and an alias of its own."""
    from tests.support.milvus_server import MilvusElsewhere, MilvusServer

    elsewhere = os.environ.get("TEST_MILVUS")
    if elsewhere:
        yield MilvusElsewhere(elsewhere)
        return
    if not (SERVERS / "milvus" / "ready").exists():
        missing("build/servers/milvus is not there; on Linux with an x86-64 processor: make servers")
    if not _network_is_private:
        missing(f"a real Milvus listens on every interface, so it needs a private network; ours is {_network}")
    yield from _running(MilvusServer(SERVERS / "milvus" / "installation", tmp_path_factory.mktemp("milvus")))


def _running(server: KafkaServer | MilvusServer) -> Iterator[KafkaServer | MilvusServer]:
    server.start()
    _servers.append(server)
    yield server
    _servers.remove(server)
    server.kill()  # nobody wants its data any more


@pytest.fixture(autouse=True)
def servers_run_again() -> Iterator[None]:
    """A test that fails between its kill and its start is no reason for the next one to fail."""
    yield
    for server in _servers:
        if not server.is_running:
            server.start()


@pytest.fixture(scope="session")
def lite_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusLite]:
    """A Milvus Lite that no test stops, the same for all: each has collections and an alias of its own."""
    from commands.embedded import MilvusLite

    folder = tmp_path_factory.mktemp("lite")
    server = MilvusLite(folder / "data", log=folder / "milvus.log")
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["lite", "real"])
def milvus(request: pytest.FixtureRequest) -> MilvusLite | MilvusServer:
    """A Milvus that the test leaves running: first Lite, then the real one."""
    server: MilvusLite | MilvusServer = request.getfixturevalue(
        {"lite": "lite_server", "real": "milvus_server"}[request.param]
    )
    return server


@pytest.fixture
def own_milvus_settings(milvus: MilvusLite | MilvusServer) -> Iterator[MilvusSettings]:
    """A prefix and an alias that no other test uses; what has them is dropped in the end."""
    from pymilvus import MilvusClient

    from notellm.settings import MilvusSettings

    own = uuid4().hex[:8]
    settings = MilvusSettings(uri=milvus.uri, timeout_s=5.0, collection_prefix=f"test_{own}", alias=f"live_{own}")
    yield settings
    with closing(MilvusClient(milvus.uri, timeout=30)) as client:
        for name in client.list_collections():
            if own in name:
                for alias in client.list_aliases(name)["aliases"]:
                    client.drop_alias(alias)
                client.drop_collection(name)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own NOTELLM_ variables must not decide a test."""
    for name in list(os.environ):
        if name.startswith("NOTELLM_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def log_levels_stay() -> Iterator[None]:
    """A command that runs inside this process quietens what it does not want to hear, for good."""

    def ours() -> list[logging.Logger]:
        names = list(logging.root.manager.loggerDict)
        return [logging.getLogger(name) for name in names if name.split(".")[0] in ("commands", "consumers", "streams")]

    before = {logger.name: logger.level for logger in ours()}
    yield
    for logger in ours():
        logger.setLevel(before.get(logger.name, logging.NOTSET))


@pytest.fixture
def milvus_lite(tmp_path: Path) -> Iterator[MilvusLite]:
    """A fresh Milvus Lite server."""
    from commands.embedded import MilvusLite

    server = MilvusLite(tmp_path / "milvus", log=tmp_path / "milvus.log")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def embedded_kafka() -> EmbeddedKafka:
    """A fresh built-in Kafka cluster with the project's topics."""
    from commands.embedded import EmbeddedKafka

    kafka = EmbeddedKafka()
    kafka.create_topics("notes", "notes.dead-letter")
    return kafka


@pytest.fixture(scope="session")
def real_bundle() -> Path:
    """The exported smollm2; ``make test`` makes it."""
    path = REPOSITORY / "build" / "bundles" / "default"
    if not (path / "notellm.json").is_file():
        missing("build/bundles/default is not there; make it with: make bundle")
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
