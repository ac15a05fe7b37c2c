"Studies on a Ray cluster: two nodes on this machine, of which one dies, and storage that is not shared."
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import nbformat
import psutil
import pytest

import s3pet_nb.lab.ray
from s3pet_nb.lab.pool import Local, Rules, finished, plan, run_study
from s3pet_nb.lab.ray import Ray, execute_task, packed, room
from s3pet_nb.lab.run import RUN_MARK, Busy, claim
from s3pet_nb.lab.study import Question, checked

PARAMETERS = 'run_folder = ""\nseed = 0\nseconds = 0.0\ntrace = ""\nbroken = False'
BODY = """\
import os, time
from s3pet_nb.lab.store import Run
run = Run(run_folder)
with open(trace, "a") as file:
    told = [seed, os.getpid(), os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES", "all")]
    file.write(" ".join(map(str, told)) + "\\n")
run.log({"event": "step", "step": 1})
run.checkpoint("search").write_bytes(b"0")
time.sleep(seconds)
if broken:
    raise FloatingPointError("the loss is NaN at step 1; lower lr")
run.save_result({"task": "none", "seconds": seconds, "rows": [{"label": "searched", "test": seed ** 2}]})"""
QUICK = Rules(retries=2, pause=0.1)
MB = 2 ** 20
NODE = {"num_cpus": 1, "object_store_memory": 100 * MB, "no_monitor": True,
        "include_dashboard": False, "include_log_monitor": False}


@pytest.fixture(scope="module")
def ray():
    "The package; without it the test is skipped, or fails if S3PET_REQUIRE_RAY=1."
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError:
        reason = "no Ray: pip install 's3pet_nb[ray]'"
        if os.environ.get("S3PET_REQUIRE_RAY") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return ray


def new_node(cluster, **resources):
    "A node added to a cluster; a busy machine needs more than one of the half minutes that Ray grants."
    before = psutil.Process().children()
    for _ in range(6):
        try:
            return cluster.add_node(**NODE | resources)
        except Exception as late:
            if "timed out during startup" not in str(late):
                raise
            for process in set(psutil.Process().children()) - set(before):
                process.kill()
    pytest.fail("no node of Ray starts within 30 s on this machine")


@pytest.fixture(scope="module")
def cluster(ray):
    "A head and one more node, a CPU each; tests that remove a node add their own."
    from ray.cluster_utils import Cluster
    found = Cluster()
    new_node(found)
    new_node(found)
    yield found
    found.shutdown()


@pytest.fixture
def asked(tmp_path):
    "Makes a study of a small template: asked(seeds, seconds=…)."
    head = nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[head, nbformat.v4.new_code_cell(BODY)])
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "small.ipynb")

    def make(seeds, **params):
        params["trace"] = str(tmp_path / "trace")
        return checked("tried", {"template": str(tmp_path / "small.ipynb"), "params": params, "seeds": seeds})
    return make


@pytest.fixture
def task(asked, tmp_path):
    (question,) = asked([3]).questions()
    return {"id": question.id, "template": question.template, "params": question.params, "root": str(tmp_path), "study": "tried",
            "time_limit": None, "again": False}


def begun(tmp_path) -> list[list[str]]:
    "Seed, process, threads and GPUs of every kernel that began."
    trace = tmp_path / "trace"
    return [line.split() for line in trace.read_text().splitlines()] if trace.exists() else []


def kernels(tmp_path) -> list[psutil.Process]:
    "Kernels of runs below this folder."
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(RUN_MARK, "").startswith(str(tmp_path)):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def gone(processes, seconds=30) -> bool:
    "Whether these processes end by themselves."
    return not psutil.wait_procs(processes, timeout=seconds)[1]


def results(tmp_path) -> dict[int, int]:
    "The result of each seed, where the run is whole."
    found = {}
    for folder in tmp_path.glob("tried/*/"):
        if not folder.name.startswith(".") and finished(folder):
            seed = json.loads((folder / "params.json").read_text())["seed"]
            assert seed not in found
            found[seed] = json.loads((folder / "result.json").read_text())["rows"][0]["test"]
    return found


def test_room():
    assert [room({"CPU": 2.0}, 1, 0), room({"CPU": 2.0}, 0.1, 0), room({}, 1, 0)] == [2, 20, 0]
    assert [room({"CPU": 8.0, "GPU": 1.0}, 1, 1), room({"CPU": 8.0}, 1, 1)] == [1, 0]


