"""Builds the AscendC operators with CANN into a package that MindSpore finds, and explains the state of a machine.

    python -m ascend_kernels.build --check      what is here, what is missing, what to do; exit code 0 or 1
    python -m ascend_kernels.build              builds for this machine's chip, installs, prints the line to export

In an installed mindpangu the module is mindpangu.ascend_kernels.build. The work is done by MindSpore's own builder
(lib/plugin/ascend/custom_compiler/setup.py in its package), which fills a project template of CANN with the sources.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

_ROOT = Path(__file__).resolve().parent
_COMMAND = f"python -m {__spec__.name}"
NOT_RUN = ("Not run on a device by the authors: the operators are tested on a CPU harness; no CANN has compiled them "
           "and no NPU has run them.")
SOCS = ("ascend910b", "ascend310b")
VENDOR = "pangu"
DEFAULT_HOMES = (Path("/usr/local/Ascend/ascend-toolkit/latest"), Path("/usr/local/Ascend/cann"))
# MindSpore 2.9.0 asks for one of these (its run_check); the sources use what 8.1 has and the later ones kept.
CANN_VERSIONS = ("8.2", "8.3", "8.5", "9.0")
_MANIFEST = "mindpangu_sources.json"
_FOLDERS = ("op_host", "op_kernel")
_SUFFIXES = (".cpp", ".h")
_WHERE_CANN = ("install the package Ascend-cann-toolkit for this processor, one of the versions "
               f"{', '.join(CANN_VERSIONS)} (https://www.hiascend.com/software/cann), then run `source "
               "/usr/local/Ascend/ascend-toolkit/set_env.sh` (or cann/set_env.sh, where it was installed)")

Cann = namedtuple("Cann", "home version")  # its folder; its version, "8.5.0", None where no file says it
Package = namedtuple("Package", "folder manifest")  # vendors/<vendor>; what `install` wrote there, None if nothing


def stage(folder):
    """Copy every operator's sources flat into folder/op_host and folder/op_kernel; returns {"op_host/name": text}.

    MindSpore's builder takes the files of two folders and no subfolders. Raises ValueError for a name that two
    operators have.
    """
    texts = {}
    for place, path in _sources():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        texts[place] = path.read_text(encoding="utf-8")
    return texts


def _sources():
    """[(op_host/name or op_kernel/name, path)], sorted."""
    found = {}
    for folder in _FOLDERS:
        for path in sorted(_ROOT.glob(f"*/{folder}/*")):
            if path.suffix not in _SUFFIXES or path.is_relative_to(_ROOT / "host"):
                continue
            place = f"{folder}/{path.name}"
            if place in found:
                raise ValueError(f"{found[place]} and {path} have the same name: the builder wants the files of all "
                                 "operators in one folder")
            found[place] = path
    return sorted(found.items())


def sources_digest():
    """SHA-256 over the names and contents of all sources: what an installed package is compared with."""
    digest = hashlib.sha256()
    for place, path in _sources():
        digest.update(place.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def find_cann(environment):
    """The Cann of this machine. Raises ValueError that says what to install."""
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        if environment.get(name):
            home = Path(environment[name])
            if not home.is_dir():
                raise ValueError(f"no CANN: {name}={home} is not a folder; {_WHERE_CANN}")
            return Cann(home, _cann_version(home))
    for home in DEFAULT_HOMES:
        if home.is_dir():
            return Cann(home, _cann_version(home))
    raise ValueError("no CANN: ASCEND_HOME_PATH is not set, and there is no "
                     f"{' and no '.join(map(str, DEFAULT_HOMES))}; {_WHERE_CANN}")


def _cann_version(home):
    """From the files in which CANN's packages write it: the toolkit's, the whole installation's, the compiler's."""
    patterns = [(path, r"^version=(\S+)") for path in sorted(home.glob("*-linux/ascend_toolkit_install.info"))]
    patterns += [(home / "version.cfg", r"^(?:toolkit|compiler|runtime)_running_version=\[[^\]:]*:([^\]]+)\]"),
                 (home / "compiler/version.info", r"^version_dir=(\S+)"),
                 (home / "compiler/version.info", r"^Version=(\S+)")]
    for path, pattern in patterns:
        if path.is_file():
            found = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
            if found:
                return found.group(1)
    return None


def cann_problem(cann):
    """Why this CANN cannot build the operators, or None."""
    if cann.version is None:
        return (f"the version of CANN at {cann.home} is in none of its files (*-linux/ascend_toolkit_install.info, "
                "version.cfg, compiler/version.info): the installation is not whole; install it again")
    if not cann.version.startswith(tuple(f"{version}." for version in CANN_VERSIONS)):
        return f"CANN {cann.version} at {cann.home} is not one of {', '.join(CANN_VERSIONS)}: {_WHERE_CANN}"
    templates = cann.home / "tools/op_project_templates/ascendc"
    sample = cann.home / "tools/msopgen/template/operator_demo_projects/ascendc_operator_sample"
    if not ((templates / "customize").is_dir() and (templates / "common").is_dir()) and not sample.is_dir():
        return (f"CANN at {cann.home} has no project template ({templates}): it is the runtime (nnrt, nnae), which "
                f"cannot build; {_WHERE_CANN}")
    if not [*cann.home.glob("*/ccec_compiler/bin/ccec"), *cann.home.glob("*/ccec_compiler/bin/bisheng")]:
        return f"CANN at {cann.home} has no kernel compiler (compiler/ccec_compiler/bin): {_WHERE_CANN}"
    return None


def find_socs():
    """The chips of this machine that npu-smi names, of SOCS. Raises ValueError where there is no npu-smi or chip."""
    tool = shutil.which("npu-smi")
    if tool is None:
        raise ValueError("no npu-smi, so no Ascend driver: give the chip to build for, --soc ascend910b (Atlas 800T "
                         "A2) or --soc ascend310b (Atlas 200I A2)")
    shown = subprocess.run([tool, "info"], capture_output=True, text=True).stdout
    # "910B3", "Ascend910B2C", "310B1": the chip and its bin.
    socs = [soc for soc in SOCS if re.search(rf"\b(ascend)?{soc.removeprefix('ascend')}\d?c?\b", shown, re.IGNORECASE)]
    if not socs:
        raise ValueError(f"npu-smi info names no chip of {', '.join(SOCS)}: the operators are for these; --soc builds "
                         "for another machine")
    return socs


def find_builder():
    """MindSpore's setup.py for custom operators. Raises ValueError that says what to install."""
    spec = importlib.util.find_spec("mindspore")
    if spec is None:
        raise ValueError("MindSpore is not installed: pip install mindspore==2.9.0")
    builder = Path(spec.origin).parent / "lib/plugin/ascend/custom_compiler/setup.py"
    if not builder.is_file():
        raise ValueError(f"MindSpore at {Path(spec.origin).parent} has no Ascend plugin ({builder} is missing): "
                         "install the wheel for Linux, pip install mindspore==2.9.0")
    return builder


