"""`fedkd privacy`: what it prints, draws and refuses."""

import json
import math

import pytest
from typer.testing import CliRunner

from experiments.cli import app

BASIC = ["--noise", "4", "--steps", "10", "--delta", "1e-5"]


def call(*arguments: str, code: int = 0) -> str:
    found = CliRunner().invoke(app, ["privacy", *arguments])
    assert found.exit_code == code, found.output
    return found.output


def test_epsilon_says_everything_that_it_means():
    text = call("epsilon", "--noise", "1", "--rate", "0.01", "--steps", "1000", "--delta", "1e-5")

    for part in (
        "adding or removing one record",
        "at most 1.829 at delta 1e-05",
        "the server sees every release",
        "Poisson, each unit with probability 0.01",
        "dp-accounting",
        "Renyi: 2.102",
        "Not covered:",
    ):
        assert part in text


def test_sigma_is_what_epsilon_takes_back():
    said = json.loads(call("sigma", "--epsilon", "2", "--steps", "10", "--delta", "1e-5", "--clip", "3", "--json"))
    again = json.loads(
        call("epsilon", "--std", str(said["noise"] * 3), "--clip", "3", "--steps", "10", "--delta", "1e-5", "--json")
    )

    assert said["epsilon"] == pytest.approx(again["epsilon"], rel=1e-6)
    assert 1.999 < said["epsilon"] <= 2
    assert said["accountant"] and said["exclusions"] and said["view"] and said["sampling"]
    line = call("sigma", "--epsilon", "2", "--steps", "10", "--delta", "1e-5", "--clip", "3").splitlines()[0]
    assert float(line.split(": ")[1].split(";")[0]) >= said["noise"]


@pytest.mark.slow
def test_explain_says_what_it_leaves_out_and_what_others_would_say():
    text = call("explain", "--noise", "1", "--rate", "0.2", "--steps", "100", "--delta", "1e-5", "--unit", "client",
                "--view", "outsider", "--n", "100")  # fmt: skip

    for part in ("14.528", "16.082", "28.374", "91.818", "178.170", "not covered", "in words", "view", "assumed"):
        assert part in text


@pytest.mark.parametrize(
    "kind",
    [
        ["laplace"],
        ["counts"],
        ["labels", "--noise", "0.5"],
        ["votes", "--noise", "40"],
        ["confident-votes", "--noise", "40", "--threshold-noise", "150", "--answers", "3"],
        ["gaussian", "--sampling", "fixed", "--rate", "0.1", "--n", "100"],
    ],
    ids=lambda kind: kind[0],
)
def test_every_kind(kind):
    said = json.loads(call("epsilon", *BASIC, "--kind", *kind, "--json"))

    assert 0 < said["epsilon"] < math.inf
    assert said["unit"] == ("label" if kind[0] == "labels" else "record")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noise", "0"], "noise should be positive"),
        (["--delta", "0.02", "--n", "100"], "below 1/100"),
        (["--clip", "0"], "clip should be positive"),
        (["--clip", "inf"], "clip should be positive"),
        (["--rate", "0"], "rate should be in (0, 1]"),
        (["--rate", "1.1"], "rate should be in (0, 1]"),
        (["--rate", "0.1", "--unit", "client"], "the server draws the clients"),
        (["--rate", "0.1", "--sampling", "shuffle"], "not Poisson samples"),
        (["--rate", "0.1", "--sampling", "fixed"], "--n"),
        (["--rate", "0.1", "--sampling", "sorted"], "sampling should be"),
        (["--kind", "magic"], "kind should be"),
        (["--std", "3"], "got both"),
        (["--plot", "x.pdf"], ".png or .svg"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message):
    text = call("epsilon", *BASIC, *arguments, code=2)

    assert message in text
    assert text.count("\n") == 1


def test_a_bad_target_is_refused():
    assert "target_epsilon" in call("sigma", "--epsilon", "0", "--steps", "1", "--delta", "1e-5", code=2)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_figure_is_drawn_twice_alike(tmp_path, ending):
    sampled = ["--rate", "0.1", "--n", "100", "--delta", "1e-3"] if ending == "svg" else []
    drawn = []
    for name in "ab":
        call("epsilon", *BASIC, *sampled, "--plot", str(tmp_path / name / f"figure.{ending}"))
        drawn.append((tmp_path / name / f"figure.{ending}").read_bytes())

    assert drawn[0] == drawn[1]
    if ending == "svg":
        assert b"same noise on the mean" in drawn[0] and b"no amplification" in drawn[0]
