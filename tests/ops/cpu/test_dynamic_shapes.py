"""One compiled graph for any number of tokens: the same losses, gradients and answers as with static shapes."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mindpangu.config import ModelConfig
from mindpangu.model.pangu import Pangu
from mindpangu.ops import kernels
from mindpangu.ops.head_loss import CrossEntropyHead

CONFIG = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
                     vocab_size=64)


@pytest.fixture
def native(cpu_library, mindspore_cpu):
    kernels.select("native", [], "CPU", cpu_library.path)
    yield
    kernels.select("reference", [], "CPU", cpu_library.path)


class Loss(nn.Cell):
    def __init__(self, model):
        super().__init__()
        self.model, self.head = model, CrossEntropyHead(64)

    def construct(self, tokens_T, positions_T, cu_seqlens_C, labels_T, weights_T):
        # With native kernels the row length is not used: documents follow from the cumulative lengths alone.
        hidden = self.model(tokens_T, positions_T, cu_seqlens_C, 1)
        return self.head(hidden, self.model.head_weight(), labels_T, weights_T)[0]


class LossAndGradients(nn.Cell):
    def __init__(self, model):
        super().__init__()
        self.value_and_grad = ms.value_and_grad(Loss(model), None, model.trainable_params())

    def construct(self, tokens_T, positions_T, cu_seqlens_C, labels_T, weights_T):
        return self.value_and_grad(tokens_T, positions_T, cu_seqlens_C, labels_T, weights_T)


def inputs(num_tokens, ends):
    random = np.random.default_rng(num_tokens)
    lengths = np.diff([0, *ends])
    positions = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    tokens, labels = random.integers(0, 64, (2, num_tokens)).astype(np.int32)
    arrays = tokens, positions, np.array([0, *ends]), labels, np.ones(num_tokens, np.float32)
    return [Tensor(array) for array in arrays]


def test_one_graph_trains_on_any_number_of_tokens_and_documents(native):
    model = Pangu(CONFIG, seed=1)
    dynamic = LossAndGradients(model)
    dynamic.set_inputs(*(Tensor(shape=[None], dtype=dtype)
                         for dtype in (ms.int32, ms.int32, ms.int64, ms.int32, ms.float32)))
    for ends in ([7], [3, 4, 20], [16, 33]):
        tensors = inputs(ends[-1], ends)
        loss, gradients = dynamic(*tensors)
        expected_loss, expected_gradients = LossAndGradients(model)(*tensors)
        assert loss.asnumpy() == expected_loss.asnumpy()
        for gradient, expected in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_array_equal(gradient.asnumpy(), expected.asnumpy())
