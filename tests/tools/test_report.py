import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mindpangu.tools.report import draw_report, main, make_axis, read_run, running_mean

_RECIPE = {"recipe": "kd_student", "scale": "tiny", "seed": 0, "train": {"lr": 0.002, "steps": 6},
           "kd": {"refresh_at": [0.5]}, "run": {"dir": None}}
_HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\" onmouseover=\"alert(3)' <b>&amp;"


def _sample(**fields):
    return {"prompt": "2 + 3?", "answer": "2 + 3 = 5", "value": "5", "correct": True, "truncated": False} | fields


def _write_run(folder, recipe=_RECIPE, rows=(), samples=None, done=None, tail=""):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"key": "0123456789", "recipe": recipe}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    for step, answers in (samples or {}).items():
        (folder / "samples").mkdir(exist_ok=True)
        (folder / "samples" / f"step-{step:06d}.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    if done:
        (folder / "done.json").write_text(json.dumps(done))
    return folder


class _Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text without scripts and styles."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts = [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.cdata_elem is None:
            self.texts.append(data)

    def curves(self):
        """{(plot title, run, split): [[step, value]]}"""
        found, title = {}, None
        for tag, attributes in self.tags:
            if tag == "svg":
                title = attributes.get("aria-label")
            if "data-points" in attributes:
                key = title, int(attributes["data-run"]), attributes["data-split"]
                found[key] = json.loads(attributes["data-points"])
        return found


def _page(*folders):
    return _Page(draw_report([read_run(folder) for folder in folders]))


def test_every_value_of_a_short_run_is_in_its_plot(tmp_path):
    rows = [{"step": 0, "time": 1.0, "heldout/loss": 2.25, "heldout/accuracy": 0.125},
            {"step": 2, "time": 2.0, "loss": 1.5, "lr": 2e-05, "a_metric_of_tomorrow": 7.0},
            {"step": 4, "time": 3.0, "loss": 1.25, "lr": 1e-05}]
    assert _page(_write_run(tmp_path / "a", rows=rows)).curves() == {
        ("Loss", 0, "train"): [[2, 1.5], [4, 1.25]], ("Loss", 0, "heldout"): [[0, 2.25]],
        ("Held-out accuracy", 0, "heldout"): [[0, 0.125]], ("Learning rate", 0, "train"): [[2, 2e-05], [4, 1e-05]],
        ("a_metric_of_tomorrow", 0, "train"): [[2, 7.0]]}


def test_a_long_curve_is_thinned_but_keeps_its_extremes_and_ends(tmp_path):
    values = [((i * 7919) % 10_007) / 1000 + 1 for i in range(20_000)]
    values[12_345], values[6_789] = 99.5, 0.5
    rows = [{"step": i, "loss": value} for i, value in enumerate(values)]
    page = _page(_write_run(tmp_path / "a", rows=rows))
    points = page.curves()["Loss", 0, "train"]
    assert len(points) < 1000
    assert [12_345, 99.5] in points and [6_789, 0.5] in points
    assert points[0] == [0, values[0]] and points[-1] == [19_999, values[-1]]
    polylines = [attributes for tag, attributes in page.tags if tag == "polyline"]
    assert [line["class"] for line in polylines] == ["raw", ""], "the raw curve has to stay under the smooth one"
    assert len(polylines[0]["points"].split()) == len(points), "hovering pairs them one by one"


def test_curves_stay_inside_the_axes(tmp_path):
    rows = [{"step": step, "loss": value, "grad_norm": 3.0, "lr": 0.0, "data_wait": 0.0}
            for step, value in ((1, 1e-4), (5, 8000.0), (9, 3.0))]
    page = _page(_write_run(tmp_path / "a", rows=rows))
    width, height = map(float, next(a["viewbox"] for tag, a in page.tags if "data-span" in a).split()[2:])
    for tag, attributes in page.tags:
        for place in attributes["points"].split() if tag == "polyline" else ():
            x, y = map(float, place.split(","))
            assert 0 < x < width and 0 < y < height


@pytest.mark.parametrize("values, kind", [
    ([0.1, 0.9], "share"), ([0.0], "share"), ([1.0], "share"), ([0.1471, 0.1474], "share"), ([5.0], "number"),
    ([-3, 4], "number"), ([0.0], "rate"), ([1e-4, 1.0], "logarithmic"), ([0.9, 1.1], "logarithmic"), ([0, 1], "steps"),
    ([0], "steps"), ([0, 123_456], "steps")])
def test_an_axis_holds_its_values_and_has_ticks(values, kind):
    axis = make_axis(values, kind)
    assert all(-1e-9 <= axis.place(value) <= 1 + 1e-9 for value in values)
    assert 2 <= len(axis.ticks) <= 9 or kind == "steps"
    assert kind != "share" or (0 <= axis.low and axis.high <= 1)
    assert all(-1e-9 <= axis.place(tick) <= 1 + 1e-9 for tick in axis.ticks)


def test_running_mean_is_the_mean_of_the_neighbours():
    assert running_mean([(0, 3.0), (1, 6.0), (2, 0.0), (5, 9.0)], 1) == [(0, 4.5), (1, 3.0), (2, 5.0), (5, 4.5)]


def test_several_runs_share_plots_and_the_differing_fields_are_marked(tmp_path):
    first = _write_run(tmp_path / "first", rows=[{"step": 2, "loss": 1.0}])
    other = _RECIPE | {"train": {"lr": 0.001, "steps": 6}, "kd": {"refresh_at": [0.5], "weight": 0.9}}
    second = _write_run(tmp_path / "second", other, rows=[{"step": 2, "loss": 0.5}])
    html = draw_report([read_run(first), read_run(second)])
    assert _Page(html).curves() == {("Loss", 0, "train"): [[2, 1.0]], ("Loss", 1, "train"): [[2, 0.5]]}
    marked = {"".join(_Page(row.split("</tr>")[0]).texts) for row in html.split("<tr class=differs>")[1:]}
    assert marked == {"train.lr0.0020.001", "kd.weight–0.9"}


def test_the_table_has_the_numbers_of_done_json(tmp_path):
    done = {"step": 6, "seconds": 95.0, "peak_memory_gib": 1.743, "before": {"kl": 0.325, "accuracy": 0.41},
            "after": {"kl": 0.0871, "accuracy": 0.563}}
    text = _page(_write_run(tmp_path / "a", rows=[{"step": 0, "heldout/kl": 0.325}], done=done)).text
    for expected in ("finished", "1m35s", "1.74 GiB", "0.3250 → 0.0871 −0.2379", "41.0 % → 56.3 % +15.3 points"):
        assert expected in text
    assert "unfinished" not in text


def _evaluation(**scores):
    """results.json and done.json as python -m mindpangu.evaluate writes them."""
    benchmarks = {name: {"score": score, "stderr": 1.25, "average": "micro", "metric": "score", "k": 7, "N": 10,
                         "items": 10, "reasons": {}, "subjects": {}} for name, score in scores.items()}
    results = {"form": "instruct", "model": {"folder": "runs/student", "device": "CPU", "precision": "float32"},
               "decoding": {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8192, "num_repeats": 1},
               "measured": {}, "benchmarks": benchmarks, "seconds": 95.0}
    return results, {"step": 0, "seconds": 95.0, "peak_memory_gib": 1.5,
                     "after": {name: score / 100 for name, score in scores.items()}}


def test_evaluations_show_scores_side_by_side_and_nothing_of_a_training(tmp_path):
    folders = []
    for name, scores in (("first", {"gsm8k": 41.5, "mmlu": 30.0}), ("second", {"gsm8k": 52.25})):
        results, done = _evaluation(**scores)
        folders.append(_write_run(tmp_path / name, {"recipe": "eval_instruct", "scale": "tiny"}, done=done))
        (folders[-1] / "results.json").write_text(json.dumps(results))
        (folders[-1] / "metrics.jsonl").unlink()
    text = _page(*folders).text
    for expected in ("benchmarks, % gsm8k 41.50 ± 1.25 52.25 ± 1.25 mmlu 30.00 ± 1.25 –", "1m35s", "1.50 GiB"):
        assert expected in text
    for absent in ("held-out", "→", "no metrics yet", "steps", "tokens", "Curves", "Sample answers"):
        assert absent not in text.replace("up to 8192 tokens", ""), absent
    done = {"step": 2, "before": {"loss": 1.0}, "after": {"loss": 0.5}}
    trained = _write_run(tmp_path / "trained", rows=[{"step": 2, "loss": 1.0}], done=done)
    text = _page(folders[0], trained).text
    assert "gsm8k 41.50 ± 1.25 –" in text and "Curves" in text and "held-out, before → after" in text


def test_an_unfinished_run_with_a_cut_last_line_is_shown_as_such(tmp_path):
    rows = [{"step": 0, "time": 10.0, "heldout/loss": 2.0}, {"step": 2, "time": 70.0, "loss": 1.5, "memory_gib": 1.5},
            {"step": 4, "time": 75.0, "heldout/loss": 1.0}]
    page = _page(_write_run(tmp_path / "a", rows=rows, tail='{"step": 6, "time": 80.0, "lo'))
    assert page.curves()["Loss", 0, "heldout"] == [[0, 2.0], [4, 1.0]]
    for expected in ("unfinished", "1 unreadable line of metrics.jsonl left out", "4 of 6", "1m05s", "1.50 GiB",
                     "2.0000 → 1.0000"):
        assert expected in page.text


def test_a_single_validation_is_no_change(tmp_path):
    assert "2.0000 → –" in _page(_write_run(tmp_path / "a", rows=[{"step": 0, "heldout/loss": 2.0}])).text


def test_a_run_without_metrics_yet_is_no_error(tmp_path):
    folder = _write_run(tmp_path / "a")
    (folder / "metrics.jsonl").unlink()
    assert "no metrics yet" in _page(folder).text


def test_values_that_are_not_finite_are_counted_instead_of_drawn(tmp_path):
    rows = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}, {"step": 3, "kl": float("inf")}]
    page = _page(_write_run(tmp_path / "a", rows=rows))
    assert page.curves() == {("Loss", 0, "train"): [[2, 1.0]]}
    assert page.text.count("1 value not finite, not drawn") == 2


