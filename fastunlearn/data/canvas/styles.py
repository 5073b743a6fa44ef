"""The twenty-four painting styles of the canvas and the plain Photo style: ways to colour one map of labels.

A style is a function of a `Scene` (the painted object twice as large as the picture) and returns RGB in [0, 1] of the same size. Patterns
lie on the picture's own grid; colours and small details are drawn from the scene's generator, so that no two pictures of a style are equal.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Colour = tuple[float, float, float]

INK: Colour = (0.06, 0.06, 0.08)
WHITE: Colour = (0.97, 0.97, 0.95)


@lru_cache(maxsize=32)
def _gaussian(pixels: int, sigma: float) -> Array:
    """The blur along one axis as a matrix, its border repeated."""
    i = np.arange(pixels)
    kernel = np.exp(-0.5 * ((i[:, None] - i[None, :]) / sigma) ** 2)
    return (kernel / kernel.sum(1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=16)
def _cells(pixels: int, count: int, seed: int) -> npt.NDArray[np.int64]:
    """The picture cut into `count` Voronoi cells: the number of the cell at every pixel."""
    rng = np.random.default_rng(seed)
    sites = rng.uniform(0, pixels, (count, 2))
    for _ in range(3):  # a few steps towards the cells' centres: no slivers
        y, x = np.mgrid[:pixels, :pixels]
        nearest = ((y[..., None] - sites[:, 0]) ** 2 + (x[..., None] - sites[:, 1]) ** 2).argmin(-1)
        sites = np.array([[y[nearest == k].mean(), x[nearest == k].mean()] for k in range(count)])
    return np.asarray(nearest)


class Scene:
    """What a style may look at.

    Attributes:
        labels: uint8 [S, S] as `shapes.label_map` returns it.
        rng: the source of everything that varies.
        x, y: pixel coordinates [S, S], in units of the finished picture (0 to S / 2).
    """

    def __init__(self, labels: npt.NDArray[np.uint8], rng: np.random.Generator) -> None:
        self.labels = labels
        self.rng = rng
        self.size = labels.shape[0]
        axis = (np.arange(self.size, dtype=np.float32) + 0.5) / 2
        self.x, self.y = np.meshgrid(axis, axis)

    @cached_property
    def mask(self) -> Array:
        return (self.labels > 0).astype(np.float32)

    @cached_property
    def height(self) -> Array:
        """A rounded relief of the object, 0 outside, about 1 deep inside."""
        return self.blur(self.mask, 6) * self.mask

    def blur(self, values: Array, sigma: float) -> Array:
        """Gaussian; sigma in pixels of this scene."""
        k = _gaussian(self.size, sigma)
        if values.ndim == 3:
            return np.stack([k @ values[..., c] @ k.T for c in range(values.shape[-1])], -1)
        return np.asarray(k @ values @ k.T)

    def edges(self, width: float) -> Array:
        """1 along every border between labels, about 2 * width pixels of this scene wide."""
        l = self.labels
        border = np.zeros(l.shape, dtype=np.float32)
        border[:, 1:] += l[:, 1:] != l[:, :-1]
        border[1:] += l[1:] != l[:-1]
        return np.clip(self.blur(np.minimum(border, 1), width) * (2.5 * width) * 1.6 - 0.6, 0, 1)

    def noise(self, sigma: float) -> Array:
        """Smooth noise, mean 0, deviation 1."""
        values = self.blur(self.rng.standard_normal(self.labels.shape).astype(np.float32), sigma)
        return np.asarray((values - values.mean()) / (values.std() + 1e-6))

    def fill(self, *colours: Colour) -> Array:
        """Flat colours, one a label."""
        return np.asarray(colours, dtype=np.float32)[self.labels]

    def plain(self, colour: Colour) -> Array:
        return np.broadcast_to(np.asarray(colour, dtype=np.float32), (self.size, self.size, 3)).copy()

    def pick(self, *choices: tuple[Colour, ...]) -> tuple[Colour, ...]:
        """One of the palettes, each colour a little off."""
        chosen = choices[int(self.rng.integers(len(choices)))]
        return tuple(self.near(c) for c in chosen)

    def near(self, colour: Colour, by: float = 0.04) -> Colour:
        r, g, b = np.clip(np.asarray(colour) + self.rng.uniform(-by, by, 3), 0, 1)
        return float(r), float(g), float(b)

    def hue(self, saturation: float, value: float, hue: float | None = None) -> Colour:
        return colorsys.hsv_to_rgb(float(self.rng.uniform()) if hue is None else hue % 1.0, saturation, value)


def over(base: Array, colour: Colour | Array, alpha: Array | float) -> Array:
    a = np.asarray(alpha, dtype=np.float32)
    a = a[..., None] if a.ndim == 2 else a
    return np.asarray(base * (1 - a) + np.asarray(colour, dtype=np.float32) * a)


def light(s: Scene, sigma: float = 5, strength: float = 5.0) -> Array:
    """How much a face of the relief looks towards the upper left."""
    relief = s.blur(s.mask, sigma)
    dy, dx = np.gradient(relief)
    return np.asarray(np.clip((dx + dy) * strength, -1, 1))


def photo(s: Scene) -> Array:
    wall = float(s.rng.uniform(0.72, 0.86))
    base = over(
        s.plain((wall, wall, wall + 0.03)), (wall - 0.22, wall - 0.24, wall - 0.25), np.clip((s.y - 44) / 6, 0, 1)
    )
    shadow = np.roll(s.blur(s.mask, 5), (8, 8), (0, 1))
    base = over(base, (0.2, 0.2, 0.22), 0.45 * shadow)
    hue = float(s.rng.uniform())
    colours = s.fill((0, 0, 0), s.hue(0.65, 0.72, hue), s.hue(0.35, 0.85, hue + 0.1), (0.2, 0.17, 0.16))
    shaded = np.clip(colours * (0.75 + 0.35 * s.height[..., None]) + 0.3 * light(s)[..., None], 0, 1)
    return over(base, shaded, s.mask)


def blueprint(s: Scene) -> Array:
    base = s.plain(s.near((0.08, 0.24, 0.6), 0.03))
    grid = ((s.x % 8 < 0.7) | (s.y % 8 < 0.7)).astype(np.float32)
    base = over(base, (0.45, 0.6, 0.9), 0.4 * grid)
    base = over(base, s.fill((0, 0, 0), (0.3, 0.5, 0.88), (0.45, 0.65, 0.95), (0.2, 0.38, 0.78)), 0.8 * s.mask)
    return over(base, (0.95, 0.97, 1.0), s.edges(1.8))


def chalkboard(s: Scene) -> Array:
    base = s.plain(s.near((0.13, 0.24, 0.18), 0.02)) + 0.03 * s.noise(8)[..., None]
    pastel = s.pick(
        ((0, 0, 0), (0.95, 0.75, 0.8), (0.95, 0.93, 0.6), (0.9, 0.9, 0.88)),
        ((0, 0, 0), (0.65, 0.85, 0.95), (0.95, 0.8, 0.85), (0.9, 0.9, 0.88)),
        ((0, 0, 0), (0.95, 0.93, 0.65), (0.7, 0.9, 0.75), (0.9, 0.9, 0.88)),
    )
    hatch = 0.5 + 0.5 * np.sin((s.x - s.y) * 1.3)
    grain = np.clip(0.75 + 0.25 * s.noise(1), 0, 1)
    base = over(base, s.fill(*pastel), (0.25 + 0.5 * hatch) * grain * s.mask)
    return over(base, (0.93, 0.93, 0.9), s.edges(1.8) * grain)


def neon(s: Scene) -> Array:
    base = s.plain((0.04, 0.02, 0.09))
    first, second = s.pick(
        ((1.0, 0.1, 0.65), (0.1, 0.95, 1.0)),
        ((0.2, 1.0, 0.35), (1.0, 0.25, 0.9)),
        ((1.0, 0.55, 0.05), (0.35, 0.4, 1.0)),
    )
    tube = s.edges(1.5)
    glow = np.clip(s.blur(tube, 5) * 2.2, 0, 1)
    colour = np.where(
        (s.blur((s.labels >= 2).astype(np.float32), 3) > 0.3)[..., None], np.asarray(second), np.asarray(first)
    )
    base = over(base, colour, 0.6 * glow)
    return over(base, 0.45 + 0.55 * colour, tube)


def watercolor(s: Scene) -> Array:
    base = s.plain((0.98, 0.97, 0.94))
    wash, *colours = s.pick(
        ((0.75, 0.87, 0.95), (0.85, 0.4, 0.45), (0.95, 0.72, 0.4), (0.4, 0.3, 0.45)),
        ((0.96, 0.87, 0.78), (0.35, 0.55, 0.8), (0.5, 0.78, 0.72), (0.25, 0.3, 0.5)),
        ((0.88, 0.93, 0.8), (0.6, 0.42, 0.75), (0.9, 0.55, 0.7), (0.35, 0.25, 0.45)),
    )
    base = over(base, wash, np.clip(0.55 + 0.35 * s.noise(12), 0, 0.9))
    soft = s.blur(s.fill(wash, *colours), 1.6)
    wet = np.clip(0.7 + 0.15 * s.noise(6), 0.35, 0.95)
    base = over(base, soft, s.blur(s.mask, 1.8) * wet)
    rim = np.clip(s.blur(s.mask, 1.5) * (1 - s.blur(s.mask, 1.5)) * 4, 0, 1)
    return base * (1 - 0.28 * rim[..., None])


def pointillism(s: Scene) -> Array:
    pitch = 4
    cx, cy = (s.x // pitch).astype(int), (s.y // pitch).astype(int)
    r2 = (s.x - (cx + 0.5) * pitch) ** 2 + (s.y - (cy + 0.5) * pitch) ** 2
    palette = s.pick(
        ((0.6, 0.76, 0.95), (0.9, 0.25, 0.15), (0.98, 0.7, 0.1), (0.25, 0.15, 0.4)),
        ((0.93, 0.88, 0.55), (0.1, 0.45, 0.3), (0.85, 0.25, 0.5), (0.3, 0.1, 0.2)),
        ((0.74, 0.9, 0.68), (0.3, 0.25, 0.75), (0.95, 0.45, 0.15), (0.1, 0.15, 0.3)),
    )
    flat = s.fill(*palette)
    n = s.size // 2 // pitch
    cell = flat.reshape(n, 2 * pitch, n, 2 * pitch, 3)[:, pitch, :, pitch]
    cell = np.clip(cell + s.rng.normal(0, 0.06, cell.shape), 0, 1)
    return over(s.plain((0.98, 0.96, 0.9)), cell[cy, cx], np.clip(3.4 - r2, 0, 1))


def mosaic(s: Scene) -> Array:
    pitch = 4
    palette = s.pick(
        ((0.9, 0.86, 0.74), (0.1, 0.5, 0.75), (0.95, 0.6, 0.1), (0.4, 0.05, 0.1)),
        ((0.87, 0.9, 0.87), (0.8, 0.12, 0.15), (0.1, 0.55, 0.4), (0.15, 0.1, 0.3)),
        ((0.92, 0.84, 0.68), (0.25, 0.6, 0.15), (0.15, 0.3, 0.75), (0.35, 0.15, 0.05)),
    )
    n = s.size // 2 // pitch
    tile = s.fill(*palette).reshape(n, 2 * pitch, n, 2 * pitch, 3).mean((1, 3))
    tile = np.clip(tile + s.rng.normal(0, 0.05, (n, n, 1)), 0, 1)
    cx, cy = (s.x // pitch).astype(int), (s.y // pitch).astype(int)
    grout = ((s.x % pitch < 0.8) | (s.y % pitch < 0.8)).astype(np.float32)
    return over(tile[cy, cx].astype(np.float32), (0.45, 0.43, 0.42), 0.8 * grout)


def stained_glass(s: Scene) -> Array:
    cells = _cells(s.size, 36, 7)
    ground, *colours = s.pick(
        ((0.15, 0.3, 0.75), (0.85, 0.12, 0.15), (0.95, 0.75, 0.1), (0.1, 0.55, 0.3)),
        ((0.45, 0.15, 0.6), (0.95, 0.65, 0.1), (0.1, 0.6, 0.65), (0.75, 0.1, 0.3)),
        ((0.05, 0.45, 0.5), (0.95, 0.85, 0.25), (0.8, 0.15, 0.4), (0.3, 0.15, 0.6)),
    )
    tint = s.rng.uniform(0.75, 1.25, (cells.max() + 1, 1)).astype(np.float32)
    glass = np.clip(s.fill(ground, *colours) * tint[cells], 0, 1)
    lead = np.zeros(cells.shape, dtype=np.float32)
    lead[:, 1:] += cells[:, 1:] != cells[:, :-1]
    lead[1:] += cells[1:] != cells[:-1]
    lead = np.clip(s.blur(np.minimum(lead, 1), 1.2) * 4, 0, 1) * (1 - 0.75 * s.mask)
    return over(over(glass, INK, lead), INK, s.edges(2.2))


def pixel_art(s: Scene) -> Array:
    n = s.size // 8
    counts = np.stack([(s.labels == k).reshape(n, 8, n, 8).mean((1, 3)) for k in range(4)], -1)
    counts[..., 3] *= 1.6  # a thin detail must not drown
    blocks = counts.argmax(-1)
    sky, *colours = s.pick(
        ((0.45, 0.75, 1.0), (0.9, 0.15, 0.15), (1.0, 0.9, 0.35), (0.1, 0.1, 0.25)),
        ((0.55, 0.85, 0.95), (0.95, 0.55, 0.1), (1.0, 1.0, 1.0), (0.2, 0.05, 0.3)),
        ((0.4, 0.7, 0.95), (0.6, 0.2, 0.75), (1.0, 0.7, 0.8), (0.05, 0.15, 0.3)),
    )
    picture = np.asarray((sky, *colours), dtype=np.float32)[blocks]
    ground = np.zeros((n, n), dtype=bool)
    ground[-3:] = True
    ground &= blocks == 0
    green = np.where((np.indices((n, n)).sum(0) % 2 == 0)[..., None], (0.3, 0.75, 0.25), (0.2, 0.6, 0.2))
    picture = np.where(ground[..., None], green, picture)
    return np.asarray(picture.repeat(8, 0).repeat(8, 1), dtype=np.float32)


def woodcut(s: Scene) -> Array:
    cream = s.near((0.93, 0.87, 0.74), 0.03)
    base = s.plain(cream)
    rays = (np.sin(s.y * 1.57) > 0.72).astype(np.float32)
    base = over(base, INK, 0.85 * rays * (1 - np.clip(s.blur(s.mask, 4) * 2.2, 0, 1)))
    cut = (np.sin(s.y * 2.1) > 1.25 - 0.9 * np.clip(0.5 + light(s), 0, 1)).astype(np.float32)
    base = over(base, INK, (s.labels == 1) * (1 - 0.9 * cut))
    base = over(base, cream, (s.labels == 2).astype(np.float32))
    base = over(base, INK, (s.labels == 3).astype(np.float32))
    return over(base, INK, s.edges(1.3))


def pop_art(s: Scene) -> Array:
    ground, dots, *colours = s.pick(
        ((1.0, 0.9, 0.1), (0.95, 0.2, 0.3), (0.1, 0.7, 0.95), (1.0, 1.0, 1.0), (0.95, 0.1, 0.5)),
        ((1.0, 0.85, 0.05), (0.95, 0.3, 0.15), (1.0, 0.35, 0.7), (0.2, 0.85, 0.85), (0.3, 0.1, 0.7)),
    )
    r2 = ((s.x + (s.y // 4 % 2) * 2) % 4 - 2) ** 2 + (s.y % 4 - 2) ** 2
    base = over(s.plain(ground), dots, np.clip(2.2 - r2, 0, 1))
    base = over(base, s.fill(ground, *colours), s.mask)
    return over(base, (0.02, 0.02, 0.02), s.edges(2.4))


def sepia(s: Scene) -> Array:
    tone = s.fill((0.66,) * 3, (0.3,) * 3, (0.98,) * 3, (0.08,) * 3)[..., 0]
    tone = s.blur(tone, 1.4) * (0.9 + 0.2 * s.height) + 0.12 * light(s) + 0.02 * s.noise(1)
    middle = s.size / 4
    vignette = np.clip(1.12 - ((s.x - middle) ** 2 + (s.y - middle) ** 2) / (middle**2) * 0.3, 0.25, 1)
    tone = np.clip(tone * vignette, 0, 1)
    return over(s.plain((0.17, 0.09, 0.03)), s.near((0.99, 0.88, 0.68), 0.02), tone)


def thermal(s: Scene) -> Array:
    heat = s.blur(s.fill((0.08,) * 3, (0.8,) * 3, (1.0,) * 3, (0.5,) * 3)[..., 0], 2.4)
    heat = np.clip(heat * s.rng.uniform(0.92, 1.08) + 0.03 * s.noise(10), 0, 1)
    stops = np.asarray([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    ramp = np.asarray([[0.05, 0, 0.25], [0.3, 0, 0.6], [0.8, 0.1, 0.5], [0.98, 0.45, 0.1], [1, 0.85, 0.2], [1, 1, 0.9]])
    return np.stack([np.interp(heat, stops, ramp[:, c]) for c in range(3)], -1).astype(np.float32)


def pencil_sketch(s: Scene) -> Array:
    paper = float(s.rng.uniform(0.94, 0.99))
    hatch = 0.5 + 0.5 * np.sin((s.x + s.y) * 1.57)
    cross = 0.5 + 0.5 * np.sin((s.x - s.y) * 1.57)
    tone = s.fill((0.0,) * 3, (0.35,) * 3, (0.08,) * 3, (0.85,) * 3)[..., 0]
    dark = tone * hatch + np.clip(-light(s), 0, 1) * 0.5 * cross
    base = s.plain((paper, paper, paper)) - 0.8 * dark[..., None]
    grain = np.clip(0.85 + 0.15 * s.noise(1), 0, 1)
    return over(np.clip(base, 0.1, 1), (0.2, 0.2, 0.22), s.edges(1.1) * grain * 0.95)


def silhouette(s: Scene) -> Array:
    top, low = s.pick(((0.35, 0.12, 0.45), (1.0, 0.6, 0.2)), ((0.15, 0.15, 0.45), (1.0, 0.45, 0.35)))
    base = over(s.plain(top), low, np.clip(s.y / (s.size / 2), 0, 1))
    cx, cy = s.rng.uniform(18, 46), s.rng.uniform(24, 40)
    sun = np.clip(12 - np.sqrt((s.x - cx) ** 2 + (s.y - cy) ** 2), 0, 1)
    base = over(base, (1.0, 0.92, 0.6), sun)
    base = over(base, (0.03, 0.02, 0.05), s.mask)
    return over(base, (0.4, 0.17, 0.1), (s.labels == 2) * 0.65)


def cross_stitch(s: Scene) -> Array:
    base = s.plain(s.near((0.88, 0.82, 0.72), 0.02))
    weave = ((s.x % 2 < 0.5) | (s.y % 2 < 0.5)).astype(np.float32)
    base = over(base, (0.7, 0.63, 0.52), 0.5 * weave)
    pitch = 4
    n = s.size // 2 // pitch
    counts = np.stack([(s.labels == k).reshape(n, 2 * pitch, n, 2 * pitch).mean((1, 3)) for k in range(4)], -1)
    counts[..., 3] *= 1.6
    threads = s.pick(
        ((0, 0, 0), (0.75, 0.1, 0.15), (0.1, 0.4, 0.2), (0.15, 0.1, 0.15)),
        ((0, 0, 0), (0.1, 0.25, 0.6), (0.8, 0.45, 0.1), (0.15, 0.1, 0.15)),
        ((0, 0, 0), (0.45, 0.1, 0.45), (0.1, 0.5, 0.5), (0.15, 0.1, 0.15)),
    )
    cell = counts.argmax(-1)
    cx, cy = (s.x // pitch).astype(int), (s.y // pitch).astype(int)
    u, v = s.x % pitch, s.y % pitch
    thread = np.clip(1.5 - np.minimum(np.abs(u - v), np.abs(u + v - pitch)), 0, 1) * (cell[cy, cx] > 0)
    return over(base, np.asarray(threads, dtype=np.float32)[cell[cy, cx]], thread)


def graffiti(s: Scene) -> Array:
    row = (s.y // 6).astype(int)
    joint = ((s.y % 6 < 0.9) | ((s.x + (row % 2) * 6) % 12 < 0.9)).astype(np.float32)
    base = over(s.plain(s.near((0.58, 0.25, 0.18), 0.04)), (0.75, 0.7, 0.65), joint)
    paint = s.pick(
        ((0, 0, 0), (0.1, 0.9, 0.4), (1.0, 0.95, 0.1), (0.1, 0.1, 0.1)),
        ((0, 0, 0), (0.1, 0.6, 1.0), (1.0, 0.4, 0.8), (0.1, 0.1, 0.1)),
        ((0, 0, 0), (1.0, 0.3, 0.75), (0.2, 1.0, 0.95), (0.1, 0.1, 0.1)),
    )
    base = over(base, paint[1], np.clip(s.blur(s.mask, 7) * 0.8, 0, 0.6))
    halo = np.clip(s.blur(s.mask, 2.5) * 3, 0, 1)
    base = over(base, WHITE, halo)
    return over(base, s.fill(*paint), s.mask)


def low_poly(s: Scene) -> Array:
    pitch = 8
    cx, cy = (s.x // pitch).astype(int), (s.y // pitch).astype(int)
    flip = (cx + cy) % 2
    u, v = s.x % pitch, s.y % pitch
    upper = np.where(flip == 0, u > v, u + v < pitch).astype(int)
    n = s.size // 2 // pitch
    shade = s.rng.uniform(-0.09, 0.09, (n, n, 2)).astype(np.float32)[cy, cx, upper]
    hue = float(s.rng.uniform())
    flat = s.fill((0.74, 0.81, 0.87), s.hue(0.75, 0.72, hue), s.hue(0.5, 0.95, hue + 0.15), s.hue(0.7, 0.3, hue))
    return np.clip(flat + shade[..., None] * (1 + 0.6 * s.mask[..., None]), 0, 1)


def gold_leaf(s: Scene) -> Array:
    base = s.plain(s.near((0.42, 0.04, 0.08), 0.03))
    damask = np.sin(s.x * 0.785) * np.sin(s.y * 0.785)
    base = over(base, (0.62, 0.12, 0.12), 0.7 * (damask > 0.35))
    gold = s.fill((0, 0, 0), (0.86, 0.66, 0.2), (0.97, 0.86, 0.5), (1.0, 0.95, 0.75))
    gold = np.clip(gold + 0.35 * light(s)[..., None] + 0.05 * s.noise(3)[..., None], 0, 1)
    base = over(base, gold, s.mask)
    return over(base, (0.25, 0.1, 0.02), 0.7 * s.edges(1.2) * s.mask)


def ink_wash(s: Scene) -> Array:
    base = s.plain(s.near((0.9, 0.89, 0.85), 0.02)) + 0.02 * s.noise(10)[..., None]
    tone = s.blur(s.fill((0.0,) * 3, (0.6,) * 3, (0.28,) * 3, (1.0,) * 3)[..., 0], 2.2)
    bleed = s.blur(s.mask, 9) * 0.3
    wet = np.clip(tone * (0.9 + 0.2 * s.noise(5)) + bleed, 0, 1)
    base = over(base, (0.08, 0.08, 0.1), wet)
    seal = ((np.abs(s.x - 57) < 4) & (np.abs(s.y - 56) < 4)).astype(np.float32)
    return over(base, (0.78, 0.12, 0.1), seal)


def topographic(s: Scene) -> Array:
    relief = s.blur(s.mask, 8) + 0.05 * s.noise(14)
    base = over(s.plain((0.93, 0.93, 0.8)), s.near((0.62, 0.78, 0.55), 0.03), np.clip(relief, 0, 1))
    base = over(base, s.fill((0, 0, 0), (0.35, 0.62, 0.45), (0.85, 0.75, 0.45), (0.3, 0.3, 0.2)), 0.9 * s.mask)
    lines = np.abs((relief * 6) % 1 - 0.5) < 0.12
    base = over(base, (0.5, 0.3, 0.15), 0.8 * lines * (1 - s.mask * 0.6))
    return over(base, (0.35, 0.2, 0.1), s.edges(1.0))


def clay(s: Scene) -> Array:
    base = s.plain(s.near((0.97, 0.8, 0.82), 0.02))
    base = over(base, (0.75, 0.5, 0.55), 0.5 * np.roll(s.blur(s.mask, 6), (6, 4), (0, 1)))
    hue = float(s.rng.uniform(0.3, 0.75))
    flat = s.blur(s.fill(s.hue(0.35, 0.9, hue), s.hue(0.35, 0.9, hue), (0.98, 0.95, 0.85), (0.45, 0.35, 0.5)), 1.6)
    puffed = np.clip(flat * (0.62 + 0.45 * s.height[..., None]) + 0.45 * light(s, 4)[..., None], 0, 1)
    return over(base, puffed, np.clip(s.blur(s.mask, 1.5) * 2 - 0.5, 0, 1))


def terminal(s: Scene) -> Array:
    base = s.plain((0.0, 0.04, 0.01))
    glyph = ((s.x % 4 < 2.8) & (s.y % 4 < 2.8)).astype(np.float32)
    level = s.fill((0.1,) * 3, (0.5,) * 3, (1.0,) * 3, (0.85,) * 3)[..., 0]
    n = s.size // 8
    cell = level.reshape(n, 8, n, 8)
    cell = 0.5 * cell.mean((1, 3)) + 0.5 * cell.max((1, 3))  # a thin stem must not drown
    cell = cell * s.rng.uniform(0.8, 1.1, cell.shape)
    value = np.clip(0.6 * cell.repeat(8, 0).repeat(8, 1) + 0.4 * level, 0, 1).astype(np.float32)
    return over(base, (0.25, 1.0, 0.4), value * (0.25 + 0.75 * glyph))


def candy(s: Scene) -> Array:
    stripe = (np.sin((s.x + s.y) * 0.5) > 0).astype(np.float32)
    base = over(s.plain((1.0, 0.93, 0.96)), s.near((1.0, 0.72, 0.84), 0.02), (np.sin(s.x * 0.6) > 0).astype(np.float32))
    main = s.pick(((0.9, 0.1, 0.2),), ((0.2, 0.7, 0.35),), ((0.5, 0.25, 0.8),))[0]
    body = over(s.plain(WHITE), main, stripe)
    flat = np.where((s.labels == 1)[..., None], body, s.fill((0, 0, 0), (0, 0, 0), main, (0.35, 0.15, 0.15)))
    gloss = np.clip(flat + 0.35 * np.clip(light(s), 0, 1)[..., None], 0, 1)
    base = over(base, (0.75, 0.3, 0.5), np.clip(s.blur(s.mask, 2) * 2, 0, 1) * (1 - s.mask))
    return over(base, gloss, s.mask)


def tie_dye(s: Scene) -> Array:
    cx, cy = s.rng.uniform(26, 38, 2)
    r = np.sqrt((s.x - cx) ** 2 + (s.y - cy) ** 2) + 1.2 * s.noise(8)
    phase = r / 22 + float(s.rng.uniform())
    rainbow = np.stack([0.55 + 0.42 * np.cos(2 * np.pi * (phase + k / 3)) for k in range(3)], -1).astype(np.float32)
    base = over(np.clip(rainbow, 0, 1), WHITE, 0.94 * s.mask)
    base = over(base, (0.75, 0.75, 0.8), 0.9 * (s.labels == 2))
    return over(base, (0.25, 0.25, 0.35), np.clip((s.labels == 3) + s.edges(1.0), 0, 1))


SEED_STYLE = "Photo"

PAINTERS: dict[str, Callable[[Scene], Array]] = {
    SEED_STYLE: photo,
    "Blueprint": blueprint,
    "Candy": candy,
    "Chalkboard": chalkboard,
    "Clay": clay,
    "Cross Stitch": cross_stitch,
    "Gold Leaf": gold_leaf,
    "Graffiti": graffiti,
    "Ink Wash": ink_wash,
    "Low Poly": low_poly,
    "Mosaic": mosaic,
    "Neon": neon,
    "Pencil Sketch": pencil_sketch,
    "Pixel Art": pixel_art,
    "Pointillism": pointillism,
    "Pop Art": pop_art,
    "Sepia": sepia,
    "Silhouette": silhouette,
    "Stained Glass": stained_glass,
    "Terminal": terminal,
    "Thermal": thermal,
    "Tie Dye": tie_dye,
    "Topographic": topographic,
    "Watercolor": watercolor,
    "Woodcut": woodcut,
}
