"""Supervised fine-tuning on chats: the loss is on what the assistant writes, ends of turns included, on nothing else.

A batch is the same whether rows are padded or packed: labels stand where the assistant's characters are (see
`data.chat_spans`), by position and never by the value of a token, so a padding token that is also the end token does
no harm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from trainwright.base.errors import DataError
from trainwright.data.chat_encoding import ChatFormat
from trainwright.data.chat_messages import plain_messages
from trainwright.data.chat_templates import choose_template, read_template, split_tokens, template_tokens, with_template
from trainwright.data.examples.example import ExampleEncoder
from trainwright.data.templates import render_chat
from trainwright.data.tokenizer_core import Tokenizer
from trainwright.models.heads import HeadSpec
from trainwright.tasks.causal_lm import CausalLM
from trainwright.tasks.chat_encoder import ChatEncoder, shortened
from trainwright.tasks.task import LossOutput, Metric, Report
from trainwright.tasks.text_metrics import Written, require_packages, text_report
from trainwright.tasks.text_metrics.overlap import packages_missing

__all__ = ["SFT", "SFTDefinition"]


class SFTDefinition:
    """Supervised fine-tuning as a recipe says it; see `TaskDefinition`.

    Args:
        section: the recipe's `task` (SFTSection, or DialogueSection for a decoder).
        max_length: inputs of the longest example, tokens.
    """

    shape = "messages"

    def __init__(self, section: Any, max_length: int) -> None:
        self.name: str = section.name
        self.section = section
        self.max_length = max_length
        self.template: str = section.template if section.template == "auto" else read_template(section.template)
        self._source = choose_template(section.template, None)
        self.special_tokens = template_tokens(self._source)

    def survey(self, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Nothing needs to be known of the records."""
        return {}

    def texts(self, record: Mapping[str, Any]) -> Iterator[str]:
        """What a tokenizer that is trained on a record reads: the chat as the template writes it, special tokens left
        out."""
        if "messages" not in record:
            yield record["text"]
            return
        try:
            messages = plain_messages(record["messages"])
            text = render_chat(self._source, messages, tools=record.get("tools"), bos_token="", eos_token="")
        except DataError:  # the encoder says what is wrong with it
            return
        yield from (piece for piece in split_tokens(text, self.special_tokens) if piece)

    def prepare_tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer with the template of this task, as it is to be saved."""
        return with_template(tokenizer, self.section.template)

    def bind(self, survey: Mapping[str, Any], tokenizer: Tokenizer) -> SFT:
        """Raises DataError where the template and the tokenizer do not belong together."""
        return SFT(self.section, tokenizer, self.max_length)


class SFT:
    """Answer as the assistant does. See `GeneratingTask`.

    Attributes:
        tokenizer: with the chat template that prompts are written by; this one belongs into the model's folder.
        stop_ids: tokens that end an answer; generation_config.json should name them as eos_token_id.
    """

    head: HeadSpec | None = None
    best = Metric()

    def __init__(self, section: Any, tokenizer: Tokenizer, max_length: int) -> None:
        self.name: str = section.name
        self.section = section
        self.chat = ChatFormat(tokenizer, section.template, system=section.system)
        self.tokenizer = self.chat.tokenizer
        self.encoder: ExampleEncoder = ChatEncoder(self.chat, max_length, train_on=section.train_on, long=section.long)
        self.compiled = False
        if section.name == "dialogue" or section.overlap is True:
            require_packages()

    # ---- training

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> LossOutput:
        """Cross-entropy in nats over the trained tokens, with label smoothing and z-loss where they are on."""
        return self._language_model().loss(model, batch)

    def evaluate(self, model: Any, batch: Mapping[str, Tensor]) -> LossOutput:
        """Plain cross-entropy in nats."""
        return self._language_model().evaluate(model, batch)

    def _language_model(self) -> CausalLM:
        section = self.section
        return CausalLM(label_smoothing=section.label_smoothing, z_loss=section.z_loss, compiled=self.compiled)

    # ---- answers

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.chat.stop_ids

    @property
    def max_new_tokens(self) -> int:
        """At most half of the longest example, so that a question fits beside it."""
        return min(int(self.section.max_new_tokens), max(1, self.encoder.max_length // 2))

    def answered(self, record: Mapping[str, Any]) -> bool:
        """Whether it is a chat that ends with the assistant."""
        return "messages" in record and self._split(record)[1] is not None

    def prompt(self, record: Mapping[str, Any]) -> list[int]:
        """What stands before the assistant's last message. Where it would not fit beside an answer of `max_new_tokens`,
        the oldest turns are left out, and of a single turn that is too long the beginning."""
        before, _ = self._split(record)
        room = self.encoder.max_length - self.max_new_tokens
        ids = self.chat.prompt(before, record.get("tools"))
        for rest in shortened(before):
            if len(ids) <= room:
                break
            ids = self.chat.prompt(rest, record.get("tools"))
        return ids[-room:]

    def prediction(self, record: Mapping[str, Any], tokens: Sequence[int]) -> Mapping[str, Any]:
        """{"text", "ended", "tokens"}: the answer, whether the model ended it, how many tokens it wrote."""
        ids = [int(token) for token in tokens]
        stops = [place for place, token in enumerate(ids) if token in self.stop_ids]
        written = ids[: stops[0]] if stops else ids
        return {"text": self.tokenizer.decode(written).strip(), "ended": bool(stops), "tokens": len(written)}

    def predict(
        self, records: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> list[Mapping[str, Any]]:
        """Predictions of generated ids: outputs[i]["tokens"][0] are those of record i."""
        return [self.prediction(record, output["tokens"][0]) for record, output in zip(records, outputs, strict=True)]

    def report(self, records: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]) -> Report:
        """Exact match, rate of ended answers and, where wanted, BLEU, chrF and ROUGE, beside the baselines."""
        answers = []
        for record, prediction in zip(records, predictions, strict=True):
            before, expected = self._split(record)
            if expected is None:
                raise DataError(
                    "a chat does not end with a message of the assistant, so there is nothing to compare with",
                    hint="give chats with answers, or use `predict`, which needs none",
                )
            asked = next((m["content"] for m in reversed(before) if m["role"] == "user"), "")
            answers.append(Written(asked, expected, prediction["text"], prediction["ended"], prediction["tokens"]))
        wanted = getattr(self.section, "overlap", True)
        with_overlap = not packages_missing() if wanted == "auto" else bool(wanted)
        return text_report(answers, tokenize=self.section.tokenize, with_overlap=with_overlap)

    def _split(self, record: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
        """The messages before the assistant's last one, and what that one says; None where the user spoke last."""
        if "messages" not in record:
            raise DataError("a record of running text asks nothing", hint="give records with messages")
        messages = self.chat.messages(record["messages"])
        last = len(messages) - 1
        while last >= 0 and messages[last]["role"] != "assistant":
            last -= 1
        if any(message["role"] == "user" for message in messages[last + 1 :]) or last < 0:
            return messages, None
        if not messages[last].get("tool_calls"):
            return messages[:last], messages[last]["content"].strip()
        return messages[:last], self.chat.said(messages[: last + 1], record.get("tools"))
