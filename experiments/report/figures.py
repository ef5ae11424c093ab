"""Figures over rounds: accuracy, perplexity, traffic and privacy spent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.report.model import Accuracy, Round, Run
from experiments.report.style import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, end_labels, heading, is_narrow, panel
from experiments.report.values import epsilon, fraction, hundredths, size, small, unit_of

Series = tuple[list[int], list[float]]
Labels = list[tuple[float, str, str]]
Pick = Callable[[Round], float | None]
Panel = tuple[str, str, Callable[[Axes, Run], Labels]]
"""Title, a quieter line, and what draws it."""


def series(rounds: Sequence[Round], pick: Pick) -> Series:
    """The rounds that have a finite value, and the values."""
    pairs = [(line.number, value) for line in rounds if (value := pick(line)) is not None and math.isfinite(value)]
    return [at for at, _ in pairs], [value for _, value in pairs]


def accuracy_curves(run: Run, width: float) -> Figure | None:
    """Balanced and personal accuracy by round beside training alone; None when no round was scored."""
    if not any(line.accuracy != Accuracy() for line in run.rounds):
        return None
    note = "every class counts the same; mean over clients"
    shared: Panel = (f"{run.shared.capitalize()} accuracy", note, _balanced)
    if run.is_text:
        shared = ("Next-token accuracy", "one test for all clients; mean over clients", _balanced)
    personal: Panel = ("Personal accuracy", "each client's own test split; mean over clients", _personal)
    return _beside(run, width, (shared, personal), "accuracy (fraction correct)", (-0.02, 1.02))


def perplexity_curves(run: Run, width: float) -> Figure | None:
    """Of text: perplexity by round on the shared and on the clients' own tests, beside training alone."""
    if not any(line.accuracy.balanced_perplexity is not None for line in run.rounds):
        return None
    server = [("server model", run, lambda line: line.accuracy.global_perplexity, GREEN, "^-.")]
    panels: list[Panel] = [
        ("Perplexity", "one test for all clients; over all its tokens",
         lambda ax, run: _panel(ax, run, lambda line: line.accuracy.balanced_perplexity, server, hundredths)),
        ("Personal perplexity", "each client's own test split; over all tokens",
         lambda ax, run: _panel(ax, run, lambda line: line.accuracy.personal_perplexity, [], hundredths)),
    ]  # fmt: skip
    return _beside(run, width, panels, "perplexity (lower is better)", (1.0, math.inf))


def _beside(run: Run, width: float, panels: Sequence[Panel], label: str, limits: tuple[float, float]) -> Figure:
    """Two panels over rounds with one scale: side by side, or one below the other on narrow screens."""
    narrow = is_narrow(width)
    wide = width - 0.55 if narrow else (width - 0.3) / 2 - 0.5
    plot, high = wide - 1.42, 2.35
    fig = Figure(figsize=(width, 2 * (high + 1.15) if narrow else high + 1.0))
    axes = []
    for i, (title, note, draw) in enumerate(panels):
        left = 0.5 if narrow else 0.5 + i * (wide + 0.8)
        top = 0.55 + (i * (high + 1.15) if narrow else 0)
        heading(fig, left - 0.45, top - 0.53, title, note)
        axes.append((panel(fig, left, top, plot, high), draw))
    labels = [draw(ax, run) for ax, draw in axes]
    lows, highs = zip(*(ax.get_ylim() for ax, _ in axes), strict=True)
    for (ax, _), words in zip(axes, labels, strict=True):
        ax.set_ylim(max(limits[0], min(lows)), min(limits[1], max(highs)))
        rounds_axis(ax, _all_rounds(run))
        ax.set_ylabel(label)
        end_labels(ax, words, high, 0.17)
    return fig


def _all_rounds(run: Run) -> list[int]:
    """The rounds of this run and of the baseline's lines beside it."""
    base = run.baseline
    return [line.number for line in (*run.rounds, *(base.rounds if base is not None else ()))]


def _balanced(ax: Axes, run: Run) -> Labels:
    """The panel on accuracy on the shared test, with the server's model where there is one."""
    lines = [("server model", run, lambda line: line.accuracy.global_model, GREEN, "^-.")]
    return _panel(ax, run, lambda line: line.accuracy.balanced_mean, lines)


