"""Log-probabilities of given tokens against transformers' forward passes, a sample at a time; and the sampler's own."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, ops

from mindpangu.config import ModelConfig
from mindpangu.data.batches import tokenized_to_samples
from mindpangu.model.generate import Generator
from mindpangu.model.logprobs import LogprobScorer, assemble_rows
from mindpangu.model.weights import load_model

pytestmark = pytest.mark.usefixtures("kernel")
CONFIG = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
                     vocab_size=90, max_seq_len=32, rope_theta=100.0, tie_embedding=False, eos_id=2)
ROW_LEN, NUM_ROWS, CHUNK = 16, 3, 7
LENGTHS = [3, 16, 9, 2, 5, 16, 7, 4, 11, 6, 2, 1, 13, 8, 16, 16, 15]
# Float32 through two layers with logits of up to 15; MindSpore's exp on CPU has a relative error of up to 5e-6.
ATOL = 1e-4


@pytest.fixture(scope="module")
def llama(random_llama):
    """Random weights whose logits differ as a trained model's do: standard deviation about 3."""
    llama = random_llama(CONFIG, 0)
    with torch.no_grad():
        llama.lm_head.weight *= 3
    return llama


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama.float().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    ms.set_device("CPU")  # before the first tensor
    return load_model(folder)


def scorer_for(model, **options):
    return LogprobScorer(model, row_len=ROW_LEN, num_rows=NUM_ROWS, chunk_size=CHUNK, **options)


def ragged_samples(seed, lengths=LENGTHS):
    """Samples with a random half of their tokens as targets: none in the first, all in the last."""
    random = np.random.default_rng(seed)
    tokenized = []
    for n, length in enumerate(lengths):
        is_target = random.random(length) < (0 if n == 0 else 1 if n == len(lengths) - 1 else 0.5)
        is_target[0] = False
        tokenized.append((random.integers(0, CONFIG.vocab_size, length), is_target))
    return tokenized_to_samples(tokenized)


def expected(llama, samples, temperature=1.0):
    """The log-softmax [N, V] float64 that each target is drawn from, every sample by itself; and the targets."""
    rows, double = [], llama.double()
    for start, end in zip(samples.offsets[:-1], samples.offsets[1:], strict=True):
        with torch.no_grad():
            logits = double(torch.tensor(samples.tokens[start:end][None], dtype=torch.long)).logits[0]
        targets = np.flatnonzero(samples.is_target[start:end])
        rows.append(torch.log_softmax(logits / temperature, -1).numpy()[targets - 1])
    return np.concatenate(rows), samples.tokens[samples.is_target]


@pytest.mark.parametrize(("mode", "temperature"), [("graph", 1.0), ("eager", 0.7)])
def test_scores_are_those_of_full_forward_passes_in_the_order_of_the_targets(model, llama, mode, temperature):
    scorer = scorer_for(model, mode=mode, temperature=temperature)
    for samples in (ragged_samples(0), ragged_samples(1, LENGTHS[:2]), ragged_samples(2, LENGTHS[::-1])):
        scores = scorer.score(samples)
        logprobs, labels = expected(llama, samples, temperature)
        assert all(each.dtype == np.float32 and each.shape == labels.shape for each in scores)
        np.testing.assert_allclose(scores[0], logprobs[np.arange(len(labels)), labels], rtol=0, atol=ATOL)
        np.testing.assert_allclose(scores[1], -(np.exp(logprobs) * logprobs).sum(-1), rtol=0, atol=ATOL)
        np.testing.assert_array_equal(scores[2], logprobs.argmax(-1) == labels)


def test_the_most_likely_tokens_are_all_on_top_and_the_least_likely_none(model, llama):
    scorer = scorer_for(model)
    for pick in (np.argmax, np.argmin):
        tokens = np.full(12, 5, np.int32)
        for place in range(1, 12):  # each label after those before it
            with torch.no_grad():
                logits = llama.double()(torch.tensor(tokens[None, :place], dtype=torch.long)).logits[0, -1].numpy()
            tokens[place] = pick(logits)
        _, _, is_top = scorer.score(tokenized_to_samples([(tokens, np.arange(12) > 0)]))
        assert is_top.tolist() == [float(pick is np.argmax)] * 11


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [
    (0.7, 20, 0.9), (1.0, 20, 0.9), (1.3, 20, 0.9), (1.0, 0, 1.0)])
