"""A run of two steps recomputed by hand, from the files it began with: each completion, metric, sample and weight that it must
have come to; what W&B is told of it; and a second signal that comes too soon."""
import json
import math
import os
import re
import shutil
import signal
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Iterable, Iterator
from unittest.mock import MagicMock, call

import numpy
import pydantic
import pytest
import torch
from conftest import assert_same_run, completion, cut_back, last_step, main, metrics, out, samples, untimed, weights
from reference import NAMES, random_state, reference_logits, write_checkpoint
from torch import Tensor

import chat_rl
import gpt

BOS, USER_START, USER_END, ASSISTANT_START, ASSISTANT_END, PYTHON_START, PYTHON_END, OUTPUT_START, OUTPUT_END = range(256, 265)
CONFIG = {"sequence_len": 64, "vocab_size": 265, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "window_pattern": "L"}
TRAIN = [{"question": f"q{i}?", "answer": ["x", "34"[i % 2]]} for i in range(14)]
TEST = [{"question": f"t{i}?", "answer": ["x", "343"[i % 3]]} for i in range(7)]
EXAMPLES, SAMPLES, LENGTH, EVALUATED, K, SEED = 7, 3, 12, 5, 3, 36
TEMPERATURE, WARMER, TOP_K, DECAY, FRACTION = 0.8, 1.2, 4, 0.3, 0.02
RATES = {"embedding": 0.3, "unembedding": 0.006, "matrix": 0.03}
FLAGS = ["--model-tag=adder", "--task=script", "--prefill==", "--run=recorded", "--max-steps=2", "--eval-every=1",
         "--save-every=1", "--device-batch-size=3", "--rollout-batch-size=9",
         f"--examples-per-step={EXAMPLES}", f"--num-samples={SAMPLES}", f"--max-new-tokens={LENGTH}",
         f"--eval-examples={EVALUATED}", f"--eval-samples={K}", f"--seed={SEED}", f"--temperature={TEMPERATURE}",
         f"--eval-temperature={WARMER}", f"--top-k={TOP_K}", f"--weight-decay={DECAY}", f"--init-lr-frac={FRACTION}",
         *(f"--{name}-lr={rate}" for name, rate in RATES.items())]
SHIFT = 0.25                                # added to the logprobs that the sampler tells, so that there is a gap to measure

# What the model likes to say: it calls the calculator, ends its turn in either way, or goes on past the limit.
SCRIPT = {"=": {PYTHON_START: 8, "#": 5, "3": 3, BOS: 3}, PYTHON_START: {"1": 7}, "1": {"+": 7, PYTHON_END: 3},
          "+": {"2": 7}, "2": {PYTHON_END: 7, "3": 3}, PYTHON_END: {OUTPUT_START: 5, "#": 4}, OUTPUT_START: {"3": 4},
          OUTPUT_END: {"#": 6, "3": 5, "4": 5}, "#": {"3": 6, "#": 3, "4": 6, BOS: 3},
          "3": {ASSISTANT_END: 6, "3": 4, "#": 4, BOS: 4}, "4": {ASSISTANT_END: 6, "3": 4, "#": 4, BOS: 4}}


def use_script(patch: pytest.MonkeyPatch, grader: Callable[[str, str], float]) -> None:
    """Makes --task=script, of functions."""
    patch.setitem(chat_rl.MADE, "script", lambda: {"train": TRAIN, "test": TEST})
    patch.setitem(chat_rl.GRADERS, "script", grader)
    patch.setitem(chat_rl.TASKS, "script", {"data": "script", "grader": "script"})
    pydantic.dataclasses.rebuild_dataclass(chat_rl.Flags, force=True)       # with this choice of --task


def shift_logprobs(patch: pytest.MonkeyPatch) -> None:
    """What is sampled stays the same; what the sampler tells of its logprobs does not."""
    generate = gpt.generate

    def shifted(*args: Any, **more: Any) -> list[list[gpt.Completion]]:
        groups = generate(*args, **more)
        for c in sum(groups, []):
            c.logprobs[c.sampled] += SHIFT
        return groups

    patch.setattr(gpt, "generate", shifted)


def loaded(n: int) -> list[int]:
    """The order of so many rows."""
    return numpy.random.default_rng(42).permutation(n).tolist()


