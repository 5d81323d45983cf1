"""What ranks exchange, in two real processes; this file is also the program that they run."""

import pytest
import torch
import torch.distributed as dist

from orl_fast.distributed import Agreement, Ranks, broadcast_value, gather, mean_over_ranks, process_group, require_same, sum_over_ranks
from orl_fast.errors import ConfigError
from tests.ranks import run_ranks


def _check(ranks: Ranks) -> None:
    r = ranks.rank
    # The loss of each rank weights the gathered rows by its own factors: gradients add up over ranks, rows stay in their order.
    own = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64) + 10 * r
    own.requires_grad_()
    everyone = gather(own)
    assert everyone.tolist() == [[1, 2], [3, 4], [11, 12], [13, 14]]
    weights = torch.arange(8, dtype=torch.float64).view(4, 2) * (r + 1)
    (everyone * weights).sum().backward()
    assert own.grad is not None
    assert torch.equal(own.grad, 3 * torch.arange(8, dtype=torch.float64).view(4, 2)[2 * r : 2 * r + 2])

    value = torch.tensor([1.0 + r], requires_grad=True)
    total = sum_over_ranks(value)
    (total * (r + 1)).sum().backward()
    assert (total.item(), value.grad.item()) == (3, 3)  # type: ignore[union-attr]

    assert broadcast_value({"kind": f"of rank {r}"}, ranks) == {"kind": "of rank 0"}
    assert mean_over_ranks(torch.tensor([float(r), 4.0]), ranks).tolist() == [0.5, 4]

    require_same({"the recipe": "ab", "the shards": 3}, ranks)
    with pytest.raises(ConfigError, match="the shards: 7 on rank 0, 8 on rank 1; give all nodes the same"):
        require_same({"the recipe": "ab", "the shards": 7 + r, "the weights": r}, ranks)

    # A request of one rank at one step is known to all at the next, and only then.
    agreement = Agreement(ranks, 2)
    requests = [(False, False), (r == 1, False), (False, r == 0), (False, False), (False, False)]
    assert [agreement.any(*request) for request in requests] == [
        [False, False],
        [False, False],
        [True, False],
        [False, True],
        [False, False],
    ]
    agreement.any(False, False)


def test_two_ranks_agree() -> None:
    for code, output in run_ranks([__file__], [__file__]):
        assert code == 0, output


def test_a_process_alone_agrees_with_itself_at_once() -> None:
    ranks = Ranks()
    tensor = torch.randn(3, 2)
    assert gather(tensor) is tensor
    assert broadcast_value("own", ranks) == "own"
    assert mean_over_ranks(torch.tensor(2.0), ranks) == 2
    require_same({"the recipe": "ab"}, ranks)
    agreement = Agreement(ranks, 2)
    assert [agreement.any(True, False), agreement.any(False, False)] == [[True, False], [False, False]]


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with process_group("cpu") as ranks:
        assert (ranks.rank, ranks.world_size, ranks.is_main, ranks.device) == (0, 1, True, torch.device("cpu"))
        assert ranks.num_threads >= 1
        assert not dist.is_initialized()


@pytest.mark.parametrize("count", [0, 2])
def test_a_gpu_that_is_not_there_is_refused(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("LOCAL_RANK", "2")
    message = "rank 2 of this node finds 2 GPUs; start torchrun with --nproc-per-node" if count else "use --device cpu"
    with pytest.raises(ConfigError, match=message), process_group("cuda"):
        pass


if __name__ == "__main__":
    with process_group("cpu") as group:
        _check(group)
