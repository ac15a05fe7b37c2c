"""The published search step, written as well as we can, to be measured beside ours.

What is kept of it is what decides its cost. Every module computes a change of the hidden state, token by
token, and its gate multiplies that change (S3PET, equation 6): a bias becomes a tensor as large as the hidden
state, a norm's scale takes a second normalisation. `FourPasses` is the step as the paper writes it (algorithm
1, equations 11 to 13). `FivePasses` is the step as its released code runs it: the virtual step is taken on a
second copy of the backbone, and the weights are trained by a fifth pass, with new gates, after alpha has
moved. That code reads every structural parameter back from the device whenever it shifts them, and every
gate in every pass; so do these. Where it spends time without need, it is not followed: alpha is one vector,
weights are moved by few operations, and the virtual step is the paper's own, without Adam's moments.

The modules, gates, loop, data and selection are the library's.
"""
import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
import transformers
from s3pet_nb.learn.bilevel import moved, slopes
from s3pet_nb.learn.compute import negative_loss
from s3pet_nb.learn.learner import Log, check_finite
from s3pet_nb.learn.search import SearchConfig, SearchResult, SearchStep, run_search
from s3pet_nb.model.backbone import Position
from s3pet_nb.model.budget import expected_size, resolve_budget
from s3pet_nb.model.gate import Gate, ShiftedSigmoid
from s3pet_nb.model.space import GatedModel, SearchSpace, attach
from torch import Tensor, nn
from torch.func import functional_call


class HiddenGates(GatedModel):
    "A backbone with every candidate of a space, each gate on a change of the hidden state."

    def _set(self, z: Tensor, closed: Tensor) -> None:
        self._z = z
        self.each = z.to(self.model.device, torch.float32).unbind()

    def meet(self, B: int) -> float:
        "Solve zeta for the budget B, from alphas that are read one by one, and return the expected size."
        alpha = torch.tensor([value.item() for value in self.alpha.detach().unbind()], dtype=torch.float64)
        self.zeta = self.gate.solve(alpha, self.n, B)
        return expected_size(self.p, self.n)


def change(gated: HiddenGates, i: int, bare: nn.Module | None, h_in: Tensor, h_out: Tensor) -> Tensor:
    "What candidate i would add to the hidden state if its gate were open."
    pet, one = gated.pets[i], h_out.new_ones(())
    if bare is None:
        return pet(h_in, h_out, one).expand_as(h_out)
    vectors = {"weight": pet(None, None, one)}
    if getattr(bare, "bias", None) is not None:
        vectors["bias"] = torch.zeros_like(bare.bias)
    return functional_call(bare, vectors, (h_in,))


