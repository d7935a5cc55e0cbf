"""The process apart: what a hostile template can do to us, which is nothing, and how it is told."""

import os
import signal
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from engine.errors import CheckpointError, DataError, InputError
from engine.text.renderer import Renderer

HOSTILE = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() | length }}",
    "globals": "{{ cycler.__init__.__globals__.os.environ }}",
    "joiner": "{{ joiner.__init__.__globals__['os'].popen('id').read() }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('true') }}",
    "namespace": "{{ namespace.__init__.__globals__.os }}",
    "attr": "{{ ('' | attr('__class__')).mro() }}",
    "attr joined": "{{ '' | attr(['_'*2, 'class', '_'*2] | join) | attr('mro') }}",
    "map attribute": "{{ [''] | map(attribute='__class__') | list | first | attr('x') + 1 }}",
    "item": "{{ ()['__class__']['__base__']['__subclasses__']() }}",
    "self": "{{ self.__init__.__globals__ + 1 }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') + 1 }}",
    "format_map": "{{ '{x.__class__}'.format_map({'x': 1}) + 1 }}",
    "format passed on": "{{ ['{0.__class__.__mro__}'] | map('format', '') | list + 1 }}",
    "str.format": "{% set f = '{0.__init__.__globals__}'.format %}{{ f(raise_exception) + 1 }}",
    "raise_exception": "{{ raise_exception.__globals__['__builtins__'] }}",
    "strftime": "{{ strftime_now.__self__.__class__.__init__.__globals__ }}",
    "tojson": "{{ {}.__class__.__base__ | tojson }}{{ 0 / 0 }}",
    "undefined": "{{ missing.__class__.__init__.__globals__ }}",
    "generator": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "macro": "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__ + m._func.__code__ }}",
    "caller": "{% macro m() %}{{ caller.__init__.__globals__.x }}{% endmacro %}"
    "{% call m() %}{% endcall %}",
    "dunder namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "dict": "{{ dict.__class__.__base__.__subclasses__() }}",
    "import": "{% import 'os' as os %}{{ os.environ }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends 'x' %}",
    "append": "{{ messages.append('x') }}",
    "update": "{{ messages[0].update({'role': 'system'}) }}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "memory": "{{ 'x' * 10**10 }}",
    "list memory": "{{ ([0] * 10**9) | length }}",
    "doubling": "{% set ns = namespace(x='x') %}"
    "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "padding": "{{ '%9999999999d' % 1 }}",
    "wide": "{{ 'x' | center(10**10) }}",
    "long": "{{ 'xxxxxxxxxx' * 2 * 10**6 }}",
    "recursion": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([x]) }}{% endfor %}",
    "nested": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "nested blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "nested lists": "{{ " + "[" * 100_000 + " }}",
    "syntax": "{% for %}",
    "unclosed": "{% if x %}",
    "filter": "{{ 1 | os }}",
    "division": "\n\n{{ 1 // 0 }}",
    "type": "{{ 'a' + 1 }}",
    "undefined call": "{{ messages.send('x') }}",
}
ENDLESS = {
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "constant": "{% if 7 ** (9 ** 9) %}{% endif %}",
    "sum": "{% set r = range(99999) %}{% for a in r %}{{ (r | sum) * 0 }}{% endfor %}",
}
VARIABLES = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def renderer():
    with Renderer() as process:
        yield process


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_line_of_error(renderer, name):
    """And the next rendering is as if nothing had been."""
    began = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        renderer.fill(HOSTILE[name], VARIABLES)
    assert time.monotonic() - began < 7
    message = str(caught.value)
    assert message.startswith("the chat template cannot be used: ")
    assert "\n" not in message and len(message) < 400 and "Traceback" not in message
    assert renderer.fill("{{ messages[0].content }}", VARIABLES) == "hi"


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_template_is_ended(name):
    with Renderer(limit_s=0.7) as renderer:
        renderer.fill("", {})
        began = time.monotonic()
        with pytest.raises(CheckpointError, match=r"not done after 0\.7 s"):
            renderer.fill(ENDLESS[name], {})
        assert time.monotonic() - began < 2
        assert renderer.fill("{{ 1 }}", {}) == "1"


def test_the_error_says_which_line(renderer):
    for template, words in (
        ("\n\n{{ 1 // 0 }}", "line 3: integer division or modulo by zero"),
        ("a\n{% for %}", "line 2: "),
        ("{{ x.y.z }}", "line 1: 'x' is undefined"),
    ):
        with pytest.raises(CheckpointError, match=words):
            renderer.fill(template, {})


def test_what_the_template_raises_is_about_the_conversation(renderer):
    with pytest.raises(DataError, match="rejects the conversation: roles must alternate") as caught:
        renderer.fill(
            "{{ raise_exception('roles\nmust\x1b[2J alternate' | replace('\x1b[2J', '')) }}", {}
        )
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError) as caught:
        renderer.fill("{{ raise_exception('\x1b[31m' ~ 'x' * 9999) }}", {})
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 400


def test_the_process_holds_two_pipes_and_no_environment(renderer):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    renderer.fill("", {})
    assert renderer._process is not None
    own = Path(f"/proc/{renderer._process.pid}")
    pipes = {path.name: str(path.readlink()) for path in (own / "fd").iterdir()}
    assert pipes.keys() == {"0", "1", "2"} and pipes["2"] == os.devnull
    assert pipes["0"].startswith("pipe:") and pipes["1"].startswith("pipe:")
    assert b"PATH=" not in (own / "environ").read_bytes()
    lines = (own / "limits").read_text().splitlines()
    limits = {line[:26].strip(): line[26:].split()[0] for line in lines}
    assert limits["Max open files"] == "0"
    assert limits["Max address space"] == str(1 << 30)
    assert int(limits["Max cpu time"]) < 60


