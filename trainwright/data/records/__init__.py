"""Records: the one shape of every task's data, whatever format it is written in."""

from trainwright.data.records.formats import CONTAINERS, FORMATS
from trainwright.data.records.reading import detect_format, read_records
from trainwright.data.records.record import NOTES, SHAPES, TASK_SHAPES, Record, Shape, dropped_records

__all__ = [
    "CONTAINERS",
    "FORMATS",
    "NOTES",
    "SHAPES",
    "TASK_SHAPES",
    "Record",
    "Shape",
    "detect_format",
    "dropped_records",
    "read_records",
]
