"""Bytes that one rank needs at the peak of a step, in every layout: pure functions of plain numbers.

ZeRO, arXiv 1910.02054, section 3, with the types that this engine really uses: fp32 parts of parameters, low-precision
copies of whole ones, fp32 gradients (docs/memory.md has the table). Activations: Korthikanti et al., arXiv 2205.05198;
divided by the ranks of tensor and context, multiplied by the passes that a pipeline holds at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from trainwright.comm.layout import Layout
from trainwright.planner.division import Division, HeldPart, RankPart, held_parts, rank_part
from trainwright.planner.facts import ModelFacts
from trainwright.planner.holdings import Held
from trainwright.planner.in_flight import parts_in_flight

__all__ = [
    "ACTIVATION_BYTES",
    "MemorySettings",
    "RankMemory",
    "StateBytes",
    "StateWidths",
    "frozen_widths",
    "predict_rank_memory",
    "state_widths",
    "zero_states",
]

ACTIVATION_BYTES = {"none": 56.0, "selective": 26.0, "full": 2.0}
"""Kept for backward, bytes per token, layer and unit of width, in bf16 with fused attention; fp32 doubles them.

none: 28 tensors of 2 bytes (measured on Llama-3.1-8B shapes). selective: the outputs of linear layers and attention
(25.2 counted on the same shapes, benchmarks/memory/recompute.py). full: the block's input."""

EAGER_BYTES = 94.0
"""none, without the compiler, which fuses what lies between matrix products (counted under autocast: llama-5m 94,
llama-34m 98; compiled llama-34m 56)."""

ENTERING_BYTES = 4.0
"""Of none: the inputs of attention and MLP, which tensor ranks gather and keep whole; all else they divide."""

WIDE_INPUT_BYTES = 4.0
"""full, where the residual stream is fp32: as autocast leaves it, and as native decoders keep it when sharded."""

OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.05, "lion": 4.0, "sgd": 4.0, "muon": 5.0, "adafactor": 0.1}
"""fp32 moments in bytes per parameter: AdamW two; Lion, SGD with momentum and Muon one; Adafactor almost none."""

PURE_UPDATE_BYTES = {"master": 4.0, "kahan": 2.0, "stochastic": 0.0}
"""Beside pure bf16 weights the optimizer keeps an fp32 copy, a bf16 compensation, or nothing."""

AUTOCAST = frozenset({"bf16", "fp16", "fp8"})
"""Policies that hold fp32 parameters and, on one rank or replicated, cast them as they are used."""

IN_FLIGHT = 2  # blocks that are gathered, or whose gradients travel, at once: the current one and the next
DISK_BUFFERS = 3 * (8 << 20)  # memory.BUCKET_BYTES of state on disk are in memory three times


@dataclass(frozen=True)
class StateWidths:
    """Bytes per parameter.

    held: as the owner keeps it. whole: the copy that forward computes with (at stage 0 the one that autocast makes).
    gradient: as it is added up. optimizer: all its state. kept_copy: of the low-precision copy that stage 3 keeps
    divided; the paper's engine does, FSDP2 casts while it gathers.
    """

    held: float
    whole: float
    gradient: float
    optimizer: float
    kept_copy: float = 0.0


@dataclass(frozen=True)
class StateBytes:
    """Bytes of model state on one rank."""

    parameters: float
    gathered: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.parameters + self.gathered + self.gradients + self.optimizer


def zero_states(
    parameters: float,
    widths: StateWidths,
    *,
    zero: int,
    shard: int,
    whole_gradients: bool,
    gathered_at_once: float = 0,
) -> StateBytes:
    """Bytes of model state of one of `shard` ranks that share a copy.

    Args:
        whole_gradients: gradients are added up whole (stages 0 and 1, and wherever micro-batches accumulate locally).
        gathered_at_once: parameters that stage 3 holds whole at the same time.
    """
    part = parameters if zero == 0 else parameters / shard
    gathered = gathered_at_once if zero == 3 else parameters
    return StateBytes(
        parameters=widths.held * part + (widths.kept_copy * part if zero == 3 else 0.0),
        gathered=widths.whole * gathered,
        gradients=widths.gradient * (parameters if whole_gradients or zero == 0 else part),
        optimizer=widths.optimizer * part,
    )


