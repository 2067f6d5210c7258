"""`trainwright chat RUN|MODEL`: a conversation in the terminal, through the model's own chat template."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainwright.base.errors import ModelError
from trainwright.cli import sampling

if TYPE_CHECKING:
    from trainwright.inference import ChatSession

__all__ = ["chat"]

HELP = "/reset begins anew, /exit ends, Ctrl-C stops an answer"


def chat(
    model: sampling.Model,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_new_tokens: sampling.MaxNewTokens = 512,
    temperature: sampling.Temperature = None,
    top_k: sampling.TopK = None,
    top_p: sampling.TopP = None,
    min_p: sampling.MinP = None,
    repetition_penalty: sampling.RepetitionPenalty = None,
    seed: sampling.Seed = None,
    device: sampling.Device = "auto",
    root: sampling.Root = Path("runs"),
) -> None:
    """Talk with a model that has a chat template."""
    generator = sampling.open_generator(model, root, device)
    if not generator.tokenizer.chat_template:
        raise ModelError(
            f"{model} has no chat template: it was not trained to talk",
            hint=f"trainwright generate {model} --prompt '...' continues texts",
        )
    from trainwright.inference import ChatSession

    options = sampling.chosen_options(
        generator,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    _converse(ChatSession(generator, system=system, options=options))


def _converse(session: ChatSession) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/reset":
            session.reset()
        elif line == "/help":
            print(HELP)
        elif line:
            _answer(session, line)


def _answer(session: ChatSession, line: str) -> None:
    forgotten = session.forgotten
    try:
        for piece in session.stream(line):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped; the message and its answer are forgotten]", end="")
    except ModelError as error:
        # A message that does not fit is no reason to lose the conversation.
        print(f"error: {error}", file=sys.stderr, end="")
    print()
    if session.forgotten > forgotten:
        print(f"[the model no longer sees the oldest {session.forgotten} messages]")
