"""Simulation-based calibration (Talts et al. 2018) of the methods that are exact on the linear-Gaussian hierarchy.

θ known, a task's φ and data drawn from the model by hand: then φ and draws from the exact posterior are exchangeable,
and the rank of the truth among n draws is uniform on 0 … n, as is that of any function of φ and the data. Source:
https://arxiv.org/abs/1804.06788, theorem 1. Ranks of the coordinates alone cannot tell the posterior from the prior;
functions that look at the data can (Modrák et al. 2023, https://arxiv.org/abs/2211.02383), so each method is also
judged by the log-likelihood of its support. All tasks are one batch under one fixed seed.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from scipy import stats
from torch import nn

import bayesmeta as bm
from bayesmeta.ops.random import as_generator
from bayesmeta.posteriors.base import Draws

F64 = torch.float64
SEED, TASKS, DRAWS, BINS = 20, 2000, 63, 16
#: chance that one of all rank tests of this file's methods fails by accident; each has its share (Bonferroni)
ALPHA = 0.01


# -- ranks and their uniformity -------------------------------------------------------------------------------------


def rank_of(truth, draws, generator):
    """How many of the draws ``[n, …]`` lie below the truth ``[…]``; ties are broken at random."""
    assert bool(truth.isfinite().all() & draws.isfinite().all())
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    uniform = torch.rand(truth.shape, generator=generator, dtype=F64)
    return below + (uniform * (equal + 1)).floor().long()


def uniformity(ranks, num_draws, num_bins, generator):
    """p-values of ranks being uniform on 0 … num_draws: χ² over equal bins, and Kolmogorov–Smirnov.

    The second is on (rank + U) / (num_draws + 1), U uniform, which is continuous and uniform where the rank is. The
    first sees wrong spread, the second wrong location.
    """
    assert (num_draws + 1) % num_bins == 0, "bins must hold equally many ranks"
    counts = torch.bincount(ranks * num_bins // (num_draws + 1), minlength=num_bins)
    smooth = (ranks + torch.rand(ranks.shape, generator=generator, dtype=F64)) / (num_draws + 1)
    return min(stats.chisquare(counts.numpy()).pvalue, stats.kstest(smooth.numpy(), "uniform").pvalue)


def p_values(truth, draws, num_draws=DRAWS):
    """The smaller of both p-values for each quantity by name."""
    assert truth.keys() == draws.keys()
    generator = as_generator(SEED, stream="ranks")
    found = {}
    for name, value in truth.items():
        assert draws[name].shape == (num_draws, *value.shape), name
        found[name] = uniformity(rank_of(value, draws[name], generator), num_draws, BINS, generator)
    return found


def test_ranks_and_p_values_are_what_they_say():
    """Under the null 5 to 10% of the p-values (the smaller of two) lie below 5%; ties are shared out at random."""
    generator = torch.Generator().manual_seed(0)
    low = [uniformity(torch.randint(0, 64, (500,), generator=generator), 63, 16, generator) < 0.05 for _ in range(400)]
    # three standard errors of the binomial beyond either end
    assert 0.05 * 400 - 3 * (400 * 0.05 * 0.95) ** 0.5 < sum(low) < 0.1 * 400 + 3 * (400 * 0.1 * 0.9) ** 0.5
    truth, draws = torch.rand(2000, generator=generator), torch.rand(63, 2000, generator=generator)
    ties = (truth * 3).floor(), (draws * 3).floor()
    assert uniformity(rank_of(*ties, generator), 63, 16, generator) > 1e-3
    assert uniformity((ties[1] < ties[0]).sum(0), 63, 16, generator) < 1e-12, "control: ties are not broken"
    assert (rank_of(torch.zeros(9), torch.ones(63, 9), generator) == 0).all()
    assert (rank_of(torch.ones(9), torch.zeros(63, 9), generator) == 63).all()


# -- the linear-Gaussian hierarchy ----------------------------------------------------------------------------------

MEAN = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
FACTOR = torch.tensor([[0.9], [-0.6], [0.5]], dtype=F64)
SCALE = torch.tensor([0.6, 1.0, 0.5], dtype=F64)
NOISE = 0.7


@dataclass
class Case:
    """A posterior of all simulated tasks, the truths by name, and how the same quantities come from draws.

    ``phi`` are the columns of u that controls change.
    """

    posterior: object
    truth: dict
    quantities: object
    phi: slice
    num_draws: int = DRAWS

    def draws(self):
        return self.posterior.draws(self.num_draws, SEED)

    def p_values(self, draws):
        return p_values(self.truth, self.quantities(draws), self.num_draws)


def masked_normal(y, mean, scale, mask):
    """log p(y | mean) of each task by hand."""
    each = -0.5 * ((y - mean) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)
    return each.masked_fill(~mask, 0.0).sum(-1)


def inputs(tasks, generator, features=3, shots=5):
    """x of five shots of which 1 … 5 are real, and of one new point: a constant, and numbers of variance 1."""
    x = 3**0.5 * (2 * torch.rand(tasks, shots + 1, features, generator=generator, dtype=F64) - 1)
    x[..., 0] = 1.0
    counts = torch.randint(1, shots + 1, (tasks, 1), generator=generator)
    return x[:, :shots], x[:, shots:], torch.arange(shots) < counts


def simulate(tasks, mean, root):
    """φ ~ N(mean, root rootᵀ), y = x · φ + noise: φ ``[tasks, 3]``, support, and one new observation."""
    generator = as_generator(SEED, stream="simulation")
    phi = mean + torch.randn(tasks, root.shape[-1], generator=generator, dtype=F64) @ root.mT
    x, new, mask = inputs(tasks, generator)
    y = (torch.cat([x, new], 1) @ phi.unsqueeze(-1)).squeeze(-1)
    y = y + NOISE * torch.randn(y.shape, generator=generator, dtype=F64)
    return phi, bm.Observations(x, y[:, :-1], mask), bm.Observations(new, y[:, -1:])


def linear_model(correlated=True):
    """A Linear on x whose weights are φ, the prior set by hand to N(MEAN, FACTOR FACTORᵀ + diag SCALE²)."""
    prior = bm.priors.LowRankNormal(1) if correlated else bm.priors.Normal()
    network = nn.Sequential(nn.Linear(3, 1, bias=False))
    model = bm.NeuralTaskModel(network, bm.Gaussian(NOISE), prior, task_modules="head").to(F64)
    with torch.no_grad():
        model.prior.loc.copy_(MEAN)
        model.prior.log_scale.copy_(SCALE.log())
        model.likelihood.log_scale.fill_(math.log(NOISE))  # it was float32
        if correlated:
            model.prior.factor.copy_(FACTOR)
    return model


def linear(make, tasks=TASKS, num_draws=DRAWS, correlated=True):
    """The case of a method of NeuralTaskModels; ``make`` takes model and support. The prior may be diagonal."""
    root = torch.diag(SCALE)
    phi, support, query = simulate(tasks, MEAN, torch.cat([FACTOR, root], -1) if correlated else root)
    posterior = make(linear_model(correlated), support)

    def quantities(draws):
        u = draws.u
        named = {f"phi_{i}": u[..., i] for i in range(3)}
        named["function"] = (u * query.x.squeeze(1)).sum(-1)
        named["log_likelihood"] = posterior.log_likelihood(support, draws=draws).sum(-1)
        named["y"] = posterior.predict(query.x, draws=draws, generator=SEED).squeeze(-1)
        return named

    mean = (support.x @ phi.unsqueeze(-1)).squeeze(-1)
    truth = {f"phi_{i}": phi[:, i] for i in range(3)}
    truth["function"] = (phi * query.x.squeeze(1)).sum(-1)
    truth["log_likelihood"] = masked_normal(support.y, mean, torch.tensor(NOISE, dtype=F64), support.mask)
    truth["y"] = query.y.squeeze(-1)
    return Case(posterior, truth, quantities, slice(0, 3), num_draws)


def last_layer():
    return linear(lambda model, support: bm.BayesianLastLayer(model).adapt(support))


def mixture_of_one():
    def make(model, support):
        return bm.BayesianLastLayerMixture(model, num_components=1).adapt(support)

    return linear(make, correlated=False)


def laplace():
    def make(model, support):
        method = bm.Laplace(model, curvature="full", solver="newton", inner_steps=1, inner_lr=1.0)
        return method.adapt(support)

    return linear(make)


def abml_full():
    """Many inner steps; the noise of the last ones is far below the posterior's own spread."""

    def make(model, support):
        method = bm.ABML(model, posterior="full", inner_steps=300, inner_lr=0.1, num_particles=20)
        return method.adapt(support, generator=SEED)

    return linear(make, tasks=400)


