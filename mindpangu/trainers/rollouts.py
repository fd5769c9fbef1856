"""GRPO's batches: the policy answers, verifiers reward, and the answers are trained on; resumable at any moment.

A rollout's folder holds, for every round of sampling, round-n/ (token ids, as shards) and round-n.jsonl (every
completion with its rewards, to read), and training.shard (the log-probabilities that its updates compare with).

G answers per prompt, A micro-batches of a step, S target slots.
"""

import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.batches import PackedRows, tokenized_to_samples
from ..data.chat import decode_response
from ..data.shards import ShardFolder, SharedShards, read_shard, write_aside, write_shard
from ..distillation.sample import Answers, sample_answers
from ..rewards.preference import UNJUDGED
from ..rewards.score import Response, Score
from .grpo import group_advantages, token_weights

_KEPT = 2  # rollouts whose token ids stay on disk: this one and the one before


class Completion(NamedTuple):
    """An answer with its reward."""

    prompt_index: int
    tokens: np.ndarray  # int32, prompt and answer
    prompt_len: int
    logprobs: np.ndarray  # float32, of the answer's tokens when sampled, among all tokens at the temperature
    truncated: bool
    response: Response
    score: Score
    advantage: float
    live: bool  # takes part in the loss


class Update(NamedTuple):
    """The batch of one optimizer step, a rank's share."""

    tensors: tuple  # arrays with a leading axis A, in the order of grpo.make_loss
    num_micro_batches: int  # the first ones of A hold the answers, the rest is room; the same for all ranks
    num_tokens: int

    def arrays(self):
        return self.tensors


