"""Simulation: draw the truth from the model, infer it, and see where among the posterior's draws it falls.

If truth and data come from the model that the posterior is of, the truth is exchangeable with exact posterior draws,
so that its rank among them is uniform. That tells wrong inference from a wrong model, which only real data can show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from bayesmeta.diagnostics.uniformity import EcdfBand, Shape, bonferroni, chi_squared, legendre, shape_of
from bayesmeta.errors import DataError, NonFiniteDataError, OptionError, ShapeError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.protocols import Posterior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: What ranks say of a posterior; "miscalibrated" in another way than these; "unknown" of ranks too few to accuse it.
RankFinding = Literal["calibrated", "too narrow", "too wide", "too low", "too high", "miscalibrated", "unknown"]
#: Fewer ranks let a posterior of half or twice the right spread pass.
LEAST_RANKS = 20
Values = Mapping[str, Tensor]
Quantities = Mapping[str, Callable[[Values, Any], Tensor]]


@dataclass(frozen=True, eq=False)
class SBC(Mapping[str, float]):
    """Simulation-based calibration; a mapping from each quantity to its p-value (small ones speak against it).

    Attributes:
        ranks: of each quantity, how many draws lie below the truth, ``[simulations]``, 0 … ``num_draws``.
        p_values: by quantity, from the whole rank curve (ECDF band), χ² over bins and the moments, Bonferroni over the
            three.
        details: by quantity, these three: ``ecdf``, ``chi_squared``, ``moments``.
        shapes: by quantity, location and dispersion of the ranks with their standard errors.
        findings: by quantity; "too narrow" and so on are of the posterior, with Bonferroni over the quantities;
            "unknown" where fewer than 20 ranks show nothing.
        band: of the rank curves.
        num_draws: draws of the posterior of each simulation.
        alpha: p-value, over all quantities together, below which a quantity is not called calibrated.
    """

    ranks: dict[str, Tensor]
    p_values: dict[str, float]
    details: dict[str, dict[str, float]]
    shapes: dict[str, Shape]
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
        """Whether every quantity is called calibrated; False where there are too few ranks to tell."""
        return set(self.findings.values()) == {"calibrated"}

    def __str__(self) -> str:
        count = self.band.num_values
        what = f"ranks of {count} truths among {self.num_draws} draws: the posterior is"
        lines = [f"{'quantity':<20}{'p-value':>10}   {what}"]
        for name, p in self.p_values.items():
            lines.append(f"{name:<20}{p:>10.2g}   {self.findings[name]}")
        if {"calibrated", "unknown"} & set(self.findings.values()):
            lines.append(_power(count, self.alpha / len(self)))
        return "\n".join(lines)

    def __repr__(self) -> str:
        kinds = list(self.findings.values())
        found = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        return f"<SBC of {self.band.num_values} ranks of each quantity: {found}>"

    def plot(self, path: str | Path | None = None) -> Figure:
        """Rank curves with their bands, see :func:`~bayesmeta.plot_ranks`."""
        from bayesmeta.diagnostics.plots_calibration import plot_ranks

        return plot_ranks(self, path=path)


def sbc(
    simulate: Callable[[torch.Generator], tuple[Values, Any]],
    infer: Callable[[Any], Posterior | Values],
    *,
    num_simulations: int,
    num_draws: int = 63,
    num_bins: int = 16,
    quantities: Quantities | None = None,
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

    Ties (of discrete quantities) are broken at random. The draws must be independent, and none may come twice. So of a
    posterior that is made of draws, such as chains, ``num_draws`` different ones are taken, evenly spaced: let a chain
    be long enough that these are independent, for ranks among autocorrelated draws look as those of a posterior that is
    too narrow. Ranks do not tell a posterior that is too narrow from one that lies off, now to one side and now to the
    other (as one that shrinks too much): "too narrow" is said of both.

    Args:
        simulate: given a generator, the truth by name and the data. Each truth is ``[tasks, …]``, a task parameter, or
            ``[…]``, a global one.
        infer: from the data to a posterior, or to draws by name, each ``[num_draws, *shape of the truth]``. Gradients
            are as the caller has them, so that it may train.
        num_simulations: how often. If the truth holds nothing global, all tasks of a call count, as they are
            independent given θ; else only the first, as all share one θ. So a θ that is drawn anew in each simulation
            belongs into the truth, even if it is of no interest.
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
        OptionError: for options out of range, or a posterior that is made of fewer draws than ``num_draws``.
        ShapeError, DataError: for a truth without draws of its name, or with draws of another shape.
        NonFiniteDataError: for NaN among truths or draws.
    """
    check_options(num_simulations, num_draws, alpha)
    generator = as_generator(generator, stream="simulations")
    found: dict[str, list[Tensor]] = {}
    for _ in range(num_simulations):
        truth, data = simulate(generator)
        draws, common = _draws(infer(data), num_draws, generator)
        common |= set(shared)
        for name, rank in ranks_of(truth, draws, data, quantities or {}, common, num_draws, generator).items():
            found.setdefault(name, []).append(rank[:1] if common & set(truth) else rank)
    return judge_ranks({name: torch.cat(each) for name, each in found.items()}, num_draws, num_bins, alpha)


