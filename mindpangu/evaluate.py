"""Measure a model on benchmarks: python -m mindpangu.evaluate recipe=eval_instruct model=RUN tasks=gsm8k,mmlu

model=FOLDER stands for init_from=FOLDER (a run, checkpoint or Hugging Face folder), tasks=A,B for eval.tasks=[A,B],
benchmarks.dir=FOLDER for eval.benchmarks_dir=FOLDER.

--list-tasks: what can be evaluated, from which files, where they are to be had, under which licence.
--cfg job: every field with its value; those of eval say what is asked and how, see mindpangu/config.py.
lm_eval ARGUMENTS: lm-eval's own command line, with this project's models as --model mindpangu
--model_args pretrained=FOLDER. Its own tasks are fetched from a hub by it; ours read local files:
--include_path <this package>/benchmarks/tasks --metadata benchmarks_dir=FOLDER --tasks pangu_gsm8k.
"""

import dataclasses
import json
import logging
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from mindpangu.benchmarks import files, graders
from mindpangu.benchmarks.harness import decoding, run_tasks, summarize
from mindpangu.benchmarks.punkt import prepare_punkt
from mindpangu.benchmarks.responses import ResponseFile
from mindpangu.benchmarks.results import as_text, describe_tasks
from mindpangu.benchmarks.tasks import check_files, find_benchmarks, forms, load_tasks
from mindpangu.config import RewardsConfig, RunConfig, as_dict, recipes_folder
from mindpangu.data.chat import template_digest
from mindpangu.data.tokenizer import Tokenizer
from mindpangu.model.weights import load_model, parameters_digest, read_config
from mindpangu.pipeline import Plan, entry_point, make_key, require_alone
from mindpangu.rewards.router import Rewards
from mindpangu.runtime.checkpoint import find_model, newest_checkpoint, write_atomic
from mindpangu.runtime.device import activation_dtype, start
from mindpangu.runtime.metrics import Reporter, format_seconds, peak_memory_gib, say
from mindpangu.tools.report import draw_report, read_run

_NO_PART_IN_RESULTS = ("benchmarks_dir", "num_slots", "cache_tokens", "batch_tokens", "responses")
_CODE = ("humaneval", "mbpp", "mbpp_sanitized")  # sources whose answers are programs
_PROMPTS_SHOWN = 5  # samples of a task that are kept with their prompt


def evaluate(recipe, overrides):
    """Run a recipe's benchmarks, or what is missing of them, and return the run folder with results.json."""
    if recipe.task != "evaluate":
        raise ValueError(f"recipe={recipe.recipe} is no evaluation: expected eval_instruct or eval_base.")
    require_alone("python -m mindpangu.evaluate")
    if not recipe.init_from:
        raise ValueError(f"init_from={recipe.init_from}: expected the model to measure, a run folder, a Hugging Face "
                         "folder or a recipe.")
    config = recipe.eval
    names = config.tasks or [name for name, benchmark in forms()[config.form].items() if benchmark.published]
    benchmarks = find_benchmarks(config.form, names)
    check_files(benchmarks, config.benchmarks_dir)
    if find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed: pip install 'mindpangu[eval]'.")
    _go_offline()
    if "ifeval" in benchmarks:
        prepare_punkt(_responses_folder(recipe))
    with Plan(_with_model(recipe), overrides) as plan:
        # A plan's key says which model it is; an evaluation is also what is asked, from which files, how answers are
        # checked, and, unlike a training run, in which precision and where: that is what two evaluations may compare.
        asked = {name: value for name, value in as_dict(config).items() if name not in _NO_PART_IN_RESULTS}
        asked |= {"math_timeout_s": recipe.rewards.math_timeout_s, "code": as_dict(recipe.rewards.code),
                  "device": recipe.run.device, "precision": recipe.run.precision}
        digests = {name: files.digest(files.SOURCES[benchmark.source], config.benchmarks_dir)
                   for name, benchmark in benchmarks.items()}
        plan.key = make_key("evaluation", asked, [plan.key, digests])
        if not recipe.run.dir:
            plan.folder = plan.root / f"{recipe.recipe}-{recipe.scale}-{plan.key}"
        path = plan.folder / "results.json"
        if plan.is_done():
            results = json.loads(path.read_text(encoding="utf-8"))
            say(f"{recipe.recipe}: already complete in {plan.folder}\n{as_text(results)}")
            return plan.folder
        with plan.begin():
            results = _measure(plan, benchmarks) | {"files": digests}
            write_atomic(path, json.dumps(results, indent=1))
            write_atomic(plan.folder / "done.json", json.dumps(
                {"step": 0, "seconds": results["seconds"],
                 "peak_memory_gib": round(peak_memory_gib(recipe.run.device), 3),
                 "after": {name: found["score"] / 100 for name, found in results["benchmarks"].items()}}))
            write_atomic(plan.folder / "report.html", draw_report([read_run(plan.folder)]))
        say(as_text(results))
        say(f"{recipe.recipe}: done in {format_seconds(results['seconds'])}; {plan.folder}")
        return plan.folder


