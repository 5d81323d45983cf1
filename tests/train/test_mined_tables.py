"""The tables of stage 2 that a run uses: those of its images, as much of them as it asks for, and those it began with."""

from pathlib import Path

import numpy as np
import pytest
import torch

from orl_fast.checkpoint import CHECKPOINT, read_header
from orl_fast.distributed import Ranks
from orl_fast.errors import MissingStageError, StaleError
from orl_fast.methods import ORL
from orl_fast.models import load_encoder
from orl_fast.shards import ShardIndex, ShardReader
from orl_fast.tables import table_info
from orl_fast.train.loop import train
from orl_fast.train.run import Run, mined_overrides, open_mined, warn_if_mined_elsewhere
from orl_fast.views import ViewLoader
from tests.train.conftest import EACH_EPOCH, run_config, train_run, write_patches, write_tables


@pytest.fixture
def own(packed: ShardIndex, tmp_path: Path) -> Path:
    """Tables that a test may change."""
    write_tables(tmp_path / "mined", index=packed.fingerprint, heights=packed.heights, widths=packed.widths)
    return tmp_path / "mined"


def _photo(index: ShardIndex) -> bytes:
    with ShardReader(index) as reader:
        return reader.views(np.array([0]))[0].tobytes()


def test_tables_are_opened_with_their_fingerprints(packed: ShardIndex, own: Path) -> None:
    tables = open_mined(packed, own, run_config())
    infos = {kind: table_info(own / kind) for kind in ("rois", "pairs")}
    assert tables.fingerprints == {kind: info.fingerprint for kind, info in infos.items() if info}
    assert tables.patches is None
    assert tables.pairs.neighbors.shape == (12, 3)
    assert mined_overrides(own) == ["mining.num_neighbors=3", "mining.pair_ratio=0.1"]


def test_fewer_neighbors_are_a_part_and_more_are_refused(packed: ShardIndex, own: Path) -> None:
    whole, part = (open_mined(packed, own, run_config(f"mining.num_neighbors={k}")).pairs for k in (3, 2))
    assert np.array_equal(part.neighbors, whole.neighbors[:, :2])
    for wanted in ("mining.num_neighbors=5", "pair_ratio=1.0"):
        with pytest.raises(StaleError, match="need more pairs than were mined, 3 neighbors with 1 pairs each; run orl-fast mine"):
            open_mined(packed, own, run_config(wanted))


def test_few_images_have_no_more_neighbors_than_there_are(packed: ShardIndex, tmp_path: Path) -> None:
    write_tables(tmp_path, index=packed.fingerprint, heights=packed.heights, widths=packed.widths, num_neighbors=11)
    assert open_mined(packed, tmp_path, run_config("mining.num_neighbors=20")).pairs.neighbors.shape == (12, 11)


def test_foreign_and_missing_tables_are_refused(packed: ShardIndex, own: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingStageError, match="run orl-fast mine"):
        open_mined(packed, tmp_path / "nothing", run_config())
    write_tables(tmp_path / "other", index="other shards", heights=packed.heights, widths=packed.widths)
    with pytest.raises(StaleError, match="made from index other shards"):
        open_mined(packed, tmp_path / "other", run_config())
    (own / "rois").rename(own / "rois-kept")
    with pytest.raises(MissingStageError, match="no rois table"):
        open_mined(packed, own, run_config())
    tables = own / "rois"
    (own / "rois-kept").rename(tables)
    text = (tables / "table.json").read_text()
    (tables / "table.json").write_text(text.replace('"settings": {}', '"settings": {"max_rois": 7}'))
    with pytest.raises(StaleError, match=r"made from RoIs .*, they are .* now"):
        open_mined(packed, own, run_config())


def test_patches_packed_while_a_run_exists_do_not_change_it(packed: ShardIndex, own: Path, tmp_path: Path) -> None:
    """The review's 4.8: a run without patches could not be resumed once some were packed."""
    config = run_config(*EACH_EPOCH, epochs=1)
    train_run(packed, tmp_path / "straight", config, mined=own)
    train_run(packed, tmp_path / "run", config, mined=own, max_steps=1)
    recorded = read_header(tmp_path / "run" / CHECKPOINT)["mined"]
    assert "patches" not in recorded
    write_patches(own, open_mined(packed, own, config), _photo(packed))
    tables = open_mined(packed, own, config, recorded=recorded)
    assert tables.patches is None
    assert tables.fingerprints == recorded
    outcome = train(Run(method="orl", config=config, folder=tmp_path / "run", mined=tables), index=packed, ranks=Ranks())
    assert (outcome.first_step, outcome.step) == (1, 3)
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == (tmp_path / "straight" / CHECKPOINT).read_bytes()
    with pytest.raises(StaleError, match="trained with patches None, now"):
        train_run(packed, tmp_path / "run", config, mined=own)
    assert open_mined(packed, own, run_config("use_patches=false", epochs=1)).fingerprints == recorded


def test_a_run_begun_with_patches_draws_partners_from_them_and_needs_them_again(packed: ShardIndex, own: Path, tmp_path: Path) -> None:
    config = run_config(epochs=1)
    plain = open_mined(packed, own, config)
    write_patches(own, plain, _photo(packed))
    tables = open_mined(packed, own, config)
    assert tables.patches is not None
    assert set(tables.fingerprints) == {"rois", "pairs", "patches"}

    batches = []
    for each in (plain, tables):
        with ViewLoader.open(packed, ORL.views(config), batch_size=12, mined=each, num_steps=1) as loader:
            batches.append(next(loader))
    same = {name: torch.equal(view, batches[1].views[name]) for name, view in batches[0].views.items()}
    assert same == {name: name != "partner_roi" for name in same}

    train_run(packed, tmp_path / "run", config, mined=own, max_steps=1)
    recorded = read_header(tmp_path / "run" / CHECKPOINT)["mined"]
    assert recorded == tables.fingerprints
    (own / "patches").rename(own / "elsewhere")
    with pytest.raises(StaleError, match=r"the patches that this run began with .* are not there any more; mine them again"):
        open_mined(packed, own, config, recorded=recorded)


def test_a_run_is_resumed_with_the_tables_it_began_with(packed: ShardIndex, own: Path) -> None:
    config = run_config()
    before = open_mined(packed, own, config)
    recorded = before.fingerprints
    (own / "pairs").rename(own / f"pairs@{recorded['pairs']}")  # as mining again with other settings leaves it
    write_tables(own, index=packed.fingerprint, heights=packed.heights, widths=packed.widths, num_neighbors=4, encoder="e1")
    assert open_mined(packed, own, config).fingerprints != recorded
    again = open_mined(packed, own, config, recorded=recorded)
    assert again.fingerprints == recorded
    assert np.array_equal(again.pairs.neighbors, before.pairs.neighbors)


def test_pairs_of_another_encoder_are_a_warning(packed: ShardIndex, own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = tmp_path / "run" / CHECKPOINT
    warn_if_mined_elsewhere(own, checkpoint)
    assert not caplog.records  # nothing to compare with
    train_run(packed, tmp_path / "run", run_config(epochs=1), max_steps=1)
    warn_if_mined_elsewhere(own, checkpoint)
    assert f"mined from another encoder than {checkpoint}" in caplog.text
    caplog.clear()
    encoder = load_encoder(checkpoint).fingerprint
    write_tables(own, index=packed.fingerprint, heights=packed.heights, widths=packed.widths, encoder=encoder)
    warn_if_mined_elsewhere(own, checkpoint)
    assert not caplog.records
