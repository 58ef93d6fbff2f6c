"""Pictures of maps, of change and of scores, in the colours of the legend.

Maps are drawn from class codes and never from means of codes: thin a large one with :func:`thin` first. Every function
draws one figure with Matplotlib's Agg backend, without global state, and writes it atomically. The file's suffix gives the
format.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from ai4land.errors import DataError
from ai4land.grid import Window
from ai4land.legend import MISSING, Legend
from ai4land.places import write_atomically

DPI = 150
MAX_SIDE = 1600
"""Most cells along a side of a map that is drawn."""
HITS_COLOURS = {
    "hits": "#1f78d1",
    "misses": "#f2a900",
    "wrong hits": "#2a0a4a",
    "false alarms": "#b01030",
    "unchanged": "#dcdcdc",
    "no land": "#ffffff",
}
"""Colours of :func:`hits_figure`, in the order of its legend; safe for colour-blind readers."""
_LINES = ("#0a5bb5", "#6b6b6b", "#c96a00", "#1a7d2b", "#8a4bd0", "#c01430")
_MARKS = ("o", "s", "^", "D", "v", "P")
_FRAME = "#8c8c8c"

Extent = tuple[float, float, float, float]
"""West, south, east, north, as from :attr:`ai4land.grid.Grid.bounds`."""


def step_of(shape: tuple[int, int]) -> int:
    """Give the step by which to thin a map so that no side exceeds :data:`MAX_SIDE`.

    >>> step_of((1600, 3200)), step_of((40, 80))
    (2, 1)
    """
    return max(1, math.ceil(max(shape) / MAX_SIDE))


def thin(
    read: Callable[[Window], NDArray[np.uint8]],
    *,
    windows: Iterable[Window],
    shape: tuple[int, int],
    step: int,
    fill: int = MISSING,
) -> NDArray[np.uint8]:
    """Take the cell in the middle of each block of ``step`` x ``step`` cells of a map that is read window by window.

    Parameters
    ----------
    read
        Reads a window of the map, ``(rows, columns)``.
    windows
        To read; cells beyond them hold ``fill``.
    shape
        Of the whole map, rows and columns.
    step
        Cells along a side of a block.
    fill
        Of cells in no window.

    Returns
    -------
    numpy.ndarray
        Of one cell a block; the last block of a side may be smaller and is left out if it has no middle cell.

    >>> from ai4land.grid import tiles
    >>> whole = np.arange(36, dtype=np.uint8).reshape(6, 6)
    >>> thin(lambda w: whole[w.slices], windows=tiles((6, 6), 2), shape=(6, 6), step=3).tolist()
    [[7, 10], [25, 28]]
    """
    taken = [np.arange(min(step - 1, size - 1) // 2, size, step) for size in shape]
    out = np.full([t.size for t in taken], fill, dtype=np.uint8)
    for window in windows:
        (top, bottom), (left, right) = (np.searchsorted(t, (s.start, s.stop)) for t, s in zip(taken, window.slices, strict=True))
        if top < bottom and left < right:
            inside = np.ix_(taken[0][top:bottom] - window.row, taken[1][left:right] - window.col)
            out[top:bottom, left:right] = read(window)[inside]
    return out


def map_figure(
    codes: NDArray[np.uint8], *, legend: Legend, extent: Extent, title: str, path: Path, geographic: bool = True
) -> Path:
    """Draw a map in the colours of its legend, and list the classes that occur.

    Parameters
    ----------
    codes
        Class codes ``(rows, columns)``, thinned.
    legend
        Of the codes.
    extent
        West, south, east, north.
    title
        Of the figure.
    path
        To write.
    geographic
        Whether the extent is in degrees; otherwise it is in the units of the projection.

    Raises
    ------
    DataError
        If a code is not in the legend.
    """
    plain = legend.decode(legend.encode(codes))
    table = np.zeros((256, 3), dtype=np.uint8)
    entries = []
    for item in (*legend.classes, legend.fill):
        table[item.code] = _rgb(item.colour)
        if (plain == item.code).any():
            entries.append((item.colour, item.name.replace("_", " ")))
    return _draw_image(table[plain], entries, extent=extent, title=title, path=path, geographic=geographic)


def hits_figure(
    reference: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    predicted: NDArray[np.uint8],
    *,
    extent: Extent,
    title: str,
    path: Path,
    geographic: bool = True,
    areas: NDArray[np.float64] | None = None,
) -> Path:
    """Draw where change since the reference map was predicted, with the share of the land of each kind.

    *Hits* changed and were predicted to change to the right class, *wrong hits* to another one; *misses* changed and were
    predicted to stay; *false alarms* stayed and were predicted to change; cells unchanged in both are grey. The shares are
    those of the cells drawn.

    Parameters
    ----------
    reference, truth, predicted
        Class indices ``(rows, columns)``, thinned alike; a cell that is ``MISSING`` in any of them is drawn as no land.
    extent, title, path, geographic
        As in :func:`map_figure`.
    areas
        Area of a cell of each row, to weight the shares; without it all cells count equally.
    """
    if not reference.shape == truth.shape == predicted.shape:
        raise DataError(
            f"maps are {reference.shape}, {truth.shape} and {predicted.shape}, expected equal shapes; thin all maps by the same step"
        )
    changed, predicted_change, right = reference != truth, reference != predicted, truth == predicted
    known = (reference != MISSING) & (truth != MISSING) & (predicted != MISSING)
    still = ~predicted_change
    kinds = [changed & right, changed & still, changed & predicted_change & ~right, ~changed & predicted_change, ~changed & still]
    kind = np.select([k & known for k in kinds], range(len(kinds)), default=len(kinds))
    weights = np.broadcast_to(np.ones(1) if areas is None else areas[:, None], kind.shape)
    sums = np.bincount(kind.ravel(), weights=weights.ravel(), minlength=len(HITS_COLOURS))
    land = float(sums[:-1].sum())
    entries = []
    for (name, colour), part in zip(HITS_COLOURS.items(), sums.tolist(), strict=True):
        if part:
            entries.append((colour, name if name == "no land" else f"{name}: {part / land:.2%}"))
    table = np.array([_rgb(colour) for colour in HITS_COLOURS.values()], dtype=np.uint8)
    return _draw_image(table[kind], entries, extent=extent, title=title, path=path, geographic=geographic)


def curves_figure(metrics: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the training loss and the validation loss over the steps.

    Parameters
    ----------
    metrics
        Rows of ``metrics.jsonl``: ``step`` with ``loss``, ``validation_loss``, or both.
    path
        To write.

    Raises
    ------
    DataError
        If no row has a finite loss.
    """
    train, held = _series(metrics, "loss"), _series(metrics, "validation_loss")
    if not train.size and not held.size:
        raise DataError(
            f"metrics have {len(metrics)} rows, none of them with a loss, expected rows of metrics.jsonl; train first"
        )
    figure = Figure(figsize=(7, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    if train.size:
        width = len(train) // 40
        axes.plot(*train.T, color="#b9cde6" if width > 1 else _LINES[0], linewidth=0.8 if width > 1 else 1.6, label="training")
        if width > 1:
            mean = np.convolve(train[:, 1], np.full(width, 1 / width), mode="valid")
            middle = train[(width - 1) // 2 :, 0][: mean.size]
            axes.plot(middle, mean, color=_LINES[0], linewidth=1.6, label=f"training, mean of {width} rows")
    if held.size:
        axes.plot(*held.T, color=_LINES[2], linewidth=1.4, marker="o", markersize=3.5, label="validation", zorder=3)
        best = held[held[:, 1].argmin()]
        label = f"best validation {best[1]:.4g} at step {best[0]:,.0f}"
        axes.scatter(best[:1], best[1:], s=80, facecolors="none", edgecolors=_LINES[2], label=label, zorder=4)
    low, high = _range(train, held)
    axes.set_ylim(low, high)
    axes.set(xlabel="step", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    axes.set_title("Training", loc="left", fontsize=11)
    _tidy(axes)
    axes.legend(frameon=False, fontsize=8.5)
    return _save(figure, path)


def lead_figure(per_year: Mapping[str, Mapping[Any, Mapping[str, Any]]], path: Path) -> Path:
    """Draw accuracy and Figure of Merit by year, one line per prediction.

    Parameters
    ----------
    per_year
        For each prediction, by year (a number or text), the scores; the model first. None and absent scores leave a gap.
    path
        To write.
    """
    if not any(per_year.values()):
        raise DataError(f"scores of {list(per_year)} have no years, expected at least one; evaluate first")
    figure = Figure(figsize=(9, 3.9), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, 2)
    every = [int(y) for rows in per_year.values() for y in rows]
    room = max(0.04 * (max(every) - min(every)), 0.5)
    names = [name.replace("_", " ") for name in per_year]
    fields = (("overall_accuracy", "overall accuracy"), ("figure_of_merit", "Figure of Merit of change"))
    for axes, (field, label) in zip(panels, fields, strict=True):
        for i, (name, rows) in enumerate(zip(names, per_year.values(), strict=True)):
            years = sorted(rows, key=int)
            values = [np.nan if rows[y].get(field) is None else float(rows[y][field]) for y in years]
            axes.plot(
                [int(y) for y in years],
                values,
                color=_LINES[i % 6],
                marker=_MARKS[i % 6],
                markersize=4.5,
                linewidth=1.3 if i else 2,
                label=name,
                zorder=max(3, 10 - i),
                clip_on=False,
            )
        axes.set_title(label, loc="left", fontsize=11)
        axes.set_xlabel("year")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.set_xlim(min(every) - room, max(every) + room)
        _tidy(axes)
    panels[1].set_ylim(0, max(panels[1].get_ylim()[1], 0.05))
    figure.legend(handles=panels[0].get_lines(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    return _save(figure, path)


def reliability_figure(
    tables: Mapping[str, Mapping[str, Any]], path: Path, *, given: str = "confidence", came: str = "accuracy"
) -> Path:
    """Draw a reliability diagram: how often events came true, and the share of the area, against their predicted probability.

    Parameters
    ----------
    tables
        Tables of :class:`ai4land.evaluate.reliability.Reliability` by name, the model first. Bins of less than 0.01 % of the area are
        omitted.
    path
        To write.
    given, came
        Labels of the predicted probability and of the observed frequency.
    """
    least = 1e-4
    drawn = {name: [row for row in table["bins"] if (row["share"] or 0) >= least] for name, table in tables.items()}
    every = [row for rows in drawn.values() for row in rows]
    if not every:
        raise DataError(
            f"tables of {list(tables)} have no area, expected at least one with probabilities; score predictions with their probabilities"
        )
    top = max(max(row["to"], row["accuracy"]) for row in every)
    figure = Figure(figsize=(5, 6), dpi=DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(3.2, 1), sharex=True)
    upper.plot((0, top), (0, top), color=_FRAME, linewidth=0.9, linestyle=(0, (4, 3)), label="perfect")
    for i, (name, rows) in enumerate(drawn.items()):
        error = tables[name]["expected_calibration_error"]
        label = name.replace("_", " ") + ("" if error is None else f": error {error:.3f}")
        style = {"color": _LINES[i % 6], "linewidth": 1.3 if i else 2.0, "zorder": max(3, 10 - i)}
        points = ([row["confidence"] for row in rows], [row["accuracy"] for row in rows])
        upper.plot(*points, marker=_MARKS[i % 6], markersize=4.5, clip_on=False, label=label, **style)
        bins = tables[name]["bins"]
        lower.stairs(
            [row["share"] or 0 for row in bins], baseline=least, edges=[bins[0]["from"], *(row["to"] for row in bins)], **style
        )
    for axes, label in ((upper, came), (lower, "share of area")):
        axes.set_title(label, loc="left", fontsize=11)
        _tidy(axes)
    upper.set(xlim=(0, top), ylim=(0, top))
    lower.set(xlabel=given, yscale="log", ylim=(least, 1))
    upper.legend(loc="upper left", frameon=False, fontsize=8.5)
    return _save(figure, path)


def _draw_image(
    image: NDArray[np.uint8], entries: list[tuple[str, str]], *, extent: Extent, title: str, path: Path, geographic: bool
) -> Path:
    """Draw an RGB image with axes and a legend beside or below it. Lengths are in inches."""
    west, south, east, north = extent
    middle = math.radians((south + north) / 2)
    stretch = 1 / max(0.2, math.cos(middle)) if geographic and north - south < 60 else 1.0
    ratio = (north - south) * stretch / (east - west)
    width = min(9.0, 7.5 / ratio)
    height = width * ratio
    column, line = 0.55 + max((len(name) for _, name in entries), default=0) * 0.077, 0.185
    left, right, below, above, gap = 0.7, 0.2, 0.35, 0.4, 0.15
    columns, place = 1, (1 + gap / width, 1.0)
    if len(entries) * line <= height:
        right = gap + column
    else:
        columns = max(1, int(width / column))
        place = (0.0, -(below + gap) / height)
        below += 2 * gap + math.ceil(len(entries) / columns) * line
    size = (left + width + right, below + height + above)
    figure = Figure(figsize=size, dpi=DPI)
    axes = figure.add_axes((left / size[0], below / size[1], width / size[0], height / size[1]))
    axes.imshow(image, extent=(west, east, south, north), interpolation="nearest", aspect="auto")
    axes.set_title(title, loc="left", fontsize=11)
    axes.tick_params(labelsize=8, color=_FRAME)
    for spine in axes.spines.values():
        spine.set(color=_FRAME, linewidth=0.6)
    steps = [1, 1.5, 2, 3, 4.5, 5, 10] if geographic else [1, 2, 2.5, 5, 10]
    for axis, names, ticks in ((axes.xaxis, "WE", width / 1.1), (axes.yaxis, "SN", height / 0.8)):
        axis.set_major_locator(MaxNLocator(min(9, max(2, int(ticks))), steps=steps))
        if geographic:
            axis.set_major_formatter(FuncFormatter(_degrees(names)))
    patches = [Patch(facecolor=colour, edgecolor=_FRAME, linewidth=0.5) for colour, _ in entries]
    axes.legend(
        patches,
        [name for _, name in entries],
        loc="upper left",
        bbox_to_anchor=place,
        borderaxespad=0,
        borderpad=0,
        frameon=False,
        fontsize=8.5,
        ncols=columns,
    )
    return _save(figure, path)


def _degrees(names: str) -> Any:
    def write(value: float, _: Any) -> str:
        side = "" if abs(value) < 1e-9 else names[int(value > 0)]
        return f"{round(abs(value), 6):g}°{side}"

    return write


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    """Steps and finite values of a column, ``(rows, 2)``."""
    pairs = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
    values = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return values[np.isfinite(values).all(axis=1)]


def _range(train: NDArray[np.float64], held: NDArray[np.float64]) -> tuple[float, float]:
    """Limits of the loss axis; single peaks of the training loss are cut off."""
    values = [part[:, 1] for part in (train, held) if part.size]
    low = min(float(v.min()) for v in values)
    high = max(float(np.quantile(train[:, 1], 0.995)) if train.size else low, float(held[:, 1].max()) if held.size else low)
    room = 0.06 * (high - low) or 0.05
    return low - room, high + room


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FRAME)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, color=_FRAME)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:7]))


def _save(figure: Figure, path: Path) -> Path:
    kind = path.suffix.removeprefix(".").lower() or "png"
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(image, dpi=DPI, format=kind, facecolor="white")
    write_atomically(path, image.getvalue())
    return path
