"Structures of masks and of parts: what they count, on other models, compared and averaged."
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from structures import MAM, RANKS, in_part, random_masks

from s3pet_nb.core import UnknownName
from s3pet_nb.model.backbone import FAMILIES, example_batch, tiny
from s3pet_nb.model.select import select
from s3pet_nb.model.space import SPACES, Rule, SearchSpace, make_space
from s3pet_nb.model.structure import Structure, jaccard, kept_space, mean_structure


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
    space = make_space(tiny("bert"), RANKS)
    mask = torch.arange(len(space)) % 2 == 0
    other = torch.arange(len(space)) % 3 == 0
    one, two = Structure.of(space, mask), Structure.of(space, other)
    assert one.jaccard(two) == two.jaccard(one) == jaccard(mask, other) < 1
    assert len(one.diff(two)) == int((mask ^ other).sum())
    assert one.jaccard(replace(one, task="other", seed=7, backbone="another")) == 1


def test_ranks_at_one_place_are_different_modules():
    space = make_space(tiny("bert"), RANKS)
    small, large = (torch.tensor([candidate.name == f"encoder.0.q.lora({settings})"
                                  for candidate in space.candidates])
                    for settings in ("r=2", "r=4,lora_alpha=8.0"))
    assert small.sum() == large.sum() == 1
    assert Structure.of(space, small).jaccard(Structure.of(space, large)) == 0


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
    for method in ("greedy", "exact"):
        keep = select(sum(ps) / 4, space.n, 200, method)
        assert mean_structure(space, ps, 200, method).jaccard(Structure.of(space, keep)) == 1


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
