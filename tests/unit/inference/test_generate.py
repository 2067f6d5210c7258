"""Generation: batches, streams, seeds, stops, limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trainwright.base.errors import ConfigError, ModelError
from trainwright.data import Tokenizer, train_tokenizer
from trainwright.inference import Generation, GenerationOptions, Generator, load_generator
from trainwright.models import Decoder, build_model, preset, save_pretrained

PROMPTS = ["hello", "你好，世界", "the quick brown fox jumps over the lazy dog", "a", "how are you"]
SAMPLED = GenerationOptions(max_new_tokens=24, temperature=0.9, top_k=50, top_p=0.95, seed=11, eos_ids=())
GREEDY = GenerationOptions(max_new_tokens=24, temperature=0.0, eos_ids=())


def naive_greedy(model: Decoder, ids: list[int], count: int) -> list[int]:
    """The definition: the whole text through the model for every token."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


def test_greedy_equals_the_definition(generator: Generator) -> None:
    for prompt, result in zip(PROMPTS, generator.generate(PROMPTS, GREEDY), strict=True):
        expected = naive_greedy(generator.model, generator.tokenizer.encode(prompt), 24)
        assert list(result.token_ids) == expected
        assert result.text == generator.tokenizer.decode(expected)
        assert result.finish_reason == "length"


@pytest.mark.parametrize("options", [SAMPLED, GREEDY, SAMPLED.replace(repetition_penalty=1.3, min_p=0.02, top_k=None)])
def test_batch_equals_one_by_one(generator: Generator, options: GenerationOptions) -> None:
    together = generator.generate(PROMPTS, options)
    alone = [generator.generate([prompt], options)[0] for prompt in PROMPTS]
    small_batches = Generator(generator.model, generator.tokenizer, batch_size=2).generate(PROMPTS, options)
    assert together == alone == small_batches


def test_rows_that_end_early_leave_the_others_alone(generator: Generator) -> None:
    lengths = [3, 24, 1, 10, 0]
    each = [SAMPLED.replace(max_new_tokens=length) for length in lengths]
    full = generator.generate(PROMPTS, SAMPLED)
    for result, whole, length in zip(generator.generate(PROMPTS, each), full, lengths, strict=True):
        assert result.token_ids == whole.token_ids[:length]


def test_seeds(generator: Generator) -> None:
    first, second = generator.generate(["hello", "hello"], SAMPLED)
    assert first != second, "the same prompt twice gives two samples"
    assert generator.generate(["a", "hello", "how are you", "hello"], SAMPLED)[1::2] == [first, second]
    assert generator.generate(["hello"], SAMPLED.replace(seed=12)) != [first]
    fresh = SAMPLED.replace(seed=None)
    assert generator.generate(["hello"], fresh) != generator.generate(["hello"], fresh)


def test_global_random_state_is_untouched(generator: Generator) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    generator.generate(["hello"], SAMPLED)
    assert torch.equal(torch.rand(4), expected)


def test_training_mode_is_restored(generator: Generator) -> None:
    generator.model.train()
    try:
        generator.generate(["hello"], SAMPLED)
        assert generator.model.training
        assert all(not value.requires_grad or value.grad is None for value in generator.model.parameters())
    finally:
        generator.model.eval()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_stream_is_the_text(generator: Generator, prompt: str) -> None:
    (whole,) = generator.generate([prompt], SAMPLED)
    pieces = []

    def consume() -> object:
        stream = generator.stream(prompt, SAMPLED)
        while True:
            try:
                pieces.append(next(stream))
            except StopIteration as end:
                return end.value

    assert consume() == whole
    assert "".join(pieces) == whole.text
    assert len(pieces) > 3


