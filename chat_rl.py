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

Where to change what: a task in TASKS, the defaults of a kind of model in MODELS, the reward in reward_of, the baseline
in advantages_of, the loss in loss_of, the schedule in lr_fraction, the distribution that is sampled from in gpt.Policy,
what is logged in summarize, learn, step and evaluate, printed in Log and drawn in PANELS, a family of models in
gpt.FAMILIES, KNOWN and NAMES, how weights learn in gpt.recipe_of.
"""

from __future__ import annotations

import inspect
import io
import itertools
import json
import math
import operator
import os
import re
import signal
import statistics
import subprocess
import sys
import textwrap
import time
import unicodedata
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Callable, Iterable, Iterator, Literal

import filelock
import numpy
import pydantic
import tiktoken
import torch
import torch.distributed as dist
import tyro
from annotated_types import Ge, Lt, MaxLen
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor
from tqdm import tqdm

import gpt
from gpt import GPT, Completion, Learner, Policy, Ranks, Tokenizer, UserError

# ----------------------------------------------------------------------------------------------------------------------
# Flags, kinds of model, tasks


# Its types are looked up when the whole file is known: TASKS and GRADERS stand below.
@pydantic.dataclasses.dataclass(config={"extra": "forbid"})
class Flags:
    run: str = "dummy"                      # name of the W&B run (dummy: no W&B)
    name: Annotated[str, Field(pattern=r"^(\w[\w.-]*)?$")] = ""  # of the run's folder (default: the model's tag)
    tensorboard: bool = False               # write the metrics for TensorBoard too
    device_type: Literal["", "cuda", "mps", "cpu"] = ""  # default: the first of these that is there
    dtype: Literal["", "bfloat16", "float32"] = ""  # of the arithmetic (default: bfloat16 where the GPU has it)
    model_tag: str = ""                     # nanochat tag such as d20, folder or hub name (default: the largest d<N>)
    model_step: NonNegativeInt | None = None  # of a checkpoint, or of the run to resume (default: the last)
    chat_template: str = ""                 # file with a chat template to use instead of the model's (Hugging Face)
    chat_template_kwargs: str = "{}"        # variables of the chat template, as a JSON object (Hugging Face)
    lora_rank: NonNegativeInt = 0           # train adapters of this rank on the blocks' matrices (0: all weights)
    task: Literal[*TASKS] = "gsm8k"         # sets some of the ten flags below
    data: str = ""                          # training questions: a hub name, a JSONL file, or a folder of such
    eval_data: str = ""                     # test questions from elsewhere: a place, or name=place,name=place
    prompt_key: str = "question"            # column with the question: text or a list of messages
    answer_key: str = "answer"              # column with the reference: text, number, list of texts
    system: str = ""                        # text before each question
    suffix: str = ""                        # text after each question
    prefill: str = ""                       # beginning of each reply
    few_shot: str = ""                      # JSON file: a list of messages to put before each question
    raw_prompt: bool = False                # questions hold the model's own markers: they are encoded as they are
    grader: Literal[*GRADERS] = "number"    # what compares a reply with the reference
    num_epochs: PositiveInt = 1             # passes over the training questions
    max_steps: NonNegativeInt | None = None  # length of the run (default: that of the epochs; 0: evaluate and exit)
    examples_per_step: PositiveInt = 16     # questions per step, over all ranks
    num_samples: Annotated[int, Ge(2)] = 16  # completions sampled per question
    max_new_tokens: PositiveInt = 256       # length limit of a completion, in tokens
    temperature: PositiveFloat = 1.0        # of sampling in training
    top_k: NonNegativeInt = 50              # sample from the k likeliest tokens, in evaluation too (0: from all)
    rollout_batch_size: PositiveInt = 256   # rows sampled at once, rounded up to whole groups
    device_batch_size: PositiveInt = 8      # rows in one forward and backward: less takes less memory
    recompute: bool = False                 # compute blocks again in the backward: slower, in less memory
    updates_per_rollout: PositiveInt = 1    # optimizer steps that a rollout is dealt out to
    clip: Annotated[tuple[PositiveFloat, ...], MaxLen(2)] = ()  # PPO's, of the ratio: 0.2, or low and high, 0.2 0.28
    max_ratio: NonNegativeFloat = 0.0       # leave out updates whose mean max(ratio, 1 / ratio) is above this (0: none)
    grad_clip: NonNegativeFloat = 0.0       # cut the gradient to this norm (0: off)
    embedding_lr: NonNegativeFloat = 0.2    # learning rate of the embeddings (Adam)
    unembedding_lr: NonNegativeFloat = 0.004  # learning rate of the unembedding (Adam)
    matrix_lr: NonNegativeFloat = 0.02      # learning rate of the matrices (Muon; Adam in adapters, Llama and Qwen)
    weight_decay: NonNegativeFloat = 0.0    # of the embedding and the unembedding
    init_lr_frac: NonNegativeFloat = 0.05   # all rates start at this fraction
    lr_schedule: Literal["linear", "constant"] = "linear"  # of all rates: linear (to zero) or constant
    eval_every: PositiveInt = 60            # steps between evaluations
    eval_examples: NonNegativeInt = 400     # test questions in an evaluation (0: all)
    eval_samples: PositiveInt = 8           # completions per test question: pass@k for k = 1 … that
    eval_temperature: PositiveFloat = 1.0   # of sampling in evaluations
    save_every: PositiveInt = 60            # steps between checkpoints
    resume: bool = False                    # go on from the last checkpoint of the run of this name, if any
    seed: Annotated[int, Ge(0), Lt(2**64)] = 42  # of the order of questions and of sampling


# A kind of model, or a task, is a set of defaults for the flags; a flag that is given wins.
MODELS = {
    "nanochat": {},
    "huggingface": dict(
        task="gsm8k-boxed",
        embedding_lr=2e-6,
        unembedding_lr=2e-6,
        matrix_lr=2e-6,
        init_lr_frac=1.0,
        lr_schedule="constant",
        grad_clip=1.0,
        top_k=0,
        max_new_tokens=512,
    ),
    "lora": dict(matrix_lr=5e-5, init_lr_frac=1.0, grad_clip=1.0),
    "starter": dict(
        task="arithmetic",
        num_epochs=3,
        examples_per_step=512,
        num_samples=4,
        max_new_tokens=8,
        rollout_batch_size=2048,
        device_batch_size=64,
        embedding_lr=1.0,
        unembedding_lr=0.2,
        matrix_lr=0.25,
        eval_every=20,
        save_every=20,
    ),
}
BOX_NUMBER = r" Provide a numerical answer without units, written inside \boxed{}."
BOX_MATH = r" Write your answer in \boxed{} format."
THINK = (
    "Work the question out between <think> and </think>, then give the final answer, a number and nothing else, "
    "between <answer> and </answer>. Only what stands between the answer tags is scored."
)
TASKS = {
    "arithmetic": dict(data="sums", grader="exact"),
    "gsm8k": dict(data="openai/gsm8k:main", grader="number"),  # grade-school maths in words (Cobbe et al. 2021)
    "gsm8k-boxed": dict(data="openai/gsm8k:main", grader="boxed-number", suffix=BOX_NUMBER),
    "math": dict(                           # Hendrycks et al. 2021: 12,000 problems to learn from, MATH-500 to test
        data="nlile/hendrycks-MATH-benchmark",
        grader="boxed-math",
        prompt_key="problem",
        answer_key="solution",
        suffix=BOX_MATH,
    ),
    "aime": dict(eval_data="HuggingFaceH4/aime_2024", grader="boxed-math", prompt_key="problem", suffix=BOX_MATH),
    "think": dict(data="openai/gsm8k:main", grader="tagged-number", system=THINK),
    "jsonl": dict(grader="boxed-math", prompt_key="prompt"),
}


def parse_flags(argv: list[str], defaults: dict) -> Flags:
    """The command line over these defaults. Raises UserError where it cannot be read, or a value is out of range."""
    try:
        with redirect_stderr(io.StringIO()) as told:
            return tyro.cli(Flags, description=__doc__, args=argv, default=Flags(**defaults))
    except SystemExit as end:
        if not end.code:                    # --help
            raise
        _, _, box = told.getvalue().partition("\n")
        text = re.sub(r"[^!-~]+", " ", box).strip()
        raise UserError(re.sub(r".*for Flags (\S+) (.*?) \[type.*", r"--\1: \2", text)) from None


def settle_flags(argv: list[str], kind: str) -> Flags:
    """Those given, else the task's, else those of the kind of model. Raises UserError."""
    given = parse_flags(argv, MODELS[kind])
    adapters = MODELS["lora"] if given.lora_rank else {}
    return parse_flags(argv, MODELS[kind] | adapters | TASKS[given.task])


# ----------------------------------------------------------------------------------------------------------------------
# The algorithm


@dataclass
class Example:
    """A question to ask."""

    index: int                              # its place in the data, which names its random numbers
    question: str                           # for people, and to find what is trained on and tested
    prompt: list[int]                       # the tokens that ask it, up to where the model goes on
    opening: str                            # what of the reply the prompt holds already, to be graded with the rest
    references: list[str]                   # what the data say: any of them may be matched
    grader: str                             # a row of GRADERS


