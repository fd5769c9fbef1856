"""Weights as mindformers' GPTModel has them, its parameter names and layouts, and folders of such weights both ways.

mindformers groups the rows of q, k and v by key/value head (the q heads that share it, then k, v) and takes gate and up
row by row in turn: its defaults, use_contiguous_weight_layout_attention=False and
use_interleaved_weight_layout_mlp=True. Nothing is computed, so every value keeps its bits. Source: mindformers 1.9.0,
parallel_core/training_graph/transformer/attention.py and mlp.py; its own converters know neither the bias of o nor,
with grouped heads, those of q, k and v.

N query heads, M key/value heads, H head size, F feed-forward.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .weights import (
    hugging_face_names,
    open_weights,
    plan_shards,
    read_config,
    read_headers,
    read_json,
    stored_bits,
    tensor_differences,
    write_json,
    write_safetensors,
    write_shards,
)

_NAMES = {  # parameter of Pangu: of GPTModel
    "embedding": "embedding.word_embeddings.weight",
    "input_norm": "input_layernorm.weight",
    "qkv_proj.weight": "self_attention.linear_qkv.weight",
    "qkv_proj.bias": "self_attention.linear_qkv.bias",
    "o_proj.weight": "self_attention.linear_proj.weight",
    "o_proj.bias": "self_attention.linear_proj.bias",
    "post_attention_norm": "pre_mlp_layernorm.weight",
    "gate_up_proj.weight": "mlp.linear_fc1.weight",
    "down_proj.weight": "mlp.linear_fc2.weight",
    "norm": "decoder.final_layernorm.weight",
    "lm_head": "output_layer.weight",
}
# mindformers takes a folder with model.safetensors for one in Hugging Face's names; these are the names of its own.
_FILE_NAME, _FILES = "model-{:07d}-{:07d}.safetensors", "*model-*.safetensors"
# What belongs to a model beside its weights.
_COMPANIONS = ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer*", "chat_template*",
               "*.py", "LICENSE*", "*NOTICE*")
_TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Layout(NamedTuple):
    """How a parameter of GPTModel is made of Hugging Face's tensors."""

    parts: list  # [(Hugging Face name, shape)], one below the other
    rows: np.ndarray | None  # row i is row rows[i] of the parts; None: they stay

    @property
    def shape(self):
        return sum(shape[0] for _, shape in self.parts), *self.parts[0][1][1:]

    def arrange(self, array):
        """The parameter, of the parts one below the other."""
        return array if self.rows is None else array[self.rows]

    def split(self, array):
        """The parts, of the parameter."""
        if self.rows is not None:
            joined = np.empty(array.shape, array.dtype)
            joined[self.rows] = array
            array = joined
        return np.split(array, np.cumsum([shape[0] for _, shape in self.parts])[:-1])


def mindformers_layouts(config):
    """{parameter of GPTModel: Layout} for a ModelConfig."""
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    ends = np.cumsum([q_size, kv_size, kv_size])
    by_group = [np.arange(end - size, end).reshape(config.num_kv_heads, -1)
                for end, size in zip(ends, (q_size, kv_size, kv_size), strict=True)]
    qkv_rows = np.concatenate(by_group, 1).reshape(-1)
    rows = {"qkv_proj.weight": qkv_rows, "qkv_proj.bias": qkv_rows,
            "gate_up_proj.weight": np.arange(2 * config.intermediate_size).reshape(2, -1).T.reshape(-1)}
    layouts = {}
    for path, parts in hugging_face_names(config).items():
        name, prefix = path, ""
        if path.startswith("layers."):
            _, layer, name = path.split(".", 2)
            prefix = f"decoder.layers.{layer}."
        layouts[prefix + _NAMES[name]] = Layout(parts, rows.get(name))
    return layouts


def convert_to_mindformers(source, folder, max_shard_gib=4.0):
    """Write the weights of a Hugging Face folder as mindformers' load_checkpoint reads them, with their config.json and
    tokenizer beside them.

    Every tensor keeps its bits and its type. One parameter is in memory at a time. Raises ValueError for weights that
    are not those of config.json, and if `folder` is there.
    """
    source, config = Path(source), read_config(source)
    stored = open_weights(config, source)
    layouts = mindformers_layouts(config)
    types, problems = {}, []
    for name, layout in layouts.items():
        found = {stored[part].dtype for part, _ in layout.parts}
        types[name] = min(found)
        if len(found) > 1:
            problems.append(f"{', '.join(part for part, _ in layout.parts)} have the types {sorted(found)}: expected "
                            f"one, they become {name}.")
    _raise(source, problems)
    folder = _make_folder(folder)
    tensors = [(name, layout.shape, types[name]) for name, layout in layouts.items()]
    arrays = (layout.arrange(_joined(stored, layout.parts)) for layout in layouts.values())
    shards = plan_shards(tensors, max_shard_gib)
    for i, shard in enumerate(shards):
        write_safetensors(folder / _FILE_NAME.format(i, len(shards)), shard, arrays)
    _copy_companions(source, folder)


def convert_to_hugging_face(source, folder, config_folder=None, max_shard_gib=4.0):
    """Write a Hugging Face folder of weights that convert_to_mindformers wrote, or mindformers itself in training.

    config_folder: where config.json and the tokenizer lie, if not in `source`. A checkpoint of several ranks has to be
    merged before. Raises ValueError for weights that are not those of config.json, and if `folder` is there.
    """
    source = Path(source)
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder: expected one with mindformers' {_FILES}.")
    if config_folder is None and not (source / "config.json").is_file():
        raise ValueError(f"{source} has no config.json: name the folder of the Hugging Face model that was trained "
                         "(--config).")
    config_folder = source if config_folder is None else Path(config_folder)
    layouts = mindformers_layouts(read_config(config_folder))
    files = sorted(source.glob(_FILES))
    if not files:
        raise ValueError(f"{source} has no {_FILES}: expected weights of mindformers (of a training, those of one "
                         "iteration's folder).")
    stored, problems = read_headers(files)
    if problems:
        problems.append("A checkpoint of several ranks has to be merged first: mindspore.unified_safetensors.")
    _raise(source, problems + tensor_differences(stored, {name: layout.shape for name, layout in layouts.items()}))
    folder = _make_folder(folder)
    tensors = [(part, shape, stored[name].dtype) for name, layout in layouts.items() for part, shape in layout.parts]
    arrays = (part for name, layout in layouts.items() for part in layout.split(stored_bits(stored[name])))
    write_shards(folder, tensors, arrays, max_shard_gib)
    _copy_companions(config_folder, folder)
    keys = read_json(folder / "config.json")
    types = {_TORCH_DTYPES[stored_as] for _, _, stored_as in tensors}
    if len(types) == 1:
        (dtype,) = types
        # A training may have changed it; transformers has two keys for it.
        changed = {key: dtype for key in ("torch_dtype", "dtype") if keys.get(key, dtype) != dtype}
        if changed:
            write_json(folder / "config.json", keys | changed)


def _joined(stored, parts):
    """A copy, or for a single part its memory map."""
    arrays = [stored_bits(stored[name]) for name, _ in parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _raise(folder, problems):
    if problems:
        raise ValueError("\n  ".join([f"{folder} does not hold the weights of its config.json:", *problems]))


def _make_folder(folder):
    folder = Path(folder)
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ValueError(f"{folder} is there already: choose another folder, or remove it.") from None
    return folder


def _copy_companions(source, folder):
    for file in sorted({file for pattern in _COMPANIONS for file in source.glob(pattern) if file.is_file()}):
        shutil.copyfile(file, folder / file.name)
