"""The runtime's own target: a Llama, Qwen3 or Llama 4 checkpoint over a static cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.nn import KVCache, ModelConfig, Shard
from specdec.target.backends import DTYPES, choose_backend, choose_device, choose_kv_dtype, open_mailbox, operations
from specdec.target.loading import make_model, open_source, parse_shard
from specdec.target.memory import check_cache
from specdec.target.ranks import RankError, join
from specdec.types import Acceptance, DraftTree, ModelInputs, ModelOutput, Vocabulary, ascending
from specdec.weights.checkpoint import Named

LONG = 2048  # tokens of one prompt that a GPU reads in a forward: enough to fill it
SHORT = 256  # what a CPU reads of one, and a GPU of several together, whose bits it keeps apart up to there


class Llama:
    """Implements `specdec.target.Target`. backend: "native" (compiled kernels), "torch", or "auto".

    With the native backend a token's logits do not depend on what shares its forward: chain or tree, any batch row, any
    number of tokens. quantize: "auto" as the checkpoint is, "fp8" while loading, "none" multiplied out. weights: "checkpoint",
    or "random" of the checkpoint's or a preset's sizes. Processes that torchrun started share one model; shard: "0/8" is the
    part of rank 0 of 8, by itself, and "0/1" the whole model in every process. kv_dtype: of the cache, "auto" or "fp8".
    exchange: how ranks on GPUs add up, "direct" through one another's memory, "nccl", or "auto". prefill_chunk: tokens of
    prompts that are read in one forward; None: of one prompt 2048 on a GPU and 256 on a CPU, of several together at most 256,
    so that a prompt's bits do not depend on its company.
    """

    def __init__(
        self,
        checkpoint: str | Path | None,
        dtype: str = "bfloat16",
        device: str = "auto",
        backend: str = "auto",
        prefill_chunk: int | None = None,
        threads: int | None = None,
        quantize: str = "auto",
        weights: str = "checkpoint",
        shard: str | None = None,
        preset: str | None = None,
        seed: int = 0,
        kv_dtype: str = "auto",
        exchange: str = "auto",
    ) -> None:
        part = None if shard is None else parse_shard(shard)
        source = open_source(checkpoint, preset, quantize, weights)
        options = dtype, device, backend, prefill_chunk, threads
        more: dict[str, Any] = {"quantized": source.quantized, "shard": part, "seed": seed}
        more |= {"kv_dtype": kv_dtype, "exchange": exchange}
        self._build(source.config, source.tensors, *options, **more)
        self.checkpoint: Path | None = source.folder
        self.tokenizer: Any = None if source.folder is None else load_tokenizer(source.folder)

    def _build(
        self,
        config: ModelConfig,
        tensors: Iterable[Named] | None,
        dtype: str,
        device: str,
        backend: str,
        prefill_chunk: int | None,
        threads: int | None,
        *,
        quantized: bool = False,
        shard: Shard | None = None,
        seed: int = 0,
        kv_dtype: str = "auto",
        exchange: str = "auto",
    ) -> None:
        """tensors None = random ones; shard None = this process's among those started together."""
        if dtype not in DTYPES:
            raise ValueError(f"target.dtype={dtype} is unknown; choose one of {', '.join(DTYPES)}")
        if prefill_chunk is not None and prefill_chunk < 1:
            raise ValueError(
                f"target.prefill_chunk={prefill_chunk} must be at least 1, or null for what suits the device"
            )
        if threads is not None:
            if threads < 1:
                raise ValueError(f"target.threads={threads} must be at least 1, or null for as many as torch finds")
            torch.set_num_threads(threads)
        self.config = config
        self.ranks = join() if shard is None else None
        self.shard = shard or (Shard(self.ranks.rank, self.ranks.world) if self.ranks else Shard())
        self.device = choose_device(device)
        if self.ranks:
            self.device = self.ranks.place(self.device)
        special = quantized or self.shard.world > 1
        self.backend = choose_backend(backend, self.device, config, special, self.ranks is not None)
        self.graphable = self.device.type == "cuda"
        self.shares_prompts = self.graphable and self.backend == "native"  # else it shows in the bits or gains nothing
        self._kv_dtype = choose_kv_dtype(kv_dtype, DTYPES[dtype], self.backend, self.device)
        usual = LONG if self.shares_prompts else SHORT
        self.prefill_chunk = usual if prefill_chunk is None else prefill_chunk
        self.prefill_shared = SHORT if prefill_chunk is None else prefill_chunk
        self._mailbox = open_mailbox(exchange, self.backend, self.device, self.ranks, config, DTYPES[dtype])
        model = make_model(config, tensors, DTYPES[dtype], self.device, quantized, self.shard, seed)
        self.embed = model.model.embed_tokens.weight.data
        self._head = self.embed if config.tie_word_embeddings else model.lm_head.weight.data
        model.pack(operations(self.backend, self.device, self.ranks, self._mailbox))
        self.model = model
        self.checkpoint = None
        self.tokenizer = None
        self.lengths = torch.zeros(0, dtype=torch.int32, device=self.device)
        self.cache: KVCache | None = None

    @cached_property
    def lm_head(self) -> Tensor:
        """[V, hidden]; ranks that share it gather it when it is first asked for, so each must ask."""
        if self.ranks is None or self.config.tie_word_embeddings:
            return self._head
        return self.ranks.gather(self._head).flatten(0, 1)

    def operations(self, config: ModelConfig) -> Any:
        """What a draft head of that config computes with: the kernels of this model if they can, whole on every rank."""
        asked = "auto" if self.backend == "native" else "torch"
        return operations(choose_backend(asked, self.device, config), self.device)

    def check(self) -> None:
        """RankError where a step on the device waited for a rank in vain."""
        if self._mailbox is not None and bool(self._mailbox.lost):
            raise RankError(
                f"a rank of {self.shard.world} stopped writing to the others, so what was computed since is void: see what it "
                "said, put that right and start all again"
            )

    def allocate(self, batch_size: int, max_len: int, num_nodes: int, features: Sequence[int | str] = ()) -> None:
        """Make room for rows of max_len tokens; an earlier cache is used again where it is large enough."""
        limit = self.config.max_positions
        if max_len > limit:
            raise ValueError(
                f"prompt and new tokens need {max_len} positions, the model has {limit}: shorten them or max_new_tokens"
            )
        for tap in features:
            if tap != "hidden" and tap not in range(self.config.num_layers):
                raise ValueError(
                    f'features tap layer {tap!r}; the target has layers 0 to {self.config.num_layers - 1} and "hidden"'
                )
        slots = max_len + num_nodes
        if self.cache is None or self.cache.keys.shape[1] != batch_size or self.cache.slots < slots:
            slots = slots + -slots % 256 if self.device.type == "cpu" else max(1024, 1 << (slots - 1).bit_length())
            block, ranks, dtype = self.model.ops.KEY_BLOCK, self.shard.world, self._kv_dtype
            self.cache = None
            check_cache(self.config, self.shard, dtype, batch_size * slots, self.device)
            self.cache = KVCache(self.config, batch_size, slots, dtype, self.device, block, ranks)
        self.model.set_positions(self.cache.slots)
        self.rope = self.model.cos, self.model.sin  # a captured graph keeps the tables it was captured with
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=self.device)
        self.features = tuple(features)

    def prefill(self, tokens: Tensor, lengths: Tensor) -> ModelOutput:
        """Prompts in chunks aligned to absolute positions; short ones share a forward where that leaves their bits alone."""
        assert self.cache is not None
        batch, width = tokens.shape
        size = self.config.hidden_size
        last = torch.zeros(batch, size, device=self.device)
        taps = len(self.features) * size
        features = torch.zeros(batch, width, taps, dtype=self.model.dtype, device=self.device) if taps else None
        sizes: list[int] = lengths.tolist()
        for rows in self._shares(sizes):
            if len(rows) == 1:
                last[rows[0]] = self._prefill_row(tokens, rows[0], sizes[rows[0]], features)
            else:
                last[rows] = self._prefill_rows(tokens, rows, lengths[rows], features)
        filled = lengths.to(self.device, torch.int32)
        self.lengths = torch.where(filled > 0, filled, self.lengths)
        return ModelOutput(self.model.logits(last)[:, None], features, self._vocabulary).whole()

    def _shares(self, sizes: Sequence[int]) -> list[list[int]]:
        """Rows that are read in one forward: as many as fill prefill_shared, padded to the longest of them."""
        if not self.shares_prompts:
            return [[row] for row, length in enumerate(sizes) if length]
        shares: list[list[int]] = []
        for row in sorted((row for row, length in enumerate(sizes) if length), key=lambda row: sizes[row]):
            if shares and (len(shares[-1]) + 1) * sizes[row] <= min(self.prefill_chunk, self.prefill_shared):
                shares[-1].append(row)
            else:
                shares.append([row])
        return shares

    def _prefill_row(self, tokens: Tensor, row: int, length: int, features: Tensor | None) -> Tensor:
        """One prompt, chunk by chunk, into the cache and its features; the stream behind its last token [1, H]."""
        assert self.cache is not None
        cache = self.cache.row(row)
        for start in range(0, length, self.prefill_chunk):
            stop = min(start + self.prefill_chunk, length)
            positions = torch.arange(start, stop, dtype=torch.int32, device=self.device)[None]
            prefix = torch.full((1,), start, dtype=torch.int32, device=self.device)
            chunk = ModelInputs(tokens[row : row + 1, start:stop], positions, prefix, begin=start)
            x, tapped = self.model(chunk, cache, self.features)
            if features is not None:
                features[row, start:stop] = tapped
        self.model.ops.flush(x)
        ends: Tensor = x[-1:]
        return ends

    def _prefill_rows(self, tokens: Tensor, rows: list[int], lengths: Tensor, features: Tensor | None) -> Tensor:
        """Several prompts in one forward over a cache of their own, which is then copied; their streams [rows, H]."""
        assert self.cache is not None
        width, count = int(lengths.max()), len(rows)
        held = self.cache.like(count, width)
        positions = torch.arange(width, dtype=torch.int32, device=self.device).repeat(count, 1)
        prefix = torch.zeros(count, dtype=torch.int32, device=self.device)
        x, tapped = self.model(ModelInputs(tokens[rows, :width], positions, prefix, begin=0), held, self.features)
        self.model.ops.flush(x)
        self.cache.put(rows, held)
        if features is not None:
            inside = positions < lengths.to(self.device)[:, None]
            features[rows, :width] = tapped.view(count, width, -1) * inside[..., None]
        at = torch.arange(count, device=self.device), lengths.to(self.device).long() - 1
        ends: Tensor = x.view(count, width, -1)[at]
        return ends

    def read(self, tokens: Tensor, lengths: Tensor, features: Sequence[int | str]) -> Tensor:
        """Features [B, T, F*H] of whole texts in one forward, 0 behind a row's length. It takes the cache.

        Faster on a GPU than `prefill`, which keeps the bits of a row apart from who shares the batch.
        """
        batch, width = tokens.shape
        self.allocate(batch, width, 0, features)
        places = torch.arange(width, dtype=torch.int32, device=self.device).repeat(batch, 1)
        texts = ModelInputs(tokens.to(self.device), places, torch.zeros_like(self.lengths), begin=0)
        tapped: Tensor = self.model(texts, self.cache, self.features)[1]
        return tapped.view(batch, width, -1) * (places < lengths.to(self.device)[:, None])[..., None]

    def verify(self, tree: DraftTree) -> ModelOutput:
        """Root and drafts in one forward; a chain needs no path lists. The logits are this rank's part."""
        self._chain = tree.is_chain
        paths = None if tree.is_chain else tree.paths()
        if paths is None:
            depths = ascending(0, tree.tokens.shape[1], self.device)
        else:
            depths = (paths >= 0).sum(-1, dtype=torch.int32) - 1
        return self._run(ModelInputs(tree.tokens, self.lengths[:, None] + depths, self.lengths, paths))

    def commit(self, acceptance: Acceptance) -> None:
        """A chain's accepted nodes lie where they belong already."""
        assert self.cache is not None
        if not self._chain:
            self.cache.keep_path(self.lengths, acceptance.path, acceptance.num_accepted)
        self.lengths.add_(acceptance.num_accepted).add_(1)

    def forward(self, inputs: ModelInputs, layers: int | None = None) -> ModelOutput:
        """Logits and features of every token of `inputs`."""
        return self._run(inputs, layers).whole()

    def _run(self, inputs: ModelInputs, layers: int | None = None) -> ModelOutput:
        assert self.cache is not None, "allocate first"
        batch, tokens = inputs.tokens.shape
        x, features = self.model(inputs, self.cache, () if layers is not None else self.features, layers)
        logits = self.model.logits(x).view(batch, tokens, -1)
        return ModelOutput(logits, None if features is None else features.view(batch, tokens, -1), self._vocabulary)

    @property
    def _vocabulary(self) -> Vocabulary | None:
        """The tokens whose logits a forward gives, where other ranks have the others'."""
        if self.ranks is None:
            return None
        return Vocabulary(self.ranks.rank * self.config.vocab_size // self.ranks.world, self.ranks.gather)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None where it has none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))
