"""Chat templates by name, and which template a tokenizer is used with.

The built-in ones write what the published models of these names read, as far as plain chats go; a model's own template
is always the better choice for that model. Every one ends an assistant's message with a token of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainwright.base.errors import ConfigError, DataError
from trainwright.base.text import did_you_mean
from trainwright.data.templates import render_chat
from trainwright.data.tokenizer_core import Tokenizer

__all__ = [
    "TEMPLATES",
    "choose_template",
    "read_template",
    "special_variables",
    "split_tokens",
    "template_tokens",
    "with_template",
]

_CHATML_TOOLS = (
    "{%- macro call(item) -%}"
    "{%- set f = item.function if item.function is defined else item -%}"
    "{{- '<tool_call>\\n' + ({'name': f.name, 'arguments': f.arguments} | tojson) + '\\n</tool_call>' -}}"
    "{%- endmacro -%}"
    "{%- set first = messages[0] if messages and messages[0].role == 'system' else none -%}"
    "{%- if tools -%}"
    "{{- '<|im_start|>system\\n' -}}"
    "{%- if first -%}{{- first.content + '\\n\\n' -}}{%- endif -%}"
    "{{- '# Tools\\n\\nThese functions can be called:\\n<tools>' -}}"
    "{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}"
    "{{- '\\n</tools>\\n\\nTo call one, write its name and arguments as JSON:\\n"
    '<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call><|im_end|>\\n\' -}}'
    "{%- elif first -%}"
    "{{- '<|im_start|>system\\n' + first.content + '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' and loop.first -%}"
    "{%- elif message.role == 'tool' -%}"
    "{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' -}}"
    "{%- elif message.tool_calls -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content -%}{{- message.content + '\\n' -}}{%- endif -%}"
    "{%- for item in message.tool_calls -%}{{- call(item) -}}{%- if not loop.last -%}{{- '\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- else -%}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

_NO_TOOLS = (
    "{%- if tools or message.role == 'tool' -%}{{- raise_exception('it has no place for tools') -}}{%- endif -%}"
)


def _turns(system: str, user: str, assistant: str, prompt: str, before: str = "") -> str:
    """A template without tools: Jinja expressions for each role and for the generation prompt, `before` comes first."""
    branches = "".join(
        f"{{%- {word} message.role == '{role}' -%}}{{{{- {expression} -}}}}"
        for word, role, expression in (
            ("if", "system", system),
            ("elif", "user", user),
            ("elif", "assistant", assistant),
        )
    )
    refuse = "{%- else -%}{{- raise_exception('it has no place for the role ' + message.role) -}}{%- endif -%}"
    loop = f"{{%- for message in messages -%}}{_NO_TOOLS}{branches}{refuse}{{%- endfor -%}}"
    return f"{before}{loop}{{%- if add_generation_prompt -%}}{{{{- {prompt} -}}}}{{%- endif -%}}"


_BOS = "{{- bos_token | default('', true) -}}"
_HEADER = "'<|start_header_id|>{}<|end_header_id|>\\n\\n'"

TEMPLATES: dict[str, str] = {
    "chatml": _CHATML_TOOLS,
    "llama3": _turns(
        _HEADER.format("system") + " + (message.content | trim) + '<|eot_id|>'",
        _HEADER.format("user") + " + (message.content | trim) + '<|eot_id|>'",
        _HEADER.format("assistant") + " + (message.content | trim) + '<|eot_id|>'",
        _HEADER.format("assistant"),
        _BOS,
    ),
    "zephyr": _turns(
        "'<|system|>\\n' + message.content + eos_token + '\\n'",
        "'<|user|>\\n' + message.content + eos_token + '\\n'",
        "'<|assistant|>\\n' + message.content + eos_token + '\\n'",
        "'<|assistant|>\\n'",
    ),
    "phi3": _turns(
        "'<|system|>\\n' + message.content + '<|end|>\\n'",
        "'<|user|>\\n' + message.content + '<|end|>\\n'",
        "'<|assistant|>\\n' + message.content + '<|end|>\\n'",
        "'<|assistant|>\\n'",
    ),
    "gemma": _turns(
        "raise_exception('it has no place for the role system')",
        "'<start_of_turn>user\\n' + (message.content | trim) + '<end_of_turn>\\n'",
        "'<start_of_turn>model\\n' + (message.content | trim) + '<end_of_turn>\\n'",
        "'<start_of_turn>model\\n'",
        _BOS,
    ),
    "mistral": _turns(
        "raise_exception('it has no place for the role system')",
        "'[INST] ' + message.content + ' [/INST]'",
        "' ' + (message.content | trim) + eos_token",
        "''",
        _BOS,
    ),
    "alpaca": _turns(
        "message.content + '\\n\\n'",
        "'### Instruction:\\n' + message.content + '\\n\\n'",
        "'### Response:\\n' + message.content + eos_token + '\\n\\n'",
        "'### Response:\\n'",
    ),
    "vicuna": _turns(
        "message.content + '\\n\\n'",
        "'USER: ' + message.content + '\\n'",
        "'ASSISTANT: ' + (message.content | trim) + eos_token + '\\n'",
        "'ASSISTANT:'",
    ),
    "plain": _turns(
        "message.content + '\\n'",
        "message.content + '\\n'",
        "message.content + eos_token + '\\n'",
        "''",
    ),
}
"""Name to Jinja source."""

_TOKEN = re.compile(r"<\|[^|<>\s'\"+]{1,40}\|>|<(?:start|end)_of_turn>|\[/?INST\]")
_PROBE = [{"role": role, "content": "."} for role in ("system", "user", "assistant")]


CHATML_END = "<|im_end|>"


def read_template(spec: str) -> str:
    """The Jinja source that a recipe names: a built-in name, a file, or the source itself (it has `{{` or `{%` in it).

    Raises ConfigError when it is none of these.
    """
    if spec in TEMPLATES:
        return TEMPLATES[spec]
    if "{{" in spec or "{%" in spec:
        return spec
    path = Path(spec)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    names = ", ".join(TEMPLATES)
    raise ConfigError(
        f"no chat template is called {spec!r}, and no such file is here.{did_you_mean(spec, list(TEMPLATES))}",
        hint=f"use auto, one of {names}, the path of a Jinja file, or the Jinja text itself",
    )


def choose_template(spec: str, tokenizer: Tokenizer | None) -> str:
    """The template to train with: what `spec` names; "auto" is the tokenizer's own, else ChatML where it has the tokens
    of that (one that is yet to be trained, None, gets them), else Zephyr's, which ends messages with the end of text.
    """
    if spec != "auto":
        return read_template(spec)
    if tokenizer is None:
        return TEMPLATES["chatml"]
    if tokenizer.chat_template:
        return tokenizer.chat_template
    knows = tokenizer.core.token_to_id(CHATML_END) is not None or tokenizer.eos_id is None
    return TEMPLATES["chatml" if knows else "zephyr"]


def template_tokens(template: str) -> tuple[str, ...]:
    """The special tokens that a template writes by itself, for a tokenizer that is yet to be trained, sorted.

    Tokens such as `<|im_end|>`, `<end_of_turn>` and `[INST]` count; words in angle brackets such as `<think>` do not:
    they are text.
    """
    texts = [template]
    for messages in (_PROBE, _PROBE[1:]):  # some templates refuse a system message
        try:
            texts.append(render_chat(template, messages, add_generation_prompt=True, bos_token="", eos_token=""))
            break
        except DataError:
            continue
    return tuple(sorted({token for text in texts for token in _TOKEN.findall(text)}))


def split_tokens(text: str, tokens: Sequence[str]) -> list[str]:
    """A text cut at special tokens, without these."""
    return re.split("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))), text) if tokens else [text]


def with_template(tokenizer: Tokenizer, spec: str) -> Tokenizer:
    """The tokenizer with the template that `spec` chooses as its own, so that it is saved and served with it."""
    template = choose_template(spec, tokenizer)
    if template == tokenizer.chat_template:
        return tokenizer
    return Tokenizer(
        tokenizer.core,
        special=tokenizer.special,
        chat_template=template,
        model_max_length=tokenizer.model_max_length,
    )


def special_variables(tokenizer: Tokenizer) -> Mapping[str, str]:
    """What templates call the tokenizer's special tokens: bos_token, eos_token, ..."""
    return {f"{role}_token": token for role, token in tokenizer.special.items()}
