"""Images as flat rows: where they are kept, and how some of them are fetched."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bayesmeta.errors import DataError, EmptyTaskError, ShapeError

#: Where images are kept: see :class:`~bayesmeta.tasks.images.ImageClasses`.
Keep = Literal["auto", "device", "host"]
#: ``keep="auto"`` moves images to a GPU that has so many times their size free.
ROOM = 2.0


class Store:
    """Images as flat rows ``[rows, pixels]``, on the host or on disk, and on each device that they were moved to.

    Args:
        pixels: a tensor, or a memory map.
        keep: see :class:`~bayesmeta.tasks.images.ImageClasses`.
    """

    def __init__(self, pixels: Any, keep: Keep) -> None:
        self.pixels, self.keep = pixels, keep
        self.order: Tensor | None = None  # where each row is found, if not in order
        self.is_bytes = pixels.dtype in (torch.uint8, np.dtype("uint8"))
        self.num_bytes = pixels.nbytes
        self._moved: dict[torch.device, Tensor] = {}

    def rows(self, index: Tensor) -> Tensor:
        """Some rows, ``[…, pixels]``, on the index's device."""
        device = index.device
        if self.order is not None:
            if self.order.device != device:
                self.order = self.order.to(device)
            index = self.order[index]
        if not self._is_moved(device):
            if isinstance(self.pixels, Tensor):
                return self.pixels[index.to(self.pixels.device)].to(device)
            return torch.from_numpy(np.asarray(self.pixels[index.cpu().numpy()])).to(device)
        if device not in self._moved:
            pixels = self.pixels if isinstance(self.pixels, Tensor) else torch.from_numpy(np.array(self.pixels))
            self._moved[device] = pixels.to(device)
        return self._moved[device][index]

    def _is_moved(self, device: torch.device) -> bool:
        if self.keep != "auto":
            return self.keep == "device"
        if not isinstance(self.pixels, Tensor):
            return False
        return device in self._moved or device.type == "cpu" or free_bytes(device) >= ROOM * self.num_bytes

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which moves what it needs by itself."""
        return {**self.__dict__, "_moved": {}}


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU."""
    return int(torch.cuda.mem_get_info(device)[0])


def read_images(images: Any) -> tuple[Any, Tensor, tuple[int, int, int]]:
    """Flat rows, the number of rows of each class, and the shape of an image.

    Raises:
        DataError, ShapeError, EmptyTaskError: for other arrays, shapes that do not fit, and a class without an image.
    """
    if isinstance(images, list | tuple):
        if not images:
            raise DataError("No class of images was given; expected at least one.")
        parts = [_array(part) for part in images]
        if any(part.ndim not in (3, 4) or part.shape[1:] != parts[0].shape[1:] for part in parts):
            shapes = sorted({tuple(part.shape[1:]) for part in parts})
            raise ShapeError(
                f"The classes have images of shapes {shapes}; expected for each class [images, channels, height, "
                "width] with one shape for all."
            )
        counts = torch.tensor([len(part) for part in parts])
        shape = parts[0].shape[1:]
        if len(parts) == 1:  # not copied
            rows = parts[0].reshape(len(parts[0]), -1)
        else:
            rows = torch.cat(
                [torch.as_tensor(np.array(p) if isinstance(p, np.memmap) else p).flatten(1) for p in parts]
            )
    else:
        array = _array(images)
        if array.ndim not in (4, 5):
            raise ShapeError(
                f"images has shape {list(array.shape)}; expected [classes, images, channels, height, width], or "
                "[classes, images, height, width] for one channel."
            )
        counts = torch.full((array.shape[0],), array.shape[1])
        shape = array.shape[2:]
        rows = array.reshape(array.shape[0] * array.shape[1], -1)
    if int(counts.min()) < 1:
        raise EmptyTaskError(f"Class {int(counts.argmin())} (counted from 0) has no image; leave it out.")
    channels, height, width = shape if len(shape) == 3 else (1, *shape)
    return rows, counts, (int(channels), int(height), int(width))


def _array(images: Any) -> Any:
    """A tensor, or a memory map as it is."""
    if isinstance(images, np.ndarray) and not isinstance(images, np.memmap):
        images = torch.from_numpy(images if images.flags.writeable else images.copy())
    if not isinstance(images, Tensor | np.memmap):
        raise DataError(f"images is a {type(images).__name__}; expected a torch tensor, numpy array or memory map.")
    if images.dtype not in (torch.uint8, torch.float32, torch.float64, np.uint8, np.float32, np.float64):
        raise DataError(f"images has dtype {images.dtype}; expected uint8, or a floating dtype.")
    return images


def turns_of(shape: tuple[int, int, int]) -> Tensor:
    """From where each pixel of an image turned by 0, 90, 180 and 270 degrees comes, ``[4, pixels]``."""
    number = torch.arange(shape[0] * shape[1] * shape[2]).reshape(shape)
    return torch.stack([torch.rot90(number, turns, (1, 2)).flatten() for turns in range(4)])
