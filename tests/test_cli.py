"The commands as a user types them: what they start, what they say, how they end."
import ast
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import nbformat
import pytest
import typer
from templates import RESULT, write_template
from typer.testing import CliRunner

from s3pet_nb.cli import app, assignments, closing_table, of_length, one_sentence
from s3pet_nb.lab.study import checked, resolve, study

S3PET = [sys.executable, "-c", "from s3pet_nb.cli import main; main()"]
ROW = {"label": "searched", "modules": 9, "n_params": 4540, "validation": 0.8, "test": 0.75}


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    "Run a command in an empty folder."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return lambda *words: CliRunner().invoke(app, words)


@pytest.fixture
def tiny_template(tmp_path, monkeypatch):
    "A project whose templates have the agreed parameters and only write them down."
    parameters = "\n".join(f"{name} = {value!r}" for name, value in {
        "run_folder": "", "task": "agreement", "backbone": "minilm", "data_dir": None, "space": "mix",
        "budget": 1e-3, "gate": "global", "order": "auto", "seed": 0, "search_steps": 4, "retrain_steps": 4,
        "lr": 1e-3}.items())
    body = f"""\
from s3pet_nb.lab.store import Run
if search_steps == 13:
    raise FloatingPointError("the loss is NaN at step 13; lower lr")
Run(run_folder).save_result({{"task": task, "metric": "accuracy", "budget": 4542, "n_backbone": 22_713_216,
                              "rows": [{ROW!r}], "seed": seed, "steps": search_steps, "lr": lr,
                              "stopped": [{{"phase": "search", "step": 40, "steps": 160}}] * (seed == 5),
                              "search": {{"planned": 160, "early_stop": {{"step": 96, "saved": 0.4}}
                                         if seed == 3 else None}}}})"""
    head = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[head, nbformat.v4.new_code_cell(body)])
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    package = tmp_path / "package"
    for kind in "templates", "studies":
        (package / kind).mkdir(parents=True)
    nbformat.write(notebook, package / "templates" / "search.ipynb")
    notebook.cells[0].source += ('\nprune_steps = 4\ngranularity = "structured"\ncriterion = "first-order"\n'
                                 "average_over = 0\nrounds = 1")
    nbformat.write(notebook, package / "templates" / "prune.ipynb")
    notebook.cells[0].source = parameters + '\nprobe_score = "gain_along"\nprobe_steps = 24\nselect_by = "density"'
    nbformat.write(notebook, package / "templates" / "probe.ipynb")
    for name, template in {"demo": "search", "search": "search", "prune": "prune", "probe": "probe"}.items():
        (package / "studies" / f"{name}.yml").write_text(
            f"template: {template}\nparams: {{search_steps: 5}}\n")
    monkeypatch.setattr("s3pet_nb.lab.study.PACKAGE", package)


def test_values_are_read_as_the_type_of_the_default():
    defaults = {"lr": 1e-3, "steps": 4, "task": "a", "data_dir": None}
    assert assignments(["lr=3e-4", "steps=7", "task=7", "data_dir=None"], defaults) == {
        "lr": 3e-4, "steps": 7, "task": "7", "data_dir": None}
    assert assignments(["task=a=b"], defaults) == {"task": "a=b"}
    lists = {"baselines": ["lora-everywhere"], "structures": []}
    assert assignments(["baselines=bitfit,finetune", "structures=a b.json"], lists) == {
        "baselines": ["bitfit", "finetune"], "structures": ["a b.json"]}
    assert assignments(["baselines=", "structures=['a,b.json']"], lists) == {
        "baselines": [], "structures": ["a,b.json"]}
    assert assignments(["sizes=3,4", "sizes=[3, 4]"], {"sizes": [1, 2]}) == {"sizes": [3, 4]}
    with pytest.raises(ValueError, match="write --set name=value"):
        assignments(["lr"], defaults)


def test_a_value_is_never_executed(tmp_path):
    word = f"lr=open({str(tmp_path / 'made')!r}, 'w')"
    assert isinstance(assignments([word], {"lr": 1.0})["lr"], str) and not (tmp_path / "made").exists()


def test_an_interrupt_says_that_the_run_can_go_on(capsys):
    with pytest.raises(typer.Exit) as ended, one_sentence():
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    said = capsys.readouterr().err
    assert "give the same command again to go on from the last checkpoint" in said
    assert said.count("\n") == 1 and len(said) <= 80


