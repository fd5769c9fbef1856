"""lm-eval's evaluation loop over loaded tasks, and one number for each benchmark out of what it measured."""

import math
from collections import Counter

# P1 4.1.2: V1 and the ablations are decoded greedily with 8K tokens; V1.1 is sampled, and three times at that.
PRESETS = {
    "greedy_8k": {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8192, "num_repeats": 1},
    "sampled_28k_mean3": {"temperature": 0.7, "top_p": 1.0, "max_new_tokens": 28672, "num_repeats": 3},
    # Few-shot answers end where the next example would begin: greedy, as long as each task says.
    "task": {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 0, "num_repeats": 1},
}


def decoding(config):
    """An EvalConfig's preset with what the configuration sets by itself."""
    chosen = dict(PRESETS[config.preset])
    for name in ("max_new_tokens", "num_repeats"):
        if getattr(config, name):
            chosen[name] = getattr(config, name)
    return chosen


def run_tasks(lm, tasks, *, chat, decoding, limit=0):
    """Samples of every benchmark, {name: [lm-eval's logged samples of a task, by repeat]}.

    tasks: {name: [lm-eval task]} of load_tasks; chat: questions become turns of the chat template; decoding: see
    PRESETS; limit: items of each task, the first ones; 0: all.
    """
    from lm_eval.evaluator import evaluate

    arguments = {"do_sample": decoding["temperature"] > 0, "temperature": decoding["temperature"],
                 "top_p": decoding["top_p"]}
    if decoding["max_new_tokens"]:
        arguments["max_gen_toks"] = decoding["max_new_tokens"]
    by_name = {task.config.task: task for members in tasks.values() for task in members}
    for task in by_name.values():
        if task.OUTPUT_TYPE == "generate_until":
            task.set_config("generation_kwargs", arguments, update=True)
    samples = {name: [[] for _ in members] for name, members in tasks.items()}
    for repeat in range(decoding["num_repeats"]):
        lm.sample_index = repeat
        logged = evaluate(lm, {"tasks": by_name}, limit=limit or None, bootstrap_iters=0, log_samples=True,
                          apply_chat_template=chat, fewshot_as_multiturn=chat)["samples"]
        for name, members in tasks.items():
            for place, task in enumerate(members):
                samples[name][place].append(logged[task.config.task])
    return samples


def summarize(benchmark, samples):
    """A benchmark's number, out of samples[task][repeat] as run_tasks returns them.

    score and stderr in percent, the latter over items, whose repeats are averaged first; k: right answers (a sum of
    shares where answers can be partly right) of N; reasons: how often each, where a grader gives them; subjects:
    {task or subject: score}, where there are several.
    """
    items, reasons = {}, Counter()  # subject -> item -> values of its repeats
    for place, by_repeat in enumerate(samples):
        for logged in by_repeat:
            for sample in logged:
                if sample["filter"] != benchmark.answers:
                    continue
                subject = sample["doc"].get("subject") or place
                items.setdefault(subject, {}).setdefault((place, sample["doc_id"]), []).append(
                    float(sample[benchmark.metric]))
                if hasattr(sample["filtered_resps"][0], "reason"):
                    reasons[sample["filtered_resps"][0].reason] += 1
    means = {subject: [sum(values) / len(values) for values in found.values()] for subject, found in items.items()}
    every = [value for subject in means.values() for value in subject]
    k = sum(sum(values) for found in items.values() for values in found.values())
    n = sum(len(values) for found in items.values() for values in found.values())
    if benchmark.average == "macro":
        score = _mean([_mean(values) for values in means.values()])
        stderr = math.sqrt(sum(_stderr(values) ** 2 for values in means.values())) / len(means)
    else:
        score, stderr = _mean(every), _stderr(every)
    return {"score": 100 * score, "stderr": 100 * stderr, "average": benchmark.average, "metric": benchmark.metric,
            "k": round(k, 6), "N": n, "items": len(every), "reasons": dict(reasons),
            "subjects": {str(subject): 100 * _mean(values) for subject, values in means.items()} if len(means) > 1
            else {}}


def _mean(values):
    return sum(values) / len(values)


def _stderr(values):
    """Of the mean, from the sample's standard deviation, as lm-eval has it; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
