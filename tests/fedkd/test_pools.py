"""Pools: what is loaded at which shape, what is kept in the cache, and the trouble that is planted."""

import io
import os
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedkd.config import Config
from fedkd.data import cache as kept
from fedkd.data import glyphs, pools
from fedkd.data.planted import with_far, wrong_teacher
from fedkd.data.pools import POOLS, Pool, load
from fedkd.errors import ConfigError
from fedkd.federation import Federation, build

FOLDER = os.environ.get("FEDKD_DATA")
needs_folder = pytest.mark.skipif(not FOLDER, reason="FEDKD_DATA is not set")

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 3, 8, 8), dtype=np.uint8)


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Every test has a cache of its own, no data and no fonts but matplotlib's."""
    monkeypatch.delenv("FEDKD_DATA", raising=False)
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(glyphs, "PACKAGES", ())
    return tmp_path / "cache"


@pytest.fixture
def forbid(monkeypatch):
    """Return a function after which nothing can be decoded or rendered: what still loads comes from the cache."""

    def apply():
        def refuse(*_arguments: object) -> None:
            raise AssertionError("made again")

        for name in ("_decoded", "_archive", "rendered"):
            monkeypatch.setattr(pools, name, refuse)

    return apply


def npz(path: Path, **arrays: object) -> Path:
    np.savez(path, **{name: np.asarray(value) for name, value in arrays.items()})
    return path


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (20, 10), colour: object = (250, 0, 0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def imagenet32(folder: Path, wnids: tuple[str, ...]) -> Path:
    """Two JPEG images of each class, of brightness 40 times the class."""
    folder.mkdir()
    stored = []
    for grey in range(len(wnids)):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (40 * grey,) * 3).save(buffer, "JPEG")
        stored += [np.frombuffer(buffer.getvalue(), np.uint8)] * 2
    offset = np.cumsum([0, *map(len, stored)])
    label = np.repeat(np.arange(len(wnids), dtype=np.int16), 2)
    (folder / "imagenet32_classes.tsv").write_text("".join(f"{wnid}\tname, other name\n" for wnid in wnids))
    return npz(folder / "imagenet32_train_jpeg.npz", jpeg=np.concatenate(stored), offset=offset, label=label)


def plain(m: int = 40, shape: tuple[int, int, int] = (1, 8, 8)) -> Pool:
    return Pool("files", np.full((m, *shape), 9, np.uint8), np.arange(m) % 3 - 1, "here")


# imagenet32

WNIDS = ("n01443537", "n02123045", "n04487081", "n09999999")


@pytest.mark.parametrize("place", ["variable", "folder", "file"])
def test_imagenet32_knows_which_of_its_images_are_cifar10s(monkeypatch, tmp_path, place):
    file = imagenet32(tmp_path / "data", WNIDS)
    if place == "variable":
        monkeypatch.setenv("FEDKD_DATA", str(file.parent))
    pool = load("imagenet32", (3, 32, 32), {"folder": file.parent, "file": file}.get(place))
    assert pool.x.shape == (8, 3, 32, 32) and pool.x[:, 0, 5, 5].tolist() == [0, 0, 40, 40, 80, 80, 120, 120]
    assert pool.labels.tolist() == [-1, -1, 3, 3, 9, 9, -1, -1]
    assert pool.source == ("FEDKD_DATA/" if place == "variable" else "") + "imagenet32_train_jpeg.npz"


def test_imagenet32_at_another_shape_and_without_names_of_classes(tmp_path):
    file = imagenet32(tmp_path / "data", WNIDS)
    file.with_name("imagenet32_classes.tsv").unlink()
    pool = load("imagenet32", (1, 12, 10), file)
    assert pool.labels is None and pool.x.shape == (8, 1, 12, 10) and pool.x[6, 0, 3, 3] == 120


