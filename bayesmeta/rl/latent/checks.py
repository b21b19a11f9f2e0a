"""Whether a belief is right, where the truth has a meaning.

A latent is no quantity of the world, but what a decoder makes of it is: the means of a bandit's arms, of which the
exact posterior is known; the goal of a grid, of which it is uniform over the cells not yet seen; the next observation,
which comes to be known. How little a task was to be expected is :func:`bayesmeta.surprise` of its belief, by draws of
the belief and the prior; how far a belief is from the exact one under the same decoder, :class:`bayesmeta.NUTS` over
the same program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.diagnostics.calibration import Calibration, calibration_of_pit
from bayesmeta.diagnostics.reliability import Reliability, reliability
from bayesmeta.errors import ContextError, EmptyTaskError, OptionError, ShapeError
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.rl.envs.grid import Grid
from bayesmeta.rl.latent.beliefs import BeliefPath
from bayesmeta.rl.latent.contexts import ContextSpec

#: Central intervals whose coverage is told.
LEVELS = (0.5, 0.9)


@dataclass(frozen=True)
class Figure:
    """A mean over tasks and its standard error; NaN for one task."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.error:.2g}"

    @classmethod
    def of(cls, values: Tensor) -> Figure:
        """Of one number a task, ``[tasks]``."""
        values = values.double()
        error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return cls(float(values.mean()), error)


@torch.no_grad()
def expected_reward(program: TaskProgram, spec: ContextSpec, z: Tensor, rows: Tensor) -> Tensor:
    """E[r | x, z] in the environment's own units, ``[…, tasks, points]``.

    Args:
        program: a decoder's.
        spec: of its contexts, with the reward among the targets.
        z: ``[…, tasks, D]``.
        rows: x of transitions to ask about, ``[points, features]``, the same for all tasks.

    Raises:
        ContextError: for contexts without rewards.
    """
    if "reward" not in spec.targets:
        raise ContextError(f"These contexts have the targets {spec.targets}, and no reward to expect.")
    asked = Observations(rows.to(z).expand(z.shape[-2], *rows.shape))
    mean = program.predictive(z, asked).mean
    mean = mean if spec.outputs == 1 else mean[..., 0]  # the reward is the first
    return (mean * spec.reward_scale + spec.reward_shift).expand(*z.shape[:-1], len(rows))


# -- a bandit's arms -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ArmsCheck:
    """Beliefs about the means of Bernoulli arms against the exact ones. Made by :func:`compare_arms`.

    Attributes:
        distance: Wasserstein distance (of the first order) of each arm's belief from its Beta posterior,
            ``[tasks, arms]``: how far probability has to be moved, in units of the mean.
        prior_distance: that of the uniform prior: what knowing nothing has.
        bias: mean of the belief − mean of the posterior.
        spread: standard deviation of the belief / that of the posterior.
        coverage: by level, the share of true means within the belief's central interval; empty without the truth.
    """

    distance: Tensor
    prior_distance: Tensor
    bias: Tensor
    spread: Tensor
    coverage: dict[float, Figure]

    def __str__(self) -> str:
        parts = {
            "distance from Beta": self.distance, "of the prior": self.prior_distance, "bias": self.bias,
            "spread": self.spread,
        }  # fmt: skip
        text = [f"{name} {Figure.of(value.mean(-1))}" for name, value in parts.items()]
        return ", ".join(text + [f"coverage of {level:.0%} {figure}" for level, figure in self.coverage.items()])


def arm_counts(spec: ContextSpec, context: Observations) -> tuple[Tensor, Tensor]:
    """How often each arm won and lost in a bandit's context, ``[tasks, arms]`` each.

    Raises:
        ContextError: for contexts that do not show actions and rewards, and rewards other than 0 and 1.
    """
    if spec.targets != ("reward",) or context.y is None:
        raise ContextError(f"Arms are counted in contexts whose target is the reward alone; got {spec.targets}.")
    reward = context.y * spec.reward_scale + spec.reward_shift
    keep = context.full_mask()
    if bool((torch.minimum(reward.abs(), (reward - 1.0).abs()) > 1e-5)[keep].any()):
        raise ContextError("A reward is neither 0 nor 1: the posterior of Bernoulli arms is not that of this task.")
    pulled = context.x[..., spec.columns("action")] * keep.unsqueeze(-1)
    won = (pulled * reward.round().unsqueeze(-1)).sum(1)
    return won, pulled.sum(1) - won


