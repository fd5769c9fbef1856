"""The report on machines that are made up, by real processes: programs on PATH, packages on the path."""

import json
import os
import subprocess
import sys

import pytest

CHIP = """\
| {number}     {name:<20}| {health:<14}| 93.6        40                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3322 / 65536         |
"""


@pytest.fixture
def machine(tmp_path):
    """A folder with bin/ (first on PATH) and site/ (first on the path of Python)."""
    for name in ("bin", "site", "work"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def broken(machine):
    """The same, with a MindSpore that fails at once: quick, for what does not depend on it."""
    return _with_mindspore(machine, "raise ImportError('libascendcl.so: cannot open shared object file')")


def _with_mindspore(machine, text):
    (machine / "site/mindspore").mkdir()
    (machine / "site/mindspore/__init__.py").write_text(text)
    return machine


def _with_version(machine, package, version):
    folder = machine / f"site/{package}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def _with_npu_smi(machine, chips, returncode=0):
    rows = chips if isinstance(chips, str) else "".join(CHIP.format(number=i, name=name, health=health)
                                                        for i, (name, health) in enumerate(chips))
    (machine / "shown").write_text(f"| npu-smi 24.1.0                   Version: 24.1.0            |\n{rows}")
    tool = machine / "bin/npu-smi"
    tool.write_text(f"#!/bin/sh\ncat {machine}/shown\nexit {returncode}\n")
    tool.chmod(0o755)


def _examine(machine, *arguments, path=None, **environment):
    """Exit code, and {name: check} of the JSON report."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("ASCEND")}
    variables |= {"PATH": path or f"{machine / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(machine / "site"),
                  **environment}
    done = subprocess.run([sys.executable, "-m", "mindpangu.doctor", "--json", *arguments], cwd=machine / "work",
                          env=variables, capture_output=True, text=True)
    assert done.stderr == "" and list((machine / "work").iterdir()) == []
    report = json.loads(done.stdout)
    assert report["ok"] == (done.returncode == 0) == all(check["state"] != "missing" for check in report["checks"])
    return done.returncode, {check["name"]: check for check in report["checks"]}


def test_a_machine_that_trains_is_found_in_order(machine, cpu_library):
    code, found = _examine(machine, "--device", "CPU")
    assert code == 0
    for name in ("Python", "numpy", "packages", "memory", "cores", "runs folder", "CPU kernels", "MindSpore",
                 "MindSpore computes", "mindformers"):
        assert found[name]["state"] == "ok", found[name]
    assert found["MindSpore"]["found"].startswith("2.9.0")
    assert found["Ascend driver"]["state"] == found["CANN"]["state"] == "note"


def test_the_report_for_people_ends_with_the_verdict_and_imports_no_mindspore(broken):
    code = ("import sys; from mindpangu.doctor import main; sys.argv = ['doctor', '--device', 'CPU']; code = main(); "
            "assert 'mindspore' not in sys.modules and 'numpy' not in sys.modules; sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=broken / "work",
                          env=os.environ | {"PYTHONPATH": str(broken / "site")})
    assert done.returncode == 1 and done.stderr == ""
    assert done.stdout.splitlines()[-1] == "training on CPU: what is needed is not all there: MindSpore"
    assert "missing  MindSpore: ImportError: libascendcl.so: cannot open" in done.stdout
    assert "\n         -> install the pair again: pip install mindspore==2.9.0 mindformers==1.9.0" in done.stdout


@pytest.mark.parametrize("text, complaint", [
    ("raise ImportError('libmindspore_core.so: undefined symbol')", "undefined symbol"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with -11"),
    ("import sys; sys.exit('no licence')", "no licence (the process ended with 1)"),
    ("__version__ = '2.9.0'\n__path__ = ['somewhere']", "cannot import name 'Tensor'"),
])
def test_a_broken_mindspore_is_a_line_that_says_what_it_said(machine, text, complaint):
    code, found = _examine(_with_mindspore(machine, text), "--device", "CPU")
    failed = next(check for check in found.values() if check["state"] == "missing")
    assert code == 1 and complaint in failed["found"] and failed["advice"]
    assert found["mindformers"]["found"] == "not tried"
    assert found["code sandbox"]["found"], "the rest is examined all the same"


def test_versions_that_are_not_the_tested_ones_are_named(broken):
    _with_version(broken, "numpy", "2.1.0")
    code, found = _examine(broken, "--device", "CPU")
    assert code == 1 and found["numpy"]["state"] == "missing"
    assert found["numpy"]["found"] == "2.1.0" and "numpy<2" in found["numpy"]["advice"]


def test_a_mindspore_of_another_version_is_refused(machine):
    _with_version(machine, "mindspore", "2.5.0")
    code, found = _examine(machine, "--device", "CPU")
    assert code == 1 and found["MindSpore"]["state"] == "missing" and "tested is 2.9.0" in found["MindSpore"]["advice"]


def test_a_machine_without_a_compiler_is_told_what_to_install(broken, tmp_path):
    code, found = _examine(broken, "--device", "CPU", path=str(broken / "bin"))
    assert code == 1 and found["CPU kernels"]["state"] == "missing"
    assert "apt install g++" in found["CPU kernels"]["advice"]
    _, found = _examine(broken, "--device", "Ascend", path=str(broken / "bin"))
    assert found["CPU kernels"]["state"] == "note", "an NPU needs no CPU kernels"


def test_kernels_that_are_not_built_yet_are_promised_not_built(broken):
    (broken / "site/mindspore/__init__.py").write_text("")
    code, found = _examine(broken, "--device", "CPU", XDG_CACHE_HOME=str(broken / "cache"))
    assert found["CPU kernels"]["state"] == "ok" and "not built yet" in found["CPU kernels"]["found"]
    assert not (broken / "cache").exists()


def test_a_runs_folder_that_cannot_be_made_is_named(broken):
    (broken / "file").write_text("")
    code, found = _examine(broken, "--device", "CPU", "--runs", str(broken / "file/runs"))
    assert code == 1 and found["runs folder"]["state"] == "missing"
    assert str(broken / "file") in found["runs folder"]["found"] and "run.root" in found["runs folder"]["advice"]


@pytest.mark.parametrize("chips, returncode, driver, npus", [
    ([("910B3", "OK")] * 8, 0, "24.1.0", ("ok", "8 x 910B3", "")),
    ([("910B3", "OK"), ("910B3", "Alarm")], 0, "24.1.0", ("note", "2 x 910B3", "NPU 1 is Alarm")),
    ([("310B4", "OK")], 0, "24.1.0", ("note", "1 x 310B4", "training is meant for 910B (Atlas 800T A2); a 310 runs "
                                                           "exports")),
    ("dcmi module initialize failed. ret is -8005\n", 255, "dcmi module initialize failed", None),
])
def test_what_npu_smi_says_decides(broken, chips, returncode, driver, npus):
    _with_npu_smi(broken, chips, returncode)
    code, found = _examine(broken)
    assert code == 1 and driver in found["Ascend driver"]["found"]
    assert found["Ascend driver"]["state"] == ("ok" if npus else "missing")
    assert ("NPUs" in found) == (npus is not None)
    if npus:
        assert tuple(found["NPUs"][key] for key in ("state", "found", "advice")) == npus
    # npu-smi is what makes it a machine that trains on Ascend.
    assert found["CANN"]["state"] == "missing" and "Ascend-cann-toolkit" in found["CANN"]["advice"]


@pytest.mark.parametrize("version, state", [("8.5.0", "ok"), ("7.0.0", "missing")])
def test_cann_is_found_and_has_to_be_a_known_one(broken, version, state):
    home = broken / "cann"
    (home / "compiler").mkdir(parents=True)
    (home / "compiler/version.info").write_text(f"Version={version}\n")
    _, found = _examine(broken, "--device", "Ascend", ASCEND_HOME_PATH=str(home))
    assert found["CANN"]["state"] == state and found["CANN"]["found"] == f"{version} at {home}"
    assert ("8.5" in found["CANN"]["advice"]) == (state == "missing")
    assert found["CANN's environment"]["state"] == "missing" and "set_env.sh" in found["CANN's environment"]["advice"]
    _, found = _examine(broken, "--device", "Ascend", ASCEND_HOME_PATH=str(home), ASCEND_OPP_PATH=str(home / "opp"))
    assert "CANN's environment" not in found


def test_without_an_npu_training_on_ascend_lacks_driver_and_cann(broken):
    code, found = _examine(broken, "--device", "Ascend")
    assert code == 1
    assert found["Ascend driver"]["state"] == found["CANN"]["state"] == "missing"
