"""The output projection with its loss on CPU against PyTorch: openPangu Embedded-1B's vocabulary, all gradients."""

import ctypes
from pathlib import Path

import numpy as np

from mindpangu.runtime.device import cpu_library, num_usable_cores

from .bench_rows import Row, alternate

_NUM_POSITIONS, _HIDDEN_SIZE, _VOCAB_SIZE, _TOP_K = 2048, 1536, 153_376, 10
_CE_FACTOR, _KL_FACTOR = 0.1, 0.9
_MEMORY_MB = 256  # what the loss may take beyond the weight's gradient
_CLIP_LOW, _CLIP_HIGH, _POLICY_KL_FACTOR = 0.8, 1.28, 0.001


def bench_head_loss():
    """Top-k KL and cross-entropy with the lm_head, forward + backward: time, memory, and the bare matrix products; and
    the policy loss."""
    inputs = _inputs()
    # bfloat16 first: MindSpore keeps memory that it had once, so that only the first call shows what it needs.
    return _compare(inputs, "bfloat16") + _compare(inputs, "float32") + _compare_policy()


def _compare_policy():
    """The policy loss, forward + backward, at full size and at that of scale=tiny."""
    from mindpangu.ops.head_loss import PolicyHead

    rows = []
    for precision, hidden_size, vocab_size, num_runs in (("bfloat16", _HIDDEN_SIZE, _VOCAB_SIZE, 3),
                                                         ("float32", 64, 768, 20)):
        inputs = _policy_inputs(hidden_size, vocab_size)
        library = cpu_library()
        library.pangu_set_bf16_products(precision == "bfloat16")
        try:
            ours = _our_loss(inputs, PolicyHead(_NUM_POSITIONS, _CLIP_LOW, _CLIP_HIGH, _POLICY_KL_FACTOR))
            peer = _peer_policy_loss(inputs, precision)
            ours(), peer()
            seconds = alternate(ours, peer, num_runs)
        finally:
            library.pangu_set_bf16_products(0)
        rows.append(Row(f"lm_head, policy loss, {_NUM_POSITIONS} x {hidden_size} x {vocab_size}, {precision}", "s",
                        seconds[0], "PyTorch", seconds[1]))
    return rows


def _compare(inputs, precision):
    from mindpangu.ops.head_loss import TopkKlHead

    size = f"{_NUM_POSITIONS} x {_HIDDEN_SIZE} x {_VOCAB_SIZE}"
    name, is_bf16 = f"lm_head, top-k KL, CE, {size}, {precision}", precision == "bfloat16"
    library = cpu_library()
    library.pangu_set_bf16_products(is_bf16)
    try:
        head = TopkKlHead(_NUM_POSITIONS, _CE_FACTOR, _KL_FACTOR)
        ours, products = _our_loss(inputs, head), _bare_products(inputs)
        our_mb = _peak_mb(ours) - inputs[1].nbytes / 1e6
        peer = _peer_loss(inputs, precision)
        peer_mb = _peak_mb(peer) - inputs[1].nbytes / (2e6 if is_bf16 else 1e6)
        against_products = alternate(ours, products, 3)
        seconds = alternate(ours, peer, 2)
    finally:
        library.pangu_set_bf16_products(0)
    rows = [
        Row(name, "s", seconds[0], "PyTorch", seconds[1], 3.0 if is_bf16 else None),
        Row(f"{name}: as bare products", "s", against_products[0], "our three products", against_products[1], 0.8),
    ]
    if is_bf16:
        rows += [
            Row(f"{name}: memory", "MB beyond the gradient", [our_mb], "limit", [_MEMORY_MB], 1.0),
            Row(f"{name}: memory", "MB beyond the gradient", [our_mb], "PyTorch", [peer_mb]),
        ]
    return rows


def _inputs():
    """hidden, weight, labels, weights, the teacher's ids and log-probabilities."""
    random = np.random.default_rng(0)
    hidden = random.standard_normal((_NUM_POSITIONS, _HIDDEN_SIZE), dtype=np.float32)
    weight = random.standard_normal((_VOCAB_SIZE, _HIDDEN_SIZE), dtype=np.float32)
    weight *= np.float32(0.03)
    part = _VOCAB_SIZE // _TOP_K  # one id of each: distinct
    ids = random.integers(0, part, (_NUM_POSITIONS, _TOP_K)) + np.arange(_TOP_K) * part
    teacher = np.sort(random.dirichlet(np.ones(_TOP_K), _NUM_POSITIONS), -1)[:, ::-1] * 0.9
    labels = random.integers(0, _VOCAB_SIZE, _NUM_POSITIONS)
    return (hidden, weight, labels.astype(np.int32), np.ones(_NUM_POSITIONS, np.float32), ids.astype(np.int32),
            np.log(teacher).astype(np.float32))


