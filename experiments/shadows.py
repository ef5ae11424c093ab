"""Shadows of a run: the same federation, with the canaries' coins and all that training draws drawn anew.

A shadow is the whole pipeline, from records to messages to student, on the run's own data, split and canaries, from the
same initial weights, with the same cohorts. Nothing in it depends on the run's own coins or noise, so that a score
made with shadows is as good as fixed beforehand: what it guesses of the run's coins may certify an epsilon. Choose the
number of shadows before looking: each look with more of them is another chance to contradict a true claim.

What stays of a shadow, ``DIR/shadows/<number>/``: its configuration, and ``canaries.npz`` with its coins and the
log-odds of every canary's wrong label on everything that is audited.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from clients.client import Site
from experiments import files
from experiments.audit import Auditor
from experiments.children import Children, Job
from experiments.run import Run
from experiments.sweep import Board, alone, default_jobs, watch
from fedkd import seeds
from fedkd.config import Config
from fedkd.data.datasets import TEXTS
from fedkd.errors import ConfigError
from fedkd.federation import Federation
from fedkd.homes import Homes
from privacy.audits.lira import log_odds
from strategies.flower import KnowledgeStrategy

FOLDER, CANARIES = "shadows", "canaries.npz"
_HASH, _COINS = "config_hash", "included"


@dataclass(frozen=True, eq=False)
class Scores:
    """What one run, or shadow, says about canaries and about records like them.

    Attributes:
        included: (m,) bool, which canaries it trained on.
        log_odds: By target, (m + n,) log-odds in nats of the wrong label of the m canaries, then of n test images that
            nobody trains on, with wrong labels and owners like the canaries'.
    """

    included: NDArray[np.bool_]
    log_odds: Mapping[str, NDArray[np.float64]]

    def write(self, path: Path, config: Config) -> None:
        """Write beside, then rename."""
        draft = path.with_name(f".{path.name}.draft")
        with draft.open("wb") as file:
            arrays: dict[str, Any] = {_HASH: np.array(config.hash), _COINS: self.included, **self.log_odds}
            np.savez(file, **arrays)
        draft.replace(path)

    @classmethod
    def read(cls, path: Path, config: Config) -> Scores:
        """Read the scores of a configuration.

        Raises:
            ConfigError: The file is damaged, or another configuration's.
        """
        try:
            with path.open("rb") as file, np.load(file) as arrays:
                found = dict(arrays)
            name, included = str(found.pop(_HASH)), found.pop(_COINS)
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            raise ConfigError(f"{path}: damaged; delete it, and train the shadow again with 'fedkd shadows'") from None
        if name != config.hash:
            raise ConfigError(f"{path}: of another configuration ({name}, not {config.hash}); delete {path.parent}")
        return cls(included, found)


def scores(auditor: Auditor) -> Scores:
    """Score the canaries, and records like them, on all that a run left behind."""
    federation = auditor.site.federation
    _, wrong = federation.canary_set()
    x, label, owner = _population(federation)
    others = auditor.asked(x, owner, "audit noise of the population")
    found = {
        target: np.concatenate(
            [log_odds(z.cpu().numpy(), y) for z, y in ((own, wrong.cpu().numpy()), (others[target], label))]
        )
        for target, own in auditor.canary_logits.items()
    }
    return Scores(federation.split.canaries.included, found)


def _population(federation: Federation) -> tuple[Any, NDArray[np.int64], NDArray[np.int64]]:
    """Test images, each with the wrong label and the owner of a random canary, where that label is wrong for it."""
    canaries, true = federation.split.canaries, federation.test_y.cpu().numpy()
    like = seeds.generator(federation.config.seed, "audit population").integers(len(canaries), size=len(true))
    kept = np.flatnonzero(canaries.label[like] != true)
    return federation.test_x[kept], canaries.label[like[kept]], canaries.owner[like[kept]]


def shadow(config: Config, number: int) -> Config:
    """The configuration of one of a run's shadows, from 1; scored after the last round only."""
    audit = config.audit.model_copy(update={"coins": number})
    federation = config.federation.model_copy(update={"evaluate_every": config.federation.rounds})
    return replace(config, audit=audit, federation=federation, compare={})