def test_sampler_and_scorer_agree_once_the_kept_mass_is_counted(model, temperature, top_k, top_p):
    generator = Generator(model, num_slots=17, prompt_len=6, max_new_tokens=10, eos_id=7, pad_id=0,
                          temperature=temperature, top_k=top_k, top_p=top_p)
    random = np.random.default_rng(4)
    prompts = [random.integers(8, CONFIG.vocab_size, 1 + n % 6).astype(np.int32) for n in range(17)]
    answers = generator.generate(prompts, [(0, n, 0) for n in range(17)])
    samples = tokenized_to_samples([(np.concatenate([prompt, answer.tokens]),
                                     np.arange(len(prompt) + len(answer.tokens)) >= len(prompt))
                                    for prompt, answer in zip(prompts, answers, strict=True)])
    logprobs, _, _ = scorer_for(model, temperature=temperature).score(samples)
    sampled, kept = (np.concatenate([getattr(answer, name) for answer in answers])
                     for name in ("logprobs", "kept_logprobs"))
    assert np.abs(logprobs - (sampled + kept)).max() <= ATOL
    assert (kept < -1e-3).mean() > 0.1 if top_k or top_p < 1 else not kept.any()
    assert (np.exp(logprobs) < 0.5).mean() > 0.3, "the case has to leave a choice"


def test_a_scorer_sees_the_weights_of_the_moment(model):
    samples, scorer = ragged_samples(5), scorer_for(model)
    before = scorer.score(samples)
    weight = model.layers[0].o_proj.weight
    kept = weight.asnumpy().copy()
    try:
        ops.assign(weight, Tensor(kept + np.random.default_rng(0).normal(0, 0.1, kept.shape).astype(np.float32)))
        assert np.abs(scorer.score(samples)[0] - before[0]).max() > 0.1
    finally:
        ops.assign(weight, Tensor(kept))
    np.testing.assert_array_equal(scorer.score(samples), before)


def test_a_model_stored_in_bfloat16_scores_with_its_rounded_weights(folder, model, llama):
    samples = ragged_samples(6)
    frozen = load_model(folder, frozen_dtype="bfloat16")
    scores = scorer_for(frozen).score(samples)
    assert frozen.lm_head.dtype == ms.bfloat16
    # Rounding weights and activations to 8 bits moves logits of up to 15 by some hundredths.
    logprobs, labels = expected(llama, samples)
    difference = np.abs(scores[0] - logprobs[np.arange(len(labels)), labels])
    assert 1e-3 < difference.max() < 0.5 and difference.mean() < 0.1


def test_all_calls_have_the_same_shapes_and_every_target_a_slot():
    shapes, calls = set(), 0
    for samples in (ragged_samples(7), ragged_samples(8, [2] * 60), ragged_samples(9, [2, 16])):
        found = np.full(samples.is_target.sum(), -1)
        for arrays, slots in assemble_rows(samples, ROW_LEN, NUM_ROWS, pad_id=0):
            tokens, positions, lengths, index, labels, weights = arrays
            shapes.add(tuple(array.shape for array in arrays))
            calls += 1
            assert (found[slots] == -1).all() and weights.sum() == len(slots)
            found[slots] = labels[:len(slots)]
            np.testing.assert_array_equal(tokens[index[:len(slots)] + 1], labels[:len(slots)])
            assert lengths[0] == 0 and lengths[-1] == len(tokens) == ROW_LEN * NUM_ROWS
            np.testing.assert_array_equal(np.flatnonzero(positions == 0), np.unique(lengths)[:-1])
        np.testing.assert_array_equal(found, samples.tokens[samples.is_target])
    assert len(shapes) == 1 and calls >= 6
    # More documents than usual: the next power of two.
    many = ragged_samples(10, [2] * 700)
    lengths = {len(arrays[2]) for arrays, _ in assemble_rows(many, 1024, 2, pad_id=0)}
    assert lengths == {1024}


def test_without_targets_there_are_no_scores(model):
    scorer = scorer_for(model)
    for samples in (tokenized_to_samples([]), ragged_samples(11, [9])._replace(is_target=np.zeros(9, bool))):
        assert [each.shape for each in scorer.score(samples)] == [(0,)] * 3


def test_a_sample_longer_than_a_row_is_refused(model):
    with pytest.raises(ValueError, match="1 of 2 samples are longer, the longest sample has 17 tokens"):
        scorer_for(model).score(ragged_samples(12, [3, 17]))


def test_a_temperature_of_zero_is_refused(model):
    with pytest.raises(ValueError, match="temperature=0: expected a positive number"):
        scorer_for(model, temperature=0)