def questions(step: int) -> list[int]:
    """The rows of a step's training questions, ascending; the two steps are of one epoch."""
    order = numpy.random.default_rng((SEED, 1, 0)).permutation(len(TRAIN)).tolist()
    return sorted(loaded(len(TRAIN))[i] for i in order[step * EXAMPLES:(step + 1) * EXAMPLES])


def uniform(seed: tuple, question: int, sample: int, position: int) -> float:
    return gpt.uniforms(*seed, question, sample, position).item()


def token_id(token: int | str) -> int:
    return token if isinstance(token, int) else ord(token)


def scripted_state() -> dict[str, Tensor]:
    """Weights of nanochat's current generation, all of them in use, that follow SCRIPT more or less."""
    state = random_state("current", CONFIG)
    wte, head = state["transformer.wte.weight"], state["lm_head.weight"]
    head *= 0.1
    wte *= 2
    for channel, (token, after) in enumerate(SCRIPT.items()):
        wte[token_id(token), channel] += 1.0
        for other, logit in after.items():
            head[token_id(other), channel] += logit * CONFIG["n_embd"] ** -0.5
    return state


def grader(reference: str, text: str) -> float:
    """1 for the right last character, a half for another digit; nothing without the beginning that was given."""
    return text.startswith("=") * (1.0 if text.endswith(reference) else 0.5 * text[-1:].isdigit())


