"""The LM interface against lm-eval's own hf model on transformers' Llama, with the same weights and token ids."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaForCausalLM, LlamaTokenizer

from mindpangu.benchmarks.lm import ChatPrompt, PanguLM
from mindpangu.benchmarks.responses import ResponseFile
from mindpangu.benchmarks.tasks import find_benchmarks, load_tasks
from mindpangu.data.chat import encode_chat, encode_prompt
from mindpangu.data.documents import Message
from mindpangu.data.tokenizer import Tokenizer
from mindpangu.model.weights import load_model, load_weights
from mindpangu.ops import kernels

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
# Float32 through two layers, sums over a few dozen tokens; transformers' order of additions differs.
ATOL = 1e-4
# Compiling is what takes time here: one LM serves all tests, most answers have this length, and there are always
# enough prompts for all slots.
LENGTH = 24
SLOTS = 2


@pytest.fixture(scope="module")
def pair(tiny_models, cpu_library):
    """(PanguLM, lm-eval's hf model on transformers' LlamaForCausalLM, load): the same weights, loaded by name."""
    kernels.select("native", [], "CPU", cpu_library.path)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its waiting threads would take the cores from MindSpore's
    tokenizer = Tokenizer(tiny_models["trained"] / "tokenizer.model")
    model = load_model(tiny_models["trained"])
    ours = PanguLM(model, tokenizer, num_slots=SLOTS, cache_tokens=1 << 14, batch_tokens=1024)
    pieces = LlamaTokenizer(tokenizer.model_file, legacy=True, eos_token="[unused10]", pad_token="<unk>")
    llamas = {name: LlamaForCausalLM.from_pretrained(folder).float() for name, folder in tiny_models.items()}
    theirs = HFLM(pretrained=llamas["trained"], tokenizer=pieces, batch_size=4, device="cpu", max_length=1024)

    def load(name):
        load_weights(model, tiny_models[name])
        theirs._model = llamas[name].eval()

    yield ours, theirs, load
    torch.set_num_threads(num_threads)
    kernels.select("reference", [], "CPU", cpu_library.path)


@pytest.fixture
def ours(pair, mindspore_cpu):
    return pair[0]


@pytest.fixture
def hf(pair):
    return pair[1]


@pytest.fixture
def weights(pair, request, mindspore_cpu):
    """Both models with other weights for the time of a test."""
    pair[2](request.param)
    yield request.param
    pair[2]("trained")


def scored(pairs):
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


def rolled(texts):
    return [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]


def asked(prompts, **arguments):
    return [Instance("generate_until", {}, (prompt, {"until": [], **arguments}), 0) for prompt in prompts]


def requests_of(name, **settings):
    """The first requests of the first tasks of a benchmark for base models, without examples before them."""
    instances = []
    for task in load_tasks(find_benchmarks("base", [name]), REAL, num_fewshot=0)[name][:2]:
        if settings:
            task.set_config("generation_kwargs", settings, update=True)
        task.build_all_requests(limit=4)
        instances += task.instances
    return instances


def same_texts(ours, theirs):
    """transformers' Llama tokenizer drops a space at the start of what it decodes."""
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert our in (their, " " + their)


# ---- Parity with lm-eval's hf model ----------------------------------------------------------------------------------

needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="no published benchmarks are at hand")
both_weights = pytest.mark.parametrize("weights", ["random", "trained"], indirect=True)


@needs_data
@both_weights
def test_loglikelihoods_of_benchmarks_are_those_of_transformers(ours, hf, weights):
    requests = requests_of("mmlu")
    found, expected = ours.loglikelihood(requests), hf.loglikelihood(requests)
    assert len(found) == 2 * 4 * 4
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], atol=ATOL)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@needs_data
@both_weights
@pytest.mark.parametrize("benchmark", ["gsm8k", "humaneval"])
def test_greedy_answers_to_benchmarks_are_those_of_transformers(ours, hf, weights, benchmark):
    requests = requests_of(benchmark, max_gen_toks=LENGTH, do_sample=False, temperature=0.0)
    found = ours.generate_until(requests)
    assert any(found)
    same_texts(found, hf.generate_until(requests))


