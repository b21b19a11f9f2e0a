"""The generative story: plates, task programs, networks, priors, likelihoods."""
