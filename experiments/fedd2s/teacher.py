"""What finished runs know: the server's head beside its clients, and clients of drawings by other people."""

from __future__ import annotations

import tomllib
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from experiments import files
from experiments.audit import open_run
from fedkd import checkpoint, wire
from fedkd.config import Config
from fedkd.federation import Federation, build
from fedkd.homes import Homes
from fedkd.knowledge import Params, pick
from strategies.fedd2s import FedD2S


def compared(place: Path) -> dict[str, float]:
    """Accuracy of clients and of the head that answers them, from a finished run of FedD2S with shared heads.

    ``own``: on their own test images, mean over clients. ``balanced``: on the balanced test. ``held``: the part of the
    balanced test whose classes the client has. ``agree``: share of own test images on which both say the same.
    """
    config = Config.from_raw(tomllib.loads((place / files.CONFIG).read_text(encoding="utf-8")))
    if not isinstance(config.method, FedD2S):
        raise TypeError(f"{place}: expected FedD2S, got {config.method_name}")
    federation, kept = build(config), checkpoint.load(place / files.CHECKPOINT)
    homes = Homes.open(place / files.HOMES, kept.round)
    model = federation.server_task.model
    depth = config.method.cut(kept.round - 1, kept.server[f"cuts/{model.name}"].tolist(), config.federation.rounds)
    head = pick(f"head/{model.name}/{depth}", kept.server)
    rows = []
    for client in range(config.federation.clients):
        w = wire.from_record(homes[client].array_records["personal"])
        rows.append(_client(federation, client, w, head, depth or 0))
    return {name: round(fmean(row[name] for row in rows), 4) for name in rows[0]}


def others_drawings(place: Path) -> float:
    """Mean accuracy of clients on the images of the balanced test that show classes they hold."""
    auditor = open_run(place)
    federation, rows = auditor.site.federation, []
    for client in range(federation.config.federation.clients):
        model, params = auditor.model(client)
        mine = torch.isin(federation.test_y, federation.train_set(client)[1])
        said = model.logits(params, federation.test_x[mine]).argmax(1)
        rows.append(float((said == federation.test_y[mine]).float().mean()))
    return round(fmean(rows), 4)


def _client(federation: Federation, client: int, w: Params, head: Params, depth: int) -> dict[str, float]:
    model = federation.server_task.model

    def says(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return model.apply(w, x).argmax(1), model.head(head, model.features(w, x, depth), depth).argmax(1)

    (x, y), (test_x, test_y) = federation.own_test_set(client), (federation.test_x, federation.test_y)
    held = torch.isin(test_y, federation.train_set(client)[1])
    (own, theirs), (own_all, theirs_all) = says(x), says(test_x)

    def share(right: Tensor) -> float:
        return float(right.float().mean())

    return {
        "own, client": share(own == y),
        "own, head": share(theirs == y),
        "balanced, client": share(own_all == test_y),
        "balanced, head": share(theirs_all == test_y),
        "held, client": share((own_all == test_y)[held]),
        "held, head": share((theirs_all == test_y)[held]),
        "agree": share(own == theirs),
    }
