"""The tokenizer: exact round trips, streaming, learning, saving and loading."""

import functools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, processors, trainers

from engine.config import TokenizerConfig
from engine.errors import CheckpointError, DataError
from engine.text.tokenizer import (
    END_OF_TEXT,
    SPECIAL_TOKENS,
    SPLITS,
    StreamDecoder,
    Tokenizer,
    learn,
    load_tokenizer,
)
from tests.conftest import TEXT
from tests.engine.text.published import write

CHARACTERS = st.one_of(
    st.characters(), st.sampled_from("\ud800\udbff\udc00\udc80\udcff\udfff é€😀")
)
HOSTILE_TEXT = st.lists(st.one_of(CHARACTERS, st.sampled_from(SPECIAL_TOKENS))).map("".join)
HOSTILE_BYTES = st.lists(
    st.one_of(st.binary(max_size=4), st.text(max_size=4).map(str.encode), st.just(b"<|im_end|>"))
).map(b"".join)
ORDINARY = [
    "def forward(self, tokens):\n    return self.head(x)\n\n",
    "  Leading spaces, it's 12345 o'clock; naïve café — 日本語 😀\r\n\ttabs",
    "",
]


@functools.cache
def learned(split):
    return learn([TEXT], TokenizerConfig(vocab_size=320, split=split))


@given(HOSTILE_BYTES)
def test_any_bytes_survive_the_round_trip(tokenizer, data):
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data
    assert not set(ids) & set(tokenizer.special)


def test_every_single_byte_is_a_token(tokenizer):
    assert tokenizer.decode_bytes(tokenizer.byte_ids[byte] for byte in range(256)) == bytes(
        range(256)
    )
    for byte in range(128):
        assert tokenizer.encode(chr(byte)) == [tokenizer.byte_ids[byte]]


