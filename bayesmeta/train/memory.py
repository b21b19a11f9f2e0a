"""Too little memory for a step: an error that says what to set, before an allocator's."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bayesmeta.errors import DeviceMemoryError, OptionError


@contextmanager
def memory_for(what: str, option: str, tasks: int) -> Iterator[None]:
    """Turn an allocator's error into a typed one.

    Args:
        what: is being done, for the message.
        option: which says how many tasks are worked on at a time.
        tasks: how many that is now.

    Raises:
        DeviceMemoryError: naming the option and half the number of tasks.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_memory(error):
            raise
        # its frames hold the tensors that filled the device: without them the next try has room
        traceback.clear_frames(error.__traceback__)
        chunk = tasks // 2 if tasks > 1 else None
        first = (str(error).splitlines() or ["out of memory"])[0][:200]
        advice = (
            f"Set {option}={chunk}: fewer tasks at a time, and the same result up to rounding"
            if chunk is not None
            else "It is one task at a time already: set checkpoint_inner=True, take fewer shots, or first_order=True"
        )
        message = f"{what} ran out of memory with {tasks} task(s) at a time. {advice}. The allocator said: {first}"
        raise DeviceMemoryError(message, chunk) from error


@contextmanager
def memory_for_update(step: int) -> Iterator[None]:
    """The same for the optimizer's update, which needs as much however few tasks are worked on at a time.

    Raises:
        DeviceMemoryError: saying what makes an update smaller.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_memory(error):
            raise
        first = (str(error).splitlines() or ["out of memory"])[0][:200]
        message = (
            f"The optimizer's update at step {step} ran out of memory; fewer tasks at a time do not help it. Take an "
            "optimizer that keeps less (SGD keeps nothing, Adam two numbers a parameter) or that goes through the "
            f"parameters one by one (foreach=False), or a smaller network. The allocator said: {first}"
        )
        raise DeviceMemoryError(message, None) from error


@contextmanager
def recomputing(method: Any, on: bool) -> Iterator[None]:
    """Let a method compute its inner steps again on the way back instead of keeping them, for a while.

    Raises:
        OptionError: for a method without inner steps that are differentiated.
    """
    if not on:
        yield
        return
    if not hasattr(method, "checkpoint_inner"):
        raise OptionError(
            f"checkpoint_inner=True is for methods that are differentiated through inner steps, such as MAML, ABML and "
            f"BMAML; {type(method).__name__} keeps none. Use chunk= to save memory."
        )
    before, method.checkpoint_inner = method.checkpoint_inner, True
    try:
        yield
    finally:
        method.checkpoint_inner = before


def is_memory(error: BaseException) -> bool:
    """Whether an error is an allocator's, of the CPU or of a device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's allocator of the CPU
