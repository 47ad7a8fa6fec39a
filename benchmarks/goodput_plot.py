"""Draws goodput over request rates: ``python benchmarks/goodput_plot.py OUT.png FILE.json ...`` of gpu_serving.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def main() -> None:
    out, *files = sys.argv[1:]
    figure = Figure(figsize=(13, 5), dpi=120, layout="constrained")
    good, wide, gaps = figure.subplots(1, 3)
    most = 0.0
    for file in files:
        run = json.loads(Path(file).read_text())
        rates = [point["rate"] for point in run["curve"]]
        most = max(most, *rates)
        good.plot(rates, [point["good"] for point in run["curve"]], marker="o", label=run["name"])
        wide.plot(rates, [point["good_50ms"] for point in run["curve"]], marker="o", label=run["name"])
        gaps.plot(rates, [point["itl_p99"] for point in run["curve"]], marker="o", label=run["name"])
    for axes, bound in ((good, 25), (wide, 50)):
        axes.plot([0, most], [0, most], color="grey", linestyle=":", label="all requests")
        axes.set_ylabel(f"requests/s with TTFT <= 0.5 s and 99% of gaps <= {bound} ms")
    gaps.set_ylabel("p99 of gaps between tokens, ms")
    for axes in (good, wide, gaps):
        axes.set_xlabel("requests/s sent (2,048 tokens in, 128 out)")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_png(out)


if __name__ == "__main__":
    main()
