"""R1: one curve, however the rows of a step are laid out, kept for the gradient, or shared out."""

import json

import pytest
import torch

from engine.data.packing import best_fit
from tests.conftest import TEXT
from tests.engine.finetune.bases import rows, write_base, write_rows

# Every step sees the same eight rows, so nothing but the way to compute it can differ.
RECIPE = """
data: {{train: {data}, valid: {data}, seq_len: 48, chat: plain, replay: {kept}}}
train:
  {{base: {base}, steps: 6, batch_size: 8, schedule: {{warmup: 2}},
  optim: {{name: adamw, lr: 0.003, embed_lr: 0.003, head_lr: 0.003, eps: 1.0e-8}}}}
eval: {{every: 7, bytes: 300, final_bytes: 300}}
run: {{threads: 1}}
"""
ALONE = ("data.packing=false",)
PACKED = ("train.batch_size=4",)  # the eight rows fill four packs
WAYS = {
    "8 x 1": (*ALONE, "train.accumulate=8"),
    "packed": PACKED,
    "recompute": (*ALONE, "train.recompute=true"),
    "2 processes": (*ALONE, "train.accumulate=8", "train.processes=2"),
    "all of it": (*PACKED, "train.accumulate=2", "train.recompute=true", "train.processes=2"),
}
# What is not the same run must be seen to differ: prompts learned too, or other random numbers.
CONTROLS = {"full": (*ALONE, "data.learn=all"), "lora": (*ALONE, "run.seed=5")}
KINDS = {"full": (), "lora": ("train.lora.rank=4", "train.optim.lr=0.01")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_compute_a_step_draws_one_curve(run, tmp_path, tokenizer, kind):
    """1 x 8 is what all are compared with, through the command: losses and gradient norms."""
    made = rows(8)
    encoded = [map(len, map(tokenizer.encode, row.values())) for row in made]
    lengths = [sum(sizes) + 1 for sizes in encoded]
    assert max(lengths) > 2 * min(lengths)  # ragged: a mean of means would be far off
    assert len(best_fit(lengths, 48)) == 4
    files = {
        "data": write_rows(tmp_path / "rows.jsonl", made),
        "base": write_base(tmp_path / "base", tokenizer),
        "kept": tmp_path / "kept.txt",
    }
    files["kept"].write_text(TEXT[:4000])
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(**files))

    def curve(name: str, *overrides: str) -> torch.Tensor:
        words = ("recipe.yaml", *KINDS[kind], *overrides, "-o", name.replace(" ", "-"), "--json")
        result = run("finetune", *words)
        assert result.code == 0, result.err
        said = [json.loads(line) for line in result.out.splitlines()]
        steps = [row for row in said if row["schema"] == "lm/finetune/step/1"]
        return torch.tensor([[row["loss"], row["grad_norm"]] for row in steps])

    reference = curve("1 x 8", *ALONE)
    assert reference.shape == (6, 2) and reference[-1, 0] < reference[0, 0]
    for name, overrides in WAYS.items():
        assert (curve(name, *overrides) - reference).abs().max() <= 1e-5, name
    assert (curve("control", *CONTROLS[kind]) - reference)[:, 0].abs().max() > 1e-3
