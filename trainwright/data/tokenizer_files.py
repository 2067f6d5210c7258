"""Open tokenizers as they are found: Hugging Face folders and names, SentencePiece models, GPT-2 and BERT files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers as rust
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from trainwright.base.errors import DataError, MissingDependencyError
from trainwright.data.sentencepiece_model import read_llama2c_tokenizer, read_sentencepiece
from trainwright.data.tokenizer_core import ROLES, Tokenizer
from trainwright.data.tokenizer_training import END_OF_TEXT, byte_level_pipeline

__all__ = ["holds_tokenizer", "load_tokenizer"]

_HUB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")
_HUB_FILES = [
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
    *("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe", "vocab.txt"),
]
_KNOWN = "tokenizer.json, tokenizer.model, vocab.json + merges.txt, encoder.json + vocab.bpe or vocab.txt"

# Where no file says what a special token is for: the names that published vocabularies give it, most specific first.
_CUSTOMS = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "[BOS]", "<|startoftext|>", END_OF_TEXT),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "[EOS]", END_OF_TEXT),
    "unk": ("<unk>", "[UNK]", "<|unk|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "sep": ("[SEP]",),
    "cls": ("[CLS]",),
    "mask": ("[MASK]", "<mask>"),
}


def load_tokenizer(spec: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a file, a folder or a hub name (`owner/name`, `owner/name@revision`).

    Files: tokenizer.json, SentencePiece `.model`, BERT vocab.txt, one of GPT-2's two files, llama2.c `.bin`.
    Special tokens and the chat template come from tokenizer_config.json and its companions in the same folder.
    Raises DataError when nothing fits, naming what was looked for.
    """
    path = Path(spec)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        return _from_file(path)
    match = _HUB_NAME.fullmatch(str(spec))
    if match is None or path.suffix in (".json", ".model", ".txt", ".bin"):
        raise DataError(f"{spec}: no such tokenizer file or folder", hint=f"a folder with {_KNOWN} is expected")
    return _from_hub(match["name"], match["revision"])


def _from_hub(name: str, revision: str | None) -> Tokenizer:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError(
            f"{name!r} is no file or folder here; fetching it from the hub needs the package huggingface_hub",
            hint="pip install 'trainwright[hub]', or correct the path",
        ) from error
    try:
        folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES)
    except Exception as error:  # the client raises whatever its layers raise: network, cache, names, permissions
        cause = " ".join(str(error).split())
        raise DataError(
            f"tokenizer {name!r}: no such file or folder here, and the hub did not give it: "
            f"{type(error).__name__}: {cause:.300}",
            hint="check the path or the name, the network, HF_TOKEN for gated models and HF_HUB_OFFLINE",
        ) from error
    return _from_folder(Path(folder))


def holds_tokenizer(folder: str | os.PathLike[str]) -> bool:
    """Whether `load_tokenizer` finds a tokenizer's file in a folder; it may still be damaged."""
    return _file_in(Path(folder)) is not None


def _file_in(folder: Path) -> Path | None:
    """The file of a folder's tokenizer, of several the first."""
    for name in ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "encoder.json"):
        if (folder / name).is_file():
            return folder / name
    candidates = sorted(folder.glob("*.model")) or sorted(folder.glob("*vocab.txt"))
    return candidates[0] if len(candidates) == 1 else None


def _from_folder(folder: Path) -> Tokenizer:
    found = _file_in(folder)
    if found is not None:
        return _from_file(found)
    seen = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise DataError(f"{folder}: no tokenizer in this folder (it holds {seen})", hint=f"expected {_KNOWN}")


def _from_file(path: Path) -> Tokenizer:
    settings = _settings(path.parent)
    if path.suffix == ".model":
        tokenizer = read_sentencepiece(
            path, add_bos=settings.get("add_bos_token"), add_eos=settings.get("add_eos_token")
        )
    elif path.suffix == ".bin":
        tokenizer = read_llama2c_tokenizer(path)
    elif path.suffix == ".txt" and path.name != "merges.txt":
        tokenizer = _word_pieces(path, settings)
    elif path.name in ("vocab.json", "merges.txt", "encoder.json", "vocab.bpe"):
        tokenizer = _gpt2(path.parent, old=path.name in ("encoder.json", "vocab.bpe"))
    elif path.suffix == ".json":
        tokenizer = Tokenizer(_core_from_json(path))
    else:
        raise DataError(f"{path}: not a tokenizer file", hint=f"expected {_KNOWN}, or a .model or llama2.c .bin file")
    return _with_settings(tokenizer, settings)


