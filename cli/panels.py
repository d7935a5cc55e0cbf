"""The help of a command that has many options: in groups, each under what it is about."""

from collections.abc import Mapping
from typing import Any

from typer.core import TyperCommand


def grouped(panels: Mapping[str, str]) -> type[TyperCommand]:
    """Return a kind of command whose help shows its options so: a heading, names of parameters."""

    class Grouped(TyperCommand):
        """A command with its options in groups."""

        def format_options(self, ctx: Any, formatter: Any) -> None:
            """Write arguments, then each group in its order."""
            found = {param.name: param for param in self.get_params(ctx)}
            named = " ".join(panels.values()).split()
            arguments = [name for name in found if name not in named]
            for heading, names in {"Arguments": " ".join(map(str, arguments)), **panels}.items():
                records = [found[name].get_help_record(ctx) for name in names.split()]
                with formatter.section(heading):
                    formatter.write_dl([record for record in records if record])

    return Grouped
