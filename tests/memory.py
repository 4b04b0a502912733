"""How much memory a run takes, by a formula that test_hf.py holds against measured peaks of small models.

    python tests/memory.py                                  # README's table
"""
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpt  # noqa: E402
from gpt import Config  # noqa: E402


def count(config: Config) -> int:
    return sum(p.numel() for p in gpt.empty_model(config, None).parameters())


def block_memory(c: Config, itemsize: int) -> float:
    """Bytes that a block keeps of each token for its backward: inputs of norms and matrices, what is between them, queries,
    and keys and values of all heads; attention keeps no scores."""
    channels = (4 if c.lora_rank else 6) + 2 * (itemsize < 4)                   # a norm that learns keeps what it scales
    norms = 2 if c.qk_norm else 0
    return itemsize * (channels * c.n_embd + 4 * c.mlp_width + (5 + norms) * c.n_head * c.head_dim
                       + norms * c.n_kv_head * c.head_dim + 7 * c.lora_rank)


def memory(c: Config, itemsize: int, rollout_rows: int, num_samples: int, prompt: int, new: int, batch: int,
           recompute: bool = False, matrix_optimizer: str = "adamw") -> dict[str, float]:
    """Bytes of each part of a step on one rank. `itemsize` is that of the arithmetic's type; `rollout_rows` are sampled at
    once, `num_samples` to a prompt of `prompt` tokens, each of `new` tokens; `batch` rows are learned from at once."""
    base, L, halved = count(replace(c, lora_rank=0)), c.n_layer, itemsize < 4
    learned = count(c) - base if c.lora_rank else base
    matrices = learned if c.lora_rank else L * c.n_embd * (2 * (c.n_head + c.n_kv_head) * c.head_dim + 3 * c.mlp_width)
    cast = itemsize * matrices if halved else 0             # float32 weights are cast to a smaller type
    kv, block = 2 * c.n_kv_head * c.head_dim * itemsize, block_memory(c, itemsize)
    tokens = batch * (prompt + new)                         # as many questions as rows run at once, and as many completions
    logits = 4 * 4 * max(c.vocab_rows, min(gpt.LOGITS_AT_ONCE, batch * new * c.vocab_rows))     # with what is made of them
    read = 4 * kv * L * batch * prompt                      # copies of the questions' keys and values, and their gradients
    if recompute:                                           # a block's input, the questions' keys and values; one block, when no
        kept = L * (tokens * c.n_embd * itemsize + batch * prompt * kv) + max(batch * new * block + cast / L - logits, 0)
    else:                                                   # and the questions' keys and values of all heads
        kept = tokens * L * block + 2 * cast + 2 * c.n_head * c.head_dim * itemsize * L * batch * prompt
    table = c.vocab_rows * c.n_embd * (itemsize * halved + 4) * (not c.lora_rank)           # a cast of it, and its gradient
    return {
        "weights": itemsize * base + 4 * learned if c.lora_rank else 4 * base,
        "sampler": itemsize * learned if halved else 0,     # its copy
        "gradient": 4 * learned,
        "optimizer": 8 * learned - 4 * matrices * (matrix_optimizer == "muon"),
        "keys and values": kv * L * rollout_rows * (new + 2 * prompt / num_samples),
        "before": 4 * learned,                              # the weights before the step, to measure it by
        "activations": kept + read + 3 * itemsize * batch * new * (prompt + new),
        "logits": logits + table,
    }


def peak(parts: dict[str, float]) -> float:
    """What a step takes: sampling and learning take turns."""
    fixed = sum(parts[name] for name in ("weights", "sampler", "gradient", "optimizer"))
    return fixed + max(parts["keys and values"] + parts["logits"], sum(parts[name] for name in ("before", "activations", "logits")))


LLAMA_8B = Config(128_256, 128_256, 32, 32, 8, 4096, 128, 14_336, 131_072, norm_eps=1e-5, rope_base=5e5, lora_rank=32)
QWEN_1_5B = Config(151_665, 151_936, 28, 12, 2, 1536, 128, 8960, 32_768, tied=True, qkv_bias=True, rope_base=1e6)


def table() -> str:
    """README's: GB of each part, in bfloat16, 16 x 16 rows of 200 + 1,024 tokens."""
    rows = []
    for name, config in (("Llama 3.1 8B, `--lora-rank=32`", LLAMA_8B), ("Qwen2.5 1.5B, all weights", QWEN_1_5B)):
        for rollout_rows in (256, 64):
            for recompute in (False, True):
                for batch in (1, 2, 4, 8):
                    parts = memory(config, 2, rollout_rows, 16, 200, 1024, batch, recompute)
                    figures = [parts[key] for key in parts] + [peak(parts)]
                    rows.append([name, rollout_rows, batch, "yes" if recompute else "", *(f"{x / 1e9:.1f}" for x in figures)])
    head = ["model", "`--rollout-batch-size`", "`--device-batch-size`", "`--recompute`", *parts, "peak"]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    print(table())
