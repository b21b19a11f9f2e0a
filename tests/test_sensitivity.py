"""Sensitivity to prior and likelihood by power-scaling, against ArviZ, closed forms and inference anew."""

import math
from dataclasses import dataclass, replace

import arviz_base
import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import batch_of
from scipy.integrate import quad
from scipy.stats import norm

import bayesmeta as bm
from bayesmeta.errors import (
    DataError,
    EmptyTaskError,
    NonFiniteDataError,
    OptionError,
    ShapeError,
    UnsupportedError,
)
from bayesmeta.ops.random import as_generator

F64 = torch.float64


@dataclass
class Phi:
    """Draws of φ, ``[n, tasks]``."""

    u: torch.Tensor


class Normals:
    """φ_t ~ N(0, s_t²), y_tj ~ N(φ_t, 1): the exact posterior, for each task a prior of its own."""

    is_point, num_draws, target_kind = False, None, "real"

    def __init__(self, support, prior_scale):
        self.support, self.num_tasks = support, support.num_tasks
        self.prior_scale = prior_scale
        self.count = support.full_mask().sum(-1).to(F64)
        self.total = torch.where(support.full_mask(), support.y, 0.0).sum(-1)

    def moments(self, prior=1.0, likelihood=1.0):
        """Mean and standard deviation under powers of prior and likelihood, in closed form."""
        precision = prior / self.prior_scale**2 + likelihood * self.count
        return likelihood * self.total / precision, precision**-0.5

    def draws(self, num_samples, generator=None):
        generator = as_generator(generator, stream="draws")
        mean, sd = self.moments()
        return Phi(mean + sd * torch.randn(num_samples, self.num_tasks, generator=generator, dtype=F64))

    def named(self, draws):
        return {"phi": draws.u, "both": torch.stack([draws.u, draws.u**3], -1)}

    def named_theta(self, draws):
        return {}

    def log_prior(self, draws, *, jacobian=True):
        return dist.Normal(0.0, self.prior_scale).log_prob(draws.u)

    def log_likelihood(self, observations, *, draws):
        value = dist.Normal(draws.u.unsqueeze(-1), 1.0, validate_args=False).log_prob(observations.y)
        return torch.where(observations.full_mask(), value, 0.0)


def normals(scales=(0.3, 1.0, 10.0), means=(2.0, 2.0, 2.0), shots=3):
    means = torch.tensor(means, dtype=F64)
    y = means.unsqueeze(-1) + torch.linspace(-1, 1, shots, dtype=F64)
    x = torch.zeros(len(means), shots, 1, dtype=F64)
    return Normals(bm.Observations(x, y), torch.tensor(scales, dtype=F64))


def distance(one, two, low, high):
    """Cumulative Jensen–Shannon distance of two Normals (mean, sd) on a range, on which it depends, by quadrature."""
    best = 0.0
    for side in (norm.cdf, norm.sf):

        def p(x, side=side):
            return side(x, *one)

        def q(x, side=side):
            return side(x, *two)

        def each(x, p=p, q=q):
            a, b = p(x), q(x)
            return sum(v * math.log2(2 * v / (a + b)) for v in (a, b) if v > 0)

        total = quad(each, low, high, limit=400, epsabs=1e-13)[0]
        bound = quad(lambda x, p=p, q=q: p(x) + q(x), low, high, limit=400)[0]
        best = max(best, math.sqrt(max(total, 0.0) / bound))
    return best


# -- truth --------------------------------------------------------------------------------------------------------


def test_each_task_alone_is_what_arviz_says():
    posterior = normals()
    draws = posterior.draws(1000, 0)
    found = bm.sensitivity(posterior, num_samples=1000, generator=0)
    like = posterior.log_likelihood(posterior.support, draws=draws)
    for task in range(3):
        groups = {
            "posterior": {name: v[None, :, task].numpy() for name, v in posterior.named(draws).items()},
            "log_prior": {"phi": posterior.log_prior(draws)[None, :, task].numpy()},
            "log_likelihood": {"y": like[None, :, task].numpy()},
        }
        tree = arviz_base.from_dict(groups)
        for part, ours in (("prior", found.prior), ("likelihood", found.likelihood)):
            theirs = arviz_stats.psense(tree, group=part)
            for name in ("phi", "both"):
                np.testing.assert_allclose(ours[name][task].numpy(), theirs[name].values, rtol=1e-6, atol=1e-12)
    groups = {
        "posterior": {"phi": draws.u[None].numpy()},
        "log_prior": {"phi": posterior.log_prior(draws)[None].numpy()},
        "log_likelihood": {"y": like[None].numpy()},
    }
    together = arviz_stats.psense(arviz_base.from_dict(groups), group="prior")["phi"].values
    assert np.abs(together / found.prior["phi"].numpy() - 1).max() > 0.5, "control: the sum over all tasks is another"


