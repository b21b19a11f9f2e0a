"""Every likelihood, with models and data for it, that several tests use."""

import torch
from torch import nn

import bayesmeta as bm
from bayesmeta.models.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    NegativeBinomial,
    Poisson,
    StudentT,
)

F64 = torch.float64

#: Likelihoods for so many targets.
CASES = {
    "gaussian": lambda targets=1, **o: Gaussian(0.7, learn_scale=True),
    "gaussian_each": lambda targets=1, **o: Gaussian([0.3 + 0.4 * i for i in range(targets)], learn_scale=True),
    "heteroscedastic": lambda targets=1, **o: HeteroscedasticGaussian(0.01),
    "student": lambda targets=1, **o: StudentT(3.5, 0.7, learn_df=True, learn_scale=True),
    "bernoulli": lambda targets=1, **o: Bernoulli(),
    "categorical": lambda targets=1, **o: Categorical(4),
    "poisson": lambda targets=1, **o: Poisson(**o),
    "negative_binomial": lambda targets=1, **o: NegativeBinomial(1.7, learn_concentration=True, **o),
}
COUNTS = ("poisson", "negative_binomial")
#: Every likelihood with one target and, but for the class, with two.
WIDTHS = [(name, targets) for name in CASES for targets in (1, 2) if (name, targets) != ("categorical", 2)]


def kind_of(name):
    return "count" if name in COUNTS else "class" if name in ("bernoulli", "categorical") else "real"


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def data(name, targets=1, exposure=None, shape=(3, 5), seed=0):
    """Outputs ``[2, *shape, width]``, targets of the likelihood there, and the likelihood, float64."""
    likelihood = CASES[name](targets, exposure=exposure).double() if name in COUNTS else CASES[name](targets).double()
    output = noise(2, *shape, likelihood.num_outputs(targets), seed=seed)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        y = likelihood.distribution(output[0]).sample().to(F64)
    return likelihood, output, y


def model_of(name, dtype=F64, exposure=None, targets=1, prior="normal", features=2, likelihood=None):
    options = {"exposure": exposure} if name in COUNTS else {}
    likelihood = CASES[name](targets, **options) if likelihood is None else likelihood
    fed = features - (exposure is not None)
    generator = torch.Generator().manual_seed(3)
    network = bm.nets.mlp(fed, [4], likelihood.num_outputs(targets), activation="tanh")
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0.0, 0.4, generator=generator)
    return bm.NeuralTaskModel(network, likelihood, prior).to(dtype)


def observations_of(name, dtype=F64, exposure=None, targets=1, ragged=True, seed=0):
    """Three tasks of 5 points, with garbage that is no exposure in the padding."""
    model = CASES[name](targets).double()
    x = noise(3, 5, 2, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        y = model.distribution(noise(3, 5, model.num_outputs(targets), seed=seed + 1)).sample()
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]]) if ragged else None
    if exposure is not None:
        x[..., exposure] = x[..., exposure].exp()
        if ragged:
            x[..., exposure] = torch.where(mask, x[..., exposure], 0.0)
    return bm.Observations(x.to(dtype), y.to(dtype), mask)


VARIANTS = [(name, None, targets) for name, targets in WIDTHS]
VARIANTS += [(name, column, 1) for name in COUNTS for column in (0, 1, -1)]
