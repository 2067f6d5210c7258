"""DeepSpeed's JSON as a second language of an engine's configuration: every key is mapped, explained or refused."""

from trainwright.config.deepspeed.importing import Import, Note
from trainwright.config.deepspeed.language import DEEPSPEED, import_deepspeed

__all__ = ["DEEPSPEED", "Import", "Note", "import_deepspeed"]
