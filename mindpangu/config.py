"""The typed recipe: every field with its type, default, meaning and unit, and the checks. Imports no MindSpore."""

import difflib
import importlib.util
import math
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, OmegaConf


class _Section:
    """A recipe section: checked when built, read-only afterwards."""

    def __post_init__(self):
        # The schema itself is an instance whose mandatory values are missing; Hydra refuses to hand such a one on.
        if all(getattr(self, f.name) != MISSING for f in fields(self)):
            self.check()
            object.__setattr__(self, "_sealed", True)

    def check(self):
        pass

    def __setattr__(self, name, value):
        if getattr(self, "_sealed", False):
            raise AttributeError(f"{type(self).__name__}.{name}: a recipe is read-only once it is checked.")
        object.__setattr__(self, name, value)


def _require(condition, message):
    if not condition:
        raise ValueError(message)


def _one_of(name, value, choices):
    _require(value in choices, f"{name}={value!r}: expected one of {list(choices)}.")


def _at_least(name, value, minimum):
    _require(value >= minimum, f"{name}={value}: expected at least {minimum}.")


def _in_range(name, value, low, high):
    _require(low <= value <= high, f"{name}={value}: expected a number from {low} to {high}.")


@dataclass
class ModelConfig(_Section):
    """A pre-norm Llama-form decoder: biases on q, k, v, o, none in the MLP."""

    hidden_size: int = MISSING  # D
    num_layers: int = MISSING
    num_heads: int = MISSING  # query heads N
    num_kv_heads: int = MISSING  # key/value heads M, a divisor of num_heads
    head_dim: int = MISSING  # H, even
    intermediate_size: int = MISSING  # F, of the MLP
    vocab_size: int = MISSING  # V, that of the tokenizer
    max_seq_len: int = MISSING  # tokens a document may have
    rope_theta: float = 4e6
    rms_norm_eps: float = 1e-5
    tie_embedding: bool = True  # output projection = input embedding
    init_std: float = 0.02  # of every weight matrix; biases start at 0, norms at 1
    bos_id: int = 1
    pad_id: int = 0
    eos_id: int = 45892  # turn end; at scale=tiny the tokenizer's own

    def check(self):
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size",
                     "vocab_size", "max_seq_len"):
            _at_least(f"model.{name}", getattr(self, name), 1)
        _require(self.num_heads % self.num_kv_heads == 0,
                 f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}.")
        _require(self.rope_theta > 0, f"model.rope_theta={self.rope_theta}: expected above 0.")
        _require(self.rms_norm_eps > 0, f"model.rms_norm_eps={self.rms_norm_eps}: expected above 0.")
        _at_least("model.init_std", self.init_std, 0)
        for name in ("bos_id", "pad_id", "eos_id"):
            _in_range(f"model.{name}", getattr(self, name), 0, self.vocab_size - 1)
        _require(self.head_dim % 2 == 0, f"model.head_dim={self.head_dim}: rotary embedding needs an even head size.")


@dataclass
class DataConfig(_Section):
    """Where the examples come from and how they become rows."""

    source: str = "arithmetic"  # arithmetic (built in) | chats | gsm8k | documents
    train: list[str] = field(default_factory=list)  # files of the training examples; empty for arithmetic
    heldout: list[str] = field(default_factory=list)  # files of the held-out examples; empty: num_heldout of train
    dress: str = "fast"  # reasoning: thoughts and answer | fast: the short worked answer | result: the bare result |
    #                      text: plain text, every token supervised (pre-training)
    num_examples: int = 0  # training examples used, the first ones; 0: all (arithmetic needs a number)
    num_heldout: int = 500  # held-out examples used
    language: str = "both"  # of the built-in problems: both | en | zh
    seed: int = 0  # of the built-in problems; apart from the recipe's seed, so that runs over seeds stay comparable
    tokenizer: str | None = None  # a SentencePiece model; null: that of init_from, or at tiny one trained on the corpus
    seq_len: int = MISSING  # tokens in a packed row
    on_error: str = "raise"  # malformed line: raise | skip (counted and reported)

    def check(self):
        _one_of("data.source", self.source, ("arithmetic", "chats", "gsm8k", "documents"))
        _one_of("data.dress", self.dress, ("reasoning", "fast", "result", "text"))
        _require(self.source != "documents" or self.dress == "text",
                 f"data.dress={self.dress} with data.source=documents: plain documents are text; use "
                 "data.dress=text, as recipe=pretrain does.")
        _one_of("data.language", self.language, ("both", "en", "zh"))
        _one_of("data.on_error", self.on_error, ("raise", "skip"))
        _at_least("data.seq_len", self.seq_len, 8)
        _at_least("data.num_examples", self.num_examples, 0)
        _at_least("data.num_heldout", self.num_heldout, 1)
        if self.source == "arithmetic":
            _require(not self.train and not self.heldout,
                     f"data.train={self.train}: the built-in problems need no files; "
                     "choose data=chats, data=gsm8k or data=documents to read yours.")
            _at_least("data.num_examples", self.num_examples, 1)
        else:
            _require(self.train, f"data.train is empty: data.source={self.source} needs at least one file, "
                                 "for example data.train=[my_chats.jsonl].")


