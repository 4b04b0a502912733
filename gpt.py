"""The machine under chat_rl.py: the processes of a run, a small chat GPT, its cache, tokenizer, sampler, checkpoints
and optimizers.

The model has one way of running: new tokens attend to a Cache, which has a part shared by all rows of a group (their
question) and a part of each row's own (its completion). Prefill, decoding and training are that one forward with
different shapes. Nothing here knows of a task, a reward or a training loop.

Letters in shapes: P prompts, N samples per prompt, B = P·N rows, T new tokens, S own and Lp shared positions, H query
heads over G key-value heads, R = H / G, D head width, C channels, V vocabulary, L layers, M sampled tokens.
"""

import json
import math
import os
import pickle
import re
import shutil
import signal
import time
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import huggingface_hub
import numpy
import safetensors.torch
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.utils.checkpoint import checkpoint


class UserError(Exception):
    """Something the user can mend. The message is one line and says what to do."""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def blaming(what: str, mend: str) -> Iterator[None]:
    """For work on what may be broken in any way there is: its errors become UserErrors that say so, and what to do. A
    full GPU is none of them."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"{what} ({one_line(error)}): {mend}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Ranks: the processes of a run


class Interrupted(Exception):
    """The run was told to stop, by the signal of that number."""


@dataclass
class Ranks:
    """The processes of a run, each with a share of the work; one where torchrun did not start it.

    Rank 0 alone reads checkpoints and data, prints and saves. A first SIGTERM, SIGINT or SIGHUP ends work that polls,
    and waits for the end of any other; another one, a second later, ends the process at once, unless it is waiting for
    another rank.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    signal: int = 0                         # the number of the first signal, 0 before it
    signalled: float = 0.0                  # when it came

    def all_gather(self, thing: Any) -> list:
        """All ranks' things, which hold no tensors, on every rank."""
        things = [thing] * self.size
        if self.size > 1:
            dist.all_gather_object(things, thing)
        return things

    def gather(self, thing: Any) -> list:
        """All ranks' things on rank 0, nothing elsewhere."""
        things = [thing] * self.size if self.rank == 0 else None
        if self.size > 1:
            dist.gather_object(thing, things)
        return things or []

    def from_main(self, thing: Any) -> Any:
        """Rank 0's thing, which holds no tensors, on every rank."""
        box = [thing]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def add_up(self, tensor: Tensor) -> None:
        """Overwrites the ranks' tensors with their sum."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def broadcast(self, tensor: Tensor, owner: int = 0) -> None:
        """Overwrites the ranks' tensors with their owner's."""
        if self.size > 1:
            dist.broadcast(tensor, owner)

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
                signal.signal(number, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self.signalled = number, now
        if now - self.signalled > 1:        # one Ctrl-C can arrive twice under torchrun
            os._exit(128 + number)

    def poll(self) -> None:
        """Raises Interrupted on this rank where it was told to stop."""
        if self.signal:
            raise Interrupted(self.signal)

    def check(self) -> None:
        """Raises Interrupted on all ranks where any of them was told to stop."""
        if number := max(self.all_gather(self.signal)):
            raise Interrupted(number)


def find_device(device_type: str) -> torch.device:
    """One of that type, by default of the best that there is, for this process. Raises UserError where there are fewer
    than processes."""
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    kind = device_type or best.type
    if kind == "cpu":
        return torch.device(kind)
    count = torch.accelerator.device_count() if kind == best.type else 0
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > count:
        raise UserError(f"--device-type {kind}: there are {count} here: start as many processes, or take another type")
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans each new shape anew, and has NaN gradients with masks
    return device


def start_ranks(device_type: str) -> Ranks:
    """Joins the other processes that torchrun has started. Raises UserError where they cannot run together."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read when CUDA is first used
    device = find_device(device_type)
    if "RANK" not in os.environ:
        return Ranks(device)
    timeout = timedelta(hours=3)            # that a rank waits for another, which may have a model to fetch
    with blaming("RANK is set, but the other processes cannot be reached", "start with torchrun, or unset RANK"):
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    # after a restart torchrun's store still holds what the lost processes wrote: each attempt has its own corner
    store = dist.PrefixStore("attempt" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return Ranks(device, rank, size)


# ----------------------------------------------------------------------------------------------------------------------
# The cache: what new tokens attend to


class Prefix(NamedTuple):
    """What completions read of their questions: one entry per question, right-padded."""

    lengths: Tensor                         # (P,) positions that are no padding
    hidden: Tensor                          # (P, C) hidden state of the last position, which predicts the first token
    embed: Tensor                           # (P, C) embedding of the last position, which smears into the next
    kv: Tensor                              # (L, 2, P, G, Lp, D) keys and values

    def rows(self, index: Tensor) -> "Prefix":
        """The entries of the questions in index (B,), each as often as it is named."""
        return Prefix(*(x.index_select(dim, index) for x, dim in zip(self, (0, 0, 0, 2))))

    def leaves(self) -> "Prefix":
        """The same, cut off from the graph, to run completions on and to collect their gradients."""
        return Prefix(*(x.detach().requires_grad_(x.requires_grad) for x in self))

    def backward(self, leaves: "Prefix") -> None:
        """Sends the gradients that the leaves have collected back through the questions."""
        reached = [(x, leaf.grad) for x, leaf in zip(self, leaves) if leaf.grad is not None]
        torch.autograd.backward(*zip(*reached))


def mask_of(queries: Tensor, keys: Tensor, window: int, dtype: torch.dtype) -> Tensor:
    """0 where a query sees a key (0 ≤ distance ≤ window), else −inf, given positions (B or 1, T) and (B or 1, Lp + S):
    (B or 1, 1, T, Lp + S), whose rows begin at multiples of 8, as CUDA's kernels want them."""
    width = keys.size(1)
    keys = F.pad(keys, (0, -width % 8))
    distance = (queries.unsqueeze(2) - keys.unsqueeze(1)).unsqueeze(1)
    unseen = (distance < 0) | (distance > window)
    return torch.zeros_like(distance, dtype=dtype).masked_fill_(unseen, -torch.inf)[..., :width]


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    """q·k in float32, which a softmax needs even where its weights do not: q (B, G, Q, D), k (B, G, K, D) ->
    (B, G, Q, K)."""
    if q.is_cuda and q.dtype != torch.float32:
        return torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT, out_dtype=torch.float32).unflatten(0, q.shape[:2])
    return q.float() @ k.float().mT


