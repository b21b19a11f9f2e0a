"""Posteriors over task parameters: what ``adapt`` returns, what diagnostics read. Each is a Pyro guide."""
