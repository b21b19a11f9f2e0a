"""Policy gradients: objectives, returns, PPO, TRPO, inner gradient steps and MAML-RL."""

from bayesmeta.ops.rooms import attributes

__getattr__, __dir__ = attributes(__name__)
