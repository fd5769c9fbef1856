"""mindformers' own Qwen3, unchanged, on CPU: the first gradients are transformers', and training lowers the loss.

The program runs in a process of its own: importing mindformers takes 5 s and writes ./output/log.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

_SHAPE = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
          "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False}


def test_mindformers_qwen3_trains_on_cpu_with_transformers_gradients(pytestconfig, tmp_path):
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, __file__, pytestconfig.getoption("--cpu-level") or ""], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    # mindformers hands attention its operands in float16: 11 bits.
    assert abs(result["loss"] - result["transformers_loss"]) < 1e-3
    assert len(result["gradient_errors"]) == 19 and max(result["gradient_errors"].values()) < 4e-3, result
    losses = result["losses"]
    assert abs(losses[0] - result["loss"]) < 1e-5 and np.isfinite(losses).all()
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False)) and losses[-1] < 2


def _train(level):
    os.environ.update(GLOG_v="3", RUN_MODE="train")
    from mindpangu.ops.cpu import build

    build.load(build.build(level or None, say=lambda text: None), num_threads=2)
    import mindspore as ms
    import torch
    import transformers
    from mindformers import build_context
    from mindformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
    from mindformers.wrapper.wrapper import DataOrderWrapperCell, MFTrainOneStepCell
    from mindspore import Tensor, nn

    build_context({"use_legacy": False, "run_mode": "train", "context": {"mode": 0, "device_target": "CPU"},
                   "parallel": {}, "parallel_config": {}})
    float32 = {f"{part}_dtype": "float32" for part in
               ("compute", "params", "layernorm_compute", "softmax_compute", "rotary")}
    model = Qwen3ForCausalLM(Qwen3Config(**_SHAPE, **float32, seq_length=32, pad_token_id=0, hidden_dropout=0.0))
    model.set_train()
    random = np.random.default_rng(0)
    ids = random.integers(1, 256, (2, 32)).astype(np.int32)
    labels = np.roll(ids, -1, 1)

    peer = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_SHAPE)).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in peer.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(0.1 * noise if weight.ndim == 2 else 1 + 0.3 * noise)
    peer_logits = peer(input_ids=torch.tensor(ids, dtype=torch.long)).logits
    peer_loss = torch.nn.functional.cross_entropy(peer_logits.flatten(0, 1), torch.tensor(labels).long().flatten())
    peer_loss.backward()

    def converted(arrays):
        """Under mindformers' names and in its layouts, by its own conversion."""
        plain, joined = {}, {}
        for name, array in arrays.items():
            name = model.convert_name(name)
            parts = (".linear_q.", ".linear_k.", ".linear_v.", ".gating.", ".hidden.")
            (joined if any(part in name for part in parts) else plain)[name] = array
        return {name.removeprefix("model."): np.asarray(array) for name, array in
                (plain | model.convert_hf_weight(joined)).items()}

    weights = converted({name: weight.detach().numpy() for name, weight in peer.named_parameters()})
    gradients = converted({name: weight.grad.numpy() for name, weight in peer.named_parameters()})
    for name, parameter in model.parameters_and_names():
        parameter.set_data(Tensor(weights[name.removeprefix("model.")]))
    network = DataOrderWrapperCell(["input_ids", "labels"], model)
    parameters = model.trainable_params()

    def loss_of(ids, labels):
        return network(ids, labels)[0]

    loss, ours = ms.jit(ms.value_and_grad(loss_of, None, parameters))(Tensor(ids), Tensor(labels))
    errors = {}
    for parameter, gradient in zip(parameters, ours, strict=True):
        expected = gradients[parameter.name.removeprefix("model.")]
        errors[parameter.name] = float(np.abs(gradient.asnumpy() - expected).max() / np.abs(expected).max())
    step = MFTrainOneStepCell(network, nn.AdamWeightDecay(parameters, learning_rate=3e-3), use_clip_grad=True)
    step.set_train()
    losses = [float(step(Tensor(ids), Tensor(labels))[0].asnumpy()[0]) for _ in range(6)]
    print(json.dumps({"loss": float(loss.asnumpy()[0]), "transformers_loss": peer_loss.item(),
                      "gradient_errors": errors, "losses": losses}))


if __name__ == "__main__":
    _train(sys.argv[1])
