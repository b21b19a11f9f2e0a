"""Numbers obtained another way: slopes by central differences in float64, and optima by L-BFGS."""

import torch


def slopes(function, parameter, indices, step=1e-6):
    """Central differences of a function of a parameter, at some of its entries, ``[indices]``.

    The function gives the value with the parameter as it then stands; whatever noise it draws must be the same in each
    call. Of size f, it leaves an error of order step² f‴ and rounding of order 1e-16 f / step: 1e-10 f for the step
    given here, which in float32 would be 0.1 f.
    """
    assert parameter.dtype == torch.float64, f"central differences need float64; the parameter is {parameter.dtype}"
    flat, found = parameter.data.view(-1), []
    for i in indices:
        kept, values = flat[i].item(), []
        for sign in (1, -1):
            flat[i] = kept + sign * step
            values.append(function().item())
        flat[i] = kept
        found.append((values[0] - values[1]) / (2 * step))
    return torch.tensor(found, dtype=torch.float64)


def by_finite_differences(method, batch, parameter, index, step=1e-6, generator=None):
    """The slope of a method's loss in one entry of a parameter; ``generator`` is the seed of the noise in each call."""
    return slopes(lambda: method.loss(batch, generator=generator), parameter, [index], step).item()


def slope_along(function, parameter, direction, step=1e-5):
    """Central difference of a function of a parameter along a direction of its shape, a number.

    All entries are seen at once, so it costs two calls for a parameter of any size.
    """
    assert parameter.dtype == torch.float64, f"central differences need float64; the parameter is {parameter.dtype}"
    kept, values = parameter.detach().clone(), []
    for sign in (1, -1):
        parameter.data.copy_(kept + sign * step * direction)
        values.append(function().item())
    parameter.data.copy_(kept)
    return (values[0] - values[1]) / (2 * step)


def maximise_evidence(method, batch, max_iter=100, **options):
    """L-BFGS on the learned parameters of a method whose loss is the negative log evidence, to its optimum.

    Args:
        method: changed in place.
        batch: the same in every step.
        max_iter: steps at most.
        options: of :class:`torch.optim.LBFGS`, such as its tolerances.
    """
    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(parameters, max_iter=max_iter, line_search_fn="strong_wolfe", **options)

    def closure():
        optimizer.zero_grad()
        loss = method.loss(batch)
        loss.backward()
        return loss

    optimizer.step(closure)
