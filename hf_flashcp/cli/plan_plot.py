"""Drawing of a plan: the tokens that each rank holds, where documents are split, and which ranks exchange KV."""

from __future__ import annotations

import os

import numpy as np

from ..plan import ShardPlan
from ..tables import counted
from .plots import COLOURS, INK, new_figure, require_matplotlib, save_figure


_BAR = 0.72  # height of a bar, as a share of its lane
_MAX_LEGEND_DOCUMENTS = len(COLOURS)
_MAX_LABELLED_ARROWS = 30
_MAX_ARROWS = 80  # a matrix is easier to read than more arrows


def plot_plan(plan: ShardPlan, path: str | os.PathLike, *, strategy: str) -> None:
    """Draw every rank's row, and an arrow for each pair of ranks that exchange KV, or a matrix if there are many."""
    require_matplotlib()
    traffic = plan.kv_traffic()
    arrows = [(*pair, int(traffic[*pair])) for pair in np.argwhere(traffic).tolist()]  # sender, receiver, tokens
    lane = min(0.75, max(0.28, 7 / plan.cp_size))
    side = min(max(0.28 * len(arrows), 2.2), 5.0) if arrows else 0
    legend = _legend_handles(plan)
    figure = new_figure(7.2 + side, lane * plan.cp_size + 1.9 + 0.3 * bool(legend))
    if arrows:
        lanes, between = figure.subplots(1, 2, sharey=True, width_ratios=(6.7, side))
        if len(arrows) <= _MAX_ARROWS:
            _draw_arrows(between, arrows, plan.cp_size, pitch=72 * side / (len(arrows) + 1))
        else:
            _draw_matrix(figure, between, traffic)
    else:
        lanes = figure.subplots()
    _draw_title(figure, plan, strategy)
    if legend:
        figure.legend(handles=legend, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    _draw_axes(lanes, plan)
    figure.canvas.draw()  # pixels per token are known only once the layout is final
    figure.set_layout_engine("none")
    _draw_slices(lanes, plan)
    save_figure(figure, path)


def _draw_title(figure, plan, strategy):
    report = plan.report()
    figure.suptitle(
        f"{strategy}: {counted(len(plan.lengths), 'document')}, {counted(plan.num_tokens, 'token')}, "
        f"{counted(plan.cp_size, 'rank')}\n"
        f"imbalance: tokens {report['token_imbalance']:.3f}, attention pairs {report['pair_imbalance']:.3f}   "
        f"KV moved: {report['kv_total']:,} tokens, {report['kv_fraction']:.1%} of an all-gather",
        fontsize=11,
        color=INK,
    )


def _draw_axes(axes, plan):
    report = plan.report()
    mean_pairs = sum(report["pairs"]) / plan.cp_size
    axes.set_xlim(0, max(report["tokens"]))
    axes.set_ylim(plan.cp_size - 0.5, -0.5)
    axes.set_yticks(
        range(plan.cp_size),
        [f"rank {rank}   work {pairs / mean_pairs:.2f}" for rank, pairs in enumerate(report["pairs"])],
    )
    axes.set_xlabel("tokens in the rank's row   (work: attention pairs / mean over ranks)", color=INK)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_slices(axes, plan):
    pixels_per_token = axes.get_window_extent().width / axes.get_xlim()[1]
    cuts = []
    for rank, slices in enumerate(plan.slices):
        left, bars, line_widths = 0, [], []
        for document, start, stop in slices:
            width = stop - start
            pixels = width * pixels_per_token
            bars.append((left, width))
            line_widths.append(min(0.9, pixels / 14))
            boldness = min(1.0, pixels / 50)
            if start > 0:
                cuts.append((left, rank, boldness))
            if stop < plan.lengths[document]:
                cuts.append((left + width, rank, boldness))
            names = (f"doc {document}\n[{start}, {stop})", f"doc {document}", str(document))
            _label_that_fits(axes, left + width / 2, rank, names, pixels)
            left += width
        axes.broken_barh(
            bars,
            (rank - _BAR / 2, _BAR),
            facecolors=[_colour(document) for document, *_ in slices],
            edgecolors="white",
            linewidths=line_widths,
        )
    axes.vlines(
        [x for x, *_ in cuts],
        [rank - _BAR / 2 - 0.05 * boldness for _, rank, boldness in cuts],
        [rank + _BAR / 2 + 0.05 * boldness for _, rank, boldness in cuts],
        color=INK,
        linewidth=[1.8 * boldness for *_, boldness in cuts],
        clip_on=False,
    )


def _colour(document):
    # Neighbouring documents get different colours, and so do documents whose numbers differ by ten.
    return COLOURS[(document + document // len(COLOURS)) % len(COLOURS)]


def _label_that_fits(axes, x, y, names, pixels):
    if pixels < 8:
        return
    label = axes.text(x, y, "", ha="center", va="center", fontsize=9, color=INK, linespacing=1.2)
    lane = abs(axes.transData.transform((0, _BAR))[1] - axes.transData.transform((0, 0))[1])
    for name in names:
        label.set_text(name)
        extent = label.get_window_extent()
        if extent.width < pixels - 6 and extent.height < lane - 4:
            return
    label.remove()


def _draw_arrows(axes, arrows, ranks, pitch):
    """Draw each arrow in a column of its own, `pitch` points wide, so that arrows never cross or overlap."""
    most = max(tokens for *_, tokens in arrows)
    labelled = len(arrows) <= _MAX_LABELLED_ARROWS
    widest = min(7.0, (0.3 if labelled else 0.5) * pitch)
    for column, (sender, receiver, tokens) in enumerate(arrows):
        width = max(0.5, widest * tokens / most)
        head = min(width + 5, 0.95 * pitch)
        colour = "#4a6fa5" if sender % 2 == 0 else "#7d8794"
        axes.annotate(
            "",
            (column, receiver),
            (column, sender),
            arrowprops={
                "arrowstyle": f"simple,tail_width={width:.2f},head_width={head:.2f},head_length={head:.2f}",
                "mutation_scale": 1,
                "linewidth": 0,
                "color": colour,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
        axes.plot(column, sender, "o", color=colour, markersize=min(width + 3, 0.8 * pitch))
        if labelled:
            axes.annotate(
                f"{tokens:,}",
                (column, (sender + receiver) / 2),
                (width / 2 + 6, 0),
                textcoords="offset points",
                rotation=90,
                ha="center",
                va="center",
                fontsize=8,
                color=INK,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
    axes.set_xlim(-0.8, len(arrows) - 0.2)
    axes.set_xticks([])
    axes.set_xlabel(f"KV is sent from dot to arrowhead\nwidest: {most:,} tokens", color=INK)
    axes.tick_params(length=0, labelleft=False)
    axes.spines[:].set_visible(False)
    axes.hlines(range(ranks), -0.8, len(arrows) - 0.2, color="#dddddd", linewidth=0.6, zorder=0)


def _draw_matrix(figure, axes, traffic):
    image = axes.imshow(traffic, cmap="Blues", vmin=0, aspect="auto")
    axes.set_xlabel("KV is sent from the row's rank to this rank", color=INK)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(length=0, labelleft=False, colors=INK)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, format="{x:,.0f}", label="tokens", fraction=0.06, pad=0.02)
    bar.outline.set_visible(False)


def _legend_handles(plan):
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = []
    if len(plan.lengths) <= _MAX_LEGEND_DOCUMENTS:
        for document, length in enumerate(plan.lengths):
            handles.append(Patch(color=_colour(document), label=f"doc {document} ({length:,})"))
    if sum(map(len, plan.slices)) > len(plan.lengths):
        handles.append(Line2D([], [], color=INK, linewidth=1.8, label="split inside a document"))
    return handles
