"""Starting the ranks of one machine, and telling which of them failed, hung or was stopped. Imports without torch."""

from __future__ import annotations

from trainwright.launch.heartbeat import Heartbeat, heartbeat_from_environment
from trainwright.launch.local import LaunchOptions, launch
from trainwright.launch.world import launched, resolve_processes

__all__ = ["Heartbeat", "LaunchOptions", "heartbeat_from_environment", "launch", "launched", "resolve_processes"]
