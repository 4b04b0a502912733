"""Reinforcement learning for a small chat GPT: from a nanochat checkpoint, a Llama, a Qwen 2.5 or 3 to a better one.

    python chat_rl.py                                       # one GPU, or a CPU; makes a tiny model if you have none
    torchrun --nproc_per_node=8 chat_rl.py --model-tag=d24  # eight GPUs

Each step asks a few questions, samples a group of completions to each, rewards each, and takes one step uphill:

    advantage = reward − mean reward of the completion's group
    loss      = −Σ advantage · π(token) / π_sampled(token) / number of tokens,   over the sampled tokens of the step

Where the ratio is 1, as in the first update after a rollout, that is REINFORCE (Williams 1992) with the group's mean
for a baseline, or what is left of GRPO (Shao et al. 2024) when
 1. every rollout is used once, by the policy that sampled it (--updates-per-rollout changes that, --clip bounds it),
 2. there is no reference model: no KL penalty,
 3. advantages are not divided by the group's standard deviation, which favours questions nearly all right or all wrong,
 4. the loss is normalised by the tokens of the whole step (DAPO, Yu et al. 2025): each counts the same, in any batch.

The policy is the distribution that is sampled from, after temperature and top-k, in the loss as in the sampler. Tokens
that the calculator forced are attended to but not learned. The machine behind this (ranks, model, cache, sampler,
tokenizers, checkpoints, optimizers) is gpt.py.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import operator
import os
import re
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from decimal import Decimal
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Callable, Iterator

import filelock
import numpy
import tiktoken
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import gpt
from gpt import GPT, Completion, Policy, Ranks, Sampler, Tokenizer, UserError

# ----------------------------------------------------------------------------------------------------------------------
# Flags


def flag(default: Any, help: str, low: float = 0, choices: tuple | None = None, resumable: bool = False) -> Any:
    """A field of Flags: its default, its one line of help, the least value it may have or the values to choose from.
    One that is resumable may change when a run goes on: it does not bear on what is computed, or its content is
    checked instead."""
    metadata = dict(help=help, low=low, choices=choices, resumable=resumable)
    return field(default=default, metadata=metadata)


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


@dataclass
class Flags:
    run: str = flag("dummy", "name of the Weights & Biases run (dummy: do not use W&B)", resumable=True)
    tensorboard: bool = flag(False, "write the metrics for TensorBoard too", resumable=True)
    device_type: str = flag("", "cuda, mps or cpu (default: the first of these that is there)",
                            choices=("cuda", "mps", "cpu"), resumable=True)
    dtype: str = flag("", "of the arithmetic (default: bfloat16 where the GPU has it, else float32)",
                      choices=("bfloat16", "float32"))
    model_tag: str | None = flag(None, "nanochat tag such as d20, folder (nanochat's or Hugging Face's) or hub name "
                                 "(default: the largest d<N>)", resumable=True)
    model_step: int | None = flag(None, "step of nanochat's or a run's checkpoint (default: the last)", resumable=True)
    chat_template: str | None = flag(None, "file with a chat template to use instead of the model's (Hugging Face)")
    chat_template_kwargs: str = flag("", "variables of the chat template, as a JSON object (Hugging Face)")
    lora_rank: int = flag(0, "train adapters of this rank on the matrices of the blocks (0: train all weights)")
    task: str | None = flag(None, "a row of TASKS (default: arithmetic with the starter, gsm8k-boxed with Hugging "
                            "Face's models, else gsm8k)")
    data: str | None = flag(None, "training questions: a hub name, a JSONL file, or a folder with train and test files "
                            "(default: the task's)", resumable=True)
    eval_data: str | None = flag(None, "test questions from elsewhere: a place, or several as name=place,name=place "
                                 "(default: the task's, or the test split)", resumable=True)
    prompt_key: str | None = flag(None, "column with the question: text or a list of messages (default: the task's)")
    answer_key: str | None = flag(None, "column with the reference: text, number, list of texts (default: the task's)")
    system: str | None = flag(None, "system text before each question (default: the task's)")
    suffix: str | None = flag(None, "text after each question (default: the task's)")
    prefill: str | None = flag(None, "beginning of each reply (default: the task's)")
    few_shot: str | None = flag(None, "JSON file: a list of messages to put before each question", resumable=True)
    raw_prompt: bool = flag(False, "questions hold the model's own markers: no chat template around them")
    grader: str | None = flag(None, "number, boxed-number, boxed-math, tagged-number or exact (default: the task's)")
    num_epochs: int = flag(1, "passes over the training questions", low=1)
    max_steps: int | None = flag(None, "length of the run (default: that of the epochs; 0 evaluates and exits)")
    examples_per_step: int = flag(16, "questions per step, over all ranks", low=1)
    num_samples: int = flag(16, "completions sampled per question", low=2)
    max_new_tokens: int = flag(256, "length limit of a completion, in tokens", low=1)
    temperature: float = flag(1.0, "of sampling in training (above 0)", low=1e-6)
    top_k: int = flag(50, "sample from the k likeliest tokens, in training and evaluation (0: from all)")
    rollout_batch_size: int = flag(256, "rows sampled at once, rounded up to whole groups (0: no bound)",
                                   resumable=True)
    device_batch_size: int = flag(8, "rows in one forward and backward: less takes less memory", low=1, resumable=True)
    recompute: bool = flag(False, "compute blocks again in the backward: slower, in less memory", resumable=True)
    updates_per_rollout: int = flag(1, "optimizer steps that a rollout is dealt out to", low=1)
    clip: str = flag("", "PPO's clip of the ratio, such as 0.2, or 0.2,0.28 for low and high (default: none)")
    max_ratio: float | None = flag(None, "leave out updates with a token's ratio, or its inverse, above this (default: "
                                   "none)", low=1.001)
    matrix_optimizer: str = flag("muon", "of the matrices of the blocks", choices=("muon", "adamw"))
    embedding_lr: float = flag(0.2, "learning rate of the embeddings (Adam)")
    unembedding_lr: float = flag(0.004, "learning rate of the unembedding (Adam)")
    matrix_lr: float = flag(0.02, "learning rate of the matrices")
    weight_decay: float = flag(0.0, "of the embedding and the unembedding (Adam)")
    init_lr_frac: float = flag(0.05, "all rates start at this fraction")
    lr_schedule: str = flag("linear", "of all rates: linear (to zero) or constant", choices=("linear", "constant"))
    eval_every: int = flag(60, "steps between evaluations", low=1, resumable=True)
    eval_examples: int = flag(400, "test questions in an evaluation (0: all)")
    eval_samples: int = flag(8, "completions per test question: pass@k for k = 1 … that", low=1)
    save_every: int = flag(60, "steps between checkpoints", low=1, resumable=True)
    keep_last: int = flag(2, "checkpoints that keep optimizer state, to resume from", low=1, resumable=True)
    resume: bool = flag(False, "go on from the last sound checkpoint of this tag's run, if any", resumable=True)
    seed: int = flag(42, "of the order of questions and of sampling")


# ----------------------------------------------------------------------------------------------------------------------
# The algorithm


@dataclass
class Example:
    """A question to ask."""

    index: int                              # its place in the data, which names its random numbers
    prompt: list[dict] | str                # messages; or text that holds the model's own markers
    references: list[str]                   # what the data say: any of them may be matched
    task: Task

    def __str__(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


@dataclass
class Group:
    """A question, the completions that were sampled for it, and what they were worth."""

    example: Example
    prompt: list[int]
    completions: list[Completion]
    scores: list[float] = field(default_factory=list)  # what the grader gave, 0 to 1
    rewards: list[float] = field(default_factory=list)  # what is learned from
    advantages: list[float] = field(default_factory=list)
    timeouts: int = 0                       # gradings that took too long

    def lessons(self) -> list[tuple[Completion, float]]:
        """The completions that there is something to learn from, and their advantages."""
        return [(c, advantage) for c, advantage in zip(self.completions, self.advantages) if advantage]


def reward_of(score: float) -> float:
    """What a completion's score is worth."""
    return score


def advantages_of(rewards: list[float]) -> list[float]:
    """Reward − mean of the group: exactly zero where all rewards agree."""
    mean = statistics.mean(rewards)
    return [reward - mean for reward in rewards]


def loss_of(
    logprobs: Tensor, sampled_logprobs: Tensor, advantages: Tensor, low: float = 0.0, high: float = math.inf
) -> Tensor:
    """The loss of each sampled token (M,), given its logprob under the policy now, that under the policy that
    sampled it, and the advantage of its completion. At ratio 1 its gradient is REINFORCE's. The clip of the ratio to
    low … high is PPO's (Schulman et al. 2017). The division by the number of tokens comes later."""
    ratio = (logprobs - sampled_logprobs).exp()
    return -torch.minimum(advantages * ratio, advantages * ratio.clamp(low, high))


