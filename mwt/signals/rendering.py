"""Pictures out of radiance fields: cameras, places along rays, what a ray sees (Mildenhall et al. 2020, section 4)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def camera_rays(
    camera: Float[Tensor, "4 4"], height: int, width: int, angle: float
) -> tuple[Float[Tensor, "R 3"], Float[Tensor, "R 3"]]:
    """Origins and unit directions through the middles of pixels, row by row.

    Args:
        camera: from camera to world; x to the right, y upwards, it looks along -z (Blender, OpenGL).
        height: in pixels.
        width: likewise.
        angle: field of view along the width, in radians. Pixels are square.
    """
    focal = width / 2 / math.tan(angle / 2)
    y = -(torch.arange(height, dtype=camera.dtype, device=camera.device) + 0.5 - height / 2) / focal
    x = (torch.arange(width, dtype=camera.dtype, device=camera.device) + 0.5 - width / 2) / focal
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    local = torch.stack([columns, rows, -torch.ones_like(rows)], dim=-1).view(-1, 3)
    directions = local @ camera[:3, :3].mT
    return camera[:3, 3].expand_as(directions), directions / directions.norm(dim=-1, keepdim=True)


def through_cube(
    origins: Float[Tensor, "R 3"], directions: Float[Tensor, "R 3"], bound: float, near: float, far: float
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Where rays enter and leave the cube from -bound to bound, within `near` and `far`; equal if they miss it."""
    safe = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    one, two = (-bound - origins) / safe, (bound - origins) / safe
    enter = torch.minimum(one, two).amax(-1).clamp(near, far)
    leave = torch.maximum(one, two).amin(-1).clamp(near, far)
    return enter, torch.maximum(enter, leave)


def stratified(
    enter: Float[Tensor, " R"], leave: Float[Tensor, " R"], count: int, generator: torch.Generator | None
) -> Float[Tensor, "R S"]:
    """One place in each of `count` equal pieces of a ray: at random, or (without a generator) in the middle."""
    within = torch.full((len(enter), count), 0.5, dtype=enter.dtype, device=enter.device)
    if generator is not None:
        within = torch.rand(within.shape, dtype=enter.dtype, device=enter.device, generator=generator)
    share = (torch.arange(count, dtype=enter.dtype, device=enter.device) + within) / count
    return enter[:, None] + (leave - enter)[:, None] * share


def edges(
    places: Float[Tensor, "R S"], enter: Float[Tensor, " R"], leave: Float[Tensor, " R"]
) -> Float[Tensor, "R S+1"]:
    """Ends of the pieces that ascending places stand for: halfway between them, and the ray's own."""
    middle = (places[:, 1:] + places[:, :-1]) / 2
    return torch.cat([enter[:, None], middle, leave[:, None]], dim=1)


def ray_weights(density: Float[Tensor, "R S"], lengths: Float[Tensor, "R S"]) -> Float[Tensor, "R S"]:
    """How much each piece of a ray gives to what is seen: T_i (1 - exp(-density_i length_i)), eq. 3.

    T_i = exp(-the sum of density x length before it). Their sum is the opacity; for one density everywhere it is
    1 - exp(-density x length of the ray), whatever the pieces.
    """
    depth = density * lengths
    before = depth.cumsum(1) - depth
    return (-before).exp() * -torch.expm1(-depth)


def composite(
    weights: Float[Tensor, "R S"], colours: Float[Tensor, "R S 3"], background: float
) -> Float[Tensor, "R 3"]:
    """Colours of rays, over a grey background from 0 to 1."""
    return (weights[..., None] * colours).sum(1) + background * (1 - weights.sum(1, keepdim=True))


def important(
    ends: Float[Tensor, "R E"], weights: Float[Tensor, "R S"], count: int, generator: torch.Generator | None
) -> Float[Tensor, "R count"]:
    """Places where the weights are: drawn from the density that is constant on each piece (section 5.2).

    At random, one in each `count`-th of the probability, or (without a generator) in its middle.
    """
    shares = weights + 1e-3 / weights.shape[1]  # rays that see nothing are drawn evenly
    total = torch.cat([torch.zeros_like(shares[:, :1]), shares.cumsum(1)], dim=1)
    total = total / total[:, -1:]
    zero, one = torch.zeros_like(total[:, 0]), torch.ones_like(total[:, 0])
    wanted = stratified(zero, one, count, generator)
    above = torch.searchsorted(total.contiguous(), wanted.contiguous(), right=True).clamp(1, weights.shape[1])
    low, high = total.gather(1, above - 1), total.gather(1, above)
    start, end = ends.gather(1, above - 1), ends.gather(1, above)
    return start + (end - start) * ((wanted - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
