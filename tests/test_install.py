"""The package as pip installs it: recipes and tools inside, from any folder, on supported Pythons only."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds what `pip install .` puts into site-packages, built from a copy of the sources."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("mindpangu", "recipes", "tools", "ascend_kernels", "setup.py", "pyproject.toml", "README.md",
                 "LICENSE"):
        subprocess.run(["cp", "-a", ROOT / name, source], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target",
                    target, source], check=True, cwd=source)
    return target


def test_recipes_and_tools_travel_inside_the_package(installed, tmp_path):
    for path in ("config.yaml", "recipe/kd_student.yaml", "at_scale/tiny/kd_student.yaml", "RESULTS.md"):
        assert (installed / "mindpangu/recipes" / path).read_bytes() == (ROOT / "recipes" / path).read_bytes()
    environment = os.environ | {"PYTHONPATH": str(installed)}
    code = "import mindpangu.config as config; print(config.__file__, config.recipes_folder())"
    where = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True,
                           text=True, check=True)
    assert where.stdout.count(str(installed)) == 2
    shown = subprocess.run([sys.executable, "-m", "mindpangu.train", "--cfg", "job"], cwd=tmp_path, env=environment,
                           capture_output=True, text=True, check=True)
    assert "recipe: kd_student" in shown.stdout
    for arguments in (["report", "--help"], ["edge_latency", "openpangu_1b"], ["plan"]):
        subprocess.run([sys.executable, "-m", f"mindpangu.tools.{arguments[0]}", *arguments[1:]], cwd=tmp_path,
                       env=environment, check=True, capture_output=True)
    assert list(tmp_path.iterdir()) == []


def test_the_ascendc_operators_travel_inside_the_package(installed, tmp_path):
    suffixes = (".cpp", ".h", ".cc", ".py", ".md")
    sources = [path for path in (ROOT / "ascend_kernels").rglob("*") if path.suffix in suffixes]
    assert len(sources) > 40
    for path in sources:
        assert (installed / "mindpangu/ascend_kernels" / path.relative_to(ROOT / "ascend_kernels")).is_file(), path
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, "-m", "mindpangu.ascend_kernels.build", "--check"], cwd=tmp_path,
                          env=environment, capture_output=True, text=True)
    assert "pangu_topk_kl" in done.stdout
    assert "Not run on a device" in done.stdout


@pytest.mark.parametrize("version", [(3, 9), (3, 12), (3, 14)])
def test_an_unsupported_python_gets_an_error_that_names_the_supported_ones(version):
    code = f"import sys; sys.version_info = {(*version, 0)}; exec(open('setup.py').read())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Python 3.10 or 3.11" in done.stderr and f"this is Python {version[0]}.{version[1]}" in done.stderr
