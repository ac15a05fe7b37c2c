"One run: its account, its failures, and how it goes on."
import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from templates import PARAMETERS, RESULT, STORE, write_template

from s3pet_nb.core import UnknownName
from s3pet_nb.lab.run import RunFailed, execute, kernel_environment


@pytest.fixture
def measure(tmp_path):
    return write_template(tmp_path / "measure.ipynb", RESULT)


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
    ({"structures": ["found.json"]}, "found.json"), ({"start": "found.json"}, "found.json")])
def test_other_content_of_a_file_is_another_question(asked, file, tmp_path, monkeypatch):
    template = write_template(tmp_path / "t.ipynb", RESULT, parameters=PARAMETERS + "structures = []\nstart = \"\"\n")
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
from s3pet_nb.lab.store import Run
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


def test_a_kernel_closes_what_its_notebook_opened(tmp_path):
    opened = write_template(tmp_path / "opened.ipynb", STORE + f"""\
assert not {{"atexit", "gc"}} & set(globals())
import atexit
import tempfile
from pathlib import Path
kept = tempfile.TemporaryDirectory(dir={str(tmp_path)!r}, prefix="kept")
atexit.register(Path({str(tmp_path / "closed")!r}).touch)
Run(run_folder).save_result({{"folder": kept.name}})""")
    assert Path(execute(opened, {}, tmp_path / "reports", "s").result["folder"]).name.startswith("kept")
    assert (tmp_path / "closed").exists() and not list(tmp_path.glob("kept*"))


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


COUNTING = """\
import json
import os
import signal
from pathlib import Path
from s3pet_nb.lab.store import Run, write_json
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
