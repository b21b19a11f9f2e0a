"""Several processes that train one θ: tasks are sharded by rank, and one flat all-reduce a step adds their gradients.

Each rank draws the whole batch from the generator that all share, keeps its own tasks, and goes back through them. What
meets is the sum of the gradients, and with it in the same buffer: the losses, the numbers of real tasks, how far
buffers moved, who failed, and which signal came. The mean over all real tasks is then the same on each rank, bit for
bit, and each takes the same step. That is one process with as many times the tasks.

DistributedDataParallel is not used. It sums gradients when the forward pass of the module that it wraps is called; an
inner loop calls the network by other ways (functions of adapted weights, second derivatives), so that its gradients
would be left unsynchronised, or synchronised in the inner steps, which are a task's own.
"""

from __future__ import annotations

import atexit
import hashlib
import math
import os
import re
import signal
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from bayesmeta.errors import BayesMetaError, OptionError, RankError
from bayesmeta.train.restart import restarts

Distributed = Literal["auto", "off"]
T = TypeVar("T")

#: Signals that the ranks agree on, by their place in the buffer.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Share:
    """What a rank brings to a step, beside the gradients of the sum over its tasks.

    Attributes:
        total: sum of the losses of its real tasks.
        count: how many these are.
        failure: what stopped it, if anything did.
        signal: that it received, if any.
    """

    total: Tensor
    count: int
    failure: Exception | None = None
    signal: signal.Signals | None = None


@dataclass(frozen=True)
class Sum:
    """What the ranks brought together.

    Attributes:
        loss: mean over all real tasks; like the norm on the CPU, where it was looked at.
        norm: of the gradient of that mean.
        count: how many these are.
        not_finite: ranks whose loss or gradient is not finite.
        signal: that one of them received, if any.
    """

    loss: Tensor
    norm: Tensor
    count: int
    not_finite: tuple[int, ...]
    signal: signal.Signals | None


