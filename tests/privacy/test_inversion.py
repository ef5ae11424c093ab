"""Feature inversion: what can be inverted is, what cannot is not, and the private images choose nothing."""

import numpy as np
import pytest
import torch

from fedkd.errors import ConfigError
from privacy.audits.inversion import invert

A, N, SIDE = 120, 60, 6


def images(seed=0, low=0.0, high=1.0):
    """Smooth pictures (A + N, 1, SIDE, SIDE): sums of two waves, so that pixels say something of one another."""
    rng = np.random.default_rng(seed)
    at = np.arange(SIDE)[:, None] / SIDE
    waves = np.cos(2 * np.pi * (at * rng.random((A + N, 1, 1)) + rng.random((A + N, 1, 1))))
    waves = waves * np.cos(2 * np.pi * (at.T * rng.random((A + N, 1, 1)) + rng.random((A + N, 1, 1))))
    return low + (high - low) * ((waves + 1) / 2)[:, None]


def inverted(h, x, seed=0, **more):
    return invert("features", h[:A], x[:A], h[A:], x[A:], np.random.default_rng(seed), **more)


def test_images_as_features_come_back():
    x = images()
    found = inverted(x, x)
    assert found.decoder == "ridge regression" and found.psnr > 60 and found.identified == 1.0
    assert found.leaks and found.candidates == N and found.chance == 1 / N
    assert found.psnr_low <= found.psnr <= found.psnr_high
    np.testing.assert_allclose(found.reconstructions, x[A : A + 8], atol=0.01)
    np.testing.assert_array_equal(found.originals, x[A : A + 8])


def test_random_features_give_the_mean_image_at_the_nominal_rate():
    x, alarms = images(), 0
    for seed in range(8):
        found = inverted(np.random.default_rng(seed).normal(size=(A + N, 30)), x, seed)
        assert abs(found.psnr - found.baseline) < 0.5
        alarms += found.leaks
    assert alarms <= 1  # 2.5 % each


def test_constant_features_give_the_mean_image():
    x = images()
    found = inverted(np.ones((A + N, 5)), x)
    assert found.psnr == pytest.approx(found.baseline, abs=1e-6) and not found.leaks


def test_noise_on_features_lowers_psnr_and_identification():
    x = images()
    noise = np.random.default_rng(1).normal(size=x.shape)
    found = [inverted(x + sigma * noise, x) for sigma in (0.0, 0.05, 0.3, 1.0, 5.0)]
    quality, known = [one.psnr for one in found], [one.identified for one in found]
    assert quality == sorted(quality, reverse=True) and known == sorted(known, reverse=True)
    assert quality[-1] < found[-1].baseline + 2


def test_the_decoder_takes_a_kernel_where_features_are_not_linear():
    x = images()
    bent = np.tanh(4 * (x.reshape(A + N, -1) @ np.random.default_rng(2).normal(size=(SIDE**2, 60))) / SIDE)
    assert inverted(bent, x).decoder == "kernel ridge regression"


def network(seed=0, width=100):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(SIDE**2, width), torch.nn.ReLU())
    return net.requires_grad_(False)


def features(net, x):
    return net(torch.from_numpy(x.astype(np.float32))).numpy()


def test_known_layers_invert_what_no_decoder_does():
    x, net = images(), network()
    h = features(net, x)
    blind, known = inverted(h, x), inverted(h, x, layers=net)
    assert known.psnr > blind.psnr + 15 and known.psnr > 50
    assert "steps of descent" in known.decoder and "steps" not in blind.decoder


def test_descent_is_not_taken_where_it_does_harm():
    x = images()
    net = network()
    h = features(net, x) + 3 * np.random.default_rng(3).normal(size=(A + N, 100))
    blind, known = inverted(h, x), inverted(h, x, layers=net)
    assert known.psnr > blind.psnr - 0.5


def test_the_range_is_that_of_the_auxiliary_images():
    net = network()
    unit, wide = images(), images(low=-1.0, high=3.0)

    def layers(x):
        return net((x + 1) / 4)

    a, b = inverted(features(net, unit), unit, layers=net), inverted(features(net, unit), wide, layers=layers)
    assert a.baseline == pytest.approx(b.baseline) and a.psnr == pytest.approx(b.psnr, abs=3)
    assert b.reconstructions.min() >= -1 and b.reconstructions.max() <= 3


def test_private_images_choose_nothing():
    x, net = images(), network(width=40)
    h = features(net, x)
    one = inverted(h, x, layers=net)
    other = invert("f", h[:A], x[:A], h[A:], x[A:][::-1], np.random.default_rng(0), layers=net)
    assert one.decoder == other.decoder
    np.testing.assert_array_equal(one.reconstructions, other.reconstructions)
    assert other.identified < 0.2


def test_it_says_so_in_a_sentence_and_keeps_pictures_out_of_json():
    x = images()
    found = inverted(x, x, candidates=20, shown=3)
    assert "60 images reconstructed at" in str(found) and "identified among 20 (chance 5 %)" in str(found)
    said = found.to_json()
    assert len(said["each"]) == N and said["leaks"] and not {"originals", "reconstructions"} & said.keys()
    assert found.originals.shape == found.reconstructions.shape == (3, 1, SIDE, SIDE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"aux_h": np.ones((A - 1, 4))}, r"\(a, \*feature\)"),
        ({"h": np.ones((N, 5))}, r"\(a, \*feature\)"),
        ({"x": np.ones((N, 1, 2, 2))}, r"\(a, \*image\)"),
        ({"aux_h": np.ones((9, 4)), "aux_x": np.ones((9, 1, SIDE, SIDE))}, "10 auxiliary images"),
        ({"candidates": 1}, "2 candidates"),
        ({"h": np.full((N, 4), np.nan)}, "should be finite"),
        ({"aux_x": np.ones((A, 1, SIDE, SIDE))}, "all auxiliary pixels are 1"),
        ({"layers": lambda x: x.flatten(1)}, r"layers should give features \(4,\), got \(36,\)"),
    ],
)
def test_bad_input(change, said):
    x = images()
    given = {"aux_h": np.ones((A, 4)), "aux_x": x[:A], "h": np.ones((N, 4)), "x": x[A:], "rng": np.random.default_rng()}
    with pytest.raises(ConfigError, match=said):
        invert("features", **given | change)
