"""Building the package of operators: what a machine lacks is said, MindSpore's builder gets what it takes, and what it
installs is what MindSpore looks for. CANN is made up here; nothing ran on a device.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ascend_kernels import build
from ascend_kernels.host.tiling import compile_op

ROOT = Path(build.__file__).parents[1]
MINDSPORE = Path(importlib.util.find_spec("mindspore").origin).parent
REAL_BUILDER = MINDSPORE / "lib/plugin/ascend/custom_compiler/setup.py"
HEADERS = ROOT / "ascend_kernels/host/include"  # CANN's, as far as the sources use them
KERNELS = sorted(path.stem for path in ROOT.glob("ascend_kernels/*/op_kernel/*.cpp"))

# A project of CANN's template in small: build.sh makes a .run that installs what CANN's would, without compiling.
BUILD_SH = r"""
preset() { grep -A 3 "\"$1\"" CMakePresets.json | sed -n 's/.*"value": "\(.*\)".*/\1/p'; }
vendor=$(preset vendor_name)
socs=$(preset ASCEND_COMPUTE_UNIT)
mkdir build_out
{
  echo "folder=\$ASCEND_CUSTOM_OPP_PATH/vendors/$vendor"
  echo 'mkdir -p $folder/op_api/lib $folder/op_api/include && touch $folder/op_api/lib/libcust_opapi.so'
  for source in op_kernel/*.cpp; do
    name=$(basename $source .cpp)
    echo "touch \$folder/op_api/include/aclnn_$name.h"
  done
  for soc in ${socs//;/ }; do
    echo "mkdir -p \$folder/op_impl/ai_core/tbe/config/$soc"
    text="{"
    for source in op_kernel/*.cpp; do
      name=$(basename $source .cpp)
      text="$text\"$name\": {\"opFile\": {\"value\": \"$name\"}}, "
    done
    echo "echo '${text%, }}' > \$folder/op_impl/ai_core/tbe/config/$soc/aic-$soc-ops-info.json"
  done
} > build_out/custom_opp_made_up.run
"""


@pytest.fixture
def cann(tmp_path):
    """The folder of a made-up CANN 8.5.0."""
    home = tmp_path / "cann"
    templates = home / "tools/op_project_templates/ascendc"
    for folder in ("op_host", "op_kernel"):
        (templates / "customize" / folder).mkdir(parents=True)
        (templates / "customize" / folder / "example.cpp").touch()  # the builder takes examples out
    (templates / "common/util").mkdir(parents=True)
    variables = {name: {"type": "STRING", "value": ""} for name in ("ASCEND_COMPUTE_UNIT", "ASCEND_CANN_PACKAGE_PATH",
                                                                    "vendor_name")}
    (templates / "customize/CMakePresets.json").write_text(json.dumps({"configurePresets": [
        {"cacheVariables": variables}]}))
    (templates / "customize/build.sh").write_text(BUILD_SH)
    (home / "compiler/ccec_compiler/bin").mkdir(parents=True)
    (home / "compiler/ccec_compiler/bin/ccec").touch()
    (home / "x86_64-linux").mkdir()
    (home / "x86_64-linux/ascend_toolkit_install.info").write_text("package_name=Ascend-cann-toolkit\nversion=8.5.0\n")
    return home


def environment(**variables):
    """Only what a build needs, and no CANN."""
    return {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": os.environ["HOME"],
            "PYTHONPATH": str(ROOT), **{name: str(value) for name, value in variables.items()}}


def run_module(*arguments, env, cwd=None):
    return subprocess.run([sys.executable, "-m", "ascend_kernels.build", *arguments], cwd=cwd, env=env,
                          capture_output=True, text=True)


# ---- The machine -----------------------------------------------------------------------------------------------------

def test_check_says_what_this_machine_lacks_and_what_to_do():
    if any(home.is_dir() for home in build.DEFAULT_HOMES) or shutil.which("npu-smi"):
        pytest.skip("this machine has CANN")
    done = run_module("--check", env=environment())
    assert done.returncode == 1 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    for start, words in (("missing  no CANN: ASCEND_HOME_PATH is not set", ["Ascend-cann-toolkit", "set_env.sh"]),
                         ("missing  no npu-smi", ["--soc ascend910b", "--soc ascend310b"]),
                         ("ok       MindSpore's builder", [str(REAL_BUILDER)]),
                         (f"ok       sources: {len(KERNELS)} operators", KERNELS),
                         ("missing  no package pangu", ["python -m ascend_kernels.build", "export"])):
        line, = (line for line in lines if line.startswith(start))
        assert all(word in line for word in words), line
    assert lines[-1] == build.NOT_RUN and "Not run on a device" in lines[-1]


def test_check_is_content_with_an_installed_package_of_these_sources(tmp_path, cann):
    package = tmp_path / "opp/vendors/pangu"
    (package / "op_api/lib").mkdir(parents=True)
    (package / "op_api/lib/libcust_opapi.so").touch()
    manifest = {"sha256": build.sources_digest(), "socs": ["ascend910b"], "cann": "8.5.0", "vendor": "pangu"}
    (package / "mindpangu_sources.json").write_text(json.dumps(manifest))
    env = environment(ASCEND_HOME_PATH=cann, ASCEND_OPP_PATH=tmp_path / "opp")
    done = run_module("--check", "--soc", "ascend910b", env=env)
    assert done.returncode == 0, done.stdout
    assert f"ok       package {package}, of these sources, built with CANN 8.5.0" in done.stdout.splitlines()
    assert run_module("--check", "--soc", "ascend310b", env=env).returncode == 1


@pytest.mark.parametrize(("files", "version"), [
    ({"x86_64-linux/ascend_toolkit_install.info": "package_name=x\nversion=8.2.RC1\n"}, "8.2.RC1"),
    ({"aarch64-linux/ascend_toolkit_install.info": "version=8.3.RC2\n"}, "8.3.RC2"),
    ({"version.cfg": "# version: 1.0\nruntime_running_version=[9.0.0.1.8:9.0.0]\n"}, "9.0.0"),
    ({"compiler/version.info": "Version=7.6.0.1.220\nversion_dir=8.5.0\n"}, "8.5.0"),
    ({"compiler/version.info": "Version=8.5.1\n"}, "8.5.1"),
    ({"compiler/version.info": "nothing\n"}, None),
    ({}, None),
])
@pytest.mark.parametrize("variable", ["ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"])
def test_the_version_of_cann_is_found_in_each_of_its_files(tmp_path, files, version, variable):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert build.find_cann({variable: str(tmp_path)}) == (tmp_path, version)


def test_a_cann_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"no CANN: ASCEND_HOME_PATH={tmp_path}/gone is not a folder"):
        build.find_cann({"ASCEND_HOME_PATH": f"{tmp_path}/gone"})


def set_version(home, version):
    (home / "x86_64-linux/ascend_toolkit_install.info").write_text(f"version={version}\n")


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda home: set_version(home, "7.0.0"), ["CANN 7.0.0", "not one of 8.2, 8.3"]),
    (lambda home: set_version(home, "8.20.0"), ["CANN 8.20.0", "not one of"]),
    (lambda home: shutil.rmtree(home / "x86_64-linux"), ["none of its files", "install it again"]),
    (lambda home: shutil.rmtree(home / "tools"), ["has no project template", "it is the runtime"]),
    (lambda home: shutil.rmtree(home / "tools/op_project_templates/ascendc/common"), ["has no project template"]),
    (lambda home: shutil.rmtree(home / "compiler"), ["has no kernel compiler"]),
])
def test_a_cann_that_cannot_build_is_refused_before_anything_is_made(tmp_path, cann, spoil, words):
    assert build.cann_problem(build.find_cann({"ASCEND_HOME_PATH": str(cann)})) is None
    spoil(cann)
    done = run_module("--soc", "ascend910b", "--output", str(tmp_path / "out"), "--install", str(tmp_path / "opp"),
                      env=environment(ASCEND_HOME_PATH=cann))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "opp").exists()


@pytest.mark.parametrize(("shown", "socs"), [("| 0     910B3               | OK", ["ascend910b"]),
                                             ("| 0     Ascend910B2C        | OK", ["ascend910b"]),
                                             ("| 0     310B1               | OK", ["ascend310b"]),
                                             ("| 0     310B4 |\n| 1     910B1 |", ["ascend910b", "ascend310b"])])
def test_the_chip_is_the_one_that_npu_smi_shows(tmp_path, monkeypatch, shown, socs):
    tool = tmp_path / "npu-smi"
    tool.write_text(f"#!/bin/sh\ncat <<END\n{shown}\nEND\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert build.find_socs() == socs


@pytest.mark.parametrize("shown", ["| 0     310P3               | OK", "| 0     910A |", "no devices"])
def test_a_chip_that_the_operators_are_not_for_is_refused(tmp_path, monkeypatch, shown):
    tool = tmp_path / "npu-smi"
    tool.write_text(f"#!/bin/sh\necho '{shown}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ValueError, match="names no chip of ascend910b, ascend310b"):
        build.find_socs()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--soc", "ascend910"], "--soc ascend910: unknown ascend910; the chips are ascend910b, ascend310b"),
    (["--soc", "ascend910b,310b"], "unknown 310b"),
    (["--vendor", "our operators"], "--vendor our operators: expected letters, digits and _"),
])
def test_arguments_that_mean_nothing_are_refused(arguments, message):
    done = run_module(*arguments, env=environment())
    assert done.returncode == 2 and message in done.stderr


def test_the_help_says_that_nothing_ran_on_a_device():
    shown = " ".join(run_module("--help", env=environment()).stdout.split())
    assert build.NOT_RUN in shown


# ---- The sources -----------------------------------------------------------------------------------------------------

def test_staged_files_find_their_includes_beside_them_or_in_cann(tmp_path):
    texts = build.stage(tmp_path)
    assert {place for place in texts if place.endswith(".cpp")} >= {f"op_kernel/{kernel}.cpp" for kernel in KERNELS}
    for place, text in texts.items():
        path = tmp_path / place
        assert path.read_text() == text
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.MULTILINE):
            assert (path.parent / name).is_file() or (HEADERS / name).is_file(), f"{place} includes {name}"


def test_every_operator_has_one_definition_and_a_kernel_of_its_name(tmp_path):
    texts = build.stage(tmp_path)
    sources = [path for path in ROOT.glob("ascend_kernels/*/op_host/*.cpp")]
    kernels = {source.stem: compile_op(source).definition() for source in sources}
    assert set(kernels) == set(KERNELS)
    for stem, definition in kernels.items():
        assert definition["kernel"] == stem
        assert f"void {stem}(" in " ".join(texts[f"op_kernel/{stem}.cpp"].split())
        assert build._chips(stem, texts, build.SOCS) == [soc for soc in build.SOCS if soc in definition["socs"]]


def test_two_files_of_one_name_are_refused(tmp_path, monkeypatch):
    for operator in ("one", "other"):
        (tmp_path / f"root/{operator}/op_kernel").mkdir(parents=True)
        (tmp_path / f"root/{operator}/op_kernel/tile.h").touch()
    monkeypatch.setattr(build, "_ROOT", tmp_path / "root")
    with pytest.raises(ValueError, match=r"one/op_kernel/tile\.h and .*other/op_kernel/tile\.h have the same name"):
        build.stage(tmp_path / "staged")


# ---- The build -------------------------------------------------------------------------------------------------------

def test_mindspores_own_builder_builds_and_installs_what_it_is_given(tmp_path, cann):
    """The real builder in the wheel, with CANN's project made up: nothing is compiled."""
    output, base = tmp_path / "out", tmp_path / "opp"
    done = run_module("--soc", "ascend910b,ascend310b", "--output", str(output), "--install", str(base),
                      "--vendor", "ours", env=environment(ASCEND_HOME_PATH=cann))
    assert done.returncode == 0, done.stdout + done.stderr
    folder = base / "vendors/ours"
    lines = done.stdout.splitlines()
    assert lines[0] == build.NOT_RUN
    assert lines[-1] == f"export ASCEND_CUSTOM_OPP_PATH={folder}:$ASCEND_CUSTOM_OPP_PATH"
    assert (output / "custom_opp_made_up.run").is_file()
    project = output / "work/custom_compiler/CustomProject"
    for place in build.stage(tmp_path / "staged"):
        assert (project / place).read_bytes() == (tmp_path / "staged" / place).read_bytes()
    assert not list(project.glob("*/example.cpp"))
    variables = json.loads((project / "CMakePresets.json").read_text())["configurePresets"][0]["cacheVariables"]
    assert {name: variable["value"] for name, variable in variables.items()} == {
        "ASCEND_COMPUTE_UNIT": "ascend910b;ascend310b", "ASCEND_CANN_PACKAGE_PATH": str(cann), "vendor_name": "ours"}
    manifest = json.loads((folder / "mindpangu_sources.json").read_text())
    assert manifest == {"sha256": build.sources_digest(), "socs": ["ascend910b", "ascend310b"], "cann": "8.5.0",
                        "vendor": "ours"}
    found = build.usable_package(["ascend310b"], {"ASCEND_CUSTOM_OPP_PATH": str(folder), "ASCEND_OPP_PATH": "/opp"},
                                 "ours")
    assert found == (folder, manifest)
    # Once more, over what is there.
    done = run_module("--soc", "ascend910b", "--output", str(output), "--vendor", "ours",
                      env=environment(ASCEND_HOME_PATH=cann, ASCEND_CUSTOM_OPP_PATH=folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((folder / "mindpangu_sources.json").read_text())["socs"] == ["ascend910b"]


FAKE_BUILDER = """
import json, os, sys
json.dump({"arguments": sys.argv[1:], "folder": os.getcwd(), "files": sorted(os.listdir("."))}, open(RECORD, "w"))
sys.exit("compiler says no")
"""
PARSE = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("builder", sys.argv.pop(1))
builder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builder)
config = builder.get_config()
builder.CustomOOC(config).check_args()
print(json.dumps(vars(config)))
"""


def test_the_builders_arguments_are_those_that_it_parses_and_its_failure_is_shown(tmp_path, cann, monkeypatch):
    fake = tmp_path / "builder"
    fake.mkdir()
    (fake / "setup.py").write_text(f"RECORD = {str(tmp_path / 'record.json')!r}\n{FAKE_BUILDER}")
    (fake / "start.sh").touch()
    monkeypatch.setattr(build, "find_builder", lambda: fake / "setup.py")
    output, base = tmp_path / "out", tmp_path / "opp"
    with pytest.raises(ValueError, match=r"MindSpore's builder failed \(.*setup\.py(.|\n)*compiler says no"):
        build.build(["ascend910b", "ascend310b"], "pangu", output, base, environment(ASCEND_HOME_PATH=cann), print)
    record = json.loads((tmp_path / "record.json").read_text())
    work = output / "work"
    assert record["folder"] == str(work / "custom_compiler") and record["files"] == ["setup.py", "start.sh"]
    assert record["arguments"] == [
        f"--op_host_path={work}/op_host", f"--op_kernel_path={work}/op_kernel", "--vendor_name=pangu",
        "--soc_version=ascend910b;ascend310b", f"--ascend_cann_package_path={cann}", f"--install_path={base}"]
    done = subprocess.run([sys.executable, "-c", PARSE, REAL_BUILDER, *record["arguments"]], capture_output=True,
                          text=True, env=environment(GLOG_v=3))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "op_host_path": f"{work}/op_host", "op_kernel_path": f"{work}/op_kernel", "vendor_name": "pangu",
        "soc_version": "ascend910b;ascend310b", "ascend_cann_package_path": str(cann), "install_path": str(base),
        "install": False, "clear": False}


@pytest.mark.parametrize(("arguments", "variables", "words"), [
    ([], {}, ["nowhere to install", "ASCEND_OPP_PATH (not set)", "--install DIR"]),
    ([], {"ASCEND_CUSTOM_OPP_PATH": "/opp/vendors/others"}, ["nowhere to install", ".../vendors/pangu"]),
    ([], {"ASCEND_OPP_PATH": "/gone/opp"}, ["nowhere to install", "ASCEND_OPP_PATH (/gone/opp)"]),
    (["--install", "{file}/opp"], {}, ["--install: cannot make", "Not a directory"]),
    (["--install", "{folder}/with space"], {}, ["/opp/with space", "allows only letters", "--install"]),
    (["--output", "{file}/out", "--install", "{folder}"], {}, ["--output: cannot make"]),
])
def test_a_folder_that_cannot_be_used_is_named(tmp_path, cann, arguments, variables, words):
    (tmp_path / "file").touch()
    arguments = [text.format(file=tmp_path / "file", folder=tmp_path / "opp") for text in arguments]
    done = run_module("--soc", "ascend910b", *arguments, env=environment(ASCEND_HOME_PATH=cann, **variables),
                      cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize(("variables", "base"), [
    ({"ASCEND_CUSTOM_OPP_PATH": "/first/vendors/others:/second/vendors/pangu", "ASCEND_OPP_PATH": "/tmp"}, "/second"),
    ({"ASCEND_CUSTOM_OPP_PATH": "", "ASCEND_OPP_PATH": "/tmp"}, "/tmp"),
])
def test_without_install_the_package_goes_where_mindspore_looks(variables, base):
    assert build.install_base("pangu", None, variables) == Path(base).resolve()
    assert build.install_base("pangu", "/here", variables) == Path("/here")


@pytest.fixture
def wheels_package(tmp_path):
    """MindSpore's own package of AscendC operators, as CANN built and installed it: one operator, all_finite."""
    folder = tmp_path / "custom_ascendc_910b"
    shutil.copytree(MINDSPORE / "lib/plugin/ascend/custom_ascendc_910b", folder)
    return folder


def test_what_is_expected_of_a_package_is_there_in_mindspores_own(wheels_package):
    build._verify(wheels_package, {"all_finite": ["ascend910b"]})
    assert build.find_packages(wheels_package.name, {"ASCEND_CUSTOM_OPP_PATH": f"/other:{wheels_package}"}) == [
        (wheels_package, None)]
    for path in ("op_api/lib/libcust_opapi.so", "op_api/include/aclnn_all_finite.h",
                 "op_impl/ai_core/tbe/config/ascend910b/aic-ascend910b-ops-info.json"):
        taken = (wheels_package / path).rename(wheels_package / "taken")
        with pytest.raises(ValueError, match=f"lacks {re.escape(path)}"):
            build._verify(wheels_package, {"all_finite": ["ascend910b"]})
        taken.rename(wheels_package / path)
    with pytest.raises(ValueError, match="lacks op_api/include/aclnn_other.h, other for ascend910b"):
        build._verify(wheels_package, {"all_finite": ["ascend910b"], "other": ["ascend910b"]})


@pytest.mark.parametrize(("manifest", "variables", "words"), [
    ({}, {"ASCEND_CUSTOM_OPP_PATH": ""}, ["no package pangu", "build it with"]),
    (None, {}, ["was not installed by", "build it again"]),
    ({"sha256": "0" * 64}, {}, ["is of other sources (sha256 0000000000000000)", "build it again"]),
    ({"socs": ["ascend310b"]}, {}, ["is for ascend310b, not for ascend910b", "--soc ascend310b,ascend910b"]),
    ({}, {"ASCEND_OPP_PATH": ""}, ["ASCEND_OPP_PATH is not set", "set_env.sh"]),
])
def test_a_package_that_cannot_serve_says_why(tmp_path, manifest, variables, words):
    package = tmp_path / "vendors/pangu"
    (package / "op_api/lib").mkdir(parents=True)
    (package / "op_api/lib/libcust_opapi.so").touch()
    if manifest is not None:
        good = {"sha256": build.sources_digest(), "socs": ["ascend910b"], "cann": "8.5.0", "vendor": "pangu"}
        (package / "mindpangu_sources.json").write_text(json.dumps(good | manifest))
    surroundings = {"ASCEND_CUSTOM_OPP_PATH": str(package), "ASCEND_OPP_PATH": str(tmp_path / "opp")}
    with pytest.raises(ValueError) as error:
        build.usable_package(["ascend910b"], surroundings | variables)
    assert all(word in str(error.value) for word in words), error.value
