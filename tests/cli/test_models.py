"""Models through the command: import, show, verify, export, and generate as a model expects it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.checkpoint import load_model
from engine.errors import CheckpointError
from tests.cli.test_errors import failed
from tests.conftest import command_environment, make_model
from tests.engine.interop.folders import imported, leftovers, write_folder, write_gguf

LICENCE = "[bold]MIT[/bold] :smile: [/] [link=x]"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with a source of each form, and checkpoints/tiny."""
    folder = tmp_path_factory.mktemp("place")
    write_folder(folder / "hf [bold]", tokenizer)
    (folder / "hf [bold]" / "README.md").write_text(f"---\nlicense: {LICENCE}\n---\n")
    write_gguf(folder / "tiny.gguf", tokenizer)
    imported(folder / "hf [bold]", folder / "checkpoints" / "tiny")
    return folder


@pytest.fixture
def here(run, place):
    """Run a command in that folder."""
    return lambda *words, **options: run(*words, cwd=place, **options)


def test_import_says_what_came_of_it_and_what_next(run, place, tmp_path):
    result = run("import", place / "hf [bold]", "-o", "checkpoints/mine")
    assert result.code == 0 and result.out == ""
    total = sum(p.numel() for p in make_model().parameters())
    for part in (f"({total:,})", f"licence  {LICENCE}", "made checkpoints/mine", "chat -m mine"):
        assert part in result.err, result.err
    assert all(len(line) <= 100 for line in result.err.splitlines())
    assert run("verify", "mine").code == 0
    result = run("import", place / "tiny.gguf", "-o", "mine", "--json", "--dtype", "bf16")
    found = json.loads(result.out)
    assert found["schema"] == "lm/import/1" and found["bytes"] == 2 * total
    assert (found["parameters"], found["stored"]) == (total, "F32")
    assert leftovers(tmp_path)[0] == "checkpoints" and (tmp_path / "mine").is_dir()


def test_import_of_a_base_model_suggests_to_generate(run, tmp_path, tokenizer):
    write_folder(tmp_path / "base", tokenizer, template=None)
    result = run("import", "base", "-o", "out")
    assert "next: lm generate 'Once' -m out" in result.err
    result = run("import", "base", "-o", "checkpoints/quiet", "-q")
    assert result.code == 0 and result.out == result.err == ""


NAMES = ["with space", "größe 你好", "[bold]", "-dash", "a.b", "%s", "~nobody", "x\u202ey"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_every_kind(run, place, tmp_path, name):
    shutil.copytree(place / "hf [bold]", tmp_path / "in" / name)
    source, out = f"in/{name}", f"out/{name}"
    assert run("import", source, "-o", out).code == 0
    for words in (["verify"], ["show"], ["show", "--fit"], ["show", "--json"]):
        result = run(*words, out)
        assert result.code == 0 and result.out, result.err
    assert run("show", source).out.startswith(source)
    assert run("generate", "def", "-m", out, "--max-tokens", 3).code == 0
    assert run("export", out, "--to", "hf", "-o", f"sent/{name}").code == 0
    assert run("export", out, "--to", "gguf", "-o", f"sent/{name}.gguf").code == 0
    assert run("show", f"sent/{name}.gguf").code == 0


def test_import_refuses(run, place, tmp_path):
    source = place / "tiny.gguf"
    (tmp_path / "there").mkdir()
    failed(run("import", source, "-o", "there"), 2, "there exists", "-o")
    failed(run("import", source, "-o", ""), 2, "exists")
    failed(run("import", source), 2, "--out")
    failed(run("import", "nowhere", "-o", "x"), 3, "nowhere: no such file or folder", "pypi:NAME")
    failed(run("import", "n" * 5000, "-o", "x"), 3, "nnn")
    failed(run("import", source, "-o", "n" * 300), 4, "name too long")
    failed(run("import", source, "-o", "/proc/x"), 4, "/proc/x")
    failed(run("import", ".", "-o", "x"), 3, "config.json")
    failed(run("import", "pypi:a b", "-o", "x"), 2, "not the name of a package")
    failed(run("import", "hf:onlyname", "-o", "x"), 2, "hf:ORG/NAME")
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "binary.gguf").write_bytes(os.urandom(5000))
    (tmp_path / "folder.gguf").mkdir()
    with (tmp_path / "sparse.gguf").open("wb") as sparse:
        sparse.truncate(10**9)
    before = leftovers(tmp_path)
    for name in ("empty", "binary", "folder", "sparse"):
        for words in (["import", f"{name}.gguf", "-o", "a/b"], ["show", f"{name}.gguf"]):
            failed(run(*words), 3, f"{name}.gguf")
    assert leftovers(tmp_path) == before


