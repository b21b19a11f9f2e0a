"""SBC of a method under its own model: the truth is drawn from its prior, and ``adapt`` is to find it."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.diagnostics.checks import in_words
from bayesmeta.diagnostics.simulation import (
    SBC,
    Quantities,
    check_options,
    distinct_draws,
    judge_ranks,
    ranks_of,
)
from bayesmeta.errors import DataError, OptionError
from bayesmeta.ops.random import Seed, as_generator

#: the quantity that :func:`sbc_method` adds
LOG_LIKELIHOOD = "log_likelihood"


class Adapts(Protocol):
    """A method, as far as simulation needs it.

    A parameter ``num_theta`` of ``adapt``, where there is one, is the number of draws of a learned q(θ) behind the
    posterior. A true attribute ``theta_is_inferred`` of the posterior says that θ was inferred with φ, from the tasks
    of the support together; ``prior_draws`` then draws θ from its prior.
    """

    def adapt(self, support: Observations, *, generator: torch.Generator | int | None = None) -> Any:
        """Posterior over φ given the support alone."""


def sbc_method(
    method: Adapts,
    template: Observations,
    *,
    num_simulations: int = 1,
    num_draws: int = 63,
    num_bins: int = 16,
    quantities: Quantities | None = None,
    log_likelihood: bool = True,
    simulator: Adapts | None = None,
    alpha: float = 0.01,
    generator: Seed = None,
) -> SBC:
    """:func:`~bayesmeta.sbc` of a trained method under its own model: φ from its prior, y given φ, then ``adapt``.

    It asks whether ``adapt`` finds the posterior of the method's own θ, whatever the real tasks are. The template's
    tasks are simulated all at once, so that one simulation of a template of 1000 tasks is a good beginning. Beside each
    number of φ, the log-likelihood of the simulated support is ranked (Modrák et al. 2023, see there): "too low" is a
    posterior that has used too little of the data, "too high" one that clings to them.

    Where θ is more than a point, it is drawn anew in each simulation, and only one task of each counts:

    - of a method that infers θ in ``adapt`` (``NUTS(…, infer_theta=True)``), from its prior. θ is judged too, and the
      log-likelihood is that of all tasks together.
    - of a method with a learned q(θ), from q(θ), and φ alone is judged. ``adapt`` leaves q(θ) as it is, although the
      simulated support tells of θ; a wide q(θ) may be why such a method fails.

    Args:
        method: anything with ``adapt``.
        template: inputs, masks and covariates of the tasks to simulate, ``[tasks, shots, …]``; its y is replaced, and
            only says what y may look like.
        num_simulations, num_draws, num_bins, quantities, alpha, generator: as there; the data that a quantity gets
            are the simulated support.
        simulator: a method of the same model and θ by which to simulate; by default the method itself. Since it is
            adapted to the template before it simulates, a cheap one saves time where adapting takes long:
            ``simulator=bm.ABML(nuts.program, inner_steps=0)``. Not for a method that infers θ.
        log_likelihood: rank that of the support too, as ``"log_likelihood"`` (unless ``quantities`` has that name).

    Returns:
        As there.

    Raises:
        UnsupportedError: by ``prior_draws``, for a prior without a density.
        OptionError, ShapeError, DataError, NonFiniteDataError: as there.
    """
    if template.y is None:
        raise DataError("The template needs some y, by which the method's model is looked at; this one has y=None.")
    check_options(num_simulations, num_draws, alpha)
    source = as_generator(generator, template.device, "simulations")
    ranked = log_likelihood and LOG_LIKELIHOOD not in (quantities or {})
    own = OwnModel(method, simulator or method, template, num_draws, ranked)
    found: dict[str, list[Tensor]] = {}
    for _ in range(num_simulations):
        truth, data = own.simulate(source)
        draws = own.infer(data, source)
        for name, rank in ranks_of(truth, draws, data, quantities or {}, own.shared, num_draws, source).items():
            found.setdefault(name, []).append(rank[:1] if own.theta_varies else rank)
    return judge_ranks({name: torch.cat(each) for name, each in found.items()}, num_draws, num_bins, alpha)


class OwnModel:
    """A method's own model, simulated and inferred: the two halves of :func:`sbc_method`.

    Attributes:
        theta_varies: whether the tasks of a simulation share a θ that is drawn anew in each.
        shared: names of the global values.
    """

    def __init__(
        self, method: Adapts, simulator: Adapts, template: Observations, num_draws: int, log_likelihood: bool
    ) -> None:
        self.method, self.simulator, self.template = method, simulator, template
        self.num_draws, self.log_likelihood = num_draws, log_likelihood
        self.first = simulator.adapt(template, generator=0)
        self.infers_theta = bool(getattr(self.first, "theta_is_inferred", False))
        theta = self.first.named_theta(self.first.draws(8, 0))
        self.theta_varies = self.infers_theta or any(bool((v != v[:1]).any()) for v in theta.values())
        self.shared: set[str] = set()
        if self.infers_theta:
            self.shared = {*theta, LOG_LIKELIHOOD} if log_likelihood else set(theta)
        # with fewer draws of q(θ) than of φ, draws of φ would have θ in common
        learned = self.theta_varies and not self.infers_theta
        takes = "num_theta" in inspect.signature(method.adapt).parameters
        self.options: dict[str, Any] = {"num_theta": num_draws} if learned and takes else {}

    def simulate(self, generator: torch.Generator) -> tuple[dict[str, Tensor], Observations]:
        """The truth by name, and the support that it gave."""
        model, template, example = self.first, self.template, self.template.y
        assert example is not None
        if self.theta_varies and not self.infers_theta:
            model = self.simulator.adapt(template, generator=generator)  # another θ
        with torch.no_grad():
            draws = model.prior_draws(1, generator)
            y = model.predict(template.with_y(None), draws=draws, generator=generator)[0]
            keep = template.full_mask() if y.dim() == 2 else template.full_mask().unsqueeze(-1)
            data = template.with_y(torch.where(keep, y, example).to(example.dtype))
            return {name: value[0] for name, value in self._values(model, draws, data).items()}, data

    def infer(self, data: Observations, generator: torch.Generator) -> dict[str, Tensor]:
        """Draws by name."""
        posterior = self.method.adapt(data, generator=generator, **self.options)
        if bool(getattr(posterior, "theta_is_inferred", False)) != self.infers_theta:
            raise OptionError(
                "The method infers the global sites and its simulator does not, or the other way round, so that the "
                "truth would come from another model. Leave out simulator=."
            )
        with torch.no_grad():
            return self._values(posterior, distinct_draws(posterior, self.num_draws, generator), data)

    def _values(self, posterior: Any, draws: Any, data: Observations) -> dict[str, Tensor]:
        values = dict(posterior.named(draws))
        if self.infers_theta:
            values |= posterior.named_theta(draws)
        if self.log_likelihood:
            with in_words():
                each = posterior.log_likelihood(data, draws=draws).double().sum(-1)
            values[LOG_LIKELIHOOD] = each.sum(-1) if self.infers_theta else each
        return values
