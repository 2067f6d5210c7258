"""Groups: who decays, who is scaled, who is frozen; ties; rules that match nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from trainwright.base.errors import ConfigError
from trainwright.optim import OptimizerOptions, Rule, build_optimizer, describe_groups
from trainwright.optim.groups import freeze


class Model(nn.Module):
    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 10, bias=False)
        if tie:
            self.lm_head.weight = self.embed_tokens.weight


def groups_of(model: nn.Module, **changes: object) -> dict[str, tuple[str, float, float]]:
    optimizer = build_optimizer(model.named_parameters(), OptimizerOptions(lr=1.0, **changes))  # type: ignore[arg-type]
    return {
        name: (group["algorithm"], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def test_matrices_decay_and_vectors_and_embeddings_do_not() -> None:
    decays = {name: decay for name, (_, _, decay) in groups_of(Model(tie=False), weight_decay=0.3).items()}
    assert {name for name, decay in decays.items() if decay == 0.3} == {
        "layers.0.weight",
        "layers.1.weight",
        "layers.2.weight",
        "lm_head.weight",
    }
    assert set(decays.values()) == {0.0, 0.3}


@pytest.mark.parametrize("name", ["wte.weight", "transformer.wpe.weight", "model.embed_tokens.weight"])
def test_embeddings_are_known_by_name(name: str) -> None:
    weight = nn.Parameter(torch.zeros(3, 3))
    optimizer = build_optimizer([(name, weight), ("owte.weight", nn.Parameter(torch.zeros(3, 3)))], OptimizerOptions())
    decay = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["param_names"]}
    assert decay == {name: 0.0, "owte.weight": 0.1}


def test_tied_parameters_count_once_whichever_way_they_are_listed() -> None:
    model = Model(tie=True)
    listed_twice = model.named_parameters(remove_duplicate=False)
    optimizer = build_optimizer(listed_twice, OptimizerOptions())
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert "embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert sum(summary.elements for summary in describe_groups(optimizer)) == sum(p.numel() for p in model.parameters())


def test_first_matching_rule_wins() -> None:
    rules = (Rule(r"layers\.0\.", lr_scale=0.1), Rule(r"layers\.", lr_scale=0.5, weight_decay=0.7))
    groups = groups_of(Model(tie=False), rules=rules)
    assert groups["layers.0.weight"] == ("adamw", 0.1, 0.1)
    assert groups["layers.1.weight"] == ("adamw", 0.5, 0.7)
    assert groups["layers.1.bias"] == ("adamw", 0.5, 0.7), "an explicit weight decay holds for vectors too"
    assert groups["norm.weight"] == ("adamw", 1.0, 0.0)


def test_frozen_parameters_have_no_group_and_no_gradient() -> None:
    model = Model(tie=False)
    groups = groups_of(model, rules=(Rule(r"^embed_tokens", freeze=True),))
    assert "embed_tokens.weight" not in groups
    assert not model.embed_tokens.weight.requires_grad


def test_a_whole_model_is_frozen_before_it_is_divided() -> None:
    model = Model(tie=True)
    freeze(model.named_parameters(remove_duplicate=False), OptimizerOptions(rules=(Rule(r"^layers\.0", freeze=True),)))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("layers.0")}
    with pytest.raises(ConfigError, match="matches none"):
        freeze(model.named_parameters(), OptimizerOptions(rules=(Rule("lyers", freeze=True),)))
    with pytest.raises(ConfigError, match="no parameter to train"):
        freeze(model.named_parameters(), OptimizerOptions(rules=(Rule(".", freeze=True),)))


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameter to train"):
        groups_of(Model(tie=False), rules=(Rule(".", freeze=True),))


def test_a_rule_that_matches_nothing_names_near_names() -> None:
    with pytest.raises(ConfigError) as caught:
        groups_of(Model(tie=False), rules=(Rule(r"layer\.1\.weight", lr_scale=0.5),))
    assert r"'layer\\.1\\.weight' matches none of the 10 parameter names" in str(caught.value)
    assert "layers.1.weight" in str(caught.value)


def test_a_rule_is_not_idle_because_an_earlier_one_won() -> None:
    groups_of(Model(tie=False), rules=(Rule("layers", lr_scale=0.5), Rule(r"layers\.1", lr_scale=0.1)))


def test_a_broken_pattern_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a regular expression"):
        Rule("layers.(")


def test_muon_takes_hidden_matrices_only() -> None:
    groups = groups_of(Model(tie=False), name="muon")
    assert {name for name, (algorithm, _, _) in groups.items() if algorithm == "muon"} == {
        "layers.0.weight",
        "layers.1.weight",
        "layers.2.weight",
    }
    assert groups["lm_head.weight"][0] == groups["embed_tokens.weight"][0] == groups["norm.bias"][0] == "adamw"


def test_summary_reads_well() -> None:
    optimizer = build_optimizer(Model(tie=False).named_parameters(), OptimizerOptions(lr=3e-4))
    texts = [str(summary) for summary in describe_groups(optimizer)]
    assert (
        "adamw: 88 parameters in 4 tensors, lr 0.0003, weight decay 0.1 (layers.0.weight, layers.1.weight, "
        in "".join(texts)
    )