def positive(x, y=None, mask=None):
    with bm.task_plate(x):
        slope = pyro.sample("slope", dist.Normal(x.new_tensor(0.0), 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(x.new_tensor(-1.0), 0.5))
        with bm.shot_plate(x, mask):
            return pyro.sample("y", dist.Normal(slope * x.squeeze(-1), sigma), obs=y)


def test_a_tree_of_one_task_says_the_same_to_arviz():
    """Of a positive site too: densities are of its own values, in the tree and here."""
    support = batch_of(1, 4, dtype=F64)
    program = bm.TaskProgram(positive)
    program.prepare(support)
    u = torch.randn(500, 1, 2, dtype=F64, generator=torch.Generator().manual_seed(0)) * 0.5
    posterior = bm.SamplesPosterior(program, support, u)
    found = bm.sensitivity(posterior)
    tree = bm.to_datatree(posterior, bm.TaskBatch(support, support), num_samples=500)
    for part, ours in (("prior", found.prior), ("likelihood", found.likelihood)):
        theirs = arviz_stats.psense(tree, group=part)
        for name in ("slope", "sigma"):
            np.testing.assert_allclose(ours[name].numpy(), theirs[name].values, rtol=1e-6, atol=1e-12)


def test_mean_and_spread_move_as_in_closed_form():
    posterior = normals()
    found = bm.sensitivity(posterior, num_samples=20_000)
    _, sd = posterior.moments()
    step, n = 1e-4, 20_000
    for part, shift, spread in (
        ("prior", found.prior_shift, found.prior_spread),
        ("likelihood", found.likelihood_shift, found.likelihood_spread),
    ):
        up, down = (posterior.moments(**{part: 1 + s}) for s in (step, -step))
        doubling = math.log2((1 + step) / (1 - step))
        true_shift = (up[0] - down[0]) / sd / doubling
        true_spread = (up[1] / down[1]).log() / doubling
        # covariances of φ and φ² with a quadratic of φ: of order 1 + 3 |slope| over √n
        error = 5 * (1 + 3 * true_shift.abs()) / math.sqrt(n) * 2
        assert ((shift["phi"] - true_shift).abs() < error).all()
        assert ((spread["phi"] - true_spread).abs() < error).all()
    assert (found.prior_shift["phi"] < 0).all()
    assert (found.likelihood_shift["phi"] > 0).all()
    torch.testing.assert_close(found.prior_shift["phi"], -found.likelihood_shift["phi"], atol=0.1, rtol=0.05)


def test_the_distance_is_that_of_the_exact_posteriors():
    posterior = normals()
    found = bm.sensitivity(posterior, num_samples=20_000, generator=0)
    draws = posterior.draws(20_000, 0).u
    for part, figures in (("prior", found.prior), ("likelihood", found.likelihood)):
        for task in range(3):
            here = [float(v[task]) for v in posterior.moments()]
            truth = 0.0
            for alpha in (0.99, 1.01):
                there = [float(v[task]) for v in posterior.moments(**{part: alpha})]
                truth += (
                    distance(here, there, float(draws[:, task].min()), float(draws[:, task].max()))
                    / abs(math.log2(alpha))
                    / 2
                )
            assert float(figures["phi"][task]) == pytest.approx(truth, rel=0.05, abs=2e-3)


def test_weights_say_what_inference_anew_says():
    """A real method under a prior that is raised to a power, which for a Normal is another Normal."""
    batch = bm.tasks.Sinusoid(noise=0.2).sample(6, support=3, query=3, generator=0)

    def posterior(alpha):
        torch.manual_seed(0)
        network = bm.nets.mlp(1, [4], 1, activation="tanh")
        prior = bm.priors.Normal(alpha**-0.5, learn_scale=False)
        model = bm.NeuralTaskModel(network, bm.Gaussian(0.5), prior, task_modules="head")
        method = bm.BayesianLastLayer(model)
        method.prepare(batch)
        return method.adapt(batch.support)

    alphas = (0.8, 1.25)
    found = bm.sensitivity(posterior(1.0), alphas=alphas, num_samples=20_000)
    here, low, high = (posterior(alpha) for alpha in (1.0, *alphas))
    doublings = math.log2(alphas[1] / alphas[0])
    names = list(found.prior)
    assert names == ["2.weight", "2.bias"]
    exact = {name: _moments(each) for name, each in (("here", here), ("low", low), ("high", high))}
    for name in names:
        sd = exact["here"][name][1]
        shift = (exact["high"][name][0] - exact["low"][name][0]) / sd / doublings
        spread = (exact["high"][name][1] / exact["low"][name][1]).log() / doublings
        error = 0.05  # of 20 000 draws, and of 20 000 in each of the three
        assert ((found.prior_shift[name] - shift).abs() < error).all()
        assert ((found.prior_spread[name] - spread).abs() < error).all()
    assert found.prior_shift["2.weight"].abs().max() > 0.2, "control: there is something to see"


def _moments(posterior):
    draws = posterior.sample(20_000, generator=7)
    return {name: (v.double().mean(0), v.double().std(0)) for name, v in draws.items()}


def test_tasks_do_not_see_each_other():
    together = bm.sensitivity(normals(), num_samples=500)
    posterior = normals(means=(2.0, -30.0, 2.0))
    other = bm.sensitivity(posterior, num_samples=500)
    for task, same in ((0, True), (1, False), (2, True)):
        assert torch.equal(together.prior["phi"][task], other.prior["phi"][task]) is same


# -- what it says -------------------------------------------------------------------------------------------------


def test_diagnoses():
    # a tight prior far from the data, a wide one, one that says all and agrees
    posterior = normals((0.4, 30.0, 0.02), (3.0, 3.0, 0.0))
    batch = bm.TaskBatch(posterior.support, posterior.support, names=("far", "free", "tight"))
    found = bm.sensitivity(posterior, batch)
    assert found.diagnoses == ("prior-data conflict", "none", "strong prior / weak likelihood")
    assert found.conflict("phi").tolist() == [True, False, False]
    assert found.strong_prior("phi").tolist() == [False, False, True]
    assert found.names == ("far", "free", "tight")
    assert found.verdict.startswith("Of 9 φ of 3 tasks: prior-data conflict in 33%")
    assert [line.split()[0] for line in str(found).splitlines()[2:]] == ["phi", "both"]
    padded = bm.sensitivity(posterior, replace(batch, task_id=torch.tensor([-1, 1, 2])))
    assert padded.names == ("free", "tight")
    assert padded.prior["both"].shape == (2, 2)
    strict = bm.sensitivity(posterior, batch, threshold=1e-9)
    assert strict.finding == "prior-data conflict"


def test_a_task_without_support_leans_on_its_prior_alone():
    posterior = normals()
    mask = torch.tensor([[True] * 3, [False] * 3, [True, False, False]])
    found = bm.sensitivity(Normals(replace(posterior.support, mask=mask), posterior.prior_scale))
    assert found.likelihood["phi"][1] < 1e-6  # the root of a rounding error
    assert found.likelihood_shift["phi"][1].abs() < 1e-9
    assert found.diagnoses[1] == "strong prior / weak likelihood"
    assert found.likelihood["phi"][2] > 0.05


# -- bad input ----------------------------------------------------------------------------------------------------


def test_bad_options():
    posterior = normals()
    for alphas in ((1.0, 1.1), (0.9, 0.99), (0.0, 1.1), (0.9, math.inf), (1.1, 0.9)):
        with pytest.raises(OptionError, match="above 1"):
            bm.sensitivity(posterior, alphas=alphas)
    with pytest.raises(OptionError, match="threshold=0"):
        bm.sensitivity(posterior, threshold=0.0)
    with pytest.raises(OptionError, match="at least 100"):
        bm.sensitivity(posterior, num_samples=50)


def test_bad_data():
    posterior = normals()
    with pytest.raises(ShapeError, match="adapted to 3"):
        bm.sensitivity(posterior, bm.TaskBatch(*[posterior.support.tasks([0, 1])] * 2))
    padding = torch.tensor([-1, -1, -1])
    with pytest.raises(EmptyTaskError, match="padding"):
        bm.sensitivity(posterior, bm.TaskBatch(posterior.support, posterior.support, task_id=padding))
    posterior.log_prior = lambda draws, jacobian=True: torch.where(
        torch.tensor([False, True, False]), math.nan, draws.u
    )
    with pytest.raises(NonFiniteDataError, match="log-density of the prior at the draws is not finite for task 1"):
        bm.sensitivity(posterior)
    posterior.support = posterior.support.with_y(None)
    with pytest.raises(DataError, match="y=None"):
        bm.sensitivity(posterior)


def test_what_has_no_prior_to_scale_is_refused():
    torch.manual_seed(0)
    batch = bm.tasks.Sinusoid().sample(4, support=5, query=3, generator=0)
    point = bm.MAML(bm.NeuralTaskModel(bm.nets.mlp(1, [4], 1), bm.Gaussian(0.3), prior="point"))
    point.prepare(batch)
    with pytest.raises(UnsupportedError, match="point estimate"):
        bm.sensitivity(point.adapt(batch.support))
