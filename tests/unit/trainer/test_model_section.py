"""From the recipe's `model` section to a configuration."""

from __future__ import annotations

import pytest

from trainwright.config import ModelFromConfig
from trainwright.trainer.model_section import model_source

pytest.importorskip("transformers.models.eurobert", reason="this transformers has no EuroBERT")


@pytest.mark.parametrize(("roles", "mask"), [({"pad": 3, "eos": None, "bos": None}, 3), ({}, 0)])
def test_numbers_beyond_the_vocabulary_become_ones_that_the_architecture_takes(
    roles: dict[str, int | None], mask: int
) -> None:
    """EuroBERT's mask token is number 128002 of its own vocabulary, and its configuration takes no null there."""
    fields = {"family": "transformers", "model_type": "eurobert", "hidden_size": 32, "num_hidden_layers": 1}
    fields |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 16}
    config = model_source(ModelFromConfig(config=fields)).config_for(500, 32, roles)
    assert config.vocab_size >= 500
    assert config.values["mask_token_id"] == mask
    assert config.values["bos_token_id"] is None or config.values["bos_token_id"] < 500
