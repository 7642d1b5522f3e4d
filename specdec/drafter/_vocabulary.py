"""The vocabularies of a draft model and a target of different tokenizers: token-level intersection (TLI, 2502.05202, Alg. 4).

Shapes: V token ids of the target, S tokens that both vocabularies spell alike.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["SharedVocabulary", "shared_vocabulary"]

MIN_SHARE = 0.01  # of the target's tokens: below it hardly a draft can be right
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # sentencepiece's byte fallback
_AS_THEY_ARE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that byte-level BPE writes as Latin-1
_OTHERS = [byte for byte in range(256) if byte not in _AS_THEY_ARE]  # and those that it writes from U+0100 on, in order
_BYTE_LEVEL = {chr(i): i for i in _AS_THEY_ARE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """What a draft model may draft, and what it reads for each of the target's tokens, on the device."""

    target_ids: Tensor  # int64 [S]  ascending
    draft_ids: Tensor  # int64 [S]  of the same tokens
    read_as: Tensor  # int64 [V]  draft id of a token: its own, else that of its longest end the draft model has, else 0


def shared_vocabulary(model: Any, target: Any) -> SharedVocabulary | None:
    """None where token ids mean the same to both models; without two tokenizers the number of ids has to tell.

    Warns of the share of the target's tokens that is left; ValueError where that is too small, or nothing can be compared.
    """
    sizes = model.config.vocab_size, target.config.vocab_size
    tokenizers = getattr(model, "tokenizer", None), getattr(target, "tokenizer", None)
    vocabs = [tokenizer.get_vocab() for tokenizer in tokenizers if tokenizer is not None]
    if sizes[0] == sizes[1] and (len(vocabs) < 2 or vocabs[0] == vocabs[1]):
        return None
    if len(vocabs) < 2:
        raise ValueError(
            f"the draft model has {sizes[0]} token ids, the target {sizes[1]}; choose a draft model of the target's family, or "
            "put its tokenizer into the folder of each that has none, and tokens are matched by their spelling"
        )
    names = [spellings(vocab, size) for vocab, size in zip(vocabs, sizes, strict=True)]
    draft_id, target_id = ({spelling: i for i, spelling in each.items()} for each in names)
    shared = sorted(draft_id.keys() & target_id.keys(), key=target_id.__getitem__)
    _check_share(len(shared), len(target_id))
    read_as = [0] * sizes[1]
    for i, spelling in names[1].items():
        ends = (spelling[first:] for first in range(len(spelling)))
        read_as[i] = next((draft_id[end] for end in ends if end in draft_id), 0)
    ids = [target_id[spelling] for spelling in shared], [draft_id[spelling] for spelling in shared], read_as
    return SharedVocabulary(*(torch.tensor(each, device=target.lengths.device) for each in ids))


def spellings(vocab: Mapping[str, int], size: int) -> dict[int, bytes]:
    """The bytes that each id below `size` writes, whichever way the vocabulary notes them.

    The mark on words behind a space says which: "Ġ" in byte-level BPE, "▁" in sentencepiece, neither where names are texts.
    Of ids that write the same the last is what a tokenizer makes: byte fallbacks stand first here, added tokens last.
    """
    marks = Counter(name[:1] for name in vocab)
    byte_level = marks["Ġ"] > marks["▁"]
    order = sorted(vocab.items(), key=lambda entry: (_BYTE.fullmatch(entry[0]) is None, entry[1]))
    return {i: _spell(name, byte_level) for name, i in order if i < size}


def _spell(name: str, byte_level: bool) -> bytes:
    """The bytes behind a token's name; special tokens of a byte-level vocabulary are texts."""
    if byte_level:
        return bytes(_BYTE_LEVEL[c] for c in name) if _BYTE_LEVEL.keys() >= set(name) else name.encode()
    return bytes([int(name[1:-1], 16)]) if _BYTE.fullmatch(name) else name.replace("▁", " ").encode()


def _check_share(shared: int, total: int) -> None:
    """ValueError where too little is shared to draft from, a warning where not everything is."""
    if shared <= MIN_SHARE * total:
        raise ValueError(
            f"the draft model's vocabulary has {shared} of the target's {total} tokens, and more than {MIN_SHARE:.0%} are "
            "needed to draft with: choose a draft model whose tokenizer is nearer to the target's"
        )
    if shared < total:
        warnings.warn(
            f"the draft model's vocabulary has {shared} of the target's {total} tokens ({shared / total:.0%}): it drafts these "
            "alone and reads the ends of others, so fewer drafts are accepted than with a tokenizer like the target's",
            stacklevel=4,
        )