@dataclass
class TrainConfig(_Section):
    """Batch, schedule and AdamW."""

    epochs: float = 0.0  # passes over the rows; this or steps
    steps: int = 0  # optimizer steps; this or epochs
    rows_per_step: int = MISSING  # rows of data.seq_len tokens in an optimizer step, over all ranks
    micro_batch_rows: int = MISSING  # rows in one forward and backward; divides rows_per_step
    lr: float = MISSING  # peak learning rate
    min_lr: float = 0.0  # at the end of the cosine
    warmup_steps: int = 0  # linear from 0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # decoupled; none on norms and biases
    clip_norm: float = 1.0  # global gradient norm
    eval_every: int = 0  # steps between validations; 0: only before the first and after the last step

    def check(self):
        _require((self.steps > 0) != (self.epochs > 0),
                 f"train.steps={self.steps} and train.epochs={self.epochs}: give exactly one of them; "
                 "the other is 0.")
        _at_least("train.micro_batch_rows", self.micro_batch_rows, 1)
        _require(self.rows_per_step >= 1 and self.rows_per_step % self.micro_batch_rows == 0,
                 f"train.rows_per_step={self.rows_per_step} is not a positive multiple of "
                 f"train.micro_batch_rows={self.micro_batch_rows}.")
        _require(self.lr > 0, f"train.lr={self.lr}: expected above 0.")
        _in_range("train.min_lr", self.min_lr, 0.0, self.lr)
        _at_least("train.warmup_steps", self.warmup_steps, 0)
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"train.{name}={getattr(self, name)}: expected in [0, 1).")
        _require(self.eps > 0, f"train.eps={self.eps}: expected above 0.")
        _at_least("train.weight_decay", self.weight_decay, 0)
        _require(self.clip_norm > 0, f"train.clip_norm={self.clip_norm}: expected above 0.")
        _at_least("train.eval_every", self.eval_every, 0)


@dataclass
class RolloutConfig(_Section):
    """Answers sampled from a model, and those used to measure accuracy."""

    samples_per_prompt: int = 1
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    max_prompt_len: int = MISSING  # tokens; a longer prompt is an error
    max_new_tokens: int = MISSING  # an answer that has not ended by then is truncated
    num_slots: int = 64  # sequences generated side by side; a finished one is replaced by the next prompt
    prompts_per_shard: int = 1024  # what a killed run may lose
    drop: list[str] = field(default_factory=list)  # answers not to train on: truncated | repetitive | wrong | short
    min_tokens: int = 4  # below it an answer is short
    max_repeats: int = 4  # more immediate repeats of an up-to-16-token phrase make an answer repetitive

    def check(self):
        _at_least("rollout.samples_per_prompt", self.samples_per_prompt, 1)
        _at_least("rollout.temperature", self.temperature, 0)
        _at_least("rollout.top_k", self.top_k, 0)
        _require(0 < self.top_p <= 1, f"rollout.top_p={self.top_p}: expected in (0, 1].")
        for name in ("max_prompt_len", "max_new_tokens", "num_slots", "prompts_per_shard", "max_repeats"):
            _at_least(f"rollout.{name}", getattr(self, name), 1)
        for criterion in self.drop:
            _one_of("rollout.drop", criterion, ("truncated", "repetitive", "wrong", "short"))


