"""GRPO's arithmetic against NumPy in float64: advantages, the mask, aggregation, loss and gradients."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindpangu.config import GrpoConfig, ModelConfig
from mindpangu.data.batches import tokenized_to_samples

CONFIG = ModelConfig(hidden_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=32,
                     vocab_size=37, max_seq_len=64, rope_theta=1e4, eos_id=2, tie_embedding=False, init_std=0.3)
SEQ_LEN, MAX_LEN = 32, 20
REWARDS = (-1.0, -0.5, 0.25, 1.0)


# ---- Advantages and the mask -----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("rewards", "live"), [
    ([0.95] * 8, [False] * 8), ([0.1] * 3, [False] * 3), ([1 / 3] * 7, [False] * 7),
    ([0.0] + [0.95] * 7, [True] * 8),
    ([-1.0] * 3 + [-0.5] * 4 + [1.0], [True] * 3 + [False] * 4 + [True]),  # the mean is -0.5
    ([0.1, 0.2, 0.3], [True, False, True]),  # as decimals, though not in binary
    ([0.1, 0.2, 0.3000001], [True, True, True]), ([1.0, 1.0 + 2 ** -52], [True, True]),
])
def test_an_answer_is_live_unless_its_reward_is_exactly_the_mean_of_its_group(rewards, live):
    from mindpangu.trainers.grpo import group_advantages

    for norm in ("std", "none"):
        assert (group_advantages(rewards, norm) != 0).tolist() == live


@given(st.lists(st.integers(-200, 200), min_size=2, max_size=16))
def test_advantages_are_the_textbooks_over_any_group(hundredths):
    from mindpangu.trainers.grpo import group_advantages

    exact = [Fraction(h, 100) for h in hundredths]
    mean = sum(exact) / len(exact)
    variance = sum((reward - mean) ** 2 for reward in exact) / (len(exact) - 1)
    rewards = [h / 100 for h in hundredths]
    plain = group_advantages(rewards, "none")
    assert plain == pytest.approx([float(reward - mean) for reward in exact], abs=1e-14)
    if variance:
        expected = [float(reward - mean) / float(variance) ** 0.5 for reward in exact]
        assert group_advantages(rewards, "std") == pytest.approx(expected, rel=1e-12, abs=1e-13)
    else:
        assert not group_advantages(rewards, "std").any() and not plain.any()


def test_aggregations_are_the_means_that_they_are_named_for():
    from mindpangu.trainers.grpo import token_weights

    lengths, losses = np.array([1, 4, 20]), [np.array([3.0]), np.arange(4.0), np.full(20, 0.5)]
    expected = {"token": np.concatenate(losses).mean(),
                "sequence": np.mean([loss.mean() for loss in losses]),
                "fixed_length": np.mean([loss.sum() / MAX_LEN for loss in losses])}
    for name, value in expected.items():
        numerators, denominators = token_weights(lengths, name, MAX_LEN)
        top = sum(n * loss.sum() for n, loss in zip(numerators, losses, strict=True))
        assert top / (denominators * lengths).sum() == pytest.approx(value, rel=1e-14)


# ---- The loss of a batch ---------------------------------------------------------------------------------------------

def make_answers(seed, num_groups=6, group_size=4):
    """Answers with old and reference log-probabilities off the policy's by up to a factor of two, and rewards."""
    random = np.random.default_rng(seed)
    answers = []
    for group in range(num_groups):
        rewards = random.choice(REWARDS, group_size) if group else np.full(group_size, -0.5)  # the first one is dead
        for reward in rewards:
            prompt_len, length = int(random.integers(2, 8)), int(random.integers(1, MAX_LEN + 1))
            answers.append({"group": group, "reward": float(reward), "prompt_len": prompt_len,
                            "tokens": random.integers(3, CONFIG.vocab_size, prompt_len + length).astype(np.int32),
                            "old_shift": random.normal(0, 0.3, length), "ref_shift": random.normal(0, 0.5, length)})
    return answers


