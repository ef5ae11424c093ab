"""Read images and labels from files of known formats: npz, IDX, CIFAR-10 batches, folders of images.

Formats are read, never executed: no pickle is loaded by the ordinary unpickler, and ``allow_pickle`` stays off.
"""

from __future__ import annotations

import gzip
import math
import pickle
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedkd.data import pictures
from fedkd.errors import ConfigError

IDX_NAMES = ("images-idx3-ubyte", "labels-idx1-ubyte")
CIFAR_RECORD = 1 + 3 * 32 * 32
"""Bytes of one image in a binary CIFAR-10 batch: the label, then the red, green and blue planes."""


class Arrays(NamedTuple):
    """What a file holds, not yet checked; shapes as ``fedkd.data.checks`` accepts them."""

    x: NDArray[Any]
    y: NDArray[Any]
    groups: NDArray[Any] | None = None
    test_x: NDArray[Any] | None = None
    test_y: NDArray[Any] | None = None
    private: NDArray[Any] | None = None


def read(path: Path) -> Arrays:
    """Read data of any known format; the format is told by the names, not by the content.

    Args:
        path: An ``.npz`` file, a CIFAR-10 batch file, or a folder with IDX files, with CIFAR-10 batches, or with one
            sub-folder of images a class (directly, or inside ``train`` and ``test``).

    Raises:
        ConfigError: The path does not exist, has no known format, or breaks the format.
    """
    if not path.exists():
        raise ConfigError(f"{path}: expected a data file or folder, got nothing there; check the path")
    return _folder(path) if path.is_dir() else _file(path)


def _file(path: Path) -> Arrays:
    if path.suffix == ".npz":
        return npz(path)
    if path.suffix == ".bin" or path.name.startswith(("data_batch", "test_batch")):
        return Arrays(*_cifar_files([path]))
    if "-ubyte" in path.name:
        raise ConfigError(f"{path}: expected a folder with IDX images and labels, got one file; give {path.parent}")
    raise ConfigError(f"{path}: expected .npz, a CIFAR-10 batch or a folder, got {path.name}; convert it to .npz")


def _folder(path: Path) -> Arrays:
    if _idx_file(path, f"train-{IDX_NAMES[0]}") is not None:
        return idx(path)
    for folder in (path, path / "cifar-10-batches-bin", path / "cifar-10-batches-py"):
        if any(folder.glob("data_batch_*")):
            return cifar10(folder)
    return Arrays(*pictures.folder(path))


# npz


def npz(path: Path) -> Arrays:
    """Read an ``.npz`` file.

    Args:
        path: A file with the keys ``x`` and ``y`` (or ``x_train``, ``y_train``), optionally ``x_test`` and
            ``y_test``, optionally the natural clients as ``group``, ``groups``, ``client`` or ``writer``, optionally
            ``private``, how private each image is, in [0, 1]; or with
            ``jpeg``, ``offset`` and ``label`` (JPEG images of one size, end to end).

    Raises:
        ConfigError: Not such a file.
    """
    # Opened here, since numpy leaves a file open that turns out to be no archive.
    with _reading(path, "an .npz file without pickled objects"), path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ConfigError(f"{path}: expected an .npz archive, got a single array; use numpy.savez(x=..., y=...)")
        with archive:
            keys = set(archive.files)
            if {"jpeg", "offset", "label"} <= keys:
                return Arrays(pictures.jpegs(archive["jpeg"], archive["offset"], str(path)), archive["label"])
            return _npz_arrays(archive, keys, path)


def _npz_arrays(archive: Mapping[str, NDArray[Any]], keys: set[str], path: Path) -> Arrays:
    x, y = next((pair for pair in (("x", "y"), ("x_train", "y_train")) if set(pair) <= keys), (None, None))
    if x is None or y is None:
        raise ConfigError(
            f"{path}: expected the keys x and y (or x_train and y_train), got {sorted(keys)}; rename them"
        )
    if ("x_test" in keys) != ("y_test" in keys):
        raise ConfigError(f"{path}: expected x_test and y_test together, got one of them; add the other")
    group = [name for name in ("group", "groups", "client", "writer") if name in keys]
    if len(group) > 1:
        raise ConfigError(f"{path}: expected one key of natural clients, got {group}; keep one")
    test_x, test_y = (archive["x_test"], archive["y_test"]) if "x_test" in keys else (None, None)
    private = archive["private"] if "private" in keys else None
    return Arrays(archive[x], archive[y], archive[group[0]] if group else None, test_x, test_y, private)


# IDX, the format of MNIST


def idx(folder: Path) -> Arrays:
    """Read MNIST's four IDX files (``train-images-idx3-ubyte`` and so on, gzipped or not); ``t10k`` may be missing.

    Raises:
        ConfigError: A file is missing or broken.
    """
    train = [_idx_pair_member(folder, f"train-{name}") for name in IDX_NAMES]
    if all(_idx_file(folder, f"t10k-{name}") is None for name in IDX_NAMES):
        return Arrays(*train)
    return Arrays(train[0], train[1], None, *(_idx_pair_member(folder, f"t10k-{name}") for name in IDX_NAMES))


