"""What a recipe stands on, built in order; and the run itself.

Everything built has a key: a hash of the resolved fields that affect its bytes, of its inputs' hashes and of the format
version. The key is part of the folder's name, so a second start finds what is there, and run.* is not part of it.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import hydra
import numpy as np
import xxhash
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .config import (
    as_dict,
    check_fields,
    checked,
    differences,
    load_recipe,
    num_training_steps,
    recipe_names,
    recipes_folder,
)
from .data.batches import PackedBatches, SequenceShare, documents_to_samples, tokenized_to_samples
from .data.chat import decode_response, encode_chat, encode_prompt, list_stretches, template_digest
from .data.corpus import file_digests, load_corpus
from .data.documents import task_type
from .data.packed_shards import PackedShards, ShardBatches
from .data.shards import ShardFolder, SharedShards
from .data.tokenizer import Tokenizer, train_tokenizer
from .rewards.router import Rewards
from .rewards.score import Response
from .runtime import cluster
from .runtime.checkpoint import lock_folder, newest_checkpoint, write_atomic
from .runtime.cluster import world
from .runtime.device import activation_dtype, describe_environment, start
from .runtime.metrics import Reporter, format_seconds, peak_memory_gib, say

FORMAT_VERSION = 2
_TOKENIZER_EXAMPLES = 8000  # enough text for a vocabulary of thousands of pieces

# Overrides that what a recipe stands on takes over, so that one command line speaks for the whole pipeline: groups,
# whole sections ("run.") and single fields. The teacher only has to read the same tokens; the student is the same model
# on the same data from its first stage on. data.dress is what makes a stage, and run.dir is one run's.
_TEACHER_INHERITS = ("scale", "data", "data.source", "data.train", "data.heldout", "data.num_heldout", "data.language",
                     "data.tokenizer", "data.seq_len", "data.on_error", "data.seed", "run", "run.",
                     "rollout.max_prompt_len", "rollout.max_new_tokens", "rollout.num_slots", "model.vocab_size",
                     "model.max_seq_len")
_STUDENT_INHERITS = (*_TEACHER_INHERITS, "seed", "data.num_examples", "model", "model.", "curate.")


_OWN_DATA = ("data", "data.source", "data.train", "data.heldout", "data.num_heldout", "data.on_error", "data.seq_len")


class Upstream(NamedTuple):
    """A model that a run starts from: the folder with its weights, and what identifies their bytes."""

    folder: Path
    digest: str


# ---- Entry points ----------------------------------------------------------------------------------------------------

def entry_point(function):
    """A Hydra application: compose and check the recipe, then call function(recipe, overrides of the command line).

    msrun starts it once for every rank, and once as scheduler.
    """

    @hydra.main(version_base="1.3", config_path=str(recipes_folder()), config_name="config")
    def main(composed):
        with _clear_errors():
            function(checked(composed), list(HydraConfig.get().overrides.task))

    def checked_main():
        if cluster.is_scheduler():
            raise SystemExit(cluster.run_scheduler())
        with _clear_errors():
            check_fields(sys.argv[1:])
            cluster.join()
        main()
        world().leave()

    return checked_main


@contextlib.contextmanager
def _clear_errors():
    """Facts about the user's input or machine end the process with their message: a traceback would bury it."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError, OmegaConfBaseException) as error:
        world().fail(str(error))
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except Exception as error:
        world().fail(f"{type(error).__name__}: {error}")
        raise


def require_alone(command):
    """Refuse msrun's ranks where the work is not divided."""
    if world().size > 1:
        raise ValueError(f"{command} runs in one process: start it without msrun.")


def train(recipe, overrides):
    """Run a recipe to its end and return its run folder; what it stands on is built first, or reused."""
    if recipe.task in ("evaluate", "export", "curate"):
        raise ValueError(f"recipe={recipe.recipe} trains nothing: python -m mindpangu.{recipe.task} runs it.")
    with Plan(recipe, overrides) as plan:
        if world().on_main("look for the run", plan.is_done):
            say(f"{recipe.recipe}: already complete in {plan.folder}")
        else:
            run = {"language_model": _train_language_model, "distill": _distill, "grpo": _train_grpo}[recipe.task]
            run(plan)
        return plan.folder


def rollout(recipe, overrides):
    """Sample the answers that a distillation recipe trains on; returns their folder. Of recipe=grpo, those by which the
    starting model's pass rates are measured; returns the run folder, which then holds them."""
    if recipe.task == "grpo":
        return _measure_pass_rates(recipe, overrides)
    with _distillation_plan(recipe, overrides) as plan:
        if recipe.kd.answers == "label":
            raise ValueError("kd.answers=label trains on the reference answers: there is nothing to sample; use "
                             "python -m mindpangu.annotate.")
        return _answers(plan, "train").folder


def annotate(recipe, overrides):
    """Score a distillation recipe's answers with its teacher; returns the folder of the annotated shards."""
    with _distillation_plan(recipe, overrides) as plan:
        return _annotations(plan, "train").folder


def _distillation_plan(recipe, overrides):
    if recipe.task != "distill":
        raise ValueError(f"recipe={recipe.recipe} is no distillation: expected one of "
                         f"{[name for name in recipe_names() if name.startswith('kd_')]}.")
    return Plan(recipe, overrides)


# ---- Keys, folders and what stands upstream --------------------------------------------------------------------------

def make_key(kind, fields, inputs):
    """Ten hexadecimal digits of a hash over what determines an artifact's bytes."""
    text = json.dumps([FORMAT_VERSION, kind, fields, inputs], sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())[:10]


