"""Any transformers model as a target: against the model's own generate, against our Llama, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import (
    SCENARIOS,
    TOLERANCE,
    VOCAB,
    accept,
    check_taps,
    error,
    llama_config,
    plain_greedy,
    random_chain,
    random_text,
    random_tree,
    save_model,
    start,
)
from safetensors.torch import load_file, save_file
from transformers import (
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
    RwkvConfig,
)

from specdec.decoding import SpeculativeDecoder
from specdec.drafter.ngram import NGram
from specdec.drafter.none import NoDraft
from specdec.drafter.token_recycling import TokenRecycling
from specdec.target import Target
from specdec.target.huggingface import HuggingFace
from specdec.target.llama import Llama
from specdec.types import Acceptance
from specdec.verifier.target_only import TargetOnly

SMALL: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
MORE: dict[str, Any] = SMALL | {"intermediate_size": 96, "eos_token_id": None, "bos_token_id": None}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": llama_config(),
    "qwen3": Qwen3Config(**MORE, num_key_value_heads=2, head_dim=24),
    "gpt_neox": GPTNeoXConfig(**MORE),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4, n_positions=128, eos_token_id=None),
}
NORMS = {
    "llama": "model.norm",
    "qwen3": "model.norm",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "gpt2": "transformer.ln_f",
}
PROMPTS = [random_text(length, length) for length in (7, 23, 1, 12)] + [[3, 1, 4, 1, 5] * 4]


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, HuggingFace]:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_model(CONFIGS[request.param], folder)
    return folder, model, HuggingFace(folder, dtype="float32", device="cpu", prefill_chunk=16)


@pytest.fixture(scope="module")
def answers(saved: tuple[Path, Any, HuggingFace]) -> list[list[int]]:
    """What the model's own `generate` says to PROMPTS."""
    return [plain_greedy(saved[1], prompt, 32) for prompt in PROMPTS]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_agrees_with_plain_forwards(saved: tuple[Path, Any, HuggingFace], scenario: Any) -> None:
    scenario(saved[2], saved[1])


def test_taps(saved: tuple[Path, Any, HuggingFace]) -> None:
    _, model, target = saved
    check_taps(target, model, model.get_submodule(NORMS[model.config.model_type]))


class Counting(TokenRecycling):
    """Counts the drafts that were accepted."""

    accepted = 0

    def observe(self, tree: Any, output: Any, acceptance: Acceptance) -> None:
        super().observe(tree, output, acceptance)
        self.accepted += int(acceptance.num_accepted.clamp(min=0).sum())


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("drafter", ["none", "ngram", "token_recycling"])
def test_greedy_equals_generate(
    saved: tuple[Path, Any, HuggingFace], answers: list[list[int]], drafter: str, batch_size: int
) -> None:
    """Five prompts of unequal lengths over one or three rows: rows are filled again while others run."""
    tree = Counting(num_draft_tokens=12, top_k=4, max_depth=4)
    drafters = {"none": NoDraft(), "ngram": NGram(), "token_recycling": tree}
    decoder = SpeculativeDecoder(saved[2], drafters[drafter], TargetOnly(), batch_size=batch_size)
    assert decoder.generate(PROMPTS, max_new_tokens=32).tokens == answers
    assert tree.accepted > 0 or drafter != "token_recycling"


def test_stops_where_generate_stops(tmp_path: Path) -> None:
    model = save_model(llama_config(), tmp_path)
    answer = plain_greedy(model, PROMPTS[0], 12)
    model.generation_config.eos_token_id = [answer[5], VOCAB - 1]
    model.save_pretrained(tmp_path)
    target = HuggingFace(tmp_path, dtype="float32")
    assert target.config.eos_token_ids == (answer[5], VOCAB - 1)
    result = SpeculativeDecoder(target, NGram(), TargetOnly()).generate([PROMPTS[0]], max_new_tokens=12)
    assert result.tokens == [plain_greedy(model, PROMPTS[0], 12)] == [answer[: answer.index(answer[5]) + 1]]


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_agrees_with_our_llama(tmp_path: Path, attn_implementation: str) -> None:
    """Prefill, a tree, a decode step and a chain, features included, on the same folder."""
    save_model(llama_config(), tmp_path)
    ours = Llama(tmp_path, dtype="float32")
    theirs = HuggingFace(tmp_path, dtype="float32", attn_implementation=attn_implementation)
    texts = [random_text(length, length) for length in (30, 4, 11)]
    filled = [start(target, texts, [0, 2, "hidden"]) for target in (ours, theirs)]
    assert error(filled[1].logits, filled[0].logits) < TOLERANCE
    assert error(filled[1].features, filled[0].features) < TOLERANCE
    steps = [(random_tree(3, 1), (6, 7, 0)), (random_chain(3, 1, 2), (0, 0, 0)), (random_chain(3, 5, 3), (2, 4, 0))]
    for tree, last in steps:
        outputs = [target.verify(tree) for target in (ours, theirs)]
        assert error(outputs[1].logits, outputs[0].logits) < TOLERANCE
        features = [output.features for output in outputs]
        assert features[0] is not None
        assert features[1] is not None
        assert error(features[1], features[0]) < TOLERANCE
        copy = [list(text) for text in texts]
        accept(ours, copy, tree, last)
        accept(theirs, texts, tree, last)