def arm_rows(spec: ContextSpec, like: Tensor) -> Tensor:
    """x of a pull of each arm, ``[arms, features]``; all that is not the action is 0."""
    columns = spec.columns("action")
    rows = like.new_zeros(columns.stop - columns.start, spec.features)
    rows[:, columns] = torch.eye(len(rows)).to(like)
    return rows


@torch.no_grad()
def compare_arms(draws: Tensor, won: Tensor, lost: Tensor, means: Tensor | None = None) -> ArmsCheck:
    """Beliefs about Bernoulli arms with uniform prior means against Beta(1 + won, 1 + lost).

    Args:
        draws: of the arms' means by a belief, ``[n, tasks, arms]``, such as
            ``expected_reward(program, spec, z, arm_rows(spec, z))`` of draws z.
        won, lost: ``[tasks, arms]``, see :func:`arm_counts`.
        means: the true ones, ``[tasks, arms]``, of which the coverage is taken.

    Raises:
        ShapeError: when the shapes do not fit.
        OptionError: for fewer than 2 draws.
    """
    from scipy.stats import beta

    shapes = {tuple(part.shape) for part in (draws[0], won, lost, won if means is None else means)}
    if draws.dim() != 3 or len(shapes) != 1:
        raise ShapeError(
            f"draws, won and lost have shapes {list(draws.shape)}, {list(won.shape)} and {list(lost.shape)}; expected "
            "[n, tasks, arms] and [tasks, arms], as the true means if there are any."
        )
    n = len(draws)
    if n < 2:
        raise OptionError(f"There are {n} draws; expected at least 2.")
    drawn = draws.detach().double().cpu().sort(0).values
    a, b = (1.0 + count.detach().double().cpu() for count in (won, lost))
    # of two laws on a line the distance is that of their quantile functions
    at = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts, which = torch.stack([a, b], -1).reshape(-1, 2).unique(dim=0, return_inverse=True)  # many arms are alike
    quantiles = torch.as_tensor(beta.ppf(at[:, None].numpy(), counts[:, 0].numpy(), counts[:, 1].numpy()))
    exact = quantiles[:, which].unflatten(1, a.shape)
    deviation = (a * b / (a + b + 1.0)).sqrt() / (a + b)
    coverage = {}
    if means is not None:
        for level in LEVELS:
            low, high = (drawn.quantile(q, 0) for q in (0.5 - level / 2, 0.5 + level / 2))
            inside = (means.double().cpu() >= low) & (means.double().cpu() <= high)
            coverage[level] = Figure.of(inside.double().mean(-1))
    return ArmsCheck(
        (drawn - exact).abs().mean(0), (at[:, None, None] - exact).abs().mean(0), drawn.mean(0) - a / (a + b),
        drawn.std(0) / deviation, coverage,
    )  # fmt: skip


# -- a grid's goal ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GoalsCheck:
    """Beliefs about the goal's cell against the exact ones. Made by :func:`compare_goals`.

    Attributes:
        seen_share: share of the belief on cells that were seen to be empty; 0 for the exact one.
        mass: sum of the probabilities of all cells; 1 for the exact one, as there is one goal.
        distance: total variation of the belief, divided by its mass, from the exact one.
        log_score: log of the goal's probability in the belief, divided by its mass.
        exact_log_score: that of the exact belief, which no belief can exceed on average.
        ece: expected calibration error of the cells' probabilities: does a cell of 20% have the goal one time in five?
        reliability: what that is made of.
    """

    seen_share: Figure
    mass: Figure
    distance: Figure
    log_score: Figure
    exact_log_score: Figure
    ece: float
    reliability: Reliability

    def __str__(self) -> str:
        return (
            f"on cells seen empty {self.seen_share}, mass {self.mass}, from the exact belief {self.distance}, log "
            f"score {self.log_score} (exact {self.exact_log_score}), calibration error {self.ece:.4f}"
        )


