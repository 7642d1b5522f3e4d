"""Training a draft head for a target: text the target writes itself, the head, and the loop that trains it."""

from __future__ import annotations

from specdec.train.corpus import Batch, Corpus
from specdec.train.features import CachedFeatures, Features, FeatureSource, cache_features
from specdec.train.generate import Recipe, write_corpus
from specdec.train.turns import DatasetText, SelfText
from specdec.train.vocabulary import coverage, draft_vocabulary, special_tokens

__all__ = [
    "Batch",
    "CachedFeatures",
    "Corpus",
    "DatasetText",
    "FeatureSource",
    "Features",
    "Recipe",
    "SelfText",
    "cache_features",
    "coverage",
    "draft_vocabulary",
    "special_tokens",
    "write_corpus",
]
