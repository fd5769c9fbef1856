"""Generation with a cache and continuous refill against transformers' full forward passes, a prompt at a time."""

import mindspore as ms
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor, ops
from transformers import LlamaForCausalLM

from mindpangu.config import ModelConfig
from mindpangu.model.generate import Generator, uniforms
from mindpangu.model.weights import load_model, save_weights

pytestmark = pytest.mark.usefixtures("mindspore_cpu")
CONFIG = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
                     vocab_size=50, max_seq_len=24, rope_theta=100.0, tie_embedding=False, eos_id=2)
PROMPT_LEN, MAX_NEW, NUM_SLOTS = 9, 12, 8
SAMPLING = {"temperature": 0.7, "top_k": 5, "top_p": 0.8}
SAMPLED_EOS = 21  # these weights reach it early, late or never: answers of every length
# Float32 through two layers with logits of up to 15; MindSpore's exp on CPU has a relative error of up to 5e-6.
ATOL = 1e-4


@pytest.fixture(scope="module")
def model(random_llama, tmp_path_factory):
    """Random weights whose logits differ clearly: standard deviation about 3."""
    ms.set_device("CPU")  # before the first tensor; the fixture for a single test comes later
    folder = tmp_path_factory.mktemp("llama")
    llama = random_llama(CONFIG, 0)
    with torch.no_grad():
        llama.lm_head.weight *= 3
    llama.save_pretrained(folder)
    return load_model(folder)


@pytest.fixture(scope="module")
def llama(model, tmp_path_factory):
    return as_llama(model, tmp_path_factory.mktemp("saved"))


def as_llama(model, folder):
    save_weights(model, folder)
    return LlamaForCausalLM.from_pretrained(folder).double()


def full_logits(llama, tokens):
    """[T, V], float64, of one sequence by itself."""
    with torch.no_grad():
        return llama(torch.tensor(np.asarray(tokens)[None], dtype=torch.long)).logits[0].numpy()


def naive_greedy(llama, prompt):
    """MAX_NEW tokens, each from a full forward pass over all before it."""
    tokens = prompt.tolist()
    for _ in range(MAX_NEW):
        tokens.append(int(full_logits(llama, tokens)[-1].argmax()))
    return tokens[len(prompt):]


def kept_logprobs(logits_V, temperature, top_k, top_p):
    """Log-probabilities [V] within the kept tokens, -inf elsewhere, by the definition."""
    order = np.argsort(-logits_V)[:top_k]
    probs = np.exp((logits_V[order] - logits_V.max()) / temperature)
    probs /= probs.sum()
    num_kept = int(np.searchsorted(np.cumsum(probs), top_p)) + 1
    kept = np.full(logits_V.size, -np.inf)
    kept[order[:num_kept]] = np.log(probs[:num_kept] / probs[:num_kept].sum())
    return kept


def ragged_prompts(count, seed=0):
    """All lengths from 1 to PROMPT_LEN, tokens from 3 on."""
    random = np.random.default_rng(seed)
    lengths = np.concatenate([[1, PROMPT_LEN], random.integers(1, PROMPT_LEN + 1, count)])[:count]
    return [random.integers(3, CONFIG.vocab_size, length).astype(np.int32) for length in lengths]


def generator_for(model, eos_id=CONFIG.eos_id, num_slots=NUM_SLOTS, **options):
    return Generator(model, num_slots=num_slots, prompt_len=PROMPT_LEN, max_new_tokens=MAX_NEW, eos_id=eos_id,
                     pad_id=CONFIG.pad_id, **options)


def draw(generator, prompts, numbers=None):
    """generate, prompt i with the random numbers of index numbers[i] (default i)."""
    numbers = range(len(prompts)) if numbers is None else numbers
    return generator.generate(prompts, [(5, number, 0) for number in numbers])


@pytest.fixture(scope="module")
def sampler(model):
    return generator_for(model, eos_id=SAMPLED_EOS, **SAMPLING)


