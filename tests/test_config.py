"""The recipe: typed, complete, checked before MindSpore is imported."""

import resource
import subprocess
import sys

import pytest

from mindpangu.config import check_fields, differences, load_recipe, recipe_names

PAPER = ["scale=1b", "data.train=[x.jsonl]"]
KD_PAPER = [*PAPER, "teacher=openPangu-Embedded-7B"]


PHASES = ["pretrain_general_4k", "pretrain_general_8k", "pretrain_reasoning_8k", "pretrain_annealing_32k"]


def test_the_recipes_are_all_there():
    assert {"curate", *PHASES, "sft_reasoning", "sft_fast", "sft_direct", "kd_label", "kd_teacher", "kd_student",
            "kd_student_refresh"} <= set(recipe_names())


@pytest.mark.parametrize("scale", ["smoke", "tiny", "1b"])
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_composes_at_every_scale(name, scale):
    overrides = [f"recipe={name}", f"scale={scale}"]
    if (name, scale) == ("sft_teacher", "1b"):
        with pytest.raises(ValueError, match="the teacher is a model you bring"):
            load_recipe(overrides + ["data.train=[x.jsonl]", "data.seq_len=512"])
        return
    if scale == "1b":
        if not name.startswith(("eval_", "export_", "pretrain_", "curate")):
            overrides.append("data.train=[x.jsonl]")
        overrides += ["teacher=folder"] if name.startswith("kd_") else []
    recipe = load_recipe(overrides)
    assert (recipe.recipe, recipe.scale) == (name, scale)


