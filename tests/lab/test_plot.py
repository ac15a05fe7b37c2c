"""Every number of every figure, on the frames; and the shape of the figures."""

import json
import math
import shutil

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from synthetic import RETRAININGS, candidates, make_probed, make_pruned, make_run

from s3pet_nb.core import table
from s3pet_nb.lab.plot import (budget_frame, comparison_frame, draw_differences, draw_mean_p, draw_sweep,
                               draw_probe, draw_transfer, loss_frame, mean_p_frame, mixed_frame, p_frame, p_grid,
                               phase_lines, plot_budget, plot_budgets, plot_comparison, plot_loss,
                               plot_mean_p, plot_mixed, plot_p, plot_probe, plot_score, plot_share, plot_sizes,
                               probe_frame, row_lines, score_frame, share_frame, structure_frame)
from s3pet_nb.lab.store import Run, write_json
from s3pet_nb.model.backbone import tiny
from s3pet_nb.model.space import make_space
from s3pet_nb.model.structure import Structure

FIGURES = [plot_p, plot_budget, plot_loss, plot_score, plot_comparison, plot_sizes]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("reports"))


@pytest.fixture(scope="module")
def two_stacks(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("reports"), {"encoder": 24, "decoder": 24}, budget=25_000)


def gates(run, step):
    return next(r for r in run.records() if r["event"] == "gates" and r["step"] == step)


def test_p_frame_holds_every_candidate_with_the_p_that_was_logged(run):
    frame = p_frame(run)
    assert len(frame) == 110 and frame.n.sum() == 87_168
    assert frame.attrs["step"] == run.result["search"]["best_step"] == 50
    assert frame.p.tolist() == gates(run, 50)["p"] and frame.alpha.tolist() == gates(run, 50)["alpha"]
    assert frame.p @ frame.n == pytest.approx(4542, abs=1e-6)
    chosen = {module["path"] for module in run.structure["modules"]}
    assert set(frame.name[frame.selected]) == chosen and 0 < len(chosen) < 110
    assert frame.layer.isna().sum() == 2


def test_p_frame_of_a_step_and_of_a_run_that_goes_on(run, tmp_path):
    assert p_frame(run, step=0).p.nunique() == 1
    with pytest.raises(ValueError, match="no gates were logged at step 7; choose one of 0, 10, 20"):
        p_frame(run, step=7)
    going = Run.create(tmp_path, "study", {}, "")
    for record in run.records()[:40]:
        going.log(record)
    frame = p_frame(going)
    assert frame.attrs["step"] == 30 and not frame.selected.any()
    assert isinstance(plot_p(going), go.Figure)


def test_heatmap_shows_each_p_in_its_cell_and_nothing_elsewhere(run):
    frame = p_frame(run)
    rows, columns, placed = p_grid(frame)
    assert columns == ["emb", "0", "1", "2", "3", "4", "5"]
    assert {"q · LoRA", "attn norm · LNFit", "embed norm · BitFit",
            "attn · low-rank Adapter"} <= set(rows)
    assert not placed.duplicated(["x", "y"]).any()
    heatmap = plot_p(run).data[0]
    assert len(heatmap.z) == len(rows) == 20
    for entry in placed.itertuples():
        assert (
            heatmap.z[entry.y][entry.x] == entry.p
            and f"<b>{entry.name}</b>" in heatmap.text[entry.y][entry.x]
        )
    assert sum(value is not None for row in heatmap.z for value in row) == 110


def test_heatmap_hover_says_name_n_p_alpha_and_whether_selected(run):
    frame = p_frame(run).set_index("name")
    text = [cell for row in plot_p(run).data[0].text for cell in row]
    name = frame.index[frame.selected][0]
    hover = next(cell for cell in text if f"<b>{name}</b>" in cell)
    assert hover.endswith("<br>selected") and f"n = {frame.n[name]:,}<" in hover
    assert f"p = {frame.p[name]:.4f}<" in hover and f"alpha = {frame.alpha[name]:.3f}<" in hover
    assert sum(cell.endswith("<br>selected") for cell in text) == frame.selected.sum()


def test_encoder_and_decoder_have_panels_of_their_own(two_stacks):
    figure = plot_p(two_stacks)
    heatmaps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(heatmaps) == 2 and heatmaps[0].yaxis != heatmaps[1].yaxis
    assert figure.layout.xaxis.ticktext[0] == "emb" and figure.layout.xaxis2.ticktext[-1] == "final"
    assert len(figure.layout.xaxis.ticktext) == len(figure.layout.xaxis2.ticktext) == 25
    assert sum(v is not None for h in heatmaps for row in h.z for v in row) == len(
        candidates({"encoder": 24, "decoder": 24})
    )
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    assert figure.layout.coloraxis.colorbar.title.text == "p"


def test_outlines_surround_the_selected_cells(two_stacks):
    frame = p_frame(two_stacks)
    outlines = [trace for trace in plot_p(two_stacks).data if trace.name == "selected"]
    for stack, trace in zip(("encoder", "decoder"), outlines, strict=True):
        _, _, placed = p_grid(frame[frame["stack"] == stack])
        centres = {
            (sum(trace.x[k : k + 4]) / 4, sum(trace.y[k : k + 4]) / 4) for k in range(0, len(trace.x), 6)
        }
        assert centres == set(
            zip(placed.x[placed.selected].astype(float), placed.y[placed.selected].astype(float))
        )


