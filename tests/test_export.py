"""python -m mindpangu.export: what it writes, that it answers as the checkpoint does, and what it refuses.

Oracles: the Generator on the checkpoint, transformers in float64, hashlib, and the protocol buffers of the graphs.
"""

import configparser
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindpangu.config import load_recipe
from mindpangu.data.chat import encode_prompt
from mindpangu.data.corpus import load_corpus
from mindpangu.data.documents import Message
from mindpangu.data.tokenizer import Tokenizer
from mindpangu.export import converter_files, export, long_form
from mindpangu.model.edge import half_weights
from mindpangu.model.mindir import read_manifest
from mindpangu.model.runner import GraphRunner, choose, lite_graphs, stream
from mindpangu.runtime.checkpoint import find_model, lock_folder

BUCKETS, CACHE_LEN = [40, 128], 256
OVERRIDES = ["recipe=export_mindir", f"export.buckets={BUCKETS}".replace(" ", ""), f"export.cache_len={CACHE_LEN}"]
KEY, OTHER_KEY = "00112233445566778899aabbccddeeff", "ff" * 16
MAX_NEW = 100
# Primitives that MindSpore's graphs for Ascend have had since 2.0; the rest below are its bookkeeping.
COMPUTING = {"Add", "BatchMatMul", "Cast", "Concat", "ExpandDims", "Gather", "Greater", "MatMul", "Mul", "Neg",
             "ReduceMean", "Reshape", "Rsqrt", "Sigmoid", "Softmax", "Split", "Square", "StridedSlice",
             "TensorScatterUpdate", "Transpose"}
BOOKKEEPING = {"Constant", "Depend", "Load", "MakeTuple", "TupleGetItem", "UpdateState"}


def run(module, *arguments, cwd, **variables):
    return subprocess.run([sys.executable, "-m", f"mindpangu.{module}", *map(str, arguments)], cwd=cwd,
                          capture_output=True, text=True, env=os.environ | variables)


def refused(module, *arguments, cwd, **variables):
    """The error line of a command that has to fail."""
    done = run(module, *arguments, cwd=cwd, **variables)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    [line] = re.findall(r"^error: (.*(?:\n.*)*)", done.stderr, re.MULTILINE)
    return line


@pytest.fixture(scope="module")
def trained(memorised_run):
    """The folder with the weights of a run that knows 20 problems by heart: near ties are rare in its answers."""
    return find_model(memorised_run)