@dataclass
class Group:
    """A question, the completions that were sampled for it, and what they were worth."""

    example: Example
    completions: list[Completion]
    texts: list[str]                        # what was graded
    scores: list[float]                     # what the grader gave, 0 to 1
    rewards: list[float]                    # what is learned from
    advantages: list[float]
    timeouts: int                           # gradings that took too long

    def learnable(self) -> list[tuple[Completion, float]]:
        """The completions that there is something to learn from, and their advantages."""
        return [(c, advantage) for c, advantage in zip(self.completions, self.advantages) if advantage]


def reward_of(score: float, completion: Completion, flags: Flags) -> float:
    """What a completion is worth, given its score."""
    return score


def advantages_of(rewards: list[float]) -> list[float]:
    """Reward − mean of the group: exactly zero where all rewards agree."""
    mean = statistics.mean(rewards)
    return [reward - mean for reward in rewards]


def bounds_of(flags: Flags) -> tuple[float, float]:
    """What the ratio is clipped to."""
    return (1 - flags.clip[0], 1 + flags.clip[-1]) if flags.clip else (0.0, math.inf)


def loss_of(logprobs: Tensor, sampled_logprobs: Tensor, advantages: Tensor, flags: Flags) -> Tensor:
    """The loss of each sampled token (M,), given its logprob under the policy now, that under the policy that
    sampled it, and the advantage of its completion. At ratio 1 its gradient is REINFORCE's. The clip of the ratio is
    PPO's (Schulman et al. 2017). Learner.update divides by the number of tokens."""
    ratio = (logprobs - sampled_logprobs).exp()
    return -torch.minimum(advantages * ratio, advantages * ratio.clamp(*bounds_of(flags)))


def lr_fraction(run: Run) -> float:
    """What all learning rates are multiplied by, at the run's step."""
    left = 1 - run.step / run.num_steps if run.flags.lr_schedule == "linear" else 1.0
    return run.flags.init_lr_frac * left


@dataclass
class Run:
    """What a run is, the same on every rank; no tensors."""

    flags: Flags
    questions: list[Example]                # to learn from
    tests: dict[str, list[Example]]         # by the name that their metrics bear
    tokenizer: Any
    out: Path
    num_steps: int
    source: str                             # the checkpoint that it was begun from
    wandb_id: str
    step: int                               # steps done


ORDER, DEALING, TRAINING, EVALUATION = range(1, 5)  # what random numbers are for, next to the seed


def permutation(n: int, *counters: int) -> list[int]:
    return numpy.random.default_rng(counters).permutation(n).tolist()


