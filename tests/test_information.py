"""Information by closed forms of the predictive: against quadrature, entropies of Student-t, Gaussian processes."""

import math
from types import SimpleNamespace

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm, t

import bayesmeta as bm
from bayesmeta.diagnostics.information import _Greedy, elliptical
from bayesmeta.posteriors.mixture import LeftMixture

F64 = torch.float64


class Mixed:
    """K Bayesian linear regressions on φ ~ N(m_k, S_k), with weights; the noise is of variance ``noise``[k].

    With ``df`` the noise's variance is inverse-gamma instead, and the φ scale with it: a Student-t.
    """

    is_point, num_draws, target_kind = False, None, "real"

    def __init__(self, weights, means, roots, noise, df=None, tasks=1):
        self.weights, self.means, self.roots = (torch.as_tensor(v, dtype=F64) for v in (weights, means, roots))
        self.noise, self.df, self.num_tasks = torch.as_tensor(noise, dtype=F64), df, tasks
        self.support = bm.Observations(torch.zeros(tasks, 0, 2, dtype=F64), torch.zeros(tasks, 0, dtype=F64))

    def parts(self, x):
        """Means ``[K, N]`` and covariances, or scale matrices, of labels at x ``[N, 2]``."""
        half = x @ self.roots
        scale = half @ half.mT + self.noise[:, None, None] * torch.eye(len(x), dtype=F64)
        return torch.einsum("nf,kf->kn", x, self.means), scale

    def predictive(self, x, *, joint=False):
        assert joint
        each = [self.parts(one) for one in x.x]
        loc, scale = (torch.stack([e[i] for e in each], 1) for i in (0, 1))
        root = torch.linalg.cholesky(scale)
        if self.df is None:
            parts = dist.MultivariateNormal(loc, scale_tril=root)
        else:
            parts = dist.MultivariateStudentT(torch.full(loc.shape[:2], self.df, dtype=F64), loc, root)
        return LeftMixture(self.weights.log().unsqueeze(-1).expand(loc.shape[:2]), parts)


def two_kinds(**options):
    """Two kinds of lines that differ in slope, spread and noise."""
    roots = [[[0.5, 0.0], [0.1, 0.4]], [[0.3, 0.0], [0.0, 1.0]]]
    return Mixed([0.3, 0.7], [[0.0, 2.0], [0.5, -1.0]], roots, [0.01, 0.05], **options)


def gains(posterior, x, size=1, seeds=8, **options):
    """Mean and standard error of the gains over seeds, and the index of the last choice."""
    found = [
        bm.choose(posterior, bm.Observations(x.unsqueeze(0)), size=size, generator=s, **options) for s in range(seeds)
    ]
    value = torch.stack([f.gains[0] for f in found])
    assert not found[0].closed_form
    return value.mean(0), value.std(0) / math.sqrt(seeds), found[-1].index[0]


def entropy_of_noise(posterior):
    return float((posterior.weights * 0.5 * (2 * math.pi * math.e * posterior.noise).log()).sum())


def entropy_by_quadrature(posterior, x):
    """Of one label."""
    means, scales = posterior.parts(x[None])
    means, sds, weights = means[:, 0].numpy(), scales[:, 0, 0].sqrt().numpy(), posterior.weights.numpy()

    def integrand(y):
        p = (weights * norm.pdf(y, means, sds)).sum()
        return -p * math.log(p) if p > 0 else 0.0

    ends = (means - 9 * sds).min(), (means + 9 * sds).max()
    return quad(integrand, *ends, points=sorted(means), limit=500)[0]


@pytest.mark.parametrize("at", [(1.0, 0.0), (1.0, 0.4), (1.0, 2.0)])
def test_the_information_of_one_label_is_that_of_quadrature(at):
    posterior, x = two_kinds(), torch.tensor([at], dtype=F64)
    truth = entropy_by_quadrature(posterior, x[0]) - entropy_of_noise(posterior)
    mean, error, _ = gains(posterior, x, num_outcomes=400)
    assert float(error) < 0.03
    assert abs(float(mean) - truth) < 5 * float(error)
    alone = Mixed([0.5, 0.5], posterior.means, posterior.roots, posterior.noise)  # control: other weights
    other = entropy_by_quadrature(alone, x[0]) - entropy_of_noise(alone)
    assert abs(float(mean) - other) > 5 * float(error)


