"""The report and the index: text in the test process, pictures in a real browser."""

import json
import os
import re
import shutil
import time
from dataclasses import replace

import nbformat
import pytest
from plotly.offline import get_plotlyjs
from synthetic import (N_FIGURES, PRUNE_TEMPLATE, candidates, execute_notebook, make_probed, make_pruned,
                       make_run)
from written import EVIL as IMAGE, faulty_study, fill, make_study

from s3pet_nb.core import table
from s3pet_nb.lab.page import (body_html, command, facts, index, report, score_texts, static_notebook, stopped_by_hand,
                               stopped_early, study_command, study_report)
from s3pet_nb.lab.plot import comparison_frame, plot_sizes
from s3pet_nb.lab.store import Run, write_json
from s3pet_nb.lab.study import study as read

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("reports"), study="search", task=EVIL)
    execute_notebook(run)
    return run


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    run = make_pruned(tmp_path_factory.mktemp("pruned"), rounds=3)
    execute_notebook(run, PRUNE_TEMPLATE)
    return run


@pytest.fixture(scope="module")
def stopped(run):
    "The same run, its notebook stopped by a fault in the fourth figure, as the executor leaves it."
    other = Run.create(run.folder.parent.parent, "stopped", run.params, "code")
    for name in "log.jsonl", "structure.json", "result.json":
        shutil.copy(run.folder / name, other.folder)
    notebook = nbformat.read(run.folder / "run.ipynb", as_version=4)
    at = next(
        k
        for k, cell in enumerate(notebook.cells)
        if "plot_loss(run)" in cell.source and "show" in cell.source
    )
    notebook.cells[at].outputs = [
        nbformat.v4.new_output(
            "error",
            ename="ValueError",
            evalue=f"loss is not a number at step 7 of {EVIL}\nlong story",
            traceback=["a frame of the traceback", "\x1b[31mValueError\x1b[0m"],
        )
    ]
    for cell in notebook.cells[at + 1 :]:
        if cell.cell_type == "code":
            cell.outputs = []
    banner = nbformat.v4.new_markdown_cell("a banner", metadata={"tags": ["papermill-error-cell-tag"]})
    notebook.cells.insert(0, banner)
    nbformat.write(notebook, other.folder / "run.ipynb")
    return other


def body_of(path):
    "The page without plotly.js."
    text, script = path.read_text(), get_plotlyjs()
    assert text.count(script) == 1, "plotly.js is in the page once"
    return text.replace(script, "")


def test_page_holds_figures_tables_and_prose_and_points_nowhere(run):
    path = report(run)
    body = body_of(path)
    assert path == run.folder / "report.html" and path.stat().st_size < 6e6
    assert body.count("Plotly.newPlot(") == N_FIGURES and body.count('<table class="numbers">') == 3
    assert "The searched structure, three random ones" in body
    links = set(re.findall(r'(?:src|href)="([^"#][^"]*)"', body))
    assert links == {"run.ipynb", "params.json", "log.jsonl", "structure.json", "result.json"}
    assert "http://" not in body and "https://" not in body


def test_page_drops_progress_bars_and_tagged_parts(run):
    body = body_of(report(run))
    for text in "progress bar", "removed cell", "removed output":
        assert text not in body
    assert "removed" in body, "the code of an output that is removed stays"


def test_head_says_what_was_asked_and_how_to_ask_again(run):
    body = body_of(report(run))
    for text in (
        "all-MiniLM-L6-v2",
        "4,542 parameters",
        "2.00e-04",
        "mix, 110 candidates",
        f"search/{run.id}",
        "3.0 minutes, 1.8 GB",
        "s3pet search --task",
        "--budget 0.0002 --seed 0",
    ):
        assert text in body
    demo = make_run(run.folder.parent.parent, study="demo", steps=6, seed=3, backbone="minilm", lr=0.5,
                    gate="local", baselines=["bitfit", "finetune"])
    assert command(demo) == (
        "s3pet demo --set budget=0.0002 --seed 3 --set search_steps=6 --set lr=0.5 --set gate=local "
        "--set baselines=bitfit,finetune")


