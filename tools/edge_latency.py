"""How long a model takes on an edge device, and what would help: python -m mindpangu.tools.edge_latency openpangu_1b

    python -m mindpangu.tools.edge_latency openpangu_1b num_layers=20 --device atlas_300i_duo
    python -m mindpangu.tools.edge_latency folder/with/config.json --devices my_devices.yaml --device my_board

Batch 1. TTFT: time to the first token. TPOT: time per output token. A bound is what no program can beat on a device:
its bytes at the peak bandwidth, or its FLOPs at the peak rate. An estimate adds what was measured elsewhere. Nothing
ran on a device here: the constants are fitted to the times in the openPangu Embedded-1B report, tables 1 and 9.
"""

import argparse
from typing import NamedTuple

from mindpangu.model.size import (
    flops_per_token,
    kv_bytes_per_token,
    load_config,
    num_multiplied_parameters,
    num_parameters,
)

from .devices import load_device

# TTFT of the seven published rows = FLOPs / (0.295 of the peak) + 3.2 ms a layer, within 20 %. A row that the fit has
# not seen is predicted within 45 %, in the median 12 %: hence a band, not a number.
PREFILL_EFFICIENCY = 0.295
PREFILL_MS_PER_LAYER = 3.2
TTFT_ERROR = 0.25
TPOT_ERROR = 0.10
# Operators that a decoded layer launches where nothing is fused; each is taken to cost the same share of
# Device.launch_ms_per_layer. How many the published graphs have is not known.
LAUNCHES = {"norms": 2, "projections with their biases": 4, "split and rotation of q, k": 3, "cache writes": 2,
            "attention: scores, mask, softmax, sum": 4, "swiglu": 2, "residual sums": 2}
_FUSED = {"cache writes": 0, "attention: scores, mask, softmax, sum": 1}  # by decode_attention of ascend_kernels


class Load(NamedTuple):
    """What one token costs, bytes and FLOPs, and what the whole prompt costs."""

    weight_bytes: float
    kv_bytes: float
    decode_flops: float
    prefill_flops: float


def measure(config, prompt_len, output_len, weight_bits=16, kv_bits=16):
    """Load of an answer of output_len tokens to prompt_len; a token's is that at the middle of the answer.

    The weights are read once for a token, a separate input embedding is not. Of the prompt only the last position's
    logits are computed. Scales of quantized values are not counted.
    """
    num_weights = num_multiplied_parameters(config)
    num_keys = prompt_len + output_len / 2
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * num_keys
    left_out = 2 * config.vocab_size * config.hidden_size * (prompt_len - 1)
    prefill_flops = prompt_len * flops_per_token(config, prompt_len, backward=False) - left_out
    return Load(num_weights * weight_bits / 8, kv_bytes_per_token(config, kv_bits / 8) * num_keys,
                2 * num_weights + attention, prefill_flops)


def tpot_bound_ms(load, device):
    return 1e3 * max((load.weight_bytes + load.kv_bytes) / (device.memory_gbs * 1e9),
                     load.decode_flops / (device.tflops * 1e12))


def tpot_ms(load, device, num_layers, launches=1.0):
    """Launch-aware estimate, within 10 % of the seven published rows. launches: share of the unfused ones."""
    return 1e3 * (load.weight_bytes + load.kv_bytes) / (device.memory_gbs * 1e9) + (
        device.launch_ms_per_layer * num_layers * launches)


def ttft_bound_ms(load, device):
    return 1e3 * max(load.weight_bytes / (device.memory_gbs * 1e9), load.prefill_flops / (device.tflops * 1e12))


def ttft_band_ms(load, device, num_layers):
    """Lowest and highest of the band around the estimate, never below the bound."""
    compute_ms = 1e3 * load.prefill_flops / (PREFILL_EFFICIENCY * device.tflops * 1e12)
    estimate = compute_ms + PREFILL_MS_PER_LAYER * num_layers
    bound = ttft_bound_ms(load, device)
    return max(bound, estimate * (1 - TTFT_ERROR)), max(bound, estimate * (1 + TTFT_ERROR))


def improvements(config, device, prompt_len, output_len):
    """[(what changes, TPOT in ms)], the present state first, then by what it saves."""
    num_launches = sum(LAUNCHES.values())
    fused = sum((LAUNCHES | _FUSED).values())

    def estimate(launches=num_launches, **bits):
        return tpot_ms(measure(config, prompt_len, output_len, **bits), device, config.num_layers,
                       launches / num_launches)

    changes = [
        ("weights in int8", estimate(weight_bits=8)),
        ("weights in int4", estimate(weight_bits=4)),
        ("key/value cache in int8", estimate(kv_bits=8)),
        (f"fused decode attention: {num_launches} -> {fused} launches a layer", estimate(fused)),
        ("half the launches", estimate(num_launches / 2)),
        ("no launch costs time", estimate(0)),
        ("weights and cache in int8, fused decode attention", estimate(fused, weight_bits=8, kv_bits=8)),
    ]
    return [("as it is: float16, nothing fused", estimate()), *sorted(changes, key=lambda change: change[1])]


