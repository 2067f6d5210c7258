"""Models of many architectures of transformers: hidden states, losses, packing, weights and folders are theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hugging_face_runs import TINY, VOCABULARY, batch_of, tiny_config
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from trainwright.base.errors import ModelError
from trainwright.models import build_model, load_config, load_pretrained, save_pretrained
from trainwright.models.fields import config_fields, config_from_fields
from trainwright.models.hugging_face.initial import initial_value
from trainwright.models.hugging_face.model import HuggingFaceModel
from trainwright.models.importing import Pretrained
from trainwright.models.initialise import initial_values
from trainwright.models.weights import kept_tensors

transformers = pytest.importorskip("transformers")

PACKED = {
    # How documents of a row are told apart; None where the architecture cannot.
    "phi": "none",
    "gemma2": "none",
    "gpt2": "none",
    "opt": "bool",
    "bert": "bool",
    "roberta": "bool",
    "deberta-v2": None,
    "modernbert": None,  # a mask of documents would take the place of its sliding windows
    "bloom": None,
    "mamba": None,
    "t5": None,
}
SAVED = ("gemma", "phi", "gpt_neox", "opt", "roberta", "deberta", "albert", "modernbert", "t5", "bart", "marian")


def inputs_of(config: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(ours, transformers' own) arguments of one padded batch."""
    batch = batch_of(config, 0)
    ours = {"key_mask": batch["key_mask"]}
    theirs = {"attention_mask": batch["key_mask"].long()}
    if config.is_encoder_decoder:
        decoder = torch.randint(3, VOCABULARY, (len(batch["labels"]), 6), generator=torch.Generator().manual_seed(2))
        ours["decoder_input_ids"] = theirs["decoder_input_ids"] = decoder
    return {"input_ids": batch["input_ids"], **ours}, {"input_ids": batch["input_ids"], **theirs}


