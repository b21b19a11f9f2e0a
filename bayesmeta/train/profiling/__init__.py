"""Where a training step's time goes, and what to do about it."""