def add_changes(gated: HiddenGates, here: list[tuple[int, nn.Module | None]], inputs: dict[str, Tensor]):
    "A hook that adds the gated changes of the candidates `here`."
    def hook(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        for i, bare in here:
            position = gated.space.candidates[i].position
            h_in = args[0] if position.source == position.path else inputs[position.source]
            if gated.each[i].item() > 0:
                out = out + (gated.each[i] * change(gated, i, bare, h_in, out)).to(out.dtype)
        return out
    return hook


def note_input(inputs: dict[str, Tensor], position: Position):
    "A hook that keeps what comes into the first module of a block."
    def hook(module: nn.Module, args: tuple) -> None:
        inputs[position.source] = args[0]
    return hook


@contextmanager
def hidden_gates(
    model: transformers.PreTrainedModel,  # frozen while attached, except its head
    space: SearchSpace,  # made from this model
    gate: Gate = ShiftedSigmoid(),
    seed: int = 0,  # of the modules' initial weights
) -> Iterator[HiddenGates]:
    "Attach every candidate by hooks on hidden states; on exit the model is what it was."
    none = torch.zeros(len(space), dtype=torch.bool)
    with attach(model, space.subset(none), fused=False), ExitStack() as hooks:
        gated, inputs, places = HiddenGates(model, space, gate, seed), {}, defaultdict(list)
        for i, candidate in enumerate(space.candidates):
            module = model.get_submodule(candidate.position.path)
            scales = gated.pets[i].target(module) == "weight"
            places[candidate.position.path].append((i, copy.deepcopy(module) if scales else None))
        for path, here in places.items():
            here.sort(key=lambda entry: space.candidates[entry[0]].position.kind == "block")
            handle = model.get_submodule(path).register_forward_hook(add_changes(gated, here, inputs))
            hooks.callback(handle.remove)
        for position in {c.position.source: c.position for c in space.candidates
                         if c.position.kind == "block"}.values():
            handle = model.get_submodule(position.source).register_forward_pre_hook(
                note_input(inputs, position))
            hooks.callback(handle.remove)
        yield gated


class FourPasses(SearchStep):
    "One step as the paper writes it: one noise for all passes, delta moved by the gradient of the first."

    def __init__(self, gated: HiddenGates, B: int, config: SearchConfig):
        super().__init__(gated, B, "central", config)

    def unrolled(self, grads: list[Tensor], batches: list, u: Tensor, noise: int) -> list[Tensor]:
        "Gradients of L_alpha for delta and alpha after a virtual step, and its value."
        with moved(self.delta, grads, -self.step_delta.lr):
            return slopes(lambda: self.penalised(batches, u, noise), [*self.delta, self.gated.alpha])

    def move_alpha(self, batches_delta: list, batches_alpha: list) -> tuple[list[Tensor], dict[str, float]]:
        "Step alpha (equation 13); the gradient of the first pass, and what was seen."
        u, noise = self.noise()
        *grads, loss_delta = slopes(lambda: self.losses(batches_delta, u, noise), self.delta)
        *v, direct, loss_alpha = self.unrolled(grads, batches_alpha, u, noise)
        eps = 0.01 / torch.nn.utils.get_total_norm(v).item()
        sides = []
        for side in eps, -eps:
            with moved(self.delta, v, side):
                sides += slopes(lambda: self.losses(batches_delta, u, noise), [self.gated.alpha])[:1]
        self.step_alpha.step([direct - self.step_delta.lr * (sides[0] - sides[1]) / (2 * eps)])
        return grads, check_finite(loss=loss_delta.item(), loss_alpha=loss_alpha.item())

    def take(self, batches_delta: list, batches_alpha: list) -> dict[str, float]:
        "Take one step."
        grads, numbers = self.move_alpha(batches_delta, batches_alpha)
        self.step_delta.step(grads)
        return numbers | self.close(4)


class FivePasses(FourPasses):
    "One step as the released code runs it: a second backbone for the virtual step, a fifth pass for delta."

    def __init__(self, gated: HiddenGates, twin: HiddenGates, B: int, config: SearchConfig):
        super().__init__(gated, B, config)
        self.twin = SearchStep(twin, B, "central", config)

    def unrolled(self, grads: list[Tensor], batches: list, u: Tensor, noise: int) -> list[Tensor]:
        "The same on the second backbone, whose weights and alpha are made those of the first."
        twin, alpha = self.twin, self.twin.gated.alpha
        with torch.no_grad():
            torch._foreach_copy_([*twin.delta, alpha], [*self.delta, self.gated.alpha])
            torch._foreach_add_(twin.delta, grads, alpha=-self.step_delta.lr)
        twin.done = self.done
        twin.meet()
        return slopes(lambda: twin.penalised(batches, u, noise), [*twin.delta, alpha])

    def take(self, batches_delta: list, batches_alpha: list) -> dict[str, float]:
        "Take one step."
        _, numbers = self.move_alpha(batches_delta, batches_alpha)
        self.meet()
        u, noise = self.noise()
        *grads, loss = slopes(lambda: self.losses(batches_delta, u, noise), self.delta)
        self.step_delta.step(grads)
        return numbers | check_finite(loss=loss.item()) | self.close(5)


@contextmanager
def five_passes(
    model: transformers.PreTrainedModel,
    space: SearchSpace,
    B: int,  # a count
    config: SearchConfig,
) -> Iterator[FivePasses]:
    "The step of the released code on `model` and a copy of it."
    second = copy.deepcopy(model)
    with (hidden_gates(model, space, seed=config.seed) as gated,
          hidden_gates(second, space, seed=config.seed) as twin):
        gated.train(config.dropout)
        twin.train(config.dropout)
        yield FivePasses(gated, twin, B, config)


def published_search(
    model: transformers.PreTrainedModel,  # left as it was
    space: SearchSpace,
    loader_delta: Iterable[dict[str, Tensor]],
    loader_alpha: Iterable[dict[str, Tensor]],
    loader_val: Iterable[dict[str, Tensor]],
    budget: float,  # a ratio of the backbone below 1, else a count
    score: Callable[[nn.Module, Iterable], float] = negative_loss,
    config: SearchConfig = SearchConfig(),
    log: Log | None = None,
) -> SearchResult:
    "A whole search with the step of the released code, in the library's loop."
    B = resolve_budget(budget, space.n_backbone)
    with five_passes(model, space, B, config) as step:
        result = run_search(step, (loader_delta, loader_alpha, loader_val), score, log=log)
    return replace(result, order="five passes")
