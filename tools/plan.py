"""What a training run needs: python -m mindpangu.tools.plan model=openpangu_1b devices=64 seq_len=32768

    python -m mindpangu.tools.plan stage=sft_reasoning devices=64 sequence_parallel=2    a stage of the papers
    python -m mindpangu.tools.plan stage=all devices=64                                  every stage, a line each
    python -m mindpangu.tools.plan model=openpangu_7b model.num_layers=20 recompute=true budget_tokens=1e9

Memory of a device, tokens of a step, time of a step, days of a token budget, and warnings. The memory is a model,
checked on a CPU (mindpangu.model.memory); the time rests on an assumption, mfu, the share of the peak that the products
reach, recomputed ones included. Nothing was measured on an NPU. Arguments are name=value:
"""

import math
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from mindpangu.model.memory import SHARDS, training_memory
from mindpangu.model.size import flops_per_token, load_config, num_parameters

from .devices import load_device

GIB = 2**30


@dataclass
class Plan:
    """A run to plan. tokens are counted over all devices."""

    model: str = "openpangu_1b"  # a name of recipes/model/, or a folder with config.json; model.<field>=... changes it
    stage: str = ""  # of the papers, see STAGES, or all; gives the three values below, which can be set all the same
    seq_len: int = 4096  # tokens of a row
    batch_tokens: int = 4194304  # of an optimizer step
    budget_tokens: float = 0.0  # of the run; 0: not known
    document_len: int = 0  # tokens of a packed document, for attention's FLOPs; 0: seq_len
    device: str = "ascend_910b3"  # a name in the file of devices. Which 910B an Atlas 800T A2 has is not documented
    file: str = ""  # YAML file of devices; empty: devices.yaml of this package
    devices: int = 8
    micro_batch_rows: int = 1  # rows of one forward and backward pass
    sequence_parallel: int = 1  # devices that share the tokens of a row
    vocab_parallel: bool = False  # in distillation these devices divide the vocabulary in the loss, too
    shard: str = "optimizer"  # none | optimizer | gradients
    recompute: bool = False  # keep only each layer's input
    moments_dtype: str = "float32"  # float32 | bfloat16
    logits_chunk: int = 2048  # positions whose logits exist at a time
    mfu: float = 0.4  # share of the peak that is reached: an assumption, set what you measure
    reserve: float = 0.1  # share of the memory left to CANN, HCCL's buffers and fragmentation: an assumption


class Stage(NamedTuple):
    seq_len: int
    batch_tokens: int
    budget_tokens: float  # 0: not in the papers
    note: str


# openPangu Embedded-1B report (P1) and Post-Training via KD (P2).
STAGES = {
    "pretrain_general_4k": Stage(4096, 2**24, 4e12, "P1 2.2, 4.1.1"),
    "pretrain_general_8k": Stage(8192, 2**24, 4e12, "P1 2.2, 4.1.1"),
    "pretrain_reasoning_8k": Stage(8192, 2**24, 1.5e12, "P1 2.2, 4.1.1"),
    "pretrain_annealing_32k": Stage(32768, 2**24, 0.9e12, "P1 2.2, 4.1.1"),
    "sft_reasoning": Stage(32768, 2**22, 0, "P1 4.1.2; 10 epochs of data whose size is not in the paper"),
    "sft_fast": Stage(32768, 2**21, 0, "P1 4.1.2; the same"),
    "kd_student": Stage(32768, 2**21, 0, "the batch, that of sft_fast, is not in the papers; without the teacher"),
    # 7000 problems x 8 answers x 6 epochs; 256 problems a batch. The length is an assumption.
    "grpo": Stage(32768, 256 * 8 * 4096, 7000 * 8 * 6 * 4096.0,
                  "P1 4.1.2; answers of 4096 tokens are an assumption; sampling is not counted"),
}


class Result(NamedTuple):
    """Of a Plan; times of a step, that of the rank with the most rows, in seconds."""

    memory: object  # TrainingMemory of a device
    budget_bytes: float  # that it may take
    rows_per_step: int
    data_ranks: int
    micro_batches: int  # of a rank
    micro_batch_rows: int
    compute_s: float
    exchange_s: float  # sums of gradients, chunks of weights, sequence parallelism's all-to-all; not overlapped
    update_s: float
    warnings: list

    @property
    def step_s(self):
        return self.compute_s + self.exchange_s + self.update_s


