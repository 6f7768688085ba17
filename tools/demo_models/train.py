"""Train the demo model on the corpus of corpus.py.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 python train.py WORKDIR [--minutes 80]

The two variables keep freed memory in the process: without them a third of the time goes to page faults.

The model is a Llama with 8 blocks, hidden size 256, 4 heads of 64 with 2 key/value heads, a gated MLP of 704, and a tied embedding of 6000
byte-level BPE tokens. PyTorch trains it on the CPU with bf16 autocast: Muon for the matrices inside the blocks, AdamW for the rest. In the
last part of the run every matrix passes through MLX's 4-bit affine quantization (groups of 64) in the forward pass, with a straight-through
gradient, so that training adapts the weights to the quantization.

The number of steps follows from --minutes and the measured speed. The script writes tokenizer.json, checkpoint.pt (atomically) and
training.json (settings, losses) into WORKDIR.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

log = logging.getLogger("demo_model")


@dataclass(frozen=True)
class Config:
    """The model's config, with the names of mlx-lm's config.json."""

    vocab_size: int = 6000
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 256


END = "<|endoftext|>"
MICROBATCH_TOKENS = 4096
QUANTIZED_FRACTION = 0.15  # fraction of the run, at its end, with quantized weights
GROUP_SIZE, BITS = 64, 4


def group_size(columns: int) -> int:
    """Return the quantization's group size for rows of this length: a divisor, at most 64."""
    return math.gcd(GROUP_SIZE, columns)


def quantize(w: Tensor) -> Tensor:
    """Return w [rows, columns] after MLX's affine quantization and dequantization, with a straight-through gradient.

    Each group along the columns has a scale and a bias from its extremes. The extreme of larger magnitude and zero are exact.
    """
    with torch.no_grad():
        groups = w.float().reshape(-1, group_size(w.shape[1]))
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        scale = ((high - low) / (2**BITS - 1)).clamp_min(1e-7)
        low_is_edge = low.abs() > high.abs()
        scale = torch.where(low_is_edge, scale, -scale)
        edge = torch.where(low_is_edge, low, high)
        q0 = torch.round(edge / scale)
        scale = torch.where(q0 != 0, edge / q0, scale)
        bias = torch.where(q0 != 0, edge, torch.zeros_like(edge))
        q = torch.round((groups - bias) / scale).clamp(0, 2**BITS - 1)
        rounded = (q * scale + bias).reshape(w.shape)
    return w + (rounded - w).detach()


class Linear(nn.Linear):
    """A linear layer without bias; the class attribute `quantized` turns quantization on in all of them."""

    quantized = False

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, quantize(self.weight) if Linear.quantized else self.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embeddings."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    """A transformer block: attention and gated MLP."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size)
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        c, n = self.c, self.input_layernorm(x)
        q = self.q_proj(n).view(b, t, -1, c.head_dim).transpose(1, 2)
        k = self.k_proj(n).view(b, t, -1, c.head_dim).transpose(1, 2)
        v = self.v_proj(n).view(b, t, -1, c.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        repeats = c.num_attention_heads // c.num_key_value_heads
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        # Attention is written out: at these sizes, the compiled code is faster than PyTorch's fused CPU attention.
        scores = (q @ k.transpose(-1, -2)).float() * c.head_dim**-0.5
        future = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        a = torch.softmax(scores.masked_fill(future, float("-inf")), -1).to(v.dtype) @ v
        x = x + self.o_proj(a.transpose(1, 2).reshape(b, t, -1))
        n = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(n)) * self.up_proj(n))


class Llama(nn.Module):
    """The demo model; its embedding is also its unembedding."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        frequencies = c.rope_theta ** -(torch.arange(0, c.head_dim, 2) / c.head_dim)
        angles = torch.outer(torch.arange(c.max_position_embeddings), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        for block in self.layers:
            for name, p in block.named_parameters():
                if p.ndim == 2:
                    nn.init.normal_(p, std=p.shape[1] ** -0.5 / (4 if name.startswith(("o_proj", "down_proj")) else 1))

    def forward(self, ids: Tensor) -> Tensor:
        table = quantize(self.embed_tokens.weight) if Linear.quantized else self.embed_tokens.weight
        x = F.embedding(ids, table)
        t = ids.shape[1]
        for block in self.layers:
            x = block(x, self.cos[:t], self.sin[:t])
        return F.linear(self.norm(x), table)


def read(path: Path) -> list[dict]:
    """Read a file with one JSON object per line."""
    with path.open() as lines:
        return [json.loads(line) for line in lines]


def train_tokenizer(documents: list[dict], c: Config, path: Path) -> Tokenizer:
    """Train a byte-level BPE tokenizer and save it, or read the saved one."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=c.vocab_size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((str(d["text"]) for d in documents), trainer)
    tokenizer.save(str(path))
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[dict]) -> list[Tensor]:
    """Return the ids of each document, which begin with the end-of-text token."""
    end = tokenizer.token_to_id(END)
    return [torch.tensor([end, *e.ids], dtype=torch.int32) for e in tokenizer.encode_batch([str(d["text"]) for d in documents])]


