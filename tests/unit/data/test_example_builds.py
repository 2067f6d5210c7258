"""Builds of examples: what is kept, when it is used again, what is left out and how much of that is allowed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_examples import Bound, PairEncoder, Tiny, build, pairs, read_lines, write_records

from trainwright.base.errors import ConfigError, DataError
from trainwright.base.faults import FAULTS_VARIABLE, InjectedFault
from trainwright.data.documents import SourceSpec
from trainwright.data.examples import encoding
from trainwright.data.examples.build import build_examples
from trainwright.data.examples.dataset import ExampleDataset
from trainwright.data.examples.intake import held_out
from trainwright.data.examples.spec import ExampleSpec
from trainwright.data.spec import TrainTokenizer, ValidationSpec
from trainwright.data.tokenizers import train_tokenizer
from trainwright.data.worker_pool import WorkerPool


def folders(tmp_path: Path) -> list[str]:
    """What lies in the cache, locks aside."""
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock"))


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    records = [
        {"source": "一二三 é\u2028", "target": "x", "more": [1, 2.5, None, True, {"深": "い"}]},
        {"source": "b" * 300, "target": "yy"},
        {"source": "drop me", "target": ""},
    ]
    dataset = build(tmp_path, records, max_drop=0.5)
    kept = [dict(record) for record in dataset.records_of("train")]
    assert [record.pop("where") for record in kept] == [f"records.jsonl:{n}" for n in (1, 2, 3)]
    assert kept == records
    assert dataset.examples_of("train")[0].tolist() == [0, 1]
    facts = dataset.facts("train")
    assert (facts.records, facts.examples, facts.dropped, facts.truncated) == (3, 2, {"no target": 1}, 1)
    assert facts.cut_tokens == 300 + 2 + 1 - 32
    assert facts.dropped_examples == ["records.jsonl:3: no target"]


def test_an_equal_build_is_opened_and_a_changed_source_is_built(tmp_path: Path) -> None:
    definition = Tiny()
    first = build(tmp_path, pairs([5, 9]), definition, task="options")
    stamp = (first.folder / "manifest.json").stat().st_mtime_ns
    again = build(tmp_path, pairs([5, 9]), definition, task="options")
    assert again.folder == first.folder
    assert (again.folder / "manifest.json").stat().st_mtime_ns == stamp
    assert definition.surveys == [2]  # the second one did not look at the records
    changed = build(tmp_path, pairs([5, 10]), definition, task="options")
    assert changed.folder != first.folder
    assert changed.fingerprint != first.fingerprint
    assert changed.lengths("train").tolist() == [5, 10]
    assert len(folders(tmp_path)) == 2


def test_what_does_not_change_the_arrays_does_not_build_again(tmp_path: Path) -> None:
    """Other options of the task (a learning objective, say): the survey is taken again, the arrays are compared by the
    encoder's fingerprint."""
    definition = Tiny()
    first = build(tmp_path, pairs([5, 9]), definition, task="smoothing 0")
    again = build(tmp_path, pairs([5, 9]), definition, task="smoothing 0.1", max_drop=0.9, pad_multiple=4, static=True)
    assert again.folder == first.folder
    assert definition.surveys == [2, 2]
    assert again.batch("train", np.asarray([0]))["input_ids"].shape == (1, 32)
    other = build(tmp_path, pairs([5, 9]), Tiny(max_length=16), sequence_length=32, task="smoothing 0")
    assert other.folder != first.folder  # the same text of options, but another encoder
    assert len(folders(tmp_path)) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"sequence_length": 64},
        {"packing": "best_fit"},
        {"columns": {"source": "question"}},
        {"format": "jsonl"},
        {"reading": {"encoding": "latin-1"}},
        {"tokenizer": TrainTokenizer("bpe", 300)},
        {"on_error": "skip"},
        {"validation": ValidationSpec(fraction=0.5)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_rows_builds_again(tmp_path: Path, change: dict[str, Any]) -> None:
    first = build(tmp_path, pairs([5, 9, 12, 20]), task="same")
    assert build(tmp_path, pairs([5, 9, 12, 20]), task="same", **change).folder != first.folder


@pytest.mark.parametrize(
    "fault", ["examples.read:raise", "examples.encode:raise", "examples.before_rename:raise", "examples.encode:enospc"]
)
def test_a_build_that_fails_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setenv(FAULTS_VARIABLE, fault)
    with pytest.raises((InjectedFault, DataError)) as caught:
        build(tmp_path, pairs([5, 9]))
    if "enospc" in fault:
        assert "MiB are free" in str(caught.value)
    assert folders(tmp_path) == []
    monkeypatch.delenv(FAULTS_VARIABLE)
    assert build(tmp_path, pairs([5, 9])).rows("train") == 2


def test_leftovers_of_a_killed_build_are_thrown_away(tmp_path: Path) -> None:
    dataset = build(tmp_path, pairs([5, 9]))
    name = dataset.folder.name.rpartition("-")[0]
    half = tmp_path / "cache" / f".{name}.partial"
    shutil.copytree(dataset.folder, half)
    (half / "manifest.json").unlink()
    shutil.rmtree(dataset.folder)
    assert build(tmp_path, pairs([5, 9])).fingerprint == dataset.fingerprint
    assert not half.exists()


def test_damage_is_named(tmp_path: Path) -> None:
    dataset = build(tmp_path, pairs([5, 9]))
    path = dataset.folder / "train.labels.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    opened = ExampleDataset.open(dataset.folder)
    with pytest.raises(DataError, match=r"train\.labels\.bin: block 0"):
        opened.batch("train", np.asarray([0]))
    with pytest.raises(DataError, match="block 0"):
        ExampleDataset.open(dataset.folder, verify="hashes")
    os.truncate(path, 4)
    with pytest.raises(DataError, match="bytes, but the manifest says"):
        ExampleDataset.open(dataset.folder)
    (dataset.folder / "survey.json").write_text("{}")
    with pytest.raises(DataError, match=r"survey\.json is missing or damaged|bytes, but"):
        ExampleDataset.open(dataset.folder)


# ---- what is left out


def test_more_drops_than_allowed_are_refused_with_examples_and_a_fix(tmp_path: Path) -> None:
    records = [*pairs([5] * 16), {"source": "a", "target": ""}, {"source": "b", "target": ""}]
    with pytest.raises(DataError) as caught:
        build(tmp_path, records)
    message = str(caught.value)
    assert "2 of the 18 train records (11.1%) give no example, more than the 5.0% of data.max_drop" in message
    assert "2 no target" in message
    assert "records.jsonl:17: no target" in message
    assert "data.max_drop=0.12" in message
    allowed = build(tmp_path, records, max_drop=0.12)
    assert allowed.facts("train").dropped_records == 2
    with pytest.raises(DataError, match=r"max_drop=0\.12"):  # also when it is opened again
        build(tmp_path, records, max_drop=0.1)


def test_unreadable_and_unusable_records_stop_or_count(tmp_path: Path) -> None:
    source = write_records(tmp_path / "records.jsonl", [*pairs([5] * 8), {"target": "no source"}])
    path = Path(source.source)
    path.write_text(path.read_text() + "{broken\n")
    spec = ExampleSpec((source,), validation=None, tokenizer=TrainTokenizer("char"), sequence_length=32)
    with pytest.raises(DataError, match=r"records\.jsonl:10: not JSON"):
        build_examples(spec, Tiny(), tmp_path / "cache", reader=read_lines)
    path.write_text(path.read_text().replace("{broken\n", ""))
    with pytest.raises(DataError, match=r"records\.jsonl:9: column 'source' is missing\n  -> write one"):
        build_examples(spec, Tiny(), tmp_path / "cache", reader=read_lines)
    path.write_text(path.read_text() + "{broken\n")
    skipping = ExampleSpec(
        (source,), validation=None, tokenizer=TrainTokenizer("char"), sequence_length=32, on_error="skip", max_drop=0.2
    )
    facts = build_examples(skipping, Tiny(), tmp_path / "cache", reader=read_lines).facts("train")
    assert (facts.records, facts.examples) == (9, 8)
    assert facts.dropped == {"unusable": 1}
    assert facts.skipped == {"bad-json": 1}
    tight = ExampleSpec(
        (source,), validation=None, tokenizer=TrainTokenizer("char"), sequence_length=32, on_error="skip"
    )
    with pytest.raises(DataError, match=r"2 of the 10 train records(.|\n)*unreadable: bad-json"):
        build_examples(tight, Tiny(), tmp_path / "cache", reader=read_lines)


def test_cut_records_are_counted_and_bounded(tmp_path: Path) -> None:
    dataset = build(tmp_path, pairs([5, 40, 9, 50]))
    assert dataset.facts("train").truncated == 2
    assert dataset.facts("train").cut_tokens == 8 + 18
    assert "2 of the 4 train records (50.0%) do not fit in 32 tokens" in dataset.manifest.notes[0]
    with pytest.raises(DataError, match=r"26 tokens in all(.|\n)*data\.max_cut=0\.5"):
        build(tmp_path, pairs([5, 40, 9, 50]), max_cut=0.0)


def test_nothing_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 2 training records gives an example: 2 no target"):
        build(tmp_path, [{"source": "a", "target": ""}] * 2)
    empty = write_records(tmp_path / "empty.jsonl", [])
    spec = ExampleSpec((SourceSpec(str(tmp_path / "records.jsonl")),), test=(empty,), validation=None)
    with pytest.raises(DataError, match="empty"):
        build_examples(spec, Tiny(), tmp_path / "cache", reader=read_lines)


# ---- splits


def test_a_held_out_share_goes_by_the_keys_of_records(tmp_path: Path) -> None:
    many = pairs([5 + n % 20 for n in range(400)])
    dataset = build(tmp_path / "a", many, validation=ValidationSpec())
    held = {record["where"] for record in dataset.records_of("validation")}
    assert 8 <= len(held) <= 34  # 5 % of 400 by hash: 20 +- 4.4
    assert held.isdisjoint(record["where"] for record in dataset.records_of("train"))
    assert dataset.rows("train") + dataset.rows("validation") == 400
    more = build(tmp_path / "b", [*many, *pairs([9] * 100)], validation=ValidationSpec())
    assert held <= {record["where"] for record in more.records_of("validation")}


def test_at_least_one_record_is_held_out_and_one_is_kept() -> None:
    hashes = np.asarray([9, 5, 7], dtype=np.uint64) * np.uint64(2**60)
    assert held_out(hashes, 1e-6).tolist() == [False, True, False]
    assert held_out(hashes, 0.4).tolist() == [False, True, False]
    assert held_out(hashes, 0.99).tolist() == [False, True, True]
    assert held_out(hashes[:2], 0.999).tolist() == [False, True]
    with pytest.raises(DataError, match="one training record cannot be divided"):
        held_out(hashes[:1], 0.5)


def test_validation_and_test_sources(tmp_path: Path) -> None:
    held = write_records(tmp_path / "held.jsonl", pairs([6, 7]))
    test = write_records(tmp_path / "test.jsonl", pairs([8]))
    dataset = build(tmp_path, pairs([5, 9]), validation=ValidationSpec(sources=(held,)), test=(test,))
    assert dataset.splits == ("train", "validation", "test")
    assert [dataset.rows(split) for split in dataset.splits] == [2, 2, 1]
    assert [source["split"] for source in dataset.manifest.sources] == ["train", "validation", "test"]
    assert dataset.records_of("test")[0]["where"] == "test.jsonl:1"


def test_weighted_sources_are_groups(tmp_path: Path) -> None:
    sources = tuple(
        SourceSpec(write_records(tmp_path / f"{name}.jsonl", pairs(lengths)).source, weight=weight, name=name)
        for name, weight, lengths in (("a", 3.0, [5, 6]), ("b", 1.0, [7, 8, 9]))
    )
    for packing in ("pad", "best_fit"):
        spec = ExampleSpec(
            sources, validation=None, tokenizer=TrainTokenizer("char"), sequence_length=16, weighted=True,
            packing=packing,  # type: ignore[arg-type]
        )  # fmt: skip
        dataset = build_examples(spec, Tiny(max_length=16), tmp_path / "cache", reader=read_lines)
        groups = dataset.groups("train")
        assert [(group.name, group.weight) for group in groups] == [("a", 3.0), ("b", 1.0)]
        for group in groups:
            rows = np.arange(group.first_row, group.first_row + group.rows)
            assert {record["where"][0] for record in dataset.records("train", rows)} == {group.name}


# ---- tokenizers


def test_a_tokenizer_is_trained_on_the_texts_of_training_records(tmp_path: Path) -> None:
    records = [{"source": "abc", "target": "dé"}] * 3
    held = write_records(tmp_path / "held.jsonl", [{"source": "z", "target": "z"}])
    dataset = build(
        tmp_path, records, Tiny(special_tokens=("<mark>",)), validation=ValidationSpec(sources=(held,)), task="t"
    )
    tokenizer = dataset.tokenizer()
    assert {tokenizer.token(n) for n in range(tokenizer.vocab_size)} == {*"abcdé", "<unk>", "<|endoftext|>", "<mark>"}
    assert dataset.facts("validation").unknown_tokens == 2
    given = train_tokenizer("char", None, ["abcdéz"])
    other = build(tmp_path, records, tokenizer=given)
    assert other.tokenizer().fingerprint == given.fingerprint
    given.save(tmp_path / "saved")
    assert build(tmp_path, records, tokenizer=str(tmp_path / "saved")).folder == other.folder


def test_a_task_may_change_how_its_tokenizer_is_kept(tmp_path: Path) -> None:
    class Templated(Tiny):
        def prepare_tokenizer(self, tokenizer: Any) -> Any:
            return type(tokenizer)(tokenizer.core, special=tokenizer.special, chat_template="{{ messages }}")

    assert build(tmp_path, pairs([5]), Templated()).tokenizer().chat_template == "{{ messages }}"


# ---- workers


class Refusing(PairEncoder):
    """Refuses one record."""

    def encode(self, record: Mapping[str, Any]) -> Any:
        if record["target"] == "stop":
            raise DataError("this one", hint="not this one")
        return super().encode(record)


class Definition(Tiny):
    def bind(self, survey: Any, tokenizer: Any) -> Bound:
        return Bound(Refusing(tokenizer, self.max_length))


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "WORTH_SECONDS", 0.0)
    pools = []

    def counted(job: Any, workers: int, name: str) -> WorkerPool:
        pools.append(workers)
        return WorkerPool(job, workers, name)

    monkeypatch.setattr(encoding, "WorkerPool", counted)
    source = write_records(tmp_path / "records.jsonl", pairs([4 + n % 40 for n in range(2000)]))
    spec = ExampleSpec((source,), tokenizer=TrainTokenizer("char"), sequence_length=32)
    alone = build_examples(spec, Definition(), tmp_path / "one", workers=1, reader=read_lines)
    together = build_examples(spec, Definition(), tmp_path / "two", workers=2, reader=read_lines)
    assert together.manifest == alone.manifest
    assert pools == [2]  # for the training records; the others are done before the clock is read
    bad = write_records(tmp_path / "bad.jsonl", [*pairs([9] * 600), {"source": "a", "target": "stop"}])
    spec = ExampleSpec((bad,), validation=None, tokenizer=TrainTokenizer("char"), sequence_length=32)
    with pytest.raises(DataError, match=r"bad\.jsonl:601: this one\n  -> not this one"):
        build_examples(spec, Definition(), tmp_path / "three", workers=2, reader=read_lines)
    assert not list((tmp_path / "three").glob("bad*"))