def test_loglikelihoods_of_several_tokens_and_of_empty_contexts_are_those_of_transformers(ours, hf):
    pairs = [("Question: Tom has 3 apples", " and buys 4 more."), ("", "Answer: He has 3"),
             ("Answer: ", "He has 3 + 4"), ("Answer: He has 3 + 4 =", " 7"), ("Question: Tom has 3", " apples"),
             ("def add_3(x: int) -> int:\n", '    """ Adds 3. """\n    return x + 3\n')]
    found, expected = ours.loglikelihood(scored(pairs)), hf.loglikelihood(scored(pairs))
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], atol=ATOL)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in found} == {True, False}


def test_rolling_loglikelihoods_are_those_of_transformers_across_windows(ours, hf, monkeypatch):
    """A window of 128 tokens is 127 inputs there."""
    texts = ["Question: Tom has 3 apples and buys 4 more. " * n for n in (1, 9, 20)]
    monkeypatch.setattr(ours, "max_length", 128)
    monkeypatch.setattr(hf, "_max_length", 127)
    monkeypatch.setattr(hf, "add_bos_token", False)
    np.testing.assert_allclose(ours.loglikelihood_rolling(rolled(texts)), hf.loglikelihood_rolling(rolled(texts)),
                               atol=ATOL)


# ---- Generation ------------------------------------------------------------------------------------------------------

PROMPTS = [f"Question: Tom has {a} apples and buys {a + 2} more. How many does he have?\nAnswer:"
           for a in (2, 5, 9, 17)]


def test_stop_strings_end_an_answer_in_the_middle_of_a_token(ours):
    free = ours.generate_until(asked(PROMPTS, max_gen_toks=LENGTH))
    for stop in ("s ", "e h", "H", " ="):  # across pieces and within them
        found = ours.generate_until(asked(PROMPTS, max_gen_toks=LENGTH, until=[stop, "never"]))
        assert found == [text.split(stop)[0] for text in free]
    assert any("H" in text for text in free)


