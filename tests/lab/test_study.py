"Templates, their parameters, and studies: what can be asked, and what is refused."
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from templates import RESULT, write_template

from s3pet_nb.core import UnknownName
from s3pet_nb.lab.study import (Faults, Question, Study, expand, merged, parameters, resolve, shipped, study,
                                template)


@pytest.fixture
def measure(tmp_path):
    return write_template(tmp_path / "measure.ipynb", RESULT)


def test_defaults_are_read_without_running_the_cell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = 'run_folder = ""\nlist_of = [1, -2.5, "a"]\nnothing = None\n'
    assert parameters(write_template(tmp_path / "plain.ipynb", parameters=plain)) == {
        "list_of": [1, -2.5, "a"], "nothing": None}
    call = 'run_folder = ""\nnow = open("made", "w")\n'
    called = write_template(tmp_path / "called.ipynb", parameters=call)
    with pytest.raises(ValueError, match="default of 'now'"):
        parameters(called)
    assert not Path("made").exists()


def test_a_template_without_run_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no parameter 'run_folder'"):
        parameters(write_template(tmp_path / "t.ipynb", parameters="seed = 0\n"))


def test_resolve_fills_in_defaults_and_makes_whole_numbers_floats(measure, tmp_path):
    resolved = resolve(measure, {"share": 1, "data_dir": tmp_path})
    assert resolved == {"seed": 0, "share": 1.0, "flag": False, "data_dir": str(tmp_path), "task": "easy"}
    assert type(resolved["share"]) is float


@pytest.mark.parametrize("given, sentence", [
    ({"sede": 1}, "did you mean 'seed'"),
    ({"run_folder": "x"}, "unknown measure parameter 'run_folder'"),
    ({"seed": 0.5}, "seed is 0.5, of type float; give int"),
    ({"seed": True}, "seed is True, of type bool; give int"),
    ({"share": "2e-4"}, "share is '2e-4', of type str; give float"),
    ({"share": float("nan")}, "give a finite number"),
    ({"flag": 1}, "flag is 1, of type int; give bool"),
    ({"task": None}, "task is None"),
    ({"share": 10 ** 400}, "share is inf; give a finite number"),
    ({"data_dir": date(2024, 1, 1)}, r"data_dir is datetime.date\(2024, 1, 1\); give a number, text"),
    ({"data_dir": {"a": 1}}, "give a number, text"),
    ({"data_dir": [1.0, float("inf")]}, "give a finite number"),
    ({"data_dir": [[1]]}, "give a number, text"),
])
def test_what_a_template_cannot_be_asked_is_refused(measure, given, sentence):
    with pytest.raises((UnknownName, ValueError), match=sentence):
        resolve(measure, given)


def test_a_parameters_cell_that_is_no_python_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="line 2 of the parameters of t.ipynb is no Python"):
        parameters(write_template(tmp_path / "t.ipynb", parameters='run_folder = ""\nseed = = 1\n'))


def test_a_template_is_read_anew_when_it_has_changed(tmp_path):
    path = write_template(tmp_path / "t.ipynb", parameters='run_folder = ""\nseed = 0\n')
    assert parameters(path) == {"seed": 0}
    write_template(path, parameters='run_folder = ""\nseed = 0\nsteps = 5\n')
    assert parameters(path) == {"seed": 0, "steps": 5}


@pytest.mark.parametrize("text", ['{"cells": 3}', '{"cell": []}', "[]", '{"cells": [{"cell_type": "code"}]}'])
def test_a_file_that_is_no_notebook_is_no_template(tmp_path, text):
    path = tmp_path / "t.ipynb"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a notebook; restore it"):
        parameters(path)


def test_studies_are_read_without_torch_papermill_or_transformers():
    code = ("import sys\nfrom s3pet_nb.lab.study import shipped, study\n"
            "assert all(study(name).questions() for name in shipped('studies'))\n"
            "print(sorted({'torch', 'papermill', 'transformers', 'nbformat'} & set(sys.modules)))")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_unknown_templates_and_studies(tmp_path):
    with pytest.raises(UnknownName, match="unknown study 'dmeo'; did you mean 'demo'"):
        study("dmeo")
    with pytest.raises(UnknownName, match="unknown template 'serch'"):
        template("serch")
    with pytest.raises(FileNotFoundError, match="gone.ipynb"):
        template(tmp_path / "gone.ipynb")


def test_every_shipped_study_can_be_asked_of_its_template():
    assert {"demo", "search"} <= set(shipped("studies"))
    for name in shipped("studies"):
        found = study(name)
        assert set(resolve(found.template, found.params)) == set(parameters(found.template))


def test_every_shipped_template_takes_a_run_folder():
    assert "search" in shipped("templates")
    for name in set(shipped("templates")) - {"compare"}:
        assert "seed" in parameters(name)
    with pytest.raises(ValueError, match="compare.ipynb has no parameter 'run_folder'"):
        parameters("compare")