def _personal(ax: Axes, run: Run) -> Labels:
    """The panel on personal accuracy: mean, one standard deviation around it, and the worst tenth."""
    rows = [line for line in run.rounds if None not in (line.accuracy.personal_mean, line.accuracy.personal_std)]
    middle = [line.accuracy.personal_mean or 0.0 for line in rows]
    spread = [line.accuracy.personal_std or 0.0 for line in rows]
    lower = [m - s for m, s in zip(middle, spread, strict=True)]
    upper = [min(1.0, m + s) for m, s in zip(middle, spread, strict=True)]
    ax.fill_between([line.number for line in rows], lower, upper, color=BLUE, alpha=0.12, linewidth=0)
    lines = [("worst 10 %", run, lambda line: line.accuracy.personal_worst10, PURPLE, "v:")]
    return _panel(ax, run, lambda line: line.accuracy.personal_mean, lines)


def _panel(
    ax: Axes, run: Run, pick: Pick, more: list[tuple[str, Run, Pick, str, str]],
    written: Callable[[float | None], str] = fraction,
) -> Labels:  # fmt: skip
    """Draw this run, training alone and `more` lines; return their labels."""
    base = [("training alone", run.baseline, pick, ORANGE, "s--")] if run.baseline is not None else []
    labels: Labels = []
    for name, source, value, colour, style in [*more, ("this run", run, pick, BLUE, "o-"), *base]:
        x, y = series(source.rounds, value)
        if not y:
            continue
        ax.plot(x, y, style, color=colour, markevery=max(1, len(x) // 10), markeredgewidth=0, clip_on=False)
        labels.append((y[-1], f"{name} {written(y[-1])}", INK if name == "this run" else MUTED))
    return labels


def rounds_axis(ax: Axes, numbers: Sequence[int]) -> None:
    """An x axis of whole rounds."""
    low, high = min(numbers), max(numbers)
    pad = 0.5 if low == high else 0.02 * (high - low)
    ax.set_xlim(low - pad, high + pad)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    ax.set_xlabel("round")


def traffic(run: Run, width: float) -> Figure | None:
    """Bytes sent so far, up and down; None when nothing was sent."""
    sums: dict[str, list[int]] = {"up": [], "down": []}
    for way, totals in sums.items():
        for line in run.rounds:
            totals.append((totals[-1] if totals else 0) + getattr(line, way))
    top = max((max(totals, default=0) for totals in sums.values()), default=0)
    if top == 0:
        return None
    scale, unit = unit_of(top)
    fig = Figure(figsize=(width, 2.65))
    ax = panel(fig, 0.6, 0.2, width - (1.75 if is_narrow(width) else 1.95), 2.0)
    numbers = [line.number for line in run.rounds]
    labels: Labels = []
    for way, colour, style in (("down", ORANGE, "s--"), ("up", BLUE, "o-")):
        ax.plot(numbers, [value / scale for value in sums[way]], style, color=colour, markeredgewidth=0, clip_on=False,
                markevery=max(1, len(numbers) // 10))  # fmt: skip
        labels.append((sums[way][-1] / scale, f"{way} {size(sums[way][-1])}", INK))
    ax.set_ylim(0, top / scale * 1.06)
    rounds_axis(ax, numbers)
    ax.set_ylabel(f"sent so far, all clients ({unit})")
    end_labels(ax, labels, 2.0)
    return fig


def epsilon_curve(run: Run, width: float) -> Figure | None:
    """Epsilon spent by round; None when no round has a finite one."""
    x, y = series(run.rounds, lambda line: line.epsilon)
    if not y:
        return None
    fig = Figure(figsize=(width, 2.65))
    ax = panel(fig, 0.6, 0.2, width - (1.75 if is_narrow(width) else 1.95), 2.0)
    ax.step(x, y, where="post", color=BLUE)
    ax.plot(x, y, "o", color=BLUE, markeredgewidth=0, markevery=max(1, len(x) // 10), clip_on=False)
    ax.set_ylim(0, max(y) * 1.08 or 1.0)
    rounds_axis(ax, x)
    delta = run.privacy.delta if run.privacy is not None else None
    ax.set_ylabel("ε spent so far" + (f" (δ = {small(delta)})" if delta is not None else ""))
    end_labels(ax, [(y[-1], f"ε = {epsilon(y[-1])}", INK)], 2.0)
    return fig