def missing_tools():
    return [tool for tool in ("bash", "cmake", "make", "g++") if shutil.which(tool) is None]


def find_packages(vendor, environment):
    """The installed Packages in the order in which MindSpore looks for them."""
    entries = [Path(entry) for entry in environment.get("ASCEND_CUSTOM_OPP_PATH", "").split(":") if entry]
    folders = [entry for entry in entries if entry.name == vendor]
    if environment.get("ASCEND_OPP_PATH"):
        folders.append(Path(environment["ASCEND_OPP_PATH"]) / "vendors" / vendor)
    found = []
    for folder in folders:
        if (folder / "op_api/lib/libcust_opapi.so").is_file():
            manifest = folder / _MANIFEST
            found.append(Package(folder, json.loads(manifest.read_text("utf-8")) if manifest.is_file() else None))
    return found


def check(vendor, socs, environment, say=print):
    """Say what is here and what is missing; True if the operators are installed and match the sources."""
    def report(good, text):
        say(f"{'ok     ' if good else 'missing'}  {text}")
        return good

    usable = builds = True
    try:
        cann = find_cann(environment)
        report(True, f"CANN {cann.version or 'of an unknown version'} at {cann.home}")
        problem = cann_problem(cann)
        builds = problem is None or report(False, problem)
    except ValueError as error:
        usable = builds = report(False, error)
    try:
        socs = socs or find_socs()
        report(True, f"chip: {', '.join(socs)}")
    except ValueError as error:
        usable = report(False, error)
    try:
        report(True, f"MindSpore's builder: {find_builder()}")
    except ValueError as error:
        usable = builds = report(False, error)
    tools = missing_tools()
    builds &= report(not tools, f"not on PATH: {', '.join(tools)}; a build needs them" if tools
                     else "bash, cmake, make, g++")
    kernels = _kernels(place for place, _ in _sources())
    report(True, f"sources: {len(kernels)} operators ({', '.join(kernels)}), sha256 {sources_digest()[:16]}")
    try:
        package = usable_package(socs, environment, vendor)
        report(True, f"package {package.folder}, of these sources, built with CANN {package.manifest['cann']}")
    except ValueError as error:
        usable = report(False, error)
    if usable and not builds:
        say("The package can be used, but not built on this machine.")
    say(NOT_RUN)
    return usable


