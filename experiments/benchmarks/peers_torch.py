"""A plain GPT in PyTorch, the size of the benchmarks' model: what `experiments.benchmarks.peers` compares with.

It imports torch alone and is run by an interpreter that has it. Reads a line of JSON per request from standard input,
{"routed": bool, "context": int, "batch": int}, does one training step of that model and answers with its seconds.

The model has what ours has: RMSNorm, rotary positions, SwiGLU, causal attention (`scaled_dot_product_attention`), tied
embeddings, no biases; routed: in every second block a router picks an eighth of the tokens, gathers them, and adds what
the block makes of them, gated by the router's sigmoid. A step is the forward pass, the gradient, clipping and AdamW
(fused). Eager, float32, all threads.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional

VOCABULARY, WIDTH, LAYERS, HEADS, HIDDEN, CAPACITY, PREDICTOR = 4096, 512, 8, 8, 1408, 0.125, 128


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary positions: x is [B, H, S, E], positions [B, S]."""
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = positions[:, None, :, None] * frequencies
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1)


class Block(nn.Module):
    """Attention and SwiGLU, as the change that they make to x."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.RMSNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.output = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x is [B, S, D], positions [B, S], ascending: causal by index is causal by position."""
        B, S, _ = x.shape
        heads = self.query_key_value(self.first(x)).view(B, S, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        query, key, value = rotate(heads[0], positions), rotate(heads[1], positions), heads[2]
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        delta = self.output(mixed.transpose(1, 2).reshape(B, S, -1))
        h = self.second(x + delta)
        return delta + self.down(functional.silu(self.gate(h)) * self.up(h))


class Routed(nn.Module):
    """A block for an eighth of the tokens, with a predictor that learns which ones from each token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.router = Block(), nn.Linear(WIDTH, 1, bias=False)
        self.predictor = nn.Sequential(nn.Linear(WIDTH, PREDICTOR), nn.SiLU(), nn.Linear(PREDICTOR, 1))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The change to x, and the predictor's loss."""
        S, D = x.shape[1:]
        scores = self.router(x).squeeze(-1)
        chosen = scores.topk(int(CAPACITY * S), sorted=False).indices.sort(-1).values
        rows = chosen[..., None].expand(-1, -1, D)
        delta = self.block(x.gather(1, rows), positions.gather(1, chosen))
        delta = delta * torch.sigmoid(scores.gather(1, chosen))[..., None]
        target = torch.zeros_like(scores).scatter(1, chosen, 1.0)
        logits = self.predictor(x.detach()).squeeze(-1)
        loss = functional.binary_cross_entropy_with_logits(logits, target)
        return torch.zeros_like(x).scatter_add(1, rows, delta), loss


class Model(nn.Module):
    """The decoder and its loss."""

    def __init__(self, routed: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Routed() if routed and i % 2 else Block() for i in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of predicting tokens[:, 1:]."""
        x = self.embedding(tokens[:, :-1])
        positions = torch.arange(x.shape[1]).expand(x.shape[:2])
        more: Any = 0.0
        for block in self.blocks:
            if isinstance(block, Routed):
                delta, loss = block(x, positions)
                more = more + 0.01 * loss
            else:
                delta = block(x, positions)
            x = x + delta
        logits = self.norm(x) @ self.embedding.weight.T
        return functional.cross_entropy(logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1)) + more


class Trainer:
    """One model with its optimizer and a batch of random tokens."""

    def __init__(self, routed: bool, context: int, batch: int) -> None:
        torch.manual_seed(0)
        self._model = Model(routed)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), 3e-4, (0.9, 0.95), weight_decay=0.1, fused=True)
        self._tokens = torch.randint(0, VOCABULARY, (batch, context + 1))

    def step(self) -> float:
        """Seconds of one training step."""
        began = time.perf_counter()
        self._optimizer.zero_grad(set_to_none=True)
        self._model(self._tokens).backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        return time.perf_counter() - began


def main() -> None:
    """Answers requests until standard input ends."""
    trainers: dict[str, Trainer] = {}
    for line in sys.stdin:
        if line not in trainers:
            trainers[line] = Trainer(**json.loads(line))
        print(json.dumps({"seconds": trainers[line].step()}), flush=True)


if __name__ == "__main__":
    main()
