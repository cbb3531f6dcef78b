"""Procedural images of ten shapes: real work for a 64 x 64 model, any size and number, no download.

Image ``index`` of ``seed`` is a pure function of the two, whatever process renders it. Colour, place, scale, rotation,
shading and background are drawn independently of the class, so only the outline tells the classes apart.
"""

from __future__ import annotations

import colorsys
import math

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SHAPES = ["circle", "square", "triangle", "star", "ring", "cross", "heart", "crescent", "hexagon", "arrow"]
Points = list[tuple[float, float]]
Colour = tuple[float, float, float]  # RGB in 0..1


class Draws:
    """Uniform numbers from Philox keyed by (seed, index).

    Only the raw 64 bit words are used: NumPy keeps those the same for ever, its distributions it may change.
    """

    def __init__(self, seed: int, index: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed, index], dtype=np.uint64))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * ((self._bits.random_raw() >> 11) * 2.0**-53)

    def integer(self, count: int) -> int:
        """A number in 0..count-1."""
        return int(self.uniform() * count)

    def bytes(self, count: int) -> np.ndarray:
        """``count`` uint8 values."""
        return self._bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count]


def render(seed: int, index: int, size: int) -> Image.Image:
    """Image ``index`` of the data set: RGB, (size, size); it shows ``SHAPES[index % 10]``.

    Args:
        seed: 0 <= seed < 2**64.
        index: 0 <= index < 2**64.
        size: side in pixels, 8 or more.
    """
    draws = Draws(seed, index)
    ground, mean = _background(draws, size)
    mask = _mask(SHAPES[index % len(SHAPES)], draws, size)
    if draws.uniform() < 0.4:
        ground = _shadow(ground, mask, draws)
    colour = _foreground(draws, mean)
    picture = Image.composite(_fill(draws, colour, size), ground, mask)
    if draws.uniform() < 0.3:
        picture = _outline(picture, mask, colour, mean)
    return _grain(picture, draws)


# ---- outlines, as polygons in a circle of radius 1 (y points down) ------------------------------------------------


def _polygon(corners: int, radius: float = 1.0, turn: float = 0.0) -> Points:
    angles = (math.tau * k / corners - math.pi / 2 + turn for k in range(corners))
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _star() -> Points:
    outer, inner = _polygon(5), _polygon(5, 0.42, math.pi / 5)
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _cross() -> Points:
    a, b = 0.32, 0.95
    return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]


def _heart() -> Points:
    """The heart curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, centred and scaled."""
    points = []
    for k in range(120):
        t = math.tau * k / 120
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((math.sin(t) ** 3 * 0.95, -(y + 2.5) / 16.8))
    return points


def _crescent() -> Points:
    """A disc of radius 1 less a disc of radius 0.8 moved to the right by 0.45, shifted back to the centre."""
    d, r = 0.45, 0.8
    x = (1 - r * r + d * d) / (2 * d)  # where the two circles cross
    outer, inner = math.acos(x), math.acos((x - d) / r)
    steps = [k / 60 for k in range(61)]
    back = [outer + (math.tau - 2 * outer) * s for s in steps]
    front = [math.tau - inner - (math.tau - 2 * inner) * s for s in steps]
    points = [(math.cos(a), math.sin(a)) for a in back] + [(d + r * math.cos(a), r * math.sin(a)) for a in front]
    return [(px + 0.15, py) for px, py in points]


OUTLINES: dict[str, Points] = {
    "circle": _polygon(120, 0.92),
    "square": [(-0.76, -0.76), (0.76, -0.76), (0.76, 0.76), (-0.76, 0.76)],
    "triangle": [(x, y + 0.1) for x, y in _polygon(3, 1.05)],
    "star": _star(),
    "ring": _polygon(120, 0.95),
    "cross": _cross(),
    "heart": _heart(),
    "crescent": _crescent(),
    "hexagon": _polygon(6, 0.97),
    "arrow": [(-0.95, -0.24), (0.1, -0.24), (0.1, -0.68), (0.98, 0.0), (0.1, 0.68), (0.1, 0.24), (-0.95, 0.24)],
}
HOLES: dict[str, Points] = {"ring": _polygon(120, 0.55)}
UPRIGHT = {"heart": math.radians(40)}  # turned further it would be hard to tell from other things


def _mask(name: str, draws: Draws, size: int) -> Image.Image:
    """Coverage of every pixel (mode L): the outline placed at random, drawn large and averaged down."""
    radius = draws.uniform(0.21, 0.40)
    x, y = (draws.uniform(radius + 0.02, 0.98 - radius) for _ in "xy")
    limit = UPRIGHT.get(name, math.pi)
    angle = draws.uniform(-limit, limit)
    factor = 8 if size <= 128 else 4
    cos, sin, scale = math.cos(angle) * radius, math.sin(angle) * radius, size * factor
    canvas = Image.new("L", (scale, scale))
    pen = ImageDraw.Draw(canvas)
    for outline, value in ((OUTLINES[name], 255), (HOLES.get(name), 0)):
        if outline:
            pen.polygon([((x + cos * u - sin * v) * scale, (y + sin * u + cos * v) * scale) for u, v in outline], value)
    return canvas.reduce(factor)


# ---- colours -------------------------------------------------------------------------------------------------------


def _colour(draws: Draws, saturation: tuple[float, float], value: tuple[float, float]) -> Colour:
    return colorsys.hsv_to_rgb(draws.uniform(), draws.uniform(*saturation), draws.uniform(*value))


