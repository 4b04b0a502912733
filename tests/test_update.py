"""chat_rl.py's update: its gradient against a plain one, in any batch and on any ranks; rewards and advantages."""
import itertools
import math
import re
import shutil
import statistics
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SHAPE, SMALL, chat, generate, main, metrics, policy_of, run, tiny_model, untimed, weights
from test_run import samples

import chat_rl
import gpt
from chat_rl import TASKS, Example, Flags, Group

QUESTIONS = ["?", "What is 17 + 4? Think of it as long as you like before you say what it is, sixty tokens or so.",
             "3 + 4", "1 + 1 = ", "Twenty-two characters."]
REWARDS = [[0.0, 1.0, 0.0, 0.0, 1.0], [1.0, 0.5, 0.0, 0.5, 0.5], [1.0] * 5, [0.0, 0.0, 0.0, 0.0, 1.0], [0.0] * 4 + [0.3]]

# ----------------------------------------------------------------------------------------------------------------------
# The gradient


def some_groups(model: gpt.GPT, tokenizer: gpt.Tokenizer, temperature: float = 1.0, top_k: int = 50) -> list[Group]:
    """Groups with prompts of different lengths, one of them without anything to learn, one with a row of advantage 0;
    completions with forced tokens, with and without a stop token, and of a single token."""
    prompts = [tokenizer.render(chat(question)) for question in QUESTIONS]
    completions = generate(model, tokenizer, prompts, 5, 12, temperature, top_k)
    groups = [Group(None, prompt, group, rewards, rewards, chat_rl.advantages_of(rewards))
              for prompt, group, rewards in zip(prompts, completions, REWARDS)]
    one, two, three, four, _ = groups[0].completions
    one.tokens[3:6] = [tokenizer.output_start, 55, tokenizer.output_end]
    one.mask[3:6], one.logprobs[3:6] = [False] * 3, [0.0] * 3
    two.tokens[-2:], two.mask[-2:], two.logprobs[-2:] = [tokenizer.output_start, 56], [False] * 2, [0.0] * 2
    three.tokens[1:], three.mask[1:], three.logprobs[1:] = [], [], []
    four.tokens[:], four.mask[:], four.logprobs[:] = [tokenizer.assistant_end], [True], [-1.0]
    for c in groups[1].completions[:3]:
        c.tokens[-1:], c.mask[-1:] = [tokenizer.assistant_end], [True]
    return groups


def sampled_tokens(groups: list[Group]) -> int:
    return sum(sum(c.mask) for group in groups for c in group.completions)


