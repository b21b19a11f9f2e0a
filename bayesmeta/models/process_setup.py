"""What a process model settles at its first data: how likelihood, targets and network fit together."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from bayesmeta.data import Observations
from bayesmeta.errors import DataError, OptionError, ShapeError, UnsupportedError
from bayesmeta.models.likelihoods import HeteroscedasticGaussian, Likelihood
from bayesmeta.models.process_covariance import Covariance
from bayesmeta.models.processes import AttentiveProcess, ConvProcess, DeepSetProcess, TransformerProcess
from bayesmeta.models.targets import class_probabilities, target_kind

NetworkName = Literal["deep_set", "attention", "convolution", "transformer"]
NETWORKS: dict[str, type[nn.Module]] = {
    "deep_set": DeepSetProcess,
    "attention": AttentiveProcess,
    "convolution": ConvProcess,
    "transformer": TransformerProcess,
}


class Setup(NamedTuple):
    """What first data say.

    Attributes:
        likelihood: the one given, or the default.
        features: width of what the network is fed.
        targets: of a shot.
        outputs: that the likelihood takes.
        reads: how y is read, as an encoder's options.
        domain: the likelihood's support.
    """

    likelihood: Likelihood
    features: int
    targets: int
    outputs: int
    reads: dict[str, Any]
    domain: Any


def set_up(likelihood: Likelihood | None, covariance: Covariance, observations: Observations) -> Setup:
    """Read the first data.

    Raises:
        DataError, OptionError, ShapeError, UnsupportedError: as :meth:`bayesmeta.ProcessModel.prepare`.
    """
    y = observations.y
    if y is None:
        raise DataError("A process reads targets, so its first data need them; these observations have y=None.")
    if likelihood is None and not y.is_floating_point():
        raise OptionError(f"Targets of dtype {y.dtype} are no real numbers; give a likelihood, such as Categorical.")
    likelihood = HeteroscedasticGaussian(0.01) if likelihood is None else likelihood
    targets = 1 if y.dim() == 2 else y.shape[-1]
    if covariance != "diagonal" and targets > 1:
        raise UnsupportedError(f"A covariance is for one output; y has {targets}. Use covariance='diagonal'.")
    outputs = likelihood.num_outputs(targets)
    if outputs is None:
        raise OptionError(
            f"{type(likelihood).__name__} does not say how many network outputs it takes; define num_outputs."
        )
    inputs, exposure = likelihood.split(observations.x.new_ones(1, 1, observations.num_features))
    with torch.no_grad():
        fn = likelihood.to(observations.x).distribution(inputs.new_zeros(1, 1, outputs), **exposure)
    if covariance != "diagonal" and not isinstance(fn, torch.distributions.Normal):
        raise UnsupportedError(
            "A covariance between targets needs a likelihood whose distribution is Normal; "
            f"{type(likelihood).__name__} gives {type(fn).__name__}. Use covariance='diagonal'."
        )
    if tuple(fn.event_shape) != tuple(y.shape[2:]):
        raise ShapeError(
            f"{type(likelihood).__name__} describes targets of shape {['tasks', 'shots', *fn.event_shape]}; y has "
            f"shape {list(y.shape)}."
        )
    return Setup(likelihood, inputs.shape[-1], targets, outputs, _reading(fn), fn.support)


def _reading(fn: Any) -> dict[str, Any]:
    kind = target_kind(fn)
    if kind == "class":
        classes = class_probabilities(fn).shape[-1]
        return {"classes": classes} if classes > 2 else {}
    return {"counts": True} if kind == "count" else {}


def check_exposure(likelihood: Likelihood, observations: Observations) -> None:
    """Check that the exposure is positive, where the likelihood has one.

    Raises:
        DataError: naming the first task and shot where it is not.
    """
    exposure = likelihood.split(observations.x)[1].get("exposure")
    if exposure is None:
        return
    bad = (~((exposure > 0) & exposure.isfinite()) & observations.full_mask()).nonzero()
    if len(bad):
        task, shot = bad[0].tolist()
        raise DataError(
            f"The exposure is {exposure[task, shot].item():.4g} at task {task}, shot {shot} (counted from 0); an "
            "exposure is positive, in raw units."
        )


def check_options(likelihood: Any, latent_size: int, covariance: str, rank: int, width: int) -> None:
    """Check the options of a process model.

    Raises:
        OptionError: for one of another kind, or out of range.
    """
    if likelihood is not None and not isinstance(likelihood, Likelihood):
        raise OptionError(
            f"likelihood is {likelihood!r}; expected None or an instance of a bayesmeta likelihood, such as "
            "bm.likelihoods.HeteroscedasticGaussian(0.01)."
        )
    if covariance not in get_args(Covariance):
        raise OptionError(f"Unknown covariance {covariance!r}; expected 'diagonal', 'low_rank' or 'kernel'.")
    if latent_size < 0 or rank < 1 or width < 1:
        raise OptionError(
            f"latent_size must be 0 or more, rank and width at least 1; got {latent_size}, {rank} and {width}."
        )
    if latent_size and covariance != "diagonal":
        raise OptionError("Targets are made dependent by a latent or by a covariance; give one of the two.")