def questions_of_step(run: Run) -> list[Example]:
    """The training questions of the step: each epoch goes through them in an order of its own, as many as make whole
    steps."""
    size = run.flags.examples_per_step
    epoch, number = divmod(run.step, len(run.questions) // size)
    order = permutation(len(run.questions), run.flags.seed, ORDER, epoch)
    return [run.questions[i] for i in order[number * size :][:size]]


def deal(items: list, cost: Callable, ranks: Ranks) -> list:
    """This rank's share of the items: the costliest first, each to the rank with the least to do."""
    loads = [0] * ranks.size
    mine = []
    for item in sorted(items, key=cost, reverse=True):
        rank = loads.index(min(loads))
        loads[rank] += cost(item)
        if rank == ranks.rank:
            mine.append(item)
    return mine


def text_of(completion: Completion, tokenizer: Any) -> str:
    """What the model said, without the token that ended its turn."""
    return tokenizer.decode([token for token in completion.tokens.tolist() if token not in tokenizer.stops])


def grade(run: Run, example: Example, completions: list[Completion]) -> Group:
    """Scores and rewards every completion, and compares it with its group."""
    grader = GRADERS[example.grader]
    before = same_math.timeouts
    texts = [example.opening + text_of(completion, run.tokenizer) for completion in completions]
    scores = [max(grader(reference, text) for reference in example.references) for text in texts]
    rewards = [reward_of(score, completion, run.flags) for score, completion in zip(scores, completions)]
    timeouts = same_math.timeouts - before
    return Group(example, completions, texts, scores, rewards, advantages_of(rewards), timeouts)


def rollout(
    run: Run,
    learner: Learner,
    examples: list[Example],
    num_samples: int,
    policy: Policy,
    seed: tuple[int, ...],
    title: str,
    greedy: bool = False,
) -> list[Group]:
    """Samples from the policy and grades, each rank its share of the examples, about `rollout_batch_size` rows at once.
    If `greedy`, the last sample of each takes the likeliest token every time. Returns on rank 0 alone the groups of
    all, in the order of the data. Raises Interrupted on all ranks where a signal cuts one short."""
    flags, ranks, groups = run.flags, learner.ranks, []
    mine = deal(examples, lambda example: len(example.prompt) + num_samples * flags.max_new_tokens, ranks)
    with suppress(gpt.Interrupted), progress_bar(len(mine) * num_samples, title, "completion", ranks.rank) as bar:

        def progress(ended: int) -> None:
            bar.update(ended)
            ranks.poll()

        for part in gpt.batched(mine, math.ceil(flags.rollout_batch_size / num_samples)):
            completions = gpt.generate(
                learner.model,
                run.tokenizer,
                [example.prompt for example in part],
                num_samples,
                flags.max_new_tokens,
                policy,
                seed,
                streams=[example.index for example in part],
                progress=progress,
                greedy=greedy,
            )
            for example, sampled in zip(part, completions):
                ranks.poll()
                groups.append(grade(run, example, sampled))
    ranks.check()                           # all agree whether a signal has ended it
    return sorted(itertools.chain(*ranks.gather(groups)), key=lambda group: group.example.index)


def num_sampled(completions: list[Completion]) -> int:
    """The number of tokens that the policy drew, as opposed to forced ones."""
    return sum(int(completion.sampled.sum()) for completion in completions)


def summarize(groups: list[Group], stops: tuple[int, ...]) -> dict[str, float]:
    """Means over the completions, the questions or the sampled tokens of a rollout, and the number of time-outs."""
    completions = [completion for group in groups for completion in group.completions]
    learned = [completion for group in groups for completion, _ in group.learnable()]
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


def backward(model: GPT, groups: list[Group], policy: Policy, flags: Flags) -> Tensor:
    """Adds the gradient of the loss, summed over the sampled tokens, to that of the model, `device_batch_size` rows at
    once. Completions without advantage are not run; each group has some with one. Returns log π / π_sampled
    (M,) of the tokens that were learned from, π being the policy now.

    A question runs forward once and backward once, whatever the batch: its completions read copies of what it left
    in the cache, and the gradients that they leave there are sent back through it in the end.
    """
    log_ratios = [torch.zeros(0, device=model.device)]
    size = flags.device_batch_size
    for part in gpt.batched(groups, size):
        prefix = gpt.prefix_of(model, [group.example.prompt for group in part])
        leaves = prefix.leaves()
        rows = [(i, c, advantage) for i, group in enumerate(part) for c, advantage in group.learnable()]
        rows.sort(key=lambda row: len(row[1].tokens))
        for batch in gpt.batched(rows, size):
            questions, completions, advantages = zip(*batch)
            prefixes = leaves.rows(torch.tensor(questions, device=model.device))
            logprobs, owners = gpt.completion_logprobs(model, prefixes, completions, policy)  # (M,), of which row (M,)
            sampled_logprobs = numpy.concatenate([c.logprobs[c.sampled] for c in completions])
            sampled_logprobs = torch.tensor(sampled_logprobs, device=model.device)
            advantages = torch.tensor(advantages, device=model.device)
            loss_of(logprobs, sampled_logprobs, advantages[owners], flags).sum().backward()
            log_ratios.append(logprobs.detach() - sampled_logprobs)
        prefix.backward(leaves)
    return torch.cat(log_ratios)


def minibatches(run: Run, groups: list[Group]) -> list[list[Group]]:
    """The step's groups that have an advantage, dealt into `updates_per_rollout` parts by (seed, step) alone."""
    K = run.flags.updates_per_rollout
    order = permutation(len(groups), run.flags.seed, DEALING, run.step)
    learned = [groups[i] for i in order if groups[i].learnable()]
    return [learned[k::K] for k in range(K) if learned[k:]]


def learn(run: Run, learner: Learner, groups: list[Group], policy: Policy) -> dict:
    """The updates of a step, one for each minibatch, shared out over the ranks; each gradient is divided by the T / K
    of the step's T sampled tokens and K `updates_per_rollout`. Returns their metrics."""
    flags, ranks = run.flags, learner.ranks
    per_update = num_sampled([c for group in groups for c in group.completions]) / flags.updates_per_rollout
    norms = []                              # of the gradient, in each minibatch that was learned from
    drifts = []                             # log π / π_sampled of each minibatch's tokens, those of all ranks
    for part in minibatches(run, groups):
        learner.model.zero_grad(set_to_none=False)
        mine = deal(part, lambda group: sum(len(c.tokens) for c, _ in group.learnable()), ranks)
        log_ratios = backward(learner.model, mine, policy, flags)
        drifts.append(numpy.concatenate(ranks.all_gather(log_ratios.cpu().double().numpy())))
        if 0 < flags.max_ratio < numpy.exp(abs(drifts[-1])).mean():
            continue                        # NaN goes on to the update, which makes none
        norms.append(learner.update(per_update, lr_fraction(run), flags.grad_clip))
    drift = numpy.concatenate(drifts or [[0.0]])
    ratio = numpy.exp(drift)
    low, high = bounds_of(flags)
    return {
        "grad_norm": statistics.fmean(norms or [0.0]),
        "updates_left_out": len(drifts) - len(norms),  # by max_ratio
        "sampler_gap": abs(drifts[0]).mean() if drifts else 0.0,  # before any update
        "ratio_max": numpy.exp(abs(drift)).max(),
        "approx_kl": (ratio - 1 - drift).mean(),  # the k3 estimate (Schulman 2020)
        "clip_fraction": ((ratio < low) | (ratio > high)).mean(),
    }


def step(run: Run, learner: Learner) -> tuple[dict, list[Group]]:
    """One step: sample, grade, learn. Returns its metrics and groups."""
    flags, ranks, start = run.flags, learner.ranks, time.monotonic()
    questions = questions_of_step(run)
    policy = Policy(flags.temperature, flags.top_k, learner.model.config.softcap)
    seed = flags.seed, TRAINING, run.step
    groups = ranks.from_main(rollout(run, learner, questions, flags.num_samples, policy, seed, f"step {run.step}"))
    rolled_out = time.monotonic()
    metrics = summarize(groups, run.tokenizer.stops) | learn(run, learner, groups, policy)
    return metrics | {
        "lr_fraction": lr_fraction(run),
        "rollout_seconds": rolled_out - start,
        "update_seconds": time.monotonic() - rolled_out,
        "tokens_per_second": metrics["completion_length"] * len(questions) * flags.num_samples / (rolled_out - start),
    }, groups


def pass_at_k(scores: list[list[float]], k: int) -> tuple[float, float]:
    """The chance that one of k samples is right, 1 − C(wrong, k) / C(n, k) without bias from a question's n scores
    (Chen et al. 2021): its mean over the questions, and the standard error of that (0 for a single one)."""
    values = [1 - math.comb(sum(score < 1 for score in row), k) / math.comb(len(row), k) for row in scores]
    return statistics.fmean(values), statistics.pstdev(values) / math.sqrt(len(values) - 1 or 1)


def evaluate(run: Run, learner: Learner) -> tuple[dict[str, float], dict[str, list[Group]]]:
    """pass@k for k = 1 … eval_samples and the greedy accuracy on the first eval_examples questions of each test, with
    the same random numbers every time. Returns, on rank 0 alone, metrics and each test's groups, the last completion
    of each being the greedy one."""
    flags, start = run.flags, time.monotonic()
    policy = Policy(flags.eval_temperature, flags.top_k, learner.model.config.softcap)
    seed = flags.seed, EVALUATION
    metrics, answered = {}, {}
    for name, examples in run.tests.items():
        examples = examples[: flags.eval_examples or None]
        groups = rollout(run, learner, examples, flags.eval_samples + 1, policy, seed, "evaluation", greedy=True)
        if groups:                          # on rank 0
            answered[name] = groups
            label = f"{name}/" if name else ""
            metrics[f"{label}evaluation_timeouts"] = sum(group.timeouts for group in groups)
            drawn = [group.scores[:-1] for group in groups]
            estimates = {f"pass@{k}": pass_at_k(drawn, k) for k in range(1, flags.eval_samples + 1)}
            estimates["greedy"] = pass_at_k([group.scores[-1:] for group in groups], 1)
            for key, (mean, error) in estimates.items():
                metrics |= {label + key: mean, f"{label}{key}_error": error}
    return metrics | {"evaluation_seconds": time.monotonic() - start}, answered


def train(run: Run, learner: Learner) -> int:
    """Evaluates, steps, logs and saves, to the end or until a rank is told to stop, then with the last whole step
    saved. Returns the exit status."""
    flags, ranks = run.flags, learner.ranks
    log = Log(run) if ranks.rank == 0 else None
    saved, failures, status = run.step, 0, 0
    ranks.listen()
    try:
        while True:
            if run.step % flags.eval_every == 0 or run.step >= run.num_steps:
                metrics, answered = evaluate(run, learner)
                if log:
                    log.write_evaluation(run, metrics, answered)
            if run.step >= run.num_steps:
                break
            ranks.check()                   # and the others wait for rank 0's log: a step begins on all at once
            metrics, groups = step(run, learner)
            if log:
                log.write_step(run, metrics, groups)
            failures = 0 if math.isfinite(metrics["grad_norm"]) else failures + 1
            if failures == 5:
                save(run, learner)
                raise FloatingPointError("the gradient was not finite five times in a row (are the rates too high?)")
            run.step += 1
            if run.step % flags.save_every == 0 or run.step == run.num_steps:
                save(run, learner)
                saved = run.step
    except gpt.Interrupted as interruption:
        status = 128 + interruption.args[0]
        if saved < run.step:
            save(run, learner)
    if log:
        log.close(run, interrupted=status > 0)
    return status


# ----------------------------------------------------------------------------------------------------------------------
# Graders: does a completion say what the reference says?


def after_marks(text: str) -> str:
    """The sentence after the last ####, GSM8K's way to end; "" where there is none."""
    _, mark, tail = text.rpartition("####")
    return re.split(r"\n|\.\s", tail.strip())[0] if mark else ""


def last_box(text: str) -> str:
    r"""What stands in the last \boxed{} whose braces are balanced; "" where there is none."""
    opened, box = [], ""
    for mark in re.finditer(r"(\\boxed\s*)?(\{)|\\.|(\})", text, re.DOTALL):
        if mark[2]:
            opened.append(mark)
        elif mark[3] and opened:
            start = opened.pop()
            box = text[start.end() : mark.start()] if start[1] else box
    return box


def last_answer(text: str) -> str:
    """What stands in the last closed <answer> after all thoughts; "" where there is none."""
    answers = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", text.rpartition("</think>")[2], re.DOTALL)
    return answers[-1] if answers else ""


def final_answer(reference: str) -> str:
    """A reference without the working that leads to it: what follows its last ####, and there what stands in its
    last box, if it has these."""
    tail = reference.rpartition("####")[2]
    return last_box(tail) if r"\boxed" in tail else tail


# Rules, each for what those above it leave: what is found (a regular expression) → what is put there. ~ is a space.
RULE = r"(\S.*?) +→ ?(.*)"
UNICODE = re.findall(RULE, r"""
    [¹²³⁰-ⁿ]+                               → ^{\g<0>}
    [₀-₎]+                                  → _{\g<0>}
    [¼-¾⅐-⅞]                                → ~\g<0>
    (?<!\d)(\d+)⁄(\d+)                      → \\frac{\1}{\2}
    √\s*(\d+(?:\.\d+)?|[a-zA-Z]|\([^()]*\)) → \\sqrt{\1}
    ∛\s*(\d+(?:\.\d+)?|[a-zA-Z]|\([^()]*\)) → \\sqrt[3]{\1}
    √                                       → \\sqrt~
    [−–—‐]                                  → -
    ÷                                       → /
    ×                                       → \\times~
    [·⋅]                                    → \\cdot~
    °                                       → ^\\circ~
    ±                                       → \\pm~
    ≤                                       → \\le~
    ≥                                       → \\ge~
    ≠                                       → \\ne~
    ≈                                       → \\approx~
    ∞                                       → \\infty~
    ∪                                       → \\cup~
    ∩                                       → \\cap~
    ∈                                       → \\in~
    π                                       → \\pi~
    θ                                       → \\theta~
    α                                       → \\alpha~
    £                                       → \\text{pound}
    €                                       → \\text{euro}
    ¥                                       → \\text{yen}
    ¢                                       → \\text{cent}
    \u200b                                  →
""")
FORMS = re.findall(RULE, r"""
    # a box within a sentence; matrices, colours, all that is text
    ^(?!.*\bnot\b)(?:[a-zA-Z]{2,}[\s:]+|[\s$*])*\\boxed\s*\{(.*)\}[\s$*.]*$         → \1
    (?:\\left)?[(\[]\s*\\begin\{array\}\{[^{}]*\}                                   → \\begin{pmatrix}
    \\end\{array\}\s*(?:\\right)?[)\]]                                              → \\end{pmatrix}
    (\\\\)\[[\d.]+[a-z]+\]                                                          → \1
    \\(?:text)?color\s*\{[^{}]*\}                                                   →
    \\(?:text|math|[hm]box|boldsymbol|bm|emph|underline)(?:rm|bf|it|sf|tt|up|normal)?\s*\{ → \\text{
    (?:^|\\text\{)\s*(?:[Oo]ption|[Cc]hoice)\s*(?:\\text\{)?\(?([A-Z])\)?[\s}]*$    → \\text{\1}
    \bUS\s*(?=\\?\$|dollar)                                                         →
    ^\\text\{\s*[Aa]ll real numbers\s*\}$                                           → \\mathbb{R}
    # commas between thousands, delimiters, fonts, Markdown's bold
    (?<![_^]\d)(?<=\d)\s*(?:\{\s*,\s*\}|,\s*\\!|\\,)\s*(?=\d{3}(?!\d))              →
    \\(?:left|right)\b\.?|\\!\s*|(?<!\\)\\[()\[\]]|(?<!\\)\$                        →
    \\(?:displaystyle|(?:math|text)?(?:rm|bf|it|sf|tt|up))(?![a-zA-Z])              →
    (?<!\S)\*\*(?=\S)|(?<=\S)\*\*(?![\w({\\])                                       →
    \s*\{\s*([,:])\s*\}\s*                                                          → \1
    # numbers in text; words and functions without a backslash
    \\text\{((?:[^{}]*[\d\\][^{}]*|\s*[ei]\s*))\}                                   → \1
    ,?\s*(?:\\text\{\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z]))\s*    → ,~
    (?<![\\a-zA-Z])(pi|sin|cos|tan|cot|sec|csc|log|ln|exp|infty)(?![a-zA-Z])        → \\\1~
    (?<![\\a-zA-Z])\\?sqrt\s*\(([^()]*)\)                                           → \\sqrt{\1}
    \\frac\{\\text\{([^{}]+)\}\}\{\\text\{([^{}]+)\}(\^\{?\d\}?)?\}                 → \\text{\1/\2}\3
    # money, and what something is: '\text{cost is } \$5'
    \\\$|\bUSD\b                                                                    → \\text{dollar}
    [₠-₿]                                                                           → \\text{\g<0>}
    \\text\{([^{}]*[a-zA-Z]\s*)(?::|\bis)\s*\}\s*                                   → \\text{\1}=
    (?<=[a-z]{2})(?<!\bnot|n't):\s*(?=[-\d.(\\])|(?<=[a-zA-Z])\s+is\s+(?=[-\d.(\\])               → =
    (^|=)\s*([-+]?)\s*\\text\{(dollar|pound|euro|yen|[₠-₿])\}(.*)                   → \1\2\4\\text{\3}
    # percent, degrees, areas, volumes
    \\text\{\s*percent\s*\}|\bpercent\b|\\%                                         → %
    \\text\{\s*degrees?\s*\}|(?<=\d)\s*degrees?$                                    → ^\\circ
    \\text\{\s*sq(?:uare|\.)?\s+([a-zA-Z]+)\s*\}                                    → \\text{\1}^2
    \\text\{\s*cu(?:bic|\.)?\s+([a-zA-Z]+)\s*\}                                     → \\text{\1}^3
    \^?\s*(\{\s*)?\\(?:text)?degree(?![a-zA-Z])(?(1)\s*\})                           → ^\\circ
    (\\(?:sin|cos|tan))\s*(\()?(\d+)\s*\^\s*\{?\\circ\s*\}?(?(2)\))                 → \1(\3\\pi/180)
    # 0.\overline{3}, 1e5, \emptyset, \frac12, \bigl
    (\d*\.\d*)\\(?:overline|bar)\s*\{(\d+)\}                                        → \1\2\2\2\2\2\2\2\2
    (?<![\w.])(\d+(?:\.\d+)?)[eE]\+?(-?\d\d?)(?![\w.])                              → \1\\times~10^{\2}
    \\varnothing                                                                    → \\emptyset
    (\\[dtc]?frac)\s*(\\pi(?![a-zA-Z])|\w)                                          → \1{\2}
    (\\[dtc]?frac\s*\{[^{}]*\})\s*(\\pi(?![a-zA-Z])|\w)                             → \1{\2}
    \\[bB]igg?[lr]?(?![a-zA-Z])                                                     →
    # (x,y)=(1,2), x=1,y=2 and y=2,x=1 are (1,2)
    ^\(y,[\s~]*x\)[\s~]*=[\s~]*\(([^(),]*),([^(),]*)\)$                             → (\2,\1)
    ^\((?:[a-z],[\s~]*)+[a-z]\)[\s~]*=[\s~]*(?=\()                                  →
    ^([ybnqvtk])[\s~]*=([^=,]*),[\s~]*([xampush])[\s~]*=([^=,]*)$                   → (\4,\2)
    ^([a-zA-Z])[\s~]*=([^=,]*),[\s~]*(?!\1)([a-zA-Z])[\s~]*=([^=,]*)$               → (\2,\4)
    ^([a-zA-Z])[\s~]*=([^=,]*),[\s~]*(?!\1)([a-zA-Z])[\s~]*=([^=,]*),[\s~]*(?!\1|\3)[a-zA-Z][\s~]*=([^=,]*)$ → (\2,\4,\5)
    # comparisons, functions, bases, an answer in one pair of brackets, spaces
    ^[fgh]\([a-z]\)[\s~]*=[\s~]*(?=[^=]*$)                                          →
    ^\((\d+)\)[\s~]*_                                                               → \1_
    <=                                                                              → \\le~
    >=                                                                              → \\ge~
    ^\s*[{(]([^{}(),]*)[)}]\s*$                                                     → \1
    (?:\s|~|(?<!\\)\\[,;:\s]|\\q?quad\b)+                                           → ~
    # mixed numbers
    (?<![\w.,/])(\d+)~(\d\d?)/(\d+)(?!~?\d)                                         → \1\\frac{\2}{\3}
    (?<![\w./^}])(\d+)~?(\\frac\{\d+\}\{\d+\})                                      → (\1+\2)
    # what an answer begins and ends with, 007, 1,000
    ^[~*`]+|(?:[~*,;`\\]|(?<!\.)\.(?!\.))+$                                         →
    ^(?:\+|(-)~)                                                                    → \1
    (?<![\w.,:])(?<!\d~)0+(?=\d)                                                    →
    ^((?!.*\\\{)[^,([]*(?<![\w.^}])[1-9]\d?\d?),(\d{3}(?!\d)[^,]*)$                   → \1\2
    ~                                                                               → \040
""")
NUMBER = re.compile(r"(?a)-?(?:(?:\d{1,3}(?:[ ,]\d{3})+|\d+)(?:\.\d*)?|\.\d+)")
NAME = re.compile(
    r"""(?xam) (?:^|(?<=,))\ *(?:
        (?: \\text\{[^{}\n]*\} | \(\\?[a-zA-Z]+(?:,\ *\\?[a-zA-Z]+)+\) | \|[A-Z]+\|
          | (?: \\(?:angle|triangle|over\w+|vec|alpha|beta|gamma|[dD]elta|theta|lambda|mu|phi|rho|omega)\b
              | [a-zA-Z '{}] | _(?:[a-zA-Z]|\d+|\{\w+\}) | \^\{-1\}(?=\() | (?<=[\w}])\((?:\w|-?\d+)\))+
        )\ *=\ *
    )+"""
)
MEASURED = re.compile(
    r"""(?xa) (\\text\{[^{}]*\}\s*(?=\\text|[a-zA-Z]).*|.*?\S|)\s*((?:
        % | (?<=\d)_\s*\{?\s*\w+\s*\}? | (?<=\d)['"]+
        | \^\s*\{?\s*\\circ\s*\}?\s*(?:\\text\{\s*[CF]\s*\}|[CF]\b)?
        | (?!.*\b(?: hundred|thousand|\w*illion|lakh|crore|dozen|hal[fv]|third|quarter
                   | \w*(?:four|fif|six|seven|eigh|nin|ten|leven|twelf|teen|tie)th | [mb]il\b
                   | factorial|squared|cubed|plus|minus|negative
                   | (?:times|more)(?=\W+\w) | less|over|wrong
                   | (?:is|not|but|or|only|point|score|grand|tens|below|double|triple|twice)\b
                   | (?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen
                       | (?:twen|thir|for|fif|six|seven|eigh|nine)ty)(?:\W*$|\W+(?:cents|minutes|seconds|inches|ounces)\b)))
          (?: (?:(?<=.)(?!\\text\{\s*[bijknp-rt-zBMX-Z]\s*\})\\text\{[a-zA-Z\s./₠-₿-]+\}
                 (?:\s*\^\s*\{?-?\d\}?)? (?:\s*(?:\\cdot|/)\s*(?=\\text))? \s*)+
            | (?<=[\d)}\s])
              (?:[cmkdn]?m(?=\^)|[cmkdn]m|[mk]g|m[ls]|ft|in|yd|mi|lbs?|oz|hrs?|min|sec|mph|am|pm|AM|PM|USD|km/h|m/s)
            | (?<=[\d)}]\s) (?:(?:sq|cu)\.?\s)?(?=\w*[aeiou])[a-zA-Z]{3,}(?:[\s/-](?:a|[a-zA-Z]{2,}))*
          ) (?:\s*\^\s*\{?-?\d\}?)?
    )?)"""
)
# What is compared as words: text, derivatives, cases, dots, primes, a:b:c, dates, two times, two letters, a pair and what
# stands in other brackets or has ±, a list and an inequality, congruences, intervals that hold infinity, mere letters.
PROSE = re.compile(
    r"""(?xam) \\text\{[^{}]*[a-zA-Z]{2} | \\frac\{d | \\begin\{(?!\w*matrix) | \\[bcdl]?dots|\.\.\. | '
    | :.*: | \d/\d+/\d
    | ^\d+:\d\d\n\d+:\d\d$ | ^[a-zA-Z]\n[a-zA-Z]$ | ^(?:no|[IVX]{2,})$
    | ^\([^()]*\)\n(?:\\\{[^()<>]*|\[[^][,]*,[^][,]*\])$ | ^(?:\\\{[^()<>]*|\[[^][,]*,[^][,]*\])\n\([^()]*\)$
    | ^(?!.*(?:[][()<>]|\\[lg]e)).*,.*\n.*(?:[<>]|\\[lg]e) | ^.*(?:[<>]|\\[lg]e).*\n(?!.*(?:[][()<>]|\\[lg]e)).*,
    | \\equiv | \\infty\s*\] | \[\s*-\s*\\infty | ^\([^()]*,[^()]*\)\n[^(,]*\\pm
    | ^(?=.*(?<![a-zA-Z\d\\])[a-zA-Z]{3})(?:\\angle|\\triangle|[\w\s.,;:'()&-])+$
    """
)
HEAVY = re.compile(
    r"""(?x) [([{](?:[^()[\]{}]*[([{]){5}            # deep
    | (?:(?:\||\\(?:l[ng]|log|exp|arc|sin|cos|tan|cot|sec|csc)).*?){5}
    | \\boxed | \\mod(?![a-z]) | \\(?:sum|prod|i+nt|oint|lim) | (?:\^|\\exp).*\\exp
    | !\s*! | [)}\]]\s*! | (?:\^|\d{4}).*(?:(?<!\\)!|binom|choose) | (?:(?<!\\)!|binom|choose).*(?:\^|\d{4})
    | ^(?:$|[<>/]|\\[lg]e\b) | (?:[-+/:<>]|\\(?:cup|cap|cdot|times|pm|[lg]e)\s?)$    # nothing, half of something
    | (?<![_^])(?<![_^]\d)\d\s(?!\d{3}(?!\d))\d     # numbers in a row
    | \d\s*_\s*\{[^}]*[^\w{}\s]                   # a number with a subscript that is no base
    | \^\s*$ | \^\s*[^{}\s]\s*\^ | \^\s*\{(?:[^{}]|\{[^{}]*\})*(?:\^|\{[^{}]*\{|\Z) | \^\s*\{(?:[^}]*\d){5}
    """
)


def rewritten(text: str, rules: list[tuple[str, str]]) -> str:
    for found, put in rules:
        text = re.sub(found, put, text)
    return text


@lru_cache(10_000)
def spelled(text: str) -> str:
    r"""A text whose Unicode is spelled in ASCII and LaTeX: '−½√5x²' is r'-~\frac{1}{2}\sqrt{5}x^{2}'."""
    return rewritten(unicodedata.normalize("NFKC", rewritten(text, UNICODE)), UNICODE)


def clean(text: str) -> str:
    """An answer in plain LaTeX, without what means nothing; "" where it is longer than 200 characters."""
    text = spelled(text)
    return rewritten(text, FORMS) if len(text) <= 200 else ""


def measured(text: str) -> tuple[str, str]:
    r"""An answer's value and its unit, "" where it has none: r'1,000\text{ cm}^2' gives ('1000', 'cm2')."""
    value, unit = MEASURED.fullmatch(text).groups()
    if NUMBER.fullmatch(value):
        value = re.sub("[ ,]", "", value)
    return value, re.sub(
        r"""(?x) \\text | [\s{}.^] | (?<=\bc)enti(?=m) | (?<=\bk)ilo | (?<=\bm)illi | (?<=m)et(?:er|re)s?\b
        | (?<=g)rams?\b | (?<=\bh)(?:ou)?rs?\b | (?<=\bs)ec(?:ond)?s?\b | (?<=\bmin)utes?\b | (?<=\bmi)les?\b
        | (?<=\bin)ch(?:es)?\b | (?<=\bf)(?:oo|ee)(?=t\b) | (?<=\w\w\w)s\b""", "", unit
    ).casefold()


def unnamed(text: str) -> str:
    """An answer without the names before what is equal to them: 'x = 2,y = 100' gives '2, 100'."""
    return NAME.sub(" ", text).strip()


def number(text: str) -> Decimal | None:
    """The number that an answer is, whatever its name and unit; None where it is anything else."""
    value, unit = measured(unnamed(clean(text)))
    return Decimal(value) if NUMBER.fullmatch(value) and "_" not in unit else None


def sympy_equal(a, b, *_) -> bool:
    """Whether two of sympy's values are: exact ones are equal or not; decimals to 6 places, and 6 digits where they are
    below 1. What differs at one point is not asked whether it is equal everywhere."""
    from sympy import Float, Matrix, Rational, simplify
    if (a - b).is_Matrix:
        return all(map(sympy_equal, Matrix(a.doit()), Matrix(b.doit())))
    exact = lambda value: value.xreplace({x: Rational(str(x)) for x in value.atoms(Float)})
    error = (exact(a) - exact(b)).doit()
    point = {x: 1.3 + n / 7 for n, x in enumerate(a.free_symbols | b.free_symbols)}
    size, miss = (abs(value.evalf(60, subs=point)) for value in (a.doit(), error))
    near = miss <= min(1, size) * (1.01e-6 if (a - b).has(Float) else 0 if error.is_Rational else 1e-50)
    return near and (error.is_number or simplify(error) == 0)


def serve() -> None:
    """The work of a process of its own: reads [reference, answer] in JSON, line by line, and writes 1 where they
    are equal. It ends with its input, and dies where a line takes more than 5 seconds of its CPU time."""
    import json, os, re, signal, sys
    from functools import lru_cache, partial, reduce
    from operator import mul
    from latex2sympy2_extended import NormalizationConfig
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy, latex2sympy
    from math_verify import LatexExtractionConfig, grader, parse, parser

    # its own takes 2(3) for 2 + 3
    _Latex2Sympy.convert_postfix_list = lambda self, factors: reduce(mul, map(self.convert_postfix, factors))
    grader.sympy_numeric_eq = grader.sympy_symbolic_eq = sympy_equal  # its own takes all that is near 0 for 0
    parser.latex2sympy = partial(latex2sympy, conversion_config=ConversionConfig(lowercase_symbols=False))
    config = LatexExtractionConfig(normalization_config=NormalizationConfig(nits=True, malformed_operators=True))

    @lru_cache
    def read(text):
        text = re.sub(r"(?<![a-zA-Z\\_])i(?![a-zA-Z])", r"{\\sqrt{-1}}", text)
        text = re.sub(r"(^\\\{|^|[,=])([^,=()[\]]*?)\\pm([^,=()[\]]*?)(?=,|\\\}|$)", r"\1\2+\3,\2-\3", text)
        return parse(rf"\boxed{{{text}}}", [config], extraction_mode="first_match", parsing_timeout=None)

    sys.stderr = open(os.devnull, "w")
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, 5)
        pair = map(read, sorted(json.loads(line)))      # "(" first: what has an order leads
        print(int(grader.verify(*pair, allow_set_relation_comp=True, timeout_seconds=None)), flush=True)


