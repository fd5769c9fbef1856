"""Every benchmark from its files to its score, in a process without a network, by models that know the answers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mindpangu.benchmarks.tasks import check_files, find_benchmarks, forms, minerva_examples

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"

# Runs all benchmarks whose files are there, a few items each, with sockets that raise; prints {form: {name: scores}}.
# The model answers from the document that comes with a request: right, or wrong, or nothing.
PROGRAM = r"""
import json, os, socket, sys
def refuse(*_, **__):
    raise AssertionError("a network was asked for")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.path.insert(0, os.getcwd())
from pathlib import Path
from mindpangu.evaluate import _go_offline
_go_offline()
from mindpangu.benchmarks import graders
from mindpangu.benchmarks.files import SOURCES, missing_patterns
from mindpangu.benchmarks.harness import PRESETS, run_tasks, summarize
from mindpangu.benchmarks.punkt import prepare_punkt
from mindpangu.benchmarks.tasks import find_benchmarks, forms, load_tasks
from mindpangu.config import RewardsConfig
from mindpangu.rewards.router import Rewards
from lm_eval.api.model import LM

folder, home = sys.argv[1:]
prepare_punkt(home)

def answer(document, task):
    if "choices" in document and "subject" in document or "gpqa" in task:
        return "I think.\nANSWER: " + "ABCD"[document["answer"]]
    if "cmmlu" in task: return "想。\n答案: " + document["Answer"]
    if "ceval" in task: return "答案是" + document["answer"]
    if "cluewsc" in task: return "BA"[document["label"]]
    if "drop" in task: return "Answer: " + ", ".join(document["answers"][0])
    if "bbh" in task: return "So the answer is " + document["target"] + "."
    if "canonical_solution" in document:
        return document["canonical_solution"] if "base" in task else "```python\n%s%s```" % (
            document["prompt"], document["canonical_solution"])
    if "test_list" in document: return "```python\n%s\n```" % document["code"]
    if "solution" in document: return "The final answer is $%s$. I hope it is correct." % document["answer"]
    if "gsm8k_cot" in task: return "The answer is " + document["answer"].split("####")[1].strip() + "."
    return "It is $\\boxed{%s}$." % document["answer"].split("####")[-1].strip()

class Knows(LM):
    def __init__(self, right):
        super().__init__()
        self.right, self.prompts = right, {}
    def generate_until(self, requests):
        for r in requests: self.prompts.setdefault(r.task_name, r.args[0])
        return [answer(r.doc, r.task_name) if self.right else "no idea" for r in requests]
    def loglikelihood(self, requests):
        gold, found = self.gold, []
        for r in requests:
            self.prompts.setdefault(r.task_name, r.args[0])
            best = r.idx == gold[r.task_name](r.doc)
            found.append((-1.0 if best == self.right else -1000.0, False))
        return found
    loglikelihood_rolling = None
    tokenizer_name = "none"
    def apply_chat_template(self, turns, add_generation_prompt=True):
        return "".join("<%s>%s" % (t["role"], t["content"]) for t in turns)

