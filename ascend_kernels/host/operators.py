"""Runs the operators' sources on the host as CANN's single-operator call runs them on a device: shapes and types of the
outputs from the infer functions, tiling, launch. NumPy in, NumPy out; the model of the chip checks every launch.
"""

import functools
import threading
from pathlib import Path

import numpy as np

from .harness import compile_kernel
from .tiling import compile_op, snake_case

_ROOT = Path(__file__).resolve().parents[1]
# The model of a chip has one state; MindSpore runs independent operators in several threads.
_one_at_a_time = threading.Lock()


class Operators:
    """run = Operators("ascend910b"); outputs = run("PanguTopkKl", arrays, attributes)

    soc: the chip whose tiling and rules apply. Compiled on first use, and cached between processes.
    """

    def __init__(self, soc):
        self.soc = soc

    def __call__(self, op_type, arrays, attributes=()):
        """The outputs of `launch`."""
        return self.launch(op_type, arrays, attributes)[0]

    def launch(self, op_type, arrays, attributes=()):
        """The outputs, in the definition's order, bfloat16 ones as uint16; and the launch's Report.

        arrays: the inputs; bfloat16 ones as uint16 or as an extension type of that name. An output with an input's name
        is that input, updated: a copy, the caller's array stays as it is. attributes: in the definition's order.
        Raises TilingError for arguments that the operator refuses and CheckFailed for a broken rule of AscendC.
        """
        with _one_at_a_time:
            op = _host_side(op_type)
            definition = op.definition()
            types = [_dtype_name(array) for array in arrays]
            inputs = [array.view(np.uint16) if type_ == "bfloat16" else array
                      for array, type_ in zip(map(np.ascontiguousarray, arrays), types, strict=True)]
            shapes = op.infer_shape([array.shape for array in inputs], attributes)
            output_types = op.infer_dtype(types, attributes)
            names = [param["name"] for param in definition["inputs"]]
            outputs = []
            for param, shape, type_ in zip(definition["outputs"], shapes, output_types, strict=True):
                if param["name"] in names:
                    place = names.index(param["name"])
                    inputs[place] = inputs[place].copy()
                    outputs.append(inputs[place])
                else:
                    outputs.append(np.zeros(shape, np.uint16 if type_ == "bfloat16" else type_))
            described = [(array.shape, type_, array) if param["value_depend"] else (array.shape, type_)
                         for param, array, type_ in zip(definition["inputs"], inputs, types, strict=True)]
            tiling = op.tiling(self.soc, described, list(zip(shapes, output_types, strict=True)), attributes)
            names += [param["name"] for param in definition["outputs"]]
            dtypes = tuple(sorted({name.upper(): type_
                                   for name, type_ in zip(names, [*types, *output_types], strict=True)}.items()))
            report = _kernel(op_type, self.soc, dtypes).launch(
                tiling.num_blocks, inputs, outputs, tiling.data, tiling_key=tiling.key,
                workspace_bytes=tiling.workspace_bytes)
            return tuple(outputs), report


@functools.cache
def _source(op_type):
    """op_host/<operator>.cpp. Raises ValueError for an operator without sources."""
    found = sorted(_ROOT.glob(f"*/op_host/{snake_case(op_type)}.cpp"))
    if len(found) != 1:
        known = sorted(path.stem for path in _ROOT.glob("*/op_host/*.cpp") if path.parents[1].name != "host")
        raise ValueError(f"{op_type}: no source {snake_case(op_type)}.cpp among the operators {known} of {_ROOT}.")
    return found[0]


@functools.cache
def _host_side(op_type):
    return compile_op(_source(op_type))


@functools.cache
def _kernel(op_type, soc, dtypes):
    source = _source(op_type)
    # CANN puts the files of all operators into one folder, and generates the tiling data of a kernel from its header.
    own = source.with_name(f"{source.stem}_tiling.h")
    header = own if own.exists() else next(iter(sorted(source.parent.glob("*_tiling.h"))), None)
    return compile_kernel(source.parents[1] / f"op_kernel/{source.name}", soc, dict(dtypes), header,
                          sorted(_ROOT.glob("*/op_kernel")))


def _dtype_name(array):
    return "bfloat16" if array.dtype == np.uint16 else str(array.dtype)
