"Counts, attachment and the passes of a search step on every family, beyond what the notebooks show."
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize

from s3pet_nb.backbone import FAMILIES, example_batch, load_backbone, positions, tiny
from s3pet_nb.bilevel import hypergrad
from s3pet_nb.gate import ShiftedSigmoid
from s3pet_nb.pet import PET_MODULES
from s3pet_nb.search import SearchConfig, SearchStep
from s3pet_nb.space import ROLES, SPACES, GatedModel, Rule, attach, make_space

HEAD = {"t5": "seq2seq"}
EVERYTHING = tuple(Rule(name, ROLES) for name in PET_MODULES)


def on_meta(config: transformers.PretrainedConfig, head: str) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        return getattr(transformers, head)(config)


def test_counts_on_t5_large_are_the_papers():
    t5 = on_meta(transformers.T5Config(vocab_size=32128, d_model=1024, d_kv=64, d_ff=4096, num_layers=24,
                                       num_heads=16), "T5ForConditionalGeneration")
    mix, lora = make_space(t5, "mix"), make_space(t5, "lora")
    assert (mix.n_backbone, len(mix), mix.n_params) == (737_668_096, 916, 1_881_088)
    assert (len(lora), lora.n_params) == (288, 884_736)
    by_module = mix.summary()
    assert by_module.loc["lora"].tolist() == [288, 884_736]
    assert by_module.loc["bitfit"].tolist() == [410, 567_296]
    assert by_module.loc["lnfit"].tolist() == [122, 124_928]
    assert by_module.loc["lowrank_adapter"].tolist() == [96, 304_128]
    assert not any(candidate.position.role.startswith("cross_") and candidate.position.kind == "linear"
                   for candidate in mix.candidates)


def test_counts_on_minilm():
    model, _ = load_backbone("minilm")
    space = make_space(model)
    assert (len(space), space.n_params) == (110, 87_168)
    assert {candidate.position.role for candidate in space.candidates
            if candidate.position.layer is None} == {"embed_norm"}


def test_the_gated_t5_has_two_input_products():
    gated = tiny("t5", "seq2seq", feed_forward_proj="gated-gelu")
    roles = {position.role for position in positions(gated)}
    assert {"wi_0", "wi_1", "wo"} <= roles and "wi" not in roles
    assert len(make_space(gated, "lora")) == 4 * 7


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rules", [*SPACES, EVERYTHING], ids=[*SPACES, "everything"])
def test_candidate_names_are_unique_and_sizes_are_those_of_the_weights(family, rules):
    model = tiny(family, HEAD.get(family, "classify"))
    space = make_space(model, rules)
    assert len({candidate.name for candidate in space.candidates}) == len(space)
    with attach(model, space) as gated:
        assert [sum(weight.numel() for weight in pet.parameters()) for pet in gated.pets] == space.n.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_inside_leaves_the_model_as_it_was(family):
    model = tiny(family, HEAD.get(family, "classify")).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="on purpose"):
        with attach(model, make_space(model, EVERYTHING)) as gated:
            for weight in gated.trainable().values():
                nn.init.normal_(weight)
            gated.eval()
            raise RuntimeError("on purpose")
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training and all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("name", SPACES)
def test_two_spaces_cannot_be_attached_at_once(name):
    model = tiny("bert")
    space = make_space(model, name)
    with attach(model, space):
        with pytest.raises(ValueError, match="carries PET modules already"):
            with attach(model, space):
                pass
    with attach(model, space) as gated:
        assert gated.device == model.device


def test_every_part_has_its_own_training_mode_again():
    model = tiny("bert").train()
    model.bert.embeddings.eval()
    modes = [part.training for part in model.modules()]
    with attach(model, make_space(model)) as gated:
        gated.train()
    assert [part.training for part in model.modules()] == modes


