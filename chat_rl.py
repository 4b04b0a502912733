"""Reinforcement learning for a small chat GPT: from a nanochat SFT checkpoint to a better one.

    python chat_rl.py                                       # one GPU, or a CPU; makes its own tiny model if you have none
    torchrun --nproc_per_node=8 chat_rl.py --model-tag=d24  # eight GPUs

Each step asks a few questions, samples a group of answers to each, rewards every answer, and takes one step uphill:

    advantage = reward − mean reward of the answer's group
    loss      = −Σ advantage · log π(token) / number of sampled tokens in the step,   over the sampled tokens

That is REINFORCE (Williams 1992) with the group's mean for a baseline, or what is left of GRPO (Shao et al. 2024) when
 1. every rollout is used once, by the policy that sampled it: no importance ratio, no clipping,
 2. there is no reference model: no KL penalty,
 3. advantages are not divided by the group's standard deviation, which favours questions nearly all right or all wrong,
 4. the loss is normalised by the tokens of the whole step (DAPO, Yu et al. 2025): each counts the same, in any batch.

The policy is the distribution that is sampled from, after temperature and top-k, in the loss as in the sampler. Tokens
that the calculator forced are attended to but not learned. The machine behind this (model, cache, sampler, tokenizer,
checkpoints, optimizers) is gpt.py.
"""
import argparse
import io
import itertools
import json
import math
import os
import pickle
import re
import signal
import statistics
import sys
import time
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
from gpt import GPT, Completion, Tokenizer, UserError

# ----------------------------------------------------------------------------------------------------------------------
# Flags


def flag(default: Any, help: str, low: float = -math.inf, choices: tuple = ()) -> Any:
    """A field of Flags: its default, its one line of help, the least value it may have or the values to choose from."""
    return field(default=default, metadata={"help": help, "low": low, "choices": choices})


@dataclass
class Flags:
    run: str = flag("dummy", "name of the Weights & Biases run (dummy: do not use W&B)")
    device_type: str = flag("", "cuda, mps or cpu (default: the first of these that is there)",
                            choices=("", "cuda", "mps", "cpu"))
    dtype: str = flag("", "of the arithmetic (default: bfloat16 where the GPU has it, else float32)",
                      choices=("", "bfloat16", "float32"))
    model_tag: str | None = flag(None, "SFT checkpoint: a tag such as d20, or a folder with model_*.pt (default: largest d<N>)")
    model_step: int | None = flag(None, "step of that checkpoint (default: the last)", low=0)
    task: str | None = flag(None, "gsm8k or arithmetic (default: arithmetic with the starter, else gsm8k)")
    data: str = flag("openai/gsm8k", "GSM8K by its hub name, or a local folder with its train and test files")
    num_epochs: int = flag(1, "passes over the training questions", low=1)
    max_steps: int | None = flag(None, "length of the run in steps (default: that of the epochs; 0 evaluates and exits)", low=0)
    examples_per_step: int = flag(16, "questions per step, over all ranks", low=1)
    num_samples: int = flag(16, "answers sampled per question", low=2)
    max_new_tokens: int = flag(256, "length limit of an answer, in tokens", low=1)
    temperature: float = flag(1.0, "of sampling in training (above 0)", low=1e-6)
    top_k: int = flag(50, "sample from the k likeliest tokens, in training and evaluation (0: from all)", low=0)
    rollout_batch_size: int = flag(256, "rows sampled at once, in training and evaluation (0: no bound)", low=0)
    device_batch_size: int = flag(8, "rows in one forward and backward; samples per question in evaluation", low=1)
    embedding_lr: float = flag(0.2, "learning rate of the embeddings (Adam)", low=0)
    unembedding_lr: float = flag(0.004, "learning rate of the unembedding (Adam)", low=0)
    matrix_lr: float = flag(0.02, "learning rate of the matrices (Muon)", low=0)
    weight_decay: float = flag(0.0, "of the embedding and the unembedding (Adam)", low=0)
    init_lr_frac: float = flag(0.05, "all rates start at this fraction and fall linearly to zero", low=0)
    eval_every: int = flag(60, "steps between evaluations", low=1)
    eval_examples: int = flag(400, "test questions in an evaluation", low=1)
    save_every: int = flag(60, "steps between checkpoints", low=1)
    keep_last: int = flag(2, "checkpoints that keep their optimizer state, to resume from", low=1)
    resume: bool = flag(False, "go on from the last complete checkpoint of this tag's RL run, if there is one")
    seed: int = flag(42, "of the order of questions and of sampling", low=0)


# What the starter run does differently from the flags' own defaults; a flag given on the command line wins.
STARTER = dict(task="arithmetic", max_steps=60, examples_per_step=512, num_samples=4, max_new_tokens=8,
               rollout_batch_size=2048, device_batch_size=64, embedding_lr=1.0, unembedding_lr=0.2, matrix_lr=0.25,
               eval_every=20, save_every=20)

# Flags that may change between a run and its resumption: they do not change what is computed, beyond rounding.
FREE_FLAGS = ("run", "device_type", "model_tag", "model_step", "data", "rollout_batch_size", "eval_every", "save_every",
              "keep_last", "resume")


