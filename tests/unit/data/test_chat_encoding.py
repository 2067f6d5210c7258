"""Only what the assistant writes is trained, whatever the template, and serving begins where training begins."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from chat_examples import CALL, PLAIN_CHAT, QWEN3, QWEN3_TAGGED, STYLES, TAGGED, TOOLS, chat_tokenizer

from trainwright.base.errors import ConfigError, DataError
from trainwright.data.chat_encoding import ChatFormat, EncodedChat
from trainwright.data.chat_messages import plain_messages
from trainwright.data.chat_templates import TEMPLATES, choose_template, read_template, template_tokens, with_template
from trainwright.data.documents import SourceSpec
from trainwright.data.records import read_records
from trainwright.data.templates import CHATML_TEMPLATE, render_chat
from trainwright.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer

# What stands before and behind a message of the assistant and is learnt with it, by style.
WRITTEN = {
    "llama3": ("", "<|eot_id|>"),
    "mistral": (" ", "</s>"),
    "llama2": (" ", " </s>"),
    "gemma": ("", "<end_of_turn>"),
    "phi3": ("", "<|end|>"),
    "zephyr": ("", "</s>"),
    "qwen3": ("", "<|im_end|>"),
    "tagged": ("", "<|im_end|>"),
    "qwen3-tagged": ("", "<|im_end|>"),
    "role-prefix": (" ", "</s>"),
    "built-in-chatml": ("", "<|im_end|>"),
    "built-in-llama3": ("", "<|eot_id|>"),
    "built-in-zephyr": ("", "</s>"),
    "built-in-phi3": ("", "<|end|>"),
    "built-in-gemma": ("", "<end_of_turn>"),
    "built-in-mistral": (" ", "</s>"),
    "built-in-alpaca": ("", "</s>"),
    "built-in-vicuna": (" ", "</s>"),
    "built-in-plain": ("", "</s>"),
}


def pieces(chat: ChatFormat, encoded: EncodedChat) -> list[str]:
    """The trained stretches as text."""
    found: list[list[int]] = []
    before = False
    for token, trained in zip(encoded.ids.tolist(), encoded.trained.tolist(), strict=True):
        if trained and not before:
            found.append([])
        if trained:
            found[-1].append(token)
        before = trained
    return [chat.tokenizer.decode(ids, skip_special=False) for ids in found]


def trained_of(template: str, messages: list[dict[str, Any]], **options: Any) -> list[str]:
    tools = options.pop("tools", None)
    chat = ChatFormat(chat_tokenizer(template))
    return pieces(chat, chat.encode(chat.messages(messages), tools, **options))


def test_every_style_is_known_here() -> None:
    assert set(WRITTEN) == set(STYLES)


@pytest.mark.parametrize("style", STYLES)
def test_messages_of_the_assistant_and_ends_of_turns_are_trained_and_nothing_else(style: str) -> None:
    before, behind = WRITTEN[style]
    expected = [before + PLAIN_CHAT[i]["content"] + behind for i in (1, 3)]
    if style.startswith("qwen3"):
        expected[1] = "<think>\n\n</think>\n\n" + expected[1]  # the template writes an empty thought before the last
    assert trained_of(STYLES[style], PLAIN_CHAT) == expected
    assert trained_of(STYLES[style], PLAIN_CHAT, train_on="last") == expected[1:]
    (everything,) = trained_of(STYLES[style], PLAIN_CHAT, train_on="all")
    assert PLAIN_CHAT[0]["content"] in everything


@pytest.mark.parametrize("style", STYLES)
def test_ids_are_those_of_the_whole_text_tokenised_once(style: str) -> None:
    chat = ChatFormat(chat_tokenizer(STYLES[style]))
    text = chat.tokenizer.render_chat(PLAIN_CHAT)
    assert chat.encode(chat.messages(PLAIN_CHAT)).ids.tolist() == chat.tokenizer.encode(text)


@pytest.mark.parametrize("style", STYLES)
def test_a_prompt_of_serving_is_what_stands_before_the_trained_tokens(style: str) -> None:
    """The same ids, token by token: what a model is asked with is what it was trained behind."""
    chat = ChatFormat(chat_tokenizer(STYLES[style]))
    for turns in (2, 4):
        messages = chat.messages(PLAIN_CHAT[:turns])
        encoded = chat.encode(messages, train_on="last")
        first = encoded.trained.tolist().index(True)
        assert chat.prompt(messages[:-1]) == encoded.ids[:first].tolist()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "answer", ["", " ", "你", "😀", "\n\nHi\n", "Hello, how are you?", "{}<b>&amp;</b>", "a" * 300]
)
def test_odd_answers(style: str, answer: str) -> None:
    """Empty and white, one character of several tokens, the same text as the question, markup, a long word."""
    chat = [PLAIN_CHAT[0], {"role": "assistant", "content": answer}]
    (trained,) = trained_of(STYLES[style], chat)
    _, behind = WRITTEN[style]
    assert trained.endswith(behind)
    written = trained.removesuffix(behind).replace("<think>\n\n</think>\n\n", "")
    assert written.strip() == answer.strip()


def test_the_end_token_is_trained_and_ends_an_answer_in_every_style() -> None:
    for style, template in STYLES.items():
        chat = ChatFormat(chat_tokenizer(template))
        token = chat.tokenizer.token(chat.end_ids[0])
        assert token == WRITTEN[style][1].strip()
        assert set(chat.end_ids) <= set(chat.stop_ids)
        encoded = chat.encode(chat.messages(PLAIN_CHAT))
        assert chat.end_ids[0] in encoded.ids[encoded.trained]


def test_thoughts_that_the_template_leaves_out_of_history_are_not_unlearnt() -> None:
    """Qwen3 writes only the latest thoughts. An older message without its thought is not what the model wrote then."""
    messages = [
        PLAIN_CHAT[0],
        {"role": "assistant", "content": "<think>\nold thought\n</think>\n\nAnswer one"},
        PLAIN_CHAT[2],
        {"role": "assistant", "content": "<think>\nnew thought\n</think>\n\nAnswer two"},
    ]
    assert trained_of(QWEN3, messages) == ["<think>\nnew thought\n</think>\n\nAnswer two<|im_end|>"]
    chat = ChatFormat(chat_tokenizer(QWEN3))
    assert chat.encode(messages).rewritten == 1
    assert chat.encode(messages[:2]).rewritten == 0


def test_thoughts_in_a_field_of_their_own() -> None:
    """DeepSeek and Qwen3 files keep thoughts apart from contents; templates without them are not to blame."""
    reading = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
        "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    chat = [{**m, "reasoning_content": "想"} if m["role"] == "assistant" else m for m in PLAIN_CHAT]
    last = PLAIN_CHAT[3]["content"] + "<|im_end|>"
    assert trained_of(reading, chat) == ["<think>想</think>" + last]
    assert trained_of(CHATML_TEMPLATE, chat) == [PLAIN_CHAT[1]["content"] + "<|im_end|>", last]


TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "北京的天气?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"weather": "sunny <|not special|>"}'},
    {"role": "assistant", "content": "Sunny."},
]


@pytest.mark.parametrize(
    "template", [QWEN3, QWEN3_TAGGED, TEMPLATES["chatml"]], ids=["qwen3", "qwen3-tagged", "chatml"]
)
def test_tool_calls_are_trained_and_what_tools_answer_is_not(template: str) -> None:
    call, answer = trained_of(template, TOOL_CHAT, tools=TOOLS)
    call = call.removeprefix("<think>\n\n</think>\n\n")
    assert call.startswith("<tool_call>\n")
    assert call.endswith("\n</tool_call><|im_end|>")
    assert json.loads(call.removeprefix("<tool_call>\n").partition("\n</tool_call>")[0]) == CALL["function"]
    assert answer.endswith("Sunny.<|im_end|>")
    chat = ChatFormat(chat_tokenizer(template))
    encoded = chat.encode(chat.messages(TOOL_CHAT[:2]), TOOLS)
    assert (
        chat.prompt(chat.messages(TOOL_CHAT[:1]), TOOLS) == encoded.ids[: encoded.trained.tolist().index(True)].tolist()
    )


def test_arguments_of_calls_that_are_json_text_are_written_as_objects() -> None:
    as_text = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "北京"}'}}
    chat = [TOOL_CHAT[0], {"role": "assistant", "content": None, "tool_calls": [as_text]}]
    assert trained_of(TEMPLATES["chatml"], chat) == trained_of(TEMPLATES["chatml"], TOOL_CHAT[:2])


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ({"name": "add", "arguments": '{"a": 1}'}, {"name": "add", "arguments": {"a": 1}}),
        ({"name": "add", "parameters": {"a": "一"}}, {"name": "add", "arguments": {"a": "一"}}),
        ({"function": {"name": "add", "arguments": None}}, {"name": "add", "arguments": {}}),
        ({"type": "function", "function": {"name": "add", "arguments": ""}}, {"name": "add", "arguments": {}}),
        ({"name": "add", "arguments": "a=1"}, {"name": "add", "arguments": "a=1"}),
        ({"name": "add", "arguments": "[" * 100_000}, {"name": "add", "arguments": "[" * 100_000}),
        ({"index": 0, "id": "c1", "function": {"name": "add"}}, {"name": "add", "arguments": {}}),
    ],
)
def test_a_call_is_the_same_in_a_chat_as_in_a_record(
    written: dict[str, Any], plain: dict[str, Any], tmp_path: Path
) -> None:
    """What is answered is what was trained on: both get their calls in one form."""
    expected = {**({"id": "c1"} if "id" in written else {}), "type": "function", "function": plain}
    chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "", "tool_calls": [written]}]
    assert plain_messages(chat)[1]["tool_calls"] == [expected]
    assert plain_messages([{**chat[1], "tool_calls": written}])[0]["tool_calls"] == [expected]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}), encoding="utf-8")
    (record,) = read_records(SourceSpec(str(tmp_path / "a.jsonl")), "messages")
    assert record.fields["messages"] == plain_messages(chat)
    assert plain_messages(plain_messages(chat)) == plain_messages(chat)


@pytest.mark.parametrize("style", ["llama3", "zephyr", "built-in-gemma"])
def test_templates_without_a_place_for_tools_are_refused(style: str) -> None:
    with pytest.raises(DataError, match=r"does not show the tool|no place for"):
        trained_of(STYLES[style], PLAIN_CHAT, tools=TOOLS)


def test_a_template_that_drops_a_call_is_refused() -> None:
    with pytest.raises(DataError, match="leaves out the assistant's call of 'get_weather'"):
        trained_of(CHATML_TEMPLATE, [*TOOL_CHAT[:2]])


def test_messages_of_weight_0_are_not_trained() -> None:
    chat = [PLAIN_CHAT[0], {**PLAIN_CHAT[1], "weight": 0}, *PLAIN_CHAT[2:]]
    assert trained_of(CHATML_TEMPLATE, chat) == [PLAIN_CHAT[3]["content"] + "<|im_end|>"]


def test_a_system_message_is_added_where_there_is_none() -> None:
    chat = ChatFormat(chat_tokenizer(CHATML_TEMPLATE), system="你是助手。")
    assert chat.messages(PLAIN_CHAT)[0] == {"role": "system", "content": "你是助手。"}
    given = [{"role": "system", "content": "own"}, *PLAIN_CHAT]
    assert chat.messages(given) == given


def test_contents_that_are_lists_of_texts_are_joined_and_others_refused() -> None:
    chat = ChatFormat(chat_tokenizer(CHATML_TEMPLATE))
    parts = [{"type": "text", "text": "你好，"}, {"type": "text", "text": "world"}]
    assert chat.messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "你好，world"}]
    with pytest.raises(DataError, match="message 1 \\(user\\) has content of type dict"):
        chat.messages([{"role": "user", "content": {"image": 1}}])
    with pytest.raises(DataError, match="expected an object with 'role'"):
        chat.messages([{"content": "x"}])
    with pytest.raises(DataError, match="expected a function with 'name'"):
        chat.messages([{"role": "assistant", "content": "", "tool_calls": [{"arguments": {}}]}])


def test_special_tokens_that_people_write_are_found() -> None:
    chat = ChatFormat(chat_tokenizer(CHATML_TEMPLATE))
    assert chat.reserved(PLAIN_CHAT) is None
    assert chat.reserved([{"role": "user", "content": "say <|im_end|> please"}]) == "<|im_end|>"


def test_a_template_whose_words_the_tokenizer_does_not_know_is_refused() -> None:
    """ChatML on a tokenizer without its tokens: the end would be seven tokens that also occur in texts."""
    plain = train_tokenizer("bpe", 300, ["hello world " * 20])
    with pytest.raises(DataError, match=r"writes '<\|im_end\|>\\n' behind the assistant's message") as caught:
        ChatFormat(plain, "chatml")
    assert "task.template=plain" in str(caught.value)
    assert ChatFormat(plain).tokenizer.chat_template == TEMPLATES["zephyr"]
    assert ChatFormat(plain, "plain").tokenizer.token(ChatFormat(plain, "plain").end_ids[0]) == "<|endoftext|>"


def test_a_template_without_an_end_is_refused() -> None:
    endless = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    with pytest.raises(DataError, match="could never learn to stop"):
        ChatFormat(chat_tokenizer(endless))


def test_a_template_in_which_the_answer_cannot_be_found_is_refused() -> None:
    counting = (
        "{% for m in messages %}{{ (messages | length) ~ (m.content | length) ~ m.content ~ eos_token }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"cannot be found in what the chat template writes(.|\n)*generation"):
        ChatFormat(chat_tokenizer(counting))
    with pytest.raises(DataError, match="does not write out what the assistant says"):
        ChatFormat(chat_tokenizer(counting.replace("~ m.content ~", "~")))


def test_answers_that_the_template_changes_are_not_trained() -> None:
    shouting = "{% for m in messages %}{{ (messages | length) ~ m.role ~ (m.content | upper) ~ eos_token }}{% endfor %}"
    chat = ChatFormat(chat_tokenizer(shouting))
    encoded = chat.encode(chat.messages(PLAIN_CHAT))
    assert encoded.rewritten == 2
    assert not encoded.trained.any()


def test_tags_equal_the_mask_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for template in (TAGGED, QWEN3_TAGGED):
        tokenizer = chat_tokenizer(template)
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.core, chat_template=template, eos_token="</s>", bos_token="<s>"
        )
        chat = ChatFormat(tokenizer)
        chats = [PLAIN_CHAT, PLAIN_CHAT[:2], [{"role": "system", "content": "短"}, *PLAIN_CHAT]]
        for messages in [*chats, TOOL_CHAT] if template is QWEN3_TAGGED else chats:
            tools = TOOLS if messages is TOOL_CHAT else None
            mine = chat.encode(chat.messages(messages), tools)
            other = theirs.apply_chat_template(
                messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            assert sum(other["assistant_masks"]) > 5
            assert mine.ids.tolist() == list(other["input_ids"])
            assert mine.trained.astype(int).tolist() == list(other["assistant_masks"])


def test_tags_and_marks_agree() -> None:
    """The same template with and without tags: found by the tags, or by prompts and marks."""
    without = TAGGED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer = chat_tokenizer()
    tagged, marked = ChatFormat(tokenizer, TAGGED), ChatFormat(tokenizer, without)
    messages = tagged.messages(PLAIN_CHAT)
    assert tagged.encode(messages).trained.tolist() == marked.encode(messages).trained.tolist()


def test_tags_without_the_end_of_turn_get_it() -> None:
    """A model that never learns the token behind its answers never stops."""
    narrow = TAGGED.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}",
        "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\\n' }}",
    )
    assert narrow != TAGGED.replace("x", "x")
    tokenizer = chat_tokenizer()
    messages = ChatFormat(tokenizer, TAGGED).messages(PLAIN_CHAT)
    wide = ChatFormat(tokenizer, TAGGED).encode(messages)
    assert ChatFormat(tokenizer, narrow).encode(messages).trained.tolist() == wide.trained.tolist()


def test_a_token_over_the_border_of_the_prompt_belongs_to_the_answer() -> None:
    """`assistant: ` + `Hello` is tokenised as `assistant`, `:`, ` Hello`: serving must stop before the space."""
    tokenizer = train_tokenizer("bpe", 600, ["assistant: Hello there user: Hello A The I H a " * 20], special=["</s>"])
    chat = ChatFormat(tokenizer, STYLES["role-prefix"])
    messages = chat.messages([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello there"}])
    encoded = chat.encode(messages)
    first = encoded.trained.tolist().index(True)
    assert tokenizer.decode([int(encoded.ids[first])]) == " Hello"
    prompt = chat.prompt(messages[:1])
    assert prompt == encoded.ids[:first].tolist()
    assert tokenizer.decode(prompt).endswith("assistant:")


def test_the_template_travels_with_the_tokenizer(tmp_path: Path) -> None:
    chat = ChatFormat(chat_tokenizer(), "zephyr")
    chat.tokenizer.save(tmp_path)
    again = ChatFormat(load_tokenizer(tmp_path))
    assert again.tokenizer.chat_template == TEMPLATES["zephyr"]
    messages = again.messages(PLAIN_CHAT)
    assert again.prompt(messages[:3]) == chat.prompt(messages[:3])
    text = again.tokenizer.render_chat(PLAIN_CHAT[:3], add_generation_prompt=True)  # what `chat` and servers call
    assert again.tokenizer.encode(text) == chat.prompt(messages[:3])


def test_formats_cross_processes() -> None:
    chat = ChatFormat(chat_tokenizer(QWEN3))
    again = pickle.loads(pickle.dumps(chat))
    assert again.encode(PLAIN_CHAT).ids.tolist() == chat.encode(PLAIN_CHAT).ids.tolist()


def test_templates_by_name_file_and_text(tmp_path: Path) -> None:
    file = tmp_path / "模板.jinja"
    file.write_text("{{ messages[0].content }}你", encoding="utf-8")
    assert read_template(str(file)) == "{{ messages[0].content }}你"
    assert read_template("{{ x }}") == "{{ x }}"
    assert read_template("gemma") == TEMPLATES["gemma"]
    with pytest.raises(ConfigError, match=r"no chat template is called 'lama3'.*Did you mean 'llama3'"):
        read_template("lama3")
    tokenizer = train_tokenizer("bpe", 300, ["hello world " * 20])
    own = with_template(tokenizer, "{{ own }}")
    assert choose_template("auto", own) == "{{ own }}"
    assert choose_template("plain", own) == TEMPLATES["plain"]
    assert choose_template("auto", None) == TEMPLATES["chatml"]
    assert choose_template("auto", tokenizer) == TEMPLATES["zephyr"]


def test_the_built_in_chatml_is_the_one_of_the_tokenizers() -> None:
    chat = [{"role": "system", "content": "s"}, *PLAIN_CHAT]
    for prompt in (False, True):
        assert render_chat(TEMPLATES["chatml"], chat, add_generation_prompt=prompt) == render_chat(
            CHATML_TEMPLATE, chat, add_generation_prompt=prompt
        )


def test_tokens_that_a_template_writes() -> None:
    assert template_tokens(TEMPLATES["chatml"]) == ("<|im_end|>", "<|im_start|>")
    assert template_tokens(TEMPLATES["gemma"]) == ("<end_of_turn>", "<start_of_turn>")
    assert template_tokens(STYLES["phi3"]) == ("<|assistant|>", "<|end|>", "<|system|>", "<|user|>")
    assert template_tokens(TEMPLATES["plain"]) == ()


def test_a_tokenizer_without_change_stays_the_same_object() -> None:
    tokenizer = chat_tokenizer(TEMPLATES["plain"])
    assert with_template(tokenizer, "plain") is tokenizer
    assert with_template(tokenizer, "auto") is tokenizer


@pytest.mark.parametrize("name", ["glaive_toolcall_en_demo.json", "glaive_toolcall_zh_demo.json"])
def test_real_conversations_with_tools(name: str, shared_data: Any) -> None:
    """Every trained stretch of real conversations is exactly what their assistant says or calls."""
    rows = json.loads(shared_data(f"llamafactory_demo/{name}").read_text(encoding="utf-8"))[:60]
    tokenizer = Tokenizer(chat_tokenizer().core, special=chat_tokenizer().special)
    chat = ChatFormat(tokenizer, "chatml")
    calls = 0
    for row in rows:
        messages, tools = from_sharegpt(row)
        encoded = chat.encode(chat.messages(messages), tools)
        expected = [message for message in messages if message["role"] == "assistant"]
        found = pieces(chat, encoded)
        assert len(found) == len(expected)
        for text, message in zip(found, expected, strict=True):
            if message.get("tool_calls"):
                calls += 1
                body = text.removeprefix("<tool_call>\n").partition("\n</tool_call>")[0]
                assert json.loads(body) == message["tool_calls"][0]["function"]
            else:
                assert text == message["content"] + "<|im_end|>"
    assert calls > 10


def from_sharegpt(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    roles = {"human": "user", "gpt": "assistant", "observation": "tool"}
    messages: list[dict[str, Any]] = []
    for turn in row["conversations"]:
        if turn["from"] == "function_call":
            function = json.loads(turn["value"])
            call = {"type": "function", "function": {"name": function["name"], "arguments": function["arguments"]}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        else:
            messages.append({"role": roles[turn["from"]], "content": turn["value"]})
    tools = json.loads(row["tools"]) if row.get("tools") else None
    return messages, tools or None
