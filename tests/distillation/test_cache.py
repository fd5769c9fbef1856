import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindpangu.tools.bench_data import kl_of_stored, zipf_teacher

from mindpangu.data.shards import read_shard, write_shard
from mindpangu.distillation.cache import LOWEST, decode_topk, encode_topk


def assert_is_a_distribution(logprobs_NK):
    assert logprobs_NK.dtype == np.float32 and np.isfinite(logprobs_NK).all()
    assert (np.diff(logprobs_NK, axis=1) <= 0).all()
    assert (np.exp(logprobs_NK.astype(np.float64)).sum(1) < 1).all()


@pytest.mark.parametrize("exponent", [1.15, 1.0, 1.3])
def test_a_zipf_teacher_takes_at_most_26_bytes_per_token_and_1e_4_nats(tmp_path, exponent):
    ids_NK, logprobs_NK, label_ids_N, label_logprobs_N = zipf_teacher(1000, 153_376, 10, exponent)
    path = tmp_path / "teacher.shard"
    write_shard(path, encode_topk(ids_NK, logprobs_NK, label_ids_N, label_logprobs_N, 153_376))
    found_ids_NK, found_NK, found_label_N = decode_topk(read_shard(path))
    # A short shard: the list of occurring ids weighs more per token than in one of 16000 tokens (17 bytes in all).
    assert path.stat().st_size / 1000 <= 26
    assert found_ids_NK.dtype == np.int32 and np.array_equal(found_ids_NK, ids_NK)
    assert_is_a_distribution(found_NK)
    assert kl_of_stored(logprobs_NK, found_NK).mean() <= 1e-4
    is_label_NK = ids_NK == label_ids_N[:, None]
    inside = is_label_NK.any(1)
    assert 0.3 < inside.mean() < 0.95
    assert np.array_equal(found_label_N[inside], found_NK[is_label_NK])
    # Half of the coarsest step, 1/8 nat, plus the error of the row's common factor.
    assert np.abs(found_label_N - label_logprobs_N).max() < 0.15


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 3.0, 10.0, 40.0])
@pytest.mark.parametrize("k", [1, 10])
def test_kl_error_is_at_most_1e_4_nats_from_flat_to_certain_teachers(scale, k):
    logits = np.random.default_rng(1).normal(size=(2000, 500)) * scale
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids_NK = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
    logprobs_NK = np.take_along_axis(logprobs, ids_NK, 1).astype(np.float32)
    found_ids_NK, found_NK, _ = decode_topk(encode_topk(ids_NK, logprobs_NK, ids_NK[:, 0], logprobs_NK[:, 0], 500))
    assert np.array_equal(found_ids_NK, ids_NK)
    assert_is_a_distribution(found_NK)
    assert kl_of_stored(logprobs_NK, found_NK).mean() <= 1e-4


