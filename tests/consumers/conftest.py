"""One Milvus Lite for the tests of a file that leave it running; each test has collections and an alias of its own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from commands.embedded import MilvusLite
from notellm.settings import MilvusSettings
from tests.consumers.milvus_rows import milvus_settings

_numbers = count()


@pytest.fixture(scope="module")
def shared_milvus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusLite]:
    folder = tmp_path_factory.mktemp("milvus")
    server = MilvusLite(folder / "data", log=folder / "milvus.log")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def own_milvus_settings(shared_milvus: MilvusLite) -> MilvusSettings:
    number = next(_numbers)
    return milvus_settings(shared_milvus.uri, collection_prefix=f"test{number}", alias=f"live{number}")
