"""The teacher's stored top-k against a full-vocabulary log-softmax in float64 of transformers' forward passes."""

import mindspore as ms
import numpy as np
import pytest
import torch

from mindpangu.config import ModelConfig
from mindpangu.data.batches import tokenized_to_samples
from mindpangu.data.shards import ShardFolder, SharedShards
from mindpangu.distillation.annotate import Annotator, annotate, read_annotated
from mindpangu.model.weights import load_model
from mindpangu.runtime.cluster import World

CONFIG = ModelConfig(hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, intermediate_size=40,
                     vocab_size=60, max_seq_len=32, rope_theta=100.0, eos_id=2)
TOP_K, ROW_LEN, NUM_ROWS, CHUNK = 4, 16, 2, 5
# Float32 through two layers, logits of up to 10; MindSpore's exp on CPU has a relative error of up to 5e-6.
ATOL = 1e-4
BINDING = {"teacher": "t1", "tokenizer": "k1", "template": "p1", "top_k": "4", "seq_len": "16", "answers": "a1",
           "drop": ""}


@pytest.fixture(scope="module")
def llama(random_llama):
    """The teacher; logits with a standard deviation of about 2."""
    llama = random_llama(CONFIG, 0)
    with torch.no_grad():
        llama.model.embed_tokens.weight *= 2
    return llama


@pytest.fixture(scope="module")
def teacher(llama, tmp_path_factory):
    ms.set_device("CPU")  # before the first tensor
    folder = tmp_path_factory.mktemp("teacher")
    llama.float().save_pretrained(folder)  # full_logprobs makes it double
    return load_model(folder)


@pytest.fixture(scope="module")
def annotator(teacher):
    return Annotator(teacher, top_k=TOP_K, row_len=ROW_LEN, num_rows=NUM_ROWS, chunk_size=CHUNK)


def ragged_samples(seed, lengths):
    """Samples with a random set of targets: none in the first, all but its first token in the last."""
    random = np.random.default_rng(seed)
    tokenized = []
    for n, length in enumerate(lengths):
        share = 0 if n == 0 else 1 if n == len(lengths) - 1 else 0.5
        is_target = random.random(length) < share
        is_target[0] = False
        tokenized.append((random.integers(0, CONFIG.vocab_size, length), is_target))
    return tokenized_to_samples(tokenized)


def full_logprobs(llama, samples):
    """[num_targets, V] float64, every sample by itself, in the order of the targets; and their labels."""
    rows, labels, double = [], [], llama.double()
    for start, end in zip(samples.offsets[:-1], samples.offsets[1:], strict=True):
        tokens = samples.tokens[start:end]
        with torch.no_grad():
            logits = double(torch.tensor(tokens[None], dtype=torch.long)).logits[0].numpy()
        targets = np.flatnonzero(samples.is_target[start:end])
        rows.append(logits[targets - 1] - np.log(np.exp(logits[targets - 1]).sum(-1, keepdims=True)))
        labels.append(tokens[targets])
    return np.concatenate(rows), np.concatenate(labels)


LENGTHS = [3, 16, 9, 2, 5, 16, 7, 4, 11, 6, 2, 13, 8, 16]  # 8 rows or so: several calls


@pytest.mark.parametrize(("seed", "lengths"), [(0, LENGTHS), (1, LENGTHS[:3]), (2, [5, 12]), (3, [2, 16, 2])])
def test_top_k_and_labels_are_those_of_the_full_distribution(annotator, llama, mindspore_cpu, seed, lengths):
    samples = ragged_samples(seed, lengths)
    ids, logprobs, label_logprobs = annotator.top_logprobs(samples)
    expected, labels = full_logprobs(llama, samples)
    assert len(expected) == samples.is_target.sum() == len(ids)
    assert len(lengths) < 14 or len(ids) > 6 * CHUNK and len(ids) % CHUNK, "several chunks and a ragged last one"
    assert (ids.dtype, logprobs.dtype, label_logprobs.dtype) == (np.int32, np.float32, np.float32)
    np.testing.assert_array_equal(ids, np.argsort(-expected, -1)[:, :TOP_K])
    np.testing.assert_allclose(logprobs, np.take_along_axis(expected, ids.astype(int), -1), rtol=0, atol=ATOL)
    np.testing.assert_allclose(label_logprobs, expected[np.arange(len(labels)), labels], rtol=0, atol=ATOL)


