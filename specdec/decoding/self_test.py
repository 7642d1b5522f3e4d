"""Does a trained head do here what it did where it was made? A short answer to a known prompt says so before a long run does.

A head on the wrong layers, embeddings or target still drafts, and the output is still right; it is only never accepted.
"""

from __future__ import annotations

import warnings

from specdec.decoding.decoder import SpeculativeDecoder

__all__ = ["KEPT", "LEAST", "known_prompt_length", "self_test"]

PROMPT = "Explain in a few sentences why the sky is blue. Then list three other things that are blue."
NEW_TOKENS = 64
KEPT = 0.8  # share of what its card says that a head must reach
LEAST, LEAST_DEPTH = 1.3, 3  # acceptance length below which a head of unknown worth is suspect, at drafts so long


def known_prompt_length(decoder: SpeculativeDecoder) -> float | None:
    """Acceptance length of the greedy answer to the known prompt; None where there is no chat template to ask it with."""
    if not getattr(decoder.tokenizer, "chat_template", None):
        return None
    alone = SpeculativeDecoder(decoder.target, decoder.drafter, decoder.verifier)
    return alone.generate(PROMPT, NEW_TOKENS, ignore_eos=True).trace.acceptance_length


def self_test(decoder: SpeculativeDecoder) -> None:
    """ValueError where a trained head stays below what its card says, a warning where none says anything and it is poor."""
    drafter = decoder.drafter
    for part in drafter.parts:
        self_test(SpeculativeDecoder(decoder.target, part, decoder.verifier))
    if not drafter.trained or (length := known_prompt_length(decoder)) is None:
        return
    known = drafter.card.get("self_test")
    if known and drafter.depth >= known["depth"] and length < KEPT * known["tau"]:
        raise ValueError(
            f"{type(drafter).__name__}'s head emits {length:.2f} tokens a forward on a known prompt, and its card says "
            f"{known['tau']:.2f}: it was made for another target, template or dtype, or its files are damaged; take the head "
            "of this target, or train one"
        )
    if not known and drafter.depth >= LEAST_DEPTH and length < LEAST:
        warnings.warn(
            f"{type(drafter).__name__}'s head emits {length:.2f} tokens a forward on a known prompt, which is hardly worth its "
            "time: is it for this target, and does it read the layers it was trained on?",
            stacklevel=2,
        )
