"PET modules one by one: their starts, their units, and a module in part beside the whole with zeros in it."
import pytest
import torch
from torch import nn

from s3pet_nb.core import UnknownName, n_params
from s3pet_nb.model.backbone import Position, positions, tiny
from s3pet_nb.model.pet import PACES, PET_MODULES, LoRA, PETModule, Sparse, check_settings
from variants import drawn, zeros_beside

HERE = {"linear": Position("wi", "wi", "linear", 0, "encoder", 12, 20, "wi"),
        "norm": Position("ln", "ffn_norm", "norm", 0, "encoder", 12, 12, "ln"),
        "block": Position("wo", "ffn", "block", 0, "encoder", 12, 12, "wi")}
SORTS = [(name, kind, settings) for name, settings in
         [*((name, {}) for name in PET_MODULES), ("lora", {"r": 6, "lora_alpha": 3.0}),
          ("lora", {"r": 6, "init": "balanced"}), ("lowrank_adapter", {"rank": 3, "init": "glorot"})]
         for kind in sorted(PET_MODULES[name].kinds)]


def pair(name: str, position: Position, settings: dict, seed: int) -> tuple[PETModule, PETModule, dict]:
    "A trained module whose entries beside the masks are zero, and the same module with these masks."
    made = []
    for _ in range(2):
        torch.manual_seed(seed)
        made.append(PET_MODULES[name](position, **settings))
        with torch.no_grad():
            for weight in made[-1].parameters():
                weight += torch.randn_like(weight)
    masks = drawn(made[0], seed)
    zeros_beside(made[0], masks)
    return made[0], made[1].pruned(masks), masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name, kind, settings", SORTS)
def test_a_part_computes_what_the_whole_computes_with_zeros_beside(name, kind, settings, dtype):
    position = HERE[kind]
    for seed in range(12):
        whole, part, masks = pair(name, position, settings, seed)
        whole, part = whole.to(dtype), part.to(dtype)
        assert {key: weight.numel() for key, weight in part.named_parameters()} == {
            key: int(mask.sum()) for key, mask in masks.items()}
        h_in = torch.randn(2, 3, position.d_in, dtype=dtype)
        h_out = torch.randn(2, 3, position.d_out, dtype=dtype)
        deltas, z_grads = [], []
        for module in whole, part:
            z = torch.tensor(0.7, dtype=dtype, requires_grad=True)
            deltas.append(module(h_in, h_out, z))
            (deltas[-1].sin() + 0.1 * deltas[-1]).sum().backward()
            z_grads.append(z.grad)
        torch.testing.assert_close(*deltas)
        torch.testing.assert_close(*z_grads)
        full = dict(whole.named_parameters())
        for key, weight in part.named_parameters():
            assert torch.equal(weight.flatten(), full[key][masks[key]])
            torch.testing.assert_close(weight.grad.flatten(), full[key].grad[masks[key]])


@pytest.mark.parametrize("name, kind, settings", SORTS)
def test_optimiser_checkpoint_and_count_hold_the_kept_entries_alone(name, kind, settings):
    _, part, masks = pair(name, HERE[kind], settings, seed=3)
    assert n_params(part) == sum(int(mask.sum()) for mask in masks.values())
    assert part.state_dict().keys() == masks.keys()
    optimiser = torch.optim.AdamW(part.parameters(), lr=0.1)
    h_in, h_out = torch.randn(4, HERE[kind].d_in), torch.randn(4, HERE[kind].d_out)
    (part(h_in, h_out, torch.tensor(1.0)) - 1).square().sum().backward()
    optimiser.step()
    for key, weight in part.named_parameters():
        for moment in "exp_avg", "exp_avg_sq":
            assert optimiser.state[weight][moment].numel() == int(masks[key].sum())


@pytest.mark.parametrize("name, kind, settings", SORTS)
def test_units_are_modules_or_columns(name, kind, settings):
    with torch.device("meta"):
        whole = PET_MODULES[name](HERE[kind], **settings)
        units = whole.units()
    assert units.keys() == dict(whole.named_parameters()).keys() >= set(whole.scored)
    for key, weight in whole.named_parameters():
        unit = units[key].expand(weight.shape)
        assert (unit.dtype, unit.device.type) == (torch.int64, "cpu")
        if name == "lora":
            rank = torch.arange(settings.get("r", 1))
            assert torch.equal(unit, rank[:, None].expand(-1, 12) if key == "A" else rank.expand(20, -1))
        else:
            assert (unit == 0).all()


