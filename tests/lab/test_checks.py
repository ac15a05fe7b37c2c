"What the templates refuse before a kernel starts, and what a template of one's own may refuse."
import importlib
import json
import re
import subprocess
import sys

import pytest
from templates import RESULT, write_template

from s3pet_nb.lab.checks import blueprint_for, check_compared, check_least, read_structure
from s3pet_nb.lab.study import (Faults, Question, check, check_questions, check_quickly, code_cells,
                                resolve)
from s3pet_nb.learn.train import random_structure
from s3pet_nb.model.backbone import blueprint, tiny
from s3pet_nb.model.space import make_space

FINE = resolve("search", {})


@pytest.mark.parametrize("wrong, sentence", [
    ({"task": "glue/colla"}, "did you mean 'glue/cola'"),
    ({"space": "mixx"}, "did you mean 'mix'"),
    ({"budget": -1.0}, "budget -1.0 is not a positive number"),
    ({"budget": 0.0, "share": 0.0}, "share is 0.0; give a share of the space above 0, at most 1"),
    ({"budget": 3.0}, "the smallest adds 384"),
    ({"budget": 0.5}, "the whole space has 87,168"),
    ({"data_dir": "/no/such/folder"}, "no folder '/no/such/folder'; give a data_dir"),
    ({"backbone": "./my-model"}, "unknown backbone './my-model'"),
    ({"backbone": "minlm"}, "did you mean 'minilm'"),
    ({"order": "frist"}, "did you mean 'first'"),
    ({"evaluate_every": -1}, "evaluate_every is -1; give 0 or more"),
    ({"search_steps": -1}, "search_steps is -1; give 0 or more"),
    ({"search_steps": 0}, "protocol 's3pet' has no epochs for task 'agreement'; give search_steps"),
    ({"retrain_steps": 0}, "has no epochs for task 'agreement'; give retrain_steps"),
    ({"search_lr": -1.0}, "search_lr is -1.0"),
    ({"workers": -1}, "workers is -1"),
    ({"protocol": "s3pte"}, "unknown protocol 's3pte'; did you mean 's3pet'"),
    ({"protocol": "lawton", "task": "glue/cola"}, "nothing may be chosen; give alphas 'last' or 'mean'"),
    ({"form": "txt"}, "unknown form of a task 'txt'; did you mean 'text'"),
    ({"n_train": -1}, "n_train is -1; give 0 or more"),
    ({"gate": "globl"}, "unknown gate 'globl'; did you mean 'global'"),
    ({"order": "atuo"}, "did you mean 'auto'"),
    ({"alphas": "lst"}, "unknown choice of alphas 'lst'; did you mean 'last'"),
    ({"method": "greedi"}, "did you mean 'greedy'"),
    ({"precision": "bf61"}, "did you mean 'bf16'"),
    ({"baselines": ["lnfit", "bitfitt"]}, "unknown baseline 'bitfitt'; did you mean 'bitfit'"),
    ({"baselines": ["fintune"]}, "did you mean 'finetune'"),
    ({"accumulate": 0}, "accumulate is 0; give at least 1"),
    ({"measure_every": -1}, "measure_every is -1; give 0 or more"),
    ({"stop_after": -1}, "stop_after is -1"),
    ({"checkpoint_every": -1}, "checkpoint_every is -1"),
    ({"tau": 0.0}, "tau is 0.0; give a temperature above 0"),
    ({"tau_end": -0.5}, "tau_end is -0.5; give 0 or more"),
    ({"beta": -1.0}, "beta is -1.0"),
    ({"l0": 0.1}, "only the gate 'hard-concrete' has an L0 penalty"),
    ({"gate": "hard-concrete"}, "the size falls to the budget until the end of the search; give alphas 'last'"),
    ({"recipe": "even"}, "recipe 'even' has a rate for each kind of weight; leave lr and search_lr at 0"),
    ({"recipe": "evn", "lr": 0.0, "search_lr": 0.0}, "unknown recipe 'evn'; did you mean 'even'"),
    ({"head": "probed"}, "unknown start of a head 'probed'; did you mean 'probe'"),
    ({"gate": "hard-concrete", "l0": 1.0, "tau_end": 0.1}, "leave tau and tau_end out"),
    ({"gate": "hard-concrete", "l0": 1.0, "tau": 2.0}, "leave tau and tau_end out"),
    ({"order": "second", "precision": "bf16"}, "drowns in the rounding of bf16"),
    ({"order": "auto", "measure_every": 0}, "give measure_every of at least 1"),
    ({"order": "exact", "compiled": True}, "choose another order, or compiled=False"),
    ({"baselines": ["lora-r8"], "cut": True, "budget": 5000.0},
     "baseline 'lora-r8' cannot be cut: no module fits into a budget of 5,000 parameters"),
    ({"structures": ["gone.json"]}, "no structure file 'gone.json'"),
    ({"structures": [3]}, "no structure file 3"),
    ({"start": "gone.json"}, "no structure file 'gone.json'"),
    ({"targets": ["agreement", "agreement"]}, "targets names a task twice: agreement, agreement"),
    ({"sources": ["agreement"]}, "sources names a task twice: agreement, agreement"),
    ({"sources": ["glue/colla"]}, "did you mean 'glue/cola'"),
    ({"targets": ["agreement", "glue/colla"]}, "did you mean 'glue/cola'"),
])
def test_names_and_folders_are_checked_before_a_kernel_starts(wrong, sentence):
    with pytest.raises((LookupError, ValueError, OSError), match=sentence):
        check("search", {**FINE, **wrong})


