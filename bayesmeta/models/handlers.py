"""Pyro effect handlers that read a task program: one pass gives values, densities and Jacobians.

Each handler is the outermost that its messages reach (it stops them), so that a program can be evaluated inside a
guide that runs under other handlers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.util import scale_and_mask, sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import MixtureSameFamilyConstraint
from torch.distributions.transforms import Transform

from bayesmeta.errors import SiteError
from bayesmeta.ops.random import as_generator, forked_rng


def is_deterministic(msg: Any) -> bool:
    """True for ``pyro.deterministic`` sites and those that a reparameterisation made, which carry no density."""
    if (msg["infer"] or {}).get("_deterministic"):
        return True
    fn = msg["fn"]
    return msg["is_observed"] and isinstance(fn, MaskedDistribution) and isinstance(fn.base_dist, Delta)


def is_subsample(msg: Any) -> bool:
    """True for the bookkeeping sites of plates."""
    return type(msg["fn"]).__name__ == "_Subsample"


def bijection(name: str, fn: Any) -> Transform:
    """The map from unconstrained space to the support of a site's distribution.

    Raises:
        SiteError: for a support without a bijection, discrete ones included.
    """
    try:
        support = fn.support
        if isinstance(support, MixtureSameFamilyConstraint):  # torch has no bijection for the wrapper
            support = support.base_constraint
        if support.is_discrete:
            raise NotImplementedError
        return biject_to(support)
    except NotImplementedError:
        raise SiteError(
            f"The latent site {name!r} has the distribution {type(fn).__name__}, whose support has no bijection with "
            "an unconstrained space. Use a continuous site, or marginalise a discrete one; for a covariance, use "
            "LKJCholesky for the correlations and positive scales."
        ) from None


@dataclass(frozen=True)
class Site:
    """A latent site: where it lies in the flat vector, and its shapes.

    Attributes:
        name: its name in the program.
        start, stop: its slice of the flat unconstrained vector.
        shape: its constrained shape without the task plate (event shape; for a global site its full shape).
        unconstrained_shape: likewise, of its unconstrained value.
        batch_dims: of a global site, how many of its dimensions are plates of its own.
        plates: name, size and dim of these.
    """

    name: str
    start: int
    stop: int
    shape: torch.Size
    unconstrained_shape: torch.Size
    batch_dims: int = 0
    plates: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class Layout:
    """The sites of a task program.

    Attributes:
        local: task parameters φ, in the order of the program.
        theta: global sites, in the order of the program.
        observed: names of the likelihood's sites.
        deterministic: functions of the task parameters that the program names, in its task plate.
        dim: D, the length of a task's unconstrained vector u.
        theta_dim: E, the length of the unconstrained vector of all global sites.
        num_features: width of x.
    """

    local: tuple[Site, ...]
    theta: tuple[Site, ...]
    observed: tuple[str, ...]
    num_features: int
    deterministic: tuple[Site, ...] = ()

    @property
    def dim(self) -> int:
        """Length of u."""
        return self.local[-1].stop if self.local else 0

    @property
    def theta_dim(self) -> int:
        """Length of the vector of global sites."""
        return self.theta[-1].stop if self.theta else 0


@dataclass
class Pass:
    """What one pass over a program found.

    Attributes:
        values: constrained value of each latent site.
        log_dets: log |d value / d unconstrained| of each, summed over its event.
        log_prior: log p(φ | θ) with Jacobian, ``[…, tasks]``.
        log_likelihood: ``[…, tasks, shots]``, summed over observed sites.
        log_theta: log p(θ) of the global sites in their own space, ``[…]``.
        observed: distribution and value of each observed site.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    log_dets: dict[str, Tensor] = field(default_factory=dict)
    log_prior: Tensor | float = 0.0
    log_likelihood: Tensor | float = 0.0
    log_theta: Tensor | float = 0.0
    observed: dict[str, tuple[Any, Tensor]] = field(default_factory=dict)


