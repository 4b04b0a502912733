"""The formula in memory.py against the peaks of small models on a CPU, on one rank and on more."""
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import numpy
import pytest
import torch
from conftest import completion, cpu_learner, example, group_of, on_ranks, state_of
from memory import Job, held, sampling, stages, training

import chat_rl
import gpt

LLAMA = gpt.Config(1200, 1200, 3, 4, 2, 128, 32, 320, 512)
WIDE = dict(config=replace(LLAMA, vocab_size=30000, vocab_rows=30000))
QWEN2 = gpt.Config(1200, 1216, 3, 4, 4, 128, 32, 320, 512, tied=True, qkv_bias=True)
NANOCHAT = gpt.nanochat_config("current", 512, vocab_size=1200, vocab_rows=1216, n_layer=4, n_head=4, n_kv_head=4, n_embd=128)
CONFIGS = {"llama": LLAMA, "qwen2": QWEN2, "nanochat": NANOCHAT, "adapters": replace(LLAMA, lora_rank=8)}
SMALL = dict(prompt=12, new=14, batch=4, examples=8, samples=4, eval_samples=2, tests=16, rows=16, fused=False)


@pytest.fixture(autouse=True)
def several_pieces(monkeypatch):
    monkeypatch.setattr(gpt, "LOGITS_AT_ONCE", 2**15)


def peak_of(work: Callable) -> int:
    """The most bytes that are allocated while work() runs, besides those that were there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(max(numpy.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])))


def model_of(job: Job) -> gpt.GPT:
    return gpt.GPT(job.config).init_weights(0).to(torch.float32 if job.itemsize == 4 else torch.bfloat16)


def updated(job: Job, model: gpt.GPT) -> int:
    model.recompute, ids = job.recompute, list(range(job.prompt + job.new))
    completions, advantages = [completion(ids[: job.new])] * job.samples, [1.0, -1.0] * (job.samples // 2)
    questions = [example(i, ids[: job.prompt]) for i in range(job.examples // job.ranks)]
    groups = [group_of(question, completions, advantages) for question in questions]
    policy, flags = gpt.Policy(1.0, job.top_k, job.config.softcap), chat_rl.Flags(device_batch_size=job.batch)
    return peak_of(lambda: chat_rl.backward(model, groups, policy, flags))


def sampled(job: Job, model: gpt.GPT, questions: int, samples: int, top_k: int) -> int:
    prompts = [[1] * job.prompt] * min(math.ceil(questions / job.ranks), math.ceil(job.rows / samples))
    policy, endless = gpt.Policy(1.0, top_k, job.config.softcap), SimpleNamespace(stops=(), call_end=-1)
    return peak_of(lambda: gpt.generate(model, endless, prompts, samples, job.new, policy, (0,), range(len(prompts))))


def measure(ranks: gpt.Ranks, job: Job, file: Path) -> None:
    """On a rank: bytes of what it holds, by part, and the peaks of what it does."""
    model = model_of(job)
    learner = gpt.Learner(None if ranks.rank else model, ranks, next(model.parameters()).dtype, chat_rl.Flags())
    kinds = ["masters", "exp_avg", "exp_avg_sq"][job.itemsize == 4 :]
    parts = {
        "weights": sum(p.nbytes for p in learner.model.parameters() if p.requires_grad),
        "base of adapters": sum(p.nbytes for p in learner.model.parameters() if not p.requires_grad),
        "gradient": sum(p.grad.nbytes for p in learner.model.parameters() if p.requires_grad),
        "masters and averages": sum(x.nbytes for x in state_of(learner, *kinds)),
    }
    peaks = {
        "sampling": sampled(job, learner.model, job.examples, job.samples, job.top_k),
        "update": updated(job, learner.model),
        "optimizer": peak_of(lambda: learner.update(1.0)),
        "evaluation": sampled(job, learner.model, job.tests, job.eval_samples + 1, job.top_k),
    }
    found = ranks.gather((parts, peaks))
    if found:
        torch.save(found, file)


@pytest.mark.parametrize("kind,itemsize,size", [("llama", 2, 2), ("qwen2", 4, 1), ("nanochat", 4, 4), ("adapters", 4, 2)])
def test_what_ranks_take(tmp_path, kind, itemsize, size):
    """Each part and each peak is what the formula says; all ranks' masters and averages are together those of one."""
    job = Job(CONFIGS[kind], itemsize, size, **SMALL)
    on_ranks(size, measure, job, tmp_path / "found")
    parts, peaks = zip(*torch.load(tmp_path / "found"))
    whole = held(replace(job, ranks=1))["masters and averages"]
    assert sum(part["masters and averages"] for part in parts) == whole
    shares = [part.pop("masters and averages") for part in parts]
    wanted = held(job)
    assert max(shares) < 1.5 * wanted.pop("masters and averages") and all(part == pytest.approx(wanted, rel=0.15) for part in parts)
    assert {name: max(peak[name] for peak in peaks) for name in peaks[0]} == pytest.approx(stages(job), rel=0.15)


@pytest.mark.parametrize("change", [dict(recompute=True), dict(top_k=50), dict(prompt=70, new=8)], ids=str)
@pytest.mark.parametrize("kind,itemsize", [*((kind, 4) for kind in CONFIGS), ("nanochat", 2)])
def test_what_an_update_takes(kind, itemsize, change):
    job = Job(CONFIGS[kind], itemsize, **{**SMALL, "new": 20, "examples": 4, **change})
    assert updated(job, cpu_learner(model_of(job)).model) == pytest.approx(sum(training(job).values()), rel=0.15)


@pytest.mark.parametrize("asked,change", [(8, dict(new=66)), (8, dict(prompt=150, new=2)), (2, WIDE), (2, WIDE | dict(top_k=50))])
def test_what_sampling_takes(asked, change):
    """Where the cache grows, where the questions' part of it is moved, and where the logits are most."""
    job = Job(**{**SMALL, "config": LLAMA, "itemsize": 4, **change})
    taken = sampled(job, model_of(job), asked, 1, job.top_k)
    assert taken == pytest.approx(max(sampling(job, asked, 1, job.top_k).values()), rel=0.15)
