"The fast form of an open supernet computes what the simple form defines."
import copy
from contextlib import ExitStack
from statistics import median

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from s3pet_nb.learn.bilevel import hypergrad
from s3pet_nb.model.backbone import FAMILIES, NarrowProducts, checkpointing, example_batch, tiny
from s3pet_nb.model.fuse import Fused, LowRankLinear
from s3pet_nb.model.gate import HardConcrete, ShiftedSigmoid, StraightThrough
from s3pet_nb.model.pet import PET_MODULES, BitFit, LoRA, PETModule
from s3pet_nb.model.space import LINEAR, NORM, ROLES, SPACES, Rule, attach, make_space

HEAD = {"t5": "seq2seq"}
EXACT = ("bert", "roberta", "gpt2")  # nothing in them computes in float32 where the model is float64
RANKS = [Rule("lora", LINEAR, {"r": r}) for r in (1, 2)]
RULES = {**{name: name for name in SPACES}, "all": [Rule(name, ROLES) for name in PET_MODULES], "ranks": RANKS}


def filled(gated, std=0.2):
    "Weights that are not at their start, the same for every form of one space."
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in gated.trainable().values():
            weight += std * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)


def both(stack, model, space, dtype=torch.float64, **settings):
    "Two copies of the model with everything attached: the fast form and the simple one."
    pair = []
    for fused in (True, False):
        gated = stack.enter_context(attach(copy.deepcopy(model).to(dtype), space, fused=fused, **settings))
        gated.pets.to(dtype)
        filled(gated)
        gated.meet(space.n_params // 2)
        pair.append(gated)
    return pair


def slopes(gated, batch, u):
    "Logits, then the gradients of every weight and of alpha."
    gated.sample(u)
    found = gated(**batch)
    variables = [*gated.trainable().values(), gated.alpha]
    return [found.logits.detach(), *torch.autograd.grad(found.loss, variables, materialize_grads=True)]


def near(found, wanted, share=1e-4):
    "Equal up to a share of the largest entry; norms of T5's kind compute in float32 whatever the model is."
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=share * other.abs().max().item() + 1e-12)


def distance(found, wanted):
    "Of all tensors together, as a share of their norm."
    found, wanted = (torch.cat([x.flatten().double() for x in tensors]) for tensors in (found, wanted))
    return (torch.linalg.norm(found - wanted) / torch.linalg.norm(wanted)).item()


