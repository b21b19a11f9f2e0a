"""Inner steps computed again on the way back: the same gradient to the bit, and memory that hardly grows with them."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bayesmeta as bm
from bayesmeta import errors
from tests.programs import TwoSites
from tests.test_fit import TASKS, same, state, train


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors alive at once that were made within, and how many operations made them."""

    def __enter__(self):
        self.live, self.peak, self.operations, self._sizes = 0, 0, 0, {}
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._sizes:
                storage = tensor.untyped_storage()
                self._sizes[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._drop, storage._cdata)
        return out

    def _drop(self, key):
        self.live -= self._sizes.pop(key, 0)


def network(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return bm.NeuralTaskModel(bm.nets.mlp(1, [16, 16], 1, activation="tanh"), bm.Gaussian(0.5), **options)


def anil(steps):
    return bm.ANIL(network(task_modules="all"), inner_steps=steps, inner_lr=0.01)


METHODS = {
    "maml": lambda k: bm.MAML(network(), inner_steps=k, inner_lr=0.01),
    "maml_joint_uniform": lambda k: bm.MAML(
        network(prior="normal"), inner_steps=k, inner_lr=0.01, objective="joint", step_weights="uniform"
    ),
    "meta_sgd": lambda k: bm.MetaSGD(network(), inner_steps=k, inner_lr=0.01),
    "anil": anil,
    "cavia": lambda k: bm.CAVIA(network(), inner_steps=k, inner_lr=0.1),
    "program": lambda k: bm.MAML(TwoSites(), inner_steps=k, inner_lr=0.01),
    "platipus": lambda k: bm.Platipus(network(), inner_steps=k, inner_lr=0.01),
    "abml": lambda k: bm.ABML(network(prior="normal"), inner_steps=k, inner_lr=0.001, num_particles=2),
    "abml_program": lambda k: bm.ABML(TwoSites(), inner_steps=k, inner_lr=1e-3, global_guide="normal"),
    "bmaml": lambda k: bm.BMAML(
        network(prior="normal"), inner_steps=k, inner_lr=0.01, objective="predictive", num_particles=3
    ),
}


def gradient(name, steps, recompute, shots=10, measure=False):
    """Gradients of the loss, or the peak of memory and the number of operations."""
    method = METHODS[name](steps)
    batch = TASKS.sample(3, support=shots, query=5, generator=0)
    method.prepare(batch)
    method.checkpoint_inner = recompute
    if not measure:
        method.loss(batch, generator=0).backward()
        return [p.grad for p in method.parameters() if p.grad is not None]
    with PeakMemory() as memory:
        method.loss(batch, generator=0).backward()
    return memory.peak, memory.operations


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_is_the_same(name):
    kept, again = gradient(name, 4, False), gradient(name, 4, True)
    assert len(kept) == len(again) > 0
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    fewer = gradient(name, 3, True)
    assert not all(torch.equal(a, b) for a, b in zip(kept, fewer, strict=True)), "control: another number of steps"


@pytest.mark.parametrize("name", ["maml", "abml", "bmaml", "platipus"])
def test_memory_hardly_grows_with_the_steps(name):
    few, many = (gradient(name, k, True, shots=400, measure=True) for k in (5, 20))
    kept_few, kept_many = (gradient(name, k, False, shots=400, measure=True) for k in (5, 20))
    assert many[0] < 1.2 * few[0]
    assert kept_many[0] > 2.0 * kept_few[0], "control: kept, it grows with them"
    assert many[0] < 0.25 * kept_many[0]
    assert many[1] < 2.5 * kept_many[1]


def test_fit_trains_the_same_method_and_leaves_it_as_it_was():
    kept, again = METHODS["maml"](3), METHODS["maml"](3)
    train(kept, 10)
    seen = []
    loss = again.loss
    again.loss = lambda *args, **options: (seen.append(again.checkpoint_inner), loss(*args, **options))[1]
    train(again, 10, checkpoint_inner=True)
    assert same(state(kept), state(again))
    assert seen[-10:] == [True] * 10
    assert not again.checkpoint_inner


def test_methods_without_inner_steps_are_refused():
    method = bm.BayesianLastLayer(network(task_modules="head"))
    with pytest.raises(errors.OptionError, match="BayesianLastLayer keeps none"):
        train(method, 5, checkpoint_inner=True)
    with pytest.raises(errors.OptionError, match="exclude each other"):
        train(METHODS["maml"](1), 5, checkpoint_inner=True, compile="inductor")
