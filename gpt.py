"""The machine under chat_rl.py: a small chat GPT, its cache, sampler, tokenizer, checkpoints and optimizers.

The model has one way of running: new tokens attend to a Cache, which has a part shared by all rows of a group (their
question) and a part of each row's own (its answer). Prefill, decoding and training are that one forward with different
shapes. Nothing here knows of a task, a reward or a training loop.

Letters in shapes: P prompts, N samples per prompt, B = P·N rows, T new tokens, S own and Lp shared positions, H query
heads over G key-value heads, R = H / G, D head width, C channels, V vocabulary, L layers.
"""
import ast
import hashlib
import json
import math
import operator
import os
import pickle
import re
import warnings
from copy import deepcopy
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Callable, NamedTuple

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UserError(Exception):
    """Something the user can mend. The message is one line and says what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# The model: nanochat's, in the four generations that its checkpoints come in


class Generation(NamedTuple):
    """What differs between the generations of nanochat's model; a checkpoint's keys tell which one it is."""
    rope_base: float
    rope_rounded: bool                      # cos and sin are rounded to bfloat16 in every run, not only in bfloat16 ones
    qk_scale: float                         # q and k are multiplied by this after their norm
    gate_width: int                         # channels that gate the value embeddings (0: no lambdas, no value embeddings)
    gate_scale: float
    long_window: int                        # of L layers, in units of sequence_len (10: all there is)
    short_window: tuple[int, int]           # of S layers: sequence_len over the first, rounded up to a multiple of the second
    smear: bool                             # smear and backout


GENERATIONS = {
    "classic": Generation(1e4, True, 1.0, 0, 0.0, 10, (1, 1), False),
    "winter": Generation(1e4, True, 1.0, 32, 2.0, 1, (2, 1), False),
    "spring": Generation(1e5, False, 1.15, 12, 3.0, 1, (3, 128), False),
    "current": Generation(1e5, False, 1.2, 12, 3.0, 1, (4, 128), True),
}
REACH, SMEAR_WIDTH, SOFTCAP = 10, 24, 15.0  # RoPE reaches REACH · sequence_len positions


def rounded_up(n: float, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


@dataclass(frozen=True)
class Config:
    """A checkpoint's `model_config`. `sequence_len` is the long attention window; RoPE reaches ten times as far."""
    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str = "L"

    @property
    def max_positions(self) -> int:
        return REACH * self.sequence_len


