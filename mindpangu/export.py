"""Export a model for the edge: python -m mindpangu.export recipe=export_mindir from=RUN

from=FOLDER stands for init_from=FOLDER (a run, checkpoint or Hugging Face folder). Writes a folder with MindIR graphs
in float16, the tokenizer, the chat template, converter_lite's configuration and command, a Hugging Face folder, and a
manifest; python -m mindpangu.chat --mindir FOLDER talks to it. The authors ran neither converter nor device.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

from mindpangu.config import as_dict
from mindpangu.data.chat import jinja_template, template_digest
from mindpangu.data.tokenizer import SPECIAL_PIECES
from mindpangu.model.mindir import (
    CIPHER,
    PREFILL,
    is_sealed_with,
    read_key,
    read_manifest,
    write_graphs,
    write_manifest,
)
from mindpangu.model.weights import load_model, read_config, save_weights
from mindpangu.pipeline import Plan, entry_point, make_key, require_alone
from mindpangu.runtime.checkpoint import LOCK, find_model, fsync_folder, lock_folder
from mindpangu.runtime.device import start
from mindpangu.runtime.metrics import format_seconds, peak_memory_gib, say

NOT_RUN = "converter_lite, MindSpore Lite and every device: not run by the authors; the graphs were run on CPUs"
_NO_PART_IN_RESULTS = ("key_file", "key_env")
_CONFIGURATION, _CONVERTED = "prefill.cfg", "converted"


def export(recipe, overrides):
    """Write the export that a recipe describes, or find it; returns its folder."""
    if recipe.task != "export":
        raise ValueError(f"recipe={recipe.recipe} is no export: expected export_mindir.")
    require_alone("python -m mindpangu.export")
    if recipe.init_from is None:
        raise ValueError("init_from is missing: expected the model to export, from=<run, checkpoint or Hugging Face "
                         "folder>.")
    config = recipe.export
    key = read_key(config.key_file, config.key_env, os.environ)
    with Plan(_with_model(recipe), overrides) as plan:
        model_config = read_config(plan.init.folder)
        if config.cache_len > model_config.max_seq_len:
            raise ValueError(f"export.cache_len={config.cache_len} exceeds what {plan.init.folder} was made for, "
                             f"{model_config.max_seq_len} positions: shorten export.cache_len and export.buckets.")
        chosen = {name: value for name, value in as_dict(config).items() if name not in _NO_PART_IN_RESULTS}
        plan.key = make_key("export", chosen | {"encrypted": key is not None}, plan.key)
        folder = Path(recipe.run.dir or plan.root / f"{recipe.recipe}-{recipe.scale}-{plan.key}")
        if _is_there(folder, plan, key):
            return folder
        started = time.monotonic()
        aside = folder.with_name(f".{folder.name}.writing")
        with lock_folder(aside), contextlib.ExitStack() as unless_done:
            unless_done.callback(shutil.rmtree, aside, ignore_errors=True)
            if _is_there(folder, plan, key):  # another process has written it meanwhile
                return folder
            _clear(aside)
            start(recipe.run, runs_ops=False)
            _write(plan, model_config, aside, key)
            os.rename(aside, folder)
            unless_done.pop_all()
            # Last: until the folder has its name, the lock has to keep others out.
            (folder / LOCK).unlink()
        fsync_folder(folder.parent)
        _say_what_there_is(folder, time.monotonic() - started)
        return folder


def _is_there(folder, plan, key):
    """Whether a folder holds this export. Raises ValueError if it holds something else."""
    if not folder.exists():
        return False
    if not (folder / "manifest.json").is_file() or read_manifest(folder)["key"] != plan.key:
        raise ValueError(f"{folder} holds something else than this export: choose another run.dir, or leave run.dir "
                         "out.")
    if key and not is_sealed_with(folder, key):
        raise ValueError(f"{folder} is this export, encrypted with another key: choose another run.dir, or remove it.")
    say(f"{plan.recipe.recipe}: already complete in {folder}")
    return True


def _clear(folder):
    """Remove what a killed export left beside the lock."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _with_model(recipe):
    """The recipe with the architecture of the folder that init_from names, if it names one."""
    if not Path(recipe.init_from).is_dir():
        return recipe
    folder = find_model(recipe.init_from)
    model = read_config(folder)
    return dataclasses.replace(recipe, init_from=str(folder), model=model, data=dataclasses.replace(
        recipe.data, seq_len=min(recipe.data.seq_len, model.max_seq_len)))


