"""Ways to explore the grid: under the exact belief their returns are known by enumeration, under others by hand."""

import itertools

import pytest
import torch
from torch import nn

from bayesmeta.data import Observations
from bayesmeta.rl.envs import Grid
from bayesmeta.rl.off_policy.posterior_sampling import play
from bayesmeta.rl.trials import trial_returns
from bayesmeta.rl.varibad.setups import grid_varibad
from benchmarks import _grid_strategies as ways
from benchmarks._grid_strategies import STRATEGIES, Strategy, exact, explore, goals_env

SMALL, EPISODES = Grid(cells=3, horizon=4), 3
GOALS = [(0, 2), (1, 2), (2, 0), (2, 1), (2, 2)]


def simulated(chances, strategy, copies, *, family=SMALL, episodes=EPISODES, seed=0):
    env = goals_env(family, episodes, seed, copies)
    return explore(env, chances, strategy, ways.plain_spec(env), torch.Generator().manual_seed(seed))


# -- enumeration: plain dictionaries of probabilities, which share nothing with the code -----------------------------


def aims(goal, seen, learns):
    """Cells that ideal Thompson sampling aims at, and so does a random one of the likeliest: all are equally likely."""
    left = [goal] if goal in seen else [cell for cell in GOALS if cell not in seen]
    return left if learns else GOALS


def steps_towards(cell, aim):
    ways_on = []
    for axis in (0, 1):
        if cell[axis] != aim[axis]:
            nearer = list(cell)
            nearer[axis] += 1 if aim[axis] > cell[axis] else -1
            ways_on.append(tuple(nearer))
    return ways_on or [cell]


def enumerated(hold, learns=True):
    """Expected return of each episode of ideal Thompson sampling on the small grid, the mean over goals."""
    totals = [0.0] * EPISODES
    for goal in GOALS:
        known = {frozenset(): 1.0}
        for episode in range(EPISODES):
            now = {}
            for seen, p in known.items():
                for aim in (choices := aims(goal, seen, learns)):
                    key = ((0, 0), seen, aim)
                    now[key] = now.get(key, 0.0) + p / len(choices)
            for time in range(SMALL.horizon):
                after = {}
                for (cell, seen, aim), p in now.items():
                    anew = hold == "step" or (hold == "reached" and (cell in (aim, goal)))
                    choices = aims(goal, seen, learns) if anew and time else [aim]
                    for chosen in choices:
                        for to in (ways_on := steps_towards(cell, chosen)):
                            key = (to, seen | {to}, chosen)
                            after[key] = after.get(key, 0.0) + p / len(choices) / len(ways_on)
                now = after
                totals[episode] += sum(p * (1.0 if cell == goal else -0.1) for (cell, _, _), p in now.items())
            known = {}
            for (_, seen, _), p in now.items():
                known[seen] = known.get(seen, 0.0) + p
    return [total / len(GOALS) for total in totals]


@pytest.mark.parametrize(
    "name",
    [
        "posterior_sampling", "posterior_sampling_until_reached", "posterior_sampling_each_step", "prior",
        "mean", "mean_each_step",
    ],
)  # fmt: skip
def test_ideal_thompson_sampling_earns_what_enumeration_says(name):
    strategy = STRATEGIES[name]
    learns = name != "prior"
    returns = simulated(exact(SMALL, learns=learns), strategy, 2000)
    error = ways.sampling_error(returns)
    expected = torch.tensor(enumerated(strategy.hold, learns), dtype=torch.float64)
    assert ((returns.mean((0, 1)) - expected).abs() < 4.5 * error).all()
    assert (error < 0.02).all()
    # control: the other belief, and other moments to aim, are further away
    others = [enumerated(hold, learns) for hold in ("episode", "reached", "step") if hold != strategy.hold]
    for other in [enumerated(strategy.hold, not learns), *others]:
        assert ((returns.mean((0, 1)) - torch.tensor(other)).abs() > 4.5 * error).any()


def test_a_belief_that_never_learns_does_worse_and_gets_no_better():
    good = simulated(exact(SMALL), STRATEGIES["posterior_sampling"], 500)
    never = simulated(exact(SMALL, learns=False), STRATEGIES["prior"], 500)
    apart = (ways.sampling_error(good) ** 2 + ways.sampling_error(never) ** 2).sqrt()
    assert ((good - never).mean((0, 1)) > 5 * apart).tolist() == [False, True, True]
    gain = never.mean((0, 1))[2] - never.mean((0, 1))[0]
    assert abs(gain) < 5 * apart[0]


