"The explorer: numbers of its frames, broken folders, names as text, controls that change what is shown."

import base64
import html
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import t
from synthetic import candidates, make_probed, make_pruned, make_run, shifted

from s3pet_nb.core import UnknownName
from s3pet_nb.lab.explore import (Explorer, Learned, csv_link, jaccard_frame, margin, margin_text, missing, picked,
                                  places_frame, plot_jaccard, plot_places, plot_sweep, plot_trained, plot_under,
                                  reports_note, run_frame, run_labels, runs_table, sweep_frame, trained_frame)
from s3pet_nb.lab.plot import mean_p_frame, p_frame, share_frame
from s3pet_nb.lab.store import Run, run_folders, write_json
from s3pet_nb.model.gate import HardConcrete, ShiftedSigmoid, gate_record
from s3pet_nb.model.structure import Structure, select

ATTACK = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "Three seeds of a search at one budget, one seed at another, one pruning."
    root = tmp_path_factory.mktemp("reports")
    for seed in range(3):
        make_run(root, seed=seed)
    make_run(root, seed=0, budget=9_000, study="wide")
    make_pruned(root)
    return root


@pytest.fixture(scope="module")
def run(root):
    return run_folders(root, "demo")[0]


def learned(p, n, budget, gate=ShiftedSigmoid(), method="greedy"):
    space = [{"name": f"encoder.0.q{i}.lora", "stack": "encoder", "layer": 0, "role": f"q{i}", "kind": "linear",
              "module": "lora", "n": int(size)} for i, size in enumerate(n)]
    gates = {"step": 7, "alpha": torch.logit(torch.tensor(p)).tolist(), "p": p, "gate": gate_record(gate)}
    return Learned(p_frame([{"event": "space", "candidates": space, "budget": budget}, {"event": "gates", **gates}]),
                   method)


