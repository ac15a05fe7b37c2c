"A run that is watched and steered: numbers of every figure, commands from anywhere, broken folders."
import asyncio
import json
import math
import os
import threading
import time
import tracemalloc
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from s3pet_nb.core import UnknownName
from s3pet_nb.lab import plot
from s3pet_nb.lab.live import CURVES, Control, Monitor, Steered, Watched, points, rest, status
from s3pet_nb.lab.log import Tail
from s3pet_nb.lab.store import Run
from s3pet_nb.learn.learner import Callback, Checkpoint, Learner, load_state
from s3pet_nb.learn.probe import probe
from s3pet_nb.learn.search import SearchConfig, search
from s3pet_nb.model.backbone import example_batch, tiny
from s3pet_nb.model.gate import GATES
from s3pet_nb.model.space import make_space
from s3pet_nb.model.structure import jaccard, select


def searched(run, steps=24, callbacks=(), call=search, **settings):
    "A search on a tiny encoder that logs to the run, or the arguments of one for another `call`."
    model = tiny("bert")
    space = make_space(model)
    batches = [example_batch(model, seed=seed) for seed in range(4)]
    config = SearchConfig(steps, lr=1e-2, evaluate_every=8, measure_every=5, dropout=False)
    return call(model, space, batches[:2], batches[2:], batches[:1], budget=space.n_params // 3, config=config,
                log=run, callbacks=list(callbacks), **settings)


@pytest.fixture
def run(tmp_path):
    return Run.create(tmp_path, "study", {"seed": 0}, "")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A finished search, with its result."
    run = Run.create(tmp_path_factory.mktemp("reports"), "study", {"seed": 0}, "")
    return run, searched(run)


def test_frames_of_a_watched_run_are_those_of_its_log(done):
    run, result = done
    watched = Watched(run)
    watched.look()
    frames = watched.frames()
    steps = plot.steps_frame(run)
    for column in "step", "expected_size", "budget", "zeta":
        assert frames["budget"][column].tolist() == steps[column].tolist()
    for column in "loss", "loss_alpha":
        assert frames["loss"][column].tolist() == steps[column].tolist()
    assert dict(zip(frames["score"].step, frames["score"].score)) == result.scores
    assert frames["mixed"].mixed.tolist() == plot.mixed_frame(run).mixed.tolist()
    assert watched.missing() == []


def test_looks_say_what_would_be_chosen_and_how_much_that_changed(done):
    run, result = done
    watched = Watched(run)
    watched.look()
    sets = watched.frames()["sets"]
    assert sets.step.tolist() == sorted(result.history)
    before = None
    for row in sets.itertuples():
        p = result.gate.p(result.history[row.step], result.gate.solve(result.history[row.step], result.space.n,
                                                                      result.budget))
        chosen = select(p, result.space.n, result.budget)
        assert row.set_size == result.space.n[chosen].sum() <= result.budget
        bits = torch.distributions.Bernoulli(p).entropy().mean().item() / math.log(2)
        assert row.entropy == pytest.approx(bits)
        assert pd.isna(row.churn) if before is None else row.churn == 1 - jaccard(chosen, before)
        before = chosen


def probed(run, **settings):
    "A probe of a tiny encoder that logs to the run, and its result."
    model = tiny("bert")
    space, batches = make_space(model), [example_batch(model, seed=seed) for seed in range(4)]
    return probe(model, space, batches, budget=space.n_params // 3, log=run, callbacks=[],
                 **{"score": "gain", "batches": 20} | settings)


def test_a_monitor_shows_the_scores_of_a_probe_as_they_come(run):
    result, monitor = probed(run), Monitor(run)
    frame = plot.probe_frame(run.records())
    assert frame.score.tolist() == result.score.tolist()
    heat, curves = monitor.live.figures
    assert heat["layout"]["title"]["text"] == plot.probe_title(frame)
    assert list(map(list, heat["data"][0]["z"])) == list(map(list, plot.draw_probe(frame).data[0].z))
    sets = monitor.watched.frames()["sets"]
    assert sets.step.tolist() == list(range(2, 21, 2)) and sets.set_size.iloc[-1] == frame.n[frame.selected].sum()
    assert sets.churn.iloc[1:].between(0, 1).all() and sets.entropy.isna().all()
    assert monitor.watched.missing() == [] and "probe · step 20 of 20" in monitor.line.value
    monitor.budget.value = 2 * result.budget
    assert not monitor.budget.disabled
    assert f"{len(result.structure(2 * result.budget))} modules" in monitor.live.figures[0]["layout"]["title"]["text"]
    assert monitor.static()[0].layout.title.text == plot.probe_title(frame)