@pytest.mark.parametrize("hold", ["episode", "reached", "step"])
@pytest.mark.parametrize("cell", ["draw", "likeliest"])
def test_a_belief_that_is_sure_of_the_goal_earns_what_knowing_it_earns(cell, hold):
    family = Grid()
    index = (family.goals()[:, 0] * family.cells + family.goals()[:, 1]).long()
    known = nn.functional.one_hot(index, family.cells**2).float().repeat_interleave(3, 0)
    strategy = Strategy("posterior_sampling", cell, hold)
    returns = simulated(lambda context, episode, generator: known, strategy, 3, family=family, episodes=2)
    straight = 15 * -0.1 + 1.1 * (16 - family.goals().sum(-1)).double()
    torch.testing.assert_close(returns, straight[:, None, None].expand(-1, 3, 2), atol=1e-5, rtol=0)


def test_the_nearest_of_equal_cells_is_swept_in_a_known_order():
    family = Grid(cells=3, horizon=6)
    returns = simulated(exact(family), STRATEGIES["nearest_each_step"], 1, family=family, episodes=2).squeeze(1)
    # (0, 0) up to (0, 2), along to (2, 2), down to (2, 0): found after 2, 3, 6, 5, 4 steps in the order of GOALS
    first = [-0.6 + 1.1 * (7 - step) for step in (2, 3, 6, 5, 4)]
    second = [-0.6 + 1.1 * (7 - sum(goal)) for goal in GOALS]
    torch.testing.assert_close(returns, torch.tensor([first, second], dtype=torch.float64).T, atol=1e-5, rtol=0)
    # control: a random one of the equal cells sweeps nothing
    at_random = simulated(exact(family), STRATEGIES["mean_each_step"], 200, family=family, episodes=2)
    error = ways.sampling_error(at_random)[0]
    assert returns[:, 0].mean() - at_random.mean((0, 1))[0] > 5 * error


def test_of_equal_cells_each_is_taken_as_often_and_of_others_the_likeliest_alone():
    count, generator = 4000, torch.Generator().manual_seed(0)
    context = ways.plain_spec(goals_env(SMALL, EPISODES, 0)).empty(count, torch.zeros(()))
    chances = torch.tensor([0.0, 0.3, 0.0, 0.0, 0.05, 0.0, 0.0, 0.3, 0.35]).expand(count, -1)
    tied = torch.tensor([0.0, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.4, 0.2]).expand(count, -1)
    for name, says, expected in (
        ("mean", tied, {1: 0.5, 7: 0.5}), ("nearest_each_step", tied, {1: 1.0}), ("mean", chances, {8: 1.0}),
    ):  # fmt: skip
        infer = ways.aiming(lambda *_, says=says: says, STRATEGIES[name], SMALL)
        aim = infer(context, torch.zeros(count), generator)
        share = torch.nn.functional.one_hot((aim[:, 0] * 3 + aim[:, 1]).long(), 9).double().mean(0)
        assert set(share.nonzero().flatten().tolist()) == set(expected)
        for cell, chance in expected.items():
            assert abs(float(share[cell]) - chance) <= 5 * (chance * (1 - chance) / count) ** 0.5


def test_a_learned_belief_has_all_ways_but_the_rule_for_equals_and_an_exact_one_all_but_those_of_latents():
    assert set(ways.LEARNED) == set(STRATEGIES) - {"nearest_each_step"}
    assert set(ways.IDEAL) == set(STRATEGIES) - {"latent_draw", "latent_draw_each_step"}


def test_the_exact_belief_is_uniform_over_cells_not_entered_until_the_goal_is():
    entered = torch.tensor([[[0.0, 1], [0, 2]], [[2.0, 0], [2, 1]]])
    context = Observations(entered, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    found = exact(SMALL)(context, torch.zeros(2), torch.Generator())
    by_cell = found.unflatten(-1, (3, 3))
    assert by_cell[0].tolist() == [[0, 0, 0], [0, 0, 0.25], [0.25, 0.25, 0.25]]
    assert by_cell[1].tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]
    masked = Observations(entered, context.y, torch.zeros(2, 2, dtype=torch.bool))
    assert exact(SMALL)(masked, torch.zeros(2), torch.Generator())[:, 2].tolist() == pytest.approx([0.2, 0.2])