SERVER = inspect.getsource(sympy_equal) + inspect.getsource(serve) + "serve()"


@lru_cache
def math_server() -> subprocess.Popen:
    """The process that serves, out of reach of the signals that the run gets. Raises UserError where math-verify does
    not work."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        text=True,
        start_new_session=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONHASHSEED": "0"},
    )
    if not server.stdout.readline():
        error = (server.stderr.read().strip() or "it ended").splitlines()[-1]
        raise UserError(f"math-verify does not work ({error}): pip install -U 'math-verify[antlr4_13_2]'")
    return server


def expression(text: str) -> str | None:
    """An answer that can be compared in a second or so, by its size, depth and powers; None where it cannot. Raises
    UserError where none can."""
    math_server()
    latex = clean(text)
    heights = map(int, re.findall(r"[)}\]]\s*\^\D{0,4}([1-9]\d*)", latex))     # to which brackets are raised
    return latex if not HEAVY.search(latex) and math.prod(heights) <= 20 else None


@lru_cache(10_000)
def same_value(reference: str, answer: str) -> bool:
    """Whether two expressions are mathematically equal (github.com/huggingface/Math-Verify). Those that take too long
    are not, and counted in same_math.timeouts."""
    if reference == answer or (reference + answer).isdecimal():
        return reference == answer
    server, reply = math_server(), ""
    try:
        with suppress(BrokenPipeError):
            print(json.dumps([reference, answer]), file=server.stdin, flush=True)
            reply = server.stdout.readline()
    finally:
        if not reply:                       # it took too long, or the run was interrupted: no other may get this reply
            server.kill()
            server.wait()
            math_server.cache_clear()
    same_math.timeouts += not reply
    return reply == "1\n"


def same_math(reference: str, answer: str) -> bool:
    """Whether two answers are equal: words as words, all else as mathematics. A unit may be missing on one side, and
    in a = b = c each link must be right, but for a name."""
    (right, unit), (said, other) = measured(reference), measured(answer)
    if unit != other and (unit and other or "_" in other):
        return False
    chain = "\n" if "=" in right and said.count("=") == 1 else "="
    if chain == "=":
        right, said = unnamed(right), unnamed(said)
    pair = f"{right}\n{said}"
    if PROSE.search(pair):
        return bool(re.fullmatch(r"(?i)(.*)\n\1", re.sub(r"\\text|[ {}()]|(?<!\.)\.(?![.\d])", "", pair)))
    return all(
        same_value(a, b) or "%" in unit + other and same_value(f"{a}{unit}", f"{b}{other}")
        for a, b in itertools.product(right.split(chain), said.split(chain))
    )


same_math.timeouts = 0


@dataclass(frozen=True)
class Grader:
    """Where a completion says what counts, how that is read there and in the reference, and when the two are equal."""

    in_text: Callable[[str], str]
    read: Callable[[str], Any]              # None where it cannot be read
    equal: Callable[[Any, Any], bool] = operator.eq

    def reads(self, reference: str) -> bool:
        return self.read(final_answer(reference)) is not None

    def __call__(self, reference: str, text: str) -> float:
        """Whether they are equal, 1.0 or 0.0, whatever a model wrote. What follows the last thought counts first, then
        the thoughts that have ended; one that never ends holds no answer."""
        thought, end, rest = text.rpartition("</think>")
        answer = self.in_text(rest.partition("<think>")[0]) or self.in_text(thought + end)
        right, said = self.read(final_answer(reference)), self.read(answer)
        return float(None not in (right, said) and self.equal(right, said))


GRADERS = {                                 # what gives (reference, text) a score of 0 to 1
    "exact": Grader(str, spelled),
    "number": Grader(after_marks, number),
    "boxed-number": Grader(last_box, number),
    "boxed-math": Grader(last_box, expression, same_math),
    "tagged-number": Grader(last_answer, number),
}


# ----------------------------------------------------------------------------------------------------------------------
# Questions: loading them


def make_sums() -> dict:
    """Sums of two numbers below 100. Those of the test are held out in both orders."""
    pairs = [divmod(i, 100) for i in permutation(10_000, 0)]
    records = [{"question": f"What is {a} + {b}?", "answer": a + b} for a, b in pairs]
    held_out = {frozenset(pair) for pair in pairs[:400]}
    train = [record for pair, record in zip(pairs, records) if frozenset(pair) not in held_out]
    return {"train": train, "test": records[:400]}


# Data that are made here: a name for --data, and the function that returns each split's records, the same every time.
# No name, as of --few-shot where it is not given, has no splits.
MADE = {"": dict, "sums": make_sums}


def read_file(path: str) -> Iterable[dict]:
    """The records of a Parquet file, of JSON lines or of a list in JSON. Raises what the libraries raise on what is
    none: JSON's errors tell the line."""
    if path.endswith(".parquet"):
        import datasets

        return datasets.Dataset.from_parquet(path)
    text = Path(path).read_text("utf-8-sig")
    if not text.lstrip().startswith("["):   # each line becomes a list with what stands in it: [{…}], or []
        text = "[" + text.replace("\n", "]\n,[") + "]"
    # numbers as they are written, and NaN, pandas' way to say so, for nothing
    return itertools.chain(*json.loads(f"[{text}]", parse_float=Decimal, parse_constant=lambda name: None))