def log_space(run, n=(16, 64, 16), names=("q.lora(r=1)", "q.lora(r=4)", "q.bitfit"), p=(0.1, 0.8, 0.3)):
    "A space with LoRA of two ranks at one position, and one record of its gates."
    space = [{"name": f"encoder.0.{name}", "stack": "encoder", "layer": 0, "role": "q", "kind": "linear",
              "module": "bitfit" if "bitfit" in name else "lora", "n": size} for name, size in zip(names, n)]
    run.log({"event": "space", "candidates": space, "budget": 80})
    run.log({"event": "gates", "phase": "search", "step": 4, "alpha": [0.0] * len(space), "p": list(p)})
    return run


def keep(run, *settings):
    kept = [{"stack": "encoder", "layer": 0, "role": "q", "module": "lora", "settings": given, "n": 1, "p": 1}
            for given in settings]
    (run.folder / "structure.json").write_text(json.dumps({"modules": kept}))
    return run


def test_two_ranks_at_one_position_are_two_rows_and_two_choices(tmp_path):
    run = keep(log_space(Run.create(tmp_path, "study", {}, "")), {"r": 4})
    frame = p_frame(run)
    assert frame.name[frame.selected].tolist() == ["encoder.0.q.lora(r=4)"]
    rows, _, placed = p_grid(frame)
    assert rows == ["q · LoRA r=1", "q · LoRA r=4", "q · BitFit"]
    assert not placed.duplicated(["x", "y"]).any()
    assert [list(row) for row in plot_p(run).data[0].z] == [[0.1], [0.8], [0.3]]


def test_mean_p_over_runs_and_what_most_of_them_selected(tmp_path):
    runs = [log_space(Run.create(tmp_path, "study", {"seed": seed}, ""), p=p)
            for seed, p in enumerate([(0.1, 0.8, 0.3), (0.2, 0.6, 0.0), (0.6, 0.7, 0.3)])]
    keep(runs[0], {"r": 1}, {"r": 4})
    keep(runs[1], {"r": 4})
    frame = mean_p_frame(runs)
    assert frame.p.tolist() == pytest.approx([0.3, 0.7, 0.2])
    assert frame.low.tolist() == [0.1, 0.6, 0.0] and frame.high.tolist() == [0.6, 0.8, 0.3]
    assert frame.selected.tolist() == [False, True, False]
    assert frame.runs.tolist() == ["1 of 3 runs", "2 of 3 runs", "0 of 3 runs"]
    heatmap = plot_mean_p(runs).data[0]
    assert [list(row) for row in heatmap.z] == [[p] for p in frame.p]
    assert "mean p = 0.7000, from 0.6000 to 0.8000<br>selected in 2 of 3 runs" in heatmap.text[1][0]
    assert mean_p_frame(runs[:1]).p.tolist() == p_frame(runs[0]).p.tolist()


@pytest.mark.parametrize("space, sentence", [
    ({"n": (16, 32, 16)}, r"candidate 1 is encoder.0.q.lora\(r=4\) \(64\) in run .* and .* \(32\) in run"),
    ({"names": ("q.lora(r=1)", "q.bitfit")}, r"candidate 1 is encoder.0.q.lora\(r=4\)"),
    ({"names": ("q.lora(r=1)", "q.lora(r=4)"), "n": (16, 64)},
     "candidate 2 is encoder.0.q.bitfit .* missing"),
])
def test_a_mean_over_different_spaces_names_the_first_difference(tmp_path, space, sentence):
    one = log_space(Run.create(tmp_path, "study", {"seed": 0}, ""))
    p = (0.5,) * len(space.get("names", "123"))
    other = log_space(Run.create(tmp_path, "study", {"seed": 1}, ""), **space, p=p)
    with pytest.raises(ValueError, match=sentence):
        mean_p_frame([one, one, other])


def test_a_mean_over_different_budgets_is_refused_and_over_heads_of_different_sizes_is_not(tmp_path):
    runs = [make_run(tmp_path, budget=budget, seed=seed) for seed, budget in enumerate((4542, 4543, 9000))]
    assert mean_p_frame(runs[:2]).attrs["runs"] == 2
    with pytest.raises(ValueError, match="^p has different budgets: 4,542, 4,543, 9,000; choose runs of one$"):
        mean_p_frame(runs)


def test_a_mean_of_frames_is_that_of_their_runs(tmp_path):
    runs = [make_run(tmp_path, seed=seed) for seed in range(2)]
    frame = mean_p_frame([p_frame(run) for run in runs])
    pd.testing.assert_frame_equal(frame, mean_p_frame(runs))
    assert draw_mean_p(frame).to_json() == plot_mean_p(runs).to_json()


def test_p_under_another_budget_is_the_gates_and_what_it_selects(run):
    records = run.records()
    gate = {"kind": "ShiftedSigmoid", "tau": 1.0, "beta": 1.0, "scope": "global"}
    space, last = records[0], next(record for record in reversed(records) if record["event"] == "gates")
    same, wide = (p_frame([space, last | {"gate": gate}], B=B) for B in (4542, 9000))
    assert same.p.tolist() == pytest.approx(last["p"], abs=1e-6)
    assert wide.p @ wide.n == pytest.approx(9000, abs=1e-6) and wide.attrs["budget"] == 9000
    assert same.n[same.selected].sum() <= 4542 < wide.n[wide.selected].sum() <= 9000
    assert p_frame([space, last]).selected.equals(same.selected)
    with pytest.raises(ValueError, match="the log does not say its gate at step 60"):
        p_frame([space, last | {"gate": None}], B=9000)
    with pytest.raises(ValueError, match="an alpha that is not a number"):
        p_frame([space, last | {"gate": gate, "alpha": [None] * 110}], B=9000)


