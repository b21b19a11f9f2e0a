"""The table of methods."""

from __future__ import annotations

import textwrap

from bayesmeta.tabular.models import RECIPES, all_methods, method_class

_WIDTHS = {"assumes": 26, "posterior": 30, "cost": 26, "source": 22}


def methods_table() -> str:
    """What each method assumes, its posterior q(φ | S), its cost and its source; a star for those that fit a CSV."""
    rows, names = [], all_methods()
    widths = [max(map(len, names)) + 4, *_WIDTHS.values()]
    for name in names:
        card = method_class(name).card
        star = "* " if name in RECIPES else "  "
        rows.append([star + name, card.assumes, card.posterior, card.cost, card.source])
    lines = [_line([name.upper() for name in ("method", *_WIDTHS)], widths), ""]
    for row in rows:
        cells = [textwrap.wrap(text, width - 2) for text, width in zip(row, widths)]
        cells[0] = [row[0]]  # with its star
        for i in range(max(map(len, cells))):
            lines.append(_line([cell[i] if i < len(cell) else "" for cell in cells], widths))
        lines.append("")
    lines.append("* fits a CSV: bayesmeta fit CSV --method NAME. The others take a model of your own, in Python.")
    return "\n".join(lines)


def _line(cells: list[str], widths: list[int]) -> str:
    return "".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()
