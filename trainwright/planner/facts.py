"""What the planner knows before it decides: the machine, the data and the model, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainwright.models import ModelConfig
from trainwright.planner.holdings import Training

__all__ = ["BatchFacts", "DataFacts", "MachineFacts", "ModelFacts", "ModelShape"]


@dataclass(frozen=True)
class MachineFacts:
    """The device a run will use.

    Attributes:
        kind: "cpu", "cuda" or "mps".
        name: what the device calls itself.
        cores: CPU cores that one rank uses.
        memory_bytes: memory that one rank may use: of its device, or its share of the host's (cgroup limits included).
        bf16: whether bf16 matrix products are done in hardware.
        compiler: path of a C++ compiler for CPU kernels (CUDA needs none), None when there is none.
        peak: measured matrix-product rate of one rank in FLOP/s by dtype name ("fp32", "bf16").
        ranks: processes that train together, each with a device, or a share of the cores, like this one.
        host_bytes: this rank's share of the host's memory; None where that is `memory_bytes`.
        ranks_on_host: those of them that run on one host; None when all do.
        threads: of one rank, where OMP_NUM_THREADS asks for so many; `peak` was measured with these.
    """

    kind: str
    name: str
    cores: int
    memory_bytes: int
    bf16: bool
    compiler: str | None
    peak: dict[str, float]
    ranks: int = 1
    host_bytes: int | None = None
    ranks_on_host: int | None = None
    threads: int | None = None

    def shared_by(self, processes: int) -> MachineFacts:
        """What each of so many processes of this host has; these are the facts of one that had it all.

        On a CPU they share cores, memory and the rate of products; each has a device of its own otherwise.
        """
        shared = replace(self, cores=max(1, self.cores // processes), ranks=processes, ranks_on_host=processes)
        if self.kind != "cpu":
            return replace(shared, host_bytes=None if self.host_bytes is None else self.host_bytes // processes)
        share = min(1.0, self.cores / processes / (self.threads or self.cores))
        peak = {name: rate * share for name, rate in self.peak.items()}
        return replace(shared, memory_bytes=self.memory_bytes // processes, peak=peak)


@dataclass(frozen=True)
class DataFacts:
    """The built dataset, or an estimate of it from file sizes before it is built.

    Attributes:
        train_rows, validation_rows: packed rows of each split.
        sequence_length: positions of a row.
        trained_per_row: mean number of trained tokens (texts, words) in a row: what losses are means over.
        vocab_size: size of the tokenizer.
        estimated: True when the numbers were inferred from file sizes.
        computed_per_row: mean number of positions that a row costs, padding included; None where that is what is
            trained.
        records: True where rows are examples made of records, not stretches of running text.
        learned_share: of the trained tokens that budgets count, those that losses are means over, and that a running
            step counts: all, but of running text under masked language modelling the hidden ones.
        counted: what is trained, in a word for people: tokens, texts, words, windows, pairs.
    """

    train_rows: int
    validation_rows: int
    sequence_length: int
    trained_per_row: float
    vocab_size: int
    estimated: bool = False
    computed_per_row: float | None = None
    records: bool = False
    learned_share: float = 1.0
    counted: str = "tokens"

    @property
    def computed_per_trained(self) -> float:
        """Positions that a forward pass computes for every trained token."""
        return 1.0 if self.computed_per_row is None else self.computed_per_row / self.trained_per_row

    @property
    def labelled_share(self) -> float:
        """Of the positions that a forward pass computes, those that a loss is taken of."""
        return self.learned_share / self.computed_per_trained

    @property
    def train_tokens(self) -> int:
        """Trained tokens of one epoch."""
        return round(self.train_rows * self.trained_per_row)


@dataclass(frozen=True)
class BatchFacts:
    """What one optimizer step is made of.

    Attributes:
        rows: of one step on all ranks together.
        micro_rows: of one forward pass.
        sequence_length: positions of a row.
        run: micro-batches of one run of a pipeline's schedule; None runs all those of a step at once.
    """

    rows: int
    micro_rows: int
    sequence_length: int
    run: int | None = None


@dataclass(frozen=True)
class ModelShape:
    """What decides how a model can be divided. Sizes are numbers of parameters.

    Attributes:
        heads, kv_heads: of attention. head_width: dimensions of each.
        mlp_width: of the MLP inside a block; of one expert where there are experts.
        block: all of one block, on average.
        block_whole: of these, what tensor ranks hold whole (norms, the router, biases of summed products).
        block_kv: of these, the projections to keys and values, which ranks that do not divide `kv_heads` hold whole.
        block_experts: of these, in experts, each of which tensor ranks divide.
        embedding, head: outside blocks, tied ones in both; divided by vocabulary.
        positions: learned positions, which every tensor rank of the first stage holds whole.
        tied: the head is the embedding.
        experts: routed experts of a block, 0 in a dense model. experts_per_token: of these, those that see a token.
        config: the native family's configuration, which the rules of each axis read; None where only numbers are known.
    """

    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    block: int
    block_whole: int
    block_kv: int
    embedding: int
    head: int
    tied: bool
    positions: int = 0
    block_experts: int = 0
    experts: int = 0
    experts_per_token: int = 0
    config: ModelConfig | None = None


@dataclass(frozen=True)
class ModelFacts:
    """The model as the cost model sees it.

    Attributes:
        parameters: all parameters of its own, tied ones once.
        flops_per_token: forward and backward, matrix products and attention, where all of it is trained on all
            positions: what laws of scaling go by.
        layers, width, vocab_size: its shape.
        shape: how it can be divided; None where nobody looked inside.
        native: whether its modules are our own, which compile well and know every axis.
        training: what a run trains of it and what that costs; None where all of it is trained.
    """

    parameters: int
    flops_per_token: float
    layers: int
    width: int
    vocab_size: int
    shape: ModelShape | None = None
    native: bool = True
    training: Training | None = None

    @property
    def run_flops(self) -> float:
        """FLOPs per token that the run computes: what its time and MFU go by."""
        return self.flops_per_token if self.training is None else self.training.flops

    def times(self, factor: float) -> ModelFacts:
        """The same with so many positions computed for each that is counted."""
        training = None if self.training is None else self.training.times(factor)
        return replace(self, flops_per_token=self.flops_per_token * factor, training=training)
