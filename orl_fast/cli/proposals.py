"""`orl-fast proposals`: selective search on any images."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from orl_fast.selective_search import Backend


@click.command()
@click.argument("photos", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="JSON file to write; - is standard output.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@click.option("--split", help="Split of a COCO folder instead of train2017.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the boxes' order.")
@click.option("--backend", type=click.Choice(["fast", "opencv"]), default="fast", show_default=True, help="Same boxes, another order.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes [default: one per core].")
@click.option("--min-side", "min_side_px", type=click.FloatRange(min=0), help="Drop boxes with a shorter side, in pixels.")
@click.option("--max-aspect", type=click.FloatRange(min=1), help="Drop boxes longer or wider than this ratio of their sides.")
@click.option("--max-iou", type=click.FloatRange(0, 1), help="Drop boxes that overlap one kept before by more.")
@click.option("--max-boxes", "max_rois", type=click.IntRange(min=1), help="Keep the first of each image.")
def command(
    photos: Path, out: Path, overwrite: bool, split: str | None, seed: int, backend: "Backend", workers: int | None, **limits: float | None
) -> None:
    """Find boxes that may hold objects (selective search) and write them as COCO-like JSON.

    PHOTOS is an image or a folder of images, however nested, in any format that `orl-fast shard` packs. Boxes are in pixels of the
    upright image (EXIF rotation applied), in order of rank, and the same for any number of workers. An image that cannot be decoded is
    skipped. Without a filter, expect some 2,000 boxes and 250 kB per photograph; with one, an image where no box qualifies keeps its first.
    """
    from orl_fast.cores import num_cores
    from orl_fast.errors import DataError
    from orl_fast.mining.propose import write_proposals

    to_stdout = str(out) == "-"
    if out.exists() and not overwrite and not to_stdout:
        raise DataError(f"{out}: exists; replace it with --overwrite, or choose another --out")
    try:
        written = write_proposals(
            photos,
            sys.stdout.buffer if to_stdout else out,
            split=split,
            seed=seed,
            backend=backend,
            limits={name: limit for name, limit in limits.items() if limit is not None},
            num_workers=workers or num_cores(),
        )
    except KeyboardInterrupt:
        click.echo("Interrupted: no file was written.", err=True)
        sys.exit(130)
    place, each = "standard output" if to_stdout else out, written.num_boxes / written.num_images
    click.echo(f"{place}: {written.num_boxes:,} proposals in {written.num_images:,} images ({each:,.0f} each)", err=to_stdout)
    if written.num_absent:
        click.echo(f"  {written.num_absent} images of the annotation file are not on disk", err=to_stdout)
    if written.skipped:
        click.echo(f'  {len(written.skipped)} skipped (all of them under "skipped" in the file):', err=to_stdout)
        for name, reason in list(written.skipped.items())[:10]:
            click.echo(f"    {name!r}: {reason}", err=to_stdout)