def test_no_network(run, monkeypatch):
    """A package index that nobody answers for."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    failed(run("import", "pypi:lm-no-such-package", "-o", "x", "-q"), 4, "cannot be downloaded")
    failed(run("import", "hf:no/such", "-o", "x", "-q"), 4, "hf:")


def test_show_of_everything(here, place):
    """An imported model, a folder and a file that are not, all of the same shape."""
    found = []
    for name in ("tiny", "checkpoints/tiny", "hf [bold]", "tiny.gguf"):
        result = here("show", name)
        assert result.code == 0 and result.err == ""
        assert "2 layers × 32" in result.out and "vocabulary 400" in result.out, result.out
        found.append(json.loads(here("show", name, "--json", "--fit").out))
        assert found[-1]["schema"] == "lm/show/1"
    config = load_model(place / "checkpoints" / "tiny")[0].config
    total = sum(p.numel() for p in make_model().parameters())
    for facts in found:
        assert facts["config"]["d_model"] == config.d_model
        assert facts["parameters"]["total"] == total
        assert 4 * total <= facts["weight_bytes"] < 4 * total + 5000, "and a header"
        assert facts["fit"]["fits"] and facts["fit"]["largest_context"] == config.max_seq_len
        assert facts["fit"]["weights"] == 4 * total
    assert found[0]["manifest"]["source"]["origin"].endswith("hf [bold]")
    assert found[0]["tokenizer"]["tokens"] == 400 and found[0]["tokenizer"]["template"]


def test_show_writes_what_it_is_told_and_not_what_markup_makes_of_it(here):
    for name in ("tiny", "hf [bold]"):
        assert f"licence    {LICENCE}" in here("show", name).out.splitlines()
    assert here("show", "hf [bold]").out.startswith("hf [bold]  qwen3\n")


def test_show_of_tokens_that_look_like_markup(run, tmp_path, tokenizer):
    """Mistral's [INST] and [/INST] are tokens, and closing what was never opened is an error."""
    folder = write_folder(tmp_path / "m", tokenizer)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|im_end|>", "[/INST]"))
    ends = json.dumps({"eos_token_id": [0, 2]})
    (folder / "generation_config.json").write_text(ends)
    result = run("show", "m")
    assert result.code == 0 and "ends with <|endoftext|>, [/INST]" in result.out


def test_fit_says_when_it_does_not(here, monkeypatch):
    monkeypatch.setattr("engine.pages.free_memory", lambda: 10**6)
    result = here("show", "tiny", "--fit")
    assert result.code == 0 and "does not fit" in result.out
    needed = json.loads(here("show", "tiny", "--fit", "--json").out)["fit"]
    assert not needed["fits"] and needed["largest_context"] == 0
    room = needed["weights"] + needed["scratch"] + 7 * needed["kv_per_token"] + 1
    monkeypatch.setattr("engine.pages.free_memory", lambda: room)
    assert "up to a context of 7 tokens" in here("show", "tiny", "--fit").out


@pytest.fixture
def copy(place, tmp_path):
    """A checkpoint to do harm to."""
    shutil.copytree(place / "checkpoints" / "tiny", tmp_path / "checkpoints" / "copy")
    return tmp_path / "checkpoints" / "copy"


def test_verify_counts_and_finds_every_change(run, copy):
    result = run("verify", "copy")
    assert result.code == 0 and "7 files" in result.out and "every one matches" in result.out
    assert set(json.loads(run("verify", "copy", "--json").out)["files"]) == {
        file.name for file in copy.iterdir() if file.name != "manifest.json"
    }
    file = copy / "config.json"
    text = file.read_text()
    file.write_text(text + " ")
    failed(run("verify", "copy"), 3, "config.json", "instead of")
    file.write_text(text.replace("32", "33", 1))
    failed(run("verify", "copy"), 3, "config.json: its sha256 differs")
    file.unlink()
    failed(run("verify", "checkpoints/copy"), 3)
    file.write_text(text)
    (copy / "tokenizer.json").unlink()
    failed(run("verify", "copy"), 3, "tokenizer.json is missing")
    failed(run("verify", "nothing"), 3, "no checkpoint nothing", "copy")


def test_verify_hashes_large_files_and_nothing_else_does(run, tmp_path, tokenizer):
    """A single flipped byte near the end of 70 MB."""
    shape = {"vocab_size": 70_000, "d_model": 256, "n_layers": 1, "tie_embeddings": True}
    imported(write_folder(tmp_path / "m", tokenizer, **shape), tmp_path / "large")
    with (tmp_path / "large" / "model.safetensors").open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    failed(run("verify", "large"), 3, "model.safetensors: its sha256 differs")
    assert run("generate", "x", "-m", "large", "--max-tokens", 1).code == 0


