"""Shared fixtures: MindSpore on CPU, random models, transformers as the oracle, a run of the whole recipe."""

import builtins
import contextlib
import fcntl
import os
import re
import runpy
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mindpangu.config import ModelConfig

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the oracles': workers share the cores, and waiting threads spin


def pytest_addoption(parser):
    parser.addoption("--cpu-level", help="instruction set of the CPU library: portable, avx2, ... (default: the best)")
    parser.addoption("--cpu-sanitize", action="store_true", help="the CPU library with ASan and UBSan")


@pytest.fixture(scope="session")
def cpu_library(pytestconfig):
    """The CPU library, serving this process's MindSpore; as a ctypes DLL. Ops run on their reference until `kernel`."""
    from mindpangu.ops.cpu import build

    sanitize = build.SANITIZE if pytestconfig.getoption("--cpu-sanitize") else ()
    path = build.build(pytestconfig.getoption("--cpu-level"), sanitize)
    library = build.load(path, num_threads=2)
    library.path = path
    return library


@pytest.fixture(params=["native", "reference"])
def kernel(request, cpu_library, mindspore_cpu):
    """Runs a test once on the native kernels and once on the references."""
    from mindpangu.ops import kernels

    kernels.select(request.param, [], "CPU", cpu_library.path)
    yield request.param
    kernels.select("reference", [], "CPU", cpu_library.path)


@pytest.fixture
def mindspore_cpu(cpu_library, tmp_path, monkeypatch):
    import mindspore as ms

    monkeypatch.chdir(tmp_path)  # on a compile error MindSpore writes rank_0/ into the working directory
    ms.set_device("CPU")
    return ms


@pytest.fixture(scope="session")
def random_config():
    """seed -> a small ModelConfig; seeds 0 to 5 go through 1, 2, 4 query heads per key/value head, tied and untied."""

    def build(seed):
        random = np.random.default_rng(seed)
        num_kv_heads = int(random.integers(1, 4))
        num_heads = num_kv_heads * (1, 2, 4)[seed % 3]
        head_dim = 2 * int(random.integers(3, 9))
        hidden_size = int(random.integers(24, 72))
        if hidden_size == num_heads * head_dim:  # the projection must not be square by chance
            hidden_size += 1
        return ModelConfig(
            hidden_size=hidden_size, num_layers=int(random.integers(1, 4)), num_heads=num_heads,
            num_kv_heads=num_kv_heads, head_dim=head_dim, intermediate_size=int(random.integers(20, 90)),
            vocab_size=int(random.integers(60, 120)), max_seq_len=64, rope_theta=float(random.choice([1e2, 1e4, 4e6])),
            rms_norm_eps=1e-5, tie_embedding=seed % 2 == 0, init_std=0.02, bos_id=1, pad_id=0, eos_id=2)

    return build


@pytest.fixture(scope="session")
def random_llama():
    """(ModelConfig, seed) -> transformers' LlamaForCausalLM in float32; no bias is zero and no norm is one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(config, seed):
        # No pad_token_id: torch gives that row of the embedding no gradient.
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=config.hidden_size, num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim, vocab_size=config.vocab_size,
            intermediate_size=config.intermediate_size, max_position_embeddings=config.max_seq_len,
            rope_theta=config.rope_theta, rms_norm_eps=config.rms_norm_eps, tie_word_embeddings=config.tie_embedding,
            attention_bias=True, mlp_bias=False, hidden_act="silu")).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=generator)
                if weight.ndim == 2:
                    weight.copy_(noise / weight.shape[1] ** 0.5)
                else:
                    weight.copy_(0.3 * noise + (0 if name.endswith("bias") else 1))
        return model

    return build


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """trained_once(name, *overrides) -> (folder in which that was trained, what it printed): by the first of pytest's
    workers that asks for it. Tests copy what they change."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def train(name, *overrides):
        folder = base / f"trained-{name}"
        with open(base / f"trained-{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            output = folder / "output.txt"
            if not output.exists():
                folder.mkdir()
                done = subprocess.run([sys.executable, "-m", "mindpangu.train", "scale=smoke", *overrides], cwd=folder,
                                      capture_output=True, text=True)
                assert done.returncode == 0, done.stdout + done.stderr
                output.write_text(done.stdout + done.stderr)
        return folder, output.read_text()

    return train


@pytest.fixture(scope="session")
def smoke(trained_once):
    """A folder in which the default recipe ran at scale=smoke, and what it printed."""
    return trained_once("smoke")


@pytest.fixture(scope="session")
def memorised_run(trained_once):
    """Run folder of a small model that knows its 20 problems, thoughts included, by heart."""
    folder, _ = trained_once(
        "memorised", "recipe=sft_reasoning", "init_from=null", "data.num_examples=20", "data.num_heldout=1",
        "train.steps=300", "train.rows_per_step=4", "train.micro_batch_rows=4", "run.save_every=1000", "run.dir=run")
    return folder / "run"


@pytest.fixture(scope="session")
def running_judge():
    """The context manager of rewards/judge_server.py: a judge in a process of its own, behind HTTP."""
    return runpy.run_path(str(Path(__file__).parent / "rewards" / "judge_server.py"))["running_judge"]


@pytest.fixture(scope="session")
def judge_process(running_judge):
    with running_judge() as judge:
        yield judge


@pytest.fixture
def judge_server(judge_process):
    """A judge in its first state: no faults, an empty log."""
    judge_process.set()
    return judge_process


@pytest.fixture(scope="session")
def serving():
    """The context manager serving(folder, *options) -> url of a mindpangu.serve process."""

    @contextlib.contextmanager
    def start(folder, *options):
        command = [sys.executable, "-m", "mindpangu.serve", str(folder), "--port", "0", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            try:
                lines = iter(process.stdout.readline, "")
                yield next(match[1] for line in lines if (match := re.search(r"serving .* at (http://\S+/v1)", line)))
            finally:
                process.kill()

    return start


@pytest.fixture
def without_pyarrow(monkeypatch):
    """As where it is not installed."""
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)


@pytest.fixture
def as_ranks():
    """as_ranks(size, function) -> [function(world) of every rank]: ranks as threads, which meet as processes would."""
    from mindpangu.runtime.cluster import World

    def run(size, function):
        barrier, values = threading.Barrier(size, timeout=30), {}

        class Rank(World):
            def gather(self, what, value=None):
                values[self.rank] = what, value
                barrier.wait()
                everyone = [values[rank] for rank in range(size)]
                barrier.wait()
                assert {other for other, _ in everyone} == {what}
                return [value for _, value in everyone]

        def work(rank):
            try:
                return function(Rank(rank, size))
            except Exception:
                time.sleep(3)  # whoever has met this one goes on; abort would break that meeting too
                barrier.abort()
                raise

        with ThreadPoolExecutor(size) as threads:
            return list(threads.map(work, range(size)))

    return run
