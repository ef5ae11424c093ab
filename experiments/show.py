"""What a run shows while it works, and the table at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fedkd.config import Config
from privacy.audits.secrets import SecretResult
from strategies.flower import Round


class View:
    """Where progress is shown; this one shows nothing."""

    def start(self, done: int, config: Config) -> None:
        """The rounds begin."""

    def reply(self) -> None:
        """A client answered."""

    def round(self, report: Round) -> None:
        """A round is over."""

    def waiting(self, done: int, rows: int) -> None:
        """The run is over, comparison rows are not."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def close(self) -> None:
        """Nothing more comes."""


class Live(View):
    """A progress bar over rounds, with the state of the federation beside it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[said]}"),
            console=console,
        )
        self._task = self._progress.add_task("round", total=1, said="", start=False)
        self._replies = 0
        self._said = ""
        self._up = 0

    def start(self, done: int, config: Config) -> None:
        """Draw the bar."""
        self._progress.start()
        self._progress.start_task(self._task)
        self._progress.update(self._task, total=config.federation.rounds, completed=done)

    def reply(self) -> None:
        """Count the answers of the round."""
        self._replies += 1
        self._progress.update(self._task, said=f"{self._said} · {self._replies} replies")

    def round(self, report: Round) -> None:
        """Say where the federation stands."""
        self._up += report.bytes_up
        parts = [f"cohort {report.cohort}"]
        if report.accuracy is not None:
            parts += [f"balanced {report.accuracy.balanced_mean:.3f}", f"own {report.accuracy.personal_mean:.3f}"]
        parts.append(f"up {human(self._up)}")
        if report.epsilon is not None:
            parts.append(f"ε {report.epsilon:.2f}")
        if report.failures:
            parts.append(f"{len(report.failures)} refused")
        self._said, self._replies = " · ".join(parts), 0
        self._progress.update(self._task, completed=report.t, said=self._said)

    def waiting(self, done: int, rows: int) -> None:
        """Say what is still running."""
        self._progress.update(self._task, said=f"{self._said} · comparison {done}/{rows}")

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, style="yellow", highlight=False, markup=False)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()


def human(count: float) -> str:
    """Bytes as a short text."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def table(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """One line for each summary, by label."""
    text = any("personal_perplexity" in summary["accuracy"] for summary in rows.values())
    grid = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=text)  # a column more in 80 characters
    grid.add_column("run")
    for name in ("balanced", "personal", "worst", "ECE", "server", *(["ppl"] if text else []), "up", "ε", "AUROC", "s"):
        grid.add_column(name, justify="right", no_wrap=True)
    for label, summary in rows.items():
        accuracy, private, audit = summary["accuracy"], summary["privacy"], summary["audit"]
        server, calibration = accuracy["global"], accuracy.get("personal_ece")
        grid.add_row(
            label,
            f"{accuracy['balanced_mean']:.3f}",
            f"{accuracy['personal_mean']:.3f} ±{accuracy['personal_std']:.3f}",
            f"{accuracy['personal_worst10']:.3f}",
            "-" if calibration is None else f"{calibration:.3f}",
            "-" if server is None else f"{server:.3f}",
            *([_perplexity(accuracy)] if text else []),
            human(summary["bytes"]["up"]),
            "none" if private is None else f"{float(private['epsilon']):.2f}",
            _leak(audit),
            f"{summary['seconds']:.0f}",
        )
    return grid


def _perplexity(accuracy: Mapping[str, Any]) -> str:
    """The server's model's if there is one, else the clients' on the global test."""
    found = accuracy.get("global_perplexity") or accuracy.get("balanced_perplexity")
    return "-" if found is None else f"{found:.2f}"


def bits(value: float | None) -> str:
    """An exposure."""
    return "-" if value is None else f"{value:.2f}"


def secrets_table(results: Sequence[SecretResult]) -> Table:
    """Mean exposure in bits by target, attack and number of copies, beside what it is held against."""
    copies = sorted({row.repetitions for result in results for row in result.by_repetition})
    chances = sorted({f"{result.chance:.2f}" for result in results})
    title = f"exposure of secrets in text, bits; chance {' or '.join(chances)}"
    grid = Table(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left")
    for name in ("audited", "attack"):
        grid.add_column(name)
    for name in (*(f"{count}x" for count in copies), "not planted", "swapped", "p"):
        grid.add_column(name, justify="right", no_wrap=True)
    for before, result in zip((None, *results), results, strict=False):
        means = {row.repetitions: row.mean for row in result.by_repetition}
        grid.add_row(
            "" if before is not None and before.target == result.target else result.target,
            result.attack,
            *(bits(means.get(count)) for count in copies),
            bits(result.excluded_mean),
            bits(result.swap_mean),
            f"{result.p_value:.2g}",
        )
    return grid


def _leak(audit: Mapping[str, Any] | None) -> str:
    """AUROC of the worst that leaves the clients, if anything does."""
    leaving = audit is not None and any(target["leaves_client"] for target in audit["targets"])
    return f"{audit['auroc']:.2f}" if audit is not None and leaving else "-"