def _core_from_json(path: Path) -> rust.Tokenizer:
    try:
        return rust.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for every malformed file
        raise DataError(
            f"{path}: not a tokenizer.json that the tokenizers library {rust.__version__} reads: {error}",
            hint="download it again, or update the tokenizers package when the file is newer",
        ) from error


# ---- what stands beside the vocabulary


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json, and the chat template from wherever it lies."""
    settings = {**_json_object(folder / "special_tokens_map.json"), **_json_object(folder / "tokenizer_config.json")}
    template = folder / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    elif isinstance(settings.get("chat_template"), list):
        named = {entry["name"]: entry["template"] for entry in settings["chat_template"]}
        settings["chat_template"] = named.get("default", next(iter(named.values()), None))
    return settings


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}", hint="download it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: a JSON {type(value).__name__}; expected an object")
    return value


def _with_settings(tokenizer: Tokenizer, settings: dict[str, Any]) -> Tokenizer:
    """The same pipeline with the special tokens, template and length that the settings name."""
    named: dict[str, str] = {}
    for role in ROLES:
        value = settings.get(f"{role}_token")
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            named[role] = token
    special = named or tokenizer.special or _by_custom(tokenizer.core)
    length = settings.get("model_max_length")
    return Tokenizer(
        tokenizer.core,
        special=special,
        chat_template=settings.get("chat_template") or tokenizer.chat_template,
        model_max_length=int(length) if isinstance(length, int | float) and length < 1e12 else None,
    )


def _by_custom(core: rust.Tokenizer) -> dict[str, str]:
    special = {token.content for token in core.get_added_tokens_decoder().values() if token.special}
    found = {role: next((name for name in names if name in special), None) for role, names in _CUSTOMS.items()}
    roles = {role: token for role, token in found.items() if token is not None}
    if "pad" not in roles and "eos" in roles:
        roles["pad"] = roles["eos"]
    return roles


# ---- vocabularies of older models


def _gpt2(folder: Path, *, old: bool) -> Tokenizer:
    """Byte-level BPE from its two files, cut into words as GPT-2 cuts them."""
    vocabulary, merges = (
        folder / name for name in (("encoder.json", "vocab.bpe") if old else ("vocab.json", "merges.txt"))
    )
    for path in (vocabulary, merges):
        if not path.is_file():
            raise DataError(f"{path}: missing; a GPT-2 tokenizer is two files, {vocabulary.name} and {merges.name}")
    ids = _json_object(vocabulary)
    pairs = []
    for number, line in enumerate(merges.read_text(encoding="utf-8").splitlines(), start=1):
        parts = line.split(" ")
        if line.startswith("#version") or not line:
            continue
        if len(parts) != 2 or not all(parts):
            raise DataError(f"{merges}:{number}: {line!r:.80}; expected two tokens with a space between")
        pairs.append((parts[0], parts[1]))
    try:
        model = models.BPE(ids, pairs)
    except Exception as error:  # plain Exception, when a merge is not in the vocabulary
        raise DataError(
            f"{merges}: does not belong to {vocabulary.name}: {error}", hint="take both from one model"
        ) from error
    core = byte_level_pipeline(rust.Tokenizer(model), None)
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    _add_known_special(core, ids)
    special = _by_custom(core)
    if END_OF_TEXT in ids and "unk" not in special:
        special["unk"] = END_OF_TEXT  # GPT-2's own setting
    return Tokenizer(core, special=special)


def _add_known_special(core: rust.Tokenizer, vocabulary: Iterable[str]) -> None:
    known = {name for names in _CUSTOMS.values() for name in names}
    present = [token for token in vocabulary if token in known]
    core.add_special_tokens([rust.AddedToken(token, normalized=False, special=True) for token in present])


def _word_pieces(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """BERT's WordPiece from vocab.txt, one token per line.

    Lower case where tokenizer_config.json says so; without one, where no token has a capital letter.
    """
    tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    ids = {token.removesuffix("\r"): index for index, token in enumerate(tokens)}
    required = ("[UNK]", "[CLS]", "[SEP]")
    missing = [token for token in required if token not in ids]
    if missing:
        raise DataError(f"{path}: lacks {', '.join(missing)}; expected a BERT vocabulary, one token per line")
    capitals = any(re.match(r"(?:##)?[A-Z]", token) for token in ids)
    lower = bool(settings.get("do_lower_case", not capitals))
    core = rust.Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    core.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
        strip_accents=settings.get("strip_accents"),
        lowercase=lower,
    )
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##")
    _add_known_special(core, ids)
    core.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return Tokenizer(core, special=_by_custom(core))