def test_samples_of_first_and_last_validation_stand_side_by_side(tmp_path):
    samples = {0: [_sample(answer="it is 6", correct=False)], 3: [_sample(answer="in between")],
               6: [_sample(answer="it is 5", truncated=True)]}
    text = _page(_write_run(tmp_path / "a", samples=samples)).text
    assert "2 + 3? expected 5 step 0 · ✗ wrong it is 6 step 6 · ✓ right · truncated it is 5" in text
    assert "0 of 1 at step 0 → 1 of 1 at step 6" in text
    assert "in between" not in text


def test_hostile_text_cannot_inject_html(tmp_path):
    recipe = _RECIPE | {_HOSTILE: _HOSTILE, "recipe": _HOSTILE}
    samples = {0: [_sample(prompt=_HOSTILE, answer=_HOSTILE + "\ud800", value=_HOSTILE)]}
    rows = [{"step": 1, "loss": 1.0, _HOSTILE: 1.0, "heldout/" + _HOSTILE: 2.0}]
    hostile = _write_run(tmp_path / "<img src=x onerror=alert(4)>", recipe, rows, samples)
    (hostile / "env.json").write_text(json.dumps({"device": _HOSTILE, "packages": {"numpy": _HOSTILE}}))
    plain = _write_run(tmp_path / "plain", rows=[{"step": 1, "loss": 1.0}])
    main([str(hostile), str(plain), "-o", str(tmp_path / "report.html")])
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = _Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 1 and html.count("</script>") == 1
    assert "img" not in [tag for tag, _ in page.tags]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert _HOSTILE in "".join(page.texts), "the text itself has to be readable"


