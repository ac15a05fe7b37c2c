"What happens to a training in a test: it is watched from outside, killed, or stopped by hand."
from s3pet_nb.learn.learner import Callback
from s3pet_nb.learn.prune import flat
from s3pet_nb.learn.train import TrainStep


class Watch:
    "Stores weights and gradients of the modules at every step, as the step computes them, before it moves."

    def __init__(self, monkeypatch, of: type[TrainStep] = TrainStep):
        self.thetas, self.grads = [], []
        gradients = TrainStep.gradients

        def stored(step, batches):
            grads, loss = gradients(step, batches)
            if isinstance(step, of):
                pets = [weight for name, weight in step.weights.items() if not name.startswith("head.")]
                self.thetas.append(flat(pets).double())
                self.grads.append(flat(grads[:len(pets)]).double())
            return grads, loss

        monkeypatch.setattr(TrainStep, "gradients", stored)


class Killed(Exception):
    "What a run dies of."


class Kill(Callback):
    "Ends the run the hard way after so many steps of all phases; remembers nothing, so it may be missing later."

    def __init__(self, at: int):
        self.left = at

    def after_step(self, learner):
        self.left -= 1
        if not self.left:
            raise Killed


class Stop(Callback):
    "Stops each phase after so many steps, as a hand would."

    def __init__(self, at: int):
        self.at = at

    def after_step(self, learner):
        learner.stop = learner.step >= self.at
