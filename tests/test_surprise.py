"""Surprise of tasks and points, and how well it tells kinds of tasks apart, against what is known."""

import math

import pyro.distributions as dist
import pytest
import torch
from forecast_cases import Linear, linear_tasks
from scipy.stats import kstest, norm
from sklearn.metrics import roc_auc_score, roc_curve

import bayesmeta as bm
from bayesmeta.errors import DataError, EmptyTaskError, NonFiniteDataError, OptionError, ShapeError, UnsupportedError

F64 = torch.float64


class Dense(Linear):
    """A linear task with a density, q, its spread ``factor`` times that of the posterior; the noise is the true one."""

    def __init__(self, tasks, support, factor=1.0):
        super().__init__(tasks, support, factor)
        self.noise = float(tasks.noise)

    def log_prob(self, u):
        return dist.MultivariateNormal(self.mean, self.covariance).log_prob(u)

    def log_prior(self, draws):
        return dist.MultivariateNormal(self.tasks.mean, self.tasks.covariance).log_prob(draws.u)


class Known(Linear):
    """One that gives its evidence in closed form."""

    def __init__(self, tasks, support):
        super().__init__(tasks, support)
        self.log_evidence = tasks.log_evidence(support)


# -- evidence -----------------------------------------------------------------------------------------------------


def test_the_closed_form_is_taken():
    family, batch = linear_tasks(5)
    found = bm.surprise(Known(family, batch.support))
    torch.testing.assert_close(found.scores, -family.log_evidence(batch.support))
    assert (found.errors == 0).all()
    assert found.counts.tolist() == [4] * 5
    each = bm.surprise(Known(family, batch.support), per_point=True)
    torch.testing.assert_close(each.scores * 4, found.scores)


@pytest.mark.parametrize("factor", [1.0, 0.3, 2.0])
def test_importance_weights_give_the_evidence_and_an_honest_error(factor):
    family, batch = linear_tasks(300, shots=3)
    truth = -family.log_evidence(batch.support)
    found = bm.surprise(Dense(family, batch.support, factor), num_samples=2000)
    z = (found.scores - truth) / found.errors
    assert abs(z.mean().item()) < 4 / math.sqrt(300) + 0.1  # the log is curved: a small bias of its own
    assert 0.8 < z.std().item() < 1.3
    assert found.errors.median() < 0.2
    assert (found.effective_draws > 8).all()


def test_an_exact_density_has_almost_no_error_and_beats_the_prior():
    family, batch = linear_tasks(40, shots=6, noise=0.1)
    truth = -family.log_evidence(batch.support)
    good = bm.surprise(Dense(family, batch.support), num_samples=1000)
    prior = bm.surprise(Linear(family, batch.support), num_samples=1000)
    torch.testing.assert_close(good.scores, truth, atol=5 * good.errors.max().item(), rtol=0)
    assert good.errors.mean() < 0.05
    assert prior.errors.mean() > 3 * good.errors.mean()
    assert (prior.effective_draws < good.effective_draws).all()


def test_draws_of_the_prior_alone():
    family, batch = linear_tasks(200, shots=2)
    found = bm.surprise(Linear(family, batch.support), num_samples=4000)
    z = (found.scores + family.log_evidence(batch.support)) / found.errors
    assert abs(z.mean().item()) < 4 / math.sqrt(200) + 0.1
    assert 0.8 < z.std().item() < 1.3
    wrong = bm.surprise(Linear(family, batch.support, 2.0), num_samples=4000)  # its noise is twice too large
    assert ((wrong.scores - found.scores).abs() > 5 * found.errors).double().mean() > 0.5, "control"


def test_masks_and_tasks_without_observations():
    family, batch = linear_tasks(4, shots=3)
    mask = torch.tensor([[True] * 3, [True, False, False], [False] * 3, [True, True, False]])
    support = bm.Observations(batch.support.x, batch.support.y, mask)
    found = bm.surprise(Dense(family, support), num_samples=4000)
    assert found.scores.isnan().tolist() == [False, False, True, False]
    for task, shots in ((0, 3), (1, 1), (3, 2)):
        alone = bm.Observations(support.x[[task], :shots], support.y[[task], :shots])
        error = (found.scores[task] + family.log_evidence(alone)[0]).abs()
        assert error < 5 * found.errors[task]


