"""Ranks on one machine: they talk, they report, and whatever happens none is left behind."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

from trainwright.testing import RankError, run_ranks


def add_up(rank: int, world: int, factor: int) -> tuple[float, int, str]:
    value = torch.tensor(float(rank + 1) * factor)
    dist.all_reduce(value)
    return value.item(), torch.get_num_threads(), os.environ["RANK"]


def fail_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()


def die(rank: int, world: int) -> None:
    if rank == 0:
        os._exit(3)
    dist.barrier()


def hang(rank: int, world: int) -> None:
    time.sleep(600)


def test_ranks_form_a_group_and_return_by_rank() -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    assert run_ranks(add_up, 2, 10) == [(30.0, 1, "0"), (30.0, 1, "1")]
    assert os.environ.get("OMP_NUM_THREADS") == before


def test_a_rank_that_raises_is_named_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"rank 1 of 2 failed:(.|\n)*fail_on_one(.|\n)*rank one is unwell"):
        run_ranks(fail_on_one, 2)
    assert multiprocessing.active_children() == []


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RankError, match="rank 0 of 2 exited with 3"):
        run_ranks(die, 2)
    assert multiprocessing.active_children() == []


def test_ranks_that_hang_are_ended() -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=r"ranks \[0\] of 1 did not finish in time"):
        run_ranks(hang, 1, timeout=1.0)
    assert time.monotonic() - began < 20
    assert multiprocessing.active_children() == []
