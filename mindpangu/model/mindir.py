"""A folder with the decoder as MindIR graphs: written here, described by its manifest, checked before it is used.

    manifest.json               sizes, buckets, the graphs' inputs, token ids, SHA-256 of every other file
    prefill.mindir              a prompt: T tokens, a dynamic dimension
    decode.mindir               the same step for one token
    weights.data                the weights of both, once
    tokenizer.model, chat_template.jinja
    converter/                  converter_lite's configuration and command
    hugging_face/               the same model for transformers and llama.cpp

Every path in these files is relative, so the folder can be moved.
"""

import hashlib
import json
import re
import tempfile
from pathlib import Path

import numpy as np

FORMAT_VERSION = 1
PREFILL, DECODE, WEIGHTS = "prefill.mindir", "decode.mindir", "weights.data"
_ALIGNMENT = 64  # bytes; MindSpore keeps as many free at the start of a file of weights
_LITTLE_ENDIAN = b"\x01"
CIPHER = "AES-GCM"


# ---- Keys ------------------------------------------------------------------------------------------------------------

def parse_key(text, source):
    """The bytes of an AES key that is written in hexadecimal. Raises ValueError that names its source, not the key."""
    digits = text.strip()
    if not re.fullmatch(r"[0-9a-fA-F]*", digits) or len(digits) not in (32, 48, 64):
        raise ValueError(f"{source}: expected a key of 32, 48 or 64 hexadecimal digits, such as openssl rand -hex 16 "
                         "prints.")
    return bytes.fromhex(digits)


def read_key(key_file, key_env, environment):
    """The key in a file or in a variable of `environment`; None without either."""
    if key_file:
        path = Path(key_file)
        if not path.is_file():
            raise ValueError(f"key file {key_file} does not exist.")
        return parse_key(path.read_text(encoding="utf-8", errors="replace"), f"key file {key_file}")
    if key_env:
        if key_env not in environment:
            raise ValueError(f"the environment variable {key_env} is not set: expected a key of 32, 48 or 64 "
                             "hexadecimal digits.")
        return parse_key(environment[key_env], f"the environment variable {key_env}")
    return None


# ---- Writing ---------------------------------------------------------------------------------------------------------

def write_graphs(config, arrays, cache_len, folder, key=None):
    """Write both graphs and their weights; encrypted where a key (bytes) is given.

    config, arrays, cache_len: as StaticDecoder takes them. Returns what the manifest says of the graphs.
    """
    import mindspore as ms
    from mindspore import Tensor

    from .edge import StaticDecoder

    folder = Path(folder)
    decoder = StaticDecoder(config, arrays, cache_len)
    names = ["tokens", "positions", "last"]
    names += [f"{kind}_cache_{i}" for i in range(config.num_layers) for kind in ("k", "v")]
    cache_shape = [config.num_kv_heads * cache_len, config.head_dim]
    caches = [Tensor(np.zeros(cache_shape, np.float16))] * (2 * config.num_layers)
    one = Tensor(np.zeros(1, np.int32))
    any_length = Tensor(shape=[None], dtype=ms.int32)
    places = _write_weights(decoder, folder / WEIGHTS, key)
    for file, tokens in ((PREFILL, any_length), (DECODE, one)):
        graph = _graph_of(decoder, tokens, tokens, one, *caches)
        _rename_inputs(graph, names)
        for parameter in graph.graph.parameter:
            place = parameter.external_data
            place.location = WEIGHTS
            place.offset, place.length = places[parameter.name.partition(":")[2]]
        (folder / file).write_bytes(_sealed(graph.SerializeToString(), key))
    return {"inputs": names, "cache_shape": cache_shape,
            "primitives": sorted({_primitive(node.op_type) for node in graph.graph.node})}


def _graph_of(network, *inputs):
    """The MindIR of a network, without its weights."""
    import mindspore as ms

    graphs = []

    def take(model):
        graphs.append(type(model).FromString(model.SerializeToString()))
        del model.graph.parameter[:]  # or ms.export would write the weights, a copy for each graph

    with tempfile.TemporaryDirectory() as aside:
        ms.export(network, *inputs, file_name=f"{aside}/graph", file_format="MINDIR", custom_func=take)
    return graphs[0]


