"""Tokenizers of every kind that published models ship, learned in-process, and hostile strings.

Each has the normalizer, pre-tokenizer, model settings, decoder and added tokens of the family it is
named after; only the vocabulary is small. Sources: the tokenizer.json of each family.
"""

import json
import random
import unicodedata
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.conftest import TEXT

# Where GPT-2, Llama 3 (and OLMo 2), Qwen and Phi/GPT-4-like tokenizers let merges end.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
CORPUS = [
    *TEXT.splitlines(keepends=True),
    *["Straße, naïve café, Ĳssel: 日本語と中文。 Привет, мир! مرحبا بالعالم नमस्ते 한국어 😀👩‍👩‍👧 "]
    * 20,
    *["    for i in range(1234567):\n\n\n\t\treturn  x == 3.14159\r\n"] * 20,
]

LACKING = "Àñóđ"  # the stand-ins of the bytes 0xC0, 0xF1, 0xF3 and 0x11


def _byte_level(split=None, normalizer=None, special=(), ignore_merges=False, **options):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer:
        tokenizer.normalizer = normalizer
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=split is None, **options
    )
    tokenizer.pre_tokenizer = (
        byte_level
        if split is None
        else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), byte_level])
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def gpt2():
    return _byte_level(special=["<|endoftext|>"])


def llama3():
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer = _byte_level(LLAMA3, special=special, ignore_merges=True)
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[(special[0], tokenizer.token_to_id(special[0]))],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return tokenizer


def qwen():
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_level(QWEN, normalizers.NFC(), special)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), "<think>"])
    return tokenizer


def smollm():
    """SmolLM2: digits one by one, and not even all bytes; here it lacks four of them."""
    tokenizer = _byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), tokenizer.pre_tokenizer]
    )
    definition = json.loads(tokenizer.to_str())
    names = [name for name in definition["model"]["vocab"] if name not in LACKING]
    definition["model"]["vocab"] = {name: token_id for token_id, name in enumerate(names)}
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


def phi():
    """Phi and GPT-NeoX: runs of spaces are added tokens that are not special."""
    tokenizer = _byte_level(special=["<|endoftext|>"])
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(31, 1, -1)])
    tokenizer.add_tokens([AddedToken("\t\t", normalized=False), AddedToken("é¡", normalized=False)])
    return tokenizer


