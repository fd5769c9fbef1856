"""Building the library: portable code, a machine without g++, two processes at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def _build(tmp_path, **environment):
    code = "from mindpangu.ops.cpu import build; print(build.build('portable'))"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path), **environment})


def test_without_a_compiler_the_error_says_what_to_install(tmp_path):
    process = _build(tmp_path, PATH=str(tmp_path))
    _, stderr = process.communicate()
    assert process.returncode != 0 and "apt install g++" in stderr and "run.kernels=reference" in stderr


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.long
def test_two_processes_at_once_build_it_once_and_a_third_finds_it(cache):
    both = [_build(cache) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("built in" in output for output in outputs) == [False, True]
    third = _build(cache)
    output = third.communicate()[0]
    assert "built in" not in output and Path(output.strip()).is_file()
    assert output.strip() in outputs[0] and output.strip() in outputs[1]


@pytest.mark.long
def test_the_portable_code_computes_the_same(pytestconfig, cache):
    if pytestconfig.getoption("--cpu-level") == "portable":
        pytest.skip("this run is the portable one")
    files = ["test_cross_entropy.py", "test_linear.py", "test_rms_norm.py", "test_rope.py", "test_swiglu.py",
             "cpu/test_plugin.py"]
    command = [sys.executable, "-m", "pytest", "-q", "--cpu-level", "portable", "-k", "not reference"]
    done = subprocess.run([*command, *(str(ROOT / "tests/ops" / file) for file in files)], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {"XDG_CACHE_HOME": str(cache)})
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    process = _build(tmp_path, XDG_CACHE_HOME=str(tmp_path / "file"))
    _, stderr = process.communicate()
    assert process.returncode != 0 and "cannot write the CPU kernels to" in stderr and "XDG_CACHE_HOME" in stderr
