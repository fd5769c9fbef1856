"""From answers to rewards: the papers' values, partial credit, penalties, and what no answer can break."""

import json

import pytest

from mindpangu.config import CodeRewardConfig, JudgeConfig, RewardsConfig, load_recipe
from mindpangu.data.corpus import load_corpus
from mindpangu.data.documents import Example, Message, task_type
from mindpangu.rewards.router import Rewards
from mindpangu.rewards.sandbox import Isolation
from mindpangu.rewards.score import Response


def problem(prompt="What is 6 * 7?", **fields):
    return Example((Message("user", prompt), Message("assistant", "")), **fields)


MATH, FRACTION = problem(value="42"), problem(value=r"\frac{1}{3}")
CODE = problem("Write f.", tests=("assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 5"), task_type="code")
STORY = problem("Tell a story.", task_type="preference")


@pytest.fixture(scope="module")
def rewards():
    with Rewards(RewardsConfig(), max_new_tokens=100) as rewards:
        yield rewards


def scored(rewards, problem, *contents, **fields):
    return rewards.score_groups([problem], [[Response(content, **fields) for content in contents]])[0]


def test_the_papers_values(rewards):
    scores = scored(rewards, MATH, "6*7=42\n#### 42", "6*7=48\n#### 48", "It is 42, I think", "#### 42\n#### 42", "",
                    r"$\boxed{42}$", "答案：42")
    assert [score.value for score in scores] == [1.0, -0.5, -1.0, -1.0, -1.0, 1.0, 1.0]
    assert [score.reason for score in scores] == ["correct", "wrong_answer", "no_answer", "several_answers", "empty",
                                                  "correct", "correct"]
    assert [score.value for score in scored(rewards, MATH, "6*7=42\n#### 42", ended=False)] == [-1.0]
    assert [score.value for score in scored(rewards, FRACTION, r"\boxed{\frac{2}{6}}", r"\boxed{0.3}")] == [1.0, -0.5]


def test_correctness_is_apart_from_the_format(rewards):
    """What the pass rate counts: a right answer in a wrong form is right."""
    contents = ["#### 42", "#### 41\n#### 42", "#### 41"]
    assert rewards.are_correct([MATH] * 3, [Response(content, ended=False) for content in contents]) == [
        True, True, False]
    first, second, third = scored(rewards, MATH, *contents)
    assert (first.value, second.value, third.value) == (1.0, -1.0, -0.5)
    assert second.parts == {"correct": 1.0, "format": 0.0}


def test_code_earns_the_share_of_tests_that_pass(rewards):
    right = "```python\ndef f(n):\n    return {1: 2, 2: 3, 3: 5}[n]\n```"
    two_thirds = "```python\ndef f(n):\n    return n + 1\n```"
    scores = scored(rewards, CODE, right, two_thirds, "```python\ndef f(n:\n```", "def f(n): return n + 1")
    assert [score.value for score in scores] == pytest.approx([1.0, 0.5, -0.5, -1.0])
    assert [score.reason for score in scores] == ["correct", "wrong_answer", "syntax_error", "no_code"]
    with Rewards(RewardsConfig(code=CodeRewardConfig(partial_credit=False)), 100) as strict:
        assert [score.value for score in scored(strict, CODE, right, two_thirds)] == [1.0, -0.5]


@pytest.mark.parametrize(("max_processes", "reason"), [(24, "correct"), (8, "runtime_error")])
def test_how_many_threads_an_answer_may_have_is_the_recipes(max_processes, reason):
    threads = ("```python\nimport threading\ndef f(n):\n    barrier = threading.Barrier(n)\n"
               "    threads = [threading.Thread(target=barrier.wait, daemon=True) for _ in range(n)]\n"
               "    for thread in threads: thread.start()\n    for thread in threads: thread.join()\n    return n\n```")
    crowd = problem("Let n threads meet.", tests=("assert f(12) == 12",), task_type="code")
    code = CodeRewardConfig(max_processes=max_processes, memory_mib=4096)  # room for the threads' stacks and arenas
    with Rewards(RewardsConfig(code=code), 100) as rewards:
        assert scored(rewards, crowd, threads)[0].reason == reason


def test_where_nothing_isolates_code_the_recipe_has_to_allow_it(monkeypatch):
    monkeypatch.setattr("mindpangu.rewards.sandbox.describe_isolation", Isolation)
    with Rewards(RewardsConfig(), 100) as rewards, pytest.raises(ValueError, match="rewards.code.allow_unsafe=true"):
        rewards.check([CODE])
    with Rewards(RewardsConfig(code=CodeRewardConfig(allow_unsafe=True)), 100) as rewards:
        rewards.check([CODE])
        assert str(rewards.verifier("code").isolation) == str(Isolation())


