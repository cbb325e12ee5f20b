"""Every figure this code draws, from logs and metrics that are on disk. Readable in black and white.

    draw(folder, scores, experts)      # of one run: losses, truth ratios, and of a MoE's experts share and affinity
    draw_kinds(kinds, folder)          # of kinds of runs: leak.png and kept.png of results/
    draw_paths(paths, folder)          # of several, with --score-every-epoch: what unlearning does along the way
"""

import json
import re
import statistics
from pathlib import Path

from metrics.tofu import RowScores

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:  # runs go without figures then, and say so
    plt = None  # type: ignore[assignment]

STYLES = [("0.0", "-"), ("0.6", "-"), ("0.0", "--"), ("0.6", "--"), ("0.0", ":"), ("0.6", ":")]


def draw(folder: Path, scores: dict[str, dict[str, RowScores]], experts: dict[str, dict] | None) -> None:
    """figures/*.png: losses along training, truth ratios, and for a MoE what forget tokens engage. No colour needed.

    experts: "share" (of forget tokens) and "affinity" (UOE, equation 2), each {"target": (L, E), "unlearned": (L, E)}.
    """
    if plt is None:
        print("no figures: pip install matplotlib")
        return
    (folder / "figures").mkdir(exist_ok=True)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    if log:
        figure, axis = plt.subplots(figsize=(6, 3.5))
        for (key, label), (shade, line) in zip((("forget", "forget loss"), ("ce", "cross entropy"),
                                                ("retain", "retain loss"), ("anchor", "anchor loss")), STYLES,
                                               strict=False):
            if key in log[0]:
                axis.plot([e["step"] for e in log], [e[key] for e in log], linestyle=line, color=shade, label=label)
        axis.set(xlabel="step", ylabel="loss (nats, anchor: squared distance)")
        axis.legend(frameon=False)
        write(figure, folder / "figures" / "training.png")
    ratios = {role: sorted(of["forget"].truth_ratios()) for role, of in scores.items()}
    if all(ratios.values()):
        figure, axis = plt.subplots(figsize=(6, 3.5))
        for (role, values), (shade, line) in zip(ratios.items(), STYLES * 3, strict=False):
            share = [(i + 1) / len(values) for i in range(len(values))]
            axis.step(values, share, linestyle=line, color=shade, label=role, where="post")
        axis.set(xlabel="truth ratio on the forget set (wrong over right)", ylabel="share of rows below", xscale="log")
        axis.axvline(1, color="0.85", zorder=0)
        axis.legend(frameon=False)
        write(figure, folder / "figures" / "truth_ratio.png")
    for what, of in (experts or {}).items():
        layers = len(of["target"])
        figure, axes = plt.subplots(1, layers, figsize=(3 * layers, 2.8), sharey=True, squeeze=False)
        for layer, axis in enumerate(axes[0]):
            order = sorted(range(len(of["target"][layer])), key=lambda e: -of["target"][layer][e])
            axis.bar(range(len(order)), [of["target"][layer][e] for e in order], color="0.75", label="target")
            axis.plot(range(len(order)), [of["unlearned"][layer][e] for e in order], "k_", label="unlearned")
            axis.set(title=f"layer {layer}", xlabel="expert")
            axis.set_xticks(range(len(order)), [str(e) for e in order], fontsize=6)
        axes[0][0].set_ylabel({"share": "share of forget tokens", "affinity": "affinity of the forget set"}[what])
        axes[0][-1].legend(frameon=False)
        write(figure, folder / "figures" / f"expert_{what}.png")


