"""The radon hierarchy in NumPyro, as a peer; see ``_numpyro_svi.py``."""

# mypy: ignore-errors
# (it runs in the peers' environment, which has what it imports)
import numpyro.distributions as dist
from _numpyro_svi import serve
from numpyro import plate, sample


def model(county, floor, uranium, y):
    mean = sample("mean", dist.Normal(0.0, 10.0))
    slope = sample("slope", dist.Normal(0.0, 10.0))
    gain = sample("gain", dist.Normal(0.0, 10.0))
    spread = sample("spread", dist.HalfNormal(1.0))
    noise = sample("noise", dist.HalfNormal(1.0))
    with plate("counties", len(uranium)):
        level = sample("level", dist.Normal(mean + gain * uranium, spread))
    with plate("houses", len(y)):
        sample("y", dist.Normal(level[county] + slope * floor, noise), obs=y)


if __name__ == "__main__":
    serve(model)
