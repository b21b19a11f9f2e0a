"""Any ordinary gymnasium environments as tasks: a function from a task to an environment, behind the same interface.

The environments run one after the other (gymnasium's ``SyncVectorEnv``) or in processes of their own
(``AsyncVectorEnv``). An error in one is reported with its task. Their states cannot be saved. But what they do follows
from task, seed and actions, so a state has those since each trial began, and is gone back to by repeating them.
"""

from __future__ import annotations

import multiprocessing.connection
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch import Tensor

from bayesmeta.errors import CheckpointError, EnvCrashError, EnvError, HorizonError, OptionError, ShapeError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.rl.envs.family import check_at_least, check_split
from bayesmeta.rl.envs.gym_family import GymFamily, as_list, check_alike, made, packed, unpacked
from bayesmeta.rl.envs.gym_worker import ORDERS, Guarded, Order

TaskT = TypeVar("TaskT")
_ECHO = r"(?s).*(Received the following error from Worker|Traceback|Raising the last exception)"
_MARK = re.compile(r"environment of task (\d+)\b")


class GymVectorEnv(Generic[TaskT]):
    """Ordinary gymnasium environments, one task after the other, with the interface of a tensor environment.

    A trial begins with a reset under a seed from the generator; the episodes behind it go on with the environment's
    own randomness. Actions outside of a bounded ``Box`` are clipped to it.

    Args:
        make: a function from a task to an environment.
        tasks: the tasks.
        copies: environments of each task.
        workers: each environment in a process of its own.
        horizon: steps after which an episode ends at the latest; None asks the environments' specification.
        episodes_per_trial: episodes that share a task before a trial ends.
        generator: a seed, or a generator on the CPU, for the environments' seeds and new tasks.
        device: where the tensors live.
        dtype: of floating tensors.
        family: that they belong to; see :class:`~bayesmeta.rl.envs.gym_family.GymFamily`.
        new_tasks: draw new tasks of the family whenever a trial ends; else they stay what they are.
        split: which of the family's tasks are drawn.
        set_task: a function ``(environment, task)`` that gives an environment another task; None makes a new one.
        replays: whether a state is gone back to by repeating the actions of the running trials, for which the same
            seed and actions must lead to the same states. Without it, what follows on a loaded state are new trials.

    Raises:
        OptionError: without tasks, for numbers below 1, new tasks without a family or for several copies of each.
        SpaceError: if spaces are neither ``Discrete`` (of actions 0, 1, …) nor ``Box``, or differ between tasks.
        HorizonError: if environments have different horizons.
        EnvCrashError: if one cannot be made.
    """

    def __init__(
        self,
        make: Callable[[TaskT], gymnasium.Env[Any, Any]],
        tasks: Sequence[TaskT],
        *,
        copies: int = 1,
        workers: bool = False,
        horizon: int | None = None,
        episodes_per_trial: int = 1,
        generator: Seed = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        family: GymFamily[TaskT] | None = None,
        new_tasks: bool = False,
        split: str = "train",
        set_task: Callable[[Any, TaskT], None] | None = None,
        replays: bool = True,
    ) -> None:
        check_at_least(1, copies=copies, episodes_per_trial=episodes_per_trial)
        check_split(split)
        if not len(tasks):
            raise OptionError("no tasks were given; give at least one.")
        if new_tasks and (family is None or copies > 1):
            raise OptionError(
                f"new_tasks=True with {'no family' if family is None else f'copies={copies}'}; make such environments "
                "by GymFamily(…).vector(tasks, new_tasks=True), with one copy of each task."
            )
        self.family, self.new_tasks, self.split, self.replays = family, new_tasks, split, replays
        self.tasks: list[TaskT] = as_list(tasks)
        self.num_tasks, self.copies, self.num_envs = len(tasks), copies, len(tasks) * copies
        self.episodes_per_trial, self.device, self.dtype = episodes_per_trial, torch.device(device), dtype
        self.generator = as_generator(generator, "cpu", f"environments {split}")
        found = check_alike([made(make, task, index) for index, task in enumerate(self.tasks)], horizon)
        self.horizon = found if horizon is None else horizon
        self._envs = self._vector(make, set_task, workers)
        self.single_observation_space = self._envs.single_observation_space
        self.single_action_space = self._envs.single_action_space
        self.observation_space, self.action_space = self._envs.observation_space, self._envs.action_space
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}
        self._discrete = isinstance(self.single_action_space, gymnasium.spaces.Discrete)
        self._clock = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        self._episode = torch.zeros_like(self._clock)
        self._ready = False
        self._changed = self._tell = False  # tasks other than those made with; such as the environments do not know yet
        self._seen = np.zeros(0)  # what the environments showed last
        self._seeds = [0] * self.num_envs  # of the running trials
        self._moves: list[np.ndarray] = []  # since the oldest running trial began
        self._since = np.zeros(self.num_envs, dtype=np.int64)  # where among them each trial began

    def _vector(
        self, make: Callable[[TaskT], Any], set_task: Callable[[Any, TaskT], None] | None, workers: bool
    ) -> SyncVectorEnv | AsyncVectorEnv:
        tasks, copies = list(self.tasks), self.copies  # what is sent to a worker cannot take this object with it
        makers = [
            lambda row=row: Guarded(make, tasks[row // copies], row // copies, row, set_task)
            for row in range(self.num_envs)
        ]
        # resets are ours, so that a trial begins under a seed that is known
        return (AsyncVectorEnv if workers else SyncVectorEnv)(makers, autoreset_mode=AutoresetMode.DISABLED)

    @property
    def restores_state(self) -> bool:
        """Whether a loaded state goes on in the middle of a trial."""
        return self.replays

    @property
    def clock(self) -> Tensor:
        """Steps taken in the running episode, ``[num_envs]`` int64."""
        return self._clock.clone()

    @property
    def episode(self) -> Tensor:
        """Which episode of its trial is running, from 0, ``[num_envs]`` int64."""
        return self._episode.clone()

    # -- trials -------------------------------------------------------------------------------------------------------

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Begin a new trial everywhere, under new seeds from the generator.

        Args:
            seed: of everything random from now on; None goes on with the generator.
            options: ``tasks`` for this trial and, without ``new_tasks``, later ones.

        Raises:
            OptionError: for other options.
            ShapeError: for another number of tasks.
            EnvCrashError: if an environment fails, or one of another task has other spaces.
        """
        options = dict(options or {})
        tasks = options.pop("tasks", None)
        if options:
            raise OptionError(
                f"unknown options of reset: {', '.join(options)}; expected tasks. Each environment resets itself when "
                "its episode ends."
            )
        if seed is not None:
            self.generator = as_generator(seed, "cpu", f"environments {self.split}")
        if tasks is None and self.new_tasks:
            tasks = self._draw(self.num_tasks)
        elif tasks is None and self._tell:
            tasks = self.tasks
        if tasks is not None and len(tasks) != self.num_tasks:
            raise ShapeError(f"{len(tasks)} tasks were given to environments of {self.num_tasks}; give as many.")
        self._moves.clear()
        self._seen = self._begin(np.arange(self.num_envs), None if tasks is None else as_list(tasks))
        self._clock, self._episode = torch.zeros_like(self._clock), torch.zeros_like(self._episode)
        self._ready, self._tell = True, False
        return self._observation(self._seen), {}

    def _draw(self, number: int) -> list[TaskT]:
        assert self.family is not None
        return self.family.sample_tasks(number, generator=self.generator, split=self.split)

    def _begin(self, rows: np.ndarray, tasks: list[TaskT] | None) -> Any:
        """Begin trials in some environments; ``tasks`` are those of the tasks that the rows belong to."""
        orders = {}
        if tasks is not None:
            indices = sorted({int(row) // self.copies for row in rows})
            for index, task in zip(indices, tasks, strict=True):
                self.tasks[index] = task
            orders = {int(row): Order(task=(self.tasks[int(row) // self.copies],)) for row in rows}
            self._changed = True
        seeds = torch.randint(2**31 - 1, (len(rows),), generator=self.generator).tolist()
        for row, seed in zip(rows, seeds):
            self._seeds[row] = seed
        self._since[rows] = len(self._moves)
        return self._reset(rows, orders, {int(row): seed for row, seed in zip(rows, seeds)})

    def _reset(self, rows: np.ndarray, orders: dict[int, Order], seeds: dict[int, int]) -> Any:
        """Reset some environments; what all of them show."""
        mask = np.zeros(self.num_envs, dtype=np.bool_)
        mask[rows] = True
        seed = [seeds.get(row) for row in range(self.num_envs)]
        options: dict[str, Any] = {ORDERS: orders}
        options |= {} if mask.all() else {"reset_mask": mask}
        return self._guarded(lambda: self._envs.reset(seed=seed, options=options))[0]

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """One step of every environment; see :mod:`bayesmeta.rl.protocols`. Infos of the environments are left out.

        Raises:
            EnvError: before the first reset.
            ShapeError: for actions of another shape or kind.
            EnvCrashError: if an environment fails, or returns a reward that is not finite. All are closed then.
            HorizonError: if an episode goes on behind the horizon.
        """
        if not self._ready:
            raise EnvError("the environments have no state yet; call reset() first.")
        self._check(actions)
        moves = self._as_moves(actions)
        seen, rewards, ended, cut, _ = self._guarded(lambda: self._envs.step(moves))
        if self.replays:
            self._moves.append(moves)
        terminated, truncated = (torch.as_tensor(flags, device=self.device) for flags in (ended, cut))
        truncated = truncated & ~terminated
        over = terminated | truncated
        final = self._observation(seen)
        last = over & (self._episode + 1 == self.episodes_per_trial)
        self._clock = torch.where(over, 0, self._clock + 1)
        self._check_time()
        self._episode = torch.where(last, 0, self._episode + over)
        self._seen = self._restart(over.cpu().numpy(), last.cpu().numpy(), seen)
        info = {"final_obs": final, "trial_ended": last}
        reward = torch.as_tensor(rewards, device=self.device).to(self.dtype)
        return self._observation(self._seen), reward, terminated, truncated, info

    def _as_moves(self, actions: Tensor) -> np.ndarray:
        moves = actions.detach().cpu().numpy()
        space = self.single_action_space
        if isinstance(space, gymnasium.spaces.Box):
            return np.clip(moves, space.low, space.high).astype(space.dtype)
        return moves.copy()

    def _restart(self, over: np.ndarray, last: np.ndarray, seen: Any) -> Any:
        """Begin the next episodes where one has ended, and new trials behind the last."""
        within = over & ~last
        if within.any():
            seen = self._reset(within.nonzero()[0], {}, {})
        if last.any():
            rows = last.nonzero()[0]
            seen = self._begin(rows, self._draw(len(rows)) if self.new_tasks else None)
            begun = int(self._since.min())
            del self._moves[:begun]
            self._since -= begun
        return seen

    def _check_time(self) -> None:
        if self.horizon is not None and bool((self._clock >= self.horizon).any()):
            row = int((self._clock >= self.horizon).nonzero()[0])
            self.close()
            self._ready = False
            raise HorizonError(
                f"the episode of task {row // self.copies} goes on behind the horizon of {self.horizon} steps. Give "
                "the right horizon=, or end episodes by gymnasium.wrappers.TimeLimit."
            )

    def _check(self, actions: Tensor) -> None:
        shape = torch.Size((self.num_envs, *(self.single_action_space.shape or ())))
        if not isinstance(actions, Tensor) or actions.shape != shape or actions.is_floating_point() == self._discrete:
            kind = "integers" if self._discrete else "floating numbers"
            given = (
                f"{list(actions.shape)} of {actions.dtype}" if isinstance(actions, Tensor) else type(actions).__name__
            )
            raise ShapeError(f"actions {given} were given; expected a tensor {list(shape)} of {kind}.")

    def _observation(self, value: Any) -> Tensor:
        tensor = torch.as_tensor(np.array(value), device=self.device)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def pictures(self) -> list[np.ndarray]:
        """What the first environment of each task looks like, ``[height, width, 3]`` uint8 each.

        Raises:
            EnvError: if they were made without ``render_mode="rgb_array"``, or drawing needs a package that is missing.
        """
        if self._envs.render_mode != "rgb_array":
            raise EnvError(
                f"the environments have no picture: their render_mode is {self._envs.render_mode!r}. Make them with "
                '"rgb_array": GymFamily(…).vector(…, render_mode="rgb_array"), whose make takes a render_mode.'
            )
        try:
            return list(self._guarded(lambda: self._envs.call("render"))[:: self.copies])
        except gymnasium.error.DependencyNotInstalled as error:
            raise EnvError(f"the environments cannot be drawn: {error}. Install it, or ask for no pictures.") from error

    # -- failures -----------------------------------------------------------------------------------------------------

    def _guarded(self, call: Callable[[], Any]) -> Any:
        """A call whose failure closes everything and says which task it was."""
        try:
            if isinstance(self._envs, SyncVectorEnv):
                return call()
            with warnings.catch_warnings():
                # gymnasium repeats a worker's error as warnings before it raises it.
                warnings.filterwarnings("ignore", message=_ECHO)
                return call()
        except gymnasium.error.DependencyNotInstalled:  # of a picture; the worker that told it has ended too
            self._ready = False
            self._kill()
            raise
        except Exception as error:
            found = _MARK.search(str(error))
            task = int(found.group(1)) if found else self._dead_task()
            self._ready = False
            self._kill()
            if task is None:
                raise
            reason = str(error) if found else f"the process of the environment of task {task} died"
            raise EnvCrashError(
                f"{reason}. Task {task} is {self.tasks[task]!r}. The environments are closed; what was saved before "
                "stays as it is.",
                task,
            ) from error

    def _dead_task(self) -> int | None:
        """The task whose process has ended; None if none has."""
        if not isinstance(self._envs, AsyncVectorEnv):
            return None
        processes = self._envs.processes
        ended = multiprocessing.connection.wait([process.sentinel for process in processes], timeout=1.0)
        rows = [index for index, process in enumerate(processes) if process.sentinel in ended]
        return rows[0] // self.copies if rows else None

    def close(self) -> None:
        """Close the environments."""
        if not self._envs.closed:
            self._envs.close()

    def _kill(self) -> None:
        """Close them without waiting for an answer that may never come."""
        if isinstance(self._envs, AsyncVectorEnv) and not self._envs.closed:
            for process in self._envs.processes:
                process.terminate()
                process.join()
            for pipe in self._envs.parent_pipes:
                if pipe is not None:
                    pipe.close()
            self._envs.closed = True
        self.close()

    # -- going on later -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The generator of seeds and tasks and, of the running trials, tasks, seeds and actions: tensors and plain
        values.

        Raises:
            OptionError: for tasks that were drawn or set and that a checkpoint cannot hold.
        """
        going = self._ready and self.replays
        shape = self.num_envs, *(self.single_action_space.shape or ())
        moves = np.array(self._moves, dtype=self.single_action_space.dtype).reshape(-1, *shape)
        return {
            "config": self._config(),
            "generator": self.generator.get_state(),
            "tasks": [packed(task) for task in self.tasks] if self._changed else None,
            "seeds": list(self._seeds) if going else None,
            "moves": torch.from_numpy(moves) if going else None,
            "since": self._since.tolist(),
            "clock": self._clock.clone(),
            "episode": self._episode.clone(),
            "seen": self._observation(self._seen) if going else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: bit for bit by repeating the actions of the running trials, or with new trials.

        Raises:
            CheckpointError: if it belongs to other environments, or they do not come back to the state.
            EnvCrashError: if an environment fails.
        """
        if state["config"] != self._config():
            raise CheckpointError(
                f"the state belongs to environments {state['config']}; these are {self._config()}. Make them the same."
            )
        self.generator.set_state(state["generator"].cpu())
        self._ready = False
        self._tell = state["tasks"] is not None
        if self._tell:
            self.tasks, self._changed = [unpacked(task) for task in state["tasks"]], True
        if state["seeds"] is not None and self.replays:
            self._replay(state)

    def _config(self) -> dict[str, Any]:
        return {
            **({} if self.family is None else self.family.config()), "horizon": self.horizon,
            "num_tasks": self.num_tasks, "copies": self.copies, "new_tasks": self.new_tasks,
            "episodes_per_trial": self.episodes_per_trial, "split": self.split, "dtype": str(self.dtype),
        }  # fmt: skip

    def _replay(self, state: Mapping[str, Any]) -> None:
        moves, since = state["moves"].numpy(), np.array(state["since"], dtype=np.int64)
        orders = {
            row: Order((self.tasks[row // self.copies],) if self._changed else None, moves[since[row] :, row])
            for row in range(self.num_envs)
        }
        seeds = dict(enumerate(state["seeds"]))
        seen = self._reset(np.arange(self.num_envs), orders, seeds)
        if not torch.equal(self._observation(seen), state["seen"].to(self.device)):
            raise CheckpointError(
                "the environments did not come back to the state: the same tasks, seeds and actions led elsewhere. "
                "Make them the same and reproducible, or take replays=False to go on with new trials."
            )
        self._seen, self._seeds, self._moves, self._since = seen, list(state["seeds"]), list(moves), since
        self._clock, self._episode = (state[name].to(self.device, copy=True) for name in ("clock", "episode"))
        self._ready, self._tell = True, False