def test_a_process_that_was_ended_is_replaced(renderer):
    renderer.fill("", {})
    renderer._process.kill()
    renderer._process.wait()
    assert renderer.fill("{{ 1 }}", {}) == "1"


def test_a_template_that_ends_the_process_is_an_error(renderer):
    renderer.fill("", {})
    threading.Timer(0.2, renderer._process.kill).start()
    with pytest.raises(CheckpointError, match="it ended the process"):
        renderer.fill(ENDLESS["loop"], {})
    assert renderer.fill("{{ 1 }}", {}) == "1"


def test_an_interrupted_rendering_does_not_answer_the_next():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    busy = "{% for a in range(600) %}{% for b in range(1000) %}{% endfor %}{% endfor %}old"
    try:
        with Renderer() as renderer:
            renderer.fill("", {})
            signal.setitimer(signal.ITIMER_REAL, 0.005)
            with pytest.raises(KeyboardInterrupt):
                renderer.fill(busy, {})
            assert renderer.fill("new", {}) == "new"
    finally:
        signal.signal(signal.SIGALRM, before)


def test_processor_time_is_granted_anew_for_each_rendering():
    """The limit counts from the request on: a long chat does not use it up."""
    busy = "{% for a in range(600) %}{% for b in range(1000) %}{% endfor %}{% endfor %}{{ 1 }}"
    with Renderer(limit_s=1) as renderer:
        spent = 0.0
        while spent < 3.5:
            began = time.monotonic()
            assert renderer.fill(busy, {}) == "1"
            spent += time.monotonic() - began


def test_close_ends_the_process_and_may_be_repeated():
    renderer = Renderer()
    process = renderer._process
    assert process is not None
    renderer.close()
    renderer.close()
    assert process.returncode is not None
    with renderer:
        assert renderer.fill("{{ 1 }}", {}) == "1"


def test_any_json_comes_through_unchanged(renderer):
    text = "\ud800 \udcff \x00 \u2028 \\ \" ' 😀\r\n"
    assert renderer.fill("{{ x }}", {"x": text}) == text
    assert renderer.fill("{{ x is none }} {{ y }} {{ z }}", {"x": None, "y": 1.5, "z": True}) == (
        "True 1.5 True"
    )


def test_what_is_not_json_is_an_error_of_the_conversation(renderer):
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (b"bytes", {1, 2}, datetime(2020, 1, 1), deep):
        with pytest.raises(DataError, match="not plain JSON"):
            renderer.fill("", {"x": value})


def test_the_clock_is_given(renderer):
    now = datetime(2025, 3, 4, 5, 6, 7)
    assert renderer.fill("{{ strftime_now('%d %b %Y %H:%M:%S') }}", {}, now) == (
        "04 Mar 2025 05:06:07"
    )
    assert renderer.fill("{{ strftime_now('%Y') }}", {}) == str(datetime.now().year)


def test_generation_blocks_are_marked_if_asked(renderer):
    template = "a{% generation %}b{% if 1 %}c{% endif %}{% endgeneration %}d"
    assert renderer.fill(template, {}) == "abcd"
    assert renderer.fill(template, {}, marks=("<", ">")) == "a<bc>d"


def test_errors_are_input_errors():
    assert issubclass(CheckpointError, InputError) and issubclass(DataError, InputError)


def test_what_was_asked_ahead_is_not_asked_again(renderer, monkeypatch):
    now = datetime(2020, 1, 1)
    template = "{{ strftime_now('%Y') }}{{ x }}{{ raise_exception('no') if x == 2 }}"
    renderer.fill_ahead(template, [{"x": x} for x in (0, 1, 2, 1)], now)
    with monkeypatch.context() as patch:
        patch.setattr(renderer, "_ask", None)
        assert [renderer.fill(template, {"x": x}, now) for x in (0, 1)] == ["20200", "20201"]
        with pytest.raises(DataError, match="rejects the conversation: no"):
            renderer.fill(template, {"x": 2}, now)
    assert renderer.fill(template, {"x": 1}, datetime(2021, 1, 1)) == "20211"
    assert renderer.fill(template, {"x": 3}, now) == "20203"


def test_what_is_too_much_at_once_is_asked_one_by_one():
    """The time limit is for all together; alone, each is done in time."""
    busy = "{% for a in range(400) %}{% for b in range(1000) %}{% endfor %}{% endfor %}{{ x }}"
    now = datetime(2020, 1, 1)
    with Renderer(limit_s=0.5) as renderer:
        renderer.fill_ahead(busy, [{"x": x} for x in range(200)], now)
        assert renderer._ahead == {}
        assert renderer.fill("{{ x }}", {"x": 1}, now) == "1"


def test_a_request_larger_than_a_pipe_holds_comes_through(renderer):
    text = "x" * (1 << 20)
    renderer.fill_ahead("{{ x }}", [{"x": text}, {"x": text + "y"}], datetime(2020, 1, 1))
    assert renderer.fill("{{ x }}", {"x": text + "y"}, datetime(2020, 1, 1)) == text + "y"
