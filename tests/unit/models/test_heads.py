"""Heads of tasks: what they score, that padding changes nothing, the CRF by enumeration, and attaching."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from trainwright.base.errors import ModelError
from trainwright.models import (
    BertConfig,
    GPT2Config,
    HeadSpec,
    LlamaConfig,
    MoEConfig,
    attach_head,
    build_model,
    count_parameters,
)
from trainwright.models.crf import LinearChainCRF
from trainwright.models.fields import config_fields, config_from_fields
from trainwright.models.heads import head_from_fields
from trainwright.models.registry import model_plan
from trainwright.models.task_heads import pool
from trainwright.planner.model_facts import model_shape
from trainwright.testing import tiny_gpt2_config, tiny_llama_config, tiny_moe_config

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**tiny_llama_config(tie_embeddings=True)),
    "gpt2": GPT2Config(**tiny_gpt2_config()),
    "moe": MoEConfig(**tiny_moe_config()),
    "bert": BertConfig(
        vocab_size=256, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96, max_position_embeddings=64
    ),
}
SPECS = {
    "sequence": HeadSpec("sequence", ("a", "b", "c")),
    "sequence-mean": HeadSpec("sequence", ("a", "b", "c"), pooling="mean", problem="multi_label"),
    "token": HeadSpec("token", ("O", "B", "I")),
    "token-crf": HeadSpec("token", ("O", "B", "I"), crf=True),
    "span": HeadSpec("span"),
    "entities": HeadSpec("entities", ("r1", "r2")),
    "embedding": HeadSpec("embedding"),
    "embedding-mean": HeadSpec("embedding", pooling="mean"),
}
SHAPES = {"sequence": (3, 3), "token": (3, 10, 3), "span": (3, 10, 2), "entities": (3, 2), "embedding": (3, 64)}


def batch_of() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([10, 4, 7])
    return {
        "input_ids": torch.randint(256, (3, 10), generator=generator),
        "lengths": lengths,
        "key_mask": torch.arange(10)[None] < lengths[:, None],
        "entity_starts": torch.tensor([[1, 5], [0, 3], [6, 2]]),
    }


@pytest.mark.parametrize("head", list(SPECS))
@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_padded_row_scores_as_the_row_alone(family: str, head: str) -> None:
    spec, batch = SPECS[head], batch_of()
    model = attach_head(build_model(CONFIGS[family], seed=4), spec, seed=4).eval()
    assert model.lm_head is None
    with torch.no_grad():
        scores = model.scores(batch)
        assert scores.shape == SHAPES[spec.kind]
        assert scores.dtype == torch.float32
        by_mask = model.scores({key: value for key, value in batch.items() if key != "lengths"})
        by_length = model.scores({key: value for key, value in batch.items() if key != "key_mask"})
        padded = model.scores({**batch, "input_ids": batch["input_ids"].masked_fill(~batch["key_mask"], 0)})
        for row, length in enumerate(batch["lengths"].tolist()):
            one = {"input_ids": batch["input_ids"][row : row + 1, :length]}
            one["entity_starts"] = batch["entity_starts"][row : row + 1]
            alone = model.scores(one)[0]
            for found in (scores, by_mask, by_length, padded):
                ours = found[row] if found.dim() == 2 else found[row, :length]
                assert (ours - alone).abs().max() < 2e-6
    if spec.kind == "embedding":
        assert (scores.norm(dim=-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("head", list(SPECS))
@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_configuration_describes_the_head(family: str, head: str) -> None:
    model = attach_head(build_model(CONFIGS[family], seed=2), SPECS[head], seed=2)
    again = build_model(model.config, seed=2)
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in model.named_parameters()]
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert config_from_fields(config_fields(model.config)) == model.config
    assert count_parameters(model.config) == sum(p.numel() for p in model.parameters())
    own = sum(p.numel() for p in model.task_head.parameters())
    assert model_shape(model.config).head == own
    assert not model_plan(model.config).tied
    shape = model_shape(model.config)
    rest = sum(p.numel() for p in model.final_norm.parameters())
    if family == "bert":
        rest += sum(p.numel() for p in model.bert.embeddings.LayerNorm.parameters())
        assert shape.positions == sum(
            p.numel() for name, p in model.bert.embeddings.named_parameters() if not name.startswith("word")
        )
        rest = 0
    blocks = sum(p.numel() for p in model.blocks.parameters())
    assert blocks + shape.embedding + shape.positions + own + rest == count_parameters(model.config)


def test_a_head_can_be_exchanged_and_the_language_head_says_that_it_is_gone() -> None:
    model = attach_head(build_model(CONFIGS["llama"]), SPECS["sequence"])
    attach_head(model, SPECS["span"])
    assert not hasattr(model, "score")
    assert model.task_head is model.qa_outputs
    assert model.config.head == SPECS["span"]
    with pytest.raises(ModelError, match="head of a task"):
        model.head_loss(torch.zeros(2, 64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ModelError, match="head of a task"):
        model(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ModelError, match="language-model head"):
        build_model(CONFIGS["bert"]).scores(batch_of())
    with pytest.raises(ModelError, match="needs labels"):
        attach_head(build_model(CONFIGS["llama"]), HeadSpec("sequence"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "sequnce"}, "kind is 'sequnce'; expected one of sequence"),
        ({"kind": "sequence", "pooling": "max"}, "pooling is 'max'"),
        ({"kind": "sequence", "problem": "single"}, "problem is 'single'"),
        ({"kind": "token", "labels": ["O", "B", "O"]}, "'O' stands there 2 times"),
        ({"kind": "token", "labels": "OB"}, "expected a tuple of names"),
        ({"kind": "token", "labels": [0, 1]}, "expected a tuple of names"),
        ({"kind": "token", "dropout": 1.5}, "dropout=1.5"),
        ({"kind": "token", "crff": True}, "crff"),
    ],
)
def test_a_head_that_cannot_be_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        head_from_fields(fields)


def test_what_cannot_be_pooled_is_refused() -> None:
    hidden, batch = torch.zeros(3, 10, 4), batch_of()
    with pytest.raises(ModelError, match="several texts"):
        pool(hidden, {**batch, "document_ids": torch.zeros(3, 10)}, "last")
    model = attach_head(build_model(CONFIGS["llama"]), SPECS["entities"])
    with pytest.raises(ModelError, match="entity_starts"):
        model.scores({"input_ids": batch["input_ids"]})


def test_the_last_token_is_found_by_position_not_by_id() -> None:
    batch = batch_of()
    hidden = torch.arange(30.0).view(3, 10, 1)
    assert pool(hidden, batch, "last").flatten().tolist() == [9.0, 13.0, 26.0]
    assert pool(hidden, batch, "first").flatten().tolist() == [0.0, 10.0, 20.0]
    assert pool(hidden, batch, "mean").flatten().tolist() == [4.5, 11.5, 23.0]
    left = {"input_ids": batch["input_ids"], "key_mask": torch.arange(10)[None] >= torch.tensor([[0], [5], [3]])}
    assert pool(hidden, left, "last").flatten().tolist() == [9.0, 19.0, 29.0]


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("head", ["sequence", "token", "entities"])
def test_dropout_in_front_of_a_head_depends_on_row_and_seed_alone(family: str, head: str) -> None:
    model = attach_head(build_model(CONFIGS[family], seed=1), SPECS[head], seed=1).train()
    batch, rows = batch_of(), torch.tensor([5, 9, 2])

    def scores(chosen: list[int], seed: int) -> torch.Tensor:
        model.set_dropout(seed=seed, rows=rows[chosen])
        return model.scores({key: value[chosen] for key, value in batch.items()})

    whole = scores([0, 1, 2], 7)
    apart = torch.cat([scores([one], 7) for one in (0, 1, 2)])
    mask = batch["key_mask"] if whole.dim() == 3 else slice(None)
    assert (whole - apart)[mask].abs().max() < 2e-6
    assert (whole - scores([0, 1, 2], 8))[mask].abs().max() > 1e-4
    model.eval()
    assert torch.equal(scores([0, 1, 2], 7), scores([0, 1, 2], 8))


# --- the CRF ---


def enumerate_chains(crf: LinearChainCRF, scores: torch.Tensor, places: list[int]) -> dict[tuple[int, ...], float]:
    """The score of every sequence of tags at these places of one row [T, L], one by one."""
    found = {}
    for tags in itertools.product(range(scores.shape[1]), repeat=len(places)):
        total = float(crf.start[tags[0]] + crf.end[tags[-1]])
        total += sum(float(scores[place, tag]) for place, tag in zip(places, tags, strict=True))
        total += sum(float(crf.transitions[one, other]) for one, other in itertools.pairwise(tags))
        found[tags] = total
    return found


def random_crf(tags: int) -> LinearChainCRF:
    crf = LinearChainCRF(tags).double()
    with torch.no_grad():
        for parameter in crf.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(2 + parameter.numel()))
    return crf


def test_the_crf_is_what_enumeration_gives() -> None:
    crf = random_crf(3)
    generator = torch.Generator().manual_seed(3)
    scores = 2 * torch.randn(5, 7, 3, generator=generator, dtype=torch.float64)
    tags = torch.randint(3, (5, 7), generator=generator)
    tags[0, [0, 3, 4]] = -100  # later pieces of words, padding, one place alone, none at all
    tags[1, 5:] = -100
    tags[2] = -100
    tags[3, 1:] = -100
    expected_loss, expected_tags = 0.0, torch.full((5, 7), -100)
    for row in range(5):
        places = [place for place in range(7) if tags[row, place] != -100]
        if not places:
            continue
        chains = enumerate_chains(crf, scores[row], places)
        log_z = torch.logsumexp(torch.tensor(list(chains.values()), dtype=torch.float64), 0)
        expected_loss += float(log_z) - chains[tuple(tags[row, places].tolist())]
        best = max(chains, key=lambda one: chains[one])
        expected_tags[row, places] = torch.tensor(best)
    loss, count = crf.loss_sum(scores, tags)
    assert abs(float(loss) - expected_loss) < 1e-10 * abs(expected_loss)
    assert int(count) == int((tags != -100).sum())
    assert torch.equal(crf.decode(scores, tags != -100), expected_tags)
    masked, _ = crf.loss_sum(scores, tags.clamp(min=0), mask=tags != -100)
    assert torch.equal(masked, loss)


def test_gradients_of_the_crf_are_right_and_its_weights_are_probabilities() -> None:
    crf = random_crf(3)
    scores = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    tags = torch.tensor([[0, 2, -100, 1], [1, -100, -100, -100]])
    assert torch.autograd.gradcheck(
        lambda given, *weights: torch.func.functional_call(
            crf, dict(zip(("transitions", "start", "end"), weights, strict=True)), (given, tags, None)
        )[0],
        (scores, crf.transitions, crf.start, crf.end),
    )
    chains = list(itertools.product(range(3), repeat=3))
    probabilities = [
        torch.exp(-crf.loss_sum(scores[:1], torch.tensor([[a, b, -100, c]]))[0]).item() for a, b, c in chains
    ]
    assert abs(sum(probabilities) - 1) < 1e-12


def test_the_crf_without_transitions_is_a_softmax_of_each_token() -> None:
    crf, scores = LinearChainCRF(4), torch.randn(3, 6, 4)
    tags = torch.randint(4, (3, 6))
    tags[1, 2:] = -100
    loss, _ = crf.loss_sum(scores, tags)
    expected = torch.nn.functional.cross_entropy(scores.flatten(0, 1), tags.flatten(), reduction="sum")
    assert abs(float(loss - expected)) < 1e-4
    decoded = crf.decode(scores, tags != -100)
    assert torch.equal(decoded[tags != -100], scores.argmax(-1)[tags != -100])
    wide, _ = crf.loss_sum(scores.bfloat16() * 200, tags)
    assert torch.isfinite(wide)
    assert wide.dtype == torch.float32
    with pytest.raises(ModelError, match="4 tags"):
        crf.loss_sum(scores[..., :3], tags)