def test_a_run_of_a_template_without_a_command_shows_none(tmp_path):
    run = make_run(tmp_path, study="tried", steps=6, own=1)
    known = make_run(tmp_path, study="tried", steps=6)
    for one in run, known:
        nbformat.write(nbformat.v4.new_notebook(), one.folder / "run.ipynb")
    assert command(run) == "" and "Run it again" not in body_of(report(run))
    assert "<span>Run it again</span><code>s3pet search" in body_of(report(known))
    assert command(make_run(tmp_path, study="tried", steps=6, targets=["glue/rte"])).endswith("--set targets=glue/rte")


@pytest.mark.parametrize("rows", [[{"test": 0.5}], [{"label": "searched", "test": "n/a"}], ["searched"], {"label": "x"}, 3])
def test_a_result_that_makes_no_sense_leaves_the_index_to_others(tmp_path, rows):
    whole, odd = (make_run(tmp_path, study=study, steps=6) for study in ("whole", "odd"))
    for run in whole, odd:
        (run.folder / "report.html").write_text("a report")
    odd.save_result(odd.result | {"rows": rows})
    text = index(tmp_path).read_text()
    assert f"odd/{odd.id}/report.html" in text and f"{whole.result['rows'][0]['test']:.3f}" in text


def test_head_says_gate_order_and_an_early_stop(tmp_path):
    run = make_run(tmp_path, study="search", steps=12, gate="local", order="auto")
    assert facts(run)["Gate and order"] == "local, auto" and "Stopped early" not in facts(run)
    stopped = {"step": 1200, "saved": 0.4}, "after 1,200 of 2,000 steps: 40% of the search saved"
    for early, said in (None, None), stopped:
        search = {**run.result["search"], "gate": "local", "gap": 0.0, "planned": 2000, "early_stop": early}
        run.save_result({**run.result, "search": search})
        assert facts(run).get("Stopped early") == stopped_early(run.result) == said


def test_head_says_what_was_stopped_by_hand(tmp_path):
    run = make_run(tmp_path, study="search", steps=12)
    assert "Stopped by hand" not in facts(run) and stopped_by_hand({}) is None
    stops = [{"phase": "search", "step": 40, "steps": 160}, {"phase": "random-1", "step": 7, "steps": 2000}]
    run.save_result({**run.result, "stopped": stops})
    assert facts(run)["Stopped by hand"] == "search after 40 of 160 steps, random-1 after 7 of 2,000 steps"


@pytest.mark.parametrize("asked, said", [
    ({}, {"Criterion": "first-order, mean over all steps", "Pruning": "unstructured, in one round"}),
    ({"average_over": 1, "granularity": "structured", "rounds": 3},
     {"Criterion": "first-order at the end of training", "Pruning": "structured, in 3 rounds"}),
    ({"average_over": 20}, {"Criterion": "first-order, mean over the last 20 steps"}),
])
def test_head_says_how_it_was_pruned_before_there_is_a_result_too(tmp_path, asked, said):
    run = make_pruned(tmp_path, steps=6, finished=False, **asked)
    assert (said | {"Protocol": "lawton"}).items() <= facts(run).items()


@pytest.mark.parametrize("asked, said", [
    ({}, "lawton"), ({"prune_steps": 0, "lr": 0.0, "dropout": True}, "lawton"),
    ({"prune_steps": 400, "lr": 1e-3, "dropout": False}, "lawton, but prune_steps=400, lr=0.001, dropout off")])
def test_head_says_what_was_given_in_place_of_the_protocols_numbers(tmp_path, asked, said):
    assert facts(make_pruned(tmp_path, steps=6, finished=False, **asked))["Protocol"] == said


def test_head_of_a_search_says_nothing_of_pruning(run):
    assert not {"Criterion", "Pruning", "Protocol"} & set(facts(run))


@pytest.mark.parametrize("study", ["prune", "budgets"])
def test_a_pruning_is_asked_for_again_by_its_own_command(tmp_path, study):
    run = make_pruned(tmp_path, steps=6, finished=False, study=study, average_over=1)
    assert command(run) == (
        "s3pet prune --task glue/cola --backbone minilm --space bias --budget 4631.0 "
        "--granularity unstructured --criterion first-order --set average_over=1 --set protocol=lawton --seed 0")


