"""`builtin:shapes`: 32x32 colour pictures of ten outlines, drawn by the program from a fixed seed.

Position, size, rotation and colours say nothing about the class, and the figure is as often darker as
lighter than what is behind it: no weighted sum of pixels tells the classes apart, a small convolutional
network does.
No class turns into another one under rotation, mirroring or a shift of a few pixels.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SIZE = 32
SPLITS = {"train": (2560, 7001), "validation": (512, 7002), "test": (1024, 7003)}  # examples, seed
RADIUS = (8.5, 12.5)  # of the circle about the figure, in pixels
NOISE = 0.05  # half the width of the uniform noise on each value in 0..1
DOTS = 4  # small round distractors behind the figure


# Each outline: the signed distance (negative inside, exact enough near the edge) of points from a figure
# about the origin that fits into the unit circle.


def _both(one: Array, other: Array) -> Array:
    """Where two figures overlap."""
    distance: Array = np.maximum(one, other)
    return distance


def _either(one: Array, other: Array) -> Array:
    """Two figures as one."""
    distance: Array = np.minimum(one, other)
    return distance


def _disc(x: Array, y: Array, centre_x: float, centre_y: float, radius: float) -> Array:
    distance: Array = np.sqrt((x - centre_x) ** 2 + (y - centre_y) ** 2) - radius
    return distance


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    return _both(np.abs(x) - half_width, np.abs(y) - half_height)


def _half_planes(x: Array, y: Array, sides: int, apothem: float) -> Array:
    """Distances from `sides` lines at equal angles, (sides, …); inside all of them is a regular polygon."""
    angles = np.pi / 2 + 2 * np.pi * np.arange(sides) / sides
    return np.stack([x * np.cos(angle) + y * np.sin(angle) - apothem for angle in angles])


def _circle(x: Array, y: Array) -> Array:
    return _disc(x, y, 0.0, 0.0, 0.88)


def _ring(x: Array, y: Array) -> Array:
    return np.abs(_disc(x, y, 0.0, 0.0, 0.74)) - 0.17


def _square(x: Array, y: Array) -> Array:
    return _box(x, y, 0.72, 0.72)


def _triangle(x: Array, y: Array) -> Array:
    lines = _half_planes(x, y, 3, 0.5)
    return _both(_both(lines[0], lines[1]), lines[2])


def _cross(x: Array, y: Array) -> Array:
    return _either(_box(x, y, 0.25, 0.95), _box(x, y, 0.95, 0.25))


def _star(x: Array, y: Array) -> Array:
    # A pentagram is where at most one of the five lines is overstepped.
    distance: Array = np.sort(_half_planes(x, y, 5, 0.33), axis=0)[-2]
    return distance


def _heart(x: Array, y: Array) -> Array:
    # A wedge that ends half-way up, and two discs side by side that close it and leave a notch between them.
    wedge = _both((np.abs(x) - 0.9 * (y + 0.95)) / np.sqrt(1 + 0.9**2), np.abs(x) + y - 0.55)
    lobes = _disc(np.abs(x), y, 0.45, 0.3, 0.5)
    return _either(wedge, lobes)


def _crescent(x: Array, y: Array) -> Array:
    return _both(_disc(x, y, 0.0, 0.0, 0.95), -_disc(x, y, 0.45, 0.0, 0.72))


def _arrow(x: Array, y: Array) -> Array:
    shaft = _box(x + 0.35, y, 0.6, 0.17)
    head = _both(-x, (x + np.abs(y) * 1.1 - 0.95) / np.sqrt(1 + 1.1**2))
    return _either(shaft, head)


def _hourglass(x: Array, y: Array) -> Array:
    return _both(np.abs(y) - 0.85, (np.abs(x) - 0.75 * np.abs(y) - 0.06) / np.sqrt(1 + 0.75**2))


OUTLINES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
    "heart": _heart,
    "crescent": _crescent,
    "arrow": _arrow,
    "hourglass": _hourglass,
}
CLASSES: tuple[str, ...] = tuple(OUTLINES)


def generate(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draws one split: images (N, 32, 32, 3) uint8 and labels (N,) int64, an index into `CLASSES`.

    N is 2,560, 512 and 1,024 for `train`, `validation` and `test`; the classes are as even as N allows, in
    random order. The same arrays come out at every call. Raises KeyError for another split.
    """
    count, seed = SPLITS[split]
    random = np.random.Generator(np.random.PCG64(seed))
    labels = (np.arange(count) % len(CLASSES))[np.argsort(random.random(count), kind="stable")]

    images = _backgrounds(random, count)
    behind = images.mean(axis=(1, 2))
    for _ in range(DOTS):
        radius = _between(random, count, 0.8, 1.9)
        x, y = _grid(_between(random, count, 0, SIZE), _between(random, count, 0, SIZE))
        _paint(images, np.sqrt(x * x + y * y) - radius[:, None, None], random.random((count, 3)))

    radius = _between(random, count, *RADIUS)
    margin = 0.9 * radius  # a tip may leave the picture by a pixel
    across, down = (margin + (SIZE - 2 * margin) * random.random(count) for _ in range(2))
    angle = _between(random, count, 0, 2 * np.pi)[:, None, None]
    x, y = _grid(across, down)
    x, y = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    scale = radius[:, None, None]
    distance = np.empty_like(x)
    for label, outline in enumerate(OUTLINES.values()):
        mine = labels == label
        distance[mine] = outline(x[mine] / scale[mine], y[mine] / scale[mine]) * scale[mine]
    _paint(images, distance, _contrasting(random, behind))

    images += (random.random(images.shape) - 0.5) * (2 * NOISE)
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8), labels.astype(np.int64)


