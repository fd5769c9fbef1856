"""Every command in README's bash blocks runs, in order, in one folder, at scale=smoke."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
# What README's first screen says to type is proved by installing: make run, make test and pip's lines.
INSTALLS = ("make ", "pip ", "pytest")
TRAINS = ("mindpangu.train", "mindpangu.curate", "mindpangu.rollout", "mindpangu.annotate")


def _commands():
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line and not line.startswith(INSTALLS)))


def test_readme_shows_the_two_commands_first():
    first_screen = README.read_text(encoding="utf-8")[:1800]
    for command in ("make run", "make test", "pip install -e .", "python -m mindpangu.train recipe=kd_student",
                    'pip install -e ".[dev]"', "pytest"):
        assert command in first_screen


@pytest.fixture(scope="module")
def folder(smoke, tmp_path_factory):
    """README's commands build on each other, and on the default recipe that `make run` ran."""
    folder = tmp_path_factory.mktemp("readme")
    subprocess.run(["cp", "-a", smoke[0] / "runs", folder], check=True)
    return folder


@pytest.mark.parametrize("command", _commands())
def test_a_command_in_readme_runs(folder, command):
    words = shlex.split(command)
    assert words[0] == "python"
    if words[2] in TRAINS and "--help" not in words:
        first = next((place for place, word in enumerate(words) if "=" in word), len(words))
        words.insert(first, "scale=smoke")  # beside the overrides: argparse takes them in one run only
    line = " ".join([shlex.quote(sys.executable), *(word if "*" in word else shlex.quote(word) for word in words[1:])])
    done = subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_the_mindformers_program_in_readme_trains(tmp_path):
    programs = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    program = next(program for program in programs if "mindformers" in program)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert float(done.stdout.split()[-1].strip("[]")) < 5.0  # from 5.55, the logarithm of 256
