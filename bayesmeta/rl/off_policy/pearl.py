"""PEARL: soft actor-critic beside a latent of the task, which is inferred from what happened and explored by draws.

Source: K. Rakelly, A. Zhou, D. Quillen, C. Finn, S. Levine, "Efficient Off-Policy Meta-Reinforcement Learning via
Probabilistic Context Variables", ICML 2019, https://arxiv.org/abs/1903.08254, algorithms 1 and 2. A guide
q(z | context) reads transitions; actor and critics read z beside the state. The critics learn from all that was ever
done; the guide reads of the last iteration alone, which is near to what it will meet (there a buffer of its own, which
is emptied each time). The guide learns from the critics' loss and the KL to the prior, as released; that z explains
rewards or transitions can be asked for beside.

Departures: the prior is a factor of q, so that an empty context gives it exactly; two critics with slow targets and a
learned temperature (Haarnoja et al. 2018b) in place of a state-value network and a fixed one; no penalty on the
policy's outputs; each iteration collects a trial in every task, all of them at once, in place of some tasks one after
the other. The released code sums the KL over the tasks of an update, and takes the squared errors of the critics
without ½: a weight of ``kl_weight`` here, on the mean, is 2 × kl_weight / meta_batch there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from bayesmeta.errors import OptionError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.ops.whole import is_whole
from bayesmeta.rl.latent.beliefs import BeliefPath
from bayesmeta.rl.latent.contexts import ContextSpec, Reconstruction
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.latent.decoder import TransitionDecoder
from bayesmeta.rl.latent.undecoded import Undecoded
from bayesmeta.rl.learner import AdaptationCurve
from bayesmeta.rl.off_policy.learner import OffPolicyLearner, check_fixed_tasks, put_back
from bayesmeta.rl.off_policy.posterior_sampling import Act, Exploration, inferring, play
from bayesmeta.rl.off_policy.replay import Replay, Transitions
from bayesmeta.rl.off_policy.sac import SACConfig, SACNetworks, SACUpdate, averaged
from bayesmeta.rl.protocols import TaskVectorEnv
from bayesmeta.rl.rollout import Rollout
from bayesmeta.rl.trials import curve_of_trials, told_by


@dataclasses.dataclass(frozen=True)
class PEARLConfig:
    """Settings of PEARL.

    Attributes:
        sac: of the updates.
        latent: numbers in z.
        meta_batch: tasks of an update, drawn anew for each; at most those that there are.
        batch: steps drawn of each of them for actor and critics.
        context_batch: steps drawn of each of them for the guide.
        updates: gradient steps of an iteration.
        capacity: steps kept of each task.
        warmup: iterations that collect with z from the prior and learn nothing.
        prior_episodes: of each trial, the first that draw z from the prior.
        train_reward: name of a number in ``info`` that actor and critics learn from in place of the reward, such as
            ``"dense_reward"``; contexts hold the reward itself.
        kl_weight: of the KL to the prior, mean over tasks, beside the critics' loss.
        critic_gradient: whether the guide learns from the critics.
        reconstruction: whether z must also explain the ``"reward"``, or the whole ``"transition"`` (reward and change
            of state), by a decoder whose log likelihood is added; None: not.
        reconstruction_weight: of that, mean over the steps drawn.
        encoder_lr: Adam's rate for guide and decoder; None is that of actor and critics.

    Raises:
        OptionError: for settings outside their range, and a guide that would learn from nothing.
    """

    sac: SACConfig = dataclasses.field(default_factory=SACConfig)
    latent: int = 5
    meta_batch: int = 16
    batch: int = 256
    context_batch: int = 64
    updates: int = 100
    capacity: int = 10_000
    warmup: int = 1
    prior_episodes: int = 1
    train_reward: str | None = None
    kl_weight: float = 1.0
    critic_gradient: bool = True
    reconstruction: Reconstruction | None = None
    reconstruction_weight: float = 1.0
    encoder_lr: float | None = None

    def __post_init__(self) -> None:
        for name in ("latent", "meta_batch", "batch", "context_batch", "updates", "capacity", "prior_episodes"):
            if not is_whole(getattr(self, name), 1):
                what = " (a latent of size 0 says nothing)" if name == "latent" else ""
                raise OptionError(f"{name} must be a whole number, at least 1{what}; got {getattr(self, name)!r}.")
        if not is_whole(self.warmup, 1):
            raise OptionError(
                f"warmup must be a whole number, at least 1: there is nothing to draw yet; got {self.warmup!r}."
            )
        if self.reconstruction not in (None, *get_args(Reconstruction)):
            raise OptionError(f"reconstruction is {self.reconstruction!r}; expected 'reward', 'transition' or None.")
        for name in ("kl_weight", "reconstruction_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name} must be at least 0 and finite; got {getattr(self, name)}.")
        if self.encoder_lr is not None and not 0 < self.encoder_lr < math.inf:
            raise OptionError(f"encoder_lr must be positive and finite; got {self.encoder_lr}.")
        if not self.critic_gradient and self.reconstruction is None:
            raise OptionError("The guide would learn from the KL alone; give critic_gradient=True or a reconstruction.")

    def plain(self) -> dict[str, Any]:
        """All settings as plain values, those of ``sac`` among them."""
        content = dataclasses.asdict(self)
        sac = content.pop("sac")
        return {**sac, "hidden": list(sac["hidden"]), **content}


class LatentPolicy(nn.Module):
    """What is learned: actor and critics beside z, the guide, and a decoder if z must explain what happened.

    Args:
        networks: actor and critics, whose context is z.
        latent: prior and guide.
        decoder: of transitions; None without one.
    """

    def __init__(self, networks: SACNetworks, latent: LatentContext, decoder: TransitionDecoder | None = None) -> None:
        super().__init__()
        self.networks, self.latent, self.decoder = networks, latent, decoder

    def acting(self, *, greedy: bool = False) -> Act:
        """Actions under given latents: draws, or the likeliest (``greedy``)."""

        def act(observation: Tensor, z: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            return self.networks.act(observation, z, generator, greedy=greedy)

        return act


class PEARL(OffPolicyLearner):
    """Trains actor, critics and guide on the tasks of a vector environment.

    An iteration is one trial in every environment, by posterior sampling, and ``config.updates`` gradient steps.

    Args:
        env: of training tasks, which stay (``new_tasks=False``); its episodes of a trial are those collected.
        config: settings.
        encoder: of the guide: ``"product"``, as in the paper, or another name or module for
            :meth:`~bayesmeta.rl.latent.core.LatentContext.make`.
        spec: of the contexts; None is [s, a] with its reward.
        width: of a named encoder.
        seed: of first weights, latents, actions and batches.

    Attributes:
        policy: the networks.
        replay: what was done in each task; actor and critics learn from all of it.
        fresh: how many steps of each task are of the last rollout, which the guide reads.
        iteration: iterations done.
        history: one dict an iteration: ``reward`` (mean return of an episode of training) and figures of the updates;
            ``kl`` is in nats, without its weight.

    Raises:
        OptionError: for environments that draw new tasks.
        SpaceError: for actions that are not a bounded box.
        ContextError: for a spec of other spaces.
    """

    def __init__(
        self,
        env: TaskVectorEnv,
        config: PEARLConfig | None = None,
        *,
        encoder: Any = "product",
        spec: ContextSpec | None = None,
        width: int = 64,
        seed: int = 0,
    ) -> None:
        self.config = config = PEARLConfig() if config is None else config
        check_fixed_tasks(env, "PEARL")
        self.env, self.seed = env, seed
        self.spec = ContextSpec.of(env) if spec is None else spec
        self.spec.check_env(env)
        dtype = getattr(env, "dtype", torch.float32)
        latent = LatentContext.make(
            self.spec, config.latent, encoder, width=width, seed=seed, dtype=dtype, kl_weight=config.kl_weight
        )
        spaces = env.single_observation_space, env.single_action_space
        networks = SACNetworks(*spaces, config.sac, context=config.latent, seed=seed)
        self._explained, decoder = explained(self.spec, config.reconstruction), None
        if self._explained is not None:
            decoder = TransitionDecoder(self._explained, config.latent, seed=seed)
        self.policy = LatentPolicy(networks, latent, decoder).to(env.device, dtype)
        rate = config.sac.lr if config.encoder_lr is None else config.encoder_lr
        beside = [p for part in (latent, decoder) if part is not None for p in part.parameters()]
        self.updates = SACUpdate(networks, config.sac, [{"params": beside, "lr": rate}])
        self.replay = Replay(env.num_tasks, config.capacity, env.device)
        self.fresh = 0
        self.generator = as_generator(seed, env.device, "pearl")
        self.iteration = 0
        self.history: list[dict[str, float]] = []

    # -- training -------------------------------------------------------------------------------------------------

    def train(self, iterations: int) -> list[dict[str, float]]:
        """Do some iterations; the history of this call."""
        begin = len(self.history)
        for _ in range(iterations):
            self.history.append(self._iterate())
            self.iteration += 1
        return self.history[begin:]

    def _iterate(self) -> dict[str, float]:
        rollout = self.collect("prior" if self.iteration < self.config.warmup else "posterior_sampling")
        self.store(rollout)
        learns = self.iteration + 1 >= self.config.warmup
        with put_back(self.policy, self.updates.optimizers.values()):
            told = [self.update() for _ in range(self.config.updates)] if learns else []
            figures = averaged(told, self.iteration + 1)
        episodes = max(1, int(rollout.ended.sum()))
        return {"reward": float(rollout.reward.sum()) / episodes, **figures}

    def collect(self, exploration: Exploration = "posterior_sampling") -> Rollout:
        """A trial in every training environment, with actions that are drawn."""
        infer = inferring(self.policy.latent, exploration, self.config.prior_episodes)
        keep = () if self.config.train_reward is None else (self.config.train_reward,)
        return play(self.env, self.policy.acting(), infer, self.spec, self.generator, keep=keep)

    def store(self, rollout: Rollout) -> None:
        """Put a rollout into the buffer; the guide reads of it alone until the next."""
        steps = Transitions.of_rollout(rollout, tuple(rollout.extra))
        self.replay.add(steps)
        self.fresh = steps.reward.shape[1]

    def update(self) -> dict[str, Tensor]:
        """One gradient step on some of the tasks."""
        config, generator, latent = self.config, self.generator, self.policy.latent
        chosen = torch.randperm(self.env.num_tasks, generator=generator, device=generator.device)
        chosen = chosen[: config.meta_batch].cpu()
        read = self.replay.sample(config.context_batch, generator, tasks=chosen, recent=max(1, self.fresh))
        batch = self.replay.sample(config.batch, generator, tasks=chosen)
        q = latent.posterior(self._context(self.spec, read))
        z = latent.sample(q, 1, generator)[0]
        kl = latent.kl(q).mean()
        nats = torch.distributions.kl_divergence(q, latent.prior(*q.batch_shape)).mean()
        extra, more = kl, {"kl": nats.detach()}
        if self.policy.decoder is not None:
            assert self._explained is not None
            fit = self.policy.decoder.log_prob(z, self._context(self._explained, batch)).mean()
            extra = extra - config.reconstruction_weight * fit
            more["log_likelihood"] = fit.detach()
        batch = batch.with_reward(config.train_reward)
        context = z if config.critic_gradient else z.detach()
        return self.updates.update(batch, generator, context=context, extra=extra) | more

    def _context(self, spec: ContextSpec, steps: Transitions) -> Any:
        return spec.transitions(steps.observation, steps.action, steps.reward, steps.successor)

    # -- what was learned -----------------------------------------------------------------------------------------

    def evaluate(
        self,
        env: TaskVectorEnv,
        *,
        exploration: Exploration = "posterior_sampling",
        prior_episodes: int | None = None,
        greedy: bool = True,
        generator: Seed = None,
        keep: tuple[str, ...] = (),
    ) -> Rollout:
        """One trial in each environment.

        Args:
            env: of held-out tasks. It is reset.
            exploration: how an episode's latent comes from the belief; see
                :func:`~bayesmeta.rl.off_policy.posterior_sampling.inferring`.
            prior_episodes: see there; None is as trained.
            greedy: take the likeliest actions, else draw.
            generator: of latents and actions; None means seed 0.
            keep: further numbers of ``info``.

        Returns:
            All steps, whose ``state`` is the last episode's latents.

        Raises:
            ContextError: for environments of another task family.
        """
        self.spec.check_env(env)
        generator = as_generator(generator, env.device, "evaluation")
        first = self.config.prior_episodes if prior_episodes is None else prior_episodes
        infer = inferring(self.policy.latent, exploration, first)
        return play(env, self.policy.acting(greedy=greedy), infer, self.spec, generator, keep=keep)

    def curve(
        self,
        env: TaskVectorEnv,
        *,
        points: int | None = None,
        generator: Seed = None,
        exploration: Exploration = "posterior_sampling",
    ) -> AdaptationCurve:
        """Return of each episode of a trial: the first under the prior, then by posterior sampling, likeliest actions.

        Args:
            env: of held-out tasks.
            points: not read: the episodes of a trial are the environment's.
            generator: of the latents; None means seed 0.
            exploration: as in :meth:`evaluate`.
        """
        return curve_of_trials(
            self.evaluate(env, exploration=exploration, generator=generator, keep=told_by(env)), env
        )  # fmt: skip

    @property
    def belief_spec(self) -> ContextSpec:
        """What stands in the context of :meth:`belief_path`: what the decoder explains, where there is one."""
        return self.spec if self._explained is None else self._explained

    @torch.no_grad()
    def belief_path(
        self, env: TaskVectorEnv, *, greedy: bool = True, generator: Seed = None
    ) -> tuple[BeliefPath, Rollout]:
        """The beliefs on the way through one trial in each environment, and the rollout that they are of.

        They are those after every step; posterior sampling asks for one where an episode begins. Without
        ``reconstruction`` nothing was learned of what z means: the program is then an
        :class:`~bayesmeta.rl.latent.undecoded.Undecoded`.

        Args:
            env: of held-out tasks. It is reset.
            greedy: take the likeliest actions, else draw.
            generator: of latents and actions; None means seed 0.
        """
        rollout = self.evaluate(env, greedy=greedy, generator=generator)
        q = self.policy.latent.beliefs(self.spec.of_rollout(rollout)).base_dist
        decoder = self.policy.decoder
        program = Undecoded(_TRAIN) if decoder is None else decoder.program()
        return BeliefPath(program, self.belief_spec.of_rollout(rollout), q.loc, q.scale), rollout

    # -- going on later -------------------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """The options that change what it learns, as plain values."""
        return {
            "learner": type(self).__name__, **self.policy.latent.options(), **self.config.plain(), "seed": self.seed,
        }  # fmt: skip

    def _more_state(self) -> dict[str, Any]:
        return {"fresh": self.fresh}

    def _load_more(self, state: Mapping[str, Any]) -> None:
        self.fresh = state["fresh"]


_TRAIN = "train PEARL with reconstruction='reward' (bayesmeta rl train: --reconstruction reward)."


def explained(spec: ContextSpec, reconstruction: Reconstruction | None) -> ContextSpec | None:
    """What a decoder must explain: the reward given [s, a, s′], or [r, s′ − s] given [s, a]."""
    if reconstruction is None:
        return None
    if reconstruction == "reward":
        return dataclasses.replace(spec, inputs=("state", "action", "successor"), targets=("reward",))
    return dataclasses.replace(spec, inputs=("state", "action"), targets=("reward", "change"), binary=False)