def rewrite(run, change):
    "The log again, with each record as `change` returns it."
    records = [change(dict(record)) for record in run.records()]
    (run.folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def told(view):
    "The sentences of a view, as text."
    return html.unescape(view.says.value).replace("<br>", " ").strip()


# --- what a folder lacks

LOST = {"Compare": "There is no structure to compare.", "Average": "There is no average to show.",
        "Sweep": "There is no test score to show."}


@pytest.mark.parametrize("spoil, sentence, view", [
    (lambda folder: (folder / "params.json").unlink(), "no params.json", None),
    (lambda folder: (folder / "log.jsonl").unlink(), "no log.jsonl", "Average"),
    (lambda folder: (folder / "structure.json").unlink(), "no structure.json", "Compare"),
    (lambda folder: (folder / "result.json").unlink(), "no result.json", "Sweep"),
    (lambda folder: (folder / "structure.json").write_text('{"modules": ['),
     "a structure.json that is no JSON object", "Compare"),
    (lambda folder: (folder / "result.json").write_text('{"task": "agreement", "ro'),
     "a result.json that is no JSON object", "Sweep"),
    (lambda folder: (folder / "result.json").write_text("[1]"), "a result.json that is no JSON object", "Sweep"),
    (lambda folder: (folder / "log.jsonl").open("a").write('{"event": "st'),
     "a log.jsonl whose last line is cut off", None),
])
def test_what_a_folder_lacks_is_one_sentence_and_the_rest_is_shown(tmp_path, spoil, sentence, view):
    run = make_run(tmp_path)
    assert missing(run) == ""
    spoil(run.folder)
    said = f"Run demo/{run.id} has {sentence}."
    assert missing(run) == said
    explorer = Explorer(tmp_path)
    assert sentence in explorer.view.frames["runs"].missing[0]
    for name, nothing in LOST.items():
        explorer.choice.value = name
        assert told(explorer.view) == (f"{said} {nothing}" if name == view else "")
        assert bool(explorer.view.figures) == (name != view)
    explorer.choice.value = "Budget"
    assert told(explorer.view).startswith(said) and "trained" not in told(explorer.view)
    expected = {"p", "trained"}
    expected -= {"p"} if sentence == "no log.jsonl" else set()
    expected -= {"trained"} if "result.json" in sentence else set()
    assert set(explorer.view.frames) == expected


def test_two_faults_are_one_sentence(tmp_path):
    run = make_run(tmp_path, finished=False)
    (run.folder / "log.jsonl").unlink()
    assert missing(run) == f"Run demo/{run.id} has no log.jsonl and no result.json."


@pytest.mark.parametrize("hole", [None, math.nan, math.inf])
def test_numbers_that_are_none_are_counted_and_the_logged_p_is_still_drawn(tmp_path, hole):
    def spoil(record):
        if record["event"] == "gates":
            record["alpha"] = [hole, hole, *record["alpha"][2:]]
        return record

    run = rewrite(make_run(tmp_path), spoil)
    with pytest.raises(ValueError, match=f"2 of 110 candidates is not a number at step 50 of run .*{run.id}"):
        Learned.of(run)
    explorer = Explorer([run])
    explorer.choice.value = "Budget"
    assert "2 of 110 candidates is not a number" in explorer.view.says.value
    assert explorer.view.slider.disabled and explorer.view.frames["p"].p.tolist() == p_frame(run).p.tolist()
    explorer.choice.value = "Average"
    assert "2 of 110" in explorer.view.says.value and explorer.view.frames == {}


def test_a_line_in_the_middle_that_is_no_json_is_named(tmp_path):
    run = make_run(tmp_path)
    lines = (run.folder / "log.jsonl").read_text().splitlines()
    (run.folder / "log.jsonl").write_text("\n".join([*lines[:3], "{", *lines[3:], ""]))
    explorer = Explorer([run])
    explorer.choice.value = "Budget"
    assert "log.jsonl, line 4 is not JSON" in explorer.view.says.value
    assert list(explorer.view.frames) == ["trained"]


def test_runs_without_a_log_still_compare_and_sweep(tmp_path):
    runs = [make_run(tmp_path, seed=seed) for seed in range(2)]
    for run in runs:
        (run.folder / "log.jsonl").unlink()
    explorer = Explorer(runs)
    explorer.choice.value = "Compare"
    assert set(explorer.view.frames) == {"jaccard", "places"} and explorer.view.says.value == ""
    explorer.choice.value = "Average"
    assert told(explorer.view) == (" ".join(f"Run demo/{run.id} has no log.jsonl." for run in runs)
                                   + " There is no average to show.")
    explorer.choice.value = "Sweep"
    assert set(explorer.view.frames) == {"sweep of test"}


@pytest.mark.parametrize("there", [True, False])
def test_no_run_at_all(tmp_path, there):
    root = tmp_path / "reports"
    if there:
        root.mkdir()
    explorer = Explorer(root)
    assert explorer.count.value == "0 of 0 runs" and explorer.view.frames["runs"].empty
    for name, nothing in (LOST | {"Budget": "There is no run to show."}).items():
        explorer.choice.value = name
        assert told(explorer.view) == nothing and explorer.view.figures == {}


@pytest.mark.parametrize("hole", ['"test": NaN', '"test": null', '"other": 1'])
def test_a_result_with_a_hole_is_said_in_both_views_and_the_rest_is_shown(tmp_path, hole):
    whole, run = make_run(tmp_path, seed=1), make_run(tmp_path)
    text, score = json.dumps(run.result), f'"test": {run.result["rows"][1]["test"]}'
    assert text.count(score) == 1
    (run.folder / "result.json").write_text(text.replace(score, hole))
    explorer = Explorer([run, whole])
    for name in "Budget", "Sweep":
        explorer.choice.value = name
        assert f"Run demo/{run.id} has no test score of random-1." in told(explorer.view)
    assert set(explorer.views["Budget"].figures) == {"p", "trained"}
    assert explorer.view.frames["sweep of test"].set_index("label").seeds["searched"] == 2


def test_a_result_whose_rows_have_no_labels_is_left_out(tmp_path):
    whole, run = make_run(tmp_path, seed=1), make_run(tmp_path)
    run.save_result({**run.result, "rows": [{"test": 0.5, "n_params": 8}]})
    explorer = Explorer([run, whole])
    explorer.choice.value = "Budget"
    said = f"run demo/{run.id} has rows without a label"
    assert said in told(explorer.view) and list(explorer.view.figures) == ["p"]
    explorer.choice.value = "Sweep"
    assert told(explorer.view) == said
    assert set(explorer.view.frames["sweep of test"].seeds) == {1}


def test_a_run_that_trained_nothing_says_so_once(tmp_path):
    run = make_run(tmp_path)
    run.save_result({**run.result, "rows": []})
    with pytest.raises(ValueError, match=f"run demo/{run.id} has trained no structure"):
        trained_frame(run)
    explorer = Explorer([run])
    explorer.choice.value = "Budget"
    assert told(explorer.view).count(run.id) == 1 and list(explorer.view.frames) == ["p"]


# --- the table

def test_run_frame_says_what_was_asked_and_found(root, run):
    frame = run_frame([run])
    row, structure = frame.iloc[0], run.structure
    assert (row.study, row.run, row.task, row.method) == ("demo", run.id, "agreement", "s3pet")
    assert (row.budget, row.seed, row.modules) == (4542, run.params["seed"], len(structure["modules"]))
    assert row.n_params == sum(module["n"] for module in structure["modules"])
    assert row.searched == pytest.approx(0.82) and row.random == pytest.approx(0.82 - 0.018 * 2)
    assert row.state == "done" and row.missing == ""
    assert run_frame([]).empty


def test_state_of_a_run_that_failed_or_goes_on(tmp_path):
    runs = [Run.create(tmp_path, "s", {"seed": seed}, "") for seed in range(2)]
    write_json(runs[1].folder / "error.json", {"error": "x"})
    frame = run_frame(runs)
    assert frame.state.tolist() == ["not finished", "failed"]
    assert frame.budget.isna().all() and frame.searched.isna().all() and frame.task.tolist() == ["", ""]


def test_sort_and_filter(root):
    frame = run_frame(run_folders(root))
    down = picked(frame, by="budget", ascending=False)
    assert down.budget.tolist() == sorted(frame.budget, reverse=True)
    assert picked(frame, "WIDE").study.tolist() == ["wide"]
    assert picked(frame, "demo seed=1").seed.tolist() == [1]
    assert picked(frame, "demo wide").empty and len(picked(frame)) == len(frame)
    assert len(picked(frame, "4,542")) == len(picked(frame, "budget=4,542")) == len(picked(frame, "4542")) == 3
    with pytest.raises(UnknownName, match="unknown column 'sed'; did you mean 'seed'"):
        picked(frame, "demo sed=1")
    lost = frame.assign(searched=[math.nan, 0.1, 0.3, 0.2, math.nan])
    assert picked(lost, by="searched").index.tolist()[:3] == [1, 3, 2]


def test_labels_are_what_runs_differ_in(root):
    demo, wide = run_folders(root, "demo"), run_folders(root, "wide")
    assert sorted(run_labels(demo)) == ["seed 0", "seed 1", "seed 2"]
    labels = run_labels([*demo, *wide])
    assert len(set(labels)) == 4 and "wide · budget 9000 · seed 0" in labels
    assert run_labels(wide * 2) == [f"agreement {wide[0].id} ({k})" for k in (1, 2)]
    assert run_labels(wide, run_frame(wide)) == run_labels(wide) == ["agreement"]


def test_a_report_is_linked_relative_to_the_notebook(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "my reports", "a study", {"task": "x"}, "")
    frame = run_frame([run])
    (tmp_path / "nbs" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "nbs" / "here")
    assert "<a " not in runs_table(frame, [run])
    (run.folder / "report.html").write_text("page")
    link = re.search('href="([^"]*)"', runs_table(frame, [run]))[1]
    assert link == f"../../my%20reports/a%20study/{run.id}/report.html"


def test_where_reports_are_and_what_they_need_stands_above_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "reports")
    assert Explorer().view.says.value == "" == reports_note([run])
    (run.folder / "report.html").write_text("page")
    shown = Explorer().view.says.value
    assert shown.startswith("Reports are reports/STUDY/RUN/report.html. In JupyterLab") and "Trust HTML" in shown


