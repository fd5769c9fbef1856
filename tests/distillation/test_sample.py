"""Sampled answers: shards that a killed run continues, their filter, and the samples made of them."""

import re
from functools import partial

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindpangu.config import ModelConfig
from mindpangu.data.shards import ShardFolder, SharedShards
from mindpangu.distillation.sample import Answers, answers_to_samples, find_unwanted, is_repetitive, sample_answers
from mindpangu.model.generate import Generator
from mindpangu.model.pangu import Pangu
from mindpangu.runtime.cluster import World

CONFIG = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24,
                     vocab_size=12, max_seq_len=24, rope_theta=100.0, init_std=0.3, eos_id=2)


def hand_made_answers():
    """Answers [7, 2], [] of a prompt alone, [5, 5, 5, 5, 2] and [8, 9, 8] (truncated), behind prompts of 1 to 3."""
    sequences = [([1, 3, 4], [7, 2]), ([1, 3], []), ([1], [5, 5, 5, 5, 2]), ([1, 4, 4], [8, 9, 8])]
    lengths = [len(prompt) + len(answer) for prompt, answer in sequences]
    return Answers(tokens=np.array([token for prompt, answer in sequences for token in prompt + answer], np.int32),
                   offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
                   prompt_lens=np.array([len(prompt) for prompt, _ in sequences], np.int32),
                   logprobs=np.zeros(sum(len(answer) for _, answer in sequences), np.float32),
                   kept_logprobs=np.zeros(sum(len(answer) for _, answer in sequences), np.float32),
                   prompt_index=np.array([0, 0, 1, 1], np.int32), sample_index=np.array([0, 1, 0, 1], np.int32),
                   truncated=np.array([0, 0, 0, 1], np.uint8))


@pytest.mark.parametrize(("text", "max_repeats", "expected"), [
    ("abcdefgh", 1, False),
    ("aa", 1, True),
    ("aa", 2, False),  # exactly max_repeats
    ("aaa", 2, True),
    ("xxabababyy", 3, False),
    ("xxabababyy", 2, True),
    ("xxababyabab", 2, False),  # twice, interrupted, twice
    ("abcabcabca", 3, False),  # the fourth has only begun
    ("abcabcabcabc", 3, True),
    ("zabcabcabcabcz", 3, True),
    ("", 1, False),
    ("a", 1, False),
    ("0123456789abcdef" * 3, 2, True),  # the longest phrase looked for
    ("0123456789abcdefg" * 3, 2, False),  # 17 tokens: too long a phrase
])
def test_repetition_is_more_than_max_repeats_of_a_phrase_in_a_row(text, max_repeats, expected):
    assert is_repetitive([ord(letter) for letter in text], max_repeats) is expected


@settings(deadline=None, max_examples=300)
@given(st.text("ab", max_size=40) | st.text("abc", max_size=60), st.integers(1, 5), st.integers(1, 6))
def test_repetition_is_what_a_regular_expression_finds(text, max_repeats, longest):
    found = re.search(rf"(.{{1,{longest}}}?)\1{{{max_repeats},}}", text)
    assert is_repetitive([ord(letter) for letter in text], max_repeats, longest) is bool(found)


def test_every_criterion_flags_its_answers():
    answers = hand_made_answers()
    assert [answers.answer(n).tolist() for n in range(len(answers))] == [[7, 2], [], [5, 5, 5, 5, 2], [8, 9, 8]]
    flags = find_unwanted(answers, ["truncated", "repetitive", "wrong", "short"], min_tokens=3, max_repeats=3,
                          is_wrong=lambda n: n in (0, 3))
    assert {name: array.tolist() for name, array in flags.items()} == {
        "truncated": [False, False, False, True], "repetitive": [False, False, True, False],
        "wrong": [True, False, False, True], "short": [True, True, False, False]}
    assert all(array.dtype == bool for array in flags.values())


def test_only_the_criteria_asked_for_are_computed():
    def is_wrong(n):
        raise AssertionError("not asked for")

    answers = hand_made_answers()
    assert list(find_unwanted(answers, ["short"], min_tokens=1, max_repeats=4, is_wrong=is_wrong)) == ["short"]
    assert find_unwanted(answers, [], min_tokens=1, max_repeats=4, is_wrong=is_wrong) == {}


def test_targets_are_the_answers_tokens_and_a_truncated_answer_has_no_closing_label():
    answers = hand_made_answers()
    samples = answers_to_samples(answers)
    assert np.array_equal(samples.tokens, answers.tokens) and samples.tokens.dtype == np.int32
    assert np.array_equal(samples.offsets, answers.offsets) and samples.is_target.dtype == bool
    assert samples.tokens[samples.is_target].tolist() == [7, 2, 5, 5, 5, 5, 2, 8, 9, 8]  # no 2 behind 8, 9, 8
    assert samples.is_target.tolist() == [False] * 3 + [True] * 2 + [False] * 3 + [True] * 5 + [False] * 3 + [True] * 3
    assert samples.extras == {}


