"""`orl-fast reproduce`: the paper from end to end."""

from pathlib import Path
from typing import Any

import click

_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.option("--coco", type=_FOLDER, help="train2017/, val2017/ and annotations/.")
@click.option("--voc", type=_FOLDER, help="VOCdevkit, VOC2007, or a folder above.")
@click.option("--imagenet", type=_FOLDER, help="train/ and val/ with a folder for each class.")
@click.option("--lists", type=_FOLDER, help="SimCLR's 1percent.txt and 10percent.txt.")
@click.option("--places", type=_FOLDER, help="Places205, with its lists.")
@click.option("--inat", type=_FOLDER, help="iNaturalist 2018, with train2018.json and val2018.json.")
@click.option("--out", type=_FOLDER, default=Path("reproduce"), show_default=True, help="Everything goes here.")
@click.option("--gpus", type=click.IntRange(min=1), help="Processes, one for each GPU [default: all GPUs].")
@click.option("--rehearse", is_flag=True, help="On drawn data in all the real layouts, with a small net, in minutes.")
@click.option("--plan", "plan_only", is_flag=True, help="Show the steps, and run nothing.")
def command(out: Path, gpus: int | None, rehearse: bool, plan_only: bool, **folders: Path | None) -> None:
    """Repeat the paper's experiments on COCO: BYOL, mining, ORL, and the evaluations of Tables 1 to 4.

    Runs on the GPUs of this machine, one or eight. Run the same command again to resume. A data set that is not named is left out. First
    the steps are listed with the images that go through a network, the time that takes at 1,000 images/s, and the disk it needs; long
    steps show their own rate and remaining time. The values are in OUT/results.md at the end.
    """
    import torch

    from orl_fast.console import log
    from orl_fast.demo.layouts import draw_layouts
    from orl_fast.demo.reproduce import REHEARSAL, DataSets, Scale, announce, missing, plan, run_steps
    from orl_fast.errors import ConfigError

    given: dict[str, Any] = {name: path for name, path in folders.items() if path is not None}
    num_gpus, scale = torch.cuda.device_count(), Scale()
    if rehearse:
        if given:
            raise click.UsageError("--rehearse draws all data sets itself; leave the others out")
        given, scale = draw_layouts(out / "data"), REHEARSAL
    elif "coco" not in given:
        raise click.UsageError("where is COCO? Give --coco FOLDER, or try everything with --rehearse")
    elif not num_gpus and not plan_only:
        raise ConfigError("no GPU is found here, and a ResNet-50 takes years of CPU time; use a machine with a GPU, or --rehearse")
    if gpus and num_gpus and gpus > num_gpus:
        raise ConfigError(f"--gpus {gpus}: this machine has {num_gpus}")
    data = DataSets(**given)
    steps = plan(data, out, scale=scale)
    lines = announce(steps, out)
    click.echo(f"a rehearsal of {len(steps)} steps on drawn data: its values mean nothing" if rehearse else "\n".join(lines))
    for line in missing(data):
        click.echo(f"left out: {line}")
    if plan_only:
        return
    failed = run_steps(steps, out, num_processes=gpus or max(1, num_gpus))
    log.info("results: %s", out / "results.md")
    click.echo((out / "results.md").read_text(), nl=False)
    if failed:
        click.echo(f"FAILED: {', '.join(failed)}; run the same command to repeat these alone.")
        raise click.exceptions.Exit(1)
