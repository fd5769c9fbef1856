"""Prints the peak resident memory, in bytes, of this process after two training steps: a program for test_memory.py.

    python peak_memory.py '{"hidden_size": 256, ...ModelConfig}' NUM_MICRO_BATCHES
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from mindpangu.config import ModelConfig, RunConfig, TrainConfig
from mindpangu.runtime.device import start
from mindpangu.runtime.metrics import peak_memory_gib


def main(sizes, num_micro_batches):
    config, run = ModelConfig(**json.loads(sizes)), RunConfig(num_threads=2)
    start(run)
    from mindspore import Tensor, int32

    from mindpangu.model.pangu import Pangu
    from mindpangu.runtime.distributed import Ranks
    from mindpangu.runtime.loop import Loop
    from mindpangu.trainers.language_model import make_loss

    model, num_tokens = Pangu(config), config.max_seq_len
    train = TrainConfig(steps=2, rows_per_step=num_micro_batches, micro_batch_rows=1, lr=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(make_loss(model, num_tokens, run.logits_chunk), (), model.trainable_params(), train=train, run=run,
                    num_steps=2, folder=Path(folder), save_model=None, ranks=Ranks())
        # One document a row, and every token a target.
        tokens = np.random.default_rng(0).integers(3, config.vocab_size, (num_micro_batches, num_tokens))
        places = np.tile(np.arange(num_tokens), (num_micro_batches, 1))
        arrays = (tokens.astype(np.int32), places.astype(np.int32),
                  np.tile(np.array([0, num_tokens]), (num_micro_batches, 1)), places.astype(np.int32),
                  tokens.astype(np.int32), np.ones(tokens.shape, np.float32))
        for step in range(2):
            outputs = loop.training_step(loop.optimizer.hyperparameters(step, 1e-3), Tensor(num_micro_batches, int32),
                                         *map(Tensor, arrays))
            assert np.isfinite(outputs[0].asnumpy())
    print(round(peak_memory_gib() * 2**30))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