@given(HOSTILE_TEXT)
def test_any_text_survives_the_round_trip(tokenizer, text):
    """Lone surrogates included: they come back as the three bytes UTF-8 would give them."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode("utf-8", "surrogatepass")
    assert not set(ids) & set(tokenizer.special)


@pytest.mark.parametrize("split", SPLITS)
@given(text=st.text())
def test_each_split_survives_the_round_trip(split, text):
    """A pattern that skips some character would lose it here."""
    assert learned(split).decode(learned(split).encode(text)) == text


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
def test_text_that_looks_special_stays_text(tokenizer, special):
    text = f"a{special}b {special}"
    for ids in (
        tokenizer.encode(text),
        tokenizer.encode_batch([text])[0],
        tokenizer.encode_bytes(text.encode()),
        tokenizer.encode_bytes(text.encode() + b"\xff")[:-1],
    ):
        assert not set(ids) & set(tokenizer.special)
        assert tokenizer.decode(ids) == text


@given(st.lists(st.text()))
def test_a_batch_equals_its_texts_one_by_one(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_a_batch_keeps_lone_surrogates(tokenizer):
    """JSON can spell them ("\\ud800"), so a row of a corpus can hold one."""
    texts = ["plain", "lone \ud800 surrogate"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_bytes_that_are_utf8_get_the_ids_of_their_text(tokenizer):
    for text in [*ORDINARY, TEXT]:
        assert tokenizer.encode_bytes(text.encode()) == tokenizer.encode(text)
    larger = learn([TEXT], TokenizerConfig(vocab_size=600))
    assert len(larger.encode(TEXT)) < len(TEXT.encode()) / 2


def test_a_special_id_decodes_to_its_name(tokenizer):
    assert tokenizer.decode([tokenizer.end_of_text]) == END_OF_TEXT


def test_encode_adds_nothing_that_a_template_would_add(tokenizer):
    """Published tokenizers often wrap text in special tokens; placing them is up to the caller."""
    inner = FastTokenizer.from_str(tokenizer.to_json())
    inner.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, tokenizer.end_of_text)]
    )
    templated = Tokenizer(inner)
    assert templated.encode("text") == tokenizer.encode("text")
    assert templated.encode_batch(["text"]) == [tokenizer.encode("text")]
    assert templated.encode_bytes(b"text") == tokenizer.encode("text")


@pytest.mark.parametrize("outside", [-1, 400, 1 << 40])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer, outside):
    assert tokenizer.vocab_size == 400
    for decode in (tokenizer.decode, tokenizer.decode_bytes):
        with pytest.raises(DataError, match=rf"token id {outside} is outside 0 … 399"):
            decode([5, outside])
    with pytest.raises(DataError, match="outside"):
        StreamDecoder(tokenizer).push(outside)


@given(st.lists(st.integers(0, 399)))
def test_a_stream_of_any_ids_equals_the_whole(tokenizer, ids):
    stream = StreamDecoder(tokenizer)
    pushed = [stream.push(token_id) for token_id in ids]
    assert "".join([*pushed, stream.flush()]) == tokenizer.decode(ids)


@given(HOSTILE_BYTES)
def test_a_stream_of_single_bytes_equals_the_whole(tokenizer, data):
    stream = StreamDecoder(tokenizer)
    pushed = [stream.push(tokenizer.byte_ids[byte]) for byte in data]
    assert "".join([*pushed, stream.flush()]) == data.decode("utf-8", "replace")


def test_a_stream_gives_a_character_with_its_last_byte(tokenizer):
    """Not before, which would split it, and not after, which would lag."""
    stream = StreamDecoder(tokenizer)
    pushed = [stream.push(tokenizer.byte_ids[byte]) for byte in "aé€😀b".encode()]
    assert pushed == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]
    assert stream.flush() == ""


@pytest.mark.parametrize("length", [1, 2, 3])
def test_flush_shows_a_cut_character_once(tokenizer, length):
    stream = StreamDecoder(tokenizer)
    for byte in "😀".encode()[:length]:
        assert stream.push(tokenizer.byte_ids[byte]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_merges_worked_by_hand():
    """In aaabdaaabac the commonest pair is aa (4), then ab (2, older than aa·a), then aa·ab (2)."""
    tokenizer = learn(["aaabdaaabac"], TokenizerConfig(vocab_size=262, split="none"))
    assert tokenizer.pieces[259:] == [b"aa", b"ab", b"aaab"]
    pieces = {
        text: [tokenizer.pieces[token_id] for token_id in tokenizer.encode(text)]
        for text in ("aaabdaaabac", "aab", "cab", "aaaa")
    }
    assert pieces == {
        "aaabdaaabac": [b"aaab", b"d", b"aaab", b"a", b"c"],
        "aab": [b"aa", b"b"],  # the earlier merge wins over the one that would start later
        "cab": [b"c", b"ab"],
        "aaaa": [b"aa", b"aa"],
    }


def test_merges_stop_when_no_pair_repeats():
    """After aa, ab and aaab, what is left is aaab d aaab a c: no pair occurs twice."""
    tokenizer = learn(["aaabdaaabac"], TokenizerConfig(vocab_size=300, split="none"))
    assert tokenizer.pieces[259:] == [b"aa", b"ab", b"aaab"]


def test_little_text_yields_fewer_tokens():
    tokenizer = learn(["ab ab"], TokenizerConfig(vocab_size=4096))
    assert 259 < tokenizer.vocab_size < 270
    assert len(tokenizer.pieces) == tokenizer.vocab_size
    assert tokenizer.decode(tokenizer.encode("ab, something else")) == "ab, something else"


def test_enough_text_fills_the_vocabulary(tokenizer):
    assert tokenizer.vocab_size == len(tokenizer.pieces) == len(set(tokenizer.pieces)) == 400


def test_a_split_bounds_what_a_token_may_span():
    text = "the cat sat, " * 30 + "\n"
    spans = {}
    for split in SPLITS:
        pieces = learn([text * 3], TokenizerConfig(vocab_size=320, split=split)).pieces[259:]
        assert pieces
        spans[split] = (
            any(b"e c" in piece for piece in pieces),
            any(b", \nt" in piece for piece in pieces),
        )
    assert spans == {"gpt4": (False, False), "line": (True, False), "none": (True, True)}


@pytest.mark.parametrize(
    "split, stretches",
    [
        ("gpt4", "it|'s| |123|45| | o|'clock|!!\n\n| | x| \n| y|  "),
        ("line", "it's 12345  o'clock!!|\n\n  |x |\n |y  "),
        ("none", "it's 12345  o'clock!!\n\n  x \n y  "),
    ],
)
def test_stretches_worked_by_hand(split, stretches):
    """Merges stay inside these. Byte-level BPE writes a space as `Ġ`, a line end as `Ċ`."""
    written = stretches.replace(" ", "Ġ").replace("\n", "Ċ").split("|")
    found = learned(split).inner.pre_tokenizer.pre_tokenize_str(stretches.replace("|", ""))
    assert [stretch for stretch, _ in found] == written


def test_only_the_first_sample_bytes_are_learned_from():
    texts = ["ab" * 50, "cd" * 50, "xy" * 50]
    learned_pieces = {
        sample: learn(texts, TokenizerConfig(sample_bytes=sample)).pieces for sample in (101, 999)
    }
    assert b"ab" in learned_pieces[101] and b"cd" in learned_pieces[101]
    assert b"xy" not in learned_pieces[101] and b"xy" in learned_pieces[999]


def test_learning_takes_no_more_text_than_it_needs():
    """The source may be endless."""

    def endless():
        while True:
            yield "ab" * 500

    assert b"abab" in learn(endless(), TokenizerConfig(sample_bytes=5000)).pieces


def test_learning_survives_lone_surrogates():
    """JSON can spell them, so a row of the text to learn from can hold one."""
    tokenizer = learn(["ab \ud800 ab", "ab ab"], TokenizerConfig(vocab_size=300))
    assert b"ab" in tokenizer.pieces


def test_learning_twice_gives_the_same_tokenizer(tokenizer):
    assert learn([TEXT], TokenizerConfig(vocab_size=400)).to_json() == tokenizer.to_json()


@pytest.mark.parametrize("split", SPLITS)
def test_saved_and_loaded_is_the_same_tokenizer(split, tmp_path):
    saved = learned(split)
    saved.save(tmp_path, 128)
    for loaded in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.json")):
        assert loaded.digest == saved.digest
        assert loaded.pieces == saved.pieces
        assert (loaded.vocab_size, loaded.end_of_text) == (saved.vocab_size, saved.end_of_text)
        for text in [*ORDINARY, TEXT, f"not {END_OF_TEXT} special"]:
            assert loaded.encode(text) == saved.encode(text)


def test_the_digest_tells_tokenizers_apart(tokenizer):
    assert len({tokenizer.digest, *(learned(split).digest for split in SPLITS)}) == 4


@pytest.mark.parametrize("split", SPLITS)
def test_transformers_reads_the_saved_folder_alike(split, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    saved = learned(split)
    saved.save(tmp_path, 128)
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        theirs = kind.from_pretrained(tmp_path)
        for text in [*ORDINARY, TEXT]:
            assert theirs(text)["input_ids"] == saved.encode(text)
            assert theirs.decode(saved.encode(text)) == text
        assert theirs.eos_token_id == saved.end_of_text
        assert theirs.model_max_length == 128


def test_a_missing_tokenizer_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=rf"no tokenizer at {path}.*lm train-tokenizer"):
            load_tokenizer(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"model": 1}', b"\xff\xfe\0", b"null"])
def test_a_malformed_tokenizer_is_named(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file}.* is not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def trained(text, decoder):
    inner = FastTokenizer(models.BPE())
    trainer = trainers.BpeTrainer(special_tokens=[END_OF_TEXT], show_progress=False)
    inner.train_from_iterator([text], trainer)
    inner.decoder = decoder
    return inner


def test_a_tokenizer_without_decoder_is_refused(tmp_path):
    trained("日本語", None).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: it has no decoder"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_all_bytes_is_refused_for_training(tmp_path):
    trained("aabb", decoders.ByteLevel()).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).decode([1, 2]) == "ab"
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .* lacks 254 of the 256 bytes"):
        load_tokenizer(tmp_path, exact=True)


def test_an_end_of_text_is_missed_only_when_needed(tokenizer, tmp_path):
    definition = json.loads(tokenizer.to_json())
    definition["added_tokens"] = []
    for special in SPECIAL_TOKENS:
        token_id = definition["model"]["vocab"].pop(special)
        definition["model"]["vocab"]["~~" * (token_id + 1)] = token_id
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    endless = load_tokenizer(tmp_path)
    assert endless.ends == frozenset()
    assert endless.decode(endless.encode("text")) == "text"
    with pytest.raises(CheckpointError, match=r"no end-of-text token; name one as eos_token"):
        _ = endless.end_of_text


def published(folder, *special, **settings):
    """A folder with a small byte-level tokenizer, added tokens and settings."""
    inner = FastTokenizer.from_str(learned("gpt4").to_json())
    inner.add_special_tokens([*special, "<bos>", "<eos>"])
    inner.add_tokens(["<plain>"])
    return write(folder, inner, **settings)


def test_the_tokens_that_begin_and_end_a_text_are_read_from_the_folder(tmp_path):
    published(tmp_path, bos_token="<bos>", eos_token={"content": "<eos>"}, add_bos_token=True)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2, 99999]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    tokenizer = load_tokenizer(tmp_path)
    names = tokenizer.special
    assert (names[tokenizer.bos], names[tokenizer.end_of_text]) == ("<bos>", "<eos>")
    assert tokenizer.ends == {tokenizer.end_of_text, 1, 2}  # 99999 is no token
    assert tokenizer.prompt(b"hi") == [tokenizer.bos, *tokenizer.encode("hi")]
    assert tokenizer.prompt(b"") == [tokenizer.bos]
    assert tokenizer.prompt(b"<bos>hi") == [tokenizer.bos, *tokenizer.encode("<bos>hi")]
    assert tokenizer.encode("<bos>hi").count(tokenizer.bos) == 0
    assert tokenizer.encode_template("<bos>hi") == tokenizer.prompt(b"hi")


def test_without_settings_the_model_says_where_generation_ends(tmp_path):
    published(tmp_path)
    assert load_tokenizer(tmp_path).ends == {0}  # the end-of-text token of our own making
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert (load_tokenizer(tmp_path).end_of_text, load_tokenizer(tmp_path).bos) == (2, None)


def test_what_the_settings_name_is_special(tmp_path):
    """Even if tokenizer.json does not flag it; a name that is no token is not made one."""
    for named in ({}, {"eos_token": "<plain>", "pad_token": "<nowhere>"}):
        tokenizer = load_tokenizer(published(tmp_path, **named))
        is_special = "<plain>" in tokenizer.special.values()
        assert is_special == bool(named)
        assert (len(tokenizer.encode("<plain>")) == 1) == (not named)
        assert "<nowhere>" not in tokenizer.inner.get_vocab()


def test_a_bos_that_text_can_spell_is_not_doubled():
    """Some tokenizers begin a text with a token that is not special."""
    inner = FastTokenizer.from_str(learned("gpt4").to_json())
    inner.add_tokens(["<plain>"])
    tokenizer = Tokenizer(inner)
    tokenizer.bos, tokenizer.add_bos = inner.token_to_id("<plain>"), True
    assert tokenizer.prompt(b"<plain>a") == [tokenizer.bos, *tokenizer.encode("a")]


def test_what_tokenizer_json_puts_around_a_text_outweighs_the_settings(tmp_path):
    """As in transformers."""
    from transformers import PreTrainedTokenizerFast

    for asked in (True, False):
        for template, adds in (("<bos> $A", True), ("$A", False)):
            published(tmp_path, bos_token="<bos>", add_bos_token=asked)
            inner = FastTokenizer.from_file(str(tmp_path / "tokenizer.json"))
            inner.post_processor = processors.TemplateProcessing(
                single=template, special_tokens=[("<bos>", inner.token_to_id("<bos>"))]
            )
            inner.save(str(tmp_path / "tokenizer.json"))
            tokenizer = load_tokenizer(tmp_path)
            assert tokenizer.add_bos == adds
            theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
            assert theirs("hi")["input_ids"] == tokenizer.prompt(b"hi")


def test_settings_and_template_survive_saving(tmp_path):
    settings = {"eos_token": "<eos>", "chat_template": "{{ old }}", "padding_side": "left"}
    published(tmp_path, **settings)
    (tmp_path / "chat_template.jinja").write_text("{{ newer }}")
    loaded = load_tokenizer(tmp_path)
    assert loaded.template == "{{ newer }}"
    (tmp_path / "again").mkdir()
    loaded.save(tmp_path / "again", 77)
    again = load_tokenizer(tmp_path / "again")
    assert again.settings == loaded.settings | {"model_max_length": 77}
    assert again.settings.items() >= settings.items()
    assert again.template == "{{ newer }}"


def test_a_tokenizer_by_another_name_has_no_settings(tmp_path):
    published(tmp_path, eos_token="<eos>")
    (tmp_path / "tokenizer.json").rename(tmp_path / "mine.json")
    assert load_tokenizer(tmp_path / "mine.json").settings == {}


@pytest.mark.parametrize(
    "broken, flaw",
    [
        ({"normalizer": {"type": "NFC"}}, "normalizes text"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "changes text as it"),
        ({"split": {"behavior": "Removed"}}, "changes text as it splits it"),
        ({"added": {"lstrip": True}}, "changes text around the token '<plain>'"),
        ({"added": {"content": "Ġreturn"}}, ""),
    ],
)
def test_what_makes_a_tokenizer_inexact_is_said(tmp_path, broken, flaw):
    folder = published(tmp_path, eos_token="<eos>")
    definition = json.loads((folder / "tokenizer.json").read_text())
    if "split" in broken:
        definition["pre_tokenizer"]["pretokenizers"][0].update(broken.pop("split"))
    if "added" in broken:
        definition["added_tokens"][-1].update(broken.pop("added"))
    for key in broken:
        definition[key] = {"trim_offsets": True, "use_regex": True} | broken[key]
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = load_tokenizer(folder)
    assert (flaw in tokenizer.flaw) and tokenizer.exact == (not flaw)
