"""From the folder of ``bayesmeta rl train`` back to the learner, to ask it whatever Python can ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from bayesmeta.rl.plan import read_setup
from bayesmeta.rl.runs import load_learner
from bayesmeta.rl.setups import Setup
from bayesmeta.train import checkpoint
from bayesmeta.train.fit import pick_device


class OpenedRun(NamedTuple):
    """A run of ``bayesmeta rl train``, to act and not to go on training.

    Attributes:
        learner: made as the run made it, with what it has learned.
        setup: the settings that the run began with.
        family: of its environments.
        iterations: done when its last checkpoint was written.
        device: where the learner is.
    """

    learner: Any
    setup: Setup
    family: Any
    iterations: int
    device: Any

    def held_out(self, tasks: int = 100, *, split: str = "test", seed: int = 0, **options: Any) -> Any:
        """Environments of tasks that were not trained on: a trial in each, or copies for methods that take steps.

        Args:
            tasks: how many.
            split: ``"test"`` or ``"validation"``.
            seed: of the tasks and of what is random in them.
            options: of the family's ``vector``, such as ``render_mode="rgb_array"`` for gymnasium's.
        """
        return self.setup.held_out(self.family, tasks, split=split, seed=seed, device=self.device, **options)


def open_run(folder: str | Path, *, device: str = "auto") -> OpenedRun:
    """The learner of a run of ``bayesmeta rl train``, with what it has learned.

    What :func:`bayesmeta.rl.fit` left of a learner of one's own making has no settings to make it again: see
    :func:`bayesmeta.rl.load_learner`.

    Args:
        folder: the ``--out`` of the command.
        device: ``"auto"``, or a torch device.

    Raises:
        CheckpointError: for a folder without such a run, or with a checkpoint that is missing or damaged.
        OptionError: for a device that is none, and an environment of one's own that is not found any more.
    """
    folder = Path(folder)
    setup, place = read_setup(folder), pick_device(device)
    family = setup.family()
    learner = load_learner(folder, setup.learner(family, place))
    return OpenedRun(learner, setup, family, int(checkpoint.load(folder / checkpoint.LAST)["step"]), place)
