"""`orl-fast import`, next to `orl-fast export`."""

from orl_fast.cli.export import import_command as command

__all__ = ["command"]