def test_attributes(saved: tuple[Path, Any, HuggingFace]) -> None:
    folder, model, target = saved
    assert isinstance(target, Target)
    assert target.checkpoint == folder
    assert target.tokenizer is None
    assert target.config.eos_token_ids == ()
    assert (target.config.vocab_size, target.config.num_layers) == (VOCAB, 3)
    assert target.config.hidden_size == target.embed.shape[1] == target.lm_head.shape[1]
    assert torch.equal(target.lm_head, model.get_output_embeddings().weight)


def test_the_last_position_of_learned_positions(tmp_path: Path) -> None:
    """Drafts beyond the last position do not fall out of GPT-2's table, and change nothing."""
    model = save_model(CONFIGS["gpt2"], tmp_path)
    decoder = SpeculativeDecoder(HuggingFace(tmp_path, dtype="float32"), Counting(12, 4, 4), TargetOnly())
    prompt = random_text(108, 1)
    assert decoder.generate([prompt], max_new_tokens=20).tokens == [plain_greedy(model, prompt, 20)]
    with pytest.raises(ValueError, match="need 129 positions, the model has 128"):
        decoder.generate([prompt], max_new_tokens=21)


def test_loading_is_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_model(llama_config(num_hidden_layers=1), tmp_path)
    capfd.readouterr()
    HuggingFace(tmp_path)
    assert capfd.readouterr() == ("", "")


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=8), "DynamicSlidingWindowLayer"),
        (MambaConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=1), "LinearAttentionLayer"),
        (
            GPTNeoConfig(vocab_size=VOCAB, hidden_size=64, num_layers=2, attention_types=[[["global", "local"], 1]]),
            "local attention",
        ),
        (RwkvConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2), "does not offer past_key_values"),
        (BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=1, n_head=4), "does not offer position_ids"),
        (FalconConfig(**SMALL, alibi=True), "a cache of keys addressed by position"),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_unsupported_models(tmp_path: Path, config: PreTrainedConfig, message: str) -> None:
    save_model(config, tmp_path)
    with pytest.raises(ValueError, match=f"{message}.*choose another model"):
        HuggingFace(tmp_path, dtype="float32", attn_implementation="eager")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "target.dtype=int8 is unknown"),
        ({"attn_implementation": "flash_attention_2"}, "flash_attention_2 cannot take a tree's mask"),
        ({"prefill_chunk": 0}, "target.prefill_chunk=0"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HuggingFace(tmp_path, **options)


def test_early_exit_names_the_remedy(saved: tuple[Path, Any, HuggingFace]) -> None:
    with pytest.raises(ValueError, match="use target=llama"):
        saved[2].forward(None, layers=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight"), "missing keys.*up_proj"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected keys.*extra"),
        (lambda t: t["model.norm.weight"].fill_(torch.nan), "norm.weight hold NaN"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), "mismatched keys.*norm.weight"),
    ],
    ids=["missing", "leftover", "nan", "shape"],
)
def test_bad_weights(tmp_path: Path, edit: Any, message: str) -> None:
    save_model(llama_config(num_hidden_layers=1), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        HuggingFace(tmp_path)


def test_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        HuggingFace(tmp_path)
    save_model(llama_config(num_hidden_layers=1), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="fetch the checkpoint again"):
        HuggingFace(tmp_path)
    path.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="needs whole safetensors files"):
        HuggingFace(tmp_path)
