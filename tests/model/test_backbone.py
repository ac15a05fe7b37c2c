"Where positions are found on every family, gradient checkpointing, and weights that come as a package."
import hashlib
import sys
import types

import pytest
import torch
import transformers
from transformers.utils import logging

from s3pet_nb.core import UnknownName
from s3pet_nb.model.backbone import (FAMILIES, PACKAGED, NarrowLinear, NarrowProducts, PackagedWeights, blueprint,
                                     checkpointing, entries, example_batch, head_parameters, kind_of,
                                     load_backbone, narrow, packaged_folder, positions, quiet, shape_of, tiny)
from s3pet_nb.model.pet import PET_MODULES
from s3pet_nb.model.space import ROLES, SPACES, Rule, attach, make_space
from variants import HEAD, VARIANTS, fill, rounded, variant


def test_the_gated_t5_has_two_input_products():
    gated = tiny("t5", "seq2seq", feed_forward_proj="gated-gelu")
    roles = {position.role for position in positions(gated)}
    assert {"wi_0", "wi_1", "wo"} <= roles and "wi" not in roles
    assert len(make_space(gated, "lora")) == 4 * 7


@pytest.mark.parametrize("name", VARIANTS)
def test_positions_have_the_models_own_full_names(name):
    model = variant(name)
    places = positions(model)
    assert len({place.name for place in places}) == len(places)
    for place in places:
        weight = model.get_submodule(place.path).weight
        if place.kind == "norm":
            assert weight.shape == (place.d_in,) == (place.d_out,)
        if place.kind == "linear":
            assert sorted(weight.shape) == sorted((place.d_in, place.d_out))
        assert model.get_submodule(place.source) is not None
    words = [place for place in places if place.role == "lm_head"]
    assert bool(words) is (VARIANTS[name][1] != "classify")
    for place in words:
        assert model.get_submodule(place.path) is model.get_output_embeddings()
        assert (place.kind, place.stack, place.layer) == ("linear", "decoder", None)
    assert not any(candidate.position.role == "lm_head" for rules in SPACES
                   for candidate in make_space(model, rules).candidates)


def test_norms_that_only_some_models_of_a_family_have():
    roles = {name: {place.role for place in positions(variant(name))} for name in VARIANTS}
    assert "rel_norm" in roles["deberta-v2"] and "rel_norm" not in roles["deberta-v2-xlarge"]
    assert [name for name in VARIANTS if "q_norm" in roles[name]] == ["qwen3"]


@pytest.mark.parametrize("family, paths", [
    ("bert", ["", "bert", "bert.encoder"]),
    ("t5", ["", "encoder", "decoder"]),
    ("gpt2", ["", "transformer"]),
    ("llama", ["", "model"])])
def test_a_pass_may_begin_at_the_model_or_at_a_stack(family, paths):
    model = tiny(family, HEAD.get(family, "classify"))
    assert entries(model) == [model.get_submodule(path) for path in paths]


@pytest.mark.parametrize("bias", [True, False])
def test_a_narrow_product_can_be_differentiated_twice(bias):
    torch.manual_seed(0)
    x, W, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (5, 3), (5,)))
    operands = (x, W, b if bias else None)
    assert torch.equal(NarrowLinear.apply(*operands), torch.nn.functional.linear(*operands))
    assert torch.autograd.gradcheck(NarrowLinear.apply, operands)
    assert torch.autograd.gradgradcheck(NarrowLinear.apply, operands)


def test_gradients_are_products_of_rounded_numbers_too():
    torch.manual_seed(0)
    layer, x, g = torch.nn.Linear(64, 48), torch.randn(3, 9, 64, requires_grad=True), torch.randn(3, 9, 48)
    with NarrowProducts():
        out = layer(x)
    out.backward(g)  # out of it
    like = torch.bfloat16 if rounded() else torch.float32
    g, seen, W = (numbers.detach().to(like).double() for numbers in (g, x, layer.weight))
    assert (x.grad - g @ W).abs().max() < 1e-4
    assert (layer.weight.grad - g.flatten(0, 1).t() @ seen.flatten(0, 1)).abs().max() < 1e-4
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(out, plain) != rounded()


def test_layers_computed_again_are_computed_as_narrow():
    model = tiny("bert", num_hidden_layers=2).eval()
    batch, weights = example_batch(model), [model.bert.embeddings.LayerNorm.weight]

    def slope():
        with NarrowProducts():
            loss = model(**batch).loss
        return torch.autograd.grad(loss, weights)[0]

    kept = slope()
    with checkpointing(model):
        torch.testing.assert_close(slope(), kept, rtol=0, atol=0)


def setting():
    return torch.backends.mkldnn.matmul.fp32_precision


def test_an_error_leaves_products_as_they_were():
    before = setting()
    with pytest.raises(RuntimeError), NarrowProducts():
        torch.nn.Linear(3, 4)(torch.ones(2, 5))
    assert setting() == before and not NarrowProducts.entered


def test_the_last_of_two_that_leaves_changes_products_back():
    before, one, two = setting(), narrow(), narrow()
    one.__enter__()
    two.__enter__()
    one.__exit__()
    assert setting() == "bf16"
    two.__exit__()
    assert setting() == before
    mode = NarrowProducts()
    with mode, mode:
        assert NarrowProducts.entered == 2
    assert not NarrowProducts.entered


