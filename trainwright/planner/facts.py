"""What the planner knows before it decides: the machine, the data and the model, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DataFacts", "MachineFacts", "ModelFacts"]


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


@dataclass(frozen=True)
class DataFacts:
    """The built dataset, or an estimate of it from file sizes before it is built.

    Attributes:
        train_rows, validation_rows: packed rows of each split.
        sequence_length: positions of a row.
        trained_per_row: mean number of trained tokens in a row (less than `sequence_length` when rows are padded).
        vocab_size: size of the tokenizer.
        estimated: True when the numbers were inferred from file sizes.
    """

    train_rows: int
    validation_rows: int
    sequence_length: int
    trained_per_row: float
    vocab_size: int
    estimated: bool = False

    @property
    def train_tokens(self) -> int:
        """Trained tokens of one epoch."""
        return round(self.train_rows * self.trained_per_row)


@dataclass(frozen=True)
class ModelFacts:
    """The model as the cost model sees it.

    Attributes:
        parameters: all parameters, tied ones once.
        flops_per_token: forward and backward, matrix products and causal attention.
        layers, width, vocab_size: its shape.
    """

    parameters: int
    flops_per_token: float
    layers: int
    width: int
    vocab_size: int
