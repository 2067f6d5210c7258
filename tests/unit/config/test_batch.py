"""The batch triple: DeepSpeed's rules, and errors that name the nearest sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.base.errors import ConfigError
from trainwright.config import BatchSizes, resolve_batch

sizes = st.integers(1, 64)


@given(sizes, sizes, sizes)
def test_any_two_of_three_give_the_third(micro: int, accumulation: int, world: int) -> None:
    whole = BatchSizes(micro * accumulation * world, micro, accumulation)
    assert resolve_batch(whole.global_, micro, accumulation, world) == whole
    assert resolve_batch(whole.global_, micro, None, world) == whole
    assert resolve_batch(whole.global_, None, accumulation, world) == whole
    assert resolve_batch(None, micro, accumulation, world) == whole


@given(sizes, sizes)
def test_one_alone_accumulates_once(micro: int, world: int) -> None:
    assert resolve_batch(None, micro, None, world) == BatchSizes(micro * world, micro, 1)
    assert resolve_batch(micro * world, None, None, world) == BatchSizes(micro * world, micro, 1)


@pytest.mark.parametrize(
    ("given", "world", "message", "hint"),
    [
        ((None, None, None), 2, "neither batch.global nor batch.micro is given", "give batch.micro"),
        ((None, None, 4), 2, "neither batch.global nor batch.micro is given", "give batch.micro"),
        (
            (30, 4, 2),
            3,
            "batch.global is 30, and batch.micro 4 x batch.accumulation 2 x 3 ranks is 24",
            "use batch.global 24",
        ),
        ((10, 4, None), 2, "batch.global 10 is not a multiple of batch.micro 4 x 2 ranks = 8", "use 8 or 16"),
        ((10, None, 4), 1, "batch.global 10 is not a multiple of batch.accumulation 4 x 1 rank = 4", "use 8 or 12"),
        ((10, None, None), 4, "batch.global 10 is not a multiple of 4 ranks = 4", "use 8 or 12"),
        ((3, None, None), 4, "batch.global 3 is not a multiple of 4 ranks = 4", "use 4"),
        ((3, 4, None), 1, "batch.global 3 is not a multiple of batch.micro 4 x 1 rank = 4", "use 4"),
        ((0, 1, None), 1, "batch.global is 0, expected at least 1", None),
        ((8, -1, None), 1, "batch.micro is -1", None),
        ((2**40, None, None), 1, "batch.global is 1099511627776, expected at most 2147483647", None),
        ((None, 2**20, 2**20), 1, "is more than 2147483647 rows", None),
        ((8, 1, 1), 0, "the number of ranks is 0", None),
    ],
)
def test_what_does_not_agree_is_refused(
    given: tuple[int | None, int | None, int | None], world: int, message: str, hint: str | None
) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_batch(*given, world)
    assert message in error.value.message
    assert (hint or "") in (error.value.hint or "")


def test_messages_call_the_sizes_what_the_caller_does() -> None:
    with pytest.raises(ConfigError, match="train_batch_size 9 is not a multiple of train_micro 2 x 1 rank = 2"):
        resolve_batch(9, 2, None, 1, keys=("train_batch_size", "train_micro", "gas"))
