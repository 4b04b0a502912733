"""The algorithm: gradients against plain ones, in any batch and on any ranks; what is sampled, rewarded, dealt and measured."""
import itertools
import math
import statistics
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Iterator

import numpy
import pytest
import torch
from conftest import (chat, completion, cpu_learner, distance, example, generate, gradient_of, group_of, policy_of, state_of,
                      tiny_model, weights_of)

import chat_rl
import gpt
from chat_rl import Flags, Group, Run

QUESTIONS = ["?", "What is 17 + 4? Think of it as long as you like before you say what it is, sixty tokens or so.",
             "3 + 4", "1 + 1 = ", "Twenty-two characters.", "And?", "Well, what?", "What is 100 - 1?"]
REWARDS = [[0.0, 1.0, 0.0, 0.0, 1.0], [1.0, 0.5, 0.0, 0.5, 0.5], [1.0] * 5, [0.0, 0.0, 0.0, 0.0, 1.0], [0.0] * 4 + [0.3]]


# Plain ones: every row run separately, whole, in float64, with no cache and nothing left out


def plain_logprobs(model: gpt.GPT, group: Group, c: gpt.Completion, flags: Flags) -> Iterator[torch.Tensor]:
    """The policy's logprob of each token of a row."""
    ids = torch.tensor([group.example.prompt + c.tokens.tolist()])
    raw = model.lm_head(model(ids, gpt.Cache()))[0, len(group.example.prompt) - 1:-1, :model.config.vocab_size]
    for row, token in zip(15 * torch.tanh(raw / 15) / flags.temperature, c.tokens.tolist()):
        kept = row.argsort(descending=True)[:flags.top_k or None].tolist()
        if token not in kept:                      # pushed out by rounding or an update: counts as the last inside
            kept[-1] = token
        yield row[token] - row[kept].logsumexp(dim=0)


def plain_gradient(model: gpt.GPT, groups: list[Group], flags: Flags, tokens: float,
                   weights: torch.Tensor | None = None) -> tuple[torch.Tensor, list[float]]:
    """The gradient as one vector, with these weights or the model's own, and the log ratios of the tokens learned from."""
    model, loss, log_ratios, clip = deepcopy(model).double(), 0.0, [], flags.clip
    if weights is not None:
        torch.nn.utils.vector_to_parameters(weights.double(), model.parameters())
    for group in groups:
        mean = sum(group.rewards) / len(group.rewards)
        for c, reward in zip(group.completions, group.rewards):
            for logprob, mask, old in zip(plain_logprobs(model, group, c, flags), c.sampled, c.logprobs.tolist()):
                advantage, ratio = reward - mean, torch.exp(logprob - old)
                if not mask or not advantage:
                    continue
                log_ratios.append(math.log(ratio.item()))
                if clip and advantage > 0:
                    ratio = ratio.clamp(max=1 + clip[-1])
                elif clip:
                    ratio = ratio.clamp(min=1 - clip[0])
                loss = loss - advantage * ratio
    (loss / tokens).backward()
    return gradient_of(model), log_ratios


def sampled_tokens(groups: list[Group]) -> int:
    return sum(int(c.sampled.sum()) for group in groups for c in group.completions)


def learned(groups: list[Group]) -> list[Group]:
    return [group for group in groups if len(set(group.rewards)) > 1]


# The gradient


def some_groups(model: gpt.GPT, tokenizer: gpt.Tokenizer, temperature: float = 1.0, top_k: int = 50) -> list[Group]:
    """Groups with prompts of different lengths, one of them without anything to learn, one with a row of advantage 0;
    completions with forced tokens, with and without a stop token, and of a single token."""
    prompts = [tokenizer.render(chat(question)) for question in QUESTIONS[:5]]
    completions = generate(model, tokenizer, prompts, 5, 12, temperature, top_k, seed=(1,))
    one, two, three, four, _ = completions[0]
    one.tokens[3:6], one.sampled[3:6], one.logprobs[3:6] = [tokenizer.output_start, 55, tokenizer.output_end], False, 0
    two.tokens[-2:], two.sampled[-2:], two.logprobs[-2:] = [tokenizer.output_start, 56], False, 0
    completions[0][2] = completion(three.tokens[:1], three.sampled[:1], three.logprobs[:1])
    completions[0][3] = completion([tokenizer.assistant_end], [True], [-4.0])
    for c in completions[1][:3]:
        c.tokens[-1], c.sampled[-1] = tokenizer.assistant_end, True
    return [group_of(example(i, prompt), rows, chat_rl.advantages_of(rewards), rewards)
            for i, (prompt, rows, rewards) in enumerate(zip(prompts, completions, REWARDS))]


