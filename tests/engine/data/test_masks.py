"""Masks: what is learned of a row, on every style of chat template, and nothing else."""

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.examples import Example
from engine.data.masks import Masker
from engine.errors import DataError
from engine.text.chat import render
from engine.text.renderer import Renderer
from engine.text.settings import Settings
from engine.text.tokenizer import Tokenizer
from tests.engine.text.chats import TEMPLATES, TOOLS, ChatTokenizer, called, peer, said
from tests.engine.text.conftest import NOW
from tests.engine.text.published import llama2, mistral

ENDS = {
    "chatml": "<|im_end|>",
    "llama2": "</s>",
    "llama3": "<|eot_id|>",
    "llama31": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "qwen25": "<|im_end|>",
    "zephyr": "</s>",
    "olmo2": "<|endoftext|>",
    "marked": "<|im_end|>",
    "parts": "<|end|>",
    "mistral": "</s>",
    "phi3": "<|end|>",
}
TALK = said("Hi there", "Hello!", "And you?", "Fine, thanks.")


@pytest.fixture(scope="module")
def renderer():
    with Renderer() as process:
        yield process


@pytest.fixture(scope="module")
def styled(tokenizer):
    """Return a function that makes a tokenizer with one of the templates.

    It stops where the published one does: Phi-3 at <|end|> too, which its template writes.
    """

    @functools.cache
    def made(name):
        own = ChatTokenizer(tokenizer.inner, *TEMPLATES[name])
        end = own.inner.token_to_id(ENDS.get(name, "<|im_end|>"))
        own.ends = own.ends | {end}
        return own

    return made


@pytest.fixture(scope="module")
def mask(styled, renderer):
    """Return a function that masks messages, or an example, with one of the templates."""

    def call(name, messages=None, learn="answers", chat="auto", **fields):
        if messages is not None:
            fields |= {"kind": "messages", "messages": tuple(messages)}
        masker = Masker(styled(name), chat, learn, renderer, NOW)
        return masker.mask(Example(where="x:1", **fields))

    return call


def texts(tokenizer, masked):
    """The texts of the learned stretches."""
    edges = np.flatnonzero(np.diff(masked.learned, prepend=False, append=False))
    return [tokenizer.decode(masked.ids[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("name", ENDS)
def test_both_answers_of_two_turns_are_learned_with_their_ends(mask, styled, name):
    """Exact counts, three changes after the first answer begins; mlx-lm learned the last alone."""
    tokenizer, end = styled(name), ENDS[name]
    masked = mask(name, TALK)
    found = [text.replace(" ", "") for text in texts(tokenizer, masked)]  # Llama 2 writes some
    assert found == [f"Hello!{end}", f"Fine,thanks.{end}"]
    assert masked.learned.sum() == sum(map(len, masked.answers))
    tail = len(masked.ids) - masked.answers[-1].stop  # a line end, with some templates
    changes = np.count_nonzero(np.diff(masked.learned))
    assert changes == 3 + (tail > 0)
    assert not masked.learned[0] and masked.learned[len(masked.ids) - tail - 1]


@pytest.mark.parametrize("name", [name for name in ENDS if name != "marked"])
def test_ids_up_to_an_answer_are_those_at_inference(mask, styled, renderer, name):
    """For every style, for both answers: what the model is asked is what it learned to answer.

    `marked` is left out: it writes a tail after the messages, and the prompt after that.
    """
    tokenizer = styled(name)
    masked = mask(name, TALK)
    for number, answer in zip((1, 3), masked.answers, strict=True):
        asked = render(TALK[:number], tokenizer, renderer=renderer, now=NOW)
        assert masked.ids[: answer.start].tolist() == asked.ids


@pytest.mark.parametrize("name", ENDS)
def test_content_that_spells_control_tokens_yields_none(mask, styled, name):
    """The same control tokens in the same order as with harmless content, and it is counted."""
    tokenizer = styled(name)
    evil = f"a {ENDS[name]} b <|im_end|> c"

    def controls(masked):
        return [tokenizer.special[i] for i in masked.ids.tolist() if i in tokenizer.special]

    harmless, hostile = (
        mask(name, said("Hi", "x", "y", "z")),
        mask(name, said(evil, evil, "y", evil)),
    )
    assert controls(hostile) == controls(harmless)
    assert (hostile.lookalike, harmless.lookalike) == (True, False)
    assert all("<|im_end|> c" in text for text in texts(tokenizer, hostile))


def test_the_mask_is_that_of_transformers(mask, styled):
    """Where a template marks its answers, theirs is an implementation to compare with."""
    theirs = peer(styled("marked")).apply_chat_template(
        TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    masked = mask("marked", TALK)
    assert masked.ids.tolist() == theirs["input_ids"]
    assert masked.learned.astype(int).tolist() == theirs["assistant_masks"]
    shifted = np.roll(theirs["assistant_masks"], 1).tolist()
    assert masked.learned.astype(int).tolist() != shifted  # the control


def test_what_to_learn(mask, styled):
    def learned(**options):
        return texts(styled("chatml"), mask("chatml", TALK, **options))

    both = ["Hello!<|im_end|>", "Fine, thanks.<|im_end|>"]
    assert learned() == both
    assert learned(learn="last") == both[1:]
    (everything,) = learned(learn="all")
    assert everything == styled("chatml").decode(mask("chatml", TALK).ids[1:])
    # What a message says of itself comes first.
    assert learned(learned=(None, False, None, None)) == both[1:]
    assert learned(learned=(None, True, None, False)) == both[:1]
    assert learned(learned=(None, True, None, None), learn="last") == both
    assert learned(learned=(None, None, None, True), learn="last") == both[1:]
    assert "Hello!" not in "".join(learned(learned=(None, False, None, None), learn="all"))
    assert learned(learned=(False, None, False, None)) == both


def test_only_answers_can_be_chosen(mask):
    with pytest.raises(DataError, match="message 1 is not the assistant's"):
        mask("chatml", TALK, learned=(True, None, None, None))
    with pytest.raises(DataError, match="message 3 is not the assistant's"):
        mask("chatml", TALK, learned=(None, None, False, None), learn="all")


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"messages": said("Hi")}, "chatml"),
        ({"messages": TALK, "learned": (None, False, None, False)}, "chatml"),
        ({"kind": "text"}, "chatml"),
        ({"kind": "tokens", "ids": (1, 2, 3), "mask": (True, False, False)}, "chatml"),
        ({"kind": "tokens"}, "chatml"),
    ],
)
def test_nothing_to_learn_is_an_error(mask, fields, name):
    """Elsewhere the loss is 0, or NaN, and the run looks fine."""
    with pytest.raises(DataError, match="nothing in it is to be learned"):
        mask(name, **fields)


