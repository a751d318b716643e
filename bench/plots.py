"""Plots of the benchmarks' results. The data is the JSON beside each picture."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

SERVING, TRAINING, ALONE = "#2a6f97", "#e09f3e", "#8d99ae"


def plot_coserve(data: dict[str, Any], path: Path) -> None:
    """Left: what each way leaves of serving and of training. Right: inter-token latency second by second."""
    together = [m for m in data["measurements"] if "serving" in m["shares"] and "training" in m["shares"]]
    if not together:
        return
    figure, (bars, lines) = plt.subplots(1, 2, figsize=(12, 0.42 * len(together) + 2.2),
                                         gridspec_kw={"width_ratios": [3, 2]})  # fmt: skip
    labels = [label_of(m) for m in together]
    height = range(len(together))
    bars.barh([y - 0.2 for y in height], [100 * m["shares"]["serving"] for m in together], 0.38, color=SERVING,
              label="serving, output tok/s")  # fmt: skip
    bars.barh([y + 0.2 for y in height], [100 * m["shares"]["training"] for m in together], 0.38, color=TRAINING,
              label="training, tok/s")  # fmt: skip
    bars.axvline(100, color=ALONE, linewidth=1)
    bars.set_yticks(list(height), labels)
    bars.invert_yaxis()
    bars.set_xlabel("% of the same alone, in the same run")
    bars.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)

    budget = next((m for m in data["measurements"] if "itl_budget_ms" in m), None)
    if budget is not None:
        streams = budget["load"]["streams"]
        same = [m for m in data["measurements"] if m.get("load", {}).get("streams") == streams]
        alone = [m for m in same if m["mode"] == "serving alone"]
        alone.sort(key=lambda m: m["part"] != "pace")  # first the one that was measured anew for this part, if it was
        paced = alone[:1] + [m for m in same if m["part"] == "pace" and m["mode"] != "serving alone"]
        styles = iter(("-", "--", ":", "-."))
        for m in paced:
            color = ALONE if m["mode"] == "serving alone" else TRAINING if m is budget else SERVING
            windows = m["load"]["windows"]
            lines.plot([w["t"] for w in windows], [max(w["p50_ms"], w["mean_ms"]) for w in windows], color=color,
                       label=m["mode"], linestyle=next(styles, "-") if color == SERVING else "-")  # fmt: skip
        lines.axhline(budget["itl_budget_ms"], color="black", linewidth=1, linestyle="--", label="budget")
        lines.set_title(f"{streams} streams", fontsize="medium")
        lines.set_ylim(bottom=0)
        lines.set_xlabel("s")
        lines.set_ylabel("inter-token latency of each second, ms (the larger of mean and p50)")
        lines.legend(frameon=False)
    else:
        lines.set_axis_off()
    figure.suptitle(f"{data['model']} on {data['device'].get('gpu') or data['device']['kind']}")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def label_of(measurement: dict[str, Any]) -> str:
    """What a pair of bars is."""
    load = measurement["load"]
    how = f"{load['streams']} streams" if load["streams"] else f"Poisson {load['rate']:.2g}/s"
    prefix = "time-sliced, " if measurement["part"] == "timeslice" else ""
    return f"{prefix}{measurement['mode']}, {how}"