def test_a_real_method_by_draws_and_in_closed_form():
    torch.manual_seed(0)
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [8], 1), bm.Gaussian(0.3), bm.priors.Normal(1.0), task_modules="head")
    method = bm.BayesianLastLayer(model)
    batch = bm.tasks.Sinusoid(noise=0.1).sample(30, support=5, query=3, generator=0)
    method.prepare(batch)
    posterior = method.adapt(batch.support)
    closed, drawn = bm.surprise(posterior), bm.surprise(posterior, exact=False, num_samples=2000)
    assert (drawn.errors > 0).all()
    torch.testing.assert_close(closed.scores, posterior.log_evidence.double().neg())
    rounding = 1e-6 * (1 + closed.scores.abs())  # of float32; the errors of an exact density are smaller yet
    assert ((drawn.scores - closed.scores).abs() < 5 * drawn.errors + rounding).all()
    points = bm.surprise(posterior, batch.query)
    torch.testing.assert_close(points.scores, -posterior.predictive(batch.query).log_prob(batch.query.y).double())
    by_draws = bm.surprise(posterior, batch.query, exact=False, num_samples=2000)
    z = ((by_draws.scores - points.scores) / by_draws.errors).abs()
    trusted = by_draws.effective_draws > 100
    assert trusted.double().mean() > 0.3
    assert z[trusted].mean() < 1.5
    assert (by_draws.effective_draws[z > 8] < 10).all(), "what is far out is beyond the draws, and says so"


def test_padding_has_no_score():
    family, batch = linear_tasks(4)
    posterior, real = Known(family, batch.support), torch.tensor([True, False, True, True])
    whole, found = bm.surprise(posterior), bm.surprise(posterior, real=real)
    assert found.scores.isnan().tolist() == [False, True, False, False]
    assert found.scores[real].equal(whole.scores[real])
    assert found.counts.tolist() == [4, 0, 4, 4]
    points = bm.surprise(posterior, batch.query, real=real)
    assert points.scores.isnan().all(-1).tolist() == [False, True, False, False]
    posterior.log_evidence[1] = math.nan  # what a method makes of padding is its own affair
    assert bm.surprise(posterior, real=real).scores[real].equal(whole.scores[real])
    with pytest.raises(NonFiniteDataError, match="task 1"):
        bm.surprise(posterior)
    assert bm.roc(found, whole).num_inside == 3
    with pytest.raises(EmptyTaskError):
        bm.surprise(posterior, real=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ShapeError, match="real is"):
        bm.surprise(posterior, real=real[:2])


# -- processes ----------------------------------------------------------------------------------------------------


def process(**options):
    torch.manual_seed(0)
    likelihood = bm.likelihoods.HeteroscedasticGaussian(0.1)
    method = bm.AttentiveNeuralProcess(likelihood, width=16, depth=1, heads=2, **options)
    batch = bm.tasks.Sinusoid(noise=0.1).sample(6, support=4, query=3, generator=0)
    bm.fit(method, bm.tasks.Sinusoid(noise=0.1), steps=5, tasks_per_step=4, support=4, query=3, progress=False)
    return method.eval(), batch


def without_support(method, support):
    empty = bm.Observations(support.x[:, :0], support.y[:, :0])
    return method.adapt(empty)


def test_a_process_is_asked_without_its_support():
    """Of one without a latent in closed form: each point's density from no support; of points, from the support."""
    method, batch = process()
    posterior = method.adapt(batch.support)
    found = bm.surprise(posterior)
    prior = without_support(method, batch.support).predictive(batch.support)
    expected = -prior.log_prob(batch.support.y).sum(-1).double()
    torch.testing.assert_close(found.scores, expected, rtol=1e-5, atol=1e-5)
    assert (found.errors == 0).all()
    seen = -posterior.predictive(batch.support).log_prob(batch.support.y).sum(-1).double()
    assert ((found.scores - seen).abs() > 1e-3).all(), "control: what was conditioned on is no evidence"
    points = bm.surprise(posterior, batch.query)
    torch.testing.assert_close(points.scores, -posterior.predictive(batch.query).log_prob(batch.query.y).double())
    mask = torch.tensor([[True] * 4] * 5 + [[False] * 4])
    some = bm.surprise(method.adapt(bm.Observations(batch.support.x, batch.support.y, mask)))
    torch.testing.assert_close(some.scores[:5], found.scores[:5], rtol=1e-5, atol=1e-5)
    assert some.scores[5].isnan()


