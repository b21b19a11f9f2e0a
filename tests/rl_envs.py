"""Small vector environments whose every number is known."""

import gymnasium
import torch


class Counting:
    """Two tasks × three copies; episodes of 2 steps, the first of a trial terminal and the second cut; trials of two.

    The observation is 100 × task + 10 × copy + the steps since the first reset; the reward is the action plus 1000 ×
    the number of the trial. Everything is a function of the steps taken, so that rows can be written down.
    """

    num_tasks, copies, num_envs, horizon, episodes_per_trial = 2, 3, 6, 2, 2
    single_observation_space = gymnasium.spaces.Box(-1e9, 1e9, (1,))
    single_action_space = gymnasium.spaces.Discrete(5)
    device = torch.device("cpu")
    dtype = torch.float64

    def __init__(self, bad_step=None):
        self.steps, self.bad_step = 0, bad_step

    @property
    def clock(self):
        return torch.full((6,), self.steps % 2)

    @property
    def episode(self):
        return torch.full((6,), self.steps // 2 % 2)

    def observation(self, steps):
        index = torch.arange(6)
        return (100 * (index // 3) + 10 * (index % 3) + steps).double().unsqueeze(-1)

    def reset(self, *, seed=None, options=None):
        self.steps, self.options = 0, options
        return self.observation(0), {}

    def step(self, actions):
        reward = actions.double() + 1000 * (self.steps // 4)
        if self.steps == self.bad_step:
            reward[4] = float("nan")
        self.steps += 1
        over, second = self.steps % 2 == 0, self.steps % 4 == 0
        full = torch.ones(6, dtype=torch.bool)
        info = {"final_obs": self.observation(self.steps - 0.5), "trial_ended": full & second, "success": full & over}
        return self.observation(self.steps), reward, full & (over and not second), full & second, info


class TwoStates:
    """The MDP of ``rl_truth`` as a vector environment: ``tasks × copies`` of it, three steps each, tasks alike."""

    single_observation_space = gymnasium.spaces.Discrete(2)
    single_action_space = gymnasium.spaces.Discrete(2)
    horizon, episodes_per_trial = 3, 1
    device = torch.device("cpu")
    dtype = torch.float64

    def __init__(self, num_tasks, copies, seed=0):
        self.num_tasks, self.copies, self.num_envs = num_tasks, copies, num_tasks * copies
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def clock(self):
        return torch.full((self.num_envs,), self.steps)

    @property
    def episode(self):
        return torch.zeros(self.num_envs, dtype=torch.long)

    def reset(self, *, seed=None, options=None):
        self.steps, self.state = 0, torch.zeros(self.num_envs, dtype=torch.long)
        return self.state, {}

    def step(self, actions):
        from rl_truth import REWARD, TO_ONE

        chance = TO_ONE[self.state, actions]
        after = (torch.rand(self.num_envs, generator=self.generator, dtype=torch.float64) < chance).long()
        reward = REWARD[self.state, actions, after]
        self.steps = (self.steps + 1) % 3
        over = torch.full((self.num_envs,), self.steps == 0)
        self.state = torch.where(over, 0, after)
        return self.state, reward, over, torch.zeros_like(over), {"final_obs": after, "trial_ended": over}
