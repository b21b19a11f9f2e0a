"""Explicit randomness: generators in, global state untouched."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

#: What every ``generator=`` argument takes: a generator, a seed, or None for seed 0.
Seed = torch.Generator | int | None


def as_generator(generator: Seed, device: torch.device | str = "cpu", stream: str = "") -> torch.Generator:
    """Turn a generator, a seed or None into a :class:`torch.Generator`.

    Args:
        generator: returned as it is when it is a generator; an int seeds a new one; None means seed 0, so that
            a call without a generator is reproducible and leaves torch's global random state alone.
        device: the device of a new generator; ignored for one that was given.
        stream: what the numbers are for. One seed gives independent numbers to different purposes: without it, tasks,
            θ and φ drawn under the same seed would share their noise.
    """
    if isinstance(generator, torch.Generator):
        return generator
    seed = 0 if generator is None else int(generator)
    digest = hashlib.blake2b(f"{stream}:{seed}".encode(), digest_size=7).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "big"))


def normal_like(like: Tensor, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal numbers of a shape, in the dtype and on the device of ``like``."""
    return torch.randn(tuple(shape), generator=generator, dtype=like.dtype, device=like.device)


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
