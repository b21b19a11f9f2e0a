"""What labels would tell, from a joint predictive in closed form: Normals, Student-t, and mixtures of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesmeta.data import Observations, union
from bayesmeta.diagnostics.checks import in_words
from bayesmeta.errors import NoClosedFormError
from bayesmeta.ops.random import forked_rng
from bayesmeta.protocols import Posterior

#: Numbers in the largest tensor of :func:`greedy_mixture`, which bounds its memory.
_MAX_ELEMENTS = 4_000_000


@dataclass(frozen=True, eq=False)
class Elliptical:
    """A mixture of K Normals or Student-t over the points of each task, as a joint predictive may be. float64.

    Attributes:
        log_weights: of the components, ``[K, tasks]``.
        loc: means, ``[K, tasks, points]``.
        scale: covariances, of a Student-t its scale matrix, ``[K, tasks, points, points]``.
        df: degrees of freedom ``[K, tasks]``; None for Normals.
        noise: of the diagonal of ``scale`` what is noise of the single label, ``[K, tasks, points]``.
    """

    log_weights: Tensor
    loc: Tensor
    scale: Tensor
    df: Tensor | None
    noise: Tensor

    @property
    def is_normal(self) -> bool:
        """Whether it is one Normal."""
        return self.df is None and len(self.loc) == 1

    def covariance(self) -> Tensor | None:
        """Within the components and between them, ``[tasks, points, points]``; None where it is not finite."""
        within = self.scale
        if self.df is not None:
            if not bool((self.df > 2).all()):
                return None
            within = within * (self.df / (self.df - 2))[..., None, None]
        weights = self.log_weights.exp()
        centred = self.loc - (weights.unsqueeze(-1) * self.loc).sum(0)
        between = torch.einsum("kt,kti,ktj->tij", weights, centred, centred)
        return between + (weights[..., None, None] * within).sum(0)

    def noise_entropy(self) -> Tensor:
        """Mean over φ of the entropy of a label given φ (component, function and noise), ``[tasks, points]``."""
        log_variance = self.noise.log()
        if self.df is not None:  # variance = noise / λ, λ ~ χ²(df) / df
            half = (self.df / 2).unsqueeze(-1)
            log_variance = log_variance - torch.digamma(half) + half.log()
        mean = (self.log_weights.exp().unsqueeze(-1) * log_variance).sum(0)
        return 0.5 * (mean + math.log(2 * math.pi * math.e))

    def entropy(self, num_outcomes: int, generator: torch.Generator) -> Tensor:
        """Of each label by itself, nats, ``[tasks, points]``; of a mixture a mean over outcomes."""
        variance = self.scale.diagonal(dim1=-2, dim2=-1)
        df = None if self.df is None else self.df.unsqueeze(-1)
        each: Any
        if df is None:
            each = torch.distributions.Normal(self.loc, variance.sqrt(), validate_args=False)
        else:
            each = torch.distributions.StudentT(df, self.loc, variance.sqrt(), validate_args=False)
        if len(self.loc) == 1:
            return each.entropy()[0]
        log_weights = self.log_weights.unsqueeze(-1)
        total = torch.zeros_like(self.loc[0])
        for _ in range(num_outcomes):  # of every component an outcome, weighted as the component is
            with forked_rng(generator):
                y = each.sample()
            log_density = (log_weights + each.log_prob(y.unsqueeze(1))).logsumexp(1)
            total = total - (log_weights.exp() * log_density).sum(0)
        return total / num_outcomes

    def tasks(self, rows: slice) -> Elliptical:
        """Some of the tasks."""
        df = None if self.df is None else self.df[:, rows]
        return Elliptical(self.log_weights[:, rows], self.loc[:, rows], self.scale[:, rows], df, self.noise[:, rows])


def elliptical(posterior: Posterior, inputs: Observations) -> Elliptical | None:
    """The joint predictive of each task's points; None where it is not of this kind.

    Each point is asked for twice, as two labels at one place: what they do not share is the noise. So φ is whatever
    the labels share, a function too: a Gaussian process has no vector that a likelihood could be asked about.

    Args:
        posterior: any.
        inputs: points, y=None.
    """
    try:
        with in_words():
            joint: Any = posterior.predictive(union(inputs, inputs), joint=True)
    except NoClosedFormError:
        return None
    log_weights, parts = getattr(joint, "log_weights", None), getattr(joint, "components", joint)
    points = inputs.shots
    if parts.event_shape != (2 * points,) or not hasattr(parts, "scale_tril"):  # several outputs, or another kind
        return None
    loc, root = parts.loc.double(), parts.scale_tril.double()
    df = parts.df.double() if hasattr(parts, "df") else None
    if not isinstance(log_weights, Tensor):
        loc, root, df = loc.unsqueeze(0), root.unsqueeze(0), None if df is None else df.unsqueeze(0)
        log_weights = loc.new_zeros(1, inputs.num_tasks)
    shape = (len(loc), inputs.num_tasks)
    scale = (root @ root.mT).expand(*shape, -1, -1)
    both = scale[..., :points, :points]
    own, shared = both.diagonal(dim1=-2, dim2=-1), scale[..., :points, points:].diagonal(dim1=-2, dim2=-1)
    # of a noise that is lost in the rounding of the root no less than that rounding
    noise = torch.maximum(own - shared, 4 * torch.finfo(parts.loc.dtype).eps * own)
    df = None if df is None else df.expand(shape)
    return Elliptical(log_weights.double().expand(shape), loc[..., :points].expand(*shape, -1), both, df, noise)


# -- greedy choice ------------------------------------------------------------------------------------------------


def greedy_normal(covariance: Tensor, mask: Tensor, size: int, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Points of the largest variance over ``unit`` given those before, and these ratios, ``[tasks, size]`` each.

    By a pivoted Cholesky factorisation, O(points · size²) a task.

    Args:
        covariance: ``[tasks, points, points]``.
        mask: which may be chosen, ``[tasks, points]``.
        size: how many.
        unit: ``[tasks, points]``.
    """
    left = covariance.diagonal(dim1=-2, dim2=-1).clone()
    rows: list[Tensor] = []
    open_, index, gains = mask.clone(), [], []
    for _ in range(size):
        ratio = (left / unit).masked_fill(~open_, -math.inf)
        gain, best = ratio.max(-1, keepdim=True)
        column = covariance.gather(1, best.unsqueeze(-1).expand(-1, 1, covariance.shape[-1])).squeeze(1)
        for row in rows:
            column = column - row * row.gather(1, best)
        row = column / left.gather(1, best).clamp(min=torch.finfo(left.dtype).tiny).sqrt()
        left = (left - row.square()).clamp(min=0.0)
        open_ = open_.scatter(1, best, False)
        rows.append(row)
        index.append(best)
        gains.append(gain)
    return torch.cat(index, 1), torch.cat(gains, 1)