def test_the_file_needs_nothing_from_elsewhere(tmp_path):
    page = _page(_write_run(tmp_path / "a", rows=[{"step": 1, "loss": 1.0}]))
    assert not [a for _, a in page.tags if {"src", "href"} & a.keys()]
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_report_goes_to_the_run_folder_or_for_several_runs_here(tmp_path, monkeypatch):
    one, two = _write_run(tmp_path / "one"), _write_run(tmp_path / "two")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    main([str(one)])
    main([str(one), str(two)])
    assert (one / "report.html").is_file() and (tmp_path / "here" / "report.html").is_file()


def _error_of(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 1
    return capsys.readouterr().err


def test_what_is_no_run_folder_is_an_error_that_says_what_was_expected(tmp_path, capsys):
    run = _write_run(tmp_path / "runs" / "a")
    error = _error_of([str(tmp_path / "absent")], capsys)
    assert "absent: no such folder" in error and "run.json" in error and "mindpangu.train" in error
    error = _error_of([str(tmp_path / "runs")], capsys)
    assert "has no run.json" in error and f"run folders {run}" in error
    assert "not a folder" in _error_of([str(run / "run.json")], capsys)
    (run / "done.json").write_text('{"step": ')
    assert "done.json: not readable as JSON" in _error_of([str(run)], capsys)
    assert not (run / "report.html").exists()


def test_an_unwritable_output_is_an_error(tmp_path, capsys):
    run = _write_run(tmp_path / "a")
    assert "no_folder" in _error_of([str(run), "-o", str(tmp_path / "no_folder" / "report.html")], capsys)


def test_the_tool_runs_from_a_checkout_without_mindspore(tmp_path):
    run = _write_run(tmp_path / "a", rows=[{"step": 1, "loss": 1.0}])
    script = Path(__file__).resolve().parents[2] / "tools" / "report.py"
    subprocess.run([sys.executable, str(script), str(run)], check=True, cwd=tmp_path)
    imports = "import sys, mindpangu.tools.report; assert 'mindspore' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", imports], check=True, cwd=tmp_path)
    assert (run / "report.html").is_file()