def nuts():
    """One chain of all tasks, thinned by 4 so that its draws are all but independent."""

    num_draws = 31

    def make(model, support):
        method = bm.NUTS(model, num_samples=4 * num_draws, warmup=100, num_chains=1, max_tree_depth=6)
        chain = method.adapt(support, generator=SEED)
        chain.draws = lambda num_samples, generator: Draws(chain.u[::4])
        return chain

    return linear(make, tasks=400, num_draws=num_draws)


# -- the same with a Gaussian process --------------------------------------------------------------------------------


def deep_kernel():
    """A linear kernel on a linear map of x: φ ~ N((m, 0, 0), v R Rᵀ), so that f(x) = φ · x."""
    root = torch.tensor([[0.9, 0.0, 0.0], [-0.5, 1.1, 0.0], [0.4, 0.2, 0.5]], dtype=F64)
    phi, support, query = simulate(TASKS, torch.tensor([0.7, 0.0, 0.0], dtype=F64), root)
    network = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 1))
    with torch.no_grad():
        network[0].weight.copy_(root.mT)
    model = bm.DeepKernelModel(network, bm.Gaussian(NOISE), "linear", inputs="features").to(F64)
    with torch.no_grad():
        model.trunk[0].weight.copy_(root.mT / 1.3)  # it was float32
        model.kernel.variance = 1.3**2
        model.mean.fill_(0.7)
        model.likelihood.log_scale.fill_(math.log(NOISE))
    posterior = bm.DeepKernel(model).adapt(support)

    def quantities(draws):
        f = posterior.named(draws)["f"]
        return {
            "f_0": f[..., 0],  # every task has a first shot
            "log_likelihood": posterior.log_likelihood(support, draws=draws).sum(-1),
            "y": posterior.predict(query.x, draws=draws, generator=SEED).squeeze(-1),
        }

    f = (support.x @ phi.unsqueeze(-1)).squeeze(-1)
    truth = {
        "f_0": f[:, 0],
        "log_likelihood": masked_normal(support.y, f, torch.tensor(NOISE, dtype=F64), support.mask),
        "y": query.y.squeeze(-1),
    }
    return Case(posterior, truth, quantities, slice(0, support.shots))