def test_a_study_file(tmp_path, measure):
    path = tmp_path / "mine.yml"
    path.write_text(f"template: {measure}\nparams: {{share: 0.25}}\ngrid: {{seed: [0, 1]}}\n")
    assert study(path) == Study("mine", str(measure), {"share": 0.25}, {"seed": [0, 1]})


def test_a_study_shows_its_questions_as_text():
    asked = Study("<b>mine", "search", {"task": "<i>agreement"}, {"budget": [1e-3, 2e-3, 4e-3]}, [0, 1])
    shown = asked._repr_html_()
    assert len(asked) == 6 and "runs: 6" in shown and "each of 0.001, 0.002, 0.004" in shown
    assert "&lt;b&gt;mine" in shown and "&lt;i&gt;agreement" in shown and "<i>" not in shown


@pytest.mark.parametrize("text, sentence", [
    ("params: {seed: 1}", "names no template"),
    ("- 1", "it is list; write"),
    ("template: [", "is not YAML"),
    ("template: MEASURE\nparam: {seed: 1}", "did you mean 'params'"),
    ("template: MEASURE\nparams: {sede: 1}", "did you mean 'seed'"),
    ("template: MEASURE\nparams: {share: 2e-4}", "share is '2e-4'"),
    ("template: MEASURE\ngrid: {seed: 3}", "give a list"),
    ("template: MEASURE\ngrid: {seed: [0, x]}", "seed is 'x'"),
    ("template: MEASURE\ngrid: {seed: []}", "the grid's 'seed' is \\[\\]"),
    ("template: MEASURE\ngrid: {seed: [0, 0]}", "names a value twice"),
    ("template: MEASURE\nseeds: [1, 1]", "seeds names one twice"),
    ("template: MEASURE\nseeds: [1]\ngrid: {seed: [2]}", "seed is given beside seeds"),
    ("template: MEASURE\nseeds: [one]", "seed is 'one'"),
    ("template: MEASURE\nseeds: [[1]]", "seed is \\[1\\], of type list"),
    ("template: MEASURE\nparams: {seed: 1}\nparams: {seed: 2}", "'params' is there twice"),
    ("template: MEASURE\nmethods: {a: {param: {}}}", "unknown key of method 'a' 'param'"),
    ("template: MEASURE\nmethods: {a: }", "method 'a' is None; give template, params or grid"),
    ("template: MEASURE\nmethods: {a: {template: gone.ipynb}}", "method 'a': no template 'gone.ipynb'"),
    ("template: MEASURE\nshow: [tabel]", "did you mean 'table'"),
    ("template: MEASURE\nstatistic: mode", "unknown statistic 'mode'"),
    ("template: MEASURE\nfolder: ../elsewhere", "'../elsewhere' is not a plain name"),
    ("template: MEASURE\nname: other", "unknown key of the study 'name'"),
    ("template: torn.ipynb", "no template 'torn.ipynb'"),
    ("template: MEASURE\nseeds: [0, -1]", "seed -1 is out of range; give one from 0 to 4294967295"),
    ("template: MEASURE\nseeds: [4294967296]", "seed 4294967296 is out of range"),
    ("template: MEASURE\nagainst: randon", "against: .*'randon'; did you mean 'random'"),
    ("template: MEASURE\nmethods: {first-order: {}}\nagainst: firstorder", "did you mean 'first-order'"),
    ("template: MEASURE\ngrid: {baselines: 3}", "the grid's 'baselines' is 3"),
    ("template: MEASURE\nmethods: {1: {}, '1': {}}", "method 1 is there twice"),
    ("template: MEASURE\nparams: {data_dir: 2024-13-45}", "bad.yml is not YAML: month must be in 1..12"),
    ("template: MEASURE\nparams: {data_dir: !!set {a}}", "data_dir is {'a'}; give a number, text"),
    ("[" * 5000, "bad.yml is not YAML"),
    ("base: gone", "unknown study 'gone'"),
    ("base: BAD", "comes back to itself"),
])
def test_a_study_that_cannot_be_asked_is_refused(tmp_path, measure, text, sentence):
    path = tmp_path / "bad.yml"
    path.write_text(text.replace("MEASURE", str(measure)).replace("BAD", str(path)))
    with pytest.raises(Faults, match=sentence):
        study(path)


def test_a_study_may_use_anchors_and_merge_keys(tmp_path, measure):
    path = tmp_path / "mine.yml"
    path.write_text(f"""\
template: {measure}
params: &usual {{share: 0.5, flag: true}}
methods: {{one: {{params: {{<<: *usual, share: 0.25}}}}}}
""")
    assert study(path).methods == {"one": {"params": {"share": 0.25, "flag": True}}}


def test_a_changed_study_says_what_was_changed_and_refuses_what_is_no_parameter(tmp_path, measure):
    path = tmp_path / "mine.yml"
    path.write_text(f"template: {measure}\nparams: {{share: 0.5}}\n")
    changed = study(path).changed(share=0.25).changed(task="hard")
    assert changed.source == str(path) and changed.given == {"share": 0.25, "task": "hard"}
    assert changed.params == {"share": 0.25, "task": "hard"}
    for given, sentence in ({"shar": None}, "did you mean 'share'"), ({"share": None}, "share is None"):
        with pytest.raises(Faults, match=sentence):
            study(path).changed(**given)