def _completion(prompt, reward, **fields):
    return {"prompt_index": prompt, "prompt": f"problem {prompt}", "thoughts": None, "answer": f"answer of {reward}",
            "value": "5", "reward": reward, "parts": {}, "reason": "correct", "advantage": 0.5, "live": True,
            "truncated": False, "num_tokens": 9} | fields


def test_rollouts_show_the_pass_rates_and_of_each_one_a_group_that_differs(tmp_path):
    folder = _write_run(tmp_path / "grpo", rows=[{"step": 1, "loss": 0.1, "reward": 0.25, "reason/wrong_answer": 3}])
    (folder / "pass_rates.json").write_text(json.dumps({"samples": 2, "problems": [11, 22, 33], "kept": 22}))
    equal, differing = [_completion(0, -0.5)] * 2, [_completion(1, -0.5), _completion(1, 1.0, answer=_HOSTILE)]
    for number, rows in enumerate(([*equal, *differing], equal)):
        path = folder / f"rollouts/{number:06d}/round-0.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = _page(folder)
    bars = [(attributes["class"], float(attributes["height"])) for tag, attributes in page.tags if tag == "rect"]
    assert [css for css, _ in bars] == ["left-out", "kept", "left-out"]
    assert bars[0][1] * 3 == pytest.approx(bars[2][1], rel=0.01) and "22 of 66 problems kept" in page.text
    assert "rollout 1: rewards -0.5 1" in page.text and "rollout 2: rewards -0.5 -0.5" in page.text
    assert _HOSTILE in "".join(page.texts), "shown as text"
    assert sum(tag == "script" for tag, _ in page.tags) == 1 and not any(tag == "img" for tag, _ in page.tags)
    assert page.curves()["Judged wrong answer", 0, "train"] == [[1, 3]]


def test_broken_pass_rates_are_named(tmp_path):
    folder = _write_run(tmp_path / "grpo")
    (folder / "pass_rates.json").write_text(json.dumps({"samples": 2, "problems": [11]}))
    with pytest.raises(ValueError, match="pass_rates.json: expected samples"):
        read_run(folder)