def test_greedy_answers_are_those_of_full_forward_passes_also_after_the_weights_change(model, llama, tmp_path):
    prompts = ragged_prompts(22)
    endless = [naive_greedy(llama, prompt) for prompt in prompts]
    # The token that ends about half of the answers.
    shares = [sum(token in answer for answer in endless) / len(prompts) for token in range(CONFIG.vocab_size)]
    eos_id = int(np.abs(np.array(shares) - 0.5).argmin())
    generator = generator_for(model, eos_id, temperature=0.0)
    finished = {}

    def check(answers, endless, llama):
        lengths = set()
        for prompt, answer, expected in zip(prompts, answers, endless, strict=True):
            if eos_id in expected:
                expected = expected[:expected.index(eos_id) + 1]
            assert answer.tokens.tolist() == expected and answer.tokens.dtype == np.int32
            assert answer.truncated == (expected[-1] != eos_id) and (len(expected) == MAX_NEW or not answer.truncated)
            logits = full_logits(llama, [*prompt, *expected])[len(prompt) - 1:-1]
            logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            np.testing.assert_allclose(answer.logprobs, logprobs[np.arange(len(expected)), expected], atol=ATOL)
            assert answer.kept_logprobs.shape == answer.logprobs.shape and not answer.kept_logprobs.any()
            lengths.add((len(expected), answer.truncated))
        return lengths

    answers = generator.generate(prompts, on_answer=finished.__setitem__)
    lengths = check(answers, endless, llama)
    assert len(lengths) >= 4 and {truncated for _, truncated in lengths} == {True, False}
    assert sorted(finished) == list(range(len(prompts)))

    before = {parameter: parameter.asnumpy().copy() for parameter in model.get_parameters()}
    random = np.random.default_rng(1)
    try:
        for parameter, array in before.items():
            ops.assign(parameter, Tensor(array + random.normal(0, 0.1, array.shape).astype(np.float32)))
        answers = generator.generate(prompts)
        assert [a.tokens.tolist() for a in answers] != [finished[i].tokens.tolist() for i in range(len(prompts))]
        changed = as_llama(model, tmp_path / "changed")
        check(answers, [naive_greedy(changed, prompt) for prompt in prompts], changed)
    finally:
        for parameter, array in before.items():
            ops.assign(parameter, Tensor(array))


def test_sampled_logprobs_are_those_of_the_kept_set_in_a_full_forward_pass(sampler, llama):
    prompts = ragged_prompts(40, seed=1)
    answers = draw(sampler, prompts)
    logprobs = []
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = full_logits(llama, [*prompt, *answer.tokens])[len(prompt) - 1:-1]
        expected = [kept_logprobs(row, **SAMPLING)[token] for row, token in zip(logits, answer.tokens, strict=True)]
        assert np.isfinite(expected).all(), "a token outside the kept set"
        np.testing.assert_allclose(answer.logprobs, expected, atol=ATOL)
        scaled = logits / SAMPLING["temperature"]
        whole = scaled[np.arange(len(answer.tokens)), answer.tokens] - np.log(np.exp(scaled).sum(-1))
        np.testing.assert_allclose(answer.logprobs + answer.kept_logprobs, whole, atol=ATOL)
        assert answer.kept_logprobs.dtype == np.float32 and (answer.kept_logprobs < 0).all()
        logprobs += expected
    assert np.mean(np.array(logprobs) < -0.1) > 0.3, "the case has to leave a choice"


def test_each_token_is_the_one_its_uniform_number_stands_for(sampler, llama):
    prompts = ragged_prompts(12, seed=2)
    for i, (prompt, answer) in enumerate(zip(prompts, draw(sampler, prompts), strict=True)):
        logits = full_logits(llama, [*prompt, *answer.tokens])[len(prompt) - 1:-1]
        for row, token, number in zip(logits, answer.tokens, uniforms(5, i, 0, MAX_NEW), strict=False):
            logprobs = kept_logprobs(row, **SAMPLING)
            order = np.argsort(-row)[:SAMPLING["top_k"]]  # the most likely first
            ends = np.cumsum(np.exp(logprobs[order]))
            place = order.tolist().index(token)
            assert (ends[place - 1] if place else 0) - ATOL <= number <= ends[place] + ATOL


