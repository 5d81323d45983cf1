"""Pictures of what was mined and of what training sees: images in rows, boxes and borders in colors that belong together."""

import io
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
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
from orl_fast.tables import BoxTable, PairTable
from orl_fast.views.batch import Batch, Rows
from orl_fast.views.choose import open_renderer, open_source
from orl_fast.views.draw import draw_plan
from orl_fast.views.mined import Mined
from orl_fast.views.patches import PatchStore
from orl_fast.views.plan import ViewPlan
from orl_fast.views.specs import PairPartner, ViewSpec

# Distinct for color-blind readers too (Okabe and Ito), without yellow, which is lost on photographs; more than seven repeat.
COLORS = ("#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#7F3C8D")
_CELL_PX = 240
_GAP_PX = 14
_MARGIN_PX = 28
_INK, _FAINT_INK, _PAPER = "#1a1a1a", "#6b6b6b", "#ffffff"
_TITLE_PX, _HEAD_PX, _TEXT_PX = 24, 16, 14
_LINE_PX = 3

Box = Sequence[float]  # xyxy, pixels of the image it lies on


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One picture of a grid: an image [H, W, 3] uint8, boxes on it with their colors, a caption, a border color for the whole."""

    image: NDArray[np.uint8]
    boxes: Sequence[tuple[Box, str]] = ()
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
    columns = max([len(grid.headings), *(len(row) for row in grid.rows)])
    fitted = [[_fit(cell) for cell in row] for row in grid.rows]
    heights_px = [max(image.height for image in row) for row in fitted]
    caption_px = _TEXT_PX + 10
    top_px = _MARGIN_PX + _TITLE_PX + 10 + _TEXT_PX + 22 + _HEAD_PX + 10
    text_px = max(_font(_TITLE_PX).getlength(grid.title), _font(_TEXT_PX).getlength(grid.note))
    width_px = max(columns * (_CELL_PX + _GAP_PX) - _GAP_PX, int(text_px) + 1) + 2 * _MARGIN_PX
    height_px = top_px + sum(heights_px) + len(heights_px) * (caption_px + _GAP_PX) - _GAP_PX + _MARGIN_PX
    canvas = Image.new("RGB", (width_px, height_px), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN_PX, _MARGIN_PX), grid.title, _INK, _font(_TITLE_PX), anchor="lt")
    draw.text((_MARGIN_PX, _MARGIN_PX + _TITLE_PX + 10), grid.note, _FAINT_INK, _font(_TEXT_PX), anchor="lt")
    for column, heading in enumerate(grid.headings):
        draw.text((_column_px(column) + _CELL_PX // 2, top_px - 10), heading, _INK, _font(_HEAD_PX), anchor="ms")
    y = top_px
    for row, images, row_px in zip(grid.rows, fitted, heights_px, strict=True):
        for column, (cell, image) in enumerate(zip(row, images, strict=True)):
            x = _column_px(column)
            canvas.paste(image, (x + (_CELL_PX - image.width) // 2, y + row_px - image.height))
            caption = _elided(cell.caption, _font(_TEXT_PX))
            draw.text((x + _CELL_PX // 2, y + row_px + 6), caption, _FAINT_INK, _font(_TEXT_PX), anchor="mt")
        y += row_px + caption_px + _GAP_PX
    return canvas


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, atomically."""
    with atomic_file(path) as file:
        picture.save(file, "PNG", optimize=True)


def pair_grid(
    index: ShardIndex, rois: BoxTable, pairs: PairTable, *, images: Sequence[int], num_neighbors: int, title: str = "Corresponding RoIs"
) -> Grid:
    """Each image and its first neighbors: the best pair's two boxes in one color, with their similarity (ORL, figures 3 and 5).

    Args:
        images: rows of the index, one row of the grid each.
        num_neighbors: columns, at most what was mined.
    """
    num_neighbors = min(num_neighbors, pairs.neighbors.shape[1])
    grid = Grid(
        title=title,
        note="Boxes of one color are the best pair of RoIs of the image and that neighbor. Below: cosine similarity of the two RoIs.",
        headings=["image", *(f"neighbor {k + 1}" for k in range(num_neighbors))],
    )
    with ShardReader(index) as reader:
        for row in images:
            query_boxes: list[tuple[Box, str]] = []
            cells: list[Cell] = []
            for k in range(num_neighbors):
                neighbor, best = int(pairs.neighbors[row, k]), int(pairs.first[row, k])
                color = COLORS[k % len(COLORS)]
                query_boxes.append((rois.of(row)[pairs.query_roi[best]].tolist(), color))
                partner = rois.of(neighbor)[pairs.partner_roi[best]].tolist()
                caption = f"cosine {pairs.similarities[best]:.2f}"
                cells.append(Cell(image=_decode(reader, neighbor), boxes=[(partner, color)], caption=caption))
            grid.rows.append([Cell(image=_decode(reader, row), boxes=query_boxes, caption=index.file_names[row]), *cells])
    return grid