def fail(message: str) -> None:
    raise UserError(f"{message}; --help lists the flags")


def parse_flags(argv: list[str]) -> dict:
    """The flags given on the command line. Raises UserError where one is out of range."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], argument_default=argparse.SUPPRESS)
    for f in fields(Flags):
        name, kind = "--" + f.name.replace("_", "-"), {"int | None": int, "str | None": str}.get(str(f.type), f.type)
        if kind is bool:
            parser.add_argument(name, action="store_true", help=f.metadata["help"])
        else:
            default = "" if f.default in (None, "") else f" (default: {f.default})"
            parser.add_argument(name, type=kind, help=f.metadata["help"] + default)
    parser.error = fail
    given = vars(parser.parse_args(argv))
    for f in fields(Flags):
        value, low, choices = given.get(f.name), f.metadata["low"], f.metadata["choices"]
        if isinstance(value, (int, float)) and not low <= value < 2 ** 63:
            raise UserError(f"--{f.name.replace('_', '-')} {value} is out of range: the least is {low}")
        if choices and value not in (None, *choices):
            raise UserError(f"--{f.name.replace('_', '-')} {value} is unknown: choose {', '.join(filter(None, choices))}")
    return given


# ----------------------------------------------------------------------------------------------------------------------
# Ranks: the processes of a run


class Interrupted(BaseException):
    """SIGTERM or SIGINT has cut a piece of work short."""


class Ranks:
    """The processes of a run, each with a share of every step's questions; one where torchrun did not start it.

    Rank 0 alone reads checkpoints and data, prints and saves. A first SIGTERM or SIGINT cuts `attempt`s short and lets
    all ranks stop together, a second ends the process at once.
    """

    TIMEOUT = timedelta(minutes=30)         # of a collective: a rank that waits longer for another takes it for dead

    def __init__(self, device_type: str):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        self.device = torch.device(device_type or best)
        if self.device.type != "cpu" and not getattr(torch, self.device.type).is_available():
            raise UserError(f"--device-type {device_type} is not on this machine: leave the flag out to use {best}")
        if self.device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if "RANK" in os.environ:
            # after a restart torchrun's store still holds what the lost processes wrote: each attempt has its own corner
            store, *_ = next(dist.rendezvous("env://", timeout=self.TIMEOUT))
            store = dist.PrefixStore("attempt" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", store=store, rank=self.rank,
                                    world_size=self.size, timeout=self.TIMEOUT)
        self.signalled, self.working = 0.0, False

    def sum(self, values: list[float]) -> list[float]:
        """Adds up the ranks' values, in float64."""
        return self.sum_(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist() if self.size > 1 else values

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds up the ranks' tensors, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, items: list) -> list:
        """The items of all ranks on rank 0, dealt back into the order in which [rank::size] dealt them out; [] on others."""
        if self.size == 1:
            return items
        parts = [None] * self.size if self.rank == 0 else None
        dist.gather_object(items, parts)
        rounds = itertools.zip_longest(*parts or [])
        return [item for round in rounds for item in round if item is not None]

    def share(self, thing: Any) -> Any:
        """Rank 0's thing on every rank, its tensors sent one by one to the ranks' devices."""
        if self.size == 1:
            return thing
        tensors, stream = [], io.BytesIO()

        class Pickler(pickle.Pickler):
            def persistent_id(self, x: Any) -> Any:
                if isinstance(x, Tensor):
                    tensors.append(x.data)
                    return x.shape, x.dtype, isinstance(x, torch.nn.Parameter)

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, key: tuple) -> Tensor:
                shape, dtype, learned = key
                tensors.append(torch.empty(shape, dtype=dtype, device=device))      # in the order they were pickled in
                return torch.nn.Parameter(tensors[-1]) if learned else tensors[-1]

        device, box = self.device, [None]
        if self.rank == 0:
            Pickler(stream).dump(thing)
            box = [stream.getvalue()]
        dist.broadcast_object_list(box)
        if self.rank > 0:
            thing = Unpickler(io.BytesIO(box[0])).load()
        for tensor in tensors:
            dist.broadcast(tensor, 0)
        return thing

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        if self.signalled and time.monotonic() - self.signalled > 1:     # one Ctrl-C can arrive twice under torchrun
            os._exit(128 + number)
        self.signalled = self.signalled or time.monotonic()
        if self.working:
            self.working = False
            raise Interrupted

    def attempt(self, work: Callable, *args: Any) -> Any:
        """work(*args), during which no other rank is waited for; None where a signal cut it short."""
        try:
            self.working = True
            if self.signalled:
                raise Interrupted
            return work(*args)
        except Interrupted:
            return None
        finally:
            self.working = False

    def stopping(self) -> bool:
        """Whether any rank was told to stop: the same answer on all."""
        return self.sum([float(self.signalled > 0)])[0] > 0


def main_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    if main_rank():
        print(text, flush=True)


def progress_bar(total: int, title: str, unit: str) -> tqdm:
    """A bar on rank 0's terminal, for work that takes more than a second or two."""
    return tqdm(total=total, desc=title, unit=unit, leave=False, delay=1.5, disable=None if main_rank() else True)


# ----------------------------------------------------------------------------------------------------------------------
# Tasks: questions, reference answers and a reward