@pytest.mark.parametrize("select_by, said", [
    ("density", "by score over size"), ("value", "by score"), ("exact", "by score, the best sum")])
def test_head_says_how_a_probe_chooses(tmp_path, select_by, said):
    run = make_probed(tmp_path, finished=False, select_by=select_by, probe_steps=24)
    known = facts(run)
    assert known["Score of a module"] == "gain_along" and known["Selection"] == said
    assert known["Protocol"] == "quick, but probe_steps=24" and "Criterion" not in known


def test_a_probe_is_asked_for_again_by_its_own_command(tmp_path):
    run = make_probed(tmp_path, study="budgets", finished=False, select_by="exact", probe_score="gain")
    assert command(run) == ("s3pet probe --task agreement --backbone minilm --space mix --budget 4542.0 --score gain "
                            "--set select_by=exact --set protocol=quick --seed 0")


def test_page_of_a_pruning(pruned):
    body = body_of(report(pruned))
    assert body.count("Plotly.newPlot(") == N_FIGURES and "The pruned structure" in body
    assert "first-order, mean over all steps" in body and "unstructured, in 3 rounds" in body
    assert "4,631 parameters" in body and "s3pet prune --task glue/cola" in body
    (pruned.folder / "structure.safetensors").write_bytes(b"masks")
    assert '<a href="structure.safetensors">' in body_of(report(pruned))
    assert ">0.820</td>" in index(pruned.folder.parent.parent).read_text()


def test_a_result_with_full_finetuning_and_other_baselines_is_shown(tmp_path):
    run = make_run(tmp_path, study="search", steps=12)
    result = run.result
    rows = [row for row in result["rows"] if row["label"] != "lora-r1"]
    tuned = {**rows[0], "label": "finetune", "structure": "finetune", "modules": None, "n_params": 22_713_216,
             "test": 0.9}
    run.save_result({**result, "rows": [*rows, {**rows[0], "label": "bitfit-cut", "test": 0.7}, tuned]})
    shown = [{"application/vnd.plotly.v1+json": json.loads(plot_sizes(run).to_json())},
             {"text/html": table(comparison_frame(run))}]
    outputs = [nbformat.v4.new_output("display_data", data) for data in shown]
    cells = [nbformat.v4.new_code_cell("show(run)", outputs=outputs)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), run.folder / "run.ipynb")
    body = body_of(report(run))
    assert body.count("Plotly.newPlot(") == 1 and ">22,713,216</td>" in body
    text = index(tmp_path).read_text()
    assert ">finetune</th>" in text and ">0.900</td>" in text and ">0.700</td>" in text


def test_names_cannot_become_markup(run, stopped):
    report(stopped)
    report(run)
    for path in (report(run), report(stopped), index(run.folder.parent.parent)):
        text = path.read_text().replace(get_plotlyjs(), "")
        assert EVIL not in text and "&lt;script&gt;alert(1)" in text
    assert "<title>&lt;script&gt;alert(1)" in report(run).read_text()


def test_report_is_the_same_every_time_and_leaves_the_notebook_alone(run):
    before = (run.folder / "run.ipynb").read_bytes()
    first = re.sub(r'id="cell-id=[^"]*"', "", report(run).read_text())
    assert first == re.sub(r'id="cell-id=[^"]*"', "", report(run.folder).read_text())
    assert (run.folder / "run.ipynb").read_bytes() == before
    assert not [name for name in os.listdir(run.folder) if name.endswith(".tmp")]


def test_partial_report_says_so_and_keeps_what_was_drawn(stopped):
    body = body_of(report(stopped))
    assert body.count("Plotly.newPlot(") == 3
    assert (
        "This run stopped before its end: ValueError: loss is not a number at step 7 of &lt;script&gt;"
        in body
    )
    assert "long story" not in body and "a frame of the traceback" not in body and "a banner" not in body
    assert "Parameters and versions" not in body


