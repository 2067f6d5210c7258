"""Every accepted format, plain and compressed, gives the same documents; keys and positions are right."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainwright.base.errors import ConfigError, DataError
from trainwright.data.readers import Document, Problems, Shard, SourceSpec, list_shards, read_rows, read_shard, split_of
from trainwright.data.templates import row_renderer

TEXTS = [
    "A first text.\nWith two lines.",
    'Second, with "quotes", commas\tand tabs.',
    "第三个文本：中文，表情😀。\r\n末行",
]


def read_all(source: str | Path, field: str = "text", **options: Any) -> list[Document]:
    spec = SourceSpec(str(source), text_field=field)
    return [document for shard in list_shards(spec) for document in read_shard(shard, text_field=field, **options)]


def as_jsonl() -> bytes:
    return "".join(
        json.dumps({"id": i, "text": text}, ensure_ascii=False) + "\n" for i, text in enumerate(TEXTS)
    ).encode()


def as_csv(delimiter: str = ",") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(["id", "text"])
    writer.writerows(enumerate(TEXTS))
    return file.getvalue().encode()


def as_parquet() -> bytes:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), sink, row_group_size=2)
    return sink.getvalue()


def as_arrow(kind: str) -> bytes:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"id": range(len(TEXTS)), "text": TEXTS})
    sink = pa.BufferOutputStream()
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with new(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=2):
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


FORMATS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "jsonl": ("rows.jsonl", as_jsonl),
    "json-objects": ("rows.json", lambda: json.dumps([{"text": text} for text in TEXTS], indent=2).encode()),
    "json-strings": ("rows.json", lambda: json.dumps(TEXTS).encode()),
    "json-inside": ("rows.json", lambda: json.dumps({"version": 1, "data": [{"text": t} for t in TEXTS]}).encode()),
    "json-lines-misnamed": ("rows.json", as_jsonl),
    "csv": ("rows.csv", as_csv),
    "parquet": ("rows.parquet", as_parquet),
    "arrow-file": ("rows.arrow", lambda: as_arrow("file")),
    "arrow-stream": ("rows.arrow", lambda: as_arrow("stream")),
    "feather": ("rows.feather", lambda: as_arrow("file")),
}


def compress(data: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(data)
    if ending == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    return data


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_texts(tmp_path: Path, name: str, ending: str) -> None:
    file, make = FORMATS[name]
    path = tmp_path / (file + ending)
    path.write_bytes(compress(make(), ending))
    documents = read_all(path)
    assert [document.text for document in documents] == TEXTS
    assert all(document.where.startswith(str(path)) for document in documents)
    assert len({document.key for document in documents}) == len(TEXTS)


@pytest.mark.parametrize("mark", [";", "\t"])
def test_csv_without_commas_is_divided_by_semicolons_or_tabs(tmp_path: Path, mark: str) -> None:
    (tmp_path / "rows.csv").write_bytes(as_csv(mark))
    documents = read_all(tmp_path / "rows.csv")
    assert [document.text for document in documents] == TEXTS
    assert documents[1].where == f"{tmp_path / 'rows.csv'}:4", "the first text has two lines"


def test_a_csv_file_of_one_column_is_not_divided(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text\na; b\tc\n", encoding="utf-8")
    assert [document.text for document in read_all(tmp_path / "one.csv")] == ["a; b\tc"]


def test_tsv_is_one_line_per_row_and_keeps_stray_quotes(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_bytes(b'label\ttext\n1\t"stray quote\n0\t"whole ""field"""\n1\tin"side\n0\t"a\ttab"\r\n')
    assert [d.text for d in read_all(path)] == ['"stray quote', 'whole "field"', 'in"side', "a\ttab"]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "b.md", "c.py", "d.rs", "e.unknown"])
def test_a_text_file_is_one_document_kept_exactly(tmp_path: Path, name: str, ending: str) -> None:
    text = "line one\r\n\tline two\n\n  中文 😀 \x0c end"
    (tmp_path / (name + ending)).write_bytes(compress(text.encode(), ending))
    (document,) = read_all(tmp_path / (name + ending))
    assert document.text == text
    assert document.key == name + ending


def test_byte_order_marks_are_dropped(tmp_path: Path) -> None:
    bom = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(bom + b"text")
    (tmp_path / "b.jsonl").write_bytes(bom + b'{"text": "text"}\n')
    (tmp_path / "c.csv").write_bytes(bom + b"text,other\ntext,1\n")
    (tmp_path / "d.json").write_bytes(bom + b'["text"]')
    assert [document.text for document in read_all(tmp_path)] == ["text"] * 4


