"""Every figure of the report, from plain numbers to an image: matplotlib without a display, equal bytes each time.

Colours are Okabe and Ito's, which the colour-blind tell apart; what a colour says, a shape or a dash says as well, so
that the figures read the same in print.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Any

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"
SKY, YELLOW = "#56B4E9", "#E69F00"
CLOSE = {"points": 5.0, "nats": 0.05}
SITE_TITLES = {"ffn_up": "up_proj", "ffn_down": "down_proj", "attn_v": "v_proj", "attn_o": "o_proj"}


@dataclass
class Image:
    """The same drawing as bytes of a PNG, an SVG and a PDF file; filled once it is drawn."""

    png: bytes = b""
    svg: bytes = b""
    pdf: bytes = b""

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Drawing:
    """A figure: the name of its files, the image, its caption, and whether it takes the whole width."""

    name: str
    image: Image
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Line:
    """A row's recovered gap: `points` are (place of the source, share, standard error); `kind` is method, ceiling or
    control."""

    label: str
    kind: str
    points: list[tuple[int, float, float]]


@dataclass(frozen=True)
class Interval:
    """A difference with its interval: `kind` is model, method or control; `marked` if a test supports it."""

    label: str
    group: str
    kind: str
    value: float
    low: float
    high: float
    marked: bool


def forest(title: str, intervals: Sequence[Interval], unit: str) -> Image:
    """Differences to the target with their intervals, one line each; on the right what lies close to zero.

    Filled markers are differences that a test supports.
    """
    shapes = {"model": ("s", "black"), "control": ("D", ORANGE), "method": ("o", BLUE)}
    groups = [interval.group for interval in intervals]
    # Half a line of space between groups.
    heights = [-i - 0.5 * len(set(groups[: i + 1])) for i in range(len(groups))]
    with _drawn((6.4, 0.9 + 0.26 * (heights[0] - heights[-1] + 1)), 1, 2) as (axes, image):
        for axis in axes:
            axis.axvline(0, color=GREY, linewidth=1)
            axis.grid(axis="x", color="#dddddd", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.set_ylim(heights[-1] - 0.7, heights[0] + 0.7)
            for height, interval in zip(heights, intervals, strict=True):
                shape, colour = shapes[interval.kind]
                fill = colour if interval.marked else "white"
                axis.plot([interval.low, interval.high], [height, height], color=colour, linewidth=1.5)
                axis.plot(interval.value, height, shape, color=colour, markerfacecolor=fill, markersize=5.5)
        whole, close = axes
        whole.set_yticks(heights, [interval.label for interval in intervals])
        close.set_yticks([])
        near = CLOSE[unit]
        close.set_xlim(-near, near)
        close.set_xticks([-near, 0, near])
        whole.set_title(title, fontsize=11)
        close.set_title(f"within {near:g} {unit}", fontsize=9)
        whole.set_xlabel(f"{unit} above the target")
    return image


LOWEST = -0.5  # of the recovered gaps that are drawn; what is lower stands at the edge as an arrow


def ladder(sources: Sequence[str], panels: Mapping[str, Sequence[Line]], *, many: bool = False) -> Image:
    """Recovered gap against source, a panel by its title and a line per row; ceilings are dashed without markers.

    Args:
        many: a legend beside each panel, one below the other; else one for all.
    """
    # Many sources need the whole width, one panel below the other.
    rows, columns = (len(panels), 1) if many or len(sources) > 4 else (1, len(panels))
    ends = [share + 2 * error for lines in panels.values() for one in lines for _, share, error in one.points]
    highest = max(ends, default=0.0)
    with _drawn((9.6, 1.2 + 3.4 * rows), rows, columns) as (axes, image):
        for axis, (name, lines) in zip(axes, panels.items(), strict=True):
            axis.axhline(0, color="black", linewidth=1)
            axis.grid(axis="y", color="#dddddd", linewidth=0.6)
            axis.set_axisbelow(True)
            looks = zip(cycle("os^vDPX*<>hd"), cycle((BLUE, GREEN, PURPLE, SKY, YELLOW, "black")), strict=True)
            controls = zip(cycle("DsX^vo"), cycle(("--", ":", "-.")), strict=True)
            beside = 0.5 / max(1, len(lines))  # so that markers at one height do not hide one another
            for number, line in enumerate(lines):
                places, shares, errors = zip(*line.points, strict=True)
                if line.kind != "ceiling":
                    places = tuple(place + beside * (number - len(lines) / 2) for place in places)
                drawn = [max(share, LOWEST) for share in shares]
                if line.kind == "ceiling":
                    dashes = (6, 3) if max(shares) > 0.99 else (2, 2)
                    axis.plot(places, drawn, dashes=dashes, color=GREY, linewidth=1.5, label=line.label)
                    continue
                if line.kind == "control":
                    marker, dash = next(controls)
                    colour, fill = ORANGE, "white"
                else:
                    (marker, colour), dash = next(looks), "-"
                    fill = colour
                axis.plot(places, drawn, dash, color=colour, linewidth=1.3, zorder=2)
                seen = [i for i, share in enumerate(shares) if share >= LOWEST]
                axis.errorbar(
                    [places[i] for i in seen],
                    [shares[i] for i in seen],
                    [2 * errors[i] for i in seen],
                    fmt=marker,
                    color=colour,
                    markerfacecolor=fill,
                    markersize=6,
                    elinewidth=1,
                    label=line.label,
                    zorder=3,
                )
                low = [places[i] for i, share in enumerate(shares) if share < LOWEST]
                axis.plot(low, [LOWEST + 0.02] * len(low), marker=7, linestyle="", color=colour, markersize=7)
            axis.set_ylim(LOWEST - 0.02, min(1.5, max(1.12, highest + 0.04)))
            axis.set_xlim(-0.4, len(sources) - 0.6)
            axis.set_xticks(range(len(sources)), sources, rotation=20 if len(sources) > 4 else 0, fontsize=8)
            axis.set_title(name, fontsize=10)
            if many:
                axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7.5, frameon=False)
        for axis in axes[::columns]:
            axis.set_ylabel("recovered gap", fontsize=9)
        axes[0].figure.suptitle(
            "Recovered share of the target's own training, by source (mean over tasks, ± 2 standard errors)",
            fontsize=11,
        )
        if not many:
            named: dict[str, Any] = {}
            for axis in axes:
                named |= {name: handle for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
            axes[0].figure.legend(
                list(named.values()), list(named), loc="outside lower center", ncol=4, fontsize=8, frameon=False
            )
    return image


def against(panels: Mapping[str, Mapping[str, tuple[bool, Sequence[tuple[float, float, float]]]]]) -> Image:
    """Recovered gap against a number known beforehand, a panel for each and a marker per source.

    Args:
        panels: by the number's name and the row's label, whether it is a control, and (number, share, standard error).
    """
    with _drawn((2.9 * len(panels) + 0.6, 3.6), 1, len(panels)) as (axes, image):
        for axis, (name, rows) in zip(axes, panels.items(), strict=True):
            axis.axhline(0, color="black", linewidth=1)
            axis.grid(color="#dddddd", linewidth=0.6)
            axis.set_axisbelow(True)
            looks = zip(cycle("os^vDPX*<>hd"), cycle((BLUE, GREEN, PURPLE, SKY, YELLOW, "black")), strict=True)
            for (label, (is_control, points)), (marker, colour) in zip(rows.items(), looks, strict=False):
                numbers, shares, errors = zip(*points, strict=True)
                axis.errorbar(
                    numbers,
                    [max(share, LOWEST) for share in shares],
                    [2 * error for error in errors],
                    fmt=marker,
                    color=ORANGE if is_control else colour,
                    markerfacecolor="white" if is_control else colour,
                    markersize=5,
                    elinewidth=1,
                    label=label,
                )
            axis.set_ylim(LOWEST - 0.02, 1.2)
            axis.set_xlabel(name, fontsize=9)
        for axis in axes[1:]:
            axis.set_yticklabels([])
        axes[0].set_ylabel("recovered gap", fontsize=9)
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc="outside lower center", ncol=4, fontsize=8, frameon=False)
    return image


def losses(title: str, values: Sequence[float], chosen: int) -> Image:
    """Held-out loss against alignment step; `values[0]` is the untouched target's."""
    with _drawn((5.0, 3.2), 1, 1) as ((axis,), image):
        axis.plot(range(len(values)), values, "o-", color=BLUE)
        axis.plot([chosen], [values[chosen]], "s", markersize=10, fillstyle="none", color=ORANGE)
        axis.axhline(values[0], linestyle=":", color=GREY, linewidth=1)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("alignment step")
        axis.set_ylabel("held-out answer loss (nats)")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.ticklabel_format(axis="y", useOffset=False)
    return image


