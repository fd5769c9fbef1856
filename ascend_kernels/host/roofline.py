"""python -m ascend_kernels.host.roofline: what the operators move and compute, counted on the host, and its least time.

Bytes of GM, vector instructions (256 bytes each) and cube FLOPs are the machine model's counters for real launches; the
times are those at the peaks in PEAKS, so lower bounds. Beside them what the composition of
built-in operators moves that mindpangu's reference of the op consists of: each reads its inputs and writes its outputs
once. No device ran any of this.
"""

from typing import NamedTuple

import numpy as np

from .harness import to_dtype
from .operators import Operators

# Bytes a second of memory, cube FLOPs a second in 16 bits, vector instructions a second of all cores; 910B3 and 310B1.
PEAKS = {"ascend910b": (1.6e12, 295e12, 40 * 1.8e9), "ascend310b": (20.8e9, 10e12, 1.224e9)}


class Row(NamedTuple):
    """name; report: of the launch; composition_bytes: of the built-ins; compulsory_bytes: inputs and outputs once."""

    name: str
    soc: str
    report: object
    composition_bytes: int
    compulsory_bytes: int

    @property
    def bytes(self):
        return self.report.gm_bytes_read + self.report.gm_bytes_written

    def times_us(self):
        """At the chip's peaks: memory without and with the workspace, cube, vector; memory for the composition."""
        memory, cube, vector = PEAKS[self.soc]
        return ((self.bytes - self.report.workspace_bytes) / memory * 1e6, self.bytes / memory * 1e6,
                self.report.cube_flops / cube * 1e6,
                self.report.vector_instructions / vector * 1e6, self.composition_bytes / memory * 1e6)


def topk_kl_rows(num_rows=2, vocab_size=153376, num_top=10):
    """Losses and gradient of two rows of the model's vocabulary, in each type."""
    random = np.random.default_rng(0)
    values = random.normal(0, 3, (num_rows, vocab_size))
    ids = np.argsort(-values, -1)[:, :num_top].astype(np.int32)
    logprobs = np.full((num_rows, num_top), np.log(0.9 / num_top), np.float32)
    weights = np.ones(num_rows, np.float32)
    for soc in PEAKS:
        for dtype in ("bfloat16", "float16", "float32"):
            logits = to_dtype(values, dtype)
            inputs = [logits, ids[:, 0].copy(), ids, logprobs, weights, weights]
            _, report = Operators(soc).launch("PanguTopkKl", inputs, (1.0, 0, True))
            size = logits.itemsize
            # The reference on logits as float32, an entry for each operator over the vocabulary: the cast, logsumexp,
            # the scatter of ones (zeros, copy), the masked logits (Mul, Add), their logsumexp, two softmaxes with
            # factors (Sub, Exp, Mul twice), their sum, two scatters, the cast back, argmax.
            composed = (size + 4) + 4 + (4 + 8) + (8 + 12) + 4 + 2 * 24 + 12 + 2 * 8 + (4 + size) + 4
            yield Row(f"{dtype}, V = {vocab_size}, K = {num_top}", soc, report, composed * values.size,
                      3 * logits.nbytes)


def packed_attention_rows(num_tokens=2048, num_heads=12, num_kv_heads=6, head_size=128):
    """Forward and backward of a row: one document, and documents of about a hundred tokens."""
    random = np.random.default_rng(0)
    many = np.array([0, *np.sort(random.choice(np.arange(1, num_tokens), 19, replace=False)), num_tokens], np.int64)
    q, dout = (random.normal(0, 1, (num_tokens, num_heads, head_size)).astype(np.float16) for _ in range(2))
    k, v = (random.normal(0, 1, (num_tokens, num_kv_heads, head_size)).astype(np.float16) for _ in range(2))
    scale, scores = head_size**-0.5, num_heads * num_tokens**2
    for soc in PEAKS:
        for name, ends in (("1 document", np.array([0, num_tokens], np.int64)), ("20 documents", many)):
            (out, lse), report = Operators(soc).launch("PanguPackedAttention", [q, k, v, ends], (scale,))
            tensors = 2 * q.nbytes + 2 * k.nbytes
            # BatchMatMul out, Cast, Add of the mask, Softmax, Cast, BatchMatMul in, over the whole square of scores.
            yield Row(f"forward, T = {num_tokens}, {name}", soc, report, (2 + 6 + 12 + 8 + 6 + 2) * scores + tensors,
                      tensors)
            inputs = [q, k, v, out, dout, lse, ends]
            _, report = Operators(soc).launch("PanguPackedAttentionGrad", inputs, (scale,))
            tensors = 4 * q.nbytes + 4 * k.nbytes
            # The forward's scores and probabilities again (34); dP out and as float32 (8), P dP (12), its sum (4), dP
            # less it (8), times P (12), times the scale (8), as 16 bits (6); P and dS into three BatchMatMuls (6).
            yield Row(f"backward, T = {num_tokens}, {name}", soc, report,
                      (34 + 8 + 12 + 4 + 8 + 12 + 8 + 6 + 6) * scores + tensors, tensors)


def decode_attention_rows(num_heads=12, num_kv_heads=6, head_size=128):
    """One token against a full cache."""
    random = np.random.default_rng(0)
    for num_positions in (1024, 8192):
        q = random.normal(0, 1, (1, num_heads, head_size)).astype(np.float16)
        k, v = (random.normal(0, 1, (1, num_kv_heads, head_size)).astype(np.float16) for _ in range(2))
        caches = [random.normal(0, 1, (1, num_kv_heads, num_positions, head_size)).astype(np.float16) for _ in range(2)]
        inputs = [q, k, v, *caches, np.array([num_positions - 1], np.int32)]
        for soc in PEAKS:
            _, report = Operators(soc).launch("PanguDecodeAttention", inputs, (head_size**-0.5,))
            # BatchMatMul out, Mul, Add of the mask, Cast, Softmax, Cast, BatchMatMul in, over the scores.
            scores, tensors = num_heads * num_positions, 2 * caches[0].nbytes + 4 * k.nbytes + 2 * q.nbytes
            yield Row(f"one token, {num_positions} cached", soc, report,
                      (2 + 4 + 4 + 6 + 8 + 6 + 2) * scores + 2 * num_positions + tensors, tensors)


TABLES = {"topk_kl": topk_kl_rows, "packed_attention": packed_attention_rows,
          "decode_attention": decode_attention_rows}


def table(rows):
    """Markdown."""
    lines = ["| chip | what | MB of GM | of it workspace | inputs and outputs once | vector instructions | "
             "cube GFLOP | memory us, workspace in L2 / not | cube us | vector us | built-ins MB | built-ins us |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        memory, all_memory, cube, vector, composed = row.times_us()
        lines.append(f"| {row.soc.removeprefix('ascend')} | {row.name} | {row.bytes / 1e6:.2f} | "
                     f"{row.report.workspace_bytes / 1e6:.2f} | {row.compulsory_bytes / 1e6:.2f} | "
                     f"{row.report.vector_instructions} | {row.report.cube_flops / 1e9:.2f} | "
                     f"{memory:.1f} / {all_memory:.1f} | {cube:.1f} | {vector:.1f} | "
                     f"{row.composition_bytes / 1e6:.1f} | {composed:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for title, rows in TABLES.items():
        print(f"\n{title}\n\n{table(rows())}")
