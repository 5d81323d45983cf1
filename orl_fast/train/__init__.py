"""Training: the loop, its step, schedules, checkpoints."""

from orl_fast.distributed import Ranks, process_group
from orl_fast.train.loop import Outcome, train

__all__ = ["Outcome", "Ranks", "process_group", "train"]
