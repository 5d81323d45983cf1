"""`orl-fast verify`: check packed shards."""

from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--fast", is_flag=True, help="Compare sizes and tables only, without reading the shards.")
@click.option("--decode", is_flag=True, help="Also decode every image.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes [default: one per core].")
def command(folder: Path | None, fast: bool, decode: bool, workers: int | None) -> None:
    """Check a packed FOLDER: checksums, tar files, index, pixels, and whether mined pairs are aligned. Exit code 1 if any are wrong."""
    if fast and decode:
        raise click.UsageError("--fast reads no images, --decode reads them all; choose one")
    from orl_fast.errors import DataError
    from orl_fast.places import default_shards
    from orl_fast.shards.index import ShardIndex
    from orl_fast.shards.verify import verify_shards

    path = default_shards(folder)
    faults = verify_shards(path, fast=fast, decode=decode, num_workers=workers)
    for file, message in faults:
        click.echo(f"{file}: {message}")
    if faults:
        files = len({file for file, _ in faults})
        remedy = "restore them, or pack the images again with orl-fast shard --overwrite"
        if all(file.name.startswith("pixels") for file, _ in faults):
            remedy = f"run orl-fast pixels {path} --overwrite"
        raise DataError(f"{path}: {files} files are damaged; {remedy}")
    index = ShardIndex.open(path)
    click.echo(f"{path}: {len(index)} images in {index.num_shards} shards are as they were packed ({index.fingerprint})")
