"""Scores as torch functions: against scoringrules, torchmetrics, scipy, quadrature and finite differences."""

import math

import numpy as np
import pytest
import scipy.stats
import scoringrules
import torch
import torchmetrics.functional.classification
import torchmetrics.functional.regression
from forecast_cases import FACTORS
from scipy.integrate import quad

import bayesmeta as bm
from bayesmeta.diagnostics import metrics
from bayesmeta.errors import OptionError, ShapeError

F64 = torch.float64


def numbers(*shape, seed=0, positive=False):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=generator, dtype=F64)
    return value.abs() + 0.2 if positive else value


LOC, SCALE, Y = numbers(5, 3), numbers(5, 3, seed=1, positive=True), numbers(5, 3, seed=2)
MANY, WEIGHTS = numbers(40, 5, 3, seed=3), numbers(40, seed=4, positive=True)


def same(value, expected, **tolerance):
    torch.testing.assert_close(value, torch.as_tensor(np.asarray(expected)), **tolerance)


# -- other libraries ----------------------------------------------------------------------------------------------


def test_normal_scores():
    same(bm.metrics.crps_normal(LOC, SCALE, Y), scoringrules.crps_normal(Y.numpy(), LOC.numpy(), SCALE.numpy()))
    same(metrics.log_score_normal(LOC, SCALE, Y), -scipy.stats.norm.logpdf(Y, LOC, SCALE))
    expected = 2 * metrics.log_score_normal(LOC, SCALE, Y) - math.log(2 * math.pi)
    torch.testing.assert_close(metrics.dawid_sebastiani(LOC, SCALE, Y), expected)


def test_dawid_sebastiani_of_a_vector():
    root = numbers(5, 3, 3, seed=7) + 2 * torch.eye(3, dtype=F64)
    covariance = root @ root.mT
    expected = [
        -2 * scipy.stats.multivariate_normal.logpdf(y, m, c) - 3 * math.log(2 * math.pi)
        for y, m, c in zip(Y.numpy(), LOC.numpy(), covariance.numpy(), strict=True)
    ]
    same(metrics.dawid_sebastiani_joint(LOC, covariance, Y), expected)
    diagonal = metrics.dawid_sebastiani_joint(LOC, torch.diag_embed(SCALE.square()), Y)
    torch.testing.assert_close(diagonal, metrics.dawid_sebastiani(LOC, SCALE, Y).sum(-1))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("slices", [False, True])
def test_mixture(weighted, slices, monkeypatch):
    if slices:
        monkeypatch.setattr(metrics, "MAX_ELEMENTS", 2 * 6 * 15)
    loc, scale = numbers(6, 5, 3, seed=5), numbers(6, 5, 3, seed=6, positive=True)
    weights = WEIGHTS[:6] if weighted else None
    w = (torch.ones(6, dtype=F64) if weights is None else weights) / (6 if weights is None else weights.sum())
    value = metrics.crps_normal_mixture(loc, scale, Y, weights)
    last = [v.movedim(0, -1).numpy() for v in (loc, scale)]
    same(value, scoringrules.crps_mixnorm(Y.numpy(), *last, np.broadcast_to(w.numpy(), last[0].shape)))

    def integrand(t):
        cdf = float((w * torch.special.ndtr((t - loc[:, 2, 1]) / scale[:, 2, 1])).sum())
        return (cdf - (t >= Y[2, 1].item())) ** 2

    parts = [quad(integrand, *ends, limit=200)[0] for ends in ((-20, Y[2, 1].item()), (Y[2, 1].item(), 20))]
    assert value[2, 1].item() == pytest.approx(sum(parts), abs=1e-7)  # the quadrature's own error
    one = metrics.crps_normal_mixture(LOC[None], SCALE[None], Y)
    torch.testing.assert_close(one, metrics.crps_normal(LOC, SCALE, Y))