def test_a_template_that_rewrites_earlier_turns_is_refused_but_for_the_last(mask, styled):
    """Qwen 3 drops the thoughts of earlier turns: with them, its prompts do not begin the whole."""
    thoughts = said("1+1?", "<think>hm</think>2", "2+2?", "<think>hm</think>4")
    with pytest.raises(DataError, match="cannot be proved.*; data.learn=last learns only the last"):
        mask("qwen3", thoughts)
    found = texts(styled("qwen3"), mask("qwen3", thoughts, learn="last"))
    assert found == ["<think>\nhm\n</think>\n\n4<|im_end|>"]
    only = mask("qwen3", thoughts, learned=(None, False, None, None))
    assert texts(styled("qwen3"), only) == found


def test_an_opening_that_only_the_prompt_has_is_refused(mask):
    """DeepSeek's prompt opens a thought that the template leaves out of the conversation."""
    with pytest.raises(DataError, match="answer of message 2 cannot be proved"):
        mask("deepseek", said("Hi", "Hello!"))


PRESERVING = "{% for m in messages %}{{ '<s>' + m.role + m.content + '</s>' }}{% endfor %}"
PRESERVING += "{% if add_generation_prompt %}<s>assistant{% endif %}"
REWRITING = PRESERVING.replace("m.content", "(m.content if loop.last else '-')")


@pytest.mark.parametrize(("template", "provable"), [(PRESERVING, True), (REWRITING, False)])
def test_which_templates_keep_what_came_before(tokenizer, renderer, template, provable):
    """One that is and one that is not how its own continuation begins."""
    own = ChatTokenizer(tokenizer.inner, template, {"eos_token": "</s>"})
    masker = Masker(own, "auto", "answers", renderer, NOW)
    example = Example(where="x:1", kind="messages", messages=tuple(TALK))
    if provable:
        assert texts(own, masker.mask(example)) == ["Hello!</s>", "Fine, thanks.</s>"]
    else:
        with pytest.raises(DataError, match="answer of message 2 cannot be proved"):
            masker.mask(example)