def _responses_folder(recipe):
    return Path(recipe.eval.responses or Path(recipe.run.root) / "responses")


def _with_model(recipe):
    """The recipe with the architecture of the folder with weights that init_from means: a checkpoint or Hugging Face
    folder, or the newest checkpoint of a run folder. As it is, if init_from names a recipe."""
    path = Path(recipe.init_from)
    folder = path if (path / "config.json").is_file() else newest_checkpoint(path)
    if folder is None:
        return recipe
    model = read_config(folder)
    return dataclasses.replace(recipe, init_from=str(folder), model=model, data=dataclasses.replace(
        recipe.data, seq_len=min(recipe.data.seq_len, model.max_seq_len)))


def _go_offline():
    """Keep the libraries below lm-eval off the network and off the terminal; before they are imported."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_EVALUATE_OFFLINE",
                 "TQDM_DISABLE"):
        os.environ[name] = "1"
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _measure(plan, benchmarks):
    recipe, config = plan.recipe, plan.recipe.eval
    started = time.monotonic()
    if any(benchmark.source in _CODE for benchmark in benchmarks.values()):  # before answers that nobody could grade
        say(f"code runs {plan.rewards.verifier('code').isolation}")
    tasks = load_tasks(benchmarks, config.benchmarks_dir, config.num_fewshot)
    start(recipe.run)
    from mindpangu.benchmarks.lm import PanguLM

    run, model_folder = recipe.run, plan.init.folder
    identity = _identity(plan.init.digest, plan.tokenizer, run)
    responses = _open_responses(_responses_folder(recipe), identity)
    say(f"{recipe.recipe}: {', '.join(benchmarks)}; model {model_folder}; {len(responses)} responses are in "
        f"{responses.path} already")
    lm = PanguLM(_load(model_folder, run), plan.tokenizer, num_slots=config.num_slots,
                 cache_tokens=config.cache_tokens, batch_tokens=config.batch_tokens, logits_chunk=run.logits_chunk,
                 seed=recipe.seed, mode=run.mode, responses=responses, reporter=Reporter)
    chosen = decoding(config)
    graders.use(plan.rewards)
    samples = run_tasks(lm, tasks, chat=config.form == "instruct", decoding=chosen, limit=config.limit)
    (plan.folder / "samples").mkdir(exist_ok=True)
    for name in benchmarks:
        write_atomic(plan.folder / "samples" / f"{name}.jsonl", _sample_lines(benchmarks[name], samples[name]))
    for kind, numbers in lm.measured.items():
        rate = numbers["tokens"] / numbers["seconds"] if numbers["seconds"] else 0
        say(f"{kind}: {numbers['requests']} requests, {numbers['answered_before']} of them answered before, "
            f"{numbers['tokens']:,} tokens in {format_seconds(numbers['seconds'])}, {rate:,.0f} tokens/s")
    return {"form": config.form, "model": {"folder": str(model_folder), **identity}, "decoding": chosen,
            "benchmarks": {name: summarize(benchmarks[name], samples[name]) for name in benchmarks},
            "measured": lm.measured, "seconds": round(time.monotonic() - started, 1)}


def _identity(model_digest, tokenizer, run):
    """What responses depend on besides their requests."""
    return {"model": model_digest, "tokenizer": tokenizer.digest, "template": template_digest(), "device": run.device,
            "precision": run.precision}


def _open_responses(folder, identity):
    return ResponseFile(Path(folder) / f"{make_key('responses', None, identity)}.jsonl")


def _load(folder, run):
    return load_model(folder, activation_dtype(run), frozen_dtype="bfloat16" if run.precision == "bfloat16" else None)


def _sample_lines(benchmark, samples):
    """JSON lines: every answer with its value and reason, the first of each task with their prompt."""
    lines = []
    for by_repeat in samples:
        for repeat, logged in enumerate(by_repeat):
            for sample in logged:
                if sample["filter"] != benchmark.answers:
                    continue
                score = sample["filtered_resps"][0]
                prompt = {"prompt": str(sample["arguments"][0][0])} if sample["doc_id"] < _PROMPTS_SHOWN else {}
                lines.append({"item": sample["doc_id"], "repeat": repeat, **prompt,
                              "responses": [response[0] for response in sample["resps"]], "target": sample["target"],
                              "value": sample[benchmark.metric], "reason": getattr(score, "reason", None)})
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


# ---- Command line ----------------------------------------------------------------------------------------------------

def long_form(argument):
    """An argument in the recipe's own words: "tasks=a,b" -> "eval.tasks=[a,b]"."""
    name, equals, value = argument.partition("=")
    if not equals:
        return argument
    if name == "model" and not (recipes_folder() / "model" / f"{value}.yaml").is_file():
        return f"init_from={_quoted(value)}"
    if name == "tasks":
        return f"eval.tasks=[{value.strip('[]')}]"
    return f"eval.benchmarks_dir={_quoted(value)}" if name == "benchmarks.dir" else argument


