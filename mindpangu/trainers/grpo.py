"""GRPO's loss: of the answers to a prompt, the better ones become more likely. trainers/rollouts.py has its batches.

G answers per prompt, N answers, S target slots.
Sources: GRPO arXiv 2402.03300; clip-higher and the token-level loss DAPO, arXiv 2503.14476; fixed_length and advantages
without standard deviation Dr. GRPO, arXiv 2503.20783; the zero-advantage mask openPangu Embedded-1B, section 3.4.
"""

from fractions import Fraction

import numpy as np
from mindspore import ops

from ..ops.head_loss import PolicyHead

METRICS = ("policy", "kl", "clipped", "entropy")


def group_advantages(rewards_G, norm):
    """float64 [G]: reward less the group's mean, over the group's standard deviation (of a sample, G - 1) if norm is
    "std". Zero for an answer at its group's mean and for no other: the loss leaves those out.

    Rewards count as the decimals that they print as: of 0.1, 0.2, 0.3 the second is at the mean, though in binary the
    mean is 0.20000000000000004.
    """
    rewards = [Fraction(repr(float(reward))) for reward in rewards_G]
    mean = sum(rewards) / len(rewards)
    advantages = np.array([float(reward - mean) for reward in rewards])
    if norm == "std" and advantages.any():
        advantages /= np.sqrt((advantages ** 2).sum() / (len(rewards) - 1))
    return advantages


def token_weights(lengths_N, loss_agg, max_len):
    """(numerators, denominators), float64 [N]: of every token of an answer with lengths_N tokens.

    The loss of a batch is sum(numerator * l) / sum(denominator) over the tokens of its answers, so
    token: the mean over tokens; sequence: the mean over answers of their tokens' mean; fixed_length: the mean over
    answers of their tokens' sum / max_len.
    """
    lengths = np.asarray(lengths_N, np.float64)
    if loss_agg == "token":
        return np.ones_like(lengths), np.ones_like(lengths)
    if loss_agg == "sequence":
        return 1 / lengths, 1 / lengths
    return np.full_like(lengths, 1 / max_len), 1 / lengths


def make_loss(model, grpo, temperature, row_len, logits_chunk):
    """loss_fn(*rollouts.Update.arrays() of one micro-batch) -> (loss_sum, metric_sums_5).

    The first of metric_sums_5 is the denominators' sum, the others belong to METRICS. See runtime.loop for the
    contract, and ops.head_loss.PolicyHead for the terms.
    """
    head = PolicyHead(logits_chunk, grpo.clip_low, grpo.clip_high, grpo.kl_coefficient)

    def loss_fn(tokens_T, positions_T, cu_seqlens_C, target_index_S, labels_S, weights_S, advantages_S, denominators_S,
                old_logprobs_S, ref_logprobs_S):
        hidden = ops.gather(model(tokens_T, positions_T, cu_seqlens_C, row_len), target_index_S, 0)
        if temperature != 1.0:
            hidden = hidden / temperature  # before the projection: logits / temperature
        return head(hidden, model.head_weight(), labels_S, weights_S, denominators_S, advantages_S, old_logprobs_S,
                    ref_logprobs_S)

    return loss_fn
