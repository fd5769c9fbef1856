"""Parameters, memory and arithmetic of a model, without MindSpore.

python -m mindpangu.model.size openpangu_1b
python -m mindpangu.model.size openpangu_1b hidden_size=1024 num_layers=12 --seq-len 4096
python -m mindpangu.model.size folder/with/config.json
"""

import argparse
import math
from dataclasses import fields
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config import ModelConfig, recipes_folder
from .weights import hugging_face_names, read_config


def num_parameters(config):
    """All weights, biases and norms; a tied embedding counts once."""
    return sum(math.prod(shape) for parts in hugging_face_names(config).values() for _, shape in parts)


def num_embedding_parameters(config):
    """Those of the input embedding and, if it is not tied to it, of the output projection."""
    return config.vocab_size * config.hidden_size * (1 if config.tie_embedding else 2)


def kv_bytes_per_token(config, bytes_per_value=2):
    """Cache of keys and values over all layers; 2 bytes per value is float16."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * bytes_per_value


def flops_per_token(config, seq_len, backward=True):
    """Floating-point operations per token of a document of seq_len tokens, averaged over its positions.

    Forward 2 N + 2 L A (seq_len + 1), where N counts the parameters except a separate input embedding (which is looked
    up, not multiplied), L the layers and A = num_heads * head_dim: a position sees (seq_len + 1) / 2 keys on average,
    with a multiplication and an addition each in q k^T and in weights v. The backward pass costs twice the forward:
    with it 6 N + 6 L A (seq_len + 1). Nothing is counted for recomputation and for the masked half of the scores.
    """
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * (seq_len + 1)
    forward = 2 * num_multiplied_parameters(config) + attention
    return 3 * forward if backward else forward


def num_multiplied_parameters(config):
    """All but a separate input embedding, which is looked up."""
    return num_parameters(config) - (0 if config.tie_embedding else config.vocab_size * config.hidden_size)


def load_config(model, overrides=()):
    """ModelConfig of a recipes/model/ name or of a folder with config.json, with overrides such as "num_layers=2".

    Raises ValueError for an unknown name, field or value.
    """
    if Path(model).is_dir():
        config = OmegaConf.structured(read_config(model))
    else:
        folder = recipes_folder() / "model"
        names = sorted(file.stem for file in folder.glob("*.yaml"))
        if model not in names:
            raise ValueError(f"model {model!r}: expected a folder with config.json or one of {names}.")
        config = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(folder / f"{model}.yaml"))
    known = [field.name for field in fields(ModelConfig)]
    for override in overrides:
        name, equals, _ = override.partition("=")
        if not equals or name not in known:
            raise ValueError(f"override {override!r}: expected field=value with a field of {known}.")
    try:
        return OmegaConf.to_object(OmegaConf.merge(config, OmegaConf.from_dotlist(list(overrides))))
    except OmegaConfBaseException as error:
        raise ValueError(f"model.{error.full_key}: {str(error).splitlines()[0]}") from None


def print_size(title, config, seq_len):
    # Imported here: the functions above serve training, which prints no table.
    from rich.console import Console
    from rich.table import Table

    total, embedding = num_parameters(config), num_embedding_parameters(config)
    table = Table(title=title)
    table.add_column("quantity")
    table.add_column("value", justify="right")
    table.add_column("meaning")
    for quantity, value, meaning in (
        ("parameters", total, ""),
        ("  embedding", embedding, "tied: input = output" if config.tie_embedding else "input and output"),
        ("  other", total - embedding, f"{config.num_layers} layers, final norm"),
        ("bytes in bfloat16", 2 * total, f"{2 * total / 2**30:.2f} GiB"),
        ("bytes in float32", 4 * total, f"{4 * total / 2**30:.2f} GiB"),
        ("KV cache per token", kv_bytes_per_token(config), "bytes in float16"),
        ("FLOPs per token, forward", flops_per_token(config, seq_len, backward=False), "2 N + 2 L A (T + 1)"),
        ("FLOPs per token, training", flops_per_token(config, seq_len), "6 N + 6 L A (T + 1)"),
    ):
        table.add_row(quantity, f"{value:,}", meaning)
    console = Console()
    console.print(table)
    console.print(f"N = {num_multiplied_parameters(config):,} parameters that are multiplied, "
                  f"L = {config.num_layers} layers, A = {config.num_heads} heads x {config.head_dim}, "
                  f"T = {seq_len} tokens of a document, causal.", highlight=False)


def main():
    parser = argparse.ArgumentParser(prog="python -m mindpangu.model.size", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a name of recipes/model/, or a folder with config.json")
    parser.add_argument("overrides", nargs="*", help="field=value of the model, for example hidden_size=1024")
    parser.add_argument("--seq-len", type=int, help="tokens of a document, for the attention's FLOPs (max_seq_len)")
    arguments = parser.parse_intermixed_args()
    try:
        config = load_config(arguments.model, arguments.overrides)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    seq_len = config.max_seq_len if arguments.seq_len is None else arguments.seq_len
    if not 1 <= seq_len <= config.max_seq_len:
        raise SystemExit(f"error: --seq-len {seq_len}: expected 1 to model.max_seq_len={config.max_seq_len}.")
    print_size(f"{arguments.model}, documents of {seq_len} tokens", config, seq_len)


if __name__ == "__main__":
    main()
