"A module in part is the whole module with zeros in the other places, at the price of the kept entries alone."
import pytest
import torch
from torch import nn

from s3pet_nb.core import n_params
from s3pet_nb.model.backbone import FAMILIES, Position, checkpointing, example_batch, tiny
from s3pet_nb.model.pet import PET_MODULES, LoRA, PETModule, Sparse
from s3pet_nb.model.space import ROLES, SPACES, GatedModel, Rule, SearchSpace, attach, lora_at, make_space
from s3pet_nb.model.structure import Structure

HEAD = {"t5": "seq2seq"}
HERE = {"linear": Position("wi", "wi", "linear", 0, "encoder", 12, 20, "wi"),
        "norm": Position("ln", "ffn_norm", "norm", 0, "encoder", 12, 12, "ln"),
        "block": Position("wo", "ffn", "block", 0, "encoder", 12, 12, "wi")}
SORTS = [(name, kind, settings) for name, settings in
         [*((name, {}) for name in PET_MODULES), ("lora", {"r": 6, "lora_alpha": 3.0}),
          ("lora", {"r": 6, "init": "balanced"}), ("lowrank_adapter", {"rank": 3, "init": "glorot"})]
         for kind in sorted(PET_MODULES[name].kinds)]
ALL = (*(Rule(name, ROLES) for name in PET_MODULES if name != "lora"),
       Rule("lora", ROLES, {"r": 3, "init": "balanced"}), Rule("lora", ROLES, {"r": 2}))


def drawn(module: PETModule, seed: int) -> dict[str, torch.Tensor]:
    "Masks of every density, so that some weights keep all of their entries and some none."
    rng = torch.Generator().manual_seed(seed)
    shares = (0.0, 0.1, 0.5, 0.9, 1.0)
    return {name: torch.rand(weight.shape, generator=rng) < shares[int(torch.randint(5, (), generator=rng))]
            for name, weight in module.named_parameters()}


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


@torch.no_grad()
def zeros_beside(module: PETModule, masks: dict[str, torch.Tensor]) -> None:
    for name, weight in module.named_parameters():
        weight *= masks[name]
    for name, start in module.named_buffers():
        start *= masks[name.removesuffix("0")]  # what balanced LoRA subtracts is of the kept entries too


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


def in_part(space: SearchSpace, seed: int = 0) -> tuple[Structure, dict[str, torch.Tensor]]:
    "Every third candidate as a whole, every fifth gone, of the others random entries of random weights."
    masks = {}
    for i, candidate in enumerate(space.candidates):
        with torch.device("meta"):
            whole = PET_MODULES[candidate.module](candidate.position, **candidate.settings)
        for name, mask in drawn(whole, seed + i).items():
            masks[f"{candidate.name}.{name}"] = (mask | (i % 3 == 0)) & (i % 5 != 1)
    return Structure.pruned(space, masks), masks


@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("rules", [ALL, *SPACES], ids=["all", *SPACES])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_entries_start_from_their_values_in_the_whole_space(family, rules, seed):
    model = tiny(family, HEAD.get(family, "classify"))
    space, batch = make_space(model, rules), example_batch(model)
    structure, masks = in_part(space, seed)
    with torch.no_grad():
        before = model(**batch).logits
        with attach(model, space, seed=seed) as gated:
            whole = gated.tensors()
        with structure.apply(model, seed=seed) as gated:
            assert torch.equal(gated(**batch).logits, before)
            kept = gated.tensors()
            n_kept = sum(int(mask.sum()) for mask in masks.values())
            assert n_params(gated.pets) == structure.n_params == n_kept
        assert torch.equal(model(**batch).logits, before)
    for name, values in kept.items():
        full = whole[name]
        assert torch.equal(values.flatten(), full[masks[name]] if name in masks else full.flatten())


def trained(space: SearchSpace) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {f"{candidate.name}.{name}": 0.1 * torch.randn(shape, generator=rng)
            for candidate in space.candidates for name, shape in candidate.shapes.items()}


@torch.no_grad()
def change(gated: GatedModel, by: dict[str, torch.Tensor], masks: dict[str, torch.Tensor],
           z: dict[str, torch.Tensor]) -> None:
    "Add to every weight, or to its kept entries, what `by` says; gates by the candidates' names."
    gated.z = torch.stack([z[candidate.name] for candidate in gated.space.candidates])
    for name, weight in gated.trainable().items():
        if name in by:
            weight += by[name] if weight.shape == by[name].shape else by[name][masks[name]].view(weight.shape)


