"""Observations, batches, standardisers and the synthetic tasks."""

import math

import pytest
import torch

import bayesmeta as bm
from bayesmeta import data, errors
from bayesmeta.tasks import LinearGaussian, Sinusoid
from tests.programs import batch_of


def test_collate_pads_with_copies_of_real_rows():
    xs = [torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0]])]
    ys = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0])]
    observations = bm.collate(xs, ys)
    assert observations.mask.tolist() == [[True] * 3, [True, False, False]]
    assert observations.x[1].flatten().tolist() == [4.0, 4.0, 4.0]
    assert observations.counts().tolist() == [3.0, 1.0]
    assert bm.collate(xs[:1], ys[:1]).mask is None
    assert bm.collate(xs, ys, shots=5).shots == 5


def test_union_split_concatenate_and_index():
    first = bm.TaskBatch(batch_of(3, 4), batch_of(3, 2, seed=1), torch.arange(3), ("a", "b", "c"), population=7)
    second = bm.TaskBatch(batch_of(2, 6, seed=2, ragged=True), batch_of(2, 3, seed=3), torch.arange(2), ("d", "e"))
    both = bm.concatenate([first, second])
    assert both.num_tasks == 5
    assert both.names == ("a", "b", "c", "d", "e")
    assert both.population == 7
    assert both.support.counts().tolist() == [4.0, 4.0, 4.0, *second.support.counts().tolist()]
    torch.testing.assert_close(both.support.x[:3, :4], first.support.x)
    assert first.union().shots == 6
    assert [b.num_tasks for b in both.split(2)] == [2, 2, 1]
    assert both.tasks([4, 0]).names == ("e", "a")
    assert both.to(dtype=torch.float64).support.x.dtype == torch.float64
    assert both.to(dtype=torch.float64).support.mask.dtype == torch.bool


def test_padding_tasks_do_not_count_in_a_mean():
    batch = bm.TaskBatch(batch_of(3, 4), batch_of(3, 2), torch.tensor([5, -1, 2]))
    assert batch.mean(torch.tensor([1.0, 100.0, 3.0])).item() == 2.0
    assert bm.TaskBatch(batch_of(2, 4), batch_of(2, 2)).mean(torch.tensor([1.0, 3.0])).item() == 2.0


def test_loss_ignores_padding_tasks_and_padding_shots():
    torch.manual_seed(0)
    method = bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.5)), inner_lr=0.1)
    batch = bm.TaskBatch(batch_of(3, 4), batch_of(3, 2, seed=1))
    padded = bm.TaskBatch(data.pad_shots(batch.support, 9), data.pad_shots(batch.query, 7), torch.tensor([0, 1, -1]))
    torch.testing.assert_close(method.loss(padded), method.loss(batch.tasks(slice(0, 2))), rtol=1e-5, atol=1e-5)
    assert not torch.isclose(method.loss(padded), method.loss(batch), rtol=1e-3)


def test_standardizer_goes_there_and_back():
    std = data.Standardizer(torch.tensor([2.0]), torch.tensor([3.0]), torch.tensor(1.0), torch.tensor(5.0))
    observations = batch_of(2, 3)
    standard = std.apply(observations)
    torch.testing.assert_close(std.raw_x(standard.x), observations.x)
    torch.testing.assert_close(std.raw_y(standard.y), observations.y)
    again = data.Standardizer.from_state(std.state())
    torch.testing.assert_close(again.apply(observations).y, standard.y)


