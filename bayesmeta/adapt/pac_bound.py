"""The PAC-Bayesian bound of meta-learning that PACOH minimises, with all its constants.

Source: J. Rothfuss, V. Fortuin, M. Josifoski, A. Krause, "PACOH: Bayes-Optimal Meta-Learning with PAC-Guarantees",
ICML 2021, https://arxiv.org/abs/2002.05551, the bound for Gibbs base learners; its constants here follow from the proof
below, which is theirs in its steps (a change of measure at each of two levels), for tasks of different sizes and with a
union bound over the two levels.

n tasks are drawn from an environment, m_i observations from each. θ ~ Q; task i is solved by its Gibbs posterior
h ~ Q_i(h) ∝ P_θ(h) exp(−β_i L̂_i(h)), with normaliser Z_i(θ). Let B = Σ β_i and v_i = β_i / B. Let the loss be
sub-Gaussian with variance factor s² in each task, and its expectation s̄² between tasks; a loss in [a, b] has
s² = s̄² = (b − a)² / 4. For any λ > 0, and a hyper-prior, β_i and λ that do not depend on the data, with probability
1 − δ for all Q at once

    R(Q) ≤ −(1/B) Σ_i E_Q log Z_i(θ) + (1/λ + 1/B) KL(Q ‖ P) + C,
    C = s² Σ_i β_i² / (2 B m_i) + λ s̄² Σ_i v_i² / 2 + (1/λ + 1/B) log(2/δ),

R(Q) the loss to expect on a new observation of a new task, h from the Gibbs posterior of data like those of the
training tasks (of sizes m_i with weights v_i). Proof: the change of measure from P × Π_i P_θ to the joint law of θ and
h_i, for Σ_i β_i (L_i − L̂_i), bounds the weighted mean of the tasks' own risks with probability 1 − δ/2; that from P to
Q, for λ Σ_i v_i (R − L_i), bounds R by that mean; both moment generating functions by the assumption; and
E L̂_i + KL_i / β_i = −log(Z_i) / β_i for a Gibbs posterior.

What is assumed and cannot be checked: the range or the variance factors. −log p of a Gaussian likelihood is
unbounded, and its factors are those of an environment that nobody knows. The bound is vacuous where it exceeds the
largest loss. With λ = n, or β_i = m_i, C does not vanish as there are more tasks, or observations; with λ = √n and
β_i = √m_i it does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bayesmeta.errors import DataError, OptionError


@dataclass(frozen=True)
class PACBound:
    """A bound on the expected loss in new tasks, in nats an observation, and what it is made of.

    Attributes:
        value: the bound: ``empirical + complexity + constant``.
        empirical: −(1/B) Σ_i E_Q log Z_i.
        divergence: an upper bound of KL(Q ‖ P), in nats.
        complexity: (1/λ + 1/B) times it.
        constant: C.
        delta: the bound fails with at most this probability, where its assumptions hold.
        is_vacuous: whether it says no more than the assumed range of the loss; None where no range was given.
    """

    value: float
    empirical: float
    divergence: float
    complexity: float
    constant: float
    delta: float
    is_vacuous: bool | None


def meta_bound(
    total_log_evidence: float,
    divergence: float,
    counts: Tensor,
    shot_weights: Tensor,
    task_weight: float,
    delta: float,
    loss_range: tuple[float, float] | None,
    variance: tuple[float, float] | None,
) -> PACBound:
    """The bound of the module's docstring.

    Args:
        total_log_evidence: Σ_i E_Q log Z_i.
        divergence: KL(Q ‖ P), or more.
        counts: m_i, ``[tasks]``.
        shot_weights: β_i, ``[tasks]``.
        task_weight: λ.
        delta: δ, in (0, 1).
        loss_range: (a, b), or None.
        variance: (s², s̄²), or None.

    Raises:
        OptionError: for δ out of range, an empty range, negative factors, or both or none of the two.
        DataError: for a task without observations.
    """
    if not 0 < delta < 1:
        raise OptionError(f"delta must be in (0, 1); got {delta}.")
    if (loss_range is None) == (variance is None):
        raise OptionError("Give loss_range=(a, b) or variance=(within, between), one of the two: the bound assumes it.")
    for name, pair, parts in (("loss_range", loss_range, "(a, b)"), ("variance", variance, "(within, between)")):
        if pair is not None and not _is_pair(pair):
            raise OptionError(f"{name} is two numbers, {name}={parts}; got {pair!r}.")
    if loss_range is not None:
        if not -math.inf < loss_range[0] < loss_range[1] < math.inf:
            raise OptionError(f"loss_range must be (a, b) with a < b, both finite; got {loss_range}.")
        within = between = (loss_range[1] - loss_range[0]) ** 2 / 4
    else:
        assert variance is not None
        within, between = variance
        if not (0 <= within < math.inf and 0 <= between < math.inf):
            raise OptionError(f"variance must be two finite numbers ≥ 0; got {variance}.")
    if not bool((counts > 0).all()):
        raise DataError("The bound is for tasks with observations; some of these have none. Leave them out.")
    total = float(shot_weights.sum())
    rate = 1 / task_weight + 1 / total
    constant = within * float((shot_weights.square() / counts).sum()) / (2 * total)
    constant += task_weight * between * float((shot_weights / total).square().sum()) / 2
    constant += rate * math.log(2 / delta)
    empirical, complexity = -total_log_evidence / total, rate * divergence
    value = empirical + complexity + constant
    vacuous = None if loss_range is None else not value < loss_range[1]
    return PACBound(value, empirical, divergence, complexity, constant, delta, vacuous)


def _is_pair(value: Any) -> bool:
    """Whether a value is two real numbers."""
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(one, int | float) for one in value)
