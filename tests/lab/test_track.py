"Tracking beside the run: what is sent, what a resumed run sends, and that no tracker costs a record."
import json
import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import pytest

from s3pet_nb.core import UnknownName
from s3pet_nb.lab import track
from s3pet_nb.lab.store import Run
from s3pet_nb.lab.track import TRACKERS, Tracked, metrics, tracked
from s3pet_nb.learn.learner import Callback, Checkpoint, Learner

PARAMS = {"task": "agreement", "budget": 2e-4, "baselines": ["bitfit"], "seed": 0}


class Stub:
    "A tracker that remembers its calls, and fails at the one it is told."

    def __init__(self, fails=None):
        self.fails, self.calls = fails, []

    def start(self, run):
        self._called("start", run.id)

    def send(self, rows):
        self._called("send", list(rows))

    def end(self, done):
        self._called("end", done)

    def _called(self, what, detail):
        self.calls.append((what, detail))
        if what == self.fails:
            raise ConnectionError(f"{what}: no route\nto host")

    @property
    def steps(self):
        return [step for what, rows in self.calls if what == "send" for step, _ in rows]


class Halve:
    "A loss that halves with every batch."

    def __init__(self):
        self.loss = 1.0

    def __call__(self, batch):
        self.loss /= 2
        return {"loss": self.loss}

    def state_dict(self):
        return {"loss": self.loss}

    def load_state_dict(self, state):
        self.loss = state["loss"]


class Killed(Callback):
    "Ends the training after a step, and what was not sent yet is lost."

    def __init__(self, at):
        self.at = at

    def after_step(self, learner):
        if learner.step == self.at:
            raise KeyboardInterrupt


def fit(log, steps=6, checkpoint=None, callbacks=()):
    Learner(Halve(), [None], steps, "search", log, callbacks, checkpoint).fit()


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path / "reports", "study", PARAMS, "code")


def step(k, **numbers):
    return {"event": "step", "phase": "search", "step": k, **numbers}


def test_nothing_asked_for_is_the_run_itself(run, monkeypatch):
    monkeypatch.delenv("S3PET_TRACK", raising=False)
    assert tracked(run) is run
    monkeypatch.setenv("S3PET_TRACK", "")
    assert tracked(run) is run


def test_an_unknown_tracker_is_named(run, monkeypatch):
    monkeypatch.setenv("S3PET_TRACK", "mlfow")
    with pytest.raises(UnknownName, match="unknown tracker 'mlfow'; did you mean 'mlflow'"):
        tracked(run)


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_is_said_before_anything_is_logged(run, monkeypatch, name):
    monkeypatch.setenv("S3PET_TRACK", name)
    monkeypatch.setitem(sys.modules, name, None)
    said = f"S3PET_TRACK asks for {name}, .*pip install '{name}.*or unset"
    with pytest.raises(ImportError, match=said) as told:
        tracked(run)
    assert "\n" not in str(told.value) and run.records() == []


@pytest.mark.parametrize("record, sent", [
    (step(1, loss=0.5, n=3), {"search/loss": 0.5, "search/n": 3}),
    (step(1, steps=60, p=[0.1, 0.9], saved=True, reason="by hand", none=None), {}),
    (step(1, loss=float("nan"), zeta=float("inf")), {}),
    (step(1, gate={"name": "global", "tau": 1.0}), {"search/gate.tau": 1.0}),
    ({"event": "space", "budget": 4542}, {}),
    ({"event": "paused", "phase": "search"}, {}),
    ({"phase": "<img src=x>/é", "step": 1, "loss": 0.5}, {"-img-src-x--é/loss": 0.5}),
])
def test_only_finite_numbers_of_a_step_are_metrics(record, sent):
    assert metrics(record) == sent


def test_the_run_has_every_record_and_the_tracker_the_numbers(run):
    stub = Stub()
    log = Tracked(run, stub)
    log.log({"event": "space", "budget": 4542})
    assert stub.calls == [], "opened by the first number only"
    log.log(step(1, loss=0.5, p=[0.1]))
    assert stub.calls == [("start", run.id), ("send", [(1, {"search/loss": 0.5})])], "the first at once"
    log.log(step(2, loss=0.25))
    assert len(stub.calls) == 2, "the next one when it is time"
    run.save_result({"rows": []})
    log.end()
    log.end()
    assert stub.calls[2:] == [("send", [(2, {"search/loss": 0.25})]), ("end", True)]
    log.log(step(3, loss=0.1))
    assert [record.get("step") for record in run.records()] == [None, 1, 2, 3]


def test_numbers_are_sent_again_when_it_is_time(run, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(track.time, "monotonic", lambda: clock.now)
    stub = Stub()
    log = Tracked(run, stub)
    for k in range(1, 9):
        clock.now = k * track.PAUSE / 2
        log.log(step(k, loss=1 / k))
    assert [[number for number, _ in rows] for what, rows in stub.calls if what == "send"] == [
        [1], [2, 3], [4, 5], [6, 7]]


def test_a_log_without_numbers_opens_nothing(run):
    stub = Stub()
    log = Tracked(run, stub)
    log.log({"event": "paused", "phase": "search", "step": 0})
    log.mark()
    log.end()
    assert stub.calls == []


def test_a_killed_run_that_goes_on_lacks_no_step_in_the_tracker(run):
    "The checkpoint is of step 4; step 5 was not sent when the process died, and is taken again."
    path, killed, resumed = run.checkpoint("search"), Stub(), Stub()
    with pytest.raises(KeyboardInterrupt):
        fit(Tracked(run, killed), checkpoint=Checkpoint(path, every=2), callbacks=[Killed(at=5)])
    assert killed.steps == [1, 2, 3, 4]
    log = Tracked(run, resumed)
    fit(log, checkpoint=Checkpoint(path, every=2))
    log.end()
    assert killed.steps + resumed.steps == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in run.records()] == [1, 2, 3, 4, 5, 6]
    assert {what: detail for what, detail in resumed.calls}["start"] == run.id


