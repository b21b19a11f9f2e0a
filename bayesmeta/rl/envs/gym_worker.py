"""What happens on the other side of a vector environment: one gymnasium environment, possibly in a process of its own.

It takes another task, goes back to a state by repeating what was done since its trial began, and says which task an
error belongs to.
"""

from __future__ import annotations

import math
import os
import sysconfig
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium
import numpy as np

#: Under this name, orders by row stand among the options of a reset.
ORDERS = "bayesmeta orders"


class Order(NamedTuple):
    """What a reset asks of one environment.

    Attributes:
        task: to be taken from now on, in a tuple of one; None keeps the task.
        moves: actions to be repeated behind the reset, ``[steps, …]``; None for none.
    """

    task: tuple[Any] | None = None
    moves: np.ndarray | None = None


class Guarded(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose errors say which task it belongs to, and which refuses rewards that are not finite.

    Args:
        make: a function from a task to an environment.
        task: its first task.
        index: of the task among the tasks.
        row: of the environment among all environments.
        set_task: gives an environment another task; None makes a new environment.
    """

    def __init__(
        self,
        make: Callable[[Any], gymnasium.Env[Any, Any]],
        task: Any,
        index: int,
        row: int,
        set_task: Callable[[Any, Any], None] | None = None,
    ) -> None:
        super().__init__(make(task))
        self.make, self.set_task, self.task_index, self.row = make, set_task, index, row

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset, after another task has been taken if there is one, and repeat moves; an error names the task."""
        orders = (options or {}).get(ORDERS)
        if orders is None:
            return self._call("reset", lambda: self.env.reset(seed=seed, options=options))
        order: Order = orders.get(self.row, Order())
        if order.task is not None:
            task = order.task[0]
            self._call("taking another task", lambda: self._take(task))
        found = self._call("reset", lambda: self.env.reset(seed=seed))
        return found if order.moves is None else self._repeat(found, order.moves)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step; an error names the task. Infos are dropped: nobody reads them, and to gather them takes its time."""
        result = self._call("step", lambda: self.env.step(action))
        if not math.isfinite(float(result[1])):
            raise RuntimeError(f"the environment of task {self.task_index} returned the reward {float(result[1])}")
        return *result[:4], {}

    def _take(self, task: Any) -> None:
        if self.set_task is not None:
            self.set_task(self.env, task)
            return
        fresh, old = self.make(task), self.env
        for what in ("observation_space", "action_space"):
            if getattr(fresh, what) != getattr(old, what):
                raise ValueError(
                    f"the new task has the {what} {getattr(fresh, what)}, the others have {getattr(old, what)}"
                )
        self.env = fresh
        old.close()

    def _repeat(self, found: tuple[Any, dict[str, Any]], moves: np.ndarray) -> tuple[Any, dict[str, Any]]:
        for move in moves:
            seen, _, ended, cut, info = self.step(move)
            # the seed of a trial's begin decides all of its episodes
            found = self._call("reset", self.env.reset) if ended or cut else (seen, info)
        return found

    def _call(self, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            told = f"{type(error).__name__}: {error}{place(error)}"
            raise RuntimeError(f"the environment of task {self.task_index} failed in {what}: {told}") from error


def place(error: BaseException) -> str:
    """Where an error was raised, as `` (file, line n, in function)``: the innermost frame of the user's own code.

    Frames of Python, of installed packages and of this one count only where there are no others; what raised the error
    may lie deep in NumPy, and what is to be mended does not.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    paths = sysconfig.get_paths()
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    others = tuple(os.path.join(path, "") for path in (paths["stdlib"], paths["purelib"], paths["platlib"], package))
    own = [frame for frame in frames if not frame.filename.startswith((*others, "<frozen"))] or frames
    return f" ({own[-1].filename}, line {own[-1].lineno}, in {own[-1].name})" if own else ""
