"""Where the demo's mixture begins: principal curves of the training tasks as features, components by EM.

Gradient steps from random weights find poor mixtures of few tasks, and end on evidences that few tasks are overfitted
by. Both steps here are in closed form and regularised.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.demo.baselines import trajectories
from bayesmeta.errors import OptionError, UnsupportedError
from bayesmeta.models.conjugate import ConjugateModel
from bayesmeta.models.likelihoods import Gaussian
from bayesmeta.ops.random import as_generator
from bayesmeta.posteriors.conjugate import ConjugatePosterior
from bayesmeta.tasks.table import TableTasks

#: A component's variances before it has seen a task, as a share of those of all tasks.
WITHIN = 0.25
#: As how many tasks the priors of a component's variance, mean and probability count.
PRIOR_TASKS = {"variance": 2.0, "mean": 1.0, "probability": 1.0}


class Curves(NamedTuple):
    """Functions of one input that are linear between knots: times ``[J]``, values ``[F, J]``."""

    knots: Tensor
    values: Tensor


def principal_curves(table: TableTasks, count: int) -> Curves:
    """Leading principal curves of the complete training tasks, each with the scale that it has among them, and their
    mean curve as the last; in standard units where the table has a standardizer.

    Args:
        table: with one input and tasks that are all observed at the same times.
        count: of principal curves.

    Raises:
        OptionError: for fewer than 1, or as many as there are tasks or times.
        EmptyTaskError, DataError: if fewer than 10 tasks are complete, or for another number of inputs.
    """
    knots, paths = trajectories(table)
    if not 1 <= count < min(paths.shape):
        raise OptionError(f"count={count}; expected from 1 to {min(paths.shape) - 1} principal curves of this table.")
    units = table.standardizer
    if units is not None:
        knots = (knots - units.x_mean.double()) / units.x_scale.double()
        paths = (paths - units.y_mean.double()) / units.y_scale.double()
    mean = paths.mean(0)
    _, size, rows = torch.linalg.svd(paths - mean, full_matrices=False)
    scaled = size[:count, None] / len(paths) ** 0.5 * rows[:count]
    return Curves(knots, torch.cat([scaled, mean.unsqueeze(0)]))


def curve_network(num_knots: int, num_curves: int) -> nn.Sequential:
    """A network whose features are piecewise linear, to be filled by :func:`set_curves`; the head has no bias."""
    if num_knots < 2 or num_curves < 1:
        raise OptionError(f"A curve needs at least 2 knots; got {num_knots} knots and {num_curves} curves.")
    hidden = nn.Linear(1, num_knots - 1)
    network = nn.Sequential(
        hidden, nn.ReLU(), nn.Linear(num_knots - 1, num_curves), nn.Linear(num_curves, 1, bias=False)
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    return network


def set_curves(trunk: nn.Sequential, curves: Curves) -> None:
    """Make the features these curves: level before the first knot, and straight on behind the last one.

    Raises:
        OptionError: for another number of knots or curves than the network was made for.
    """
    ramps, mix = trunk[0], trunk[2]
    assert isinstance(ramps, nn.Linear)
    assert isinstance(mix, nn.Linear)
    found, wanted = (len(curves.knots), len(curves.values)), (ramps.out_features + 1, mix.out_features)
    if found != wanted:
        raise OptionError(f"There are {found[0]} knots and {found[1]} curves; the network is for {wanted}.")
    slopes = curves.values.diff(dim=1) / curves.knots.diff()
    with torch.no_grad():
        ramps.weight.fill_(1.0)
        ramps.bias.copy_(-curves.knots[:-1])
        mix.weight.copy_(torch.cat([slopes[:, :1], slopes.diff(dim=1)], 1))
        mix.bias.copy_(curves.values[:, 0])


def curve_mixture(
    num_knots: int, num_curves: int, num_components: int, noise_scale: float, seed: int = 0
) -> ConjugateModel:
    """The untrained model: components share the features, which training leaves alone, as it does the noise."""
    network = curve_network(num_knots, num_curves + 1)
    model = ConjugateModel(network, Gaussian(noise_scale), num_components, latent_size=1, spread=0.0, seed=seed)
    model.trunk.requires_grad_(False)
    return model


def begin(
    model: ConjugateModel, table: TableTasks, *, restarts: int, noise_scale: float, iterations: int, seed: int
) -> None:
    """Principal curves as features, and components by EM: all of θ in closed form.

    Args:
        model: from :func:`curve_mixture`.
        table: the training tasks, with a standardizer.
        restarts, iterations, seed: of :func:`fit_components`.
        noise_scale: in raw units.
    """
    assert table.standardizer is not None
    curves = principal_curves(table, model.num_weights - 1)
    set_curves(model.trunk.layers, curves)
    with torch.no_grad():
        model.loc.zero_()
        model.loc[..., -1] = 1.0  # the mean curve, once
        model.log_scale.zero_()
        model.log_scale[..., -1] = -4.0  # and hardly more or less of it
        model.likelihood.load_state_dict(Gaussian(noise_scale / float(table.standardizer.y_scale)).state_dict())
    fit_components(model, table.all(support=0, query=None).union(), restarts, iterations, seed)


@torch.no_grad()
def fit_components(
    model: ConjugateModel, observations: Observations, restarts: int, iterations: int, seed: int
) -> None:
    """Fit the components' probabilities, means and variances to tasks by EM (Dempster, Laird & Rubin, JRSS B 39, 1977).

    Weights of a task are latent, with the exact posterior of each component: for the mean and variance of component k

        m = (Σ_t r_t E[φ_t] / s² + κ m₀ / s₀²) / (N / s² + κ / s₀²)
        s² = (Σ_t r_t (Var[φ_t] + (E[φ_t] − m)²) + ν w s₀²) / (N + ν)

    with r_t = p(k | S_t), N = Σ_t r_t, and m₀, s₀² the model's first mean and variance. Each raises the posterior
    density of θ = (π, m, s²) under the prior m ~ N(m₀, s₀² / κ), p(s²) ∝ s^−ν exp(−ν w s₀² / 2 s²), and a Dirichlet
    that counts as one task in each component; κ and ν are in :data:`PRIOR_TASKS`, w is :data:`WITHIN`. (The new m is
    with the old s²: Meng & Rubin, "Maximum likelihood estimation via the ECM algorithm", Biometrika 80, 1993,
    https://doi.org/10.1093/biomet/80.2.267.)

    The components are ``restarts`` mixtures of equally many, each from other first means, weights of tasks drawn at
    random; that is, EM runs in each by itself, and the model is their mean.

    Args:
        model: with noise of known scale and one output; its first component says m₀ and s₀².
        observations: of the training tasks.
        restarts: a divisor of the model's number of components.
        iterations: of EM.
        seed: of the first means.

    Raises:
        OptionError: for restarts that do not divide the components, or more components in each than tasks.
        UnsupportedError: for another model.
    """
    size, tasks = model.num_components // max(restarts, 1), observations.num_tasks
    if restarts < 1 or size * restarts != model.num_components or size > tasks or iterations < 1:
        raise OptionError(
            f"restarts={restarts}, iterations={iterations}; expected restarts that divide the {model.num_components} "
            f"components, into parts of at most {tasks}, one for each task, and at least 1 iteration."
        )
    if model.noise != "known" or model.outputs != 1:
        raise UnsupportedError("EM is for one output and noise of known scale.")
    generator = as_generator(seed, observations.device, "first components")
    loc0, variance0 = model.loc[:1].clone(), (2 * model.log_scale[:1]).exp()
    first = ConjugatePosterior.condition(model, observations).belief.loc[:, 0]
    chosen = torch.cat(
        [torch.randperm(tasks, generator=generator, device=first.device)[:size] for _ in range(restarts)]
    )
    model.loc.copy_(first[chosen])
    model.log_scale.copy_((0.5 * (WITHIN * variance0).log()).expand_as(model.log_scale))
    model.logits.zero_()
    counts = PRIOR_TASKS
    for _ in range(iterations):
        posterior = ConjugatePosterior.condition(model, observations)
        share = posterior.log_joint_component.unflatten(-1, (restarts, size)).softmax(-1).flatten(-2)
        mean, variance = posterior.belief.loc, posterior.belief.root.square().sum(-1)
        weight, number = share[..., None, None], share.sum(0)[:, None, None]
        ratio = counts["mean"] * (2 * model.log_scale).exp() / variance0
        loc = ((weight * mean).sum(0) + ratio * loc0) / (number + ratio)
        spread = (weight * (variance + (mean - loc).square())).sum(0) + counts["variance"] * WITHIN * variance0
        model.loc.copy_(loc)
        model.log_scale.copy_(0.5 * (spread / (number + counts["variance"])).log())
        model.logits.copy_((number.flatten() + counts["probability"]).log())