def test_the_list_of_classes_must_be_whole(tmp_path):
    file = imagenet32(tmp_path / "data", WNIDS)
    file.with_name("imagenet32_classes.tsv").write_text("n01443537\tgoldfish\n")
    with pytest.raises(ConfigError, match="expected 4 classes or more, got 1"):
        load("imagenet32", (3, 32, 32), file)


def test_imagenet32_is_not_there(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="it is not set"):
        load("imagenet32", (3, 32, 32))
    monkeypatch.setenv("FEDKD_DATA", str(tmp_path))
    with pytest.raises(ConfigError, match=rf"{tmp_path}.*got nothing there; set FEDKD_DATA"):
        load("imagenet32", (3, 32, 32))


def test_the_map_to_cifar10_has_26_classes():
    wnids = " ".join(pools.CIFAR10_WNIDS).split()
    assert len(pools.CIFAR10_WNIDS) == 10 and len(wnids) == len(set(wnids)) == 26


@needs_folder
def test_the_real_imagenet32_has_13_percent_of_cifar10s_classes(monkeypatch):
    monkeypatch.setattr(pools, "_archive", lambda path, shape: np.zeros((100_000, *shape), np.uint8))  # 20 s
    labels = load("imagenet32", (1, 1, 1), Path(FOLDER)).labels
    assert np.bincount(labels + 1).tolist() == [87_000, 0, 2000, 2000, 1500, 500, 3000, 1000, 0, 1000, 2000]


# glyphs


def test_glyphs_have_the_polarity_and_the_frame_of_scikit_learns_digits():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pool = load("glyphs", (1, 8, 8), limit=600)
    assert pool.x.max() == 255 and set(pool.labels.tolist()) == set(range(10))
    assert pool.source.startswith("rendered from DejaVu of matplotlib ")
    alike = np.corrcoef(
        [pool.x[pool.labels == k].mean(0).ravel() for k in range(10)],
        [bunch.images[bunch.target == k].mean(0).ravel() for k in range(10)],
    )[:10, 10:]
    own, others = alike.diagonal(), alike[~np.eye(10, dtype=bool)]
    assert own.min() > 0.5 and own.mean() > others.mean() + 0.15  # ink is high, upright, under the right label
    mean = pool.x.mean((0, 1)) / 255
    assert mean[[0, -1]].mean() > 0.1 and mean[:, [0, -1]].mean() < 0.15  # as tall as the image, and narrower


def test_glyphs_vary():
    pool = load("glyphs", (1, 28, 28), limit=300)
    sevens = pool.x[pool.labels == 7].reshape(-1, 784)
    assert len(np.unique(sevens, axis=0)) == len(sevens)
    ink = sevens.mean(1)
    assert ink.max() > 2 * ink.min()  # thickness and size
    assert pool.x[:, :, [0, -1]].max() < 128 < pool.x.max()  # MNIST's margin


def test_each_draw_does_what_it_says():
    def ink(**change: float) -> np.ndarray:
        one = glyphs.draw("0", 1, rng())._replace(
            member=np.zeros(1),
            stroke=np.zeros(1, np.int64),
            size=np.ones(1),
            rotation=np.zeros(1),
            shift=np.zeros((1, 2)),
        )
        one = one._replace(**{name: np.asarray([value]) for name, value in change.items()})
        return glyphs.render("0", one, glyphs.fonts(), 40, 40)[0].astype(float)

    def moments(image: np.ndarray) -> tuple[float, float, float]:
        y, x = np.mgrid[:40, :40]
        cx, cy = (np.average(axis, weights=image) for axis in (x, y))
        return cx, cy, np.average((x - cx) * (y - cy), weights=image)

    plain, moved, larger = ink(), ink(shift=(0.1, -0.05)), ink(size=1.1)
    assert np.subtract(moments(moved), moments(plain))[:2].tolist() == pytest.approx([4, -2], abs=0.1)
    rows = [int((image.max(1) > 128).sum()) for image in (plain, larger)]
    assert rows == [pytest.approx(40 * 20 / 28, abs=1), pytest.approx(44 * 20 / 28, abs=1)]
    assert moments(ink(rotation=0.2))[2] < -1 and moments(ink(rotation=-0.2))[2] > 1  # to the left, to the right
    assert ink(stroke=2).sum() > 1.1 * plain.sum()
    many = glyphs.draw("0123", 1000, rng())
    assert set(many.character) == {0, 1, 2, 3} and set(many.stroke) == {0, 1, 2}
    assert many.rotation.min() < -0.2 < 0.2 < many.rotation.max() and np.abs(many.shift).max() < 0.04