def write(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_kinds(kinds: dict[str, list[dict]], folder: Path) -> list[Path]:
    """Of runs by kind, each its metrics.json: leak.png and kept.png. Returns the files.

    leak.png: share of facts that eight samples say, against the temperature; target, methods, reference.
    kept.png: what is kept against what is still said, a mark per method, bars from the worst to the best run. The
    target, at (1, 1), is left out: beside it all others would be one blot.
    """
    if plt is None:
        print("no figures: pip install matplotlib")
        return []
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    figure, axis = plt.subplots(figsize=(6, 3.6))
    first = next(iter(kinds.values()))
    lines = {"target": (first, "target"), **{kind: (runs, "unlearned") for kind, runs in kinds.items()},
             "reference": (first, "reference")}
    for (label, (runs, role)), (shade, line), mark in zip(lines.items(), STYLES * 3, "os^vDPX*" * 3, strict=False):
        sets = [run[role].get("forget", {}) for run in runs if role in run]
        rates = [key for key in (sets[0] if sets else {}) if re.fullmatch(r"leak_T[\d.]+", key)
                 and None not in [of.get(key) for of in sets]]
        if rates:
            means = [sum(of[key] for of in sets) / len(sets) for key in rates]
            axis.plot([float(key.removeprefix("leak_T")) for key in rates], means, linestyle=line, color=shade,
                      marker=mark, label=label)
    axis.set(xlabel="temperature", ylabel="facts said in 8 samples", ylim=(-0.02, 1.02))
    axis.legend(frameon=False, fontsize=8)
    write(figure, folder / "leak.png")
    written.append(folder / "leak.png")

    figure, axis = plt.subplots(figsize=(6, 3.6))
    del lines["target"]
    for i, (label, (runs, role)) in enumerate(lines.items()):
        points = [(run[role].get("forget", {}).get("value_said"), run[role].get("model_utility"),
                   run["target"].get("model_utility")) for run in runs if role in run]
        if not points or any(said is None or utility is None or not target for said, utility, target in points):
            continue  # it was not measured, or the target knows nothing
        x = [said for said, _, _ in points]
        y = [utility / target for _, utility, target in points]
        middle = (statistics.mean(x), statistics.mean(y))  # never beyond the least or largest, as a rounded sum may be
        axis.errorbar(*middle, xerr=[[middle[0] - min(x)], [max(x) - middle[0]]],
                      yerr=[[middle[1] - min(y)], [max(y) - middle[1]]], fmt="os^DvP<X>*"[i // 2 % 10], color="0.2",
                      markerfacecolor="0.2" if i % 2 else "white", ecolor="0.7", capsize=2, markersize=7, label=label)
    axis.set(xlabel="share of forget facts still said (the reference's is the aim)",
             ylabel="model utility, of the target's")
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    write(figure, folder / "kept.png")
    return [*written, folder / "kept.png"]


def draw_paths(paths: dict[str, list[list[dict]]], folder: Path) -> list[Path]:
    """paths: label -> one path per seed, each a list of path.jsonl's lines. Thin lines: seeds. Returns the files.

    collateral.png: cross entropy on forget and on untouched rows along training (ULD, Figure 3).
    quality.png: utility against forget quality, and that against time (ULD, Figures 4 and 5).
    overlap.png: routing overlap by step (UOE, Figure 3).
    """
    if plt is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    panels = {
        "collateral": [("epoch", "forget loss"), ("epoch", "untouched loss")],
        "quality": [("forget_quality", "model_utility"), ("seconds", "forget_quality")],
        "overlap": [("step", "routing_overlap")],
    }
    written = []
    for name, axes_of in panels.items():
        axes_of = [(x, y) for x, y in axes_of if any(x in row and y in row for ps in paths.values() for p in ps
                                                     for row in p)]
        if not axes_of:
            continue
        figure, axes = plt.subplots(1, len(axes_of), figsize=(4.6 * len(axes_of), 3.6), squeeze=False)
        for (x, y), axis in zip(axes_of, axes[0], strict=True):
            for (label, of), (shade, line) in zip(paths.items(), STYLES * 3, strict=False):
                for i, path in enumerate(of):
                    points = [(row[x], row[y]) for row in path if row.get(x) is not None and row.get(y) is not None]
                    if points:
                        axis.plot(*zip(*points, strict=True), linestyle=line, color=shade, linewidth=1,
                                  label=label if i == 0 else None)
            axis.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "))
            for which, what in (("x", x), ("y", y)):
                if what == "forget_quality" or what.endswith("loss"):
                    getattr(axis, f"set_{which}scale")("log")
        axes[0][0].legend(frameon=False, fontsize=8)
        written.append(folder / f"{name}.png")
        write(figure, written[-1])
    return written
