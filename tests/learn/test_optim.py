"Weights that are stepped together go where each would go alone, also from a checkpoint."
import math

import pytest
import torch

from s3pet_nb.learn.compute import LoopConfig
from s3pet_nb.learn.learner import load_state, save_state
from s3pet_nb.learn.optim import SMALL, Bundle, Stepper, bundles, stepper_for
from s3pet_nb.model.pet import Pace


def small_and_large(*kinds) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(3,), (1, 4), (), (SMALL,), (SMALL + 1,), (2, 5)]
    return [torch.nn.Parameter(torch.randn(shape, generator=draw, dtype=kind))
            for shape in shapes for kind in kinds or (torch.float32, torch.float64)]


@pytest.mark.parametrize("kind, far", [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("clip", [0.5, float("inf")])
def test_weights_stepped_together_go_where_each_would_go_alone(clip, kind, far):
    "AdamW tensor by tensor, clipped by torch, over 20 steps of 0.01."
    draw, weights, plain = torch.Generator().manual_seed(1), small_and_large(kind), small_and_large(kind)
    stepper = Stepper(weights, lr=0.01, clip=clip, n_steps=20)
    optimizer = torch.optim.AdamW(plain, lr=0.01, weight_decay=0.0, foreach=False)
    assert sorted(vector.numel() for vector in stepper.vectors) == [SMALL + 1, SMALL + 18]
    for step in range(20):
        optimizer.param_groups[0]["lr"] = stepper.lr
        grads = [torch.randn(weight.shape, generator=draw, dtype=weight.dtype) for weight in weights]
        for weight, grad in zip(plain, grads):
            weight.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(plain, clip)
        optimizer.step()
        stepper.step(grads)
    for weight, other in zip(weights, plain):
        assert (weight - other).abs().max() < far and weight.grad is None


def test_weights_at_three_rates_go_where_each_would_go_alone_under_one_clip():
    "A group of the plain AdamW for each weight; three rates in turn."
    kind, draw = torch.float64, torch.Generator().manual_seed(1)
    weights, plain = small_and_large(kind), small_and_large(kind)
    rates = [0.01, 0.03, 0.1] * 2
    stepper = Stepper(weights, lr=rates, clip=0.5, n_steps=20, n_warmup=4)
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": rate} for weight, rate in zip(plain, rates)],
                                  weight_decay=0.0, foreach=False)
    assert len(stepper.optimizer.param_groups) == 3
    for step in range(20):
        for group, rate in zip(optimizer.param_groups, stepper.lr):
            group["lr"] = rate
        grads = [torch.randn(weight.shape, generator=draw, dtype=weight.dtype) for weight in weights]
        for weight, grad in zip(plain, grads):
            weight.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(plain, 0.5)
        optimizer.step()
        stepper.step(grads)
    for weight, other in zip(weights, plain):
        assert (weight - other).abs().max() < 1e-14


def test_one_rate_for_all_is_one_group_with_the_same_bits_as_that_rate_for_each():
    weights, others = small_and_large(), small_and_large()
    one, each = Stepper(weights, 0.1, 2.0, 6), Stepper(others, [0.1] * len(others), 2.0, 6)
    assert one.lr == each.lr == 0.1 and len(each.optimizer.param_groups) == 1
    for stepper in one, each:
        stepper.step([torch.ones_like(weight) for weight in stepper.weights])
    assert all(map(torch.equal, weights, others))


def test_a_loop_steps_each_kind_at_its_rate_and_what_has_none_at_the_one_rate():
    weights = small_and_large(torch.float32)
    paces = [Pace("A", 0.5), Pace("B"), Pace("vector"), Pace("A"), Pace("B", 2.0), Pace("norm")]
    config = LoopConfig(steps=10, lr=0.7, rates={"A": 0.1, "B": 0.2})
    assert stepper_for(config, weights, paces).lr == [0.05, 0.2, 0.7, 0.1, 0.4, 0.7]


@pytest.mark.parametrize("lr, n_vectors", [(0.1, 4), ([0.1, 0.2, 0.3] * 4, 8)])
def test_a_stepper_goes_on_from_what_the_weights_are_with_the_same_bits(lr, n_vectors):
    draw = torch.Generator().manual_seed(1)
    grads = [[torch.randn(weight.shape, generator=draw, dtype=weight.dtype) for weight in small_and_large()]
             for _ in range(6)]
    weights, again = small_and_large(), small_and_large()
    assert len(Stepper(weights, lr=lr, clip=2.0, n_steps=6).vectors) == n_vectors
    whole, first, second = (Stepper(each, lr=lr, clip=2.0, n_steps=6) for each in (weights, again, again))
    for each in grads:
        whole.step([grad.clone() for grad in each])
    for each in grads[:3]:
        first.step([grad.clone() for grad in each])
    second.load_state_dict(first.state_dict())
    for each in grads[3:]:
        second.step([grad.clone() for grad in each])
    assert all(torch.equal(weight, other) for weight, other in zip(weights, again))


def test_the_layout_of_a_gradient_does_not_matter():
    "A product of transposed factors gives a gradient that lies in memory by columns."
    torch.manual_seed(0)
    shape, moved = (300, SMALL // 200), []
    gradient = torch.randn(shape)
    for grad in gradient, gradient.t().contiguous().t():
        weight = torch.nn.Parameter(torch.zeros(shape))
        Stepper([weight], lr=0.1, clip=math.inf, n_steps=2).step([grad.clone(memory_format=torch.preserve_format)])
        moved.append(weight.detach())
    assert torch.equal(*moved) and moved[0].sign().eq(-gradient.sign()).all()


def test_a_stepper_wants_one_gradient_for_each_weight():
    weights = small_and_large()
    with pytest.raises(ValueError, match="shorter|longer"):
        Stepper(weights, lr=0.1, clip=2.0, n_steps=6).step([torch.ones(3)])


def test_small_weights_of_a_kind_share_a_bundle_and_large_ones_stay_alone():
    weights = small_and_large()
    index = {id(weight): k for k, weight in enumerate(weights)}
    groups = [[index[id(weight)] for weight in bundle.weights] for bundle in bundles(weights)]
    assert sorted(map(len, groups)) == [1, 1, 5, 5] and sorted(sum(groups, [])) == list(range(12))
    for bundle in bundles(weights):
        assert len({(weight.dtype, weight.device) for weight in bundle.weights}) == 1
        assert (bundle.vector is bundle.weights[0]) == (len(bundle.weights) == 1)


def test_a_bundle_takes_and_gives_values_in_their_places():
    weights = [torch.nn.Parameter(torch.full(shape, float(k))) for k, shape in enumerate([(2,), (1, 3), ()])]
    bundle = Bundle(weights)
    weights[1].data.fill_(7.0)
    bundle.take([torch.full_like(weight, k + 0.5) for k, weight in enumerate(weights)])
    assert bundle.vector.tolist() == [0, 0, 7, 7, 7, 2] and bundle.vector.grad.tolist() == [0.5] * 2 + [1.5] * 3 + [2.5]
    bundle.vector.data += 1
    bundle.give()
    assert [weight.flatten()[0].item() for weight in weights] == [1, 8, 3]


def test_a_checkpoint_of_a_stepper_has_its_weights_and_writes_them_in_place(tmp_path):
    weights, others = small_and_large(), small_and_large()
    first, second = (Stepper(each, lr=0.1, clip=2.0, n_steps=6, n_warmup=1) for each in (weights, others))
    for _ in range(3):
        first.step([torch.ones_like(weight) for weight in weights])
    places = [weight.data_ptr() for weight in others]
    save_state(tmp_path / "stepper.safetensors", first.state_dict())
    second.load_state_dict(load_state(tmp_path / "stepper.safetensors"))
    assert [weight.data_ptr() for weight in others] == places and first.lr == second.lr < 0.1
    for stepper, mine in (first, weights), (second, others):
        stepper.step([torch.full_like(weight, 0.5) for weight in mine])
    assert all(torch.equal(weight, other) for weight, other in zip(weights, others))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(value):
    weights = small_and_large(torch.float32)
    before = [weight.detach().clone() for weight in weights]
    grads = [torch.ones_like(weight) for weight in weights]
    grads[1][0, 0] = value
    with pytest.raises(FloatingPointError, match="gradient_norm is (nan|inf)"):
        Stepper(weights, lr=0.1, clip=2.0, n_steps=6).step(grads)
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before))