def test_names_are_text_and_never_markup(tmp_path):
    runs = [make_run(tmp_path, seed=seed, task=f"{ATTACK}{seed}") for seed in range(2)]
    explorer = Explorer(runs)
    shown = explorer.view.table.outputs[0]["data"]["text/html"]
    assert "<img" not in shown and "&lt;img src=x" in shown
    for name in "Budget", "Compare", "Average", "Sweep":
        explorer.choice.value = name
        view = explorer.view
        assert "<img" not in view.says.value + view.files.value
        assert view.figures and not any("<img" in figure.to_json() or "\\u003cimg" in figure.to_json()
                                        for figure in view.figures.values())


def test_the_csv_of_a_frame_is_in_its_link():
    frame = pd.DataFrame({"task": [ATTACK, "ä, b"], "score": [0.5, None]})
    link = csv_link(frame, f"runs {ATTACK}/é\"")
    assert "<img" not in link and link.count('"') == 4
    data = re.search('href="data:text/csv;charset=utf-8;base64,([^"]*)"', link)[1]
    pd.testing.assert_frame_equal(pd.read_csv(io.BytesIO(base64.b64decode(data))), frame)
    assert re.search('download="([^"]*)"', csv_link(frame, "mean p"))[1] == "mean-p.csv"


def test_the_csv_of_a_matrix_has_its_names(root):
    runs = run_folders(root, "demo")
    explorer = Explorer(runs)
    explorer.choice.value = "Compare"
    data = re.search("base64,([^\"]*)\"", explorer.view.files.value)[1]
    assert set(pd.read_csv(io.BytesIO(base64.b64decode(data)), index_col=0).index) == set(run_labels(runs))


