"""openPangu Embedded-1B at full size, all 26 layers, on random weights: 20 GiB of memory and of disk.

Each part runs in a process of its own, so that its peak of memory is its own.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

NUM_TOKENS = 1024
NUM_ROUNDED = 64  # of them by transformers in bfloat16, which CPUs without such instructions multiply very slowly
VOCAB_SIZE, EOS_ID = 153_376, 45_892
PROMPT_LEN, ANSWER_LEN = 60, 4
PEAK_GIB = 20

TRAIN = ["recipe=sft_direct", "scale=1b", "init_from=weights", "run.dir=run", "data.train=[chats.jsonl]",
         "data.num_heldout=1", "data.seq_len=256", "train.epochs=0", "train.steps=1", "train.rows_per_step=1",
         "train.lr=1e-4", "train.warmup_steps=0", "train.moments_dtype=bfloat16", "run.recompute=true",
         "run.precision=bfloat16", "rollout.max_prompt_len=96", "rollout.max_new_tokens=4"]


def run(folder, *arguments):
    """The output of a Python program."""
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With weights/, a Hugging Face folder that transformers wrote, its tokenizer, its logits, and chats.jsonl."""
    folder = tmp_path_factory.mktemp("full_size")
    run(folder, __file__, "write")
    run(folder, __file__, "transformers")
    run(folder, "-m", "mindpangu.data.arithmetic", "chats.jsonl", "--num-problems", "50")
    yield folder
    shutil.rmtree(folder)


def rms(difference):
    return np.sqrt(np.square(difference).mean())


@pytest.mark.long
def test_openpangu_1b_computes_what_transformers_does(folder):
    run(folder, __file__, "ours")
    exact, rounded, ours = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("exact", "rounded", "ours"))
    assert exact.shape == ours.shape == (NUM_TOKENS, VOCAB_SIZE)
    # What transformers loses in bfloat16, of logits that have a standard deviation of 0.79.
    error = rms(rounded - exact[:NUM_ROUNDED])
    assert error < 0.02
    for first in range(0, NUM_TOKENS, NUM_ROUNDED):
        part = slice(first, first + NUM_ROUNDED)
        assert rms(ours[part] - exact[part]) < error, first
    for logits, wanted in zip(np.load(folder / "answered.npy"), exact[PROMPT_LEN - 1:], strict=False):
        assert rms(logits - wanted) < error


@pytest.mark.long
def test_openpangu_1b_is_exported_to_graphs_that_compute_what_transformers_does(folder):
    run(folder, "-m", "mindpangu.export", "recipe=export_mindir", "from=weights", "run.dir=edge", "export.buckets=[64]",
        "export.cache_len=80")
    run(folder, __file__, "exported")
    exact = np.load(folder / "exact.npy", mmap_mode="r")
    for logits, wanted in zip(np.load(folder / "exported.npy"), exact[PROMPT_LEN - 1:], strict=False):
        assert rms(logits - wanted) < 0.005  # float16 has three bits more than bfloat16


@pytest.mark.long
def test_openpangu_1b_trains_a_step_within_20_gib_is_saved_and_answers(folder):
    said = run(folder, "-m", "mindpangu.train", *TRAIN)
    done = json.loads((folder / "run" / "done.json").read_text())
    assert done["peak_memory_gib"] < PEAK_GIB, said
    assert done["after"]["loss"] < done["before"]["loss"] - 0.01
    assert len(list((folder / "run" / "checkpoints" / "step-000001").glob("*.safetensors"))) == 3
    answer = run(folder, "-m", "mindpangu.chat", "run", "How many?", "--precision", "bfloat16", "--max-new-tokens", "8")
    assert len(answer.split("How many?")[1]) >= 8  # whatever its tokens are


# ---- The programs ----------------------------------------------------------------------------------------------------

def write():
    """A transformers model of our configuration with random weights in bfloat16, and a tokenizer."""
    import torch
    import transformers

    from mindpangu.model.size import load_config
    from mindpangu.model.weights import config_json

    config = load_config("openpangu_1b")
    keys = config_json(config) | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**keys)).bfloat16()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # norms are ones and biases zeros
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained("weights", max_shard_size="1GB")
    _write_tokenizer(Path("weights/tokenizer.model"), config.vocab_size, config.eos_id)


def _write_tokenizer(path, vocab_size, eos_id):
    """A SentencePiece model trained on a little text and filled up with pieces that no text has."""
    from transformers.convert_slow_tokenizer import import_protobuf

    from mindpangu.data.arithmetic import make_problems
    from mindpangu.data.tokenizer import train_tokenizer

    texts = [problem.question for problem in make_problems(500, 0)]
    train_tokenizer([*texts, "user assistant system How many?"], 768, path)
    proto = import_protobuf().ModelProto.FromString(path.read_bytes())
    pieces = list(proto.pieces)
    turn_end = pieces.pop([piece.piece for piece in pieces].index("[unused10]"))
    pieces += [type(turn_end)(piece=f"⟨{i}⟩", score=-1e6) for i in range(vocab_size - 1 - len(pieces))]
    pieces.insert(eos_id, turn_end)
    del proto.pieces[:]
    proto.pieces.extend(pieces)
    path.write_bytes(proto.SerializeToString())


def _tokens():
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, NUM_TOKENS).astype(np.int32)


def by_transformers():
    """exact.npy: logits in float32; rounded.npy: those of the first tokens in bfloat16."""
    import torch
    import transformers

    tokens = torch.tensor(_tokens(), dtype=torch.long)[None]
    for dtype, count, name in ((torch.float32, NUM_TOKENS, "exact"), (torch.bfloat16, NUM_ROUNDED, "rounded")):
        model = transformers.LlamaForCausalLM.from_pretrained("weights", dtype=dtype)
        with torch.inference_mode():
            np.save(name, model(tokens[:, :count]).logits[0].float().numpy())


def by_us():
    """ours.npy: logits in bfloat16; answered.npy: those of a prompt and of the tokens after it, one at a time."""
    from mindpangu.config import RunConfig
    from mindpangu.runtime.device import activation_dtype, start

    settings = RunConfig(precision="bfloat16")
    start(settings)
    import mindspore as ms
    from mindspore import Tensor

    from mindpangu.model.runner import ModelRunner
    from mindpangu.model.weights import load_model

    model = load_model("weights", activation_dtype(settings), frozen_dtype="bfloat16")

    def logits(tokens_T, positions_T, cu_seqlens_C):
        return model.logits(model(tokens_T, positions_T, cu_seqlens_C, NUM_TOKENS))

    inputs = _tokens(), np.arange(NUM_TOKENS, dtype=np.int32), np.array([0, NUM_TOKENS], np.int64)
    np.save("ours", ms.jit(logits)(*map(Tensor, inputs)).asnumpy())
    _answer(ModelRunner(model, 80), "answered")


def by_graphs():
    """exported.npy: as answered.npy, by the exported graphs."""
    from mindpangu.config import RunConfig
    from mindpangu.runtime.device import start

    start(RunConfig())
    from mindpangu.model.runner import GraphRunner

    _answer(GraphRunner("edge"), "exported")


def _answer(runner, name):
    tokens = _tokens()
    logits = [runner.prefill(tokens[:PROMPT_LEN])]
    np.save(name, logits + [runner.decode(token) for token in tokens[PROMPT_LEN:PROMPT_LEN + ANSWER_LEN]])


if __name__ == "__main__":
    {"write": write, "transformers": by_transformers, "ours": by_us, "exported": by_graphs}[sys.argv[1]]()