def test_what_a_structure_keeps_is_selected_whatever_p_says(run, tmp_path):
    pd.testing.assert_series_equal(p_frame(run, step=0).selected, p_frame(run).selected)
    copy = Run(shutil.copytree(run.folder, tmp_path / "copy"))
    write_json(copy.folder / "structure.json", run.structure | {"modules": []})
    assert not p_frame(copy, step=0).selected.any() and p_frame(run.records(), step=0).selected.any()
    with pytest.raises(ValueError, match="the log has logged no record 'gates'"):
        p_frame(run.records()[:1])


def test_a_log_is_read_once_for_its_frame(run, monkeypatch):
    read = []
    monkeypatch.setattr(Run, "records", lambda run, records=Run.records: read.append(run) or records(run))
    p_frame(run)
    assert read == [run]


LINK = "<a href=x>"


def test_names_in_figures_are_text_and_never_links(tmp_path):
    run = Run.create(tmp_path, "study", {}, "")
    entry = {"name": f"{LINK}0", "stack": f"{LINK}1", "layer": 0, "role": f"{LINK}2", "kind": "linear",
             "module": f"{LINK}3", "n": 16}
    run.log({"event": "space", "candidates": [entry, entry | {"name": f"{LINK}(r={LINK})"}], "budget": 16})
    run.log({"event": "gates", "phase": "search", "step": 1, "alpha": [0.0, 0.0], "p": [0.5, 0.5]})
    for phase in "search", f"{LINK}4":
        run.log({"event": "step", "phase": phase, "step": 1, "loss": 0.5, "loss_alpha": 0.5})
        run.log({"event": "score", "phase": phase, "step": 1, "score": 0.5})
    row = {"label": f"{LINK}5", "structure": f"{LINK}6", "n_params": 16, "test": 0.5, f"test/{LINK}7": 0.5,
           "validation": 0.5}
    kept = [{name: entry[name] for name in ("name", "stack", "layer", "role", "module")} | {"n": 4, "of": 16}]
    run.save_result({"metric": f"{LINK}8", "n_backbone": 100, "rows": [row], "kept": kept, "budget": 4})
    budgets = pd.DataFrame([{"budget": 16, "n_params": 16, "modules": 1, "gap": 0.0, "dropped": [f"{LINK}9"]}])
    figures = {draw.__name__: draw(run) for draw in (plot_p, plot_share, plot_loss, plot_score, plot_comparison,
                                                     plot_sizes)}
    figures |= {"mean p": plot_mean_p([run, run]), "mean share": plot_share([run, run]),
                "budgets": plot_budgets(budgets)}
    for name, figure in figures.items():
        shown = json.dumps(figure.to_plotly_json(), default=str)
        assert "<a " not in shown and "&lt;a href=x&gt;" in shown, name


def test_a_mean_over_no_run_is_refused():
    with pytest.raises(ValueError, match="give at least one"):
        mean_p_frame([])


def log_steps(run, n_steps, every=0, order="first"):
    for step in range(1, n_steps + 1):
        measured = {"mixed": 0.08 / step} if every and step % every == 1 else {}
        run.log({"event": "step", "phase": "search", "step": step, "loss": 0.5, "loss_alpha": 0.6,
                 "zeta": 1.0, "expected_size": 79.0, "budget": 80, "order": order} | measured)
    return run


def test_mixed_frame_has_the_steps_that_were_measured_and_no_others(tmp_path):
    run = log_steps(Run.create(tmp_path, "study", {}, ""), 10, every=4)
    run.log({"event": "step", "phase": "searched", "step": 3, "loss": 0.5})
    frame = mixed_frame(run)
    assert frame.to_dict("list") == {
        "step": [1, 5, 9], "mixed": [0.08, 0.08 / 5, 0.08 / 9], "order": ["first"] * 3}
    figure = plot_mixed(run)
    assert figure.layout.yaxis.type == "log" and list(figure.data[0].y) == frame.mixed.tolist()
    assert [line.y0 for line in figure.layout.shapes] == [0.01]


def test_a_search_that_measured_nothing_says_so(tmp_path):
    run = log_steps(Run.create(tmp_path, "study", {}, ""), 3)
    with pytest.raises(ValueError, match="never measured the second-order term; search with measure_every"):
        plot_mixed(run)


def test_an_early_stop_is_marked_where_it_happened(tmp_path, run):
    assert not plot_budget(run).layout.shapes
    stopped = log_steps(Run.create(tmp_path, "study", {}, ""), 30)
    stopped.log({"event": "early_stop", "phase": "search", "step": 30, "steps": 40, "jaccard": [1.0],
                 "saved": 0.25})
    figure = plot_budget(stopped)
    assert [(line.x0, line.x1) for line in figure.layout.shapes] == [(30, 30)]
    assert figure.layout.annotations[0].text == "stopped early at step 30, 25% of the steps saved"


