"""The works, by name: what there is to do, and who does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from experiments.bench import data, foreign, fusion, hand, memory, methods, ours, pfl, private, start, text
from experiments.bench.data import Data
from experiments.bench.foreign import Foreign
from experiments.bench.spec import Contender, Reach, Settings, Work
from fedkd.config import Config

HAND, FLOWER = "by hand", "Flower, Ray"
LR, BATCH, PUBLIC_BATCH = 0.1, 10, 64
Sizes = dict[str, int]
TINY = (1, 1, 2)


# --- Process start ----------------------------------------------------------------------------------------------------


def _start(settings: Settings) -> Sequence[Contender]:
    soon = Reach(4.0, "value")
    engines = {"loop": soon, "pool": soon, "vectorised": soon, "ray": None}
    return [
        Contender("help", "fedkd --help, until it ends", start.command("--help"), Reach(0.5, "value")),
        *(Contender(name, f"fedkd run, engine {name}", start.run(settings, name), r) for name, r in engines.items()),
        Contender(FLOWER, "Flower's simulation runtime, two nodes", start.flower(settings), ours=False),
    ]


# --- Trivial and large messages ---------------------------------------------------------------------------------------


def _echo(settings: Settings, clients: int, cohort: int, numbers: int = 10) -> Config:
    made = data.make(settings, clients, 1, TINY)
    return data.config(settings, made, cohort, {"name": f"{methods.HERE}:Echo", "numbers": numbers})


def _stock(settings: Settings, what: Foreign, reach: Reach | None = None) -> list[Contender]:
    """A Flower app with Flower's FedAvg, on our Grid and on Flower's runtime."""
    about = "a Flower app and Flower's FedAvg"
    return [
        Contender("app, loop", f"{about}, in this process", foreign.local(lambda: what, None), reach),
        Contender("app, pool 2", f"{about}, two worker processes", foreign.local(lambda: what, 2), reach),
        Contender(FLOWER, f"{about}, Flower's runtime", foreign.flower(settings, lambda: what), ours=False),
    ]


def _trivial(name: str, clients: Sizes, quick: Sizes, limit: float) -> Work:
    def sizes(settings: Settings) -> Sizes:
        return quick if settings.quick else clients

    def contenders(settings: Settings) -> Sequence[Contender]:
        n, k = sizes(settings)["clients"], sizes(settings)["cohort"]
        reach = Reach(limit, "value")
        limits = {"loop": reach, "pool 2": reach}
        return [
            *ours.contenders(lambda: _echo(settings, n, k), "loop,pool 2", limits),
            *_stock(settings, Foreign("echo", n, k), reach),
        ]

    return Work(name, "a round of clients that answer ten numbers; no training", "loop", sizes, contenders)


def _big_sizes(settings: Settings) -> Sizes:
    return {"clients": 10, "cohort": 10, "numbers": settings.size(10_000_000, 10_000)}


def _big(settings: Settings) -> Sequence[Contender]:
    sizes = _big_sizes(settings)
    n, numbers = sizes["clients"], sizes["numbers"]
    reach = Reach(0.4, "value")
    limits = {"loop": reach, "pool 2": reach}
    share = Foreign("share", n, n, numbers)
    wire = "our Arrays by reference and Flower's FedAvg"
    return [
        *ours.contenders(lambda: _echo(settings, n, n, numbers), "loop,pool 2", limits),
        Contender("wire, loop", f"{wire}, in this process", foreign.local(lambda: share, None)),
        Contender("wire, pool 2", f"{wire}, two worker processes", foreign.local(lambda: share, 2)),
        *_stock(settings, Foreign("echo", n, n, numbers)),
    ]


# --- The shape of pfl-research's benchmark ----------------------------------------------------------------------------


def _pfl_sizes(settings: Settings) -> Sizes:
    return {
        "clients": settings.size(1000, 40),
        "cohort": settings.size(50, 4),
        "samples": settings.size(50, 20),
        "batch": BATCH,
        "epochs": 1,
    }


def _pfl(name: str, model: str, loop: float, pool: float) -> Work:
    def made(settings: Settings) -> Data:
        sizes = _pfl_sizes(settings)
        return data.make(settings, sizes["clients"], sizes["samples"], hand.SHAPE)

    def contenders(settings: Settings) -> Sequence[Contender]:
        sizes, images = _pfl_sizes(settings), made(settings)
        cohort = sizes["cohort"]
        how: Mapping[str, Any] = {"cohort": cohort, "model": model, "lr": LR, "batch": BATCH, "seed": settings.seed}
        method = {"name": f"{methods.HERE}:FedAvg", "optimizer": "sgd", "lr": LR, "batch": BATCH, "epochs": 1}
        about: dict[str, str | int | float] = {"path": str(images.path), "model": model, "lr": LR, "batch": BATCH}
        about |= {"samples": images.samples, "clients": images.clients}
        app = Foreign("train", images.clients, cohort, 0, about)
        limits = {"loop": Reach(loop, "ratio"), "pool 2": Reach(pool, "ratio")}
        one = "torch module and torch.optim.SGD, mean in place, one thread"
        return [
            Contender(HAND, one, hand.fedavg(images, **how), ours=False),
            *ours.contenders(
                lambda: data.config(settings, images, cohort, method, model=model),
                "loop,pool 1,pool 2,vectorised",
                limits,
            ),
            Contender(
                "by hand, 2 free", "two processes, half each: the floor", hand.free(images, 2, **how), ours=False
            ),
            *_stock(settings, app),
            Contender("pfl-research", "pfl's simulated backend, one process", pfl.fedavg(images, **how), ours=False),
        ]

    what = f"a round of FedAvg, {name.removeprefix('pfl-').upper()} on 28x28 images"
    return Work(name, what, HAND, _pfl_sizes, contenders)


# --- Distillation -----------------------------------------------------------------------------------------------------


def _kd_sizes(settings: Settings) -> Sizes:
    return {
        "clients": settings.size(10, 3),
        "samples": settings.size(200, 20),
        "public": settings.size(1000, 40),
        "fusion_epochs": 2,
    }


def _kd_config(settings: Settings, name: str) -> tuple[Data, Config]:
    sizes = _kd_sizes(settings)
    made = data.make(settings, sizes["clients"], sizes["samples"], hand.SHAPE, spare=sizes["public"])
    method: dict[str, Any] = {"name": name, "public_batch": PUBLIC_BATCH, "batch": 32, "lr": 1e-3}
    if name == "feddf":
        method["fusion_epochs"] = sizes["fusion_epochs"]
    return made, data.config(settings, made, sizes["clients"], method, model="cnn", public=sizes["public"])


def _kd(name: str, about: str) -> Work:
    def contenders(settings: Settings) -> Sequence[Contender]:
        made, config = _kd_config(settings, name)
        how: dict[str, Any] = {"model": "cnn", "lr": 1e-3, "batch": 32, "public_batch": PUBLIC_BATCH}
        how["public"] = _kd_sizes(settings)["public"]
        loop: type[hand.FedMD] | type[hand.FedDF] = hand.FedMD
        if name == "feddf":
            loop = hand.FedDF
            how["epochs"] = _kd_sizes(settings)["fusion_epochs"]
        one = "torch modules and torch.optim.Adam, one thread"
        return [
            Contender(HAND, one, hand.rounds(loop, made, **how), ours=False),
            *ours.contenders(lambda: config, "loop,pool 2,vectorised"),
        ]

    return Work(f"kd-{name}", about, HAND, _kd_sizes, contenders)


def _fusion(name: str, about: str, epochs: int, reach: Reach | None) -> Work:
    def sizes(settings: Settings) -> Sizes:
        return {**_kd_sizes(settings), "fusion_epochs": settings.size(epochs, 2)}

    def contenders(settings: Settings) -> Sequence[Contender]:
        def made() -> Config:
            config = _kd_config(settings, "feddf")[1]
            update = {"fusion_epochs": sizes(settings)["fusion_epochs"]}
            return replace(config, method=config.method.model_copy(update=update))

        return [
            Contender("student alone", "the training in it, given the ensemble", fusion.student_alone(made)),
            Contender("server step", "mean, ensemble and training", fusion.server_step(made), reach),
        ]

    return Work(name, f"the server's step of FedDF, {about}", "student alone", sizes, contenders, most=3)


# --- Layer dropping ---------------------------------------------------------------------------------------------------

CUTS = {"cnn": ("block3", "block2", "block1"), "mlp": ("block2", "block1")}


def _cut_sizes(settings: Settings) -> Sizes:
    return {"clients": settings.size(10, 3), "samples": settings.size(200, 20), "batch": 32, "epochs": 1}


def _cuts(model: str) -> Work:
    def contenders(settings: Settings) -> Sequence[Contender]:
        sizes = _cut_sizes(settings)
        made = data.make(settings, sizes["clients"], sizes["samples"], hand.SHAPE)
        train = {"batch": sizes["batch"], "epochs": sizes["epochs"], "lr": 1e-3}

        def configured(method: dict[str, Any]) -> Config:
            return data.config(settings, made, sizes["clients"], {**method, **train}, model=model)

        reach = Reach(1.6, "ratio")
        average = ours.opener(partial(configured, {"name": "fedavg"}), "loop")
        cuts = [
            Contender(
                f"FedD2S, {cut}",
                f"cut after {cut}: upload, head and answers on top",
                ours.opener(partial(configured, {"name": "fedd2s", "mode": "off", "dropping": [cut]}), "loop"),
                reach,
            )
            for cut in CUTS[model]
        ]
        return [Contender("FedAvg", "the same local epochs", average), *cuts]

    return Work(
        f"fedd2s-{model}", f"a round of FedD2S at each cut, {model} on 28x28 images", "FedAvg", _cut_sizes, contenders
    )


# --- Text -------------------------------------------------------------------------------------------------------------

TEMPERED = {"noise": "gaussian", "sigma": 0.1, "t_low": 2.0, "t_high": 20.0}


def _swing_sizes(settings: Settings) -> Sizes:
    return {"clients": settings.size(4, 2), "records": settings.size(300, 20), "context": text.CONTEXT,
            "batch": text.BATCH, "canaries": settings.size(48, 4)}  # fmt: skip


def _swing(settings: Settings) -> Sequence[Contender]:
    sizes = _swing_sizes(settings)

    def made(method: dict[str, Any]) -> Config:
        return text.config(settings, sizes["clients"], sizes["records"], sizes["canaries"], method)

    def swing(score: str, about: str) -> Contender:
        method = {"score": score, **TEMPERED}
        return Contender(f"swing, {score}", about, ours.opener(partial(made, method), "loop"), Reach(1.10, "ratio"))

    plain = {"score": "none", "sigma": 0.0}
    return [
        Contender("KD", "one temperature, no noise, the same records", ours.opener(partial(made, plain), "loop")),
        swing("oracle", "temperature and noise on planted secrets"),
        swing("regex", "temperature and noise on long numbers"),
    ]


def _exposure_sizes(settings: Settings) -> Sizes:
    return {"canaries": settings.size(100, 2), "candidates": 10_000}


def _exposure(settings: Settings) -> Sequence[Contender]:
    canaries = _exposure_sizes(settings)["canaries"]
    about = "each prefix once, then the trie of all secrets, level by level"
    return [Contender("trie", about, text.exposures(settings, canaries), Reach(20.0, "value"))]


# --- Memory -----------------------------------------------------------------------------------------------------------


def _memory_sizes(settings: Settings) -> Sizes:
    return {
        "few": settings.size(1000, 50),
        "many": settings.size(100_000, 500),
        "images": settings.size(200_000, 1000),
        "cohort": settings.size(50, 5),
        "rounds": settings.size(20, 2),
    }


def _memory(settings: Settings) -> Sequence[Contender]:
    sizes = _memory_sizes(settings)
    rest = (sizes["images"], sizes["cohort"], sizes["rounds"])
    flat = {"few": None, "many": Reach(1.05, "ratio")}
    return [
        Contender(name, f"{sizes[name]:,} registered", memory.peak(settings, sizes[name], *rest), reach)
        for name, reach in flat.items()
    ]


def _no_sizes(settings: Settings) -> Sizes:
    return {}


_TEN = {"clients": 10, "cohort": 10}

WORKS: dict[str, Work] = {
    work.name: work
    for work in (
        Work("start", "process start to a client's first message", "loop", _no_sizes, _start, warm=False, most=3),
        _trivial("trivial10", _TEN, _TEN, 0.005),
        _trivial("trivial1000", {"clients": 1000, "cohort": 1000}, {"clients": 40, "cohort": 40}, 0.5),
        _trivial("sample10of10000", {"clients": 10_000, "cohort": 10}, {"clients": 200, "cohort": 10}, 0.010),
        Work("big40", "a round of clients that answer 40 MB; no training", "loop", _big_sizes, _big),
        _pfl("pfl-mlp", methods.MLP, 1.10, 0.60),
        _pfl("pfl-cnn", "cnn", 1.05, 0.58),
        _kd("fedmd", "a round of FedMD, CNN on 28x28 images"),
        _kd("feddf", "a round of FedDF, CNN on 28x28 images"),
        _fusion("feddf-server", "a thousand batches", 63, Reach(1.1, "ratio")),  # the official code's cap is 10,000
        _fusion("feddf-server-short", "two epochs", 2, None),
        _cuts("cnn"),
        _cuts("mlp"),
        Work("swing", "a round of teachers that teach a student on text, transformer", "KD", _swing_sizes, _swing),
        Work("exposure", "exact ranks of secrets in text on one transformer", None, _exposure_sizes, _exposure),
        private.dp_sgd("dp_sgd", 128),
        private.dp_sgd("dp_sgd-32", 32),
        private.EPSILON,
        Work("memory", "peak memory by registered clients", "few", _memory_sizes, _memory, "MB", warm=False, most=2),
    )
}
"""name -> work, in the order in which they are run."""