@pytest.mark.parametrize("fair", [True, False])
def test_ensemble(fair):
    value = metrics.crps_ensemble(MANY, Y, fair=fair)
    draws = MANY.movedim(0, -1).numpy()
    same(value, scoringrules.crps_ensemble(Y.numpy(), draws, estimator="fair" if fair else "nrg"))
    other = metrics.crps_ensemble(MANY, Y, fair=not fair)
    assert not torch.allclose(value, other), "control: the two differ"
    if not fair:
        flat = torchmetrics.functional.regression.continuous_ranked_probability_score(
            MANY.movedim(0, -1).reshape(15, 40), Y.flatten()
        )
        assert value.mean().item() == pytest.approx(flat.item(), rel=1e-6)
    equal = metrics.crps_ensemble(MANY, Y, torch.full((40,), 3.0, dtype=F64), fair=fair)
    torch.testing.assert_close(equal, value)
    in_order = metrics.crps_ensemble(MANY.sort(0).values, Y, fair=fair, in_order=True)
    torch.testing.assert_close(in_order, value)


@pytest.mark.parametrize("fair", [True, False])
def test_weighted_ensemble_by_its_double_sum(fair):
    w = WEIGHTS / WEIGHTS.sum()
    pairs = torch.einsum("i,j,ij...->...", w, w, (MANY.unsqueeze(1) - MANY).abs())
    expected = torch.einsum("i,i...->...", w, (MANY - Y).abs()) - 0.5 * pairs / (1 - (w**2).sum() if fair else 1.0)
    torch.testing.assert_close(metrics.crps_ensemble(MANY, Y, WEIGHTS, fair=fair), expected)
    each = WEIGHTS.reshape(40, 1, 1).expand(MANY.shape)
    torch.testing.assert_close(metrics.crps_ensemble(MANY, Y, each, fair=fair), expected)
    assert not torch.allclose(metrics.crps_ensemble(MANY, Y, WEIGHTS.flip(0), fair=fair), expected)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=F64)])
def test_fair_is_unbiased_and_the_other_is_not(weights):
    draws, y = numbers(4, 40_000, seed=8), torch.full((40_000,), 0.7, dtype=F64)
    truth = metrics.crps_normal(torch.zeros((), dtype=F64), torch.ones((), dtype=F64), y[0])
    for fair, holds in ((True, True), (False, False)):
        value = metrics.crps_ensemble(draws, y, weights, fair=fair)
        error = (value.mean() - truth).abs() / (value.std() / 200)
        assert bool(error < 5) == holds, (fair, error)


def test_energy_score(monkeypatch):
    draws, y = numbers(30, 5, 2, seed=9), numbers(5, 2, seed=10)
    last = draws.movedim(0, -2).numpy()
    for fair, estimator in ((True, "fair"), (False, "nrg")):
        expected = scoringrules.es_ensemble(y.numpy(), last, estimator=estimator)
        same(metrics.energy_score(draws, y, fair=fair), expected)
    monkeypatch.setattr(metrics, "MAX_ELEMENTS", 7 * draws.numel())
    same(metrics.energy_score(draws, y, fair=False), expected)
    one = metrics.energy_score(MANY.unsqueeze(-1), Y.unsqueeze(-1))
    torch.testing.assert_close(one, metrics.crps_ensemble(MANY, Y))


def test_half_of_the_pairs_estimate_the_same():
    draws, y = numbers(200, 2000, 2, seed=11), numbers(2000, 2, seed=12)
    difference = metrics.energy_score(draws[:40], y) - metrics.energy_score(draws[40:], y, pairs="half")
    assert abs(difference.mean()) < 5 * difference.std() / math.sqrt(2000)
    biased = metrics.energy_score(draws[:40], y, fair=False) - metrics.energy_score(draws[40:], y, pairs="half")
    assert abs(biased.mean()) > 5 * biased.std() / math.sqrt(2000), "control"


