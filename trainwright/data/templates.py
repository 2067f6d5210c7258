"""Chat templates: messages become the text that a model was trained on.

The dialect is the one of `transformers` (Jinja with trim_blocks and lstrip_blocks, `tojson`, `raise_exception`,
`strftime_now`, loop controls), so a template gives the same text here and there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2

from trainwright.base.errors import DataError
from trainwright.data.records.chat import messages_of
from trainwright.data.template_sandbox import ChatEnvironment, budget, check_total

__all__ = ["CHATML_TEMPLATE", "render_chat", "row_renderer"]

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, for tokenizers that bring no template of their own."""

MAX_TEMPLATE = 200_000  # characters; the longest published templates have about 20,000


@lru_cache(maxsize=64)
def _compiled(template: str, generation_marks: tuple[str, str] | None = None) -> jinja2.Template:
    if len(template) > MAX_TEMPLATE:
        raise DataError(f"the chat template has {len(template):,} characters; the limit is {MAX_TEMPLATE:,}")
    try:
        return ChatEnvironment(generation_marks).from_string(template)
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
    generation_marks: tuple[str, str] | None = None,
    **variables: Any,
) -> str:
    """Render messages by a Jinja template. `tools` are JSON schemas; `variables` are bos_token, eos_token and the like;
    `generation_marks` are written around what the template's `{% generation %}` tags enclose.

    Raises DataError when the template is malformed, refuses the messages, tries what the sandbox forbids, or takes more
    time or text than a conversation needs.
    """
    values = {name: _plain(value) for name, value in variables.items()}
    pieces: list[str] = []
    length = 0
    try:
        compiled = _compiled(template, generation_marks)
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


def row_renderer(template: str = CHATML_TEMPLATE, **variables: Any) -> Callable[[Mapping[str, Any]], str | None]:
    """A `render` for `read_shard`: rows of known chat shapes become text by the template; others give None."""

    def render(row: Mapping[str, Any]) -> str | None:
        messages = messages_of(row)
        return None if messages is None else render_chat(template, messages, **variables)

    return render
