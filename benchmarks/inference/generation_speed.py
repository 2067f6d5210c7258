"""Tokens per second of greedy decoding with a key/value cache, against `transformers.generate` on the same weights.

    python benchmarks/inference/generation_speed.py [--preset llama-34m] [--prompt 40] [--new 128] [--rounds 3]

Rounds alternate ours, theirs; the medians are shown. No end token, so both write the same number of tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import tokenizers
import torch
import transformers

from trainwright.data import Tokenizer
from trainwright.inference import GenerationOptions, Generator
from trainwright.models import build_model, load_pretrained, preset, save_pretrained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-34m")
    parser.add_argument("--prompt", type=int, default=40, help="tokens per prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens to write")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    # As many words as the model has ids: a smaller tokenizer would make our output head smaller.
    words = {f"w{index}": index for index in range(preset(given.preset).vocab_size)}
    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(build_model(preset(given.preset)), folder)
        for dtype in (torch.float32, torch.bfloat16):
            generator = Generator(load_pretrained(folder, dtype=dtype, device=given.device), tokenizer)
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(given.device).eval()
            for rows in (1, 8):
                compare(generator, theirs, rows, given)


def compare(generator: Generator, theirs: transformers.PreTrainedModel, rows: int, given: argparse.Namespace) -> None:
    """Print one line: dtype, rows, tokens per second of both."""
    prompts = [[1 + index % 300 for index in range(given.prompt)] for _ in range(rows)]
    tokens = torch.tensor(prompts, device=given.device)
    options = GenerationOptions(max_new_tokens=given.new, temperature=0.0, eos_ids=())

    def run_theirs() -> None:
        theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=given.new,
            min_new_tokens=given.new,
            do_sample=False,
        )

    runs: tuple[Callable[[], object], ...] = (lambda: generator.generate(prompts, options), run_theirs)
    seconds: list[list[float]] = [[], []]
    for _ in range(given.rounds + 1):
        for index, run in enumerate(runs):
            started = time.perf_counter()
            run()
            seconds[index].append(time.perf_counter() - started)
    ours, other = (rows * given.new / statistics.median(each[1:]) for each in seconds)
    dtype = str(generator.model.embedding.weight.dtype).removeprefix("torch.")
    print(f"{dtype:>9} {rows:>2} prompts: ours {ours:6.0f}  transformers {other:6.0f}  ratio {ours / other:.2f}")


if __name__ == "__main__":
    main()
