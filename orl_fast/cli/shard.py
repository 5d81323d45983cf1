"""`orl-fast shard`: pack image folders."""

from pathlib import Path

import click

from orl_fast.cli.pixels import pixel_options, store_pixels


@click.command()
@click.argument("sources", metavar="SRC...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Where to pack [default: shards/NAME, by the first source's name].")
@click.option("--split", "splits", multiple=True, help="Split of a COCO folder instead of train2017; may be repeated.")
@click.option("--shard-size", type=click.IntRange(min=1), default=256, show_default=True, help="Images per shard (at most 256 MB).")
@click.option("--workers", type=click.IntRange(min=1), help="Processes that decode and write [default: one per core].")
@click.option("--overwrite", is_flag=True, help="Replace what was packed there from other images or with other settings.")
@click.option("--pixels", is_flag=True, help="Also store the decoded pixels, as orl-fast pixels does.")
@pixel_options
def command(
    sources: tuple[Path, ...], out: Path | None, splits: tuple[str, ...], shard_size: int, workers: int | None, overwrite: bool,
    pixels: bool, budget: int | None, max_side: int | None, pixels_dir: Path | None,
) -> None:  # fmt: skip
    """Pack image folders into WebDataset tar shards.

    SRC is a COCO folder (its train2017, with the annotation file's order and ids), one of its split folders, or any folder of jpg, png,
    webp, bmp and tif images, however nested. Several are packed one after another. Every image is decoded once; original JPEG bytes are
    kept, images of other kinds are re-encoded, unreadable ones are quarantined with the reason. Run the same command again to resume.
    """
    if not pixels and (budget or max_side or pixels_dir):
        raise click.UsageError("--budget, --max-side and --pixels-dir say how to store pixels; add --pixels")
    from orl_fast.files import human_bytes
    from orl_fast.places import SHARDS_HOME
    from orl_fast.shards import write_shards

    folder = out or SHARDS_HOME / (sources[0].resolve().name or "images")
    manifest = write_shards(sources, folder, splits=splits, shard_size=shard_size, num_workers=workers, overwrite=overwrite)
    click.echo(f"{folder}: {manifest.num_images} images in {manifest.num_shards} shards, {human_bytes(manifest.num_bytes)}")
    click.echo(f"  {manifest.num_original} with their original bytes, {sum(manifest.reencoded.values())} re-encoded")
    for reason, count in manifest.reencoded.items():
        click.echo(f"    {count:6d} {reason}")
    if absent := sum(source.num_absent for source in manifest.sources):
        click.echo(f"  {absent} images of the annotation file are not on disk")
    if manifest.quarantined:
        click.echo(f"  {len(manifest.quarantined)} quarantined (all of them in {folder / 'manifest.json'}):")
        for entry in manifest.quarantined[:10]:
            click.echo(f"    {entry.file_name!r}: {entry.reason}")
    if pixels:
        store_pixels(folder, pixels_dir, budget=budget, max_side=max_side, workers=workers, overwrite=overwrite)
    click.echo(f"Next: orl-fast train {folder}")
