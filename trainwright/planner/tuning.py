"""What the rules know of fine-tuning: what a model starts from and learns, and the values that are usual then.

Sources: TRL's SFTConfig (2e-5 for models of some 7B parameters, ten times that for LoRA, arXiv 2106.09685 and "LoRA
Without Regret"); BERT, arXiv 1810.04805 (5e-5, 3 epochs); RoBERTa, arXiv 1907.11692 (warm-up over 6 %, decay 0.01 to
0.1); don't stop pretraining, arXiv 2004.10964 (1e-4); muP, arXiv 2203.03466 (rates of hidden matrices in proportion to
1 / width), which for BERT's small models gives the 3e-4 that their authors use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["TuningFacts"]


@dataclass(frozen=True)
class TuningFacts:
    """What a run starts from and learns.

    Attributes:
        pretrained: the weights were trained before.
        task: name of the task.
        adapter: only an adapter is trained.
        kind: of the model.
    """

    pretrained: bool = False
    task: str = "causal_lm"
    adapter: bool = False
    kind: Literal["decoder", "encoder", "encoder_decoder"] = "decoder"

    def learning_rate(self, width: int) -> tuple[float, str]:
        """AdamW's rate for a pretrained model of this width that learns a task, and why."""
        if self.task == "masked_lm":
            base, reference, source = 1e-4, 768, "masked-language modelling goes on (arXiv 2004.10964)"
        elif self.kind == "decoder":
            base, reference, source = 2e-5, 4096, "fine-tuning a decoder"
        else:
            base, reference, source = 5e-5, 768, "fine-tuning an encoder (BERT)"
        scaled = base * reference / width
        note = f"{source}: {base:g} at width {reference}, in proportion to 1 / width"
        if self.adapter:
            scaled, note = 10 * scaled, f"{note}, ten times that for an adapter"
        limit = ADAPTER_LIMIT if self.adapter else LIMIT
        return (limit, f"{note}, at most {limit:g}") if scaled > limit else (scaled, note)


LIMIT = 5e-4
ADAPTER_LIMIT = 2e-3
