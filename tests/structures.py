"Structures of whole modules and of modules in part, for the tests of what is done with them."
import torch

from s3pet_nb.model.backbone import tiny
from s3pet_nb.model.select import select
from s3pet_nb.model.space import NORM, Rule, SearchSpace, make_space
from s3pet_nb.model.structure import Structure

RANKS = (Rule("lora", ("q", "v"), {"r": 2}), Rule("lora", ("q", "v"), {"r": 4, "lora_alpha": 8.0}),
         Rule("lowrank_adapter", ("ffn",), {"init": "glorot"}), Rule("lnfit", NORM))
MAM = (Rule("bitfit", ("q", "wi")), Rule("lora", ("q", "wo"), {"r": 4, "init": "balanced"}),
       Rule("lowrank_adapter", ("attn",)))


def searched(space: str | tuple = "mix", B: int = 300, seed: int = 0, **about) -> Structure:
    "As a search leaves it: chosen by random p."
    space = make_space(tiny("bert"), space)
    p = torch.rand(len(space), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Structure.of(space, select(p, space.n, B), p, budget=B, method="s3pet", **about)


def random_masks(space: SearchSpace, seed: int, share: float = 0.4) -> dict[str, torch.Tensor]:
    "Every sort of part: some weights whole, some without an entry, some candidates gone."
    rng, masks = torch.Generator().manual_seed(seed), {}
    for i, candidate in enumerate(space.candidates):
        for j, (name, shape) in enumerate(candidate.shapes.items()):
            one = torch.rand(shape, generator=rng) < share
            masks[f"{candidate.name}.{name}"] = (one if (i + j + seed) % 4 else torch.ones_like(one)) & (
                (i + seed) % 5 != 0 and j != 2)
    return masks


def in_part(draw: int = 0, **about) -> Structure:
    "As pruning leaves it."
    space = make_space(tiny("bert"), MAM)
    return Structure.pruned(space, random_masks(space, draw), torch.linspace(-1, 1, len(space)), **about)
