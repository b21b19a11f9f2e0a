"""Simulation: draw the truth from the model, infer it, and see where among the posterior's draws it falls.

If truth and data come from the model that the posterior is of, the truth is exchangeable with exact posterior draws,
so that its rank among them is uniform. That tells wrong inference from a wrong model, which only real data can show.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.diagnostics.uniformity import EcdfBand, bonferroni, chi_squared, legendre, shape_of
from bayesmeta.errors import DataError, NonFiniteDataError, OptionError, ShapeError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.protocols import Posterior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What ranks say of a posterior; "miscalibrated" in another way than these.
RankFinding = Literal["calibrated", "too narrow", "too wide", "too low", "too high", "miscalibrated"]
Values = Mapping[str, Tensor]


class Adapts(Protocol):
    """A method, as far as simulation needs it."""

    def adapt(self, support: Observations, *, generator: torch.Generator | int | None = None) -> Any:
        """Posterior over φ given the support alone."""


@dataclass(frozen=True, eq=False)
class SBC(Mapping[str, float]):
    """Simulation-based calibration; a mapping from each quantity to its p-value (small ones speak against it).

    Attributes:
        ranks: of each quantity, how many draws lie below the truth, ``[simulations]``, 0 … ``num_draws``.
        p_values: by quantity, from the whole rank curve (ECDF band), χ² over bins and the moments, Bonferroni over the
            three.
        details: by quantity, these three: ``ecdf``, ``chi_squared``, ``moments``.
        findings: by quantity; "too narrow" and so on are of the posterior, with Bonferroni over the quantities.
        band: of the rank curves.
        num_draws: draws of the posterior of each simulation.
        alpha: p-value, over all quantities together, below which a quantity is not called calibrated.
    """

    ranks: dict[str, Tensor]
    p_values: dict[str, float]
    details: dict[str, dict[str, float]]
    findings: dict[str, RankFinding]
    band: EcdfBand
    num_draws: int
    alpha: float

    def __getitem__(self, name: str) -> float:
        return self.p_values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.p_values)

    def __len__(self) -> int:
        return len(self.p_values)

    @property
    def passes(self) -> bool:
        """Whether every quantity is called calibrated."""
        return set(self.findings.values()) == {"calibrated"}

    def __str__(self) -> str:
        count = self.band.num_values
        what = f"ranks of {count} truths among {self.num_draws} draws: the posterior is"
        lines = [f"{'quantity':<20}{'p-value':>10}   {what}"]
        for name, p in self.p_values.items():
            lines.append(f"{name:<20}{p:>10.2g}   {self.findings[name]}")
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Rank curves with their bands, see :func:`~bayesmeta.plot_ranks`."""
        from bayesmeta.diagnostics.plots_calibration import plot_ranks

        return plot_ranks(self, path=path)


