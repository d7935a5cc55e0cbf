"""The `tokenizers` library against hostile files: one error each, and nothing on stderr."""

import base64
import json
import os
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from engine.errors import CheckpointError
from engine.text.library import fenced, hushed, parse, shorter, span, state, steps, variant
from engine.text.tokenizer import load_tokenizer
from tests.engine.text.published import gpt2, llama2, mistral


def definition(**changes):
    """A tokenizer.json of three tokens, with changes at the top or, as `model`, in the model."""
    small = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    small.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    small.decoder = decoders.ByteLevel()
    found = json.loads(small.to_str())
    model = found["model"] | changes.pop("model", {})
    return json.dumps(found | changes | {"model": model})


def split(pattern):
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def charsmap(data):
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def nested(depth):
    inner = {"type": "Digits", "individual_digits": True}
    for _ in range(depth):
        inner = {"type": "Sequence", "pretokenizers": [inner]}
    return inner


EXPLODE = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 1000}
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0]]}
HOSTILE = {
    "merges name unknown tokens": definition(model={"merges": [["a", "zz"]]}),
    "merges make unknown tokens": definition(model={"vocab": {"a": 0, "b": 1}}),
    "merges of three": definition(model={"merges": ["a b c"]}),
    "a prefix longer than tokens": definition(model={"continuing_subword_prefix": "ééé"}),
    "an id of 2^40": definition(model={"vocab": {"a": 1 << 40, "b": 1, "ab": 2}}),
    "an id of 2^32 - 1": definition(model={"vocab": {"a": (1 << 32) - 1, "b": 1, "ab": 2}}),
    "a negative id": definition(model={"vocab": {"a": -1, "b": 1, "ab": 2}}),
    "an id that is text": definition(model={"vocab": {"a": "0", "b": 1, "ab": 2}}),
    "dropout of 5": definition(model={"dropout": 5.0}),
    "an unknown that is missing": definition(model={"unk_token": "<unk>"}),
    "deep brackets": definition().replace("null", "[" * 100_000, 1),
    "deep sequences": definition(pre_tokenizer=nested(100)),
    "a broken regex": definition(pre_tokenizer=split({"Regex": "("})),
    "a deep regex": definition(pre_tokenizer=split({"Regex": "(" * 50_000 + ")" * 50_000})),
    "a regex that never ends": definition(pre_tokenizer=split({"Regex": r"(.+)+\n\z"})),
    "chunks of nothing": definition(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "replacing nothing": definition(normalizer=EXPLODE | {"pattern": {"String": ""}}),
    "exploding text": definition(normalizer={"type": "Sequence", "normalizers": [EXPLODE] * 3}),
    "an empty charsmap": definition(normalizer=charsmap(b"\0")),
    "a huge charsmap": definition(normalizer=charsmap(b"\xff" * 4 + b"\0" * 8)),
    "a wild charsmap": definition(normalizer=charsmap(b"\4\0\0\0\xff\xff\xff\xff" + b"\0" * 4)),
    "no pieces": definition(model=UNIGRAM | {"vocab": []}),
    "an unknown beyond the pieces": definition(model=UNIGRAM | {"unk_id": 10}),
    "no unknown": definition(model=UNIGRAM | {"unk_id": None}),
    "an infinite score": definition(model=UNIGRAM).replace("-1.0", "-1e999"),
    "no decoder": definition(decoder=None),
    "another decoder": definition(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
    "stripping it all": definition(
        decoder={"type": "Strip", "content": " ", "start": 1 << 40, "stop": 0}
    ),
    "an unknown kind": definition(model={"type": "Magic"}),
    "cut short": definition()[:-100],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_error(case, tmp_path, capfd):
    file = tmp_path / "tokenizer.json"
    file.write_text(HOSTILE[case], encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"{file}: ") as error:
        load_tokenizer(tmp_path)
    assert len(str(error.value).splitlines()) == 1
    assert capfd.readouterr().err == ""


def test_the_harmless_one_loads(tmp_path):
    """The control: what the hostile ones were made from."""
    (tmp_path / "tokenizer.json").write_text(definition(), encoding="utf-8")
    assert load_tokenizer(tmp_path).encode("abba") == [2, 1, 0]


def test_a_damaged_file_is_an_error_or_a_tokenizer(tmp_path, capfd):
    """Random damage to a small definition, 1,000 times: bytes changed, cut out, doubled."""
    draw, loaded = random.Random(0), 0
    for _ in range(1000):
        data = bytearray(definition().encode())
        at = draw.randrange(len(data))
        if draw.random() < 0.5:
            data[at] = draw.choice(b'0123456789"{}[],:\\ \0\xffax')
        else:
            data[at : at + draw.randrange(20)] = data[: draw.randrange(20)]
        (tmp_path / "tokenizer.json").write_bytes(data)
        try:
            load_tokenizer(tmp_path).encode("ab")
            loaded += 1
        except CheckpointError as error:
            assert str(tmp_path) in str(error)
    assert capfd.readouterr().err == ""
    assert 50 < loaded < 950


def test_text_that_breaks_a_regex_is_one_error(tmp_path):
    """The search gives up only on text of this shape, so the file loads."""
    bomb = definition(pre_tokenizer=split({"Regex": "(a+)+$"}))
    (tmp_path / "tokenizer.json").write_text(bomb, encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(CheckpointError, match="fails on a text: .*retry-limit"):
            encode("a" * 40 + "b")


def test_an_interrupt_passes_the_fence():
    for error in (KeyboardInterrupt, SystemExit, TypeError):
        with pytest.raises(error), fenced("problem"):
            raise error
    with pytest.raises(CheckpointError, match="problem: words; use another"), fenced("problem"):
        raise ValueError("words")


def test_hushing_ends(capfd):
    with hushed():
        os.write(2, b"lost")
    os.write(2, b"seen")
    assert capfd.readouterr().err == "seen"


def test_ids_may_have_holes(tmp_path):
    holes = definition(model={"vocab": {"a": 0, "b": 9, "ab": 2}})
    assert span(parse(holes.encode())) == 10
    (tmp_path / "tokenizer.json").write_text(holes, encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.pieces[1]) == (10, b"")
    assert tokenizer.decode([9, 1, 2]) == "bab"


def test_steps_unroll_sequences():
    inner = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Sequence([normalizers.Lowercase()])]
    )
    assert [step["type"] for step in steps(state(inner))] == ["NFC", "Lowercase"]
    assert list(steps(state(None))) == []


@pytest.mark.parametrize("make", [llama2, mistral, lambda: mistral("always"), gpt2])
def test_a_variant_continues_without_a_space(make):
    inner = make()
    inner.encode_special_tokens = True
    inner.add_tokens([AddedToken("<new>", normalized=False)])
    ordinary = variant(inner, parse_special=False, continuing=False)
    continuing = variant(inner, parse_special=False, continuing=True)
    special = variant(inner, parse_special=True, continuing=False)
    name = next(t.content for t in inner.get_added_tokens_decoder().values() if t.special)
    text = f"in the {name} of <new> things"

    def encode(tokenizer, text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    assert encode(ordinary, text) == encode(inner, text)
    inner.encode_special_tokens = False
    assert encode(special, text) == encode(inner, text) != encode(ordinary, text)
    without = "".join(continuing.id_to_token(i) for i in encode(continuing, "the"))
    assert without == "the"


def test_a_variant_can_do_without_any_normalizer():
    inner = llama2()
    inner.normalizer = normalizers.Prepend("▁")
    assert variant(inner, parse_special=False, continuing=True).normalizer is None


@pytest.mark.parametrize("make", [gpt2, llama2, mistral])
def test_a_shorter_definition_says_the_same(make):
    inner = make()
    short = shorter(inner.to_str())
    assert all(isinstance(merge, str) for merge in json.loads(short)["model"]["merges"])
    assert parse(short.encode()).to_str() == inner.to_str()
    assert shorter(short) == short


@pytest.mark.parametrize("left", ["a b", "#version"])
def test_merges_stay_pairs_where_text_would_be_read_otherwise(left):
    vocab = {left: 0, "c": 1, f"{left}c": 2}
    pairs = definition(model={"vocab": vocab, "merges": [[left, "c"]]})
    assert shorter(pairs) == pairs
    as_text = pairs.replace(json.dumps([[left, "c"]]), json.dumps([f"{left} c"]))
    assert meaning(as_text) != meaning(pairs)  # the control


def meaning(text):
    """A definition as the library writes it again; None if it refuses it."""
    try:
        return parse(text.encode()).to_str()
    except CheckpointError:
        return None


@pytest.mark.parametrize("merges", [None, 5, "a b", [5], [["a"]], [["a", 5]]])
def test_what_are_no_merges_is_left_alone(merges):
    odd = definition(model=UNIGRAM | {"merges": merges})
    assert shorter(odd) == odd


class Counted:
    """A tokenizer with these ids, which says when its whole vocabulary is asked for."""

    def __init__(self, *ids):
        self.names, self.asked = {f"t{i}": i for i in ids}, False

    def get_vocab_size(self, with_added_tokens):
        return len(self.names)

    def id_to_token(self, token_id):
        return {i: name for name, i in self.names.items()}.get(token_id)

    def get_vocab(self, with_added_tokens):
        self.asked = True
        return self.names


@pytest.mark.parametrize(
    ("ids", "expected", "asked"),
    [((0, 1, 2), 3, False), ((), 0, False), ((2, 0, 9), 10, True), ((5,), 6, True)],
)
def test_the_whole_vocabulary_is_copied_only_where_ids_have_holes(ids, expected, asked):
    """For 49,000 tokens that takes 25 ms, before the first letter."""
    inner = Counted(*ids)
    assert (span(inner), inner.asked) == (expected, asked)
