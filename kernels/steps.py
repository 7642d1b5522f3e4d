"""The small operations around a forward: choosing, looking up, keeping books. Plain torch here; elsewhere one call each.

A step has dozens of torch calls. On the CPU each starts cold, some tens of microseconds, because a forward has streamed the
weights through the caches; on the GPU each is a launch, a microsecond even inside a CUDA graph. Both have compiled forms for
that. Fake tensors and other devices take the torch form, so all must agree to the bit.

Shapes: B rows, N nodes, L token buffer, E = D + 1 tokens a step can emit, K drafts, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BLOCK = 64  # logits reduced at a time by the torch form of argmax
LENGTH, STOP = 1, 2  # why a row ended


def common_device(*tensors: Tensor) -> str:
    """ "cpu" or "cuda" where all tensors have memory there; "" elsewhere, on mixed devices and under fake modes."""
    kinds = {x.device.type if type(x) is Tensor else "" for x in tensors}
    if torch._C._len_torch_dispatch_stack() or len(kinds) > 1:
        return ""
    kind = kinds.pop()
    return kind if kind in ("cpu", "cuda") else ""


def _compiled(*tensors: Tensor) -> Any:
    """The compiled forms for the device of all tensors, or None; each is imported when first needed."""
    kind = common_device(*tensors)
    if kind == "cuda":
        from specdec.kernels.gpu import steps as gpu_steps

        return gpu_steps
    if kind == "cpu":
        from specdec.kernels.cpu import steps as cpu_steps

        return cpu_steps
    return None


def argmax(logits: Tensor) -> Tensor:
    """Index of the largest logit, the lowest one on a tie. [..., V] -> int64 [...]."""
    compiled = _compiled(logits) if logits.dtype == torch.float32 and logits.is_contiguous() else None
    return argmax_reference(logits) if compiled is None else compiled.argmax(logits)


def argmax_reference(logits: Tensor) -> Tensor:
    """In two stages, because torch's maximum runs on vectors and its argmax does not: blocks, then within the best."""
    size = logits.shape[-1]
    if size % _BLOCK or size == _BLOCK:
        return logits.argmax(-1)
    blocks = logits.reshape(*logits.shape[:-1], -1, _BLOCK)
    best = blocks.amax(-1).argmax(-1, keepdim=True)
    within = blocks.gather(-2, best[..., None].expand(*best.shape, _BLOCK)).squeeze(-2).argmax(-1, keepdim=True)
    return (best * _BLOCK + within).squeeze(-1)


def lookup(
    tokens: Tensor, lengths: Tensor, num_drafts: int, max_ngram: int, min_ngram: int, factor: float
) -> tuple[Tensor, Tensor]:
    """Prompt lookup in tokens int64 [B, L]: root and drafts int64 [B, K+1], nodes that count int32 [B].

    Of the earlier places where the last tokens stand too, the longest match wins (at most max_ngram tokens), of equals the
    latest; a match of n >= min_ngram tokens proposes at most factor * n. The copy may run into itself, as in LZ77.
    """
    compiled = _compiled(tokens, lengths) if tokens.is_contiguous() else None
    if compiled is not None:
        found: tuple[Tensor, Tensor] = compiled.lookup(tokens, lengths, num_drafts, max_ngram, min_ngram, factor)
        return found
    return lookup_reference(tokens, lengths, num_drafts, max_ngram, min_ngram, factor)


def lookup_reference(
    tokens: Tensor, lengths: Tensor, num_drafts: int, max_ngram: int, min_ngram: int, factor: float
) -> tuple[Tensor, Tensor]:
    """One pass of vector operations over the buffer."""
    last = lengths.long()[:, None] - 1
    suffix = tokens.gather(1, (last - torch.arange(max_ngram, device=last.device)).clamp(min=0))
    match_len, match_end = _longest_match(tokens, suffix, last)
    period = (last - match_end).clamp(min=1)
    step = torch.arange(num_drafts, device=last.device)
    drafts = tokens.gather(1, (match_end + 1 + step % period).clamp(max=tokens.shape[1] - 1))
    count = (match_len * factor).int().clamp(max=num_drafts) * (match_len >= min_ngram)
    root = suffix[:, :1]
    drafts = torch.where(step < count, drafts, root)
    return torch.cat([root, drafts], 1), (count.squeeze(1) + 1).to(torch.int32)


