"""Translation, summaries and dialogue: the target and its end are trained; prompts are those of training; one loss for
decoders however rows are batched, and the loss of transformers for encoder-decoders."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainwright.base.errors import ConfigError, DataError
from trainwright.config.tasks import DialogueSection, SummarizationSection, TranslationSection
from trainwright.data.examples.example import IGNORE, Example
from trainwright.data.tokenizers import Tokenizer, train_tokenizer
from trainwright.models import LlamaConfig, build_model
from trainwright.tasks.generation import DialogueDefinition, PairDefinition, Writing
from trainwright.tasks.pair_encoder import PairTemplate, shorter_text
from trainwright.tasks.registry import DEFINITIONS
from trainwright.tasks.sft import SFT
from trainwright.testing import tiny_llama_config

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

TEXTS = ["Zwei Männer stehen draußen. Two men are outside. Ein Hund läuft. A dog runs. 今天天气很好。天气 => " * 8]
PAIRS = [
    {"source": "Zwei Männer stehen draußen.", "target": "Two men are outside."},
    {"source": "Ein Hund läuft.", "target": "A dog runs."},
    {"source": "今天天气很好。", "target": "天气好"},
]


def tokenizer_for(*special: str) -> Tokenizer:
    return train_tokenizer("bpe", 400, TEXTS, special=["</s>", "<pad>", *special])


def translation(max_length: int = 64, tokenizer: Tokenizer | None = None, **options: Any) -> Writing:
    definition = PairDefinition(TranslationSection(name="translation", **options), max_length)
    return definition.bind({}, tokenizer or tokenizer_for(*definition.special_tokens))


def encode(task: Any, records: Sequence[dict[str, Any]] = PAIRS) -> list[Example]:
    return [task.encoder.encode(record).examples[0] for record in records]


def labels_as_text(task: Any, example: Example) -> str:
    labels = example.arrays["labels"]
    return task.tokenizer.decode(labels[labels != IGNORE], skip_special=False)


def padded(examples: Sequence[Example], features: Sequence[Any], pad: int = 1) -> dict[str, Tensor]:
    batch: dict[str, Tensor] = {}
    for feature in features:
        rows = [example.arrays[feature.name] for example in examples]
        width = max(len(row) for row in rows)
        fill = IGNORE if feature.name == "labels" else pad
        full = [np.pad(row.astype(np.int64), (0, width - len(row)), constant_values=fill) for row in rows]
        batch[feature.name] = torch.from_numpy(np.stack(full))
        if feature.name in ("input_ids", "decoder_input_ids"):
            mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
            batch["key_mask" if feature.name == "input_ids" else "decoder_key_mask"] = mask
    batch["lengths"] = torch.tensor([example.length for example in examples])
    return batch


# ---- decoders


def test_a_decoder_learns_the_target_and_its_end() -> None:
    task = translation()
    for record, example in zip(PAIRS, encode(task), strict=True):
        assert labels_as_text(task, example) == record["target"] + "</s>"
        whole = task.tokenizer.decode([*example.arrays["input_ids"], example.arrays["labels"][-1]], skip_special=False)
        assert whole == f"{record['source']}\n=>\n{record['target']}</s>"


def test_a_decoder_can_learn_the_whole_pair() -> None:
    task, plain = translation(train_on="all"), translation()
    for record, example, other in zip(PAIRS, encode(task), encode(plain), strict=True):
        text = task.tokenizer.decode([example.arrays["input_ids"][0], *example.arrays["labels"]], skip_special=False)
        assert text == f"{record['source']}\n=>\n{record['target']}</s>"
        assert (example.arrays["input_ids"] == other.arrays["input_ids"]).all()
        assert task.prompt(record) == plain.prompt(record)
    assert task.encoder.fingerprint != plain.encoder.fingerprint
    cut = translation(64, max_target_tokens=6, train_on="all")
    (example,) = cut.encoder.encode({"source": "x", "target": "A dog runs. " * 20}).examples
    assert IGNORE not in example.arrays["labels"]
    assert cut.tokenizer.eos_id not in example.arrays["labels"]
    with pytest.raises(ConfigError, match="an encoder-decoder writes the target alone"):
        translation(train_on="all", architecture="encoder_decoder", decoder_start=0)


def test_a_prompt_is_what_stands_before_the_target_in_training() -> None:
    for template in ("auto", "<|de|>{source}<|en|>{target}", "{source} => {target}", "translate {source}: {target}"):
        task = translation(template=template)
        for record, example in zip(PAIRS, encode(task), strict=True):
            labels = example.arrays["labels"]
            first = int(np.flatnonzero(labels != IGNORE)[0])
            assert task.prompt(record) == example.arrays["input_ids"][: first + 1].tolist(), template
            assert task.prompt({"source": record["source"]}) == task.prompt(record)


def test_tokens_of_the_template_belong_to_a_trained_tokenizer() -> None:
    definition = PairDefinition(
        TranslationSection(name="translation", template="<|de|>{source}<|en|>{target}"), max_length=64
    )
    assert definition.special_tokens == ("<|de|>", "<|en|>")
    task = definition.bind({}, tokenizer_for(*definition.special_tokens))
    ids = task.prompt({"source": "Ein Hund"})
    assert task.tokenizer.token(ids[0]) == "<|de|>"
    assert task.tokenizer.token(ids[-1]) == "<|en|>"


@pytest.mark.parametrize("template", ["{source}", "{target}{source}", "{source}{target}.", "{source}{source}{target}"])
def test_templates_without_source_or_with_something_behind_the_target_are_refused(template: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a text with \{source\} once and \{target\} at its end"):
        PairTemplate(template)


def test_loss_and_gradients_of_a_decoder_do_not_depend_on_batching() -> None:
    model = build_model(LlamaConfig(**tiny_llama_config(vocab_size=400)), dtype=torch.float64)
    task = translation()
    examples = encode(task)
    joined = {
        name: torch.from_numpy(np.concatenate([e.arrays[name] for e in examples]).astype(np.int64))[None]
        for name in ("input_ids", "labels")
    }
    joined["position_ids"] = torch.cat([torch.arange(e.length) for e in examples])[None]
    joined["document_ids"] = torch.cat([torch.full((e.length,), n) for n, e in enumerate(examples)])[None].int()
    ways = [
        [padded(examples, task.encoder.features)],
        [joined],
        [padded([example], task.encoder.features) for example in examples],
    ]
    found = []
    for batches in ways:
        model.zero_grad()
        outputs = [task.loss(model, batch) for batch in batches]
        count = sum(int(output.count) for output in outputs)
        for output in outputs:
            (output.loss_sum / count).backward()
        total = sum(float(output.loss_sum.detach()) for output in outputs)
        found.append((total / count, count, [p.grad.clone() for p in model.parameters()]))
    for loss, count, gradients in found[1:]:
        assert count == found[0][1] == sum(int((e.arrays["labels"] != IGNORE).sum()) for e in examples)
        assert abs(loss - found[0][0]) < 1e-9
        assert max(float((a - b).abs().max()) for a, b in zip(gradients, found[0][2], strict=True)) < 1e-9


# ---- what does not fit


def test_long_sources_lose_their_end_in_training_and_in_serving_alike() -> None:
    long = {"source": "Ein Hund läuft. " * 40, "target": "A dog runs."}
    task = translation(32)
    encoded = task.encoder.encode(long)
    (example,) = encoded.examples
    assert example.length <= 32
    assert encoded.cut_tokens > 100
    assert labels_as_text(task, example) == "A dog runs.</s>"
    first = int(np.flatnonzero(example.arrays["labels"] != IGNORE)[0])
    assert task.prompt(long) == example.arrays["input_ids"][: first + 1].tolist()
    assert task.prompt({"source": long["source"]}) == task.prompt(long)
    assert len(task.prompt(long)) <= 16
    assert task.tokenizer.decode(task.prompt(long)).endswith("\n=>\n")


def test_targets_that_are_cut_have_no_end() -> None:
    task = translation(64, max_target_tokens=6)
    (example,) = task.encoder.encode({"source": "x", "target": "A dog runs. " * 20}).examples
    assert int((example.arrays["labels"] != IGNORE).sum()) == 6
    assert task.tokenizer.eos_id not in example.arrays["labels"]
    assert task.max_new_tokens == 6


def test_drop_and_refuse() -> None:
    long = {"source": "Ein Hund läuft. " * 40, "target": "A dog runs."}
    assert translation(32, long="drop").encoder.encode(long).dropped == "longer than data.sequence_length"
    with pytest.raises(DataError, match=r"the source has \d+ tokens; data.sequence_length of 32 leaves 16 for it"):
        translation(32, long="refuse").encoder.encode(long)
    with pytest.raises(DataError, match="the target has"):
        translation(32, long="refuse").encoder.encode({"source": "x", "target": "A dog runs. " * 40})
    with pytest.raises(ConfigError, match="the template alone needs"):
        translation(20, max_target_tokens=18)


def test_records_that_cannot_be_trained() -> None:
    task = translation()
    assert task.encoder.encode({"source": "x", "target": " "}).dropped == "an empty target"
    assert task.encoder.encode({"source": "x </s> y", "target": "z"}).dropped == "a text holds the special token </s>"
    with pytest.raises(DataError, match="no target to learn"):
        task.encoder.encode({"source": "x"})


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(DataError, match="could never learn to stop"):
        translation(tokenizer=Tokenizer(tokenizer_for().core, special={}))


@pytest.mark.parametrize("limit", [0, 1, 7, 40])
def test_shorter_text(limit: int) -> None:
    text = "one two three four five six seven"
    shown, tokens, cut = shorter_text(text, lambda part: len(part.split()), limit)
    assert shown == " ".join(text.split()[:limit])
    assert (tokens, cut) == (min(limit, 7), max(0, 7 - limit))


# ---- encoder-decoders


def writer_of(kind: str) -> tuple[Any, dict[str, Any]]:
    """A tiny encoder-decoder as the house builds it, in fp64, and the fields of its config.json."""
    pytest.importorskip("transformers")
    from trainwright.models.hugging_face.config import HuggingFaceConfig

    fields = {
        "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1},
        "bart": {
            **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 128},
            **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64},
            **{"decoder_ffn_dim": 64, "decoder_start_token_id": 0},
        },
    }[kind]
    values = {"model_type": kind, "vocab_size": 400, "pad_token_id": 1, "eos_token_id": 0, **fields}
    config = HuggingFaceConfig.from_fields(values).with_dropout(0.0)
    return build_model(config, dtype=torch.float64), values


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_loss_of_an_encoder_decoder_is_that_of_transformers_and_padding_changes_nothing(kind: str) -> None:
    model, values = writer_of(kind)
    start = values["decoder_start_token_id"]
    task = translation(architecture="encoder_decoder", decoder_start=start)
    assert isinstance(task, Writing)
    examples = encode(task)
    for record, example in zip(PAIRS, examples, strict=True):
        assert labels_as_text(task, example) == record["target"] + "</s>"
        assert example.arrays["decoder_input_ids"][0] == start
        assert example.arrays["decoder_input_ids"][1:].tolist() == example.arrays["labels"][:-1].tolist()
    batch = padded(examples, task.encoder.features)
    output = task.evaluate(model, batch)
    with torch.no_grad():
        theirs = model(
            input_ids=batch["input_ids"], attention_mask=batch["key_mask"].long(), labels=batch["labels"]
        ).loss  # they shift the labels themselves
    assert abs(float(output.loss_sum.detach()) / int(output.count) - float(theirs)) < 1e-6
    alone = [task.evaluate(model, padded([example], task.encoder.features)) for example in examples]
    assert sum(int(one.count) for one in alone) == int(output.count)
    assert abs(sum(float(one.loss_sum.detach()) for one in alone) - float(output.loss_sum.detach())) < 1e-6


def test_an_encoder_reads_the_source_alone_or_what_the_template_says() -> None:
    task = translation(architecture="encoder_decoder", decoder_start=1)
    assert task.tokenizer.decode(task.prompt(PAIRS[1]), skip_special=False) == "Ein Hund läuft.</s>"
    named = translation(architecture="encoder_decoder", template="translate German: {source}\n{target}")
    assert named.tokenizer.decode(named.prompt(PAIRS[1])) == "translate German: Ein Hund läuft."
    assert encode(named)[0].arrays["decoder_input_ids"][0] == named.tokenizer.pad_id
    assert not named.encoder.packable
    long = named.encoder.encode({"source": "Ein Hund " * 200, "target": "A dog"})
    assert long.examples[0].length <= 64
    assert long.examples[0].arrays["input_ids"][-1] == named.tokenizer.eos_id
    assert long.cut_tokens > 0


# ---- answers and reports


def test_predictions_and_report() -> None:
    task = translation()
    ids = [*task.tokenizer.encode("Two men are outside."), task.tokenizer.eos_id, 5, 6]
    prediction = task.prediction(PAIRS[0], ids)
    assert prediction == {"text": "Two men are outside.", "ended": True, "tokens": len(ids) - 3}
    assert task.predict(PAIRS[:1], [{"tokens": [ids]}]) == [prediction]
    others = [{"text": "A dog.", "ended": True, "tokens": 2}, {"text": "天气", "ended": False, "tokens": 1}]
    report = task.report(PAIRS, [prediction, *others])
    assert report.metrics["exact_match"] == pytest.approx(1 / 3)
    assert 0 < report.metrics["bleu"] < 100
    assert task.best.name in report.metrics
    assert task.best.higher
    with pytest.raises(DataError, match="no target to compare with"):
        task.report([{"source": "x"}], [prediction])


def test_summaries_take_a_quarter() -> None:
    definition = DEFINITIONS["summarization"](SummarizationSection(name="summarization"), 100)
    task = definition.bind({}, tokenizer_for())
    assert isinstance(task, Writing)
    assert task.max_new_tokens == 25
    assert task.best.name == "rougeL"


def conversation(*turns: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}


def test_dialogue_of_a_decoder_is_chat_fine_tuning() -> None:
    section = DialogueSection(name="dialogue", template="plain")
    task = DialogueDefinition(section, 64).bind({}, tokenizer_for())
    assert isinstance(task, SFT)
    assert task.name == "dialogue"
    (example,) = task.encoder.encode(conversation("Ein Hund?", "A dog.", "天气?", "很好")).examples
    assert labels_as_text(task, example) == "A dog.</s>很好</s>"
    report = task.report([conversation("a", "b")], [{"text": "b", "ended": True, "tokens": 1}])
    assert report.metrics["rougeL"] == 100


def test_dialogue_of_an_encoder_decoder_reads_the_conversation() -> None:
    section = DialogueSection(name="dialogue", architecture="encoder_decoder", decoder_start=1, system="Be kind")
    task = DialogueDefinition(section, 60).bind({}, tokenizer_for())
    assert isinstance(task, Writing)
    record = conversation("Ein Hund?", "A dog.", "天气?", "很好")
    (example,) = task.encoder.encode(record).examples
    assert labels_as_text(task, example) == "很好</s>"
    read = "system: Be kind\nuser: Ein Hund?\nassistant: A dog.\nuser: 天气?</s>"
    assert task.tokenizer.decode(example.arrays["input_ids"], skip_special=False) == read
    assert task.prompt(record) == example.arrays["input_ids"].tolist()
    assert task.prompt({"messages": record["messages"][:-1]}) == task.prompt(record)
    long = conversation(*["Ein Hund läuft.", "A dog runs."] * 10, "天气?", "很好")
    kept = task.tokenizer.decode(task.encoder.encode(long).examples[0].arrays["input_ids"])
    assert kept.startswith("system: Be kind\n")
    assert kept.endswith("user: 天气?")
    with pytest.raises(DataError, match="no target to learn"):
        task.encoder.encode(conversation("only asked"))


def test_encoders_cross_processes_and_say_when_they_change() -> None:
    seen = set()
    for options in ({}, {"long": "drop"}, {"template": "{source}>{target}"}, {"architecture": "encoder_decoder"}):
        task = translation(**options)
        again = pickle.loads(pickle.dumps(task.encoder))
        assert again.encode(PAIRS[0]).examples[0].arrays["labels"].tolist() == encode(task)[0].arrays["labels"].tolist()
        seen.add(again.fingerprint)
    assert len(seen) == 4


def test_real_pairs(shared_data: Callable[[str], Path]) -> None:
    """German to English, and Chinese abstracts to titles: what is trained is exactly the target."""
    sides = [
        shared_data(f"multi30k/val.{side}").read_text(encoding="utf-8").splitlines()[:200] for side in ("de", "en")
    ]
    rows = [line.split("\t") for line in shared_data("csl_title_zh/dev.tsv").read_text(encoding="utf-8").splitlines()]
    pairs = [*zip(*sides, strict=True), *((row[-2], row[-1]) for row in rows[:100])]
    lines = shared_data("dialogsum/dialogsum.dev.jsonl").read_text(encoding="utf-8").splitlines()[:50]
    pairs += [(row["dialogue"], row["summary"]) for row in map(json.loads, lines)]
    task = translation(20_000)
    for source, target in pairs:
        record = {"source": source, "target": target}
        (example,) = task.encoder.encode(record).examples
        assert labels_as_text(task, example) == target.strip() + "</s>"
        first = int(np.flatnonzero(example.arrays["labels"] != IGNORE)[0])
        assert task.prompt(record) == example.arrays["input_ids"][: first + 1].tolist()
