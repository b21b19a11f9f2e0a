"""Returns, advantages and the linear baseline, against numbers made by hand and an endless environment."""

import math

import pytest
import torch

from bayesmeta.errors import NonFiniteDataError, OptionError, ShapeError
from bayesmeta.rl.policy_gradient.returns import (
    LinearBaseline,
    advantages,
    discounted_returns,
    episode_clock,
    successors,
)

NO = torch.zeros(4, 1, dtype=torch.bool)


def flags(*steps, time=4):
    out = torch.zeros(time, 1, dtype=torch.bool)
    out[list(steps)] = True
    return out


def column(*values):
    return torch.tensor(values, dtype=torch.float64).unsqueeze(-1)


def test_advantages_by_hand():
    """Four steps of one episode that goes on: each δ and each sum written out."""
    rewards, values, after = column(1, 2, 3, 4), column(0.5, 1.5, -1, 2), column(1.5, -1, 2, 7)
    gamma, lam = 0.9, 0.5
    d = [1 + 0.9 * 1.5 - 0.5, 2 + 0.9 * -1 - 1.5, 3 + 0.9 * 2 + 1, 4 + 0.9 * 7 - 2]
    c = gamma * lam
    by_hand = column(d[0] + c * (d[1] + c * (d[2] + c * d[3])), d[1] + c * (d[2] + c * d[3]), d[2] + c * d[3], d[3])
    torch.testing.assert_close(advantages(rewards, values, after, NO, NO, gamma=gamma, lam=lam), by_hand)


def test_the_two_ends_by_hand():
    """Terminal: nothing follows. Cut: the value of what would have. Neither lets the next episode's rewards through."""
    rewards, values, after = column(1, 2, 3, 4), column(0.5, 1.5, -1, 2), column(1.5, 10, 2, 7)
    d_next = [3 + 0.9 * 2 + 1, 4 + 0.9 * 7 - 2]
    tail = [d_next[0] + 0.45 * d_next[1], d_next[1]]
    for terminated, truncated, future in ((flags(1), NO, 0.0), (NO, flags(1), 10.0), (flags(1), flags(1), 0.0)):
        d = [1 + 0.9 * 1.5 - 0.5, 2 + 0.9 * future - 1.5]
        expected = column(d[0] + 0.45 * d[1], d[1], *tail)
        out = advantages(rewards, values, after, terminated, truncated, gamma=0.9, lam=0.5)
        torch.testing.assert_close(out, expected)


def test_returns_by_hand():
    rewards, after = column(1, 2, 3, 4), column(50, 10, 60, 7)
    going_on = discounted_returns(rewards, NO, NO, gamma=0.5, next_values=after)
    g3 = 4 + 0.5 * 7
    g2 = 3 + 0.5 * g3
    torch.testing.assert_close(going_on, column(1 + 0.5 * (2 + 0.5 * g2), 2 + 0.5 * g2, g2, g3))
    cut = discounted_returns(rewards, NO, flags(1), gamma=0.5, next_values=after)
    torch.testing.assert_close(cut, column(1 + 0.5 * (2 + 0.5 * 10), 2 + 0.5 * 10, g2, g3))
    terminal = discounted_returns(rewards, flags(1, 3), NO, gamma=0.5, next_values=after)
    torch.testing.assert_close(terminal, column(2, 2, 5, 4))
    torch.testing.assert_close(discounted_returns(rewards, NO, flags(1), gamma=0.5), column(2, 2, 5, 4))


