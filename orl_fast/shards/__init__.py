"""Datasets: WebDataset tar shards with a memory-mapped index (format: shards/FORMAT.md)."""

from orl_fast.shards.index import Manifest, ShardIndex
from orl_fast.shards.reader import ShardReader
from orl_fast.shards.writer import write_shards

__all__ = ["Manifest", "ShardIndex", "ShardReader", "write_shards"]
