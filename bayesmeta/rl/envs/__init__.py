"""Families of environments: each steps thousands of environments as tensors, and is a plain gymnasium environment
too.
"""

from bayesmeta.ops.rooms import attributes
from bayesmeta.rl.envs.bandits import BernoulliBandit, GaussianBandit
from bayesmeta.rl.envs.beam import BeamSteering
from bayesmeta.rl.envs.family import Family
from bayesmeta.rl.envs.grid import Grid
from bayesmeta.rl.envs.machines import Machines
from bayesmeta.rl.envs.maze import Maze
from bayesmeta.rl.envs.points import Navigation, SparsePointRobot
from bayesmeta.rl.envs.tabular import TabularMDP
from bayesmeta.rl.envs.vector import TensorVectorEnv

__all__ = [
    "BeamSteering",
    "BernoulliBandit",
    "Family",
    "GaussianBandit",
    "Grid",
    "Machines",
    "Maze",
    "Navigation",
    "SparsePointRobot",
    "TabularMDP",
    "TensorVectorEnv",
]

__getattr__, __dir__ = attributes(__name__)