SWEPT = pd.DataFrame({
    "budget": [100, 300, 1000], "modules": [3, 6, 5], "n_params": [96, 288, 992], "sum_p": [2.4, 4.1, 4.4],
    "sum_p_exact": [2.4, 4.2, 4.4], "gap": [0.0, 0.024, 0.0], "dropped": [[], [], list("abcdefghij")]})


def test_budgets_whose_set_lacks_a_module_of_the_smaller_one_are_ringed():
    figure = plot_budgets(SWEPT)
    traces = {trace.name: trace for trace in figure.data}
    assert list(traces["parameters used"].y) == [96, 288, 992]
    modules = traces["modules (right axis)"]
    assert list(modules.y) == [3, 6, 5] and modules.yaxis == "y2"
    assert (list(traces["not nested"].x), list(traces["not nested"].y)) == ([1000], [992])
    hover = traces["parameters used"].text
    assert "keeps all" in hover[0] and "greedy misses 2.40%" in hover[1]
    assert hover[2].endswith("drops a<br>b<br>c<br>d<br>e<br>f<br>g<br>h<br>and 2 more")


def test_budget_frame(run):
    frame = budget_frame(run)
    assert frame.step.tolist() == list(range(1, 61)) and set(frame.budget) == {4542}
    logged = [r["zeta"] for r in run.records() if r["event"] == "step" and r["phase"] == "search"]
    assert frame.zeta.tolist() == logged
    figure = plot_budget(run)
    assert [trace.yaxis for trace in figure.data] == ["y", "y", "y2"]
    assert (
        figure.layout.xaxis.title.text == "step" and figure.layout.yaxis.title.text == "trainable parameters"
    )


def test_loss_frame_has_both_halves_of_the_search_and_every_retraining(run):
    frame = loss_frame(run)
    assert frame.groupby("curve", sort=False).size().to_dict() == {
        "search, weights' half": 60,
        "search, gates' half": 60,
        **dict.fromkeys(RETRAININGS, 120),
    }
    logged = [r for r in run.records() if r["event"] == "step"]
    assert frame.loss[frame.curve == "search, gates' half"].tolist() == [
        r["loss_alpha"] for r in logged if r["phase"] == "search"
    ]
    assert frame.loss[frame.curve == "random-2"].tolist() == [
        r["loss"] for r in logged if r["phase"] == "random-2"
    ]


def test_loss_figure_labels_its_running_mean_and_draws_every_step_too(run):
    figure = plot_loss(run)
    assert "mean of the last 6 steps; faint: every step" in figure.layout.title.text
    frame = loss_frame(run)
    raw = [trace for trace in figure.data if trace.opacity == 0.25]
    assert len(raw) == frame.curve.nunique() == 7
    assert sorted(value for trace in raw for value in trace.y) == sorted(frame.loss)
    mean = next(trace for trace in figure.data if trace.name == "searched")
    assert mean.y[9] == pytest.approx(frame.loss[frame.curve == "searched"].iloc[4:10].mean())


def test_a_loss_that_is_not_a_number_is_a_gap(tmp_path):
    run = Run.create(tmp_path, "study", {}, "")
    for step, loss in enumerate([0.5, math.nan, 0.25], start=1):
        run.log({"event": "step", "phase": "searched", "step": step, "loss": loss})
    assert loss_frame(run).loss.isna().tolist() == [False, True, False]
    assert len(plot_loss(run).data) == 2


def test_score_frame_and_the_step_of_the_structure(run):
    frame = score_frame(run)
    assert frame[frame.phase == "search"].step.tolist() == [10, 20, 30, 40, 50, 60]
    assert list(frame.phase.unique()) == ["search", *RETRAININGS]
    figure = plot_score(run)
    ring = next(trace for trace in figure.data if trace.name == "structure taken here")
    assert list(ring.x) == [50] and list(ring.y) == [frame.score[frame.step == 50].iloc[0]]
    assert figure.layout.yaxis.title.text == "validation accuracy"


def test_structure_frame_of_a_run_and_of_a_file(run):
    frame = structure_frame(run)
    assert frame.equals(structure_frame(run.folder / "structure.json"))
    assert frame.n.tolist() == [module["n"] for module in run.structure["modules"]]
    assert list(frame) == ["stack", "layer", "role", "module", "n", "p"]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    return make_pruned(tmp_path_factory.mktemp("reports"), rounds=3)


@pytest.fixture(scope="module")
def structured(tmp_path_factory):
    "Three seeds."
    root = tmp_path_factory.mktemp("reports")
    return [make_pruned(root, granularity="structured", share=0.4, seed=seed) for seed in range(3)]


def test_share_of_each_candidate_is_what_the_result_says(pruned):
    frame = share_frame(pruned)
    kept = pruned.result["kept"]
    assert len(frame) == 49 == len(kept) and frame["of"].sum() == 25_728
    assert frame["name"].tolist() == [entry["name"] for entry in kept]
    assert frame.share.tolist() == [entry["n"] / entry["of"] for entry in kept]
    assert frame.share @ frame["of"] == pytest.approx(pruned.result["rows"][0]["n_params"])
    assert frame.low.equals(frame.share) and frame.high.equals(frame.share)
    assert set(frame.kept_in) <= {0, 1} and frame.attrs["runs"] == 1 and frame.layer.isna().sum() == 1
    assert share_frame(pruned.result).equals(frame), "a published result is enough"