def test_other_calls_of_the_same_products_are_what_they_say():
    torch.manual_seed(0)
    x, W, b, out = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5), torch.zeros(4, 5)
    linear, wanted = torch.nn.functional.linear, torch.addmm(b, x, W.t())
    with NarrowProducts():
        for found in (linear(x, W, bias=b), linear(input=x, weight=W, bias=b), torch.addmm(b, x, W.t()),
                      torch.addmm(b, x, W.t(), out=out), out, linear(x[0], W, b).expand(1, 5)):
            torch.testing.assert_close(found, wanted[:len(found)], rtol=2e-2, atol=2e-2)
        doubled = torch.addmm(b, x, W.t(), beta=0, alpha=2)
        whole = torch.randn(4, 5, requires_grad=True)
        torch.addmm(whole, x, W.t()).sum().backward()
    torch.testing.assert_close(doubled, 2 * (x @ W.t()), rtol=2e-2, atol=2e-2)
    assert whole.grad.shape == (4, 5)


@pytest.mark.parametrize("training", [False, True], ids=["without-dropout", "with-dropout"])
@pytest.mark.parametrize("name", VARIANTS)
def test_checkpointing_gives_the_same_gradients_and_leaves_no_trace(name, training):
    model = variant(name)
    batch, space = example_batch(model), make_space(model, [Rule(name, ROLES) for name in PET_MODULES])
    with attach(model, space) as gated:
        fill(gated)
        gated.train(training)
        gated.meet(space.n_params // 2)
        u = torch.rand(len(space), dtype=torch.float64)
        runs = []
        model.get_submodule(space.candidates[0].position.path).register_forward_hook(
            lambda *_: runs.append(1))

        def gradients() -> list[torch.Tensor]:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                gated.sample(u)
                inner = gated.alpha, *gated.trainable().values()
                return torch.autograd.grad(gated(**batch).loss, inner)

        def traces() -> list[dict]:
            parts = [*model.modules(), *(part.config for part in model.modules() if hasattr(part, "config"))]
            return [{name: torch.Tensor if isinstance(value, torch.Tensor) else value
                     for name, value in vars(part).items()} for part in parts]

        before, marks = gradients(), traces()
        n_runs = len(runs)
        with checkpointing(model):
            again = gradients()
        assert len(runs) == 3 * n_runs, "the first product ran once, and then twice under checkpointing"
        for one, other in zip(before, again):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert traces() == marks
        assert all(torch.equal(one, other) for one, other in zip(before, gradients()))


def test_a_model_without_layers_that_can_be_checkpointed_is_refused():
    with pytest.raises(ValueError, match="no layer that can be checkpointed"):
        with checkpointing(transformers.ResNetModel(transformers.ResNetConfig(
                embedding_size=4, hidden_sizes=[4], depths=[1]))):
            pass


@pytest.mark.parametrize("name", VARIANTS)
def test_a_blueprint_of_saved_weights_has_the_shapes_of_the_model(tmp_path, name):
    model = variant(name)
    model.save_pretrained(tmp_path)
    shapes = blueprint(tmp_path, VARIANTS[name][1], n_labels=3 if VARIANTS[name][1] == "classify" else 2)
    assert type(shapes) is type(model) and {weight.device.type for weight in shapes.parameters()} == {"meta"}
    ours, theirs = ({key: weight.shape for key, weight in each.named_parameters()} for each in (model, shapes))
    changed = {key for key in ours if ours[key] != theirs[key]}
    assert ours.keys() == theirs.keys() and changed <= head_parameters(model).keys()
    assert bool(changed) is (VARIANTS[name][1] == "classify")
    assert shape_of(positions(shapes)) == shape_of(positions(model))


def test_kinds_follow_from_the_stacks(tmp_path):
    for family, kind in {"roberta": "encoder", "gpt2": "decoder", "t5": "encoder-decoder"}.items():
        tiny(family, HEAD.get(family, "classify")).save_pretrained(tmp_path / family)
        assert kind_of(tmp_path / family) == kind


@pytest.mark.parametrize("load", [blueprint, load_backbone])
def test_what_cannot_be_loaded_is_refused(tmp_path, load):
    with pytest.raises(FileNotFoundError, match=r"unknown backbone './minlm'; did you mean 'minilm'\?; or give"):
        load("./minlm")
    with pytest.raises(UnknownName, match="unknown head 'clasify'; did you mean 'classify'"):
        load("minilm", "clasify")
    transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2).save_pretrained(tmp_path)
    with pytest.raises(LookupError, match=r"no row for backbone family 'bloom'.*h\.\{i\}\.mlp\.dense_h_to_4h"):
        load(tmp_path)


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A Python package that carries weights, registered as a backbone."
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    module = types.ModuleType("weights_of_nobody")
    module.__file__ = str(tmp_path / "__init__.py")
    monkeypatch.setitem(sys.modules, "weights_of_nobody", module)
    row = PackagedWeights("weights_of_nobody", "demo", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setitem(PACKAGED._items, "nobody", row)
    return tmp_path / "model"


def test_packaged_weights_are_read_if_they_are_the_known_ones(package, monkeypatch):
    assert packaged_folder("nobody") == package
    (package / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match="reinstall the package weights_of_nobody"):
        load_backbone("nobody")
    (package / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="unknown backbone 'nobody'"):
        load_backbone("nobody")
    monkeypatch.setitem(sys.modules, "weights_of_nobody", None)
    with pytest.raises(ModuleNotFoundError, match=r"run pip install 's3pet_nb\[demo\]'"):
        load_backbone("nobody")


def test_reports_of_transformers_are_as_loud_after_as_before():
    before = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        with pytest.raises(ZeroDivisionError), quiet():
            assert logging.get_verbosity() == logging.ERROR and not logging.is_progress_bar_enabled()
            1 / 0
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_model_depends_on_its_seed_alone(family):
    state = torch.get_rng_state()
    one, same, other = (tiny(family, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, same[name]) for name, weight in one.items())
    assert not all(torch.equal(weight, other[name]) for name, weight in one.items())
