"""Processes that train together: who they are, how they agree, and what they send each other."""

from trainwright.comm.ranks import ALONE, Ranks
from trainwright.comm.runtime import start, stop
from trainwright.comm.traffic import Traffic

__all__ = ["ALONE", "Ranks", "Traffic", "start", "stop"]
