"""Twelve architectures through the real trainer: from a folder of transformers to one that transformers opens.

Each starts from weights that transformers saved, trains, is stopped and goes on bit for bit as if it had not been, and
is opened again by transformers with the same parameters and the same outputs. Native families take their own way.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainwright.base.errors import ConfigError
from trainwright.base.faults import InjectedFault
from trainwright.models import load_pretrained
from trainwright.monitor import read_history
from trainwright.trainer import Trainer

transformers = pytest.importorskip("transformers")

VOCABULARY = 300
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"d_model": 32, "vocab_size": VOCABULARY, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
BART = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("ffn_dim", 64), ("layers", 2))}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {**DECODER, **IDS}, "native"),
    "qwen2": ("qwen2", {**DECODER, **IDS}, "native"),
    "qwen3": ("qwen3", {**DECODER, **IDS}, "native"),
    "mistral": ("mistral", {**DECODER, **IDS}, "native"),
    "gemma": ("gemma", {**DECODER, **IDS}, "transformers"),
    "phi": ("phi", {**DECODER, **IDS, "num_key_value_heads": 4}, "transformers"),
    "gpt2": ("gpt2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, **IDS}, "native"),
    "gpt-neox": ("gpt_neox", {**DECODER, **IDS}, "transformers"),
    "bert": ("bert", ENCODER, "native"),
    "roberta": ("roberta", {**ENCODER, "pad_token_id": 0}, "native"),
    "deberta": (
        "deberta-v2",
        {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "pad_token_id": 0},
        "transformers",
    ),
    "t5": ("t5", {**WIDE, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}, "transformers"),
    "bart": ("bart", {**WIDE, **BART, "bos_token_id": 1, "forced_eos_token_id": None}, "transformers"),
    "llama in transformers": ("llama", {**DECODER, **IDS}, "asked"),
}


def kind_of(name: str) -> str:
    return "masked" if name in ("bert", "roberta", "deberta") else "pairs" if name in ("t5", "bart") else "text"


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """The machine's rates are not measured for half a second in every one of these runs."""
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("trainwright.trainer.settle")  # the package has a function of that name
        patch.setattr(module, "measure_matmul_peak", lambda *_, **__: 1e10)
        transformers.utils.logging.disable_progress_bar()
        yield
        transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, pairs and a cache for datasets."""
    root = tmp_path_factory.mktemp("hugging-face")
    words = [
        "the",
        "small",
        "grey",
        "cat",
        "sees",
        "a",
        "big",
        "red",
        "dog",
        "over",
        "an",
        "old",
        "wall",
        "小猫",
        "看见",
    ]
    lines = [" ".join(words[(3 * i + 5 * j) % len(words)] for j in range(6 + i % 7)) for i in range(240)]
    (root / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    pairs = [{"source": line, "target": " ".join(reversed(line.split()[:4]))} for line in lines]
    (root / "pairs.jsonl").write_text(
        "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in pairs), encoding="utf-8"
    )
    return root


def automatic(kind: str) -> Any:
    names = {"text": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "pairs": "AutoModelForSeq2SeqLM"}
    return getattr(transformers, names[kind])


def recipe_for(name: str, root: Path, folder: Path, runs: Path) -> dict[str, Any]:
    kind = kind_of(name)
    data: dict[str, Any] = {
        "source": str(root / ("pairs.jsonl" if kind == "pairs" else "text.txt")),
        "tokenizer": {"train": "wordpiece" if kind == "masked" else "bpe", "vocab_size": VOCABULARY},
        "sequence_length": 32,
        "validation": {"fraction": 0.1},
        "cache": str(root / "cache"),
    }
    return {
        "model": {"path": str(folder), **({"implementation": "transformers"} if MODELS[name][2] == "asked" else {})},
        "task": {"text": "causal_lm", "masked": "masked_lm", "pairs": "translation"}[kind],
        "data": data,
        "train": {"steps": 6, "batch_tokens": 128, "micro_batch": 2, "eval_every": "3 steps", "threads": 1},
        "optim": {"lr": 3e-3},
        "precision": "fp32",
        "checkpoint": {"every": "2 steps", "asynchronous": False},
        "monitor": {"console": "quiet", "tensorboard": False, "log_every": "1 steps"},
        "run": {"dir": str(runs), "name": "run"},
    }


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_resumes_and_opens_in_transformers_again(
    name: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_type, fields, way = MODELS[name]
    kind = kind_of(name)
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(model_type, **fields)
    automatic(kind).from_config(config).save_pretrained(tmp_path / "start")

    undisturbed = Trainer(recipe_for(name, folders, tmp_path / "start", tmp_path / "one")).fit()
    broken = recipe_for(name, folders, tmp_path / "start", tmp_path / "two")
    monkeypatch.setenv("TRAINWRIGHT_FAULTS", "step.after_backward:raise@step=5")
    with pytest.raises(InjectedFault):
        Trainer(broken).fit()
    monkeypatch.delenv("TRAINWRIGHT_FAULTS")
    resumed = Trainer(broken, resume="auto").fit()

    one, two = (load_file(run.folder / "model" / "model.safetensors") for run in (undisturbed, resumed))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    losses = [record["loss"] for record in read_history(undisturbed.folder / "metrics.jsonl", "step")]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    start = load_file(tmp_path / "start" / "model.safetensors")
    assert set(one) == set(start), "the names of the files are those of save_pretrained"
    moved = [key for key in one if one[key].shape == start[key].shape and not torch.equal(one[key], start[key])]
    assert len(moved) > len(one) // 2

    ours = load_pretrained(undisturbed.folder / "model")
    assert ours.config.family == ("transformers" if way == "transformers" else ours.config.family)
    assert (ours.config.family == "transformers") == (way == "transformers")
    theirs, report = automatic(kind).from_pretrained(undisturbed.folder / "model", output_loading_info=True)
    report = report if isinstance(report, dict) else vars(report)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_outputs(ours, theirs.eval(), kind)


def assert_same_outputs(ours: Any, theirs: Any, kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (2, 14), generator=generator)
    mask = torch.arange(14)[None] < torch.tensor([[14], [9]])
    more = {"decoder_input_ids": torch.randint(3, VOCABULARY, (2, 5), generator=generator)} if kind == "pairs" else {}
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask.long(), **more).logits
        if ours.config.family == "transformers":
            seen = ours.logits(ours.hidden_states(ids, key_mask=mask, **more))
        else:
            seen = ours(ids, key_mask=mask)
    real = slice(None) if kind == "pairs" else mask
    if ours.config.family == "transformers":  # the same code on the same numbers
        assert torch.equal(seen[real], expected[real])
    else:
        assert torch.allclose(seen[real], expected[real], atol=2e-6)


def test_a_model_from_scratch_takes_the_special_tokens_of_its_tokenizer(folders: Path, tmp_path: Path) -> None:
    recipe = recipe_for("t5", folders, tmp_path, tmp_path)
    recipe["model"] = {
        "config": {"family": "transformers", "model_type": "t5", "d_model": 32, "d_ff": 64, "num_layers": 1, "d_kv": 8}
    }
    recipe["model"]["config"]["num_heads"] = 4
    result = Trainer(recipe).fit()
    written = json.loads((result.folder / "model" / "generation_config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((result.folder / "model" / "tokenizer_config.json").read_text(encoding="utf-8"))
    words = json.loads((result.folder / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {entry["content"]: entry["id"] for entry in words["added_tokens"]}
    assert written["eos_token_id"] == ids[tokenizer["eos_token"]]
    assert written["decoder_start_token_id"] == ids[tokenizer.get("pad_token") or tokenizer["eos_token"]]
    resolved = (result.folder / "recipe.resolved.yaml").read_text(encoding="utf-8")
    assert "architecture: encoder_decoder" in resolved
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(result.folder / "model")
    assert theirs.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize(
    ("name", "task", "reason"),
    [
        ("deberta", "causal_lm", "causal_lm needs a decoder.* is an encoder"),
        ("phi", "masked_lm", "masked_lm needs an encoder.* is a decoder"),
        ("t5", "causal_lm", "causal_lm needs a decoder.* is an encoder-decoder"),
        ("deberta", "translation", "translation needs a decoder or an encoder-decoder.* is an encoder"),
    ],
)
def test_a_task_that_a_model_cannot_learn_is_refused_before_data_is_built(
    name: str, task: str, reason: str, folders: Path, tmp_path: Path
) -> None:
    model_type, fields, _ = MODELS[name]
    recipe = recipe_for(name, folders, tmp_path, tmp_path)
    recipe["model"] = {"config": {"family": "transformers", "model_type": model_type, **fields}}
    recipe["task"] = task
    with pytest.raises(ConfigError, match=reason):
        Trainer(recipe).fit()
