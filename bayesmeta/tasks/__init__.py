"""Where task batches come from: synthetic families with their oracles, tables, built-in data."""

from bayesmeta.tasks.fertility import FertilitySplit, fertility, fertility_split
from bayesmeta.tasks.fixed import FixedTasks
from bayesmeta.tasks.function import FunctionTasks
from bayesmeta.tasks.gp import GPTasks
from bayesmeta.tasks.images import ImageClasses
from bayesmeta.tasks.linear import LinearGaussian
from bayesmeta.tasks.pending import to_predict
from bayesmeta.tasks.prefetch import Prefetch
from bayesmeta.tasks.schema import TableSchema
from bayesmeta.tasks.sine_or_line import SineOrLine
from bayesmeta.tasks.sinusoid import ChallengingSinusoid, NonMutuallyExclusiveSinusoid, Sinusoid
from bayesmeta.tasks.table import TableTasks

__all__ = [
    "ChallengingSinusoid",
    "FertilitySplit",
    "FixedTasks",
    "FunctionTasks",
    "GPTasks",
    "ImageClasses",
    "LinearGaussian",
    "NonMutuallyExclusiveSinusoid",
    "Prefetch",
    "SineOrLine",
    "Sinusoid",
    "TableSchema",
    "TableTasks",
    "fertility",
    "fertility_split",
    "to_predict",
]
