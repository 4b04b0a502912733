"""Reinforcement learning for a small chat GPT: from a nanochat SFT checkpoint to a better one.

    python chat_rl.py                                       # one GPU, or a CPU; makes its own tiny model if you have none
    torchrun --nproc_per_node=8 chat_rl.py --model-tag=d24  # eight GPUs

Each step asks a few questions, samples a group of completions to each, rewards each, and takes one step uphill:

    advantage = reward − mean reward of the completion's group
    loss      = −Σ advantage · log π(token) / number of sampled tokens in the step,   over the sampled tokens

That is REINFORCE (Williams 1992) with the group's mean for a baseline, or what is left of GRPO (Shao et al. 2024) when
 1. every rollout is used once, by the policy that sampled it: no importance ratio, no clipping,
 2. there is no reference model: no KL penalty,
 3. advantages are not divided by the group's standard deviation, which favours questions nearly all right or all wrong,
 4. the loss is normalised by the tokens of the whole step (DAPO, Yu et al. 2025): each counts the same, in any batch.

The policy is the distribution that is sampled from, after temperature and top-k, in the loss as in the sampler. Tokens
that the calculator forced are attended to but not learned. The machine behind this (ranks, model, cache, sampler,
tokenizer, checkpoints, optimizers) is gpt.py.
"""
from __future__ import annotations

import argparse
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import gpt
from gpt import GPT, Completion, Policy, Ranks, Sampler, Tokenizer, UserError

# ----------------------------------------------------------------------------------------------------------------------
# Flags


def flag(default: Any, help: str, low: float = -math.inf, choices: tuple = (), resumable: bool = False) -> Any:
    """A field of Flags: its default, its one line of help, the least value it may have or the values to choose from.
    One that is resumable may change when a run goes on: it does not change what is computed, beyond rounding."""
    return field(default=default, metadata=dict(help=help, low=low, choices=choices, resumable=resumable))


@dataclass
class Flags:
    run: str = flag("dummy", "name of the Weights & Biases run (dummy: do not use W&B)", resumable=True)
    device_type: str = flag("", "cuda, mps or cpu (default: the first of these that is there)",
                            choices=("", "cuda", "mps", "cpu"), resumable=True)
    dtype: str = flag("", "of the arithmetic (default: bfloat16 where the GPU has it, else float32)",
                      choices=("", "bfloat16", "float32"))
    model_tag: str | None = flag(None, "SFT checkpoint: a tag such as d20, or a folder with model_*.pt (default: largest d<N>)",
                                 resumable=True)
    model_step: int | None = flag(None, "step of that checkpoint (default: the last)", low=0, resumable=True)
    task: str | None = flag(None, "gsm8k or arithmetic (default: arithmetic with the starter, else gsm8k)")
    data: str = flag("openai/gsm8k", "GSM8K by its hub name, or a local folder with its train and test files", resumable=True)
    num_epochs: int = flag(1, "passes over the training questions", low=1)
    max_steps: int | None = flag(None, "length of the run in steps (default: that of the epochs; 0 evaluates and exits)", low=0)
    examples_per_step: int = flag(16, "questions per step, over all ranks", low=1)
    num_samples: int = flag(16, "completions sampled per question", low=2)
    max_new_tokens: int = flag(256, "length limit of a completion, in tokens", low=1)
    temperature: float = flag(1.0, "of sampling in training (above 0)", low=1e-6)
    top_k: int = flag(50, "sample from the k likeliest tokens, in training and evaluation (0: from all)", low=0)
    rollout_batch_size: int = flag(256, "rows sampled at once, rounded up to whole groups (0: no bound)", low=0, resumable=True)
    device_batch_size: int = flag(8, "rows in one forward and backward: less takes less memory", low=1, resumable=True)
    embedding_lr: float = flag(0.2, "learning rate of the embeddings (Adam)", low=0)
    unembedding_lr: float = flag(0.004, "learning rate of the unembedding (Adam)", low=0)
    matrix_lr: float = flag(0.02, "learning rate of the matrices (Muon)", low=0)
    weight_decay: float = flag(0.0, "of the embedding and the unembedding (Adam)", low=0)
    init_lr_frac: float = flag(0.05, "all rates start at this fraction and fall linearly to zero", low=0)
    eval_every: int = flag(60, "steps between evaluations", low=1, resumable=True)
    eval_examples: int = flag(400, "test questions in an evaluation", low=1)
    eval_samples: int = flag(8, "completions per test question: pass@k for k = 1 … that", low=1)
    save_every: int = flag(60, "steps between checkpoints", low=1, resumable=True)
    keep_last: int = flag(2, "checkpoints that keep their optimizer state, to resume from", low=1, resumable=True)
    resume: bool = flag(False, "go on from the last complete checkpoint of this tag's RL run, if there is one", resumable=True)
    seed: int = flag(42, "of the order of questions and of sampling", low=0)


# ----------------------------------------------------------------------------------------------------------------------
# The algorithm


@dataclass
class Example:
    """A question to ask."""
    index: int                              # its place in the data, which names its random numbers
    question: str
    reference: str                          # what the data say, for the grader


@dataclass
class Group:
    """A question, the completions that were sampled for it, and what they were worth."""
    example: Example
    prompt: list[int]
    completions: list[Completion]
    scores: list[float] = field(default_factory=list)           # what the grader gave, 0 to 1
    rewards: list[float] = field(default_factory=list)          # what is learned from
    advantages: list[float] = field(default_factory=list)


def reward_of(score: float) -> float:
    """What a completion's score is worth."""
    return score