NUMBER = re.compile(r"\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))(?!\.?\d)", re.ASCII)


def leading_number(text: str) -> Decimal | None:
    """The number that a text begins with: '$1,000.' and '1000.0 apples' give 1000; None where it begins otherwise."""
    found = NUMBER.match(text.replace(",", "").replace("$", ""))
    return Decimal(found[1]) if found else None


class GSM8K:
    """Grade-school maths in words (Cobbe et al. 2021): 1.0 where the number after the last #### is the reference's."""

    def __init__(self, flags: Flags):
        self.train, self.test = load_rows(flags.data, ("question", "answer"))
        for split, rows in (("train", self.train), ("test", self.test)):
            for row in rows:
                if self.final_number(row["answer"]) is None:
                    raise UserError(f"row {row['row']} of {split} in {flags.data} has no number after #### in its answer: "
                                    "mend or remove it")

    def final_number(self, text: str) -> Decimal | None:
        _, mark, tail = text.rpartition("####")
        return leading_number(tail) if mark else None

    def reward(self, example: dict, text: str) -> float:
        number = self.final_number(text)
        return float(number is not None and number == self.final_number(example["answer"]))


class Arithmetic:
    """Sums of two numbers below 100. The test pairs are held out in both orders."""

    def __init__(self, flags: Flags):
        pairs = list(itertools.combinations_with_replacement(range(100), 2))
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
        held_out, rest = [pairs[i] for i in order[:400]], [pairs[i] for i in order[400:]]
        self.test = [self.example(a, b) for a, b in held_out]
        self.train = [self.example(a, b) for a, b in sorted({*rest, *((b, a) for a, b in rest)})]

    def example(self, a: int, b: int) -> dict:
        return {"question": f"What is {a} + {b}?", "answer": str(a + b)}

    def reward(self, example: dict, text: str) -> float:
        return float(text == example["answer"])


TASKS = {"gsm8k": GSM8K, "arithmetic": Arithmetic}


def load_rows(data: str, columns: tuple[str, ...]) -> tuple[list[dict], list[dict]]:
    """The train rows, and the test rows in shuffle(seed=42) order as nanochat takes them, of a dataset on the hub or in a
    local folder; `row` is a row's place in its file. Raises UserError where it cannot be had or a row lacks a column."""
    import datasets
    local = "pass --data a local folder that holds its train and test files, such as train.jsonl and test.jsonl"
    try:
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        splits = datasets.load_dataset(data, "main" if data == "openai/gsm8k" else None)
        parts = {name: [{**row, "row": i} for i, row in enumerate(splits[name])] for name in ("train", "test")}
    except Exception as error:              # whatever datasets, its file readers and the network raise
        raise UserError(f"cannot load {data} ({gpt.one_line(error.__cause__ or error)}): {local}") from error
    for name, rows in parts.items():
        if not rows:
            raise UserError(f"{data} has no rows in {name}: {local}")
        for row in rows:
            for column in columns:
                if not isinstance(row.get(column), str):
                    raise UserError(f"row {row['row']} of {name} in {data} has no text {column!r}: mend or remove it")
    order = numpy.random.default_rng(42).permutation(len(parts["test"]))        # what Dataset.shuffle(seed=42) does
    return parts["train"], [parts["test"][i] for i in order]


# ----------------------------------------------------------------------------------------------------------------------
# Rollout: groups of answers and their advantages


@dataclass
class Run:
    """All that a run consists of, the same on every rank."""
    flags: Flags
    task: Any
    model: GPT
    tokenizer: Tokenizer
    meta: dict                              # what every checkpoint's meta file says: model config, flags, W&B id
    out: Path
    num_steps: int
    step: int                               # updates done
    training: dict | None                   # of a resumed run: the optimizers' states and the float32 weights


@dataclass
class Group:
    """A question, the answers that were sampled for it, and what they were worth."""
    example: dict
    prompt: list[int]
    completions: list[Completion]
    rewards: list[float]
    advantages: list[float]


def advantages_of(rewards: list[float]) -> list[float]:
    """Reward − mean of the group: exactly zero where all rewards agree."""
    mean = statistics.mean(rewards)
    return [reward - mean for reward in rewards]


TRAINING, EVALUATION = 0, 1                 # what a random number is for is part of its seed


