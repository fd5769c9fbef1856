"""Bring MindSpore up for a run: device, threads, kernels. Import this before MindSpore."""

import json
import os
import platform
import sys
from importlib.metadata import version

from .cluster import world
from .metrics import say

_PACKAGES = ("mindspore", "numpy", "sentencepiece", "safetensors", "hydra-core")
_started = None
_library = None


def num_usable_cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def start(run, runs_ops=True):
    """Import and set up MindSpore once per process, as a RunConfig says. Returns {op: kernel}, and says it.

    runs_ops: whether a model of this project will run. An exported graph has none of its ops, only primitives.
    Raises ValueError if the process was already set up otherwise: MindSpore has one device and one thread pool.
    """
    global _started, _library
    wanted = (run.device, run.kernels, tuple(run.reference_ops), run.precision, run.num_threads)
    if _started is not None:
        if _started[0] != wanted:
            raise ValueError(f"run.device, kernels, reference_ops, precision, num_threads = {wanted}, but this process "
                             f"runs with {_started[0]}: start a new process.")
        return _started[1]
    threads = run.num_threads or max(1, num_usable_cores() // world().local_size)
    if "mindspore" not in sys.modules:
        # MindSpore logs framework-internal warnings by the hundred at its default level; errors are exceptions.
        os.environ.setdefault("GLOG_v", "3")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        # Spinning teams collapse when another process takes a core: a step went from 290 to 2200 ms.
        os.environ["OMP_WAIT_POLICY"] = "passive"
    path = None
    if run.device == "CPU" and run.kernels != "reference":
        from ..ops.cpu import build

        path = build.build(say=say)
        _library = build.load(path, threads)
        _library.pangu_set_bf16_products(int(run.precision == "bfloat16"))
    import mindspore as ms

    from ..ops import kernels

    ms.set_device(run.device)
    if world().size > 1:
        from mindspore import communication

        communication.init()
    ascendc = _ascendc(run, kernels)
    rounded = getattr(ms, run.precision) if run.kernels == "ascendc_host" else None
    chosen = kernels.select(run.kernels, run.reference_ops, run.device, path, ascendc, rounded)
    backends = {"native": f"CPU library ({_library.level})" if path else f"{run.device}'s own primitives",
                "ascendc": "aclnn{} of ascend_kernels (not run on a device by its authors)",
                "ascendc_host": "{} of ascend_kernels, on a model of the 910B",
                "reference": "MindSpore's general operations"}
    several = f", rank 0 of {world().size}" * (world().size > 1)
    if runs_ops:
        say(f"device {run.device}{several}, {threads} threads, mode {run.mode}, {run.precision}")
        say(f"  {'op':<18}{'kernel':<14}backend")
        for op, kernel in chosen.items():
            say(f"  {op:<18}{kernel:<14}{backends[kernel].format(kernels.operator_of(op))}")
        if ascendc and ascendc.missing:
            say(f"  no operators of ascend_kernels: {ascendc.missing}")
    else:
        by = f"the CPU library ({_library.level}) where it has them" if path else "MindSpore"
        say(f"device {run.device}, {threads} threads, primitives by {by}")
    _started = (wanted, chosen)
    return chosen


def _ascendc(run, kernels):
    """How this process reaches the operators of ascend_kernels, or None where it cannot."""
    if run.kernels == "ascendc_host":
        from ..ascend_kernels.host.operators import Operators

        return kernels.AscendC("ascend910b", run=Operators("ascend910b"))
    if run.device != "Ascend":
        return None
    from mindspore._c_expression import MSContext

    from ..ascend_kernels.build import usable_package

    chip = MSContext.get_instance().get_ascend_soc_version()  # by which MindSpore looks into a package, too
    if chip not in kernels.ASCENDC_OPS:
        return kernels.AscendC(chip, missing=f"they are for {', '.join(kernels.ASCENDC_OPS)}, not for {chip}")
    try:
        usable_package([chip], os.environ)
    except ValueError as error:
        return kernels.AscendC(chip, missing=str(error))
    return kernels.AscendC(chip)


def cpu_library():
    """The CPU library as a ctypes DLL, or None: this process has not started, or runs without it."""
    return _library


def activation_dtype(run):
    """Key of model.pangu.DTYPES: what tensors are, as opposed to what products round their operands to."""
    return "float32" if run.device == "CPU" else run.precision


def describe_environment(run):
    """What the run ran on, for env.json."""
    return json.dumps({"python": platform.python_version(), "machine": platform.machine(),
                       "cores": num_usable_cores(), "ranks": world().size, "device": run.device, "kernels": run.kernels,
                       "precision": run.precision, "mode": run.mode,
                       "packages": {name: version(name) for name in _PACKAGES}}, indent=1)
