"""Read what a method that tempers its soft targets made of the training text: the run's own data, built once more.

The only part of a report that is not in the run's directory: text and scores are no files of a run. Where the data are
gone, the page says so and does without.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.report.model import Heated, Strip
from experiments.report.values import mapping, plain
from fedkd.errors import FedkdError

if TYPE_CHECKING:
    import numpy as np

    from fedkd.data.vocabulary import Vocabulary
    from fedkd.federation import Federation

CALM, HOT = 2, 4
LONGEST = 140  # characters of a record


def read_strip(path: Path, tree: Mapping[str, Any]) -> Strip | None:
    """Some records of a run on text with their temperatures; None where its method tempers nothing by itself.

    Args:
        path: The run's configuration; the method it names must be one of ours, for a page is no reason to run others.
        tree: What is in it.
    """
    method = mapping(tree.get("method"), None)
    if method.get("score", "none") == "none":  # the rest takes seconds of imports
        return None
    from fedkd.config import load
    from fedkd.federation import from_json
    from fedkd.registry import METHODS

    if method.get("name") not in METHODS:
        return None
    try:
        return of(from_json(load(path)[0].to_json()))
    except FedkdError as error:
        return Strip(trouble=plain(error))


def of(federation: Federation) -> Strip | None:
    """Some ordinary records and those with the highest scores: client 0's, or public ones where those are tempered.

    None where the data are images, the method tempers nothing, or its scores are no property of the records.
    """
    import numpy as np

    from strategies.swing import Tempered

    method, text = federation.config.method, federation.dataset.text
    if text is None or not isinstance(method, Tempered):
        return None
    if method.needs_public:
        x, notes = federation.public_x, federation.server_task.public_notes
        after = np.full(x.shape, -1)
        after[:, :-1] = x[:, 1:].cpu().numpy()
    else:
        (x, y), notes = federation.train_set(0), federation.notes(0)
        after = y.cpu().numpy()
    if "scores" not in notes or not len(x):
        return None
    scores, temperatures = notes["scores"].cpu().numpy(), method.temperatures(notes["scores"]).cpu().numpy()
    records = np.concatenate([x[:, :1].cpu().numpy(), after], 1)
    lines = tuple(
        _heated(text.vocabulary, records[i], temperatures[i]) for i in _choose(records, scores * (after >= 0))
    )
    return Strip(lines, method.t_low, method.t_high, None if method.needs_public else 0)


def _choose(records: np.ndarray, scores: np.ndarray) -> list[int]:
    """First the records with the lowest scores, then those with the highest, no two of which are hot for the same."""
    import numpy as np

    peaks = scores.max(1)
    calm = [int(i) for i in np.argsort(peaks, kind="stable")[:CALM]]
    seen: dict[bytes, int] = {}
    for i in np.argsort(-peaks, kind="stable"):
        if len(seen) == HOT or peaks[i] <= 0:
            break
        if i not in calm:
            seen.setdefault(records[i, 1:][scores[i] > 0].tobytes(), int(i))
    return [*calm, *seen.values()]


def _heated(vocabulary: Vocabulary, record: np.ndarray, temperatures: np.ndarray) -> Heated:
    """One record by character: the first token is answered by nobody, and a token of several characters heats all."""
    known = record >= 0
    ids = record[known]
    text = vocabulary.decode(ids)
    heat: list[float | None] = [None] * len(text)
    answers: list[float | None] = [None, *temperatures[known[1:]].tolist()]
    for (start, end), t in zip(vocabulary.offsets(ids).tolist(), answers, strict=True):
        for place in range(start, end):
            heat[place] = max(t, heat[place] or t) if t is not None else heat[place]
    hottest = max(range(len(heat)), key=lambda place: heat[place] or 0.0)
    first = max(0, min(hottest - LONGEST // 2, len(text) - LONGEST))
    return Heated(plain(text[first : first + LONGEST]), tuple(heat[first : first + LONGEST]))