def test_an_answer_that_hangs_or_lies_gets_its_reward_and_the_others_theirs():
    tower = r"\boxed{\dfrac{5^{(5^{(5^{(5^5)})}-4)}-5}{16}}"
    loop = "```python\ndef f(n):\n    while True: pass\n```"
    liar = "```python\nimport os\ndef f(n): os._exit(0)\n```"
    with Rewards(RewardsConfig(math_timeout_s=1.0, code=CodeRewardConfig(timeout_s=2.0)), 100) as rewards:
        groups = rewards.score_groups([FRACTION, CODE, MATH],
                                      [[Response(tower), Response(r"\boxed{1/3}")],
                                       [Response(loop), Response(liar)], [Response("#### 42")]])
    assert [[score.value for score in group] for group in groups] == [[-0.5, 1.0], [-0.5, -0.5], [1.0]]
    assert groups[1][0].reason == "timeout" and groups[1][1].parts["passed"] == 0


def test_penalties_are_weighted_and_zero_by_default():
    config = RewardsConfig(ngram_weight=0.5, line_weight=0.25, length_weight=2.0, length_buffer=20, format_weight=0.1)
    loop = "again and again we say\n" * 30 + "#### 42"
    with Rewards(config, max_new_tokens=100) as rewards:
        [looped] = scored(rewards, MATH, loop, num_tokens=50)
        assert looped.parts["ngram_repetition"] > 0.9 and looped.parts["line_repetition"] == pytest.approx(29 / 31)
        expected = 1 - 0.5 * looped.parts["ngram_repetition"] - 0.25 * 29 / 31
        assert looped.value == pytest.approx(expected)
        lengths = [scored(rewards, MATH, "#### 42", num_tokens=n)[0].value for n in (80, 90, 100)]
        assert lengths == pytest.approx([1.0, 0.0, -1.0])
        [bad] = scored(rewards, MATH, "42")
        assert bad.value == pytest.approx(-1.1) and bad.parts["wrong_format"] == 1.0


def test_open_ended_prompts_are_judged_over_http_and_the_replies_kept(running_judge, tmp_path):
    with running_judge() as judge:
        config = RewardsConfig(judge=JudgeConfig(url=judge.url, num_parallel=2))
        with Rewards(config, 100, tmp_path / "cache") as rewards:
            rewards.check([STORY, MATH])
            scores = scored(rewards, STORY, "an excellent story", "a tale that excels", "")
            assert scores[0].value > scores[1].value >= -0.5 and scores[2].value == -1.0
            assert scores[2].reason == "empty" and "correct" not in scores[0].parts
        with Rewards(config, 100, tmp_path / "cache") as rewards:
            judge.set()
            assert scored(rewards, STORY, "an excellent story", "a tale that excels", "") == scores
            assert judge.log() == []


def test_a_judge_that_cannot_be_reached_gives_equal_rewards(running_judge):
    with running_judge() as judge:
        url = judge.url
    with Rewards(RewardsConfig(judge=JudgeConfig(url=url, max_retries=0, timeout_s=1.0)), 100) as rewards:
        first, second = scored(rewards, STORY, "excellent", "bad")
        assert first.value == second.value and first.reason == second.reason == "judge_unreachable"
        with pytest.raises(ValueError, match="judge"):
            rewards.check([STORY])


def test_problems_that_cannot_be_judged_are_named_at_the_start(rewards):
    with pytest.raises(ValueError, match=r"problem 1 \('What is 6 \* 7\?'\): .*"):
        rewards.check([MATH, problem(value="   ,")])
    with pytest.raises(ValueError, match="problem 0 .*uses no name"):
        rewards.check([problem("Write f.", tests=("assert 1 == 1",))])
    with pytest.raises(ValueError, match="rewards.judge.url is missing"):
        rewards.check([STORY])
    assert [rewards.can_verify(p) for p in (MATH, CODE, STORY, problem(value="   ,"))] == [True, True, False, False]
    assert [task_type(p) for p in (MATH, CODE, STORY, problem("a"))] == ["math", "code", "preference", "preference"]


def test_problems_in_the_form_of_gsm8k_are_grpos_as_they_are(rewards, tmp_path):
    lines = [{"question": f"Tom has {i} apples and buys 1000 more. How many?",
              "answer": f"He has {i}+1000=<<{i}+1000={i + 1000}>>{i + 1000}.\n#### {i + 1000:,}"} for i in range(6)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = load_recipe(["recipe=grpo", "init_from=run", "data=gsm8k", f"data.train=[{tmp_path}/train.jsonl]",
                          "data.num_heldout=2"])
    problems = load_corpus(recipe.data).train
    assert len(problems) == 4 and {task_type(problem) for problem in problems} == {"math"}
    rewards.check(problems)
    number = int(problems[0].messages[-2].content.split()[2]) + 1000
    scores = scored(rewards, problems[0], f"#### {number}", f"答案：{number:,}个", f"#### {number + 1}")
    assert [score.value for score in scores] == [1.0, 1.0, -0.5]


def test_scores_are_json(rewards):
    [score] = scored(rewards, MATH, "#### 42")
    assert json.loads(json.dumps(score)) == [1.0, {"correct": 1.0, "format": 1.0}, "correct"]
