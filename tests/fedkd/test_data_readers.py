"""Files of the user: every format is read right, and everything broken is one clear ConfigError."""

import gzip
import io
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedkd.data.datasets import Dataset, load
from fedkd.errors import ConfigError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 5, 4), dtype=np.uint8)
CIFAR = RNG.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
Y = np.array([0, 1, 2, 0, 1, 2])


def files(path: Path) -> Dataset:
    return load("files", path)


def refused(path: Path, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as error:
        files(path)
    assert "\n" not in str(error.value)
    assert "expected" in str(error.value) and "got" in str(error.value)


def npz(folder: Path, **arrays: object) -> Path:
    np.savez(folder / "mine.npz", **{k: np.asarray(v) for k, v in arrays.items()})
    return folder / "mine.npz"


def write_idx(path: Path, array: np.ndarray, zipped: bool) -> None:
    data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if zipped else data)


def write_mnist(folder: Path, zipped: bool, test: bool = True, sep: str = "-") -> Path:
    end = ".gz" if zipped else ""
    for part in ("train", "t10k") if test else ("train",):
        write_idx(folder / f"{part}-images{sep}idx3-ubyte{end}", GREY, zipped)
        write_idx(folder / f"{part}-labels{sep}idx1-ubyte{end}", Y.astype(np.uint8), zipped)
    return folder


# npz


def test_npz_grey_with_groups(tmp_path):
    data = files(npz(tmp_path, x=GREY, y=Y.astype(np.uint8), client=["b", "a", "c", "a", "b", "b"]))
    assert data.x.shape == (6, 1, 5, 4) and data.x.dtype == np.uint8
    assert np.array_equal(data.x[:, 0], GREY) and data.y.dtype == np.int64
    assert data.groups is not None and data.groups.tolist() == [1, 0, 2, 0, 1, 1]
    assert (data.num_classes, data.source, data.test_x) == (3, "mine.npz", None)


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_channels_last_becomes_first(tmp_path, channels):
    x = RNG.integers(0, 256, (6, 5, 4, channels), dtype=np.uint8)
    assert np.array_equal(files(npz(tmp_path, x=x, y=Y)).x, x.transpose(0, 3, 1, 2))
    assert np.array_equal(files(npz(tmp_path, x=x.transpose(0, 3, 1, 2), y=Y)).x, x.transpose(0, 3, 1, 2))


def test_npz_float_and_official_test(tmp_path):
    x = RNG.normal(size=(6, 5, 4))
    data = files(npz(tmp_path, x_train=x, y_train=Y, x_test=x[:2], y_test=Y[:2]))
    assert data.x.dtype == np.float32 and np.allclose(data.x[:, 0], x)
    assert data.test_x is not None and data.test_x.shape == (2, 1, 5, 4)
    assert data.test_y is not None and data.test_y.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": GREY}, "keys x and y"),
        ({"x": GREY, "y": Y, "x_test": GREY}, "together"),
        ({"x": GREY, "y": Y, "client": Y, "group": Y}, "one key of natural clients"),
        ({"x": GREY, "y": Y, "client": Y[:3]}, r"shape \(6,\)"),
        ({"x": GREY, "y": Y, "client": Y / 2}, "integers or strings"),
        ({"x": GREY, "y": Y[:5]}, "expected 6 labels"),
        ({"x": GREY, "y": Y + 0.5}, "integer labels"),
        ({"x": GREY, "y": np.eye(3, dtype=int)[Y]}, "integer labels"),
        ({"x": GREY, "y": Y - 1}, "labels from 0"),
        ({"x": GREY, "y": Y + 1}, "none with label 0"),
        ({"x": GREY, "y": Y * 2}, "none with label 1"),
        ({"x": GREY, "y": Y * 0}, "at least 2 classes"),
        ({"x": GREY.astype(np.int64), "y": Y}, "uint8"),
        ({"x": np.full((6, 5, 4), np.nan), "y": Y}, "finite"),
        ({"x": np.full((6, 5, 4), 1e300), "y": Y}, "finite"),
        ({"x": GREY[:, 0], "y": Y}, r"\(n, H, W\)"),
        ({"x": GREY[:, :, :, None, None], "y": Y}, r"\(n, H, W\)"),
        ({"x": np.zeros((6, 3, 5, 3), np.uint8), "y": Y}, "both axes"),
        ({"x": np.zeros((6, 5, 5, 4), np.uint8), "y": Y}, "neither axis"),
        ({"x": GREY[:0], "y": Y[:0]}, "at least one image"),
        ({"x": GREY, "y": Y, "x_test": GREY[:, :4], "y_test": Y}, "as in training"),
        ({"x": GREY, "y": Y, "x_test": GREY / 255, "y_test": Y}, "as in training"),
        ({"x": GREY, "y": Y, "x_test": GREY, "y_test": Y + 1}, "labels of test_x in 0..2, got 1..3"),
        ({"x": GREY, "y": Y.astype(object)}, "without pickled objects"),
        ({"jpeg": GREY.ravel(), "offset": [0, 120], "label": [0]}, "JPEG"),
        ({"jpeg": GREY.ravel(), "offset": [0, 500], "label": [0]}, "offsets that rise"),
        ({"jpeg": GREY.ravel(), "offset": [0, 60, 60, 120], "label": [0, 1, 1]}, "offsets that rise"),
        ({"jpeg": GREY.ravel(), "offset": [0.5, 120], "label": [0]}, "offsets that rise"),
    ],
)
def test_npz_refused(tmp_path, arrays, match):
    refused(npz(tmp_path, **arrays), match)


