"""Explicit randomness: generators in, global state untouched."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: What every ``generator=`` argument takes: a generator, a seed, or None for seed 0.
Seed = torch.Generator | int | None


def as_generator(generator: Seed, device: torch.device | str = "cpu") -> torch.Generator:
    """Turn a generator, a seed or None into a :class:`torch.Generator`.

    Args:
        generator: returned as it is when it is a generator; an int seeds a new one; None means seed 0, so that
            a call without a generator is reproducible and leaves torch's global random state alone.
        device: the device of a new generator; ignored for one that was given.
    """
    if isinstance(generator, torch.Generator):
        return generator
    return torch.Generator(device=device).manual_seed(0 if generator is None else int(generator))


@contextmanager
def forked_rng(generator: torch.Generator) -> Iterator[None]:
    """Run code that draws from torch's global generator (Pyro's distributions do) under a seed from ``generator``.

    ``generator`` advances by one draw; the global CPU state, and the CUDA state of its device, are restored.
    """
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device).item())
    devices = [generator.device] if generator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(generator.device):
                torch.cuda.manual_seed(seed)
        yield
