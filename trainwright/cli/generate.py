"""`trainwright generate RUN|MODEL --prompt TEXT`"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainwright.base.errors import ConfigError
from trainwright.cli import sampling

if TYPE_CHECKING:
    from trainwright.inference import GenerationOptions, Generator

__all__ = ["generate"]


def generate(
    model: sampling.Model,
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given again. Else stdin.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Continuations of each prompt.")] = 1,
    max_new_tokens: sampling.MaxNewTokens = None,
    temperature: sampling.Temperature = None,
    top_k: sampling.TopK = None,
    top_p: sampling.TopP = None,
    min_p: sampling.MinP = None,
    repetition_penalty: sampling.RepetitionPenalty = None,
    seed: sampling.Seed = None,
    stop: sampling.Stop = None,
    device: sampling.Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per continuation.")] = False,
    root: sampling.Root = Path("runs"),
) -> None:
    """Continue texts with a trained model."""
    prompts = prompt or [_from_stdin()]
    generator = sampling.open_generator(model, root, device)
    options = sampling.chosen_options(
        generator,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop) if stop else None,
    )
    wanted = [text for text in prompts for _ in range(samples)]
    if len(wanted) == 1 and not as_json:
        _stream(generator, wanted[0], options)
    else:
        _write_all(generator, wanted, options, as_json)


def _from_stdin() -> str:
    if sys.stdin.isatty():
        raise ConfigError("no prompt", hint="give --prompt 'text', or send text on standard input")
    return sys.stdin.read()


def _stream(generator: Generator, prompt: str, options: GenerationOptions) -> None:
    print(prompt, end="", flush=True)
    for piece in generator.stream(prompt, options):
        print(piece, end="", flush=True)
    print()


def _write_all(generator: Generator, prompts: list[str], options: GenerationOptions, as_json: bool) -> None:
    for number, (prompt, result) in enumerate(zip(prompts, generator.generate(prompts, options), strict=True), 1):
        if as_json:
            record = {
                "prompt": prompt,
                "text": result.text,
                "prompt_tokens": result.prompt_tokens,
                "new_tokens": len(result.token_ids),
                "finish_reason": result.finish_reason,
            }
            print(json.dumps(record, ensure_ascii=False))
        else:
            print(f"--- {number} of {len(prompts)}\n{prompt}{result.text}")
