"""Gradients and optimizer state over ranks: sums in buckets, and a share of everything for each rank (ZeRO).

A parameter of n elements is split into G chunks of ceil(n / G) elements, in the order of the ranks; the last ones are
filled up with zeros. G ranks, C elements of a bucket's chunks together.

Source of the stages: ZeRO, arXiv:1910.02054 (1: optimizer state, 2: gradients too).
"""

import functools
import math

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from ..ops.adamw import global_norm
from ..ops.collectives import AllGather, AllReduce, Group, ReduceScatter
from .cluster import World

# Of a bucket's gradients. On a CPU a call costs 0.1 ms to 0.1 s and the ring copies; on Ascend small ones leave the
# links idle, and large ones wait for the whole backward pass (not measured there).
_BUCKET_BYTES = {"CPU": 4 << 20, "Ascend": 64 << 20}


class Ranks:
    """Who does what: `sequence_parallel` consecutive ranks share the tokens of their rows, the others have other rows.

    Raises ValueError if the ranks can't be divided so.
    """

    def __init__(self, world=None, sequence_parallel=1):
        self.world = world or World()
        self.rank, self.size, self.is_main = self.world.rank, self.world.size, self.world.is_main
        if self.size % sequence_parallel:
            raise ValueError(f"run.sequence_parallel={sequence_parallel} with {self.size} ranks: expected a divisor of "
                             "their number.")
        self.data_rank, self.sequence_rank = divmod(self.rank, sequence_parallel)
        self.num_data, self.num_sequence = self.size // sequence_parallel, sequence_parallel

    @functools.cached_property
    def group(self):
        """All ranks."""
        return Group.of(range(self.size), self.rank, self.size)

    @functools.cached_property
    def sequence_group(self):
        """Those that share this rank's rows."""
        first = self.data_rank * self.num_sequence
        return Group.of(range(first, first + self.num_sequence), self.rank, self.size)

    def measure(self, values):
        """What to add to a step's values: every rank's throughput, its wait for data, and its peak memory."""
        if self.size == 1:
            return {}
        own = [round(values["tokens_per_s"] / self.size, 1), values["data_wait"], values["memory_gib"]]
        everyone = self.world.gather("measure", own)
        measured = {f"rank/{rank}/{name}": number for rank, numbers in enumerate(everyone)
                    for name, number in zip(("tokens_per_s", "data_wait", "memory_gib"), numbers, strict=True)}
        return measured | {"memory_gib": max(numbers[2] for numbers in everyone)}


def chunk_size(size, num_ranks):
    """Elements of a rank's chunk of `size` elements."""
    return -(-size // num_ranks)


def chunk_of(array, rank, num_ranks):
    """float32 [chunk_size]: this rank's chunk of an array."""
    size = chunk_size(array.size, num_ranks)
    chunk = np.zeros(size, array.dtype)
    own = array.reshape(-1)[rank * size:(rank + 1) * size]
    chunk[:own.size] = own
    return chunk


class Exchange(nn.Cell):
    """Sums of gradients over the ranks of a group.

    shard: "none": every rank has all sums | "optimizer", "gradients": every rank has its chunks of them.
    """

    def __init__(self, parameters, group, shard):
        super().__init__()
        self.rank, self.size, self.shards = group.rank, group.size, shard != "none"
        self.shapes = tuple(tuple(p.shape) for p in parameters)
        self.sizes = tuple(math.prod(shape) for shape in self.shapes)
        self.chunks = tuple(chunk_size(size, self.size) for size in self.sizes)
        self.buckets = _buckets(self.sizes, _BUCKET_BYTES[ms.get_context("device_target")] // 4)
        self.all_reduce = AllReduce(group)
        self.reduce_scatter, self.all_gather = ReduceScatter(group), AllGather(group)

    def construct(self, grads):
        """The sums: full tensors, or flat chunks."""
        summed = ()
        for first, last in self.buckets:
            rows = ()
            for i in range(first, last):
                rows = rows + (self.rows_of(grads[i], i),)
            bucket_GC = ops.concat(rows, 1) if last - first > 1 else rows[0]
            start = 0
            if self.shards:
                bucket_C = self.reduce_scatter(bucket_GC)
                for i in range(first, last):
                    summed = summed + (bucket_C[start:start + self.chunks[i]],)
                    start = start + self.chunks[i]
            else:
                bucket_GC = self.all_reduce(bucket_GC)
                for i in range(first, last):
                    summed = summed + (self.full(bucket_GC[:, start:start + self.chunks[i]], i),)
                    start = start + self.chunks[i]
        return summed

    def gather(self, chunks):
        """Full tensors of all ranks' chunks."""
        full = ()
        for first, last in self.buckets:
            parts = ()
            for i in range(first, last):
                parts = parts + (chunks[i],)
            bucket_GC = self.all_gather(ops.concat(parts, 0) if last - first > 1 else parts[0])
            start = 0
            for i in range(first, last):
                full = full + (self.full(bucket_GC[:, start:start + self.chunks[i]], i),)
                start = start + self.chunks[i]
        return full

    def norm(self, summed):
        """Euclidean norm of the sums, the same on every rank."""
        norm = global_norm(summed)
        return ops.sqrt(self.all_reduce(ops.square(norm).reshape(1))).reshape(()) if self.shards else norm

    def rows_of(self, x, i):
        """[G, chunk]: tensor i, a row for each rank."""
        x = x.reshape(-1)
        padding = self.chunks[i] * self.size - self.sizes[i]
        if padding > 0:
            x = ops.concat((x, ops.zeros((padding,), x.dtype)), 0)
        return x.reshape(self.size, self.chunks[i])

    def full(self, rows_GC, i):
        return rows_GC.reshape(-1)[:self.sizes[i]].reshape(self.shapes[i])


def _buckets(sizes, limit):
    """((first, last), ...): consecutive tensors of together at most `limit` elements, or a larger one alone."""
    buckets, first, total = [], 0, 0
    for i, size in enumerate(sizes):
        if i > first and total + size > limit:
            buckets.append((first, i))
            first, total = i, 0
        total += size
    return (*buckets, (first, len(sizes)))