@dataclass
class DistillConfig(_Section):
    """Offline distillation: L = (1 - weight) * CE + weight * KL (convex), or CE + weight * KL (additive)."""

    answers: str = "student"  # whose answers the teacher scores: label (the references) | teacher | student
    refresh_at: list[float] = field(default_factory=list)  # at these shares of the steps the student answers anew
    loss_form: str = "convex"  # convex (P2) | additive (P1)
    weight: float = 0.9  # lambda
    top_k: int = 10  # teacher log-probabilities kept per position
    temperature: float = 1.0
    tail: str = "bucket"  # bucket | renormalised_teacher | renormalised_both | truncated
    ce_on: str = "response"  # response | off: then L = weight * KL

    def check(self):
        _one_of("kd.answers", self.answers, ("label", "teacher", "student"))
        _one_of("kd.loss_form", self.loss_form, ("convex", "additive"))
        _one_of("kd.tail", self.tail, ("bucket", "renormalised_teacher", "renormalised_both", "truncated"))
        _one_of("kd.ce_on", self.ce_on, ("response", "off"))
        _at_least("kd.weight", self.weight, 0)
        _require(self.loss_form != "convex" or self.weight <= 1,
                 f"kd.weight={self.weight}: the convex form (1 - weight) * CE + weight * KL needs it from 0 to 1.")
        _at_least("kd.top_k", self.top_k, 1)
        _require(self.temperature > 0, f"kd.temperature={self.temperature}: expected above 0; "
                                       "the limit 0 would be the teacher's top token alone, which kd.top_k=1 gives.")
        previous = 0.0
        for share in self.refresh_at:
            _require(previous < share < 1, f"kd.refresh_at={self.refresh_at}: expected rising shares of the steps "
                                           "between 0 and 1.")
            previous = share
        _require(not self.refresh_at or self.answers == "student",
                 f"kd.refresh_at={self.refresh_at} with kd.answers={self.answers}: only the student's answers change "
                 "during training; set kd.answers=student or kd.refresh_at=[].")


@dataclass
class RunConfig(_Section):
    """Where and how a run is executed. Nothing here is part of what a run is: its results are reused across changes."""

    root: str = "runs"  # folder of all runs
    dir: str | None = None  # this run's folder; null: root/<recipe>-<scale>-<key>
    device: str = "CPU"  # CPU | Ascend
    mode: str = "graph"  # graph | eager (for debugging)
    # native: on CPU the library of ops/cpu, built on first use; on Ascend CANN's own and ascend_kernels' operators |
    # reference: MindSpore's general operations | ascendc_host, on CPU: attention and losses run the operators' AscendC
    # sources on a model of the 910B that checks every instruction; for tests: slow, in precision bfloat16 or float16,
    # model.head_dim 64 or 128.
    kernels: str = "native"
    reference_ops: list[str] = field(default_factory=list)  # ops that use their reference all the same
    # float32 | bfloat16 | float16 activations, master weights are float32. On CPU tensors stay float32, and bfloat16 is
    # what matrix products and attention round their operands to. float16 there needs kernels=ascendc_host, and is what
    # attention and losses round to.
    precision: str = "float32"
    num_threads: int = 0  # 0: all cores that the process may use
    logits_chunk: int = 1024  # positions whose logits exist at a time
    peak_tflops: float = 0.0  # of the device at this precision, for MFU; 0: unknown, MFU n/a
    log_every: int = 10  # steps between step lines
    save_every: int = 500  # steps between checkpoints
    keep_checkpoints: int = 2  # newest ones kept, beside the best

    def check(self):
        _one_of("run.device", self.device, ("CPU", "Ascend"))
        _one_of("run.mode", self.mode, ("graph", "eager"))
        _one_of("run.kernels", self.kernels, ("native", "reference", "ascendc_host"))
        _one_of("run.precision", self.precision, ("float32", "bfloat16", "float16"))
        if self.kernels == "ascendc_host":
            _require(self.device == "CPU", f"run.kernels=ascendc_host with run.device={self.device}: it runs the "
                                           "AscendC sources on a CPU; on Ascend run.kernels=native calls them.")
            _one_of("run.precision with run.kernels=ascendc_host", self.precision, ("bfloat16", "float16"))
        elif self.device == "CPU":
            _one_of("run.precision with run.device=CPU", self.precision, ("float32", "bfloat16"))
            _require(self.kernels == "native" or self.precision == "float32",
                     f"run.precision={self.precision} with run.kernels=reference: the reference ops compute in float32 "
                     "on CPU; use run.kernels=native.")
        _at_least("run.num_threads", self.num_threads, 0)
        for name in ("logits_chunk", "log_every", "save_every", "keep_checkpoints"):
            _at_least(f"run.{name}", getattr(self, name), 1)


