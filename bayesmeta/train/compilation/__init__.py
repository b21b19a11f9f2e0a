"""Compiled training steps: traced once, run many times, watched for what would make them wrong."""