def trained(directory: Path) -> list[Scores]:
    """The scores of all shadows of the run in a directory, in their order; those half made are left out.

    Raises:
        ConfigError: A file is damaged or another configuration's.
    """
    config = files.config_of(directory)
    found = (path for path in directory.glob(f"{FOLDER}/*/{CANARIES}") if path.parent.name.isdecimal())
    numbered = sorted((int(path.parent.name), path) for path in found)
    return [Scores.read(path, shadow(config, number)) for number, path in numbered]


@dataclass(frozen=True)
class ShadowJob(Job):
    """A shadow to train."""

    def finished(self) -> bool:
        """Whether its scores are there."""
        try:
            Scores.read(self.place / CANARIES, self.config)
        except ConfigError:
            return False
        return True

    def command(self, source: Path) -> list[str]:
        """Hidden from the command line's help."""
        return ["shadow", str(source), "--out", str(self.place)]


@dataclass
class Shadows:
    """Some shadows of one run, and who trains them.

    Attributes:
        directory: The run's.
        runs: How many.
        first: Number of the first.
        jobs: How many at a time; None for as many as there are cores.
    """

    directory: Path
    runs: int
    first: int
    jobs: int | None
    console: Console

    def go(self) -> dict[str, str]:
        """Train what is not there yet; return why shadows failed, by label.

        Raises:
            ConfigError: The directory holds no finished run with canaries among images, or a number is out of range.
            KeyboardInterrupt: As it came, when all children have ended.
        """
        for name, value in (("--runs", self.runs), ("--first", self.first), ("--jobs", self.jobs)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value}: expected at least 1")
        config = _target(self.directory)
        out = self.directory.resolve() / FOLDER
        numbers = range(self.first, self.first + self.runs)
        every = [ShadowJob(f"shadow {k}", shadow(config, k), out / f"{k:02d}") for k in numbers]
        with alone(out, "fedkd shadows"):
            waiting = [job for job in every if not job.finished()]
            for job in every:
                if job not in waiting:
                    _tidy(job.place)  # once more, for a kill may have come in between
            children, at_once = Children(waiting), self.jobs or default_jobs([config])
            board = Board(self.console, len(every), len(every) - len(waiting))
            watch(children, min(at_once, len(waiting)), board)
        return children.failures


def _target(directory: Path) -> Config:
    """The configuration of a run that can have shadows."""
    config = files.config_of(directory)
    if config.data.name in TEXTS:
        raise ConfigError(f"{directory}: a run on text; shadows are for canaries among images")
    if not config.audit.canaries:
        raise ConfigError(f"{directory}: no canaries were planted; run with audit.canaries=200")
    if config.audit.coins is not None:
        raise ConfigError(f"{directory}: is a shadow itself (audit.coins={config.audit.coins}); give the run's own")
    if not Job("", config, directory).finished():
        raise ConfigError(f"{directory}: not finished; go on with 'fedkd run ... --out {directory} --resume' first")
    return config


class Pipeline(Run):
    """A run that leaves its scores, and nothing else."""

    def finish(self, here: Site, strategy: KnowledgeStrategy, homes: Homes) -> dict[str, Any]:
        """Write the scores; there is no summary."""
        auditor = Auditor(here, strategy.server, homes, strategy.round, strategy.ledger, strategy.control)
        scores(auditor).write(self.out / CANARIES, self.config)
        return {}


def train(config: Config, out: Path, resume: bool) -> None:
    """Train one shadow, then remove what it is not kept for.

    Raises:
        FedkdError: As ``Run.go``.
    """
    Pipeline(config, out).go(resume)
    _tidy(out)


def _tidy(out: Path) -> None:
    for path in out.iterdir():
        if path.name not in (files.CONFIG, CANARIES):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