def _print(title, config, device, prompt_len, output_len):
    # Imported here: the functions above serve other programs, which print no table.
    from rich.console import Console
    from rich.table import Table

    load = measure(config, prompt_len, output_len)
    console = Console()
    table = Table(title=title)
    for name, justify in (("quantity", "left"), ("prompt", "right"), ("a token", "right"), ("meaning", "left")):
        table.add_column(name, justify=justify)
    low, high = ttft_band_ms(load, device, config.num_layers)
    table.add_row("weights, MB", f"{load.weight_bytes / 1e6:,.1f}", f"{load.weight_bytes / 1e6:,.1f}",
                  "float16, each read once")
    table.add_row("keys and values, MB", "", f"{load.kv_bytes / 1e6:,.1f}",
                  f"float16, {prompt_len + output_len / 2:g} positions on average")
    table.add_row("GFLOPs", f"{load.prefill_flops / 1e9:,.1f}", f"{load.decode_flops / 1e9:,.2f}",
                  "logits of the last position only")
    table.add_row("bound, ms", f"{ttft_bound_ms(load, device):,.1f}", f"{tpot_bound_ms(load, device):,.1f}",
                  f"{device.memory_gbs:g} GB/s, {device.tflops:g} TFLOPS")
    if device.launch_ms_per_layer:
        table.add_row("estimate, ms", f"{low:,.0f} .. {high:,.0f}", f"{tpot_ms(load, device, config.num_layers):,.1f}",
                      f"TTFT +-{TTFT_ERROR:.0%}, TPOT +-{TPOT_ERROR:.0%}")
    console.print(table)
    console.print("TTFT is known to about 25 % only: no simple model of the seven published times does much better, "
                  "and one that the fit has not seen may be 45 % off. Bounds are at the peaks, which nothing reaches.",
                  highlight=False)
    needed = (2 * num_parameters(config) + kv_bytes_per_token(config) * (prompt_len + output_len)) / 2**30
    if needed > device.memory_gib:
        console.print(f"warning: weights and cache take {needed:.2f} GiB, the device has {device.memory_gib:g} GiB for "
                      "everything: it does not fit in float16.", highlight=False)
    if not device.launch_ms_per_layer:
        console.print("The device's launch_ms_per_layer is 0, unknown: no estimate, only bounds.", highlight=False)
        return
    table = Table(title="What would help: time per output token")
    for name, justify in (("change", "left"), ("TPOT, ms", "right"), ("times as fast", "right")):
        table.add_column(name, justify=justify)
    present, *changes = improvements(config, device, prompt_len, output_len)
    for change, time_ms in (present, *changes):
        table.add_row(change, f"{time_ms:.1f}", f"{present[1] / time_ms:.2f}")
    console.print(table)
    console.print(f"Launches: {device.launch_ms_per_layer:g} ms a layer, {sum(LAUNCHES.values())} operators, each "
                  "taken to cost the same. What quantized values cost to convert is not counted.", highlight=False)


def main():
    parser = argparse.ArgumentParser(prog="python -m mindpangu.tools.edge_latency", description=__doc__.split(":")[0])
    parser.add_argument("model", help="a name of recipes/model/, or a folder with config.json")
    parser.add_argument("overrides", nargs="*", help="field=value of the model, for example num_layers=20")
    parser.add_argument("--device", default="atlas_200i_a2", help="a name in the file of devices (%(default)s)")
    parser.add_argument("--devices", help="YAML file of devices (devices.yaml of this package)")
    parser.add_argument("--prompt-len", type=int, default=1024, help="tokens (%(default)s)")
    parser.add_argument("--output-len", type=int, default=256, help="tokens (%(default)s)")
    arguments = parser.parse_intermixed_args()
    try:
        config = load_config(arguments.model, arguments.overrides)
        device = load_device(arguments.device, arguments.devices)
        length = arguments.prompt_len + arguments.output_len
        if min(arguments.prompt_len, arguments.output_len) < 1 or length > config.max_seq_len:
            raise ValueError(f"--prompt-len {arguments.prompt_len} --output-len {arguments.output_len}: expected at "
                             f"least 1 each, together at most model.max_seq_len={config.max_seq_len}.")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    _print(f"{arguments.model} on {arguments.device}, {arguments.prompt_len} tokens in, {arguments.output_len} out",
           config, device, arguments.prompt_len, arguments.output_len)


if __name__ == "__main__":
    main()