def test_sinusoid_draws_the_published_family():
    batch = Sinusoid().sample(20_000, support=3, query=2, generator=1)
    x, y = batch.union().x.squeeze(-1), batch.union().y
    assert batch.population is None
    assert abs(x).max() <= 5
    # E y² = E A² / 2 averaged over phase and x: compare with a direct simulation by other means
    g = torch.Generator().manual_seed(5)
    a = 0.1 + 4.9 * torch.rand(200_000, generator=g)
    p = math.pi * torch.rand(200_000, generator=g)
    z = a * torch.sin(10 * torch.rand(200_000, generator=g) - 5 - p)
    se = math.sqrt(float((y[:, 0] ** 2).var()) / 20_000 + float((z**2).var()) / 200_000)
    assert abs(float((y[:, 0] ** 2).mean() - (z**2).mean())) < 4 * se
    # within a task all points lie on one sine: two points and the third are dependent, noise makes them differ
    noisy = Sinusoid(noise=0.5).sample(20_000, support=3, query=2, generator=1)
    residual = noisy.union().y - y
    assert abs(float(residual.var()) - 0.25) < 4 * 0.25 * math.sqrt(2 / 100_000)
    assert torch.equal(
        Sinusoid().sample(4, support=1, query=1, generator=7).support.x,
        Sinusoid().sample(4, support=1, query=1, generator=7).support.x,
    )


def test_oracle_is_calibrated_and_consistent():
    tasks = LinearGaussian(torch.tensor([1.0, -2.0]).double(), torch.tensor([[1.0, 0.6], [0.6, 2.0]]).double(), 0.5)
    batch = tasks.sample(4000, support=3, query=3, generator=2)
    predictive = tasks.predictive(batch.support, batch.query.x)
    white = torch.linalg.solve_triangular(
        predictive.scale_tril, (batch.query.y - predictive.mean).unsqueeze(-1), upper=False
    )
    assert abs(float(white.mean())) < 4 / math.sqrt(12_000)
    assert abs(float(white.var()) - 1) < 4 * math.sqrt(2 / 12_000)
    # chain rule: log p(S, Q) = log p(S) + log p(Q | S)
    both = tasks.log_evidence(batch.union())
    chain = tasks.log_evidence(batch.support) + predictive.log_prob(batch.query.y)
    torch.testing.assert_close(both, chain, rtol=1e-9, atol=1e-9)
    # control: half the scale is not calibrated
    assert abs(float((2 * white).var()) - 1) > 1


def test_oracle_ignores_masked_observations():
    tasks = LinearGaussian(torch.zeros(2).double(), torch.eye(2).double(), 0.5)
    batch = tasks.sample(3, support=4, query=1)
    mask = torch.tensor([True, True, False, False]).expand(3, 4)
    masked = tasks.posterior(bm.Observations(batch.support.x, batch.support.y, mask))
    short = tasks.posterior(bm.Observations(batch.support.x[:, :2], batch.support.y[:, :2]))
    torch.testing.assert_close(masked.mean, short.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(masked.covariance_matrix, short.covariance_matrix, rtol=1e-12, atol=1e-12)
    with pytest.raises(errors.DataError, match="without padding"):
        tasks.log_evidence(bm.Observations(batch.support.x, batch.support.y, mask))


X, Y = torch.zeros(2, 3, 1), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: bm.Observations(torch.zeros(2, 3)), errors.ShapeError, "unsqueeze"),
        (lambda: bm.Observations(X, torch.zeros(2, 4)), errors.ShapeError, "same tasks and shots"),
        (lambda: bm.Observations(X, torch.zeros(2, 3, 1)), errors.ShapeError, r"squeeze\(-1\)"),
        (lambda: bm.Observations(X, Y, torch.zeros(2, 3)), errors.ShapeError, "bool"),
        (lambda: bm.Observations(X, Y, w=torch.zeros(3, 1)), errors.ShapeError, "covariates"),
        (lambda: bm.collate([]), errors.EmptyTaskError, "at least one"),
        (lambda: bm.collate([X[0]], [Y[0], Y[1]]), errors.ShapeError, "1 tasks have x but 2"),
        (lambda: bm.collate([X[0]], shots=2), errors.ShapeError, "longest task"),
        (lambda: bm.collate([X[0] * math.nan]), errors.NonFiniteDataError, "task 0, shot 0"),
        (lambda: bm.TaskBatch(bm.Observations(X), bm.Observations(X[:1])), errors.ShapeError, "same tasks"),
        (lambda: bm.TaskBatch(bm.Observations(X), bm.Observations(X), torch.zeros(3)), errors.ShapeError, "task_id"),
        (lambda: bm.TaskBatch(bm.Observations(X), bm.Observations(X), names=("a",)), errors.ShapeError, "1 names"),
        (lambda: bm.concatenate([]), errors.EmptyTaskError, "at least one"),
        (lambda: bm.union(bm.Observations(X), bm.Observations(X, Y)), errors.DataError, "targets"),
        (lambda: Sinusoid(noise=-1), errors.OptionError, "noise"),
        (lambda: LinearGaussian(torch.zeros(2), torch.zeros(2, 2), 1.0), errors.DataError, "positive definite"),
        (lambda: LinearGaussian(torch.zeros(2), torch.eye(3), 1.0), errors.ShapeError, r"\[D, D\]"),
    ],
)
def test_bad_data_is_told_what_is_wrong(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_nan_under_the_mask_is_refused_with_its_reason():
    x = X.clone()
    x[1, 2] = math.nan
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 2] = False
    with pytest.raises(errors.NonFiniteDataError, match="masked NaN still gives NaN gradients"):
        bm.Observations(x, Y, mask).check()


