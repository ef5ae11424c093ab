"""Text in a federation: every method that takes it, the same on every engine, and what text refuses."""

import contextlib

import plays
import pytest
import torch

from clients.app import app
from clients.client import site
from clients.engines.loop import Loop
from clients.engines.pool import Pool
from clients.engines.vectorised import Vectorised
from fedkd.config import Config
from fedkd.errors import ConfigError
from fedkd.federation import build
from fedkd.grid import LocalGrid
from fedkd.knowledge import fingerprint
from fedkd.registry import METHODS, method_class
from strategies.flower import KnowledgeStrategy

ON_TEXT = [name for name in METHODS if method_class(name).text]
MORE = {
    "swing": {"score": "memorisation"},
    "swing_labels": {"score": "regex"},
    "fedmd": {"loss": "kl"},
    "feddf": {"fusion_lr": 1e-4},  # the fusion is Adam's, too
    "fedrep": {"epochs": 2},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return plays.write(tmp_path_factory.mktemp("text"), lines=25)


def configured(path, name: str, **more) -> Config:
    method = {"optimizer": "sgd", "lr": 0.1, **MORE.get(name, {})}  # Adam's first steps are signs of rounding errors
    public = {"public": 10} if method_class(name).needs_public else {"reserve": 10}
    return plays.config(path, name, 8, data={**public, **more.pop("data", {})}, method=method, **more)


def finished(config: Config, engine) -> tuple[KnowledgeStrategy, list]:
    here, rounds = site(config.to_json()), []
    strategy = KnowledgeStrategy(here.federation, here.mechanism, rounds.append)
    strategy.start(LocalGrid(engine, 3, {"config": config.to_json()}))
    assert [line.refused for r in rounds for line in r.failures] == []
    return strategy, rounds


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_TEXT)
def test_every_method_on_text_and_stacked_as_in_a_loop(path, name):
    config = configured(path, name, federation={"evaluate_every": 2})
    strategy, rounds = finished(config, Loop(app))
    scored = rounds[-1].accuracy
    vocabulary = len(strategy.federation.dataset.text.vocabulary)
    assert 1 < scored.personal_perplexity < vocabulary and 1 < scored.balanced_perplexity < vocabulary
    assert (scored.global_perplexity is None) == (strategy.method.student(strategy.task, strategy.server) is None)
    stacked, _ = finished(config, Vectorised(app))
    assert stacked.server.keys() == strategy.server.keys()
    for key, value in strategy.server.items():
        torch.testing.assert_close(stacked.server[key], value, rtol=1e-3, atol=2e-4)


@pytest.mark.slow
def test_workers_give_the_loops_answer_to_the_last_bit(path):
    config = configured(path, "swing")
    config = Config.from_raw(config.raw() | {"method": config.raw()["method"] | {"score": "oracle", "recall": 0.5}})
    prints = []
    for engine in (Loop(app), Pool("clients.app:app", workers=2)):
        with contextlib.nullcontext(engine) if isinstance(engine, Loop) else engine:
            strategy, _ = finished(config, engine)
        prints.append(fingerprint(strategy.server))
    assert prints[0] == prints[1]


@pytest.mark.slow
def test_dp_sgd_trains_a_transformer_and_books_it(path):
    privacy = {"mechanism": "ambassador", "epsilon": 20.0, "delta": 1e-3, "steps": 2}
    _, rounds = finished(configured(path, "fedavg", privacy=privacy), Loop(app))
    assert 0 < rounds[-1].epsilon <= 20


def test_each_client_starts_from_weights_of_its_own(path, tmp_path):
    from safetensors.torch import save_file

    config = configured(path, "swing")
    model = build(config).models["transformer"]
    for k in range(3):
        save_file(model.init(k), tmp_path / f"3-{k}.safetensors")
    given = plays.config(path, model={"name": "transformer", "weights": f"{tmp_path}/{{seed}}-{{client}}.safetensors"})
    here = site(given.to_json())
    for k in range(3):
        assert fingerprint(here.personal(k, {})) == fingerprint(model.init(k))
    (tmp_path / "3-1.safetensors").unlink()
    with pytest.raises(ConfigError, match="3-1"):
        build(given)


def test_spans_that_the_user_marked_reach_the_method(tmp_path):
    import json

    rows = []
    for k in range(3):
        text = plays.speech(k, 25)
        rows.append(json.dumps({"client": f"speaker {k}", "text": text, "private": [[0, 30]]}))
    marked = tmp_path / "marked.jsonl"
    marked.write_text("\n".join(rows) + "\n", encoding="utf-8")
    federation = build(plays.config(marked, canaries=0, method={"score": "marks"}))
    scores = torch.cat([federation.notes(k)["scores"].flatten() for k in range(3)])
    assert 0 < float(scores.sum()) <= 3 * 30 and set(scores.unique().tolist()) == {0.0, 1.0}
    with pytest.raises(ConfigError, match="mark nothing as private"):
        build(plays.config(plays.write(tmp_path), canaries=0, method={"score": "marks"}))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"partition": "dirichlet", "alpha": 1.0}}, "which text has none of"),
        ({"data": {"labelled": 5}}, "labelled public images|is about images"),
        ({"model": {"name": "cnn"}}, "transformer"),
        ({"method": {"name": "fedproto"}}, "does not work on text; choose one of local, fedavg"),
        ({"data": {"name": "digits", "path": None, "partition": "iid"}}, "is about text, and digits is images"),
        ({"data": {"vocabulary": "nowhere.json"}}, "nowhere.json"),
    ],
)
def test_what_does_not_fit_text_is_refused(path, sections, said):
    raw = configured(path, "swing").raw()
    for name, fields in sections.items():
        raw[name] = {k: v for k, v in {**raw[name], **fields}.items() if v is not None}
    if "method" in sections:
        raw["method"] = {"name": sections["method"]["name"]}
    with pytest.raises(ConfigError, match=said):
        build(Config.from_raw(raw))


def test_images_refuse_a_model_of_text():
    with pytest.raises(ConfigError, match="transformer"):
        build(Config.from_raw({"data": {"name": "digits"}, "model": {"name": "transformer"}}))
