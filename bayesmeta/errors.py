"""Typed errors. Each says what was given, what was expected and what to do.

All derive from :class:`BayesMetaError`; those that are also bad values derive from :class:`ValueError` too, so
``except ValueError`` keeps working. The command line prints the message alone and exits with status 2.
"""


class BayesMetaError(Exception):
    """Base class of every error that bayesmeta raises on purpose."""


class DataError(BayesMetaError, ValueError):
    """The data given cannot be used as they are."""


class ShapeError(DataError):
    """A tensor has another shape, width or number of tasks than the model or method expects."""


class NonFiniteDataError(DataError):
    """NaN or infinity among the observations that count."""


class EmptyTaskError(DataError):
    """A task has neither support nor query, or fewer observations than were asked for."""


class ContextError(DataError):
    """A context of transitions is not of the family, the widths or the length that a latent context was made for."""


class DeviceMismatchError(DataError):
    """Tensors that must meet live on different devices or have different floating dtypes."""


class ModelError(BayesMetaError):
    """The Pyro program cannot be read as a task program."""


class PlateError(ModelError):
    """A sample site sits outside the plate it belongs to, or has dimensions that no plate declares."""


class SiteError(ModelError):
    """A sample site is duplicated, missing, discrete or has a support without a bijection."""


class LikelihoodError(ModelError):
    """The likelihood is missing, is outside the shot plate, or ignores the mask."""


class UnsupportedError(BayesMetaError):
    """A method cannot do what was asked of it with this model; the message says why and what can."""


class NoClosedFormError(UnsupportedError):
    """This posterior has no closed-form predictive; draw from it with ``predict`` instead."""


class OptionError(BayesMetaError, ValueError):
    """An option has a name or a value that is not known."""


class EnvError(BayesMetaError):
    """An environment, or what was given to one, cannot be used; the message says why."""


class SpaceError(EnvError, ValueError):
    """A space of observations or actions is of another kind than the algorithm needs, or differs between tasks."""


class HorizonError(EnvError, ValueError):
    """An environment has no fixed horizon where one is needed."""


class EnvCrashError(EnvError):
    """An environment crashed, or returned a reward that is not finite. What was saved before stays as it is.

    Attributes:
        task: index of the task whose environment it was.
    """

    def __init__(self, message: str, task: int) -> None:
        super().__init__(message)
        self.task = task

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.task)  # so that it comes back from a worker process


class NonFiniteLossError(BayesMetaError):
    """Training met a loss or gradient that is not finite. The last good checkpoint is kept.

    Attributes:
        step: the step, counted from 1, at which it happened.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        return type(self), (str(self), self.step)  # so that it comes back from a worker process


class DeviceMemoryError(BayesMetaError):
    """A device, or the machine, has too little memory for a step. The last good checkpoint is kept.

    Attributes:
        chunk: tasks at a time to try, for the option that the message names; None when it already was one.
    """

    def __init__(self, message: str, chunk: int | None) -> None:
        super().__init__(message)
        self.chunk = chunk

    def __reduce__(self) -> tuple[type, tuple[str, int | None]]:
        return type(self), (str(self), self.chunk)  # so that it comes back from a worker process


class WorkerError(BayesMetaError):
    """A process that draws batches ahead died, or what it ran failed; the message says at which batch."""


class CaptureError(BayesMetaError):
    """A function cannot be recorded as one graph; the message names the line. Training then goes on without."""


class CompileWarning(UserWarning):
    """Steps that were to be compiled are eager; the message says why, and names the line."""


class RankError(BayesMetaError):
    """Another process (rank) of a distributed run failed, or can no longer be reached. So this one stops too.

    Attributes:
        rank: which one; None where it is not known.
    """

    def __init__(self, message: str, rank: int | None) -> None:
        super().__init__(message)
        self.rank = rank

    def __reduce__(self) -> tuple[type, tuple[str, int | None]]:
        return type(self), (str(self), self.rank)  # so that it comes back from a worker process


class ReplayError(BayesMetaError):
    """A replay buffer has nothing to draw of a task, or is given what it does not hold."""


class CheckpointError(BayesMetaError):
    """A checkpoint is missing, damaged, or belongs to another model, method or version."""


class RunFolderError(BayesMetaError):
    """The output folder cannot be used: it holds another run, or cannot be written."""
