"""What every room speaks of: observations, task batches, and how they are put together."""

from bayesmeta.data.batch import TaskBatch, concatenate
from bayesmeta.data.observations import Observations, collate, pad_shots, union
from bayesmeta.data.standardizer import Standardizer

__all__ = ["Observations", "Standardizer", "TaskBatch", "collate", "concatenate", "pad_shots", "union"]
