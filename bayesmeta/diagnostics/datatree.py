"""A posterior and its predictions, or a whole run, as an ArviZ DataTree with a ``task`` dimension.

Groups: ``posterior``, ``prior``, ``log_prior``, ``sample_stats``; of the support, which was conditioned on:
``posterior_predictive``, ``prior_predictive``, ``log_likelihood``, ``observed_data``, ``constant_data``; of the query:
``predictions`` and ``predictions_constant_data`` (inputs, and targets where they are known); of training:
``fit_stats``. Dimensions: ``chain``, ``draw``, ``task``, ``feature``, ``output`` and, flat over the real observations
of all tasks, ``obs_id`` (support) and ``query_id`` (query), with the coordinates ``task_of_obs`` and ``task_of_query``
that say whose they are; ``step`` of training. Padding is left out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.diagnostics.checks import as_batch, check_same_support
from bayesmeta.diagnostics.datatree_groups import NO_LOO, Export, build_tree, refusal_of
from bayesmeta.diagnostics.forecasts import Predictor
from bayesmeta.errors import DataError, NonFiniteDataError, OptionError, UnsupportedError
from bayesmeta.ops.random import Seed
from bayesmeta.protocols import Posterior

if TYPE_CHECKING:
    from xarray import DataTree

#: Fewer leave PSIS-LOO less than 20 weights (a fifth) to fit the tail of; and with 100 draws even Pareto k above
#: 1 − 1 / log10(100) = 0.5 would be too large (Vehtari et al. 2024, https://arxiv.org/abs/1507.02646).
_LEAST_DRAWS = 100
#: Draws of a posterior that can make any number of them.
_DRAWS = 1000


@torch.no_grad()
def to_datatree(
    posterior: Posterior,
    batch: TaskBatch | Observations,
    *,
    num_samples: int | None = None,
    chains: int | None = None,
    generator: Seed = None,
    raw_units: bool = True,
    losses: Sequence[float] | None = None,
) -> DataTree:
    """Export a posterior to ArviZ. For a whole run of :class:`~bayesmeta.MetaSVI` call its own ``to_datatree``.

    ``log_likelihood`` is of the support, since leave-one-out is about the data that was conditioned on; a point
    estimate gets none, so that ``loo`` refuses it. For variational draws :func:`loo` corrects for the difference
    between posterior and approximation, which ``arviz.loo`` on the tree cannot. ``log_prior`` holds log p(φ | θ) of
    each task as ``phi``, and log p(θ) as ``global_sites`` where θ has sites: densities in the sites' own space, which
    is what ``psense`` scales. Latent sites keep their names (a ``/`` becomes ``.``, and a name
    that is taken here, such as ``y`` or ``task``, gets an underscore) and their own units, those of the standardised
    data if there is a standardiser. For a point estimate use ``summary(tree, kind="stats")``: the rest divides by the
    variance of the draws, which is 0.

    ``sample_stats`` has, of a sampler, what it said of each transition, by ArviZ's names (``lp``, ``diverging``,
    ``acceptance_rate``, ``energy``, ``tree_depth``, ``n_steps``, ``step_size``, ``reached_max_treedepth``); its chains
    run over all tasks together. Of draws from a density it has ``log_p`` and ``log_q``, the log-densities under the
    model, with the data, and under the posterior, and ``log_weights``, their difference, the log importance weights,
    not normalised: for each task, or, where θ was drawn with all of φ, for each draw.

    Args:
        posterior: adapted to ``batch.support``.
        batch: support and query, or the observations of the support alone; groups that lack data (no support, no
            query, no y) are left out.
        num_samples: draws in all. None: of a posterior that keeps draws (MetaSVI, NUTS) all of them, else 1000.
        chains: 1 for independent draws, which is honest: r-hat and effective sizes then say only how good so many
            independent draws are. None: the posterior's own Markov chains where ``num_samples`` is all of them, else 1.
        generator: generator or seed; None means seed 0.
        raw_units: x, y and densities of y in raw units when the batch has a standardiser.
        losses: of training, by step: they go to ``fit_stats``, a group of its own, as ``loss`` with dimension ``step``.

    Raises:
        ShapeError: for another number of tasks than that of the posterior.
        DataError: when all tasks are padding; for losses that are not one number a step; for draws or densities that
            are NaN.
        OptionError: for fewer than 2 draws, draws that do not divide into the chains, or several chains of a random
            choice of a sampler's draws.
    """
    batch = as_batch(batch)
    check_same_support(posterior, batch)
    num_samples, chains = _sizes(posterior, num_samples, chains)
    standardizer = batch.standardizer if raw_units else None
    export = Export(Predictor(posterior, num_samples, generator), batch, chains, standardizer)
    groups = export.latents() | export.sample_stats() | export.support() | export.query()
    return build_tree(export, groups, losses)


def _sizes(posterior: Posterior, num_samples: int | None, chains: int | None) -> tuple[int, int]:
    """Draws and chains."""
    own = getattr(posterior, "num_chains", None)  # of a posterior that keeps draws
    if num_samples is None:
        num_samples = _DRAWS if own is None or posterior.num_draws is None else posterior.num_draws
    every = own is not None and num_samples == posterior.num_draws
    if chains is None:
        chains = own if own is not None and every else 1
    if chains < 1 or num_samples % chains:
        raise OptionError(f"num_samples={num_samples} does not divide into chains={chains} of one length.")
    if chains > 1 and own is not None and not every:
        raise OptionError(
            f"num_samples={num_samples} of {posterior.num_draws} draws would be a random choice of them, which is no "
            f"{chains} chains. Leave num_samples out, or take chains=1."
        )
    return num_samples, chains


@torch.no_grad()
def loo(
    posterior: Posterior,
    batch: TaskBatch | Observations,
    *,
    num_samples: int = 1000,
    generator: Seed = None,
    raw_units: bool = True,
    pointwise: bool | None = None,
) -> Any:
    """Leave-one-out score of the support by Pareto-smoothed importance sampling (PSIS-LOO, Vehtari et al. 2017).

    Where the posterior has a density, draws are first reweighted from it to p(φ | S, θ) by
    ``arviz_stats.loo_approximate_posterior`` (Magnusson et al. 2019), with the weights of an observation's own task:
    given θ the tasks are independent. Where θ was inferred with φ by a guide (:class:`~bayesmeta.MetaSVI`), the weights
    are of θ and all φ together; they grow rough with the number of tasks. With another posterior over θ's sites, or
    without a density, draws count as exact, and of a posterior that is made of draws no more are taken than it has.
    ``approx_posterior`` of the result says whether
    the correction was made. Pareto k above 0.7 (less with few draws) warns, as in ArviZ: with few shots single
    observations weigh much.

    Args:
        posterior: adapted to ``batch.support``.
        batch: its support is scored; or the observations of the support.
        num_samples, generator, raw_units: as in :func:`to_datatree`.
        pointwise: keep the score and Pareto k of each observation.

    Returns:
        An ``arviz_stats`` ``ELPDData``.

    Raises:
        UnsupportedError: for a point estimate, and for less than 100 draws or particles without a density.
        DataError: for a support without targets.
        ShapeError, OptionError: as :func:`to_datatree`.
    """
    import arviz_stats

    refusal = refusal_of(posterior)
    if refusal is not None:
        raise UnsupportedError(refusal)
    if posterior.is_point:
        raise UnsupportedError(
            f"{NO_LOO} Use a method with a distribution, such as ABML or BayesianLastLayer, or score the query with "
            "bayesmeta.scores."
        )
    if posterior.num_draws is not None:
        if posterior.num_draws < _LEAST_DRAWS:
            raise UnsupportedError(
                f"{posterior.num_draws} draws without a density have no leave-one-out score: PSIS-LOO fits the tail of "
                f"their weights, and expects at least {_LEAST_DRAWS} different ones. Use NUTS, a method with a density "
                "such as ABML or Laplace, or more draws or particles; or score the query with bayesmeta.scores."
            )
        num_samples = min(num_samples, posterior.num_draws)  # repeated draws would have equal weights
    batch = as_batch(batch)
    check_same_support(posterior, batch)
    standardizer = batch.standardizer if raw_units else None
    num_samples, chains = _sizes(posterior, num_samples, None)
    export = Export(Predictor(posterior, num_samples, generator), batch, chains, standardizer)
    if batch.support.y is None or not bool(export.valid("support").any()):
        raise DataError("Leave-one-out needs a support with targets; this batch has none.")
    if not np.isfinite(export.log_likelihood()).all():
        raise NonFiniteDataError(
            "The log-likelihood of the support is not finite under some draws, so that leaving one out has no weights. "
            "Give the likelihood noise, and look for draws that have diverged."
        )
    tree = build_tree(export, export.latents(only_posterior=True) | {"log_likelihood": {"y": export.log_likelihood()}})
    densities = export.log_densities()
    if densities is None:
        return arviz_stats.loo(tree, pointwise=pointwise)
    like = tree["log_likelihood"].to_dataset()["y"]
    like = like if densities[0].ndim == like.ndim else like.isel(obs_id=0, drop=True)
    log_p, log_q = (like.copy(data=value) for value in densities)
    return arviz_stats.loo_approximate_posterior(tree, log_p, log_q, pointwise=pointwise)


def save_netcdf(tree: DataTree, path: str | Path) -> Path:
    """Write a DataTree to one netCDF file, whole or not at all.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        tree.to_netcdf(partial, engine="h5netcdf")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load_netcdf(path: str | Path) -> DataTree:
    """Read a DataTree written by :func:`save_netcdf` into memory; the file is closed again."""
    import xarray

    with xarray.open_datatree(path, engine="h5netcdf") as tree:
        return tree.load()
