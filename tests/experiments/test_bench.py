"""The bench runs, and says what it measured."""

from __future__ import annotations

import json

import pytest

from experiments.bench.run import choose
from fedkd.errors import ConfigError


@pytest.mark.slow
def test_quick_works_give_samples_ratios_and_a_figure(tmp_path, fedkd):
    done = fedkd(
        "bench", "trivial10", "kd-fedmd", "feddf-server", "--quick", "--no-ray", "--repeats", "2", "-o", tmp_path
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["quick"] is True
    assert [work["name"] for work in results["works"]] == ["trivial10", "kd-fedmd", "feddf-server"]
    for work in results["works"]:
        measured = [one for one in work["contenders"] if one["value"] is not None]
        assert len(measured) >= 2
        for one in measured:
            assert one["value"]["min"] <= one["value"]["median"] <= one["value"]["max"]
            assert one["value"]["min"] > 0
    fedmd = {one["name"]: one for one in results["works"][1]["contenders"]}
    assert fedmd["by hand"]["ratio"]["median"] == pytest.approx(1.0)
    assert "left out: --no-ray" in done.stdout
    assert (tmp_path / "bench.svg").read_text().startswith("<?xml")
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_an_unknown_work_is_refused_with_a_near_one():
    with pytest.raises(ConfigError, match=r"got 'fedmd'; did you mean 'kd-fedmd'\?"):
        choose(["fedmd"])
