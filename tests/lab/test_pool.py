"Studies on this machine: what is run, what is tried again, what is said of it."
import json
import os
import subprocess
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from templates import write_counting, write_template

import s3pet_nb.lab.pool
from s3pet_nb.core import UnknownName, machine
from s3pet_nb.lab.live import StudyMonitor
from s3pet_nb.lab.pool import (STATUS, Job, Local, Rules, carry_out, cores, end_orphans, finished, gpu_use, gpus, job_status,
                               plan, recorded, run_study, seconds_left, slot_environments)
from s3pet_nb.lab.run import RUN_MARK, Launch, claim
from s3pet_nb.lab.store import write_json
from s3pet_nb.lab.study import Faults, Question, checked


@pytest.fixture(autouse=True)
def executions(tmp_path, monkeypatch):
    "Where counting templates note that they ran to their end."
    monkeypatch.setenv("EXECUTIONS", str(tmp_path / "executions"))
    (tmp_path / "executions").touch()
    return tmp_path / "executions"


class Scripted:
    "A backend that answers at once, as told, and remembers what it was asked."

    def __init__(self, answers, slots=1):
        self.answers, self.slots, self.asked = answers, slots, []

    def submit(self, task):
        self.asked.append(task)
        run = Question(task["template"], task["params"])
        Path(task["root"], task["study"], run.id).mkdir(parents=True, exist_ok=True)
        answer, future = self.answers(task), Future()
        future.set_exception(answer) if isinstance(answer, Exception) else future.set_result(answer)
        return future

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def counted(tmp_path, seeds, **more):
    "A study of the counting template."
    return checked("count", {"template": str(write_counting(tmp_path / "count.ipynb")), "seeds": seeds, **more})


def task_of(job, tmp_path):
    "What a backend is asked of a job."
    return {"id": job.id, "template": job.question.template, "params": job.question.params, "root": str(tmp_path),
            "study": "count", "time_limit": None, "again": False}


def test_a_study_is_run_and_only_what_is_missing_is_run_again(tmp_path, executions):
    asked = counted(tmp_path, [0, 1, 2])
    with pytest.raises(FileNotFoundError):
        os.stat(tmp_path / "reports")
    ended = run_study(asked, tmp_path / "reports", Local(2))
    assert [job.state for job in ended.jobs] == ["done"] * 3 and ended.ended == "done"
    sums = [json.loads((job.folder / "result.json").read_text())["sum"] for job in ended.jobs]
    assert len(set(sums)) == 3
    (ended.jobs[1].folder / "result.json").unlink()
    again = run_study(asked, tmp_path / "reports", Local(1))
    assert [job.before for job in again.jobs] == [True, False, True]
    assert executions.read_text().split() == [*executions.read_text().split()[:3], ended.jobs[1].id]
    assert (ended.jobs[0].folder / "report.html").exists()
    assert recorded(tmp_path / "reports" / "count") == asked


def test_force_runs_what_is_done_and_only_chooses(tmp_path):
    asked = counted(tmp_path, [0, 1, 2])
    backend = Scripted(lambda task: {"done": True, "note": ""})
    for job in plan(asked, tmp_path):
        job.folder.mkdir(parents=True)
        (job.folder / "result.json").write_text("{}")
    assert [job.state for job in plan(asked, tmp_path)] == ["done"] * 3
    run_study(asked, tmp_path, backend, only=["seed=1"], force=True)
    assert [(task["params"]["seed"], task["again"]) for task in backend.asked] == [(1, True)]
    (plan(asked, tmp_path)[2].folder / "result.json").unlink()
    backend.asked.clear()
    run_study(asked, tmp_path, backend, only=["seed=2"], force=True)
    assert [task["again"] for task in backend.asked] == [False], "what was not done goes on from its checkpoint"


def test_only_takes_ids_methods_and_values_and_all_must_hold(tmp_path):
    asked = counted(tmp_path, [0, 1], methods={"fast": {}, "slow": {"params": {"pause": 0.1}}})
    first = plan(asked, tmp_path)[0]
    assert [job.id for job in plan(asked, tmp_path, [first.id[:6]])] == [first.id]
    assert [job.question.method for job in plan(asked, tmp_path, ["slow"])] == ["slow", "slow"]
    assert len(plan(asked, tmp_path, ["method=slow", "seed=1"])) == 1
    with pytest.raises(ValueError, match="no run of study 'count' is seed=7"):
        plan(asked, tmp_path, ["seed=7"])
    with pytest.raises(UnknownName, match="did you mean 'seed'"):
        plan(asked, tmp_path, ["sed=1"])