@pytest.mark.parametrize("name, kind, settings", SORTS)
def test_the_score_of_a_whole_module_is_its_first_order_effect(name, kind, settings):
    torch.manual_seed(1)
    pet, place = PET_MODULES[name](HERE[kind], **settings).double(), HERE[kind]
    with torch.no_grad():
        for weight in pet.parameters():
            weight += torch.randn_like(weight)
        if pet.anchored:
            pet.B0.zero_()  # the score looks at the trained product alone
    h_in, h_out = (torch.randn(5, width, dtype=torch.float64) for width in (place.d_in, place.d_out))
    z = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = (h_out + pet(h_in, h_out, z)).sin().sum()
    slope, *grads = torch.autograd.grad(loss, [z, *pet.parameters()])
    scores = {key: (-weight * grad).sum() for (key, weight), grad in zip(pet.named_parameters(), grads)}
    counted = sum(scores[key] for key in pet.scored or scores)
    assert slope.abs() > 1e-3
    torch.testing.assert_close(counted.detach(), -slope, rtol=1e-10, atol=0)


def test_lora_of_some_columns_is_a_lora_of_smaller_rank():
    position, columns = HERE["linear"], torch.tensor([1, 0, 0, 1, 1, 0]).bool()
    for settings in {"r": 6}, {"r": 6, "lora_alpha": 6.0, "init": "balanced"}:
        torch.manual_seed(0)
        whole = LoRA(position, **settings)
        torch.manual_seed(0)
        part = LoRA(position, **settings)
        for module in whole, part:
            torch.manual_seed(1)
            with torch.no_grad():
                for weight in module.parameters():
                    weight += torch.randn_like(weight)
        masks = {name: columns[unit].expand(weight.shape) for (name, unit), weight
                 in zip(whole.units().items(), whole.parameters())}
        zeros_beside(whole, masks)
        part = part.pruned(masks)
        assert type(part) is LoRA and part.scale == whole.scale
        assert (part.A.shape, part.B.shape) == ((3, 12), (20, 3))
        h_in, z = torch.randn(5, 12), torch.tensor(0.3)
        torch.testing.assert_close(part(h_in, None, z), whole(h_in, None, z))
        assert n_params(part) == LoRA.size(position, r=3)


def test_lora_in_part_has_the_rank_of_what_is_left():
    masks = {"A": torch.zeros(6, 12, dtype=torch.bool), "B": torch.zeros(20, 6, dtype=torch.bool)}
    masks["A"][1, 3] = masks["B"][7, 4] = True
    part = LoRA(HERE["linear"], r=6).pruned(masks)
    assert type(part) is Sparse and [tuple(shape) for shape in part._shapes.values()] == [(2, 12), (20, 2)]
    assert LoRA(HERE["linear"], r=6).pruned({name: mask & False for name, mask in masks.items()})(
        torch.randn(5, 12), None, torch.tensor(1.0)).eq(torch.zeros(5, 20)).all()


def test_second_derivatives_pass_through():
    _, part, _ = pair("adapter", HERE["block"], {"bottleneck": 3}, seed=1)
    part, h_out = part.double(), torch.randn(2, 12, dtype=torch.float64)

    def loss(*weights):
        named = dict(zip(dict(part.named_parameters()), weights))
        return torch.func.functional_call(part, named, (h_out, h_out, torch.tensor(0.5))).square().sum()

    weights = [weight.detach().requires_grad_() for weight in part.parameters()]
    assert torch.autograd.gradcheck(loss, weights) and torch.autograd.gradgradcheck(loss, weights)


def test_wrong_masks_and_a_size_by_position_are_refused():
    bias = PET_MODULES["bitfit"](HERE["norm"])
    for masks in ({}, {"b": torch.ones(12)}, {"b": torch.ones(11).bool()},
                  {"b": torch.ones(12).bool(), "c": torch.ones(12).bool()}):
        with pytest.raises(ValueError, match=r"BitFit takes one bool mask per weight: b \(12,\)"):
            bias.pruned(masks)
    part = bias.pruned({"b": torch.arange(12) < 3})
    assert part.target(nn.LayerNorm(12)) == "bias" and part.kinds == bias.kinds
    with pytest.raises(TypeError, match="is that of its masks"):
        part.size(HERE["norm"])


@pytest.mark.parametrize("module", ["lora", "lowrank_adapter"])
def test_an_unknown_initialisation_is_refused_by_the_module_too(module):
    with pytest.raises(UnknownName, match="unknown initialisation 'kaiming'"):
        PET_MODULES[module](positions(tiny("bert"))[0], init="kaiming")