@pytest.fixture(scope="module")
def wandb() -> Iterator[MagicMock]:
    """The task, a sampler that tells shifted logprobs, and W&B's stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", MagicMock(name="wandb"))
        use_script(patch, grader)
        shift_logprobs(patch)
        yield sys.modules["wandb"]


def logged(wandb: MagicMock) -> list[dict]:
    """What W&B was told of each step."""
    told = {}
    for (new,), where in wandb.init.return_value.log.call_args_list:
        told.setdefault(where["step"], dict(where)).update(new)
    return list(told.values())


@pytest.fixture(scope="module")
def whole(wandb, tmp_path_factory) -> SimpleNamespace:
    """The run: its folder, its weights after each step, its metrics line by line, and what W&B was told. Do not write there."""
    base = tmp_path_factory.mktemp("metrics") / "base"
    write_checkpoint(base / "chatsft_checkpoints" / "adder", scripted_state(), CONFIG)
    assert main(base, *FLAGS) == 0
    files, lines = [*base.glob("chatsft_checkpoints/adder/model_*.pt"), *sorted(out(base).glob("model_*.pt"))], metrics(base)
    return SimpleNamespace(base=base, states=[torch.load(file, weights_only=True) for file in files], metrics=lines,
                           steps=[line for line in lines if "reward" in line], logged=logged(wandb), calls=wandb.mock_calls[:],
                           evaluations=[line for line in lines if "greedy" in line], begun=wandb.init.call_args.kwargs)


@pytest.fixture
def base(whole, tmp_path) -> Path:
    """A base folder with the checkpoint alone."""
    shutil.copytree(whole.base / "chatsft_checkpoints", tmp_path / "base" / "chatsft_checkpoints")
    return tmp_path / "base"


# By hand


def prompt_of(row: dict) -> list[int]:
    return [BOS, USER_START, *row["question"].encode(), USER_END, ASSISTANT_START, *b"="]


def text_of(tokens: list[int]) -> str:
    said = tokens[:-1] if tokens[-1] in (ASSISTANT_END, BOS) else tokens
    return b"".join(bytes([i]) if i < 256 else f"<|{NAMES[i - 256]}|>".encode() for i in said).decode(errors="replace")


def policy(row: Tensor, temperature: float, top_k: int) -> tuple[Tensor, list[int]]:
    """Logprobs (k,) of the k likeliest tokens, best first, and their ids, given logits (V,)."""
    ids = row.argsort(descending=True)[:top_k].tolist()
    return (row[ids] / temperature).log_softmax(dim=-1), ids


@torch.no_grad()
def sampled(state: dict, row: dict, numbers: Callable[[int], float], temperature: float, top_k: int) -> gpt.Completion:
    """One completion, alone: the whole of it forward at each token, `numbers` giving the random number of a position."""
    tokens, mask, logprobs, entropy, forced = [], [], [], 0.0, []
    while len(tokens) < LENGTH:
        if forced:
            token, logprob, learned = forced.pop(0), 0.0, False
        else:
            p, ids = policy(reference_logits(state, CONFIG, prompt_of(row) + tokens)[-1], temperature, top_k)
            reach = p.exp().cumsum(dim=0).tolist()
            i = next(i for i, x in enumerate(reach) if x > numbers(len(tokens)) * reach[-1])
            token, logprob, learned = ids[i], p[i].item(), True
            entropy -= (p.exp() @ p).item()
        tokens.append(token)
        mask.append(learned)
        logprobs.append(logprob)
        if learned and token == PYTHON_END:
            forced = chat_rl.byte_tokenizer().answer_call(tokens)
        if token in (ASSISTANT_END, BOS):
            break
    return completion(tokens, mask, logprobs, entropy)


def group_of(state: dict, rows: list[dict], i: int, n: int, seed: tuple, temperature: float, top_k: int) -> SimpleNamespace:
    completions = [sampled(state, rows[i], lambda t: uniform(seed, i, j, t), temperature, top_k) for j in range(n)]
    texts = ["=" + text_of(c.tokens.tolist()) for c in completions]
    scores = [max(grader(reference, text) for reference in rows[i]["answer"]) for text in texts]
    return SimpleNamespace(row=rows[i], completions=completions, texts=texts, scores=scores,
                           advantages=[score - sum(scores) / n for score in scores])


def double(state: dict) -> dict:
    return {name: x.double() for name, x in state.items()}


@pytest.fixture(scope="module")
def rollouts(whole) -> list[list[SimpleNamespace]]:
    """The groups that each step must have sampled."""
    return [[group_of(double(whole.states[step]), TRAIN, i, SAMPLES, (SEED, 3, step), TEMPERATURE, TOP_K)
             for i in questions(step)] for step in range(2)]


def test_the_script_is_all_there(rollouts):
    """What the other tests would notice happens: calls, forced tokens, all ends, half scores, groups of all kinds."""
    groups = sum(rollouts, [])
    completions = [c for group in groups for c in group.completions]
    assert {c.tokens[-1] for c in completions} >= {ASSISTANT_END, BOS} and max(len(c.tokens) for c in completions) == LENGTH
    assert sum(c.tokens.tolist().count(OUTPUT_START) for c in completions) > 9
    assert any(not c.sampled[-1] for c in completions) and sum(not all(c.sampled) for c in completions) > 9
    lowest, highest = ([f(group.scores) for group in groups] for f in (min, max))
    assert set(lowest) == {0.0, 0.5, 1.0} and 0.5 in highest and 0 < lowest.count(1.0) < len(groups) / 2
    assert len({len(c.tokens) for c in completions}) > 4


def test_metrics_of_the_steps(whole, rollouts):
    """Each is what the step's completions say."""
    assert [line["step"] for line in whole.steps] == [0, 1]
    for line, groups in zip(whole.steps, rollouts, strict=True):
        completions = [c for group in groups for c in group.completions]
        tokens, learned = sum(len(c.tokens) for c in completions), sum(sum(c.sampled) for c in completions)
        wanted = {"reward": statistics.fmean(score for group in groups for score in group.scores),
                  "all_right": sum(set(group.scores) == {1.0} for group in groups) / EXAMPLES,
                  "all_wrong": sum(1.0 not in group.scores for group in groups) / EXAMPLES,
                  "completion_length": tokens / (EXAMPLES * SAMPLES),
                  "truncated": sum(c.tokens[-1] not in (ASSISTANT_END, BOS) for c in completions) / (EXAMPLES * SAMPLES),
                  "entropy": sum(c.entropy for c in completions) / learned, "grader_timeouts": 0, "lr_fraction": FRACTION * (1 - line["step"] / 2),
                  "advantage_tokens": sum(sum(c.sampled) for g in groups for c, a in zip(g.completions, g.advantages) if a) / learned,
                  "sampler_gap": SHIFT, "ratio_max": math.exp(SHIFT), "approx_kl": math.exp(-SHIFT) - 1 + SHIFT,
                  "clip_fraction": 0, "updates_left_out": 0}
        assert {key: line[key] for key in wanted} == pytest.approx(wanted, rel=0, abs=2e-5)
        assert line["tokens_per_second"] * line["rollout_seconds"] == pytest.approx(tokens)
        assert line["update_seconds"] > 0
        rest = {"step", "tokens_per_second", "rollout_seconds", "update_seconds", "grad_norm"}
        assert {key for key in line if not re.search("pass@|greedy|evaluation", key)} - set(wanted) == rest