@torch.no_grad()
def sbc(
    simulate: Callable[[torch.Generator], tuple[Values, Any]],
    infer: Callable[[Any], Posterior | Values],
    *,
    num_simulations: int,
    num_draws: int = 63,
    num_bins: int = 16,
    quantities: Mapping[str, Callable[[Values, Any], Tensor]] | None = None,
    shared: Collection[str] = (),
    alpha: float = 0.01,
    generator: Seed = None,
) -> SBC:
    """Simulation-based calibration of any model and any inference, for φ and θ.

    Sources: S. Talts, M. Betancourt, D. Simpson, A. Vehtari, A. Gelman, "Validating Bayesian Inference Algorithms with
    Simulation-Based Calibration", 2018, https://arxiv.org/abs/1804.06788, algorithm 1; the bands are those of
    Säilynoja et al. (2022), see :class:`~bayesmeta.diagnostics.uniformity.EcdfBand`. Ranks of the parameters alone
    cannot tell the posterior from the prior; quantities that look at the data can, the log-likelihood first of all:
    M. Modrák et al., "Simulation-Based Calibration Checking for Bayesian Computation: The Choice of Test Quantities
    Shapes Sensitivity", Bayesian Analysis 2023, https://arxiv.org/abs/2211.02383.

    Ties (of discrete quantities) are broken at random. The draws must be independent: thin a chain.

    Args:
        simulate: given a generator, the truth by name and the data. Each truth is ``[tasks, …]``, a task parameter, or
            ``[…]``, a global one.
        infer: from the data to a posterior, or to draws by name, each ``[num_draws, *shape of the truth]``.
        num_simulations: how often. If the truth holds nothing global, all tasks of a call count, as they are
            independent given θ; else only the first, as all share one θ.
        num_draws: draws of each posterior, n; n + 1 must divide into the bins.
        num_bins: of the χ² test.
        quantities: by name, functions of the values by name (the truth ``[tasks, …]``, or draws ``[n, tasks, …]``; a
            global one lacks the tasks) and the data; they give ``[tasks]`` or ``[n, tasks]`` (of global ones a number,
            or ``[n]``). Ranked beside the parameters themselves.
        shared: names of the global truths; those of a posterior's ``named_theta`` are known to be.
        alpha: see :class:`SBC`.
        generator: generator or seed; None means seed 0. ``simulate`` gets one that moves on.

    Returns:
        The ranks, their tests, and the findings in words.

    Raises:
        OptionError: for options out of range.
        ShapeError, DataError: for a truth without draws of its name, or with draws of another shape.
        NonFiniteDataError: for NaN among truths or draws.
    """
    if num_simulations < 1 or num_draws < 3 or not 0.0 < alpha < 1.0:
        raise OptionError(
            f"num_simulations={num_simulations}, num_draws={num_draws}, alpha={alpha}; expected at least 1, at least "
            "3, and a number between 0 and 1."
        )
    generator = as_generator(generator, stream="simulations")
    found: dict[str, list[Tensor]] = {}
    for _ in range(num_simulations):
        truth, data = simulate(generator)
        draws, common = _draws(infer(data), truth, num_draws, generator)
        common |= set(shared)
        true_values, drawn = _scalars(truth, 0, common), _scalars(draws, 1, common)
        for name, function in (quantities or {}).items():
            true_values[name], drawn[name] = function(truth, data), function(draws, data)
        for name, value in true_values.items():
            rank = rank_of(name, value, drawn[name], num_draws, generator)
            found.setdefault(name, []).append(rank[:1] if common & set(truth) else rank)
    ranks = {name: torch.cat(each) for name, each in found.items()}
    return _judge(ranks, num_draws, num_bins, alpha)


def sbc_method(
    method: Adapts,
    template: Observations,
    *,
    num_simulations: int = 1,
    num_draws: int = 63,
    num_bins: int = 16,
    quantities: Mapping[str, Callable[[Values, Any], Tensor]] | None = None,
    alpha: float = 0.01,
    generator: Seed = None,
) -> SBC:
    """:func:`sbc` of a trained method under its own model: φ from its prior, y from its likelihood, then ``adapt``.

    It asks whether ``adapt`` finds the posterior of the method's own θ, whatever the real tasks are. The template's
    tasks are simulated all at once, so that one simulation of a template of 1000 tasks is a good beginning. Where θ has
    a posterior too, only one task of each simulation counts, and φ alone is judged.

    Args:
        method: anything with ``adapt``.
        template: inputs, masks and covariates of the tasks to simulate, ``[tasks, shots, …]``; its y is replaced, and
            only says what y may look like.
        num_simulations, num_draws, num_bins, quantities, alpha, generator: as of :func:`sbc`; the data that a quantity
            gets are the simulated support.

    Returns:
        As :func:`sbc`.

    Raises:
        UnsupportedError: by ``prior_draws``, for a prior without a density.
        OptionError, ShapeError, DataError, NonFiniteDataError: as :func:`sbc`.
    """
    if template.y is None:
        raise DataError("The template needs some y, by which the method's model is looked at; this one has y=None.")
    first = method.adapt(template, generator=0)
    shared = bool(first.named_theta(first.draws(2, 0)))
    example = template.y

    def simulate(source: torch.Generator) -> tuple[Values, Observations]:
        model = method.adapt(template, generator=source) if shared else first  # for another θ
        draws = model.prior_draws(1, source)
        y = model.predict(template.with_y(None), draws=draws, generator=source)[0]
        keep = template.full_mask() if y.dim() == 2 else template.full_mask().unsqueeze(-1)
        data = template.with_y(torch.where(keep, y, example).to(example.dtype))
        values = {name: value[0] for name, value in model.named(draws).items()}
        # θ varies with the simulation, so that the tasks of one are not independent
        return ({k: v[:1] for k, v in values.items()} if shared else values), data

    def infer(data: Observations) -> Values:
        posterior = method.adapt(data, generator=generator_of_adapt)
        values = posterior.named(posterior.draws(num_draws, generator_of_adapt))
        return {k: v[:, :1] for k, v in values.items()} if shared else values

    generator_of_adapt = as_generator(generator, template.device, "adapt to simulations")
    return sbc(
        simulate,
        infer,
        num_simulations=num_simulations,
        num_draws=num_draws,
        num_bins=num_bins,
        quantities=quantities,
        alpha=alpha,
        generator=as_generator(generator, template.device, "simulations"),
    )


