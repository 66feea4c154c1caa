"""Fields whose biases are shifted by a latent vector, the only thing that is fitted to a signal.

Functa (Dupont, Kim, Eslami, Rezende and Rosenbaum 2022, arXiv 2201.12204): all signals share a network; of a signal
there is a latent phi [d], which a shared matrix A maps to shifts of all hidden biases,

    h_l = sin(omega_l (W_l h_(l-1) + b_l + s_l)),    (s_0, s_1, ...) = phi A.

The shift of functa has a constant as well; here it is b_l itself. Fits start from phi = 0, the base.

The same of ASMR (`mwt.fields.asmr`): z_i = sin(omega (W_i z_(i-1) + b_i + omega M_i u_(i+1) + s_i)). A shift is the
same at all samples, so that activations are shared as without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from mwt.fields.asmr import ASMR
from mwt.siren import Siren


class ModulatedField(nn.Module):
    """What is common to them: an `AdaptedField` with the latents [B, d] for offsets. Subclasses have the network."""

    def __init__(self, latent: int, width: int, omegas: Sequence[float]) -> None:
        """A fresh matrix A [d, L * H]: U(+-sqrt(3/d)/omega_l), so that a latent moves the phases of all sines alike.

        Args:
            latent: d.
            width: H, biases of a layer.
            omegas: what a shift is multiplied with before the sine, of each layer that has one.
        """
        super().__init__()
        self.latent = latent
        self.width = width
        spread = torch.tensor([(3 / latent) ** 0.5 / omega for omega in omegas]).repeat_interleave(width)
        self.mapping = nn.Parameter(torch.empty(latent, len(omegas) * width).uniform_(-1, 1) * spread)

    @property
    def adapted_shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """The latent alone."""
        return [("latent", (self.latent,))]

    @property
    def adapted_size(self) -> int:
        """d."""
        return self.latent

    def init_offsets(self, batch_size: int) -> Float[Tensor, "B d"]:
        """Zero: every fit starts from the base itself."""
        return self.mapping.new_zeros(batch_size, self.latent)

    def modulations(self, latents: Float[Tensor, "B d"]) -> Float[Tensor, "B L H"]:
        """The shifts of the biases of each layer, in full precision: they go into the first layer's phase too."""
        with torch.autocast(latents.device.type, enabled=False):
            return (latents.to(self.mapping.dtype) @ self.mapping).unflatten(-1, (-1, self.width))


class ModulatedSiren(ModulatedField):
    """MWT's SIREN (`mwt.siren`), whose L + 1 sine layers are shifted."""

    def __init__(self, siren: Siren, *, latent: int) -> None:
        """Around a fresh `siren`."""
        super().__init__(latent, siren.hidden, [siren.omega, *[1.0] * siren.hidden_layers])
        self.siren = siren

    def forward(
        self, latents: Float[Tensor, "B d"], coords: Float[Tensor, "P D"] | Float[Tensor, "B P D"]
    ) -> Float[Tensor, "B P C"]:
        """The values of each signal's field at shared coordinates or at its own."""
        shifts = self.modulations(latents).unbind(1)
        return self.siren.render([(w, b + s) for (w, b), s in zip(self.siren.base(), shifts, strict=True)], coords)


class ModulatedASMR(ModulatedField):
    """ASMR, whose sine layers are shifted; on the samples of its grid alone."""

    def __init__(self, asmr: ASMR, *, latent: int) -> None:
        """Around a fresh `asmr`."""
        names = ["first.bias", *(f"hidden.{i}.bias" for i in range(len(asmr.hidden)))]
        super().__init__(latent, asmr.width, [asmr.omega] * len(names))
        self.asmr = asmr
        self.names = names

    def forward(
        self, latents: Float[Tensor, "B d"], coords: Float[Tensor, "P D"] | Float[Tensor, "B P D"]
    ) -> Float[Tensor, "B P C"]:
        """The values of each signal's field at shared coordinates or at its own.

        Raises:
            NotDefinedError: coordinates that are no sample's.
        """
        shifts = self.modulations(latents).unbind(1)
        changed = {name: self.asmr.get_parameter(name) + s for name, s in zip(self.names, shifts, strict=True)}
        values: Tensor = functional_call(self.asmr, changed, (coords,))
        return values