def test_a_task_travels_with_what_another_machine_cannot_know(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = packed(task | {"template": "small.ipynb", "root": "."}, "probe")
    assert relative["template"] == task["template"] and relative["root"] == str(tmp_path)
    assert relative["params"] == task["params"]
    assert relative["id"] == Question(task["template"], task["params"]).id
    shipped = packed(task | {"template": "search", "params": {}}, "probe")
    assert shipped["template"] == "search"
    assert json.loads(json.dumps(relative)) == relative


def test_a_node_without_the_template_or_with_another_one_refuses(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probe").touch()
    travels = packed(task, tmp_path / "probe")
    assert execute_task(travels)["done"] and results(tmp_path) == {3: 9}
    text = (tmp_path / "small.ipynb").read_text()
    (tmp_path / "small.ipynb").write_text(text.replace("seed ** 2", "seed ** 3"))
    assert "has not the rows, structures and templates" in execute_task(travels)["failed"]
    (tmp_path / "small.ipynb").unlink()
    assert "has not the rows, structures and templates" in execute_task(travels)["failed"]
    assert len(begun(tmp_path)) == 1 and results(tmp_path) == {3: 9}


@pytest.mark.parametrize("given", [{"cpus": 0}, {"cpus": -1}, {"gpus": -1}])
def test_what_no_run_can_take_is_refused(given):
    with pytest.raises(ValueError, match="a run takes"):
        Ray(**given)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "127.0.0.1:port"])
def test_a_cluster_that_is_not_there_is_named(ray, address):
    with pytest.raises(ConnectionError, match=f"no Ray cluster at '{address}'"):
        Ray(address)


def test_a_study_begun_here_goes_on_on_two_nodes(asked, cluster, tmp_path):
    study = asked(list(range(6)))
    first = run_study(study, tmp_path, Local(1), QUICK, only=["seed=0"])
    assert first.jobs[0].state == "done"
    backend = Ray(cluster.address)
    assert backend.slots == 2 and backend.gpus == 0
    ended = run_study(study, tmp_path, backend, QUICK)
    assert [job.state for job in ended.jobs] == ["done"] * 6 and ended.jobs[0].before
    assert results(tmp_path) == {seed: seed ** 2 for seed in range(6)}
    assert Counter(line[0] for line in begun(tmp_path)) == Counter("012345")
    assert {line[2] for line in begun(tmp_path)[1:]} == {"1"}
    assert not list(tmp_path.glob(".probe*")) and not kernels(tmp_path)
    for job in ended.jobs:
        assert (job.folder / "report.html").exists() and not (job.folder / "checkpoints").exists()
        assert json.loads((job.folder / "params.json").read_text()) == job.question.params
    assert all(job.before for job in plan(study, tmp_path))


def test_a_node_removed_mid_run_loses_nothing(asked, cluster, tmp_path):
    node = new_node(cluster)
    raylet, removed = node.all_processes["raylet"][0].process.pid, []

    def remove(status):
        for _, kernel, *_ in [] if removed else begun(tmp_path):
            above = psutil.Process(int(kernel)).parents() if psutil.pid_exists(int(kernel)) else []
            if raylet in [process.pid for process in above]:
                cluster.remove_node(node, allow_graceful=False)
                removed.append(int(kernel))
                return

    backend = Ray(cluster.address)
    ended = run_study(asked(list(range(6)), seconds=6.0), tmp_path, backend, QUICK, watch=remove)
    assert removed and [job.state for job in ended.jobs] == ["done"] * 6
    assert results(tmp_path) == {seed: seed ** 2 for seed in range(6)}
    assert len(begun(tmp_path)) > 6 and not psutil.pid_exists(removed[0]) and not kernels(tmp_path)


def test_killed_kernels_and_workers_lose_nothing(asked, cluster, tmp_path):
    killed = []

    def kill(status):
        for seed, kernel, *_ in begun(tmp_path):
            if len(killed) < 2 and seed not in killed and psutil.pid_exists(int(kernel)):
                process = psutil.Process(int(kernel))
                (process.parent() if killed else process).send_signal(signal.SIGKILL)
                killed.append(seed)
                return

    ended = run_study(asked(list(range(4)), seconds=5.0), tmp_path, Ray(cluster.address), QUICK, watch=kill)
    assert len(killed) == 2 and [job.state for job in ended.jobs] == ["done"] * 4
    assert results(tmp_path) == {seed: seed ** 2 for seed in range(4)}
    assert Counter(line[0] for line in begun(tmp_path)) == Counter([*"0123", *killed])
    assert gone(kernels(tmp_path))


