"""What a process model settles at its first data: how likelihood, targets and network fit together."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import DataError, OptionError, ShapeError, UnsupportedError
from bayesmeta.models.encoders import PooledEncoder
from bayesmeta.models.likelihoods import HeteroscedasticGaussian, Likelihood
from bayesmeta.models.process_covariance import Covariance
from bayesmeta.models.processes import AttentiveProcess, ConvProcess, DeepSetProcess, TransformerProcess
from bayesmeta.models.recognition import Recognition
from bayesmeta.models.targets import class_probabilities, target_kind
from bayesmeta.ops.batched import unsafe_modules
from bayesmeta.ops.random import Seed, as_generator, forked_rng
from bayesmeta.ops.whole import is_whole

NetworkName = Literal["deep_set", "attention", "convolution", "transformer"]
NETWORKS: dict[str, type[nn.Module]] = {
    "deep_set": DeepSetProcess,
    "attention": AttentiveProcess,
    "convolution": ConvProcess,
    "transformer": TransformerProcess,
}
#: options of networks that are whole numbers, and the least that they may be
_WHOLE = {"depth": 1, "heads": 1, "blocks": 0, "max_points": 1}


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


def own_network(network: nn.Module, options: dict[str, Any], max_shots: int | None) -> nn.Module:
    """A copy of a network of one's own.

    Raises:
        OptionError: for options beside it, or modules that mix tasks or draw hidden noise.
    """
    bad = unsafe_modules(network)
    if bad or options or max_shots is not None:
        raise OptionError(
            "A network of your own has its options itself, and no modules that mix tasks or draw hidden noise; got "
            f"{sorted(options)}, max_shots={max_shots} and the modules {bad}."
        )
    return copy.deepcopy(network)


def make_network(
    name: str, features: int, targets: int, outputs: int, seed: Seed, options: dict[str, Any]
) -> nn.Module:
    """One of the networks of :data:`NETWORKS`, with first weights from a seed."""
    with forked_rng(as_generator(seed, stream="process")):
        return NETWORKS[name](features, targets, outputs, **options)


def make_recognition(found: Setup, latent_size: int, width: int, seed: Seed, device: torch.device) -> Recognition:
    """q(z | observations), with first weights from a seed."""
    # no max_shots: it bounds the support, and this reads support and query together too, and holds a mean alone
    with forked_rng(as_generator(seed, device, "recognition")):
        encoder = PooledEncoder(found.features, found.targets, width, hidden=[width] * 2, **found.reads)
        return Recognition(encoder, latent_size, "diagonal", hidden=width)


def check_outputs(name: str, out: Any, lead: tuple[int, ...], own: int, extra: int) -> None:
    """Check what a network gave.

    Args:
        name: of the network.
        out: what it gave.
        lead: the shape that is wanted, without the last dimension.
        own, extra: outputs of the likelihood, and of the covariance.

    Raises:
        ShapeError: for another shape, or no tensor.
    """
    expected = (*lead, own + extra)
    if not isinstance(out, Tensor) or tuple(out.shape) != expected:
        given = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ShapeError(
            f"The network {name} gave {given}; expected a tensor {list(expected)}: [draws of z, tasks, targets, "
            f"outputs], with {own} output(s) for the likelihood, then those of the covariance."
        )


def try_network_options(name: str, options: dict[str, Any]) -> None:
    """Make a network and forget it.

    Raises:
        OptionError: for an unknown name, unknown options, and sizes out of range.
    """
    if name not in NETWORKS:
        raise OptionError(f"Unknown network {name!r}; expected {', '.join(map(repr, NETWORKS))}, or a module.")
    for option, value in options.items():
        if option in _WHOLE and not is_whole(value, _WHOLE[option]):
            raise OptionError(f"{option} must be a whole number, {_WHOLE[option]} or more; got {value!r}.")
    try:
        make_network(name, 1, 1, 1, None, options)
    except TypeError as error:
        raise OptionError(f"The network {name!r} has no such option: {error}") from error


def _reading(fn: Any) -> dict[str, Any]:
    kind = target_kind(fn)
    if kind == "class":
        classes = class_probabilities(fn).shape[-1]
        return {"classes": classes} if classes > 2 else {}
    return {"counts": True} if kind == "count" else {}


def check_options(
    likelihood: Any,
    latent_size: int,
    covariance: str,
    rank: int,
    width: int,
    max_shots: int | None,
    stationary: bool | None,
    length_scale: float,
) -> None:
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
    for name, value, least in (("latent_size", latent_size, 0), ("rank", rank, 1), ("width", width, 1)):
        if not is_whole(value, least):
            raise OptionError(f"{name} must be a whole number, {least} or more; got {value!r}.")
    if max_shots is not None and not is_whole(max_shots, 1):
        raise OptionError(f"max_shots must be a whole number, 1 or more, or None for no bound; got {max_shots!r}.")
    if stationary and covariance == "diagonal":
        raise OptionError("stationary=True is for a covariance: give covariance='low_rank' or 'kernel' with it.")
    if not 0 < length_scale < math.inf:
        raise OptionError(f"length_scale must be positive and finite; got {length_scale}.")
    if latent_size and covariance != "diagonal":
        raise OptionError("Targets are made dependent by a latent or by a covariance; give one of the two.")
