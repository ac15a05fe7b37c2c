"Whatever happens to a study, calling it again brings every result, each once, and leaves nothing running."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from templates import write_counting

from s3pet_nb.lab.pool import Local, Rules, run_study
from s3pet_nb.lab.run import RUN_MARK
from s3pet_nb.lab.study import study

RUNS = 40
STUDY = """\
import json, sys
from s3pet_nb.lab.pool import Local, Rules, run_study
from s3pet_nb.lab.study import study
rules = json.loads(sys.argv[3])
ended = run_study(study(sys.argv[1]), sys.argv[2], Local(2), Rules(**rules))
sys.exit(len(ended.of("failed", "left out")) > 0)"""
STUMBLE = """\
import time
from functools import partial
from pathlib import Path
if not Path(RELIEF).exists():
    if seed == 7:
        raise FloatingPointError("the loss is NaN at step 1; lower lr")
    if seed == 8:
        time.sleep(600)"""


def write_study(folder, seeds, *cells):
    "The file of a study of counting runs."
    template = write_counting(folder / "count.ipynb", *cells)
    (folder / "count.yml").write_text(f"template: {template}\nseeds: {list(seeds)}\n")
    return folder / "count.yml"


def call(path, root, environment, **rules):
    "A process that runs a study."
    return subprocess.Popen([sys.executable, "-c", STUDY, str(path), str(root), json.dumps(rules)],
                            env=os.environ | environment, stderr=subprocess.DEVNULL,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell may ignore it


def kernels(root):
    "Processes that run a run under `root`."
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(RUN_MARK, "").startswith(str(root.resolve())):
                found.append(process)
        except psutil.Error:
            continue
    return found


def gone(root, seconds=30):
    "Whether no kernel is left, a moment after the study ended."
    for _ in range(10 * seconds):
        if not kernels(root):
            return True
        time.sleep(0.1)
    return False


def results(root):
    "What every run of a study says, by its name."
    return {path.parent.name: json.loads(path.read_text()) for path in (root / "count").glob("*/result.json")}


def kill(process):
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        pass


def disturb(running, root, kinds, dice):
    "Kill kernels and the study itself at random times, until it ended or nothing is left to be killed."
    while kinds and running.poll() is None:
        time.sleep(dice.uniform(0.2, 1.5))
        try:
            victims = {"kernel": kernels(root), "study": [psutil.Process(running.pid)]}[kinds[-1]]
        except psutil.Error:
            continue
        if victims:
            kill(dice.choice(victims))
            kinds.pop()
    return running.wait()


def undisturbed(seed):
    "What a run's result is when nothing happens to it."
    total = 0
    for step in range(10):
        total = (31 * total + seed + step) % 1_000_003
    return {"task": "count", "seconds": 1.0, "budget": 1, "sum": total,
            "rows": [{"label": "searched", "test": total, "n_params": 1}]}


def test_forty_runs_survive_whatever_is_killed(tmp_path):
    "SIGKILL of kernels and of the study, a template that raises and one that hangs, in one study."
    relief, root = tmp_path / "relief", tmp_path / "reports"
    path = write_study(tmp_path, range(RUNS), STUMBLE.replace("RELIEF", repr(str(relief))))
    environment = {"EXECUTIONS": str(tmp_path / "executions")}
    dice, kinds = random.Random(0), ["study", "kernel", "kernel", "study", "kernel", "study", "kernel"]
    while kinds:
        code = disturb(call(path, root, environment, retries=1, pause=0.1, time_limit=20), root, kinds, dice)
    if code == 0:
        pytest.fail("the run that raises and the one that hangs cannot have a result yet")
    relief.touch()
    assert call(path, root, environment, retries=3, pause=0.1).wait() == 0
    assert gone(root)

    jobs = {question.id: question.params["seed"] for question in study(path).questions()}
    found = results(root)
    assert {jobs[name]: result for name, result in found.items()} == {
        seed: undisturbed(seed) for seed in range(RUNS)}
    for name in found:
        records = [json.loads(line) for line in (root / "count" / name / "log.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == list(range(1, 11))
        assert sorted(path.name for path in (root / "count" / name).iterdir()) == [
            "log.jsonl", "params.json", "report.html", "result.json", "run.ipynb"]
    assert not list((root / "count" / ".locks").glob("*.json")) and not list(root.rglob("*.tmp"))


def test_a_full_disk_fails_what_does_not_fit_and_nothing_else(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount"] if os.geteuid() == 0 else ["sudo", "-n", "mount"]
    small = [*mount, "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)]
    if shutil.which(mount[0]) is None or subprocess.run(small, capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    path, environment = write_study(tmp_path, range(6)), {"EXECUTIONS": str(tmp_path / "executions")}
    try:
        assert call(path, disk / "reports", environment, retries=0).wait() == 1
        before = results(disk / "reports")
        assert len(before) < 6
        subprocess.run([*mount, "-o", "remount,size=64m", str(disk)], check=True)
        assert call(path, disk / "reports", environment).wait() == 0
        after = results(disk / "reports")
        assert len(after) == 6 and before.items() <= after.items()
        assert sorted(result["sum"] for result in after.values()) == sorted(
            undisturbed(seed)["sum"] for seed in range(6))
        assert gone(disk)
    finally:
        subprocess.run([*mount[:-1], "umount", "-l", str(disk)], check=True)


def test_two_studies_at_once_run_every_run_once(tmp_path):
    path, environment = write_study(tmp_path, range(8)), {"EXECUTIONS": str(tmp_path / "executions")}
    both = [call(path, tmp_path / "reports", environment) for _ in range(2)]
    assert [running.wait() for running in both] == [0, 0]
    executed = (tmp_path / "executions").read_text().split()
    assert sorted(executed) == sorted(results(tmp_path / "reports")) and len(executed) == 8


def test_an_interrupted_study_leaves_the_runs_of_another_alone(tmp_path):
    path, environment = write_study(tmp_path, range(10)), {"EXECUTIONS": str(tmp_path / "executions")}
    one, other = [call(path, tmp_path / "reports", environment, retries=0) for _ in range(2)]
    while len(results(tmp_path / "reports")) < 2 and one.poll() is None:
        time.sleep(0.05)
    one.send_signal(signal.SIGINT)
    assert one.wait(60) not in (0, None) and other.wait() == 0, "with no retries, as no kernel of it was ended"
    assert len(results(tmp_path / "reports")) == 10 and gone(tmp_path / "reports")


def test_an_interrupt_ends_cleanly_and_the_next_call_goes_on_from_the_checkpoint(tmp_path):
    template = write_counting(tmp_path / "count.ipynb", steps=400, pause=0.05)
    (tmp_path / "count.yml").write_text(f"template: {template}\nseeds: [0]\n")
    command = [sys.executable, "-c", "from s3pet_nb.cli import main; main()", "study", str(tmp_path / "count.yml"),
               "--out", str(tmp_path / "reports")]
    environment = os.environ | {"EXECUTIONS": str(tmp_path / "executions")}
    begin = partial(subprocess.Popen, command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                    text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell may ignore it
    running = begin()
    folder = tmp_path / "reports" / "count" / study(tmp_path / "count.yml").questions()[0].id
    saved = folder / "checkpoints" / "count.safetensors"
    for _ in range(1200):
        if saved.exists() and json.loads(saved.read_text())["step"] >= 9:
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130 and "interrupted; give the same command again" in said
    assert gone(tmp_path / "reports") and not list((tmp_path / "reports" / "count" / ".locks").glob("*.json"))
    before = json.loads(saved.read_text())
    assert 9 <= before["step"] < 400

    again = begin()
    for _ in range(1200):
        if json.loads(saved.read_text())["step"] > before["step"]:
            break
        time.sleep(0.1)
    again.send_signal(signal.SIGTERM)  # as a cluster's scheduler does
    _, said = again.communicate(timeout=120)
    assert again.returncode == 130 and "interrupted; give the same command again" in said
    assert json.loads((tmp_path / "reports" / "count" / "status.json").read_text())["ended"] == "interrupted"
    assert gone(tmp_path / "reports")
    records = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert records == list(range(1, len(records) + 1)) and len(records) > before["step"]


def test_a_corrupt_template_is_refused_before_anything_runs(tmp_path):
    path = write_study(tmp_path, [0, 1])
    whole = Path(tmp_path / "count.ipynb").read_text()
    Path(tmp_path / "count.ipynb").write_text(whole[:len(whole) // 2])
    running = subprocess.run([sys.executable, "-c", "from s3pet_nb.cli import main; main()", "study", str(path),
                              "--out", str(tmp_path / "reports")], capture_output=True, text=True)
    assert running.returncode == 1 and "is not a notebook; restore it" in running.stderr
    assert not (tmp_path / "reports").exists()


def test_a_torn_notebook_of_a_killed_run_is_written_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("EXECUTIONS", str(tmp_path / "executions"))
    asked = study(write_study(tmp_path, [0]))
    folder = tmp_path / "reports" / "count" / asked.questions()[0].id
    folder.mkdir(parents=True)
    (folder / "running.ipynb").write_text('{"cells": [')
    (folder / "result.json").write_text('{"sum": -1}')
    ended = run_study(asked, tmp_path / "reports", Local(1), Rules(retries=0))
    assert ended.jobs[0].state == "done" and json.loads((folder / "result.json").read_text())["sum"] >= 0
    assert not (folder / "running.ipynb").exists()