def gradient(model: gpt.GPT, groups: list[Group], flags: Flags) -> torch.Tensor:
    """The project's gradient, of all parameters, as one vector."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    asked = [group for group in groups if group.learnable()]
    chat_rl.backward(model, asked, policy_of(model, flags.temperature, flags.top_k), flags)
    return gradient_of(model) / sampled_tokens(groups)


@pytest.mark.parametrize("generation, temperature, top_k", [
    *((generation, 1.0, 50) for generation in gpt.GENERATIONS), ("current", 0.7, 5), ("current", 1.0, 0)])
def test_gradient_is_the_plain_one(tokenizer, generation, temperature, top_k):
    """For device batch sizes 1, 3, 8 and 100 the gradient is that of every row run alone, to float32's rounding."""
    model = tiny_model(generation)
    groups = some_groups(model, tokenizer, temperature, top_k)
    flags = Flags(temperature=temperature, top_k=top_k)
    plain, _ = plain_gradient(model, groups, flags, sampled_tokens(groups))
    sizes = [p.numel() for p in model.parameters()]
    for size in (1, 3, 8, 100):
        mine = gradient(model, groups, replace(flags, device_batch_size=size))
        assert distance(mine, plain) < 5e-6
        for (name, _), x, y in zip(model.named_parameters(), mine.split(sizes), plain.split(sizes)):
            assert (x - y).norm() < 2e-5 * y.norm() + 1e-7 * plain.norm(), name    # a scalar is a sum that cancels