def test_glyphs_in_colour_are_grey():
    pool = load("glyphs", (3, 10, 14), limit=4)
    assert pool.x.shape == (4, 3, 10, 14)
    assert np.array_equal(pool.x, load("glyphs", (1, 10, 14), limit=4).x.repeat(3, axis=1))


def test_glyphs_depend_on_the_seed_and_a_smaller_pool_is_the_beginning_of_a_larger():
    small, large, other = (load("glyphs", (1, 8, 8), limit=m, seed=s) for m, s in ((20, 0), (50, 0), (50, 1)))
    assert np.array_equal(small.x, large.x[:20]) and np.array_equal(small.labels, large.labels[:20])
    assert not np.array_equal(large.labels, other.labels)


def test_glyphs_take_no_path():
    with pytest.raises(ConfigError, match="expected no path"):
        load("glyphs", (1, 8, 8), Path("mine"))


def test_installed_fonts_come_first_one_family_a_package(monkeypatch, tmp_path):
    dejavu = glyphs.fonts().families[0]
    for name, suffixes in (("font-one", (".otf", ".ttf")), ("font-two", (".otf",)), ("font-none", ())):
        module = tmp_path / name
        module.mkdir()
        files = [f"{name}/b{suffix}" for suffix in suffixes] + [f"{name}/a{suffix}" for suffix in suffixes]
        for file in files:
            (tmp_path / file).write_bytes(dejavu[0].read_bytes())
        info = tmp_path / f"{name.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in [*files, f"{name}/gone.ttf"]))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(glyphs, "PACKAGES", ("font-one", "font-absent", "font-none", "font-two"))
    found = glyphs.fonts()
    assert [[p.name for p in family] for family in found.families] == [["a.ttf", "b.ttf"], ["a.otf", "b.otf"]]
    assert found.source == "font-one 1.5, font-two 1.5"
    assert load("glyphs", (1, 8, 8), limit=9).source == "rendered from font-one 1.5, font-two 1.5"


def test_the_extra_lists_the_fonts_that_are_looked_for(monkeypatch):
    monkeypatch.undo()
    extra = {r.split(";")[0].strip() for r in metadata.requires("fedkd") or () if r.startswith("font-")}
    assert extra == set(glyphs.PACKAGES)


def test_dejavu_has_every_character_that_is_rendered():
    drawn = glyphs.draw(glyphs.DIGITS + glyphs.LETTERS, 2000, rng())
    images = glyphs.render(glyphs.DIGITS + glyphs.LETTERS, drawn, glyphs.fonts(), 16, 16)
    means = np.array([images[drawn.character == k].mean(0) for k in range(len(glyphs.DIGITS + glyphs.LETTERS))])
    gaps = np.abs(means[:, None] - means[None]).mean((2, 3)) + 255 * np.eye(len(means))
    assert means.max((1, 2)).min() > 60 and gaps.min() > 3  # a missing character would be an empty box, twice the same


def test_letters_that_look_like_digits_are_left_out():
    assert not set(glyphs.LETTERS) & set("ABDGIOQSTZbgijloqsz" + glyphs.DIGITS)


# files


