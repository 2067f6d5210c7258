"""Train tokenizers: byte-level BPE, which spells any text exactly; character level, the simplest that works; WordPiece,
as BERT has it; and whole words, the most frequent ones.

All are deterministic: the same texts give the same tokenizer whatever the number of threads.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import tokenizers as rust
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from trainwright.base.errors import ConfigError, DataError
from trainwright.data.tokenizer_core import Tokenizer

__all__ = ["BERT_SPECIAL", "END_OF_TEXT", "KINDS", "WORD_PATTERN", "byte_level_pipeline", "train_tokenizer"]

KINDS = ("bpe", "char", "wordpiece", "word")

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""The special tokens of BERT (arXiv 1810.04805), in the order of its vocabularies."""

WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How GPT-4 and Llama 3 cut text before merging (cl100k). Keeps runs of indentation whole, numbers in threes."""

_SMALLEST_BPE = 256  # one token for each byte
_BATCH = 512  # texts handed to the library at once


def train_tokenizer(
    kind: str,
    vocab_size: int | None,
    texts: Iterable[str],
    *,
    special: Sequence[str] | None = None,
    added: Sequence[str] = (),
    min_frequency: int = 2,
    lowercase: bool = False,
) -> Tokenizer:
    """A tokenizer of `kind` "bpe", "char", "wordpiece" or "word" learned from texts, which are read once.

    `vocab_size` counts special tokens. For "bpe" and "wordpiece" it is the target (small corpora can give fewer); for
    "char" and "word" it is a limit, None for none: the most frequent stay, and the rest become the unknown token.
    Pairs and words seen fewer than `min_frequency` times are not merged and not kept (not for "char").
    `special` defaults to `<|endoftext|>` for "bpe", to `<unk>`, `<|endoftext|>` for "char", and to BERT_SPECIAL for
    "wordpiece" and "word"; `added` are more of them. They come last in a character vocabulary, else first.
    `<|endoftext|>` (else the first that is not `<unk>`) ends documents, where there is no BERT_SPECIAL.
    `lowercase` is for "wordpiece" and "word": letters lose case and accents, as in BERT's uncased models.

    Raises ConfigError for a size that cannot hold the alphabet, DataError when there is no text.
    """
    counted = _Counted(texts)
    usual = {"bpe": (END_OF_TEXT,), "char": (UNKNOWN, END_OF_TEXT), "wordpiece": BERT_SPECIAL, "word": BERT_SPECIAL}
    if kind not in usual:
        raise ConfigError(f"tokenizer kind {kind!r} is not known", hint=f"use {', '.join(KINDS)}")
    names = list(dict.fromkeys([*(usual[kind] if special is None else special), *added]))
    if kind == "bpe":
        core = _train_bpe(vocab_size, counted, names, min_frequency)
    elif kind == "char":
        core = _train_characters(vocab_size, counted, names)
    else:
        core = _train_bert_style(kind, vocab_size, counted, names, min_frequency, lowercase)
    return Tokenizer(core, special=_bert_roles(names) if kind in ("wordpiece", "word") else _roles(names))


class _Counted:
    """Passes texts on and counts their characters, so that an empty corpus is noticed."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.characters += len(text)
            yield text

    def check(self) -> None:
        if not self.characters:
            raise DataError(
                "no text to train the tokenizer on: the sources gave no document with text",
                hint="check the sources and text_field of the data",
            )


def _roles(names: Sequence[str]) -> dict[str, str]:
    """Which special token is for what, by the customs of GPT-2 and Llama."""
    roles: dict[str, str] = {}
    if UNKNOWN in names:
        roles["unk"] = UNKNOWN
    usual = {"bos": ("<s>", "<bos>"), "eos": ("</s>", "<eos>"), "pad": ("<pad>", "<|pad|>")}
    others = [name for name in names if name != UNKNOWN]
    fallback = END_OF_TEXT if END_OF_TEXT in names else next(iter(others), None)
    for role, customs in usual.items():
        token = next((name for name in customs if name in names), fallback)
        if token is not None:
            roles[role] = token
    if "pad" in roles and roles["pad"] not in usual["pad"] and "eos" in roles:
        roles["pad"] = roles["eos"]
    return {**roles, **{role: token for role, token in _bert_roles(names).items() if role in ("cls", "sep", "mask")}}


def _bert_roles(names: Sequence[str]) -> dict[str, str]:
    """Which special token is for what, by the customs of BERT."""
    customs = dict(zip(("pad", "unk", "cls", "sep", "mask"), BERT_SPECIAL, strict=True))
    return {role: token for role, token in customs.items() if token in names}


