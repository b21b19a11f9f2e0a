"""Networks whose hidden layers a latent scales and shifts: one for each of several components, or one for each task."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bayesmeta.errors import ModelError
from bayesmeta.ops.batched import is_plain_mlp
from bayesmeta.ops.random import normal_like


class FiLMTrunk(nn.Module):
    """A Sequential of Linear and elementwise layers in which latents z_k modulate what each Linear gives.

    Behind Linear l of width H_l, component k has h ← (1 + a_kl) h + c_kl, where all a and c of a component are one
    linear function of its latent z_k: feature-wise linear modulation.

    Source: E. Perez, F. Strub, H. de Vries, V. Dumoulin, A. Courville, "FiLM: Visual Reasoning with a General
    Conditioning Layer", AAAI 2018, https://arxiv.org/abs/1709.07871, eqs. 1–2. There z comes from an input; here each
    component has one of its own, and the scale is written as 1 + a, so that z = 0 leaves the trunk as it is.

    Args:
        layers: the trunk, Linear and elementwise layers; it is copied.
        num_components: K.
        latent_size: length of z.
        spread: standard deviation of the first a and c.
        generator: of the first latents and of the linear function.
    """

    def __init__(
        self, layers: nn.Sequential, num_components: int, latent_size: int, spread: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.layers = copy.deepcopy(layers)
        self.num_components = num_components
        self.widths = [layer.out_features for layer in self.layers if isinstance(layer, nn.Linear)]
        like = next(self.layers.parameters(), torch.zeros(()))
        self.latent: nn.Parameter | None = None
        if self.widths:
            self.latent = nn.Parameter(normal_like(like, (num_components, latent_size), generator))
            weight = normal_like(like, (2 * sum(self.widths), latent_size), generator)
            self.modulation = nn.Parameter(weight * spread / latent_size**0.5)

    def _modulations(self, component: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Scale and shift of each Linear, ``[K, 1, H]``, or ``[…, tasks, 1, H]`` for given components."""
        if self.latent is None:
            return []
        both = self.latent @ self.modulation.mT
        both = (both if component is None else both[component]).unsqueeze(-2)
        scales, shifts = both.chunk(2, -1)
        return list(zip((1.0 + scales).split(self.widths, -1), shifts.split(self.widths, -1), strict=True))

    def forward(self, x: Tensor, component: Tensor | None = None) -> Tensor:
        """The features.

        Args:
            x: ``[tasks, shots, features]``.
            component: index of a component for each task, ``[…, tasks]``; None for all of them.

        Returns:
            ``[…, tasks, shots, width]`` for given components, ``[tasks, K, shots, width]`` for all.
        """
        if component is None:
            return self._all(x)
        modulations = iter(self._modulations(component))
        h = x
        for layer in self.layers:
            h = layer(h)
            if isinstance(layer, nn.Linear):
                scale, shift = next(modulations)
                h = torch.addcmul(shift, h, scale)
        return h.expand(*component.shape, *h.shape[-2:])

    def _all(self, x: Tensor) -> Tensor:
        """All components at once: each has its own weights then, and a layer is one batched product."""
        modulations = iter(self._modulations(None))
        h = x.flatten(0, 1).expand(self.num_components, -1, -1)
        for layer in self.layers:
            if not isinstance(layer, nn.Linear):
                h = layer(h)
                continue
            scale, shift = next(modulations)
            weight = layer.weight * scale.mT
            bias = shift if layer.bias is None else torch.addcmul(shift, layer.bias, scale)
            h = torch.baddbmm(bias, h, weight.mT)
        return h.unflatten(1, x.shape[:2]).transpose(0, 1)


class FiLMNetwork(nn.Module):
    """A network of (x, z) in which z scales and shifts what each hidden Linear gives: h ← (1 + a(z)) h + c(z).

    All a and c are one linear function of z, so that z = 0 leaves the network as it is. Source: as
    :class:`FiLMTrunk`.

    Args:
        layers: a Sequential of Linear and elementwise layers that ends in a Linear, which is not modulated, with at
            least one Linear before it; it is copied.
        latent_size: length of z, at least 1.
        generator: of the linear function.
        spread: standard deviation of the first a and c under z ~ N(0, I).

    Raises:
        ModelError: for another kind of network.
    """

    def __init__(self, layers: nn.Module, latent_size: int, generator: torch.Generator, *, spread: float = 0.5) -> None:
        super().__init__()
        linear = [layer for layer in layers.modules() if isinstance(layer, nn.Linear)]
        plain = isinstance(layers, nn.Sequential) and is_plain_mlp(layers)
        if not plain or len(linear) < 2 or list(layers.children())[-1] is not linear[-1]:
            raise ModelError(
                "FiLM modulates the hidden layers of a Sequential of Linear and elementwise layers that ends in a "
                "Linear, such as bayesmeta.nets.mlp(…) with hidden layers. For another network use "
                "decoder='concatenate'."
            )
        self.layers = nn.Sequential(*copy.deepcopy(list(layers.children())))
        self.widths = [layer.out_features for layer in linear[:-1]]
        weight = normal_like(linear[0].weight, (2 * sum(self.widths), latent_size), generator)
        self.modulation = nn.Parameter(weight * spread / latent_size**0.5)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Outputs ``[…, tasks, shots, outputs]``.

        Args:
            x: ``[tasks, shots, features]``.
            z: ``[…, tasks, latent_size]``.
        """
        scales, shifts = (z @ self.modulation.mT).unsqueeze(-2).chunk(2, -1)
        parts = zip((1.0 + scales).split(self.widths, -1), shifts.split(self.widths, -1), strict=True)
        h = x
        for index, layer in enumerate(self.layers):
            h = layer(h)
            if isinstance(layer, nn.Linear) and index < len(self.layers) - 1:
                scale, shift = next(parts)
                h = torch.addcmul(shift, h, scale)
        return h
