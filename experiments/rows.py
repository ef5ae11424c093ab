"""The comparison rows of a run: each one a run of its own, in a child process beside the main one."""

from __future__ import annotations

from pathlib import Path

from experiments import files
from experiments.children import Children, Job
from fedkd.config import Config
from fedkd.errors import ConfigError
from fedkd.overrides import override
from privacy.mechanisms import refuse


def configs(config: Config) -> dict[str, Config]:
    """The configuration of each row.

    Raises:
        ConfigError: A row is not a valid configuration.
    """
    rows = {}
    for label, overrides in config.compare.items():
        raw, _ = override(config.raw(), overrides)
        raw.pop("compare", None)
        raw["engine"] = {"device": config.engine.device}  # rows share the cores among themselves
        try:
            rows[label] = Config.from_raw(raw)
            refuse(rows[label])
        except ConfigError as error:
            raise ConfigError(f"compare.'{label}': {error}") from None
    return rows


class Rows(Children):
    """Runs the rows in child processes: one at a time while the main run works, two when it is done.

    Attributes:
        configs: The configuration of each row, by label.
    """

    def __init__(self, out: Path, config: Config) -> None:
        self.configs = configs(config)
        place = out.resolve() / files.COMPARE
        super().__init__(Job(label, row, place / label) for label, row in self.configs.items())
