"""Text in, batches out: readers, tokenizers, chat templates, packing, the exact row index, loaders."""

from trainwright.data.baselines import Baselines, fit_and_score
from trainwright.data.build import build_dataset, prepare_dataset
from trainwright.data.builder import BuildProgress
from trainwright.data.dataset import TokenDataset
from trainwright.data.documents import Document, Problems, Shard, SourceSpec
from trainwright.data.loader import Batch, Loader, evaluation_batches, evaluation_rows
from trainwright.data.manifest import Manifest
from trainwright.data.readers import read_shard
from trainwright.data.sources import list_shards
from trainwright.data.spec import BuildSpec, TrainTokenizer, ValidationSpec, build_spec
from trainwright.data.tokenizers import Tokenizer, holds_tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "Baselines",
    "Batch",
    "BuildProgress",
    "BuildSpec",
    "Document",
    "Loader",
    "Manifest",
    "Problems",
    "Shard",
    "SourceSpec",
    "TokenDataset",
    "Tokenizer",
    "TrainTokenizer",
    "ValidationSpec",
    "build_dataset",
    "build_spec",
    "evaluation_batches",
    "evaluation_rows",
    "fit_and_score",
    "holds_tokenizer",
    "list_shards",
    "load_tokenizer",
    "prepare_dataset",
    "read_shard",
    "train_tokenizer",
]
