"""Processes that may be killed, or form a group: forked from one that has imported torch, so they start at once."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from typing import Any

import torch

__all__ = ["run_forked", "run_group"]

_SECONDS = 300
_forks = multiprocessing.get_context("forkserver")


def run_forked(work: Callable[..., None], *arguments: Any) -> int:
    """The exit code of a process that does ``work``: -9 where it was killed."""
    return _run([(_alone, (work, *arguments))])[0]


def run_group(work: Callable[..., None], *arguments: Any, size: int = 2) -> None:
    """``work(rank, *arguments)`` in each process of a gloo group on this machine; every one of them has to succeed."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    codes = _run([(_member, (rank, size, port, work, *arguments)) for rank in range(size)])
    assert codes == [0] * size


def _run(calls: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> list[int]:
    _forks.set_forkserver_preload(["training.train", "tests.training.tiny_set"])
    processes = [_forks.Process(target=target, args=given, daemon=True) for target, given in calls]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(_SECONDS)
        assert all(process.exitcode is not None for process in processes), f"still at it after {_SECONDS} s"
        return [process.exitcode or 0 for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _alone(work: Callable[..., None], *arguments: Any) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    work(*arguments)


def _member(rank: int, size: int, port: int, work: Callable[..., None], *arguments: Any) -> None:
    """As torchrun starts it, on a machine without a GPU."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=_SECONDS // 3))
    try:
        work(rank, *arguments)
    finally:
        torch.distributed.destroy_process_group()
