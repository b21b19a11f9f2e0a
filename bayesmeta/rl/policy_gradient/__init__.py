"""Policy gradients: objectives, returns, PPO, TRPO, inner gradient steps and MAML-RL."""
