"""Chat templates render as in transformers, and one that would harm or hang the process is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from trainwright.base.errors import DataError, TrainwrightError
from trainwright.data import template_sandbox
from trainwright.data.records.chat import messages_of
from trainwright.data.templates import CHATML_TEMPLATE, render_chat, row_renderer
from trainwright.data.tokenizers import Tokenizer, train_tokenizer

CHAT = [
    {"role": "system", "content": "You are helpful. 你是助手。"},
    {"role": "user", "content": '  What\'s 2+2? <b>&"quoted"</b>\n'},
    {"role": "assistant", "content": "4 😀"},
    {"role": "user", "content": "谢谢"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "查天气 & more",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]

# Written for these tests after the manner of published models: the same features, not their text.
TEMPLATES = {
    "chatml": CHATML_TEMPLATE,
    "llama2-like": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
        "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
        "{% for message in loop_messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if loop.index0 == 0 %}{% set content = system + message['content'] %}"
        "{% else %}{% set content = message['content'] %}{% endif %}"
        "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama3-like": (
        "{% set ns = namespace(count=0) %}\n"
        "{{- bos_token }}\n"
        "{%- for message in messages %}\n"
        "    {%- set ns.count = ns.count + 1 %}\n"
        "    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' }}\n"
        "    {{- message.content | trim ~ '<|eot_id|>' }}\n"
        "    {%- if loop.last and ns.count > 3 %}{{ '(' ~ ns.count ~ '/' ~ loop.length ~ ')' }}{% endif %}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}\n"
    ),
    "tools-like": (
        "{%- macro show(tool, depth=0) -%}\n"
        "{{ tool.function.name ~ ': ' ~ (tool | tojson) }}\n"
        "{%- endmacro -%}\n"
        "{%- if tools %}\n"
        "    {{- '<tools>' }}\n"
        "    {%- for tool in tools %}\n"
        "        {{- '\\n' }}{{ show(tool) }}\n"
        "        {{- tool | tojson(indent=2) }}\n"
        "    {%- endfor %}\n"
        "    {{- '\\n</tools>\\n' }}\n"
        "{%- endif %}\n"
        "{%- for message in messages[::-1] if message.role != 'system' %}\n"
        "    {%- if loop.index > 5 %}{% break %}{% endif %}\n"
        "    {%- if message.role == 'assistant' %}\n"
        "{% generation %}{{ message.content.split('\\n') | join('|') | upper }}{% endgeneration %}\n"
        "    {%- elif message is defined and message.content is string %}\n"
        "        {{- message.role.title() + ': ' + message.content.replace('谢', '感') + '; ' }}\n"
        "    {%- else %}{% continue %}{% endif %}\n"
        "{%- endfor %}\n"
        "{{ {'a': [1, 2.5, none, true]} | tojson }} {{ messages | length }} {{ ['x'] * 3 }}\n"
        "{{ '%s-%03d' % ('a', 7) }} {{ '{:>5}|{}'.format('r', 2) }} {{ 'abc' | center(9) }}\n"
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | tojson }}\n"
        "{{ undefined_thing | default('nothing') }}{{ missing }}\n"
    ),
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    transformers = pytest.importorskip("transformers")
    core = train_tokenizer("bpe", 300, ["x"], special=["<s>", "</s>"]).core
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_equals_transformers(theirs: Any, name: str, prompt: bool, tools: Any) -> None:
    expected = theirs.apply_chat_template(
        CHAT, chat_template=TEMPLATES[name], tools=tools, add_generation_prompt=prompt, tokenize=False
    )
    ours = render_chat(
        TEMPLATES[name], CHAT, tools=tools, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
    )
    assert ours == expected
    assert "谢" in ours or "感" in ours


def test_chatml_and_the_tokenizer_s_own_method() -> None:
    tokenizer = train_tokenizer("bpe", 300, ["x"])
    assert tokenizer.render_chat(CHAT[-1:], add_generation_prompt=True) == (
        "<|im_start|>user\n谢谢<|im_end|>\n<|im_start|>assistant\n"
    )
    own = Tokenizer(tokenizer.core, special=tokenizer.special, chat_template="{{ eos_token }}{{ flag }}")
    assert own.render_chat([], flag="!") == "<|endoftext|>!"


def test_strftime_now() -> None:
    assert render_chat("{{ strftime_now('%Y') }}", []) == time.strftime("%Y")


def test_what_goes_wrong_is_told() -> None:
    with pytest.raises(DataError, match="cannot render these messages: roles must alternate"):
        render_chat(TEMPLATES["llama2-like"], [CHAT[1], CHAT[1]], bos_token="<s>", eos_token="</s>")
    with pytest.raises(DataError, match="not valid Jinja: line 2"):
        render_chat("{{ ok }}\n{% for %}", CHAT)
    with pytest.raises(DataError, match="value of type object"):
        render_chat("{{ messages }}", [{"role": "user", "content": object()}])
    with pytest.raises(DataError, match="failed"):
        render_chat("{{ messages[0].content + 1 }}", CHAT)
    with pytest.raises(DataError, match="cannot render these messages"):
        render_chat(CHATML_TEMPLATE, [{"role": "user"}])
    with pytest.raises(DataError, match="the limit is 200,000"):
        render_chat("x" * 200_001, CHAT)


def _doubling(step: str) -> str:
    return "{% set ns = namespace(x='ab') %}{% for i in range(60) %}" + step + "{% endfor %}"


MALICIOUS = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__.x }}",
    "hoarding": "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}"
    "{% set ns.x = ns.x + ['a' * 9999999] %}{% endfor %}",
    "function internals": "{{ dict.__init__.__globals__ }}",
    "namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "import": "{% include '/etc/passwd' %}",
    "format string": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "environment": "{{ self.__init__.__globals__ }}{{ cycler.__init__.__globals__.os }}",
    "mutation": "{{ messages.append(1) }}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filter loops": "{% for a in range(99999) %}{% for b in range(99999) if false %}x{% endfor %}{% endfor %}",
    "range": "{% for a in range(10 ** 12) %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "branching": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for a in [1, 1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "repetition": "{{ 'a' * 10 ** 10 }}",
    "repetition reversed": "{{ 900000000 * 'a' }}",
    "list repetition": "{{ ([0] * 30000000) | length }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "product": "{% set ns = namespace(x=9) %}{% for i in [0] * 30 %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "doubling ~": _doubling("{% set ns.x = ns.x ~ ns.x %}"),
    "doubling ~ inside": _doubling("{% set ns.x = (ns.x ~ ns.x) | trim %}"),
    "doubling +": _doubling("{% set ns.x = ns.x + ns.x %}"),
    "doubling lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling join": _doubling("{% set ns.x = [ns.x, ns.x] | join %}"),
    "doubling by macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + _doubling("{% set ns.x = f(ns.x) %}"),
    "doubling by block": _doubling("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    "replace": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "replace method": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "join method": "{{ ('a' * 1000000).join(('b' * 1000000) | list) }}",
    "center": "{{ 'a' | center(10 ** 10) }}",
    "center folded": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "indent": "{{ ('a\\n' * 1000000) | indent(1000000) }}",
    "tabs": "{{ ('\\t' * 1000000).expandtabs(1000000) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "format width": "{{ '{:10000000000}'.format(1) }}",
    "format filter": "{{ '%10000000000d' | format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 1000000) }}",
    "json indent": "{{ [[[1]]] | tojson(indent=1000000000) }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 100000 }}{% endfor %}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "sum": "{% set l = [[1]] * 3000 %}{% for i in l %}{{ l | sum(start=[]) | length }}{% endfor %}{{ 1 // 0 }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_malicious_template_is_refused_soon_and_cheaply(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 100_000)
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 3.0)
    tracemalloc.start()
    started = time.monotonic()
    try:
        with pytest.raises(TrainwrightError):
            render_chat(MALICIOUS[name], CHAT)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started < 20
    assert peak < 1100 << 20


@pytest.mark.parametrize(
    "template", ["{{ '' | attr('__class__') }}", "{{ messages.__class__ }}", "{{ ''['__class__'] }}"]
)
def test_a_private_attribute_shows_nothing(template: str) -> None:
    assert render_chat(template, CHAT) == ""


def test_the_limits_leave_room() -> None:
    assert render_chat("{% for i in range(90000) %}{{ i % 10 }}{% endfor %}", []) == "0123456789" * 9000


def test_a_long_honest_conversation_is_rendered() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i} " * 200} for i in range(4000)]
    for name in ("chatml", "llama3-like"):
        text = render_chat(TEMPLATES[name], messages, bos_token="<s>")
        assert text.count("turn 3999") == 200


# ---- rows


def test_a_macro_may_write_the_large_numbers_of_a_call() -> None:
    template = (
        "{% macro value(item) %}{{ item | string }}{% endmacro %}"
        "{% for m in messages %}{% for name, item in m.arguments.items() %}{{ name + '=' + value(item) }}"
        "{% endfor %}{% endfor %}"
    )
    assert render_chat(template, [{"role": "assistant", "arguments": {"since": 1_700_000_000}}]) == "since=1700000000"
    widening = "{% macro wide(n) %}{{ 'x'.ljust(n) }}{% endmacro %}{{ wide(messages[0].n) }}"
    with pytest.raises(DataError, match="passes the number"):
        render_chat(widening, [{"role": "user", "n": 1_700_000_000}])


def test_known_row_shapes() -> None:
    assert messages_of({"messages": CHAT}) == CHAT
    assert messages_of({"instruction": "Do", "input": "", "output": "ok", "system": "S", "history": [["q", "a"]]}) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "Do"},
        {"role": "assistant", "content": "ok"},
    ]
    assert messages_of({"question": "1+1", "answer": "2"}) == [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
    ]
    for other in (
        {"text": "x"},
        {"messages": []},
        {"messages": ["x"]},
        {"conversations": [{"from": 1}]},
        {"prompt": "x"},
    ):
        assert messages_of(other) is None
        assert row_renderer()(other) is None


def test_a_row_of_an_unknown_role_keeps_it() -> None:
    row = {"conversations": [{"from": "critic", "value": "no"}, {"from": "observation", "value": "{}"}]}
    assert [message["role"] for message in messages_of(row) or []] == ["critic", "tool"]


@pytest.mark.parametrize(
    ("file", "turns"),
    [("alpaca_zh_demo.json", 2), ("glaive_toolcall_zh_demo.json", 2), ("identity.json", 2)],
)
def test_real_chat_files(shared_data: Any, file: str, turns: int) -> None:
    path: Path = shared_data(f"llamafactory_demo/{file}")
    rows = json.loads(path.read_text(encoding="utf-8"))
    render = row_renderer()
    for row in rows:
        messages = messages_of(row)
        assert messages is not None
        assert len(messages) >= turns
        text = render(row)
        assert text is not None
        assert text.count("<|im_start|>") == len(messages)
