"""Trees of ranks that hold different names: their union, what does not fit, and the part that one rank asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainwright.base.errors import CheckpointError
from trainwright.checkpoint.merge import merged, pruned
from trainwright.checkpoint.plan import plan_writes
from trainwright.checkpoint.tree import flatten, unflatten

STATES = st.recursive(
    st.one_of(st.integers(), st.floats(), st.text(max_size=3), st.none(), st.lists(st.integers(), max_size=3)),
    lambda inner: st.dictionaries(st.one_of(st.text(max_size=2), st.integers(0, 3)), inner, max_size=4),
    max_leaves=12,
)


def tree(state: Any) -> Any:
    return flatten({"state": state}).tree


def part(state: Any, draw: Any) -> Any:
    """Some of the keys of every dict, nothing else changed."""
    if not isinstance(state, dict):
        return state
    return {key: part(value, draw) for key, value in state.items() if draw()}


@given(STATES, st.randoms(use_true_random=False))
def test_parts_of_a_state_make_it_up_again(state: Any, random: Any) -> None:
    parts = [part(state, lambda: random.random() < 0.5) for _ in range(3)] + [state]
    whole = merged({rank: tree(one) for rank, one in enumerate(parts)})
    # The order of keys is that of the ranks.
    assert repr(sorted_keys(unflatten(whole, {}))) == repr(sorted_keys({"state": state}))
    for one in parts:
        assert repr(sorted_keys(unflatten(pruned(whole, {"state": one}), {}))) == repr(sorted_keys({"state": one}))


def sorted_keys(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    return {key: sorted_keys(state[key]) for key in sorted(state, key=repr)}


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({"step": 3}, {"step": 4}, "state/step is 3 on rank 0, 4 on rank 2"),
        ({"step": 3}, {"step": 3.0}, "state/step is 3 on rank 0, 3.0 on rank 2"),
        ({"a": {"b": [1]}}, {"a": {"b": [1, 2]}}, r"state/a/b is \[1\] on rank 0, \[1, 2\] on rank 2"),
        ({"a": torch.ones(1)}, {"a": 1}, "state/a is a tensor on rank 0, 1 on rank 2"),
        ({"a": {1: 2}}, {"a": {1: 3}}, "state/a/1 is 2 on rank 0, 3 on rank 2"),
        ({"a": (1,)}, {"a": [1]}, r"state/a is a tuple on rank 0, \[1\] on rank 2"),
    ],
)
def test_different_values_under_one_name_are_refused(one: Any, other: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        merged({0: tree(one), 2: tree(other)})


def test_what_is_not_a_number_agrees_with_itself() -> None:
    assert merged({0: tree(float("nan")), 1: tree(float("nan"))}) == tree(float("nan"))


def row(path: str, boxes: list[Any], shape: list[int], same: str | None = None) -> list[Any]:
    return [path, "float32", shape, boxes, same or path]


def test_every_name_is_written_once_by_a_rank_that_has_it() -> None:
    half = [[[[0, 0], [2, 4]]], [[[2, 0], [2, 4]]]]
    layouts = [[row("a", half[i % 2], [4, 4]) if i < 2 else row("b", half[i % 2], [4, 4])] for i in range(4)]
    layouts[2].append(row("empty", [], [0, 3]))
    names, parts, size = plan_writes(layouts)
    assert names == {}
    assert parts == [[("a", 0)], [("a", 0)], [("b", 0), ("empty", -1)], [("b", 0)]]
    assert size > 2 * 64


def test_a_tied_tensor_of_two_stages_is_written_once() -> None:
    whole = [[[0, 0], [4, 4]]]
    first = [row("embed", whole, [4, 4]), row("a", whole, [4, 4])]
    last = [row("embed", whole, [4, 4]), row("head", whole, [4, 4], same="embed")]
    names, parts, _ = plan_writes([first, last])
    assert names == {"head": "embed"}
    assert sorted(path for part in parts for path, _ in part) == ["a", "embed"]


def test_an_incomplete_union_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'b'.*the parts of 1 of 2 ranks do not make up the whole"):
        plan_writes([[row("a", [[[0], [4]]], [4])], [row("b", [[[0], [2]]], [4])]])
    with pytest.raises(CheckpointError, match=r"'b': rank 1 has float32 \[4\], rank 2 has float32 \[5\]"):
        plan_writes([[], [row("b", [[[0], [4]]], [4])], [row("b", [[[0], [5]]], [5])]])
