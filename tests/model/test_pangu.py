"""Pangu against transformers' LlamaForCausalLM on the same weights, which travel through safetensors."""

import math

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, ops
from transformers import LlamaForCausalLM

from mindpangu.config import ModelConfig
from mindpangu.model.pangu import Pangu
from mindpangu.model.size import num_parameters
from mindpangu.model.weights import hugging_face_names, load_model, save_weights
from mindpangu.ops.head_loss import CrossEntropyHead

pytestmark = pytest.mark.usefixtures("mindspore_cpu")
# Float32 rounding (6e-8) over some hundred dependent sums; a wrong epsilon, scale or angle shows at 1e-3 and above.
RTOL = 1e-5


def relative_error(ours, theirs):
    return np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()


def packed_rows(seed, num_rows, row_len, vocab_size):
    """Rows split into random documents: tokens, positions, cu_seqlens padded by two entries, [(start, end)]."""
    random = np.random.default_rng(seed)
    ends = []
    for row in range(num_rows):
        cuts = np.sort(random.choice(np.arange(1, row_len), int(random.integers(0, 4)), replace=False))
        ends += [row * row_len + int(cut) for cut in cuts] + [(row + 1) * row_len]
    documents = list(zip([0, *ends[:-1]], ends, strict=True))
    tokens = random.integers(0, vocab_size, num_rows * row_len).astype(np.int32)
    positions = np.concatenate([np.arange(end - start, dtype=np.int32) for start, end in documents])
    return tokens, positions, np.array([0, *ends, ends[-1], ends[-1]], np.int64), documents


def tensors(*arrays):
    return [Tensor(array) for array in arrays]


def llama_logits(llama, tokens, documents):
    """[T, V]: every document alone."""
    return torch.cat([llama(torch.tensor(tokens[None, start:end], dtype=torch.long)).logits[0]
                      for start, end in documents])


class Alone(ms.nn.Cell):
    """An exchange with nobody."""

    def construct(self, x):
        return x * 1.0