def _quoted(path):
    """A path as Hydra takes it, whatever it holds: its grammar knows =, (, ~ and the like."""
    return path if path[:1] in ("", "'", '"') else "'" + path.replace("'", r"\'") + "'"


def run_lm_eval(arguments):
    """lm-eval's command line, with --model mindpangu."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model

    from mindpangu.benchmarks.lm import PanguLM

    @register_model("mindpangu")
    class Registered(PanguLM):
        """--model_args pretrained=FOLDER[,target=CPU|Ascend][,precision=float32|bfloat16|float16][,responses=FOLDER],
        the last one as eval.responses, and PanguLM's own arguments. lm-eval's own device and batch sizes, which it
        always gives, have no part in it."""

        def __init__(self, pretrained, target="CPU", precision="float32", kernels="native", responses=None, device=None,
                     batch_size=None, max_batch_size=None, **options):
            run = RunConfig(device=target, precision=precision, kernels=kernels)
            folder = find_model(pretrained)
            start(run)
            model, tokenizer = _load(folder, run), Tokenizer(folder / "tokenizer.model")
            if responses:
                digest = [parameters_digest(model), as_dict(model.config)]
                responses = _open_responses(responses, _identity(digest, tokenizer, run))
            super().__init__(model, tokenizer, reporter=Reporter, responses=responses, **options)

    with Rewards(RewardsConfig(), 0) as rewards:
        graders.use(rewards)
        sys.argv = ["lm_eval", *arguments]
        cli_evaluate()


def main():
    arguments = sys.argv[1:]
    if arguments[:1] == ["lm_eval"]:
        run_lm_eval(arguments[1:])
        return
    if {"--help", "-h"} & set(arguments):
        print(__doc__)
        return
    if "--list-tasks" in arguments:
        folders = [a.partition("=")[2] for a in arguments if a.startswith(("benchmarks.dir=", "eval.benchmarks_dir="))]
        print(describe_tasks((folders or ["benchmarks"])[-1]))
        return
    sys.argv[1:] = [long_form(argument) for argument in arguments]
    entry_point(evaluate)()


if __name__ == "__main__":
    main()