@pytest.mark.parametrize("words, sentence", [
    (["search", "--task", "agrement"], "unknown task 'agrement'; did you mean 'agreement'?"),
    (["search", "--task", ""], "unknown task ''"),
    (["search", "--task", "agreement", "--space", "mixx"], "unknown search space 'mixx'"),
    (["prune", "--task", "agreement", "--criterion", "magnitud"], "did you mean 'magnitude'"),
    (["prune", "--task", "agreement", "--set", "rouns=2"], "did you mean 'rounds'"),
    (["prune", "--task", "agreement", "--paper"], "has no epochs for task 'agreement'"),
    (["search", "--task", "agreement", "--quick", "--paper"], "--quick and --paper do not go together; give one"),
    (["prune", "--task", "agreement", "--steps", "4", "--retrain-steps", "4", "--budget", "26000"],
     "a budget of 26,000 prunes nothing"),
    (["probe", "--task", "agreement", "--score", "gains"], "did you mean 'gain'"),
    (["probe", "--task", "agreement", "--steps", "20"], "score 'gain_along' needs at least 21 steps, and is given 20"),
    (["probe", "--task", "agreement", "--score", "gain", "--set", "probe_batches=1"], "needs at least 2 batches"),
    (["probe", "--task", "agreement", "--set", "select_by=densty"], "did you mean 'density'"),
    (["probe", "--task", "agreement", "--budget", "3"], "the smallest adds 384"),
    (["probe", "--task", "agreement", "--quick", "--standard"], "--quick and --standard do not go together"),
    (["search", "--task", "agreement", "--gate", "lokal"], "did you mean 'local'"),
    (["search", "--task", "agreement", "--set", "baselines=bitfti"], "unknown baseline 'bitfti'"),
    (["search", "--task", "agreement", "--budget", "-1"], "budget -1.0 is not a positive number"),
    (["search", "--task", "agreement", "--data-dir", "gone"], "give a data_dir that exists"),
    (["search", "--task", "agreement", "--set", "serch_steps=3"], "did you mean 'search_steps'"),
    (["demo", "--set", "search_steps=many"], "search_steps is 'many', of type str; give int"),
    (["demo", "--set", "search_steps"], "write --set name=value"),
    (["report", "gone"], "no run folder 'gone'"),
])
def test_bad_input_is_one_sentence_and_leaves_nothing(invoke, tmp_path, words, sentence):
    ended = invoke(*words)
    assert ended.exit_code == 1 and ended.stdout == ""
    assert ended.stderr.startswith("error: ") and sentence in ended.stderr
    assert ended.stderr.count("\n") == 1 and "Traceback" not in ended.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [
    ["serch"], ["search"], ["demo", "--seed", "three"], ["demo", "--bugdet", "1"],
    ["probe", "--task", "agreement", "--paper"]])
def test_a_command_that_cannot_be_read_ends_with_usage(invoke, words):
    ended = invoke(*words)
    assert ended.exit_code == 2 and "Usage" in ended.stderr and "Traceback" not in ended.stderr


def test_demo_lays_options_over_its_study_and_shows_what_came_out(tiny_template, invoke, tmp_path):
    ended = invoke("demo", "--seed", "3", "--set", "lr=0.5")
    assert ended.exit_code == 0, ended.stderr
    (folder,) = (tmp_path / "reports" / "demo").glob("[!.]*")
    result = json.loads((folder / "result.json").read_text())
    assert (result["seed"], result["steps"], result["lr"]) == (3, 5, 0.5)
    assert "searched" in ended.stdout and "4,540" in ended.stdout and "0.7500" in ended.stdout
    assert ended.stdout.splitlines()[-2:] == [
        "search: stopped after 96 of 160 steps: 40% of the search saved",
        f"report: {folder.relative_to(tmp_path) / 'report.html'}"]
    assert (folder / "report.html").stat().st_size > 0
    assert "stopped" not in invoke("demo", "--seed", "4").stdout

    by_hand = invoke("demo", "--seed", "5").stdout
    assert "stopped by hand: search after 40 of 160 steps; remove reports/demo/" in by_hand

    (folder / "report.html").unlink()
    again = invoke("report", str(folder))
    assert again.exit_code == 0 and (folder / "report.html").exists()