class Cache:
    """Keys and values that new tokens attend to: a part shared by the rows of a group, and each row's own.

    `Cache()` is empty. `Cache(prefix)` has one row per entry of the prefix; either takes one forward, which may be
    differentiated. `Cache(prefix, N)`, to decode with, has N rows for each entry, in order, and its own part grows
    with what they say. Every row has the same number of own tokens, `size`.
    """

    def __init__(self, prefix: Prefix | None = None, num_samples: int = 0):
        self.prefix = prefix
        self.num_samples = num_samples      # of the group with the most rows; 0: not to decode with
        self.size = 0
        self.own = {}                       # layer -> (2, B, G, at least size, D); with a prefix only to decode
        self.last = None                    # (B, T, C) embeddings of the latest forward
        if prefix is not None:
            self.shared = prefix.kv.unbind()  # L times (2, P, G, Lp, D)
            self.groups = numpy.arange(len(prefix.lengths)).repeat(num_samples or 1)  # each row's entry of the prefix
            rows = self.to_device(self.groups)
            self.starts = prefix.lengths[rows].unsqueeze(1)
            self.last = prefix.embed[rows].unsqueeze(1)
            self.slots = None               # (B,) each row's place in (P, N), where a group has fewer than N

    def to_device(self, index: numpy.ndarray) -> Tensor:
        return torch.from_numpy(index).to(self.prefix.lengths.device, non_blocking=True)

    def extend(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Counts the new tokens ids (B, T) in. Returns their positions from the question's start, (B or 1, T), and
        those of all keys, beyond all reach where they are padding, (B or 1, Lp + S)."""
        self.size += ids.size(1)
        keys = torch.arange(self.size, device=ids.device, dtype=torch.int32).unsqueeze(0)
        if self.prefix is not None:
            shared = torch.arange(self.prefix.kv.size(4), device=ids.device, dtype=torch.int32)
            shared = shared.masked_fill(shared >= self.starts, 2**30)
            keys = torch.cat([shared, self.starts + keys], dim=1)
        return keys[:, keys.size(1) - ids.size(1) :], keys  # -T, which can be 0, would not do

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        """One softmax over the shared and the own part, which k and v join: q (B, H, T, D), k and v (B, G, T, D) ->
        (B, H, T, D)."""
        own = torch.stack((k, v))
        if self.num_samples:
            return self.attend_in_groups(q, self.shared[layer], self.append(layer, own), mask, scale)
        if self.prefix is None:
            self.own.setdefault(layer, own)  # a block that runs again in a backward leaves nothing new
        else:
            own = torch.cat([self.shared[layer], own], dim=3)
        # CUDA's kernels that keep no scores take a mask or grouped heads, not both
        repeats = q.size(1) // k.size(1)
        k, v = own.unsqueeze(3).expand(-1, -1, -1, repeats, -1, -1).flatten(2, 3)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    def append(self, layer: int, new: Tensor) -> Tensor:
        """Joins new keys and values (2, B, G, T, D) to the rows' own, whose room grows by a quarter where it is full:
        (2, B, G, S, D)."""
        room = self.own.get(layer, new[:, :, :, :0])
        missing = self.size - room.size(3)
        if missing > 0:
            room = self.own[layer] = F.pad(room, (0, 0, 0, missing + self.size // 4 + 16))
        own = room[:, :, :, : self.size]
        own[:, :, :, -new.size(3) :] = new
        return own

    def attend_in_groups(self, q: Tensor, shared: Tensor, own: Tensor, mask: Tensor, scale: float) -> Tensor:
        """`attend` where all rows of a group read one copy of their shared part (2, P, G, Lp, D)."""
        k, v = own
        shared_k, shared_v = shared
        asked = q.unflatten(1, (k.size(1), -1)).flatten(2, 3)  # (B, G, R·T, D)
        of_shared = self.to_rows(scores_of(self.to_groups(asked), shared_k))
        scores = torch.cat([of_shared, scores_of(asked, k)], dim=-1).unflatten(2, (-1, q.size(2)))
        scores = mask.unsqueeze(2).add(scores, alpha=scale)  # (B, G, R, T, Lp + S)
        weights = scores.softmax(dim=-1).flatten(2, 3).to(v.dtype)
        to_shared, to_own = weights.tensor_split([shared_k.size(2)], dim=-1)
        y = to_own @ v + self.to_rows(self.to_groups(to_shared) @ shared_v)
        return y.view_as(q)

    def to_groups(self, x: Tensor) -> Tensor:
        """(B, G, ·, E) -> (P, G, N·, E): what the rows of a group ask of their shared part becomes one matrix."""
        if self.slots is not None:
            shape = len(self.prefix.lengths) * self.num_samples, *x.shape[1:]
            x = x.new_zeros(shape).index_copy_(0, self.slots, x)
        return x.unflatten(0, (-1, self.num_samples)).transpose(1, 2).flatten(2, 3)

    def to_rows(self, x: Tensor) -> Tensor:
        """(P, G, N·, E) -> (B, G, ·, E)"""
        x = x.unflatten(2, (self.num_samples, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.slots is None else x.index_select(0, self.slots)

    def select(self, rows: numpy.ndarray) -> None:
        """Keeps these rows (B',), ascending, and the questions that they belong to."""
        kept, self.groups, counts = numpy.unique(self.groups[rows], return_inverse=True, return_counts=True)
        index = self.to_device(rows)
        for layer, room in self.own.items():
            self.own[layer] = room.index_select(1, index)
        self.starts = self.starts.index_select(0, index)
        self.last = self.last.index_select(0, index)
        if len(kept) < len(self.prefix.lengths):
            self.prefix = self.prefix.rows(self.to_device(kept))
            self.shared = self.prefix.kv.unbind()
        self.num_samples = counts.max()
        place = numpy.arange(len(rows)) - numpy.searchsorted(self.groups, self.groups)  # within the group
        self.slots = self.to_device(self.groups * self.num_samples + place)


# ----------------------------------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class Config:
    """An architecture. The defaults are the plain Llama decoder; a family is a few keywords over them."""

    vocab_size: int                         # ids that can be sampled
    vocab_rows: int                         # height of the embedding and unembedding tables
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    head_dim: int
    mlp_width: int
    max_positions: int                      # of a question and its completion
    tied: bool = False                      # the embedding is the unembedding too
    norm_weights: bool = True
    norm_eps: float | None = 1e-6           # None: torch's own, of the type
    embed_norm: bool = False                # a norm after the embedding
    gated_mlp: bool = True                  # SwiGLU; else relu²
    qkv_bias: bool = False
    qk_norm: str = ""                       # of q and k, "before" or "after" RoPE
    qk_scale: float = 1.0                   # q and k are multiplied by this
    rope_base: float = 1e4
    rope_sign: int = 1                      # direction in which RoPE turns
    rope_rounded: bool = False              # cos and sin are rounded to bfloat16 in float32 runs too
    rope_scaling: tuple[float, ...] = ()    # Llama 3.1's: factor, low and high frequency factor, first positions
    softcap: float = 0.0                    # of the logits: s·tanh(x / s)
    windows: tuple[int, ...] = ()           # how far back each layer sees (empty: all the way)
    value_gate: int = 0                     # channels that gate value embeddings, in every other layer, the last too;
                                            # with them go scales of the residual stream and of the embedding, per layer
    value_scale: float = 1.0                # of that gate
    smear: bool = False                     # smear (of each token into the next) and backout (of the middle layer)
    lora_rank: int = 0                      # of adapters on the matrices of the blocks (0: none, all weights learn)


SMEAR_WIDTH = 24
GENERATIONS = {                             # of nanochat's model; a checkpoint's keys tell which one it is
    "classic": dict(rope_rounded=True),
    "winter": dict(rope_rounded=True, value_gate=32, value_scale=2.0),
    "spring": dict(rope_base=1e5, qk_scale=1.15, value_gate=12, value_scale=3.0),
    "current": dict(rope_base=1e5, qk_scale=1.2, value_gate=12, value_scale=3.0, smear=True),
}
SHORT_WINDOWS = {"winter": (2, 1), "spring": (3, 128), "current": (4, 128)}  # part of the long one, and its rounding


def nanochat_config(generation: str, sequence_len: int, window_pattern: str = "L", **shape: int) -> Config:
    """The architecture behind a nanochat checkpoint's `model_config`, whose other fields are named as Config's are, and
    `vocab_rows`, which nanochat makes a multiple of 64. `sequence_len` is the long window."""
    windows = ()
    n_layer = shape["n_layer"]
    n_embd = shape["n_embd"]
    if generation in SHORT_WINDOWS:
        part, multiple = SHORT_WINDOWS[generation]
        reach = {"L": sequence_len, "S": math.ceil(sequence_len / part / multiple) * multiple}
        windows = tuple(reach[kind] for kind in (window_pattern * n_layer)[: n_layer - 1] + "L")
    return Config(
        **shape,
        head_dim=n_embd // shape["n_head"],
        mlp_width=4 * n_embd,
        max_positions=sequence_len,
        windows=windows,
        norm_weights=False,
        norm_eps=None,
        embed_norm=True,
        gated_mlp=False,
        qk_norm="after",
        rope_sign=-1,
        softcap=15.0,
        **GENERATIONS[generation],
    )


FAMILIES = {                                # model_type: the family's fields of Config
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "before"},
}
KNOWN = {                                   # keys of a config.json that say how it runs, with what is known here
    "model_type": tuple(FAMILIES),
    "hidden_act": ("silu",),
    "layer_types": ({"full_attention"},),
    "rope_type": ("default", "llama3"),
    "full_attention": (None,),              # RoPE's settings by the type of layer
    "partial_rotary_factor": (None, 1),
    **dict.fromkeys(("attention_bias", "mlp_bias", "quantization_config"), (None, False)),
}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def huggingface_config(raw: dict, vocab_size: int) -> Config:
    """The architecture that transformers reads in a config.json, for a tokenizer with so many ids. Raises ValueError,
    naming the field, on whatever would be run wrong."""
    raw = raw | raw.get("rope_parameters", {}) | {"layer_types": {*(raw.get("layer_types") or ["full_attention"])}}
    for name, known in KNOWN.items():
        if raw.get(name) not in known:
            raise ValueError(f"config.json: {name} is {raw.get(name)!r}; known here: {known}")
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    return Config(
        min(vocab_size, raw["vocab_size"]),
        vocab_rows=raw["vocab_size"],
        n_layer=raw["num_hidden_layers"],
        n_head=heads,
        n_kv_head=raw["num_key_value_heads"],
        n_embd=width,
        head_dim=raw.get("head_dim") or width // heads,
        mlp_width=raw["intermediate_size"],
        max_positions=raw["max_position_embeddings"],
        tied=raw["tie_word_embeddings"],
        norm_eps=raw["rms_norm_eps"],
        rope_base=raw["rope_theta"],
        rope_scaling=tuple(raw[name] for name in LLAMA3) if raw["rope_type"] == "llama3" else (),
        **FAMILIES[raw["model_type"]],
    )


LORA_ALPHA = 32


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C) times the transpose of weight (K, C), and bias (K,): (..., K)."""
    if x.is_cpu and x.numel() <= 64 * x.size(-1) and not torch.is_grad_enabled():
        y = (weight @ x.flatten(0, -2).mT).mT.unflatten(0, x.shape[:-1])  # half the time of linear with few rows
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """With a rank, an adapter (LoRA, Hu et al. 2021): W + α / rank · B·A, of which W is frozen."""

    def __init__(self, width: int, height: int, bias: bool = False, rank: int = 0):
        super().__init__(width, height, bias)
        self.rank = rank
        if rank:
            self.lora_a = nn.Parameter(torch.empty(rank, width))
            self.lora_b = nn.Parameter(torch.empty(height, rank))

    def forward(self, x: Tensor) -> Tensor:
        y = product(x, self.weight, self.bias)
        if self.rank:
            y = torch.add(y, product(product(x, self.lora_a), self.lora_b), alpha=LORA_ALPHA / self.rank)
        return y


def norm_of(config: Config, width: int) -> nn.RMSNorm:
    """RMSNorm (Zhang and Sennrich 2019)."""
    return nn.RMSNorm(width, config.norm_eps, config.norm_weights)


def rope_of(config: Config, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """cos and ∓sin of RoPE's angles (Su et al. 2021) at positions (B, T): (2, B, 1, T, D)."""
    D = config.head_dim
    exponents = torch.arange(0, D, 2, device=positions.device).float() / D
    frequencies = 1.0 / config.rope_base**exponents
    if config.rope_scaling:
        factor, low, high, original = config.rope_scaling
        rounds = original * frequencies / (2 * math.pi)  # in the positions that the model was first trained on
        kept = ((rounds - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    angles = positions.float()[:, None, :, None] * frequencies
    cos, sin = angles.cos(), config.rope_sign * angles.sin()
    turns = torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)])
    return turns.to(torch.bfloat16 if config.rope_rounded else dtype).to(dtype)


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        C = config.n_embd
        D = config.head_dim
        H = config.n_head
        G = config.n_kv_head
        linear = partial(Linear, rank=config.lora_rank)
        self.c_q = linear(C, H * D, config.qkv_bias)
        self.c_k = linear(C, G * D, config.qkv_bias)
        self.c_v = linear(C, G * D, config.qkv_bias)
        self.c_proj = linear(H * D, C)
        if config.qk_norm == "before":
            self.q_norm = norm_of(config, D)
            self.k_norm = norm_of(config, D)
        if config.value_gate and layer % 2 == (config.n_layer - 1) % 2:
            self.ve_gate = Linear(config.value_gate, G)

    def forward(self, x: Tensor, value: Tensor | None, rope: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """x (B, T, C) after its norm, value (B, T, G·D) or None, mask (B or 1, 1, T, Lp + S) -> (B, T, C)."""
        c = self.config
        heads = -1, c.head_dim
        q = self.c_q(x).unflatten(2, heads).transpose(1, 2)
        k = self.c_k(x).unflatten(2, heads).transpose(1, 2)
        v = self.c_v(x).unflatten(2, heads)
        if value is not None:
            gate = c.value_scale * torch.sigmoid(self.ve_gate(x[..., : c.value_gate]))
            v = v + gate.unsqueeze(3) * value.view_as(v)
        v = v.transpose(1, 2)
        if c.qk_norm == "before":
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = rope
        qk = torch.cat([q, k], dim=1)
        qk = torch.addcmul(qk * cos, qk.roll(c.head_dim // 2, -1), sin)  # turned as pairs of the first and second half
        if c.qk_norm == "after":
            qk = F.rms_norm(qk, qk.shape[-1:], eps=c.norm_eps)
        q, k = qk.split([c.n_head, c.n_kv_head], dim=1)
        scale = c.qk_scale**2 / math.sqrt(c.head_dim)
        y = cache.attend(self.layer, q, k, v, mask, scale)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        C = config.n_embd
        W = config.mlp_width
        linear = partial(Linear, rank=config.lora_rank)
        self.c_fc = linear(C, W)
        self.c_gate = linear(C, W) if config.gated_mlp else None
        self.c_proj = linear(W, C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c_fc(x)
        if self.c_gate:
            return self.c_proj(F.silu(self.c_gate(x)) * y)
        return self.c_proj(F.relu(y).square())


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.norm_1 = norm_of(config, config.n_embd)
        self.norm_2 = norm_of(config, config.n_embd)
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        x = x + self.attn(self.norm_1(x), *context)
        return x + self.mlp(self.norm_2(x))


def recomputed(work: Callable, when: bool) -> Callable:
    """The work, or one that a backward runs again instead of keeping what it made."""
    if not (when and torch.is_grad_enabled()):
        return work
    return partial(checkpoint, work, use_reentrant=False, preserve_rng_state=False)


class GPT(nn.Module):
    """A decoder of any family, all of whose weights have the type in which its arithmetic runs; parameter names are
    nanochat's. With adapters nothing else learns."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.recompute = False              # whether the backward makes again what the blocks computed, to save memory
        self.stored_types = {}              # name -> type on disk, to be saved in again
        self.raw_config = {}                # a nanochat checkpoint's own words for the config
        C = config.n_embd
        L = config.n_layer
        rows = config.vocab_rows

        def table(width: int) -> nn.Embedding:  # without random numbers, which take seconds to begin on "meta"
            return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)

        blocks = nn.ModuleList(Block(config, i) for i in range(L))
        self.transformer = nn.ModuleDict({"wte": table(C), "h": blocks})
        self.last_norm = norm_of(config, C)
        if not config.tied:
            self.lm_head = Linear(C, rows)
        width = config.n_kv_head * config.head_dim
        gated = {str(i): table(width) for i, block in enumerate(blocks) if hasattr(block.attn, "ve_gate")}
        self.value_embeds = nn.ModuleDict(gated)
        if config.value_gate:
            self.resid_lambdas = nn.Parameter(torch.linspace(1.15, 1.05, L))
            self.x0_lambdas = nn.Parameter(torch.linspace(0.20, 0.05, L))
        if config.smear:
            self.smear_gate = Linear(SMEAR_WIDTH, 1)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
            self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))
        for name, p in self.named_parameters():
            p.requires_grad_("lora_" in name or not config.lora_rank)

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    @torch.no_grad()
    def init_weights(self, seed: int) -> "GPT":
        """Random matrices to train from, as large as nanochat makes them."""
        generator = torch.Generator().manual_seed(seed)
        usual = self.config.n_embd**-0.5
        stds = {"c_proj": 0.0, "wte": 0.8, "lm_head": 0.001, "c_fc": 0.4 * usual, "": usual}  # of names with this
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = next(std for part, std in stds.items() if part in name)
                p.normal_(std=std, generator=generator)
        return self

    def forward(self, ids: Tensor, cache: Cache) -> Tensor:
        """Runs new tokens after those in the cache, and adds them to it. ids (B, T) -> hidden states (B, T, C)."""
        config = self.config
        queries, keys = cache.extend(ids)
        x = self.transformer.wte(ids)
        rope = rope_of(config, queries, x.dtype)
        windows = config.windows or (2**30,) * config.n_layer
        masks = {window: mask_of(queries, keys, window, x.dtype) for window in set(windows)}
        if config.embed_norm:
            x = F.rms_norm(x, x.shape[-1:])
        last, cache.last = cache.last, x
        if config.smear:
            last = torch.zeros_like(x) if last is None else last
            previous = torch.cat([last[:, -1:], x[:, :-1]], dim=1)
            gate = torch.sigmoid(self.smear_gate(x[..., :SMEAR_WIDTH]))
            x = x + self.smear_lambda * gate * previous
        x0 = x
        for i, block in enumerate(self.transformer.h):
            if config.value_gate:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            value = self.value_embeds[str(i)](ids) if str(i) in self.value_embeds else None
            x = recomputed(block, self.recompute)(x, value, rope, masks[windows[i]], cache)
            if i == config.n_layer // 2:
                middle = x
        if config.smear:
            x = x - self.backout_lambda * middle
        return self.last_norm(x)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> float32 logits (..., vocab_size), before a softcap, which is the policy's."""
        table = self.transformer.wte if self.config.tied else self.lm_head
        return product(hidden, table.weight)[..., : self.config.vocab_size].float()


def empty_model(config: Config) -> GPT:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return GPT(config)


def pad(sequences: list, device: torch.device) -> Tensor:
    """Lists or arrays of numbers -> (B, T), padded with zeros on the right."""
    return nn.utils.rnn.pad_sequence([*map(torch.as_tensor, sequences)], batch_first=True).to(device)


def prefix_of(model: GPT, prompts: list[list[int]]) -> Prefix:
    """Runs the prompts, each once."""
    cache = Cache()
    lengths = torch.tensor([len(p) for p in prompts], device=model.device, dtype=torch.int32)
    hidden = model(pad(prompts, model.device), cache)
    last = torch.arange(len(prompts), device=model.device), lengths - 1
    kv = torch.stack(list(cache.own.values()))
    return Prefix(lengths, hidden[last], cache.last[last], kv)


# ----------------------------------------------------------------------------------------------------------------------
# The calculator, tokenizers and chat templates

def calculate(expression: str) -> str | None:
    """What nanochat's calculator says, fractions to ten significant digits, 5.0 as 5; None where it has nothing to say.
    It knows digits and `+ - * / // . ( )`, commas being removed, and 'text'.count('part')."""
    expression = expression.replace(",", "").strip()
    if counted := re.fullmatch(r"""(?a)\(?(['"])([\w .()]*)\1\.count\((['"])([\w .()]*)\3\)\)?""", expression):
        return str(counted[2].count(counted[4]))
    if len(expression) > 200 or "**" in expression or not re.fullmatch(r"[0-9+\-*/.() ]+", expression):
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # the parser's, on what only looks like a number
            value = eval(expression)        # of such characters: nothing that can be called, no power
        if not math.isfinite(value):
            return None
    except (SyntaxError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None
    return str(int(value)) if value == int(value) else format(Decimal(f"{value:.10g}"), "f")


class Tokenizer:
    """nanochat's: a tiktoken encoding and special tokens, each an attribute: bos, user_start, …, output_end.

    What every tokenizer has: `vocab_size`, `encode`, `encode_raw`, `decode`, `render`, the `stops` that end the model's
    turn, `call_end`, which closes a call of the calculator that `answer_call` answers (−1: none), and `save`.
    """

    SPECIAL = (
        "bos user_start user_end assistant_start assistant_end python_start python_end output_start output_end"
    ).split()

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        vars(self).update({name: encoding.encode_single_token(f"<|{name}|>") for name in self.SPECIAL})
        self.stops = self.assistant_end, self.bos
        self.call_end = self.python_end

    def encode(self, text: str) -> list[int]:
        """Text -> token ids. What looks like a special token in it is plain text."""
        return self.encoding.encode_ordinary(text)

    def encode_raw(self, text: str) -> list[int]:
        """The same, but for special tokens, which are recognised."""
        return self.encoding.encode(text, allowed_special="all")

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)

    def render(self, messages: list[dict]) -> list[int]:
        """The chat up to where the assistant begins to speak. Messages have a role (system, which may come first,
        user, assistant) and a content; a system text stands at the head of the first user turn."""
        if messages[0]["role"] == "system":
            system, first, *rest = messages
            messages = [first | {"content": f"{system['content']}\n\n{first['content']}"}, *rest]
        ids = [self.bos]
        for message in messages:
            role = message["role"]
            ids += [getattr(self, f"{role}_start"), *self.encode(message["content"]), getattr(self, f"{role}_end")]
        return [*ids, self.assistant_start]

    def answer_call(self, ids: list[int]) -> list[int]:
        """What is forced after a completion's call, which its last token has closed: the value of what stands
        between the last python_start and this python_end. Empty where there is no call or no value."""
        body = ids[:-1]
        borders = [i for i, token in enumerate(body) if token in (self.python_start, self.python_end)]
        if not borders or body[borders[-1]] == self.python_end:
            return []
        result = calculate(self.decode(body[borders[-1] + 1 :]))
        return [] if result is None else [self.output_start, *self.encode(result), self.output_end]

    def save(self, folder: Path) -> None:
        write_file(folder / "tokenizer.pkl", pickle.dumps(self.encoding))


FILES = [                                   # of Hugging Face's folders, besides weights
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]


class ChatTokenizer:
    """Hugging Face's: a tokenizer.json and a chat template. Text that spells a special token becomes that token, in
    messages too. `files` are as they were read, so that whatever read the folder reads what is saved."""

    call_end = -1                           # no calculator

    def __init__(self, folder: Path, variables: dict | None = None):
        """`variables` are what the chat template is given; one named chat_template replaces the folder's, as in
        transformers' apply_chat_template. Raises UserError on files that fail."""
        from transformers import PreTrainedTokenizerFast  # takes seconds

        self.variables = variables or {}
        self.files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in FILES}
        if template := self.variables.get("chat_template"):
            self.files["chat_template.jinja"] = template.encode()
        # not AutoTokenizer: for some classes it makes another tokenizer than the one in tokenizer.json
        mend = "fetch it again, or let transformers' AutoTokenizer save_pretrained it"
        with blaming(f"tokenizer.json of {folder} is missing or broken, or a file beside it", mend):
            (folder / "tokenizer.json").stat()  # transformers makes do with others, which are not saved
            self.chat = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            configs = [json.loads(self.files.get(f"{name}.json", "{}")) for name in ("generation_config", "config")]
            ends = [*(config.get("eos_token_id") for config in configs), self.chat.eos_token_id]
        self.vocab_size = 1 + max(self.chat.get_vocab().values())
        end = next((end for end in ends if end is not None), [])
        self.stops = tuple(sorted({*numpy.ravel(end).tolist(), *self.turn_end()}))

    def encode(self, text: str) -> list[int]:
        return self.chat.encode(text, add_special_tokens=False, verbose=False)

    encode_raw = encode

    def decode(self, ids: list[int]) -> str:
        """Token ids -> text, special tokens as they are spelled; an id without a token is nothing."""
        return self.chat.decode(ids, clean_up_tokenization_spaces=False)

    def render_text(self, messages: list[dict]) -> str:
        """A chat as the template, which is a stranger's code and runs in transformers' sandbox, writes it, up to where
        the assistant begins to speak unless the last message is the assistant's. Raises UserError where it fails."""
        asked = messages[-1]["role"] != "assistant"
        with blaming("the chat template fails", "give another by --chat-template FILE"):
            return self.chat.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asked, **self.variables
            )

    def render(self, messages: list[dict]) -> list[int]:
        return self.encode(self.render_text(messages))

    def turn_end(self) -> list[int]:
        """The added token that the template, if there is one, writes after what the assistant says, if it does."""
        if not (self.variables.get("chat_template") or self.chat.chat_template):
            return []                       # a base model, to be asked with --raw-prompt
        said = [{"role": "user", "content": "Agreed?"}, {"role": "assistant", "content": "Agreed."}]
        after = self.render_text(said).partition("Agreed.")[2].lstrip()
        return [token for token in self.encode(after)[:1] if token in self.chat.added_tokens_decoder]

    def save(self, folder: Path) -> None:
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


# ----------------------------------------------------------------------------------------------------------------------
# The policy: what is sampled from, in sampling and in the loss


@dataclass(frozen=True)
class Policy:
    """The softmax of the softcapped logits over the temperature, cut to the top k."""

    temperature: float = 1.0
    top_k: int = 50                         # 0: all; 1: greedy
    softcap: float = 0.0                    # the model's; 0: none

    def scores(self, logits: Tensor) -> Tensor:
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits if self.temperature == 1 else logits / self.temperature  # each pass over a vocabulary counts

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """What can be sampled, given logits (..., V): scores whose softmax is the policy (..., k), best first, and
        their token ids (..., k). With top_k 0 all V of them, in the order of their ids (None)."""
        if not self.top_k:
            return self.scores(logits), None
        values, ids = logits.topk(min(self.top_k, logits.size(-1)))  # a softcap keeps the order
        return self.scores(values), ids

    def draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Samples by inverting the distribution function: logits (B, V), numbers between 0 and 1 (B,), of which 0 draws
        the likeliest token -> (3, B) tokens (float32 holds any id), their logprobs, and the entropies, in nats, of the
        distributions they are drawn from."""
        scores, ids = self.candidates(logits)
        p = scores.softmax(dim=-1)
        cumulative = p.cumsum(dim=-1)
        aim = uniform.unsqueeze(1) * cumulative[:, -1:]
        pick = torch.searchsorted(cumulative, aim, right=True).clamp_(max=scores.size(-1) - 1)
        pick = torch.where(aim > 0, pick, scores.argmax(dim=-1, keepdim=True))
        tokens = pick if ids is None else ids.gather(1, pick)
        logprobs = p.gather(1, pick).clamp(min=1e-38).log()  # of the last, which rounding may draw, p can be 0
        entropy = scores.gather(1, pick) - logprobs - (p * scores).sum(dim=-1, keepdim=True)  # log Σ exp − E[score]
        return torch.cat([tokens, logprobs, entropy], dim=1).T

    def logprobs(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Logprobs of tokens (...), given logits (..., V). A token that rounding or an update pushed out of the top k
        takes the place of the last one in it."""
        scores, ids = self.candidates(logits)
        chosen = self.scores(logits.gather(-1, tokens.unsqueeze(-1)))
        if ids is not None:
            inside = (ids == tokens.unsqueeze(-1)).any(dim=-1, keepdim=True)
            scores = torch.cat([scores[..., :-1], torch.where(inside, scores[..., -1:], chosen)], dim=-1)
        return chosen.squeeze(-1) - scores.logsumexp(dim=-1)


LOGITS_AT_ONCE = 2**26


def in_pieces(model: GPT, work: Callable, hidden: Tensor, other: Tensor) -> Tensor:
    """work(logits, other) (…, M) of hidden states (M, C) and what belongs to them (M,), piece by piece, with no more
    than LOGITS_AT_ONCE logits at once: a backward makes those of several pieces again."""
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_rows)
    run = recomputed(lambda hidden, other: work(model.unembed(hidden), other), when=len(hidden) > size)
    return torch.cat(list(map(run, hidden.split(size), other.split(size))), dim=-1)


# ----------------------------------------------------------------------------------------------------------------------
# The sampler


@dataclass
class Completion:
    """What was sampled, token by token (T,), with the stop token where there is one."""

    tokens: numpy.ndarray                   # int64
    sampled: numpy.ndarray                  # bool: False where the calculator forced the token
    logprobs: numpy.ndarray                 # float32: under the policy it was drawn from; 0 where forced
    entropy: float = 0.0                    # of that policy, summed over the sampled tokens, in nats


def uniforms(*counters: int | numpy.ndarray) -> numpy.ndarray:
    """Random float32 between 0 and 1, neither of them included, as a function of counters that are not negative:
    SplitMix64 (Steele et al. 2014) takes them in one after another. Arrays of counters broadcast."""
    x = numpy.zeros(1, numpy.uint64)
    for counter in counters:
        x = x + numpy.asarray(counter, numpy.uint64) + 0x9E3779B97F4A7C15
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9
        x = (x ^ x >> 27) * 0x94D049BB133111EB
        x = x ^ x >> 31
    return (((x >> 41) + 0.5) / 2**23).astype(numpy.float32)


def batched(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


class Transcript:
    """What is said in each row, kept on the host, and what the calculator will force."""

    def __init__(self, tokenizer: Tokenizer, num_rows: int, max_new_tokens: int):
        self.tokenizer = tokenizer
        self.said = numpy.zeros((3, num_rows, max_new_tokens))  # tokens, their logprobs and entropies
        self.forced = numpy.full((num_rows, max_new_tokens), -1)  # −1: sampled
        self.lengths = numpy.full(num_rows, max_new_tokens)  # at most, of those that have not ended

    def write(self, t: int, rows: numpy.ndarray, drawn: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Writes down what was drawn (3, B) for position t of the rows (B,), or forced, and answers their calls.
        Returns the tokens (B,), and which rows go on (B,)."""
        forced = self.forced[rows, t]
        drawn = numpy.where(forced < 0, drawn, numpy.outer((1, 0, 0), forced))
        self.said[:, rows, t] = drawn
        tokens = drawn[0].astype(int)
        for row in rows[tokens == self.tokenizer.call_end]:
            said = self.said[0, row, : t + 1].astype(int)
            result = self.tokenizer.answer_call(said.tolist())
            rest = self.forced[row, t + 1 :]
            rest[: len(result)] = result[: len(rest)]
        stopped = rows[numpy.isin(tokens, self.tokenizer.stops)]  # some did before, but are still in the batch
        self.lengths[stopped] = numpy.minimum(self.lengths[stopped], t + 1)
        return tokens, self.lengths[rows] > t + 1

    def groups(self, num_samples: int) -> list[list[Completion]]:
        """The completions, so many to a list."""
        completions = [
            Completion(ids[:n].astype(int), forced[:n] < 0, p[:n].astype(numpy.float32), float(entropies[:n].sum()))
            for ids, p, entropies, forced, n in zip(*self.said, self.forced, self.lengths)
        ]
        return list(batched(completions, num_samples))


@torch.inference_mode()
def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    num_samples: int,
    max_new_tokens: int,
    policy: Policy,
    seed: tuple[int, ...],
    streams: list[int],
    progress: Callable[[int], Any] = bool,
    greedy: bool = False,
) -> list[list[Completion]]:
    """Samples `num_samples` completions of each prompt (a list of token ids): one list per prompt, in order. If
    `greedy`, the last of each takes the likeliest token every time.

    Each random number is a function of (seed, stream, sample, position): `streams` names the prompts'. A completion
    ends with one of the tokenizer's stops, or after max_new_tokens tokens, forced ones included. `progress` is told
    after each position how many have ended. Raises ValueError past the model's last position."""
    if max(map(len, prompts)) + max_new_tokens > model.config.max_positions:
        raise ValueError(f"a prompt and its completion take more than {model.config.max_positions} positions")
    cache = Cache(prefix_of(model, prompts), num_samples)
    hidden = cache.prefix.hidden.repeat_interleave(num_samples, dim=0)
    streams = numpy.array(streams)
    rows = numpy.arange(len(hidden))        # those in the cache
    transcript = Transcript(tokenizer, len(rows), max_new_tokens)
    for t in range(max_new_tokens):
        question, sample = numpy.divmod(rows, num_samples)
        uniform = uniforms(*seed, streams[question], sample, t)
        if greedy:
            uniform[sample == num_samples - 1] = 0  # which draws the likeliest
        drawn = in_pieces(model, policy.draw, hidden, cache.to_device(uniform))
        tokens, going = transcript.write(t, rows, drawn.cpu().numpy())  # the one wait for the device
        progress(int((transcript.lengths == t + 1).sum()))
        if not going.any():
            break
        if going.sum() <= 0.75 * len(rows):
            cache.select(going.nonzero()[0])
            rows, tokens = rows[going], tokens[going]
        hidden = model(cache.to_device(tokens).unsqueeze(1), cache).squeeze(1)
    return transcript.groups(num_samples)


def completion_logprobs(
    model: GPT, prefix: Prefix, completions: list[Completion], policy: Policy
) -> tuple[Tensor, Tensor]:
    """Logprobs (M,) of the completions' sampled tokens, and the row (M,) of each. The entries of `prefix` are their
    questions. Forced tokens are attended to, but have no logprob. The same in any batch, to rounding."""
    tokens = pad([c.tokens for c in completions], model.device)
    sampled = pad([c.sampled for c in completions], model.device)
    hidden = model(tokens[:, :-1], Cache(prefix))
    hidden = torch.cat([prefix.hidden.unsqueeze(1), hidden], dim=1)  # (B, T, C)
    logprobs = in_pieces(model, policy.logprobs, hidden[sampled], tokens[sampled])
    return logprobs, sampled.nonzero()[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: nanochat's and Hugging Face's folders

NAMES = {                                   # parts of GPT's names of parameters -> Hugging Face's and PEFT's, in turn
    "transformer.wte": "model.embed_tokens",
    "transformer.h": "model.layers",
    "last_norm": "model.norm",
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
    "attn": "self_attn",
    "c_q": "q_proj",
    "c_k": "k_proj",
    "c_v": "v_proj",
    "c_proj": "o_proj",
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
}


def huggingface_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


class PlainUnpickler(pickle.Unpickler):
    """Admits a tiktoken encoding and plain data, so that no file can run code."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return tiktoken.Encoding


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder that is to appear at `path` whole or not at all: in a folder beside it, to be
    flushed to disk and moved. Raises OSError, also for what torch and safetensors have heard from the disk."""
    beside = path.with_name(path.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    part = beside / path.name
    try:
        yield part
        for written in (part, *part.rglob("*")):
            if written.is_file():
                with open(written, "rb") as file:
                    os.fsync(file)
        shutil.rmtree(path, ignore_errors=True)
        part.replace(path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise OSError(f"cannot write {path} ({one_line(error.__context__ or error)})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_file(path: Path, content: bytes | Callable) -> None:
    """A file of bytes, or of what a function writes, appears whole or not at all. Raises OSError."""
    with appearing(path) as part, open(part, "wb") as file:
        content(file) if callable(content) else file.write(content)


def read_state(path: Path) -> dict:
    """What torch.save wrote, on the CPU, and nothing that runs code. Raises ValueError, among others, on damage, of a
    bit too, which torch.load would not notice."""
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise ValueError("its checksum is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps that a folder has whole, ascending: of nanochat's format a model and a meta file."""
    steps = [path.parent.name for path in folder.glob("*/config.json")]
    steps += {path.stem[6:] for path in folder.glob("model_*.pt")} & {path.stem[5:] for path in folder.glob("meta_*")}
    return sorted(int(step) for step in steps if step.isdecimal())


def find_checkpoint(directory: Path, step: int | None) -> Path:
    """Where a checkpoint is, by default the last: the model file of nanochat's format, or a folder in Hugging Face's,
    of a run's step, or what is given itself. Raises UserError."""
    if directory.is_file() or step is None and any(directory.glob("model*.safetensors*")):
        return directory
    steps = checkpoint_steps(directory)
    if step is None:
        step = max(steps, default="any")
    if step not in steps:
        raise UserError(
            f"no model of step {step} in {directory} (there: {steps}): give a folder with model_<N>.pt and "
            "meta_<N>.json, or without --model-step one with config.json and model.safetensors (an adapter has to be "
            "merged into its base: PEFT's merge_and_unload)"
        )
    folder = directory / f"{step:06d}"
    return folder if folder.is_dir() else directory / f"model_{step:06d}.pt"


def detect_generation(state: dict[str, Tensor]) -> str:
    """The generation of nanochat's model that a state dict belongs to, by its keys. Raises ValueError."""
    gate = next((x.size(1) for key, x in state.items() if key.endswith("ve_gate.weight")), 0)
    fields = gate, "smear_gate.weight" in state
    for name, known in GENERATIONS.items():
        if fields == (known.get("value_gate", 0), known.get("smear", False)):
            return name
    raise ValueError(f"value-embedding gates of width {gate} are of no nanochat generation known here")


COPY_AGAIN = "copy it here again"


def build(config: Config, state: dict[str, Tensor]) -> GPT:
    """The model that a state dict belongs to, in its types, and adapters that do nothing yet. Raises RuntimeError,
    naming the key, on one that is none of the config's."""
    model = empty_model(config)
    model.stored_types = {key: x.dtype for key, x in state.items()}
    generator = torch.Generator().manual_seed(42)
    for key, x in model.state_dict().items():
        if "lora_" in key:
            std = x.size(1) ** -0.5 if key.endswith("lora_a") else 0.0
            state[key] = torch.normal(0.0, std, x.shape, generator=generator)
    model.load_state_dict(state, assign=True)
    return model


def load_nanochat(path: Path, lora_rank: int) -> tuple[GPT, Tokenizer]:
    """What nanochat's model file holds. The tokenizer's is beside it, or two folders up in tokenizer/."""
    beside = path.with_name("tokenizer.pkl")
    above = path.absolute().parent.parent.parent / "tokenizer" / "tokenizer.pkl"
    place = beside if beside.exists() else above
    mend = f"put the model's own tokenizer.pkl there, or at {beside}"
    with blaming(f"{place} is no nanochat tokenizer", mend), open(place, "rb") as file:
        tokenizer = Tokenizer(PlainUnpickler(file).load())
    about = path.with_name(path.stem.replace("model", "meta") + ".json")
    with blaming(f"{about} is no nanochat meta file", COPY_AGAIN):
        raw = json.loads(about.read_text())["model_config"]
    state = {key.removeprefix("_orig_mod."): tensor.contiguous() for key, tensor in read_state(path).items()}
    rows = len(state["transformer.wte.weight"])
    if not tokenizer.vocab_size == raw["vocab_size"] <= rows:
        raise UserError(
            f"{place} has {tokenizer.vocab_size} tokens, {path} {rows} rows for {raw['vocab_size']}: {mend}"
        )
    config = nanochat_config(detect_generation(state), **raw, vocab_rows=rows, lora_rank=lora_rank)
    model = build(config, state)
    model.raw_config = raw
    return model, tokenizer


def load_huggingface(folder: Path, lora_rank: int, variables: dict | None) -> tuple[GPT, ChatTokenizer]:
    """What a folder of Hugging Face's holds."""
    from transformers import AutoConfig     # takes seconds

    tokenizer = ChatTokenizer(folder, variables)
    raw = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).to_dict()
    config = huggingface_config(raw, tokenizer.vocab_size)
    names = {huggingface_name(name): name for name in [*empty_model(config).state_dict(), "lm_head.weight"]}
    files = {"model.safetensors"}           # which transformers too prefers
    if not (folder / "model.safetensors").exists():
        files = {*json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()}
    state = {}
    for file in sorted(files):
        with blaming(f"{folder / file} cannot be read", COPY_AGAIN):
            tensors = safetensors.torch.load_file(folder / file)
        state |= {
            names.get(name, repr(name)): tensor  # quoted, what no family has
            for name, tensor in tensors.items()
            if not name.endswith("rotary_emb.inv_freq")  # of old folders: it follows from the config
        }
    head = state.pop("lm_head.weight", None) if config.tied else None
    if head is not None and not torch.equal(head, state.setdefault("transformer.wte.weight", head)):
        raise UserError(
            f"{folder}: lm_head.weight is not model.embed_tokens.weight, but config.json says tie_word_embeddings: set "
            "that to false if the file's lm_head is meant"
        )
    return build(replace(config, lora_rank=lora_rank), state), tokenizer


def load_checkpoint(
    directory: Path, step: int | None = None, lora_rank: int = 0, variables: dict | None = None
) -> tuple[GPT, Any]:
    """Loads a model, on the CPU and in the types that it has on disk, and its tokenizer: from a nanochat folder (a step
    of it, or the last complete one), from one in Hugging Face's format, or from a run's that holds such folders. The
    `variables` are ChatTokenizer's. Raises UserError, naming the file, on whatever is missing, broken or foreign."""
    path = find_checkpoint(directory, step)
    mend = (f"{COPY_AGAIN}, weights as *.safetensors with their index, or take a model of an architecture known here "
            "(nanochat's as model_<N>.pt)")
    with blaming(f"{path} cannot be loaded", mend):
        if path.is_dir():
            return load_huggingface(path, lora_rank, variables)
        return load_nanochat(path, lora_rank)


@torch.no_grad()
def merge(model: GPT, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a state dict as they are to be saved: in the types that they were loaded with, with the adapters
    in them."""
    weights = {}
    for key, x in state.items():
        module, _, kind = key.rpartition(".")
        if kind == "weight" and f"{module}.lora_a" in state:
            a, b = (state[f"{module}.lora_{end}"].cpu().float() for end in "ab")
            x = x.cpu().float() + LORA_ALPHA / len(a) * b @ a
        if "lora_" not in kind:             # a copy: a view would be written with all that it is a view of
            weights[key] = x.to("cpu", model.stored_types.get(key), copy=True)
    return weights


def save_adapter(folder: Path, rank: int, state: dict[str, Tensor], base: str) -> None:
    """PEFT's folder of the adapters in a state dict to a model that is found at `base`."""
    tensors = {f"base_model.model.{huggingface_name(key)}": x.cpu() for key, x in state.items() if "lora_" in key}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": LORA_ALPHA,
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def save_checkpoint(
    folder: Path, step: int, model: GPT, state: dict[str, Tensor], tokenizer: Any, source: str = ""
) -> None:
    """Writes a checkpoint of the weights in `state`, which has GPT's names and may be of other types than the model, in
    the format that its tokenizer came in: nanochat's tokenizer.pkl, model_<step>.pt and last meta_<step>.json, or
    Hugging Face's folder <step>, in it PEFT's of the adapters to the model at `source`. Tensors have the types that
    they were loaded with. Raises OSError, leaving earlier checkpoints as they were."""
    weights = merge(model, state)
    if isinstance(tokenizer, Tokenizer):
        tokenizer.save(folder)
        write_file(folder / f"model_{step:06d}.pt", partial(torch.save, weights))
        meta = {"step": step, "model_config": model.raw_config}
        write_file(folder / f"meta_{step:06d}.json", json.dumps(meta, indent=2).encode())
        return
    with appearing(folder / f"{step:06d}") as part:
        part.mkdir()
        tokenizer.save(part)
        huggingface_hub.save_torch_state_dict({huggingface_name(key): x for key, x in weights.items()}, part)
        if model.config.lora_rank:
            save_adapter(part / "adapter", model.config.lora_rank, state, source)


def find_folder(place: str) -> Path:
    """The folder of that path, or of a model on the hub: its cached one, fetched if need be. Raises UserError where it
    is neither there nor can be fetched, or is there in part."""
    if Path(place).exists():
        return Path(place)
    wanted = [*FILES, "*.safetensors", "*.index.json"]
    mend = "go online (and `hf auth login`, where the model asks for it), or give a folder to --model-tag"
    with blaming(f"{place} is no file or folder and cannot be had from the hub", mend):
        folder = Path(huggingface_hub.snapshot_download(place, allow_patterns=wanted))
        for path in folder.iterdir():
            path.stat()                     # of what is cached in part some links lead nowhere
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# The learner: weights over ranks, optimizers

# Quintic polynomials that take singular values to 1, fastest in the worst case (Polar Express, Amsel et al. 2025, arXiv
# 2505.16932), with the paper's safety factor: its a / 1.01, b / 1.01³, c / 1.01⁵, and so the norm in `orthogonalize`.
POLAR_EXPRESS = (
    (8.205160414005574, -22.90193498705605, 16.460724910180314),
    (4.066395159942775, -2.8611540867551426, 0.5183995226694741),
    (3.9095949044379155, -2.823351735039516, 0.5250369769390025),
    (3.2855640171986153, -2.415301959635945, 0.48529406552790866),
    (2.277873287083977, -1.619821765265441, 0.39848078704168355),
)


def orthogonalize(x: Tensor) -> Tensor:
    """Matrices (…, rows, columns) -> about U·Vᵀ of their singular value decompositions; in bfloat16 on a GPU."""
    tall = x.size(-2) > x.size(-1)
    x = x.to(torch.bfloat16 if x.is_cuda else x.dtype)
    x = x.mT if tall else x
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True)).clamp(min=1e-30)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def muon(p: Tensor, gradient: Tensor, average: Tensor, lr: float) -> None:
    """A step of Muon (Jordan et al. 2024) for matrices (…, rows, columns): Nesterov momentum 0.95, orthogonalised,
    times √max(1, rows / columns)."""
    average.lerp_(gradient, 0.05)
    update = orthogonalize(gradient.lerp(average, 0.95))
    p.sub_(update, alpha=lr * math.sqrt(max(1, p.size(-2) / p.size(-1))))


class Recipe(NamedTuple):
    """How a parameter learns: with Muon, or with AdamW (Loshchilov and Hutter 2019)."""

    muon: bool
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def recipe_of(name: str, shape: torch.Size, config: Config, rates: Any) -> Recipe:
    """nanochat's models learn as nanochat has it, the matrices of their blocks with Muon unless these are adapters;
    others with AdamW throughout, norms and biases at the embedding's rate. `rates` is anything with an embedding_lr,
    an unembedding_lr, a matrix_lr and a weight_decay, which is for the two tables."""
    matrix = len(shape) == 2 and name.startswith("transformer.h")
    decay = rates.weight_decay if name.startswith(("transformer.wte", "lm_head")) else 0.0
    if config.norm_weights:                 # not nanochat's
        lr = rates.unembedding_lr if name.startswith("lm_head") else rates.embedding_lr
        return Recipe(False, rates.matrix_lr if matrix else lr, 0.9, 0.95, 1e-8, decay)
    scale = (config.n_embd / 768) ** -0.5
    rates_and_betas = {                     # of names that begin like this
        "transformer.h": (rates.matrix_lr, 0.9, 0.95),
        "transformer.wte": (rates.embedding_lr * scale, 0.8, 0.995),
        "value_embeds": (rates.embedding_lr * scale / 2, 0.8, 0.995),
        "lm_head": (rates.unembedding_lr * scale, 0.8, 0.96),
        "resid_lambdas": (0.005, 0.8, 0.95),
        "x0_lambdas": (0.5, 0.96, 0.95),
        "": (0.2, 0.8, 0.95),               # smear and backout
    }
    found = next(value for start, value in rates_and_betas.items() if name.startswith(start))
    return Recipe(matrix and not config.lora_rank, *found, 1e-10, decay)


@dataclass
class Shard:
    """A parameter that learns, and on the rank that owns it its state: float32 masters, which in float32 are the
    weights, and the optimizer's averages, of which Muon has one."""

    p: nn.Parameter
    recipe: Recipe
    owner: int
    state: dict[str, Tensor | None]         # None on other ranks

    def step(self, steps: int, fraction: float) -> None:
        """Steps the masters, at a fraction of the rate, and rounds them to weights."""
        is_muon, lr, beta1, beta2, eps, weight_decay = self.recipe
        masters, average, *squares = self.state.values()
        if is_muon:
            muon(masters, self.p.grad, average, lr * fraction)
        else:
            steps = torch.full((), steps - 1.0, device=masters.device)  # a GPU would wait for a tensor from here
            adamw(
                [masters], [self.p.grad], [average], squares, [], [steps],
                lr=lr * fraction,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                weight_decay=weight_decay,
                amsgrad=False,
                maximize=False,
                fused=masters.is_cuda,
            )
        self.p.copy_(masters)


class Learner:
    """A model that learns on all ranks. Its weights have the type of the arithmetic, gradients are added up in float32,
    and the rest is held once over the ranks: ZeRO's first stage (Rajbhandari et al. 2020). Between updates the
    gradients carry state from rank to rank."""

    @torch.no_grad()
    def __init__(self, model: GPT | None, ranks: Ranks, dtype: torch.dtype, rates: Any):
        """Takes over rank 0's model, which is on a CPU, and whose weights may have any types. Without rates nothing
        learns, and nothing is held but the weights."""
        self.ranks = ranks
        self.shards = {}
        config = ranks.from_main(model and model.config)
        theirs = model.state_dict() if model else {}  # tensors that stay where they are
        self.model = (model or empty_model(config)).to_empty(device=ranks.device).to(dtype)
        if not rates:
            self.model.requires_grad_(False)
        loads = [0] * ranks.size
        for name, p in sorted(self.model.named_parameters(), key=lambda item: -item[1].numel()):  # the largest first
            if not p.requires_grad:         # the base of adapters
                p.copy_(theirs.get(name, p))
                ranks.broadcast(p)
                continue
            p.grad_dtype = torch.float32
            p.grad = torch.zeros_like(p, dtype=torch.float32)
            recipe = recipe_of(name, p.shape, config, rates)
            averages = ["exp_avg"] if recipe.muon else ["exp_avg", "exp_avg_sq"]
            owner = loads.index(min(loads))  # the rank with the least to hold
            loads[owner] += p.numel() * (1 + len(averages))
            mine = owner == ranks.rank
            state = {"masters": p.detach().float() if mine else None}  # in float32 the weights themselves
            state |= {kind: torch.zeros_like(p.grad) if mine else None for kind in averages}
            self.shards[name] = Shard(p, recipe, owner, state)
        self.load_state({"updates": 0, "masters": theirs} if model else {})  # as any later state

    @torch.no_grad()
    def update(self, num_tokens: float, fraction: float = 1.0, clip: float = 0.0) -> float:
        """Adds up the ranks' gradients, divides them by the number of tokens, and steps, each rank its shard, at this
        fraction of the rates. Returns the norm of the gradient, which is cut to `clip` unless that is 0; where it is
        not finite no step is made."""
        shards = self.shards.values()
        for shard in shards:
            self.ranks.add_up(shard.p.grad.div_(num_tokens))
        norm = nn.utils.get_total_norm(shard.p.grad for shard in shards).item()
        if math.isfinite(norm):
            self.updates += 1
            for shard in shards:
                if 0 < clip < norm:
                    shard.p.grad.mul_(clip / norm)
                if shard.owner == self.ranks.rank:
                    shard.step(self.updates, fraction)
            for shard in shards:            # apart, for a rank that receives waits for the owner's step
                self.ranks.broadcast(shard.p, shard.owner)
        return norm

    @torch.no_grad()
    def save_state(self) -> dict:
        """On rank 0 what a run goes on from: the number of updates, and by the names of parameters float32 masters and
        averages, in host memory. Overwrites the gradients."""
        saved = {"updates": self.updates}
        for name, shard in self.shards.items():
            for kind, x in shard.state.items():
                if x is not None:
                    shard.p.grad.copy_(x)
                self.ranks.broadcast(shard.p.grad, shard.owner)
                if self.ranks.rank == 0:
                    saved.setdefault(kind, {})[name] = shard.p.grad.to("cpu", copy=True)
        return saved

    @torch.no_grad()
    def load_state(self, saved: dict) -> None:
        """Takes up rank 0's, which another number of ranks may have saved; averages that it lacks are 0. Raises
        KeyError where it lacks a parameter."""
        self.updates = self.ranks.from_main(saved.get("updates"))
        for name, shard in self.shards.items():
            for kind, x in shard.state.items():
                shard.p.grad.copy_(saved[kind][name] if kind in saved else torch.zeros(()))
                self.ranks.broadcast(shard.p.grad)
                if x is not None:
                    x.copy_(shard.p.grad)
                if kind == "masters":
                    shard.p.copy_(shard.p.grad)