def test_a_task_without_support_and_query():
    none = torch.tensor([[True] * 3, [False] * 3])
    batch = bm.TaskBatch(bm.Observations(X, Y, none), bm.Observations(X, Y, none), names=("Chad", "Peru"))
    with pytest.raises(errors.EmptyTaskError, match="Peru"):
        batch.check()
    padding = bm.TaskBatch(batch.support, batch.query, torch.tensor([0, -1]))
    padding.check()


def test_adapt_refuses_bad_support_and_keeps_the_method():
    torch.manual_seed(0)
    method = bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.5)))
    good = batch_of(2, 3)
    before = method.adapt(good).u.clone()
    bad = bm.Observations(good.x * math.inf, good.y)
    with pytest.raises(errors.NonFiniteDataError):
        method.adapt(bad)
    with pytest.raises(errors.ShapeError, match="features"):
        method.adapt(batch_of(2, 3, 4))
    with pytest.raises(errors.DeviceMismatchError, match="float64"):
        method.adapt(good.to(dtype=torch.float64))
    with pytest.raises(errors.OptionError, match=r"batch\.support"):
        method.adapt(bm.TaskBatch(good, good))
    posterior = method.adapt(good)
    with pytest.raises(errors.ShapeError, match="3 tasks"):
        posterior.predict(torch.zeros(3, 2, 1))
    assert torch.equal(posterior.u, before)


def test_slices_of_draws_change_nothing_but_memory(monkeypatch):
    from bayesmeta.posteriors import base

    torch.manual_seed(0)
    method = bm.ABML(bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.5)))
    observations = batch_of(3, 5)
    posterior = method.adapt(observations)
    draws = posterior.draws(50)
    whole = (
        posterior.log_likelihood(observations, draws=draws),
        posterior.log_prior(draws),
        posterior.log_joint(draws),
    )
    monkeypatch.setattr(base, "MAX_ELEMENTS", 7 * draws.u[0].numel())
    assert [d.num_samples for d in draws.slices()] == [7] * 7 + [1]
    sliced = (
        posterior.log_likelihood(observations, draws=draws),
        posterior.log_prior(draws),
        posterior.log_joint(draws),
    )
    for a, b in zip(whole, sliced, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert posterior.predict(observations, draws=draws).shape == (50, 3, 5)


def test_points_are_of_every_task():
    x, y = torch.arange(12.0).reshape(2, 3, 2), torch.arange(6.0).reshape(2, 3)
    mask, w = torch.tensor([[True, True, False], [True, False, False]]), torch.ones(2, 1)
    found = bm.Observations(x, y, mask, w).points(slice(1, 3))
    assert torch.equal(found.x, x[:, 1:])
    assert torch.equal(found.y, y[:, 1:])
    assert torch.equal(found.mask, mask[:, 1:])
    assert torch.equal(found.w, w)
    nothing = bm.Observations(x).points(slice(0))
    assert (nothing.shots, nothing.num_tasks, nothing.y, nothing.mask) == (0, 2, None, None)