out = {}
with Rewards(RewardsConfig(), 0) as rewards:
    graders.use(rewards)
    for form, benchmarks in forms().items():
        here = {n: b for n, b in benchmarks.items() if not missing_patterns(SOURCES[b.source], folder)
                and n != "ifeval"}
        tasks = load_tasks(here, folder)
        out[form] = {}
        scores = []
        for right in (True, False):
            lm = Knows(right)
            lm.gold = {t.config.task: (lambda d, t=t: t.doc_to_text(d) if t.multiple_input else t.doc_to_target(d))
                       for members in tasks.values() for t in members}
            some = tasks if right else {n: members[:3] for n, members in tasks.items()}
            samples = run_tasks(lm, some, chat=form == "instruct", decoding=PRESETS["task"],
                                limit=2 if right and form == "instruct" else 1)
            scores.append({n: summarize(here[n], samples[n]) for n in here})
            prompts = prompts if scores[1:] else lm.prompts
        for n in here:
            out[form][n] = {"right": scores[0][n], "wrong": scores[1][n],
                            "prompt": str(prompts[tasks[n][0].config.task]), "tasks": len(tasks[n])}
    # Right at the first of three times only.
    b = find_benchmarks("instruct", ["cluewsc"])
    lm, asked = Knows(True), []
    def sometimes(requests):
        asked.extend([lm.sample_index, r.args[1]] for r in requests)
        return [answer(r.doc, r.task_name) if lm.sample_index == 0 else "no idea" for r in requests]
    lm.generate_until = sometimes
    samples = run_tasks(lm, load_tasks(b, folder), chat=True, decoding=PRESETS["sampled_28k_mean3"], limit=2)
    out["repeats"] = {"asked": asked, **summarize(b["cluewsc"], samples["cluewsc"])}
    if (Path(folder) / "ifeval").exists():
        b = find_benchmarks("instruct", ["ifeval"])
        t = load_tasks(b, folder)
        lm = Knows(True)
        keys = json.loads(sys.stdin.read())
        lm.generate_until = lambda requests: [keys.get(str(r.doc["key"]), "") for r in requests]
        samples = run_tasks(lm, t, chat=True, decoding=PRESETS["task"])
        out["ifeval"] = {str(s["doc"]["key"]): [s["prompt_level_strict_acc"], s["inst_level_strict_acc"]]
                         for s in samples["ifeval"][0][0] if str(s["doc"]["key"]) in keys}
        out["ifeval summary"] = summarize(b["ifeval"], samples["ifeval"])
print(json.dumps(out))
"""

# Answers to two of IF-Eval's items, with how the instructions hold, by hand.
IFEVAL = {
    # 1001: "an itinerary in a Shakespearean style. You are not allowed to use any commas"
    "1001": "Hark! Thou goest to Kyoto. Then to Nara.",
    # 1005: "a resume ... at least 12 placeholder represented by square brackets"
    "1005": "[name] [address] [phone]",
}


@pytest.fixture(scope="module")
def measured(benchmarks_dir, tmp_path_factory):
    done = subprocess.run([sys.executable, "-c", PROGRAM, benchmarks_dir, tmp_path_factory.mktemp("punkt")],
                          input=json.dumps(IFEVAL), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_model_that_knows_the_answers_scores_100_and_one_that_does_not_0(measured):
    names = [(form, name) for form in ("instruct", "base") for name in measured[form]]
    scores = {name: (measured[name[0]][name[1]]["right"]["score"], measured[name[0]][name[1]]["wrong"]["score"])
              for name in names}
    # Of two DROP items the second has two spans, "the Reds" and "red shirts"; a text is one span, so both in one text
    # are the words reds, red, shirts against the best span: precision 2/3, recall 1, F1 0.8, of two spans 0.4.
    assert scores.pop(("instruct", "drop")) == (pytest.approx(70.0), 0.0)
    assert scores == dict.fromkeys(scores, (100.0, 0.0))


def test_every_benchmark_of_the_papers_is_among_them(measured):
    expected = {form: {name for name, benchmark in benchmarks.items() if name != "ifeval" and
                       (REAL.is_dir() or not _is_real(benchmark.source))} for form, benchmarks in forms().items()}
    assert {form: set(measured[form]) for form in ("instruct", "base")} == expected


def _is_real(source):
    from mindpangu.benchmarks.files import SOURCES

    return SOURCES[source].run


def test_subjects_are_tasks_of_their_own_where_examples_go_by_subject(measured):
    assert measured["base"]["cmmlu"]["tasks"] == 67 and measured["instruct"]["cmmlu"]["tasks"] == 1
    prompt = measured["base"]["cmmlu"]["prompt"]
    assert prompt.count("agronomy 第") == 6 and prompt.count("第") == 6 and prompt.count("答案： B") == 5
    assert measured["base"]["ceval"]["right"]["average"] == "macro"
    assert measured["base"]["ceval"]["right"]["N"] == 52  # an item of each subject


def test_prompts_have_the_published_forms(measured):
    instruct, base = measured["instruct"], measured["base"]
    assert "请回答以下关于农学的单项选择题, 你回答的最后一行**必须**" in instruct["cmmlu"]["prompt"]
    assert instruct["cmmlu"]["prompt"].endswith("\n\nA) 甲\nB) 乙\nC) 丙, 丁\nD) 戊")
    assert instruct["ceval"]["prompt"].startswith("<user>以下是中国关于注册会计师考试的单项选择题，")
    assert instruct["cluewsc"]["prompt"] == ("<user>小猫看着第0条鱼，它饿了。\n此处，“它”是否指代“小猫“？\n"
                                             "A. 是\nB. 否\n请从”A“，”B“中进行选择。\n答：")
    assert base["cluewsc"]["prompt"].endswith("小猫看着第0条鱼，它饿了。\n此处，代词“它“被用于指代“小猫“吗?")
    assert base["cluewsc"]["prompt"].count("吗?\n是") == 3 and base["cluewsc"]["prompt"].count("吗?\n否") == 2
    assert base["math"]["prompt"].endswith("Problem:\nWhat is $\\frac{1}{7}$ doubled?\n\nSolution:")
    assert base["math"]["prompt"].count("I hope it is correct.") == 4
    assert instruct["drop"]["prompt"].count("Passage: Passage") == 4
    assert "of dev: the Reds scored 3 goals.\nQuestion: How many goals?" in instruct["drop"]["prompt"]
    assert base["hellaswag"]["prompt"].count("Cooking: A cook takes") == 11  # 10 examples and the question


@pytest.mark.skipif(not REAL.is_dir(), reason="no published benchmarks are at hand")
def test_prompts_over_published_files_have_the_published_forms(measured):
    instruct, base = measured["instruct"], measured["base"]
    assert instruct["mmlu"]["prompt"].endswith("\n\nA) 0\nB) 4\nC) 2\nD) 6")
    assert instruct["gsm8k"]["prompt"].endswith("put your final answer within \\boxed{}.")
    assert instruct["math500"]["prompt"].count("\\boxed{}") == 1
    turns = instruct["mbpp_sanitized"]["prompt"].split("<assistant>")
    assert len(turns) == 4 and turns[1].startswith("```python\ndef similar_elements")
    assert base["mmlu"]["tasks"] == 57 and base["bbh"]["tasks"] == 27
    assert base["mmlu"]["prompt"].count("\nAnswer:") == 6
    assert base["gsm8k"]["prompt"].count("\nA: ") == 8 and base["gsm8k"]["prompt"].endswith("\nA:")
    assert base["mbpp"]["prompt"].count("[BEGIN]") == 4 and base["mbpp"]["prompt"].count("[DONE]") == 3
    assert base["bbh"]["prompt"].count("So the answer is") == 3
    assert base["humaneval"]["prompt"].endswith('"""\n')


