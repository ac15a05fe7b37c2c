"The page of a study: what it says in the test process, how it looks in a real browser."
import math
import random
import re
import time
from dataclasses import replace

import nbformat
import pandas as pd
import pytest
from plotly.offline import get_plotlyjs
from synthetic import candidates, pick, prune, shifted

from s3pet_nb.lab import results
from s3pet_nb.lab.page import index
from s3pet_nb.lab.store import Run, write_json
from s3pet_nb.lab.study import Study, study as read
from s3pet_nb.lab.study_page import (best_of, command, draw_differences, draw_transfer, gates_frame,
                                     progress_text, row_lines, runs_frame, study_report, sweep_frame)

EVIL = "<img src=x onerror=alert(1)>"
N_BACKBONE = 22_713_216
PARAMETERS = """\
run_folder = ""
task = "glue/cola"
budget = 1e-4
gate = "global"
criterion = ""
targets = []
data_dir = ""
seed = 0
"""
LEVEL = {"glue/cola": 0.42, "glue/mrpc": 0.86, "glue/rte": 0.61, "glue/stsb": 0.84, EVIL: 0.5}
METRIC = {"glue/cola": "matthews_correlation", "glue/mrpc": "f1", "glue/stsb": "pearson"}
VIEWS = ["table", "differences", "ranks", "sweep", "heatmaps", "cost"]


def write_template(folder):
    kernel = {"name": "python3", "language": "python", "display_name": "python3"}
    cell = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / "measure.ipynb")
    return str(folder / "measure.ipynb")


def trained(label, n_params, score, **more):
    return {"label": label, "structure": label, "modules": 23, "n_params": n_params, "head_params": 770,
            "validation": score + 0.01, "test": score, "steps": 280, "seconds": 24.0, **more}


def scored(asked, method, budget, rng):
    "Rows as the template search writes them: the larger the budget the less the choice matters."
    doublings = math.log2(asked["budget"] / 5e-5)
    gain = {"first-order": 0.016}.get(method, 0.024) * (1 - doublings / 8)
    level = LEVEL[asked["task"]] + 0.012 * doublings + rng.gauss(0, 0.008)
    sizes = {"searched": budget - rng.randrange(90), "random-1": budget, "random-2": budget, "bitfit": 41_088,
             "finetune": N_BACKBONE}
    more = {"searched": gain, "bitfit": 0.02, "finetune": 0.035}
    return [trained(label, size, level + more.get(label, 0) + rng.gauss(0, 0.006))
            for label, size in sizes.items()]


def moved(asked, budget, rng):
    "Rows as a search with targets writes them: a structure is a little better on its own task."
    found = []
    for label in ("searched", "random-1"):
        for target in asked["targets"]:
            own = 0.02 * (target == asked["task"]) * (label == "searched")
            found.append(trained(label, budget, LEVEL[target] + own + rng.gauss(0, 0.004), task=target,
                                 metric=METRIC.get(target, "accuracy")))
    return found


def write_run(study, question, root, space, gates=True):
    "What a run of this question leaves, made of plain numbers."
    asked, rng = question.params, random.Random(repr(sorted(question.params.items(), key=str)))
    params = {name: value for name, value in asked.items() if name != "data_dir"}
    run = Run.create(root, study.folder or study.name, params, question.code)
    assert run.id == question.id
    budget = round(asked["budget"] * N_BACKBONE)
    result = {"task": asked["task"], "metric": METRIC.get(asked["task"], "accuracy"), "backbone": "minilm",
              "n_backbone": N_BACKBONE, "family": "bert", "budget": budget, "seconds": 180.0,
              "rows": scored(asked, question.method, budget, rng), "peak_memory_mb": 1800.0,
              "space": {"name": "mix", "candidates": len(space), "n_params": sum(e["n"] for e in space)}}
    if asked["targets"]:
        result["rows"] = moved(asked, budget, rng)
    drift = random.Random(0)
    alpha = [drift.gauss(0, 3) + rng.gauss(0, 1) + 2.5 * (e["module"] == "bitfit") + 0.5 * (e["layer"] or 0)
             for e in space]
    if asked["criterion"]:
        kept = prune(space, [math.exp(a / 4) for a in alpha], budget, False)
        result["prune"] = {"seconds": 30.0, "passes": 280, "criterion": "first-order",
                           "granularity": "unstructured", "average_over": 0}
        result["kept"] = [{name: e[name] for name in ("stack", "layer", "role", "module", "name")}
                          | {"n": n, "of": e["n"]} for e, n in zip(space, kept)]
    elif not asked["targets"]:
        result["search"] = {"seconds": 64.0 + rng.gauss(0, 3), "passes": 480, "steps": 160}
    if gates and "search" in result:
        p = shifted(alpha, [e["n"] for e in space], budget)[1]
        chosen = {module["path"] for module in pick(space, p, budget)}
        frame = pd.DataFrame(space).assign(p=p, alpha=alpha, selected=[e["name"] in chosen for e in space])
        frame[["stack", "layer", "role", "kind", "module", "name", "n", "p", "alpha", "selected"]].to_csv(
            run.folder / "gates.csv", index=False)
    run.save_result(result)
    return run


