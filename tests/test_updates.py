"""Several updates from one rollout: against a plain reference, how a step is dealt out, and what is measured."""
import json
import math
import re
import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, chat, main, metrics, run, tiny_model, untimed, weights

import chat_rl
import gpt
from chat_rl import Example, Flags, Group, Run, Task

QUESTIONS = ["?", "What is 17 + 4? Think of it as long as you like.", "3 + 4", "1 + 1 = ", "Twenty-two characters.", "And?",
             "Well, what?", "What is 100 - 1?"]


def scores_of(reference: str, text: str) -> float:
    """Something that a random model gets right now and then."""
    return float(len(text.encode()) % 4 == 0)


TASK = Task("", scores_of)


def world(tokenizer: gpt.Tokenizer, **flags) -> tuple[Run, chat_rl.Learner]:
    """A run and a learner on a tiny random model."""
    given = dict(examples_per_step=8, num_samples=4, max_new_tokens=10, device_batch_size=3, temperature=0.9, top_k=20,
                 init_lr_frac=0.1)
    flags = Flags(**{**given, **flags})
    examples = [Example(i, chat(question), ["?"], TASK) for i, question in enumerate(QUESTIONS)]
    model = tiny_model()
    vectors = gpt.flatten(model)
    learner = chat_rl.Learner(model, gpt.Sampler(model, tokenizer), *vectors, gpt.make_optimizers(model), gpt.Ranks("cpu"))
    return Run(flags, examples, {}, tokenizer, {}, Path(), 10, 0), learner


def recorded(monkeypatch, run: Run, learner: chat_rl.Learner) -> tuple[dict, list[Group], list[dict]]:
    """A step's metrics, its groups, and of each update: the weights before it, its groups, gradient and tokens."""
    updates, groups, parts = [], [], []
    update, backward, deal = chat_rl.update, chat_rl.backward, chat_rl.deal

    def note_deal(run, all_groups, *more):
        groups.extend(all_groups)
        return deal(run, all_groups, *more)

    def note_backward(model, part, *more):
        parts.append(part)
        return backward(model, part, *more)

    def note_update(run, learner, num_tokens):
        start = learner.weights.clone()
        norm = update(run, learner, num_tokens)
        updates.append(dict(weights=start, part=parts[-1], gradient=learner.gradient.clone(), tokens=num_tokens, norm=norm))
        return norm

    for name, hook in (("update", note_update), ("backward", note_backward), ("deal", note_deal)):
        monkeypatch.setattr(chat_rl, name, hook)
    line = chat_rl.step(run, learner)
    monkeypatch.undo()
    return line, groups, updates


def plain_rows(model: gpt.GPT, group: Group, completion: gpt.Completion, flags: Flags) -> list[torch.Tensor]:
    """The policy's logprobs of all tokens that could be sampled at each place of a row, which runs alone and whole."""
    first = len(group.prompt) - 1
    raw = model.lm_head(model(torch.tensor([group.prompt + completion.tokens])))[0, first:-1, :model.config.vocab_size]
    rows = []
    for row, token in zip(15 * torch.tanh(raw / 15) / flags.temperature, completion.tokens):
        kept = row.argsort(descending=True)[:flags.top_k or None].tolist()
        if token not in kept:                       # an update pushed it out: it counts as the last inside
            kept[-1] = token
        rows.append(torch.full_like(row, -torch.inf).index_copy(0, torch.tensor(kept), row[kept].log_softmax(dim=0)))
    return rows


def plain(learner: chat_rl.Learner, vector: torch.Tensor) -> gpt.GPT:
    """A copy of the model in float64, with these weights."""
    model = deepcopy(learner.model).double()
    model.dtype = torch.float64
    parts = vector.double().split([p.numel() for p in model.parameters()])
    for p, part in zip(model.parameters(), parts):
        p.data, p.grad = part.view_as(p).clone(), None
    return model


