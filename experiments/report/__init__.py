"""One self-contained page about one run: ``render(run_dir)`` writes ``report.html``.

The page holds its figures inline, runs no script and fetches nothing, and equal run directories give equal bytes.
"""

from __future__ import annotations

from experiments.report.page import render

__all__ = ["render"]