def test_a_folder_of_any_pictures_is_brought_to_the_shape(tmp_path):
    folder = tmp_path / "web"
    picture(folder / "b" / "red.png")
    picture(folder / "a.jpg", "L", (64, 48), 77)
    picture(folder / "b" / "deep" / "CMYK.JPG", "CMYK", (40, 40), (0, 255, 255, 0))
    picture(folder / "c.bmp", "P", (3, 3), 0)
    picture(folder / ".hidden" / "x.png")
    (folder / "notes.txt").write_text("no picture")
    colour = load("files", (3, 6, 5), folder)
    assert colour.x.shape == (4, 3, 6, 5) and colour.labels is None and colour.source == "web"
    assert np.abs(colour.x[:, :, 2, 2].astype(int) - [[77] * 3, [254, 0, 0], [250, 0, 0], [0] * 3]).max() <= 1
    grey = load("files", (1, 4, 4), folder)
    assert np.abs(grey.x[:, 0, 1, 1].astype(int) - [77, 76, 75, 0]).max() <= 1


def test_pictures_are_resized_as_pillow_does(tmp_path):
    pixels = RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    folder = tmp_path / "web"
    folder.mkdir()
    Image.fromarray(pixels).save(folder / "a.png")
    npz(tmp_path / "web.npz", x=pixels[None])
    expected = np.asarray(Image.fromarray(pixels).resize((5, 4), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(load("files", (3, 4, 5), folder).x[0], expected)
    assert np.array_equal(load("files", (3, 4, 5), tmp_path / "web.npz").x[0], expected)
    assert np.array_equal(load("files", (3, 9, 12), folder).x[0], pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("key", ["x", "x_train"])
def test_an_npz_needs_no_labels(tmp_path, key):
    pool = load("files", (3, 8, 8), npz(tmp_path / "a.npz", **{key: RGB.transpose(0, 2, 3, 1)}))
    assert np.array_equal(pool.x, RGB) and pool.labels is None
    grey = load("files", (1, 8, 8), tmp_path / "a.npz").x[:, 0]
    expected = [np.asarray(Image.fromarray(image.transpose(1, 2, 0)).convert("L")) for image in RGB]
    assert np.array_equal(grey, expected)
    npz(tmp_path / "grey.npz", x=RGB[:, 0])
    assert np.array_equal(load("files", (3, 8, 8), tmp_path / "grey.npz").x, RGB[:, [0, 0, 0]])


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": RGB / 255}, "uint8"),
        ({"x": RGB.astype(np.int64)}, "int64"),
        ({"x": RGB[:, :2]}, "channel axis"),
        ({"x": RGB[:0]}, "at least one image"),
        ({"y": RGB}, "expected the key x"),
        ({"jpeg": RGB.ravel()}, "expected the key x"),
        ({"x": RGB.astype(object)}, "pickled"),
        ({"jpeg": RGB.ravel(), "offset": [0, RGB.size]}, "expected a JPEG image"),
    ],
)
def test_npz_refused(tmp_path, arrays, match):
    path = npz(tmp_path / "mine.npz", **arrays)
    with pytest.raises(ConfigError, match=match) as error:
        load("files", (3, 8, 8), path)
    assert "mine.npz" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut", b"\x93NUMPY"])
def test_broken_npz(tmp_path, content):
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(ConfigError, match=r"mine\.npz: expected an \.npz"):
        load("files", (3, 8, 8), tmp_path / "mine.npz")


def test_a_single_array_is_no_archive(tmp_path):
    np.save(tmp_path / "a.npy", RGB)
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(ConfigError, match="single array"):
        load("files", (3, 8, 8), tmp_path / "a.npz")


def test_pictures_refused_by_name(tmp_path, cache):
    folder = tmp_path / "web"
    picture(folder / "a.png")
    for name, make, match in (
        ("text.png", lambda path: path.write_bytes(b"text"), "cannot be read"),
        ("cut.png", lambda path: path.write_bytes((folder / "a.png").read_bytes()[:50]), "cannot be read"),
        ("clear.png", lambda path: picture(path, "RGBA", colour=(0, 0, 0, 0)), "RGBA"),
        ("deep.png", lambda path: picture(path, "I;16", colour=9), "I;16"),
        ("dangling.png", lambda path: path.symlink_to("nowhere"), "expected a file"),
    ):
        make(folder / name)
        with pytest.raises(ConfigError, match=match) as error:
            load("files", (3, 8, 8), folder)
        assert str(folder / name) in str(error.value)
        (folder / name).unlink()
    assert not cache.exists()  # nothing of a failure is kept


def test_no_pictures(tmp_path):
    with pytest.raises(ConfigError, match="expected the path"):
        load("files", (3, 8, 8))
    with pytest.raises(ConfigError, match="got nothing there"):
        load("files", (3, 8, 8), tmp_path / "gone")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ConfigError, match="got another file"):
        load("files", (3, 8, 8), tmp_path / "x.txt")
    with pytest.raises(ConfigError, match="expected image files"):
        load("files", (3, 8, 8), tmp_path)