def score_by_step(title: str, scores: Sequence[Sequence[float]], chosen: int, target: float) -> Image:
    """Score after every alignment step, one line per unseen example; the target's score dotted."""
    steps = range(1, len(scores) + 1)
    with _drawn((5.0, 3.2), 1, 1) as ((axis,), image):
        for run, (line, colour) in zip(zip(*scores, strict=True), _styles(), strict=False):
            axis.plot(steps, run, line + "o", color=colour, markersize=4, linewidth=1.2)
        axis.axhline(target, linestyle=":", color="black", linewidth=1.2)
        axis.axvline(chosen, color=GREY, linewidth=6, alpha=0.25)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("alignment step (grey: chosen on held-out examples)")
        axis.set_ylabel("test score (%)")
        axis.xaxis.get_major_locator().set_params(integer=True)
    return image


def cka_maps(title: str, maps: Mapping[str, Sequence[Sequence[float]]], first: str, second: str) -> Image:
    """Similarity of every pair of layers, one map per site; small maps show their numbers."""
    some = next(iter(maps.values()))
    rows, columns = len(some), len(some[0])
    small = rows * columns <= 64
    side = 1.9 if small else 2.6
    with _drawn((4 * side + 1.2, side * min(1.5, max(0.7, rows / columns)) + 1.1), 1, len(maps)) as (axes, image):
        for axis, (site, values) in zip(axes, maps.items(), strict=True):
            drawn = axis.imshow(values, vmin=0, vmax=1, cmap="cividis", origin="lower", aspect="auto")
            axis.set_title(SITE_TITLES.get(site, site), fontsize=10)
            axis.set_xlabel(f"layer of {second}", fontsize=8)
            for locator in (axis.xaxis.get_major_locator(), axis.yaxis.get_major_locator()):
                locator.set_params(integer=True)
            if small:
                for y, row in enumerate(values):
                    for x, value in enumerate(row):
                        colour = "white" if value < 0.55 else "black"
                        axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
        axes[0].set_ylabel(f"layer of {first}", fontsize=8)
        axes[0].figure.suptitle(title, fontsize=11)
        axes[0].figure.colorbar(drawn, ax=axes[-1], fraction=0.06, label="linear CKA")
    return image


