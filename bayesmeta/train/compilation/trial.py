"""A first call of compiled code in a child process, so that code that crashes does not take a run with it."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesmeta.errors import CaptureError

#: Seconds for the first call; a child that takes longer hangs, and is ended.
PATIENCE = 60.0


def can_try(inputs: Sequence[Tensor]) -> bool:
    """Whether a child of this process could make the call: a GPU and OpenMP's threads do not survive a fork."""
    return hasattr(os, "fork") and torch.get_num_threads() == 1 and all(t.device.type == "cpu" for t in inputs)


def try_in_child(call: Callable[..., Any], inputs: Sequence[Tensor], patience: float = PATIENCE) -> None:
    """Make a call in a copy of this process, which changes nothing here; some 30 ms.

    An exception is no crash: the call will raise it here too.

    Args:
        call: what may crash.
        inputs: of the call.
        patience: seconds.

    Raises:
        CaptureError: when it crashes, or does not end.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads; the child needs none of them
        child = os.fork()
    if child == 0:
        _call_and_end(call, inputs)
    end = time.monotonic() + patience
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise CaptureError(f"a first call of the compiled code, in a child process, did not end in {patience:g} s")
        time.sleep(0.002)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        raise CaptureError(f"a first call of the compiled code, in a child process, crashed ({name})")


def _call_and_end(call: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """In the child: nothing of what Python does at its end, and no reports of the crash."""
    try:
        import faulthandler
        import resource

        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        call(*inputs)
    finally:
        os._exit(0)
