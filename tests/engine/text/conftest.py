"""A renderer for many tests, and conversations rendered with it."""

import functools
from datetime import datetime

import pytest

from engine.text.chat import render
from engine.text.renderer import Renderer
from tests.engine.text.chats import TEMPLATES, ChatTokenizer

NOW = datetime(2025, 3, 4, 5, 6)


@pytest.fixture(scope="module")
def renderer():
    with Renderer() as process:
        yield process


@pytest.fixture(scope="module")
def chat(tokenizer, renderer):
    """Return a function that renders with one of the templates."""

    @functools.cache
    def made(name):
        return ChatTokenizer(tokenizer.inner, *TEMPLATES[name])

    def call(name, messages, **options):
        own = made(name) if name in TEMPLATES else ChatTokenizer(tokenizer.inner, name)
        return render(messages, own, **({"renderer": renderer, "now": NOW} | options))

    call.tokenizer = made
    call.renderer = renderer
    return call