def test_intervals_and_quantiles():
    low, high = LOC - 1.6 * SCALE, LOC + 1.6 * SCALE
    same(metrics.interval_score(low, high, Y, 0.8), scoringrules.interval_score(Y, low, high, 0.2))
    same(metrics.pinball(low, Y, 0.1), scoringrules.quantile_score(Y, low, 0.1))
    ends = metrics.pinball(low, Y, 0.1) + metrics.pinball(high, Y, 0.9)
    torch.testing.assert_close(metrics.interval_score(low, high, Y, 0.8), ends * 2 / 0.2)
    torch.testing.assert_close(metrics.sharpness(low, high), 3.2 * SCALE)
    assert (metrics.interval_score(low, high, Y, 0.8) >= metrics.sharpness(low, high)).all()


def test_crps_is_twice_the_mean_pinball_loss():
    p = (torch.arange(4000, dtype=F64) + 0.5) / 4000
    quantiles = torch.special.ndtri(p) * 1.3 + 0.2
    y = torch.tensor(0.9, dtype=F64)
    mean = torch.stack([metrics.pinball(q, y, float(a)) for q, a in zip(quantiles, p, strict=True)]).mean()
    expected = metrics.crps_normal(torch.tensor(0.2, dtype=F64), torch.tensor(1.3, dtype=F64), y)
    assert 2 * mean.item() == pytest.approx(expected.item(), abs=1e-4)


def test_brier_scores():
    p = numbers(50, seed=13).sigmoid()
    y = (numbers(50, seed=14) > 0).double()
    same(metrics.brier_score_binary(p, y), scoringrules.brier_score(y.numpy(), p.numpy()))
    two = metrics.brier_score(torch.stack([1 - p, p], -1), y)
    torch.testing.assert_close(two, 2 * metrics.brier_score_binary(p, y))


def test_log_score_of_draws():
    each = numbers(40, 5, 3, seed=15)
    w = WEIGHTS / WEIGHTS.sum()
    torch.testing.assert_close(metrics.log_score(each), -each.exp().mean(0).log())
    torch.testing.assert_close(metrics.log_score(each, WEIGHTS), -torch.einsum("n,n...->...", w, each.exp()).log())
    torch.testing.assert_close(metrics.log_score(each[:1]), -each[0])


# -- the truth is best --------------------------------------------------------------------------------------------


def normal_rows(factor, y, loc, scale):
    wide = scale * factor
    draws = loc + wide * numbers(64, *y.shape, seed=20)
    low, high = loc - 1.6448536 * wide, loc + 1.6448536 * wide
    vector = [v.reshape(-1, 3) for v in (loc, wide, y)]
    return {
        "log_score": metrics.log_score_normal(loc, wide, y),
        "crps_normal": metrics.crps_normal(loc, wide, y),
        "crps_ensemble": metrics.crps_ensemble(draws, y),
        "mixture": metrics.crps_normal_mixture(torch.stack([loc, loc]), torch.stack([wide, wide]), y),
        "dawid_sebastiani": metrics.dawid_sebastiani(loc, wide, y),
        "dawid_sebastiani_joint": metrics.dawid_sebastiani_joint(
            vector[0], torch.diag_embed(vector[1].square()), vector[2]
        ),
        "energy": metrics.energy_score(draws.reshape(64, -1, 3), y.reshape(-1, 3)),
        "interval": metrics.interval_score(low, high, y, 0.9),
        "pinball": metrics.pinball(high, y, 0.95),
    }


def test_every_score_is_smallest_for_the_truth():
    loc, scale = numbers(30_000, seed=21), numbers(30_000, seed=22, positive=True)
    y = loc + scale * numbers(30_000, seed=23)
    exact, *others = (normal_rows(factor, y, loc, scale) for factor in FACTORS)
    for factor, other in zip(FACTORS[1:], others, strict=True):
        for name, value in other.items():
            test = scipy.stats.ttest_1samp((value - exact[name]).numpy(), 0.0, alternative="greater")
            assert test.pvalue < 1e-8, (name, factor, test)