def scripted(tokenizer: Tokenizer, text: str) -> tuple[Generator, str]:
    """A generator that writes `text` after its first character: a model that knows one successor per position."""
    ids = tokenizer.encode(text)
    config = preset("gpt2-nano", vocab_size=tokenizer.vocab_size, max_position_embeddings=64, hidden_size=128)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        # Token embeddings are one-hot-like random directions; positions carry the next token's direction.
        directions = torch.nn.functional.normalize(
            torch.randn(tokenizer.vocab_size, 128, generator=torch.Generator().manual_seed(0)), dim=-1
        )
        model.transformer.wte.weight.copy_(directions)
        model.transformer.ln_f.weight.fill_(1.0)
        for position, following in enumerate(ids[1:]):
            model.transformer.wpe.weight[position] = 50 * directions[following]
    return Generator(model.eval(), tokenizer), tokenizer.decode(ids[:1])


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("hello world, how are you today?", (", how",), "hello world"),
        ("你好，世界。今天天气很好。", ("今天",), "你好，世界。"),
        ("a🙂b龘c end", ("龘",), "a🙂b"),
        ("one two three", ("nothing",), "one two three"),
    ],
)
def test_stop_strings_cross_token_borders(
    tokenizer: Tokenizer, text: str, stop: tuple[str, ...], expected: str
) -> None:
    generator, first = scripted(tokenizer, text)
    prompt = tokenizer.encode(text)[:1]
    count = len(tokenizer.encode(text)) - 1
    options = GREEDY.replace(stop=stop, max_new_tokens=count)
    (result,) = generator.generate([prompt], options)
    assert first + result.text == expected or "\ufffd" in first
    assert result.finish_reason == ("stop" if expected != text else "length")
    assert "".join(generator.stream(prompt, options)) == result.text
    for piece in generator.stream(prompt, options):
        assert "\ufffd" not in piece, "never half a character"


def test_eos_ends_the_text_and_is_not_shown(generator: Generator) -> None:
    (whole,) = generator.generate(["hello"], GREEDY)
    end = whole.token_ids[5]
    first = whole.token_ids.index(end)
    (result,) = generator.generate(["hello"], GREEDY.replace(eos_ids=(end,)))
    assert result.finish_reason == "eos"
    assert result.token_ids == whole.token_ids[: first + 1]
    assert result.text == generator.tokenizer.decode(whole.token_ids[:first])


def test_context_limit(generator: Generator) -> None:
    limit = generator.context_length
    options = GREEDY.replace(max_new_tokens=limit + 40)
    with pytest.raises(ModelError, match=f"context holds {limit}"):
        generator.generate(["hello"], options.replace(overflow="error"))
    ids = generator.tokenizer.encode("hello")
    exact = GREEDY.replace(max_new_tokens=limit + 1 - len(ids), overflow="error")
    assert generator.generate(["hello"], exact)[0].finish_reason == "length"
    (stopped,) = generator.generate(["hello"], options.replace(overflow="stop"))
    assert stopped.finish_reason == "context"
    assert len(stopped.token_ids) == limit + 1 - len(ids)
    (slid,) = generator.generate(["hello"], options)
    assert len(slid.token_ids) == limit + 40
    assert slid.token_ids[: len(stopped.token_ids)] == stopped.token_ids