def test_mean_share_over_seeds(structured):
    frame = share_frame(structured)
    counts = [sum(run.result["kept"][k]["n"] > 0 for run in structured) for k in range(len(frame))]
    assert frame.kept_in.tolist() == counts and {0, 1, 3} <= set(counts)
    assert frame.share.tolist() == pytest.approx([count / 3 for count in counts])
    assert frame.low.tolist() == [float(count == 3) for count in counts]
    assert frame.high.tolist() == [float(count > 0) for count in counts]
    mixed = share_frame([structured[0], structured[1].result, structured[2]])
    assert mixed.equals(frame) and mixed.attrs["runs"] == 3


def test_figure_of_the_shares(pruned, structured):
    figure, frame = plot_share(pruned), share_frame(pruned)
    rows, columns, placed = p_grid(frame)
    assert rows[:2] == ["q · BitFit", "k · BitFit"] and columns == ["emb", "0", "1", "2", "3", "4", "5"]
    for entry in placed.itertuples():
        assert figure.data[0].z[entry.y][entry.x] == entry.share
        assert f"<b>{entry.name}</b>" in figure.data[0].text[entry.y][entry.x]
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, frame.share.max())
    assert 0.2 < frame.share.max() < 0.6 and "of all entries 17.9 %" in figure.layout.title.text
    n = pruned.result["kept"][0]["n"]
    assert f"{n} of 384 kept, {n / 384:.2%}" in figure.data[0].text[0][1]

    figure, frame = plot_share(structured), share_frame(structured)
    assert figure.layout.coloraxis.cmax == 1 and "mean over 3 runs" in figure.layout.title.text
    (outlines,) = [trace for trace in figure.data if trace.name == "wholly kept"]
    assert outlines.showlegend and len(outlines.x) == 6 * (frame.kept_in == 3).sum()
    hover = [text for row in figure.data[0].text for text in row]
    assert sum("anything of it in 1 of 3 runs" in text for text in hover) == (frame.kept_in == 1).sum()


def test_an_outline_is_in_the_legend_once_even_if_the_first_panel_has_none(tmp_path):
    run = make_pruned(tmp_path, {"encoder": 2, "decoder": 2})
    kept = [entry | {"n": entry["of"] if entry["name"] == "decoder.1.q.bitfit" else 0}
            for entry in run.result["kept"]]
    figure = plot_share({**run.result, "kept": kept})
    shown = [trace.showlegend for trace in figure.data if trace.name == "wholly kept"]
    assert shown == [False, True]
    legends = plot_share({**run.result, "kept": [entry | {"n": 1} for entry in kept]})
    assert not any(trace.showlegend for trace in legends.data if trace.name == "wholly kept")


def test_settings_that_all_modules_of_a_type_share_are_not_in_the_rows(tmp_path):
    kept = [dict(stack="encoder", layer=0, role=role, module="lora", n=8, of=16, score=None,
                 name=f"encoder.0.{role}.lora(r=16,init=balanced)") for role in ("q", "k")]
    assert list(plot_share({"kept": kept}).layout.yaxis.ticktext) == ["q · LoRA", "k · LoRA"]


def test_shares_of_different_candidates_are_refused(pruned, run, tmp_path):
    larger = make_pruned(tmp_path, {"encoder": 7})
    with pytest.raises(ValueError, match=rf"candidate 36 .* in run {pruned.id} and .* in result 1; a mean"):
        share_frame([pruned, {**pruned.result, "kept": larger.result["kept"]}])
    wider = [entry | {"of": 2 * entry["of"]} for entry in pruned.result["kept"]]
    with pytest.raises(ValueError, match=r"candidate 0 is encoder.0.q.bitfit \(384\) in run .* \(768\)"):
        share_frame([pruned, {**pruned.result, "kept": wider}])
    with pytest.raises(ValueError, match=f"run {run.id} has no list of what is kept"):
        share_frame([pruned, run])
    with pytest.raises(ValueError, match="give at least one"):
        share_frame([])
    with pytest.raises(ValueError, match="no result yet"):
        share_frame(make_pruned(tmp_path, seed=1, steps=6, finished=False))


@pytest.mark.parametrize("other, says", [
    ({"budget": 100}, "budget is .* in run .* and 100 in result 1; a mean needs runs of one question"),
    ({"prune": {"granularity": "structured"}}, "granularity is 'unstructured' in run .* and 'structured' in")])
def test_shares_of_different_questions_are_refused(pruned, other, says):
    changed = pruned.result | other
    changed["prune"] = pruned.result["prune"] | other.get("prune", {})
    with pytest.raises(ValueError, match=says):
        share_frame([pruned, changed])


ROUNDS = ["pruning, whole architecture", "pruning, round 2", "pruning, round 3"]


def test_trainings_before_the_pruning_have_the_left_panel(pruned):
    frame = loss_frame(pruned)
    labels = ["searched", "random-1", "bitfit", "finetune"]
    assert frame.groupby("curve", sort=False).size().to_dict() == {
        **dict.fromkeys(ROUNDS, 60), **dict.fromkeys(labels, 120)}
    for figure in plot_loss(pruned), plot_score(pruned):
        titles = figure.layout.xaxis.title.text, figure.layout.xaxis2.title.text
        assert titles == ("step of the pruning", "step of the re-training")
        named = {trace.name: trace for trace in figure.data if trace.name}
        assert list(named) == [*ROUNDS, "searched", "random", "bitfit", "finetune"]
        assert {named[name].xaxis for name in ROUNDS} == {"x"} and named["searched"].xaxis == "x2"
        assert len({named[name].line.dash for name in ROUNDS}) == 3
    scores = score_frame(pruned)
    assert scores[scores.phase == "prune-1"].step.tolist() == [20, 40, 60]


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    return make_probed(tmp_path_factory.mktemp("reports"))