def advantages_of(rewards: list[float]) -> list[float]:
    """Reward − mean of the group: exactly zero where all rewards agree."""
    mean = statistics.mean(rewards)
    return [reward - mean for reward in rewards]


def loss_of(logprobs: Tensor, sampled_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The loss of each sampled token (M,), given its logprob under the policy now, that under the policy that sampled it,
    and the advantage of its completion. The division by the number of tokens comes later."""
    return -advantages * logprobs


@dataclass
class Run:
    """What a run is, the same on every rank; no tensors."""
    flags: Flags
    task: Task
    train: list[Example]
    test: list[Example]
    tokenizer: Tokenizer
    meta: dict                              # what every checkpoint's meta file says: model config, flags, source, W&B id
    out: Path
    num_steps: int
    step: int                               # updates done


@dataclass
class Learner:
    """What learns, on every rank."""
    model: GPT
    sampler: Sampler
    weights: Tensor                         # all that learn, as one vector: the model's parameters are views of it
    gradient: Tensor                        # likewise
    optimizers: list[torch.optim.Optimizer]     # on rank 0

    def policy(self, temperature: float, top_k: int) -> Policy:
        return Policy(temperature, top_k, self.model.config.softcap)


TRAINING, EVALUATION = 0, 1                 # what a random number is for is part of its seed


def questions_of_step(run: Run, step: int) -> list[Example]:
    """The training questions of a step: each epoch goes through them in an order of its own."""
    size = run.flags.examples_per_step
    epoch, place = divmod(step, len(run.train) // size)
    generator = torch.Generator().manual_seed(int(gpt.fold(run.flags.seed, epoch)))
    order = torch.randperm(len(run.train), generator=generator)
    return [run.train[i] for i in order[place * size:(place + 1) * size].tolist()]


def rollout(run: Run, sampler: Sampler, examples: list[Example], num_samples: int, policy: Policy, seed: int,
            title: str) -> list[Group]:
    """Samples `num_samples` completions of each example, about `rollout_batch_size` rows at once."""
    groups, rows = [], run.flags.rollout_batch_size or len(examples) * num_samples
    with progress_bar(len(examples) * num_samples, title, "completion") as bar:
        for part in batched(examples, math.ceil(rows / num_samples)):
            prompts = [run.tokenizer.render(run.task.messages(example)) for example in part]
            completions = sampler.generate(prompts, num_samples, run.flags.max_new_tokens, policy, seed,
                                           keys=[example.index for example in part], progress=bar.update)
            groups += map(Group, part, prompts, completions)
    return groups


def grade(run: Run, groups: list[Group]) -> list[Group]:
    """Scores and rewards every completion, and compares it with its group."""
    for group in groups:
        texts = [text_of(completion, run.tokenizer) for completion in group.completions]
        group.scores = [run.task.grader(group.example.reference, text) for text in texts]
        group.rewards = [reward_of(score) for score in group.scores]
        group.advantages = advantages_of(group.rewards)
    return groups


def text_of(completion: Completion, tokenizer: Tokenizer) -> str:
    """What the model said, without the token that ended its turn."""
    tokens = completion.tokens
    return tokenizer.decode(tokens[:-1] if tokens[-1] in tokenizer.stops else tokens)


def tally(groups: list[Group], stops: tuple[int, ...]) -> dict[str, float]:
    """What a rollout's metrics are made of, to be added up over the ranks."""
    completions = [completion for group in groups for completion in group.completions]
    return {"questions": len(groups), "completions": len(completions),
            "reward": sum(sum(group.rewards) for group in groups),
            "all_right": sum(min(group.scores) >= 1 for group in groups),
            "all_wrong": sum(max(group.scores) < 1 for group in groups),
            "tokens": sum(len(c.tokens) for c in completions),
            "truncated": sum(c.tokens[-1] not in stops for c in completions),
            "sampled": sum(sum(c.mask) for c in completions),
            "logprob": sum(sum(c.logprobs) for c in completions)}


def backward(model: GPT, groups: list[Group], policy: Policy, size: int, loss: Callable = loss_of) -> dict[str, float]:
    """Adds the gradient of the loss, summed over the sampled tokens, to that of the model, `size` rows at once. Completions
    without advantage, so whole groups whose rewards agree, are not run. Returns the number of tokens that were learned from
    and the sum of their |sampler − trainer| logprobs.

    A question runs forward once and backward once, whatever the batch: its completions read copies of what it left in the
    cache, and the gradients that they leave there are sent back through it in the end.
    """
    sums = {"learned": 0, "gap": 0.0}
    for part in batched([group for group in groups if any(group.advantages)], size):
        prefix = gpt.prefill(model, [group.prompt for group in part])
        leaves = prefix.leaves()
        rows = [(i, completion, advantage) for i, group in enumerate(part)
                for completion, advantage in zip(group.completions, group.advantages) if advantage]
        rows.sort(key=lambda row: len(row[1].tokens))
        for batch in batched(rows, size):
            question, completions, advantages = zip(*batch)
            index = torch.tensor(question, device=model.device)
            logprobs, row = gpt.completion_logprobs(model, leaves.rows(index), completions, policy)
            sampled = torch.tensor([p for c in completions for p, mask in zip(c.logprobs, c.mask) if mask], device=model.device)
            losses = loss(logprobs, sampled, torch.tensor(advantages, device=model.device)[row])
            losses.sum().backward()
            sums["gap"] += (logprobs.detach() - sampled).abs().sum().item()
            sums["learned"] += len(sampled)
        prefix.backward(leaves)
    return sums


def update(run: Run, learner: Learner, ranks: Ranks, num_tokens: float, learned: float) -> float:
    """Adds up the ranks' gradients, divides by the number of tokens, and steps: rank 0 alone, whose weights all take over.
    Returns the norm of the gradient; where it is not finite, or nothing was learned, no step is made."""
    ranks.reduce(learner.gradient)
    norm = 0.0
    if ranks.rank == 0:
        norm = learner.gradient.div_(num_tokens).norm().item()
    norm = ranks.sum({"norm": norm})["norm"]
    if learned and math.isfinite(norm):
        gpt.step_optimizers(learner.optimizers, run.flags.init_lr_frac * (1 - run.step / run.num_steps))
        ranks.broadcast(learner.weights)
        learner.sampler.refresh()
    return norm


def step(run: Run, learner: Learner, ranks: Ranks) -> dict | None:
    """One step: sample, grade, learn. Returns its metrics, or None where a signal has cut the rollout short."""
    flags, begun = run.flags, time.monotonic()
    examples = questions_of_step(run, run.step)[ranks.rank::ranks.size]
    policy, seed = learner.policy(flags.temperature, flags.top_k), int(gpt.fold(flags.seed, TRAINING, run.step))
    groups = ranks.attempt(lambda: grade(run, rollout(
        run, learner.sampler, examples, flags.num_samples, policy, seed, f"step {run.step}")))
    if ranks.stopping():
        return None
    total = ranks.sum(tally(groups, run.tokenizer.stops))
    rolled_out = time.monotonic()                       # on all ranks

    learner.gradient.zero_()
    sums = ranks.sum(backward(learner.model, groups, policy, flags.device_batch_size))
    norm = update(run, learner, ranks, total["sampled"], sums["learned"])
    done = time.monotonic()

    return {"reward": total["reward"] / total["completions"],
            "all_right": total["all_right"] / total["questions"],
            "all_wrong": total["all_wrong"] / total["questions"],
            "completion_length": total["tokens"] / total["completions"],
            "truncated": total["truncated"] / total["completions"],
            "entropy": -total["logprob"] / total["sampled"],
            "grad_norm": norm,
            "lrm": 1 - run.step / run.num_steps,
            "sampler_gap": sums["gap"] / max(sums["learned"], 1),
            "rollout_seconds": rolled_out - begun,
            "update_seconds": done - rolled_out,
            "tokens_per_second": total["tokens"] / (rolled_out - begun)}


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n of them: 1 − C(n−c, k) / C(n, k) (Chen et
    al. 2021)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def evaluate(run: Run, learner: Learner, ranks: Ranks) -> tuple[dict, list[Group]]:
    """pass@k for k = 1 … eval_samples at temperature 1 and the greedy accuracy on the first eval_examples test questions,
    with the same random numbers every time. Rank 0 gets the metrics and all groups, others nothing."""
    n, seed = run.flags.eval_samples, int(gpt.fold(run.flags.seed, EVALUATION))
    mine = run.test[:run.flags.eval_examples][ranks.rank::ranks.size]

    def attempt(n: int, top_k: int, title: str) -> list[Group]:
        policy = learner.policy(1.0, top_k)
        return ranks.attempt(lambda: grade(run, rollout(run, learner.sampler, mine, n, policy, seed, title)))

    sampled = attempt(n, run.flags.top_k, "evaluation")
    greedy = attempt(1, 1, "evaluation, greedy")
    if ranks.stopping():
        return {}, []
    groups, greedy, metrics = ranks.gather(sampled), ranks.gather(greedy), {}
    if groups:
        right = [sum(score >= 1 for score in group.scores) for group in groups]
        for k in range(1, n + 1):
            metrics[f"pass@{k}"], metrics[f"pass@{k}_error"] = mean_and_error([pass_at_k(n, c, k) for c in right])
        metrics["greedy"], metrics["greedy_error"] = mean_and_error([float(group.scores[0] >= 1) for group in greedy])
    return metrics, groups


def batched(items: list, size: int) -> Iterator[list]:
    return (items[i:i + size] for i in range(0, len(items), size))


# ----------------------------------------------------------------------------------------------------------------------
# Tasks: questions, what is put around them, and graders

NUMBER = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))(?!\.*\d)", re.ASCII)


