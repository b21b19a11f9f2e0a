"""MAESN: a Gaussian over latents for each task, adapted by policy gradients."""
