"Structures on backbones of another size and family: places by depth and role, the budget kept, nothing lost unsaid."
from dataclasses import replace

import pytest
import torch
import transformers

from s3pet_nb.learn.prune import random_units
from s3pet_nb.model.backbone import FAMILIES, example_batch, tiny
from s3pet_nb.model.pet import PET_MODULES
from s3pet_nb.model.space import LINEAR, NORM, Rule, make_space
from s3pet_nb.model.structure import Structure, select
from s3pet_nb.model.transfer import ROLE_LIKE

FATES = {"moved", "no counterpart", "its place is taken", "above the budget", "added beside"}


def bare(kind: type, config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return kind(config)


def t5(d_model: int, d_ff: int, layers: int, heads: int) -> transformers.PreTrainedModel:
    "T5 v1.0 by its published shape."
    return bare(transformers.T5ForConditionalGeneration,
                transformers.T5Config(d_model=d_model, d_ff=d_ff, num_layers=layers, num_heads=heads))


def encoder(name: str, width: int = 768, layers: int = 12) -> transformers.PreTrainedModel:
    "BERT or RoBERTa by their published shapes."
    config = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[name]
    kind = {"bert": transformers.BertForSequenceClassification,
            "roberta": transformers.RobertaForSequenceClassification}
    return bare(kind[name], config(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64,
                                   intermediate_size=4 * width))


SHAPES = {"t5-base": lambda: t5(768, 3072, 12, 12), "t5-large": lambda: t5(1024, 4096, 24, 16),
          "t5-small": lambda: t5(512, 2048, 6, 8), "bert-base": lambda: encoder("bert"),
          "roberta-base": lambda: encoder("roberta"), "roberta-large": lambda: encoder("roberta", 1024, 24)}


def structure_of(model, B: float = 0.05, seed: int = 0, space: str | tuple = "mix") -> Structure:
    "As if it was searched: p in clusters, as searches leave them, and a budget that is a share of the space."
    space = make_space(model, space)
    p = torch.rand(len(space), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) ** 3
    B = int(B * space.n_params)
    return Structure.of(space, select(p, space.n, B), p, task="rte", budget=B, method="s3pet", seed=seed)


def check(moved: Structure, report, found: Structure, B: int) -> None:
    "What holds for every transfer, however it went."
    assert moved.n_params <= B
    assert len({kept.name for kept in moved.modules}) == len(moved)
    assert set(report.why) <= FATES
    of_source = report[report.why != "added beside"]
    assert len(of_source) == len(found)
    assert list(of_source.n) == [kept.n for kept in found.modules]
    assert ((of_source.to != "") == (of_source.why == "moved")).all()
    named = [name for row in report[report.to != ""].to for name in row.split(", ")]
    assert sorted(named) == sorted(kept.name for kept in moved.modules)


@pytest.mark.parametrize("source, target", [
    ("t5-base", "t5-large"), ("bert-base", "roberta-base"), ("t5-large", "t5-base"), ("t5-large", "t5-small"),
    ("bert-base", "roberta-large"), ("roberta-large", "bert-base")])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_budget_is_kept_within_one_module_and_what_was_dropped_is_listed(source, target, seed):
    found, model = structure_of(SHAPES[source](), seed=seed), SHAPES[target]()
    moved, report = found.transfer(model), found.counterparts(model)
    check(moved, report, found, found.n_params)
    largest = max(kept.n for kept in moved.modules)
    assert found.n_params - largest < moved.n_params <= found.n_params
    assert moved.n_backbone == sum(weight.numel() for weight in model.parameters())
    dropped = report[(report.to == "") & (report.why != "its place is taken")]
    assert set(dropped.why) <= {"no counterpart", "above the budget"}
    if (source, target) == ("t5-base", "t5-large"):
        assert 0 < len(dropped) < len(found) and (dropped.why == "above the budget").all()
        kept = report[report.why == "moved"]
        assert kept.p.mean() > dropped.p.mean()
    if (source, target) == ("bert-base", "roberta-base"):
        assert len(dropped) == 0 and (report.why == "moved").all()
        assert [kept.name for kept in moved.modules] == [kept.name for kept in found.modules]


def test_a_stated_budget_is_met_as_a_count_and_as_a_ratio():
    found, model = structure_of(SHAPES["t5-base"]()), SHAPES["t5-large"]()
    for budget, B in (102_458, 102_458), (1.389e-4, 102_462):
        moved = found.transfer(model, budget)
        check(moved, found.counterparts(model, budget), found, B)
        assert B - max(kept.n for kept in moved.modules) < moved.n_params and moved.budget == B
    assert found.transfer(model).budget == found.budget


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("B", [0.1, 0.5, 1.0])
def test_on_its_own_shape_a_structure_is_what_it_was(family, B):
    model = tiny(family)
    found = structure_of(model, B)
    again = found.transfer(tiny(family, num_labels=3, seed=1))
    assert again.modules == found.modules and (found.counterparts(model).why == "moved").all()
    assert again == replace(found, n_backbone=again.n_backbone, method="s3pet-transferred")


@pytest.mark.parametrize("source", FAMILIES)
@pytest.mark.parametrize("target", FAMILIES)
def test_every_family_meets_every_other(source, target):
    found = structure_of(tiny(source), 0.4)
    model = tiny(target, num_hidden_layers=3) if target not in ("t5", "gpt2") else tiny(target)
    moved, report = found.transfer(model), found.counterparts(model)
    check(moved, report, found, found.n_params)
    with moved.apply(model) as gated, torch.no_grad():
        assert gated.space.n_params == moved.n_params
        gated(**example_batch(model))
    alike = {(role, role) for role in {kept.role for kept in found.modules}}
    alike |= {(role, other) for role, others in ROLE_LIKE.items() for other in others}
    for row in report[report.to != ""].itertuples():
        assert all((row.name.split(".")[-2], name.split(".")[-2]) in alike for name in row.to.split(", "))


@pytest.mark.parametrize("layers, expected", [(2, [0, 0, 1, 1]), (4, [0, 1, 2, 3]), (8, [0, 2, 4, 6]),
                                              (3, [0, 1, 1, 2])])
def test_layers_go_to_the_same_relative_depth(layers, expected):
    model = tiny("bert", num_hidden_layers=4)
    space = make_space(model, [Rule("lora", "q")])
    p = torch.tensor([0.9, 0.8, 0.7, 0.6], dtype=torch.float64)
    found = Structure.of(space, torch.ones(4, dtype=torch.bool), p)
    report = found.counterparts(tiny("bert", num_hidden_layers=layers), 10_000)
    for row, to in zip(report[report.why != "added beside"].itertuples(), expected):
        assert row.to in (f"encoder.{to}.q.lora", "")
        assert (row.to == "") == (row.why == "its place is taken")
    assert sum(report.why.isin(["moved", "added beside"])) == layers, "the room that is left is used"


def test_query_key_and_value_become_one_product_and_part_again():
    bert, gpt2 = tiny("bert"), tiny("gpt2")
    space = make_space(bert, [Rule("lora", ("q", "k", "v"))])
    found = Structure.of(space, torch.ones(len(space), dtype=torch.bool))
    report = found.counterparts(gpt2, 10_000)
    assert report.why.tolist().count("moved") == 2 and report.why.tolist().count("its place is taken") == 4
    back = found.transfer(gpt2, 10_000).transfer(bert, 10_000)
    assert [kept.key for kept in back.modules] == [kept.key for kept in found.modules]


def test_what_the_other_family_lacks_is_named():
    found = structure_of(tiny("t5", "seq2seq"), 0.6)
    report = found.counterparts(tiny("bert"))
    lost = report[report.why == "no counterpart"].name
    of_encoder = lost.str.startswith("encoder")
    assert len(of_encoder) and lost[of_encoder].str.startswith("encoder.final_norm").all()
    assert set(report[report.name.str.startswith("decoder")].why) == {"no counterpart"}


def test_nothing_that_fits_is_said():
    model = tiny("t5", "seq2seq")
    space = make_space(model, [Rule("lora", "cross_q")])
    found = Structure.of(space, torch.ones(len(space), dtype=torch.bool))
    with pytest.raises(ValueError, match="no module of this structure has a place on this bert model within 64"):
        found.transfer(tiny("bert"))
    with pytest.raises(ValueError, match="within 10 parameters"):
        found.transfer(model, 10)


def test_modules_in_part_go_along_where_the_size_is_the_same_and_as_whole_columns_elsewhere():
    model = tiny("bert")
    space = make_space(model, [Rule("lora", LINEAR, {"r": 4}), Rule("bitfit", NORM)])
    columns, entries = (random_units(space, space.n_params // 2, granularity, 0)
                        for granularity in ("structured", "unstructured"))
    for found in columns, entries:
        assert found.transfer(tiny("bert", seed=1)).modules == found.modules
    wider = tiny("bert", hidden_size=32)
    report = columns.counterparts(wider, 10 ** 6)
    assert (report[report.why != "added beside"].why == "moved").all()
    moved = columns.transfer(wider, 10 ** 6)
    ranks = {kept.name.split("(")[0]: kept.n * kept.settings["r"] / kept.of for kept in columns.modules
             if kept.module == "lora"}
    for kept in moved.modules:
        assert not kept.bits
        if kept.module == "lora" and kept.name.split("(")[0] in ranks and kept.settings["r"] < 4:
            assert kept.settings["lora_alpha"] / kept.settings["r"] == 4
    with moved.apply(wider) as gated:
        assert gated.space.n_params == moved.n_params
    torn = entries.counterparts(wider, 10 ** 6)
    assert "no counterpart" in set(torn[torn.n < torn.n.max()].why)


def test_a_transferred_structure_comes_back_from_its_file(tmp_path):
    moved = structure_of(tiny("bert"), 0.5).transfer(tiny("gpt2"))
    moved.save(tmp_path / "structure.json")
    assert Structure.load(tmp_path / "structure.json") == moved
    assert all(kept.module in PET_MODULES for kept in moved.modules) and moved.family == "gpt2"


def test_a_part_of_a_module_has_no_place_where_widths_are_turned():
    space = make_space(tiny("bert"), [Rule("lora", "wi", {"r": 2})])
    masks = {f"{c.name}.{name}": torch.zeros(shape, dtype=torch.bool) for c in space.candidates
             for name, shape in c.shapes.items()}
    for mask in masks.values():
        mask.view(-1)[:5] = True
    found = Structure.pruned(space, masks)
    turned = tiny("bert", intermediate_size=16, hidden_size=32)
    assert make_space(turned, space.rules).n.equal(space.n)
    with pytest.raises(ValueError, match="no module of this structure has a place"):
        found.transfer(turned, 10_000)