# -- ranks --------------------------------------------------------------------------------------------------------


def check_options(num_simulations: int, num_draws: int, alpha: float) -> None:
    """Refuse options out of range."""
    if num_simulations < 1 or num_draws < 3 or not 0.0 < alpha < 1.0:
        raise OptionError(
            f"num_simulations={num_simulations}, num_draws={num_draws}, alpha={alpha}; expected at least 1, at least "
            "3, and a number between 0 and 1."
        )


def distinct_draws(posterior: Posterior, num_draws: int, generator: torch.Generator) -> Any:
    """Draws of which none comes twice: of a posterior that is made of draws, some of them, evenly spaced.

    Raises:
        OptionError: where it is made of fewer.
    """
    total = posterior.num_draws
    if total is None:
        return posterior.draws(num_draws, generator)
    if total < num_draws:
        raise OptionError(
            f"The posterior is made of {total} draws, and num_draws={num_draws} different ones are needed: repeated, "
            f"they would look too narrow. Take num_draws of at most {total} (num_bins must divide num_draws + 1), or "
            "a method with more particles or samples."
        )
    draws = posterior.draws(total, generator)
    index = torch.arange(num_draws) * total // num_draws
    theta = getattr(draws, "theta", None)
    if theta is not None and 1 < len(theta.unique(dim=0)) < total:
        # φ was sampled given some draws of θ, which come in turn: even spacing might meet one of them alone
        width = total // num_draws
        index = index + torch.randint(width, index.shape, generator=generator, device=generator.device).cpu()
    return replace(draws, **{f.name: _rows(getattr(draws, f.name), index) for f in fields(draws)})


def _rows(part: Any, index: Tensor) -> Any:
    """These draws of a tensor, or of each tensor of a mapping."""
    if isinstance(part, Mapping):
        return {name: _rows(value, index) for name, value in part.items()}
    return part[index.to(part.device)] if isinstance(part, Tensor) else part


@torch.no_grad()
def _draws(result: Any, num_draws: int, generator: torch.Generator) -> tuple[dict[str, Tensor], set[str]]:
    """Draws by name, and the names of the global ones as far as they are known."""
    if isinstance(result, Mapping):
        return dict(result), set()
    draws = distinct_draws(result, num_draws, generator)
    theta = result.named_theta(draws)
    return result.named(draws) | theta, set(theta)