def test_without_shared_storage_a_run_is_refused_and_leaves_nothing(asked, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(s3pet_nb.lab.ray, "packed", lambda task, probe, *more: packed(task, "nowhere", *more))
    ended = run_study(asked([0, 1]), tmp_path, Ray(cluster.address), Rules(retries=0))
    assert [job.state for job in ended.jobs] == ["failed"] * 2
    assert all(f"does not see the folder of results {tmp_path}; put it on" in job.cause for job in ended.jobs)
    assert not begun(tmp_path) and not any(job.folder.exists() for job in ended.jobs)


def test_a_node_holds_the_lock_of_the_run_that_it_executes(asked, cluster, tmp_path):
    owners = {}

    def look(status):
        for job in status["jobs"]:
            if job["state"] == "running":
                try:
                    with claim(tmp_path / "tried" / job["id"]):
                        pass  # no node has begun it yet
                except Busy as busy:
                    owners[job["id"]] = str(busy)

    ended = run_study(asked([0, 1], seconds=4.0), tmp_path, Ray(cluster.address), QUICK, watch=look)
    assert [job.state for job in ended.jobs] == ["done"] * 2 and owners.keys() == {job.id for job in ended.jobs}
    assert not any(f"by process {os.getpid()} on" in said for said in owners.values())
    assert all("by process " in said for said in owners.values())


def test_gpus_are_resources_and_a_run_sees_its_own(asked, cluster, tmp_path):
    node = new_node(cluster, num_cpus=4, num_gpus=2)
    try:
        backend = Ray(cluster.address, cpus=2)
        assert backend.gpus == 1 and backend.slots == 2
        ended = run_study(asked([0, 1], seconds=15.0), tmp_path, backend, QUICK)
        assert [job.state for job in ended.jobs] == ["done"] * 2
        assert sorted(line[2:] for line in begun(tmp_path)) == [["2", "0"], ["2", "1"]]
        run_study(asked([2]), tmp_path, Ray(cluster.address, cpus=2, gpus=0), QUICK)
        assert begun(tmp_path)[-1][2:] == ["2"]
    finally:
        cluster.remove_node(node)


def test_a_node_with_another_version_is_refused(task, cluster, monkeypatch):
    monkeypatch.setattr(s3pet_nb.lab.ray, "__version__", "9.9")
    with Ray(cluster.address) as backend:
        failed = backend.submit(task).result()["failed"]
    assert "has s3pet_nb" in failed and "install 9.9" in failed


@pytest.mark.parametrize("how, joined", [
    (signal.SIGINT, True),
    (signal.SIGKILL, True),
    (signal.SIGINT, False),
    (signal.SIGKILL, False),
])
def test_a_study_that_is_ended_leaves_no_process(asked, ray, request, tmp_path, how, joined):
    study = asked([0], seconds=600.0)
    address = request.getfixturevalue("cluster").address if joined else None
    (tmp_path / "go.py").write_text(f"""\
from s3pet_nb.lab.pool import run_study
from s3pet_nb.lab.ray import Ray
from s3pet_nb.lab.study import checked
run_study(checked("tried", {{"template": {study.template!r}, "params": {study.params!r}, "seeds": [0]}}),
          {str(tmp_path)!r}, Ray({address!r}))""")
    driver, below = until_it_runs(tmp_path)
    assert joined or any("raylet" in process.name() for process in below)
    if how == signal.SIGINT:
        os.killpg(driver.pid, how)
    else:
        driver.kill()
    said = driver.communicate(timeout=180)[0]
    if how == signal.SIGINT:
        assert not kernels(tmp_path), "when the study says that it has ended, nothing runs"
        assert said.strip().endswith("KeyboardInterrupt") and said.count("Traceback") == 1, said
        assert json.loads((tmp_path / "tried" / "status.json").read_text())["ended"] == "interrupted"
        assert not list(tmp_path.glob(".probe*"))
    assert gone(kernels(tmp_path))
    assert gone(below, 150)  # Ray's own agents look once a minute whether their node is there
    if joined:
        with Ray(address) as backend:
            assert backend.slots >= 2


def until_it_runs(tmp_path) -> tuple[subprocess.Popen, list[psutil.Process]]:
    "A process that runs go.py, once a kernel runs, and the processes below it."
    for _ in range(6):
        driver = subprocess.Popen([sys.executable, tmp_path / "go.py"], start_new_session=True, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while driver.poll() is None:
            if begun(tmp_path):
                return driver, psutil.Process(driver.pid).children(recursive=True)
            time.sleep(0.5)
        said = driver.communicate()[0]
        assert "Ray does not start on this machine" in said, said
    pytest.fail("Ray does not start on this machine")
