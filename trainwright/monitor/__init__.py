"""Sinks for events: console, JSON lines, TensorBoard; the monitor that feeds them; and how fast a run is."""

from __future__ import annotations

from trainwright.monitor.console import ConsoleMode, ConsoleSink
from trainwright.monitor.dispatch import Monitor, Sink
from trainwright.monitor.jsonl import JsonlSink, read_history, rewind_history
from trainwright.monitor.tensorboard import TensorBoardSink
from trainwright.monitor.throughput import ThroughputMeter

__all__ = [
    "ConsoleMode",
    "ConsoleSink",
    "JsonlSink",
    "Monitor",
    "Sink",
    "TensorBoardSink",
    "ThroughputMeter",
    "read_history",
    "rewind_history",
]
