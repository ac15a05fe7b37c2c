"Rates at which structures learn, and tasks on which they can differ, from scores that are made up."
import pandas as pd
import pytest

from s3pet_nb.lab import ground


def scores(rows) -> pd.DataFrame:
    "Rows of label, seed, test and what else there is, as `results.scores` gives them."
    frame = pd.DataFrame([{"method": "", "row": row["label"], "structure": row["label"], "budget": 10,
                           "times": 1.0, "task": "t", "metric": "accuracy", "n_params": 10.0, "ratio": 0.1, "validation": 0.5} | row for row in rows])
    return frame[["method", "label" if "label" in frame else "row", "row", "times", "seed",
                  *(name for name in frame if name not in ("method", "label", "row", "times", "seed"))]]


def over_seeds(label, values, **more):
    return [{"label": label, "seed": seed, "test": test, **more} for seed, test in enumerate(values)]


def test_a_structure_breaks_where_it_is_ten_points_below_its_best_rate():
    rows = [row for times, test in ((0.1, 0.5), (1.0, 0.8), (3.0, 0.701), (10.0, 0.699))
            for row in over_seeds("lora", [test] * 3, times=times)]
    frame = ground.rates(scores(rows))
    assert frame.set_index("times").breaks.to_dict() == {0.1: False, 1.0: False, 3.0: False, 10.0: True}
    assert frame[frame.best].times.tolist() == [1.0]
    line = ground.rate_table(frame).iloc[0]
    assert (line["best at"], line["breaks at"], line["within a point"]) == ("1", "10", "1 to 1")


def test_the_figure_has_a_line_for_each_structure_in_each_panel_and_escapes_names():
    rows = [row for task in ("a", "<b>") for label in ("x", "y") for times in (0.1, 1.0)
            for row in over_seeds(label, [0.5, 0.6], times=times, task=task)]
    figure = ground.draw_rates(ground.rates(scores(rows)))
    assert len(figure.data) == 4 and all(len(trace.x) == 2 for trace in figure.data)
    assert not any("<b>" in note.text for note in figure.layout.annotations)


HEAD = over_seeds("head-alone", [0.6] * 5)


@pytest.mark.parametrize("habit, verdict", [
    ([0.70, 0.71, 0.70, 0.71, 0.70], "yes"),
    ([0.69, 0.70, 0.70, 0.69, 0.70], "no: 9.6 points over the head alone"),
    ([0.70, 0.80, 0.70, 0.80, 0.70], "no: sd 5.5 points"),
    ([0.8] * 4, "open: 4 of 5 seeds")])
def test_the_rule_of_admission(habit, verdict):
    frame = ground.admission(scores([*HEAD, *over_seeds("bitfit", habit), *over_seeds("random", [0.9] * 5)]))
    assert frame.admitted.tolist() == [verdict] and frame["best habit"].tolist() == ["bitfit"]


def test_a_collapse_is_ten_points_below_the_median_of_its_structure():
    rows = [*HEAD, *over_seeds("bitfit", [0.8, 0.8, 0.8, 0.8, 0.69]),
            *over_seeds("random", [0.75, 0.71, 0.75, 0.75, 0.75])]
    frame = ground.admission(scores(rows))
    assert frame.collapsed.tolist() == [1] and frame.trainings.tolist() == [15]


def test_structures_that_differ_are_no_collapse_and_seeds_are_told_from_structures():
    rows = [*over_seeds("random", [0.8, 0.82, 0.84], structure="random-1"),
            *over_seeds("random", [0.5, 0.52, 0.39], structure="random-2"),
            *over_seeds("random", [0.30, 0.32, 0.34], structure="random-2", times=3.0)]
    line = ground.steadiness(scores(rows)).iloc[0]
    assert (line.structures, line.trainings, line.collapsed) == (3, 9, 1)
    assert line["lowest"] == pytest.approx(32) and line["highest"] == pytest.approx(82)
    assert line["fall"] == pytest.approx(11) and line["sd of seeds"] == pytest.approx(((4 + 49 + 4) / 3) ** 0.5)


def test_a_searched_structure_and_full_fine_tuning_are_no_habits():
    rows = [*HEAD, *over_seeds("bitfit", [0.75] * 5), *over_seeds("searched", [0.9] * 5),
            *over_seeds("finetune", [0.95] * 5)]
    assert ground.admission(scores(rows))["best habit"].tolist() == ["bitfit"]


def test_a_task_without_the_head_alone_has_no_verdict():
    frame = ground.admission(scores(over_seeds("bitfit", [0.8] * 5)))
    assert frame.admitted.tolist() == ["open: no training of the head alone, or of a habit"]


def test_a_rate_at_which_nothing_is_learned_is_one_that_breaks():
    rows = [*over_seeds("lora", [0.8] * 3), *over_seeds("lora", [0.5] * 3, times=10.0, learned_nothing="one class")]
    frame = ground.rates(scores([{"learned_nothing": None} | row for row in rows]))
    assert frame.set_index("times").breaks.to_dict() == {1.0: False, 10.0: True}


def test_controls_are_no_habits():
    rows = [*HEAD, *over_seeds("bitfit", [0.75] * 5), *over_seeds("upper-layers", [0.9] * 5)]
    assert ground.admission(scores(rows))["best habit"].tolist() == ["bitfit"]
