"""The GPU's judge of draft laws against the torch losses and autograd: in the interpreter, or on a GPU as compiled."""

from __future__ import annotations

import interpreter
import pytest
import torch
from _cross_compile import Job, compile_kernels
from torch import Tensor

from specdec.kernels.gpu import loss as gpu_loss
from specdec.train.losses import LOSSES, Judge, Law, target_law

DEVICE, ETA = torch.device("cuda" if torch.cuda.is_available() else "cpu"), 2.0
N, VOCAB, DRAFTS = 6, 75, 50
if DEVICE.type == "cpu":
    interpreter.install()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several turns of every loop, the last one not full."""
    monkeypatch.setattr(gpu_loss, "BLOCK", 16)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Law]:
    """Logits and the law of six tokens: one certain, one outside the draft vocabulary, one whose argmax the draft has right."""
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:DRAFTS].sort().values
    target, logits = 2 * randn(N, VOCAB, seed=2), (2 * randn(N, DRAFTS, seed=3)).to(dtype)
    outside = next(i for i in range(VOCAB) if i not in ids.tolist())
    target[0, ids[30]], target[1, outside], target[2, ids[int(logits[2].argmax())]] = 40.0, 60.0, 20.0
    index = torch.full((VOCAB,), -1)
    index[ids] = torch.arange(DRAFTS)
    text = torch.tensor([ids[3], outside, ids[0], ids[-1], outside, ids[7]])
    return logits, target_law(target, torch.eye(VOCAB), text, ids, index)


def judged(logits: Tensor, law: Law, name: str, slope: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, measures [n, 3] and gradient from the kernel, on the host."""
    leaf = logits.to(DEVICE).requires_grad_()
    label = law.text if name == "text" else law.best
    loss, found = gpu_loss.Judged.apply(  # type: ignore[no-untyped-call]
        leaf, *(x.to(DEVICE) for x in (law.probs, law.best, label)), name, ETA
    )
    (grad,) = torch.autograd.grad(loss * slope, leaf)
    return loss.detach().cpu(), found.cpu(), grad.cpu()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_loss_measures_and_gradient(name: str) -> None:
    logits, law = case()
    leaf = logits.requires_grad_()
    wanted, sums = Judge(name, ETA)(leaf, law)
    (slope,) = torch.autograd.grad(wanted * 0.5, leaf)
    loss, found, grad = judged(logits.detach(), law, name, 0.5)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double().sum(0), sums[:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, slope, rtol=1e-4, atol=1e-6)
    assert found[2, 2] == 1
    assert 0 < found[:, 2].sum() < N


def test_bfloat16_logits_have_bfloat16_gradients() -> None:
    logits, law = case(torch.bfloat16)
    leaf = logits.float().requires_grad_()
    (slope,) = torch.autograd.grad(Judge("kl", ETA)(leaf, law)[0], leaf)
    _, _, grad = judged(logits, law, "kl")
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.float(), slope, rtol=8e-3, atol=1e-6)


def test_the_law_that_a_draft_vocabulary_sees() -> None:
    target = 3 * randn(N, VOCAB, seed=5)
    target[0, 3] = target[0, 40] = 20.0  # of equals the first
    ids = torch.tensor([0, 3, 4, 40, 74])
    probs, best = (x.cpu() for x in gpu_loss.seen_law(target.to(DEVICE), ids.to(DEVICE)))
    torch.testing.assert_close(probs, target.softmax(-1)[:, ids], rtol=1e-5, atol=1e-7)
    assert best.tolist() == target.argmax(-1).tolist()


def test_nothing_to_judge() -> None:
    logits, law = case()
    none = torch.zeros(0, dtype=torch.int64)
    loss, found, grad = judged(logits[none], law[none], "hybrid")
    assert loss == 0
    assert found.shape == (0, 3)
    assert grad.shape == (0, DRAFTS)


def test_what_training_launches_compiles() -> None:
    """For Hopper and Blackwell, nothing spilled."""
    module, jobs = "specdec.kernels.gpu.loss", []
    for arch in (90, 100):
        law = {"logits": "*fp32", "ids": "*i64", "probs": "*fp32", "best": "*i64", "V": "i32", "W": "i32"}
        jobs.append(Job(module, "law_kernel", law, {"BLOCK": 4096}, arch, {"num_warps": 8}))
        judge = {
            "logits": "*bf16", "probs": "*fp32", "best": "*i64", "label": "*i64", "found": "*fp32", "grad": "*bf16",
            "W": "i32", "eta": "fp32",
        }  # fmt: skip
        for name in LOSSES:
            constants = {"LOSS": name, "BLOCK": 4096}
            jobs.append(Job(module, "judge_kernel", judge, constants, arch, {"num_warps": 8}))
    assert [found.spills for found in compile_kernels(jobs)] == [0] * len(jobs)