def test_scores_of_a_probe_are_the_last_that_were_logged_and_ranked_over_size(probed):
    frame, logged = probe_frame(probed), [record for record in probed.records() if record["event"] == "scores"]
    assert len(logged) == 2 and frame.score.tolist() == logged[-1]["score"]
    assert frame.density.tolist() == (frame.score / frame.n).tolist()
    falling = frame.sort_values("rank")
    assert falling["rank"].tolist() == list(range(1, 111)) and falling.density.is_monotonic_decreasing
    assert set(frame.name[frame.selected]) == {module["path"] for module in probed.structure["modules"]}
    by_score = probe_frame(probed, "value").sort_values("rank")
    assert by_score.score.is_monotonic_decreasing
    assert frame.attrs == {"step": 24, "budget": 4542, "scored": "gain_along", "by": "density"}


def test_records_of_scores_are_selected_under_any_budget(probed):
    records = probed.records()
    assert probe_frame(records).selected.equals(probe_frame(probed).selected)
    wider = probe_frame(probed, B=9000)
    assert 4542 < wider.n[wider.selected].sum() <= 9000
    exact = probe_frame(records, "exact")
    assert exact.score[exact.selected].sum() >= max(
        frame.score[frame.selected].sum() for frame in (probe_frame(records), probe_frame(records, "value")))


def test_heatmap_of_scores_shows_the_share_that_is_lower(probed):
    frame, figure = probe_frame(probed), plot_probe(probed)
    rows, columns, placed = p_grid(frame)
    heat = figure.data[0]
    for entry in placed.itertuples():
        assert heat.z[entry.y][entry.x] == pytest.approx((110 - entry.rank) / 109)
        text = heat.text[entry.y][entry.x]
        assert f"<b>{entry.name}</b>" in text and f"rank {entry.rank} of 110" in text
        assert ("not selected" in text) is not entry.selected
    outlined = next(trace for trace in figure.data if trace.name == "selected")
    assert len(outlined.x) == 6 * frame.selected.sum()
    assert figure.layout.title.text == (
        f"Score gain_along over size at step 24, ranked; {frame.selected.sum()} modules selected")
    assert "over size" not in plot_probe(probed, "exact").layout.title.text


def test_a_score_that_is_not_a_number_is_a_hole_and_a_name_is_text(probed):
    space, scored = ([r for r in probed.records() if r["event"] == kind][-1] for kind in ("space", "scores"))
    torn = [space, scored | {"name": "<b>mine", "score": [None, *scored["score"][1:]]}]
    figure = draw_probe(probe_frame(torn))
    assert "&lt;b&gt;mine" in figure.layout.title.text
    assert sum(value is not None and not math.isnan(value) for row in figure.data[0].z for value in row) == 109


def test_a_run_without_scores_says_so(run):
    with pytest.raises(ValueError, match="has logged no record 'scores'"):
        probe_frame(run)


def test_steps_of_a_probe_have_the_left_panel(probed, tmp_path):
    assert loss_frame(probed).groupby("curve", sort=False).size().to_dict() == {
        "training of the open model": 24, "searched": 48, "random-1": 48}
    probed.log({"event": "step", "phase": "probe", "step": 1, "steps": 1, "loss": 0.6})
    figure = plot_loss(probed)
    assert figure.layout.xaxis.title.text == "step of the probe"
    assert figure.layout.xaxis2.title.text == "step of the re-training"
    named = {trace.name: trace for trace in figure.data if trace.name}
    before = {"training of the open model", "looks, nothing moves"}
    assert set(named) == before | {"searched", "random"} and {named[name].xaxis for name in before} == {"x"}
    assert plot_score(probed).layout.xaxis.title.text == "step of the re-training"


def test_probes_have_a_mean_of_what_they_kept_if_they_ask_the_same(probed, tmp_path):
    other = make_probed(tmp_path, seed=1)
    frame = share_frame([probed, other])
    assert set(frame.share) == {0, 0.5, 1}
    with pytest.raises(ValueError, match="score is 'gain_along' in run .* and 'gain' in"):
        share_frame([probed, make_probed(tmp_path, probe_score="gain")])


def test_a_pruned_structure_shows_what_was_kept_of_what(pruned, structured):
    frame = structure_frame(pruned)
    assert list(frame) == ["stack", "layer", "role", "module", "n", "of", "score"]
    assert frame.n.sum() == pruned.result["rows"][0]["n_params"] and (frame.n <= frame["of"]).all()
    assert list(structure_frame(structured[0])) == ["stack", "layer", "role", "module", "n", "score"]


