"""A Markov decision process small enough to enumerate: two states, two actions, three steps, 32 trajectories."""

import itertools
from types import SimpleNamespace

import torch

#: P(s' | s, a) of s' = 1, and the reward of (s, a, s')
TO_ONE = torch.tensor([[0.2, 0.7], [0.4, 0.9]], dtype=torch.float64)
REWARD = torch.tensor([[[1.0, -0.5], [0.3, 2.0]], [[-1.0, 0.7], [0.1, 1.5]]], dtype=torch.float64)
HORIZON = 3


def log_policy(phi):
    """log π(a | s) of logits φ ``[…, 4]``, as ``[…, 2, 2]``."""
    return phi.unflatten(-1, (2, 2)).log_softmax(-1)


def trajectories():
    """All of them: states and actions ``[time, 32]``, rewards, and the log density of the transitions ``[32]``."""
    rows = []
    for actions in itertools.product((0, 1), repeat=HORIZON):
        for after in itertools.product((0, 1), repeat=HORIZON - 1):
            states, chance, rewards = [0, *after], 1.0, []
            for t in range(HORIZON):
                s, a = states[t], actions[t]
                # the state after the last step does not matter: its reward is the mean over both
                if t + 1 < HORIZON:
                    to = states[t + 1]
                    chance *= TO_ONE[s, a].item() if to else 1 - TO_ONE[s, a].item()
                    rewards.append(REWARD[s, a, to].item())
                else:
                    one = TO_ONE[s, a].item()
                    rewards.append(one * REWARD[s, a, 1].item() + (1 - one) * REWARD[s, a, 0].item())
            rows.append((states, actions, rewards, chance))
    columns = [torch.tensor([row[i] for row in rows]).T for i in range(2)]
    rewards = torch.tensor([row[2] for row in rows], dtype=torch.float64).T
    chances = torch.tensor([row[3] for row in rows], dtype=torch.float64)
    ended = torch.zeros(HORIZON, len(rows), dtype=torch.bool)
    ended[-1] = True
    return SimpleNamespace(states=columns[0], actions=columns[1], rewards=rewards, chance=chances, ended=ended)


ALL = trajectories()


def log_prob(phi, case=ALL):
    """log π(a_t | s_t) of every step, ``[time, 32]``."""
    return log_policy(phi)[case.states, case.actions]


def probability(phi):
    """p_φ(τ) of every trajectory, ``[32]``, differentiable."""
    return ALL.chance * log_prob(phi).sum(0).exp()


def expected_return(phi, gamma=1.0):
    """J(φ), exact and differentiable to any order."""
    discount = gamma ** torch.arange(HORIZON, dtype=torch.float64).unsqueeze(-1)
    return (probability(phi) * (discount * ALL.rewards).sum(0)).sum()


def gradient(function, at, create_graph=False):
    at = at if at.requires_grad else at.detach().requires_grad_()
    return torch.autograd.grad(function(at), at, create_graph=create_graph)[0]


def jacobian(function, at):
    return torch.autograd.functional.jacobian(function, at)


PHI = torch.tensor([0.3, -0.4, 0.9, 0.1], dtype=torch.float64)