def test_a_walk_is_a_shortest_one_and_stays():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.tensor(list(itertools.product(range(3), repeat=4)), dtype=torch.float32)
    cell, aim = pairs.split(2, -1)
    for _ in range(5):
        action, log_prob = ways.walk(cell, aim, generator)
        both = ((aim - cell) != 0).all(-1)
        assert log_prob.exp().tolist() == pytest.approx([0.5 if b else 1.0 for b in both])
        before = (aim - cell).abs().sum(-1)
        cell = cell + torch.tensor(ways.MOVES, dtype=cell.dtype)[action]
        assert torch.equal((aim - cell).abs().sum(-1), (before - 1).clamp_min(0))
        assert (action[before == 0] == 0).all()
    assert torch.equal(cell, aim)
    # of two ways each is taken half of the time
    many = torch.zeros(4000, 2)
    action, _ = ways.walk(many, many + 1, generator)
    assert set(action.tolist()) == {1, 2}
    assert abs(float((action == 1).double().mean()) - 0.5) < 5 * 0.5 / 4000**0.5


class Says(nn.Module):
    """Cells' log-odds that do not depend on z."""

    def __init__(self, chances):
        super().__init__()
        self.chances = chances

    def forward(self, z):
        return self.chances.log().expand(*z.shape[:-1], -1)


def test_a_draw_of_the_latent_is_no_draw_of_the_cell_where_the_decoder_itself_is_unsure():
    family = SMALL
    run = grid_varibad(goals_env(family, EPISODES, 0), iterations=1)
    chances = torch.full((9,), 1e-9)
    chances[2], chances[8] = 0.6, 0.4
    run.decoder.network = Says(chances)
    spec, program = run.belief_spec, run.decoder.program()
    context = spec.empty(3000, torch.zeros(()))
    aimed = {}
    for name in ("posterior_sampling", "latent_draw", "mean", "prior"):
        strategy = STRATEGIES[name]
        belief = ways.learned(run.policy.latent, program, spec, family, strategy.latent)
        infer = ways.aiming(belief, strategy, family)
        cells = infer(context, torch.zeros(3000), torch.Generator().manual_seed(0))
        assert ((cells == torch.tensor([0.0, 2])).all(-1) | (cells == torch.tensor([2.0, 2])).all(-1)).all()
        aimed[name] = float((cells[:, 0] == 0).double().mean())
    assert aimed["latent_draw"] == aimed["mean"] == 1.0
    for name in ("posterior_sampling", "prior"):
        assert abs(aimed[name] - 0.6) < 5 * (0.24 / 3000) ** 0.5


def test_one_stands_in_the_corner_where_an_episode_begins_and_else_where_the_last_step_led():
    run = grid_varibad(goals_env(SMALL, EPISODES, 0), iterations=1)
    env = goals_env(SMALL, EPISODES, 0, 7)
    seen = []

    def infer(context, episode, generator):
        seen.append(ways.standing(context, SMALL))
        return torch.full((env.num_envs, 2), 2.0)

    for spec in (run.belief_spec, ways.plain_spec(env)):
        seen.clear()
        rollout = play(env, ways.walk, infer, spec, torch.Generator().manual_seed(1), each_step=True)
        assert torch.equal(torch.stack(seen), rollout.moments.observation)


# -- posterior sampling at every step ----------------------------------------------------------------------------------


def test_latents_are_inferred_at_every_step_from_all_steps_before_it():
    env = goals_env(SMALL, 2, 0)
    asked = []

    def infer(context, episode, generator):
        asked.append((context.shots, int(episode[0])))
        return torch.full((env.num_envs, 2), float(context.shots % 3))

    rollout = play(env, ways.walk, infer, ways.plain_spec(env), torch.Generator().manual_seed(0), each_step=True)
    assert asked == [(n, n // SMALL.horizon) for n in range(8)]
    assert rollout.reward.shape == (8, 5)
    asked.clear()
    usual = play(env, ways.walk, infer, ways.plain_spec(env), torch.Generator().manual_seed(0))
    assert asked == [(0, 0), (4, 1)]
    assert usual.reward.shape == (8, 5)
    assert trial_returns(usual, 2).lengths.tolist() == [[4.0, 4.0]] * 5


def test_the_sampling_error_is_that_of_repeated_simulations():
    returns = [simulated(exact(SMALL), STRATEGIES["posterior_sampling"], 20, seed=seed) for seed in range(60)]
    told = torch.stack([ways.sampling_error(r) for r in returns]).mean(0)
    found = torch.stack([r.mean((0, 1)) for r in returns]).std(0)
    # the standard deviation of 60 means is known to 9%
    assert ((found[:2] / told[:2] - 1).abs() < 0.4).all()
