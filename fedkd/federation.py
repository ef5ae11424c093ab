"""A federation: data, split, architectures and tasks, as a pure function of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedkd import config as configs
from fedkd import learn, models, seeds
from fedkd.config import Config
from fedkd.data import datasets, planted, pools, text_canaries
from fedkd.data.datasets import TEXTS, Dataset, TextSpec
from fedkd.data.split import Split, SplitSpec, split
from fedkd.data.text_canaries import DIGITS, REPETITIONS, TEMPLATES, TextCanaries
from fedkd.errors import ConfigError, SchemaError
from fedkd.knowledge import Knowledge, Params
from fedkd.models import Model
from fedkd.sections import AmbassadorPrivacy
from fedkd.task import Records, Task

PUBLIC = -1
"""In place of a client's id: nobody's records."""


@dataclass(frozen=True, eq=False)
class Federation:
    """What is known before round 1, in every process alike.

    Attributes:
        models: Every architecture by name: the clients' and the server's.
        client_models: Architecture of each client.
        public_x: Public inputs (m, *shape).
        public_index: Their positions (m,) in the data set; empty where they come from a pool.
        labelled: Public inputs (l, *shape) and their labels (l,).
        test_x: Balanced global test inputs; test_y their labels.
        labels: Labels of the data set with the canaries' wrong labels applied, the ones clients train on; of text the
            next tokens.
        given: Weights that clients' models start from, by architecture: the same for all, or
        given_to: each client's own; empty where there are none.
        secrets: The canaries of text; None for images, whose canaries are the split's.
    """

    config: Config
    dataset: Dataset
    split: Split
    models: Mapping[str, Model]
    client_models: tuple[str, ...]
    public_x: Tensor
    public_index: np.ndarray
    labelled: tuple[Tensor, Tensor]
    test_x: Tensor
    test_y: Tensor
    labels: np.ndarray
    given: Mapping[str, Params]
    given_to: tuple[Params, ...]
    secrets: TextCanaries | None
    device: torch.device
    _noted: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def task(self, model: str) -> Task:
        """The task as seen by whoever has architecture ``model``."""
        method = self.config.method
        return Task(
            model=self.models[model],
            models=self.models,
            num_classes=self.dataset.outputs,
            public_x=self.public_x,
            rounds=self.config.federation.rounds,
            optimizer=method.descent(),
            fit=learn.fit,
            sums=learn.sums,
            labelled=self.labelled,
            given=self.given,
            vocabulary=None if self.dataset.text is None else self.dataset.text.vocabulary,
            public_notes=self._noted.get(PUBLIC, {}),
        )

    @property
    def server_task(self) -> Task:
        """The server's task: its own model has the architecture ``model.name``."""
        return self.task(self.config.model.name)

    def client_task(self, client: int) -> Task:
        """One client's task."""
        task = self.task(self.client_models[client])
        return replace(task, given={task.model.name: self.given_to[client]}) if self.given_to else task

    def notes(self, client: int) -> dict[str, Tensor]:
        """What the method noted about one client's training records; the same in every round and process."""
        if client not in self._noted:
            index = self.split.train[client]
            self._noted[client] = self._note(self.client_task(client), self._records(index), client)
        return self._noted[client]

    def note_public(self) -> None:
        """Let the method note what it wants to about the public inputs."""
        x = self.public_x
        shape = x.shape if self.dataset.text is not None else x.shape[:1]
        unknown = torch.full(shape, -1, dtype=torch.int64, device=x.device)
        if self.dataset.text is not None:
            unknown[:, :-1] = x[:, 1:]
        public = Records(x, unknown, None, torch.zeros(shape, dtype=torch.bool, device=x.device))
        self._noted[PUBLIC] = self._note(self.server_task, public, PUBLIC)

    def _note(self, task: Task, records: Records, client: int) -> dict[str, Tensor]:
        rng = seeds.generator(self.config.training_seed, "notes", client=client + 1)
        return {name: note.to(self.device) for name, note in self.config.method.notes(task, records, rng).items()}

    def _records(self, index: np.ndarray) -> Records:
        x, y = self._inputs(self.dataset.x[index]), torch.from_numpy(self.labels[index])
        text, canaries = self.dataset.text, self.split.canaries
        if text is None:
            planted = torch.from_numpy(np.isin(index, canaries.index[canaries.included]))
            marks = self.dataset.marks
        else:
            planted, marks = torch.from_numpy(text.planted[index]), text.marks
        marked = None if marks is None else torch.from_numpy(marks[index]).to(self.device)
        return Records(x, y.to(self.device), marked, planted.to(self.device))

    def train_set(self, client: int) -> tuple[Tensor, Tensor]:
        """Training inputs (n, *shape) and labels (n,) of one client, canaries included."""
        index = self.split.train[client]
        return self._inputs(self.dataset.x[index]), torch.from_numpy(self.labels[index]).to(self.device)

    def own_test_set(self, client: int) -> tuple[Tensor, Tensor]:
        """One client's own held-out inputs and labels."""
        index = self.split.own_test[client]
        return self._inputs(self.dataset.x[index]), torch.from_numpy(self.dataset.targets[index]).to(self.device)

    def canary_set(self) -> tuple[Tensor, Tensor]:
        """Inputs of all canaries, in or out, and their wrong labels."""
        canaries = self.split.canaries
        return self._inputs(self.dataset.x[canaries.index]), torch.from_numpy(canaries.label).to(self.device)

    def _inputs(self, x: np.ndarray) -> Tensor:
        return datasets.to_tensor(x).to(self.device)