@dataclass
class Run:
    """What a run is, the same on every rank; no tensors."""

    flags: Flags
    questions: list[Example]                # to learn from
    tests: dict[str, list[Example]]         # by the name that their metrics bear
    tokenizer: Any
    meta: dict                              # of every checkpoint: model config, flags, source, W&B id
    out: Path
    num_steps: int
    step: int                               # steps done

    @property
    def lrm(self) -> float:
        """The fraction of the learning rates, by the schedule."""
        return 1.0 if self.flags.lr_schedule == "constant" else 1 - self.step / self.num_steps


@dataclass
class Learner:
    """What learns, on every rank."""

    model: GPT
    sampler: Sampler
    weights: Tensor                         # all that learn, as one vector: the model's parameters are views of it
    gradient: Tensor                        # likewise
    optimizers: list[torch.optim.Optimizer]  # on rank 0
    ranks: Ranks                            # that learn together

    def policy(self, temperature: float, top_k: int) -> Policy:
        return Policy(temperature, top_k, self.model.config.softcap)


TRAINING, EVALUATION, DEALING = 0, 1, 2     # what random numbers are for is part of their seed


def shuffled(n: int, *counters: int) -> list[int]:
    generator = torch.Generator().manual_seed(int(gpt.fold(*counters)))
    return torch.randperm(n, generator=generator).tolist()


def questions_of_step(run: Run, step: int) -> list[Example]:
    """The training questions of a step: each epoch goes through them in an order of its own."""
    size = run.flags.examples_per_step
    epoch, number = divmod(step, len(run.questions) // size)
    order = shuffled(len(run.questions), run.flags.seed, epoch)
    start = number * size
    return [run.questions[i] for i in order[start : start + size]]


def prompt_of(example: Example, tokenizer: Any) -> list[int]:
    """The tokens that ask the question, up to where the model goes on."""
    if isinstance(example.prompt, str):
        return tokenizer.encode_raw(example.prompt + example.task.prefill)
    return tokenizer.render(example.prompt) + tokenizer.encode(example.task.prefill)


def batched(items: list, size: int) -> Iterator[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


def rollout(
    run: Run,
    learner: Learner,
    examples: list[Example],
    num_samples: int,
    policy: Policy,
    seed: int,
    title: str,
) -> list[Group]:
    """Samples `num_samples` completions of each example, about `rollout_batch_size` rows at once. Raises Interrupted
    where a signal cuts it short."""
    groups = []
    rows = run.flags.rollout_batch_size or sys.maxsize
    with progress_bar(len(examples) * num_samples, title) as bar:

        def progress(ended: int) -> None:
            learner.ranks.heed()
            bar.update(ended)

        for part in batched(examples, math.ceil(rows / num_samples)):
            learner.ranks.heed()
            prompts = [prompt_of(example, run.tokenizer) for example in part]
            completions = learner.sampler.generate(
                prompts,
                num_samples,
                run.flags.max_new_tokens,
                policy,
                seed,
                keys=[example.index for example in part],
                progress=progress,
            )
            groups += map(Group, part, prompts, completions)
    return groups


def text_of(completion: Completion, tokenizer: Any) -> str:
    """What the model said, without the token that ended its turn."""
    tokens = completion.tokens
    return tokenizer.decode(tokens[:-1] if tokens[-1] in tokenizer.stops else tokens)


def grade(run: Run, learner: Learner, group: Group) -> None:
    """Scores and rewards every completion, and compares it with its group. Raises Interrupted where a signal cuts it
    short."""
    task, tokenizer = group.example.task, run.tokenizer
    asked = tokenizer.decode(group.prompt).removesuffix(task.prefill)
    opened = "<think>" * asked.rstrip().endswith("<think>") + task.prefill
    before = same_math.timeouts
    for completion in group.completions:
        learner.ranks.heed()
        text = opened + text_of(completion, tokenizer)
        group.scores.append(max(task.grader(reference, text) for reference in group.example.references))
    group.timeouts = same_math.timeouts - before
    group.rewards = [reward_of(score) for score in group.scores]
    group.advantages = advantages_of(group.rewards)


def ask(run: Run, learner: Learner, examples: list[Example], **sampling: Any) -> list[Group]:
    """Samples and grades, each rank its share of the examples; `sampling` is what `rollout` takes besides. Returns
    the groups of all ranks, in the examples' order; [] where a signal cut it short."""
    ranks, groups = learner.ranks, []
    mine = examples[ranks.rank :: ranks.size]
    try:
        groups = rollout(run, learner, mine, **sampling)
        for group in groups:
            grade(run, learner, group)
    except gpt.Interrupted:
        pass
    return [] if ranks.stopping() else ranks.gather(groups)


def num_sampled(completions: list[Completion]) -> int:
    """The number of tokens that the policy drew, as opposed to forced ones."""
    return sum(sum(completion.mask) for completion in completions)


def summarize(groups: list[Group], stops: tuple[int, ...]) -> dict[str, float]:
    """Means over the completions, the questions or the sampled tokens of a rollout."""
    completions = [completion for group in groups for completion in group.completions]
    learned = [completion for group in groups for completion, _ in group.lessons()]
    num_tokens = num_sampled(completions)
    mean = statistics.fmean
    return {
        "reward": mean(reward for group in groups for reward in group.rewards),
        "all_right": mean(min(group.scores) >= 1 for group in groups),
        "all_wrong": mean(max(group.scores) < 1 for group in groups),
        "completion_length": mean(len(c.tokens) for c in completions),
        "truncated": mean(c.tokens[-1] not in stops for c in completions),
        "entropy": sum(c.entropy for c in completions) / num_tokens,
        "advantage_tokens": num_sampled(learned) / num_tokens,
        "grader_timeouts": sum(group.timeouts for group in groups),
    }


def backward(model: GPT, groups: list[Group], policy: Policy, size: int, loss: Callable = loss_of) -> Tensor:
    """Adds the gradient of the loss, summed over the sampled tokens, to that of the model, `size` rows at once.
    Completions without advantage, so whole groups whose rewards agree, are not run. Returns log π / π_sampled (M,)
    of the tokens that were learned from, π being the policy now.

    A question runs forward once and backward once, whatever the batch: its completions read copies of what it left
    in the cache, and the gradients that they leave there are sent back through it in the end.
    """
    log_ratios = [torch.zeros(0, device=model.device)]
    for part in batched([group for group in groups if group.lessons()], size):
        prefix = gpt.prefix_of(model, [group.prompt for group in part])
        leaves = prefix.leaves()
        rows = [(i, *lesson) for i, group in enumerate(part) for lesson in group.lessons()]
        rows.sort(key=lambda row: len(row[1].tokens))
        for batch in batched(rows, size):
            questions, completions, advantages = zip(*batch)
            prefixes = leaves.rows(torch.tensor(questions, device=model.device))
            logprobs, owners = gpt.completion_logprobs(model, prefixes, completions, policy)
            sampled_logprobs = [x for c in completions for x in itertools.compress(c.logprobs, c.mask)]
            sampled_logprobs = torch.tensor(sampled_logprobs, device=model.device)
            advantages = torch.tensor(advantages, device=model.device)
            loss(logprobs, sampled_logprobs, advantages[owners]).sum().backward()
            log_ratios.append(logprobs.detach() - sampled_logprobs)
        prefix.backward(leaves)
    return torch.cat(log_ratios)


def deal(run: Run, groups: list[Group]) -> list[tuple[list[Group], float]]:
    """The step's groups that have an advantage, dealt into parts by (seed, step) alone, and the number of sampled
    tokens that each part is normalised by. Those of the groups left out are shared among the parts, so that a single
    one is normalised by all tokens of the step."""
    K = run.flags.updates_per_rollout
    order = shuffled(len(groups), run.flags.seed, DEALING, run.step)
    learned = [i for i in order if groups[i].lessons()]
    sizes = [num_sampled(group.completions) for group in groups]
    rest = (sum(sizes) - sum(sizes[i] for i in learned)) / K
    parts = [sorted(learned[k::K]) for k in range(K)]
    return [([groups[i] for i in part], sum(sizes[i] for i in part) + rest) for part in parts if part]


def update(run: Run, learner: Learner, num_tokens: float) -> float:
    """Adds up the ranks' gradients, divides by the number of tokens, and steps: rank 0 alone, whose weights all
    take over. Returns the norm of the gradient; where it is not finite no step is made."""
    ranks = learner.ranks
    ranks.reduce(learner.gradient)
    norm = ranks.share(learner.gradient.div_(num_tokens).norm().item())
    if math.isfinite(norm):
        gpt.step_optimizers(learner.optimizers, run.flags.init_lr_frac * run.lrm)
        ranks.broadcast(learner.weights)
        learner.sampler.refresh()
    return norm


def bounds_of(flags: Flags) -> tuple[float, float]:
    """What the ratio is clipped to."""
    clip = [float(x) for x in (flags.clip or "1,inf").split(",")]
    return 1 - clip[0], 1 + clip[-1]


def learn(run: Run, learner: Learner, groups: list[Group], policy: Policy) -> dict:
    """The updates of a step, each rank's share of every part. Returns what they did: metrics."""
    flags, ranks = run.flags, learner.ranks
    low, high = bounds_of(flags)
    loss = partial(loss_of, low=low, high=high)
    before = learner.weights.clone()
    norms = []                              # of the gradient, in each part that was learned from
    drifts = []                             # log π / π_sampled of each part's tokens, those of all ranks
    parts = deal(run, groups)
    for part, num_tokens in parts:
        learner.gradient.zero_()
        mine = part[ranks.rank :: ranks.size]
        log_ratios = backward(learner.model, mine, policy, flags.device_batch_size, loss)
        drifts.append(torch.cat([torch.tensor(x).double() for x in ranks.everyone(log_ratios.tolist())]))
        if not flags.max_ratio or drifts[-1].abs().max() <= math.log(flags.max_ratio):
            norms.append(update(run, learner, num_tokens))
    drift = torch.cat(drifts or [torch.zeros(1)])
    ratio = drift.exp()
    clipped = (ratio < low) | (ratio > high)
    change = learner.weights - before
    return {
        "grad_norm": statistics.fmean(norms or [0.0]),
        "update_norm": (change.norm() / before.norm()).item(),
        "parts_left_out": len(parts) - len(norms),
        "sampler_gap": drifts[0].abs().mean().item() if drifts else 0.0,  # before any update
        "ratio_max": drift.abs().max().clamp(max=700).exp().item(),
        "approx_kl": (ratio - 1 - drift).mean().item(),  # the k3 estimate (Schulman 2020)
        "clip_fraction": clipped.double().mean().item(),
    }


def step(run: Run, learner: Learner) -> dict | None:
    """One step: sample, grade, learn. Returns its metrics, or None where a signal has cut the rollout short."""
    flags, start = run.flags, time.monotonic()
    questions = questions_of_step(run, run.step)
    policy = learner.policy(flags.temperature, flags.top_k)
    seed = int(gpt.fold(flags.seed, TRAINING, run.step))
    groups = ask(
        run, learner, questions, num_samples=flags.num_samples, policy=policy, seed=seed, title=f"step {run.step}"
    )
    if not groups:
        return None
    rolled_out = time.monotonic()
    rollout_seconds = max(learner.ranks.everyone(rolled_out - start))  # of the rank that began first
    metrics = summarize(groups, run.tokenizer.stops) | learn(run, learner, groups, policy)
    return metrics | {
        "lrm": run.lrm,
        "rollout_seconds": rollout_seconds,
        "update_seconds": time.monotonic() - rolled_out,
        "tokens_per_second": metrics["completion_length"] * len(questions) * flags.num_samples / rollout_seconds,
    }


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n of them: 1 − C(n−c, k) / C(n, k) (Chen et
    al. 2021)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def solved(groups: list[Group], k: int) -> tuple[float, float]:
    """The mean pass@k of the groups' questions, and its standard error (0 for a single one)."""
    right = [sum(score >= 1 for score in group.scores) for group in groups]
    values = [pass_at_k(len(groups[0].scores), c, k) for c in right]
    return statistics.fmean(values), statistics.pstdev(values) / math.sqrt(len(values) - 1 or 1)


def evaluate(run: Run, learner: Learner) -> tuple[dict[str, float], dict[str, list[Group]]]:
    """pass@k for k = 1 … eval_samples at temperature 1 and the greedy accuracy on the first eval_examples questions of
    each test, with the same random numbers every time. Returns metrics, and each test's groups; nothing where a
    signal cut it short."""
    flags, seed = run.flags, int(gpt.fold(run.flags.seed, EVALUATION))
    policy = learner.policy(1.0, flags.top_k)
    likeliest = learner.policy(1.0, 1)
    metrics, answered = {}, {}
    for name, examples in run.tests.items():
        examples = examples[: flags.eval_examples or None]
        groups = ask(
            run, learner, examples, num_samples=flags.eval_samples, policy=policy, seed=seed, title="evaluation"
        )
        greedy = groups and ask(
            run, learner, examples, num_samples=1, policy=likeliest, seed=seed, title="evaluation, greedy"
        )
        if not greedy:
            return {}, {}
        answered[name] = groups
        label = f"{name}/" if name else ""
        metrics[f"{label}grader_timeouts"] = sum(group.timeouts for group in groups + greedy)
        for k in range(1, flags.eval_samples + 1):
            metrics[f"{label}pass@{k}"], metrics[f"{label}pass@{k}_error"] = solved(groups, k)
        metrics[f"{label}greedy"], metrics[f"{label}greedy_error"] = solved(greedy, 1)
    return metrics, answered


# ----------------------------------------------------------------------------------------------------------------------
# Graders: does a completion say what the reference says?


def before_open_thought(text: str) -> str:
    """A text up to a <think> that never ends: what stands in it is no answer."""
    *closed, tail = text.split("</think>")
    return "</think>".join([*closed, tail.partition("<think>")[0]])


def after_marks(text: str) -> str:
    """What follows the last ####, GSM8K's way to end; "" where there is none."""
    _, mark, tail = before_open_thought(text).rpartition("####")
    return tail if mark else ""


def last_box(text: str) -> str:
    r"""What stands in the last \boxed{} whose braces are balanced, on one line; "" where there is none."""
    opened, begin, last = [], -1, ""
    text = before_open_thought(text)
    for mark in re.finditer(r"(\\boxed\s*)?\{|\}|\\.", text, re.DOTALL):
        if mark[0].endswith("{") and mark[0] != r"\{":
            opened.append(mark)
        elif mark[0] == "}" and opened:
            start = opened.pop()
            if start[1] and start.end() > begin:  # of boxes in a box, the innermost
                begin = start.end()
                last = text[begin : mark.start()]
    return " ".join(last.split()).rstrip(".")


def last_answer(text: str) -> str:
    """What stands in the last closed <answer>; "" where there is none, or an <answer> stands in a <think>. The
    prompt has opened a <think> where </think> comes first."""
    opened = "</think>" in text.partition("<think>")[0]
    thoughts = re.findall(r"<think>(.*?)(?:</think>|\Z)", "<think>" * opened + text, re.DOTALL)
    answers = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", text, re.DOTALL)
    return answers[-1] if answers and not any("<answer>" in thought for thought in thoughts) else ""


def unwrapped(reference: str) -> str:
    """A reference without the working that leads to it: what follows its last ####, and there what stands in its
    last box, if it has these."""
    tail = reference.rpartition("####")[2]
    return last_box(tail) if r"\boxed" in tail else " ".join(tail.split())


NUMBER = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))(?!\.*\d)", re.ASCII)