class Substitute(Messenger):
    """Give each latent site its slice of the flat unconstrained vectors and add up the densities.

    Args:
        layout: the sites.
        u: ``[…, tasks, D]``.
        theta: ``[…, E]`` for global sites, or None where there are none. Leading dimensions become dimensions left
            of the two plates.
        sample_observed: draw sites of the likelihood that have no value, rather than leaving zeros.
    """

    def __init__(self, layout: Layout, u: Tensor | None, theta: Tensor | None, *, sample_observed: bool = False):
        super().__init__()
        self.result = Pass()
        self.device = torch.device("cpu")  # of values that the handler makes; set by whoever runs the program
        self.u, self.theta = u, theta
        self.local = {s.name: s for s in layout.local}
        self.globals = {s.name: s for s in layout.theta}
        self.observed = frozenset(layout.observed)
        self.sample_observed = sample_observed

    def _pyro_param(self, msg: Any) -> None:
        msg["stop"] = True

    def _pyro_sample(self, msg: Any) -> None:
        msg["stop"] = True
        name = msg["name"]
        if is_subsample(msg):
            return
        if is_deterministic(msg):
            self.result.values[name] = msg["value"]
        elif name in self.local:
            self._local(msg, self.local[name])
        elif name in self.globals:
            self._global(msg, self.globals[name])
        elif name in self.observed:
            self._observed(msg)
        else:
            raise SiteError(
                f"The site {name!r} was not there at the program's first run. A program must have the same sites "
                "on every run, whatever the data."
            )

    def _local(self, msg: Any, site: Site) -> None:
        fn, out = msg["fn"], self.result
        value, log_det = self.local_value(fn, site)
        msg["value"], msg["done"] = value, True
        # the Jacobian belongs to the change of variables: a scale of the density does not touch it
        log_prob = scale_and_mask(fn.log_prob(value), msg["scale"], msg["mask"]) + log_det
        out.values[site.name], out.log_dets[site.name] = value, log_det
        out.log_prior = out.log_prior + log_prob.squeeze(-1)

    def local_value(self, fn: Any, site: Site) -> tuple[Tensor, Tensor]:
        """Constrained value ``[…, tasks, 1, *event]`` of a task parameter and its log Jacobian ``[…, tasks, 1]``."""
        assert self.u is not None
        flat = self.u[..., site.start : site.stop]
        raw = flat.reshape(*flat.shape[:-1], 1, *site.unconstrained_shape)
        return _forward(bijection(site.name, fn), raw, fn.event_dim)

    def _global(self, msg: Any, site: Site) -> None:
        fn, out = msg["fn"], self.result
        value, log_det = self.global_value(fn, site)
        msg["value"], msg["done"] = value, True
        log_prob = scale_and_mask(fn.log_prob(value), msg["scale"], msg["mask"])
        lead = value.shape[: max(value.dim() - 2 - fn.event_dim, 0)]
        out.values[site.name] = value
        out.log_dets[site.name] = log_det.reshape(*lead, -1).sum(-1)
        out.log_theta = out.log_theta + log_prob.reshape(*lead, -1).sum(-1)

    def global_value(self, fn: Any, site: Site) -> tuple[Tensor, Tensor]:
        """Constrained value of a global site, with two dimensions for the plates when there are leading ones."""
        assert self.theta is not None
        flat = self.theta[..., site.start : site.stop]
        lead = flat.shape[:-1]
        shape = site.unconstrained_shape
        if lead:
            batch_dims = len(fn.batch_shape)
            shape = torch.Size([1] * (2 - batch_dims)) + shape
        return _forward(bijection(site.name, fn), flat.reshape((*lead, *shape)), fn.event_dim)

    def _observed(self, msg: Any) -> None:
        fn, out = msg["fn"], self.result
        if msg["is_observed"]:
            out.log_likelihood = out.log_likelihood + scale_and_mask(
                fn.log_prob(msg["value"]), msg["scale"], msg["mask"]
            )
        elif not self.sample_observed:
            msg["value"] = torch.zeros(fn.shape(), device=self.device)
            msg["done"] = True
        out.observed[msg["name"]] = (fn, msg["value"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.sample_observed and msg["name"] in self.observed:
            self.result.observed[msg["name"]] = (msg["fn"], msg["value"])


def _forward(transform: Transform, raw: Tensor, event_dim: int) -> tuple[Tensor, Tensor]:
    value = transform(raw)
    log_det = transform.log_abs_det_jacobian(raw, value)
    batch_dims = value.dim() - event_dim
    return value, sum_rightmost(log_det, log_det.dim() - batch_dims)


class DrawPrior(Substitute):
    """Draw local sites (and global ones, when ``theta`` is None) from the prior, ``num_samples`` at a time.

    ``local_parts`` and ``theta_parts`` collect the unconstrained values in program order.
    """

    def __init__(self, layout: Layout, theta: Tensor | None, num_samples: int):
        super().__init__(layout, None, theta)
        self.lead = torch.Size([num_samples])
        self.local_parts: list[Tensor] = []
        self.theta_parts: list[Tensor] = []

    def local_value(self, fn: Any, site: Site) -> tuple[Tensor, Tensor]:
        """A draw; its Jacobian is not needed and given as 0."""
        batch = torch.broadcast_shapes(fn.batch_shape, (*self.lead, *([1] * 2)))
        value = fn.expand(batch).sample()
        transform = bijection(site.name, fn)
        raw = transform.inv(value)
        self.local_parts.append(raw.reshape(*value.shape[: value.dim() - fn.event_dim - 1], -1))
        return value, torch.zeros(batch, dtype=value.dtype, device=value.device)

    def global_value(self, fn: Any, site: Site) -> tuple[Tensor, Tensor]:
        """The value given, else a draw."""
        if self.theta is not None:
            return super().global_value(fn, site)
        own = site.shape[: len(site.shape) - fn.event_dim]
        batch = torch.broadcast_shapes(fn.batch_shape, (*self.lead, *[1] * (2 - len(own)), *own))
        value = fn.expand(batch).sample()
        self.theta_parts.append(bijection(site.name, fn).inv(value).reshape(*self.lead, -1))
        return value, torch.zeros(batch, dtype=value.dtype, device=value.device)


class PriorMoments(Substitute):
    """Mean and standard deviation of each local site in unconstrained space, along the path of the means.

    Exact for Normal, LogNormal and MultivariateNormal sites; else the median and the scaled median absolute deviation
    of 256 draws under a fixed seed (common random numbers, so that the result is smooth in θ where the distribution is
    reparameterised).
    """

    DRAWS = 256

    def __init__(self, layout: Layout, theta: Tensor | None):
        super().__init__(layout, None, theta)
        self.locs: list[Tensor] = []
        self.scales: list[Tensor] = []

    def local_value(self, fn: Any, site: Site) -> tuple[Tensor, Tensor]:
        """The mean in unconstrained space, mapped back; moments are kept on the side."""
        transform = bijection(site.name, fn)
        base = fn
        while isinstance(base, torch.distributions.Independent):
            base = base.base_dist
        if isinstance(base, torch.distributions.Normal | torch.distributions.LogNormal):
            loc, scale = base.loc, base.scale
        elif isinstance(base, torch.distributions.MultivariateNormal):
            loc, scale = base.mean, base.stddev
        else:
            with forked_rng(as_generator(0, self.device)):
                draws = fn.rsample((self.DRAWS,)) if fn.has_rsample else fn.sample((self.DRAWS,))
            raw = transform.inv(draws)
            # median and its normal-consistent deviation: heavy-tailed priors have no mean
            loc = raw.median(0).values
            scale = 1.4826 * (raw - loc).abs().median(0).values
            if not bool(torch.isfinite(loc).all() and torch.isfinite(scale).all() and (scale > 0).all()):
                raise SiteError(
                    f"The prior of the site {site.name!r} ({type(fn).__name__}) has draws at the edge of its support, "
                    "so that it has no finite spread in unconstrained space, from which adaptation starts. Use a prior "
                    "that keeps away from the edge, or rescale the site."
                )
        lead = fn.batch_shape
        shape = (*lead, *site.unconstrained_shape)
        loc, scale = loc.expand(shape), scale.expand(shape)
        flat = (*lead[:-1], -1)
        self.locs.append(loc.reshape(flat))
        self.scales.append(scale.reshape(flat))
        return _forward(transform, loc, fn.event_dim)


class Record(Messenger):
    """Keep every sample message, for reading the structure of a program at its first run."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Any] = []
        self.names: set[str] = set()

    def _pyro_param(self, msg: Any) -> None:
        msg["stop"] = True

    def _pyro_sample(self, msg: Any) -> None:
        msg["stop"] = True
        if is_subsample(msg):
            return
        if msg["name"] in self.names:
            raise SiteError(
                f"Two sample sites are named {msg['name']!r}. Give every site of the program a name of its own."
            )
        self.names.add(msg["name"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if not is_subsample(msg):
            self.messages.append(dict(msg))