@pytest.fixture(scope="module")
def prompts(trained):
    """The 20 problems, token ids."""
    data = load_recipe(["recipe=sft_reasoning", "scale=smoke", "init_from=null", "data.num_examples=20"]).data
    tokenizer = Tokenizer(trained / "tokenizer.model")
    return [encode_prompt(tokenizer, example.messages[:-1]) for example in load_corpus(data).train]


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """(export folder, what the command printed); the folder was moved after it was written."""
    home = tmp_path_factory.mktemp("exported")
    done = run("export", *OVERRIDES, f"from={trained}", "run.dir=out", cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    moved = tmp_path_factory.mktemp("moved") / "model"
    shutil.move(home / "out", moved)
    return moved, done.stdout


@pytest.fixture(scope="module")
def model(trained, cpu_library):
    import mindspore as ms

    from mindpangu.model.weights import load_model

    ms.set_device("CPU")
    return load_model(trained)


@pytest.fixture(scope="module")
def expected(model, prompts, trained):
    """The checkpoint's greedy answers, from a compiled loop over all prompts at once."""
    from mindpangu.model.generate import Generator

    tokenizer = Tokenizer(trained / "tokenizer.model")
    generator = Generator(model, num_slots=len(prompts), prompt_len=BUCKETS[-1], max_new_tokens=MAX_NEW,
                          eos_id=tokenizer.turn_end_id, pad_id=0, temperature=0.0)
    return [answer.tokens.tolist() for answer in generator.generate(prompts)]


@pytest.fixture(scope="module")
def runner(exported, expected):
    """The exported graphs, after the checkpoint has answered: a graph that MindSpore loads is of its process."""
    return GraphRunner(exported[0])


def copied(exported, tmp_path):
    return Path(shutil.copytree(exported[0], tmp_path / "copy"))


# ---- The graphs ------------------------------------------------------------------------------------------------------

def test_the_graphs_answer_20_prompts_as_the_checkpoint_does_token_for_token(runner, prompts, expected, trained):
    eos_id = Tokenizer(trained / "tokenizer.model").turn_end_id
    assert len(prompts) == 20 and len({len(answer) for answer in expected}) >= 5
    assert sum(answer[-1] == eos_id for answer in expected) >= 15, "the case has to end answers"
    assert {next(b for b in BUCKETS if b >= len(prompt)) for prompt in prompts} == set(BUCKETS)
    for prompt, answer in zip(prompts, expected, strict=True):
        assert list(stream(runner, prompt, eos_id=eos_id, max_new_tokens=MAX_NEW)) == answer


@pytest.mark.parametrize("length", [1, BUCKETS[0], BUCKETS[0] + 1, BUCKETS[-1]])
def test_logits_are_transformers_to_float16_whatever_the_padding(runner, trained, length):
    import torch
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(trained).double()
    tokens = np.random.default_rng(length).integers(3, llama.config.vocab_size, length + 2).astype(np.int32)
    with torch.no_grad():
        truth = llama(torch.tensor(tokens[None], dtype=torch.long)).logits[0].numpy()
    found = [runner.prefill(tokens[:length]), runner.decode(tokens[length]), runner.decode(tokens[length + 1])]
    for logits, row in zip(found, truth[length - 1:], strict=True):
        assert logits.dtype == np.float32 and logits.shape == row.shape
        # float16 keeps 11 bits: half a unit is 2^-11 of a number, and errors of a few dozen roundings add up.
        assert np.abs(logits - row).max() < 2**-11 * 16 * np.abs(row).max()


def graph_of(folder, name):
    from mindspore.train.mind_ir_pb2 import ModelProto

    return ModelProto.FromString((folder / name).read_bytes()).graph


def test_the_graphs_have_ascends_primitives_and_float16_weights_that_are_stored_once(exported, model):
    from mindspore.train.mind_ir_pb2 import TensorProto

    folder, _ = exported
    bytes_expected, places = 0, {}
    for path, parameter in model.parameters_and_names():
        bytes_expected += parameter.size * (4 if path.endswith("norm") else 2)
    for name in ("prefill.mindir", "decode.mindir"):
        graph = graph_of(folder, name)
        primitives = {re.fullmatch(r"(?:REF::)?(\w+?)(?::\d+)?", node.op_type)[1] for node in graph.node}
        assert primitives <= COMPUTING | BOOKKEEPING and {"MatMul", "Softmax"} <= primitives
        assert len(graph.parameter) == len(list(model.get_parameters()))
        for parameter in graph.parameter:
            own_name = parameter.name.partition(":")[2]
            is_norm = own_name.endswith("norm")
            assert parameter.data_type == (TensorProto.FLOAT if is_norm else TensorProto.FLOAT16), own_name
            place = parameter.external_data
            assert not parameter.raw_data and place.location == "weights.data"
            assert places.setdefault(own_name, (place.offset, place.length)) == (place.offset, place.length)
        shapes = [list(tensor.dims) for value in graph.input for tensor in value.tensor]
        assert shapes[:3] == ([[-1], [-1], [1]] if name == "prefill.mindir" else [[1], [1], [1]])
    assert sum(length for _, length in places.values()) == bytes_expected
    assert bytes_expected < (folder / "weights.data").stat().st_size < bytes_expected + 64 * (len(places) + 1)


def test_norms_and_softmax_compute_in_float32_and_products_in_float16(exported):
    from mindspore.train.mind_ir_pb2 import TensorProto

    found = {}
    for name in ("prefill.mindir", "decode.mindir"):
        for node in graph_of(exported[0], name).node:
            for attribute in node.attribute:
                if attribute.name == "shape":  # of the result, with its type
                    types = {tensor.data_type for tensor in attribute.tensors}
                    found.setdefault(re.sub(r"REF::|:\d+", "", node.op_type), set()).update(types)
    for primitive in ("Square", "ReduceMean", "Rsqrt", "Softmax"):
        assert found[primitive] == {TensorProto.FLOAT}, primitive
    assert found["MatMul"] == found["BatchMatMul"] == {TensorProto.FLOAT16}


def test_the_graphs_weights_are_in_memory_once(exported):
    code = (f"import numpy as np; from mindpangu.model import runner; graphs = []; load = runner.load_graph\n"
            f"def keep(*arguments): graphs.append(load(*arguments)); return graphs[-1]\n"
            f"runner.load_graph = keep; r = runner.GraphRunner({str(exported[0])!r})\n"
            "r.prefill(np.arange(9)); r.decode(3)\n"
            "a, b = ({p.data_ptr() for p in graph.get_parameters()} for graph in graphs)\n"
            "assert a == b and len(a) == len(list(graphs[0].get_parameters()))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- The folder ------------------------------------------------------------------------------------------------------

def test_the_manifest_names_every_file_with_its_hash_and_says_what_was_not_run(exported, trained):
    folder, printed = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert files.keys() - {"manifest.json"} == manifest["files"].keys()
    for name, entry in manifest["files"].items():
        data = files[name].read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert (manifest["buckets"], manifest["cache_len"], manifest["precision"]) == (BUCKETS, CACHE_LEN, "float16")
    assert files["tokenizer.model"].read_bytes() == (trained / "tokenizer.model").read_bytes()
    for text in (printed, manifest["not_run"], (folder / "converter/convert.sh").read_text()):
        assert "ot run by the authors" in text
    assert read_manifest(folder)["key"] == manifest["key"]


def test_no_file_holds_an_absolute_path(exported, trained):
    folder, _ = exported
    here = Path(__file__).resolve().parents[1]
    roots = (here, trained, trained.parents[3], folder, Path.home(), Path(sys.prefix), Path.cwd())
    roots = {str(root).encode() for root in roots if len(root.parts) > 1}
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not [root for root in roots if root in data], path
            if path.suffix in (".json", ".sh", ".cfg", ".jinja"):
                text = data.decode().replace("#!/bin/sh", "")
                assert not re.search(r"""(^|[\s"'=])/\w""", text), path


def test_the_converter_gets_every_input_every_bucket_and_a_single_token(exported, tmp_path):
    folder = copied(exported, tmp_path)
    settings = configparser.ConfigParser()
    settings.optionxform = str
    settings.read(folder / "converter" / "prefill.cfg")
    assert settings["acl_init_options"]["ge.socVersion"] == "Ascend310B4"
    assert settings["ascend_context"]["precision_mode"] == "enforce_origin"
    options = {name: value.strip('"') for name, value in settings["acl_build_options"].items()}
    assert options["input_format"] == "ND" and options["ge.dynamicDims"] == "1,1;40,40;128,128"
    shapes = dict(entry.split(":") for entry in options["input_shape"].split(";"))
    graph = graph_of(folder, "prefill.mindir")
    in_graph = {value.name.partition(":")[2]: ",".join(map(str, value.tensor[0].dims)) for value in graph.input}
    assert shapes == in_graph and list(shapes) == list(in_graph)

    stand_in = tmp_path / "bin" / "converter_lite"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    done = subprocess.run(["sh", folder / "converter/convert.sh"], cwd=tmp_path, capture_output=True, text=True,
                          env={"PATH": f"{stand_in.parent}:/usr/bin:/bin"})
    given = dict(option.removeprefix("--").split("=", 1) for option in done.stdout.split())
    assert given == {"fmk": "MINDIR", "saveType": "MINDIR", "optimize": "ascend_oriented",
                     "modelFile": "prefill.mindir", "configFile": "converter/prefill.cfg", "outputFile": "converted"}
    assert all((folder / given[name]).is_file() for name in ("modelFile", "configFile"))


def test_a_second_start_finds_the_export_and_leaves_other_things_alone(exported, trained, tmp_path, capsys):
    folder = copied(exported, tmp_path)
    overrides = [*OVERRIDES, f"init_from={trained}", f"run.dir={folder}"]
    before = (folder / "manifest.json").stat().st_mtime_ns
    assert export(load_recipe(overrides), overrides) == folder
    assert "already complete" in capsys.readouterr().out
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds something else than this export: choose another run.dir"):
        export(load_recipe([*overrides, "export.soc=Ascend310P3"]), overrides)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="holds something else"):
        export(load_recipe([*overrides, f"run.dir={tmp_path / 'mine'}"]), overrides)


def test_two_exports_into_one_folder_are_refused_and_what_a_killed_one_left_is_not_taken_over(trained, tmp_path):
    overrides = [*OVERRIDES, f"init_from={trained}", f"run.dir={tmp_path / 'out'}", "export.hugging_face=null"]
    aside = tmp_path / ".out.writing"
    with lock_folder(aside):
        (aside / "converter").mkdir()
        (aside / "weights.data").write_text("another's")
        with pytest.raises(ValueError, match=rf"in use by another run \(process {os.getpid()}\).*another run.dir"):
            export(load_recipe(overrides), overrides)
        assert (aside / "weights.data").read_text() == "another's" and not (tmp_path / "out").exists()
    (aside / "left").write_text("by a killed export")
    done = run("export", *overrides, cwd=tmp_path)  # not here: an export chooses the kernels of its process
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == read_manifest(tmp_path / "out")["files"].keys() | {"manifest.json"}


def test_transformers_opens_the_hugging_face_folder_and_its_tokenizer_gives_our_token_ids(exported, trained):
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = exported[0] / "hugging_face"
    ours, theirs = (LlamaForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (trained, folder))
    for (name, ours_weight), theirs_weight in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours_weight.bfloat16().float(), theirs_weight), name
    tokenizer, spm = AutoTokenizer.from_pretrained(folder), Tokenizer(folder / "tokenizer.model")
    conversations = [
        [Message("user", "Tom has 12 apples.")],
        [Message("system", "Be brief."), Message("user", "小明有3个苹果。"), Message("assistant", "3+4=7", "想一想"),
         Message("user", "And now?")],
        [Message("user", "Hi"), Message("assistant", "Hello."), Message("tool", "42"), Message("user", " two  spaces")],
    ]
    for messages in conversations:
        plain = [{"role": m.role, "content": m.content, **({"reasoning_content": m.thoughts} if m.thoughts else {})}
                 for m in messages]
        rendered = tokenizer.apply_chat_template(plain, add_generation_prompt=True)
        assert rendered == encode_prompt(spm, messages).tolist()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        spm.bos_id, spm.turn_end_id, spm.pad_id)