def test_widgets_and_scripts_of_other_kinds_are_dropped():
    cell = nbformat.v4.new_code_cell(
        "live",
        outputs=[
            nbformat.v4.new_output(
                "display_data",
                {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "FigureWidget"},
            ),
            nbformat.v4.new_output(
                "display_data", {"application/javascript": "alert(1)", "text/plain": "kept"}
            ),
            nbformat.v4.new_output("stream", name="stdout", text="said"),
        ],
    )
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {"state": {}}})
    copy, figures, error = static_notebook(notebook)
    assert error is None and figures == {} and "widgets" not in copy.metadata and "widgets" in notebook.metadata
    assert [output.get("data", output.get("text")) for output in copy.cells[0].outputs] == [
        {"text/plain": "kept"},
        "said",
    ]


def test_report_without_a_notebook_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="execute its notebook first"):
        report(Run.create(tmp_path, "study", {}, ""))


def test_index_lists_reports_with_scores_and_links(run, stopped):
    report(run)
    report(stopped)
    text = index(run.folder.parent.parent).read_text()
    for one in (run, stopped):
        assert f'<a href="{one.study}/{one.id}/report.html">' in text
    assert (
        ">0.820</td>" in text and ">0.784 (0.766 to 0.802, 3)</td>" in text and ">0.748</td>" in text
    )
    assert "http" not in text and text.count("<tr>") == 3


def test_index_lists_studies_before_runs(tmp_path):
    run = make_run(tmp_path, study="whole", steps=6)
    make_run(tmp_path, study="whole", steps=6, seed=1, finished=False)
    (run.folder / "report.html").write_text("a page")
    told = {"whole": {"title": EVIL, "ids": [run.id, *map(str, range(1199))]}, "part": {"title": "", "ids": [run.id, "b", "c"], "folder": "whole"},
            "begun": {"title": "Nothing yet", "ids": ["a", "b"]}, "torn": None, "other": {"ids": None}}
    for name, study in told.items():
        (tmp_path / name).mkdir(exist_ok=True)
        text = json.dumps({"name": name} | (study or {}))
        (tmp_path / name / "study.json").write_text(text if study else text[:5])
    (tmp_path / "whole" / "index.html").write_text("a page")
    text = index(tmp_path).read_text()
    rows = re.findall("<tr>(<td.*)</tr>", re.sub(' style="[^"]*"', "", text))
    assert rows[:3] == ["<td>begun</td><td>Nothing yet</td><td>0 of 2</td>",
                        "<td>part</td><td></td><td>1 of 3</td>",
                        '<td><a href="whole/index.html">whole</a></td>'
                        "<td>&lt;script&gt;alert(1)&lt;/script&gt;</td><td>1 of 1,200</td>"]
    assert len(rows) == 4 and f'<a href="whole/{run.id}/report.html">' in rows[3]
    assert text.index("<h2>Studies</h2>") < text.index("<h2>Runs</h2>") and EVIL not in text


def test_index_of_an_empty_folder_says_so(tmp_path):
    text = index(tmp_path).read_text()
    assert "There is no study and no report yet." in text and "<table" not in text


def test_index_survives_parameters_of_a_template_of_ones_own(tmp_path):
    run = Run.create(tmp_path, "own", {"criterion": "mine", "granularity": "coarse"}, "code")
    (run.folder / "report.html").write_text("a page")
    assert run.id in index(tmp_path).read_text()


def visit(browser, path, width=1200, **settings):
    "The open page, the addresses it asked for and everything it complained of."
    page = browser.new_page(viewport={"width": width, "height": 900}, **settings)
    page.set_default_timeout(600_000)
    page.counts = page.context.new_cdp_session(page)
    page.counts.send("Performance.enable", {"timeDomain": "threadTicks"})
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    page.goto(path.as_uri())
    page.wait_for_load_state("networkidle")
    return page, asked, complaints


def n_drawn(page):
    return page.locator(".js-plotly-plot:has(.main-svg)").count()


@pytest.mark.parametrize("which, n_figures", [("run", N_FIGURES), ("stopped", 3), ("pruned", N_FIGURES)])
def test_browser_draws_every_figure_and_asks_for_nothing(browser, request, which, n_figures):
    path = report(request.getfixturevalue(which))
    page, asked, complaints = visit(browser, path)
    page.wait_for_function(f"document.querySelectorAll('.js-plotly-plot .main-svg').length >= {n_figures}")
    assert n_drawn(page) == n_figures
    assert asked == [path.as_uri()] and complaints == []
    assert page.locator(".heatmaplayer image").count() == 1