def leading_number(text: str) -> Decimal | None:
    """The number that a text begins with: '$1,000.' and '1000.0 apples' give 1000; None where it begins otherwise."""
    found = NUMBER.match(text.replace(",", "").replace("$", ""))
    return Decimal(found[1]) if found else None


def only_number(text: str) -> Decimal | None:
    r"""The number that a text begins with where no other follows: of '1{,}000', '\$1000' and '1000\%', but not of
    '3/4'."""
    plain = re.sub(r"\\[,!$]|[{},$]", "", text)
    found = NUMBER.match(plain)
    if not found or re.search(r"\d", plain[found.end() :]):
        return None
    return Decimal(found[1])


POWER = re.compile(r"([)}\]]?)\s*\^\s*(\{(?:[^{}^]|\{[^{}^]*\})*\}|[^{}^])(?!\s*\^)")
SLOW = re.compile(r"\||\\(?:l[ng]|log|exp|arc|sin|cos|tan|cot|sec|csc)")
ENDLESS = re.compile(
    r"\\(?:sum|prod|i+nt|oint|lim)|(?:\^|\\exp).*\\exp|!\s*!|[)}\]]\s*!"
    r"|^(?=.*(?:\^|\d{4})).*(?:(?<!\\)!|binom|choose)"
)


def small(latex: str) -> str | None:
    """An expression that can be compared in a second or so, by its size, depth and powers, or else None."""
    if not 0 < len(latex) <= 200:
        return None
    turns = ((c in "([{") - (c in ")]}") for c in latex)
    depth = max(itertools.accumulate(turns))
    powers = POWER.findall(latex)
    raised = " ".join(exponent for bracket, exponent in powers if bracket)  # to which a bracket is raised
    heights = [int(n) or 1 for n in re.findall(r"\d+", raised)]
    fine = (
        depth <= 5
        and len(SLOW.findall(latex)) <= 4
        and not ENDLESS.search(latex)
        and len(powers) == latex.count("^")
        and all(len(re.findall(r"\d", exponent)) <= 4 for _, exponent in powers)
        and math.prod(heights) <= 20
    )
    return latex if fine else None


