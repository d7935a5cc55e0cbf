"""Names lead to the tokenizer their maker published, to an estimate that holds, or to an error."""

import csv
from pathlib import Path

import pytest
import tiktoken.model

from engine.errors import RecipeError
from engine.text.models import CLAUDE_3, CLAUDE_47, GEMINI, known_models, resolve
from tests.engine.text.counters import counter

ESTIMATES = Path(__file__).parent / "estimates.csv"
MEASURED = list(csv.DictReader(ESTIMATES.read_text(encoding="utf-8").splitlines()))
COLUMNS = [(CLAUDE_3, "claude_3"), (CLAUDE_47, "claude_47"), (GEMINI, "gemma_3")]

# Eight times a short text: what ctok 1.3.0 and the tokenizer of Gemma 3 count without any frame.
SAMPLES = {
    "prose": (
        "The river had been rising since noon, and by the time the lamps were lit nobody on the"
        " quay still believed that the old bridge would stand until morning. ",
        (265, 353, 249),
    ),
    "code": (
        "def mean(values: list[float]) -> float:\n    if not values:\n        raise ValueError('no"
        " values')\n    return sum(values) / len(values)\n\n",
        (311, 375, 312),
    ),
    "json": (
        '{"id": 10482, "name": "Ada", "tags": ["new", "paid"], "score": 0.75}\n',
        (247, 303, 280),
    ),
}


@pytest.mark.parametrize("name", [*tiktoken.model.MODEL_TO_ENCODING])
def test_every_model_of_tiktoken_has_its_encoding(name):
    if name.startswith(
        (
            "text-s",
            "code-s",
            "code-c",
            "cushman",
            "davinci-codex",
            "text-davinci-e",
            "code-davinci-e",
            "text-curie",
            "text-b",
            "text-ada",
        )
    ):
        pytest.skip("withdrawn years ago")
    assert resolve(name).encoding == tiktoken.model.encoding_name_for_model(name)


@pytest.mark.parametrize(
    ("name", "encoding", "window"),
    [
        ("gpt-4.1", "o200k_base", 1_047_576),
        ("gpt-4", "cl100k_base", 8_192),
        ("gpt-4-turbo-2024-04-09", "cl100k_base", 128_000),
        ("gpt-4o-2024-08-06", "o200k_base", 128_000),
        ("GPT-4o", "o200k_base", 128_000),
        ("openai/gpt-5-mini", "o200k_base", 400_000),
        ("openrouter/openai/gpt-5.1", "o200k_base", 400_000),
        ("azure/gpt-35-turbo", "cl100k_base", 16_385),
        ("ft:gpt-4o-mini-2024-07-18:acme::9abc", "o200k_base", 128_000),
        ("ft:gpt-3.5-turbo:acme:name:9abc", "cl100k_base", 16_385),
        ("gpt-oss-120b", "o200k_harmony", 131_072),
        ("o3-mini", "o200k_base", 200_000),
        ("o1-mini-2024-09-12", "o200k_base", 128_000),
        ("chatgpt-4o-latest", "o200k_base", 128_000),
        ("gpt-4.5-preview", "o200k_base", 128_000),
        ("text-embedding-3-small", "cl100k_base", 8_192),
        ("text-embedding-ada-002", "cl100k_base", 8_192),
        ("cl100k_base", "cl100k_base", None),
        ("openai:gpt-4o", "o200k_base", 128_000),
        ("gpt-41-mini", "o200k_base", 1_047_576),  # as Azure spells it
        ("ft:gpt-41:acme", "o200k_base", 1_047_576),
        ("gpt-35-turbo-16k", "cl100k_base", 16_385),
        ("gpt-4-1106-vision-preview", "cl100k_base", 128_000),
        ("gpt-5.1-codex-max", "o200k_base", 400_000),
        ("o3-pro-2025-06-10", "o200k_base", 200_000),
        ("openai.gpt-oss-120b-1:0", "o200k_harmony", 131_072),
    ],
)
def test_names_of_openai(name, encoding, window):
    model = resolve(name)
    assert (model.encoding, model.window, model.estimate) == (encoding, window, None)


