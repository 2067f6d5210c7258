"""Names of labels: collected from training data, put in order, and looked up with errors that say what is known."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainwright.base.errors import ConfigError, DataError
from trainwright.base.text import did_you_mean

__all__ = ["LabelNames", "class_weights", "label_name", "place_of", "sorted_labels"]

_SHOWN = 12  # labels that a message lists


def sorted_labels(names: Iterable[str]) -> list[str]:
    """Labels in the order in which people count: 2 before 10, a2 before a10."""
    return sorted(names, key=lambda name: [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part)
                                           for part in re.split(r"(\d+)", name) if part])  # fmt: skip


def label_name(value: Any) -> str:
    """A label as a name: whole numbers without a point, truth values as JSON writes them."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def place_of(record: Mapping[str, Any]) -> str:
    """Where a record stands, at the beginning of a message; "" where that is not known."""
    where = record.get("where")
    return f"{where}: " if where else ""


class LabelNames:
    """The labels of a task in order, with how many training records have each.

    Args:
        names: in order; each once.
        counts: of the training data.
        unseen_as: what stands for a label that is not among the names; None refuses it.
        what: what a label is, in messages.

    Raises:
        ConfigError: a name comes twice, or `unseen_as` is none of them.
    """

    def __init__(
        self,
        names: Sequence[str],
        counts: Mapping[str, int] | None = None,
        *,
        unseen_as: str | None = None,
        what: str = "label",
    ) -> None:
        self.names = tuple(names)
        self.counts = dict(counts or {})
        self.unseen_as = unseen_as
        self.what = what
        self._index = {name: index for index, name in enumerate(self.names)}
        if len(self._index) < len(self.names):
            twice = next(name for name, count in Counter(self.names).items() if count > 1)
            raise ConfigError(f"task.labels names {twice!r} twice")
        if unseen_as is not None and unseen_as not in self._index:
            raise ConfigError(
                f"task.unseen_as is {unseen_as!r}, which is no {what} of the training data: {self.shown()}."
                f"{did_you_mean(unseen_as, self.names)}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def known(self, name: str) -> str:
        """The name itself, or what stands for it where it is not known.

        Raises:
            DataError: it is not known and nothing stands for it.
        """
        if name in self._index:
            return name
        if self.unseen_as is None:
            raise DataError(
                f"the {self.what} {name!r} is none of the {len(self)} of the training data: {self.shown()}."
                f"{did_you_mean(name, self.names)}",
                hint="mend the data, or say which known one stands for the others: task.unseen_as",
            )
        return self.unseen_as

    def index(self, name: str) -> int:
        """The number of a label; errors as `known`."""
        return self._index[self.known(name)]

    def shown(self) -> str:
        """The names with their counts, for a message."""
        parts = [f"{name} ({self.counts.get(name, 0):,})" for name in self.names[:_SHOWN]]
        return ", ".join(parts) + (f" and {len(self) - _SHOWN} more" if len(self) > _SHOWN else "")

    @classmethod
    def of_training(
        cls,
        counts: Mapping[str, int],
        given: Sequence[str] | None,
        *,
        unseen_as: str | None = None,
        what: str = "label",
    ) -> LabelNames:
        """The labels that the recipe lists, else those of the training data, sorted.

        Raises:
            DataError: there is none, or training records have others than the recipe lists.
        """
        if given is not None:
            others = {name: count for name, count in counts.items() if name not in given}
            if others and unseen_as is None:
                seen = ", ".join(f"{name} ({others[name]:,})" for name in sorted_labels(others)[:_SHOWN])
                raise DataError(
                    f"{sum(others.values()):,} training records have a {what} that task.labels does not list: {seen}",
                    hint="list it too, or say which of the listed ones stands for the others: task.unseen_as",
                )
        elif not counts:
            raise DataError(
                f"no training record has a {what}",
                hint="name the column: data.columns: {label: NAME}" if what == "label" else None,
            )
        return cls(given if given is not None else sorted_labels(counts), counts, unseen_as=unseen_as, what=what)


def class_weights(labels: LabelNames, given: str | Mapping[str, float]) -> list[float] | None:
    """A weight for each label, scaled so that their mean over the training records is 1; None where all are 1.

    "auto": the reciprocal of how many records have the label, as scikit-learn's "balanced".

    Raises:
        ConfigError: a weight is given for a label that is not there.
    """
    if given == "none":
        return None
    counts = [labels.counts.get(name, 0) for name in labels.names]
    if isinstance(given, str):
        raw = [1.0 / max(count, 1) for count in counts]
    else:
        if unknown := [name for name in given if name not in labels.names]:
            raise ConfigError(
                f"task.class_weights has {unknown[0]!r}, which is no label here: {labels.shown()}."
                f"{did_you_mean(unknown[0], labels.names)}"
            )
        raw = [given.get(name, 1.0) for name in labels.names]
    mean = sum(weight * count for weight, count in zip(raw, counts, strict=True)) / max(sum(counts), 1)
    return [weight / mean for weight in raw] if mean > 0 else raw
