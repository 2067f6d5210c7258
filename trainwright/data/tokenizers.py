"""The front door of tokenizers: load one, train one, or annotate with `Tokenizer`.

tokenizer = train_tokenizer("bpe", 8192, (document.text for document in documents))
tokenizer.save("model")
assert load_tokenizer("model").fingerprint == tokenizer.fingerprint
"""

from __future__ import annotations

from trainwright.data.streaming import StreamDecoder
from trainwright.data.tokenizer_core import Tokenizer, parallelism
from trainwright.data.tokenizer_files import holds_tokenizer, load_tokenizer
from trainwright.data.tokenizer_training import END_OF_TEXT, train_tokenizer

__all__ = [
    "END_OF_TEXT",
    "StreamDecoder",
    "Tokenizer",
    "holds_tokenizer",
    "load_tokenizer",
    "parallelism",
    "train_tokenizer",
]
