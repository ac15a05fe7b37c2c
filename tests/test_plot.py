"""Every number of every figure, on the frames; and the shape of the figures."""

import json
import math

import plotly.graph_objects as go
import pytest
from synthetic import RETRAININGS, candidates, make_run

from s3pet_nb.plot import (
    budget_frame,
    comparison_frame,
    loss_frame,
    p_frame,
    p_grid,
    plot_budget,
    plot_comparison,
    plot_loss,
    plot_p,
    plot_score,
    score_frame,
    structure_frame,
    table,
)
from s3pet_nb.store import Run

FIGURES = [plot_p, plot_budget, plot_loss, plot_score, plot_comparison]


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
    "read", [p_frame, budget_frame, loss_frame, score_frame, structure_frame, comparison_frame]
)
def test_a_run_without_records_says_what_is_missing(tmp_path, read):
    with pytest.raises(ValueError, match="no record|no structure yet|no result yet"):
        read(Run.create(tmp_path, "study", {}, ""))


def test_table_escapes_and_aligns(run):
    frame = comparison_frame(run)
    frame.loc[0, "structure"] = "<img src=x>"
    shown = table(frame, "a < b").data
    assert "<img" not in shown and "&lt;img src=x&gt;" in shown and "<caption>a &lt; b</caption>" in shown
    assert (
        '<td style="text-align:right">41,472</td>' in shown
        and '<td style="text-align:left">lora-r1</td>' in shown
    )
    assert ">1.86e-04<" in shown and ">0.820<" in shown
    assert ">–<" in table(p_frame(run).tail(3)).data