# --- one search under any budget

def test_under_its_own_budget_a_search_is_what_it_logged(run):
    found = Learned.of(run)
    frame = found.under(found.budget)
    assert found.budget == 4542
    assert frame.p.tolist() == pytest.approx(p_frame(run).p.tolist(), abs=1e-8)
    assert frame.selected.tolist() == p_frame(run).selected.tolist()


@pytest.mark.parametrize("B", [400, 9_000, 40_000, 87_168])
def test_p_and_the_set_under_another_budget(run, B):
    found, space = Learned.of(run), candidates({"encoder": 6})
    frame = found.under(B)
    if B < 87_168:
        p = shifted(p_frame(run).alpha.tolist(), [entry["n"] for entry in space], B)[1]
        assert frame.p.tolist() == pytest.approx(p, abs=1e-8)
        assert frame.p @ frame.n == pytest.approx(B)
    assert frame.n[frame.selected].sum() <= B
    assert frame.selected.tolist() == select(torch.tensor(frame.p), torch.tensor(frame.n), B).tolist()
    figure = plot_under(frame)
    assert f"Budget of {B:,} parameters: {frame.selected.sum()} modules" in figure.layout.title.text
    assert sum(value is not None for row in figure.data[0].z for value in row) == 110


@pytest.mark.parametrize("gate, reason", [
    (ShiftedSigmoid(tau=0.5), "not what its gate gives under its budget of 4,542"),
    (None, "does not say its gate at step 50")])
def test_a_gate_that_is_not_known_or_does_not_give_the_logged_p_is_refused(tmp_path, gate, reason):
    run = rewrite(make_run(tmp_path), lambda record: record | {"gate": gate and gate_record(gate)})
    with pytest.raises(ValueError, match=reason):
        Learned.of(run)
    explorer = Explorer([run])
    explorer.choice.value = "Budget"
    assert explorer.view.slider.disabled and reason in explorer.view.says.value
    assert explorer.view.frames["p"].p.tolist() == p_frame(run).p.tolist()


def test_a_structure_of_other_alphas_is_said(run, tmp_path):
    assert Learned.of(run).note == ""
    other = make_run(tmp_path)
    structure = other.structure
    write_json(other.folder / "structure.json", structure | {"modules": structure["modules"][1:]})
    said = "is another set than p at step 50 selects"
    assert said in Learned.of(other).note
    explorer = Explorer([other])
    explorer.choice.value = "Budget"
    assert said in told(explorer.view) and set(explorer.view.frames) == {"p", "trained"}
    (other.folder / "structure.json").unlink()
    assert Learned.of(other).note == ""


def test_gates_whose_p_follows_no_budget_are_not_said_to():
    gate = HardConcrete()
    alpha = torch.tensor([0.5, -0.2, 1.0], dtype=torch.float64)
    found = learned(torch.sigmoid(alpha).tolist(), [4, 10, 3], 9, gate=gate)
    low, high = found.under(4), found.under(14)
    assert low.p.tolist() == high.p.tolist() == pytest.approx(gate.p(alpha).tolist())
    assert plot_under(low).layout.title.text == "Budget of 4 parameters: 1 modules selected, p at step 7"


def test_a_log_is_read_once_for_what_it_learned(run, monkeypatch):
    read = []
    monkeypatch.setattr(Run, "records", lambda run, records=Run.records: read.append(run) or records(run))
    Learned.of(run)
    assert read == [run]


@pytest.mark.parametrize("seed", range(3))
def test_the_margin_is_where_greedy_selection_changes(seed):
    "Against a walk through every budget, one parameter at a time."
    draw = np.random.default_rng(seed)
    n = draw.integers(1, 12, size=9) * 2
    found = learned(draw.uniform(0.05, 0.95, size=9).round(3).tolist(), n, 30)
    low, whole = min(n), sum(n)
    sets = {B: found.under(B).selected.to_numpy() for B in range(low, whole + 1)}
    for B in range(low, whole + 1):
        edge = margin(found.under(B))
        mine = sets[B]
        after = next((C for C in range(B, whole + 1) if (sets[C] & ~mine).any()), None)
        if after is None:
            assert "next in" not in edge.index
        else:
            new = found.frame.name[sets[after] & ~mine]
            assert edge.loc["next in", ["name", "budget"]].tolist() == [new.iloc[0], after]
        last = edge.loc["last in"]
        assert last.budget == n[mine].sum() and (sets[max(last.budget, low)] == mine).all()
        assert last.p == found.under(B).p[mine].min()
        if last.budget > low:
            assert not sets[last.budget - 1][found.frame.name == last["name"]].any()


