"""Any causal language model of transformers as a target: for breadth of models. `target=llama` is the fast one.

Shapes: B rows, T tokens of this forward, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from specdec.kernels import reference
from specdec.target._huggingface import SlotCache, Taps
from specdec.target.backends import DTYPES, choose_device
from specdec.target.llama import load_tokenizer
from specdec.types import Acceptance, DraftTree, ModelInputs, ModelOutput
from specdec.weights import checkpoint as checkpoints

ATTENTION = ("sdpa", "eager")  # what takes any mask


@dataclass(frozen=True, slots=True)
class HuggingFaceConfig:
    """What the framework asks of any model. eos_token_ids: where the model's own `generate` stops."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    eos_token_ids: tuple[int, ...]


class HuggingFace:
    """Implements `specdec.target.Target` over a transformers model with full attention in every layer.

    A forward reads one number on the host (`widest`), and its bits may depend on what shares it: greedy output equals
    plain decoding but for near ties.
    """

    graphable = False  # transformers decides on the host what to launch

    def __init__(
        self,
        checkpoint: str | Path,
        dtype: str = "bfloat16",
        device: str = "auto",
        attn_implementation: str = "sdpa",
        prefill_chunk: int = 256,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"target.dtype={dtype} is unknown; choose one of {', '.join(DTYPES)}")
        if attn_implementation not in ATTENTION:
            raise ValueError(
                f"target.attn_implementation={attn_implementation} cannot take a tree's mask; "
                f"choose one of {', '.join(ATTENTION)}"
            )
        if prefill_chunk < 1:
            raise ValueError(f"target.prefill_chunk={prefill_chunk} must be at least 1")
        folder = checkpoints.resolve(checkpoint)
        checkpoints.read_config(folder)
        self.device = choose_device(device)
        self.model: Any = load_model(folder, DTYPES[dtype], attn_implementation).to(self.device)
        self.config = read_sizes(self.model)
        self.embed: Tensor = self.model.get_input_embeddings().weight.data
        self.lm_head: Tensor = self.model.get_output_embeddings().weight.data
        self.checkpoint: Path | None = folder
        self.tokenizer: Any = load_tokenizer(folder)
        self.prefill_chunk = prefill_chunk
        self.lengths = torch.zeros(0, dtype=torch.int32, device=self.device)
        self.cache: SlotCache | None = None
        self._taps = Taps(self.model, self.config.num_layers)

    def allocate(self, batch_size: int, max_len: int, num_nodes: int, features: Sequence[int | str] = ()) -> None:
        """Room for rows of max_len tokens and a tree behind them."""
        limit = self.config.max_positions
        if max_len > limit:
            raise ValueError(
                f"prompt and new tokens need {max_len} positions, the model has {limit}: shorten them or max_new_tokens"
            )
        self._taps.choose(features)
        self.cache = SlotCache(self.config.num_layers, batch_size, max_len + num_nodes)
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=self.device)

    def prefill(self, tokens: Tensor, lengths: Tensor) -> ModelOutput:
        """Rows one at a time, in chunks, so that a row's state does not depend on what waits beside it."""
        batch, width = tokens.shape
        logits = torch.zeros(batch, 1, self.config.vocab_size, device=self.device)
        features: Tensor | None = None
        for row, length in enumerate(lengths.tolist()):
            for start in range(0, length, self.prefill_chunk):
                stop = min(start + self.prefill_chunk, length)
                positions = torch.arange(start, stop, dtype=torch.int32, device=self.device)[None]
                prefix = torch.full((1,), start, dtype=torch.int32, device=self.device)
                inputs = ModelInputs(tokens[row : row + 1, start:stop], positions, prefix)
                output = self._run(inputs, slice(row, row + 1), last_only=True)
                logits[row] = output.logits[0, -1:]
                if output.features is not None:
                    if features is None:
                        features = output.features.new_zeros(batch, width, output.features.shape[2])
                    features[row, start:stop] = output.features[0]
        filled = lengths.to(self.device, torch.int32)
        self.lengths = torch.where(filled > 0, filled, self.lengths)
        return ModelOutput(logits, features)

    def verify(self, tree: DraftTree) -> ModelOutput:
        """Root and drafts in one forward."""
        self._is_chain = tree.is_chain
        paths = None if tree.is_chain else tree.paths()
        positions = self.lengths[:, None] + tree.node_depths()
        return self.forward(ModelInputs(tree.tokens, positions, self.lengths, paths))

    def commit(self, acceptance: Acceptance) -> None:
        """A chain's accepted nodes lie where they belong already."""
        assert self.cache is not None
        if not self._is_chain:
            self.cache.keep_path(self.lengths, acceptance.path, acceptance.num_accepted)
        self.lengths = self.lengths + (acceptance.num_accepted + 1)

    def check(self) -> None:
        """Nothing goes wrong unseen."""

    def forward(self, inputs: ModelInputs, layers: int | None = None) -> ModelOutput:
        """Logits and features of every token of `inputs`."""
        if layers is not None:
            raise ValueError(
                f"target=huggingface runs all its layers, not the first {layers} alone: use target=llama for early exit"
            )
        return self._run(inputs, slice(None))

    @torch.no_grad()
    def _run(self, inputs: ModelInputs, rows: slice, last_only: bool = False) -> ModelOutput:
        """One call of the model over some rows of the cache. last_only: logits [B, 1, V] of the last token."""
        assert self.cache is not None, "allocate first"
        first = inputs.prefix_lens + inputs.offset
        index = first[:, None] + torch.arange(inputs.tokens.shape[1], device=self.device)
        slots = widest(index)
        self.cache.aim(rows, index.long(), slots)
        dtype = self.model.dtype
        hidden = ~reference.visible(inputs, slots)[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, torch.finfo(dtype).min)
        # a draft beyond the last position is never emitted, but a table of positions must have a row for it
        positions = inputs.positions.long().clamp(max=self.config.max_positions - 1)
        output = self.model(
            input_ids=inputs.tokens,
            attention_mask=mask,
            position_ids=positions.expand(inputs.tokens.shape),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1 if last_only else 0,
        )
        return ModelOutput(output.logits.float(), self._taps.collect())