def windows(ids: list[Tensor], repeats: list[float], length: int, rng: random.Random) -> Tensor:
    """Return the rows of one epoch, shuffled: documents in random order, repeated, joined, and cut into rows of length + 1 tokens."""
    order = [i for i, r in enumerate(repeats) for _ in range(int(r) + (rng.random() < r % 1))]
    rng.shuffle(order)
    joined = torch.cat([ids[i] for i in order])
    rows = joined[: (len(joined) - 1) // length * length + 1].unfold(0, length + 1, length)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(rng.randrange(2**31)))]


@torch.compile(dynamic=False)
def loss_of(model: Llama, rows: Tensor) -> Tensor:
    """Return the mean cross-entropy of rows [B, T + 1] in nats per token."""
    rows = rows.long()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Llama, rows: Tensor) -> float:
    """Return the mean cross-entropy of rows [B, T + 1] in nats per token, without gradient."""
    return sum(loss_of(model, chunk).item() * len(chunk) for chunk in rows.split(MICROBATCH_TOKENS // (rows.shape[1] - 1))) / len(rows)


def main() -> None:
    """Train the tokenizer and the model, and write the checkpoint and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--minutes", type=float, default=80, help="length of the run [default: 80]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=Config.num_hidden_layers)
    parser.add_argument(
        "--hidden-size",
        "--width",
        type=int,
        default=Config.hidden_size,
        help="a multiple of 128: a head has size 64, and two heads have one key/value head",
    )
    parser.add_argument("--batch-tokens", type=int, default=16384)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    c = Config(
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=args.hidden_size // 128,
    )
    length = c.max_position_embeddings

    train, valid = read(args.workdir / "corpus.jsonl"), read(args.workdir / "valid.jsonl")
    tokenizer = train_tokenizer(train, c, args.workdir / "tokenizer.json")
    ids = encode(tokenizer, train)
    repeats = [float(d["repeat"]) for d in train]
    valid_rows = windows(encode(tokenizer, valid), [1.0] * len(valid), length, random.Random(0))[:256]
    valid_text = "".join(str(d["text"]) for d in valid)
    bytes_per_token = len(valid_text.encode()) / sum(len(e) - 1 for e in encode(tokenizer, valid))
    epoch = windows(ids, repeats, length, rng)
    log.info("%d training tokens, %d in a weighted epoch, %.2f bytes/token held out", sum(map(len, ids)), epoch[:, 1:].numel(), bytes_per_token)

    model = Llama(c)
    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith("embed")]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and not n.startswith("embed"))]
    optimizers = [
        torch.optim.Muon(inside, lr=4e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    rates = [o.param_groups[0]["lr"] for o in optimizers]
    log.info("%.2f M parameters", sum(p.numel() for p in model.parameters()) / 1e6)

    batch = args.batch_tokens // length
    start, step, steps, at, curve = time.time(), 0, 10**9, 0, []
    while step < steps:
        if at + batch > len(epoch):
            epoch, at = windows(ids, repeats, length, rng), 0
        rows, at = epoch[at : at + batch], at + batch
        progress = step / steps
        Linear.quantized = progress >= 1 - QUANTIZED_FRACTION
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50, max(1 - progress, 0.0) / 0.7)
        total = 0.0
        for micro in rows.split(MICROBATCH_TOKENS // length):
            loss = loss_of(model, micro) * (len(micro) / len(rows))
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        elapsed = time.time() - start
        if step >= 20 and step % 10 == 0 and progress < 1 - QUANTIZED_FRACTION:
            steps = max(step + 1, int(step * 60 * args.minutes / elapsed))  # follow the speed of a shared machine, until quantization starts
        if step % 20 == 0 or step == steps:
            log.info("step %d/%d loss %.3f  %.0f tokens/s", step, steps, total, step * args.batch_tokens / elapsed)
        if step % 200 == 0 or step == steps:
            held = held_out_loss(model, valid_rows)
            curve.append({"step": step, "train": total, "held_out": held, "quantized": Linear.quantized})
            log.info("held out: %.3f nats/token, %.3f bits/byte", held, held / math.log(2) / bytes_per_token)
            temporary = args.workdir / "checkpoint.tmp"
            torch.save({"config": asdict(c), "model": model.state_dict(), "step": step}, temporary)
            os.replace(temporary, args.workdir / "checkpoint.pt")
    result = {
        "config": asdict(c),
        "tokens_seen": step * args.batch_tokens,
        "seconds": time.time() - start,
        "held_out_nats_per_token": curve[-1]["held_out"],
        "held_out_bits_per_byte": curve[-1]["held_out"] / math.log(2) / bytes_per_token,
        "curve": curve,
        "seed": args.seed,
        "torch": torch.__version__,
    }
    (args.workdir / "training.json").write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
