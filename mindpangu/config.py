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

    source: str = "arithmetic"  # arithmetic (built in) | chats | gsm8k | documents | problems (for grpo) |
    #                             packed: rows that curate wrote | curated: those that it makes of this very recipe
    train: list[str] = field(default_factory=list)  # files of the training examples; empty for arithmetic and curated;
    #                                                 packed: the folder rows/ of a curation
    heldout: list[str] = field(default_factory=list)  # files of the held-out examples; empty: num_heldout of train;
    #                                                   packed: those that the curation set aside
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
        _one_of("data.source", self.source, ("arithmetic", "chats", "gsm8k", "documents", "problems", "packed",
                                             "curated"))
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
                     "choose data=chats, data=gsm8k, data=documents or data=problems to read yours.")
            _at_least("data.num_examples", self.num_examples, 1)
        _require(self.source != "curated" or not self.train, f"data.train={self.train} with data.source=curated: what "
                                                             "is curated stands in curate.sources.")
        _require(self.source != "packed" or len(self.train) <= 1,
                 f"data.train={self.train} with data.source=packed: expected one folder; curate several sources into "
                 "one mixture.")


@dataclass
class TrainConfig(_Section):
    """Batch, schedule and AdamW."""

    epochs: float = 0.0  # passes over the rows; this or steps
    steps: int = 0  # optimizer steps; this or epochs
    rows_per_step: int = MISSING  # rows of data.seq_len tokens in an optimizer step, over all ranks; 0 in grpo, whose
    #                               answers decide how many there are
    micro_batch_rows: int = MISSING  # rows in one forward and backward; divides rows_per_step; where a rank's share of
    #                                  the rows is smaller or not a multiple, fewer
    lr: float = MISSING  # peak learning rate
    min_lr: float = 0.0  # at the end of the cosine
    warmup_steps: int = 0  # linear from 0
    decay_steps: int = 0  # where the cosine ends; 0: with the run
    first_step: int = 0  # of the schedule, where earlier phases went through a part of it
    continue_optimizer: bool = False  # start with the moments of the run in init_from, of which this is a further phase
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    moments_dtype: str = "float32"  # float32 | bfloat16: half the memory, for beta2 up to 0.99, above which a second
    #                                 moment would move by less than a bfloat16's last bit, and stand still
    weight_decay: float = 0.1  # decoupled; none on norms and biases
    clip_norm: float = 1.0  # global gradient norm
    eval_every: int = 0  # steps between validations; 0: only before the first and after the last step

    def check(self):
        _require((self.steps > 0) != (self.epochs > 0),
                 f"train.steps={self.steps} and train.epochs={self.epochs}: give exactly one of them; "
                 "the other is 0.")
        _at_least("train.micro_batch_rows", self.micro_batch_rows, 1)
        _require(self.rows_per_step >= 0 and self.rows_per_step % self.micro_batch_rows == 0,
                 f"train.rows_per_step={self.rows_per_step} is not a positive multiple of "
                 f"train.micro_batch_rows={self.micro_batch_rows}.")
        _require(self.lr > 0, f"train.lr={self.lr}: expected above 0.")
        _in_range("train.min_lr", self.min_lr, 0.0, self.lr)
        _at_least("train.warmup_steps", self.warmup_steps, 0)
        _require(self.decay_steps == 0 or self.decay_steps > self.warmup_steps,
                 f"train.decay_steps={self.decay_steps}: expected 0, or more than "
                 f"train.warmup_steps={self.warmup_steps}.")
        _at_least("train.first_step", self.first_step, 0)
        _require(self.first_step == 0 or self.decay_steps > self.first_step,
                 f"train.first_step={self.first_step} with train.decay_steps={self.decay_steps}: expected "
                 "train.decay_steps of the whole schedule, so above it.")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"train.{name}={getattr(self, name)}: expected in [0, 1).")
        _one_of("train.moments_dtype", self.moments_dtype, ("float32", "bfloat16"))
        _require(self.moments_dtype == "float32" or self.beta2 <= 0.99,
                 f"train.moments_dtype=bfloat16 with train.beta2={self.beta2}: the second moment would stand still; "
                 "expected train.beta2 up to 0.99, or float32.")
        _require(self.eps > 0, f"train.eps={self.eps}: expected above 0.")
        _at_least("train.weight_decay", self.weight_decay, 0)
        _require(self.clip_norm > 0, f"train.clip_norm={self.clip_norm}: expected above 0.")
        _at_least("train.eval_every", self.eval_every, 0)


