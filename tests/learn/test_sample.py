"Random structures of every sample: within the budget, reproducible, and drawn from what they say."
from itertools import product
from random import Random

import pytest
import torch

from s3pet_nb.learn.sample import SAMPLES, count_sets, ranked_set, thirds
from s3pet_nb.learn.train import kinds_of
from s3pet_nb.model.backbone import tiny
from s3pet_nb.model.space import make_space

SPACE = make_space(tiny("bert", num_hidden_layers=6))
B = SPACE.n_params // 10


@pytest.mark.parametrize("seed", range(5))
def test_ranks_number_all_sets_within_the_budget_once(seed):
    draw = Random(seed)
    sizes = tuple(draw.choice([1, 1, 2, 3, 5]) for _ in range(9))
    for budget in (1, sum(sizes) // 3, sum(sizes)):
        n_sets = count_sets(sizes, budget)[-1][budget]
        found = [tuple(ranked_set(sizes, budget, rank).tolist()) for rank in range(n_sets)]
        wanted = {keep for keep in product([False, True], repeat=9)
                  if sum(size for size, kept in zip(sizes, keep) if kept) <= budget}
        assert len(found) == len(set(found)) and set(found) == wanted and not any(found[0])


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_keeps_the_budget_and_is_its_seed_s_alone(name):
    sample = SAMPLES[name]
    drawn = [sample(SPACE, B, seed) for seed in range(40)]
    assert all(0 < structure.n_params <= B for structure in drawn)
    torch.manual_seed(1)
    assert sample(SPACE, B, 3) == drawn[3] and len({str(structure.modules) for structure in drawn}) > 20
    with pytest.raises(ValueError, match="no module fits into a budget of 1"):
        sample(SPACE, 1, 0)


def test_a_module_is_in_an_even_draw_as_often_as_in_all_sets():
    sizes = SPACE.n.tolist()
    drawn = torch.stack([SAMPLES["uniform"](SPACE, B, seed).mask(SPACE) for seed in range(600)])
    for i in (0, sizes.index(max(sizes))):
        rest = tuple(sizes[:i] + sizes[i + 1:])
        share = count_sets(rest, B)[-1][B - sizes[i]] / count_sets(tuple(sizes), B)[-1][B]
        found = drawn[:, i].double().mean().item()
        assert abs(found - share) < 4 * (share * (1 - share) / len(drawn)) ** 0.5 + 1e-9


def test_strata_leave_out_kinds_and_depths():
    kinds, depths = kinds_of(SPACE), thirds(SPACE)
    drawn = [SAMPLES["stratified"](SPACE, B, seed).mask(SPACE) for seed in range(300)]
    for classes, n in ((kinds, int(kinds.max()) + 1), (depths, 3)):
        seen = [tuple(sorted(set(classes[mask].tolist()))) for mask in drawn]
        assert len(set(seen)) == 2 ** n - 1, "every choice of classes but the empty one"
        alone = sum(len(each) == 1 for each in seen) / len(seen)
        assert n / (2 ** n - 1) - 0.1 < alone
    assert set(depths.tolist()) == {0, 1, 2}
    assert depths.tolist()[:1] == [0] and {d.item() for d, c in zip(depths, SPACE.candidates)
                                           if c.position.layer == 5} == {2}
