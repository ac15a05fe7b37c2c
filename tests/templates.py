"Small templates and studies that tests write for themselves."
import nbformat

PARAMETERS = """\
run_folder = ""
seed = 0
share: float = 0.5  # of the whole
flag = False
data_dir = None
task = "easy"
"""
STORE = "from s3pet_nb.lab.store import Run\n"
RESULT = STORE + 'Run(run_folder).save_result({"task": task, "sum": share + seed})'


def write_template(path, *cells, parameters=PARAMETERS, checks=(), kernel="python3"):
    tagged = [nbformat.v4.new_code_cell(source, metadata={"tags": [tag]})
              for tag, source in (("parameters", parameters), *(("checks", source) for source in checks))]
    notebook = nbformat.v4.new_notebook(cells=[*tagged, *map(nbformat.v4.new_code_cell, cells)])
    notebook.metadata.kernelspec = {"name": kernel, "language": "python", "display_name": kernel}
    nbformat.write(notebook, path)
    return path


COUNTING = """\
import json, os, time
from pathlib import Path
folder = Path(run_folder)

def write(path, value):
    beside = path.with_suffix(".tmp")
    with open(beside, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)

saved = folder / "checkpoints" / "count.safetensors"
saved.parent.mkdir(exist_ok=True)
found = json.loads(saved.read_text()) if saved.exists() else {"step": 0, "sum": 0, "mark": 0}
log = folder / "log.jsonl"
if log.exists():
    os.truncate(log, found["mark"])
step, total = found["step"], found["sum"]
while step < steps:
    time.sleep(pause)
    step, total = step + 1, (31 * total + seed + step) % 1_000_003
    with open(log, "a") as file:
        file.write(json.dumps({"event": "step", "phase": "count", "step": step, "steps": steps}) + "\\n")
        file.flush()
        mark = file.tell()
    if step % 3 == 0:
        write(saved, {"step": step, "sum": total, "mark": mark})
with open(os.environ["EXECUTIONS"], "a") as file:
    file.write(f"{folder.name}\\n")
write(folder / "result.json", {"task": "count", "seconds": 1.0, "budget": 1, "sum": total,
                               "rows": [{"label": "searched", "test": total, "n_params": 1}]})"""


def write_counting(path, *cells, steps=10, pause=0.05):
    "A template that counts, with checkpoints and without this library, so that its kernel starts quickly."
    parameters = f'run_folder = ""\nseed = 0\nsteps = {steps}\npause = {pause}\n'
    return write_template(path, *cells, COUNTING, parameters=parameters)
