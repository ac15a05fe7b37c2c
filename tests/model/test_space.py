"Counts, attachment and the passes of a search step on every family, beyond what the notebooks show."
import pytest
import torch
import transformers
from torch import nn

from s3pet_nb.core import UnknownName, n_params
from s3pet_nb.learn.bilevel import hypergrad
from s3pet_nb.learn.search import SearchConfig, SearchStep
from s3pet_nb.model.backbone import FAMILIES, checkpointing, example_batch, load_backbone, tiny
from s3pet_nb.model.gate import ShiftedSigmoid, StraightThrough
from s3pet_nb.model.pet import PET_MODULES, LoRA, Sparse
from s3pet_nb.model.space import (LINEAR, NORM, ROLES, SPACES, GatedModel, Rule, SearchSpace, attach, lora_at,
                                  make_space, pack, unpack)
from s3pet_nb.model.structure import Structure
from variants import HEAD, VARIANTS, drawn, fill, variant, zeros_beside

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


LLAMA_LIKE = {
    "mistral": dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                    num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False),  # Mistral-7B
    "qwen2": dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                  num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),  # Qwen2.5-0.5B
    "qwen3": dict(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                  num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                  tie_word_embeddings=True),  # Qwen3-0.6B
}


@pytest.mark.parametrize("family, n_backbone", [("mistral", 7_241_732_096), ("qwen2", 494_032_768),
                                                ("qwen3", 596_049_920)])