def test_several_gzip_members_and_zstd_frames_are_read_through(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    lines = [json.dumps({"text": f"line {i}"}).encode() + b"\n" for i in range(50)]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(zstandard.ZstdCompressor().compress(line) for line in lines))
    expected = [f"line {i}" for i in range(50)]
    assert [document.text for document in read_all(tmp_path)] == expected * 2


def test_a_folder_is_listed_recursively_in_order_without_hidden_and_unknown_files(tmp_path: Path) -> None:
    names = [
        "b.txt",
        "a/z.jsonl",
        "a/b/c.md.gz",
        ".git/x.txt",
        "a/.hidden.txt",
        "weights.safetensors",
        "__pycache__/m.py",
    ]
    for name in [*names, "dataset_info.json"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    shards = list_shards(SourceSpec(str(tmp_path)))
    assert [shard.key for shard in shards] == ["a/b/c.md.gz", "a/z.jsonl", "b.txt"]
    assert [(shard.format, shard.compression, shard.size) for shard in shards] == [
        ("text", "gz", 1),
        ("jsonl", None, 1),
        ("text", None, 1),
    ]


def test_keys_do_not_depend_on_where_the_data_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for root in ("one", "two/deeper"):
        (tmp_path / root / "sub").mkdir(parents=True)
        (tmp_path / root / "sub/文件.txt").write_text("x", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    absolute, relative = list_shards(SourceSpec(str(tmp_path / "one"))), list_shards(SourceSpec("two/deeper"))
    assert [shard.key for shard in absolute] == [shard.key for shard in relative] == ["sub/文件.txt"]
    assert relative[0].url == "two/deeper/sub/文件.txt"


def test_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "x/b.txt", "x/y/c.txt", "x/y/d.en", "x/y/e.bin", "x/.h.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x", encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def keys(pattern: str) -> list[str]:
        return [shard.key for shard in list_shards(SourceSpec(pattern))]

    assert keys("**/*.txt") == ["a.txt", "x/b.txt", "x/y/c.txt"]
    assert keys("x/*.txt") == ["b.txt"]
    assert keys("x/**/*.en") == ["y/d.en"]  # the pattern names the ending, so an unknown one is text
    assert keys("x/y/*") == ["c.txt"]
    assert keys(f"{tmp_path}/x/**/*.txt") == ["b.txt", "y/c.txt"]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("odd name", encoding="utf-8")
    assert [document.text for document in read_all(tmp_path / "a[1].txt")] == ["odd name"]


def test_urls_of_other_file_systems(tmp_path: Path) -> None:
    import zipfile

    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a.txt", b"from memory")
    memory.pipe("/corpus/deep/b.jsonl", b'{"text": "deeper"}\n')
    try:
        assert [document.text for document in read_all("memory://corpus")] == ["from memory", "deeper"]
        assert [document.text for document in read_all("memory://corpus/**/*.jsonl")] == ["deeper"]
        assert [document.text for document in read_all("memory://corpus/a.txt")] == ["from memory"]
    finally:
        memory.rm("/corpus", recursive=True)
    (tmp_path / "f.txt").write_text("by url", encoding="utf-8")
    assert [document.text for document in read_all(f"file://{tmp_path}/f.txt")] == ["by url"]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("in/one.txt", "zipped one")
        archive.writestr("in/two.txt", "zipped two")
    documents = read_all(f"zip://in/*.txt::{tmp_path}/all.zip")
    assert [(document.text, document.key) for document in documents] == [
        ("zipped one", "one.txt"),
        ("zipped two", "two.txt"),
    ]


def test_python_stdlib() -> None:
    shards = list_shards(SourceSpec("python-stdlib"))
    keys = [shard.key for shard in shards]
    assert keys == sorted(keys)
    assert "asyncio/base_events.py" in keys
    parts = {part for key in keys for part in key.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "__pycache__", "site-packages"}
    assert sum(shard.size or 0 for shard in shards) > 5_000_000
    problems = Problems()
    texts = [d.text for shard in shards[:40] for d in read_shard(shard, problems=problems)]
    assert any("asyncio" in text for text in texts)
    assert set(problems.counts) <= {"empty"}


def test_nested_text_fields_and_missing_ones(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"data": {"body": "inner"}, "a.b": "dotted"}\n', encoding="utf-8")
    assert read_all(path, "data.body")[0].text == "inner"
    assert read_all(path, "a.b")[0].text == "dotted"
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no field 'dada'.*did you mean 'data'"):
        read_all(path, "dada")


def test_nested_text_field_in_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"data": [{"body": "inner"}], "n": [1]}), tmp_path / "t.parquet")
    assert read_all(tmp_path / "t.parquet", "data.body")[0].text == "inner"