def _rename_inputs(model, names):
    """MindSpore numbers the inputs anew at every export; the converter's configuration needs their names."""
    graph = model.graph
    prefix = graph.name + ":"
    renamed = {}
    for value, name in zip(graph.input, names, strict=True):
        renamed[value.name] = prefix + name
        value.name = prefix + name
    for node in graph.node:
        for i, source in enumerate(node.input):
            if source in renamed:
                node.input[i] = renamed[source]


def _primitive(op_type):
    """"REF::MatMul:3" -> "MatMul"."""
    return op_type.removeprefix("REF::").partition(":")[0]


def _write_weights(network, path, key):
    """{name: (offset, length)} of a network's parameters in the file of weights that this writes."""
    places, offset = {}, _ALIGNMENT
    with open(path, "wb") as file:
        file.write(_sealed(_LITTLE_ENDIAN + bytes(_ALIGNMENT - 1), key))
        for parameter in network.get_parameters():
            data = np.ascontiguousarray(parameter.asnumpy()).tobytes()
            places[parameter.name] = offset, len(data)
            data += bytes(-len(data) % _ALIGNMENT)
            offset += len(data)
            file.write(_sealed(data, key))
    return places


def _sealed(data, key):
    """The bytes as they are written: encrypted as ms.export would, block after block, or as they are."""
    if key is None:
        return data
    from mindspore._c_expression import _encrypt

    return _encrypt(data, len(data), key, len(key), CIPHER)


def write_manifest(folder, content):
    """manifest.json: the content, and size and SHA-256 of every file that lies in the folder, but of hidden ones."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    digests = {path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
               for path in files}
    manifest = {"format_version": FORMAT_VERSION, **content, "files": digests}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _digest(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


# ---- Reading ---------------------------------------------------------------------------------------------------------

def read_manifest(folder):
    """manifest.json of a folder whose files are checked against it. Raises ValueError that names what differs."""
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder} is no export: it has no manifest.json; expected the folder that python -m "
                         "mindpangu.export recipe=export_mindir wrote.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it again, or export again.") from None
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} is of another version of mindpangu: expected format_version {FORMAT_VERSION}; "
                         "export again.")
    problems = []
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            problems.append(f"{name} is missing.")
        elif file.stat().st_size != expected["bytes"]:
            problems.append(f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}: it is truncated or "
                            "another file.")
        elif _digest(file) != expected["sha256"]:
            problems.append(f"{name} has another SHA-256 than the manifest says: it is damaged or was changed.")
    if problems:
        raise ValueError("\n  ".join([f"{folder} is not as it was exported:", *problems]) +
                         "\nCopy it again, or export again.")
    return manifest


def load_graph(folder, name, key=None):
    """A graph of the folder as an nn.GraphCell. Raises ValueError where MindSpore cannot read it."""
    import mindspore as ms
    from mindspore import nn

    options = {"dec_key": key, "dec_mode": CIPHER} if key else {}
    try:
        return nn.GraphCell(ms.load(str(Path(folder) / name), **options))
    except RuntimeError as error:
        reason = "the key is not the one it was exported with, or " if key else ""
        raise ValueError(f"MindSpore cannot load {name} of {folder}: {reason}the file is of another version of "
                         f"MindSpore than {ms.__version__}. {str(error).strip().splitlines()[0]}") from error


def is_sealed_with(folder, key):
    """Whether a key is the one of an encrypted export."""
    from mindspore._c_expression import _decrypt

    return _decrypt(str(Path(folder) / DECODE), key, len(key), CIPHER) is not None


def check_key(manifest, key):
    """Raise ValueError where a key is missing or too many."""
    if manifest["encryption"] and key is None:
        raise ValueError(f"this export is encrypted ({manifest['encryption']}): give its key with --key-file FILE or "
                         "--key-env VARIABLE.")
    if not manifest["encryption"] and key is not None:
        raise ValueError("this export is not encrypted: leave the key out.")