def _distance(a: Colour, b: Colour) -> float:
    """How different two colours look: brightness counts most, for shapes must be visible in grey as well."""
    light = abs(sum(w * (p - q) for w, p, q in zip((0.3, 0.59, 0.11), a, b, strict=True)))
    return 2.0 * light + math.dist(a, b)


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return tuple(p + (q - p) * share for p, q in zip(a, b, strict=True))


def _foreground(draws: Draws, background: Colour) -> Colour:
    """The first of six colours that stands out, else the one that does most."""
    candidates = [_colour(draws, (0.45, 1.0), (0.35, 1.0)) for _ in range(6)]
    clear = [colour for colour in candidates if _distance(colour, background) > 0.9]
    return clear[0] if clear else max(candidates, key=lambda colour: _distance(colour, background))


# ---- painting ------------------------------------------------------------------------------------------------------
# Only + - * / and comparisons on arrays: NumPy's sin, exp and the like differ in the last bit between processors.


def _paint(weight: np.ndarray, a: Colour, b: Colour) -> Image.Image:
    """Blend two colours by a (size, size) weight in 0..1."""
    first, second = np.array(a), np.array(b)
    pixels = (first + (second - first) * weight[:, :, None]) * 255.0 + 0.5
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _axes(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres in 0..1 as a row (x) and a column (y)."""
    centres = (np.arange(size) + 0.5) / size
    return centres[None, :], centres[:, None]


def _ramp(draws: Draws, size: int) -> np.ndarray:
    """0..1 along a random direction."""
    angle = draws.uniform(0, math.tau)
    x, y = _axes(size)
    return 0.5 + ((x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle)) / math.sqrt(2)


def _spot(draws: Draws, size: int) -> np.ndarray:
    """0 at a random point, towards 1 with the squared distance."""
    x, y = _axes(size)
    far = (x - draws.uniform(0.2, 0.8)) ** 2 + (y - draws.uniform(0.2, 0.8)) ** 2
    return np.minimum(far * draws.uniform(1.0, 2.5), 1.0)


def _clouds(draws: Draws, size: int) -> np.ndarray:
    """Smooth blotches: a few random values, enlarged."""
    cells = 3 + draws.integer(4)
    small = Image.fromarray(draws.bytes(cells * cells).reshape(cells, cells))
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC)) / 255.0


def _stripes(draws: Draws, size: int) -> np.ndarray:
    """Soft stripes: a triangle wave along a random direction."""
    phase = _ramp(draws, size) * draws.uniform(3.0, 7.0) + draws.uniform()
    wave = np.abs(2.0 * (phase - np.floor(phase)) - 1.0)
    return np.clip(0.5 + (wave - 0.5) * 3.0, 0.0, 1.0)


def _checks(draws: Draws, size: int) -> np.ndarray:
    """A chessboard with soft edges, turned at random."""
    angle, period = draws.uniform(0, math.tau), draws.uniform(2.0, 4.5)
    x, y = _axes(size)
    u = (x * math.cos(angle) + y * math.sin(angle)) * period + draws.uniform()
    v = (y * math.cos(angle) - x * math.sin(angle)) * period + draws.uniform()
    a, b = (np.abs(2.0 * (w - np.floor(w)) - 1.0) - 0.5 for w in (u, v))
    return np.clip(0.5 + a * b * 20.0, 0.0, 1.0)


def _background(draws: Draws, size: int) -> tuple[Image.Image, Colour]:
    """A background and its mean colour. The two colours lie close enough that it never hides a shape."""
    pattern = (_ramp, _spot, _clouds, _stripes, _checks)[draws.integer(5)]
    base = _colour(draws, (0.05, 0.75), (0.12, 1.0))
    other = _mix(base, _colour(draws, (0.1, 0.8), (0.1, 1.0)), draws.uniform(0.2, 0.5))
    return _paint(pattern(draws, size), base, other), _mix(base, other, 0.5)


def _fill(draws: Draws, colour: Colour, size: int) -> Image.Image:
    """Flat, or shaded from lighter to darker."""
    if draws.uniform() < 0.5:
        return _paint(np.zeros((size, size)), colour, colour)
    strength = draws.uniform(0.15, 0.35)
    return _paint(_ramp(draws, size), _mix(colour, (1, 1, 1), strength), _mix(colour, (0, 0, 0), strength))


def _shadow(ground: Image.Image, mask: Image.Image, draws: Draws) -> Image.Image:
    """A soft shadow beside the shape."""
    size = ground.width
    dx, dy = (round(draws.uniform(0.02, 0.05) * size) for _ in "xy")
    blurred = mask.filter(ImageFilter.BoxBlur(max(1, size // 32)))
    moved = Image.new("L", mask.size)
    moved.paste(blurred, (dx, dy))
    moved = moved.point(lambda value: value * 45 // 100)
    return Image.composite(Image.new("RGB", ground.size), ground, moved)


def _outline(picture: Image.Image, mask: Image.Image, colour: Colour, background: Colour) -> Image.Image:
    """A thin edge inside the shape, black or white, whichever is seen better."""
    edge = max(1, picture.width // 32)
    inner = mask.filter(ImageFilter.MinFilter(2 * edge + 1))
    rim = ImageChops.subtract(mask, inner)
    tone = max(("white", (1, 1, 1)), ("black", (0, 0, 0)), key=lambda t: _distance(t[1], _mix(colour, background, 0.5)))
    return Image.composite(Image.new("RGB", picture.size, tone[0]), picture, rim)


def _grain(picture: Image.Image, draws: Draws) -> Image.Image:
    """Noise of at most 3 levels, so that flat areas are not perfectly flat."""
    pixels = np.asarray(picture).astype(np.int16)
    noise = (draws.bytes(pixels.size).reshape(pixels.shape) % 7).astype(np.int16) - 3
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
