"""Translation, summarisation and dialogue: a text in, another text out, by a decoder or an encoder-decoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from trainwright.base.errors import ConfigError, DataError
from trainwright.data.chat_templates import split_tokens
from trainwright.data.examples.example import ExampleEncoder
from trainwright.data.tokenizer_core import Tokenizer
from trainwright.models.heads import HeadSpec
from trainwright.tasks.causal_lm import CausalLM
from trainwright.tasks.pair_encoder import DecoderPairs, EncoderDecoderPairs, PairEncoder, PairTemplate
from trainwright.tasks.sft import SFT, SFTDefinition
from trainwright.tasks.task import LossOutput, Metric, Report
from trainwright.tasks.text_metrics import Written, require_packages, text_report

__all__ = ["DialogueDefinition", "PairDefinition", "Writing"]

DECODER_TEMPLATE = "{source}\n=>\n{target}"
_READING = "{source}{target}"  # an encoder-decoder reads the source alone
_BEST = {"translation": Metric("bleu", True), "summarization": Metric("rougeL", True), "dialogue": Metric()}


class PairDefinition:
    """Translation or summarisation as a recipe says it; see `TaskDefinition`.

    Args:
        section: TranslationSection or SummarizationSection; its `architecture` says what the model is ("auto": a
            decoder) and `decoder_start` which token an encoder-decoder's target begins behind.
        max_length: inputs of the longest example, tokens.
    """

    shape = "pair"

    def __init__(self, section: Any, max_length: int) -> None:
        self.name: str = section.name
        self.section = section
        self.max_length = max_length
        own = section.template if section.template != "auto" else None
        self.pair_template = PairTemplate(own or (_READING if _reads(section) else DECODER_TEMPLATE))
        self.special_tokens = self.pair_template.tokens

    @property
    def max_target(self) -> int:
        """Tokens of the longest target, end token included."""
        wanted = self.section.max_target_tokens
        if wanted != "auto":
            return int(wanted)
        if self.name == "translation":
            return self.max_length if _reads(self.section) else max(1, self.max_length // 2)
        return max(1, self.max_length // 4)

    def survey(self, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Nothing needs to be known of the records."""
        return {}

    def texts(self, record: Mapping[str, Any]) -> Iterator[str]:
        """What a tokenizer that is trained on a record reads: the pair in the template, its tokens left out."""
        text = self.pair_template.prompt(record["source"]) + (record.get("target") or "")
        yield from (piece for piece in split_tokens(text, self.special_tokens) if piece)

    def bind(self, survey: Mapping[str, Any], tokenizer: Tokenizer) -> Writing:
        """Raises DataError for a tokenizer without an end token, MissingDependencyError without the metrics."""
        options = {"max_target": self.max_target, "long": self.section.long}
        encoder: PairEncoder
        if _reads(self.section):
            if self.section.train_on == "all":
                raise ConfigError(
                    "task.train_on is all, and an encoder-decoder writes the target alone",
                    hint="set task.train_on=target, or task.architecture=decoder with a decoder",
                )
            start = _decoder_start(self.section, tokenizer)
            encoder = EncoderDecoderPairs(
                tokenizer, self.pair_template, self.max_length, decoder_start=start, **options
            )
        else:
            whole = self.section.train_on == "all"
            encoder = DecoderPairs(tokenizer, self.pair_template, self.max_length, whole=whole, **options)
        return Writing(self.section, tokenizer, encoder, max_new_tokens=self.max_target)


class DialogueDefinition(SFTDefinition):
    """The next turn of a conversation: chat fine-tuning for a decoder; for an encoder-decoder the conversation so far,
    a line for each message, is the source and the assistant's last message the target."""

    def bind(self, survey: Mapping[str, Any], tokenizer: Tokenizer) -> SFT | Writing:  # type: ignore[override]
        """Raises as SFTDefinition and PairDefinition do."""
        if not _reads(self.section):
            return super().bind(survey, tokenizer)
        section = self.section
        new = min(section.max_new_tokens, self.max_length)
        encoder = EncoderDecoderPairs(
            tokenizer,
            PairTemplate(_READING),
            self.max_length,
            max_target=new,
            long={"cut_turns": "cut", "cut_end": "cut"}.get(section.long, section.long),
            decoder_start=_decoder_start(section, tokenizer),
        )
        return Writing(section, tokenizer, _Conversations(encoder, section.system), max_new_tokens=new)

    def prepare_tokenizer(self, tokenizer: Tokenizer) -> Tokenizer:
        """An encoder-decoder has no chat template."""
        return tokenizer if _reads(self.section) else super().prepare_tokenizer(tokenizer)


def _reads(section: Any) -> bool:
    return bool(section.architecture == "encoder_decoder")


def _decoder_start(section: Any, tokenizer: Tokenizer) -> int:
    """What stands before a target. The model's own value belongs into the section; T5's custom is its padding token."""
    if section.decoder_start != "auto":
        return int(section.decoder_start)
    start = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.eos_id
    if start is None:
        raise ConfigError(
            "no token begins what the decoder writes: the tokenizer has neither a padding nor an end token",
            hint="set task.decoder_start to decoder_start_token_id of the model's config.json",
        )
    return start