def test_the_text_says_size_margin_and_what_has_to_go():
    found = learned([0.9, 0.6, 0.5, 0.4], [4, 10, 3, 2], 9)
    assert margin(found.under(9))["name"].tolist() == ["encoder.0.q3.lora", "encoder.0.q1.lora"]
    text = margin_text(found, 9)
    assert text == ("3 modules with 9 parameters under a budget of 9. "
                    f"Last in: encoder.0.q3.lora, 2 parameters, p = {found.under(9).p[3]:.3f}; this set needs 9. "
                    f"Next in: encoder.0.q1.lora, 10 parameters, p = {found.under(9).p[1]:.3f}, at a budget of "
                    "14, in the place of encoder.0.q2.lora, encoder.0.q3.lora.")
    assert "Next in" not in margin_text(found, 19)
    exact = learned([0.9, 0.6, 0.5, 0.4], [4, 10, 3, 2], 9, method="exact")
    assert "none is the last" in margin_text(exact, 9)


def test_trained_structures_stand_at_their_sizes_beside_the_budget(run):
    frame = trained_frame(run)
    assert frame.budget.tolist() == [4542] * 5 and frame.n_params.tolist()[-1] == 41_472
    figure = plot_trained(run, 9_000)
    assert figure.layout.shapes[0].x0 == 9_000 == figure.layout.shapes[0].x1
    assert figure.data[0].name == "searched" and figure.data[0].y[0] == pytest.approx(0.82)


def test_the_slider_changes_the_data_of_the_figures_that_are_there(root):
    explorer = Explorer(root, "demo")
    explorer.choice.value = "Budget"
    view = explorer.view
    z, drawn = view.figures["p"].data[0].z, view.live.figures
    assert view.frames["p"].attrs["budget"] == 4542
    view.slider.value = 20_000
    heat, sizes = view.figures["p"], view.figures["trained"]
    assert len(view.live.figures) == len(drawn) == 2 and view.live.figures[0] != drawn[0]
    assert view.live.figures[0]["layout"]["title"]["text"] == heat.layout.title.text
    frame = Learned.of(view.run.value).under(20_000)
    cells = sorted(value for row in heat.data[0].z for value in row if value is not None)
    assert cells == pytest.approx(sorted(frame.p)) and heat.data[0].z != z
    assert "20,000" in heat.layout.title.text and sizes.layout.shapes[0].x0 == 20_000
    assert "under a budget of 20,000" in view.says.value
    names = re.findall('download="([^"]*)"', view.files.value)
    assert names == [f"p-{view.run.value.id}-20000.csv", f"trained-{view.run.value.id}.csv"]
    outlined = [trace for trace in heat.data if trace.name == "selected"][0]
    assert len(outlined.x) == 6 * frame.selected.sum()


def test_another_run_is_another_figure_with_its_own_limits(root):
    explorer = Explorer(run_folders(root, "demo") + run_folders(root, "prune"))
    explorer.choice.value = "Budget"
    view = explorer.view
    before = view.figures["p"]
    view.run.value = view.run.options[1][1]
    assert view.figures["p"] is not before and round(view.slider.value) == 4542
    assert (10 ** view.slider.min, 10 ** view.slider.max) == pytest.approx((384, 87_168))
    view.run.value = view.run.options[3][1]
    assert view.slider.disabled and told(view) == (
        f"Run prune/{view.run.value.id} was pruned; there are no gates.")
    view.run.value = view.run.options[0][1]
    assert not view.slider.disabled and set(view.frames) == {"p", "trained"}


def test_a_probe_has_no_gates_and_a_share_that_it_kept(root, tmp_path):
    make_probed(tmp_path)
    explorer = Explorer(tmp_path)
    explorer.choice.value = "Budget"
    view = explorer.view
    assert view.slider.disabled and told(view) == f"Run probe/{view.run.value.id} was probed; there are no gates."
    explorer.choice.value = "Average"
    assert list(explorer.view.frames) == ["mean share"]
    explorer = Explorer(run_folders(tmp_path) + run_folders(root, "demo"))
    explorer.choice.value = "Average"
    assert set(explorer.view.frames) == {"mean p", "mean share"}


# --- structures side by side

def structure(kept):
    modules = [{"stack": "encoder", "layer": layer, "role": role, "module": "bitfit", "settings": {}, "n": 8,
                "of": 8, "p": None, "score": None, "path": f"{layer}.{role}"} for layer, role in kept]
    return {"schema": 4, "backbone": "b", "family": "bert", "n_backbone": 1000, "shape": {"encoder": [2, 8]},
            "space": "bias", "rules": [], "masks": None, "task": "t",
            "budget": 20, "method": "s3pet", "seed": 0, "version": "0", "modules": modules}


