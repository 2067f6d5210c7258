"""Chat sessions: the template decides what the model sees and where a turn ends."""

from __future__ import annotations

import pytest

from trainwright.base.errors import ModelError
from trainwright.data import Tokenizer
from trainwright.inference import ChatSession, GenerationOptions, Generator

OPTIONS = GenerationOptions(max_new_tokens=12, temperature=0.0, eos_ids=())
TEMPLATE = (
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}.{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


@pytest.fixture
def chat_generator(generator: Generator) -> Generator:
    plain = generator.tokenizer
    tokenizer = Tokenizer(plain.core, special=plain.special, chat_template=TEMPLATE)
    return Generator(generator.model, tokenizer)


def test_the_model_sees_the_rendered_conversation(chat_generator: Generator) -> None:
    session = ChatSession(chat_generator, system="be kind", options=OPTIONS)
    stop = OPTIONS.replace(eos_ids=tuple(chat_generator.tokenizer.encode(".")), overflow="stop")
    first = session.say("hello")
    assert first == chat_generator.generate(["[s]be kind.[u]hello.[a]"], stop)[0]
    second = session.say("你好")
    expected = chat_generator.generate([f"[s]be kind.[u]hello.[a]{first.text}.[u]你好.[a]"], stop)[0]
    assert second == expected
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert "." not in first.text + second.text, "the end of a turn is not shown"
    session.reset()
    assert session.say("hello") == first


def test_stream_gives_the_same_answer(chat_generator: Generator) -> None:
    session = ChatSession(chat_generator, options=OPTIONS)
    text = "".join(session.stream("hello"))
    assert session.messages[-1] == {"role": "assistant", "content": text}
    assert ChatSession(chat_generator, options=OPTIONS).say("hello").text == text


def test_abandoned_answer_is_not_kept(chat_generator: Generator) -> None:
    session = ChatSession(chat_generator, options=OPTIONS)
    stream = session.stream("hello")
    next(stream)
    stream.close()
    assert session.messages == []


def test_turn_end_of_several_tokens_is_a_stop_string(generator: Generator) -> None:
    plain = generator.tokenizer
    template = TEMPLATE.replace(".{% endfor %}", "<end>\n{% endfor %}")
    tokenizer = Tokenizer(plain.core, special=plain.special, chat_template=template)
    session = ChatSession(Generator(generator.model, tokenizer), options=OPTIONS)
    assert session._options().stop == ("<end>",)
    assert session._options().overflow == "stop"


def test_oldest_turns_are_forgotten_first(chat_generator: Generator) -> None:
    session = ChatSession(chat_generator, system="sys", options=OPTIONS)
    for _ in range(12):
        session.say("how are you today")
    assert session.forgotten > 0
    assert session.forgotten % 2 == 0
    assert len(session.messages) == 25
    with pytest.raises(ModelError, match="this message needs"):
        session.say("hello world " * 60)
    assert len(session.messages) == 25, "a refused message is not kept"
