"""Masked language modelling: which tokens are hidden, on what it depends, and the loss; oracles are transformers'."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainwright.base.errors import ConfigError, ModelError
from trainwright.config import load_recipe_text
from trainwright.config.rules import apply_rules
from trainwright.config.tasks import MaskedLMSection
from trainwright.data.build import build_dataset
from trainwright.data.dataset import TokenDataset
from trainwright.data.documents import SourceSpec
from trainwright.data.loader import Loader, evaluation_batches
from trainwright.data.spec import BuildSpec
from trainwright.data.tokenizers import Tokenizer, train_tokenizer
from trainwright.models import BertConfig, LlamaConfig, build_model, save_pretrained
from trainwright.tasks.masked_lm import MaskedLM
from trainwright.tasks.masking import word_table
from trainwright.testing import tiny_llama_config

WORDS = ["the", "old", "sailor", "repaired", "seven", "wooden", "boats", "before", "winter", "while", "children"]


def corpus(documents: int, seed: int = 0) -> list[str]:
    """Documents of 20 to 60 words, each word with its own endings, so that WordPiece needs several tokens for some."""
    source = np.random.default_rng(seed)
    endings = ["", "", "ish", "ness", "wards"]
    texts = []
    for _ in range(documents):
        count = int(source.integers(20, 60))
        texts.append(" ".join(source.choice(WORDS) + source.choice(endings) for _ in range(count)))
    return texts


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer("wordpiece", 90, corpus(50))


def dataset(folder: Path, tokenizer: Tokenizer, **options: Any) -> TokenDataset:
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in corpus(120, 3)))
    spec = BuildSpec(
        (SourceSpec(str(folder / "texts.jsonl"), name="texts"),),
        tokenizer,
        **{"validation": None, "sequence_length": 48, **options},
    )
    build_dataset(spec, folder / "built", workers=1)
    return TokenDataset.open(folder / "built")


def task(tokenizer: Tokenizer, seed: int = 0, **options: Any) -> MaskedLM:
    return MaskedLM(MaskedLMSection(name="masked_lm", **options), tokenizer, seed=seed)


def running_text(tokenizer: Tokenizer, rows: int = 400, length: int = 128) -> dict[str, np.ndarray]:
    """A batch as a TokenDataset of one stream gives it."""
    ids = np.concatenate([np.asarray(ids) for ids in tokenizer.encode_batch(corpus(1500, 9))])
    ids = ids[: rows * length + 1]
    assert len(ids) == rows * length + 1
    positions = np.tile(np.arange(length), (rows, 1))
    rows_of = ids[:-1].reshape(rows, length), ids[1:].reshape(rows, length)
    return {"input_ids": rows_of[0], "labels": rows_of[1], "position_ids": positions}


# --- rates ---


def test_rates_of_tokens_are_those_of_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    batch = running_text(tokenizer)
    draws = np.arange(len(batch["input_ids"]))
    ours = task(tokenizer, frame=False).prepare_batch(batch, draws)
    tokenizer.save(tmp_path)
    theirs = transformers.DataCollatorForLanguageModeling(
        transformers.AutoTokenizer.from_pretrained(tmp_path), mlm_probability=0.15, return_tensors="np", seed=5
    )([{"input_ids": row.tolist()} for row in batch["input_ids"]])

    def rates(inputs: np.ndarray, labels: np.ndarray) -> list[float]:
        chosen = labels != -100
        hidden, kept = inputs == tokenizer.special_id("mask"), inputs == batch["input_ids"]
        assert (labels[chosen] == batch["input_ids"][chosen]).all()
        assert kept[~chosen].all()
        return [float(chosen.mean()), float(hidden[chosen].mean()), float(kept[chosen].mean())]

    expected = [0.15, 0.8, 0.1]  # with 7,700 chosen tokens three deviations are 0.005, 0.014, 0.010
    for found in (rates(ours["input_ids"], ours["labels"]), rates(theirs["input_ids"], theirs["labels"])):
        assert np.abs(np.subtract(found, expected)).max() < 0.016, found
    # of 90 ids, some draws give the token itself: 80 % + 10 % + 10 % are then 80 / 9.9 / 10.1
    assert abs(rates(ours["input_ids"], ours["labels"])[0] - 0.15) < 0.006


def test_special_tokens_and_padding_are_never_predicted_nor_drawn(tokenizer: Tokenizer) -> None:
    batch = running_text(tokenizer, rows=200)
    special = [tokenizer.special_id(role) for role in ("cls", "sep", "unk", "mask", "pad")]
    batch["input_ids"] = batch["input_ids"].copy()
    for place, one in enumerate(special):
        batch["input_ids"][:, 10 + 3 * place] = one
    batch["input_ids"][:, 100:] = tokenizer.pad_id
    batch["labels"] = np.where(np.arange(128) >= 99, -100, batch["labels"])
    for masking in ("token", "word", "span"):
        made = task(tokenizer, masking=masking, frame=False).prepare_batch(batch, np.arange(200))
        chosen = made["labels"] != -100
        assert chosen.any()
        assert not np.isin(batch["input_ids"][chosen], special).any()
        assert not chosen[:, 100:].any()
        new = made["input_ids"][(made["input_ids"] != batch["input_ids"])]
        assert set(np.unique(new[np.isin(new, special)])) == {tokenizer.special_id("mask")}
        assert (made["key_mask"] == (np.arange(128) < 100)).all()


def test_whole_words_are_those_of_transformers_and_hidden_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    table = word_table(tokenizer)
    for text in corpus(20, 4):
        encoded = loaded(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        words, _ = transformers.DataCollatorForLanguageModeling._calc_word_ids_and_prob_mask(
            np.asarray([encoded["offset_mapping"]]), np.asarray([encoded["special_tokens_mask"]])
        )
        inner = words[0][1:-1]
        ours = np.cumsum(~table.continues(np.asarray([encoded["input_ids"][1:-1]]))[0])
        assert (ours == inner).all()

    batch = running_text(tokenizer)
    made = task(tokenizer, masking="word", frame=False).prepare_batch(batch, np.arange(400))
    chosen = made["labels"] != -100
    inside = table.continues(batch["input_ids"])
    assert (chosen[:, 1:] == chosen[:, :-1])[inside[:, 1:]].all()  # a word is predicted whole or not at all
    assert abs(chosen.mean() - 0.15) < 0.012
    assert 0.2 < inside.mean() < 0.9  # there are words of several tokens
    hidden = made["input_ids"] == tokenizer.special_id("mask")
    assert abs(hidden[chosen].mean() - 0.8) < 0.016


def test_spans_are_whole_words_of_one_text(tokenizer: Tokenizer) -> None:
    batch = running_text(tokenizer)
    batch["document_ids"] = (np.arange(128) >= 70).astype(np.int32) * np.ones((400, 1), dtype=np.int32)
    made = task(tokenizer, masking="span", frame=False).prepare_batch(batch, np.arange(400))
    chosen = made["labels"] != -100
    assert abs(chosen.mean() - 0.15) < 0.006
    starts = ~word_table(tokenizer).continues(batch["input_ids"])
    starts[:, 70] = True
    for row in range(400):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen[row].astype(int), [0]])))
        for begin, end in edges.reshape(-1, 2):
            assert starts[row, begin]
            assert end == 128 or starts[row, end]
    hidden = made["input_ids"] == tokenizer.special_id("mask")
    assert abs(hidden[chosen].mean() - 0.8) < 0.03  # spans share their fate: 1,800 of them


def test_spans_have_the_lengths_of_the_paper() -> None:
    tokenizer = train_tokenizer("word", None, corpus(200))  # a token is a word
    batch = running_text(tokenizer, rows=100, length=256)
    edge = np.arange(256) >= 100
    batch["document_ids"] = np.tile(edge.astype(np.int32), (100, 1))
    masked = task(tokenizer, masking="span", mask_share=0.1, frame=False)
    chosen = masked.prepare_batch(batch, np.arange(100))["labels"] != -100
    assert abs(chosen.mean() - 0.1) < 0.004
    lengths = []
    for row in chosen:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
        lengths += [int(end - begin) for begin, end in edges.reshape(-1, 2)]
    # min(geometric(0.2), 10) has mean 4.46; a row's last span is cut to what is left, and some touch.
    assert 3.5 < np.mean(lengths) < 5.0, np.mean(lengths)
    assert np.bincount(lengths)[1] / len(lengths) < 0.35  # 0.2, and cut ones
    assert 9 <= max(lengths) <= 30


# --- purity ---


def test_masks_depend_on_seed_and_draw_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = dataset(tmp_path, tokenizer)
    one = task(tokenizer, masking="word")
    whole = Loader(data, 8, seed=1, prefetch=0, transform=one.prepare_batch)
    first = [whole.batch(step) for step in range(3)]
    halves = [
        Loader(data, 8, seed=1, rank=rank, world=2, prefetch=0, transform=task(tokenizer, masking="word").prepare_batch)
        for rank in (0, 1)
    ]
    for step in (2, 0, 1):
        for rank, half in enumerate(halves):
            for key, value in half.batch(step).items():
                assert torch.equal(value, first[step][key][rank::2]) or torch.equal(
                    value, first[step][key][4 * rank : 4 * rank + 4]
                )
    other = Loader(data, 8, seed=1, prefetch=0, transform=task(tokenizer, seed=1, masking="word").prepare_batch)
    assert not torch.equal(other.batch(0)["labels"], first[0]["labels"])
    steps = -(-data.rows("train") // 8)
    masks = {tuple(map(tuple, (whole.batch(step)["labels"] != -100).tolist())) for step in range(3 * steps)}
    assert len(masks) == 3 * steps, "every epoch hides other tokens"


def test_an_evaluation_always_hides_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = dataset(tmp_path, tokenizer)

    def labels(rows: int) -> torch.Tensor:
        batches = evaluation_batches(data, rows, "train", transform=task(tokenizer).prepare_batch)
        return torch.cat([batch["labels"] for batch in batches])[: data.rows("train")]

    assert torch.equal(labels(4), labels(7))


# --- rows ---


@pytest.mark.parametrize("packing", ["concat", "pack", "pad"])
def test_rows_of_every_packing(packing: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from trainwright.data.packing import MODES

    if packing not in MODES:
        packing = next(mode for mode in MODES if mode not in ("concat", "pad"))
    data = dataset(tmp_path, tokenizer, packing=packing)
    rows = np.arange(min(20, data.rows("train")))
    before = data.batch("train", rows)
    made = task(tokenizer).prepare_batch(before, rows)
    original = np.where(made["labels"] != -100, made["labels"], made["input_ids"])
    cls, sep, pad = (tokenizer.special_id(role) for role in ("cls", "sep", "pad"))
    for row in range(len(rows)):
        real = before["input_ids"][row] != pad
        documents = before.get("document_ids", np.zeros_like(before["input_ids"]))[row]
        for document in np.unique(documents[real]):
            inside = np.flatnonzero(real & (documents == document))
            text, was = original[row, inside], before["input_ids"][row, inside]
            if len(inside) < 4:
                assert (text == was).all()
                continue
            assert (text[0], text[-1]) == (cls, sep)
            assert (text[1:-1] == was[:-2]).all(), "framed text is the text"
        assert (original[row, ~real] == pad).all()
    assert ("key_mask" in made) == (packing == "pad")
    if packing == "pad":
        assert (made["key_mask"] == (before["input_ids"] != pad)).all()


def test_words_of_byte_level_tokens_and_chinese() -> None:
    texts = ["hello there, 中文字符测试 don't stop", "中文 hello", *corpus(20)]
    tokenizer = train_tokenizer("bpe", 300, texts, special=["<s>", "</s>", "[MASK]"], min_frequency=2)

    def words(text: str) -> list[str]:
        ids = np.asarray([tokenizer.encode(text)])
        inside = word_table(tokenizer).continues(ids)[0]
        cuts = [*np.flatnonzero(~inside).tolist(), len(inside)]
        return [tokenizer.decode(ids[0, a:b]).strip() for a, b in itertools.pairwise(cuts)]

    assert words("hello there, sailor") == ["hello", "there", ",", "sailor"]
    assert words("中文字") == ["中", "文", "字"]
    assert [word for word in words("children中文 don't") if word] == ["children", "中", "文", "don", "'", "t"] or words(
        "children中文 don't"
    ) == ["children", "中", "文", "don", "'t"]


def test_a_tokenizer_without_mask_is_refused() -> None:
    with pytest.raises(ConfigError, match="role `mask`"):
        task(train_tokenizer("char", None, ["abc"]))


# --- losses ---


def encoder(tokenizer: Tokenizer) -> Any:
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        initializer_range=0.1,
    )
    return build_model(config)


def as_tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}


def test_the_loss_is_that_of_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = encoder(tokenizer)
    save_pretrained(model, tmp_path)
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    batch = running_text(tokenizer, rows=6, length=64)
    batch["input_ids"] = np.where(np.arange(64) >= 50, tokenizer.pad_id, batch["input_ids"])
    batch["labels"] = np.where(np.arange(64) >= 49, -100, batch["labels"])
    masked = task(tokenizer)
    made = as_tensors(masked.prepare_batch(batch, np.arange(6)))
    output = masked.loss(model, made)
    expected = theirs(input_ids=made["input_ids"], attention_mask=made["key_mask"].long(), labels=made["labels"]).loss
    assert output.count == (made["labels"] != -100).sum()
    assert abs(float(output.loss_sum / output.count) - float(expected)) < 1e-5
    (output.loss_sum / output.count).backward()
    expected.backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, other in (
        ("bert.embeddings.word_embeddings.weight", "bert.embeddings.word_embeddings.weight"),
        ("lm_head.decoder.bias", "cls.predictions.bias"),
        ("lm_head.dense.weight", "cls.predictions.transform.dense.weight"),
    ):
        gradient, reference = model.get_parameter(name).grad, theirs_by_name[other].grad
        assert (gradient - reference).norm() / reference.norm() < 1e-5, name
    with torch.no_grad():
        smoothed = task(tokenizer, label_smoothing=0.1)
        assert smoothed.loss(model, made).loss_sum != output.loss_sum
        assert abs(float(smoothed.evaluate(model, made).loss_sum - output.loss_sum)) < 1e-3


def test_documents_of_a_packed_row_do_not_see_each_other(tokenizer: Tokenizer) -> None:
    model = encoder(tokenizer).eval()
    text = torch.randint(5, tokenizer.vocab_size, (1, 20), generator=torch.Generator().manual_seed(1))
    documents = (torch.arange(20) >= 8).int()[None]
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None]
    with torch.no_grad():
        packed = model.hidden_states(text, position_ids=positions, document_ids=documents)
        alone = [model.hidden_states(text[:, :8]), model.hidden_states(text[:, 8:])]
    assert (packed - torch.cat(alone, 1)).abs().max() < 1e-5


def test_a_decoder_is_refused(tokenizer: Tokenizer) -> None:
    model = build_model(LlamaConfig(**tiny_llama_config()))
    with pytest.raises(ModelError, match="left to right"):
        task(tokenizer).loss(model, as_tensors(running_text(tokenizer, rows=2)))


def test_a_tiny_encoder_learns(tokenizer: Tokenizer) -> None:
    model, masked = encoder(tokenizer), task(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = running_text(tokenizer, rows=320, length=64)
    losses = []
    for step in range(60):
        rows = slice(32 * (step % 10), 32 * (step % 10) + 32)
        part = {key: value[rows] for key, value in batch.items()}
        output = masked.loss(model, as_tensors(masked.prepare_batch(part, np.arange(32) + 32 * step)))
        loss = output.loss_sum / output.count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.75 * losses[0], losses


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("task: masked_lm\ndata: {tokenizer: {train: wordpiece}, source: [a.jsonl]}", False),
        ("task: causal_lm\ndata: {tokenizer: {train: wordpiece}, source: [a.jsonl]}", False),
        ("task: causal_lm\ndata: {tokenizer: {train: bpe}, source: [a.jsonl]}", True),
    ],
)
def test_documents_get_no_end_of_text_from_tokenizers_that_have_none(text: str, ends: bool) -> None:
    recipe = apply_rules(load_recipe_text(f"model: {{preset: bert-tiny}}\n{text}\n")).recipe
    assert recipe.data.append_eos is ends
