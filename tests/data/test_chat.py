"""Oracle: token sequences written by hand, piece by piece, after the template's specification."""
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mindpangu.data.arithmetic import make_problems, to_example
from mindpangu.data.chat import (
    ROLE_LABELS,
    decode_response,
    encode_chat,
    encode_prompt,
    list_stretches,
    template_digest,
)
from mindpangu.data.documents import Message
from mindpangu.data.tokenizer import train_tokenizer


def corpus():
    # "助手：####" often enough for a piece "：####", which lies across the end of the label.
    problems = make_problems(300, seed=0)
    return [
        stretch for number, problem in enumerate(problems)
        for stretch in list_stretches(to_example(problem, ("reasoning", "fast", "result")[number % 3]).messages)
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(corpus(), 700, tmp_path_factory.mktemp("chat") / "tokenizer.model")


@pytest.fixture(scope="module")
def ids_of(tokenizer):
    pieces = sentencepiece.SentencePieceProcessor(model_file=tokenizer.model_file)

    def look_up(*names):
        ids = [pieces.piece_to_id(name) for name in names]
        assert 0 not in ids, names
        return ids

    return look_up


SYSTEM = ("<s>", "[unused9]", "▁系统", "：", "[unused10]")
USER = ("[unused9]", "▁用户", "：")
ASSISTANT = ("[unused9]", "▁助手", "：")


def test_chinese_fast_answer_is_encoded_as_written_by_hand(tokenizer, ids_of):
    messages = [Message("user", "小明有12个苹果。"), Message("assistant", "12+5=17\n#### 17")]
    tokens, is_target = encode_chat(tokenizer, messages)
    given_names = [*SYSTEM, *USER, "小明", "有", "1", "2", "个苹果", "。", "[unused10]", *ASSISTANT]
    target_names = [*"12+5=17", "\n####", "▁", "1", "7", "[unused10]"]
    assert tokens.tolist() == ids_of(*given_names, *target_names)
    assert is_target.tolist() == [False] * len(given_names) + [True] * len(target_names)
    assert tokens.dtype == np.int32 and is_target.dtype == bool


def test_thoughts_stand_between_their_special_pieces_and_are_targets(tokenizer, ids_of):
    tokens, is_target = encode_chat(tokenizer, [
        Message("system", "Tom has 3 books."),
        Message("user", ""),
        Message("assistant", "3\n", "There are 3 at first."),
    ])
    given_names = [*SYSTEM[:-1], "Tom", "▁has", "▁", "3", "▁books", ".", "[unused10]", *USER, "[unused10]", *ASSISTANT]
    target_names = ["[unused16]", "▁There", "▁are", "▁", "3", "▁at", "▁first", ".",
                    "[unused17]", "▁", "3", "\n", "[unused10]"]
    assert tokens.tolist() == ids_of(*given_names, *target_names)
    assert is_target.tolist() == [False] * len(given_names) + [True] * len(target_names)


def test_every_assistant_turn_is_a_target_and_no_other_role_is(tokenizer, ids_of):
    tokens, is_target = encode_chat(tokenizer, [
        Message("user", "1"), Message("assistant", "2"), Message("tool", "3"), Message("function", "4"),
        Message("assistant", "5"),
    ])
    names = [*SYSTEM, *USER, "1", "[unused10]", *ASSISTANT, "2", "[unused10]"]
    assert tokens.tolist()[: len(names)] == ids_of(*names)
    assert tokenizer.decode(tokens) == (
        "<s>[unused9]系统：[unused10][unused9]用户：1[unused10][unused9]助手：2[unused10]"
        "[unused9]工具：3[unused10][unused9]方法：4[unused10][unused9]助手：5[unused10]"
    )
    assert tokens[is_target].tolist() == ids_of("2", "[unused10]", "5", "[unused10]")


def test_generation_prompt_ends_with_the_open_assistant_turn(tokenizer, ids_of):
    assert encode_prompt(tokenizer, [Message("user", "12")]).tolist() == ids_of(
        *SYSTEM, *USER, "1", "2", "[unused10]", *ASSISTANT)
    assert encode_prompt(tokenizer, [Message("user", "12")]).dtype == np.int32


def test_answer_whose_first_piece_joins_the_label_keeps_the_label_of_the_prompt(tokenizer, ids_of):
    joined = ids_of("▁助手", "：####", "▁", "7")
    assert tokenizer.encode("助手：#### 7") == joined  # what the model must not be taught
    messages = [Message("user", "1"), Message("assistant", "#### 7")]
    tokens, is_target = encode_chat(tokenizer, messages)
    prompt = encode_prompt(tokenizer, messages[:-1])
    assert tokens[: len(prompt)].tolist() == prompt.tolist()
    assert tokenizer.decode(tokens).endswith("[unused9]助手：#### 7[unused10]")
    assert decode_response(tokenizer, tokens[is_target]) == messages[-1]


PARTS = ["[unused9]", "[unused10]", "[unused16]", "[unused17]", "<s>", "</s>", "<unk>", "助手：", "系统：", "####",
         " ", "\n", "▁", "小明", "12+5=17", "Then", "🎉"]
TEXTS = st.lists(st.text(max_size=6) | st.sampled_from(PARTS), max_size=6).map("".join)
ANSWERS = st.builds(Message, st.just("assistant"), TEXTS, st.none() | TEXTS)
OTHERS = st.builds(Message, st.sampled_from(["user", "tool", "function"]), TEXTS, st.none())
SYSTEMS = st.lists(st.builds(Message, st.just("system"), TEXTS, st.none()), max_size=1)
CHATS = st.builds(
    lambda system, turns, answer: (*system, *turns, answer), SYSTEMS, st.lists(OTHERS | ANSWERS, max_size=3), ANSWERS
)


@settings(max_examples=300, deadline=None)
@given(messages=CHATS)
def test_any_chat_starts_with_its_prompt_and_gives_its_answer_back(tokenizer, messages):
    tokens, is_target = encode_chat(tokenizer, messages)
    prompt = encode_prompt(tokenizer, messages[:-1])
    assert tokens[: len(prompt)].tolist() == prompt.tolist()
    assert is_target[len(prompt) :].all() and not is_target[0]
    assert decode_response(tokenizer, tokens[len(prompt) :]) == messages[-1]


@settings(max_examples=300, deadline=None)
@given(messages=CHATS)
def test_no_content_can_open_or_close_a_turn(tokenizer, messages):
    tokens = encode_chat(tokenizer, messages).tokens_T.tolist()
    num_turns = len(messages) + (messages[0].role != "system")
    num_thoughts = sum(message.thoughts is not None for message in messages)
    assert tokens.count(tokenizer.turn_start_id) == tokens.count(tokenizer.turn_end_id) == num_turns
    assert tokens.count(tokenizer.think_open_id) == tokens.count(tokenizer.think_close_id) == num_thoughts
    assert tokens.count(tokenizer.bos_id) == 1 and tokenizer.pad_id not in tokens and 2 not in tokens


def test_cut_off_and_malformed_responses_are_decoded_as_far_as_they_go(tokenizer):
    text = tokenizer.encode
    open_id, close_id, end_id = tokenizer.think_open_id, tokenizer.think_close_id, tokenizer.turn_end_id
    assert decode_response(tokenizer, []) == Message("assistant", "")
    assert decode_response(tokenizer, [end_id, tokenizer.pad_id]) == Message("assistant", "")
    assert decode_response(tokenizer, text(" a b", after_text=True)) == Message("assistant", " a b")
    assert decode_response(tokenizer, [open_id, *text("hm")]) == Message("assistant", "", "hm")
    assert decode_response(tokenizer, [open_id, *text("hm"), end_id, *text("x")]) == Message("assistant", "", "hm")
    assert decode_response(tokenizer, [open_id, close_id]) == Message("assistant", "", "")
    assert decode_response(tokenizer, [open_id, *text("a"), close_id, *text("b"), close_id]) == Message(
        "assistant", "b[unused17]", "a")
    stray = np.array([close_id, tokenizer.pad_id, end_id])
    assert decode_response(tokenizer, stray) == Message("assistant", "[unused17]<unk>")


@pytest.mark.parametrize(("messages", "reason"), [
    ([], "messages end with role None"),
    ([Message("user", "x")], "messages end with role 'user'"),
    ([Message("user", "x"), Message("system", "y"), Message("assistant", "z")], r"messages\[1\].role='system'"),
    ([Message("bot", "x"), Message("assistant", "z")], r"messages\[0\].role='bot' is unknown: expected one of system"),
    ([Message("user", "x", "y"), Message("assistant", "z")], r"messages\[0\] of role 'user' has thoughts"),
])
def test_chat_that_does_not_fit_the_template_is_refused(tokenizer, messages, reason):
    with pytest.raises(ValueError, match=reason):
        encode_chat(tokenizer, messages)


def test_digest_changes_with_a_label(monkeypatch):
    before = template_digest()
    assert before == template_digest() and len(before) == 16
    monkeypatch.setitem(ROLE_LABELS, "user", "用户:")
    assert template_digest() != before
