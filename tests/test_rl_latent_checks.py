"""Checks of beliefs where the truth has a meaning: exact beliefs pass, wrong ones do not."""

import math

import pytest
import torch
from torch import nn

import bayesmeta as bm
from bayesmeta import errors
from bayesmeta.models.likelihoods import Bernoulli
from bayesmeta.ops.random import as_generator
from bayesmeta.rl.latent import checks
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.decoder import TransitionDecoder
from bayesmeta.rl.rollout import collect
from tests import rl_latent_truth as truth

ARMS, TASKS = 4, 200


# -- a bandit's arms ------------------------------------------------------------------------------------------------


def bernoulli(tasks=TASKS, horizon=12, seed=0):
    """True means, the spec and a context of uniform pulls."""
    env = bm.rl.TensorVectorEnv(
        bm.rl.BernoulliBandit(arms=ARMS, horizon=horizon), tasks, generator=seed, dtype=torch.float64
    )
    spec = ContextSpec.of(env, inputs=("state", "action"), reward_shift=0.5, reward_scale=0.5)
    rollout = collect(env, truth.Uniform(ARMS), horizon, generator=as_generator(seed, stream="pulls"))
    return env.tasks.mean, spec, spec.of_rollout(rollout), rollout


def beta_draws(won, lost, n=2000, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.distributions.Beta(1.0 + won, 1.0 + lost).sample((n,))


def test_arms_are_counted():
    _, spec, context, rollout = bernoulli(tasks=20)
    won, lost = checks.arm_counts(spec, context)
    for task in range(20):
        for arm in range(ARMS):
            rewards = [r for a, r in zip(rollout.action[:, task], rollout.reward[:, task], strict=True) if a == arm]
            assert (won[task, arm], lost[task, arm]) == (sum(rewards), len(rewards) - sum(rewards))
    half = bm.Observations(context.x, context.y, torch.arange(12).expand(20, -1) < 5)
    assert (sum(checks.arm_counts(spec, half)).sum(-1) == 5).all()


def test_exact_beliefs_about_arms():
    means, spec, context, _ = bernoulli()
    won, lost = checks.arm_counts(spec, context)
    found = checks.compare_arms(beta_draws(won, lost), won, lost, means)
    # W₁ of n draws is at most about sd / √n on average
    assert found.distance.max() < 4.5 * 0.29 / math.sqrt(2000)
    assert found.distance.mean() < 0.1 * found.prior_distance.mean()
    assert found.bias.abs().max() < 4.5 * 0.29 / math.sqrt(2000)
    assert (found.spread - 1).abs().max() < 0.12
    for level, figure in found.coverage.items():
        assert abs(figure.mean - level) < 4.5 * figure.error


def test_wrong_beliefs_about_arms():
    means, spec, context, _ = bernoulli()
    won, lost = checks.arm_counts(spec, context)
    draws = beta_draws(won, lost)
    moved = checks.compare_arms(draws + 0.1, won, lost, means)
    assert ((moved.distance - 0.1).abs() < 4.5 * 0.29 / math.sqrt(2000)).all()  # that is what W₁ of a shift is
    assert ((moved.bias - 0.1).abs() < 4.5 * 0.29 / math.sqrt(2000)).all()
    narrow = draws.mean(0) + 0.3 * (draws - draws.mean(0))
    found = checks.compare_arms(narrow, won, lost, means)
    assert abs(found.spread.mean() - 0.3) < 0.01
    assert found.coverage[0.9].mean < 0.9 - 4.5 * found.coverage[0.9].error
    nothing = checks.compare_arms(torch.rand(2000, TASKS, ARMS, generator=as_generator(1)).double(), won, lost)
    assert (nothing.distance - nothing.prior_distance).abs().max() < 4.5 * 0.29 / math.sqrt(2000)
    assert nothing.coverage == {}
    assert "distance from Beta" in str(found)


class _Logits(nn.Module):
    """The log-odds of a win are z's own entry of the arm; states do not matter."""

    def forward(self, row):
        arm, z = row[..., 1 : 1 + ARMS], row[..., 1 + ARMS :]
        return (arm * z).sum(-1, keepdim=True)


def test_means_of_arms_come_through_the_decoder():
    spec = ContextSpec.of(
        bm.rl.TensorVectorEnv(bm.rl.BernoulliBandit(arms=ARMS), 1, generator=0), inputs=("state", "action"), binary=True
    )
    decoder = TransitionDecoder(spec, ARMS, Bernoulli(), network=_Logits(), dtype=torch.float64)
    z = torch.randn(5, 3, ARMS, generator=as_generator(0), dtype=torch.float64)
    found = checks.expected_reward(decoder.program(), spec, z, checks.arm_rows(spec, z))
    torch.testing.assert_close(found, z.sigmoid())


def test_expected_rewards_are_in_the_environments_units():
    spec = truth.a_spec(reward_shift=3.0, reward_scale=2.0)
    decoder = TransitionDecoder(spec, 3, bm.Gaussian(1.0), network=truth.Pulled(), dtype=torch.float64)
    z = torch.tensor([[[1.0, 2.0, 3.0]]], dtype=torch.float64)
    found = checks.expected_reward(decoder.program(), spec, z, checks.arm_rows(spec, z))
    torch.testing.assert_close(found, z * 2.0 + 3.0)


@pytest.mark.slow
def test_a_trained_belief_about_arms_is_near_beta():
    """By the ELBO alone, from contexts of all lengths, on training tasks; the first weights are the control."""
    from bayesmeta.rl.latent.contexts import prefix
    from bayesmeta.rl.latent.core import LatentContext

    def pulls(seed, tasks=128, split="train"):
        env = bm.rl.TensorVectorEnv(bm.rl.BernoulliBandit(arms=3, horizon=20), tasks, generator=seed, split=split)
        rollout = collect(env, truth.Uniform(3), 20, generator=as_generator(seed, stream="pulls"))
        spec = ContextSpec.of(env, inputs=("action",), binary=True)
        return env.tasks.mean, spec, spec.of_rollout(rollout)

    means, spec, held_out = pulls(5, 300, "validation")
    latent, decoder = LatentContext.make(spec, 3, "product"), TransitionDecoder(spec, 3, hidden=(32, 32))

    def distances():
        out = []
        for steps in (5, 20):
            part = prefix(held_out, steps)
            z = latent.sample(latent.posterior(part), 1000, 1).detach()
            draws = checks.expected_reward(decoder.program(), spec, z, checks.arm_rows(spec, z))
            found = checks.compare_arms(draws, *checks.arm_counts(spec, part), means)
            out.append(found.distance.mean() / found.prior_distance.mean())
        return out

    assert min(distances()) > 0.5
    optimizer = torch.optim.Adam([*latent.parameters(), *decoder.parameters()], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    generator = as_generator(0)
    for seed in range(1500):  # with less, or a higher rate, one of the arms was not learned
        _, _, context = pulls(seed + 1)
        part = prefix(context, torch.randint(1, 21, (128,), generator=generator))
        loss = -latent.elbo(decoder.program(), part, num_samples=4, generator=generator).value.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert max(distances()) < 0.25


# -- a grid's goal --------------------------------------------------------------------------------------------------


def walks(tasks=150, seed=0):
    """Uniform walks: what was entered at each step, the goals' cells, and the rollout."""
    family = bm.rl.Grid()
    env = bm.rl.TensorVectorEnv(family, tasks, generator=seed, dtype=torch.float64)
    rollout = collect(env, truth.Uniform(5), 15, generator=as_generator(seed, stream="walks"))
    goal = (env.tasks.goal[:, 0] * 5 + env.tasks.goal[:, 1]).long()
    return family, checks.seen_cells(rollout.successor, family), goal, rollout


def exact_goals(seen, goal, admissible):
    """Cell by cell."""
    out = torch.zeros(seen.shape, dtype=torch.float64)
    for step in range(seen.shape[0]):
        for task in range(seen.shape[1]):
            if seen[step, task, goal[task]]:
                out[step, task, goal[task]] = 1.0
            else:
                left = [c for c in range(25) if admissible[c] and not seen[step, task, c]]
                out[step, task, left] = 1.0 / len(left)
    return out


def test_what_was_seen_is_what_the_rewards_say():
    _, seen, goal, rollout = walks()
    reached = (rollout.reward > 0).cumsum(0) > 0
    at_goal = seen.gather(-1, goal.expand(16, -1).unsqueeze(-1)).squeeze(-1)
    assert torch.equal(at_goal[1:], reached)
    assert not seen[0].any()
    assert (seen.sum(-1).diff(dim=0) <= 1).all()


def test_exact_beliefs_about_goals():
    family, seen, goal, _ = walks()
    admissible = checks.admissible_cells(family)
    assert admissible.sum() == 21
    assert not admissible[[0, 1, 5, 6]].any()
    exact = exact_goals(seen, goal, admissible)
    found = checks.compare_goals(exact, seen, goal, admissible)
    assert found.seen_share.mean == 0.0
    assert found.distance.mean < 1e-12
    assert found.mass.mean == pytest.approx(1.0, abs=1e-12)
    assert found.log_score.mean == pytest.approx(found.exact_log_score.mean, abs=1e-12)
    start = checks.compare_goals(exact[0], seen[0], goal, admissible)
    assert start.log_score.mean == pytest.approx(-math.log(21), abs=1e-12)
    assert start.ece < 1e-12  # all cells stand in one bin, of which a share of 1 / 25 are goals, as was said
    assert found.ece < 0.01


def test_a_search_is_judged_by_itself():
    family, seen, goal, _ = walks()
    admissible = checks.admissible_cells(family)
    exact = exact_goals(seen, goal, admissible)
    assert checks.compare_goals(exact, seen, goal, admissible, searching=True).distance.mean < 1e-12
    here = torch.nn.functional.one_hot(goal, 25).bool()
    found = (seen & here).any(-1)
    # knows the goal once it was found, and before that looks where it has been already
    empty = seen & ~here
    backward = torch.where(empty.any(-1, keepdim=True), empty.double(), admissible.double().expand(empty.shape))
    backward = torch.where(found.unsqueeze(-1), here.double(), backward / backward.sum(-1, keepdim=True))
    told = checks.compare_goals(backward, seen, goal, admissible, searching=True)
    each = [empty[~found[:, t], t].any(-1).double().mean() for t in range(len(goal))]
    assert told.seen_share.mean == pytest.approx(torch.stack(each).mean().item(), abs=1e-12)
    assert told.seen_share.mean > checks.compare_goals(backward, seen, goal, admissible).seen_share.mean
    with pytest.raises(errors.EmptyTaskError, match="found before"):
        checks.compare_goals(here.double(), here, goal, admissible, searching=True)


def test_an_ignorant_belief_is_calibrated_and_loses_log_score():
    """Every goal is searched on one sweep from the far corner on, by a belief that forgets where it has been."""
    admissible = checks.admissible_cells(bm.rl.Grid())
    goal = admissible.nonzero().squeeze(-1)
    seen = (torch.arange(25) >= 25 - torch.arange(26)[:, None]).unsqueeze(1).expand(26, 21, 25)
    here = torch.nn.functional.one_hot(goal, 25).bool()
    found = (seen & here).any(-1, keepdim=True)
    ignorant = torch.where(found, here.double(), admissible.double() / 21)
    told = checks.compare_goals(ignorant, seen, goal, admissible, searching=True)
    assert told.ece < 1e-12
    # before the k-th cell is entered, the exact belief has the goal among those left
    lost = [
        sum(math.log(21 / (21 - int((seen[k, t] & admissible).sum()))) for k in range(25 - cell)) / (25 - cell)
        for t, cell in enumerate(goal.tolist())
    ]
    assert sum(lost) / 21 > 0.3
    assert told.exact_log_score.mean - told.log_score.mean == pytest.approx(sum(lost) / 21, abs=1e-12)
    assert told.seen_share.mean > 0.2
    exact = checks.compare_goals(exact_goals(seen, goal, admissible), seen, goal, admissible, searching=True)
    assert exact.ece < 0.1  # control: no better by this figure, though nothing is lost
    assert exact.seen_share.mean == 0.0


def test_wrong_beliefs_about_goals():
    family, seen, goal, _ = walks()
    admissible = checks.admissible_cells(family)
    exact = exact_goals(seen, goal, admissible)
    forgetful = torch.full_like(exact, 1.0 / 25)
    found = checks.compare_goals(forgetful[-1], seen[-1], goal, admissible)
    here = torch.nn.functional.one_hot(goal, 25).bool()
    assert found.seen_share.mean == pytest.approx((seen[-1] & ~here).double().sum(-1).mean().item() / 25, abs=1e-12)
    assert found.distance.mean > 0.1
    assert found.log_score.mean < found.exact_log_score.mean
    twice = checks.compare_goals(2.0 * exact[0], seen[0], goal, admissible)  # each cell said to be twice as likely
    assert twice.mass.mean == pytest.approx(2.0)
    assert twice.distance.mean == pytest.approx(0.0, abs=1e-12)
    assert twice.ece == pytest.approx(1 / 25, abs=1e-9)
    assert twice.log_score.mean == pytest.approx(-math.log(21), abs=1e-12)  # of its share, not of its mass
    assert "cells seen empty" in str(found)


class _Cells(nn.Module):
    """z is where the goal is: a cell's log-odds are high where its one-hot code is z's."""

    def forward(self, row):
        cell, z = row[..., :25], row[..., 25:]
        return 40.0 * ((cell * z).sum(-1, keepdim=True) - 0.5)


def _one_hot(cell):
    return torch.nn.functional.one_hot((cell[..., 0] * 5 + cell[..., 1]).long(), 25).to(cell.dtype)


def test_goals_come_through_the_decoder_in_the_order_of_the_cells():
    family, _, goal, rollout = walks(tasks=30)
    env = bm.rl.TensorVectorEnv(family, 1, generator=0)
    spec = ContextSpec.of(
        env, inputs=("successor",), encode=_one_hot, encoded=25, reward_shift=-0.1, reward_scale=1.1, binary=True
    )
    decoder = TransitionDecoder(spec, 25, network=_Cells(), dtype=torch.float64)
    z = torch.nn.functional.one_hot(goal, 25).double()
    found = checks.goal_probabilities(decoder.program(), spec, z.expand(3, 30, 25), family)
    torch.testing.assert_close(found, z, rtol=0, atol=1e-6)
    data = spec.of_rollout(rollout)  # control: under these z what happened is certain
    assert decoder.program().log_likelihood(z, data).min() > -1e-6
    assert decoder.program().log_likelihood(z.roll(1, -1), data).min() < -1.0


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input():
    _, spec, context, _ = bernoulli(tasks=3)
    won, lost = checks.arm_counts(spec, context)
    for draws in (torch.rand(10, 3), torch.rand(10, 3, ARMS + 1), torch.rand(10, 2, ARMS)):
        with pytest.raises(errors.ShapeError, match="draws, won and lost"):
            checks.compare_arms(draws, won, lost)
    with pytest.raises(errors.OptionError, match="at least 2"):
        checks.compare_arms(torch.rand(1, 3, ARMS), won, lost)
    with pytest.raises(errors.ContextError, match="neither 0 nor 1"):
        checks.arm_counts(truth.a_spec(), truth.pulls(2)[1])
    other = ContextSpec.of(truth.bandit_env(1), inputs=("state",))
    with pytest.raises(errors.ContextError, match="no 'action'"):
        checks.arm_rows(other, torch.zeros(1))
    follows = ContextSpec.of(truth.bandit_env(1), targets=("successor",))
    decoder = TransitionDecoder(follows, 2)
    with pytest.raises(errors.ContextError, match="no reward"):
        checks.expected_reward(decoder.program(), follows, torch.zeros(1, 2), torch.zeros(1, 4))
    family, seen, goal, _ = walks(tasks=4)
    admissible = checks.admissible_cells(family)
    with pytest.raises(errors.ShapeError, match="probabilities and seen"):
        checks.compare_goals(torch.rand(4, 25), seen, goal, admissible)
    with pytest.raises(errors.EmptyTaskError, match="not admissible"):
        checks.compare_goals(torch.rand(4, 25), seen[0], torch.zeros(4).long(), admissible)
