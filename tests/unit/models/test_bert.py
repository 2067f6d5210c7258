"""The bert family: sizes, what is refused, the chunked loss of labelled tokens, dropout, old names of tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from trainwright.base.errors import ModelError
from trainwright.models import (
    BertConfig,
    build_model,
    config_from_dict,
    count_flops,
    count_matmul_parameters,
    count_parameters,
    load_pretrained,
    model_plan,
    preset,
    save_pretrained,
)
from trainwright.parallel.tensor.legality import legal_degrees
from trainwright.planner.model_facts import model_facts


def config(**changes: Any) -> BertConfig:
    sizes = {"vocab_size": 83, "hidden_size": 32, "num_layers": 3, "num_heads": 4, "intermediate_size": 48}
    return BertConfig(**{**sizes, "max_position_embeddings": 64, "initializer_range": 0.2, **changes})


ROBERTA = {"architecture": "roberta", "pad_token_id": 1, "type_vocab_size": 1}

# Of the papers' model cards, in millions, without next-sentence head and pooler.
SIZES = {"bert-tiny": 4.4, "bert-mini": 11.2, "bert-small": 28.8, "bert-medium": 41.4, "bert-base": 109.5}


@pytest.mark.parametrize("name", list(SIZES))
def test_presets_have_the_sizes_of_the_published_models(name: str) -> None:
    known = preset(name)
    assert count_parameters(known) / 1e6 == pytest.approx(SIZES[name], rel=0.01)
    assert known.head_dim == 64


def test_presets_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for name, kind in (("bert-mini", "BertForMaskedLM"), ("roberta-base", "RobertaForMaskedLM")):
        with torch.device("meta"):
            values = {key: value for key, value in preset(name).to_hf().items() if key != "architectures"}
            theirs = getattr(transformers, kind)(transformers.AutoConfig.for_model(**values))
        assert count_parameters(preset(name)) == sum(p.numel() for p in theirs.parameters())


def test_facts_count_every_parameter_and_see_both_directions() -> None:
    made = config()
    facts = model_facts(made, 64)
    assert facts.parameters == sum(p.numel() for p in build_model(made).parameters())
    blocks = 3 * (4 * 32 * 32 + 2 * 32 * 48)
    assert count_matmul_parameters(made) == blocks + 32 * 32 + 83 * 32
    assert count_flops(made, 64) == 6 * (blocks + 32 * 32 + 83 * 32) + 12 * 32 * 3 * 64
    assert legal_degrees(model_plan(made), 8) == [1, 2, 4]
    shape = facts.shape
    assert shape is not None
    assert shape.tied
    assert shape.head - shape.embedding == 83 + 32 * 32 + 3 * 32  # bias, dense, norm


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_heads": 5}, "not a multiple"),
        ({"architecture": "albert"}, "expected one of"),
        ({"architecture": "roberta", "pad_token_id": None}, "pad_token_id"),
        ({"hidden_dropout": 1.0}, "probability"),
        ({"activation": "tanhy"}, "unknown activation"),
        ({"head": {"kind": "token"}}, "HeadSpec"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        config(**changes)


@pytest.mark.parametrize(
    "changes", [{"is_decoder": True}, {"position_embedding_type": "relative_key"}, {"add_cross_attention": True}]
)
def test_what_bert_can_be_elsewhere_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(changes))):
        config_from_dict({**config().to_hf(), **changes})


def test_roberta_positions_begin_behind_the_padding() -> None:
    made = config(**ROBERTA)
    assert made.to_hf()["max_position_embeddings"] == 66
    assert config_from_dict(made.to_hf()) == made
    model = build_model(made).eval()
    assert model.bert.embeddings.position_embeddings.weight.shape == (66, 32)
    ids = torch.randint(5, 83, (1, 64))
    with torch.no_grad():
        model(ids)
        with pytest.raises(ModelError, match="65 positions"):
            model(torch.zeros(1, 65, dtype=torch.int64))
        moved = model.bert.embeddings.word_embeddings.weight[ids] + model.bert.embeddings.position_embeddings.weight[2:]
        moved = moved + model.bert.embeddings.token_type_embeddings.weight[0]
        expected = F.layer_norm(moved, (32,), eps=made.layer_norm_eps)
        assert (model.embed(ids, torch.arange(64)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}])
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_of_labelled_tokens_is_that_of_all_logits(tied: bool, options: dict[str, float]) -> None:
    model = build_model(config(tie_embeddings=tied)).double()
    with torch.no_grad():
        model.lm_head.decoder.bias.normal_()
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(640, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(83, (640,), generator=generator)
    labels[torch.rand(640, generator=generator) > 0.15] = -100
    sums = model.head_loss(hidden, labels, **options)
    names = ["lm_head.decoder.weight", "lm_head.decoder.bias", "lm_head.dense.weight", "lm_head.layer_norm.bias"]
    known = dict(model.named_parameters(remove_duplicate=False))
    found = torch.autograd.grad(sums.loss_sum, [hidden, *(known[name] for name in names)])

    logits = model.lm_head(hidden)
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=options.get("label_smoothing", 0.0))
    expected = expected + options.get("z_loss", 0.0) * (torch.logsumexp(logits, -1)[labels >= 0] ** 2).sum()
    theirs = torch.autograd.grad(expected, [hidden, *(known[name] for name in names)])
    assert torch.allclose(sums.loss_sum, expected, rtol=1e-10)
    assert int(sums.count) == int((labels != -100).sum())
    for ours, other in zip(found, theirs, strict=True):
        assert torch.allclose(ours, other, rtol=1e-8, atol=1e-10)


def test_dropout_goes_by_row_and_token_wherever_they_are() -> None:
    model = build_model(config(hidden_dropout=0.2, attention_dropout=0.2)).train()
    ids, rows = torch.randint(83, (4, 12)), torch.tensor([3, 8, 1, 6])

    def states(chosen: list[int]) -> torch.Tensor:
        model.set_dropout(seed=5, rows=rows[chosen])
        return model.hidden_states(ids[chosen])

    whole = states([0, 1, 2, 3])
    assert torch.allclose(whole, torch.cat([states([0, 1]), states([2, 3])]), atol=1e-5)
    model.set_dropout(seed=6, rows=rows)
    assert not torch.allclose(whole, model.hidden_states(ids), atol=1e-2)


def test_every_token_sees_all_of_its_text_and_no_padding() -> None:
    model = build_model(config()).eval()
    ids = torch.randint(83, (1, 10))
    with torch.no_grad():
        before = model.hidden_states(ids)
        changed = ids.clone()
        changed[0, 9] = (ids[0, 9] + 1) % 83
        assert (model.hidden_states(changed) - before)[0, 0].abs().max() > 1e-4
        by_length = model.hidden_states_of({"input_ids": changed, "lengths": torch.tensor([9])})
        assert (by_length[:, :9] - model.hidden_states(ids[:, :9])).abs().max() < 1e-5
        for backend in ("reference", "sdpa", "grouped"):
            model.set_attention_backend(backend)
            assert (model.hidden_states(ids) - before).abs().max() < 1e-5


def test_kinds_of_tokens_count_where_there_are_several() -> None:
    ids, types = torch.randint(5, 83, (1, 10)), (torch.arange(10) > 4).long()[None]
    for changes in ({}, ROBERTA):
        model = build_model(config(**changes)).eval()
        with torch.no_grad():
            apart = float((model.hidden_states(ids, token_type_ids=types) - model.hidden_states(ids)).abs().max())
        assert (apart > 1e-3) == (not changes), "a tokenizer may tell texts of a pair apart, and RoBERTa does not"


def test_names_of_older_releases(tmp_path: Path) -> None:
    model = build_model(config(), seed=3)
    save_pretrained(model, tmp_path)
    assert not (tmp_path / "generation_config.json").exists()
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    old["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    old["cls.seq_relationship.weight"] = torch.zeros(2, 32)
    old["bert.pooler.dense.weight"] = torch.zeros(32, 32)
    old["bert.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(old, tmp_path / "model.safetensors")
    again = load_pretrained(tmp_path)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    old["cls.predictions.decoder.weight"] = torch.zeros(83, 32)
    save_file(old, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="ties the output head"):
        load_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["BertForMaskedLM"]
