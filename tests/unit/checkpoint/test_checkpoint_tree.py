"""flatten and unflatten are exact inverses, and everything that is not state is refused by its path."""

from __future__ import annotations

import enum
import json
import math
import random
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_states import make_state, same
from hypothesis import given, settings
from hypothesis import strategies as st

from trainwright.base.errors import CheckpointError
from trainwright.checkpoint.tree import MAX_DEPTH, flatten, plain_tree, tensor_names, unflatten

keys = st.one_of(
    st.text(max_size=6), st.sampled_from(["$", "$x", "a/b", "~", "~0", "[0]", "0", ""]), st.integers(-3, 3)
)
tensors = st.builds(
    lambda n, dtype: torch.arange(n).to(dtype),
    st.integers(0, 3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.int64]),
)
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), tensors, st.just(-0.0), st.just(10**40)
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
    ),
    max_leaves=25,
)


@given(st.dictionaries(keys, trees, max_size=5))
@settings(max_examples=300, deadline=None)
def test_unflatten_gives_back_exactly_what_was_flattened(state: dict[Any, Any]) -> None:
    flat = flatten(state)
    through_json = json.loads(json.dumps(flat.tree, allow_nan=False))
    assert same(unflatten(through_json, flat.tensors), state)
    assert tensor_names(through_json) == set(flat.tensors)


def test_names_are_the_paths() -> None:
    flat = flatten(make_state(1))
    assert "model/embed.weight" in flat.tensors
    assert "optimizer/state/[0]/exp_avg" in flat.tensors


def test_paths_that_look_alike_get_different_names() -> None:
    t = torch.ones
    state = {"a/b": t(1), "a": {"b": t(2)}, "c": {0: t(3), "0": t(4), "[0]": t(5)}, "~1": t(6), "/": t(7)}
    flat = flatten(state)
    assert len(flat.tensors) == 7
    assert same(unflatten(flat.tree, flat.tensors), state)


def test_tied_tensors_are_stored_once_and_come_back_as_one() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    flat = flatten({"embed": weight, "head": weight, "view": weight.detach().view(4, 3), "half": weight[:2]})
    assert list(flat.tensors) == ["embed", "half"]
    state = unflatten(flat.tree, flat.tensors)
    assert state["embed"] is state["head"] is state["view"]


def test_equal_memory_read_differently_is_not_tied() -> None:
    base = torch.randn(4, 4)
    flat = flatten({"a": base, "t": base.t(), "i": base.view(torch.int32), "e1": torch.empty(0), "e2": torch.empty(0)})
    assert len(flat.tensors) == 5


def test_an_ordered_dict_comes_back_as_a_dict() -> None:
    flat = flatten({"model": OrderedDict(b=1, a=2)})
    assert list(unflatten(flat.tree, {})["model"].items()) == [("b", 1), ("a", 2)]


class Colour(enum.IntEnum):
    RED = 1


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.float64(1.0), "numpy.float64"),
        (np.zeros(3), "numpy.ndarray"),
        (Colour.RED, "Colour"),
        (Pair(1, 2), "Pair"),
        (b"bytes", "bytes"),
        ({1, 2}, "set"),
        (torch.float32, "torch.dtype"),
        (torch.device("cpu"), "torch.device"),
        (defaultdict(list), "defaultdict"),
        (random.Random(0), "Random"),
        (lambda: None, "function"),
        (1 + 2j, "complex"),
        ({1.5: 2}, "float"),
        ({None: 2}, "NoneType"),
        ({True: 2}, "bool"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_types_are_refused_by_name_and_path(value: object, named: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        flatten({"optimizer": {"state": [0, {"odd": value}]}})
    assert "state/optimizer/state/[1]/odd" in str(refused.value)
    assert named in str(refused.value)


def test_a_circle_or_endless_nesting_is_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(CheckpointError, match="in a circle"):
        flatten({"a": circle})
    deep: Any = 1
    for _ in range(MAX_DEPTH - 1):
        deep = (deep,)
    assert same(unflatten(flatten({"a": deep}).tree, {}), {"a": deep})
    with pytest.raises(CheckpointError, match="deeper"):
        flatten({"a": ((deep,),)})


def test_meta_takes_no_tensors() -> None:
    assert plain_tree({"loss": math.inf})["loss"] == {"$": "float", "value": "inf"}
    with pytest.raises(CheckpointError, match=r"meta/a/\[0\]"):
        plain_tree({"a": [torch.ones(1)]})


@pytest.mark.parametrize(
    "tree",
    [
        {"$": "tensor", "name": "missing"},
        {"$": "tensor", "name": 3},
        {"$": "tensor"},
        {"$": "tensor", "name": "t", "more": 1},
        {"$": "float", "value": "1.0"},
        {"$": "call", "value": "os.system"},
        {"$": "dict", "items": [["a", 1], ["a", 2]]},
        {"$": "dict", "items": [[1.5, 1]]},
        {"$": "dict", "items": [[True, 1]]},
        {"$": "dict", "items": [["a"]]},
        {"$": "tuple", "items": {}},
        {"$": ["tuple"]},
        {"a": float("inf")},
    ],
    ids=str,
)
def test_a_tree_that_flatten_does_not_make_is_refused(tree: Any) -> None:
    with pytest.raises(CheckpointError):
        unflatten({"x": tree}, {"t": torch.ones(1)})