class Rollouts:
    """An endless iterator of Updates: when those of a rollout are used up, the policy of the moment answers anew.

    prompts: token ids of each problem; problems: their Examples. sampler: a Generator, or what answers like one;
    hand_over(digest), where given, is called before it samples. score_groups(problems, responses_PG) -> Scores.
    policy, reference: LogprobScorers at rollout.temperature; reference is None without a KL term. digest() -> str
    identifies the policy's weights. progress(total) is a context that gives a Reporter for the sampling. ranks: the
    runtime.distributed.Ranks that share the work, in one folder; rewards are rank 0's.
    """

    def __init__(self, prompts, problems, *, grpo, rollout, tokenizer, seq_len, micro_batch_rows, seed, folder, sampler,
                 score_groups, policy, reference, digest, progress, ranks, hand_over=None):
        self.prompts, self.problems, self.grpo, self.rollout = prompts, problems, grpo, rollout
        self.tokenizer, self.seq_len, self.micro_batch_rows, self.seed = tokenizer, seq_len, micro_batch_rows, seed
        self.folder, self.sampler, self.score_groups = Path(folder), sampler, score_groups
        self.policy, self.reference, self.digest = policy, reference, digest
        self.progress, self.hand_over = progress, hand_over
        self.ranks, self.world = ranks, ranks.world
        # The next update; its rollout's first place in the endless stream of prompts, how many prompts it took, and
        # the weights that it was sampled with.
        self._place = {"rollout": 0, "update": 0, "position": 0, "taken": 0, "weights": None}
        self._shapes = {"A": 1, "C": 1, "S": 8}  # of the arrays; they only grow, so that few graphs are compiled
        self._updates = None  # of the rollout at work
        self._metrics = {}
        self._sampling_s, self._since = 0.0, time.monotonic()

    def state_dict(self):
        """The place in the stream; what a rollout holds is on disk."""
        return {"place": dict(self._place), "shapes": dict(self._shapes)}

    def load_state_dict(self, state):
        self._place, self._shapes, self._updates = dict(state["place"]), dict(state["shapes"]), None

    def take_metrics(self):
        """Numbers of the rollout at work; rollout_time: the share of the time since the last call spent sampling."""
        now = time.monotonic()
        share = self._sampling_s / max(1e-9, now - self._since)
        self._sampling_s, self._since = 0.0, now
        return self._metrics | {"rollout_time": round(share, 4)}

    def __iter__(self):
        return self

    def __next__(self):
        if self._updates is None:
            self._updates = self._open_rollout()
        update, self._shapes = pack_update(self._updates[self._place["update"]], self._shapes, seq_len=self.seq_len,
                                           micro_batch_rows=self.micro_batch_rows, pad_id=self.tokenizer.pad_id,
                                           share=(self.ranks.data_rank, self.ranks.num_data))
        self._place["update"] += 1
        if self._place["update"] == self.grpo.updates_per_rollout:
            self._place = {"rollout": self._place["rollout"] + 1, "update": 0,
                           "position": self._place["position"] + self._place["taken"], "taken": 0, "weights": None}
            self._updates = None
        return update

    # ---- A rollout, sampled now or read from disk

    def _open_rollout(self):
        """The Samples of each update."""
        place = self._place
        folder = self.folder / f"{place['rollout']:06d}"
        if place["update"] > 0 and not (folder / "training.shard").is_file():
            raise ValueError(f"{folder} is gone or incomplete, but training went on from its answers: put it back, or "
                             f"delete {self.folder.parent} to start over.")
        if place["update"] == 0:
            place["weights"] = self.digest()
        groups, num_rounds = self._sample_groups(folder)
        place["taken"] = len(groups)
        used = groups
        if self.grpo.dynamic_sampling:
            used = [group for group in groups if any(c.live for c in group)][:self.grpo.prompts_per_rollout]
        live = [[c for c in group if c.live] for group in used]
        completions = [c for group in live for c in group]
        extras = self._training_extras(folder, completions)
        self._measure(groups, num_rounds)
        self._forget_old_tokens()

        targets_before = np.cumsum([0, *(len(c.logprobs) for c in completions)])
        samples, first = [], 0
        for groups_of_update in np.array_split(np.arange(len(live)), self.grpo.updates_per_rollout):
            last = first + sum(len(live[g]) for g in groups_of_update)
            span = slice(targets_before[first], targets_before[last])
            chosen = completions[first:last]
            part = {name: extra[span] for name, extra in extras.items()}
            if not chosen:
                # Nothing to learn from: any answer at weight zero keeps the step's form.
                chosen = [groups[0][0]]
                part = {name: np.zeros(len(chosen[0].logprobs), np.float32) for name in extras}
            samples.append(_to_samples(chosen, part))
            first = last
        return samples

    def _sample_groups(self, folder):
        """Groups of Completions, and how many rounds it took: more than one only for dynamic sampling."""
        grpo, groups, num_rounds = self.grpo, [], 0
        while True:
            position = self._place["position"] + len(groups)
            chosen = [self._problem_at(position + i) for i in range(grpo.prompts_per_rollout)]
            answers = self._answers(folder, num_rounds, chosen)
            groups += self._reward(folder / f"round-{num_rounds}.jsonl", chosen, answers)
            num_rounds += 1
            num_live = sum(any(c.live for c in group) for group in groups)
            if not grpo.dynamic_sampling or num_live >= grpo.prompts_per_rollout or num_rounds > grpo.max_resamples:
                return groups, num_rounds

    def _problem_at(self, position):
        """Which problem stands at a place of the endless stream: every epoch has an order of its own."""
        epoch, place = divmod(position, len(self.prompts))
        seeds = np.random.SeedSequence([self.seed, epoch])
        return int(np.random.Generator(np.random.Philox(seeds)).permutation(len(self.prompts))[place])

    def _answers(self, folder, number, chosen):
        """Shards of answers to the chosen problems."""
        rollout, place = self.rollout, self._place
        binding = {"weights": place["weights"], "prompts": " ".join(map(str, chosen)), "seed": str(self.seed),
                   "sampling": f"{rollout.samples_per_prompt} x t={rollout.temperature} k={rollout.top_k} "
                               f"p={rollout.top_p} new={rollout.max_new_tokens}"}
        num_shards = -(-len(chosen) // rollout.prompts_per_shard)
        shards_folder = folder / f"round-{number}"

        def prepare():
            try:
                shards = ShardFolder.open(shards_folder, binding, num_shards)
            except ValueError:
                if place["update"] > 0:
                    raise
                # Left by a killed run that had gone on from its last checkpoint to other weights.
                shutil.rmtree(folder)
                shards = ShardFolder.open(shards_folder, binding, num_shards)
            if not shards.complete:
                if place["update"] > 0:
                    raise ValueError(f"{shards_folder} is incomplete, but training went on from its answers: put it "
                                     f"back, or delete {self.folder.parent} to start over.")
                for path in (folder / f"round-{number}.jsonl", folder / "training.shard"):
                    path.unlink(missing_ok=True)
            return shards.complete

        is_complete = self.world.on_main("open a rollout", prepare)
        shards = ShardFolder.open(shards_folder, binding, num_shards)
        if not is_complete:
            started = time.monotonic()
            if self.hand_over:
                self.world.on_main("hand weights over", lambda: self.hand_over(place["weights"]))
            seed = np.random.SeedSequence([self.seed, place["rollout"], number]).generate_state(1, np.uint64)[0]
            with self.progress(num_shards) as reporter:
                sample_answers(self.sampler, [self.prompts[i] for i in chosen],
                               samples_per_prompt=rollout.samples_per_prompt, seed=int(seed >> np.uint64(1)),
                               prompts_per_shard=rollout.prompts_per_shard,
                               shards=SharedShards(shards, self.world), reporter=reporter)
            self._sampling_s += time.monotonic() - started
        return [Answers(**arrays) for arrays in shards.read_all()]

    def _reward(self, path, chosen, shards):
        """Groups of Completions of one round. Its rewards are written to `path`, or read if they are there: a judge
        may answer differently the next time."""
        groups = [[] for _ in chosen]
        for answers in shards:
            for n in range(len(answers)):
                message = decode_response(self.tokenizer, answers.answer(n))
                tokens = answers.tokens[answers.offsets[n]:answers.offsets[n + 1]]
                truncated, length = bool(answers.truncated[n]), len(tokens) - answers.prompt_lens[n]
                response = Response(message.content, message.thoughts, not truncated, int(length))
                groups[answers.prompt_index[n]].append((tokens, int(answers.prompt_lens[n]), _logprobs_of(answers, n),
                                                        truncated, response))
        def score():
            if path.is_file():
                rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
                read = ((row["reward"], row["parts"], row["reason"]) for row in rows)
                return [[next(read) for _ in group] for group in groups]
            return [list(map(tuple, group)) for group in
                    self.score_groups([self.problems[i] for i in chosen],
                                      [[response for *_, response in group] for group in groups])]

        scores = [[Score(*score) for score in group] for group in self.world.on_main("score answers", score)]
        completions = []
        for problem, group, group_scores in zip(chosen, groups, scores, strict=True):
            advantages = group_advantages([score.value for score in group_scores], self.grpo.advantage_norm)
            completions.append([
                Completion(problem, *answer, score, float(advantage), self._is_live(answer[3], score, advantage))
                for answer, score, advantage in zip(group, group_scores, advantages, strict=True)])
        if self.world.is_main and not path.is_file():
            write_aside(path, "".join(self._row(c) for group in completions for c in group).encode())
        return completions

    def _is_live(self, truncated, score, advantage):
        return bool(advantage != 0 and score.reason not in UNJUDGED and
                    not (self.grpo.mask_truncated and truncated))

    def _row(self, completion):
        c, problem = completion, self.problems[completion.prompt_index]
        row = {"prompt_index": c.prompt_index, "prompt": problem.messages[-2].content, "thoughts": c.response.thoughts,
               "answer": c.response.content, "value": problem.value, "reward": c.score.value, "parts": c.score.parts,
               "reason": c.score.reason, "advantage": c.advantage, "live": c.live, "truncated": c.truncated,
               "num_tokens": c.response.num_tokens}
        return json.dumps(row, ensure_ascii=False) + "\n"

    def _training_extras(self, folder, completions):
        """What the loss needs of every answer token, float32, by name; the log-probabilities are kept on disk."""
        path = folder / "training.shard"
        if not self.world.on_main("look for log-probabilities", path.is_file):
            self._score_completions(path, completions)
        kept = read_shard(path)
        lengths = np.array([len(c.logprobs) for c in completions], np.int64)
        numerators, denominators = token_weights(lengths, self.grpo.loss_agg, self.rollout.max_new_tokens)
        advantages = np.repeat([c.advantage for c in completions], lengths)
        sampled = np.concatenate([np.zeros(0, np.float32), *(c.logprobs for c in completions)])
        if self.grpo.importance_cap:
            # The loss is linear in a positive factor of the advantage, so the correction can stand in there.
            ratio = np.exp(kept["old_logprobs"].astype(np.float64) - sampled)
            advantages = advantages * np.minimum(ratio, self.grpo.importance_cap)
        differences = np.abs(kept["old_logprobs"] - sampled) if completions else np.zeros(1)
        self._differences = {"sampler_diff": differences.mean(), "sampler_diff_max": differences.max()}
        extras = {"advantages": advantages, "denominators": np.repeat(denominators, lengths),
                  "weights": np.repeat(numerators, lengths), **kept}
        return {name: np.asarray(extra, np.float32) for name, extra in extras.items()}

    def _score_completions(self, path, completions):
        """Write what policy and reference give every answer token; each rank scores an equal share of the answers."""
        rank, size = self.world.rank, self.world.size
        parts = [path.with_name(f"training-{i}.shard") for i in range(size)]
        bounds = [round(len(completions) * i / size) for i in range(size + 1)]
        own = completions[bounds[rank]:bounds[rank + 1]]
        scored = {name: np.zeros(0, np.float32) for name in ("old_logprobs", "ref_logprobs")}
        if own:
            samples = _to_samples(own, {})
            scored["old_logprobs"] = self.policy.score(samples)[0]
            scored["ref_logprobs"] = self.reference.score(samples)[0] if self.reference else scored["old_logprobs"]
        write_shard(parts[rank], scored)
        self.world.gather("score a share")
        if self.world.is_main:
            shares = [read_shard(part) for part in parts]
            write_shard(path, {name: np.concatenate([share[name] for share in shares]) for name in scored})
            for part in parts:
                part.unlink()
        self.world.gather("join the shares")

    def _measure(self, groups, num_rounds):
        everyone = [c for group in groups for c in group]
        verified = [c.score.parts["correct"] for c in everyone if "correct" in c.score.parts]
        self._metrics = {
            "reward": np.mean([c.score.value for c in everyone]),
            "correct": np.mean(verified) if verified else None,
            "answer_len": np.mean([c.response.num_tokens for c in everyone]),
            "truncated": np.mean([c.truncated for c in everyone]),
            "dead_groups": np.mean([not any(c.live for c in group) for group in groups]),
            "masked": np.mean([not c.live for c in everyone]),
            "rounds": num_rounds, **self._differences}
        self._metrics = {name: float(f"{value:.6g}") for name, value in self._metrics.items() if value is not None}
        reasons = Counter(c.score.reason for c in everyone)
        self._metrics |= {f"reason/{name}": count for name, count in sorted(reasons.items())}

    def _forget_old_tokens(self):
        if not self.world.is_main:
            return
        for folder in self.folder.glob("[0-9]*"):
            if int(folder.name) <= self._place["rollout"] - _KEPT:
                for path in folder.glob("round-*"):
                    if path.is_dir():
                        shutil.rmtree(path)
                (folder / "training.shard").unlink(missing_ok=True)


def pack_update(samples, shapes, *, seq_len, micro_batch_rows, pad_id, share=(0, 1)):
    """(Update, shapes): Samples with the extras of the loss as arrays of at least the given shapes {"A", "C", "S"}.

    share: (i, n) for the i-th of n shares of the micro-batches.
    """
    packed = PackedRows(samples, seq_len=seq_len, micro_batch_rows=micro_batch_rows, pad_id=pad_id, on_long="raise")
    i, n = share
    num_micro_batches = -(-packed.num_rows // (micro_batch_rows * n))
    needed = {"A": num_micro_batches, "C": packed.C, "S": packed.S}
    shapes = {name: size if needed[name] <= size else _roomy(needed[name]) for name, size in shapes.items()}
    rows = np.full(shapes["A"] * n * micro_batch_rows, -1)
    rows[:packed.num_rows] = np.arange(packed.num_rows)
    packed.C, packed.S = shapes["C"], shapes["S"]
    batch = packed.assemble(rows.reshape(-1, micro_batch_rows)[i::n])
    advantages, denominators, old_logprobs, ref_logprobs, weights = batch.extras
    return Update((*batch[:5], weights, advantages, denominators, old_logprobs, ref_logprobs), num_micro_batches,
                  num_micro_batches * micro_batch_rows * seq_len), shapes


def _logprobs_of(answers, n):
    """Log-probabilities of answer n's tokens among all tokens, at the sampling temperature."""
    lengths = np.diff(answers.offsets) - answers.prompt_lens
    first = int(lengths[:n].sum())
    span = slice(first, first + int(lengths[n]))
    return answers.logprobs[span] + answers.kept_logprobs[span]


def _to_samples(completions, extras):
    return tokenized_to_samples([(c.tokens, np.arange(len(c.tokens)) >= c.prompt_len) for c in completions], extras)


def _roomy(count):
    """The next number of the form 2^n or 3 * 2^n."""
    power = 1 << max(0, int(count - 1).bit_length() - 1)
    return next(room for room in (power, power * 3 // 2, power * 2) if room >= count)