def test_a_method_is_no_beginning_of_a_name_and_its_name_may_hold_anything(tmp_path):
    asked = counted(tmp_path, list(range(40)), methods={"a": {}, "p=1": {"params": {"pause": 0.1}}})
    assert {job.question.method for job in plan(asked, tmp_path, ["a"])} == {"a"}
    assert {job.question.method for job in plan(asked, tmp_path, ["p=1"])} == {"p=1"}
    with pytest.raises(ValueError, match="no run of study 'count' is b"):
        plan(asked, tmp_path, ["b"])


def test_a_parameter_may_be_called_method(tmp_path):
    path = write_template(tmp_path / "own.ipynb", parameters='run_folder = ""\nmethod = "greedy"\nseed = 0\n')
    asked = checked("own", {"template": str(path), "grid": {"method": ["greedy", "beam"]}, "methods": {"A": {}}})
    assert [job.question.params["method"] for job in plan(asked, tmp_path, ["method=beam"])] == ["beam"]


def test_a_clock_that_is_set_back_holds_up_nothing(tmp_path, monkeypatch):
    asked, tries, now = counted(tmp_path, [0]), [], time.time()

    def answer(task):
        tries.append(task["id"])
        monkeypatch.setattr(s3pet_nb.lab.pool.time, "time", lambda: now - 3600)
        return {"failed": "no luck"}

    run_study(asked, tmp_path, Scripted(answer), Rules(retries=1, pause=0.1))
    assert len(tries) == 2


def test_a_backend_that_breaks_ends_the_study_in_its_status_too(tmp_path):
    class Broken(Scripted):
        def submit(self, task):
            raise MemoryError("no more")

    asked = counted(tmp_path, [0])
    with pytest.raises(MemoryError):
        run_study(asked, tmp_path, Broken(None))
    status = json.loads((tmp_path / "count" / STATUS).read_text())
    assert status["ended"] == "failed" and status["counts"]["running"] == 0


@pytest.mark.parametrize("text", ["{}", "[]", "3", "{", '{"study": 1}'])
def test_files_of_a_study_that_are_spoilt(tmp_path, text):
    run_study(counted(tmp_path, [0]), tmp_path, Scripted(lambda task: {"done": True, "note": ""}))
    monitor = StudyMonitor("count", tmp_path)
    shown = monitor.box.value
    (tmp_path / "count" / STATUS).write_text(text)
    monitor.look()
    assert monitor.over and monitor.box.value == shown
    assert StudyMonitor("count", tmp_path).box.value == ""
    (tmp_path / "count" / "study.json").write_text(text)
    with pytest.raises(ValueError, match="study.json is not what a study writes|has .* fault"):
        recorded(tmp_path / "count")


def test_values_are_chosen_as_they_are_shown(tmp_path):
    asked = counted(tmp_path, [0], grid={"pause": [0.0, 2e-4, 4747.0]})
    for word, value in ("pause=4747", 4747.0), ("pause=2e-4", 2e-4), ("pause=0.0002", 2e-4):
        assert [job.question.params["pause"] for job in plan(asked, tmp_path, [word])] == [value]


def test_two_methods_with_one_question_are_one_run(tmp_path):
    asked = counted(tmp_path, [0, 1], methods={"a": {}, "b": {}})
    assert [job.question.method for job in plan(asked, tmp_path)] == ["a", "a"]
    assert [job.question.method for job in plan(asked, tmp_path, ["b"])] == ["b", "b"]


def test_a_failure_is_tried_again_after_a_pause_that_doubles_and_stops_nobody(tmp_path):
    asked, begun = counted(tmp_path, [0, 1, 2]), {}

    def answer(task):
        begun.setdefault(task["params"]["seed"], []).append(time.monotonic())
        return {"failed": "no luck"} if task["params"]["seed"] == 1 else {"done": True, "note": ""}

    ended = run_study(asked, tmp_path, Scripted(answer), Rules(retries=2, pause=1.5))
    assert [job.state for job in ended.jobs] == ["done", "failed", "done"] and ended.ended == "failed"
    first, second, third = begun[1]
    assert second - first >= 1.5 and third - second >= 3 and begun[2][0] < second
    assert ended.jobs[1].cause == "no luck" and ended.jobs[1].attempts == 3