class Ranks:
    """The processes of a run. This class is one process alone, which exchanges nothing.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        device: of this process.
        pending: an error of this rank that the others have not been told of: raised, here and there, by the next
            exchange.
    """

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1) -> None:
        self.device, self.rank, self.size = device, rank, size
        self.pending: Exception | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes and shows progress."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Which of so many tasks are this rank's; shares differ by one at most."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def collect(self, function: Callable[[], T]) -> list[T]:
        """Call a function on each rank; returns the values of all. An error on one is an error on all."""
        return [function()]

    def together(self, function: Callable[[], T]) -> T:
        """Call a function on each rank; returns its value here. An error on one is an error on all."""
        return function()

    def from_first(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 alone; all get its value, or its error."""
        return function()

    def compare(self, named: Mapping[str, Any]) -> None:
        """Refuse ranks that were started with other values than rank 0."""

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Put rank 0's numbers into the tensors of all."""


class Group(Ranks):
    """Several ranks, by torch's default process group, which is there.

    Args:
        device: of this process.
    """

    def __init__(self, device: torch.device) -> None:
        import torch.distributed as dist

        self._dist: Any = dist
        super().__init__(device, dist.get_rank(), dist.get_world_size())

    # -- values -------------------------------------------------------------------------------------------------

    def collect(self, function: Callable[[], T]) -> list[T]:
        """See :class:`Ranks`.

        Raises:
            RankError: naming the rank that failed; on that rank its own error.
        """
        value: Any = None
        failure: Exception | None = None
        try:
            if self.pending is not None:
                raise self.pending
            value = function()
        except Exception as error:
            failure = error
        found = self._gather((value, _describe(failure)))
        self._raise(failure, [said for _, said in found])
        return [one for one, _ in found]

    def together(self, function: Callable[[], T]) -> T:
        """See :class:`Ranks`."""
        kept: list[T] = []
        self.collect(lambda: kept.append(function()))
        return kept[0]

    def from_first(self, function: Callable[[], T]) -> T:
        """See :class:`Ranks`."""
        return self.collect(function if self.is_first else lambda: None)[0]  # type: ignore[return-value]

    def _gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        self._talk(lambda: self._dist.all_gather_object(found, value))
        return found

    def _raise(self, failure: Exception | None, said: Sequence[str | None]) -> None:
        """Raise this rank's failure, or tell of another's."""
        if failure is not None:
            raise failure
        for rank, text in enumerate(said):
            if text is not None:
                raise RankError(f"Rank {rank} stopped, and so do all: {text}", rank)

    def _talk(self, function: Callable[[], Any]) -> None:
        """Exchange something.

        Raises:
            RankError: when another rank is gone.
        """
        try:
            function()
        except RuntimeError as error:
            global _healthy
            _healthy = False
            raise RankError(
                "Another rank can no longer be reached: it has ended or its machine is gone; what it said last says "
                f"why. The last checkpoint, if there is a folder, is kept: go on with resume. (Rank {self.rank} was "
                f"told: {_in_short(error)}.)",
                None,
            ) from error

    def compare(self, named: Mapping[str, Any]) -> None:
        """See :class:`Ranks`.

        Raises:
            OptionError: naming the first value that differs, the rank, and both values.
        """
        found = self.collect(lambda: dict(named))
        for rank, theirs in enumerate(found):
            for name in {**found[0], **theirs}:
                if not _alike(found[0].get(name), theirs.get(name)):
                    here, there = (f"{one.get(name)!r:.200}" for one in (theirs, found[0]))
                    raise OptionError(
                        f"Rank {rank} has {name} = {here}, and rank 0 has {there}. All "
                        "ranks train one model: start each with the same script, options, seed and data."
                    )

    # -- tensors ------------------------------------------------------------------------------------------------

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """See :class:`Ranks`."""
        with torch.no_grad():
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                if whole.numel() > 0:  # as bytes, since not every backend sends every dtype
                    octets = whole.view(-1).view(torch.uint8)
                    self._talk(lambda octets=octets: self._dist.broadcast(octets, 0))  # type: ignore[misc]
                    tensor.copy_(whole)

    def reduce(self, parameters: Sequence[nn.Parameter], buffers: Sequence[tuple[Tensor, Tensor]], share: Share) -> Sum:
        """Turn each rank's sum of gradients into the mean over all real tasks, in one all-reduce.

        A parameter whose gradient is None on all ranks keeps None. Buffers become what they were plus the mean of how
        far each rank moved them, weighted by real tasks.

        Args:
            parameters: with the gradients of the sum over this rank's tasks.
            buffers: of floating numbers, each with its value before the step.
            share: the rest.

        Raises:
            RankError: when another rank failed or is gone; this rank's own failure on this one.
        """
        failed = share.failure is not None
        grads = [None if failed or share.count == 0 else p.grad for p in parameters]
        moves = [torch.zeros_like(old) if failed else (new - old) * share.count for new, old in buffers]
        flat = self._pack(parameters, grads, moves, share)
        self._talk(lambda: self._dist.all_reduce(flat))
        sizes = [t.numel() for t in [*parameters, *moves]]
        numbers, first = sum(sizes), sum(sizes[: len(grads)])
        # the one look at the device
        norm, total, told, failures, *rest = torch.cat(
            [torch.linalg.vector_norm(flat[:first]).reshape(1), flat[numbers:]]
        ).tolist()
        if failures:
            self._raise(share.failure, self._gather(_describe(share.failure)))
        signals, present, count = rest[: len(_SIGNALS)], rest[len(_SIGNALS) :], round(told)
        broken: list[bool] = [False]
        if not math.isfinite(norm + total):
            mine = [share.total, *moves, *(g for g in grads if g is not None)]
            broken = self._gather(not all(bool(t.isfinite().all()) for t in mine))
        mean = flat[:numbers].div_(max(count, 1))
        pieces = mean.split(sizes)
        for p, piece, there in zip(parameters, pieces, present):
            p.grad = piece.view_as(p).to(p.dtype) if there else None
        with torch.no_grad():
            for (buffer, old), piece in zip(buffers, pieces[len(parameters) :]):
                buffer.copy_(old + piece.view(old.shape).to(old.dtype))
        received = next((s for s, given in zip(_SIGNALS, signals) if given), None)
        return Sum(
            torch.tensor(total / max(count, 1), dtype=share.total.dtype),
            torch.tensor(norm / max(count, 1), dtype=flat.dtype),
            count,
            tuple(rank for rank, bad in enumerate(broken) if bad),
            received,
        )

    def _pack(
        self, parameters: Sequence[nn.Parameter], grads: Sequence[Tensor | None], moves: Sequence[Tensor], share: Share
    ) -> Tensor:
        """The buffer: gradients, moves of buffers, and what else the ranks sum. No Python for what is there already."""
        parts = [
            p.new_zeros(p.numel()) if g is None else (g.to_dense() if g.is_sparse else g).detach().flatten()
            for p, g in zip(parameters, grads)
        ]
        parts += [m.flatten() for m in moves]
        # cat promotes to the widest dtype of all; this one is float32 at least
        wide = torch.float64 if any(t.dtype == torch.float64 for t in parts) else torch.float32
        signals = [share.signal == s for s in _SIGNALS]
        said = [share.count, share.failure is not None, *signals, *(g is not None for g in grads)]
        tail = torch.tensor(said, dtype=wide, device=self.device)
        # the loss stays on the device: nothing waits for it before the all-reduce
        return torch.cat([*parts, share.total.detach().reshape(1).to(wide), tail])


def _in_short(error: Exception) -> str:
    """The first sentence of an error of torch, without the file and line that it may begin with."""
    line = (str(error).splitlines() or [""])[0]
    line = re.sub(r"^\s*\[[^\]\s]*\.(?:cc|cpp|cu|h|hpp):\d+\]\s*", "", line)
    sentence = re.split(r"(?<=[.!?])\s", line, maxsplit=1)[0].rstrip(". ")
    return textwrap.shorten(sentence, 300, placeholder=" …") or type(error).__name__


def _describe(failure: Exception | None) -> str | None:
    return None if failure is None else f"{type(failure).__name__}: {failure}"


def _alike(a: Any, b: Any) -> bool:
    """Equal; numbers up to rounding, as two kinds of processors give them."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_alike(x, y) for x, y in zip(a, b))
    return bool(a == b)


def digest(tensors: Sequence[Tensor]) -> str:
    """A short text that differs where a bit of the tensors does."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


# -- joining ----------------------------------------------------------------------------------------------------------

#: whether the group can still be left in good order
_healthy = True


def world(environment: Mapping[str, str] | None = None) -> tuple[int, int, int, int] | None:
    """Rank, size, rank and size on this machine, as torchrun says them; None where this process is not of torchrun.

    Raises:
        OptionError: for values that are no such numbers.
    """
    given = os.environ if environment is None else environment
    if any(name not in given for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
        local, beside = int(given.get("LOCAL_RANK", rank)), int(given.get("LOCAL_WORLD_SIZE", size))
    except ValueError as error:
        said = ", ".join(f"{name}={given.get(name)!r}" for name in names)
        raise OptionError(f"The environment has {said}; expected whole numbers, as torchrun sets them.") from error
    if not 0 <= rank < size or not 0 <= local < beside:
        raise OptionError(
            f"The environment has RANK={rank} of WORLD_SIZE={size} and LOCAL_RANK={local} of LOCAL_WORLD_SIZE={beside};"
            " expected ranks from 0 to one less than the size. Start with torchrun, or set distributed='off'."
        )
    return rank, size, local, beside


def is_first() -> bool:
    """Whether this process is rank 0, or alone; asks torch or torchrun and joins nothing."""
    return _place()[0] == 0


def count_ranks() -> int:
    """How many processes train together; asks torch or torchrun and joins nothing."""
    return _place()[1]


def _place() -> tuple[int, int]:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    found = world()
    return (0, 1) if found is None else found[:2]


def own_device(device: torch.device, local: int, beside: int, devices: int) -> torch.device:
    """The device of a rank: each has a CUDA device of its own on its machine.

    Args:
        device: that was asked for.
        local: the rank on this machine.
        beside: how many ranks there are on this machine.
        devices: how many CUDA devices it has.

    Raises:
        OptionError: for one device for several ranks, and for more ranks than devices.
    """
    if device.type != "cuda":
        return device
    if device.index is not None:
        if beside > 1:
            raise OptionError(
                f"device='{device}' is one device, and {beside} ranks on this machine need one each: use "
                "device='cuda', which gives each its own, or torchrun --nproc-per-node 1."
            )
        return device
    if local >= devices:
        raise OptionError(
            f"{beside} ranks on this machine need a CUDA device each, and torch sees {devices}: use torchrun "
            f"--nproc-per-node {devices}, or device='cpu'."
        )
    return torch.device("cuda", local)


def join(mode: Distributed, device: torch.device) -> Ranks:
    """The ranks of this process: of the process group that is there, else of torchrun's, else itself alone.

    A group that is made here (gloo between CPUs, NCCL between GPUs) stays until the process ends, for the next run.

    Args:
        mode: ``"auto"``; ``"off"``: alone in any case.
        device: as asked for.

    Raises:
        OptionError: for an unknown mode, and for devices that do not suffice.
        RankError: when the ranks do not find each other.
    """
    if mode not in get_args(Distributed):
        raise OptionError(f"distributed={mode!r}; expected 'auto' or 'off'.")
    import torch.distributed as dist

    if mode == "off" or not dist.is_available():
        return Ranks(device)
    found = world()
    local, beside = (0, 1) if found is None else found[2:]
    if not dist.is_initialized():
        if found is None:
            return Ranks(device)
        device = own_device(device, local, beside, torch.cuda.device_count())
        if found[1] == 1:
            return Ranks(device)
        _start(device)
    elif found is not None:
        device = own_device(device, local, beside, torch.cuda.device_count())
    return Group(device) if dist.get_world_size() > 1 else Ranks(device)


def _start(device: torch.device) -> None:
    """Make the default process group from torchrun's environment."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if device.type == "cuda":
        torch.cuda.set_device(device)  # else each process would also take memory of the first device
    # what is no tensor of a GPU, such as states of generators, goes by gloo
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, size = next(iter(rendezvous("env://")))
        # torchrun may keep one store for all its starts, in which the addresses of ranks that have died are still found
        store = dist.PrefixStore(f"bayesmeta/{restarts()}/{size}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    except (RuntimeError, ValueError) as error:
        raise RankError(f"The ranks did not find each other: {_in_short(error)}.", None) from error
    atexit.register(_leave)


def _leave() -> None:
    """Leave the group; not where another rank is gone, for which this would wait."""
    import torch.distributed as dist

    if _healthy and dist.is_initialized():
        with suppress(RuntimeError, BayesMetaError):
            dist.destroy_process_group()
