"Models of every family and of its odd relatives, and PET modules in part, for the tests of the model wing."
import torch
import transformers
from torch import nn

from s3pet_nb.model.backbone import FAMILIES, narrow, tiny
from s3pet_nb.model.pet import PETModule
from s3pet_nb.model.space import GatedModel

HEAD = {"t5": "seq2seq"}  # the others classify
VARIANTS = {**{family: (family, HEAD.get(family, "classify"), {}) for family in FAMILIES},
            "t5-v1.1": ("t5", "seq2seq", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
            "deberta-v2-xlarge": ("deberta-v2", "classify",
                                  {"norm_rel_ebd": "none", "share_att_key": False, "conv_kernel_size": 3,
                                   "conv_act": "gelu"}),
            "gpt2-causal": ("gpt2", "causal", {}), "llama-causal": ("llama", "causal", {})}


def variant(name: str, **overrides) -> transformers.PreTrainedModel:
    family, head, settings = VARIANTS[name]
    return tiny(family, head, **settings, **overrides)


def fill(gated: GatedModel, std: float = 0.1) -> None:
    torch.manual_seed(0)
    for weight in gated.trainable().values():
        nn.init.normal_(weight, std=std)


def drawn(module: PETModule, seed: int) -> dict[str, torch.Tensor]:
    "Masks of every density, so that some weights keep all of their entries and some none."
    rng = torch.Generator().manual_seed(seed)
    shares = (0.0, 0.1, 0.5, 0.9, 1.0)
    return {name: torch.rand(weight.shape, generator=rng) < shares[int(torch.randint(5, (), generator=rng))]
            for name, weight in module.named_parameters()}


@torch.no_grad()
def zeros_beside(module: PETModule, masks: dict[str, torch.Tensor]) -> None:
    for name, weight in module.named_parameters():
        weight *= masks[name]
    for name, start in module.named_buffers():
        start *= masks[name.removesuffix("0")]  # what balanced LoRA subtracts is of the kept entries too


def rounded():
    "Whether products on this processor are narrow, or as they were."
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    with narrow():
        found = x @ x
    return not torch.equal(found, x @ x)