class Plan:
    """A recipe with its inputs resolved: examples, upstream models, tokenizer, key and run folder.

    Making a plan builds what is missing upstream, or raises with the commands that would at scale=1b. It does not
    import MindSpore unless something has to be built.
    """

    def __init__(self, recipe, overrides):
        if recipe.data.source == "curated":
            recipe = _with_rows(recipe)
        self.recipe, self.overrides = recipe, overrides
        self.engines = {}  # samplers and annotators made for this plan, see `_sampler` and `_annotator`
        self.root = Path(recipe.run.root)
        self.files = file_digests(recipe.data)
        self.init = self._upstream("init_from", recipe.init_from, _STUDENT_INHERITS)
        self.teacher = (self._upstream("teacher", recipe.teacher, _TEACHER_INHERITS)
                        if recipe.task == "distill" else None)
        self.tokenizer = self._tokenizer()
        self._check_models()
        if recipe.data.source == "packed":
            self.rows = PackedShards(recipe.data.train[0])
            self.rows.check(tokenizer=self.tokenizer.digest, template=template_digest(), seq_len=recipe.data.seq_len,
                            pad_id=recipe.model.pad_id)
        fields = as_dict(recipe)
        for section in ("run", "eval", "export", "curate", "mix", "init_from", "teacher", "scale", "recipe"):
            fields.pop(section, None)
        if recipe.task == "distill":
            del fields["kd"]["server"]
        else:
            del fields["kd"]
        if recipe.task != "grpo":
            del fields["grpo"], fields["rewards"]
        if recipe.task == "language_model":
            fields["rollout"] = {name: fields["rollout"][name] for name in ("max_prompt_len", "max_new_tokens")}
        else:
            del fields["rollout"]["server"]
        self.key = make_key("run", fields, self._input_digests())
        name = f"{recipe.recipe}-{recipe.scale}-{self.key}"
        self.folder = Path(recipe.run.dir) if recipe.run.dir else self.root / name

    @functools.cached_property
    def corpus(self):
        corpus = load_corpus(self.recipe.data)
        if corpus.skipped:
            say(f"data.on_error=skip: {len(corpus.skipped)} malformed lines skipped, the first: {corpus.skipped[0]}")
        if corpus.num_unused:
            say(f"data.num_examples={self.recipe.data.num_examples}: {corpus.num_unused} more examples are not used")
        return corpus

    @functools.cached_property
    def ranks(self):
        """How the work is divided. Only after the process has started: it imports MindSpore."""
        from .runtime.distributed import Ranks

        return Ranks(world(), self.recipe.run.sequence_parallel)

    @functools.cached_property
    def rewards(self):
        return Rewards(self.recipe.rewards, self.recipe.rollout.max_new_tokens, self.root / "judge-cache")

    def drop_engines(self):
        """Free the caches of samplers and the weights of annotators; MindSpore keeps those of compiled graphs."""
        self.engines.clear()
        gc.collect()
        import mindspore as ms

        ms.ms_memory_recycle()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if "rewards" in self.__dict__:
            self.rewards.close()

    def is_done(self):
        """Whether the run folder holds this run, complete. Raises ValueError if it holds another one."""
        path = self.folder / "run.json"
        if path.exists():
            found = _read_run(path)
            if found["key"] != self.key:
                changed = differences(found["recipe"], as_dict(self.recipe))
                raise ValueError(f"run folder {self.folder} holds another run; field: there | here:\n  " +
                                 "\n  ".join(changed or ["its inputs (data files, init_from or teacher) changed"]) +
                                 "\nChoose another run.dir, or leave run.dir out.")
        return (self.folder / "done.json").exists()

    def begin(self):
        """Lock the run folder and write down what runs in it. Returns the lock, a context."""
        lock = _lock(self.folder)
        if world().is_main:
            self.is_done()
            write_atomic(self.folder / "run.json",
                         json.dumps({"key": self.key, "recipe": as_dict(self.recipe)}, indent=1))
            write_atomic(self.folder / "recipe.yaml", OmegaConf.to_yaml(OmegaConf.create(as_dict(self.recipe))))
            write_atomic(self.folder / "env.json", describe_environment(self.recipe.run))
        world().gather(f"begin {self.folder}")
        return lock

    def _input_digests(self):
        return {"files": self.files, "tokenizer": self.tokenizer.digest, "template": template_digest(),
                "init_from": self.init.digest if self.init else None,
                "teacher": self.teacher.digest if self.teacher else None}

    def _upstream(self, field, reference, inherited):
        """The model that init_from or teacher names: a folder, or a recipe that is built if it has not run."""
        if reference is None:
            return None
        path = Path(reference)
        if (path / "config.json").is_file():
            return Upstream(path, _weights_digest(path))
        if (path / "run.json").is_file():
            return _finished_run(field, path)
        if reference not in recipe_names():
            raise ValueError(f"{field}={reference}: neither a run folder, a Hugging Face folder (with config.json) nor "
                             f"a recipe; the recipes are {recipe_names()}.")
        command = [f"recipe={reference}", *_inherited(self.overrides, inherited)]
        if _curates(reference) and self.recipe.data.source != "packed":  # other data than that of its further training
            command = [override for override in command if override.split("=")[0] not in _OWN_DATA]
        if not any(override.startswith("scale=") for override in command):
            command.append(f"scale={self.recipe.scale}")
        if self.recipe.scale == "1b":
            plan = _require_upstream(field, command)
        else:
            upstream = load_recipe(command)
            plan = Plan(upstream, command)
            if not world().on_main("look for an upstream run", plan.is_done):
                say(f"{self.recipe.recipe} needs {field}={reference}: building it in {plan.folder}")
                train(upstream, command)
        return _finished_run(field, plan.folder)

    def _tokenizer(self):
        """data.tokenizer, else that of init_from, else one trained on the examples."""
        data = self.recipe.data
        inherited = self.init and self.init.folder / "tokenizer.model"
        if data.source == "packed":
            return self._tokenizer_of_rows(Path(data.train[0]), inherited)
        if data.tokenizer:
            tokenizer = Tokenizer(data.tokenizer)
            if inherited and inherited.is_file() and Tokenizer(inherited).digest != tokenizer.digest:
                raise ValueError(f"data.tokenizer={data.tokenizer} is not the tokenizer that "
                                 f"init_from={self.init.folder} was trained with: leave data.tokenizer out, or use "
                                 f"{inherited}.")
            return tokenizer
        if inherited:
            if not inherited.is_file():
                raise ValueError(f"init_from={self.init.folder} has no tokenizer.model, and a new one would give its "
                                 "token ids other meanings: put the weights' tokenizer.model there or name it with "
                                 "data.tokenizer.")
            return Tokenizer(inherited)
        return built_tokenizer(self.recipe)

    def _tokenizer_of_rows(self, folder, inherited):
        tokenizer = Tokenizer(folder / "tokenizer.model")
        for name, path in (("data.tokenizer", self.recipe.data.tokenizer), ("init_from", inherited)):
            if path and Path(path).is_file() and Tokenizer(path).digest != tokenizer.digest:
                raise ValueError(f"{folder} was packed with another tokenizer than {name}'s {path}: the same ids would "
                                 f"mean other tokens; curate with data.tokenizer={path}.")
        return tokenizer

    def _check_models(self):
        model, tokenizer = self.recipe.model, self.tokenizer
        if tokenizer.vocab_size != model.vocab_size:
            raise ValueError(f"model.vocab_size={model.vocab_size}, but the tokenizer {tokenizer.model_file} has "
                             f"{tokenizer.vocab_size} pieces: they have to agree.")
        for name, ours, theirs in (("bos", model.bos_id, tokenizer.bos_id), ("pad", model.pad_id, tokenizer.pad_id),
                                   ("eos", model.eos_id, tokenizer.turn_end_id)):
            if ours != theirs:
                raise ValueError(f"model.{name}_id={ours}, but in the tokenizer {tokenizer.model_file} it is {theirs}.")
        for field, upstream in (("init_from", self.init), ("teacher", self.teacher)):
            if not upstream:
                continue
            from .model.weights import read_config

            config = read_config(upstream.folder)
            if config.max_seq_len < self.recipe.data.seq_len:
                raise ValueError(f"data.seq_len={self.recipe.data.seq_len}: {field}={upstream.folder} was made for at "
                                 f"most {config.max_seq_len} positions (max_position_embeddings in its config.json); "
                                 "shorten data.seq_len.")
            if field == "teacher" and config.vocab_size != model.vocab_size:
                raise ValueError(f"teacher={upstream.folder} has a vocabulary of {config.vocab_size}, the student of "
                                 f"model.vocab_size={model.vocab_size}: offline distillation compares the same tokens.")
        if self.teacher:
            path = self.teacher.folder / "tokenizer.model"
            if path.is_file() and Tokenizer(path).digest != tokenizer.digest:
                raise ValueError(f"teacher={self.teacher.folder} was trained with another tokenizer ({path}) than the "
                                 f"student's {tokenizer.model_file}: the same ids would mean other tokens.")