def idx_array(path: Path) -> NDArray[np.uint8]:
    """Return the array of one IDX file of unsigned bytes, gzipped or not.

    Raises:
        ConfigError: Another type of value, or a length that does not fit the header.
    """
    with _reading(path, "an IDX file"):
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    dims = data[3] if data[:3] == b"\0\0\x08" and len(data) > 3 else 0
    if not dims or len(data) < 4 + 4 * dims:
        raise ConfigError(f"{path}: expected an IDX header of unsigned bytes, got {data[:4]!r}; download it again")
    shape = tuple(np.frombuffer(data, ">u4", dims, offset=4).tolist())
    if len(data) != 4 + 4 * dims + math.prod(shape):
        raise ConfigError(f"{path}: expected {shape} bytes after the header, got {len(data)} in all; download it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _idx_file(folder: Path, name: str) -> Path | None:
    """Return the file, the spelling with a dot (``train-images.idx3-ubyte``) included."""
    names = (name, name.replace("-idx", ".idx"))
    return next((p for n in names for p in (folder / n, folder / f"{n}.gz") if p.is_file()), None)


def _idx_pair_member(folder: Path, name: str) -> NDArray[np.uint8]:
    path = _idx_file(folder, name)
    if path is None:
        raise ConfigError(f"{folder}: expected {name} or {name}.gz, got neither; images and labels come together")
    return idx_array(path)


# CIFAR-10


def cifar10(folder: Path) -> Arrays:
    """Read CIFAR-10's batches from a folder: the binary version (``.bin``) or the Python one (see ``_Inert``).

    All ``data_batch_*`` that are there are the training set, ``test_batch`` the official test set if it is there.

    Raises:
        ConfigError: No batch, or a broken one.
    """
    suffix = ".bin" if any(folder.glob("data_batch_*.bin")) else ""
    train = sorted(p for p in folder.glob(f"data_batch_*{suffix}") if p.suffix == suffix)
    if not train:
        raise ConfigError(f"{folder}: expected data_batch_1 or data_batch_1.bin, got neither; unpack CIFAR-10 again")
    x, y = _cifar_files(train)
    test = folder / f"test_batch{suffix}"
    return Arrays(x, y, None, *_cifar_files([test])) if test.is_file() else Arrays(x, y)


def _cifar_files(paths: Sequence[Path]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    batches = [(_cifar_binary if path.suffix == ".bin" else _cifar_python)(path) for path in paths]
    return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])


def _cifar_binary(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    with _reading(path, "a CIFAR-10 batch"):
        data = np.fromfile(path, np.uint8)
    if not len(data) or len(data) % CIFAR_RECORD:
        raise ConfigError(
            f"{path}: expected records of {CIFAR_RECORD} bytes, got {len(data)} bytes; give CIFAR-10's binary version"
        )
    records = data.reshape(-1, CIFAR_RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)


def _cifar_python(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    with _reading(path, "a CIFAR-10 batch of the Python version"), path.open("rb") as file:
        batch = _InertUnpickler(file, encoding="bytes").load()
    batch = {_text(k): v for k, v in batch.items()} if isinstance(batch, dict) else {}
    data, y = batch.get("data"), batch.get("labels")
    if not isinstance(data, _InertArray) or not isinstance(y, list) or not all(isinstance(label, int) for label in y):
        raise ConfigError(f"{path}: expected 'data' and 'labels', got {sorted(batch)}; give CIFAR-10's own files")
    if data.shape != (len(y), CIFAR_RECORD - 1) or len(data.raw) != math.prod(data.shape):
        raise ConfigError(f"{path}: expected bytes of shape ({len(y)}, 3072), got {data.shape}; give CIFAR-10's files")
    return np.frombuffer(data.raw, np.uint8).reshape(-1, 3, 32, 32), np.array(y, np.int64)


def _text(key: object) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


class _InertDtype:
    """Stands in for numpy.dtype: only the code of unsigned bytes passes, and its state is dropped."""

    def __init__(self, code: object, *_flags: object) -> None:
        if _text(code) not in ("u1", "|u1"):
            raise pickle.UnpicklingError(f"an array of {_text(code)}, not of bytes")

    def __setstate__(self, state: object) -> None:
        """Drop it: the state of the byte type says nothing."""


class _InertArray:
    """Stands in for numpy.ndarray: keeps the shape and the bytes, builds nothing."""

    shape: tuple[int, ...] = ()
    raw: bytes = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran, raw = state
        if fortran or not isinstance(dtype, _InertDtype) or not isinstance(raw, bytes):
            raise pickle.UnpicklingError("an array that is not of bytes in C order")
        self.shape, self.raw = tuple(shape), raw


def _reconstruct(*_arguments: object) -> _InertArray:
    """Stands in for numpy's function of the same name, which makes the empty array."""
    return _InertArray()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Stands in for _codecs.encode, by which Python 3 writes bytes in old protocols; no other codec runs."""
    return text.encode("latin1")


class _InertUnpickler(pickle.Unpickler):
    """Unpickler in which every name is refused or mapped to something inert, so a pickle can run no code."""

    _names: Mapping[tuple[str, str], object] = {
        ("numpy", "ndarray"): _InertArray,
        ("numpy", "dtype"): _InertDtype,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in self._names:
            raise pickle.UnpicklingError(f"a pickle that asks for {module}.{name}, which is not allowed")
        return self._names[module, name]


@contextmanager
def _reading(path: Path, expected: str) -> Iterator[None]:
    """Turn what the decoders raise on broken files into one line; the pickle machine may raise nearly anything."""
    broken = (
        OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, MemoryError,
        zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, NotImplementedError,
    )  # fmt: skip
    try:
        yield
    except broken as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{path}: expected {expected}, got {reason}; replace the file") from error
