from __future__ import annotations

import pytest

from tests.export.tiny import Tiny, tiny


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.getbasetemp(), tied=True)


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.getbasetemp(), tied=False)


@pytest.fixture(scope="session", params=["tied", "untied"])
def either(request: pytest.FixtureRequest) -> Tiny:
    """Each of the two in turn."""
    exported: Tiny = request.getfixturevalue(request.param)
    return exported