def usable_package(socs, environment, vendor=VENDOR):
    """The Package that MindSpore finds, if it has these sources and chips. Raises ValueError that says what to do."""
    packages = find_packages(vendor, environment)
    if not packages:
        raise ValueError(f"no package {vendor} in ASCEND_CUSTOM_OPP_PATH and ASCEND_OPP_PATH/vendors: build it with "
                         f"`{_COMMAND}`, then export the line that it prints")
    package = packages[0]
    if package.manifest is None:
        raise ValueError(f"package {package.folder} was not installed by `{_COMMAND}`: which sources it has is "
                         "unknown; build it again")
    if package.manifest["sha256"] != sources_digest():
        raise ValueError(f"package {package.folder} is of other sources (sha256 {package.manifest['sha256'][:16]}): "
                         f"build it again with `{_COMMAND}`")
    absent = sorted(set(socs) - set(package.manifest["socs"]))
    if absent:
        raise ValueError(f"package {package.folder} is for {', '.join(package.manifest['socs'])}, not for "
                         f"{', '.join(absent)}: build it again with `{_COMMAND} --soc "
                         f"{','.join([*package.manifest['socs'], *absent])}`")
    # ops.Custom compiles a function for each operator, against CANN's headers beside ASCEND_OPP_PATH.
    if not environment.get("ASCEND_OPP_PATH"):
        raise ValueError("ASCEND_OPP_PATH is not set, by which MindSpore finds CANN's headers: run `source set_env.sh` "
                         "of CANN")
    if shutil.which("g++") is None:
        raise ValueError("no g++, with which MindSpore compiles its calls of operators: install it")
    return package


def _kernels(places):
    return sorted(Path(place).stem for place in places if place.startswith("op_kernel/") and place.endswith(".cpp"))


def install_base(vendor, install, environment):
    """The folder that gets vendors/<vendor>. Raises ValueError where nothing says which."""
    if install:
        return Path(install).resolve()
    for entry in environment.get("ASCEND_CUSTOM_OPP_PATH", "").split(":"):
        if entry and Path(entry).parts[-2:] == ("vendors", vendor):
            return Path(entry).parents[1].resolve()
    opp = environment.get("ASCEND_OPP_PATH")
    if opp and os.access(opp, os.W_OK):
        return Path(opp).resolve()
    raise ValueError("nowhere to install: neither ASCEND_CUSTOM_OPP_PATH has an entry .../vendors/"
                     f"{vendor} nor is ASCEND_OPP_PATH ({opp or 'not set'}) writable; give --install DIR")