def test_search_passes_its_options_on(tiny_template, invoke, tmp_path):
    (tmp_path / "data").mkdir()
    ended = invoke("search", "--task", "glue/cola", "--backbone", "some/model", "--budget", "25670",
                   "--seed", "2", "--data-dir", "data", "--space", "lora", "--gate", "local",
                   "--order", "first", "--steps", "6", "--retrain-steps", "7", "--out", "out")
    assert ended.exit_code == 0, ended.stderr
    (folder,) = (tmp_path / "out" / "search").glob("[!.]*")
    asked = json.loads((folder / "params.json").read_text())
    assert asked == {"task": "glue/cola", "backbone": "some/model", "data_dir": str(tmp_path / "data"),
                     "space": "lora", "budget": 25670.0, "gate": "local", "order": "first", "seed": 2,
                     "search_steps": 6, "retrain_steps": 7, "lr": 1e-3}


def test_prune_passes_its_options_on(tiny_template, invoke, tmp_path):
    (tmp_path / "data").mkdir()
    ended = invoke("prune", "--task", "glue/cola", "--backbone", "some/model", "--budget", "25000",
                   "--seed", "2", "--data-dir", "data", "--space", "mam", "--granularity", "unstructured",
                   "--criterion", "fisher", "--steps", "0", "--retrain-steps", "7", "--out", "out",
                   "--set", "rounds=3")
    assert ended.exit_code == 0, ended.stderr
    (folder,) = (tmp_path / "out" / "prune").glob("[!.]*")
    asked = json.loads((folder / "params.json").read_text())
    given = {"task": "glue/cola", "backbone": "some/model", "data_dir": str(tmp_path / "data"),
             "space": "mam", "budget": 25_000.0, "granularity": "unstructured", "criterion": "fisher",
             "seed": 2, "prune_steps": 0, "retrain_steps": 7, "rounds": 3}
    assert given.items() <= asked.items()
    assert "s3pet prune --task glue/cola" in (folder / "report.html").read_text()


def test_probe_passes_its_options_on(tiny_template, invoke, tmp_path):
    (tmp_path / "data").mkdir()
    ended = invoke("probe", "--task", "glue/cola", "--backbone", "some/model", "--budget", "25000",
                   "--seed", "2", "--data-dir", "data", "--space", "lora", "--score", "gain", "--steps", "9",
                   "--retrain-steps", "7", "--out", "out", "--set", "select_by=exact")
    assert ended.exit_code == 0, ended.stderr
    (folder,) = (tmp_path / "out" / "probe").glob("[!.]*")
    asked = json.loads((folder / "params.json").read_text())
    given = {"task": "glue/cola", "backbone": "some/model", "data_dir": str(tmp_path / "data"), "space": "lora",
             "budget": 25_000.0, "probe_score": "gain", "probe_steps": 9, "retrain_steps": 7, "seed": 2,
             "select_by": "exact"}
    assert given.items() <= asked.items()
    page = (folder / "report.html").read_text()
    assert "s3pet probe --task glue/cola" in page and "--score gain" in page and "--set probe_steps=9" in page


def test_a_failing_template_is_one_sentence_with_its_notebook(tiny_template, invoke, tmp_path):
    ended = invoke("demo", "--set", "search_steps=13")
    (folder,) = (tmp_path / "reports" / "demo").glob("[!.]*")
    assert ended.exit_code == 1 and not (folder / "result.json").exists()
    where = folder.relative_to(tmp_path) / "run.ipynb"
    assert ended.stderr == f"error: FloatingPointError: the loss is NaN at step 13; lower lr (see {where})\n"


def test_a_loss_that_is_not_a_number_ends_the_run_and_keeps_its_log(invoke, tmp_path):
    short = ["search_lr=1e30", "n_train=32", "n_eval=16", "batch_size=8", "evaluate_every=1"]
    ended = invoke("search", "--task", "agreement", "--budget", "2e-4", "--steps", "4",
                   *[word for setting in short for word in ("--set", setting)])
    (folder,) = (tmp_path / "reports" / "search").glob("[!.]*")
    assert ended.exit_code == 1 and "Traceback" not in ended.stderr
    assert "search stopped at step" in ended.stderr.splitlines()[-1]
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert records[-1]["event"] == "stopped" and records[-1]["step"] == 1 + sum(
        record["event"] == "step" for record in records)
    assert not (folder / "result.json").exists()


