"""How often to save: the interval that loses the least time to saving and to repeating lost work."""

from __future__ import annotations

import math

__all__ = ["expected_overhead", "recommended_interval"]


def recommended_interval(save_cost_seconds: float, mttf_seconds: float) -> float:
    """Seconds of training between two saves that minimise the expected loss.

    J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation
    Computer Systems 22 (2006), with cost c and mean time to failure M:
    sqrt(2 c M) (1 + sqrt(c / 2M) / 3 + (c / 2M) / 9) - c for c < 2M, and M otherwise.
    The first term alone is J. W. Young's (CACM 17, 1974).

    Args:
        save_cost_seconds: time that training stands still for one save (the stall, for an asynchronous one).
        mttf_seconds: mean time between failures of the whole job.

    Raises:
        ValueError: a cost below zero, or a mean time that is not positive.
    """
    _check(save_cost_seconds, mttf_seconds)
    if save_cost_seconds >= 2 * mttf_seconds:
        return mttf_seconds
    ratio = save_cost_seconds / (2 * mttf_seconds)
    first_order = math.sqrt(2 * save_cost_seconds * mttf_seconds)
    return first_order * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_cost_seconds


def expected_overhead(interval_seconds: float, save_cost_seconds: float, mttf_seconds: float) -> float:
    """Share of wall time that saving and repeated work cost at an interval, to first order: c / (T + c) + (T + c) / 2M.

    `expected_overhead(recommended_interval(c, m), c, m)` is the "cost 0.4%" that is shown to the user.
    """
    _check(save_cost_seconds, mttf_seconds)
    if interval_seconds <= 0:
        raise ValueError(f"the interval must be positive, not {interval_seconds}")
    cycle = interval_seconds + save_cost_seconds
    return save_cost_seconds / cycle + cycle / (2 * mttf_seconds)


def _check(save_cost_seconds: float, mttf_seconds: float) -> None:
    if not save_cost_seconds >= 0 or not mttf_seconds > 0:
        raise ValueError(
            f"expected a save cost of at least 0 s and a mean time to failure above 0 s, "
            f"not {save_cost_seconds} and {mttf_seconds}"
        )
