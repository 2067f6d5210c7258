"""How near written texts are to what was expected: BLEU, chrF, ROUGE, exact match, and baselines that need no model."""

from trainwright.tasks.text_metrics.baselines import BASELINES, copied, first_sentence
from trainwright.tasks.text_metrics.overlap import Overlap, overlap, require_packages
from trainwright.tasks.text_metrics.report import Written, text_report
from trainwright.tasks.text_metrics.words import choose_words, is_chinese, split_words

__all__ = [
    "BASELINES",
    "Overlap",
    "Written",
    "choose_words",
    "copied",
    "first_sentence",
    "is_chinese",
    "overlap",
    "require_packages",
    "split_words",
    "text_report",
]