# -- ranks --------------------------------------------------------------------------------------------------------


def _draws(
    result: Any, truth: Values, num_draws: int, generator: torch.Generator
) -> tuple[dict[str, Tensor], set[str]]:
    """Draws by name, and the names of the global ones as far as they are known."""
    if isinstance(result, Mapping):
        values, common = dict(result), set()
    else:
        draws = result.draws(num_draws, generator)
        theta = result.named_theta(draws)
        values, common = result.named(draws) | theta, set(theta)
    for name, value in truth.items():
        if name not in values:
            raise DataError(
                f"The truth has {name!r}, of which there are no draws; the posterior has {', '.join(sorted(values))}."
            )
        expected = [num_draws, *value.shape]
        if list(values[name].shape) != expected:
            raise ShapeError(f"The draws of {name!r} have shape {list(values[name].shape)}; expected {expected}.")
    return {name: values[name] for name in values if name in truth}, common


def _scalars(values: Values, lead: int, shared: Collection[str]) -> dict[str, Tensor]:
    """Each component of each value as a quantity of its own: ``[tasks]``, ``[n, tasks]``; without tasks if global."""
    out = {}
    for name, value in values.items():
        kept = lead if name in shared else lead + 1
        if value.dim() <= kept:
            out[name] = value
            continue
        flat = value.flatten(kept)
        for i in range(flat.shape[-1]):
            out[name if flat.shape[-1] == 1 else f"{name}[{i}]"] = flat[..., i]
    return out