def test_evaluations(whole):
    """pass@k, the greedy accuracy and the samples at each step are those of the weights then, with the same random numbers
    every time, at their own temperature and the run's top-k. Half a score is not solved."""
    assert [line["step"] for line in whole.evaluations] == [0, 1, 2]
    for line, state in zip(whole.evaluations, map(double, whole.states), strict=True):
        groups = [group_of(state, TEST, i, K, (SEED, 4), WARMER, TOP_K) for i in sorted(loaded(len(TEST))[:EVALUATED])]
        greedy = [group_of(state, TEST, i, 1, (SEED, 4), 1.0, 1) for i in sorted(loaded(len(TEST))[:EVALUATED])]
        assert 0.5 in [group.scores[0] for group in greedy] and 1.0 in [group.scores[0] for group in greedy]
        for row, group, best in zip(samples(whole.base, line["step"]), groups, greedy, strict=True):
            assert (row["question"], row["reference"]) == (group.row["question"], " or ".join(group.row["answer"]))
            assert (row["completions"], row["rewards"]) == (group.texts + best.texts, group.scores + best.scores)
        solved = {"greedy": [group.scores[0] == 1 for group in greedy]}
        for k in range(1, K + 1):
            wrong = [sum(score < 1 for score in group.scores) for group in groups]
            solved[f"pass@{k}"] = [1 - math.comb(n, k) / math.comb(K, k) for n in wrong]
        wanted = {key: statistics.fmean(x) for key, x in solved.items()}
        wanted |= {"evaluation_timeouts": 0} | {f"{key}_error": statistics.stdev(map(float, x)) / EVALUATED ** 0.5 for key, x in solved.items()}
        assert {key: line[key] for key in wanted} == pytest.approx(wanted)
    assert set(line) - set(wanted) == {"step", "evaluation_seconds"}


def gradients(state: dict, groups: list[SimpleNamespace]) -> dict[str, Tensor]:
    """Of the loss, in float64: each completion alone, over the tokens that were sampled in the whole step. Where the policy is
    e^−SHIFT of what it was, so is the ratio's gradient of the logprob's."""
    state = {name: x.double().requires_grad_() for name, x in state.items()}
    loss, learned = 0.0, sum(sum(c.sampled) for group in groups for c in group.completions)
    for group in groups:
        prompt = prompt_of(group.row)
        for c, advantage in zip(group.completions, group.advantages):
            rows = reference_logits(state, CONFIG, prompt + c.tokens.tolist())[len(prompt) - 1:-1]
            for row, token, mask in zip(rows, c.tokens.tolist(), c.sampled):
                if mask and advantage:
                    p, ids = policy(row, TEMPERATURE, TOP_K)
                    loss = loss - advantage * math.exp(-SHIFT) * p[ids.index(token)] / learned
    return dict(zip(state, torch.autograd.grad(loss, list(state.values()))))


def norm_of(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(x.double().norm().item() for x in tensors))


def settings_of(name: str) -> tuple[float, float, float, float] | None:
    """Learning rate, betas and weight decay of Adam, in nanochat's table; None for Muon's."""
    s = (CONFIG["n_embd"] / 768) ** -0.5
    table = {"lm_head": (RATES["unembedding"] * s, 0.8, 0.96, DECAY), "transformer.wte": (RATES["embedding"] * s, 0.8, 0.995, DECAY),
             "value_embeds": (RATES["embedding"] * s / 2, 0.8, 0.995, 0), "resid_lambdas": (0.005, 0.8, 0.95, 0),
             "x0_lambdas": (0.5, 0.96, 0.95, 0), "smear": (0.2, 0.8, 0.95, 0), "backout": (0.2, 0.8, 0.95, 0)}
    return next((row for prefix, row in table.items() if name.startswith(prefix)), None)


