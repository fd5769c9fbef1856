"""Weights and configuration in Hugging Face's names: read such a folder, write one that transformers opens.

Imports MindSpore only where a model is touched, so that `mindpangu.model.size` starts at once.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open

from ..config import ModelConfig

_SINGLE_FILE, _INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# How each stored type is read; NumPy has no bfloat16, its bits are the upper half of a float32.
_STORED_AS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# Some exports hold these tables, which follow from rope_theta.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_BLOCK = 1 << 22  # values rounded to bfloat16 at a time: keeps temporaries at some 50 MB

_COUNT = ("an integer of at least 1", lambda value: type(value) is int and value >= 1)
_TOKEN = ("a token id", lambda value: type(value) is int and value >= 0)
_POSITIVE = ("a number above 0", lambda value: type(value) in (int, float) and value > 0)
_BOOL = ("true or false", lambda value: type(value) is bool)
_FIELDS = {  # key of config.json: field of ModelConfig, what it has to be
    "hidden_size": ("hidden_size", _COUNT),
    "num_hidden_layers": ("num_layers", _COUNT),
    "num_attention_heads": ("num_heads", _COUNT),
    "num_key_value_heads": ("num_kv_heads", _COUNT),
    "head_dim": ("head_dim", _COUNT),
    "intermediate_size": ("intermediate_size", _COUNT),
    "vocab_size": ("vocab_size", _COUNT),
    "max_position_embeddings": ("max_seq_len", _COUNT),
    "rope_theta": ("rope_theta", _POSITIVE),
    "rms_norm_eps": ("rms_norm_eps", _POSITIVE),
    "tie_word_embeddings": ("tie_embedding", _BOOL),
    "initializer_range": ("init_std", _POSITIVE),
    "bos_token_id": ("bos_id", _TOKEN),
    "pad_token_id": ("pad_id", _TOKEN),
    "eos_token_id": ("eos_id", _TOKEN),
}
# Fields that change what given weights compute; the others may differ between a model and the folder it loads.
_BINDING = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "rope_theta", "rms_norm_eps", "tie_embedding")


class Stored(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


def read_config(folder):
    """ModelConfig of a folder's config.json, in openPangu's keys or those of transformers' LlamaConfig.

    Absent or null, head_dim is hidden_size / num_attention_heads, pad_token_id 0 and initializer_range 0.02.
    Raises ValueError that lists every key whose value this architecture cannot take.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} does not exist: expected a folder with config.json and {_SINGLE_FILE}.")
    keys = read_json(file)
    problems = []

    def expect(key, condition, expected):
        if not condition:
            came = f"{key}={json.dumps(keys[key])}" if key in keys else f"{key} is missing"
            problems.append(f"{came}: expected {expected}.")
        return condition

    if "model_type" in keys:  # other families use the same tensor names with other arithmetic
        expect("model_type", keys["model_type"] in ("PanguEmbedded", "llama"), '"PanguEmbedded" or "llama"')
    expect("hidden_act", keys.get("hidden_act") == "silu", '"silu"')
    bias = "attention_bias" if "attention_bias" in keys else "bias"
    expect(bias, keys.get(bias) is True, "true: q, k, v and o have biases")
    if bias != "bias" and "bias" in keys:
        expect("bias", keys["bias"] is True, "true: q, k, v and o have biases")
    expect("mlp_bias", keys.get("mlp_bias", False) is False, "false: the MLP has no biases")
    expect("rope_scaling", keys.get("rope_scaling") is None, "null: plain rotary embedding")

    optional = {"pad_token_id": 0, "initializer_range": 0.02}
    hidden_size, num_heads = keys.get("hidden_size"), keys.get("num_attention_heads")
    if type(hidden_size) is int and type(num_heads) is int and num_heads > 0 and hidden_size % num_heads == 0:
        optional["head_dim"] = hidden_size // num_heads
    values = {}
    for key, (field, (expected, is_right)) in _FIELDS.items():
        value = keys.get(key)
        if value is None:
            value = optional.get(key)
        if expect(key, is_right(value), expected):
            values[field] = float(value) if field in ("rope_theta", "rms_norm_eps", "init_std") else value
    if problems:
        raise ValueError("\n  ".join([f"{file} describes a model that this code does not compute:", *problems]))
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def config_json(config, dtype="bfloat16"):
    """The content of config.json for a ModelConfig; dtype is that of the stored weights.

    head_dim, attention_bias and mlp_bias are there for transformers: LlamaForCausalLM.from_pretrained(folder) then
    needs no further arguments (it warns about the model_type, and nothing else).
    """
    return {
        "architectures": ["PanguEmbeddedForCausalLM"],
        "model_type": "PanguEmbedded",
        "hidden_act": "silu",
        "bias": True,
        "attention_bias": True,
        "mlp_bias": False,
        **{key: getattr(config, field) for key, (field, _) in _FIELDS.items()},
        "torch_dtype": dtype,
    }


