"""JSON as people write it, Hjson, base64; keys that stand twice."""

from __future__ import annotations

import base64
import builtins
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainwright.base.errors import ConfigError, MissingDependencyError
from trainwright.config.json_file import decode_base64, read_json

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(values)
def test_plain_json_is_read_as_it_is(value: Any) -> None:
    assert read_json(json.dumps(value), "a.json") == value


@given(st.dictionaries(st.text(), st.text() | st.lists(st.integers()), min_size=1))
def test_comments_and_trailing_commas_do_not_touch_strings(value: dict[str, Any]) -> None:
    body = json.dumps(value, ensure_ascii=False, indent=1).replace("],\n", '], // a "quoted" remark\n')
    commented = f"/* top\n */ # hash\n{body[:-2]},\n}} // end"
    assert read_json(commented, "a.json") == value


def test_hjson_is_read() -> None:
    pytest.importorskip("hjson")
    text = """
    {
      # no quotes, no commas
      train_batch_size: 16
      fp16: {
        enabled: true
      }
      name: 一句 话
    }
    """
    assert read_json(text, "a.hjson") == {"train_batch_size": 16, "fp16": {"enabled": True}, "name": "一句 话"}


def test_hjson_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name == "hjson":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingDependencyError) as error:
        read_json("{\n a: 1\n}", "a.json")
    assert "a.json:2 is not JSON" in str(error.value)
    assert "trainwright[deepspeed]" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}, "a": 3}', "seen twice in one section: c, a"),
        ('{"a": NaN}', "seen NaN"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_json(text, "a.json")
    assert message in str(error.value)


def test_a_text_that_is_neither_json_nor_hjson() -> None:
    pytest.importorskip("hjson")
    with pytest.raises(ConfigError) as error:
        read_json('{"a": [1, 2\n', "a.json")
    assert "a.json:2 is not JSON" in str(error.value)
    assert "nor is it Hjson" in str(error.value)


@given(st.dictionaries(st.text(), values, max_size=3))
def test_base64_comes_back(value: dict[str, Any]) -> None:
    text = json.dumps(value)
    assert decode_base64(base64.urlsafe_b64encode(text.encode()).decode()) == text


@pytest.mark.parametrize("text", ["ds_config", "configs/ds.json", "ds.json", "", "e30=e30", "////"])
def test_other_text_is_no_base64(text: str) -> None:
    assert decode_base64(text) is None
