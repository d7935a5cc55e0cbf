"""The program of the renderer, called in this process: what templates find in it."""

import json
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text.template import MAX_CHARACTERS, fill


def filled(template, **variables):
    return fill({"template": template, "variables": variables, "now": "2024-02-03T04:05:06"})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(JSON)
def test_tojson_is_plain_json(value):
    assert filled("{{ x | tojson }}", x=value) == {"text": json.dumps(value, ensure_ascii=False)}


def test_tojson_takes_the_options_of_json():
    value = {"b": "é<&>'", "a": [1]}
    assert filled("{{ x | tojson }}", x=value)["text"] == '{"b": "é<&>\'", "a": [1]}'
    text = filled(
        "{{ x | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}", x=value
    )["text"]
    assert text == '{"a":[1],"b":"\\u00e9<&>\'"}'
    assert filled("{{ x | tojson(indent=1) }}", x=[1])["text"] == "[\n 1\n]"


CONSTRUCTS = [
    ("  {% if true %}\nx\n  {% endif %}\ny\n", "x\ny"),
    ("{% for i in 'abcd' %}{% if i == 'b' %}{% continue %}{% endif %}{{ i }}{% endfor %}", "acd"),
    ("{% for i in 'abcd' %}{{ i }}{% if i == 'b' %}{% break %}{% endif %}{% endfor %}", "ab"),
    ("{{ strftime_now('%d %B %Y') }}", "03 February 2024"),
    ("{% set n = namespace(a=1) %}{% if 1 %}{% set n.a = n.a + 2 %}{% endif %}{{ n.a }}", "3"),
    ("{{ namespace({'a': 1}, b=2).b }}{{ dict(a=1).a }}", "21"),
    ("{{ dict.fromkeys('ab', 0) }}", "{'a': 0, 'b': 0}"),
    ("{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x is defined }}", "1False"),
    ("{{ none }}{{ missing }}{{ {'a': none}.a or 'b' }}", "Noneb"),
]


@pytest.mark.parametrize(("template", "text"), CONSTRUCTS)
def test_constructs(template, text):
    assert filled(template) == {"text": text}


def test_a_rejection_is_told_apart_from_a_failure():
    assert filled("{{ raise_exception('no\n system') }}") == {"error": "no system", "raised": True}
    reply = filled("\n{{ 1 / 0 }}")
    assert reply == {"error": "line 2: division by zero", "raised": False}
    assert filled("{{ raise_exception() }}")["raised"] is False


def test_length_is_limited():
    assert "text" in filled("{{ 'x' * n }}", n=MAX_CHARACTERS)
    assert "more than" in filled("{{ 'x' * n }}", n=MAX_CHARACTERS + 1)["error"]


def test_names_of_ours_cannot_be_set():
    template = "{% generation %}x{% endgeneration %}"
    assert filled(template, _generation_marks=["<", ">"]) == {"text": "x"}
    request = {"template": template, "variables": {}, "now": datetime.now().isoformat()}
    assert fill(request | {"marks": ["<", ">"]}) == {"text": "<x>"}
