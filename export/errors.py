"""Every error that this package raises on purpose.

::

    notellm.errors.NoteLLMError
    └── ExportError          the checkpoint cannot be exported; one line says why
        └── ParityError      the graph does not equal the checkpoint; carries the report
"""

from __future__ import annotations

from notellm.bundle import ParityReport
from notellm.errors import NoteLLMError

__all__ = ["ExportError", "ParityError"]


class ExportError(NoteLLMError):
    """The checkpoint cannot be exported."""


class ParityError(ExportError):
    """The exported graph is not the checkpoint's equal."""

    def __init__(self, report: ParityReport) -> None:
        failed = ", ".join(row.check for row in report.rows if not row.passed)
        super().__init__(f"parity failed ({failed}); no bundle was written")
        self.report = report
