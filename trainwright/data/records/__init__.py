"""Records: the one shape of every task's data, whatever format it is written in."""

from trainwright.data.records.converting import Converted, convert
from trainwright.data.records.formats import CONTAINERS, FORMATS
from trainwright.data.records.reading import detect_format, read_records
from trainwright.data.records.record import NOTES, SHAPES, TASK_SHAPES, Record, Shape, dropped_records
from trainwright.data.records.writers import WRITERS
from trainwright.data.records.writing import Written, write_records

__all__ = [
    "CONTAINERS",
    "FORMATS",
    "NOTES",
    "SHAPES",
    "TASK_SHAPES",
    "WRITERS",
    "Converted",
    "Record",
    "Shape",
    "Written",
    "convert",
    "detect_format",
    "dropped_records",
    "read_records",
    "write_records",
]
