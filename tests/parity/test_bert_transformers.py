"""The bert family against transformers: folders of each origin open in the other with the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainwright.models import Encoder, load_pretrained, save_pretrained

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "attn_implementation": "eager",
}
ROBERTA = {"type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-5}
KINDS = {"bert": {}, "roberta": ROBERTA, "xlm-roberta": ROBERTA}
AUTO = {
    "lm": "AutoModelForMaskedLM",
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "span": "AutoModelForQuestionAnswering",
}


def theirs_of(kind: str, head: str, **changes: Any) -> Any:
    """A tiny random model of transformers, every parameter drawn anew so that none is zero or one."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind], **changes})
    if head in ("sequence", "token"):
        config.num_labels = 3
    model = getattr(transformers, AUTO[head]).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model


def batch_of(kind: str) -> dict[str, torch.Tensor]:
    """Three rows, two of them padded at the end; token types where the kind has them."""
    torch.manual_seed(5)
    ids = torch.randint(5, 97, (3, 11))
    lengths = torch.tensor([11, 4, 7])
    mask = torch.arange(11)[None] < lengths[:, None]
    ids = torch.where(mask, ids, KINDS[kind].get("pad_token_id", 0))
    types = (torch.arange(11) >= 5).long().expand(3, 11) if kind == "bert" else torch.zeros_like(ids)
    return {"input_ids": ids, "key_mask": mask, "token_type_ids": types, "lengths": lengths}


def outputs_of_theirs(model: Any, head: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    out = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["key_mask"].long(),
        token_type_ids=batch["token_type_ids"],
    )
    return torch.stack((out.start_logits, out.end_logits), -1) if head == "span" else out.logits


def outputs_of_ours(model: Encoder, head: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.lm_head(model.hidden_states_of(batch)) if head == "lm" else model.scores(batch)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
    if ours.dim() == 3:
        ours, theirs = ours[batch["key_mask"]], theirs[batch["key_mask"]]
    assert (ours - theirs).abs().max() < 1e-5
    assert theirs.abs().max() > 0.1


@pytest.mark.parametrize("head", list(AUTO))
@pytest.mark.parametrize("kind", list(KINDS))
def test_folders_go_both_ways_with_equal_outputs(kind: str, head: str, tmp_path: Path) -> None:
    theirs = theirs_of(kind, head)
    theirs.save_pretrained(tmp_path / "theirs")
    batch = batch_of(kind)
    expected = outputs_of_theirs(theirs, head, batch)

    ours = load_pretrained(tmp_path / "theirs")
    assert isinstance(ours, Encoder)
    assert (ours.config.head is None) == (head == "lm")
    with torch.no_grad():
        assert_same(outputs_of_ours(ours, head, batch), expected, batch)

    save_pretrained(ours, tmp_path / "ours")
    again, report = getattr(transformers, AUTO[head]).from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(again) is type(theirs)
    with torch.no_grad():
        assert_same(outputs_of_theirs(again.eval(), head, batch), expected, batch)
    for key, value in theirs.config.to_dict().items():
        if key in ours.config.to_hf() and key not in ("dtype", "architectures", "use_cache"):
            assert again.config.to_dict()[key] == value, key

    reloaded = load_pretrained(tmp_path / "ours")
    assert reloaded.config == ours.config
    for (name, one), other in zip(ours.named_parameters(), reloaded.parameters(), strict=True):
        assert torch.equal(one, other), name
