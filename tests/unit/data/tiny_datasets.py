"""Small datasets for the tests of this folder: character-level, so that a token is a character and rows can be read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainwright.data.build import build_dataset
from trainwright.data.dataset import TokenDataset
from trainwright.data.documents import SourceSpec
from trainwright.data.spec import BuildSpec
from trainwright.data.tokenizers import train_tokenizer

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789 .\n"


def write_jsonl(path: Path, texts: Sequence[str]) -> SourceSpec:
    """One document a line; the file's name without ending names the source."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return SourceSpec(str(path), name=path.stem)


def build(folder: Path, texts: Sequence[str], **options: Any) -> TokenDataset:
    """A dataset of these documents with one token a character and no validation split."""
    folder.mkdir(parents=True, exist_ok=True)
    source = write_jsonl(folder / "texts.jsonl", texts)
    options = {"validation": None, "append_eos": False, "sequence_length": 8, **options}
    tokenizer = train_tokenizer("char", None, [ALPHABET])
    build_dataset(BuildSpec((source,), tokenizer, **options), folder / "dataset", workers=1)
    return TokenDataset.open(folder / "dataset")
