"""data_pipes.augment against torchvision's operators, one image at a time with the same parameters."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as v2f

from data_pipes.augment import (
    augment,
    crop_and_flip,
    crop_boxes,
    rotate_crop_flip,
    warp_coords,
)
from mwt.config import InnerLoopConfig
from mwt.errors import InputError
from mwt.observe import observe
from mwt.structs import Batch

module = importlib.import_module("data_pipes.augment")  # the package has a function of this name


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def image_batch(images: torch.Tensor, first: int = 0) -> Batch:
    positions = torch.arange(first, first + len(images))
    return Batch(labels=torch.zeros_like(positions), positions=positions, images=images)


def images_of(batch: Batch) -> torch.Tensor:
    assert batch.images is not None
    return batch.images


@pytest.mark.parametrize("padding", [0, 1, 4])
def test_crop_equals_torchvision(padding: int) -> None:
    """Every offset, on an image that is not square."""
    height, width = 5, 7
    span = range(2 * padding + 1)
    cases = [(top, left, flip) for top in span for left in span for flip in (False, True)]
    images = noise(len(cases), 3, height, width)
    offsets = torch.tensor([case[:2] for case in cases])
    result = crop_and_flip(images, offsets, torch.tensor([case[2] for case in cases]), padding)
    for image, (top, left, flip), found in zip(images, cases, result, strict=True):
        expected = v2f.crop(v2f.pad(image, [padding], padding_mode="reflect"), top, left, height, width)
        assert torch.equal(found, v2f.horizontal_flip(expected) if flip else expected)


@pytest.mark.parametrize(("kind", "flips"), [("crop", False), ("crop_flip", True)])
def test_crop_draws_every_offset_alike(kind: str, flips: bool) -> None:
    """The offset is read off an image whose pixels are their own numbers."""
    count, size, padding = 5000, 9, 2
    image = torch.arange(size * size, dtype=torch.uint8).reshape(1, 1, size, size)
    result = images_of(augment(image_batch(image.expand(count, -1, -1, -1)), kind, seed=1, epoch=2, padding=padding))
    centre = result[:, 0, 4, 4].long()
    counts = torch.bincount((centre // size - 2) * 5 + centre % size - 2, minlength=25)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    flipped = (result[:, 0, 4, 5] < result[:, 0, 4, 3]).float().mean().item()
    assert flipped == pytest.approx(0.5, abs=0.03) if flips else flipped == 0


def smooth(count: int, height: int, width: int) -> torch.Tensor:
    return v2.Resize((height, width), antialias=True)(noise(count, 3, height // 8, width // 8, seed=3))


@pytest.mark.parametrize(("height", "width"), [(48, 48), (44, 60)])
def test_affine_flip_equals_torchvision(height: int, width: int) -> None:
    """Within two grey levels: torchvision rounds to whole levels after the rotation and again after resizing (at most
    half a level each, and its uint8 resizing has weights of limited precision), here it is rounded once. At the border
    where black comes in from outside nothing differs either, as both mix with zeros."""
    images = smooth(6, height, width)
    degrees = torch.tensor([0.0, 30.0, -30.0, 11.3, -4.0, 25.0])
    boxes = torch.tensor(
        [
            [0, 0, height, width], [0, 0, height, width], [3, 2, height - 4, width - 3],
            [1, 5, height - 2, width - 5], [4, 0, height - 4, width], [0, 3, height - 1, width - 3],
        ]
    )  # fmt: skip
    flip = torch.tensor([False, True, False, True, False, True])
    result = rotate_crop_flip(images, degrees, boxes, flip)
    for image, angle, box, mirrored, found in zip(images, degrees, boxes, flip, result, strict=True):
        expected = v2f.pad(image, [module.AFFINE_PADDING], padding_mode="reflect")
        expected = v2f.rotate(expected, angle.item(), interpolation=v2.InterpolationMode.BILINEAR)
        expected = v2f.center_crop(expected, [height, width])
        expected = v2f.resized_crop(expected, *box.tolist(), size=[height, width], antialias=True)
        if mirrored:
            expected = v2f.horizontal_flip(expected)
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= 2
        assert difference.float().mean() < 0.5
    assert torch.equal(result[0], images[0])


def test_affine_flip_draws_within_its_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []

    def record(images: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        seen.append(parameters)
        return images

    monkeypatch.setattr(module, "rotate_crop_flip", record)
    augment(image_batch(noise(1, 1, 60, 50).expand(2000, -1, -1, -1)), "affine_flip", seed=0, epoch=0)
    degrees, boxes, flip = seen[0]
    assert stats.kstest(degrees.numpy(), stats.uniform(-30, 60).cdf).pvalue > 1e-3
    top, left, height, width = boxes.T
    assert (torch.stack([top, left, height, width]) >= 0).all()
    assert ((top + height <= 60) & (left + width <= 50)).all()
    area = height * width / 3000
    assert 0.78 < area.min() < 0.82
    assert 0.95 < area.max() <= 1
    assert flip.float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_crop_boxes_follow_torchvision() -> None:
    """Same distribution as RandomResizedCrop.get_params (two-sample test), and its fallback for long images."""
    count = 1000
    numbers = torch.rand(count, 22, generator=torch.Generator().manual_seed(0))
    ours = crop_boxes(numbers[:, :2], numbers[:, 2:].unflatten(1, (-1, 2)), 64, 48)
    transform = v2.RandomResizedCrop((64, 48), scale=(0.8, 1.0))
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    theirs = [transform.make_params([torch.empty(3, 64, 48)]) for _ in range(count)]
    torch.random.set_rng_state(state)
    for column, name in enumerate(("top", "left", "height", "width")):
        sample = [parameters[name] for parameters in theirs]
        assert stats.ks_2samp(ours[:, column].numpy(), sample).pvalue > 1e-3, name
    for height, width in ((10, 100), (100, 10)):
        boxes = crop_boxes(numbers[:5, :2], numbers[:5, 2:].unflatten(1, (-1, 2)), height, width)
        parameters = transform.make_params([torch.empty(3, height, width)])
        assert boxes.tolist() == [[parameters[name] for name in ("top", "left", "height", "width")]] * 5


def test_points_are_scaled_with_their_distances() -> None:
    """The distance to a sphere of radius 1 becomes the distance to a sphere of the scaled radius."""
    directions = torch.randn(200, 6, 3, generator=torch.Generator().manual_seed(0))
    directions = directions / directions.norm(dim=-1, keepdim=True)
    coords = directions * torch.linspace(0.2, 2, 6)[:, None]
    values = (coords.norm(dim=-1, keepdim=True) - 1).abs()
    positions = torch.arange(200)
    batch = Batch(labels=torch.zeros_like(positions), positions=positions, coords=coords, values=values)
    result = augment(batch, "points", seed=0, epoch=0)
    assert result.coords is not None
    assert result.values is not None
    factor = result.coords.norm(dim=-1) / coords.norm(dim=-1)
    assert (factor - factor[:, :1]).abs().max() < 1e-5
    assert 0.9 <= factor.min() < 0.91
    assert 1.09 < factor.max() < 1.1 + 1e-5
    expected = (result.coords.norm(dim=-1) - factor).abs()
    assert torch.allclose(result.values[..., 0], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["crop", "crop_flip", "affine_flip"])
def test_depends_on_seed_epoch_and_position_only(kind: str) -> None:
    images = noise(6, 3, 48, 48)
    whole = images_of(augment(image_batch(images), kind, seed=1, epoch=1))
    half = images_of(augment(image_batch(images[3:], first=3), kind, seed=1, epoch=1))
    assert torch.equal(whole[3:], half)
    assert not torch.equal(whole, images_of(augment(image_batch(images), kind, seed=2, epoch=1)))
    assert not torch.equal(whole, images_of(augment(image_batch(images), kind, seed=1, epoch=2)))
    assert whole.dtype == torch.uint8
    assert whole.shape == images.shape


def test_none_changes_nothing() -> None:
    batch = image_batch(noise(2, 1, 3, 3))
    assert augment(batch, "none", seed=0, epoch=0) is batch


def test_errors() -> None:
    batch = image_batch(noise(2, 1, 8, 4))
    with pytest.raises(InputError, match=r"^Images of 8 x 4 are too small .* pads by 4 pixels by reflection"):
        augment(batch, "crop", seed=0, epoch=0)
    with pytest.raises(InputError, match=r"^Images of 8 x 4 are too small .* pads by 40 pixels"):
        augment(batch, "affine_flip", seed=0, epoch=0)
    with pytest.raises(InputError, match=r"data\.augment=swirl is not known; choose one of none, crop, crop_flip"):
        augment(batch, "swirl", seed=0, epoch=0)
    with pytest.raises(InputError, match=r"data\.augment=points is for point sets"):
        augment(batch, "points", seed=0, epoch=0)
    points = Batch(
        labels=batch.labels, positions=batch.positions, coords=torch.zeros(2, 3, 3), values=torch.zeros(2, 3, 1)
    )
    with pytest.raises(InputError, match=r"data\.augment=crop is for images"):
        augment(points, "crop", seed=0, epoch=0)
    assert math.isclose(module.CROP_RATIO[0] * module.CROP_RATIO[1], 1)


def test_coords_moves_the_coordinates_and_leaves_the_pixels() -> None:
    images = torch.randint(0, 256, (5, 1, 6, 8), dtype=torch.uint8)
    plain = Batch(images=images, labels=torch.zeros(5, dtype=torch.int64), positions=torch.arange(5))
    moved = augment(plain, "coords", seed=0, epoch=3)
    assert torch.equal(moved.images, images)
    seen = observe(moved, InnerLoopConfig(), seed=0)
    assert torch.equal(seen.coords, moved.coords)
    regular = observe(plain, InnerLoopConfig(), seed=0)
    assert torch.equal(seen.values, regular.values)
    # an affine map: the same one for all pixels of an image, within the announced ranges
    design = np.concatenate([regular.coords.numpy(), np.ones((48, 1))], 1)
    for coords in moved.coords.numpy():
        solution, residual, *_ = np.linalg.lstsq(design, coords, rcond=None)
        assert residual.max() < 1e-10
        assert np.abs(solution[2]).max() <= 0.1 + 1e-6
        stretch = np.linalg.norm(solution[:2], axis=1)  # rows: images of the unit vectors before the rotation
        assert (np.abs(stretch - 1) <= 0.1 + 1e-6).all()
        degrees = np.degrees(np.arctan2(solution[0, 1], solution[0, 0]))
        assert abs(degrees) <= 15 + 1e-4
    half = augment(
        Batch(images=images[3:], labels=plain.labels[3:], positions=plain.positions[3:]), "coords", seed=0, epoch=3
    )
    assert torch.equal(half.coords, moved.coords[3:])
    assert not torch.equal(augment(plain, "coords", seed=0, epoch=4).coords, moved.coords)


def test_warp_turns_by_the_given_angle() -> None:
    turned = warp_coords(
        torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        angle=torch.tensor([np.pi / 2]),
        scale=torch.ones(1, 2),
        shift=torch.tensor([[0.0, 0.5]]),
    )
    assert torch.allclose(turned[0], torch.tensor([[0.0, 1.5], [-1.0, 0.5]]), atol=1e-6)


def test_the_paper_s_paddings_and_ranges() -> None:
    """The released code's: reflect padding of 4 for small images; 40, 30 degrees and 0.8 to 1 of the area for large."""
    assert (module.AFFINE_PADDING, module.MAX_DEGREES, module.CROP_AREA) == (40, 30.0, (0.8, 1.0))
    assert module.POINT_SCALE == (0.9, 1.1)
    result = augment(image_batch(noise(1, 1, 9, 9)), "crop", seed=0, epoch=0)
    assert torch.equal(
        images_of(result), images_of(augment(image_batch(noise(1, 1, 9, 9)), "crop", seed=0, epoch=0, padding=4))
    )