def test_a_monitor_selects_as_the_run_does(tmp_path):
    run = Run.create(tmp_path, "study", {"select_by": "exact"}, "")
    result, monitor = probed(run), Monitor(run)
    assert monitor.under().selected.tolist() == result.structure(by="exact").mask(result.space).tolist()


def test_a_monitor_steers_a_probe(tmp_path):
    run = Run.create(tmp_path, "study", {}, "steered")
    model = tiny("bert")
    space = make_space(model)

    async def ask():
        work = asyncio.ensure_future(Monitor(run).steer(
            probe, model, space, [example_batch(model)], budget=space.n_params // 3, score="gain", batches=5_000))
        while not any(record["event"] == "step" and record["step"] >= 4 for record in run.records()):
            await asyncio.sleep(0.02)
        Monitor(run).stop()
        return await work

    result = asyncio.run(ask())
    assert result.stopped and 4 <= result.passes < 5_000 and len(result.structure()) > 0
    assert [record["reason"] for record in run.records() if record["event"] == "stopped"] == ["asked to"]


@pytest.mark.parametrize("name", GATES)
def test_p_under_another_budget_is_that_of_the_result(tmp_path, name):
    run = Run.create(tmp_path, "study", {}, name)
    settings = {"weight": 0.1} if name == "hard-concrete" else {"tau": 0.7}
    result = searched(run, steps=8, gate=GATES[name](**settings), order="first").taken("last")
    watched = Watched(run)
    watched.look()
    for B in (result.budget // 2, result.budget * 2):
        frame = plot.p_frame(watched.log, B=B)
        structure = result.structure(B)
        assert frame.p.tolist() == pytest.approx(result.gate.p(result.alpha, result.zeta(B)).tolist())
        assert frame[frame.selected].name.tolist() == [module.name for module in structure.modules]


def test_curves_draw_the_frames(done):
    watched = Watched(done[0])
    watched.look()
    frames = watched.frames()
    for curve, drawn in zip(CURVES, points(frames), strict=True):
        frame = frames[curve[3]].dropna(subset=curve[4])
        assert drawn == {"x": frame.step.tolist(), "y": frame[curve[4]].tolist()}


def test_a_monitor_reads_a_growing_log_once_and_draws_what_is_new(run):
    monitor = Monitor(run)
    assert monitor.heat is None and "waiting" in monitor.line.value
    searched(run, steps=8)
    monitor.look()
    place = monitor.watched.tail.place
    assert place == (run.folder / "log.jsonl").stat().st_size
    assert monitor.live.figures[1]["data"][0]["x"] == [float(k) for k in range(1, 9)]
    run.log({"event": "step", "phase": "search", "step": 9, "steps": 24, "loss": 0.1, "seconds": 9})
    gates = monitor.watched.gates | {"step": 9, "alpha": [0.0] * len(monitor.watched.n),
                                     "p": [0.25] * len(monitor.watched.n)}
    run.log(gates)
    monitor.look()
    assert monitor.watched.tail.place > place and "step 9" in monitor.live.figures[0]["layout"]["title"]["text"]
    assert {x for row in monitor.live.figures[0]["data"][0]["z"] for x in row if x is not None} == {0.25}


def test_the_slider_shows_another_budget(done):
    monitor = Monitor(done[0])
    result, before = done[1], list(map(list, monitor.live.figures[0]["data"][0]["z"]))
    assert monitor.budget.value == result.budget and not monitor.budget.disabled
    monitor.budget.value = 2 * result.budget
    assert list(map(list, monitor.live.figures[0]["data"][0]["z"])) != before
    modules = len(result.taken("last").structure(2 * result.budget))
    assert f"{modules} modules" in monitor.live.figures[0]["layout"]["title"]["text"]
    monitor.budget.value = result.budget
    assert list(map(list, monitor.live.figures[0]["data"][0]["z"])) == before


def steer(run, ask=None, **settings):
    "A search that a monitor steers, while another monitor asks for something."
    async def whole():
        def call(*args, log, callbacks, **given):
            return Monitor(run).steer(search, *args, callbacks=callbacks, **given)
        waiting = searched(run, call=call, **settings)
        if ask is None:
            return await waiting
        asking = asyncio.create_task(ask(Monitor(run)))
        result = await waiting
        await asking
        return result
    return asyncio.run(whole())


def step_of(run):
    return max((record["step"] for record in run.records() if record["event"] == "step"), default=0)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


def test_a_steered_search_is_the_search(run, done, capsys):
    result = steer(run)
    assert torch.equal(result.alpha, done[1].alpha) and result.scores == done[1].scores
    assert not Control(run).path.exists()


def test_pause_holds_the_run_until_resume(run):
    async def ask(monitor):
        await until(lambda: step_of(run) >= 2)
        monitor.pause()
        await until(lambda: run.records()[-1]["event"] == "paused")
        held = step_of(run)
        await asyncio.sleep(0.3)
        assert step_of(run) == held
        monitor.look()
        assert monitor.pausing.description == "Resume" and "paused" in monitor.line.value
        monitor.resume()

    start = time.perf_counter()
    result = steer(run, ask, steps=60)
    elapsed = time.perf_counter() - start
    events = [record["event"] for record in run.records()]
    assert result.steps == 60 and events.count("paused") == events.count("resumed") == 1
    assert result.seconds < elapsed - 0.3


def test_a_run_that_waits_can_be_stopped(run):
    async def ask(monitor):
        await until(lambda: step_of(run) >= 2)
        monitor.pause()
        await until(lambda: run.records()[-1]["event"] == "paused")
        monitor.stop()

    result = steer(run, ask, steps=2_000)
    assert result.steps < 2_000
    monitor = Monitor(run)
    assert "stopped" in monitor.line.value and "paused" not in monitor.line.value


def test_a_run_that_waits_saves_a_checkpoint_and_waits_on(run):
    path = run.checkpoint("search")

    def saved():
        return load_state(path)["learner"]["step"]

    async def ask(monitor):
        await until(lambda: step_of(run) >= 2)
        monitor.pause()
        await until(lambda: run.records()[-1]["event"] == "paused")
        held = step_of(run)
        monitor.checkpoint()
        await until(lambda: step_of(run) == held + 1 and run.records()[-1]["event"] == "paused")
        assert saved() == held
        monitor.look()
        assert f"checkpoint at step {held}" in monitor.line.value and monitor.line.value.endswith("paused")
        monitor.stop()

    steer(run, ask, steps=2_000, checkpoint=Checkpoint(path, every=10_000))


def test_a_run_without_a_place_for_checkpoints_says_so(run):
    async def ask(monitor):
        await until(lambda: step_of(run) >= 2)
        monitor.checkpoint()
        await until(lambda: any(record["event"] == "checkpoint" for record in run.records()))
        monitor.stop()

    steer(run, ask, steps=2_000)
    assert "no checkpoint, as the run was given no place for one" in Monitor(run).line.value


def test_stop_ends_with_a_structure(run):
    async def ask(monitor):
        await until(lambda: step_of(run) >= 2)
        monitor.stop()

    result = steer(run, ask, steps=2_000)
    assert 2 <= result.steps < 2_000 and len(result.structure()) > 0
    assert result.steps in result.scores and result.steps in result.history
    assert [record["reason"] for record in run.records() if record["event"] == "stopped"] == ["asked to"]


def test_checkpoint_now_is_one_to_go_on_from(tmp_path):
    whole = Run.create(tmp_path, "study", {}, "whole")
    wanted = searched(whole, steps=40)
    run = Run.create(tmp_path, "study", {}, "killed")
    path = run.checkpoint("search")

    class Killed(Callback):
        def after_step(self, learner):
            if learner.step == 3:
                Monitor(run).checkpoint()
            if learner.step == 7:
                raise MemoryError

    with pytest.raises(MemoryError):
        searched(run, steps=40, callbacks=[Killed(), Steered(run)], checkpoint=Checkpoint(path, every=1_000))
    assert load_state(path)["learner"]["step"] == 3
    resumed = searched(run, steps=40, checkpoint=Checkpoint(path, every=1_000))
    assert torch.equal(resumed.alpha, wanted.alpha) and resumed.scores == wanted.scores
    steps = [record["step"] for record in run.records() if record["event"] == "step"]
    assert steps == list(range(1, 41))


def idle(run, steered, steps=5):
    learner = Learner(lambda batch: {"loss": 0.0}, [None], steps, "idle", run, [steered])
    learner.fit()
    return learner.step


def test_what_was_asked_of_a_killed_run_is_forgotten(run):
    Control(run).ask(stop=True, paused=True)
    assert idle(run, Steered(run)) == 5


def test_what_was_asked_of_one_phase_is_not_asked_of_the_next(run):
    steered = Steered(run)
    Control(run).ask(stop=True)
    assert idle(run, steered) == 1  # asked before its first step
    assert idle(run, steered) == 5


def test_of_two_that_ask_at_once_both_are_heard(run):
    one, two, reader = (Control(run) for _ in range(3))
    reader.read()
    for control, asked in ((one, {"paused": True}), (two, {"checkpoint": 1}), (one, {"stop": True})):
        control.ask(**asked)
        stamp = control.path.stat()
        os.utime(control.path, ns=(stamp.st_atime_ns, 0))  # a file system whose clock stands still
    assert reader.read() == {"paused": True, "checkpoint": 1, "stop": True}


def test_a_run_of_several_processes_is_not_steered(run, monkeypatch):
    monkeypatch.setattr("s3pet_nb.lab.live.PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="several processes cannot be steered"):
        idle(run, Steered(run))


def test_an_interrupt_ends_the_thread(run):
    async def whole():
        def call(*args, log, callbacks, **given):
            return Monitor(run).steer(search, *args, callbacks=callbacks, **given)
        task = asyncio.create_task(searched(run, steps=5_000, call=call))
        await until(lambda: step_of(run) >= 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = threading.active_count()
    asyncio.run(whole())
    held = step_of(run)
    time.sleep(0.2)
    assert step_of(run) == held < 5_000 and threading.active_count() <= before + 1
    assert "stopped at step" in (line := Monitor(run).line.value) and "interrupted" in line and "left" not in line


def test_an_error_of_the_search_is_raised_in_the_cell(run):
    async def whole():
        await Monitor(run).steer(search, None, None, None, None, None, budget=1)

    with pytest.raises(AttributeError):
        asyncio.run(whole())


def test_a_monitor_that_breaks_does_not_end_the_search(run, done, monkeypatch):
    def broken(self):
        raise KeyError("p")

    for name in "draw", "static":
        monkeypatch.setattr(Monitor, name, broken)
    assert torch.equal(steer(run).alpha, done[1].alpha)


def test_a_run_that_is_done_is_not_searched_again(run):
    searched(run, steps=4)
    run.save_result({})
    with pytest.raises(ValueError, match=f"run {run.id} is done"):
        steer(run)


def test_a_second_search_in_the_same_log_is_shown_alone(run):
    monitor = Monitor(run)
    searched(run, steps=16)
    monitor.look()
    model = tiny("bert", num_hidden_layers=3)
    space = make_space(model)
    batches = [example_batch(model, seed=seed) for seed in range(4)]
    result = search(model, space, batches[:2], batches[2:], batches[:1], budget=space.n_params // 5, log=run,
                    config=SearchConfig(8, lr=1e-2, evaluate_every=8, dropout=False), callbacks=[])
    monitor.look()
    frames = monitor.watched.frames()
    assert frames["budget"].step.tolist() == list(range(1, 9)) and list(frames["score"].step) == [8]
    assert monitor.budget.value == pytest.approx(result.budget) and len(monitor.watched.n) == len(space)
    fresh = Monitor(run)
    assert monitor.live.figures == fresh.live.figures


def test_a_training_that_begins_again_is_drawn_from_its_first_step(run):
    watched = Watched(run)
    for step in 1, 2, 3, 1, 2:
        watched.on_step({"event": "step", "phase": "searched", "step": step, "steps": 3, "loss": 0.5, "seconds": step})
    assert watched.frames()["loss"].step.tolist() == [1, 2]


def drawn(monitor):
    "What the browser says when it has drawn."
    monitor.live._handle_custom_msg({"seconds": 0.01}, [])


def test_figures_wait_until_the_browser_has_drawn_those_before(run):
    monitor, sent = Monitor(run), []
    monitor.live.observe(lambda change: sent.append(change.new), "figures")
    searched(run, steps=8)
    for _ in range(3):
        monitor.read_at = monitor.draw_at = 0.0
        step = run.records()[-1]["step"] + 1
        run.log({"event": "step", "phase": "search", "step": step, "steps": 24, "loss": 0.1, "seconds": 9})
        monitor.look_on()
    assert len(sent) == 1
    monitor.read_at = monitor.draw_at = 0.0
    drawn(monitor)
    monitor.look_on()
    loss = next(curve for curve in sent[-1][1]["data"] if curve["name"] == "loss")
    assert len(sent) == 2 and loss["x"][-1] == 11


def test_a_monitor_follows_a_run_of_another_thread(run):
    async def whole():
        monitor = Monitor(run)
        monitor._ipython_display_()
        thread = threading.Thread(target=searched, args=(run,), kwargs={"steps": 12})
        thread.start()

        def followed():
            drawn(monitor)
            return monitor.watched.phase and monitor.watched.steps["search"].count == 12
        await until(followed)
        thread.join()
        monitor.following.cancel()
        return monitor

    monitor = asyncio.run(whole())
    assert "step 12 of 12" in monitor.line.value and monitor.heat is not None


def test_memory_has_a_bound(run):
    "Ten thousand steps, then ten thousand more: what is held does not grow."
    watched = Watched(run)

    def steps(first):
        for step in range(first, first + 10_000):
            watched.on_step({"event": "step", "phase": "search", "step": step, "steps": 10 ** 6, "loss": 0.5,
                             "mixed": 0.1, "seconds": 0.1 * step})

    steps(1)
    tracemalloc.start()
    before = tracemalloc.take_snapshot()
    steps(10_001)
    grown = sum(change.size_diff for change in tracemalloc.take_snapshot().compare_to(before, "lineno"))
    tracemalloc.stop()
    assert len(watched.steps["search"].rows) <= 500 and grown < 300_000
    assert watched.frames()["budget"].step.iloc[[0, -1]].tolist() == [1, 20_000]


def test_a_long_log_is_never_in_memory_as_a_whole(run):
    record = {"event": "step", "phase": "search", "steps": 10 ** 6, "loss": 0.5, "expected_size": 4000.0,
              "budget": 4542, "zeta": 0.1, "memory_mb": 300.0, "passes": 2, "mixed": 0.1}
    with open(run.folder / "log.jsonl", "w") as file:
        for step in range(1, 60_001):
            file.write(json.dumps(record | {"step": step, "seconds": 0.1 * step}) + "\n")
    watched = Watched(run)
    tracemalloc.start()
    watched.look()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert watched.steps["search"].count == 60_000 and watched.steps["search"].last["step"] == 60_000
    assert peak < 30_000_000 < 5 * (run.folder / "log.jsonl").stat().st_size


def test_a_resumed_run_that_cut_its_log_is_read_anew(tmp_path):
    path = tmp_path / "log.jsonl"
    tail = Tail(path)
    lines = [json.dumps({"step": k}) + "\n" for k in range(10)]
    path.write_text("".join(lines))
    assert len(tail.read()[0]) == 10
    path.write_text("".join(lines[:5]) + "".join(json.dumps({"step": k, "again": True}) + "\n" for k in range(5, 30)))
    records, again = tail.read()
    assert again and [record["step"] for record in records] == list(range(30))
    path.unlink()
    assert tail.read() == ([], True) and tail.read() == ([], False)


def broken(run, how):
    log = run.folder / "log.jsonl"
    if how == "cut":
        log.write_bytes(log.read_bytes()[:-5])
    if how == "params":
        (run.folder / "params.json").unlink()
    if how == "log":
        log.unlink()
    if how == "nan":
        records = [json.loads(line) for line in log.read_text().splitlines()]
        gates = [record for record in records if record["event"] == "gates"][-1]
        gates["p"][3] = None
        records[-2] = records[-2] | {"loss": None}
        log.write_text("".join(json.dumps(record) + "\n" for record in records))
    if how == "garbage":
        log.write_text(log.read_text().replace('{"event": "score"', "oops", 1))
    if how == "structure":
        run.save_result({})
    if how == "result":
        (run.folder / "result.json").write_text('{"task": "x", ')
    if how == "torn params":
        (run.folder / "params.json").write_text('{"seed": ')
    if how == "gate":
        log.write_text(log.read_text().replace('"tau": 1.0', '"heat": 1.0'))


@pytest.mark.parametrize("how, told", [
    ("cut", "There is a log.jsonl whose last line is cut off."), ("params", "There is no params.json."),
    ("log", "There is no log.jsonl."), ("nan", "not a number at step"), ("garbage", "not JSON: 1 lines"),
    ("structure", "There is no structure.json."), ("result", "There is a result.json that is no JSON object."),
    ("torn params", "There is a params.json that is no JSON object."), ("gate", ""),
])
def test_a_broken_folder_opens_and_says_what_is_missing(tmp_path, how, told):
    run = Run.create(tmp_path, "study", {"seed": 0}, "")
    searched(run, steps=8)
    broken(run, how)
    monitor = Monitor(run)
    assert told in monitor.notes.value
    assert (monitor.heat is None) == (how == "log")
    assert monitor.budget.disabled == (how in ("log", "gate"))


def test_an_alpha_that_is_no_number_costs_no_figure(tmp_path):
    run = Run.create(tmp_path, "study", {"seed": 0}, "")
    result = searched(run, steps=8)
    monitor = Monitor(run)
    gates = [record for record in run.records() if record["event"] == "gates"][-1]
    run.log(gates | {"alpha": [None, *gates["alpha"][1:]]})
    shown = monitor.live.figures
    monitor.watched.look()
    monitor.budget.value = 2 * result.budget
    assert len(monitor.live.figures) == len(shown) and "could not be shown" not in monitor.notes.value


def test_an_unknown_run_is_an_error_that_names_the_known(done):
    run, _ = done
    root = run.folder.parent.parent
    assert Monitor(run.id, root).run.id == run.id
    with pytest.raises(UnknownName, match=run.id):
        Monitor("0123456789", root)


def test_an_id_that_two_studies_have_is_asked_about(tmp_path):
    one, two = (Run.create(tmp_path, study, {"seed": 0}, "") for study in ("one", "two"))
    assert one.id == two.id
    with pytest.raises(ValueError, match="is in 2 studies"):
        Monitor(one.id, tmp_path)
    assert Monitor(two.folder).run.study == "two"


def test_a_status_line_is_text(run):
    run.log({"event": "step", "phase": "<b>x</b>", "step": 1, "steps": 2, "loss": 0.0, "seconds": 1.0})
    monitor = Monitor(run)
    assert "<b>" in status(monitor.watched) and "<b>" not in monitor.line.value


def test_a_log_that_is_silent_is_spoken_of(run):
    searched(run, steps=4)
    monitor = Monitor(run)
    assert "nothing new" not in monitor.line.value
    os.utime(run.folder / "log.jsonl", (0, time.time() - 300))
    monitor.tell()
    assert monitor.line.value.endswith("nothing new for 5 min 0 s")


def test_control_that_is_no_control_asks_for_nothing(run):
    control = Control(run)
    control.path.write_text('{"paused": true, "stop": false, "checkpoint": 2}')
    assert control.read() == {"paused": True, "stop": False, "checkpoint": 2}
    for text in "", "[]", "{}", '{"paused": 1}', '{"paused": true, "stop": false, "checkpoint": "x"}':
        control.path.write_text(text)
        assert control.read() == Control.ASKED


@pytest.mark.parametrize("cost, wait", [(0.0, 0.25), (0.001, 0.25), (0.01, 1.0), (0.2, 20.0)])
def test_drawing_takes_its_share_of_the_time_and_no_more(run, monkeypatch, cost, wait):
    assert rest(cost) == pytest.approx(wait)
    monitor = Monitor(run)
    searched(run, steps=4)
    monitor.live.seconds = cost  # that a browser took, which comes on top of the kernel's own time
    monkeypatch.setattr(time, "thread_time", lambda: 0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: 100.0)
    monitor.look()
    assert monitor.draw_at == pytest.approx(100.0 + wait)
