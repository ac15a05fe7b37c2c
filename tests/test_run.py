"Templates, their parameters, one run and a grid of runs."
import json
import os
import sys
from pathlib import Path

import nbformat
import pytest

from s3pet_nb.core import UnknownName
from s3pet_nb.run import RunFailed, Study, execute, expand, kernel_environment, parameters, resolve, run_grid
from s3pet_nb.run import shipped, study, template

PARAMETERS = """\
run_folder = ""
seed = 0
share: float = 0.5  # of the whole
flag = False
data_dir = None
task = "easy"
"""
STORE = "from s3pet_nb.store import Run\n"
RESULT = STORE + 'Run(run_folder).save_result({"task": task, "sum": share + seed})'


def write_template(path, *cells, parameters=PARAMETERS, kernel="python3"):
    head = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[head, *map(nbformat.v4.new_code_cell, cells)])
    notebook.metadata.kernelspec = {"name": kernel, "language": "python", "display_name": kernel}
    nbformat.write(notebook, path)
    return path


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
])
def test_what_a_template_cannot_be_asked_is_refused(measure, given, sentence):
    with pytest.raises((UnknownName, ValueError), match=sentence):
        resolve(measure, given)


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
    for name in shipped("templates"):
        assert "seed" in parameters(name)


def test_a_study_file(tmp_path, measure):
    path = tmp_path / "mine.yml"
    path.write_text(f"template: {measure}\nparams: {{share: 0.25}}\ngrid: {{seed: [0, 1]}}\n")
    assert study(path) == Study("mine", str(measure), {"share": 0.25}, {"seed": [0, 1]})


def test_a_study_shows_its_questions_as_text():
    asked = Study("<b>mine", "search", {"task": "<i>agreement"}, {"seed": [0, 1], "budget": [1e-3, 2e-3, 4e-3]})
    shown = asked._repr_html_()
    assert len(asked) == 6 and "runs: 6" in shown and "each of 0.001, 0.002, 0.004" in shown
    assert "&lt;b&gt;mine" in shown and "&lt;i&gt;agreement" in shown and "<i>" not in shown


@pytest.mark.parametrize("text, sentence", [
    ("params: {seed: 1}", "names no template"),
    ("- 1", "names no template"),
    ("template: [", "is not YAML"),
    ("template: MEASURE\nparam: {seed: 1}", "did you mean 'params'"),
    ("template: MEASURE\nparams: {sede: 1}", "did you mean 'seed'"),
    ("template: MEASURE\nparams: {share: 2e-4}", "share is '2e-4'"),
    ("template: MEASURE\ngrid: {seed: 3}", "give a list"),
    ("template: MEASURE\ngrid: {seed: [0, x]}", "seed is 'x'"),
])
def test_a_study_that_cannot_be_asked_is_refused(tmp_path, measure, text, sentence):
    path = tmp_path / "bad.yml"
    path.write_text(text.replace("MEASURE", str(measure)))
    with pytest.raises((UnknownName, ValueError), match=sentence):
        study(path)


def test_expand_is_nested_loops():
    assert expand({}) == [{}]
    points = expand({"a": [1, 2], "b": [3, 4]})
    assert [(point["a"], point["b"]) for point in points] == [(1, 3), (1, 4), (2, 3), (2, 4)]
    with pytest.raises(ValueError, match="give a list"):
        expand({"a": []})


def test_one_run_leaves_its_account_and_is_not_run_twice(tmp_path, measure):
    run = execute(measure, {"seed": 2}, tmp_path / "reports", "s")
    assert run.result == {"task": "easy", "sum": 2.5}
    assert run.params == {"seed": 2, "share": 0.5, "flag": False, "data_dir": None, "task": "easy"}
    assert sorted(path.name for path in run.folder.iterdir()) == ["params.json", "result.json", "run.ipynb"]

    account = run.folder / "run.ipynb"
    injected = [cell.source for cell in nbformat.read(account, 4).cells
                if "injected-parameters" in cell.metadata.get("tags", [])]
    assert len(injected) == 1 and "seed = 2" in injected[0]
    before = account.stat().st_mtime_ns
    assert execute(measure, {"seed": 2}, tmp_path / "reports", "s").folder == run.folder
    assert account.stat().st_mtime_ns == before


@pytest.mark.parametrize("asked, file", [
    ({"task": "rows.csv"}, "rows.csv"), ({"task": "mine/tone", "data_dir": "data"}, "data/mine/tone/train.csv"),
    ({"structures": ["found.json"]}, "found.json")])
