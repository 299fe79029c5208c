"""The report's figures: inline SVG in the page's own colours, the same bytes for the same numbers.

matplotlib draws with the palette below and every colour is then replaced by the page's variable of that name,
so one figure serves light, dark and print. Names of sites stand in the HTML key beside a figure, never in
it: the page's fonts know every script, matplotlib's do not.

References:
    Okabe, Ito, "Color Universal Design", 2008: the palette, safe for the colour-blind.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from server.markup import Markup, tag
from shared.metrics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = {
    "blue": "#0072b2",
    "vermillion": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "orange": "#e69f00",
    "ink": "#1a1d21",
    "muted": "#5c6570",
    "rule": "#d9dee3",
}
SERIES = ("blue", "vermillion", "green", "purple", "orange")
DASHES = ("solid", "dashed", "dotted")
POINTS = "points"
_SIZE_IN = (4.6, 3.1)
_MOST_MARKERS = 40
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedward",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": PALETTE["ink"],
    "axes.labelcolor": PALETTE["ink"],
    "axes.edgecolor": PALETTE["muted"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALETTE["rule"],
    "grid.linewidth": 0.7,
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "xtick.labelcolor": PALETTE["ink"],
    "ytick.labelcolor": PALETTE["ink"],
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Line:
    """One series; a missing value (``None`` or NaN) leaves a gap.

    Attributes:
        label: What the key calls it.
        x: Abscissae.
        y: Ordinates.
        colour: A name in ``PALETTE``.
        dash: One of ``DASHES``, or ``POINTS`` for markers alone.
        band: Lower and upper ordinates of an interval around it.
    """

    label: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    colour: str
    dash: str = "solid"
    band: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True)
class Plot:
    """A drawn figure and the lines that its key explains."""

    svg: Markup
    lines: tuple[Line, ...]


def convergence(
    metric: str, rounds: Sequence[int], values: Sequence[Estimate], references: Mapping[str, float]
) -> Plot:
    """Draw the held-out metric by round with the baselines as level lines."""
    low, high = [value.low for value in values], [value.high for value in values]
    label, band = ("This model", None) if np.isnan(low).all() else ("This model, 95% interval", (low, high))
    ours = Line(label, rounds, [value.value for value in values], "blue", band=band)
    ends = [rounds[0], max(rounds[-1], rounds[0] + 1)]
    looks = zip(SERIES[1:], ("dashed", "dotted", "dashed", "dotted"), strict=True)
    lines = [
        Line(label, ends, [level] * 2, colour, dash)
        for (label, level), (colour, dash) in zip(references.items(), looks, strict=False)
    ]
    said = f"{metric} by round: from {ours.y[0]:.3f} at round {rounds[0]} to {ours.y[-1]:.3f} at round {rounds[-1]}."
    return _chart("convergence", said, [ours, *lines], "Round", f"Held-out {metric}")


def roc(curve: Mapping[str, Any], operating_point: tuple[float, float] | None) -> Plot:
    """Draw the receiver operating characteristic and where the decision threshold lies on it."""
    lines = [
        Line("This model", curve["fpr"], curve["tpr"], "blue"),
        Line("Chance", [0, 1], [0, 1], "muted", "dashed"),
    ]
    said = "ROC curve: sensitivity against false positive rate."
    if operating_point:
        x, y = operating_point
        lines.insert(1, Line("Decision threshold", [x], [y], "vermillion", POINTS))
        said += f" At the decision threshold: sensitivity {y:.3f}, false positive rate {x:.3f}."
    return _chart("roc", said, lines, "False positive rate", "Sensitivity", unit_square=True)


def calibration(curve: Mapping[str, Any]) -> Plot:
    """Draw how often what was predicted came true."""
    lines = [
        Line("This model", curve["predicted"], curve["observed"], "blue"),
        Line("Perfect calibration", [0, 1], [0, 1], "muted", "dashed"),
    ]
    said = "Calibration: observed share of positives against predicted probability."
    return _chart("calibration", said, lines, "Predicted probability", "Observed share", unit_square=True)


def epsilon_by_round(rounds: Sequence[int], curves: Mapping[str, Sequence[float]], agreed: float) -> Plot:
    """Draw what was spent by each round, one curve for all hospitals that spent the same."""
    lines = [
        Line(names, rounds, values, SERIES[i % len(SERIES)], DASHES[i % len(DASHES)])
        for i, (names, values) in enumerate(curves.items())
    ]
    bound = Line("Agreed for the whole plan", [rounds[0], rounds[-1]], [agreed] * 2, "muted", "dashed")
    most = max(values[-1] for values in curves.values())
    said = f"Epsilon spent by round, up to {most:.2f} at round {rounds[-1]}; {agreed:.2f} was agreed."
    return _chart("epsilon", said, [*lines, bound], "Round", "Epsilon spent", from_zero=True)


def seconds_by_round(rounds: Sequence[int], seconds: Sequence[float], incomplete: Mapping[int, float]) -> Plot:
    """Draw how long each round took and which rounds lacked a reply."""
    lines = [Line("Seconds", rounds, seconds, "blue")]
    if incomplete:
        lines.append(Line("A reply was missing", list(incomplete), list(incomplete.values()), "vermillion", POINTS))
    said = f"Seconds by round: {min(seconds):.1f} to {max(seconds):.1f}."
    return _chart("seconds", said, lines, "Round", "Seconds", from_zero=True)


def figure(title: str, plot: Plot, caption: str) -> Markup:
    """Return a figure for the page: heading, drawing, key and caption."""
    key = [tag("li", tag("i", class_=f"{line.colour} {line.dash}"), line.label) for line in plot.lines]
    return tag("figure", tag("h3", title), plot.svg, tag("ul", *key, class_="key"), tag("figcaption", caption))


def _chart(
    name: str,
    said: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    unit_square: bool = False,
    from_zero: bool = False,
) -> Plot:
    """Draw lines. ``said`` is read to those who cannot see the figure; ``name`` is unique on the page."""
    import matplotlib as mpl  # noqa: PLC0415 - half a second that only a report needs
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE_IN, layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            _draw(axes, line)
        axes.set(xlabel=x_label, ylabel=y_label)
        if unit_square:
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        if from_zero:
            axes.set_ylim(bottom=0)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return Plot(_inline(target.getvalue(), name, said), tuple(lines))


def _draw(axes: "Axes", line: Line) -> None:
    x, y = np.array(line.x, float), np.array(line.y, float)
    colour, points = PALETTE[line.colour], line.dash == POINTS
    marked = points or (line.dash == "solid" and len(x) <= _MOST_MARKERS)
    axes.plot(
        x,
        y,
        color=colour,
        linestyle="none" if points else line.dash,
        linewidth=1.8,
        marker=("D" if points else "o") if marked else "",
        markersize=6 if points else 3.5,
        zorder=3 if points else 2,
    )
    if line.band:
        low, high = (np.array(edge, float) for edge in line.band)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def _inline(text: str, name: str, said: str) -> Markup:
    """Return a figure fit to stand in a page: no prologue, styles or namespaces, identifiers of its own."""
    opening = re.search(r'<svg[^>]*viewBox="([^"]+)"[^>]*>', text)
    if opening is None:
        raise ValueError("matplotlib wrote no SVG")
    body = text[opening.end() : text.rindex("</svg>")]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r"\n\s*", "\n", body).replace("xlink:href", "href")
    for before in (' id="', 'href="#', "url(#"):
        body = body.replace(before, f"{before}{name}-")
    for colour, value in PALETTE.items():
        body = body.replace(value, f"var(--{colour})")
    return tag("svg", Markup(body), viewBox=opening[1], role="img", aria_label=said)
