"""EAGLE-3 (Li et al. 2503.01840): a one-layer head drafts from the features of several of the target's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from specdec.drafter._eagle import FeatureDrafter, Parsed
from specdec.drafter._eagle_formats import format_of
from specdec.drafter._head import check_embedding, load_head, operations
from specdec.nn import EagleConfig, EagleModel

__all__ = ["Eagle3"]


class Eagle3(FeatureDrafter):
    """Drafts with an EAGLE-3 head; checkpoint: its folder, the name of one that ships, or one on the Hub (`_eagle_formats`)."""

    kind = "EAGLE-3"

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Parsed:
        """A head's config.json, in whichever format it is."""
        found = format_of(config)
        return EagleConfig.from_dict(found.translate(config)), found.rename, config.get("specdec", {})

    def load(self, target: Any) -> EagleModel:
        self.config = self.config.for_target(target.config)
        self.features = self.config.feature_layers
        check_embedding(self.folder, target)
        model = load_head(EagleModel, self.config, self.folder, target, self.rename)
        model.pack(operations(target, self.config.layer), target.embed)
        return model
