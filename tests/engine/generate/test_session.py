"""A conversation over one cache says what a fresh start would say, and runs less."""

import dataclasses
from itertools import islice

import pytest

from engine.config import SampleConfig
from engine.errors import LimitError
from engine.generate.decode import generate, prefill
from engine.generate.prefixes import Prefixes
from engine.generate.reference import TorchDecoder
from engine.generate.session import Session
from engine.text.renderer import Renderer
from tests.conftest import make_model

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like templates that drop what earlier answers thought: the past changes between turns.
FORGETFUL = CHATML.replace(
    "{{ message.content }}",
    "{{ message.content if loop.last or message.role == 'user' else message.content[:3] }}",
)
GREEDY = SampleConfig(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def renderer():
    with Renderer() as process:
        yield process


@pytest.fixture
def chat(tokenizer, monkeypatch, renderer):
    """Make a session over a tiny model with some template."""

    def start(template: str = CHATML, settings: SampleConfig = GREEDY, **shape) -> Session:
        monkeypatch.setattr(tokenizer, "template", template)
        model = make_model(**({"max_seq_len": 512} | shape))
        return Session(TorchDecoder(model), tokenizer, settings, renderer)

    return start


def ask(session: Session, text: str, seed: int = 0) -> list[int]:
    session.messages.append({"role": "user", "content": text})
    return [token.id for token in session.answer(seed)]


def from_nothing(session: Session, seed: int = 0) -> list[int]:
    """Answer the same messages with a new cache."""
    ids = session.prompt().ids
    decoder = session.decoder
    start = prefill(decoder, ids, decoder.cache(session.context))
    settings = dataclasses.replace(session.settings, max_tokens=session.settings.max_tokens)
    return [t.id for t in generate(decoder, session.tokenizer, start, settings, seed=seed)]


@pytest.mark.parametrize("template", [CHATML, FORGETFUL], ids=["chatml", "forgetful"])
@pytest.mark.parametrize("shape", [{}, {"sliding_window": 8, "full_every": 2}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_turn_is_what_a_fresh_start_gives(chat, template, shape, temperature):
    session = chat(template, dataclasses.replace(GREEDY, temperature=temperature), **shape)
    for turn in range(4):
        session.messages.append({"role": "user", "content": f"message number {turn} of several"})
        expected = from_nothing(session, seed=turn)
        assert [token.id for token in session.answer(turn)] == expected


def test_a_second_turn_runs_only_what_is_new(chat):
    session = chat()
    ask(session, "a first message, long enough to be worth keeping")
    before = len(session.prompt().ids)
    ask(session, "b")
    assert session.reused > before // 2
    assert session.messages[-1]["role"] == "assistant"


def test_an_abandoned_answer_is_kept_as_far_as_it_came(chat):
    session = chat()
    session.messages.append({"role": "user", "content": "hello"})
    stream = session.answer(0)
    said = "".join(token.text for token in islice(stream, 3))
    stream.close()
    assert session.messages[-1] == {"role": "assistant", "content": said}
    session.messages.append({"role": "user", "content": "go on"})
    expected = from_nothing(session)
    assert [token.id for token in session.answer(0)] == expected


def test_taking_back_a_turn_is_as_if_it_had_not_been(chat):
    session = chat()
    ask(session, "one")
    kept = list(session.messages)
    ask(session, "two")
    session.messages[:] = kept
    assert ask(session, "three") == from_nothing(_without_answer(session))


def _without_answer(session: Session) -> Session:
    session.messages.pop()
    return session


def test_a_full_context_is_an_error_that_says_how_full(chat):
    session = chat(max_seq_len=64)
    session.messages.append({"role": "user", "content": "word " * 100})
    with pytest.raises(LimitError, match=r"of 64 tokens"):
        next(session.answer(0))


def test_an_answer_without_a_limit_ends_with_the_context(chat):
    session = chat(settings=SampleConfig(temperature=1.0, max_tokens=0), max_seq_len=96)
    answer = ask(session, "x", seed=3)
    assert answer[-1] in session.tokenizer.ends or len(answer) <= 96


def test_a_conversation_begins_with_what_another_had_read(chat, tmp_path):
    """The answers are the same; the second conversation takes its long beginning from the disk."""
    begin = {"role": "system", "content": "Be brief. " * 60}
    heard = []
    for kept in (None, Prefixes(tmp_path), Prefixes(tmp_path)):
        session = chat(max_seq_len=2048)
        session.decoder.identity = "tiny"
        session.prefixes = kept
        session.messages.append(begin)
        said = [(ask(session, text), session.restored) for text in ("hello", "and more")]
        heard.append(said)
    texts = [[text for text, _ in said] for said in heard]
    assert texts[0] == texts[1] == texts[2]
    restored = [[number for _, number in said] for said in heard]
    assert restored[:2] == [[0, 0], [0, 0]] and restored[2][0] >= 256 and restored[2][1] == 0


def test_where_bits_do_not_depend_on_cuts_every_turn_is_kept(chat, tmp_path, monkeypatch):
    """As with our own C: the next conversation finds the answers too."""
    monkeypatch.setattr(TorchDecoder, "grid", 1)
    session = chat(max_seq_len=2048)
    session.decoder.identity, session.prefixes = "tiny", Prefixes(tmp_path)
    for _ in range(3):
        ask(session, "hello " * 30)
    again = chat(max_seq_len=2048)
    again.decoder.identity, again.prefixes = "tiny", Prefixes(tmp_path)
    again.messages = list(session.messages[:-1])
    length = len(again.prompt().ids)
    for _ in again.answer(0):
        pass
    assert again.restored == again.reused == (length - 1) // 64 * 64
    assert again.messages[-1] == session.messages[-1]