def seen_cells(cells: Tensor, family: Grid, happened: Tensor | None = None) -> Tensor:
    """Which cells were entered by each step, ``[steps + 1, tasks, cells²]``.

    Args:
        cells: (column, row) that each step led to, before any reset (``rollout.successor``), ``[steps, tasks, 2]``.
        family: the grid.
        happened: which steps count, ``[steps, tasks]``; None: all.
    """
    index = (cells[..., 0] * family.cells + cells[..., 1]).long()
    entered = torch.nn.functional.one_hot(index, family.cells**2).bool()
    if happened is not None:
        entered &= happened.unsqueeze(-1)
    return torch.cat([torch.zeros_like(entered[:1]), entered]).long().cumsum(0) > 0


def admissible_cells(family: Grid) -> Tensor:
    """Which cells can be the goal, ``[cells²]``, in the order of :func:`cell_rows`."""
    goals = family.goals().long()
    out = torch.zeros(family.cells**2, dtype=torch.bool)
    out[goals[:, 0] * family.cells + goals[:, 1]] = True
    return out


def position_rows(spec: ContextSpec, positions: Tensor) -> Tensor:
    """x of being at places of the plane and staying there, ``[points, features]``: s = s′ = the place, the action 0.

    Args:
        spec: of contexts whose observations are positions.
        positions: as the environment gives observations, ``[points, 2]``.
    """
    places = positions.unsqueeze(0)
    zeros = torch.zeros(places.shape[:2], dtype=places.dtype, device=places.device)
    size = getattr(spec.action_space, "shape", ())
    action = zeros.unsqueeze(-1).expand(*zeros.shape, *size) if size else zeros.long()
    return spec.transitions(places, action, zeros, places).x.squeeze(0)


def cell_rows(spec: ContextSpec, family: Grid, like: Tensor) -> Tensor:
    """x of staying on each cell of a grid, ``[cells², features]``, column by column."""
    side = torch.arange(family.cells, dtype=like.dtype, device=like.device)
    return position_rows(spec, torch.cartesian_prod(side, side))


@torch.no_grad()
def goal_probabilities(program: TaskProgram, spec: ContextSpec, z: Tensor, family: Grid) -> Tensor:
    """Probability that each cell is the goal, ``[…, tasks, cells²]``: the mean over draws of z of what each says.

    Args:
        program: a decoder's, that reads ``successor``.
        spec: of its contexts.
        z: draws ``[n, …, tasks, D]``.
        family: the grid, whose two rewards say what an expected reward means.
    """
    reward = expected_reward(program, spec, z, cell_rows(spec, family, z)).mean(0)
    return ((reward - family.other_reward) / (family.goal_reward - family.other_reward)).clamp(0.0, 1.0)