@dataclass(frozen=True)
class MemorySettings:
    """What decides a rank's memory. Words and defaults are those of the recipe's sections.

    Attributes:
        micro_rows, sequence_length: of one forward pass. micro_batches: of one step.
        run: micro-batches of one run of a pipeline's schedule; None runs all those of a step at once.
        shard: ranks that share a copy of the state.
        gather: "step" keeps whole parameters for the step; stage 3 with "micro_batch" only those of a few blocks.
        recompute: none, selective, full, or n: every n-th block in full.
        update: how pure bf16 weights are updated.
        compiled: whether blocks are compiled.
        host_is_device: the device is the CPU, so that what goes to the host stays where it was.
        block_parameters: of the largest block; None estimates it.
        mlp_chunks: pieces in which MLPs compute, each computed again in backward.
        division: how ranks divide the model and its sequences. stage: of the pipeline; None is the one that needs most.
    """

    micro_rows: int
    sequence_length: int
    micro_batches: int = 1
    precision: str = "bf16"
    optimizer: str = "adamw"
    update: str = "master"
    zero: int = 0
    shard: int = 1
    accumulate: str = "local"
    gather: str = "step"
    recompute: str | int = "none"
    offload_activations: bool = False
    optimizer_state: str = "device"
    parameters: str = "device"
    compiled: bool = True
    host_is_device: bool = False
    block_parameters: int | None = None
    division: Division = field(default_factory=Division)
    stage: int | None = None
    run: int | None = None
    mlp_chunks: int = 1

    def under(self, layout: Layout) -> MemorySettings:
        """The same passes in another layout."""
        return replace(
            self,
            zero=layout.zero,
            shard=layout.shard,
            accumulate=layout.accumulate,
            gather=layout.gather,
            division=Division.of(layout),
        )

    def with_recompute(self, value: str | int | Mapping[str, int]) -> MemorySettings:
        """With the recipe's `memory.recompute`; "auto" counts as none."""
        if isinstance(value, Mapping):
            value = value["every"]
        return replace(self, recompute="none" if value == "auto" else value)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at the peak of a step; without the runtime's own (interpreter, libraries, compiler).

    parameters: held parts. gathered: whole copies beside them. transfers: blocks whose gradients travel.
    host: what lies in host memory beside a device. disk: in files.
    """

    parameters: int
    gathered: int
    gradients: int
    optimizer: int
    activations: int
    transfers: int
    host: int = 0
    disk: int = 0

    @property
    def device(self) -> int:
        """On the device that computes."""
        return self.parameters + self.gathered + self.gradients + self.optimizer + self.activations + self.transfers

    def kinds(self) -> dict[str, int]:
        """Kinds that are not empty, by name."""
        return {name: size for name, size in asdict(self).items() if size}


def state_widths(precision: str, optimizer: str, *, update: str = "master", sharded: bool = False) -> StateWidths:
    """Bytes per parameter of a precision policy (fp32, bf16, fp16, fp8, bf16_pure) and an optimizer."""
    moments = OPTIMIZER_BYTES.get(optimizer, 8.0)
    if precision == "bf16_pure":
        return StateWidths(2.0, 2.0 if sharded else 0.0, 2.0, moments + PURE_UPDATE_BYTES[update])
    if precision == "fp32":
        return StateWidths(4.0, 4.0 if sharded else 0.0, 4.0, moments)
    return StateWidths(4.0, 2.0, 4.0, moments)


def frozen_widths(held: Held, precision: str, *, sharded: bool = False) -> StateWidths:
    """Bytes per parameter that is not trained (of `nf4`, per byte): no gradient, no optimizer state.

    One that is held in the type of products needs no copy made by autocast, and one in a type of its own is opened for
    each product; ranks that share it gather it in the type of products, codes of 4 bits as they are.
    """
    policy = state_widths(precision, "none", sharded=sharded)
    if held == "policy":
        return replace(policy, gradient=0.0, optimizer=0.0)
    compute = 4.0 if precision == "fp32" else 2.0
    width = {"compute": compute, "fp32": 4.0, "nf4": 1.0}.get(held, 2.0)
    whole = width if held == "nf4" or precision in ("fp32", "bf16_pure") else compute
    return StateWidths(width, whole if sharded else 0.0, 0.0, 0.0)


def predict_rank_memory(model: ModelFacts, settings: MemorySettings) -> RankMemory:
    """Bytes that a rank needs at the peak of a step of `model` under `settings`."""
    stages = settings.division.stages
    if settings.stage is None and stages > 1:
        # The first holds most passes at once, the last may hold the head, those between them one more block.
        candidates = sorted({0, 1, stages - 1})
        return max((_of_stage(model, settings, stage) for stage in candidates), key=lambda memory: memory.device)
    return _of_stage(model, settings, settings.stage or 0)


def _of_stage(model: ModelFacts, settings: MemorySettings, stage: int) -> RankMemory:
    sharded = settings.zero > 0 and settings.shard > 1
    zero = settings.zero if sharded else 0
    widths = state_widths(settings.precision, settings.optimizer, update=settings.update, sharded=sharded)
    several = settings.micro_batches > 1
    local = settings.accumulate == "local" or zero == 1
    if sharded and several:
        # Whole gradients are added up in fp32; parts wait in the type of the parameter beside those of the next pass.
        widths = replace(widths, gradient=4.0 if local else 2 * widths.gradient)
    # Ranks that divide the experts hold different ones: fewer of the ranks that share state share these.
    share = {"dense": settings.shard, "experts": max(1, settings.shard // settings.division.expert)}
    states, transfers = [], 0.0
    for part in held_parts(model, settings.division, stage, block=settings.block_parameters):
        own = widths if part.trained else frozen_widths(part.held, settings.precision, sharded=sharded)
        block, rest = _block_and_rest(model, settings, part)
        states += [
            zero_states(
                count,
                own,
                zero=zero,
                shard=share[kind],
                whole_gradients=several and local,
                gathered_at_once=_gathered_at_once(settings, part, block, rest) * count / max(1.0, part.total),
            )
            for kind, count in (("dense", part.dense), ("experts", part.experts))
        ]
        if part.trained and sharded:
            # The gradient of a unit as backward makes it, and the fp32 buffer that is summed over the ranks.
            transfers += max(IN_FLIGHT * block, rest) * (own.whole + 4.0)
    whole = rank_part(model, settings.division, stage, block=settings.block_parameters)
    kept, activations = _activations(model, settings, whole, stage)
    memory = RankMemory(
        parameters=round(sum(state.parameters for state in states)),
        gathered=round(sum(state.gathered for state in states)),
        gradients=round(sum(state.gradients for state in states)),
        optimizer=round(sum(state.optimizer for state in states)),
        activations=activations,
        transfers=round(transfers),
    )
    return _moved(memory, settings, kept)


def _block_and_rest(model: ModelFacts, settings: MemorySettings, part: HeldPart) -> tuple[float, float]:
    """Parameters that a rank has of one block and of all that is outside blocks. Without more knowledge each is an
    upper estimate: whether embedding and head are one matrix or two is not in the facts."""
    if model.training is not None or settings.division.divides_parameters or model.shape is not None:
        return part.block, part.rest
    words = model.vocab_size * model.width
    if settings.block_parameters is not None:
        return settings.block_parameters, max(0, model.parameters - model.layers * settings.block_parameters)
    return part.block, min(model.parameters, 2 * words)


def _gathered_at_once(settings: MemorySettings, part: HeldPart, block: float, rest: float) -> float:
    if settings.gather == "step":
        return part.total
    return min(part.total, IN_FLIGHT * block + rest)


def _activations(model: ModelFacts, settings: MemorySettings, part: RankPart, stage: int) -> tuple[int, int]:
    """(bytes that all blocks keep until backward, bytes of activations on the device at the peak)."""
    division = settings.division
    tokens = settings.micro_rows * settings.sequence_length / (division.tensor * division.context)
    unit = tokens * model.width * (2 if settings.precision == "fp32" else 1)
    every = settings.recompute if isinstance(settings.recompute, int) else 1
    kind = "full" if isinstance(settings.recompute, int) else settings.recompute
    plain = (ACTIVATION_BYTES["none"] if settings.compiled else EAGER_BYTES) + _routed_bytes(model)
    plain += ENTERING_BYTES * (division.tensor - 1)  # in units of a tensor rank's share, as all below
    plain += _adapter_bytes(model)
    reduced = plain if kind == "none" else ACTIVATION_BYTES[kind]
    sharded = settings.zero > 0 and settings.shard > 1
    native = model.shape is not None and model.shape.config is not None
    if kind == "full" and settings.precision in AUTOCAST and (native or not sharded):
        reduced = WIDE_INPUT_BYTES
    passes, layers = 1, part.kept_layers
    if division.stages > 1:
        passes = parts_in_flight(
            division.schedule, division.stages, division.virtual, settings.run or settings.micro_batches, stage
        )
        layers = part.part_layers
    again = -(-layers // every) if kind != "none" else 0
    # In pieces, an MLP keeps its input, and what it makes is there for one piece at a time.
    inside = _mlp_bytes(model) if settings.mlp_chunks > 1 else 0.0
    plain, piece = plain - inside, inside / settings.mlp_chunks
    reduced = plain if kind == "none" else reduced
    kept = passes * unit * ((layers - again) * plain + again * reduced)
    # The block that is computed again holds everything it made for a moment.
    window = unit * ((plain - reduced if again else 0.0) + piece)
    held = kept
    if settings.offload_activations and not settings.host_is_device:
        held = min(kept, unit * IN_FLIGHT * max(reduced, plain if again < layers else 0.0))
    return round(kept), round(held + window)


def _mlp_bytes(model: ModelFacts) -> float:
    """What an MLP makes between its input and its output, of the bytes of none: four tensors of its width."""
    shape = model.shape
    if shape is None or not model.width:
        return 28.0
    return 0.0 if shape.experts else 8.0 * shape.mlp_width / model.width


def _routed_bytes(model: ModelFacts) -> float:
    """What experts keep beyond the MLP that `ACTIVATION_BYTES` contains (3.5 times as wide as the model: 28 of the 56
    bytes): each of a token's experts its own inner tensors, and the token's copy on the way there and back."""
    shape = model.shape
    if shape is None or not shape.experts or not model.width:
        return 0.0
    inner = shape.experts_per_token * shape.mlp_width / model.width
    return 8.0 * (inner - 3.5) + 4.0 * shape.experts_per_token


def _adapter_bytes(model: ModelFacts) -> float:
    """What adapters keep beside `ACTIVATION_BYTES`, in its units."""
    if model.training is None or not model.width:
        return 0.0
    return 2.0 * model.training.kept / (model.layers * model.width)


def _moved(memory: RankMemory, settings: MemorySettings, kept: int) -> RankMemory:
    """The same with what the settings move to the host or to a disk taken away from the device."""
    host = disk = 0
    optimizer, parameters, gradients = memory.optimizer, memory.parameters, memory.gradients
    if settings.optimizer_state == "nvme":
        disk, optimizer, host = memory.optimizer, 0, DISK_BUFFERS
    elif not settings.host_is_device and "host" in (settings.optimizer_state, settings.parameters):
        host, optimizer = memory.optimizer, 0
    if settings.parameters == "host" and not settings.host_is_device:
        host, parameters, gradients = host + parameters + gradients, 0, 0
    if settings.offload_activations and not settings.host_is_device:
        host += kept
    return replace(memory, optimizer=optimizer, parameters=parameters, gradients=gradients, host=host, disk=disk)
