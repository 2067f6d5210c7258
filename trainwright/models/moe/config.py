"""What a mixture-of-experts model is: Mixtral, Qwen 2/3 MoE and the DeepSeek style (dots.llm1), llama in all else.

The attention, norms and dense layers are those of the llama family, whose fields and switches this configuration has;
reading and writing `config.json` is in `hf_config.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainwright.base.errors import ModelError
from trainwright.models.checks import positive
from trainwright.models.llama.config import LlamaConfig

__all__ = ["MOE_ARCHITECTURES", "MoEConfig"]

MOE_ARCHITECTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "dots1")


@dataclass(frozen=True, kw_only=True)
class MoEConfig(LlamaConfig):
    """Sizes and switches of one mixture-of-experts model; those of `LlamaConfig` besides.

    architecture: the transformers class it is saved as; decides which switches are allowed.
    intermediate_size: width of the dense layers' MLP.
    num_experts, expert_size: routed experts of a layer, and the width of each.
    experts_per_token: experts that each token goes to.
    dense_layers: layers with a plain MLP instead of experts, ascending.
    router_scores: `softmax` over the experts (Mixtral, Qwen), or `sigmoid` of each (DeepSeek-V3, arXiv 2412.19437).
    norm_topk: the weights of a token's experts add up to one.
    routed_scale: what the weights of routed experts are multiplied by.
    expert_groups, groups_per_token: experts form so many equal groups, and a token's experts are of the best so many.
    shared_size: width of the expert that every token goes to; 0 for none.
    shared_gate: the shared expert's output is weighted by a sigmoid of the token (Qwen 2).
    auxiliary_weight: of the loss that keeps the experts' loads alike; 0 for none. Computed for every row by itself, so
        that it does not depend on how rows are dealt to micro-batches and processes.
    bias_rate: how far a step moves the bias with which experts are chosen, toward equal loads (arXiv 2408.15664);
        0 leaves the bias as it is. Only for `sigmoid`, whose architecture has such a bias.
    capacity_factor: in training an expert takes at most so many times the tokens of a row that it would get if all
        experts got equally many; later ones are dropped. None drops nothing.
    """

    num_experts: int
    experts_per_token: int
    expert_size: int
    architecture: str = "mixtral"
    dense_layers: tuple[int, ...] = ()
    router_scores: str = "softmax"
    norm_topk: bool = True
    routed_scale: float = 1.0
    expert_groups: int = 1
    groups_per_token: int = 1
    shared_size: int = 0
    shared_gate: bool = False
    auxiliary_weight: float = 0.001
    bias_rate: float = 0.0
    capacity_factor: float | None = None

    @property
    def family(self) -> str:
        return "moe"

    @property
    def chooses_by_bias(self) -> bool:
        """Whether experts are chosen by score plus a bias that is kept, not trained."""
        return self.router_scores == "sigmoid"

    def moe_layers(self) -> list[int]:
        """The layers that have experts."""
        return [layer for layer in range(self.num_layers) if layer not in self.dense_layers]

    def __post_init__(self) -> None:
        for name in ("num_experts", "experts_per_token", "expert_size", "expert_groups", "groups_per_token"):
            positive(name, getattr(self, name))
        positive("routed_scale", self.routed_scale)
        super().__post_init__()
        if self.shared_size < 0 or self.auxiliary_weight < 0 or self.bias_rate < 0:
            raise ModelError("shared_size, auxiliary_weight and bias_rate cannot be negative; 0 turns each off")
        if self.capacity_factor is not None:
            positive("capacity_factor", self.capacity_factor)
        self._check_choices()
        wrong = [layer for layer in self.dense_layers if not 0 <= layer < self.num_layers]
        if wrong or list(self.dense_layers) != sorted(set(self.dense_layers)):
            raise ModelError(f"dense_layers={self.dense_layers}: expected ascending layers below {self.num_layers}")
        if not self.moe_layers():
            raise ModelError("every layer is dense; that is a llama model", hint="leave a layer out of dense_layers")

    def _check_choices(self) -> None:
        if self.num_experts % self.expert_groups:
            raise ModelError(f"expert_groups={self.expert_groups} does not divide num_experts={self.num_experts}")
        if self.expert_groups > 1 and self.num_experts // self.expert_groups < 2:
            raise ModelError("groups are compared by their two best experts, so each needs two")
        if self.groups_per_token > self.expert_groups:
            raise ModelError(f"groups_per_token={self.groups_per_token} of {self.expert_groups} groups")
        reachable = self.num_experts // self.expert_groups * self.groups_per_token
        if self.experts_per_token > reachable:
            raise ModelError(f"experts_per_token={self.experts_per_token}, but a token can reach {reachable} experts")

    def _check_architecture(self) -> None:
        softmax: dict[str, tuple[Any, ...]] = {
            "router_scores": ("softmax",),
            "routed_scale": (1.0,),
            "expert_groups": (1,),
            "bias_rate": (0.0,),
        }
        plain = {"qk_norm": (False,), "output_bias": (False,), "mlp_bias": (False,)}
        none = {"shared_size": (0,), "shared_gate": (False,)}
        first = tuple(range(len(self.dense_layers)))
        allowed: dict[str, dict[str, tuple[Any, ...]]] = {
            "mixtral": {**softmax, **plain, **none, "qkv_bias": (False,), "norm_topk": (True,), "dense_layers": ((),)},
            "qwen2_moe": {**softmax, **plain, "shared_gate": (True,)},
            "qwen3_moe": {**softmax, **none, "qk_norm": (True,), "output_bias": (self.qkv_bias,), "mlp_bias": (False,)},
            "dots1": {
                "router_scores": ("sigmoid",),
                "qk_norm": (True,),
                "output_bias": (self.qkv_bias,),
                "mlp_bias": (False,),
                "shared_gate": (False,),
                "dense_layers": (first,),
            },
        }
        if self.architecture not in allowed:
            raise ModelError(f"architecture={self.architecture!r}; expected one of {', '.join(MOE_ARCHITECTURES)}")
        values = {**allowed[self.architecture], "rotary_layout": ("half",)}
        for name, known in values.items():
            if getattr(self, name) not in known:
                raise ModelError(
                    f"architecture {self.architecture!r} cannot have {name}={getattr(self, name)!r} "
                    f"(expected {' or '.join(map(repr, known))}): transformers could not open the model",
                    hint="sigmoid scores, groups and bias: dots1; gated shared expert: qwen2_moe; q/k norm: qwen3_moe",
                )
        if self.architecture in ("qwen2_moe", "dots1") and not self.shared_size:
            raise ModelError(f"architecture {self.architecture!r} has a shared expert; shared_size is 0")
        if self.architecture == "dots1" and self.shared_size % self.expert_size:
            raise ModelError(
                f"architecture 'dots1' has a whole number of shared experts: shared_size={self.shared_size} is no "
                f"multiple of expert_size={self.expert_size}"
            )

    def _check_sliding(self) -> None:
        super()._check_sliding()
        if self.sliding_layers is not None and self.architecture in ("mixtral", "qwen3_moe"):
            raise ModelError(f"architecture {self.architecture!r} slides in every layer; sliding_layers must be None")

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this model."""
        from trainwright.models.moe.hf_config import to_hf

        return to_hf(self)

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> MoEConfig:
        """From a parsed `config.json`; ModelError names what is unsupported."""
        from trainwright.models.moe.hf_config import from_hf

        return from_hf(values)
