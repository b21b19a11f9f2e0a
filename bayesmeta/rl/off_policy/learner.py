"""What off-policy learners share: environments whose tasks stay, a replay buffer for each, and how a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from bayesmeta.errors import NonFiniteLossError, OptionError
from bayesmeta.rl.off_policy.replay import Replay
from bayesmeta.rl.off_policy.sac import SACUpdate
from bayesmeta.rl.protocols import TaskVectorEnv
from bayesmeta.rl.states import copied, load_networks


class OffPolicyLearner:
    """Base: a learner whose state is networks, their updates, a replay buffer, a generator and the environments.

    One with more to its state adds it by :meth:`_more_state` and :meth:`_load_more`.

    Attributes:
        env: with a fixed task for each row of the buffer.
        policy: what is trained.
        updates: of the policy.
        replay: what was done, task by task.
        generator: of everything random but the environments.
        iteration: iterations done.
        history: one dict an iteration.
    """

    env: TaskVectorEnv
    policy: Any
    updates: SACUpdate
    replay: Replay
    generator: torch.Generator
    iteration: int
    history: list[dict[str, float]]

    def _more_state(self) -> dict[str, Any]:
        return {}

    def _load_more(self, state: Mapping[str, Any]) -> None:
        pass

    def state_dict(self, *, replay: bool = True) -> dict[str, Any]:
        """Everything that the rest of the run depends on, replay buffer and environments too.

        Args:
            replay: False leaves the replay buffer out.
        """
        return {
            "policy": {name: value.clone() for name, value in self.policy.state_dict().items()},
            "updates": copied(self.updates.state_dict()),
            **({"replay": self.replay.state_dict()} if replay else {}),
            "generator": self.generator.get_state(),
            "env": self.env.state_dict(),
            "iteration": self.iteration,
            "history": [dict(row) for row in self.history],
            **self._more_state(),
        }

    def remember(self) -> Callable[[], dict[str, Any]]:
        """As in :class:`~bayesmeta.rl.learner.Remembers`: the replay buffer is copied where the state is asked for."""
        state, earlier = self.state_dict(replay=False), self.replay.remember()
        return lambda: {**state, "replay": earlier()}

    def load_learned(self, state: Mapping[str, Any]) -> None:
        """Take the networks of a state alone, to act and not to go on training.

        Raises:
            CheckpointError: when they are of another shape.
        """
        load_networks(self.policy, state["policy"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, bit for bit.

        Raises:
            CheckpointError: when it belongs to networks of another shape, or to other environments.
        """
        self.load_learned(state)
        self.env.load_state_dict(state["env"])
        self.updates.load_state_dict(copied(state["updates"]))
        self.replay.load_state_dict(state["replay"])
        self.generator.set_state(state["generator"].cpu())
        self.iteration = state["iteration"]
        self.history = [dict(row) for row in state["history"]]
        self._load_more(state)


def check_fixed_tasks(env: TaskVectorEnv, who: str) -> None:
    """Refuse environments that draw new tasks: a row of the buffer is a task.

    Raises:
        OptionError: for such environments.
    """
    if getattr(env, "new_tasks", False):
        raise OptionError(
            f"{who} keeps a replay buffer for each task, and these environments draw new ones (new_tasks=True). Leave "
            "that out: num_tasks is the number of training tasks."
        )


@contextmanager
def put_back(policy: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Undo updates that were not finite: networks and optimizers are as before them when NonFiniteLossError leaves.

    Figures are looked at once for many updates, since each look waits for the device; by then one that is not a number
    is in all weights.

    Args:
        policy: what the updates change.
        optimizers: that change it.
    """
    optimizers = list(optimizers)
    weights, states = copied(policy.state_dict()), [copied(optimizer.state_dict()) for optimizer in optimizers]
    try:
        yield
    except NonFiniteLossError:
        policy.load_state_dict(weights)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        raise
