"""Collectives over a group of ranks, with gradients; on a CPU all of them through AllReduce.

MindSpore's CPU backend has AllReduce for any group, AllGather for all ranks only, and neither ReduceScatter nor
AllToAll. There, a gather is the sum of parts that are zero but for one rank's, exact in any type, at the group's size
times the traffic. On Ascend each is the primitive of its name (not run by the authors).

G ranks of the group, of which this one is number `rank`.
"""

from typing import NamedTuple

import mindspore as ms
from mindspore import nn, ops
from mindspore.communication import GlobalComm, create_group


class Group(NamedTuple):
    """Ranks that exchange tensors: name as MindSpore knows it, this rank's number among them, how many they are."""

    name: str
    rank: int
    size: int

    @classmethod
    def of(cls, ranks, rank, world_size):
        """The group of these ranks (ascending), of which `rank` is one. Every rank has to make its own."""
        name = GlobalComm.WORLD_COMM_GROUP
        if len(ranks) < world_size:
            name = f"ranks_{'_'.join(map(str, ranks))}"
            create_group(name, list(ranks))
        return cls(name, list(ranks).index(rank), len(ranks))


def _has_primitives():
    return ms.get_context("device_target") == "Ascend"


class AllReduce(nn.Cell):
    """Sum over the ranks; float32. No gradient."""

    def __init__(self, group):
        super().__init__()
        self.op = ops.AllReduce(group=group.name)

    def construct(self, x):
        return self.op(x)


class AllMax(nn.Cell):
    """Maximum over the ranks; float32. No gradient."""

    def __init__(self, group):
        super().__init__()
        self.is_composed = not _has_primitives()
        self.op = AllGather(group) if self.is_composed else ops.AllReduce(ops.ReduceOp.MAX, group.name)

    def construct(self, x):
        return ops.amax(self.op(x), 0) if self.is_composed else self.op(x)


class AllGather(nn.Cell):
    """x [...] of every rank -> [G, ...]; float32. No gradient."""

    def __init__(self, group):
        super().__init__()
        self.rank, self.size = group.rank, group.size
        self.is_composed = not _has_primitives()
        self.op = ops.AllReduce(group=group.name) if self.is_composed else ops.AllGather(group=group.name)

    def construct(self, x):
        if not self.is_composed:
            return self.op(ops.expand_dims(x, 0))
        parts = ()
        if self.rank > 0:
            parts = parts + (ops.zeros((self.rank,) + x.shape, x.dtype),)
        parts = parts + (ops.expand_dims(x, 0),)
        if self.rank < self.size - 1:
            parts = parts + (ops.zeros((self.size - 1 - self.rank,) + x.shape, x.dtype),)
        return self.op(ops.concat(parts, 0))


class ReduceScatter(nn.Cell):
    """x [G, ...] -> [...]: this rank's row of the sum over the ranks; float32. No gradient."""

    def __init__(self, group):
        super().__init__()
        self.rank = group.rank
        self.is_composed = not _has_primitives()
        self.op = ops.AllReduce(group=group.name) if self.is_composed else ops.ReduceScatter(group=group.name)

    def construct(self, x):
        if self.is_composed:
            return self.op(x)[self.rank]
        return self.op(x.reshape(-1)).reshape(x.shape[1:])


class _Exchange(nn.Cell):
    """x [tokens, heads, H]: split along one of the first two dimensions, a part to every rank; what comes is joined
    along the other, in the order of the ranks."""

    def __init__(self, group, split, join):
        super().__init__()
        self.split, self.join, self.rank, self.size = split, join, group.rank, group.size
        self.is_composed = not _has_primitives()
        self.op = AllGather(group) if self.is_composed else ops.AlltoAll(group.size, split, join, group=group.name)

    def construct(self, x):
        if not self.is_composed:
            return self.op(x)
        everyone = self.op(x)
        share = x.shape[self.split] // self.size
        first = self.rank * share
        mine = everyone[:, first:first + share] if self.split == 0 else everyone[:, :, first:first + share]
        parts = ()
        for i in range(self.size):
            parts = parts + (mine[i],)
        return ops.concat(parts, self.join)


class _AllToAll(nn.Cell):
    def __init__(self, group, split, join):
        super().__init__()
        self.there, self.back = _Exchange(group, split, join), _Exchange(group, join, split)

    def construct(self, x):
        return self.there(x)

    def bprop(self, x, out, dout):
        return (self.back(dout),)


def split_heads(group):
    """Cell: x [T / G, N, H] -> [T, N / G, H], from a rank's share of the tokens to its share of the heads."""
    return _AllToAll(group, 1, 0)


def split_tokens(group):
    """Cell: x [T, N / G, H] -> [T / G, N, H], from a rank's share of the heads to its share of the tokens."""
    return _AllToAll(group, 0, 1)
