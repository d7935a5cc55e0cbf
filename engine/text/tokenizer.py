"""Text to token ids and back, exactly: byte-level BPE, learned here or loaded from a folder.

Any bytes survive the round trip, because the 256 single bytes are tokens too. Text that looks like
a special token stays text; special ids are only ever put in by the program. Next on the arrow:
`engine/data/pack.py`.

Source: Sennrich et al. 2016, arXiv:1508.07909 (byte-pair encoding); Radford et al. 2019 (bytes).
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from engine.config import TokenizerConfig
from engine.errors import CheckpointError, DataError
from engine.files import write_whole

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")

PROBE = "hello  World e\u0301 \ufb01 \u00e9 <|endoftext|>\n\t1234"

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


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's map from printable stand-in characters to the bytes they stand for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}


class Tokenizer:
    """A byte-level BPE tokenizer over a `tokenizer.json`."""

    def __init__(self, inner: FastTokenizer) -> None:
        """Wrap a loaded `tokenizers.Tokenizer`.

        Raises: CheckpointError if it is not byte-level, changes text before it encodes it, or has
        no end-of-text token.
        """
        self.inner = inner
        inner.no_truncation()
        inner.no_padding()
        self.inner.encode_special_tokens = True  # text never becomes a control token
        self.special = {i: token.content for i, token in inner.get_added_tokens_decoder().items()}
        self.vocab_size = inner.get_vocab_size()
        stand_in = _byte_alphabet()
        self.pieces: list[bytes] = []  # the bytes of every token id
        for token_id in range(self.vocab_size):
            token = inner.id_to_token(token_id) or ""
            if token_id in self.special:
                self.pieces.append(token.encode())
                continue
            try:
                self.pieces.append(bytes(stand_in[character] for character in token))
            except KeyError:
                raise CheckpointError(
                    f"token {token_id} {token!r} is not byte-level BPE, the only supported kind"
                ) from None
        self.byte_ids = {p[0]: i for i, p in enumerate(self.pieces) if len(p) == 1}
        if len(self.byte_ids) < 256:
            raise CheckpointError(f"tokenizer lacks {256 - len(self.byte_ids)} of the 256 bytes")
        names = {content: token_id for token_id, content in self.special.items()}
        if END_OF_TEXT not in names:
            raise CheckpointError(f"tokenizer has no {END_OF_TEXT} token")
        self.end_of_text = names[END_OF_TEXT]
        # A normalizer or an added prefix space would change text on the way in.
        if self.decode_bytes(self.encode(PROBE)) != PROBE.encode():
            raise CheckpointError("the tokenizer does not give back the text it is given")

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; lone surrogates are kept as their three bytes."""
        try:
            return self.inner.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):
            return self.encode_bytes(text.encode("utf-8", "surrogatepass"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts on all cores."""
        try:
            encoded = self.inner.encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):  # a lone surrogate somewhere
            return [self.encode(text) for text in texts]
        return [encoding.ids for encoding in encoded]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the ids of arbitrary bytes; those that are not UTF-8 become single-byte tokens."""
        ids: list[int] = []
        for run in re.split("([\udc80-\udcff]+)", data.decode("utf-8", "surrogateescape")):
            if run and "\udc80" <= run[0] <= "\udcff":
                ids += [self.byte_ids[ord(escape) - 0xDC00] for escape in run]
            elif run:
                ids += self.inner.encode(run, add_special_tokens=False).ids
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes of `ids`. Raises: DataError for an id outside the vocabulary."""
        data = []
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise DataError(f"token id {token_id} is outside 0 … {self.vocab_size - 1}")
            data.append(self.pieces[token_id])
        return b"".join(data)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @property
    def digest(self) -> str:
        """Identify the tokenizer by the sha256 of its definition."""
        return hashlib.sha256(self.inner.to_str().encode()).hexdigest()

    def to_json(self) -> str:
        """Return the tokenizer's definition, the content of a tokenizer.json."""
        return self.inner.to_str(pretty=True)

    def save(self, folder: Path, max_seq_len: int) -> None:
        """Write tokenizer.json and tokenizer_config.json, as Hugging Face folders hold them."""
        write_whole(folder / "tokenizer.json", self.to_json())
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_seq_len,
        }
        write_whole(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")


class StreamDecoder:
    """Turn ids into text one at a time without ever splitting a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes: maybe none, maybe several characters."""
        return self.utf8.decode(self.tokenizer.decode_bytes([token_id]))

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
        limit -= len(data)
        if limit <= 0:
            return


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json, or the one in a folder.

    Raises: CheckpointError if it is missing, malformed or of an unsupported kind.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"no tokenizer at {file}; train one with `lm train-tokenizer`")
    try:
        inner = FastTokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001 (the library raises nothing more specific)
        raise CheckpointError(f"{file} is not a tokenizer.json: {error}") from None
    try:
        return Tokenizer(inner)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
