"""Latents of the training tasks, learned one by one, and an encoder that is distilled onto them. **This is not PEARL.**

PEARL learns its encoder through the critics, which says nothing as long as contexts look alike: with sparse rewards
nothing is ever found, and the encoder has nothing to learn from. Here the two are cut apart.

1. Every training task has a Gaussian q_i(z) of its own, ω_i, as in A. Gupta, R. Mendonca, Y. Liu, P. Abbeel,
   S. Levine, "Meta-Reinforcement Learning of Structured Exploration Strategies" (MAESN), NeurIPS 2018,
   https://arxiv.org/abs/1802.07245, section 4. Soft actor-critic learns beside z ~ q_i, and ω_i learns from the
   critics' loss and the KL to N(0, I), as PEARL's encoder does. MAESN's inner gradient steps and its policy gradient
   are left out. No context is needed for this, and rewards may be those that only training sees (``train_reward``).
2. **Chains**, trials of posterior sampling with the current encoder in the training tasks, bring contexts as they will
   be. The encoder learns from their beginnings, in the order of time:

       maximise E_{z ~ q_i} log q(z | first n episodes of a chain in task i)     over i, chains and n.

   Over tasks drawn alike, its maximum is the average of the tasks' Gaussians under the Bayesian posterior over tasks
   given the context, or, of a Gaussian, what is nearest to that in KL. Chains are collected again as the encoder
   learns: a belief after three episodes is about contexts that beliefs after one and two lead to.

Whose task it is (the row i) is used in training alone. In a new task there are the prior and the encoder. Two forms of
q (``posterior``):

* ``"mixture"``: :class:`~bayesmeta.rl.latent.mixture.MixtureContext`, the q_i with weights read from the context. It
  can say "not where I have been", and its prior is the mixture with equal weights.
* ``"gaussian"``: :class:`~bayesmeta.rl.latent.core.LatentContext` with any of its encoders.

Learning a belief from draws of latents and of what follows from them is the sleep phase of G. Hinton, P. Dayan,
B. Frey, R. Neal, "The wake-sleep algorithm for unsupervised neural networks", Science 1995,
https://doi.org/10.1126/science.7761831. Putting it to learned latents of tasks, and chains, are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayesmeta.data import Observations
from bayesmeta.errors import HorizonError, NonFiniteLossError, OptionError, UnsupportedError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.ops.whole import is_whole
from bayesmeta.rl.latent.beliefs import BeliefPath
from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.latent.core import LatentContext
from bayesmeta.rl.latent.mixture import MixtureContext, TaskLatents
from bayesmeta.rl.latent.undecoded import Undecoded
from bayesmeta.rl.learner import AdaptationCurve, horizon_of
from bayesmeta.rl.off_policy.chains import Chains, distillation_loss
from bayesmeta.rl.off_policy.distilled_config import DistilledConfig
from bayesmeta.rl.off_policy.learner import OffPolicyLearner, check_fixed_tasks, put_back
from bayesmeta.rl.off_policy.posterior_sampling import Act, Exploration, inferring, play
from bayesmeta.rl.off_policy.replay import Replay, Transitions
from bayesmeta.rl.off_policy.sac import SACNetworks, SACUpdate, averaged
from bayesmeta.rl.protocols import TaskVectorEnv
from bayesmeta.rl.rollout import Rollout
from bayesmeta.rl.states import copied
from bayesmeta.rl.trials import curve_of_trials, told_by


class DistilledPolicy(nn.Module):
    """What is learned: actor and critics beside z, the training tasks' latents, and the belief of new tasks.

    Args:
        networks: actor and critics, whose context is z.
        latents: of the training tasks.
        belief: prior and guide of a new task.
    """

    def __init__(self, networks: SACNetworks, latents: TaskLatents, belief: MixtureContext | LatentContext) -> None:
        super().__init__()
        self.networks, self.latents, self.belief = networks, latents, belief

    def acting(self, *, greedy: bool = False) -> Act:
        """Actions under given latents: draws, or the likeliest (``greedy``)."""

        def act(observation: Tensor, z: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            return self.networks.act(observation, z, generator, greedy=greedy)

        return act


class DistilledLatents(OffPolicyLearner):
    """Trains what :mod:`bayesmeta.rl.off_policy.distilled` describes.

    An iteration is one episode of every training task under its own latent, ``config.updates`` gradient steps of actor,
    critics and latents, a chain where it is due, and ``config.distill_steps`` of the encoder.

    Args:
        env: of training tasks, which stay (``new_tasks=False``), with episodes of one length; its episodes of a trial
            are those of a chain.
        config: settings.
        iterations: over which the rates fall.
        spec: of the contexts; None is [s, a] with its reward.
        seed: of first weights, latents, actions and batches.
        encoder_options: of :meth:`~bayesmeta.rl.latent.mixture.MixtureContext.make` or, for ``posterior="gaussian"``,
            of :meth:`~bayesmeta.rl.latent.core.LatentContext.make`.

    Attributes:
        policy: see :class:`DistilledPolicy`.
        replay: what was done under the tasks' own latents, task by task.
        chains: what happened in posterior sampling.
        iteration: iterations done.
        history: one dict an iteration: ``reward`` (mean return of an episode under the task's own latent), ``kl`` and
            ``distillation`` (nats, lower is better), and figures of the updates.

    Raises:
        OptionError: for numbers out of range, and environments that draw new tasks.
        SpaceError: for actions that are not a bounded box.
        HorizonError: for episodes of several lengths, or of unknown length.
        ContextError: for a spec of other spaces.
    """

    def __init__(
        self,
        env: TaskVectorEnv,
        config: DistilledConfig | None = None,
        *,
        iterations: int = 300,
        spec: ContextSpec | None = None,
        seed: int = 0,
        **encoder_options: Any,
    ) -> None:
        self.config = DistilledConfig() if config is None else config
        if not is_whole(iterations, 1):
            raise OptionError(f"iterations must be a whole number, at least 1; got {iterations!r}.")
        check_fixed_tasks(env, "DistilledLatents")
        self.horizon = _fixed_length(env)
        self.env, self.iterations, self.seed = env, iterations, seed
        self.spec = ContextSpec.of(env) if spec is None else spec
        self.spec.check_env(env)
        self.policy = self._policy(encoder_options).to(env.device, getattr(env, "dtype", torch.float32))
        self.updates = SACUpdate(
            self.policy.networks,
            self.config.sac,
            [{"params": list(self.policy.latents.parameters()), "lr": self.config.latent_lr}],
        )
        learned = [p for p in self.policy.belief.parameters() if p.requires_grad]
        self.distiller = torch.optim.Adam(learned, lr=self.config.distill_lr)
        self.replay = Replay(env.num_tasks, self.config.capacity, env.device)
        self.chains = Chains(self.config.chains)
        self.generator = as_generator(seed, env.device, "distilled latents")
        self.iteration = 0
        self.history: list[dict[str, float]] = []
        self._rates = [[g["lr"] for g in o.param_groups] for o in self._optimizers()]

    def _policy(self, options: dict[str, Any]) -> DistilledPolicy:
        config, env = self.config, self.env
        networks = SACNetworks(
            env.single_observation_space, env.single_action_space, config.sac, context=config.latent, seed=self.seed
        )
        latents = TaskLatents(
            env.num_tasks, config.latent, spread=config.spread, scale=config.scale, seed=self.seed
        )  # fmt: skip
        belief: MixtureContext | LatentContext
        if config.posterior == "mixture":
            belief = MixtureContext.make(self.spec, latents, seed=self.seed, **options)
        else:
            belief = LatentContext.make(self.spec, config.latent, seed=self.seed, **options)
        return DistilledPolicy(networks, latents, belief)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [*self.updates.optimizers.values(), self.distiller]

    # -- training -------------------------------------------------------------------------------------------------

    def train(self, iterations: int | None = None) -> list[dict[str, float]]:
        """Do some iterations, None is all that are left; the history of this call."""
        until = self.iterations if iterations is None else min(self.iterations, self.iteration + iterations)
        begin = len(self.history)
        while self.iteration < until:
            self._set_rates()
            self.history.append(self._iterate())
            self.iteration += 1
        return self.history[begin:]

    def _set_rates(self) -> None:
        done = self.iteration / max(1, self.iterations - 1)
        share = 1 - done * (1 - self.config.last_lr)
        for optimizer, rates in zip(self._optimizers(), self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share

    def _iterate(self) -> dict[str, float]:
        keep = () if self.config.train_reward is None else (self.config.train_reward,)
        rollout = self._play(self._own_latents, episodes=1, keep=keep)
        self.replay.add(Transitions.of_rollout(rollout, keep))
        with put_back(self.policy, self._optimizers()):
            told = [self.update() for _ in range(self.config.updates)]
            figures = averaged(told, self.iteration + 1) | self._distilled()
        return {"reward": float(rollout.total().mean()), **figures}

    def _distilled(self) -> dict[str, float]:
        """The encoder's part of an iteration: a chain where one is due, and steps."""
        since = self.iteration - self.config.warmup
        if since < 0:
            return {}
        if since % self.config.chain_every == 0:
            self.collect_chain()
        nats = torch.stack([self.distill() for _ in range(self.config.distill_steps)]).mean().item()
        weights = nn.utils.parameters_to_vector(self.policy.belief.parameters())
        if not math.isfinite(nats) or not bool(torch.isfinite(weights).all()):
            raise NonFiniteLossError(
                f"The encoder is not finite after iteration {self.iteration + 1}, its loss is {nats}. Try a lower rate "
                "(distill_lr).",
                self.iteration + 1,
            )
        return {"distillation": nats}

    def _play(self, infer: Any, episodes: int | None, keep: tuple[str, ...] = ()) -> Rollout:
        return play(
            self.env, self.policy.acting(), infer, self.spec, self.generator, episodes=episodes, keep=keep
        )  # fmt: skip

    def _own_latents(self, context: Observations, episode: Tensor, generator: torch.Generator) -> Tensor:
        """Draws of the latents of the tasks that the environments have: training alone may know which."""
        return self.policy.latents.rsample(generator).repeat_interleave(self.env.copies, 0)

    def update(self) -> dict[str, Tensor]:
        """One gradient step of actor, critics and the tasks' latents."""
        latents, config = self.policy.latents, self.config
        batch = self.replay.sample(config.batch, self.generator).with_reward(config.train_reward)
        kl = latents.kl().mean()
        told = self.updates.update(
            batch, self.generator, context=latents.rsample(self.generator), extra=config.kl_weight * kl
        )
        return told | {"kl": kl.detach()}

    def collect_chain(self) -> None:
        """A trial of posterior sampling in every training task, with the current belief."""
        rollout = self._play(inferring(self.policy.belief), episodes=None)
        self.chains.add(self.spec.of_rollout(rollout, trial="first"))

    def distill(self) -> Tensor:
        """One gradient step of the encoder; its loss, on the device."""
        context, which = self.chains.sample(self.config.distill_batch, self.generator)
        with torch.no_grad():
            z = self.policy.latents.rsample(self.generator)[which // self.env.copies]
        steps = torch.arange(1, self.env.episodes_per_trial + 1, device=z.device) * self.horizon
        loss = distillation_loss(self.policy.belief, context, z, steps)
        self.distiller.zero_grad(set_to_none=True)
        loss.backward()
        self.distiller.step()
        return loss.detach()

    # -- what was learned -----------------------------------------------------------------------------------------

    def evaluate(
        self,
        env: TaskVectorEnv,
        *,
        exploration: Exploration = "posterior_sampling",
        greedy: bool = True,
        generator: Seed = None,
        keep: tuple[str, ...] = (),
    ) -> Rollout:
        """One trial in each environment, by prior and encoder alone.

        Args:
            env: of held-out tasks. It is reset.
            exploration: how an episode's latent comes from the belief; see
                :func:`~bayesmeta.rl.off_policy.posterior_sampling.inferring`.
            greedy: take the likeliest actions, else draw.
            generator: of latents and actions; None means seed 0.
            keep: further numbers of ``info``.

        Raises:
            ContextError: for environments of another task family.
        """
        self.spec.check_env(env)
        generator = as_generator(generator, env.device, "evaluation")
        infer = inferring(self.policy.belief, exploration)
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
        """What stands in the context of :meth:`belief_path`."""
        return self.spec

    def belief_path(
        self, env: TaskVectorEnv, *, greedy: bool = True, generator: Seed = None
    ) -> tuple[BeliefPath, Rollout]:
        """The beliefs on the way through one trial in each environment, and the rollout that they are of.

        Their program is an :class:`~bayesmeta.rl.latent.undecoded.Undecoded`.

        Args:
            env: of held-out tasks. It is reset.
            greedy: take the likeliest actions, else draw.
            generator: of latents and actions; None means seed 0.

        Raises:
            UnsupportedError: for ``posterior="mixture"``.
        """
        belief = self.policy.belief
        if not isinstance(belief, LatentContext):
            raise UnsupportedError(
                "The belief is a mixture of the training tasks' Gaussians, and a BeliefPath holds one Gaussian a "
                "task. Ask belief_weights(env) for the weights of the training tasks, policy.belief.beliefs(context) "
                "for the mixtures, or train with posterior='gaussian'."
            )
        rollout = self.evaluate(env, greedy=greedy, generator=generator)
        program = Undecoded(
            "DistilledLatents learns none; take VariBAD, or PEARL with reconstruction='reward' (--reconstruction)."
        )
        return BeliefPath.of(belief, self.spec.of_rollout(rollout), program), rollout

    def belief_weights(
        self, env: TaskVectorEnv, *, greedy: bool = True, generator: Seed = None
    ) -> tuple[Tensor, Rollout]:
        """Weights of the training tasks on the way through one trial in each environment, and the rollout.

        Args:
            env: of held-out tasks. It is reset.
            greedy: take the likeliest actions, else draw.
            generator: of latents and actions; None means seed 0.

        Returns:
            Weights after 0, 1, …, N steps, ``[N + 1, environments, training tasks]``, and the rollout.

        Raises:
            UnsupportedError: for ``posterior="gaussian"``, which has none; see :meth:`belief_path`.
        """
        belief = self.policy.belief
        if not isinstance(belief, MixtureContext):
            raise UnsupportedError("This belief is one Gaussian and has no weights of tasks; ask belief_path(env).")
        rollout = self.evaluate(env, greedy=greedy, generator=generator)
        return belief.weights(self.spec.of_rollout(rollout)), rollout

    # -- going on later -------------------------------------------------------------------------------------------

    def options(self) -> dict[str, Any]:
        """The options that change what it learns, as plain values."""
        return {
            "learner": type(self).__name__, **self.policy.belief.options(), **self.config.plain(),
            "iterations": self.iterations, "seed": self.seed,
        }  # fmt: skip

    def _more_state(self) -> dict[str, Any]:
        return {"distiller": copied(self.distiller.state_dict()), "chains": self.chains.state_dict()}

    def _load_more(self, state: Mapping[str, Any]) -> None:
        self.distiller.load_state_dict(copied(state["distiller"]))
        self.chains.load_state_dict(state["chains"], self.env.device)


def _fixed_length(env: TaskVectorEnv) -> int:
    """Steps of every episode.

    Raises:
        HorizonError: when they are not known, or may differ.
    """
    horizon = horizon_of(env, "beliefs are learned from whole episodes")
    if not getattr(getattr(env, "family", None), "fixed_length", False):
        raise HorizonError(
            "DistilledLatents learns beliefs from the whole episodes of a trial, which must be of one length; those of "
            "this environment may end early. Take PEARL, or a family with fixed_length."
        )
    return horizon
