"""Where task batches come from: synthetic families with their oracles, tables, built-in data."""

from bayesmeta.tasks.fertility import FertilitySplit, fertility, fertility_split
from bayesmeta.tasks.linear import LinearGaussian
from bayesmeta.tasks.sinusoid import Sinusoid
from bayesmeta.tasks.table import TableTasks

__all__ = ["FertilitySplit", "LinearGaussian", "Sinusoid", "TableTasks", "fertility", "fertility_split"]