def leading_number(text: str) -> Decimal | None:
    """The number that a text begins with: '$1,000.' and '1000.0 apples' give 1000; None where it begins otherwise, or with
    what goes on like a number but is none (1..5, 1.2.3)."""
    found = NUMBER.match(text.replace(",", "").replace("$", ""))
    return Decimal(found[1]) if found else None


def final_number(text: str) -> Decimal | None:
    """The number after the last ####, where GSM8K has its answer."""
    _, mark, tail = text.rpartition("####")
    return leading_number(tail) if mark else None


def number(reference: str, text: str) -> float:
    """1 where the text's final number is the reference's."""
    found = final_number(text)
    return float(found is not None and found == final_number(reference))


def exact(reference: str, text: str) -> float:
    return float(text == reference)


def make_sums() -> tuple[list[dict], list[dict]]:
    """Training and test questions: sums of two numbers below 100. The test pairs are held out in both orders."""
    pairs = list(itertools.combinations_with_replacement(range(100), 2))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    held_out, rest = [pairs[i] for i in order[:400]], [pairs[i] for i in order[400:]]
    train = sorted({*rest, *((b, a) for a, b in rest)})
    return tuple([{"question": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in part] for part in (train, held_out))


@dataclass(frozen=True)
class Task:
    """Where questions come from, and how a completion is graded."""
    data: str | Callable                    # a dataset's hub name or folder, or what makes its rows
    grader: Callable[[str, str], float]     # (reference, text) -> score, 0 to 1
    prompt_key: str = "question"
    answer_key: str = "answer"

    def messages(self, example: Example) -> list[dict]:
        return [{"role": "user", "content": example.question}]


TASKS = {
    "arithmetic": Task(make_sums, exact),
    "gsm8k": Task("openai/gsm8k", number),      # grade-school maths in words (Cobbe et al. 2021)
}


def load_rows(data: str) -> tuple[list[dict], list[dict]]:
    """The train rows, and the test rows in shuffle(seed=42) order as nanochat takes them, of a dataset on the hub or in a
    local folder. Raises UserError where it cannot be had."""
    import datasets
    local = "pass --data a local folder that holds its train and test files, such as train.jsonl and test.jsonl"
    try:
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        splits = datasets.load_dataset(data, "main" if data == "openai/gsm8k" else None)
        train, test = ([{**row, "row": i} for i, row in enumerate(splits[name])] for name in ("train", "test"))
    except Exception as error:              # whatever datasets, its file readers and the network raise
        raise UserError(f"cannot load {data} ({gpt.one_line(error.__cause__ or error)}): {local}") from error
    if not train or not test:
        raise UserError(f"{data} has no rows in {'test' if train else 'train'}: {local}")
    order = numpy.random.default_rng(42).permutation(len(test))        # what Dataset.shuffle(seed=42) does
    return train, [test[i] for i in order]


def load_examples(task: Task, split: str, rows: list[dict]) -> list[Example]:
    """Examples of a dataset's rows. Raises UserError where a row lacks a column, or has a reference that is none."""
    examples = []
    for i, row in enumerate(rows):
        place = f"row {row.get('row', i)} of {split} in {task.data}"
        for key in (task.prompt_key, task.answer_key):
            if not isinstance(row.get(key), str):
                raise UserError(f"{place} has no text {key!r}: mend or remove it")
        reference = row[task.answer_key]
        if task.grader(reference, reference) < 1:
            raise UserError(f"{place} has no answer that can be graded (for gsm8k, a number after ####): mend or remove it")
        examples.append(Example(i, row[task.prompt_key], reference))
    return examples


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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_output_safe() -> None:
    """What a terminal cannot show is shown otherwise; where there is none, nothing is."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def progress_bar(total: int, title: str, unit: str) -> tqdm:
    """A bar on rank 0's terminal, for work that takes more than a second or two."""
    return tqdm(total=total, desc=title, unit=unit, leave=False, delay=1.5, disable=None if main_rank() else True)


def json_line(content: dict) -> bytes:
    """A line of JSON, with null for what is infinite or not a number."""
    def finite(x: Any) -> Any:
        if isinstance(x, list):
            return [finite(item) for item in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps({key: finite(x) for key, x in content.items()}).encode() + b"\n"


def read_lines(path: Path) -> list[dict]:
    """The lines of metrics.jsonl; damaged ones are passed over, and that is said."""
    lines, damaged = [], 0
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            lines.append({**line, "step": int(line["step"])})
        except (ValueError, TypeError, KeyError):
            damaged += 1
    if damaged:
        say(f"passing over {damaged} damaged line{'s' * (damaged > 1)} in {path}")
    return lines


class Log:
    """metrics.jsonl, samples_<step>.jsonl and curve.png in the run's folder, and W&B under the same names."""

    def __init__(self, run: Run):
        """Takes up the log at the run's step: what an interrupted run wrote after it is cut off."""
        self.out, self.path, self.wandb = run.out, run.out / "metrics.jsonl", None
        self.lines = [line for line in read_lines(self.path) if line["step"] < run.step]
        gpt.write_file(self.path, lambda file: file.write(b"".join(map(json_line, self.lines))))
        if run.flags.run != "dummy":
            self.tell_wandb(lambda: self.start_wandb(run))

    def start_wandb(self, run: Run) -> None:
        import wandb
        self.wandb = wandb.init(project="chat_rl", name=run.flags.run, id=run.meta["wandb_id"], resume="allow",
                                dir=str(run.out), config=asdict(run.flags), settings=wandb.Settings(init_timeout=20))
        self.wandb.define_metric("*", step_metric="step")

    def tell_wandb(self, work: Callable) -> None:
        """Does something with W&B. No network, no account, no service: none of them is worth the run."""
        try:
            work()
        except Exception as error:
            self.wandb = None
            say(f"warning: no W&B ({gpt.one_line(error)}); the run goes on, its figures are in {self.path}. "
                "Set WANDB_MODE=offline to keep them for `wandb sync`.")

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

    def write_samples(self, step: int, groups: list[Group], tokenizer: Tokenizer) -> None:
        """Every completion of an evaluation; prints a question with a right and a wrong one."""
        rows = [{"question": g.example.question, "reference": g.example.reference,
                 "completions": [text_of(c, tokenizer) for c in g.completions], "rewards": g.rewards} for g in groups]
        gpt.write_file(self.out / f"samples_{step:06d}.jsonl", lambda file: file.write(b"".join(map(json_line, rows))))
        if self.wandb:
            self.tell_wandb(lambda: self.log_table(step, rows))
        group = max(groups, key=lambda group: len({score >= 1 for score in group.scores}))
        say(f"  question   {shortened(group.example.question)}\n  reference  {shortened(group.example.reference)}")
        texts = {score >= 1: text_of(c, tokenizer) for c, score in zip(group.completions, group.scores)}
        for right in sorted(texts, reverse=True):
            say(f"  {'right' if right else 'wrong'}      {shortened(texts[right])}")

    def log_table(self, step: int, rows: list[dict]) -> None:
        import wandb
        data = [[row["question"], row["reference"], text, reward]
                for row in rows for text, reward in zip(row["completions"], row["rewards"])]
        table = wandb.Table(columns=["question", "reference", "completion", "reward"], data=data)
        self.wandb.log({"step": step, "samples": table})

    def plot(self) -> None:
        """Draws curve.png anew."""
        from matplotlib.figure import Figure
        steps, tests = [x for x in self.lines if "reward" in x], [x for x in self.lines if "greedy" in x]
        figure = Figure(figsize=(10, 6), layout="constrained")
        reward, passed, length, entropy = figure.subplots(2, 2).flat
        for axes, key, title in ((reward, "reward", "reward (mean of the step)"),
                                 (length, "completion_length", "completion length (tokens)"),
                                 (entropy, "entropy", "entropy (nats per sampled token)")):
            x, y = [line["step"] for line in steps], [math.nan if line[key] is None else line[key] for line in steps]
            means = [statistics.fmean(y[max(0, i - 9):i + 1]) for i in range(len(y))]
            axes.plot(x, y, color="tab:blue", alpha=0.4, linewidth=1, label="step")
            axes.plot(x, means, color="tab:blue", label="mean of 10 steps")
            axes.set(title=title, xlabel="step")
        reward.legend(loc="lower right")
        for key in evaluation_keys(tests[-1]) if tests else []:
            passed.errorbar([x["step"] for x in tests], [x[key] for x in tests], [x[key + "_error"] for x in tests],
                            label=key, capsize=3, marker="o", markersize=3, linestyle="--" if key == "greedy" else "-")
        passed.set(title="test questions solved (± standard error)", xlabel="step")
        passed.legend(loc="lower right")
        for axes in (reward, passed, length, entropy):
            axes.grid(alpha=0.3)
        gpt.write_file(self.out / "curve.png", lambda file: figure.savefig(file, dpi=110, format="png"))

    def close(self) -> None:
        """Prints what the run has changed, and where to look."""
        tests = [x for x in self.lines if "greedy" in x]
        rewards = [x["reward"] or 0.0 for x in self.lines if "reward" in x]
        if len(tests) > 1:
            say(f"before  {evaluation_row(tests[0])}\nafter   {evaluation_row(tests[-1])}")
        if rewards:
            say(f"reward  {sparkline(rewards)}  {rewards[0]:.3f} → {rewards[-1]:.3f}")
        say(f"curve   {self.out / 'curve.png'}")
        if self.wandb:
            self.tell_wandb(lambda: self.wandb.finish())


def shortened(text: str, width: int = 600) -> str:
    text = " ⏎ ".join(text.strip().splitlines())
    return text if len(text) <= width else text[:width] + " …"


def evaluation_keys(metrics: dict) -> list[str]:
    """pass@k for the powers of two, and the greedy accuracy."""
    passes = [key for key in metrics if re.fullmatch(r"pass@\d+", key)]
    return [key for key in passes if int(key[5:]).bit_count() == 1] + ["greedy"]


def evaluation_row(metrics: dict) -> str:
    return "  ".join(f"{key} {metrics[key]:.3f} ± {metrics[key + '_error']:.3f}" for key in evaluation_keys(metrics))


def step_row(run: Run, metrics: dict, seconds_left: float) -> str:
    row = (f"step {run.step}/{run.num_steps}  reward {metrics['reward']:.3f}  length {metrics['completion_length']:.1f}  "
           f"{metrics['tokens_per_second']:,.0f} tok/s  left {timedelta(seconds=round(seconds_left))}")
    return row if math.isfinite(metrics["grad_norm"]) else row + "  the gradient is not finite: step left out"


def sparkline(values: list[float], width: int = 60) -> str:
    """Values as bars, at most `width` of them, each the mean of its share."""
    share = math.ceil(len(values) / width)
    means = [statistics.fmean(part) for part in batched(values, share)]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[int(7.99 * (x - low) / (high - low or 1))] for x in means)


# ----------------------------------------------------------------------------------------------------------------------
# The starter: a model for those who have none


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and nanochat's special ones."""
    special = {f"<|{name}|>": 256 + i for i, name in enumerate(Tokenizer.SPECIAL)}
    return Tokenizer(gpt.tiktoken.Encoding("bytes", pat_str="(?s:.)", special_tokens=special,
                                           mergeable_ranks={bytes([i]): i for i in range(256)}))


def imitate(logprobs: Tensor, sampled_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The loss of supervised learning."""
    return -logprobs


def teach(model: GPT, tokenizer: Tokenizer, task: Task, examples: list[Example], goal: float, size: int,
          max_steps: int = 1000) -> int:
    """Supervised learning of the references, `size` questions a step, until the model's own completions score `goal`. It is
    the update of RL, with one completion per question and the whole softmax for a policy. Returns the number of steps."""
    _, gradient = gpt.flatten(model)
    optimizers, sampler = gpt.make_optimizers(model), Sampler(model, tokenizer)
    policy, generator = Policy(1.0, 0, model.config.softcap), torch.Generator().manual_seed(0)
    for step in tqdm(range(max_steps), desc="starter", unit="step", leave=False, disable=None):
        if step % 10 == 0 and ability(sampler, task, examples[::len(examples) // 400], policy) >= goal:
            return step
        groups = []
        for i in torch.randint(len(examples), (size,), generator=generator).tolist():
            tokens = [*tokenizer.encode(examples[i].reference), tokenizer.stops[0]]
            lesson = Completion(tokens, [True] * len(tokens), [0.0] * len(tokens))
            groups.append(Group(examples[i], tokenizer.render(task.messages(examples[i])), [lesson], advantages=[1.0]))
        gradient.zero_()
        learned = backward(model, groups, policy, size, imitate)["learned"]
        gradient /= learned
        gpt.step_optimizers(optimizers, 1.0)
        sampler.refresh()
    return max_steps


def ability(sampler: Sampler, task: Task, examples: list[Example], policy: Policy) -> float:
    """The mean score of one completion to each example."""
    prompts = [sampler.tokenizer.render(task.messages(example)) for example in examples]
    completions = sampler.generate(prompts, 1, 8, policy)
    return statistics.fmean(task.grader(example.reference, text_of(group[0], sampler.tokenizer))
                            for example, group in zip(examples, completions))


def make_starter(folder: Path) -> None:
    """Makes a tiny GPT, teaches it to add every other time, and saves it as an SFT checkpoint."""
    tokenizer, task = byte_tokenizer(), TASKS["arithmetic"]
    shape = dict(sequence_len=256, vocab_size=tokenizer.vocab_size, n_layer=4, n_head=4, n_kv_head=4, n_embd=128)
    model = GPT(gpt.nanochat_config("current", **shape)).init_weights(seed=2)
    steps = teach(model, tokenizer, task, load_examples(task, "train", make_sums()[0]), goal=0.5, size=128)
    gpt.save_checkpoint(folder, steps, model, tokenizer, {"model_config": shape})


# ----------------------------------------------------------------------------------------------------------------------
# The run

# What a kind of run does differently from the flags' own defaults; a flag that is given wins.
PRESETS = {
    "nanochat": dict(task="gsm8k"),
    "starter": dict(task="arithmetic", max_steps=60, examples_per_step=512, num_samples=4, max_new_tokens=8,
                    rollout_batch_size=2048, device_batch_size=64, embedding_lr=1.0, unembedding_lr=0.2, matrix_lr=0.25,
                    eval_every=20, save_every=20),
}


def fail(message: str) -> None:
    raise UserError(f"{message}; --help lists the flags")


def parse_flags(argv: list[str]) -> dict:
    """The flags given on the command line. Raises UserError where one is out of range."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS)
    for f in fields(Flags):
        name, kind = "--" + f.name.replace("_", "-"), f.type.split()[0]
        if kind == "bool":
            parser.add_argument(name, action="store_true", help=f.metadata["help"])
        else:
            default = "" if f.default in (None, "") else f" (default: {f.default})"
            parser.add_argument(name, type={"int": int, "float": float, "str": str}[kind], help=f.metadata["help"] + default)
    parser.error = fail
    given = vars(parser.parse_args(argv))
    for f in fields(Flags):
        value, low, choices = given.get(f.name), f.metadata["low"], f.metadata["choices"]
        if isinstance(value, (int, float)) and not low <= value < 2 ** 63:
            raise UserError(f"--{f.name.replace('_', '-')} {value} is out of range: the least is {low}")
        if choices and value not in (None, *choices):
            raise UserError(f"--{f.name.replace('_', '-')} {value} is unknown: choose {', '.join(filter(None, choices))}")
    return given


def find_source(tag: str | None, base: Path) -> Path:
    """The folder that --model-tag names, which may not be there."""
    folder = base / "chatsft_checkpoints"
    tags = sorted(path.parent.name for path in folder.glob("*/model_*.pt"))
    if tag is None:
        sized = [(int(found[1]), t) for t in tags if (found := re.match(r"d(\d+)", t))]
        newest = max(tags, key=lambda t: (folder / t).stat().st_mtime, default="starter")
        return folder / (max(sized)[1] if sized else newest)
    return folder / tag if tag in (*tags, "starter") else Path(tag).resolve()


def find_out(source: Path, base: Path, evaluation: bool) -> Path:
    """The folder that a run writes to, named after its source: never the source itself."""
    parent = base / "chatrl_checkpoints"
    if evaluation:
        return parent / "evaluations" / source.name
    names = itertools.chain([source.name], (f"{source.name}-{n}" for n in itertools.count(2)))
    return next(parent / name for name in names if parent / name != source)


def find_resumable(out: Path, device: torch.device) -> tuple | None:
    """What the last sound checkpoint in a run's folder holds: model, tokenizer, meta and training state."""
    for step in reversed(gpt.checkpoint_steps(out)):
        try:
            dtype = gpt.load_meta(out / f"meta_{step:06d}.json")["flags"]["dtype"]
            model, tokenizer, meta = gpt.load_checkpoint(out, step, device, getattr(torch, dtype))
            return model, tokenizer, meta, gpt.load_training(out, meta, device)
        except UserError as error:
            say(f"passing over step {step}: {error}")
        except Exception as error:          # damaged files fail in many ways
            say(f"passing over step {step}: {out / f'optim_{step:06d}.pt'} cannot be loaded: {gpt.one_line(error)}")
    return None


def settle_flags(given: dict, preset: dict, saved: dict | None, device: torch.device) -> Flags:
    """The flags of a run: those given, else those of the run that goes on, else the preset's. Raises UserError where one is
    given that would make it another run."""
    if "num_epochs" in given:
        preset = {key: value for key, value in preset.items() if key != "max_steps"}
    known = {f.name: f.metadata["resumable"] for f in fields(Flags)}
    if unknown := sorted(set(saved or {}) - set(known)):
        say(f"passing over flags of the run that are unknown here: {', '.join(unknown)}")
    saved = {name: value for name, value in (saved or {}).items() if name in known}
    flags = Flags(**{**preset, **saved, **given})
    differing = [name for name in saved if getattr(flags, name) != saved[name] and not known[name]]
    if differing:
        raise UserError("--resume: the run has other flags: " + ", ".join(
            f"--{name.replace('_', '-')} {saved[name]}, not {getattr(flags, name)}" for name in differing))
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return replace(flags, dtype=flags.dtype or ("bfloat16" if fast else "float32"))


def load_task(flags: Flags) -> tuple[Task, list[Example], list[Example]]:
    """The task, its training and its test questions. Raises UserError."""
    if flags.task not in TASKS:
        raise UserError(f"--task {flags.task} is unknown: choose {', '.join(TASKS)}")
    task = TASKS[flags.task]
    if not callable(task.data):
        task = replace(task, data=flags.data)
    train, test = task.data() if callable(task.data) else load_rows(task.data)
    return task, load_examples(task, "train", train), load_examples(task, "test", test)


def digest_of(*parts: list[Example]) -> str:
    """What the questions are, wherever they lie."""
    return hashlib.sha256(json.dumps([[asdict(example) for example in part] for part in parts]).encode()).hexdigest()


def keep_short(run: Run, split: str, limit: int) -> list[Example]:
    """The examples whose prompts are no longer than `limit` tokens; says how many are."""
    examples = getattr(run, split)
    short = [x for x in examples if len(run.tokenizer.render(run.task.messages(x))) <= limit]
    if len(short) < len(examples):
        say(f"{len(examples) - len(short)} of {len(examples)} {split} questions are longer than {limit} tokens and left out")
    return short


def check_same_source(meta: dict, source: Path, flags: Flags) -> None:
    """Raises UserError where --model-tag and --model-step lead to another checkpoint than the run began with."""
    step = meta["source"]["step"] if flags.model_step is None else flags.model_step
    if not gpt.checkpoint_steps(source):
        return                              # the run needs it no more
    if flags.model_step is None and step not in gpt.checkpoint_steps(source):
        step = None
    if sorted(gpt.checkpoint_digests(source, step).values()) != meta["source"]["sha256"]:
        raise UserError(f"--resume: --model-tag {source} is not the checkpoint that the run began with: leave out --resume to "
                        "begin anew")


def prepare(given: dict, ranks: Ranks, stack: ExitStack) -> tuple[Run, dict]:
    """Finds and checks everything that a run needs: the run, and the state of what learns. Raises UserError, before anything
    is written, on what is amiss. The run's folder stays locked as long as the stack is open."""
    base = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser().resolve()
    source = find_source(given.get("model_tag"), base)
    out = find_out(source, base, evaluation=given.get("max_steps") == 0)
    is_starter = source == base / "chatsft_checkpoints" / "starter"
    resumed = find_resumable(out, ranks.device) if given.get("resume") else None
    model, tokenizer, meta, training = resumed or (None, None, {}, None)
    flags = settle_flags(given, PRESETS["starter" if is_starter else "nanochat"], meta.get("flags"), ranks.device)
    if flags.examples_per_step % ranks.size:
        raise UserError(f"--examples-per-step {flags.examples_per_step} is not divisible by the {ranks.size} ranks: "
                        f"make it a multiple of {ranks.size}")
    task, train, test = load_task(flags)
    data = digest_of(train, test)
    if resumed:
        check_same_source(meta, source, flags)
        if meta["data_sha256"] != data:
            raise UserError(f"--resume: --data {flags.data} is not what the run began with: leave out --resume to begin anew")
    else:
        model, tokenizer, meta = load_source(source, base, flags, ranks.device, is_starter)
    run = Run(flags, task, train, test, tokenizer, meta, out, 0, meta["step"] if resumed else 0)
    limit = model.config.max_positions - flags.max_new_tokens
    run.train, run.test = keep_short(run, "train", limit), keep_short(run, "test", limit)
    steps_per_epoch = len(run.train) // flags.examples_per_step
    if not steps_per_epoch or not run.test:
        raise UserError(f"{len(run.train)} training and {len(run.test)} test questions are too few: lower "
                        "--examples-per-step or --max-new-tokens")
    run.num_steps = flags.num_epochs * steps_per_epoch if flags.max_steps is None else flags.max_steps
    run.meta = {"model_config": meta["model_config"], "flags": asdict(flags), "data_sha256": data, "source": meta["source"],
                "wandb_id": meta.get("wandb_id", os.urandom(4).hex()), "step": run.step}
    stack.enter_context(locked(out))
    make_folder(out, fresh=not resumed and run.num_steps > 0)
    return run, {"model": model, "training": training}


def load_source(source: Path, base: Path, flags: Flags, device: torch.device, is_starter: bool) -> tuple:
    """The model, tokenizer and meta to begin with; makes the starter where it is asked for and not there."""
    if not gpt.checkpoint_steps(source):
        if is_starter:
            say(f"no checkpoint in {base}: making the starter, a tiny GPT that can nearly add; --model-tag names another one")
            make_starter(source)
        elif not any(source.glob("model_*.pt")):
            tags = sorted({path.parent.name for path in base.glob("chatsft_checkpoints/*/model_*.pt")} | {"starter"})
            raise UserError(f"no model tag {flags.model_tag} in {base / 'chatsft_checkpoints'}: choose one of "
                            f"{', '.join(tags)}, or a folder with model_*.pt")
    model, tokenizer, meta = gpt.load_checkpoint(source, flags.model_step, device, getattr(torch, flags.dtype))
    digests = [digest for name, digest in meta["sha256"].items() if not name.startswith("optim")]
    meta["source"] = {"path": str(source), "step": gpt.find_step(source, flags.model_step), "sha256": sorted(digests)}
    return model, tokenizer, meta


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps other runs out of a run's folder, until this process is done or dead. Raises UserError where another is in it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = open(out.with_name(f".{out.name}.lock"), "w")
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error}): set NANOCHAT_BASE_DIR to a folder that you can write to") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another run is writing to {out}: wait for its end, or copy the checkpoint to a tag of its own") from error
        yield