def test_structure_frame_of_a_file_as_it_is_saved(tmp_path):
    space = make_space(tiny("bert"), "bias")
    masks = {f"{c.name}.b": torch.arange(c.n) < min(k, c.n) for k, c in enumerate(space.candidates)}
    scores = torch.linspace(-1, 1, len(space))
    Structure.pruned(space, masks, scores, budget=500, method="prune").save(tmp_path / "structure.json")
    frame = structure_frame(tmp_path / "structure.json")
    sizes = space.n[1:].tolist()
    assert frame["of"].tolist() == sizes and frame.n.tolist() == [min(k, n) for k, n in enumerate(sizes, 1)]
    assert frame.score.tolist() == pytest.approx(scores[1:].tolist()) and "p" not in frame


@pytest.mark.parametrize("draw", [plot_share, plot_loss, plot_score, plot_comparison, plot_sizes])
def test_figures_of_a_pruning_are_small(pruned, draw):
    figure = draw(pruned)
    assert figure.layout.width is None and len(figure.to_json()) < 60_000


def test_comparison_never_hides_a_seed(run):
    frame = comparison_frame(run)
    assert frame.label.tolist() == RETRAININGS
    assert frame.ratio[0] == frame.n_params[0] / 22_713_216
    figure = plot_comparison(run)
    assert [trace.name for trace in figure.data] == ["test", "test/unseen_words", "validation"]
    for trace in figure.data:
        assert list(trace.x) == frame[trace.name].tolist()
    assert [text.split("<br>")[0] for text in figure.layout.yaxis.ticktext] == [
        "searched",
        "random (3)",
        "lora-r1",
    ]
    assert plot_comparison(run.result).to_json() == figure.to_json()


@pytest.fixture
def with_finetune(run):
    "The result as a search with other baselines writes it."
    rows = [{**row, "label": {"lora-r1": "lora-everywhere"}.get(row["label"], row["label"])}
            for row in run.result["rows"]]
    more = [{**rows[-1], "label": label, "test": 0.8, "n_params": 4_500}
            for label in ("bitfit-cut", "rte-s3pet-1")]
    tuned = {**rows[-1], "label": "finetune", "structure": "finetune", "modules": None, "test": 0.9,
             "n_params": 22_713_216, "test/unseen_words": None}
    return {**run.result, "rows": [*rows, *more, tuned]}


def test_finetuning_has_no_modules_and_stands_beside_the_others(with_finetune):
    frame = comparison_frame(with_finetune)
    assert frame.modules.isna().tolist() == [False] * 7 + [True] and frame.modules.dtype == "Int64"
    assert frame.ratio.iloc[-1] == 1 and frame.ratio[0] < 1e-3
    shown = table(frame)
    assert ">–<" in shown and ">22,713,216<" in shown and ">1.00e+00<" in shown
    for label, modules in zip(frame.label, frame.modules):
        assert f">{label}<" in shown and (modules is pd.NA or f">{modules}<" in shown)
    figure = plot_comparison(with_finetune)
    assert [text.split("<br>")[0] for text in figure.layout.yaxis.ticktext] == [
        "searched", "random (3)", "lora-everywhere", "bitfit-cut", "rte-s3pet-1", "finetune"]
    assert list(figure.data[0].x) == frame.test.tolist()


def test_sizes_are_on_a_logarithmic_axis_with_every_row(with_finetune):
    figure = plot_sizes(with_finetune)
    assert figure.layout.xaxis.type == "log" and len(figure.data) == 6
    drawn = {(label, x, y) for trace in figure.data for label, x, y in zip(trace.text, trace.x, trace.y)}
    assert drawn == {(row["label"], row["n_params"], row["test"]) for row in with_finetune["rows"]}


def test_no_two_of_a_dozen_labels_share_a_line():
    names = "adapter", "lora-r8", "lora-r1", "adapter-lr", "bitfit", "lnfit", "lora-everywhere"
    others = ["finetune", *(f"{name}{cut}" for cut in ("", "-cut") for name in names)]
    lines = phase_lines(["searched", "random-1", "random-2", *others])
    assert lines["random-1"] == lines.pop("random-2")
    assert len({tuple(line.values()) for line in lines.values()}) == len(lines) == 17
    assert phase_lines(["searched"])["searched"] == lines["searched"]


def test_random_structures_share_one_entry_of_the_legend(run):
    for figure in (plot_loss(run), plot_score(run)):
        shown = [trace.name for trace in figure.data if trace.showlegend and trace.name == "random"]
        assert shown == ["random"]


@pytest.mark.parametrize("draw", FIGURES)
def test_figures_take_their_width_from_the_page_and_are_small(run, draw):
    figure = draw(run)
    assert figure.layout.width is None and figure.layout.paper_bgcolor is None
    assert figure.layout.template.layout.paper_bgcolor == "white"
    assert len(json.dumps(json.loads(figure.to_json()))) < 60_000


@pytest.mark.parametrize(
    "read", [p_frame, budget_frame, mixed_frame, loss_frame, score_frame, structure_frame, comparison_frame,
             share_frame]
)
def test_a_run_without_records_says_what_is_missing(tmp_path, read):
    with pytest.raises(ValueError, match="no record|no structure yet|no result yet"):
        read(Run.create(tmp_path, "study", {}, ""))


@pytest.fixture(scope="module")
def differing():
    "Lines of differences as `results` has them: two rows at two budgets, two tasks and all of them."
    return pd.DataFrame([
        {"row": row, "line": f"{row}, budget {budget}", "budget": budget, "against": LINK, "task": task,
         "mean": 0.01 * k, "low": 0.01 * k - 0.02, "high": 0.01 * k + 0.02, "p": 0.04, "pairs": 3, "ahead": 2,
         "unit": "sd" if task == "all" else "points"}
        for k, row in enumerate(("S3PET", "local")) for budget in (100, 200) for task in ("cola", "all", "rte")])


