"""One scene: several real digits over a cluttered background, with the exact ink of each."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

DIGITS = (3, 7)  # digits asked for per scene; one that finds no free place is left out
HEIGHT = (0.16, 0.42)  # of a digit, as a fraction of the image side
MAX_ROTATION = 25.0  # degrees; more would turn a 6 into a 9
CONTRAST = (0.16, 0.60)  # luma difference between ink and what lies under it
MAX_OVERLAP = 0.4  # of two boxes before occlusion: intersection over the smaller, so no digit sits in another
MIN_VISIBLE = 0.75  # fraction of a digit's ink that stays visible under the digits above it
MIN_INK = 12  # pixels: less is a speck nobody can read
FRAGMENTS = (2, 6)  # parts of digits that belong to the background
STROKES = (2, 7)
INK = 0.5  # coverage from which a pixel counts as ink
LUMA = np.array([0.299, 0.587, 0.114], np.float32)

_PAD, _ZOOM = 1, 4  # a scan gets a blank margin and is enlarged once, before the affine map


@dataclass
class Scene:
    """A rendered scene.

    Attributes:
        image: ``(S, S, 3)`` uint8 RGB.
        owner: ``(S, S)`` int16, -1 = background, k = visible ink of digit k (z-order: a later digit is above).
        labels: Digit 0..9 of each k.
        scans: Scan index of each k.
        full_boxes: Box ``(x, y, w, h)`` in pixels of each k before later digits covered parts of it.
        full_ink: Ink of each k in pixels, the same way.
        visible_ink: Ink of each k in pixels that can be seen.
        fragment_scans: Scan indices of the background fragments.
    """

    image: np.ndarray
    owner: np.ndarray
    labels: list[int] = field(default_factory=list)
    scans: list[int] = field(default_factory=list)
    full_boxes: list[tuple[int, int, int, int]] = field(default_factory=list)
    full_ink: list[int] = field(default_factory=list)
    visible_ink: list[int] = field(default_factory=list)
    fragment_scans: list[int] = field(default_factory=list)

    def boxes(self) -> list[tuple[int, int, int, int]]:
        """Tight boxes ``(x, y, w, h)`` in whole pixels around each digit's visible ink."""
        return [bounds(self.owner == k) for k in range(len(self.labels))]


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Tight ``(x, y, w, h)`` of a non-empty boolean mask ``(H, W)``; a single pixel is 1 x 1."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1)


def render_scene(scans: np.ndarray, labels: np.ndarray, pool: np.ndarray, size: int, rng: np.random.Generator) -> Scene:
    """Render one scene from the scans of one split.

    Args:
        scans: ``(N, 8, 8)`` float32 ink in [0, 1].
        labels: ``(N,)`` digits 0..9.
        pool: Indices that may be used, for digits and for background fragments alike.
        size: Image side in pixels.
        rng: Source of all randomness; its state fixes the scene.

    Returns:
        A scene with at least one digit.
    """
    canvas = _background(size, rng)
    fragments = []
    partial = pool[labels[pool] != 1]  # a part of a 1 is still a 1
    for _ in range(rng.integers(*FRAGMENTS, endpoint=True)):
        index = int(rng.choice(partial))
        ink = _trim(_cut(_glyph(scans[index], _height(size, rng), rng), rng))
        if ink is not None:
            _blend(canvas, ink, *_place(ink, size, rng), rng)
            fragments.append(index)

    scene = Scene(canvas, np.full((size, size), -1, np.int16), fragment_scans=fragments)
    for _ in range(rng.integers(*DIGITS, endpoint=True)):
        _add_digit(scene, scans, labels, pool, rng)
    while not scene.labels:  # an empty canvas always has room, but a faint scan can fall below MIN_INK
        _add_digit(scene, scans, labels, pool, rng)
    scene.image = _photograph(canvas, rng)
    return scene