def test_eager_annotates_as_the_graph_does(teacher, annotator, mindspore_cpu):
    samples = ragged_samples(4, LENGTHS[:5])
    eager = Annotator(teacher, top_k=TOP_K, row_len=ROW_LEN, num_rows=NUM_ROWS, chunk_size=CHUNK, mode="eager")
    for one, other in zip(eager.top_logprobs(samples), annotator.top_logprobs(samples), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_annotated_shards_come_back_with_their_samples_and_the_teachers_distribution(annotator, llama, mindspore_cpu,
                                                                                     tmp_path):
    parts = [ragged_samples(5, LENGTHS), ragged_samples(6, LENGTHS[::-1]), ragged_samples(7, [16] * 20)]
    shards = ShardFolder.open(tmp_path, BINDING, 3)
    asked = []

    def samples_of(i):
        asked.append(i)
        return parts[i]

    annotate(annotator, samples_of, SharedShards(shards, World()))
    assert asked == [0, 1, 2] and shards.complete
    found = read_annotated(shards)
    np.testing.assert_array_equal(found.tokens, np.concatenate([part.tokens for part in parts]))
    np.testing.assert_array_equal(np.diff(found.offsets), np.concatenate([np.diff(part.offsets) for part in parts]))
    assert found.offsets[0] == 0 and found.offsets[-1] == len(found.tokens)
    np.testing.assert_array_equal(found.is_target, np.concatenate([part.is_target for part in parts]))
    assert found.is_target.dtype == bool and found.tokens.dtype == np.int32

    expected = np.concatenate([full_logprobs(llama, part)[0] for part in parts])
    ids = found.extras["teacher_ids"].astype(int)
    np.testing.assert_array_equal(ids, np.argsort(-expected, -1)[:, :TOP_K])
    p = np.exp(np.take_along_axis(expected, ids, -1))
    q = np.exp(found.extras["teacher_logprobs"].astype(np.float64))
    p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, q))
    kl = (p * np.log(p / q)).sum(-1)
    assert q.min() > 0 and 0 < kl.mean() <= 1e-4 and kl.max() < 1e-3

    # A shard that is lost is annotated again, to the same bytes.
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    (tmp_path / "00001.shard").unlink()
    annotate(annotator, samples_of, SharedShards(ShardFolder.open(tmp_path, BINDING, 3), World()))
    assert asked == [0, 1, 2, 1] and {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == whole


def test_a_shard_whose_answers_were_all_filtered_out_is_empty(annotator, mindspore_cpu, tmp_path):
    parts = [tokenized_to_samples([]), ragged_samples(8, [4, 6])]
    shards = ShardFolder.open(tmp_path, BINDING, 2)
    annotate(annotator, parts.__getitem__, SharedShards(shards, World()))
    found = read_annotated(shards)
    np.testing.assert_array_equal(found.tokens, parts[1].tokens)
    np.testing.assert_array_equal(found.offsets, [0, 4, 10])
    assert len(found.extras["teacher_ids"]) == parts[1].is_target.sum()


def test_more_than_the_vocabulary_is_refused(teacher, mindspore_cpu):
    with pytest.raises(ValueError, match="kd.top_k=61 exceeds the teacher's vocabulary of 60"):
        Annotator(teacher, top_k=61, row_len=ROW_LEN, num_rows=NUM_ROWS, chunk_size=CHUNK)


def test_the_whole_vocabulary_is_the_whole_distribution(teacher, mindspore_cpu):
    samples = ragged_samples(9, [2, 9])
    everything = Annotator(teacher, top_k=60, row_len=ROW_LEN, num_rows=1, chunk_size=CHUNK, mode="eager")
    ids, logprobs, _ = everything.top_logprobs(samples)
    assert (np.sort(ids, -1) == np.arange(60)).all()
    np.testing.assert_allclose(np.exp(logprobs.astype(np.float64)).sum(-1), 1, rtol=0, atol=ATOL)


def test_a_sample_longer_than_a_row_is_refused(annotator, mindspore_cpu):
    with pytest.raises(ValueError, match="1 of 2 samples are longer, the longest sample has 17 tokens"):
        annotator.top_logprobs(ragged_samples(10, [3, 17]))


@pytest.mark.parametrize("changed", [["teacher"], ["tokenizer"], ["template"], ["answers"], ["teacher", "top_k"]])
def test_annotations_of_something_else_are_refused_with_what_differs(tmp_path, changed):
    shards = ShardFolder.open(tmp_path, BINDING, 1)
    shards.write(0, {"tokens": np.zeros(3, np.int32)})
    with pytest.raises(ValueError, match="refuses to use shards made from something else") as error:
        ShardFolder.open(tmp_path, BINDING | {key: "other" for key in changed}, 1)
    for key in BINDING:
        told = f"{key} differs: manifest {BINDING[key]}, this run other" in str(error.value)
        assert told == (key in changed)