def test_the_evidence_of_a_process_with_covariance_is_joint():
    torch.manual_seed(0)
    model = bm.ProcessModel("attention", bm.Gaussian(0.2), covariance="low_rank", rank=3, width=16, depth=1, heads=2)
    method = bm.ProcessMethod(model)
    tasks = bm.tasks.Sinusoid(noise=0.1)
    bm.fit(method, tasks, steps=5, tasks_per_step=4, support=4, query=3, progress=False)
    batch = tasks.sample(6, support=4, query=3, generator=0)
    found = bm.surprise(method.eval().adapt(batch.support))
    prior = without_support(method, batch.support)
    joint = prior.predictive(batch.support, joint=True).log_prob(batch.support.y)
    torch.testing.assert_close(found.scores, -joint.double(), rtol=1e-4, atol=1e-4)
    each = prior.predictive(batch.support).log_prob(batch.support.y).sum(-1).double()
    assert ((found.scores + each).abs() > 1e-3).any(), "control: the points hang together"


def test_a_process_with_a_latent_is_averaged_over_its_prior():
    method, batch = process(latent_size=3)
    posterior = method.adapt(batch.support)
    found = bm.surprise(posterior, num_samples=4000)
    prior = without_support(method, batch.support)
    z = posterior.prior_draws(4000, 7)
    each = prior.log_likelihood(batch.support, draws=type(posterior.draws(2))(z.u)).double().sum(-1)
    expected = -(each.logsumexp(0) - math.log(4000))
    error = (each - each.logsumexp(0) + math.log(4000)).exp().std(0) / math.sqrt(4000)
    assert ((found.scores - expected).abs() < 5 * (found.errors.square() + error.square()).sqrt() + 1e-5).all()
    assert (found.errors > 0).all()
    assert (found.errors < 0.5).all()


# -- p-values -----------------------------------------------------------------------------------------------------


def family_of(mean):
    return bm.tasks.LinearGaussian(torch.tensor(mean, dtype=F64), torch.eye(2, dtype=F64), 0.4)


def test_p_values_of_tasks_are_uniform_inside_and_small_outside():
    family = family_of([0.5, -1.0])
    inside, known = (family.sample(n, support=4, query=1, generator=s).support for n, s in ((800, 1), (2000, 2)))
    reference = bm.surprise(Known(family, known))
    p = bm.surprise(Known(family, inside)).p_values(reference)
    assert kstest(p.numpy(), "uniform").pvalue > 0.001
    assert p.min() >= 1 / 2001
    far = family_of([4.0, 4.0]).sample(200, support=4, query=1, generator=3).support
    outside = bm.surprise(Known(family, far)).p_values(reference)
    assert (outside < 0.05).double().mean() > 0.8
    more = bm.surprise(Known(family_of([0.0, 0.0]), inside)).p_values(reference)
    assert kstest(more.numpy(), "uniform").pvalue < 1e-6, "control: another prior's evidence is not of the reference"


def test_p_values_of_few_tasks_by_hand_and_on_average():
    def made(values, counts=4):
        scores = torch.tensor(values, dtype=F64)
        return bm.Surprise(scores, scores * 0, scores, torch.full(scores.shape[:1], counts))

    reference = made([3.0, 1.0, 2.0, math.nan])
    torch.testing.assert_close(made([2.0, 0.0, 4.0]).p_values(reference), torch.tensor([0.75, 1.0, 0.25], dtype=F64))
    points = made([[1.0, 3.0], [2.0, math.nan]])
    expected = torch.tensor([[1 / 3, 1.0], [2.5 / 3, 1 / 3]], dtype=F64)
    torch.testing.assert_close(made([[5.0, 0.0], [1.5, 3.5]]).p_values(points), expected)
    with pytest.raises(OptionError, match="tasks, the other of points"):
        made([1.0]).p_values(points)
    with pytest.raises(OptionError, match="have 5 observations, the reference 4"):
        made([1.0], 5).p_values(reference)
    with pytest.raises(EmptyTaskError, match="reference"):
        made([1.0]).p_values(made([math.nan]))


