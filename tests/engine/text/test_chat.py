"""Chat: what transformers renders, and control tokens that only the template can write."""

from datetime import datetime

import pytest
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from engine.errors import CheckpointError, DataError
from tests.engine.text.chats import (
    CONVERSATIONS,
    TEMPLATES,
    TOOLS,
)

NOW = datetime(2025, 3, 4, 5, 6)


def peer(tokenizer):
    """The same tokenizer and template in transformers."""
    inner = FastTokenizer.from_str(tokenizer.inner.to_str())
    named = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in tokenizer.settings.items()
        if value is not None
    }
    theirs = PreTrainedTokenizerFast(tokenizer_object=inner, **named)
    theirs.chat_template = tokenizer.template
    return theirs


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
