"""Predictions straight from a support: y ~ p(y | f(x, S, z)), where no vector for the task stands between."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import ShapeError, UnsupportedError
from bayesmeta.models.convolution import ConvProcess
from bayesmeta.models.handlers import Layout, Pass, Site
from bayesmeta.models.likelihoods import Likelihood
from bayesmeta.models.plates import shot_plate, task_plate
from bayesmeta.models.process_covariance import (
    Covariance,
    StationaryKernel,
    log_normal,
    num_extra,
    root_of,
    sample_targets,
    total_covariance,
    total_variance,
)
from bayesmeta.models.process_inputs import check_inputs, targets_of, without_padding
from bayesmeta.models.process_setup import (
    NetworkName,
    check_options,
    check_outputs,
    make_network,
    make_recognition,
    own_network,
    set_up,
    try_network_options,
)
from bayesmeta.models.program import TaskProgram, refuse_outside
from bayesmeta.models.recognition import Recognition
from bayesmeta.ops.random import Seed, as_generator, forked_rng, normal_like

#: Draws of z go through the network in slices of at most this many numbers of a hidden layer.
MAX_ELEMENTS = 20_000_000
SITE = "z"


class ProcessModel(TaskProgram):
    """The conditional model p(y | x, S): a network reads support and target together, under any likelihood.

    There is no φ that the support would be boiled down to, only an optional latent z ~ q(z | S); so the model says
    something once it knows the support, by :meth:`given`. Methods that adapt a φ (MAML, ABML, NUTS) refuse it;
    :class:`~bayesmeta.ProcessMethod` takes it.

    As a Pyro program, given a support, it has the site ``z`` (where there is a latent) in the task plate, with
    q(z | S), and the observed site ``y``: in the shot plate, or with a covariance one multivariate normal over a task's
    targets.

    With ``covariance="low_rank"`` or ``"kernel"`` the targets of a task are dependent: a multivariate normal whose mean
    and noise are the likelihood's and to which the network adds a covariance, see
    :mod:`bayesmeta.models.process_covariance`; computed in float64. With ``stationary`` that covariance is multiplied
    by exp(−Σ_f (x_f − x'_f)² / 2ℓ_f²) with learned ℓ. A convolution needs it: it sees x only through the support, so
    that without support, and beyond its receptive field, its outputs are the same everywhere and all targets would have
    correlation 1. (Bruinsma et al. convolve the covariance itself, over pairs of points; this is a departure, whose
    covariance without support is the exponentiated quadratic one.) The other networks read x and can make their
    covariances fall with distance, or keep them over long distances, as they learn.

    Args:
        network: ``"deep_set"``, ``"attention"``, ``"convolution"`` or ``"transformer"`` (see
            :mod:`bayesmeta.processes`), made at the first data; or a module of your own, copied:
            ``forward(support, x, z)`` from Observations, x ``[tasks, M, features]`` and z ``[L, tasks, latent_size]``
            or None to ``[L, tasks, M, outputs]`` (1 for L without z). Its outputs are the likelihood's, then those of
            the covariance: R, or R + 1.
        likelihood: None for ``HeteroscedasticGaussian(0.01)``, for real numbers. Copied.
        latent_size: of z; 0 for none.
        covariance: ``"diagonal"``: targets are independent given S (and z); or one of the two above, which need a
            Gaussian likelihood, one output and no latent.
        rank: R, of the covariance.
        stationary: whether the covariance is multiplied as above; None: for a convolution alone.
        length_scale: where ℓ begin, in units of x. Of standardised x 1 is a length over which functions commonly
            change. Rather too long than too short: a covariance that is 0 between all targets has no gradient.
        width: of the network's hidden layers.
        max_shots: more observations in a support are refused (with a latent, of support and query together q(z | S ∪ Q)
            may read more: it holds their mean alone).
        seed: of the first weights; None means seed 0.
        options: of the network: ``depth``, and ``heads``, ``blocks``, ``points_per_unit``, ``max_points``, where it has
            them.

    Raises:
        OptionError: for unknown names, sizes out of range, a covariance beside a latent, or options for an own network.
        UnsupportedError: for a covariance with another likelihood.
    """

    def __init__(
        self,
        network: NetworkName | nn.Module,
        likelihood: Likelihood | None = None,
        *,
        latent_size: int = 0,
        covariance: Covariance = "diagonal",
        rank: int = 32,
        stationary: bool | None = None,
        length_scale: float = 1.0,
        width: int = 64,
        max_shots: int | None = None,
        seed: Seed = None,
        **options: Any,
    ) -> None:
        super().__init__(self._pyro_program)
        check_options(likelihood, latent_size, covariance, rank, width, max_shots, stationary, length_scale)
        self.likelihood: Likelihood | None = copy.deepcopy(likelihood)
        self.latent_size, self.covariance, self.rank, self.width = latent_size, covariance, rank, width
        self.max_shots, self.options = max_shots, options
        self._seed = seed
        self.network: nn.Module | None = None
        self.recognition: Recognition | None = None
        self.kernel: StationaryKernel | None = None
        self.support: Observations | None = None
        self._domain: Any = None
        if isinstance(network, nn.Module):
            self.network_name, self.network = type(network).__name__, own_network(network, options, max_shots)
        else:
            self.network_name = str(network)
            try_network_options(self.network_name, self._make_options())
        convolution = network == "convolution" or isinstance(network, ConvProcess)
        self.stationary = covariance != "diagonal" and (convolution if stationary is None else stationary)
        self.length_scale = length_scale

    def _make_options(self) -> dict[str, Any]:
        sizes = {"latent_size": self.latent_size, "width": self.width, "max_shots": self.max_shots}
        return sizes | self.options

    def config(self) -> dict[str, Any]:
        """Options that change the result, as plain values."""
        return {
            "network": self.network_name,
            "latent_size": self.latent_size,
            "covariance": self.covariance,
            "width": self.width,
            "max_shots": self.max_shots,
            **({} if self.covariance == "diagonal" else {"rank": self.rank, "stationary": self.stationary}),
            **({"length_scale": self.length_scale} if self.stationary else {}),
            **self.options,
        }

    # -- first data ---------------------------------------------------------------------------------------------

    def prepare(self, observations: Observations) -> ProcessModel:
        """Make the network for these data, at the first ones, and check that everything fits.

        Raises:
            DataError: for first data without targets, or targets that the likelihood does not admit.
            OptionError: for targets that are no real numbers without a likelihood, or a likelihood that does not say
                how many outputs it takes.
            ShapeError: for a network, likelihood and targets that do not fit.
            UnsupportedError: for task-level covariates, or a covariance that the likelihood or targets have no use for.
        """
        if self._layout is None:
            self._set_up(observations)
            shape = torch.Size([self.latent_size])
            local = (Site(SITE, 0, self.latent_size, shape, shape),) if self.latent_size else ()
            self._layout = Layout(local, (), ("y",), observations.num_features)
        self.check(observations)
        self.check_targets(observations)
        return self

    def _set_up(self, observations: Observations) -> None:
        found = set_up(self.likelihood, self.covariance, observations)
        network = self.network
        if network is None:
            wide = found.outputs + num_extra(self.covariance, self.rank)
            sizes = (found.features, found.targets, wide)
            network = make_network(self.network_name, *sizes, self._seed, self._make_options() | found.reads)
        network = network.to(observations.x)
        if self.latent_size:
            recognition = make_recognition(found, self.latent_size, self.width, self._seed, observations.device)
            self.recognition = recognition.to(observations.x)
        if self.stationary:
            self.kernel = StationaryKernel(found.features, self.length_scale).to(observations.x)
        self.likelihood, self._domain, self._own_outputs = found.likelihood, found.domain, found.outputs
        self._try_network(network, observations)
        self.network = network

    def _try_network(self, network: nn.Module, observations: Observations) -> None:
        some = Observations(observations.x[:, :2], None if observations.y is None else observations.y[:, :2])
        z = some.x.new_zeros(1, some.num_tasks, self.latent_size) if self.latent_size else None
        support, asked = self._read(some), self._read(some).x
        try:
            with torch.no_grad():
                out = network(support, asked, z)
        except RuntimeError as error:
            raise ShapeError(
                f"The network {self.network_name} cannot take x with {asked.shape[-1]} features in {asked.dtype} "
                f"beside a support, and a latent of size {self.latent_size}: {error}"
            ) from error
        self._check_outputs(out, (1, some.num_tasks, asked.shape[1]))

    def _check_outputs(self, out: Any, lead: tuple[int, ...]) -> None:
        check_outputs(self.network_name, out, lead, self._own_outputs, num_extra(self.covariance, self.rank))

    # -- checks -------------------------------------------------------------------------------------------------

    def check(self, observations: Observations) -> None:
        """Check the feature width, the exposure, that real data are finite, and targets that are counts or classes.

        Raises:
            ShapeError: for another width than that of the first data.
            UnsupportedError: for task-level covariates.
            NonFiniteDataError: naming task and shot; padding may hold anything.
            DataError: for an exposure or targets out of range, naming task and shot.
        """
        super().check(observations)
        assert self.likelihood is not None
        check_inputs(self.likelihood, observations)
        if self._domain.is_discrete:
            self.check_targets(observations)

    def check_targets(self, observations: Observations, theta: Tensor | None = None) -> None:
        """Check that the likelihood admits the targets."""
        if observations.y is not None and observations.shots > 0:
            refuse_outside(self._domain, observations.y, observations.full_mask())

    # -- conditioning -------------------------------------------------------------------------------------------

    def given(self, support: Observations) -> ProcessModel:
        """The same model (its parameters are shared) with a support to predict from.

        Raises:
            UnsupportedError: before the first data.
        """
        if self._layout is None:
            raise UnsupportedError(
                "The process has met no data yet, at which its network is made; call model.prepare(support) first."
            )
        other = copy.copy(self)
        other.support = support
        object.__setattr__(other, "program", other._pyro_program)
        return other

    def _conditioned(self) -> Observations:
        if self.support is None:
            raise UnsupportedError(
                "A process predicts from a support and has no φ to adapt: use ProcessMethod (or one of its kinds, such "
                "as AttentiveNeuralProcess), whose posterior holds the support; or model.given(support)."
            )
        return self.support

    def infer(self, observations: Observations) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z | observations), each ``[1, tasks, D]``; differentiable.

        N(0, I) without observations; D is 0 without a latent.
        """
        if self.recognition is None:
            empty = observations.x.new_zeros(1, observations.num_tasks, 0)
            return empty, empty
        q = self.recognition(self._read(observations))
        return q.loc.unsqueeze(0), q.spread.unsqueeze(0)

    def _read(self, observations: Observations) -> Observations:
        """The observations as the network has them, without the exposure."""
        assert self.likelihood is not None
        return replace(observations, x=self.likelihood.split(observations.x)[0])

    def _asked(self, observations: Observations) -> Tensor:
        """x of the targets as the network has it, without the exposure and what padding holds."""
        return without_padding(self._read(observations), self._read(self._conditioned()))

    def outputs(self, u: Tensor, observations: Observations) -> Tensor:
        """Network outputs at the inputs of observations, ``[…, tasks, shots, outputs]`` for u ``[…, tasks, D]``.

        Without a latent ``[tasks, shots, outputs]``, as they are the same for all u.
        """
        support = self._conditioned()
        assert self.network is not None
        shape = (observations.num_tasks, observations.shots)
        if support.num_tasks != shape[0]:
            raise ShapeError(f"The support has {support.num_tasks} tasks, the inputs {shape[0]}; give the same tasks.")
        read, x = self._read(support), self._asked(observations)
        if not self.latent_size:
            out = self.network(read, x, None)
            self._check_outputs(out, (1, *shape))
            return out[0]
        z = u.reshape(-1, *u.shape[-2:])
        size = max(MAX_ELEMENTS // max(shape[0] * shape[1] * self.width, 1), 1)
        out = torch.cat([self.network(read, x, part) for part in z.split(size)])
        self._check_outputs(out, (len(z), *shape))
        return out.reshape(*u.shape[:-2], *out.shape[1:])

    # -- densities and predictions ------------------------------------------------------------------------------

    def _likelihood(self, out: Tensor, observations: Observations) -> Any:
        assert self.likelihood is not None
        exposure = self.likelihood.split(observations.x, observations.mask)[1]
        return self.likelihood.distribution(out[..., : self._own_outputs], **exposure)

    def _normal(self, out: Tensor, observations: Observations) -> tuple[Tensor, Tensor]:
        """Mean ``[tasks, M]`` and covariance, float64 ``[tasks, M, M]``, of dependent targets."""
        fn = self._likelihood(out, observations)
        factor = None if self.kernel is None else self.kernel(self._asked(observations))
        return fn.loc, total_covariance(self.covariance, out[..., self._own_outputs :], fn.scale, factor)

    def predictive(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Any:
        """The distribution of each y given S and z: batch shape ``[…, tasks, shots]``, without […] if there is no z."""
        out = self.outputs(u, observations)
        fn = self._likelihood(out, observations)
        if self.covariance == "diagonal":
            return fn
        variance = total_variance(self.covariance, out[..., self._own_outputs :], fn.scale)
        return dist.Normal(fn.loc, variance.sqrt().to(fn.loc))

    def joint(self, observations: Observations) -> Any:
        """Of dependent targets: their multivariate normal, batch ``[tasks]``, event ``[shots]``."""
        loc, covariance = self._normal(self.outputs(self._no_latent(observations), observations), observations)
        return dist.MultivariateNormal(loc, scale_tril=root_of(covariance).to(loc))

    def log_likelihood(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Tensor:
        """log p(y_i | x_i, S, z) of each observation by itself, ``[…, tasks, shots]``; 0 where masked."""
        y = targets_of(observations)
        if self.covariance == "diagonal":
            assert self.likelihood is not None
            exposure = self.likelihood.split(observations.x, observations.mask)[1]
            value = self.likelihood.log_prob(self.outputs(u, observations), y, **exposure)
        else:
            value = self.predictive(u, observations).log_prob(y)
        if observations.mask is not None:
            value = torch.where(observations.mask, value, 0.0)
        return value.expand(*u.shape[:-1], observations.shots)

    def log_targets(self, u: Tensor, observations: Observations) -> Tensor:
        """log p(y_1, …, y_M | x, S, z) of all targets of a task together, ``[…, tasks]``."""
        if self.covariance == "diagonal":
            return self.log_likelihood(u, observations).sum(-1)
        y, keep = targets_of(observations), observations.full_mask()
        loc, covariance = self._normal(self.outputs(u, observations), observations)
        value = log_normal(loc, root_of(covariance, keep), y, keep)
        return value.to(loc).expand(u.shape[:-1])

    def predict(
        self, u: Tensor, observations: Observations, generator: Seed = None, theta: Tensor | None = None
    ) -> Tensor:
        """Draw y given S and z, ``[…, tasks, shots]`` or ``[…, tasks, shots, outputs]``; dependent ones together."""
        generator = as_generator(generator, observations.device, "program")
        shape = (*u.shape[:-1], observations.shots)
        with torch.no_grad():
            if self.covariance == "diagonal":
                fn = self.predictive(u, observations).expand(shape)
                with forked_rng(generator):
                    return fn.sample()
            loc, covariance = self._normal(self.outputs(u, observations), observations)
            root = root_of(covariance, observations.full_mask())
            noise = normal_like(root, shape, generator)
            return loc + (root @ noise.unsqueeze(-1)).squeeze(-1).to(loc)

    # -- the latent's prior -------------------------------------------------------------------------------------

    def _no_latent(self, observations: Observations) -> Tensor:
        return observations.x.new_zeros(observations.num_tasks, 0)

    def prior_moments(self, observations: Observations, theta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean 0 and standard deviation 1 of z, each ``[tasks, D]``."""
        shape = (observations.num_tasks, self.latent_size)
        return observations.x.new_zeros(shape), observations.x.new_ones(shape)

    def sample_prior(
        self, num_samples: int, observations: Observations, generator: Seed = None, theta: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draws of z from N(0, I), ``[n, tasks, D]``; there are no global sites."""
        generator = as_generator(generator, observations.device, "program")
        shape = (num_samples, observations.num_tasks, self.latent_size)
        return normal_like(observations.x, shape, generator), None

    def log_prior(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Tensor:
        """log N(z; 0, I), ``[…, tasks]``; 0 without a latent."""
        return dist.Normal(0.0, 1.0).log_prob(u).sum(-1)

    def log_jacobian(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Tensor:
        """0, ``[…, tasks]``: z is unconstrained."""
        return u.new_zeros(u.shape[:-1])

    def named(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> dict[str, Tensor]:
        """``z``, where there is one."""
        return {SITE: u} if self.latent_size else {}

    def evaluate(self, u: Tensor, observations: Observations, theta: Tensor | None = None) -> Pass:
        """Refused: there is no joint density of support and latent to evaluate.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "A process predicts from its support: it has no density of the support itself, and no φ to adapt. Use "
            "ProcessMethod; for a joint density a ContextTaskModel or a NeuralTaskModel with another method."
        )

    # -- as a Pyro program --------------------------------------------------------------------------------------

    def _pyro_program(self, x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        observations, support = Observations(x, y, mask), self._conditioned()
        keep = observations.full_mask()
        with task_plate(x):
            u = self._no_latent(observations)
            if self.latent_size:
                loc, scale = (part.squeeze(0).unsqueeze(-2) for part in self.infer(support))
                u = pyro.sample(SITE, dist.Normal(loc, scale).to_event(1)).squeeze(-2)
            out = self.outputs(u, observations)
            if self.covariance == "diagonal":
                with shot_plate(x, mask):
                    return pyro.sample("y", self._likelihood(out, observations), obs=y)
            loc, covariance = self._normal(out, observations)
            return sample_targets(loc, covariance, y, keep)