def test_a_template_that_changes_while_its_study_runs_fails_and_answers_nothing_else(tmp_path, executions):
    asked = counted(tmp_path, [0, 1])

    def answer(task):
        write_counting(tmp_path / "count.ipynb", "'another template'")
        return carry_out(task, Launch())

    ended = run_study(asked, tmp_path, Scripted(answer), Rules(retries=0))
    assert [job.state for job in ended.jobs] == ["failed"] * 2 and not executions.read_text()
    assert all("have changed since the study began" in job.cause for job in ended.jobs)


def test_force_holds_until_a_run_was_begun_anew(tmp_path):
    asked = counted(tmp_path, [0])
    (job,) = plan(asked, tmp_path)
    job.folder.mkdir(parents=True)
    (job.folder / "result.json").write_text("{}")
    answers = iter([{"failed": "the node has another version"}, {"done": True, "note": ""}])
    backend = Scripted(lambda task: next(answers))
    run_study(asked, tmp_path, backend, Rules(pause=0.01), force=True)
    assert [task["again"] for task in backend.asked] == [True, True]


def test_a_kernel_that_another_owner_has_by_now_is_left_alone(tmp_path):
    "A node that died before it owned its run must not cost the one who does own it."
    asked = counted(tmp_path, [0])
    (job,) = plan(asked, tmp_path)
    answers = iter([RuntimeError("the node died"), {"done": True, "note": ""}])
    kernel = subprocess.Popen(["sleep", "600"], env=os.environ | {RUN_MARK: str(job.folder.resolve())})
    with claim(job.folder):
        run_study(asked, tmp_path, Scripted(lambda task: next(answers)), Rules(pause=0.01))
        assert kernel.poll() is None
    answers = iter([RuntimeError("the node died"), {"done": True, "note": ""}])
    run_study(asked, tmp_path, Scripted(lambda task: next(answers)), Rules(pause=0.01))
    assert kernel.poll() is not None


@pytest.mark.parametrize("script, found", [
    ("echo 'A100, 50, 1024, 81920'", [{"name": "A100", "busy": 0.5, "memory_mb": 1024, "total_mb": 81920}]),
    ("echo 'NVIDIA-SMI has failed because it could not talk to the driver'; exit 9", []),
    ("echo 'GB10, 3, [N/A], [N/A]'", [])])
def test_what_nvidia_smi_does_not_tell_is_left_out(tmp_path, monkeypatch, script, found):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu_use() == found


def test_what_dies_with_its_node_is_tried_again(tmp_path):
    answers = iter([RuntimeError("the node died"), {"done": True, "note": ""}])
    ended = run_study(counted(tmp_path, [0]), tmp_path, Scripted(lambda task: next(answers)), Rules(pause=0.01))
    assert ended.jobs[0].state == "done" and ended.jobs[0].attempts == 2


def test_after_too_many_failures_no_more_are_begun(tmp_path):
    backend = Scripted(lambda task: {"failed": "no luck"})
    ended = run_study(counted(tmp_path, list(range(5))), tmp_path, backend, Rules(retries=0, max_failures=2))
    assert [job.state for job in ended.jobs] == ["failed", "failed", "left out", "left out", "left out"]
    assert len(backend.asked) == 2


def test_a_run_that_is_run_elsewhere_is_asked_for_again_without_an_attempt(tmp_path, monkeypatch):
    monkeypatch.setattr("s3pet_nb.lab.pool.AGAIN", 0.05)
    answers = iter([{"busy": "by process 7"}, {"busy": "by process 7"}, {"done": True, "note": ""}])
    seen = []
    ended = run_study(counted(tmp_path, [0]), tmp_path, Scripted(lambda task: next(answers)), Rules(retries=0),
                      watch=lambda status: seen.append(status["counts"]["elsewhere"]))
    assert ended.jobs[0].state == "done" and ended.jobs[0].attempts == 1 and 1 in seen


def test_a_slot_says_who_runs_a_run(tmp_path):
    asked = counted(tmp_path, [0])
    with claim(plan(asked, tmp_path)[0].folder), Local(1) as backend:
        task = task_of(plan(asked, tmp_path)[0], tmp_path)
        assert f"process {os.getpid()} on" in backend.submit(task).result()["busy"]


