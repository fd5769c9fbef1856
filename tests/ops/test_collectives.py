"""What is called on Ascend, by stand-ins with the primitives' documented meaning. On a CPU, whose collectives are
composed, tests/test_distributed.py has them in real jobs."""

import inspect

import numpy as np
import pytest

RANKS = 3


class _Waiting(Exception):
    """A rank stands at the collective, which the others have not reached."""


def all_to_all(sent, rank, split_count, split_dim, concat_dim, group):
    assert split_count == RANKS
    return np.concatenate([np.split(x, split_count, split_dim)[rank] for x in sent], concat_dim)


def all_gather(sent, rank, group):
    return np.concatenate(sent)


def reduce_scatter(sent, rank, op, group):
    assert op == "sum"
    return np.split(np.sum(sent, 0), RANKS)[rank]


def all_reduce(sent, rank, op, group):
    return {"max": np.max, "sum": np.sum}[op](sent, 0)


MEANINGS = {"AlltoAll": all_to_all, "AllGather": all_gather, "ReduceScatter": reduce_scatter, "AllReduce": all_reduce}


@pytest.fixture
def on_ascend(mindspore_cpu, monkeypatch):
    """on_ascend(call, inputs) -> [call(group, input) of each rank], and the primitives' names."""
    from mindspore import Tensor, ops

    from mindpangu.ops import collectives

    monkeypatch.setattr(mindspore_cpu, "get_context", {"device_target": "Ascend"}.__getitem__)
    used, sent = set(), []

    def stand_in(name, rank_of):
        signature = inspect.signature(getattr(ops, name).__init__)

        def make(*arguments, **keywords):
            bound = signature.bind(None, *arguments, **keywords)
            bound.apply_defaults()
            values = dict(list(bound.arguments.items())[1:])
            assert values["group"] == "sharers"

            def call(x):
                used.add(name)
                if len(sent) < RANKS:
                    sent.append(x.asnumpy())
                    raise _Waiting
                return Tensor(MEANINGS[name](sent, rank_of(), **values))

            return call

        return make

    rank = 0
    for name in MEANINGS:
        monkeypatch.setattr(ops, name, stand_in(name, lambda: rank))

    def run(call, inputs):
        nonlocal rank
        sent.clear()
        used.clear()
        for rank in range(RANKS):
            with pytest.raises(_Waiting):
                call(collectives.Group("sharers", rank, RANKS), Tensor(inputs[rank]))
        results = []
        for rank in range(RANKS):
            results.append(call(collectives.Group("sharers", rank, RANKS), Tensor(inputs[rank])).asnumpy())
        return results, used

    return run


def numbers(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", ["split_heads", "split_tokens"])
def test_heads_and_tokens_change_places_by_all_to_all_and_gradients_go_back(on_ascend, name):
    from mindpangu.ops import collectives

    whole = numbers(6, 9, 4)  # T, N, H
    of_tokens, of_heads = np.split(whole, RANKS, 0), np.split(whole, RANKS, 1)
    before, after = (of_tokens, of_heads) if name == "split_heads" else (of_heads, of_tokens)
    results, used = on_ascend(lambda group, x: getattr(collectives, name)(group)(x), before)
    np.testing.assert_array_equal(results, after)
    assert used == {"AlltoAll"}
    grads, used = on_ascend(lambda group, dout: getattr(collectives, name)(group).bprop(None, None, dout)[0], after)
    np.testing.assert_array_equal(grads, before)
    assert used == {"AlltoAll"}


def test_sums_are_scattered_parts_gathered_and_maxima_taken_by_the_primitives_of_these_names(on_ascend):
    from mindpangu.ops.collectives import AllGather, AllMax, ReduceScatter

    inputs = numbers(RANKS, RANKS, 4, 2)
    results, used = on_ascend(lambda group, x: ReduceScatter(group)(x), inputs)
    np.testing.assert_allclose(results, inputs.sum(0), rtol=1e-6)
    assert used == {"ReduceScatter"}
    results, used = on_ascend(lambda group, x: AllGather(group)(x), inputs)
    np.testing.assert_array_equal(results, [inputs] * RANKS)
    assert used == {"AllGather"}
    results, used = on_ascend(lambda group, x: AllMax(group)(x), inputs)
    np.testing.assert_array_equal(results, [inputs.max(0)] * RANKS)
    assert used == {"AllReduce"}
