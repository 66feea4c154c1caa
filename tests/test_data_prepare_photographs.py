"""Photographs and mosaics are made of scikit-image's pixels and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipes.prepare.__main__ import main
from data_pipes.prepare.photographs import BLOCK, NAMES, make, make_mosaic
from mwt.errors import InputError

skimage = pytest.importorskip("skimage.data")


def test_photographs_are_the_middle_of_scikit_images(tmp_path: Path) -> None:
    folder = make(tmp_path / "photographs", (200, 128))
    assert sorted(path.stem for path in folder.iterdir()) == sorted(NAMES)
    found = np.asarray(Image.open(folder / "coffee.png"))  # 400 x 600
    np.testing.assert_array_equal(found, skimage.coffee()[100:300, 236:364])


def test_a_mosaic_is_of_blocks_in_eight_positions(tmp_path: Path) -> None:
    made = make_mosaic(tmp_path, (1024, 512))
    picture = np.asarray(Image.open(made))
    assert picture.shape == (1024, 512, 3)
    sources = [skimage.astronaut(), skimage.hubble_deep_field(), skimage.coffee(), skimage.rocket()]
    sources += [skimage.chelsea(), np.asarray(Image.open(Path(skimage.__file__).parent / "motorcycle_left.png"))]
    known = set()
    for source in sources:
        for top in range(0, source.shape[0] - BLOCK + 1, BLOCK):
            for left in range(0, source.shape[1] - BLOCK + 1, BLOCK):
                block = source[top : top + BLOCK, left : left + BLOCK]
                for turned in (block, block.transpose(1, 0, 2)):
                    for rows in (turned, turned[::-1]):
                        known |= {rows.tobytes(), rows[:, ::-1].tobytes()}
    found = [
        picture[top : top + BLOCK, left : left + BLOCK].tobytes()
        for top in range(0, 1024, BLOCK)
        for left in range(0, 512, BLOCK)
    ]
    assert set(found) <= known
    assert len(set(found)) == len(found)
    assert make_mosaic(tmp_path / "again", (1024, 512)).read_bytes() == made.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mosaic", "--size", "1000"], "multiples of 256"),
        (["mosaic", "--size", "32768"], "multiples of 256, to 16384"),
        (["photographs", "--size", "512"], "at most 300x451 in common"),
    ],
)
def test_sizes_that_will_not_do(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        main([*words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