def test_a_full_status_can_be_read_from_its_file(tmp_path):
    asked = counted(tmp_path, [0, 1], title="Counting")
    run_study(asked, tmp_path, Scripted(lambda task: {"done": True, "note": ""}))
    status = json.loads((tmp_path / "count" / STATUS).read_text())
    assert status["counts"]["done"] == status["asked"] == 2 and status["ended"] == "done"
    assert status["title"] == "Counting" and status["jobs"][1]["params"] == {"seed": 1}
    assert status["memory"]["used_mb"] > 1 and status["memory"]["free_mb"] > 1


def test_the_step_of_a_running_run_is_read_from_its_log(tmp_path):
    asked = counted(tmp_path, [0])
    jobs = plan(asked, tmp_path)
    jobs[0].folder.mkdir(parents=True)
    jobs[0].state = "running"
    assert "step" not in job_status(asked, jobs[0])
    (jobs[0].folder / "log.jsonl").write_text('{"event": "step", "phase": "search", "step": 3, "steps": 9}\n{"eve')
    assert job_status(asked, jobs[0])["step"] == 3 and job_status(asked, jobs[0])["phase"] == "search"


def test_what_is_left_is_estimated_by_method_and_slots(tmp_path):
    asked = counted(tmp_path, [0, 1], methods={"fast": {}, "slow": {"params": {"pause": 0.1}}})
    jobs = plan(asked, tmp_path)
    fast, slow = (next(job for job in jobs if job.question.method == method) for method in ("fast", "slow"))
    assert seconds_left(jobs, 1, 0) is None
    over = [replace(fast, state="done", seconds=seconds) for seconds in (10.0, 20.0)]
    assert seconds_left(jobs + over, 1, 0) == 60 and seconds_left(jobs + over, 4, 0) == 15
    over += [replace(slow, state="done", seconds=100.0)]
    assert seconds_left(jobs + over, 2, 0) == (15 + 15 + 100 + 100) / 2
    assert seconds_left(over, 2, 0) == 0
    jobs[0].state, jobs[0].since = "running", 90
    assert seconds_left(jobs + over, 1, 100) == 5 + 15 + 200