def test_an_answer_does_not_depend_on_its_company_its_order_or_the_number_of_slots(model, sampler):
    prompts = ragged_prompts(37, seed=3)
    together = draw(sampler, prompts)
    lengths = [len(answer.tokens) for answer in together]
    assert min(lengths) <= 3 and max(lengths) == MAX_NEW and len(set(lengths)) >= 5

    def same(answers, chosen):
        for answer, i in zip(answers, chosen, strict=True):
            assert answer.tokens.tolist() == together[i].tokens.tolist() and answer.truncated == together[i].truncated
            np.testing.assert_allclose(answer.logprobs, together[i].logprobs, atol=ATOL)
            np.testing.assert_allclose(answer.kept_logprobs, together[i].kept_logprobs, atol=ATOL)

    random = np.random.default_rng(0)
    for chosen in (random.permutation(37), random.permutation(37)[:11], [36], [4, 5]):
        same(draw(sampler, [prompts[i] for i in chosen], list(chosen)), chosen)
    few_slots = generator_for(model, SAMPLED_EOS, num_slots=3, **SAMPLING)
    same(draw(few_slots, prompts), range(37))


def test_eager_generates_what_the_graph_does(model, sampler):
    prompts = ragged_prompts(6, seed=4)
    eager = generator_for(model, SAMPLED_EOS, mode="eager", **SAMPLING)
    for one, other in zip(draw(eager, prompts), draw(sampler, prompts), strict=True):
        assert one.tokens.tolist() == other.tokens.tolist() and one.truncated == other.truncated
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=ATOL)
        np.testing.assert_allclose(one.kept_logprobs, other.kept_logprobs, atol=ATOL)


def test_answers_end_at_eos_and_at_the_limit(sampler):
    answers = draw(sampler, ragged_prompts(37, seed=3))
    for answer in answers:
        assert SAMPLED_EOS not in answer.tokens[:-1] and len(answer.tokens) == len(answer.logprobs) <= MAX_NEW
        assert answer.truncated == (answer.tokens[-1] != SAMPLED_EOS)
        assert len(answer.tokens) == MAX_NEW or not answer.truncated
    assert {answer.truncated for answer in answers} == {True, False}
    assert any(len(answer.tokens) == MAX_NEW and not answer.truncated for answer in answers), "eos in the last place"


def test_no_prompts_give_no_answers(sampler):
    assert draw(sampler, []) == []


def test_sampling_without_a_key_for_each_prompt_is_refused(sampler):
    prompts = ragged_prompts(3)
    with pytest.raises(ValueError, match=r"keys=None at temperature 0.7: expected a \(seed, prompt_index, sample"):
        sampler.generate(prompts)
    with pytest.raises(ValueError, match="2 keys for 3 prompts: expected one for each"):
        sampler.generate(prompts, [(5, 0, 0), (5, 1, 0)])


def test_a_prompt_of_a_wrong_length_is_named(sampler):
    for length in (0, PROMPT_LEN + 1):
        with pytest.raises(ValueError, match=f"prompt 1 has {length} tokens; .* rollout.max_prompt_len={PROMPT_LEN}"):
            draw(sampler, [np.array([3], np.int32), np.full(length, 3, np.int32)])


def test_a_cache_longer_than_the_model_is_refused(model):
    with pytest.raises(ValueError, match="prompts of 20 and answers of 5 tokens exceed model.max_seq_len=24.*shorten"):
        Generator(model, num_slots=2, prompt_len=20, max_new_tokens=5, eos_id=2, pad_id=0)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.integers(0, 2**31 - 1), st.integers(0, 2**20 - 1), st.integers(1, 300))
def test_uniforms_are_a_function_of_their_integers_alone(seed, prompt, sample, count):
    numbers = uniforms(seed, prompt, sample, count)
    np.random.seed(0)
    assert np.array_equal(numbers, uniforms(seed, np.int64(prompt), np.int32(sample), count))
    assert numbers.shape == (count,) and numbers.dtype == np.float32
    assert numbers.min() >= 0 and numbers.max() <= 1 - 2**-23
    assert np.array_equal(numbers[:count // 2], uniforms(seed, prompt, sample, max(1, count // 2))[:count // 2])


def test_uniforms_differ_between_seeds_prompts_and_samples_and_fill_the_interval():
    streams = {(seed, prompt, sample): uniforms(seed, prompt, sample, 64)
               for seed in (0, 1) for prompt in range(40) for sample in range(4)}
    assert len({stream.tobytes() for stream in streams.values()}) == len(streams)
    numbers = np.concatenate(list(streams.values()))
    # 20480 numbers: the mean of a right generator lies within 5 standard deviations of 1 / 2.
    assert abs(numbers.mean() - 0.5) < 5 / np.sqrt(12 * numbers.size)
    assert np.histogram(numbers, 16, (0, 1))[0].min() > 0.8 * numbers.size / 16

