"""Trainwright: trains language models and brings them all the way to use."""

__version__ = "0.1.0.dev0"
