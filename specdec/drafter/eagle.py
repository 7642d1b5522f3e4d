"""EAGLE (Li et al. 2401.15077): a one-layer head continues the target's last hidden states, and its lm_head reads them.

With structure=dynamic the trees are EAGLE-2's (2406.16858).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specdec.drafter._eagle import FeatureDrafter, Parsed
from specdec.drafter._head import check_embedding, load_head, operations
from specdec.nn.eagle1 import Eagle1Config, Eagle1Model

__all__ = ["Eagle"]


class Eagle(FeatureDrafter):
    """Drafts with an EAGLE-1 head; checkpoint: its folder or its name on the Hub, ours or SafeAILab's as safetensors."""

    kind = "EAGLE-1"

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Parsed:
        """A head's config.json, which is the same in both formats."""
        return Eagle1Config.from_dict(config), _rename, config.get("specdec", {})

    def load(self, target: Any) -> Eagle1Model:
        self.config.check(target.config)
        check_embedding(self.folder, target)
        model = load_head(Eagle1Model, self.config, self.folder, target, self.rename)
        model.pack(operations(target, self.config.layer), target.embed, target.lm_head)
        return model


def _rename(name: str) -> str | None:
    """Names are the checkpoint's; its embedding is the target's."""
    return None if name == "embed_tokens.weight" else name