# All of them


def test_unknown_name_and_shapes_that_are_no_images():
    with pytest.raises(ConfigError, match="did you mean glyphs"):
        load("glyph", (1, 8, 8))
    for shape in ((2, 8, 8), (1, 0, 8), (64,)):
        with pytest.raises(ConfigError, match="expected a shape"):
            load("glyphs", shape)
    assert set(POOLS) == {"imagenet32", "glyphs", "files"}


def test_limit_takes_a_random_part(tmp_path):
    path = npz(tmp_path / "a.npz", x=np.arange(200, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2))
    parts = [load("files", (1, 4, 4), path, limit=50, seed=seed).x for seed in (0, 0, 1)]
    taken = [part[:, 0, 0, 0].tolist() for part in parts]
    assert taken[0] == taken[1] != taken[2] and all(len(set(t)) == 50 and max(t) > 150 for t in taken)
    assert not parts[0].flags.writeable
    with pytest.raises(ConfigError, match="at most 200"):
        load("files", (1, 4, 4), path, limit=201)
    with pytest.raises(ConfigError, match="1 or more"):
        load("files", (1, 4, 4), path, limit=0)


def test_limit_keeps_labels_with_their_images(tmp_path):
    file = imagenet32(tmp_path / "data", WNIDS)
    pool = load("imagenet32", (3, 32, 32), file, limit=5)
    by_brightness = {0: -1, 40: 3, 80: 9, 120: -1}
    assert pool.labels.tolist() == [by_brightness[int(b)] for b in pool.x[:, 0, 0, 0]] and len(pool) == 5


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"x": np.zeros((4, 8, 8), np.uint8)}, r"\(m, C, H, W\)"),
        ({"x": np.zeros((4, 1, 8, 8))}, "float64"),
        ({"labels": np.zeros(3, np.int64)}, "4 int64 labels"),
        ({"labels": np.zeros(4, np.int32)}, "int32"),
    ],
)
def test_a_pool_checks_itself(change, match):
    with pytest.raises(ConfigError, match=match):
        Pool(**{"name": "p", "x": np.zeros((4, 1, 8, 8), np.uint8), "labels": None, "source": "here", **change})


# The cache


@pytest.mark.parametrize("name", ["imagenet32", "glyphs", "files", "archive"])
def test_the_second_load_makes_nothing(tmp_path, forbid, cache, name):
    picture(tmp_path / "web" / "a.png")
    path = {
        "imagenet32": imagenet32(tmp_path / "data", WNIDS),
        "glyphs": None,
        "files": tmp_path / "web",
        "archive": npz(tmp_path / "a.npz", x=RGB),
    }[name]
    arguments = ("files" if name == "archive" else name, (3, 8, 8), path)
    first = load(*arguments, limit=20) if name == "glyphs" else load(*arguments)
    forbid()
    again = load(*arguments, limit=20) if name == "glyphs" else load(*arguments)
    assert isinstance(again.x, np.memmap) and not again.x.flags.writeable and len(list(cache.iterdir())) == 1
    assert np.array_equal(first.x, again.x) and again.source == first.source
    assert (first.labels is None and again.labels is None) or np.array_equal(first.labels, again.labels)