def make_folder(out: Path, fresh: bool) -> None:
    """Makes the run's folder; what an earlier run left there is moved to previous/<tag>-<n>. Raises UserError."""
    try:
        if fresh and out.exists() and any(out.iterdir()):
            previous = out.parent / "previous"
            previous.mkdir(exist_ok=True)
            place = next(p for n in itertools.count(1) if not (p := previous / f"{out.name}-{n}").exists())
            out.rename(place)
            say(f"the earlier run of {out.name} is now in {place}")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error}): set NANOCHAT_BASE_DIR to a folder that you can write to") from error


def make_learner(run: Run, state: dict, ranks: Ranks) -> Learner:
    """What learns, on every rank, from rank 0's state of it; as a resumed run left it."""
    flags, training = run.flags, state.get("training")
    model = gpt.share_model(state.get("model"), ranks)
    if training:
        model.load_state_dict(training["masters"], strict=False)
    weights, gradient = gpt.flatten(model)
    ranks.broadcast(weights)
    optimizers = []
    if ranks.rank == 0:
        optimizers = gpt.make_optimizers(model, flags.embedding_lr, flags.unembedding_lr, flags.matrix_lr, flags.weight_decay)
    if training:
        for optimizer, saved in zip(optimizers, training["optimizers"]):
            optimizer.load_state_dict(saved)
    return Learner(model, Sampler(model, run.tokenizer), weights, gradient, optimizers)


