"""How much memory a rank takes, by a formula that test_memory.py holds against measured peaks of small models.

    python tests/memory.py                                  # README's table
"""
import itertools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import chat_rl  # noqa: E402
import gpt  # noqa: E402
from gpt import Config  # noqa: E402


@dataclass(frozen=True)
class Job:
    """What a rank does: chat_rl.py's flags; all questions have `prompt` tokens, all completions `new`."""

    config: Config
    itemsize: int = 2                       # bytes of a number of the arithmetic
    ranks: int = 1
    prompt: int = 200
    new: int = 1024
    batch: int = 8                          # --device-batch-size
    recompute: bool = False
    examples: int = 16                      # --examples-per-step
    samples: int = 16                       # --num-samples
    eval_samples: int = 8
    tests: int = 400                        # --eval-examples
    rows: int = 256                         # --rollout-batch-size
    top_k: int = 0
    fused: bool = True                      # norms and Adam in one kernel, products of bfloat16 in float32, as on a GPU


def sizes(config: Config) -> tuple[int, int, int, int]:
    """Elements that learn, elements that do not, those of the largest matrix that learns, and those
    that learn with Muon, which has no squares."""
    parameters = dict(gpt.empty_model(config).named_parameters())
    learned = {name: p.numel() for name, p in parameters.items() if p.requires_grad}
    frozen = sum(p.numel() for p in parameters.values() if not p.requires_grad)
    muon = [n for name, n in learned.items() if gpt.recipe_of(name, parameters[name].shape, config, chat_rl.Flags()).muon]
    return sum(learned.values()), frozen, max(n for name, n in learned.items() if name.startswith("transformer.h")), sum(muon)


def held(job: Job) -> dict[str, float]:
    """Bytes of what is there all the time."""
    learned, frozen, _, muon = sizes(job.config)
    return {
        "weights": job.itemsize * learned,
        "base of adapters": job.itemsize * frozen,
        "gradient": 4 * learned,
        "masters and averages": ((8 if job.itemsize == 4 else 12) * learned - 4 * muon) / job.ranks,
    }


def norm(job: Job, width: int) -> int:
    """What a norm keeps for its backward: what came in, what goes out, and on a CPU float32 between them."""
    learns = job.config.norm_weights and not job.config.lora_rank
    return width * (job.itemsize + (job.itemsize if job.fused else 4 * (1 + learns)))


def kept(job: Job, tokens: int, keys: int) -> tuple[float, float, float]:
    """Bytes kept for a backward of so many tokens, which attend to so many keys: outside of the blocks; of the blocks with
    --recompute; of the blocks without."""
    c, e, C = job.config, job.itemsize, job.config.n_embd
    q, k = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    ends = norm(job, C) * (1 + c.embed_norm) - e * C + e * C * (bool(c.value_gate) + c.smear)  # nothing keeps the last output
    values = e * k * len([i for i in range(c.n_layer) if i % 2 == (c.n_layer - 1) % 2]) * (c.value_gate > 0)
    inputs = c.n_layer * e * C * (1 + bool(c.value_gate)) + values
    block = 2 * norm(job, C) + e * (2 * q + k + (4 if c.gated_mlp else 2) * c.mlp_width + 7 * c.lora_rank)
    if c.qk_norm:                           # beside what goes out: that of a norm "after" RoPE is counted
        block += norm(replace(job, config=replace(c, norm_weights=c.qk_norm == "before")), q + k) - e * (q + k)
    attended = keys * 2 * e * (q if q > k else k)
    blocks = c.n_layer * (tokens * (block + e * C * bool(c.value_gate)) + attended) + tokens * values
    return tokens * ends, tokens * inputs, blocks


