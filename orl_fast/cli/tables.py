"""`orl-fast tables`: mined results as the reference implementation's JSON files, and back."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from orl_fast.mining.pipeline import Stage

WHAT = ("neighbors", "proposals", "pairs")


@click.group()
def command() -> None:
    """Exchange mined tables with the reference implementation, in its JSON formats."""


def _common(function: Any) -> Any:
    options = (
        click.argument("what", type=click.Choice(WHAT)),
        click.argument("file", type=click.Path(path_type=Path, dir_okay=False)),
        click.argument("shards", type=click.Path(path_type=Path), required=False),
        click.option("--mined", type=click.Path(path_type=Path, file_okay=False), help="Folder of the tables [default: SHARDS/mined]."),
        click.option("--checkpoint", type=click.Path(path_type=Path), help="That they were mined with [default: as orl-fast mine]."),
        click.option(
            "--annotations", type=click.Path(path_type=Path), help="COCO file that orders proposals [default: the one packed from]."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _stage(shards: Path | None, mined: Path | None, checkpoint: Path | None, annotations: Path | None) -> "Stage":
    """The stage of a shard folder, with the settings of its stage-1 checkpoint where there is one."""
    from orl_fast.mining.pipeline import Stage
    from orl_fast.places import default_shards, mined_folder, stage_1_checkpoint
    from orl_fast.recipe import trained_config
    from orl_fast.shards import ShardIndex

    index = ShardIndex.open(default_shards(shards))
    checkpoint = checkpoint or stage_1_checkpoint(index.path)
    folder, config = mined or mined_folder(index.path), trained_config(checkpoint)
    return Stage(index=index, folder=folder, config=config, checkpoint=checkpoint, annotations=annotations)


@command.command(short_help="Write mined tables as JSON.")
@_common
@click.option("--neighbors", type=click.IntRange(min=1), help="Neighbors per image [default: all that were mined].")
@click.option("--pair-ratio", type=click.FloatRange(0, 1, min_open=True), help="Share of RoIs that become pairs [default: as mined].")
def export(
    what: str,
    file: Path,
    shards: Path | None,
    mined: Path | None,
    checkpoint: Path | None,
    annotations: Path | None,
    neighbors: int | None,
    pair_ratio: float | None,
) -> None:
    """Write WHAT was mined or imported to FILE, in the JSON format of the reference implementation.

    SHARDS is a shard folder [default: the only one below ./shards].
    """
    from orl_fast.mining.reference_json import export_neighbors, export_pairs, export_proposals

    stage = _stage(shards, mined, checkpoint, annotations)
    match what:
        case "neighbors":
            export_neighbors(stage, file, num_neighbors=neighbors)
        case "proposals":
            export_proposals(stage, file)
        case _:
            export_pairs(stage, file, num_neighbors=neighbors, pair_ratio=pair_ratio)
    click.echo(f"written: {file}")


@command.command("import", short_help="Use mined tables of the reference implementation.")
@_common
@click.option("--skip-unknown", is_flag=True, help="Leave out neighbors that are not packed, instead of refusing the file.")
def import_(
    what: str, file: Path, shards: Path | None, mined: Path | None, checkpoint: Path | None, annotations: Path | None, skip_unknown: bool
) -> None:  # fmt: skip
    """Use WHAT the reference implementation mined, from its JSON FILE, in place of our own tables.

    Images are matched by file name. `orl-fast mine` keeps imported tables and makes what is missing; "pairs" (its correspondence file)
    includes neighbors and RoIs, so that training can start. The former tables are kept in mined/KIND@FINGERPRINT. SHARDS is a
    shard folder [default: the only one below ./shards].
    """
    from orl_fast.mining.reference_json import import_neighbors, import_pairs, import_proposals

    stage = _stage(shards, mined, checkpoint, annotations)
    match what:
        case "neighbors":
            import_neighbors(stage, file, skip_unknown=skip_unknown)
        case "proposals" if skip_unknown:
            raise click.UsageError(
                "--skip-unknown is about neighbors; of proposals, those of images that are not packed are left out anyway"
            )
        case "proposals":
            import_proposals(stage, file)
        case _:
            import_pairs(stage, file, skip_unknown=skip_unknown)
    following = "orl-fast train --method orl" if what == "pairs" else "orl-fast mine"
    folder = "" if mined is None else f" --{'mined' if what == 'pairs' else 'out'} {mined}"
    click.echo(f"imported: {stage.folder}. Next: {following} {stage.index.path}{folder}")
