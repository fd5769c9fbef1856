"""Compiles an operator's host source without CANN and calls its definition, tiling and infer functions.

    op = compile_op(Path("ascend_kernels/topk_kl/op_host/pangu_topk_kl.cpp"))
    tiling = op.tiling("ascend910b", inputs=[((8, 1000), "float16"), None], outputs=[((8,), "float32")], attrs=[1.0])
"""

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

_HOST = Path(__file__).resolve().parent
_COMMON = _HOST.parent / "common/op_host"
_OPTIONS = ("-O1", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=format", "-Werror=return-type")
# CANN's project template builds the operators' host side as C++11.
_OPERATOR_OPTIONS = ("-std=c++11", "-pedantic-errors", *_OPTIONS)
_OWN_OPTIONS = ("-std=c++17", *_OPTIONS)
# Names of ge::DataType and ge::Format, with CANN's values.
DTYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "uint8": 4, "int16": 6, "uint16": 7, "uint32": 8,
          "int64": 9, "uint64": 10, "float64": 11, "bool": 12, "bfloat16": 27, "undefined": 28}
FORMATS = {"ND": 2, "FRACTAL_NZ": 29}
_DTYPE_NAMES = {value: name for name, value in DTYPES.items()}
_FORMAT_NAMES = {value: name for name, value in FORMATS.items()}
_PARAM_TYPES = {1: "optional", 2: "required", 3: "dynamic"}
_KIB = 1024


class TilingError(ValueError):
    """A host function of an operator returned GRAPH_FAILED, or broke a rule of CANN's interface: its own message."""


@dataclass(frozen=True)
class Platform:
    """What an operator may ask of a chip; sizes in bytes. Source: CANN's platform files and sys_constants.h."""
    num_aic: int
    num_aiv: int
    ub: int
    l1: int
    l0a: int
    l0b: int
    l0c: int
    l2: int
    library_workspace: int


# 910B: the B3 and B4 bins; 256 bytes of UB and of L1 are the library's. 310B: one core, cube and vector in one.
PLATFORMS = {
    "ascend910b": Platform(20, 40, 192 * _KIB - 256, 512 * _KIB - 256, 64 * _KIB, 64 * _KIB, 128 * _KIB, 192 << 20,
                           16 << 20),
    "ascend310b": Platform(1, 1, 248 * _KIB, 1024 * _KIB, 64 * _KIB, 64 * _KIB, 128 * _KIB, 4 << 20, 2 << 20),
}


@dataclass(frozen=True)
class Tiling:
    """What a tiling function decided. num_blocks: SetBlockDim; data: the bytes that GET_TILING_DATA reads."""
    num_blocks: int
    key: int
    data: bytes
    workspace_bytes: int
    need_atomic: bool
    schedule_mode: int


def compile_op(op_host_source):
    """The Op of one host source (one OP_ADD), compiled with g++ once per content of the source and its headers.

    Raises ValueError with the compiler's message, and where the definition is one that CANN's opbuild would refuse.
    """
    source = Path(op_host_source).resolve()
    return Op(_build(source))


def _build(source):
    compiler = shutil.which("g++")
    if compiler is None:
        raise ValueError("the operators' host side needs a C++ compiler: install g++ (Debian: apt install g++).")
    version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, check=True).stdout
    folders = [_COMMON, _HOST / "include"]
    own = [_cached([compiler, "-c", *_OWN_OPTIONS], version, path, folders, f"{path.stem}.o")
           for path in sorted((_HOST / "op_host").glob("*.cc"))]
    return _cached([compiler, "-shared", *_OPERATOR_OPTIONS], version, source, [source.parent, *folders],
                   f"{source.stem}.so", own)