@torch.no_grad()
def ranks_of(
    truth: Values,
    draws: Values,
    data: Any,
    quantities: Quantities,
    shared: Collection[str],
    num_draws: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Ranks of every number of the truth and of the quantities, ``[tasks]`` or, of global ones, ``[1]``."""
    for name, value in truth.items():
        if name not in draws:
            raise DataError(
                f"The truth has {name!r}, of which there are no draws; the posterior has {', '.join(sorted(draws))}."
            )
        expected = [num_draws, *value.shape]
        if list(draws[name].shape) != expected:
            raise ShapeError(f"The draws of {name!r} have shape {list(draws[name].shape)}; expected {expected}.")
    draws = {name: draws[name] for name in truth}
    true_values, drawn = _scalars(truth, 0, shared), _scalars(draws, 1, shared)
    for name, function in quantities.items():
        true_values[name], drawn[name] = function(truth, data), function(draws, data)
    return {name: rank_of(name, value, drawn[name], num_draws, generator) for name, value in true_values.items()}


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
    if truth.dim() > 1:
        raise ShapeError(
            f"The quantity {name!r} has shape {list(truth.shape)} of the truth; expected one number for each task."
        )
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


def judge_ranks(ranks: dict[str, Tensor], num_draws: int, num_bins: int, alpha: float) -> SBC:
    """Tests and findings of ranks by quantity, equally many of each."""
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
    p_values, details, findings, shapes = {}, {}, {}, {}
    for name, each in ranks.items():
        shape = shapes[name] = shape_of(legendre(smooth(each, num_draws)), independent=True)
        details[name] = {
            "ecdf": band.p_value(each),
            "chi_squared": chi_squared(each, num_draws, num_bins),
            "moments": shape.p_value,
        }
        p = p_values[name] = bonferroni(list(details[name].values()))
        level = alpha / len(ranks)
        finding = finding_of(p, shape.dispersion, shape.location, shape.p_dispersion, shape.p_location, level)
        findings[name] = "unknown" if finding == "calibrated" and len(each) < LEAST_RANKS else finding
    return SBC(ranks, p_values, details, shapes, findings, band, num_draws, alpha)


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
    # sizes decide where both p-values are too small for a float
    spread_first = (p_dispersion, -abs(dispersion)) <= (p_location, -abs(location))
    if p_dispersion < alpha and (spread_first or p_location >= alpha):
        return "too narrow" if dispersion > 0 else "too wide"
    if p_location < alpha:
        return "too low" if location > 0 else "too high"
    return "miscalibrated"


def spreads_seen(count: int, alpha: float) -> tuple[float, float]:
    """Spreads of a Gaussian posterior, in units of the right one, that ranks would call wrong about half the time.

    Under a spread s the dispersion of the ranks is √5 (3 arcsin(1 / (1 + s²)) / π − 1/2), as E Φ(z/s)² = 1/4 +
    arcsin(1 / (1 + s²)) / 2π of a standard normal z. It is held against the moments' own test, of variance 1 / count,
    with Bonferroni as in :func:`judge_ranks`.

    Args:
        count: ranks.
        alpha: of one quantity.

    Returns:
        The narrow and the wide one; 0 and ∞ where none would be seen.
    """
    from scipy import special

    z = -float(special.ndtri(alpha / 24.0))  # two-sided, three tests, one of which takes four moments
    shift = z / math.sqrt(5.0 * count)
    narrow, wide = (math.pi / 3.0 * (0.5 + sign * shift) for sign in (1.0, -1.0))

    def spread(angle: float) -> float:
        return math.sqrt(1.0 / math.sin(angle) - 1.0)

    return 0.0 if narrow >= math.pi / 2 else spread(narrow), math.inf if wide <= 0.0 else spread(wide)


def _power(count: int, alpha: float) -> str:
    narrow, wide = spreads_seen(count, alpha)
    seen = [f"{each:.2g} times" for each in (narrow, wide) if 0.0 < each < math.inf]
    found = f"a spread of {' or '.join(seen)} the right one would be found half the time" if seen else ""
    text = f"with {count} ranks {found or 'no spread, however wrong, would be found'}"
    return f"{text}; at least {LEAST_RANKS} are needed to pass" if count < LEAST_RANKS else text
