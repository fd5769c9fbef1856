"""The chat template of openPangu Embedded: messages <-> token ids, and which tokens are learnt.

<s>[unused9]系统：{system, may be empty}[unused10][unused9]用户：{user}[unused10][unused9]助手：{answer}[unused10]
with {answer} = [unused16]{thoughts}[unused17]{answer} where the assistant thinks first.

Special pieces go in by id, never as text, so no content can open or close a turn. The text between two special pieces
(a stretch: role label and content together) is one call of the tokenizer, as in the released tokenizer's own ids.
"""
# T tokens
import json
from typing import NamedTuple

import numpy as np
import xxhash

from mindpangu.data.documents import Message
from mindpangu.data.tokenizer import SPECIAL_PIECES

ROLE_LABELS = {"system": "系统：", "user": "用户：", "assistant": "助手：", "tool": "工具：", "function": "方法："}
# Part of the digest: raise it when the order of the pieces below changes.
LAYOUT = 1


class Tokenized(NamedTuple):
    """tokens_T: int32; is_target_T: bool, True where the token is predicted with loss. Position 0 never is."""

    tokens_T: np.ndarray
    is_target_T: np.ndarray


def encode_chat(tokenizer, messages):
    """Encode a whole conversation; the targets are every assistant's content, thoughts and closing turn end.

    tokens_T starts with encode_prompt(tokenizer, messages[:-1]). Raises ValueError for an empty conversation, one that
    does not end with the assistant, an unknown role, a system message that is not the first, thoughts of another role.
    """
    if not messages or messages[-1].role != "assistant":
        last_role = messages[-1].role if messages else None
        raise ValueError(f"messages end with role {last_role!r}: expected 'assistant', the answer to learn.")
    tokens, is_target = _encode_turns(tokenizer, messages)
    return Tokenized(np.array(tokens, np.int32), np.array(is_target, bool))


def encode_prompt(tokenizer, messages):
    """Encode the messages before an answer and open the assistant's turn: int32 [T]. Errors as encode_chat."""
    tokens, _ = _encode_turns(tokenizer, messages)
    return np.array([*tokens, tokenizer.turn_start_id, *tokenizer.encode(ROLE_LABELS["assistant"])], np.int32)


def decode_response(tokenizer, token_ids):
    """The assistant's message that sampled token ids spell; the inverse of the targets of encode_chat.

    What follows the first turn end is dropped. Thoughts that were never closed (a truncated answer) leave content "".
    Any other special piece is shown by name.
    """
    token_ids = [int(token) for token in token_ids]
    if tokenizer.turn_end_id in token_ids:
        token_ids = token_ids[: token_ids.index(tokenizer.turn_end_id)]
    if token_ids[:1] == [tokenizer.think_open_id]:
        close = token_ids.index(tokenizer.think_close_id) if tokenizer.think_close_id in token_ids else len(token_ids)
        thoughts = tokenizer.decode(token_ids[1:close])
        return Message("assistant", tokenizer.decode(token_ids[close + 1 :]), thoughts)
    # The answer goes on where the role label ends: decoded alone it would lose a leading space to the dummy prefix.
    label = ROLE_LABELS["assistant"]
    return Message("assistant", tokenizer.decode(tokenizer.encode(label) + token_ids).removeprefix(label))


def list_stretches(messages):
    """The stretches of text that encode_chat gives to the tokenizer: what a tokenizer for chats is trained on."""
    stretches = []
    for message in _with_system(messages):
        label = ROLE_LABELS[message.role]
        if message.thoughts is None:
            stretches.append(label + message.content)
        else:
            stretches += [label, message.thoughts, message.content]
    return stretches


def template_digest():
    """xxh3_64, hexadecimal, of the template's constants: what a manifest of token ids is bound to."""
    constants = [str(LAYOUT), *SPECIAL_PIECES.values()]
    constants += [text for role_and_label in ROLE_LABELS.items() for text in role_and_label]
    return xxhash.xxh3_64_hexdigest("\n".join(constants).encode())


def jinja_template():
    """The template for programs that render one: transformers, llama.cpp. It writes special pieces by name.

    An assistant's thoughts are its reasoning_content, as in the files of conversations.
    """
    pieces, labels = SPECIAL_PIECES, json.dumps(ROLE_LABELS, ensure_ascii=False)
    return (f"{{%- set labels = {labels} -%}}"
            "{{- bos_token -}}"
            "{%- if not messages or messages[0].role != 'system' -%}"
            f"{{{{- '{pieces['turn_start']}{ROLE_LABELS['system']}{pieces['turn_end']}' -}}}}"
            "{%- endif -%}"
            "{%- for message in messages -%}"
            f"{{{{- '{pieces['turn_start']}' + labels[message.role] -}}}}"
            "{%- if message.reasoning_content -%}"
            f"{{{{- '{pieces['think_open']}' + message.reasoning_content + '{pieces['think_close']}' -}}}}"
            "{%- endif -%}"
            f"{{{{- message.content + '{pieces['turn_end']}' -}}}}"
            "{%- endfor -%}"
            "{%- if add_generation_prompt -%}"
            f"{{{{- '{pieces['turn_start']}{ROLE_LABELS['assistant']}' -}}}}"
            "{%- endif -%}")


def _with_system(messages):
    for position, message in enumerate(messages):
        where = f"messages[{position}]"
        if message.role not in ROLE_LABELS:
            raise ValueError(f"{where}.role={message.role!r} is unknown: expected one of {', '.join(ROLE_LABELS)}.")
        if message.role == "system" and position > 0:
            raise ValueError(f"{where}.role='system': expected a system message only at the start.")
        if message.thoughts is not None and message.role != "assistant":
            raise ValueError(f"{where} of role {message.role!r} has thoughts: expected them on 'assistant' only.")
    has_system = bool(messages) and messages[0].role == "system"
    return list(messages) if has_system else [Message("system", ""), *messages]


def _encode_turns(tokenizer, messages):
    tokens, is_target = [tokenizer.bos_id], [False]
    for message in _with_system(messages):
        if message.role == "assistant":
            given = tokenizer.encode(ROLE_LABELS["assistant"])
            written = [*_encode_reply(tokenizer, message, given), tokenizer.turn_end_id]
        else:
            given = [*tokenizer.encode(ROLE_LABELS[message.role] + message.content), tokenizer.turn_end_id]
            written = []
        tokens += [tokenizer.turn_start_id, *given, *written]
        is_target += [False] * (1 + len(given)) + [True] * len(written)
    return tokens, is_target


def _encode_reply(tokenizer, message, label_tokens):
    if message.thoughts is not None:
        thoughts, content = tokenizer.encode(message.thoughts), tokenizer.encode(message.content)
        return [tokenizer.think_open_id, *thoughts, tokenizer.think_close_id, *content]
    label_and_content = tokenizer.encode(ROLE_LABELS["assistant"] + message.content)
    if label_and_content[: len(label_tokens)] == label_tokens:
        return label_and_content[len(label_tokens) :]
    # A piece lies across the end of the label (one like "：####"). The model writes its answer after the label's own
    # pieces, so the content is encoded apart from it.
    return tokenizer.encode(message.content, after_text=True)