# ---- Encryption ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def encrypted(trained, tmp_path_factory):
    home = tmp_path_factory.mktemp("encrypted")
    done = run("export", *OVERRIDES, f"from={trained}", "run.dir=out", "export.key_env=EDGE_KEY",
               "export.hugging_face=null", cwd=home, EDGE_KEY=KEY)
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "out"


def test_an_encrypted_export_shows_no_weights_and_no_key_and_answers_with_it(encrypted, exported, prompts, tmp_path):
    plain = (exported[0] / "weights.data").read_bytes()
    sealed = (encrypted / "weights.data").read_bytes()
    assert plain[64:64 + 48] in plain and plain[64:64 + 48] not in sealed
    assert b"MatMul" in (exported[0] / "decode.mindir").read_bytes()
    assert b"MatMul" not in (encrypted / "decode.mindir").read_bytes()
    for path in encrypted.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert bytes.fromhex(KEY) not in data and KEY.encode() not in data.lower(), path
    assert json.loads((encrypted / "manifest.json").read_text())["encryption"] == "AES-GCM"
    script = (encrypted / "converter/convert.sh").read_text()
    assert '--decryptKey="$MINDPANGU_KEY" --decryptMode=AES-GCM' in script
    (tmp_path / "key").write_text(KEY.upper() + "\n")
    question = "Tom has 12 apples. He buys 5 more. How many apples are there now?"
    answers = [run("chat", "--mindir", folder, question, *key, cwd=tmp_path).stdout.partition("> ")[2]
               for folder, key in ((encrypted, ("--key-file", "key")), (exported[0], ()))]
    assert question in answers[0] and len(answers[0]) > len(question) + 5 and answers[0] == answers[1]