def build(config: Config) -> Federation:
    """Load the data, split them and name the architectures.

    Raises:
        ConfigError: The data are missing, or the partition or device asked for is impossible.
    """
    data = config.data
    device = _device(config.engine.device)
    is_text = data.name in TEXTS
    text_spec = TextSpec(data.context or TextSpec.context, data.vocabulary or TextSpec.vocabulary) if is_text else None
    dataset = datasets.load(data.name, Path(data.path) if data.path else None, text_spec)
    taken = 0 if data.pool else data.public
    held_out = taken + data.labelled + data.reserve
    spec = SplitSpec(
        clients=config.federation.clients,
        partition=data.partition,
        alpha=data.alpha,
        classes=data.classes,
        test=data.test,
        public=held_out,
        min_size=data.min_size,
        test_fraction=data.test_fraction,
        canaries=0 if is_text else config.audit.canaries,
        coins=config.audit.coins,
        limit=data.limit,
    )
    parts, secrets = split(dataset, spec, config.seed), None
    if is_text:
        repetitions, templates = config.audit.repetitions or REPETITIONS, config.audit.templates or TEMPLATES
        digits, clients = config.audit.digits or DIGITS, config.federation.clients
        secrets = text_canaries.draw(config.audit.canaries, clients, repetitions, templates, digits, config.seed)
        if not config.audit.twin:
            dataset, parts = text_canaries.plant(dataset, parts, secrets, config.seed)
    shape = dataset.x.shape[1:]
    client_models = tuple(config.client_models())
    ambassador = config.privacy.model if isinstance(config.privacy, AmbassadorPrivacy) else None
    names = sorted({*client_models, config.model.name, *([ambassador] if ambassador else [])})
    source = (dataset.test_x, dataset.test_y) if parts.test_is_official else (dataset.x, dataset.targets)
    test_x, test_y = source[0][parts.test], source[1][parts.test]  # type: ignore[index]
    nobodys = parts.public
    if held_out > max(taken, data.labelled, data.reserve):  # to be parted, and some data sets are sorted by class
        nobodys = nobodys[seeds.generator(config.seed, "public parts").permutation(held_out)]
    public = web_like(config, dataset)[0] if data.pool else dataset.x[nobodys[:taken]]
    labelled = nobodys[taken : taken + data.labelled]
    architectures = {name: models.build(name, shape, dataset.outputs) for name in names}
    federation = Federation(
        config=config,
        dataset=dataset,
        split=parts,
        models=architectures,
        client_models=client_models,
        public_x=datasets.to_tensor(public).to(device),
        public_index=nobodys[:taken],
        labelled=(
            datasets.to_tensor(dataset.x[labelled]).to(device),
            torch.from_numpy(dataset.targets[labelled]).to(device),
        ),
        test_x=datasets.to_tensor(test_x).to(device),
        test_y=torch.from_numpy(test_y).to(device),
        labels=dataset.targets if is_text else parts.labels(dataset.y),
        given=_given(config, architectures),
        given_to=_given_to(config, architectures),
        secrets=secrets,
        device=device,
    )
    held = np.bincount(federation.labels[parts.train.values].clip(min=0).ravel(), minlength=dataset.outputs) > 0
    config.method.check({name: federation.task(name) for name in sorted(set(client_models))}, held)
    if len(federation.public_x):
        federation.note_public()
    federation.notes(0)  # what cannot be noted is refused here and not at the clients
    return federation


