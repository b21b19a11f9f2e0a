"""Machines for beam steering: tables of response matrices, and the starts that each admits.

A response matrix R ``[monitors, correctors]`` says by how many metres a beam moves at each monitor for a kick of one
radian at each corrector. Tables come from a file (of the AWAKE electron line, for one: ``responseH`` and ``responseV``
``[machines, 10, 10]``), from one's own arrays, or from a small model of ten quadrupoles that is built in.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bayesmeta.errors import DataError, NonFiniteDataError, OptionError, ShapeError
from bayesmeta.ops.random import as_generator
from bayesmeta.rl.envs.family import SPLITS, check_split

#: Positions are in units of 1 cm: metres times this.
UNITS = 100.0
#: Kicks of a start are uniform on ± this, in radians.
KICK = 5e-4
#: A start is admissible if every reading is at most the first and their root mean square is above the second.
EDGE, DISTANCE = 0.95, 0.2
#: Starts that are kept for each machine, and random ones that are tried at a time.
STARTS, TRIED = 256, 8192


class Machines:
    """A finite set of machines, cut into training, validation and test sets.

    Machines that admit fewer than ``min_acceptance`` of all random starts are in no set (``excluded`` has their rows):
    a draw would have to be repeated hundreds of times. For the others, ``STARTS`` admissible starts are drawn once, by
    rejection, and episodes begin in one of them.

    Args:
        responses: ``[machines, monitors, correctors]``.
        name: of the table, as messages show it.
        held_out: part of the machines that is for tests; as many validate.
        min_acceptance: share of random starts that must be admissible.
        seed: of the cut and of the starts.

    Raises:
        ShapeError, NonFiniteDataError: for arrays that are no response matrices.
        OptionError: for shares outside (0, 0.5), or a set that would be empty.
    """

    def __init__(
        self,
        responses: np.ndarray | Tensor,
        *,
        name: str = "machines",
        held_out: float = 0.2,
        min_acceptance: float = 0.003,
        seed: int = 0,
    ) -> None:
        self.responses = torch.as_tensor(np.asarray(responses), dtype=torch.float32)
        if self.responses.dim() != 3 or 0 in self.responses.shape:
            raise ShapeError(f"responses {list(self.responses.shape)}; expected [machines, monitors, correctors].")
        if not bool(torch.isfinite(self.responses).all()):
            raise NonFiniteDataError("responses hold NaN or infinity; leave such machines out.")
        if not (0 < held_out < 0.5 and 0 <= min_acceptance < 1):
            raise OptionError(
                f"held_out={held_out}, min_acceptance={min_acceptance}; expected numbers in (0, 0.5) and [0, 1)."
            )
        self.name, self.held_out, self.min_acceptance, self.seed = name, held_out, min_acceptance, seed

    @classmethod
    def load(cls, path: Path | str, *, plane: str = "H", **options: float) -> Machines:
        """From a NumPy file with ``responseH`` and ``responseV``.

        Args:
            path: of the ``.npz`` file.
            plane: "H" or "V".
            options: as of the class.

        Raises:
            DataError: if the file cannot be read or lacks the plane.
        """
        try:
            with np.load(path) as file:
                responses = file[f"response{plane}"]
        except (OSError, KeyError, ValueError) as error:
            raise DataError(
                f"{path}: {error}; expected a NumPy .npz file with response{plane} [machines, 10, 10]."
            ) from error
        return cls(responses, name=f"{Path(path).stem} {plane}", **options)  # type: ignore[arg-type]

    @classmethod
    def built_in(cls, machines: int = 512, **options: float) -> Machines:
        """Ten thin quadrupoles in a line, focusing and defocusing in turn, whose strengths vary by a quarter.

        In front of each quadrupole is a corrector, behind it a monitor; R is the product of the transfer matrices
        between them, in the linear optics of a drift (1, L; 0, 1) and a thin lens (1, 0; −k, 1).

        Args:
            machines: how many.
            options: as of the class.

        Raises:
            OptionError: for fewer than 5 machines.
        """
        if machines < 5:
            raise OptionError(f"machines={machines}; expected at least 5, to cut them into three sets.")
        strengths = torch.rand(machines, 10, generator=as_generator(0, stream="quadrupoles")) * 0.5 + 0.75
        return cls(thin_lens_response(strengths), name="built-in", **options)  # type: ignore[arg-type]

    @cached_property
    def _admissible(self) -> tuple[Tensor, Tensor]:
        """Share of admissible starts ``[machines]``, and starts ``[machines, STARTS, correctors]`` in radians.

        A machine leaves the loop when it has enough, or when its share is too small.
        """
        generator = as_generator(self.seed, stream="starts")
        number, _, correctors = self.responses.shape
        found: list[list[Tensor]] = [[] for _ in range(number)]
        counts, tried, shares = torch.zeros(number), 0, torch.zeros(number)
        open_rows = torch.arange(number)
        while len(open_rows):
            kicks = KICK * (2 * torch.rand(TRIED, correctors, generator=generator) - 1)  # the same for all machines
            for row in open_rows.tolist():
                readings = UNITS * kicks @ self.responses[row].T
                good = (readings.abs().amax(-1) <= EDGE) & (readings.square().mean(-1) > DISTANCE**2)
                found[row].append(kicks[good])
                counts[row] += good.sum()
            tried += TRIED
            shares[open_rows] = counts[open_rows] / tried
            open_rows = open_rows[(counts[open_rows] < STARTS) & (shares[open_rows] >= self.min_acceptance)]
        starts = torch.zeros(number, STARTS, correctors)
        for row in (counts >= STARTS).nonzero().squeeze(-1).tolist():
            starts[row] = torch.cat(found[row])[:STARTS]
        return shares, starts

    @property
    def acceptance(self) -> Tensor:
        """Share of random starts that are admissible, by machine, ``[machines]``."""
        return self._admissible[0]

    @property
    def starts(self) -> Tensor:
        """Kicks of admissible starts in radians, ``[machines, STARTS, correctors]``; 0 for excluded machines."""
        return self._admissible[1]

    @property
    def excluded(self) -> Tensor:
        """Rows of the machines that are in no set."""
        return (~self._usable).nonzero().squeeze(-1)

    @property
    def _usable(self) -> Tensor:
        return self.starts.abs().amax((-1, -2)) > 0

    @cached_property
    def sets(self) -> dict[str, Tensor]:
        """Rows of the machines of each set."""
        rows = self._usable.nonzero().squeeze(-1)
        rows = rows[torch.randperm(len(rows), generator=as_generator(self.seed, stream="sets"))]
        held = round(self.held_out * len(rows))
        parts = (rows[2 * held :], rows[held : 2 * held], rows[:held])
        if not all(map(len, parts)):
            raise OptionError(f"{len(rows)} machines of {self.name} admit starts; too few for three sets.")
        return dict(zip(SPLITS, parts))

    def rows(self, split: str) -> Tensor:
        """Rows of the machines of a set.

        Raises:
            OptionError: for an unknown split.
        """
        check_split(split)
        return self.sets[split]

    def digest(self) -> str:
        """Tells two tables apart."""
        import hashlib

        content = self.responses.numpy().tobytes() + repr((self.held_out, self.min_acceptance, self.seed)).encode()
        return hashlib.blake2b(content, digest_size=8).hexdigest()


def thin_lens_response(strengths: Tensor, *, drift: float = 0.8, focal: float = 1.2) -> Tensor:
    """Response matrices of a line of thin quadrupoles.

    Args:
        strengths: factors of the quadrupoles' strengths, ``[machines, quadrupoles]``.
        drift: between a quadrupole and the next corrector, and from a corrector to its quadrupole, in metres.
        focal: focal length at factor 1, in metres.

    Returns:
        ``[machines, quadrupoles, quadrupoles]``: metres at each monitor for a radian at each corrector; 0 upstream.
    """
    machines, number = strengths.shape
    sign = torch.ones(number).index_fill_(0, torch.arange(1, number, 2), -1.0)
    response = torch.zeros(machines, number, number)
    for corrector in range(number):
        position, angle = torch.zeros(machines), torch.ones(machines)  # after a kick of one radian
        for cell in range(corrector, number):
            position = position + drift * angle
            angle = angle - sign[cell] * strengths[:, cell] / focal * position
            response[:, cell, corrector] = position
            position = position + drift * angle
    return response
