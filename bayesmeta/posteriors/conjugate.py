"""The exact posterior of a conjugate last layer: components with their probabilities, in each weights and noise."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from bayesmeta.data import Observations, union
from bayesmeta.models.conjugate import ConjugateModel
from bayesmeta.models.program import TaskProgram
from bayesmeta.ops.gaussian import Form
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.posteriors.base import Draws, TaskPosterior
from bayesmeta.posteriors.beliefs import BELIEFS, Belief
from bayesmeta.posteriors.mixture import LeftMixture

_NO_SHAPE = torch.Size()


class ConjugatePosterior(TaskPosterior):
    """Exact posterior of a :class:`~bayesmeta.ConjugateModel`, predictive and evidence in closed form.

    Given the component the weights are Gaussian (times the noise's scale where that is inferred); the component has the
    probability π_k p(y_S | k) up to a constant: with several components a multimodal posterior.

    Args:
        program: the model.
        support: what was conditioned on.
        log_joint: log π_k + log p(y_S | x_S, k), ``[tasks, K]``.
        tensors: of the weights and the noise: ``loc`` ``[tasks, K, outputs, F]``, ``root``, and ``shape`` and ``rate``
            (inverse-gamma) or ``df`` and ``scatter`` (inverse-Wishart), see :mod:`bayesmeta.posteriors.beliefs`.
    """

    def __init__(self, program: TaskProgram, support: Observations, log_joint: Tensor, **tensors: Tensor) -> None:
        super().__init__(program, support)
        assert isinstance(program, ConjugateModel)
        self.model = program
        self.log_joint_component = log_joint
        self.belief: Belief = BELIEFS[program.noise](program, **tensors)

    @classmethod
    def condition(cls, program: ConjugateModel, support: Observations) -> ConjugatePosterior:
        """The posterior given a support, differentiable in θ."""
        prior = BELIEFS[program.noise].prior(program, support.num_tasks)
        log_joint = program.log_probabilities.expand(support.num_tasks, -1)
        return cls(program, support.points(slice(0)), log_joint, **prior.tensors)._add(support, "information")

    def update(self, observations: Observations) -> ConjugatePosterior:
        """Add observations of the same tasks: the posterior that all of them together would have given.

        Online, in the covariance form: the work grows with the new observations and not with the old.

        Args:
            observations: ``[tasks, shots, …]`` with targets.

        Raises:
            ShapeError: for other tasks.
            DataError: for observations without targets, or that are not finite.
        """
        self._to_add(observations)
        with torch.no_grad():
            return self._add(observations, "covariance")

    def _add(self, observations: Observations, form: Form) -> ConjugatePosterior:
        y = observations.y
        assert y is not None
        y = y.unsqueeze(-1) if y.dim() == 2 else y
        design = self.model.features(observations.x, None)
        belief, log_evidence = self.belief.add(design, y, observations.mask, form)
        together = union(self.support, observations)
        return type(self)(self.model, together, self.log_joint_component + log_evidence, **belief.tensors)

    # -- components ---------------------------------------------------------------------------------------------

    @property
    def log_evidence(self) -> Tensor:
        """log p(y_S | x_S, θ), ``[tasks]``."""
        return self.log_joint_component.logsumexp(-1)

    @property
    def log_probabilities(self) -> Tensor:
        """log p(k | S), ``[tasks, K]``."""
        return self.log_joint_component.log_softmax(-1)

    @property
    def component_probabilities(self) -> Tensor:
        """p(k | S), ``[tasks, K]``."""
        return self.log_probabilities.exp()

    # -- draws and densities ------------------------------------------------------------------------------------

    def draws(self, num_samples: int, generator: Seed = None) -> Draws:
        """Independent draws of selector, noise and weights."""
        generator = as_generator(generator, self.support.device, "draws")
        count = self.model.num_components
        shape = (num_samples, self.num_tasks)
        if count == 1:
            component = torch.zeros(shape, dtype=torch.long, device=self.support.device)
            return Draws(self.belief.draw(component, generator))
        uniform = torch.rand((2, *shape), generator=generator, dtype=torch.float64, device=generator.device)
        cumulative = self.component_probabilities.double().cumsum(-1)[:, :-1].contiguous()
        component = torch.searchsorted(cumulative, uniform[0].T.contiguous(), right=True).T
        selector = self._selector(component, uniform[1])
        return Draws(torch.cat([selector.unsqueeze(-1), self.belief.draw(component, generator)], -1))

    def _selector(self, component: Tensor, uniform: Tensor) -> Tensor:
        """A selector that means this component, standard normal within its edges."""
        edges = self.model.edges()
        low, high = edges[component], edges[component + 1]
        below, above = torch.special.ndtr(low), torch.special.ndtr(high)
        value = torch.special.ndtri(below + uniform * (above - below)).to(self.log_joint_component)
        # a draw that rounds onto an edge would mean its neighbour
        up = torch.nextafter(low.to(value), torch.full_like(value, torch.inf))
        down = torch.nextafter(high.to(value), torch.full_like(value, -torch.inf))
        return torch.minimum(torch.maximum(value, up), down)

    def log_prob(self, u: Tensor) -> Tensor:
        """log q(u): of selector, noise and weights, ``[…, tasks]``."""
        if self.model.num_components == 1:
            return self.belief.log_prob(u).squeeze(-1)
        each = self.log_probabilities - self.model.log_probabilities + self.belief.log_prob(u[..., 1:])
        component = self.model.component(u[..., 0]).unsqueeze(-1)
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(u[..., 0])
        return normal + each.expand(*component.shape[:-1], -1).gather(-1, component).squeeze(-1)

    def u_distribution(self) -> Any:
        """Of u, batch shape ``[tasks, 1]``, event shape ``[D]``."""
        return FlatConjugate(self)

    # -- predictions --------------------------------------------------------------------------------------------

    def predictive(self, x: Tensor | Observations, *, joint: bool = False) -> Any:
        """Exact predictive of y, noise included: one distribution, or a mixture over the components.

        Args:
            x: inputs ``[tasks, shots, features]``.
            joint: over all shots of a task, event ``[shots]``, several outputs flattened to ``[shots × outputs]``.

        Returns:
            Of Normals where the noise is known, else of Student-t; batch ``[tasks, shots]``, or ``[tasks]`` if joint.

        Raises:
            NoClosedFormError: for the joint of several outputs whose noise is inferred.
        """
        with torch.no_grad():
            return self.mixture(self._as_observations(x), joint=joint)

    def mixture(self, observations: Observations, *, joint: bool = False) -> Any:
        """As :meth:`predictive`, differentiable in θ."""
        design = self.model.features(observations.x, None)
        each = self.belief.joint(design) if joint else self.belief.predictive(design)
        if self.model.num_components == 1:
            return _first(each)
        logits = self.log_probabilities.T
        return LeftMixture(logits if joint else logits.unsqueeze(-1), each)

    def state(self) -> dict[str, Tensor]:
        """log_joint and the belief's tensors."""
        return {"log_joint": self.log_joint_component, **self.belief.tensors}


def _first(fn: Any) -> Any:
    """The one component of a distribution whose components stand on the left."""
    if isinstance(fn, torch.distributions.Independent):
        return _first(fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    names = {"MultivariateNormal": ("loc", "scale_tril"), "MultivariateStudentT": ("df", "loc", "scale_tril")}
    names |= {"Normal": ("loc", "scale"), "StudentT": ("df", "loc", "scale")}
    kind = type(fn)
    parts = {name: getattr(fn, name)[0] for name in names[kind.__name__]}
    return kind(**parts)


class FlatConjugate(TorchDistribution):
    """The law of u under a :class:`ConjugatePosterior`, as a Pyro distribution.

    Draws have a pathwise gradient for one component; the choice among several has none.

    Args:
        posterior: whose law it is.
        lead: further independent copies, as the particles of an ELBO.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector

    def __init__(self, posterior: ConjugatePosterior, lead: Any = _NO_SHAPE) -> None:
        self.posterior = posterior
        shape = torch.Size([*lead, posterior.num_tasks, 1])
        super().__init__(shape, torch.Size([posterior.model.layout.dim]), validate_args=False)

    @property
    def has_rsample(self) -> bool:
        """Whether draws are differentiable."""
        return self.posterior.model.num_components == 1

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Draws from torch's global generator."""
        shape = torch.Size(sample_shape)
        generator = torch.Generator(device=self.posterior.support.device)
        generator.manual_seed(int(torch.randint(2**62, ()).item()))
        count = (shape + self.batch_shape[:-2]).numel()
        return self.posterior.draws(count, generator).u.reshape(*shape, *self.batch_shape, -1)

    def sample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Draws without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(u), ``[…, tasks, 1]``."""
        return self.posterior.log_prob(value.squeeze(-2)).unsqueeze(-1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlatConjugate:
        """The same with independent copies on the left of the tasks."""
        return FlatConjugate(self.posterior, torch.Size(batch_shape)[:-2])