class Linear(nn.Linear):
    """float32 weights, arithmetic in the type of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE (Su et al. 2021) on halves, by −θ: x (B, T, H, D), cos and sin (B, T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: Config, generation: Generation, gated: bool):
        super().__init__()
        C, D = config.n_embd, config.n_embd // config.n_head
        self.head_dim, self.generation = D, generation
        self.c_q = Linear(C, config.n_head * D, bias=False)
        self.c_k = Linear(C, config.n_kv_head * D, bias=False)
        self.c_v = Linear(C, config.n_kv_head * D, bias=False)
        self.c_proj = Linear(C, C, bias=False)
        if gated:
            self.ve_gate = Linear(generation.gate_width, config.n_kv_head, bias=False)

    def forward(self, x: Tensor, value: Tensor | None, rope: tuple, mask: Tensor, cache: "Cache", layer: int) -> Tensor:
        """x (B, T, C) after its norm, value (B, T, G·D) or None, mask (B or 1, 1, 1, T, Lp + S) -> (B, T, C)."""
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.c_q, self.c_k, self.c_v))
        if value is not None:
            gate = self.generation.gate_scale * torch.sigmoid(self.ve_gate(x[..., :self.generation.gate_width]))
            v = v + gate.unsqueeze(-1) * value.view_as(v)
        q, k = norm(rotate(q, *rope)), norm(rotate(k, *rope))
        scale = self.generation.qk_scale ** 2 / math.sqrt(self.head_dim)
        return self.c_proj(cache.attend(layer, q * scale, k, v, mask))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: Config, generation: Generation, gated: bool):
        super().__init__()
        self.attn = Attention(config, generation, gated)
        self.mlp = MLP(config)


class GPT(nn.Module):
    """nanochat's GPT of any generation. Weights are float32, arithmetic runs in `dtype`; parameter names are nanochat's.

    `vocab_rows` is the height of the embedding and unembedding tables (nanochat pads it up to a multiple of 64).
    """

    def __init__(self, config: Config, generation: str = "current", vocab_rows: int | None = None,
                 dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype, self.generation = config, dtype, GENERATIONS[generation]
        self.stored_types = {}              # name -> type on disk, of the tables that nanochat keeps in bfloat16
        C, L, rows = config.n_embd, config.n_layer, vocab_rows or rounded_up(config.vocab_size, 64)
        gated = [self.generation.gate_width > 0 and i % 2 == (L - 1) % 2 for i in range(L)]
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(rows, C),
            "h": nn.ModuleList(Block(config, self.generation, gated[i]) for i in range(L))})
        self.lm_head = Linear(C, rows, bias=False)
        self.value_embeds = nn.ModuleDict({
            str(i): nn.Embedding(rows, config.n_kv_head * C // config.n_head) for i in range(L) if gated[i]})
        if self.generation.gate_width:
            self.resid_lambdas = nn.Parameter(torch.ones(L))
            self.x0_lambdas = nn.Parameter(torch.zeros(L))
        if self.generation.smear:
            self.smear_gate = Linear(SMEAR_WIDTH, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        divisor, multiple = self.generation.short_window
        window = {"L": self.generation.long_window * config.sequence_len,
                  "S": rounded_up(config.sequence_len / divisor, multiple)}
        self.windows = [window[config.window_pattern[i % len(config.window_pattern)]] for i in range(L - 1)] + [window["L"]]
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)

    def make_rope(self, device: str | torch.device) -> None:
        """Fills the tables cos and sin (10·sequence_len, 1, D/2)."""
        D = self.config.n_embd // self.config.n_head
        frequencies = 1.0 / self.generation.rope_base ** (torch.arange(0, D, 2, device=device).float() / D)
        angles = torch.arange(self.config.max_positions, device=device).float()[:, None, None] * frequencies
        rounding = torch.bfloat16 if self.generation.rope_rounded else self.dtype
        self.cos, self.sin = (f(angles).to(rounding).to(self.dtype) for f in (torch.cos, torch.sin))

    @torch.no_grad()
    def init_weights(self, seed: int) -> "GPT":
        """Random weights to train from: nanochat's initialisation of the current generation."""
        generator = torch.Generator().manual_seed(seed)
        C, L = self.config.n_embd, self.config.n_layer
        for name, p in self.named_parameters():
            if "c_proj" in name:
                p.zero_()
            elif "wte" in name or "lm_head" in name:
                p.normal_(std=0.8 if "wte" in name else 0.001, generator=generator)
            elif p.ndim == 2:
                bound = math.sqrt(3 / C) * (0.4 if "c_fc" in name else 1.0)
                p.uniform_(-bound, bound, generator=generator)
        if self.generation.gate_width:
            self.resid_lambdas.copy_(torch.linspace(1.15, 1.05, L))
            self.x0_lambdas.copy_(torch.linspace(0.20, 0.05, L))
        if self.generation.smear:
            self.backout_lambda.fill_(0.2)
        self.make_rope(self.lm_head.weight.device)
        return self

    def forward(self, ids: Tensor, cache: "Cache | None" = None) -> Tensor:
        """Runs new tokens after those in the cache, and adds them to it. ids (B, T) -> hidden states (B, T, C)."""
        cache = Cache() if cache is None else cache
        positions = cache.positions(ids)
        rope = self.cos[positions], self.sin[positions]
        masks = {window: cache.mask(ids, window, self.dtype) for window in set(self.windows)}
        x = norm(self.transformer.wte(ids).to(self.dtype))
        previous = cache.previous(x)
        if self.generation.smear:
            x = x + self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., :SMEAR_WIDTH])) * previous
        x0 = x
        for i, block in enumerate(self.transformer.h):
            if self.generation.gate_width:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            value = self.value_embeds[str(i)](ids).to(x.dtype) if str(i) in self.value_embeds else None
            x = x + block.attn(norm(x), value, rope, masks[self.windows[i]], cache, i)
            x = x + block.mlp(norm(x))
            if i == self.config.n_layer // 2:
                middle = x
        if self.generation.smear:
            x = x - self.backout_lambda.to(x.dtype) * middle
        cache.size += ids.size(1)
        return norm(x)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits before the softcap, which keeps their order: (..., C) -> float32 (..., vocab_size)."""
        return self.lm_head(hidden)[..., :self.config.vocab_size].float()

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., C) -> float32 logits (..., vocab_size)."""
        return softcap(self.unembed(hidden))

    def sampler(self) -> "GPT":
        """The model with its matrices cast to `dtype` once, rather than at every token; itself in float32."""
        if self.dtype == torch.float32:
            return self
        twin = deepcopy(self)
        for p in twin.parameters():
            if p.ndim == 2:
                p.data = p.data.to(self.dtype)
        return twin


def softcap(logits: Tensor) -> Tensor:
    return SOFTCAP * torch.tanh(logits / SOFTCAP)


