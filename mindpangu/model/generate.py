"""Batched generation with a key/value cache; the loop over tokens runs inside one compiled graph.

B slots, R prompts of a refill, P prompt length, A answer length, S = P + A cache length, M key/value heads,
H head size.
"""

from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ..ops.sample import sample
from .uniforms import uniforms


class Answer(NamedTuple):
    """A sampled answer: its token ids, eos included unless truncated, and their log-probabilities when sampled."""

    tokens: np.ndarray  # int32 [n]
    logprobs: np.ndarray  # float32 [n], in the sampling distribution
    kept_logprobs: np.ndarray  # float32 [n], of the mass that top-k and top-p kept, see ops.sample
    truncated: bool  # the answer did not end within max_new_tokens


class PromptPass(nn.Cell):
    """Write the keys and values of R prompts into the caches of their slots."""

    def __init__(self, model, k_caches, v_caches, prompt_len):
        super().__init__()
        self.model = model
        self.k_caches, self.v_caches = k_caches, v_caches
        self.prompt_len = prompt_len

    def construct(self, tokens_T, positions_T, cu_seqlens_C, slots_R):
        _, keys, values = self.model.prefill(tokens_T, positions_T, cu_seqlens_C, self.prompt_len)
        rows = ops.expand_dims(slots_R, 1)
        written = slots_R
        for i in range(len(keys)):
            k = ops.scatter_nd_update(self.k_caches[i], rows, self.as_cache_rows(keys[i]))
            v = ops.scatter_nd_update(self.v_caches[i], rows, self.as_cache_rows(values[i]))
            written = ops.depend(written, (k, v))
        return written

    def as_cache_rows(self, x_TMH):
        """[R * P, M, H] -> [R, M, S, H]; what lies behind the prompt is written before it is read."""
        num_kv_heads, head_dim = x_TMH.shape[1:]
        x = x_TMH.reshape(-1, self.prompt_len, num_kv_heads, head_dim).transpose(0, 2, 1, 3)
        behind = self.k_caches[0].shape[2] - self.prompt_len
        return ops.concat((x, ops.zeros((x.shape[0], num_kv_heads, behind, head_dim), x.dtype)), 2)


class TokenPass(nn.Cell):
    """One more token per sequence: write its keys and values, return its logits [B, V]."""

    def __init__(self, model, k_caches, v_caches):
        super().__init__()
        self.model = model
        self.k_caches, self.v_caches = k_caches, v_caches

    def construct(self, tokens_B, positions_B):
        return self.model.decode(tokens_B, positions_B, self.k_caches, self.v_caches)


class _Decode(nn.Cell):
    """Extend the answers of all active slots until at most max_active of them are still active."""

    def __init__(self, model, k_caches, v_caches, num_slots, max_new_tokens, eos_id, sampling):
        super().__init__()
        self.model = model
        self.k_caches, self.v_caches = k_caches, v_caches
        self.eos_id = eos_id
        self.max_new_tokens = max_new_tokens
        self.temperature, self.top_k, self.top_p = sampling
        self.drops_tokens = self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)
        self.answers = Parameter(Tensor(np.zeros((num_slots, max_new_tokens), np.int32)), name="answers",
                                 requires_grad=False)
        self.logprobs = Parameter(Tensor(np.zeros((num_slots, max_new_tokens), np.float32)), name="logprobs",
                                  requires_grad=False)
        self.kept_logprobs = Parameter(Tensor(np.zeros((num_slots, max_new_tokens), np.float32)), name="kept_logprobs",
                                       requires_grad=False)
        self.slots = Tensor(np.arange(num_slots, dtype=np.int32))

    def construct(self, tokens_B, positions_B, lengths_B, active_B, uniforms_BA, max_active):
        """All [B] tensors int32. tokens_B stands at positions_B and is fed next; returns the four after the loop."""
        while active_B.sum() > max_active:
            logits = self.model.decode(tokens_B, positions_B, self.k_caches, self.v_caches)
            last = ops.minimum(lengths_B, ops.full_like(lengths_B, self.max_new_tokens - 1))
            numbers = ops.gather_d(uniforms_BA, 1, ops.expand_dims(last, 1)).reshape(-1)
            drawn, logprobs, kept_logprobs = sample(logits, numbers, self.temperature, self.top_k, self.top_p)
            is_active = active_B > 0
            self.write(self.answers, last, drawn, is_active)
            self.write(self.logprobs, last, logprobs, is_active)
            if self.drops_tokens:
                self.write(self.kept_logprobs, last, kept_logprobs, is_active)
            tokens_B = ops.select(is_active, drawn, tokens_B)
            positions_B = positions_B + active_B
            lengths_B = lengths_B + active_B
            going = ops.logical_and(drawn != self.eos_id, lengths_B < self.max_new_tokens)
            active_B = active_B * ops.cast(going, ms.int32)
        return tokens_B, positions_B, lengths_B, active_B

    def write(self, written_BA, last_B, values_B, is_active):
        """An idle slot writes its last entry again: its answer was taken before, or is never read."""
        old = ops.gather_d(written_BA, 1, ops.expand_dims(last_B, 1)).reshape(-1)
        ops.scatter_nd_update(written_BA, ops.stack((self.slots, last_B), -1), ops.select(is_active, values_B, old))