def test_p_values_of_points_hold_over_tasks_even_of_a_wrong_posterior():
    family, batch = linear_tasks(3000, shots=2)
    for factor in (1.0, 0.3):
        found = bm.surprise(Linear(family, batch.support, factor), batch.query)
        rows = bm.Surprise(*(v[:2000] for v in (found.scores, found.errors, found.effective_draws, found.counts)))
        new = bm.Surprise(*(v[2000:] for v in (found.scores, found.errors, found.effective_draws, found.counts)))
        each = (new.p_values(rows) <= 0.1).double().mean(-1)
        assert abs(each.mean().item() - 0.1) < 4 * each.std().item() * math.sqrt(1 / 1000 + 1 / 2000)
    jump = batch.query.y.clone()
    jump[:, 0] += 8.0
    odd = bm.surprise(Linear(family, batch.support), batch.query.with_y(jump))
    reference = bm.surprise(Linear(family, batch.support), batch.query)
    p = odd.p_values(reference)
    assert (p[:, 0] < 0.01).double().mean() > 0.9
    assert (p[:, 1:] < 0.01).double().mean() < 0.02


# -- ROC ----------------------------------------------------------------------------------------------------------


def delong(low, high):
    """AUROC and its standard error by the double loop of the definition."""
    psi = [[1.0 if h > v else 0.5 if h == v else 0.0 for v in low] for h in high]
    area = sum(map(sum, psi)) / (len(low) * len(high))
    outside = [sum(row) / len(low) for row in psi]
    inside = [sum(row[j] for row in psi) / len(high) for j in range(len(low))]
    s10 = sum((v - area) ** 2 for v in outside) / (len(high) - 1)
    s01 = sum((v - area) ** 2 for v in inside) / (len(low) - 1)
    return area, math.sqrt(s10 / len(high) + s01 / len(low))


def test_roc_against_scikit_learn_and_the_definition():
    generator = torch.Generator().manual_seed(0)
    low = (torch.randn(60, generator=generator) * 2).round() / 2  # with ties
    high = (torch.randn(40, generator=generator) * 2 + 1.5).round() / 2
    found = bm.roc(low, high)
    area, error = delong(low.tolist(), high.tolist())
    assert found.auroc == pytest.approx(area, abs=1e-12)
    assert found.standard_error == pytest.approx(error, abs=1e-12)
    label, score = torch.cat([torch.zeros(60), torch.ones(40)]), torch.cat([low, high])
    assert found.auroc == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    fpr, tpr, _ = roc_curve(label, score, drop_intermediate=False)
    torch.testing.assert_close(found.false_positive_rate, torch.as_tensor(fpr))
    torch.testing.assert_close(found.true_positive_rate, torch.as_tensor(tpr))
    assert found.false_positives_at(0.95) == pytest.approx(fpr[(tpr >= 0.95).argmax()])
    assert bm.roc(-low, -high).auroc == pytest.approx(1 - area, abs=1e-12)
    assert (found.num_inside, found.num_outside) == (60, 40)
    assert "AUROC" in str(found)


def test_two_gaussians_have_the_area_of_the_closed_form():
    generator = torch.Generator().manual_seed(1)
    truth = norm.cdf(1.2 / math.hypot(1.0, 0.7))
    z = []
    for _ in range(500):
        low, high = torch.randn(80, generator=generator), 1.2 + 0.7 * torch.randn(60, generator=generator)
        found = bm.roc(low, high)
        z.append((found.auroc - truth) / found.standard_error)
    z = torch.tensor(z)
    assert abs(z.mean().item()) < 4 / math.sqrt(500) + 0.1  # the area and its error are correlated near 1
    assert abs(z.std().item() - 1) < 4 / math.sqrt(1000) + 0.1


