"""Chat templates: messages become the text that a model was trained on, and common rows become messages.

The dialect is the one of `transformers` (Jinja with trim_blocks and lstrip_blocks, `tojson`, `raise_exception`,
`strftime_now`, loop controls), so a template gives the same text here and there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2

from trainwright.base.errors import DataError
from trainwright.data.template_sandbox import ChatEnvironment, budget, check_total

__all__ = ["CHATML_TEMPLATE", "messages_of", "render_chat", "row_renderer"]

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, for tokenizers that bring no template of their own."""

MAX_TEMPLATE = 200_000  # characters; the longest published templates have about 20,000
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


@lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    if len(template) > MAX_TEMPLATE:
        raise DataError(f"the chat template has {len(template):,} characters; the limit is {MAX_TEMPLATE:,}")
    try:
        return ChatEnvironment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(
            f"the chat template is not valid Jinja: line {error.lineno}: {error.message}",
            hint="mend chat_template in tokenizer_config.json (or chat_template.jinja)",
        ) from error
    except RecursionError as error:
        raise DataError("the chat template is nested too deeply") from error


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """Render messages by a Jinja template. `tools` are JSON schemas; `variables` are bos_token, eos_token and the like.

    Raises DataError when the template is malformed, refuses the messages, tries what the sandbox forbids, or takes more
    time or text than a conversation needs.
    """
    values = {name: _plain(value) for name, value in variables.items()}
    pieces: list[str] = []
    length = 0
    try:
        compiled = _compiled(template)
        with budget():
            for piece in compiled.generate(
                messages=_plain(messages),
                tools=_plain(tools),
                documents=_plain(documents),
                add_generation_prompt=add_generation_prompt,
                **values,
            ):
                pieces.append(piece)
                length += len(piece)
                check_total(length)
    except jinja2.exceptions.SecurityError as error:
        raise DataError(
            f"the chat template is refused: {error}",
            hint="use a template that you trust; this one does what no chat template needs to do",
        ) from error
    except jinja2.TemplateError as error:
        raise DataError(
            f"the chat template cannot render these messages: {error}",
            hint="check the order of the roles and the fields that the template reads",
        ) from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, MemoryError) as error:
        raise DataError(
            f"the chat template failed: {type(error).__name__}: {error}",
            hint="each message is an object with 'role' and 'content'; see which fields the template reads",
        ) from error
    return "".join(pieces)


def _plain(value: Any) -> Any:
    """JSON values only: an object with methods could do what the sandbox knows nothing of."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    raise DataError(
        f"a chat holds a value of type {type(value).__name__}; expected text, numbers, lists and objects",
        hint="pass messages as JSON values",
    )


def messages_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The messages of a chat-like row, None when it is none.

    Known shapes: `messages` (role, content), ShareGPT `conversations` (from, value), Alpaca (instruction, input,
    output; also system and history) and pairs (prompt or question or instruction, with response, completion or answer).
    """
    chat = row.get("messages") or row.get("conversations")
    if isinstance(chat, list) and chat and all(isinstance(item, Mapping) for item in chat):
        return _chat_messages(chat, row)
    if isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        return _alpaca_messages(row)
    for question in ("prompt", "question", "instruction"):
        for answer in ("response", "completion", "answer"):
            if isinstance(row.get(question), str) and isinstance(row.get(answer), str):
                return [_message("user", row[question]), _message("assistant", row[answer])]
    return None


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _chat_messages(chat: list[Mapping[str, Any]], row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    messages: list[dict[str, Any]] = []
    if isinstance(row.get("system"), str) and row["system"]:
        messages.append(_message("system", row["system"]))
    for item in chat:
        if "role" in item:
            messages.append(dict(item))
        elif isinstance(item.get("from"), str) and isinstance(item.get("value"), str):
            messages.append(_message(_SHAREGPT_ROLES.get(item["from"], item["from"]), item["value"]))
        else:
            return None
    return messages


def _alpaca_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if isinstance(row.get("system"), str) and row["system"]:
        messages.append(_message("system", row["system"]))
    for turn in row.get("history") or ():
        messages += [_message("user", turn[0]), _message("assistant", turn[1])]
    extra = row.get("input")
    prompt = f"{row['instruction']}\n{extra}" if isinstance(extra, str) and extra else row["instruction"]
    return [*messages, _message("user", prompt), _message("assistant", row["output"])]


def row_renderer(template: str = CHATML_TEMPLATE, **variables: Any) -> Callable[[Mapping[str, Any]], str | None]:
    """A `render` for `read_shard`: rows of known chat shapes become text by the template; others give None."""

    def render(row: Mapping[str, Any]) -> str | None:
        messages = messages_of(row)
        return None if messages is None else render_chat(template, messages, **variables)

    return render
