"""Compiles AscendC kernels, unchanged, against the headers in include/ and runs them on a model of 910B and 310B.

The model executes every instruction in program order, one core after another, and checks it: bounds, alignment, dtypes,
limits, bytes that nobody wrote, queues, event flags, and that what an instruction relies on is ordered before it by a
flag, a barrier or the pipe itself (vector clocks per pipe, as if the pipes ran apart). Nothing here was run on a
device.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_HOST = Path(__file__).resolve().parent
_COMMON = _HOST.parent / "common/op_kernel"
_ARCHITECTURES = {"ascend910b": 2201, "ascend310b": 3002}
# C++ type and ge::DataType of a dtype.
_DTYPES = {"float32": ("float", "DT_FLOAT"), "float16": ("half", "DT_FLOAT16"), "bfloat16": ("bfloat16_t", "DT_BF16"),
           "int32": ("int32_t", "DT_INT32"), "int64": ("int64_t", "DT_INT64"), "uint8": ("uint8_t", "DT_UINT8")}
_OPTIONS = ("-std=c++17", "-g", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=off", "-Wall",
            "-Wextra", "-Wno-unused-parameter", "-DPANGU_KERNEL_BUILD", f"-I{_HOST}", f"-I{_HOST / 'include'}")


def to_dtype(values, dtype):
    """values rounded to a dtype name of this module, to the nearest; bfloat16 as its bits, uint16."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(values, dtype)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_float64(array):
    """The inverse of to_dtype, exact: uint16 holds bfloat16."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


class CheckFailed(RuntimeError):
    """A rule of AscendC is broken: rule, kernel, core, instruction, file:line of the kernel, values."""


@dataclass(frozen=True)
class Report:
    """What a launch moved and issued, all cores together.

    gm_bytes_read, gm_bytes_written: bytes of GM that copies, scalar accesses and Matmul moved, padding left out; Matmul
    counts A, B and the bias once and C once for each IterateAll. workspace_bytes: those of both that were of the
    workspace, which a chip's L2 may hold. vector_instructions: repeats (256 bytes each) issued.
    cube_flops: 2*M*N*K of the real sizes. ub_bytes_used: the most that a core allocated at a time.
    """

    gm_bytes_read: int
    gm_bytes_written: int
    workspace_bytes: int
    vector_instructions: int
    cube_flops: int
    ub_bytes_used: int


class _Counters(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in Report.__dataclass_fields__]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p), ("num_blocks", ctypes.c_int64), ("instances", ctypes.c_int64),
        ("mixed", ctypes.c_int64), ("has_sync_hardware", ctypes.c_int64), ("num_buffers", ctypes.c_int64),
        ("data", ctypes.POINTER(ctypes.c_void_p)), ("names", ctypes.POINTER(ctypes.c_char_p)),
        ("bytes", ctypes.POINTER(ctypes.c_int64)), ("kinds", ctypes.POINTER(ctypes.c_int64)),
        ("num_arguments", ctypes.c_int64), ("arguments", ctypes.POINTER(ctypes.c_int64)), ("tiling", ctypes.c_char_p),
        ("tiling_bytes", ctypes.c_int64), ("tiling_key", ctypes.c_uint64), ("workspace_bytes", ctypes.c_int64),
        ("removed_sync", ctypes.c_int64), ("allow_unwritten", ctypes.c_int64)]


# ---- Sync statements ------------------------------------------------------------------------------------------------

_CALL = re.compile(r"^\s*(?P<text>(?:AscendC::)?(?P<name>\w+)\s*<(?P<event>[^;{}()]*)>\s*\((?P<id>[^;{}]*)\);|"
                   r"(?:AscendC::)?SyncAll\(\);|\w+\.WaitIterateAll\(\);)\s*(?://.*)?$")


def _find_sync_statements(source_text):
    """[(text, line numbers)]: a barrier or helper call is one statement, SetFlag and WaitFlag of one event and id too.

    A SetFlag with its WaitFlag on the next line is a pair; the others of one event and id in a function go together, as
    a flag that is set before a loop and handed on in it does.
    """
    statements, flags, function = [], {}, 0
    lines = source_text.splitlines()
    previous = None
    for number, line in enumerate(lines):
        if line.startswith(("}", "{")) or re.match(r"^    (\}|\{)\s*$", line):
            function += 1
        match = _CALL.match(line)
        if match is None:
            previous = previous if not line.strip() or line.strip().startswith("//") else None
            continue
        name, event = match["name"] or "a statement by itself", (match["event"] or "").replace(" ", "")
        if name in ("SetFlag", "WaitFlag"):
            if "HardEvent::" not in event:  # inside a helper that takes the event: its calls count
                continue
            key = (event, re.sub(r"\s", "", match["id"]))
            if name == "WaitFlag" and previous is not None and previous[0] == key:
                _, statement = previous
                flags.pop((function, key), None) if len(statement[1]) == 1 else None
                statement[1].append(number)
                previous = None
                continue
            if (function, key) not in flags:
                flags[function, key] = (match["text"], [])
                statements.append(flags[function, key])
            flags[function, key][1].append(number)
            previous = (key, flags[function, key]) if name == "SetFlag" else None
        else:
            previous = None
            is_event = event.startswith(("HardEvent::", "AscendC::HardEvent::"))
            if match["name"] is None or (name == "PipeBarrier" and event.startswith("PIPE_")) or (
                    is_event and name not in ("AllocEventID", "FetchEventID", "ReleaseEventID")):
                statements.append((match["text"], [number]))
    return statements


def sync_statements(source_text):
    """The sync statements of a source that can be removed one by one, as text in the source's order."""
    return [f"line {numbers[0] + 1}: {text}" for text, numbers in _find_sync_statements(source_text)]


