"""Exit codes of the command line, and how errors become them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

BAD_INPUT, FAILED, CONTRADICTED, INTERRUPTED = 2, 1, 3, 130


@contextmanager
def errors() -> Iterator[None]:
    """Turn the errors fedkd raises on purpose into one line and an exit code."""
    from fedkd.errors import ConfigError, FedkdError

    try:
        yield
    except FedkdError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(BAD_INPUT if isinstance(error, ConfigError) else FAILED) from None