@pytest.mark.parametrize("fine", [
    {},
    {"gate": "hard-concrete", "l0": 0.1, "beta_end": 0.1},
    {"gate": "hard-concrete", "beta_end": 0.1, "alphas": "last"},
    {"recipe": "even", "lr": 0.0, "search_lr": 0.0},
    {"gate": "local", "order": "auto", "measure_every": 5, "tau_end": 0.1},
    {"baselines": ["lora-r8", "finetune"]},
    {"baselines": ["lora-r8", "lnfit", "finetune"], "cut": True, "budget": 8000.0},
    {"baselines": ["lora-r8"], "cut": True, "budget": 80_000.0},
    {"baselines": [], "n_random": 0},
    {"targets": ["agreement"]},
    {"protocol": "lawton", "alphas": "last", "lr": 0.0, "evaluate_every": 0},
])
def test_what_can_run_is_let_through(fine):
    check("search", {**FINE, **fine})


def test_a_structure_file_must_fit_the_backbone(tmp_path):
    fitting, strange, broken = (tmp_path / name for name in ("fitting.json", "strange.json", "broken.json"))
    random_structure(make_space(blueprint("minilm")), 5000, seed=0).save(fitting)
    random_structure(make_space(tiny("bert")), 100, seed=0).save(strange)
    broken.write_text(fitting.read_text()[:-50])
    check("search", {**FINE, "structures": [str(fitting)]})
    for path, sentence in (strange, "has no place of its size"), (broken, "is not a structure file"):
        with pytest.raises(ValueError, match=sentence):
            check("search", {**FINE, "structures": [str(fitting), str(path)]})


@pytest.fixture(scope="module")
def fine_pruning():
    return resolve("prune", {})


@pytest.mark.parametrize("wrong, sentence", [
    ({"task": "glue/colla"}, "did you mean 'glue/cola'"),
    ({"space": "bais"}, "unknown search space 'bais'; did you mean 'bias'"),
    ({"criterion": "frist-order"}, "unknown pruning criterion 'frist-order'; did you mean 'first-order'"),
    ({"granularity": "structred"}, "unknown granularity 'structred'; did you mean 'structured'"),
    ({"protocol": "lawtn"}, "unknown protocol 'lawtn'; did you mean 'lawton'"),
    ({"recipe": "even"}, "recipe 'even' has a rate for each kind of weight; leave lr and prune_lr at 0"),
    ({"equal_compute": True, "task": "glue/cola"}, "no random structure may be chosen; leave equal_compute out"),
    ({"precision": "bf61"}, "did you mean 'bf16'"),
    ({"baselines": ["lawton-lroa"]}, "did you mean 'lawton-lora'"),
    ({"rounds": 0}, "rounds is 0; give at least 1"),
    ({"evaluate_every": -1}, "evaluate_every is -1; give 0 or more"),
    ({"average_over": -1}, "average_over is -1; give 0 or more"),
    ({"average_over": 5}, "average_over is 5; a training that is pruned has 4 steps"),
    ({"rank": -1}, "rank is -1; give 0 or more"),
    ({"prune_steps": -1}, "prune_steps is -1"),
    ({"retrain_steps": -1}, "retrain_steps is -1"),
    ({"lr": -1e-3}, "lr is -0.001; give 0 or more"),
    ({"prune_lr": -1.0}, "prune_lr is -1.0"),
    ({"finetune_lr": -1.0}, "finetune_lr is -1.0"),
    ({"rank": 4}, "LoRA"),
    ({"targets": ["q"]}, "LoRA"),
    ({"space": "mam", "targets": ["q", "querry"]}, "unknown role 'querry'"),
    ({"data_dir": "/no/such/folder"}, "no folder '/no/such/folder'; give a data_dir"),
    ({"backbone": "minlm"}, "did you mean 'minilm'"),
    ({"budget": -1.0}, "budget -1.0 is not a positive number"),
    ({"budget": 0.0, "share": 0.0}, "share is 0.0; give a share of the space above 0, at most 1"),
    ({"budget": 1e-9}, "is 0 parameters"),
    ({"budget": 1535.0, "granularity": "structured"},
     "1,535 parameters may keep nothing, since structured pruning removes up to 1,536 at once"),
    ({"space": "lora", "rank": 2, "budget": 1919.0}, "removes up to 1,920 at once"),
    ({"budget": 25_728.0}, "a budget of 25,728 prunes nothing, there are 25,728 parameters"),
    ({"budget": 25_728.0, "rounds": 3}, "a budget of 25,728 prunes nothing"),
    ({"budget": 0.5}, "prunes nothing"),
    ({"budget": 25_727.0, "rounds": 3}, "would repeat a budget; give fewer rounds"),
    ({"prune_steps": 0}, "protocol 'lawton' has no epochs for task 'agreement'; give prune_steps"),
    ({"retrain_steps": 0}, "has no epochs for task 'agreement'"),
    ({"structures": ["gone.json"]}, "no structure file 'gone.json'"),
])
def test_a_pruning_that_cannot_run_is_refused(fine_pruning, wrong, sentence):
    with pytest.raises((LookupError, ValueError, OSError), match=sentence):
        check("prune", {**fine_pruning, **wrong})


