"""Read finished runs and group them into conditions: runs that differ in nothing but the seed."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments import files
from experiments.report.values import number
from experiments.sweep import SWEEP, read_plan
from fedkd.errors import ConfigError
from fedkd.overrides import Raw, override

LOCAL = "local"
_NUMBER = re.compile(r"[-_. ]*(seed)?[-_. ]*\d+$")


@dataclass(frozen=True)
class Metric:
    """One number that a run is judged by.

    Attributes:
        unit: Of a value; "fraction" is shown with three decimals, "bytes" in decimal units.
        better: 1 where more is better, -1 where less is.
        pick: Finds it in ``summary.json``; None where the run has none.
        by_round: Whether it finds it in a line of ``metrics.jsonl``, too.
    """

    name: str
    title: str
    unit: str
    better: int
    pick: Callable[[Mapping[str, Any]], Any]
    by_round: bool = False


def _scored(name: str, title: str, key: str, better: int = 1) -> Metric:
    """One of the numbers of `fedkd.metrics.Accuracy`."""
    return Metric(name, title, "fraction", better, lambda said: (said.get("accuracy") or {}).get(key), by_round=True)


def _perplexity(name: str, title: str, key: str) -> Metric:
    """As `_scored`, of text."""
    return Metric(name, title, "perplexity", -1, lambda said: (said.get("accuracy") or {}).get(key), by_round=True)


def _audit(key: str) -> Callable[[Mapping[str, Any]], Any]:
    """The audit's headline, where its target leaves a client at all."""

    def pick(summary: Mapping[str, Any]) -> Any:
        audit = summary.get("audit") or {}
        leaves = {target["target"]: target["leaves_client"] for target in audit.get("targets", [])}
        return audit.get(key) if leaves.get(audit.get("target")) else None

    return pick


METRICS = {
    metric.name: metric
    for metric in (
        _scored("balanced", "Balanced accuracy", "balanced_mean"),
        _scored("personal", "Personal accuracy", "personal_mean"),
        _scored("personal_std", "Spread over clients (s.d.)", "personal_std", -1),
        _scored("worst10", "Worst 10 % of clients", "personal_worst10"),
        _scored("personal_ece", "Calibration error (ECE)", "personal_ece", -1),
        _scored("global", "Server's model", "global"),
        _scored("global_ece", "Server's calibration error", "global_ece", -1),
        _perplexity("perplexity", "Server's perplexity", "global_perplexity"),
        _perplexity("personal_perplexity", "Personal perplexity", "personal_perplexity"),
        Metric("up", "Bytes up", "bytes", -1, lambda s: (s.get("bytes") or {}).get("up")),
        Metric("down", "Bytes down", "bytes", -1, lambda s: (s.get("bytes") or {}).get("down")),
        Metric("epsilon", "Privacy spent (ε)", "ε", -1, lambda s: (s.get("privacy") or {}).get("epsilon")),
        Metric("auroc", "Audit: worst leak (AUROC)", "AUROC", -1, _audit("auroc")),
        Metric("exposure", "Audit: exposure", "bits", -1, _audit("exposure_mean")),
        Metric("seconds", "Time (wall clock)", "s", -1, lambda s: s.get("seconds")),
    )
}


@dataclass(frozen=True)
class Result:
    """One finished run."""

    label: str
    seed: int
    config: Raw
    summary: Mapping[str, Any]
    place: Path

    def value(self, metric: Metric) -> float | None:
        """One of the run's numbers; an infinite epsilon is infinite."""
        return number(metric.pick(self.summary))

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The run's rounds, as in ``metrics.jsonl``."""
        return files.read_lines(self.place / files.METRICS)


@dataclass(frozen=True)
class Condition:
    """Runs that differ in nothing but the seed, by seed."""

    label: str
    config: Raw
    runs: Mapping[int, Result] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return sorted(self.runs)

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.config.get("method", {}).get("name", ""))

    def values(self, metric: Metric) -> dict[int, float]:
        """The runs' values, by seed; runs without one are left out."""
        found = {seed: self.runs[seed].value(metric) for seed in self.seeds}
        return {seed: value for seed, value in found.items() if value is not None}


def read(directories: Sequence[Path], where: Sequence[str] = ()) -> tuple[list[Condition], list[str]]:
    """Read sweeps and runs.

    Args:
        directories: Each one a sweep's or a run's.
        where: ``key=value``: only runs whose configuration says so.

    Returns:
        The conditions, in the order of the directories, and a note on what is unfinished.

    Raises:
        ConfigError: A directory is neither, a file is damaged, or a seed of a condition has two different results.
    """
    unfinished: list[str] = []
    grouped: dict[tuple[str, str], dict[int, Result]] = {}
    for directory in directories:
        sweep = (directory / SWEEP).exists()
        for result in _sweep(directory, unfinished) if sweep else [_run(directory, directory.resolve().name)]:
            if all(_holds(result.config, text) for text in where):
                _add(grouped.setdefault(_group(result, sweep), {}), result)
    if not grouped:
        suffix = " that --where lets through" if where else ""
        raise ConfigError(f"compare: no finished run{suffix} in {', '.join(map(str, directories))}")
    named = zip(_labels(list(grouped.values())), grouped.values(), strict=True)
    conditions = [Condition(label, _without_seed(next(iter(runs.values())).config), runs) for label, runs in named]
    return conditions, unfinished


