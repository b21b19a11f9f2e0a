"""Meta-reinforcement learning: tasks are Markov decision processes, and adaptation must also choose how to explore.

``protocols`` is how its parts know each other; ``envs`` has families of environments that step as tensors, ``oracles``
what the best policies reach, ``baselines`` what classical ones reach.
"""

import warnings

with warnings.catch_warnings():  # gymnasium adds a filter of its own to all of Python's
    import gymnasium  # noqa: F401