def test_a_wrong_or_missing_key_is_named(encrypted, exported, tmp_path):
    assert "this export is encrypted" in refused("chat", "--mindir", encrypted, "Hi", cwd=tmp_path)
    words = refused("chat", "--mindir", encrypted, "Hi", "--key-env", "EDGE_KEY", cwd=tmp_path, EDGE_KEY=OTHER_KEY)
    assert "the key is not the one it was exported with" in words and OTHER_KEY not in words
    with pytest.raises(ValueError, match="this export is encrypted.*--key-file FILE or --key-env VARIABLE"):
        GraphRunner(encrypted)
    with pytest.raises(ValueError, match="is not encrypted: leave the key out"):
        GraphRunner(exported[0], bytes.fromhex(KEY))


def test_an_export_with_another_key_is_not_taken_for_one_that_is_there(encrypted, trained, monkeypatch):
    overrides = [*OVERRIDES, f"init_from={trained}", f"run.dir={encrypted}", "export.key_env=EDGE_KEY",
                 "export.hugging_face=null"]
    monkeypatch.setenv("EDGE_KEY", KEY)
    assert export(load_recipe(overrides), overrides) == encrypted
    monkeypatch.setenv("EDGE_KEY", OTHER_KEY)
    with pytest.raises(ValueError, match="is this export, encrypted with another key: choose another run.dir"):
        export(load_recipe(overrides), overrides)


