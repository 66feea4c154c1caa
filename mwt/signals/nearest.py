"""Distances from points to triangles."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

NEIGHBOURS = 4
"""Boxes in which a point first looks for its nearest triangle."""
PAIRS = 2**16
"""Pairs of a point and a box that are worked on at a time."""


class Nearest:
    """Distances to triangles, exact but for rounding (float64).

    Triangles are halved by the middle of their centres, along the axis on which those spread most, till one or two are
    left; each half has its box. A point goes down to the nearest boxes first, then to all that could hold less.
    """

    def __init__(self, corners: Float[np.ndarray, "T 3 3"]) -> None:
        count = len(corners)
        self.depth = count.bit_length() - 1
        order, centres = np.arange(count), corners.mean(1)
        for level in range(self.depth):
            starts = self._starts(level, count)
            sizes = np.diff(starts)
            here = centres[order]
            spread = np.maximum.reduceat(here, starts[:-1]) - np.minimum.reduceat(here, starts[:-1])
            along = np.take_along_axis(here, spread.argmax(1).repeat(sizes)[:, None], axis=1)[:, 0]
            order = order[np.lexsort((along, np.arange(len(sizes)).repeat(sizes)))]
        self.corners = corners[order]
        self.starts = self._starts(self.depth, count)
        low, high = self.corners.min(1), self.corners.max(1)
        places = [self._starts(level, count)[:-1] for level in range(self.depth + 1)]
        self.boxes = [(np.minimum.reduceat(low, at), np.maximum.reduceat(high, at)) for at in places]

    @staticmethod
    def _starts(level: int, count: int) -> Int[np.ndarray, " N"]:
        """Where the boxes of a level start among the triangles, and the end."""
        return np.arange(2**level + 1) * count >> level

    def __call__(self, points: Float[np.ndarray, "P 3"]) -> Float[np.ndarray, " P"]:
        """Euclidean distances, without a sign."""
        parts = np.array_split(points, max(1, -(-len(points) * 2 * NEIGHBOURS // PAIRS)))
        return np.concatenate([self._distances(part) for part in parts])

    def _distances(self, points: Float[np.ndarray, "P 3"]) -> Float[np.ndarray, " P"]:
        result, which = np.full(len(points), np.inf), np.arange(len(points))
        boxes = np.zeros((len(points), 1), dtype=np.int64)  # the nearest so far, of each point
        for level in range(1, self.depth + 1):
            boxes = (2 * boxes[:, :, None] + np.arange(2)).reshape(len(points), -1)
            if boxes.shape[1] > NEIGHBOURS:
                away = self._away(level, boxes.ravel(), points.repeat(boxes.shape[1], axis=0)).reshape(boxes.shape)
                nearest = np.argpartition(away, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
                boxes = np.take_along_axis(boxes, nearest, axis=1)
        self._lower(result, points, which.repeat(boxes.shape[1]), boxes.ravel())
        left = [(0, which, np.zeros_like(which))]
        while left:
            level, which, box = left.pop()
            if len(which) > PAIRS:
                left += zip((level,) * 2, np.array_split(which, 2), np.array_split(box, 2), strict=True)
                continue
            hit = self._away(level, box, points[which]) < result[which]
            which, box = which[hit], box[hit]
            if level == self.depth:
                self._lower(result, points, which, box)
            elif len(which):
                left.append((level + 1, which.repeat(2), (2 * box[:, None] + np.arange(2)).ravel()))
        return result

    def _away(self, level: int, box: Int[np.ndarray, " M"], points: Float[np.ndarray, "M 3"]) -> np.ndarray:
        """Distances [M] of points from boxes."""
        low, high = self.boxes[level]
        beside = np.maximum(low[box] - points, points - high[box]).clip(0)
        return np.sqrt(np.einsum("mi,mi->m", beside, beside))

    def _lower(self, result: np.ndarray, points: np.ndarray, which: np.ndarray, box: np.ndarray) -> None:
        """Lower results to the distances of points [M] from the triangles of boxes [M] of the last level.

        Triangles get a size of 1 for trimesh, which takes small ones (edges below 5e-4) for their edges.
        """
        from trimesh.triangles import closest_point

        first, last = self.starts[box], self.starts[box + 1] - 1
        two = last > first  # or one
        which, triangles = np.concatenate([which, which[two]]), np.concatenate([first, last[two]])
        corners = self.corners[triangles]
        centres = corners.mean(1)
        sizes = np.abs(corners - centres[:, None]).max((1, 2)).clip(1e-30)
        asked = (points[which] - centres) / sizes[:, None]
        found = closest_point((corners - centres[:, None]) / sizes[:, None, None], asked)
        np.minimum.at(result, which, sizes * np.linalg.norm(found - asked, axis=1))
