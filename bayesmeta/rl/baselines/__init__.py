"""Classical policies that explore, with no meta-learning: what learned ones are held against. All tasks at once."""
