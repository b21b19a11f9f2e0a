"""A posterior and its predictions as an ArviZ DataTree with a ``task`` dimension.

Groups: ``posterior``, ``prior``, ``log_prior``; of the support, which was conditioned on: ``posterior_predictive``,
``prior_predictive``, ``log_likelihood``, ``observed_data``, ``constant_data``; of the query: ``predictions`` and
``predictions_constant_data`` (inputs, and targets where they are known). Dimensions: ``chain``, ``draw``, ``task``,
``feature``, ``output`` and, flat over the real observations of all tasks, ``obs_id`` (support) and ``query_id``
(query), with the coordinates ``task_of_obs`` and ``task_of_query`` that say whose they are. Padding is left out.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data import Observations, Standardizer, TaskBatch
from bayesmeta.diagnostics.forecasts import Predictor, check_batch, check_same_tasks
from bayesmeta.errors import DataError, OptionError, UnsupportedError
from bayesmeta.ops.random import Seed
from bayesmeta.protocols import Posterior

if TYPE_CHECKING:
    from xarray import DataTree

_RESERVED = frozenset({"chain", "draw", "task", "feature", "covariate", "output", "obs_id", "query_id", "x", "y", "w"})
_SIDES = {"support": ("obs_id", "task_of_obs"), "query": ("query_id", "task_of_query")}
_NO_LOO = "A point estimate has no leave-one-out score: PSIS-LOO reweights draws of φ, and here all draws are the same."
#: Fewer leave PSIS-LOO less than 20 weights (a fifth) to fit the tail of; and with 100 draws even Pareto k above
#: 1 − 1 / log10(100) = 0.5 would be too large (Vehtari et al. 2024, https://arxiv.org/abs/1507.02646).
_LEAST_DRAWS = 100


@torch.no_grad()
def to_datatree(
    posterior: Posterior,
    batch: TaskBatch,
    *,
    num_samples: int = 1000,
    chains: int = 1,
    generator: Seed = None,
    raw_units: bool = True,
) -> DataTree:
    """Export a posterior to ArviZ.

    ``log_likelihood`` is of the support, since leave-one-out is about the data that was conditioned on; a point
    estimate gets none, so that ``loo`` refuses it. For variational draws :func:`loo` corrects for the difference
    between posterior and approximation, which ``arviz.loo`` on the tree cannot. ``log_prior`` holds log p(φ | θ) of
    each task in unconstrained space, as ``phi``. Latent sites keep their names (a ``/`` becomes ``.``, and a name
    that is taken here, such as ``y`` or ``task``, gets an underscore) and their own units, those of the standardised
    data if there is a standardiser. For a point estimate use ``summary(tree, kind="stats")``: the rest divides by the
    variance of the draws, which is 0.

    Args:
        posterior: adapted to ``batch.support``.
        batch: support and query; groups that lack data (no support, no query, no y) are left out.
        num_samples: draws in all.
        chains: 1 for independent draws, which is honest: r-hat and effective sizes then say only how good so many
            independent draws are. For MCMC draws stored chain after chain, the number of chains; ``num_samples``
            must then be all of them.
        generator: generator or seed; None means seed 0.
        raw_units: x, y and densities of y in raw units when the batch has a standardiser.

    Raises:
        ShapeError: for another number of tasks than that of the posterior.
        DataError: when all tasks are padding.
        OptionError: for fewer than 2 draws, or draws that do not divide into the chains.
    """
    check_batch(batch)
    check_same_tasks(posterior, batch.support)
    if chains < 1 or num_samples % chains:
        raise OptionError(f"num_samples={num_samples} does not divide into chains={chains} of one length.")
    standardizer = batch.standardizer if raw_units else None
    predictor = Predictor(posterior, num_samples, generator)
    export = _Export(predictor, batch, chains, standardizer)
    return _tree(export, export.latents() | export.support() | export.query())


@torch.no_grad()
def loo(
    posterior: Posterior,
    batch: TaskBatch,
    *,
    num_samples: int = 1000,
    generator: Seed = None,
    raw_units: bool = True,
    pointwise: bool | None = None,
) -> Any:
    """Leave-one-out score of the support by Pareto-smoothed importance sampling (PSIS-LOO, Vehtari et al. 2017).

    Where the posterior has a density, draws are first reweighted from it to p(φ | S, θ) by
    ``arviz_stats.loo_approximate_posterior`` (Magnusson et al. 2019), with the weights of an observation's own task:
    given θ the tasks are independent. With a posterior over θ's sites, or without a density, draws count as exact, and
    of a posterior that is made of draws no more are taken than it has. ``approx_posterior`` of the result says whether
    the correction was made. Pareto k above 0.7 (less with few draws) warns, as in ArviZ: with few shots single
    observations weigh much.

    Args:
        posterior: adapted to ``batch.support``.
        batch: its support is scored.
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

    refusal = _refusal(posterior)
    if refusal is not None:
        raise UnsupportedError(refusal)
    if posterior.is_point:
        raise UnsupportedError(
            f"{_NO_LOO} Use a method with a distribution, such as ABML or BayesianLastLayer, or score the query with "
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
    check_same_tasks(posterior, batch.support)
    standardizer = batch.standardizer if raw_units else None
    export = _Export(Predictor(posterior, num_samples, generator), batch, 1, standardizer)
    if batch.support.y is None or not bool(export.valid("support").any()):
        raise DataError("Leave-one-out needs a support with targets; this batch has none.")
    tree = _tree(export, export.latents(only_posterior=True) | {"log_likelihood": {"y": export.log_likelihood()}})
    log_ratios = export.log_densities()
    if log_ratios is None:
        return arviz_stats.loo(tree, pointwise=pointwise)
    like = tree["log_likelihood"].to_dataset()["y"]
    log_p, log_q = (like.copy(data=value) for value in log_ratios)
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


# -- the export, group by group -----------------------------------------------------------------------------------

_Groups = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class _Export:
    """Arrays of each group, padding taken out and sample dimensions split into ``[chains, draws, …]``."""

    predictor: Predictor
    batch: TaskBatch
    chains: int
    standardizer: Standardizer | None

    @property
    def tasks(self) -> Tensor:
        """True for real tasks, ``[tasks]``."""
        real = self.batch.real_tasks()
        if real is None:
            return torch.ones(self.batch.num_tasks, dtype=torch.bool, device=self.batch.support.device)
        return real

    def side(self, name: str) -> Observations:
        """The support or the query."""
        return self.batch.support if name == "support" else self.batch.query

    def valid(self, name: str) -> Tensor:
        """True for real observations of real tasks, ``[tasks, shots]``."""
        return self.side(name).full_mask() & self.tasks.unsqueeze(-1)

    def split(self, draws: Tensor) -> np.ndarray:
        """``[n, …]`` to ``[chains, n / chains, …]``."""
        array = _numpy(draws)
        return array.reshape(self.chains, array.shape[0] // self.chains, *array.shape[1:])

    def latents(self, only_posterior: bool = False) -> _Groups:
        """``posterior``, ``prior`` and ``log_prior``."""
        posterior, draws = self.predictor.posterior, self.predictor.draws
        groups = {"posterior": self._sites(draws)}
        if not only_posterior:
            groups["prior"] = self._sites(self.prior.draws)
            groups["log_prior"] = {"phi": self.split(posterior.log_prior(draws)[:, self.tasks])}
        return groups

    @cached_property
    def prior(self) -> Predictor:
        """Predictions from the prior, with as many draws."""
        return Predictor(self.predictor.posterior, self.predictor.num_samples, self.predictor.generator, prior=True)

    def _sites(self, draws: Any) -> dict[str, np.ndarray]:
        posterior = self.predictor.posterior
        local = {_variable(k): self.split(v[:, self.tasks]) for k, v in posterior.named(draws).items()}
        theta = {_variable(k): self.split(v) for k, v in posterior.named_theta(draws).items()}
        return local | {f"{k}_" if k == "phi" else k: v for k, v in theta.items()}  # log_prior has the name phi

    def support(self) -> _Groups:
        """What belongs to the data that was conditioned on."""
        groups: _Groups = {}
        observations, valid = self.batch.support, self.valid("support")
        if bool(valid.any()):
            groups["posterior_predictive"] = {"y": self._predict(self.predictor, "support")}
            groups["prior_predictive"] = {"y": self._predict(self.prior, "support")}
            groups["constant_data"] = {"x": _numpy(self._raw_x(observations.x)[valid])}
            if observations.y is not None:
                groups["observed_data"] = {"y": _numpy(self._raw_y(observations.y)[valid])}
                posterior = self.predictor.posterior
                if not posterior.is_point and _refusal(posterior) is None:
                    groups["log_likelihood"] = {"y": self.log_likelihood()}
        if observations.w is not None:
            groups.setdefault("constant_data", {})["w"] = _numpy(observations.w[self.tasks])
        return groups

    def query(self) -> _Groups:
        """What belongs to the points that are predicted."""
        query, valid = self.batch.query, self.valid("query")
        if not bool(valid.any()):
            return {}
        data = {"x": _numpy(self._raw_x(query.x)[valid])}
        if query.y is not None:
            data["y"] = _numpy(self._raw_y(query.y)[valid])
        return {"predictions": {"y": self._predict(self.predictor, "query")}, "predictions_constant_data": data}

    def log_likelihood(self) -> np.ndarray:
        """log p(y | x, φ) of each support observation, ``[chains, draws, obs]``."""
        value = self.predictor.log_likelihood(self.batch.support)[:, self.valid("support")]
        if self.standardizer is not None and self.batch.support.y is not None:
            outputs = 1 if self.batch.support.y.dim() == 2 else self.batch.support.y.shape[-1]
            value = value - self.standardizer.y_scale.double().log().expand(outputs).sum()
        return self.split(value)

    def log_densities(self) -> tuple[np.ndarray, np.ndarray] | None:
        """log p(S, φ | θ) and log q(φ) of each observation's task, as ``log_likelihood``; None where q has none."""
        posterior, draws = self.predictor.posterior, self.predictor.draws
        density = getattr(posterior, "log_prob", None)
        varying = any(bool((v != v[:1]).any()) for v in posterior.named_theta(draws).values())
        if density is None or varying:
            return None
        try:
            log_q = density(draws.u).double()
        except UnsupportedError:
            return None
        valid = self.valid("support")
        each = torch.where(valid, self.predictor.log_likelihood(self.batch.support), 0.0)
        log_p = posterior.log_prior(draws).double() + each.sum(-1)
        owner = valid.nonzero()[:, 0]
        return self.split(log_p[:, owner]), self.split(log_q[:, owner])

    def _predict(self, predictor: Predictor, name: str) -> np.ndarray:
        return self.split(self._raw_y(predictor.predict(self.side(name)))[:, self.valid(name)])

    def _raw_x(self, x: Tensor) -> Tensor:
        return x if self.standardizer is None else self.standardizer.raw_x(x)

    def _raw_y(self, y: Tensor) -> Tensor:
        return y if self.standardizer is None else self.standardizer.raw_y(y)


def _refusal(posterior: Posterior) -> str | None:
    """Why there is no leave-one-out score of a posterior that predicts from its support directly; else None."""
    return getattr(posterior, "loo_refusal", None)


def _numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().cpu())


def _variable(name: str) -> str:
    """A name that xarray and netCDF take for a variable."""
    name = name.replace("/", ".")
    return f"{name}_" if name in _RESERVED else name


# -- names, coordinates and attributes ----------------------------------------------------------------------------


def _tree(export: _Export, groups: _Groups) -> DataTree:
    import arviz_base

    task = _task_labels(export)
    if len(task) == 0:
        raise DataError("All tasks of the batch are padding (task_id -1), so there is nothing to export.")
    shared = {"phi": ["task"], "w": ["task", "covariate"]}
    posterior = export.predictor.posterior
    shared |= {_variable(name): ["task"] for name in posterior.named(export.predictor.draws)}
    tree = arviz_base.from_dict(
        groups,
        sample_dims=["chain", "draw"],
        coords={"task": task},
        dims=shared | {"x": ["obs_id", "feature"], "y": _y_dims(export, "support")},
        pred_dims={"x": ["query_id", "feature"], "y": _y_dims(export, "query")},
        attrs=_attributes(export, groups),
        check_conventions=False,  # it warns when there are few draws and many chains
    )
    for name, (dim, owner) in _SIDES.items():
        whose = task[_numpy(export.valid(name)[export.tasks].nonzero()[:, 0])]
        for group in tree.children.values():
            if dim in group.dims:
                group.dataset = group.to_dataset(inherit=False).assign_coords({owner: (dim, whose)})
    return tree


def _y_dims(export: _Export, side: str) -> list[str]:
    y = [o.y for o in (export.side(side), export.batch.support, export.batch.query) if o.y is not None]
    dim = _SIDES[side][0]
    return [dim, "output"] if y and y[0].dim() == 3 else [dim]


def _task_labels(export: _Export) -> np.ndarray:
    """The batch's names, else the ids, else 0, 1, …, of the real tasks."""
    keep = _numpy(export.tasks)
    if export.batch.names is not None:
        return np.asarray(export.batch.names)[keep]
    if export.batch.task_id is not None:
        return _numpy(export.batch.task_id)[keep]
    return np.arange(len(keep))


def _attributes(export: _Export, groups: _Groups) -> dict[str, dict[str, Any]]:
    posterior = export.predictor.posterior
    general: dict[str, Any] = {"inference_library": "bayesmeta"}
    with contextlib.suppress(metadata.PackageNotFoundError):
        general["inference_library_version"] = metadata.version("bayesmeta")
    raw = export.standardizer is not None or export.batch.standardizer is None
    root = general | {
        "posterior_kind": type(posterior).__name__,
        "num_tasks": int(export.tasks.sum()),
        "units": "raw" if raw else "standard",
        "target_kind": posterior.target_kind,
    }
    refusal = _refusal(posterior)
    if refusal is not None:
        root["log_likelihood_note"] = f"{refusal} There is no log_likelihood group."
    elif posterior.is_point:
        root["log_likelihood_note"] = f"{_NO_LOO} There is no log_likelihood group."
    return {"/": root} | dict.fromkeys(groups, general)