# ----------------------------------------------------------------------------------------------------------------------
# The cache: what new tokens attend to


class Prefix(NamedTuple):
    """What answers read of their questions: one entry per question, right-padded."""
    lengths: Tensor                         # (P,) positions that are no padding
    hidden: Tensor                          # (P, C) hidden state of the last position, which predicts the first token
    embed: Tensor                           # (P, C) embedding of the last position, which smears into the next
    keys: list[Tensor]                      # L times (P, G, Lp, D)
    values: list[Tensor]

    def tensors(self) -> list[Tensor]:
        return [self.hidden, self.embed, *self.keys, *self.values]

    def map(self, f: Callable[[Tensor], Tensor]) -> "Prefix":
        return Prefix(self.lengths, f(self.hidden), f(self.embed), [f(k) for k in self.keys], [f(v) for v in self.values])

    def rows(self, index: Tensor) -> "Prefix":
        """The entries of the questions in index (B,), each as often as it is named."""
        return self.map(lambda x: x.index_select(0, index))._replace(lengths=self.lengths[index])


class Cache:
    """Keys and values that new tokens attend to: a part shared by the rows of a group, and each row's own.

    `Cache()` is empty. `Cache(prefix, N, capacity)` has N rows for each question of the prefix, in order, and room for
    `capacity` own tokens of each: P·Lp + B·capacity positions in all. With capacity 0 it takes one forward, which may
    be differentiated. Every row holds the same number of own tokens, `size`.
    """

    def __init__(self, prefix: Prefix | None = None, num_samples: int = 1, capacity: int = 0):
        self.prefix, self.num_samples, self.capacity, self.size = prefix, num_samples, capacity, 0
        self.keys, self.values = {}, {}     # layer -> (B, G, S, D)
        self.last = None                    # (B, T, C) embeddings of the latest forward
        self.places = self.slots = None     # once rows were dropped: each row's place (B,), the row in each place (P·N,)
        if prefix is not None:
            self.group = torch.arange(len(prefix.lengths), device=prefix.lengths.device).repeat_interleave(num_samples)
            self.last = prefix.embed[self.group].unsqueeze(1)

    def positions(self, ids: Tensor) -> Tensor:
        """Positions of new tokens ids (B, T), counted from the start of the question: (B or 1, T)."""
        new = torch.arange(self.size, self.size + ids.size(1), device=ids.device).unsqueeze(0)
        return new if self.prefix is None else new + self.prefix.lengths[self.group].unsqueeze(1)

    def mask(self, ids: Tensor, window: int, dtype: torch.dtype) -> Tensor:
        """0 where a new token sees a key (0 ≤ distance ≤ window), else −inf: (B or 1, 1, 1, T, Lp + S)."""
        keys = torch.arange(self.size + ids.size(1), device=ids.device).unsqueeze(0)      # counted from the answer's start
        queries = keys[0, self.size:].unsqueeze(1)
        if self.prefix is not None:
            shared = torch.arange(self.prefix.keys[0].size(2), device=ids.device) - self.prefix.lengths.unsqueeze(1)
            shared = shared.masked_fill(shared >= 0, -2 ** 40)[self.group]                # padding is out of sight
            keys = torch.cat([shared, keys.expand(len(shared), -1)], dim=1)
        distance = queries - keys.unsqueeze(1)
        unseen = (distance < 0) | (distance > window)
        return torch.zeros(unseen.shape, dtype=dtype, device=ids.device).masked_fill_(unseen, -torch.inf)[:, None, None]

    def previous(self, x: Tensor) -> Tensor:
        """Embeddings x (B, T, C) of the new tokens -> those of the tokens before them, zero before the first."""
        before = torch.zeros_like(x[:, :1]) if self.last is None else self.last[:, -1:]
        self.last = x
        return torch.cat([before, x[:, :-1]], dim=1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds k and v (B, T, G, D) to the rows' own part and returns the whole of it, (B, G, S, D) each."""
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if not self.capacity:
            self.keys[layer], self.values[layer] = k, v
            return k, v
        end = self.size + k.size(2)
        for part, new in ((self.keys, k), (self.values, v)):
            if layer not in part:
                part[layer] = new.new_empty(new.size(0), new.size(1), self.capacity, new.size(3))
            part[layer][:, :, self.size:end] = new
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def to_groups(self, x: Tensor) -> Tensor:
        """(B, G, ·, E) -> (P, G, N·, E): what the rows of a group ask of their shared part becomes one matrix."""
        x = x if self.slots is None else x[self.slots]
        return x.unflatten(0, (-1, self.num_samples)).transpose(1, 2).flatten(2, 3)

    def to_rows(self, x: Tensor) -> Tensor:
        """(P, G, N·, E) -> (B, G, ·, E)"""
        x = x.unflatten(2, (self.num_samples, -1)).transpose(1, 2).flatten(0, 1)
        return x if self.places is None else x[self.places]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """One softmax over the shared and the own part: q (B, T, H, D), k and v (B, T, G, D) -> (B, T, C)."""
        (B, T, H, D), G = q.shape, k.size(2)
        k, v = self.append(layer, k, v)
        q = q.transpose(1, 2).reshape(B, G, H // G * T, D)
        scores = q @ k.mT
        if self.prefix is not None:
            shared = self.to_rows(self.to_groups(q) @ self.prefix.keys[layer].mT)
            scores = torch.cat([shared, scores], dim=-1)
        weights = (scores.view(B, G, H // G, T, scores.size(-1)) + mask).softmax(dim=-1).view_as(scores)
        Lp = scores.size(-1) - k.size(2)
        y = weights[..., Lp:] @ v
        if self.prefix is not None:
            y = y + self.to_rows(self.to_groups(weights[..., :Lp]) @ self.prefix.values[layer])
        return y.view(B, H, T, D).transpose(1, 2).reshape(B, T, H * D)

    def drop(self, stopped: Tensor) -> Tensor:
        """Forgets the rows that stopped (B,), and groups with none left. The last ones move into the holes, so that
        only they are copied. Returns the former places (B',) of the rows that are left, in their new order."""
        order = fill_holes(~stopped)
        for part in (self.keys, self.values):
            for layer in part:
                part[layer] = move(part[layer], order, self.size)
        self.last, group = self.last[order], self.group[order]
        count = torch.bincount(group, minlength=len(self.prefix.lengths))
        groups = fill_holes(count > 0)
        self.prefix = self.prefix.map(lambda x: move(x, groups))._replace(lengths=self.prefix.lengths[groups])
        self.group, count = inverse(groups, len(count))[group], count[groups]
        self.num_samples = int(count.max())
        by_group = self.group.argsort(stable=True)
        rank = inverse(by_group) - (count.cumsum(0) - count)[self.group]                      # among the rows of its group
        self.places = self.group * self.num_samples + rank
        self.slots = inverse(self.places, len(count) * self.num_samples)
        return order


def fill_holes(keep: Tensor) -> Tensor:
    """Indices of the kept entries, in order but for the last ones, which stand where an entry before is not kept."""
    n = int(keep.sum())
    order = torch.arange(n, device=keep.device)
    order[~keep[:n]] = n + keep[n:].nonzero().squeeze(1)
    return order


def move(x: Tensor, order: Tensor, size: int | None = None) -> Tensor:
    """x[order] for an order that fill_holes made: in place, and where x is (B, G, S, D) no more than S = `size`."""
    moved = (order != torch.arange(len(order), device=order.device)).nonzero().squeeze(1)
    part = x if size is None else x[:, :, :size]
    part[moved] = part[order[moved]]
    return x[:len(order)]


def inverse(order: Tensor, size: int | None = None) -> Tensor:
    """Where each number below `size` (default: their count) stands in order; 0 for those that do not."""
    places = order.new_zeros(size or len(order))
    places[order] = torch.arange(len(order), device=order.device)
    return places


def pad(sequences: list[list], device: str | torch.device = "cpu") -> Tensor:
    """Lists of numbers -> (B, T), padded with zeros on the right."""
    width = max(map(len, sequences))
    return torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences], device=device)


def prefill(model: GPT, prompts: list[list[int]]) -> Prefix:
    """Runs the prompts, each once."""
    device = model.lm_head.weight.device
    cache, lengths = Cache(), torch.tensor([len(p) for p in prompts], device=device)
    hidden = model(pad(prompts, device), cache)
    last = torch.arange(len(prompts), device=device), lengths - 1
    return Prefix(lengths, hidden[last], cache.last[last],
                  [k.contiguous() for k in cache.keys.values()], [v.contiguous() for v in cache.values.values()])


# ----------------------------------------------------------------------------------------------------------------------
# The sampler


@dataclass
class Completion:
    """A sampled answer, token by token, with the stop token where one was sampled."""
    tokens: list[int]
    mask: list[bool]                        # False where the calculator forced the token
    logprobs: list[float]                   # under the distribution it was drawn from; 0 where forced or greedy


def candidates(logits: Tensor, temperature: float, top_k: int) -> tuple[Tensor, Tensor | None]:
    """What can be sampled, given logits before the softcap (..., V): scores whose softmax is the policy (..., k), best
    first, and their token ids (..., k). With top_k = 0 all V of them, in the order of their ids (None)."""
    values, ids = logits.topk(min(top_k, logits.size(-1))) if top_k else (logits, None)
    return softcap(values) / temperature, ids


def policy_logprobs(logits: Tensor, tokens: Tensor, temperature: float, top_k: int) -> Tensor:
    """Logprobs of tokens (...) under the distribution that `generate` draws from, given logits before the softcap
    (..., V). A token that rounding pushed out of the top k takes the place of the last one in it."""
    scores, ids = candidates(logits, temperature, top_k)
    chosen = softcap(logits.gather(-1, tokens.unsqueeze(-1))) / temperature
    if ids is not None:
        scores = torch.cat([scores[..., :-1], torch.minimum(scores[..., -1:], chosen)], dim=-1)
    return chosen.squeeze(-1) - scores.logsumexp(dim=-1)


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Samples by inverting the distribution function: logits before the softcap (B, V) and numbers in [0, 1) (B,) ->
    tokens (B,) and their logprobs (B,)."""
    scores, ids = candidates(logits, temperature, top_k)
    logprobs = scores.log_softmax(dim=-1)
    reach = logprobs.exp().cumsum(dim=-1)
    pick = torch.searchsorted(reach, uniform.unsqueeze(1) * reach[:, -1:], right=True).clamp_(max=scores.size(-1) - 1)
    tokens = pick if ids is None else ids.gather(1, pick)
    return tokens.squeeze(1), logprobs.gather(1, pick).squeeze(1)


def mix(x: Tensor) -> Tensor:
    """A bijection of int64 that looks random: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ ((x >> 30) & (2 ** 34 - 1))) * (0xBF58476D1CE4E5B9 - 2 ** 64)
    x = (x ^ ((x >> 27) & (2 ** 37 - 1))) * (0x94D049BB133111EB - 2 ** 64)
    return x ^ ((x >> 31) & (2 ** 33 - 1))


def fold(*counters: int | Tensor) -> Tensor:
    """One random int64 for every combination of counters: integers, or int64 tensors that broadcast together."""
    state = torch.zeros((), dtype=torch.int64)
    for counter in counters:
        state = mix((state + (0x9E3779B97F4A7C15 - 2 ** 64)) ^ torch.as_tensor(counter))
    return state


def to_uniform(x: Tensor) -> Tensor:
    """Random int64 -> float32 in [0, 1)."""
    return ((x >> 40) & (2 ** 24 - 1)).float() / 2 ** 24


@torch.inference_mode()
def generate(model: GPT, tokenizer: "Tokenizer", prompts: list[list[int]], num_samples: int, max_new_tokens: int,
             temperature: float = 1.0, top_k: int = 50, seed: int = 0, keys: list[int] | None = None,
             first_sample: int = 0, progress: Callable[[int], None] | None = None) -> list[list[Completion]]:
    """Samples `num_samples` completions of each prompt (a list of token ids): one list per prompt, in order.

    temperature 0 is greedy, top_k 0 truncates nothing. Each random number is a function of (seed, key, sample,
    position): `keys` names the prompts (default: by their places), samples count from `first_sample`. A completion ends
    with assistant_end or bos, or after max_new_tokens tokens, forced ones included. `progress` is told after each position
    how many have ended. All prompts run as one batch. Raises ValueError past the reach of RoPE.
    """
    if max(map(len, prompts)) + max_new_tokens > model.config.max_positions:
        raise ValueError(f"a prompt of {max(map(len, prompts))} tokens and {max_new_tokens} new ones are more than the "
                         f"{model.config.max_positions} positions of this model")
    model = model.sampler()
    if temperature == 0:
        temperature, top_k = 1.0, 1
    device, B = model.lm_head.weight.device, len(prompts) * num_samples
    prefix = prefill(model, prompts)
    cache = Cache(prefix, num_samples, max_new_tokens)
    logits = model.unembed(prefix.hidden)[cache.group]
    names = torch.tensor(range(len(prompts)) if keys is None else keys, device=device)[cache.group]
    stream = fold(seed, names, torch.arange(first_sample, first_sample + num_samples, device=device).repeat(len(prompts)))
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.int64, device=device)
    forced = torch.full_like(tokens, -1)                    # what the calculator says at each position, else −1
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    lengths = torch.full((B,), max_new_tokens)
    live, running = torch.arange(B), torch.ones(B, dtype=torch.bool)        # the rows in the batch; those not stopped yet
    for t in range(max_new_tokens):
        token, logprob = draw(logits, to_uniform(fold(stream, t)), temperature, top_k)
        answer = forced[live, t]
        token = torch.where(answer >= 0, answer, token)
        tokens[live, t], logprobs[live, t] = token, logprob.masked_fill(answer >= 0, 0.0)
        stopped, called = torch.stack([(token == tokenizer.assistant_end) | (token == tokenizer.bos),
                                       token == tokenizer.python_end]).cpu() & running      # the one wait for the device
        for row in live[called].tolist():
            result = tokenizer.calculate(tokens[row, :t + 1].tolist())[:max_new_tokens - t - 1]
            forced[row, t + 1:t + 1 + len(result)] = torch.tensor(result, dtype=torch.int64, device=device)
        stopped |= running & (t + 1 == max_new_tokens)
        lengths[live[stopped]] = t + 1
        if progress:
            progress(int(stopped.sum()))
        running &= ~stopped
        if not running.any():
            break
        if running.sum() <= 0.95 * len(running):
            order = cache.drop(~running.to(device))
            token, stream = token[order], stream[order]
            live, running = live[order.cpu()], running[order.cpu()]
        logits = model.unembed(model(token.unsqueeze(1), cache).squeeze(1))
    columns = tokens.tolist(), (forced < 0).tolist(), logprobs.tolist(), lengths.tolist()
    rows = [Completion(ids[:n], mask[:n], logprob[:n]) for ids, mask, logprob, n in zip(*columns)]
    return [rows[i:i + num_samples] for i in range(0, B, num_samples)]