def test_a_damaged_manifest(run, copy):
    for text in ("[]", '{"step": 0, "files": {"x": 1}}', '{"step": 0, "files": ["x"]}', "{"):
        (copy / "manifest.json").write_text(text)
        for command in ("verify", "show"):
            failed(run(command, "copy"), 3, "manifest.json")


def test_export_says_where_and_what_next(here, tmp_path):
    result = here("export", "tiny", "--to", "gguf", "-o", tmp_path / "x.gguf", "--dtype", "q8_0")
    assert result.code == 0 and result.out == ""
    assert f"wrote {tmp_path}/x.gguf" in result.err and "next: llama-cli -m" in result.err
    result = here("export", "tiny", "--to", "hf", "-o", tmp_path / "x", "--json")
    found = json.loads(result.out)
    assert found["out"] == f"{tmp_path}/x" and found["bytes"] == 4 * 52416
    failed(here("export", "tiny", "--to", "hf", "-o", tmp_path / "x"), 2, "exists")
    failed(here("export", "tiny", "--to", "hf", "--dtype", "q4_0"), 2, "q4_0 is for --to gguf")
    failed(here("export", "tiny", "--to", "gguf", "-o", "/proc/x"), 4, "/proc/x")
    failed(here("export", "nothing", "--to", "gguf"), 3, "no checkpoint nothing", "tiny")
    failed(here("export", "tiny", "--to", "onnx"), 2, "onnx")


def test_export_by_default_lands_here_under_a_telling_name(run, copy, tmp_path):
    assert run("export", "copy", "--to", "gguf").code == 0
    assert run("export", "checkpoints/copy", "--to", "hf").code == 0
    assert (tmp_path / "copy-f16.gguf").is_file() and (tmp_path / "copy-hf").is_dir()


def test_export_says_which_tensors_stay_wider(run, tmp_path, tokenizer):
    imported(write_folder(tmp_path / "m", tokenizer, d_model=48), tmp_path / "odd")
    result = run("export", "odd", "--to", "gguf", "--dtype", "q4_0")
    assert result.code == 0 and "kept as f16" in result.err


def bos_model(folder: Path, tokenizer, add: bool) -> Path:
    """A model whose texts begin with <|im_start|>, if `add`."""
    write_folder(folder / "source", tokenizer)
    file = folder / "source" / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"bos_token": "<|im_start|>", "add_bos_token": add}
    file.write_text(json.dumps(settings))
    return imported(folder / "source", folder / "model")


@pytest.mark.parametrize("add", [True, False])
def test_a_text_begins_with_one_bos_if_the_model_says_so(run, tmp_path, tokenizer, add):
    bos_model(tmp_path, tokenizer, add)
    bos = tokenizer.inner.token_to_id("<|im_start|>")

    def ids(*words, **options):
        return json.loads(run(*words, "-m", "model", "--show-prompt", "--json", **options).out)[
            "ids"
        ]

    text = tokenizer.encode("def f")
    assert ids("generate", "def f") == [bos] * add + text
    assert ids("generate", stdin=b"def f") == [bos] * add + text
    # The text of the token is text, not the token, and does not stand in for it.
    spelled = tokenizer.encode("<|im_start|>def f")
    assert bos not in spelled
    assert ids("generate", "<|im_start|>def f") == [bos] * add + spelled
    # The template writes one itself.
    assert ids("generate", "--chat", "def f").count(bos) == 2, "user and assistant, no third"
    assert ids("generate", "--chat", "def f")[0] == bos
    found = json.loads(run("generate", "x", "-m", "model", "--json", "--max-tokens", 1).out)
    assert found["prompt_tokens"] == len(tokenizer.encode("x")) + add


def test_generate_answers_a_message(here, tmp_path):
    words = ["-m", "tiny", "--temperature", 0, "--seed", 1, "--max-tokens", 8, "--json"]
    found = json.loads(here("generate", "--chat", "hello", *words).out)
    (tmp_path / "m.json").write_text(json.dumps([{"role": "user", "content": "hello"}]))
    assert json.loads(here("generate", "--messages", tmp_path / "m.json", *words).out) == found
    assert json.loads(here("generate", "--chat", *words, stdin=b"hello\n").out) == found
    other = json.loads(here("generate", "--chat", "hello", "--system", "Be brief.", *words).out)
    assert other["prompt_tokens"] > found["prompt_tokens"]
    result = here(
        "generate", "--chat", "hello", "--system", "Be brief.", "-m", "tiny", "--show-prompt"
    )
    text, ids = result.out.rsplit("\n", 2)[:2]
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert len(ids.split()) == other["prompt_tokens"]