@dataclass
class ServerConfig(_Section):
    """A model behind an OpenAI-compatible server."""

    _name = ""  # the section's, in errors
    url: str | None = None  # for example http://127.0.0.1:8000/v1
    model: str = "mindpangu"  # its name there
    api_key_env: str | None = None  # environment variable that holds the key
    timeout_s: float = 3600.0  # of a request
    max_retries: int = 5
    num_parallel: int = 8  # requests at a time

    def check(self):
        _require(self.timeout_s > 0, f"{self._name}.timeout_s={self.timeout_s}: expected above 0.")
        _at_least(f"{self._name}.max_retries", self.max_retries, 0)
        _at_least(f"{self._name}.num_parallel", self.num_parallel, 1)


def _check_engine(name, engine, server, engines):
    _one_of(f"{name}.engine", engine, engines)
    _require((engine == "openai") == (server.url is not None),
             f"{name}.engine={engine} with {name}.server.url={server.url}: a server needs both {name}.engine=openai "
             "and its URL.")


@dataclass
class RolloutServerConfig(ServerConfig):
    """A server that takes and returns token ids and log-probabilities: vLLM, or mindpangu.serve."""

    _name = "rollout.server"
    prompts_per_request: int = 64  # whose answers are one reply
    weights_dir: str | None = None  # where weights are handed over, seen by the server under the same path; null:
    #                                 "served" in the run folder
    reload_url: str | None = None  # POSTed when weights have changed; null: <url without /v1>/reload
    reload_body: str = '{"path": "{folder}"}'  # {folder}: the safetensors folder

    def check(self):
        super().check()
        _at_least("rollout.server.prompts_per_request", self.prompts_per_request, 1)
        _require("{folder}" in self.reload_body,
                 f"rollout.server.reload_body={self.reload_body!r}: expected JSON with {{folder}} in it.")


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
    prompts_per_shard: int = 1024  # what a killed run may lose; a shard is answered by one rank
    drop: list[str] = field(default_factory=list)  # answers not to train on: truncated | repetitive | wrong | short
    min_tokens: int = 4  # below it an answer is short
    max_repeats: int = 4  # more immediate repeats of an up-to-16-token phrase make an answer repetitive
    engine: str = "builtin"  # builtin: this process | openai: rollout.server
    server: RolloutServerConfig = field(default_factory=RolloutServerConfig)

    def check(self):
        _check_engine("rollout", self.engine, self.server, ("builtin", "openai"))
        _at_least("rollout.samples_per_prompt", self.samples_per_prompt, 1)
        _at_least("rollout.temperature", self.temperature, 0)
        _at_least("rollout.top_k", self.top_k, 0)
        _require(0 < self.top_p <= 1, f"rollout.top_p={self.top_p}: expected in (0, 1].")
        for name in ("max_prompt_len", "max_new_tokens", "num_slots", "prompts_per_shard", "max_repeats"):
            _at_least(f"rollout.{name}", getattr(self, name), 1)
        for criterion in self.drop:
            _one_of("rollout.drop", criterion, ("truncated", "repetitive", "wrong", "short"))


@dataclass
class TeacherServerConfig(ServerConfig):
    """A server that returns the log-probabilities of a prompt's tokens, by token ids: vLLM, or mindpangu.serve. It
    serves the weights of the folder that teacher= names."""

    _name = "kd.server"
    prompts_per_request: int = 8  # samples in one, at kd.top_k=10 about 0.8 KB of reply for each token of theirs, and
    #                               several times that once read; 1 for vLLM, which batches requests by itself

    def check(self):
        super().check()
        _at_least("kd.server.prompts_per_request", self.prompts_per_request, 1)


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
    engine: str = "builtin"  # who computes the teacher: builtin: this process | mindformers: its GPTModel, in this
    #                          process | openai: kd.server
    server: TeacherServerConfig = field(default_factory=TeacherServerConfig)

    def check(self):
        _one_of("kd.answers", self.answers, ("label", "teacher", "student"))
        _one_of("kd.loss_form", self.loss_form, ("convex", "additive"))
        _one_of("kd.tail", self.tail, ("bucket", "renormalised_teacher", "renormalised_both", "truncated"))
        _one_of("kd.ce_on", self.ce_on, ("response", "off"))
        _check_engine("kd", self.engine, self.server, ("builtin", "mindformers", "openai"))
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
class EvalConfig(_Section):
    """Benchmarks through lm-eval; the model is that of init_from."""

    form: str = "instruct"  # instruct: questions in the chat template, no examples | base: plain text with examples
    tasks: list[str] = field(default_factory=list)  # benchmarks; empty: those of the papers' table for this form
    benchmarks_dir: str = "benchmarks"  # folder of their published files, see python -m mindpangu.evaluate --list-tasks
    preset: str = "greedy_8k"  # greedy_8k | sampled_28k_mean3 (temperature 0.7, mean of 3) | task (greedy, each task's
    #                            own length)
    max_new_tokens: int = 0  # of an answer; 0: the preset's
    num_repeats: int = 0  # answers to each question, averaged; 0: the preset's
    num_fewshot: int | None = None  # examples before a question, where a task has any; null: each task's own number
    limit: int = 0  # items of each task (of each subject, where subjects are tasks), the first ones; 0: all
    num_slots: int = 32  # sequences generated side by side
    cache_tokens: int = 262144  # positions in the key/value caches of all of them
    batch_tokens: int = 4096  # tokens of a forward pass that scores given answers
    responses: str | None = None  # folder of the responses that are kept for the next start; null: run.root/responses

    def check(self):
        _one_of("eval.form", self.form, ("instruct", "base"))
        _one_of("eval.preset", self.preset, ("greedy_8k", "sampled_28k_mean3", "task"))
        for name in ("max_new_tokens", "num_repeats", "limit"):
            _at_least(f"eval.{name}", getattr(self, name), 0)
        for name in ("num_slots", "cache_tokens", "batch_tokens"):
            _at_least(f"eval.{name}", getattr(self, name), 1)
        _require(self.num_fewshot is None or self.num_fewshot >= 0,
                 f"eval.num_fewshot={self.num_fewshot}: expected null or at least 0.")
        _in_range("eval.num_repeats", self.num_repeats, 0, 255)