@pytest.mark.parametrize(
    ("name", "estimate"),
    [
        ("claude-3-5-sonnet-20241022", CLAUDE_3),
        ("anthropic/claude-3.7-sonnet", CLAUDE_3),
        ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", CLAUDE_3),
        ("claude-opus-4-6", CLAUDE_3),
        ("claude-opus-4.7", CLAUDE_47),
        ("claude-sonnet-5", CLAUDE_47),
        ("gemini-2.5-pro", GEMINI),
        ("google/gemini-2.0-flash-001", GEMINI),
        ("us.anthropic.claude-sonnet-4-20250514-v1:0", CLAUDE_3),
        ("claude-4-sonnet", CLAUDE_3),
        ("claude-3-5-sonnet@20240620", CLAUDE_3),
        ("google-vertex:gemini-2.5-flash-lite", GEMINI),
    ],
)
def test_hosted_models_are_estimates(name, estimate):
    assert resolve(name).estimate == estimate


@pytest.mark.parametrize("name", ["llama-3.1-8b", "Qwen/Qwen2.5-7B", "mistral-7b", "deepseek-v3"])
def test_open_models_need_their_file(name):
    with pytest.raises(RecipeError, match="tokenizer.json"):
        resolve(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("gtp-4o", "gpt-4o"), ("o20k_base", "o200k_base"), ("adagio", "ada"), ("gpt-9", "gpt-")],
)
def test_unknown_names_get_the_nearest(name, hint):
    with pytest.raises(RecipeError, match=f"did you mean .*{hint}"):
        resolve(name)
    with pytest.raises(RecipeError, match="is not a model"):
        resolve("")


@pytest.mark.parametrize(
    "name",
    [
        "gpt-4.9",
        "gpt-4oops",
        "gpt-4-o",
        "gpt-4-foo",
        "gpt-4-mini",
        "gpt-5000",
        "gpt-50",
        "gpt-5x",
        "gpt-5.",
        "o3pro",
        "o1x",
        "o10",
        "o33",
        "gpt-4-1",
        "gpt-4_1",
        "gpt-4.10",
        "gpt-4omni",
        "checkpoints/gpt-4",
        "claude-sonet",
        "claude-99",
        "gemini-99",
    ],
)
def test_a_name_that_only_begins_like_a_known_one_is_not_known(name):
    """They were counted with the tokenizer of the shorter name, and called exact."""
    with pytest.raises(RecipeError, match="is not a model .* did you mean"):
        resolve(name)


@pytest.mark.parametrize(
    "name", ["gpt-6-sol", "gpt-audio", "codex-mini-latest", "claude-1", "grok-4"]
)
def test_models_of_which_nothing_is_known_say_so(name):
    with pytest.raises(RecipeError, match=f"{name}: which tokenizer it uses is not known"):
        resolve(name)


def test_known_names_resolve_to_themselves():
    assert all(resolve(name).name == name for name in known_models())


@pytest.mark.parametrize(("estimate", "column"), COLUMNS)
def test_nine_of_ten_documents_are_within_the_stated_interval(estimate, column):
    ratios = [int(row[column]) / int(row["o200k_base"]) for row in MEASURED]
    assert len(ratios) == 404

    def share(width: float) -> float:
        return sum(abs(r / estimate.factor - 1) <= width for r in ratios) / len(ratios)

    assert share(estimate.plus_minus) >= 0.9
    assert share(estimate.plus_minus - 0.06) < 0.9, "wider than it needs to be"
    assert share(0.05) < 0.5, "control: a bold interval would not hold"


@pytest.mark.parametrize("kind", SAMPLES)
def test_estimates_of_text_at_hand_hold(kind):
    text, counts = SAMPLES[kind]
    for name, true in zip(
        ("claude-3-5-sonnet", "claude-opus-4-7", "gemini-2.5-pro"), counts, strict=True
    ):
        ours = counter(name)
        assert ours.exactness == "estimated"
        assert abs(true / ours.count(8 * text) - 1) <= ours.plus_minus, (name, kind)
