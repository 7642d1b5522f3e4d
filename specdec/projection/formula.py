"""From one rank's measured step to tokens/s of a whole machine.

With M tokens a forward, n GPUs, k drafts, tau the acceptance length (tokens emitted a forward), all times in us:

    T(M)   = skew * W(M) + sum over all-reduces of t_AR(n, bytes)      W = measured rank time - stubs * t_stub
    t_AR   = t0 + (n - 1) (a + bytes / bw)                             t0 from the measured GPUs (`Machine.all_reduce`)
    W'     = W - b + b * BW / BW'                                      another machine: only b, the bandwidth-bound part,
    b      = min(W, bytes read / (exposed share * BW))                 scales with the memory; the rest stays
    iteration(k) = T(1 + k) + drafting(k) + overhead
    tokens/s     = batch * tau / iteration,        break-even tau = target * iteration

Bands combine edge by edge (low with low), so they are wide: parts are taken to be wrong in the same direction. They hold
what is named above and nothing else; no routing skew (zipf, correlation), no thermal limits, no change of tau with context.
"""

from __future__ import annotations

from dataclasses import dataclass

from specdec.projection.band import Band
from specdec.projection.machine import Machine
from specdec.projection.measured import OURS, Measured, Row, interpolated
from specdec.projection.model import DraftHead, Model

ACTIVATION_BYTES = 2  # bf16 partial sums
BEST_TOKEN_BYTES = 8  # (value, index) of a rank's best word


@dataclass(frozen=True, slots=True)
class Projection:
    """One model with one draft head on one machine, from measurements of one rank."""

    model: Model
    head: DraftHead
    machine: Machine
    measured: Measured

    def __post_init__(self) -> None:
        if self.machine.gpus != self.measured.ranks:
            raise ValueError(
                f"{self.machine.name} has {self.machine.gpus} GPUs, the measured step is one of {self.measured.ranks} "
                f"shards: measure a shard of {self.machine.gpus} or name a machine of {self.measured.ranks} GPUs"
            )

    # ---- pieces, in us -----------------------------------------------------------------------------------------------

    def all_reduce_time(self, size: float) -> Band:
        """One all-reduce of `size` bytes: measured t0 where there is one, the machine's own otherwise."""
        times = self.measured.all_reduce
        return self.machine.all_reduce(size, times.start(size, self.measured.machine) if times else None)

    def floor(self, tokens: int, context: int, batch: int = 1, drafts: int = 0) -> float:
        """us that the memory alone needs for the forward and the drafts, at the machine's middle bandwidth."""
        size = sum(self.model.rank_bytes(tokens, context, self.machine.gpus, batch).values())
        if drafts:
            size += self.head.rank_bytes(drafts, self.machine.gpus)
        return size / self.machine.hbm_tb_s.mid / 1e6

    def step_time(self, tokens: int, context: int, batch: int = 1, runtime: str = OURS) -> Band:
        """T(M): a forward of `batch` rows of `tokens` tokens each, all-reduces included."""
        run = self.measured.runtimes[runtime]
        row = interpolated(runtime, run.rows, batch, tokens, context)
        size = sum(self.model.rank_bytes(tokens, context, self.machine.gpus, batch, row.experts).values())
        rank = self._rank_time(row, run.stub_us * run.stubs, size)
        large = self.all_reduce_time(batch * tokens * self.model.hidden * ACTIVATION_BYTES) * self.model.all_reduces
        return rank + large + self.all_reduce_time(batch * tokens * BEST_TOKEN_BYTES)

    def draft_time(self, drafts: int, batch: int = 1) -> Band:
        """fc and `drafts` steps of the head: measured where the drafter was, else bytes / exposed bandwidth + boundaries."""
        if drafts == 0:
            return Band.exactly(0.0)
        size, drafter = self.head.rank_bytes(drafts, self.machine.gpus), self.measured.drafter
        if drafter is None:
            rate = self.machine.hbm_tb_s * self.machine.exposed * 1e6  # bytes per us
            rank = Band.exactly(size).per(rate) + self.machine.boundary_us * (drafts * self.head.kernels + 1)
            rank = self._skewed(rank)
        else:
            rank = self._rank_time(
                interpolated("drafter", drafter.rows, batch, drafts, 0),
                drafter.stub_us * drafter.stubs_per_step * drafts,
                size,
            )
        number = drafts * self.head.all_reduces + 1  # and one after fc
        large = self.all_reduce_time(batch * self.head.hidden * ACTIVATION_BYTES) * number
        return rank + large + self.all_reduce_time(batch * BEST_TOKEN_BYTES) * drafts

    def iteration_time(self, drafts: int, context: int, batch: int = 1, runtime: str = OURS) -> Band:
        """us from one forward to the next: verify 1 + `drafts` tokens, draft, accept. 0 drafts = plain decoding."""
        overhead = self.measured.runtimes[runtime].overhead_us
        return self.step_time(1 + drafts, context, batch, runtime) + self.draft_time(drafts, batch) + overhead

    # ---- answers -----------------------------------------------------------------------------------------------------

    def tokens_per_second(
        self, acceptance_length: float, drafts: int, context: int, batch: int = 1, runtime: str = OURS
    ) -> Band:
        """Of one user (row): tau / iteration."""
        if not 1 <= acceptance_length <= drafts + 1:
            raise ValueError(
                f"drafts = {drafts} gives 1 to {drafts + 1} tokens a forward, not {acceptance_length}: "
                "change the acceptance length or the number of drafts"
            )
        return Band.exactly(acceptance_length * 1e6).per(self.iteration_time(drafts, context, batch, runtime))

    def server_throughput(
        self, acceptance_length: float, drafts: int, context: int, batch: int, runtime: str = OURS
    ) -> Band:
        """Tokens/s of all `batch` users together, all at this context and acceptance length."""
        return self.tokens_per_second(acceptance_length, drafts, context, batch, runtime) * batch

    def break_even_acceptance_length(
        self, drafts: int, context: int, target_tps: float = 1000.0, batch: int = 1
    ) -> Band:
        """tau that gives `target_tps` per user; above 1 + `drafts` no drafter reaches it, below 1 plain steps do."""
        return self.iteration_time(drafts, context, batch) * (target_tps / 1e6)

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def _skewed(self, time: Band) -> Band:
        return time * self.machine.skew if self.machine.gpus > 1 else time

    def _rank_time(self, row: Row, stubs_us: float, size: float) -> Band:
        """skew * W': the measured time without its stubs, moved to this machine's memory."""
        old, new = self.measured.machine, self.machine
        moved = []
        for time, share, rate, new_rate in zip(
            row.us.edges, old.exposed.edges, old.hbm_tb_s.falling, new.hbm_tb_s.falling, strict=True
        ):
            work = time - stubs_us
            bound = min(work, size / (share * rate * 1e6))
            moved.append(work - bound + bound * rate / new_rate)
        return self._skewed(Band.ordered(*moved))
