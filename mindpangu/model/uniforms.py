"""The random numbers of answers; NumPy only."""

import numpy as np


def uniforms(seed, prompt_index, sample_index, count):
    """The random numbers of one answer, float32 in [0, 1 - 2^-23]: a function of these integers alone."""
    key = np.array([seed, (int(prompt_index) << 20) | int(sample_index)], np.uint64)
    numbers = np.random.Generator(np.random.Philox(key=key)).integers(0, 1 << 23, count, dtype=np.uint32)
    return numbers.astype(np.float32) / np.float32(1 << 23)