def noise(space, seed=0):
    return torch.rand(len(space), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_forms_give_the_same_logits_and_gradients(family, rules):
    model = tiny(family, HEAD.get(family, "classify"))
    space, batch = make_space(model, RULES[rules]), example_batch(model)
    with ExitStack() as stack:
        fast, simple = both(stack, model, space)
        assert not set(fast.simple) >= set(simple.simple)
        for seed in range(2):
            u = noise(space, seed)
            near(slopes(fast, batch, u), slopes(simple, batch, u), 1e-7 if family in EXACT else 1e-4)


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
@pytest.mark.parametrize("narrow", [lambda: torch.autocast("cpu", torch.bfloat16), NarrowProducts],
                         ids=["autocast", "products"])
def test_also_with_layers_computed_again_and_in_bfloat16(family, narrow):
    model = tiny(family, HEAD.get(family, "classify"))
    space, batch = make_space(model), example_batch(model)
    with ExitStack() as stack:
        fast, simple = both(stack, model, space, torch.float32)
        kept = slopes(fast, batch, noise(space))
        with checkpointing(fast.model):
            assert distance(slopes(fast, batch, noise(space)), kept) < 1e-6
        ratios = []
        for u in (noise(space, seed) for seed in range(6)):  # one alone is off by up to three times either way
            wanted = slopes(simple, batch, u)
            with narrow():
                off = [distance(slopes(gated, batch, u), wanted) for gated in (fast, simple)]
            ratios.append((off[0] + 1e-6) / (off[1] + 1e-6))
        assert median(ratios) < 2, "no rounding beyond that of the simple form"


@pytest.mark.parametrize("order", ["first", "second", "central", "exact"])
def test_every_order_of_the_hypergradient_agrees(order):
    model = tiny("bert", attn_implementation="eager")
    space, batch = make_space(model), example_batch(model)
    u = noise(space)
    with ExitStack() as stack:
        found = []
        for gated in both(stack, model, space):
            def loss():
                gated.sample(u)
                return gated(**batch).loss
            step = hypergrad(loss, loss, gated.trainable().values(), gated.alpha, xi=0.1, order=order)
            found.append([step.alpha_grad, *step.delta_grads])
        near(*found, 1e-6)  # a difference over a small step loses three digits


def test_closed_modules_cost_nothing_and_change_nothing():
    model = tiny("bert")
    space, batch = make_space(model), example_batch(model)
    with attach(model, space, HardConcrete()) as gated, torch.no_grad():
        filled(gated)
        u = noise(space)
        gated.sample(u)
        closed = gated.z == 0
        assert closed.any() and not closed.all() and gated.closed == closed.tolist()

    def in_place(out, x, y, out_shape=None, **scales):
        return 2 * x[0] * x[1] * y[1]

    def spent(called):
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
            logits = called(**batch).logits
        return counter.get_total_flops(), logits

    with torch.no_grad():
        flops, before = spent(model)
        with attach(model, space) as gated:
            for pet in gated.pets:
                for weight in pet.parameters():
                    nn.init.normal_(weight)
            assert spent(gated)[0] > flops
            gated.z = torch.zeros(len(space))
            assert spent(gated)[0] == flops and torch.equal(spent(gated)[1], before)


@pytest.mark.parametrize("gate", [HardConcrete(), StraightThrough()])
def test_gates_that_are_shut_keep_their_gradients(gate):
    "Nothing is lost by leaving closed modules out: the same gates, never closed, have the same gradients."
    model = tiny("bert").double()
    space, batch, u = make_space(model), example_batch(model), noise(make_space(model))
    with attach(model, space, gate) as gated:
        gated.pets.double()
        filled(gated)
        gated.meet(space.n_params // 2)
        found = slopes(gated, batch, u)
        z = gate.z(gated.p, u)
        assert (z == 0).any()
        gated.z = z
        assert not any(gated.closed)
        variables = [*gated.trainable().values(), gated.alpha]
        wanted = torch.autograd.grad(gated(**batch).loss, variables, materialize_grads=True)
    for fast, whole in zip(found[1:], wanted, strict=True):
        torch.testing.assert_close(fast, whole)
    assert found[-1].ne(0).any()


def test_a_pass_sees_the_weights_and_gates_of_now_wherever_it_begins():
    model = tiny("t5", "seq2seq")
    space, batch = make_space(model), example_batch(model)
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with ExitStack() as stack:
        fast, simple = both(stack, model, space, torch.float32)
        for seed in range(2):
            for gated in fast, simple:
                gated.sample(noise(space, seed))
                filled(gated)
            written = [gated.generate(**ids, max_new_tokens=6) for gated in (fast, simple)]
            assert torch.equal(*written)
            filled(fast), filled(simple)
            with torch.no_grad():
                states = [gated.model.get_encoder()(**ids).last_hidden_state for gated in (fast, simple)]
            torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)


def test_a_pass_that_fails_leaves_the_next_one_whole():
    model = tiny("bert")
    space, batch = make_space(model), example_batch(model)
    with attach(model, space) as gated, torch.no_grad():
        before = gated(**batch).logits
        with pytest.raises(IndexError):
            gated(input_ids=torch.full((1, 4), 10_000))
        filled(gated)
        changed = gated(**batch).logits
    with attach(model, space, fused=False) as gated, torch.no_grad():
        filled(gated)
        torch.testing.assert_close(gated(**batch).logits, changed)
    assert not torch.allclose(before, changed)


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", ["", "bert.encoder", "bert.encoder.layer.1"])
def test_a_pass_that_is_interrupted_leaves_the_next_one_whole(monkeypatch, stopped, place):
    model = tiny("bert")
    space, batch = make_space(model), example_batch(model)

    def stop(module, args):
        raise stopped

    with ExitStack() as stack:
        fast, simple = both(stack, model, space, torch.float32)
        for _ in range(2):
            hook = fast.model.get_submodule(place).register_forward_pre_hook(stop)
            with pytest.raises(stopped):
                fast(**batch)
            hook.remove()
            monkeypatch.setattr(BitFit, "vector", stop)
            with pytest.raises(TypeError):  # in the preparation itself
                fast(**batch)
            monkeypatch.undo()
        for gated in fast, simple:
            filled(gated)
            gated.sample(noise(space))
        with torch.no_grad():
            torch.testing.assert_close(fast(**batch).logits, simple(**batch).logits, rtol=1e-4, atol=1e-4)


def test_a_stack_called_after_an_interrupt_sees_the_gates_of_now():
    model = tiny("t5", "seq2seq")
    space, batch = make_space(model), example_batch(model)
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def stop(module, args):
        raise KeyboardInterrupt

    with ExitStack() as stack:
        fast, simple = both(stack, model, space, torch.float32)
        hook = fast.model.encoder.block[1].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            fast(**batch)
        hook.remove()
        for gated in fast, simple:
            filled(gated)
            gated.sample(noise(space))
        with torch.no_grad():
            states = [gated.model.get_encoder()(**ids).last_hidden_state for gated in (fast, simple)]
        torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_result_of_an_activation_is_not_kept_beside_its_argument(family):
    model = tiny(family)
    space, batch = make_space(model, [Rule("lora", ("wi", "wo"))]), example_batch(model)
    kept = []
    for fused in (True, False):
        storages = {}

        def keep(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        watched = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with attach(model, space, fused=fused) as gated, watched:
            gated(**batch)
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    results = sum(batch["input_ids"].numel() * c.position.d_in for c in space.candidates if c.position.role == "wo")
    assert kept[0] < kept[1] - results * model.dtype.itemsize // 2


def test_nothing_is_left_on_the_backbone():
    model = tiny("t5", "seq2seq")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with attach(model, make_space(model)) as gated:
        gated(**example_batch(model))
        assert before != {name: set(vars(module)) for name, module in model.named_modules()}
        assert list(gated.model.state_dict()) == list(tiny("t5", "seq2seq").state_dict())
    assert before == {name: set(vars(module)) for name, module in model.named_modules()}
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


class Operations(TorchDispatchMode):
    "Counts operations, views aside."
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_preparing_a_pass_takes_as_many_operations_for_many_candidates_as_for_few(monkeypatch):
    counts, prepare = [], Fused.prepare

    def counted(fused, *args):
        with Operations() as seen:
            prepare(fused, *args)
        counts.append((len(gated.space), seen.count))

    monkeypatch.setattr(Fused, "prepare", counted)
    for layers in (2, 12):
        model = tiny("bert", num_hidden_layers=layers)
        with attach(model, make_space(model)) as gated, torch.no_grad():
            gated(**example_batch(model))
    (few, first), (many, second) = counts
    assert many > 4 * few and first == second


def test_products_of_one_hidden_state_are_taken_together(monkeypatch):
    calls = []
    whole = LowRankLinear.apply

    def apply(act, x, h, *operands):
        calls.append(len(operands) // 4)
        return whole(act, x, h, *operands)

    monkeypatch.setattr(LowRankLinear, "apply", apply)
    model = tiny("bert", num_hidden_layers=1)
    with attach(model, make_space(model, "lora")) as gated:
        gated(**example_batch(model))
    assert calls == [3, 1, 1, 1]  # q, k and v; o; wi; wo


def test_a_weight_vector_that_a_candidate_does_not_declare_keeps_the_simple_form(monkeypatch):
    class Undeclared(BitFit):
        "A change of a bias that does not say that it is a vector."
        vector = PETModule.vector

    monkeypatch.setitem(PET_MODULES._items, "undeclared", Undeclared)
    model = tiny("bert")
    space = make_space(model, [Rule("bitfit", ("q", "attn_norm")), Rule("undeclared", ("q",)),
                               Rule("lora", ("q",))])
    batch, u = example_batch(model), noise(space)
    with ExitStack() as stack:
        fast, simple = both(stack, model, space)
        roles = {(space.candidates[i].position.role, space.candidates[i].module) for i in fast.simple}
        assert roles == {("q", "bitfit"), ("q", "undeclared")}
        near(slopes(fast, batch, u), slopes(simple, batch, u), 1e-9)


@pytest.mark.parametrize("module, roles, carried", [
    ("tanh-lora", ("q", "wi"), 0), ("block-lora", ("ffn",), 0), ("named-lora", ("q", "wi"), 4)])
def test_only_what_its_own_forward_says_is_fused(monkeypatch, module, roles, carried):
    class TanhLoRA(LoRA):
        "Another `forward`: the inherited factors do not say what it does."
        def forward(self, h_in, h_out, z):
            return torch.tanh(super().forward(h_in, h_out, z))

    class BlockLoRA(LoRA):
        "Beside a block: reads another input than the product that it adds to."
        kinds = frozenset({"block"})

    class NamedLoRA(LoRA):
        "Nothing changed."

    kinds = {"tanh-lora": TanhLoRA, "block-lora": BlockLoRA, "named-lora": NamedLoRA}
    monkeypatch.setitem(PET_MODULES._items, module, kinds[module])
    model = tiny("bert", intermediate_size=16)
    space, batch = make_space(model, [Rule(module, roles)]), example_batch(model)
    with ExitStack() as stack:
        fast, simple = both(stack, model, space)
        assert len(space) - len(fast.simple) == carried
        near(slopes(fast, batch, noise(space)), slopes(simple, batch, noise(space)), 1e-7)


def test_a_gate_of_ones_own_keeps_the_gradient_of_what_it_closes():
    class Rounded(ShiftedSigmoid):
        def z(self, p, u):
            soft = super().z(p, u)
            return soft.detach().round() + (soft - soft.detach())

    model = tiny("bert")
    space = make_space(model)
    with attach(model, space, Rounded()) as gated:
        gated.meet(space.n_params // 2)
        gated.sample(noise(space))
        assert (gated.z == 0).any() and not any(gated.closed)


def test_modules_may_be_moved_to_another_type_after_they_were_attached():
    model = tiny("bert")
    space, batch = make_space(model), example_batch(model)
    with attach(model, space) as gated, torch.no_grad():
        filled(gated)
        single = gated(**batch).logits
        double = gated.double()(**batch).logits
        assert double.dtype == torch.float64
        torch.testing.assert_close(double.float(), single, rtol=1e-3, atol=1e-4)


def test_a_product_that_something_else_has_changed_keeps_the_simple_form():
    model = tiny("bert")
    changed = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    changed.forward = lambda h, own=changed.forward: own(h) * 2
    space, batch = make_space(model, [Rule("lora", ("q",))]), example_batch(model)
    u = noise(space)
    with ExitStack() as stack:
        fast = stack.enter_context(attach(model, space))
        filled(fast)
        fast.meet(space.n_params // 2)
        found = slopes(fast, batch, u)
        assert fast.simple == [0]
    with attach(model, space, fused=False) as simple:
        filled(simple)
        simple.meet(space.n_params // 2)
        for one, other in zip(found, slopes(simple, batch, u), strict=True):
            torch.testing.assert_close(one, other)
    assert "forward" in vars(changed)


def test_norms_of_both_kinds_take_their_shifts():
    for family in ("bert", "t5"):
        model = tiny(family, HEAD.get(family, "classify"))
        space = make_space(model, [Rule("bitfit", NORM), Rule("lnfit", NORM)])
        with attach(model, space) as gated:
            assert gated.simple == []
            filled(gated)
            gated.z = torch.zeros(len(space))
            closed = gated(**example_batch(model)).logits
            gated.z = torch.ones(len(space))
            assert not torch.allclose(closed, gated(**example_batch(model)).logits)