def _with_rows(recipe):
    """The recipe on the packed rows of its own curation, which is made where it is not at scale=1b."""
    from .curate import curate

    rows = world().on_main("curate", lambda: str(curate(recipe, may_build=recipe.scale != "1b") / "rows"))
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, source="packed", train=[rows]))


def built_tokenizer(recipe):
    """The Tokenizer of data.tokenizer, or one trained on the recipe's examples, or for what is curated on the built-in
    problems, if it has not been. ValueError at scale=1b, where weights have one."""
    data, model = recipe.data, recipe.model
    if data.tokenizer:
        return Tokenizer(data.tokenizer)
    if recipe.scale == "1b":
        raise ValueError("data.tokenizer is missing: give the SentencePiece model that the weights belong to, for "
                         "example data.tokenizer=openPangu-Embedded-1B/tokenizer.model.")
    built_in = data.source in ("arithmetic", "curated")
    examples = dataclasses.replace(data, source="arithmetic" if built_in else data.source, dress="text", seq_len=8,
                                   num_examples=_TOKENIZER_EXAMPLES if built_in else 0,
                                   num_heldout=1 if built_in else data.num_heldout)
    fields = as_dict(examples) | {"vocab_size": model.vocab_size}
    del fields["seq_len"], fields["train"], fields["heldout"]
    folder = Path(recipe.run.root) / f"tokenizer-{make_key('tokenizer', fields, file_digests(data))}"
    path = folder / "tokenizer.model"
    if world().is_main and not path.exists():
        with lock_folder(folder):
            texts = _plain_texts(load_corpus(examples).train[:_TOKENIZER_EXAMPLES], stretches=True)
            train_tokenizer(texts, model.vocab_size, path)
            say(f"tokenizer: {model.vocab_size} pieces from {len(texts)} stretches of text, {path}")
    world().gather("train a tokenizer")
    return Tokenizer(path)


def _curates(name):
    """Whether a recipe trains on rows that it curates itself."""
    return OmegaConf.load(recipes_folder() / "recipe" / f"{name}.yaml").get("data", {}).get("source") == "curated"


def _inherited(overrides, names):
    names_and_overrides = [(override.split("=")[0].lstrip("+~"), override) for override in overrides]
    return [override for name, override in names_and_overrides
            if name != "run.dir" and (name in names or f"{name.split('.')[0]}." in names)]


def _lock(folder):
    """A context in which no other run writes to the folder; of several ranks the first holds the lock."""
    lock = lock_folder(folder) if world().is_main else contextlib.nullcontext()
    world().gather(f"lock {folder}")
    return lock


def _open_shards(folder, binding, num_shards):
    """ShardFolder, made by the first rank if it is not there."""
    if world().is_main:
        ShardFolder.open(folder, binding, num_shards)
    world().gather(f"open {folder}")
    return ShardFolder.open(folder, binding, num_shards)


def _require_upstream(field, command):
    """The Plan of an upstream run that must be there already; raises ValueError with the commands that make it."""
    upstream = load_recipe(command)
    if upstream.data.source == "curated" and not upstream.curate.sources:
        own = f"{' '.join(command)} 'curate.sources=[...]'"
        raise _MissingRun(field, f"  python -m mindpangu.curate {own}\n  python -m mindpangu.train {own}")
    try:
        plan = Plan(upstream, command)
        missing, before = not plan.is_done(), ""
    except _MissingRun as error:
        missing, before = True, f"{error.commands}\n"
    if missing:
        line = "  python -m mindpangu.train " + " ".join(f"'{o}'" if set(o) & set("[]{} ") else o for o in command)
        raise _MissingRun(field, before + line)
    return plan


class _MissingRun(ValueError):
    def __init__(self, field, commands):
        super().__init__(f"{field} has not been run at this scale. Run first:\n{commands}\nor give {field}=<run folder "
                         "or Hugging Face folder>.")
        self.commands = commands


def _finished_run(field, folder):
    checkpoint = newest_checkpoint(folder)
    if not (folder / "done.json").is_file() or checkpoint is None:
        raise ValueError(f"{field}={folder}: this run is not complete; run its command again to finish it.")
    return Upstream(checkpoint, f"{_read_run(folder / 'run.json')['key']}/{checkpoint.name}")


def _read_run(path):
    """run.json: {"key", "recipe"}."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        return {"key": run["key"], "recipe": run["recipe"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe a run ({error!r}): restore it, or delete {path.parent} to start "
                         "over.") from error


def _weights_digest(folder):
    """A hash over a Hugging Face folder's configuration and weights."""
    digest = xxhash.xxh3_128()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


# ---- Examples to tokens ----------------------------------------------------------------------------------------------

