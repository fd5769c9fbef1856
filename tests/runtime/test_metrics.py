"""What a run reports of itself."""

import subprocess
import sys

from mindpangu.runtime.metrics import peak_memory_gib, step_line

PARENT = """
import subprocess, sys
from mindpangu.runtime.metrics import peak_memory_gib, step_line

before = peak_memory_gib()
block = bytearray(200 << 20)
block[::4096] = b"x" * len(block[::4096])  # touch every page
with_block = peak_memory_gib()
del block
child = "from mindpangu.runtime.metrics import peak_memory_gib; print(peak_memory_gib())"
print(before, with_block, peak_memory_gib(), subprocess.check_output([sys.executable, "-c", child], text=True))
"""


def test_peak_memory_is_the_processs_own():
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, check=True)
    before, with_block, after, child = map(float, done.stdout.split())
    assert before + 0.15 < with_block < after + 0.01  # the kernel's count is a little late
    assert child < 0.15, "a child of a process that was large is not"


def test_the_step_line_of_grpo_says_what_the_policy_does_beside_what_every_run_says():
    values = {"loss": -0.01234, "grad_norm": 0.4567, "lr": 2e-4, "tokens_per_s": 12345.6, "data_wait": 0.25,
              "mfu": None, "memory_gib": 0.912, "reward": 0.6371, "kl": 0.0103, "entropy": 0.0427, "correct": 0.758,
              "dead_groups": 0.33, "truncated": 0.021, "rollout_time": 0.251, "answer_len": 25.25, "masked": 0.4}
    assert step_line(7, 200, values, 605) == (
        "step 7/200  loss -0.0123  reward 0.6371  kl 0.0103  entropy 0.0427  correct 75.8%  dead_groups 33.0%  "
        "truncated 2.1%  rollout_time 25.1%  answer_len 25.2  grad_norm 0.457  lr 2.00e-04  tok/s 12,346  mfu n/a  "
        "data 25.0%  mem 0.91 GiB  eta 10m05s")


def test_on_an_npu_peak_memory_is_that_of_its_tensors(mindspore_cpu, monkeypatch):
    """The NPU by a stand-in: MindSpore counts bytes, and on a CPU gives 0."""
    monkeypatch.setattr(mindspore_cpu.runtime, "max_memory_allocated", lambda: 3 << 30)
    assert peak_memory_gib("Ascend") == 3 != peak_memory_gib("CPU") > 0
