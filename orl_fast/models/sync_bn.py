"""Batch statistics over all ranks: torch's own on GPUs, ours for gloo on CPUs."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from orl_fast.distributed import Ranks, sum_over_ranks


def synchronize_batch_norm(module: nn.Module, ranks: Ranks) -> None:
    """Take batch statistics over all ranks from now on; parameters, buffers and their names stay. Nothing to do for one rank."""
    if ranks.world_size > 1 and ranks.device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
    elif ranks.world_size > 1:
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.__class__ = CpuSyncBatchNorm  # type: ignore[assignment]


class CpuSyncBatchNorm(_BatchNorm):
    """Batch norm over all ranks for gloo, where torch's own wants a GPU. Ranks may hold different numbers of samples."""

    def _check_input_dim(self, input: Tensor) -> None:
        del input  # any number of dimensions: [B, C] and [B, C, h, w]

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        axes = [0, *range(2, values.ndim)]
        shape = [1, -1, *[1] * (values.ndim - 2)]
        num_values = values.new_tensor([values.numel() / values.shape[1]])
        sums = sum_over_ranks(torch.cat([values.sum(axes), num_values]))
        num_values = sums[-1].detach()
        mean = sums[:-1] / num_values
        centered = values - mean.view(shape)
        # A second round for the squares about the mean: E[x²] - E[x]² would cancel.
        variance = sum_over_ranks(centered.square().sum(axes)) / num_values
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * num_values / (num_values - 1), self.momentum)
        scale = torch.rsqrt(variance + self.eps)
        if not self.affine:
            return (centered * scale.view(shape)).to(input.dtype)
        return (centered * (self.weight * scale).view(shape) + self.bias.view(shape)).to(input.dtype)
