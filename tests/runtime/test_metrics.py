"""What a run reports of itself."""

import subprocess
import sys

PARENT = """
import subprocess, sys
from mindpangu.runtime.metrics import peak_memory_gib

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