def _plain_texts(examples, stretches=False):
    """Examples as plain texts: documents as they are, conversations as their contents, a text (or stretch) each."""
    texts = []
    for example in examples:
        if isinstance(example, str):
            texts.append(example)
        elif stretches:
            texts += list_stretches(example.messages)
        else:
            texts.append("\n".join(part for message in example.messages
                                   for part in (message.thoughts, message.content) if part))
    return texts


def _tokenize(plan, examples):
    """Samples of training examples in the recipe's dress."""
    tokenizer, data = plan.tokenizer, plan.recipe.data
    if data.dress == "text":
        documents = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.turn_end_id]
                     for text in _plain_texts(examples)]
        return documents_to_samples(documents, data.seq_len)
    return tokenized_to_samples([encode_chat(tokenizer, example.messages) for example in examples])


def _prompts(plan, examples):
    """Token ids of the examples' prompts. Raises ValueError if one is longer than rollout.max_prompt_len."""
    prompts = [encode_prompt(plan.tokenizer, example.messages[:-1]) for example in examples]
    lengths = np.array([len(prompt) for prompt in prompts])
    limit = plan.recipe.rollout.max_prompt_len
    if lengths.max(initial=0) > limit:
        raise ValueError(f"rollout.max_prompt_len={limit}: {int((lengths > limit).sum())} of {len(prompts)} prompts "
                         f"are longer, the longest has {lengths.max()} tokens; raise rollout.max_prompt_len (and "
                         "data.seq_len with it) or remove them.")
    return prompts


def _pack(plan, samples, seed):
    train = plan.recipe.train
    if not samples.is_target.any():
        raise ValueError("nothing is left to train on: no example or answer has a supervised token; check data.train "
                         f"and rollout.drop={plan.recipe.rollout.drop}.")
    micro_batch_rows, share = _rows_of_ranks(plan)
    batches = PackedBatches(samples, seq_len=plan.recipe.data.seq_len, rows_per_step=train.rows_per_step,
                            micro_batch_rows=micro_batch_rows, pad_id=plan.recipe.model.pad_id, seed=seed, share=share)
    return _said(batches)


def _packed_rows(plan):
    """The rows of data.source=packed, in their order."""
    recipe = plan.recipe
    micro_batch_rows, share = _rows_of_ranks(plan)
    return _said(ShardBatches(plan.rows, seq_len=recipe.data.seq_len, rows_per_step=recipe.train.rows_per_step,
                              micro_batch_rows=micro_batch_rows, pad_id=recipe.model.pad_id, seed=recipe.seed,
                              share=share))


def _said(batches):
    dropped = f", {batches.num_dropped} over-long samples dropped" if batches.num_dropped else ""
    say(f"data: {batches.num_samples} samples in {batches.num_rows} rows of {batches.seq_len} tokens, fill "
        f"{batches.fill:.1%}, {batches.num_targets} supervised tokens{dropped}")
    return batches


