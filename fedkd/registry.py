"""Methods by name. A lazy import by string: entry points do not exist inside a Flower bundle."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module

from fedkd.errors import ConfigError
from fedkd.method import Method

METHODS: dict[str, tuple[str, str]] = {
    "local": ("strategies.local:Local", "no exchange: every client trains alone, the baseline to beat"),
    "fedavg": ("strategies.fedavg:FedAvg", "clients send weights, the server averages them"),
    "fedprox": ("strategies.fedprox:FedProx", "FedAvg with a proximal term in the clients' loss"),
    "fedmd": ("strategies.fedmd:FedMD", "clients with models of their own agree on logits of public inputs"),
    "feddf": ("strategies.feddf:FedDF", "the server distils the clients' ensemble into averaged weights"),
    "fedd2s": ("strategies.fedd2s:FedD2S", "clients distil with server heads over ever shallower layers"),
    "fedgkt": ("strategies.fedgkt:FedGKT", "clients send features and logits, the server's head answers logits"),
    "feddistill": ("strategies.feddistill:FedDistill", "clients exchange one mean of logits per class"),
    "fedproto": ("strategies.fedproto:FedProto", "clients exchange one mean feature per class"),
    "fedgen": ("strategies.fedgen:FedGen", "FedAvg with a server generator of features that clients train on too"),
    "dsfl": ("strategies.dsfl:DSFL", "clients send probabilities on open inputs, all learn from the sharpened mean"),
    "fml": ("strategies.fml:FML", "a personal model and a shared meme model teach one another"),
    "fedkd": ("strategies.fedkd:FedKD", "a mentor at home, a shared mentee whose updates travel as singular vectors"),
    "dense": ("strategies.dense:Dense", "one shot: the server distils the clients' ensemble on images it makes up"),
    "fedper": ("strategies.fedper:FedPer", "the base is shared and averaged, the head stays at home"),
    "fedrep": ("strategies.fedrep:FedRep", "FedPer whose clients train the head first, then the base"),
    "ditto": ("strategies.ditto:Ditto", "FedAvg, and personal models drawn towards the global one"),
    "kd3": ("strategies.kd3:KD3", "FedAvg whose server trains a student on web images, choosing those that fit"),
    "rad": ("strategies.rad:RAD", "the server asks its clients about few images, and reckons with wrong answers"),
    "rad_clients": (
        "strategies.rad_clients:RADClients",
        "RAD whose clients choose the questions and learn the answers",
    ),
    "swing": ("strategies.swing:Swing", "students leave, taught at home with temperatures that hide private tokens"),
    "swing_labels": (
        "strategies.swing_labels:SwingLabels",
        "clients answer public text with tempered, noised probabilities, the server's student learns",
    ),
}
"""name -> ("module:Class", one line about it)."""


def near(word: str, words: Mapping[str, object] | list[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for a near miss, else an empty string."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def method_class(name: str) -> type[Method]:
    """Return the class of a registered method, or of a user's own as ``"package.module:Class"``."""
    if name not in METHODS and ":" not in name:
        raise ConfigError(
            f"method.name: expected one of {', '.join(METHODS)} or your own 'module:Class', got '{name}'"
            f"{near(name, METHODS)}"
        )
    module, _, attribute = (METHODS[name][0] if name in METHODS else name).partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # a user's module may do anything when it is imported
        raise ConfigError(f"method.name: '{name}' cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"method.name: '{name}' should be a subclass of fedkd.method.Method")
    return found
