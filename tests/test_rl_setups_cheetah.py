"""Half-cheetah's settings, on a runner of as many numbers that needs no MuJoCo."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import bayesmeta as bm
from bayesmeta.rl import setups_cheetah
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.setups import Setup
from bayesmeta.rl.setups_cheetah import FORWARD, PROBES, SCALES, ScaledState, kind_of, probes
from benchmarks import _cheetah_training
from tests.rl_cheetah import pretend, runners


@pytest.fixture(params=["direction", "velocity"])
def kind(request, monkeypatch):
    pretend(monkeypatch, request.param)
    return request.param


SMALL = {
    "rl2": {"tasks": 4, "units": 8}, "varibad": {"tasks": 4, "units": 8}, "maml": {"tasks": 2, "copies": 2},
    "pearl": {"tasks": 4, "units": 8},
}  # fmt: skip


@pytest.mark.parametrize("method", SMALL)
def test_all_learners_train_and_adapt(kind, method):
    setup = Setup(f"half-cheetah-{kind}", method, iterations=2, **SMALL[method]).filled()
    learner = setup.learner(setup.family())
    if method == "pearl":  # fewer, for the test's time
        learner.config = dataclasses.replace(learner.config, updates=2)
    before = {name: value.clone() for name, value in learner.policy.state_dict().items()}
    learner.train(1)
    after = learner.policy.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    curve = learner.curve(setup.held_out(setup.family(), 3, split="validation", seed=0))
    assert curve.returns.shape == (2, 3)
    assert torch.isfinite(curve.returns).all()


def test_settings_are_those_of_the_method_where_none_are_given():
    assert {*setups_cheetah.DIRECTION} == {*setups_cheetah.VELOCITY} == {"rl2", "varibad", "maml", "pearl"}
    filled = Setup("half-cheetah-direction", "rl2", units=16).filled()
    assert filled.units == 16
    assert filled.iterations == setups_cheetah.DIRECTION["rl2"].defaults["iterations"]
    # other methods have the settings that they have everywhere
    assert Setup("half-cheetah-direction", "cavia").filled().tasks == 20
    assert kind_of("half-cheetah-velocity") == "velocity"


def test_states_are_read_in_their_usual_units():
    states = torch.tensor(SCALES) * torch.tensor([[1.0], [-2.0], [30.0]])
    assert torch.allclose(ScaledState()(states), torch.tensor([[1.0], [-2.0], [10.0]]).expand(3, 17))
    assert ScaledState()(states.double()).dtype is torch.float64


def test_mamls_network_reads_scaled_states():
    setup = Setup("half-cheetah-direction", "maml", tasks=2, copies=2, units=8, seed=3).filled()
    policy = setups_cheetah._maml(setup, runners("direction"), "cpu").policy
    torch.manual_seed(3)
    network = bm.nets.mlp(17, [8, 8], 6, activation="tanh")
    torch.nn.init.zeros_(list(network.parameters())[-1])
    states = torch.randn(5, 1, 1, 17) * 4
    theta = policy.theta.detach()
    with torch.no_grad():
        found = policy.distribution(policy.begin(theta, 1), states, theta)
        expected = 0.01 * network(states / torch.tensor(SCALES))
    assert torch.allclose(found.mean, expected, atol=1e-6)
    assert not torch.allclose(found.mean, 0.01 * network(states), atol=1e-6)  # control
    assert torch.allclose(found.stddev, torch.tensor(setups_cheetah.STD))


@pytest.mark.parametrize("of", PROBES)
def test_probes_are_contexts_of_going_on_at_a_velocity(of):
    env = runners(of).vector(2)
    spec = ContextSpec.of(env, inputs=("state", "action", "successor"), encode=ScaledState(), encoded=17)
    state = torch.zeros(1, len(PROBES[of]), 17)
    state[0, :, FORWARD] = torch.tensor(PROBES[of])
    still, rewards = torch.zeros(1, len(PROBES[of]), 6), torch.zeros(1, len(PROBES[of]))
    assert torch.equal(spec.transitions(state, still, rewards, state).x[0], probes(of))
    other = state.roll(1, -1)  # control: another of the state's numbers
    assert not torch.equal(spec.transitions(other, still, rewards, other).x[0], probes(of))


class Exact:
    """A decoder whose latent is the task."""

    def __init__(self, spec, kind, sign=1.0):
        self.spec, self.kind, self.sign = spec, kind, sign

    def parameters(self):
        return iter([torch.zeros(1)])

    def distribution(self, z, x):
        velocity = x[..., self.spec.columns("successor")][..., FORWARD] * SCALES[FORWARD]
        reward = velocity * z if self.kind == "direction" else -(velocity - z).abs()
        return torch.distributions.Normal(self.sign * reward, 1.0)


@pytest.mark.parametrize("of", PROBES)
def test_beliefs_are_held_against_the_task(of):
    env = runners(of).vector(4)
    spec = ContextSpec.of(env, inputs=("state", "action", "successor"), encode=ScaledState(), encoded=17)
    tasks = torch.tensor([1.0, -1.0, 1.0] if of == "direction" else [0.02, 1.31, 2.0])
    believed = tasks.clone()
    believed[0] = -1.0 if of == "direction" else 0.5  # one belief is wrong
    found = _cheetah_training.belief_of(Exact(spec, of), spec, believed.unsqueeze(-1), tasks, of)
    if of == "direction":
        assert found.tolist() == [0.0, 1.0, 1.0]
    else:  # the velocities asked for are .05 m/s apart
        assert found.tolist() == pytest.approx([0.48, 0.01, 0.0], abs=1e-5)
    wrong = _cheetah_training.belief_of(Exact(spec, of, sign=-1.0), spec, believed.unsqueeze(-1), tasks, of)
    assert not torch.allclose(wrong, found)  # control


@pytest.mark.slow
def test_varibads_beliefs_find_the_direction(monkeypatch):
    pretend(monkeypatch, "direction")
    setup = Setup("half-cheetah-direction", "varibad", iterations=20, tasks=20, units=32).filled()
    learner = setup.learner(setup.family())
    held_out = setup.held_out(setup.family(), 40, split="validation", seed=5)
    learner.train(20)
    right = {n: np.mean(v) for n, v in _cheetah_training.beliefs_of(learner, held_out, "direction").items()}
    assert abs(right["0"] - 0.5) < 5 * 0.5 / math.sqrt(40)  # nothing is known: one answer for all
    assert right["5"] > 0.9
    curve = learner.curve(held_out).mean()
    assert curve[1] > 1.0  # standing still brings 0
