"""VariBAD: a belief over the task at every step, and a policy that acts on it."""
