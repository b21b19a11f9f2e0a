"""Oracles: what the best policies reach, against enumeration by other means and against published figures."""

import itertools

import pytest
import torch

from bayesmeta import errors
from bayesmeta.rl import envs
from bayesmeta.rl.envs.grid import MOVES
from bayesmeta.rl.oracles.bandits import bayes_optimal_bandit_value, finite_horizon_indices, gittins_indices
from bayesmeta.rl.oracles.grid import bayes_optimal_grid
from bayesmeta.rl.oracles.mdps import discounted_values, finite_horizon_values, policy_values

# -- bandits --------------------------------------------------------------------------------------------------------


def value_by_recursion(counts, left):
    """The same value with ordered arms and no dynamic programme."""
    if left == 0:
        return 0.0
    options = []
    for arm, (won, lost) in enumerate(counts):
        mean = (won + 1) / (won + lost + 2)
        after = [list(counts) for _ in range(2)]
        after[0][arm], after[1][arm] = (won + 1, lost), (won, lost + 1)
        options.append(
            mean * (1 + value_by_recursion(after[0], left - 1)) + (1 - mean) * value_by_recursion(after[1], left - 1)
        )
    return max(options)


@pytest.mark.parametrize(("arms", "horizon"), [(1, 3), (2, 5), (3, 4), (5, 3)])
def test_bandit_value_equals_recursion_over_ordered_counts(arms, horizon):
    expected = value_by_recursion([(0, 0)] * arms, horizon)
    assert bayes_optimal_bandit_value(arms, horizon) == pytest.approx(expected, abs=1e-12)
    if arms == 2:  # the control: one arm fewer is worth less
        assert bayes_optimal_bandit_value(1, horizon) < expected - 0.1


@pytest.mark.parametrize(("arms", "value"), [(2, 6.0218), (5, 6.6600), (10, 6.7140), (50, 6.7140)])
def test_bandit_values_of_ten_pulls(arms, value):
    assert bayes_optimal_bandit_value(arms, 10) == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize(
    ("discount", "indices"),
    [(0.9, (0.7029, 0.6346, 0.6010)), (0.95, (0.7614, 0.6810, 0.6392)), (0.99, (0.8699, 0.7844, 0.7308))],
)
def test_gittins_indices_are_the_published_ones(discount, indices):
    table = gittins_indices(discount, 4)
    assert [float(table[i, i]) for i in range(3)] == pytest.approx(indices, abs=1e-4)


def test_gittins_index_is_where_one_is_indifferent():
    """Bisection on one state with its own recursion, at a truncation short enough to enumerate."""
    discount, truncation = 0.8, 7

    def going_on(won, lost, known, left):
        mean = (won + 1) / (won + lost + 2)
        if left == 0:  # an arm this well known is taken at its mean
            return mean / (1 - discount)
        best = [max(known / (1 - discount), going_on(won + a, lost + b, known, left - 1)) for a, b in ((1, 0), (0, 1))]
        return mean * (1 + discount * best[0]) + (1 - mean) * discount * best[1]

    table = gittins_indices(discount, 3, truncation=truncation, grid=4001)
    for won, lost in ((0, 0), (2, 1), (0, 3)):
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            left = truncation + 1 - won - lost
            low, high = (middle, high) if going_on(won, lost, middle, left) > middle / (1 - discount) else (low, middle)
        assert float(table[won, lost]) == pytest.approx(low, abs=1e-6)
    assert bool(table[2, 2].isnan())


def test_indices_of_few_pulls_by_hand():
    """One pull left: the mean. Two left, nothing known: 2λ = ½(1 + ⅔) + ½λ, so λ = 5/9."""
    table = finite_horizon_indices(6)
    assert float(table[1, 2, 1]) == pytest.approx(3 / 5, abs=1e-9)
    assert float(table[2, 0, 0]) == pytest.approx(5 / 9, abs=1e-9)
    assert bool((table[1:, 0, 0].diff() > 0).all())  # the longer, the more it is worth to know an arm
    assert bool(table[6, 1, 0].isnan())


# -- MDPs -----------------------------------------------------------------------------------------------------------


def random_mdp(states, actions, seed=0):
    tasks = envs.TabularMDP(states=states, actions=actions).sample_tasks(3, generator=seed).to(dtype=torch.float64)
    return tasks.reward, tasks.transition


def test_finite_horizon_values_equal_the_best_of_all_policies():
    reward, transition = random_mdp(2, 2)
    values, actions = finite_horizon_values(reward, transition, 3)
    choices = torch.tensor(list(itertools.product(range(2), repeat=6))).view(-1, 3, 2)  # [policies, steps, states]
    policies = torch.nn.functional.one_hot(choices, 2).double()
    each = torch.stack([policy_values(reward, transition, p[:, None].expand(3, 3, 2, 2))[0] for p in policies])
    assert torch.allclose(values[0], each.amax(0), atol=1e-12)
    best = torch.nn.functional.one_hot(actions, 2).double()
    assert torch.allclose(policy_values(reward, transition, best), values, atol=1e-12)
    assert not torch.allclose(policy_values(reward, transition, 1 - best)[0], values[0], atol=1e-3)


def test_discounted_values_solve_their_equation():
    reward, transition = random_mdp(5, 3)
    values, actions = discounted_values(reward, transition, 0.9, tolerance=1e-10)
    at = actions[..., None]
    chosen = transition.gather(-2, at[..., None].expand(*at.shape, 5)).squeeze(-2)
    exact = torch.linalg.solve(torch.eye(5, dtype=torch.float64) - 0.9 * chosen, reward.gather(-1, at))
    assert torch.allclose(values, exact.squeeze(-1), atol=1e-9)
    every = reward + 0.9 * (transition @ values[:, None, :, None]).squeeze(-1)
    assert torch.allclose(every.amax(-1), values, atol=1e-9)


