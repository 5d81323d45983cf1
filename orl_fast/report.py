"""Pictures of what was mined and of what training sees: images in rows, boxes and borders in colors that belong together."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from orl_fast.config import LoaderConfig
from orl_fast.errors import DataError
from orl_fast.files import atomic_file
from orl_fast.shards import ShardIndex, ShardReader
from orl_fast.shards.images import decode_rgb
from orl_fast.tables import BoxTable, PairTable
from orl_fast.views.choose import open_renderer, open_source
from orl_fast.views.draw import Mined
from orl_fast.views.patches import PatchStore
from orl_fast.views.plan import Batch, ViewPlan
from orl_fast.views.specs import PairPartner, ViewSpec

# Distinct for color-blind readers too (Okabe and Ito), without yellow, which is lost on photographs; more than seven repeat.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#7F3C8D")
_CELL_PX, _GAP_PX, _MARGIN_PX, _LINE_PX = 240, 14, 28, 3
_TITLE_PX, _HEAD_PX, _TEXT_PX = 24, 16, 14
_COLUMN_PX, _CAPTION_PX = _CELL_PX + _GAP_PX, _TEXT_PX + 10 + _GAP_PX
_INK, _FAINT_INK, _PAPER = "#1a1a1a", "#6b6b6b", "#ffffff"

Boxes = list[tuple[Sequence[float], str]]  # xyxy, pixels of the image it lies on; color


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One picture of a grid: an image [H, W, 3] uint8, boxes on it with their colors, a caption, a border color for the whole."""

    image: NDArray[np.uint8]
    boxes: Boxes = field(default_factory=list)
    caption: str = ""
    border: str | None = None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Rows of cells below column headings. Rows may be shorter than the headings; cells of one row share a height."""

    title: str
    note: str
    headings: Sequence[str]
    rows: list[list[Cell]] = field(default_factory=list)


def draw_grid(grid: Grid) -> Image.Image:
    """Paint a grid of square cells; images of one row stand on one line, above their captions."""
    columns = max([len(grid.headings), *map(len, grid.rows)])
    rows = [[(_fit(cell), cell.caption) for cell in row] for row in grid.rows]
    heights_px = [max(image.height for image, _ in row) for row in rows]
    # Pillow's own font, so that a picture looks the same on a machine without fonts.
    title, head, text = (cast(ImageFont.FreeTypeFont, ImageFont.load_default(size_px)) for size_px in (_TITLE_PX, _HEAD_PX, _TEXT_PX))
    note_px = _MARGIN_PX + _TITLE_PX + 10
    y = note_px + _TEXT_PX + 22 + _HEAD_PX + 10
    text_px = int(max(title.getlength(grid.title), text.getlength(grid.note))) + 1
    width_px = max(columns * _COLUMN_PX - _GAP_PX, text_px) + 2 * _MARGIN_PX
    canvas = Image.new("RGB", (width_px, y + sum(heights_px) + len(rows) * _CAPTION_PX - _GAP_PX + _MARGIN_PX), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN_PX, _MARGIN_PX), grid.title, _INK, title, anchor="lt")
    draw.text((_MARGIN_PX, note_px), grid.note, _FAINT_INK, text, anchor="lt")
    middles_px = [_MARGIN_PX + column * _COLUMN_PX + _CELL_PX // 2 for column in range(columns)]
    for x, heading in zip(middles_px, grid.headings, strict=False):
        draw.text((x, y - 10), heading, _INK, head, anchor="ms")
    for row, height_px in zip(rows, heights_px, strict=True):
        y += height_px
        for x, (image, caption) in zip(middles_px, row, strict=False):
            canvas.paste(image, (x - _CELL_PX // 2 + (_CELL_PX - image.width) // 2, y - image.height))
            draw.text((x, y + 6), _elided(caption, text), _FAINT_INK, text, anchor="mt")
        y += _CAPTION_PX
    return canvas


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, atomically."""
    with atomic_file(path) as file:
        picture.save(file, "PNG", optimize=True)


def pair_grid(
    index: ShardIndex, rois: BoxTable, pairs: PairTable, *, images: Sequence[int], num_neighbors: int, title: str = "Corresponding RoIs"
) -> Grid:
    """Images (rows of the index) and their first neighbors: the best pair's boxes in one color, with similarity (ORL, figures 3 and 5)."""
    num_neighbors = min(num_neighbors, pairs.neighbors.shape[1])
    note = "Boxes of one color are the best pair of RoIs of the image and that neighbor. Below: cosine similarity of the two RoIs."
    grid = Grid(title=title, note=note, headings=["image", *(f"neighbor {k + 1}" for k in range(num_neighbors))])
    with ShardReader(index) as reader:
        for row in images:
            own: Boxes = []
            cells: list[Cell] = []
            for k in range(num_neighbors):
                neighbor, best, color = int(pairs.neighbors[row, k]), int(pairs.first[row, k]), COLORS[k % len(COLORS)]
                own.append((rois.of(row)[pairs.query_roi[best]].tolist(), color))
                partner = (rois.of(neighbor)[pairs.partner_roi[best]].tolist(), color)
                cells.append(_photograph(reader, neighbor, [partner], caption=f"cosine {pairs.similarities[best]:.2f}"))
            grid.rows.append([_photograph(reader, row, own), *cells])
    return grid


