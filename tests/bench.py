"""How fast sampling and updating are, against what the machine can do and against plain code, all in one run:

    python tests/bench.py [--device-type cuda] [--transformers]

Random weights, 16 questions of 86 tokens, 16 samples of 64 tokens each that cannot stop early, float32 on a CPU and
bfloat16 on a GPU. The bound of a rollout is the matrix products' FLOPs over the rate of a large one, and the bytes of keys
and values that are read over the rate of a large copy, both measured here; that of an update is its matrix products.
--transformers times `generate` of that library on the same Llama-shaped weights instead.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Callable

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import chat_rl  # noqa: E402
import gpt  # noqa: E402

P, N, PROMPT, NEW = 16, 16, 86, 64
VOCAB = 2048


def seconds(work: Callable, repeat: int = 3) -> float:
    """Median time of a piece of work, after a warm-up, the device's queue included."""
    def once() -> float:
        begun = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - begun
    once()
    return statistics.median(once() for _ in range(repeat))


def make_model(config: gpt.Config, device: torch.device, dtype: torch.dtype) -> gpt.GPT:
    """A model that can sample any token at any place."""
    model = gpt.GPT(config).init_weights(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "c_proj" in name or "lm_head" in name:
                p.normal_(std=0.02)
    return model.to(device, dtype)


def nanochat_shape(depth: int, width: int) -> gpt.Config:
    heads = width // 64
    return gpt.nanochat_config("current", sequence_len=512, vocab_size=VOCAB, n_layer=depth, n_head=heads, n_kv_head=heads,
                               n_embd=width, vocab_rows=VOCAB)


def endless_tokenizer() -> gpt.Tokenizer:
    """A tokenizer none of whose tokens stops a completion or calls the calculator."""
    tokenizer = chat_rl.byte_tokenizer()
    tokenizer.stops, tokenizer.call_end = (), -1
    return tokenizer


@torch.inference_mode()
def plain_rollout(model: gpt.GPT, prompts: list[list[int]], rows: int = 8) -> None:
    """The baseline: one question at a time, a few rows each, the prompt's cache copied to every row, all its logits."""
    device = model.device
    for prompt in prompts:
        for _ in range(0, N, rows):
            prefix = gpt.prefix_of(model, [prompt])
            model.unembed(prefix.hidden.new_zeros(1, len(prompt), model.config.n_embd))
            cache = gpt.Cache(prefix.rows(torch.zeros(rows, dtype=torch.int64, device=device)), 1)
            logits = model.unembed(prefix.hidden).expand(rows, -1)
            for _ in range(NEW):
                values, ids = logits.topk(50)
                token = ids.gather(1, torch.multinomial(values.softmax(dim=-1), 1))
                token.tolist()
                logits = model.unembed(model(token, cache)[:, 0])


def matmul_flops(model: gpt.GPT) -> int:
    """FLOPs of the matrix products for one token, forward, without attention."""
    tables = ("transformer.wte", "value_embeds")
    return 2 * sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith(tables))