@pytest.mark.parametrize(("option", "text", "words"), [
    ("export.key_env=EDGE_KEY", None, "the environment variable EDGE_KEY is not set"),
    ("export.key_env=EDGE_KEY", "xyz", "the environment variable EDGE_KEY: expected a key of 32, 48 or 64 hexadecimal"),
    ("export.key_file=absent", None, "key file absent does not exist"),
])
def test_a_key_that_is_none_is_refused_before_anything_is_read(option, text, words, monkeypatch):
    monkeypatch.delenv("EDGE_KEY", raising=False)
    if text is not None:
        monkeypatch.setenv("EDGE_KEY", text)
    overrides = [*OVERRIDES, option, "init_from=nowhere"]
    with pytest.raises(ValueError, match=words):
        export(load_recipe(overrides), overrides)


# ---- What is refused -------------------------------------------------------------------------------------------------

def test_weights_that_overflow_float16_are_named(trained, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "large"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = -7e4
    weights["model.layers.0.self_attn.k_proj.bias"][1] = 65520.0
    weights["model.layers.0.self_attn.q_proj.bias"][1] = 65504.0  # the largest that fits
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    words = refused("export", *OVERRIDES, f"from={folder}", "run.dir=out", cwd=tmp_path)
    assert "2 weights do not fit float16" in words
    assert "model.layers.1.mlp.up_proj.weight: 70000" in words
    assert "model.layers.0.self_attn.k_proj.bias: 65520" in words and "q_proj" not in words
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_matrices_become_the_nearest_float16_and_norms_stay_float32(model):
    for path, array in half_weights(model).items():
        original = dict(model.parameters_and_names())[path].asnumpy()
        if path.endswith("norm"):
            assert array.dtype == np.float32 and np.array_equal(array, original)
        else:
            assert array.dtype == np.float16 and np.array_equal(array, original.astype(np.float16))


@pytest.mark.parametrize("soc", ["Ascend310B1", "Ascend310B4", "Ascend310P3", "Ascend910B4-1"])
def test_a_chip_is_named_to_the_converter_as_cann_names_it(soc):
    config = load_recipe([*OVERRIDES, f"export.soc={soc}"]).export
    files = converter_files(config, {"cache_shape": [2, 8], "inputs": ["tokens", "positions", "last"]}, None)
    assert f"\nge.socVersion={soc}\n" in files["prefill.cfg"]


@pytest.mark.parametrize(("overrides", "words"), [
    (["export.soc=310B4"], ["export.soc='310B4'", "Ascend310B4"]),
    (["export.soc=Ascend310"], ["export.soc='Ascend310'", "Ascend310B4"]),
    (["export.buckets=[64,32]"], ["export.buckets=[64, 32]", "rising"]),
    (["export.buckets=[]"], ["export.buckets is empty"]),
    (["export.buckets=[256]"], ["export.cache_len=256", "[256]", "no room for an answer"]),
    (["export.precision_mode=fp16"], ["export.precision_mode='fp16'", "enforce_origin"]),
    (["export.hugging_face=float16"], ["export.hugging_face='float16'", "bfloat16"]),
    (["export.key_file=a", "export.key_env=B"], ["export.key_file=a", "one of them"]),
])
def test_a_wrong_recipe_names_field_value_and_expectation(overrides, words):
    with pytest.raises(ValueError) as error:
        load_recipe([*OVERRIDES, *overrides])
    assert all(word in str(error.value) for word in words), error.value


def test_a_cache_longer_than_the_model_another_task_and_a_folder_without_weights_are_refused(trained, tmp_path):
    overrides = [*OVERRIDES, f"init_from={trained}", "export.cache_len=1025"]
    with pytest.raises(ValueError, match="export.cache_len=1025 exceeds .* 1024 positions: shorten"):
        export(load_recipe(overrides), overrides)
    with pytest.raises(ValueError, match="recipe=sft_fast is no export: expected export_mindir"):
        export(load_recipe(["recipe=sft_fast"]), [])
    overrides = [*OVERRIDES, f"init_from={tmp_path}"]
    with pytest.raises(ValueError, match="expected a run folder with a checkpoint"):
        export(load_recipe(overrides), overrides)
    overrides = [*OVERRIDES, "init_from=null"]
    with pytest.raises(ValueError, match="init_from is missing: .*from=<run"):
        export(load_recipe(overrides), overrides)
    assert long_form("from=runs/a=b") == "init_from=runs/a=b" and long_form("seed=1") == "seed=1"


@pytest.mark.parametrize(("damage", "words"), [
    ("truncate", "prefill.mindir has .* bytes, expected .*: it is truncated"),
    ("change", "decode.mindir has another SHA-256 than the manifest says"),
    ("delete", "weights.data is missing"),
    ("manifest", "manifest.json is not JSON"),
    ("version", "manifest.json is of another version of mindpangu: expected format_version 1"),
    ("none", "is no export: it has no manifest.json"),
])
def test_a_broken_export_is_refused_with_the_file(exported, tmp_path, damage, words):
    folder = copied(exported, tmp_path)
    if damage == "truncate":
        os.truncate(folder / "prefill.mindir", 1000)
    elif damage == "change":
        data = bytearray((folder / "decode.mindir").read_bytes())
        data[500] ^= 1
        (folder / "decode.mindir").write_bytes(data)
    elif damage == "delete":
        (folder / "weights.data").unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    elif damage == "version":
        (folder / "manifest.json").write_text('{"format_version": 2}')
    else:
        (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=words):
        GraphRunner(folder)


def test_a_graph_that_mindspore_cannot_load_is_named_although_its_hash_agrees(exported, tmp_path):
    folder = copied(exported, tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / "prefill.mindir").read_bytes()[:5000]
    (folder / "prefill.mindir").write_bytes(data)
    manifest["files"]["prefill.mindir"] = {"bytes": 5000, "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    words = refused("chat", "--mindir", folder, "Hi", cwd=tmp_path)
    assert "MindSpore cannot load prefill.mindir" in words


def test_a_prompt_longer_than_the_largest_bucket_and_an_empty_one_are_refused(runner):
    for length in (0, BUCKETS[-1] + 1):
        with pytest.raises(ValueError, match=rf"the prompt has {length} tokens: expected 1 to 128, .* \[40, 128\]; "
                                             "shorten it, or export again"):
            runner.prefill(np.ones(length, np.int32))


@pytest.fixture(scope="module")
def overflowing(trained, tmp_path_factory):
    """(export folder, token): what flows between layers overflows float16 at that token, at no other one."""
    home = tmp_path_factory.mktemp("overflowing")
    folder = Path(shutil.copytree(trained, home / "model"))
    weights = load_file(folder / "model.safetensors")
    tokenizer = Tokenizer(folder / "tokenizer.model")
    token = int(tokenizer.encode("7")[-1])
    hidden_size = weights["model.embed_tokens.weight"].shape[1]
    # Alone in its dimension, it is the square root of the hidden size there after a norm, and no other token is more
    # than 0.75 of that. swiglu squares 316 times the share.
    embedding = weights["model.embed_tokens.weight"]
    embedding[token] = 0
    embedding[token, 0] = 10 * np.abs(embedding).max()
    weights["model.layers.0.post_attention_layernorm.weight"][0] = 1
    for name in ("gate", "up"):
        weights[f"model.layers.0.mlp.{name}_proj.weight"][0] = 0
        weights[f"model.layers.0.mlp.{name}_proj.weight"][0, 0] = 316 / np.sqrt(hidden_size)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    done = run("export", *OVERRIDES, f"from={folder}", "run.dir=out", "export.hugging_face=null", cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "out", token


def test_an_overflow_is_told_and_the_next_prompt_is_answered_as_if_it_had_not_been(overflowing):
    folder, token = overflowing
    runner = GraphRunner(folder)
    good = np.array([1, 9, 10, 11], np.int32)
    long = np.resize(good, BUCKETS[0] + 5)  # reaches over what a short prompt's padding writes anew
    assert token not in good
    expected = runner.prefill(good)
    assert np.isfinite(expected).all()
    words = "logits are not finite: .* too large for float16; compare with the checkpoint"
    with pytest.raises(ValueError, match=words):
        list(stream(runner, np.append(long, np.int32(token)), eos_id=-1, max_new_tokens=4))
    np.testing.assert_array_equal(runner.prefill(good), expected)
    choose(runner.prefill(long), 0, None)
    with pytest.raises(ValueError, match=words):
        choose(runner.decode(token), 0, None)  # in the middle of an answer
    np.testing.assert_array_equal(runner.prefill(good), expected)


def test_the_chat_ends_with_the_reason_instead_of_what_overflowed(overflowing, tmp_path):
    folder, _ = overflowing
    done = run("chat", "--mindir", folder, "7 7 7", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout.partition("> ")[2] == "7 7 7\n" and "Traceback" not in done.stderr
    assert "error: the model's logits are not finite" in done.stderr


def test_an_answer_ends_with_the_cache(runner):
    prompt = np.full(BUCKETS[-1], 5, np.int32)
    assert len(list(stream(runner, prompt, eos_id=-1, max_new_tokens=1000))) == CACHE_LEN - BUCKETS[-1] + 1


# ---- MindSpore Lite, by a stand-in -----------------------------------------------------------------------------------

def lite_stand_in(run_graph, calls):
    """A module with the signatures of MindSpore Lite 2.7's Python API that this project calls."""
    module = types.ModuleType("mindspore_lite")

    class DataType:
        FLOAT32 = "float32"

    class ModelType:
        MINDIR = 0

    class Tensor:
        def __init__(self, tensor=None, shape=None, dtype=None, device=None):
            self.data = np.array(tensor) if tensor is not None else np.zeros(shape, dtype)
            self.device = device

        def get_data_to_numpy(self):
            assert self.device is None or not self.device.startswith("ascend")
            return self.data

    class Ascend:
        device_id = 0

    class Context:
        def __init__(self):
            self.target, self.ascend = ["cpu"], Ascend()

    class Model:
        def build_from_file(self, model_path, model_type, context=None, config_path="", config_dict=None, dec_key=None,
                            dec_mode="AES-GCM", dec_num_parallel=0):
            assert isinstance(model_path, str) and model_type == ModelType.MINDIR and context.target == ["Ascend"]
            calls.append(("build", Path(model_path).name, context.ascend.device_id, dec_key))
            if not Path(model_path).exists():
                raise RuntimeError("build_from_file failed, model_path does not exist!")

        def get_inputs(self):
            return ["as the graph has them"]

        def resize(self, inputs, dims):
            assert inputs == self.get_inputs()
            calls.append(("resize", dims[0][0]))
            self.shapes = [tuple(shape) for shape in dims]

        def predict(self, inputs, outputs=None):
            assert type(inputs) is list and type(outputs) is list
            assert [tensor.data.shape for tensor in inputs] == self.shapes
            assert [tensor.device for tensor in inputs[:3]] == [None] * 3
            assert {tensor.device for tensor in inputs[3:]} == {"ascend:3"}
            assert not {id(tensor) for tensor in inputs[3:]} & {id(tensor) for tensor in outputs[1:]}
            found = run_graph([tensor.data for tensor in inputs])
            for output, array in zip(outputs, found, strict=True):
                assert output.data.shape == array.shape and output.data.dtype == array.dtype
                output.data = array
            return outputs

    for entry in (DataType, ModelType, Tensor, Context, Model):
        setattr(module, entry.__name__, entry)
    return module


def test_the_lite_runner_calls_the_documented_api_and_keeps_caches_on_the_device(exported, prompts, expected, trained,
                                                                                 tmp_path, monkeypatch):
    from mindspore import Tensor

    from mindpangu.model.mindir import load_graph

    graph = load_graph(exported[0], "prefill.mindir")  # of any length: what the converter makes a shape each of

    def run_graph(arrays):
        return [tensor.asnumpy() for tensor in graph(*map(Tensor, arrays))]

    calls, file = [], tmp_path / "converted.mindir"
    file.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "mindspore_lite", lite_stand_in(run_graph, calls))
    runner = GraphRunner(exported[0], open_graphs=lite_graphs(file, device_id=3))
    eos_id = Tokenizer(trained / "tokenizer.model").turn_end_id
    for prompt, answer in list(zip(prompts, expected, strict=True))[:4]:
        assert list(stream(runner, prompt, eos_id=eos_id, max_new_tokens=MAX_NEW)) == answer
    assert calls[0] == ("build", "converted.mindir", 3, None)
    sizes = [size for name, size in calls[1:]]
    assert set(sizes) <= {1, *BUCKETS} and all(a != b for a, b in zip(sizes, sizes[1:], strict=False))
    with pytest.raises(ValueError, match="MindSpore Lite cannot load .*absent.mindir: .* does not exist"):
        GraphRunner(exported[0], open_graphs=lite_graphs(tmp_path / "absent.mindir"))


def test_without_mindspore_lite_the_error_says_where_to_get_it(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "mindspore_lite", None)
    with pytest.raises(ValueError, match="mindspore_lite is not installed: pip has no such package.*leave --lite out"):
        GraphRunner(exported[0], open_graphs=lite_graphs("converted.mindir"))
