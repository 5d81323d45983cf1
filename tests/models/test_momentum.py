import torch
from torch import Tensor

from orl_fast.config import ModelConfig
from orl_fast.models import Branch, frozen_copy, predictor, project, projector, update_target

SMALL = ModelConfig(backbone="resnet18", projector_hidden=16, projector_out=8, predictor_hidden=16)


def _branches() -> tuple[Branch, Branch]:
    torch.manual_seed(0)
    online = Branch(SMALL)
    return online, frozen_copy(online)


def _views() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 32, 32, generator=generator) * scale for scale in (1, 3)]


def test_target_starts_equal_and_is_averaged() -> None:
    online, target = _branches()
    for one, other in zip(online.parameters(), target.parameters(), strict=True):
        assert torch.equal(one, other)
        assert not other.requires_grad
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(torch.randn_like(parameter))
    expected = [parameter.double() for parameter in target.parameters()]
    for momentum in (0.99, 0.25, 1.0):
        update_target(target, online, momentum=momentum)
        for i, (found, new) in enumerate(zip(target.parameters(), online.parameters(), strict=True)):
            expected[i] = momentum * expected[i] + (1 - momentum) * new.detach().double()
            torch.testing.assert_close(found.double(), expected[i], rtol=1e-5, atol=1e-6)


def test_buffers_come_from_the_targets_own_forwards() -> None:
    online, target = _branches()
    project(online, _views())
    project(target, _views()[:1])
    update_target(target, online, momentum=0.0)
    assert online.projector[1].num_batches_tracked == 2
    assert target.projector[1].num_batches_tracked == 1
    assert not torch.equal(target.projector[1].running_mean, online.projector[1].running_mean)


def test_joined_views_share_their_batch_statistics() -> None:
    online, _ = _branches()
    apart, together = project(online, _views()), project(online, _views(), joined=True)
    assert [projection.shape for projection in together] == [projection.shape for projection in apart]
    assert not torch.allclose(apart[0], together[0], atol=1e-3)
    online.eval()
    for one, other in zip(project(online, _views()), project(online, _views(), joined=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_heads_have_the_papers_layers() -> None:
    head = projector(2048, hidden=4096, out=256)
    assert {name: tuple(value.shape) for name, value in head.named_parameters()} == {
        "0.weight": (4096, 2048), "0.bias": (4096,), "1.weight": (4096,), "1.bias": (4096,), "3.weight": (256, 4096)
    }  # fmt: skip
    assert sum(parameter.numel() for parameter in predictor(256, hidden=4096).parameters()) == 256 * 4096 + 3 * 4096 + 4096 * 256
