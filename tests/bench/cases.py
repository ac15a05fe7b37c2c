"""What is measured: models of known shapes, their batches, and the structures that are trained on them.

Shapes other than MiniLM's have random weights; how long a product takes does not depend on its numbers.
"""
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import transformers
from s3pet_nb.core import to_device
from s3pet_nb.data.batch import Batches, loader
from s3pet_nb.data.form import Form, form_of
from s3pet_nb.data.rows import Splits, halves
from s3pet_nb.data.task import find_task
from s3pet_nb.model.backbone import head_parameters, load_backbone, tiny
from s3pet_nb.model.space import SearchSpace
from s3pet_nb.model.structure import Structure, select

BATCHES = 8  # that every subject sees, in order


@dataclass(frozen=True)
class Case:
    "A model and the batches it is measured on."

    name: str
    make: Callable[[str | None], tuple[transformers.PreTrainedModel, list[dict]]]  # from the data folder
    precision: str = "float32"
    needs_cuda: bool = False

    def load(self, data: str | None, device: torch.device) -> tuple[transformers.PreTrainedModel, list[dict]]:
        "The model and its batches, on the device."
        model, batches = self.make(data)
        return model.to(device), [to_device(batch, device) for batch in batches]


def minilm(data: str | None, batch_size: int = 32) -> tuple[transformers.PreTrainedModel, list[dict]]:
    "The packaged encoder, and batches of CoLA as a training gets them."
    task = find_task("glue/cola")
    form = form_of(task, "minilm")
    model, tokenizer = load_backbone("minilm", form.head, form.n_labels)
    rows = task.load(data).train
    batches = iter(loader(rows, form, tokenizer, batch_size, seed=0, max_length=64))
    return model, [next(batches) for _ in range(BATCHES)]


def random_batches(model: transformers.PreTrainedModel, size: int, length: int) -> list[dict]:
    "Token ids drawn evenly, all of one length; labels are classes, or two tokens of text."
    draw = torch.Generator().manual_seed(0)
    answers = model.config.is_encoder_decoder
    return [{"input_ids": torch.randint(3, model.config.vocab_size, (size, length), generator=draw),
             "attention_mask": torch.ones(size, length, dtype=torch.int64),
             "labels": torch.randint(3, model.config.vocab_size, (size, 2), generator=draw) if answers
             else torch.randint(0, model.config.num_labels, (size,), generator=draw)}
            for _ in range(BATCHES)]


def shaped(data: str | None, family: str, size: int, length: int, **config):
    "A model of this configuration with random weights, and random batches."
    model = tiny(family, "seq2seq" if family == "t5" else "classify", **config)
    return model, random_batches(model, size, length)


def t5(size: int, length: int, d_model: int, d_ff: int, layers: int, heads: int) -> Callable:
    "A T5 of version 1.0."
    return partial(shaped, family="t5", size=size, length=length, vocab_size=32_128, d_model=d_model, d_kv=64,
                   d_ff=d_ff, num_layers=layers, num_decoder_layers=layers, num_heads=heads)


def bert(size: int, length: int, layers: int, width: int, heads: int = 12) -> Callable:
    "An encoder of MiniLM's kind with a small vocabulary, so that its layers are what is measured."
    return partial(shaped, family="bert", size=size, length=length, vocab_size=1000, hidden_size=width,
                   intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
                   max_position_embeddings=length)


LARGE = dict(d_model=1024, d_ff=4096, layers=24, heads=16)
CASES = {case.name: case for case in [
    Case("minilm", minilm),
    Case("t5-small", t5(16, 32, 512, 2048, 6, 8)),
    Case("t5-large", t5(32, 128, **LARGE), precision="bf16", needs_cuda=True),
    Case("t5-large-batch-2", t5(2, 32, **LARGE)),
    *(Case(f"depth-{layers}", bert(32, 16, layers, 384)) for layers in (3, 6, 12, 24)),
    *(Case(f"width-{width}", bert(32, 16, 6, width, width // 32)) for width in (128, 256, 384, 768)),
    *(Case(f"narrow-{layers}", bert(8, 8, layers, 32, 2)) for layers in (6, 18, 56, 178, 555)),
]}
STEP_CASES = ("minilm", "t5-small", "t5-large")


def sibling(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    "A copy that shares the frozen weights, to carry modules of its own beside the others."
    own = head_parameters(model)
    return copy.deepcopy(model, {id(weight): weight for name, weight in model.named_parameters()
                                 if name not in own})


def share(space: SearchSpace) -> int:
    "The budget of 5 % of the space's parameters, or of its smallest module."
    return max(space.n_params // 20, int(space.n.min()))


def sparse_structure(space: SearchSpace) -> Structure:
    "5 % of the space at random, with the first module of the encoder's layer 0 that the budget can pay."
    B = share(space)
    p = torch.rand(len(space), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lowest = next(i for i, c in enumerate(space.candidates)
                  if c.position.layer == 0 and c.position.stack == "encoder" and c.n <= B)
    p[lowest] = 2.0
    return Structure.of(space, select(p, space.n, B), budget=B, method="random")


@dataclass(frozen=True)
class TaskRun:
    "A task, cut to what a short run needs: rows for one pass of the re-training, and few to score."

    name: str
    retrain_steps: int
    data: str | None
    batch_size: int = 16
    n_eval: int = 256

    def splits(self, seed: int) -> Splits:
        "Its rows."
        n_train = self.batch_size * self.retrain_steps
        return find_task(self.name).load(self.data, seed).head(n_train, self.n_eval)

    def form(self) -> Form:
        "How MiniLM is asked."
        return form_of(find_task(self.name), "minilm")

    def loaders(self, seed: int, tokenizer) -> dict[str, Batches]:
        "Batches of all training rows, of their two halves, and of the rows that are scored."
        splits = self.splits(seed)
        batches = partial(loader, form=self.form(), tokenizer=tokenizer, batch_size=self.batch_size,
                          max_length=64)
        d_delta, d_alpha = halves(splits.train, seed, splits.key)
        return {"train": batches(splits.train, seed=seed), "delta": batches(d_delta, seed=seed),
                "alpha": batches(d_alpha, seed=seed + 1), "validation": batches(splits.validation),
                "test": batches(splits.test)}