def test_weights_after_each_step(whole, rollouts):
    """They are what AdamW and Muon, written out, make of the gradient; so is its norm. Adam's step is the gradient's sign in
    the beginning: elements whose gradient is next to nothing are left out."""
    means, squares = ({name: torch.zeros_like(x).double() for name, x in whole.states[0].items()} for _ in range(2))
    for step, groups in enumerate(rollouts):
        before, after, fraction = whole.states[step], whole.states[step + 1], FRACTION * (1 - step / 2)
        gradient = gradients(before, groups)
        assert whole.steps[step]["grad_norm"] == pytest.approx(norm_of(gradient.values()), rel=1e-5)
        for name, g in gradient.items():
            x, mean, square = before[name].double(), means[name], squares[name]
            if found := settings_of(name):
                rate, beta1, beta2, decay = found
                mean.lerp_(g, 1 - beta1)
                square.lerp_(g.square(), 1 - beta2)
                size = (square / (1 - beta2 ** (step + 1))).sqrt()
                wanted = x * (1 - rate * fraction * decay) - rate * fraction * mean / (1 - beta1 ** (step + 1)) / (size + 1e-10)
                known = (size == 0).all(dim=-1, keepdim=True) | (size > 1e-4 * size.max())
            else:
                rate, known = RATES["matrix"] * max(1, g.size(0) / g.size(1)) ** 0.5, torch.ones_like(x).bool()
                mean.lerp_(g, 0.05)
                wanted = x - rate * fraction * gpt.orthogonalize(g.lerp(mean, 0.95)[None])[0]
            assert known.double().mean() > 0.9 and (g[known] != 0).any()
            error = (after[name] - wanted)[known].abs().max() / (rate * fraction)
            assert error < 2e-3, (step, name, error)


def test_bfloat16_learns_in_float32(base):
    """In bfloat16 what a run's last evaluation sampled is what its checkpoint samples, and small steps add up in the masters."""
    flags = [*FLAGS, "--run=dummy", "--dtype=bfloat16", "--eval-every=9", "--init-lr-frac=1", "--eval-examples=0"]
    assert main(base, *flags) == 0
    state = torch.load(out(base) / "optim_000002.pt", weights_only=True)
    assert {x.dtype for name in ("masters", "exp_avg", "exp_avg_sq") for x in state[name].values()} == {torch.float32}
    saved = torch.load(out(base) / "model_000002.pt", weights_only=True)
    assert all(torch.equal(saved[name], x.to(saved[name].dtype)) for name, x in state["masters"].items())
    assert not any(torch.equal(x, x.bfloat16().float()) for x in state["masters"].values() if x.ndim == 2)
    assert main(base, *flags, f"--model-tag={out(base)}", "--max-steps=0") == 0
    assert samples(base, 0, "evaluations/adder") == samples(base, 2) != samples(base, 0)
    assert len(samples(base, 2)) == len(TEST)


# W&B


def test_weights_and_biases_is_told_all(whole):
    """The run with its flags, each line of metrics.jsonl as it stands there, the end."""
    assert (whole.begun["name"], whole.begun["resume"], whole.begun["dir"]) == ("recorded", "allow", str(out(whole.base)))
    assert len(whole.begun["id"]) >= 8
    assert (whole.begun["config"]["temperature"], whole.begun["config"]["seed"]) == (TEMPERATURE, SEED)
    assert whole.logged == whole.metrics and whole.calls[-1] == call.init().finish()


def test_a_resumed_run_keeps_its_wandb_id(whole, wandb, tmp_path):
    """It goes on under the id that it had, and ends like a run that was never stopped; a new run has an id of its own."""
    base = Path(shutil.copytree(whole.base, tmp_path / "base"))
    cut_back(base, 1)
    wandb.reset_mock()
    assert main(base, *FLAGS, "--resume") == 0
    assert wandb.init.call_args.kwargs["id"] == whole.begun["id"]
    assert [untimed(line) for line in logged(wandb) if "reward" in line] == [untimed(whole.metrics[1])]
    assert_same_run(base, whole.base, step=2)
    assert json.loads((out(base) / "run.json").read_text())["flags"]["seed"] == SEED
    assert main(base, *FLAGS, "--max-steps=0") == 0
    assert wandb.init.call_args.kwargs["id"] != whole.begun["id"]