# Section and page of each value: openPangu Embedded-1B technical report (P1) and "Post-training via KD" (P2).
@pytest.mark.parametrize(("overrides", "expected"), [
    (["recipe=pretrain_general_4k", "scale=1b"],
     {"train.lr": 5e-3, "train.min_lr": 1e-5, "train.beta1": 0.9, "train.beta2": 0.95, "data.seq_len": 4096,
      "tokens_per_step": 2**24, "init_from": None, "tokens": 4e12}),
    (["recipe=pretrain_general_8k", "scale=1b"],
     {"train.lr": 5e-3, "train.min_lr": 1e-5, "data.seq_len": 8192, "tokens_per_step": 2**24,
      "init_from": "pretrain_general_4k", "tokens": 4e12}),
    (["recipe=pretrain_reasoning_8k", "scale=1b"],
     {"train.lr": 5e-3, "train.min_lr": 1e-5, "data.seq_len": 8192, "tokens_per_step": 2**24,
      "init_from": "pretrain_general_8k", "tokens": 1.5e12}),
    (["recipe=pretrain_annealing_32k", "scale=1b"],
     {"data.seq_len": 32768, "tokens_per_step": 2**24, "init_from": "pretrain_reasoning_8k", "tokens": 0.9e12}),
    (["recipe=sft_reasoning", *PAPER],
     {"train.lr": 2e-5, "train.min_lr": 2e-6, "train.warmup_steps": 200, "train.epochs": 10, "train.weight_decay": 0.1,
      "train.clip_norm": 1.0, "data.seq_len": 32768, "data.dress": "reasoning", "init_from": "pretrain_annealing_32k",
      "tokens_per_step": 2**22}),
    (["recipe=sft_fast", *PAPER],
     {"train.lr": 1e-5, "train.min_lr": 1e-6, "train.epochs": 10, "train.weight_decay": 0.1, "train.clip_norm": 1.0,
      "data.dress": "fast", "init_from": "sft_reasoning", "tokens_per_step": 2**21}),
    (["recipe=kd_student", *KD_PAPER],
     {"kd.weight": 0.9, "kd.top_k": 10, "kd.loss_form": "convex", "kd.answers": "student", "kd.refresh_at": [],
      "train.lr": 1e-5, "rollout.samples_per_prompt": 1, "init_from": "sft_fast"}),
    (["recipe=kd_student_refresh", *KD_PAPER], {"kd.refresh_at": [0.3333, 0.6667]}),
    (["recipe=kd_label", *KD_PAPER], {"kd.answers": "label"}),
    (["recipe=kd_teacher", *KD_PAPER], {"kd.answers": "teacher"}),
    (["recipe=grpo", *PAPER],  # P1 3.4 and 4.1.2
     {"rollout.samples_per_prompt": 8, "rollout.temperature": 1.0, "rollout.top_p": 1.0, "rollout.top_k": 0,
      "rollout.max_prompt_len": 4096, "rollout.max_new_tokens": 28672, "data.seq_len": 32768,
      "grpo.prompts_per_rollout": 256, "grpo.clip_low": 0.8, "grpo.clip_high": 1.28, "grpo.kl_coefficient": 0.001,
      "train.epochs": 6, "train.lr": 1e-6, "train.min_lr": 5e-7, "train.decay_steps": 100, "train.beta1": 0.9,
      "train.beta2": 0.999, "train.clip_norm": 0.5, "rewards.correct": 1.0, "rewards.wrong_answer": -0.5,
      "rewards.wrong_format": -1.0, "init_from": "kd_student"}),
    (["recipe=sft_fast", *PAPER],
     {"model.hidden_size": 1536, "model.num_layers": 26, "model.num_heads": 12, "model.num_kv_heads": 6,
      "model.intermediate_size": 6144, "model.vocab_size": 153376, "model.max_seq_len": 32768,
      "model.rope_theta": 4e6, "model.rms_norm_eps": 1e-5, "model.eos_id": 45892, "model.tie_embedding": True}),
])
def test_1b_scale_has_the_papers_values(overrides, expected):
    recipe = load_recipe(overrides)
    for name, value in expected.items():
        if name == "tokens_per_step":
            found = recipe.train.rows_per_step * recipe.data.seq_len
        elif name == "tokens":  # the budget, rounded up to whole steps
            tokens = recipe.train.rows_per_step * recipe.data.seq_len
            found = value if recipe.train.steps == -(-value // tokens) else recipe.train.steps
        else:
            found = recipe
            for part in name.split("."):
                found = getattr(found, part)
        assert found == value, name


# P1 table 2: general, reasoning, annealing.
MIXTURES = {"General English": (0.45, 0.22, 0.22), "General Chinese": (0.12, 0.12, 0.11),
            "Multi-lingual": (0.10, 0.04, 0.03), "Industrial": (0.07, 0.10, 0.08), "Instruction": (0.02, 0.10, 0.20),
            "STEM": (0.07, 0.20, 0.17), "Code": (0.17, 0.22, 0.19)}


@pytest.mark.parametrize(("phase", "column"), [("general_4k", 0), ("general_8k", 0), ("reasoning_8k", 1),
                                                ("annealing_32k", 2)])
def test_pretraining_has_the_papers_mixture(phase, column):
    mix = load_recipe([f"recipe=pretrain_{phase}", "scale=1b"]).mix
    assert mix.weights == {name: shares[column] for name, shares in MIXTURES.items()}
    assert set(mix.curriculum) == {"STEM", "Instruction", "Code"} and mix.on_missing == "raise"


@pytest.mark.parametrize(("name", "sequence_parallel"), [("ascend", 1), ("ascend_8", 2), ("ascend_8", 3),
                                                         ("ascend_8", 6)])
def test_the_settings_for_npus_compose(name, sequence_parallel):
    run = load_recipe(["recipe=sft_reasoning", *PAPER, f"run={name}", f"run.sequence_parallel={sequence_parallel}",
                       "data.seq_len=32768"]).run
    assert (run.device, run.kernels, run.precision, run.shard) == ("Ascend", "native", "bfloat16", "optimizer")


@pytest.mark.parametrize(("overrides", "words"), [
    (["data.source=packed", "data.train=[x]"], ["data.source=packed", "recipe=kd_student", "curated.jsonl"]),
    (["recipe=sft_fast", "data.source=packed", "data.train=[x,y]"], ["['x', 'y']", "one folder"]),
    (["recipe=sft_fast", "data.source=packed"], ["data.train is empty"]),
    (["recipe=pretrain_general_4k", "data.train=[x]"], ["curate.sources"]),
    (["recipe=pretrain_general_4k", "train.continue_optimizer=true"], ["train.continue_optimizer=true", "init_from"]),
    (["recipe=pretrain_general_4k", "train.first_step=400"], ["train.first_step=400", "train.decay_steps=360"]),
    (["recipe=pretrain_general_4k", "mix.weights.Code=-1"], ["mix.weights.Code=-1.0", "positive"]),
    (["recipe=curate", "+mix.groups.b=[math]"], ["math twice"]),
    (["recipe=curate", "+mix.ratio.c=1"], ["mix.ratio has c"]),
    (["kd.temperature=0"], ["kd.temperature=0.0", "above 0"]),
    (["data.seq_len=2048"], ["data.seq_len=2048", "model.max_seq_len=1024"]),
    (["kd.top_k=769"], ["kd.top_k=769", "model.vocab_size=768"]),
    (["train.epochs=1"], ["train.steps=900", "train.epochs=1.0", "exactly one"]),
    (["train.rows_per_step=15"], ["train.rows_per_step=15", "train.micro_batch_rows=16"]),
    (["kd.weight=1.5"], ["kd.weight=1.5", "0 to 1"]),
    (["recipe=kd_label", "kd.refresh_at=[0.5]"], ["kd.refresh_at=[0.5]", "kd.answers=label"]),
    (["kd.refresh_at=[0.5,0.25]"], ["kd.refresh_at", "rising"]),
    (["rollout.max_new_tokens=100"], ["data.seq_len=128", "180"]),
    (["teacher=null"], ["teacher is missing"]),
    (["init_from=null"], ["init_from is missing"]),
    (["data=chats"], ["data.train is empty"]),
    (["data.train=[x.jsonl]"], ["data.train=['x.jsonl']", "data=chats"]),
    (["data=documents", "data.train=[x.txt]"], ["data.dress=fast", "data.source=documents"]),
    (["run.precision=bfloat16", "run.kernels=reference"], ["run.precision=bfloat16", "run.kernels=native"]),
    (["run.precision=float16"], ["run.precision", "run.device=CPU", "bfloat16"]),
    (["run.vocab_parallel=true"], ["run.vocab_parallel=true", "run.sequence_parallel=1"]),
    (["run.step_timeout_s=-1"], ["run.step_timeout_s=-1", "at least 0"]),
    (["run.sequence_parallel=4", "model.num_heads=12", "model.num_kv_heads=6"],
     ["run.sequence_parallel=4", "model.num_kv_heads=6"]),
    (["run.sequence_parallel=16", "model.num_heads=16", "model.num_kv_heads=16", "data.seq_len=8"],
     ["run.sequence_parallel=16", "data.seq_len=8", "at least a token"]),
    (["rollout.drop=[boring]"], ["rollout.drop='boring'", "truncated"]),
    (["model.num_heads=3", "model.num_kv_heads=2"], ["model.num_heads=3", "model.num_kv_heads=2"]),
    (["kd.tail=none"], ["kd.tail='none'", "bucket"]),
    (["train.rows_per_step=0"], ["train.rows_per_step=0", "task=distill", "at least 1"]),
    (["data=problems", "data.train=[x.jsonl]"], ["data.source=problems", "recipe=grpo", "init_from="]),
    (["rollout.engine=openai"], ["rollout.engine=openai", "rollout.server.url=None"]),
    (["rollout.server.url=http://a/v1"], ["rollout.engine=builtin", "rollout.engine=openai"]),
    (["kd.engine=openai"], ["kd.engine=openai", "kd.server.url=None"]),
    (["kd.engine=mindformers", "kd.server.url=http://a/v1"], ["kd.engine=mindformers", "kd.engine=openai"]),
    (["kd.engine=vllm"], ["kd.engine='vllm'", "mindformers", "openai"]),
    (["kd.server.timeout_s=0"], ["kd.server.timeout_s=0.0", "above 0"]),
    (["kd.server.prompts_per_request=0"], ["kd.server.prompts_per_request=0", "at least 1"]),
    (["rollout.server.num_parallel=0"], ["rollout.server.num_parallel=0", "at least 1"]),
    (["rewards.judge.max_retries=-1"], ["rewards.judge.max_retries=-1", "at least 0"]),
    (["recipe=grpo", "train.rows_per_step=16"], ["train.rows_per_step=16", "expected 0 for grpo"]),
    (["recipe=grpo", "rollout.samples_per_prompt=1"], ["rollout.samples_per_prompt=1", "at least 2"]),
    (["recipe=grpo", "rollout.temperature=0"], ["rollout.temperature=0", "above 0"]),
    (["recipe=grpo", "grpo.updates_per_rollout=3"], ["grpo.prompts_per_rollout=128", "grpo.updates_per_rollout=3"]),
    (["recipe=grpo", "grpo.clip_high=0.28"], ["grpo.clip_high=0.28", "1.28"]),
    (["recipe=grpo", "grpo.loss_agg=mean"], ["grpo.loss_agg='mean'", "fixed_length"]),
    (["recipe=grpo", "rewards.length_weight=1"], ["rewards.length_weight=1.0", "rewards.length_buffer=0", "both"]),
    (["recipe=grpo", "rewards.length_weight=1", "rewards.length_buffer=48"],
     ["rewards.length_buffer=48", "rollout.max_new_tokens=48"]),
    (["recipe=grpo", "rewards.wrong_format=2"], ["rewards.wrong_format=2.0", "to rise"]),
    (["recipe=grpo", "train.decay_steps=5", "train.warmup_steps=5"], ["train.decay_steps=5", "train.warmup_steps=5"]),
    (["recipe=grpo", "rollout.max_new_tokens=100"], ["data.seq_len=128", "180"]),
    (["recipe=grpo", "init_from=null"], ["init_from is missing", "task=grpo"]),
])
def test_an_impossible_combination_names_field_value_and_expectation(overrides, words):
    with pytest.raises(ValueError) as error:
        load_recipe(overrides)
    assert all(word in str(error.value) for word in words), error.value


def test_an_unknown_field_is_an_error_that_suggests_the_right_one():
    with pytest.raises(ValueError, match=r"kd\.wieght=1: no such field; did you mean kd\.weight\?"):
        check_fields(["recipe=kd_student", "kd.wieght=1"])
    check_fields(["--multirun", "recipe=kd_label,kd_student", "seed=0,1", "hydra.verbose=true", "+run.threads@x=1"])


def test_a_recipe_is_read_only():
    recipe = load_recipe(["recipe=sft_fast"])
    with pytest.raises(AttributeError, match="read-only"):
        recipe.train.lr = 1.0


def test_differences_name_every_changed_leaf():
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}) == [
        "a.c: 2 | 4", "d: 3 | None", "e: None | 5"]


@pytest.mark.parametrize(("override", "words"), [
    ("train.lr=abc", ["train.lr", "abc", "Float"]),
    ("kd.wieght=0.5", ["kd.wieght=0.5", "kd.weight"]),
    ("recipe=kd_studnet", ["kd_studnet", "kd_student"]),
    ("kd.temperature=-1", ["kd.temperature=-1.0", "above 0"]),
    ("data.seq_len=9999", ["data.seq_len=9999", "1024"]),
])
def test_a_wrong_recipe_stops_the_command_within_three_seconds(override, words, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "mindpangu.train", override], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode != 0
    assert all(word in done.stderr + done.stdout for word in words), done.stderr
    assert "Traceback" not in done.stderr
    # The 3 s promised, of processor time: other programs may make it wait. MindSpore's import would add 3 to 5.
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    assert not (tmp_path / "runs").exists()
