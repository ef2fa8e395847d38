"""`python -m benchmarks.plot RUN.json RUN.png`, in .venv/bench: medians as bars, from worst to best as lines."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no screen

import matplotlib.pyplot as plt

# In the table and in the JSON, but of little use to the eye.
LEFT_OUT = ("generator", "p99.9 ms")
COLOURS = {"jobstack": "#1f77b4", "plain": "#aaaaaa", "template": "#777777"}


def plot(run: dict[str, Any]) -> Any:
    """One picture a figure, one bar a contender."""
    pictures: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in run["lines"]:
        if line["figure"] not in LEFT_OUT:
            pictures.setdefault((line["measure"], line["figure"]), []).append(line)
    columns = min(3, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, places = plt.subplots(rows, columns, figsize=(5 * columns, 3 * rows), squeeze=False, layout="constrained")
    for place in places.flat:
        place.set_axis_off()
    for place, ((measure, unit), lines) in zip(places.flat, pictures.items(), strict=False):
        place.set_axis_on()
        names = [line["contender"] for line in lines]
        medians = [statistics.median(line["values"]) for line in lines]
        below = [median - min(line["values"]) for median, line in zip(medians, lines, strict=True)]
        above = [max(line["values"]) - median for median, line in zip(medians, lines, strict=True)]
        colours = [COLOURS.get(name.partition(",")[0], "#cccccc") for name in names]
        bars = place.barh(names, medians, xerr=[below, above], color=colours, capsize=3)
        # Behind the longest whisker of all, where nothing crosses them.
        end = max(max(line["values"]) for line in lines)
        for bar, median in zip(bars, medians, strict=True):
            text = f"{median:,.0f}" if median >= 100 else f"{median:.3g}"
            place.text(end * 1.04, bar.get_y() + bar.get_height() / 2, text, va="center", fontsize=9)
        place.set_xlim(0, end * 1.25)
        place.spines[["top", "right"]].set_visible(False)
        place.invert_yaxis()
        place.set_title(f"{measure}: {unit}", fontsize=10)
        place.tick_params(labelsize=8)
    machine = run["machine"]
    figure.suptitle(
        f"{run['rounds']} rounds, {run['date']}, {machine['cores']} cores {machine['cpu']}. "
        "Compare within this picture only.",
        fontsize=9,
    )
    return figure


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text())).savefig(sys.argv[2], dpi=120)
