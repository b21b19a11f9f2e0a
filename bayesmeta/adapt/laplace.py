"""Laplace's method: a Gaussian over φ whose precision is the curvature of the joint at the adapted point.

Sources: E. Grant, C. Finn, S. Levine, J. Darrell, T. Griffiths, "Recasting Gradient-Based Meta-Learning as Hierarchical
Bayes", ICLR 2018 (LLAMA), https://arxiv.org/abs/1801.08930, section 4; D. MacKay, "A Practical Bayesian Framework for
Backpropagation Networks", Neural Computation 4, 1992, https://doi.org/10.1162/neco.1992.4.3.448 (posterior and
evidence); J. Martens, "New Insights and Perspectives on the Natural Gradient Method", JMLR 21, 2020,
https://arxiv.org/abs/1412.1193 (the Gauss–Newton matrix as Fisher information); J. Martens, R. Grosse, "Optimizing
Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015, https://arxiv.org/abs/1503.05671, section 3
(its factors); H. Ritter, A. Botev, D. Barber, "A Scalable Laplace Approximation for Neural Networks", ICLR 2018,
https://openreview.net/forum?id=Skdvd2xAZ (they as a posterior); A. Immer, M. Bauer, V. Fortuin, G. Rätsch, M. E. Khan,
"Scalable Marginal Likelihood Estimation for Model Selection in Deep Learning", ICML 2021,
https://arxiv.org/abs/2104.04975 (and their evidence, the prior added in the eigenbasis).

Departures from LLAMA: its curvature is a Kronecker-factored Fisher information, with an identity of learned weight for
the prior's; here it may also be dense or diagonal, and the prior's is its own Hessian. Its loss is −log p(Q | φ̂) +
η log |H| with a tuned η; here it is either −log ∫ p(Q | φ) q(φ | S) dφ by draws, or −log of the evidence of S ∪ Q with
the factor ½ that Laplace's method has. Gradients of θ are exact, through the inner steps and through the curvature.
Inner steps climb the joint, divided by the number of the support's observations. The Gaussian is one in unconstrained
space, of the density there, Jacobians included: what is integrated does not depend on the choice, but the mode does.

Departures of the Kronecker curvature from Martens and Grosse: factors are of each task's own support and exact in the
outputs, not by targets drawn from the model. The prior is added exactly where its variances are a product over a
layer's outputs and inputs, as in Immer et al.; where they are not, tasks with data have the nearest prior that is, by
least squares of the log scales, which keeps the determinant (Martens and Grosse, section 6.3, and Ritter et al. add a
multiple of the identity to each factor instead). A task without data keeps the prior itself.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bayesmeta.adapt.base import Method, MethodCard, per_observation
from bayesmeta.adapt.memory import need_memory
from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import NonFiniteDataError, OptionError, UnsupportedError
from bayesmeta.models.curvature import closed_kl, kronecker_precision, need_layers, network_fisher
from bayesmeta.models.network import NetworkProgram
from bayesmeta.models.neural import NeuralTaskModel
from bayesmeta.models.theta import GlobalKind
from bayesmeta.ops.curvature import DiagonalPrecision, PrecisionFactor, factorise, hessian
from bayesmeta.ops.kronecker import KroneckerPrecision, LinearLayers
from bayesmeta.ops.random import normal_like
from bayesmeta.posteriors.gaussian import MultivariateNormalPosterior, NormalPosterior
from bayesmeta.posteriors.kronecker import KroneckerNormalPosterior, pack

Curvature = Literal["full", "ggn", "kronecker", "diagonal", "diagonal_ggn"]
Objective = Literal["predictive", "evidence"]
Solver = Literal["gradient", "newton"]

_GAUSS_NEWTON = {"full": "ggn", "diagonal": "diagonal_ggn"}
_LOG_2PI = math.log(2 * math.pi)
#: Each has spread (R v with R Rᵀ = Λ⁻¹), solve (Λ⁻¹ v) and log_det (log |Λ|).
_Factor = PrecisionFactor | DiagonalPrecision | KroneckerPrecision


class Laplace(Method):
    """Laplace's method at the adapted point (Grant et al. 2018, LLAMA; MacKay 1992).

    The posterior is N(φ*, Λ⁻¹), with φ* after ``inner_steps`` from the prior's mean and Λ = −∇² log p(S, φ*), or an
    approximation of it. A task without support stays at the prior's mean, with the curvature of the prior.

    Args:
        model: a :class:`~bayesmeta.NeuralTaskModel` whose prior has a smooth density, or any Pyro program.
        inner_steps: steps from the prior's mean towards the mode.
        inner_lr: step size. For gradient steps, of an objective that is divided by the number of observations; for
            Newton steps, the share of the step that is taken: 1 is the whole.
        solver: ``"gradient"`` or ``"newton"``: steps of Λ⁻¹ times the gradient, with the Λ of ``curvature``.
        curvature: ``"full"``: the Hessian, which is positive definite at a mode, and need not be before it;
            ``"ggn"``: the likelihood's part replaced by its Fisher information (the generalised Gauss–Newton matrix
            where the outputs are natural parameters), never negative; ``"kronecker"``: of that one block a layer, each
            a Kronecker product, for networks of Linear layers with a diagonal Gaussian prior; ``"diagonal"`` and
            ``"diagonal_ggn"``: the diagonals. The last three are for more φ than a D × D matrix can hold.
        objective: outer loss: ``"predictive"``: −log E_q[p(Q | φ)] by draws; ``"evidence"``: −log p(S, Q | θ) in
            Laplace's approximation, at the point adapted to S ∪ Q. Both are differentiated through the inner steps and
            the curvature.
        num_particles: draws of φ for the predictive loss.
        jitter: a precision that is not positive definite (Kronecker's always is) is tried once more with this share of
            its mean absolute diagonal added, which is for rounding: a direction in which neither data nor prior have
            curvature (a Laplace prior has none) then has a variance of the inverse of that, which is large.
        global_guide: posterior over global sites, ``"point"``, ``"normal"``, ``"low_rank"`` or an AutoGuide class.

    Raises:
        OptionError: for an unknown name, or numbers out of range.
        UnsupportedError: for a prior without a density; for ``"kronecker"`` where φ are not Linear layers or the prior
            is no diagonal Gaussian; in use, for covariances of more than 4 GiB (tasks · draws of global sites · D² · 8
            bytes, or the sum of squared layer sides in place of D²), for a likelihood without a closed Fisher
            information (``"ggn"``, ``"kronecker"``) and for a curvature that is not positive definite.
        NonFiniteDataError: in use, when the inner steps have diverged.
    """

    card = MethodCard(
        assumes="a prior with a smooth density: Gaussian weights, or a program's own",
        posterior="Gaussian: K steps to the mode, precision the curvature there (dense, Kronecker or diagonal)",
        cost="adapt K + D gradients (outputs instead of D for a network's Gauss–Newton); train 2–3 × that",
        source="Grant, Finn, Levine, Darrell, Griffiths 2018; MacKay 1992",
    )

    def __init__(
        self,
        model: Any,
        *,
        inner_steps: int = 5,
        inner_lr: float = 0.01,
        solver: Solver = "gradient",
        curvature: Curvature = "ggn",
        objective: Objective = "predictive",
        num_particles: int = 10,
        jitter: float = 1e-6,
        global_guide: GlobalKind = "point",
    ) -> None:
        super().__init__(model, global_guide=global_guide)
        named = (("solver", solver, Solver), ("curvature", curvature, Curvature), ("objective", objective, Objective))
        for option, value, kinds in named:
            if value not in get_args(kinds):
                raise OptionError(
                    f"Unknown {option} {value!r}; expected one of {', '.join(map(repr, get_args(kinds)))}."
                )
        whole = all(isinstance(number, int) for number in (inner_steps, num_particles))
        if not whole or inner_steps < 0 or num_particles < 1 or not 0 < inner_lr < math.inf or not 0 <= jitter < 1:
            raise OptionError(
                "inner_steps must be a whole number ≥ 0, num_particles one ≥ 1, inner_lr > 0 and finite and jitter in "
                f"[0, 1); got inner_steps={inner_steps}, num_particles={num_particles}, inner_lr={inner_lr}, "
                f"jitter={jitter}."
            )
        self._need_density()
        if curvature == "kronecker":
            need_layers(self.program)
        self.inner_steps = inner_steps
        self.inner_lr = inner_lr
        self.solver: Solver = solver
        self.curvature: Curvature = curvature
        self.objective: Objective = objective
        self.num_particles = num_particles
        self.jitter = jitter

    def config(self) -> dict[str, Any]:
        """Options that change the result."""
        return {
            "inner_steps": self.inner_steps,
            "inner_lr": self.inner_lr,
            "solver": self.solver,
            "curvature": self.curvature,
            "objective": self.objective,
            "num_particles": self.num_particles,
            "jitter": self.jitter,
            "global_guide": self.global_kind,
        }

    @property
    def is_diagonal(self) -> bool:
        """Whether the posterior is a diagonal Gaussian."""
        return self.curvature.startswith("diagonal")

    # -- the curvature ------------------------------------------------------------------------------------------

    def precision(
        self, u: Tensor, observations: Observations, theta: Tensor | None = None, *, create_graph: bool = False
    ) -> Tensor:
        """Λ at u: the curvature of −log p(S, u | θ), by the kind that ``curvature`` names.

        Args:
            u: ``[G, tasks, D]``.
            observations: of the same tasks, with targets.
            theta: global sites, ``[G, E]`` or None.
            create_graph: differentiable in u and θ.

        Returns:
            ``[G, tasks, D, D]``, or ``[G, tasks, D]`` for a diagonal.

        Raises:
            UnsupportedError: as :meth:`adapt`, and for a Kronecker precision that is too large to be written out.
        """
        found = self._curvature(u, observations, theta, create_graph)
        if not isinstance(found, KroneckerPrecision):
            return found
        self._check_memory(u.shape[1], u.shape[0], self.program.layout.dim**2)
        return found.dense()

    def _curvature(
        self, u: Tensor, observations: Observations, theta: Tensor | None, create_graph: bool
    ) -> Tensor | KroneckerPrecision:
        with torch.enable_grad():
            if self.curvature == "kronecker":
                assert isinstance(self.program, NeuralTaskModel)  # by need_layers
                return kronecker_precision(self.program, u, observations, theta, create_graph=create_graph)
            if not self.curvature.endswith("ggn"):
                return hessian(
                    lambda v: -self.program.log_joint(v, observations, theta),
                    u,
                    diagonal=self.is_diagonal,
                    create_graph=create_graph,
                )
            prior = self._prior_precision(u, observations, theta, create_graph)
            if observations.shots == 0:
                return prior
            if isinstance(self.program, NetworkProgram):
                return prior + network_fisher(
                    self.program, u, observations, diagonal=self.is_diagonal, create_graph=create_graph
                )
            fisher = hessian(
                lambda v: self._divergence(u, v, observations, theta),
                u,
                diagonal=self.is_diagonal,
                create_graph=create_graph,
            )
            return prior + fisher

    def _prior_precision(
        self, u: Tensor, observations: Observations, theta: Tensor | None, create_graph: bool
    ) -> Tensor:
        moments = self.program.gaussian_prior(observations, theta)
        if moments is not None:
            diagonal = moments[1].square().reciprocal().expand(u.shape)
            diagonal = diagonal if create_graph else diagonal.detach()
            return diagonal if self.is_diagonal else torch.diag_embed(diagonal)
        return hessian(
            lambda v: -self.program.log_prior(v, observations, theta),
            u,
            diagonal=self.is_diagonal,
            create_graph=create_graph,
        )

    def _divergence(self, u: Tensor, v: Tensor, observations: Observations, theta: Tensor | None) -> Tensor:
        """Σ over real shots of KL(p(y | u) ‖ p(y | v)), ``[G, tasks]``; its Hessian in v at u is the Fisher matrix."""
        empty, mask = observations.with_y(None), observations.full_mask()
        here = self.program.evaluate(u, empty, theta).observed
        there = self.program.evaluate(v, empty, theta).observed
        each = [closed_kl(here[name][0], there[name][0]) for name in here]
        return torch.stack([torch.where(mask, kl, 0.0).expand(*v.shape[:-1], -1).sum(-1) for kl in each]).sum(0)

    def _factor(self, precision: Tensor | KroneckerPrecision) -> _Factor:
        """Roots, solves and determinant of the precision.

        Raises:
            NonFiniteDataError: where it is not finite.
            UnsupportedError: where it is not positive definite, naming tasks and site.
        """
        if isinstance(precision, KroneckerPrecision):
            for block in precision.blocks:
                _need_finite(block.inputs.flatten(2))
                _need_finite(block.outputs.flatten(2))
            _need_finite(precision.scale.log())
            return precision
        _need_finite(precision.flatten(2))
        if not self.is_diagonal:
            factor = factorise(precision, self.jitter)
            self._need_positive(factor.failed, precision)
            return factor
        extra = self.jitter * precision.detach().abs().mean(-1, keepdim=True)
        tried = torch.where((precision <= 0).any(-1, keepdim=True), precision + extra, precision)
        self._need_positive((tried <= 0).any(-1), precision)
        return DiagonalPrecision(tried)

    def _need_positive(self, failed: Tensor, precision: Tensor) -> None:
        if not bool(failed.any()):
            return
        first = precision[failed][0].detach().double()
        index = int((-first if self.is_diagonal else torch.linalg.eigh(first).eigenvectors[:, 0].abs()).argmax())
        (name,) = [name for name, block in self.program.blocks.items() if block.start <= index < block.stop]
        if self.curvature.endswith("ggn"):
            advice = "The prior has no positive curvature there: use one with a smooth density, such as a Gaussian."
        else:
            advice = f"Take more inner steps, nearer to the mode, or curvature={_GAUSS_NEWTON[self.curvature]!r}."
        raise UnsupportedError(
            f"The curvature {self.curvature!r} at the adapted point is not positive definite for {_tasks(failed)}, "
            f"above all along the site {name!r}, also with a relative jitter of {self.jitter:g}. {advice}"
        )

    def _check_memory(self, num_tasks: int, groups: int, numbers: int | None = None) -> None:
        """Refuse matrices that are too large: of so many numbers a task, by default those of this curvature."""
        if self.is_diagonal:
            return
        size, kronecker = self.program.layout.dim, self.curvature == "kronecker" and numbers is None
        if kronecker:
            assert isinstance(self.program, NeuralTaskModel)
            numbers = LinearLayers(self.program.flat).num_factor_entries
        what, formula = ("The Kronecker factors", "Σ sides²") if kronecker else ("A covariance", "D²")
        other = "" if self.curvature == "kronecker" else "'kronecker' (for Linear layers) or "
        need_memory(
            size**2 if numbers is None else numbers,
            num_tasks,
            groups,
            what=f"{what} of {size} task parameters",
            formula=formula,
            advice=f"curvature={other}'diagonal_ggn'",
        )

    # -- adapt --------------------------------------------------------------------------------------------------

    def _steps(self, support: Observations, theta: Tensor | None, create_graph: bool) -> Tensor:
        """φ after the inner steps, ``[G, tasks, D]``."""
        groups = 1 if theta is None else theta.shape[0]
        self._check_memory(support.num_tasks, groups)
        u, _ = self.program.prior_moments(support, theta)
        u = u.expand(groups, support.num_tasks, self.program.layout.dim)
        u = u if create_graph and u.requires_grad else u.detach().requires_grad_()
        if support.shots == 0:
            return u
        # a task without support stays, also where the prior's mean is not its mode
        share = support.full_mask().any(-1) if self.solver == "newton" else per_observation(support)
        share = (self.inner_lr * share).unsqueeze(-1)
        for _ in range(self.inner_steps):
            total = self.program.log_joint(u, support, theta).sum()
            (direction,) = torch.autograd.grad(total, u, create_graph=create_graph)
            if self.solver == "newton":
                factor = self._factor(self._curvature(u, support, theta, create_graph))
                direction = factor.solve(direction)
            u = u + share * direction
            _need_finite(u)
            u = u if create_graph else u.detach().requires_grad_()
        return u

    def _fit(self, support: Observations, theta: Tensor | None, create_graph: bool) -> tuple[Tensor, _Factor]:
        u = self._steps(support, theta, create_graph)
        return u, self._factor(self._curvature(u, support, theta, create_graph))

    def _adapt(
        self, support: Observations, theta: Tensor | None, generator: torch.Generator, create_graph: bool
    ) -> NormalPosterior | MultivariateNormalPosterior | KroneckerNormalPosterior:
        u, factor = self._fit(support, theta, create_graph)
        u = u if create_graph else u.detach()
        if isinstance(factor, DiagonalPrecision):
            scale = factor.precision.rsqrt()
            return NormalPosterior(self.program, support, u, scale if create_graph else scale.detach(), theta)
        if isinstance(factor, KroneckerPrecision):  # without a graph where there is to be none
            inputs = pack([block.inputs for block in factor.blocks])
            outputs = pack([block.outputs for block in factor.blocks])
            return KroneckerNormalPosterior(self.program, support, u, factor.scale, inputs, outputs, theta)
        root = factor.root().to(u.dtype)
        return MultivariateNormalPosterior(self.program, support, u, root if create_graph else root.detach(), theta)

    # -- loss ---------------------------------------------------------------------------------------------------

    def _log_evidence(self, observations: Observations, theta: Tensor | None) -> Tensor:
        """log p(S, φ*) + (D/2) log 2π − ½ log |Λ|, ``[G, tasks]`` (MacKay 1992, the evidence by Laplace's method)."""
        u, factor = self._fit(observations, theta, create_graph=True)
        log_det = factor.log_det.to(u.dtype)
        return self.program.log_joint(u, observations, theta) + 0.5 * (u.shape[-1] * _LOG_2PI - log_det)

    def _task_loss(self, batch: TaskBatch, theta: Tensor | None, generator: torch.Generator) -> Tensor:
        if self.objective == "evidence":
            return -self._log_evidence(batch.union(), theta)[0]
        u, factor = self._fit(batch.support, theta, create_graph=True)
        noise = normal_like(u, (self.num_particles, *u.shape), generator)
        each = self.program.log_likelihood(u + factor.spread(noise), batch.query, theta).sum(-1)
        return -(each.logsumexp(0) - math.log(self.num_particles))[0]


def _tasks(failed: Tensor) -> str:
    """Words for the tasks where ``[G, tasks]`` is True."""
    tasks = failed.any(0).nonzero().flatten().tolist()
    return f"{len(tasks)} task(s), the first of them task {tasks[0]} (counted from 0)"


def _need_finite(values: Tensor) -> None:
    bad = ~values.isfinite().all(-1)
    if bool(bad.any()):
        raise NonFiniteDataError(
            f"The adapted point or the curvature there is not finite for {_tasks(bad)}: the inner steps have diverged. "
            "Take fewer of them, or a lower inner_lr."
        )
