"""GSM8K, where it is at hand: SFT, then distillation on the student's own answers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

GSM8K = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"
SIZES = ["data.num_heldout=100", "data.seq_len=416", "model.vocab_size=2048", "rollout.max_prompt_len=288",
         "rollout.max_new_tokens=128"]


@pytest.mark.long
@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not at hand")
def test_sft_and_distillation_lower_heldout_loss_and_kl_on_gsm8k(tmp_path):
    data = ["data=gsm8k", f"data.train=[{GSM8K}/train.jsonl]", f"data.heldout=[{GSM8K}/test.jsonl]", *SIZES]

    def run(recipe, name, *overrides):
        subprocess.run([sys.executable, "-m", "mindpangu.train", f"recipe={recipe}", *data, f"run.dir={name}",
                        *overrides], cwd=tmp_path, check=True)
        return json.loads((tmp_path / name / "done.json").read_text())

    run("sft_teacher", "teacher", "data.num_examples=0", "train.steps=200")
    student = run("sft_direct", "student", "data.num_examples=1500", "train.steps=120")
    assert student["after"]["loss"] < 0.7 * student["before"]["loss"]
    distilled = run("kd_student", "distilled", "data.num_examples=1500", "init_from=student", "teacher=teacher",
                    "rollout.samples_per_prompt=1", "train.steps=120")
    for name in ("loss", "kl", "own_kl"):
        assert distilled["after"][name] < 0.8 * distilled["before"][name], name
