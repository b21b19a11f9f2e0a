"""Policies that remember their trial: memories, what acts on them, and RL²."""
