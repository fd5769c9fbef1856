"""The memory model against the trainer's measured peaks on a CPU, and against sums written out by hand."""

import functools
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from mindpangu.config import ModelConfig
from mindpangu.model.memory import activation_bytes_per_token, training_memory
from mindpangu.model.size import load_config

GIB = 2**30


def _config(num_layers, hidden_size, intermediate_size, vocab_size, num_tokens):
    return ModelConfig(num_layers=num_layers, hidden_size=hidden_size, intermediate_size=intermediate_size,
                       vocab_size=vocab_size, num_heads=max(2, hidden_size // 64), head_dim=min(64, hidden_size // 2),
                       num_kv_heads=max(1, hidden_size // 128), max_seq_len=num_tokens, eos_id=2)


def _peak(config, num_micro_batches=1):
    """Of a fresh process that takes two training steps, bytes."""
    program = Path(__file__).with_name("peak_memory.py")
    done = subprocess.run(["nice", sys.executable, program, json.dumps(asdict(config)), str(num_micro_batches)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


@functools.cache
def _baseline(num_layers, num_micro_batches):
    """Peak of a process that compiled and took the same steps with tensors of next to no size."""
    return _peak(_config(num_layers, 16, 32, 64, 64), num_micro_batches)


# Activations decide in the first, the vocabulary in the second, layers in the third, weights in the last; 310 to 1060
# MiB above the baseline.
@pytest.mark.long
@pytest.mark.parametrize("num_micro_batches", [1, 2, 4])
@pytest.mark.parametrize("sizes", [(2, 256, 1024, 4096, 4096), (2, 512, 2048, 16384, 2048), (4, 256, 1024, 4096, 2048),
                                   (4, 768, 3072, 8192, 256)])
def test_a_training_steps_peak_on_a_cpu_is_the_predicted_one_to_10_percent(sizes, num_micro_batches):
    config = _config(*sizes)
    measured = _peak(config, num_micro_batches) - _baseline(config.num_layers, num_micro_batches)
    predicted = training_memory(config, config.max_seq_len, device="CPU", num_micro_batches=num_micro_batches)
    assert predicted.total == pytest.approx(measured, rel=0.10)


# Exchanges among one rank stand for those of several. Recomputed first: freed memory stays with the process.
_SHARED_SEQUENCE = """
import sys
import numpy as np
from mindpangu.config import ModelConfig, RunConfig
from mindpangu.runtime.device import start
from mindpangu.runtime.metrics import peak_memory_gib

start(RunConfig(num_threads=2))
import mindspore as ms
from mindpangu.model.pangu import Pangu
from mindpangu.runtime.loop import make_gradient_step
from mindpangu.trainers.language_model import make_loss

class Alone(ms.nn.Cell):
    def construct(self, x):
        return x * 1.0

T = 2048
config = ModelConfig(num_layers=4, hidden_size=256, intermediate_size=1024, vocab_size=64, num_heads=4, head_dim=64,
                     num_kv_heads=2, max_seq_len=T, eos_id=2)
places = np.arange(T, dtype=np.int32)[None]
arrays = (places % 60 + 3, places, np.array([[0, T]]), places, places % 60 + 3, np.ones((1, T), np.float32))
for recompute in (True, False):
    model = Pangu(config)
    for layer in model.layers if recompute else ():
        layer.recompute()
    model.split_sequences(Alone(), Alone())
    step = ms.jit(make_gradient_step(make_loss(model, T, 1024), ms.ParameterTuple(model.trainable_params()), 1,
                                     accumulate=False))
    print(step(ms.Tensor(1, ms.int32), *map(ms.Tensor, arrays))[0].asnumpy(), peak_memory_gib() * 2**30)
"""


@pytest.mark.long
def test_layers_that_share_their_sequence_are_recomputed_too(tmp_path):
    (tmp_path / "steps.py").write_text(_SHARED_SEQUENCE)  # MindSpore reads the source
    done = subprocess.run([sys.executable, "steps.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (loss, low), (again, high) = (map(float, line.split()) for line in done.stdout.splitlines()[-2:])
    assert loss == again
    config = ModelConfig(num_layers=4, hidden_size=256, intermediate_size=1024, vocab_size=64, num_heads=4, head_dim=64,
                         num_kv_heads=2, max_seq_len=2048, eos_id=2)
    # Of four layers three are not kept; without it the second step would take what the first one left.
    assert high - low > 2 * 2048 * activation_bytes_per_token(config, 4)


def test_what_openpangu_1b_keeps_is_the_sum_worked_out_by_hand():
    config = load_config("openpangu_1b")
    # 4 x 1536 of the layer's width, 12 + 6 + 6 + 12 heads of 128, 3 x 6144 of the MLP; statistics of 2 norms, 12 heads.
    assert activation_bytes_per_token(config, 2) == 2 * (6144 + 4608 + 18432) + 4 * (2 + 16 * 12) == 59_144
    memory = training_memory(config, 32768)
    assert memory.weights == 6 * 1_155_912_192
    assert memory.optimizer == 8 * 1_155_912_192
    assert memory.activations == 26 * 32768 * 59_144 + 5 * 32768 * 1536 * 2
    assert memory.logits == 2048 * 153_376 * 4  # logits and their gradient in bfloat16
    assert sum(memory) == memory.total > 64 * GIB
    recomputed = training_memory(config, 32768, recompute=True)
    assert recomputed.activations == 26 * 32768 * 1536 * 2 + 32768 * 59_144 + 5 * 32768 * 1536 * 2
    assert recomputed.total < 32 * GIB


def test_each_way_to_share_takes_its_part_off():
    config = load_config("openpangu_1b")
    alone = training_memory(config, 32768, num_micro_batches=4)
    moments = training_memory(config, 32768, num_micro_batches=4, num_ranks=8)
    sums = training_memory(config, 32768, num_micro_batches=4, num_ranks=8, shard="gradients")
    assert moments.optimizer == 12 * 1_155_912_192 // 8  # a chunk of the weights beside its two moments
    assert training_memory(config, 32768, num_ranks=8, shard="none").optimizer == alone.optimizer
    assert alone.gradients - sums.gradients == 4 * 1_155_912_192 * 7 // 8 and moments.gradients == alone.gradients
    split = training_memory(config, 32768, sequence_parallel=2)
    assert split.activations == training_memory(config, 32768).activations // 2
    half = training_memory(config, 32768, moment_bytes=2)
    assert half.optimizer == alone.optimizer // 2


def test_a_divided_vocabulary_takes_what_was_worked_out_by_hand():
    config = load_config("openpangu_1b")
    whole = training_memory(config, 32768, sequence_parallel=2)
    divided = training_memory(config, 32768, sequence_parallel=2, vocab_parallel=True)
    share = 153_376 // 2 * 1536
    assert whole.weights - divided.weights == 2 * share  # of the projection's copy in bfloat16
    assert (whole.gradients, divided.gradients) == (10 * 2 * share, 10 * share)
    # A chunk of each rank, half of the vocabulary: as many logits. 4096 gathered hidden states in bfloat16, and their
    # gradient in bfloat16 and float32.
    assert divided.logits - whole.logits == 4096 * 1536 * 8
    assert divided.activations == whole.activations and divided.optimizer == whole.optimizer
    # With few logits at a time what follows is more: the share's gradient twice, and the whole with zeros in float32.
    few = training_memory(config, 32768, sequence_parallel=2, vocab_parallel=True, logits_chunk=1024)
    assert (few.gradients, few.logits) == (8 * share + 4 * 2 * share, 0)
    # Of 3 ranks the first has 51,126 tokens of the vocabulary.
    assert training_memory(config, 32768, sequence_parallel=3, vocab_parallel=True).gradients == 10 * 51_126 * 1536


def test_short_batches_peak_when_all_gradients_are_there():
    config = load_config("openpangu_1b")
    memory = training_memory(config, 256)
    assert memory.gradients == 4 * 1_155_912_192 + 8 * 235_585_536  # the tied embedding's second one, and the sum
    assert training_memory(load_config("openpangu_1b", ["tie_embedding=false"]), 256).gradients == 4 * 1_391_497_728
    # Buckets of all gradients, and three copies of the embedding's.
    shared = training_memory(config, 256, num_ranks=8)
    assert shared.gradients - memory.gradients == 4 * (1_155_912_192 + 3 * 235_585_536)


@pytest.mark.parametrize("options, complaint", [
    ({"shard": "weights"}, "optimizer"), ({"device": "GPU"}, "Ascend"),
    ({"vocab_parallel": True}, "sequence_parallel above 1"),
    ({"vocab_parallel": True, "sequence_parallel": 2, "device": "CPU"}, "on a CPU, .* not modelled"),
])
def test_unknown_choices_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        training_memory(load_config("openpangu_1b"), 1024, **options)
