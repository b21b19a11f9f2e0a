"""Reference policies: the policy of a trial is asked as long as a trial is running, and no longer."""

import pytest
import torch

from bayesmeta.rl import reference_policies
from bayesmeta.rl.baselines import mdps
from bayesmeta.rl.envs import BeamSteering, Machines, Navigation, TabularMDP
from bayesmeta.rl.envs.vector import TensorVectorEnv
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
