"""The figures of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pd_serve.bench.transfer.report import LIMIT_NAMES, title
from pd_serve.errors import ConfigError
from pd_serve.values import render_size

_COLOURS = {"nvlink": "#2a7f3f", "nixl": "#2b5fa8", "ucx": "#b5542a"}
_LIMIT_STYLES = {"memcpy": "--", "nixl": ":"}


def require_matplotlib() -> None:
    """Raises ConfigError where it is not installed: before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--png needs matplotlib ({error}): pip install 'pd-serve[bench]'") from error


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes a PNG. Raises ConfigError where it cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    sizes = sorted({case["block_bytes"] for case in result["cases"]})
    lines: dict[tuple[str, bool, int], list[tuple[int, float]]] = {}
    for case in result["cases"]:
        key = (case["lane"], case["scattered"], case["in_flight"])
        lines.setdefault(key, []).append((case["block_bytes"], case["gb_per_s"]))
    most = max((key[2] for key in lines), default=1)
    for (lane, scattered, in_flight), points in lines.items():
        axes.plot(
            *zip(*sorted(points), strict=True),
            color=_COLOURS.get(lane, "black"),
            linestyle="-" if scattered else "--",
            marker="o" if in_flight == 1 else "s",
            alpha=1.0 if in_flight in (1, most) else 0.5,
            label=f"{lane}, {'scattered' if scattered else 'contiguous'}, {in_flight} at once",
        )
    for limit in result["limits"]:
        if limit.get("gb_per_s"):
            axes.axhline(
                limit["gb_per_s"],
                color="grey",
                linestyle=_LIMIT_STYLES[limit["name"]],
                label=f"limit: {LIMIT_NAMES[limit['name']]}",
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [render_size(size) for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block size")
    axes.set_ylabel("GB/s")
    axes.set_title(title(result), fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    try:
        FigureCanvasAgg(figure).print_png(path)
    except OSError as error:
        raise ConfigError(f"--png: cannot write {path}: {error.strerror}") from error
