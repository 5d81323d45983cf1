"""`orl-fast pixels`: store the decoded pixels of packed images."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class _Bytes(click.ParamType[int]):
    """A size such as 60GB, 1.5TB or 500MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", value.lower())
        if not found or (size := int(float(found[1]) * _UNITS[found[2] or ""])) < 1:
            self.fail(f"{value!r}: write a size such as 60GB, 1.5TB or 500MiB", param, ctx)
        return size


def pixel_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--budget, --max-side and --pixels-dir."""
    for option in (
        click.option("--pixels-dir", type=click.Path(path_type=Path), help="Where, as on a faster disk [default: next to the JPEGs]."),
        click.option("--max-side", type=click.IntRange(min=16), help="Shrink longer sides to this, in pixels: less space, other views."),
        click.option("--budget", type=_Bytes(), help="Store as many images as fit, e.g. 60GB; the others stay JPEGs [default: all]."),
    ):
        function = option(function)
    return function


def store_pixels(
    folder: Path, pixels_dir: Path | None, *, budget: int | None, max_side: int | None, workers: int | None, overwrite: bool
) -> None:
    from orl_fast.files import human_bytes
    from orl_fast.shards import ShardIndex
    from orl_fast.shards.pixels import write_pixels

    info = write_pixels(
        ShardIndex.open(folder), pixels_dir, budget_bytes=budget, max_side=max_side, num_workers=workers, overwrite=overwrite
    )  # fmt: skip
    share = f"{info.num_stored:,} of {info.num_images:,} images" if info.num_stored < info.num_images else f"all {info.num_images:,} images"
    click.echo(f"{pixels_dir or folder}: the pixels of {share} in {len(info.shards)} shards, {human_bytes(info.num_bytes)}")


@click.command()
@click.argument("folder", metavar="[SHARDS]", type=click.Path(path_type=Path), required=False)
@pixel_options
@click.option("--workers", type=click.IntRange(min=1), help="Processes that decode and write [default: one per core].")
@click.option("--overwrite", is_flag=True, help="Write all again, also over the pixels of other images or of another --max-side.")
def command(
    folder: Path | None, budget: int | None, max_side: int | None, pixels_dir: Path | None, workers: int | None, overwrite: bool
) -> None:
    """Store the decoded pixels of the images packed in SHARDS.

    Training, mining and evaluations then take them by themselves and decode nothing: two to four times the images per second of one core,
    the same views to the last bit. An image of 640 x 480 takes 0.92 MB, COCO's train2017 109 GB. Run the same command again to resume;
    another --budget adds or removes images. Deleting the files (pixels*) goes back to the JPEGs.
    """
    from orl_fast.places import default_shards

    store_pixels(default_shards(folder), pixels_dir, budget=budget, max_side=max_side, workers=workers, overwrite=overwrite)
