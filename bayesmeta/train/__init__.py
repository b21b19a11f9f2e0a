"""Training: the fit loop, MetaSVI, checkpoints, logs. Knows protocols, no method."""