def _cached(command, version, source, folders, name, objects=()):
    """What g++ makes of the source and the objects; found in the cache where none of its inputs changed."""
    digest = hashlib.sha256("\0".join([version, *command, *(path.name for path in objects)]).encode())
    for path in (source, *(path for folder in folders for path in sorted(folder.rglob("*.h")))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindpangu"
    result = cache / f"op_host-{digest.hexdigest()[:16]}-{name}"
    if result.exists():
        return result
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = open(cache / f".{result.name}.lock", "w", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write to {cache} ({error.strerror}): make it writable or set XDG_CACHE_HOME to a "
                         "folder that is.") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            aside = cache / f".{result.name}.writing"
            includes = [f"-I{folder}" for folder in folders]
            done = subprocess.run([*command, *includes, source, *objects, "-o", aside], capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"g++ failed on {source}:\n{done.stderr[-6000:]}")
            os.replace(aside, result)
    return result


class Op:
    """The host side of one operator."""

    def __init__(self, library):
        self._dll = ctypes.CDLL(str(library), mode=os.RTLD_LOCAL)
        for name in ("pangu_definitions", "pangu_last_text"):
            getattr(self._dll, name).restype = ctypes.c_char_p
        self._dll.pangu_new_node.restype = self._dll.pangu_tiling_data.restype = ctypes.c_void_p
        self._dll.pangu_output_shape.restype = ctypes.c_size_t
        operators = json.loads(self._dll.pangu_definitions())
        if len(operators) != 1:
            raise ValueError(f"{library}: {len(operators)} operators are registered with OP_ADD, expected one.")
        self._definition = _checked(operators[0])

    def definition(self):
        """What OpDef says, as a dict.

        type; inputs and outputs: name, param_type, dtypes, formats, value_depend, init_value; attrs: name, type,
        required, default; socs: {soc: {"inputs": {name: dtypes}, "outputs": {name: dtypes}, "options": {...}}} after
        the chip's own lists replaced the common ones; kernel: the name of the kernel's file and function; aclnn: the
        name of the function that calls it; has_tiling, has_infer_shape, has_infer_dtype.
        """
        return json.loads(json.dumps(self._definition))

    def tiling(self, soc, inputs, outputs, attrs=(), cores=None, ub_bytes=None):
        """Run the tiling function for a call.

        inputs, outputs: in the definition's order, (shape, dtype name) or None for an absent optional input; a third
        element is the values, for an input with ValueDepend. attrs: in the definition's order; None stands for the
        default. cores: another number of cores for the chip (of vector cores where it has them apart: 910B has two per
        cube core); ub_bytes: another UB size. Raises TilingError with what the function said.
        """
        definition = self._definition
        if soc not in definition["socs"]:
            raise ValueError(f"{definition['type']} is defined for {list(definition['socs'])}, not for {soc}.")
        if len(outputs) != len(definition["outputs"]):
            raise ValueError(f"{definition['type']}: {len(outputs)} outputs, expected {len(definition['outputs'])}.")
        platform = PLATFORMS[soc]
        if cores is not None:
            per_cube_core = platform.num_aiv // platform.num_aic
            if cores < 1 or cores % per_cube_core:
                raise ValueError(f"cores={cores}: {soc} has {per_cube_core} vector cores per cube core.")
            platform = replace(platform, num_aic=cores // per_cube_core, num_aiv=cores)
        if ub_bytes is not None:
            platform = replace(platform, ub=ub_bytes)
        self._need("has_tiling", "SetTiling")
        with _Node(self, inputs, attrs) as node:
            for value in outputs:
                node.add(value, is_output=True)
            numbers = (ctypes.c_uint64 * 9)(*vars(platform).values())
            self._dll.pangu_set_platform(node.handle, soc.encode(), numbers)
            answer = (ctypes.c_uint64 * 7)()
            self._call(self._dll.pangu_tile(node.handle, answer))
            blocks, key, size, num_workspaces, workspace, atomic, schedule = answer
            data = ctypes.string_at(self._dll.pangu_tiling_data(node.handle), size)
        if blocks == 0:
            raise TilingError(f"{definition['type']}: the tiling function did not call SetBlockDim.")
        if num_workspaces > 1:
            raise TilingError(f"{definition['type']}: {num_workspaces} workspaces, expected one.")
        return Tiling(blocks, key, data, workspace, bool(atomic), schedule)

    def infer_shape(self, shapes, attrs=()):
        """The outputs' shapes for the inputs' shapes (None: absent), as tuples. Raises TilingError."""
        self._need("has_infer_shape", "SetInferShape")
        num_outputs = len(self._definition["outputs"])
        inputs = [None if shape is None else (shape, "undefined") for shape in shapes]
        with _Node(self, inputs, attrs) as node:
            self._call(self._dll.pangu_infer_shape(node.handle, ctypes.c_size_t(num_outputs)))
            answer = []
            for index in range(num_outputs):
                dims = (ctypes.c_int64 * 25)()
                answer.append(tuple(dims[:self._dll.pangu_output_shape(node.handle, ctypes.c_size_t(index), dims)]))
        return answer

    def infer_dtype(self, dtypes, attrs=()):
        """The names of the outputs' data types for the inputs' (None: absent). Raises TilingError."""
        self._need("has_infer_dtype", "SetInferDataType")
        num_outputs = len(self._definition["outputs"])
        inputs = [None if dtype is None else ((), dtype) for dtype in dtypes]
        with _Node(self, inputs, attrs) as node:
            self._call(self._dll.pangu_infer_dtype(node.handle, ctypes.c_size_t(num_outputs)))
            return [_DTYPE_NAMES[self._dll.pangu_output_dtype(node.handle, ctypes.c_size_t(index))]
                    for index in range(num_outputs)]

    def _need(self, flag, setter):
        if not self._definition[flag]:
            raise ValueError(f"{self._definition['type']} has no function for this: call {setter} in its definition.")

    def _call(self, outcome):
        if outcome:
            said = self._dll.pangu_last_text().decode().strip()
            if outcome == 1 and said:
                raise TilingError(said)
            what = "returned GRAPH_FAILED without a message" if outcome == 1 else f"broke a rule of CANN: {said}"
            raise TilingError(f"{self._definition['type']} {what}")


class _Node:
    """A call's arguments on the C++ side, freed at the end of a with block."""

    def __init__(self, op, inputs, attrs):
        self._dll, definition = op._dll, op._definition
        expected, given = len(definition["inputs"]), len(inputs)
        if given != expected:
            raise ValueError(f"{definition['type']}: {given} inputs, expected {expected}; None is an absent one.")
        if len(attrs) > len(definition["attrs"]):
            raise ValueError(f"{definition['type']}: {len(attrs)} attributes, expected {len(definition['attrs'])}.")
        for param, value in zip(definition["inputs"], inputs, strict=True):
            if value is None and param["param_type"] != "optional":
                raise ValueError(f"{definition['type']}: {param['name']} is required.")
        values = [*attrs, *[None] * (len(definition["attrs"]) - len(attrs))]
        for place, (attr, value) in enumerate(zip(definition["attrs"], values, strict=True)):
            if value is None and attr["required"]:
                raise ValueError(f"{definition['type']}: attribute {attr['name']} is required.")
            values[place] = attr["default"] if value is None else value
        self.handle = ctypes.c_void_p(self._dll.pangu_new_node(definition["type"].encode()))
        self._num_inputs = 0
        for value in inputs:
            self.add(value, is_output=False)
        for attr, value in zip(definition["attrs"], values, strict=True):
            self._add_attr(attr["type"], value)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._dll.pangu_delete_node(self.handle)

    def add(self, value, is_output):
        shape, dtype, *data = value or ((), "undefined")
        dims = (ctypes.c_int64 * len(shape))(*shape)
        self._dll.pangu_add_value(self.handle, is_output, value is not None, dims, ctypes.c_size_t(len(shape)),
                                  DTYPES[dtype], FORMATS["ND"])
        if data:
            values = np.ascontiguousarray(data[0])
            self._dll.pangu_set_data(self.handle, ctypes.c_size_t(self._num_inputs),
                                     values.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(values.nbytes))
        self._num_inputs += not is_output

    def _add_attr(self, kind, value):
        values = value if kind.startswith("list_") else [value]
        text = value if kind == "string" else ""
        numbers = [] if kind == "string" else values
        integers = [] if kind.endswith("float") else numbers
        floatings = numbers if kind.endswith("float") else []
        self._dll.pangu_add_attr(self.handle, kind.encode(), (ctypes.c_int64 * len(integers))(*integers),
                                 (ctypes.c_double * len(floatings))(*floatings), ctypes.c_size_t(len(numbers)),
                                 text.encode())


def snake_case(op_type):
    """The name that CANN gives an OpType's kernel: PanguTopkKl -> pangu_topk_kl, GatherV2X -> gather_v2_x.

    An underscore stands before a capital whose left neighbour is not one, or is one while the right one is small.
    """
    letters = []
    for place, letter in enumerate(op_type):
        if letter.isupper() and place:
            after_capital = op_type[place - 1].isupper()
            before_small = place + 1 < len(op_type) and op_type[place + 1].islower()
            if not after_capital or before_small:
                letters.append("_")
        letters.append(letter.lower())
    return "".join(letters)


def _checked(raw):
    """The definition with names for numbers, after the rules that CANN's opbuild enforces. Raises ValueError."""
    op_type = raw["type"]
    if not (op_type.isascii() and op_type.isalnum() and op_type[0].isupper()):
        raise ValueError(f"OpType {op_type!r}: expected letters and digits, a capital first.")
    common = {"inputs": [_param(param, op_type) for param in raw["inputs"]],
              "outputs": [_param(param, op_type) for param in raw["outputs"]]}
    attrs = []
    for attr in raw["attrs"]:
        if not attr["type"]:
            raise ValueError(f"{op_type}: attribute {attr['name']} has no type: call Int, Float, ...")
        if not attr["required"] and attr["default"] is None:
            raise ValueError(f"{op_type}: attribute {attr['name']} is optional and has no default.")
        default = attr["default"]
        if default is not None and not attr["type"].startswith("list_"):
            default = bool(default[0]) if attr["type"] == "bool" else default[0]
        attrs.append(attr | {"default": default})
    if not raw["configs"]:
        raise ValueError(f"{op_type}: no chip: call AICore().AddConfig.")
    socs = {}
    for config in raw["configs"]:
        if config["soc"] not in PLATFORMS:
            raise ValueError(f"{op_type}: AddConfig({config['soc']!r}): expected one of {list(PLATFORMS)}.")
        merged = {}
        for side in ("inputs", "outputs"):
            own = {param["name"]: param for param in config[side]}
            unknown = sorted(set(own) - {param["name"] for param in raw[side]})
            if unknown:
                raise ValueError(f"{op_type}, {config['soc']}: {side} {unknown} are not in the definition.")
            merged[side] = {}
            for param in raw[side]:
                mine = own.get(param["name"], {})
                both = param | {key: mine[key] for key in ("dtypes", "formats") if mine.get(key)}
                both["unknown_shape_formats"] = mine.get("unknown_shape_formats", param["unknown_shape_formats"])
                if mine and mine["param_type"] and mine["param_type"] != param["param_type"]:
                    raise ValueError(f"{op_type}, {config['soc']}: {param['name']} changes its ParamType.")
                merged[side][param["name"]] = _param(both, op_type)
        params = [*merged["inputs"].values(), *merged["outputs"].values()]
        lengths = {param["name"]: (len(param["dtypes"]), len(param["formats"])) for param in params}
        if len({length for pair in lengths.values() for length in pair}) > 1:
            raise ValueError(f"{op_type}, {config['soc']}: DataType and Format lists are combined by position and "
                             f"differ in length: {lengths}.")
        socs[config["soc"]] = {side: {name: param["dtypes"] for name, param in merged[side].items()} for side in merged}
        socs[config["soc"]]["options"] = dict(config["options"])
    flags = {key: raw[key] for key in ("has_tiling", "has_infer_shape", "has_infer_dtype")}
    return {"type": op_type, "kernel": snake_case(op_type), "aclnn": f"aclnn{op_type}", **common, "attrs": attrs,
            "socs": socs, **flags}


def _param(param, op_type):
    if param["param_type"] not in _PARAM_TYPES:
        raise ValueError(f"{op_type}: {param['name']} has no ParamType.")
    if not param["dtypes"]:
        raise ValueError(f"{op_type}: {param['name']} has no DataType.")
    dtypes = [_DTYPE_NAMES[number] for number in param["dtypes"]]
    formats = [_FORMAT_NAMES[number] for number in param["formats"]] or ["ND"] * len(dtypes)
    if param["unknown_shape_formats"] and len(param["unknown_shape_formats"]) != len(formats):
        raise ValueError(f"{op_type}: {param['name']} has {len(formats)} formats, and "
                         f"{len(param['unknown_shape_formats'])} for unknown shapes.")
    return {"name": param["name"], "param_type": _PARAM_TYPES[param["param_type"]], "dtypes": dtypes,
            "formats": formats, "value_depend": param["value_depend"], "init_value": param["init_value"]}