def _add_digit(scene: Scene, scans: np.ndarray, labels: np.ndarray, pool: np.ndarray, rng: np.random.Generator) -> None:
    """Draw one random digit above the others where the limits allow it, or leave the scene as it is."""
    size = scene.owner.shape[0]
    digit = int(rng.integers(10))  # class first: every class is equally frequent
    index = int(rng.choice(pool[labels[pool] == digit]))
    ink = _trim(_glyph(scans[index], _height(size, rng), rng))
    if ink is None:
        return
    mask = ink >= INK
    if mask.sum() < MIN_INK:
        return
    dx, dy, w, h = bounds(mask)
    count = len(scene.labels)
    for _ in range(25):
        x, y = _place(ink, size, rng)
        box = (x + dx, y + dy, w, h)
        if any(_overlap(box, other) > MAX_OVERLAP for other in scene.full_boxes):
            continue
        under = scene.owner[y : y + ink.shape[0], x : x + ink.shape[1]]
        hidden = np.bincount(under[mask & (under >= 0)], minlength=count)
        visible = [v - int(lost) for v, lost in zip(scene.visible_ink, hidden, strict=True)]
        if any(v < MIN_VISIBLE * full for v, full in zip(visible, scene.full_ink, strict=True)):
            continue
        _blend(scene.image, ink, x, y, rng)
        under[mask] = count
        pixels = int(mask.sum())
        scene.labels.append(digit)
        scene.scans.append(index)
        scene.full_boxes.append(box)
        scene.full_ink.append(pixels)
        scene.visible_ink = [*visible, pixels]
        return


def _height(size: int, rng: np.random.Generator) -> float:
    """Digit height in pixels, uniform in the logarithm: as many small ones as big ones."""
    low, high = HEIGHT
    return size * low * (high / low) ** rng.random()