def test_an_encoder_of_the_script_stays_in_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be pickled is no error: the build takes one process."""
    monkeypatch.setattr(encoding, "WORTH_SECONDS", 0.0)

    class Local(PairEncoder):
        pass

    class OfScript(Tiny):
        def bind(self, survey: Any, tokenizer: Any) -> Bound:
            return Bound(Local(tokenizer, self.max_length))

    source = write_records(tmp_path / "records.jsonl", pairs([9] * 300))
    spec = ExampleSpec((source,), validation=None, tokenizer=TrainTokenizer("char"), sequence_length=32)
    assert build_examples(spec, OfScript(), tmp_path / "c", workers=2, reader=read_lines).rows("train") == 300


# ---- places


def test_a_folder_may_be_named(tmp_path: Path) -> None:
    source = write_records(tmp_path / "records.jsonl", pairs([9] * 3))
    spec = ExampleSpec((source,), validation=None, tokenizer=TrainTokenizer("char"), sequence_length=32)
    first = build_examples(spec, Tiny(), tmp_path / "cache", out=tmp_path / "here", reader=read_lines)
    assert first.folder == tmp_path / "here"
    again = build_examples(spec, Tiny(), tmp_path / "cache", out=tmp_path / "here", reader=read_lines)
    assert again.fingerprint == first.fingerprint
    other = ExampleSpec((source,), validation=None, tokenizer=TrainTokenizer("char"), sequence_length=16)
    with pytest.raises(DataError, match="holds something else"):
        build_examples(other, Tiny(max_length=16), tmp_path / "cache", out=tmp_path / "here", reader=read_lines)


def test_the_fingerprint_does_not_depend_on_the_place_of_files(tmp_path: Path) -> None:
    first, second = build(tmp_path / "a", pairs([5, 9])), build(tmp_path / "b" / "c", pairs([5, 9]))
    assert first.fingerprint == second.fingerprint
    assert json.loads((first.folder / "survey.json").read_text()) == {"labels": [], "records": 2}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"train": ()}, "at least one source"),
        ({"packing": "concat"}, "expected 'pad' or 'best_fit'"),
        ({"max_drop": 2.0}, "max_drop is 2"),
        ({"sequence_length": 1}, "at least 2"),
    ],
)
def test_specs_that_cannot_be_meant(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ExampleSpec(**{"train": (SourceSpec("a"),), **options})
