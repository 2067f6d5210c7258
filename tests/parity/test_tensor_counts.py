"""What tensor parallelism costs: collectives counted, bytes of parameters and of activations, refusals, compiling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from trainwright.base.errors import ConfigError, ModelError
from trainwright.comm.mesh import Axis
from trainwright.memory.recompute import apply_recompute
from trainwright.models import Decoder, GPT2Config, LlamaConfig, ModelConfig, build_model
from trainwright.parallel import complete_sums
from trainwright.parallel.tensor import apply_tensor, overlap_problems, overlap_products
from trainwright.testing import run_ranks, tiny_gpt2_config, tiny_llama_config

ROWS, LENGTH = 2, 32
GATHER, SCATTER = "all_gather_into_tensor", "reduce_scatter_tensor"


def world_axis() -> Axis:
    mesh = DeviceMesh("cpu", torch.arange(dist.get_world_size()), mesh_dim_names=("tensor",))
    return Axis("tensor", dist.get_rank(), dist.get_world_size(), mesh.get_group(), mesh)


def divided(config: ModelConfig, axis: Axis) -> Decoder:
    model = apply_tensor(build_model(config, seed=1), axis)
    assert isinstance(model, Decoder)
    return model


def loss_of(model: Decoder) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH), generator=generator)
    return model.head_loss(model.hidden_states(ids).flatten(0, 1), ids.flatten()).loss_sum


class _Counting(TorchDispatchMode):
    """Counts collectives by name. (`CommDebugMode` does too, but its module hooks fail on a second forward pass.)"""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("_c10d_functional", "c10d") and "wait_tensor" not in func.name():
            self.counts[func.name().split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def counted(action: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    with _Counting() as mode:
        result = action()
    return result, dict(mode.counts)


def count_rank(rank: int, world: int) -> dict[str, Any]:
    axis, found = world_axis(), {}
    for layers in (2, 3):
        configs: dict[str, ModelConfig] = {
            "llama": LlamaConfig(**tiny_llama_config(num_layers=layers)),
            "one-kv": LlamaConfig(**tiny_llama_config(num_layers=layers, num_kv_heads=1)),
            "gpt2": GPT2Config(**tiny_gpt2_config(num_layers=layers)),
        }
        for name, config in configs.items():
            model = divided(config, axis)
            loss, forward = counted(lambda model=model: loss_of(model))
            _, backward = counted(loss.backward)
            _, finish = counted(lambda model=model: complete_sums(model.parameters()))
            with torch.no_grad():
                _, decode = counted(lambda model=model: model(torch.zeros(1, 1, dtype=torch.int64)))
            found[f"{name} {layers}"] = [forward, backward, finish, decode]
    return found


def test_collectives_are_the_textbook_ones() -> None:
    """Per layer 2 gathers and 2 scatters forward, the same transposed backward; 1 pair at each end of the model."""
    for counts in run_ranks(count_rank, 2):
        for name, (forward, backward, finish, decode) in counts.items():
            layers = int(name.split()[-1])
            # The embedding's sum, the gather before the head, and one exchange of the loss's numbers (one chunk).
            assert forward == {GATHER: 2 * layers + 2, SCATTER: 2 * layers + 1}, name
            assert backward == {GATHER: 2 * layers + 1, SCATTER: 2 * layers + 1}, name
            assert finish == {"allreduce_": 1}, name
            # A single token cannot be divided: sums in place of gathers and scatters, and the logits are joined.
            assert decode == {"all_reduce": 2 * layers + 1, GATHER: 1}, name


def numbers_of(model: nn.Module) -> int:
    return sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())


def saved_numbers(model: Decoder) -> dict[str, int]:
    """Numbers kept for backward by the blocks: of each shape once per storage, parameters left out."""
    own = {p.to_local().untyped_storage().data_ptr() if isinstance(p, DTensor) else p.untyped_storage().data_ptr()
           for p in model.parameters()}  # fmt: skip
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    x = model.embed(torch.zeros(ROWS, LENGTH, dtype=torch.int64), torch.arange(LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.run_blocks(x, torch.arange(LENGTH))
    return {"residual": out.numel(), "saved": sum(kept.values())}


def bytes_rank(rank: int, world: int) -> dict[str, Any]:
    axis = world_axis()
    llama = LlamaConfig(**tiny_llama_config(vocab_size=256, num_kv_heads=4))
    gpt2 = GPT2Config(**tiny_gpt2_config())
    found: dict[str, Any] = {}
    for name, config in {"llama": llama, "gpt2": gpt2}.items():
        found[name] = numbers_of(divided(config, axis))
        found[f"{name} saved"] = saved_numbers(divided(config, axis))
        found[f"{name} saved whole"] = saved_numbers(build_model(config, seed=1))
    with torch.device("meta"):
        shapes = apply_tensor(build_model(llama, device="meta"), axis)
    found["meta"] = numbers_of(shapes)
    found["all meta"] = all(p.is_meta for p in shapes.parameters())
    uneven = divided(LlamaConfig(**tiny_llama_config(vocab_size=251)), axis)
    found["words"] = uneven.lm_head.weight.to_local().shape[0]  # type: ignore[operator]
    return found


@pytest.mark.parametrize("degree", [2, 4])
def test_bytes_fall_as_the_formulas_say(degree: int) -> None:
    """Matrices by the degree; norms and the biases of outputs stay. Activations between the matrices by the degree,
    all but the two gathered inputs of a layer."""
    hidden, width, layers, words = 64, 128, 2, 256
    llama = 2 * words * hidden + layers * (4 * hidden * hidden + 3 * hidden * width)
    llama_norms = (2 * layers + 1) * hidden
    matrices = words * hidden + layers * (12 * hidden * hidden)
    column_biases = layers * (3 * hidden + 4 * hidden)
    whole = 128 * hidden + (2 * layers + 1) * 2 * hidden + layers * 2 * hidden
    tokens = ROWS * LENGTH
    results = run_ranks(bytes_rank, degree)
    for found in results:
        assert found["llama"] == found["meta"] == llama // degree + llama_norms
        assert found["all meta"]
        assert found["gpt2"] == (matrices + column_biases) // degree + whole
        for name in ("llama", "gpt2"):
            ours, alone = found[f"{name} saved"], found[f"{name} saved whole"]
            assert ours["residual"] * degree == alone["residual"] == tokens * hidden
            # What is not divided: the gathered inputs of attention and feed-forward, and small tables.
            gathered = 2 * layers * tokens * hidden
            assert ours["saved"] <= (alone["saved"] - gathered) / degree + gathered * 1.1, (name, ours, alone)
    assert sum(found["words"] for found in results) == 251


def refusal_rank(rank: int, world: int) -> list[str]:
    axis = world_axis()
    said = []

    def refused(action: Callable[[], Any]) -> None:
        try:
            action()
        except (ConfigError, ModelError) as error:
            said.append(str(error))

    refused(lambda: divided(LlamaConfig(**tiny_llama_config(num_heads=3, num_kv_heads=3, intermediate_size=99)), axis))
    refused(lambda: divided(LlamaConfig(**tiny_llama_config(vocab_size=1)), axis))
    model = divided(LlamaConfig(**tiny_llama_config()), axis)
    refused(lambda: model.hidden_states(torch.zeros(1, 7, dtype=torch.int64)))
    refused(lambda: model.run_blocks(torch.zeros(1, 5, 64), torch.arange(7)))
    extra = build_model(LlamaConfig(**tiny_llama_config()))
    extra.model.register_parameter("adapter", nn.Parameter(torch.zeros(3)))
    refused(lambda: apply_tensor(extra, axis))
    refused(lambda: apply_tensor(model, Axis("tensor", 0, 2)))
    alone = build_model(LlamaConfig(**tiny_llama_config()))
    kind = type(alone)
    assert type(apply_tensor(alone, Axis.alone("tensor"))) is kind
    return said


def test_refusals_give_reasons() -> None:
    heads, words, tokens, cut, adapter, mesh = run_ranks(refusal_rank, 2)[0]
    assert "does not divide the 3 units of self_attn.q_proj" in heads
    assert "does not divide the 99 units of mlp.gate_proj, mlp.up_proj and mlp.down_proj" in heads
    assert "parallel.tensor can be 1, 3" in heads
    assert "1 words" in words
    assert "rows of 7 tokens" in tokens
    assert "multiple of 2" in tokens
    assert "5 of 7 tokens" in cut
    assert "model.adapter" in adapter
    assert "no mesh" in mesh


def compiled_rank(rank: int, world: int, recompute: bool) -> list[float]:
    """Losses and the sums of squared gradients, plain and with compiled blocks; and how often blocks were compiled."""
    axis = world_axis()
    values = []
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        model = divided(LlamaConfig(**tiny_llama_config(num_layers=3, architecture="qwen3", qk_norm=True)), axis)
        if recompute:
            apply_recompute(model, "full")
        if compiled:
            for block in model.blocks:
                block.compile(dynamic=False) if recompute else _compile(block)
        loss_and_squares(model, axis)
        values += loss_and_squares(model, axis)
    values.append(float(torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    values.append(float(sum(torch._dynamo.utils.counters["graph_break"].values())))
    return values


def _compile(block: nn.Module) -> None:
    block.forward = torch.compile(block.forward, dynamic=False)


def overlap_rank(rank: int, world: int) -> dict[str, Any]:
    """A compiled block under the compiler's switch, its joint operators done by torch's own fallbacks for tests."""
    import torch._inductor.config as compiler
    import torch.distributed._symmetric_memory as symmetric

    axis = world_axis()
    model = divided(LlamaConfig(**tiny_llama_config(num_layers=1, num_kv_heads=4)), axis)
    found: dict[str, Any] = {"plain": loss_and_squares(model, axis)}
    calls: Counter[str] = Counter()
    library = torch.library.Library("symm_mem", "IMPL")
    for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
        fallback = getattr(symmetric, f"_{name}_fallback")

        def joint(*args: Any, fallback: Any = fallback, name: str = name) -> Any:
            calls[name] += 1
            return fallback(*args)

        library.impl(name, joint, "CPU")
    dist.is_nccl_available = lambda: True  # the compiler asks; its operators are replaced above
    compiler._micro_pipeline_tp = True
    assert axis.group is not None
    with symmetric._test_mode({axis.group.group_name}):
        for block in model.blocks:
            _compile(block)
        found["overlapped"] = loss_and_squares(model, axis)
    return {**found, "calls": dict(calls)}


def loss_and_squares(model: Decoder, axis: Axis) -> list[float]:
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    complete_sums(model.parameters())
    return [
        loss.item(),
        sum(float(p.grad.full_tensor().square().sum()) for p in model.parameters()),  # type: ignore[union-attr]
    ]


@pytest.mark.slow
def test_compiler_joins_products_and_messages() -> None:
    """Every gather of a layer with the products behind it, and both sums of the forward pass with those before; in the
    backward pass an addition stands between."""
    for found in run_ranks(overlap_rank, 2, timeout=200):
        assert found["overlapped"] == pytest.approx(found["plain"], rel=1e-5)
        assert found["calls"] == {"fused_all_gather_matmul": 4, "fused_matmul_reduce_scatter": 2}


def test_overlap_says_why_not() -> None:
    axis = Axis("tensor", 0, 2)
    problems = overlap_problems(axis, device=torch.device("cpu"), compiled=False)
    assert len(problems) == 2
    assert "not compiled" in problems[0]
    assert "device is cpu" in problems[1]
    with pytest.raises(ConfigError, match=r"parallel\.tensor is 1"):
        overlap_products(Axis.alone("tensor"), device=torch.device("cpu"), compiled=True)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_compute_the_same(recompute: bool) -> None:
    for loss, squares, compiled_loss, compiled_squares, graphs, breaks in run_ranks(
        compiled_rank, 2, recompute, timeout=400
    ):
        assert compiled_loss == pytest.approx(loss, rel=1e-5)
        assert compiled_squares == pytest.approx(squares, rel=1e-5)
        assert breaks == 0
        assert graphs == 1, "all blocks share one graph"
