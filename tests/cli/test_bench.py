"""`lm bench` as a person calls it: tables, JSON, records, verdicts, refusals, Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from engine.bench import measure as measuring
from engine.bench.subject import Subject
from engine.errors import ResourceError
from tests.conftest import command_environment

TINY = ["smoke", "run.kernels=torch", "--tokens", "4", "--repeats", "4", "--threads", "1"]


@pytest.fixture(autouse=True)
def _known_limits(monkeypatch):
    monkeypatch.setattr(measuring, "memory_bandwidth", lambda *_: 1e10)
    monkeypatch.setattr(measuring, "matmul_peaks", lambda *_: {"fp32": 1e11, "bf16": 2e11})


def test_everything_of_a_recipe_in_80_columns(run):
    grid = ["--prompt", "16", "--depth", "0,32", "--batch", "1,2", "--repeats", "2"]
    money = ["--watts", "65", "--price-kwh", "0.30"]
    result = run("bench", *TINY, *grid, *money)
    assert result.code == 0, result.err
    assert max(len(line) for line in result.out.splitlines()) <= 80
    for word in ("prefill", "decode", "batch", "kv", "train", "of memory", "backward", "API"):
        assert word in result.out
    assert "without its cache a token at 32 takes" in result.out
    assert "random weights and tokens" in result.err and "8/8 train 8 × 64" in result.err


def test_a_checkpoint_as_json_and_recorded(run, tmp_path):
    trained = run("train", "smoke", "train.steps=1", "model.d_model=16", "-q")
    assert trained.code == 0, trained.err
    words = ["-m", "smoke", "--what", "load,decode", "--depth", "8", "--record", "r.jsonl"]
    result = run("bench", *TINY[2:], *words, "--json", "-q")
    assert result.code == 0 and result.err == ""
    found = json.loads(result.out)
    assert found["schema"] == "lm/bench/1" and found["machine"]["torch"]
    decode, load = found["cases"]
    assert (decode["what"], load["what"]) == ("decode", "load")
    assert decode["share_of_bandwidth"] == pytest.approx(
        decode["rate"] * decode["bytes_per_token"] / 1e10
    )
    assert sum(load["stages"].values()) == pytest.approx(load["seconds"], rel=0.1)
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(line["case"]["what"], line["number"]) for line in lines] == [
        (what, number) for what in ("decode", "load") for number in (1, 2, 3, 4)
    ]


def test_compare_pairs_fails_when_told_and_only_then(run, tmp_path):
    words = ["--what", "decode", "--depth", "0,8", "--record"]
    assert run("bench", *TINY, *words, "a.jsonl").code == 0
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["rate"] = 100.0 + number
    slower = [row | {"rate": row["rate"] / 2} for row in rows if row["case"]["depth"] == 8]
    for name, kept in (("a", rows), ("b", slower)):
        text = "".join(json.dumps(row) + "\n" for row in kept)
        (tmp_path / f"{name}.jsonl").write_text(text)
    plain = run("bench", "compare", "a.jsonl", "b.jsonl")
    assert plain.code == 0 and "slower" in plain.out and "-50.0 %" in plain.out
    assert "only in A: decode at 0" in plain.out
    assert max(len(line) for line in plain.out.splitlines()) <= 80
    failed = run("bench", "compare", "a.jsonl", "b.jsonl", "--fail-if-slower", "3%", "--json")
    assert failed.code == 7 and "slower by more than 3%: decode at 8" in failed.err
    found = json.loads(failed.out)
    assert found["schema"] == "lm/bench/compare/1"
    assert [case["verdict"] for case in found["cases"]] == ["slower"]
    assert run("bench", "compare", "a.jsonl", "b.jsonl", "--fail-if-slower", "60%").code == 0
    assert run("bench", "compare", "a.jsonl", "a.jsonl", "--fail-if-slower", "0%").code == 0


def test_formats_stand_beside_each_other_and_torch(run, library):
    """Each by its name, what torch has not left out; a record tells them apart."""
    words = ["--what", "decode,kv", "--depth", "8", "--repeats", "1", "--kernels", "auto,torch"]
    grid = [*words, "--dtype", "auto,fp32,int8", "--record", "a.jsonl"]
    result = run("bench", *TINY, *grid)
    assert result.code == 0, result.err
    for who in ("native fp32", "torch fp32", "native int8"):
        assert f"at 8 {who}" in result.out and re.search(
            rf"decode at 8, {who}: .+ tok/s", result.err
        )
    assert "generated: native int8, keys and values in fp16" in result.out
    assert "generated: torch fp32, keys and values in fp32" in result.out
    assert "torch int8" not in result.out
    assert result.err.count("is what auto took; measured once") == 6
    assert max(len(line) for line in result.out.splitlines()) <= 80
    one = [*words[:6], "--dtype", "int8", "-q", "--record"]
    for file, way in (("b.jsonl", ["--kv", "fp16"]), ("c.jsonl", ["--kv", "int8"])):
        assert run("bench", *TINY, *one, file, *way).code == 0
    found = json.loads(run("bench", "compare", "b.jsonl", "c.jsonl", "--json").out)
    assert found["differs"] == {"kv": ["fp16", "int8"]}
    found = json.loads(run("bench", "compare", "a.jsonl", "b.jsonl", "--json").out)
    assert [case["dtype"] for case in found["cases"]] == ["int8"] * 3 and not found["differs"]


def test_other_settings_are_another_case_and_one_precision_is_one(run, tmp_path):
    step = ["--what", "train", "--repeats", "1"]
    result = run("bench", *TINY, *step, "--dtype", "auto,fp32", "--record", "a.jsonl")
    assert result.code == 0 and "1/2 train 8 × 64" in result.err, result.err
    assert "train 8 × 64: fp32 is what auto took; measured once" in result.err
    other = ["train.optim.name=adamw", "--record", "b.jsonl", "-q"]
    assert run("bench", *TINY, *step, *other).code == 0
    words = ["bench", "compare", "a.jsonl", "b.jsonl"]
    found = json.loads(run(*words, "--json").out)
    assert found["differs"] == {
        "settings": ["as usual", "train.optim.lr=0.002, train.optim.name=adamw"]
    }
    # Both in one file, they are two cases, each with what is its own in its name.
    both = (tmp_path / "a.jsonl").read_text() + (tmp_path / "b.jsonl").read_text()
    (tmp_path / "a.jsonl").write_text(both)
    shown = run(*words).out
    assert "only in A: train 8 × 64\n" in shown and "settings:" not in shown
    assert "train.optim.name=adamw" in shown and max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    "words, code, said",
    [
        (["--what", "prefil"], 2, "did you mean prefill?"),
        (["--what", "load"], 2, "needs a checkpoint"),
        (["--depth", "8..x"], 2, "--depth 8..x"),
        (["--depth", "4000"], 6, "exceed the context of 256"),
        (["--tokens", "300", "--what", "batch"], 6, "leave no room"),
        (["--threads", "2000"], 2, "at most 1024"),
        (["--dtype", "fp64"], 2, "'fp64' is not one of auto, bf16, fp32, int4, int8"),
        (["--kernels", "c"], 2, "--kernels 'c' is not one of auto, torch"),
        (["--kv", "bf16"], 2, "--kv 'bf16' is not one of auto, fp16, fp32, int8"),
        (["--kernels", "torch", "--dtype", "int4"], 2, "torch has none of it"),
        (["--record", "no/r.jsonl"], 4, "no/r.jsonl: cannot be written"),
        (["--plot", "x.gif"], 2, "must end in .png or .svg"),
        (["--watts", "65"], 2, "both --watts and --price-kwh"),
        (["data.seq_len=512", "--what", "train"], 2, "seq_len"),
        (["model.n_layers=1000", "model.d_model=4096"], 4, "are free"),
    ],
    ids=str,
)
def test_refusals_are_one_line_before_anything_is_measured(run, words, code, said):
    result = run("bench", *TINY, *words, "-q")
    assert (result.code, result.out) == (code, ""), result.err
    assert said in result.err and result.err.count("\n") == 1


def test_what_bench_lacks_is_said(run, tmp_path):
    assert run("bench").code == 2
    (tmp_path / "bad.jsonl").write_text("{}\n")
    result = run("bench", "compare", "bad.jsonl", "bad.jsonl")
    assert result.code == 3 and "bad.jsonl:1: not a record" in result.err
    assert run("bench", "compare", "x", "y", "--fail-if-slower", "much").code == 2


def test_a_picture_is_drawn(run, tmp_path):
    pytest.importorskip("matplotlib")
    words = ["--what", "prefill,decode,train", "--prompt", "8", "--depth", "8", "--plot", "p.png"]
    result = run("bench", *TINY, *words)
    assert result.code == 0 and (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_ends_the_measuring_and_not_the_table(run):
    """Nothing at all was shown of what had been measured."""
    words = ["--what", "decode", "--depth", "0", "--record", "/dev/full"]
    result = run("bench", *TINY, *words, "-q")
    assert result.code == 4 and "decode at 0" in result.out and "of memory" in result.out
    stopped, error = result.err.splitlines()
    assert stopped.startswith("stopped: 1 of 1 cases")
    assert error.startswith("error: /dev/full: cannot be written: No space left")


def test_what_fails_later_keeps_what_was_measured_before(run, monkeypatch):
    """The same for an error of the second case: memory that does not suffice."""

    def loaded(self, case, real=Subject.loaded):
        if case.dtype == "fp32":
            raise ResourceError("no room")
        return real(self, case)

    monkeypatch.setattr(Subject, "loaded", loaded)
    words = ["--what", "decode", "--depth", "0", "--dtype", "bf16,fp32", "-q"]
    result = run("bench", *TINY, *words)
    assert result.code == 4 and "decode at 0" in result.out
    assert result.err.splitlines()[-1] == "error: no room"


def test_ctrl_c_tells_what_was_measured_and_leaves_whole_lines(tmp_path):
    words = ["smoke", "--what", "decode,kv", "--depth", "0,64", "--repeats", "1000"]
    words += ["--record", "r.jsonl"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "bench", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=command_environment(tmp_path),
    )
    record, end = tmp_path / "r.jsonl", time.monotonic() + 400  # a busy machine is slow to start
    while time.monotonic() < end and not (record.is_file() and record.stat().st_size > 20000):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 130, err.decode()
    assert b"stopped: 1 of 4 cases" in err and b"decode at 0" in out
    assert b"Traceback" not in err
    lines = record.read_text().splitlines()
    assert len(lines) > 3 and all(json.loads(line)["rate"] > 0 for line in lines)