def test_what_changes_the_images_changes_the_key(monkeypatch, tmp_path, cache):
    path = npz(tmp_path / "a.npz", x=RGB)
    load("files", (3, 8, 8), path)
    load("files", (3, 8, 9), path)
    npz(path, x=255 - RGB)
    os.utime(path, ns=(0, 1))
    assert np.array_equal(load("files", (3, 8, 8), path).x, 255 - RGB)
    assert len(list(cache.iterdir())) == 3
    picture(tmp_path / "web" / "a.png")
    assert len(load("files", (3, 8, 8), tmp_path / "web")) == 1
    picture(tmp_path / "web" / "b.png")
    assert len(load("files", (3, 8, 8), tmp_path / "web")) == 2
    monkeypatch.setattr(kept, "RECIPE", 2)
    load("files", (3, 8, 8), path)
    assert len(list(cache.iterdir())) == 6
    plain, seeded = (load("glyphs", (1, 8, 8), limit=30, seed=seed).x for seed in (0, 1))
    monkeypatch.setattr(glyphs, "SETTINGS", "others")
    before = len(list(cache.iterdir()))
    load("glyphs", (1, 8, 8), limit=30)
    assert not np.array_equal(plain, seeded) and len(list(cache.iterdir())) == before + 1


@pytest.mark.parametrize("cut", [0, 5, 60, 200])
def test_a_corrupt_cache_is_rebuilt(tmp_path, cache, cut):
    path = npz(tmp_path / "a.npz", x=RGB)
    load("files", (3, 8, 8), path)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:cut])
    assert np.array_equal(load("files", (3, 8, 8), path).x, RGB)
    assert [file.read_bytes() for file in cache.iterdir()] == [whole]


@pytest.mark.parametrize("other", [RGB[0], RGB.astype(np.float32)])
def test_another_array_in_the_place_of_a_cache_is_replaced(tmp_path, cache, other):
    path = npz(tmp_path / "a.npz", x=RGB)
    load("files", (3, 8, 8), path)
    (kept,) = cache.iterdir()
    np.save(kept, other)
    assert np.array_equal(load("files", (3, 8, 8), path).x, RGB)


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDKD_CACHE", str(tmp_path / "file" / "cache"))
    path = npz(tmp_path / "a.npz", x=RGB)
    with pytest.warns(UserWarning, match="cache folder to write to.*set FEDKD_CACHE"):
        pool = load("files", (3, 8, 8), path)
    assert np.array_equal(pool.x, RGB) and not pool.x.flags.writeable and not isinstance(pool.x, np.memmap)


def test_a_full_disk_leaves_nothing_behind(monkeypatch, tmp_path, cache):
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left"):
        pool = load("files", (3, 8, 8), npz(tmp_path / "a.npz", x=RGB))
    assert np.array_equal(pool.x, RGB) and list(cache.iterdir()) == []


