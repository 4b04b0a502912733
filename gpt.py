"""The machine under chat_rl.py: the processes of a run, a small chat GPT, its cache, tokenizer, sampler, checkpoints
and optimizers.

The model has one way of running: new tokens attend to a Cache, which has a part shared by all rows of a group (their
question) and a part of each row's own (its completion). Prefill, decoding and training are that one forward with
different shapes. Nothing here knows of a task, a reward or a training loop.

Letters in shapes: P prompts, N samples per prompt, B = P·N rows, T new tokens, S own and Lp shared positions, H query
heads over G key-value heads, R = H / G, D head width, C channels, V vocabulary, L layers, M sampled tokens.
"""

import ast
import errno
import hashlib
import itertools
import json
import math
import mmap
import operator
import os
import pickle
import re
import signal
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from decimal import Decimal
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import huggingface_hub
import jinja2
import jinja2.ext
import numpy
import safetensors.torch
import tiktoken
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torch import Tensor, nn
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
    """A signal cuts a piece of work short."""


def find_device(device_type: str) -> torch.device:
    """The device of that type, by default the best there is. Raises UserError where it is not there."""
    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = torch.device(device_type or best)
    if device.type not in ("cpu", best.type):
        raise UserError(f"--device-type {device_type} is not on this machine: leave the flag out to use {best.type}")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