@pytest.mark.parametrize("name", TINY)
def test_loss_and_gradients_are_those_of_all_logits(name: str) -> None:
    config = tiny_config(name)
    model = build_model(config, seed=3).eval()
    ours, theirs = inputs_of(config)
    hidden = model.hidden_states(**ours)
    logits = model(**theirs).logits
    assert torch.equal(model.logits(hidden), logits) or name == "granite"  # which divides where we multiply
    assert torch.allclose(model.logits(hidden), logits, atol=1e-6)

    labels = torch.randint(0, VOCABULARY, logits.shape[:2], generator=torch.Generator().manual_seed(4))
    labels[0, 1:] = -100
    sums = model.head_loss(hidden.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    sums.loss_sum.backward()
    seen = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.1)
    expected.backward()
    assert float(sums.loss_sum.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert int(sums.count) == int((labels != -100).sum())
    assert seen.keys() == {key for key, p in model.named_parameters() if p.grad is not None}
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(seen[key], parameter.grad, atol=1e-4, rtol=1e-4), key


def test_logits_that_are_changed_in_an_unknown_way_are_refused() -> None:
    model = build_model(tiny_config("phi"))
    plain = type(model)

    class Odd(plain):  # type: ignore[misc, valid-type]
        def forward(self, *arguments: Any, **named: Any) -> Any:
            output = super().forward(*arguments, **named)
            output.logits = output.logits**3
            return output

    model.__class__ = Odd
    with pytest.raises(ModelError, match="changes its logits behind the output projection"):
        model.hidden_states(torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("name", PACKED)
def test_documents_of_one_row_do_not_see_each_other(name: str) -> None:
    config = tiny_config(name)
    model = build_model(config, seed=3).train()
    batch = batch_of(config, 1, packed=True)
    named = {key: value for key, value in batch.items() if key != "labels"}
    if PACKED[name] is None:
        with pytest.raises(ModelError, match="several documents") as caught:
            model.hidden_states(**named)
        assert "data.packing=pad" in str(caught.value)
        return
    seen = model.eval().hidden_states(**named)
    assert model._packing().mask == PACKED[name]
    for row, (ids, documents) in enumerate(zip(batch["input_ids"], batch["document_ids"], strict=True)):
        for document in (0, 1):
            inside = documents == document
            alone = model.hidden_states(ids[inside][None])
            assert torch.allclose(seen[row, inside], alone[0], atol=2e-6), (row, document)


def test_the_proof_of_packing_leaves_training_mode_and_dropout_alone() -> None:
    model = build_model(tiny_config("gpt2", resid_pdrop=0.5), seed=3).train()
    batch = batch_of(model.config, 1, packed=True)
    del batch["labels"]
    assert not torch.equal(model.hidden_states(**batch), model.hidden_states(**batch))
    assert model.training


def test_initial_weights_are_pure_functions_of_name_and_seed_by_the_rules_of_the_architecture() -> None:
    for name in ("t5", "gpt2", "roberta", "bart", "gemma"):
        config = tiny_config(name)
        model = build_model(config, seed=3)
        values = initial_values(config, 3)
        other = initial_values(config, 4)
        for key, parameter in reversed(list(kept_tensors(model).items())):  # another order
            assert torch.equal(values(key, parameter.shape, torch.float32), parameter), key
            if parameter.dim() > 1 and parameter.std() > 0:
                assert not torch.equal(other(key, parameter.shape, torch.float32), parameter), key
        torch.manual_seed(5)
        theirs = dict(config.model_class(transformers.AutoConfig.for_model(name, **TINY[name])).named_parameters())
        for key, parameter in model.named_parameters():
            if parameter.numel() >= 256:
                assert float(parameter.detach().std()) == pytest.approx(float(theirs[key].detach().std()), rel=0.25), (
                    key
                )
            else:
                assert torch.equal(parameter, theirs[key]) or parameter.std() > 0, key
    # T5 draws queries narrower than keys, in the rules of the attention around them.
    t5 = build_model(tiny_config("t5", d_model=64), seed=1)
    attention = t5.get_submodule("encoder.block.0.layer.0.SelfAttention")
    assert float(attention.q.weight.detach().std()) < 0.5 * float(attention.k.weight.detach().std())
    assert not build_model(tiny_config("roberta")).embedding.weight[0].any()  # the row of padding


def test_asking_for_a_parameter_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ModelError, match="no parameter"):
        initial_value("model.nothing", (2, 2), tiny_config("phi"), 0)
    with pytest.raises(ModelError, match="was asked for"):
        initial_value("lm_head.weight", (2, 2), tiny_config("phi"), 0)


def test_tables_that_no_file_has_keep_values_and_type_whatever_the_parameters_become() -> None:
    config = tiny_config("gemma")
    model = build_model(config, device="meta", dtype=torch.bfloat16)
    table = model.get_buffer("model.rotary_emb.inv_freq")
    assert table.device.type == "cpu"
    assert table.dtype == torch.float32
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    model.to_empty(device="cpu")
    fresh = build_model(config)
    for key, buffer in fresh.named_buffers():
        assert torch.equal(model.get_buffer(key), buffer), key
    assert torch.equal(fresh.half().get_buffer("model.rotary_emb.inv_freq"), table)
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight


@pytest.mark.parametrize("name", SAVED)
def test_folders_are_those_of_save_pretrained_in_both_directions(name: str, tmp_path: Path) -> None:
    config = tiny_config(name)
    torch.manual_seed(7)
    theirs = config.model_class(transformers.AutoConfig.for_model(name, **TINY[name])).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_pretrained(tmp_path / "theirs", config=load_config(tmp_path / "theirs", native=False))
    assert isinstance(model, HuggingFaceModel)
    save_pretrained(model, tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    # Tables of sines are computed by transformers, and by us written down as well.
    assert {key for key in written if "embed_positions" not in key or key in expected} == set(expected)
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    again, report = config.model_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    report = report if isinstance(report, dict) else vars(report)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    _, named = inputs_of(config)
    with torch.no_grad():
        assert torch.equal(again.eval()(**named).logits, theirs(**named).logits)


def test_a_folder_that_does_not_fit_names_what_is_wrong(tmp_path: Path) -> None:
    config = tiny_config("phi")
    save_pretrained(build_model(config), tmp_path / "phi")
    with pytest.raises(ModelError, match=r"of another shape.*embed_tokens"):
        Pretrained(tmp_path / "phi", tiny_config("phi", vocab_size=50))
    with pytest.raises(ModelError, match=r"missing: model\.layers\.2"):
        Pretrained(tmp_path / "phi", tiny_config("phi", num_hidden_layers=3), seed=0)
    with pytest.raises(ModelError, match=r"unexpected.*model\.layers\.1"):
        Pretrained(tmp_path / "phi", tiny_config("phi", num_hidden_layers=1), seed=0)


def test_a_configuration_survives_fields_and_folders(tmp_path: Path) -> None:
    config = tiny_config("t5")
    assert config_from_fields(config_fields(config)) == config
    assert hash(config_from_fields(config_fields(config))) == hash(config)
    assert config.family == "transformers"
    assert (config.num_layers, config.num_heads, config.head_dim, config.intermediate_size) == (4, 4, 8, 64)
    dropped = config.with_dropout(0.3)
    assert dropped.values["dropout_rate"] == 0.3
    assert tiny_config("roberta").max_position_embeddings == 65  # of 66, one for padding
    assert tiny_config("mistral").layer_windows() == [6, 6]


def test_what_transformers_does_not_know_or_refuses_is_named() -> None:
    with pytest.raises(ModelError, match="no architecture of model_type 'nebula'"):
        config_from_fields({"family": "transformers", "model_type": "nebula"})
    with pytest.raises(ModelError, match="needs model_type"):
        config_from_fields({"family": "transformers", "hidden_size": 4})
    with pytest.raises(ModelError, match="no phi model of kind seq2seq"):
        config_from_fields({"family": "transformers", "model_type": "phi", "kind": "seq2seq"})


def test_attention_of_transformers_can_be_chosen() -> None:
    model = build_model(tiny_config("phi"), seed=1).eval()
    ids = torch.arange(3, 13)[None]
    expected = model.hidden_states(ids)
    model.set_attention_backend("reference")
    assert torch.allclose(model.hidden_states(ids), expected, atol=1e-5)
    with pytest.raises(ModelError, match="for native families"):
        model.set_attention_backend("blocked")