def _write(plan, model_config, folder, key):
    from mindpangu.model.edge import half_weights

    config, tokenizer = plan.recipe.export, plan.tokenizer
    model = load_model(plan.init.folder)
    arrays = half_weights(model)
    if config.hugging_face:
        _write_hugging_face(model, tokenizer, folder / "hugging_face", config.hugging_face)
    del model
    say(f"export: every weight of {plan.init.folder} fits float16; writing the graphs")
    graphs = write_graphs(model_config, arrays, config.cache_len, folder, key)
    shutil.copyfile(tokenizer.model_file, folder / "tokenizer.model")
    (folder / "chat_template.jinja").write_text(jinja_template(), encoding="utf-8")
    (folder / "converter").mkdir()
    for name, text in converter_files(config, graphs, key).items():
        (folder / "converter" / name).write_text(text, encoding="utf-8")
    write_manifest(folder, {
        "key": plan.key, "model": as_dict(model_config), "precision": "float16",
        "buckets": list(config.buckets), "cache_len": config.cache_len, "soc": config.soc,
        "encryption": CIPHER if key else None, "graphs": graphs,
        "tokenizer": tokenizer.digest, "template": template_digest(), "special_pieces": SPECIAL_PIECES,
        "mindspore": version("mindspore"), "mindpangu": version("mindpangu"), "not_run": NOT_RUN})


def converter_files(config, graphs, key):
    """{name: text} of converter_lite's configuration and the shell script that calls it.

    One graph is converted, prefill.mindir, with a shape for a single token beside those of the buckets: on the device
    the weights of a second graph would lie beside those of the first.
    """
    rows, head_dim = graphs["cache_shape"]
    shapes = ["tokens:-1", "positions:-1", "last:1"]
    shapes += [f"{name}:{rows},{head_dim}" for name in graphs["inputs"][3:]]
    dims = ";".join(f"{length},{length}" for length in (1, *config.buckets))
    configuration = f"""[acl_init_options]
ge.socVersion={config.soc}

[ascend_context]
precision_mode={config.precision_mode}

[acl_build_options]
input_format="ND"
input_shape="{";".join(shapes)}"
ge.dynamicDims="{dims}"
"""
    options = ""
    if key:
        options = (' \\\n    --decryptKey="$MINDPANGU_KEY" --decryptMode=AES-GCM '
                   '--encryption=true --encryptKey="$MINDPANGU_KEY"')
    condition = ("# Encrypted: export MINDPANGU_KEY=<the key in hexadecimal>; converter_lite writes with 32 digits.\n"
                 if key else "")
    script = f"""#!/bin/sh
# Not run by the authors. With MindSpore Lite's converter_lite and CANN, on the device or a host of the same version:
{condition}set -e
cd "$(dirname "$0")/.."
converter_lite --fmk=MINDIR --saveType=MINDIR --optimize=ascend_oriented \\
    --modelFile={PREFILL} --configFile=converter/{_CONFIGURATION} --outputFile={_CONVERTED}{options}
"""
    return {_CONFIGURATION: configuration, "convert.sh": script}


def _write_hugging_face(model, tokenizer, folder, dtype):
    """Weights, tokenizer and template as transformers and llama.cpp's converter read them."""
    save_weights(model, folder, dtype)
    shutil.copyfile(tokenizer.model_file, folder / "tokenizer.model")
    (folder / "chat_template.jinja").write_text(jinja_template(), encoding="utf-8")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(getattr(tokenizer, f"{meaning}_id")): {"content": piece, **plain}
             for meaning, piece in SPECIAL_PIECES.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False,
        "bos_token": SPECIAL_PIECES["bos"], "eos_token": SPECIAL_PIECES["turn_end"],
        "unk_token": SPECIAL_PIECES["pad"], "pad_token": SPECIAL_PIECES["pad"],
        "added_tokens_decoder": added, "clean_up_tokenization_spaces": False}, indent=1) + "\n", encoding="utf-8")


def _say_what_there_is(folder, seconds):
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    sizes = {name: file["bytes"] / 2**20 for name, file in manifest["files"].items()}
    total = sum(sizes.values())
    graphs = sum(size for name, size in sizes.items() if "/" not in name)
    encrypted = f", encrypted by {manifest['encryption']}" if manifest["encryption"] else ""
    say(f"export: {folder}, {total:.1f} MiB ({graphs:.1f} MiB for the edge{encrypted}), {format_seconds(seconds)}, "
        f"peak memory {peak_memory_gib():.2f} GiB")
    say(f"  prompts of up to {manifest['buckets'][-1]} tokens (buckets {manifest['buckets']}), with their answers "
        f"{manifest['cache_len']}")
    say(f"  on this CPU:   python -m mindpangu.chat --mindir {folder}")
    say(f"  for {manifest['soc']}: sh {folder}/converter/convert.sh, where converter_lite is")
    say(f"  {manifest['not_run']}")


def long_form(argument):
    """"from=FOLDER" in the recipe's own words: `from` cannot be a field's name in Python."""
    name, equals, value = argument.partition("=")
    return f"init_from={value}" if equals and name == "from" else argument


def main():
    sys.argv[1:] = [long_form(argument) for argument in sys.argv[1:]]
    entry_point(export)()


if __name__ == "__main__":
    main()
