"""Likelihoods p(y | network output). Their parameters, where learned, are θ.

Several targets at once are independent given the output, with event shape ``[outputs]``. Log-densities are finite, and
their gradients too, for outputs within ±50 in float32; no output is clamped. Those of counts are computed in float64
inside, whatever comes in.
"""

from bayesmeta.models.likelihoods.base import Likelihood
from bayesmeta.models.likelihoods.classes import Bernoulli, Categorical
from bayesmeta.models.likelihoods.counts import NegativeBinomial, Poisson
from bayesmeta.models.likelihoods.real import Gaussian, HeteroscedasticGaussian, StudentT

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "HeteroscedasticGaussian",
    "Likelihood",
    "NegativeBinomial",
    "Poisson",
    "StudentT",
]
