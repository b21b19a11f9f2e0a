"""The posterior over a program's global sites: a point, a Gaussian, or one of Pyro's AutoGuides."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous, AutoLaplaceApproximation, AutoNormalizingFlow, init_to_value
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import OptionError
from bayesmeta.models.program import TaskProgram
from bayesmeta.models.scope import ParamScope
from bayesmeta.ops.random import Seed, as_generator, forked_rng, normal_like

#: ``"point"``, ``"normal"``, ``"low_rank"``, or an AutoContinuous class (or a function that makes one from a model).
GlobalKind = str | Callable[..., AutoContinuous]
KINDS = ("point", "normal", "low_rank")


def check_global_kind(kind: GlobalKind) -> None:
    """Check a ``global_guide`` option.

    Raises:
        OptionError: for an unknown name, or what does not make an AutoContinuous.
    """
    if isinstance(kind, str) and kind in KINDS:
        return
    laplace = inspect.isclass(kind) and issubclass(kind, AutoLaplaceApproximation)  # a point until it is read after SVI
    if inspect.isclass(kind) and issubclass(kind, AutoContinuous) and not laplace:
        return
    if callable(kind) and not inspect.isclass(kind):
        return
    raise OptionError(
        f"Unknown global_guide {kind!r}; expected {', '.join(map(repr, KINDS))}, or a class of "
        "pyro.infer.autoguide that derives from AutoContinuous, such as AutoMultivariateNormal."
    )


def kind_name(kind: GlobalKind) -> str:
    """A name for checkpoints and for people."""
    return kind if isinstance(kind, str) else getattr(kind, "__name__", type(kind).__name__)


class GlobalGuide(nn.Module):
    """q(θ) over the sites outside the task plate, in unconstrained space.

    Args:
        program: prepared, with at least one global site.
        kind: ``"point"`` (a MAP estimate of the density in the sites' own space, as Pyro's AutoDelta), ``"normal"``
            (mean-field Gaussian in unconstrained space, as AutoNormal), ``"low_rank"`` (Gaussian with covariance
            FFᵀ + diag(s²), F of ⌈√E⌉ columns), or an ``AutoContinuous`` of Pyro, made on one site that holds all.
        observations: data of the right width, used to draw the start: the median of 100 prior draws.
        init_scale: first standard deviation of the Gaussians.

    Raises:
        OptionError: for another kind.
    """

    def __init__(
        self, program: TaskProgram, kind: GlobalKind, observations: Observations, init_scale: float = 0.1
    ) -> None:
        super().__init__()
        check_global_kind(kind)
        self.kind = kind_name(kind)
        _, draws = program.sample_prior(100, observations, 0)
        assert draws is not None
        start = draws.median(0).values.to(observations.x)  # heavy-tailed priors have no mean
        self.auto: AutoContinuous | None = None
        if not isinstance(kind, str):
            self._make_auto(kind, start)
            return
        self.loc = nn.Parameter(start)
        if kind != "point":
            self.log_scale = nn.Parameter(torch.full_like(start, init_scale).log())
        if kind == "low_rank":
            rank = int(len(start) ** 0.5 + 0.999)
            noise = normal_like(start, (len(start), rank), as_generator(0, start.device, "theta factor"))
            self.factor = nn.Parameter(init_scale * noise / rank**0.5)

    def _make_auto(self, kind: Callable[..., AutoContinuous], start: Tensor) -> None:
        first = start.detach().to("cpu", torch.get_default_dtype())  # as the networks of flows are made

        def model() -> None:
            pyro.sample("theta", dist.Normal(torch.zeros_like(first), 1.0).to_event(1))

        options: dict[str, Any] = {}
        flow = inspect.isclass(kind) and issubclass(kind, AutoNormalizingFlow)  # starts at its base distribution
        if not flow and "init_loc_fn" in inspect.signature(kind).parameters:
            options["init_loc_fn"] = init_to_value(values={"theta": first})
        auto = kind(model, **options)
        if not isinstance(auto, AutoContinuous):
            raise OptionError(f"global_guide made a {type(auto).__name__}; expected an AutoContinuous of Pyro.")
        # a first call makes the parameters; it draws, and Pyro's own store stays out of it
        with forked_rng(as_generator(0, first.device)), ParamScope(auto).open(), torch.no_grad():
            auto()
        self.auto = auto.to(start)

    @property
    def is_point(self) -> bool:
        """Whether q(θ) is a point."""
        return self.kind == "point"

    def centre(self) -> Tensor:
        """A typical θ, ``[E]``: the point, the mean of a Gaussian, a median otherwise."""
        if self.auto is None:
            return self.loc
        draws = self.draw(101, 0)
        return draws.median(0).values

    def distribution(self) -> Any:
        """q(θ) as a Pyro distribution of event shape ``[E]``.

        Raises:
            OptionError: for a point, which has none.
        """
        if self.is_point:
            raise OptionError("A point estimate of the global sites has no distribution.")
        if self.auto is not None:
            return self.auto.get_posterior()
        if self.kind == "low_rank":
            return dist.LowRankMultivariateNormal(self.loc, self.factor, (2 * self.log_scale).exp())
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)

    def draw(self, num_samples: int, generator: Seed = None) -> Tensor:
        """Reparameterised draws ``[n, E]``; a point gives copies."""
        if self.is_point:
            return self.loc.expand(num_samples, -1)
        device = next(self.parameters()).device
        generator = as_generator(generator, device, "theta")
        if self.kind == "normal":
            noise = normal_like(self.loc, (num_samples, self.loc.numel()), generator)
            return self.loc + noise * self.log_scale.exp()
        with forked_rng(generator):
            return self.distribution().rsample((num_samples,))

    def log_density(self, theta: Tensor) -> Tensor:
        """log q(θ) in unconstrained space, ``[…]``; 0 for a point."""
        if self.is_point:
            return theta.new_zeros(theta.shape[:-1])
        return self.distribution().log_prob(theta)

    def penalty(self, program: TaskProgram, theta: Tensor, observations: Observations) -> Tensor:
        """What training minimises for θ, once for all tasks, ``[…]``.

        −log p(θ) for a point, log q(θ) − log p(θ) for a distribution.
        """
        log_prior = program.log_theta(theta, observations, jacobian=not self.is_point)
        return self.log_density(theta) - log_prior