def render_views(
    index: ShardIndex,
    rows: Rows,
    specs: Sequence[ViewSpec],
    *,
    seed: int,
    epoch: int,
    mined: Mined | None,
    loader: LoaderConfig,
    kind: str,
    device: torch.device,
) -> tuple[ViewPlan, Batch]:
    """Draw and render the views of some images, as a training does.

    Raises:
        DataError: an image cannot be decoded.
    """
    plan = draw_plan(rows, specs, seed=seed, epoch=epoch, heights=index.heights, widths=index.widths, mined=mined)
    with (
        closing(open_source(index, loader, patches=mined.patches if mined else None)) as source,
        closing(open_renderer(kind, source, loader, device=device)) as renderer,
    ):
        batch = renderer.render(plan)
    if len(batch.bad_rows):
        raise DataError(f"{index.path}: image {index.keys[int(batch.bad_rows[0])]} cannot be decoded; run orl-fast verify")
    return plan, batch


def view_grid(
    index: ShardIndex, plan: ViewPlan, batch: Batch, *, specs: Sequence[ViewSpec], title: str, patches: PatchStore | None = None
) -> Grid:
    """Each image of a plan with its crop boxes, and its views as training sees them, in borders of the boxes' colors.

    A patch that comes from a neighbor is preceded by the neighbor with its box, or by the stored patch.

    Args:
        batch: the rendered views of all samples. specs: of the views. patches: those that the plan reads from.
    """
    headings = ["image"]
    for spec in specs:
        headings += (["neighbor"] if isinstance(spec.source, PairPartner) else []) + [spec.name.replace("_", " ")]
    note = "Boxes: what each view is cut from, in the color of its border. Below: what was done to it (blur: sigma in pixels of the view)."
    grid = Grid(title=title, note=note, headings=headings)
    views = [batch.views[spec.name].cpu().numpy() for spec in specs]
    with ShardReader(index) as reader:
        for b, row in enumerate(plan.rows.tolist()):
            own: list[tuple[Box, str]] = []
            cells: list[Cell] = []
            for v, spec in enumerate(specs):
                crop, color = v * len(plan.rows) + b, COLORS[v % len(COLORS)]
                source, box = int(plan.crops.source[crop]), (plan.crops.box[crop].tolist(), color)
                if not isinstance(spec.source, PairPartner):
                    own.append(box)
                elif source < len(index):
                    cells.append(Cell(image=_decode(reader, source), boxes=[box], caption=index.file_names[source]))
                elif patches is not None:
                    cells.append(Cell(image=_pixels(patches.view(source - len(index))), caption=f"stored patch {source - len(index)}"))
                cells.append(Cell(image=views[v][b].transpose(1, 2, 0), border=color, caption=_changes(plan, crop)))
            grid.rows.append([Cell(image=_decode(reader, row), boxes=own, caption=index.file_names[row]), *cells])
    return grid


def _changes(plan: ViewPlan, crop: int) -> str:
    """What the plan does to a view besides cropping, in a few words."""
    crops = plan.crops
    done = [
        ("flip", crops.flip[crop]),
        ("color", (crops.factors[crop] != 1).any() or crops.hue[crop] != 0),
        ("gray", crops.grayscale[crop]),
        (f"blur {crops.blur_sigma[crop]:.1f}", crops.blur_sigma[crop] > 0),
        ("solarized", crops.solarize[crop]),
    ]
    return " · ".join(word for word, is_done in done if is_done) or "unchanged"


def _decode(reader: ShardReader, row: int) -> NDArray[np.uint8]:
    try:
        return _pixels(reader.view(row))
    except OSError as error:
        raise DataError(f"{reader.index.path}: image {reader.index.keys[row]} cannot be decoded ({error}); run orl-fast verify") from error


def _pixels(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data.data)) as image:
        return np.asarray(image.convert("RGB"))


def _fit(cell: Cell) -> Image.Image:
    """The cell's image, enlarged or reduced into a square cell, with its boxes and border."""
    image = Image.fromarray(cell.image)
    scale = _CELL_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    drawn: list[Box] = []
    for box, color in cell.boxes:
        # The same box for a second purpose is drawn within the first, so that both colors are seen.
        inset = (_LINE_PX + 2) * sum(np.allclose(box, other, atol=2) for other in drawn)
        drawn.append(box)
        left, top, right, bottom = (float(edge) * scale for edge in box)
        corners = [left + inset, top + inset, max(right - 1 - inset, left + inset + 1), max(bottom - 1 - inset, top + inset + 1)]
        corners = [min(max(corner, 0), limit - 1) for corner, limit in zip(corners, (*size, *size), strict=True)]
        halo = [corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1]
        draw.rectangle(halo, outline=_PAPER, width=_LINE_PX + 2)  # or a dark box vanishes on a dark photograph
        draw.rectangle(corners, outline=color, width=_LINE_PX)
    if cell.border:
        draw.rectangle([0, 0, size[0] - 1, size[1] - 1], outline=cell.border, width=_LINE_PX + 1)
    return image


def _column_px(column: int) -> int:
    return _MARGIN_PX + column * (_CELL_PX + _GAP_PX)


def _font(size_px: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, so that a picture looks the same on a machine without fonts."""
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size_px))


def _elided(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text, or its two ends with dots between where it is wider than a cell."""
    if font.getlength(text) <= _CELL_PX:
        return text
    for kept in range(len(text) - 1, 1, -1):
        shorter = f"{text[: kept // 2]}…{text[-(kept - kept // 2) :]}"
        if font.getlength(shorter) <= _CELL_PX:
            return shorter
    return "…"