def _make_removable(path, first):
    """The source with a run-time switch around every sync statement, numbered from `first`; and the statements."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = _find_sync_statements(text)
    for index, (_, numbers) in enumerate(found, first):
        for number in numbers:
            lines[number] = f"{{ if (pangu::SyncIsOn({index})) {{ {lines[number].split('//')[0].strip()} }} }}"
    names = [f"{path.name}:{numbers[0] + 1}: {statement}" for statement, numbers in found]
    return f'#line 1 "{path}"\n' + "\n".join(lines) + "\n", names


# ---- Compilation ----------------------------------------------------------------------------------------------------


def _cache():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindpangu"


@functools.cache
def _compiler():
    found = shutil.which("g++")
    if found is None:
        raise ValueError("the AscendC kernels' host build needs a C++ compiler: install g++ (Debian: apt install g++).")
    return found, subprocess.run([found, "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()


def _run(command, what):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"g++ failed on {what}:\n{done.stderr[:6000]}")


def _built(folder, name, build):
    """folder/name, made by build(folder, path aside) if it is not there."""
    made = folder / name
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                aside = folder / f".writing-{name}"
                build(folder, aside)
                os.replace(aside, made)
    return made


@functools.cache
def _machine_digest():
    digest = hashlib.sha256("\0".join([_compiler()[1], *_OPTIONS]).encode())
    for path in sorted([*_HOST.glob("*.cc"), *_HOST.glob("*.h"), *(_HOST / "include").rglob("*.h")]):
        digest.update(str(path.relative_to(_HOST)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _machine(architecture):
    """The object file with the machine model of a chip."""

    def build(folder, aside):
        running = []
        for source in sorted(_HOST.glob("*.cc")):
            command = [_compiler()[0], *_OPTIONS, "-O2", f"-D__NPU_ARCH__={architecture}", "-c", source, "-o",
                       folder / f"{source.stem}.o"]
            running.append((source, subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE,
                                                     text=True)))
        outputs = [(source, process.communicate()[1], process.returncode) for source, process in running]
        for source, output, status in outputs:
            if status:
                raise ValueError(f"g++ failed on {source}:\n{output[:6000]}")
        _run([_compiler()[0], "-r", "-nostdlib", *(folder / f"{source.stem}.o" for source, _ in running), "-o", aside],
             "the machine model")

    return _built(_cache() / f"ascendc-machine-{architecture}-{_machine_digest()[:16]}", "machine.o", build)


def _local_files(source, folders):
    """The source and every file that it includes from its folder or `folders`, in the order of inclusion."""
    found = []

    def visit(path):
        found.append(path)
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            for folder in (path.parent, *folders):
                included = (folder / name).resolve()
                if included.exists():
                    if included not in found:
                        visit(included)
                    break

    visit(source.resolve())
    return found


def compile_kernel(source, soc, dtypes, tiling_header, includes=(), removable=False):
    """Kernel of an op_kernel source, whose entry has the file's name; cached by content.

    soc: "ascend910b" or "ascend310b". dtypes: entry argument in capitals -> dtype name, as DTYPE_<ARG> and
    ORIG_DTYPE_<ARG>. tiling_header: the op's tiling header, or None. includes: folders of headers beside
    common/op_kernel.
    removable: every sync statement can be switched off in a launch (Kernel.sync_statements lists them).
    Raises ValueError with the compiler's message.
    """
    source = Path(source).resolve()
    if soc not in _ARCHITECTURES:
        raise ValueError(f"soc={soc!r}: expected one of {list(_ARCHITECTURES)}.")
    unknown = {name for name in dtypes.values() if name not in _DTYPES}
    if unknown:
        raise ValueError(f"dtypes has {sorted(unknown)}: expected some of {list(_DTYPES)}.")
    folders = [_COMMON, *(Path(folder).resolve() for folder in includes)]
    if tiling_header is not None:
        tiling_header = Path(tiling_header).resolve()
        folders.append(tiling_header.parent)
    architecture = _ARCHITECTURES[soc]
    files = _local_files(source, folders)
    options = [*_OPTIONS, "-O1", f"-D__NPU_ARCH__={architecture}"]
    for argument, dtype in sorted(dtypes.items()):
        options += [f"-DDTYPE_{argument}={_DTYPES[dtype][0]}", f"-DORIG_DTYPE_{argument}={_DTYPES[dtype][1]}"]
    if tiling_header is not None:
        options += ["-include", tiling_header]
        files += [path for path in _local_files(tiling_header, folders) if path not in files]
    digest = hashlib.sha256("\0".join([_machine_digest(), *map(str, options), str(source), str(removable)]).encode())
    for path in files:
        digest.update(str(path).encode() + b"\0" + path.read_bytes())

    kernel_files = [path for path in files if path.suffix == ".cpp" or "op_kernel" in path.parts]
    texts, statements = {}, []
    if removable:
        for path in kernel_files:
            texts[path], found = _make_removable(path, len(statements))
            statements += found

    def build(folder, aside):
        main = source
        if removable:
            for path, text in texts.items():
                (folder / path.name).write_text(text, encoding="utf-8")
            main = folder / source.name
        unit = folder / "unit.cpp"
        unit.write_text(f'#include "{main}"\n#include "entry.h"\n', encoding="utf-8")
        paths = [f"-I{folder}"] if removable else []
        _run([_compiler()[0], *options, *paths, f"-I{source.parent}", *(f"-I{path}" for path in folders),
              f"-DPANGU_ENTRY={source.stem}", "-shared", unit, _machine(architecture), "-o", aside, "-ldl"], source)

    library = _built(_cache() / f"ascendc-{source.stem}-{digest.hexdigest()[:16]}", f"lib{source.stem}.so", build)
    return Kernel(source, soc, library, statements)


class Kernel:
    """A compiled kernel; sync_statements: the statements that removed_sync numbers (removable kernels only)."""

    def __init__(self, source, soc, library, statements):
        self.source, self.soc, self.library, self.sync_statements = source, soc, library, statements
        text = re.sub(r"//.*|/\*.*?\*/", "", source.read_text(encoding="utf-8"))
        self._mixed = soc == "ascend910b" and "KERNEL_TYPE_MIX_AIC_1_2" in text
        self._has_sync = self._mixed or (soc == "ascend910b" and "KERNEL_TYPE_MIX_AIV_1_0" in text)
        self._launch = ctypes.CDLL(str(library)).pangu_launch

    def launch(self, num_blocks, inputs, outputs, tiling, tiling_key=0, workspace_bytes=0, removed_sync=None,
               allow_unwritten=False):
        """Runs the kernel on every core and returns its Report; the outputs' arrays are filled.

        inputs, outputs: C-contiguous arrays in the entry's order, bfloat16 as uint16, None = absent. An array in both
        is updated in place; other outputs start without values, and every byte must be written unless allow_unwritten.
        num_blocks: what SetBlockDim got. tiling: the tiling data's bytes. workspace_bytes: with the library's 16 MB on
        910B. removed_sync: index of the sync statement to leave out. Raises CheckFailed.
        """
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks}: expected at least 1.")
        if removed_sync is not None and not 0 <= removed_sync < len(self.sync_statements):
            raise ValueError(f"removed_sync={removed_sync}: the kernel was compiled with {len(self.sync_statements)} "
                             "removable statements.")
        arrays, kinds, names, arguments = [], [], [], []
        for position, array in enumerate([*inputs, *outputs]):
            is_output = position >= len(inputs)
            if array is None:
                arguments.append(-1)
                continue
            if not array.flags.c_contiguous:
                raise ValueError(f"argument {position} is not C-contiguous.")
            same = next((i for i, other in enumerate(arrays) if other is array), None)
            if same is None:
                same = len(arrays)
                arrays.append(array)
                kinds.append(1 if is_output else 0)
                names.append(f"output {position - len(inputs)}" if is_output else f"input {position}")
            elif is_output:
                kinds[same] = 2
                names[same] = f"in-place {names[same]}"
            if is_output and not array.flags.writeable:
                raise ValueError(f"output {position - len(inputs)} is not writeable.")
            arguments.append(same)
        count = len(arrays)
        request = _Launch(
            self.source.stem.encode(), num_blocks, 2 if self._mixed else 1, self._mixed, self._has_sync, count,
            (ctypes.c_void_p * count)(*[array.ctypes.data for array in arrays]),
            (ctypes.c_char_p * count)(*[name.encode() for name in names]),
            (ctypes.c_int64 * count)(*[array.nbytes for array in arrays]), (ctypes.c_int64 * count)(*kinds),
            len(arguments), (ctypes.c_int64 * len(arguments))(*arguments), bytes(tiling), len(tiling), tiling_key,
            workspace_bytes, -1 if removed_sync is None else removed_sync, allow_unwritten)
        counters, message = _Counters(), ctypes.create_string_buffer(1 << 14)
        if self._launch(ctypes.byref(request), ctypes.byref(counters), message, ctypes.c_int64(len(message))):
            raise CheckFailed(self._with_source_lines(message.value.decode()))
        return Report(**{name: getattr(counters, name) for name in Report.__dataclass_fields__})

    def _with_source_lines(self, message):
        """Puts "file:line < file:line of the caller" for the offsets "@[0x..,0x..]" in a message."""
        offsets = list(dict.fromkeys(re.findall(r"0x[0-9a-f]+", " ".join(re.findall(r"@\[([^\]]*)\]", message)))))
        if not offsets:
            return message
        found = subprocess.run(["addr2line", "-a", "-i", "-e", str(self.library), *offsets], capture_output=True,
                               text=True, check=True).stdout.splitlines()
        places, current = {}, None
        for line in found:
            if line.startswith("0x"):
                current = places.setdefault(int(line, 16), [])
                continue
            path, _, number = line.partition(" ")[0].rpartition(":")
            path = Path(path)
            if path.is_absolute() and number.isdigit() and _HOST not in path.parents and path.name != "unit.cpp":
                if not (path.as_posix().startswith("/usr/")):
                    current.append(f"{path.name}:{number}")

        def replace(match):
            lines = []
            for offset in filter(None, match[1].split(",")):
                lines += places[int(offset, 16)]
            return " < ".join(dict.fromkeys(lines)) or "the kernel's frame"

        return re.sub(r"@\[([^\]]*)\]", replace, message)
