"Selection against every set there is, files that come back as they went, structures on other models."
import json
import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from s3pet_nb.backbone import FAMILIES, example_batch, tiny
from s3pet_nb.space import NORM, SPACES, Rule, make_space
from s3pet_nb.structure import (METHODS, Structure, gap, jaccard, mean_structure, rank_correlation,
                                select)

RULES = (Rule("lora", ("q", "v"), {"r": 2}), Rule("lora", ("q", "v"), {"r": 4, "lora_alpha": 8.0}),
         Rule("lowrank_adapter", ("ffn",), {"init": "glorot"}), Rule("lnfit", NORM))


def found(space: str | tuple = "mix", B: int = 300, seed: int = 0, **about) -> Structure:
    space = make_space(tiny("bert"), space)
    p = torch.rand(len(space), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Structure.of(space, select(p, space.n, B), p, budget=B, method="s3pet", **about)


def instance(rng: np.random.Generator, size: int, largest: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    "Probabilities, sizes and a budget; every third instance has few distinct sizes, every fourth ties in p."
    p, n = rng.random(size), rng.integers(1, largest, size)
    if rng.random() < 1 / 3:
        n = rng.choice([384, 768, 1_248], size)
    if rng.random() < 1 / 4:
        p = rng.choice([0.0, 0.2, 0.5, 1.0], size)
    return torch.tensor(p), torch.tensor(n), int(rng.integers(n.min(), n.sum() + 1))


def test_the_exact_selection_is_the_best_of_all_sets():
    rng, sets = np.random.default_rng(0), np.array(list(product([0.0, 1.0], repeat=14)))
    beaten = 0
    for _ in range(1_000):
        p, n, B = instance(rng, 14, 100)
        keep = select(p, n, B, "exact")
        assert int(n[keep].sum()) <= B
        best = (sets @ p.numpy())[sets @ n.numpy() <= B].max()
        np.testing.assert_allclose(float(p[keep].sum()), best, rtol=1e-12)
        greedy = float(p[select(p, n, B)].sum())
        assert gap(p, n, B) == pytest.approx((best - greedy) / (best or 1), abs=1e-12)
        beaten += greedy < best * (1 - 1e-9)
    assert beaten > 300


def highest_sum(p: np.ndarray, n: np.ndarray, B: int) -> float:
    "The knapsack by dynamic programming over every whole budget up to B."
    best = np.zeros(B + 1)  # best[b]: highest sum of p within b
    for worth, size in zip(p, n):
        best[size:] = np.maximum(best[size:], best[:max(B + 1 - size, 0)] + worth)
    return float(best[-1])


def test_the_exact_selection_agrees_with_a_method_that_shares_nothing_with_it():
    rng = np.random.default_rng(1)
    for _ in range(20):
        p, n, B = instance(rng, 110, 5_000)
        keep = select(p, n, B, "exact")
        assert int(n[keep].sum()) <= B
        assert float(p[keep].sum()) == pytest.approx(highest_sum(p.numpy(), n.numpy(), B), abs=5e-6)


def test_small_probabilities_are_not_lost_to_the_solvers_tolerance():
    p, n = torch.tensor([0.02, 1e-9, 3e-9, 2e-9], dtype=torch.float64), torch.tensor([5000, 100, 100, 100])
    assert select(p, n, 150, "exact").tolist() == select(p, n, 150).tolist() == [False, False, True, False]
    assert gap(p, n, 150) == 0


def test_a_solver_that_gives_up_is_not_believed(monkeypatch):
    from s3pet_nb import structure

    class GaveUp:
        success, message = False, "Time limit reached."

    monkeypatch.setattr(structure, "milp", lambda *given, **more: GaveUp)
    with pytest.raises(RuntimeError, match="Time limit reached.; choose 'greedy'"):
        select(torch.ones(2), torch.tensor([1, 2]), 2, "exact")


@pytest.mark.parametrize("method", METHODS)
def test_no_selection_is_above_the_budget_or_depends_on_chance(method):
    rng = np.random.default_rng(2)
    for _ in range(30):
        p, n, B = instance(rng, 40, 20_000)
        keep = select(p, n, B, method)
        assert int(n[keep].sum()) <= B
        assert torch.equal(select(p, n, B, method), keep)
    n = torch.tensor([3, 2, 2, 2, 1])
    assert select(torch.ones(5), n, 5, method).tolist()[-1] is (method == "exact"), "greedy takes 3 and 2"
    assert select(torch.full((5,), 0.5), torch.full((5,), 7), 20, method).sum() == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_selection_within_the_limits_of_the_budget(method):
    p, n = torch.tensor([0.1, 1e-3, 0.9]), torch.tensor([4, 2, 8])
    assert select(p, n, 14, method).all(), "the whole space fits"
    assert select(p, n, 2, method).tolist() == [False, True, False]
    for B in 1, 15:
        with pytest.raises(ValueError, match="choose 2 to 14"):
            select(p, n, B, method)
    for wrong in torch.tensor([0.1, math.nan, 0.2]), torch.tensor([0.1, 0.2]):
        with pytest.raises(ValueError, match="3 finite numbers"):
            select(wrong, n, 8, method)


def test_the_gap_where_nothing_has_a_probability_is_zero():
    assert gap(torch.zeros(3), torch.tensor([1, 2, 3]), 3) == 0


@pytest.mark.parametrize("space", [*SPACES, RULES], ids=[*SPACES, "custom"])
def test_a_structure_comes_back_with_the_rules_of_its_space(tmp_path, space):
    structure = found(space, B=300, task="rte", seed=3)
    structure.save(tmp_path / "structure.json")
    again = Structure.load(tmp_path / "structure.json")
    assert again == structure and len(again) > 1
    assert again.rules == make_space(tiny("bert"), space).rules
    assert again.rules == (RULES if space is RULES else SPACES[space])
    assert make_space(tiny("bert"), again.rules).candidates == make_space(tiny("bert"), space).candidates
    lines = (tmp_path / "structure.json").read_text().splitlines()
    assert sum('"roles"' in line for line in lines) == len(again.rules)
    assert sum('"path"' in line for line in lines) == len(again)


def schema_1(path: Path, space: str) -> Path:
    "A structure file as it was before rules were in it; paths had no prefix then."
    found().save(path)
    file = json.loads(path.read_text())
    del file["rules"]
    for line in file["modules"]:
        line["path"] = line["path"].removeprefix("bert.")
    path.write_text(json.dumps(file | {"schema": 1, "space": space}))
    return path


@pytest.mark.parametrize("space, rules", [("mix", SPACES["mix"]), ("custom", ())])
def test_a_file_of_schema_1_loads_and_applies(tmp_path, space, rules):
    old = Structure.load(schema_1(tmp_path / "structure.json", space))
    assert old.rules == rules and found().jaccard(old) == 1
    with old.apply(tiny("bert")) as gated:
        assert gated.space.n_params == found().n_params
    old.save(tmp_path / "new.json")
    assert Structure.load(tmp_path / "new.json") == old


@pytest.mark.parametrize("old, new, says", [
    ('"schema": 2', '"schema": 3', "neither of schema 2"),
    ('"schema": 2', '"schema": 1', "neither of schema 2"),
    ('"module": "lora", "roles"', '"module": "lorra", "roles"', "unknown PET module 'lorra'"),
    ('"roles": ["q"', '"roles": ["query"', "unknown role 'query'"),
    ('"roles": ["q"', '"roles": [["q"]', "unknown role"),
    ('"roles": ["q", "v"]', '"roles": "q"', "roles is 'q', which is of the wrong type"),
    ('"settings": {"r": 2}', '"settings": {"rank": 2}', "unknown setting of lora 'rank'"),
    ('"settings": {"r": 2}', '"settings": {"r": "2"}', "r of lora is '2'"),
    ('"settings": {"r": 2}', '"settings": {"r": [2]}', "r of lora is"),
    ('"settings": {"r": 2}', '"settings": [2]', "settings is"),
    ('"settings": {"r": 2}}', '"settings": {"r": 2}, "more": 1}', "fields more are not as expected"),
    ('"rules": [', '"rules": [3, ', "fields are missing"),
    ('"rules": [', '"rule": [', "neither of schema 2")])
def test_rules_in_a_file_are_checked(tmp_path, old, new, says):
    path = tmp_path / "structure.json"
    found(RULES).save(path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=f"is not a structure file: .*{re.escape(says)}"):
        Structure.load(path)


@pytest.mark.parametrize("settings, says", [({"rank": 2}, "unknown setting"), ({"r": True}, "r of lora is"),
                                            ({"r": 2.0}, "r of lora is 2.0")])
def test_settings_of_a_kept_module_are_checked(tmp_path, settings, says):
    path = tmp_path / "structure.json"
    found(RULES).save(path)
    file = json.loads(path.read_text())
    kept = next(line for line in file["modules"] if line["module"] == "lora")
    kept["settings"] = settings
    path.write_text(json.dumps(file))
    with pytest.raises(ValueError, match=says):
        Structure.load(path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_structure_goes_on_the_model_of_another_task(family):
    "Found with a head of two labels, put on one of three, on other weights."
    two, three = tiny(family), tiny(family, num_labels=3, seed=1)
    space = make_space(two)
    p = torch.rand(len(space), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    structure = Structure.of(space, select(p, space.n, space.n_params // 4), p)
    batch = example_batch(three)
    with torch.no_grad():
        before = three(**batch).logits
        with structure.apply(three) as gated:
            assert [candidate.n for candidate in gated.space.candidates] == [
                kept.n for kept in structure.modules]
            assert gated.space.rules == space.rules
            torch.testing.assert_close(gated(**batch).logits, before)
            assert before.shape == (4, 3)
            for pet in gated.pets:
                for weight in pet.parameters():
                    torch.nn.init.normal_(weight)
            assert not torch.allclose(gated(**batch).logits, before)
        assert torch.equal(three(**batch).logits, before)


def test_a_place_that_the_other_model_lacks_is_named():
    causal = tiny("gpt2", "causal")
    space = make_space(causal, [Rule("bitfit", "lm_head")])
    structure = Structure.of(space, torch.ones(1, dtype=torch.bool))
    with structure.apply(causal) as gated:
        assert gated.space.n_params == 64
    with pytest.raises(ValueError, match="bitfit at lm_head of gpt2 has no place"):
        with structure.apply(tiny("gpt2")):
            pass


def test_jaccard_of_masks_and_of_structures():
    a, b = torch.tensor([1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 0]).bool()
    assert (jaccard(a, b), jaccard(a, a), jaccard(a, ~a), jaccard(a & ~a, a & ~a)) == (1 / 3, 1, 0, 1)
    space = make_space(tiny("bert"), RULES)
    mask = torch.arange(len(space)) % 2 == 0
    other = torch.arange(len(space)) % 3 == 0
    one, two = Structure.of(space, mask), Structure.of(space, other)
    assert one.jaccard(two) == two.jaccard(one) == jaccard(mask, other) < 1
    assert len(one.diff(two)) == int((mask ^ other).sum())
    assert one.jaccard(replace(one, task="other", seed=7, backbone="another")) == 1


def test_ranks_at_one_place_are_different_modules():
    space = make_space(tiny("bert"), RULES)
    small, large = (torch.tensor([candidate.name == f"encoder.0.q.lora({settings})"
                                  for candidate in space.candidates])
                    for settings in ("r=2", "r=4,lora_alpha=8.0"))
    assert small.sum() == large.sum() == 1
    assert Structure.of(space, small).jaccard(Structure.of(space, large)) == 0


def test_rank_correlation():
    p = torch.tensor([0.1, 0.4, 0.2, 0.9], dtype=torch.float64, requires_grad=True)
    assert rank_correlation(p, p ** 3) == pytest.approx(1)
    assert rank_correlation(p, 1 - p) == pytest.approx(-1)
    assert rank_correlation(p, torch.tensor([0.4, 0.1, 0.2, 0.9])) == pytest.approx(1 - 6 * 8 / (4 * 15))
    assert math.isnan(rank_correlation(p, torch.full((4,), 0.5)))


def test_the_mean_structure_is_selected_by_the_mean():
    space = make_space(tiny("bert"), "lora")
    ps = [torch.zeros(len(space), dtype=torch.float64) for _ in range(3)]
    ps[0][0] = 0.9
    ps[1][1] = ps[2][1] = 0.6
    B = int(space.n[0])
    mean = mean_structure(space, ps, B, task="rte+cb", seed=5)
    assert [kept.role for kept in mean.modules] == ["k"] and mean.modules[0].p == pytest.approx(0.4)
    assert (mean.method, mean.budget, mean.task, mean.seed) == ("s3pet-mean", B, "rte+cb", 5)
    assert mean.rules == SPACES["lora"]
    rng = torch.Generator().manual_seed(0)
    ps = [torch.rand(len(space), dtype=torch.float64, generator=rng) for _ in range(4)]
    for method in METHODS:
        keep = select(sum(ps) / 4, space.n, 200, method)
        assert mean_structure(space, ps, 200, method).jaccard(Structure.of(space, keep)) == 1