# CANN's names of chips: "Ascend" before the Name that npu-smi info prints
# (hiascend.com/document/detail/zh/canncommercial/900/devaids/opcompiletool/atlasop_compiler_07_0022.html). An Atlas
# 200I A2 has a 310B4 (8 TOPS in int8) or a 310B1 (20 TOPS), no other
# (hiascend.com/doc_center/source/zh/Atlas%20200I%20A2/23.0.RC3/re/npu/npusmi_007.html), a 300I DUO 310P3
# (github.com/vllm-project/vllm-ascend/issues/1141). The rest is in torch_npu/csrc/core/npu/NpuVariables.cpp of
# github.com/Ascend/pytorch, which has the training chips before 910B1 and 910_93xx besides.
SOCS = ("Ascend310B1", "Ascend310B2", "Ascend310B3", "Ascend310B4", "Ascend310P1", "Ascend310P2", "Ascend310P3",
        "Ascend310P4", "Ascend910B1", "Ascend910B2", "Ascend910B2C", "Ascend910B3", "Ascend910B4", "Ascend910B4-1")
_MAX_PROFILES = 100  # shapes of a graph that the converter compiles, decoding's included


@dataclass
class ExportConfig(_Section):
    """MindIR graphs for the edge, of the model in init_from."""

    buckets: list[int] = field(default_factory=lambda: [64, 256, 1024])  # prompt lengths that are compiled, rising; a
    #                                                  prompt is padded to the next one
    cache_len: int = 1280  # positions of the key/value cache: a prompt and its answer
    soc: str = "Ascend310B4"  # the chip, one of SOCS; Atlas 200I A2: Ascend310B4 or Ascend310B1
    precision_mode: str = "enforce_origin"  # of converter_lite: enforce_origin keeps norms and softmax in float32 |
    #                                         enforce_fp16 | preferred_fp32 | enforce_fp32 | preferred_optimal
    hugging_face: str | None = "bfloat16"  # weights of the Hugging Face folder: float32 | bfloat16; null: no folder
    key_file: str | None = None  # encrypt the graphs and weights by AES-GCM with the key in this file, in hexadecimal
    key_env: str | None = None  # or in this environment variable

    def check(self):
        _require(self.buckets, "export.buckets is empty: expected prompt lengths, such as [64,256,1024].")
        previous = 0
        for bucket in self.buckets:
            _require(bucket > previous, f"export.buckets={self.buckets}: expected rising numbers of tokens.")
            previous = bucket
        _require(len(self.buckets) < _MAX_PROFILES, f"export.buckets has {len(self.buckets)} lengths: the converter "
                                                    f"takes {_MAX_PROFILES} shapes, and decoding needs one.")
        _require(previous < self.cache_len,
                 f"export.cache_len={self.cache_len}: expected more than the longest of export.buckets="
                 f"{self.buckets}, or there is no room for an answer.")
        _one_of("export.soc", self.soc, SOCS)
        _one_of("export.precision_mode", self.precision_mode, (
            "enforce_origin", "enforce_fp16", "preferred_fp32", "enforce_fp32", "preferred_optimal"))
        _one_of("export.hugging_face", self.hugging_face, (None, "float32", "bfloat16"))
        _require(not (self.key_file and self.key_env),
                 f"export.key_file={self.key_file} and export.key_env={self.key_env}: give one of them.")