def reinforce(logprobs: torch.Tensor, sampled_logprobs: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """The loss at ratio 1, for completions that were edited after they were sampled."""
    return -advantages * logprobs


def gradient(model: gpt.GPT, groups: list[Group], policy: gpt.Policy, size: int = 8) -> torch.Tensor:
    """The project's gradient, of all parameters, as one vector."""
    _, vector = gpt.flatten(model)
    chat_rl.backward(model, groups, policy, size, reinforce)
    return vector / sampled_tokens(groups)


def plain_gradient(model: gpt.GPT, groups: list[Group], policy: gpt.Policy) -> torch.Tensor:
    """The same written out: every row run separately, whole, in float64, with no cache and nothing left out."""
    model, loss = deepcopy(model).double(), 0.0
    model.dtype = torch.float64
    for group in groups:
        for c, reward in zip(group.completions, group.rewards):
            advantage, first = reward - sum(group.rewards) / len(group.rewards), len(group.prompt) - 1
            raw = model.lm_head(model(torch.tensor([group.prompt + c.tokens])))[0, first:, :model.config.vocab_size]
            for row, token, mask in zip(15 * torch.tanh(raw / 15) / policy.temperature, c.tokens, c.mask):
                kept = row.argsort(descending=True)[:policy.top_k or None].tolist()
                if token not in kept:              # pushed out by rounding: counts as the last inside
                    kept[-1] = token
                if mask:
                    loss -= advantage * (row[token] - row[kept].logsumexp(dim=-1))
    (loss / sampled_tokens(groups)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Of two vectors, relative to their length."""
    return float((x.double() - y.double()).norm() / y.double().norm())


@pytest.mark.parametrize("generation, temperature, top_k", [
    *((generation, 1.0, 50) for generation in gpt.GENERATIONS), ("current", 0.7, 5), ("current", 1.0, 0)])
def test_gradient_is_the_plain_one(tokenizer, generation, temperature, top_k):
    """For device batch sizes 1, 3, 8 and 100 the gradient is that of every row run alone, to float32's rounding."""
    model = tiny_model(generation)
    groups, policy = some_groups(model, tokenizer, temperature, top_k), policy_of(model, temperature, top_k)
    plain = plain_gradient(model, groups, policy)
    for size in (1, 3, 8, 100):
        mine = gradient(model, groups, policy, size)
        assert distance(mine, plain) < 2e-6
        parts = mine.split([p.numel() for p in model.parameters()]), plain.split([p.numel() for p in model.parameters()])
        for (name, _), x, y in zip(model.named_parameters(), *parts):
            assert y.norm() > 0 and distance(x, y) < 2e-5, name


def test_gradient_adds_up_over_ranks(tokenizer):
    """The gradients of two halves of the groups add up to the step's, before they are divided by its tokens."""
    model = tiny_model()
    groups, policy = some_groups(model, tokenizer), policy_of(model)
    whole, (_, halves) = gradient(model, groups, policy), gpt.flatten(model)
    for rank in range(2):
        chat_rl.backward(model, groups[rank::2], policy, 8, reinforce)
    assert distance(halves / sampled_tokens(groups), whole) < 1e-6


def test_stop_token_is_learned_and_forced_tokens_are_not(tokenizer):
    """The stop token is in the loss; a forced token is read by those after it, but its own logprob is not in the loss."""
    model = tiny_model()
    groups, policy = some_groups(model, tokenizer), policy_of(model)
    whole = gradient(model, groups, policy)
    cleared, learned, reread = deepcopy(groups), deepcopy(groups), deepcopy(groups)
    stops = [c for group in cleared[:2] for c in group.completions if c.tokens[-1] == tokenizer.assistant_end]
    for c in stops:
        c.mask[-1] = False
    assert len(stops) >= 4
    learned[0].completions[0].mask[3] = True
    reread[0].completions[0].tokens[4] = 57
    unread = deepcopy(groups)
    unread[0].completions[1].tokens[-1] = 57                                   # forced, and the last: nothing reads it
    for other in (cleared, learned, reread):
        mine = gradient(model, other, policy)
        assert distance(mine, plain_gradient(model, other, policy)) < 2e-6
        assert distance(mine, whole) > 1e-2
    assert torch.equal(gradient(model, unread, policy), whole)


def test_nothing_is_computed_twice_or_in_vain(tokenizer, monkeypatch):
    """Each question that has something to learn runs once, whatever the batch; answers without advantage do not run; the
    unembedding sees the sampled tokens' rows alone."""
    model = tiny_model()
    groups, policy, unembed = some_groups(model, tokenizer), policy_of(model), model.unembed
    learned = [(group.prompt, c) for group in groups for c, a in zip(group.completions, group.advantages) if a]
    assert [sum(any(c is own for _, c in learned) for own in group.completions) for group in groups] == [5, 2, 0, 5, 5]
    prefilled, answered, unembedded = [], [], []

    def note(model, args):
        ids, cache = args
        (prefilled if cache.prefix is None else answered).extend(ids.tolist())

    model.register_forward_pre_hook(note)
    monkeypatch.setattr(gpt.GPT, "unembed", lambda self, x: unembedded.append(x.numel() // x.size(-1)) or unembed(x))
    for size in (1, 2, 3, 8, 100):
        for seen in (prefilled, answered, unembedded):
            seen.clear()
        count = len(chat_rl.backward(model, groups, policy, size))
        whole = [group.prompt for group in groups if any(group.advantages)]
        assert sorted(row[:len(prompt)] for row, prompt in zip(prefilled, whole, strict=True)) == sorted(whole)
        longer = [c.tokens[:-1] for _, c in learned if len(c.tokens) > 1]      # a single token leaves nothing to run
        assert all(sum(row[:len(tokens)] == tokens for row in answered) == 1 for tokens in longer)
        assert len(longer) <= len(answered) <= len(learned)
        assert sum(unembedded) == count == sum(sum(c.mask) for _, c in learned)
    prefilled.clear()
    assert len(chat_rl.backward(model, [groups[2]], policy, 8)) == 0 and prefilled == []


def test_gap_is_measured(tokenizer):
    """backward returns the log ratio of each token it learned from."""
    model, prompts = tiny_model(), [tokenizer.render(chat(question)) for question in QUESTIONS]
    completions, policy = generate(model, tokenizer, prompts, 2, 12, 0.8, 20), policy_of(model, 0.8, 20)
    groups = [Group(None, prompt, group, advantages=[1.0, -1.0]) for prompt, group in zip(prompts, completions)]
    log_ratios = chat_rl.backward(model, groups, policy, 8)
    assert len(log_ratios) == sampled_tokens(groups) and log_ratios.abs().max() < 1e-4
    groups[0].completions[0].logprobs[0] += 0.5
    drift = chat_rl.backward(model, groups, policy, 8)
    assert len(drift) == len(log_ratios) and drift.abs().sum() == pytest.approx(0.5, abs=1e-2)
    assert drift.abs().max() == pytest.approx(0.5, rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# A step of a real run

STEP = [*SMALL, "--max-steps=1", "--examples-per-step=12", "--num-samples=12", "--eval-examples=9", "--eval-samples=2",
        "--init-lr-frac=0.5"]
SEVERAL = """
import os, sys
sys.path.insert(0, os.environ["ROOT"])
import torch
import chat_rl
torch.set_num_threads(1)
leave, chat_rl.dist.destroy_process_group = chat_rl.dist.destroy_process_group, lambda *args: None
for size in (1, 8):
    assert chat_rl.main([*sys.argv[1:], f"--model-tag=ranks2-{size}", f"--device-batch-size={size}"]) == 0
    chat_rl.dist.init_process_group = lambda *args, **more: None        # the process group of the first stays for all
leave()
"""


def step_of(base: Path, tag: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What a run's first step was to each parameter: its gradient, which the optimizers' momentum holds, times 1 − β, and its
    change."""
    model, _, _ = gpt.load_checkpoint(base / "chatsft_checkpoints" / "adder")
    names, before, after = {p: name for name, p in model.named_parameters()}, model.state_dict(), weights(base, 1, tag)
    saved, found = torch.load(base / "chatrl_checkpoints" / tag / "optim_000001.pt", weights_only=True)["optimizers"], {}
    for optimizer, content in zip(gpt.make_optimizers(model), saved, strict=True):
        for group, numbers in zip(optimizer.param_groups, (part["params"] for part in content["param_groups"]), strict=True):
            states = [content["state"][i] for i in numbers if i in content["state"]]
            means = states[0]["average"] if "average" in states[0] else [state["exp_avg"] for state in states]
            beta = group["betas"][0] if "betas" in group else group["momentum"]
            for p, mean in zip(group["params"], means, strict=True):
                found[names[p]] = mean / (1 - beta), after[names[p]] - before[names[p]]
    return found


def test_step_on_ranks_and_batches(base):
    """One step on 1 and 2 ranks, with device batch sizes 1 and 8, is the same: gradient, weights and metrics. Both ranks
    have the weights that are saved."""
    folder, tags = base / "chatsft_checkpoints", [f"ranks{ranks}-{size}" for ranks in (1, 2) for size in (1, 8)]
    for tag in tags:
        shutil.copytree(folder / "adder", folder / tag)
    script = base / "several.py"
    script.write_text(SEVERAL)
    run(base, *STEP, ranks=2, script=script)
    for size in (1, 8):
        assert main(base, *STEP, f"--model-tag=ranks1-{size}", f"--device-batch-size={size}") == 0
    (before, line, _), whole = metrics(base, tags[0]), step_of(base, tags[0])
    gradient = torch.cat([g.flatten() for g, _ in whole.values()])
    assert line["grad_norm"] > 0 and line["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-5)
    for tag in tags:
        mine = step_of(base, tag)
        assert distance(torch.cat([g.flatten() for g, _ in mine.values()]), gradient) < 1e-5
        for name, (g, change) in whole.items():
            # Adam's first step is the gradient's sign, however small it is: where that is rounding alone, as for backout of two
            # layers, whose middle is the last one, which a norm follows, either will do
            known = (g.abs() > 1e-5 * gradient.norm()) | name.startswith("transformer.h.")
            error = (mine[name][1] - change)[known].norm() / (change[known].norm() + 1e-30)
            assert error < 1e-3, (tag, name, error)
        first, step, _ = metrics(base, tag)
        assert first == before and step.keys() == line.keys() and step["sampler_gap"] < 1e-5
        assert untimed(step) == pytest.approx(untimed(line), rel=1e-5, abs=1e-5)
    assert main(base, *STEP, f"--model-tag={base / 'chatrl_checkpoints' / tags[-1]}", "--max-steps=0") == 0
    assert metrics(base, f"evaluations/{tags[-1]}") == [{**metrics(base, tags[-1])[-1], "step": 0}]
    begun, after = samples(base, 0, tags[-1]), samples(base, 1, tags[-1])
    assert samples(base, 0, f"evaluations/{tags[-1]}") == after
    assert begun[1::2] != after[1::2]               # rank 1's


def test_nothing_to_learn_makes_no_step(base):
    """Where all rewards agree no optimizer moves, not even on momentum; the schedule goes on."""
    folder, tokenizer = base / "chatsft_checkpoints" / "fool", chat_rl.byte_tokenizer()
    model = tiny_model()                            # says nothing that is a number
    gpt.save_checkpoint(folder, 3, model, tokenizer, {"model_config": SHAPE})
    assert main(base, *SMALL, "--model-tag=fool", "--weight-decay=0.1") == 0
    steps = [line for line in metrics(base, "fool") if "reward" in line]
    assert [line["lrm"] for line in steps] == pytest.approx([1, 2 / 3, 1 / 3])
    for line in steps:
        assert (line["reward"], line["all_wrong"], line["grad_norm"], line["sampler_gap"]) == (0, 1, 0, 0)
    after = weights(base, 3, "fool")
    assert all(torch.equal(after[key], tensor) for key, tensor in model.state_dict().items())


# ----------------------------------------------------------------------------------------------------------------------
# Rewards, advantages, estimates


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
            assert chat_rl.pass_at_k(n, right, k) == pytest.approx(statistics.mean(map(any, subsets)))


def test_solved_and_its_error():
    """The standard error is the sample deviation over √n; a single question has none."""
    groups = [Group(None, [], [], scores=scores) for scores in ([1.0, 1.0], [0.0, 0.0], [0.0, 0.5], [1.0, 1.0])]
    assert chat_rl.solved(groups, 1) == pytest.approx((0.5, math.sqrt(1 / 3) / 2))
    assert chat_rl.solved([Group(None, [], [], scores=[1.0, 0.0, 0.0, 0.0])], 1) == (0.25, 0.0)


def test_arithmetic_holds_out_both_orders():
    """No test pair is trained on in either order; all pairs below 100 are in one of the splits; the answers are right."""
    grader, (train, test) = TASKS["arithmetic"].grader, chat_rl.make_sums().values()

    def pairs(rows: list[dict]) -> list[tuple[int, int]]:
        numbers = [tuple(map(int, re.findall(r"\d+", row["question"]))) for row in rows]
        assert [str(a + b) for a, b in numbers] == [row["answer"] for row in rows]
        return numbers

    trained, tested = pairs(train), pairs(test)
    assert not {frozenset(pair) for pair in trained} & {frozenset(pair) for pair in tested}
    assert {frozenset(pair) for pair in trained + tested} == {frozenset((a, b)) for a in range(100) for b in range(100)}
    assert len(set(trained)) == len(trained) and len(set(tested)) == len(tested) >= 100
    assert {(b, a) for a, b in trained} == set(trained)
    assert grader(test[0]["answer"], test[0]["answer"]) == 1.0 and grader(test[0]["answer"], "x") == 0.0
    assert chat_rl.make_sums() == {"train": train, "test": test}


def test_each_epoch_shuffles_all_questions():
    """The steps of an epoch go through the questions once; epochs and seeds differ in order."""
    examples = [Example(i, "", [], None) for i in range(26)]

    def order(seed: int, epoch: int) -> list[int]:
        run = SimpleNamespace(questions=examples, flags=Flags(examples_per_step=4, seed=seed))
        return [x.index for step in range(6 * epoch, 6 * epoch + 6) for x in chat_rl.questions_of_step(run, step)]

    orders = [order(seed, epoch) for seed in (1, 2) for epoch in (0, 1, 5)]
    assert all(len(set(numbers)) == 24 for numbers in orders)
    assert len({tuple(numbers) for numbers in orders}) == 6 and order(1, 0) == orders[0]
    assert {len(set(range(26)) - set(numbers)) for numbers in orders} == {2}
