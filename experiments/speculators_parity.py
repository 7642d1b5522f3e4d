"""Our EAGLE-3 head beside the speculators package's, on the same random weights and inputs: logits of every step of training.

pip install speculators     into an environment that has specdec
python experiments/speculators_parity.py
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _bench import session, table
from torch import Tensor

from specdec.target.toy import Toy
from specdec.train.eagle3 import Eagle3Head, make_head
from specdec.train.vocabulary import draft_vocabulary

RESULTS = Path(__file__).parent / "results"
SWITCHES: tuple[dict[str, bool], ...] = (
    {}, {"norm_before_residual": True}, {"norm_output": True}, {"norm_before_fc": True}, {"fc_norm": True}
)  # fmt: skip
STEPS, TOKENS, DRAFTS = 3, 24, 96


def random_head(target: Toy, **switches: bool) -> Eagle3Head:
    """Every weight random, norms too."""
    draw = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 1000, (target.config.vocab_size,), generator=draw)
    head = make_head(target, *draft_vocabulary(counts, DRAFTS), depth=STEPS, **switches)
    with torch.no_grad():
        for parameter in head.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.copy_(float(parameter.dim() == 1) + spread * torch.randn(parameter.shape, generator=draw))
    return head


def theirs(
    head: Eagle3Head, embed: Tensor, tokens: Tensor, features: Tensor, switches: dict[str, bool]
) -> list[Tensor]:
    """Logits [1, T, W] of every step, by their model with our weights."""
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3SpeculatorConfig
    from speculators.models.eagle3.core import Eagle3DraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    ours = head.settings()
    outside = ("architectures", "feature_layers", "draft_vocab_size", "target_hidden_size", *switches)
    layer = LlamaConfig(**{key: value for key, value in ours.items() if key not in outside})
    layer._attn_implementation = "eager"
    proposal = GreedyTokenProposalConfig(speculative_tokens=STEPS)
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=DRAFTS,
        eagle_aux_hidden_state_layer_ids=[i + 1 for i in ours["feature_layers"]],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[proposal],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
        ),
        **switches,
    )
    model = Eagle3DraftModel(config)
    named = {name.replace("midlayer.", "layers.0."): value for name, value in head.state_dict().items()}
    result = model.load_state_dict(named | {"embed_tokens.weight": embed}, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys
    assert all(key.startswith("verifier_") for key in result.missing_keys), result.missing_keys
    logits: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: logits.append(output.detach()))
    following = torch.cat([tokens[:, 1:], tokens.new_zeros(1, 1)], 1)  # entry t holds token t + 1
    with torch.no_grad():
        model.float().eval()(
            hidden_states=features, input_ids=following, document_ids=torch.zeros_like(tokens), ttt_steps=STEPS
        )
    return logits


def rows() -> list[dict[str, Any]]:
    """Relative difference of the logits, for each variant and step."""
    target, found = Toy(), []
    embed = target.embed.float()
    for switches in SWITCHES:
        head = random_head(target, **switches)
        draw = torch.Generator().manual_seed(1)
        tokens = torch.randint(3, 200, (1, TOKENS), generator=draw)
        features = torch.randn(1, TOKENS, len(head.taps) * target.config.hidden_size, generator=draw)
        with torch.no_grad():
            ours = [head.logits(j, state) for j, state in enumerate(head(tokens, features, embed))]
        for j, (a, b) in enumerate(zip(ours, theirs(head, embed, tokens, features, switches), strict=True)):
            a, b = a[:, : TOKENS - 1 - j], b[:, : TOKENS - 1 - j]  # behind the row's end there is nothing to compare
            variant = ", ".join(switches) or "as in the paper"
            found.append({"variant": variant, "step": j, "difference": float((a - b).norm() / b.norm())})
    return found


def main(arguments: Sequence[str] = ()) -> None:
    """Compare and write."""
    result = {
        "session": session("experiments/speculators_parity.py", arguments),
        "speculators": importlib.metadata.version("speculators"),
        "rows": rows(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "speculators_parity.json").write_text(json.dumps(result, indent=1) + "\n")
    text = [
        "# EAGLE-3 beside the speculators package\n",
        f"speculators {result['speculators']}; relative difference of the logits (norm of the difference over norm), float32, "
        f"{TOKENS} tokens, random weights and features, by step of the training-time test.\n",
        f"`{result['session']['command']}`\n",
        table(
            ["variant", "step", "difference"],
            [[r["variant"], r["step"], f"{r['difference']:.1e}"] for r in result["rows"]],
        ),
    ]
    (RESULTS / "speculators_parity.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