@pytest.mark.parametrize("fine", [
    {},
    {"budget": 1536.0, "granularity": "structured"},
    {"budget": 1.0, "granularity": "unstructured"},
    {"budget": 4000.0, "granularity": "unstructured", "rounds": 3, "average_over": 1, "evaluate_every": 0},
    {"space": "mam", "rank": 4, "targets": ["q", "k", "v"], "budget": 5000.0},
    {"space": "lora", "rank": 2, "budget": 1920.0},
    {"baselines": ["lawton-lora", "lawton-mam", "finetune"], "n_random": 0},
])
def test_a_pruning_that_can_run_is_let_through(fine_pruning, fine):
    check("prune", {**fine_pruning, **fine})


@pytest.mark.parametrize("wrong, sentence", [
    ({"task": "glue/colla"}, "did you mean 'glue/cola'"),
    ({"space": "mixx"}, "unknown search space 'mixx'; did you mean 'mix'"),
    ({"probe_score": "gian"}, "unknown score of a probe 'gian'; did you mean 'gain'"),
    ({"select_by": "densty"}, "unknown selection of a probe 'densty'; did you mean 'density'"),
    ({"probe_batches": 0}, "probe_batches is 0; give at least 1"),
    ({"probe_score": "gain", "probe_batches": 1}, "score 'gain' needs at least 2 batches, and is given 1; give more"),
    ({"probe_score": "gain_after", "probe_batches": 1}, "score 'gain_after' needs at least 2 batches"),
    ({"probe_steps": -1}, "probe_steps is -1; give 0 or more"),
    ({"probe_steps": 20}, "score 'gain_along' needs at least 21 steps, and is given 20; give more"),
    ({"probe_steps": 0}, "needs at least 21 steps, and is given 1"),
    ({"probe_steps": 0, "retrain_steps": 62}, "needs at least 21 steps, and is given 20"),
    ({"probe_steps": 0, "retrain_steps": 0, "batch_size": 128}, "needs at least 21 steps, and is given 12"),
    ({"probe_steps": 0, "retrain_steps": 0, "batch_size": 16, "accumulate": 8}, "needs at least 21 steps"),
    ({"recipe": "even", "lr": 1e-3}, "recipe 'even' has a rate for each kind of weight; leave lr at 0"),
    ({"equal_compute": True, "protocol": "lawton", "task": "glue/cola"}, "leave equal_compute out"),
    ({"protocol": "s3pet", "retrain_steps": 0}, "has no epochs for task 'agreement'; give retrain_steps"),
    ({"budget": 3.0}, "the smallest adds 384"),
    ({"budget": 0.0, "share": 0.0}, "share is 0.0"),
    ({"baselines": ["lora-r8"], "cut": True, "budget": 5000.0}, "baseline 'lora-r8' cannot be cut"),
    ({"structures": ["gone.json"]}, "no structure file 'gone.json'"),
])
def test_a_probe_that_cannot_run_is_refused(wrong, sentence):
    with pytest.raises((LookupError, ValueError, OSError), match=sentence):
        check("probe", {**resolve("probe", {}), **wrong})


