"""Synthetic scenes to learn from: handwritten digits on blurred photographs, all from data inside scikit-learn.

A scene has a theme: a hue, a region of a photograph, and two digit classes that most of its digits come from. So scenes that look alike
hold alike objects, which ORL's stage 2 looks for. Labelled scenes, which only evaluations see, have no themes; test scenes hold digits that
nothing was trained on. Colors vary within a scene: by one color or texture BYOL would know the scene, and never learn its digits.
"""

import colorsys
import json
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from orl_fast.console import progress
from orl_fast.files import atomic_folder, write_json

SIDE_PX = 192
_NUM_DIGITS, _DIGIT_PX = (5, 7), (46, 76)  # at least, at most
_MAX_TURN_DEG = 15.0
_MIN_CONTRAST = 60.0  # of luminance, digit against the background around it
_BLACK, _WHITE = 10.0, 235.0  # the luminance of digits
_GAP_PX = 2
_NUM_THEMES = 10
_THEME_SHARE = 0.9  # of a scene's digits that come from its theme's two classes
_NUM_TRAIN_DIGITS, _ATTEMPTS, _JPEG_QUALITY = 1200, 30, 92

_Box = tuple[int, int, int, int]  # xyxy


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One drawn scene: image [192, 192, 3] uint8 RGB, boxes [D, 4] int16 xyxy around the digits, labels [D] int64 (0 to 9)."""

    image: NDArray[np.uint8]
    boxes: NDArray[np.int16]
    labels: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class _Theme:
    hue: float  # in turns
    photo: int
    corner: NDArray[np.int64]  # y, x of the region's top left corner, pixels of the photograph
    classes: NDArray[np.int64]  # two


class ScenePainter:
    """Paints scenes, with themes or without, of training digits or held-out ones: scene i is a pure function of (seed, these two, i)."""

    def __init__(self, *, seed: int, held_out_digits: bool, themed: bool) -> None:
        from sklearn.datasets import load_digits, load_sample_images  # a heavy import, and only painting needs it

        self._photos = [np.asarray(photo, np.uint8) for photo in load_sample_images().images]
        digits = load_digits()
        part = np.random.default_rng(seed).permutation(len(digits.target))
        part = part[_NUM_TRAIN_DIGITS:] if held_out_digits else part[:_NUM_TRAIN_DIGITS]
        self._glyphs = np.asarray(digits.images[part] / 16.0, np.float32)  # [G, 8, 8], ink from 0 to 1
        self._by_class = [np.flatnonzero(digits.target[part] == label) for label in range(10)]
        self._stream = (seed, 2 * held_out_digits + themed)
        self._themes = _draw_themes(np.random.default_rng((seed, 10)), self._photos) if themed else []

    def paint(self, number: int) -> Scene:
        """Scene `number`."""
        rng = np.random.default_rng((*self._stream, number))
        theme = self._themes[rng.integers(_NUM_THEMES)] if self._themes else None
        canvas = self._background(rng, theme)
        boxes: list[_Box] = []
        labels: list[int] = []
        for _ in range(rng.integers(_NUM_DIGITS[0], _NUM_DIGITS[1] + 1)):
            themed = theme is not None and rng.random() < _THEME_SHARE
            label = int(rng.choice(theme.classes)) if theme is not None and themed else int(rng.integers(10))
            box = _place_digit(canvas, self._glyphs[rng.choice(self._by_class[label])], boxes, rng)
            if box is not None:
                boxes.append(box)
                labels.append(label)
        canvas += 4 * rng.standard_normal(canvas.shape, np.float32)
        image = np.clip(canvas, 0, 255).astype(np.uint8)
        return Scene(image=image, boxes=np.array(boxes, np.int16).reshape(-1, 4), labels=np.array(labels, np.int64))

    def _background(self, rng: np.random.Generator, theme: _Theme | None) -> NDArray[np.float32]:
        """A blurred crop of a photograph, its tint running from one hue to another. [192, 192, 3] float32."""
        photo = self._photos[theme.photo if theme else rng.integers(len(self._photos))]
        side_px = int(rng.integers(150, 241))
        corner = theme.corner if theme else rng.integers(photo.shape[:2])
        y, x = np.clip(corner + rng.integers(-30, 31, 2), 0, np.subtract(photo.shape[:2], side_px))
        # Painted at a third of the size: it is blurred anyway, and painting takes a third of the time.
        small_px = SIDE_PX // 3
        crop = cv2.resize(photo[y : y + side_px, x : x + side_px], (small_px, small_px), interpolation=cv2.INTER_AREA)
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        blurred = cv2.GaussianBlur(np.ascontiguousarray(crop, np.float32), (0, 0), rng.uniform(1, 2))
        gray = _luminance(np.asarray(blurred, np.float32))[..., None]
        # A middling luminance of halved contrast: digits both lighter and darker than it find room.
        gray = np.clip((gray - gray.mean()) * 0.5 + float(rng.uniform(100, 150)), 40, 215)
        hue = (theme.hue if theme else rng.random()) + rng.normal(0, 0.02)
        tint, other_tint = _color(hue, rng.uniform(0.2, 0.55)), _color(rng.random(), rng.uniform(0.2, 0.55))
        angle = rng.uniform(0, 2 * np.pi)
        y_share, x_share = np.mgrid[:small_px, :small_px] / (small_px - 1) - 0.5
        share = np.clip(0.5 + 1.2 * (np.cos(angle) * x_share + np.sin(angle) * y_share), 0, 1)[..., None]
        tinted = np.asarray(gray * ((1 - share) * tint + share * other_tint), np.float32)
        return np.asarray(cv2.resize(tinted, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_CUBIC), np.float32)


def _draw_themes(rng: np.random.Generator, photos: list[NDArray[np.uint8]]) -> list[_Theme]:
    """Ten themes; each class belongs to two of them."""
    classes = np.concatenate([rng.permutation(10).reshape(5, 2), rng.permutation(10).reshape(5, 2)])
    hues = (np.arange(_NUM_THEMES) + rng.random()) / _NUM_THEMES
    themes = []
    for hue, pair, (photo, image) in zip(rng.permutation(hues), classes, cycle(enumerate(photos)), strict=False):
        themes.append(_Theme(hue=hue, photo=photo, corner=rng.integers(np.subtract(image.shape[:2], SIDE_PX)), classes=pair))
    return themes


def _place_digit(canvas: NDArray[np.float32], glyph: NDArray[np.float32], taken: list[_Box], rng: np.random.Generator) -> _Box | None:
    """Paint one digit where none is yet; returns its xyxy box, or None where no room was found."""
    turn_deg = float(rng.uniform(-_MAX_TURN_DEG, _MAX_TURN_DEG))
    # A crowded scene has room for a small digit only.
    for side_px in (int(rng.integers(_DIGIT_PX[0], _DIGIT_PX[1] + 1)), _DIGIT_PX[0]):
        ink = _enlarge(glyph, side_px, turn_deg)
        height, width = ink.shape
        for _ in range(_ATTEMPTS):
            y, x = int(rng.integers(SIDE_PX - height + 1)), int(rng.integers(SIDE_PX - width + 1))
            box = (x, y, x + width, y + height)
            if any(_touch(box, other) for other in taken):
                continue
            region = canvas[y : y + height, x : x + width]
            region += ink[..., None] * (_ink_color(float(_luminance(region).mean()), rng) - region)
            return box
    return None


def _touch(a: _Box, b: _Box) -> bool:
    """Whether two boxes overlap or lie closer than the gap."""
    return a[0] < b[2] + _GAP_PX and b[0] < a[2] + _GAP_PX and a[1] < b[3] + _GAP_PX and b[1] < a[3] + _GAP_PX


def _enlarge(glyph: NDArray[np.float32], side_px: int, turn_deg: float) -> NDArray[np.float32]:
    """An 8 × 8 glyph, smoothly enlarged and turned, cut to its ink. [h, w] float32 from 0 to 1."""
    padded_px = int(side_px * 1.3)
    matrix = np.asarray(cv2.getRotationMatrix2D((3.5, 3.5), turn_deg, side_px / 8), np.float64)
    matrix[:, 2] += padded_px / 2 - 3.5
    ink = cv2.warpAffine(glyph, matrix, (padded_px, padded_px), flags=cv2.INTER_CUBIC)
    ink = np.clip((ink - 0.25) * 2.0, 0, 1)  # enlarged strokes are washed out; this gives them an edge again
    rows, columns = np.flatnonzero(ink.max(1) > 0.2), np.flatnonzero(ink.max(0) > 0.2)
    return np.asarray(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], np.float32)


def _ink_color(background: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Any hue, a luminance that keeps the contrast to `background` (but for what clipping takes from strong colors)."""
    room_below, room_above = max(0.0, background - _MIN_CONTRAST), max(0.0, _WHITE - background - _MIN_CONTRAST)
    darker = rng.random() * (room_below + room_above) < room_below
    low, high = (_BLACK, room_below) if darker else (background + _MIN_CONTRAST, _WHITE)
    level = rng.uniform(low, max(low, high))
    return np.asarray(level * _color(rng.random(), rng.uniform(0, 0.85)), np.float32)


