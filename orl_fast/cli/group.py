"""Groups whose commands are listed in a table, so that each is loaded only when it is used."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping

import click


class LazyGroup(click.Group, ABC):
    """A subclass has the table, name → line in the help; what its entries are called; and loads one of them."""

    table: Mapping[str, str]
    noun: str

    @abstractmethod
    def load(self, name: str) -> click.Command:
        """The command of an entry of the table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self.load(cmd_name) if cmd_name in self.table else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0], self.table, n=1) if args and args[0] not in self.table else []
        if near:
            ctx.fail(f"No such {self.noun} {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section(f"{self.noun.capitalize()}s"):
            formatter.write_dl(list(self.table.items()))