def test_variables_reach_the_template(run, tmp_path, tokenizer):
    template = "{{ mood }} {{ level + 1 }} {{ messages[0].content }}"
    write_folder(tmp_path / "m", tokenizer, template=template)
    imported(tmp_path / "m", tmp_path / "model")
    words = ["generate", "--chat", "hi", "-m", "model", "--show-prompt"]
    result = run(*words, "--var", "mood=good", "--var", "level=2")
    assert result.out.startswith("good 3 hi\n")
    failed(run(*words, "--var", "mood"), 2, "not KEY=VALUE")


def test_options_that_would_be_ignored_are_refused(here, tmp_path):
    (tmp_path / "m.json").write_text('[{"role": "user", "content": "x"}]')
    messages = ["--messages", tmp_path / "m.json"]
    failed(here("generate", "x", "-m", "tiny", "--system", "y"), 2, "--system", "--chat")
    failed(here("generate", "x", "-m", "tiny", "--var", "a=1"), 2, "--var", "--chat")
    failed(here("generate", "x", "-m", "tiny", *messages), 2, "--messages and a prompt")


MESSAGES = {
    "{": "not valid JSON",
    "[]": "no messages",
    "7": "a conversation is a list",
    '[{"role": "user"}]': "message 1",
    '[{"role": "user", "content": "a"}, {"content": "b"}]': "message 2",
    "[" * 50_000: "not valid JSON",
}


@pytest.mark.parametrize("text", MESSAGES, ids=range(len(MESSAGES)))
def test_messages_that_are_none(here, tmp_path, text):
    (tmp_path / "m.json").write_text(text)
    failed(here("generate", "-m", "tiny", "--messages", tmp_path / "m.json"), 3, MESSAGES[text])


def test_half_a_surrogate_pair_in_a_message(here, tmp_path):
    (tmp_path / "m.json").write_text('[{"role": "user", "content": "a\\ud800b"}]')
    words = ["generate", "-m", "tiny", "--messages", tmp_path / "m.json"]
    assert here(*words, "--show-prompt").code == 0
    assert here(*words, "--show-prompt", "--json").code == 0
    assert here(*words, "--max-tokens", 2).code == 0


def test_a_base_model_is_named_with_a_way_out(run, tmp_path, tokenizer):
    imported(write_folder(tmp_path / "m", tokenizer, template=None), tmp_path / "base")
    for words in (
        ["generate", "--chat", "x"],
        ["generate", "--chat", "x", "--show-prompt"],
        ["chat"],
    ):
        failed(run(*words, "-m", "base"), 3, "base: has no chat template", "lm generate")


EVIL = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch evil') }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for m in messages %}{{ m.content",
    "{% include '/etc/passwd' %}",
]


@pytest.mark.parametrize("template", EVIL, ids=range(len(EVIL)))
def test_a_template_that_reaches_for_more(run, tmp_path, tokenizer, template):
    """It is brought in as text, and fails when it is filled in."""
    imported(write_folder(tmp_path / "m", tokenizer, template=template), tmp_path / "evil-model")
    for words in (["generate", "--chat", "x"], ["chat"]):
        failed(run(*words, "-m", "evil-model", stdin=b"x\n"), 3, "chat template cannot be used")
    assert not (tmp_path / "evil").exists()


def in_a_shell(script: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", script.replace("lm ", f"{sys.executable} -m cli.main ")],
        cwd=folder,
        env=command_environment(folder),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        timeout=100,
    )


def test_a_reader_that_goes_away_is_no_error(place):
    for words in ("show tiny", "generate x -m tiny --max-tokens 60", "show tiny --json"):
        done = in_a_shell(f"lm {words} | head -c 1 >/dev/null; echo ${{PIPESTATUS[0]}}", place)
        assert done.stdout.strip() in ("0", "141") and "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_for_the_output(place):
    for words in ("show tiny", "verify tiny --json", "generate x -m tiny"):
        done = in_a_shell(f"lm {words} > /dev/full", place)
        assert done.returncode == 4 and "Traceback" not in done.stderr, done.stderr


def test_what_cannot_be_loaded_cannot_be_imported(place, tmp_path):
    """The control of it all: the same file, whole, is taken."""
    data = (place / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=r"cut\.gguf"):
        imported(tmp_path / "cut.gguf", tmp_path / "out")
    (tmp_path / "cut.gguf").write_bytes(data)
    assert imported(tmp_path / "cut.gguf", tmp_path / "out").is_dir()