def parse(arguments):
    """Plan and overrides of the model from name=value strings. Raises ValueError for an unknown name or value."""
    overrides = [argument[len("model."):] for argument in arguments if argument.startswith("model.")]
    own = [argument for argument in arguments if not argument.startswith("model.")]
    names = [field.name for field in fields(Plan)]
    given = []
    for argument in own:
        name, equals, _ = argument.partition("=")
        if not equals or name not in names:
            raise ValueError(f"{argument!r}: expected name=value with a name of {', '.join(names)}, or "
                             "model.<field>=value.")
        given.append(name)
    try:
        plan = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Plan), OmegaConf.from_dotlist(own)))
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    if plan.stage and plan.stage != "all":
        if plan.stage not in STAGES:
            raise ValueError(f"stage={plan.stage}: expected one of {', '.join(STAGES)}, or all.")
        plan = _at_stage(plan, plan.stage, given)
    _check(plan)
    return plan, overrides, given


def _at_stage(plan, stage, given):
    values = {name: getattr(STAGES[stage], name) for name in ("seq_len", "batch_tokens", "budget_tokens")
              if name not in given}
    return replace(plan, stage=stage, **values)


def _check(plan):
    for name in ("seq_len", "batch_tokens", "devices", "micro_batch_rows", "sequence_parallel", "logits_chunk"):
        if getattr(plan, name) < 1:
            raise ValueError(f"{name}={getattr(plan, name)}: expected at least 1.")
    for name in ("budget_tokens", "document_len"):
        if getattr(plan, name) < 0:
            raise ValueError(f"{name}={getattr(plan, name)}: expected at least 0.")
    if plan.document_len > plan.seq_len:
        raise ValueError(f"document_len={plan.document_len} exceeds seq_len={plan.seq_len}: a document lies in a row.")
    if not 0 < plan.mfu <= 1:
        raise ValueError(f"mfu={plan.mfu}: expected above 0, at most 1.")
    if not 0 <= plan.reserve < 1:
        raise ValueError(f"reserve={plan.reserve}: expected from 0, below 1.")
    for name, choices in (("shard", SHARDS), ("moments_dtype", ("float32", "bfloat16"))):
        if getattr(plan, name) not in choices:
            raise ValueError(f"{name}={getattr(plan, name)}: expected one of {', '.join(choices)}.")


class Division(NamedTuple):
    """How the rows of a step are divided, as the trainer does it."""

    rows: int  # of a step
    data_ranks: int  # with rows of their own
    share: int  # rows of the rank that has most
    micro_rows: int  # of a micro-batch: the largest number up to micro_batch_rows that divides the share
    micro_batches: int