def test_marks_and_rewinds_are_the_runs(run):
    log = Tracked(run, Stub())
    log.log(step(1, loss=0.5))
    mark = log.mark()
    assert mark == run.mark() > 0
    log.log(step(2, loss=0.25))
    log.rewind(mark)
    assert [record["step"] for record in run.records()] == [1]
    with pytest.raises(ValueError, match="no record ends"):
        log.rewind(10_000)


@pytest.mark.parametrize("fails", ["start", "send", "end"])
def test_a_tracker_that_fails_costs_one_warning_and_no_record(run, fails):
    stub = Stub(fails)
    log = Tracked(run, stub)
    with pytest.warns(UserWarning) as told:
        fit(log, checkpoint=Checkpoint(run.checkpoint("search"), every=2))
        log.end()
    (message,) = [str(warning.message) for warning in told]
    assert message == (f"Stub failed and gets no more of run {run.id}: {fails}: no route; "
                       "the run goes on, and its log.jsonl has every record")
    assert [record["loss"] for record in run.records()] == [2.0 ** -k for k in range(1, 7)]
    assert [what for what, _ in stub.calls].count(fails) == 1 and stub.calls[-1][0] == fails


def test_ctrl_c_while_a_tracker_waits_is_not_swallowed(run):
    class Waits(Stub):
        def send(self, rows):
            super().send(rows)
            if len(self.calls) == 2:
                raise KeyboardInterrupt

    stub = Waits()
    log = Tracked(run, stub)
    with pytest.raises(KeyboardInterrupt):
        fit(log)
    log.end()
    assert [what for what, _ in stub.calls] == ["start", "send", "send", "end"]


PROGRAM = """
import sys
from s3pet_nb.lab.store import Run
from s3pet_nb.lab.track import TRACKERS, Tracked, tracked
{before}
run = Run(sys.argv[1])
log = {log}
for k in range({first}, {last}):
    log.log({{"event": "step", "phase": "search", "step": k, "loss": 1 / k, "p": [0.5]}})
{after}
"""


def process(run, cwd, before="", log="tracked(run)", first=1, last=4, after="", **environment):
    "What a process that logs prints and warns of; it ends without ending its log."
    text = PROGRAM.format(before=before, log=log, first=first, last=last, after=after)
    inherited = {name: os.environ[name] for name in os.environ if not name.startswith(("WANDB_", "MLFLOW_"))}
    return subprocess.run([sys.executable, "-c", text, str(run.folder)], cwd=cwd, capture_output=True,
                          text=True, check=True, env=inherited | environment)


STUB = """
class Prints:
    def start(self, run): print("start")
    def send(self, rows): print([step for step, _ in rows])
    def end(self, done): print("end", done)
"""


@pytest.mark.parametrize("after, done", [
    ("run.save_result({})", True), ("", False), ("raise SystemExit", False)])
def test_the_end_of_the_process_sends_the_rest_and_closes(run, tmp_path, after, done):
    shown = process(run, tmp_path, STUB, "Tracked(run, Prints())", after=after)
    assert shown.stdout.splitlines() == ["start", "[1]", "[2, 3]", f"end {done}"]


def test_mlflow_goes_on_in_the_same_run(run, tmp_path):
    mlflow = pytest.importorskip("mlflow", exc_type=ImportError)
    where = {"S3PET_TRACK": "mlflow", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    client = mlflow.MlflowClient(where["MLFLOW_TRACKING_URI"])

    def page():
        (found,) = client.search_runs([client.get_experiment_by_name("study").experiment_id])
        return found, [(point.step, point.value) for point in client.get_metric_history(found.info.run_id,
                                                                                        "search/loss")]

    assert "failed" not in process(run, tmp_path, **where).stderr
    found, points = page()
    assert found.info.status == "FAILED" and points == [(k, 1 / k) for k in (1, 2, 3)]
    assert found.data.tags["s3pet_run"] == found.info.run_name == run.id
    assert found.data.params == {name: str(value) for name, value in run.params.items()}

    process(run, tmp_path, first=3, last=1500, after="run.save_result({})", **where)
    again, points = page()
    assert again.info.run_id == found.info.run_id and again.info.status == "FINISHED"
    assert set(points) == {(k, 1 / k) for k in range(1, 1500)}
    assert list(again.data.metrics) == ["search/loss"]


def test_wandb_goes_on_under_the_same_id(run, tmp_path):
    pytest.importorskip("wandb", exc_type=ImportError)
    where = {"S3PET_TRACK": "wandb", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for more in {}, {"first": 3, "last": 6, "after": "run.save_result({})"}:
        assert "failed" not in process(run, tmp_path, **more, **where).stderr
    first, second = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run.id}"))
    assert [row["search/loss"] for row in rows_of(first, run)] == [1, 1 / 2, 1 / 3]
    assert [row["step"] for row in rows_of(second, run)] == [3, 4, 5]


def rows_of(folder, run):
    "The rows that wandb keeps in a folder until they are synchronised, in blocks as in a log of LevelDB."
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, rows = (folder / f"run-{run.id}.wandb").read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if at % 2 ** 15 > 2 ** 15 - 7:  # too little of a block for another header
            at += -at % 2 ** 15
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a record, or its last part
            record, whole = Record.FromString(whole), b""
            if record.WhichOneof("record_type") == "history":
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json)
                             for item in record.history.item})
    return rows


def test_every_tracker_has_the_three_methods():
    for kind in TRACKERS.values():
        assert {"start", "send", "end"} <= set(vars(kind))
