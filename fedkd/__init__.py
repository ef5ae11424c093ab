"""fedkd: federated and privacy-aware knowledge distillation.

The rooms beside this package have plain names (``strategies``, ``clients``, ``privacy``, ``experiments``), which
another distribution may also use; importing the wrong one would fail late and oddly, so it is refused here.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"


def _check_rooms() -> None:
    here = Path(__file__).resolve().parent.parent
    for room in ("strategies", "clients", "privacy"):
        spec = find_spec(room)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found is None or found.parent.parent != here:
            raise ImportError(
                f"fedkd: package '{room}' should be {here / room}, got {found or 'nothing'}; "
                "uninstall the other distribution or put fedkd's folder first on the path"
            )


_check_rooms()