def byte_level_pipeline(core: rust.Tokenizer, pattern: str | None) -> rust.Tokenizer:
    """Give a BPE model the byte-level steps around it, cutting words by `pattern` (None: the one of GPT-2)."""
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is None:
        core.pre_tokenizer = bytes_only
    else:
        words = pre_tokenizers.Split(rust.Regex(pattern), behavior="isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_only])
    core.decoder = decoders.ByteLevel()
    return core


def _train_bpe(vocab_size: int | None, texts: _Counted, special: list[str], min_frequency: int) -> rust.Tokenizer:
    smallest = _SMALLEST_BPE + len(special)
    if vocab_size is None or vocab_size < smallest:
        raise ConfigError(
            f"a byte-level BPE vocabulary of {vocab_size} is too small: {_SMALLEST_BPE} bytes and {len(special)} "
            f"special tokens need {smallest}",
            hint="use 4096 or more for a small model, 32768 for a larger one",
        )
    core = byte_level_pipeline(rust.Tokenizer(models.BPE()), WORD_PATTERN)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_batches(texts), trainer)
    texts.check()
    return core


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(itertools.islice(iterator, _BATCH)):
        yield batch


def _train_characters(vocab_size: int | None, texts: _Counted, special: list[str]) -> rust.Tokenizer:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    texts.check()
    characters = sorted(counts)
    if vocab_size is not None and len(characters) + len(special) > vocab_size:
        room = vocab_size - len(special)
        if UNKNOWN not in special or room < 1:
            raise ConfigError(
                f"the text has {len(characters)} kinds of characters and there are {len(special)} special tokens; a "
                f"vocabulary of {vocab_size} cannot hold them",
                hint=f"use {len(characters) + len(special)} or more, or the special token {UNKNOWN} for the rarest",
            )
        characters = sorted(sorted(counts, key=lambda c: (-counts[c], c))[:room])
    vocabulary = {token: index for index, token in enumerate([*characters, *special])}
    # a BPE model without merges gives single characters seven times faster than a split into one-letter words
    core = rust.Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN if UNKNOWN in special else None))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([rust.AddedToken(token, normalized=False, special=True) for token in special])
    return core


def _train_bert_style(
    kind: str, vocab_size: int | None, texts: _Counted, special: list[str], min_frequency: int, lowercase: bool
) -> rust.Tokenizer:
    """WordPiece or whole words, with the cleaning and cutting of BERT: at spaces, punctuation and Chinese characters.

    Special tokens keep their place at the front, and a text or pair is framed as `[CLS] a [SEP] b [SEP]` where a caller
    asks for it.
    """
    missing = [token for token in BERT_SPECIAL[1:4] if token not in special]
    if missing or (vocab_size is not None and vocab_size <= len(special)):
        need = f"the special tokens {', '.join(missing)}" if missing else f"more than {len(special)} tokens"
        raise ConfigError(f"a {kind} tokenizer needs {need}; vocab_size is {vocab_size}, special {special}")
    model: models.Model
    if kind == "wordpiece":
        model = _train_pieces(vocab_size, texts, special, min_frequency, lowercase)
    else:
        model = models.WordLevel(_word_ids(vocab_size, texts, special, min_frequency, lowercase), unk_token="[UNK]")
        texts.check()
    core = _bert_pipeline(model, lowercase)
    core.add_special_tokens([rust.AddedToken(token, normalized=False, special=True) for token in special])
    core.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, core.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return core


def _bert_pipeline(model: models.Model, lowercase: bool) -> rust.Tokenizer:
    core = rust.Tokenizer(model)
    core.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##")
    return core


def _word_ids(
    vocab_size: int | None, texts: Iterable[str], special: list[str], min_frequency: int, lowercase: bool
) -> dict[str, int]:
    """Numbers of the special tokens, then of words from frequent to rare."""
    core = _bert_pipeline(models.WordLevel(unk_token="[UNK]"), lowercase)
    trainer = trainers.WordLevelTrainer(
        vocab_size=1 << 31 if vocab_size is None else vocab_size,
        min_frequency=min_frequency,
        special_tokens=special,
        show_progress=False,
    )
    core.train_from_iterator(_batches(texts), trainer)
    found: dict[str, int] = core.get_vocab(with_added_tokens=True)
    return found


def _train_pieces(
    vocab_size: int | None, texts: _Counted, special: list[str], min_frequency: int, lowercase: bool
) -> models.WordPiece:
    """Special tokens, the characters that go on in a word, those that begin one, then merged pieces.

    The library numbers the first of them in the order of a hash table that differs from process to process, and pairs
    that are equally frequent are merged in the order of their numbers. So they are given to it beforehand, in order.
    """
    kept = list(texts)
    texts.check()
    words = _word_ids(None, kept, [], 1, lowercase)
    inner = {character for word in words for character in word[1:]}
    core = _bert_pipeline(models.WordPiece(unk_token="[UNK]"), lowercase)
    trainer = trainers.WordPieceTrainer(
        vocab_size=1 << 31 if vocab_size is None else vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*special, *(f"##{character}" for character in sorted(inner))],
        show_progress=False,
    )
    core.train_from_iterator(_batches(kept), trainer)
    vocabulary = core.get_vocab(with_added_tokens=True)
    return models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
