"""`orl-fast demo`: the whole method on synthetic scenes, in minutes."""

import sys
from contextlib import nullcontext
from pathlib import Path

import click


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("demo-run"), show_default=True, help="Its folder.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the scenes and of training.")
@click.option("--fast", is_flag=True, help="A few scenes, one epoch: a check that everything works, not a training.")
@click.option("--restart", is_flag=True, help="Discard an existing demo and start from scratch.")
def command(out: Path, seed: int, fast: bool, restart: bool) -> None:
    """Draw scenes, pack them, BYOL, mine, ORL, then score the features against random ones. Two cores, no GPU and no download needed.

    Exit code 1 if the features of BYOL or ORL do not beat random ones by a clear margin.
    """
    from orl_fast.demo.run import FAST, Demo, DemoSize, Stopped, learned_beat_random
    from orl_fast.distributed import process_group
    from orl_fast.spin import spinning_while_idle

    with process_group() as ranks:
        demo = Demo(folder=out, seed=seed, size=FAST if fast else DemoSize(), ranks=ranks)
        if restart:
            demo.clear()
        try:
            with spinning_while_idle() if ranks.device.type == "cpu" else nullcontext():
                results = demo.run()
        except Stopped as stopped:
            click.echo(f"Stopped; run the same command to resume in {out}.")
            sys.exit(128 + stopped.signum)
    _show(results, folder=out, time_s=sum(demo.times_s.values()))
    if fast:
        click.echo("With --fast, scores mean nothing and are not checked.")
        return
    failed = learned_beat_random(results)
    if failed:
        click.echo(f"FAILED: the features of {' and '.join(failed)} do not beat random ones by a clear margin.")
        sys.exit(1)
    click.echo("Learned features beat random ones. Nothing is claimed about ORL against BYOL: one small run cannot decide that.")


def _show(results: dict[str, dict[str, float]], *, folder: Path, time_s: float) -> None:
    from rich.console import Console
    from rich.table import Table

    from orl_fast.console import human_time

    table = Table("features", "linear probe", "kNN", title="Recognizing held-out digits by frozen features (top-1)", title_justify="left")
    for name, values in results.items():
        table.add_row(name, f"{100 * values['probe']:.1f} %", f"{100 * values['knn']:.1f} %")
    console = Console(highlight=False)
    console.print("", table)
    console.print(
        f"Chance is {100 * results['random']['chance']:.1f} %. {human_time(time_s)} in all.\n\n"
        f"In {folder}/:\n"
        "  pairs.png      mined pairs, to look at\n"
        "  shards/scenes  packed scenes, with the tables of stage 2 in mined/\n"
        "  runs/scenes    runs: byol/ and orl/, each with checkpoint.pt\n"
        "  results.json   the table above\n\n"
        "The same on your photographs:\n"
        "  orl-fast shard PHOTOS/\n"
        "  orl-fast train --epochs 800\n"
        "  orl-fast mine\n"
        "  orl-fast train --epochs 800\n"
        "  orl-fast eval probe runs/PHOTOS/orl LABELLED/\n"
        "  orl-fast show pairs\n",
        soft_wrap=True,
    )