# ----------------------------------------------------------------------------------------------------------------------
# The calculator and the tokenizer

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.UAdd: operator.pos, ast.USub: operator.neg}


def evaluate(node: ast.AST) -> int | float:
    """The value of parsed arithmetic or of 'text'.count('part'). Raises TypeError on any other syntax."""
    match node:
        case ast.Constant(int() | float() as value):
            return value
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](evaluate(left), evaluate(right))
        case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](evaluate(operand))
        case ast.Call(ast.Attribute(ast.Constant(str() as text), "count"), [ast.Constant(str() as part)], []):
            return text.count(part)
    raise TypeError(f"not arithmetic: {type(node).__name__}")


def calculate(expression: str) -> str | None:
    """What nanochat's calculator answers, to ten significant digits and without a trailing `.0`; None where it has no
    answer. It knows digits and `+ - * / // . ( )`, commas being removed, and 'text'.count('part')."""
    expression = expression.replace(",", "").strip()
    arithmetic = re.fullmatch(r"[0-9+\-*/.() ]+", expression)
    counting = re.fullmatch(r"[A-Za-z0-9'\"()._ ]+", expression) and ".count(" in expression
    if len(expression) > 200 or not (arithmetic or counting):
        return None
    try:
        with warnings.catch_warnings(action="ignore"):      # the parser's, on what only looks like a number
            value = evaluate(ast.parse(expression, mode="eval").body)
        if not math.isfinite(value):
            return None
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError):
        return None
    if isinstance(value, int):
        return str(int(value))
    text = format(Decimal(f"{value:.10g}"), "f")
    return "0" if text == "-0" else text