def test_rows_of_chats_are_rendered(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好！"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        {"instruction": "do", "input": "this", "output": "done"},
        {"text": "plain text wins", "messages": []},
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    texts = [document.text for document in read_all(path, render=row_renderer())]
    assert texts[0] == "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n您好！<|im_end|>\n"
    assert texts[1].startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>")
    assert "do\nthis" in texts[2]
    assert texts[3] == "plain text wins"
    with pytest.raises(DataError, match="render them with a chat template"):
        read_all(path)


def test_read_rows_keeps_all_fields(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(as_csv())
    (shard,) = list_shards(SourceSpec(str(path)))
    rows = list(read_rows(shard))
    assert rows[1].fields == {"id": "1", "text": TEXTS[1]}
    assert rows[1].where == f"{path}:4"  # the first row takes lines 2 and 3


def test_saved_datasets_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(10)], "n": list(range(10))})
    table.save_to_disk(str(tmp_path / "one"), num_shards=3)
    assert [document.text for document in read_all(tmp_path / "one")] == [f"row {i}" for i in range(10)]
    splits = datasets.DatasetDict({"test": table.select(range(2)), "train": table.select(range(2, 10))})
    splits.save_to_disk(str(tmp_path / "many"))
    assert [document.text for document in read_all(tmp_path / "many")] == [f"row {i}" for i in range(2, 10)]
    assert len(read_all(tmp_path / "many/test")) == 2
    splits.pop("train")
    splits["dev"] = table
    splits.save_to_disk(str(tmp_path / "odd"))
    with pytest.raises(DataError, match="splits test, dev and no 'train'"):
        read_all(tmp_path / "odd")


def test_hub_names_are_loaded_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(name: str, config: str | None, **options: Any) -> Any:
        asked.append((name, config, options))
        return datasets.Dataset.from_dict({"content": ["一", "二"], "n": [1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    documents = read_all("hf://owner/name@v1.0/zh:train[:10%]", "content")
    assert [document.text for document in documents] == ["一", "二"]
    assert asked == [("owner/name", "zh", {"split": "train[:10%]", "revision": "v1.0"})]
    with pytest.raises(DataError, match="no column 'contents'; it has content, n; did you mean 'content'"):
        read_all("hf://owner/name", "contents")


def test_a_hub_name_without_a_network_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hf://nobody/nothing: cannot load the data set: \w+") as caught:
        read_all("hf://nobody/nothing")
    assert "network" in (caught.value.hint or "")
    assert caught.value.__cause__ is not None


def test_splits_are_stable_and_monotonic() -> None:
    keys = [f"folder/file-{i}.py" for i in range(4000)]
    small = {key for key in keys if split_of(key, 0.05, 7) == "validation"}
    large = {key for key in keys if split_of(key, 0.10, 7) == "validation"}
    assert small < large
    assert abs(len(small) / len(keys) - 0.05) < 0.015
    assert small != {key for key in keys if split_of(key, 0.05, 8) == "validation"}
    assert not {key for key in keys if split_of(key, 0.0, 7) == "validation"}
    assert split_of("asyncio/base_events.py", 0.5, 0) == "validation"  # a fixed value: splits must never move
    with pytest.raises(ConfigError):
        split_of("x", 1.0, 0)


def test_memory_stays_small_on_a_long_file(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "long.jsonl.gz"
    line = json.dumps({"text": "x" * 10_000}).encode() + b"\n"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(3000):  # 30 MB of text
            file.write(line)
    (shard,) = list_shards(SourceSpec(str(path)))
    tracemalloc.start()
    count = sum(1 for _ in read_shard(shard))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 3000
    assert peak < 5_000_000


def test_shards_survive_pickling_and_specs_check_themselves() -> None:
    import pickle

    shard = Shard("a/b.txt", "text", None, 3, "b.txt")
    assert pickle.loads(pickle.dumps(shard)) == shard
    for bad in ({"source": " "}, {"source": "a", "weight": 0.0}, {"source": "a", "weight": float("nan")}):
        with pytest.raises(ConfigError):
            SourceSpec(**bad)  # type: ignore[arg-type]
    assert SourceSpec("a", name="b").label == "b"


@pytest.mark.parametrize(
    ("source", "field", "count"),
    [
        ("llamafactory_demo/c4_demo.jsonl", "text", 300),
        ("llamafactory_demo/wiki_demo.txt", "text", 1),
        ("llamafactory_demo/alpaca_zh_demo.json", "output", 1000),
        ("chnsenticorp_bertwwm/*.tsv", "text_a", 12000),
        ("cluener", "text", 12091 + 1 + 1),  # README.md and SOURCE.txt are text too
    ],
)
def test_real_files(shared_data: Callable[[str], Path], source: str, field: str, count: int) -> None:
    base = shared_data(source.split("/")[0])
    problems = Problems()
    documents = read_all(os.path.join(base.parent, source), field, problems=problems)
    assert len(documents) + problems.counts.get("empty", 0) == count
    assert set(problems.counts) <= {"empty"}
