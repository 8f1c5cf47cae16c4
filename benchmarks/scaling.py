"""Draws how tokens per second grow with batch, context, group and cores, from the JSON files of `jaxengine bench`.

    jaxengine bench --workloads decode --batch 1 4 8 16 32 64 --peer vllm --peer-python PYTHON --json batch.json
    jaxengine bench --workloads decode --batch 1 --prompt-tokens 128 1024 4096 --json context.json
    jaxengine bench --workloads group --groups 4x1 4x4 4x16 --json group.json
    taskset -c 0 jaxengine bench --workloads decode --batch 8 --json core.json
    python benchmarks/scaling.py batch.json context.json group.json core.json --out benchmarks/results/cpu_scaling.svg

A point is the median of the runs of all files that measured it. Needs matplotlib (the extra `notebooks`).
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxengine.command.workloads import RATE

Lines = dict[str, list[tuple[int, float]]]  # (x, median tokens per second) of each system


class Panel(NamedTuple):
    """Results of one kind of workload over the setting `x`; `fixed` are those that a line's points have in common."""

    kind: str
    x: str
    fixed: tuple[str, ...]


PANELS = (
    Panel("decode", "batch", ("prompt_tokens", "threads")),
    Panel("decode", "prompt_tokens", ("batch", "threads")),
    Panel("group", "samples", ("prompts", "threads")),
    Panel("decode", "threads", ("batch", "prompt_tokens")),
)
WORDS = {
    "batch": "sequences",
    "prompt_tokens": "tokens of a prompt",
    "samples": "samples of a prompt",
    "prompts": "prompts",
    "threads": "cores",
}


def measured(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings of each rate, with `threads`, `system` and `rates`: those of all runs of one setting."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        for result in record["results"]:
            if result["figure"] == RATE:
                point = result["settings"] | {"threads": record["machine"]["threads"], "system": result["system"]}
                rates = [rate for rate in result["values"] if rate is not None]
                found.setdefault(json.dumps(point, sort_keys=True), point | {"rates": []})["rates"] += rates
    return [point for point in found.values() if point["rates"]]


def lines(panel: Panel, points: Sequence[dict[str, Any]]) -> tuple[dict[str, int], Lines]:
    """(the fixed settings, the lines) of a panel: of the fixed settings that were measured at most places.

    Raises ValueError if there is no result of the panel's kind.
    """
    by_fixed = defaultdict[tuple[int, ...], list[dict[str, Any]]](list)
    for point in points:
        if point["kind"] == panel.kind:
            by_fixed[tuple(point[name] for name in panel.fixed)].append(point)
    if not by_fixed:
        raise ValueError(f"no file has a result of the workload {panel.kind!r}: run the commands of --help")
    fixed, own = max(by_fixed.items(), key=lambda item: (len({point[panel.x] for point in item[1]}), len(item[1])))
    drawn = defaultdict[str, list[tuple[int, float]]](list)
    for point in own:
        drawn[point["system"]].append((point[panel.x], statistics.median(point["rates"])))
    return dict(zip(panel.fixed, fixed, strict=True)), {system: sorted(line) for system, line in drawn.items()}


def draw(points: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel each, tokens per second from 0 on, so that heights compare."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # the same file from the same figures
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.6), layout="constrained")
    systems = sorted({point["system"] for point in points})
    for axis, panel in zip(axes, PANELS, strict=True):
        fixed, found = lines(panel, points)
        for system, line in found.items():
            axis.plot(*zip(*line, strict=True), marker="o", label=system, color=f"C{systems.index(system)}")
        places = sorted({place for line in found.values() for place, _ in line})
        axis.set_xscale("log", base=2)
        axis.set_xticks(places, places)
        axis.minorticks_off()
        title = ", ".join(f"{WORDS[name]}: {value}" for name, value in fixed.items())
        axis.set(title=f"{panel.kind}\n{title}", xlabel=WORDS[panel.x], ylabel="tokens per second")
        axis.title.set_fontsize(10)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("cpu_scaling.svg"))
    given = parser.parse_args()
    draw(measured([json.loads(file.read_text()) for file in given.files]), given.out)


if __name__ == "__main__":
    main()
