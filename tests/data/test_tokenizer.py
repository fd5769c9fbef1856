"""Oracles: the text itself (lossless round trip) and SentencePiece's own processor on the same model file."""
import pytest
import sentencepiece
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from mindpangu.data.arithmetic import make_problems
from mindpangu.data.tokenizer import SPECIAL_PIECES, Tokenizer, train_tokenizer

SPECIALS = list(SPECIAL_PIECES.values())


def corpus():
    problems = make_problems(300, seed=0)
    return [text for problem in problems for text in (problem.question, problem.thoughts, problem.answer)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(corpus(), 640, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def special_ids(tokenizer):
    return {tokenizer.bos_id, tokenizer.unk_id, 2, tokenizer.turn_start_id, tokenizer.turn_end_id,
            tokenizer.think_open_id, tokenizer.think_close_id}


def test_special_pieces_have_their_ids_by_name(tokenizer):
    pieces = sentencepiece.SentencePieceProcessor(model_file=tokenizer.model_file)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id) == (0, 0, 1)
    assert tokenizer.eos_id == tokenizer.turn_end_id == pieces.piece_to_id("[unused10]")
    assert tokenizer.turn_start_id == pieces.piece_to_id("[unused9]")
    assert tokenizer.think_open_id == pieces.piece_to_id("[unused16]")
    assert tokenizer.think_close_id == pieces.piece_to_id("[unused17]")
    assert tokenizer.vocab_size == pieces.vocab_size() == 640
    with open(tokenizer.model_file, "rb") as file:
        assert tokenizer.digest == xxhash.xxh3_64(file.read()).hexdigest()


def test_ordinary_text_is_encoded_as_sentencepiece_does(tokenizer):
    pieces = sentencepiece.SentencePieceProcessor(model_file=tokenizer.model_file)
    for text in [*corpus()[:60], "", " ", "a  b", "用户：你好\n\n世界 🎉", "[unused", "unused10]", "</b> <s >"]:
        assert tokenizer.encode(text) == pieces.encode(text)


HARD_PARTS = [*SPECIALS, "</s>", "[unused1", "<", "[", "▁", " ", "  ", "\n", "\r\n", "\t", "\0", "🎉", "👩‍👩‍👧", "é",
              "１２", "系统：", "<0x41>", "▅"]
TEXTS = st.lists(st.text(max_size=12) | st.sampled_from(HARD_PARTS), max_size=8).map("".join)


@settings(max_examples=500, deadline=None)
@given(text=TEXTS, after_text=st.booleans())
def test_any_text_comes_back_and_never_holds_a_special_id(tokenizer, text, after_text):
    tokens = tokenizer.encode(text, after_text=after_text)
    assert special_ids(tokenizer).isdisjoint(tokens)
    if after_text:
        assert tokenizer.decode([*tokenizer.encode("x"), *tokens]) == "x" + text
    else:
        assert tokenizer.decode(tokens) == text


def test_decode_shows_special_pieces_by_name(tokenizer):
    ids = [tokenizer.bos_id, tokenizer.turn_start_id, *tokenizer.encode("a b"), tokenizer.turn_end_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "<s>[unused9]a b[unused10]<unk>"
    assert tokenizer.decode([]) == ""
    with pytest.raises(ValueError, match="token id 640: expected 0..639"):
        tokenizer.decode([640])
    with pytest.raises(ValueError, match="token id -1"):
        tokenizer.decode([-1])


def test_digits_are_single_tokens_and_a_line_break_is_kept(tokenizer):
    pieces = sentencepiece.SentencePieceProcessor(model_file=tokenizer.model_file)
    names = pieces.id_to_piece(tokenizer.encode("12+345=357\n#### 357", after_text=True))
    assert names == [*"12+345=357", "\n####", "▁", *"357"]


def test_the_same_texts_give_the_same_bytes_in_any_folder(tmp_path):
    first = train_tokenizer(corpus(), 600, tmp_path / "a" / "one.model")
    second = train_tokenizer(iter(corpus()), 600, tmp_path / "b" / "two.model")
    assert first.digest == second.digest
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["one.model"]


def test_long_texts_and_texts_with_tabs_are_learnt_from(tmp_path):
    tokenizer = train_tokenizer(["zebra\tcrossing " * 2000], 290, tmp_path / "t.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=tokenizer.model_file)
    assert pieces.id_to_piece(tokenizer.encode("zebra")) == ["▁zebra"]
    assert tokenizer.decode(tokenizer.encode("a\tb")) == "a\tb"


@pytest.mark.parametrize(("texts", "vocab_size", "message"), [
    (["abcdefgh ij"] * 9, 100, r"vocab_size=100 is too small for this corpus: .* at least \d+"),
    (["abcdefgh ij"] * 9, 5000, r"vocab_size=5000 is too large for this corpus: choose at most \d+"),
    ([], 300, "expected non-empty texts"),
    ([""], 300, "expected non-empty texts"),
])
def test_unsuitable_corpus_is_refused_and_nothing_is_written(tmp_path, texts, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, vocab_size, tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_training_keeps_the_file_that_was_there(tmp_path):
    model_file = tmp_path / "t.model"
    before = train_tokenizer(corpus(), 600, model_file).digest
    with pytest.raises(ValueError):
        train_tokenizer(corpus(), 100, model_file)
    assert Tokenizer(model_file).digest == before
    assert list(tmp_path.iterdir()) == [model_file]


def test_model_without_a_special_piece_is_refused_by_name(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 9), model_prefix=str(tmp_path / "plain"), vocab_size=20, model_type="bpe",
        hard_vocab_limit=False, user_defined_symbols=["[unused9]", "[unused16]"], minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"plain\.model: no special piece \[unused10\], \[unused17\]"):
        Tokenizer(tmp_path / "plain.model")


def test_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="x.model: not a SentencePiece model"):
        Tokenizer(tmp_path / "x.model")
    with pytest.raises(FileNotFoundError):
        Tokenizer(tmp_path / "absent.model")


@pytest.mark.parametrize("model_type", ["unigram", "word", "char"])
def test_a_model_of_another_kind_without_byte_fallback_cannot_be_forged_either(tmp_path, model_type):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b [ u n u s e d 1 0 ]", "[unused10] x"] * 9), model_prefix=str(tmp_path / "m"),
        vocab_size=60, model_type=model_type, hard_vocab_limit=False, minloglevel=2,
        user_defined_symbols=["[unused9]", "[unused10]", "[unused16]", "[unused17]"],
    )
    tokenizer = Tokenizer(tmp_path / "m.model")
    for name in SPECIALS:
        assert (special_ids(tokenizer) - {tokenizer.unk_id}).isdisjoint(tokenizer.encode(f"a {name}{name} b"))


def test_a_model_that_normalises_full_width_brackets_cannot_be_forged(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b [ u n u s e d 1 0 ]"] * 9), model_prefix=str(tmp_path / "m"), vocab_size=290,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2, normalization_rule_name="nmt_nfkc",
        user_defined_symbols=["[unused9]", "[unused10]", "[unused16]", "[unused17]"],
    )
    tokenizer = Tokenizer(tmp_path / "m.model")
    text = "a［unused10］ b [unused１０]"
    raw = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model")).encode(text)
    assert tokenizer.turn_end_id in raw  # the danger is real
    assert special_ids(tokenizer).isdisjoint(tokenizer.encode(text))
