"""Reference policies: the policy of a trial is asked as long as a trial is running, and no longer."""

import pytest
import torch

from bayesmeta.ops.random import as_generator
from bayesmeta.rl import reference_policies
from bayesmeta.rl.baselines import bandits, mdps
from bayesmeta.rl.envs import (
    BeamSteering,
    BernoulliBandit,
    GaussianBandit,
    Grid,
    Machines,
    Navigation,
    SparsePointRobot,
    TabularMDP,
)
from bayesmeta.rl.envs.vector import TensorVectorEnv
from bayesmeta.rl.learner import AdaptationCurve
from bayesmeta.rl.oracles.beam import box_least_squares_actions, inverse_response_actions
from bayesmeta.rl.rollout import Acted, collect
from bayesmeta.rl.trials import trial_returns

FAMILY = BeamSteering(Machines.built_in(20), horizon=40)


def counted(monkeypatch, name):
    """How often an oracle is asked."""
    real, asked = getattr(reference_policies, name), []

    def ask(*arguments):
        asked.append(1)
        return real(*arguments)

    monkeypatch.setattr(reference_policies, name, ask)
    return asked


@pytest.mark.parametrize("episodes", [1, 3])
def test_beam_oracles_are_played_to_the_end_of_all_trials_and_no_further(monkeypatch, episodes):
    """Against rollouts of the most steps that trials can have, in which the oracles are asked in each."""
    asked = {name: counted(monkeypatch, name) for name in ("box_least_squares_actions", "inverse_response_actions")}
    tasks = FAMILY.sample_tasks(6, generator=1, split="test")
    found = {r.name: r.curve for r in reference_policies.references(FAMILY, tasks, episodes, seed=2)}
    for name, rule, times in (
        ("least squares in the limits", box_least_squares_actions, asked["box_least_squares_actions"]),
        ("inverse response", inverse_response_actions, asked["inverse_response_actions"]),
    ):
        env = TensorVectorEnv(FAMILY, 6, tasks=tasks, episodes_per_trial=episodes, generator=2)

        def actor(moment, state, generator, rule=rule):
            return Acted(rule(tasks.response, moment.observation), torch.zeros(6))

        rollout = collect(env, actor, FAMILY.horizon * episodes, generator=torch.Generator(), keep=("success",))
        whole = trial_returns(rollout, episodes)
        torch.testing.assert_close(found[name].returns, whole.episodes.T)
        assert torch.equal(found[name].lengths, whole.lengths.T)
        assert torch.equal(found[name].success, whole.extra["success"].T)
        assert len(times) == int(whole.lengths.sum(1).max())  # the steps of the longest trial
        assert len(times) < FAMILY.horizon * episodes / 3


def test_mdp_references_plan_at_each_step_where_they_say_so():
    """They are the stronger ones: those with the published table's settings (the controls) earn less on the same
    MDPs."""
    family = TabularMDP()
    tasks = family.sample_tasks(150, generator=3)
    found = {r.name: r.curve.returns.sum(0) for r in reference_policies.references(family, tasks, 10, seed=4)}
    tuned = {"BEB, planned at each step": mdps.BEB(), "greedy, planned at each step": mdps.GreedyMDP()}
    for name, weaker in tuned.items():
        table = mdps.play_mdps(weaker, family, tasks, episodes=10, prior_mean=0.0, generator=4).sum(0)
        gain = found[name] - table
        assert float(gain.mean()) > 3 * float(gain.std()) / 150**0.5
        assert (found[name].mean() < found["value iteration"].mean()).item()


def test_trials_of_a_fixed_length_are_played_in_full():
    goals = Navigation(horizon=5).sample_tasks(4, generator=0)
    found = {r.name: r.curve for r in reference_policies.references(Navigation(horizon=5), goals, 2)}
    still = -5 * goals.goal.square().sum(-1)
    torch.testing.assert_close(found["standing still"].returns, still.expand(2, -1))
    assert (found["random"].returns != found["standing still"].returns).all()