@dataclass
class CodeRewardConfig(_Section):
    """The sandbox in which an answer's code runs."""

    timeout_s: float = 10.0  # wall time of an answer with all its tests
    memory_mib: int = 512  # address space of each process
    max_processes: int = 8  # processes and threads of an answer; more for problems of concurrency
    max_output_kib: int = 256
    partial_credit: bool = True  # the reward rises with the share of tests that pass; false: all or nothing
    allow_unsafe: bool = False  # run code although this machine can isolate neither files nor processes

    def check(self):
        _require(self.timeout_s > 0, f"rewards.code.timeout_s={self.timeout_s}: expected above 0.")
        _at_least("rewards.code.memory_mib", self.memory_mib, 64)
        _at_least("rewards.code.max_processes", self.max_processes, 1)
        _at_least("rewards.code.max_output_kib", self.max_output_kib, 1)


@dataclass
class JudgeConfig(ServerConfig):
    """The language model that judges answers to open-ended prompts."""

    _name = "rewards.judge"
    model: str = "judge"
    timeout_s: float = 60.0
    mode: str = "score"  # score: a mark for each answer | pairwise: comparisons in both orders

    def check(self):
        super().check()
        _one_of("rewards.judge.mode", self.mode, ("score", "pairwise"))


@dataclass
class RewardsConfig(_Section):
    """What an answer is worth: wrong_format, or wrong_answer + (correct - wrong_answer) * the share that is right,
    less the weighted penalties, each from 0 to 1."""

    correct: float = 1.0  # P1 3.4
    wrong_answer: float = -0.5
    wrong_format: float = -1.0  # truncated, without or with several final answers; see rewards/format.py
    format_weight: float = 0.0  # of one more penalty for a wrong format
    ngram_weight: float = 0.0  # of the share of repeated n-grams
    line_weight: float = 0.0  # of the share of repeated lines
    length_weight: float = 0.0  # of the length within the last length_buffer tokens before rollout.max_new_tokens
    length_buffer: int = 0  # tokens (DAPO, arXiv 2503.14476, equation 13)
    num_workers: int = 2  # processes that verify side by side
    math_timeout_s: float = 5.0  # of one check
    code: CodeRewardConfig = field(default_factory=CodeRewardConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def check(self):
        _require(self.wrong_format <= self.wrong_answer < self.correct,
                 f"rewards.wrong_format={self.wrong_format}, wrong_answer={self.wrong_answer}, "
                 f"correct={self.correct}: expected them to rise.")
        for name in ("format_weight", "ngram_weight", "line_weight", "length_weight", "length_buffer"):
            _at_least(f"rewards.{name}", getattr(self, name), 0)
        _require((self.length_weight > 0) == (self.length_buffer > 0),
                 f"rewards.length_weight={self.length_weight} and rewards.length_buffer={self.length_buffer}: give "
                 "both, or neither.")
        _at_least("rewards.num_workers", self.num_workers, 1)
        _require(self.math_timeout_s > 0, f"rewards.math_timeout_s={self.math_timeout_s}: expected above 0.")


@dataclass
class GrpoConfig(_Section):
    """Group relative policy optimization (arXiv 2402.03300) with clip-higher; the answers are those of rollout."""

    prompts_per_rollout: int = 256  # prompts that are answered, rollout.samples_per_prompt times each; P1: the batch
    updates_per_rollout: int = 1  # optimizer steps on those answers, an equal share of the prompts each
    advantage_norm: str = "std"  # std: divided by the group's standard deviation | none: reward less the group's mean
    clip_low: float = 0.8  # range of the ratio of the policy to the one that sampled
    clip_high: float = 1.28
    kl_coefficient: float = 0.001  # of the KL to the starting model, in the loss
    loss_agg: str = "token"  # token: every token the same | sequence: every answer the same, its tokens' mean |
    #                          fixed_length: every answer the same, its tokens' sum over rollout.max_new_tokens
    mask_truncated: bool = False  # truncated answers leave the loss
    dynamic_sampling: bool = False  # sample further prompts until prompts_per_rollout groups have unequal rewards
    max_resamples: int = 4  # further rounds at most
    importance_cap: float = 0.0  # weigh tokens by min(trainer's / sampler's probability, cap); 0: off
    pass_rate_samples: int = 8  # answers of the starting model to each prompt; those it always or never solves are left
    #                             out; 0: all prompts are used

    def check(self):
        _one_of("grpo.advantage_norm", self.advantage_norm, ("std", "none"))
        _one_of("grpo.loss_agg", self.loss_agg, ("token", "sequence", "fixed_length"))
        _at_least("grpo.prompts_per_rollout", self.prompts_per_rollout, 1)
        _at_least("grpo.updates_per_rollout", self.updates_per_rollout, 1)
        _require(self.prompts_per_rollout % self.updates_per_rollout == 0,
                 f"grpo.prompts_per_rollout={self.prompts_per_rollout} is not a multiple of "
                 f"grpo.updates_per_rollout={self.updates_per_rollout}.")
        _require(0 < self.clip_low <= 1 <= self.clip_high,
                 f"grpo.clip_low={self.clip_low}, grpo.clip_high={self.clip_high}: expected ratios around 1, such as "
                 "0.8 and 1.28.")
        for name in ("kl_coefficient", "max_resamples", "importance_cap", "pass_rate_samples"):
            _at_least(f"grpo.{name}", getattr(self, name), 0)


# What data/attributes.py says of a document.
SUBCATEGORIES = ("code", "translation", "writing", "geometry", "calculus", "probability", "number_theory", "algebra",
                 "science", "arithmetic", "knowledge")
QUESTION_TYPES = ("code", "proof", "multiple_choice", "true_false", "fill_in", "rewrite", "open")
VERIFIABLE = ("math", "code")
FAULTS = ("mojibake", "control_characters", "unclosed_fence", "unbalanced_math", "html", "truncated")


@dataclass
class AnnotateConfig(ServerConfig):
    """Who says what a document is about, whether it is verifiable, how hard and how good it is."""

    _name = "curate.annotate"
    engine: str = "rules"  # rules: built in | openai: a model behind `url` too | checkpoint: one of ours too, see
    #                        checkpoint; a document that the model does not annotate keeps what the rules say
    timeout_s: float = 600.0
    checkpoint: str | None = None  # run, checkpoint or Hugging Face folder, which mindpangu.serve answers from
    max_prompt_len: int = 4096  # tokens of a request to the checkpoint
    max_new_tokens: int = 1024  # of a reply
    documents_per_request: int = 8
    max_document_chars: int = 4000  # that the model reads; of a longer document its start and its end
    prompt_price: float = 0.0  # of a million tokens read, in the currency of your choice
    completion_price: float = 0.0  # of a million tokens written
    pass_rates: str | None = None  # run folder with the student's pass rates, for complexity; null: unknown

    def check(self):
        super().check()
        _one_of("curate.annotate.engine", self.engine, ("rules", "openai", "checkpoint"))
        for engine, name in (("openai", "url"), ("checkpoint", "checkpoint")):
            _require((self.engine == engine) == (getattr(self, name) is not None),
                     f"curate.annotate.engine={self.engine} with curate.annotate.{name}={getattr(self, name)}: a model "
                     f"there needs both curate.annotate.engine={engine} and curate.annotate.{name}.")
        for name in ("max_prompt_len", "max_new_tokens", "documents_per_request"):
            _at_least(f"curate.annotate.{name}", getattr(self, name), 1)
        _at_least("curate.annotate.max_document_chars", self.max_document_chars, 100)
        for name in ("prompt_price", "completion_price"):
            _at_least(f"curate.annotate.{name}", getattr(self, name), 0)


@dataclass
class FilterConfig(_Section):
    """Which documents go, by their attributes. The defaults drop nothing but broken characters and loops."""

    min_chars: int = 0  # of the whole text
    max_chars: int = 0  # 0: any
    min_answer_chars: int = 0  # of the last reply with its thoughts
    languages: list[str] = field(default_factory=list)  # to keep, ISO 639-1; empty: all
    # mojibake | control_characters | unclosed_fence | unbalanced_math | html | truncated. The first two are bytes that
    # nobody wrote; the others also meet good texts that are about code or markup.
    drop_faults: list[str] = field(default_factory=lambda: ["mojibake", "control_characters"])
    # Half of all 10-grams said before is a loop: the most is 0.19 in GSM8K, 0.11 in MBPP, MATH-500 and IFEval.
    max_ngram_repetition: float = 0.5
    # Lists and programs repeat lines (MBPP up to 0.29, a prompt of IFEval 0.47); only a loop repeats three in four.
    max_line_repetition: float = 0.75
    subcategories: list[str] = field(default_factory=list)  # to keep, see data/attributes.py; empty: all
    question_types: list[str] = field(default_factory=list)  # likewise
    verifiable: list[str] = field(default_factory=list)  # keep only those that a verifier can judge: math | code
    min_hops: int = 0  # steps of inference in the solution
    max_hops: int = 0  # 0: any
    min_complexity: float = 0.0  # 1 - pass rate of the student: 0 it always solves, 1 it never does
    max_complexity: float = 1.0
    min_rating: int = 0  # of a model, 1 to 5; 0: any

    def check(self):
        for name in ("min_chars", "max_chars", "min_answer_chars", "min_hops", "max_hops"):
            _at_least(f"curate.filter.{name}", getattr(self, name), 0)
        for low, high in (("min_chars", "max_chars"), ("min_hops", "max_hops")):
            first, last = getattr(self, low), getattr(self, high)
            _require(last == 0 or first <= last, f"curate.filter.{low}={first} exceeds curate.filter.{high}={last}: "
                                                 "nothing would be kept.")
        for name in ("max_ngram_repetition", "max_line_repetition", "min_complexity", "max_complexity"):
            _in_range(f"curate.filter.{name}", getattr(self, name), 0.0, 1.0)
        _require(self.min_complexity <= self.max_complexity,
                 f"curate.filter.min_complexity={self.min_complexity} exceeds curate.filter.max_complexity="
                 f"{self.max_complexity}: nothing would be kept.")
        _in_range("curate.filter.min_rating", self.min_rating, 0, 5)
        for name, choices in (("drop_faults", FAULTS), ("subcategories", SUBCATEGORIES),
                              ("question_types", QUESTION_TYPES), ("verifiable", VERIFIABLE)):
            for value in getattr(self, name):
                _one_of(f"curate.filter.{name}", value, choices)


CURATE_STAGES = ("exact_duplicates", "attributes", "benchmarks", "near_duplicates", "zip")


@dataclass
class SourceConfig(_Section):
    """Raw data to curate: files of one kind of record."""

    name: str = MISSING
    paths: list[str] = MISSING  # files, folders and globs: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt
    language: str | None = None  # of all its documents; null: of each one, by its script
    category: str | None = None  # what mix goes by; null: the source's name
    licence: str | None = None
    fields: list[str] = field(default_factory=list)  # keys of a record that make its text, the last one the reply; []:
    #                                                 messages | question, answer | prompt, answer | instruction,
    #                                                 input, output | text, whichever it has

    def check(self):
        _require(self.paths, f"curate.sources: source {self.name!r} has no paths: expected files, folders or globs.")


@dataclass
class DecontaminateConfig(_Section):
    """Documents that hold items of benchmarks, by 13-grams."""

    benchmarks_dir: str | None = None  # folder of published benchmark files, see python -m mindpangu.evaluate
    #                                    --list-tasks; all that are there count
    files: list[str] = field(default_factory=list)  # further items, a record each, in the forms that sources take
    action: str = "drop"  # drop | report: keep them, and list what was found

    def check(self):
        _one_of("curate.decontaminate.action", self.action, ("drop", "report"))


@dataclass
class NearDuplicatesConfig(_Section):
    """MinHash-LSH over n-grams of words (Chinese: characters), candidates verified exactly."""

    threshold: float = 0.7  # Jaccard similarity
    num_words: int = 5  # of an n-gram
    num_permutations: int = 128
    band_size: int = 4  # MinHash values that candidates share; of pairs at 0.7 with these values 1.5e-4 are not seen

    def check(self):
        _require(0 < self.threshold <= 1, f"curate.near_duplicates.threshold={self.threshold}: expected in (0, 1].")
        _in_range("curate.near_duplicates.num_words", self.num_words, 1, 64)
        _require(1 <= self.band_size <= self.num_permutations and self.num_permutations % self.band_size == 0,
                 f"curate.near_duplicates.num_permutations={self.num_permutations}: expected a multiple of "
                 f"curate.near_duplicates.band_size={self.band_size}.")


@dataclass
class ZipConfig(_Section):
    """Selection of the documents that compress worst together (arXiv 2407.06645)."""

    budget: int = 0  # documents selected; 0: all, in which case nothing is compressed
    engine: str = "zstd"  # zstd | zlib_exact: the published program, slower
    k1: int = 10_000  # candidates of a round that are compressed with all that is selected
    k2: int = 200  # of these, the worst, which are compressed with the round's own picks
    k3: int = 100  # picked in a round
    strata: bool = True  # the budget is divided over language x category by their numbers of documents
    compat: str | None = None  # repr, with zlib_exact: compress Python's repr of the records, as published

    def check(self):
        _one_of("curate.zip.engine", self.engine, ("zstd", "zlib_exact"))
        _at_least("curate.zip.budget", self.budget, 0)
        _require(1 <= self.k3 <= self.k2 <= self.k1, f"curate.zip.k1={self.k1}, k2={self.k2}, k3={self.k3}: expected "
                                                     "1 <= k3 <= k2 <= k1.")
        _require(self.compat in (None, "repr") and (self.compat is None or self.engine == "zlib_exact"),
                 f"curate.zip.compat={self.compat}: expected null, or repr with curate.zip.engine=zlib_exact.")


@dataclass
class MixConfig(_Section):
    """What share of the mixture is of which category."""

    weights: dict[str, float] = field(default_factory=dict)  # by category, of the whole or of its group; {}: by size
    groups: dict[str, list[str]] = field(default_factory=dict)  # their categories; those in none are of group "other"
    ratio: dict[str, float] = field(default_factory=dict)  # of the groups, for example {reasoning: 3, other: 1}
    unit: str = "tokens"  # that the shares are of: samples | tokens
    max_epochs: float = 4.0  # how often a sample may be seen; a share that needs more makes the mixture smaller
    curriculum: list[str] = field(default_factory=list)  # categories and groups that come easy to hard, by the label of
    #                                                     difficulty
    on_missing: str = "raise"  # weights and ratio of what has no sample: raise | renormalise, which is said

    def check(self):
        _one_of("mix.unit", self.unit, ("samples", "tokens"))
        _one_of("mix.on_missing", self.on_missing, ("raise", "renormalise"))
        _require(self.max_epochs > 0, f"mix.max_epochs={self.max_epochs}: expected above 0.")
        for name, weights in (("weights", self.weights), ("ratio", self.ratio)):
            for key, weight in weights.items():
                _require(0 < weight < math.inf, f"mix.{name}.{key}={weight}: expected a positive number.")
        categories = [category for members in self.groups.values() for category in members]
        repeated = sorted({category for category in categories if categories.count(category) > 1})
        _require(not repeated, f"mix.groups has {', '.join(repeated)} twice: expected a category in one group.")
        unknown = sorted(set(self.ratio) - {*self.groups, "other"})
        _require(not unknown, f"mix.ratio has {', '.join(unknown)}: expected groups of mix.groups, or other.")


@dataclass
class CurateConfig(_Section):
    """From raw sources to packed rows. The rows suit a recipe by its data.dress, data.seq_len and data.tokenizer."""

    sources: list[SourceConfig] = field(default_factory=list)
    built_in: bool | None = None  # the built-in problems as one more source, category STEM; null: where there is no
    #                               other, at smoke and tiny
    on_error: str = "raise"  # malformed line: raise | skip (counted, reported and listed in malformed.jsonl)
    stages: list[str] = field(default_factory=lambda: list(CURATE_STAGES))  # the ones that run, always in this order
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    near_duplicates: NearDuplicatesConfig = field(default_factory=NearDuplicatesConfig)
    zip: ZipConfig = field(default_factory=ZipConfig)
    size: int = 0  # samples or tokens, as mix.unit says, of the mixture; 0: what it takes to see every document, or as
    #                many as mix.max_epochs allow
    samples_per_shard: int = 65536  # of the mixture that are packed together; fewer where they have 2^24 tokens
    engine: str = "local"  # local: processes of this machine | ray: Ray Data, whose machines share run.root
    num_processes: int = 0  # 0: as many as cores

    def check(self):
        names = [source.name for source in self.sources]
        _require(len(set(names)) == len(names), f"curate.sources are named {names}: give each a name of its own.")
        _one_of("curate.on_error", self.on_error, ("raise", "skip"))
        for stage in self.stages:
            _one_of("curate.stages", stage, CURATE_STAGES)
        _one_of("curate.engine", self.engine, ("local", "ray"))
        _at_least("curate.samples_per_shard", self.samples_per_shard, 1)
        for name in ("size", "num_processes"):
            _at_least(f"curate.{name}", getattr(self, name), 0)


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
    recompute: bool = False  # in training keep only each layer's input and compute the rest again on the way back: the
    #                          same numbers in far less memory, for a third more arithmetic
    sequence_parallel: int = 1  # ranks that share the tokens of their rows in training, each with its share of the
    #                             heads in attention; a divisor of model.num_kv_heads and of the number of ranks
    vocab_parallel: bool = False  # with sequence_parallel, in distillation: each of the ranks that share rows computes
    #                               the logits of its share of the vocabulary, for the tokens of all of them
    shard: str = "optimizer"  # of several ranks, each has: none: everything | optimizer: its share of the optimizer's
    #                           state (ZeRO 1) | gradients: of summed gradients too (ZeRO 2), for which they are summed
    #                           after every micro-batch and not once a step
    step_timeout_s: float = 1800.0  # of several ranks: how long one may be in a step, which begins with compiling it,
    #                                 before the job ends and names the rank that has not come; 0: without end
    peak_tflops: float = 0.0  # of the device at this precision, for MFU; 0: unknown, MFU n/a
    log_every: int = 10  # steps between step lines
    save_every: int = 500  # steps between checkpoints
    keep_checkpoints: int = 2  # newest ones kept, beside the best

    def check(self):
        _one_of("run.device", self.device, ("CPU", "Ascend"))
        _one_of("run.mode", self.mode, ("graph", "eager"))
        _one_of("run.kernels", self.kernels, ("native", "reference", "ascendc_host"))
        _one_of("run.precision", self.precision, ("float32", "bfloat16", "float16"))
        _one_of("run.shard", self.shard, ("none", "optimizer", "gradients"))
        _at_least("run.sequence_parallel", self.sequence_parallel, 1)
        _at_least("run.step_timeout_s", self.step_timeout_s, 0)
        _require(not self.vocab_parallel or self.sequence_parallel > 1,
                 "run.vocab_parallel=true with run.sequence_parallel=1: the vocabulary is divided among the ranks that "
                 "share their rows.")
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
    task: str = MISSING  # language_model | distill | grpo | evaluate | export | curate
    seed: int = 0  # of initial weights, shuffling and sampling
    init_from: str | None = None  # a recipe's name, a run folder or a Hugging Face folder; null: random weights
    teacher: str | None = None  # the same, for distill
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    kd: DistillConfig = field(default_factory=DistillConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    curate: CurateConfig = field(default_factory=CurateConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self):
        _one_of("scale", self.scale, ("smoke", "tiny", "1b"))
        _at_least("seed", self.seed, 0)
        _one_of("task", self.task, ("language_model", "distill", "grpo", "evaluate", "export", "curate"))
        _require(self.data.train or self.data.source in ("arithmetic", "curated") or self.curate.sources,
                 f"data.train is empty: data.source={self.data.source} needs at least one file, for example "
                 "data.train=[my_chats.jsonl].")
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
        _require(self.train.moments_dtype == "float32" or self.run.device != "CPU" or
                 (self.run.kernels != "reference" and "adamw" not in self.run.reference_ops),
                 "train.moments_dtype=bfloat16 on a CPU needs the adamw kernel: run.kernels=native, without adamw in "
                 "run.reference_ops.")
        parallel = self.run.sequence_parallel
        _require(self.model.num_kv_heads % parallel == 0,
                 f"run.sequence_parallel={parallel}: each rank gets its share of the heads, so expected a divisor of "
                 f"model.num_kv_heads={self.model.num_kv_heads}.")
        _require(self.data.seq_len >= parallel,
                 f"run.sequence_parallel={parallel} with data.seq_len={self.data.seq_len}: expected at least a token "
                 "for each rank.")
        _require((self.train.rows_per_step == 0) == (self.task == "grpo"),
                 f"train.rows_per_step={self.train.rows_per_step} with task={self.task}: expected 0 for grpo, whose "
                 "rows are as many as its answers fill, and at least 1 for the others.")
        _require(self.data.source != "problems" or self.task == "grpo",
                 f"data.source=problems with recipe={self.recipe}: problems have no reference replies to learn from; "
                 "they serve recipe=grpo, which then needs init_from=<run folder or Hugging Face folder>.")
        if self.task == "distill":
            _require(self.teacher is not None, "teacher is missing: a distillation recipe needs a recipe's name, a run "
                                               "folder or a Hugging Face folder, for example teacher=sft_teacher.")
            _require(self.kd.top_k <= self.model.vocab_size,
                     f"kd.top_k={self.kd.top_k} exceeds model.vocab_size={self.model.vocab_size}.")
        _require(not self.train.continue_optimizer or self.init_from is not None,
                 "train.continue_optimizer=true without init_from: expected the run of the phase before.")
        _require(self.data.source not in ("packed", "curated") or self.task in ("language_model", "curate"),
                 f"data.source={self.data.source} with recipe={self.recipe}: rows have no prompts to answer; use "
                 "data=chats 'data.train=[<curation>/curated.jsonl]'.")
        if self.task in ("distill", "grpo"):
            _require(self.init_from is not None, f"init_from is missing: task={self.task} starts from a trained "
                                                 "student, for example init_from=sft_fast.")
            longest = self.rollout.max_prompt_len + self.rollout.max_new_tokens
            _require(longest <= self.data.seq_len,
                     f"rollout.max_prompt_len + rollout.max_new_tokens = {longest} exceeds data.seq_len="
                     f"{self.data.seq_len}: an answer would not fit in a row; shorten one or lengthen data.seq_len.")
            _require(self.data.dress != "text", f"data.dress=text has no prompts to answer: task={self.task} needs "
                                                "data.dress=fast, reasoning or result.")
        if self.task == "grpo":
            _require(self.rollout.samples_per_prompt >= 2,
                     f"rollout.samples_per_prompt={self.rollout.samples_per_prompt}: a group needs at least 2 answers "
                     "to compare.")
            _require(self.rollout.temperature > 0, "rollout.temperature=0: all answers of a group would be the same; "
                                                   "expected above 0, such as 1.")
            _require(self.rewards.length_buffer < self.rollout.max_new_tokens,
                     f"rewards.length_buffer={self.rewards.length_buffer}: expected less than "
                     f"rollout.max_new_tokens={self.rollout.max_new_tokens}.")


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
    def plain(value):
        if isinstance(value, list):
            return [plain(element) for element in value]
        return as_dict(value) if isinstance(value, _Section) else value

    return {f.name: plain(getattr(section, f.name)) for f in fields(section)}


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