def _divide(plan):
    data_ranks = max(1, plan.devices // plan.sequence_parallel)
    rows = max(1, round(plan.batch_tokens / plan.seq_len))
    share = math.ceil(rows / data_ranks)
    micro_rows = next(n for n in range(min(plan.micro_batch_rows, share), 0, -1) if share % n == 0)
    return Division(rows, data_ranks, share, micro_rows, share // micro_rows)


def evaluate(plan, config, device):
    """Result of a Plan for a ModelConfig on a Device."""
    rows, data_ranks, share, micro_rows, micro_batches = _divide(plan)
    warnings = _warnings(plan, config, rows, data_ranks)
    memory = _memory(plan, config)
    budget = device.memory_gib * GIB * (1 - plan.reserve)
    if memory.total > budget:
        warnings.append(f"does not fit: {memory.total / GIB:.1f} GiB of {budget / GIB:.1f} (reserve={plan.reserve:g}). "
                        + _what_fits(plan, config, budget))
    document_len = plan.document_len or plan.seq_len
    flops = flops_per_token(config, document_len)
    if plan.recompute:  # the layers' forward pass once more
        flops += flops_per_token(config, document_len, backward=False) - 2 * config.vocab_size * config.hidden_size
    tokens = share * plan.seq_len / plan.sequence_parallel  # of that rank
    compute = tokens * flops / (device.tflops * 1e12 * plan.mfu)
    # Read: weights, moments, gradients; written: weights, moments. On each rank its share.
    moments = 2 if plan.moments_dtype == "bfloat16" else 4
    update = num_parameters(config) * (12 + 4 * moments) / (plan.devices if plan.shard != "none" else 1)
    return Result(memory, budget, rows, data_ranks, micro_batches, micro_rows, compute,
                  _exchange_s(plan, config, device), update / (device.memory_gbs * 1e9), warnings)


def _divides_vocabulary(plan):
    """Whether the loss is divided: distillation's alone is; a plan without a stage is taken for one."""
    return plan.vocab_parallel and plan.sequence_parallel > 1 and plan.stage in ("", "kd_student")


def _memory(plan, config):
    division = _divide(plan)
    return training_memory(
        config, division.micro_rows * plan.seq_len, num_micro_batches=division.micro_batches, num_ranks=plan.devices,
        shard=plan.shard, sequence_parallel=plan.sequence_parallel, vocab_parallel=_divides_vocabulary(plan),
        recompute=plan.recompute,
        moment_bytes=2 if plan.moments_dtype == "bfloat16" else 4, logits_chunk=plan.logits_chunk)


def _warnings(plan, config, rows, data_ranks):
    warnings = []
    if plan.seq_len > config.max_seq_len:
        warnings.append(f"seq_len={plan.seq_len} exceeds model.max_seq_len={config.max_seq_len}: the trainer refuses "
                        "it.")
    if rows * plan.seq_len != plan.batch_tokens:
        warnings.append(f"batch_tokens={plan.batch_tokens:,} is not a multiple of seq_len={plan.seq_len}: {rows} rows, "
                        f"{rows * plan.seq_len:,} tokens, are planned.")
    if config.num_heads % plan.sequence_parallel or config.num_kv_heads % plan.sequence_parallel:
        warnings.append(f"sequence_parallel={plan.sequence_parallel} does not divide {config.num_heads} query and "
                        f"{config.num_kv_heads} key/value heads: the trainer refuses it; possible are "
                        f"{', '.join(map(str, _sequence_parallels(config)))}.")
    if plan.devices % plan.sequence_parallel:
        warnings.append(f"devices={plan.devices} is not a multiple of sequence_parallel={plan.sequence_parallel}: "
                        "the trainer refuses it.")
    if plan.vocab_parallel and plan.sequence_parallel == 1:
        warnings.append("vocab_parallel=true with sequence_parallel=1: the trainer refuses it.")
    elif plan.vocab_parallel and not _divides_vocabulary(plan):
        warnings.append(f"vocab_parallel=true changes nothing in {plan.stage}: distillation's loss alone is divided.")
    if rows % data_ranks:
        waits = "some devices have nothing to do" if rows < data_ranks else "some devices wait for others"
        warnings.append(f"the {rows} rows of a step can't be divided among {data_ranks} ranks: the trainer refuses it, "
                        f"and {waits}; use {math.gcd(rows, data_ranks) * plan.sequence_parallel} devices, another "
                        "batch_tokens or another sequence_parallel.")
    if plan.moments_dtype == "bfloat16":
        warnings.append("moments_dtype=bfloat16 rounds the second moment to 8 bits: compare losses first; the trainer "
                        "refuses it with beta2 above 0.99, and GRPO's is 0.999.")
    return warnings


def _sequence_parallels(config):
    return [n for n in range(1, config.num_kv_heads + 1) if config.num_kv_heads % n == config.num_heads % n == 0]


def _what_fits(plan, config, budget):
    """A sentence: the first changes, in the order of what they cost, with which it fits."""
    split = next((n for n in _sequence_parallels(config) if n > plan.sequence_parallel and plan.devices % n == 0),
                 plan.sequence_parallel)
    together = {}
    for change in ({"shard": "optimizer"}, {"shard": "gradients"}, {"micro_batch_rows": 1},
                   {"sequence_parallel": split}, {"recompute": True}):
        together |= change
        for attempt in (change, together):
            total = _memory(replace(plan, **attempt), config).total
            if total <= budget:
                said = " ".join(f"{name}={str(value).lower()}" for name, value in attempt.items()
                                if getattr(plan, name) != value)
                return f"It would with {said}: {total / GIB:.1f} GiB."
    return "No choice of shard, micro_batch_rows, sequence_parallel and recompute makes it fit."


def _exchange_s(plan, config, device):
    """Time on the links in a step, one after the other and at their peak; 0 where a link is not known."""
    division = _divide(plan)

    def ring(num_bytes, num_ranks, rate):
        return num_bytes * (num_ranks - 1) / num_ranks / (rate * 1e9) if num_ranks > 1 and rate else 0.0

    inside = min(plan.devices, device.devices_per_server)
    servers = math.ceil(plan.devices / inside)
    # Sums are scattered inside a server, then a device's share over servers; sums or weights come back likewise.
    one_way = ring(4 * num_parameters(config), inside, device.server_gbs)
    one_way += ring(4 * num_parameters(config) / inside, servers, device.network_gbs)
    num_ways = 1 + (division.micro_batches if plan.shard == "gradients" else 1)
    # q, k, v and what attention gives, in bfloat16: forward, backward, and once more if recomputed.
    tokens = division.micro_rows * plan.seq_len / plan.sequence_parallel
    values = tokens * (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim * config.num_layers
    passes = (3 if plan.recompute else 2) * division.micro_batches
    shared = passes * ring(2 * values, plan.sequence_parallel, device.server_gbs)
    if _divides_vocabulary(plan):  # hidden states gathered in bfloat16, their gradients summed in float32
        hidden_bytes = (2 + 4) * division.micro_rows * plan.seq_len * config.hidden_size
        shared += division.micro_batches * ring(hidden_bytes, plan.sequence_parallel, device.server_gbs)
    return num_ways * one_way + shared


def _duration(seconds):
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms"
    if seconds < 2 * 3600:
        return f"{seconds:,.1f} s"
    return f"{seconds / 3600:,.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:,.1f} days"


def _print(plan, config, device):
    result = evaluate(plan, config, device)
    memory, tokens = result.memory, result.rows_per_step * plan.seq_len
    of_each = f" of each of {plan.sequence_parallel} devices" * _divides_vocabulary(plan)
    table = Table(title=f"{plan.model} on {plan.devices} x {plan.device}" + (f", {plan.stage}" if plan.stage else ""))
    table.add_column("quantity")
    table.add_column("value", justify="right")
    table.add_column("meaning")
    for name, value, meaning in (
        ("tokens of a step", f"{tokens:,}", f"{result.rows_per_step:,} rows of {plan.seq_len:,}: {result.data_ranks} "
         f"ranks x {result.micro_batches} micro-batches x {result.micro_batch_rows}"),
        ("memory of a device", f"{memory.total / GIB:.1f} GiB",
         f"of {result.budget_bytes / GIB:.1f}: {device.memory_gib:g} less {plan.reserve:.0%}"),
        ("  weights", f"{memory.weights / GIB:.2f} GiB", "float32, and a bfloat16 copy for the products"),
        ("  optimizer", f"{memory.optimizer / GIB:.2f} GiB", f"two {plan.moments_dtype} moments, shard={plan.shard}"),
        ("  gradients", f"{memory.gradients / GIB:.2f} GiB", "float32, those alive at the peak"),
        ("  activations", f"{memory.activations / GIB:.2f} GiB",
         "bfloat16, each layer's input and one layer's" if plan.recompute else "bfloat16, of all layers"),
        ("  temporaries", f"{memory.temporaries / GIB:.2f} GiB", "of the layer at work"),
        ("  logits", f"{memory.logits / GIB:.2f} GiB",
         f"of {plan.logits_chunk} positions{of_each}, and their gradient"),
        ("time of a step", _duration(result.step_s), f"{tokens / result.step_s:,.0f} tokens/s"),
        ("  products", _duration(result.compute_s), f"mfu={plan.mfu:g} of {device.tflops:g} TFLOPS: an assumption"),
        ("  exchange", _duration(result.exchange_s), "at the links' peak, not overlapped"),
        ("  update", _duration(result.update_s), "at the memory's peak"),
        ("a billion tokens", _duration(1e9 / tokens * result.step_s), ""),
    ):
        table.add_row(name, value, meaning)
    if plan.budget_tokens:
        table.add_row("the budget", _duration(plan.budget_tokens / tokens * result.step_s),
                      f"{plan.budget_tokens:.3g} tokens, {math.ceil(plan.budget_tokens / tokens):,} steps")
    console = Console()
    console.print(table)
    lines = [f"{plan.stage}: {STAGES[plan.stage].note}."] if plan.stage else []
    for line in (*lines, *(f"warning: {warning}" for warning in result.warnings)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_stages(plan, config, device, given):
    table = Table(title=f"{plan.model} on {plan.devices} x {plan.device}, mfu={plan.mfu:g} assumed")
    for name in ("stage", "tokens of a row", "of a step", "of the stage", "GiB of a device", "a step", "the stage"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    lines = []
    for name, (_, _, _, note) in STAGES.items():
        stage = _at_stage(plan, name, given)
        result = evaluate(stage, config, device)
        tokens = result.rows_per_step * stage.seq_len
        table.add_row(name, f"{stage.seq_len:,}", f"{tokens:,}",
                      f"{stage.budget_tokens:.3g}" if stage.budget_tokens else "?",
                      f"{result.memory.total / GIB:.1f}{'' if result.memory.total <= result.budget_bytes else ' !'}",
                      _duration(result.step_s),
                      _duration(stage.budget_tokens / tokens * result.step_s) if stage.budget_tokens else "?")
        lines += [f"{name}: {note}.", *(f"warning: {name}: {warning}" for warning in result.warnings)]
    console = Console()
    console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_help():
    print(__doc__)
    source = Path(__file__).read_text(encoding="utf-8")
    described = source[source.index("class Plan:"):source.index("class Stage(")]
    print("\n".join(line[4:] for line in described.splitlines() if re.match(r"    \w+: \w+ = ", line)))
    print(f"\nstages: {', '.join(STAGES)}, all")


def main(arguments):
    if {"-h", "--help"} & set(arguments):
        _print_help()
        return
    try:
        plan, overrides, given = parse(arguments)
        config, device = load_config(plan.model, overrides), load_device(plan.device, plan.file or None)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if plan.stage == "all":
        _print_stages(plan, config, device, given)
    else:
        _print(plan, config, device)


if __name__ == "__main__":
    main(sys.argv[1:])