def test_nothing_is_computed_twice_or_in_vain(tokenizer, monkeypatch):
    """Each question that has something to learn runs once, whatever the batch; answers without advantage do not run; the
    unembedding sees the sampled tokens' rows alone."""
    model, unembed = tiny_model(), gpt.GPT.unembed
    groups, policy = some_groups(model, tokenizer), policy_of(model)
    lessons = [c for group in groups for c, _ in group.learnable()]
    assert [len(group.learnable()) for group in groups] == [5, 2, 0, 5, 5]
    prefilled, answered, unembedded = [], [], []

    def note(model, args):
        ids, cache = args
        (prefilled if cache.prefix is None else answered).extend(ids.tolist())

    model.register_forward_pre_hook(note)
    monkeypatch.setattr(gpt.GPT, "unembed", lambda self, x: unembedded.append(x.numel() // x.size(-1)) or unembed(self, x))
    asked = [group for group in groups if group.learnable()]
    for size in (1, 2, 3, 8, 100):
        for seen in (prefilled, answered, unembedded):
            seen.clear()
        count = len(chat_rl.backward(model, asked, policy, Flags(device_batch_size=size)))
        whole = [group.example.prompt for group in asked]
        assert sorted(row[:len(prompt)] for row, prompt in zip(prefilled, whole, strict=True)) == sorted(whole)
        longer = [c.tokens[:-1].tolist() for c in lessons if len(c.tokens) > 1]  # a single token leaves nothing to run
        assert all(sum(row[:len(tokens)] == tokens for row in answered) == 1 for tokens in longer)
        assert len(longer) <= len(answered) <= len(lessons)
        assert sum(unembedded) == count == sum(int(c.sampled.sum()) for c in lessons)


@pytest.mark.parametrize("clip, kept", [((), {2.0: [1] * 5, -2.0: [1] * 5}), ((0.2,), {2.0: [1, 1, 1, 0, 0], -2.0: [0, 1, 1, 1, 1]}),
                                        ((0.2, 0.28), {2.0: [1, 1, 1, 1, 0], -2.0: [0, 1, 1, 1, 1]})])
def test_the_clip_is_lopsided(clip, kept):
    """The gradient ends where the ratio is above 1 + high and the advantage positive, or below 1 − low and negative."""
    ratios = torch.tensor([0.5, 0.85, 1.0, 1.25, 1.5])
    for advantage, inside in kept.items():
        logprobs = ratios.log().requires_grad_()
        chat_rl.loss_of(logprobs, torch.zeros(5), torch.full((5,), advantage), Flags(clip=clip)).sum().backward()
        assert logprobs.grad.tolist() == pytest.approx([-advantage * r * k for r, k in zip(ratios.tolist(), inside)])


# A step


def now_and_then(reference: str, text: str) -> float:
    """Something that a random model gets right now and then."""
    return float(len(text.encode()) % 4 == 0)


@pytest.fixture
def world(tokenizer, monkeypatch):
    """Makes a run and a learner on a tiny random model, whose completions are right now and then."""
    monkeypatch.setitem(chat_rl.GRADERS, "sometimes", now_and_then)

    def make(**flags) -> tuple[Run, gpt.Learner]:
        given = dict(seed=1, examples_per_step=8, num_samples=4, max_new_tokens=10, device_batch_size=3, temperature=0.9, top_k=20,
                     init_lr_frac=0.1)
        examples = [example(i, tokenizer.render(chat(text)), "sometimes") for i, text in enumerate(QUESTIONS)]
        run = Run(Flags(**{**given, **flags}), examples, {}, tokenizer, Path(), 10, "", "", 0)
        return run, cpu_learner(tiny_model())

    return make


@pytest.fixture
def recorded(monkeypatch):
    """A step's metrics, its groups, and of each update: the weights before it, its groups, gradient and tokens."""
    def record(run: Run, learner: gpt.Learner) -> tuple[dict, list[Group], list[dict]]:
        updates, parts, update, backward = [], [], gpt.Learner.update, chat_rl.backward

        def note_update(learner, num_tokens, *more):
            weights, gradient = weights_of(learner.model), gradient_of(learner.model) / num_tokens
            norm = update(learner, num_tokens, *more)
            updates.append(dict(weights=weights, part=parts[-1], gradient=gradient, tokens=num_tokens, norm=norm))
            return norm

        with monkeypatch.context() as patch:
            patch.setattr(chat_rl, "backward", lambda model, part, *more: parts.append(part) or backward(model, part, *more))
            patch.setattr(gpt.Learner, "update", note_update)
            return *chat_rl.step(run, learner), updates

    return record


@pytest.mark.parametrize("K, clip, rates", [(1, (), 0.1), (4, (0.2,), 0.1), (4, (0.02, 0.05), 0.1), (4, (), 0.1), (4, (0.2,), 1.0)])
def test_updates_are_the_plain_ones(world, recorded, K, clip, rates):
    """Given the weights before each update, every row run alone in float64 has the same gradient, over its part of the step's
    tokens; and the metrics are what they are called, reckoned from these rows. The first update is at ratio 1."""
    run, learner = world(updates_per_rollout=K, clip=clip, init_lr_frac=rates)
    line, groups, updates = recorded(run, learner)
    assert len(updates) == K and sorted(id(g) for u in updates for g in u["part"]) == sorted(map(id, learned(groups)))
    parts = []
    for update in updates:
        assert update["tokens"] == sampled_tokens(groups) / K
        plain, log_ratios = plain_gradient(learner.model, update["part"], run.flags, update["tokens"], update["weights"])
        parts.append(log_ratios)
        assert plain.norm() > 0 and distance(update["gradient"], plain) < 2e-5
        assert update["norm"] == pytest.approx(plain.norm().item(), rel=1e-4)
    drift, (low, high) = sum(parts, []), chat_rl.bounds_of(run.flags)
    assert line["sampler_gap"] < 1e-5 and max(map(abs, parts[0])) < 1e-4 and (max(map(abs, drift)) > 1e-4) == (K > 1)
    assert line["ratio_max"] == pytest.approx(math.exp(max(map(abs, drift))), rel=1e-4)
    assert line["approx_kl"] == pytest.approx(sum(math.exp(x) - 1 - x for x in drift) / len(drift), rel=1e-3, abs=1e-7)
    outside = sum(not low <= math.exp(x) <= high for x in drift)
    assert line["clip_fraction"] == pytest.approx(outside / len(drift), abs=1.5 / len(drift)) and bool(outside) == bool(clip)
    assert line["advantage_tokens"] == len(drift) / sampled_tokens(groups)
    assert line["grad_norm"] == pytest.approx(sum(update["norm"] for update in updates) / K)
    assert line["updates_left_out"] == 0 and 2 < len(learned(groups)) < len(groups)


def test_gradients_are_cut(world, recorded):
    """--grad-clip cuts what the optimizers see to that norm, and not what is logged."""
    norms, changes = [], []
    for clip in (0.0, 1e-3, 1e9):
        run, learner = world(grad_clip=clip)
        line, _, (only,) = recorded(run, learner)
        norms.append(line["grad_norm"])
        changes.append(torch.cat([x.flatten() for x in state_of(learner, "exp_avg")]).norm().item())
    assert norms[0] == norms[1] == norms[2] > 1e-3
    assert changes[2] == changes[0] and changes[1] == pytest.approx(changes[0] * 1e-3 / norms[0], rel=1e-3)


def test_a_reward_sees_score_completion_and_flags(world, recorded, monkeypatch):
    """reward_of alone decides what is learned from; scores stay the grader's."""
    monkeypatch.setattr(chat_rl, "reward_of", lambda score, c, flags: 5 * score - len(c.tokens) / flags.max_new_tokens)
    run, learner = world()
    line, groups, _ = recorded(run, learner)
    for group in groups:
        assert group.rewards == [5 * s - len(c.tokens) / 10 for s, c in zip(group.scores, group.completions)]
        assert group.advantages == chat_rl.advantages_of(group.rewards) and set(group.scores) <= {0.0, 1.0}
    assert line["reward"] == pytest.approx(statistics.mean(r for group in groups for r in group.rewards))


def groups_of(advantages: list[bool]) -> list[Group]:
    """Groups of different lengths, some without advantage."""
    return [group_of(example(i, [i]), [completion([5] * (i + 1)), completion([5, 5])], [0.5, -0.5] if advantage else [0.0, 0.0])
            for i, advantage in enumerate(advantages)]


def minibatches(groups: list[Group], step: int = 3, **flags) -> list[list[int]]:
    run = SimpleNamespace(flags=Flags(examples_per_step=len(groups), **flags), step=step)
    return [[group.example.index for group in part] for part in chat_rl.minibatches(run, groups)]


def test_every_group_with_an_advantage_is_in_one_minibatch():
    groups = groups_of([True, False, True, True, False, True, True, True])
    for K in (1, 2, 3, 4, 7):
        names = minibatches(groups, updates_per_rollout=K)
        assert len(names) == min(K, 6) and all(names) and sorted(sum(names, [])) == [0, 2, 3, 5, 6, 7]
        assert max(map(len, names)) - min(map(len, names)) <= 1
    dealt = {str(minibatches(groups, step, updates_per_rollout=3, seed=seed)) for seed in range(3) for step in range(3)}
    assert len(dealt) == 9
    order = numpy.random.default_rng((7, 2, 3)).permutation(4)          # seed, what for, step
    assert minibatches(groups_of([True] * 4), updates_per_rollout=4, seed=7) == [[i] for i in order]


def test_nothing_right_moves_nothing(world, recorded, monkeypatch):
    """Fewer groups with an advantage than minibatches: as many updates as groups; none at all: nothing moves."""
    for every in (3, 10**6):
        monkeypatch.setitem(chat_rl.GRADERS, "sometimes", lambda reference, text: float(len(text.encode()) % every == 0 < len(text)))
        run, learner = world(updates_per_rollout=20, weight_decay=0.1)
        start = weights_of(learner.model)
        line, groups, updates = recorded(run, learner)
        assert len(updates) == len(learned(groups)) and all(len(update["part"]) == 1 for update in updates)
        assert bool(updates) == (every == 3) != torch.equal(weights_of(learner.model), start)
    assert line["ratio_max"] == line["all_wrong"] == 1
    zero = "grad_norm", "advantage_tokens", "sampler_gap", "approx_kl", "clip_fraction", "updates_left_out"
    assert {line[key] for key in zero} == {0}


def test_max_ratio_leaves_updates_out(world, recorded, monkeypatch):
    """An update for which the policy has drifted too far in the mean is left out, and counted; the first one never is."""
    run, learner = world(updates_per_rollout=4, init_lr_frac=0.1, max_ratio=1.1)
    line, groups, updates = recorded(run, learner)
    assert len(updates) + line["updates_left_out"] == 4 and 0 < len(updates) < 4
    ratios = []                                     # those of the tokens of each update that was made
    for update in updates:
        _, log_ratios = plain_gradient(learner.model, update["part"], run.flags, 1, update["weights"])
        ratios.append([math.exp(abs(x)) for x in log_ratios])
    assert all(statistics.mean(part) <= 1.1 for part in ratios) and max(map(max, ratios)) > 1.3
    run, learner = world(updates_per_rollout=4, init_lr_frac=1.0, max_ratio=1e9)
    line, _, updates = recorded(run, learner)
    assert len(updates) == 4 and line["updates_left_out"] == 0 and line["ratio_max"] > 1.2
    backward = chat_rl.backward                     # what is not a number is not left out, but said
    monkeypatch.setattr(chat_rl, "backward", lambda model, *more: model.lm_head.weight.data[0].fill_(math.nan) is None or backward(model, *more))
    assert math.isnan(recorded(run, learner)[0]["grad_norm"])


def test_shares_are_balanced():
    """The costliest first, each to the rank with the least to do: all are dealt, and no rank has more than a third above the mean."""
    costs = [5] * 9 + [40, 30, 30]
    shares = [chat_rl.deal(list(range(12)), costs.__getitem__, SimpleNamespace(rank=r, size=3)) for r in range(3)]
    assert sorted(sum(shares, [])) == list(range(12))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) <= 1.1 * sum(costs) / 3
    assert chat_rl.deal([1, 2], lambda item: 5, SimpleNamespace(rank=2, size=3)) == []


# Advantages, estimates, questions


@pytest.mark.parametrize("rewards, advantages", [
    ([1.0, 0.0], [0.5, -0.5]), ([1.0, 0.0, 0.0, 0.0], [0.75, -0.25, -0.25, -0.25]), ([1.0, 1.0], [0.0, 0.0]),
    ([0.1] * 3, [0.0] * 3), ([0.7] * 10, [0.0] * 10), ([0.0, 0.5, 1.0], [-0.5, 0.0, 0.5])])
def test_advantages(rewards, advantages):
    """Reward minus the group's mean, exactly zero where all agree, not divided by the deviation."""
    mine = chat_rl.advantages_of(rewards)
    assert mine == pytest.approx(advantages) and [x == 0 for x in mine] == [x == 0 for x in advantages]


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets(n):
    """The share of all subsets of k samples that hold a right one, counted."""
    for right in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
            share = statistics.mean(map(any, subsets))
            assert chat_rl.pass_at_k([[1.0] * right + [0.5] * (n - right)], k) == (pytest.approx(share), 0.0)


def test_each_epoch_shuffles_all_questions():
    """The steps of an epoch go through the questions once; epochs and seeds differ in order."""
    examples = [example(i, []) for i in range(26)]

    def order(seed: int, epoch: int) -> list[int]:
        run = SimpleNamespace(questions=examples, flags=Flags(examples_per_step=4, seed=seed))
        return [x.index for run.step in range(6 * epoch, 6 * epoch + 6) for x in chat_rl.questions_of_step(run)]

    orders = [order(seed, epoch) for seed in (1, 2) for epoch in (0, 1, 5)]
    assert all(len(set(numbers)) == 24 for numbers in orders)
    assert len({tuple(numbers) for numbers in orders}) == 6 and order(1, 0) == orders[0]
    assert {len(set(range(26)) - set(numbers)) for numbers in orders} == {2}


@pytest.mark.parametrize("schedule, fractions", [("linear", [1, 0.75, 0.5, 0.25]), ("constant", [1, 1, 1, 1])])
def test_lr_schedule(schedule, fractions):
    flags = Flags(init_lr_frac=0.5, lr_schedule=schedule)
    runs = [SimpleNamespace(flags=flags, step=step, num_steps=4) for step in range(4)]
    assert [chat_rl.lr_fraction(run) / 0.5 for run in runs] == fractions
