from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_datasets import ALPHABET, build, write_jsonl

from trainwright.base.errors import ConfigError, DataError
from trainwright.base.events import listening
from trainwright.base.faults import FAULTS_VARIABLE, InjectedFault
from trainwright.data import build as build_module
from trainwright.data import builder, commands, corpus
from trainwright.data.build import build_dataset, prepare_dataset
from trainwright.data.builder import BuildProgress
from trainwright.data.dataset import TokenDataset
from trainwright.data.documents import SourceSpec
from trainwright.data.readers import list_shards, read_shard
from trainwright.data.spec import BuildSpec, TrainTokenizer, ValidationSpec, build_spec
from trainwright.data.tokenizers import load_tokenizer, train_tokenizer


def characters() -> object:
    return train_tokenizer("char", None, [ALPHABET])


def digest(folder: Path) -> dict[str, str]:
    """Every file of a dataset by name and content: two equal digests are byte-identical datasets."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def words(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join("word" + str(n) for n in rng.integers(0, 500, rng.integers(1, 60))) for _ in range(count)]


def bpe_spec(folder: Path, texts: list[str], **options: object) -> BuildSpec:
    options = {"sequence_length": 64, "packing": "best_fit", "validation": ValidationSpec(fraction=0.1), **options}
    return BuildSpec((write_jsonl(folder / "texts.jsonl", texts),), TrainTokenizer("bpe", 400), **options)


def many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a small corpus take many batches, and let it have several workers."""
    monkeypatch.setattr(builder, "BATCH_CHARACTERS", 2000)
    monkeypatch.setattr(builder, "FEWEST_BYTES_PER_WORKER", 1)


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many_batches(monkeypatch)
    spec = bpe_spec(tmp_path, words(300))
    found = []
    for workers in (1, 2, 3):
        build_dataset(spec, tmp_path / str(workers), workers)
        found.append(digest(tmp_path / str(workers)))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 14  # tokens, docs and three row files per split, tokenizer folder of three, manifest


@pytest.mark.parametrize("point", ["build.write", "build.before_commit", "build.after_commit", "build.before_rename"])
@pytest.mark.parametrize("hit", [1, 3, 8])
def test_an_interrupted_build_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, hit: int
) -> None:
    many_batches(monkeypatch)
    monkeypatch.setattr("trainwright.data.writing.COMMIT_SECONDS", 0.0)
    spec = bpe_spec(tmp_path, words(120))
    build_dataset(spec, tmp_path / "undisturbed", 1)
    if point == "build.before_rename" and hit > 1:
        return  # passed once
    monkeypatch.setenv(FAULTS_VARIABLE, f"{point}:raise@hit={hit}")
    with pytest.raises(InjectedFault):
        build_dataset(spec, tmp_path / "resumed", 1)
    assert not (tmp_path / "resumed").exists()
    monkeypatch.delenv(FAULTS_VARIABLE)
    encoded = counting_encodes(monkeypatch)
    build_dataset(spec, tmp_path / "resumed", 1)
    assert digest(tmp_path / "resumed") == digest(tmp_path / "undisturbed")
    if point == "build.after_commit":
        assert sum(encoded) <= 120 - hit  # what was committed is not tokenized again
    assert sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name) == []


def counting_encodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from trainwright.data import encoding

    counts: list[int] = []
    original = encoding.encode

    def counted(tokenizer: object, texts: list[str], flags: list[int], framing: object) -> object:
        counts.append(len(texts))
        return original(tokenizer, texts, flags, framing)

    monkeypatch.setattr(encoding, "encode", counted)
    return counts


def test_a_changed_source_throws_the_unfinished_build_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many_batches(monkeypatch)
    monkeypatch.setattr("trainwright.data.writing.COMMIT_SECONDS", 0.0)
    monkeypatch.setenv(FAULTS_VARIABLE, "build.write:raise@hit=4")
    with pytest.raises(InjectedFault):
        build_dataset(bpe_spec(tmp_path, words(100)), tmp_path / "out", 1)
    monkeypatch.delenv(FAULTS_VARIABLE)
    other = bpe_spec(tmp_path, words(100, seed=1))
    build_dataset(other, tmp_path / "out", 1)
    build_dataset(other, tmp_path / "fresh", 1)
    assert digest(tmp_path / "out") == digest(tmp_path / "fresh")