@pytest.mark.parametrize("broken", ["log", "finish"])
def test_weights_and_biases_fails_in_mid_run(base, monkeypatch, capfd, broken):
    """W&B that fails at a second log or the end costs one warning, and nothing else."""
    wandb, lost = MagicMock(name="wandb"), ConnectionResetError("Connection lost")
    wandb.init.return_value.finish.side_effect = lost   # a service that has died stays dead
    if broken == "log":
        wandb.init.return_value.log.side_effect = [None, *[lost] * 99]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert main(base, *FLAGS) == 0
    text, error = capfd.readouterr()
    warnings = [line for line in (text + error).splitlines() if re.search("W&B|wandb|Weights", line)]
    assert len(warnings) == 1 and "Connection lost" in warnings[0], text + error
    assert [line["step"] for line in metrics(base) if "reward" in line] == [0, 1] and weights(base, 2)
    assert wandb.init.called and str(out(base)) in text


# Signals


def test_second_signal_has_a_second_of_grace(base, monkeypatch):
    """One Ctrl-C that arrives twice still lets the run save; one that comes more than a second later does not."""
    now, exits, clock, save = [], [], time.monotonic, gpt.save_checkpoint

    def interrupted(reference: str, text: str) -> float:
        if not now and (out(base) / "metrics.jsonl").exists() and last_step(base) == 0:     # in the second step
            now.append(clock())
            os.kill(os.getpid(), signal.SIGINT)
        return grader(reference, text)

    def interrupted_save(*args: Any, **more: Any) -> None:
        for seconds in (0.5, 0.9):
            now[0] += seconds
            os.kill(os.getpid(), signal.SIGTERM)
            exits.append(None)
        save(*args, **more)

    monkeypatch.setattr(time, "monotonic", lambda: now[0] if now else clock())
    monkeypatch.setattr(os, "_exit", exits.append)
    monkeypatch.setattr(gpt, "save_checkpoint", interrupted_save)
    use_script(monkeypatch, interrupted)
    assert main(base, *FLAGS, "--run=dummy", "--save-every=9", "--eval-every=9") == 128 + signal.SIGINT
    assert exits == [None, 128 + signal.SIGTERM, None] and gpt.checkpoint_steps(out(base)) == [1]


@pytest.mark.parametrize("number, before, status", [
    (signal.SIGTERM, signal.SIG_DFL, 128 + signal.SIGTERM), (signal.SIGHUP, signal.SIG_DFL, 128 + signal.SIGHUP),
    (signal.SIGHUP, signal.SIG_IGN, 0)], ids=["SIGTERM", "SIGHUP", "nohup"])
def test_a_signal_in_an_evaluation_begins_no_step(base, monkeypatch, capfd, number, before, status):
    """Ranks that got none would otherwise sample a whole step before they hear of it. What is ignored stays ignored."""
    def interrupted(reference: str, text: str) -> float:
        os.kill(os.getpid(), number)
        return grader(reference, text)

    use_script(monkeypatch, interrupted)
    if status:
        monkeypatch.setattr(chat_rl, "step", None)
    kept = signal.signal(number, before)
    assert main(base, *FLAGS, "--run=dummy") == status
    signal.signal(number, kept)
    assert (out(base) / "metrics.jsonl").exists() == (not status)
    assert ("interrupted after 0 of 2 steps" in capfd.readouterr().out) == bool(status)


def test_seconds_left():
    """Of the steps left, each as long as the mean of the last ten, and of the evaluations left, the last step's too."""
    log = object.__new__(chat_rl.Log)
    log.lines = {i: {"rollout_seconds": 1.0 if i > 4 else 9.0, "update_seconds": 2.0, "evaluation_seconds": 7.0} for i in range(15)}
    for step, evaluations in ((14, 3), (15, 2), (23, 1)):
        run = SimpleNamespace(num_steps=24, step=step, flags=SimpleNamespace(eval_every=5))
        assert log.seconds_left(run) == (23 - step) * 3 + evaluations * 7
