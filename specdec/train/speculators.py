"""An EAGLE-3 head of ours in the layout of the speculators package, which vLLM serves.

python -m specdec.train.speculators HEAD OUT --verifier OWNER/NAME
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.nn.eagle import SWITCHES, EagleConfig
from specdec.train.checkpoint import write_folder
from specdec.weights import checkpoint

__all__ = ["main", "to_speculators"]

_OUTSIDE = ("architectures", "draft_vocab_size", "feature_layers", "target_hidden_size", "specdec")


def to_speculators(head: Path, place: Path, verifier: str, num_draft_tokens: int = 3) -> None:
    """Write folder `head` to folder `place`: layers counted "before" (see drafter._eagle_formats), matrices in bfloat16.

    Norms stay in f32: the package reads every tensor in the one dtype of its model, and read here again they are exact.
    verifier: the target's folder or Hub name, as the other engine knows it. ValueError: no head of ours, or no layers named.
    """
    described = checkpoint.read_config(head)
    config = EagleConfig.from_dict(described)
    if not config.feature_layers:
        raise ValueError(f"{head} names no feature_layers: give the folder of a head that `specdec train` made")
    inside = {key: value for key, value in config.to_dict().items() if key not in (*_OUTSIDE, *SWITCHES)}
    written: dict[str, Any] = {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": inside | {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False},
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.layer.hidden_size,
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in config.feature_layers],
        **{key: getattr(config, key) for key in SWITCHES},
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": num_draft_tokens}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": verifier, "architectures": ["LlamaForCausalLM"]},
        },
        "torch_dtype": "bfloat16",
    }
    write_folder(place, {"model.safetensors": _tensors(head)}, {"config.json": json.dumps(written, indent=2) + "\n"})


def _tensors(head: Path) -> dict[str, Tensor]:
    """Under their names; matrices in bfloat16, FP8 multiplied out."""
    ours = {name: tensor.read() for name, tensor in checkpoint.iter_tensors(head)}
    found = {}
    for name, tensor in ours.items():
        if name.endswith("_scale"):
            continue
        if f"{name}_scale" in ours:
            tensor = tensor.float() * ours[f"{name}_scale"][:, None]
        found[name.replace("midlayer.", "layers.0.", 1)] = tensor.to(torch.bfloat16) if tensor.dim() > 1 else tensor
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m specdec.train.speculators", description=__doc__.splitlines()[0])
    parser.add_argument("head", type=Path, help="folder of a head that `specdec train` made")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--verifier", required=True, help="the target's folder or Hub name")
    parser.add_argument("--drafts", type=int, default=3, help="tokens drafted a step (default: 3)")
    args = parser.parse_args(arguments)
    try:
        to_speculators(args.head, args.out, args.verifier, args.drafts)
    except (ValueError, OSError) as error:
        sys.exit(f"specdec: {error}")


if __name__ == "__main__":
    main()