def serve() -> None:
    """The work of a process of its own: reads [reference, answer] in JSON, line by line, and writes 1 where they
    are equal. It ends with its input, and dies where a line takes more than 5 seconds of its CPU time."""
    import json, logging, signal, sys
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable()
    replies, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, 5)
        reference, answer = (
            parse(rf"\boxed{{{latex}}}", [LatexExtractionConfig(boxed_match_priority=0)], parsing_timeout=None)
            for latex in json.loads(line)
        )
        equal = verify(reference, answer, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(equal), file=replies, flush=True)


SERVER = inspect.getsource(serve) + "serve()"


@lru_cache
def math_server() -> subprocess.Popen:
    """The process that serves, out of reach of the signals that the run gets. Raises UserError where math-verify is
    missing."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        text=True,
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    if not server.stdout.readline():
        raise UserError("this grader needs math-verify: pip install math-verify")
    return server


@lru_cache(10_000)
def same_math(reference: str, answer: str) -> bool:
    """Whether two small expressions are mathematically equal (github.com/huggingface/Math-Verify). Those that take
    too long are not, and counted in same_math.timeouts."""
    if reference == answer or (reference + answer).isdecimal():
        return reference.lstrip("0") == answer.lstrip("0")
    if math_server().poll() is not None:    # it has died
        math_server.cache_clear()
    server = math_server()
    print(json.dumps([reference, answer]), file=server.stdin, flush=True)
    reply = server.stdout.readline()
    if not reply:
        same_math.timeouts += 1
        server.wait()
    return reply == "1\n"


same_math.timeouts = 0


@dataclass(frozen=True)
class Grader:
    """Where the reference and a completion say what counts, how it is read there, and when the two are equal."""

    in_reference: Callable[[str], str]
    in_text: Callable[[str], str]
    read: Callable[[str], Any] = str        # None where it cannot be read
    equal: Callable[[Any, Any], bool] = operator.eq

    def reads(self, reference: str) -> bool:
        return self.read(self.in_reference(reference)) is not None

    def __call__(self, reference: str, text: str) -> float:
        """Whether they are equal, 1.0 or 0.0, whatever a model wrote."""
        right = self.read(self.in_reference(reference))
        said = self.read(self.in_text(text))
        return float(None not in (right, said) and self.equal(right, said))


GRADERS = {
    "exact": Grader(str, str),
    "number": Grader(unwrapped, after_marks, leading_number),
    "boxed-number": Grader(unwrapped, last_box, only_number),
    "boxed-math": Grader(unwrapped, last_box, small, same_math),
    "tagged-number": Grader(unwrapped, last_answer, only_number),
}


# ----------------------------------------------------------------------------------------------------------------------
# Tasks: where questions come from, and what is put around them


@dataclass(frozen=True)
class Task:
    """A kind of question. A flag named like a field overrides it."""

    data: str | Callable                    # training and test questions: a place, or what makes their records
    grader: Grader
    prompt_key: str = "question"
    answer_key: str = "answer"
    eval_data: str = ""                     # test questions from elsewhere
    system: str = ""
    suffix: str = ""
    prefill: str = ""                       # the beginning of each reply
    few_shot: tuple[dict, ...] = ()         # messages before each question
    raw_prompt: bool = False                # questions hold the model's own markers


def make_sums() -> dict[str, list[dict]]:
    """Sums of two numbers below 100. The test pairs are held out in both orders."""
    pairs = list(itertools.combinations_with_replacement(range(100), 2))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    rest = {pairs[i] for i in order[400:]}
    splits = {
        "train": [(a, b) for a in range(100) for b in range(100) if (min(a, b), max(a, b)) in rest],
        "test": [pairs[i] for i in order[:400]],
    }
    return {
        name: [{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in split]
        for name, split in splits.items()
    }


SUBJECTS = (
    "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"
).split()


def fetch_math() -> dict[str, list[dict]]:
    """MATH (Hendrycks et al. 2021): all 12,500 problems but the 500 that MATH-500 tests."""
    test = load_records("HuggingFaceH4/MATH-500")["test"]
    held_out = {record["problem"] for record in test}
    train = []
    for subject in SUBJECTS:
        splits = load_records("EleutherAI/hendrycks_math", subject)
        train += [record for record in splits["train"] + splits["test"] if record["problem"] not in held_out]
    return {"train": train, "test": test}


BOX_NUMBER = r" Provide a numerical answer without units, written inside \boxed{}."
BOX_MATH = r" Write your answer in \boxed{} format."
THINK = (
    "Work the question out between <think> and </think>, then give the final answer, a number and nothing else, "
    "between <answer> and </answer>. Only what stands between the answer tags is scored."
)
TASKS = {
    "arithmetic": Task(make_sums, GRADERS["exact"]),
    "gsm8k": Task("openai/gsm8k", GRADERS["number"]),  # grade-school maths in words (Cobbe et al. 2021)
    "gsm8k-boxed": Task("openai/gsm8k", GRADERS["boxed-number"], suffix=BOX_NUMBER),
    "math": Task(fetch_math, GRADERS["boxed-math"], "problem", "solution", suffix=BOX_MATH),
    "aime": Task(
        "", GRADERS["boxed-math"], "problem", "answer", eval_data="HuggingFaceH4/aime_2024", suffix=BOX_MATH
    ),
    "think": Task("openai/gsm8k", GRADERS["tagged-number"], system=THINK),
    "jsonl": Task("", GRADERS["boxed-math"], "prompt", "answer"),
}


def load_records(place: str, config: str | None = None) -> dict[str, list[dict]]:
    """The records of each split of a dataset on the hub, in a local folder or in a file, the test's in shuffle(seed=42)
    order as nanochat takes them; `row` is a record's place. Raises UserError where it cannot be had."""
    import datasets

    mend = "pass --data a local folder that holds its train and test files, such as train.jsonl and test.jsonl"
    with gpt.blaming(f"cannot load {place}", mend):
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        if Path(place).is_file():
            splits = datasets.load_dataset("json", data_files=place)
        else:
            splits = datasets.load_dataset(place, "main" if place == "openai/gsm8k" else config)
        records = {
            name: [{**record, "row": i} for i, record in enumerate(split)]
            for name, split in splits.items()
        }
    if "test" in records:
        order = numpy.random.default_rng(42).permutation(len(records["test"]))  # what Dataset.shuffle(seed=42) does
        records["test"] = [records["test"][i] for i in order]
    return records


def load_examples(task: Task, records: list[dict], where: str) -> list[Example]:
    """Examples of a dataset's records; those whose reference the grader cannot read are left out, and that is said.
    Raises UserError where one lacks a column or holds what is no question, or none is left."""
    examples, unread = [], []
    for i, record in enumerate(records):
        place = f"row {record.get('row', i)} of {where}"
        for key in (task.prompt_key, task.answer_key):
            if record.get(key) in (None, "", []):
                there = [name for name, value in record.items() if name != "row" and value is not None]
                raise UserError(
                    f"{place} has no {key!r} (it has {', '.join(there)}): name the columns by --prompt-key and "
                    "--answer-key, or mend the row"
                )
        prompt = record[task.prompt_key]
        answer = record[task.answer_key]
        answers = answer if isinstance(answer, list) else [answer]
        references = [str(answer) for answer in answers if answer not in (None, "")]
        if references := [reference for reference in references if task.grader.reads(reference)]:
            examples.append(Example(i, prompt_in(task, prompt, place), references, task))
        else:
            unread.append(place)
    if unread:
        say(
            f"{len(unread)} of {len(records)} references in {where} cannot be read by the grader and are left out, the "
            f"first in {unread[0]}"
        )
    if not examples:
        what = "questions with references that the grader can read" if records else "questions"
        raise UserError(f"{where} has no {what}: pass --data (or --eval-data) another place, or another --grader")
    return examples


def prompt_in(task: Task, value: Any, place: str) -> list[dict] | str:
    """The prompt of a column's value: a question, a list of messages, or text with the model's own markers."""
    if not isinstance(value, str):
        return checked_messages(value, place, "user")
    if task.raw_prompt:
        return value
    messages = [*task.few_shot, {"role": "user", "content": value + task.suffix}]
    own = not task.system or messages[0]["role"] == "system"
    return messages if own else [{"role": "system", "content": task.system}, *messages]


def checked_messages(value: Any, place: str, last: str) -> list[dict]:
    """A chat that ends with a message of that role. Raises UserError where it is none."""
    try:
        messages = [{"role": m["role"], "content": m["content"]} for m in value]
        roles = " ".join(m["role"] for m in messages)
    except (TypeError, KeyError):
        messages, roles = [], ""
    texts = all(isinstance(m["content"], str) for m in messages)
    if not texts or not re.fullmatch(rf"(system )?((user|assistant) )*{last}", roles):
        raise UserError(
            f"{place} is no list of messages with a role (system for the first alone, user, assistant) and a content "
            f"that ends with the {last}'s: mend it"
        )
    return messages


