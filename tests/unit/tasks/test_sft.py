"""Fine-tuning on chats: labels by position, ends learnt, long chats cut at turns, a loss that no batching changes."""

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

from trainwright.base.errors import DataError
from trainwright.config.tasks import SFTSection
from trainwright.data.examples.example import IGNORE, Example
from trainwright.data.tokenizers import Tokenizer, train_tokenizer
from trainwright.models import LlamaConfig, build_model
from trainwright.tasks.registry import DEFINITIONS
from trainwright.tasks.sft import SFT, SFTDefinition
from trainwright.testing import tiny_llama_config

TEXTS = ["Hello world, how are you today? 你好，世界。今天天气很好 0123456789 The end. " * 4]


def tokenizer_for(*, pad_is_eos: bool = False) -> Tokenizer:
    special = ["</s>", "<|im_start|>", "<|im_end|>"] + ([] if pad_is_eos else ["<pad>"])
    return train_tokenizer("bpe", 400, TEXTS, special=special)


def task_of(max_length: int = 128, tokenizer: Tokenizer | None = None, **options: Any) -> SFT:
    section = SFTSection(name="sft", **options)
    return SFTDefinition(section, max_length).bind({}, tokenizer or tokenizer_for())


def chat(*turns: str, system: str | None = None) -> dict[str, Any]:
    """A record: user and assistant take turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


RECORDS = [
    chat("Hello", "Hello world."),
    chat("你好", "你好，世界。今天天气很好。", "and today?", "0123"),
    chat("how are you", "The end.", system="Be brief"),
    chat("1", "2", "3", "4", "5", "6 7 8 9"),
]


def encode(task: SFT, records: Sequence[dict[str, Any]] = RECORDS) -> list[Example]:
    return [task.encoder.encode(record).examples[0] for record in records]


def padded(examples: Sequence[Example], pad: int) -> dict[str, Tensor]:
    width = max(example.length for example in examples)
    ids = np.full((len(examples), width), pad, dtype=np.int64)
    labels = np.full((len(examples), width), IGNORE, dtype=np.int64)
    for row, example in enumerate(examples):
        ids[row, : example.length] = example.arrays["input_ids"]
        labels[row, : example.length] = example.arrays["labels"]
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def packed(examples: Sequence[Example]) -> dict[str, Tensor]:
    """All of them in one row, apart by document_ids, each with positions from 0."""
    join = [np.concatenate([example.arrays[name] for example in examples]) for name in ("input_ids", "labels")]
    positions = np.concatenate([np.arange(example.length) for example in examples])
    documents = np.concatenate([np.full(example.length, number) for number, example in enumerate(examples)])
    values = {"input_ids": join[0], "labels": join[1], "position_ids": positions}
    batch = {name: torch.from_numpy(value.astype(np.int64))[None] for name, value in values.items()}
    return {**batch, "document_ids": torch.from_numpy(documents.astype(np.int32))[None]}


@pytest.fixture
def model() -> Any:
    return build_model(LlamaConfig(**tiny_llama_config(vocab_size=420)), dtype=torch.float64)


def sums_and_gradients(task: SFT, model: Any, batches: Sequence[dict[str, Tensor]]) -> tuple[float, int, list[Tensor]]:
    """What an optimizer step sees: the mean loss, how many tokens, the gradients of that mean."""
    model.zero_grad()
    outputs = [task.loss(model, batch) for batch in batches]
    count = sum(int(output.count) for output in outputs)
    total = sum(float(output.loss_sum.detach()) for output in outputs)
    for output in outputs:
        (output.loss_sum / count).backward()
    return total / count, count, [parameter.grad.clone() for parameter in model.parameters()]


def test_loss_and_gradients_do_not_depend_on_batching(model: Any) -> None:
    """Padded, packed, alone, in two micro-batches, with other padding: one loss, one gradient, to 1e-6 (fp64)."""
    task = task_of(label_smoothing=0.1, z_loss=1e-3)
    examples = encode(task)
    ways = {
        "padded": [padded(examples, pad=3)],
        "other padding": [padded(examples, pad=0)],
        "packed": [packed(examples)],
        "packed in another order": [packed(examples[::-1])],
        "accumulated": [padded(examples[:1], pad=3), padded(examples[1:], pad=3)],
        "packed and accumulated": [packed(examples[:2]), packed(examples[2:])],
        "one by one": [padded([example], pad=3) for example in examples],
    }
    expected_loss, expected_count, expected = sums_and_gradients(task, model, ways.pop("padded"))
    assert expected_count == sum(int((example.arrays["labels"] != IGNORE).sum()) for example in examples)
    assert max(float(gradient.abs().max()) for gradient in expected) > 1e-3
    for way, batches in ways.items():
        loss, count, gradients = sums_and_gradients(task, model, batches)
        assert count == expected_count, way
        assert abs(loss - expected_loss) < 1e-9, way
        worst = max(float((a - b).abs().max()) for a, b in zip(gradients, expected, strict=True))
        assert worst < 1e-9, (way, worst)


def test_the_loss_is_cross_entropy_over_what_the_assistant_wrote(model: Any) -> None:
    task = task_of()
    batch = padded(encode(task), pad=3)
    logits = model(batch["input_ids"])
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE, reduction="sum"
    )
    output = task.evaluate(model, batch)
    assert abs(float((output.loss_sum - wanted).detach())) < 1e-9
    assert int(output.count) == int((batch["labels"] != IGNORE).sum())


def labels_as_text(task: SFT, example: Example) -> str:
    labels = example.arrays["labels"]
    return task.tokenizer.decode(labels[labels != IGNORE], skip_special=False)


def test_labels_are_the_next_tokens_of_the_assistant_with_the_end_of_its_turns() -> None:
    task = task_of()
    (example,) = task.encoder.encode(RECORDS[1]).examples
    assert labels_as_text(task, example) == "你好，世界。今天天气很好。<|im_end|>0123<|im_end|>"
    ids, labels = example.arrays["input_ids"], example.arrays["labels"]
    known = labels[:-1] != IGNORE
    assert (labels[:-1][known] == ids[1:][known]).all()
    assert labels[-1] == task.encoder.must_train_ids[0]


def test_a_padding_token_that_is_the_end_token_is_learnt_where_it_ends_and_ignored_where_it_pads(model: Any) -> None:
    tokenizer = tokenizer_for(pad_is_eos=True)
    assert tokenizer.pad_id == tokenizer.eos_id
    task = task_of(tokenizer=tokenizer, template="plain")
    assert task.encoder.must_train_ids == (tokenizer.eos_id,)
    examples = encode(task)
    for example in examples:
        assert tokenizer.eos_id in example.arrays["labels"]
    loss, count, gradients = sums_and_gradients(task, model, [padded(examples, pad=int(tokenizer.pad_id or 0))])
    other_loss, other_count, others = sums_and_gradients(task, model, [packed(examples)])
    assert count == other_count
    assert abs(loss - other_loss) < 1e-9
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(gradients, others, strict=True))


def test_train_on() -> None:
    last = task_of(train_on="last")
    assert labels_as_text(last, encode(last)[1]) == "0123<|im_end|>"
    everything = task_of(train_on="all")
    assert labels_as_text(everything, encode(everything)[0]).startswith("user\nHello<|im_end|>")
    assert last.encoder.fingerprint != everything.encoder.fingerprint


def test_nothing_of_a_prompt_is_ever_a_label() -> None:
    """Users write Q, assistants write only digits: no label spells a Q."""
    task = task_of()
    for turns in (2, 4, 6):
        record = chat(*["QQQ Q", "123"] * (turns // 2))
        (example,) = task.encoder.encode(record).examples
        assert labels_as_text(task, example) == "123<|im_end|>" * (turns // 2)


# ---- what does not fit


def test_long_chats_lose_their_oldest_turns_and_keep_the_system_message() -> None:
    record = chat("first question", "first answer", "second", "2nd", "third", "3rd", system="SYS")
    whole = task_of(1000).encoder.encode(record).examples[0].length
    task = task_of(whole - 1)
    encoded = task.encoder.encode(record)
    (example,) = encoded.examples
    assert labels_as_text(task, example) == "2nd<|im_end|>3rd<|im_end|>"
    text = task.tokenizer.decode(example.arrays["input_ids"], skip_special=False)
    assert text.startswith("<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nsecond")
    assert encoded.cut_tokens == whole - example.length > 0
    (exact,) = task_of(whole).encoder.encode(record).examples
    assert exact.length == whole


def test_a_last_turn_that_does_not_fit_drops_the_chat() -> None:
    encoded = task_of(20).encoder.encode(chat("a", "b", "c", "x" * 300))
    assert encoded.examples == ()
    assert encoded.dropped == "longer than data.sequence_length"


def test_a_cut_end_is_not_given_an_end_token() -> None:
    task = task_of(20, long="cut_end")
    (example,) = task.encoder.encode(chat("a", "x" * 300)).examples
    assert example.length <= 20
    assert "<|im_end|>" not in labels_as_text(task, example)
    whole = task_of(1000, long="cut_end").encoder.encode(chat("a", "x" * 300)).examples[0]
    assert example.arrays["labels"].tolist() == whole.arrays["labels"][: example.length].tolist()
    assert task.encoder.encode(chat("a" * 300, "b")).dropped is not None


def test_drop_and_refuse() -> None:
    record = chat("a", "b", "c", "x" * 300)
    assert task_of(20, long="drop").encoder.encode(record).dropped == "longer than data.sequence_length"
    with pytest.raises(DataError, match=r"the chat has \d+ tokens; data.sequence_length is 20"):
        task_of(20, long="refuse").encoder.encode(record)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (chat("only a question"), "no message of the assistant"),
        ({"messages": []}, "no message of the assistant"),
        (chat("say <|im_end|>", "no"), "the chat holds the special token <|im_end|>"),
    ],
)
def test_records_with_nothing_to_train_are_dropped_with_the_reason(record: dict[str, Any], reason: str) -> None:
    encoded = task_of().encoder.encode(record)
    assert (encoded.examples, encoded.dropped) == ((), reason)


def test_running_text_beside_chats_is_trained_whole_with_its_end() -> None:
    task = task_of()
    (example,) = task.encoder.encode({"text": "Hello world. <|im_end|>"}).examples
    assert labels_as_text(task, example).endswith("</s>")
    assert task.encoder.must_train_ids[0] not in example.arrays["labels"]  # the text spells it, it is no token
    assert set(task.encoder.must_train_ids) & set(example.arrays["labels"].tolist()) == {task.tokenizer.eos_id}
    assert example.length == int((example.arrays["labels"] != IGNORE).sum())
    cut = task_of(4).encoder.encode({"text": "Hello world, how are you today? 你好"})
    assert cut.examples[0].length == 4
    assert cut.cut_tokens > 0
    assert "</s>" not in labels_as_text(task, cut.examples[0])
    with pytest.raises(DataError, match="neither messages nor text"):
        task.encoder.encode({"source": "x"})


# ---- answers


def test_prompt_and_prediction() -> None:
    task = task_of()
    tokenizer = task.tokenizer
    text = tokenizer.decode(task.prompt(RECORDS[1]), skip_special=False)
    assert text.endswith("and today?<|im_end|>\n<|im_start|>assistant\n")
    assert task.prompt(chat("Hello")) == task.prompt(chat("Hello", "answer"))
    answer = tokenizer.encode("0123<|im_end|>\nnever seen")
    assert task.prediction(RECORDS[1], answer) == {
        "text": "0123",
        "ended": True,
        "tokens": len(tokenizer.encode("0123")),
    }
    assert task.prediction(RECORDS[1], tokenizer.encode("012"))["ended"] is False
    assert task.predict([RECORDS[1]], [{"tokens": [answer]}]) == [task.prediction(RECORDS[1], answer)]
    assert task.stop_ids == (tokenizer.core.token_to_id("<|im_end|>"), tokenizer.eos_id)
    assert task.max_new_tokens == 64  # half of 128
    assert task_of(2000).max_new_tokens == 256


def test_a_long_conversation_is_asked_with_its_newest_turns() -> None:
    record = chat(*["question " * 5, "answer " * 5] * 6, "the last one?", "yes")
    task = task_of(120, max_new_tokens=20)
    prompt = task.prompt(record)
    assert len(prompt) <= 100
    assert task.tokenizer.decode(prompt).endswith("the last one?\nassistant\n")
    assert len(task_of(5000).prompt(record)) > 100
    single = task.prompt(chat("word " * 300))
    assert len(single) == 100
    assert task.tokenizer.decode(single).endswith("word \nassistant\n")


def test_report() -> None:
    task = task_of(overlap=False)
    predictions = [
        {"text": "Hello world.", "ended": True, "tokens": 3},
        {"text": "9999", "ended": False, "tokens": 2},
        {"text": "The end.", "ended": True, "tokens": 2},
        {"text": "6 7 8 9", "ended": True, "tokens": 5},
    ]
    report = task.report(RECORDS, predictions)
    assert report.metrics["exact_match"] == 0.75
    assert report.metrics["eos_rate"] == 0.75
    assert report.metrics["mean_tokens"] == 3.0
    assert [dict(error) for error in report.errors] == [
        {"text": "and today?", "expected": "0123", "predicted": "9999", "ended": False}
    ]
    names = [row[0] for row in report.tables[0].rows]
    assert names == ["model", "lead-1 (first sentence)", "copy of the source"]
    with pytest.raises(DataError, match="does not end with a message of the assistant"):
        task.report([chat("only asked")], predictions[:1])


def test_a_called_tool_is_the_expected_answer() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    record = {"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "tool_calls": [call]}]}
    task = task_of(overlap=False)
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    report = task.report([record], [{"text": text, "ended": True, "tokens": 9}])
    assert report.metrics["exact_match"] == 1.0


# ---- as the rest of the house uses it


def test_the_definition() -> None:
    definition = DEFINITIONS["sft"](SFTSection(name="sft"), 64)
    assert definition.shape == "messages"
    assert definition.survey(iter(RECORDS)) == {}
    assert SFTDefinition(SFTSection(name="sft"), 64).special_tokens == ("<|im_end|>", "<|im_start|>")
    assert SFTDefinition(SFTSection(name="sft", template="gemma"), 64).special_tokens == (
        "<end_of_turn>",
        "<start_of_turn>",
    )


def test_encoders_cross_processes() -> None:
    task = task_of()
    again = pickle.loads(pickle.dumps(task.encoder))
    assert again.fingerprint == task.encoder.fingerprint
    assert again.encode(RECORDS[0]).examples[0].arrays["labels"].tolist() == encode(task)[0].arrays["labels"].tolist()


def test_a_mismatch_of_template_and_tokenizer_stops_before_training() -> None:
    plain = train_tokenizer("bpe", 300, TEXTS)
    with pytest.raises(DataError, match="could never learn to stop"):
        task_of(tokenizer=plain, template="chatml")
    assert task_of(tokenizer=plain).stop_ids == (plain.eos_id,)
    assert task_of(tokenizer=plain, template="plain").stop_ids == (plain.eos_id,)


def test_real_instructions(shared_data: Callable[[str], Path]) -> None:
    """Chinese and English records of real files: what is trained is exactly the answer."""
    rows = json.loads(shared_data("alpaca_zh_carbonz0/zh-data-part-00.json").read_text(encoding="utf-8"))[:200]
    pairs = [(row["instruction"] + ("\n" + row["input"] if row["input"] else ""), row["output"]) for row in rows]
    lines = shared_data("dolly_slice/dolly_first6400_instruction_response.jsonl").read_text(encoding="utf-8")
    dolly = [json.loads(line) for line in lines.splitlines()[:200]]
    pairs += [(row["instruction"], row["output"]) for row in dolly]
    task = task_of(100_000)
    for question, answer in pairs:
        (example,) = task.encoder.encode(chat(question, answer)).examples
        assert labels_as_text(task, example) == answer + "<|im_end|>"


def test_only_chats_that_end_with_the_assistant_can_be_judged() -> None:
    task = task_of()
    assert [task.answered(record) for record in RECORDS] == [True] * len(RECORDS)
    assert not task.answered(chat("Hello", "Hello world.", "and today?"))
    assert not task.answered({"text": "Hello world"})