def test_sliding_equals_its_definition(generator: Generator) -> None:
    """When the context is full, the newer half is the new context: as if generation began there."""
    limit, count = generator.context_length, 150
    (result,) = generator.generate(["hello"], GREEDY.replace(max_new_tokens=count))
    context, expected = generator.tokenizer.encode("hello"), []
    with torch.no_grad():
        for _ in range(count):
            if len(context) > limit:
                context = context[-(limit // 2) :]
            context.append(int(generator.model(torch.tensor([context]))[0, -1].argmax()))
            expected.append(context[-1])
    assert list(result.token_ids) == expected


def test_sliding_rows_do_not_depend_on_their_batch(generator: Generator) -> None:
    options = SAMPLED.replace(max_new_tokens=150)
    assert generator.generate(PROMPTS, options) == [generator.generate([prompt], options)[0] for prompt in PROMPTS]


def test_long_prompts_keep_their_end(generator: Generator) -> None:
    prompt = [5, 6, 7] * 200
    (result,) = generator.generate([prompt], GREEDY.replace(max_new_tokens=4))
    kept = prompt[-(generator.context_length - 4) :]
    assert list(result.token_ids) == naive_greedy(generator.model, kept, 4)
    assert result.prompt_tokens == 600
    with pytest.raises(ModelError, match="600 tokens"):
        generator.generate([prompt], GREEDY.replace(overflow="stop"))


def test_padded_vocabulary_is_never_chosen(tokenizer: Tokenizer) -> None:
    config = preset("llama-1m", vocab_size=tokenizer.vocab_size + 64, tie_embeddings=False)
    model = build_model(config)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.vocab_size :] = 100 * model.lm_head.weight[:64]
    results = Generator(model, tokenizer).generate(["hello"] * 4, SAMPLED)
    assert max(max(result.token_ids) for result in results) < tokenizer.vocab_size


def test_refusals(generator: Generator, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="list of prompts"):
        generator.generate("hello")
    with pytest.raises(ConfigError, match="2 prompts but 1 options"):
        generator.generate(["a", "b"], [GREEDY])
    with pytest.raises(ModelError, match="outside the model's vocabulary"):
        generator.generate([[1, 99999]], GREEDY)
    small = build_model(preset("llama-1m", vocab_size=tokenizer.vocab_size - 1))
    with pytest.raises(ModelError, match="the tokenizer has"):
        Generator(small, tokenizer)
    broken = build_model(preset("llama-1m", vocab_size=tokenizer.vocab_size))
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        Generator(broken, tokenizer).generate(["a"], GREEDY)


def test_empty_prompt_begins_a_document(generator: Generator) -> None:
    start = generator.tokenizer.bos_id if generator.tokenizer.bos_id is not None else generator.tokenizer.eos_id
    assert generator.generate([""], GREEDY)[0].token_ids == generator.generate([[start]], GREEDY)[0].token_ids
    letters = train_tokenizer("char", 64, ["abc def"])
    if letters.bos_id is None and letters.eos_id is None:
        model = build_model(preset("llama-1m", vocab_size=letters.vocab_size))
        with pytest.raises(ModelError, match="prompt is empty"):
            Generator(model, letters).generate([""], GREEDY)


def test_compiled_blocks_are_run_eagerly(tokenizer: Tokenizer) -> None:
    """A compiled model samples during training without compiling anew for every length."""
    model = build_model(preset("llama-1m", vocab_size=tokenizer.vocab_size))
    expected = Generator(model, tokenizer).generate(["hello"], GREEDY)
    compiled = 0

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        nonlocal compiled
        compiled += 1
        return graph.forward

    for block in model.blocks:
        block.compile(backend=backend, dynamic=False)
    assert Generator(model, tokenizer).generate(["hello"], GREEDY) == expected
    assert compiled == 0
    model(torch.zeros(1, 8, dtype=torch.long))
    assert compiled > 0, "the blocks are compiled outside of generation"


def test_bf16_and_autocast_generate(tokenizer: Tokenizer) -> None:
    config = preset("llama-1m", vocab_size=tokenizer.vocab_size)
    (low,) = Generator(build_model(config, dtype=torch.bfloat16), tokenizer).generate(["hello"], GREEDY)
    assert len(low.token_ids) == 24
    with torch.autocast("cpu", torch.bfloat16):
        (mixed,) = Generator(build_model(config), tokenizer).generate(["hello"], GREEDY)
    assert len(mixed.token_ids) == 24


class TestLoadGenerator:
    """Paths to generators."""

    def write(self, model: Decoder, tokenizer: Tokenizer, folder: Path) -> list[Generation]:
        tokenizer.save(folder)
        save_pretrained(model, folder)
        return Generator(model, tokenizer).generate(PROMPTS, GREEDY)

    def test_folder_and_finished_run(self, model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
        expected = self.write(model, tokenizer, tmp_path / "运行" / "model")
        for path in (tmp_path / "运行", tmp_path / "运行" / "model"):
            assert load_generator(path, device="cpu").generate(PROMPTS, GREEDY) == expected

    def test_generation_config_gives_the_defaults(self, model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
        self.write(model, tokenizer, tmp_path)
        values = {"do_sample": True, "temperature": 0.5, "top_k": 7, "eos_token_id": [3]}
        (tmp_path / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
        defaults = load_generator(tmp_path, device="cpu").defaults
        assert (defaults.temperature, defaults.top_k, defaults.eos_ids) == (0.5, 7, (3,))

    def test_unfinished_run_uses_its_newest_checkpoint(
        self, model: Decoder, tokenizer: Tokenizer, tmp_path: Path
    ) -> None:
        from trainwright.checkpoint import Checkpointer
        from trainwright.models.fields import config_fields

        tokenizer.save(tmp_path / "tokenizer")
        state = {"engine": {"model": dict(model.state_dict())}}
        checkpointer = Checkpointer(tmp_path / "checkpoints", asynchronous=False)
        checkpointer.save(3, state, {"model": config_fields(model.config)})
        expected = Generator(model, tokenizer).generate(PROMPTS, GREEDY)
        assert load_generator(tmp_path, device="cpu").generate(PROMPTS, GREEDY) == expected
        averages = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
        state["engine"]["ema"] = {"averages": averages}
        checkpointer.save(4, state, {"model": config_fields(model.config)})
        loaded = load_generator(tmp_path, device="cpu")
        assert not any(bool(value.any()) for value in loaded.model.parameters()), "averages are preferred"

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="holds neither"):
            load_generator(tmp_path)
        with pytest.raises(ModelError, match="is not a folder"):
            load_generator(tmp_path / "nowhere")