@pytest.mark.parametrize("fine", [
    {},
    {"probe_score": "gain", "probe_steps": 0, "probe_batches": 2},
    {"probe_score": "fisher", "probe_batches": 1, "select_by": "exact"},
    {"probe_steps": 0, "retrain_steps": 63},
    {"probe_steps": 0, "retrain_steps": 0, "batch_size": 64},
    {"budget": 0.0, "share": 0.2, "baselines": ["finetune"], "n_same_kinds": 2, "upper_first": True,
     "equal_compute": True},
])
def test_a_probe_that_can_run_is_let_through(fine):
    check("probe", {**resolve("probe", {}), **fine})


@pytest.fixture
def halving(tmp_path):
    "A template of one's own whose checks have two cells."
    return write_template(tmp_path / "halving.ipynb", RESULT, checks=(
        "limit = 1.0", "if share > limit:\n    raise ValueError(f'share is {share}; give at most {limit}')"))


def test_a_template_of_ones_own_brings_its_checks(halving):
    check(halving, resolve(halving, {"share": 0.5}))
    with pytest.raises(ValueError, match="share is 2.0; give at most 1.0"):
        check(halving, resolve(halving, {"share": 2.0}))


def test_a_template_without_checks_lets_everything_through(tmp_path):
    plain = write_template(tmp_path / "plain.ipynb", RESULT)
    check(plain, resolve(plain, {"share": -1.0}))


@pytest.mark.parametrize("source, sentence", [
    ("share.gone", "the checks of broken.ipynb ended with AttributeError: 'float' object has no attribute"),
    ("if share >", "the checks of broken.ipynb ended with SyntaxError"),
])
def test_checks_that_fail_by_themselves_are_one_sentence(tmp_path, source, sentence):
    broken = write_template(tmp_path / "broken.ipynb", RESULT, checks=(source,))
    with pytest.raises(ValueError, match=sentence):
        check(broken, resolve(broken, {}))


def test_checks_are_no_part_of_a_question(halving, tmp_path):
    without = write_template(tmp_path / "without.ipynb", RESULT)
    assert Question.of(halving, {}).id == Question.of(without, {}).id


def test_every_distinct_question_is_checked_once_and_all_faults_are_said(halving):
    asked = [Question.of(halving, {"share": share, "seed": seed}, method)
             for share, method in ((2.0, "large"), (0.5, ""), (3.0, "")) for seed in (0, 1)]
    with pytest.raises(Faults) as faults:
        check_questions("mine", asked)
    assert faults.value.each == ["large: share is 2.0; give at most 1.0", "share is 3.0; give at most 1.0"]
    check_questions("mine", asked[2:4])


