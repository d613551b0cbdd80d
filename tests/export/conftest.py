from __future__ import annotations

import pytest

from tests.export.tiny import Tiny


@pytest.fixture(scope="session", params=["tied", "untied"])
def either(request: pytest.FixtureRequest) -> Tiny:
    """Each of the two in turn."""
    exported: Tiny = request.getfixturevalue(request.param)
    return exported
