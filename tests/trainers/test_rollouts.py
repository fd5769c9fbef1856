"""What of a rollout reaches the optimizer, with which weights. Sampler, verifier and models are tables: every number is
known by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from mindpangu.config import GrpoConfig, RolloutConfig, load_recipe
from mindpangu.data.documents import Example, Message
from mindpangu.data.shards import ShardFolder
from mindpangu.data.tokenizer import train_tokenizer
from mindpangu.rewards.router import Rewards
from mindpangu.rewards.score import Score
from mindpangu.runtime.metrics import Reporter

G, MAX_LEN, SEQ_LEN, VOCAB = 4, 10, 32, 480
KEPT = -0.25  # log of the mass that the sampler's top-k and top-p keep
random = np.random.default_rng(0)
SAMPLED = -random.exponential(1.0, VOCAB).astype(np.float32)  # among all tokens
TRAINED = (SAMPLED + random.normal(0, 0.5, VOCAB)).astype(np.float32)
REFERENCE = (SAMPLED + random.normal(0, 0.5, VOCAB)).astype(np.float32)

# Of the second group two are at the mean, -0.5; 0.95 is not a binary number.
REWARDS = [[1.0] * G, [-1.0, -0.5, -0.5, 0.0], [1.0, -0.5, 1.0, -0.5], [0.0, 0.95, 0.95, 0.95]]
AT_THE_MEAN = {0, 1, 2, 3, 5, 6}


class Tables:
    """A sampler whose answers have token ids that no other answer has, and log-probabilities by token."""

    def __init__(self, first_id, end_id, truncated):
        self.next_id, self.end_id, self.truncated, self.answers = first_id, end_id, truncated, []

    def generate(self, prompts, keys):
        from mindpangu.model.generate import Answer

        for _ in keys:
            n = len(self.answers)
            length = 2 + n % 3
            tokens = np.arange(self.next_id, self.next_id + length, dtype=np.int32)
            self.next_id += length
            if n not in self.truncated:
                tokens = np.append(tokens, np.int32(self.end_id))
            kept = np.full(len(tokens), KEPT, np.float32)
            self.answers.append(Answer(tokens, SAMPLED[tokens] - kept, kept, n in self.truncated))
        return self.answers[-len(keys):]


class Scorer:
    def __init__(self, logprobs_V):
        self.logprobs_V = logprobs_V

    def score(self, samples):
        return (self.logprobs_V[samples.tokens[samples.is_target]],)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [f"Tom has {a} apples and buys {b} more. How many does he have together, before his sister takes a third "
             f"of them? He has {a} + {b} = {a + b}.\n#### {a + b}" for a in range(30) for b in range(9)]
    letters = "".join(map(chr, range(32, 127)))
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer([*texts, letters, "系统：用户：助手："], VOCAB, file)


@pytest.fixture
def rollouts(tokenizer, tmp_path):
    """build(rewards_PG, truncated answers, their reasons, GrpoConfig's fields) -> (Rollouts, Tables)."""
    from mindpangu.runtime.distributed import Ranks
    from mindpangu.trainers.rollouts import Rollouts

    def build(rewards_PG=REWARDS, truncated=(), reasons=None, **grpo):
        grpo = GrpoConfig(**{"prompts_per_rollout": len(rewards_PG), "updates_per_rollout": 2} | grpo)
        tables, rows, reasons = Tables(300, tokenizer.turn_end_id, truncated), iter(rewards_PG), iter(reasons or ())

        def score_groups(problems, responses_PG):
            return [[Score(reward, {"correct": float(reward > 0)}, next(reasons, "correct")) for reward in next(rows)]
                    for _ in responses_PG]

        problems = [Example((Message("user", f"Problem {i}?"), Message("assistant", "")), "1") for i in range(8)]
        return Rollouts(
            [np.array([1, 5 + i], np.int32) for i in range(8)], problems, grpo=grpo,
            rollout=RolloutConfig(samples_per_prompt=G, max_prompt_len=8, max_new_tokens=MAX_LEN, prompts_per_shard=3),
            tokenizer=tokenizer, seq_len=SEQ_LEN, micro_batch_rows=2, seed=0, folder=tmp_path / "rollouts",
            sampler=tables, score_groups=score_groups, policy=Scorer(TRAINED), reference=Scorer(REFERENCE),
            digest=lambda: "weights", progress=lambda total: Reporter("shards", total, within=True),
            ranks=Ranks()), tables

    return build


def targets(update):
    """Of every token that takes part in the loss: label, weight, advantage, denominator, old and reference
    log-probability; sorted."""
    _, _, _, _, labels, weights, advantages, denominators, old, ref = update.arrays()
    rows = np.stack([labels, weights, advantages, denominators, old, ref], -1).reshape(-1, 6)
    return np.array(sorted(map(tuple, rows[(rows[:, 1] != 0) | (rows[:, 3] != 0)])))


def expected(answers, rewards_PG, chosen, loss_agg, correction=None):
    """The same for the chosen answers, by their places, from the papers' definitions."""
    rows = []
    for n in chosen:
        tokens, group = answers[n].tokens, np.array(rewards_PG[n // G])
        advantage = (group[n % G] - group.mean()) / group.std(ddof=1)
        weight = {"token": 1, "sequence": 1 / len(tokens), "fixed_length": 1 / MAX_LEN}[loss_agg]
        denominator = 1 if loss_agg == "token" else 1 / len(tokens)
        rows += [(token, weight, advantage * (correction(token) if correction else 1), denominator, TRAINED[token],
                  REFERENCE[token]) for token in tokens]
    return np.array(sorted(rows))


@pytest.mark.parametrize("loss_agg", ["token", "sequence", "fixed_length"])
def test_answers_at_their_groups_mean_leave_numerator_denominator_and_kl(rollouts, loss_agg):
    batches, tables = rollouts(loss_agg=loss_agg)
    updates = [next(batches), next(batches)]
    for update, places in zip(updates, (range(8), range(8, 16)), strict=True):
        chosen = [n for n in places if n not in AT_THE_MEAN]
        np.testing.assert_allclose(targets(update), expected(tables.answers, REWARDS, chosen, loss_agg), rtol=1e-6)
        absent = {int(token) for n in AT_THE_MEAN for token in tables.answers[n].tokens[:-1]}
        assert not absent & set(update.arrays()[0].ravel().tolist()), "they are not even computed"


def test_equal_rewards_alone_leave_an_update_in_which_nothing_counts(rollouts):
    batches, _ = rollouts([[0.95] * G, [1 / 3] * G, [1.0, -0.5, 1.0, -0.5], [0.1] * G])
    dead, live = next(batches), next(batches)
    assert not any(array.any() for array in dead.arrays()[5:]) and dead.num_micro_batches == 1
    assert len(targets(live)) > 0


def test_the_importance_correction_is_the_probability_ratio_up_to_its_cap(rollouts):
    batches, tables = rollouts(importance_cap=1.2, updates_per_rollout=1)
    found = targets(next(batches))
    live = [n for n in range(16) if n not in AT_THE_MEAN]
    ratios = np.exp(TRAINED.astype(np.float64) - SAMPLED)
    used = np.concatenate([ratios[tables.answers[n].tokens] for n in live])
    assert (used > 1.2).mean() > 0.1 and (used < 1).mean() > 0.1, "the case has to cut some and not others"
    np.testing.assert_allclose(
        found, expected(tables.answers, REWARDS, live, "token", lambda token: min(ratios[token], 1.2)), rtol=1e-6)


@pytest.mark.parametrize("mask", [False, True])
def test_truncated_answers_leave_the_loss_where_that_is_asked_for(rollouts, mask):
    batches, tables = rollouts(REWARDS[2:], {0, 5}, mask_truncated=mask, updates_per_rollout=1)
    found = targets(next(batches))
    chosen = [n for n in range(8) if not (mask and n in (0, 5))]
    np.testing.assert_allclose(found, expected(tables.answers, REWARDS[2:], chosen, "token"), rtol=1e-6)


def test_answers_that_no_judge_has_judged_teach_nothing(rollouts):
    reasons = ["judged", "judge_unreachable", "judge_unparsable", "judged", "judge_refused", *["judged"] * 3]
    batches, tables = rollouts(REWARDS[2:], reasons=reasons, updates_per_rollout=1)
    found = targets(next(batches))
    np.testing.assert_allclose(found, expected(tables.answers, REWARDS[2:], (0, 3, 5, 6, 7), "token"), rtol=1e-6)


def test_dynamic_sampling_trains_on_the_first_groups_that_differ_and_goes_on_behind_them(rollouts, tmp_path):
    dead, first, second, third = [0.5] * G, REWARDS[2], REWARDS[3], [-1.0, 1.0, 1.0, 1.0]
    rewards = [dead, first, second, third, dead, dead, dead, dead, first, dead]
    batches, tables = rollouts(rewards, prompts_per_rollout=2, updates_per_rollout=1, dynamic_sampling=True,
                               max_resamples=2)
    found = targets(next(batches))
    np.testing.assert_allclose(found, expected(tables.answers, rewards, range(4, 12), "token"), rtol=1e-6)
    # Four prompts were taken; of the next six, as many as three rounds ask for, one group differs.
    found = targets(next(batches))
    np.testing.assert_allclose(found, expected(tables.answers, rewards, range(32, 36), "token"), rtol=1e-6)
    assert batches.take_metrics()["rounds"] == 3 and batches.state_dict()["place"]["position"] == 10
    asked = [{json.loads(line)["prompt_index"] for line in path.read_text().splitlines()}
             for path in sorted((tmp_path / "rollouts").glob("00000[01]/round-*.jsonl"))]
    assert len(set().union(*asked[:4])) == 8, "every problem comes before one comes again"


def test_metrics_are_those_of_all_answers_of_a_rollout(rollouts):
    batches, tables = rollouts(truncated={7, 9})
    next(batches)
    found = batches.take_metrics()
    assert 0 < found.pop("rollout_time") <= 1
    live = np.concatenate([tables.answers[n].tokens for n in range(16) if n not in AT_THE_MEAN])
    differences = np.abs(TRAINED[live].astype(np.float64) - SAMPLED[live])
    assert found == pytest.approx({
        "reward": np.mean(REWARDS), "correct": 9 / 16, "truncated": 2 / 16, "dead_groups": 1 / 4, "masked": 6 / 16,
        "answer_len": np.mean([len(answer.tokens) for answer in tables.answers]), "rounds": 1, "reason/correct": 16,
        "sampler_diff": differences.mean(), "sampler_diff_max": differences.max()}, rel=1e-5)


# ---- Pass rates before training

RIGHT, WRONG, TWICE = "2 + 3 = 5\n#### 5", "2 + 3 = 4\n#### 4", "#### 4\n#### 5"  # two final answers are a wrong format
CUT = "..."  # marks an answer that was truncated behind its last line
PROBLEMS = {  # two answers each: (the problem's value, the answers)
    "never": ("5", [WRONG, WRONG]), "always": ("5", [RIGHT, RIGHT]), "sometimes": ("5", [WRONG, RIGHT]),
    "of equal rewards, right once": ("5", [TWICE, WRONG + CUT]),  # both -1
    "of unequal rewards, always right": ("5", [RIGHT, RIGHT + CUT]),  # 1 and -1
    "without a verifier": (None, [WRONG, WRONG])}


def graded(tokenizer, folder, problems, rewards=None):
    """(places of the problems that are kept, pass_rates.json) of answers in two shards."""
    from mindpangu import pipeline
    from mindpangu.distillation.sample import Answers

    recipe = load_recipe(["recipe=grpo", "scale=smoke", "grpo.pass_rate_samples=2"])
    shards = ShardFolder.open(folder / "answers", {"model": "m"}, 2)
    for shard, places in enumerate(np.array_split(np.arange(len(problems)), 2)):
        texts = [(p, s, text) for p in places for s, text in enumerate(problems[p][1])]
        tokens = [[1, *tokenizer.encode(text.removesuffix(CUT)), *[tokenizer.turn_end_id] * (not text.endswith(CUT))]
                  for _, _, text in texts]
        count = sum(map(len, tokens)) - len(tokens)
        shards.write(shard, Answers(
            np.concatenate(tokens).astype(np.int32), np.cumsum([0, *map(len, tokens)]), np.ones(len(tokens), np.int32),
            *np.zeros((2, count), np.float32), *np.array([row[:2] for row in texts], np.int32).T,
            np.array([text.endswith(CUT) for *_, text in texts], np.uint8))._asdict())
    examples = [Example((Message("user", "2 + 3?"), Message("assistant", "")), value) for value, _ in problems]
    plan = SimpleNamespace(recipe=recipe, corpus=SimpleNamespace(train=examples), tokenizer=tokenizer, rewards=rewards,
                           folder=folder)
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "_answers", lambda plan, split, samples_per_prompt: shards)
        kept = pipeline._solved_sometimes(plan)
    return kept, json.loads((folder / "pass_rates.json").read_text())


def test_problems_that_are_solved_sometimes_are_kept_whatever_their_rewards(tokenizer, tmp_path):
    problems = list(PROBLEMS.values())
    with Rewards(load_recipe(["recipe=grpo"]).rewards, 100) as rewards:
        kept, rates = graded(tokenizer, tmp_path, problems, rewards)
        assert [list(PROBLEMS)[i] for i in kept] == ["sometimes", "of equal rewards, right once", "without a verifier"]
        assert rates == {"samples": 2, "problems": [1, 2, 2], "kept": 3}
    # Kept beside the answers: a second start asks no verifier.
    (tmp_path / "pass_rates.json").unlink()
    assert graded(tokenizer, tmp_path, problems) == (kept, rates)


def test_a_model_that_solves_everything_always_or_never_is_an_error(tokenizer, tmp_path):
    words = "solves every problem always or never.*problems of other difficulty, or another init_from"
    with Rewards(load_recipe(["recipe=grpo"]).rewards, 100) as rewards, pytest.raises(ValueError, match=words):
        graded(tokenizer, tmp_path, [PROBLEMS["never"], PROBLEMS["always"]], rewards)
