"""nanochat's arithmetic, written out in float64 from the facts of its checkpoints, and checkpoints made of nothing."""
import json
import math
import pickle
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("bos", "user_start", "user_end", "assistant_start", "assistant_end", "python_start", "python_end", "output_start",
         "output_end")
GENERATIONS = ("classic", "winter", "spring", "current")
WINDOWED = {"sequence_len": 144, "vocab_size": 265, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "n_embd": 48,
            "window_pattern": "SLS"}


# A checkpoint, and what nanochat computes from it


def random_state(generation: str, config: dict, seed: int = 0) -> dict[str, Tensor]:
    """Random weights by nanochat's names. The scalars are off zero, and all is large enough to be seen in the logits."""
    C, L, D, G = config["n_embd"], config["n_layer"], config["n_embd"] // config["n_head"], config["n_kv_head"]
    rows, current = math.ceil(config["vocab_size"] / 64) * 64, generation == "current"
    shapes = {"transformer.wte.weight": (rows, C), "lm_head.weight": (rows, C)}
    for i in range(L):
        layer = {"attn.c_q": (C, C), "attn.c_k": (G * D, C), "attn.c_v": (G * D, C), "attn.c_proj": (C, C),
                 "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
        if generation != "classic" and i % 2 == (L - 1) % 2:
            shapes[f"value_embeds.{i}.weight"] = (rows, G * D)
            layer["attn.ve_gate"] = (G, 32 if generation == "winter" else 12)
        shapes |= {f"transformer.h.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"resid_lambdas": (L,), "x0_lambdas": (L,)} if generation != "classic" else {}
    shapes |= {"smear_gate.weight": (1, 24), "smear_lambda": (1,), "backout_lambda": (1,)} if current else {}
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, x in state.items():
        x.mul_(0.2).add_(0.6) if x.ndim == 1 else x.mul_((1 if "embeds" in name or "gate" in name else 0.3) * x.size(1) ** -0.5)
    for name in [name for name in state if "c_q" in name or "c_k" in name]:
        state[name] *= 0.1                  # so that the norm's epsilon is seen
    state["lm_head.weight"] *= 20
    return state


def write_checkpoint(folder: Path, state: dict[str, Tensor], config: dict, step: int = 7) -> None:
    """The files of a nanochat checkpoint, with a tokenizer of bytes."""
    special = {f"<|{name}|>": 256 + i for i, name in enumerate(NAMES)}
    encoding = tiktoken.Encoding("bytes", pat_str="(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens=special)
    folder.mkdir(parents=True)
    torch.save(state, folder / f"model_{step:06d}.pt")
    (folder / f"meta_{step:06d}.json").write_text(json.dumps({"model_config": config, "step": step}))
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 2 ** -23).sqrt()       # float32's epsilon, whatever the type here


def reference_logits(state: dict[str, Tensor], config: dict, ids: list[int]) -> Tensor:
    """What nanochat computes, (T, V), in the type of the state: each generation has what its keys say."""
    C, L, H, G, T = (*(config[key] for key in ("n_embd", "n_layer", "n_head", "n_kv_head")), len(ids))
    D, dtype, gate = C // H, state["lm_head.weight"].dtype, next((x.size(1) for key, x in state.items() if "ve_gate" in key), 0)
    generation = {0: "classic", 32: "winter", 12: "current" if "smear_lambda" in state else "spring"}[gate]
    base, scale, amount, short = {
        "classic": (1e4, 1, 0, None), "winter": (1e4, 1, 2, config["sequence_len"] // 2),
        "spring": (1e5, 1.15, 3, math.ceil(config["sequence_len"] / 3 / 128) * 128),
        "current": (1e5, 1.2, 3, math.ceil(config["sequence_len"] / 4 / 128) * 128)}[generation]
    angles = torch.arange(T).float()[:, None] * base ** (-torch.arange(0, D, 2).float() / D)
    cos, sin = (x.bfloat16() if generation in ("classic", "winter") else x for x in (angles.cos(), angles.sin()))
    cos, sin, distance = cos.to(dtype), sin.to(dtype), torch.arange(T)[:, None] - torch.arange(T)

    def turn(x: Tensor) -> Tensor:                              # (heads, T, D)
        a, b = x[..., :D // 2], x[..., D // 2:]
        return scale * norm(torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1))

    x = norm(state["transformer.wte.weight"][ids])
    if generation == "current":
        smear = state["smear_lambda"] * torch.sigmoid(x[1:, :24] @ state["smear_gate.weight"].T)
        x = torch.cat([x[:1], x[1:] + smear * x[:-1]])
    x0 = x
    for i in range(L):
        if gate:
            x = state["resid_lambdas"][i] * x + state["x0_lambdas"][i] * x0
        weights = {key.split(".")[-2]: w for key, w in state.items() if key.startswith(f"transformer.h.{i}.attn.")}
        h, reach = norm(x), short if i < L - 1 and config["window_pattern"][i % len(config["window_pattern"])] == "S" else None
        q, k, v = ((h @ weights[name].T).view(T, -1, D).transpose(0, 1) for name in ("c_q", "c_k", "c_v"))
        if "ve_gate" in weights:
            opened = amount * torch.sigmoid(h[:, :gate] @ weights["ve_gate"].T)                # (T, G)
            v = v + opened.T[:, :, None] * state[f"value_embeds.{i}.weight"][ids].view(T, G, D).transpose(0, 1)
        k, v = (y.repeat_interleave(H // G, dim=0) for y in (turn(k), v))
        window = math.inf if generation == "classic" else reach or config["sequence_len"]
        scores = (turn(q) @ k.mT / math.sqrt(D)).masked_fill((distance < 0) | (distance > window), -math.inf)
        x = x + (scores.softmax(dim=-1) @ v).transpose(0, 1).reshape(T, C) @ weights["c_proj"].T
        mlp = [state[f"transformer.h.{i}.mlp.{name}.weight"] for name in ("c_fc", "c_proj")]
        x = x + F.relu(norm(x) @ mlp[0].T).square() @ mlp[1].T
        middle = x if i == L // 2 else middle if i > L // 2 else None
    x = norm(x - state["backout_lambda"] * middle) if generation == "current" else norm(x)
    return 15 * torch.tanh((x @ state["lm_head.weight"].T)[:, :config["vocab_size"]] / 15)