def task_of(name: str, flags: Flags) -> Task:
    """A row of TASKS, as the flags override it. Raises UserError."""
    if name not in TASKS:
        raise UserError(f"--task {name} is unknown: choose {', '.join(TASKS)}")
    if flags.grader not in (None, *GRADERS):
        raise UserError(f"--grader {flags.grader} is unknown: choose {', '.join(GRADERS)}")
    given = {f.name: getattr(flags, f.name) for f in fields(Task)}
    overrides = {name: value for name, value in given.items() if value not in (None, False)}
    if flags.grader:
        overrides["grader"] = GRADERS[flags.grader]
    if flags.few_shot:
        place = f"--few-shot {flags.few_shot}"
        with gpt.blaming(f"{place} cannot be read", "give a JSON file"):
            value = json.loads(Path(flags.few_shot).read_text(encoding="utf-8"))
        overrides["few_shot"] = tuple(checked_messages(value, place, "assistant"))
    return replace(TASKS[name], **overrides)


def load_task(flags: Flags) -> tuple[list[Example], dict[str, list[Example]]]:
    """The training questions, and the test questions by the name of their metrics. Raises UserError."""
    task = task_of(flags.task, flags)
    training = flags.max_steps != 0
    made = callable(task.data)
    where = flags.task if made else task.data or f"{flags.task} without --data"
    splits, questions, tests = {}, [], {}
    if task.data and (training or not task.eval_data):
        splits = task.data() if made else load_records(task.data)
    if training:
        questions = load_examples(task, splits.get("train", []), f"train of {where}")
    if not task.eval_data:
        return questions, {"": load_examples(task, splits.get("test", []), f"test of {where}")}
    entries = task.eval_data.split(",")
    places = dict(entry.rpartition("=")[::2] for entry in entries)
    if len(places) < len(entries) or not all(places.values()):
        raise UserError(f"--eval-data {task.eval_data}: give each place a name of its own, as name=place,name=place")
    for name, place in places.items():
        splits = load_records(place)
        if "test" not in splits and len(splits) > 1:
            raise UserError(f"--eval-data {place} has no test questions: name a file")
        records = splits["test"] if "test" in splits else next(iter(splits.values()))
        tests[name] = load_examples(TASKS.get(name, task), records, f"test of {place}")
    return questions, tests


# ----------------------------------------------------------------------------------------------------------------------
# What a person sees


def main_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Prints on rank 0. A terminal that is gone, or a full disk behind it, is not worth the run."""
    if not main_rank():
        return
    try:
        print(text, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


def make_output_safe() -> None:
    """What a terminal cannot show is shown otherwise; where there is none, nothing is."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def progress_bar(total: int, title: str) -> tqdm:
    """A bar of completions on rank 0's terminal, for work that takes more than a second or two."""
    silent = None if main_rank() else True  # None: where there is no terminal
    return tqdm(total=total, desc=title, unit="completion", leave=False, delay=1.5, disable=silent)


def json_line(content: dict) -> bytes:
    """A line of JSON, with null for what is infinite or not a number."""
    finite = json.loads(json.dumps(content), parse_constant=lambda name: None)
    return json.dumps(finite).encode() + b"\n"


def read_lines(path: Path) -> list[dict]:
    """The lines of metrics.jsonl; damaged ones are passed over, and that is said."""
    lines, damaged = [], 0
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            lines.append({**line, "step": int(line["step"])})
        except (ValueError, TypeError, KeyError, OverflowError):
            damaged += 1
    if damaged:
        say(f"passing over damaged lines in {path}: {damaged}")
    return lines


# The pictures in curve.png, and the metrics that each shows.
PANELS = {
    "reward (mean of the step)": ["reward"],
    "test questions solved (± standard error)": [],
    "completion length (tokens)": ["completion_length"],
    "share of completions truncated": ["truncated"],
    "entropy (nats per sampled token)": ["entropy"],
    "gradient norm": ["grad_norm"],
    "approx_kl": ["approx_kl"],
    "seconds per step": ["rollout_seconds", "update_seconds"],
}


class Log:
    """metrics.jsonl, samples_<step>.jsonl and curve.png in the run's folder; TensorBoard and W&B under the same
    names."""

    def __init__(self, run: Run):
        """Takes up the log at the run's step: what an interrupted run wrote after it is cut off."""
        self.out, self.path = run.out, run.out / "metrics.jsonl"
        self.wandb = self.tensorboard = None
        lines = read_lines(self.path)
        self.lines = [line for line in lines if line["step"] < run.step]
        gpt.write_file(self.path, b"".join(map(json_line, self.lines)))
        if run.flags.run != "dummy":
            self.tell_wandb(lambda: self.start_wandb(run))
        if run.flags.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(run.out / "tensorboard", purge_step=run.step)

    def start_wandb(self, run: Run) -> None:
        import wandb

        self.wandb = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "chat_rl"),
            name=run.flags.run,
            id=run.meta["wandb_id"],
            resume="allow",
            dir=str(run.out),
            config=asdict(run.flags),
            settings=wandb.Settings(init_timeout=20),
        )
        self.wandb.define_metric("*", step_metric="step")

    def tell_wandb(self, work: Callable) -> None:
        """Does something with W&B. No network, no account, no service: none of them is worth the run."""
        try:
            work()
        except Exception as error:
            self.wandb = None
            say(
                f"warning: no W&B ({gpt.one_line(error)}); the run goes on, its figures are in {self.path}. "
                "Set WANDB_MODE=offline to keep them for `wandb sync`."
            )

    def write(self, metrics: dict) -> None:
        line = json_line(metrics)
        size = self.path.stat().st_size
        try:
            with open(self.path, "ab") as file:
                file.write(line)
        except OSError:                     # a full disk: no half lines
            os.truncate(self.path, size)
            raise
        self.lines.append(json.loads(line))
        if self.wandb:
            self.tell_wandb(lambda: self.wandb.log(self.lines[-1]))
        if self.tensorboard:
            for key, value in metrics.items():
                self.tensorboard.add_scalar(key, value, metrics["step"])

    def write_samples(self, step: int, groups: dict[str, list[Group]], tokenizer: Any) -> None:
        """Every sampled completion of an evaluation, by the name of its data; prints a right and a wrong one to the
        hardest question that has both."""
        records = [
            {
                "data": name,
                "question": str(group.example),
                "reference": " or ".join(group.example.references),
                "completions": [text_of(completion, tokenizer) for completion in group.completions],
                "scores": group.scores,
                "rewards": group.rewards,
            }
            for name, answered in groups.items()
            for group in answered
        ]
        gpt.write_file(self.out / f"samples_{step:06d}.jsonl", b"".join(map(json_line, records)))
        if self.wandb:
            self.tell_wandb(lambda: self.log_table(step, records))

        def ease(record: dict) -> tuple[int, int]:
            right = [score >= 1 for score in record["scores"]]
            return -len({*right}), sum(right)

        record = min(records, key=ease)
        say(f"  question   {shortened(record['question'])}\n  reference  {shortened(record['reference'])}")
        said = {score >= 1: text for score, text in zip(record["scores"], record["completions"])}
        for right in sorted(said, reverse=True):
            say(f"  {'right' if right else 'wrong'}      {shortened(said[right])}")

    def log_table(self, step: int, records: list[dict]) -> None:
        import pandas, wandb

        table = pandas.DataFrame(records).explode(["completions", "scores", "rewards"])
        self.wandb.log({"step": step, "samples": wandb.Table(dataframe=table)})

    def plot(self) -> None:
        """Draws curve.png anew: each metric of the steps with its mean over ten of them, and the evaluations."""
        import pandas
        from matplotlib.figure import Figure

        table = pandas.DataFrame(self.lines, columns=None if self.lines else ["step"]).set_index("step")
        tests = evaluations_in(self.lines)
        figure = Figure(figsize=(16, 7), layout="constrained")
        for axes, (title, keys) in zip(figure.subplots(2, 4).flat, PANELS.items()):
            for key in keys:
                y = table.reindex(columns=[key])[key].dropna()
                smooth = y.rolling(10, min_periods=1).mean()
                [line] = axes.plot(smooth, label=key)
                axes.plot(y, color=line.get_color(), alpha=0.35, linewidth=1)
            for key in evaluation_keys(tests[-1]) if tests and not keys else ():
                y = table[[key, key + "_error"]].dropna()
                style = "--o" if key.endswith("greedy") else "-o"
                axes.errorbar(y.index, y[key], y[key + "_error"], label=key, capsize=3, markersize=3, fmt=style)
            low, high = axes.dataLim.intervaly
            top = 1.05 * max(high, 0.01)    # rounding is no trouble
            axes.set(title=title, xlabel="step", ylim=(min(low, 0), top))
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(fontsize="small")
        save = partial(figure.savefig, dpi=100, format="png")
        gpt.write_file(self.out / "curve.png", save)

    def close(self) -> None:
        """Prints what the run has changed, and where to look."""
        tests = evaluations_in(self.lines)
        rewards = [line["reward"] or 0.0 for line in self.lines if "reward" in line]
        if len(tests) > 1:
            say(f"before  {describe_evaluation(tests[0])}\nafter   {describe_evaluation(tests[-1])}")
        if rewards:
            say(f"reward  {sparkline(rewards)}  {rewards[0]:.3f} → {rewards[-1]:.3f}")
        say(f"curve   {self.out / 'curve.png'}")
        if self.wandb:
            self.tell_wandb(lambda: self.wandb.finish())
        if self.tensorboard:
            self.tensorboard.close()


