"""Reliability diagrams: how often a forecast of some confidence is right."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesmeta.errors import EmptyTaskError, OptionError, ShapeError


@dataclass(frozen=True, eq=False)
class Reliability:
    """Confidence and accuracy in bins of the confidence; bins without a point are left out.

    Attributes:
        low, high: edges of the bins, ``[bins]``.
        share: of all points that lie in the bin, ``[bins]``; sums to 1.
        confidence, accuracy: means over the bin's points, ``[bins]``.
        errors: standard error of ``accuracy − confidence``, over tasks, ``[bins]``; 0 tells of a bin that one task
            alone fills, not of certainty.
    """

    low: Tensor
    high: Tensor
    share: Tensor
    confidence: Tensor
    accuracy: Tensor
    errors: Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error, Σ share |accuracy − confidence|."""
        return float((self.share * (self.accuracy - self.confidence).abs()).sum())

    @property
    def mce(self) -> float:
        """Maximum calibration error, max |accuracy − confidence|."""
        return float((self.accuracy - self.confidence).abs().max())


def reliability(
    confidence: Tensor, hit: Tensor, task: Tensor, *, num_bins: int = 15, adaptive: bool = False
) -> Reliability:
    """Sort forecasts into bins of their confidence and see how often those of each bin are right.

    Sources: M. P. Naeini, G. F. Cooper, M. Hauskrecht, "Obtaining Well Calibrated Probabilities Using Bayesian
    Binning", AAAI 2015, for ECE and MCE; C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, "On Calibration of Modern Neural
    Networks", ICML 2017, https://arxiv.org/abs/1706.04599, eq. 3 and 5, for the most probable class; K. Nguyen, B.
    O'Connor, "Posterior calibration and exploratory analysis for natural language processing models", EMNLP 2015,
    https://arxiv.org/abs/1508.05154, for bins of equally many points. Departure: the standard errors are over tasks.
    Both errors are positive even for calibrated forecasts, the more so the fewer points a bin holds.

    Args:
        confidence: the forecast probability, ``[points]``.
        hit: 1 where the forecast was right, else 0, ``[points]``.
        task: whose the point is, ``[points]``, integers; points of one task depend on each other.
        num_bins: how many bins; [0, 1/B), …, [1 − 1/B, 1] if not ``adaptive``.
        adaptive: edges at quantiles of the confidence. Points of one confidence stay together, so that the bins may be
            fewer and hold unequal numbers.

    Raises:
        OptionError: for fewer than one bin.
        ShapeError: for shapes that differ.
        EmptyTaskError: when there is no point.
    """
    if num_bins < 1:
        raise OptionError(f"num_bins={num_bins}; expected at least 1.")
    if confidence.dim() != 1 or not confidence.shape == hit.shape == task.shape:
        raise ShapeError(
            f"confidence, hit and task have shapes {list(confidence.shape)}, {list(hit.shape)}, {list(task.shape)}; "
            "expected one length for all."
        )
    if len(confidence) == 0:
        raise EmptyTaskError("A reliability diagram needs at least one point.")
    confidence, hit = confidence.double(), hit.double()
    steps = torch.linspace(0.0, 1.0, num_bins + 1, dtype=torch.float64, device=confidence.device)
    if adaptive:
        n = len(confidence)
        ranks = (steps[1:-1] * n).long().clamp(0, n - 1)
        inner = confidence.sort().values[ranks].unique()
    else:
        inner = steps[1:-1]
    index = torch.bucketize(confidence, inner, right=True)
    edges = torch.cat([steps[:1], inner, steps[-1:]])
    return _bins(confidence, hit, task, index, edges)


def _bins(confidence: Tensor, hit: Tensor, task: Tensor, index: Tensor, edges: Tensor) -> Reliability:
    bins = len(edges) - 1
    one_hot = torch.nn.functional.one_hot(index, bins).double()
    count = one_hot.sum(0)
    size = count.clamp(min=1)
    mean_confidence, accuracy = (one_hot.mT @ confidence) / size, (one_hot.mT @ hit) / size
    # of a ratio of sums over tasks: each task's sum of residuals from the ratio (linearisation)
    _, owner = task.unique(return_inverse=True)
    tasks = int(owner.max()) + 1
    residual = ((hit - confidence) - (accuracy - mean_confidence)[index]).unsqueeze(-1) * one_hot
    sums = torch.zeros(tasks, bins, dtype=torch.float64, device=owner.device).index_add_(0, owner, residual)
    errors = (sums.square().sum(0) * (tasks / max(tasks - 1, 1))).sqrt() / size
    keep = count > 0
    parts = (edges[:-1], edges[1:], count / count.sum(), mean_confidence, accuracy, errors)
    return Reliability(*(part[keep] for part in parts))