@dataclass
class Recipe(_Section):
    """One run, whole."""

    recipe: str = MISSING  # its name
    scale: str = "tiny"  # smoke (seconds) | tiny (minutes on 2 cores) | 1b (the papers' values)
    task: str = MISSING  # language_model | distill
    seed: int = 0  # of initial weights, shuffling and sampling
    init_from: str | None = None  # a recipe's name, a run folder or a Hugging Face folder; null: random weights
    teacher: str | None = None  # the same, for distill
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    kd: DistillConfig = field(default_factory=DistillConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self):
        _one_of("scale", self.scale, ("smoke", "tiny", "1b"))
        _at_least("seed", self.seed, 0)
        _one_of("task", self.task, ("language_model", "distill"))
        _require(self.recipe != "sft_teacher" or self.scale != "1b",
                 "recipe=sft_teacher with scale=1b: at this scale the teacher is a model you bring, such as "
                 "openPangu-Embedded-7B; give its Hugging Face folder as teacher=... to a distillation recipe.")
        _require(self.data.seq_len <= self.model.max_seq_len,
                 f"data.seq_len={self.data.seq_len} exceeds model.max_seq_len={self.model.max_seq_len}: "
                 "shorten data.seq_len or choose a longer model.")
        _require(self.run.kernels != "ascendc_host" or "attention" in self.run.reference_ops or
                 self.model.head_dim in (64, 128),
                 f"model.head_dim={self.model.head_dim} of recipe={self.recipe} with run.kernels=ascendc_host: the "
                 "attention operator takes 64 or 128; set model.head_dim=64 (of a teacher in its own run, then "
                 "teacher=<run folder>) or run.reference_ops=[attention].")
        if self.task == "distill":
            _require(self.teacher is not None, "teacher is missing: a distillation recipe needs a recipe's name, a run "
                                               "folder or a Hugging Face folder, for example teacher=sft_teacher.")
            _require(self.init_from is not None, "init_from is missing: distillation starts from a trained student, "
                                                 "for example init_from=sft_fast.")
            _require(self.kd.top_k <= self.model.vocab_size,
                     f"kd.top_k={self.kd.top_k} exceeds model.vocab_size={self.model.vocab_size}.")
            longest = self.rollout.max_prompt_len + self.rollout.max_new_tokens
            _require(longest <= self.data.seq_len,
                     f"rollout.max_prompt_len + rollout.max_new_tokens = {longest} exceeds data.seq_len="
                     f"{self.data.seq_len}: an answer would not fit in a row; shorten one or lengthen data.seq_len.")
            _require(self.data.dress != "text", "data.dress=text has no prompts to answer: distillation needs "
                                                "data.dress=fast, reasoning or result.")


ConfigStore.instance().store(name="recipe_schema", node=Recipe)


def recipes_folder():
    """The YAML files: package mindpangu.recipes where it is installed, else recipes/ beside mindpangu/."""
    spec = importlib.util.find_spec("mindpangu.recipes")
    if spec is not None:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).resolve().parents[1] / "recipes"


def recipe_names():
    """Names that recipe=... takes."""
    return sorted(path.stem for path in (recipes_folder() / "recipe").glob("*.yaml"))


def checked(composed):
    """The Recipe of a composed Hydra configuration: typed, checked, read-only."""
    return OmegaConf.to_object(composed)


def check_fields(overrides):
    """Raise ValueError for an override such as "kd.wieght=1" that names no field, with what is meant or possible."""
    for override in overrides:
        name, equals, _ = override.partition("=")
        parts = name.lstrip("+~").split(".")
        if not equals or name.startswith("-") or parts[0].split("/")[0] == "hydra" or "@" in name:
            continue
        section, known = Recipe, [f.name for f in fields(Recipe)]
        for depth, part in enumerate(parts):
            if part not in known:
                where = ".".join(parts[:depth])
                close = difflib.get_close_matches(part, known, 1)
                hint = f"did you mean {'.'.join([*parts[:depth], *close])}? " if close else ""
                raise ValueError(f"{override}: no such field; {hint}{where or 'A recipe'} has {', '.join(known)}.")
            section = next(f.type for f in fields(section) if f.name == part)
            known = [f.name for f in fields(section)] if is_dataclass(section) else []


def load_recipe(overrides):
    """Compose a Recipe from overrides as on the command line, for example ["recipe=sft_fast", "seed=1"]."""
    if GlobalHydra.instance().is_initialized():
        return checked(compose("config", overrides=list(overrides)))
    with initialize_config_dir(str(recipes_folder()), version_base="1.3"):
        return checked(compose("config", overrides=list(overrides)))


def as_dict(section):
    """The section as plain dictionaries, lists and scalars."""
    return {f.name: as_dict(value) if isinstance(value := getattr(section, f.name), _Section) else
            list(value) if isinstance(value, list) else value for f in fields(section)}


def num_training_steps(train, steps_per_epoch):
    """Optimizer steps of a run: train.steps, or train.epochs passes rounded up."""
    return train.steps or max(1, math.ceil(train.epochs * steps_per_epoch))


def differences(left: dict[str, Any], right: dict[str, Any], prefix=""):
    """Lines "field: left | right" for every leaf in which two nested dictionaries differ."""
    lines = []
    for key in sorted(set(left) | set(right)):
        a, b = left.get(key), right.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} | {b!r}")
    return lines
