"""VariBAD: a belief over the task at every step, and a policy that acts on it."""

from bayesmeta.ops.rooms import attributes

__getattr__, __dir__ = attributes(__name__)
