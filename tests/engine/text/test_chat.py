"""Chat: what transformers renders, and control tokens that only the template can write."""

import json
import subprocess
import sys
from datetime import datetime

import pytest

from engine.errors import CheckpointError, DataError
from engine.text.chat import check_messages, find_answers, ignores_system, render
from tests.conftest import ROOT
from tests.engine.text.chats import (
    CONVERSATIONS,
    SYSTEM,
    TEMPLATES,
    TOOLS,
    ChatTokenizer,
    peer,
    said,
)
from tests.engine.text.conftest import NOW

OPTIONS = {
    "prompt": {"add_generation_prompt": True},
    "whole": {"add_generation_prompt": False},
    "tools": {"add_generation_prompt": True, "tools": TOOLS},
    "variables": {
        "add_generation_prompt": True,
        "variables": {"enable_thinking": False, "date_string": "1 May 2020"},
    },
    "continue": {"add_generation_prompt": False, "continue_last": True},
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_ids_are_those_of_transformers(chat, name, monkeypatch):
    """Each template with each conversation and option; where theirs fails, so does ours."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return NOW

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)
    theirs = peer(chat.tokenizer(name))
    rendered = 0
    for title, messages in CONVERSATIONS.items():
        for option, chosen in OPTIONS.items():
            wanted = dict(chosen)
            wanted["continue_final_message"] = wanted.pop("continue_last", False)
            wanted |= wanted.pop("variables", {})
            try:
                text = theirs.apply_chat_template(messages, tokenize=False, **wanted)
            except Exception:  # noqa: BLE001 (jinja2's, ValueError, TypeError)
                with pytest.raises((CheckpointError, DataError)):
                    chat(name, messages, **chosen)
                continue
            ours = chat(name, messages, **chosen)
            assert ours.text == text, (title, option)
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert ours.ids == ids, (title, option)
            assert ours.kept_as_text == ()
            rendered += 1
    assert rendered >= 10


def test_a_checkpoint_without_a_template_says_so(chat):
    with pytest.raises(CheckpointError, match="no chat template; models tuned for conversation"):
        chat("", said("Hi"))


def test_no_messages_is_an_error(chat):
    with pytest.raises(DataError, match="no messages"):
        chat("chatml", [])


def test_a_rejected_conversation_is_the_users_error(chat):
    with pytest.raises(DataError, match="roles must alternate"):
        chat("llama2", [*said("Hi"), *said("Hi")])
    with pytest.raises(DataError, match="System role not supported"):
        chat("gemma", [SYSTEM, *said("Hi")])


def test_without_a_renderer_one_is_started_and_ended(tokenizer):
    own = ChatTokenizer(tokenizer.inner, *TEMPLATES["zephyr"])
    assert render(said("Hi"), own).text == "<|user|>\nHi</s>\n<|assistant|>\n"


@pytest.mark.parametrize(
    ("template", "bos", "add_bos", "text", "count"),
    [
        ("{{ bos_token }}x", "<s>", True, "<s>x", 1),
        ("x", "<s>", True, "x", 1),
        ("x", "<s>", False, "x", 0),
        ("{{ bos_token }}x", "<s>", False, "<s>x", 1),
        ("{{ bos_token }}x", None, True, "x", 0),
    ],
)
def test_at_most_one_bos(tokenizer, renderer, template, bos, add_bos, text, count):
    own = ChatTokenizer(tokenizer.inner, template, {}, bos, add_bos)
    rendered = render(said("Hi"), own, renderer=renderer)
    bos_id = own.inner.token_to_id("<s>")
    assert (rendered.text, rendered.ids.count(bos_id)) == (text, count)
    assert rendered.ids[0] == bos_id or not count


def test_a_bos_in_content_does_not_count_as_one(tokenizer, renderer):
    own = ChatTokenizer(tokenizer.inner, "{{ messages[0].content }}", {}, "<s>", add_bos=True)
    rendered = render(said("<s>x"), own, renderer=renderer)
    assert rendered.ids == [own.bos, *own.encode("<s>x")]


def test_the_clock_of_the_machine_is_the_default(tokenizer, renderer):
    own = ChatTokenizer(tokenizer.inner, "{{ strftime_now('%Y-%m-%d') }}")
    before = datetime.now().date()
    rendered = render(said("Hi"), own, renderer=renderer)
    assert rendered.text in (str(before), str(datetime.now().date()))


def test_variables_cannot_replace_the_conversation(chat):
    plain = chat("chatml", said("Hi"))
    assert chat("chatml", said("Hi"), variables={"messages": [], "x": 1}) == plain


def test_the_given_messages_are_left_as_they_are(chat):
    messages = [*said("Hi"), {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    copy = json.loads(json.dumps(messages))
    chat("parts", messages, continue_last=True)
    assert messages == copy


def test_a_message_is_continued_where_it_ends(chat):
    open_ended = chat("chatml", said("Hi", "It is <|im_end|> "), continue_last=True)
    assert open_ended.text.endswith("assistant\nIt is <|im_end|> ")
    assert open_ended.kept_as_text == ("<|im_end|>",)
    trimmed = chat("llama3", said("Hi", "It is "), continue_last=True)
    assert trimmed.text.endswith("\n\nIt is")
    with pytest.raises(DataError, match="leaves out or rewrites it"):
        chat("marked", [*said("Hi"), SYSTEM], continue_last=True)
    with pytest.raises(DataError, match="no text to continue"):
        chat("parts", said("Hi", None), continue_last=True)


def answers(chat, name, messages, **options):
    """The texts of the answers that are found, by their ids."""
    tokenizer = chat.tokenizer(name)
    options = {"renderer": chat.renderer, "now": NOW} | options
    rendered, places = find_answers(messages, tokenizer, **options)
    assert rendered == chat(name, messages, add_generation_prompt=False)
    return [tokenizer.decode(rendered.ids[place.start : place.stop]) for place in places]


TALK = said("Hi", "Hello <|im_end|>!", "And?", "Bye")


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("llama31", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("qwen25", "<|im_end|>"),
        ("zephyr", "</s>"),
        ("olmo2", "<|endoftext|>"),
        ("marked", "<|im_end|>"),
        ("parts", "<|end|>"),
    ],
)
def test_answers_are_found_with_their_ends(chat, name, end):
    assert answers(chat, name, TALK) == ["Hello <|im_end|>!" + end, "Bye" + end]
    assert answers(chat, name, TALK, last_only=True) == ["Bye" + end]
    assert answers(chat, name, said("Hi")) == []


def test_answers_hold_the_thoughts_and_calls_that_a_model_must_write(chat):
    call, told = answers(chat, "qwen25", CONVERSATIONS["called"])
    assert call.startswith('<tool_call>\n{"name": "weather", "arguments": {"place": "Kiel"')
    assert call.endswith("</tool_call><|im_end|>") and told.startswith("12 °C")
    thought = said("1+1?", "<think>\nhm\n</think>\n\n2")
    assert answers(chat, "qwen3", thought) == ["<think>\nhm\n</think>\n\n2<|im_end|>"]


def test_what_cannot_be_proved_is_refused(chat):
    """Qwen 3 drops the thoughts of earlier turns: their prompts are no part of the whole."""
    thoughts = said("1+1?", "<think>hm</think>2", "2+2?", "<think>hm</think>4")
    with pytest.raises(DataError, match="answer of message 2 cannot be proved"):
        answers(chat, "qwen3", thoughts)
    assert answers(chat, "qwen3", thoughts, last_only=True) == [
        "<think>\nhm\n</think>\n\n4<|im_end|>"
    ]
    with pytest.raises(DataError, match="message 1 is an answer to nothing"):
        answers(chat, "chatml", [{"role": "assistant", "content": "Hello"}, *said("Hi")])


def test_an_answer_ends_where_generation_stops(chat):
    """Phi-3 writes an end of text after the last turn only, which is no part of any answer."""
    own = ChatTokenizer(chat.tokenizer("phi3").inner, *TEMPLATES["phi3"])
    options = {"renderer": chat.renderer, "now": NOW}
    with pytest.raises(DataError, match="answer of message 2 cannot be proved"):
        find_answers(TALK, own, **options)
    own.ends |= {own.inner.token_to_id("<|end|>")}  # as its generation_config.json has it
    rendered, places = find_answers(TALK, own, **options)
    found = [own.decode(rendered.ids[place.start : place.stop]) for place in places]
    assert found == ["Hello <|im_end|>!<|end|>", "Bye<|end|>"]
    assert rendered.text.endswith("Bye<|end|>\n<|endoftext|>")


def test_no_token_goes_across_the_border(tokenizer, renderer):
    """`ab` is one token; where a prompt ends with `a`, both are encoded apart, as at inference."""
    own = ChatTokenizer(
        tokenizer.inner, "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    )
    word = max(filter(str.isalpha, (own.decode([i]) for i in range(400))), key=len)
    assert len(own.encode(word)) == 1 < len(word)
    own.template = word[0] + own.template
    rendered, [place] = find_answers(said(word[1:]), own, renderer=renderer)
    assert rendered.ids[: place.start] == own.encode(word[0])
    assert own.decode(rendered.ids[place.start :]) == word[1:]
    own.template = "\n<s>" + own.template[1:]
    rendered, [place] = find_answers(said(word[1:]), own, renderer=renderer)
    assert own.decode(rendered.ids[place.start : place.stop]) == word[1:]


def test_a_template_that_ignores_the_system_message_is_found_out(chat):
    def ignored(name, messages):
        return ignores_system(messages, chat.tokenizer(name), renderer=chat.renderer, now=NOW)

    messages = [SYSTEM, *said("Hi")]
    assert ignored("marked", messages)
    assert not ignored("chatml", messages)
    assert not ignored("marked", said("Hi"))
    assert not ignored("chatml", [SYSTEM])
    with pytest.raises(DataError, match="not supported"):
        ignored("gemma", messages)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"messages": m, "id": 7}])
def test_conversations_from_json(wrap):
    for title in CONVERSATIONS.keys() - {"no content"}:
        messages = CONVERSATIONS[title]
        assert check_messages(wrap(messages), "chat.json") == messages


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("Hi", 'chat.json: a conversation is a list of messages or an object with "messages"'),
        ({"prompt": "Hi"}, 'chat.json: a conversation is a list of messages or an object with "me'),
        ({"messages": None}, "chat.json: a conversation is a list"),
        ([], "chat.json: the conversation has no messages"),
        ([USER, "Hi"], 'chat.json: message 2 is not an object like {"role": "user"'),
        ([USER, USER, {"content": "x"}], 'chat.json: message 3 has no "role"'),
        ([{"from": "gpt", "value": "x"}], 'message 1 has no "role"; rename "from" and "value"'),
        ([{"role": 1, "content": "x"}], 'message 1 has a "role" that is not a word'),
        ([{"role": "", "content": "x"}], 'message 1 has a "role" that is not a word'),
        ([{"role": "user"}], 'message 1 has no "content"'),
        ([{"role": "user", "content": None, "name": None}], 'message 1 has no "content"'),
        ([{"role": "user", "content": 5}], 'has a "content" that is neither text nor a list'),
        ([{"role": "user", "content": ["Hi"]}], 'message 1 has a part of "content" without a "ty'),
        ([{"role": "user", "content": [{"type": "text"}]}], 'type "text" without its "text"'),
    ],
)
def test_what_is_wrong_with_a_conversation(value, problem):
    with pytest.raises(DataError) as caught:
        check_messages(value, "chat.json")
    assert problem in str(caught.value)


def test_jinja_is_not_imported_here():
    """It costs a tenth of a second, and a template has no business in this process."""
    code = "import sys, engine.text.chat; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"jinja2", "markupsafe", "torch"} & set(done.stdout.split())