def test_batches_go_where_the_backbone_is_and_alpha_stays_on_the_cpu():
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(transformers.BertConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    gated = GatedModel(model, make_space(model), ShiftedSigmoid(), seed=0)
    assert (gated.device.type, gated.alpha.device.type, gated.open[0].device.type) == ("meta", "cpu", "meta")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("module", PET_MODULES)
def test_delta_is_what_the_formula_says_and_a_closed_gate_closes_it(family, module):
    model = tiny(family, HEAD.get(family, "classify"))
    batch, space = example_batch(model), make_space(model, (Rule(module, ROLES),))
    with torch.no_grad(), attach(model, space) as gated:
        before = gated(**batch).logits
        for weight in gated.trainable().values():
            nn.init.normal_(weight, std=0.5)
        gated.load(gated.tensors())
        head_only = dict(gated.trainable())
        gated.z = torch.zeros(len(space))
        closed = gated(**batch).logits
        gated.z = torch.ones(len(space))
        opened = gated(**batch).logits
        for name, weight in head_only.items():
            if not name.startswith("head."):
                weight.zero_()
        without_delta = gated(**batch).logits
    assert not torch.allclose(opened, closed)
    torch.testing.assert_close(closed, without_delta)
    assert before.shape == opened.shape


@pytest.mark.parametrize("family, role, module", [("bert", "q", "lora"), ("t5", "wi", "lora"),
                                                  ("gpt2", "qkv", "lora"), ("llama", "wi_1", "lora"),
                                                  ("bert", "wo", "bitfit"), ("t5", "o", "bitfit"),
                                                  ("gpt2", "o", "bitfit"), ("bert", "attn_norm", "lnfit"),
                                                  ("llama", "ffn_norm", "lnfit"),
                                                  ("t5", "final_norm", "lnfit"),
                                                  ("bert", "embed_norm", "bitfit")])
def test_an_attached_module_equals_the_backbone_with_its_weight_changed(family, role, module):
    "LoRA, BitFit and LNFit change a weight: the same logits must come from a backbone changed by hand."
    model = tiny(family, HEAD.get(family, "classify"))
    batch, space = example_batch(model), make_space(model, (Rule(module, (role,)),))
    with torch.no_grad():
        with attach(model, space) as gated:
            torch.manual_seed(0)
            for name, weight in gated.trainable().items():
                if not name.startswith("head."):
                    nn.init.normal_(weight, std=0.3)
            gated.z = torch.linspace(0.2, 1, len(space))
            attached = gated(**batch).logits
            deltas = [(candidate.position.path, pet, z) for candidate, pet, z
                      in zip(space.candidates, gated.pets, gated.open)]
        for path, pet, z in deltas:
            target = model.base_model.get_submodule(path)
            if module == "lora":
                change = z * pet.scale * pet.B @ pet.A
                target.weight += change if isinstance(target, nn.Linear) else change.T
            elif module == "lnfit":
                target.weight += z * pet.s
            elif target.bias is None:
                target.bias = nn.Parameter(z * pet.b)
            else:
                target.bias += z * pet.b
        torch.testing.assert_close(attached, model(**batch).logits, rtol=1e-4, atol=1e-5)


def test_a_parallel_adapter_reads_the_input_of_its_block_and_an_adapter_the_output():
    model = tiny("bert")
    batch, seen = example_batch(model), {}
    layer = model.bert.encoder.layer[0]
    handles = [layer.intermediate.dense.register_forward_pre_hook(
                   lambda _, args: seen.update(parallel=args[0])),
               layer.output.dense.register_forward_hook(lambda _, args, out: seen.update(adapter=out))]
    with torch.no_grad(), attach(model, make_space(model, EVERYTHING)) as gated:
        read = {}
        for candidate, pet in zip(gated.space.candidates, gated.pets):
            if (candidate.position.name == "encoder.0.ffn"
                    and candidate.module in ("adapter", "parallel_adapter")):
                pet.down.register_forward_pre_hook(
                    lambda _, args, name=candidate.module: read.update({name: args[0]}))
        gated(**batch)
    for handle in handles:
        handle.remove()
    assert torch.equal(read["parallel_adapter"], seen["parallel"])
    assert torch.equal(read["adapter"], seen["adapter"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mixed_term_of_a_real_search_step(family):
    """On a backbone in double precision, dropout on: central and exact agree, so passes share their noise.

    Double backward needs attention that has one, hence eager. No difference is near the derivative across the
    kinks of T5's ReLU, hence its gated variant.
    """
    smooth = {"feed_forward_proj": "gated-gelu"} if family == "t5" else {}
    model = tiny(family, HEAD.get(family, "classify"), attn_implementation="eager", **smooth).double()
    space = make_space(model)
    with attach(model, space) as gated, torch.random.fork_rng():
        gated.double().train()
        for weight in gated.trainable().values():
            nn.init.normal_(weight, std=0.1)
        gated.meet(space.n_params // 4)
        step = SearchStep(gated, space.n_params // 4, "exact", SearchConfig())
        u = torch.rand(len(space), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        pair = example_batch(model, seed=1), example_batch(model, seed=2)
        found = {order: hypergrad(lambda: step.loss(pair[0], u, 7), lambda: step.loss(pair[1], u, 7),
                                  step.delta, gated.alpha, xi=0.01, order=order)
                 for order in ("second", "central", "exact")}
    mixed = {order: hyper.mixed for order, hyper in found.items()}
    assert mixed["exact"].norm() > 0
    assert torch.cosine_similarity(mixed["central"], mixed["exact"], dim=0) > 0.99
    assert torch.cosine_similarity(mixed["second"], mixed["exact"], dim=0) > 0.9


def test_the_noise_of_a_step_is_the_same_in_all_its_passes():
    model = tiny("bert", hidden_dropout_prob=0.5)
    batch = example_batch(model)
    with attach(model, make_space(model)) as gated, torch.random.fork_rng():
        gated.train()
        step = SearchStep(gated, 200, "first", SearchConfig())
        u = torch.rand(len(gated.space), dtype=torch.float64)
        losses = [step.loss(batch, u, noise).item() for noise in (7, 7, 8)]
    assert losses[0] == losses[1] != losses[2]