def shortened(text: str, width: int = 600) -> str:
    text = " ⏎ ".join(text.strip().splitlines())
    return text if len(text) <= width else text[:width] + " …"


def evaluations_in(lines: list[dict]) -> list[dict]:
    return [line for line in lines if any(key.endswith("greedy") for key in line)]


def evaluation_keys(metrics: dict) -> list[str]:
    """pass@k for the powers of two, and the greedy accuracy, of each test; of several only pass@1 and the greedy
    accuracy."""
    several = sum(key.endswith("greedy") for key in metrics) > 1
    powers = "|".join(str(2**i) for i in range(1 if several else 64))
    shown = re.compile(rf"(pass@({powers})|greedy)$")
    return [key for key in metrics if shown.search(key) and None not in (metrics[key], metrics.get(key + "_error"))]


def describe_evaluation(metrics: dict) -> str:
    return "  ".join(
        f"{key} {metrics[key]:.3f} ± {metrics[key + '_error']:.3f}" for key in evaluation_keys(metrics)
    )


def describe_step(run: Run, metrics: dict, seconds_left: float) -> str:
    text = (
        f"step {run.step}/{run.num_steps}  reward {metrics['reward']:.3f}  length {metrics['completion_length']:.1f}  "
        f"{metrics['tokens_per_second']:,.0f} tok/s  left {timedelta(seconds=round(seconds_left))}"
    )
    if metrics["parts_left_out"]:
        text += f"  {metrics['parts_left_out']} updates left out: the ratio was above --max-ratio"
    return text if math.isfinite(metrics["grad_norm"]) else text + "  a gradient is not finite: its update is left out"


def sparkline(values: list[float]) -> str:
    """Values as bars, at most 60 of them, each the mean of its share."""
    size = math.ceil(len(values) / 60)
    means = [statistics.fmean(share) for share in batched(values, size)]
    low, high = min(means), max(means)
    scale = 7.99 / (high - low or 1)
    return "".join("▁▂▃▄▅▆▇█"[int(scale * (x - low))] for x in means)


# ----------------------------------------------------------------------------------------------------------------------
# The starter: a model for those who have none


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and nanochat's special ones."""
    plain = {bytes([i]): i for i in range(256)}
    special = {f"<|{name}|>": 256 + i for i, name in enumerate(Tokenizer.SPECIAL)}
    return Tokenizer(tiktoken.Encoding("bytes", pat_str="(?s:.)", mergeable_ranks=plain, special_tokens=special))


def lesson_of(example: Example, tokenizer: Any) -> Completion:
    """The reference, as if the model had said it."""
    tokens = [*tokenizer.encode(example.references[0]), tokenizer.stops[0]]
    return Completion(tokens, [True] * len(tokens), [])


def ability(sampler: Sampler, examples: list[Example], policy: Policy) -> float:
    """The mean score of one completion to each example, no longer than the longest reference."""
    tokenizer = sampler.tokenizer
    longest = max(len(lesson_of(example, tokenizer).tokens) for example in examples)
    prompts = [prompt_of(example, tokenizer) for example in examples]
    completions = sampler.generate(prompts, 1, longest, policy)
    return statistics.fmean(
        example.task.grader(example.references[0], text_of(said, tokenizer))
        for example, [said] in zip(examples, completions)
    )


