"""Fault points: named places where a test, or a user who rehearses a failure, makes this process fail on purpose.

    TRAINWRIGHT_FAULTS="save.before_commit:kill@step=12;data.next:raise@hit=3"

A rule is `point:action` or `point:action@key=value,key=value`; rules are separated by `;`. Conditions compare the
fields that the code passes to `fault_point`; `hit=N` means the N-th time that the other conditions hold. Without the
variable a fault point costs one dictionary lookup.
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import os
import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainwright.base.errors import ConfigError

__all__ = ["ACTIONS", "FAULTS_VARIABLE", "InjectedFault", "fault_point", "parse_faults", "registered_points"]

FAULTS_VARIABLE = "TRAINWRIGHT_FAULTS"

ACTIONS = {
    "raise": "raise InjectedFault",
    "kill": "SIGKILL this process: nothing is flushed, no handler runs",
    "stop": "SIGSTOP this process: it hangs until it is continued or killed",
    "sleep": "sleep=SECONDS: stall, then go on",
    "enospc": "raise OSError(ENOSPC), as a full disk does",
    "nan": "return 'nan': the caller poisons its value",
}


class InjectedFault(RuntimeError):
    """Raised by the action `raise`; not a TrainwrightError, because it stands for a failure nobody foresaw."""


@dataclass
class FaultRule:
    """One parsed rule. `hits` counts how often its conditions held so far."""

    point: str
    action: str
    argument: str | None
    conditions: dict[str, str] = field(default_factory=dict)
    hits: int = 0

    def matches(self, point: str, fields: dict[str, Any]) -> bool:
        if point != self.point:
            return False
        for key, wanted in self.conditions.items():
            if key != "hit" and str(fields.get(key)) != wanted:
                return False
        self.hits += 1
        return "hit" not in self.conditions or self.hits == int(self.conditions["hit"])


_active: tuple[str | None, list[FaultRule]] = (None, [])


def fault_point(point: str, **fields: Any) -> str | None:
    """Fail here if TRAINWRIGHT_FAULTS says so. Returns "nan" when the caller shall poison its value, else None.

    Write `point` as a literal: `registered_points` finds the points by reading the package's source.
    """
    global _active
    text = os.environ.get(FAULTS_VARIABLE)
    if not text:
        return None
    if _active[0] != text:
        _active = (text, parse_faults(text, known=registered_points()))
    for rule in _active[1]:
        if rule.matches(point, fields):
            return _act(rule, point, fields)
    return None


def _act(rule: FaultRule, point: str, fields: dict[str, Any]) -> str | None:
    match rule.action:
        case "raise":
            raise InjectedFault(f"fault injected at {point} {fields}")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep":
            time.sleep(float(rule.argument or 0))
        case "enospc":
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (fault injected at {point})")
        case "nan":
            return "nan"
    return None


def parse_faults(text: str, *, known: tuple[str, ...] | None = None) -> list[FaultRule]:
    """Read the value of TRAINWRIGHT_FAULTS.

    Args:
        known: the points that exist; a rule for any other is refused, because a test that waits for a misspelt fault
            would pass without testing anything. None accepts every name.

    Raises:
        ConfigError: a rule cannot be read, or names an unknown action or point.
    """
    rules = [_parse_rule(part.strip()) for part in text.split(";") if part.strip()]
    for rule in rules:
        if known is not None and not any(fnmatch.fnmatchcase(rule.point, pattern) for pattern in known):
            raise ConfigError(
                f"{FAULTS_VARIABLE} names the fault point {rule.point!r}, which does not exist",
                hint=f"fault points: {', '.join(known) or 'none'}",
            )
    return rules


def _parse_rule(text: str) -> FaultRule:
    shape = f"expected point:action[=argument][@key=value,...] with one of the actions {', '.join(ACTIONS)}"
    what, _, conditions_text = text.partition("@")
    point, colon, action_text = what.partition(":")
    action, equals, argument = action_text.partition("=")
    if not colon or not point or action not in ACTIONS:
        raise ConfigError(f"{FAULTS_VARIABLE}: cannot read the rule {text!r}", hint=shape)
    if (action == "sleep") != bool(equals):
        raise ConfigError(f"{FAULTS_VARIABLE}: {text!r}: only sleep takes an argument, and it needs one", hint=shape)
    if action == "sleep" and not re.fullmatch(r"[0-9]+(\.[0-9]+)?", argument):
        raise ConfigError(f"{FAULTS_VARIABLE}: {text!r}: {argument!r} is not a number of seconds", hint=shape)
    conditions: dict[str, str] = {}
    for part in conditions_text.split(",") if conditions_text else ():
        key, equals, value = part.partition("=")
        if not equals or not key or not value or (key == "hit" and not value.isdecimal()):
            raise ConfigError(f"{FAULTS_VARIABLE}: {text!r}: cannot read the condition {part!r}", hint=shape)
        conditions[key.strip()] = value.strip()
    return FaultRule(point.strip(), action, argument if action == "sleep" else None, conditions)


_CALL = re.compile(r"\bfault_point\(\s*(f?)([\"'])([a-z0-9_.{}]+)\2")


@functools.cache
def registered_points() -> tuple[str, ...]:
    """Every fault point of the package, sorted, read from its source so that the list is never out of date.

    A name made by an f-string stands as a pattern (`save.*`).
    """
    found: set[str] = set()
    here = Path(__file__)
    for path in sorted(here.parent.parent.rglob("*.py")):
        if path == here:
            continue
        for prefix, _, name in _CALL.findall(path.read_text(encoding="utf-8")):
            found.add(re.sub(r"\{[^}]*\}", "*", name) if prefix else name)
    return tuple(sorted(found))
