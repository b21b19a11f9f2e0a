"""Learning from replayed steps: buffers, soft actor-critic, PEARL and distilled latents."""

from bayesmeta.ops.rooms import attributes

__getattr__, __dir__ = attributes(__name__)