def test_answers_that_were_not_kept_leave_no_token():
    samples = answers_to_samples(hand_made_answers(), np.array([False, False, True, True]))
    assert samples.tokens.tolist() == [1, 5, 5, 5, 5, 2, 1, 4, 4, 8, 9, 8]
    assert samples.offsets.tolist() == [0, 6, 12] and samples.offsets.dtype == np.int64
    assert samples.is_target.tolist() == [False] + [True] * 5 + [False] * 3 + [True] * 3
    nothing = answers_to_samples(hand_made_answers(), np.zeros(4, bool))
    assert len(nothing.tokens) == 0 and nothing.offsets.tolist() == [0]


@pytest.fixture(scope="module")
def generator():
    ms.set_device("CPU")  # before the first tensor
    return Generator(Pangu(CONFIG, seed=1), num_slots=4, prompt_len=6, max_new_tokens=8, eos_id=2, pad_id=0, top_k=9)


PROMPTS = [np.random.default_rng(0).integers(3, 12, 1 + n % 6).astype(np.int32) for n in range(11)]
BINDING = {"model": "aaaa", "data": "bbbb"}


def fill(generator, shards, seed=3):
    sample_answers(generator, PROMPTS, samples_per_prompt=3, seed=seed, prompts_per_shard=4,
                   shards=SharedShards(shards, World()))


def test_shards_hold_every_prompts_samples_in_order(generator, mindspore_cpu, tmp_path):
    shards = ShardFolder.open(tmp_path / "answers", BINDING, 3)
    fill(generator, shards)
    assert shards.complete
    parts = [Answers(**arrays) for arrays in shards.read_all()]
    assert [len(part) for part in parts] == [12, 12, 9]
    pairs = [(p, s) for part in parts for p, s in zip(part.prompt_index, part.sample_index, strict=True)]
    assert pairs == [(p, s) for p in range(11) for s in range(3)]
    generated, ended = {}, set()
    for part in parts:
        starts = np.concatenate([[0], np.cumsum(np.diff(part.offsets) - part.prompt_lens)])
        assert starts[-1] == len(part.logprobs) and part.offsets[-1] == len(part.tokens)
        for n in range(len(part)):
            prompt, sample, answer = int(part.prompt_index[n]), int(part.sample_index[n]), part.answer(n)
            assert np.array_equal(part.tokens[part.offsets[n]:][:part.prompt_lens[n]], PROMPTS[prompt])
            assert part.truncated[n] == (answer[-1] != 2) and 2 not in answer[:-1]
            assert len(answer) == 8 or not part.truncated[n]
            own = slice(starts[n], starts[n + 1])
            generated[prompt, sample] = answer.tolist(), part.logprobs[own], part.kept_logprobs[own]
            ended.add(bool(part.truncated[n]))
    assert ended == {True, False}
    assert len({tuple(generated[0, s][0]) for s in range(3)}) == 3, "samples of a prompt differ"

    # Each by itself: the shard it came in and the answers beside it leave no trace.
    for prompt, sample in ((0, 2), (5, 0), (10, 1)):
        [alone] = generator.generate([PROMPTS[prompt]], [(3, prompt, sample)])
        tokens, logprobs, kept_logprobs = generated[prompt, sample]
        assert alone.tokens.tolist() == tokens
        np.testing.assert_allclose(alone.logprobs, logprobs, atol=1e-5)  # float32
        np.testing.assert_allclose(alone.kept_logprobs, kept_logprobs, atol=1e-5)
        assert (kept_logprobs < 0).all(), "top-k 9 of 12 tokens drops some mass"


def test_a_run_that_lost_shards_writes_the_same_bytes_again(generator, mindspore_cpu, tmp_path):
    shards = ShardFolder.open(tmp_path, BINDING, 3)
    fill(generator, shards)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert sorted(whole) == ["00000.shard", "00001.shard", "00002.shard", "manifest.json"]
    (tmp_path / "00001.shard").unlink()
    (tmp_path / "00002.shard.partial").write_bytes(b"a killed writer's")
    kept = (tmp_path / "00000.shard").stat().st_mtime_ns
    again = ShardFolder.open(tmp_path, BINDING, 3)
    assert again.missing() == [1]
    fill(generator, again)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == whole
    assert (tmp_path / "00000.shard").stat().st_mtime_ns == kept, "what was there is not generated again"


def test_another_seed_draws_other_answers(generator, mindspore_cpu, tmp_path):
    open_folder = partial(ShardFolder.open, binding=BINDING, num_shards=3)
    one, other = open_folder(tmp_path / "one"), open_folder(tmp_path / "other")
    fill(generator, one)
    fill(generator, other, seed=4)
    assert one.read(0)["tokens"].tolist() != other.read(0)["tokens"].tolist()