def rank_of(name: str, truth: Tensor, draws: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
    """How many draws lie below the truth, ties broken at random, ``[tasks]`` (one for a global number)."""
    if list(draws.shape) != [num_draws, *truth.shape]:
        raise ShapeError(
            f"The quantity {name!r} has shape {list(truth.shape)} of the truth and {list(draws.shape)} of draws; "
            f"expected {[num_draws, *truth.shape]} of these."
        )
    if not bool(truth.isfinite().all() & draws.isfinite().all()):
        raise NonFiniteDataError(f"The quantity {name!r} is not finite in a simulation; inference has diverged there.")
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    uniform = torch.rand(truth.shape, generator=generator, dtype=torch.float64, device=generator.device)
    return (below + (uniform.to(below.device) * (equal + 1)).floor().long()).reshape(-1).cpu()


def _judge(ranks: dict[str, Tensor], num_draws: int, num_bins: int, alpha: float) -> SBC:
    if not ranks:
        raise DataError("The truth has no values, so there is nothing to rank.")
    counts = {len(each) for each in ranks.values()}
    if len(counts) > 1:
        raise ShapeError(
            f"The quantities have {sorted(counts)} ranks; expected equally many. Name the global ones in shared=…: "
            "then one task of each simulation counts."
        )
    if counts == {1}:
        raise DataError("One simulation of one task has one rank, of which no test can be made. Simulate more.")
    band = EcdfBand(counts.pop(), num_draws)
    p_values, details, findings = {}, {}, {}
    for name, each in ranks.items():
        shape = shape_of(legendre(smooth(each, num_draws)))
        details[name] = {
            "ecdf": band.p_value(each),
            "chi_squared": chi_squared(each, num_draws, num_bins),
            "moments": shape.p_value,
        }
        p = p_values[name] = bonferroni(list(details[name].values()))
        level = alpha / len(ranks)
        findings[name] = finding_of(p, shape.dispersion, shape.location, shape.p_dispersion, shape.p_location, level)
    return SBC(ranks, p_values, details, findings, band, num_draws, alpha)


def smooth(ranks: Tensor, num_draws: int) -> Tensor:
    """(rank + U) / (n + 1): uniform on (0, 1) where the rank is uniform on 0 … n."""
    uniform = torch.rand(ranks.shape, generator=as_generator(0, stream="smooth ranks"), dtype=torch.float64)
    return (ranks + uniform) / (num_draws + 1)


def finding_of(
    p: float, dispersion: float, location: float, p_dispersion: float, p_location: float, alpha: float
) -> RankFinding:
    """What ranks say of a posterior, in words, from the tests of their shape."""
    if p >= alpha:
        return "calibrated"
    if p_dispersion < alpha and (p_dispersion <= p_location or p_location >= alpha):
        return "too narrow" if dispersion > 0 else "too wide"
    if p_location < alpha:
        return "too low" if location > 0 else "too high"
    return "miscalibrated"


# -- contraction --------------------------------------------------------------------------------------------------


@torch.no_grad()
def contraction(
    adapt: Callable[[Observations], Posterior],
    support: Observations,
    shots: tuple[int, ...] = (1, 2, 5, 10),
    *,
    num_samples: int = 1000,
    generator: Seed = None,
) -> dict[int, dict[str, tuple[float, float]]]:
    """How much the posterior of φ shrinks against its prior as a task shows more observations.

    1 − var(posterior) / var(prior) of each component, the mean over a parameter's components and over tasks: near 0
    the data say nothing of it, near 1 they say all; below 0 the posterior is wider than the prior. It should rise with
    the shots. Source: M. Betancourt, "Calibrating Model-Based Inferences and Decisions", 2018,
    https://arxiv.org/abs/1803.08393, section 4.2 (posterior z-score against contraction), there for one posterior.

    Args:
        adapt: from a support to its posterior, such as ``method.adapt``.
        support: tasks with at least as many observations as the largest number of shots; the first ones are taken.
        shots: numbers of shots, each at least 1.
        num_samples: draws of posterior and prior.
        generator: generator or seed; None means seed 0.

    Returns:
        For each number of shots, by parameter the mean and its standard error over tasks (NaN for one task).

    Raises:
        OptionError: for numbers of shots that the tasks do not have.
        UnsupportedError: by ``prior_draws``, for a prior without a density.
    """
    least = int(support.counts().min())
    if not shots or min(shots) < 1 or max(shots) > least:
        raise OptionError(f"shots={list(shots)}; expected numbers from 1 to {least}, which every task has.")
    order = (~support.full_mask()).to(torch.int8).argsort(dim=1, stable=True)  # the real ones first
    out: dict[int, dict[str, tuple[float, float]]] = {}
    for count in shots:
        posterior = adapt(_first(support, order[:, :count]))
        source = as_generator(generator, support.device, "contraction")
        after = posterior.named(posterior.draws(num_samples, source))
        before = posterior.named(posterior.prior_draws(num_samples, source))
        out[count] = {}
        for name, value in after.items():
            prior = before[name].double().var(0)
            each = torch.where(prior > 0, 1.0 - value.double().var(0) / prior, torch.nan)
            task = each.flatten(1).nanmean(-1) if each.dim() > 1 else each
            error = float(task.std()) / len(task) ** 0.5 if len(task) > 1 else float("nan")
            out[count][name] = float(task.mean()), error
    return out


def _first(support: Observations, index: Tensor) -> Observations:
    """The observations of each task at these places, ``[tasks, count]``."""

    def take(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        places = index.reshape(*index.shape, *[1] * (value.dim() - 2)).expand(*index.shape, *value.shape[2:])
        return value.gather(1, places)

    x = take(support.x)
    assert x is not None
    return replace(support, x=x, y=take(support.y), mask=None)