def test_a_result_beside_a_running_notebook_is_none(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    assert finished(tmp_path)
    (tmp_path / "running.ipynb").touch()
    assert not finished(tmp_path) and not finished(tmp_path / "gone")


def test_threads_are_divided_and_each_gpu_has_a_slot(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cores() == 8 and gpus() == []
    assert slot_environments(3) == [{"OMP_NUM_THREADS": "2"}] * 3 and Local().slots == 1
    assert slot_environments(16)[0] == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert Local().slots == 2
    assert [share["CUDA_VISIBLE_DEVICES"] for share in slot_environments(3)] == ["3", "5", "3"]


@pytest.mark.parametrize("rules", [{"retries": -1}, {"pause": -1}, {"max_failures": 0}, {"time_limit": 0}])
def test_rules_that_make_no_sense_are_refused(rules):
    with pytest.raises(ValueError, match=f"{next(iter(rules))} is .*; give at least"):
        Rules(**rules)


def test_a_page_that_cannot_be_drawn_costs_no_result(tmp_path):
    asked = counted(tmp_path, [0])
    job = run_study(asked, tmp_path, Local(1)).jobs[0]
    (job.folder / "report.html").unlink()
    (job.folder / "run.ipynb").write_text("torn")
    with Local(1) as backend:
        answer = backend.submit(task_of(job, tmp_path)).result()
    assert answer["done"] and answer["note"].startswith("no page: ") and finished(job.folder)


def test_a_page_that_was_not_written_is_drawn_by_the_next_call(tmp_path):
    asked = counted(tmp_path, [0, 1])
    before = [job.folder for job in run_study(asked, tmp_path, Local(2)).jobs]
    for folder in before:
        (folder / "report.html").unlink()
    (before[0] / "run.ipynb").write_text("torn")
    results = [(folder / "result.json").stat().st_mtime_ns for folder in before]
    torn, whole = run_study(asked, tmp_path, Local(2)).jobs
    assert torn.state == "done" and torn.cause.startswith("no page: ") and not (torn.folder / "report.html").exists()
    assert whole.cause == "" and "<html" in (whole.folder / "report.html").read_text()
    assert [(folder / "result.json").stat().st_mtime_ns for folder in before] == results


def test_a_template_that_went_bad_after_the_study_was_read_is_one_sentence(tmp_path):
    asked = counted(tmp_path, [0])
    task = task_of(plan(asked, tmp_path)[0], tmp_path)
    (tmp_path / "count.ipynb").write_text("{")
    with Local(1) as backend:
        assert "is not a notebook; restore it" in backend.submit(task).result()["failed"]
    with pytest.raises(Faults, match="is not a notebook"):
        checked("count", {"template": asked.template})


def test_a_job_knows_its_run(tmp_path):
    job = plan(counted(tmp_path, [4]), tmp_path)[0]
    assert isinstance(job, Job) and job.folder == tmp_path / "count" / job.id


def test_the_colours_of_an_error_do_not_reach_the_terminal(tmp_path):
    broken = write_template(tmp_path / "broken.ipynb", r"raise ValueError('\x1b[31mlower lr\x1b[0m')")
    ended = run_study(checked("broken", {"template": str(broken)}), tmp_path, Local(1), Rules(retries=0))
    assert ended.jobs[0].cause.startswith("ValueError: lower lr (see ")


def test_a_failing_cell_has_its_page_and_its_sentence(tmp_path):
    broken = write_template(tmp_path / "broken.ipynb", "raise ValueError('lower lr <b>')")
    ended = run_study(checked("broken", {"template": str(broken)}), tmp_path, Local(1), Rules(retries=0))
    job = ended.jobs[0]
    assert job.state == "failed" and job.cause.startswith("ValueError: lower lr <b> (see ")
    assert "lower lr &lt;b&gt;" in (job.folder / "report.html").read_text()


def test_what_kernels_print_stays_off_the_terminal(tmp_path, capfd):
    noisy = write_template(tmp_path / "noisy.ipynb", """\
import os, signal, subprocess, sys
os.write(1, b"raw\\n"), os.write(2, b"raw\\n")
subprocess.run(["sh", "-c", "echo below; echo below >&2"])
print("printed"), print("printed", file=sys.stderr)
if seed == 1:
    os.kill(os.getpid(), signal.SIGKILL)
from s3pet_nb.lab.store import Run
Run(run_folder).save_result({"rows": []})""")
    asked = checked("noisy", {"template": str(noisy), "seeds": [0, 1]})
    ended = run_study(asked, tmp_path, Local(2), Rules(retries=0))
    assert [job.state for job in ended.jobs] == ["done", "failed"] and "kernel died" in ended.jobs[1].cause
    assert capfd.readouterr() == ("", "")
    assert "printed" in (ended.jobs[0].folder / "run.ipynb").read_text()


def test_each_slots_kernels_have_its_threads_and_its_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    where = write_template(tmp_path / "where.ipynb", """\
import os, time
from s3pet_nb.lab.store import Run
others, mine = os.path.dirname(run_folder), os.path.join(run_folder, "here")
open(mine, "w").close()
while sum(os.path.exists(os.path.join(others, name, "here")) for name in os.listdir(others)) < 2:
    time.sleep(0.1)
Run(run_folder).save_result({name: os.environ[name] for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")})""")
    asked = checked("where", {"template": str(where), "seeds": [0, 1]})
    ended = run_study(asked, tmp_path, Local(), Rules(retries=0, time_limit=120))
    results = [json.loads((job.folder / "result.json").read_text()) for job in ended.jobs]
    assert {result["OMP_NUM_THREADS"] for result in results} == {"4"}
    assert {result["CUDA_VISIBLE_DEVICES"] for result in results} == {"3", "5"}


@pytest.mark.parametrize("host, waits", [("elsewhere", [7.0]), (machine(), [])])
def test_what_a_dead_owner_elsewhere_left_gets_its_time_here_as_well(tmp_path, monkeypatch, host, waits):
    asked = []
    monkeypatch.setattr("s3pet_nb.lab.run.GRACE", 7.0)
    monkeypatch.setattr("s3pet_nb.lab.run.time.sleep", asked.append)
    (tmp_path / "s" / ".locks").mkdir(parents=True)
    write_json(tmp_path / "s" / ".locks" / "one.json", {"machine": host, "who": "process 1"})
    end_orphans(tmp_path / "s" / "one")
    assert asked == waits
