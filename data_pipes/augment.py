"""Random changes of a batch, made on its device; each sample's are a function of (seed, epoch, position) alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from mwt.errors import InputError
from mwt.observe import grid
from mwt.rng import uniform
from mwt.structs import Batch

AFFINE_PADDING = 40
MAX_DEGREES = 30.0
CROP_AREA = (0.8, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
POINT_SCALE = (0.9, 1.1)
POINT_JITTER = 0.01
WARP_DEGREES, WARP_SCALE, WARP_SHIFT = 15.0, 0.1, 0.1
_CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop gives up after as many


def augment(batch: Batch, kind: str, *, seed: int, epoch: int, padding: int = 4) -> Batch:
    """The batch, changed at random as `kind` says (`mwt.config.DataConfig.augment`); other fields are kept.

    * ``none``: unchanged.
    * ``crop``: reflect padding by `padding` pixels, then a random crop of the original size. ``crop_flip``: and a
      horizontal flip of half of the images. (Released code of MWT, CIFAR-10 and Fashion-MNIST.)
    * ``affine_flip``: reflect padding by 40 pixels, rotation by up to ±30° (bilinear), centre crop of the original
      size, `RandomResizedCrop` of 80 to 100 % of the area with ratio 3/4 to 4/3, flip. (Released code of MWT,
      Imagenette and ImageNet.)
    * ``coords``: the pixels of an image are placed elsewhere: their coordinates are rotated by up to ±15°, scaled per
      axis by 0.9 … 1.1 and shifted by up to ±0.1 (the image spans -1 … 1). A field is fitted to the moved image
      without any resampling. (Not in the paper.)
    * ``points``: coordinates and values of a point set times one factor in 0.9 … 1.1. Scaling a shape scales its
      distances alike, so the distance field stays exact. The jitter of the released code moves the points of the
      *surface*, by 0.01, before it asks for distances, so it belongs to where these are asked for: `surface_jitter`
      of this kind goes to `Split.batches`, and from there to `data_pipes.signals`. Distances that are stored are
      those of the surface as it is; nothing can be jittered there.

    Raises:
        InputError: an unknown kind, one that does not fit the signals, or images too small for the padding.
    """
    if kind not in _KINDS:
        raise InputError(f"data.augment={kind} is not known; choose one of {', '.join(_KINDS)}.")
    if kind == "none":
        return batch
    if (batch.images is None) != (kind == "points"):
        raise InputError(
            f"data.augment={kind} is for {'point sets' if kind == 'points' else 'images'}, which these signals are not."
        )
    return _KINDS[kind](batch, seed, epoch, padding)


def surface_jitter(kind: str) -> float:
    """The standard deviation by which kind `kind` moves the points of a surface before distances to it are taken."""
    return POINT_JITTER if kind == "points" else 0.0


def scale_and_jitter(
    points: Float[Tensor, "*B N 3"], factor: Float[Tensor, "*B"], noise: Float[Tensor, "*B N 3"], jitter: float
) -> Float[Tensor, "*B N 3"]:
    """Points of surfaces times a factor, and then each moved by `jitter` times standard normal `noise`.

    As in the released code, what is moved may leave the cube [-1, 1]³ by as much; queries do not.
    """
    return points * factor[..., None, None] + jitter * noise


def _check_size(images: Tensor, padding: int) -> None:
    height, width = images.shape[-2:]
    if min(height, width) <= padding:
        raise InputError(
            f"Images of {height} x {width} are too small for this augmentation: it pads by {padding} pixels by "
            f"reflection, which needs more than {padding} both ways. Use larger images, less padding, or "
            "data.augment=none."
        )


def _crop(batch: Batch, seed: int, epoch: int, padding: int, *, may_flip: bool) -> Batch:
    assert batch.images is not None
    _check_size(batch.images, padding)
    numbers = uniform(batch.positions, 3, seed=seed, purpose="augment", epoch=epoch)
    offsets = (numbers[:, :2] * (2 * padding + 1)).long().clamp(max=2 * padding)
    flip = (numbers[:, 2] < 0.5) & may_flip
    return replace(batch, images=crop_and_flip(batch.images, offsets, flip, padding))


def crop_and_flip(
    images: UInt8[Tensor, "B C h w"], offsets: Int[Tensor, "B 2"], flip: Bool[Tensor, " B"], padding: int
) -> UInt8[Tensor, "B C h w"]:
    """Reflect padding by `padding`, crop of the original size at (top, left) `offsets`, and a flip where `flip`.

    It reads each pixel of the result straight from its place in the original; nothing is padded.
    """
    height, width = images.shape[-2:]
    rows = _reflect(_span(height, images) + offsets[:, :1] - padding, height)
    columns = _span(width, images)
    columns = torch.where(flip[:, None], width - 1 - columns, columns)
    columns = _reflect(columns + offsets[:, 1:] - padding, width)
    batch, channel = _span(len(images), images), _span(images.shape[1], images)
    return images[batch[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def _span(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device)


def _reflect(index: Tensor, size: int) -> Tensor:
    return (size - 1) - ((size - 1) - index.abs()).abs()


def _affine_flip(batch: Batch, seed: int, epoch: int, padding: int) -> Batch:
    assert batch.images is not None
    _check_size(batch.images, AFFINE_PADDING)
    numbers = uniform(batch.positions, 4 + 2 * _CROP_ATTEMPTS, seed=seed, purpose="augment", epoch=epoch)
    degrees = (2 * numbers[:, 0] - 1) * MAX_DEGREES
    height, width = batch.images.shape[-2:]
    boxes = crop_boxes(numbers[:, 2:4], numbers[:, 4:].unflatten(1, (-1, 2)), height, width)
    return replace(batch, images=rotate_crop_flip(batch.images, degrees, boxes, numbers[:, 1] < 0.5))


def crop_boxes(
    place: Float[Tensor, "B 2"], attempts: Float[Tensor, "B tries 2"], height: int, width: int
) -> Int[Tensor, "B 4"]:
    """Boxes (top, left, height, width) distributed as those of torchvision's `RandomResizedCrop`.

    From numbers in [0, 1): `attempts` give area and ratio, the first that fits counts; if none does, the largest
    centred box of an allowed ratio is taken, as there. `place` says where the box lies.
    """
    area = (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * attempts[..., 0]) * (height * width)
    low, high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    ratio = torch.exp(low + (high - low) * attempts[..., 1])
    sizes = torch.stack([(area / ratio).sqrt().round(), (area * ratio).sqrt().round()], dim=-1).long()  # height, width
    limit = _pair(height, width, place)
    fits = ((sizes > 0) & (sizes <= limit)).all(-1)
    first = fits.to(torch.uint8).argmax(1)  # argmax gives the first of equals
    chosen = sizes[_span(len(place), place), first]
    corner = (place * (limit - chosen + 1)).long().clamp(min=0).minimum(limit - chosen)
    whole = _pair(min(height, round(width / CROP_RATIO[0])), min(width, round(height * CROP_RATIO[1])), place)
    fallback = torch.cat([(limit - whole) // 2, whole])
    return torch.where(fits.any(1, keepdim=True), torch.cat([corner, chosen], dim=1), fallback)


def _pair(first: int, second: int, like: Tensor) -> Tensor:
    """Two numbers on the device; `torch.tensor` would copy them there, and a CUDA device would be waited for."""
    return torch.where(_span(2, like) == 0, first, second)


def rotate_crop_flip(
    images: UInt8[Tensor, "B C h w"], degrees: Float[Tensor, " B"], boxes: Int[Tensor, "B 4"], flip: Bool[Tensor, " B"]
) -> UInt8[Tensor, "B C h w"]:
    """Reflect padding by 40, rotation (counter-clockwise, bilinear), centre crop to the original size, then the crop
    `boxes` (top, left, height, width) resized to the original size (bilinear), and a horizontal flip where `flip`.

    Two samplings one after the other, as in the released code, with rounding to grey levels only at the end. What a
    large angle brings in from beyond the corners of the padded image is black, as there.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images.float(), [AFFINE_PADDING] * 4, mode="reflect")
    turn = torch.deg2rad(degrees)[:, None, None]
    y = (_span(height, images) - (height - 1) / 2)[:, None]
    x = _span(width, images) - (width - 1) / 2
    source_y, source_x = turn.sin() * x + turn.cos() * y, turn.cos() * x - turn.sin() * y
    # in grid_sample's units -1 and 1 are the outer edges of the first and the last pixel
    scale_y, scale_x = 2 / (height + 2 * AFFINE_PADDING), 2 / (width + 2 * AFFINE_PADDING)
    grid = torch.stack([source_x * scale_x, source_y * scale_y], dim=-1)
    turned = F.grid_sample(padded, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    rows = _resize_source(boxes[:, 0], boxes[:, 2], height, torch.zeros_like(flip))
    columns = _resize_source(boxes[:, 1], boxes[:, 3], width, flip)
    grid = torch.stack(
        [
            ((columns + 0.5) * (2 / width) - 1)[:, None, :].expand(-1, height, -1),
            ((rows + 0.5) * (2 / height) - 1)[:, :, None].expand(-1, -1, width),
        ],
        dim=-1,
    )
    result = F.grid_sample(turned, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return result.round().clamp(0, 255).to(torch.uint8)


def _resize_source(start: Tensor, length: Tensor, size: int, flip: Tensor) -> Tensor:
    """[B, size]: where, in pixels of the whole image, each pixel of a resized box lies; never outside the box."""
    target = _span(size, start).expand(len(start), -1)
    target = torch.where(flip[:, None], size - 1 - target, target)
    inside = (target + 0.5) * (length / size)[:, None] - 0.5
    return start[:, None] + inside.clamp(min=0).minimum(length[:, None] - 1)


def _coords(batch: Batch, seed: int, epoch: int, padding: int) -> Batch:
    assert batch.images is not None
    draw = uniform(batch.positions, 5, seed=seed, purpose="augment", epoch=epoch) * 2 - 1
    coords = warp_coords(
        grid(*batch.images.shape[-2:], device=batch.images.device),
        angle=draw[:, 0] * math.radians(WARP_DEGREES),
        scale=1 + draw[:, 1:3] * WARP_SCALE,
        shift=draw[:, 3:5] * WARP_SHIFT,
    )
    return replace(batch, coords=coords)


def warp_coords(
    coords: Float[Tensor, "N 2"],
    *,
    angle: Float[Tensor, " B"],
    scale: Float[Tensor, "B 2"],
    shift: Float[Tensor, "B 2"],
) -> Float[Tensor, "B N 2"]:
    """Coordinates (y, x) scaled per axis, then turned by `angle` (radians, from y towards x), then shifted."""
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
    return (coords * scale[:, None]) @ turn + shift[:, None]


def _points(batch: Batch, seed: int, epoch: int, padding: int) -> Batch:
    assert batch.coords is not None
    assert batch.values is not None
    low, high = POINT_SCALE
    number = uniform(batch.positions, 1, seed=seed, purpose="augment", epoch=epoch)
    factor = (low + (high - low) * number)[:, :, None]
    return replace(batch, coords=batch.coords * factor, values=batch.values * factor)


_KINDS: dict[str, Callable[[Batch, int, int, int], Batch]] = {
    "none": lambda batch, seed, epoch, padding: batch,
    "crop": lambda batch, seed, epoch, padding: _crop(batch, seed, epoch, padding, may_flip=False),
    "crop_flip": lambda batch, seed, epoch, padding: _crop(batch, seed, epoch, padding, may_flip=True),
    "affine_flip": _affine_flip,
    "coords": _coords,
    "points": _points,
}