def test_a_second_build_opens_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = bpe_spec(tmp_path, words(50))
    first = prepare_dataset(spec, tmp_path / "cache", 1)
    monkeypatch.setattr(build_module, "Builder", None)  # building again would fail
    assert prepare_dataset(spec, tmp_path / "cache", 1).fingerprint == first.fingerprint
    assert build_dataset(spec, first.folder).fingerprint == first.fingerprint


def test_everything_that_matters_changes_the_key(tmp_path: Path) -> None:
    texts = words(60)
    base = bpe_spec(tmp_path, texts)
    keys = {prepare_dataset(base, tmp_path / "cache", 1).manifest.key}
    variants: list[dict[str, object]] = [
        {"sequence_length": 32},
        {"packing": "pad"},
        {"document_mask": False},
        {"append_eos": False},
        {"validation": None},
        {"validation": ValidationSpec(fraction=0.2)},
        {"on_error": "skip"},
    ]
    for options in variants:
        keys.add(prepare_dataset(bpe_spec(tmp_path, texts, **options), tmp_path / "cache", 1).manifest.key)
    keys.add(prepare_dataset(bpe_spec(tmp_path, [*texts, "more"]), tmp_path / "cache", 1).manifest.key)
    assert len(keys) == len(variants) + 2


def test_a_folder_with_other_content_is_not_overwritten(tmp_path: Path) -> None:
    build_dataset(bpe_spec(tmp_path, words(50)), tmp_path / "out", 1)
    before = digest(tmp_path / "out")
    with pytest.raises(DataError, match="another dataset"):
        build_dataset(bpe_spec(tmp_path, words(50), sequence_length=32), tmp_path / "out", 1)
    assert digest(tmp_path / "out") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(DataError, match="not a built dataset"):
        build_dataset(bpe_spec(tmp_path, words(50)), tmp_path / "mine", 1)
    assert (tmp_path / "mine" / "thesis.txt").exists()


# ---- what is held out


def test_whole_documents_are_held_out_by_hash(tmp_path: Path) -> None:
    texts = [f"{number:04d}" for number in range(400)]
    dataset = build(tmp_path, texts, validation=ValidationSpec(fraction=0.25), packing="pad")
    decode = load_tokenizer(str(dataset.tokenizer_folder)).decode
    found = {
        split: {decode(one) for one in np.split(dataset.tokens(split), dataset.document_offsets(split)[1:-1])}
        for split in dataset.splits
    }
    assert found["train"] | found["validation"] == set(texts)
    assert not found["train"] & found["validation"]
    assert 60 <= len(found["validation"]) <= 140
    assert dataset.manifest.sources[0]["split"] == "hash"


def test_one_text_file_is_split_as_nanogpt_does(tmp_path: Path) -> None:
    text = "".join(ALPHABET[n] for n in np.random.default_rng(0).integers(0, len(ALPHABET), 10_007))
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    spec = BuildSpec(
        (SourceSpec(str(tmp_path / "input.txt")),),
        TrainTokenizer("char"),
        sequence_length=16,
        validation=ValidationSpec(fraction=0.1),
    )
    dataset = prepare_dataset(spec, tmp_path / "cache", 1)
    decode = load_tokenizer(str(dataset.tokenizer_folder)).decode
    assert decode(dataset.tokens("train")) == text[: int(len(text) * 0.9)]
    assert decode(dataset.tokens("validation")) == text[int(len(text) * 0.9) :]
    assert dataset.manifest.sources[0]["split"] == "tail"
    assert not dataset.manifest.append_eos  # auto: not for characters


def test_the_tokenizer_never_sees_what_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"train{number}" for number in range(100)]
    seen: list[str] = []

    def spy(kind: str, size: int | None, given: object, **options: int) -> object:
        seen.extend(given)  # type: ignore[call-overload]
        return train_tokenizer(kind, size, seen, **options)

    monkeypatch.setattr("trainwright.data.tokenizers.train_tokenizer", spy)
    dataset = prepare_dataset(bpe_spec(tmp_path, texts), tmp_path / "cache", 1)
    assert len(seen) == dataset.facts("train").documents < 100
    assert set(seen) < set(texts)


