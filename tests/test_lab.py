"JupyterLab in a real browser: a search is watched, paused, stopped, and watched again from elsewhere."
import re

import pytest
from lab import DRAWN, MINUTE, Page, jupyterlab, notebook

SEARCH = """
from s3pet_nb.backbone import example_batch, tiny
from s3pet_nb.live import Monitor
from s3pet_nb.search import SearchConfig, search
from s3pet_nb.space import make_space
from s3pet_nb.store import Run

run = Run.create("reports", "watched", {{"seed": 0}}, "")
model = tiny("bert", num_hidden_layers=6)
space = make_space(model)
batches = [example_batch(model, size=32, seed=seed) for seed in range(8)]
result = await Monitor(run).steer(search, model, space, batches[:4], batches[4:], batches[:1],
                                  budget=space.n_params // 4,
                                  config=SearchConfig({steps}, lr=1e-2, evaluate_every=50, dropout=False))
print("found", len(result.structure()), "modules in", result.steps, "steps")
"""
ATTACH = """
from s3pet_nb.live import Monitor
from s3pet_nb.store import run_folders

monitor = Monitor(run_folders("reports", "watched")[0].id)
monitor
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory, browser):
    "Folder and address of a JupyterLab on loopback."
    folder = tmp_path_factory.mktemp("lab")
    notebook(folder / "search.ipynb", SEARCH.format(steps=100_000))
    notebook(folder / "short.ipynb", SEARCH.format(steps=40).replace("watched", "short"), "1 + 1")
    for name in "one", "two":
        notebook(folder / f"{name}.ipynb", ATTACH)
    with jupyterlab(folder, OMP_NUM_THREADS="1") as address:
        yield folder, address


def test_a_search_is_watched_paused_left_and_stopped(lab, browser):
    folder, address = lab
    first = Page(browser, address, "search.ipynb")
    first.run_all()
    first.page.wait_for_selector(DRAWN, timeout=MINUTE)
    first.until_step(10)
    first.wait(f"document.querySelectorAll('{DRAWN} .main-svg').length > 1")
    points, before = first.points(), first.heat()
    for _ in range(3):
        first.wait(f"before => JSON.stringify(document.querySelector('{DRAWN}').data[0].z) !== before",
                   argument=before)
        before = first.heat()
    assert first.points() > points

    first.page.get_by_role("button", name="Pause").click()
    first.wait("document.querySelector('.s3pet-status').innerText.endsWith('paused')")
    held = first.step
    first.page.wait_for_timeout(1_500)
    assert first.step == held
    first.page.get_by_role("button", name="Resume").click()
    first.until_step(held + 10)

    first.page.reload()  # the notebook was not saved, so its figures are lost; the kernel goes on
    first.page.close()
    monitors = [Page(browser, address, f"{name}.ipynb") for name in ("one", "two")]
    for monitor in monitors:
        monitor.run_all()
        monitor.page.wait_for_selector(DRAWN, timeout=MINUTE)
        monitor.until_step(held + 10)
    one, two = monitors
    one.page.get_by_role("button", name="Pause").click()
    two.wait("document.querySelector('.s3pet-status').innerText.endsWith('paused')")
    two.page.get_by_role("button", name="Resume").click()
    two.until_step(two.step + 10)
    two.page.get_by_role("button", name="Stop").click()
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
