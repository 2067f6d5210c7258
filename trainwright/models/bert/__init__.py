"""BERT and RoBERTa: bidirectional encoders."""

from __future__ import annotations

from trainwright.models.bert.config import BertConfig
from trainwright.models.bert.model import BertForMaskedLM

__all__ = ["BertConfig", "BertForMaskedLM"]
