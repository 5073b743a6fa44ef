"""The twenty objects of the canvas: outlines in a unit box, painted part by part.

An object is a function of the coordinates x (right) and y (down), both in [-1, 1] inside its box; it returns its parts in the order in
which they are painted: (label, where). Labels: 1 body, 2 second colour, 3 dark detail; 0 cuts a hole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Parts = list[tuple[int, Mask]]

HOLE, BODY, SECOND, DETAIL = 0, 1, 2, 3


def ellipse(x: Array, y: Array, cx: float, cy: float, rx: float, ry: float, degrees: float = 0.0) -> Mask:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    u, v = (x - cx) * c + (y - cy) * s, (y - cy) * c - (x - cx) * s
    return (u / rx) ** 2 + (v / ry) ** 2 <= 1


def box(x: Array, y: Array, left: float, top: float, right: float, bottom: float) -> Mask:
    return (x >= left) & (x <= right) & (y >= top) & (y <= bottom)


def stroke(x: Array, y: Array, x0: float, y0: float, x1: float, y1: float, radius: float) -> Mask:
    """A line with round ends."""
    dx, dy = x1 - x0, y1 - y0
    t = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
    return (x - x0 - t * dx) ** 2 + (y - y0 - t * dy) ** 2 <= radius**2


def polygon(x: Array, y: Array, corners: Sequence[tuple[float, float]]) -> Mask:
    """Inside by the even-odd rule."""
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def apple(x: Array, y: Array) -> Parts:
    body = ellipse(x, y, -0.3, 0.2, 0.55, 0.68) | ellipse(x, y, 0.3, 0.2, 0.55, 0.68)
    return [
        (BODY, body),
        (DETAIL, stroke(x, y, 0.0, -0.4, 0.1, -0.9, 0.08)),
        (SECOND, ellipse(x, y, 0.42, -0.72, 0.36, 0.16, -25)),
    ]


def boat(x: Array, y: Array) -> Parts:
    return [
        (DETAIL, box(x, y, -0.06, -0.95, 0.06, 0.4)),
        (SECOND, polygon(x, y, [(0.12, -0.9), (0.85, 0.25), (0.12, 0.25)])),
        (SECOND, polygon(x, y, [(-0.12, -0.65), (-0.12, 0.25), (-0.7, 0.25)])),
        (BODY, polygon(x, y, [(-0.95, 0.38), (0.95, 0.38), (0.6, 0.9), (-0.6, 0.9)])),
    ]


def butterfly(x: Array, y: Array) -> Parts:
    m = np.abs(x)
    return [
        (BODY, ellipse(m, y, 0.52, -0.38, 0.46, 0.5, -25) | ellipse(m, y, 0.42, 0.45, 0.36, 0.42, 25)),
        (SECOND, ellipse(m, y, 0.56, -0.4, 0.22, 0.24) | ellipse(m, y, 0.45, 0.48, 0.15, 0.18)),
        (DETAIL, ellipse(x, y, 0, 0.05, 0.1, 0.7) | stroke(m, y, 0.0, -0.5, 0.25, -0.95, 0.05)),
    ]


def cactus(x: Array, y: Array) -> Parts:
    return [
        (
            BODY,
            stroke(x, y, 0, -0.7, 0, 0.6, 0.24)
            | stroke(x, y, -0.62, -0.25, -0.62, 0.15, 0.15)
            | stroke(x, y, -0.62, 0.15, 0, 0.15, 0.14)
            | stroke(x, y, 0.62, -0.5, 0.62, -0.05, 0.15)
            | stroke(x, y, 0.62, -0.05, 0, -0.05, 0.14),
        ),
        (SECOND, polygon(x, y, [(-0.55, 0.5), (0.55, 0.5), (0.4, 0.97), (-0.4, 0.97)])),
        (DETAIL, box(x, y, -0.04, -0.75, 0.04, 0.42)),
    ]


def car(x: Array, y: Array) -> Parts:
    m = np.abs(x)
    return [
        (BODY, polygon(x, y, [(-0.55, -0.1), (-0.35, -0.55), (0.35, -0.55), (0.58, -0.1)])),
        (BODY, box(x, y, -0.95, -0.12, 0.95, 0.38)),
        (SECOND, polygon(m, y, [(0.06, -0.12), (0.06, -0.43), (0.29, -0.43), (0.42, -0.12)])),
        (DETAIL, ellipse(m, y, 0.52, 0.4, 0.27, 0.27)),
        (SECOND, ellipse(m, y, 0.52, 0.4, 0.12, 0.12)),
    ]


def cat(x: Array, y: Array) -> Parts:
    m = np.abs(x)
    return [
        (BODY, polygon(m, y, [(0.08, -0.4), (0.68, -0.97), (0.8, 0.0)])),
        (SECOND, polygon(m, y, [(0.4, -0.5), (0.62, -0.8), (0.68, -0.35)])),
        (BODY, ellipse(x, y, 0, 0.15, 0.85, 0.72)),
        (DETAIL, ellipse(m, y, 0.35, 0.02, 0.13, 0.17)),
        (SECOND, ellipse(x, y, 0, 0.48, 0.34, 0.22)),
        (DETAIL, polygon(x, y, [(-0.13, 0.32), (0.13, 0.32), (0, 0.5)])),
    ]


def crown(x: Array, y: Array) -> Parts:
    m = np.abs(x)
    return [
        (BODY, polygon(m, y, [(-0.1, 0.7), (0.8, 0.7), (0.92, -0.5), (0.45, 0.08), (0.0, -0.7), (-0.1, -0.5)])),
        (SECOND, box(x, y, -0.8, 0.42, 0.8, 0.75)),
        (DETAIL, ellipse(m, y, 0.92, -0.55, 0.14, 0.14) | ellipse(x, y, 0, -0.75, 0.15, 0.15)),
        (DETAIL, ellipse(m, y, 0.45, 0.58, 0.1, 0.1) | ellipse(x, y, 0, 0.58, 0.1, 0.1)),
    ]


def cup(x: Array, y: Array) -> Parts:
    return [
        (BODY, ellipse(x, y, 0.5, 0.2, 0.46, 0.38)),
        (HOLE, ellipse(x, y, 0.5, 0.2, 0.26, 0.2)),
        (BODY, polygon(x, y, [(-0.75, -0.3), (0.5, -0.3), (0.35, 0.75), (-0.6, 0.75)])),
        (SECOND, box(x, y, -0.72, 0.05, 0.46, 0.3)),
        (DETAIL, ellipse(x, y, -0.125, 0.82, 0.8, 0.12)),
        (DETAIL, stroke(x, y, -0.35, -0.85, -0.35, -0.5, 0.06) | stroke(x, y, 0.1, -0.85, 0.1, -0.5, 0.06)),
    ]


def fish(x: Array, y: Array) -> Parts:
    return [
        (SECOND, polygon(x, y, [(0.4, 0.0), (0.97, -0.6), (0.85, 0.0), (0.97, 0.6)])),
        (SECOND, polygon(x, y, [(-0.3, -0.3), (0.05, -0.8), (0.35, -0.25)])),
        (BODY, ellipse(x, y, -0.18, 0.0, 0.76, 0.48)),
        (DETAIL, ellipse(x, y, -0.6, -0.1, 0.1, 0.1)),
        (SECOND, polygon(x, y, [(-0.15, 0.0), (0.25, -0.14), (0.25, 0.24)])),
    ]


def flower(x: Array, y: Array) -> Parts:
    petals = np.zeros(x.shape, dtype=bool)
    for angle in range(0, 360, 60):
        a = np.radians(angle + 30)
        petals |= ellipse(x, y, 0.4 * float(np.cos(a)), -0.35 + 0.4 * float(np.sin(a)), 0.25, 0.25)
    return [
        (DETAIL, box(x, y, -0.09, -0.2, 0.09, 0.97)),
        (DETAIL, ellipse(x, y, 0.34, 0.6, 0.32, 0.16, -30)),
        (BODY, petals),
        (SECOND, ellipse(x, y, 0, -0.35, 0.24, 0.24)),
    ]


def guitar(x: Array, y: Array) -> Parts:
    # Laid on a diagonal: its own axis is u.
    u, v = (x + y) / np.sqrt(2), (y - x) / np.sqrt(2)
    return [
        (DETAIL, box(u, v, -1.2, -0.11, 0.1, 0.11) | box(u, v, -1.3, -0.2, -1.0, 0.2)),
        (BODY, ellipse(u, v, 0.12, 0, 0.36, 0.4) | ellipse(u, v, 0.62, 0, 0.46, 0.55)),
        (SECOND, ellipse(u, v, 0.3, 0, 0.2, 0.2)),
        (DETAIL, box(u, v, 0.72, -0.22, 0.84, 0.22)),
    ]


def house(x: Array, y: Array) -> Parts:
    return [
        (DETAIL, box(x, y, 0.38, -0.85, 0.6, -0.3)),
        (BODY, box(x, y, -0.68, -0.1, 0.68, 0.92)),
        (SECOND, polygon(x, y, [(-0.95, -0.08), (0.0, -0.92), (0.95, -0.08)])),
        (DETAIL, box(x, y, -0.18, 0.35, 0.18, 0.92)),
        (SECOND, box(np.abs(x), y, 0.32, 0.12, 0.55, 0.4)),
    ]


def key(x: Array, y: Array) -> Parts:
    return [
        (BODY, ellipse(x, y, -0.52, 0, 0.44, 0.44)),
        (HOLE, ellipse(x, y, -0.52, 0, 0.2, 0.2)),
        (BODY, box(x, y, -0.15, -0.12, 0.95, 0.12)),
        (SECOND, box(x, y, 0.75, 0.05, 0.92, 0.5) | box(x, y, 0.45, 0.05, 0.6, 0.4)),
    ]


def moon(x: Array, y: Array) -> Parts:
    crescent = ellipse(x, y, -0.05, 0, 0.88, 0.92) & ~ellipse(x, y, 0.4, -0.12, 0.72, 0.76)
    return [
        (BODY, crescent),
        (SECOND, (ellipse(x, y, -0.62, 0.05, 0.13, 0.15) | ellipse(x, y, -0.38, 0.55, 0.16, 0.13)) & crescent),
        (DETAIL, ellipse(x, y, -0.5, -0.42, 0.1, 0.1) & crescent),
    ]


def mushroom(x: Array, y: Array) -> Parts:
    cap = ellipse(x, y, 0, 0.05, 0.92, 0.9) & (y < 0.1)
    return [
        (SECOND, polygon(x, y, [(-0.26, 0.0), (0.26, 0.0), (0.36, 0.92), (-0.36, 0.92)])),
        (BODY, cap),
        (SECOND, (ellipse(x, y, -0.45, -0.2, 0.18, 0.17) | ellipse(x, y, 0.1, -0.5, 0.19, 0.17)) & cap),
        (SECOND, ellipse(x, y, 0.52, -0.15, 0.16, 0.15) & cap),
        (DETAIL, box(x, y, -0.7, 0.1, 0.7, 0.19)),
    ]


def rabbit(x: Array, y: Array) -> Parts:
    m = np.abs(x)
    return [
        (BODY, ellipse(m, y, 0.3, -0.5, 0.17, 0.48, 8)),
        (SECOND, ellipse(m, y, 0.3, -0.5, 0.08, 0.33, 8)),
        (BODY, ellipse(x, y, 0, 0.4, 0.62, 0.55)),
        (DETAIL, ellipse(m, y, 0.25, 0.25, 0.1, 0.12)),
        (DETAIL, ellipse(x, y, 0, 0.5, 0.11, 0.08)),
        (SECOND, box(x, y, -0.12, 0.58, 0.12, 0.8)),
    ]


def rocket(x: Array, y: Array) -> Parts:
    m = np.abs(x)
    return [
        (DETAIL, polygon(m, y, [(-0.01, 0.5), (0.22, 0.5), (0.0, 0.97), (-0.01, 0.97)])),
        (SECOND, polygon(m, y, [(0.2, 0.1), (0.68, 0.72), (0.2, 0.55)])),
        (BODY, ellipse(x, y, 0, 0.0, 0.36, 0.98) & (y < 0.58)),
        (SECOND, ellipse(x, y, 0, 0.0, 0.36, 0.98) & (y < -0.55)),
        (DETAIL, ellipse(x, y, 0, -0.15, 0.17, 0.17)),
    ]


def star(x: Array, y: Array) -> Parts:
    def points(outer: float, inner: float) -> list[tuple[float, float]]:
        turns = np.radians(np.arange(10) * 36 - 90)
        radii = np.where(np.arange(10) % 2, inner, outer)
        return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, turns, strict=True)]

    return [(BODY, polygon(x, y, points(0.98, 0.42))), (SECOND, polygon(x, y, points(0.5, 0.22)))]


def tree(x: Array, y: Array) -> Parts:
    return [
        (DETAIL, box(x, y, -0.14, 0.5, 0.14, 0.97)),
        (BODY, polygon(x, y, [(0, -0.2), (0.78, 0.65), (-0.78, 0.65)])),
        (SECOND, polygon(x, y, [(0, -0.6), (0.64, 0.2), (-0.64, 0.2)])),
        (BODY, polygon(x, y, [(0, -0.97), (0.48, -0.25), (-0.48, -0.25)])),
    ]


def umbrella(x: Array, y: Array) -> Parts:
    canopy = ellipse(x, y, 0, 0.0, 0.95, 0.85) & (y < 0.0)
    for cx in (-0.63, 0.0, 0.63):
        canopy &= ~ellipse(x, y, cx, 0.03, 0.3, 0.14)
    hook = ellipse(x, y, 0.22, 0.68, 0.33, 0.31) & ~ellipse(x, y, 0.22, 0.68, 0.1, 0.1) & (y > 0.68)
    return [
        (DETAIL, box(x, y, -0.11, -0.97, 0.11, 0.7) | hook),
        (BODY, canopy),
        (SECOND, canopy & (np.abs(x) < 0.32)),
    ]


SHAPES: dict[str, Callable[[Array, Array], Parts]] = {
    "Apple": apple,
    "Boat": boat,
    "Butterfly": butterfly,
    "Cactus": cactus,
    "Car": car,
    "Cat": cat,
    "Crown": crown,
    "Cup": cup,
    "Fish": fish,
    "Flower": flower,
    "Guitar": guitar,
    "House": house,
    "Key": key,
    "Moon": moon,
    "Mushroom": mushroom,
    "Rabbit": rabbit,
    "Rocket": rocket,
    "Star": star,
    "Tree": tree,
    "Umbrella": umbrella,
}


def label_map(
    name: str, pixels: int, *, centre: tuple[float, float], scale: float, degrees: float
) -> npt.NDArray[np.uint8]:
    """The painted object as labels uint8 [pixels, pixels]: 0 background, 1 body, 2 second colour, 3 detail.

    Args:
        centre: of the object, in [-1, 1] of the picture, right and down.
        scale: half the size of its box, as a share of half the picture.
    """
    axis = (np.arange(pixels, dtype=np.float32) + 0.5) * (2 / pixels) - 1
    x, y = np.meshgrid((axis - centre[0]) / scale, (axis - centre[1]) / scale)
    c, s = np.float32(np.cos(np.radians(degrees))), np.float32(np.sin(np.radians(degrees)))
    x, y = x * c + y * s, y * c - x * s
    labels = np.zeros((pixels, pixels), dtype=np.uint8)
    for label, where in SHAPES[name](x, y):
        labels[where] = label
    return labels
