"One owner at a time: what a second one meets, and when a dead one's run is taken over."
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from s3pet_nb.lab.lock import Busy, Claim, claim, owner, runs_here

HOLD = """\
import sys, time
from s3pet_nb.lab.lock import claim
with claim(sys.argv[1]):
    print("mine", flush=True)
    time.sleep(600)"""


def hold(folder):
    "A process that holds a run."
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    return process


def test_a_living_owner_is_named_and_left_alone(tmp_path):
    process = hold(tmp_path / "study" / "run")
    try:
        with pytest.raises(Busy, match=f"run study/run is being run by process {process.pid} on"):
            Claim(tmp_path / "study" / "run").take()
    finally:
        process.kill()
        process.wait()


def test_a_killed_owner_is_seen_at_once(tmp_path):
    process = hold(tmp_path / "study" / "run")
    process.kill()
    process.wait()
    with claim(tmp_path / "study" / "run", silence=3600) as mine:
        assert mine.held()["pid"] == os.getpid()


def test_a_dead_owners_claim_can_be_forgotten_and_a_living_ones_not(tmp_path):
    process = hold(tmp_path / "study" / "run")
    waiting = Claim(tmp_path / "study" / "run")
    waiting.forget()
    assert waiting.held()["pid"] == process.pid
    process.kill()
    process.wait()
    waiting.forget()
    assert waiting.held() is None


def test_a_number_that_another_process_has_by_now_is_no_owner(tmp_path):
    assert not runs_here(owner() | {"started": time.time() - 10_000})


def test_what_an_owner_left_that_was_killed_while_it_took_a_run_is_removed(tmp_path):
    waiting = Claim(tmp_path / "study" / "run")
    torn = subprocess.run([sys.executable, "-c", """\
import os, signal, sys
from pathlib import Path
from s3pet_nb.core import writing
with writing(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)""", str(waiting.path)])
    assert torn.returncode < 0 and len(list(waiting.path.parent.glob(".*.tmp"))) == 1
    waiting.take()
    assert not list(waiting.path.parent.glob(".*.tmp"))


@pytest.mark.parametrize("step", [-3600, 5, 3600])
def test_an_owner_lives_when_the_clock_is_set(monkeypatch, step):
    before, started, boot = owner(), psutil.Process.create_time, psutil.boot_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: started(process) + step)
    monkeypatch.setattr(psutil, "boot_time", lambda: boot() + step)
    assert runs_here(before)


def test_an_owner_elsewhere_is_dead_after_its_silence_alone(tmp_path):
    far = Claim(tmp_path / "study" / "run")
    far.me |= {"host": "elsewhere", "pid": 1}
    far.take()
    with pytest.raises(Busy, match="on elsewhere"):
        Claim(tmp_path / "study" / "run").take()
    long_ago = time.time() - 61
    os.utime(far.path, (long_ago, long_ago))
    near = Claim(tmp_path / "study" / "run")
    near.take()
    assert near.held() == near.me and not far.beat()
    far.release()
    assert near.held() == near.me


def test_of_many_that_want_a_dead_owners_run_one_gets_it(tmp_path):
    left = Claim(tmp_path / "study" / "run")
    left.me |= {"pid": 2 ** 22 + 1}  # larger than any process number
    left.take()
    got, start = [], threading.Barrier(8)

    def want():
        mine = Claim(tmp_path / "study" / "run")
        start.wait()
        try:
            mine.take()
            got.append(mine)
        except Busy:
            pass

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and got[0].held() == got[0].me


def test_an_owner_is_told_that_its_run_was_taken_over(tmp_path):
    told = threading.Event()
    with claim(tmp_path / "study" / "run", lost=lambda mine: told.set(), heartbeat=0.01) as mine:
        thief = Claim(tmp_path / "study" / "run")
        with thief.guard:
            thief.path.write_text('{"host": "elsewhere", "pid": 1, "started": 0, "token": "other"}')
        assert told.wait(10)
    assert mine.held()["token"] == "other"


def test_heartbeats_keep_a_run(tmp_path):
    with claim(tmp_path / "study" / "run", heartbeat=0.02) as mine:
        long_ago = time.time() - 100
        os.utime(mine.path, (long_ago, long_ago))
        for _ in range(500):
            if time.time() - mine.path.stat().st_mtime < 50:
                break
            time.sleep(0.02)
        assert time.time() - mine.path.stat().st_mtime < 50


def test_nothing_is_left_in_the_runs_folder(tmp_path):
    with claim(tmp_path / "study" / "run"):
        assert not (tmp_path / "study" / "run").exists()
    assert [path.name for path in (tmp_path / "study" / ".locks").iterdir()] == ["guard"]


@pytest.mark.parametrize("text", ["", "[]", '{"host": 1}', '{"host": "elsew', "\0\0"])
def test_a_claim_that_cannot_be_read_is_none(tmp_path, text):
    torn = Claim(tmp_path / "study" / "run")
    torn.path.write_text(text)
    with claim(tmp_path / "study" / "run") as mine:
        assert mine.held() == mine.me