def load_records(place: str) -> dict:
    """The records of each split of what is made here, of a file (it is "train"), a folder, or a dataset on the hub. Of
    the last, a configuration and a split (it is "train" then) can be named: openai/gsm8k:main,
    org/name:configuration:split, org/name::split. Raises UserError where they cannot be had."""
    if place in MADE:
        return MADE[place]()
    path = os.path.expanduser(place)
    with gpt.blaming(
        f"cannot load {place}",
        "name JSON lines or a JSON list in UTF-8, a .parquet, a folder with train.jsonl and test.jsonl, or a "
        "dataset on the hub, by --data or --few-shot, for tests alone by --eval-data (name=place,name=place)",
    ):
        if os.path.isfile(path):
            return {"train": [*read_file(path)]}
        import datasets

        if os.path.isdir(path):             # not by load_dataset: Arrow's columns do not hold all that JSON does
            files = datasets.load_dataset_builder(path).config.data_files
            return {split: [*itertools.chain(*map(read_file, files[split]))] for split in files}
        name, config, split = (place + "::").split(":")[:3]
        return datasets.load_dataset(name, config or None, split={"train": split} if split else None)


def value_in(record: dict, column: str) -> Any:
    """What stands in a column, or, by "column.key", in a part of one. None where there is nothing."""
    for key in [column] if column in record else column.split("."):
        record = (record or {}).get(key)
    return record