def plain_update(learner: chat_rl.Learner, vector: torch.Tensor, groups: list[Group], flags: Flags, tokens: float,
                 form: str, clip: tuple = ()) -> tuple[torch.Tensor, list[float]]:
    """The gradient at some weights, as one vector, and the log ratios: every row alone, in float64, nothing left out."""
    model, loss, log_ratios = plain(learner, vector), 0.0, []
    for group in groups:
        mean = sum(group.rewards) / len(group.rewards)
        for c, reward in zip(group.completions, group.rewards):
            rows = plain_rows(model, group, c, flags)
            for row, token, mask, old in zip(rows, c.tokens, c.mask, c.logprobs):
                if not mask:
                    continue
                advantage = reward - mean
                ratio = torch.exp(row[token] - old)
                if form == "REINFORCE":
                    loss = loss - advantage * row[token]
                elif clip and advantage > 0:
                    loss = loss - advantage * min(ratio, torch.tensor(1 + clip[-1], dtype=torch.float64))
                elif clip:
                    loss = loss - advantage * max(ratio, torch.tensor(1 - clip[0], dtype=torch.float64))
                else:
                    loss = loss - advantage * ratio
                if advantage:
                    log_ratios.append(math.log(ratio.item()))
    (loss / tokens).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), log_ratios


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Of two vectors, relative to their length."""
    return float((x.double() - y.double()).norm() / y.double().norm())


def sampled_tokens(groups: list[Group]) -> int:
    return sum(sum(c.mask) for group in groups for c in group.completions)


def learned(groups: list[Group]) -> list[Group]:
    return [group for group in groups if len(set(group.rewards)) > 1]


# ----------------------------------------------------------------------------------------------------------------------
# The updates


def test_one_update_is_reinforce(tokenizer, monkeypatch):
    """With K = 1 the gradient is that of −advantage · logprob over the sampled tokens of the whole step, to rounding, and
    the weights that follow are those that REINFORCE's own loss leads to."""
    run, learner = world(tokenizer)
    _, other = world(tokenizer)
    line, groups, (only,) = recorded(monkeypatch, run, learner)
    assert 2 < len(learned(groups)) < len(groups) and only["tokens"] == sampled_tokens(groups)
    reinforce, _ = plain_update(learner, only["weights"], groups, run.flags, sampled_tokens(groups), "REINFORCE")
    assert distance(only["gradient"], reinforce) < 5e-6
    assert abs(line["ratio_max"] - 1) < 1e-4 and line["approx_kl"] < 1e-7
    assert line["clip_fraction"] == line["parts_left_out"] == 0
    policy = learner.policy(run.flags.temperature, run.flags.top_k)
    chat_rl.backward(other.model, groups, policy, 3, lambda logprobs, sampled, advantages: -advantages * logprobs)
    chat_rl.update(run, other, sampled_tokens(groups))
    start = only["weights"]
    assert distance(learner.weights - start, other.weights - start) < 0.01      # Adam's first step is the gradient's sign