def hugging_face_names(config):
    """{path of a parameter in Pangu: [(Hugging Face name, shape), ...]}: the parts that are concatenated on axis 0."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    names = {"embedding": [("model.embed_tokens.weight", (config.vocab_size, hidden))]}
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        qkv = [("q", q_size), ("k", kv_size), ("v", kv_size)]
        names |= {
            f"{ours}.input_norm": [(f"{theirs}.input_layernorm.weight", (hidden,))],
            f"{ours}.qkv_proj.weight": [(f"{theirs}.self_attn.{x}_proj.weight", (size, hidden)) for x, size in qkv],
            f"{ours}.qkv_proj.bias": [(f"{theirs}.self_attn.{x}_proj.bias", (size,)) for x, size in qkv],
            f"{ours}.o_proj.weight": [(f"{theirs}.self_attn.o_proj.weight", (hidden, q_size))],
            f"{ours}.o_proj.bias": [(f"{theirs}.self_attn.o_proj.bias", (hidden,))],
            f"{ours}.post_attention_norm": [(f"{theirs}.post_attention_layernorm.weight", (hidden,))],
            f"{ours}.gate_up_proj.weight": [(f"{theirs}.mlp.{x}_proj.weight", (ffn, hidden)) for x in ("gate", "up")],
            f"{ours}.down_proj.weight": [(f"{theirs}.mlp.down_proj.weight", (hidden, ffn))],
        }
    names["norm"] = [("model.norm.weight", (hidden,))]
    if not config.tie_embedding:
        names["lm_head"] = [("lm_head.weight", (config.vocab_size, hidden))]
    return names


def open_weights(config, folder):
    """{Hugging Face name: Stored} of a folder's weights (float32, float16 or bfloat16; one file or shards): headers
    only are read.

    A tied folder may hold lm_head.weight too, if it equals the embedding. Raises one ValueError that lists everything
    that is missing, unknown, wrongly shaped or at odds with the ModelConfig.
    """
    folder = Path(folder)
    problems = _config_differences(config, folder)
    stored, unreadable = _find_tensors(folder)
    problems += unreadable
    expected = {name: shape for parts in hugging_face_names(config).values() for name, shape in parts}
    if config.tie_embedding and "lm_head.weight" in stored:
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    problems += tensor_differences({name: tensor for name, tensor in stored.items() if not _IGNORED.fullmatch(name)},
                                   expected)
    if not problems and config.tie_embedding and "lm_head.weight" in stored and not _are_equal(
            stored["lm_head.weight"], stored["model.embed_tokens.weight"]):
        problems.append("lm_head.weight differs from model.embed_tokens.weight: expected the same values, or "
                        '"tie_word_embeddings": false in config.json and model.tie_embedding=false.')
    if problems:
        raise ValueError("\n  ".join([f"{folder} does not hold the weights of this model:", *problems]))
    return stored


def tensor_differences(stored, expected):
    """What is missing, unknown, wrongly shaped or of a type that is not read: a line each.

    stored: {name: Stored}; expected: {name: shape}.
    """
    problems = [f"{name} is missing: expected shape {list(shape)}." for name, shape in expected.items()
                if name not in stored]
    for name, tensor in sorted(stored.items()):
        if name not in expected:
            problems.append(f"{name} with shape {list(tensor.shape)} is unknown: expected no such tensor.")
        elif tensor.shape != expected[name]:
            problems.append(f"{name} has shape {list(tensor.shape)}: expected {list(expected[name])}.")
        elif tensor.dtype not in _STORED_AS:
            problems.append(f"{name} has dtype {tensor.dtype}: expected one of {list(_STORED_AS)}.")
    return problems


def read_parts(stored, parts, dtype):
    """The tensors of `parts`, [(name, shape)], one below the other, as float32 or MindSpore's NumPy bfloat16."""
    array = np.empty((sum(shape[0] for _, shape in parts), *parts[0][1][1:]), dtype)
    read, row = _read_tensor if dtype == np.float32 else _read_rounded, 0
    for name, shape in parts:
        read(stored[name], array[row:row + shape[0]])
        row += shape[0]
    return array