def test_the_optimum_of_random_mdps():
    """21.85 ± .04 an episode of 10 steps; five standard errors of both."""
    tasks = envs.TabularMDP().sample_tasks(2000, generator=0)
    values = finite_horizon_values(tasks.reward, tasks.transition, 10)[0][0, :, 0]
    error = (float(values.std() ** 2) / 2000 + 0.04**2) ** 0.5
    assert abs(float(values.mean()) - 21.85) < 5 * error


def test_the_optimal_policy_earns_its_value():
    """In the environment itself."""
    family = envs.TabularMDP()
    tasks = family.sample_tasks(20, generator=1)
    values, actions = finite_horizon_values(tasks.reward, tasks.transition, 10)
    env = family.vector(20, copies=500, tasks=tasks, generator=2)
    state, _ = env.reset()
    total = torch.zeros(10_000)
    for step in range(10):
        chosen = actions[step].repeat_interleave(500, 0).gather(1, state[:, None]).squeeze(1)
        state, reward, *_ = env.step(chosen)
        total += reward
    per_task = total.view(20, 500)
    error = per_task.std(-1) / 500**0.5
    assert bool(((per_task.mean(-1) - values[0, :, 0]).abs() < 5 * error).all())


# -- the grid -------------------------------------------------------------------------------------------------------


def grid_by_enumeration(family):
    """Best value of two episodes on a small grid, over all pairs of walks."""
    goals = family.goals().long().tolist()
    rows = []
    for walk in itertools.product(MOVES, repeat=family.horizon):
        cell, first = (0, 0), [0] * len(goals)
        for time, (right, up) in enumerate(walk):
            cell = tuple(min(max(x + d, 0), family.cells - 1) for x, d in zip(cell, (right, up)))
            for index, goal in enumerate(goals):
                if list(cell) == goal and not first[index]:
                    first[index] = family.horizon - time  # steps on the goal, staying there
        rows.append(first)
    steps = torch.tensor(rows).unique(dim=0).double()
    straight = torch.tensor([family.horizon - sum(goal) + 1.0 for goal in goals], dtype=torch.float64)
    found = steps > 0
    both = torch.where(found[:, None], steps[:, None] + straight, steps[None])
    gain = family.goal_reward - family.other_reward
    return float(2 * family.horizon * family.other_reward + gain * both.mean(-1).max())


@pytest.mark.parametrize("horizon", [4, 5, 6])
def test_the_grids_value_equals_enumeration_of_all_walks(horizon):
    family = envs.Grid(cells=3, horizon=horizon)
    assert bayes_optimal_grid(family, 2).value == pytest.approx(grid_by_enumeration(family), abs=1e-12)


def test_the_grids_best_policy_earns_its_value():
    """Walks until the goal is found and goes straight to it afterwards, on all 21 goals, in the environment."""
    optimum = bayes_optimal_grid(None, 4)
    family = envs.Grid()
    env = family.vector(21, tasks=envs.grid.CellTasks(family.goals()), episodes_per_trial=4)
    at, _ = env.reset()
    known, totals = torch.zeros(21, dtype=torch.bool), []
    for episode in range(4):
        total = torch.zeros(21)
        for step in range(15):
            away = env.tasks.goal - at
            right, up = away[:, 0].sign().long(), away[:, 1].sign().long()
            straight = torch.where(
                right != 0, torch.where(right > 0, 2, 4), torch.where(up > 0, 1, torch.where(up < 0, 3, 0))
            )
            walk = optimum.walks[episode]
            actions = torch.where(known, straight, walk[step] if walk else 0)
            assert walk or bool(known.all())
            at, reward, *_ = env.step(actions)
            known |= reward > 0
            total += reward
        totals.append(float(total.mean()))
    assert totals == pytest.approx(optimum.by_episode, abs=1e-5)
    assert sum(optimum.by_episode) == pytest.approx(optimum.value)
    # By hand: 14 goals seen at steps 2 … 15 of the first episode leave 14 + 13 + … + 1 = 105 steps on them.
    assert optimum.by_episode[0] == pytest.approx(-1.5 + 1.1 * 105 / 21)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bayes_optimal_bandit_value(0, 3), errors.OptionError, "arms=0"),
        (lambda: gittins_indices(1.0, 3), errors.OptionError, "discount=1.0"),
        (lambda: gittins_indices(0.9, 3, truncation=2), errors.OptionError, "truncation"),
        (lambda: finite_horizon_indices(0), errors.OptionError, "horizon=0"),
        (lambda: bayes_optimal_grid(envs.Grid(horizon=7)), errors.OptionError, "further away than the 7 steps"),
        (lambda: bayes_optimal_grid(envs.Grid(goal_reward=-1.0)), errors.OptionError, "nothing to look for"),
        (lambda: discounted_values(*random_mdp(2, 2), 1.0), errors.OptionError, "discount=1.0"),
        (lambda: discounted_values(*random_mdp(2, 2), 0.9, max_steps=3), errors.OptionError, "after 3 iterations"),
        (lambda: finite_horizon_values(torch.zeros(2, 2), torch.zeros(2, 2), 3), errors.ShapeError, "transitions"),
        (
            lambda: finite_horizon_values(torch.zeros(2, 2), torch.ones(2, 2, 2), 3),
            errors.NonFiniteDataError,
            "sum to 1",
        ),
        (
            lambda: finite_horizon_values(torch.full((2, 2), float("nan")), torch.ones(2, 2, 2) / 2, 3),
            errors.NonFiniteDataError,
            "NaN",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
