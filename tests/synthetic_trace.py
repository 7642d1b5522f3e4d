"""Traces with a known truth: every draft is accepted by a coin of known bias, every step costs a known time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

TASKS = {"chat": 0.5, "code": 0.8, "summarization": 0.65}  # acceptance rate of a draft, whatever its position
DRAFTERS = {"none": (0, 0.0), "ngram": (4, 0.0002), "draft_model": (4, 0.004)}  # drafts a step, seconds per draft


def step_seconds(num_drafts: int, propose: float) -> dict[str, float]:
    """The cost law: a forward of 20 ms and 1 ms a token, and 1 ms of everything else."""
    verify, accept = 0.020 + 0.001 * (num_drafts + 1), 0.0005
    cost = {"propose_seconds": propose * num_drafts, "verify_seconds": verify, "accept_seconds": accept}
    return {**cost, "step_seconds": sum(cost.values()) + 0.0005}


def row(drafter: str, request: int, accepted: list[int], depth: int, **values: Any) -> dict[str, Any]:
    """A trace row whose steps all propose a chain of `depth` drafts; `values` overrides any field."""
    cost = step_seconds(depth, DRAFTERS.get(drafter, (0, 0.0))[1])
    num = len(accepted)
    fields = {
        **{"drafter": drafter, "verifier": "target_only", "lossless": True, "request": request},
        **{"question_id": str(request), "task": "chat", "category": "chat", "language": "en", "turn": 0},
        **{"prompt_tokens": 20, "tokens": list(range(1 + sum(accepted) + num)), "finish": "length", "batch_size": 1},
        **{"pass": 0, "prefill_seconds": 0.1, "num_nodes": [depth + 1] * num, "draft_depth": [depth] * num},
        **{"num_accepted": accepted, "num_emitted": [a + 1 for a in accepted], "equal_to_plain": True},
        **{name: [seconds] * num for name, seconds in cost.items()},
    }
    return {**fields, **values}


def rows(requests: int = 8, new_tokens: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """`requests` requests of every task under every drafter, interleaved as a run would write them."""
    rng = np.random.default_rng(seed)
    trace = []
    for request in range(requests * len(TASKS)):
        task = list(TASKS)[request % len(TASKS)]
        noise = rng.normal(1, 0.03)  # one machine state a request: hits every method alike
        for drafter, (depth, _) in DRAFTERS.items():
            accepted: list[int] = []
            while sum(accepted) + len(accepted) < new_tokens:
                accepted.append(int(np.cumprod(rng.random(depth) < TASKS[task]).sum()))
            emitted = [a + 1 for a in accepted]
            emitted[-1] -= sum(emitted) - new_tokens  # the limit cuts the last step short
            made = row(drafter, request, accepted, depth, task=task, num_emitted=emitted)
            for name in ("propose_seconds", "verify_seconds", "accept_seconds", "step_seconds"):
                made[name] = [seconds * noise * rng.normal(1, 0.02) for seconds in made[name]]
            made["step_seconds"] = [
                max(total, sum(parts))
                for total, *parts in zip(
                    made["step_seconds"],
                    made["propose_seconds"],
                    made["verify_seconds"],
                    made["accept_seconds"],
                    strict=True,
                )
            ]
            trace.append(made)
    return trace


def write_trace(folder: Path, trace: list[dict[str, Any]]) -> Path:
    """RUN/trace.jsonl with these rows; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trace.jsonl").write_text("".join(json.dumps(one) + "\n" for one in trace))
    return folder
