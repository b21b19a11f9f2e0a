"""The groups of a DataTree, array by array, and the tree that ArviZ makes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data import Observations, Standardizer, TaskBatch
from bayesmeta.diagnostics.forecasts import Predictor
from bayesmeta.diagnostics.importance import LogRatios, log_ratios
from bayesmeta.errors import DataError, NonFiniteDataError
from bayesmeta.protocols import Posterior

if TYPE_CHECKING:
    from xarray import DataTree

_RESERVED = frozenset({"chain", "draw", "task", "feature", "covariate", "output", "obs_id", "query_id", "x", "y", "w"})
_SIDES = {"support": ("obs_id", "task_of_obs"), "query": ("query_id", "task_of_query")}
#: Why a point estimate has none.
NO_LOO = "A point estimate has no leave-one-out score: PSIS-LOO reweights draws of φ, and here all draws are the same."

#: Arrays by group and name.
Groups = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Export:
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

    # -- φ and θ ------------------------------------------------------------------------------------------------

    def latents(self, only_posterior: bool = False) -> Groups:
        """``posterior``, ``prior`` and ``log_prior``.

        Raises:
            NonFiniteDataError: for a draw that is NaN.
        """
        posterior, draws = self.predictor.posterior, self.predictor.draws
        groups: Groups = {"posterior": self._sites(draws)}
        for name, value in groups["posterior"].items():
            if value.dtype.kind == "f" and np.isnan(value).any():
                raise NonFiniteDataError(
                    f"The draws of {name} are NaN in {int(np.isnan(value).sum())} of {value.size} places, so there is "
                    "no posterior to show. Look at the losses of training, and at the parameters of model and guide."
                )
        if not only_posterior:
            groups["prior"] = self._sites(self.prior.draws)
            # a density of the sites themselves, as ArviZ scales it; what is transformed does not belong to the prior
            groups["log_prior"] = {"phi": self.split(posterior.log_prior(draws, jacobian=False)[:, self.tasks])}
            if posterior.named_theta(draws):
                groups["log_prior"]["global_sites"] = self.split(posterior.log_theta(draws, jacobian=False))
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

    # -- data and predictions -----------------------------------------------------------------------------------

    def support(self) -> Groups:
        """What belongs to the data that was conditioned on."""
        groups: Groups = {}
        observations, valid = self.batch.support, self.valid("support")
        if bool(valid.any()):
            groups["posterior_predictive"] = {"y": self._predict(self.predictor, "support")}
            groups["prior_predictive"] = {"y": self._predict(self.prior, "support")}
            groups["constant_data"] = {"x": _numpy(self._raw_x(observations.x)[valid])}
            if observations.y is not None:
                groups["observed_data"] = {"y": _numpy(self._raw_y(observations.y)[valid])}
                posterior = self.predictor.posterior
                if not posterior.is_point and refusal_of(posterior) is None:
                    groups["log_likelihood"] = {"y": self.log_likelihood()}
        if observations.w is not None:
            groups.setdefault("constant_data", {})["w"] = _numpy(observations.w[self.tasks])
        return groups

    def query(self) -> Groups:
        """What belongs to the points that are predicted."""
        query, valid = self.batch.query, self.valid("query")
        if not bool(valid.any()):
            return {}
        data = {"x": _numpy(self._raw_x(query.x)[valid])}
        if query.y is not None:
            data["y"] = _numpy(self._raw_y(query.y)[valid])
        return {"predictions": {"y": self._predict(self.predictor, "query")}, "predictions_constant_data": data}

    @cached_property
    def _like(self) -> Tensor:
        """log p(y | x, φ) of the support as the model sees it, float64 ``[n, tasks, shots]``."""
        return self.predictor.log_likelihood(self.batch.support)

    def log_likelihood(self) -> np.ndarray:
        """log p(y | x, φ) of each support observation, ``[chains, draws, obs]``."""
        value = self._like[:, self.valid("support")]
        if self.standardizer is not None and self.batch.support.y is not None:
            outputs = 1 if self.batch.support.y.dim() == 2 else self.batch.support.y.shape[-1]
            value = value - self.standardizer.y_scale.double().log().expand(outputs).sum()
        return self.split(value)

    # -- what is known of the draws -----------------------------------------------------------------------------

    @cached_property
    def log_ratios(self) -> LogRatios | None:
        """Densities of the draws under model and posterior; None without targets, or without a density."""
        posterior, support = self.predictor.posterior, self.batch.support
        if posterior.is_point or refusal_of(posterior) or support.y is None or not bool(self.valid("support").any()):
            return None
        return log_ratios(posterior, support, self.predictor.draws, log_likelihood=self._like)

    def sample_stats(self) -> Groups:
        """What a sampler said of each draw, and the importance weights of draws from a density."""
        known = getattr(self.predictor.draws, "stats", None) or {}
        stats = {name: self.split(value) for name, value in known.items()}
        ratios = self.log_ratios
        if ratios is not None:
            parts = {"log_p": ratios.log_p, "log_q": ratios.log_q, "log_weights": ratios.values}
            stats |= {k: self.split(v if ratios.joint else v[:, self.tasks]) for k, v in parts.items()}
        return {"sample_stats": stats} if stats else {}

    def log_densities(self) -> tuple[np.ndarray, np.ndarray] | None:
        """log p and log q for the weights of each observation: ``[chains, draws, obs]``, or where joint without obs."""
        ratios = self.log_ratios
        if ratios is None:
            return None
        if ratios.joint:
            return self.split(ratios.log_p), self.split(ratios.log_q)
        owner = self.valid("support").nonzero()[:, 0]
        return self.split(ratios.log_p[:, owner]), self.split(ratios.log_q[:, owner])

    def _predict(self, predictor: Predictor, name: str) -> np.ndarray:
        return self.split(self._raw_y(predictor.predict(self.side(name)))[:, self.valid(name)])

    def _raw_x(self, x: Tensor) -> Tensor:
        return x if self.standardizer is None else self.standardizer.raw_x(x)

    def _raw_y(self, y: Tensor) -> Tensor:
        return y if self.standardizer is None else self.standardizer.raw_y(y)


def refusal_of(posterior: Posterior) -> str | None:
    """Why there is no leave-one-out score of a posterior that predicts from its support directly; else None."""
    return getattr(posterior, "loo_refusal", None)


def _numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.detach().cpu())


def _variable(name: str) -> str:
    """A name that xarray and netCDF take for a variable."""
    name = name.replace("/", ".")
    return f"{name}_" if name in _RESERVED else name


# -- names, coordinates and attributes ----------------------------------------------------------------------------


def build_tree(export: Export, groups: Groups, losses: Sequence[float] | None = None) -> DataTree:
    """The DataTree of these groups, and of the losses of training.

    Raises:
        DataError: when all tasks are padding.
    """
    import arviz_base

    task = _task_labels(export)
    if len(task) == 0:
        raise DataError("All tasks of the batch are padding (task_id -1), so there is nothing to export.")
    shared = {"phi": ["task"], "w": ["task", "covariate"]}
    posterior = export.predictor.posterior
    shared |= {_variable(name): ["task"] for name in posterior.named(export.predictor.draws)}
    shared |= {name: ["task"] for name, value in groups.get("sample_stats", {}).items() if value.ndim == 3}
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
    if losses is not None:
        _add_losses(tree, losses)
    return tree


def _add_losses(tree: DataTree, losses: Sequence[float]) -> None:
    """A group of its own, since all of ``sample_stats`` is of draws; step 1 is the first."""
    import xarray

    values = np.asarray(losses, dtype=float)
    if values.ndim != 1 or not len(values):
        raise DataError(
            f"losses has shape {list(values.shape)}; expected one number a step, such as svi.losses after training."
        )
    data = xarray.Dataset({"loss": ("step", values)}, {"step": np.arange(1, len(values) + 1)})
    tree["fit_stats"] = xarray.DataTree(data.assign_attrs(inference_library="bayesmeta"))


def _y_dims(export: Export, side: str) -> list[str]:
    y = [o.y for o in (export.side(side), export.batch.support, export.batch.query) if o.y is not None]
    dim = _SIDES[side][0]
    return [dim, "output"] if y and y[0].dim() == 3 else [dim]


def _task_labels(export: Export) -> np.ndarray:
    """The batch's names, else the ids, else 0, 1, …, of the real tasks."""
    keep = _numpy(export.tasks)
    if export.batch.names is not None:
        return np.asarray(export.batch.names)[keep]
    if export.batch.task_id is not None:
        return _numpy(export.batch.task_id)[keep]
    return np.arange(len(keep))


def library_attributes() -> dict[str, Any]:
    """What every group says of where it comes from."""
    general: dict[str, Any] = {"inference_library": "bayesmeta"}
    with contextlib.suppress(metadata.PackageNotFoundError):
        general["inference_library_version"] = metadata.version("bayesmeta")
    return general


def _attributes(export: Export, groups: Groups) -> dict[str, dict[str, Any]]:
    posterior = export.predictor.posterior
    general = library_attributes()
    raw = export.standardizer is not None or export.batch.standardizer is None
    root = general | {
        "posterior_kind": type(posterior).__name__,
        "num_tasks": int(export.tasks.sum()),
        "units": "raw" if raw else "standard",
        "target_kind": posterior.target_kind,
    }
    refusal = refusal_of(posterior)
    if refusal is not None:
        root["log_likelihood_note"] = f"{refusal} There is no log_likelihood group."
    elif posterior.is_point:
        root["log_likelihood_note"] = f"{NO_LOO} There is no log_likelihood group."
    return {"/": root} | dict.fromkeys(groups, general)