def make_study(folder, **changes):
    tasks = ["glue/cola", "glue/mrpc", "glue/rte", EVIL]
    asked = {"grid": {"task": tasks, "budget": [5e-5, 1e-4, 2e-4]}, "seeds": [0, 1, 2],
             "methods": {"S3PET": {}, EVIL: {"params": {"gate": "local"}}}, "show": VIEWS,
             "title": f"Does a search pay? {EVIL}"}
    return Study("sweep", write_template(folder), **(asked | changes))


def fill(study, root, space=None, gates=True, leave=0):
    space = space or candidates({"encoder": 6})
    questions = study.questions()
    return [write_run(study, question, root, space, gates) for question in questions[:len(questions) - leave]]


def body_of(path):
    "The page without plotly.js."
    text, script = path.read_text(), get_plotlyjs()
    assert text.count(script) == 1, "plotly.js is in the page once"
    assert path.stat().st_size < 8e6
    return text.replace(script, "")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    "A study of which one run failed, one result is torn, three gates are lost, and four runs were not begun."
    root = tmp_path_factory.mktemp("studies")
    study = make_study(root)
    runs = fill(study, root / "reports", leave=4)
    (runs[0].folder / "result.json").unlink()
    write_json(runs[0].folder / "error.json", {"error": f"ValueError: no column {EVIL}"})
    (runs[1].folder / "result.json").write_text('{"task": "glue/co')
    (runs[3].folder / "gates.csv").unlink()
    text = (runs[4].folder / "gates.csv").read_text()
    (runs[4].folder / "gates.csv").write_text(text[:len(text) // 2])
    (runs[5].folder / "gates.csv").write_text("")
    for run in runs[6:9]:
        (run.folder / "report.html").write_text("<!DOCTYPE html><title>a run</title>")
    return study, root / "reports", runs


@pytest.fixture(scope="module")
def page(faulty):
    study, root, _ = faulty
    return study_report(study, root)


def test_the_page_says_what_is_done_and_how_to_go_on(faulty, page):
    study, root, runs = faulty
    body = body_of(page)
    assert page == root / "sweep" / "index.html"
    assert "66 of 72 runs are done, 1 failed, 5 missing; what follows is made of those that are done." in body
    assert f"<code>s3pet study sweep.yml --out {root}</code>" in body
    asked = study.changed(data_dir="my data", targets=["glue/rte", "glue/cola"])
    assert command(asked) == "s3pet study sweep.yml --data-dir 'my data' --set targets=glue/rte,glue/cola"
    assert command(replace(asked, source="mine/search.yml")).startswith("s3pet study mine/search.yml --data-dir")
    small = read("small-figure-2").changed(n_eval=64, space="lo ra")
    assert command(small, "kept") == "s3pet study small-figure-2 --set n_eval=64 --set 'space=lo ra' --out kept"
    assert f"<dd>{', '.join(['5e-05', '0.0001', '0.0002'])}</dd>" in body and "<dd>0, 1, 2</dd>" in body
    assert re.findall("<h2>(.*?)</h2>", body) == [
        "Scores", "Differences", "Ranks", "Score over size", "Where the budgets went", "Cost", "All runs"]


def test_the_page_points_only_to_its_runs_and_tables(faulty, page):
    study, root, runs = faulty
    links = set(re.findall(r'(?:src|href)="([^"#][^"]*)"', body_of(page)))
    reports = {f"../sweep/{run.id}/report.html" for run in runs[6:9]}
    assert links == reports | {"table.csv", "table.md", "table.tex", "scores.csv"}
    assert all((page.parent / link).is_file() for link in links)


def test_every_run_is_listed_with_its_state(faulty, page):
    study, root, runs = faulty
    body = body_of(page)
    frame = runs_frame(study, root)
    assert frame.state.value_counts().to_dict() == {"done": 66, "missing": 5, "failed": 1}
    table = body[body.index("<h2>All runs"):]
    assert table.count("<tr") == 73 and all(run_id in table for run_id in frame.run_id)
    assert "ValueError: no column &lt;img src=x" in table and "its result.json cannot be read" in table
    assert progress_text(frame[frame.state == "done"]) == "All 66 runs are done."


def test_a_lost_or_torn_file_leaves_its_run_out_and_is_said(faulty, page):
    _, _, runs = faulty
    body = body_of(page)
    for run, why in ((runs[3], "no gates.csv"), (runs[4], "a gates.csv that is cut off"),
                     (runs[5], "a gates.csv that cannot be read")):
        assert f"One run is left out for {why}: {run.id}." in body
        with pytest.raises(ValueError, match=why):
            gates_frame(run)
    assert "S3PET, budget 5e-05: mean p over 10 runs" in body  # of twelve, one failed and one has no gates
    assert gates_frame(runs[8]).attrs == {"budget": runs[8].result["budget"], "run": runs[8].id}


def test_gates_cut_between_two_rows_are_no_shorter_space(tmp_path):
    study = make_study(tmp_path, grid={}, seeds=[0], methods={})
    run, = fill(study, tmp_path / "reports")
    lines = (run.folder / "gates.csv").read_text().splitlines(keepends=True)
    (run.folder / "gates.csv").write_text("".join(lines[:-3]))
    with pytest.raises(ValueError, match="cut off"):
        gates_frame(run)


def test_names_cannot_become_markup(faulty, page):
    _, root, _ = faulty
    assert EVIL not in body_of(page) and "&lt;img src=x onerror=alert(1)&gt;" in body_of(page)
    study, root, _ = faulty
    write_json(root / "sweep" / "study.json", {"name": "sweep", "title": study.title, "ids": [question.id for question in study.questions()]})
    text = index(root).read_text()
    (root / "sweep" / "study.json").unlink()
    assert EVIL not in text and '<a href="sweep/index.html">sweep</a>' in text and "<td>66 of 72</td>" in text


def test_a_study_that_has_not_begun_has_a_page(tmp_path):
    path = study_report(make_study(tmp_path), tmp_path / "reports")
    body = body_of(path)
    assert "0 of 72 runs are done, 72 missing; there is nothing to show yet but what is asked." in body
    assert body.count("<h2>") == 1 and "Plotly.newPlot(" not in body
    assert sorted(file.name for file in path.parent.iterdir()) == ["index.html"]


def test_what_a_study_shows_it_asked_for(tmp_path):
    study = make_study(tmp_path, grid={"task": ["glue/cola"]}, methods={}, seeds=[0], title="",
                       show=["ranks", "transfer"])
    fill(study, tmp_path / "reports")
    body = body_of(study_report(study, tmp_path / "reports"))
    assert re.findall("<h2>(.*?)</h2>", body) == ["Ranks", "From task to task", "All runs"]
    assert "<h1>sweep</h1>" in body and "The one run is done." in body and "<th>method</th>" not in body


def test_runs_of_another_studys_folder(tmp_path):
    whole = make_study(tmp_path, seeds=[0], grid={"task": ["glue/cola"]}, methods={"S3PET": {}})
    run, = fill(whole, tmp_path / "reports")
    (run.folder / "report.html").write_text("a report")
    part = replace(whole, name="part", folder="sweep", show=["table"])
    path = study_report(part, tmp_path / "reports")
    assert path.parent.name == "part" and f'href="../sweep/{run.id}/report.html"' in body_of(path)


def test_a_result_that_makes_no_sense_costs_a_part_not_the_page(tmp_path):
    study = make_study(tmp_path, grid={"task": ["glue/cola", "glue/rte"]}, methods={}, seeds=[0, 1])
    runs = fill(study, tmp_path / "reports")
    result = runs[0].result
    write_json(runs[0].folder / "result.json", result | {"search": {"seconds": "quick"}})
    body = body_of(study_report(study, tmp_path / "reports"))
    assert '<p class="failed">' in body[body.index("<h2>Cost"):] and "<h2>Scores" in body


@pytest.mark.parametrize("row", [{"test": 0.5}, {"label": "searched", "test": "n/a"}, "searched"])
def test_rows_that_make_no_sense_are_left_out_and_said(tmp_path, row):
    study = make_study(tmp_path, grid={"task": ["glue/cola", "glue/rte"]}, methods={}, seeds=[0, 1])
    runs = fill(study, tmp_path / "reports")
    write_json(runs[0].folder / "result.json", runs[0].result | {"rows": [row]})
    body = body_of(study_report(study, tmp_path / "reports"))
    assert "3 of 4 runs are done, 1 failed" in body and "a row without a label, or text for a number" in body
    assert "<h2>Scores" in body and set(results.scores(study, tmp_path / "reports").run_id) == {
        run.id for run in runs[1:]}


def test_ranks_without_a_common_block_say_so(tmp_path):
    methods = {"one": {"grid": {"budget": [1e-4]}}, "two": {"grid": {"budget": [2e-4]}}}
    study = make_study(tmp_path, grid={"task": ["glue/cola"]}, methods=methods, seeds=[0, 1], show=["ranks"])
    fill(study, tmp_path / "reports")
    body = body_of(study_report(study, tmp_path / "reports"))
    assert "At no task, seed and point of the grid does every row have a score." in body and "nan" not in body


def test_prunings_show_the_share_they_kept(tmp_path):
    study = make_study(tmp_path, grid={"task": ["glue/cola", "glue/rte"]}, seeds=[0, 1], show=["heatmaps"],
                       methods={"S3PET": {}, "first-order": {"params": {"criterion": "first-order"}}})
    fill(study, tmp_path / "reports")
    body = body_of(study_report(study, tmp_path / "reports"))
    assert "S3PET: mean p over 4 runs" in body and "first-order: mean share kept over 4 runs" in body
    assert body.count("Plotly.newPlot(") == 2 and "left out" not in body
    body = body_of(study_report(replace(study, show=["heatmaps by task"]), tmp_path / "reports"))
    assert re.search("S3PET, task glue.{1,6}cola: mean p over 2 runs", body) and body.count("Plotly.newPlot(") == 4


def test_transfer_is_a_matrix(tmp_path):
    tasks = ["glue/cola", "glue/rte", EVIL]
    study = make_study(tmp_path, params={"targets": tasks}, grid={"task": tasks}, methods={}, seeds=[0, 1],
                       show=["transfer", "heatmaps"])
    fill(study, tmp_path / "reports")
    body = body_of(study_report(study, tmp_path / "reports"))
    table = body[body.index("<h2>From task"):]
    assert table.count("<b>") >= 3 and "No run has searched or pruned yet." in body
    frame = pd.DataFrame({"row": ["searched", "searched", "random"], "source": ["a", "b", ""],
                          "a": [0.6, 0.5, 0.4], "b": [0.7, math.nan, 0.7]})
    heat, = draw_transfer(frame).data
    assert heat.text.tolist() == [["60.0", "70.0"], ["50.0", "nan"], ["40.0", "70.0"]]
    assert heat.z[:, 0].tolist() == [1.0, pytest.approx(0.5), 0.0]


def test_a_sweep_has_one_point_for_what_no_budget_changes(faulty):
    study, root, _ = faulty
    scores = results.scores(study, root)
    frame = sweep_frame(scores)
    assert (frame[frame.label == "bitfit"].groupby(["row", "task"]).size() == 1).all()
    assert (frame[frame.label == "searched"].groupby(["row", "task"]).size() == 3).all()
    bitfit = frame[frame.label == "bitfit"].iloc[0]
    same = scores[(scores.row == bitfit.row) & (scores.task == bitfit.task)]
    by_hand = same.groupby("seed").test.mean().mean()
    assert bitfit["mean"] == pytest.approx(by_hand)
    lines = row_lines(scores)
    assert lines["S3PET"]["color"] == "#0072B2" and lines["random (S3PET)"]["color"] == "#8A9099"


def test_the_forest_draws_every_difference_and_zero(faulty):
    study, root, _ = faulty
    scores = results.scores(study, root)
    differences = results.differences(study, scores)
    figure = draw_differences(differences, row_lines(scores))
    assert sum(len(trace.x) for trace in figure.data) == len(differences)
    assert len(figure.layout.shapes) == 5  # zero, in each panel
    one = differences[(differences.row == "S3PET") & (differences.budget == 1e-4)]
    figure = draw_differences(one, row_lines(scores))
    assert list(figure.layout.yaxis.ticktext)[-1] == "all tasks" and len(figure.data) == len(one)


@pytest.mark.parametrize("texts, best", [
    (["59.3 ± 4.8", "61.0", "–"], [False, True, False]), (["7", "7"], [True, True]),
    (["–", "–"], [False, False]), (["-1.0", "-2.0"], [True, False])])
def test_the_best_of_a_column(texts, best):
    assert best_of(pd.Series(texts), [True] * len(texts)) == best


ALL = "window.dispatchEvent(new Event('beforeprint'))"  # draws what the reader has not come to
DRAWN = "document.querySelectorAll('.js-plotly-plot:has(.main-svg)').length"


def visit(browser, path, width=1200, **settings):
    "The open page, the addresses it asked for and everything it complained of."
    tab = browser.new_page(viewport={"width": width, "height": 900}, **settings)
    tab.set_default_timeout(600_000)
    asked, complaints = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    tab.counts = tab.context.new_cdp_session(tab)
    tab.counts.send("Performance.enable", {"timeDomain": "threadTicks"})
    tab.goto(path.as_uri())
    return tab, asked, complaints


def busy(tab):
    "Seconds that the page has computed since it was opened, whatever else the machine did."
    metrics = tab.counts.send("Performance.getMetrics")["metrics"]
    return next(one["value"] for one in metrics if one["name"] == "TaskDuration")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_draws_every_figure_and_asks_for_nothing(browser, page, scheme):
    tab, asked, complaints = visit(browser, page, color_scheme=scheme)
    tab.evaluate(ALL)
    tab.wait_for_function(f"{DRAWN} == 8")
    assert asked == [page.as_uri()] and complaints == []
    assert tab.locator(".heatmaplayer image").count() == 6 and tab.locator("img").count() == 0
    fill = tab.locator("#score-over-size .gtitle").evaluate("element => getComputedStyle(element).fill")
    assert (fill == "rgb(36, 41, 47)") is (scheme == "light")


def test_browser_draws_a_figure_when_the_reader_comes_near(browser, page):
    tab, _, complaints = visit(browser, page)
    assert tab.evaluate(DRAWN) < 8
    tab.locator("#cost").scroll_into_view_if_needed()
    tab.wait_for_function("document.querySelector('#where-the-budgets-went .s3pet-lab:last-child .main-svg')")
    assert complaints == []


WIDTHS = "Object.fromEntries([...document.querySelectorAll('.progress i')].map(i => [i.dataset.state, i.offsetWidth]))"


def test_browser_shows_states_as_wide_as_they_are_many(browser, page, tmp_path):
    tab, _, _ = visit(browser, page)
    widths = tab.evaluate(WIDTHS)
    total = sum(widths.values())
    assert {state: round(72 * width / total) for state, width in widths.items()} == {
        "done": 66, "failed": 1, "missing": 5}
    study = make_study(tmp_path, seeds=[0], grid={"task": ["glue/cola"]}, methods={"S3PET": {}}, show=["table"])
    fill(study, tmp_path / "reports")
    tab, _, _ = visit(browser, study_report(study, tmp_path / "reports"))
    assert list(tab.evaluate(WIDTHS)) == ["done"]


@pytest.mark.parametrize("width", [1200, 420])
def test_browser_scrolls_wide_parts_in_their_own_boxes(browser, page, width):
    tab, _, _ = visit(browser, page, width)
    tab.evaluate(ALL)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_browser_follows_a_link_to_a_run(browser, faulty, page):
    _, _, runs = faulty
    tab, _, _ = visit(browser, page)
    tab.get_by_role("link", name=runs[6].id).click()
    assert tab.title() == "a run"


def test_a_page_of_500_runs_opens_soon(browser, tmp_path):
    "Alone it opens in less than three seconds; the bound is on what it computes, and generous."
    study = make_study(tmp_path, seeds=list(range(21)), show=VIEWS)
    fill(study, tmp_path / "reports", candidates({"encoder": 24}))
    assert len(study) == 504
    started = time.perf_counter()
    path = study_report(study, tmp_path / "reports")
    made = time.perf_counter() - started
    started = time.perf_counter()
    tab, asked, complaints = visit(browser, path)
    opened, computed = time.perf_counter() - started, busy(tab)
    tab.evaluate(ALL)
    tab.wait_for_function(f"{DRAWN} == 8")
    size = path.stat().st_size / 1e6
    print(f"{len(study)} runs: made in {made:.1f} s, {size:.1f} MB, open after {opened:.1f} s, of which it "
          f"computed {computed:.1f} s, {busy(tab):.1f} s with every figure drawn")
    assert body_of(path).count("<h2>") == 7 and len(asked) == 1 and complaints == []
    assert 0 < computed < 10


def test_figures_that_would_make_the_page_too_large_are_left_out(tmp_path, monkeypatch):
    study = make_study(tmp_path, grid={"budget": [5e-5, 1e-4, 2e-4]}, seeds=[0], methods={},
                       show=["heatmaps", "table"])
    fill(study, tmp_path / "reports")
    whole = study_report(study, tmp_path / "reports").stat().st_size
    monkeypatch.setattr("s3pet_nb.lab.study_page.LIMIT", whole - 1000)
    body = body_of(study_report(study, tmp_path / "reports"))
    assert "One figure is left out, as the page would be larger than 8 MB." in body
    assert body.count("Plotly.newPlot(") == 2 and "<h2>Scores" in body