def both(family: str, run) -> None:
    """A structure in part and the whole space with zeros beside it agree in what `run` gives.

    That is the logits and the gradients by name, those of the whole space at the kept entries.
    """
    model = tiny(family, HEAD.get(family, "classify"))
    space = make_space(model, ALL)
    structure, masks = in_part(space)
    by = trained(space)
    z = dict(zip((candidate.name for candidate in space.candidates), torch.linspace(0.2, 1, len(space))))
    with attach(model, space, seed=2) as gated:
        change(gated, by, masks, z)
        for candidate, pet in zip(space.candidates, gated.pets):
            zeros_beside(pet, {name: masks[f"{candidate.name}.{name}"] for name in candidate.shapes})
        wanted, full = run(model, gated)
    with structure.apply(model, seed=2) as gated:
        change(gated, by, masks, z)
        logits, grads = run(model, gated)
    assert {type(pet) for pet in gated.pets} > {Sparse, LoRA}
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        wanted = full[name][masks[name]] if name in masks else full[name].flatten()
        torch.testing.assert_close(grad.flatten(), wanted, rtol=1e-3, atol=1e-5)


def gradients(model, gated):
    weights = gated.trainable()
    out = gated(**example_batch(model))
    return out.logits.detach(), dict(zip(weights, torch.autograd.grad(out.loss, weights.values())))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_structure_in_part_is_the_space_with_zeros_beside_it_under_any_gates(family):
    both(family, gradients)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_modules_in_part_under_gradient_checkpointing(family):
    def checkpointed(model, gated):
        with checkpointing(model):
            return gradients(model, gated)

    both(family, checkpointed)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_modules_in_part_under_bf16_autocast(family):
    model = tiny(family, HEAD.get(family, "classify"))
    batch, space = example_batch(model), make_space(model, ALL)
    structure, _ = in_part(space)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            before = model(**batch).logits
        with structure.apply(model) as gated:
            with torch.no_grad():
                assert torch.equal(gated(**batch).logits, before)
            for weight in gated.trainable().values():
                nn.init.normal_(weight, std=0.1)
            out = gated(**batch)
            assert out.logits.dtype == before.dtype and not torch.allclose(out.logits, before)
            out.loss.backward()
            for weight in gated.trainable().values():
                assert weight.dtype == torch.float32 and weight.grad.isfinite().all()


def test_trained_parts_are_kept_and_put_back():
    model = tiny("bert")
    structure, _ = in_part(make_space(model, ALL))
    batch = example_batch(model)
    with structure.apply(model, seed=4) as gated, torch.no_grad():
        for weight in gated.trainable().values():
            weight += 0.1 * torch.randn_like(weight)
        tensors, after = gated.tensors(), gated(**batch).logits
    with structure.apply(model, tensors=tensors, seed=4) as gated, torch.no_grad():
        assert torch.equal(gated(**batch).logits, after)


def test_columns_of_mam_are_counted_as_ranks():
    "On the paper's architecture each matrix gets its own rank, and its weights are those of that rank."
    model = tiny("bert")
    space = make_space(model, lora_at(SPACES["mam"], r=8))
    rng, masks, ranks = torch.Generator().manual_seed(0), {}, {}
    for candidate in space.candidates:
        if candidate.module == "lora":
            columns = torch.rand(8, generator=rng) < 0.4
            ranks[candidate.name] = int(columns.sum())
            masks |= {f"{candidate.name}.A": columns[:, None].expand(candidate.shapes["A"]),
                      f"{candidate.name}.B": columns.expand(candidate.shapes["B"])}
        else:
            masks[f"{candidate.name}.b"] = torch.zeros(candidate.shapes["b"], dtype=torch.bool)
    structure = Structure.pruned(space, masks)
    with structure.apply(model) as gated:
        found = {candidate.name: len(pet.A) for candidate, pet in zip(gated.space.candidates, gated.pets)}
        assert {type(pet) for pet in gated.pets} == {LoRA} and {pet.scale for pet in gated.pets} == {1}
    assert found == {name: rank for name, rank in ranks.items() if rank} and len(set(found.values())) > 2
