"""Tasks whose targets are texts: instructions, translation, summaries, dialogue; and embeddings of texts."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from trainwright.config.fields import Auto, Name, Real, Truth, Whole, Words
from trainwright.config.tasks.base import TaskSection, TokenTask

__all__ = ["DialogueSection", "EmbeddingSection", "SFTSection", "SummarizationSection", "TranslationSection"]

_TOKENIZE = ("auto", "13a", "zh", "char", "intl", "none")
Tokenize = Annotated[Literal["auto", "13a", "zh", "char", "intl", "none"], Words(_TOKENIZE)]
Architecture = Annotated[Literal["auto", "decoder", "encoder_decoder"], Words(("auto", "decoder", "encoder_decoder"))]
DecoderStart = Annotated[int | Auto, Whole(("auto",))]
Long = Annotated[Literal["cut_turns", "cut_end", "drop", "refuse"], Words(("cut_turns", "cut_end", "drop", "refuse"))]


class _ChatSection(TokenTask):
    template: Annotated[str, Name(what_it_is="auto, the name of a chat template, a file, or Jinja text")] = "auto"
    """How messages become text: auto is the tokenizer's own chat template, else ChatML where it knows its tokens, else
    Zephyr's; or a built-in one (chatml, llama3, mistral, gemma, phi3, zephyr, vicuna, alpaca, plain), a Jinja file, or
    Jinja text. It is saved with the tokenizer."""
    train_on: Annotated[Literal["assistant", "last", "all"], Words(("assistant", "last", "all"))] = "assistant"
    """What is learnt: every message of the assistant, its last one, or the whole text. Ends of turns belong to them."""
    system: Annotated[str | None, Name((None,))] = None
    """System message of chats that bring none."""
    long: Long = "cut_turns"
    """Chats longer than data.sequence_length: leave out their oldest turns (a chat whose last turn does not fit is
    dropped), cut their end, drop them, or stop. Nothing that was cut off ends with an end-of-turn token."""
    max_new_tokens: Annotated[int, Whole(minimum=1)] = 256
    """Longest answer that is written in evaluation and prediction."""
    tokenize: Tokenize = "auto"
    """Words of BLEU and ROUGE: sacreBLEU's 13a, zh, char, intl or none; auto is zh where most letters are Chinese."""


class SFTSection(_ChatSection):
    """Answer as the assistant of a chat does."""

    overlap: Annotated[bool | Auto, Truth(("auto",))] = "auto"
    """Report BLEU, chrF and ROUGE beside exact match; auto is true where sacrebleu and rouge-score are installed."""


class DialogueSection(_ChatSection):
    """Write the next turn of a conversation."""

    architecture: Architecture = "auto"
    """A decoder continues the conversation; an encoder-decoder reads it and writes the last answer. auto is what the
    model is."""
    decoder_start: DecoderStart = "auto"
    """Token id before the first one that an encoder-decoder writes; auto is decoder_start_token_id of its
    config.json."""


class _PairSection(TokenTask):
    architecture: Architecture = "auto"
    """A decoder continues the source; an encoder-decoder reads it. auto is what the model is."""
    decoder_start: DecoderStart = "auto"
    """Token id before the first one that an encoder-decoder writes; auto is decoder_start_token_id of its
    config.json."""
    template: Annotated[str, Name(what_it_is="auto, or a text with {source} and {target}")] = "auto"
    """How a decoder sees a pair: a text with {source} and, at its end, {target}; tokens such as <|en|> in it are added
    to a tokenizer that is trained. auto puts a line with => between them. For an encoder-decoder the part before
    {target} is what is read, and auto is the source alone."""
    train_on: Annotated[Literal["target", "all"], Words(("target", "all"))] = "target"
    """What a decoder learns: the target, or the whole pair (for a model from scratch and few pairs: it learns the
    language of the sources too)."""
    long: Annotated[Literal["cut", "drop", "refuse"], Words(("cut", "drop", "refuse"))] = "cut"
    """Pairs longer than data.sequence_length: cut the end of the source (and of a target longer than
    max_target_tokens, which then has no end token), drop them, or stop."""
    tokenize: Tokenize = "auto"
    """Words of BLEU and ROUGE: sacreBLEU's 13a, zh, char, intl or none; auto is zh where most letters are Chinese."""


class TranslationSection(_PairSection):
    """Write a text in another language."""

    max_target_tokens: Annotated[int | Auto, Whole(("auto",), minimum=1)] = "auto"
    """Longest target, and longest text that is written; auto is half of data.sequence_length (all of it for an
    encoder-decoder)."""


class SummarizationSection(_PairSection):
    """Write a shorter text."""

    max_target_tokens: Annotated[int | Auto, Whole(("auto",), minimum=1)] = "auto"
    """Longest summary, and longest text that is written; auto is a quarter of data.sequence_length."""


class EmbeddingSection(TaskSection):
    """Vectors that are near for texts that belong together (InfoNCE, arXiv 1807.03748, with in-batch negatives)."""

    counted: ClassVar[str] = "pairs"

    frame: Annotated[Literal["auto", "encoder", "decoder"], Words(("auto", "encoder", "decoder"))] = "auto"
    """What stands around a text: what the tokenizer itself puts there, else [CLS] and [SEP] where it has them (auto).
    encoder: [CLS] and [SEP], which a tokenizer that the run trains then gets; decoder: the end token behind it."""
    pooling: Annotated[Literal["auto", "first", "last", "mean"], Words(("auto", "first", "last", "mean"))] = "mean"
    """The vector of a text: its first token's, its last one's, or the mean; auto is first for an encoder and last for a
    decoder."""
    temperature: Annotated[float, Real(above=0)] = 0.05
    """Cosines are divided by it (SimCSE, arXiv 2104.08821, uses 0.05)."""
    symmetric: Annotated[bool, Truth()] = False
    """Also let every positive find its anchor among the anchors of the batch (as CLIP, arXiv 2103.00020)."""
    negatives: Annotated[int, Whole()] = 0
    """Given negatives that are used of each record, beside the positives of the other records in the batch."""
    query_prefix: Annotated[str | None, Name((None,))] = None
    """Written before every anchor ("query: ")."""
    passage_prefix: Annotated[str | None, Name((None,))] = None
    """Written before every positive and negative ("passage: ")."""
    gather: Annotated[bool, Truth()] = True
    """Take the positives of all data-parallel ranks as negatives, with gradients through them. Micro-batches of one
    step are never mixed: train.micro_batch decides how many negatives there are."""

    def problems(self) -> Any:
        if self.label_smoothing:
            yield "label_smoothing", "0: contrastive losses have none"
