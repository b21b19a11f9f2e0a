"""What results made of named figures share: they are mappings, and become plain numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


class Figures(Mapping[str, float]):
    """A mapping from names to figures, with standard errors over tasks.

    Attributes:
        values_by_name: the figures.
        standard_errors: of those that have one.
    """

    values_by_name: dict[str, float]
    standard_errors: dict[str, float]

    def __getitem__(self, name: str) -> float:
        return self.values_by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)

    def _with_errors(self) -> dict[str, float]:
        """Each figure, followed by its standard error as ``<name>_se``."""
        out: dict[str, float] = {}
        for name, value in self.values_by_name.items():
            out[name] = value
            if name in self.standard_errors:
                out[f"{name}_se"] = self.standard_errors[name]
        return out