def test_browser_hides_the_code_until_it_is_asked_for(browser, run):
    page, _, _ = visit(browser, report(run))
    code = page.locator(".jp-CodeCell .highlight")
    assert code.count() > 5 and not code.last.is_visible()
    page.check("#show-code")
    assert code.last.is_visible()
    shown = [text for text in code.all_inner_texts() if text.strip().startswith("folder =")]
    visible = [text for text in shown if page.get_by_text(text.strip(), exact=True).first.is_visible()]
    assert len(shown) == 2 and len(visible) == 1 and str(run.folder) in visible[0]


@pytest.mark.parametrize("width", [1200, 900, 420])
def test_browser_clips_nothing(browser, run, width):
    page, _, _ = visit(browser, report(run), width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for figure in page.locator(".plotly-graph-div").all():
        box, svg = figure.bounding_box(), figure.locator(".main-svg").first.bounding_box()
        assert svg["x"] >= box["x"] - 1 and svg["x"] + svg["width"] <= box["x"] + box["width"] + 1
    if width == 1200:
        assert page.evaluate("""[...document.querySelectorAll('table')].every(
            table => table.offsetWidth <= table.parentElement.offsetWidth)""")


def test_browser_opens_the_index_and_follows_its_link(browser, run):
    report(run)
    page, asked, complaints = visit(browser, index(run.folder.parent.parent))
    assert len(asked) == 1 and complaints == []
    page.get_by_role("link", name=run.id).first.click()
    page.wait_for_selector(".js-plotly-plot .main-svg")
    assert page.title().startswith(EVIL) and complaints == []

# ---------------------------------------------------------------------------- the page of a study


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    "A study with faults, and three of its runs have a page."
    study, root, runs = faulty_study(tmp_path_factory.mktemp("studies"))
    for run in runs[6:9]:
        (run.folder / "report.html").write_text("<!DOCTYPE html><title>a run</title>")
    return study, root, runs


@pytest.fixture(scope="module")
def study_page(faulty):
    study, root, _ = faulty
    return study_report(study, root)


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    "The page of a study of another one's runs, with two views, and a result that one of them cannot read."
    root = tmp_path_factory.mktemp("part")
    whole = make_study(root, grid={"task": ["glue/cola", "glue/rte"]}, methods={}, seeds=[0, 1], title="")
    runs = fill(whole, root / "reports")
    (runs[1].folder / "report.html").write_text("a report")
    write_json(runs[0].folder / "result.json", runs[0].result | {"search": {"seconds": "quick"}})
    return study_report(replace(whole, name="part", folder="sweep", show=["cost", "ranks"]), root / "reports"), runs


HEADING = '<h2 id="[^"]*">(.*?)<a class="anchor-link"'


def test_the_page_of_a_study_says_what_is_done_and_how_to_go_on(faulty, study_page):
    study, root, runs = faulty
    body = body_of(study_page)
    assert study_page == root / "sweep" / "index.html" and study_page.stat().st_size < 8e6
    assert "66 of 72 runs are done, 1 failed, 5 missing; what follows is made of those that are done." in body
    assert f"<code>s3pet study sweep.yml --out {root}</code>" in body
    asked = study.changed(data_dir="my data", targets=["glue/rte", "glue/cola"])
    assert study_command(asked) == "s3pet study sweep.yml --data-dir 'my data' --set targets=glue/rte,glue/cola"
    assert study_command(replace(asked, source="mine/search.yml")).startswith("s3pet study mine/search.yml --data-dir")
    small = read("small-figure-2").changed(n_eval=64, space="lo ra")
    line = "s3pet study small-figure-2 --set n_eval=64 --set 'space=lo ra' --out kept"
    assert study_command(small, "kept") == line
    assert f"<dd>{', '.join(['5e-05', '0.0001', '0.0002'])}</dd>" in body and "<dd>0, 1, 2</dd>" in body
    headings = ["Scores", "Differences", "Ranks", "Score over size", "Where the budgets went", "Cost", "All runs"]
    assert re.findall(HEADING, body) == headings
    assert re.findall('<nav>(.*?)</nav>', body, re.S)[0].count("<a href=") == 7


def test_the_page_of_a_study_points_only_to_its_runs_and_tables(faulty, study_page):
    study, root, runs = faulty
    links = set(re.findall(r'(?:src|href)="([^"#][^"]*)"', body_of(study_page)))
    reports = {f"../sweep/{run.id}/report.html" for run in runs[6:9]}
    assert links == reports | {"table.csv", "table.md", "table.tex", "scores.csv", "compare.ipynb"}
    assert all((study_page.parent / link).is_file() for link in links)


def test_every_run_is_listed_with_its_state(faulty, study_page):
    study, root, runs = faulty
    body = body_of(study_page)
    listed = body[body.index('<h2 id="All-runs"'):]
    assert listed.count("<tr") == 73 and all(question.id in listed for question in study.questions())
    assert "ValueError: no column &lt;img src=x" in listed and "its result.json cannot be read" in listed


def test_a_lost_or_torn_file_is_said_on_the_page(faulty, study_page):
    _, _, runs = faulty
    body = body_of(study_page)
    for run, why in ((runs[3], "no gates.csv"), (runs[4], "a gates.csv that is cut off"),
                     (runs[5], "a gates.csv that cannot be read")):
        assert f"One run is left out for {why}: {run.id}." in body
    assert "S3PET, budget 5e-05: mean p over 10 runs" in body  # of twelve, one failed and one has no gates
    assert body.count("Plotly.newPlot(") == 8


def test_names_of_a_study_cannot_become_markup(faulty, study_page):
    study, root, _ = faulty
    assert IMAGE not in body_of(study_page) and "&lt;img src=x onerror=alert(1)&gt;" in body_of(study_page)
    text = index(root).read_text()
    assert IMAGE not in text and '<a href="sweep/index.html">sweep</a>' in text and ">66 of 72</td>" in text


def test_a_study_that_has_not_begun_has_a_page(tmp_path):
    path = study_report(make_study(tmp_path), tmp_path / "reports")
    body = body_of(path)
    assert "0 of 72 runs are done, 72 missing; there is nothing to show yet but what is asked." in body
    assert re.findall(HEADING, body) == ["All runs"] and "Plotly.newPlot(" not in body and 'class="failed"' not in body
    assert sorted(file.name for file in path.parent.iterdir()) == ["compare.ipynb", "index.html", "study.json"]


def test_a_study_shows_what_it_asked_for_in_its_order(part):
    path, runs = part
    body = body_of(path)
    assert re.findall(HEADING, body) == ["Cost", "Ranks", "All runs"]
    assert "<h1>part</h1>" in body and "All 4 runs are done." in body and ">method</th>" not in body
    assert path.parent.name == "part" and f'href="../sweep/{runs[1].id}/report.html"' in body


def test_a_result_that_makes_no_sense_costs_a_part_not_the_page(part):
    body = body_of(part[0])
    cost, ranks = body.index('<h2 id="Cost"'), body.index('<h2 id="Ranks"')
    assert '<p class="failed">' in body[cost:ranks] and '<p class="failed">' not in body[ranks:]


def test_figures_that_would_make_the_page_too_large_are_left_out(study_page, monkeypatch):
    executed = nbformat.read(study_page.parent / "compare.ipynb", as_version=4)
    notebook, figures, error = static_notebook(executed, whole=True)
    whole = body_html(notebook, figures, waits=True)
    assert error is None and whole.count("Plotly.newPlot(") == len(figures) == 8
    monkeypatch.setattr("s3pet_nb.lab.page.LIMIT", len(whole.encode()) + len(get_plotlyjs()) - 1000)
    body = body_html(notebook, figures, waits=True)
    assert "One figure is left out, as the page would be larger than 8 MB." in body
    assert body.count("Plotly.newPlot(") == 7 and '<h2 id="Scores"' in body


ALL = "window.dispatchEvent(new Event('beforeprint'))"  # draws what the reader has not come to
DRAWN = "document.querySelectorAll('.js-plotly-plot:has(.main-svg)').length"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_draws_every_figure_of_a_study_and_asks_for_nothing(browser, study_page, scheme):
    tab, asked, complaints = visit(browser, study_page, color_scheme=scheme)
    tab.evaluate(ALL)
    tab.wait_for_function(f"{DRAWN} == 8")
    assert asked == [study_page.as_uri()] and complaints == []
    assert tab.locator(".heatmaplayer image").count() == 6 and tab.locator("img").count() == 0
    fill = tab.locator(".gtitle").first.evaluate("element => getComputedStyle(element).fill")
    assert (fill == "rgb(36, 41, 47)") is (scheme == "light")


def test_browser_draws_a_figure_when_the_reader_comes_near(browser, study_page):
    tab, _, complaints = visit(browser, study_page)
    before = tab.evaluate(DRAWN)
    assert before < 8
    tab.locator("#Cost").scroll_into_view_if_needed()
    tab.wait_for_function("[...document.querySelectorAll('.s3pet-lab')].pop().querySelector('.main-svg')")
    assert complaints == []


WIDTHS = "Object.fromEntries([...document.querySelectorAll('.progress i')].map(i => [i.dataset.state, i.offsetWidth]))"


def test_browser_shows_states_as_wide_as_they_are_many(browser, study_page, part):
    tab, _, _ = visit(browser, study_page)
    widths = tab.evaluate(WIDTHS)
    total = sum(widths.values())
    assert {state: round(72 * width / total) for state, width in widths.items()} == {
        "done": 66, "failed": 1, "missing": 5}
    tab, _, _ = visit(browser, part[0])
    assert list(tab.evaluate(WIDTHS)) == ["done"]


@pytest.mark.parametrize("width", [1200, 420])
def test_browser_scrolls_wide_parts_in_their_own_boxes(browser, study_page, width):
    tab, _, _ = visit(browser, study_page, width)
    tab.evaluate(ALL)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_browser_shows_the_code_of_a_study_when_it_is_asked_for(browser, study_page):
    tab, _, _ = visit(browser, study_page)
    code = tab.locator(".jp-CodeCell .highlight", has_text="score_table(outcome)").first
    assert not code.is_visible()
    tab.check("#show-code")
    assert code.is_visible()


def test_browser_follows_a_link_to_a_run(browser, faulty, study_page):
    _, _, runs = faulty
    tab, _, _ = visit(browser, study_page)
    tab.get_by_role("link", name=runs[6].id).click()
    assert tab.title() == "a run"


def busy(tab):
    "Seconds that the page has computed since it was opened, whatever else the machine did."
    metrics = tab.counts.send("Performance.getMetrics")["metrics"]
    return next(one["value"] for one in metrics if one["name"] == "TaskDuration")


def test_a_page_of_500_runs_opens_soon(browser, tmp_path):
    "Alone it opens in less than three seconds; the bound is on what it computes, and generous."
    study = make_study(tmp_path, seeds=list(range(21)))
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
    assert body_of(path).count("<h2 id=") == 7 and len(asked) == 1 and complaints == []
    assert 0 < computed < 10


def test_a_page_of_transfers_has_a_matrix_and_names_as_text(tmp_path):
    tasks = ["glue/cola", "glue/rte", IMAGE]
    study = make_study(tmp_path, params={"targets": tasks}, grid={"task": tasks}, methods={}, seeds=[0, 1],
                       show=["transfer", "heatmaps"])
    fill(study, tmp_path / "reports")
    body = body_of(study_report(study, tmp_path / "reports"))
    assert re.findall(HEADING, body) == ["From task to task", "Where the budgets went", "All runs"]
    matrix = body[body.index('<h2 id="From-task-to-task"'):body.index('<h2 id="Where-the-budgets-went"')]
    assert matrix.count("<b>") >= 3 and matrix.count("Plotly.newPlot(") == 1
    assert "No run has searched or pruned yet." in body and IMAGE not in body


def test_a_page_shows_what_prunings_kept_task_by_task(tmp_path):
    study = make_study(tmp_path, grid={"task": ["glue/cola", "glue/rte"]}, seeds=[0, 1],
                       show=["heatmaps", "heatmaps by task"],
                       methods={"S3PET": {}, "first-order": {"params": {"criterion": "first-order"}}})
    fill(study, tmp_path / "reports")
    body = body_of(study_report(study, tmp_path / "reports"))
    assert "S3PET: mean p over 4 runs" in body and "first-order: mean share kept over 4 runs" in body
    assert re.search("S3PET, task glue.{1,6}cola: mean p over 2 runs", body) and "left out" not in body
    assert body.count("Plotly.newPlot(") == 2 + 4


def test_a_page_puts_probes_beside_searches(tmp_path):
    study = make_study(tmp_path, grid={"task": ["glue/cola"]}, seeds=[0, 1], show=["heatmaps", "cost"],
                       methods={"S3PET": {}, "probe": {"params": {"probe_score": "gain"}}})
    fill(study, tmp_path / "reports")
    body = body_of(study_report(study, tmp_path / "reports"))
    assert "probe: mean share kept over 2 runs" in body and "S3PET: mean p over 2 runs" in body
    assert "left out" not in body and "No run has searched" not in body
    told = body[body.index('<h2 id="Cost"'):body.index('<h2 id="All-runs"')]
    assert re.search(r">probe</td>.*?>6\.0</td>.*?>100</td>", told, re.S), "seconds and passes of the probe"


def test_a_page_that_cannot_be_set_up_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr("s3pet_nb.lab.page.save_study", lambda study, folder: None)  # so that there is no study to read
    study = make_study(tmp_path, grid={"task": ["glue/cola"]}, methods={}, seeds=[0])
    fill(study, tmp_path / "reports")
    with pytest.raises(RuntimeError, match="the page of study 'sweep' cannot be made: AttributeError"):
        study_report(study, tmp_path / "reports")
    assert not (tmp_path / "reports" / "sweep" / "index.html").exists()


NOTHING = [{"label": "searched", "test": 0.8, "learned_nothing": None},
           {"label": "random-1", "test": 0.5, "learned_nothing": "one class"},
           {"label": "random-2", "test": 0.7, "learned_nothing": None},
           {"label": "bitfit", "test": 0.5, "learned_nothing": "one class"}]


def test_the_head_of_a_report_names_what_learned_nothing(tmp_path):
    run = make_run(tmp_path)
    assert "Learned nothing" not in facts(run), "a result of before does not know"
    write_json(run.folder / "result.json", run.result | {"rows": NOTHING})
    assert facts(Run(run.folder))["Learned nothing"] == "random-1, bitfit (one class)"


def test_the_index_leaves_out_what_learned_nothing():
    assert score_texts({"rows": NOTHING}) == {"searched": "0.800", "random": "0.700", "bitfit": "learned nothing"}


def test_the_index_has_no_mean_over_two_tasks():
    rows = [{"label": "searched", "test": 0.8, "task": "a"}, {"label": "searched", "test": 0.2, "task": "b"}]
    assert score_texts({"rows": rows}) == {"searched on a": "0.800", "searched on b": "0.200"}


def test_the_head_of_a_report_says_which_test_rows_a_search_has_seen(tmp_path):
    run = make_run(tmp_path)
    assert "Test rows seen in a search" not in facts(run)
    lines = [{"label": "a", "on": "own", "test_rows": 1_200, "train": 0, "validation": 1_100},
             {"label": "b", "on": "own", "test_rows": 1_200, "train": 0, "validation": 0},
             {"label": "c", "on": "own", "unknown": "no file"}]
    write_json(run.folder / "result.json", run.result | {"brought": lines})
    assert facts(Run(run.folder))["Test rows seen in a search"] == (
        "a: of 1,200 test rows of own 1,100 were validation rows of its search; "
        "c: it is not known which rows it was searched on (no file)")


def test_seeds_of_parts_stand_beside_the_seed(tmp_path):
    run = make_run(tmp_path)
    write_json(run.folder / "params.json", run.params | {"seed": 3, "split_seed": 0, "order_seed": 5, "init_seed": -1})
    assert facts(Run(run.folder))["Seed"] == "3, split 0, order 5"