def measure(depth: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
    model, tokenizer = make_model(nanochat_shape(depth, width), device, dtype), endless_tokenizer()
    generator, policy = torch.Generator().manual_seed(0), gpt.Policy(1.0, 50, model.config.softcap)
    learner = gpt.Learner(model, gpt.Ranks(device), dtype, chat_rl.Flags())
    model = learner.model
    num_weights = sum(p.numel() for p in model.parameters())
    prompts = torch.randint(VOCAB, (P, PROMPT), generator=generator).tolist()
    size = 8192 if device.type == "cuda" else 2048
    big = torch.randn(size, size, device=device, dtype=dtype)
    long = torch.randn(2 ** 26, device=device)
    peak, copy = 2 * size ** 3 / seconds(lambda: big @ big, 10), 2 * long.nbytes / seconds(lambda: long.clone(), 5)
    print(f"\nd{depth}, {width} wide, {num_weights / 1e6:.1f} M parameters; a large matrix product runs at {peak / 1e9:,.0f} "
          f"GFLOP/s, a large copy at {copy / 1e9:,.1f} GB/s")

    def rollout(samples: int = N, new: int = NEW) -> list[list[gpt.Completion]]:
        return gpt.generate(model, tokenizer, prompts, samples, new, policy, (0,), range(len(prompts)))

    tokens, element = P * N * NEW, torch.finfo(dtype).bits // 8
    kv = 2 * depth * width * element                                # bytes of a position
    read = NEW * P * PROMPT * kv + P * N * NEW * NEW / 2 * kv
    if device.type == "cuda":
        read += NEW * num_weights * element
    bound = tokens / (tokens * matmul_flops(model) / peak + read / copy)
    plain, rate = tokens / seconds(lambda: plain_rollout(model, prompts), 1), tokens / seconds(rollout)
    print(f"  rollout   {rate:9,.0f} tok/s   bound {bound:9,.0f} ({rate / bound:.0%})   "
          f"plain {plain:7,.0f} (x{rate / plain:.1f})")

    groups = [chat_rl.Group(chat_rl.Example(i, "", prompt, "", [], ""), completions, [], [], [],
                            torch.randn(N, generator=generator).tolist(), timeouts=0)
              for i, (prompt, completions) in enumerate(zip(prompts, rollout()))]
    bound = peak / matmul_flops(model) / 3
    update = seconds(lambda: chat_rl.backward(model, groups, policy, chat_rl.Flags()), 1)
    step = seconds(lambda: learner.update(tokens, 1e-6))
    print(f"  update    {tokens / update:9,.0f} tok/s   bound {bound:9,.0f} ({tokens / update / bound:.0%})   "
          f"optimizers {step / (tokens / rate + update + step):.1%} of a step")

    print("  samples per question  " + "".join(f"{n:9d}" for n in (4, 8, 16, 32)))
    times = [seconds(lambda: rollout(n, 32), 1) for n in (4, 8, 16, 32)]
    print("  rollout seconds       " + "".join(f"{t:9.2f}" for t in times))
    print(f"  cache                 {(P * PROMPT + P * N * NEW) * kv / 2 ** 20:.0f} MiB for P·Lp + B·T positions; "
          f"B·(Lp + T) would be {P * N * (PROMPT + NEW) * kv / 2 ** 20:.0f} MiB")


def against_transformers(depth: int, width: int, device: torch.device, dtype: torch.dtype) -> None:
    """The same Llama, sampled by both."""
    import transformers
    heads = width // 64
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth, num_attention_heads=heads,
        num_key_value_heads=heads, max_position_embeddings=512, tie_word_embeddings=False)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).to(device, dtype).eval()
    config, state = gpt.huggingface_config(config.to_dict(), VOCAB), theirs.state_dict()
    state = {name: state[gpt.huggingface_name(name)] for name in gpt.empty_model(config).state_dict()}
    mine, policy = gpt.build(config, state), gpt.Policy(1.0, 50)
    prompts = torch.randint(VOCAB, (P, PROMPT), generator=torch.Generator().manual_seed(0))
    ids = prompts.repeat_interleave(N, dim=0).to(device)
    settings = dict(do_sample=True, top_k=50, min_new_tokens=NEW, max_new_tokens=NEW, pad_token_id=0)
    other = seconds(lambda: theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings), 1)
    own = seconds(lambda: gpt.generate(mine, endless_tokenizer(), prompts.tolist(), N, NEW, policy, (0,), range(P)), 1)
    tokens = P * N * NEW
    print(f"{depth} layers, {width} wide: {tokens / own:,.0f} tok/s, transformers.generate {tokens / other:,.0f} (x{other / own:.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device-type", default="cpu")
    parser.add_argument("--transformers", action="store_true")
    arguments = parser.parse_args()
    device, work = torch.device(arguments.device_type), against_transformers if arguments.transformers else measure
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"torch {torch.__version__}, {device.type}, {torch.get_num_threads()} threads, {dtype}")
    for depth, width in ((4, 256), (8, 512)):
        work(depth, width, device, dtype)


if __name__ == "__main__":
    main()