def test_an_end_that_the_marks_leave_out_is_learned_too(tokenizer, renderer):
    template = PRESERVING.replace(
        "m.content + '</s>'", "''}}{% generation %}{{ m.content }}{% endgeneration %}{{ '</s>'"
    )
    own = ChatTokenizer(tokenizer.inner, template, {"eos_token": "</s>"})
    masker = Masker(own, "auto", "last", renderer, NOW)
    masked = masker.mask(Example(where="x:1", kind="messages", messages=tuple(TALK)))
    assert texts(own, masked) == ["Fine, thanks.</s>"]
    own = ChatTokenizer(tokenizer.inner, template, {"eos_token": "<unk>"})  # not where it stops
    masked = Masker(own, "auto", "last", renderer, NOW).mask(
        Example(where="x:1", kind="messages", messages=tuple(TALK))
    )
    assert texts(own, masked) == ["Fine, thanks."]


def test_a_call_is_learned_and_what_the_tool_says_is_not(mask, styled):
    talk = called({"place": "Kiel", "days": 2})
    call, told = texts(styled("qwen25"), mask("qwen25", talk, tools=tuple(TOOLS)))
    assert '"name": "weather"' in call and call.endswith("</tool_call><|im_end|>")
    assert told.startswith("12 °C") and "°C" not in call


def test_a_prompt_is_a_conversation_if_there_is_a_template(mask, styled):
    fields = {"kind": "prompt", "prompt": "Hi", "completion": "Hello!"}
    talk = mask("chatml", said("Hi", "Hello!"))
    for chat in ("auto", "template"):
        assert mask("chatml", chat=chat, **fields).ids.tolist() == talk.ids.tolist()
    plain = mask("chatml", chat="plain", **fields)
    assert styled("chatml").decode(plain.ids) == "HiHello!<|endoftext|>"
    assert texts(styled("chatml"), plain) == ["Hello!<|endoftext|>"]


def plain(tokenizer, learn="answers", chat="auto", **fields):
    return Masker(tokenizer, chat, learn).mask(Example(where="x:1", **fields))


@given(prompt=st.text(max_size=20), completion=st.text(min_size=1, max_size=20))
def test_prompt_and_completion_share_no_token(tokenizer, prompt, completion):
    """Encoded apart: no boundary to guess, even where encoding both at once would join them."""
    masked = plain(tokenizer, kind="prompt", prompt=prompt, completion=completion)
    (answer,) = masked.answers
    assert masked.ids[: answer.start].tolist() == tokenizer.encode(prompt)
    assert tokenizer.decode(masked.ids) == prompt + completion + "<|endoftext|>"
    assert masked.learned.tolist() == [0 < i >= answer.start for i in range(len(masked.ids))]
    assert masked.ids[-1] == tokenizer.end_of_text and masked.learned[-1]


def test_a_token_across_the_border_would_be_there_otherwise(tokenizer):
    word = max(filter(str.isalpha, (tokenizer.decode([i]) for i in range(400))), key=len)
    masked = plain(tokenizer, kind="prompt", prompt=word[:1], completion=word[1:])
    assert tokenizer.encode(word) != masked.ids[:-1].tolist()
    assert masked.ids[0] == tokenizer.encode(word[:1])[0]


@pytest.mark.parametrize("made", [llama2, mistral])
def test_a_completion_gets_no_space_of_its_own(made):
    """SentencePiece puts a space before every text; one that goes on with another has none."""
    own = Tokenizer(made(), Settings(raw={"eos_token": "</s>"}))
    masked = plain(own, kind="prompt", prompt="un", completion="til now")
    assert own.decode(masked.ids).removeprefix("<s>").strip() == "until now</s>"
    alone = own.encode("til now")
    assert own.piece(alone[0]).startswith(b" ")  # the control


def test_a_text_is_learned_from_its_second_token_on(tokenizer):
    masked = plain(tokenizer, kind="text", text="def f():")
    assert masked.ids.tolist() == [*tokenizer.encode("def f():"), tokenizer.end_of_text]
    assert masked.learned.tolist() == [False] + [True] * (len(masked.ids) - 1)


def test_what_begins_every_text_begins_a_row_once(tokenizer):
    own = ChatTokenizer(tokenizer.inner, None, {}, "<s>", add_bos=True)
    for fields in (
        {"kind": "text", "text": "<s>a b"},
        {"kind": "prompt", "prompt": "<s>", "completion": "a b"},
        {"kind": "prompt", "completion": "<s>a b"},
    ):
        masked = plain(own, **fields)
        assert masked.ids.tolist().count(own.bos) == 1 == masked.bos
        assert masked.ids[0] == own.bos and not masked.learned[0] and masked.lookalike
        assert own.decode(masked.ids[1:]) == "<s>a b<|endoftext|>"
    assert masked.learned.tolist() == [False] + [True] * (len(masked.ids) - 1)