def save(run: Run, learner: Learner) -> None:
    """Writes a checkpoint to load here and in nanochat, and to resume from. Raises UserError where the disk refuses."""
    model = learner.model
    masters = {key: x for key, x in model.state_dict().items() if model.stored_types.get(key, x.dtype) != x.dtype}
    training = {"optimizers": [optimizer.state_dict() for optimizer in learner.optimizers], "masters": masters}
    try:
        gpt.save_checkpoint(run.out, run.step, model, run.tokenizer, run.meta, training)
    except (OSError, RuntimeError) as error:        # torch wraps what the disk says in a RuntimeError
        reasons = [error, error.__context__, error.__cause__]
        if disk := next((reason for reason in reasons if isinstance(reason, OSError)), None):
            raise UserError(f"cannot save to {run.out} ({gpt.one_line(disk)}): free some space and go on with --resume") from error
        raise
    done = [path for path in sorted(run.out.glob("optim_*.pt")) if path.name <= f"optim_{run.step:06d}.pt"]
    for path in done[:-run.flags.keep_last]:
        path.unlink()


def evaluate_and_log(run: Run, learner: Learner, log: Log | None, ranks: Ranks) -> None:
    metrics, groups = evaluate(run, learner, ranks)
    if metrics:
        say(f"step {run.step}/{run.num_steps}  {evaluation_row(metrics)}")
        log.write({"step": run.step, **metrics})
        log.write_samples(run.step, groups, run.tokenizer)
        log.plot()