# -- several components, and noise that is inferred ------------------------------------------------------------------


def conjugate_model(outputs, components, noise):
    """A ConjugateModel on a tanh trunk, its parameters all different; components are apart in everything."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = bm.nets.mlp(3, [3], outputs, activation="tanh")
        model = bm.ConjugateModel(network, bm.Gaussian(NOISE), components, noise=noise, spread=0.8).to(F64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.4 * torch.randn_like(parameter))
            model.loc.add_(torch.randn_like(model.loc))
    return model


def draw_noise(model, k, generator):
    """A triangular root of each task's noise covariance ``[tasks, P, P]``, and its quantities."""
    if model.noise == "known":
        return (model.likelihood.scale * torch.eye(model.outputs, dtype=F64)).expand(len(k), -1, -1), {}
    if model.noise == "inverse_gamma":
        shape, rate = (p.detach()[k] for p in model.gamma_parameters())
        variance = rate / torch._standard_gamma(shape, generator)
        return torch.diag_embed(variance.sqrt()), {"noise_variance": variance[:, 0]}
    assert model.num_components == 1
    df, root = (p.detach()[0] for p in model.wishart_parameters())
    law = stats.invwishart(df.item(), (root @ root.mT).numpy(), seed=SEED)
    covariance = torch.from_numpy(law.rvs(len(k)))
    named = {"covariance_00": covariance[:, 0, 0], "covariance_01": covariance[:, 0, 1]}
    return torch.linalg.cholesky(covariance), named


