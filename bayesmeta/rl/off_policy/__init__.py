"""Learning from replayed steps: buffers, soft actor-critic, PEARL and distilled latents."""
