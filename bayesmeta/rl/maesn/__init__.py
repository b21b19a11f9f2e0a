"""MAESN: a Gaussian over latents for each task, adapted by policy gradients."""

from bayesmeta.ops.rooms import attributes

__getattr__, __dir__ = attributes(__name__)
