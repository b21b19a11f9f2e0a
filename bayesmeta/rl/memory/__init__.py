"""Policies that remember their trial: memories, what acts on them, and RL²."""

from bayesmeta.ops.rooms import attributes

__getattr__, __dir__ = attributes(__name__)
