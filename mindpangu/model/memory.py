"""Bytes that a training step takes on one device, without MindSpore.

Counted: what the trainer keeps (weights, moments, gradients), what the graph keeps for the backward pass, and the
largest temporaries, at the moments that can be the peak: the loss, or what follows it where it is divided, when all
activations are still there, and the end of the backward pass, when all gradients are.

On a CPU the counts are those of the kernels in ops/cpu, read from their sources; GEMM_BYTES and LIVE_GATED are fitted
to measured peaks, which the whole then meets within 5 %, of 21 peaks of 310 to 1060 MiB with 1, 2 and 4 micro-batches
(tests/model/test_memory.py repeats some). The exchange between ranks is fitted to two ranks on a CPU, where seven peaks
of 355 to 610 MiB are met within 7 %.
On Ascend nothing was measured: the same graph, activations in bfloat16, and the operators that serve there.

T tokens, D hidden, N query heads, M key/value heads, H head size, F feed-forward, V vocabulary, P parameters.
"""

from typing import NamedTuple

from .size import num_parameters

SHARDS = ("none", "optimizer", "gradients")
CHUNK_BYTES = 212 << 20  # head_loss.cc: kChunkBytes, of a chunk of positions
PACKED_BYTES = 32 << 20  # attention.cc: kPackedBytes, of keys and values at a time
GEMM_BYTES = 8 << 20  # of packed operands: gemm.cc shares up to 6 MiB, and a little of each thread's. Fitted
LIVE_GATED = 3  # tensors [T, F] beside the saved ones in the backward pass of an MLP: swiglu's gradients. Fitted


class TrainingMemory(NamedTuple):
    """Bytes on one device at the peak of a step."""

    weights: int  # float32 masters; on Ascend their bfloat16 copies too
    optimizer: int  # moments; where they are sharded, this rank's copy of its chunk of the weights too
    gradients: int
    activations: int  # kept from the forward pass for the backward pass
    temporaries: int  # of the layer at work
    logits: int  # of a chunk of positions
    workspace: int  # of kernels

    @property
    def total(self):
        return sum(self)


def activation_bytes_per_token(config, bytes_per_value):
    """What a layer keeps of a token for its backward pass.

    D: the input, both norms' results and the sum between; q, k, v rotated and what attention gives; gate | up and their
    product. In float32: both norms' scales, and flash_attention_score's maxima and sums, eight times each.
    """
    attention = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    values = 4 * config.hidden_size + attention + 3 * config.intermediate_size
    return values * bytes_per_value + 4 * (2 + 16 * config.num_heads)