@pytest.mark.parametrize("least, numbers, sentence", [
    (0, {"steps": 0, "workers": -1}, "workers is -1; give 0 or more"),
    (1, {"rounds": 0}, "rounds is 0; give at least 1"),
])
def test_the_first_number_that_is_too_small_is_named(least, numbers, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_least(least, **numbers)


def test_a_blueprint_has_the_head_that_the_task_needs():
    model = blueprint_for("agreement", "minilm", retrain_steps=1)
    assert model.device.type == "meta" and model.config.num_labels == 2


def test_what_is_compared_must_fit(tmp_path):
    model = blueprint("minilm")
    check_compared(model, 5000, ["lora-r8", "finetune"], False, [])
    with pytest.raises(ValueError, match="baseline 'lora-r8' cannot be cut"):
        check_compared(model, 5000, ["lora-r8"], True, [])
    with pytest.raises(FileNotFoundError, match="no structure file"):
        read_structure(str(tmp_path))


def test_checks_import_nothing_heavy_of_their_own():
    code = ("import sys\nbefore = set(sys.modules)\nimport s3pet_nb.core\ncore = set(sys.modules)\n"
            "import s3pet_nb.lab.checks\n"
            "print(sorted({'torch', 'transformers', 'datasets', 'plotly'} & (set(sys.modules) - core)))")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


QUICK = """\
import json, sys
from s3pet_nb.core import names_in
from s3pet_nb.lab.study import check, refusal, resolve
given, places = json.loads(sys.argv[1])
said = [refusal(check, template, resolve(template, wrong)) for template, wrong in given]
names = {place: names_in(place) for place in places}
print(json.dumps([said, names, sorted({"torch", "transformers", "datasets", "sklearn"} & set(sys.modules))]))"""
PLACES = sorted({place for template in ("search", "prune", "probe") for tags, source in code_cells(template)
                 for place in re.findall(r'names_in\("(.+?)"\)', source)})
MISSPELT = [("search", {"gate": "globall"}, "did you mean 'global'"),
            ("search", {"task": "glue/rtee"}, "did you mean 'glue/rte'.*or give the path of a file"),
            ("search", {"targets": ["glue/rtee"]}, "did you mean 'glue/rte'"),
            *((template, {name: value}, f"unknown .*{word!r}; (did you mean|choose one of)")
              for template in ("search", "prune", "probe")
              for name, value, word in [("space", "mixx", "mixx"), ("protocol", "s3pett", "s3pett"),
                                        ("form", "x", "x"), ("precision", "x", "x"),
                                        ("baselines", ["x"], "x")]),
            *(("search", {name: "x"}, "unknown .* 'x'; choose one of") for name in ("method", "order", "alphas")),
            *(("prune", {name: "x"}, "unknown .* 'x'; choose one of") for name in ("criterion", "granularity")),
            *(("probe", {name: "x"}, "unknown .* 'x'; choose one of") for name in ("probe_score", "select_by"))]


def test_a_misspelt_name_is_refused_before_torch_is_loaded():
    "The names that are read from the sources are also those of the imported modules."
    given = [(template, wrong) for template, wrong, _ in MISSPELT], PLACES
    shown = subprocess.run([sys.executable, "-c", QUICK, json.dumps(given)], capture_output=True, text=True,
                           check=True).stdout
    said, names, heavy = json.loads(shown)
    assert heavy == []
    for (template, wrong, sentence), refused in zip(MISSPELT, said, strict=True):
        assert len(refused) == 1 and re.search(sentence, refused[0]), (template, wrong, refused)
    assert len(PLACES) >= 12
    for place in PLACES:
        module, _, name = place.partition(":")
        assert sorted(names[place]) == sorted(getattr(importlib.import_module(module), name)), place


def test_a_study_with_a_misspelt_name_is_refused_before_torch_is_loaded(tmp_path):
    file = tmp_path / "wrong.yml"
    file.write_text("template: search\nparams: {gate: globall}\nseeds: [0, 1]\n")
    code = ("import sys\nfrom s3pet_nb.cli import main\ntry:\n    main()\nfinally:\n"
            "    print(sorted({'torch', 'papermill', 'pandas', 'transformers', 'datasets'} & set(sys.modules)))")
    shown = subprocess.run([sys.executable, "-c", code, "study", str(file), "--out", str(tmp_path / "reports")],
                           capture_output=True, text=True)
    assert shown.returncode == 1 and shown.stdout.strip() == "[]"
    assert "unknown gate 'globall'; did you mean 'global'" in shown.stderr


def test_a_study_is_refused_quickly_only_if_nothing_is_left_to_check():
    wrong, other, fine = (Question.of("search", {"gate": gate}) for gate in ("globall", "lokal", "local"))
    with pytest.raises(Faults) as refused:
        check_quickly("mine", [wrong, other])
    assert len(refused.value.each) == 2 and "'globall'" in refused.value.each[0]
    check_quickly("mine", [wrong, fine])
    check_quickly("mine", [])


@pytest.mark.parametrize("wrong, sentence", [
    ({"times": 2.0}, "times multiplies the rates of the kinds in vary; give both"),
    ({"times": 0.0}, "times is 0.0; give a factor above 0"),
    ({"vary": ["B"], "lr": 1e-3}, "give both, and leave lr at 0"),
    ({"vary": ["vectors"]}, "unknown kind of rate 'vectors'; did you mean 'vector'"),
    ({"vary": ["B"], "times": 3.0, "protocol": "s3pet"}, "protocol 's3pet' has one rate for all; give a recipe"),
    ({"recipe": "even", "lr": 1e-3}, "recipe 'even' has a rate for each kind of weight; leave lr at 0"),
    ({"n_random": 0, "baselines": []}, "there is nothing to train"),
    ({"share": 2.0}, "share is 2.0; give a share of the space above 0, at most 1")])
def test_a_training_that_cannot_run_is_refused(wrong, sentence):
    with pytest.raises((ValueError, LookupError), match=re.escape(sentence)):
        check("train", resolve("train", wrong))


def test_trainings_with_rates_multiplied_pass():
    check("train", resolve("train", {"vary": ["B", "head"], "times": 3.0, "recipe": "even"}))
    check("train", resolve("train", {"protocol": "s3pet", "lr": 1e-3}))
