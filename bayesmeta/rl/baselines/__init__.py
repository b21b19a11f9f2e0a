"""Classical policies that explore, with no meta-learning: what learned ones are held against. All tasks at once."""

from bayesmeta.ops.rooms import attributes

__getattr__, __dir__ = attributes(__name__)