@pytest.fixture
def three(tmp_path):
    kept = {"a": [(0, "q"), (1, "q"), (None, "embed_norm")], "b": [(1, "q"), (0, "q")],
            "c": [(1, "v"), (1, "q"), (None, "final_norm")]}
    found = {}
    for name, places in kept.items():
        write_json(tmp_path / f"{name}.json", structure(places))
        found[name] = Structure.load(tmp_path / f"{name}.json")
    return found


def test_jaccard_of_every_pair(three):
    frame = jaccard_frame(three)
    assert list(frame.index) == list(frame.columns) == ["a", "b", "c"]
    assert frame.to_numpy().ravel() == pytest.approx([1, 2 / 3, 1 / 5, 2 / 3, 1, 1 / 4, 1 / 5, 1 / 4, 1])
    heatmap = plot_jaccard(frame).data[0]
    assert (np.asarray(heatmap.z) == frame.to_numpy()).all() and (heatmap.zmin, heatmap.zmax) == (0, 1)


def test_places_say_who_keeps_what_in_the_order_of_the_model(three):
    frame = places_frame(three)
    assert frame["name"].tolist() == [f"encoder.{place}.bitfit" for place in
                                      ("embed_norm", "0.q", "1.q", "1.v", "final_norm")]
    assert frame.kept_by.tolist() == [1, 2, 3, 1, 1]
    shares = [[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 1], [0, 0, 1]]
    assert frame[["a", "b", "c"]].to_numpy().tolist() == shares
    figure = plot_places(frame)
    z, text = np.asarray(figure.data[0].z, dtype=float), figure.data[0].text
    assert (np.isnan(z) == (frame[["a", "b", "c"]].to_numpy() == 0)).all() and z[2].tolist() == [3, 3, 3]
    assert list(text[1]) == ["●", "●", ""] and "1 of them in all" in figure.layout.title.text


def test_runs_of_the_view_can_be_chosen(root):
    explorer = Explorer(root, "demo")
    explorer.choice.value = "Compare"
    view = explorer.view
    assert list(view.frames["jaccard"].columns) == ["seed 0", "seed 1", "seed 2"]
    view.runs.value = view.runs.value[:2]
    assert view.frames["jaccard"].shape == (2, 2)
    assert list(view.figures["jaccard"].layout.xaxis.ticktext) == list(view.frames["jaccard"].columns)


# --- averages

def test_averages_are_those_of_the_papers_figures(root):
    explorer = Explorer(root)
    explorer.filter.value = "budget=4542"
    explorer.choice.value = "Average"
    view = explorer.view
    runs = list(view.runs.value)
    assert len(runs) == 3
    expected = mean_p_frame(runs)
    pd.testing.assert_frame_equal(view.frames["mean p"], expected)
    assert view.frames["mean p"].p.tolist() == np.mean([p_frame(run).p for run in runs], axis=0).tolist()
    explorer.filter.value = "prune"
    pd.testing.assert_frame_equal(explorer.view.frames["mean share"], share_frame(run_folders(root, "prune")))


def test_p_of_different_budgets_is_not_averaged(root):
    explorer = Explorer(root)
    explorer.choice.value = "Average"
    assert told(explorer.view) == "p has different budgets: 4,542, 9,000; choose runs of one"
    assert list(explorer.view.frames) == ["mean share"]


def test_p_of_different_tasks_is_averaged_and_each_log_is_read_once(tmp_path, monkeypatch):
    runs = [make_run(tmp_path, seed=seed, task=task) for seed, task in enumerate(("rte", "cola"))]
    read = []
    monkeypatch.setattr(Run, "records", lambda run, records=Run.records: read.append(run) or records(run))
    explorer = Explorer(runs)
    explorer.choice.value = "Average"
    assert read == runs or read == runs[::-1]
    assert "over 2 runs" in explorer.view.figures["mean p"].layout.title.text and told(explorer.view) == ""


def test_runs_of_different_spaces_have_no_mean(tmp_path):
    runs = [make_run(tmp_path), make_run(tmp_path, {"encoder": 2}, seed=1)]
    explorer = Explorer(runs)
    explorer.choice.value = "Average"
    assert "a mean needs runs of one space" in explorer.view.says.value and explorer.view.frames == {}


# --- sweeps