def similarity_by_layer(title: str, panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Image:
    """Cosine similarity against layer, one panel per site; `panels[site][what]` are values by layer."""
    with _drawn((9.6, 2.9), 1, len(panels)) as (axes, image):
        for axis, (site, lines) in zip(axes, panels.items(), strict=True):
            for (what, values), (line, colour), marker in zip(lines.items(), _styles(), "os^Dvx", strict=False):
                axis.plot(range(len(values)), values, line + marker, color=colour, label=what, markersize=4.5)
            axis.axhline(0, color=GREY, linewidth=0.8)
            axis.set_ylim(-1.05, 1.05)
            axis.set_title(SITE_TITLES.get(site, site), fontsize=10)
            axis.set_xlabel("layer")
            axis.xaxis.get_major_locator().set_params(integer=True)
        axes[0].set_ylabel("cosine similarity")
        axes[0].figure.suptitle(title, fontsize=11)
        handles, names = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, names, loc="outside lower center", ncol=3, fontsize=8, frameon=False)
    return image


def delta_histogram(title: str, edges: Sequence[float], counts: Sequence[int], within: float, beyond: float) -> Image:
    """Share of a delta's entries by their signed size on logarithmic axes, with the paper's two marks."""
    middle = len(edges) // 2
    smallest = edges[middle]
    total = sum(counts)
    with _drawn((5.0, 3.0), 1, 1) as ((axis,), image):
        shares = [100 * count / total for count in counts[1:-1]]
        axis.stairs(shares, edges, fill=True, color=BLUE, alpha=0.85)
        axis.set_xscale("symlog", linthresh=smallest, linscale=0.3)
        for size, line in ((within, "--"), (beyond, ":")):
            for sign in (-1, 1):
                axis.axvline(sign * size, linestyle=line, color=ORANGE, linewidth=1.2)
        axis.set_xticks([sign * 10.0**power for sign in (-1, 1) for power in (-7, -5, -3, -1)] + [0])
        axis.tick_params(labelsize=7)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(f"entry of the delta (dashed ±{within}, dotted ±{beyond})", fontsize=9)
        axis.set_ylabel("entries per bin (%)", fontsize=9)
    return image


def _styles() -> Iterator[tuple[str, str]]:
    yield from (("-", BLUE), ("--", ORANGE), (":", GREEN), ("-.", PURPLE), ("-", GREY), ("--", "black"))


@contextmanager
def _drawn(size: tuple[float, float], rows: int, columns: int) -> Iterator[tuple[list[Any], Image]]:
    """Axes to draw on in a figure of `size` inches, row by row; afterwards the image holds them."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure, image = Figure(figsize=size, dpi=180, layout="constrained"), Image()
    axes = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axis in axes:
        axis.tick_params(labelsize=9)
    yield axes, image
    png, svg, pdf = io.BytesIO(), io.BytesIO(), io.BytesIO()
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    figure.set_layout_engine("none")  # it is laid out: the other formats have the same places, at no further cost
    # Neither dates nor random names, so that equal figures are equal bytes; text that a PDF's reader can select.
    with matplotlib.rc_context({"svg.hashsalt": "", "pdf.fonttype": 42}):
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
        FigureCanvasPdf(figure).print_pdf(pdf, metadata={"Creator": None, "Producer": None, "CreationDate": None})
    image.png, image.svg, image.pdf = png.getvalue(), svg.getvalue(), pdf.getvalue()