def questions_of_step(run: Run, step: int) -> list[dict]:
    """The training questions of a step: each epoch goes through them in an order of its own."""
    size = run.flags.examples_per_step
    epoch, place = divmod(step, len(run.task.train) // size)
    generator = torch.Generator().manual_seed(int(gpt.fold(run.flags.seed, epoch)))
    order = torch.randperm(len(run.task.train), generator=generator)
    return [run.task.train[i] for i in order[place * size:(place + 1) * size].tolist()]


def rollout(run: Run, examples: list[dict], num_samples: int, temperature: float, seed: int, title: str) -> list[Group]:
    """Samples `num_samples` answers to each example, at most `rollout_batch_size` rows at once, and rewards them."""
    flags, tokenizer = run.flags, run.tokenizer
    groups = [Group(example, tokenizer.render(example["question"]), [], [], []) for example in examples]
    rows = flags.rollout_batch_size or max(1, len(groups)) * num_samples
    with progress_bar(len(groups) * num_samples, title, "answer") as bar:
        for part in batched(groups, max(1, rows // num_samples)):
            for first in range(0, num_samples, rows):
                completions = gpt.generate(
                    run.model, tokenizer, [g.prompt for g in part], min(rows, num_samples - first), flags.max_new_tokens,
                    temperature, flags.top_k, seed, [g.example["index"] for g in part], first, progress=bar.update)
                for group, new in zip(part, completions):
                    group.completions += new
    for group in groups:
        group.rewards = [run.task.reward(group.example, answer_text(tokenizer, c)) for c in group.completions]
        group.advantages = advantages_of(group.rewards)
    return groups


def answer_text(tokenizer: Tokenizer, completion: Completion) -> str:
    """What the model said, without the token that ended its turn."""
    tokens = completion.tokens
    return tokenizer.decode(tokens[:-1] if tokens[-1] in tokenizer.stops else tokens)


def summarize(run: Run, groups: list[Group], ranks: Ranks) -> tuple[dict, int, int]:
    """Metrics of a step's rollout over all ranks, the number of its tokens, and the number of those that were sampled."""
    completions = [c for g in groups for c in g.completions]
    reward, right, wrong, tokens, truncated, sampled, logprob = ranks.sum([
        sum(sum(g.rewards) for g in groups), sum(min(g.rewards) >= 1 for g in groups), sum(max(g.rewards) < 1 for g in groups),
        sum(len(c.tokens) for c in completions), sum(c.tokens[-1] not in run.tokenizer.stops for c in completions),
        sum(sum(c.mask) for c in completions), sum(sum(c.logprobs) for c in completions)])
    questions, answers = run.flags.examples_per_step, run.flags.examples_per_step * run.flags.num_samples
    metrics = {"reward": reward / answers, "all_right": right / questions, "all_wrong": wrong / questions,
               "completion_length": tokens / answers, "truncated": truncated / answers, "entropy": -logprob / sampled}
    return metrics, int(tokens), int(sampled)


def batched(items: list, size: int) -> Iterator[list]:
    return (items[i:i + size] for i in range(0, len(items), size))


# ----------------------------------------------------------------------------------------------------------------------
# Update: the gradient of one step


def completion_logprobs(model: GPT, prefix: gpt.Prefix, completions: list[Completion], flags: Flags) -> tuple[Tensor, Tensor]:
    """Logprobs (M,) under the policy of all M sampled tokens of the completions, and the row of each (M,). The entries of
    `prefix` are the completions' questions. The same in any batch, to rounding."""
    device = prefix.lengths.device
    tokens, sampled = gpt.pad([c.tokens for c in completions], device), gpt.pad([c.mask for c in completions], device).bool()
    hidden = torch.cat([prefix.hidden.unsqueeze(1), model(tokens[:, :-1], gpt.Cache(prefix))], dim=1)     # (B, T, C)
    logprobs = gpt.policy_logprobs(model.unembed(hidden[sampled]), tokens[sampled], flags.temperature, flags.top_k)
    return logprobs, sampled.nonzero()[:, 0]


def backward(model: GPT, groups: list[Group], num_tokens: int, flags: Flags) -> tuple[float, int]:
    """Adds the gradient of −Σ advantage · logprob / num_tokens to that of the model. Answers without advantage, so whole
    groups whose rewards agree, are not run. Returns Σ |sampler − trainer| logprob and the number of tokens it is over.

    A question runs forward once and backward once, whatever the batch: its answers read detached copies of its keys,
    values and last position, and the gradients that they leave there are sent back through it in the end.
    """
    gap, count = 0.0, 0
    groups = [group for group in groups if any(group.advantages)]
    for questions in batched(groups, flags.device_batch_size):
        prefix = gpt.prefill(model, [group.prompt for group in questions])
        leaves = prefix.map(lambda x: x.detach().requires_grad_())
        answers = [(i, completion, advantage) for i, group in enumerate(questions)
                   for completion, advantage in zip(group.completions, group.advantages) if advantage]
        answers.sort(key=lambda answer: len(answer[1].tokens))
        for batch in batched(answers, flags.device_batch_size):
            index, completions, advantages = zip(*batch)
            device = prefix.lengths.device
            logprobs, row = completion_logprobs(model, leaves.rows(torch.tensor(index, device=device)), completions, flags)
            loss = -(torch.tensor(advantages, device=device)[row] * logprobs).sum() / num_tokens
            loss.backward()
            sampled = [p for c in completions for p, mask in zip(c.logprobs, c.mask) if mask]
            gap += (logprobs.detach() - torch.tensor(sampled, device=device)).abs().sum().item()
            count += len(sampled)
        ends = [(x, leaf.grad) for x, leaf in zip(prefix.tensors(), leaves.tensors()) if leaf.grad is not None]
        torch.autograd.backward(*zip(*ends))
    return gap, count


def gradient_buffer(model: GPT) -> Tensor:
    """One float32 vector of which every parameter's gradient is a view, so that ranks add theirs in one call."""
    params = list(model.parameters())
    buffer = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
    for p, part in zip(params, buffer.split([p.numel() for p in params])):
        p.grad = part.view_as(p)
    return buffer


def step_optimizers(optimizers: list[torch.optim.Optimizer], fraction: float) -> None:
    """One step of each, at this fraction of the learning rates that they were made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("full_lr", group["lr"]) * fraction
        optimizer.step()


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n of them: 1 − C(n−c, k) / C(n, k) (Chen et
    al. 2021)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def evaluate(run: Run, ranks: Ranks) -> tuple[dict, list[Group]]:
    """pass@k for k = 1 … device_batch_size at temperature 1 and the greedy accuracy on the first eval_examples test
    questions, with the same random numbers every time. Rank 0 gets the metrics and all groups, others nothing."""
    n, seed = run.flags.device_batch_size, int(gpt.fold(run.flags.seed, EVALUATION))
    mine = run.task.test[:run.flags.eval_examples][ranks.rank::ranks.size]
    sampled = ranks.attempt(rollout, run, mine, n, 1.0, seed, "evaluation")
    greedy = ranks.attempt(rollout, run, mine, 1, 0.0, seed, "evaluation, greedy")
    if ranks.stopping():
        return {}, []
    groups, greedy, metrics = ranks.gather(sampled), ranks.gather(greedy), {}
    if groups:
        right = [sum(reward >= 1 for reward in group.rewards) for group in groups]
        for k in range(1, n + 1):
            metrics[f"pass@{k}"], metrics[f"pass@{k}_error"] = mean_and_error([pass_at_k(n, c, k) for c in right])
        metrics["greedy"], metrics["greedy_error"] = mean_and_error([float(group.rewards[0] >= 1) for group in greedy])
    return metrics, groups


# ----------------------------------------------------------------------------------------------------------------------
# What a person sees


class Log:
    """metrics.jsonl, samples_<step>.jsonl and curve.png in the run's folder, and W&B under the same names."""

    def __init__(self, run: Run):
        """Takes up the log at the run's step: what an interrupted run wrote after it is cut off."""
        self.out, self.path, self.wandb = run.out, run.out / "metrics.jsonl", None
        kept = [line for line in self.lines() if line["step"] < run.step]
        gpt.write_file(self.path, lambda file: file.writelines(json.dumps(line).encode() + b"\n" for line in kept))
        if run.flags.run != "dummy":
            try:
                import wandb
                self.wandb = wandb.init(project="chat_rl", name=run.flags.run, id=run.meta["wandb_id"], resume="allow",
                                        dir=str(run.out), config=asdict(run.flags), settings=wandb.Settings(init_timeout=20))
                self.wandb.define_metric("*", step_metric="step")
            except Exception as error:      # no network, no account, no disk: none of them is worth the run
                say(f"warning: no W&B ({gpt.one_line(error)}); the run goes on, its figures are in {self.path}. "
                    "Set WANDB_MODE=offline to keep them for `wandb sync`.")

    def lines(self) -> list[dict]:
        text = self.path.read_text() if self.path.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def write(self, metrics: dict) -> None:
        line = {key: finite(x) for key, x in metrics.items()}
        size = self.path.stat().st_size
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError:                     # a full disk: no half lines
            os.truncate(self.path, size)
            raise
        if self.wandb:
            self.wandb.log(line)

    def write_samples(self, step: int, groups: list[Group], tokenizer: Tokenizer) -> None:
        """Every completion of an evaluation; prints a question with a right and a wrong one."""
        rows = [{"question": g.example["question"], "reference": g.example["answer"],
                 "completions": [answer_text(tokenizer, c) for c in g.completions],
                 "rewards": [finite(reward) for reward in g.rewards]} for g in groups]
        gpt.write_file(self.out / f"samples_{step:06d}.jsonl",
                       lambda file: file.writelines(json.dumps(row).encode() + b"\n" for row in rows))
        if self.wandb:
            import wandb
            data = [[row["question"], row["reference"], *answer]
                    for row in rows for answer in zip(row["completions"], row["rewards"])]
            table = wandb.Table(columns=["question", "reference", "completion", "reward"], data=data)
            self.wandb.log({"step": step, "samples": table})
        row = max(rows, key=lambda row: len({(reward or 0) >= 1 for reward in row["rewards"]}))
        say(f"  question   {shortened(row['question'])}\n  reference  {shortened(row['reference'])}")
        for title, right in (("right", True), ("wrong", False)):
            text = next((t for t, reward in zip(row["completions"], row["rewards"]) if ((reward or 0) >= 1) == right), None)
            if text is not None:
                say(f"  {title}      {shortened(text)}")

    def plot(self) -> None:
        """Draws curve.png anew from metrics.jsonl."""
        from matplotlib.figure import Figure
        lines = self.lines()
        steps, tests = [x for x in lines if "reward" in x], [x for x in lines if "greedy" in x]
        figure = Figure(figsize=(10, 6), layout="constrained")
        reward, passed, length, entropy = figure.subplots(2, 2).flat
        for axes, key, title in ((reward, "reward", "reward (mean of the step)"),
                                 (length, "completion_length", "completion length (tokens)"),
                                 (entropy, "entropy", "entropy (nats per sampled token)")):
            x, y = [line["step"] for line in steps], [line[key] if line[key] is not None else math.nan for line in steps]
            means = [statistics.fmean(y[max(0, i - 9):i + 1]) for i in range(len(y))]
            axes.plot(x, y, color="tab:blue", alpha=0.4, linewidth=1, label="step")
            axes.plot(x, means, color="tab:blue", label="mean of 10 steps")
            axes.set(title=title, xlabel="step")
        reward.legend(loc="lower right")
        for key in powers([k for k in tests[-1] if re.fullmatch(r"pass@\d+", k)] if tests else []) + ["greedy"]:
            passed.errorbar([x["step"] for x in tests], [x[key] for x in tests], [x[key + "_error"] for x in tests],
                            label=key, capsize=3, marker="o", markersize=3, linestyle="--" if key == "greedy" else "-")
        passed.set(title="test questions solved (± standard error)", xlabel="step")
        passed.legend(loc="lower right")
        for axes in (reward, passed, length, entropy):
            axes.grid(alpha=0.3)
        gpt.write_file(self.out / "curve.png", lambda file: figure.savefig(file, dpi=110))

    def close(self) -> None:
        """Prints what the run has changed, and where to look."""
        lines = self.lines()
        tests, rewards = [x for x in lines if "greedy" in x], [x["reward"] or 0.0 for x in lines if "reward" in x]
        if len(tests) > 1:
            say(f"before  {evaluation_row(tests[0])}\nafter   {evaluation_row(tests[-1])}")
        if rewards:
            say(f"reward  {sparkline(rewards)}  {rewards[0]:.3f} → {rewards[-1]:.3f}")
        say(f"curve   {self.out / 'curve.png'}")
        if self.wandb:
            self.wandb.finish()


def finite(x: Any) -> Any:
    """What JSON can say of x: null where it is infinite or not a number."""
    return None if isinstance(x, float) and not math.isfinite(x) else x


def shortened(text: str, width: int = 600) -> str:
    text = " ⏎ ".join(text.strip().splitlines())
    return text if len(text) <= width else text[:width] + " …"


def powers(keys: list[str]) -> list[str]:
    """Of pass@1, pass@2, …: those whose k is a power of two."""
    return [key for key in keys if int(key[5:]).bit_count() == 1]


def evaluation_row(metrics: dict) -> str:
    keys = [*powers([key for key in metrics if re.fullmatch(r"pass@\d+", key)]), "greedy"]
    return "  ".join(f"{key} {metrics[key]:.3f} ± {metrics[key + '_error']:.3f}" for key in keys)


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


def teach(model: GPT, tokenizer: Tokenizer, task: Any, steps: int, size: int) -> None:
    """Supervised learning of a task's reference answers, `size` questions a step. It is the update of RL, with one right
    answer per question, its advantage 1 and the whole softmax for a policy. The rates stay as high as they are, so that
    the model stops short of what it could do."""
    flags = Flags(top_k=0, device_batch_size=size)
    optimizers, gradient = gpt.make_optimizers(model), gradient_buffer(model)
    order = torch.randint(len(task.train), (steps, size), generator=torch.Generator().manual_seed(0)).tolist()
    for step in tqdm(range(steps), desc="starter", unit="step", leave=False, disable=None):
        groups = []
        for example in (task.train[i] for i in order[step]):
            tokens = [*tokenizer.encode(example["answer"]), tokenizer.assistant_end]
            answer = Completion(tokens, [True] * len(tokens), [0.0] * len(tokens))
            groups.append(Group(example, tokenizer.render(example["question"]), [answer], [1.0], [1.0]))
        gradient.zero_()
        backward(model, groups, sum(len(g.completions[0].tokens) for g in groups), flags)
        step_optimizers(optimizers, 1.0)


def make_starter(folder: Path, flags: Flags) -> None:
    """Makes a tiny GPT, teaches it to add most of the time, and saves it as an SFT checkpoint."""
    tokenizer = byte_tokenizer()
    config = gpt.Config(sequence_len=256, vocab_size=tokenizer.vocab_size, n_layer=4, n_head=4, n_kv_head=4, n_embd=128)
    model, threads = GPT(config).init_weights(seed=2), torch.get_num_threads()
    torch.set_num_threads(2)                # rounding, and so how much it has learned by then, depends on their number
    teach(model, tokenizer, Arithmetic(flags), steps=150, size=128)
    torch.set_num_threads(threads)
    gpt.save_checkpoint(folder, 150, model, tokenizer, {"model_config": asdict(config)})


# ----------------------------------------------------------------------------------------------------------------------
# The run


def find_checkpoint(tag: str | None, base: Path) -> Path:
    """The folder of the SFT checkpoint that --model-tag names. Raises UserError where there is none."""
    folder = base / "chatsft_checkpoints"
    tags = sorted(path.parent.name for path in folder.glob("*/model_*.pt"))
    if tag is None:
        sized = [(int(found[1]), t) for t in tags if (found := re.match(r"d(\d+)", t))]
        newest = max(tags, key=lambda t: (folder / t).stat().st_mtime, default="starter")
        return folder / (max(sized)[1] if sized else newest)
    if tag in tags or tag == "starter":
        return folder / tag
    if any(Path(tag).glob("model_*.pt")):
        return Path(tag).resolve()
    raise UserError(f"no model tag {tag} in {folder}: choose one of {', '.join(sorted({*tags, 'starter'}))}, or a folder with "
                    "model_*.pt")


def find_resumable(out: Path, device: torch.device, dtype: torch.dtype) -> tuple | None:
    """What the last sound checkpoint in a run's folder holds: model, tokenizer, meta and training state."""
    for step in reversed(gpt.checkpoint_steps(out)):
        path = out / f"optim_{step:06d}.pt"
        try:
            model, tokenizer, meta = gpt.load_checkpoint(out, step, device, dtype)
            gpt.check_digest(path, meta)
            training = torch.load(path, map_location=device, weights_only=True)
            if training["meta"] != {key: meta.get(key) for key in training["meta"]} or "sha256" not in meta:
                raise UserError(f"{out / f'meta_{step:06d}.json'} is damaged")
            return model, tokenizer, meta, training
        except UserError as error:
            say(f"passing over step {step}: {error}")
        except Exception as error:          # damaged files fail in many ways
            say(f"passing over step {step}: {path} cannot be loaded: {gpt.one_line(error)}")
    return None


def prepare(given: dict, ranks: Ranks) -> Run:
    """Finds and checks everything that a run needs. Raises UserError, before anything is written, on what is amiss."""
    base = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()
    source = find_checkpoint(given.get("model_tag"), base)
    out = base / "chatrl_checkpoints" / source.name
    is_starter = source == base / "chatsft_checkpoints" / "starter"
    defaults = STARTER if is_starter else {"task": "gsm8k"}
    flags = Flags(**{**defaults, **given})
    dtype = flags.dtype or ("bfloat16" if ranks.device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32")
    flags = replace(flags, dtype=dtype)
    resumed = find_resumable(out, ranks.device, getattr(torch, dtype)) if flags.resume else None
    if resumed:
        saved = resumed[2]["flags"]
        flags = replace(Flags(**{**saved, **given}), dtype=dtype)
        differing = [name for name in saved if getattr(flags, name) != saved[name] and name not in FREE_FLAGS]
        if differing:
            raise UserError("--resume: the run in " + str(out) + " has other flags: " + ", ".join(
                f"--{name.replace('_', '-')} {saved[name]}, not {getattr(flags, name)}" for name in differing))
    if flags.examples_per_step % ranks.size:
        raise UserError(f"--examples-per-step {flags.examples_per_step} is not divisible by the {ranks.size} ranks: "
                        f"make it a multiple of {ranks.size}")
    if flags.task not in TASKS:
        raise UserError(f"--task {flags.task} is unknown: choose {', '.join(TASKS)}")
    task = TASKS[flags.task](flags)
    if is_starter and not resumed and not gpt.checkpoint_steps(source):
        say(f"no checkpoint in {base}: making the starter, a tiny GPT that can nearly add; --model-tag names another one")
        make_starter(source, flags)
    model, tokenizer, meta, training = resumed or (
        *gpt.load_checkpoint(source, flags.model_step, ranks.device, getattr(torch, dtype)), None)
    keep_short(task, tokenizer, model.config.sequence_len - flags.max_new_tokens)
    steps_per_epoch = len(task.train) // flags.examples_per_step
    if not steps_per_epoch or not task.test:
        raise UserError(f"{len(task.train)} training and {len(task.test)} test questions are too few: lower --examples-per-step "
                        "or --max-new-tokens")
    num_steps = flags.num_epochs * steps_per_epoch if flags.max_steps is None else flags.max_steps
    make_folder(out, fresh=not resumed)
    meta = {"model_config": meta["model_config"], "flags": asdict(flags), "source": meta.get("source", str(source)),
            "wandb_id": meta.get("wandb_id", os.urandom(4).hex()), "step": meta["step"] if resumed else 0}
    return Run(flags, task, model, tokenizer, meta, out, num_steps, meta["step"], training)


def keep_short(task: Any, tokenizer: Tokenizer, limit: int) -> None:
    """Numbers a task's questions, and leaves out those whose prompts are longer than `limit` tokens."""
    for split in ("train", "test"):
        rows = [{**row, "index": i} for i, row in enumerate(getattr(task, split))]
        short = [row for row in rows if len(tokenizer.render(row["question"])) <= limit]
        if len(short) < len(rows):
            say(f"{len(rows) - len(short)} of {len(rows)} {split} questions are longer than {limit} tokens and left out")
        setattr(task, split, short)


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


def save(run: Run, optimizers: list[torch.optim.Optimizer]) -> None:
    """Writes a checkpoint to load here and in nanochat, and to resume from. Raises UserError where the disk refuses."""
    masters = {key: x for key, x in run.model.state_dict().items() if run.model.stored_types.get(key, x.dtype) != x.dtype}
    training = {"optimizers": [optimizer.state_dict() for optimizer in optimizers], "masters": masters,
                "meta": {**run.meta, "step": run.step}}
    try:
        gpt.save_checkpoint(run.out, run.step, run.model, run.tokenizer, run.meta, training)
        done = [path for path in sorted(run.out.glob("optim_*.pt")) if path.name <= f"optim_{run.step:06d}.pt"]
        for path in done[:-run.flags.keep_last]:
            path.unlink()
    except (OSError, RuntimeError) as error:        # torch wraps what the disk says in a RuntimeError
        raise UserError(f"cannot save to {run.out} ({gpt.one_line(error.__context__ or error)}): free some space and go on "
                        "with --resume") from error


def evaluate_and_log(run: Run, log: Log | None, ranks: Ranks) -> None:
    metrics, groups = evaluate(run, ranks)
    if metrics:
        say(f"step {run.step}/{run.num_steps}  {evaluation_row(metrics)}")
        log.write({"step": run.step, **metrics})
        log.write_samples(run.step, groups, run.tokenizer)
        log.plot()


def make_learner(run: Run) -> tuple[list[torch.optim.Optimizer], Tensor]:
    """The optimizers and the gradient buffer, as a resumed run left them."""
    flags, model = run.flags, run.model
    optimizers = gpt.make_optimizers(model, flags.embedding_lr, flags.unembedding_lr, flags.matrix_lr, flags.weight_decay)
    if run.training:
        model.load_state_dict(run.training["masters"], strict=False)
        for optimizer, state in zip(optimizers, run.training["optimizers"]):
            optimizer.load_state_dict(state)
    return optimizers, gradient_buffer(model)


def step_row(run: Run, metrics: dict, seconds_left: float) -> str:
    row = (f"step {run.step}/{run.num_steps}  reward {metrics['reward']:.3f}  length {metrics['completion_length']:.1f}  "
           f"{metrics['tokens_per_second']:,.0f} tok/s  left {timedelta(seconds=round(seconds_left))}")
    return row if math.isfinite(metrics["grad_norm"]) else row + "  the gradient is not finite: step left out"


def train(run: Run, ranks: Ranks) -> None:
    """The algorithm. Ends early, with the last completed step saved, when a rank is told to stop."""
    flags, model = run.flags, run.model
    optimizers, gradient = make_learner(run)
    log = Log(run) if ranks.rank == 0 else None
    saved, failures, first, started = run.step, 0, run.step, time.monotonic()
    ranks.listen()
    while run.step < run.num_steps:
        if run.step % flags.eval_every == 0:
            evaluate_and_log(run, log, ranks)

        begun = time.monotonic()
        questions = questions_of_step(run, run.step)[ranks.rank::ranks.size]
        seed = int(gpt.fold(flags.seed, TRAINING, run.step))
        groups = ranks.attempt(rollout, run, questions, flags.num_samples, flags.temperature, seed, f"step {run.step}")
        if ranks.stopping():
            break
        metrics, num_tokens, num_sampled = summarize(run, groups, ranks)
        sampled = time.monotonic()

        gradient.zero_()
        result = ranks.attempt(backward, model, groups, num_sampled, flags)
        if ranks.stopping():
            break
        gap, learned = ranks.sum(result)
        norm = ranks.sum_(gradient).norm().item()
        lrm = 1 - run.step / run.num_steps
        if learned and math.isfinite(norm):
            step_optimizers(optimizers, flags.init_lr_frac * lrm)
        failures = 0 if math.isfinite(norm) else failures + 1
        done = time.monotonic()

        metrics |= {"grad_norm": norm, "lrm": lrm, "sampler_gap": gap / max(learned, 1), "rollout_seconds": sampled - begun,
                    "update_seconds": done - sampled, "tokens_per_second": num_tokens / (sampled - begun)}
        seconds = (done - started) / (run.step + 1 - first) * (run.num_steps - run.step - 1)
        say(step_row(run, metrics, seconds))
        if log:
            log.write({"step": run.step, **metrics})
        if failures == 5:
            raise UserError("the gradient was not finite five times in a row, and nothing more is saved: look at the rewards, "
                            "lower the learning rates, and go on from the last checkpoint with --resume")
        run.step += 1
        if run.step % flags.save_every == 0 or run.step == run.num_steps:
            saved = run.step
            if log:
                save(run, optimizers)
    else:
        evaluate_and_log(run, log, ranks)
    if log:
        if saved < run.step:
            save(run, optimizers)
        log.plot()
        log.close()
        stopped = run.step < run.num_steps
        say(f"stopped after step {run.step} of {run.num_steps}: go on with --resume" if stopped else f"saved in {run.out}")


def main(argv: list[str]) -> int:
    """Runs, and returns the exit status: 2 where something was amiss from the start, 1 where it went wrong later."""
    status = 2
    try:
        given = parse_flags(argv)
        ranks = Ranks(given.get("device_type", ""))
        try:
            run = prepare(given, ranks) if ranks.rank == 0 else None
        except UserError as error:
            run = error
        run = ranks.share(run)
        if isinstance(run, UserError):
            raise run
        status = 1
        train(run, ranks)
        status = 0
    except (UserError, OSError) as error:
        full = isinstance(error, OSError) and status == 1
        hint = f"cannot write to {run.out}: free some space and go on with --resume: " if full else ""
        if main_rank():
            print(f"chat_rl: {hint}{error}", file=sys.stderr)
    if dist.is_initialized():
        if status == 0:
            dist.barrier()                  # no rank leaves while another is still talking to it
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    if "RANK" in os.environ:                # gloo's threads now and then abort an interpreter that shuts down in order
        os._exit(status)
    sys.exit(status)