def test_brier_and_log_score_of_classes_are_smallest_for_the_truth():
    logits = 1.5 * numbers(20_000, 4, seed=24)
    y = torch.distributions.Categorical(logits=logits).probs.cumsum(-1)
    generator = torch.Generator().manual_seed(25)
    y = (torch.rand(20_000, 1, generator=generator, dtype=F64) > y).sum(-1)

    def rows(factor):
        p = (logits * factor).softmax(-1)
        binary = metrics.brier_score_binary(p[:, 1], (y == 1).double())
        return metrics.brier_score(p, y), binary, metrics.log_score(p.gather(-1, y[:, None]).log().mT)

    exact = rows(1.0)
    for factor in (2.0, 0.5):
        for value, best in zip(rows(factor), exact, strict=True):
            assert scipy.stats.ttest_1samp(value - best, 0.0, alternative="greater").pvalue < 1e-8


# -- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (metrics.log_score, (MANY[:4], WEIGHTS[:4])),
        (metrics.log_score_normal, (LOC, SCALE, Y)),
        (metrics.dawid_sebastiani, (LOC, SCALE, Y)),
        (
            lambda m, s, y: metrics.dawid_sebastiani_joint(m, torch.diag_embed(s) + 0.1 * s[..., :1, None], y),
            (LOC, SCALE, Y),
        ),
        (metrics.crps_normal, (LOC, SCALE, Y)),
        (metrics.crps_normal_mixture, (MANY[:4], MANY[4:8].abs() + 0.2, Y, WEIGHTS[:4])),
        (metrics.crps_ensemble, (MANY[:6], Y)),
        (metrics.crps_ensemble, (MANY[:6], Y, WEIGHTS[:6])),
        (metrics.energy_score, (MANY[:6], Y)),
        (lambda x, y: metrics.energy_score(x, y, pairs="half"), (MANY[:6], Y)),
        (metrics.interval_score, (LOC - SCALE, LOC + SCALE, Y)),
        (lambda q, y: metrics.pinball(q, y, 0.2), (LOC, Y)),
        (lambda p: metrics.brier_score(p.softmax(-1), torch.tensor([0, 1, 2, 1, 0])), (LOC,)),
        (metrics.brier_score_binary, (LOC.sigmoid(), (Y > 0).double())),
    ],
)
def test_gradients_against_finite_differences(function, inputs):
    inputs = tuple(v.clone().requires_grad_() for v in inputs)
    assert torch.autograd.gradcheck(function, inputs)


# -- bad input ----------------------------------------------------------------------------------------------------


def test_errors_are_typed():
    with pytest.raises(ShapeError, match=r"\[40, 5, 3\] and y \[5\]"):
        metrics.crps_ensemble(MANY, Y[:, 0])
    with pytest.raises(ShapeError, match="weights has shape"):
        metrics.crps_ensemble(MANY, Y, WEIGHTS[:3])
    with pytest.raises(OptionError, match="at least 2"):
        metrics.crps_ensemble(MANY[:1], Y)
    with pytest.raises(OptionError, match="at least 2"):
        metrics.energy_score(MANY[:1], Y)
    with pytest.raises(OptionError, match="pairs='some'"):
        metrics.energy_score(MANY, Y, pairs="some")
    with pytest.raises(ShapeError, match="vectors"):
        metrics.energy_score(WEIGHTS, torch.tensor(0.0, dtype=F64))
    with pytest.raises(OptionError, match="level=1"):
        metrics.interval_score(LOC, LOC, Y, 1.0)
    with pytest.raises(OptionError, match="probability=0"):
        metrics.pinball(LOC, Y, 0.0)
    with pytest.raises(ShapeError, match="probabilities has shape"):
        metrics.brier_score(LOC, Y)
    with pytest.raises(ShapeError, match="covariance"):
        metrics.dawid_sebastiani_joint(LOC, LOC, Y)
