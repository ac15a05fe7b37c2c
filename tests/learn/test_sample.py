"Random structures of every sample: within the budget, reproducible, and drawn from what they say."
from collections import Counter
from itertools import product
from random import Random

import pytest
import torch
from scipy.stats import chisquare

from s3pet_nb.learn.sample import SAMPLES, count_sets, even_set, thirds
from s3pet_nb.learn.train import kinds_of
from s3pet_nb.model.backbone import tiny
from s3pet_nb.model.space import make_space

SPACE = make_space(tiny("bert", num_hidden_layers=6))
B = SPACE.n_params // 10


@pytest.mark.parametrize("seed", range(5))
def test_all_sets_within_the_budget_are_drawn_as_often(seed):
    draw = Random(seed)
    sizes = torch.tensor([draw.choice([1, 1, 2, 3, 5]) for _ in range(6)])
    for budget in (1, int(sizes.sum()) // 3, int(sizes.sum())):
        wanted = [keep for keep in product([False, True], repeat=6)
                  if int(sizes[torch.tensor(keep)].sum()) <= budget]
        assert count_sets(tuple(Counter(sizes.tolist()).items()), budget)[-1][budget] == len(wanted)
        found = Counter(tuple(even_set(sizes, budget, draw).tolist()) for _ in range(60 * len(wanted)))
        assert set(found) == set(wanted) and chisquare([found[keep] for keep in wanted]).pvalue > 1e-4


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
    sizes = Counter(SPACE.n.tolist())
    drawn = torch.stack([SAMPLES["uniform"](SPACE, B, seed).mask(SPACE) for seed in range(600)])
    whole = count_sets(tuple(sizes.items()), B)[-1][B]
    for i in (0, int(SPACE.n.argmax())):
        size = int(SPACE.n[i])
        rest = sizes - Counter([size])
        share = count_sets(tuple(rest.items()), B)[-1][B - size] / whole
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