def _between(random: np.random.Generator, count: int, low: float, high: float) -> Array:
    return low + (high - low) * random.random(count)


def _grid(across: Array, down: Array) -> tuple[Array, Array]:
    """Coordinates of the pixel centres about a point per image: two arrays, (N, 32, 32) once broadcast."""
    centres = np.arange(SIZE) + 0.5
    x = np.broadcast_to(centres[None, None, :] - across[:, None, None], (len(across), SIZE, SIZE))
    y = np.broadcast_to(centres[None, :, None] - down[:, None, None], (len(down), SIZE, SIZE))
    return x, y


def _paint(images: Array, distance: Array, colours: Array) -> None:
    """Lays colours (N, 3) over the images where the distance (N, 32, 32) is negative, softly at the edge."""
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    images += cover * (colours[:, None, None, :] - images)


def _backgrounds(random: np.random.Generator, count: int) -> Array:
    """Images (N, 32, 32, 3) in 0..1 that go from one colour to a similar one in a slow wave."""
    first = random.random((count, 3))
    second = np.clip(first + (random.random((count, 3)) - 0.5) * 0.5, 0, 1)
    angle = _between(random, count, 0, 2 * np.pi)[:, None, None]
    frequency = _between(random, count, 0.5, 2.0)[:, None, None]
    phase = _between(random, count, 0, 2 * np.pi)[:, None, None]
    x, y = _grid(np.zeros(count), np.zeros(count))
    wave = np.sin(2 * np.pi * frequency * (x * np.cos(angle) + y * np.sin(angle)) / SIZE + phase)
    mix = (0.5 + 0.5 * wave)[..., None]
    return first[:, None, None] * (1 - mix) + second[:, None, None] * mix


def _contrasting(random: np.random.Generator, behind: Array) -> Array:
    """One colour (N, 3) per image: the one of five random ones that is farthest from what is behind."""
    candidates = random.random((5, *behind.shape))
    best = np.argmax(((candidates - behind) ** 2).sum(axis=2), axis=0)
    colours: Array = candidates[best, np.arange(len(behind))]
    return colours
