"""What a run reports of itself."""

import subprocess
import sys

from mindpangu.runtime.metrics import peak_memory_gib

CHILD = "from mindpangu.runtime.metrics import peak_memory_gib; print(peak_memory_gib())"


def test_peak_memory_is_the_processs_own():
    before = peak_memory_gib()
    block = bytearray(200 << 20)
    block[::4096] = b"x" * len(block[::4096])  # touch every page
    with_block = peak_memory_gib()
    del block
    assert before + 0.15 < with_block < peak_memory_gib() + 0.01  # the kernel's count is a little late
    # A child of a process that was large is not.
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert float(child.stdout) < 0.15
