"""The command line: one file per verb; nothing imports torch or pydantic until a verb needs it."""
