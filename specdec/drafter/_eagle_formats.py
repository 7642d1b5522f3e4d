"""Published EAGLE-3 heads in our words: config.json and names of tensors of other projects' checkpoints.

Layer ids: ours name the stream behind a layer, from 0. Two conventions are in use, one apart: "before layer i" (SafeAILab,
vLLM, speculators) is our i - 1, "after layer i" (NVIDIA, SGLang: `eagle_config`) is our i. A head read with the wrong one
still drafts, only worse; so every format states its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from specdec.nn.eagle import ARCHITECTURE, SWITCHES

__all__ = ["Format", "format_of"]


@dataclass(frozen=True, slots=True)
class Format:
    """How one project stores a head."""

    name: str
    translate: Callable[[Mapping[str, Any]], dict[str, Any]]  # config.json -> ours; feature_layers None: the usual ones
    prefix: str = "midlayer."  # of the layer's tensors

    def rename(self, name: str) -> str | None:
        """Our name of a tensor; None for what a target has itself."""
        if name == "embed_tokens.weight":
            return None
        return f"midlayer.{name.removeprefix(self.prefix)}" if name.startswith(self.prefix) else name


def _own(config: Mapping[str, Any]) -> dict[str, Any]:
    """`specdec train` names the layers it chose, which need not be the usual ones: without them nothing says which."""
    if not config["feature_layers"]:
        raise ValueError("config.json lacks feature_layers: add the target's layers that the head was trained with")
    return dict(config)


def _published(config: Mapping[str, Any]) -> dict[str, Any]:
    """SafeAILab, SpecForge, NVIDIA: a Llama config with draft_vocab_size; the layers in eagle_config, if anywhere."""
    inner = config.get("eagle_config") or {}  # where NVIDIA has switches, too
    if {**config, **inner}.get("use_mtp_layernorm"):
        raise ValueError(
            "use_mtp_layernorm is on (MTP's layer norms), which is not computed here: take a head without it"
        )
    layers = inner.get("eagle_aux_hidden_state_layer_ids") or config.get("eagle_aux_hidden_state_layer_ids")
    return {**config, **{key: inner[key] for key in SWITCHES if key in inner}, "feature_layers": layers}


def _speculators(config: Mapping[str, Any]) -> dict[str, Any]:
    """vllm-project/speculators: the layer's config inside, layers counted before."""
    layers = config.get("eagle_aux_hidden_state_layer_ids")
    return {
        **config["transformer_layer_config"],
        **{key: config[key] for key in SWITCHES if key in config},
        "architectures": [ARCHITECTURE],
        "draft_vocab_size": config.get("draft_vocab_size"),
        "feature_layers": None if layers is None else [layer - 1 for layer in layers],
    }


OWN = Format("specdec", _own)
PUBLISHED = Format("SafeAILab, SpecForge or NVIDIA", _published)
SPECULATORS = Format("speculators", _speculators, prefix="layers.0.")


def format_of(config: Mapping[str, Any]) -> Format:
    """The format that a config.json is of."""
    if config.get("speculators_model_type") == "eagle3":
        return SPECULATORS
    return OWN if "feature_layers" in config else PUBLISHED
