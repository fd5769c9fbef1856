"""A model that answers one prompt at a time, token after token: a checkpoint, MindIR graphs, or their converted form.

All runners have the same interface; logits are float32 [V], NumPy:

    prefill(tokens)     start anew with a prompt (int32 [n]) -> logits of the token after it
    decode(token)       one more token -> logits of the token after it
    max_prompt_len, cache_len     tokens of a prompt; of a prompt and its answer

`stream` is the loop over tokens, `measure` times it.
"""

import time
from typing import NamedTuple

import numpy as np

from .mindir import DECODE, PREFILL, check_key, load_graph, read_manifest

_SHORTEST_BUCKET = 64


class GraphRunner:
    """The MindIR graphs of an export, or what converter_lite made of them.

    folder: of the export, checked against its manifest; key: bytes, of an encrypted one; open_graphs: cell_graphs or
    lite_graphs. Raises ValueError for a folder that is not as it was exported, and for a wrong, missing or needless
    key.
    """

    def __init__(self, folder, key=None, open_graphs=None):
        self.manifest = read_manifest(folder)
        check_key(self.manifest, key)
        self.buckets, self.cache_len = self.manifest["buckets"], self.manifest["cache_len"]
        self.max_prompt_len = self.buckets[-1]
        self._run = (open_graphs or cell_graphs)(folder, self.manifest, key)
        self._position = 0

    def prefill(self, tokens):
        length = len(tokens)
        bucket = _bucket_for(length, self.buckets)
        padded = np.zeros(bucket, np.int32)
        padded[:length] = tokens
        # Padding writes entries behind the prompt, which are written again before a token looks at them.
        logits = self._run(padded, np.arange(bucket, dtype=np.int32), length - 1)
        self._position = length
        return logits

    def decode(self, token):
        logits = self._run(np.array([token], np.int32), np.array([self._position], np.int32), 0)
        self._position += 1
        return logits


def _bucket_for(length, buckets):
    """The shortest bucket that holds a prompt. Raises ValueError where none does."""
    fitting = [bucket for bucket in buckets if bucket >= length]
    if not fitting or length < 1:
        raise ValueError(f"the prompt has {length} tokens: expected 1 to {buckets[-1]}, the longest of the export's "
                         f"buckets {buckets}; shorten it, or export again with a longer export.buckets.")
    return fitting[0]


def cell_graphs(folder, manifest, key):
    """The step of an export's graphs by MindSpore itself: (tokens, positions, last) -> logits."""
    from mindspore import Tensor

    prefill, decode = load_graph(folder, PREFILL, key), load_graph(folder, DECODE, key)
    weights = dict(prefill.parameters_and_names())
    for name, parameter in decode.parameters_and_names():
        parameter.set_data(weights[name])  # the same memory, which has to be before the graph is compiled
    count = len(manifest["graphs"]["inputs"]) - 3

    def empty_caches():
        return [Tensor(np.zeros(manifest["graphs"]["cache_shape"], np.float16)) for _ in range(count)]

    caches = empty_caches()

    def run(tokens, positions, last):
        nonlocal caches
        graph = decode if len(tokens) == 1 else prefill
        # What is left in the caches of an earlier prompt lies behind the positions that are looked at.
        outputs = graph(Tensor(tokens), Tensor(positions), Tensor(np.array([last], np.int32)), *caches)
        logits = outputs[0].asnumpy()[0]
        # Behind them it has the weight 0, and 0 times NaN is NaN: an overflow would spoil every later answer.
        caches = outputs[1:] if np.isfinite(logits).all() else empty_caches()
        return logits

    return run


def lite_graphs(model_file, device_id=0):
    """As cell_graphs, for GraphRunner: the converted graph on a device, by MindSpore Lite's Python API.

    model_file: what converter_lite wrote. It has a shape for every bucket and for a single token, so that its weights
    are on the device once: ModelGroup would share weights of two graphs only where the provider is GE, which compiles
    on the device. Not run on a device; tested against a stand-in with the documented signatures of Lite 2.x.
    """

    def open_graphs(folder, manifest, key):
        try:
            import mindspore_lite as lite
        except ImportError:
            raise ValueError("mindspore_lite is not installed: pip has no such package, take the wheel for your device "
                             "from mindspore.cn/lite, or leave --lite out to run on this CPU.") from None

        context = lite.Context()
        context.target = ["Ascend"]
        context.ascend.device_id = device_id
        model = lite.Model()
        encryption = {"dec_key": key, "dec_mode": manifest["encryption"]} if key else {}
        try:
            model.build_from_file(str(model_file), lite.ModelType.MINDIR, context, **encryption)
        except RuntimeError as error:
            raise ValueError(f"MindSpore Lite cannot load {model_file}: {error}") from error
        device, shape = f"ascend:{device_id}", manifest["graphs"]["cache_shape"]
        count = len(manifest["graphs"]["inputs"]) - 3
        empty = np.zeros(shape, np.float16)

        def empty_caches():
            return [lite.Tensor(empty, device=device) for _ in range(count)]

        # Two sets of caches that stay on the device: what one call writes, the next one reads.
        caches, others = empty_caches(), empty_caches()
        vocab_size = manifest["model"]["vocab_size"]
        shape_of_now = None

        def run(tokens, positions, last):
            nonlocal caches, others, shape_of_now
            if shape_of_now != len(tokens):
                shape_of_now = len(tokens)
                model.resize(model.get_inputs(), [[shape_of_now], [shape_of_now], [1], *[list(shape)] * count])
            logits = lite.Tensor(shape=[1, vocab_size], dtype=lite.DataType.FLOAT32)
            inputs = [lite.Tensor(tokens), lite.Tensor(positions), lite.Tensor(np.array([last], np.int32)), *caches]
            found = model.predict(inputs, [logits, *others])[0].get_data_to_numpy().reshape(-1)
            caches, others = (others, caches) if np.isfinite(found).all() else (empty_caches(), empty_caches())
            return found

        return run

    return open_graphs