class Tokenizer:
    """A tiktoken encoding with nanochat's special tokens, each an attribute: bos, user_start, …, output_end."""

    SPECIAL = ("bos", "user_start", "user_end", "assistant_start", "assistant_end",
               "python_start", "python_end", "output_start", "output_end")

    def __init__(self, encoding: tiktoken.Encoding):
        self.encoding, self.vocab_size = encoding, encoding.n_vocab
        for name in self.SPECIAL:
            setattr(self, name, encoding.encode_single_token(f"<|{name}|>"))
        self.stops = (self.assistant_end, self.bos)         # either ends the model's turn

    def encode(self, text: str) -> list[int]:
        """Text -> token ids. What looks like a special token in it is plain text."""
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode(ids)

    def render(self, question: str) -> list[int]:
        """The prompt that asks a question: the chat up to where the assistant begins to speak."""
        return [self.bos, self.user_start, *self.encode(question), self.user_end, self.assistant_start]

    def calculate(self, ids: list[int]) -> list[int]:
        """The calculator's answer, as tokens, to the call that the last of a completion's tokens has closed: what stands
        between the last python_start and this python_end. Empty where there is no call or no answer."""
        body = ids[:-1]
        start = max((i for i, token in enumerate(body) if token in (self.python_start, self.python_end)), default=None)
        if start is None or body[start] == self.python_end:
            return []
        result = calculate(self.decode(body[start + 1:]))
        return [] if result is None else [self.output_start, *self.encode(result), self.output_end]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints, in nanochat's format


