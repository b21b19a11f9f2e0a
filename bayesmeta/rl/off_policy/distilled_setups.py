"""Settings of distilled latents by family of environments, as benchmarks and the command line take them.

Those of the sparse point robot were chosen on its validation goals (``python -m benchmarks.sparse_point_robot``); the
general ones are a start and were not tuned.
"""

from __future__ import annotations

from typing import Any

from bayesmeta.rl.latent.contexts import ContextSpec
from bayesmeta.rl.off_policy.distilled import DistilledLatents
from bayesmeta.rl.off_policy.distilled_config import DistilledConfig, Form
from bayesmeta.rl.off_policy.sac import SACConfig


def distilled_for(
    env: Any,
    *,
    iterations: int,
    seed: int = 0,
    units: int = 64,
    posterior: Form = "mixture",
    reward_shift: float = 0.0,
    reward_scale: float = 1.0,
) -> DistilledLatents:
    """The learner with the settings of an environment's family.

    Args:
        env: of training tasks, which stay, of a family (:class:`~bayesmeta.rl.envs.TensorVectorEnv`).
        iterations: to train for. In the first quarter the encoder learns nothing.
        seed: of first weights, latents, actions and batches.
        units: width of the hidden layers of actor and critics.
        posterior: form of the belief.
        reward_shift, reward_scale: of contexts, for families without settings of their own.
    """
    hidden, warmup = (units, units), iterations // 4
    if env.family.name == "sparse_point_robot":
        sac = SACConfig(gamma=0.9, polyak=0.01, lr=1e-3, temperature=0.3, reward_scale=5.0, hidden=hidden)
        config = DistilledConfig(
            sac=sac, posterior=posterior, scale=0.3, kl_weight=0.003, train_reward="dense_reward", warmup=warmup
        )
        # the reward is of the place that a step led to
        spec = ContextSpec.of(env, inputs=("successor",))
    else:
        config = DistilledConfig(
            sac=SACConfig(lr=1e-3, hidden=hidden, reward_scale=1 / reward_scale), posterior=posterior, warmup=warmup
        )
        inputs = ("state", "action", "successor")
        spec = ContextSpec.of(env, inputs=inputs, reward_shift=reward_shift, reward_scale=reward_scale)
    return DistilledLatents(env, config, iterations=iterations, spec=spec, seed=seed)
