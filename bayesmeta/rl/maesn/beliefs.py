"""What MAESN believes of tasks: their Gaussians over z, as beliefs like those of learners with an encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from bayesmeta.data import Observations
from bayesmeta.errors import OptionError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.ops.whole import is_whole
from bayesmeta.rl.latent.beliefs import BeliefPath
from bayesmeta.rl.latent.undecoded import Undecoded
from bayesmeta.rl.maesn.inner import split_phi
from bayesmeta.rl.maesn.policy import latent_distribution, prior_omega
from bayesmeta.rl.policy_gradient.inner import check_tasks_stay
from bayesmeta.rl.protocols import TaskVectorEnv

if TYPE_CHECKING:
    from bayesmeta.rl.maesn.learner import MAESN

_WHY = "MAESN's latents are read by the policy alone"


def task_gaussians(
    learner: MAESN, env: TaskVectorEnv | None = None, *, inner_steps: int | None = None, generator: Seed = None
) -> BeliefPath:
    """q_ω(z) = Normal(μ, σ) of each task: of the training tasks as learned, or of new ones after the inner steps.

    The result has one step, as ω is no function of a context that grows: ``.at(0)`` is the posterior over z,
    ``.to_datatree()`` the DataTree, ``.kl()`` and ``.contraction()`` say what was learned. Without a decoder, what is
    asked of one raises ``UnsupportedError``.

    Args:
        learner: whose ``omega`` has (μ, log σ) of its training tasks, in the order of ``learner.tasks``.
        env: of new tasks, each of which begins at the prior and takes inner steps on the environment's own reward; a
            step reads one episode in each copy, and the environment is reset. None is the training tasks.
        inner_steps: how many, of 0 (the prior) on; None is as trained, and further ones are at ``later_rates`` of the
            one before.
        generator: of latents and actions; None means seed 0.

    Returns:
        Beliefs of shape ``[1, tasks, latent]``.

    Raises:
        OptionError: for environments that draw new tasks, inner steps that are no whole number of at least 0, and
            inner steps of the training tasks, which take none.
    """
    if inner_steps is not None and not is_whole(inner_steps, 0):
        raise OptionError(f"inner_steps must be a whole number of at least 0, or None; got {inner_steps!r}.")
    if inner_steps is not None and env is None:
        raise OptionError(
            f"inner_steps={inner_steps} are those of new tasks; give their environments by env, or leave inner_steps "
            "out for the training tasks as they were learned."
        )
    omega = learner.omega if env is None else _adapted(learner, env, inner_steps, generator)
    normal = latent_distribution(omega).base_dist
    nothing = Observations(omega.new_zeros(len(omega), 0, 1), omega.new_zeros(len(omega), 0))
    return BeliefPath(Undecoded(_WHY), nothing, normal.loc[None], normal.scale[None])


def _adapted(learner: MAESN, env: TaskVectorEnv, inner_steps: int | None, generator: Seed) -> Tensor:
    """ω of the tasks of ``env`` after inner steps from the prior, ``[tasks, 2 × latent]``."""
    check_tasks_stay(env)
    random = as_generator(generator, env.device, "evaluation")
    phi = learner.begin(learner.theta, prior_omega(env.num_tasks, learner.policy.latent, learner.theta)).detach()
    config = learner.config
    for k in range(config.inner_steps if inner_steps is None else inner_steps):
        share = config.later_rates ** max(0, k + 1 - config.inner_steps)
        episodes = learner.episodes(env, phi, random, inner=True)
        phi = learner.step(learner.theta, phi, episodes, create_graph=False, share=share)
    return split_phi(phi, learner.parts(learner.theta)[0], learner.policy.latent)[0]