def oracle(hidden, weight, answers, grpo):
    """Loss, metrics, d loss / d output projection and d loss / d hidden states, in float64.

    hidden: per answer, the states that predict its tokens. Written from the papers' formulas: a mean over what each
    aggregation names, of -min(r A, clip(r) A) + beta k3, over the answers whose advantage is not zero.
    """
    live = [i for i, answer in enumerate(answers) if answer["advantage"] != 0]
    d_weight, d_hidden = np.zeros_like(weight), [np.zeros_like(h) for h in hidden]
    total_tokens = sum(len(hidden[i]) for i in live)
    loss, sums = 0.0, np.zeros(4)
    for i in live:
        answer, length = answers[i], len(hidden[i])
        share = {"token": 1 / total_tokens, "sequence": 1 / (length * len(live)),
                 "fixed_length": 1 / (MAX_LEN * len(live))}[grpo.loss_agg]
        mean_share = 1 / total_tokens if grpo.loss_agg == "token" else 1 / (length * len(live))
        logits = hidden[i] @ weight.T
        logits = logits - logits.max(1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        labels = answer["tokens"][answer["prompt_len"]:]
        for t, label in enumerate(labels):
            logp, advantage = logprobs[t, label], answer["advantage"]
            ratio = np.exp(logp - answer["old"][t])
            clipped = np.clip(ratio, grpo.clip_low, grpo.clip_high)
            surrogate = -min(ratio * advantage, clipped * advantage)
            is_clipped = clipped * advantage < ratio * advantage
            difference = answer["ref"][t] - logp
            k3 = np.exp(difference) - difference - 1
            probs = np.exp(logprobs[t])
            loss += share * (surrogate + grpo.kl_coefficient * k3)
            sums += [share * surrogate, mean_share * k3, mean_share * is_clipped,
                     mean_share * -(probs * logprobs[t]).sum()]
            d_logp = share * ((0 if is_clipped else -advantage * ratio) +
                              grpo.kl_coefficient * (1 - np.exp(difference)))
            d_logits = -d_logp * probs
            d_logits[label] += d_logp
            d_weight += np.outer(d_logits, hidden[i][t])
            d_hidden[i][t] = d_logits @ weight
    return loss, sums, d_weight, d_hidden


def to_update(answers, grpo, micro_batch_rows):
    """The answers as rollouts.pack_update packs them; masked ones stay out, as in Rollouts."""
    from mindpangu.trainers.grpo import token_weights
    from mindpangu.trainers.rollouts import pack_update

    live = [answer for answer in answers if answer["advantage"] != 0]
    lengths = np.array([len(answer["old"]) for answer in live])
    numerators, denominators = token_weights(lengths, grpo.loss_agg, MAX_LEN)
    extras = {"advantages": np.repeat([answer["advantage"] for answer in live], lengths),
              "weights": np.repeat(numerators, lengths), "denominators": np.repeat(denominators, lengths),
              "old_logprobs": np.concatenate([answer["old"] for answer in live]),
              "ref_logprobs": np.concatenate([answer["ref"] for answer in live])}
    samples = tokenized_to_samples(
        [(answer["tokens"], np.arange(len(answer["tokens"])) >= answer["prompt_len"]) for answer in live],
        {name: extra.astype(np.float32) for name, extra in extras.items()})
    return pack_update(samples, {"A": 1, "C": 1, "S": 8}, seq_len=SEQ_LEN, micro_batch_rows=micro_batch_rows,
                       pad_id=0)[0]


def prepare(model, seed, grpo):
    """Answers with advantages and log-probabilities around the model's own, and the states that predict them."""
    from mindspore import Tensor

    from mindpangu.trainers.grpo import group_advantages

    answers = make_answers(seed)
    for _, group in itertools.groupby(answers, key=lambda answer: answer["group"]):
        group = list(group)
        advantages = group_advantages([answer["reward"] for answer in group], grpo.advantage_norm)
        for answer, advantage in zip(group, advantages, strict=True):
            answer["advantage"] = float(advantage)
    hidden = []
    weight = model.lm_head.asnumpy().astype(np.float64)
    for answer in answers:
        length = len(answer["tokens"])
        states = model(Tensor(answer["tokens"]), Tensor(np.arange(length, dtype=np.int32)),
                       Tensor(np.array([0, length], np.int64)), length).asnumpy().astype(np.float64)
        hidden.append(states[answer["prompt_len"] - 1:-1])
        logits = hidden[-1] @ weight.T
        labels = answer["tokens"][answer["prompt_len"]:]
        logprobs = (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(len(labels)), labels]
        answer["old"] = (logprobs + answer["old_shift"]).astype(np.float32).astype(np.float64)
        answer["ref"] = (logprobs + answer["ref_shift"]).astype(np.float32).astype(np.float64)
    return answers, hidden, weight


@pytest.mark.parametrize(("loss_agg", "advantage_norm", "kl_coefficient", "splits"), [
    ("token", "std", 0.3, (8, 4, 1)), ("sequence", "none", 0.3, (8, 4)), ("fixed_length", "std", 0.0, (8, 4))])
def test_loss_and_gradient_match_numpy_for_every_split_of_the_batch(mindspore_cpu, kernel, loss_agg, advantage_norm,
                                                                     kl_coefficient, splits):
    """splits: rows per micro-batch."""
    import mindspore as ms
    from mindspore import Tensor

    from mindpangu.model.pangu import Pangu
    from mindpangu.runtime.loop import make_gradient_step
    from mindpangu.trainers.grpo import METRICS, make_loss

    grpo = GrpoConfig(loss_agg=loss_agg, advantage_norm=advantage_norm, kl_coefficient=kl_coefficient)
    model = Pangu(CONFIG, seed=1)
    answers, hidden, weight = prepare(model, 3, grpo)
    loss, sums, d_weight, _ = oracle(hidden, weight, answers, grpo)
    assert sums[2] > 0, "some tokens have to be clipped"
    parameters = ms.ParameterTuple(model.trainable_params())
    step = ms.jit(make_gradient_step(make_loss(model, grpo, 1.0, SEQ_LEN, 16), parameters, 1 + len(METRICS)))
    place = [parameter is model.lm_head for parameter in parameters].index(True)
    first = None
    for micro_batch_rows in splits:
        update = to_update(answers, grpo, micro_batch_rows)
        got, metrics, grads = step(Tensor(update.num_micro_batches, ms.int32), *map(Tensor, update.arrays()))
        metrics = metrics.asnumpy()
        assert got.asnumpy() / metrics[0] == pytest.approx(loss, rel=1e-5)
        assert metrics[1:] / metrics[0] == pytest.approx(sums, rel=2e-5, abs=1e-7)
        gradient = grads[place].asnumpy() / metrics[0]
        assert np.abs(gradient - d_weight).max() <= 1e-5 * np.abs(d_weight).max()
        grads = [grad.asnumpy() / metrics[0] for grad in grads]
        first = first or grads
        for grad, reference in zip(grads, first, strict=True):
            assert np.abs(grad - reference).max() <= 2e-6 * max(1.0, np.abs(reference).max())
