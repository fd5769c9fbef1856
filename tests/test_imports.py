"""Who may import whom: DESIGN's rule, read from the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mindpangu"
OPERATORS = PACKAGE.parent / "ascend_kernels"
ALLOWED = {
    "config": set(),
    "data": {"config"},
    "rewards": {"data"},
    "ops": set(),
    "model": {"ops", "data", "config"},
    "distillation": {"model", "data", "rewards", "config"},
    "benchmarks": {"model", "data", "rewards", "config"},
    "trainers": {"model", "data", "rewards", "config", "ops", "distillation"},
    # ops: the choice of kernels when a process starts, and the optimizer's update; ascend_kernels: the operators' host
    # build, which that choice hands to ops, and whether a device has them.
    "runtime": {"config", "ops", "ascend_kernels"},
}
# Verifiable is what the verifiers say; nothing that they import is this file's.
ALSO_ALLOWED = {"data/attributes.py": {"rewards"}}
NEVER_MINDSPORE = ("config", "data", "rewards")
# Without MindSpore until a function needs it; data/row_files.py writes MindRecord with it.
NUMPY_ONLY = ("data/row_files.py", "distillation/cache.py", "model/memory.py", "model/mindformers.py",
              "model/mindir.py", "model/runner.py", "model/size.py", "model/uniforms.py", "model/weights.py",
              "runtime/checkpoint.py", "runtime/metrics.py", "curate.py", "doctor.py", "pipeline.py", "train.py")
ENTRY_POINTS = {"train", "rollout", "annotate", "chat", "serve", "evaluate", "export", "doctor"}


def _imports(path, top_level_only=False):
    """Absolute dotted names that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["mindpangu", *path.relative_to(PACKAGE).parts[:-1]]
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, node.module] if node.module else base)
            if not node.module or node.module == "mindpangu":
                yield from (".".join([*base, *([node.module] if node.module else []), a.name]) for a in node.names)


def _files():
    return sorted(PACKAGE.rglob("*.py"))


def _unit(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_place_allows(path):
    unit = _unit(path)
    ours = {name.split(".")[1] for name in _imports(path) if name.startswith("mindpangu.")}
    assert not ours & (ENTRY_POINTS - {unit}), "nobody imports an entry point"
    if unit in ALLOWED:
        assert ours <= ALLOWED[unit] | {unit} | ALSO_ALLOWED.get(str(path.relative_to(PACKAGE)), set())


@pytest.mark.parametrize("path", sorted(OPERATORS.rglob("*.py")), ids=lambda path: str(path.relative_to(OPERATORS)))
def test_the_operators_stand_alone(path):
    """They have two names, ascend_kernels and mindpangu.ascend_kernels, and are built where MindSpore is not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    assert not {"mindspore", "mindpangu", "ascend_kernels"} & {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_mindspore_stays_out_of_what_runs_without_it(path):
    relative = str(path.relative_to(PACKAGE))
    if relative in NUMPY_ONLY:
        assert not any(name.split(".")[0] == "mindspore" for name in _imports(path, top_level_only=True))
    elif _unit(path) in NEVER_MINDSPORE:
        assert not any(name.split(".")[0] == "mindspore" for name in _imports(path))


def test_mindformers_is_imported_where_its_model_is_built_and_late():
    """The import takes 5 s and writes files."""
    importing = {str(path.relative_to(PACKAGE)) for path in _files()
                 if any(name.split(".")[0] == "mindformers" for name in _imports(path))}
    assert importing == {"distillation/mindformers.py"}
    path = PACKAGE / "distillation" / "mindformers.py"
    assert not any(name.split(".")[0] == "mindformers" for name in _imports(path, top_level_only=True))


def test_curation_imports_numpy_and_small_libraries_only():
    code = ("import sys, mindpangu.curate; "
            "heavy = {'mindspore', 'torch', 'mindformers', 'scipy', 'datasketch', 'ray', 'pyarrow', 'pandas'}; "
            "assert not heavy & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_checking_a_recipe_imports_no_mindspore():
    code = ("import sys, mindpangu.pipeline, mindpangu.tools.report; from mindpangu.config import load_recipe; "
            "load_recipe(['recipe=kd_student']); assert 'mindspore' not in sys.modules and 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)