@torch.no_grad()
def conjugate(outputs, components, noise, tasks=TASKS):
    """The case of a ConjugateModel, whose tasks are drawn by its definition: component, noise, weights, targets."""
    model = conjugate_model(outputs, components, noise)
    generator = as_generator(SEED, stream="simulation")
    x, new, mask = inputs(tasks, generator)
    selector = torch.randn(tasks, generator=generator, dtype=F64)
    edges = model.logits.softmax(0).cumsum(0)[:-1]
    k = (torch.special.ndtr(selector).unsqueeze(-1) > edges).sum(-1)
    root, truth = draw_noise(model, k, generator)
    normal = torch.randn(tasks, outputs, model.num_weights, generator=generator, dtype=F64)
    # conjugate: where the noise is inferred, the weights scale with it
    mixed = normal if noise == "known" else root @ normal
    scale = model.log_scale.exp()[k]
    phi = model.loc[k] + mixed * (scale.unsqueeze(-2) if noise == "inverse_wishart" else scale)
    design = model.features(torch.cat([x, new], 1))[torch.arange(tasks), k]
    f = design @ phi.mT  # [tasks, shots + 1, P]
    y = f + torch.randn(f.shape, generator=generator, dtype=F64) @ root.mT
    target = y if outputs > 1 else y.squeeze(-1)
    support = bm.Observations(x, target[:, :-1], mask)
    each = torch.distributions.MultivariateNormal(f, scale_tril=root.unsqueeze(1)).log_prob(y)
    for i in range(outputs * model.num_weights):
        truth[f"phi_{i}"] = phi.flatten(1)[:, i]
    truth["function"] = f[:, -1, -1]
    truth["log_likelihood"] = each[:, :-1].masked_fill(~mask, 0.0).sum(-1)
    truth["y"] = y[:, -1, 0]
    if components > 1:
        truth["selector"] = selector
    make = bm.BayesianLastLayer if components == 1 else bm.BayesianLastLayerMixture
    posterior = make(model).adapt(support)
    size = outputs * model.num_weights
    return Case(posterior, truth, ConjugateQuantities(posterior, support, new), slice(-size, None))


@dataclass
class ConjugateQuantities:
    posterior: object
    support: object
    new: torch.Tensor

    @torch.no_grad()
    def __call__(self, draws):
        model, values = self.posterior.program, self.posterior.named(draws)
        named = {}
        if "noise_variance" in values:
            named["noise_variance"] = values["noise_variance"][..., 0]
        if "noise_covariance" in values:
            for j in range(2):
                named[f"covariance_0{j}"] = values["noise_covariance"][..., 0, j]
        phi = values["phi"]
        for i in range(phi.shape[-1]):
            named[f"phi_{i}"] = phi[..., i]
        k = torch.zeros(phi.shape[:-1], dtype=torch.long)
        if model.num_components > 1:
            named["selector"], k = values["selector"], model.component(values["selector"])
        features = model.features(self.new, k).squeeze(-2)
        named["function"] = (features * phi.unflatten(-1, (model.outputs, -1))[..., -1, :]).sum(-1)
        named["log_likelihood"] = self.posterior.log_likelihood(self.support, draws=draws).sum(-1)
        y = self.posterior.predict(self.new, draws=draws, generator=SEED).squeeze(2)
        named["y"] = y[..., 0] if model.outputs > 1 else y
        return named


# -- all methods ----------------------------------------------------------------------------------------------------

