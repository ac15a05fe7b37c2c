"One run: its account, its failures, how it goes on, and that it has one owner at a time."
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pytest
from templates import PARAMETERS, RESULT, STORE, write_template

from s3pet_nb.core import UnknownName
from s3pet_nb.core import machine
from s3pet_nb.lab import run as module
from s3pet_nb.lab.run import RUN_MARK, Busy, Launch, RunFailed, answer, claim, execute, kernel_environment, kernels_of
from s3pet_nb.lab.study import Question


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


HOLD = """\
import sys, time
from s3pet_nb.lab.run import claim
with claim(sys.argv[1]):
    print("mine", flush=True)
    time.sleep(600)"""


@pytest.fixture
def holder(tmp_path):
    "A process that holds the run study/run."
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "study" / "run")],
                               stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()


def take(folder):
    with claim(folder):
        pass


def test_a_living_owner_is_named_and_left_alone(tmp_path, holder):
    host = re.escape(machine().partition(" ")[0])
    with pytest.raises(Busy, match=rf"^run study/run is being run by process {holder.pid} on {host} since "
                                   r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC; wait for it, or stop that process$"):
        take(tmp_path / "study" / "run")
    os.kill(holder.pid, 0)
    take(tmp_path / "study" / "another run")


def test_a_killed_owner_is_followed_at_once_and_known_to_its_follower(tmp_path, holder):
    holder.kill()
    holder.wait()
    with claim(tmp_path / "study" / "run") as dead:
        assert f"process {holder.pid} on" in dead["who"] and dead["machine"] == machine()
    with claim(tmp_path / "study" / "run") as dead:
        assert dead == {}, "an owner that gave the run back is not a dead one"


def test_a_stopped_owner_is_no_dead_one(tmp_path, holder):
    "However long it is silent: it may go on, and write."
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(Busy):
        take(tmp_path / "study" / "run")


def test_what_an_owner_left_that_was_killed_while_it_took_a_run_is_removed(tmp_path):
    locks = tmp_path / "study" / ".locks"
    locks.mkdir(parents=True)
    torn = subprocess.run([sys.executable, "-c", """\
import os, signal, sys
from pathlib import Path
from s3pet_nb.core import writing
with writing(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)""", str(locks / "run.json")])
    assert torn.returncode < 0 and len(list(locks.glob(".*.tmp"))) == 1
    take(tmp_path / "study" / "run")
    assert not list(locks.glob(".*.tmp"))


def test_of_many_that_want_a_dead_owners_run_one_gets_it(tmp_path, holder):
    holder.kill()
    holder.wait()
    owners, refused, start, over = [], [], threading.Barrier(8), threading.Event()

    def want(k):
        start.wait()
        try:
            with claim(tmp_path / "study" / "run"):
                owners.append(k)
                over.wait(30)
        except Busy:
            refused.append(k)
        if len(refused) == 7:
            over.set()

    threads = [threading.Thread(target=want, args=[k]) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(owners) == 1 and len(refused) == 7


def test_a_lock_leaves_nothing_in_the_runs_folder(tmp_path):
    with claim(tmp_path / "study" / "run"):
        assert not (tmp_path / "study" / "run").exists()
    assert [path.name for path in (tmp_path / "study").iterdir()] == [".locks"]
    assert [path.name for path in (tmp_path / "study" / ".locks").iterdir()] == ["run.lock"]


@pytest.mark.parametrize("text", ["", "[]", '{"pid": 1}', '{"who": "process 1', "\0\0"])
def test_an_owner_that_cannot_be_read_is_still_one_and_no_hindrance_once_dead(tmp_path, text):
    note = tmp_path / "study" / ".locks" / "run.json"
    with claim(tmp_path / "study" / "run"):
        note.write_text(text)
        with pytest.raises(Busy, match="^run study/run is being run by another process; wait"):
            take(tmp_path / "study" / "run")
        note.write_text(text)
    note.write_text(text)
    take(tmp_path / "study" / "run")
    assert not note.exists()


def test_kernels_that_a_dead_owner_left_are_ended_before_the_run_begins_anew(tmp_path, measure):
    question = Question.of(measure, {})
    folder = tmp_path / "reports" / "s" / question.id
    kernel = subprocess.Popen(["sleep", "600"], env=os.environ | {RUN_MARK: str(folder)})
    other = subprocess.Popen(["sleep", "600"], env=os.environ | {RUN_MARK: str(folder) + "0"})
    with claim(folder):
        with pytest.raises(Busy):
            answer(question, tmp_path / "reports", "s", Launch())
        assert kernel.poll() is None, "it may be the owner's"
    assert answer(question, tmp_path / "reports", "s", Launch()).done
    assert kernel.poll() is not None and other.poll() is None
    other.kill()
    other.wait()


@pytest.mark.parametrize("host, waits", [("elsewhere", [7.0]), (machine(), [])])
def test_a_kernel_on_another_machine_gets_time_to_end_itself(tmp_path, measure, monkeypatch, host, waits):
    question, asked = Question.of(measure, {}), []
    execute(measure, {}, tmp_path / "reports", "s")
    monkeypatch.setattr(module, "GRACE", 7.0)
    monkeypatch.setattr(module.time, "sleep", asked.append)
    note = tmp_path / "reports" / "s" / ".locks" / f"{question.id}.json"
    note.write_text(json.dumps({"machine": host, "who": "process 1 on elsewhere since 2026-01-01 00:00:00 UTC"}))
    answer(question, tmp_path / "reports", "s", Launch())
    assert asked == waits


SLOW = """\
import time
from pathlib import Path
Path(run_folder, "began").touch()
time.sleep(600)"""


def began(folder):
    for _ in range(600):
        if (folder / "began").exists():
            return True
        time.sleep(0.1)
    return False


def test_a_run_that_is_stopped_on_purpose_has_not_failed(tmp_path):
    question, launch = Question.of(write_template(tmp_path / "slow.ipynb", SLOW), {}), Launch()
    folder, outcome = tmp_path / "reports" / "s" / question.id, []

    def go():
        try:
            answer(question, tmp_path / "reports", "s", launch)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=go)
    thread.start()
    assert began(folder) and kernels_of(folder)
    launch.stop.set()
    thread.join(30)
    assert not thread.is_alive() and not kernels_of(folder) and not isinstance(outcome[0], RunFailed)
    assert sorted(path.name for path in folder.iterdir()) == ["began", "params.json", "run.ipynb"]
    take(folder)


def test_what_is_over_its_time_says_so_and_a_kernel_gets_its_slots_environment(tmp_path):
    late = write_template(tmp_path / "late.ipynb", "import os\nprint(os.environ['SLOT'])", SLOW)
    launch = Launch({"SLOT": "the second"}, time_limit=4)
    with pytest.raises(RunFailed, match="^it ran for more than its limit of 4 s ") as failed:
        answer(Question.of(late, {}), tmp_path / "reports", "s", launch)
    folder = failed.value.run.folder
    assert json.loads((folder / "error.json").read_text()) == {"error": "it ran for more than its limit of 4 s"}
    assert "the second" in (folder / "run.ipynb").read_text() and not kernels_of(folder)


@pytest.mark.parametrize("moment", ["as its kernel starts", "while its cells run"])
def test_a_kernel_ends_when_its_process_is_killed(tmp_path, moment):
    template = write_template(tmp_path / "slow.ipynb", SLOW)
    folder = tmp_path / "reports" / "s" / Question.of(template, {}).id
    runner = subprocess.Popen([sys.executable, "-c", f"""\
from s3pet_nb.lab.run import execute
execute({str(template)!r}, {{}}, {str(tmp_path / "reports")!r}, "s")"""])
    if moment == "while its cells run":
        assert began(folder)
    for _ in range(6000):
        if kernels_of(folder):
            break
        time.sleep(0.01)
    assert kernels_of(folder) and runner.poll() is None
    runner.kill()
    runner.wait()
    for _ in range(300):
        if not kernels_of(folder):
            break
        time.sleep(0.1)
    assert not kernels_of(folder)
    take(folder)