class Generator:
    """Generates answers to many prompts on num_slots sequences at a time; finished ones are replaced continuously.

    The compiled graphs read the model's Parameters at every call, so a Generator made before training sees the
    weights of the moment.
    """

    def __init__(self, model, *, num_slots, prompt_len, max_new_tokens, eos_id, pad_id, temperature=1.0, top_k=0,
                 top_p=1.0, mode="graph"):
        config = model.config
        self.num_slots, self.prompt_len, self.max_new_tokens = num_slots, prompt_len, max_new_tokens
        self.eos_id, self.pad_id = eos_id, pad_id
        self.num_refill = max(1, num_slots // 4)
        cache_len = prompt_len + max_new_tokens
        if cache_len > config.max_seq_len:
            raise ValueError(f"prompts of {prompt_len} and answers of {max_new_tokens} tokens exceed "
                             f"model.max_seq_len={config.max_seq_len}: shorten rollout.max_prompt_len or "
                             "rollout.max_new_tokens.")
        shape = (num_slots, config.num_kv_heads, cache_len, config.head_dim)

        def caches(kind):
            return ParameterTuple([Parameter(ops.zeros(shape, model.dtype), name=f"{kind}_cache.{i}",
                                             requires_grad=False) for i in range(config.num_layers)])

        k_caches, v_caches = caches("k"), caches("v")
        prefill = PromptPass(model, k_caches, v_caches, prompt_len)
        self._decode_cell = _Decode(model, k_caches, v_caches, num_slots, max_new_tokens, eos_id,
                                    (temperature, top_k, top_p))
        self._prefill, self._decode = prefill, self._decode_cell
        if mode == "graph":
            self._prefill, self._decode = ms.jit(prefill.construct), ms.jit(self._decode_cell.construct)

    def generate(self, prompts, keys=None, on_answer=None):
        """Answers, in the order of the prompts (int32 arrays of at most prompt_len tokens).

        keys: for each prompt (seed, prompt_index, sample_index), the source of its random numbers, see `uniforms`;
        temperature 0 needs none. on_answer(i, Answer) is called as they finish.
        """
        if keys is None and self._decode_cell.temperature > 0 and len(prompts) > 0:
            raise ValueError(f"keys=None at temperature {self._decode_cell.temperature}: expected a (seed, "
                             "prompt_index, sample_index) for each prompt; only temperature 0 needs no random numbers.")
        if keys is not None and len(keys) != len(prompts):
            raise ValueError(f"{len(keys)} keys for {len(prompts)} prompts: expected one for each.")
        for i, prompt in enumerate(prompts):
            if not 1 <= len(prompt) <= self.prompt_len:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens; expected 1 to rollout.max_prompt_len="
                                 f"{self.prompt_len}.")
        answers = [None] * len(prompts)
        slot_prompt = np.full(self.num_slots, -1)
        tokens = np.full(self.num_slots, self.pad_id, np.int32)
        positions, lengths, active = (np.zeros(self.num_slots, np.int32) for _ in range(3))
        numbers = np.zeros((self.num_slots, self.max_new_tokens), np.float32)
        next_prompt = 0
        while next_prompt < len(prompts) or (slot_prompt >= 0).any():
            free = np.flatnonzero(slot_prompt < 0)
            for start in range(0, len(free), self.num_refill):
                slots = free[start:start + self.num_refill][:len(prompts) - next_prompt]
                if len(slots) == 0:
                    break
                chosen = range(next_prompt, next_prompt + len(slots))
                next_prompt += len(slots)
                self._fill(slots, [prompts[i] for i in chosen])
                for slot, i in zip(slots, chosen, strict=True):
                    slot_prompt[slot] = i
                    tokens[slot], positions[slot] = prompts[i][-1], len(prompts[i]) - 1
                    lengths[slot], active[slot] = 0, 1
                    if keys is not None:
                        numbers[slot] = uniforms(*keys[i], self.max_new_tokens)
            max_active = self.num_slots - self.num_refill if next_prompt < len(prompts) else 0
            state = self._decode(Tensor(tokens), Tensor(positions), Tensor(lengths), Tensor(active), Tensor(numbers),
                                 Tensor(max_active, ms.int32))
            tokens, positions, lengths, active = (x.asnumpy().copy() for x in state)
            cell = self._decode_cell
            written = [x.asnumpy() for x in (cell.answers, cell.logprobs, cell.kept_logprobs)]
            for slot in np.flatnonzero((slot_prompt >= 0) & (active == 0)):
                i, length = slot_prompt[slot], lengths[slot]
                slot_prompt[slot] = -1
                answer, logprobs, kept_logprobs = (x[slot, :length].copy() for x in written)
                answers[i] = Answer(answer, logprobs, kept_logprobs, bool(answer[-1] != self.eos_id))
                if on_answer:
                    on_answer(i, answers[i])
        return answers

    def _fill(self, slots, prompts):
        """Run the prompts' tokens; missing prompts of the fixed batch repeat the first one into its own slot."""
        padded = self.num_refill - len(slots)
        slots = np.concatenate([slots, np.full(padded, slots[0])]).astype(np.int64)
        tokens = np.full((self.num_refill, self.prompt_len), self.pad_id, np.int32)
        for row, prompt in enumerate(prompts + [prompts[0]] * padded):
            tokens[row, :len(prompt)] = prompt
        positions = np.tile(np.arange(self.prompt_len, dtype=np.int32), self.num_refill)
        ends = np.arange(self.num_refill + 1, dtype=np.int64) * self.prompt_len
        self._prefill(Tensor(tokens.reshape(-1)), Tensor(positions), Tensor(ends), Tensor(slots))