def train(run: Run, learner: Learner, ranks: Ranks) -> None:
    """Evaluates, steps, logs and saves, to the end or until a rank is told to stop: then with the last whole step saved."""
    flags = run.flags
    log = Log(run) if ranks.rank == 0 else None
    saved, failures, spent, first = run.step, 0, 0.0, run.step
    ranks.listen()
    while run.step < run.num_steps:
        if run.step % flags.eval_every == 0:
            evaluate_and_log(run, learner, log, ranks)
        metrics = step(run, learner, ranks)
        if metrics is None:
            break
        spent += metrics["rollout_seconds"] + metrics["update_seconds"]
        if log:
            say(step_row(run, metrics, spent / (run.step + 1 - first) * (run.num_steps - run.step - 1)))
            log.write({"step": run.step, **metrics})
        failures = 0 if math.isfinite(metrics["grad_norm"]) else failures + 1
        if failures == 5:
            raise UserError("the gradient was not finite five times in a row, and nothing more is saved: look at the rewards, "
                            "lower the learning rates, and go on from the last checkpoint with --resume")
        run.step += 1
        if run.step % flags.save_every == 0 or run.step == run.num_steps:
            saved = run.step
            if log:
                save(run, learner)
    else:
        evaluate_and_log(run, learner, log, ranks)
    if log:
        if saved < run.step:
            save(run, learner)
        finish(run, log)


def finish(run: Run, log: Log) -> None:
    """The last words of a run."""
    log.plot()
    log.close()
    if run.step < run.num_steps:
        say(f"stopped after step {run.step} of {run.num_steps}: go on with --resume")
    else:
        say(f"{'saved' if run.num_steps else 'samples'} in {run.out}")


def main(argv: list[str]) -> int:
    """Runs, and returns the exit status: 2 where something was amiss from the start, 1 where it went wrong later."""
    status, run = 2, None
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
            train(run, learner, ranks)
            status = 0
        except (UserError, OSError) as error:
            full = isinstance(error, OSError) and status == 1
            hint = f"cannot write to {run.out}: free some space and go on with --resume: " if full else ""
            if main_rank():
                print(f"chat_rl: {hint}{error}", file=sys.stderr)
    if dist.is_initialized() and status == 0:       # after a failure other ranks may wait in a collective: no goodbye
        dist.barrier()                              # no rank leaves while another is still talking to it
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if "RANK" in os.environ:                # gloo's threads now and then abort an interpreter that shuts down in order
        os._exit(status)
    sys.exit(status)
