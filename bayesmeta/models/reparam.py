"""Non-centred forms of a model, by a Pyro handler; the model itself is not rewritten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.infer.reparam.reparam import Reparam

from bayesmeta.data import Observations
from bayesmeta.errors import ModelError, OptionError, SiteError
from bayesmeta.models.network import NetworkProgram
from bayesmeta.models.plates import SHOTS, TASKS
from bayesmeta.models.program import TaskProgram
from bayesmeta.models.scope import ParamScope


def noncentred(model: Any, sites: Sequence[str] | None = None) -> TaskProgram:
    """The same model with task parameters written as location + scale × ε, ε ~ N(0, 1) and the like.

    Adaptation then works on ε: where a scale is small or uncertain the centred form is a funnel, in which gradient
    steps and mean-field Gaussians do badly. The posterior is the same; ``named`` and ``sample`` give ε under
    ``<site>_decentered`` (for a transformed site such as a LogNormal, ``<site>_base_decentered``) and the site itself.

    Source: O. Papaspiliopoulos, G. Roberts, M. Sköld, "A General Framework for the Parametrization of Hierarchical
    Models", Statistical Science 22, 2007, https://doi.org/10.1214/088342307000000014; M. Gorinova, D. Moore,
    M. Hoffman, "Automatic Reparameterisation of Probabilistic Programs", ICML 2020, https://arxiv.org/abs/1906.03028.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel` (its site is ``phi``; the trace takes the place of its fast path)
            or any Pyro program. Its parameters are shared with the result.
        sites: which task parameters, of a location-scale family (Normal, Laplace, StudentT, …), a multivariate Normal,
            or a transform of one; None means all that are.

    Raises:
        OptionError: for names given as one string, or none.
        SiteError: at the first data, for a site that is not there or has no non-centred form.
    """
    if isinstance(sites, str) or (sites is not None and len(sites) == 0):
        raise OptionError(f"sites={sites!r}; expected a list of site names, or None for all.")
    names = None if sites is None else frozenset(sites)
    program, scope = model, None
    if isinstance(model, TaskProgram):
        scope = model.scope
        if isinstance(model, NonCentredProgram):
            names = None if names is None or model.sites is None else names | model.sites
        if not isinstance(model, NetworkProgram):
            program = model.program
    return NonCentredProgram(program, names, scope)


class NonCentredProgram(TaskProgram):
    """What :func:`noncentred` makes.

    Args:
        program: a Pyro program, or a network model.
        sites: which task parameters to rewrite; None: all that can be.
        scope: the parameters of ``pyro.param`` statements to share; None: its own.
    """

    def __init__(
        self, program: Callable[..., Any], sites: frozenset[str] | None, scope: ParamScope | None = None
    ) -> None:
        super().__init__(program)
        self.sites = sites
        if scope is not None and not isinstance(program, NetworkProgram):
            self.scope = scope
        self._rewritten: set[str] = set()  # sites that a strategy was given for, halfway ones too
        self._halfway: set[str] = set()  # the untransformed sites of transformed ones
        self._noise: set[str] = set()  # the ε

    def _run(self, observations: Observations) -> Any:
        with poutine.reparam(config=self._strategy):
            return super()._run(observations)

    def prepare(self, observations: Observations) -> NonCentredProgram:
        """Read the program's sites at its first data, and check that the ones named were rewritten."""
        first = not self.is_prepared
        network = self.program if isinstance(self.program, NetworkProgram) else None
        if network is not None:
            network.prepare(observations)
        super().prepare(observations)
        if network is not None:
            self._needs_w = network._needs_w
        if first:
            done = self._rewritten - self._halfway
            missing = sorted((self.sites or frozenset()) - done)
            if missing or not done:
                there = ", ".join(sorted({s.name for s in self.layout.local} - self._noise)) or "no other"
                self._layout = None
                raise SiteError(
                    f"There is no task parameter to write in non-centred form: {', '.join(missing) or 'any'}. Other "
                    f"task parameters: {there}. It must be inside the task plate and of a location-scale family."
                )
            # the untransformed halfway site of a transformed one says nothing new
            kept = tuple(site for site in self.layout.deterministic if site.name not in self._halfway)
            self._layout = replace(self.layout, deterministic=kept)
        return self

    def check(self, observations: Observations) -> None:
        """Check the feature width, and what the network model checks."""
        super().check(observations)
        if isinstance(self.program, NetworkProgram):
            self.program.check_inputs(observations)

    def _strategy(self, msg: Any) -> Reparam | None:
        name = msg["name"]
        plates = {frame.name for frame in msg["cond_indep_stack"]}
        if msg["is_observed"] or TASKS not in plates or SHOTS in plates or name in self._noise:
            return None
        if not (self.sites is None or name in self.sites or name in self._halfway):
            return None
        strategy = _strategy_for(msg["fn"])
        if strategy is None:
            if self.sites is None:
                return None
            raise SiteError(
                f"The site {name!r} has the distribution {type(msg['fn']).__name__}, which has no non-centred form "
                "here; expected a location-scale family, a multivariate Normal, or a smooth transform of one."
            )
        self._rewritten.add(name)
        if isinstance(strategy, TransformReparam):
            self._halfway.add(f"{name}_base")
        else:
            self._noise.add(f"{name}_decentered")
        return strategy


def _strategy_for(fn: Any) -> Reparam | None:
    """How to rewrite a distribution; None where there is no way."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    if isinstance(fn, torch.distributions.MultivariateNormal | torch.distributions.LowRankMultivariateNormal):
        return _RootReparam()
    if isinstance(fn, torch.distributions.TransformedDistribution):
        base = fn.base_dist
        # Pyro's strategy wants its own distributions; a fold such as |·| cannot be undone
        smooth = all(transform.bijective for transform in fn.transforms) and hasattr(base, "event_dim")
        return TransformReparam() if smooth and _strategy_for(base) is not None else None
    if {"loc", "scale"} <= set(fn.arg_constraints) and fn.support.event_dim == 0:
        return LocScaleReparam(centered=0.0)
    return None


class _RootReparam(Reparam):
    """φ = loc + R ε with R the Cholesky factor of a multivariate Normal's covariance."""

    def apply(self, msg: Any) -> Any:
        """Sample ε and give φ as a deterministic function of it."""
        fn = msg["fn"]
        if not hasattr(fn, "scale_tril"):
            raise ModelError(f"The site {msg['name']!r} is a {type(fn).__name__} without a scale; expected scale_tril.")
        zero = torch.zeros_like(fn.loc).expand(*fn.batch_shape, *fn.event_shape)
        noise = pyro.sample(f"{msg['name']}_decentered", dist.Normal(zero, torch.ones_like(zero)).to_event(1))
        value = fn.loc + (fn.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
        return {"fn": dist.Delta(value, event_dim=1).mask(False), "value": value, "is_observed": True}