def _sweep(directory: Path, unfinished: list[str]) -> Iterator[Result]:
    """The finished runs of a sweep."""
    plan: Any = read_plan(directory)
    for cell in plan["cells"]:
        for seed, name in cell["config_hash"].items():
            place = directory / cell["label"] / f"seed-{seed}"
            if not (place / files.SUMMARY).exists():
                unfinished.append(f"{cell['label']} seed {seed}")
                continue
            result = _run(place, cell["label"])
            if result.summary.get("config_hash") != name:
                raise ConfigError(f"{place}: is not the run that {SWEEP} names ({name})")
            yield result


def _run(place: Path, label: str) -> Result:
    try:
        text = (place / files.CONFIG).read_text(encoding="utf-8")
        summary, config = json.loads((place / files.SUMMARY).read_text(encoding="utf-8")), tomllib.loads(text)
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise ConfigError(f"{place}: no {missing} here; expected a sweep or a finished run") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{place}: cannot be read ({error})") from None
    if not isinstance(summary, dict) or text.partition("\n")[0] != f"# config hash {summary.get('config_hash')}":
        raise ConfigError(f"{place}: {files.SUMMARY} and {files.CONFIG} are not of one run")
    return Result(label, int(config["seed"]), config, summary, place)


def _without_seed(config: Raw) -> Raw:
    return {key: value for key, value in config.items() if key not in ("seed", "compare")}


def _group(result: Result, sweep: bool) -> tuple[str, str]:
    """What two runs of one condition share. In a sweep the label says which engine; it decides no results."""
    config = _without_seed(result.config)
    if sweep:
        config.pop("engine", None)
    return (result.label if sweep else ""), hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _add(runs: dict[int, Result], result: Result) -> None:
    other = runs.setdefault(result.seed, result)
    if other.summary.get("state_hash") != result.summary.get("state_hash"):
        raise ConfigError(f"compare: {other.place} and {result.place} are the same run with different results")


def _labels(groups: list[dict[int, Result]]) -> list[str]:
    """A label for each condition: the sweep's, or what the folders of its runs have in common."""
    labels = []
    for runs in groups:
        names = sorted({result.label for result in runs.values()})
        stems = {_NUMBER.sub("", name) for name in names}
        labels.append(stems.pop() if len(names) > len(stems) == 1 else names[0])
        if not _NUMBER.sub("", labels[-1]):  # folders called seed-0, seed-1
            labels[-1] = next(iter(runs.values())).place.resolve().parent.name
    uses = Counter(labels)
    seen: Counter[str] = Counter()
    for i, label in enumerate(labels):
        seen[label] += 1
        labels[i] = f"{label} ({seen[label]})" if uses[label] > 1 else label
    return labels


def _holds(config: Raw, text: str) -> bool:
    """Whether a configuration says ``key=value``."""
    key, sep, _ = text.partition("=")
    if not sep:
        raise ConfigError(f"--where: expected key=value, such as data.alpha=0.3, got '{text}'")
    wanted = find(override({}, [text])[0], key.strip())
    return bool(find(config, key.strip()) == wanted)


def find(config: Raw, key: str) -> Any:
    """The value at a dotted key, or None."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def ground(config: Raw) -> Raw:
    """What has to be equal for clients to hold the same records and canaries, by key."""
    data = dict(config.get("data", {}))
    if data.get("pool") is not None:
        data.pop("public", 0)  # not of these data
    for name in ("pool", "pool_path", "far", "far_kind"):
        data.pop(name, None)
    held = sum(data.pop(name, 0) for name in ("public", "labelled", "reserve"))
    found = {f"data.{key}": value for key, value in data.items()} | {"data.public + labelled + reserve": held}
    return found | {key: find(config, key) for key in ("federation.clients", "audit.canaries")}


def check_pairs(conditions: Sequence[Condition]) -> None:
    """See that runs of equal seed share partition and canaries.

    Raises:
        ConfigError: Two conditions do not.
    """
    first = conditions[0]
    for other in conditions[1:]:
        one, two = ground(first.config), ground(other.config)
        for key in sorted({*one, *two}):
            if one.get(key) != two.get(key):
                hint = f"; choose with --where {key}=..." if " " not in key else ""
                raise ConfigError(
                    f"compare: '{first.label}' and '{other.label}' cannot be paired, their clients differ: "
                    f"{key} is {one.get(key)} and {two.get(key)}{hint}"
                )


def by_seed(directory: Path, metrics: Sequence[str]) -> dict[str, Any]:
    """A sweep's finished runs for a results file: by condition the metrics and the state hash of every seed."""
    return {
        condition.label: {
            "values": {
                name: {str(seed): round(value, 4) for seed, value in condition.values(METRICS[name]).items()}
                for name in metrics
            },
            "state_hash": {str(k): str(run.summary["state_hash"])[:16] for k, run in condition.runs.items()},
        }
        for condition in read([directory])[0]
    }