def teach(
    model: GPT,
    tokenizer: Any,
    examples: list[Example],
    goal: float,
    size: int,
    optimizers: list[torch.optim.Optimizer],
) -> int:
    """Supervised learning of the references, `size` questions a step, until the model's own completions score
    `goal`, or for 1,000 steps. Returns the number of steps."""
    sampler = Sampler(model, tokenizer)
    policy = Policy(1.0, 0, model.config.softcap)
    asked = examples[:: max(1, len(examples) // 400)]
    generator = torch.Generator().manual_seed(0)
    for step in tqdm(range(1000), desc="starter", unit="step", leave=False, disable=None):
        if step % 5 == 0 and ability(sampler, asked, policy) >= goal:
            return step
        picks = torch.randint(len(examples), (size,), generator=generator)
        picked = [examples[i] for i in picks.tolist()]
        prefix = gpt.prefix_of(model, [prompt_of(example, tokenizer) for example in picked])
        lessons = [lesson_of(example, tokenizer) for example in picked]
        logprobs, _ = gpt.completion_logprobs(model, prefix, lessons, policy)
        model.zero_grad()
        (-logprobs.mean()).backward()
        gpt.step_optimizers(optimizers, 1.0)
        sampler.refresh()
    return 1000


def make_starter(folder: Path) -> None:
    """Makes a tiny GPT, teaches it to be right six times in ten, and saves it as an SFT checkpoint."""
    tokenizer = byte_tokenizer()
    shape = dict(sequence_len=256, vocab_size=tokenizer.vocab_size, n_layer=4, n_head=4, n_kv_head=4, n_embd=128)
    model = GPT(gpt.nanochat_config("current", **shape)).init_weights(seed=2)
    examples = load_examples(TASKS["arithmetic"], make_sums()["train"], "arithmetic")
    optimizers = gpt.make_optimizers(model)
    steps = teach(model, tokenizer, examples, goal=0.6, size=128, optimizers=optimizers)
    gpt.save_checkpoint(folder, steps, model, tokenizer, {"model_config": shape})


# ----------------------------------------------------------------------------------------------------------------------
# The run

# What a kind of run does differently from the flags' own defaults; a flag that is given wins.
PRESETS = {
    "nanochat": dict(task="gsm8k"),
    "huggingface": dict(
        task="gsm8k-boxed",
        matrix_optimizer="adamw",
        embedding_lr=1e-6,
        unembedding_lr=1e-6,
        matrix_lr=1e-6,
        init_lr_frac=1.0,
        lr_schedule="constant",
        top_k=0,
        max_new_tokens=512,
    ),
    "muon": dict(matrix_lr=0.001),          # what nanochat's rate is at its init_lr_frac
    "lora": dict(matrix_optimizer="adamw", matrix_lr=1e-4, init_lr_frac=1.0),
    "starter": dict(
        task="arithmetic",
        max_steps=120,
        examples_per_step=512,
        num_samples=4,
        max_new_tokens=8,
        rollout_batch_size=2048,
        device_batch_size=64,
        embedding_lr=1.0,
        unembedding_lr=0.2,
        matrix_lr=0.25,
        eval_every=30,
        save_every=30,
    ),
}


def fail(message: str) -> None:
    raise UserError(f"{message}; --help lists the flags")


def parse_flags(argv: list[str]) -> dict:
    """The flags given on the command line. Raises UserError where one is out of range."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS)
    parser.error = fail
    kinds = {"int": int, "float": float, "str": str}
    for f in fields(Flags):
        help = f.metadata["help"]
        if f.type == "bool":
            parser.add_argument(option(f.name), help=help, action="store_true")
            continue
        if f.default not in (None, ""):
            help += f" (default: {f.default})"
        kind = kinds[f.type.split()[0]]
        parser.add_argument(option(f.name), help=help, type=kind, choices=f.metadata["choices"])
    given = vars(parser.parse_args(argv))
    for f in fields(Flags):
        value, low = given.get(f.name), f.metadata["low"]
        if isinstance(value, (int, float)) and not low <= value < 2**63:
            fail(f"{option(f.name)} {value} is out of range: the least is {low}")
    if not re.fullmatch(r"|0?\.\d+(,\d*\.?\d+)?", given.get("clip", "")):
        fail(f"--clip {given['clip']} is no clip: give one number below 1, such as 0.2, or two, such as 0.2,0.28")
    if given.get("resume") and given.get("max_steps") == 0:
        fail("--resume has nothing to go on with at --max-steps 0: to evaluate a run, give its folder to --model-tag")
    return given


def find_tags(base: Path) -> dict[str, float]:
    """nanochat's SFT checkpoints, and the time that each was written at."""
    files = base.glob("chatsft_checkpoints/*/model_*.pt")
    return {path.parent.name: path.parent.stat().st_mtime for path in files}


def find_source(tag: str | None, base: Path) -> tuple[Path | None, str]:
    """The folder that --model-tag names, which may not be there, and the name of its runs; no folder for a hub
    name."""
    tags = find_tags(base)

    def size_and_age(tag: str) -> tuple:
        return [int(depth) for depth in re.findall(r"^d(\d+)", tag)], tags[tag]

    if tag is None:                         # as nanochat chooses: the largest d<N>, or else the newest
        tag = max(tags, key=size_and_age, default="starter")
    if tag in (*tags, "starter"):
        return base / "chatsft_checkpoints" / tag, tag
    if re.fullmatch(r"[\w.-]+/[\w.-]+", tag) and not Path(tag).exists():
        return None, tag.partition("/")[2]
    path = Path(tag).expanduser().resolve()
    return path, path.parent.name if path.name.isdigit() else path.name  # a step's folder in a run's


def find_out(source: Path | None, name: str, base: Path, evaluation: bool) -> Path:
    """The folder that a run writes to: never the one that it begins from."""
    parent = base / "chatrl_checkpoints"
    if evaluation:
        return parent / "evaluations" / name
    same = source and source.is_relative_to(parent / name)
    return parent / (f"{name}-2" if same else name)


def find_resumable(out: Path, source: Path | None, tag: str | None, device: torch.device) -> tuple | None:
    """What the last sound checkpoint in a run's folder holds, if there is one: model, tokenizer, meta and training
    state. The frozen weights of adapters come from the run's source; without one `tag` is a hub name."""
    for step in reversed(gpt.checkpoint_steps(out)):
        try:
            meta = gpt.load_meta(out / f"meta_{step:06d}.json")
            training = gpt.load_training(out, meta, device)
            checkpoint = out, step
            rank = meta["flags"]["lora_rank"]
            dtype = getattr(torch, meta["flags"]["dtype"])
            if rank:
                begun = Path(meta["source"]["path"])
                source = source or (begun if begun.exists() else gpt.find_hub_folder(tag))
                meta["source"]["path"] = str(source)
                checkpoint = source, meta["source"]["step"]
            model, tokenizer, _ = gpt.load_checkpoint(*checkpoint, device, dtype, rank, meta["chat_template"])
            return model, tokenizer, meta, training
        except torch.OutOfMemoryError:
            raise
        except Exception as error:          # damaged files fail in many ways
            say(f"passing over step {step}: {gpt.one_line(error)}")


def settle_flags(given: dict, kind: str, saved: dict, device: torch.device) -> Flags:
    """The flags of a run: those given, else those of the run that goes on, else the preset's. Raises UserError
    where one is given that would make it another run."""
    preset = dict(PRESETS[kind])
    if given.get("lora_rank"):
        preset |= PRESETS["lora"]
    if "matrix_optimizer" in preset and given.get("matrix_optimizer") == "muon":
        preset |= PRESETS["muon"]
    if "num_epochs" in given:
        preset.pop("max_steps", None)
    resumable = {f.name: f.metadata["resumable"] for f in fields(Flags)}
    for name in sorted(saved.keys() - resumable):
        say(f"passing over {option(name)} {saved.pop(name)}, which the run has and this version does not know")
    differing = [
        f"{option(name)} {saved[name]}, not {value}"
        for name, value in given.items()
        if not resumable[name] and saved.get(name, value) != value
    ]
    if differing:
        fail(f"--resume: the run has {', '.join(differing)}")
    flags = Flags(**{**preset, **saved, **given})
    if flags.tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UserError("--tensorboard needs a package: pip install tensorboard")
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return replace(flags, dtype=flags.dtype or ("bfloat16" if fast else "float32"))


def load_source(source: Path, base: Path, kind: str, flags: Flags, device: torch.device) -> tuple[GPT, Any, dict]:
    """The model, tokenizer and meta to begin with; makes the starter where it is asked for and not there. Raises
    UserError."""
    tags = ", ".join(sorted({*find_tags(base), "starter"}))
    if kind == "starter" and not gpt.checkpoint_steps(source):
        say(f"no checkpoint in {base}: making the starter, a tiny GPT that is right six times in ten; --model-tag "
            "names another one")
        make_starter(source)
    elif not source.is_dir():
        raise UserError(f"no model tag {flags.model_tag} in {base / 'chatsft_checkpoints'}: choose one of "
                        f"{tags}, a folder with model_*.pt or config.json and *.safetensors, or a hub name")
    _, step = gpt.find_checkpoint(source, flags.model_step)
    if step is None and flags.model_step is not None:
        raise UserError(f"--model-step {flags.model_step}: {source} holds one model, of no step: leave the flag out")
    template, dtype = None, getattr(torch, flags.dtype)
    if flags.chat_template:
        with gpt.blaming(f"--chat-template {flags.chat_template} cannot be read", "give a text file"):
            template = Path(flags.chat_template).read_text(encoding="utf-8")
    model, tokenizer, loaded = gpt.load_checkpoint(source, step, device, dtype, flags.lora_rank, template)
    files = gpt.checkpoint_files(source, step)
    digests = sorted(loaded["sha256"][path.name] for path in files)
    meta = {
        "model_config": loaded["model_config"],
        "source": {"path": str(source), "step": step, "sha256": digests},
        "chat_template": template,
        "wandb_id": os.urandom(4).hex(),
        "step": 0,
    }
    return model, tokenizer, meta


def check_same_source(meta: dict, source: Path, step: int | None) -> None:
    """Raises UserError where --model-tag and --model-step lead to another checkpoint than the run began with. A
    source that is gone is not needed any more."""
    wanted, digests = step, {}
    if step is None and meta["source"]["step"] in gpt.checkpoint_steps(source):
        wanted = meta["source"]["step"]
    try:
        files = gpt.checkpoint_files(source, wanted)
    except UserError:
        if step is None:
            return
        raise
    for path in files:
        gpt.read_file(path, digests)
    if sorted(digests.values()) != meta["source"]["sha256"]:
        raise UserError(f"--resume: --model-tag {source} is not the checkpoint that the run began with: leave out "
                        "--resume to begin anew")


def digest_of(questions: list[Example], tests: dict[str, list[Example]]) -> str:
    """What the questions are, wherever they lie."""
    content = [
        [(example.index, example.prompt, example.references) for example in examples]
        for examples in (questions, *tests.values())
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def keep_short(examples: list[Example], name: str, tokenizer: Any, limit: int) -> list[Example]:
    """The examples whose prompts are no longer than `limit` tokens; says how many are left out."""
    short = [example for example in examples if len(prompt_of(example, tokenizer)) <= limit]
    if len(short) < len(examples):
        say(
            f"{len(examples) - len(short)} of {len(examples)} {name} questions are longer than {limit} tokens and left "
            "out"
        )
    return short


def set_template(tokenizer: Any, flags: Flags, meta: dict) -> None:
    """Gives the chat template the run's own variables, and its first day for today. Raises UserError."""
    tokenizer.date = meta.setdefault("date", tokenizer.date)
    if (flags.chat_template or flags.chat_template_kwargs) and isinstance(tokenizer, Tokenizer):
        raise UserError(
            "--chat-template and --chat-template-kwargs are for Hugging Face's models: nanochat's chat has no template"
        )
    if flags.chat_template_kwargs:
        with gpt.blaming(f"--chat-template-kwargs {flags.chat_template_kwargs} is no JSON object", "give one"):
            tokenizer.variables = {**json.loads(flags.chat_template_kwargs)}


def load(
    given: dict, source: Path | None, out: Path, base: Path, device: torch.device
) -> tuple[Flags, GPT, Any, dict, dict]:
    """The flags, model, tokenizer, meta and, of a run that goes on, training state. Raises UserError."""
    tag, training, saved = given.get("model_tag"), {}, {}
    resumed = find_resumable(out, source, tag, device) if given.get("resume") else None
    if resumed:
        model, tokenizer, meta, training = resumed
        saved = meta["flags"]
    if not source and saved.get("model_tag") != tag:
        source = gpt.find_hub_folder(tag)
    folder = out if resumed else source
    configs = [*folder.glob("config.json"), *folder.glob("[0-9]*/config.json")]
    kind = "huggingface" if configs else "nanochat"
    if source == base / "chatsft_checkpoints" / "starter":
        kind = "starter"
    flags = settle_flags(given, kind, saved, device)
    if resumed:
        check_same_source(meta, source or Path(meta["source"]["path"]), given.get("model_step"))
    else:
        model, tokenizer, meta = load_source(source, base, kind, flags, device)
    meta["flags"] = asdict(flags)
    set_template(tokenizer, flags, meta)
    return flags, model, tokenizer, meta, training


def warn_of_markers(examples: list[Example], tokenizer: Any) -> None:
    prompt = examples[0].prompt
    if isinstance(prompt, str) and not tokenizer.markers & set(tokenizer.encode_raw(prompt)):
        say(
            "warning: --raw-prompt, but none of the model's own markers is in the first question: "
            + shortened(prompt, 80)
        )


def pose(flags: Flags, tokenizer: Any, meta: dict, limit: int) -> tuple[list[Example], dict[str, list[Example]]]:
    """The training and test questions whose prompts have at most `limit` tokens. Raises UserError."""
    questions, tests = load_task(flags)
    digest = digest_of(questions, tests)
    if meta.setdefault("data_sha256", digest) != digest:
        raise UserError(
            "--resume: --data, --eval-data and --few-shot are not what the run began with: leave out --resume to begin "
            "anew"
        )
    questions = keep_short(questions, "train", tokenizer, limit)
    tests = {
        name: keep_short(examples, name or "test", tokenizer, limit)
        for name, examples in tests.items()
    }
    fewest = min(map(len, tests.values()))
    if not fewest or len(questions) < flags.examples_per_step and flags.max_steps != 0:
        raise UserError(
            f"{len(questions)} training and {fewest} test questions are too few: lower --examples-per-step or "
            "--max-new-tokens"
        )
    warn_of_markers(questions or next(iter(tests.values())), tokenizer)
    return questions, tests


def claim(out: Path, fresh: bool, stack: ExitStack) -> None:
    """Makes the run's folder and keeps other runs out of it while the stack is open and this process alive. What an
    earlier run left there is moved to previous/<tag>-<n> by a fresh one. Raises UserError."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(filelock.FileLock(out.with_name(f".{out.name}.lock"), timeout=0))
        if fresh and out.exists() and any(out.iterdir()):
            places = (out.parent / "previous" / f"{out.name}-{n}" for n in itertools.count(1))
            place = next(place for place in places if not place.exists())
            place.parent.mkdir(exist_ok=True)
            out.rename(place)
            say(f"the earlier run of {out.name} is now in {place}")
        out.mkdir(parents=True, exist_ok=True)
    except filelock.Timeout as error:
        raise UserError(f"another run is writing to {out}: wait for its end, or copy the checkpoint to a tag of its "
                        "own") from error
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error}): set NANOCHAT_BASE_DIR to a folder that you can write "
                        "to") from error


def prepare(given: dict, ranks: Ranks, stack: ExitStack) -> tuple[Run, dict]:
    """Finds, loads, poses and claims all that a run needs: the run, and the state of what learns. Raises UserError,
    before anything but the starter is written, on what is amiss. The run's folder stays locked as long as the stack
    is open."""
    base = os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat"
    base = Path(base).expanduser().resolve()
    source, name = find_source(given.get("model_tag"), base)
    out = find_out(source, name, base, evaluation=given.get("max_steps") == 0)
    flags, model, tokenizer, meta, training = load(given, source, out, base, ranks.device)
    questions, tests = pose(flags, tokenizer, meta, model.config.max_positions - flags.max_new_tokens)
    num_steps = flags.max_steps
    if num_steps is None:
        num_steps = flags.num_epochs * (len(questions) // flags.examples_per_step)
    claim(out, fresh=not meta["step"] and num_steps > 0, stack=stack)
    run = Run(flags, questions, tests, tokenizer, meta, out, num_steps, meta["step"])
    return run, {"model": model, **training}


def make_learner(run: Run, state: dict, ranks: Ranks) -> Learner:
    """What learns, on every rank, from rank 0's state of it; as a resumed run left it."""
    flags, model, optimizers = run.flags, state.get("model"), []
    if model:
        model.load_state_dict(state.get("masters", {}), strict=False)
    model = gpt.share_model(model, ranks)
    model.recompute = flags.recompute
    weights, gradient = gpt.flatten(model)
    if ranks.rank == 0:
        optimizers = gpt.make_optimizers(
            model,
            flags.embedding_lr,
            flags.unembedding_lr,
            flags.matrix_lr,
            flags.weight_decay,
            flags.matrix_optimizer,
        )
    for optimizer, saved in zip(optimizers, state.get("optimizers", ())):
        optimizer.load_state_dict(saved)
    return Learner(model, Sampler(model, run.tokenizer), weights, gradient, optimizers, ranks)


def save(run: Run, learner: Learner) -> None:
    """Writes a checkpoint to load here and in nanochat, and to resume from. Raises OSError."""
    model = learner.model
    masters = {                             # what is saved in another type than it learns in, or not at all
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad and model.stored_types.get(name) != p.dtype
    }
    training = {"masters": masters, "optimizers": [optimizer.state_dict() for optimizer in learner.optimizers]}
    gpt.save_checkpoint(run.out, run.step, model, run.tokenizer, run.meta, training)
    files = sorted(run.out.glob("optim_*.pt"))
    past = [path for path in files if path.name <= f"optim_{run.step:06d}.pt"]
    for path in past[: -run.flags.keep_last]:
        path.unlink()


def evaluate_and_log(run: Run, learner: Learner, log: Log | None) -> bool:
    """Whether no signal cut it short."""
    metrics, answered = evaluate(run, learner)
    if log and answered:
        say(f"step {run.step}/{run.num_steps}  {describe_evaluation(metrics)}")
        log.write({"step": run.step, **metrics})
        log.write_samples(run.step, answered, run.tokenizer)
        log.plot()
    return bool(answered)


def advise(lines: list[dict]) -> None:
    """A word about a run whose first evaluation and first ten steps found nothing right, or nothing wrong."""
    steps = [line for line in lines if "reward" in line]
    if len(steps) != 10:
        return
    passes = [value for line in lines for key, value in line.items() if re.search(r"pass@\d+$", key)]
    if not any(passes) and all(line["all_wrong"] == 1 for line in steps):
        say(
            "nothing was right so far, so there is nothing to learn from: try a few-shot prefix (--few-shot), a larger "
            "--num-samples, an easier task, or a model that was taught the format (SFT)"
        )
    if {1} == {*passes, *(line["all_right"] for line in steps)}:
        say("everything was right so far, so there is nothing to learn: try a harder task")


def train(run: Run, learner: Learner) -> None:
    """Evaluates, steps, logs and saves, to the end or until a rank is told to stop: then with the last whole step
    saved."""
    flags = run.flags
    log = Log(run) if learner.ranks.rank == 0 else None
    last_saved = first = run.step
    failures, spent = 0, 0.0
    learner.ranks.listen()
    while run.step < run.num_steps:
        if run.step % flags.eval_every == 0 and not evaluate_and_log(run, learner, log):
            break
        metrics = step(run, learner)
        if metrics is None:
            break
        spent += metrics["rollout_seconds"] + metrics["update_seconds"]
        if log:
            seconds = spent / (run.step + 1 - first)
            say(describe_step(run, metrics, seconds * (run.num_steps - run.step - 1)))
            log.write({"step": run.step, **metrics})
            advise(log.lines)
        failures = 0 if math.isfinite(metrics["grad_norm"]) else failures + 1
        if failures == 5:
            raise UserError(
                "the gradient was not finite five times in a row, and nothing more is saved: look at the rewards, "
                "lower the learning rates, and go on from the last checkpoint with --resume"
            )
        run.step += 1
        if run.step % flags.save_every == 0 or run.step == run.num_steps:
            last_saved = run.step
            if log:
                save(run, learner)
    else:
        evaluate_and_log(run, learner, log)
    if log:
        if last_saved < run.step:
            save(run, learner)
        done = run.step == run.num_steps
        if not done:
            log.plot()
        log.close()
        if done:
            say(f"{'saved' if run.num_steps else 'samples'} in {run.out}")
        else:
            say(f"stopped after step {run.step} of {run.num_steps}: go on with --resume")


def main(argv: list[str]) -> int:
    """Runs, and returns the exit status: 2 where something was amiss from the start, 1 where it went wrong later."""
    status, given, run = 2, None, None
    make_output_safe()
    with ExitStack() as stack:
        try:
            given = parse_flags(argv)
            ranks = Ranks(given.get("device_type", ""))
            state = {}
            if ranks.rank == 0:
                try:
                    run, state = prepare(given, ranks, stack)
                except UserError as error:
                    run = error
            run = ranks.share(run)
            if isinstance(run, UserError):
                raise run
            status = 1
            learner = make_learner(run, state, ranks)
            state.clear()
            train(run, learner)
            status = 0
        except (UserError, OSError) as error:
            late = isinstance(error, OSError) and status == 1
            hint = f": mend that, and go on in {run.out} with --resume" if late else ""
            said_by_all = given is None or error is run
            if main_rank() or not said_by_all:
                print(f"chat_rl: {error}{hint}", file=sys.stderr)
    if dist.is_initialized() and status == 0:  # after a failure other ranks may wait in a collective: no goodbye
        dist.barrier()                      # no rank leaves while another is still talking to it
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if "RANK" in os.environ:                # gloo's threads now and then abort an interpreter that shuts down in order
        os._exit(status)
    sys.exit(status)