@pytest.mark.parametrize("missing", [0, 1, 5])
def test_tokens_behind_the_last_row_that_make_equal_shares_change_nothing(missing, random_config):
    config = random_config(3)
    model = Pangu(config, seed=3)
    row_len = 15
    tokens, positions, cu_seqlens, _ = packed_rows(3, 2, row_len, config.vocab_size)
    upstream = np.random.default_rng(3).standard_normal((tokens.size, config.hidden_size)).astype(np.float32)
    parameters = model.trainable_params()

    def run(*padded):
        def loss_of(tokens_T, positions_T):
            hidden = model(tokens_T, positions_T, Tensor(cu_seqlens), row_len)[:tokens.size]
            return (hidden * Tensor(upstream)).sum(), hidden

        (_, hidden), gradients = ms.value_and_grad(loss_of, None, parameters, has_aux=True)(*tensors(*padded))
        return [array.asnumpy() for array in (hidden, *gradients)]

    alone = run(tokens, positions)
    model.split_sequences(Alone(), Alone())
    shared = run(*(np.pad(array, (0, missing)) for array in (tokens, positions)))
    for ours, theirs in zip(shared, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("seed", range(6))
def test_logits_and_gradients_are_those_of_transformers(seed, random_config, random_llama, tmp_path):
    config = random_config(seed)
    llama = random_llama(config, seed)
    llama.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    num_rows, row_len = 2, 15
    tokens, positions, cu_seqlens, documents = packed_rows(seed, num_rows, row_len, config.vocab_size)
    random = np.random.default_rng(seed)
    labels = random.integers(0, config.vocab_size, tokens.size).astype(np.int32)
    weights = random.uniform(0, 1, tokens.size).astype(np.float32)

    theirs = llama_logits(llama, tokens, documents)
    inputs = tensors(tokens, positions, cu_seqlens)
    assert relative_error(model.logits(model(*inputs, row_len)).asnumpy(), theirs.detach().numpy()) < RTOL

    head = CrossEntropyHead(chunk_size=16)

    def loss_of(*inputs_and_targets):
        hidden = model(*inputs_and_targets[:3], row_len)
        return head(hidden, model.head_weight(), *inputs_and_targets[3:])[0]

    parameters = dict(model.parameters_and_names())
    loss, gradients = ms.value_and_grad(loss_of, None, list(parameters.values()))(*inputs, *tensors(labels, weights))
    their_loss = (torch.nn.functional.cross_entropy(theirs, torch.tensor(labels, dtype=torch.long), reduction="none")
                  * torch.tensor(weights)).sum()
    their_loss.backward()
    assert relative_error(loss.asnumpy(), their_loss.detach().numpy()) < RTOL
    their_gradients = {name: weight.grad.numpy() for name, weight in llama.named_parameters()}
    names = hugging_face_names(config)
    for path, gradient in zip(parameters, gradients, strict=True):
        row = 0
        for name, shape in names[path]:
            ours = gradient.asnumpy()[row:row + shape[0]]
            assert relative_error(ours, their_gradients.pop(name)) < RTOL, name
            row += shape[0]
    assert not their_gradients


@pytest.mark.parametrize("seed", range(6))
def test_transformers_computes_the_same_logits_from_saved_weights(seed, random_config, tmp_path):
    config = random_config(seed)
    model = Pangu(config)
    random = np.random.default_rng(seed)
    for parameter in model.get_parameters():
        ops.assign(parameter, Tensor(random.normal(0.2, 0.2, parameter.shape).astype(np.float32)))
    save_weights(model, tmp_path)
    llama = LlamaForCausalLM.from_pretrained(tmp_path)
    tokens, positions, cu_seqlens, documents = packed_rows(seed, 1, 23, config.vocab_size)
    ours = model.logits(model(*tensors(tokens, positions, cu_seqlens), 23)).asnumpy()
    with torch.no_grad():
        assert relative_error(ours, llama_logits(llama, tokens, documents).numpy()) < RTOL


@pytest.fixture(scope="module")
def model_and_graph(random_config, random_llama, tmp_path_factory):
    """A random model and its compiled logits of three packed rows of 20 tokens."""
    ms.set_device("CPU")
    config = random_config(5)
    folder = tmp_path_factory.mktemp("llama")
    random_llama(config, 5).save_pretrained(folder)
    model = load_model(folder)

    def logits(tokens_T, positions_T, cu_seqlens_C):
        return model.logits(model(tokens_T, positions_T, cu_seqlens_C, 20))

    return model, logits, ms.jit(logits)


def padded(cu_seqlens, size):
    return np.pad(cu_seqlens, (0, size - cu_seqlens.size), mode="edge")


def test_eager_and_graph_agree(model_and_graph):
    model, eager, graph = model_and_graph
    tokens, positions, cu_seqlens, _ = packed_rows(0, 3, 20, model.config.vocab_size)
    inputs = tensors(tokens, positions, padded(cu_seqlens, 20))
    assert relative_error(graph(*inputs).asnumpy(), eager(*inputs).asnumpy()) < 1e-6

    head = CrossEntropyHead(chunk_size=16)

    def loss_of(tokens_T, positions_T, cu_seqlens_C, labels_T, weights_T):
        hidden = model(tokens_T, positions_T, cu_seqlens_C, 20)
        return head(hidden, model.head_weight(), labels_T, weights_T)[0]

    value_and_grad = ms.value_and_grad(loss_of, None, model.trainable_params())

    def run(tokens_T, positions_T, cu_seqlens_C, labels_T, weights_T):
        return value_and_grad(tokens_T, positions_T, cu_seqlens_C, labels_T, weights_T)

    inputs += tensors(np.roll(tokens, -1), np.ones(60, np.float32))
    (loss, gradients), (eager_loss, eager_gradients) = ms.jit(run)(*inputs), run(*inputs)
    assert relative_error(loss.asnumpy(), eager_loss.asnumpy()) < 1e-6
    for gradient, eager_gradient in zip(gradients, eager_gradients, strict=True):
        assert relative_error(gradient.asnumpy(), eager_gradient.asnumpy()) < 1e-6


def test_packed_documents_do_not_see_each_other(model_and_graph):
    model, eager, graph = model_and_graph
    for seed in range(4):
        tokens, positions, cu_seqlens, documents = packed_rows(seed, 3, 20, model.config.vocab_size)
        packed = graph(*tensors(tokens, positions, padded(cu_seqlens, 20))).asnumpy()
        for start, end in documents:
            # Alone: at the start of an otherwise empty row, as one document that causality shields from the padding.
            alone = np.zeros(60, np.int32)
            alone[:end - start] = tokens[start:end]
            place = np.tile(np.arange(20, dtype=np.int32), 3)
            separate = graph(*tensors(alone, place, padded(np.array([0, 20, 40, 60]), 20))).asnumpy()[:end - start]
            # The same sums over another number of masked zeros: a few float32 roundings.
            assert relative_error(packed[start:end], separate) < 1e-6
    # A token of another document changes nothing, to the bit.
    first_end = documents[0][1]
    tokens[:first_end] = (tokens[:first_end] + 1) % model.config.vocab_size
    changed = graph(*tensors(tokens, positions, padded(cu_seqlens, 20))).asnumpy()
    assert np.array_equal(changed[first_end:], packed[first_end:])
    assert not np.array_equal(changed[:first_end], packed[:first_end])


def test_decoding_with_a_cache_gives_the_logits_of_the_full_forward(model_and_graph):
    model, _, full = model_and_graph
    config = model.config
    batch, seq_len, cache_len = 3, 20, 24
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (batch, seq_len)).astype(np.int32)
    positions = np.tile(np.arange(seq_len, dtype=np.int32), batch)
    expected = full(*tensors(tokens.reshape(-1), positions, padded(np.arange(batch + 1) * seq_len, 20))).asnumpy()
    expected = expected.reshape(batch, seq_len, -1)

    shape = (batch, config.num_kv_heads, cache_len, config.head_dim)
    # What an earlier sequence left behind must not matter.
    caches = [ms.Parameter(Tensor(np.full(shape, 9.0, np.float32)), name=f"cache.{i}")
              for i in range(2 * config.num_layers)]
    keys, values = tuple(caches[:config.num_layers]), tuple(caches[config.num_layers:])

    @ms.jit
    def decode(tokens_B, positions_B):
        return model.decode(tokens_B, positions_B, keys, values)

    for step in range(seq_len + batch - 1):
        # Sequence b starts b steps late, so that the rows stand at different positions.
        place = np.clip(step - np.arange(batch), 0, seq_len - 1).astype(np.int32)
        logits = decode(*tensors(tokens[np.arange(batch), place], place)).asnumpy()
        assert relative_error(logits, expected[np.arange(batch), place]) < RTOL