def references_in(value: Any) -> Iterator:
    """The references in a text, a number or a list of these; numbers without exponent, 18.0 as 18."""
    for item in value if isinstance(value, list) else [value]:
        if type(item) in (int, float, Decimal):
            item = f"{Decimal(str(item)):f}".removesuffix(".0")
        if not isinstance(item, str | None):
            raise ValueError(f"{item!r} is no text and no number")
        if item and item.strip():
            yield item


SHAPES = (
    "see --prompt-key (texts, or messages: a system's, if any, the user's and the assistant's by turns, the user's "
    "last), --answer-key (texts, numbers, lists of these; column.key is a part), --system or --few-shot (one system)"
)


def messages_of(question: Any, before: list[dict], suffix: str) -> list[dict]:
    """The chat that asks a question: a text, around which `before` and the suffix come, or messages as they are. Raises
    ValueError, TypeError or LookupError on what is neither."""
    if isinstance(question, str):
        question = [*before, {"role": "user", "content": question + suffix}]
    messages = [{"role": m["role"], "content": "" + m["content"]} for m in question]
    roles = " ".join(m["role"] for m in messages)
    if not re.fullmatch("(system )?(user assistant )*user", roles):
        raise ValueError(f"the roles are {roles}")
    return messages


def load_examples(flags: Flags, tokenizer: Any, limit: int, place: str, *splits: str) -> list[Example]:
    """The questions of the first of these splits that a place has, ready to ask, in an order that is always the same.
    Those that take more than `limit` tokens to ask, or cannot be graded, are left out and counted. Raises UserError
    on what is no question or no reference, and where none is left."""
    grader = GRADERS[flags.grader]          # a Grader, or any function
    before = [{"role": "system", "content": flags.system}] * bool(flags.system)
    mend = "give a JSON list of messages, the assistant's last, and one system's at most, there or by --system"
    with gpt.blaming(f"--few-shot {flags.few_shot} cannot be used", mend):
        before += load_records(flags.few_shot).get("train", [])
        messages_of("", before, "")
    found, where = load_records(place), f"{splits[0]} of {place or 'no --data'}"
    records = next((found[split] for split in splits if split in found), [])
    examples, long = [], 0
    for i in permutation(len(records), 42):  # as Dataset.shuffle(seed=42) does
        with gpt.blaming(f"row {i} of {where} cannot be used", SHAPES):
            question = value_in(records[i], flags.prompt_key) or ""
            references = references_in(value_in(records[i], flags.answer_key))
            references = [*filter(getattr(grader, "reads", bool), references)]
            messages = messages_of(question, before, flags.suffix)
            prompt = tokenizer.encode_raw(question) if flags.raw_prompt else tokenizer.render(messages)
        thought = "<think>" * tokenizer.decode(prompt).rstrip().endswith("<think>")
        opening = "" if flags.grader == "exact" else thought + flags.prefill
        prompt += tokenizer.encode(flags.prefill)
        if len(prompt) > limit:
            long += 1
        elif question and references:
            asked = messages[-1]["content"].removesuffix(flags.suffix)
            examples.append(Example(i, asked, prompt, opening, references, flags.grader))
    told = (
        f"{len(examples)} of {len(records)} questions in {where} can be asked: {long} are longer than the {limit} "
        f"tokens that --max-new-tokens leaves of the model's positions, {len(records) - long - len(examples)} lack a "
        "question or an answer that the grader can read"
    )
    if not examples:
        columns = ", ".join(next(iter(records), ()))
        raise UserError(f"{told}: see --data (--max-steps=0 does without), --eval-data, --prompt-key, --answer-key "
                        f"(among {columns}), --grader")
    if len(examples) < len(records):
        say(told)
    return examples


def load_task(flags: Flags, tokenizer: Any, limit: int) -> tuple[list[Example], dict]:
    """The training questions, and the test questions by the name of their metrics. Raises UserError."""
    places = re.findall(r"(?:([\w.-]+)=)?(.+?)(?:,(?=[\w.-]+=)|$)", flags.eval_data) or [("", flags.data)]
    questions = load_examples(flags, tokenizer, limit, flags.data, "train") if flags.max_steps != 0 else []
    known, tests = {example.question for example in questions}, {}
    for name, place in places:
        if name in tests:
            raise UserError(f"--eval-data has two of the name {name}: give each its own")
        own = Flags(**TASKS[name]) if name in TASKS and name != flags.task else flags
        tests[name] = load_examples(own, tokenizer, limit, place, "test", "validation", "train")
        if both := sum(example.question in known for example in tests[name]):
            say(f"{both} test questions in {place} are training questions too: --eval-data names others")
    return questions, tests


# ----------------------------------------------------------------------------------------------------------------------
# What a person sees


def say(text: str) -> None:
    """Prints, past all buffers: a terminal that is gone, or a full disk behind it, is not worth the run."""
    if sys.stdout:
        with suppress(OSError):
            os.write(1, f"{text}\n".encode())


def progress_bar(total: int, title: str, unit: str, rank: int = 0) -> tqdm:
    """A bar on rank 0's terminal, for work that takes more than a second or two."""
    silent = None if rank == 0 and sys.stderr else True  # None: where there is no terminal
    return tqdm(range(total), desc=title, unit=unit, leave=False, delay=1.5, disable=silent)


def write_lines(path: Path, records: Iterable[dict]) -> None:
    gpt.write_file(path, "".join(json.dumps(record) + "\n" for record in records).encode())


PANELS = [                                  # of curve.png: metrics that share a picture; the evaluations have their own
    ["reward"],
    ["completion_length"],
    ["truncated"],
    ["entropy"],
    ["grad_norm"],
    ["approx_kl"],
    ["rollout_seconds", "update_seconds"],
]