def test_the_difference_of_two_areas_is_paired():
    """Over many repetitions its standard error is the spread of the difference, which is far below that of each."""
    generator, z, errors, alone = torch.Generator().manual_seed(3), [], [], []
    shared_mean = norm.cdf(1.0 / math.sqrt(2.0 * 1.09)), norm.cdf(1.2 / math.sqrt(2.0 * 1.09))
    truth = shared_mean[0] - shared_mean[1]
    for _ in range(400):
        low, high = (torch.randn(n, generator=generator, dtype=F64) for n in (60, 80))
        sides = [
            (low + 0.3 * torch.randn(60, generator=generator, dtype=F64),
             high + shift + 0.3 * torch.randn(80, generator=generator, dtype=F64))
            for shift in (1.0, 1.2)
        ]  # fmt: skip
        first, second = (bm.roc(*side) for side in sides)
        difference, error = first.difference(second)
        assert difference == pytest.approx(first.auroc - second.auroc)
        z.append((difference - truth) / error)
        errors.append(error)
        alone.append(math.hypot(first.standard_error, second.standard_error))
    z = torch.tensor(z)
    assert abs(float(z.mean())) < 4 / math.sqrt(400) + 0.1
    assert 0.85 < float(z.std()) < 1.15
    assert sum(errors) < 0.6 * sum(alone), "control: as if of different tasks"
    assert first.difference(first) == (0.0, 0.0)
    with pytest.raises(ShapeError, match="different scores inside"):
        first.difference(bm.roc(sides[0][0][:50], sides[0][1]))
    missing = sides[0][1].clone()
    missing[3] = math.nan
    with pytest.raises(ShapeError, match="different scores outside"):
        first.difference(bm.roc(sides[0][0], missing))


def test_points_of_a_task_are_one_cluster():
    generator = torch.Generator().manual_seed(2)
    clustered, alone = [], []
    truth = norm.cdf(1.0 / math.sqrt(2 * (1 + 0.25)))
    for _ in range(400):
        low, high = (
            m + torch.randn(40, 1, generator=generator) + 0.5 * torch.randn(40, 5, generator=generator) for m in (0, 1)
        )
        found = bm.roc(low, high)
        clustered.append((found.auroc - truth) / found.standard_error)
        alone.append((found.auroc - truth) / bm.roc(low.flatten(), high.flatten()).standard_error)
    assert abs(torch.tensor(clustered).std().item() - 1) < 4 / math.sqrt(800) + 0.1
    assert torch.tensor(alone).std() > 1.5, "control: points as units are far too sure"


def test_another_family_is_told_apart_and_the_same_is_not():
    family = family_of([0.0, 0.0])
    inside = family.sample(500, support=5, query=1, generator=0).support
    outside = family_of([0.0, 4.0]).sample(500, support=5, query=1, generator=1).support
    found = bm.roc(*(bm.surprise(Known(family, s)) for s in (inside, outside)))
    assert found.auroc > 0.9
    same = family.sample(500, support=5, query=1, generator=2).support
    nothing = bm.roc(*(bm.surprise(Known(family, s)) for s in (inside, same)))
    assert abs(nothing.auroc - 0.5) < 4 * nothing.standard_error


def test_errors_are_typed():
    family, batch = linear_tasks(4)
    posterior = Linear(family, batch.support)
    with pytest.raises(OptionError, match="num_samples=1"):
        bm.surprise(posterior, num_samples=1)
    with pytest.raises(OptionError, match="whole tasks"):
        bm.surprise(posterior, batch.query, per_point=True)
    with pytest.raises(DataError, match="y=None"):
        bm.surprise(posterior, batch.query.with_y(None))
    with pytest.raises(ShapeError, match="3 tasks"):
        bm.surprise(posterior, batch.query.tasks([0, 1, 2]))
    empty = bm.Observations(batch.query.x, batch.query.y, torch.zeros(4, 6, dtype=torch.bool))
    with pytest.raises(EmptyTaskError):
        bm.surprise(posterior, empty)
    bad = batch.query.y.clone()
    bad[1, 2] = math.nan
    with pytest.raises(NonFiniteDataError, match="task 1, shot 2"):
        bm.surprise(posterior, batch.query.with_y(bad))
    corrected = bm.recalibrate(posterior, batch)(posterior)
    with pytest.raises(UnsupportedError, match="recalibrated"):
        bm.surprise(corrected)
    assert bm.surprise(corrected, batch.query).scores.isfinite().all()
    known = Known(family, batch.support)
    known.log_evidence[2] = math.nan
    with pytest.raises(NonFiniteDataError, match="evidence is not finite for task 2"):
        bm.surprise(known)
    some = torch.zeros(3)
    with pytest.raises(ShapeError, match="outside"):
        bm.roc(some, torch.zeros(()))
    with pytest.raises(EmptyTaskError, match="no score inside"):
        bm.roc(some * math.nan, some)
    assert math.isnan(bm.roc(some, torch.ones(1)).standard_error)
    with pytest.raises(OptionError, match="rate"):
        bm.roc(some, some).false_positives_at(0.0)