def _given(config: Config, architectures: Mapping[str, Model]) -> dict[str, Params]:
    """The weights of ``model.weights`` for all clients, which must be those of their architecture."""
    if config.model.weights is None or "{client}" in config.model.weights:
        return {}
    name = config.client_models()[0]
    return {name: _weights(config.model.weights.replace("{seed}", str(config.seed)), architectures[name])}


def _given_to(config: Config, architectures: Mapping[str, Model]) -> tuple[Params, ...]:
    """The weights of ``model.weights`` where each client has its own."""
    path = config.model.weights or ""
    if "{client}" not in path:
        return ()
    path = path.replace("{seed}", str(config.seed))
    named = enumerate(config.client_models())
    return tuple(_weights(path.replace("{client}", str(k)), architectures[name]) for k, name in named)


def _weights(path: str, model: Model) -> Params:
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"model.weights='{path}': cannot be read ({error}); write it with 'fedkd export'") from None
    try:
        Knowledge(found).check(model.schema, model.name)
    except SchemaError as error:
        raise ConfigError(f"model.weights='{path}': expected the weights of clients' models; {error}") from None
    return {key: found[key] for key in model.schema}


def web_like(config: Config, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """``data.public`` images of the pool, as shaped as the data, in random order; and which of them (m,) are far.

    Raises:
        ConfigError: The pool is missing or too small, or the data are no uint8 images.
    """
    data, rng = config.data, seeds.generator(config.seed, "pool")
    if dataset.x.dtype != np.uint8:
        raise ConfigError(f"data.pool='{data.pool}': expected data of uint8 images 0..255, got {dataset.x.dtype}")
    shape = (int(dataset.x.shape[1]), int(dataset.x.shape[2]), int(dataset.x.shape[3]))
    path = Path(data.pool_path) if data.pool_path else None
    try:
        pool = pools.load(data.pool or "", shape, path, data.public, config.seed)
    except ConfigError as error:
        raise ConfigError(f"data.pool='{data.pool}', data.public={data.public}: {error}") from None
    far = np.zeros(len(pool), np.bool_)
    if data.far:
        pool, far = planted.with_far(pool, data.far, data.far_kind, rng)
    order = rng.permutation(len(pool))
    return np.asarray(pool.x[order]), far[order]


@lru_cache(maxsize=2)
def from_json(text: str) -> Federation:
    """The federation of a configuration, built once a process; how a Flower app finds its data."""
    return build(configs.from_json(text))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"engine.device: expected 'cpu' or 'cuda', got '{name}'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"engine.device='{name}': torch sees no CUDA device here; use engine.device=cpu")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"engine.device: expected 'cpu' or 'cuda', got '{name}'")
    return device