class Log:
    """metrics.jsonl, a line for each step and the evaluation before it, samples_<step>.jsonl and curve.png in the run's
    folder; the same names to TensorBoard and W&B."""

    def __init__(self, run: Run):
        """Takes up the log at the run's step: what an interrupted run wrote after it is gone with the next line."""
        self.out, self.path = run.out, run.out / "metrics.jsonl"
        texts = self.path.read_text().splitlines() if self.path.exists() else []
        self.lines = {line["step"]: line for line in map(json.loads, texts) if line["step"] <= run.step}
        self.wandb = self.tensorboard = None
        if run.flags.run != "dummy":
            with self.best_effort():
                import wandb

                self.wandb = wandb.init(
                    project=os.environ.get("WANDB_PROJECT", "chat_rl"),
                    name=run.flags.run,
                    id=run.wandb_id,
                    resume="allow",
                    dir=str(run.out),
                    config=asdict(run.flags),
                    settings=wandb.Settings(init_timeout=20),
                )
        if run.flags.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(run.out / "tensorboard", purge_step=run.step)

    @contextmanager
    def best_effort(self) -> Iterator[None]:
        """For work with W&B. No network, no account, no service: none of them is worth the run."""
        try:
            yield
        except Exception as error:
            self.wandb = None
            say(
                f"warning: no W&B ({gpt.one_line(error)}); the run goes on, its figures are in {self.path}. "
                "Set WANDB_MODE=offline to keep them for `wandb sync`."
            )

    def write(self, step: int, metrics: dict) -> None:
        """Adds to the step's line, with null for what is infinite or not a number: the file is always whole."""
        new = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self.lines.setdefault(step, {"step": step}).update(new)
        write_lines(self.path, self.lines.values())
        with self.best_effort():
            if self.wandb:                  # steps that it has seen already it passes over
                self.wandb.log(new, step=step)
        if self.tensorboard:
            for key, value in metrics.items():
                self.tensorboard.add_scalar(key, value, step)

    def history(self, key: str) -> list:
        """The values of a metric so far."""
        return [line[key] for line in self.lines.values() if line.get(key) is not None]

    def seconds_left(self, run: Run) -> float:
        """After a step: as many steps as are left, each as long as the mean of the last ten, and evaluations."""
        step = sum(statistics.fmean(self.history(key)[-10:]) for key in ("rollout_seconds", "update_seconds"))
        evaluations = math.ceil(run.num_steps / run.flags.eval_every) - run.step // run.flags.eval_every
        return (run.num_steps - run.step - 1) * step + evaluations * [0.0, *self.history("evaluation_seconds")][-1]

    def write_step(self, run: Run, metrics: dict, groups: list[Group]) -> None:
        """The metrics, and in steps that begin with an evaluation every completion too; says how it goes."""
        self.write(run.step, metrics)
        text = (
            f"step {run.step}/{run.num_steps}  reward {metrics['reward']:.3f}  "
            f"length {metrics['completion_length']:.1f}  {metrics['tokens_per_second']:,.0f} tok/s  "
            f"left {timedelta(seconds=round(self.seconds_left(run)))}"
        )
        if metrics["updates_left_out"]:
            text += f"  updates left out, as their mean ratio was above --max-ratio: {metrics['updates_left_out']}"
        if not math.isfinite(metrics["grad_norm"]):
            text += "  a gradient is not finite: its update is left out"
        say(text)
        learned = self.history("advantage_tokens")
        if len(learned) == 10 and not any(learned):
            say("all rewards of a question agreed so far, so there is nothing to learn from: try a few-shot prefix "
                "(--few-shot), a larger --num-samples, or an easier task; where all are right, a harder one")
        if run.step % run.flags.eval_every == 0:
            self.write_samples(f"samples_{run.step:06d}_train.jsonl", {"train": groups})

    def write_evaluation(self, run: Run, metrics: dict, groups: dict[str, list[Group]]) -> None:
        """The metrics, every sampled completion by the name of its data, and the picture; prints a right and a wrong
        completion of the first question of each that has both."""
        self.lines.pop(run.step, None)      # of one that is made again
        self.write(run.step, metrics)
        say(f"step {run.step}/{run.num_steps}  {describe_evaluation(metrics)}")
        self.write_samples(f"samples_{run.step:06d}.jsonl", groups)
        for answered in groups.values():
            group = max(answered, key=lambda group: len({score >= 1 for score in group.scores}))
            shown = {"question": group.example.question, "reference": final_answer(group.example.references[0])}
            shown |= {"right" if score >= 1 else "wrong": text for score, text in zip(group.scores, group.texts)}
            for title, text in shown.items():
                say(f"  {title:9}  {textwrap.shorten(text, 600, placeholder=' …')}")
        self.plot()

    def write_samples(self, name: str, groups: dict[str, list[Group]]) -> None:
        records = [
            {
                "data": data,
                "question": group.example.question,
                "reference": " or ".join(group.example.references),
                "completions": group.texts,
                "scores": group.scores,
                "rewards": group.rewards,
            }
            for data, answered in groups.items()
            for group in answered
        ]
        write_lines(self.out / name, records)

    def plot(self) -> None:
        """Draws curve.png anew: the metrics of the steps with their means over ten of them, and the evaluations with
        their standard errors."""
        import pandas
        from matplotlib.figure import Figure

        table = pandas.DataFrame(self.lines.values()).set_index("step")
        figure = Figure(figsize=(16, 7), layout="constrained")
        first, *others = figure.subplots(2, (len(PANELS) + 2) // 2).flat
        tests = table[evaluation_keys(table)].dropna(how="all")
        errors = table.loc[tests.index, tests.columns + "_error"].T.to_numpy()
        tests.plot(ax=first, yerr=errors, capsize=3, marker=".", ylim=(0, 1.05))
        for axes, keys in zip(others, PANELS):
            steps = table.reindex(columns=keys).dropna()
            axes.plot(steps, color="lightgray")
            axes.axhspan(0, 1e-4, alpha=0)  # the axis includes 0
            steps.rolling(10, min_periods=1).mean().plot(ax=axes)
        gpt.write_file(self.out / "curve.png", partial(figure.savefig, dpi=100, format="png"))

    def close(self, run: Run, interrupted: bool) -> None:
        """Says what the run has changed, and where to look."""
        if interrupted:
            hint = ": go on with --resume" if run.step else ""
            say(f"interrupted after {run.step} of {run.num_steps} steps{hint}")
        rewards = self.history("reward")
        tests = [describe_evaluation(line) for line in self.lines.values() if evaluation_keys(line)]
        if rewards and tests:
            say(f"before  {tests[0]}\nafter   {tests[-1]}\nreward  {rewards[0]:.3f} → {rewards[-1]:.3f}")
            self.plot()
        say(f"curve.png and all else in {self.out}")
        with self.best_effort():
            if self.wandb:
                self.wandb.finish()
        if self.tensorboard:
            self.tensorboard.close()


def evaluation_keys(keys: Iterable[str]) -> list[str]:
    """pass@k for some powers of two, and the greedy accuracy, of each test."""
    return [key for key in keys if re.search("(pass@(1|2|4|8|16|32|64|128)|greedy)$", key)]


def describe_evaluation(metrics: dict) -> str:
    return "  ".join(
        f"{key} {metrics[key]:.3f} ± {metrics[key + '_error']:.3f}" for key in evaluation_keys(metrics)
    )


# ----------------------------------------------------------------------------------------------------------------------
# The starter: a model for those who have none


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and nanochat's special ones."""
    plain = {bytes([i]): i for i in range(256)}
    special = {f"<|{name}|>": 256 + i for i, name in enumerate(Tokenizer.SPECIAL)}
    return Tokenizer(tiktoken.Encoding("bytes", pat_str="(?s:.)", mergeable_ranks=plain, special_tokens=special))


def teach(learner: Learner, tokenizer: Tokenizer, examples: list[Example], goal: float) -> None:
    """Supervised learning of the references, 128 questions a step, until their mean probability, which the loss knows,
    reaches `goal`, or for 1,000 steps."""
    policy = Policy(1.0, 0, learner.model.config.softcap)
    chance = 0.0                            # of the reference, as a running mean
    for step in progress_bar(1000, "starter", "step"):
        batch = [examples[i] for i in permutation(len(examples), step)[:128]]
        answers = [[*tokenizer.encode(example.references[0]), tokenizer.stops[0]] for example in batch]
        lessons = [Completion(numpy.array(x), numpy.ones(len(x), bool), numpy.zeros(len(x))) for x in answers]
        prefix = gpt.prefix_of(learner.model, [example.prompt for example in batch])
        logprobs, owners = gpt.completion_logprobs(learner.model, prefix, lessons, policy)
        right = torch.zeros(len(batch)).index_add(0, owners, logprobs.detach()).exp().mean().item()
        chance += 0.2 * (right - chance)
        if chance >= goal:
            break
        learner.model.zero_grad(set_to_none=False)
        (-logprobs.sum()).backward()
        learner.update(len(logprobs))


def make_starter(folder: Path) -> None:
    """Makes a tiny GPT, teaches it to be right six times in ten, and saves it as an SFT checkpoint."""
    tokenizer = byte_tokenizer()
    shape = dict(sequence_len=256, vocab_size=tokenizer.vocab_size, n_layer=4, n_head=4, n_kv_head=4, n_embd=128)
    model = GPT(gpt.nanochat_config("current", **shape, vocab_rows=320)).init_weights(seed=4)
    model.raw_config = shape
    flags = Flags(**TASKS["arithmetic"])
    learner = Learner(model, Ranks(torch.device("cpu")), torch.float32, flags)
    examples = load_examples(flags, tokenizer, shape["sequence_len"], flags.data, "train")
    teach(learner, tokenizer, examples, goal=0.6)
    gpt.save_checkpoint(folder, learner.updates, learner.model, learner.model.state_dict(), tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# The run


def find_source(tag: str, base: Path) -> tuple[str, str]:
    """What --model-tag names, a folder or a name on the hub, and the name of its runs. Raises UserError."""
    home = base / "chatsft_checkpoints"
    ages = {"starter": 0.0} | {path.parent.name: path.parent.stat().st_mtime for path in home.glob("*/model_*.pt")}
    # as nanochat chooses: the largest d<N>, or the newest
    tag = tag or max(ages, key=lambda tag: ([*map(int, re.findall(r"^d(\d+)", tag))], ages[tag]))
    if tag in ages:
        return str(home / tag), tag
    path = Path(os.path.expanduser(tag)).resolve()
    if path.is_dir():
        return str(path), path.parent.name if path.name.isdigit() else path.name  # a step's folder in a run's
    if re.fullmatch(r"[\w.-]+/[\w.-]+", tag):
        return tag, path.name
    raise UserError(f"no model tag {tag} in {home}: choose one of {', '.join(sorted(ages))}, a folder with model_*.pt "
                    "or config.json and *.safetensors, or a hub name")


def find_state(out: Path, step: int | None) -> dict:
    """What the newest optim_<step>.pt that can be read holds, or that of a step where one is given that the run was
    not given before: torchrun gives it again after a crash. {} where there is none. Raises UserError where there are
    some, but not that."""
    paths = sorted(out.glob("optim_*.pt"), reverse=True)
    for path in paths:
        try:
            state = gpt.read_state(path)
            if step in (None, state["step"], state["flags"]["model_step"]):
                return state
        except Exception as error:          # damaged and foreign files fail in many ways
            say(f"passing over {path}: {gpt.one_line(error)}")
    if paths:
        raise UserError(f"--resume: nothing to go on from in {out}: take another --model-step, of "
                        f"{', '.join(path.stem[6:] for path in paths)}, or leave out --resume to begin anew")
    say(f"nothing to resume in {out}: beginning anew")
    return {}


def find_run(argv: list[str], base: Path) -> tuple[Path, dict]:
    """A run's folder, and the state that it goes on from, without flags where it begins. Raises UserError."""
    given = parse_flags(argv, {})
    source, name = find_source(given.model_tag, base)
    place = base / "chatrl_checkpoints" / ("evaluations" if given.max_steps == 0 and not given.resume else "")
    out = place.resolve() / (given.name or name)
    state = find_state(out, given.model_step) if given.resume else {}
    if state:
        say(f"going on after {state['step']} steps of {out}, begun from {state['source']}, with {' '.join(argv)}")
        return out, state
    if source.endswith("/chatsft_checkpoints/starter"):
        with filelock.FileLock(base / ".starter.lock"):  # one run makes it, others wait
            if not gpt.checkpoint_steps(Path(source)):
                say(f"making the starter, a tiny GPT that is right six times in ten, in {base}; --model-tag names "
                    "another model")
                make_starter(Path(source))
    if Path(source).exists():               # else a name on the hub
        source = str(gpt.find_checkpoint(Path(source), given.model_step))
        if Path(source).resolve().is_relative_to(out):
            raise UserError(f"{out} is what the run would begin from: give it another --name")
    return out, {"step": 0, "flags": {}, "source": source, "wandb_id": os.urandom(4).hex()}


def load_model(place: str, flags: Flags) -> tuple[GPT, Any]:
    """The model and the tokenizer of a checkpoint or a hub's name. Raises UserError."""
    with gpt.blaming("--chat-template or --chat-template-kwargs cannot be read", "give a text file, a JSON object"):
        variables = {"date_string": "26 Jul 2024"} | json.loads(flags.chat_template_kwargs)  # Llama's own day, on any
        if flags.chat_template:             # an empty file is none
            variables["chat_template"] = Path(flags.chat_template).expanduser().read_text(encoding="utf-8") or None
    return gpt.load_checkpoint(gpt.find_folder(place), lora_rank=flags.lora_rank, variables=variables)


def open_folder(run: Run, stack: ExitStack) -> None:
    """Makes the run's folder, with a copy of the scripts, and keeps other runs out of it while the stack is open and
    this process alive. What an earlier run left there, or this one after the step that it goes on from, is moved to
    previous/. Raises UserError."""
    out = run.out
    scripts = [(Path(file).name, Path(file).read_bytes()) for file in (__file__, gpt.__file__)]  # that run's own, maybe
    with gpt.blaming(f"cannot write to {out}", "set NANOCHAT_BASE_DIR to a folder that you can write to"):
        try:
            stack.enter_context(filelock.FileLock(out.with_name(f".{out.name}.lock"), timeout=0))
        except filelock.Timeout:
            raise UserError(f"another run is writing to {out}: wait for its end, or give this one a --name") from None
        place = out.parent / "previous" / f"{out.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
        for path in sorted(out.glob("*")):
            of_step = re.fullmatch(r"(?:[a-z]+_)?(\d{6,})(?:_train)?(?:\.pt|\.jsonl?)?(?:\.part)?", path.name)
            if not run.step or of_step and int(of_step[1]) > run.step:
                os.renames(path, place / path.name)
        if place.exists():
            say(f"files that were in {out} are now in {place}")
        about = {"flags": asdict(run.flags), "source": run.source, "torch": torch.__version__}
        gpt.write_file(out / "run.json", json.dumps(about, indent=2).encode())
        for name, text in scripts:
            gpt.write_file(out / name, text)


def prepare(argv: list[str], stack: ExitStack) -> tuple[Run, GPT, dict]:
    """Finds, loads and opens all that a run needs: the run, the model that it begins with, and the state of what it
    goes on from. The run's folder stays locked as long as the stack is open. Raises UserError on what is amiss."""
    base = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser().resolve()
    out, state = find_run(argv, base)
    source, done = state["source"], state["step"]
    flags = parse_flags(argv, state["flags"])
    if done and (flags.task, flags.lora_rank) != (state["flags"]["task"], state["flags"]["lora_rank"]):
        raise UserError("--task and --lora-rank are a run's for good: leave out --resume to begin anew")
    place = source
    if done and not flags.lora_rank:        # a run has all of its weights; adapters want those that they adapt
        place = str(gpt.find_checkpoint(out, done))
    model, tokenizer = load_model(place, flags)
    if not done:
        kind = "nanochat" if isinstance(tokenizer, Tokenizer) else "huggingface"
        flags = settle_flags(argv, "starter" if "/chatsft_checkpoints/starter/" in source else kind)
    questions, tests = load_task(flags, tokenizer, limit=model.config.max_positions - flags.max_new_tokens)
    per_epoch = len(questions) // flags.examples_per_step
    if questions and not per_epoch:
        raise UserError(f"{len(questions)} training questions are too few for a step: lower --examples-per-step")
    num_steps = flags.num_epochs * per_epoch if flags.max_steps is None else flags.max_steps
    run = Run(flags, questions, tests, tokenizer, out, max(done, num_steps), source, state["wandb_id"], done)
    open_folder(run, stack)
    return run, model, state


def make_learner(run: Run, model: GPT | None, state: dict, ranks: Ranks) -> Learner:
    """What learns, on every rank, from rank 0's model and the state that it goes on from."""
    flags = run.flags
    fast = ranks.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = flags.dtype or ("bfloat16" if fast else "float32")
    learner = Learner(model, ranks, getattr(torch, dtype), flags if run.num_steps else None)
    learner.model.recompute = flags.recompute
    if run.step:
        learner.load_state(state)
    return learner


def save(run: Run, learner: Learner) -> None:
    """Writes a checkpoint to load here and in nanochat or transformers, and last what the run can go on from, of which
    it keeps the last two. Raises OSError."""
    state = learner.save_state()
    if learner.ranks.rank:
        return
    weights = learner.model.state_dict() | state["masters"]
    gpt.save_checkpoint(run.out, run.step, learner.model, weights, run.tokenizer, run.source)
    state |= {"step": run.step, "flags": asdict(run.flags), "source": run.source, "wandb_id": run.wandb_id}
    gpt.write_file(run.out / f"optim_{run.step:06d}.pt", partial(torch.save, state))
    for path in sorted(run.out.glob("optim_*.pt"))[:-2]:
        path.unlink()


def start(argv: list[str], stack: ExitStack) -> int:
    """A run from its beginning to its end, on every rank. Returns the exit status."""
    ranks = gpt.start_ranks(parse_flags(argv, {}).device_type)
    run, model, state = None, None, {}
    if ranks.rank == 0:
        try:
            run, model, state = prepare(argv, stack)
        except UserError as error:
            run = error                     # which ends the others too
    run = ranks.from_main(run)
    if isinstance(run, UserError):
        raise run
    learner = make_learner(run, model, state, ranks)
    del model, state
    status = train(run, learner)
    if dist.is_initialized():
        dist.barrier()                      # no rank leaves while another is still talking to it
        dist.destroy_process_group()
    return status


def main(argv: list[str]) -> int:
    """Runs, and returns the exit status: 2 where something was amiss from the start, 1 where it went wrong later, 128
    + its number where a signal ended it."""
    text, status = "", 1
    with ExitStack() as stack:
        try:
            status = start(argv, stack)
        except torch.OutOfMemoryError:
            text = ("the device's memory is full: lower --rollout-batch-size where it samples, --device-batch-size "
                    "where it learns, or --recompute, and go on with --resume")
        except KeyboardInterrupt:           # before a run listens
            status = 128 + signal.SIGINT
        except UserError as error:          # of all ranks: said once on each machine
            status = 2
            if os.environ.get("LOCAL_RANK", "0") == "0":
                text = f"{error}"
        except (OSError, FloatingPointError) as error:
            text = f"{error}: mend that, and go on with --resume"
    if text:
        print(f"chat_rl: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if "RANK" in os.environ:                # gloo's threads now and then abort an interpreter that shuts down in order
        os._exit(status)
    sys.exit(status)
