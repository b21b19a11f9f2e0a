"""Births per woman by country and year, 1960–2011: the built-in real table (World Bank, through statsmodels)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from bayesmeta.errors import OptionError
from bayesmeta.tasks.table import Order, TableTasks

#: Rows of the data that are averages over countries, which other rows already contain.
AGGREGATES = (
    "Latin America & Caribbean (all income levels)",
    "OECD members",
    "Other small states",
    "Pacific island small states",
    "Sub-Saharan Africa (IFC classification)",
)
_COMPLETE = 52
_SPLIT_YEARS = 30


@dataclass(frozen=True, eq=False)
class FertilitySplit:
    """Countries to learn from, to choose with and to be judged on, all in the standard units of ``train``.

    Attributes:
        train, validation, test: disjoint tables.
    """

    train: TableTasks
    validation: TableTasks
    test: TableTasks


def fertility(
    *,
    minimum_years: int = 20,
    aggregates: bool = False,
    order: Order = "first",
    dtype: torch.dtype = torch.float32,
) -> TableTasks:
    """Total fertility rate of the world's countries and territories: one task a country, in raw units.

    x is the year, ``[tasks, years, 1]``; y is births per woman, ``[tasks, years]``. Source: World Bank, World
    Development Indicators, SP.DYN.TFRT.IN, as shipped with statsmodels (``statsmodels.datasets.fertility``); no
    network is used. It has 219 rows, of which 198 have 20 observed years or more and 192 have all 52. Four of these
    (:data:`AGGREGATES`; a fifth has no data) are averages over countries, among them countries that would be
    held out, so they are dropped: 194 countries remain, 188 of them complete. Many values between censuses are
    the source's own interpolation: curves are smoother than counts of births would be.

    Args:
        minimum_years: keep countries with at least this many observed years.
        aggregates: keep the averages too.
        order: which years become the support, see :class:`~bayesmeta.tasks.table.TableTasks`.
        dtype: of the tensors.

    Raises:
        OptionError: for an unknown order.
        EmptyTaskError: if no country has that many years.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from statsmodels.datasets import fertility as source

        wide = source.load_pandas().data
    years = [column for column in wide.columns if str(column).isdigit()]
    wide = wide[wide[years].notna().sum(axis=1) >= minimum_years]
    if not aggregates:
        wide = wide[~wide["Country Name"].isin(AGGREGATES)]
    names = {"Country Name": "country"}
    long = wide.rename(columns=names).melt("country", years, var_name="year", value_name="births per woman")
    long["year"] = long["year"].astype(int)
    return TableTasks.from_dataframe(long, task="country", x=["year"], y="births per woman", order=order, dtype=dtype)


def fertility_split(
    seed: int,
    *,
    train: int = 110,
    validation: int = 22,
    test: int = 60,
    order: Order = "first",
    aggregates: bool = False,
) -> FertilitySplit:
    """Random training, validation and held-out countries; the standardizer is learned on ``train`` alone.

    Split are the 192 countries with at least 30 observed years, averages over countries left out. Of these, 188 are
    complete (1960–2011), and the held-out and validation ones are drawn from them, so that "the first ten years"
    means 1960–1969 for each. The four incomplete ones (Kosovo, Luxembourg, Singapore, St. Martin) can only be
    training countries. Two with 22 years each (Greenland, West Bank and Gaza) are left out. One seed has the same
    held-out countries whatever ``train`` and ``validation`` are.

    Args:
        seed: of the shuffle.
        train, validation, test: number of countries in each.
        order: which years become the support of a draw, see :class:`~bayesmeta.tasks.table.TableTasks`.
        aggregates: split the 192 complete rows of the source instead, the four averages over countries included.

    Raises:
        OptionError: for sizes below 1, or more than there are countries.
    """
    table = fertility(minimum_years=_COMPLETE if aggregates else _SPLIT_YEARS, aggregates=aggregates, order=order)
    shuffled = torch.randperm(table.num_tasks, generator=torch.Generator().manual_seed(seed)).tolist()
    complete = [i for i in shuffled if table.lengths[i] == _COMPLETE]
    held_out = set(complete[: test + validation])
    pool = [i for i in shuffled if i not in held_out]
    sizes = (train, validation, test)
    if min(sizes) < 1 or test + validation > len(complete) or train > len(pool):
        raise OptionError(
            f"train={train}, validation={validation}, test={test}; expected at least 1 each, and at most "
            f"{len(complete)} for validation and test together and {table.num_tasks} in all."
        )
    learned = table.subset(pool[:train])
    standardizer = learned.fit_standardizer()
    parts = (learned, table.subset(complete[test : test + validation]), table.subset(complete[:test]))
    return FertilitySplit(*(part.with_standardizer(standardizer) for part in parts))
