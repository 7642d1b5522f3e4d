"""The runtime's own target: a Llama-family checkpoint over a static cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.kernels import reference
from specdec.nn import DecoderModel, KVCache, ModelConfig
from specdec.target import checkpoint as checkpoints
from specdec.types import Acceptance, DraftTree, ModelInputs, ModelOutput

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Llama:
    """Implements `specdec.target.Target`. backend: "native" (compiled CPU kernels), "torch", or "auto".

    With the native backend a token's logits do not depend on what shares its forward: chain or tree, any batch row, any
    number of tokens.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        dtype: str = "bfloat16",
        device: str = "auto",
        backend: str = "auto",
        prefill_chunk: int = 256,
        threads: int | None = None,
    ) -> None:
        folder = checkpoints.resolve(checkpoint)
        config = ModelConfig.from_huggingface(checkpoints.read_config(folder))
        self._build(config, checkpoints.iter_tensors(folder), dtype, device, backend, prefill_chunk, threads)
        self.checkpoint: Path | None = folder
        self.tokenizer: Any = load_tokenizer(folder)

    def _build(
        self,
        config: ModelConfig,
        tensors: Iterable[tuple[str, Tensor]],
        dtype: str,
        device: str,
        backend: str,
        prefill_chunk: int,
        threads: int | None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"target.dtype={dtype} is unknown; choose one of {', '.join(DTYPES)}")
        if prefill_chunk < 1:
            raise ValueError(f"target.prefill_chunk={prefill_chunk} must be at least 1")
        if threads is not None:
            torch.set_num_threads(threads)
        self.config = config
        self.device = choose_device(device)
        self.backend = choose_backend(backend, self.device, config)
        self.prefill_chunk = prefill_chunk
        model = DecoderModel(config, DTYPES[dtype]).to(self.device)
        checkpoints.load_state(model, tensors)
        self.embed = model.model.embed_tokens.weight.data
        self.lm_head = self.embed if config.tie_word_embeddings else model.lm_head.weight.data
        model.pack(operations(self.backend))
        self.model = model
        self.checkpoint = None
        self.tokenizer = None
        self.lengths = torch.zeros(0, dtype=torch.int32, device=self.device)
        self.cache: KVCache | None = None

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
            slots += -slots % 256
            block = self.model.ops.KEY_BLOCK
            self.cache = KVCache(self.config, batch_size, slots, self.model.dtype, self.device, block)
        self.model.set_positions(self.cache.slots)
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=self.device)
        self.features = tuple(features)

    def prefill(self, tokens: Tensor, lengths: Tensor) -> ModelOutput:
        """Rows one at a time, in chunks aligned to absolute positions."""
        assert self.cache is not None
        batch, width = tokens.shape
        size = self.config.hidden_size
        last = torch.zeros(batch, size, device=self.device)
        taps = len(self.features) * size
        features = torch.zeros(batch, width, taps, dtype=self.model.dtype, device=self.device) if taps else None
        for row, length in enumerate(lengths.tolist()):
            if length == 0:
                continue
            cache = self.cache.row(row)
            for start in range(0, length, self.prefill_chunk):
                stop = min(start + self.prefill_chunk, length)
                positions = torch.arange(start, stop, dtype=torch.int32, device=self.device)[None]
                prefix = torch.full((1,), start, dtype=torch.int32, device=self.device)
                inputs = ModelInputs(tokens[row : row + 1, start:stop], positions, prefix)
                x, tapped = self.model(inputs, cache, self.features)
                if features is not None:
                    features[row, start:stop] = tapped
            last[row] = x[-1]
        filled = lengths.to(self.device, torch.int32)
        self.lengths = torch.where(filled > 0, filled, self.lengths)
        return ModelOutput(self.model.logits(last)[:, None], features)

    def verify(self, tree: DraftTree) -> ModelOutput:
        """Root and drafts in one forward; a chain needs no path lists."""
        self._chain = tree.is_chain
        paths = None if tree.is_chain else tree.paths()
        if paths is None:
            depths = torch.arange(tree.tokens.shape[1], dtype=torch.int32, device=self.device)
        else:
            depths = (paths >= 0).sum(-1, dtype=torch.int32) - 1
        return self.forward(ModelInputs(tree.tokens, self.lengths[:, None] + depths, self.lengths, paths))

    def commit(self, acceptance: Acceptance) -> None:
        """A chain's accepted nodes lie where they belong already."""
        assert self.cache is not None
        if not self._chain:
            self.cache.keep_path(self.lengths, acceptance.path, acceptance.num_accepted)
        self.lengths = self.lengths + (acceptance.num_accepted + 1)

    def forward(self, inputs: ModelInputs, layers: int | None = None) -> ModelOutput:
        """Logits and features of every token of `inputs`."""
        assert self.cache is not None, "allocate first"
        batch, tokens = inputs.tokens.shape
        x, features = self.model(inputs, self.cache, () if layers is not None else self.features, layers)
        logits = self.model.logits(x).view(batch, tokens, -1)
        return ModelOutput(logits, None if features is None else features.view(batch, tokens, -1))


def choose_device(device: str) -> torch.device:
    """ "auto" is the GPU where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"target.device={device}, but torch {torch.__version__} finds no GPU: use target.device=cpu")
    return torch.device(device)


def choose_backend(backend: str, device: torch.device, config: ModelConfig) -> str:
    """ "auto" is native on the CPU where the shapes allow it, torch elsewhere; asking for native must be possible."""
    if backend not in ("auto", "native", "torch"):
        raise ValueError(f"target.backend={backend} is unknown; choose auto, native or torch")
    fits = device.type == "cpu" and config.head_dim % 32 == 0
    fits = fits and config.hidden_size % 16 == 0 and config.intermediate_size % 16 == 0
    if backend == "native" and not fits:
        raise ValueError(
            f"target.backend=native needs the CPU, head_dim a multiple of 32, hidden and intermediate sizes of 16; got "
            f"{device.type}, {config.head_dim}, {config.hidden_size} and {config.intermediate_size}: use target.backend=torch"
        )
    return "torch" if backend == "torch" or not fits else "native"


def operations(backend: str) -> Any:
    """The module of kernels behind a backend's name; compiled ones are imported only when asked for."""
    if backend == "native":
        from specdec.kernels.cpu import ops

        return ops
    return reference


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None where it has none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))