def test_an_answer_goes_on_in_steps_and_stops_behind_its_stop_string(ours, monkeypatch, tmp_path):
    at_once = ours.generate_until(asked(PROMPTS, max_gen_toks=LENGTH))
    monkeypatch.setattr("mindpangu.benchmarks.lm._STOP_STEP", LENGTH // 3)
    assert ours.generate_until(asked(PROMPTS, max_gen_toks=LENGTH, until=["\x00"])) == at_once
    responses = ResponseFile(tmp_path / "responses.jsonl")
    monkeypatch.setattr(ours, "responses", responses)
    ours.generate_until(asked(PROMPTS, max_gen_toks=LENGTH, until=["H"]))
    lengths = [len(json.loads(line)["response"]) for line in responses.path.read_text().splitlines()]
    assert len(lengths) == len(PROMPTS) and max(lengths) == LENGTH // 3, "all have a stop string in the first step"


SAMPLING = {"max_gen_toks": LENGTH, "do_sample": True, "temperature": 1.0, "top_p": 0.95}


def test_sampled_answers_depend_on_seed_and_sample_but_not_on_company(ours, monkeypatch):
    answers = ours.generate_until(asked(PROMPTS, **SAMPLING))
    assert ours.generate_until(asked(PROMPTS[::-1], **SAMPLING))[::-1] == answers
    assert ours.generate_until(asked(PROMPTS[1:3], **SAMPLING)) == answers[1:3]
    for name in ("seed", "sample_index"):
        monkeypatch.setattr(ours, name, 1)
        others = ours.generate_until(asked(PROMPTS, **SAMPLING))
        assert all(one != other for one, other in zip(answers, others, strict=True))


def test_a_request_that_is_repeated_is_sampled_anew_and_greedily_the_same(ours, monkeypatch, tmp_path):
    monkeypatch.setattr(ours, "responses", ResponseFile(tmp_path / "responses.jsonl"))
    answers = ours.generate_until(asked([PROMPTS[0]] * 4, **SAMPLING))
    assert len(set(answers)) == 4
    assert len(ResponseFile(ours.responses.path)) == 4
    assert ours.generate_until(asked([PROMPTS[0]] * 4, **SAMPLING)) == answers
    assert ours.generate_until(asked([PROMPTS[0]], **SAMPLING)) == answers[:1]
    assert len(set(ours.generate_until(asked([PROMPTS[0]] * 4, max_gen_toks=LENGTH)))) == 1


def test_generation_arguments_are_honoured_or_refused(ours):
    greedy = ours.generate_until(asked(PROMPTS, max_gen_toks=LENGTH))
    assert ours.generate_until(asked(PROMPTS, max_gen_toks=LENGTH, do_sample=False, temperature=1.0)) == greedy
    assert ours.generate_until(asked(PROMPTS, max_gen_toks=LENGTH, do_sample=True, temperature=1.0, top_k=1)) == greedy
    short = ours.generate_until(asked(PROMPTS, max_gen_toks=LENGTH // 3))
    assert all(text.startswith(part) and part for text, part in zip(greedy, short, strict=True)) and short != greedy
    with pytest.raises(ValueError, match=r"\['num_beams'\] are unknown: expected some of .*temperature"):
        ours.generate_until(asked(PROMPTS, num_beams=4))


def measure(lm, monkeypatch):
    monkeypatch.setattr(lm, "measured", {})
    return lm.measured


def test_a_prompt_without_room_loses_its_start_and_is_counted(ours, hf, monkeypatch):
    measured = measure(ours, monkeypatch)
    monkeypatch.setattr(ours, "max_length", 128 + LENGTH)
    monkeypatch.setattr(hf, "_max_length", 128 + LENGTH)
    long = [prompt * 14 for prompt in PROMPTS]
    same_texts(ours.generate_until(asked(long, max_gen_toks=LENGTH)),
               hf.generate_until(asked(long, max_gen_toks=LENGTH, do_sample=False)))
    monkeypatch.setattr(ours, "max_length", 128)
    monkeypatch.setattr(hf, "_max_length", 127)  # its last token is no input
    pairs = scored([(text, " He has 4") for text in long])
    np.testing.assert_allclose([x for x, _ in ours.loglikelihood(pairs)], [x for x, _ in hf.loglikelihood(pairs)],
                               atol=ATOL)
    assert [measured[kind]["cut_prompts"] for kind in ("generate_until", "loglikelihood")] == [4, 4]


def test_an_answer_ends_with_the_model_s_positions(ours, monkeypatch, tmp_path):
    """256 positions, some 45 of them the prompt's, 2000 asked for: a whole number of 128, in few shapes."""
    measured = measure(ours, monkeypatch)
    monkeypatch.setattr(ours, "max_length", 256)
    monkeypatch.setattr(ours, "responses", ResponseFile(tmp_path / "responses.jsonl"))
    ours.generate_until(asked(PROMPTS, max_gen_toks=2000))
    lengths = [len(json.loads(line)["response"]) for line in ours.responses.path.read_text().splitlines()]
    assert max(lengths) <= 128 and measured["generate_until"]["cut_prompts"] == 0


# ---- Chat ------------------------------------------------------------------------------------------------------------

def test_a_chat_prompt_has_the_template_s_tokens_and_no_others(ours):
    tokenizer = ours.pieces
    turns = [{"role": "user", "content": "[unused10]1 + 1?</s>"}, {"role": "assistant", "content": "2"},
             {"role": "user", "content": " 2 + 2?"}]
    prompt = ours.apply_chat_template(turns)
    assert prompt == ("<s>[unused9]系统：[unused10][unused9]用户：[unused10]1 + 1?</s>[unused10]"
                      "[unused9]助手：2[unused10][unused9]用户： 2 + 2?[unused10][unused9]助手：")
    messages = [Message(turn["role"], turn["content"]) for turn in turns]
    assert ours.tok_encode(prompt) == encode_prompt(tokenizer, messages).tolist()
    assert ours.tok_encode(prompt).count(tokenizer.eos_id) == 4, "not the one that the user spelled"
    with_system = ours.apply_chat_template([{"role": "system", "content": "Be brief."}, *turns])
    messages.insert(0, Message("system", "Be brief."))
    assert ours.tok_encode(with_system) == encode_prompt(tokenizer, messages).tolist()


def test_a_continuation_of_a_chat_is_scored_as_the_answer_that_training_sees(ours):
    messages = [Message("user", "1 + 1?")]
    context, continuation = ours._encode_pair(ChatPrompt([*messages, Message("assistant", "")]), " 2 apples")
    whole = encode_chat(ours.pieces, [*messages, Message("assistant", " 2 apples")])
    assert [*context, *continuation, ours.pieces.eos_id] == whole.tokens_T.tolist()
    assert len(context) == int(np.argmax(whole.is_target_T))


def test_an_answer_begun_by_the_task_goes_on_in_the_same_turn(ours):
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "Answer:"}]
    begun = ours.apply_chat_template(turns, add_generation_prompt=False)
    assert begun.endswith("助手：Answer:")
    whole = encode_chat(ours.pieces, [Message("user", "1 + 1?"), Message("assistant", "Answer: 2")]).tokens_T.tolist()
    context, continuation = ours._encode_pair(begun, " 2")
    assert [*context, *continuation, ours.pieces.eos_id] == whole and continuation


def test_thoughts_and_turn_end_are_no_part_of_an_answer(ours):
    tokenizer, prompt = ours.pieces, ChatPrompt([Message("user", "1 + 1?"), Message("assistant", "")])
    thoughts = tokenizer.encode("let me see")
    answer = [tokenizer.think_open_id, *thoughts, tokenizer.think_close_id, *tokenizer.encode("2")]
    assert ours._text(prompt, [*answer, tokenizer.eos_id]) == "2"
    assert ours._text(prompt, answer[:3]) == ""
    assert ours._text("1 + 1 =", [*tokenizer.encode(" 2"), tokenizer.eos_id]).strip() == "2"


def test_leading_spaces_of_an_answer_are_kept(ours):
    before = ours.pieces.encode("def add_3(x):\n")
    tokens = ours.pieces.encode("def add_3(x):\n    return x + 3")
    assert tokens[:len(before)] == before
    assert ours._text("def add_3(x):\n", tokens[len(before):]) == "    return x + 3"


# ---- Responses that are there already --------------------------------------------------------------------------------

def test_known_responses_are_not_asked_for_again(ours, monkeypatch, tmp_path):
    def ask(requests, kind="generate_until", sample_index=0):
        """(answers, how many were known) of a start of its own."""
        measured = measure(ours, monkeypatch)
        monkeypatch.setattr(ours, "responses", ResponseFile(tmp_path / "responses.jsonl"))
        monkeypatch.setattr(ours, "sample_index", sample_index)
        answers = getattr(ours, kind)(requests)
        assert (measured[kind]["tokens"] > 0) == (measured[kind]["answered_before"] < len(requests))
        return answers, measured[kind]["answered_before"]

    greedy, pairs = asked(PROMPTS, max_gen_toks=LENGTH), scored([(prompt, " He") for prompt in PROMPTS])
    answers, logprobs = ask(greedy)[0], ask(pairs, "loglikelihood")[0]
    assert ask(greedy) == (answers, 4) and ask(pairs, "loglikelihood") == (logprobs, 4)
    assert ask(asked(PROMPTS, max_gen_toks=LENGTH, until=["x"]))[1] == 0, "other arguments are another request"
    assert ask(scored([(prompt, " She") for prompt in PROMPTS]), "loglikelihood")[1] == 0
    sampled = asked(PROMPTS, **SAMPLING)
    first, second = ask(sampled)[0], ask(sampled, sample_index=1)
    assert second[1] == 0 and second[0] != first and ask(sampled) == (first, 4)
    assert ask(greedy, sample_index=1) == (answers, 4), "a greedy answer is the same every time"


def test_few_cache_positions_and_forgotten_graphs_change_nothing(ours, monkeypatch):
    """The last test: it makes MindSpore forget the graphs of the others."""
    short, long = asked(PROMPTS, max_gen_toks=LENGTH), asked([prompt * 4 for prompt in PROMPTS], max_gen_toks=LENGTH)
    answers, longer = ours.generate_until(short), ours.generate_until(long)
    assert len(ours._generators) > 2
    monkeypatch.setattr(ours, "cache_tokens", SLOTS * (256 + LENGTH))
    pairs = scored([(PROMPTS[0], " He has")])
    before = ours.loglikelihood(pairs)
    monkeypatch.setattr(ours, "_generators", dict(ours._generators))
    assert ours.generate_until(asked(PROMPTS, max_gen_toks=LENGTH - 1)) == ours.generate_until(
        asked(PROMPTS, max_gen_toks=LENGTH - 1))
    assert len(ours._generators) == 1, "the others gave their caches back"
    assert ours.generate_until(long) == longer and ours.generate_until(short) == answers
    assert ours.loglikelihood(pairs) == before