def _sentencepiece(tokenizer, special=("<unk>", "<s>", "</s>"), pieces=()):
    """Learn SentencePiece-like merges: over words that begin with `▁`, with byte tokens."""
    learner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=names, limit_alphabet=150, show_progress=False
    )
    learner.train_from_iterator(["▁▁▁▁ ▁▁ ▁▁", *CORPUS], trainer)
    learned = json.loads(learner.to_str())["model"]
    tokenizer.model = models.BPE(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    bos = "<bos>" if "<bos>" in special else "<s>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


LLAMA2_DECODER = [
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
]


def llama2():
    """Llama 2 and Mistral 7B v0.1: the prefix is a normalizer's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(LLAMA2_DECODER)
    return _sentencepiece(tokenizer)


def mistral(scheme="first"):
    """Mistral from v0.2 on: the prefix is a pre-tokenizer's, before the first word only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = LLAMA2_DECODER if scheme != "never" else LLAMA2_DECODER[:-1]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer = _sentencepiece(tokenizer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), "<code>"])
    return tokenizer


def phi3():
    """Phi-3: Llama 2's, and special tokens that take the white space after them."""
    tokenizer = llama2()
    for name in ("<|user|>", "<|assistant|>", "<|end|>"):
        tokenizer.add_special_tokens([AddedToken(name, rstrip=True, normalized=False)])
    return tokenizer


def gemma():
    """Gemma 2 and 3: no prefix; runs of line ends and spaces are added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(LLAMA2_DECODER[:-1])
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    added = ["\n\n", "\n\n\n", "▁▁", "▁▁▁▁", "<table>", "</table>"]
    tokenizer = _sentencepiece(tokenizer, special, pieces=added)
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in added])
    return tokenizer


def _unigram(special, unknown, normalizer, words=True):
    """Learn Unigram pieces; the special tokens are pieces like any other, as published."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizer
    metaspace = pre_tokenizers.Metaspace("▁", prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
        if words
        else metaspace
    )
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=special, unk_token=unknown, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return tokenizer


def t5():
    collapse = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer = _unigram(["<pad>", "</s>", "<unk>", "<extra_id_0>"], "<unk>", collapse)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer


def xlm_roberta():
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = _unigram(special, "<unk>", normalizers.NFKC(), words=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")],
    )
    return tokenizer


def albert():
    """ALBERT and T5's pieces with SentencePiece's byte fallback."""
    tokenizer = t5()
    definition = json.loads(tokenizer.to_str())
    model = definition["model"]
    model["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    model["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    tokenizer.normalizer = normalizers.Replace(Regex("\r"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁")])
    return tokenizer


BYTE_LEVEL = {make.__name__: make for make in (gpt2, llama3, qwen, smollm, phi)}
SENTENCEPIECE = {make.__name__: make for make in (llama2, mistral, phi3, gemma)} | {
    "mistral_always": lambda: mistral("always"),
    "mistral_never": lambda: mistral("never"),
}
UNIGRAM = {make.__name__: make for make in (t5, xlm_roberta, albert)}
KINDS = BYTE_LEVEL | SENTENCEPIECE | UNIGRAM

SPECIAL_LOOKING = [
    *("<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<mask>", "<extra_id_0>", "<0x41>"),
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<|end|>"),
    *("<tool_call>", "<think>", "<tool>", "<code>", "<table>", "<start_of_turn>", "<|user|>"),
    *("▁", "▁▁", "é¡", "Ġ", "Ċ", "##", "</w>", "<0xFF>", "\u2047"),
]
SNIPPETS = [
    *("the", " quick", "Hello", " world", "def f(x):\n    return x\n", "it's", " 3.14", "12345678"),
    *("日本語", "한국어", "नमस्ते", "مرحبا", "שלום", "Привет", "Ελλάδα", "ไทย", "\u1100\u1161\u11a8"),
    *("é", "e\u0301", "a\u0323\u0307", "ﬁ", "½", "Å", "ẛ̣", "\u0344", "İ", "ß", "ŉ", "\u2126"),
    *("😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇫🇷", "\U000e0067", "\ufe0f", "\u200d", "\u20e3"),
    *("\u202e", "\u2066", "\u200f", "\ufeff", "\u200b", "\u00ad", "\u2028", "\u2029", "\x85"),
    *("\0", "\x01", "\x11", "\x1b[31m", "\x7f", "\x9f", "\r\n", "\n", "\n\n\n", "\t", "\t\t\t"),
    *(" ", "  ", "   ", "        ", "\u00a0", "\u3000", "\u2003", "\u1680", "\u180e", "\u205f"),
    *("\ufffd", "\ufffe", "\U0001ffff", "\U0010ffff", "\ue000", "\U000f0000", "\U00040000"),
    *("http://a.b/c?d=e&f#g", "{'k': [1, 2]}", '<a href="x">', "\\", "$x^2$", "--", "...", "!?"),
]


def hostile(count: int, seed: int = 0) -> list[str]:
    """Strings of all planes, of what normalizers and splits trip over, and of special names."""
    draw = random.Random(seed)

    def character() -> str:
        top = draw.choice((0x80, 0x250, 0x3000, 0xD800, 0x10000, 0x20000, 0x110000))
        code = draw.randrange(top)
        return "\ufffc" if 0xD800 <= code < 0xE000 else chr(code)

    def part() -> str:
        kind = draw.randrange(10)
        if kind < 4:
            return draw.choice(SNIPPETS)
        if kind < 6:
            return draw.choice(SPECIAL_LOOKING)
        if kind < 8:
            return "".join(character() for _ in range(draw.randrange(1, 5)))
        if kind < 9:
            return draw.choice([*SNIPPETS, *SPECIAL_LOOKING, character()]) * draw.randrange(2, 40)
        word = draw.choice(CORPUS)
        start = draw.randrange(len(word))
        return word[start : start + draw.randrange(1, 30)]

    strings = ["", " ", "  ", "\n", " \n ", "\0", "▁", " ▁ ", "a", " a", "  a", "a ", *SNIPPETS]
    strings += [*SPECIAL_LOOKING, *(f" {name} x" for name in SPECIAL_LOOKING), "x" * 5000]
    while len(strings) < count:
        text = "".join(part() for _ in range(draw.randrange(1, 9)))
        form = draw.choice(("", "", "NFC", "NFD", "NFKD"))
        strings.append(unicodedata.normalize(form, text) if form else text)
    return strings


def write(folder: Path, tokenizer: Tokenizer, **settings) -> Path:
    """Write a folder as it is published: tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    return folder
