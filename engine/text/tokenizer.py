"""Text to token ids and back, with a tokenizer learned here or one that a published model ships.

Text that looks like a special token stays text; special ids are only ever put in by the program.
A byte-level tokenizer learned here gives back any bytes; published ones may lower, compose or space
text as they please, and `exact` tells which they are. Next on the arrow: `engine/data/pack.py`.

Source: Sennrich et al. 2016, arXiv:1508.07909 (byte-pair encoding); Radford et al. 2019 (bytes);
Kudo and Richardson 2018, arXiv:1808.06226 (SentencePiece); Kudo 2018, arXiv:1804.10959 (Unigram).
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from engine.config import TokenizerConfig
from engine.errors import CheckpointError, DataError
from engine.files import write_whole
from engine.text.library import fenced, hushed, parse, shorter, span, state, steps, variant
from engine.text.pieces import read_decoder
from engine.text.settings import Settings, read_settings

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")

PROBE = "hello  World e\u0301 \ufb01 \u00e9 <|endoftext|>\n\t1234"
NOBODY = "\U0010fffe"  # a code point that will never be a character, so no token spells it

# Where merges may not cross. `gpt4` keeps words, numbers up to three digits, punctuation and line
# ends apart; `line` lets a token span words but not lines; `none` lets it span anything.
SPLITS = {
    "gpt4": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
    "line": r"\n+[ \t]*|[^\n]+",
    "none": r"[\s\S]+",
}


class Tokenizer:
    """A tokenizer of any published kind: byte-level BPE, SentencePiece BPE or Unigram."""

    def __init__(self, inner: FastTokenizer, settings: Settings | None = None) -> None:
        """Wrap a `tokenizers.Tokenizer` and what stands beside it in its folder.

        Raises: CheckpointError if its tokens cannot become text again, or ordinary text breaks it.
        """
        settings = settings or Settings()
        self.inner = inner
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True  # text never becomes a control token
        known = {token.content: token for token in inner.get_added_tokens_decoder().values()}
        for name in sorted(settings.names()):
            token = known.get(name, AddedToken(name, normalized=False))
            if not token.special and inner.token_to_id(name) is not None:
                token.special = True
                inner.add_special_tokens([token])
        self.vocab_size = span(inner)
        added = inner.get_added_tokens_decoder()
        self.special = {i: token.content for i, token in added.items() if token.special}
        self.spelling = read_decoder(state(inner.decoder))
        singles = ((b, inner.token_to_id(name)) for b, name in self.spelling.byte_names().items())
        self.byte_ids = {byte: token_id for byte, token_id in singles if token_id is not None}
        self.settings, self.template = dict(settings.raw), settings.template
        self.bos, self.add_bos = self._beginning(settings)
        found = [self._id_of(settings.name("eos_token")), *settings.ends]
        self._ends = [i for i in found if i is not None and i < self.vocab_size]
        self._ends = self._ends or [i for i, name in self.special.items() if name == END_OF_TEXT]
        self.ends = frozenset(self._ends)
        self._readers = {(False, False): inner}
        with fenced("ordinary text breaks it"):
            self._spelled = self._specials_in_model()
            self.encode(PROBE)

    def _id_of(self, name: str | None) -> int | None:
        return None if name is None else self.inner.token_to_id(name)

    def _beginning(self, settings: Settings) -> tuple[int | None, bool]:
        """Return the id that begins a text, and whether it should be put there.

        What tokenizer.json says it puts around a text counts; only without that, the settings do.
        """
        bos = self._id_of(settings.name("bos_token"))
        for step in steps(state(self.inner.post_processor)):
            match step:
                case {"type": "TemplateProcessing", "single": [{"SpecialToken": first}, *_]}:
                    bos = self._id_of(first["id"])
                    return bos, bos is not None
                case {"type": "TemplateProcessing"}:
                    return bos, False
        return bos, settings.add_bos and bos is not None

    def _specials_in_model(self) -> dict[int, list[int]]:
        """Return, for each special token that the model itself would find in text, other ids.

        Unigram models hold their special tokens as pieces like any other. What stands for unknown
        characters is left out: it has to come from text.
        """
        model = self.inner.model
        unknown = [token.id for token in model.tokenize(NOBODY)]
        control = {
            token_id: name
            for token_id, name in self.special.items()
            if token_id not in unknown and model.token_to_id(name) == token_id
        }

        def _spell(text: str) -> list[int]:
            ids = [token.id for token in model.tokenize(text)]
            if control.keys().isdisjoint(ids):
                return ids
            if len(text) > 1:
                return _spell(text[:1]) + _spell(text[1:])
            return [self.byte_ids[b] for b in text.encode() if b in self.byte_ids] or unknown

        return {
            token_id: _spell(name)
            for token_id, name in control.items()
            if [token.id for token in model.tokenize(name)] == [token_id]
        }

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of every token; `piece` works out those of one."""
        return [self.piece(token_id) for token_id in range(self.vocab_size)]

    def piece(self, token_id: int) -> bytes:
        """Return the bytes of a token when it continues a text; of a special token, its name.

        Raises: DataError for an id outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise DataError(f"token id {token_id} is outside 0 … {self.vocab_size - 1}")
        name = self.inner.id_to_token(token_id) or ""  # an id may have no token
        return self._verbatim.get(token_id) or self.spelling.bytes_of(name)

    @cached_property
    def _verbatim(self) -> dict[int, bytes]:
        """The added tokens that are found in the text itself, not in its byte-level spelling."""
        inner, byte_level = self.inner, self.spelling.byte_level
        return {
            token_id: token.content.encode()
            for token_id, token in inner.get_added_tokens_decoder().items()
            if token.special or (byte_level and inner.model.token_to_id(token.content) is None)
        }

    @property
    def end_of_text(self) -> int:
        """The id that separates documents.

        Raises: CheckpointError if the tokenizer names none.
        """
        if not self._ends:
            raise CheckpointError(
                "the tokenizer has no end-of-text token; name one as eos_token in"
                " tokenizer_config.json"
            )
        return self._ends[0]

    @cached_property
    def flaw(self) -> str:
        """Why some text or bytes would not come back as they were; empty if all of them do."""
        inner, added = self.inner, self.inner.get_added_tokens_decoder()
        if missing := 256 - len(self.byte_ids):
            return f"lacks {missing} of the 256 bytes"
        if not self.spelling.byte_level or not isinstance(inner.model, models.BPE):
            return "is not byte-level BPE"
        if any(steps(state(inner.normalizer))):
            return "normalizes text"
        for step in steps(state(inner.pre_tokenizer)):
            match step:
                case {"type": "ByteLevel", "add_prefix_space": False} | {"type": "Digits"}:
                    pass
                case {"type": "Split", "behavior": behavior} if behavior != "Removed":
                    pass
                case _:
                    return f"changes text as it splits it ({step['type']})"
        for token_id, token in added.items():
            swallows = token.lstrip or token.rstrip
            if not token.special and (swallows or self.pieces[token_id] != token.content.encode()):
                return f"changes text around the token {token.content!r}"
        if self.decode_bytes(self.encode(PROBE)) != PROBE.encode():
            return "does not give back the text it is given"
        return ""

    @property
    def exact(self) -> bool:
        """Whether it gives back any text, and any bytes, as they were."""
        return not self.flaw

    def encode(self, text: str, continuing: bool = False) -> list[int]:
        """Return the ids of `text`; lone surrogates are kept as their three bytes.

        No space is put before a text that is `continuing` another.

        Raises: DataError if there are lone surrogates and no tokens for single bytes.
        """
        try:
            return self._read(self._reader(False, continuing), text)
        except (UnicodeEncodeError, TypeError):
            return self.encode_bytes(text.encode("utf-8", "surrogatepass"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts on all cores."""
        try:
            with fenced("the tokenizer fails on a text"):
                encoded = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):  # a lone surrogate somewhere
            return [self.encode(text) for text in texts]
        return [self._without_specials(encoding.ids) for encoding in encoded]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the ids of arbitrary bytes; those that are not UTF-8 become single-byte tokens.

        Raises: DataError if there are such bytes and no tokens for them.
        """
        return self._encode_runs(data, parse_special=False)

    def encode_template(self, text: str) -> list[int]:
        """Return the ids of text that a chat template made: special tokens in it count as such."""
        return self._encode_runs(text.encode("utf-8", "surrogatepass"), parse_special=True)

    def prompt(self, data: bytes) -> list[int]:
        """Return the ids of the beginning of a text, as the model was trained to see it."""
        ids = self.encode_bytes(data)
        wanted = [self.bos] if self.bos is not None and self.add_bos else []
        return ids if ids[:1] == wanted else wanted + ids

    def _encode_runs(self, data: bytes, *, parse_special: bool) -> list[int]:
        """Encode runs of valid UTF-8 as text, and the bytes between them one by one."""
        ids: list[int] = []
        for run in re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape")):
            if run and "\udc80" <= run[0] <= "\udcff":
                ids += [self._byte_id(ord(escape) - 0xDC00) for escape in run]
            elif run:
                ids += self._read(self._reader(parse_special, bool(ids)), run)
        return ids

    def _byte_id(self, byte: int) -> int:
        if byte not in self.byte_ids:
            raise DataError(
                f"byte 0x{byte:02X} is not UTF-8 and the tokenizer has no token for it; convert"
                " the text to UTF-8"
            )
        return self.byte_ids[byte]

    def _reader(self, parse_special: bool, continuing: bool) -> FastTokenizer:
        """Return the library's tokenizer for one way of reading, made when it is first needed."""
        way = (parse_special, continuing)
        if way not in self._readers:
            self._readers[way] = variant(
                self.inner, parse_special=parse_special, continuing=continuing
            )
        return self._readers[way]

    def _read(self, reader: FastTokenizer, text: str) -> list[int]:
        with fenced("the tokenizer fails on a text"):
            ids = reader.encode(text, add_special_tokens=False).ids
        return self._without_specials(ids) if reader.encode_special_tokens else ids

    def _without_specials(self, ids: list[int]) -> list[int]:
        """Spell out the special tokens that the model found in text."""
        if not self._spelled or self._spelled.keys().isdisjoint(ids):
            return ids
        return [other for i in ids for other in self._spelled.get(i, (i,))]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes of `ids`, the beginning of a text.

        A space that encoding puts before every text is taken off again.

        Raises: DataError for an id outside the vocabulary.
        """
        ids, pieces = list(ids), self.pieces
        for token_id in (min(ids, default=0), max(ids, default=0)):
            self.piece(token_id)  # all others lie between
        return b"".join([pieces[token_id] for token_id in ids]).removeprefix(self.spelling.lead)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @property
    def digest(self) -> str:
        """Identify the tokenizer by the sha256 of its definition."""
        return hashlib.sha256(self.inner.to_str().encode()).hexdigest()

    def to_json(self) -> str:
        """Return the tokenizer's definition, the content of a tokenizer.json."""
        return shorter(self.inner.to_str())

    def save(self, folder: Path, max_seq_len: int) -> None:
        """Write tokenizer.json, its settings and the chat template, as Hugging Face folders do.

        Settings that were loaded are kept, but for the length: that is the model's.
        """
        own = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT),
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        config = (self.settings or own) | {"model_max_length": max_seq_len}
        write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
        if self.template is not None:
            write_whole(folder / "chat_template.jinja", self.template)
        write_whole(folder / "tokenizer.json", self.to_json())  # last: now the others are there