def test_with_lambda_1_advantages_are_returns_less_values():
    generator = torch.Generator().manual_seed(0)
    rewards, values, after = (torch.randn(30, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    terminated, truncated = (torch.rand(30, 7, generator=generator) < 0.1 for _ in range(2))
    ended = terminated | truncated
    after = successors(values, after[-1], ended, after)
    got = advantages(rewards, values, after, terminated, truncated, gamma=0.97, lam=1.0)
    returns = discounted_returns(rewards, terminated, truncated, gamma=0.97, next_values=after)
    torch.testing.assert_close(got, returns - values)


def test_an_endless_environment_has_value_one_over_one_minus_gamma():
    """Reward 1 in every step, cut every 20 steps. The TD(λ) targets of the true value are the true value itself; a cut
    that is taken for a terminal state (the control) pulls them down, by γ^k / (1 − γ) k steps before it."""
    gamma, time = 0.95, 100
    truth = 1 / (1 - gamma)
    ones = torch.ones(time, 1, dtype=torch.float64)
    cut = torch.zeros(time, 1, dtype=torch.bool)
    cut[19::20] = True
    values = torch.full_like(ones, truth)
    never = torch.zeros_like(cut)
    for lam in (0.0, 0.6, 1.0):
        right = values + advantages(ones, values, values, never, cut, gamma=gamma, lam=lam)
        torch.testing.assert_close(right, values, rtol=1e-12, atol=0)
        wrong = values + advantages(ones, values, values, cut, never, gamma=gamma, lam=lam)
        assert (wrong < truth - 1).any()
    steps_left = 20 - torch.arange(time).remainder(20).double().unsqueeze(-1)
    torch.testing.assert_close(truth - wrong, truth * gamma**steps_left)  # λ = 1, the last of the loop
    # iterated from 0, the right one converges to the truth and the wrong one does not
    found = {}
    for name, ends in (("right", (never, cut)), ("wrong", (cut, never))):
        value = torch.zeros_like(ones)
        for _ in range(400):
            value = (value + advantages(ones, value, value, *ends, gamma=gamma, lam=0.9)).mean().expand_as(ones)
        found[name] = value[0].item()
    assert found["right"] == pytest.approx(truth, rel=1e-6)
    assert found["wrong"] < 0.7 * truth


def test_a_value_after_a_terminal_state_is_not_read():
    after = column(1.5, math.nan, 2, 7)
    out = advantages(column(1, 2, 3, 4), column(0, 0, 0, 0), after, flags(1), NO, gamma=0.9, lam=0.5)
    assert torch.isfinite(out).all()
    spoiled = advantages(column(1, 2, 3, 4), column(0, 0, 0, 0), after, NO, flags(1), gamma=0.9, lam=0.5)
    assert spoiled.isnan().any()  # control: after a cut it is


def test_successors_are_the_next_row_except_where_an_episode_ended():
    values, last = column(1, 2, 3, 4), torch.tensor([5.0], dtype=torch.float64)
    final = column(10, 20, 30, 40)
    torch.testing.assert_close(successors(values, last, flags(1), final), column(2, 20, 4, 5))
    assert successors(values, last, flags(1))[1].isnan()


def test_episodes_in_one_column_do_not_see_each_other():
    """Rewards of the second episode change nothing before it; without the end (the control) they do."""
    rewards = column(1, 2, 3, 4)
    other = column(1, 2, 30, -40)
    zero = torch.zeros_like(rewards)
    for ends in ((flags(1), NO), (NO, flags(1))):
        a, b = (advantages(r, zero, zero, *ends, gamma=0.9, lam=0.9) for r in (rewards, other))
        assert torch.equal(a[:2], b[:2])
        assert not torch.equal(a[2:], b[2:])
    a, b = (advantages(r, zero, zero, NO, NO, gamma=0.9, lam=0.9) for r in (rewards, other))
    assert not torch.equal(a[:2], b[:2])


def test_the_clock_counts_from_the_begin_of_an_episode():
    assert episode_clock(flags(1, 2, time=6)).squeeze(-1).tolist() == [0, 1, 0, 0, 1, 2]


# -- linear baseline ----------------------------------------------------------------------------------------------


def baseline_case(tasks=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    observations = torch.randn(20, tasks, 8, 2, generator=generator, dtype=dtype)
    clock = torch.arange(20).view(-1, 1, 1).expand(20, tasks, 8)
    t = clock.to(dtype) / 100
    slopes = torch.arange(1, tasks + 1, dtype=dtype).view(1, -1, 1)
    returns = slopes * (observations[..., 0] - 0.5 * observations[..., 1] ** 2) + 3 * t - 40 * t**3 + slopes
    return observations, clock, returns


def test_the_baseline_fits_what_is_linear_in_its_features_task_by_task():
    observations, clock, returns = baseline_case()
    fitted = LinearBaseline(ridge=1e-12).fit_predict(observations, clock, returns)
    torch.testing.assert_close(fitted, returns, rtol=1e-5, atol=1e-5)
    # each task alone gives the same; one fit for all (the control) cannot
    alone = LinearBaseline(ridge=1e-12).fit_predict(observations[:, 1:2], clock[:, 1:2], returns[:, 1:2])
    torch.testing.assert_close(alone, fitted[:, 1:2], rtol=1e-8, atol=1e-8)
    together = LinearBaseline(ridge=1e-12).fit_predict(
        *(x.flatten(1, 2).unsqueeze(1) for x in (observations, clock, returns))
    )
    assert (together - returns.flatten(1, 2).unsqueeze(1)).abs().max() > 0.5


def test_the_baseline_equals_ridge_regression():
    from sklearn.linear_model import Ridge

    observations, clock, returns = baseline_case(tasks=1)
    returns = returns + observations[..., 0].sin() * 3
    features = LinearBaseline.features(observations, clock).flatten(0, 2)
    size = features.square().sum(0).sqrt()  # our penalty is relative to each feature's mean square
    ridge = Ridge(alpha=0.01, fit_intercept=False).fit((features / size).numpy(), returns.flatten().numpy())
    expected = torch.from_numpy(ridge.predict((features / size).numpy())).reshape(returns.shape)
    torch.testing.assert_close(LinearBaseline(0.01).fit_predict(observations, clock, returns), expected)


def test_masked_steps_are_not_fitted():
    observations, clock, returns = baseline_case()
    mask = torch.ones_like(returns, dtype=torch.bool)
    mask[15:] = False
    spoiled = torch.where(mask, returns, 1e3)
    fit = LinearBaseline()
    kept = fit.fit_predict(observations, clock, spoiled, mask)
    torch.testing.assert_close(kept[:15], fit.fit_predict(observations[:15], clock[:15], returns[:15]))
    assert (fit.fit_predict(observations, clock, spoiled)[:15] - returns[:15]).abs().max() > 10


def test_a_feature_that_never_varies_is_no_harm():
    observations, clock, returns = baseline_case(dtype=torch.float32)
    fitted = LinearBaseline().fit_predict(torch.zeros_like(observations), clock, returns)
    assert fitted.dtype == torch.float32
    assert torch.isfinite(fitted).all()


# -- bad input ----------------------------------------------------------------------------------------------------


def test_bad_input_is_refused():
    rewards = column(1, 2, 3, 4)
    with pytest.raises(ShapeError, match="next_values has shape"):
        advantages(rewards, rewards, rewards[:-1], NO, NO, gamma=0.9, lam=0.9)
    with pytest.raises(ShapeError, match="must be boolean"):
        advantages(rewards, rewards, rewards, rewards, NO, gamma=0.9, lam=0.9)
    with pytest.raises(ShapeError, match="at least one step"):
        discounted_returns(rewards[:0], NO[:0], NO[:0], gamma=0.9)
    with pytest.raises(NonFiniteDataError, match=r"\[2, 0\] is nan"):
        discounted_returns(column(1, 2, math.nan, 4), NO, NO, gamma=0.9)
    with pytest.raises(OptionError, match="gamma must be in"):
        discounted_returns(rewards, NO, NO, gamma=1.5)
    with pytest.raises(OptionError, match="lam must be in"):
        advantages(rewards, rewards, rewards, NO, NO, gamma=1.0, lam=-0.1)
    with pytest.raises(OptionError, match="ridge"):
        LinearBaseline(0.0)
    with pytest.raises(ShapeError, match="tasks, copies"):
        LinearBaseline().fit_predict(torch.zeros(4, 2, 3), torch.zeros(4, 2), torch.zeros(4, 2))