def render_views(index: ShardIndex, plan: ViewPlan, *, mined: Mined | None, loader: LoaderConfig, kind: str, device: torch.device) -> Batch:
    """Render the views of some images, as a training does; DataError if an image cannot be decoded."""
    with (
        closing(open_source(index, loader, patches=mined.patches if mined else None)) as source,
        closing(open_renderer(kind, source, loader, device=device)) as renderer,
    ):
        batch = renderer.render(plan)
    if len(batch.bad_rows):
        raise DataError(f"{index.path}: image {index.keys[int(batch.bad_rows[0])]} cannot be decoded; run orl-fast verify")
    return batch


def view_grid(
    index: ShardIndex, plan: ViewPlan, batch: Batch, *, specs: Sequence[ViewSpec], title: str, patches: PatchStore | None = None
) -> Grid:
    """Each image of a plan with its crop boxes, and its views as training sees them, in borders of the boxes' colors.

    A patch that comes from a neighbor is preceded by the neighbor with its box, or by the stored patch in `patches`.
    """
    headings = ["image"]
    for spec in specs:
        headings += (["neighbor"] if isinstance(spec.source, PairPartner) else []) + [spec.name.replace("_", " ")]
    note = "Boxes: what each view is cut from, in the color of its border. Below: what was done to it (blur: sigma in pixels of the view)."
    grid = Grid(title=title, note=note, headings=headings)
    with ShardReader(index) as reader:
        for b, row in enumerate(plan.rows.tolist()):
            own: Boxes = []
            cells: list[Cell] = []
            for v, spec in enumerate(specs):
                crop, color = v * len(plan.rows) + b, COLORS[v % len(COLORS)]
                source, box = int(plan.crops.source[crop]), (plan.crops.box[crop].tolist(), color)
                if not isinstance(spec.source, PairPartner):
                    own.append(box)
                elif source < len(index):
                    cells.append(_photograph(reader, source, [box]))
                elif patches is not None:
                    patch = source - len(index)
                    cells.append(Cell(image=np.asarray(decode_rgb(patches.view(patch))), caption=f"stored patch {patch}"))
                view = batch.views[spec.name][b].permute(1, 2, 0).cpu().numpy()
                cells.append(Cell(image=view, border=color, caption=_changes(plan, crop)))
            grid.rows.append([_photograph(reader, row, own), *cells])
    return grid


def _changes(plan: ViewPlan, crop: int) -> str:
    """What the plan does to a view besides cropping, in a few words."""
    crops = plan.crops
    recolored = (crops.factors[crop] != 1).any() or crops.hue[crop] != 0
    done = (crops.flip[crop], recolored, crops.grayscale[crop], crops.blur_sigma[crop] > 0, crops.solarize[crop])
    words = ("flip", "color", "gray", f"blur {crops.blur_sigma[crop]:.1f}", "solarized")
    return " · ".join(compress(words, done)) or "unchanged"


def _photograph(reader: ShardReader, row: int, boxes: Boxes, *, caption: str | None = None) -> Cell:
    """The cell of a packed image, by default with its file name below."""
    try:
        image = np.asarray(decode_rgb(reader.view(row)))
    except OSError as error:
        raise DataError(f"{reader.index.path}: image {reader.index.keys[row]} cannot be decoded ({error}); run orl-fast verify") from error
    return Cell(image=image, boxes=boxes, caption=reader.index.file_names[row] if caption is None else caption)


def _fit(cell: Cell) -> Image.Image:
    """The cell's image, enlarged or reduced into a square cell, with its boxes and border."""
    scale = _CELL_PX / max(cell.image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in cell.image.shape[:2])
    image = Image.fromarray(cell.image).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for number, (box, color) in enumerate(cell.boxes):
        # The same box for a second purpose is drawn within the first, so that both colors are seen.
        inset = (_LINE_PX + 2) * sum(np.allclose(box, other, atol=2) for other, _ in cell.boxes[:number])
        low = np.multiply(box[:2], scale) + inset
        high = np.maximum(np.multiply(box[2:], scale) - 1 - inset, low + 1)
        corners = np.clip([low, high], 0, (width - 1, height - 1))
        halo = np.add(corners, [[-1], [1]])  # or a dark box vanishes on a dark photograph
        draw.rectangle(halo.ravel().tolist(), outline=_PAPER, width=_LINE_PX + 2)
        draw.rectangle(corners.ravel().tolist(), outline=color, width=_LINE_PX)
    if cell.border:
        draw.rectangle([0, 0, width - 1, height - 1], outline=cell.border, width=_LINE_PX + 1)
    return image


def _elided(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text, or its two ends with dots between where it is wider than a cell."""
    shorter, kept = text, len(text)
    while font.getlength(shorter) > _CELL_PX:
        kept -= 1
        shorter = f"{text[: kept // 2]}…{text[kept // 2 - kept :]}"
    return shorter