def test_other_content_of_a_file_is_another_question(asked, file, tmp_path, monkeypatch):
    template = write_template(tmp_path / "t.ipynb", RESULT, parameters=PARAMETERS + "structures = []\n")
    monkeypatch.chdir(tmp_path)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("a")
    Path("data").mkdir(exist_ok=True)
    Path("data", "of_another_task").write_text("x")
    once, again = (execute(template, asked, tmp_path, "s") for _ in range(2))
    Path("data", "of_another_task").write_text("y")
    assert once.id == again.id == execute(template, asked, tmp_path, "s").id
    Path(file).write_text("b")
    assert execute(template, asked, tmp_path, "s").id != once.id


def test_a_misspelt_parameter_leaves_no_folder(tmp_path, measure):
    with pytest.raises(UnknownName):
        execute(measure, {"sede": 2}, tmp_path / "reports", "s")
    assert not (tmp_path / "reports").exists()


def test_a_failed_run_keeps_its_traces_and_can_be_run_again(tmp_path):
    switch = tmp_path / "ok"
    fragile = write_template(tmp_path / "fragile.ipynb", f"""\
from pathlib import Path
from s3pet_nb.store import Run
run = Run(run_folder)
run.log({{"step": 1}})
run.save_result({{"sum": 1}})
if not Path({str(switch)!r}).exists():
    raise ValueError("the loss is NaN at step 7; lower lr\\nand more lines")""", "1 + 1")
    cause = "ValueError: the loss is NaN at step 7; lower lr"
    with pytest.raises(RunFailed, match=rf"^{cause} \(see .*run.ipynb\)$") as error:
        execute(fragile, {}, tmp_path / "reports", "s")
    run = error.value.run
    assert not run.done and run.records() == [{"step": 1}]
    assert json.loads((run.folder / "error.json").read_text()) == {"error": cause}
    assert "NaN at step 7" in (run.folder / "run.ipynb").read_text()

    switch.touch()
    assert execute(fragile, {}, tmp_path / "reports", "s").folder == run.folder
    assert run.done and run.records() == [{"step": 1}]
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "log.jsonl", "params.json", "result.json", "run.ipynb"]


def test_a_killed_kernel_and_a_missing_result_are_failures(tmp_path):
    kill = "import os\nimport signal\nos.kill(os.getpid(), signal.SIGKILL)"
    killed = write_template(tmp_path / "killed.ipynb", kill)
    with pytest.raises(RunFailed, match="kernel died") as error:
        execute(killed, {}, tmp_path / "reports", "s")
    assert (error.value.run.folder / "run.ipynb").exists() and not error.value.run.done
    with pytest.raises(RunFailed, match="without a result"):
        execute(write_template(tmp_path / "silent.ipynb", "1"), {}, tmp_path / "reports", "s")


def test_a_grid_goes_on_after_a_failure_in_order(tmp_path):
    fragile = write_template(tmp_path / "fragile.ipynb", "assert seed != 0, 'no zero'", RESULT)
    outcomes = run_grid(fragile, {"share": 1.0}, {"seed": [1, 0, 2]}, tmp_path / "reports", "s")
    assert isinstance(outcomes[1], RunFailed) and "no zero" in str(outcomes[1])
    assert [outcomes[0].result["sum"], outcomes[2].result["sum"]] == [2.0, 3.0]


def test_a_grid_is_checked_before_its_first_run(tmp_path, measure):
    with pytest.raises(ValueError, match="seed is 'x'"):
        run_grid(measure, {}, {"seed": [0, "x"]}, tmp_path / "reports", "s")
    assert not (tmp_path / "reports").exists()