def test_the_forest_draws_every_difference_and_zero(differing):
    lines = row_lines(pd.DataFrame({"row": ["S3PET", "local"], "label": ["searched"] * 2}))
    figure = draw_differences(differing, lines)
    assert sum(len(trace.x) for trace in figure.data) == len(differing)
    assert len(figure.layout.shapes) == 3 and "<a " not in figure.to_json()  # zero, in each panel
    assert [title.text for title in figure.layout.annotations] == ["cola", "rte", "all tasks"]
    one = differing[differing.line == "S3PET, budget 100"]
    figure = draw_differences(one, lines)
    assert list(figure.layout.yaxis.ticktext) == ["cola", "rte"], "points and sd do not share an axis"
    assert sum(len(trace.x) for trace in figure.data) == len(one) - 1


def test_all_tasks_are_drawn_in_standard_deviations_in_a_panel_of_their_own(differing):
    lines = row_lines(pd.DataFrame({"row": ["S3PET", "local"], "label": ["searched"] * 2}))
    whole = differing.unit == "sd"
    sizes = differing.assign(mean=differing["mean"].mask(whole, 1.5), low=differing.low.mask(whole, 1.0),
                             high=differing.high.mask(whole, 2.0))
    figure = draw_differences(sizes, lines)
    titles = [axis.title.text for axis in (figure.layout.xaxis, figure.layout.xaxis2, figure.layout.xaxis3)]
    assert titles == ["points of score", "points of score", "standard deviations"]
    (drawn, *_) = [trace for trace in figure.data if trace.xaxis == "x3"]
    assert list(drawn.x) == [1.5, 1.5] and "+1.50\u00a0sd" in drawn.text[0] and "points" not in drawn.text[0]


def test_a_study_without_pairs_has_no_forest(differing):
    lines = row_lines(pd.DataFrame({"row": ["S3PET", "local"], "label": ["searched"] * 2}))
    with pytest.raises(ValueError, match="no pair yet"):
        draw_differences(differing.iloc[:0], lines)


def test_rows_have_lines_of_their_own():
    labels = {"S3PET": "searched", "random (S3PET)": "random", "random (local)": "random", "finetune": "finetune",
              "local": "searched"}
    lines = row_lines(pd.DataFrame({"row": list(labels), "label": list(labels.values())}))
    assert lines["S3PET"] == {"color": "#0072B2", "dash": "solid"} and lines["finetune"]["dash"] == "dashdot"
    assert lines["random (S3PET)"]["color"] == "#8A9099" and len({str(line) for line in lines.values()}) == 5


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_a_sweep_has_a_line_for_each_row_and_a_level_for_all_weights(statistic):
    frame = pd.DataFrame([
        {"row": row, "line": row, "label": label, "task": task, "n_params": n, "seeds": 3, "mean": 0.6, "median": 0.5,
         "low": 0.58, "high": 0.62} for row, label, n in (("S3PET", "searched", 100), ("S3PET", "searched", 200),
                                                          ("finetune", "finetune", 9000)) for task in ("a", LINK)])
    figure = draw_sweep(frame, row_lines(frame), statistic)
    searched, level = figure.data[0], figure.data[2]
    assert list(searched.y) == [60, 60] if statistic == "mean" else list(searched.y) == [50, 50]
    assert (searched.error_y.array is not None) is (statistic == "mean") and list(level.x) == [100, 200]
    assert "<a " not in figure.to_json() and figure.layout.xaxis.type == "log"
    with pytest.raises(ValueError, match="no structure says its number of parameters"):
        draw_sweep(frame.iloc[:0], {})


def test_transfer_is_a_matrix():
    frame = pd.DataFrame({"row": ["searched", "searched", "random"], "source": ["a", "b", ""],
                          "a": [0.6, 0.5, 0.4], "b": [0.7, math.nan, 0.7]})
    figure = draw_transfer(frame)
    heat, = figure.data
    assert heat.text.tolist() == [["60.0", "70.0"], ["50.0", "nan"], ["40.0", "70.0"]]
    assert heat.z[:, 0].tolist() == [1.0, pytest.approx(0.5), 0.0]
    assert list(figure.layout.yaxis.ticktext) == ["searched, a", "searched, b", "random"]


def test_a_training_that_learned_nothing_is_a_cross_that_says_why(run):
    rows = [row | {"learned_nothing": "one <b>class</b>" if k == 1 else None}
            for k, row in enumerate(run.result["rows"])]
    result = run.result | {"rows": rows}
    assert "learned_nothing" in comparison_frame(result)
    first = plot_comparison(result).data[0]
    assert [symbol == "x" for symbol in first.marker.symbol] == [k == 1 for k in range(len(rows))]
    assert first.text[1].endswith("<br>learned nothing: one &lt;b&gt;class&lt;/b&gt;")
    crosses = [symbol for trace in plot_sizes(result).data for symbol in trace.marker.symbol if symbol == "x"]
    assert len(crosses) == 1


def test_where_every_training_learned_nothing_is_said(run):
    rows = [row | {"learned_nothing": None} for row in run.result["rows"]]
    assert comparison_frame(run.result | {"rows": rows}).equals(comparison_frame(run.result))