def test_counts_on_llama_like_models(family, n_backbone):
    config = LLAMA_LIKE[family]
    model = on_meta(transformers.AutoConfig.for_model(family, **config),
                    f"{family.capitalize()}ForCausalLM")
    d, ffn, layers, heads, kv = (config[name] for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads"))
    head = config.get("head_dim", d // heads)
    q, k = heads * head, kv * head
    per_head = 2 * head if family == "qwen3" else 0
    norms = layers * (2 * d + per_head) + d
    lora = layers * (2 * (d + q) + 2 * (d + k) + 3 * (d + ffn))
    biases = layers * (q + 2 * k + d + 2 * ffn + d) + norms
    adapters = layers * 2 * (2 * (d + 32) + 32 + d)
    mix = make_space(model, "mix")
    assert mix.n_backbone == n_backbone
    assert mix.summary().parameters.to_dict() == {
        "lora": lora, "bitfit": biases, "lnfit": norms, "lowrank_adapter": adapters,
        "all": lora + biases + norms + adapters}
    assert make_space(model, "lora").n_params == lora
    assert make_space(model, "bias").n_params == biases
    assert make_space(model, "exportable").n_params == lora + biases
    assert make_space(model, [Rule("bitfit", "lm_head")]).n_params == config["vocab_size"]


def test_counts_on_deberta_v3_base():
    model = on_meta(transformers.DebertaV2Config(
        vocab_size=128100, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=512, relative_attention=True, position_buckets=256,
        norm_rel_ebd="layer_norm", share_att_key=True, pos_att_type="p2c|c2p", position_biased_input=False,
        type_vocab_size=0), "DebertaV2Model")
    mix = make_space(model, "mix")
    assert mix.n_backbone == 183_831_552
    assert mix.summary().parameters.to_dict() == {
        "lora": 12 * (4 * 1536 + 2 * 3840), "bitfit": 12 * (5 * 768 + 3072) + 26 * 768, "lnfit": 26 * 768,
        "lowrank_adapter": 24 * 2400, "all": 165_888 + 102_912 + 19_968 + 57_600}


def test_mam_is_the_architecture_of_lawton_et_al_without_the_heads_biases():
    model = on_meta(transformers.RobertaConfig(
        vocab_size=50265, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
        num_attention_heads=16, max_position_embeddings=514, type_vocab_size=1),
        "RobertaForSequenceClassification")
    mam = make_space(model, "mam")
    assert (mam.n_backbone, mam.n_params) == (355_361_794, 5_777_410 - 1_026)
    assert mam.summary().parameters["bitfit"] == 272_386 - 1_026 == make_space(model, "bias").n_params
    assert {rule.module: dict(rule.settings) for rule in mam.rules} == {
        "bitfit": {}, "lora": {"r": 16, "init": "balanced"}}


def test_counts_on_minilm():
    model, _ = load_backbone("minilm")
    space = make_space(model)
    assert (len(space), space.n_params) == (110, 87_168)
    assert {candidate.position.role for candidate in space.candidates
            if candidate.position.layer is None} == {"embed_norm"}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("rules", SPACES)
def test_candidate_names_are_unique(name, rules):
    space = make_space(variant(name), rules)
    assert len({candidate.name for candidate in space.candidates}) == len(space)


SIZE = {"lora": lambda d_in, d_out: d_in + d_out,
        "bitfit": lambda d_in, d_out: d_out,
        "lnfit": lambda d_in, d_out: d_out,
        "adapter": lambda d_in, d_out: 24 * (2 * d_out + 1) + d_out,
        "parallel_adapter": lambda d_in, d_out: 24 * (d_in + d_out + 1) + d_out,
        "lowrank_adapter": lambda d_in, d_out: 2 * (d_out + 32) + 32 + d_out}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("module", PET_MODULES)
def test_the_contract_of_every_module_on_every_family(name, module):
    "Sizes by formula, zero change, a gradient for every alpha and weight, and nothing is left behind."
    model = variant(name)
    batch, space = example_batch(model), make_space(model, (Rule(module, ROLES),))
    weights = {key: weight.clone() for key, weight in model.state_dict().items()}
    with torch.no_grad():
        before = model(**batch).logits
    with attach(model, space) as gated:
        sizes = [SIZE[module](candidate.position.d_in, candidate.position.d_out)
                 for candidate in space.candidates]
        assert [sum(weight.numel() for weight in pet.parameters()) for pet in gated.pets] == sizes
        assert space.n.tolist() == sizes
        with torch.no_grad():
            torch.testing.assert_close(gated(**batch).logits, before, rtol=0, atol=0)
        fill(gated)
        gated.meet(max(space.n_params // 2, int(space.n.min())))
        gated.sample(torch.rand(len(space), dtype=torch.float64))
        gated(**batch).loss.backward()
        assert gated.alpha.grad.ne(0).all()
        assert not [key for key, weight in gated.trainable().items() if not weight.grad.ne(0).any()]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)
    after = model.state_dict()
    assert list(after) == list(weights) and all(torch.equal(after[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_glorot_adapter_of_the_released_code_is_the_one_that_changes_the_start(name):
    model = variant(name)
    batch = example_batch(model)
    space = make_space(model, (Rule("lowrank_adapter", ROLES, {"init": "glorot"}),))
    with torch.no_grad():
        before = model(**batch).logits
        with attach(model, space) as gated:
            assert not torch.allclose(gated(**batch).logits, before)
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_bf16_autocast_hidden_states_keep_their_type(name, dtype):
    model = variant(name).to(dtype)
    batch, space = example_batch(model), make_space(model, EVERYTHING)
    paths = {candidate.position.path for candidate in space.candidates}

    def types_and_logits() -> tuple[dict, torch.Tensor]:
        types = {}
        hooks = [model.get_submodule(path).register_forward_hook(
                     lambda _, args, out, path=path: types.update({path: out.dtype})) for path in paths]
        logits = model(**batch).logits
        for hook in hooks:
            hook.remove()
        return types, logits

    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            types, before = types_and_logits()
        with attach(model, space) as gated:
            with torch.no_grad():
                types_attached, logits = types_and_logits()
            assert types_attached == types
            torch.testing.assert_close(logits, before, rtol=0, atol=0)
            fill(gated)
            gated.meet(space.n_params // 2)
            gated.sample(torch.rand(len(space), dtype=torch.float64))
            gated(**batch).loss.backward()
            assert {weight.dtype for weight in gated.pets.parameters()} == {torch.float32}
            assert gated.alpha.grad.isfinite().all() and gated.alpha.grad.ne(0).float().mean() > 0.9
            assert all(weight.grad.isfinite().all() for weight in gated.trainable().values())


def test_another_gate_may_be_set_and_decides_what_is_expected():
    model = tiny("bert")
    space = make_space(model)
    with attach(model, space) as gated:
        gated.meet(space.n_params // 3)
        gated.expect()
        assert torch.equal(gated.z, gated.p.detach()) and not gated.z.requires_grad
        gated.gate = StraightThrough()
        gated.expect()
        assert torch.equal(gated.z, gated.gate.expected(gated.p.detach()))
        assert torch.equal(gated.gates, gated.z.float())


def test_spaces_and_gated_models_show_their_modules_and_sizes():
    model = tiny("bert")
    space = make_space(model)
    shown = space._repr_html_()
    assert f"{space.n_params:,}" in shown and all(name in shown for name in space.summary().index)
    with attach(model, space) as gated, torch.no_grad():
        gated.meet(space.n_params // 3)
        shown, p = gated._repr_html_(), gated.p
        assert repr(gated) in shown and f"zeta = {gated.zeta:.3f}" in shown
        for module in {candidate.module for candidate in space.candidates}:
            those = torch.tensor([candidate.module == module for candidate in space.candidates])
            for number in f"{int(those.sum())}", f"{p[those].mean():.3f}", f"{(p * space.n)[those].sum():,.0f}":
                assert f">{number}</td>" in shown


def test_ranks_at_one_position_are_candidates_of_their_own_and_add_up():
    model = tiny("bert")
    batch = example_batch(model)
    space = make_space(model, [Rule("lora", ("q", "wi"), {"r": r}) for r in (1, 2, 4)])
    assert len(space) == 2 * 2 * 3 and len({candidate.name for candidate in space.candidates}) == len(space)
    assert [candidate.name for candidate in space.candidates[:3]] == [
        f"encoder.0.q.lora(r={r})" for r in (1, 2, 4)]
    with torch.no_grad():
        with attach(model, space) as gated:
            fill(gated)
            gated.z = torch.linspace(0.2, 1, len(space))
            attached = gated(**batch).logits
            changes = [(candidate.position.path, z * pet.scale * pet.B @ pet.A)
                       for candidate, pet, z in zip(space.candidates, gated.pets, gated.gates)]
            head = {name: weight.clone() for name, weight in gated.trainable().items()
                    if name.startswith("head.")}
        for path, change in changes:
            model.get_submodule(path).weight += change
        for name, weight in head.items():
            model.get_parameter(name.removeprefix("head.")).copy_(weight)
        torch.testing.assert_close(attached, model(**batch).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rules, error, says", [
    ([Rule("lora", LINEAR, {"rank": 8})], UnknownName, "unknown setting of lora 'rank'"),
    ([Rule("lora", LINEAR, {"r": "8"})], ValueError, "r of lora is '8'"),
    ([Rule("lora", LINEAR, {"init": "balance"})], UnknownName, "unknown initialisation 'balance'"),
    ([Rule("lowrank_adapter", "ffn", {"init": "balanced"})], UnknownName, "choose one of glorot, zero"),
    ([Rule("lora", ("lm-head",))], UnknownName, "unknown role 'lm-head'"),
    ([Rule("lora", LINEAR), Rule("lora", "q")], ValueError, "two rules give encoder.0.q.lora"),
    ([Rule("bitfit", "lm_head")], ValueError, "fits nowhere")])
def test_rules_are_refused_before_anything_is_built(rules, error, says):
    with pytest.raises(error, match=says):
        make_space(tiny("bert"), rules)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_balanced_lora_changes_nothing_until_it_is_trained(name, training):
    "Not a bit of the logits, though both factors are there and both have a gradient at once."
    model = variant(name)
    batch = example_batch(model)
    space = make_space(model, [Rule("lora", LINEAR, {"r": 3, "init": "balanced"})])

    def logits(model: nn.Module) -> torch.Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return model(**batch).logits

    model.train(training)
    before = logits(model)
    with attach(model, space) as gated:
        gated.train(training)
        assert torch.equal(logits(gated), before)
        gated.meet(space.n_params // 2)
        gated.sample(torch.rand(len(space), dtype=torch.float64))
        assert torch.equal(logits(gated), before)
        gated(**batch).loss.backward()
        for pet in gated.pets:
            assert pet.A.ne(0).all() and pet.B.ne(0).all()
            assert pet.A.grad.ne(0).any() and pet.B.grad.ne(0).any()
        assert not any(key.endswith(("A0", "B0")) for key in gated.pets.state_dict())
        fill(gated)
        assert not torch.allclose(logits(gated), before)
    assert torch.equal(logits(model), before)


def test_balanced_lora_is_the_change_of_the_product():
    model = tiny("bert").double()
    batch = example_batch(model)
    space = make_space(model, [Rule("lora", ("q", "wo"), {"r": 4, "lora_alpha": 8.0, "init": "balanced"})])
    with torch.no_grad():
        with attach(model, space) as gated:
            gated.pets.double()
            start = [pet.B @ pet.A for pet in gated.pets]
            for pet in gated.pets:
                pet.A += torch.randn_like(pet.A)
                pet.B += torch.randn_like(pet.B)
            gated.z = torch.linspace(0.2, 1, len(space))
            attached = gated(**batch).logits
            changes = [(candidate.position.path, z.double() * 2 * (pet.B @ pet.A - product)) for
                       candidate, pet, z, product in zip(space.candidates, gated.pets, gated.gates, start)]
        for path, change in changes:
            model.get_submodule(path).weight += change
        torch.testing.assert_close(attached, model(**batch).logits)


@pytest.mark.parametrize("name", VARIANTS)
def test_initial_weights_depend_on_the_seed_and_the_name_alone(name):
    model = variant(name)
    space = make_space(model, EVERYTHING + (Rule("lora", LINEAR, {"r": 2, "init": "balanced"}),
                                            Rule("lowrank_adapter", "ffn", {"init": "glorot"})))

    def start(space, seed: int) -> dict:
        with attach(model, space, seed=seed) as gated:
            return {key: weight for key, weight in gated.tensors().items() if not key.startswith("head.")}

    state = torch.get_rng_state()
    whole = start(space, 3)
    assert torch.equal(torch.get_rng_state(), state), "attaching leaves torch's own seed alone"
    torch.rand(3)
    mask = torch.rand(len(space)) < 0.3
    for part in space.subset(mask), make_space(model, space.rules[::-1]):
        same = start(part, 3)
        assert same and all(torch.equal(weight, whole[key]) for key, weight in same.items())
    other = start(space, 4)
    random = [key for key, weight in whole.items() if weight.ne(0).any() and weight.unique().numel() > 1]
    assert random and not any(torch.equal(other[key], whole[key]) for key in random)
    first = [whole[key].flatten()[0].item() for key in random]
    assert len(set(first)) == len(first), "no two weights start alike"


def test_masks_are_packed_and_unpacked():
    rng = torch.Generator().manual_seed(0)
    for shape in (1,), (8,), (17,), (3, 5), (16, 1), (4, 0):
        mask = torch.rand(shape, generator=rng) < 0.5
        bits = pack(mask)
        assert isinstance(bits, bytes) and len(bits) == -(-mask.numel() // 8)
        assert torch.equal(unpack(bits, shape), mask) and unpack(bits, shape).dtype == torch.bool
    mask = torch.rand(5, 3, generator=rng) < 0.5
    assert torch.equal(unpack(pack(mask.T), (3, 5)), mask.T)
    with pytest.raises(ValueError, match="a mask of 17 entries has 3 bytes, not 2"):
        unpack(b"ab", (17,))


def test_lora_of_another_rank_and_elsewhere():
    assert lora_at(SPACES["mam"]) == SPACES["mam"]
    bias, lora = lora_at(SPACES["mam"], r=4, roles=["v"])
    assert bias == SPACES["mam"][0] and lora.roles == ("v",)
    assert dict(lora.settings) == {"r": 4, "init": "balanced", "lora_alpha": 4.0}
    assert lora_at(SPACES["mam"], roles=["o"])[1].settings == {"r": 16, "init": "balanced"}
    assert lora_at(SPACES["lora"], r=2)[0] == Rule("lora", LINEAR, {"r": 2, "lora_alpha": 2.0})
    space = make_space(tiny("bert"), lora_at(SPACES["mam"], r=4, roles=["v"]))
    assert space.summary().loc["lora"].tolist() == [2, 2 * 4 * 32]
    with pytest.raises(ValueError, match="there is no LoRA in these rules"):
        lora_at(SPACES["bias"], r=4)
    with pytest.raises(ValueError, match="it is -1"):
        lora_at(SPACES["mam"], r=-1)


def test_a_space_keeps_the_rules_that_it_was_made_from():
    model = tiny("bert")
    assert make_space(model, "mix").rules == SPACES["mix"]
    rules = [Rule("lora", ["q", "v"], {"r": 4}), Rule("lnfit", NORM)]
    space = make_space(model, rules)
    assert space.rules == tuple(rules) and space.rules[0].roles == ("q", "v")
    assert space.subset(space.n < 100).rules == space.rules


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
    assert not any(vars(module).keys() & module._parameters.keys() for module in model.modules())
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
    assert (gated.device.type, gated.alpha.device.type, gated.gates.device.type) == ("meta", "cpu", "meta")


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
                                                  ("bert", "embed_norm", "bitfit"),
                                                  ("deberta-v2", "q", "lora"), ("deberta-v2", "k", "bitfit"),
                                                  ("deberta-v2", "rel_norm", "lnfit"),
                                                  ("qwen3", "q_norm", "lnfit"),
                                                  ("t5", "lm_head", "bitfit")])
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
                      in zip(space.candidates, gated.pets, gated.gates)]
        for path, pet, z in deltas:
            target = model.get_submodule(path)
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


@pytest.mark.parametrize("name, role", [("deberta-v2", "attn"), ("t5", "ffn"), ("gpt2", "attn"),
                                        ("qwen3", "attn")])
def test_what_a_parallel_adapter_reads_is_as_wide_and_as_long_as_the_hidden_state(name, role):
    "DeBERTa's query and key products also read positions; the block's input is not that."
    model = variant(name)
    batch, space, read = example_batch(model), make_space(model, [Rule("parallel_adapter", role)]), []
    with torch.no_grad(), attach(model, space) as gated:
        for pet in gated.pets:
            pet.down.register_forward_pre_hook(lambda _, args: read.append(args[0].shape))
        gated(**batch)
    width = space.candidates[0].position.d_in
    assert read == [(*batch["input_ids"].shape, width)] * len(space)


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

        def mixed_term(order: str) -> torch.Tensor:
            return hypergrad(lambda: step.losses(pair[:1], u, 7), lambda: step.losses(pair[1:], u, 7),
                             step.delta, gated.alpha, xi=0.01, order=order).mixed

        mixed = {order: mixed_term(order) for order in ("second", "central", "exact")}
        with checkpointing(model):
            torch.testing.assert_close(mixed_term("exact"), mixed["exact"])
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
        losses = [next(step.losses([batch], u, noise)).item() for noise in (7, 7, 8)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if "decoder" in row.stacks])
def test_a_gated_model_writes_what_its_forward_pass_says(family):
    "Token by token with cached keys and values, every module at work."
    model = tiny(family, HEAD.get(family, "causal"))
    ids = example_batch(model, size=3)["input_ids"]
    with attach(model, make_space(model, EVERYTHING)) as gated:
        fill(gated, std=0.3)
        gated.z = torch.linspace(0.2, 1, len(gated.space))
        written = gated.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6,
                                 do_sample=False)[:, -6:]
        for k in range(6):
            before = {"decoder_input_ids": torch.cat([torch.zeros(3, 1).long(), written[:, :k]], 1),
                      "input_ids": ids} if family == "t5" else {"input_ids": torch.cat([ids, written[:, :k]], 1)}
            logits = gated(**before).logits[:, -1].detach()
            stop = model.generation_config.eos_token_id
            logits[:, stop if stop is not None else []] = -torch.inf
            assert torch.equal(written[:, k], logits.argmax(-1))
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6,
                           do_sample=False)[:, -6:]
    assert not torch.equal(plain, written)


ALL = (*(Rule(name, ROLES) for name in PET_MODULES if name != "lora"),
       Rule("lora", ROLES, {"r": 3, "init": "balanced"}), Rule("lora", ROLES, {"r": 2}))


def in_part(space: SearchSpace, seed: int = 0) -> tuple[Structure, dict[str, torch.Tensor]]:
    "Every third candidate as a whole, every fifth gone, of the others random entries of random weights."
    masks = {}
    for i, candidate in enumerate(space.candidates):
        with torch.device("meta"):
            whole = candidate.whole()
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