class StreamDecoder:
    """Turn ids into text one at a time without ever splitting a character.

    They continue a text unless `start` says that they begin one. Special tokens show as their name.
    """

    def __init__(self, tokenizer: Tokenizer, start: bool = False) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.lead = tokenizer.spelling.lead if start else b""

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes: maybe none, maybe several characters."""
        data = self.tokenizer.piece(token_id)
        if data and self.lead:
            data, self.lead = data.removeprefix(self.lead), b""
        return self.utf8.decode(data)

    def flush(self) -> str:
        """Return what is left: U+FFFD if the stream ended inside a character."""
        return self.utf8.decode(b"", final=True)


def learn(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Learn merges from the first `config.sample_bytes` of `texts`.

    Little text yields fewer tokens than `config.vocab_size`: merges stop when no pair repeats.
    """
    inner = FastTokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[config.split]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    inner.train_from_iterator(_at_most(texts, config.sample_bytes), trainer)
    return Tokenizer(inner)


def _at_most(texts: Iterable[str], limit: int) -> Iterable[str]:
    """Yield texts until `limit` bytes have passed."""
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        yield data.decode("utf-8", "replace")
        if (limit := limit - len(data)) <= 0:
            return


def load_tokenizer(path: Path, exact: bool = False) -> Tokenizer:
    """Load a tokenizer.json, or the one in a folder, with the settings that stand beside it.

    `exact` demands one that gives back any text: what a model learns from must be the text itself.

    Raises: CheckpointError if it is missing, malformed, of an unsupported kind or not exact.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"no tokenizer at {file}; train one with `lm train-tokenizer`")
    # Only under its usual name does the file belong to what stands beside it.
    settings = read_settings(file.parent) if file.name == "tokenizer.json" else None
    try:
        definition = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} is not a tokenizer.json: {error}") from None
    try:
        with hushed():
            tokenizer = Tokenizer(parse(definition), settings)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    if exact and tokenizer.flaw:
        why = f"the tokenizer {tokenizer.flaw}, so a model would not learn from the text as it is"
        raise CheckpointError(f"{file}: {why}; train one with `lm train-tokenizer`")
    return tokenizer
