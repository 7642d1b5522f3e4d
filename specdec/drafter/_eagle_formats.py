"""Published EAGLE-3 heads in our words: config.json and names of tensors of other projects' checkpoints.

Layer ids: ours name the stream behind a layer, from 0. Two conventions are in use, one apart: "before layer i" (SafeAILab,
vLLM, speculators) is our i - 1, "after layer i" (NVIDIA, SGLang: `eagle_config`) is our i. A head read with the wrong one
still drafts, only worse; so every format states its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from specdec.nn.eagle import ARCHITECTURE

__all__ = ["Format", "format_of"]

_UNKNOWN = {"norm_before_fc": "an RMSNorm over all features at once", "use_mtp_layernorm": "MTP's layer norms"}


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
    inner = config.get("eagle_config") or {}
    layers = inner.get("eagle_aux_hidden_state_layer_ids") or config.get("eagle_aux_hidden_state_layer_ids")
    _refuse({**config, **inner})
    return {**config, "feature_layers": layers}


def _speculators(config: Mapping[str, Any]) -> dict[str, Any]:
    """vllm-project/speculators: the layer's config inside, layers counted before."""
    _refuse(config)
    layers = config.get("eagle_aux_hidden_state_layer_ids")
    switches = {key: config[key] for key in ("norm_before_residual", "norm_output", "fc_norm") if key in config}
    return {
        **config["transformer_layer_config"],
        **switches,
        "architectures": [ARCHITECTURE],
        "draft_vocab_size": config.get("draft_vocab_size"),
        "feature_layers": None if layers is None else [layer - 1 for layer in layers],
    }


def _refuse(config: Mapping[str, Any]) -> None:
    for key, meaning in _UNKNOWN.items():
        if config.get(key):
            raise ValueError(f"{key} is on ({meaning}), which is not computed here: take a head without it")


OWN = Format("specdec", _own)
PUBLISHED = Format("SafeAILab, SpecForge or NVIDIA", _published)
SPECULATORS = Format("speculators", _speculators, prefix="layers.0.")


def format_of(config: Mapping[str, Any]) -> Format:
    """The format that a config.json is of."""
    if config.get("speculators_model_type") == "eagle3":
        return SPECULATORS
    return OWN if "feature_layers" in config else PUBLISHED
