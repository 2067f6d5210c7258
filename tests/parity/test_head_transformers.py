"""Models with the head of a task open in transformers as the class for that task, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainwright.base.errors import ModelError
from trainwright.models import (
    BertConfig,
    GPT2Config,
    HeadSpec,
    LlamaConfig,
    MoEConfig,
    Pretrained,
    attach_head,
    build_model,
    load_config,
    load_pretrained,
    replace,
    save_pretrained,
)
from trainwright.testing import tiny_gpt2_config, tiny_llama_config, tiny_moe_config

transformers = pytest.importorskip("transformers")

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**tiny_llama_config(pad_token_id=0, tie_embeddings=True)),
    "mistral": LlamaConfig(**tiny_llama_config(pad_token_id=0, architecture="mistral")),
    "qwen2": LlamaConfig(**tiny_llama_config(pad_token_id=0, architecture="qwen2", qkv_bias=True)),
    "qwen3": LlamaConfig(**tiny_llama_config(pad_token_id=0, architecture="qwen3", qk_norm=True)),
    "gpt2": GPT2Config(**tiny_gpt2_config(pad_token_id=0)),
    "mixtral": MoEConfig(**tiny_moe_config(pad_token_id=0, expert_size=128)),
}
CLASSES = {
    "sequence": "AutoModelForSequenceClassification",
    "token": "AutoModelForTokenClassification",
    "span": "AutoModelForQuestionAnswering",
}
SPECS = {
    "sequence": HeadSpec("sequence", ("负面", "neutral", "正面"), problem="multi_label"),
    "token": HeadSpec("token", ("O", "B-PER", "I-PER")),
    "span": HeadSpec("span"),
}


def batch_of() -> dict[str, torch.Tensor]:
    """Rows whose padding is token 0, which stands in no text."""
    ids = torch.randint(1, 256, (3, 9), generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([9, 3, 6])
    mask = torch.arange(9)[None] < lengths[:, None]
    return {"input_ids": ids.masked_fill(~mask, 0), "lengths": lengths, "key_mask": mask}


def outputs(theirs: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    out = theirs(input_ids=batch["input_ids"], attention_mask=batch["key_mask"].long())
    return torch.stack((out.start_logits, out.end_logits), -1) if "start_logits" in out else out.logits


def open_theirs(kind: str, folder: Path) -> Any:
    model, report = getattr(transformers, CLASSES[kind]).from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"], report
    assert not report["unexpected_keys"], report
    return model.eval()


@pytest.mark.parametrize("kind", list(CLASSES))
@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_fine_tuned_decoder_opens_in_transformers(family: str, kind: str, tmp_path: Path) -> None:
    model = attach_head(build_model(CONFIGS[family], seed=3), SPECS[kind], seed=3).eval()
    with torch.no_grad():
        for parameter in model.task_head.parameters():
            parameter.normal_(0.0, 0.3)
    save_pretrained(model, tmp_path / "ours")
    theirs, batch = open_theirs(kind, tmp_path / "ours"), batch_of()
    with torch.no_grad():
        ours, expected = model.scores(batch), outputs(theirs, batch)
    if ours.dim() == 3:
        ours, expected = ours[batch["key_mask"]], expected[batch["key_mask"]]
    assert (ours - expected).abs().max() < 1e-5
    assert expected.abs().max() > 0.1
    if kind != "span":
        assert theirs.config.id2label == dict(enumerate(SPECS[kind].labels))
        assert theirs.config.label2id["B-PER" if kind == "token" else "正面"] in (1, 2)
    if kind == "sequence":
        assert theirs.config.problem_type == "multi_label_classification"

    again = load_pretrained(tmp_path / "ours")
    assert again.config == model.config
    theirs.save_pretrained(tmp_path / "theirs")
    values = json.loads((tmp_path / "theirs" / "config.json").read_text(encoding="utf-8"))
    values.pop("trainwright_head")  # of another origin
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(values), encoding="utf-8")
    back = load_pretrained(tmp_path / "theirs")
    assert back.config.head is not None
    assert (back.config.head.kind, back.config.head.problem) == (kind, SPECS[kind].problem)
    for name, parameter in back.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize(
    "spec", [HeadSpec("entities", ("a", "b")), HeadSpec("embedding"), HeadSpec("token", ("a", "b"), crf=True)]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_heads_that_transformers_lacks_are_kept(family: str, spec: HeadSpec, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96}
    config = BertConfig(vocab_size=256, **sizes) if family == "bert" else CONFIGS[family]
    model = attach_head(build_model(config, seed=3), spec, seed=3).eval()
    save_pretrained(model, tmp_path)
    again = load_pretrained(tmp_path)
    assert again.config == model.config
    batch = {**batch_of(), "entity_starts": torch.tensor([[0, 4], [0, 2], [1, 5]])}
    with torch.no_grad():
        assert torch.equal(again.scores(batch), model.scores(batch))
        trunk = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
        states = trunk(input_ids=batch["input_ids"], attention_mask=batch["key_mask"].long()).last_hidden_state
        mask = batch["key_mask"]
        assert (states - model.hidden_states_of(batch))[mask].abs().max() < 1e-5


# --- starting from folders that have another head ---


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    save_pretrained(build_model(CONFIGS["qwen2"], seed=5), tmp_path / "lm")
    return tmp_path / "lm"


def test_a_head_that_the_folder_lacks_starts_at_random_and_is_said(language_model: Path) -> None:
    config = replace(load_config(language_model), head=SPECS["token"])
    with pytest.raises(ModelError, match="missing") as raised:
        load_pretrained(language_model, config=config)
    assert "seed" in str(raised.value.hint)
    pretrained = Pretrained(language_model, config, seed=7)
    assert pretrained.fresh == {"score.weight", "score.bias"}
    assert "starts at random: score.weight, score.bias" in pretrained.notes[0]
    assert "not used: lm_head.weight" in pretrained.notes[1]
    model = load_pretrained(language_model, config=config, seed=7)
    built = build_model(config, seed=7)
    assert torch.equal(model.score.weight, built.score.weight)
    whole = load_pretrained(language_model)
    for name, parameter in whole.named_parameters():
        if name != "lm_head.weight":
            assert torch.equal(model.get_parameter(name), parameter), name


def test_heads_go_from_kind_to_kind_and_labels_to_labels(tmp_path: Path) -> None:
    first = attach_head(build_model(CONFIGS["llama"], seed=1), SPECS["span"], seed=1)
    save_pretrained(first, tmp_path)  # its trunk is called `transformer.` there

    def start(head: HeadSpec | None, folder: Path = tmp_path) -> Pretrained:
        return Pretrained(folder, replace(load_config(folder), head=head), seed=0)

    other = start(SPECS["sequence"])
    assert other.fresh == {"score.weight"}
    name = "model.layers.1.mlp.down_proj.weight"
    found = other.value(name, tuple(first.get_parameter(name).shape), torch.float32)
    assert torch.equal(found, first.get_parameter(name))
    assert start(SPECS["span"]).fresh == frozenset()
    assert start(None).fresh == frozenset()  # tied: the head is the embedding

    three = attach_head(build_model(CONFIGS["llama"], seed=1), SPECS["sequence"], seed=1)
    save_pretrained(three, tmp_path / "three")
    assert not start(SPECS["sequence"], tmp_path / "three").fresh
    renamed = HeadSpec("sequence", ("x", "y", "z"))
    assert start(renamed, tmp_path / "three").fresh == {"score.weight"}
    assert start(HeadSpec("sequence", ("x", "y")), tmp_path / "three").fresh == {"score.weight"}
    assert start(SPECS["token"], tmp_path / "three").fresh == {"score.weight", "score.bias"}


def test_encoders_start_from_trunks_and_from_other_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    trunk = transformers.BertModel(config).eval()
    trunk.save_pretrained(tmp_path / "trunk")
    with pytest.raises(ModelError, match=r"missing: cls\.predictions"):
        load_pretrained(tmp_path / "trunk")
    masked = Pretrained(tmp_path / "trunk", seed=0)
    assert all(name.startswith("lm_head.") for name in masked.fresh)
    assert "lm_head.decoder.weight" not in masked.fresh  # tied
    model = load_pretrained(tmp_path / "trunk", seed=0)
    ids = torch.randint(97, (2, 8))
    with torch.no_grad():
        states = trunk(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        assert (model.hidden_states(ids) - states).abs().max() < 1e-5

    wanted = replace(load_config(tmp_path / "trunk"), head=HeadSpec("sequence", ("a", "b")))
    texts = Pretrained(tmp_path / "trunk", wanted, seed=0)
    assert texts.fresh == {"classifier.out_proj.weight", "classifier.out_proj.bias"}  # the pooler is there
    pooler = trunk.pooler.dense.weight
    assert torch.equal(texts.value("classifier.dense.weight", tuple(pooler.shape), torch.float32), pooler)

    transformers.BertForPreTraining(config).save_pretrained(tmp_path / "pretraining")
    both = Pretrained(tmp_path / "pretraining")  # next-sentence head and pooler are left alone
    assert not both.fresh
    transformers.BertForTokenClassification(config).save_pretrained(tmp_path / "tokens")
    two = replace(load_config(tmp_path / "tokens"), head=HeadSpec("sequence", ("a", "b")))
    assert {name.split(".")[0] for name in Pretrained(tmp_path / "tokens", two, seed=0).fresh} == {"classifier"}
    assert len(Pretrained(tmp_path / "tokens", two, seed=0).fresh) == 4  # same names there, other meaning


def test_a_folder_that_transformers_saved_under_another_head_is_read_as_that(tmp_path: Path) -> None:
    """transformers carries our description of the first head along."""
    model = attach_head(build_model(CONFIGS["qwen2"], seed=1), SPECS["sequence"], seed=1).eval()
    save_pretrained(model, tmp_path / "ours")
    batch = batch_of()
    for kind, number in (("token", 5), ("sequence", 2), ("sequence", 1)):
        theirs = getattr(transformers, CLASSES[kind]).from_pretrained(
            tmp_path / "ours", num_labels=number, ignore_mismatched_sizes=True, attn_implementation="eager"
        )
        theirs.config.problem_type = None
        theirs.save_pretrained(tmp_path / f"{kind}{number}")
        again = load_pretrained(tmp_path / f"{kind}{number}")
        head = again.config.head
        assert head is not None
        assert (head.kind, len(head.labels)) == (kind, number)
        assert head.problem == ("regression" if number == 1 else "single_label"), "as transformers trains it"
        with torch.no_grad():
            ours, expected = again.scores(batch), outputs(theirs.eval(), batch)
        mask = batch["key_mask"] if kind == "token" else slice(None)
        assert (ours[mask] - expected[mask]).abs().max() < 1e-5
    words = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    words.save_pretrained(tmp_path / "words")
    again = load_pretrained(tmp_path / "words")
    assert again.config.head is None
    ids = batch["input_ids"][:1]
    with torch.no_grad():
        assert (again(ids) - words(input_ids=ids).logits).abs().max() < 1e-5


def test_a_strange_tensor_is_still_refused(language_model: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = language_model / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.extra.weight": torch.zeros(2)}, path)
    with pytest.raises(ModelError, match=r"unexpected: model\.extra\.weight"):
        load_pretrained(language_model)
    save_file({**tensors, "score.weight": torch.zeros(2, 64)}, path)
    with pytest.raises(ModelError, match=r"unexpected: score\.weight"):
        load_pretrained(language_model)