def _color(hue: float, saturation: float) -> NDArray[np.float32]:
    """The RGB color of luminance 1. A strong one exceeds what a pixel can hold and is clipped in the end."""
    color = np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, 1.0), np.float32)
    return np.asarray(color / _luminance(color), np.float32)


def _luminance(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(rgb @ np.array([0.299, 0.587, 0.114], np.float32), np.float32)


def write_scenes(folder: Path, *, num_scenes: int, seed: int, held_out_digits: bool = False, labelled: bool = False) -> None:
    """Write `images/000000.jpg` … into `folder`; one that holds these very scenes is left as it is.

    Scenes to learn from have themes. `labelled` ones, for evaluations, have none, but `annotations.json` in COCO's format.
    """
    settings = {"num_scenes": num_scenes, "seed": seed, "held_out_digits": held_out_digits, "labelled": labelled}
    about = folder / "scenes.json"
    if about.is_file() and json.loads(about.read_text()) == settings:
        return
    painter = ScenePainter(seed=seed, held_out_digits=held_out_digits, themed=not labelled)
    annotations: list[dict[str, object]] = []
    with atomic_folder(folder) as target, progress(f"drawing {folder.name}", total=num_scenes, unit="scenes") as advance:
        (target / "images").mkdir()
        for number in range(num_scenes):
            scene = painter.paint(number)
            _, encoded = cv2.imencode(".jpg", scene.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
            (target / "images" / f"{number:06d}.jpg").write_bytes(encoded.tobytes())
            for (x1, y1, x2, y2), label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
                box = [x1, y1, x2 - x1, y2 - y1]
                annotations.append({"id": len(annotations), "image_id": number, "category_id": label, "bbox": box, "iscrowd": 0})
            advance()
        if labelled:
            images = [{"id": i, "file_name": f"{i:06d}.jpg", "width": SIDE_PX, "height": SIDE_PX} for i in range(num_scenes)]
            categories = [{"id": label, "name": str(label)} for label in range(10)]
            write_json(target / "annotations.json", {"images": images, "annotations": annotations, "categories": categories})
        write_json(target / "scenes.json", settings)