def test_npz_that_is_none(tmp_path):
    path = tmp_path / "mine.npz"
    for content in (b"", b"text", b"PK\x03\x04 cut"):
        path.write_bytes(content)
        refused(path, "npz")
    with path.open("wb") as file:
        np.save(file, GREY)
    refused(path, "single array")


def test_npz_cut_short(tmp_path):
    path = npz(tmp_path, x=GREY, y=Y)
    path.write_bytes(path.read_bytes()[:-40])
    refused(path, "npz")


def jpeg(shape: tuple[int, int], value: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, shape, (value,) * 3 if mode == "RGB" else value).save(buffer, "JPEG")
    return buffer.getvalue()


def stored(folder: Path, images: list[bytes]) -> Path:
    data = np.frombuffer(b"".join(images), np.uint8)
    return npz(folder, jpeg=data, offset=np.cumsum([0, *map(len, images)]), label=np.arange(len(images)))


def test_stored_jpegs(tmp_path):
    data = files(stored(tmp_path, [jpeg((5, 4), 10), jpeg((5, 4), 200, "L")]))
    assert data.x.shape == (2, 3, 4, 5)
    assert abs(int(data.x[0].mean()) - 10) <= 1 and abs(int(data.x[1].mean()) - 200) <= 1


def test_stored_jpegs_of_two_sizes(tmp_path):
    refused(stored(tmp_path, [jpeg((5, 4), 10), jpeg((4, 4), 10)]), "image 1")


# IDX


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize("sep", ["-", "."])
def test_idx(tmp_path, zipped, test, sep):
    data = files(write_mnist(tmp_path, zipped, test, sep))
    assert np.array_equal(data.x[:, 0], GREY) and np.array_equal(data.y, Y)
    assert (data.test_x is not None) == test
    assert data.source == tmp_path.name


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("train-images-idx3-ubyte", b"\0\0\x0d\x03" + bytes(12), "unsigned bytes"),
        ("train-images-idx3-ubyte", b"\0\0", "header"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03" + bytes(4), "header"),
        ("train-images-idx3-ubyte", struct.pack(">HBB3I", 0, 8, 3, 6, 5, 4) + bytes(119), r"\(6, 5, 4\) bytes"),
        ("train-images-idx3-ubyte", struct.pack(">HBB3I", 0, 8, 3, *[2**32 - 1] * 3), "after the header"),
        ("train-images-idx3-ubyte", gzip.compress(bytes(100), mtime=0)[:-9], "IDX file"),
        ("train-labels-idx1-ubyte", struct.pack(">HBBI", 0, 8, 1, 2) + bytes(2), "6 labels"),
    ],
)
def test_idx_refused(tmp_path, name, content, match):
    write_mnist(tmp_path, zipped=False)
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, match)