class _Conversations:
    """Conversations for an encoder that reads sources: the oldest messages are left out where they do not fit."""

    def __init__(self, pairs: EncoderDecoderPairs, system: str | None) -> None:
        self.pairs = pairs
        self.system = system
        self.features, self.packable, self.max_length = pairs.features, pairs.packable, pairs.max_length
        self.must_train_ids = pairs.must_train_ids
        self.fingerprint = f"conversations {system!r} {pairs.fingerprint}"

    def encode(self, record: Mapping[str, Any]) -> Any:
        return self.pairs.encode(self.pair(record))

    def prompt(self, source: str) -> list[int]:
        return self.pairs.prompt(source)

    def pair(self, record: Mapping[str, Any]) -> dict[str, str]:
        """The record with source and, where the assistant spoke last, target."""
        messages = list(record.get("messages") or ())
        if not messages:
            raise DataError("a record has no messages", hint="expected the column messages")
        answered = messages[-1]["role"] == "assistant"
        if self.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        asked = messages[:-1] if answered else messages
        while self._tokens(asked) > self.max_length and len(asked) > 1:
            asked.pop(1 if asked[0]["role"] == "system" and len(asked) > 2 else 0)
        pair = {"source": _as_lines(asked)}
        return {**pair, "target": messages[-1]["content"]} if answered else pair

    def _tokens(self, messages: Sequence[Mapping[str, Any]]) -> int:
        return len(self.pairs.tokenizer.encode(_as_lines(messages), add_special=True)) + 1


def _as_lines(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in messages)


class Writing:
    """Write a text for a source. See `GeneratingTask`.

    Attributes:
        stop_ids: the end token.
    """

    head: HeadSpec | None = None

    def __init__(self, section: Any, tokenizer: Tokenizer, encoder: PairEncoder, *, max_new_tokens: int) -> None:
        require_packages()
        self.name: str = section.name
        self.best = _BEST[section.name]
        self.section = section
        self.tokenizer = tokenizer
        self.encoder: ExampleEncoder = encoder
        self._pairs = encoder
        self.compiled = False
        self._max_new_tokens = max_new_tokens
        assert tokenizer.eos_id is not None, "encoders of pairs refuse tokenizers without one"
        self._eos_id = tokenizer.eos_id

    # ---- training

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> LossOutput:
        """Cross-entropy in nats over the targets, with label smoothing and z-loss where they are on, and what the model
        itself adds."""
        if "decoder_input_ids" not in batch:
            return self._language_model().loss(model, batch)
        return self._sums(model, batch, self.section.label_smoothing, self.section.z_loss)

    def evaluate(self, model: Any, batch: Mapping[str, Tensor]) -> LossOutput:
        """Plain cross-entropy in nats over the targets."""
        if "decoder_input_ids" not in batch:
            return self._language_model().evaluate(model, batch)
        return self._sums(model, batch, 0.0, 0.0)

    def _language_model(self) -> CausalLM:
        section = self.section
        return CausalLM(label_smoothing=section.label_smoothing, z_loss=section.z_loss, compiled=self.compiled)

    def _sums(self, model: Any, batch: Mapping[str, Tensor], label_smoothing: float, z_loss: float) -> LossOutput:
        """Of an encoder-decoder."""
        sums = model.head_loss(
            model.hidden_states_of(batch).flatten(0, 1),
            batch["labels"].flatten(),
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            compiled=self.compiled,
        )
        return LossOutput(loss_sum=sums.loss_sum, count=sums.count)

    # ---- answers

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self._eos_id,)

    @property
    def max_new_tokens(self) -> int:
        return self._max_new_tokens

    def answered(self, record: Mapping[str, Any]) -> bool:
        """Whether it has a target."""
        return "target" in self._pair(record)

    def prompt(self, record: Mapping[str, Any]) -> list[int]:
        """What a decoder goes on from, or an encoder reads."""
        return self._pairs.prompt(self._pair(record)["source"])

    def prediction(self, record: Mapping[str, Any], tokens: Sequence[int]) -> Mapping[str, Any]:
        """{"text", "ended", "tokens"}: what was written, whether the model ended it, how many tokens it wrote."""
        ids = [int(token) for token in tokens]
        ended = self._eos_id in ids
        written = ids[: ids.index(self._eos_id)] if ended else ids
        return {"text": self.tokenizer.decode(written).strip(), "ended": ended, "tokens": len(written)}

    def predict(
        self, records: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
    ) -> list[Mapping[str, Any]]:
        """Predictions of generated ids: outputs[i]["tokens"][0] are those of record i."""
        return [self.prediction(record, output["tokens"][0]) for record, output in zip(records, outputs, strict=True)]

    def report(self, records: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]) -> Report:
        """BLEU, chrF, ROUGE, exact match and the rate of ended texts, beside the baselines."""
        answers = []
        for record, prediction in zip(records, predictions, strict=True):
            pair = self._pair(record)
            if "target" not in pair:
                raise DataError(
                    "a record has no target to compare with",
                    hint="give the column target, or use `predict`, which needs none",
                )
            others = tuple(text for text in record.get("references") or () if text != pair["target"])
            written = prediction["text"], prediction["ended"], prediction["tokens"]
            answers.append(Written(pair["source"], pair["target"], *written, others))
        return text_report(answers, tokenize=self.section.tokenize)

    def _pair(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        if isinstance(self._pairs, _Conversations):
            return self._pairs.pair(record)
        return {name: record[name] for name in ("source", "target") if record.get(name) is not None}