def test_given_tokens_are_taken_as_they_are(tokenizer):
    """TRL's mask [0, 0, 1, 1] over [1, 2, 3, 4] is labels [-100, -100, 3, 4]."""
    masked = plain(tokenizer, kind="tokens", ids=(1, 2, 3, 4), mask=(False, False, True, True))
    labels = np.where(masked.learned, masked.ids, -100)
    assert labels.tolist() == [-100, -100, 3, 4] and masked.answers == [range(2, 4)]
    bare = plain(tokenizer, kind="tokens", ids=(1, 2, 3))
    assert bare.learned.tolist() == [False, True, True]
    parts = (True, True, False, True, False, False, True)
    masked = plain(tokenizer, kind="tokens", ids=tuple(range(7)), mask=parts)
    assert masked.answers == [range(1, 2), range(3, 4), range(6, 7)]
    with pytest.raises(DataError, match=r"token id 400 is outside 0 … 399"):
        plain(tokenizer, kind="tokens", ids=(1, 400))
    with pytest.raises(DataError, match="3 ids but a mask, or labels, of 2"):
        plain(tokenizer, kind="tokens", ids=(1, 2, 3), mask=(True, True))


def test_all_of_a_prompt_can_be_learned(tokenizer):
    masked = plain(tokenizer, learn="all", kind="prompt", prompt="a b", completion="c")
    assert masked.learned.tolist() == [False] + [True] * (len(masked.ids) - 1)


@pytest.mark.parametrize("chat", ["auto", "template", "plain"])
def test_a_conversation_needs_a_template(tokenizer, chat):
    with pytest.raises(DataError, match="needs a chat template, which this checkpoint has not"):
        plain(tokenizer, chat=chat, kind="messages", messages=tuple(TALK))


def test_a_template_that_fails_is_an_error_of_the_row(tokenizer, renderer):
    own = ChatTokenizer(tokenizer.inner, "{{ 1 / 0 }}")
    with pytest.raises(DataError, match="cannot be used: line 1: division by zero"):
        Masker(own, "auto", "answers", renderer).mask(
            Example(where="x:1", kind="messages", messages=tuple(TALK))
        )


def test_no_process_is_started_without_a_template(tokenizer, monkeypatch):
    monkeypatch.setattr(Renderer, "__init__", None)
    plain(tokenizer, kind="text", text="a")


def test_the_process_it_starts_is_ended(styled):
    with Masker(styled("chatml"), "auto", "answers") as masker:
        masker.mask(Example(where="x:1", kind="messages", messages=tuple(TALK)))
        process = masker._renderer._process
    assert process.returncode is not None


def test_one_clock_for_all_rows(styled, renderer):
    """Llama 3.1 writes the day into its prompt: samples made over midnight are still alike."""
    masker = Masker(styled("llama31"), "auto", "answers", renderer)
    ids = [
        masker.mask(Example(where="x:1", kind="messages", messages=tuple(TALK))).ids.tolist()
        for _ in range(2)
    ]
    assert ids[0] == ids[1] and masker.now is not None


def test_an_answer_that_begins_with_white_space_is_encoded_apart(styled, renderer):
    """Regression: line ends of template and answer became one token, and the row was refused.

    The ids up to the answer are those at inference; text and end are as they were.
    """
    own = styled("chatml")
    for answer in ("\nHello", "\n\n  x\n", " y"):
        talk = said("Hi there", answer, "And?", answer)
        with Masker(own, "template", "answers", renderer, NOW) as masker:
            row = masker.mask(Example(where="x:1", kind="messages", messages=tuple(talk)))
        assert len(row.answers) == 2
        for number, place in zip((1, 3), row.answers, strict=True):
            prompt = render(talk[:number], own, renderer=renderer, now=NOW).ids
            if number == 1:
                assert row.ids[: place.start].tolist() == prompt
            spelled = own.decode(row.ids[place.start : place.stop - 1].tolist())
            assert spelled == answer and int(row.ids[place.stop - 1]) in own.ends


def test_a_template_that_fails_names_the_row(styled, renderer):
    own = styled("llama31")
    broken = Example(
        where="x:7", kind="messages", messages=({"role": "assistant", "content": "y"},)
    )
    masker = Masker(own, "template", "answers", renderer, NOW)
    with pytest.raises(DataError, match="message 1 is an answer to nothing"):
        masker.mask(broken)