def _longest_match(tokens: Tensor, suffix: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Length and end of the best match, int64 [B, 1]. tokens [B, L], suffix [B, n] read backwards, last [B, 1].

    run_i[j] = [tokens[j] = suffix[i]] * (1 + run_{i+1}[j-1]), so run_0[j] counts how many tokens, read backwards from j,
    agree with the end of the text. An n-gram longer than the text itself finds no room in front of it.
    """
    size = tokens.shape[1]
    same = (tokens[:, None] == suffix[:, :, None]).view(torch.uint8)  # [B, n, L]; bytes are cheap to scan
    run = same[:, -1]
    for i in range(suffix.shape[1] - 2, -1, -1):
        longer, run = run, same[:, i]
        run[:, 1:].addcmul_(run[:, 1:], longer[:, :-1])
    position = torch.arange(size, device=tokens.device)
    run *= position < last
    best = torch.add(position, run, alpha=size).amax(1, keepdim=True)  # the longest match, of equals the latest
    return best // size, best % size


def entries(
    tokens: Tensor, lengths: Tensor, num_new: Tensor, first: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a head that follows the target reads of tokens int64 [B, L]: `count` entries from the first-th new one on.

    New are num_new int32 [B] tokens before the last of `lengths` int32 [B]. Returns the token behind each entry, int64
    [B, count], its position, int32 [B, count], that of the first, int32 [B], and which of them is a row's last new one, or the
    nearest to it, int64 [B]. What a row has no tokens for lies behind its end and repeats the last one.
    """
    compiled = _compiled(tokens, lengths, num_new) if tokens.is_contiguous() else None
    if compiled is not None:
        found: tuple[Tensor, Tensor, Tensor, Tensor] = compiled.entries(tokens, lengths, num_new, first, count)
        return found
    return entries_reference(tokens, lengths, num_new, first, count)


def entries_reference(
    tokens: Tensor, lengths: Tensor, num_new: Tensor, first: int, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A dozen vector operations."""
    begin = torch.minimum(lengths - 1 - num_new + first, lengths - 1)
    positions = begin[:, None] + torch.arange(count, dtype=begin.dtype, device=begin.device)
    following = torch.minimum(positions + 1, lengths[:, None] - 1)
    place = (num_new - 1 - first).clamp(0, count - 1).long()
    return tokens.gather(1, following.long()), positions, begin, place


def follow(
    nodes: Tensor, parents: Tensor, num_nodes: Tensor, chosen: Tensor, depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk down a tree along the token chosen after every node, to the first child that carries it.

    nodes, chosen int64, parents int32 [B, N], num_nodes [B]. Returns path int32 [B, depth + 1] (the last node repeated),
    num_accepted int32 [B] and the token chosen after the last node, int64 [B].
    """
    compiled = _compiled(nodes, parents, num_nodes, chosen)
    if compiled is not None:
        walked: tuple[Tensor, Tensor, Tensor] = compiled.follow(nodes, parents, num_nodes, chosen, depth)
        return walked
    return follow_reference(nodes, parents, num_nodes, chosen, depth)


def follow_reference(
    nodes: Tensor, parents: Tensor, num_nodes: Tensor, chosen: Tensor, depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One level a turn; a row without a matching child stays where it is."""
    padding = nodes.shape[1]
    index = torch.arange(padding, dtype=torch.int32, device=nodes.device)
    real = index < num_nodes[:, None]
    node = torch.zeros_like(index[:1]).expand(nodes.shape[0], 1)
    path, num_accepted = [node], torch.zeros_like(node[:, 0])
    for _ in range(depth):
        hit = real & (parents == node) & (nodes == chosen.gather(1, node.long()))
        child = torch.where(hit, index, padding).amin(1, keepdim=True).to(torch.int32)
        found = child < padding
        node = torch.where(found, child, node)
        num_accepted = num_accepted + found.squeeze(1)
        path.append(node)
    return torch.cat(path, 1), num_accepted, chosen.gather(1, node.long()).squeeze(1)


def advance(
    nodes: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    path: Tensor,
    accepted: Tensor,
    next_token: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    limits: Tensor,
    running: Tensor,
    stop_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Append what a step emitted to tokens [B, L] (in place), up to a stop token or the limit of each row.

    nodes int64, parents int32 [B, N] and num_nodes [B] are the tree, path int32 [B, E], accepted int32 and next_token int64
    [B] the verdict. Returns lengths int32, tokens emitted int32 and running bool [B], and the record int64 [B, 5 + E]:
    num_nodes, deepest proposed node, accepted, emitted, why the row ended (0: it did not), then the tokens.
    """
    args = (nodes, parents, num_nodes, path, accepted, next_token, tokens, lengths, limits, running, stop_ids)
    compiled = _compiled(*args)
    if compiled is not None:
        done: tuple[Tensor, Tensor, Tensor, Tensor] = compiled.advance(*args)
        return done
    return advance_reference(*args)


def advance_reference(
    nodes: Tensor,
    parents: Tensor,
    num_nodes: Tensor,
    path: Tensor,
    accepted: Tensor,
    next_token: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    limits: Tensor,
    running: Tensor,
    stop_ids: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same without a host read."""
    column = torch.arange(path.shape[1], device=path.device)
    following = nodes.gather(1, path.long()).roll(-1, 1)
    emitted = torch.where(column < accepted[:, None], following, next_token[:, None])
    count = torch.minimum(accepted + 1, limits - lengths)
    stops = torch.isin(emitted, stop_ids) & (column < count[:, None])
    first_stop = torch.where(stops, column, path.shape[1]).amin(1)
    stopped = first_stop < count
    count = torch.where(running, torch.minimum(count, first_stop + 1), 0).to(torch.int32)
    tokens.scatter_(1, (lengths[:, None] + column).long(), emitted)
    lengths = lengths + count
    ended = running & (stopped | (lengths >= limits))
    finished = ended * torch.where(stopped, STOP, LENGTH)
    real = torch.arange(nodes.shape[1], device=path.device) < num_nodes[:, None]
    depth = torch.where(real, _depths(parents), 0).amax(1)
    record = torch.cat([torch.stack([num_nodes, depth, accepted, count, finished], 1), emitted], 1)
    return lengths, count, running & ~ended, record


def _depths(parents: Tensor) -> Tensor:
    """Depth of every node, int64 [B, N]; a parent stands before its children."""
    depth = torch.zeros_like(parents, dtype=torch.int64)
    for i in range(1, parents.shape[1]):
        depth[:, i] = depth.gather(1, parents[:, i : i + 1].long()).squeeze(1) + 1
    return depth
