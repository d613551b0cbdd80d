"""Files of pairs and notes, as a person might have made them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["json_lines", "parquet"]


def json_lines(file: Path, lines: Iterable[Any]) -> Path:
    file.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
    return file


def parquet(file: Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    """Each column a list of values, or an Arrow array where the type matters."""
    pq.write_table(pa.table(dict(columns)), file)
    return file