def drift(reference):
    """Last less first episode, in standard errors over tasks; 0 where nothing differs."""
    change = reference.curve.returns[-1] - reference.curve.returns[0]
    error = float(change.std()) / len(change) ** 0.5
    return 0.0 if error == 0 and float(change.abs().max()) < 1e-5 else float(change.mean()) / error


@pytest.mark.parametrize(
    ("family", "knowing", "optima", "learning"),
    [
        (
            BernoulliBandit(arms=3, horizon=4),
            {"best arm"},
            {"best arm", "Bayes-optimal"},
            {"Bayes-optimal", "Gittins", "Thompson sampling", "optimistic Thompson sampling", "UCB1", "greedy"},
        ),
        (
            GaussianBandit(arms=3, horizon=4),
            {"best arm"},
            {"best arm"},
            {"Thompson sampling", "optimistic Thompson sampling", "UCB1", "greedy"},
        ),
        (
            Navigation(horizon=4),
            {"straight to the goal"},
            {"straight to the goal"},
            set(),
        ),
        (
            SparsePointRobot(),
            {"straight to the goal"},
            {"straight to the goal"},
            {"ideal Thompson sampling"},
        ),
        (
            Grid(),
            {"straight to the goal"},
            {"straight to the goal", "Bayes-optimal"},
            {"Bayes-optimal"},
        ),
        (FAMILY, {"least squares in the limits", "inverse response"}, set(), set()),
    ],
    ids=lambda family: getattr(family, "name", ""),
)
def test_references_say_what_they_know_and_whether_they_learn(family, knowing, optima, learning):
    """Those that learn gain from the first episode to the third; the others return the same, up to noise."""
    tasks = family.sample_tasks(300, generator=1, split="test")
    found = reference_policies.references(family, tasks, 3, seed=2)
    assert {r.name for r in found if r.knows_task} == knowing
    assert {r.name for r in found if r.optimum} == optima
    assert {r.name for r in found if r.learns} == learning
    for reference in found:
        gain = drift(reference) if len(reference.curve.returns) > 1 else 0.0
        if reference.learns and len(reference.curve.returns) > 1:
            gains = reference.curve.returns[-1].mean() > reference.curve.returns[0].mean()
            assert bool(gains) if gain == 0 else gain > 3, (reference.name, gain)
        else:
            assert abs(gain) < 4, (reference.name, gain)
        if reference.knows_task and reference.optimum:  # nobody is above it
            highest = max(float(other.curve.returns.mean()) for other in found)
            assert reference.curve.mean()[0] == pytest.approx(highest, rel=1e-5)


def test_bandit_baselines_go_on_with_what_they_know():
    """In the second of two episodes they earn what pulls 5 to 8 of one longer episode do; in the first what pulls 1 to
    4 do. Fresh ones (the control) would earn the same in both."""
    family, long = BernoulliBandit(arms=3, horizon=4), BernoulliBandit(arms=3, horizon=8)
    tasks = family.sample_tasks(500, generator=1)
    found = {r.name: r for r in reference_policies.references(family, tasks, 2, seed=2)}
    rewards = bandits.play_bandits(bandits.Gittins(), long, tasks, generator=as_generator(2, "cpu", "references"))
    torch.testing.assert_close(found["Gittins"].curve.returns, torch.stack([rewards[:4].sum(0), rewards[4:].sum(0)]))
    assert drift(found["Gittins"]) > 3
    assert len(found["Bayes-optimal"].curve.returns) == 1  # of a trial of one episode


def test_labels_say_what_a_reference_has_over_a_learner():
    curve = AdaptationCurve(torch.zeros(1, 2), "episode")
    for options, label in (
        ({"knows_task": True, "optimum": True}, "x (knows the task)"),
        ({"knows_task": True}, "x (knows the task)"),
        ({"optimum": True, "learns": True}, "x (best without knowing the task)"),
        ({"learns": True}, "x"),
        ({}, "x"),
    ):
        assert reference_policies.Reference("x", curve, **options).label == label