#: how each case is made, and how many quantities it is judged by
CASES = {
    "last_layer": (last_layer, 6),
    "last_layer_inverse_gamma": (lambda: conjugate(1, 1, "inverse_gamma", tasks=1000), 8),
    "last_layer_inverse_wishart": (lambda: conjugate(2, 1, "inverse_wishart", tasks=400), 13),
    "last_layer_mixture_of_one": (mixture_of_one, 6),
    "last_layer_mixture": (lambda: conjugate(1, 3, "known"), 8),
    "last_layer_mixture_inverse_gamma": (lambda: conjugate(1, 3, "inverse_gamma", tasks=1000), 9),
    "laplace": (laplace, 6),
    "deep_kernel": (deep_kernel, 3),
    "abml_full": (abml_full, 6),
    "nuts": (nuts, 6),
}
LIMIT = ALPHA / (2 * sum(count for _, count in CASES.values()))
SLOW = ["nuts"]
each_case = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES]
)


def with_phi(case, change):
    """The draws with another φ: ``change`` takes and gives its columns, ``[n, tasks, …]``."""
    u = case.draws().u.clone()
    u[..., case.phi] = change(u[..., case.phi])
    return Draws(u)


def stretched(factor, shift=0.0):
    """Draws of another scale, or shifted by so many standard deviations."""
    return lambda phi: phi.mean(0) + factor * (phi - phi.mean(0)) + shift * phi.std(0)


def mixed_up(phi):
    """Coordinates of different draws together: each has its own law, but they are independent."""
    return torch.stack([phi[..., i].roll(i + 1, 0) for i in range(phi.shape[-1])], -1)


def of_coordinates(found):
    return {name: p for name, p in found.items() if name.startswith(("phi", "f_", "noise", "covariance", "selector"))}


@each_case
def test_ranks_of_the_truth_are_uniform(name):
    make, count = CASES[name]
    case = make()
    found = case.p_values(case.draws())
    assert len(found) == count
    assert min(found.values()) > LIMIT, found
    # controls: half the scale, double, half a standard deviation off
    for change in (stretched(0.5), stretched(2.0), stretched(1.0, 0.5)):
        found = case.p_values(with_phi(case, change))
        wrong = [p for name, p in found.items() if name.startswith(("phi", "f_"))]
        assert max(wrong) < 1e-6, found
    # the prior as posterior, and independent coordinates: only what looks at data, or at all of φ, sees it
    for draws in (case.posterior.prior_draws(case.num_draws, SEED), with_phi(case, mixed_up)):
        found = case.p_values(draws)
        assert min(of_coordinates(found).values()) > LIMIT, found
        assert found["log_likelihood"] < 1e-6, found


def test_forgotten_data_are_seen_by_the_log_likelihood_alone():
    """The posterior of all but the first observation is that of other data: calibrated, and not the one asked for."""
    case = last_layer()
    support = case.posterior.support
    fewer = bm.Observations(support.x[:, 1:], support.y[:, 1:], support.mask[:, 1:])
    found = case.p_values(bm.BayesianLastLayer(linear_model()).adapt(fewer).draws(DRAWS, SEED))
    assert min(of_coordinates(found).values()) > LIMIT
    assert found["log_likelihood"] < 1e-6
    # counted twice, it makes the posterior too narrow
    twice = bm.Observations(*(torch.cat([part] * 2, 1) for part in (support.x, support.y, support.mask)))
    found = case.p_values(bm.BayesianLastLayer(linear_model()).adapt(twice).draws(DRAWS, SEED))
    assert max(p for name, p in found.items() if name.startswith("phi")) < 1e-6


def test_wrong_noise_and_wrong_components_are_seen():
    """Controls on the columns of u before φ: the selector, and the logarithm of the noise's variance."""
    case = conjugate(1, 3, "inverse_gamma")
    right = case.draws().u
    for column, quantity in ((0, "selector"), (1, "noise_variance")):
        u = right.clone()
        centre = u[..., column].mean(0)
        u[..., column] = centre + 0.5 * (u[..., column] - centre)
        assert case.p_values(Draws(u))[quantity] < 1e-6
