"""What this machine has, what is wrong, and what to do: python -m mindpangu.doctor

    python -m mindpangu.doctor --device Ascend --runs /data/runs
    python -m mindpangu.doctor --json

Exit code 0 if everything that training needs is there, 1 if not. MindSpore runs in a process of its own, so that a
broken one is a line here and not the end. Nothing is built, downloaded or changed.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

from .ascend_kernels import build as ascend_kernels
from .ops.cpu import build as cpu_library
from .rewards.sandbox import describe_isolation

PYTHONS = ((3, 10), (3, 11))  # that MindSpore 2.9.0 and mindformers 1.9.0 have in common
PAIR = {"mindspore": "2.9.0", "mindformers": "1.9.0"}  # the newest that pip resolves together
# What a training of recipe=kd_student at scale=tiny takes, with a margin.
_MEMORY_GIB, _DISK_GIB = 2, 1
_PROBE_S, _TOOL_S = 300, 60
# Each line that it prints is a JSON object; what is missing at its end did not work.
_PROBE = """
import json, sys
def done(step, found): print("\\n" + json.dumps({"step": step, "found": found}), flush=True)
device, library = sys.argv[1:]
import mindspore
done("import", f"{mindspore.__version__} at {mindspore.__path__[0]}")
if library:
    from mindpangu.ops.cpu import build
    build.load(library, 1)
    done("library", library)
