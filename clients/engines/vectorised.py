"""The vectorised engine: blocks of clients of one architecture at once, by `torch.func.vmap`, in this process.

The whole client half runs under vmap, so it has to keep within vmap's limits: no ``.item()``, ``float()`` or ``bool()``
of a tensor, no ``if`` on one, no boolean masks, no random numbers drawn inside, no in-place changes of shared tensors;
models without BatchNorm's running statistics and without LSTM or GRU. Whatever passes them stops the run with a
sentence that says so.

Clients of unequal size are padded to the largest of their block (see `fedkd.task.Client`): what a method reads beyond
its verbs it must mask by ``client.y >= 0``, and statistics over a batch see the padding. Answers equal the loop
engine's within the method's tolerance, since sums are taken in another order, and so do those of two sizes of block.
Evaluation and queries are answered by the app, one client after the other.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from flwr.app import Context, Message
from torch import Tensor
from torch.func import vmap

from clients.client import Site, Turn, answer, site
from clients.engines.loop import App, Loop, deadline
from clients.engines.memory import block_size
from fedkd import wire
from fedkd.errors import ConfigError
from fedkd.grid import failure
from fedkd.knowledge import RECORD, Knowledge, Params
from fedkd.task import Client

TRAIN = "train"
_CAUSES = {
    r"\.item\(\)": "a tensor's value is read, by .item(), float() or int()",
    r"Cannot access data pointer": "a tensor's values are read, by .numpy() or .tolist()",
    r"data-dependent control flow": "an if or while depends on a tensor's value",
    r"dynamic shape|differently shaped": "a boolean mask or nonzero() gives a shape that depends on values",
    r"Batch norm got a batched|mutate a captured": "a tensor from outside is changed, as BatchNorm does; use GroupNorm",
    r"inplace|doesn't match the broadcast": "a tensor that clients share is changed in place",
    r"random operation": "random numbers are drawn inside the client's half",
    r"requires_grad_\(\)": "autograd is used directly; use fedkd.learn.gradient",
    r"atching rule.* aten::(_?\w*(?:lstm|gru|rnn)\w*)": "there is no batching rule for {0}; LSTM and GRU have none",
    r"atching rule.* aten::(\w+)": "there is no batching rule for {0}",
}
_SLOW = "There is a performance drop because we have not yet implemented the batching rule"


@dataclass
class _Job:
    index: int
    message: Message
    context: Context
    site: Site
    client: int
    round: int
    down: Knowledge

    @property
    def kind(self) -> tuple[int, int, str]:
        """Jobs of one kind may share a block."""
        return id(self.site), self.round, self.site.federation.client_models[self.client]

    @property
    def records(self) -> int:
        return len(self.site.federation.split.train[self.client])


_Ready = tuple[_Job, Turn]
_Answers = Iterator[tuple[_Job, Message]]


class Vectorised:
    """Runs our own client app, `clients.app.app`, on blocks of clients.

    Args:
        app: The client app, for whatever is not training.
        timeout: Seconds one client may take; a block may take as many times that as it has clients.
        block: Clients a block; default what the memory allows. The size of blocks shows in the last bits of the
            answers.
    """

    def __init__(self, app: App, timeout: float | None = None, block: int | None = None) -> None:
        if block is not None and block < 1:
            raise ConfigError(f"the vectorised engine's block: expected 1 or more clients, got {block}")
        self.loop = Loop(app, timeout)
        self.timeout = timeout
        self.block = block

    def __call__(self, jobs: Iterable[tuple[Message, Context]]) -> Iterator[Message]:
        """Answer jobs in order.

        Raises:
            ConfigError: The method or a model is beyond vmap's limits.
        """
        training: dict[int, tuple[Message, Context]] = {}
        for message, context in jobs:
            trains = message.metadata.message_type == TRAIN
            if not trains or context.node_id in training:  # one after the other, as they were asked
                yield from self._train(list(training.values()))
                training = {}
            if trains:
                training[context.node_id] = message, context
            else:
                yield from self.loop([(message, context)])
        yield from self._train(list(training.values()))

    def _train(self, jobs: Sequence[tuple[Message, Context]]) -> Iterator[Message]:
        """Answer jobs in order. What has not been handed out when the engine gives up has not happened."""
        before = [(context, context.state, dict(context.state)) for _, context in jobs]
        told = 0
        try:
            for reply in self._in_order(jobs):
                told += 1
                yield reply
        except ConfigError:
            for context, state, records in before[told:]:
                state.clear()
                state.update(records)
                context.state = state
            raise

    def _in_order(self, jobs: Sequence[tuple[Message, Context]]) -> Iterator[Message]:
        replies: dict[int, Message] = {}
        kinds: dict[object, list[_Job]] = {}
        for index, (message, context) in enumerate(jobs):
            try:
                job = _read(index, message, context)
                kinds.setdefault(job.kind, []).append(job)
            except Exception as error:
                replies[index] = _failed(message, error)
        told = 0
        for alike in kinds.values():
            for job, reply in self._answer(sorted(alike, key=lambda job: -job.records)):  # like sizes, little padding
                replies[job.index] = reply
                while told in replies:
                    yield replies.pop(told)
                    told += 1
        yield from (replies[index] for index in range(told, len(jobs)))

    def _answer(self, jobs: Sequence[_Job]) -> _Answers:
        """Answer jobs of one kind, largest first, block by block."""
        start, limit = 0, 1
        while start < len(jobs):
            ready: list[_Ready] = []
            while start < len(jobs) and len(ready) < limit:
                job, start = jobs[start], start + 1
                try:
                    turn = job.site.build(job.client, job.round, job.down, job.context.state)
                except Exception as error:
                    yield job, _failed(job.message, error)
                    continue
                if not ready:
                    limit = self.block or block_size(job.site, turn)
                ready.append((job, turn))
            for block in _alike(ready):
                yield from self._block(block)

    def _block(self, block: Sequence[_Ready]) -> _Answers:
        """Answer one block; halve it where memory ran out."""
        updated = None
        reason = block[0][0].site.federation.config.method.beyond_vmap
        if reason is not None:
            raise _beyond(block[0], reason)
        try:
            updated = self._in_time(block)
        except Exception as error:
            full = _out_of_memory(error)
            if isinstance(error, TimeoutError) or (full and len(block) == 1):
                yield from ((job, _failed(job.message, error)) for job, _ in block)
                return
            if not full:
                yield from self._explain(block, error)
                return
        if updated is None:  # outside of the clause above, whose error holds on to the memory
            middle = len(block) // 2
            yield from self._block(block[:middle])
            yield from self._block(block[middle:])
            return
        for (job, turn), (personal, raw) in zip(block, updated, strict=True):
            yield job, _conclude(job, turn, personal, raw)

    def _in_time(self, block: Sequence[_Ready]) -> list[tuple[Params, Knowledge]]:
        seconds = None if self.timeout is None else self.timeout * len(block)
        start = time.monotonic()
        with deadline(seconds):
            updated = _update(block[0][0].site, [turn for _, turn in block])
        if seconds is not None and time.monotonic() - start > seconds:
            raise TimeoutError(f"{len(block)} clients answered after {time.monotonic() - start:.1f} s")
        return updated

    def _explain(self, block: Sequence[_Ready], error: Exception) -> _Answers:
        """The loop's answers where the loop fails too; where it does not, vmap is to blame.

        Raises:
            ConfigError: A client that failed in the block can answer alone.
        """
        for job, turn in block:
            try:
                with deadline(self.timeout):
                    job.site.update(turn.task, turn.client, turn.down.to(job.site.federation.device))
            except Exception as alone:
                yield job, _failed(job.message, alone)
            else:
                raise _beyond((job, turn), _cause(error)) from error


def _beyond(ready: _Ready, cause: str) -> ConfigError:
    job, turn = ready
    return ConfigError(
        f"engine.name=vectorised: {job.site.federation.config.method_name} with model '{turn.task.model.name}' is "
        f"beyond torch.func.vmap ({cause}); use engine.name=loop or pool"
    )


def _read(index: int, message: Message, context: Context) -> _Job:
    here = site(str(context.run_config["config"]))
    client = int(context.node_config["partition-id"])
    down, about = wire.unpack(message.content)
    return _Job(index, message, context, here, client, int(about["round"]), down)  # type: ignore[arg-type]


def _failed(message: Message, error: Exception) -> Message:
    return failure(message, f"{type(error).__name__}: {error}")


def _conclude(job: _Job, turn: Turn, personal: Params, raw: Knowledge) -> Message:
    try:
        released = job.site.conclude(turn, personal, raw, job.context.state)
    except Exception as error:
        return _failed(job.message, error)
    return Message(answer(released), reply_to=job.message)


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)  # the latter on a CPU


def _cause(error: Exception) -> str:
    said = str(error).strip() or "no reason given"
    for sign, cause in _CAUSES.items():
        if match := re.search(sign, said):
            return cause.format(*match.groups())
    return f"{type(error).__name__}: {said.splitlines()[0]}"


def _alike(ready: Sequence[_Ready]) -> list[list[_Ready]]:
    """Parts whose tensors can be stacked: equal names and shapes of what is at home and of what came down."""
    parts: dict[object, list[_Ready]] = {}
    for job, turn in ready:
        client = turn.client
        kept = sorted((name, _size(name, t), t.dtype) for name, t in client.personal.items())
        told = sorted((name, _size(name, t), t.dtype) for name, t in turn.down.tensors.items())
        drawn = sorted((name, t.dim(), t.dtype) for name, t in client.draws.items())
        parts.setdefault(str((kept, told, drawn)), []).append((job, turn))
    return list(parts.values())


def _size(name: str, tensor: Tensor) -> torch.Size:
    return tensor.shape[1:] if name.startswith(RECORD) else tensor.shape  # the former are padded


# --- One block --------------------------------------------------------------------------------------------------------


def _update(here: Site, turns: Sequence[Turn]) -> list[tuple[Params, Knowledge]]:
    """The client halves of one block."""
    task = turns[0].task
    told, dims = _broadcast([{**turn.down.tensors, wire.WEIGHT: turn.down.weight} for turn in turns])

    def one(client: Client, told: Params) -> tuple[Params, Params, Tensor]:
        down = Knowledge({name: told[name] for name in told if name != wire.WEIGHT}, told[wire.WEIGHT])
        personal, raw = here.update(task, client, down)
        return personal, dict(raw.tensors), raw.weight

    clients, told = stack([turn.client for turn in turns]), dict(Knowledge(told).to(here.federation.device).tensors)
    with torch.no_grad(), warnings.catch_warnings():  # what needs a gradient takes it by torch.func
        warnings.filterwarnings("error", message=_SLOW)  # a loop in disguise: the loop engine is better at it
        homes, said, weights = vmap(one, in_dims=(0, dims))(clients, told)
    sizes = [len(turn.client.y) for turn in turns]
    return [(_row(homes, k, n), Knowledge(_row(said, k, n), weights[k].clone())) for k, n in enumerate(sizes)]


def _row(stacked: Mapping[str, Tensor], k: int, records: int) -> Params:
    """One client's tensors, as their own memory: a view would keep the whole block's alive."""
    return {
        name: (tensor[k, :records] if name.startswith(RECORD) else tensor[k]).clone()
        for name, tensor in stacked.items()
    }


def stack(clients: Sequence[Client]) -> Client:
    """Clients side by side, padded to the largest; the client comes first in every tensor."""
    first = clients[0]
    return Client(
        x=_pad([c.x for c in clients], 0),
        y=_pad([c.y for c in clients], -1),
        order=_pad([c.order for c in clients], -1),
        public_order=_pad([c.public_order for c in clients], -1),
        draws={name: _pad([c.draws[name] for c in clients]) for name in first.draws},
        personal=_stacked([c.personal for c in clients]),
        notes=_stacked([c.notes for c in clients]),
    )


def _stacked(each: Sequence[Mapping[str, Tensor]]) -> Params:
    return {name: _pad([tensors[name] for tensors in each]) for name in each[0]}


def _pad(tensors: Sequence[Tensor], fill: int | None = None) -> Tensor:
    """Stack, padded to the largest; without a ``fill`` floats get 0 and integers -1."""
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    fill = (0 if tensors[0].is_floating_point() else -1) if fill is None else fill
    out = tensors[0].new_full((len(tensors), *shape), fill)
    for row, tensor in zip(out, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape)] = tensor
    return out


def _broadcast(each: Sequence[Mapping[str, Tensor]]) -> tuple[Params, dict[str, int | None]]:
    """Tensors and vmap's dimensions: one that every client got alike is passed once, the others are stacked."""
    out: Params = {}
    dims: dict[str, int | None] = {}
    for name, first in each[0].items():
        shared = all(_same(first, tensors[name]) for tensors in each)
        out[name] = first if shared else _pad([tensors[name] for tensors in each])
        dims[name] = None if shared else 0
    return out, dims


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.device == b.device and a.stride() == b.stride())