def _glyph(scan: np.ndarray, height: float, rng: np.random.Generator) -> np.ndarray:
    """Ink coverage ``(P, P)`` in [0, 1] of a scan under a random scale, rotation, shear and stroke weight."""
    big = Image.fromarray(np.rint(np.pad(scan, _PAD) * 255).astype(np.uint8))
    side = big.width * _ZOOM
    big = big.resize((side, side), Image.Resampling.BICUBIC)
    angle = np.deg2rad(rng.uniform(-MAX_ROTATION, MAX_ROTATION))
    shear, aspect = rng.uniform(-0.2, 0.2), rng.uniform(0.8, 1.2)
    cos, sin = np.cos(angle), np.sin(angle)
    forward = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]]) @ np.diag([aspect, 1.0])
    forward *= height / (scan.shape[0] * _ZOOM)
    out = int(np.ceil(np.abs(forward).sum(1).max() * side))
    back = np.linalg.inv(forward)  # PIL maps output pixels back to the input
    shift = side / 2 - back @ [out / 2, out / 2]
    matrix = (back[0, 0], back[0, 1], shift[0], back[1, 0], back[1, 1], shift[1])
    patch = big.transform((out, out), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    grey = np.asarray(patch, np.float32) / 255
    weight, softness = rng.uniform(0.42, 0.62), rng.uniform(0.2, 0.4)
    return np.clip((grey - weight) / softness + INK, 0, 1) * (grey > 0.02)


def _cut(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Keep what lies inside a random wedge of 60 to 120 degrees around the middle: a fragment, not a digit."""
    ys, xs = np.mgrid[: ink.shape[0], : ink.shape[1]] - (ink.shape[0] - 1) / 2
    start, opening = rng.uniform(0, 2 * np.pi), np.deg2rad(rng.uniform(60, 120))
    return ink * ((np.arctan2(ys, xs) - start) % (2 * np.pi) < opening)


def _trim(ink: np.ndarray) -> np.ndarray | None:
    """Cut a patch to its non-zero part; None when nothing is left."""
    if not ink.any():
        return None
    x, y, w, h = bounds(ink > 0)
    return ink[y : y + h, x : x + w]


def _place(ink: np.ndarray, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Top left corner for a patch that lies inside the image."""
    return int(rng.integers(size - ink.shape[1] + 1)), int(rng.integers(size - ink.shape[0] + 1))


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / min(a[2] * a[3], b[2] * b[3])


def _blend(canvas: np.ndarray, ink: np.ndarray, x: int, y: int, rng: np.random.Generator) -> None:
    """Paint ink on the float RGB canvas, brighter or darker than what it covers."""
    region = canvas[y : y + ink.shape[0], x : x + ink.shape[1]]
    cover = ink[..., None]
    below = float((region * cover).sum((0, 1)) @ LUMA / cover.sum())
    # The small contrasts are the frequent ones: they are what a small detector misses.
    contrast = CONTRAST[0] + (CONTRAST[1] - CONTRAST[0]) * rng.random() ** 1.5
    sign = 1 if rng.random() < 0.5 else -1
    if not 0 <= below + sign * contrast <= 1:
        sign = -sign
    tint = rng.uniform(-0.25, 0.25, 3).astype(np.float32)
    colour = np.clip(below + sign * contrast + tint - tint @ LUMA, 0, 1)
    region += cover * (colour - region)


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    """Float32 RGB ``(size, size, 3)``: colour gradients, texture and strokes, drawn at twice the size."""
    big = 2 * size
    base, spread = rng.uniform(0.15, 0.85, 3), rng.uniform(0.1, 0.45)
    cells = int(rng.integers(2, 5))
    field_ = base + spread * rng.uniform(-1, 1, (cells, cells, 3))
    texture = rng.uniform(-1, 1, (size // 8, size // 8, 1)) * rng.uniform(0, 0.1)
    canvas = _enlarge(field_, big)
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.integers(*STROKES, endpoint=True)):
        near = rng.uniform(-0.45, 0.45) + rng.uniform(-0.15, 0.15, 3) + base
        colour = tuple(int(c) for c in np.clip(near * 255, 0, 255))
        width = int(rng.integers(2, max(3, big // 28)))
        kind = rng.random()
        if kind < 0.4:
            points = [tuple(p) for p in rng.uniform(0, big, (int(rng.integers(2, 5)), 2)).tolist()]
            draw.line(points, colour, width, joint='curve')
        elif kind < 0.8:
            cx, cy, rx, ry = rng.uniform((0, 0, big / 16, big / 16), (big, big, big / 3, big / 3))
            start = rng.uniform(0, 360)
            draw.arc((cx - rx, cy - ry, cx + rx, cy + ry), start, start + rng.uniform(40, 160), colour, width)
        else:
            cx, cy, w, h = rng.uniform((0, 0, big / 16, big / 16), (big, big, big / 3, big / 3))
            draw.rectangle((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), colour)
    canvas = np.asarray(canvas.reduce(2), np.float32) / 255
    return canvas + (np.asarray(_enlarge(texture + 0.5, size), np.float32) / 255 - 0.5)


def _enlarge(values: np.ndarray, side: int) -> Image.Image:
    """A small grid ``(h, w, 1 or 3)`` of values in [0, 1] as a smooth RGB image."""
    pixels = np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))).resize(
        (side, side), Image.Resampling.BICUBIC
    )


def _photograph(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uneven light, a slightly soft lens and sensor noise; no pixel moves, so the ink masks stay valid."""
    size = canvas.shape[0]
    gain, tilt = rng.uniform(0.75, 1.05), rng.uniform(-0.2, 0.2, 2)
    ramp = np.linspace(-0.5, 0.5, size)
    light = (gain * (1 + tilt[0] * ramp[:, None] + tilt[1] * ramp)).astype(np.float32)
    lit = np.rint(np.clip(canvas * light[..., None], 0, 1) * 255).astype(np.uint8)
    blur = rng.uniform(0, 0.7)
    soft = np.asarray(Image.fromarray(lit).filter(ImageFilter.GaussianBlur(blur)), np.float32)
    noise = np.float32(rng.uniform(1, 10)) * rng.standard_normal(soft.shape, np.float32)
    return np.rint(np.clip(soft + noise, 0, 255)).astype(np.uint8)