def test_the_tokenizer_sample_is_bounded_and_spread(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for name in "abcd":
        (tmp_path / "parts" / f"{name}.txt").write_text(name * (10 if name == "a" else 1000), encoding="utf-8")
    spec = BuildSpec((SourceSpec(str(tmp_path / "parts")),), TrainTokenizer("bpe", 300), validation=None)
    listed = corpus.decide_splits(corpus.list_corpus(spec))
    sample = "".join(corpus.training_texts(listed, 400))
    assert {name: sample.count(name) for name in "abcd"} == {"a": 10, "b": 130, "c": 130, "d": 130}
    assert len("".join(corpus.training_texts(listed, None))) == 3010


def test_own_validation_sources(tmp_path: Path) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", ["validation text"] * 3)
    dataset = build(tmp_path / "x", ["training text"] * 5, validation=ValidationSpec(sources=(held,)))
    assert dataset.facts("train").documents == 5
    assert dataset.facts("validation").documents == 3


def test_the_key_of_a_text_file_is_known_without_reading_it(tmp_path: Path) -> None:
    """Splits of small sources are decided from keys; a text file's key is its shard's."""
    (tmp_path / "a.txt").write_text("some text", encoding="utf-8")
    shard = list_shards(SourceSpec(str(tmp_path)))[0]
    assert [document.key for document in read_shard(shard)] == [shard.key]


def test_auto_holds_out_less_of_more_text() -> None:
    spec = BuildSpec((SourceSpec("a.txt"),), TrainTokenizer())
    assert corpus.held_out_fraction(spec, 1_000_000) == 0.05
    assert corpus.held_out_fraction(spec, 100 * 16 << 20) == pytest.approx(0.01)
    assert corpus.held_out_fraction(spec, 10**13) == 0.0005


# ---- text


def test_long_documents_give_the_ids_of_the_whole_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SEGMENT_CHARACTERS", 1000)
    many_batches(monkeypatch)
    text = "\n".join(words(200)) + "\n\n  indented\n\n\n" + "\n".join(words(100, seed=3))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    tokenizer = train_tokenizer("bpe", 500, [text])
    spec = BuildSpec((SourceSpec(str(tmp_path / "long.txt")),), tokenizer, validation=None, append_eos=True)
    segments = list(corpus.read_segments(corpus.decide_splits(corpus.list_corpus(spec)), tokenizer))
    assert len(segments) > 10
    assert "".join(segment.text for segment in segments) == text
    dataset = prepare_dataset(spec, tmp_path / "cache", 2)
    assert dataset.tokens("train").tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
    assert dataset.facts("train").documents == 1


def test_sentencepiece_tokenizers_take_documents_whole(
    shared_data: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They mark the start of a text, so a cut would add a token that the text does not have."""
    monkeypatch.setattr(corpus, "SEGMENT_CHARACTERS", 1000)
    tokenizer = load_tokenizer(str(shared_data("llama2_tokenizer")))
    text = "\n".join(words(60))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    spec = BuildSpec((SourceSpec(str(tmp_path / "long.txt")),), tokenizer, validation=None, append_eos=False)
    dataset = prepare_dataset(spec, tmp_path / "cache", 1)
    assert dataset.tokens("train").tolist() == tokenizer.encode(text)


def test_special_tokens_in_a_text_are_only_characters(tmp_path: Path) -> None:
    tokenizer = train_tokenizer("bpe", 300, ["some text"])
    source = write_jsonl(tmp_path / "texts.jsonl", ["evil <|endoftext|> text"] * 3)
    spec = BuildSpec((source,), tokenizer, sequence_length=8, validation=None, append_eos=True)
    dataset = prepare_dataset(spec, tmp_path / "cache", 1)
    assert (dataset.tokens("train") == tokenizer.eos_id).sum() == 3


def test_large_vocabularies_take_four_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = characters()
    monkeypatch.setattr(type(tokenizer), "vocab_size", 70_000)
    source = write_jsonl(tmp_path / "texts.jsonl", ["abc"] * 20)
    spec = BuildSpec((source,), tokenizer, sequence_length=8, validation=None, append_eos=False)
    dataset = prepare_dataset(spec, tmp_path / "cache", 1)
    assert dataset.tokens("train").dtype == np.uint32
    assert dataset.manifest.token_dtype == "uint32"


def test_weights_draw_sources_in_their_shares(tmp_path: Path) -> None:
    sources = (
        SourceSpec(write_jsonl(tmp_path / "a.jsonl", ["aaaa"] * 30).source, weight=3.0, name="a"),
        SourceSpec(write_jsonl(tmp_path / "b.jsonl", ["bbbb"] * 90).source, weight=1.0, name="b"),
    )
    spec = BuildSpec(sources, characters(), sequence_length=8, packing="pad", validation=None, weighted=True)
    dataset = prepare_dataset(spec, tmp_path / "cache", 1)
    assert [(group.name, group.first_row, group.rows, group.weight) for group in dataset.groups()] == [
        ("a", 0, 30, 3.0),
        ("b", 30, 90, 1.0),
    ]
    text = load_tokenizer(str(dataset.tokenizer_folder)).decode(dataset.row("train", 30)["input_ids"][:4])
    assert text == "bbbb"
    with pytest.raises(ConfigError, match="same name"):
        BuildSpec((sources[0], sources[0]), characters(), weighted=True)


# ---- bad input


def test_an_empty_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the corpus is empty: no tokens in 1 files of texts \(skipped: 3 empty\)"):
        build(tmp_path, ["", "", ""])
    with pytest.raises(DataError, match="no such file"):
        prepare_dataset(BuildSpec((SourceSpec(str(tmp_path / "no.txt")),), TrainTokenizer()), tmp_path / "cache")


def test_too_little_text_for_a_row_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="10 tokens, fewer than one row of 64"):
        build(tmp_path, ["abcdefghij"], sequence_length=64)


def test_an_empty_validation_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the validation split is empty"):
        build(tmp_path, ["abcdefghij"] * 300, validation=ValidationSpec(fraction=0.00001))


def test_a_small_source_falls_back_to_tails_when_the_hash_holds_nothing_out(tmp_path: Path) -> None:
    dataset = build(tmp_path, [f"document number {n} of the set" for n in range(25)], validation=ValidationSpec(0.04))
    assert dataset.facts("validation").tokens > 0


def test_bad_lines_stop_or_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"text": "good text here"}\nnot json\n{"text": 5}\n{"text": "more good text"}\n', encoding="utf-8")
    options = {"validation": None, "append_eos": False, "sequence_length": 8}
    with pytest.raises(DataError, match=r"mixed\.jsonl:2"):
        prepare_dataset(BuildSpec((SourceSpec(str(path)),), characters(), **options), tmp_path / "cache", 1)
    spec = BuildSpec((SourceSpec(str(path)),), characters(), on_error="skip", **options)
    manifest = prepare_dataset(spec, tmp_path / "cache", 1).manifest
    assert sum(manifest.problems.values()) == 2
    assert manifest.splits["train"].documents == 2
    assert any("mixed.jsonl:2" in example for example in manifest.problem_examples)


def test_a_tokenizer_for_other_text_is_warned_of(tmp_path: Path) -> None:
    warnings: list[str] = []
    with listening(lambda record: warnings.append(record.get("message", ""))):
        dataset = build(tmp_path, ["汉字不在词表里"] * 10)
    assert dataset.facts("train").unknown_tokens == 70
    assert "100.0% of the train tokens" in dataset.manifest.notes[0]
    assert dataset.manifest.notes[0] in warnings


def test_missing_special_tokens_are_named(tmp_path: Path) -> None:
    tokenizer = train_tokenizer("char", None, [ALPHABET], special=["<unk>"])
    source = write_jsonl(tmp_path / "texts.jsonl", ["abcdefghij"] * 3)
    for option, message in (
        ({"append_eos": True}, "append_eos is true"),
        ({"prepend_bos": True}, "prepend_bos is true"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare_dataset(BuildSpec((source,), tokenizer, validation=None, **option), tmp_path / "cache", 1)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many_batches(monkeypatch)
    monkeypatch.setenv(FAULTS_VARIABLE, "build.write:enospc@hit=5")
    spec = bpe_spec(tmp_path, words(200))
    with pytest.raises(DataError, match=r"the disk is full(.|\n)*free about \d+ MiB"):
        build_dataset(spec, tmp_path / "out" / "dataset", 1)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".dataset.lock"]
    monkeypatch.delenv(FAULTS_VARIABLE)
    build_dataset(spec, tmp_path / "out" / "dataset", 1)


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "texts.jsonl", words(50))
    spec = BuildSpec((source,), characters(), sequence_length=8, validation=None)

    def progress(now: BuildProgress) -> None:
        if now.phase == "rows":
            with Path(source.source).open("a", encoding="utf-8") as file:
                file.write('{"text": "late"}\n')

    with pytest.raises(DataError, match="changed while they were read"):
        prepare_dataset(spec, tmp_path / "cache", 1, progress)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(DataError, match=r"dataset cannot be written: (File exists|Not a directory)"):
        build_dataset(bpe_spec(tmp_path, words(20)), tmp_path / "file" / "dataset", 1)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0])
def test_fractions_outside_zero_and_one_are_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        ValidationSpec(fraction=fraction)


# ---- commands and recipes


def test_progress_grows_to_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many_batches(monkeypatch)
    seen: list[BuildProgress] = []
    prepare_dataset(bpe_spec(tmp_path, words(200)), tmp_path / "cache", 1, seen.append)
    assert next(one.phase for one in seen) == "tokenizer"
    assert seen[-1].phase == "rows"
    assert seen[-1].bytes_done == seen[-1].bytes_total > 0
    done = [one.bytes_done for one in seen]
    assert done == sorted(done)
    assert len(set(done)) > 5


def test_a_recipe_section_becomes_a_spec() -> None:
    from trainwright.config.data_section import DataSection

    section = DataSection.model_validate(
        {
            "source": [
                {"source": "a.txt", "weight": 2, "name": "a"},
                {"source": "b.jsonl", "weight": 1, "text_field": "t"},
            ],
            "validation": {"source": "held.txt"},
            "tokenizer": {"train": "bpe", "vocab_size": 1000},
            "packing": "best_fit",
            "text_field": "body",
            "append_eos": False,
        }
    )
    spec = build_spec(section)
    assert [(source.label, source.weight, source.text_field) for source in spec.sources] == [
        ("a", 2.0, "body"),
        ("b.jsonl", 1.0, "t"),
    ]
    assert spec.weighted
    assert spec.masked
    assert spec.append_eos is False
    assert spec.tokenizer == TrainTokenizer("bpe", 1000, 2)
    assert spec.validation is not None
    assert spec.validation.sources[0].source == "held.txt"
    plain = build_spec(DataSection.model_validate({"source": "a.txt", "validation": "none"}), model_tokenizer="model")
    assert plain.tokenizer == "model"
    assert plain.validation is None
    assert not plain.weighted
    assert not plain.masked


def test_build_inspect_and_preview_speak(tmp_path: Path) -> None:
    from trainwright.config.data_section import DataSection

    source = write_jsonl(tmp_path / "texts.jsonl", ["今天天气很好。\nfirst line [bold] \x1b[31m", "short text"] * 30)
    section = DataSection.model_validate(
        {
            "source": source.source, "tokenizer": {"train": "bpe", "vocab_size": 300}, "sequence_length": 48,
            "packing": "best_fit", "cache": str(tmp_path / "cache"), "validation": {"fraction": 0.1},
        }
    )  # fmt: skip
    loaded = SimpleNamespace(recipe=SimpleNamespace(data=section))
    lines = commands.build(loaded, workers=1)
    folder = Path(lines[0])
    assert TokenDataset.open(folder).rows("train") > 0
    assert any("padding" in line and "documents cut" in line for line in lines)
    assert "every block matches its hash" in commands.inspect(folder)[0]

    shown = "\n".join(commands.preview(folder, rows=2, width=40))
    assert "«" in shown
    assert "今" in shown
    assert "\x1b" not in shown  # the data's own escape codes do not reach the terminal
    from rich.cells import cell_len

    rows = [line for line in shown[shown.index("---") :].split("\n") if line.startswith("  ")]
    assert max(cell_len(line.replace("«", "").replace("»", "")) for line in rows) <= 42
    coloured = "\n".join(commands.preview(loaded, rows=1, color=True))
    assert "\x1b[32m" in coloured
    assert "\x1b[31m" not in coloured


def test_preview_marks_padding_and_untrained_tokens(tmp_path: Path) -> None:
    dataset = build(tmp_path, ["abcdef", "xyz"], packing="best_fit", sequence_length=16)
    shown = "\n".join(commands.preview(dataset.folder, rows=1))
    assert "2 pieces, 7 of 16 labels trained, 9 padding" in shown
    assert "  a«bcdef»\n  x«yz»" in shown


def test_the_manifest_is_readable_json(tmp_path: Path) -> None:
    dataset = build(tmp_path, ["some text"] * 10)
    value = json.loads((dataset.folder / "manifest.json").read_text(encoding="utf-8"))
    assert value["schema"] == 1
    assert value["splits"]["train"]["characters"] == 90
    assert all(len(block) == 16 for facts in value["files"].values() for block in facts["blocks"])
    assert "time" not in value