def test_everything_that_is_wrong_is_said_at_once(tmp_path, measure):
    path = tmp_path / "bad.yml"
    path.write_text(f"""\
template: {measure}
parms: {{share: 1.0}}
params: {{share: 2e-4, sede: 3, flag: 1}}
grid: {{task: []}}
seeds: 3
methods: {{a: {{grid: {{task: [x, x]}}}}, b: 7}}
show: [table, tabel]
""")
    with pytest.raises(Faults) as faults:
        study(path)
    wrong = " ".join(faults.value.each)
    for part in ("'parms'", "share is '2e-4'", "'sede'", "flag is 1", "'task' is []", "seeds of the study is 3",
                 "method 'a': the grid's 'task' names a value twice", "method 'b' is 7", "'tabel'"):
        assert part in wrong
    assert str(faults.value).startswith(f"study 'bad' has {len(faults.value.each)} faults:\n- ")


def test_a_study_laid_over_another(tmp_path, measure):
    (tmp_path / "large.yml").write_text(f"""\
template: {measure}
title: Large
params: {{share: 0.5, task: hard}}
grid: {{flag: [true, false]}}
seeds: [0, 1, 2]
methods: {{one: {{}}, two: {{params: {{share: 1.0}}}}}}
""")
    (tmp_path / "small.yml").write_text(f"""\
base: {tmp_path / "large.yml"}
params: {{task: null}}
grid: {{flag: null}}
seeds: [5]
methods: {{one: null, two: {{params: {{task: mid}}}}}}
""")
    (tmp_path / "smaller.yml").write_text(f"base: {tmp_path / 'small.yml'}\nparams: {{flag: true}}\n")
    small, smaller = study(tmp_path / "small.yml"), study(tmp_path / "smaller.yml")
    assert (small.name, small.title, small.seeds, small.grid) == ("small", "Large", [5], {})
    assert [question.params for question in small.questions()] == [
        {"seed": 5, "share": 1.0, "flag": False, "data_dir": None, "task": "mid"}]
    assert smaller.questions()[0].params["flag"] is True and smaller.questions()[0].params["task"] == "mid"


def test_merged_is_a_json_merge_patch():
    "Examples of RFC 7386, appendix A."
    for below, above, found in [
            ({"a": "b"}, {"a": "c"}, {"a": "c"}), ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
            ({"a": "b"}, {"a": None}, {}), ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
            ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
            ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}), (["a"], ["c"], ["c"]), ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
            ([1, 2], {"a": "b", "c": None}, {"a": "b"}), ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}})]:
        assert merged(below, above) == found


def test_runs_come_seed_by_seed_and_method_by_method(tmp_path, measure):
    path = tmp_path / "order.yml"
    path.write_text(f"""\
template: {measure}
grid: {{task: [a, b]}}
seeds: [0, 1]
methods:
  first: {{}}
  second: {{grid: {{task: [c]}}}}
""")
    asked = [(question.params["seed"], question.method, question.params["task"])
             for question in study(path).questions()]
    assert asked == [(0, "first", "a"), (0, "first", "b"), (0, "second", "c"),
                     (1, "first", "a"), (1, "first", "b"), (1, "second", "c")]


def test_where_rows_lie_is_no_part_of_a_question_but_what_they_say_is(tmp_path, measure):
    for place, text in ("here", "a"), ("there", "a"), ("elsewhere", "b"):
        (tmp_path / place / "mine").mkdir(parents=True)
        (tmp_path / place / "mine" / "train.csv").write_text(text)
    here, there, elsewhere = (Question.of(measure, {"task": "mine", "data_dir": str(tmp_path / place)}).id
                              for place in ("here", "there", "elsewhere"))
    assert here == there != elsewhere


def test_a_changed_study_is_checked_again(tmp_path, measure):
    path = tmp_path / "mine.yml"
    path.write_text(f"template: {measure}\nmethods: {{a: {{params: {{share: 1.0}}}}}}\n")
    assert study(path).changed(data_dir="rows").questions()[0].params["data_dir"] == "rows"
    with pytest.raises(Faults, match="unknown measure parameter 'sede'"):
        study(path).changed(sede=1)


def test_expand_is_nested_loops():
    assert expand({}) == [{}]
    points = expand({"a": [1, 2], "b": [3, 4]})
    assert [(point["a"], point["b"]) for point in points] == [(1, 3), (1, 4), (2, 3), (2, 4)]
    with pytest.raises(ValueError, match="give a list"):
        expand({"a": []})


@pytest.mark.parametrize("text", ["template: 5", "template: MEASURE\nparams: [1]", "template: MEASURE\ngrid: [1]"])
def test_a_file_of_other_shapes_is_no_study(tmp_path, measure, text):
    path = tmp_path / "odd.yml"
    path.write_text(text.replace("MEASURE", str(measure)))
    with pytest.raises(Faults, match="of the study is .*; give"):
        study(path)
