"""Secrets in text, audited from end to end: memorised ones are found, others are not, and attacks that adapt."""

import json
import math

import numpy as np
import plays
import pytest
import torch

from experiments import files
from experiments.audit import open_run
from experiments.run import Run
from experiments.secrets import AS_SAID, DIGITS_ONLY, RESCALED, attacks, ranked
from fedkd.data.text_canaries import DIGITS, as_tokens, candidates
from fedkd.losses import cross_entropy

SPACE = 10_000


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return plays.write(tmp_path_factory.mktemp("text"), lines=25)


@pytest.fixture(scope="module")
def memorised(path, tmp_path_factory):
    """A run whose teachers learn their few secrets by heart, and whose students never see an oracle's tokens."""
    out = tmp_path_factory.mktemp("run") / "swing"
    method = {"score": "oracle", "epochs": 25, "hard_label_on_private": "drop", "sigma": 0.0}
    config = plays.config(path, canaries=16, method=method, audit={"repetitions": [20]})
    return out, Run(config, out).go()


@pytest.mark.slow
def test_teachers_know_what_was_planted_and_students_what_reached_them(memorised):
    out, summary = memorised
    auditor = open_run(out)
    canaries = auditor.site.federation.secrets
    said = {(r["target"], r["attack"]): r for r in summary["audit"]["secrets"]}
    assert {target for target, _ in said} == {"home model", "soft targets", "message", "student"}
    assert {attack for _, attack in said} == {AS_SAID, DIGITS_ONLY, RESCALED}
    home, student = said["home model", AS_SAID], said["student", AS_SAID]
    assert home["by_repetition"][0]["extracted"] == canaries.included.sum() == home["n_in"]
    assert home["included_mean"] == pytest.approx(math.log2(SPACE)) and home["p_value"] < 0.01
    assert student["included_mean"] < 4.5 and abs(home["excluded_mean"] - home["chance"]) < 2.5
    heated = said["soft targets", AS_SAID]  # heat keeps the order, and so hides nothing from whoever reads it
    assert heated["by_repetition"][0]["extracted"] == home["n_in"]
    assert summary["audit"]["chance"]["exposure"] == pytest.approx(1.4427, abs=1e-3)
    assert {t["target"] for t in summary["audit"]["targets"] if t["leaves_client"]} == {"message", "student"}


@pytest.mark.slow
def test_a_rank_is_that_of_a_whole_forward_pass_over_every_secret(memorised):
    out, _ = memorised
    auditor = open_run(out)
    federation, canaries = auditor.site.federation, auditor.site.federation.secrets
    vocabulary = federation.dataset.text.vocabulary
    model, params = auditor.model(int(canaries.owner[3]))
    prefix = vocabulary.encode(canaries.prefix[3])[0]
    lines = torch.from_numpy(
        np.concatenate([np.tile(prefix, (SPACE, 1)), as_tokens(vocabulary, candidates(DIGITS, 0), DIGITS)], 1)
    )
    x, y = lines[:, :-1], lines[:, 1:]
    logits = torch.cat([model.apply(params, part)[:, -DIGITS:] for part in x.split(1000)]).detach()
    nats = cross_entropy(logits.flatten(0, 1), y[:, -DIGITS:].flatten()).view(SPACE, DIGITS).sum(1)
    rank = int((nats <= nats[int(canaries.secret[3])] + 1e-4).sum())
    found = next(r for r in ranked(auditor) if (r.target, r.attack) == ("home model", AS_SAID))
    assert abs(int(found.ranks[3]) - rank) <= 1 + rank // 100


@pytest.mark.slow
def test_the_files_say_the_same_and_the_audit_repeats(memorised):
    out, summary = memorised
    auditor = open_run(out)
    assert [r.to_json() for r in auditor.secrets()] == summary["audit"]["secrets"]
    told = json.loads((out / files.SECRETS).read_text())
    assert [row["ranks"] for row in told["ranks"]] == [r.ranks.tolist() for r in auditor.ranked]
    assert len(told["canaries"]) == 16 and {"prefix", "owner", "repetitions", "included"} == set(told["canaries"][0])
    assert summary["accuracy"]["global_perplexity"] > 1


def test_attacks_keep_what_they_should():
    digits = torch.tensor([3, 4, 5])
    levels = [torch.randn((2, 9), generator=torch.Generator().manual_seed(0))]
    made = attacks(levels, digits, 0.5)
    torch.testing.assert_close(made[AS_SAID][0].exp().sum(-1), torch.ones(2))
    torch.testing.assert_close(made[DIGITS_ONLY][0][:, digits].exp().sum(-1), torch.ones(2))
    assert bool(torch.isinf(made[DIGITS_ONLY][0][:, :3]).all())
    torch.testing.assert_close(made[RESCALED][0], (0.5 * levels[0]).log_softmax(-1))


@pytest.mark.slow
def test_a_release_is_audited_as_it_would_leave(path, tmp_path):
    method = {"score": "none", "sigma": 0.0, "epochs": 25}
    config = plays.config(path, "swing_labels", 16, data={"public": 10}, method=method, audit={"repetitions": [20]})
    summary = Run(config, tmp_path / "labels").go()
    said = {(r["target"], r["attack"]): r for r in summary["audit"]["secrets"]}
    assert {target for target, _ in said} == {"home model", "message", "aggregate", "student"}
    assert said["message", AS_SAID]["included_mean"] > 12  # asked about a secret, a teacher gives it away
    assert said["student", AS_SAID]["included_mean"] < 5  # on public text nobody asks
    again = open_run(tmp_path / "labels").secrets()
    assert [r.to_json() for r in again] == summary["audit"]["secrets"]


@pytest.mark.slow
def test_a_space_too_big_to_enumerate_is_sampled_and_extrapolated(path, tmp_path):
    method = {"score": "none", "sigma": 0.0, "epochs": 12}
    audit = {"repetitions": [20], "digits": 6}  # longer lines
    Run(plays.config(path, canaries=8, data={"context": 48}, method=method, audit=audit), tmp_path / "six").go()
    auditor = open_run(tmp_path / "six")
    home = next(r for r in auditor.ranked if (r.target, r.attack) == ("home model", AS_SAID))
    included = auditor.site.federation.secrets.included
    assert home.space == 10_001 and bool((home.ranks[included] <= 3).all())
    if home.extrapolated is not None:  # refused where a prefix's scores are no skew-normal curve
        assert float(home.extrapolated[included].mean()) > 12
        assert home.extrapolated.max() <= math.log2(10**6)