def test_the_kernel_is_this_python_whatever_python3_means_elsewhere(tmp_path, monkeypatch):
    "A user's own python3 kernel and a template saved with an unknown kernel name change nothing."
    impostor = tmp_path / "jupyter" / "kernels" / "python3"
    impostor.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "impostor", "language": "python"}
    (impostor / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    answer = "Run(run_folder).save_result({'python': sys.executable, 'wait': os.environ['OMP_WAIT_POLICY']})"
    cell = "import os\nimport sys\n" + STORE + answer
    which = write_template(tmp_path / "which.ipynb", cell, kernel="my-old-environment")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    result = execute(which, {}, tmp_path / "reports", "s").result
    assert result == {"python": sys.executable, "wait": "PASSIVE"}


def test_what_the_user_has_set_is_left_alone(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    assert "OMP_WAIT_POLICY" not in kernel_environment() and "MALLOC_TRIM_THRESHOLD_" in kernel_environment()


def test_progress_reaches_the_given_stream_and_only_its_end_the_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    bar = write_template(tmp_path / "bar {a}.ipynb", """\
import time
from tqdm import tqdm
for _ in tqdm(range(4), desc="search"):
    time.sleep(0.2)""", RESULT)
    with open(tmp_path / "stderr", "w+", newline="") as stream:
        run = execute(bar, {}, tmp_path / "re{p}orts", "s", stderr=stream)
        stream.seek(0)
        shown = stream.read()
    frames = [frame for frame in shown.split("\r") if "search" in frame]
    assert len(frames) >= 3 and "0/4" in frames[0] and "4/4" in frames[-1]
    assert {len(frame.rstrip("\n")) for frame in frames} == {79}
    cells = nbformat.read(run.folder / "run.ipynb", 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert len(outputs) == 1 and outputs[0].text.count("search") == 1 and "4/4" in outputs[0].text


def test_relative_paths_mean_the_callers_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = "Run(run_folder).save_result({'cwd': os.getcwd()})"
    write_template(tmp_path / "where.ipynb", "import os\n" + STORE + answer)
    run = execute("where.ipynb", {}, "reports", "s")
    assert run.result["cwd"] == os.getcwd() == str(tmp_path)


@pytest.mark.parametrize("text", ["template: 5", "template: MEASURE\nparams: [1]", "template: MEASURE\ngrid: [1]"])
def test_a_file_of_other_shapes_is_no_study(tmp_path, measure, text):
    path = tmp_path / "odd.yml"
    path.write_text(text.replace("MEASURE", str(measure)))
    with pytest.raises(ValueError, match="is no study"):
        study(path)


COUNTING = """\
import json
import os
import signal
from pathlib import Path
from s3pet_nb.store import Run, write_json
run = Run(run_folder)
place = run.checkpoint("count")
found = json.loads(place.read_text()) if place.exists() else {"step": 0, "mark": 0}
run.rewind(found["mark"])
first = not Path("was here").exists()
Path("was here").touch()
for step in range(found["step"] + 1, 7):
    run.log({"step": step, "after": found["step"]})
    if step % 2 == 0 and task == "with checkpoints":
        write_json(place, {"step": step, "mark": run.mark()})
    if step == 5 and first:
        STOP
run.save_result({"sum": 21})"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize("task, stop, cause, after", [
    ("with checkpoints", KILL, "kernel died", 4),
    ("with checkpoints", "raise MemoryError('no 3 GiB more')", "MemoryError: no 3 GiB more", 4),
    ("without", KILL, "kernel died", 0),
])
def test_a_stopped_run_goes_on_from_its_checkpoint_or_starts_over(
        tmp_path, monkeypatch, task, stop, cause, after):
    monkeypatch.chdir(tmp_path)
    counting = write_template(tmp_path / "counting.ipynb", COUNTING.replace("STOP", stop))
    with pytest.raises(RunFailed, match=cause) as failed:
        execute(counting, {"task": task}, tmp_path / "reports", "s")
    run = failed.value.run
    assert [record["step"] for record in run.records()] == [1, 2, 3, 4, 5] and not run.done
    if stop == KILL:  # as if the runner had died with the kernel
        (run.folder / "error.json").unlink()
        (run.folder / "run.ipynb").rename(run.folder / "running.ipynb")
    assert execute(counting, {"task": task}, tmp_path / "reports", "s").folder == run.folder
    assert run.records() == [{"step": step, "after": after if step > after else 0} for step in range(1, 7)]
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "log.jsonl", "params.json", "result.json", "run.ipynb"]


def test_a_run_that_was_killed_after_its_result_starts_again(tmp_path, measure):
    run = execute(measure, {}, tmp_path / "reports", "late")
    (run.folder / "run.ipynb").rename(run.folder / "running.ipynb")
    (run.folder / "result.json").write_text('{"stale": true}')
    again = execute(measure, {}, tmp_path / "reports", "late")
    assert again.folder == run.folder and "stale" not in again.result
    assert (again.folder / "run.ipynb").exists() and not (again.folder / "running.ipynb").exists()
