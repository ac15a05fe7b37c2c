"""Modules:

- `s3pet_nb.cli`: The commands: s3pet demo, search, prune, probe, study, tasks, lab, export, transfer and report
- `s3pet_nb.core`: A registry, counting, whole files, a table: what every other module uses
- `s3pet_nb.data.agreement`: A task that needs no download: generated English sentences whose words agree, or do not
- `s3pet_nb.data.batch`: Rows become batches, and a model's answers become a score
- `s3pet_nb.data.form`: How a model is asked a row of a task, and how its answer is read
- `s3pet_nb.data.metric`: From labels and predictions to a score
- `s3pet_nb.data.rows`: Rows of text: read from files or the hub, checked, compared and split
- `s3pet_nb.data.setup`: A task, a backbone that is asked it, and the loaders between them, in one line
- `s3pet_nb.data.task`: GLUE, SuperGLUE, the project's own agreement task, or rows of yours: splits, labels, metrics
- `s3pet_nb.lab.analysis`: What a table of trained structures tells
- `s3pet_nb.lab.checks`: What a template refuses before a kernel starts
- `s3pet_nb.lab.example`: A small finished run, made of plain numbers, to try figures and pages on
- `s3pet_nb.lab.experiment`: What the templates share: a task and its backbone, structures to compare with, and how a run was run
- `s3pet_nb.lab.explore`: Finished runs side by side: one search under any budget, structures compared, averages and sweeps
- `s3pet_nb.lab.ground`: At which rates each kind of module learns, and on which tasks structures can differ
- `s3pet_nb.lab.judge`: How good a way to search is, by a table of structures that were all trained
- `s3pet_nb.lab.live`: A run that is watched while it goes on, and steered
- `s3pet_nb.lab.log`: A log that grows: what it has said since the last look, kept small
- `s3pet_nb.lab.page`: A page of a run, a page of a study, and an index of all: each draws without a network
- `s3pet_nb.lab.plot`: What a run's log shows: a frame of numbers, and a figure of that frame
- `s3pet_nb.lab.pool`: Run what a study has no result for: slots on this machine, retries, and a state that anybody can read
- `s3pet_nb.lab.ray`: The same study on a Ray cluster: one remote task per run, results on storage that all nodes share
- `s3pet_nb.lab.results`: What a study found: scores over seeds, paired differences, ranks and the papers' tables
- `s3pet_nb.lab.run`: Execute a template notebook into a run folder
- `s3pet_nb.lab.share`: A trained structure as two small files: save, load, push to the hub and bring back
- `s3pet_nb.lab.store`: The run folder: what was asked, what happened, what was found
- `s3pet_nb.lab.study`: What is asked: templates with parameters, and studies, which are grids of them
- `s3pet_nb.lab.table`: Structures that were all trained, as one file that anybody can read
- `s3pet_nb.lab.track`: The numbers of a run, also in MLflow or Weights & Biases
- `s3pet_nb.learn.bilevel`: The gradient of the structural parameters through one step of the modules they gate
- `s3pet_nb.learn.compute`: How a pass is run, where, and what it costs
- `s3pet_nb.learn.learner`: One training loop for searching and for training; what watches it, and what brings it back
- `s3pet_nb.learn.optim`: AdamW for many small weights: clipped, with a rate that falls, and stepped as one vector
- `s3pet_nb.learn.probe`: Which modules deserve the budget, from a few batches
- `s3pet_nb.learn.protocol`: How long and at which rates a training goes, by name
- `s3pet_nb.learn.prune`: Prune-search: train everything once, score every parameter on the way, keep what the budget pays for
- `s3pet_nb.learn.sample`: Random structures: what a search has to beat, drawn in more than one way
- `s3pet_nb.learn.search`: S3PET: which modules deserve the budget, learned by gradient
- `s3pet_nb.learn.strategy`: How a search spends its passes: the published way and others, as rows of settings
- `s3pet_nb.learn.train`: Train a structure from new weights, and what it is compared with
- `s3pet_nb.model.backbone`: Any Hugging Face model as named positions, from one table row per family
- `s3pet_nb.model.budget`: Expected size of a search, and the shift of the gates that keeps it within the budget
- `s3pet_nb.model.file`: A structure as a small file that diffs well, and the strict reading of a file that may be anything
- `s3pet_nb.model.fuse`: The fast form of an open supernet: what all modules add, in a few products
- `s3pet_nb.model.gate`: From structural parameters to activation probabilities and gate samples: alpha, p, z
- `s3pet_nb.model.peft`: A trained structure as one checkpoint of stock PEFT, folded into a plain model, and back
- `s3pet_nb.model.pet`: PET modules under the unified view: a change Delta, gated by z
- `s3pet_nb.model.select`: The modules that stay under a budget: by the highest probability, by the highest sum, or by dropping
- `s3pet_nb.model.space`: The candidates of a search, and a backbone that carries them all behind gates
- `s3pet_nb.model.structure`: What a search finds: a set of modules within the budget, where it came from, and what can be done with it
- `s3pet_nb.model.transfer`: The counterparts of a structure's modules on a backbone of another size or family, within a budget"""

__version__ = "0.1.0"

ROOMS = {  # names that can be imported from here, and the module that each one is read from when it is asked for
    "model.backbone": ("load_backbone", "tiny"),
    "model.budget": ("expected_size", "resolve_budget", "solve_zeta"),
    "model.gate": ("binary_concrete", "shifted_sigmoid"),
    "model.space": ("attach", "make_space"),
    "model.structure": ("Structure", "select"),
    "model.peft": ("merge", "to_peft"),
    "data.task": ("TASKS", "Task"),
    "data.batch": ("score", "scores"),
    "data.setup": ("Setup",),
    "learn.search": ("EarlyStop", "SearchConfig", "search"),
    "learn.train": ("BASELINES", "TrainConfig", "random_structure", "retrain"),
    "learn.prune": ("PruneConfig", "prune_search"),
    "learn.probe": ("probe",),
    "lab.store": ("Run",),
    "lab.live": ("Monitor",),
    "lab.explore": ("Explorer",),
    "lab.table": ("Table",),
}
__all__ = sorted(name for names in ROOMS.values() for name in names)


def __getattr__(name: str) -> object:
    "A public name, from its module, which is imported now."
    from importlib import import_module

    for room, names in ROOMS.items():
        if name in names:
            globals()[name] = getattr(import_module(f"s3pet_nb.{room}"), name)
            return globals()[name]
    raise AttributeError(f"module 's3pet_nb' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