class ModelRunner:
    """A Pangu in this process, float32 or as it was loaded; cache_len positions of caches in its dtype."""

    def __init__(self, model, cache_len):
        import mindspore as ms
        from mindspore import Parameter, ParameterTuple, ops

        from .generate import PromptPass, TokenPass

        config = model.config
        self.cache_len, self.max_prompt_len = cache_len, cache_len - 1
        shape = (1, config.num_kv_heads, cache_len, config.head_dim)

        def caches(kind):
            return ParameterTuple([Parameter(ops.zeros(shape, model.dtype), name=f"{kind}_cache.{i}",
                                             requires_grad=False) for i in range(config.num_layers)])

        self._model, self._caches = model, (caches("k"), caches("v"))
        self._decode = ms.jit(TokenPass(model, *self._caches).construct)
        self._passes = {}
        self._new_pass = lambda length: ms.jit(PromptPass(model, *self._caches, length).construct)
        self._position = 0
        self._pad_id = config.pad_id

    def prefill(self, tokens):
        from mindspore import Tensor

        length = len(tokens)
        if not 1 <= length <= self.max_prompt_len:
            raise ValueError(f"the prompt has {length} tokens: expected 1 to {self.max_prompt_len}.")
        bucket = _SHORTEST_BUCKET
        while bucket < length:
            bucket *= 2
        bucket = min(bucket, self.cache_len)
        if bucket not in self._passes:
            self._passes[bucket] = self._new_pass(bucket)
        padded = np.full(bucket, self._pad_id, np.int32)
        padded[:length] = tokens
        self._passes[bucket](Tensor(padded), Tensor(np.arange(bucket, dtype=np.int32)),
                             Tensor(np.array([0, bucket], np.int64)), Tensor(np.zeros(1, np.int64)))
        # The pass leaves keys and values only; the last token is fed again for its logits.
        self._position = length - 1
        return self.decode(tokens[-1])

    def decode(self, token):
        from mindspore import Tensor

        logits = self._decode(Tensor(np.array([token], np.int32)), Tensor(np.array([self._position], np.int32)))
        self._position += 1
        return logits.asnumpy()[0].astype(np.float32, copy=False)


def stream(runner, prompt, *, eos_id, max_new_tokens, temperature=0.0, numbers=None):
    """The tokens of an answer as they come, the turn end included; ends there, after max_new_tokens or with the cache.

    numbers: a uniform random number for each token, see model.generate.uniforms; temperature 0 needs none.
    Raises ValueError where logits are not finite.
    """
    logits = runner.prefill(prompt)
    limit = min(max_new_tokens, runner.cache_len - len(prompt) + 1)  # the last token needs no place in the cache
    for i in range(limit):
        token = choose(logits, temperature, None if numbers is None else numbers[i])
        yield token
        if token == eos_id or i + 1 == limit:
            return
        logits = runner.decode(token)


def choose(logits_V, temperature, number):
    """The most likely token, or at a temperature the one that a uniform number in [0, 1) stands for, likely ones first.

    Raises ValueError where logits are not finite.
    """
    if not np.isfinite(logits_V).all():
        raise ValueError("the model's logits are not finite: its weights are damaged, or what flows between its layers "
                         "is too large for float16; compare with the checkpoint that it was exported from.")
    if temperature == 0:
        return int(logits_V.argmax())
    order = np.argsort(-logits_V, kind="stable")
    shares = np.exp((logits_V[order].astype(np.float64) - logits_V.max()) / temperature)
    place = np.searchsorted(np.cumsum(shares) / shares.sum(), number, side="right")
    return int(order[min(place, len(order) - 1)])


class Times(NamedTuple):
    """What a measurement of a runner gives."""

    first_token_s: float  # from the prompt to the first token
    per_token_s: float  # of each later token, the mean


def measure(runner, prompt_len, answer_len, vocab_size):
    """Times of an answer of answer_len tokens to a prompt of random ones, after one that compiles the graphs.

    Raises ValueError for lengths that do not fit, and where logits are not finite.
    """
    if answer_len < 2 or prompt_len + answer_len > runner.cache_len + 1:
        raise ValueError(f"a prompt of {prompt_len} tokens and an answer of {answer_len}: expected at least 2 in the "
                         f"answer, and {runner.cache_len + 1} together, for a cache of {runner.cache_len}.")
    prompt = np.random.default_rng(0).integers(3, vocab_size, prompt_len).astype(np.int32)
    runner.decode(choose(runner.prefill(prompt), 0, None))
    started = time.monotonic()
    token = choose(runner.prefill(prompt), 0, None)
    first = time.monotonic()
    for _ in range(answer_len - 1):
        token = choose(runner.decode(token), 0, None)
    return Times(first - started, (time.monotonic() - first) / (answer_len - 1))
