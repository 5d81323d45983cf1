"""`orl-fast import`: mined results of the reference, for training here."""

from pathlib import Path

import click


@click.command()
@click.argument("what", type=click.Choice(["neighbors", "proposals", "pairs"]))
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("shards", type=click.Path(path_type=Path), required=False)
@click.option("--annotations", type=click.Path(path_type=Path), help="COCO file that orders proposals [default: the one packed from].")
def command(what: str, file: Path, shards: Path | None, annotations: Path | None) -> None:
    """Use WHAT the reference implementation mined, from its JSON FILE, in place of our own tables.

    Images are matched by file name. `orl-fast mine` keeps imported tables and makes what is missing; "pairs" (its correspondence file)
    includes neighbors and RoIs, so that training can start. The former tables are kept in mined/KIND@FINGERPRINT. SHARDS is a
    shard folder [default: the only one below ./shards].
    """
    from orl_fast.cli.export import stage_for
    from orl_fast.mining.reference_json import import_neighbors, import_pairs, import_proposals

    stage = stage_for(shards, annotations=annotations)
    {"neighbors": import_neighbors, "proposals": import_proposals, "pairs": import_pairs}[what](stage, file)
    following = "orl-fast train --method orl" if what == "pairs" else "orl-fast mine"
    click.echo(f"imported: {stage.folder}. Next: {following} {stage.index.path}")