def test_the_preset_of_v11_samples_every_question_three_times_and_takes_the_mean(measured):
    found = measured["repeats"]
    assert (found["k"], found["N"], found["items"]) == (2, 6, 2) and found["score"] == pytest.approx(100 / 3)
    assert [index for index, _ in found["asked"]] == [0, 0, 1, 1, 2, 2]
    for _, arguments in found["asked"]:
        assert arguments.items() >= {"do_sample": True, "temperature": 0.7, "top_p": 1.0, "max_gen_toks": 28672}.items()


@pytest.mark.skipif(not REAL.is_dir(), reason="no published benchmarks are at hand")
def test_ifeval_counts_prompts_whose_instructions_all_hold(measured):
    assert measured["ifeval"] == {"1001": [True, [True]], "1005": [False, [False]]}
    summary = measured["ifeval summary"]
    assert (summary["k"], summary["N"]) == (1, 541) and summary["score"] == pytest.approx(100 / 541)


def test_the_examples_of_minerva_are_the_four_of_its_paper():
    examples = minerva_examples()
    assert len(examples) == 4 and all("I hope it is correct." in example["solution"] for example in examples)
    assert examples[0]["problem"].startswith("Find the domain of the expression")


def test_what_is_missing_is_listed_with_source_and_licence(tmp_path, own_items):
    own_items(tmp_path)
    with pytest.raises(ValueError) as error:
        check_files(find_benchmarks("instruct", ["gsm8k", "drop", "humaneval"]), tmp_path)
    text = str(error.value)
    assert "gsm8k/train.jsonl, gsm8k/test.jsonl" in text and "https://github.com/openai/human-eval" in text
    assert "licence: MIT" in text and "drop_dataset" not in text and "'eval.tasks=[drop]'" in text


def test_an_unknown_benchmark_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"gsm9k unknown with eval.form=instruct; it has mmlu, cmmlu, .*humaneval"):
        find_benchmarks("instruct", ["gsm8k", "gsm9k"])