def training_memory(config, num_tokens, *, device="Ascend", num_micro_batches=1, num_ranks=1, shard="optimizer",
                    sequence_parallel=1, vocab_parallel=False, recompute=False, moment_bytes=4, logits_chunk=2048,
                    longest_document=None, num_threads=2):
    """TrainingMemory of a step.

    num_tokens: of a micro-batch, all of them targets, before `sequence_parallel` ranks share them. num_ranks: among
    which `shard` splits ("none", "optimizer": moments, "gradients": sums too). vocab_parallel: the ranks that share
    tokens divide the output projection too, as ops.head_loss does in distillation; on Ascend. recompute: only each
    layer's input is kept. moment_bytes: of each of the two. logits_chunk: positions, on Ascend. longest_document
    (num_tokens) and num_threads: for workspaces on a CPU. Activations are bfloat16 on Ascend, float32 on a CPU.
    Raises ValueError for a choice that is unknown or not modelled.
    """
    if device not in ("CPU", "Ascend"):
        raise ValueError(f"device {device!r}: expected CPU or Ascend.")
    if shard not in SHARDS:
        raise ValueError(f"shard {shard!r}: expected one of {list(SHARDS)}.")
    is_cpu, splits = device == "CPU", shard != "none" and num_ranks > 1
    if vocab_parallel and (is_cpu or sequence_parallel == 1):
        raise ValueError("vocab_parallel needs sequence_parallel above 1, whose ranks divide the vocabulary; on a CPU, "
                         "where general operations compute the divided loss, its memory is not modelled.")
    num_weights, head_weights = num_parameters(config), config.vocab_size * config.hidden_size
    value = 4 if is_cpu else 2
    tokens = -(-num_tokens // sequence_parallel)
    share = num_ranks if splits else 1

    # Of the output projection, with the divided loss; rank 0's share is the largest.
    head_share = -(-config.vocab_size // sequence_parallel) * config.hidden_size if vocab_parallel else head_weights
    weights = 4 * num_weights + (0 if is_cpu else 2 * (num_weights - head_weights + head_share))
    optimizer = (2 * moment_bytes * num_weights + (4 * num_weights if splits else 0)) // share
    sums = 0 if num_micro_batches == 1 else 4 * num_weights // (share if shard == "gradients" else 1)
    # That of the output projection, computed in the forward pass. On Ascend chunk by chunk: its sum, a chunk's in
    # float32, and that product in bfloat16.
    head_gradient = head_share * (4 if is_cpu else 10)
    # A tied embedding gets two gradients and their sum.
    all_gradients = 4 * num_weights + (8 if config.tie_embedding else 0) * head_weights

    per_layer = tokens * activation_bytes_per_token(config, value)
    # Around the head: the last layer's result, that of the final norm, the targets', their gradient, and that scaled.
    activations = 5 * tokens * config.hidden_size * value
    if recompute:
        activations += config.num_layers * tokens * config.hidden_size * value + per_layer
    else:
        activations += config.num_layers * per_layer
    temporaries = tokens * (LIVE_GATED * config.intermediate_size + 3 * config.hidden_size) * value
    if sequence_parallel > 1:  # both sides of the all-to-all
        temporaries += tokens * (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim * value
    logits, workspace = (_cpu_logits(config, tokens), _cpu_workspace(config, longest_document or tokens, num_threads)
                         ) if is_cpu else (2 * value * config.vocab_size * min(logits_chunk, tokens), 0)

    if vocab_parallel:
        # Of every rank's chunk the logits of a share of the vocabulary: as many as of one chunk for all of it. Beside
        # them the hidden states that were gathered, and their gradient, in float32 too for its sum.
        logits += (2 * value + 4) * sequence_parallel * min(logits_chunk, tokens) * config.hidden_size

    moments = [TrainingMemory(weights, optimizer, sums + head_gradient, activations, temporaries, logits, workspace)]
    if vocab_parallel:  # the share's gradient, once more scaled, and all of the projection's, zeros but for the share
        gradients = sums + 8 * head_share + 4 * head_weights
        moments.append(TrainingMemory(weights, optimizer, gradients, activations, temporaries, 0, workspace))
    # Ranks copy the gradients into buckets to exchange them, and the largest, a bucket of its own, three times.
    largest = max(head_weights, 2 * config.intermediate_size * config.hidden_size)
    exchange = 4 * (num_weights + 3 * largest) if num_ranks > 1 else 0
    # The CPU library keeps its workspaces, among them the logits'.
    moments.append(TrainingMemory(weights, optimizer, sums + all_gradients + exchange,
                                  2 * tokens * config.hidden_size * value, 0, logits if is_cpu else 0, workspace))
    return max(moments, key=lambda memory: memory.total)


def _cpu_logits(config, num_targets):
    """head_loss.cc: Chunk::bytes_per_position without entropy or a teacher, in equal chunks of at most CHUNK_BYTES."""
    size, vocab = config.hidden_size, config.vocab_size
    per_position = 4 * (2 * size + vocab) + 4 * size + 8 * (vocab // 256 + 1) + 16
    num_chunks = -(-num_targets // max(1, CHUNK_BYTES // per_position))
    return -(-num_targets // num_chunks) * per_position


def _cpu_workspace(config, longest_document, num_threads):
    """Packed operands: of products; keys and values of some heads; in the backward pass a thread's of one head, keys
    twice, values, and the sums of both gradients."""
    one_head = 2 * longest_document * config.head_dim * 4
    forward = max(one_head, min(PACKED_BYTES, config.num_kv_heads * one_head))
    return GEMM_BYTES + forward + num_threads * 5 * longest_document * config.head_dim * 4