def logits(job: Job, tokens: int) -> float:
    """Bytes of the unembedding of so many tokens in an update, and of its table's gradient, added up over the pieces."""
    c, e = job.config, job.itemsize
    piece = min(tokens, max(1, gpt.LOGITS_AT_ONCE // c.vocab_rows))
    each = 12 if job.top_k else 20 + 4 * (c.softcap > 0)
    table = c.vocab_rows * c.n_embd * (not c.lora_rank)
    added = 4 * table * (piece < tokens)
    return max(piece * c.vocab_rows * each + added, e * table + 4 * table * (e < 4) + added + added * (e == 4))


def training(job: Job) -> dict[str, float]:
    """Bytes of the parts of the peak of `backward`: the completions' backward begins, with all questions kept."""
    c, e = job.config, job.itemsize
    kv = 2 * c.n_kv_head * c.head_dim * e * c.n_layer
    groups = min(job.batch, math.ceil(job.examples / job.ranks))
    rows = min(job.batch, groups * job.samples)
    asked, said = groups * job.prompt, rows * job.new
    questions, completions = kept(job, asked, asked), kept(job, said, rows * job.prompt + said)
    _, _, matrix, _ = sizes(c)
    halved = 4 * (e < 4)
    mask = e * len(set(c.windows) or {0})
    work = said * e * (2 * c.mlp_width + 3 * c.n_embd) + matrix * (e + halved)
    if job.recompute:
        work += completions[2] / c.n_layer
    which = 1 if job.recompute else 2
    copies = 1 + job.recompute + (groups * job.samples > rows)  # with their gradient, from the second batch on
    return {
        "questions": questions[0] + questions[which] + asked * (job.prompt * mask + kv * copies),
        "completions": completions[0] + completions[which] + e * said * c.n_embd + rows * job.prompt * kv
        + said * (job.prompt + job.new) * mask,
        "work": max(logits(job, said), work),
    }


def growing(new: int, layers: int) -> tuple[float, float]:
    """Positions that the rows' own part of a cache takes with that many tokens: at most, while it moves; in the end."""
    size = most = 0.0
    for t in range(1, new):                 # the last token is not run
        if t > size:
            size, most = t + t // 4 + 16, t + t // 4 + 16 + size / layers
    return max(most, size), size


def sampling(job: Job, questions: int, samples: int, top_k: int) -> dict[str, float]:
    """Bytes of the parts of the peaks of `generate`: of prefill, of the growing cache, and of the last token."""
    c, e, C = job.config, job.itemsize, job.config.n_embd
    kv = 2 * c.n_kv_head * c.head_dim * e * c.n_layer
    rows, shared = questions * samples, questions * job.prompt * kv
    mlp = e * ((3 + (c.lora_rank > 0)) * c.mlp_width + (3 + 3 * c.smear) * C + job.prompt)
    work = questions * job.prompt * max(mlp, job.prompt * (e + 7))  # or the mask, as it is made
    most, last = growing(job.new, c.n_layer)
    keys = job.prompt + job.new
    scores = rows * c.n_head * keys * 16
    if not job.fused and e < 4:             # keys in float32
        scores += 4 * c.n_kv_head * c.head_dim * (rows * job.new + questions * job.prompt)
    drawn = min(rows, max(1, gpt.LOGITS_AT_ONCE // c.vocab_rows)) * c.vocab_rows * (4 + e * (e < 4) if top_k else 16)
    stages = {
        "prefill": shared + max(shared, work),
        "growth": shared + rows * kv * most,
        "the last token": shared + rows * kv * last + max(scores, drawn),
    }
    return stages


def step(job: Job) -> float:
    """Bytes of the work of the optimizers, one parameter after another."""
    most = 0.0
    for name, p in gpt.empty_model(job.config).named_parameters():
        if p.requires_grad and gpt.recipe_of(name, p.shape, job.config, chat_rl.Flags()).muon:
            most = max(most, p.numel() * (2 if job.fused else 4) * (3 + 3 * min(p.shape) / max(p.shape)))
        elif p.requires_grad and not job.fused:
            most = max(most, 8 * p.numel())
    return most


def stages(job: Job) -> dict[str, float]:
    """Bytes of the peaks of what takes turns, besides what is held."""

    def most(questions: int, samples: int) -> float:
        at_once = min(math.ceil(questions / job.ranks), math.ceil(job.rows / samples))
        return max(sampling(job, at_once, samples, job.top_k).values())

    return {
        "sampling": most(job.examples, job.samples),
        "update": sum(training(job).values()),
        "optimizer": step(job),
        "evaluation": most(job.tests, job.eval_samples + 1),
    }


def peak(job: Job) -> float:
    return sum(held(job).values()) + max(stages(job).values())


def nanochat(depth: int) -> Config:
    shape = dict(vocab_size=65_536, vocab_rows=65_536, n_layer=depth, n_head=depth // 2, n_kv_head=depth // 2, n_embd=64 * depth)
    return gpt.nanochat_config("current", 2048, "SSSL", **shape)


QWEN_1_5B = Config(151_936, 151_936, 28, 12, 2, 1536, 128, 8960, 32_768, tied=True, qkv_bias=True)
QWEN_7B = Config(152_064, 152_064, 28, 28, 4, 3584, 128, 18_944, 32_768, qkv_bias=True)
LLAMA_8B = Config(128_256, 128_256, 32, 32, 8, 4096, 128, 14_336, 131_072)
MODELS = {
    "nanochat d24": (nanochat(24), 50, (1, 8)),
    "nanochat d32": (nanochat(32), 50, (1, 8)),
    "Qwen2.5 1.5B": (QWEN_1_5B, 0, (1, 8)),
    "Qwen2.5 7B": (QWEN_7B, 0, (8,)),
    "Llama 3.1 8B, `--lora-rank=32`": (replace(LLAMA_8B, lora_rank=32), 0, (1, 8)),
    "Llama 3.1 8B": (LLAMA_8B, 0, (8,)),
}
LIMIT = 76e9                                # bytes, of a GPU's 80 GB


def fitting(job: Job) -> Job | None:
    """The job with the fewest changes to the flags' defaults that fits, of those that cost the least time."""
    updates = [(8, False), (4, False), (8, True), (4, True), (2, True), (1, True)]
    changes = itertools.product((256, 128, 64, 32, 16), updates)
    jobs = (replace(job, rows=rows, batch=batch, recompute=recompute) for rows, (batch, recompute) in changes)
    return next((job for job in jobs if peak(job) <= LIMIT), None)


def table() -> str:
    """README's: GB in bfloat16, 16 samples to a question, with the flags' defaults, and the flags that fit."""
    names = ["weights", "gradient", "masters and averages", *stages(Job(QWEN_1_5B))]
    head = ["model", "GPUs", *names, "fits with (GB)"]
    lines = [head, ["---"] * len(head)]
    for name, (config, top_k, counts) in MODELS.items():
        for ranks in counts:
            job = Job(config, ranks=ranks, top_k=top_k)
            found = fitting(job)
            parts = {**held(job), **stages(job)}
            parts["weights"] += parts["base of adapters"]
            flags = "does not"
            if found:
                flags = f"`--rollout-batch-size={found.rows}` " * (found.rows < job.rows)
                flags += f"`--device-batch-size={found.batch}` " * (found.batch < job.batch)
                flags += "`--recompute` " * found.recompute
                flags = f"{flags or 'the defaults '}({peak(found) / 1e9:.0f})"
            lines.append([name, str(ranks), *(f"{parts[key] / 1e9:.1f}" for key in names), flags])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    print(table())
