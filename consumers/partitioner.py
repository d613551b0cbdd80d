"""Java's default partitioner, to see whether a key stands on the partition where every other writer would put it.

A key on two partitions has no order, and nothing downstream can mend that.
"""

from __future__ import annotations

__all__ = ["murmur2", "murmur2_partition"]

_MASK = 0xFFFFFFFF
_M = 0x5BD1E995
_SEED = 0x9747B28C


def murmur2(data: bytes) -> int:
    """MurmurHash2, 32 bit, as in ``org.apache.kafka.common.utils.Utils.murmur2``; unsigned."""
    h = (_SEED ^ len(data)) & _MASK
    whole = len(data) & ~3
    for i in range(0, whole, 4):
        k = int.from_bytes(data[i : i + 4], "little")
        k = (k * _M) & _MASK
        k ^= k >> 24
        k = (k * _M) & _MASK
        h = ((h * _M) & _MASK) ^ k
    rest = data[whole:]
    if rest:
        h ^= int.from_bytes(rest, "little")
        h = (h * _M) & _MASK
    h ^= h >> 13
    h = (h * _M) & _MASK
    return h ^ (h >> 15)


def murmur2_partition(key: bytes, partitions: int) -> int:
    """The partition that Java's producer, and librdkafka's ``murmur2_random``, choose for ``key``."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions
