"Selection against every set there is, files that come back as they went, structures on other models."
import hashlib
import json
import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from s3pet_nb.core import UnknownName
from s3pet_nb.model.backbone import FAMILIES, example_batch, tiny
from s3pet_nb.model.space import NORM, SPACES, Rule, SearchSpace, make_space
from s3pet_nb.model.structure import (Structure, gap, jaccard, kept_space, mean_structure, rank_correlation,
                                      select)

RULES = (Rule("lora", ("q", "v"), {"r": 2}), Rule("lora", ("q", "v"), {"r": 4, "lora_alpha": 8.0}),
         Rule("lowrank_adapter", ("ffn",), {"init": "glorot"}), Rule("lnfit", NORM))
KNAPSACK = ("greedy", "exact")


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


def dropped_one_by_one(score: list[float], n: list[int], B: int) -> list[bool]:
    "Pruning as the paper tells it: the lowest unit goes, the first of several, until the rest is within B."
    keep = [True] * len(n)
    while sum(size for size, kept in zip(n, keep) if kept) > B:
        lowest = min((i for i, kept in enumerate(keep) if kept), key=lambda i: score[i])
        keep[lowest] = False
    return keep


def test_drop_is_what_removing_units_one_by_one_leaves():
    rng, empty, tied = np.random.default_rng(4), 0, 0
    for i in range(500):
        _, n, B = instance(rng, int(rng.integers(2, 60)), 300)
        score = torch.tensor(rng.normal(size=len(n)))
        if i % 2:
            score = score.round() + 0.0 * rng.choice([-1, 1])
            tied += len(score.unique()) < len(score)
        wanted = dropped_one_by_one(score.tolist(), n.tolist(), B)
        if not any(wanted):
            empty += 1
            last = int(n[torch.argsort(score, stable=True)[-1]])
            with pytest.raises(ValueError, match=f"keeps nothing: .* has {last:,}; choose at least that"):
                select(score, n, B, "drop")
            assert select(score, n, last, "drop").sum() == 1
            continue
        keep = select(score, n, B, "drop")
        assert keep.tolist() == wanted
        if not keep.all():
            gone = torch.argsort(score, stable=True)[(~keep).sum() - 1]
            assert n[keep].sum() <= B < n[keep].sum() + n[gone]
    assert empty > 10 and tied > 100


def test_drop_refuses_what_the_other_selections_refuse():
    score, n = torch.tensor([-0.1, -3.0, -2.0]), torch.tensor([4, 2, 8])
    assert select(score, n, 14, "drop").all()
    assert select(score, n, 12, "drop").tolist() == [True, False, True]
    for B in 1, 15:
        with pytest.raises(ValueError, match="choose 2 to 14"):
            select(score, n, B, "drop")
    with pytest.raises(ValueError, match="3 finite numbers"):
        select(torch.tensor([0.1, math.nan, 0.2]), n, 8, "drop")


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
    from s3pet_nb.model import structure

    class GaveUp:
        success, message = False, "Time limit reached."

    monkeypatch.setattr(structure, "milp", lambda *given, **more: GaveUp)
    with pytest.raises(RuntimeError, match="Time limit reached.; choose 'greedy'"):
        select(torch.ones(2), torch.tensor([1, 2]), 2, "exact")


@pytest.mark.parametrize("method", KNAPSACK)
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


@pytest.mark.parametrize("method", KNAPSACK)
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


def schema_3(path: Path) -> Path:
    "A structure file as it was before the backbone's shape was in it."
    found().save(path)
    file = json.loads(path.read_text())
    del file["shape"]
    path.write_text(json.dumps(file | {"schema": 3}))
    return path


def schema_2(path: Path) -> Path:
    "A structure file as it was when every module was whole."
    file = json.loads(schema_3(path).read_text())
    del file["masks"]
    for line in file["modules"]:
        del line["of"], line["score"]
    path.write_text(json.dumps(file | {"schema": 2}))
    return path


def schema_1(path: Path, space: str) -> Path:
    "A structure file as it was before rules were in it; paths had no prefix then."
    file = json.loads(schema_2(path).read_text())
    del file["rules"]
    for line in file["modules"]:
        line["path"] = line["path"].removeprefix("bert.")
    path.write_text(json.dumps(file | {"schema": 1, "space": space}))
    return path


@pytest.mark.parametrize("older", [schema_2, schema_3])
def test_a_file_without_a_shape_loads(tmp_path, older):
    assert Structure.load(older(tmp_path / "structure.json")) == replace(found(), shape={})


def test_a_file_of_schema_2_has_neither_parts_nor_masks(tmp_path):
    schema_2(tmp_path / "structure.json")
    text = (tmp_path / "structure.json").read_text()
    for old, new in [('"n": 16', '"n": 16, "of": 32'), ('"space"', '"masks": null, "space"')]:
        (tmp_path / "structure.json").write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match="are not as expected"):
            Structure.load(tmp_path / "structure.json")


@pytest.mark.parametrize("space, rules", [("mix", SPACES["mix"]), ("custom", ())])
def test_a_file_of_schema_1_loads_and_applies(tmp_path, space, rules):
    old = Structure.load(schema_1(tmp_path / "structure.json", space))
    assert old.rules == rules and found().jaccard(old) == 1
    with old.apply(tiny("bert")) as gated:
        assert gated.space.n_params == found().n_params
    old.save(tmp_path / "new.json")
    assert Structure.load(tmp_path / "new.json") == old


@pytest.mark.parametrize("old, new, says", [
    ('"schema": 4', '"schema": 5', "neither of schema 2 to 4"),
    ('"schema": 4', '"schema": 1', "neither of schema 2 to 4"),
    ('"schema": 4', '"schema": true', "neither of schema 2 to 4"),
    ('"schema": 4', '"schema": 3', "fields shape are not as expected"),
    ('"schema": 4', '"schema": 2', "fields masks, shape are not as expected"),
    ('"masks": null', '"masks": 3', "masks is '3', which is of the wrong type"),
    ('"of": ', '"of": 1', "in part and there are no masks"),
    ('"score": null', '"score": NaN', "NaN is no number of JSON"),
    ('"score": null', '"score": true', "score is 'True', which is of the wrong type"),
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
    ('"rules": [', '"rule": [', "neither of schema 2 to 4")])
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
    for method in KNAPSACK:
        keep = select(sum(ps) / 4, space.n, 200, method)
        assert mean_structure(space, ps, 200, method).jaccard(Structure.of(space, keep)) == 1


MAM = (Rule("bitfit", ("q", "wi")), Rule("lora", ("q", "wo"), {"r": 4, "init": "balanced"}),
       Rule("lowrank_adapter", ("attn",)))


def random_masks(space: SearchSpace, seed: int, share: float = 0.4) -> dict[str, torch.Tensor]:
    "Every sort of part: some weights whole, some without an entry, some candidates gone."
    rng, masks = torch.Generator().manual_seed(seed), {}
    for i, candidate in enumerate(space.candidates):
        for j, (name, shape) in enumerate(candidate.shapes.items()):
            one = torch.rand(shape, generator=rng) < share
            masks[f"{candidate.name}.{name}"] = (one if (i + j + seed) % 4 else torch.ones_like(one)) & (
                (i + seed) % 5 != 0 and j != 2)
    return masks


def in_part(draw: int = 0, **about) -> Structure:
    space = make_space(tiny("bert"), MAM)
    return Structure.pruned(space, random_masks(space, draw), torch.linspace(-1, 1, len(space)), **about)


def test_a_structure_counts_what_the_masks_keep():
    space = make_space(tiny("bert"), MAM)
    for draw in range(5):
        masks = random_masks(space, draw)
        structure = in_part(draw, task="rte", budget=900, method="prune", seed=7)
        sizes = {candidate.name: sum(int(masks[f"{candidate.name}.{weight}"].sum())
                                     for weight in candidate.shapes) for candidate in space.candidates}
        scores = dict(zip(sizes, torch.linspace(-1, 1, len(space)).tolist()))
        assert {kept.name: kept.n for kept in structure.modules} == {k: n for k, n in sizes.items() if n}
        assert structure.n_params == sum(sizes.values()) == structure.frame().n.sum()
        assert all(kept.of == space.n[list(sizes).index(kept.name)] for kept in structure.modules)
        assert all(bool(kept.bits) is (kept.n < kept.of) for kept in structure.modules)
        assert all((kept.score, kept.p) == (scores[kept.name], None) for kept in structure.modules)
        about = structure.task, structure.budget, structure.method, structure.seed
        assert about == ("rte", 900, "prune", 7)
        assert "bits" not in structure.frame() and "score" in structure._repr_html_()
        assert kept_space(tiny("bert"), structure).n.tolist() == [kept.n for kept in structure.modules]


def test_masks_that_keep_all_give_the_structure_of_whole_modules():
    space = make_space(tiny("bert"), MAM)
    masks = {name: torch.ones_like(mask) for name, mask in random_masks(space, 0).items()}
    assert Structure.pruned(space, masks) == Structure.of(space, torch.ones(len(space), dtype=torch.bool))


def test_masks_and_scores_are_checked():
    space = make_space(tiny("bert"), MAM)
    masks = random_masks(space, 0)
    name = f"{space.candidates[0].name}.b"
    for wrong in ({k: m for k, m in masks.items() if k != name}, masks | {name: torch.ones(3).bool()},
                  masks | {name: torch.ones(16)}):
        with pytest.raises(ValueError, match=f"{name} needs a bool mask of shape .16,."):
            Structure.pruned(space, wrong)
    for scores in torch.zeros(3), torch.full((len(space),), math.nan):
        with pytest.raises(ValueError, match=f"scores must be {len(space)} finite numbers"):
            Structure.pruned(space, masks, scores)
    with pytest.raises(ValueError, match="no entry at all is kept"):
        Structure.pruned(space, {k: torch.zeros_like(m) for k, m in masks.items()})


def test_modules_in_part_come_back_from_the_two_files(tmp_path):
    path = tmp_path / "found.json"
    for draw in range(4):
        structure = in_part(draw)
        structure.save(path)
        assert Structure.load(path) == structure
        assert sorted(file.name for file in tmp_path.iterdir()) == ["found.json", "found.safetensors"]
        file = json.loads(path.read_text())
        assert file["masks"] == hashlib.sha256(path.with_suffix(".safetensors").read_bytes()).hexdigest()
        assert set(file["modules"][0]) == {"stack", "layer", "role", "module", "settings", "n", "of", "p",
                                           "score", "path"}
    first = path.with_suffix(".safetensors").read_bytes()
    Structure.load(path).save(path)
    assert path.with_suffix(".safetensors").read_bytes() == first, "the same structure, byte for byte"
    found().save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["found.json"] and Structure.load(path) == found()


def test_another_file_of_the_sidecars_name_is_neither_written_over_nor_removed(tmp_path):
    weights, path = tmp_path / "model.safetensors", tmp_path / "model.json"
    for content in safetensors.numpy.save({"w": np.ones(3)}), b"no safetensors":
        weights.write_bytes(content)
        with pytest.raises(FileExistsError, match="is not free for the masks"):
            in_part().save(path)
        assert not path.exists()
        found().save(path)
        assert weights.read_bytes() == content and Structure.load(path) == found()
        path.unlink()


def spoil(path: Path, change) -> None:
    "Change the masks and make the sum in the structure file agree, as a maker of such files could."
    beside = path.with_suffix(".safetensors")
    masks = safetensors.numpy.load(beside.read_bytes())
    beside.write_bytes(safetensors.numpy.save(change(dict(masks))))
    file = json.loads(path.read_text())
    file["masks"] = hashlib.sha256(beside.read_bytes()).hexdigest()
    path.write_text(json.dumps(file))


FIRST = "encoder.0.q.lora(r=4,init=balanced).A"


@pytest.mark.parametrize("change, says", [
    (lambda masks: masks | {FIRST: 255 - masks[FIRST]}, r"entries of encoder.0.q.lora\(r=4,.*\), not"),
    (lambda masks: {k: m for k, m in masks.items() if k != FIRST}, "entries of encoder.0.q.lora"),
    (lambda masks: masks | {"encoder.9.q.lora.A": masks[FIRST]}, "encoder.9.q.lora.A is no mask of a kept"),
    (lambda masks: masks | {FIRST: masks[FIRST].astype(np.int32)}, "A is no mask of a kept"),
    (lambda masks: {}, "keeps 0 of")])
def test_masks_that_do_not_agree_with_the_counts_are_refused(tmp_path, change, says):
    path = tmp_path / "structure.json"
    in_part().save(path)
    assert FIRST in safetensors.numpy.load(path.with_suffix(".safetensors").read_bytes())
    spoil(path, change)
    with pytest.raises(ValueError, match=f"does not hold the masks of .*{says}.*; copy both files"):
        Structure.load(path)


def renamed(masks: dict) -> dict:
    return {name.replace(").A", ").C"): mask for name, mask in masks.items()}


def longer(masks: dict) -> dict:
    return masks | {FIRST: np.append(masks[FIRST], np.uint8(0))}


@pytest.mark.parametrize("change, says", [
    (renamed, "masks of encoder.0.q.lora.* are not those of its weights"),
    (longer, "a mask of 64 entries has 8 bytes, not 9")])
def test_masks_that_do_not_fit_the_weights_are_refused_before_anything_is_built(tmp_path, change, says):
    path = tmp_path / "structure.json"
    in_part().save(path)
    spoil(path, change)
    with pytest.raises(ValueError, match=says):
        kept_space(tiny("bert"), Structure.load(path))


def test_a_bit_behind_the_last_entry_keeps_nothing(tmp_path):
    model = tiny("bert", hidden_size=12)
    space = make_space(model, [Rule("bitfit", "q")])
    mask = torch.arange(12) < 5
    structure = Structure.pruned(space, {f"{candidate.name}.b": mask for candidate in space.candidates})
    path = tmp_path / "structure.json"
    structure.save(path)
    spoil(path, lambda masks: {name: np.array([0b11110000, 0b00000001], np.uint8) for name in masks})
    with pytest.raises(ValueError, match="masks of encoder.0.q.bitfit are not those of its weights"):
        kept_space(model, Structure.load(path))


@pytest.mark.parametrize("spoilt", [None, b"", b"\0" * 40, "other"])
def test_a_missing_torn_or_foreign_sidecar_is_named(tmp_path, spoilt):
    path, beside = tmp_path / "structure.json", tmp_path / "structure.safetensors"
    in_part().save(path)
    if spoilt is None:
        beside.unlink()
    elif spoilt == "other":
        in_part(1).save(tmp_path / "other.json")
        beside.write_bytes((tmp_path / "other.safetensors").read_bytes())
    else:
        beside.write_bytes(spoilt)
    why = "it is missing" if spoilt is None else "it was not saved with this structure"
    says = f"^{beside} does not hold the masks of {path}: {why}; copy both files$"
    with pytest.raises(ValueError, match=says):
        Structure.load(path)


def test_bytes_that_are_no_safetensors_are_refused_even_if_the_sum_agrees(tmp_path):
    path = tmp_path / "structure.json"
    in_part().save(path)
    path.with_suffix(".safetensors").write_bytes(b"\xff" * 64)
    file = json.loads(path.read_text())
    path.write_text(json.dumps(file | {"masks": hashlib.sha256(b"\xff" * 64).hexdigest()}))
    with pytest.raises(ValueError, match="does not hold the masks of .*; copy both files"):
        Structure.load(path)


def test_a_save_that_fails_between_the_two_files_is_noticed(tmp_path, monkeypatch):
    from s3pet_nb.model import structure
    path = tmp_path / "structure.json"
    in_part().save(path)

    def full_disk(path, text):
        raise OSError("No space left on device")

    monkeypatch.setattr(structure, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        in_part(1).save(path)
    with pytest.raises(ValueError, match="was not saved with this structure; copy both files"):
        Structure.load(path)


def test_a_file_that_keeps_a_module_twice_is_refused(tmp_path):
    path = tmp_path / "structure.json"
    found().save(path)
    file = json.loads(path.read_text())
    path.write_text(json.dumps(file | {"modules": file["modules"][:1] * 2}))
    with pytest.raises(ValueError, match="keeps a module twice"):
        Structure.load(path)


def entries(structure: Structure, space: SearchSpace) -> set[tuple[str, int]]:
    "Every kept entry by the name of its module and its place, the weights one after the other."
    kept = {one.name: one for one in kept_space(tiny("bert"), structure).candidates}
    found = set()
    for candidate in space.candidates:
        if candidate.name in kept:
            bits = "".join(
                "".join(f"{byte:08b}" for byte in kept[candidate.name].bits.get(name, b"\xff" * 999))
                [:shape.numel()] for name, shape in candidate.shapes.items())
            found |= {(candidate.name, i) for i, bit in enumerate(bits) if bit == "1"}
    return found


def test_jaccard_and_difference_of_modules_in_part():
    space = make_space(tiny("bert"), MAM)
    structures = [in_part(draw) for draw in range(3)]
    structures.append(Structure.of(space, torch.arange(len(space)) % 2 == 0))
    for one, two in product(structures, structures):
        mine, theirs = entries(one, space), entries(two, space)
        assert len(mine) == one.n_params
        assert one.jaccard(two, "parameters") == len(mine & theirs) / len(mine | theirs)
        names = [{kept.name for kept in structure.modules} for structure in (one, two)]
        assert one.jaccard(two) == len(names[0] & names[1]) / len(names[0] | names[1])
        same = [name for name in names[0] & names[1]
                if {i for n, i in mine if n == name} == {i for n, i in theirs if n == name}]
        assert len(one.diff(two)) == len(names[0]) + len(names[1]) - 2 * len(same)
        assert (len(one.diff(two)) == 0) is (one is two)
    with pytest.raises(UnknownName, match="'entries'; choose one of modules, parameters"):
        one.jaccard(two, "entries")


def test_whole_modules_of_another_size_have_no_entries_in_common():
    small, large = (Structure.of(make_space(tiny("bert", hidden_size=width), "lora"), torch.ones(12).bool())
                    for width in (16, 32))
    assert (small.jaccard(large), small.jaccard(large, "parameters")) == (1, 0)


def test_a_part_has_no_place_on_a_model_of_another_size():
    with pytest.raises(ValueError, match="has no place of its size"):
        kept_space(tiny("bert", hidden_size=32), in_part())
