"""Pictures of what a model does with a text, as PNG. Equal input gives equal bytes."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from pipelines.prompting.token_cuts import visible

if TYPE_CHECKING:
    from pipelines.prompting.attention_maps import AttentionMaps
    from pipelines.prompting.neighbours import EmbeddingView
    from pipelines.prompting.next_token import NextToken

_BLUE, _GREY, _INK = "#2a6fbb", "#c9ced6", "#333333"
_WORDS = ("#2a6fbb", "#d1495b", "#2e8b57", "#e08e0b", "#7b4fa3", "#12879c", "#9a5b2c", "#c2438f", "#5b7a1e", "#555f6e")
_LABELLED_TOKENS = 40
"""Maps of more tokens have no room for their names."""
_TITLES = {
    "decoder": "attention of each token (row) to those before it",
    "encoder": "attention of each token (row) to all tokens",
    "cross": "attention of the target's tokens (rows) to the source",
}


def next_token_picture(found: NextToken) -> bytes:
    """A panel for each view: what each candidate's chance to be drawn is, with the model's own behind it."""
    names = list(found.views)
    figure = _figure(1.6 + 1.75 * len(names), 1.5 + 0.27 * len(found.candidates))
    panels = figure.subplots(1, len(names), sharey=True, sharex=True, squeeze=False)[0]
    rows = range(len(found.candidates))
    own = [next(iter(candidate.probabilities.values())) for candidate in found.candidates]
    for panel, name in zip(panels, names, strict=True):
        view = found.views[name]
        values = [candidate.probabilities[name] for candidate in found.candidates]
        panel.barh(rows, own, 0.82, color=_GREY, alpha=0.55)
        panel.barh(rows, values, 0.5, color=_BLUE)
        for row, value, before in zip(rows, values, own, strict=True):
            label = f"{value:.1%}" if value else "out"
            panel.annotate(label, (max(value, before), row), (3, 0), textcoords="offset points", va="center",
                           fontsize=7, color=_INK if value else "#a03030")  # fmt: skip
        panel.set_title(f"{name}\n", fontsize=10, fontweight="bold", color=_INK, pad=4)
        panel.annotate(f"{view.tokens_kept:,} tokens, {view.entropy_bits:.1f} bits", (0.5, 1.01),
                       xycoords="axes fraction", ha="center", va="bottom", fontsize=7.5, color="#666666")  # fmt: skip
        _bare(panel)
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(rows, [visible(candidate.text) for candidate in found.candidates], family="monospace")
    panels[0].tick_params(axis="y", labelsize=8)
    for label in panels[0].get_yticklabels():
        label.set_parse_math(False)
    panels[0].invert_yaxis()
    largest = max(max(candidate.probabilities.values()) for candidate in found.candidates)
    panels[0].set_xlim(0, largest * 1.35)
    panels[0].xaxis.get_major_locator().set_params(nbins=4, prune="upper")
    panels[0].xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.suptitle(
        "chance of the next token to be drawn (grey: the model's own); all tokens not shown have "
        f"{found.other_probability:.1%} of it",
        fontsize=9, color=_INK,
    )  # fmt: skip
    return _png(figure)


def attention_picture(maps: AttentionMaps, *, layer: int | None = None, head: int | None = None) -> bytes:
    """All layers (rows) and heads (columns), one layer's heads, or one map with its tokens' names.

    `layer` and `head` count from 0. Raises `IndexError` for one that is not there.
    """
    layers = range(maps.weights_LHQK.shape[0]) if layer is None else [layer]
    heads = range(maps.weights_LHQK.shape[1]) if head is None else [head]
    alone = len(layers) * len(heads) == 1
    longest = max(len(maps.queries), len(maps.keys))
    if alone:
        side = min(12.0, 2.5 + 0.26 * longest)
        figure = _figure(side + 0.8, side)
    else:
        side = 1.25 if len(heads) > 8 else 1.7
        figure = _figure(0.9 + side * len(heads), 1.1 + side * len(layers))
    grid = figure.subplots(len(layers), len(heads), squeeze=False)
    image: Any = None
    for row, one in zip(grid, layers, strict=True):
        for panel, other in zip(row, heads, strict=True):
            image = panel.imshow(maps.weights_LHQK[one, other], vmin=0, vmax=1, cmap="Blues", aspect="auto",
                                 interpolation="nearest")  # fmt: skip
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_color("#bbbbbb")
            if one == layers[0]:
                panel.set_title(f"head {other}", fontsize=8, color=_INK)
            if other == heads[0]:
                panel.set_ylabel(f"layer {one}", fontsize=8, color=_INK)
    if alone:
        _name_tokens(grid[0][0], maps)
    figure.colorbar(image, ax=grid, fraction=0.03, pad=0.02, shrink=0.8).ax.tick_params(labelsize=7)
    figure.suptitle(_TITLES[maps.kind], fontsize=10, color=_INK)
    return _png(figure)


def embeddings_picture(view: EmbeddingView) -> bytes:
    """Words and their neighbours in the plane, each word with its neighbours in a colour of its own."""
    figure = _figure(8.5, 6.5)
    axes = figure.subplots()
    for index, word in enumerate(view.words):
        colour = _WORDS[index % len(_WORDS)]
        for neighbour in word.neighbours:
            axes.plot([word.x, neighbour.x], [word.y, neighbour.y], color=colour, alpha=0.25, linewidth=0.8, zorder=1)
            axes.scatter(neighbour.x, neighbour.y, s=14, color=colour, alpha=0.8, zorder=2)
            _name_point(axes, visible(neighbour.text), neighbour.x, neighbour.y, colour, size=8)
        axes.scatter(word.x, word.y, s=70, color=colour, edgecolor="white", zorder=3)
        _name_point(axes, visible(word.word), word.x, word.y, colour, size=11, weight="bold")
    axes.margins(0.12)
    for axis, share, number in zip((axes.xaxis, axes.yaxis), view.explained, ("first", "second"), strict=True):
        axis.set_label_text(f"{number} principal component ({share:.0%} of the variance)", fontsize=9)
    axes.set_title(
        f"nearest tokens by cosine of {view.dimensions}-dimensional input embeddings", fontsize=10, color=_INK
    )
    axes.grid(alpha=0.2)
    _bare(axes)
    return _png(figure)


def _name_tokens(panel: Any, maps: AttentionMaps) -> None:
    for ticks, labels, names in (
        (panel.set_xticks, panel.get_xticklabels, maps.keys),
        (panel.set_yticks, panel.get_yticklabels, maps.queries),
    ):
        step = math.ceil(len(names) / _LABELLED_TOKENS)
        shown = range(0, len(names), step)
        ticks(shown, [visible(names[index], 14) for index in shown], family="monospace", fontsize=8)
        for label in labels():
            label.set_parse_math(False)
    panel.tick_params(length=0)
    panel.set_xticks(panel.get_xticks(), panel.get_xticklabels(), rotation=90)


def _name_point(axes: Any, name: str, x: float, y: float, colour: str, *, size: float, weight: str = "normal") -> None:
    axes.annotate(
        name, (x, y), (4, 3), textcoords="offset points", fontsize=size, color=colour, fontweight=weight,
        parse_math=False, zorder=4, path_effects=[withStroke(linewidth=1.2, foreground="white")],
    )  # fmt: skip


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # The library's version in the metadata would make the bytes depend on it alone.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