def build(socs, vendor, output, install, environment, say=print):
    """Build the package for the chips and install it; returns the folder that belongs into ASCEND_CUSTOM_OPP_PATH.

    Raises ValueError where something is missing, before anything is built, and where the build fails.
    """
    builder, cann = find_builder(), find_cann(environment)
    problem = cann_problem(cann)
    if problem:
        raise ValueError(problem)
    tools = missing_tools()
    if tools:
        raise ValueError(f"not on PATH: {', '.join(tools)}; install them")
    socs = socs or find_socs()
    base = install_base(vendor, install, environment)
    output = Path(output).resolve()
    for path in (output, base):
        if re.search(r"[^_A-Za-z0-9/.-]", str(path)):
            raise ValueError(f"{path}: MindSpore's builder allows only letters, digits, / _ . - in paths; give others "
                             "with --output and --install")
    for option, folder in (("--output", output), ("--install", base)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{option}: cannot make {folder} ({error.strerror}); give another folder") from error
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{option}: {folder} is not writable; give another folder")
    work = output / "work"
    if work.exists():
        shutil.rmtree(work)
    texts = stage(work)
    chips_of = {kernel: _chips(kernel, texts, socs) for kernel in _kernels(texts)}
    for soc in socs:
        if not any(soc in chips for chips in chips_of.values()):
            raise ValueError(f"--soc {soc}: no operator is for it")
    say(NOT_RUN)
    say(f"building {len(_kernels(texts))} operators for {', '.join(socs)} with CANN {cann.version}; minutes. Log: "
        f"{work}/custom_compiler/build.log")
    # The builder writes beside itself, and runs start.sh of the working directory.
    compiler = work / "custom_compiler"
    compiler.mkdir()
    for name in ("setup.py", "start.sh"):
        shutil.copyfile(builder.parent / name, compiler / name)
    command = [sys.executable, "setup.py", f"--op_host_path={work}/op_host", f"--op_kernel_path={work}/op_kernel",
               f"--vendor_name={vendor}", f"--soc_version={';'.join(socs)}",
               f"--ascend_cann_package_path={cann.home}", f"--install_path={base}"]
    done = subprocess.run(command, cwd=compiler, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"MindSpore's builder failed ({' '.join(command)}):\n{(done.stdout + done.stderr)[-6000:]}")
    for package in sorted((compiler / "CustomProject/build_out").glob("*.run")):
        shutil.copy2(package, output)
        say(f"package: {output / package.name}")
    folder = base / "vendors" / vendor
    _verify(folder, chips_of)
    manifest = {"sha256": sources_digest(), "socs": socs, "cann": cann.version, "vendor": vendor}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    say(f"installed: {folder}")
    say(f"export ASCEND_CUSTOM_OPP_PATH={folder}:$ASCEND_CUSTOM_OPP_PATH")
    return folder


def _verify(folder, chips_of):
    """What MindSpore and CANN will look for in an installed package is there. chips_of: {kernel: its chips}."""
    expected = ["op_api/lib/libcust_opapi.so", *(f"op_api/include/aclnn_{kernel}.h" for kernel in chips_of)]
    described = {}
    for soc in sorted({soc for chips in chips_of.values() for soc in chips}):
        path = f"op_impl/ai_core/tbe/config/{soc}/aic-{soc}-ops-info.json"
        expected.append(path)
        if (folder / path).is_file():
            operators = json.loads((folder / path).read_text("utf-8")).values()
            described[soc] = {operator["opFile"]["value"] for operator in operators}
    absent = [path for path in expected if not (folder / path).is_file()]
    absent += [f"{kernel} for {soc}" for kernel, chips in chips_of.items() for soc in chips
               if soc in described and kernel not in described[soc]]
    if absent:
        raise ValueError(f"the build ended without an error, but {folder} lacks {', '.join(absent)}")


def _chips(kernel, texts, socs):
    """Those of socs that the operator's definition adds, in its op_host source or what that includes."""
    found, waiting = set(), [f"op_host/{kernel}.cpp"]
    read = set()
    while waiting:
        place = waiting.pop()
        if place in texts and place not in read:
            read.add(place)
            found |= set(re.findall(r'AddConfig\("(\w+)"', texts[place]))
            waiting += [f"op_host/{name}" for name in re.findall(r'#include "([^"]+)"', texts[place])]
    return [soc for soc in socs if soc in found]


def main(arguments=None):
    parser = argparse.ArgumentParser(prog=_COMMAND, description="Build and install the AscendC operators.",
                                     epilog=NOT_RUN)
    parser.add_argument("--check", action="store_true", help="say what is here and what is missing; builds nothing")
    parser.add_argument("--soc", help=f"chips, with commas, of {', '.join(SOCS)} (default: this machine's)")
    parser.add_argument("--vendor", default=VENDOR, help="name of the package's folder (default: %(default)s)")
    parser.add_argument("--output", default="build/ascend_kernels",
                        help="folder that gets the .run package (default: %(default)s)")
    parser.add_argument("--install", help="folder that gets vendors/VENDOR (default: that of the entry in "
                                          "ASCEND_CUSTOM_OPP_PATH, else ASCEND_OPP_PATH)")
    options = parser.parse_args(arguments)
    socs = options.soc.split(",") if options.soc else []
    unknown = sorted(set(socs) - set(SOCS))
    if unknown:
        parser.error(f"--soc {options.soc}: unknown {', '.join(unknown)}; the chips are {', '.join(SOCS)}")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", options.vendor):
        parser.error(f"--vendor {options.vendor}: expected letters, digits and _, a letter first")
    environment = dict(os.environ)
    if options.check:
        return 0 if check(options.vendor, socs, environment) else 1
    try:
        build(socs, options.vendor, options.output, options.install, environment)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