@pytest.mark.parametrize("clip, rates", [("0.2", 0.1), ("0.02,0.05", 0.1), ("", 0.1), ("0.2", 1.0)])
def test_four_updates_are_the_plain_ones(tokenizer, monkeypatch, clip, rates):
    """Given the weights before each update, every row run alone in float64 has the same gradient; and the metrics are what
    they are called, reckoned from these rows."""
    flags = dict(updates_per_rollout=4, clip=clip, init_lr_frac=rates)
    run, learner = world(tokenizer, **flags)
    line, groups, updates = recorded(monkeypatch, run, learner)
    assert len(updates) == 4 and sum((update["part"] for update in updates), []) != learned(groups)
    assert sorted(id(group) for update in updates for group in update["part"]) == sorted(map(id, learned(groups)))
    sides = tuple(float(x) for x in clip.split(",") if x)
    left_out = sampled_tokens(groups) - sampled_tokens(learned(groups))
    parts = []
    for update in updates:
        tokens = sampled_tokens(update["part"]) + left_out / 4
        assert left_out > 0 and update["tokens"] == pytest.approx(tokens)
        gradient, log_ratios = plain_update(learner, update["weights"], update["part"], run.flags, tokens, "ratio", sides)
        parts.append(log_ratios)
        assert gradient.norm() > 0 and distance(update["gradient"], gradient) < 2e-5
        assert update["norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
    drift = sum(parts, [])
    sides = sides or (math.inf, math.inf)
    assert line["sampler_gap"] < 1e-5 and max(map(abs, parts[0])) < 1e-4 < max(map(abs, drift))
    assert line["ratio_max"] == pytest.approx(math.exp(max(map(abs, drift))), rel=1e-4)
    assert line["approx_kl"] == pytest.approx(sum(math.exp(x) - 1 - x for x in drift) / len(drift), rel=1e-3)
    outside = sum(not 1 - sides[0] <= math.exp(x) <= 1 + sides[-1] for x in drift)
    assert line["clip_fraction"] == pytest.approx(outside / len(drift), abs=1.5 / len(drift)) and bool(outside) == bool(clip)
    assert line["advantage_tokens"] == len(drift) / sampled_tokens(groups)
    assert line["grad_norm"] == pytest.approx(sum(update["norm"] for update in updates) / 4)
    start = updates[0]["weights"]
    assert line["update_norm"] == pytest.approx(((learner.weights - start).norm() / start.norm()).item(), rel=1e-5)
    assert line["parts_left_out"] == 0


def test_the_clip_is_lopsided():
    """The gradient ends where the ratio is above 1 + high and the advantage positive, or below 1 − low and negative."""
    ratios = torch.tensor([0.5, 0.85, 1.0, 1.25, 1.5])
    for advantage, kept, kept_lopsided in ((2.0, [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]), (-2.0, [0, 1, 1, 1, 1], [0, 1, 1, 1, 1])):
        for bounds, expected in (((), [1] * 5), ((0.8, 1.2), kept), ((0.8, 1.28), kept_lopsided)):
            logprobs = ratios.log().requires_grad_()
            chat_rl.loss_of(logprobs, torch.zeros(5), torch.full((5,), advantage), *bounds).sum().backward()
            assert logprobs.grad.tolist() == pytest.approx([-advantage * r * k for r, k in zip(ratios.tolist(), expected)])


def test_entropy_is_exact(tokenizer, monkeypatch):
    """Of the whole distribution that each sampled token is drawn from, in float64, over all sampled tokens, whether they
    are learned from or not; forced tokens have none."""
    monkeypatch.setattr(gpt, "calculate", lambda expression: "12")
    run, learner = world(tokenizer, temperature=1.3, top_k=7)
    python_start = tokenizer.encode_raw("<|python_start|>")[0]
    run.questions[0] = Example(0, run.questions[0].prompt, ["?"], TASK)
    with torch.no_grad():                           # calls of the calculator become likely
        for token in (python_start, tokenizer.call_end):
            learner.model.lm_head.weight[token] *= 4
    learner.sampler.refresh()
    start = learner.weights.clone()
    line, groups, _ = recorded(monkeypatch, run, learner)
    model, entropies, forced = plain(learner, start), [], 0
    for group in groups:
        for c in group.completions:
            for row, mask in zip(plain_rows(model, group, c, run.flags), c.mask):
                p = row[row > -torch.inf]
                assert len(p) == 7
                forced += not mask
                entropies += [-(p.exp() * p).sum().item()] if mask else []
    assert forced > 0 and len(entropies) == sampled_tokens(groups)
    assert line["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)


def test_a_token_that_left_the_top_k_counts_as_the_last_inside():
    """Its ratio is finite and has a gradient."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]], requires_grad=True)
    logprob = gpt.Policy(1.0, 2, 0.0).logprobs(logits, torch.tensor([3]))
    assert logprob.item() == pytest.approx(-math.log(1 + math.exp(3)), rel=1e-6)
    logprob.backward()
    assert logits.grad[0, 3] > 0 and logits.grad[0, [1, 2, 4]].tolist() == [0, 0, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Dealing


def dealt(groups: list[Group], **flags) -> list[tuple[list[Group], float]]:
    run = SimpleNamespace(flags=Flags(examples_per_step=len(groups), **flags), step=flags.get("seed", 3))
    return chat_rl.deal(run, groups)


def some_groups(advantages: list[bool]) -> list[Group]:
    """Groups of different lengths, some without advantage."""
    completions = [[gpt.Completion([5] * n, [True] * n, [0.0] * n) for n in (i + 1, 2)] for i in range(len(advantages))]
    return [Group(None, [i], pair, advantages=[0.5, -0.5] if advantage else [0.0, 0.0])
            for i, (advantage, pair) in enumerate(zip(advantages, completions))]


@pytest.mark.parametrize("K", [1, 2, 3, 4, 7])
def test_every_group_with_an_advantage_is_dealt_once(K):
    """Each part is normalised by its own tokens and its share of those of the groups left out, which makes the tokens of
    the step in all."""
    groups = some_groups([True, False, True, True, False, True, True, True])
    parts = dealt(groups, updates_per_rollout=K)
    names = [[group.prompt[0] for group in part] for part, _ in parts]
    assert len(parts) == min(K, 6) and all(names) and sorted(sum(names, [])) == [0, 2, 3, 5, 6, 7]
    assert max(map(len, names)) - min(map(len, names)) <= 1
    rest = sampled_tokens([groups[1], groups[4]])
    assert [tokens for _, tokens in parts] == pytest.approx([sampled_tokens(part) + rest / K for part, _ in parts])
    if K <= 6:
        assert sum(tokens for _, tokens in parts) == pytest.approx(sampled_tokens(groups))


def test_dealing_depends_on_seed_and_step():
    groups = some_groups([True] * 12)
    names = set()
    for seed in range(6):
        parts = dealt(groups, updates_per_rollout=3, seed=seed)
        names.add(tuple(tuple(group.prompt[0] for group in part) for part, _ in parts))
    assert len(names) == 6


def test_parts_that_are_empty_make_no_update(tokenizer, monkeypatch):
    """Fewer groups with an advantage than parts: as many updates as groups; none at all: nothing moves."""
    for right, count in ((lambda text: False, 0), (lambda text: len(text.encode()) % 3 == 0, None)):
        run, learner = world(tokenizer, updates_per_rollout=20)
        for example in run.questions:
            example.task = Task("", lambda reference, text: float(right(text)))
        start = learner.weights.clone()
        line, groups, updates = recorded(monkeypatch, run, learner)
        assert len(updates) == len(learned(groups)) and (count is None) == bool(updates)
        assert all(len(update["part"]) == 1 for update in updates)
        if not updates:
            assert torch.equal(learner.weights, start)
            zero = "grad_norm", "update_norm", "advantage_tokens", "sampler_gap", "approx_kl", "clip_fraction", "parts_left_out"
            assert {line[key] for key in zero} == {0} and line["ratio_max"] == 1


def test_max_ratio_leaves_parts_out(tokenizer, monkeypatch):
    """A part in which the weights have drifted too far, up or down, is left out before its update, and counted."""
    run, learner = world(tokenizer, updates_per_rollout=4, init_lr_frac=1.0, max_ratio=1.5)
    line, groups, updates = recorded(monkeypatch, run, learner)
    assert len(updates) + line["parts_left_out"] == 4 and len(updates) < 4 and line["ratio_max"] > 1.5
    for update in updates:
        _, log_ratios = plain_update(learner, update["weights"], update["part"], run.flags, 1, "ratio")
        assert math.exp(max(map(abs, log_ratios))) <= 1.5
    run, learner = world(tokenizer, updates_per_rollout=4, init_lr_frac=1.0, max_ratio=1e9)
    line, _, updates = recorded(monkeypatch, run, learner)
    assert len(updates) == 4 and line["parts_left_out"] == 0 and line["ratio_max"] > 1.5


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs

LIVELY = [*SMALL, "--examples-per-step=16", "--num-samples=12", "--eval-examples=4", "--eval-samples=2",
          "--device-batch-size=20"]
RECORDER = """
import json, os, sys
sys.path.insert(0, os.environ["ROOT"])
import torch
import chat_rl
torch.set_num_threads(1)
rank, said, update, backward = int(os.environ["RANK"]), [], chat_rl.update, chat_rl.backward
chat_rl.Log.plot = lambda log: None

def note_backward(model, part, *more):
    said.append(["part", [group.example.index for group in part]])
    return backward(model, part, *more)

def note_update(run, learner, tokens):
    norm = update(run, learner, tokens)
    said.append(["update", tokens, norm, learner.weights.double().norm().item()])
    return norm

chat_rl.backward, chat_rl.update = note_backward, note_update
status = chat_rl.main(sys.argv[1:])
open(os.path.join(os.environ["NANOCHAT_BASE_DIR"], f"rank{rank}.json"), "w").write(json.dumps(said))
os._exit(status)
"""


def test_ranks_agree_on_parts_and_on_those_left_out(base):
    """One step in four parts, the weights drifting too far for some of them: on two ranks the same groups, tokens and
    weights as on one, and both leave out the same parts."""
    script = base / "recorder.py"
    script.write_text(RECORDER)
    flags = [*LIVELY, "--updates-per-rollout=4", "--clip=0.2,0.28", "--max-ratio=1.5", "--init-lr-frac=0.2", "--max-steps=1"]
    shutil.copytree(base / "chatsft_checkpoints" / "adder", base / "chatsft_checkpoints" / "two")
    run(base, *flags, "--model-tag=two", ranks=2, script=script)
    assert main(base, *flags) == 0
    (_, one, _), (_, two, _) = metrics(base), metrics(base, "two")
    assert 0 < one["parts_left_out"] < 4 and one["ratio_max"] > 1.5
    assert untimed(two) == pytest.approx(untimed(one), rel=1e-3, abs=1e-5)
    said = [json.loads((base / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [line[0] for line in said[0]] == [line[0] for line in said[1]]       # an update came after the same parts
    updates = [[line for line in part if line[0] == "update"] for part in said]
    assert updates[0] == updates[1] and len(updates[0]) == 4 - one["parts_left_out"]
    first, second = weights(base, 1), weights(base, 1, "two")
    start = gpt.load_checkpoint(base / "chatsft_checkpoints" / "adder")[0].state_dict()
    changes = [torch.cat([(x[key].float() - start[key]).flatten() for key in start]) for x in (first, second)]
    assert distance(*changes) < 0.02


def test_a_resumed_run_with_several_updates_is_the_same(base):
    """Bit for bit: weights, optimizers and metrics."""
    flags = [*LIVELY, "--updates-per-rollout=3", "--clip=0.2", "--max-ratio=20", "--max-steps=4", "--save-every=2",
             "--keep-last=9"]
    assert main(base, *flags) == 0
    out = base / "chatrl_checkpoints" / "adder"
    whole, lines = weights(base, 4), metrics(base)
    training = torch.load(out / "optim_000004.pt", weights_only=True)
    assert all(line["advantage_tokens"] > 0 and line["ratio_max"] > 1.001 for line in lines if "reward" in line)
    for name in ("model_000004.pt", "meta_000004.json", "optim_000004.pt"):
        (out / name).unlink()
    assert main(base, *flags, "--resume") == 0
    again = weights(base, 4)
    assert all(torch.equal(again[key], x) for key, x in whole.items())
    assert str(torch.load(out / "optim_000004.pt", weights_only=True)) == str(training)
    assert list(map(untimed, metrics(base))) == list(map(untimed, lines))


def test_lr_schedule(base):
    """Linear to zero, or constant."""
    for schedule, fractions in (("linear", [1, 2 / 3, 1 / 3]), ("constant", [1, 1, 1])):
        assert main(base, *SMALL, f"--lr-schedule={schedule}", "--eval-samples=1") == 0
        assert [line["lrm"] for line in metrics(base) if "reward" in line] == pytest.approx(fractions)
    assert chat_rl.PRESETS["huggingface"]["lr_schedule"] == "constant" and Flags().lr_schedule == "linear"


@pytest.mark.parametrize("flag", [
    "--clip=x", "--clip=-0.1", "--clip=0.2,0.3,0.4", "--clip=0.2,", "--clip=,0.2", "--clip=nan", "--clip=inf", "--clip=1.5",
    "--clip=0.2;0.3", "--clip= ", "--updates-per-rollout=0", "--max-ratio=-1", "--max-ratio=nan", "--lr-schedule=cosine"])
def test_bad_flags_are_refused(base, flag, capsys):
    """One line, exit 2, nothing written."""
    assert main(base, *SMALL, flag) == 2
    said = capsys.readouterr().err
    assert re.match(rf"chat_rl: (argument )?{flag.split('=')[0]}", said) and said.count("\n") == 1
    assert not (base / "chatrl_checkpoints").exists()


@pytest.mark.parametrize("clip, bounds", [
    ("", (0, math.inf)), ("0.2", (0.8, 1.2)), ("0.2,0.28", (0.8, 1.28)), (".2,.28", (0.8, 1.28)),
    ("0.2,1", (0.8, 2))])
def test_good_clips_are_read(clip, bounds):
    assert chat_rl.bounds_of(Flags(**chat_rl.parse_flags([f"--clip={clip}"]))) == pytest.approx(bounds)