def test_the_closing_table_fits_eighty_columns(capsys):
    from rich.console import Console

    labels = ["searched", "random-1", "lora-everywhere", "lora-everywhere-cut", "rte-s3pet-1", "finetune"]
    rows = [{**ROW, "label": label} for label in labels]
    rows[2] |= {"n_params": 12_345_678, "modules": 1234, "test": None}
    rows[-1] |= {"n_params": 737_668_096, "modules": None}
    result = {"task": "superglue/multirc", "metric": "accuracy", "budget": 102_458, "n_backbone": 737_668_096}
    Console(width=80, force_jupyter=False).print(closing_table({**result, "rows": rows}))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    shown = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert [cells[0] for cells in shown] == labels
    assert shown[2][1:] == ["1,234", "12,345,678", "0.8000", "–"]
    assert shown[-1][1:] == ["–", "737,668,096", "0.8000", "0.7500"]


SAID = {"protocol": "steps", "budget": "budget", "dropout": "dropout", "order": "order", "stop_after": "early stop",
        "n_eval": "2,000 rows"}


@pytest.mark.parametrize("command", ["search", "prune"])
def test_help_says_where_a_command_differs_from_its_paper(command):
    from s3pet_nb.lab.experiment import differences_from_paper

    help_text = " ".join(CliRunner().invoke(app, [command, "--help"]).stdout.split())
    unlike = help_text[help_text.index("Unlike the paper"):help_text.index("nothing differs")]
    whole, paper = (study(f"{command}{length}") for length in ("", "-paper"))
    names = [line.split()[0] for line in differences_from_paper(resolve(whole.template, whole.params))]
    assert {"protocol", "budget", "dropout"} <= set(names)
    assert all(SAID[name] in unlike for name in names)
    assert not differences_from_paper(resolve(paper.template, paper.params))


def test_what_the_commands_import_later_is_there():
    "Every name that is asked of a `Later`, which no linter can see."
    from s3pet_nb import cli

    later = {name: one for name, one in vars(cli).items() if isinstance(one, cli.Later)}
    asked = {(node.value.id, node.attr) for node in ast.walk(ast.parse(Path(cli.__file__).read_text()))
             if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in later}
    assert {name for name, _ in asked} == set(later)
    for name, attribute in asked - {("ray", "Ray")}:  # an extra
        assert getattr(later[name], attribute) is not None


def test_help_imports_nothing_heavy():
    code = ("import sys\nfrom s3pet_nb.cli import main\nsys.argv = ['s3pet', '--help']\n"
            "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
            "print(sorted({'torch', 'papermill', 'plotly', 'pandas', 'transformers'} & set(sys.modules)))")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "search" in shown and shown.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command, own", [
    ("search", ["gate", "order"]), ("prune", ["granularity", "criterion"]), ("probe", ["score"])])
def test_help_fits_eighty_columns_and_names_every_option(monkeypatch, command, own):
    monkeypatch.setenv("COLUMNS", "80")
    shown = subprocess.run([*S3PET, command, "--help"], capture_output=True, text=True, check=True).stdout
    assert max(map(len, shown.splitlines())) <= 80
    for name in ("task", "backbone", "budget", "seed", "data-dir", "space", *own, "steps", "retrain-steps",
                 "out", "set"):
        assert f"--{name}" in shown


def written_study(tmp_path, *cells, seeds="[0, 1]"):
    "A study file of a template that writes its seed down."
    path = write_template(tmp_path / "count.ipynb", *cells, RESULT)
    (tmp_path / "mine.yml").write_text(f"template: {path}\ntitle: <b>Mine\nseeds: {seeds}\n")
    return str(tmp_path / "mine.yml")


def test_a_dry_run_lists_the_runs_and_leaves_nothing(invoke, tmp_path):
    path = written_study(tmp_path)
    ended = invoke("study", path, "--dry-run")
    assert ended.exit_code == 0 and not (tmp_path / "reports").exists()
    assert ended.stdout.count("waiting") == 2 and "2 runs: 0 done, 2 to run, time unknown" in ended.stdout