@torch.no_grad()
def compare_goals(
    probabilities: Tensor,
    seen: Tensor,
    goal: Tensor,
    admissible: Tensor,
    *,
    searching: bool = False,
    num_bins: int = 15,
) -> GoalsCheck:
    """Beliefs about where the goal is against the exact one: there once it was seen, before that uniform over the rest.

    Most steps of a good policy come after the goal was found, where any belief that can remember is right: of a search
    ``searching=True`` says more.

    The calibration error alone says little: a belief that is uniform over all admissible cells until the goal is found
    has one of 0, as it claims no more than it knows, though it forgets where it has been. Read it beside ``seen_share``
    and what ``log_score`` loses to ``exact_log_score``, which tell the two apart.

    Args:
        probabilities: of each cell to be the goal, ``[tasks, cells]`` or ``[steps, tasks, cells]``; of several steps
            each task's mean is taken.
        seen: which cells were entered, of that shape.
        goal: the goal's cell, ``[tasks]``.
        admissible: cells that can be the goal, ``[cells]``.
        searching: whether steps after the goal was entered are left out.
        num_bins: of the reliability diagram.

    Raises:
        ShapeError: when the shapes do not fit.
        EmptyTaskError: when nothing is left where an unseen goal could be, or no step counts.
    """
    if probabilities.dim() == 2:
        probabilities, seen = probabilities.unsqueeze(0), seen.unsqueeze(0)
    if probabilities.shape != seen.shape or probabilities.shape[1:] != (len(goal), len(admissible)):
        raise ShapeError(
            f"probabilities and seen have shapes {list(probabilities.shape)} and {list(seen.shape)}; expected [steps, "
            f"{len(goal)} tasks, {len(admissible)} cells] for both."
        )
    belief = probabilities.double()
    here = torch.nn.functional.one_hot(goal.long(), len(admissible)).bool().to(seen.device)
    found = (seen & here).any(-1, keepdim=True)
    exact = torch.where(found, here, admissible.to(seen.device) & ~seen).double()
    if bool((exact * here == 0).flatten(-1).all(-1).any()):
        raise EmptyTaskError("A goal is where none can be: its cell is not admissible. Check the order of the cells.")
    exact = exact / exact.sum(-1, keepdim=True)
    mass = belief.sum(-1)
    share = belief / mass.clamp_min(torch.finfo(belief.dtype).tiny).unsqueeze(-1)

    counts = (~found if searching else torch.ones_like(found)).expand_as(belief)

    number = counts[..., 0].sum(0)
    if not bool(number.any()):
        raise EmptyTaskError("Every goal was found before: no step is a search. Give earlier ones, or searching=False.")

    def figure(value: Tensor) -> Figure:  # a task's mean over the steps that count
        total = torch.where(counts[..., 0], value, 0.0).sum(0)
        return Figure.of(total[number > 0] / number[number > 0])

    def log_score(p: Tensor) -> Figure:
        return figure((p * here).sum(-1).log())

    owner = torch.arange(len(goal), device=belief.device)[:, None].expand(belief.shape)
    diagram = reliability(belief[counts], here.expand(belief.shape).double()[counts], owner[counts], num_bins=num_bins)
    return GoalsCheck(
        figure((share * (seen & ~here)).sum(-1)), figure(mass), figure(0.5 * (share - exact).abs().sum(-1)),
        log_score(share), log_score(exact), diagram.ece, diagram,
    )  # fmt: skip


# -- what comes next ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def next_calibration(
    path: BeliefPath, steps: Sequence[int] | None = None, *, num_samples: int = 1000, generator: Seed = None
) -> Calibration:
    """Whether beliefs foresee what comes next: every transition is predicted from those before it.

    The PIT value of each target is its rank among draws of the predictive, at random among equal ones, so that it is
    uniform for targets of few values too. Under exact beliefs the values of a task are independent
    (M. Rosenblatt, "Remarks on a multivariate transformation", 1952, https://doi.org/10.1214/aoms/1177729394).

    Args:
        path: beliefs about some tasks.
        steps: from which steps to look one ahead, of 0 to N − 1; None: all.
        num_samples: draws of each predictive.
        generator: generator or seed; None means seed 0.

    Returns:
        As :func:`bayesmeta.calibration`; ``coverage_90`` and its standard error over tasks are figures of it.

    Raises:
        OptionError: for steps that there are not, or fewer than 2 draws.
        EmptyTaskError: when no transition counts.
    """
    chosen = list(range(path.steps)) if steps is None else [int(step) for step in steps]
    if num_samples < 2 or not chosen or min(chosen) < 0 or max(chosen) >= path.steps:
        raise OptionError(
            f"steps={chosen} and num_samples={num_samples}; expected steps of 0 to {path.steps - 1} and at least 2 "
            "draws."
        )
    generator = as_generator(generator, path.context.device, "next")
    columns, valid = [], path.context.full_mask()[:, chosen]
    if not bool(valid.any()):
        raise EmptyTaskError("No transition counts, so there is nothing that could have been foreseen.")
    for step in chosen:
        following = path.context.points(slice(step, step + 1))
        y = path.at(step).predict(following, num_samples, generator=generator)
        columns.append(_pit(y, following.y, generator))
    return calibration_of_pit(torch.cat(columns, 1), valid, kind="real")


def _pit(draws: Tensor, y: Any, generator: torch.Generator) -> Tensor:
    """Randomised rank of y ``[tasks, 1, …]`` among draws ``[n, tasks, 1, …]``, in (0, 1), float64."""
    below, same = (draws < y).sum(0).double(), (draws == y).sum(0).double()
    uniform = torch.rand(y.shape, generator=generator, dtype=torch.float64, device=generator.device).to(y.device)
    return (below + uniform * (same + 1.0)) / (len(draws) + 1.0)