def greedy_mixture(
    joint: Elliptical, mask: Tensor, size: int, num_outcomes: int, source: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Points of the largest information given those before, and this information, nats, ``[tasks, size]`` each.

    I(y_b; φ | y_A) = E[−log p(y_b | y_A)] − E[H(y_b | φ)]. The second has a closed form; of the first the density has,
    and its mean is over outcomes: a component (systematic draws), a noise, and a label at each point (stratified, and
    of one quantile for all points of an outcome, so that points are compared under the same luck).

    Args:
        joint: predictive of the candidates.
        mask: which may be chosen, ``[tasks, points]``.
        size: how many.
        num_outcomes: behind each mean; its error is about 1 / √(that many), and no bound on the information.
        source: generator.
    """
    kinds, tasks, points = joint.loc.shape
    chunk = max(_MAX_ELEMENTS // (kinds * points * num_outcomes), 1)
    parts = [
        _Greedy(joint.tasks(slice(i, i + chunk)), mask[i : i + chunk], num_outcomes, source).run(size)
        for i in range(0, tasks, chunk)
    ]
    return torch.cat([index for index, _ in parts]), torch.cat([gain for _, gain in parts])


class _Greedy:
    """Of J outcomes, under each component: what the labels chosen so far have left."""

    def __init__(self, joint: Elliptical, mask: Tensor, num_outcomes: int, source: torch.Generator) -> None:
        self.joint, self.open_, self.count, self.source = joint, mask.clone(), num_outcomes, source
        kinds, tasks, _ = joint.loc.shape
        uniform = self._stratified(tasks, shuffle=False)
        cumulative = joint.log_weights.exp().cumsum(0)[:-1].T.contiguous()  # [tasks, K − 1]
        self.own = torch.searchsorted(cumulative, uniform.T.contiguous(), right=True).T  # [J, tasks]
        self.precision = torch.ones_like(uniform)  # λ of each outcome's noise
        if joint.df is not None:
            half = joint.df.gather(0, self.own) / 2
            self.precision = torch._standard_gamma(half.to(source.device), source).to(half) / half
        self.log_weights = joint.log_weights.expand(num_outcomes, kinds, tasks).clone()  # given the labels so far
        self.left = joint.scale.diagonal(dim1=-2, dim2=-1).clone()  # variance left, [K, tasks, points]
        self.rows: list[Tensor] = []  # columns of the root, [K, tasks, points]
        self.z: list[Tensor] = []  # labels so far, standardised under each component, [J, K, tasks]

    def _stratified(self, tasks: int, shuffle: bool = True) -> Tensor:
        """Uniform numbers ``[J, tasks]``, one in each of J strata."""
        device, shape = self.source.device, (self.count, tasks)
        strata = torch.arange(self.count, device=device, dtype=torch.float64).unsqueeze(-1).expand(shape)
        if shuffle:
            strata = torch.rand(shape, generator=self.source, device=device, dtype=torch.float64).argsort(0).double()
        shift = torch.rand(shape, generator=self.source, device=device, dtype=torch.float64)
        return ((strata + shift) / self.count).to(self.joint.loc.device)

    def run(self, size: int) -> tuple[Tensor, Tensor]:
        """Choose."""
        index, gains = [], []
        entropy = self.joint.noise_entropy()
        for _ in range(size):
            mean = self._means()
            y = self._labels(mean)
            each = self._log_density(y, mean, self.left)
            log_p = (self.log_weights.unsqueeze(-1) + each).logsumexp(1)
            gain, best = (-log_p.mean(0) - entropy).masked_fill(~self.open_, -math.inf).max(-1, keepdim=True)
            self._condition(y, mean, each, best)
            index.append(best)
            gains.append(gain)
        return torch.cat(index, 1), torch.cat(gains, 1)

    def _means(self) -> Tensor:
        """Of each point under each component given the labels so far, ``[J, K, tasks, points]``."""
        mean = self.joint.loc.unsqueeze(0).expand(self.count, -1, -1, -1)
        for z, row in zip(self.z, self.rows, strict=True):
            mean = mean + z.unsqueeze(-1) * row
        return mean

    def _labels(self, mean: Tensor) -> Tensor:
        """A label at each point from each outcome's own component, ``[J, tasks, points]``."""
        own = self.own[:, None, :, None].expand(-1, 1, -1, mean.shape[-1])
        spread = self.left.expand(self.count, -1, -1, -1).gather(1, own).squeeze(1) / self.precision.unsqueeze(-1)
        normal = torch.special.ndtri(self._stratified(mean.shape[2])).unsqueeze(-1)
        return mean.gather(1, own).squeeze(1) + spread.sqrt() * normal

    def _log_density(self, y: Tensor, mean: Tensor, left: Tensor) -> Tensor:
        """log p(y | y_A, k) ``[J, K, tasks, points]`` at y ``[J, tasks, points]``."""
        square, log_scale = (y.unsqueeze(1) - mean).square() / left, 0.5 * left.log()
        if self.joint.df is None:
            return -0.5 * (square + math.log(2 * math.pi)) - log_scale
        # given m labels: df + m degrees of freedom, and a scale by how well they fitted
        df = (self.joint.df + len(self.z)).unsqueeze(-1)
        fit = sum((z.square() for z in self.z), torch.zeros_like(self.log_weights))
        ratio = (self.joint.df + fit).unsqueeze(-1) / df
        constant = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * (math.pi * df).log()
        return constant - log_scale - 0.5 * ratio.log() - (df + 1) / 2 * torch.log1p(square / (ratio * df))

    def _condition(self, y: Tensor, mean: Tensor, each: Tensor, best: Tensor) -> None:
        """Take the labels of the chosen points ``[tasks, 1]`` as known."""
        kinds, tasks, points = self.left.shape
        four = best.expand(self.count, kinds, tasks, 1)
        root = self.left.gather(2, best.expand(kinds, tasks, 1)).sqrt()
        label = y.gather(2, best.expand(self.count, tasks, 1)).unsqueeze(1)
        self.z.append(((label - mean.gather(3, four)) / root).squeeze(-1))
        self.log_weights = self.log_weights + each.gather(3, four).squeeze(-1)
        self.log_weights = self.log_weights - self.log_weights.logsumexp(1, keepdim=True)
        column = self.joint.scale.gather(2, best[..., None].expand(kinds, tasks, 1, points)).squeeze(2)
        for row in self.rows:
            column = column - row * row.gather(2, best.expand(kinds, tasks, 1))
        self.rows.append(column / root)
        # what is left is noise at least, whatever the rounding
        self.left = torch.maximum(self.left - self.rows[-1].square(), self.joint.noise)
        self.open_ = self.open_.scatter(1, best, False)