def load_weights(model, folder):
    """Assign the weights in a Hugging Face folder to a Pangu.

    Raises ValueError as open_weights does; the model is then as it was.
    """
    import mindspore as ms
    from mindspore import Tensor, ops
    from mindspore.common.np_dtype import bfloat16

    stored = open_weights(model.config, folder)
    names = hugging_face_names(model.config)
    for path, parameter in model.parameters_and_names():
        is_float32 = parameter.dtype == ms.float32
        array = read_parts(stored, names[path], np.float32 if is_float32 else bfloat16)
        if is_float32:
            # In place: Parameter.set_data swaps the buffer, and a graph that is compiled keeps the former one.
            ops.assign(parameter, Tensor.from_numpy(array))
        else:  # MindSpore's CPU backend assigns no bfloat16; no second copy is made
            parameter.set_data(Tensor.from_numpy(array))


def load_model(folder, dtype="float32", frozen_dtype=None):
    """A Pangu with a folder's configuration and weights.

    dtype: of its activations; frozen_dtype: of its matrices, see Pangu. Both are keys of pangu.DTYPES.
    """
    from .pangu import DTYPES, Pangu

    model = Pangu(read_config(folder), dtype=DTYPES[dtype], zero_weights=True, frozen_dtype=DTYPES.get(frozen_dtype))
    load_weights(model, folder)
    return model


