"""A GPT in plain PyTorch: tokens are bytes, positions are learned, the output layer is tied to the embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256


@dataclass(frozen=True)
class Size:
    """The shape of a model, and of the batches it is trained on by default."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int
    dropout: float = 0.1


SIZES = {
    "tiny": Size(layers=2, heads=2, width=32, context=32, batch=4),
    "10m": Size(layers=6, heads=6, width=384, context=64, batch=4),
    "38m": Size(layers=12, heads=8, width=512, context=64, batch=6),
    "60m": Size(layers=12, heads=10, width=640, context=64, batch=4),
}


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each added to its own input."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.dropout = size.dropout
        self.attention_norm = nn.LayerNorm(size.width, bias=False)
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.attention_out = nn.Linear(size.width, size.width, bias=False)
        self.mlp_norm = nn.LayerNorm(size.width, bias=False)
        self.mlp_in = nn.Linear(size.width, 4 * size.width, bias=False)
        self.mlp_out = nn.Linear(4 * size.width, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, context, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, context, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        mixed = mixed.transpose(1, 2).reshape(batch, context, width)
        x = x + functional.dropout(self.attention_out(mixed), self.dropout, self.training)
        hidden = functional.gelu(self.mlp_in(self.mlp_norm(x)))
        return x + functional.dropout(self.mlp_out(hidden), self.dropout, self.training)


class GPT(nn.Module):
    """Predicts the next byte at every position."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.tokens = nn.Embedding(VOCABULARY, size.width)
        self.positions = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width, bias=False)
        self.head = nn.Linear(size.width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What is added to the residual stream starts smaller, so that depth does not add to its variance.
                residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * size.layers) ** 0.5 if residual else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy in nats per byte; both arguments are int64 of shape (batch, context)."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = functional.dropout(x, self.size.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def parameter_count(model: nn.Module) -> int:
    """How many numbers are trained; tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())
