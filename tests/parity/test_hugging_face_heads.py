"""Heads of tasks on transformers models give the scores of transformers' own classes, and survive folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face_runs import VOCABULARY, tiny_config
from torch import Tensor

from trainwright.base.errors import ModelError
from trainwright.models import HeadSpec, attach_head, build_model, load_config, load_pretrained, save_pretrained
from trainwright.models.fields import config_fields, config_from_fields
from trainwright.models.importing import Pretrained

transformers = pytest.importorskip("transformers")

LABELS = ("red", "green", "blue")
HEADS = {
    "sequence": HeadSpec("sequence", LABELS, dropout=0.0),
    "token": HeadSpec("token", LABELS, crf=True, dropout=0.0),
    "span": HeadSpec("span", dropout=0.0),
    "entities": HeadSpec("entities", LABELS, dropout=0.0),
    "embedding": HeadSpec("embedding"),
    "mean": HeadSpec("sequence", LABELS, pooling="mean", dropout=0.0),
}
CLASSES = {
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "span": "AutoModelForQuestionAnswering",
}
SHAPES = {"sequence": (3, 3), "token": (3, 11, 3), "span": (3, 11, 2), "entities": (3, 3), "embedding": (3, 32)}


def batch_of(name: str) -> dict[str, Tensor]:
    ids = torch.randint(9, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([11, 9, 9])
    if name in ("t5", "bart"):  # whose classes read the vector of the last end token
        ids[:, 8] = 2
    mask = torch.arange(11)[None] < lengths[:, None]
    return {
        "input_ids": torch.where(mask, ids, 0),
        "lengths": lengths,
        "key_mask": mask,
        "position_ids": torch.arange(11).expand(3, 11),
        "entity_starts": torch.tensor([[1, 4], [0, 2], [3, 5]]),
    }


@pytest.mark.parametrize(
    "name", ["gemma", "phi", "gpt_neox", "deberta-v2", "roberta", "albert", "modernbert", "t5", "bart"]
)
def test_scores_are_those_of_the_class_and_survive_a_folder(name: str, tmp_path: Path) -> None:
    base, batch = tiny_config(name), batch_of(name)
    save_pretrained(build_model(base, seed=9), tmp_path / "lm")
    for key, spec in HEADS.items():
        if name == "bart" and key in ("token", "entities", "embedding", "mean"):
            with pytest.raises(ModelError, match="no bart model of kind text_encoder"):
                dataclasses.replace(base, head=spec)
            continue
        config = dataclasses.replace(base, head=spec)
        assert config_from_fields(config_fields(config)) == config
        model = build_model(config, seed=5).eval()
        scores = model.scores(batch)
        assert tuple(scores.shape) == SHAPES[spec.kind]
        assert scores.dtype == torch.float32
        folder = tmp_path / key
        save_pretrained(model, folder)
        again = load_pretrained(folder, config=load_config(folder, native=False))
        assert again.config.head == spec
        assert torch.equal(again.scores(batch), scores)
        if config.class_kind in CLASSES:
            theirs = getattr(transformers, CLASSES[config.class_kind]).from_pretrained(folder).eval()
            expected = whole_scores(theirs(input_ids=batch["input_ids"], attention_mask=batch["key_mask"].long()))
            real = batch["key_mask"] if scores.dim() == 3 else slice(None)
            assert torch.allclose(scores[real], expected[real], atol=1e-6)
            assert theirs.config.id2label == dict(enumerate(LABELS)) or spec.kind == "span"
        pretrained = Pretrained(tmp_path / "lm", config, seed=0)  # the trunk is read, the head begins anew
        trunk = [key for key, _ in model.named_parameters() if key not in pretrained.fresh]
        assert len(trunk) > 10
        if spec.crf:
            assert model.task_head.crf is not None
            assert {key for key in pretrained.fresh if ".crf." in key}


def whole_scores(output: Any) -> Tensor:
    """Start and end beside each other, where they are apart."""
    if getattr(output, "start_logits", None) is None:
        return output.logits
    return torch.stack((output.start_logits, output.end_logits), -1)


def test_a_text_that_holds_the_padding_token_is_scored_at_its_own_end() -> None:
    model = build_model(dataclasses.replace(tiny_config("phi"), head=HEADS["sequence"]), seed=5).eval()
    batch = batch_of("phi")
    batch["input_ids"][1, 8] = 0  # a real token with the number of padding, the last of its text
    alone = {
        key: value[1:2, :9] if value.dim() == 2 and key != "entity_starts" else value[1:2]
        for key, value in batch.items()
    }
    hidden = model.hidden_states_of(alone)
    assert torch.allclose(model.scores(batch)[1], model.output_projection(hidden)[0, -1], atol=1e-6)


def test_kinds_of_tokens_that_the_architecture_lacks_are_left_out() -> None:
    batch = batch_of("roberta")
    typed = {**batch, "token_type_ids": (torch.arange(11) > 4).long().expand(3, 11)}
    for name, kinds in (("roberta", 1), ("phi", None), ("bert", 2)):
        base = tiny_config(name)
        if kinds is not None:
            base = base.with_values({"type_vocab_size": kinds})
        model = build_model(dataclasses.replace(base, head=HEADS["sequence"]), seed=5).eval()
        same = torch.equal(model.scores(typed), model.scores(batch))
        assert same == (kinds != 2)


def test_a_head_is_put_on_weights_that_are_there() -> None:
    for name, spec in (("phi", HEADS["token"]), ("gemma", HEADS["embedding"]), ("t5", HEADS["sequence"])):
        model = build_model(tiny_config(name), seed=5)
        before = model.embedding.weight.detach().clone()
        attach_head(model, spec, seed=1)
        assert model.config.head == spec
        assert torch.equal(model.embedding.weight, before)
        assert model.eval().scores(batch_of(name)).isfinite().all()


def test_scores_need_a_head_and_words_a_language_model() -> None:
    batch = batch_of("phi")
    with pytest.raises(ModelError, match="gives no scores"):
        build_model(tiny_config("phi")).scores(batch)
    vectors = build_model(dataclasses.replace(tiny_config("phi"), head=HEADS["embedding"]))
    with pytest.raises(ModelError, match="gives no words"):
        vectors.head_loss(torch.zeros(1, 32), torch.zeros(1, dtype=torch.long))