class PlainUnpickler(pickle.Unpickler):
    """Admits a tiktoken encoding and plain data, so that no file can run code."""

    def find_class(self, module: str, name: str) -> type:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return tiktoken.Encoding


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer beside a checkpoint, or two folders up in tokenizer/. Raises UserError, naming the file."""
    directory = Path(directory).absolute()
    beside, above = directory / "tokenizer.pkl", directory.parent.parent / "tokenizer" / "tokenizer.pkl"
    path = beside if beside.exists() else above
    if not path.exists():
        raise UserError(f"no tokenizer: put the checkpoint's tokenizer.pkl at {beside} or {above}")
    try:
        with open(path, "rb") as file:
            encoding = PlainUnpickler(file).load()
        if not isinstance(encoding, tiktoken.Encoding):
            raise pickle.UnpicklingError(f"it holds a {type(encoding).__name__}")
        return Tokenizer(encoding)
    except Exception as error:              # a pickle can be broken in any way there is
        raise UserError(f"{path} is no nanochat tokenizer ({one_line(error)}); copy tokenizer.pkl again") from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def checkpoint_steps(directory: str | Path) -> list[int]:
    """The steps that have both a model and a meta file, ascending."""
    models = (re.fullmatch(r"model_(\d+)\.pt", path.name) for path in Path(directory).glob("model_*.pt"))
    return sorted(int(m[1]) for m in models if m and Path(directory, f"meta_{m[1]}.json").exists())


def detect_generation(state: dict[str, Tensor]) -> str:
    """The generation of the model that a state dict belongs to, by its keys."""
    gate = next((w.shape[1] for key, w in state.items() if key.endswith("ve_gate.weight") and w.ndim == 2), 0)
    for name, generation in GENERATIONS.items():
        if (generation.gate_width, generation.smear) == (gate, "smear_gate.weight" in state):
            return name
    raise UserError(f"value-embedding gates of width {gate} are of no nanochat generation known here")


def load_checkpoint(directory: str | Path, step: int | None = None, device: str | torch.device = "cpu",
                    dtype: torch.dtype = torch.float32) -> tuple[GPT, Tokenizer, dict]:
    """Loads model_<step>.pt (default: the last complete one), its tokenizer and its meta from a nanochat folder.
    Arithmetic will run in `dtype`. Raises UserError, naming the file, on whatever is missing, broken or foreign."""
    directory = Path(directory)
    steps = checkpoint_steps(directory)
    if not steps or step not in (None, *steps):
        raise UserError(f"no checkpoint of step {step} in {directory}; there are: {', '.join(map(str, steps)) or 'none'}"
                        if step is not None else f"no checkpoint (model_*.pt with meta_*.json) in {directory}")
    step = steps[-1] if step is None else step
    model_path, meta_path = directory / f"model_{step:06d}.pt", directory / f"meta_{step:06d}.json"
    try:
        meta = json.loads(meta_path.read_text())
        config = Config(**meta["model_config"])
    except Exception as error:
        raise UserError(f"{meta_path} is no nanochat meta file: {one_line(error)}") from error
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, {meta_path} says {config.vocab_size}: "
                        f"put the tokenizer that this model was trained with at {directory / 'tokenizer.pkl'}")
    try:
        check_digest(model_path, meta)
        state = torch.load(model_path, map_location=device, weights_only=True)
        state = {key.removeprefix("_orig_mod."): tensor for key, tensor in state.items()}
        return build(config, state, dtype), tokenizer, meta
    except Exception as error:              # damaged and foreign files fail in many ways
        raise UserError(f"{model_path} cannot be loaded: {one_line(error)}") from error


def build(config: Config, state: dict[str, Tensor], dtype: torch.dtype) -> GPT:
    """The model that a state dict belongs to. Raises UserError, naming the key, on one that is none of nanochat's."""
    rows = state["transformer.wte.weight"].shape[0] if "transformer.wte.weight" in state else None
    if rows and rows < config.vocab_size:
        raise UserError(f"transformer.wte.weight has {rows} rows for {config.vocab_size} tokens")
    with torch.device("meta"):
        model = GPT(config, detect_generation(state), rows, dtype)
    expected = model.state_dict()
    if odd := sorted(expected.keys() ^ state.keys()):
        raise UserError(f"{'unknown' if odd[0] in state else 'missing'} key {odd[0]}: not an architecture known here")
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise UserError(f"{key} has shape {tuple(tensor.shape)}, the config says {tuple(expected[key].shape)}")
    model.load_state_dict({key: tensor.float() for key, tensor in state.items()}, assign=True)
    model.requires_grad_()
    model.stored_types = {key: tensor.dtype for key, tensor in state.items()}
    model.make_rope(model.lm_head.weight.device)
    return model


