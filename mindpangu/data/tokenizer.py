"""The tokenizer: a SentencePiece model whose special pieces are looked up by name, and the training of a small one."""
import io
import os
import re
from pathlib import Path

import sentencepiece
import xxhash

# The special pieces of openPangu Embedded by meaning. Padding is <unk>, as in the released model.
SPECIAL_PIECES = {
    "bos": "<s>",
    "pad": "<unk>",
    "turn_start": "[unused9]",
    "turn_end": "[unused10]",
    "think_open": "[unused16]",
    "think_close": "[unused17]",
}
RESERVED_PIECE = re.compile(r"\[unused\d+\]")
# SentencePiece writes a space as this character, so text that holds it would come back with a space instead.
SPACE_SYMBOL = "\u2581"
# Serialised ModelProto {normalizer_spec {add_dummy_prefix: false}}. Protocol buffers merge a message field that occurs
# twice, so these bytes after a model switch its dummy prefix off and leave the rest alone.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Tokenizer:
    """A SentencePiece model whose special pieces have ids by meaning.

    bos_id, pad_id (= unk_id), turn_start_id, turn_end_id (= eos_id), think_open_id, think_close_id; vocab_size;
    digest: xxh3_64 of the model file's bytes, hexadecimal.
    Raises ValueError if the file is no SentencePiece model or lacks a special piece.
    """

    def __init__(self, model_file):
        self.model_file = str(model_file)
        model = Path(model_file).read_bytes()
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._pieces_after_text = sentencepiece.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
        except RuntimeError as error:
            raise ValueError(
                f"tokenizer {model_file}: not a SentencePiece model ({error}): expected a .model file."
            ) from None
        self.digest = xxhash.xxh3_64_hexdigest(model)
        self.vocab_size = self._pieces.vocab_size()
        names = self._pieces.id_to_piece(list(range(self.vocab_size)))
        missing = [name for name in SPECIAL_PIECES.values() if names[self._pieces.piece_to_id(name)] != name]
        if missing:
            raise ValueError(
                f"tokenizer {model_file}: no special piece {', '.join(missing)}: expected all of "
                f"{', '.join(SPECIAL_PIECES.values())}; take the model's own tokenizer file or train one with "
                "mindpangu.data.tokenizer.train_tokenizer."
            )
        ids = {meaning: self._pieces.piece_to_id(name) for meaning, name in SPECIAL_PIECES.items()}
        self.bos_id, self.pad_id, self.unk_id = ids["bos"], ids["pad"], ids["pad"]
        self.turn_start_id, self.turn_end_id, self.eos_id = ids["turn_start"], ids["turn_end"], ids["turn_end"]
        self.think_open_id, self.think_close_id = ids["think_open"], ids["think_close"]

        is_control = self._pieces.is_control(list(range(self.vocab_size)))
        self._special_names = {
            token: name for token, name in enumerate(names)
            if is_control[token] or name in SPECIAL_PIECES.values() or RESERVED_PIECE.fullmatch(name)
        }
        # <unk> stands for what a model cannot spell, so text may hold it.
        self._forbidden_ids = self._special_names.keys() - {self.unk_id}
        space_symbol_bytes = [f"<0x{byte:02X}>" for byte in SPACE_SYMBOL.encode()]
        self._space_symbol_ids = self._pieces.piece_to_id(space_symbol_bytes)
        if self.unk_id in self._space_symbol_ids:  # no byte fallback: such a character cannot be kept
            self._space_symbol_ids = [self.unk_id]

    def encode(self, text, after_text=False):
        """Token ids of ordinary text: a special piece spelled out in it becomes ordinary pieces, never the special id.

        Lossless under decode if the model has byte fallback and no normalisation, as train_tokenizer's have.
        after_text: the text goes on where other text ended, so the model's dummy prefix (a leading space) is left out.
        """
        tokens = []
        for number, segment in enumerate(re.split(f"({SPACE_SYMBOL})", text)):
            if segment == SPACE_SYMBOL:
                tokens += self._space_symbol_ids
            else:
                tokens += self._encode_segment(segment, after_text or number > 0)
        return tokens

    def decode(self, token_ids):
        """The text of token ids, special pieces by name. Raises ValueError for an id outside the vocabulary."""
        parts, stretch = [], []
        for token in map(int, token_ids):
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"token id {token}: expected 0..{self.vocab_size - 1}, the vocabulary of {self.model_file}."
                )
            if token in self._special_names:
                parts += [self._pieces.decode(stretch), self._special_names[token]]
                stretch = []
            else:
                stretch.append(token)
        return "".join([*parts, self._pieces.decode(stretch)])

    def _encode_segment(self, segment, after_text):
        tokens = (self._pieces_after_text if after_text else self._pieces).encode(segment)
        if self._forbidden_ids.isdisjoint(tokens):
            return tokens
        # A user-defined piece matches its name in text, and a normalising model (NFKC) matches "［unused10］", in
        # full-width brackets, too. Halving until nothing matches holds for any model; ordinary text never comes here.
        assert len(segment) > 1, f"the character {segment!r} is a special piece"
        middle = len(segment) // 2
        return self._encode_segment(segment[:middle], after_text) + self._encode_segment(segment[middle:], True)


def train_tokenizer(texts, vocab_size, model_file):
    """Train a SentencePiece model on texts and write it (aside first, then renamed). Returns its Tokenizer.

    Digits are single pieces, unknown characters fall back to bytes, nothing is normalised. The same texts in the same
    order give the same bytes. Raises ValueError if there is no text or if vocab_size does not suit it.
    """
    model = io.BytesIO()
    # SentencePiece drops any training text with a tab, its own separator; in use a tab falls back to a byte.
    lines = (text.replace("\t", " ") for text in texts)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            # On the built-in problems at 512 pieces unigram needs 65 tokens an English question, 29 a Chinese one and
            # 29 an answer, and stops at 564 pieces; BPE needs 61, 39 and 25, and 37, 21 and 25 at 768.
            model_type="bpe",
            vocab_size=vocab_size,
            user_defined_symbols=[name for name in SPECIAL_PIECES.values() if RESERVED_PIECE.fullmatch(name)],
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 30,  # bytes; longer texts would be dropped in silence
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size)) from None
    path = Path(model_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as file:
        file.write(model.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    return Tokenizer(path)


def _explain(reason, vocab_size):
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason):
        return (f"model.vocab_size={vocab_size} is too small for this corpus: its characters, the 256 bytes and "
                f"the special pieces need at least {found[1]}.")
    if found := re.search(r"Vocabulary size too high .*<= (\d+)", reason):
        return (f"model.vocab_size={vocab_size} is too large for this corpus: choose at most {found[1]}, or give "
                "more text.")
    return f"tokenizer training failed: expected non-empty texts ({reason})."
