"""`orl-fast export` and `orl-fast import`: backbones as files of other toolkits, and back."""

from pathlib import Path
from typing import Any

import click

from orl_fast.cli.tables import WHAT

TARGETS = ("torchvision", "timm", "detectron2", "mmdet", "safetensors", "onnx")


class _Weights(click.Command):
    """Mined tables once were the business of these verbs."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] in WHAT and not Path(args[0]).exists():
            ctx.fail(f"{self.name} is about weights; for mined tables: orl-fast tables {self.name} {' '.join(args)}")
        return super().parse_args(ctx, args)


def _common(function: Any) -> Any:
    options = (
        click.option("--backbone", help="Architecture, where the file does not say it, for example timm/vit_small_patch16_224."),
        click.option("--prefix", help="Of the backbone's names, where the file holds several, for example student, or target."),
        click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The file to write."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.command("export", cls=_Weights)
@click.argument("checkpoint")
@click.option("--to", "target", type=click.Choice(TARGETS), required=True, help="The toolkit that is to load it.")
@_common
@click.option("--size", type=click.IntRange(min=8), default=224, show_default=True, help="Side of ONNX's images, where it is not free.")
def command(checkpoint: str, target: str, backbone: str | None, prefix: str | None, out: Path, size: int) -> None:
    """Write the backbone of CHECKPOINT to a file that another toolkit loads, and print how.

    CHECKPOINT is what `orl-fast eval` takes: a run, a checkpoint.pt (its online network; --prefix target: the moving average), weights of
    another toolkit, or `random`. What was written is read back and compared.

    \b
    torchvision  state_dict of torchvision.models.NAME, without the classifier
    timm         state_dict of timm.create_model(NAME, num_classes=0)
    detectron2   pickle in Detectron2's names, for cfg.MODEL.WEIGHTS (ResNets)
    mmdet        state_dict for init_cfg=dict(type="Pretrained", prefix="backbone.") of MMDetection and its kin (ResNets)
    safetensors  torchvision's or timm's names, and the architecture
    onnx         images [B, 3, H, W], normalized → features [B, C] and feature_map
    """
    _export(checkpoint, target, backbone, prefix, out, size)


@click.command("import", cls=_Weights)
@click.argument("file")
@_common
def import_command(file: str, backbone: str | None, prefix: str | None, out: Path) -> None:
    """Write the backbone of FILE, weights of any toolkit, to a safetensors file with its architecture.

    It has torchvision's or timm's names, and `orl-fast eval` and `orl-fast export` take it without further options. Mining needs the
    projector that a run of orl-fast trains, and does not take it.
    """
    _export(file, "safetensors", backbone, prefix, out, 224)


def _export(checkpoint: str, target: str, backbone: str | None, prefix: str | None, out: Path, size: int) -> None:
    from orl_fast.files import human_bytes
    from orl_fast.models import open_encoder
    from orl_fast.models.export import export_backbone

    opened = open_encoder(checkpoint, backbone=backbone, prefix=prefix)
    if opened.path is not None and out.exists() and out.samefile(opened.path):
        raise click.UsageError(f"--out {out}: is the file that is read, which may hold more than the backbone; name another file")
    done = export_backbone(opened.encoder, target, out, source=checkpoint, size_px=size)
    click.echo(f"written: {out} ({opened.encoder.name}, {human_bytes(done.num_bytes)}); {done.checked}")
    click.echo("Load it:")
    for line in done.loading:
        click.echo(f"    {line}")