class Ranks:
    """The processes of a run, each with a share of every step's questions; one where torchrun did not start it.

    Rank 0 alone reads checkpoints and data, steps the optimizers, prints and saves. A first SIGTERM, SIGINT or SIGHUP
    is heeded where work asks for it, and all ranks stop together; another one, a second later, ends the process at
    once.
    """

    TIMEOUT = timedelta(minutes=30)         # of a collective: a rank that waits longer for another takes it for dead

    def __init__(self, device_type: str):
        self.rank = 0
        self.size = 1
        self.signalled = 0.0                # when the first signal came
        self.device = find_device(device_type)
        if "RANK" not in os.environ:
            return
        missing = {"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
        if missing:
            raise UserError(f"RANK is set, but not {', '.join(sorted(missing))}: start with torchrun, or unset RANK")
        self.rank = int(os.environ["RANK"])
        self.size = int(os.environ["WORLD_SIZE"])
        if self.device.type == "mps" and self.size > 1:
            raise UserError(
                "--device-type mps runs in one process: start it with python, or take --device-type cpu"
            )
        # after a restart torchrun's store still holds what the lost processes wrote: each attempt has its own corner
        store, *_ = next(dist.rendezvous("env://", timeout=self.TIMEOUT))
        store = dist.PrefixStore("attempt" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.size,
            timeout=self.TIMEOUT,
        )

    def everyone(self, thing: Any) -> list:
        """All ranks' things, which hold no tensors, on every rank."""
        things = [thing]
        if self.size > 1:
            things *= self.size
            dist.all_gather_object(things, thing)
        return things

    def reduce(self, tensor: Tensor) -> None:
        """Adds the ranks' tensors up on rank 0, in place; those of the others are spoilt."""
        if self.size > 1:
            dist.reduce(tensor, 0)

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrites the ranks' tensors with rank 0's."""
        if self.size > 1:
            dist.broadcast(tensor, 0)

    def share(self, thing: Any) -> Any:
        """Rank 0's thing, which holds no tensors, on every rank."""
        box = [thing]
        if self.size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def gather(self, items: list) -> list:
        """All ranks' items, dealt back into the order in which [rank::size] dealt them out."""
        rounds = itertools.zip_longest(*self.everyone(items))
        return [item for round in rounds for item in round if item is not None]

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
                signal.signal(number, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        if self.signalled and time.monotonic() - self.signalled > 1:  # one Ctrl-C can arrive twice under torchrun
            os._exit(128 + number)
        self.signalled = self.signalled or time.monotonic()

    def heed(self) -> None:
        """Raises Interrupted where this rank was told to stop."""
        if self.signalled:
            raise Interrupted

    def stopping(self) -> bool:
        """Whether any rank was told to stop: the same answer on all."""
        return any(self.everyone(self.signalled))


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
        lengths, hidden, embed = (x.index_select(0, index) for x in self[:3])
        return Prefix(lengths, hidden, embed, self.kv.index_select(2, index))

    def leaves(self) -> "Prefix":
        """The same, cut off from the graph, to run completions on and to collect their gradients."""
        return Prefix(*(x.detach().requires_grad_(x.requires_grad) for x in self))

    def backward(self, leaves: "Prefix") -> None:
        """Sends the gradients that the leaves have collected back through the questions."""
        reached = [(x, leaf.grad) for x, leaf in zip(self, leaves) if leaf.grad is not None]
        tensors, gradients = zip(*reached)
        torch.autograd.backward(tensors, gradients)


def mask_of(queries: Tensor, keys: Tensor, window: int, dtype: torch.dtype) -> Tensor:
    """0 where a query sees a key (0 ≤ distance ≤ window), else −inf, given positions (B or 1, T), (B or 1, Lp + S):
    (B or 1, 1, T, Lp + S)."""
    distance = (queries.unsqueeze(2) - keys.unsqueeze(1)).unsqueeze(1)
    unseen = (distance < 0) | (distance > window)
    return torch.zeros_like(distance, dtype=dtype).masked_fill_(unseen, -torch.inf)


class Cache:
    """Keys and values that new tokens attend to: a part shared by the rows of a group, and each row's own.

    `Cache()` is empty. `Cache(prefix)` has one row per entry of the prefix; either takes one forward, which may be
    differentiated. `Cache(prefix, N, capacity)`, to decode with, has N rows for each entry, in order, and room for
    `capacity` own tokens of each: P·Lp + B·capacity positions in all. Every row has the same number of own tokens,
    `size`.
    """

    def __init__(self, prefix: Prefix | None = None, num_samples: int = 1, capacity: int = 0):
        self.prefix = prefix
        self.num_samples = num_samples
        self.size = 0
        self.own = {}                       # layer -> (2, B, G, T, D), of a forward without a prefix
        self.room = None                    # (L, 2, B, G, capacity, D), of a cache to decode with
        self.last = None                    # (B, T, C) embeddings of the latest forward
        self.slot_of_row = self.row_of_slot = None  # of uneven groups (B,), (P·N,)
        if prefix is None:
            return
        self.shared = prefix.kv.unbind()    # L times (2, P, G, Lp, D)
        self.groups = numpy.arange(len(prefix.lengths)).repeat(num_samples)  # each row's entry of the prefix
        rows = self.to_device(self.groups)
        self.starts = prefix.lengths[rows]
        self.last = prefix.embed[rows].unsqueeze(1)
        if capacity:
            L, _, _, G, _, D = prefix.kv.shape
            self.room = prefix.kv.new_empty(L, 2, len(rows), G, capacity, D)

    def to_device(self, index: numpy.ndarray) -> Tensor:
        return torch.from_numpy(index).to(self.prefix.lengths.device, non_blocking=True)

    def positions(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """From the question's start, those of the new tokens ids (B, T), (B or 1, T), and of all keys, beyond all reach
        where they are padding, (B or 1, Lp + S)."""
        keys = torch.arange(self.size + ids.size(1), device=ids.device).unsqueeze(0)
        if self.prefix is not None:
            starts = self.starts.unsqueeze(1)
            shared = torch.arange(self.prefix.kv.size(4), device=ids.device)
            shared = shared.masked_fill(shared >= starts, 2**40)
            keys = torch.cat([shared, starts + keys], dim=1)
        return keys[:, keys.size(1) - ids.size(1) :], keys

    def previous(self, x: Tensor) -> Tensor:
        """Embeddings x (B, T, C) of the new tokens -> those of the tokens before them, zero before the first."""
        if self.last is None:
            self.last = torch.zeros_like(x[:, :1])
        before = self.last[:, -1:]
        self.last = x
        return torch.cat([before, x[:, :-1]], dim=1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        """One softmax over the shared and the own part, which k and v join: q (B, H, T, D), k and v (B, G, T, D) ->
        (B, H, T, D)."""
        own = torch.stack((k, v))
        if self.room is not None:
            end = self.size + k.size(2)
            room = self.room[layer, :, :, :, :end]
            room[:, :, :, self.size :] = own
            return self.attend_in_groups(q * scale, self.shared[layer], room, mask)
        if self.prefix is None:
            self.own.setdefault(layer, own)  # a block that runs again in a backward leaves nothing new
        else:
            own = torch.cat([self.shared[layer], own], dim=3)
        # CUDA's kernels that keep no scores take a mask or grouped heads, not both
        repeats = q.size(1) // k.size(1)
        k, v = own.unsqueeze(3).expand(-1, -1, -1, repeats, -1, -1).flatten(2, 3)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    def attend_in_groups(self, q: Tensor, shared: Tensor, own: Tensor, mask: Tensor) -> Tensor:
        """`attend` where all rows of a group read one copy of their shared part (2, P, G, Lp, D)."""
        k, v = own
        shared_k, shared_v = shared
        asked = q.unflatten(1, (k.size(1), -1)).flatten(2, 3)  # (B, G, R·T, D)
        of_shared = self.to_rows(self.to_groups(asked) @ shared_k.mT)
        scores = torch.cat([of_shared, asked @ k.mT], dim=-1)
        scores = scores.unflatten(2, (-1, q.size(2))) + mask.unsqueeze(2)  # (B, G, R, T, Lp + S)
        weights = scores.softmax(dim=-1).flatten(2, 3)
        to_shared, to_own = weights.tensor_split([shared_k.size(2)], dim=-1)
        y = to_own @ v + self.to_rows(self.to_groups(to_shared) @ shared_v)
        return y.view_as(q)

    def to_groups(self, x: Tensor) -> Tensor:
        """(B, G, ·, E) -> (P, G, N·, E): what the rows of a group ask of their shared part becomes one matrix."""
        x = x if self.row_of_slot is None else x.index_select(0, self.row_of_slot)
        x = x.unflatten(0, (-1, self.num_samples))
        return x.transpose(1, 2).flatten(2, 3)

    def to_rows(self, x: Tensor) -> Tensor:
        """(P, G, N·, E) -> (B, G, ·, E)"""
        x = x.unflatten(2, (self.num_samples, -1))
        x = x.transpose(1, 2).flatten(0, 1)
        return x if self.slot_of_row is None else x.index_select(0, self.slot_of_row)

    def select(self, rows: numpy.ndarray) -> Tensor:
        """Keeps these rows (B',), ascending, and the questions that they belong to. Returns the rows on the device."""
        kept, groups, counts = numpy.unique(self.groups[rows], return_inverse=True, return_counts=True)
        index = self.to_device(rows)
        for x in self.room[:, :, :, :, : self.size]:
            x[:, : len(rows)] = x.index_select(1, index)
        self.room = self.room[:, :, : len(rows)]
        self.starts = self.starts.index_select(0, index)
        self.last = self.last.index_select(0, index)
        if len(kept) < len(self.prefix.lengths):
            self.prefix = self.prefix.rows(self.to_device(kept))
            self.shared = self.prefix.kv.unbind()
        self.groups = groups
        self.num_samples = counts.max()
        order = numpy.arange(len(rows))
        slot_of_row = groups * self.num_samples + order - numpy.searchsorted(groups, groups)
        row_of_slot = numpy.zeros(len(kept) * self.num_samples, dtype=numpy.int64)
        row_of_slot[slot_of_row] = order
        self.slot_of_row = self.to_device(slot_of_row)
        self.row_of_slot = self.to_device(row_of_slot)
        return index


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
    rope_scaling: tuple[float, ...] = ()    # Llama 3.1's: factor, low and high frequency factor, original positions
    softcap: float = 0.0                    # of the logits: s·tanh(x / s)
    windows: tuple[int, ...] = ()           # how far back each layer sees (empty: all the way)
    lambdas: bool = False                   # scales of the residual stream and of the embedding, per layer
    value_gate: int = 0                     # channels that gate value embeddings, in every other layer, the last too
    value_scale: float = 1.0                # of that gate
    smear: bool = False                     # smear (of each token into the next) and backout (of the middle layer)
    lora_rank: int = 0                      # of adapters on the matrices of the blocks (0: none, all weights learn)


SMEAR_WIDTH = 24
NANOCHAT = dict(
    norm_weights=False, norm_eps=None, embed_norm=True, gated_mlp=False, qk_norm="after", rope_sign=-1, softcap=15.0
)
GENERATIONS = {                             # of nanochat's model; a checkpoint's keys tell which one it is
    "classic": dict(rope_rounded=True),
    "winter": dict(rope_rounded=True, lambdas=True, value_gate=32, value_scale=2.0),
    "spring": dict(rope_base=1e5, qk_scale=1.15, lambdas=True, value_gate=12, value_scale=3.0),
    "current": dict(rope_base=1e5, qk_scale=1.2, lambdas=True, value_gate=12, value_scale=3.0, smear=True),
}
SHORT_WINDOWS = {"winter": (2, 1), "spring": (3, 128), "current": (4, 128)}  # part of the long one, and its rounding


def rounded_up(n: float, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


def nanochat_config(
    generation: str, sequence_len: int, window_pattern: str = "L", vocab_rows: int | None = None, **shape: int
) -> Config:
    """The architecture behind a nanochat checkpoint's `model_config`, whose other fields are named as Config's are;
    `sequence_len` is the long window. Tables are padded to a multiple of 64 rows unless `vocab_rows` says otherwise."""
    windows = ()
    n_layer = shape["n_layer"]
    n_embd = shape["n_embd"]
    if generation in SHORT_WINDOWS:
        part, multiple = SHORT_WINDOWS[generation]
        reach = {"L": sequence_len, "S": rounded_up(sequence_len / part, multiple)}
        windows = tuple(reach[kind] for kind in (window_pattern * n_layer)[: n_layer - 1] + "L")
    return Config(
        **shape,
        vocab_rows=vocab_rows or rounded_up(shape["vocab_size"], 64),
        head_dim=n_embd // shape["n_head"],
        mlp_width=4 * n_embd,
        max_positions=sequence_len,
        windows=windows,
        **NANOCHAT,
        **GENERATIONS[generation],
    )


# model_type: the family's fields of Config, and what transformers takes for keys that are absent
FAMILIES = {
    "llama": ({}, {}),
    "qwen2": ({"qkv_bias": True}, {"num_key_value_heads": 32}),
    "qwen3": ({"qk_norm": "before"}, {"num_key_value_heads": 32, "head_dim": 128}),
}
KNOWN = {                                   # other keys of a config.json that say how it runs, with what is known here
    "hidden_act": (None, "silu"),
    "full_attention": (None,),              # RoPE's settings by the type of layer
    "partial_rotary_factor": (None, 1),
    "rope_type": ("default", "llama3"),
    "tie_word_embeddings": (None, False, True),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_sliding_window", "quantization_config"), (None, False)),
}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def huggingface_config(raw: dict, vocab_size: int) -> Config:
    """The architecture that a config.json describes, for a tokenizer with so many ids. Raises UserError, naming the
    field, on whatever would be run wrong."""

    def expect(good: bool, name: str, known: Any) -> None:
        if not good:
            raise UserError(f"config.json: {name} is {raw.get(name)!r}; known here: {known}")

    def number(name: str, default: float | None = None, kind: type = int) -> float:
        value = default if raw.get(name) is None else raw[name]
        expect(type(value) in (kind, int) and 0 < value < math.inf, name, f"any {kind.__name__} above 0")
        return value

    expect(raw.get("model_type") in tuple(FAMILIES), "model_type", tuple(FAMILIES))
    family, defaults = FAMILIES[raw["model_type"]]
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # in transformers 5's order
    expect(isinstance(rope, dict), "rope_scaling", "an object, as rope_parameters")
    raw = {**defaults, "rope_type": rope.get("type", "default"), **raw, **rope}
    layers, heads, width = map(number, ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    kv_heads = number("num_key_value_heads", heads)
    head_dim = number("head_dim", width // heads)
    for name, known in {**KNOWN, "layer_types": (None, ["full_attention"] * layers)}.items():
        expect(raw.get(name) in known, name, known)
    expect(heads % kv_heads == 0, "num_attention_heads", f"multiples of num_key_value_heads, {kv_heads}")
    expect(head_dim % 2 == 0, "head_dim", "even numbers")
    expect(vocab_size <= number("vocab_size"), "vocab_size", f"rows for all {vocab_size} ids of tokenizer.json")
    scaled = raw["rope_type"] == "llama3"
    return Config(
        vocab_size,
        vocab_rows=raw["vocab_size"],
        n_layer=layers,
        n_head=heads,
        n_kv_head=kv_heads,
        n_embd=width,
        head_dim=head_dim,
        mlp_width=number("intermediate_size"),
        max_positions=number("max_position_embeddings"),
        tied=bool(raw.get("tie_word_embeddings")),
        norm_eps=number("rms_norm_eps", 1e-6, float),
        rope_base=number("rope_theta", 1e4, float),
        rope_scaling=tuple(number(name, kind=float) for name in LLAMA3) if scaled else (),
        **family,
    )


LORA_ALPHA = 32


class Linear(nn.Linear):
    """Arithmetic in the type of the input, whatever that of the weights. With a rank, an adapter (LoRA, Hu et al.
    2021): W + α / rank · B·A, of which W is frozen."""

    def __init__(self, width: int, height: int, bias: bool = False, rank: int = 0):
        super().__init__(width, height, bias)
        self.scale = LORA_ALPHA / max(rank, 1)
        self.lora_a = nn.Parameter(torch.empty(rank, width)) if rank else None
        self.lora_b = nn.Parameter(torch.empty(height, rank)) if rank else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = F.linear(x, self.weight.to(x.dtype), bias)
        if self.lora_a is None:
            return y
        low = F.linear(x, self.lora_a.to(x.dtype))
        return y + self.scale * F.linear(low, self.lora_b.to(x.dtype))

    def merged(self) -> Tensor:
        """The weights with the adapter in them, in float32."""
        return self.weight.float() + self.scale * self.lora_b.float() @ self.lora_a.float()


class Norm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich 2019)."""

    def __init__(self, config: Config, width: int):
        super().__init__(width, config.norm_eps, config.norm_weights)

    def forward(self, x: Tensor) -> Tensor:
        y = F.rms_norm(x, self.normalized_shape, eps=self.eps)
        return y if self.weight is None else y * self.weight.to(x.dtype)


def rope_of(config: Config, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """cos and sin of RoPE's angles (Su et al. 2021) at positions (B, T): (2, B, 1, T, D/2)."""
    D = config.head_dim
    exponents = torch.arange(0, D, 2, device=positions.device).float() / D
    frequencies = 1.0 / config.rope_base**exponents
    if config.rope_scaling:
        factor, low, high, original = config.rope_scaling
        rounds = original * frequencies / (2 * math.pi)  # in the positions that the model was first trained on
        kept = ((rounds - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    angles = positions.float()[:, None, :, None] * frequencies
    turns = torch.stack([angles.cos(), config.rope_sign * angles.sin()])
    return turns.to(torch.bfloat16 if config.rope_rounded else dtype).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns x (B, H, T, D), as pairs of its first and second half."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


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
        if config.qk_norm:
            self.q_norm = Norm(config, D)
            self.k_norm = Norm(config, D)
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
        q, k = rotate(q, *rope), rotate(k, *rope)
        if c.qk_norm == "after":
            q, k = self.q_norm(q), self.k_norm(k)
        scale = c.qk_scale**2 / math.sqrt(c.head_dim)
        y = cache.attend(self.layer, q, k, v, mask, scale)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        C = config.n_embd
        W = config.mlp_width
        rank = config.lora_rank
        self.c_fc = Linear(C, W, rank=rank)
        self.c_gate = Linear(C, W, rank=rank) if config.gated_mlp else None
        self.c_proj = Linear(W, C, rank=rank)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c_fc(x)
        if self.c_gate:
            return self.c_proj(F.silu(self.c_gate(x)) * y)
        return self.c_proj(F.relu(y).square())


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.norm_1 = Norm(config, config.n_embd)
        self.norm_2 = Norm(config, config.n_embd)
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
    """A decoder of any family. Weights that learn are float32, those that adapters freeze have the `dtype` in which
    arithmetic runs; parameter names are nanochat's."""

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.recompute = False              # whether the backward makes again what the blocks computed, to save memory
        self.stored_types = {}              # name -> type on disk, to be saved in again
        C = config.n_embd
        L = config.n_layer
        rows = config.vocab_rows

        def table(width: int) -> nn.Embedding:  # without random numbers, which take seconds to begin on "meta"
            return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)

        blocks = nn.ModuleList(Block(config, i) for i in range(L))
        self.transformer = nn.ModuleDict({"wte": table(C), "h": blocks})
        self.norm = Norm(config, C)
        if not config.tied:
            self.lm_head = Linear(C, rows)
        width = config.n_kv_head * config.head_dim
        gated = [str(i) for i, block in enumerate(blocks) if hasattr(block.attn, "ve_gate")]
        self.value_embeds = nn.ModuleDict({i: table(width) for i in gated})
        if config.lambdas:
            self.resid_lambdas = nn.Parameter(torch.ones(L))
            self.x0_lambdas = nn.Parameter(torch.zeros(L))
        if config.smear:
            self.smear_gate = Linear(SMEAR_WIDTH, 1)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        for name, p in self.named_parameters():
            if config.lora_rank and "lora_" not in name:
                p.requires_grad_(False).data = p.data.to(dtype)

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    @torch.no_grad()
    def init_weights(self, seed: int) -> "GPT":
        """Random weights to train from: nanochat's initialisation of the current generation."""
        generator = torch.Generator().manual_seed(seed)
        C = self.config.n_embd
        L = self.config.n_layer
        for name, p in self.named_parameters():
            if "c_proj" in name:
                p.zero_()
            elif "wte" in name:
                p.normal_(std=0.8, generator=generator)
            elif "lm_head" in name:
                p.normal_(std=0.001, generator=generator)
            elif p.ndim == 2:
                bound = math.sqrt(3 / C) * (0.4 if "c_fc" in name else 1.0)
                p.uniform_(-bound, bound, generator=generator)
        if self.config.lambdas:
            self.resid_lambdas.copy_(torch.linspace(1.15, 1.05, L))
            self.x0_lambdas.copy_(torch.linspace(0.20, 0.05, L))
        if self.config.smear:
            self.backout_lambda.fill_(0.2)
        return self

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Runs new tokens after those in the cache, and adds them to it. ids (B, T) -> hidden states (B, T, C)."""
        cache = cache or Cache()
        config = self.config
        queries, keys = cache.positions(ids)
        rope = rope_of(config, queries, self.dtype)
        windows = config.windows or (2**30,) * config.n_layer
        masks = {window: mask_of(queries, keys, window, self.dtype) for window in set(windows)}
        x = self.transformer.wte(ids).to(self.dtype)
        if config.embed_norm:
            x = F.rms_norm(x, x.shape[-1:])
        previous = cache.previous(x)
        if config.smear:
            gate = torch.sigmoid(self.smear_gate(x[..., :SMEAR_WIDTH]))
            x = x + self.smear_lambda.to(x.dtype) * gate * previous
        x0 = x
        for i, block in enumerate(self.transformer.h):
            if config.lambdas:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            value = None
            if str(i) in self.value_embeds:
                value = self.value_embeds[str(i)](ids).to(x.dtype)
            run = recomputed(block, self.recompute)
            x = run(x, value, rope, masks[windows[i]], cache)
            if i == config.n_layer // 2:
                middle = x
        if config.smear:
            x = x - self.backout_lambda.to(x.dtype) * middle
        cache.size += ids.size(1)
        return self.norm(x)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> float32 logits (..., vocab_size), before a softcap, which is the policy's."""
        table = self.transformer.wte if self.config.tied else self.lm_head
        logits = F.linear(hidden, table.weight.to(hidden.dtype))
        return logits[..., : self.config.vocab_size].float()


def empty_model(config: Config, dtype: torch.dtype) -> GPT:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return GPT(config, dtype)


def pad(sequences: list[list], device: torch.device) -> Tensor:
    """Lists of numbers -> (B, T), padded with zeros on the right."""
    tensors = [torch.tensor(sequence) for sequence in sequences]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)


def prefix_of(model: GPT, prompts: list[list[int]]) -> Prefix:
    """Runs the prompts, each once."""
    cache = Cache()
    lengths = torch.tensor([len(p) for p in prompts], device=model.device)
    hidden = model(pad(prompts, model.device), cache)
    last = torch.arange(len(prompts), device=model.device), lengths - 1
    kv = torch.stack(list(cache.own.values()))
    return Prefix(lengths, hidden[last], cache.last[last], kv)


# ----------------------------------------------------------------------------------------------------------------------
# The calculator, tokenizers and chat templates

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def value_of(node: ast.AST) -> int | float:
    """The value of parsed arithmetic or of 'text'.count('part'). Raises TypeError on any other syntax."""
    match node:
        case ast.Constant(int() | float() as value):
            return value
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](value_of(left), value_of(right))
        case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](value_of(operand))
        case ast.Call(ast.Attribute(ast.Constant(str() as text), "count"), [ast.Constant(str() as part)], []):
            return text.count(part)
    raise TypeError(f"not arithmetic: {type(node).__name__}")


def calculate(expression: str) -> str | None:
    """What nanochat's calculator says, to ten significant digits and without a trailing `.0`; None where it has
    nothing to say. It knows digits and `+ - * / // . ( )`, commas being removed, and 'text'.count('part')."""
    expression = expression.replace(",", "").strip()
    arithmetic = re.fullmatch(r"[0-9+\-*/.() ]+", expression)
    counting = re.fullmatch(r"[A-Za-z0-9'\"()._ ]+", expression) and ".count(" in expression
    if len(expression) > 200 or not (arithmetic or counting):
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # the parser's, on what only looks like a number
            value = value_of(ast.parse(expression, mode="eval").body)
        if not math.isfinite(value):
            return None
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None
    if isinstance(value, int):
        return str(value)
    text = format(Decimal(f"{value:.10g}"), "f")
    return "0" if text == "-0" else text


class Tokenizer:
    """nanochat's: a tiktoken encoding and special tokens, each an attribute: bos, user_start, …, output_end.

    What every tokenizer has: `vocab_size`, `encode`, `encode_raw`, `decode`, `render`, the `stops` that end the model's
    turn, all its special tokens (`markers`), the `date` that its chats tell, the `files` that it is saved in, and
    `call_end`, which closes a call of the calculator that `answer_call` answers (−1: none).
    """

    SPECIAL = (
        "bos user_start user_end assistant_start assistant_end python_start python_end output_start output_end"
    ).split()

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        special = {name: encoding.encode_single_token(f"<|{name}|>") for name in self.SPECIAL}
        vars(self).update(special)
        self.markers = set(special.values())
        self.date = ""
        self.stops = self.assistant_end, self.bos
        self.call_end = self.python_end
        self.files = {"tokenizer.pkl": pickle.dumps(encoding)}

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
            opening = system["content"] + "\n\n" + first["content"]
            messages = [{"role": "user", "content": opening}, *rest]
        ids = [self.bos]
        for message in messages:
            user = message["role"] == "user"
            start, end = (self.user_start, self.user_end) if user else (self.assistant_start, self.assistant_end)
            ids += [start, *self.encode(message["content"]), end]
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


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, around what the assistant says, prints its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The filter `tojson` of transformers' templates."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def refuse(*reason: Any) -> None:
    raise jinja2.TemplateError(f"it stops at {reason[-1]}")


@lru_cache
def compiled(template: str) -> jinja2.Template:
    """A chat template, as transformers compiles it. It is a stranger's code: it runs in the sandbox."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.unsafe_undefined = refuse   # by jinja's default, what is forbidden is undefined
    return environment.from_string(template)


def read_json(files: dict[str, bytes], name: str) -> dict:
    """The JSON object in one of the files, {} where it is not there. Raises UserError, naming it, on anything else."""
    with blaming(f"{name} is no JSON object", "fetch it again"):
        return dict(json.loads(files.get(name, b"{}")))


OTHER_TEMPLATE = "give another by --chat-template FILE"


class ChatTokenizer:
    """Hugging Face's: a tokenizer.json and a chat template, out of the `files` of a model's folder. Text that spells a
    special token becomes that token, in messages too."""

    call_end = -1                           # no calculator

    def __init__(self, files: dict[str, bytes]):
        """Raises UserError on files that will not do."""
        self.files = files
        self.variables = {}                 # of the template
        self.date = date.today().isoformat()  # what it takes for today
        with blaming("tokenizer.json is missing or broken", "fetch it again"):
            self.tokenizer = tokenizers.Tokenizer.from_buffer(files.get("tokenizer.json", b""))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values())
        self.markers = set(self.tokenizer.get_added_tokens_decoder())
        settings = read_json(files, "tokenizer_config.json")
        self.special = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in settings.items()
            if name.endswith("_token") and isinstance(value, (str, dict))
        }
        self.template = settings.get("chat_template")
        if isinstance(self.template, list):
            named = {entry["name"]: entry["template"] for entry in self.template}
            self.template = named.get("default")
        if "chat_template.jinja" in files:
            with blaming("chat_template.jinja is no text", OTHER_TEMPLATE):
                self.template = files["chat_template.jinja"].decode()
        if not self.template:
            raise UserError(f"the model has no chat template: {OTHER_TEMPLATE}")
        ends = [read_json(files, name).get("eos_token_id") for name in ("generation_config.json", "config.json")]
        ends.append(self.tokenizer.token_to_id(self.special.get("eos_token", "")))
        end = next((end for end in ends if end is not None), [])
        stops = end if isinstance(end, list) else [end]
        self.stops = tuple(sorted({*stops, *self.turn_end()}))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    encode_raw = encode

    def decode(self, ids: list[int]) -> str:
        """Token ids -> text, special tokens as they are spelled; an id without a token is nothing."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def render_text(self, messages: list[dict]) -> str:
        """A chat as the template writes it, up to where the assistant begins to speak unless the last message is the
        assistant's. Raises UserError where it fails."""
        known = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": messages[-1]["role"] != "assistant",
            "strftime_now": datetime.fromisoformat(self.date).strftime,
            **self.special,
            **self.variables,
            "messages": messages,
        }
        with blaming("the chat template fails", OTHER_TEMPLATE):
            return compiled(self.template).render(known)

    def render(self, messages: list[dict]) -> list[int]:
        return self.encode(self.render_text(messages))

    def turn_end(self) -> list[int]:
        """The added token that the template writes after what the assistant says, if it does."""
        said = [{"role": "user", "content": "Agreed?"}, {"role": "assistant", "content": "Agreed."}]
        after = self.render_text(said).partition("Agreed.")[2].lstrip()
        return [token for token in self.encode(after)[:1] if token in self.markers]


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
        return logits / self.temperature

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """What can be sampled, given logits (..., V): scores whose softmax is the policy (..., k), best first, and
        their token ids (..., k). With top_k 0 all V of them, in the order of their ids (None)."""
        if not self.top_k:
            return self.scores(logits), None
        values, ids = logits.topk(min(self.top_k, logits.size(-1)))  # a softcap keeps the order
        return self.scores(values), ids

    def draw(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Samples by inverting the distribution function: logits (B, V) and numbers in [0, 1) (B,) -> tokens (B,),
        their logprobs (B,), and the entropy (B,) of the distributions that they are drawn from, in nats."""
        scores, ids = self.candidates(logits)
        logprobs = scores.log_softmax(dim=-1)
        p = logprobs.exp()
        cumulative = p.cumsum(dim=-1)
        entropy = -(p * logprobs).sum(dim=-1)
        aim = uniform.unsqueeze(1) * cumulative[:, -1:]
        pick = torch.searchsorted(cumulative, aim, right=True)
        pick = pick.clamp_(max=scores.size(-1) - 1)
        tokens = pick if ids is None else ids.gather(1, pick)
        return tokens.squeeze(1), logprobs.gather(1, pick).squeeze(1), entropy

    def logprobs(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Logprobs of tokens (...), given logits (..., V). A token that rounding or an update pushed out of the top k
        takes the place of the last one in it."""
        scores, ids = self.candidates(logits)
        chosen = self.scores(logits.gather(-1, tokens.unsqueeze(-1)))
        if ids is not None:
            last = torch.minimum(scores[..., -1:], chosen)
            scores = torch.cat([scores[..., :-1], last], dim=-1)
        return chosen.squeeze(-1) - scores.logsumexp(dim=-1)


LOGITS_AT_ONCE = 2**24


def in_pieces(model: GPT, work: Callable, hidden: Tensor, other: Tensor) -> list:
    """work(logits, other) of hidden states (M, C) and what belongs to them (M,), piece by piece, with no more than
    LOGITS_AT_ONCE logits at once: a backward makes those of several pieces again."""
    size = max(1, LOGITS_AT_ONCE // model.config.vocab_rows)

    def unembed_and_work(hidden: Tensor, other: Tensor) -> Any:
        return work(model.unembed(hidden), other)

    run = recomputed(unembed_and_work, when=len(hidden) > size)
    return list(map(run, hidden.split(size), other.split(size)))


# ----------------------------------------------------------------------------------------------------------------------
# The sampler


@dataclass
class Completion:
    """What was sampled, token by token, with the stop token where there is one."""

    tokens: list[int]
    mask: list[bool]                        # False where the calculator forced the token
    logprobs: list[float]                   # under the policy it was drawn from; 0 where forced
    entropy: float = 0.0                    # of that policy, summed over the sampled tokens, in nats


def mix(x: Tensor) -> Tensor:
    """A bijection of int64 that looks random: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        shifted = (x >> shift) & (2 ** (64 - shift) - 1)
        x = (x ^ shifted) * factor
    return x


def fold(*counters: int | Tensor) -> Tensor:
    """One random int64 for every combination of counters: integers, or int64 tensors that broadcast together."""
    state = torch.tensor(0)
    for counter in counters:
        state = state + (0x9E3779B97F4A7C15 - 2**64)
        state = mix(state ^ torch.as_tensor(counter))
    return state


def to_uniform(x: Tensor) -> Tensor:
    """Random int64 -> float32 in [0, 1)."""
    return ((x >> 40) & (2**24 - 1)).float() / 2**24


class Transcript:
    """What is said in each row, kept on the host, and what the calculator will force."""

    def __init__(self, tokenizer: Tokenizer, num_rows: int, max_new_tokens: int):
        self.tokenizer = tokenizer
        self.said = numpy.zeros((3, num_rows, max_new_tokens))  # tokens, their logprobs and entropies
        self.forced = numpy.full((num_rows, max_new_tokens), -1)  # −1: sampled
        self.lengths = numpy.zeros(num_rows, dtype=int)  # 0: not yet ended

    def write(self, t: int, rows: numpy.ndarray, drawn: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Writes down what was drawn (3, B) for position t of the rows (B,), or forced, and answers their calls.
        Returns the tokens (B,), and which rows go on (B,)."""
        forced = self.forced[rows, t]
        drawn = numpy.where(forced < 0, drawn, numpy.outer((1, 0, 0), forced))
        self.said[:, rows, t] = drawn
        tokens = drawn[0].astype(int)
        going = self.lengths[rows] == 0
        for row in rows[going & (tokens == self.tokenizer.call_end)]:
            said = self.said[0, row, : t + 1].astype(int)
            result = self.tokenizer.answer_call(said.tolist())
            rest = self.forced[row, t + 1 :]
            rest[: len(result)] = result[: len(rest)]
        last = t + 1 == self.forced.shape[1]
        ended = last | numpy.isin(tokens, self.tokenizer.stops)
        self.lengths[rows[going & ended]] = t + 1
        return tokens, going & ~ended

    def completions(self) -> list[Completion]:
        tokens, logprobs, entropies = self.said
        columns = tokens.astype(int), self.forced < 0, logprobs, entropies, self.lengths
        return [
            Completion(ids[:n], mask[:n], p[:n], sum(h[:n]))
            for ids, mask, p, h, n in zip(*(column.tolist() for column in columns))
        ]


class Sampler:
    """Samples completions from a model, on a copy of its weights with the matrices in the type of the arithmetic; what
    has that type already is shared with the model."""

    def __init__(self, model: GPT, tokenizer: Tokenizer):
        self.source = model
        self.tokenizer = tokenizer
        self.model = empty_model(model.config, model.dtype)
        state = model.state_dict()
        matrices = {name: x.to(model.dtype) for name, x in state.items() if x.ndim > 1}
        self.model.load_state_dict(state | matrices, assign=True)
        self.model.requires_grad_(False)

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the model's weights as they are now."""
        state = self.source.state_dict()
        for name, mine in self.model.state_dict().items():
            if mine.data_ptr() != state[name].data_ptr():
                mine.copy_(state[name])

    def draw(self, hidden: Tensor, uniform: Tensor, policy: Policy) -> Tensor:
        """Tokens, logprobs and entropies (3, B) after hidden states (B, C); float32 holds any token's id."""
        drawn = in_pieces(self.model, policy.draw, hidden, uniform)
        return torch.cat([torch.stack(part) for part in drawn], dim=1)

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        num_samples: int,
        max_new_tokens: int,
        policy: Policy,
        seed: int = 0,
        keys: list[int] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Samples `num_samples` completions of each prompt (a list of token ids): one list per prompt, in order.

        Each random number is a function of (seed, key, sample, position): `keys` names the prompts (default: by
        their places). A completion ends with one of the tokenizer's stops, or after max_new_tokens tokens, forced
        ones included. `progress` is told after each position how many have ended. All prompts run as one batch.
        Raises ValueError past the model's last position.
        """
        longest = max(map(len, prompts)) + max_new_tokens
        limit = self.model.config.max_positions
        if longest > limit:
            raise ValueError(f"prompt and completion have {longest} tokens, the model only {limit} positions")
        cache = Cache(prefix_of(self.model, prompts), num_samples, max_new_tokens)
        hidden = cache.prefix.hidden.repeat_interleave(num_samples, dim=0)
        names = torch.tensor(keys or range(len(prompts)), device=hidden.device).unsqueeze(1)
        stream = fold(seed, names, torch.arange(num_samples, device=hidden.device)).flatten()
        rows = numpy.arange(len(hidden))    # those in the cache
        transcript = Transcript(self.tokenizer, len(rows), max_new_tokens)
        for t in range(max_new_tokens):
            drawn = self.draw(hidden, to_uniform(fold(stream, t)), policy)
            tokens, going = transcript.write(t, rows, drawn.cpu().numpy())  # the one wait for the device
            if progress:
                progress(int((transcript.lengths == t + 1).sum()))
            if not going.any():
                break
            if going.sum() <= 0.75 * len(rows):
                stream = stream.index_select(0, cache.select(going.nonzero()[0]))
                rows = rows[going]
                tokens = tokens[going]
            hidden = self.model(cache.to_device(tokens).unsqueeze(1), cache).squeeze(1)
        completions = transcript.completions()
        return [completions[i : i + num_samples] for i in range(0, len(completions), num_samples)]


def completion_logprobs(
    model: GPT, prefix: Prefix, completions: list[Completion], policy: Policy
) -> tuple[Tensor, Tensor]:
    """Logprobs (M,) of the completions' sampled tokens, and the row (M,) of each. The entries of `prefix` are their
    questions. Forced tokens are attended to, but have no logprob. The same in any batch, to rounding."""
    tokens = pad([c.tokens for c in completions], model.device)
    sampled = pad([c.mask for c in completions], model.device)
    hidden = model(tokens[:, :-1], Cache(prefix))
    hidden = torch.cat([prefix.hidden.unsqueeze(1), hidden], dim=1)  # (B, T, C)
    logprobs = in_pieces(model, policy.logprobs, hidden[sampled], tokens[sampled])
    return torch.cat(logprobs), sampled.nonzero()[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: nanochat's and Hugging Face's folders

FILES = (                                   # of Hugging Face's folders, besides weights
    "config.json generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json "
    "chat_template.jinja"
).split()
BLOCK = {
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}
KINDS = {"weight": "weight", "bias": "bias", "lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}


def huggingface_names(n_layer: int) -> dict[str, str]:
    """GPT's names of parameters -> Hugging Face's and PEFT's, for all that a family here can have."""
    modules = {"transformer.wte": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
    for i in range(n_layer):
        modules |= {f"transformer.h.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in BLOCK.items()}
    return {f"{a}.{x}": f"{b}.{y}" for a, b in modules.items() for x, y in KINDS.items()}


class PlainUnpickler(pickle.Unpickler):
    """Admits a tiktoken encoding and plain data, so that no file can run code."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return tiktoken.Encoding


COPY_AGAIN = "copy it here again"
DAMAGED = "it is damaged: not what was written"


class HashedFile:
    """A file to write to, and the digest of what was written."""

    def __init__(self, file: Any):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_file(path: Path, content: Any) -> str:
    """A file of bytes, of tensors (safetensors), or of what a function writes appears whole or not at all: written
    beside, flushed to disk, renamed. Returns its digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict):
        content = safetensors.torch.save(content, {"format": "pt"})
    unfinished = path.with_name(path.name + ".part")
    try:
        with open(unfinished, "wb") as file:
            hashed = HashedFile(file)
            content(hashed) if callable(content) else hashed.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except RuntimeError as error:           # torch's, for what the disk has said
        raise error.__context__ if isinstance(error.__context__, OSError) else error
    finally:
        unfinished.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:     # as some network disks refuse it: the file is there already
            raise
    finally:
        os.close(folder)
    return hashed.sha256.hexdigest()


def read_file(path: Path, digests: dict[str, str]) -> mmap.mmap:
    """A file's content, to read from. Its digest is checked against that of its name, or else noted there. Raises
    UserError, naming the file, where it is missing, empty or not as it was written."""
    with blaming(f"{path} cannot be read", COPY_AGAIN), open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        digest = hashlib.sha256(content).hexdigest()
        if digests.setdefault(path.name, digest) != digest:
            raise ValueError(DAMAGED)
    return content


def seal(meta: dict) -> str:
    """The digest of a meta file's own content."""
    content = {key: value for key, value in meta.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def checkpoint_steps(directory: str | Path) -> list[int]:
    """The steps that have both a model and a meta file, ascending."""
    names = {path.name for path in Path(directory).glob("*")}
    metas = (re.fullmatch(r"meta_(\d+)\.json", name) for name in names)
    return sorted(int(meta[1]) for meta in metas if meta and names & {f"model_{meta[1]}.pt", meta[1]})


def find_checkpoint(directory: Path, step: int | None) -> tuple[Path, int | None]:
    """Where a checkpoint's weights are, and its step, if only the last: nanochat's model file, or a folder in Hugging
    Face's format, which is a run's for that step or, of no step, the directory itself. Raises UserError."""
    if (directory / "config.json").exists():
        return directory, None
    steps = checkpoint_steps(directory)
    if not steps:
        raise UserError(f"no checkpoint (model_*.pt with meta_*.json) in {directory}")
    if step not in (None, *steps):
        raise UserError(f"no checkpoint of step {step} in {directory}; there are: {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    folder = directory / f"{step:06d}"
    return folder if folder.is_dir() else directory / f"model_{step:06d}.pt", step


def load_meta(path: Path) -> dict:
    """A meta file. Raises UserError, naming it, where it is damaged or none."""
    with blaming(f"{path} is no nanochat meta file", COPY_AGAIN):
        meta = json.loads(path.read_text())
        meta["model_config"]["vocab_size"]
        if meta.get("seal", seal(meta)) != seal(meta):
            raise ValueError(DAMAGED)
    return meta


def find_tokenizer(directory: Path) -> Path:
    """tokenizer.pkl beside a checkpoint, or two folders up in tokenizer/. Raises UserError where there is none."""
    beside = directory / "tokenizer.pkl"
    above = directory.absolute().parent.parent / "tokenizer" / "tokenizer.pkl"
    for path in (beside, above):
        if path.exists():
            return path
    raise UserError(f"no tokenizer: put the checkpoint's tokenizer.pkl at {beside} or {above}")


def detect_generation(state: dict[str, Tensor]) -> str:
    """The generation of nanochat's model that a state dict belongs to, by its keys. Raises ValueError."""
    gates = [weight.size(1) for key, weight in state.items() if key.endswith("ve_gate.weight")]
    gate = max(gates, default=0)
    smear = "smear_gate.weight" in state
    for name, fields in GENERATIONS.items():
        if fields.get("value_gate", 0) == gate and fields.get("smear", False) == smear:
            return name
    raise ValueError(f"value-embedding gates of width {gate} are of no nanochat generation known here")


def load_nanochat(path: Path, meta: dict) -> tuple[Config, dict, Tokenizer]:
    """The architecture, weights and tokenizer of nanochat's model file with that meta."""
    place = find_tokenizer(path.parent)
    with blaming(f"{place} is no nanochat tokenizer", COPY_AGAIN):
        tokenizer = Tokenizer(PlainUnpickler(read_file(place, meta["sha256"])).load())
    vocab_size = meta["model_config"]["vocab_size"]
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the meta file of {path} says {vocab_size}: put the "
            f"tokenizer that this model was trained with at {path.parent / 'tokenizer.pkl'}"
        )
    state = torch.load(read_file(path, meta["sha256"]), map_location="cpu", weights_only=True)
    state = {key.removeprefix("_orig_mod."): tensor for key, tensor in state.items()}
    rows = len(state["transformer.wte.weight"])
    return nanochat_config(detect_generation(state), **meta["model_config"], vocab_rows=rows), state, tokenizer


def weight_paths(folder: Path) -> list[Path]:
    """A Hugging Face folder's weights: one file, which transformers too prefers, or the shards of its index."""
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    index = folder / "model.safetensors.index.json"
    with blaming(f"{folder} has no weights: no {single.name}, and {index.name} is no JSON of shards", "fetch it again"):
        names = {*json.loads(index.read_bytes())["weight_map"].values()}
        if not names:
            raise ValueError("it names none")
        return [folder / name for name in sorted(map(str, names))]


def checkpoint_files(directory: Path, step: int | None) -> list[Path]:
    """The files that make a checkpoint what it is, wherever it lies: the model's and the tokenizer's."""
    path, _ = find_checkpoint(directory, step)
    if path.is_dir():
        return [path / name for name in FILES if (path / name).exists()] + weight_paths(path)
    return [path, find_tokenizer(directory)]


def load_huggingface(folder: Path, meta: dict, template: str | None = None) -> tuple[Config, dict, ChatTokenizer]:
    """A Hugging Face folder's architecture, weights under GPT's names (one that no family has stays under its own,
    quoted) and tokenizer; the meta is told the files' digests and the config.json."""
    digests = meta["sha256"]
    there = [name for name in FILES if (folder / name).exists()]
    files = {name: read_file(folder / name, digests)[:] for name in there}
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    try:
        tokenizer = ChatTokenizer(files)
        meta["model_config"] = read_json(files, "config.json")
        config = huggingface_config(meta["model_config"], tokenizer.vocab_size)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    check_memory(config)
    names = {theirs: ours for ours, theirs in huggingface_names(config.n_layer).items()}
    state = {}
    for path in weight_paths(folder):
        with blaming(f"{path} cannot be read", "fetch it again"):
            tensors = safetensors.torch.load(read_file(path, digests)[:])
        state |= {
            names.get(name, repr(name)): tensor
            for name, tensor in tensors.items()
            if not name.endswith("rotary_emb.inv_freq")  # of old folders: it follows from the config
        }
    if config.tied and "lm_head.weight" in state:
        head = state.pop("lm_head.weight")
        if not torch.equal(head, state.get("transformer.wte.weight", head)):
            raise UserError(
                f"{folder}: lm_head.weight is not model.embed_tokens.weight, but config.json says "
                "tie_word_embeddings: set that to false if the file's lm_head is meant"
            )
    return config, state, tokenizer


def check_memory(config: Config) -> None:
    """Raises UserError where the weights alone, in bfloat16, are more than the machine's memory."""
    model = empty_model(config, torch.float32)
    needed = 2 * sum(p.numel() for p in model.parameters())
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(
            f"the weights need {needed / 1e9:,.0f} GB of memory, and this machine has {there / 1e9:,.0f}: take a "
            "smaller model"
        )


def build(config: Config, state: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype) -> GPT:
    """The model that a state dict belongs to, and new adapters. Raises RuntimeError or ValueError, naming the key, on
    one that is none of the config's."""
    if config.vocab_rows < config.vocab_size:
        raise ValueError(f"transformer.wte.weight has {config.vocab_rows} rows for {config.vocab_size} tokens")
    model = empty_model(config, dtype)
    expected = model.state_dict()
    weights = {}
    generator = torch.Generator().manual_seed(42)
    for key, x in expected.items():         # adapters that do nothing yet
        if key.endswith("lora_a"):
            noise = torch.randn(x.shape, generator=generator)
            weights[key] = (noise / math.sqrt(x.size(1))).to(device)
        if key.endswith("lora_b"):
            weights[key] = torch.zeros(x.shape, device=device)
    for key, tensor in state.items():
        if "lora_" in key or key not in expected:
            raise ValueError(f"unknown key {key}")
        if not tensor.is_floating_point():
            raise ValueError(f"{key} is {tensor.dtype}, not floating point")
        weights[key] = tensor.to(device, expected[key].dtype)
        model.stored_types[key] = tensor.dtype
    model.load_state_dict(weights, assign=True)
    return model


def load_checkpoint(
    directory: str | Path,
    step: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    lora_rank: int = 0,
    template: str | None = None,
) -> tuple[GPT, Any, dict]:
    """Loads a model, its tokenizer and its meta: from a nanochat folder (a step of it, or the last complete one),
    from one in Hugging Face's format, or from a run's that holds such folders. The meta tells the files' digests in
    `sha256`. Arithmetic will run in `dtype`; a `template` replaces the chat template. Raises UserError, naming the
    file, on whatever is missing, broken or foreign."""
    path, step = find_checkpoint(Path(directory), step)
    meta = {} if step is None else load_meta(Path(directory, f"meta_{step:06d}.json"))
    meta.setdefault("sha256", {})
    with blaming(f"{path} cannot be loaded", f"{COPY_AGAIN}, or take a model of an architecture known here"):
        if path.is_dir():
            config, state, tokenizer = load_huggingface(path, meta, template)
        else:
            config, state, tokenizer = load_nanochat(path, meta)
        return build(replace(config, lora_rank=lora_rank), state, device, dtype), tokenizer, meta


@torch.no_grad()
def saved_weights(model: GPT) -> dict[str, Tensor]:
    """The weights as they are to be saved: in the types that they were loaded with, adapters merged."""
    learned, state = model.state_dict(), {}
    for key, x in learned.items():
        module, _, kind = key.rpartition(".")
        if "lora_" in kind:
            continue
        if kind == "weight" and module + ".lora_a" in learned:
            x = model.get_submodule(module).merged()
        # a copy: a view would be written with all that it is a view of
        state[key] = x.to("cpu", model.stored_types.get(key), copy=True)
    return state


def weight_files(state: dict[str, Tensor], config: Config, limit: int = 5 * 10**9) -> dict:
    """A model folder's weights, in the types that they have in `state`: one file, or shards of at most `limit`
    bytes (or of one tensor) and their index."""
    names = huggingface_names(config.n_layer)
    tensors = {names[key]: x for key, x in state.items()}
    split = huggingface_hub.split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
    files = {
        file: {name: tensors[name] for name in members}
        for file, members in split.filename_to_tensors.items()
    }
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        files["model.safetensors.index.json"] = json.dumps(index, indent=2).encode()
    return files


def adapter_files(model: GPT, base: str) -> dict:
    """PEFT's folder of the model's adapters, to a model that is found at `base`."""
    names = huggingface_names(model.config.n_layer)
    state = model.state_dict().items()
    tensors = {f"base_model.model.{names[key]}": x.cpu() for key, x in state if "lora_" in key}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": model.config.lora_rank,
        "lora_alpha": LORA_ALPHA,
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
    }
    config = json.dumps(settings, indent=2).encode()
    return {"adapter/adapter_config.json": config, "adapter/adapter_model.safetensors": tensors}


def save_checkpoint(
    directory: str | Path, step: int, model: GPT, tokenizer: Any, meta: dict, training: dict | None = None
) -> None:
    """Writes a checkpoint in the format that its tokenizer came in: nanochat's tokenizer.pkl and model_<step>.pt,
    or Hugging Face's folder <step>; then meta_<step>.json with their digests: it is there. Then optim_<step>.pt
    where `training` is given (what a run needs to go on), and the meta again: a run can go on from it. Tensors have
    the types that they were loaded with, those that adapters froze after rounding to the arithmetic's; an adapter's
    base is the path of the meta's `source`. Raises OSError, leaving earlier checkpoints as they were."""
    meta = {**meta, "step": step, "sha256": {}}
    state = saved_weights(model)
    contents = {**tokenizer.files, f"model_{step:06d}.pt": partial(torch.save, state)}
    if isinstance(tokenizer, ChatTokenizer):
        contents = {**tokenizer.files, **weight_files(state, model.config)}
        if model.config.lora_rank:
            contents |= adapter_files(model, meta.get("source", {}).get("path", ""))
        contents = {f"{step:06d}/{name}": content for name, content in contents.items()}
    stages = [contents]
    if training is not None:
        stages.append({f"optim_{step:06d}.pt": partial(torch.save, training)})
    for stage in stages:
        for name, content in stage.items():
            path = Path(directory, name)
            meta["sha256"][path.name] = write_file(path, content)
        meta["seal"] = seal(meta)
        text = json.dumps(meta, indent=2).encode()
        write_file(Path(directory, f"meta_{step:06d}.json"), text)


def load_training(directory: Path, meta: dict, device: torch.device) -> dict:
    """What a run needs to go on from a checkpoint. Raises UserError where it is missing or damaged."""
    path = directory / f"optim_{meta['step']:06d}.pt"
    if "seal" not in meta:
        raise UserError(f"the meta file of {path} is damaged: it has no seal")
    if path.name not in meta["sha256"]:
        raise UserError(f"{path} was not written to its end")
    with blaming(f"{path} cannot be loaded", COPY_AGAIN):
        return torch.load(read_file(path, meta["sha256"]), map_location=device, weights_only=True)


def find_hub_folder(name: str) -> Path:
    """The cached folder of a model on the hub, fetched if need be. Raises UserError where it is neither there nor
    can be fetched, or is there in part."""
    wanted = [*FILES, "*.safetensors", "*.index.json"]
    with blaming(f"{name} is no folder and cannot be had from the hub", "go online, or give a folder to --model-tag"):
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
        for path in folder.iterdir():
            path.stat()                     # of what is cached in part some links lead nowhere
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers

# Quintic polynomials that take singular values to 1, fastest in the worst case (Polar Express, Amsel et al. 2025, arXiv
# 2505.16932), with the paper's safety factor of 1.01, here and on the norm in `orthogonalize`.
POLAR_EXPRESS = [
    (a / 1.01, b / 1.01**3, c / 1.01**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )
]


def orthogonalize(x: Tensor) -> Tensor:
    """Matrices (n, rows, columns) -> about U·Vᵀ of their singular value decompositions; in bfloat16 on a GPU."""
    tall = x.size(-2) > x.size(-1)
    x = x.to(torch.bfloat16 if x.is_cuda else x.dtype)
    x = x.mT if tall else x
    norm = x.norm(dim=(-2, -1), keepdim=True)
    x = x / (1.01 * norm).clamp(min=1e-30)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024): Nesterov momentum 0.95, update scaled by √max(1, rows / columns).
    All matrices of one shape are a parameter group and run as one batch."""

    def __init__(self, params: list[nn.Parameter], lr: float):
        shapes = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        groups = [{"params": group} for group in shapes.values()]
        super().__init__(groups, {"lr": lr, "momentum": 0.95})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            gradient = torch.stack([p.grad for p in group["params"]])
            state = self.state[group["params"][0]]
            if not state:
                state["average"] = torch.zeros_like(gradient)
            average = state["average"].lerp_(gradient, 1 - group["momentum"])
            update = orthogonalize(gradient.lerp(average, group["momentum"]))
            rows, columns = gradient.shape[1:]
            rate = group["lr"] * math.sqrt(max(1, rows / columns))
            for p, u in zip(group["params"], update):
                p.sub_(u, alpha=rate)


def make_optimizers(
    model: GPT,
    embedding_lr: float = 0.2,
    unembedding_lr: float = 0.004,
    matrix_lr: float = 0.02,
    weight_decay: float = 0.0,
    matrix_optimizer: str = "muon",
) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019) for tables and scalars, Muon or AdamW for the matrices of the blocks and
    their adapters: for nanochat's models in its groups, at its rates; for others at the rates given, those of the
    embedding for norms and biases. The weight decay is that of the embedding and the unembedding."""
    nanochat = not model.config.norm_weights
    scale = (model.config.n_embd / 768) ** -0.5 if nanochat else 1.0

    def group(lr: float, *betas: float, decay: float = 0.0) -> dict:
        return {"params": [], "lr": lr, "betas": betas if nanochat else (0.9, 0.95), "weight_decay": decay}

    groups = {
        "lm_head": group(unembedding_lr * scale, 0.8, 0.96, decay=weight_decay),
        "transformer.wte": group(embedding_lr * scale, 0.8, 0.995, decay=weight_decay),
        "value_embeds": group(embedding_lr * scale / 2, 0.8, 0.995),
        "resid_lambdas": group(0.005, 0.8, 0.95),
        "x0_lambdas": group(0.5, 0.96, 0.95),
        "transformer.h": group(matrix_lr, 0.9, 0.95),
        "": group(0.2 if nanochat else embedding_lr, 0.8, 0.95),  # smear, backout, the last norm
    }
    for name, p in model.named_parameters():
        if p.requires_grad:
            key = next(prefix for prefix in groups if name.startswith(prefix))
            groups["" if key == "transformer.h" and p.ndim < 2 else key]["params"].append(p)
    matrices = groups.pop("transformer.h")["params"] if matrix_optimizer == "muon" else []
    adamw = [group for group in groups.values() if group["params"]]
    optimizers = [torch.optim.AdamW(adamw, eps=1e-10 if nanochat else 1e-8)] if adamw else []
    return optimizers + ([Muon(matrices, matrix_lr)] if matrices else [])


def flatten(model: GPT) -> tuple[Tensor, Tensor]:
    """Moves the parameters into one vector, of which they become views, and gives them gradients that are views of
    another. Returns both: ranks add up the one and send round the other in one call."""
    params = [p for p in model.parameters() if p.requires_grad]
    weights = nn.utils.parameters_to_vector(params).detach()
    nn.utils.vector_to_parameters(weights, params)
    gradient = torch.zeros_like(weights)
    pieces = gradient.split([p.numel() for p in params])
    for p, piece in zip(params, pieces):
        p.grad = piece.view_as(p)
    return weights, gradient


def step_optimizers(optimizers: list[torch.optim.Optimizer], fraction: float) -> None:
    """One step of each, at this fraction of the learning rates that they were made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("full_lr", group["lr"]) * fraction
        optimizer.step()


def share_model(model: GPT | None, ranks: Ranks) -> GPT:
    """Rank 0's model on every rank."""
    config, dtype = ranks.share(model and (model.config, model.dtype))
    model = model or empty_model(config, dtype).to_empty(device=ranks.device)
    for p in model.parameters():
        ranks.broadcast(p.data)
    return model
