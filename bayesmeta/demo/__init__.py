"""The built-in demonstration on real data, and the baselines it is held against."""