def save_weights(model, folder, dtype="float32", max_shard_gib=4.0):
    """Write config.json and the weights as float32 or bfloat16 (rounded to nearest, ties to even), each file fsynced.

    One model.safetensors, or shards of at most max_shard_gib (a larger tensor has a shard of its own) and their index.
    transformers opens the folder with LlamaForCausalLM.from_pretrained(folder). Raises ValueError if the folder holds
    weights already; an interrupted call leaves files behind.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: expected float32 or bfloat16.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(file.name for file in folder.glob("model*.safetensors*"))
    if present:
        raise ValueError(f"{folder} holds weights already ({', '.join(present)}): choose another folder or empty it.")
    parameters = dict(model.parameters_and_names())
    named = hugging_face_names(model.config)
    stored_as = "F32" if dtype == "float32" else "BF16"

    def arrays():
        for path, parts in named.items():
            row = 0
            for _, shape in parts:
                yield np.asarray(parameters[path].asnumpy()[row:row + shape[0]], "<f4")
                row += shape[0]

    write_shards(folder, [(name, shape, stored_as) for parts in named.values() for name, shape in parts], arrays(),
                 max_shard_gib)
    write_json(folder / "config.json", config_json(model.config, dtype))


def write_shards(folder, tensors, arrays, max_shard_gib=4.0):
    """Write one model.safetensors, or shards of at most max_shard_gib and their index, each file fsynced.

    tensors: [(name, shape, type as safetensors names it)]; arrays: one for each, in their order, float32 or the bits
    of that type. One array is in memory at a time.
    """
    shards = plan_shards(tensors, max_shard_gib)
    weight_map = {}
    for i, shard in enumerate(shards):
        file_name = _SINGLE_FILE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {name: file_name for name, _, _ in shard}
        write_safetensors(folder / file_name, shard, arrays)
    if len(shards) > 1:
        total_size = sum(num_bytes(tensor) for tensor in tensors)
        write_json(folder / _INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def plan_shards(tensors, max_shard_gib):
    """[tensors of a file, ...], in their order; a tensor above max_shard_gib has a file of its own."""
    shards, shard_bytes = [[]], 0
    for tensor in tensors:
        if shards[-1] and shard_bytes + num_bytes(tensor) > max_shard_gib * 2**30:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(tensor)
        shard_bytes += num_bytes(tensor)
    return shards


def num_bytes(tensor):
    """Of a (name, shape, type)."""
    return math.prod(tensor[1]) * np.dtype(_STORED_AS[tensor[2]]).itemsize


def _config_differences(config, folder):
    if not (folder / "config.json").is_file():
        return []
    stored = read_config(folder)
    return [f"model.{field}={getattr(config, field)}, but config.json says {getattr(stored, field)}: choose the other "
            "model, or edit the file if this change is meant."
            for field in _BINDING if getattr(config, field) != getattr(stored, field)]


def _find_tensors(folder):
    """({name: Stored} of all weight files, problems). Reads headers only."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: expected one with config.json and {_SINGLE_FILE}.")
    index_file, weight_map = folder / _INDEX_FILE, {}
    if (folder / _SINGLE_FILE).is_file():
        files = [folder / _SINGLE_FILE]
    elif index_file.is_file():
        weight_map = read_json(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index_file} has no weight_map from tensors to files: download or copy it again.")
        files = [folder / Path(name).name for name in sorted(set(weight_map.values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise ValueError(f"{folder} lacks {', '.join(absent)}, named in {_INDEX_FILE}: "
                             "download or copy them again.")
    else:
        raise ValueError(f"{folder} has neither {_SINGLE_FILE} nor {_INDEX_FILE}: expected safetensors weights "
                         "(convert pytorch_model.bin with transformers' save_pretrained).")
    return read_headers(files)


def read_headers(files):
    """({name: Stored} of safetensors files, problems: a line for every tensor that is there twice)."""
    stored, problems = {}, []
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in stored:
                problems.append(f"{name} is both in {stored[name].file.name} and in {file.name}: expected it once.")
            stored[name] = tensor
    return stored, problems


def _read_header(file):
    """{name: Stored} of a safetensors file, whose header and length are checked."""
    try:
        with safe_open(file, "numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or no safetensors file ({error}): download or copy it again.") from None
    with open(file, "rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_size))
    header.pop("__metadata__", None)
    return {name: Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + header_size + entry["data_offsets"][0])
            for name, entry in header.items()}


def stored_bits(tensor):
    """A Stored as a memory-mapped array: float32, float16, or the bits of bfloat16 as uint16."""
    return np.memmap(tensor.file, _STORED_AS[tensor.dtype], "r", tensor.offset, tensor.shape)


def _read_tensor(tensor, out):
    """Decode a stored tensor into the float32 array `out` of the same shape."""
    if tensor.dtype == "BF16":
        bits = out.view(np.uint32)
        bits[...] = stored_bits(tensor)
        bits <<= 16  # two passes: a shift that converts too takes several times as long
    else:
        out[...] = stored_bits(tensor)


def _read_rounded(tensor, out):
    """Decode a stored tensor into the bfloat16 array `out` of the same shape."""
    bits, stored = out.view(np.uint16), stored_bits(tensor)
    if tensor.dtype == "BF16":
        bits[...] = stored
        return
    rows_per_block = max(1, _BLOCK // math.prod(out.shape[1:]))
    for row in range(0, out.shape[0], rows_per_block):
        rows = stored[row:row + rows_per_block].astype(np.float32)
        bits[row:row + rows_per_block] = _bfloat16_bits(rows)


def _are_equal(a, b):
    """Whether two stored tensors of one shape decode to the same values, compared in blocks of rows."""
    rows_per_block = max(1, _BLOCK // math.prod(a.shape[1:]))
    for row in range(0, a.shape[0], rows_per_block):
        decoded = []
        for tensor in (a, b):
            rows = stored_bits(tensor)[row:row + rows_per_block]
            decoded.append((rows.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16"
                           else rows.astype(np.float32))
        if not np.array_equal(*decoded):
            return False
    return True


def _bfloat16_bits(x):
    """uint16 bits of float32 values rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = x.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def write_safetensors(file, tensors, arrays):
    """Write [(name, shape, type)] and as many of `arrays`, one at a time: a file never has a copy in memory.

    Float32 values for a bfloat16 tensor are rounded to nearest, ties to even; other arrays have the type's bits.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses a file without the format
    for name, shape, stored_as in tensors:
        end = offset + num_bytes((name, shape, stored_as))
        header[name] = {"dtype": stored_as, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8 bytes
    with open(file, "xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (_, _, stored_as), array in zip(tensors, arrays, strict=False):
            flat = np.ascontiguousarray(array).reshape(-1)
            if stored_as == "BF16" and flat.dtype == np.float32:
                stream.writelines(_bfloat16_bits(flat[start:start + _BLOCK]) for start in range(0, flat.size, _BLOCK))
            else:
                assert flat.dtype == _STORED_AS[stored_as]
                stream.write(flat.data)
        stream.flush()
        os.fsync(stream.fileno())


def read_json(file):
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): download or copy it again.") from None
    if type(value) is not dict:
        raise ValueError(f"{file} holds {type(value).__name__}: expected a JSON object.")
    return value


def write_json(file, value):
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(json.dumps(value, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def parameters_digest(model):
    """xxh3_128, hexadecimal, of a model's weights in their order: the same weights, the same digest."""
    digest = xxhash.xxh3_128()
    for parameter in model.get_parameters():
        digest.update(parameter.name.encode())
        digest.update(np.ascontiguousarray(parameter.asnumpy()).view(np.uint8))
    return digest.hexdigest()
