"""Bad input: each gets one clear error that names the file and the place, or is counted and left out."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from trainwright.base.errors import ConfigError, DataError
from trainwright.data.readers import Problems, SourceSpec, list_shards, read_shard


def read(path: Path, on_error: str = "stop", problems: Problems | None = None, field: str = "text") -> list[str]:
    shards = list_shards(SourceSpec(str(path), text_field=field))
    return [
        document.text
        for shard in shards
        for document in read_shard(shard, text_field=field, on_error=on_error, problems=problems)  # type: ignore[arg-type]
    ]


GOOD = b'{"text": "good"}\n'
NESTED = b"[" * 100_000 + b"]" * 100_000

# file name, bytes, what the message must say, kind counted under "skip", texts that remain
CASES: dict[str, tuple[str, bytes, str, str, list[str]]] = {
    "jsonl not JSON": (
        "a.jsonl",
        GOOD + b'{"text": oops}\n' + GOOD,
        r"a\.jsonl:2:10: not valid JSON",
        "not-json",
        ["good"] * 2,
    ),
    "jsonl cut line": (
        "a.jsonl",
        GOOD + b'{"text": "cut',
        r"a\.jsonl:2:10: not valid JSON: Unterminated",
        "not-json",
        ["good"],
    ),
    "jsonl a list": (
        "a.jsonl",
        b"[1, 2]\n" + GOOD,
        r"a\.jsonl:1: a JSON list; expected one",
        "not-an-object",
        ["good"],
    ),
    "jsonl a number": ("a.jsonl", b"17\n" + GOOD, r"a\.jsonl:1: a JSON number", "not-an-object", ["good"]),
    "jsonl too deep": (
        "a.jsonl",
        NESTED + b"\n" + GOOD,
        r"a\.jsonl:1: not valid JSON: nested too",
        "not-json",
        ["good"],
    ),
    "jsonl huge number": (
        "a.jsonl",
        b'{"n": ' + b"9" * 5000 + b"}\n" + GOOD,
        r"a\.jsonl:1: not valid",
        "not-json",
        ["good"],
    ),
    "jsonl null text": (
        "a.jsonl",
        b'{"text": null}\n' + GOOD,
        r"a\.jsonl:1: field 'text' is null",
        "not-a-string",
        ["good"],
    ),
    "jsonl number text": (
        "a.jsonl",
        b'{"text": 5}\n' + GOOD,
        r"'text' is int \(5\); expected a string",
        "not-a-string",
        ["good"],
    ),
    "jsonl no field": (
        "a.jsonl",
        b'{"txt": "x"}\n' + GOOD,
        r"no field 'text'; it has txt; did you",
        "missing-field",
        ["good"],
    ),
    "jsonl surrogate": (
        "a.jsonl",
        b'{"text": "x\\ud83d"}\n' + GOOD,
        r"lone surrogate U\+D83D at char",
        "invalid-unicode",
        ["good"],
    ),
    "jsonl bad UTF-8": (
        "a.jsonl",
        GOOD + b'{"text": "\xff\xfe"}\n' + GOOD,
        r"a\.jsonl:2: invalid UTF-8 at byte 27 ",
        "invalid-utf8",
        ["good"] * 2,
    ),
    "jsonl binary": (
        "a.jsonl",
        GOOD + b"\x00\x01\n" + GOOD,
        r"a\.jsonl:2: binary data \(a NUL byte at byte 17\)",
        "damaged-file",
        ["good"],
    ),
    "json broken": ("a.json", b'[{"text": "good"},\n {"text" 1}]', r"a\.json:2:10: not valid JSON", "damaged-file", []),
    "json a number": ("a.json", b"3", r"a JSON number; expected a list", "damaged-file", []),
    "json odd item": ("a.json", b'["good", 3]', r"item 2: a JSON number", "not-an-object", ["good"]),
    "text bad UTF-8": (
        "a.txt",
        b"ok\nab\xffcd",
        r"a\.txt:2: invalid UTF-8 at byte 5 \(bytes ff 63 64\)",
        "invalid-utf8",
        [],
    ),
    "text GBK": ("a.txt", "中文文本".encode("gbk"), r"a\.txt:1: invalid UTF-8 at byte 0", "invalid-utf8", []),
    "text UTF-16": ("a.txt", "hello".encode("utf-16"), r"is UTF-16 text; expected UTF-8", "damaged-file", []),
    "text binary": (
        "a.txt",
        b"\x7fELF\x02\x01\x01\x00\x00",
        r"binary data \(a NUL byte at byte 7\)",
        "damaged-file",
        [],
    ),
    "text is gzip": ("a.txt", gzip.compress(b"x"), r"is gzip data under another name", "damaged-file", []),
    "gz truncated": ("a.txt.gz", gzip.compress(b"x" * 10**5)[:-10], r"truncated or broken gz", "damaged-file", []),
    "gz not gzip": ("a.txt.gz", b"plain text", r"truncated or broken gz data: Not a gzipped", "damaged-file", []),
    "csv wrong count": (
        "a.csv",
        b"text,n\ngood,1\nbad\ngood,2\n",
        r"a\.csv:3: 1 fields; the header has text, n",
        "wrong-field-count",
        ["good"] * 2,
    ),
    "csv open quote": ("a.csv", b'text,n\ngood,1\n"open,2\n', r"a\.csv:3: not valid csv", "bad-quoting", ["good"]),
    "csv bad UTF-8": (
        "a.csv",
        b"text,n\ngood,1\n\xff,2\ngood,3\n",
        r"a\.csv:3: invalid UTF-8 at byte 14",
        "invalid-utf8",
        ["good"] * 2,
    ),
    "tsv wrong count": (
        "a.tsv",
        b"text\tn\ngood\t1\t2\ngood\t3\n",
        r"a\.tsv:2: 3 fields",
        "wrong-field-count",
        ["good"],
    ),
    "parquet broken": (
        "a.parquet",
        b"PAR1 nothing PAR1",
        r"a\.parquet: not a readable Parquet file",
        "damaged-file",
        [],
    ),
    "arrow broken": (
        "a.arrow",
        b"\xff\xff\xff\xff\x10\x00\x00\x00abc",
        r"a\.arrow: not a readable Arrow",
        "damaged-file",
        [],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_stops_with_its_place_or_is_counted(tmp_path: Path, case: str) -> None:
    name, data, message, kind, remaining = CASES[case]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(path) in caught.value.message
    problems = Problems()
    assert read(path, "skip", problems) == remaining
    assert problems.counts == {kind: 1}
    assert str(path) in problems.examples[0]


def test_truncated_and_corrupt_zstd(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    whole = zstandard.ZstdCompressor(write_checksum=True).compress(b"".join(GOOD for _ in range(100_000)))
    damaged = {
        "cut": whole[:-6],
        "half": whole[: len(whole) // 2],
        "flipped": whole[:-2] + bytes([whole[-2] ^ 1, whole[-1]]),
    }
    for name, data in {**damaged, "none": b"no zstd at all"}.items():
        path = tmp_path / f"{name}.jsonl.zst"
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}\.jsonl\.zst: .*broken"):
            read(path)
        problems = Problems()
        read(path, "skip", problems)
        assert problems.counts == {"damaged-file": 1}


def test_a_cut_gzip_gives_what_came_before_the_cut_under_skip(tmp_path: Path) -> None:
    import random

    rng = random.Random(0)
    lines = [f'{{"text": "{rng.random()}"}}\n'.encode() for _ in range(20_000)]
    path = tmp_path / "a.jsonl.gz"
    data = gzip.compress(b"".join(lines))
    path.write_bytes(data[: len(data) // 2])
    problems = Problems()
    texts = read(path, "skip", problems)
    assert 5_000 < len(texts) < 15_000
    assert problems.counts == {"damaged-file": 1}


def test_missing_things_always_raise(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(GOOD)
    with pytest.raises(DataError, match=r"corpus\.json: no such file or folder; did you mean 'corpus\.jsonl'"):
        read(tmp_path / "corpus.json", "skip")
    with pytest.raises(DataError, match="matches no file"):
        read(tmp_path / "*.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file of a known format \(no files\)"):
        read(tmp_path / "empty")
    (tmp_path / "empty/model.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=r"\(1 files with other endings\)"):
        read(tmp_path / "empty")
    with pytest.raises(DataError, match="none of a known format"):
        read(tmp_path / "empty/*")
    (shard,) = list_shards(SourceSpec(str(tmp_path / "corpus.jsonl")))
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(DataError, match="the file is gone"):
        list(read_shard(shard, on_error="skip"))
    with pytest.raises(DataError, match="cannot be listed"):
        list_shards(SourceSpec("nosuchprotocol://bucket/file.txt"))
    with pytest.raises(DataError, match="not a data set name"):
        list_shards(SourceSpec("hf://a/b/c/d/e"))
    with pytest.raises(ConfigError, match="on_error is 'ignore'"):
        list(read_shard(shard, on_error="ignore"))  # type: ignore[arg-type]


def test_empty_files_and_texts(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.csv", "d.json"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="all 4 files are empty"):
        read(tmp_path)
    with pytest.raises(DataError, match="the file is empty"):
        read(tmp_path / "a.txt")
    (tmp_path / "e.txt").write_bytes(b"something")
    (tmp_path / "f.jsonl").write_bytes(b'\n{"text": ""}\n\n' + GOOD)
    problems = Problems()
    assert read(tmp_path, problems=problems) == ["something", "good"]
    assert problems.counts["empty"] >= 2


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_wrong_field_of_a_table_names_the_nearest(tmp_path: Path, name: str) -> None:
    separator = "," if name.endswith("csv") else "\t"
    (tmp_path / name).write_text(separator.join(["id", "Text"]) + "\n1" + separator + "x\n", encoding="utf-8")
    for policy in ("stop", "skip"):  # a wrong name would skip everything: never what was meant
        with pytest.raises(DataError, match=r":1: no field 'text' in the header; it has id, Text; did you mean 'Text'"):
            read(tmp_path / name, policy)
    (tmp_path / name).write_text(separator.join(["a", "a"]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="names a field twice"):
        read(tmp_path / name)


def test_a_wrong_column_of_parquet_names_the_nearest(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"texts": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text'; it has texts, id; did you mean 'texts'"):
        read(tmp_path / "a.parquet", "skip")
    pq.write_table(pa.table({"text": ["good", None, "fine"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet row 2: field 'text' is null"):
        read(tmp_path / "b.parquet")


def test_invalid_utf8_inside_parquet_costs_only_its_row(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    raw = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2: invalid UTF-8"):
        read(tmp_path / "a.parquet")
    problems = Problems()
    assert read(tmp_path / "a.parquet", "skip", problems) == ["good", "fine"]
    assert problems.counts == {"invalid-utf8": 1}


def test_several_lists_in_a_json_object_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"left": ["x"], "right": ["y"]}', encoding="utf-8")
    with pytest.raises(DataError, match=r"several lists \(left, right\)"):
        read(tmp_path / "a.json")


def test_problems_merge_in_order_and_survive_json() -> None:
    one, two = Problems(), Problems()
    for i in range(8):
        one.add("not-json", f"one {i}")
        two.add("empty", f"two {i}")
    one.merge(two)
    assert one.counts == {"not-json": 8, "empty": 8}
    assert one.total == 16
    assert one.examples == [f"one {i}" for i in range(8)] + ["two 0", "two 1"]
    assert Problems.from_dict(one.to_dict()) == one


def test_long_names_do_not_flood_a_message(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",".join(f"column{i}" + "x" * 100 for i in range(50)) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read(tmp_path / "a.csv")
    assert "and 30 more" in caught.value.message
    assert len(caught.value.message) < 1500


def test_long_csv_fields_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 300_000 + "\n", encoding="utf-8")
    assert read(tmp_path / "a.csv") == ["x" * 300_000]


def test_optional_packages_are_named_when_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from trainwright.base.errors import MissingDependencyError

    (tmp_path / "a.parquet").write_bytes(b"x")
    (tmp_path / "b.txt.zst").write_bytes(b"x")
    for package, name, extra in (("pyarrow", "a.parquet", "arrow"), ("zstandard", "b.txt.zst", "zstd")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingDependencyError, match=package) as caught:
            read(tmp_path / name, "skip")
        assert f"trainwright[{extra}]" in (caught.value.hint or "")