def test_the_cache_lies_in_the_home_if_no_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("FEDKD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    load("files", (3, 8, 8), npz(tmp_path / "a.npz", x=RGB))
    assert [file.suffix for file in (tmp_path / ".cache" / "fedkd").iterdir()] == [".npy"]


def test_no_home_and_no_folder(monkeypatch, tmp_path):
    def nobody(_path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    with pytest.raises(ConfigError, match="FEDKD_CACHE: expected a folder or a user with a home"):
        load("glyphs", (1, 8, 8), limit=1)


# Far images


@pytest.mark.parametrize("kind", ["textures", "letters", "noise"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 20)])
def test_far_images_replace_their_share_and_nothing_else(kind, shape):
    pool = plain(40, shape)
    dirty, far = with_far(pool, 0.25, kind, rng())
    assert far.sum() == 10 and dirty.x.shape == pool.x.shape and not dirty.x.flags.writeable
    assert np.array_equal(dirty.x[~far], pool.x[~far]) and (pool.x == 9).all()
    assert np.unique(dirty.x[far].reshape(10, -1), axis=0).shape[0] == 10
    assert dirty.x[far].std((1, 2, 3)).min() > 5
    assert (dirty.labels[far] == -1).all() and np.array_equal(dirty.labels[~far], pool.labels[~far])
    assert dirty.source == f"here; 10 replaced by {kind}"
    again, same = with_far(pool, 0.25, kind, rng())
    assert np.array_equal(again.x, dirty.x) and np.array_equal(same, far)


def test_far_images_are_chosen_uniformly_and_in_any_share():
    unknown = Pool("files", np.zeros((10, 1, 4, 4), np.uint8), None, "here")
    generator = rng()
    often = np.mean([with_far(unknown, 0.3, "noise", generator)[1] for _ in range(500)], axis=0)
    assert np.abs(often - 0.3).max() < 0.1  # 5 standard deviations
    for share, count in ((0, 0), (1, 10)):
        dirty, far = with_far(unknown, share, "noise", generator)
        assert far.sum() == count and dirty.labels is None


def test_textures_are_smooth_and_noise_is_not():
    pool = plain(1100, (1, 32, 32))
    jumps = {}
    for kind in ("textures", "noise"):
        x = with_far(pool, 1, kind, rng())[0].x.astype(float)
        jumps[kind] = (np.abs(np.diff(x, axis=3)).mean((1, 2, 3)) / x.std((1, 2, 3))).mean()
    assert jumps["textures"] < 0.9 < jumps["noise"]


def test_a_memory_map_is_not_written_to(tmp_path):
    path = npz(tmp_path / "a.npz", x=RGB)
    dirty, far = with_far(load("files", (3, 8, 8), path), 0.5, "noise", rng())
    assert far.sum() == 3 and not np.array_equal(dirty.x, RGB) and np.array_equal(load("files", (3, 8, 8), path).x, RGB)


# Wrong teachers


@pytest.mark.parametrize("kind", ["random", "hardest"])
@pytest.mark.parametrize("rate", [0, 0.1, 0.3, 1])
def test_the_rate_is_exact_and_a_wrong_answer_keeps_its_values(kind, rate):
    logits = RNG.normal(size=(200, 5)).astype(np.float32)
    before = logits.copy()
    answers, wrong = wrong_teacher(logits, rate, kind, rng())
    assert wrong.sum() == round(200 * rate) and answers.dtype == np.float32 and np.array_equal(logits, before)
    assert np.array_equal(answers.argmax(1) != logits.argmax(1), wrong)
    assert np.array_equal(np.sort(answers, 1), np.sort(logits, 1)) and np.array_equal(answers[~wrong], logits[~wrong])
    assert ((answers != logits).sum(1)[wrong] == 2).all()


def test_random_errors_are_uniform_over_points_and_classes():
    labels = np.eye(4)[np.zeros(4000, int)]
    answers, wrong = wrong_teacher(labels, 0.5, "random", rng())
    assert np.bincount(answers[wrong].argmax(1), minlength=4).tolist() == pytest.approx([0, 667, 667, 667], abs=110)
    assert abs(wrong[:2000].mean() - 0.5) < 0.06


def test_hardest_errors_lie_on_the_smallest_margins():
    soft = np.array([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.9, 0.1, 0.0], [0.34, 0.33, 0.33]])
    assert wrong_teacher(soft, 0.5, "hardest", rng())[1].tolist() == [False, True, False, True]
    own = np.array([0.0, 0.9, 0.1, 0.8])
    assert wrong_teacher(soft, 0.5, "hardest", rng(), margin=own)[1].tolist() == [True, False, True, False]


def test_ties_of_margins_are_drawn():
    labels = np.eye(3)[np.arange(30) % 3]
    margin = np.repeat([0.1, 0.5], [20, 10])
    masks = [wrong_teacher(labels, 0.3, "hardest", np.random.default_rng(s), margin=margin)[1] for s in range(40)]
    often = np.mean(masks, axis=0)
    assert often[:20].min() > 0.1 and often[:20].max() < 0.8 and often[20:].max() == 0
    with pytest.raises(ConfigError, match="tell hard points"):
        wrong_teacher(labels, 0.3, "hardest", rng())