def finished(root, task, seed, budget, scores, **params):
    run = Run.create(root, "sweep", {"task": task, "seed": seed, "budget": budget, **params}, "")
    sizes = {"lora-r1": 96, "finetune": 10_000}
    rows = [{"label": label, "n_params": sizes.get(label, budget - 1), "test": score, "validation": 0.5}
            for label, score in scores.items()]
    run.save_result({"task": task, "metric": "f1", "budget": budget, "n_backbone": 10_000, "rows": rows})
    return run


def test_a_sweep_is_the_mean_over_seeds_with_students_interval(tmp_path):
    searched = {(50, 0): 0.6, (50, 1): 0.7, (50, 2): 0.65, (80, 0): 0.8, (80, 1): 0.9, (80, 2): 0.7}
    runs = [finished(tmp_path, "rte", seed, budget, {"searched": score, "random-1": score - 0.2,
                                                     "random-2": score - 0.1, "lora-r1": 0.9 + seed / 100,
                                                     "lora-r1-cut": 0.4, "finetune": 0.95})
            for (budget, seed), score in searched.items()]
    frame = sweep_frame(runs).set_index(["label", "budget"])
    assert (frame.seeds == 3).all() and len(frame) == 2 + 2 + 1 + 2 + 1 and (frame.metric == "f1").all()
    row = frame.loc["searched", 50]
    half = t.ppf(0.975, 2) * np.std([0.6, 0.7, 0.65], ddof=1) / math.sqrt(3)
    assert (row["mean"], row.low, row.high) == pytest.approx((0.65, 0.65 - half, 0.65 + half))
    assert frame.loc[("random", 80), "mean"] == pytest.approx(0.65)
    assert frame.loc[("lora-r1", 96), "mean"] == pytest.approx(0.91)
    figure = plot_sweep(frame.reset_index())
    drawn = {trace.name: trace for trace in figure.data}
    assert [budget for budget, _ in drawn["searched"].customdata] == [50, 80]
    assert list(drawn["searched"].x) == pytest.approx([50, 80], rel=0.1) and figure.layout.xaxis.type == "log"
    bars = drawn["searched"].error_y
    assert bars.array[0] == pytest.approx(100 * half) and bars.arrayminus[0] == pytest.approx(100 * half)
    assert list(drawn["finetune"].x) == [50, 96] and list(drawn["finetune"].y) == pytest.approx([95, 95])
    assert figure.layout.annotations[0].text == "rte, f1" and figure.layout.yaxis.title.text == "test score"


def test_a_seed_counts_once_and_one_seed_has_no_interval(tmp_path):
    runs = [finished(tmp_path, "rte", 0, 50, {"lora-r1": 0.6}),
            finished(tmp_path, "rte", 0, 80, {"lora-r1": 0.8})]
    row = sweep_frame(runs).iloc[0]
    assert (row.seeds, row["mean"]) == (1, pytest.approx(0.7))
    assert math.isnan(row.low) and math.isnan(row.high)
    assert len(plot_sweep(sweep_frame(runs)).data) == 1


def test_runs_that_differ_otherwise_are_kept_apart_and_tasks_have_panels(tmp_path):
    runs = [finished(tmp_path, task, 0, 50, {"searched": 0.5}, order=order)
            for task in ("rte", "cola") for order in ("first", "second")]
    frame = sweep_frame(runs)
    assert frame[["task", "setting"]].to_numpy().tolist() == [
        ["cola", "order first"], ["cola", "order second"], ["rte", "order first"], ["rte", "order second"]]
    figure = plot_sweep(frame)
    assert {trace.xaxis for trace in figure.data} == {"x", "x2"}
    assert [trace.name for trace in figure.data if trace.showlegend] == ["searched, order first",
                                                                         "searched, order second"]


def test_only_what_runs_of_one_task_differ_in_keeps_them_apart(tmp_path):
    asked = [("rte", {"steps": 100}), ("rte", {"steps": 100, "order": "first"}), ("cola", {"steps": 200})]
    runs = [finished(tmp_path, task, 0, 50, {"searched": 0.5}, **params) for task, params in asked]
    frame = sweep_frame(runs)
    assert frame[["task", "setting"]].to_numpy().tolist() == [
        ["cola", "no order"], ["rte", "no order"], ["rte", "order first"]]
    assert sweep_frame(runs[1:]).setting.tolist() == ["", ""]


def test_a_run_without_a_result_parts_no_others(tmp_path):
    runs = [finished(tmp_path, "rte", seed, 50, {"searched": 0.5}) for seed in range(2)]
    going = Run.create(tmp_path, "sweep", {"task": "rte", "seed": 2, "budget": 50, "order": "first"}, "")
    assert sweep_frame([*runs, going]).seeds.tolist() == [2] and sweep_frame([going]).empty


