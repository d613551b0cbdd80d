"""One partition of the Faust table on disk: what :class:`streams.click_table.Rows` asks of RocksDB."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import rocksdb  # type: ignore[import-not-found]

__all__ = ["OPTIONS", "RocksDBRows"]

# Faust's own defaults are a block cache of 2 GiB and three write buffers of 64 MiB, for each partition.
OPTIONS: Final[Mapping[str, int]] = {
    "block_cache_size": 8 * 2**20,
    "block_cache_compressed_size": 1 * 2**20,
    "write_buffer_size": 8 * 2**20,
    "max_write_buffer_number": 2,
    "target_file_size_base": 16 * 2**20,
    "max_open_files": 256,
    "bloom_filter_size": 10,
}

_DAY_BYTES = 4
# Beside rows, whose keys begin with a day; "_" is a day that no time of a click can reach.
_NO_DAY: Final = b"_"
_STREAM_MS: Final = b"__notellm\0stream_ms"


class RocksDBRows:
    """See :class:`streams.click_table.Rows`. ``store`` is the Faust table's, which opens and closes the databases."""

    def __init__(self, store: Any, partition: int) -> None:
        # Not the database itself: whoever refers to it keeps it open, and locked.
        self._databases = store._dbs  # noqa: SLF001 - Faust offers rows by key only
        self._changelog_offset_key = store.offset_key
        self._partition = partition

    def get(self, key: bytes) -> bytes | None:
        row: bytes | None = self._database.get(key)
        return row

    def days(self) -> list[int]:
        days = []
        keys = self._database.iterkeys()
        keys.seek_to_first()
        for key in keys:
            if key >= _NO_DAY:
                break
            day = int.from_bytes(key[:_DAY_BYTES], "big")
            days.append(day)
            keys.seek((day + 1).to_bytes(_DAY_BYTES, "big"))
        return days

    def first_keys(self, before: bytes, limit: int) -> list[bytes]:
        found: list[bytes] = []
        keys = self._database.iterkeys()
        keys.seek_to_first()
        for key in keys:
            if key >= before or len(found) == limit:
                break
            found.append(key)
        return found

    def stream_ms(self) -> int:
        written = self._database.get(_STREAM_MS)
        return -1 if written is None else int(written)

    def write(self, changes: Mapping[bytes, bytes | None], stream_ms: int, changelog_offset: int | None) -> None:
        batch = rocksdb.WriteBatch()
        for key, row in changes.items():
            if row is None:
                batch.delete(key)
            else:
                batch.put(key, row)
        batch.put(_STREAM_MS, str(stream_ms).encode())
        if changelog_offset is not None:
            # Where Faust goes on reading the changelog when it opens this database again.
            batch.put(self._changelog_offset_key, str(changelog_offset).encode())
        self._database.write(batch)

    @property
    def _database(self) -> Any:
        return self._databases[self._partition]