def test_layouts_give_equal_pixels() -> None:
    """Batches come with the channels of a pixel together; for what is computed that makes no difference."""
    images = noise(4, 3, 48, 48)
    together = images.contiguous(memory_format=torch.channels_last)
    for kind in ("crop_flip", "affine_flip"):
        one, two = (images_of(augment(image_batch(x), kind, seed=0, epoch=0)) for x in (images, together))
        assert torch.equal(one, two)


def test_surfaces_are_scaled_then_jittered() -> None:
    """Against the released code's order: one factor a shape, then normal noise of 0.01 for each point."""
    surface = torch.rand(40, 500, 3) * 2 - 1
    batch = Batch(labels=torch.zeros(40, dtype=torch.int64), positions=torch.arange(40), coords=surface)
    moved = augment(batch, "points", seed=3, epoch=2)
    assert moved.coords is not None
    assert moved.values is None
    factor = (moved.coords * surface).sum((1, 2)) / surface.square().sum((1, 2))  # least squares
    assert 0.9 <= factor.min() < 0.93
    assert 1.07 < factor.max() <= 1.1
    noise = ((moved.coords - factor[:, None, None] * surface) / 0.01).flatten().numpy()
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    alone = augment(batch.to(torch.device("cpu")), "points", seed=3, epoch=2)
    assert torch.equal(alone.coords, moved.coords)  # type: ignore[arg-type]
    assert not torch.equal(augment(batch, "points", seed=3, epoch=3).coords, moved.coords)  # type: ignore[arg-type]