@pytest.mark.parametrize("widths", [(768, 768), (768, 3072), (3072, 768)])
def test_balanced_factors_have_gradients_of_equal_size(widths):
    d_in, d_out = widths
    position = positions(tiny("bert"))[0]
    place = type(position)(**{**vars(position), "d_in": d_in, "d_out": d_out})
    torch.manual_seed(0)
    squares = torch.zeros(2)
    for _ in range(10):
        lora = PET_MODULES["lora"](place, r=16, init="balanced")
        assert lora.A.std().item() == pytest.approx(d_in ** -0.5, rel=0.05)
        assert lora.B.std().item() == pytest.approx(d_out ** -0.5, rel=0.05)
        h_in, grad = torch.randn(64, d_in), torch.randn(64, d_out)
        lora(h_in, None, torch.tensor(1.0)).backward(grad)
        squares += torch.stack([lora.A.grad.square().mean(), lora.B.grad.square().mean()])
    assert (squares[0] / squares[1]).item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("settings, error, says", [
    ({"rank": 8}, UnknownName, "unknown setting of lora 'rank'"),
    ({"r": True}, ValueError, "r of lora is True; give a value like 1"),
    ({"r": 2.0}, ValueError, "r of lora is 2.0"),
    ({"r": 2 ** 53}, ValueError, r"below 2\*\*53"),
    ({"lora_alpha": float("nan")}, ValueError, "lora_alpha of lora is nan; give a number above 0"),
    ({"lora_alpha": "8"}, ValueError, "lora_alpha of lora is '8'"),
    ({"init": "glorot"}, UnknownName, "unknown initialisation 'glorot'; choose one of balanced, zero")])
def test_settings_are_checked_by_name_type_and_size(settings, error, says):
    check_settings("lora", {"r": 4, "lora_alpha": 8, "init": "balanced"})
    with pytest.raises(error, match=says):
        check_settings("lora", settings)


@pytest.mark.parametrize("name, kind, settings", SORTS)
def test_a_size_is_that_of_the_weights_and_a_module_in_part_becomes_whole_again(name, kind, settings):
    whole, part, masks = pair(name, HERE[kind], settings, seed=2)
    assert n_params(whole) == PET_MODULES[name].size(HERE[kind], **settings)
    assert whole.dense() is whole
    h_in, h_out, z = torch.randn(2, HERE[kind].d_in), torch.randn(2, HERE[kind].d_out), torch.tensor(0.4)
    filled = part.dense()
    assert type(filled) is type(whole) and not any(weight is None for weight in filled.parameters())
    torch.testing.assert_close(filled(h_in, h_out, z), whole(h_in, h_out, z))


@pytest.mark.parametrize("module, settings", [("bitfit", {}), ("lora", {}), ("lora", {"r": 8}),
                                              ("lora", {"r": 4, "lora_alpha": 4.0})])
def test_a_step_of_its_pace_moves_delta_alike_whatever_the_scale_and_the_rank(module, settings):
    "What starts at 0 moves by its factor, with a random sign in each entry, on inputs of unit variance."
    torch.manual_seed(0)
    place = Position("p", "q", "linear", 0, "encoder", 256, 128, "p")
    pet = PET_MODULES[module](place, **settings)
    for name, weight in pet.named_parameters():
        if not weight.any():
            weight.data = torch.randn_like(weight).sign() * pet.paces()[name].factor
    h_in = torch.randn(500, place.d_in)
    delta = pet(h_in, torch.randn(500, place.d_out), torch.tensor(1.0))
    assert 0.4 < delta.square().mean().sqrt() < 1.1


@pytest.mark.parametrize("name, kind, settings", SORTS)
def test_every_weight_has_a_pace_also_where_it_is_kept_in_part(name, kind, settings):
    position = HERE[kind]
    whole = PET_MODULES[name](position, **settings)
    paces = whole.paces()
    assert list(paces) == [weight for weight, _ in whole.named_parameters()]
    assert all(pace.kind in PACES and pace.factor > 0 for pace in paces.values())
    masks = {weight: torch.rand(value.shape) > 0.3 for weight, value in whole.named_parameters()}
    part = whole.pruned(masks)
    assert part.paces().keys() == {weight for weight, _ in part.named_parameters()}
    assert all(part.paces()[weight].kind == pace.kind for weight, pace in paces.items())