def _policy_inputs(hidden_size, vocab_size):
    """hidden, weight, labels, weights, denominators, advantages, and the labels' log-probabilities of two policies near
    this one."""
    random = np.random.default_rng(0)
    hidden = random.standard_normal((_NUM_POSITIONS, hidden_size), dtype=np.float32)
    weight = random.standard_normal((vocab_size, hidden_size), dtype=np.float32)
    weight *= np.float32(0.03)
    labels = random.integers(0, vocab_size, _NUM_POSITIONS).astype(np.int32)
    ones = np.ones(_NUM_POSITIONS, np.float32)
    logprobs = (hidden * weight[labels]).sum(-1) - np.log(vocab_size) - hidden_size * 0.03**2 / 2  # of normal logits
    others = [logprobs + random.normal(0, 0.1, _NUM_POSITIONS) for _ in range(2)]
    advantages = random.standard_normal(_NUM_POSITIONS)
    return hidden, weight, labels, ones, ones, *(array.astype(np.float32) for array in (advantages, *others))


def _our_loss(inputs, head):
    import mindspore as ms
    from mindspore import Tensor

    weight = ms.Parameter(Tensor.from_numpy(inputs[1]))

    def loss(hidden, *targets):
        return head(hidden, weight, *targets)

    value_and_grad = ms.value_and_grad(loss, 0, [weight], has_aux=True)

    def run(hidden, *targets):
        return value_and_grad(hidden, *targets)

    program = ms.jit(run)
    hidden, _, *targets = map(Tensor.from_numpy, inputs)

    def step():
        _, gradients = program(hidden, *targets)
        gradients[1][0][:1].asnumpy()  # waits

    return step


def _peer_loss(inputs, precision):
    import torch

    torch.set_num_threads(num_usable_cores())
    dtype = getattr(torch, precision)
    hidden, weight = (torch.from_numpy(array).to(dtype).requires_grad_() for array in inputs[:2])
    labels, ids = torch.from_numpy(inputs[2]).long()[:, None], torch.from_numpy(inputs[4]).long()
    weights, logprobs = torch.from_numpy(inputs[3]), torch.from_numpy(inputs[5])

    def run():
        logits = hidden @ weight.T
        lse = torch.logsumexp(logits, -1, keepdim=True).float()
        ce = lse - logits.gather(1, labels).float()
        tail = torch.logsumexp(logits.scatter(1, ids, -torch.inf), -1, keepdim=True).float() - lse
        q = torch.cat((logits.gather(1, ids).float() - lse, tail), 1)
        p = torch.cat((logprobs, torch.log1p(-logprobs.exp().sum(-1, keepdim=True))), 1)
        kl = (p.exp() * (p - q)).sum(-1)
        loss = (weights * (_CE_FACTOR * ce[:, 0] + _KL_FACTOR * kl)).sum()
        torch.autograd.grad(loss, (hidden, weight))

    return run


def _peer_policy_loss(inputs, precision):
    import torch

    torch.set_num_threads(num_usable_cores())
    dtype = getattr(torch, precision)
    hidden, weight = (torch.from_numpy(array).to(dtype).requires_grad_() for array in inputs[:2])
    labels = torch.from_numpy(inputs[2]).long()[:, None]
    weights, denominators, advantages, old, ref = map(torch.from_numpy, inputs[3:])

    def run():
        policy = torch.log_softmax(hidden @ weight.T, -1, dtype=torch.float32)
        logprobs = policy.gather(1, labels)[:, 0]
        with torch.no_grad():
            entropy = -(policy.exp() * policy).sum(-1)
        ratio = (logprobs - old).exp()
        surrogate = -torch.minimum(ratio * advantages, ratio.clamp(_CLIP_LOW, _CLIP_HIGH) * advantages)
        kl = (ref - logprobs).exp() - (ref - logprobs) - 1
        loss = (weights * (surrogate + _POLICY_KL_FACTOR * kl)).sum()
        torch.autograd.grad(loss, (hidden, weight))
        (denominators * entropy).sum()

    return run


def _bare_products(inputs):
    """The three products of the same sizes by the library's own functions, 512 positions at a time."""
    hidden, weight = inputs[:2]
    chunk = 512
    logits = np.ones((chunk, _VOCAB_SIZE), np.float32)
    d_hidden, d_weight = np.ones((chunk, _HIDDEN_SIZE), np.float32), np.ones_like(weight)

    def run():
        for begin in range(0, _NUM_POSITIONS, chunk):
            part = hidden[begin:begin + chunk]
            _call("Linear", part, weight, logits)
            _call("LinearGrad", logits, part, weight, d_hidden, d_weight)

    return run


def _call(name, *arrays):
    """A function of the CPU library on float32 matrices."""
    count = len(arrays)
    shapes = [(ctypes.c_int64 * 2)(*array.shape) for array in arrays]
    failed = cpu_library()[name](
        count, (ctypes.c_void_p * count)(*(array.ctypes.data for array in arrays)),
        (ctypes.c_int * count)(*[2] * count),
        (ctypes.POINTER(ctypes.c_int64) * count)(*(ctypes.cast(s, ctypes.POINTER(ctypes.c_int64)) for s in shapes)),
        (ctypes.c_char_p * count)(*[b"float32"] * count), None, None)
    assert not failed


def _peak_mb(function):
    """By how much a call raises the process's memory at its peak; the kernel counts anew after clear_refs."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _memory_mb("VmRSS")
    function()
    return _memory_mb("VmHWM") - before


def _memory_mb(name):
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e6
