"""The families under their names in gymnasium's registry.

Importing this module registers them; nothing else does. gymnasium imports it for a name that begins with its path::

    env = gymnasium.make("bayesmeta.rl.envs.registered:bayesmeta/Navigation-v0", render_mode="rgb_array")
"""

import gymnasium

#: Entry points by name. Time limits are the environments' own.
ENVIRONMENTS = {
    "bayesmeta/BeamSteering-v0": "bayesmeta.rl.envs.beam:BeamSteeringEnv",
    "bayesmeta/BernoulliBandit-v0": "bayesmeta.rl.envs.bandits:BernoulliBanditEnv",
    "bayesmeta/GaussianBandit-v0": "bayesmeta.rl.envs.bandits:GaussianBanditEnv",
    "bayesmeta/Grid-v0": "bayesmeta.rl.envs.grid:GridEnv",
    "bayesmeta/Maze-v0": "bayesmeta.rl.envs.maze:MazeEnv",
    "bayesmeta/Navigation-v0": "bayesmeta.rl.envs.points:NavigationEnv",
    "bayesmeta/SparsePointRobot-v0": "bayesmeta.rl.envs.points:SparsePointRobotEnv",
    "bayesmeta/TabularMDP-v0": "bayesmeta.rl.envs.tabular:TabularMDPEnv",
}


def register() -> list[str]:
    """Register the families that are not registered yet; the names of all."""
    for name, entry_point in ENVIRONMENTS.items():
        if name not in gymnasium.registry:
            gymnasium.register(name, entry_point)
    return list(ENVIRONMENTS)


register()
