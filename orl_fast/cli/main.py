"""`orl-fast`: finds the verb, and turns user errors into one clear message."""

import importlib
import os
import sys
from typing import cast

import click

from orl_fast.cli.group import LazyGroup
from orl_fast.errors import OrlFastError
from orl_fast.spin import allow_spinning

VERBS = {
    "shard": "Pack image folders into WebDataset shards.",
    "pixels": "Store the decoded pixels of packed images, so that nothing decodes them again.",
    "verify": "Check packed shards.",
    "train": "Pre-train: BYOL (stage 1), ORL (stage 3) and other methods.",
    "mine": "Find neighbors and corresponding RoIs (stage 2).",
    "eval": "Evaluate a backbone: the paper's benchmarks, linear probe, kNN, CorLoc.",
    "results": "All values that evaluations found, as one table next to the paper's.",
    "show": "Draw pictures: mined pairs, augmented views.",
    "info": "Show information about a dataset, table, checkpoint or this machine.",
    "proposals": "Object proposals (selective search) of any images, as JSON.",
    "export": "Write a backbone for torchvision, timm, Detectron2, MMDetection, safetensors or ONNX.",
    "import": "Take a backbone of another toolkit.",
    "tables": "Exchange mined tables with the reference implementation.",
    "bench": "Measure speed against baselines.",
    "demo": "The whole method on synthetic scenes, in minutes.",
    "reproduce": "The experiments of the paper on COCO, from packing to the tables.",
}


class _Verbs(LazyGroup):
    table, noun = VERBS, "command"

    def load(self, name: str) -> click.Command:
        module = "import_" if name == "import" else name  # a keyword cannot name a module
        return cast(click.Command, importlib.import_module(f"orl_fast.cli.{module}").command)


@click.command(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="orl-fast", prog_name="orl-fast")
@click.option("-v", "--verbose", is_flag=True, help="Verbose output.")
@click.option("-q", "--quiet", is_flag=True, help="Warnings and results only.")
def cli(verbose: bool, quiet: bool) -> None:
    """Object-level representation learning (ORL) on folders of images.

    \b
    A whole run:
      orl-fast shard coco/          pack the images
      orl-fast train --epochs 800   stage 1: BYOL
      orl-fast mine                 stage 2: corresponding RoIs
      orl-fast train --epochs 800   stage 3: ORL
    """
    from orl_fast.console import set_up_logging

    set_up_logging(verbose=verbose, quiet=quiet)


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 an error that the message explains, 2 wrong usage, 130 interrupted."""
    if {"train", "demo"} & set(sys.argv[1:3]):
        allow_spinning(os.environ)
    # Waiting OpenMP threads sleep instead of spinning, since they share the cores with the loader's threads. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("Interrupted. Run the same command to resume.", err=True)
        sys.exit(130)
    except OrlFastError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output (head, less) is gone; nobody reads what follows.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
