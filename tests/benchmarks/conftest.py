"""The benchmarks' files: real ones where they are at hand, and a few items of our own in the form of the others."""

import csv
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def write_rows(path, rows, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows(rows)


def _subjects(benchmark):
    """lm-eval has a task for each of them."""
    tasks = Path(find_spec("lm_eval").origin).parent / "tasks" / benchmark
    return sorted(path.stem.removeprefix("ceval-valid_").removeprefix("cmmlu_") for path in tasks.glob("c*_*.yaml"))


def write_own_items(folder):
    """Items of our own in the published forms of the benchmarks that are not at hand."""
    for split in ("dev", "test"):
        count = 6 if split == "dev" else 2
        for subject in _subjects("cmmlu"):
            rows = [[i, f"{subject} 第{i}题，选 B", "甲", "乙", "丙, 丁", "戊", "B"] for i in range(count)]
            write_rows(folder / f"cmmlu/{split}/{subject}.csv",
                       [["", "Question", "A", "B", "C", "D", "Answer"], *rows], "utf-8-sig")
    for split in ("dev", "val"):
        count = 5 if split == "dev" else 3
        for subject in _subjects("ceval"):
            rows = [[i, f"{subject} 第{i}题", "甲", "乙", "丙", "丁", "D", *["解析"][:split == "dev"]]
                    for i in range(count)]
            write_rows(folder / f"ceval/{split}/{subject}_{split}.csv",
                       [["id", "question", "A", "B", "C", "D", "answer", *["explanation"][:split == "dev"]], *rows])
    for name, count in (("train_few_all", 5), ("test_public", 4)):
        write_lines(folder / f"cluewsc/{name}.json", [
            {"target": {"span2_index": 9, "span1_index": 0, "span1_text": "小猫", "span2_text": "它"}, "idx": i,
             "label": ("true", "false")[i % 2], "text": f"小猫看着第{i}条鱼，它饿了。"} for i in range(count)])
    for split, count in (("train", 5), ("test", 3)):
        for i in range(count):
            path = folder / f"math/{split}/algebra/{i}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({
                "problem": f"What is $\\frac{{{i + 1}}}{{7}}$ doubled?", "level": "Level 1", "type": "Algebra",
                "solution": f"It is $\\boxed{{\\frac{{{2 * i + 2}}}{{7}}}}$."}))
    nothing = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": []}
    may = nothing | {"date": {"day": "", "month": "May", "year": "1999"}}
    for name in ("train", "dev"):
        passages = {f"p{i}": {"passage": f"Passage {i} of {name}: the Reds scored {i + 3} goals.", "qa_pairs": [
            {"question": "How many goals?", "query_id": f"n{i}", "answer": nothing | {"number": str(i + 3)},
             "validated_answers": [nothing | {"number": f"{i + 3}"}, nothing | {"spans": ["some goals"]}]},
            {"question": "Which team and colour?", "query_id": f"s{i}",
             "answer": nothing | {"spans": ["the Reds", "red shirts"]}, "validated_answers": []},
            {"question": "When?", "query_id": f"d{i}", "answer": may, "validated_answers": []}]} for i in range(4)}
        path = folder / f"drop/drop_dataset_{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(passages))
    names = ["Record ID", "Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    write_rows(folder / "gpqa/gpqa_diamond.csv",
               [names, *([f"r{i}", f"Question {i},\nwith a line break?", "right", "wrong 1", "wrong 2", "wrong 3"]
                         for i in range(5))])
    for name, count in (("train", 12), ("val", 3)):
        write_lines(folder / f"hellaswag/hellaswag_{name}.jsonl", [
            {"ind": i, "activity_label": "Cooking", "ctx_a": f"A cook takes {i} eggs.", "ctx_b": "the cook", "ctx": "",
             "split": name, "split_type": "indomain", "source_id": "x", "label": i % 4,
             "endings": ["breaks them.", "sings. [step] loudly", "flies  away.", "sleeps."]} for i in range(count)])
    return folder


@pytest.fixture(scope="session")
def own_items():
    """write(folder) -> folder: see write_own_items."""
    return write_own_items


@pytest.fixture(scope="session")
def write_csv():
    return write_rows


@pytest.fixture(scope="session")
def write_jsonl():
    return write_lines


@pytest.fixture(scope="session")
def benchmarks_dir(tmp_path_factory):
    """A folder with every benchmark: real files where they are at hand, else our own items; the rest is not there."""
    folder = write_own_items(tmp_path_factory.mktemp("benchmarks"))
    for name in ("bbh", "gsm8k", "humaneval", "ifeval", "math500", "mbpp", "mmlu", "winogrande"):
        if (REAL / name).is_dir():
            (folder / name).symlink_to(REAL / name)
    return folder


@pytest.fixture(scope="session")
def tiny_models(random_llama, cpu_library, tmp_path_factory):
    """{"random" or "trained": a folder as checkpoints are, with a tokenizer}; trained: for a second, by torch."""
    import mindspore as ms
    import torch

    from mindpangu.config import ModelConfig
    from mindpangu.data.tokenizer import train_tokenizer
    from mindpangu.model.weights import load_model, save_weights

    ms.set_device("CPU")
    folder = tmp_path_factory.mktemp("models")
    problem = ("Question: Tom has {a} apples and buys {b} more. How many does he have?\n"
               "Answer: He has {a} + {b} = {c}.\n#### {c}")
    code = 'def add_{a}(x: int) -> int:\n    """ Adds {a}. """\n    return x + {a}\n'
    texts = [part.format(a=a, b=b, c=a + b) for a in range(1, 20) for b in range(1, 10) for part in (problem, code)]
    alphabet = "".join(map(chr, range(32, 127)))
    tokenizer = train_tokenizer([*texts, alphabet, "系统：用户：助手："], 480, folder / "tokenizer.model")
    config = ModelConfig(hidden_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12, intermediate_size=96,
                         vocab_size=480, max_seq_len=1024, rope_theta=1e4, tie_embedding=True, bos_id=1, pad_id=0,
                         eos_id=tokenizer.eos_id)
    rows = torch.tensor([([1, *tokenizer.encode(text), tokenizer.eos_id] * 3)[:96] for text in texts])
    folders = {}
    for name in ("random", "trained"):
        llama = random_llama(config, 0)
        if name == "trained":
            with torch.no_grad():
                llama.model.embed_tokens.weight *= 0.2
            optimizer = torch.optim.AdamW(llama.parameters(), 3e-3)
            generator = torch.Generator().manual_seed(0)
            for _ in range(60):
                batch = rows[torch.randperm(len(rows), generator=generator)[:8]]
                loss = llama(batch, labels=batch).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            assert loss < 2.5
        llama.config.eos_token_id = tokenizer.eos_id
        llama.save_pretrained(folder / "torch")
        save_weights(load_model(folder / "torch"), folder / name)
        shutil.copyfile(tokenizer.model_file, folder / name / "tokenizer.model")
        folders[name] = folder / name
    return folders