@pytest.mark.parametrize("name", ["train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
def test_idx_without_its_partner(tmp_path, name):
    (write_mnist(tmp_path, zipped=False) / name).unlink()
    refused(tmp_path, "come together")


def test_one_idx_file(tmp_path):
    refused(write_mnist(tmp_path, zipped=False) / "train-images-idx3-ubyte", "folder with IDX")


# CIFAR-10


def write_binary(path: Path, x: np.ndarray, y: np.ndarray) -> None:
    np.column_stack([y.astype(np.uint8), x.reshape(len(x), -1)]).tofile(path)


def write_python(path: Path, x: np.ndarray, y: np.ndarray, protocol: int = 2) -> None:
    batch = {b"data": x.reshape(len(x), -1), b"labels": y.tolist(), b"batch_label": b"one"}
    path.write_bytes(pickle.dumps(batch, protocol=protocol))


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_cifar_binary_folder(tmp_path, inside):
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    write_binary(folder / "data_batch_1.bin", CIFAR[:3], np.array([0, 1, 2]))
    write_binary(folder / "data_batch_2.bin", CIFAR[3:], np.array([2]))
    write_binary(folder / "test_batch.bin", CIFAR[:1], np.array([1]))
    data = files(tmp_path)
    assert np.array_equal(data.x, CIFAR) and data.y.tolist() == [0, 1, 2, 2]
    assert data.test_x is not None and np.array_equal(data.test_x, CIFAR[:1])


def test_cifar_one_file(tmp_path):
    write_binary(tmp_path / "some.bin", CIFAR, Y[:4])
    assert np.array_equal(files(tmp_path / "some.bin").x, CIFAR)
    write_python(tmp_path / "data_batch_1", CIFAR, Y[:4])
    assert np.array_equal(files(tmp_path / "data_batch_1").x, CIFAR)


@pytest.mark.parametrize("size", [0, 3072])
def test_cifar_binary_refused(tmp_path, size):
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(size))
    refused(tmp_path, "records of 3073")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_cifar_python(tmp_path, protocol):
    write_python(tmp_path / "data_batch_1", CIFAR, Y[:4], protocol)
    write_python(tmp_path / "test_batch", CIFAR[:2], Y[:2], protocol)
    data = files(tmp_path)
    assert np.array_equal(data.x, CIFAR) and data.y.tolist() == [0, 1, 2, 0]
    assert data.test_y is not None and data.test_y.tolist() == [0, 1]


def test_cifar_python_2_pickle(tmp_path):
    """The published batches were written by Python 2: byte strings and the old name of numpy's module."""
    raw = CIFAR.tobytes()
    parts = [
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01",
        b"K\x04M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff",
        b"K\x00tb\x89T" + struct.pack("<i", len(raw)) + raw + b"tbU\x06labels](K\x00K\x01K\x02K\x00eu.",
    ]
    (tmp_path / "data_batch_1").write_bytes(b"".join(parts))
    assert np.array_equal(files(tmp_path).x, CIFAR)


class Evil:
    def __reduce__(self):
        return sys.exit, ("this pickle ran",)


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ({"data": Evil(), "labels": [0]}, "not allowed"),
        ({"data": CIFAR.reshape(4, -1).astype(float), "labels": [0] * 4}, "not of bytes"),
        ({"data": np.asfortranarray(CIFAR.reshape(4, -1)), "labels": [0] * 4}, "C order"),
        ({"data": CIFAR.reshape(4, -1)}, "'data' and 'labels'"),
        ({"data": CIFAR.reshape(4, -1), "labels": ["cat"] * 4}, "'data' and 'labels'"),
        ({"data": CIFAR.reshape(4, -1), "labels": [0] * 3}, r"shape \(3, 3072\)"),
        ({"data": CIFAR, "labels": [0] * 4}, "3072"),
        ([1, 2], "'data' and 'labels'"),
    ],
)
def test_cifar_python_refused(tmp_path, batch, match):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch, protocol=2))
    refused(tmp_path, match)


def test_a_broken_pickle_is_a_config_error_whatever_the_bytes(tmp_path):
    good = pickle.dumps({b"data": CIFAR[:1].reshape(1, -1), b"labels": [0]}, protocol=2)
    path = tmp_path / "data_batch_1"
    for at in range(200):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :] if at % 2 else good[:at])
        with pytest.raises(ConfigError):
            files(path)


# folders of images


def picture(path: Path, size: tuple[int, int] = (4, 5), mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 7 if mode in "LP" else None).save(path)


def test_folder_of_classes(tmp_path):
    for name in ("b/2.png", "b/1.png", "a/1.bmp"):
        picture(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    data = files(tmp_path)
    assert data.x.shape == (3, 1, 5, 4) and data.y.tolist() == [0, 1, 1] and int(data.x.max()) == 7


def test_folder_with_colour_and_official_test(tmp_path):
    picture(tmp_path / "train/a/1.png")
    picture(tmp_path / "train/b/1.png", mode="RGB")
    picture(tmp_path / "test/b/1.png")
    (tmp_path / "test/a").mkdir()
    data = files(tmp_path)
    assert data.x.shape == (2, 3, 5, 4) and data.x[0].min() == 7
    assert data.test_y is not None and data.test_y.tolist() == [1]


def test_folder_keeps_pixels(tmp_path):
    for label, pixels in enumerate((GREY[0], np.stack([GREY[0]] * 3, axis=-1))):
        (tmp_path / str(label)).mkdir()
        Image.fromarray(pixels).save(tmp_path / str(label) / "1.png")
    assert np.array_equal(files(tmp_path).x, np.broadcast_to(GREY[0], (2, 3, 5, 4)))


def test_folder_names_the_first_image_of_another_size(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/9.png"):
        picture(tmp_path / name)
    picture(tmp_path / "b/3.png", size=(6, 5))
    refused(tmp_path, r"3\.png: expected 4x5 pixels as in 1\.png, got 6x5")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "F"])
def test_folder_refuses_modes_that_would_lose_something(tmp_path, mode):
    picture(tmp_path / "a/1.png")
    picture(tmp_path / "b/1.tiff", mode=mode)
    refused(tmp_path, "8-bit greyscale or RGB")


def test_folder_refused(tmp_path):
    refused(tmp_path, "got none of them")
    picture(tmp_path / "a/1.png")
    refused(tmp_path, "at least 2 classes")
    (tmp_path / "b").mkdir()
    refused(tmp_path, "images of one class, got none")
    (tmp_path / "b/1.png").write_bytes(b"not a picture")
    refused(tmp_path, "cannot be read")


def test_folder_test_set_of_other_classes(tmp_path):
    for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/c/1.png"):
        picture(tmp_path / name)
    refused(tmp_path, "got c too")


# paths


def test_paths_refused(tmp_path):
    refused(tmp_path / "nowhere.npz", "got nothing there")
    (tmp_path / "table.csv").write_text("1,2")
    refused(tmp_path / "table.csv", "convert it to .npz")
    with pytest.raises(ConfigError, match="expected the path"):
        load("files")