@pytest.mark.parametrize("seed", range(4))
def test_number_of_parameters_is_that_of_size(seed, random_config):
    config = random_config(seed)
    assert sum(math.prod(weight.shape) for weight in Pangu(config).get_parameters()) == num_parameters(config)


def loss_over_all_targets(config, num_tokens):
    """Cross-entropy of a random model's logits, averaged over every possible target token."""
    model = Pangu(config, seed=1)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, num_tokens).astype(np.int32)
    hidden = model(*tensors(tokens, np.arange(num_tokens, dtype=np.int32), np.array([0, num_tokens])), num_tokens)
    logits = model.logits(hidden).asnumpy().astype(np.float64)
    return (np.log(np.exp(logits).sum(-1)) - logits.mean(-1)).mean()


def test_first_loss_of_a_random_model_is_that_of_normal_logits():
    config = ModelConfig(hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64, intermediate_size=512,
                         vocab_size=8192, max_seq_len=64, tie_embedding=False, init_std=0.05, eos_id=2)
    # Logits are normal with variance D s^2 = 0.64. The mean of V exponentials of them is off by a relative
    # sqrt((e^0.64 - 1) / V) = 0.0105 for one position; three times that.
    assert abs(loss_over_all_targets(config, 64) - (math.log(8192) + 256 * 0.05**2 / 2)) < 0.032


def test_first_loss_of_the_1b_shape_is_12_25():
    # The published initial loss; one layer suffices, because its output already outweighs the tied embedding.
    config = ModelConfig(hidden_size=1536, num_layers=1, num_heads=12, num_kv_heads=6, head_dim=128,
                         intermediate_size=6144, vocab_size=153376, max_seq_len=64)
    assert abs(loss_over_all_targets(config, 64) - 12.25) < 0.02