@pytest.mark.parametrize("columns", [80, 60])
def test_a_narrow_terminal_costs_no_name_of_a_run(invoke, tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    template, long = write_template(tmp_path / "count.ipynb", RESULT), "a very long name of a method, " * 4
    asked = checked("mine", {"template": str(template), "grid": {"task": ["/data/" + 30 * "long/"]},
                             "methods": {long: {}}, "seeds": [0, 1]})
    (tmp_path / "mine.yml").write_text(json.dumps(
        {name: value for name, value in asdict(asked).items() if name in ("template", "grid", "methods", "seeds")}))
    lines = invoke("study", "mine.yml", "--dry-run").stdout.splitlines()
    assert all(any(line.startswith(question.id) and "waiting" in line for line in lines)
               for question in asked.questions())
    assert max(map(len, lines[:-1])) <= columns


def test_a_page_that_could_not_be_drawn_is_said(invoke, tmp_path, monkeypatch):
    path = written_study(tmp_path, seeds="[0]")
    invoke("study", path)
    (page,) = (tmp_path / "reports" / "mine").glob("*/report.html")
    page.unlink()
    (page.parent / "run.ipynb").write_text("torn")
    ended = invoke("study", path)
    assert ended.exit_code == 0 and f"{page.parent.name}: no page: " in ended.stderr


def test_a_study_is_run_told_and_told_again(invoke, tmp_path):
    path = written_study(tmp_path, "assert seed == 0, 'no other seed'")
    ended = invoke("study", path, "--retries", "0")
    assert ended.exit_code == 1 and "1 of 2 runs are done, 0 of them were before" in ended.stdout
    assert "AssertionError: no other seed" in ended.stderr and "1 of 2 runs of study 'mine' have no result" in ended.stderr
    page = tmp_path / "reports" / "mine" / "index.html"
    assert "&lt;b&gt;Mine" in page.read_text() and "<b>Mine" not in page.read_text()
    assert "mine/index.html" in (tmp_path / "reports" / "index.html").read_text()

    ended = invoke("study", path, "--only", "seed=0", "--dry-run")
    assert "1 runs: 1 done, 0 to run" in ended.stdout
    page.unlink()
    write_template(tmp_path / "count.ipynb", RESULT)  # a changed template hides nothing that was found
    ended = invoke("report", "reports/mine")
    assert ended.exit_code == 0 and "1 of 2 runs are done" in page.read_text()


@pytest.mark.parametrize("words, sentence", [
    (["--set", "sede=1"], "unknown count parameter 'sede'; did you mean 'seed'"),
    (["--only", "seed=7"], "no run of study 'mine' is seed=7"),
    (["--slots", "0"], "slots is 0; give at least 1"),
    (["--slots", "2", "--backend", "ray"], "slots are for the backend local"),
    (["--backend", "slurm"], "unknown backend 'slurm'"),
    (["--address", "auto"], "give --backend ray"),
    (["--retries", "-1"], "retries is -1"),
])
def test_a_study_that_cannot_be_run_is_one_sentence(invoke, tmp_path, words, sentence):
    ended = invoke("study", written_study(tmp_path), *words)
    assert ended.exit_code == 1 and sentence in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "reports").exists()


@pytest.mark.parametrize("word, changes", [("budget=500", False), ("order=first", True)])
def test_a_setting_that_no_run_would_get_is_refused(invoke, word, changes):
    ended = invoke("study", "small-figure-4", "--set", word, "--dry-run")
    assert ended.exit_code == (0 if changes else 1)
    assert changes or f"--set {word} changes no run of study 'small-figure-4'" in ended.stderr.replace("500.0", "500")


def test_all_that_is_wrong_with_a_study_has_a_line_of_its_own(invoke, tmp_path):
    (tmp_path / "mine.yml").write_text("template: search\nparams: {spice: mix, budget: 2e-4}\ngrid: {gate: []}\n")
    ended = invoke("study", "mine.yml")
    assert ended.exit_code == 1 and ended.stderr.startswith("error: study 'mine' has 3 faults:\n- ")
    assert ended.stderr.count("\n- ") == 3


def test_what_only_a_look_at_backbone_and_rows_can_tell_is_told_of_all_runs_before_any(invoke, tmp_path):
    (tmp_path / "mine.yml").write_text(
        "template: search\ngrid: {gate: [global, lokal], budget: [2.0e-4, 1.0e-9]}\nseeds: [0, 1]\n")
    ended = invoke("study", "mine.yml")
    assert ended.exit_code == 1 and not (tmp_path / "reports").exists()
    assert "did you mean 'local'" in ended.stderr and ended.stderr.count("\n- ") == 2


@pytest.mark.parametrize("command", ["search", "prune"])
def test_each_length_is_a_study(command):
    given = [(False, False, False), (True, False, False), (False, True, False), (False, False, True)]
    assert [of_length(command, *flags) for flags in given] == [command, f"{command}-quick", command, f"{command}-paper"]
