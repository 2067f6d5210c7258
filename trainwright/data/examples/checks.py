"""What must hold of built examples before anything is trained on them, and what a person should know of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainwright.base.errors import DataError
from trainwright.data.examples.manifest import is_examples
from trainwright.data.mixture import RowOrder

if TYPE_CHECKING:
    from trainwright.data.examples.dataset import ExampleDataset
    from trainwright.data.examples.manifest import ExampleFacts, ExampleManifest

__all__ = ["check_answered", "check_bounds", "check_folder", "check_trainable", "padding_share"]


def check_bounds(manifest: ExampleManifest, max_drop: float, max_cut: float) -> None:
    """Raise DataError when a split lost more than `max_drop` of its records, or more than `max_cut` were cut."""
    for split, facts in manifest.splits.items():
        lost = facts.dropped_records + facts.skipped_records
        seen = facts.records + facts.skipped_records
        if lost > max_drop * seen:
            shown = [*facts.dropped_examples, *facts.skipped_examples][:5]
            reasons = {**facts.dropped, **{f"unreadable: {kind}": n for kind, n in facts.skipped.items()}}
            why = "; ".join(f"{count:,} {reason}" for reason, count in _most(reasons))
            raise DataError(
                f"{lost:,} of the {seen:,} {split} records ({lost / seen:.1%}) give no example, more than the "
                f"{max_drop:.1%} of data.max_drop: {why}" + "".join(f"\n     {line}" for line in shown),
                hint="mend these records (or raise data.sequence_length where they are too long); if they may be left "
                f"out, set data.max_drop={_share(lost, seen)}",
            )
        if facts.truncated > max_cut * facts.records:
            raise DataError(
                f"{facts.truncated:,} of the {facts.records:,} {split} records ({facts.truncated / facts.records:.1%}) "
                f"do not fit in {manifest.sequence_length} tokens and were cut ({facts.cut_tokens:,} tokens in all), "
                f"more than the {max_cut:.1%} of data.max_cut",
                hint=f"raise data.sequence_length, or set data.max_cut={_share(facts.truncated, facts.records)}",
            )


def _share(part: int, whole: int) -> str:
    """A share that holds, rounded up to percents."""
    return f"{min(1.0, math.ceil(100 * part / whole) / 100):g}"


def _most(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]


def check_trainable(dataset: ExampleDataset, split: str = "train") -> None:
    """Raise DataError when nothing of a split is trained, or what must be (the end of a turn) never is."""
    facts = dataset.facts(split)
    if not facts.trained_tokens:
        raise DataError(
            f"none of the {facts.inputs:,} tokens of the {split} split is trained: every label is masked",
            hint="see which tokens are trained with `trainwright data preview RECIPE`; answers may be missing in the "
            "records, or cut off (raise data.sequence_length)",
        )
    if facts.must_train and not any(facts.must_train.values()):
        raise DataError(
            f"{_names(dataset, facts)} is never trained: a model of these examples would not learn to stop",
            hint="the template must write the end of a turn inside what is trained; longer answers may have been cut "
            "off (raise data.sequence_length); records of bare text have no turns (task: causal_lm learns from these). "
            "`trainwright data preview RECIPE` shows the trained tokens",
        )


def check_answered(dataset: ExampleDataset) -> None:
    """Raise DataError when a split that is to be judged says nowhere what is right."""
    for split in dataset.splits:
        facts = dataset.facts(split)
        if split != "train" and not facts.trained_tokens:
            raise DataError(
                f"none of the {facts.records:,} {split} records has an answer to compare with",
                hint=f"check data.{split} and data.columns, or leave data.{split} out: `trainwright predict` needs no "
                "answers",
            )


def check_folder(folder: str | Path) -> None:
    """`check_trainable` of a built folder; nothing where it holds running text."""
    from trainwright.data.examples.dataset import ExampleDataset

    if is_examples(Path(folder)):
        check_trainable(ExampleDataset.open(folder))


def _names(dataset: ExampleDataset, facts: ExampleFacts) -> str:
    tokenizer = dataset.tokenizer()
    return " or ".join(f"{tokenizer.token(int(one))!r} (token {one})" for one in facts.must_train)


def padding_share(
    dataset: ExampleDataset, batch_rows: int, split: str = "train", seed: int = 0, *, batches: int = 200
) -> float:
    """Share of padding in the batches that training draws: an average over the first `batches` of an epoch."""
    lengths = dataset.lengths(split)
    count = max(1, min(batches, len(lengths) // batch_rows))
    draws = np.arange(count * min(batch_rows, len(lengths)), dtype=np.int64)
    drawn = lengths[RowOrder(dataset.groups(split), seed)(draws)].reshape(count, -1)
    slots = sum(dataset.padding.width(int(row.max()), dataset.sequence_length) * len(row) for row in drawn)
    return 1 - float(drawn.sum()) / slots