def test_a_shared_first_place_changes_hands():
    votes = np.array([[0.5, 0.5, 0.0]] * 50)
    answers, wrong = wrong_teacher(votes, 1, "random", rng())
    assert wrong.all() and (answers.argmax(1) != 0).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rate": 1.1}, r"rate: expected a share in \[0, 1\]"),
        ({"rate": float("nan")}, "got nan"),
        ({"kind": "worst"}, "expected one of random, hardest"),
        ({"answers": np.zeros(5)}, r"shape \(5,\)"),
        ({"answers": np.zeros((5, 1))}, "K >= 2"),
        ({"answers": np.array([[0, np.nan]])}, "finite"),
        ({"answers": np.array([[0.0, 1], [1, 1]])}, "equal values in row 1"),
        ({"margin": np.zeros(3)}, "expected 5 finite values"),
        ({"margin": np.array([0, 1, np.inf, 2, 3])}, "finite"),
    ],
)
def test_wrong_teacher_refuses(change, match):
    arguments = {"answers": np.eye(5), "rate": 0.5, "kind": "hardest", "rng": rng(), "margin": np.arange(5.0)}
    with pytest.raises(ConfigError, match=match):
        wrong_teacher(**{**arguments, **change})


@pytest.mark.parametrize(("share", "kind", "match"), [(-0.1, "noise", "share"), (0.5, "cats", "textures, letters")])
def test_with_far_refuses(share, kind, match):
    with pytest.raises(ConfigError, match=match):
        with_far(plain(), share, kind, rng())


# In a federation


RAD = {"name": "rad", "questions": 5}


def federation(**data: object) -> Federation:
    asked = {"name": "digits", "test": 100, "public": 60, "labelled": 20, "pool": "glyphs", **data}
    return build(Config.from_raw({"seed": 3, "data": asked, "federation": {"clients": 3}, "method": RAD}))


def test_public_images_come_from_the_pool_and_the_data_keep_theirs():
    from_pool, own = federation(), federation(pool=None, public=60)
    assert from_pool.public_x.shape == own.public_x.shape == (60, 1, 8, 8)
    known = {tuple(x.flatten().tolist()) for x in own.test_x} | {tuple(x.flatten().tolist()) for x in own.public_x}
    assert not any(tuple(x.flatten().tolist()) in known for x in from_pool.public_x)
    held = [sum(len(part) for part in one.split.train) for one in (from_pool, own)]
    assert held[0] > held[1] and len(from_pool.labelled[0]) == 20
    assert all(0 <= int(label) < 10 for label in from_pool.labelled[1])
    drawn = pools.load("glyphs", (1, 8, 8), None, 60, 3).x
    assert sorted(float(x.sum()) for x in from_pool.public_x) == pytest.approx(sorted(drawn.sum((1, 2, 3)) / 255))


def test_far_images_take_their_share_and_the_same_seed_gives_the_same_pool():
    plain, far, again = federation(), federation(far=0.5, far_kind="noise"), federation(far=0.5, far_kind="noise")
    assert torch.equal(far.public_x, again.public_x)
    kept = {tuple(x.flatten().tolist()) for x in plain.public_x}
    assert sum(tuple(x.flatten().tolist()) in kept for x in far.public_x) == 30


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"pool": None, "far": 0.5}, r"data\.far: are about a pool"),
        ({"pool": "files"}, r"data\.pool_path: goes with data\.pool='files'"),
        ({"pool_path": "x"}, r"data\.pool_path: goes with"),
        ({"pool": "files", "pool_path": "/nowhere"}, r"data\.pool='files', data\.public=60: .*nowhere"),
        ({"pool": "imagenet32"}, r"set FEDKD_DATA"),
    ],
)
def test_a_pool_that_is_not_there_or_not_meant_is_named(wrong, said):
    with pytest.raises(ConfigError, match=said):
        federation(**wrong)