import numpy
from mindspore import Tensor, ops
mindspore.set_device(device)
ones = Tensor(numpy.ones((2, 2), numpy.float32))
assert float((ones + ones).sum().asnumpy()) == 8, "1 + 1 is not 2"
assert float(mindspore.jit(ops.add)(ones, ones).sum().asnumpy()) == 8, "1 + 1 is not 2 in a graph"
done("compute", f"adds on {device}, in eager and graph mode")
import mindformers
done("mindformers", f"{mindformers.__version__} at {mindformers.__path__[0]}")
"""


class Check(NamedTuple):
    """One line of the report."""

    name: str
    state: str  # ok | note: nothing that training needs | missing: it is needed
    found: str
    advice: str = ""


def examine(device, runs):
    """Every Check of this machine for training on "CPU" or "Ascend" with runs in that folder."""
    checks = [_python(), *_packages(), *_machine(runs)]
    library = _cpu_library(device)
    loaded = library.path if device == "CPU" else ""
    return [*checks, library.check, *_mindspore(device, loaded), _sandbox(), *_ascend(device), _edge()]


def _python():
    found = f"{platform.python_version()} at {sys.executable}, {platform.machine()}"
    if sys.version_info[:2] in PYTHONS:
        return Check("Python", "ok", found)
    return Check("Python", "missing", found, "MindSpore 2.9.0 and mindformers 1.9.0 have Python 3.10 and 3.11 in "
                                             "common: make an environment of one of them, python3.11 -m venv .venv")


def _packages():
    found = _version("numpy")
    good = found is not None and int(found.split(".")[0]) < 2
    yield Check("numpy", "ok" if good else "missing", found or "not installed",
                "" if good else "MindSpore's eager mode fails with SystemError on numpy 2: pip install 'numpy<2'")
    try:
        names = [re.match(r"[\w.-]+", line).group() for line in requires("mindpangu") or () if "extra ==" not in line]
    except PackageNotFoundError:
        yield Check("packages", "missing", "mindpangu is not installed", "pip install -e . in its folder")
        return
    absent = [name for name in names if _version(name) is None and name not in PAIR]
    yield Check("packages", "missing" if absent else "ok", f"not installed: {', '.join(absent)}" if absent else
                f"the {len(names)} that mindpangu needs", f"pip install {' '.join(absent)}" if absent else "")


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine(runs):
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    total, available = (int(sizes[name]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and limit.read_text().strip().isdigit():
        total = min(total, int(limit.read_text()) / 2**30)
        available = min(available, total)
    good = available >= _MEMORY_GIB
    yield Check("memory", "ok" if good else "missing", f"{available:.1f} GiB available of {total:.1f}",
                "" if good else f"the default recipe needs up to {_MEMORY_GIB} GiB: end other programs")
    yield Check("cores", "ok", f"{len(os.sched_getaffinity(0))} that this process may use")
    runs = Path(runs).resolve()
    place = next(folder for folder in (runs, *runs.parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        yield Check("runs folder", "missing", f"{place} is not a folder that can be written",
                    "give another with run.root=DIR")
        return
    free = shutil.disk_usage(place).free / 2**30
    good = free >= _DISK_GIB
    yield Check("runs folder", "ok" if good else "missing", f"{free:.1f} GiB free for {runs}",
                "" if good else "free some, or give another folder with run.root=DIR")


class _Library(NamedTuple):
    check: Check
    path: str  # of the built library; empty: not built


def _cpu_library(device):
    state = "missing" if device == "CPU" else "note"  # runs on Ascend do without
    try:
        compilation = cpu_library.plan()
    except (ValueError, PackageNotFoundError) as error:
        return _Library(Check("CPU kernels", state, "cannot be built", str(error)), "")
    if compilation.library.exists():
        return _Library(Check("CPU kernels", "ok", f"built for {compilation.level}: {compilation.library}"),
                        str(compilation.library))
    return _Library(Check("CPU kernels", "ok", f"not built yet; the first run builds them for {compilation.level} with "
                                               f"g++ {compilation.compiler_version}, about a minute",
                          "or now: python -m mindpangu.ops.cpu.build"), "")


def _mindspore(device, library):
    """Checks of the pair, by a process that imports and uses it, with the CPU library of that path if it is built."""
    wrong = {name: found for name, wanted in PAIR.items() if (found := _version(name)) not in (wanted, None)}
    install = "pip install " + " ".join(f"{name}=={wanted}" for name, wanted in PAIR.items())
    steps, complaint = _probe(device, library)
    for name, step, state in (("MindSpore", "import", "missing"), ("CPU kernels load", "library", "missing"),
                              ("MindSpore computes", "compute", "missing"), ("mindformers", "mindformers", "note")):
        if step == "library" and not library:
            continue
        package = name.lower()
        if step not in steps:
            # The first step that did not work says why; those after it could not be tried.
            yield (Check(name, state, complaint, _advice(step, device, install)) if complaint else
                   Check(name, "note", "not tried"))
            complaint = ""
        elif package in wrong:
            yield Check(name, "missing" if package == "mindspore" else "note", steps[step],
                        f"tested is {PAIR[package]}; {install}")
        else:
            yield Check(name, "ok", steps[step])


def _advice(step, device, install):
    if step == "compute" and device == "Ascend":
        return "CANN, driver and MindSpore have to fit, see the lines on Ascend; source CANN's set_env.sh first"
    if step == "library":
        return "run.kernels=reference does without them"
    return f"install the pair again: {install} 'numpy<2'"


def _probe(device, library):
    """{step: what was found} of the steps that worked, and why the next one did not ("" if all did)."""
    with tempfile.TemporaryDirectory() as folder:  # mindformers writes output/log into the working directory
        environment = os.environ | {"GLOG_v": "3", "TMPDIR": folder}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]),
                                                                  os.environ.get("PYTHONPATH")]))
        try:
            done = subprocess.run([sys.executable, "-c", _PROBE, device, library], cwd=folder, env=environment,
                                  capture_output=True, text=True, errors="replace", timeout=_PROBE_S)
            output, complaint = done.stdout, done.stderr
            ended = f"the process ended with {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired as error:
            output, complaint = (error.stdout or b"").decode(errors="replace"), ""
            ended = f"no answer within {_PROBE_S} s"
    steps = {}
    for line in output.splitlines():
        if line.startswith('{"step": '):
            step = json.loads(line)
            steps[step["step"]] = step["found"]
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    # MindSpore's exceptions go on for lines after the first, which says what it is.
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)] or lines
    return steps, f"{errors[-1]} ({ended})" if errors and ended else ended


def _sandbox():
    try:
        isolation = describe_isolation()
    except OSError as error:
        return Check("code sandbox", "note", f"cannot start ({error})", "recipe=grpo with code problems needs it")
    if isolation.missing:
        return Check("code sandbox", "note", str(isolation), "code rewards need rewards.code.allow_unsafe=true here; "
                     "Landlock (Linux 5.13) or user namespaces would isolate")
    return Check("code sandbox", "ok", str(isolation))


def _ascend(device):
    """Driver, chips, CANN and the operators; on a machine without an NPU their absence is a note."""
    state = "missing" if device == "Ascend" else "note"
    tool = shutil.which("npu-smi")
    if tool is None:
        yield Check("Ascend driver", state, "no npu-smi on PATH",
                    "install the driver and firmware for the NPU, https://www.hiascend.com/hardware/firmware-drivers"
                    if device == "Ascend" else "nothing to do: this machine trains on its CPU")
    else:
        yield from _driver(tool, state)
    try:
        cann = ascend_kernels.find_cann(os.environ)
        fits = cann.version is not None and cann.version.startswith(
            tuple(f"{known}." for known in ascend_kernels.CANN_VERSIONS))
        advice = "" if fits else f"MindSpore 2.9.0 asks for one of {', '.join(ascend_kernels.CANN_VERSIONS)}"
        found = f"{cann.version or 'of an unknown version'} at {cann.home}"
        yield Check("CANN", "ok" if fits else state, found, advice)
        if not os.environ.get("ASCEND_OPP_PATH"):
            yield Check("CANN's environment", state, "ASCEND_OPP_PATH is not set",
                        f"source {cann.home}/set_env.sh (or ../set_env.sh)")
    except ValueError as error:
        found, _, advice = str(error).partition("; ")
        yield Check("CANN", state, found, advice if device == "Ascend" else "")
        if device == "CPU":
            return
    yield _operators()


def _driver(tool, state):
    try:
        shown = subprocess.run([tool, "info"], capture_output=True, text=True, errors="replace", timeout=_TOOL_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Check("Ascend driver", state, f"{tool} info: {error}", "reinstall the driver, or restart the machine")
        return
    chips = re.findall(r"^\|\s*(\d+)\s+((?:Ascend)?[39]10\w*)\s*\|\s*(\S+)\s*\|", shown.stdout, re.MULTILINE)
    if shown.returncode or not chips:
        said = (shown.stdout + shown.stderr).strip().splitlines()
        yield Check("Ascend driver", state, f"{tool} info names no chip" + (f": {said[-1].strip()}" if said else ""),
                    "check that /dev/davinci* exist and that this user may open them")
        return
    found = re.search(r"Version:?\s*(\S+)", shown.stdout)
    yield Check("Ascend driver", "ok", found.group(1) if found else "of an unknown version")
    ill = [f"NPU {number} is {health}" for number, _, health in chips if health.upper() != "OK"]
    kinds = ", ".join(sorted({name for _, name, _ in chips}))
    if not all(re.match(r"(Ascend)?910B", name) for _, name, _ in chips):
        ill.append("training is meant for 910B (Atlas 800T A2); a 310 runs exports")
    yield Check("NPUs", "note" if ill else "ok", f"{len(chips)} x {kinds}", "; ".join(ill))


def _operators():
    """The package of ascend_kernels: built-in operators do without it, with fewer documents in a row."""
    try:
        package = ascend_kernels.usable_package(ascend_kernels.find_socs(), os.environ)
        return Check("AscendC operators", "ok", str(package.folder))
    except ValueError as error:
        return Check("AscendC operators", "note", str(error),
                     "python -m mindpangu.ascend_kernels.build --check says more")


def _edge():
    if importlib.util.find_spec("mindspore_lite") is None:
        return Check("MindSpore Lite", "note", "not installed", "only exports on an NPU need it; it is not on PyPI: "
                     "https://www.mindspore.cn/lite")
    return Check("MindSpore Lite", "ok", _version("mindspore-lite") or "of an unknown version")


def main():
    parser = argparse.ArgumentParser(prog="python -m mindpangu.doctor", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--device", choices=("CPU", "Ascend"),
                        help="what training is to run on (Ascend where there is npu-smi, else CPU)")
    parser.add_argument("--runs", default="runs", help="folder of the runs (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args()
    device = arguments.device or ("Ascend" if shutil.which("npu-smi") else "CPU")
    checks = examine(device, arguments.runs)
    absent = [check.name for check in checks if check.state == "missing"]
    if arguments.json:
        report = {"device": device, "ok": not absent, "checks": [check._asdict() for check in checks]}
        print(json.dumps(report, indent=1))
    else:
        for check in checks:
            print(f"{check.state:<8} {check.name}: {check.found}")
            if check.advice:
                print(f"{'':<8} -> {check.advice}")
        print(f"training on {device}: " + (f"what is needed is not all there: {', '.join(absent)}" if absent else
                                           "everything that is needed is there"))
        if device == "Ascend":
            print("The authors have run nothing on an NPU.")
    return 1 if absent else 0


if __name__ == "__main__":
    sys.exit(main())
