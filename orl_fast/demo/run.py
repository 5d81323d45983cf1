"""The demo's stages, each by the functions that the commands use: draw, pack, BYOL, mine, ORL, evaluate, pictures.

Finished work is kept: run again, the demo resumes, as each of these functions does by itself.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from orl_fast.config import Config
from orl_fast.console import human_time, log
from orl_fast.demo.scenes import write_scenes
from orl_fast.distributed import Ranks
from orl_fast.errors import StaleError
from orl_fast.evals import Context
from orl_fast.evals.features import encode_labelled
from orl_fast.evals.knn import knn
from orl_fast.evals.labels import LabelledOptions
from orl_fast.evals.probe import linear_probe
from orl_fast.files import write_json
from orl_fast.mining.executor import Executor
from orl_fast.mining.pipeline import Stage
from orl_fast.models import Encoder, load_encoder, random_encoder
from orl_fast.recipe import load_config, with_overrides
from orl_fast.report import draw_grid, pair_grid, save_picture
from orl_fast.shards import ShardIndex, write_shards
from orl_fast.tables import BoxTable, PairTable
from orl_fast.train.loop import train
from orl_fast.train.run import Run, open_mined
from orl_fast.views.draw import Mined

# Three losses are summed in stage 3: it takes half of stage 1's rate, and fewer epochs, which cost twice as much.
ORL_LR_PER_256 = 0.8
PROBE_SIZE_PX = 24
PROBE_COST = 0.1  # stated, not chosen: saves time, and gives every encoder the same
MARGIN = 0.03  # of top-1: less than this above random features is no clear margin
_PICTURED = 5


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much is drawn and trained: scenes to learn from, labelled scenes of each part, epochs of each stage."""

    num_scenes: int = 2000
    num_labelled: int = 500
    byol_epochs: int = 9
    orl_epochs: int = 3


FAST = DemoSize(num_scenes=256, num_labelled=100, byol_epochs=1, orl_epochs=1)


@dataclass(eq=False)
class Stopped(Exception):
    """A signal, `signum`, ended a stage, whose state is saved."""

    signum: int


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The demo in one folder, which gets scenes/, shards/, runs/, pairs.png and results.json; `times_s`: how long each stage took."""

    folder: Path
    seed: int = 0
    size: DemoSize = field(default_factory=DemoSize)
    ranks: Ranks = field(default_factory=Ranks)
    times_s: dict[str, float] = field(default_factory=dict)

    def run_folder(self, method: str) -> Path:
        return self.folder / "runs" / "scenes" / method

    def clear(self) -> None:
        """Remove what an earlier demo left in the folder, and nothing else."""
        for name in ("scenes", "shards", "runs"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in ("pairs.png", "results.json", "demo.json"):
            (self.folder / name).unlink(missing_ok=True)

    def run(self) -> dict[str, dict[str, float]]:
        """All stages; returns "probe" and "knn", top-1 (0 to 1) on held-out labelled digits, and "chance" for "random", "BYOL" and "ORL".

        Stopped by SIGINT or SIGTERM: the same call resumes. StaleError if the folder holds a demo of another seed or size.
        """
        settings_file, settings = self.folder / "demo.json", {"seed": self.seed, **asdict(self.size)}
        if settings_file.is_file() and json.loads(settings_file.read_text()) != settings:
            raise StaleError(f"{self.folder}: holds a demo of another seed or size; use --restart to replace it, or another --out")
        write_json(settings_file, settings)
        scenes, shards = self.folder / "scenes", self.folder / "shards" / "scenes"
        with self._stage("drawing scenes"):
            write_scenes(scenes / "train", num_scenes=self.size.num_scenes, seed=self.seed)
            for name in ("labelled", "test"):
                num_scenes, held_out = self.size.num_labelled, name == "test"
                write_scenes(scenes / name, num_scenes=num_scenes, seed=self.seed, labelled=True, held_out_digits=held_out)
        with self._stage("packing them"):
            write_shards([scenes / "train" / "images"], shards, num_workers=self.ranks.num_threads)
        index, mined = ShardIndex.open(shards), shards / "mined"
        config = load_config("demo", overrides=[f"train.seed={self.seed}", f"train.epochs={self.size.byol_epochs}"])
        with self._stage("stage 1: BYOL"):
            self._train("byol", config, index)
        with self._stage("stage 2: mining"):
            executor = Executor(device=self.ranks.device, num_workers=self.ranks.num_threads)
            Stage(index=index, folder=mined, config=config, checkpoint=self.run_folder("byol"), executor=executor).run()
        with self._stage("stage 3: ORL"):
            changed = with_overrides(config, [f"train.epochs={self.size.orl_epochs}", f"optim.lr_per_256={ORL_LR_PER_256}"])
            self._train("orl", changed, index, mined=open_mined(index, mined, changed))
        with self._stage("scoring features"):
            results = self._evaluate(config, scenes)
        with self._stage("drawing pairs"):
            images = np.sort(np.random.default_rng(self.seed).permutation(len(index))[:_PICTURED]).tolist()
            tables = BoxTable.open(mined / "rois"), PairTable.open(mined / "pairs")
            grid = pair_grid(index, *tables, images=images, num_neighbors=4, title="Corresponding RoIs of the demo")
            save_picture(draw_grid(grid), self.folder / "pairs.png")
        return results

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        log.info("── %s", name)
        start_s = time.monotonic()
        yield
        self.times_s[name] = time.monotonic() - start_s
        log.info("── %s: done in %s, %s in all", name, human_time(self.times_s[name]), human_time(sum(self.times_s.values())))

    def _train(self, method: str, config: Config, index: ShardIndex, mined: Mined | None = None) -> None:
        outcome = train(Run(method=method, config=config, folder=self.run_folder(method), mined=mined), index=index, ranks=self.ranks)
        if outcome.signum:
            raise Stopped(outcome.signum)

    def _evaluate(self, config: Config, scenes: Path) -> dict[str, dict[str, float]]:
        """Scores of the three encoders, from results.json where it holds those of these very weights."""
        encoders = {"random": random_encoder(config), **{name: load_encoder(self.run_folder(name.lower())) for name in ("BYOL", "ORL")}}
        file = self.folder / "results.json"
        known = json.loads(file.read_text()) if file.is_file() else {}
        for name, encoder in encoders.items():
            if known.get(name, {}).get("encoder") != encoder.fingerprint:
                known[name] = {"encoder": encoder.fingerprint, **self._score(encoder, scenes)}
                write_json(file, known)
        return {name: {kind: known[name][kind] for kind in ("probe", "knn", "chance")} for name in encoders}

    def _score(self, encoder: Encoder, scenes: Path) -> dict[str, float]:
        options = LabelledOptions(test=scenes / "test", size_px=PROBE_SIZE_PX)
        context = Context(device=self.ranks.device, num_threads=self.ranks.num_threads)
        train, test = encode_labelled(encoder, scenes / "labelled", options, context)
        probe = linear_probe(train, test, cost=PROBE_COST)
        return {"probe": probe["top1"], "knn": knn(train, test)["top1"], "chance": probe["chance"]}


def learned_beat_random(results: dict[str, dict[str, float]]) -> list[str]:
    """What fell short of the demo's check: the linear probe of BYOL and of ORL, clearly above random features. Empty: it passed."""
    floor = results["random"]["probe"] + MARGIN
    return [name for name in ("BYOL", "ORL") if results[name]["probe"] < floor]