@st.composite
def teachers(draw):
    vocab_size = draw(st.one_of(st.integers(2, 80), st.integers(2, 200_000)))
    k = draw(st.one_of(st.integers(1, min(64, vocab_size)), st.just(min(64, vocab_size))))
    num_tokens = draw(st.one_of(st.sampled_from([0, 1]), st.integers(2, 40)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids_NK = np.array([rng.choice(vocab_size, k, replace=False) for _ in range(num_tokens)]).reshape(num_tokens, k)
    logits = rng.normal(size=(num_tokens, k + 1)) * draw(st.sampled_from([0.0, 1.0, 10.0, 300.0]))
    if vocab_size == k:
        logits[:, -1] = -np.inf
    logprobs_NK = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))[:, :-1]
    logprobs_NK = -np.sort(-logprobs_NK, axis=1).astype(np.float32)
    if draw(st.booleans()):
        logprobs_NK[:, k - k // 2 :] = -np.inf
    label_ids_N = rng.integers(0, vocab_size, num_tokens)
    if draw(st.booleans()) and num_tokens:
        label_ids_N[::2] = ids_NK[::2, rng.integers(k)]
    label_logprobs_N = np.full(num_tokens, draw(st.sampled_from([-np.inf, -1e30, -50.0, -12.0])), np.float32)
    return ids_NK.astype(np.int32), logprobs_NK, label_ids_N.astype(np.int32), label_logprobs_N, vocab_size


@settings(deadline=None, max_examples=300)
@given(teachers())
def test_any_teacher_comes_back_with_its_ids_order_and_shape(teacher):
    ids_NK, logprobs_NK, label_ids_N, label_logprobs_N, _ = teacher
    arrays = encode_topk(*teacher)
    found_ids_NK, found_NK, found_label_N = decode_topk(arrays)
    assert found_ids_NK.shape == found_NK.shape == ids_NK.shape and found_label_N.shape == label_ids_N.shape
    assert np.array_equal(found_ids_NK, ids_NK)
    assert_is_a_distribution(found_NK)
    assert found_label_N.dtype == np.float32 and np.isfinite(found_label_N).all()
    # Within a row, values relative to the first are off by half of the coarsest step at most, down to the clamp.
    below = np.minimum(logprobs_NK[:, :1] - logprobs_NK.astype(np.float64), LOWEST)
    assert np.abs((found_NK[:, :1].astype(np.float64) - found_NK) - below).max(initial=0) <= 0.125 + 1e-4
    # The tail is off by half a step of asin(sqrt(tail)), 0.0031 (and what a clamp at either end moves it).
    tail, found_tail = (np.clip(1 - np.exp(x.astype(np.float64)).sum(1), 0, 1) for x in (logprobs_NK, found_NK))
    assert np.abs(np.arcsin(np.sqrt(tail)) - np.arcsin(np.sqrt(found_tail))).max(initial=0) < 0.0032
    is_label_NK = ids_NK == label_ids_N[:, None]
    inside = is_label_NK.any(1)
    assert np.array_equal(found_label_N[inside], found_NK[is_label_NK])
    below_label_N = found_NK[~inside, 0] - found_label_N[~inside]
    wanted_N = np.clip(logprobs_NK[~inside, 0] - label_logprobs_N[~inside], 0, LOWEST)
    assert np.abs(below_label_N - wanted_N).max(initial=0) <= 0.125 + 1e-4


def test_rows_that_hold_all_mass_leave_a_positive_tail():
    certain = np.float32([[0.0, -200.0, -np.inf], [np.log(1 / 3)] * 3, [-1e-7, -17, -18], [-np.inf] * 3])
    ids_NK = np.tile(np.int32([2, 0, 1]), (4, 1))
    _, found_NK, _ = decode_topk(encode_topk(ids_NK, certain, ids_NK[:, 0], certain[:, 0], 3))
    assert_is_a_distribution(found_NK)
    tail_N = 1 - np.exp(found_NK[:3].astype(np.float64)).sum(1)
    assert ((tail_N > 2e-6) & (tail_N < 4e-6)).all()
    assert np.allclose(found_NK[1], np.log(1 / 3), atol=1e-5)


def test_encoding_is_deterministic_and_does_not_change_its_inputs():
    teacher = zipf_teacher(20, 1000, 5)
    copies = [array.copy() for array in teacher]
    first, second = encode_topk(*teacher, 1000), encode_topk(*copies, 1000)
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    assert all(np.array_equal(array, copy) for array, copy in zip(teacher, copies, strict=True))
    decode_topk(first)
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 1}, "kd.top_k=2: expected 1 to vocab_size=1"),
        ({"vocab_size": 5}, "teacher ids from 0 to 7: expected 0 to 4"),
        ({"label_ids": [9]}, "label ids from 9 to 9: expected 0 to 7"),
        ({"ids": [[-1, 7]]}, "teacher ids from -1 to 7"),
        ({"logprobs": [[-2, -1]]}, "rise within a row"),
        ({"logprobs": [[-1, np.nan]]}, "NaN"),
        ({"label_logprobs": [np.nan]}, "NaN"),
        ({"logprobs": [[7.5, 2.0]]}, "not logits"),
        ({"logprobs": [[0.0, 0.0]]}, "sum to 2, more than 1"),
        ({"label_ids": [1, 2]}, "expected"),
    ],
)
def test_unusable_input_is_named(change, message):
    good = {"ids": [[0, 7]], "logprobs": [[-1.0, -2.0]], "label_ids": [7], "label_logprobs": [-2.0], "vocab_size": 8}
    encode_topk(*good.values())
    with pytest.raises(ValueError, match=message):
        encode_topk(*(good | change).values())


def test_another_format_version_is_refused():
    arrays = encode_topk([[0]], [[-1.0]], [0], [-1.0], 8)
    arrays["sizes"] = arrays["sizes"] + np.array([1, 0, 0, 0])
    with pytest.raises(ValueError, match="format 2, expected 1: annotate again"):
        decode_topk(arrays)