def entropy_of_two(posterior, x, count=801):
    """Of two labels, on a grid."""
    means, scales = posterior.parts(x)
    sds = scales.diagonal(dim1=1, dim2=2).sqrt()
    axes = [
        np.linspace(float((means - 7 * sds)[:, i].min()), float((means + 7 * sds)[:, i].max()), count) for i in (0, 1)
    ]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    each = [multivariate_normal(m.numpy(), s.numpy()).logpdf(grid) for m, s in zip(means, scales, strict=True)]
    log_p = logsumexp(np.stack(each, -1), b=posterior.weights.numpy(), axis=-1)
    cell = (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
    assert abs(np.exp(log_p).sum() * cell - 1) < 1e-6
    return float(-(np.exp(log_p) * log_p).sum() * cell)


def test_the_second_label_counts_what_the_first_has_told():
    posterior, x = two_kinds(), torch.tensor([[1.0, 2.0], [1.0, 1.5]], dtype=F64)
    mean, error, index = gains(posterior, x, size=2, num_outcomes=800)
    first = entropy_by_quadrature(posterior, x[index[0]])
    truth = entropy_of_two(posterior, x[index]) - first - entropy_of_noise(posterior)
    assert float(error[1]) < 0.03
    assert abs(float(mean[1]) - truth) < 5 * float(error[1])
    alone = entropy_by_quadrature(posterior, x[index[1]]) - entropy_of_noise(posterior)
    assert alone - truth > 0.3, "control: by itself it would tell far more"


def entropy_of_student(df, log_det, size):
    """Of a Student-t of so many dimensions: Cover and Thomas; of one it is that of scipy."""
    half, more = df / 2, (df + size) / 2
    gammas = math.lgamma(half) - math.lgamma(more) + size / 2 * math.log(df * math.pi)
    psi = torch.digamma(torch.tensor([more, half], dtype=F64))
    return gammas + more * float(psi[0] - psi[1]) + log_det / 2


def test_student_t_have_their_entropies():
    """Of one component: the entropy of y, given σ² and φ, is that of a Normal, whose mean over σ² has a closed form."""
    df, noise = 5.0, 0.04
    assert entropy_of_student(df, 0.0, 1) == pytest.approx(float(t(df).entropy()))
    posterior = Mixed([1.0], [[0.0, 1.0]], [[[0.6, 0.0], [0.0, 0.9]]], [noise], df=df)
    x = torch.tensor([[1.0, 1.0], [1.0, -0.5]], dtype=F64)
    mean, error, index = gains(posterior, x, size=2, num_outcomes=800)
    scale = posterior.parts(x[index])[1][0]
    given = 0.5 * (
        math.log(2 * math.pi * math.e * noise) + math.log(df / 2) - float(torch.digamma(torch.tensor(df / 2)))
    )
    first = entropy_of_student(df, float(scale[0, 0].log()), 1)
    second = entropy_of_student(df, float(torch.logdet(scale)), 2) - first
    truth = torch.tensor([first - given, second - given], dtype=F64)
    assert (error < 0.03).all()
    assert ((mean - truth).abs() < 5 * error).all()
    assert abs(float(mean[0]) - 0.5 * math.log(float(scale[0, 0]) / noise)) > 5 * float(error[0]), (
        "control: as if Normal"
    )


def log_joint(parts, df, k, places, labels):
    """log density of some labels ``[J]`` each under component k of one task; 0 of none."""
    if not places:
        return 0.0
    loc, scale = parts.loc[k, 0][places], (parts.scale_tril @ parts.scale_tril.mT)[k, 0][places][:, places]
    root = torch.linalg.cholesky(scale)
    law = dist.MultivariateNormal(loc, scale_tril=root)
    law = law if df is None else dist.MultivariateStudentT(torch.tensor(df, dtype=F64), loc, root)
    return law.log_prob(torch.stack(labels, -1))


@pytest.mark.parametrize("df", [None, 3.0])
def test_densities_given_labels_are_those_of_the_joint(df):
    """log p(y_A | k) + log p(y_b | y_A, k) = log p(y_A, y_b | k) with none, one and two labels before, to rounding."""
    x = torch.tensor([[[1.0, 2.0], [1.0, 1.5], [1.0, -1.0], [1.0, 0.3]]], dtype=F64)
    posterior, mask = two_kinds(df=df), torch.ones(1, 4, dtype=torch.bool)
    greedy = _Greedy(elliptical(posterior, bm.Observations(x)), mask, 50, torch.Generator().manual_seed(0))
    parts = posterior.predictive(bm.Observations(x), joint=True).components
    chosen, seen = [], []
    for best in (2, 0, 3):
        mean = greedy._means()
        y = greedy._labels(mean)
        each = greedy._log_density(y, mean, greedy.left)
        before = [log_joint(parts, df, k, chosen, seen) for k in range(2)]
        for k in range(2):
            together = log_joint(parts, df, k, [*chosen, 1], [*seen, y[:, 0, 1]])
            torch.testing.assert_close(each[:, k, 0, 1] + before[k], together, rtol=0, atol=1e-9)
        if chosen:
            expected = (posterior.weights.log() + torch.stack(before, -1)).log_softmax(-1)
            torch.testing.assert_close(greedy.log_weights[:, :, 0], expected, rtol=0, atol=1e-9)
        greedy._condition(y, mean, each, torch.tensor([[best]]))
        chosen.append(best)
        seen.append(y[:, 0, best])


def test_which_component_it_is_counts():
    """Both components are equally unsure everywhere, and at one place they say different things."""
    root = 0.1 * torch.eye(2, dtype=F64)
    posterior = Mixed([0.5, 0.5], [[0.0, 3.0], [0.0, -3.0]], torch.stack([root, root]), [0.01, 0.01])
    x = torch.tensor([[math.cos(a), math.sin(a)] for a in (0.0, 0.1, 1.5)], dtype=F64)
    mean, _, index = gains(posterior, x)
    assert index[0] == 2
    within = 0.5 * math.log(2.0)  # the same at all three
    assert float(mean) == pytest.approx(within + math.log(2), abs=0.05)
    only = Mixed([1.0], [[0.0, 3.0]], root[None], [0.01])
    found = bm.choose(only, bm.Observations(x.unsqueeze(0)))
    assert float(found.gains) == pytest.approx(within, abs=1e-6), "control: one component has nothing to be told apart"


def test_tasks_are_chosen_for_by_themselves_and_chunks_do_not_matter(monkeypatch):
    x = torch.randn(5, 7, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    together = bm.choose(two_kinds(tasks=5), bm.Observations(x), num_outcomes=2000, size=2)
    monkeypatch.setattr("bayesmeta.diagnostics.information._MAX_ELEMENTS", 1)
    apart = bm.choose(two_kinds(tasks=5), bm.Observations(x), num_outcomes=2000, size=2)
    torch.testing.assert_close(apart.gains, together.gains, atol=0.1, rtol=0)
    assert (together.index[:, 0] != together.index[:, 1]).all()


def test_draws_cannot_see_what_the_closed_form_sees():
    """A label that says more than log(draws): by draws all such points look alike."""
    torch.manual_seed(0)
    model = bm.ConjugateModel(bm.nets.mlp(1, [16], 1), bm.Gaussian(1e-3), 3, spread=1.0)
    method = bm.BayesianLastLayerMixture(model)
    batch = bm.tasks.ChallengingSinusoid().sample(6, support=1, query=10, generator=0)
    method.prepare(batch)
    posterior = method.adapt(batch.support)
    found = bm.choose(posterior, batch.query)
    drawn = bm.choose(posterior, batch.query, exact=False, num_samples=20)
    assert (found.gains > math.log(20) + 0.5).all()
    assert (drawn.gains <= math.log(20) + 1e-9).all()


def test_closed_forms_and_draws_agree_where_labels_say_little():
    torch.manual_seed(0)
    for noise in ("known", "inverse_gamma"):
        model = bm.ConjugateModel(bm.nets.mlp(1, [8], 1), bm.Gaussian(1.0), 3, spread=1.0, noise=noise)
        method = bm.BayesianLastLayerMixture(model)
        batch = bm.tasks.ChallengingSinusoid().sample(4, support=3, query=2, generator=0)
        method.prepare(batch)
        posterior = method.adapt(batch.support)
        found = bm.choose(posterior, batch.query, num_outcomes=1000)
        drawn = bm.choose(posterior, batch.query, exact=False, num_samples=300, num_outcomes=200)
        error = (found.gains - drawn.gains).squeeze(-1)
        assert (found.gains > 0.1).all()
        assert abs(float(error.mean())) < 5 * float(error.std()) / math.sqrt(4) + 0.05
        assert float(error.abs().max()) < 0.3  # 4 / √200
        variance = bm.choose(posterior, batch.query, criterion="variance")
        assert variance.closed_form
        expected = posterior.predictive(batch.query).variance.double().max(-1).values
        torch.testing.assert_close(variance.gains[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_a_gaussian_process_learns_of_its_function():
    """Not of its values at the support alone, of which a point far away would say nothing."""
    model = bm.NeuralTaskModel(bm.nets.mlp(1, [8], 1), bm.Gaussian(0.1), "point")
    method = bm.DeepKernel(model, kernel="rbf", inputs="raw")
    support = bm.Observations(torch.tensor([[[0.0], [0.2]]]), torch.tensor([[0.1, 0.2]]))
    candidates = bm.Observations(torch.tensor([[[0.1], [4.0], [0.3]]]))
    method.prepare(bm.TaskBatch(support, support))
    posterior = method.adapt(support)
    found = bm.choose(posterior, candidates)
    assert found.closed_form
    assert found.index.tolist() == [[1]]
    variance = posterior.predictive(candidates).variance[0, 1]
    assert float(found.gains) == pytest.approx(0.5 * math.log(float(variance) / 0.1**2), rel=1e-4)


def test_another_predictive_is_left_to_draws():
    inputs = bm.Observations(torch.zeros(1, 2, 1))
    for joint in (
        dist.Normal(torch.zeros(1, 4), 1.0).to_event(1),
        dist.MultivariateNormal(torch.zeros(1, 8), torch.eye(8)),
    ):
        posterior = SimpleNamespace(predictive=lambda x, joint, found=joint: found)
        assert elliptical(posterior, inputs) is None
