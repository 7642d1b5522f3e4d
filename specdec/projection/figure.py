"""The curve of tokens/s per user over acceptance length, the target and the published points on it."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from specdec.projection.formula import Projection
from specdec.projection.tables import ACCEPTANCE_LENGTHS, RECORD_DRAFTS, RECORD_TPS, Question, curve, named

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]  # Okabe and Ito's, told apart by most colour-blind readers
MARKERS = ["s", "^", "D"]


def figure(projections: Sequence[Projection], question: Question) -> Figure:
    """One panel per number of drafts, one band per machine; NVIDIA's record at its published acceptance lengths."""
    drawn = Figure(figsize=(5.5 * len(question.drafts), 4.2), layout="constrained", dpi=120)
    panels = drawn.subplots(1, len(question.drafts), squeeze=False, sharey=True)[0]
    for ax, k in zip(panels, question.drafts, strict=True):
        for projection, colour in zip(projections, COLOURS * len(projections), strict=False):
            points = curve(projection, k, question.context)
            taus = [tau for tau, _ in points]
            ax.plot(taus, [tps.mid for _, tps in points], color=colour, label=projection.machine.name)
            ax.fill_between(
                taus, [t.low for _, t in points], [t.high for _, t in points], color=colour, alpha=0.2, lw=0
            )
        ax.axhline(question.target_tps, color="#888888", lw=1, ls="--", label=f"{question.target_tps:,.0f} TPS/user")
        if k == RECORD_DRAFTS:
            for (task, by_k), marker in zip(ACCEPTANCE_LENGTHS.items(), MARKERS, strict=True):
                label = f"NVIDIA's record, 8 x B200, if tau is {task}'s"
                ax.plot(by_k[k - 1], RECORD_TPS, marker, color="#000000", label=label)
        ax.set_title(f"{named(k)}, context {question.context}", loc="left", fontsize=11, fontweight="bold")
        ax.set_xlabel("acceptance length (tokens per forward)")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#DDDDDD", linewidth=0.7)
        ax.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("tokens/s per user")
    drawn.suptitle(f"{projections[0].model.name}, {projections[0].head.name} head: projected", fontsize=10)
    return drawn
