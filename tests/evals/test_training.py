"""A training within an evaluation: killed, interrupted and resumed, it ends with the weights of a straight one."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch

from orl_fast.distributed import Ranks
from orl_fast.errors import DataError
from orl_fast.evals import Context
from orl_fast.evals.training import Training
from tests.ranks import run_ranks, start_rank

STEPS = 40


def _train(
    work: Path | None, *, num_steps: int = STEPS, pause_s: float = 0, fail_at: int | None = None, ranks: Ranks | None = None
) -> torch.Tensor:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    context = Context(device=torch.device("cpu"), work=work, ranks=ranks or Ranks())

    def step(number: int) -> dict[str, torch.Tensor]:
        images = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
        loss = (model(images) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(pause_s)
        return {"loss": loss / 0 if number == fail_at else loss}

    with Training.open({"model": model, "optimizer": optimizer}, num_steps=num_steps, context=context, save_every_s=0.05) as training:
        training.run(step, what="test", images_per_step=8)
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def _main(folder: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        _train(Path(folder), pause_s=0.05)


def test_a_killed_training_ends_as_a_straight_one(tmp_path: Path) -> None:
    straight = _train(None)
    for stop in (signal.SIGKILL, signal.SIGTERM):
        folder = tmp_path / stop.name
        process = start_rank(["-c", f"from tests.evals.test_training import _main; _main({str(folder)!r})"])
        deadline = time.monotonic() + 60
        while not (folder / "checkpoint-previous.pt").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(stop)
        output, _ = process.communicate(timeout=60)
        assert (process.returncode == 0) == (stop == signal.SIGTERM), output
        saved = torch.load(folder / "checkpoint.pt")["step"]
        assert 0 < saved < STEPS
        assert torch.equal(_train(folder), straight)
        assert torch.equal(_train(folder), straight)  # nothing is left to do
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps))
        assert steps[-1] == STEPS


def test_threads_that_earlier_work_left_do_not_matter() -> None:
    former = torch.get_num_threads()
    torch.set_num_threads(Ranks().num_threads + 1)
    try:
        _train(None, num_steps=1)
        assert torch.get_num_threads() == Ranks().num_threads
    finally:
        torch.set_num_threads(former)


def test_a_damaged_state_costs_the_last_minutes_alone(tmp_path: Path) -> None:
    straight = _train(tmp_path, pause_s=0.005)
    assert (tmp_path / "checkpoint-previous.pt").exists()
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    assert torch.equal(_train(tmp_path), straight)


def test_a_loss_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not finite, so training stops"):
        _train(tmp_path, fail_at=STEPS - 1)
    assert not (tmp_path / "checkpoint.pt").exists() or torch.load(tmp_path / "checkpoint.pt")["step"] < STEPS


def test_ranks_that_begin_differently_are_refused(tmp_path: Path) -> None:
    _train(tmp_path / "0", num_steps=4)
    script = tmp_path / "rank.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom orl_fast.distributed import process_group\n"
        "from tests.evals.test_training import _train\n"
        "with process_group('cpu') as ranks:\n    _train(Path(sys.argv[1]) / str(ranks.rank), num_steps=8, ranks=ranks)\n"
    )
    for exit_code, output in run_ranks([script, tmp_path], [script, tmp_path]):
        assert exit_code != 0
        assert "the step to start from: 4 on rank 0, 0 on rank 1" in output
