"""Latent contexts: a task is a vector z that a guide infers from what happened, and a belief over it is a posterior."""

from bayesmeta.ops.rooms import attributes

__getattr__, __dir__ = attributes(__name__)