def widest(index: Tensor) -> int:
    """Slots in use by the longest row: one host read a forward, which spares attention the empty slots behind it."""
    return int(index.max()) + 1


def load_model(folder: Path, dtype: torch.dtype, attn_implementation: str) -> Any:
    """The checkpoint's model, complete and silent: safetensors only, no code from the checkpoint, every key used."""
    with quiet():
        try:
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
            check_cache(config)
            model, report = AutoModelForCausalLM.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that they are in the report
            )
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{folder} cannot be loaded ({error}): it needs whole safetensors files, fetch the checkpoint again"
            ) from error
    check_interface(model)
    faults = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(faults.values()):
        found = "; ".join(f"{kind.replace('_', ' ')}: {names[:3]}" for kind, names in faults.items() if names)
        raise ValueError(f"the checkpoint does not fit {type(model).__name__} ({found}): fetch it again")
    checkpoints.check_loaded(model)
    return model.eval().requires_grad_(False)


def check_cache(config: Any) -> None:
    """ValueError unless every layer keeps the keys of all tokens: only then can a slot be rolled back."""
    kinds = sorted({type(layer).__name__ for layer in DynamicCache(config=config).layers} - {"DynamicLayer"})
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo's window does not show in its cache
        kinds.append("local attention")
    if kinds:
        raise ValueError(
            f"model_type {config.model_type!r} uses {', '.join(kinds)}; target=huggingface needs full attention "
            "in every layer, because drafts in a window or a recurrent state cannot be taken back: choose another model"
        )


def check_interface(model: Any) -> None:
    """ValueError unless the model takes what a tree needs: a cache, a mask, and positions of its nodes."""
    needed = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
    lacking = sorted(needed - set(inspect.signature(model.forward).parameters))
    if getattr(model, "_is_stateful", False) or getattr(model.config, "alibi", False):
        lacking = lacking or ["a cache of keys addressed by position"]
    if lacking or model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} does not offer {', '.join(lacking) or 'an output head'}, which draft trees need: "
            "choose another model"
        )


def read_sizes(model: Any) -> HuggingFaceConfig:
    """The sizes of a loaded model, under the framework's names."""
    config = model.config.get_text_config(decoder=True)
    eos = model.generation_config.eos_token_id
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        raise ValueError(
            f"config.json of {type(model).__name__} has no max_position_embeddings: add the longest context"
        )
    return HuggingFaceConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        max_positions=limit,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off the terminal; errors still raise."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
