"JupyterLab in a real browser: a search is watched, paused, stopped, watched from elsewhere, and explored."
import json
import re
from pathlib import Path

import nbformat
import papermill.iorw
import pytest
from lab import DRAWN, MINUTE, ROOT, STATUS, Page, jupyterlab, notebook
from papermill.parameterize import parameterize_notebook
from s3pet_nb.lab.page import report
from synthetic import make_run

FIRST = ROOT / "nbs" / "tutorials" / "01_first_search.ipynb"
LONG = dict(steps=4000, evaluate_every=4, retrain_steps=4, n_train=512, n_eval=16)  # until somebody stops it
SEARCH = """
from s3pet_nb.lab.live import Monitor
from s3pet_nb.lab.store import Run
from s3pet_nb.learn.search import SearchConfig, search
from s3pet_nb.model.backbone import example_batch, tiny
from s3pet_nb.model.space import make_space

run = Run.create("reports", "{study}", {{"steps": {steps}}}, "")
model = tiny("bert", num_hidden_layers=6)
space = make_space(model)
batches = [example_batch(model, size=32, seed=seed) for seed in range(8)]
result = await Monitor(run).steer(search, model, space, batches[:4], batches[4:], batches[:1],
                                  budget=space.n_params // 4,
                                  config=SearchConfig({steps}, lr=1e-2, evaluate_every=50, dropout=False))
print("found", len(result.structure()), "modules in", result.steps, "steps")
"""
ATTACH = """
from s3pet_nb.lab.live import Monitor
from s3pet_nb.lab.store import run_folders

monitor = Monitor(run_folders("reports", "watched")[0].id)
monitor
"""
EXPLORE = """
from s3pet_nb.lab.explore import Explorer

Explorer("finished")
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory, browser):
    "Folder and address of a JupyterLab on loopback."
    folder = tmp_path_factory.mktemp("lab")
    first = parameterize_notebook(papermill.iorw.load_notebook_node(str(FIRST)), LONG)
    nbformat.write(first, folder / "first.ipynb")
    notebook(folder / "search.ipynb", SEARCH.format(study="watched", steps=100_000))
    notebook(folder / "short.ipynb", SEARCH.format(study="short", steps=40), "1 + 1")
    notebook(folder / "explore.ipynb", EXPLORE)
    for seed in 0, 1:
        run = make_run(folder / "finished", study="search", steps=12, seed=seed, gate="global")
        notebook(run.folder / "run.ipynb", "1 + 1")
        report(run)
    for name in "one", "two":
        notebook(folder / f"{name}.ipynb", ATTACH)
    with jupyterlab(folder, OMP_NUM_THREADS="1") as address:
        yield folder, address


def test_the_first_tutorial_is_watched_paused_and_stopped(lab, browser):
    folder, address = lab
    page = Page(browser, address, "first.ipynb")
    page.run_all()
    page.page.wait_for_selector(DRAWN, timeout=2 * MINUTE)
    page.until_step(4)
    page.wait(f"document.querySelectorAll('{DRAWN} .main-svg').length > 1")
    points, before = page.points(), page.heat()
    for _ in range(3):
        page.wait(f"before => JSON.stringify(document.querySelector('{DRAWN}').data[0].z) !== before",
                  timeout=3 * MINUTE, argument=before)  # two busy cores draw seldom
        before = page.heat()
    assert page.points() > points

    page.button("Pause").click()
    page.wait(f"document.querySelector('{STATUS}').innerText.endsWith('paused')")
    held = page.step
    page.page.wait_for_timeout(3_000)
    assert page.step == held
    page.button("Checkpoint").click()
    page.wait(f"/no checkpoint.*paused$/.test(document.querySelector('{STATUS}').innerText)")
    before = page.heat()
    slider = page.page.get_by_role("slider").first
    for _ in range(3):  # the second move arrives only if the kernel has answered the first one
        slider.press("ArrowRight")
        page.wait(f"before => JSON.stringify(document.querySelector('{DRAWN}').data[0].z) !== before",
                  argument=before)
        before = page.heat()
    page.button("Resume").press("Enter")
    page.until_step(held + 4)

    page.button("Stop").click()
    page.page.locator(".jp-OutputArea table", has_text="unseen").wait_for(timeout=2 * MINUTE)
    run, = (path.parent for path in folder.glob("reports/tutorials/*/result.json"))
    searched = [record for record in map(json.loads, (run / "log.jsonl").read_text().splitlines())
                if record["phase"] == "search" and record["event"] == "step"]
    assert held < searched[-1]["step"] < LONG["steps"]
    assert json.loads((run / "structure.json").read_text())["modules"]
    page.close()


def test_a_search_whose_page_was_left_is_watched_from_two_others(lab, browser):
    _, address = lab
    first = Page(browser, address, "search.ipynb")
    first.run_all()
    first.page.wait_for_selector(DRAWN, timeout=MINUTE)
    first.until_step(10)
    held = first.step
    first.page.reload()  # the notebook was not saved, so its figures are lost; the kernel goes on
    first.page.wait_for_selector(".jp-NotebookPanel-toolbar", timeout=MINUTE)
    first.close()
    monitors = [Page(browser, address, f"{name}.ipynb") for name in ("one", "two")]
    for monitor in monitors:
        monitor.run_all()
        monitor.page.wait_for_selector(DRAWN, timeout=MINUTE)
        monitor.until_step(held + 10)
    one, two = monitors
    one.button("Pause").click()
    two.wait("document.querySelector('.s3pet-status').innerText.endsWith('paused')")
    two.button("Resume").click()
    two.until_step(two.step + 10)
    two.button("Stop").click()
    for monitor in monitors:
        monitor.wait("document.querySelector('.s3pet-status').innerText.includes('asked to')")
        monitor.close()


def test_run_all_keeps_its_order_and_leaves_figures_that_last(lab, browser):
    _, address = lab
    page = Page(browser, address, "short.ipynb")
    page.run_all()
    page.page.get_by_text(re.compile(r"found \d+ modules in 40 steps")).wait_for(timeout=MINUTE)
    page.page.wait_for_selector(".jp-OutputArea-executeResult >> text=2", timeout=MINUTE)
    assert page.page.locator(".jp-OutputArea .js-plotly-plot").count() == 2
    assert page.page.locator(".s3pet-lab").count() == 0
    page.close()


def test_finished_runs_are_explored(lab, browser):
    _, address = lab
    page = Page(browser, address, "explore.ipynb")
    page.run_all()
    tab, figure = page.page, page.page.locator(".s3pet-lab .js-plotly-plot")
    tab.locator(".s3pet-lab table.numbers tbody tr").nth(1).wait_for(timeout=MINUTE)
    for view, figures in ("Budget", 2), ("Compare", 2), ("Average", 1), ("Sweep", 1):
        page.button(view).click()
        page.wait("count => document.querySelectorAll('.s3pet-lab .gtitle').length === count", argument=figures)

    page.button("Budget").click()
    figure.nth(1).locator(".main-svg").first.wait_for(timeout=MINUTE)
    title = figure.first.locator(".gtitle")
    for _ in range(2):
        before = title.text_content()
        tab.get_by_role("slider").first.press("PageUp")
        page.wait("before => document.querySelector('.s3pet-lab .gtitle').textContent !== before",
                  argument=before)
    with tab.expect_download() as given:
        tab.locator(".s3pet-lab a[download]").first.click()
    head, *rows = Path(given.value.path()).read_text().splitlines()
    assert {"name", "n", "p", "alpha", "selected"} <= set(head.split(",")) and len(rows) > 50

    page.button("Runs").click()
    tab.locator(".s3pet-lab table.numbers a").first.click()
    tab.locator(".jp-HTMLViewer iframe").wait_for(timeout=MINUTE)
    page.complaints = [said for said in page.complaints if "sandboxed" not in said]  # until it is trusted
    page.close()