def save_checkpoint(directory: str | Path, step: int, model: GPT, tokenizer: Tokenizer, meta: dict,
                    training: dict | None = None) -> None:
    """Writes model_<step>.pt, the tokenizer beside it, optim_<step>.pt where `training` is given (what a run needs to go
    on), and last meta_<step>.json, with the digests of the others: a checkpoint is there once its meta is. Tensors have
    the types that they were loaded with. Raises OSError, leaving earlier checkpoints as they were."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.to("cpu", model.stored_types.get(key)) for key, tensor in model.state_dict().items()}
    names = {f"model_{step:06d}.pt": lambda file: torch.save(state, file),
             "tokenizer.pkl": lambda file: pickle.dump(tokenizer.encoding, file)}
    if training is not None:
        names[f"optim_{step:06d}.pt"] = lambda file: torch.save(training, file)
    for name, write in names.items():
        write_file(directory / name, write)
    meta = {**meta, "step": step, "sha256": {name: digest(directory / name) for name in names}}
    write_file(directory / f"meta_{step:06d}.json", lambda file: file.write(json.dumps(meta, indent=2).encode()))


def write_file(path: Path, write: Callable) -> None:
    """A file appears whole or not at all: written beside, flushed to disk, renamed."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def digest(path: Path) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def check_digest(path: Path, meta: dict) -> None:
    """Raises UserError, naming the file, where it is not as it was when the meta was written."""
    if not path.exists():
        raise UserError(f"{path} is missing")
    if digest(path) != meta.get("sha256", {}).get(path.name, digest(path)):
        raise UserError(f"{path} is damaged")


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers

