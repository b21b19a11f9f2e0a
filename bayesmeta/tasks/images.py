"""Few-shot classification of images: N ways, K shots, drawn by tensor operations where the images are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from bayesmeta.data import Observations, TaskBatch
from bayesmeta.errors import DataError, EmptyTaskError, OptionError, ShapeError
from bayesmeta.ops.random import Seed, as_generator
from bayesmeta.tasks.draw import split_sizes
from bayesmeta.tasks.image_store import Keep, Store, read_images, turns_of


class ImageClasses:
    """Classes of images as a distribution of N-way K-shot classification tasks.

    A task is ``ways`` classes, drawn without replacement and numbered 0, 1, … in the random order in which they were
    drawn, so that a label says nothing by itself. Of each class the same number of images goes to the support, and
    other images of it to the query, drawn without replacement. Tasks as in O. Vinyals, C. Blundell, T. Lillicrap,
    K. Kavukcuoglu, D. Wierstra, "Matching Networks for One Shot Learning", NeurIPS 2016,
    https://arxiv.org/abs/1606.04080, section 4.1.1; with ``rotations``, an image turned by 90, 180 or 270 degrees is of
    another class than the image itself (Santoro et al., "Meta-Learning with Memory-Augmented Neural Networks", ICML
    2016, section 4.1). Departure: there a class appears under one rotation in a task; here, as in the code that
    most later papers used (MAML's), each rotation is a class like any other.

    Observations take flat inputs: x is ``[tasks, shots, channels · height · width]`` in ``dtype``, y the labels
    ``[tasks, shots]``, int64. Let a network begin with ``torch.nn.Unflatten(-1, tasks.image_shape)``.

    **Memory.** Images stay as they are given (8 bits are a quarter of float32) and are scaled in the draw. They are
    moved to the device that is drawn on once and drawn from there, or stay where they are: see ``keep``. Parts made by
    :meth:`subset` and :meth:`split` share them.

    Args:
        images: ``[classes, images, channels, height, width]``, or ``[classes, images, height, width]`` for one channel;
            where classes differ in size, a list with ``[images, channels, height, width]`` for each. A tensor or numpy
            array of 8 bits or floats; a memory map of numpy stays on disk, and each draw reads its images.
        ways: classes of a task (N).
        rotations: whether each class turned by 90, 180 and 270 degrees is three more.
        scale: what pixels are divided by; None: 255 for 8 bits, 1 for floats.
        names: of the classes; None: their numbers.
        keep: ``"device"``: on the device that is drawn on; ``"host"``: where they are given, and only the images that
            were drawn are moved; ``"auto"``: the first where a GPU has twice their size free, but memory maps stay.
        dtype: of x.

    Raises:
        ShapeError: for images of another shape; or rotations of images that are not square.
        DataError: for anything but arrays of 8 bits or floats.
        OptionError: for options out of range, and more ways than there are classes.
    """

    num_tasks: int | None = None

    def __init__(
        self,
        images: Any,
        *,
        ways: int = 5,
        rotations: bool = False,
        scale: float | None = None,
        names: Sequence[str] | None = None,
        keep: Keep = "auto",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if keep not in get_args(Keep):
            raise OptionError(f"keep={keep!r} is not known; expected one of {', '.join(get_args(Keep))}.")
        pixels, counts, shape = read_images(images)
        self._set_up(Store(pixels, keep), counts.cumsum(0) - counts, counts, shape, names)
        if scale is not None and not scale > 0:
            raise OptionError(f"scale={scale!r}; expected a number above 0, such as 255 for images of 8 bits.")
        self.scale = float(scale if scale is not None else 255 if self._store.is_bytes else 1)
        self.ways, self.rotations, self.dtype = ways, bool(rotations), dtype
        if rotations and shape[1] != shape[2]:
            raise ShapeError(
                f"rotations=True needs square images; these are of height {shape[1]} and width {shape[2]}."
            )
        self._check_ways()

    @classmethod
    def from_labels(cls, images: Any, labels: Any, **options: Any) -> ImageClasses:
        """From images one after the other and the class of each.

        Args:
            images: ``[images, channels, height, width]`` or ``[images, height, width]``, as for the class.
            labels: whole numbers ``[images]``; classes are in their order, which names them unless ``names`` are given.
            **options: those of the class.

        Raises:
            ShapeError: for another number of labels than images.
            DataError: for labels that are no whole numbers; and whatever the class raises.
        """
        labels = torch.as_tensor(labels)
        if labels.dim() != 1 or len(labels) != len(images):
            raise ShapeError(f"labels has shape {list(labels.shape)} for {len(images)} images; expected one for each.")
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise DataError(f"labels has dtype {labels.dtype}; expected whole numbers.")
        values, counts = labels.unique(return_counts=True)
        options.setdefault("names", [str(value) for value in values.tolist()])
        tasks = cls([images], **{**options, "ways": 1, "names": None})
        tasks._store.order = labels.argsort(stable=True)
        tasks._set_up(tasks._store, counts.cumsum(0) - counts, counts, tasks.image_shape, options["names"])
        tasks.ways = options.get("ways", 5)
        tasks._check_ways()
        return tasks

    @classmethod
    def from_folder(
        cls, path: str | Path, *, size: tuple[int, int] | None = None, grey: bool = False, **options: Any
    ) -> ImageClasses:
        """From a folder that has a folder of images for each class; all are read into memory, as 8 bits.

        Args:
            path: the folder. Classes are the folders in it that have files, also those in folders of their own, by
                name (``Greek/character01``).
            size: (height, width) to which images are resized; None: all must be alike.
            grey: one channel instead of three.
            **options: those of the class.

        Raises:
            DataError: for a folder that is not there or has no class, and files that are no images.
            ShapeError: for images of several sizes without ``size``.
        """
        root = Path(path)
        folders = sorted(folder for folder in root.rglob("*") if folder.is_dir() and any(_files(folder)))
        if not folders:
            raise DataError(f"{root} has no folder with files in it; expected a folder of images for each class.")
        classes = [torch.stack([_load(file, size, grey) for file in _files(folder)]) for folder in folders]
        options.setdefault("names", [folder.relative_to(root).as_posix() for folder in folders])
        return cls(classes, **options)

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Number of classes to draw from, rotations included."""
        return len(self._counts) * (4 if self.rotations else 1)

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each class as it was given; rotations have none."""
        return self._names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self._shape

    def __repr__(self) -> str:
        low, high = int(self._counts.min()), int(self._counts.max())
        shape = "×".join(str(n) for n in self._shape)
        each = str(low) if low == high else f"{low}–{high}"
        return f"ImageClasses({self.num_classes} classes of {each} images, {shape}, {self.ways} ways)"

    # -- parts --------------------------------------------------------------------------------------------------------

    def subset(self, classes: Sequence[str] | Sequence[int] | Tensor) -> ImageClasses:
        """Tasks of some of the classes (with their rotations), which share the images.

        Args:
            classes: names, or numbers of classes, or a boolean mask with an entry for each class.

        Raises:
            DataError: for a class that is not there, or given twice; and for a mask of another length.
            OptionError: for fewer than ``ways``.
        """
        if isinstance(classes, Tensor | np.ndarray):
            classes = classes.tolist()
        classes = self._chosen(classes)
        row_of = {name: i for i, name in enumerate(self._names)}
        index = [row_of.get(c, -1) if isinstance(c, str) else int(c) for c in classes]
        bad = [c for c, i in zip(classes, index, strict=True) if not 0 <= i < len(self._counts)]
        if bad or len(set(index)) < len(index):
            what = f"there is no class {bad[0]!r}" if bad else "a class is given twice"
            raise DataError(f"Of {len(self._counts)} classes a subset was asked for, but {what}.")
        rows = torch.tensor(index, dtype=torch.int64)
        part = object.__new__(ImageClasses)
        part.__dict__.update(self.__dict__)
        part._set_up(self._store, self._starts[rows], self._counts[rows], self._shape, [self._names[i] for i in index])
        part._check_ways()
        return part

    def split(self, sizes: Sequence[int] | Sequence[float], seed: Seed = 0) -> list[ImageClasses]:
        """Tasks of disjoint classes, at random; a class and its rotations stay together.

        Args:
            sizes: numbers of classes (rotations not counted), or fractions below 1 of all.
            seed: of the shuffle.

        Raises:
            OptionError: for sizes out of range, or a part of fewer classes than ``ways``.
        """
        counts = split_sizes(sizes, len(self._counts), "class", "classes")
        generator = as_generator(seed, stream="split")
        shuffled = torch.randperm(len(self._counts), generator=generator, device=generator.device).cpu()
        return [self.subset(part) for part in shuffled[: sum(counts)].split(counts)]

    # -- batches ------------------------------------------------------------------------------------------------------

    def sample(self, num_tasks: int, *, support: int, query: int, generator: Seed = None) -> TaskBatch:
        """Draw tasks as one batch on the generator's device, without a Python loop.

        Args:
            num_tasks: number of tasks.
            support: observations in each support, ``ways`` times the shots (5 for 5 ways and 1 shot).
            query: observations in each query, likewise a multiple of ``ways``.
            generator: generator or seed; None means seed 0.

        Returns:
            Rows are sorted by label, the same number of each.

        Raises:
            OptionError: for numbers out of range, or that are no multiple of ``ways``.
            EmptyTaskError: naming a class with fewer images than a task needs.
        """
        return self.sample_part(slice, num_tasks, support=support, query=query, generator=generator)

    def sample_part(
        self, part: Callable[[int], slice], num_tasks: int, *, support: int, query: int, generator: Seed = None
    ) -> TaskBatch:
        """Some tasks of the batch that :meth:`sample` would draw; the images of the others are not looked up.

        Args:
            part: says of the number of tasks which ones; one rank of several has a part of its own.
            num_tasks, support, query, generator: as of :meth:`sample`, which leaves the generator in the same state.
        """
        shots, extra = self._shots(num_tasks, support, query)
        generator = as_generator(generator, stream="tasks")
        device = generator.device
        keys = torch.rand(num_tasks, self.num_classes, generator=generator, device=device)
        drawn = keys.topk(self.ways).indices  # [tasks, ways], in random order
        classes = drawn % len(self._counts)
        starts, counts, turns = self._index(device)
        keys = torch.rand(num_tasks, self.ways, self._most, generator=generator, device=device)
        if self._least < self._most:
            keys = torch.where(torch.arange(self._most, device=device) < counts[classes].unsqueeze(-1), keys, -1.0)
        rows = (starts[classes].unsqueeze(-1) + keys.topk(shots + extra).indices)[part(num_tasks)]
        pixels = self._store.rows(rows)
        if self.rotations:
            turned = turns[drawn[part(num_tasks)] // len(self._counts)]
            pixels = pixels.gather(-1, turned.unsqueeze(-2).expand_as(pixels))
        x = pixels.to(self.dtype) / self.scale
        label = torch.arange(self.ways, device=device).repeat_interleave(shots + extra)
        y = label.reshape(self.ways, shots + extra).expand(len(rows), -1, -1)

        def cut(first: int, last: int) -> Observations:
            return Observations(x[:, :, first:last].flatten(1, 2), y[:, :, first:last].flatten(1, 2))

        return TaskBatch(cut(0, shots), cut(shots, shots + extra))

    # -- inside -------------------------------------------------------------------------------------------------------

    def _set_up(
        self,
        store: Store,
        starts: Tensor,
        counts: Tensor,
        shape: tuple[int, int, int],
        names: Sequence[str] | None,
    ) -> None:
        self._store, self._starts, self._counts, self._shape = store, starts, counts, shape
        self._names = tuple(str(i) for i in range(len(counts))) if names is None else tuple(names)
        if len(self._names) != len(counts) or len(set(self._names)) < len(self._names):
            raise OptionError(
                f"{len(self._names)} names were given for {len(counts)} classes; each needs one of its own."
            )
        self._least, self._most = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
        self._on_device: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def _chosen(self, classes: Sequence[Any]) -> Sequence[Any]:
        """Numbers of classes in place of a mask; anything else as it is."""
        masks = [isinstance(c, bool | np.bool_) for c in classes]
        if not any(masks):
            return classes
        if not all(masks) or len(masks) != len(self._counts):
            raise DataError(
                f"Of {len(self._counts)} classes a subset was asked for by {len(masks)} entries, {sum(masks)} of them "
                "True or False; expected names or numbers of classes, or a mask with an entry for each class."
            )
        return [i for i, chosen in enumerate(classes) if chosen]

    def _check_ways(self) -> None:
        if isinstance(self.ways, bool) or not isinstance(self.ways, int) or self.ways < 1:
            raise OptionError(f"ways={self.ways!r}; expected a whole number of at least 1.")
        if self.ways > self.num_classes:
            raise OptionError(
                f"ways={self.ways} classes to a task were asked for, but there are {self.num_classes} to draw from. "
                "Ask for fewer, or make larger parts."
            )

    def _shots(self, num_tasks: int, support: int, query: int | None) -> tuple[int, int]:
        """Images of each class in support and query."""
        if query is None:
            raise OptionError("query=None means all that is left of a task; of images give a number, ways times shots.")
        if num_tasks < 1 or support < 0 or query < 0 or support + query < 1:
            raise OptionError(
                f"num_tasks={num_tasks}, support={support}, query={query}; expected at least 1 task and at least 1 "
                "observation of each."
            )
        if support % self.ways or query % self.ways:
            raise OptionError(
                f"support={support} and query={query} count all observations of a task, the same number of each of "
                f"{self.ways} ways; expected multiples of {self.ways}, such as support={self.ways} for one shot."
            )
        shots, extra = support // self.ways, query // self.ways
        if shots + extra > self._least:
            name = self._names[int(self._counts.argmin())]
            raise EmptyTaskError(
                f"Class {name!r} has {self._least} image(s), but {shots} for the support and {extra} for the query "
                "were asked for. Ask for fewer, or leave such classes out with subset()."
            )
        return shots, extra

    def _index(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """First row and number of rows of each class, and where the pixels of turned images come from."""
        if device not in self._on_device:
            turns = turns_of(self._shape) if self.rotations else self._starts[:0]
            self._on_device[device] = self._starts.to(device), self._counts.to(device), turns.to(device)
        return self._on_device[device]


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


def _load(file: Path, size: tuple[int, int] | None, grey: bool) -> Tensor:
    """An image ``[channels, height, width]``, uint8."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            kind = image.convert("L" if grey else "RGB")
            pixels = torch.from_numpy(np.array(kind if size is None else kind.resize((size[1], size[0]))))
    except UnidentifiedImageError as error:
        raise DataError(f"{file} is no image that can be read. Leave it out of the folder.") from error
    return pixels.unsqueeze(0) if grey else pixels.movedim(-1, 0).contiguous()
