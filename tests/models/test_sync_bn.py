"""Batch norm over ranks where one rank holds all; two ranks are compared with one in tests/train/test_two_ranks.py."""

from pathlib import Path

import torch
from torch import nn

from orl_fast.distributed import Ranks
from orl_fast.models import Network
from orl_fast.models.sync_bn import CpuSyncBatchNorm, synchronize_batch_norm


def test_cpu_batch_norm_is_torchs_where_one_rank_holds_all(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        for shape in ((6, 5), (6, 5, 3, 4)):
            torch.manual_seed(0)
            values = torch.randn(shape, dtype=torch.float32) * 3 + 100
            plain = nn.BatchNorm1d(5) if len(shape) == 2 else nn.BatchNorm2d(5)
            nn.init.normal_(plain.weight)
            synced = CpuSyncBatchNorm(5)
            synced.load_state_dict(plain.state_dict())
            upstream = torch.randn(shape)
            results = []
            for norm in (plain, synced):
                inputs = values.clone().requires_grad_()
                output = norm(inputs)
                output.backward(upstream)
                results.append([output, inputs.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var])
            for expected, found in zip(*results, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(synced.eval()(values), plain.eval()(values), rtol=1e-4, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()


def test_without_affine_parameters_too(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        values = torch.randn((6, 5, 3, 4), generator=torch.Generator().manual_seed(0)) * 3 + 10
        plain, synced = nn.BatchNorm2d(5, affine=False), CpuSyncBatchNorm(5, affine=False)
        for _ in range(2):
            torch.testing.assert_close(synced(values), plain(values), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(synced.eval()(values), plain.eval()(values), rtol=1e-4, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()


def test_only_several_ranks_change_the_layers_and_names_stay() -> None:
    network = Network("resnet10_small", (8, 4))
    names = list(network.state_dict())
    synchronize_batch_norm(network, Ranks())
    assert not any(isinstance(layer, CpuSyncBatchNorm) for layer in network.modules())
    synchronize_batch_norm(network, Ranks(world_size=2))
    kinds = [type(layer) for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert set(kinds) == {CpuSyncBatchNorm}
    assert list(network.state_dict()) == names