def test_a_score_that_is_none_is_left_out_and_said(tmp_path):
    runs = [finished(tmp_path, "rte", 0, 50, {"searched": 0.6}),
            finished(tmp_path, "rte", 1, 50, {"searched": math.nan})]
    assert sweep_frame(runs).seeds.tolist() == [1]
    explorer = Explorer(runs)
    explorer.choice.value = "Sweep"
    assert explorer.view.says.value == f"Run sweep/{runs[1].id} has no test score of searched."
    explorer.view.controls["split"].value = "validation"
    assert explorer.view.frames["sweep of validation"]["mean"].tolist() == [0.5]


# --- the explorer

def test_sorting_and_filtering_in_the_cell(root):
    explorer = Explorer(root)
    view = explorer.view
    view.by.value, view.way.value = "budget", False
    assert view.frames["runs"].budget.is_monotonic_decreasing
    explorer.filter.value = "wide"
    assert explorer.count.value == "1 of 5 runs" and view.frames["runs"].study.tolist() == ["wide"]
    assert ">wide</td>" in view.table.outputs[0]["data"]["text/html"]


def test_a_view_stays_as_it_was_left_until_the_runs_change(root):
    explorer = Explorer(root, "demo")
    explorer.choice.value = "Budget"
    explorer.view.slider.value = 10_000
    explorer.choice.value = "Compare"
    explorer.choice.value = "Budget"
    assert explorer.view.budget == 10_000
    explorer.filter.value = "seed=2"
    assert explorer.view.budget == 4542 and explorer.view.run.value.params["seed"] == 2


def test_another_form_of_images_leaves_all_else_as_it_was_set(root):
    explorer = Explorer(root, "demo")
    explorer.choice.value = "Budget"
    view = explorer.view
    view.run.value = view.run.options[1][1]
    view.slider.value = 12_000
    explorer.choice.value = "Compare"
    explorer.view.runs.index = (0, 2)
    explorer.form.value = "svg"
    assert explorer.view.runs.index == (0, 2)
    explorer.choice.value = "Budget"
    assert explorer.view is view and view.run.index == 1 and view.budget == 12_000
    assert view.frames["p"].attrs["budget"] == 12_000
    assert view.live.figures[0]["config"]["toImageButtonOptions"]["format"] == "svg"
    explorer.choice.value = "Runs"
    explorer.view.by.value = "seed"
    explorer.form.value = "png"
    assert explorer.view.by.value == "seed"


def test_a_misspelt_column_is_said_beside_the_filter(root):
    explorer = Explorer(root)
    explorer.filter.value = "sed=1"
    assert explorer.count.value.startswith("0 of 5 runs; unknown column 'sed'; did you mean 'seed'")
    explorer.filter.value = "seed=1"
    assert explorer.count.value == "1 of 5 runs" and explorer.view.frames["runs"].seed.tolist() == [1]


def test_images_are_saved_in_the_form_that_is_chosen(root):
    explorer = Explorer(root, "demo")
    explorer.choice.value = "Budget"
    config = explorer.view.live.figures[0]["config"]
    name = f"p-{explorer.view.run.value.id}-4542"
    assert config["toImageButtonOptions"] == {"format": "png", "filename": name, "scale": 2}
    explorer.form.value = "svg"
    assert explorer.view.live.figures[0]["config"]["toImageButtonOptions"]["format"] == "svg"


def test_looking_again_finds_new_runs(tmp_path):
    make_run(tmp_path)
    explorer = Explorer(tmp_path)
    explorer.choice.value = "Budget"
    old = explorer.view.live
    assert old.comm is not None
    make_run(tmp_path, seed=1)
    explorer.again.click()
    assert explorer.count.value == "2 of 2 runs"
    assert old.comm is None and explorer.view.live.comm is not None


def test_controls_have_names_and_figures_the_ground_of_the_page(root):
    explorer = Explorer(root, "demo")
    assert "s3pet-lab" in explorer._dom_classes
    for name in explorer.choice.options:
        explorer.choice.value = name
        controls = explorer.view.children[0].children
        assert all(control.description for control in controls)
        for figure in explorer.view.figures.values():
            assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"


def test_published_runs_open_without_their_logs(tmp_path):
    explorer = Explorer(Path(__file__).parents[2] / "reports", "agreement")
    assert set(explorer.frame.missing) == {"no log.jsonl"}
    explorer.choice.value = "Sweep"
    frame = explorer.view.frames["sweep of test"].set_index("label")
    assert frame.seeds.tolist() == [5, 5, 5] and frame.budget["searched"] == 4542
    scores = [run.result["rows"][0]["test"] for run in explorer.runs]
    assert frame["mean"]["searched"] == pytest.approx(np.mean(scores))
