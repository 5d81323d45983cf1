import torch

from orl_fast.config import ModelConfig
from orl_fast.models import MomentumEncoder, predictor, projector

SMALL = ModelConfig(backbone="resnet18", projector_hidden=16, projector_out=8, predictor_hidden=16)


def _encoder(seed: int = 0) -> MomentumEncoder:
    torch.manual_seed(seed)
    return MomentumEncoder(SMALL)


def test_target_starts_equal_and_is_averaged() -> None:
    encoder = _encoder()
    for online, target in zip(encoder.online.parameters(), encoder.target.parameters(), strict=True):
        assert torch.equal(online, target)
        assert not target.requires_grad
    with torch.no_grad():
        for parameter in encoder.online.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = [parameter.clone() for parameter in encoder.target.parameters()]
    for momentum in (0.99, 0.25, 1.0):
        encoder.update_target(momentum)
        online = [parameter.double() for parameter in encoder.online.parameters()]
        before = [momentum * old.double() + (1 - momentum) * new for old, new in zip(before, online, strict=True)]
        for target, expected in zip(encoder.target.parameters(), before, strict=True):
            torch.testing.assert_close(target.double(), expected, rtol=1e-5, atol=1e-6)


def test_buffers_come_from_the_targets_own_forwards() -> None:
    encoder = _encoder().train()
    views = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    encoder.encode(views)
    online, target = dict(encoder.online.named_buffers()), dict(encoder.target.named_buffers())
    assert all(torch.equal(online[name], target[name]) for name in online)  # same weights, same views, two updates each
    assert target["projector.1.num_batches_tracked"] == 2
    encoder.update_target(0.0)
    encoder.encode([torch.randn(4, 3, 32, 32)])
    before = {name: buffer.clone() for name, buffer in encoder.target.named_buffers()}
    encoder.update_target(0.5)
    assert all(torch.equal(before[name], buffer) for name, buffer in encoder.target.named_buffers())


def test_no_gradient_reaches_the_target() -> None:
    encoder = _encoder()
    online, target = encoder.encode([torch.randn(4, 3, 32, 32) for _ in range(2)])
    assert all(projection.requires_grad for projection in online)
    assert not any(projection.requires_grad for projection in target)


def test_joined_views_share_their_batch_statistics() -> None:
    views = [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32) * 3 + 1]
    apart, _ = _encoder().encode(views)
    together, _ = _encoder().encode(views, joined=True)
    assert [projection.shape for projection in together] == [projection.shape for projection in apart]
    assert not torch.allclose(apart[0], together[0], atol=1e-3)
    eval_apart, _ = _encoder().eval().encode(views)
    eval_together, _ = _encoder().eval().encode(views, joined=True)
    for one, other in zip(eval_apart, eval_together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_heads_have_the_papers_layers() -> None:
    head = projector(2048, hidden=4096, out=256)
    assert {name: tuple(value.shape) for name, value in head.named_parameters()} == {
        "0.weight": (4096, 2048), "0.bias": (4096,), "1.weight": (4096,), "1.bias": (4096,), "3.weight": (256, 4096)
    }  # fmt: skip
    assert sum(parameter.numel() for parameter in predictor(256, hidden=4096).parameters()) == 256 * 4096 + 3 * 4096 + 4096 * 256