def _rows_of_ranks(plan):
    """(rows of a micro-batch, (i, n): the i-th of n equal shares of every step's micro-batches, this rank's)."""
    train, ranks, num_data = plan.recipe.train, plan.ranks, plan.ranks.num_data
    if train.rows_per_step % num_data:
        raise ValueError(f"train.rows_per_step={train.rows_per_step} can't be divided among {num_data} ranks with rows "
                         "of their own: change one of the two.")
    # Which does not change a gradient.
    micro_batch_rows = max(rows for rows in range(1, train.micro_batch_rows + 1)
                           if train.rows_per_step // num_data % rows == 0)
    return micro_batch_rows, (ranks.data_rank, num_data)


# ---- Models and validation -------------------------------------------------------------------------------------------

def _load(plan, folder):
    """A model with a folder's weights, not to be trained."""
    from .model.weights import load_model

    run = plan.recipe.run
    return load_model(folder, activation_dtype(run), frozen_dtype="bfloat16" if run.precision == "bfloat16" else None)


def _student(plan):
    """The model to train: init_from's weights, or random ones."""
    from .model.pangu import DTYPES, Pangu
    from .model.weights import load_weights

    recipe = plan.recipe
    model = Pangu(recipe.model, recipe.seed, DTYPES[activation_dtype(recipe.run)], zero_weights=plan.init is not None)
    if plan.init:
        load_weights(model, plan.init.folder)
    if recipe.run.recompute:
        for layer in model.layers:
            layer.recompute()
    if plan.ranks.num_sequence > 1:
        from .ops.collectives import split_heads, split_tokens

        model.split_sequences(split_heads(plan.ranks.sequence_group), split_tokens(plan.ranks.sequence_group))
    return model


def _share_tokens(plan, batches):
    """Batches, or this rank's share of their tokens."""
    ranks = plan.ranks
    return batches if ranks.num_sequence == 1 else SequenceShare(batches, ranks.sequence_rank, ranks.num_sequence)


def _generator(plan, model, **sampling):
    from .model.generate import Generator

    rollout, config = plan.recipe.rollout, plan.recipe.model
    return Generator(model, num_slots=rollout.num_slots, prompt_len=rollout.max_prompt_len,
                     max_new_tokens=rollout.max_new_tokens, eos_id=config.eos_id, pad_id=config.pad_id,
                     mode=plan.recipe.run.mode, **sampling)


def _validator(plan, model, loss_fn, metric_names, heldout_samples):
    """evaluate() for the loop: held-out loss, and accuracy of greedy answers where problems can be verified."""
    from .trainers.validate import HeldoutLoss

    recipe = plan.recipe
    heldout_loss = HeldoutLoss(loss_fn, metric_names, heldout_samples, seq_len=recipe.data.seq_len,
                               num_rows=recipe.train.micro_batch_rows, pad_id=recipe.model.pad_id,
                               ranks=plan.ranks, mode=recipe.run.mode)
    measure = _accuracy(plan, model) if recipe.data.dress != "text" else None

    def evaluate(step):
        measured = heldout_loss.measure()
        if not measure:
            return measured, -measured["loss"]
        accuracy = measure(step)
        return measured | accuracy, accuracy["accuracy"]

    return evaluate


def _accuracy(plan, model):
    """measure(step) -> {"accuracy", "truncated"} of greedy answers to the held-out problems that can be verified, which
    also writes some of them to samples/; None if there are none."""
    from .trainers.validate import measure_accuracy

    examples = [example for example in plan.corpus.heldout if plan.rewards.can_verify(example)]
    if not examples:
        return None
    generator, prompts = _generator(plan, model, temperature=0.0), _prompts(plan, examples)

    def measure(step):
        accuracy, shown = measure_accuracy(generator, plan.tokenizer, prompts, examples, plan.rewards.are_correct,
                                           world())
        if world().is_main:
            folder = plan.folder / "samples"
            folder.mkdir(exist_ok=True)
            write_atomic(folder / f"step-{step:06d}.jsonl",
                         "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in shown))
        return accuracy

    return measure


def _remote_generator(plan, model):
    from .data.endpoint import connect
    from .distillation.remote import RemoteGenerator

    rollout = plan.recipe.rollout
    server = rollout.server
    folder = Path(server.weights_dir) if server.weights_dir else plan.folder / "served"
    return RemoteGenerator(connect(server), rollout, eos_id=plan.recipe.model.eos_id, folder=folder,
                           save_model=lambda folder: _save_model(plan, model, folder))


def _save_model(plan, model, folder):
    from .model.weights import save_weights

    save_weights(model, folder)
    shutil.copyfile(plan.tokenizer.model_file, folder / "tokenizer.model")


def _loop(plan, model, loss_fn, metric_names, num_steps):
    from .model.size import flops_per_token
    from .model.weights import load_weights
    from .runtime.loop import Loop

    recipe = plan.recipe
    loop = Loop(loss_fn, metric_names, model.trainable_params(), train=recipe.train, run=recipe.run,
                num_steps=num_steps, folder=plan.folder, save_model=lambda folder: _save_model(plan, model, folder),
                ranks=plan.ranks,
                flops_per_token=flops_per_token(recipe.model, recipe.data.seq_len),
                peak_flops=recipe.run.peak_tflops * 1e12 * plan.ranks.size or None)
    state = loop.resume(lambda checkpoint: load_weights(model, checkpoint))
    if state is None and recipe.train.continue_optimizer:
        loop.continue_optimizer(plan.init.folder)
    return loop, state


def _say_run(plan, model, num_steps):
    recipe, size = plan.recipe, sum(parameter.size for parameter in model.trainable_params())
    if recipe.task == "grpo":
        answers = recipe.grpo.prompts_per_rollout * recipe.rollout.samples_per_prompt
        step = f"{answers // recipe.grpo.updates_per_rollout:,} answers"
    else:
        step = f"{recipe.train.rows_per_step * recipe.data.seq_len:,} tokens"
    say(f"{recipe.recipe}: {size:,} parameters, {num_steps} steps of {step}, run folder {plan.folder}")


def _finish(plan, loop, first, last):
    """Write done.json (what came out, before and after, with wall time and peak memory) and report.html."""
    from .tools.report import draw_report, read_run

    summary = {"seconds": round(loop.seconds(), 1),
               "peak_memory_gib": round(peak_memory_gib(plan.recipe.run.device), 3), "before": first, "after": last}
    loop.finish(summary)
    if world().is_main:
        write_atomic(plan.folder / "report.html", draw_report([read_run(plan.folder)]))
    world().gather("finish the run")
    pairs = "  ".join(f"{name} {first[name]:.4f} -> {last[name]:.4f}" for name in last if name in first)
    say(f"{plan.recipe.recipe}: done in {format_seconds(summary['seconds'])}, {pairs}; {plan.folder}")


def _heldout_history(plan):
    """First and last held-out numbers in metrics.jsonl, {name: number} each."""
    world().gather("read the metrics")  # which the first rank has written
    rows = []
    for line in (plan.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = {name[8:]: value for name, value in json.loads(line).items() if name.startswith("heldout/")}
        if row:
            rows.append(row)
    return rows[0], rows[-1]


def _train_language_model(plan):
    recipe = plan.recipe
    start(recipe.run)
    from .trainers import language_model

    with plan.begin():
        batches = (_packed_rows(plan) if recipe.data.source == "packed" else
                   _pack(plan, _tokenize(plan, plan.corpus.train), recipe.seed))
        num_steps = num_training_steps(recipe.train, batches.steps_per_epoch)
        model = _student(plan)
        loss_fn = language_model.make_loss(model, recipe.data.seq_len, recipe.run.logits_chunk)
        loop, state = _loop(plan, model, loss_fn, language_model.METRICS, num_steps)
        if state:
            batches.load_state_dict(state["batches"])
        _say_run(plan, model, num_steps)
        value_fn = language_model.make_loss(model, recipe.data.seq_len, recipe.run.logits_chunk, gradients=False)
        evaluate = _validator(plan, model, value_fn, language_model.METRICS, _tokenize(plan, plan.corpus.heldout))
        loop.fit(_share_tokens(plan, batches), num_steps, lambda: evaluate(loop.step))
        _finish(plan, loop, *_heldout_history(plan))


# ---- Distillation ----------------------------------------------------------------------------------------------------

def _sampler(plan, by, model=None):
    """The Generator that answers as the recipe samples: for "student" and "teacher", or for a student in training."""
    rollout = plan.recipe.rollout
    name = ("sampler", by if model is None else "training")
    if name not in plan.engines:
        if model is None:
            model = _load(plan, (plan.teacher if by == "teacher" else plan.init).folder)
        if rollout.engine == "openai":
            plan.engines[name] = _remote_generator(plan, model)
            return plan.engines[name]
        plan.engines[name] = _generator(plan, model, temperature=rollout.temperature, top_k=rollout.top_k,
                                        top_p=rollout.top_p)
    return plan.engines[name]


def _annotator(plan):
    """The teacher, ready to score."""
    if "annotator" not in plan.engines:
        plan.engines["annotator"] = _make_annotator(plan)
    return plan.engines["annotator"]


def _make_annotator(plan):
    recipe, kd = plan.recipe, plan.recipe.kd
    if kd.engine == "openai":
        from .data.endpoint import connect
        from .distillation.remote import RemoteAnnotator

        return RemoteAnnotator(connect(kd.server), top_k=kd.top_k, row_len=recipe.data.seq_len,
                               vocab_size=recipe.model.vocab_size, prompts_per_request=kd.server.prompts_per_request)
    shapes = {"top_k": kd.top_k, "row_len": recipe.data.seq_len, "num_rows": recipe.train.micro_batch_rows,
              "chunk_size": recipe.run.logits_chunk, "mode": recipe.run.mode}
    if kd.engine == "mindformers":
        from .distillation.mindformers import MindformersAnnotator

        return MindformersAnnotator(plan.teacher.folder, **shapes, precision=activation_dtype(recipe.run))
    from .distillation.annotate import Annotator

    return Annotator(_load(plan, plan.teacher.folder), **shapes)


def _answers(plan, split, model=None, folder=None, samples_per_prompt=None):
    """ShardFolder of answers to the prompts of "train" or "heldout", complete.

    kd.answers says whose; on held-out prompts, always the student's. model and folder: a student in training and where
    its answers go, instead of init_from's weights and a folder shared by all runs with the same key.
    samples_per_prompt: rollout's on training prompts, else 1.
    """
    recipe, rollout = plan.recipe, plan.recipe.rollout
    by = "teacher" if recipe.kd.answers == "teacher" and split == "train" else "student"
    upstream = plan.teacher if by == "teacher" else plan.init
    samples_per_prompt = samples_per_prompt or (rollout.samples_per_prompt if split == "train" else 1)
    examples = getattr(plan.corpus, split)
    binding = {"model": upstream.digest if model is None else str(folder), "tokenizer": plan.tokenizer.digest,
               "template": template_digest(), "data": _examples_digest(plan, split), "seed": str(recipe.seed),
               "sampling": f"{samples_per_prompt} x t={rollout.temperature} k={rollout.top_k} p={rollout.top_p} "
                           f"new={rollout.max_new_tokens}{' by a server' * (rollout.engine == 'openai')}"}
    key = make_key("answers", [rollout.num_slots, rollout.prompts_per_shard], binding)
    folder = folder or plan.root / f"answers-{recipe.scale}-{key}"
    num_shards = -(-len(examples) // rollout.prompts_per_shard)
    shards = _open_shards(folder, binding, num_shards)
    if shards.complete:
        return shards
    start(recipe.run)
    from .distillation.sample import sample_answers

    with _lock(folder):
        shards = _open_shards(folder, binding, num_shards)  # another run may have written some meanwhile
        if shards.complete:
            return shards
        started = time.monotonic()
        say(f"rollout: the {by} answers {len(examples)} {split} prompts, {samples_per_prompt} each, in {folder}")
        _say_who_is_idle(len(examples), rollout.prompts_per_shard)
        generator = _sampler(plan, by, model)
        if rollout.engine == "openai":
            world().on_main("hand weights over", lambda: generator.load(binding["model"]))
        with Reporter("rollout shards", num_shards, shards.num_done) as reporter:
            sample_answers(generator, _prompts(plan, examples), samples_per_prompt=samples_per_prompt,
                           seed=recipe.seed, prompts_per_shard=rollout.prompts_per_shard,
                           shards=SharedShards(shards, world()), reporter=reporter)
        if not world().is_main:
            return shards
        answers = [_read_answers(shards, i) for i in range(num_shards)]
        count, tokens = sum(map(len, answers)), sum(len(a.logprobs) for a in answers)
        truncated = sum(int(a.truncated.sum()) for a in answers)
        _note(plan, folder, started, f"rollout: {count} answers, {tokens} tokens, {truncated / count:.1%} truncated",
              {"answers": count, "tokens": tokens, "truncated": truncated})
    return shards


def _say_who_is_idle(num_prompts, prompts_per_shard):
    """A shard is the work of one rank."""
    num_shards, num_ranks = -(-num_prompts // prompts_per_shard), world().size
    if num_shards < num_ranks:
        advice = f"; {num_prompts // num_ranks} would give each a shard" if num_prompts >= num_ranks else ""
        say(f"rollout.prompts_per_shard={prompts_per_shard} makes {num_shards} shards of {num_prompts} prompts: "
            f"{num_ranks - num_shards} of {num_ranks} ranks have nothing to do while they are answered{advice}")


def _read_answers(shards, i):
    from .distillation.sample import Answers

    return Answers(**shards.read(i))


def _annotations(plan, split, model=None, folder=None):
    """ShardFolder of the teacher's log-probabilities on answers (see `_answers`) or on the reference answers."""
    recipe = plan.recipe
    start(recipe.run)
    from .distillation.annotate import annotate as annotate_shards

    data, rollout = recipe.data, recipe.rollout
    examples = getattr(plan.corpus, split)
    by_label = split == "train" and recipe.kd.answers == "label" and model is None
    if by_label:
        num_shards = -(-len(examples) // rollout.prompts_per_shard)
        source = {"answers": "label", "data": _examples_digest(plan, split)}
    else:
        answers = _answers(plan, split, model, folder and folder / "answers")
        num_shards = answers.num_shards
        drop = rollout.drop if split == "train" else []
        source = {"answers": xxhash.xxh3_128_hexdigest((answers.folder / "manifest.json").read_bytes()),
                  "drop": " ".join([*drop, *([str(rollout.min_tokens), str(rollout.max_repeats)] if drop else [])])}
    by = {"builtin": "", "mindformers": " by mindformers", "openai": " by a server"}[recipe.kd.engine]
    binding = {"teacher": f"{plan.teacher.digest}{by}", "tokenizer": plan.tokenizer.digest,
               "template": template_digest(), "top_k": str(recipe.kd.top_k), "seq_len": str(data.seq_len), **source}
    key = make_key("annotations", rollout.prompts_per_shard if by_label else None, binding)
    folder = folder / "annotations" if folder else plan.root / f"annotations-{recipe.scale}-{key}"
    shards = _open_shards(folder, binding, num_shards)
    if shards.complete:
        return shards

    dropped = Counter()

    def samples_of(i):
        if by_label:
            chosen = examples[i * rollout.prompts_per_shard:(i + 1) * rollout.prompts_per_shard]
            return _fitting(plan, _tokenize(plan, chosen))
        return _kept_samples(plan, examples, _read_answers(answers, i), drop, dropped)

    with _lock(folder):
        shards = _open_shards(folder, binding, num_shards)  # another run may have written some meanwhile
        if shards.complete:
            return shards
        started = time.monotonic()
        say(f"annotate: the teacher scores the {'reference ' if by_label else ''}answers to {len(examples)} {split} "
            f"prompts, top {recipe.kd.top_k}{by}, in {folder}")
        with Reporter("annotated shards", num_shards, shards.num_done) as reporter:
            annotate_shards(_annotator(plan), samples_of, SharedShards(shards, world()), reporter)
        dropped = sum(map(Counter, world().gather("count what was dropped", dropped)), Counter())
        tokens = sum(int(shards.read(i)["topk.sizes"][2]) for i in range(num_shards))
        topk_bytes = sum(path.stat().st_size for path in folder.glob("*.shard"))
        kept = "".join(f", {count} {name} dropped" for name, count in dropped.items())
        if tokens == 0:
            raise ValueError(f"rollout.drop={rollout.drop} leaves no answer{kept}: drop less, or train the student "
                             "longer first.")
        if not world().is_main:
            return shards
        _note(plan, folder, started,
              f"annotate: {tokens} supervised tokens{kept}, {topk_bytes / max(1, tokens):.1f} bytes each with their "
              "prompts", {"supervised_tokens": tokens, "bytes": topk_bytes, "dropped": dropped})
    return shards


def _kept_samples(plan, examples, answers, criteria, dropped):
    """Samples of the answers that pass rollout.drop; counts what does not in `dropped`."""
    from .distillation.sample import answers_to_samples, find_unwanted

    if not criteria:
        return answers_to_samples(answers)
    rollout = plan.recipe.rollout

    def is_wrong(n):
        example = examples[answers.prompt_index[n]]
        if not plan.rewards.can_verify(example):
            raise ValueError(f"rollout.drop=[wrong]: training example {answers.prompt_index[n]} has no value to "
                             "verify; leave wrong out of rollout.drop or give every example a value.")
        return not plan.rewards.are_correct([example], [_response(plan, answers, n)])[0]

    unwanted = find_unwanted(answers, criteria, min_tokens=rollout.min_tokens, max_repeats=rollout.max_repeats,
                             is_wrong=is_wrong)
    for name, flags in unwanted.items():
        dropped[name] += int(flags.sum())
    return answers_to_samples(answers, ~np.logical_or.reduce(list(unwanted.values())))


def _response(plan, answers, n):
    message, truncated = decode_response(plan.tokenizer, answers.answer(n)), bool(answers.truncated[n])
    return Response(message.content, message.thoughts, not truncated, len(answers.answer(n)))


def _fitting(plan, samples):
    """Samples without those longer than a row, which are counted (never cut)."""
    lengths = np.diff(samples.offsets)
    long = lengths > plan.recipe.data.seq_len
    if not long.any():
        return samples
    say(f"annotate: {int(long.sum())} samples longer than data.seq_len={plan.recipe.data.seq_len} dropped")
    spans = [slice(samples.offsets[n], samples.offsets[n + 1]) for n in np.flatnonzero(~long)]
    return tokenized_to_samples([(samples.tokens[span], samples.is_target[span]) for span in spans])


def _examples_digest(plan, split):
    """What identifies the examples of a split: the files' bytes and the fields that choose from them."""
    data = as_dict(plan.recipe.data)
    del data["seq_len"], data["tokenizer"]
    return make_key(f"examples {split}", data, plan.files)


def _note(plan, folder, started, text, numbers):
    seconds = round(time.monotonic() - started, 1)
    measured = {"seconds": seconds, "peak_memory_gib": round(peak_memory_gib(plan.recipe.run.device), 3), **numbers}
    write_atomic(folder / "summary.json", json.dumps(measured))
    say(f"{text}, {format_seconds(seconds)}")


def _distill(plan):
    recipe = plan.recipe
    start(recipe.run)
    from .distillation.annotate import read_annotated
    from .trainers import distill
    from .trainers.validate import HeldoutLoss

    with plan.begin():
        first = read_annotated(_annotations(plan, "train"))
        batches = _pack(plan, first, recipe.seed)
        heldout = read_annotated(_annotations(plan, "heldout"))
        num_steps = num_training_steps(recipe.train, batches.steps_per_epoch)
        bounds = [0, *(round(share * num_steps) for share in recipe.kd.refresh_at), num_steps]
        plan.drop_engines()  # training needs the memory
        model = _student(plan)
        vocab_group = plan.ranks.sequence_group if recipe.run.vocab_parallel else None
        loss_fn = distill.make_loss(model, recipe.kd, recipe.data.seq_len, recipe.run.logits_chunk,
                                    vocab_group=vocab_group)
        loop, state = _loop(plan, model, loss_fn, distill.METRICS, num_steps)
        _say_run(plan, model, num_steps)
        value_fn = distill.make_loss(model, recipe.kd, recipe.data.seq_len, recipe.run.logits_chunk, gradients=False,
                                     vocab_group=vocab_group)
        evaluate = _validator(plan, model, value_fn, distill.METRICS, heldout)
        for segment in range(len(bounds) - 1):
            if loop.step >= bounds[segment + 1]:
                continue
            if segment > 0:
                say(f"refresh {segment} of {len(bounds) - 2} at step {loop.step}: the student answers anew")
                folder = plan.folder / f"refresh-{segment}"
                if loop.step > bounds[segment] and not (folder / "annotations" / "manifest.json").is_file():
                    raise ValueError(f"{folder} is gone, but training went on from its answers: put it back, or delete "
                                     f"{plan.folder} to start over.")
                batches = _pack(plan, read_annotated(_annotations(plan, "train", model, folder)),
                                recipe.seed + segment)
            if state and state["segment"] == segment:
                batches.load_state_dict(state["batches"])
            loop.fit(_share_tokens(plan, batches), bounds[segment + 1], lambda: evaluate(loop.step),
                     {"segment": segment})
        after = _annotations(plan, "heldout", model, plan.folder / "heldout-after")
        own = HeldoutLoss(value_fn, distill.METRICS, read_annotated(after), seq_len=recipe.data.seq_len,
                          num_rows=recipe.train.micro_batch_rows, pad_id=recipe.model.pad_id, ranks=plan.ranks,
                          mode=recipe.run.mode).measure()
        before, last = _heldout_history(plan)
        # Before training, the held-out answers are the student's own; after it, it has answered anew.
        before["own_kl"], last["own_kl"] = before["kl"], own["kl"]
        _finish(plan, loop, before, last)


# ---- GRPO ------------------------------------------------------------------------------------------------------------

def _train_grpo(plan):
    recipe = plan.recipe
    world().on_main("check the problems", lambda: plan.rewards.check(plan.corpus.train))
    kinds = Counter(task_type(problem) for problem in plan.corpus.train)
    say(f"rewards: {', '.join(f'{count} {kind} problems' for kind, count in sorted(kinds.items()))}" +
        (f"; code runs {plan.rewards.verifier('code').isolation}" if "code" in kinds else ""))
    start(recipe.run)
    from .model.weights import parameters_digest
    from .trainers import grpo
    from .trainers.rollouts import Rollouts

    with plan.begin():
        chosen = _solved_sometimes(plan)
        problems = [plan.corpus.train[i] for i in chosen]
        prompts = _prompts(plan, problems)
        updates_per_epoch = len(problems) / recipe.grpo.prompts_per_rollout * recipe.grpo.updates_per_rollout
        num_steps = num_training_steps(recipe.train, updates_per_epoch)
        plan.drop_engines()  # training needs the memory
        model = _student(plan)
        temperature, chunk = recipe.rollout.temperature, recipe.run.logits_chunk
        loss_fn = grpo.make_loss(model, recipe.grpo, temperature, recipe.data.seq_len, chunk)
        loop, state = _loop(plan, model, loss_fn, grpo.METRICS, num_steps)
        reference = None
        if recipe.grpo.kl_coefficient:
            reference = _logprob_scorer(plan, _load(plan, plan.init.folder), temperature)
        sampler = _sampler(plan, "student", model)
        batches = Rollouts(
            prompts, problems, grpo=recipe.grpo, rollout=recipe.rollout, tokenizer=plan.tokenizer,
            seq_len=recipe.data.seq_len, micro_batch_rows=recipe.train.micro_batch_rows, seed=recipe.seed,
            folder=plan.folder / "rollouts", sampler=sampler,
            hand_over=sampler.load if recipe.rollout.engine == "openai" else None,
            score_groups=plan.rewards.score_groups, policy=_logprob_scorer(plan, model, temperature),
            reference=reference, digest=lambda: parameters_digest(model), ranks=plan.ranks,
            progress=lambda total: Reporter("rollout shards", total, within=True))
        if state:
            batches.load_state_dict(state["batches"])
        _say_run(plan, model, num_steps)
        _say_who_is_idle(recipe.grpo.prompts_per_rollout, recipe.rollout.prompts_per_shard)
        measure = _accuracy(plan, model)

        def evaluate():
            measured = measure(loop.step)
            return measured, measured["accuracy"]

        loop.fit(_share_tokens(plan, batches), num_steps, evaluate if measure else None)
        _finish(plan, loop, *(_heldout_history(plan) if measure else ({}, {})))


def _logprob_scorer(plan, model, temperature):
    from .model.logprobs import LogprobScorer

    recipe = plan.recipe
    return LogprobScorer(model, row_len=recipe.data.seq_len, num_rows=recipe.train.micro_batch_rows,
                         chunk_size=recipe.run.logits_chunk, temperature=temperature, mode=recipe.run.mode)


def _solved_sometimes(plan):
    """Training problems that the starting model solves sometimes, by their places; all without a filter.

    Problems that no verifier calls right or wrong are kept. The rates are kept beside the model's answers, and in the
    run folder what the report shows of them, and by prompt what data.attributes.pass_rates reads.
    """
    grpo, problems = plan.recipe.grpo, plan.corpus.train
    if not grpo.pass_rate_samples:
        return list(range(len(problems)))
    kept = _pass_rates(plan)
    if not kept:
        raise ValueError("the starting model solves every problem always or never: groups of equal rewards teach "
                         "nothing. Give problems of other difficulty, or another init_from.")
    return kept


def _measure_pass_rates(recipe, overrides):
    """What `rollout` does for recipe=grpo."""
    if not recipe.grpo.pass_rate_samples:
        raise ValueError("grpo.pass_rate_samples=0: there is nothing to sample before the training; expected at least "
                         "1, such as 8.")
    with Plan(recipe, overrides) as plan:
        world().on_main("check the problems", lambda: plan.rewards.check(plan.corpus.train))
        start(recipe.run)
        with plan.begin():
            _pass_rates(plan)
        return plan.folder


def _pass_rates(plan):
    """Samples and grades the starting model's answers; see `_solved_sometimes` for what is written and returned."""
    shards = _answers(plan, "train", samples_per_prompt=plan.recipe.grpo.pass_rate_samples)
    return world().on_main("grade the answers", lambda: _grade(plan, shards))


def _grade(plan, shards):
    """See `_solved_sometimes`."""
    from .data.attributes import PASS_RATES, join_prompt  # which imports all verifiers

    grpo, problems = plan.recipe.grpo, plan.corpus.train
    path = shards.folder / f"pass-rates-{make_key('pass rates', as_dict(plan.recipe.rewards), None)}.json"
    if not path.is_file():
        started = time.monotonic()
        num_correct = [0] * len(problems)
        with Reporter("graded shards", shards.num_shards) as reporter:
            for i in range(shards.num_shards):
                answers = _read_answers(shards, i)
                verified = [n for n in range(len(answers))
                            if task_type(problems[answers.prompt_index[n]]) != "preference"]
                correct = plan.rewards.are_correct([problems[answers.prompt_index[n]] for n in verified],
                                                   [_response(plan, answers, n) for n in verified])
                for n, is_correct in zip(verified, correct, strict=True):
                    num_correct[answers.prompt_index[n]] += is_correct
                reporter.advance(i + 1)
        write_atomic(path, json.dumps({"samples": grpo.pass_rate_samples, "num_correct": num_correct}))
        say(f"pass rates: {len(problems)} problems graded, {format_seconds(time.monotonic() - started)}")
    num_correct = json.loads(path.read_text(encoding="utf-8"))["num_correct"]
    verifiable = [task_type(problem) != "preference" for problem in problems]
    kept = [i for i, count in enumerate(num_correct) if 0 < count < grpo.pass_rate_samples or not verifiable[i]]
    histogram = np.bincount([count for count, v in zip(num_correct, verifiable, strict=True) if v],
                            minlength=grpo.pass_rate_samples + 1)
    write_atomic(plan.folder / "pass_rates.json",
                 json.dumps({"samples": grpo.pass_rate_samples, "problems": histogram.tolist(), "kept": len(kept)}))
    rows = [{"prompt": join_prompt(message.content for message in problem.messages[:-1]), "passed": count,
             "samples": grpo.pass_rate_samples}
            for problem, count, v in zip(problems, num_correct, verifiable, strict=True) if v]
    write_atomic(plan.folder / PASS_RATES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    say(f"pass rate of {grpo.pass_rate_samples}: never {histogram[0]}, always {histogram[-1]}, sometimes "
        f"{histogram[1:-1].sum()}; {len(kept)} of {len(problems)} problems kept")
    return kept