# Quintic polynomials that take singular values to 1, fastest in the worst case (Polar Express, Amsel et al. 2025, arXiv
# 2505.16932), with the paper's safety factor of 1.01 in all but the input's norm.
POLAR_EXPRESS = [(a / 1.01, b / 1.01 ** 3, c / 1.01 ** 5) for a, b, c in (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673))]


def orthogonalize(x: Tensor) -> Tensor:
    """Matrices (n, rows, columns) -> about U·Vᵀ of their singular value decompositions; in bfloat16 on a GPU."""
    tall = x.size(-2) > x.size(-1)
    x = x.to(torch.bfloat16 if x.is_cuda else x.dtype)
    x = x.mT if tall else x
    x = x / (1.01 * x.norm(dim=(-2, -1), keepdim=True)).clamp(min=1e-30)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024): Nesterov momentum 0.95, update scaled by √max(1, rows / columns).
    All matrices of one shape are a parameter group and run as one batch."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95):
        shapes = {}
        for p in params:
            shapes.setdefault(p.shape, []).append(p)
        super().__init__([{"params": group} for group in shapes.values()], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            gradient = torch.stack([p.grad for p in group["params"]])
            state = self.state[group["params"][0]]
            if not state:
                state["average"] = torch.zeros_like(gradient)
            average = state["average"].lerp_(gradient, 1 - group["momentum"])
            update = orthogonalize(gradient.lerp(average, group["momentum"]))
            rate = group["lr"] * math.sqrt(max(1, gradient.size(1) / gradient.size(2)))
            for p, u in zip(group["params"], update):
                p.sub_(u, alpha=rate)


def make_optimizers(model: GPT, embedding_lr: float = 0.2, unembedding_lr: float = 0.004, matrix_lr: float = 0.02,
                    weight_decay: float = 0.0) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019) for tables and scalars, Muon for the matrices, in nanochat's groups and at its
    rates. The weight decay is that of the embedding and the unembedding."""
    scale = (model.config.n_embd / 768) ** -0.5
    named = dict(model.named_parameters())

    def group(prefixes: tuple[str, ...], lr: float, betas: tuple[float, float], weight_decay: float = 0.0) -> dict:
        params = [p for name, p in named.items() if name.startswith(prefixes)]
        return {"params": params, "lr": lr, "betas": betas, "weight_decay": weight_decay}

    groups = [group(("lm_head",), unembedding_lr * scale, (0.8, 0.96), weight_decay),
              group(("transformer.wte",), embedding_lr * scale, (0.8, 0.995), weight_decay),
              group(("value_embeds",), embedding_lr * scale / 2, (0.8, 0.995)),
              group(("resid_lambdas",), 0.005, (0.8, 0.95)),
              group(("x0_lambdas",), 0.5, (0.96, 0.95)),
              group(("smear", "backout"), 0.2, (0.8, 0.95))]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], eps=1e-10)
    return [adamw, Muon([p for name, p in named.items() if name.startswith("transformer.h.")], matrix_lr)]
