"""What only a GPU can show: a step that never waits for it, uploads, and NCCL."""

import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from orl_fast.checkpoint import CHECKPOINT, read_header
from orl_fast.distributed import Ranks
from orl_fast.shards import ShardIndex
from orl_fast.train.loop import train
from orl_fast.train.metrics import Meter
from orl_fast.train.run import Run, open_mined
from orl_fast.train.step import TrainStep
from orl_fast.views import Batch
from tests.synthetic import small_config, synthetic_batch
from tests.train.conftest import run_config

pytestmark = pytest.mark.gpu


def _ranks() -> Ranks:
    return Ranks(device=torch.device("cuda", 0))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_steps_learn_and_never_wait_for_the_device(precision: str) -> None:
    ranks, config = _ranks(), small_config("batch_size=16", f"precision={precision}")
    train_step, meter = TrainStep("orl", config, ranks=ranks), Meter(ranks)
    train_step.connect()
    losses = []
    for step in range(12):
        batches = meter.feed([synthetic_batch("orl", config, 16)])
        # The first steps choose cuDNN's algorithms and allocate.
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            train_step(batches, step=step, num_steps=12, lr=0.05, meter=meter)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses.append(meter.read()["loss"])
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in train_step.method.parameters())


def test_uploads_are_the_batches_and_waiting_is_counted() -> None:
    ranks, config = _ranks(), small_config()
    expected = [synthetic_batch("orl", config, 8, step=step) for step in range(4)]

    def slowly() -> Iterator[Batch]:
        for batch in expected:
            time.sleep(0.05)
            yield batch

    waited_s = []
    for source in (iter(expected), slowly()):
        meter, weight = Meter(ranks), torch.randn(512, 512, device=ranks.device)
        for batch, found in zip(expected, meter.feed(source), strict=True):
            assert list(found.views) == list(batch.views)
            for name, view in found.views.items():
                assert view.device == ranks.device
                assert view.is_contiguous(memory_format=torch.channels_last)
                assert torch.equal(view.cpu(), batch.views[name])
            weight = weight @ weight / 64
        torch.cuda.synchronize()
        waited_s.append(meter.waited_s())
    assert waited_s[1] > 0.1 > waited_s[0]  # three gaps of 50 ms between four batches


def test_gpu_and_cpu_compute_the_same_first_loss() -> None:
    losses, config = [], small_config("batch_size=16", "precision=fp32")
    for ranks in (Ranks(), _ranks()):
        train_step, meter = TrainStep("orl", config, ranks=ranks), Meter(ranks)
        batches = meter.feed([synthetic_batch("orl", config, 16)])
        train_step(batches, step=0, num_steps=1, lr=0.0, meter=meter)
        losses.append(meter.read()["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)  # TF32 convolutions


@pytest.mark.parametrize("renderer", ["cpu", "gpu", "auto"])
def test_a_run_is_resumed_with_its_renderer(renderer: str, packed: ShardIndex, mined: Path, tmp_path: Path) -> None:
    config = run_config(f"renderer={renderer}", epochs=2)
    tables = open_mined(packed, mined, config)
    outcome = train(Run(method="orl", config=config, folder=tmp_path, mined=tables), index=packed, ranks=_ranks(), max_steps=2)
    assert (outcome.first_step, outcome.step) == (0, 2)
    kind = read_header(tmp_path / CHECKPOINT)["renderer"]
    assert kind in ("cpu", "gpu")
    assert renderer in ("auto", kind)
    outcome = train(Run(method="orl", config=run_config(epochs=2), folder=tmp_path, mined=tables), index=packed, ranks=_ranks())
    assert (outcome.first_step, outcome.step) == (2, 6)
    assert read_header(tmp_path / CHECKPOINT)["renderer"] == kind


def test_one_nccl_rank_gives_the_gradients_of_none(tmp_path: Path) -> None:
    ranks = _ranks()
    config = small_config("batch_size=16", "precision=fp32")
    views = next(Meter(ranks).feed([synthetic_batch("byol", config, 16)])).views
    plain, wrapped = (TrainStep("byol", config, ranks=ranks).method for _ in range(2))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        nn.SyncBatchNorm.convert_sync_batchnorm(wrapped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            parallel = DistributedDataParallel(wrapped, broadcast_buffers=False, gradient_as_bucket_view=True)
        plain(views)["loss"].backward()
        parallel(views)["loss"].backward()
    finally:
        torch.distributed.destroy_process_group()
    for (name, one), other in zip(plain.named_parameters(), wrapped.parameters(), strict=True):
        if one.grad is not None:
            scale = one.grad.abs().max().item()
            torch.testing.assert_close(
                other.grad, one.grad, rtol=5e-2, atol=5e-2 * scale + 1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
