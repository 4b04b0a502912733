"""gpt.py: the model against nanochat's own outputs, and each part of the machine against a plain one written here."""
import ast
import json
import math
import os
import pickle
import re
import shutil
import time
import warnings

import numpy
import pytest
import tiktoken
import torch
from conftest import SHAPE, SHARED, Touch, chat, generate, logits_of, policy_of, sign, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import chat_rl
import gpt

GENERATIONS = list(gpt.GENERATIONS)
PROMPT_LENGTHS = 3, 70, 21          # about the windows of tiny_model, 16 and 48: within both, past both, between
fuzz = settings(deadline=None, derandomize=True, max_examples=200)


def random_prompts(lengths: tuple[int, ...] = PROMPT_LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (n,), generator=generator).tolist() for n in lengths]


# ----------------------------------------------------------------------------------------------------------------------
# The model


@pytest.fixture(scope="module", params=GENERATIONS)
def nanochat(request) -> tuple[gpt.GPT, gpt.Tokenizer, dict]:
    """A checkpoint of nanochat's and what nanochat made of it."""
    folder = SHARED / "fixtures" / "nanochat" / request.param
    if not folder.exists():
        pytest.skip(f"nanochat's reference outputs are not in {folder}")
    model, tokenizer, _ = gpt.load_checkpoint(folder / "chatsft_checkpoints" / "d4")
    return model, tokenizer, torch.load(folder / "reference.pt", weights_only=True)


@pytest.mark.parametrize("chunk", [0, 1, 7], ids=["plain", "cache of ones", "cache of sevens"])
@torch.inference_mode()
def test_logits_are_nanochats(nanochat, chunk):
    """Logits and logprobs are nanochat's to 1e-4, in one forward and through the cache a few tokens at a time."""
    model, _, reference = nanochat
    for prompt, full, logits, logprobs in zip(*(reference[key] for key in ("prompts", "full", "logits", "logp"))):
        if chunk:
            prefix, n = gpt.prefix_of(model, [prompt]), len(prompt)
            cache, rest = gpt.Cache(prefix, 1, len(full) - n), torch.tensor([full[n:]])
            parts = [model(rest[:, i:i + chunk], cache) for i in range(0, len(full) - n, chunk)]
            mine, first = logits_of(model, torch.cat([prefix.hidden[:, None], *parts], dim=1))[0], n - 1
        else:
            mine, first = logits_of(model, model(torch.tensor([full])))[0], 0
        torch.testing.assert_close(mine[-len(logits):], logits, rtol=0, atol=1e-4)
        taken = mine[:-1].log_softmax(dim=-1).gather(1, torch.tensor(full[first + 1:])[:, None])[:, 0]
        torch.testing.assert_close(taken, logprobs[first:], rtol=0, atol=1e-4)


def test_greedy_tokens_are_nanochats(nanochat):
    """All prompts in one batch are rendered and continued greedily as nanochat does."""
    model, tokenizer, reference = nanochat
    assert [tokenizer.render(chat(text)) for text in reference["texts"]] == reference["prompts"]
    completions = generate(model, tokenizer, reference["prompts"], 1, len(reference["greedy"][0]), top_k=1)
    assert [group[0].tokens for group in completions] == reference["greedy"]
    assert all(group[0].logprobs == [0.0] * len(group[0].tokens) for group in completions)


@pytest.mark.parametrize("generation", GENERATIONS)
@torch.inference_mode()
def test_cache_with_groups_and_dropped_rows(generation):
    """Rows that share their question's part of the cache get what a whole forward gives, whichever rows were dropped."""
    model, generator = tiny_model(generation), torch.Generator().manual_seed(0)
    assert min(model.config.windows, default=0) < max(PROMPT_LENGTHS)
    for drops in ([[1, 5, 8, 11], [0, 1, 2], [0, 1, 2, 3]],                   # some; a whole group; all but one
                  [[4, 5, 6, 7], [], [7, 6], [0, 2, 4], [0], [1]]):           # the middle group first, then one by one
        rows = [list(prompt) for prompt in random_prompts() for _ in range(4)]
        cache = gpt.Cache(gpt.prefix_of(model, random_prompts()), 4, 30)
        for size, drop in zip([1, 4, 1, 6, 2, 9], [*drops, []]):
            ids = torch.randint(256, (len(rows), size), generator=generator)
            hidden = model(ids, cache)
            rows = [row + new for row, new in zip(rows, ids.tolist())]
            for row, mine in zip(rows, hidden):
                torch.testing.assert_close(mine, model(torch.tensor([row]))[0, -size:], rtol=0, atol=2e-5)
            kept = numpy.delete(numpy.arange(len(rows)), drop)
            assert cache.select(kept).tolist() == kept.tolist()
            rows = [rows[i] for i in kept]
        assert len(rows) == 1


def test_logits_of_padded_tables():
    """Logits are float32, within the softcap, and cut back from the padded rows to the vocabulary."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight *= 1000
    logits = logits_of(model, model(torch.tensor([[1, 2, 3]])))
    assert logits.shape == (1, 3, 265) and model.lm_head.weight.shape == (320, 64)
    assert logits.dtype == torch.float32 and 14 < logits.abs().max() <= 15


def test_bfloat16_arithmetic_leaves_float32_weights(tokenizer):
    """A bfloat16 model keeps float32 weights, and its sampler with cast matrices computes exactly what it does."""
    model = tiny_model()
    model.dtype = torch.bfloat16
    ids, sampler = torch.tensor(random_prompts((40,))), gpt.Sampler(model, tokenizer)
    hidden = model(ids)
    assert hidden.dtype == torch.bfloat16 and {p.dtype for p in sampler.model.parameters() if p.ndim > 1} == {torch.bfloat16}
    assert torch.equal(hidden, sampler.model(ids))
    assert [len(group) for group in generate(model, tokenizer, random_prompts(), 2, 4)] == [2, 2, 2]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert logits_of(model, hidden).dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# The sampler


@torch.inference_mode()
def plain_completion(model, tokenizer, prompt, key, sample, max_new_tokens, temperature, top_k, seed) -> gpt.Completion:
    """One row alone: the whole of it forward at each token, the distribution written out in float64."""
    tokens, mask, logprobs, forced = [], [], [], []
    stream = gpt.fold(seed, key, sample)
    for t in range(max_new_tokens):
        raw = model.lm_head(model(torch.tensor([prompt + tokens]))[0, -1])[:model.config.vocab_size].double()
        scores, ids = (15 * torch.tanh(raw / 15)).tolist(), list(range(len(raw)))
        if top_k:
            ids = sorted(ids, key=lambda i: -scores[i])[:top_k]
        weights = [math.exp(scores[i] / temperature) for i in ids]
        aim, reach = float(gpt.to_uniform(gpt.fold(stream, t))) * sum(weights), 0.0
        for i, weight in zip(ids, weights):
            reach += weight
            if reach > aim:
                break
        tokens.append(forced[0] if forced else i)
        logprobs.append(0.0 if forced else math.log(weight / sum(weights)))
        mask.append(not forced)
        forced = forced[1:]
        if tokens[-1] in (tokenizer.assistant_end, tokenizer.bos):
            break
        if tokens[-1] == tokenizer.python_end:
            forced = tokenizer.answer_call(tokens)
    return gpt.Completion(tokens, mask, logprobs)


def assert_same(mine: gpt.Completion, other: gpt.Completion) -> None:
    assert mine.tokens == other.tokens and mine.mask == other.mask
    assert mine.logprobs == pytest.approx(other.logprobs, rel=0, abs=1e-5)


@pytest.mark.parametrize("generation, temperature, top_k", [
    *((generation, 1.0, 50) for generation in GENERATIONS),
    *(("current", *policy) for policy in [(1.0, 0), (0.5, 50), (2.0, 5), (0.7, 0), (1.3, 1000), (1.0, 1), (0.5, 1)])])
def test_generate_is_plain_sampling(tokenizer, generation, temperature, top_k):
    """All prompts in one batch give the tokens and logprobs that one row at a time gives, without a cache."""
    model, prompts = tiny_model(generation), random_prompts()
    model.lm_head.weight.data[tokenizer.assistant_end] *= 3            # so that rows stop at many places and are dropped
    groups = generate(model, tokenizer, prompts, 4, 24, temperature, top_k, seed=5, keys=[7, 8, 2 ** 40])
    assert top_k == 1 or len({len(c.tokens) for group in groups for c in group}) > 3
    for prompt, key, group in zip(prompts, [7, 8, 2 ** 40], groups):
        for sample, mine in enumerate(group):
            assert_same(mine, plain_completion(model, tokenizer, prompt, key, sample, 24, temperature, top_k, 5))


def test_completions_depend_on_nothing_in_their_batch(tokenizer):
    """A completion is the same alone, beside other prompts, by its key in any place, and with fewer samples."""
    model, prompts = tiny_model(), random_prompts((3, 70, 21, 40, 9))
    model.lm_head.weight.data[tokenizer.assistant_end] *= 3
    together = generate(model, tokenizer, prompts, 5, 20, seed=-3)
    for i, prompt in enumerate(prompts):
        alone, = generate(model, tokenizer, [prompt], 5, 20, seed=-3, keys=[i])
        fewer, = generate(model, tokenizer, [prompt], 2, 20, seed=-3, keys=[i])
        for mine, other in zip([*together[i], *together[i][:2]], [*alone, *fewer], strict=True):
            assert_same(mine, other)
    turned = generate(model, tokenizer, prompts[::-1], 5, 20, seed=-3, keys=[4, 3, 2, 1, 0])
    for mine, other in zip(sum(together, []), sum(turned[::-1], []), strict=True):
        assert_same(mine, other)
    longer = generate(model, tokenizer, prompts, 5, 30, seed=-3)
    assert [c.tokens for c in sum(together, [])] == [c.tokens[:20] for c in sum(longer, [])]


@pytest.mark.parametrize("counter", ["seed", "key", "sample", "position"])
def test_each_counter_changes_the_numbers(tokenizer, counter):
    """Another seed, key or sample samples another completion; so does each position draw anew."""
    model, prompt = tiny_model(), random_prompts((9,))[0]
    first, second = generate(model, tokenizer, [prompt], 2, 30, top_k=0)[0]
    other = {"seed": lambda: generate(model, tokenizer, [prompt], 1, 30, top_k=0, seed=1)[0][0],
             "key": lambda: generate(model, tokenizer, [prompt], 1, 30, top_k=0, keys=[1])[0][0],
             "sample": lambda: second,
             "position": lambda: gpt.Completion(first.tokens[1:], [], [])}[counter]()
    assert sum(a == b for a, b in zip(first.tokens, other.tokens)) < 5


def test_uniform_numbers():
    """Numbers are uniform in [0, 1) along every counter, alike for no two counters, and SplitMix64's own."""
    assert int(gpt.fold(0)) % 2 ** 64 == 0xE220A8397B1DCDAF            # the first output of SplitMix64 from seed 0
    assert gpt.to_uniform(torch.tensor([0, -1, 2 ** 63 - 1])).tolist() == [0.0, 1 - 2 ** -24, 0.5 - 2 ** -24]
    n = 2 ** 14
    for place in range(4):
        counters = [torch.arange(n) if i == place else 3 for i in range(4)]
        x = gpt.to_uniform(gpt.fold(*counters)).double()
        ends = torch.stack([torch.arange(n), torch.arange(1, n + 1)]) / n
        assert 0 <= x.min() and x.max() < 1 and x.unique().numel() > 0.99 * n
        assert (x.sort().values - ends).abs().max() < 1.63 / math.sqrt(n)      # Kolmogorov and Smirnov's bound at 1 %
        assert abs(torch.corrcoef(torch.stack([x[1:], x[:-1]]))[0, 1]) < 0.025
    grid = gpt.fold(*torch.meshgrid(*[torch.arange(-6, 6)] * 4, indexing="ij"))
    assert grid.unique().numel() == 12 ** 4
    assert int(gpt.fold(1, 2)) == int(gpt.fold(torch.tensor([5, 1]), torch.tensor(2))[1])


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (1.0, 50), (0.6, 50), (1.7, 3), (1.0, 1)])
def test_draw_has_the_distribution(temperature, top_k):
    """Evenly spaced numbers draw each token within one of its probability's share, with that probability's logprob."""
    raw, n = torch.randn(265, generator=torch.Generator().manual_seed(0)) * 20, 40_000
    policy = gpt.Policy(temperature, top_k, softcap=15.0)
    tokens, logprobs, _ = policy.draw(raw.expand(n, -1), (torch.arange(n) + 0.5) / n)
    scores = 15 * torch.tanh(raw.double() / 15) / temperature
    if top_k:
        scores[raw < raw.sort(descending=True).values[top_k - 1]] = -torch.inf
    p = scores.softmax(dim=-1)
    assert (tokens.bincount(minlength=265) - p * n).abs().max() < 1.1
    torch.testing.assert_close(logprobs, p.log().float()[tokens], rtol=0, atol=1e-5)
    first, last = policy.draw(raw.expand(2, -1), torch.tensor([0.0, 1 - 2 ** -24]))[0]
    assert p[first] > 0 and p[last] > 0


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (1.0, 50), (0.6, 7), (1.7, 1), (1.0, 265), (1.0, 1000)])
def test_policy_logprobs_are_those_drawn_from(temperature, top_k):
    """The loss's logprobs are the log-softmax over the top k at temperature, and equal the sampler's."""
    raw = torch.randn(50, 265, generator=torch.Generator().manual_seed(0)) * 10
    policy = gpt.Policy(temperature, top_k, softcap=15.0)
    tokens, logprobs, _ = policy.draw(raw, torch.rand(50, generator=torch.Generator().manual_seed(1)))
    scores = 15 * torch.tanh(raw / 15) / temperature
    if 0 < top_k < 265:
        scores[raw < raw.sort(descending=True).values[:, top_k - 1:top_k]] = -torch.inf
    mine = policy.logprobs(raw, tokens)
    torch.testing.assert_close(mine, scores.log_softmax(dim=-1)[torch.arange(50), tokens], rtol=0, atol=1e-5)
    torch.testing.assert_close(mine, logprobs, rtol=0, atol=1e-5)


def test_policy_logprobs_without_truncation_are_the_plain_softmax():
    """At top_k 0 and temperature 1 the policy is the softmax of the model's logits."""
    model, ids = tiny_model(), torch.tensor(random_prompts((30,)))
    hidden = model(ids)[:, :-1]
    mine = policy_of(model, 1.0, 0).logprobs(model.unembed(hidden), ids[:, 1:])
    plain = logits_of(model, hidden).log_softmax(dim=-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(mine, plain, rtol=0, atol=1e-6)


def test_token_outside_the_top_k_counts_as_inside():
    """A token that rounding pushed past rank k takes the k-th place: a logprob like its, a finite gradient."""
    raw = torch.tensor([[5.0, 4.0, 3.0, 3.0 - 1e-6, -2.0]], requires_grad=True)
    just_inside, just_outside, far_outside = (gpt.Policy(1.0, 3, 15.0).logprobs(raw, torch.tensor([i])) for i in (2, 3, 4))
    assert just_outside.item() == pytest.approx(just_inside.item(), abs=1e-5)
    scores = 15 * torch.tanh(raw.detach()[0] / 15)
    assert far_outside.item() == pytest.approx(scores[[0, 1, 4]].log_softmax(dim=-1)[2].item(), abs=1e-5)
    gradient, = torch.autograd.grad((just_outside + far_outside).sum(), raw)
    assert gradient.isfinite().all() and gradient[0, 3] > 0 and gradient[0, 4] > 0 and gradient[0, 2] == 0
    one = gpt.Policy(1.0, 1, 15.0).logprobs(raw, torch.tensor([4]))          # k = 1: all that there is to choose from
    assert one.item() == 0.0


def scripted_model(successors: dict[int, list[int]], default: int) -> gpt.GPT:
    """A GPT whose every token is followed by one of its successors, all as likely, or else by `default`."""
    shape = dict(sequence_len=320, vocab_size=265, n_layer=1, n_head=4, n_kv_head=4, n_embd=320)
    model = gpt.GPT(gpt.nanochat_config("classic", **shape)).init_weights(0)                 # c_proj is zero: embeddings pass straight through
    with torch.no_grad():
        model.transformer.wte.weight.copy_(torch.eye(320))
        model.lm_head.weight.fill_(-10.0)
        for token in range(265):
            model.lm_head.weight[successors.get(token, [default]), token] = 10.0
    return model


def test_calculator_calls_force_tokens(tokenizer):
    """A real call's answer is forced, unlearned, and counts toward the limit; only a closed, sound call has one."""
    t, a, b, one, two, three, nine, plus, close = tokenizer, *b"ab1239+)"
    successors = {
        t.assistant_start: [t.python_start, t.python_end, a], a: [t.bos], b: [t.assistant_end],
        t.python_start: [nine, one], nine: [t.python_start], one: [plus], plus: [two], two: [t.python_end, close],
        close: [t.python_end], t.python_end: [b], t.output_end: [t.python_end, t.assistant_end],
        t.output_start: [a, b], three: [a, b]}                         # what the model would have said instead
    model, answer = scripted_model(successors, default=b), [t.output_start, three, t.output_end]
    for limit in range(1, 15):
        completions = generate(model, t, [t.render(chat("?"))], 200, limit, top_k=0)[0]
        for c in completions:
            forced, call, before = [], None, t.assistant_start
            for token, mask, logprob in zip(c.tokens, c.mask, c.logprobs, strict=True):
                if forced:
                    assert (token, mask, logprob) == (forced.pop(0), False, 0.0)
                else:
                    assert mask and token in successors[before]
                    assert logprob == pytest.approx(-math.log(len(successors[before])), abs=1e-5)
                if token == t.python_end:
                    forced, call = list(answer) if call == [one, plus, two] else [], None
                elif token == t.python_start:
                    call = []
                elif call is not None:
                    call.append(token)
                before = token
            assert len(c.tokens) == limit or token in (t.bos, t.assistant_end) and len(c.tokens) < limit
        texts = {re.sub(r"<.(python_)?(.*?).>", r"<\2>", t.decode(c.tokens)) for c in completions}
        if limit in (5, 6, 7):                     # the limit falls just before and within the answer
            assert "<start>1+2<end>" + ["", "<output_start>", "<output_start>3"][limit - 5] in texts
    assert texts >= {"a<bos>", "<end>b<assistant_end>", "<start>1+2<end><output_start>3<output_end><assistant_end>",
                     "<start>9<start>1+2<end><output_start>3<output_end><assistant_end>",
                     "<start>1+2)<end>b<assistant_end>",
                     "<start>1+2<end><output_start>3<output_end><end>b<assistant_end>"}


def test_completions_end_with_what_ended_them(tokenizer):
    """A stop token is the last of its completion; others are max_new_tokens long; progress counts them all."""
    model, ended = tiny_model(), []
    model.lm_head.weight.data[tokenizer.assistant_end] *= 3
    groups = generate(model, tokenizer, random_prompts(), 20, 12, progress=ended.append)
    stops = {tokenizer.assistant_end, tokenizer.bos}
    completions = sum(groups, [])
    for c in completions:
        assert len(c.tokens) == 12 or c.tokens[-1] in stops
        assert not stops & set(c.tokens[:-1]) and all(mask for mask in c.mask)
        assert all(logprob < 0 for logprob in c.logprobs) and max(c.tokens) < 265
    assert 10 < sum(c.tokens[-1] in stops for c in completions) < 60
    assert sum(ended) == 60


def test_stopped_rows_stop_costing(tokenizer):
    """No more rows run at a position than go on after it, but for one in four; questions run once, not once per row."""
    model, shapes = tiny_model(), []
    model.lm_head.weight.data[tokenizer.assistant_end] *= 3
    sampler = gpt.Sampler(model, tokenizer)
    sampler.model.register_forward_pre_hook(lambda model, args: shapes.append(tuple(args[0].shape)))
    groups = sampler.generate(random_prompts(), 30, 20, policy_of(model))
    lengths = [len(c.tokens) for group in groups for c in group]
    assert shapes[0] == (3, max(PROMPT_LENGTHS)) and len(shapes) == max(lengths)
    for t, (rows, width) in enumerate(shapes[1:]):
        assert width == 1 and rows * 0.75 < sum(length > t + 1 for length in lengths) <= rows
    assert shapes[-1][0] < 60


def test_generate_refuses_positions_beyond_the_last(tokenizer):
    """sequence_len positions are there; one more is an error rather than nonsense."""
    model, prompt = gpt.GPT(gpt.nanochat_config("current", **SHAPE)).init_weights(0), random_prompts((38,))[0]
    assert len(generate(model, tokenizer, [prompt], 1, 10, top_k=1)[0][0].tokens) <= 10
    with pytest.raises(ValueError, match="48"):
        generate(model, tokenizer, [prompt], 1, 11)


# ----------------------------------------------------------------------------------------------------------------------
# The calculator and the tokenizer


@pytest.mark.parametrize("expression, result", [
    ("48/2", "24"), ("10/2", "5"), ("70*.01*90", "63"), ("1/3", "0.3333333333"), ("1,000+1", "1001"), ("7//2", "3"),
    ("-7//2", "-4"), ("(1+2)*3", "9"), (" 1 + 1 ", "2"), ("-5", "-5"), ("--5", "5"), ("+5-+-5", "10"), ("2.50", "2.5"),
    ("5.0", "5"), (".5+.5", "1"), ("5.", "5"), ("0.1+0.2", "0.3"), ("-0.0", "0"), ("0*-1", "0"), ("7.0//2", "3"),
    ("2*1000000*1000000", "2000000000000"), ("1000000.0*1000000*1000000", "1000000000000000000"),
    ("1/1000000", "0.000001"), ("2/3*100000000000", "66666666670"), ("9" * 200, "9" * 200), ("'strawberry'.count('r')",
    "3"),
    ('"strawberry".count("rr")', "1"), ("('aXa'.count('a'))", "2"), ("'a b'.count(' ')", "1"), ("'a,b'.count('b')",
    "1")])
def test_calculator_accepts(expression, result):
    """What GSM8K's annotations and nanochat's tools ask is answered as they write it."""
    assert gpt.calculate(expression) == result


@pytest.mark.parametrize("expression", [
    "", " ", ",", "2**3", "2* *3", "9**9**9", "x", "x+1", "print(1)", "abs(1)", "(1)(2)", "().count", "1 .real",
    "'a'.upper()", "'a'.count", "'a'.count()", "'a'.count('a').count('a')", "'a'.count('a' 1)", "'a'.count(a)",
    "'a'.count(x.count('a'))", "a.count('a')", "(1).count('1')", "'a'.index('a')", "__import__('os').count('a')",
    "'a'.count.__class__('a')", "f'a'.count('a')", "'a'.count(f'a')", "b'a'.count(b'a')", "'a'*3", "'a'.count('a')*9",
    "1/0", "1//0", "0/0", "1./0", "1e9", "1_000", "0x10", "1j", "012", "1 2", "1 +", "(1", "1)", "()", "...", "1=1",
    "1<2",
    "1%2", "1&2", "1|2", "~1", "1\n+1", "1;1", "#1", "[1]", "{1}", "lambda: 1", "1 if 1 else 2", "9" * 201,
    "1" + " " * 200 + "+1", "(" * 100 + "1" + ")" * 100,
    "９+1", "1+١", "$5", "\0", "1\\", "''", "'a'.count('a'", "'a'.count('a', 0)", "'a'.count(*'a')",
    "'a'.count(sub='a')"])
def test_calculator_refuses(expression):
    """Anything else has no answer."""
    assert gpt.calculate(expression) is None


digits = st.from_regex(r"\A([0-9]{1,12}|[0-9]{0,6}\.[0-9]{1,9}|[1-9][0-9]{60,99})\Z")
arithmetic = st.recursive(digits, lambda inner: st.one_of(
    st.builds("({})".format, inner), st.builds("-{}".format, inner),
    st.builds("{}{}{}".format, inner, st.sampled_from(["+", "-", "*", "/", "//", " + ", " / "]), inner)), max_leaves=12)


@fuzz
@given(arithmetic)
def test_calculator_is_python_arithmetic(expression):
    """On arithmetic it gives Python's own value to ten digits, and nothing where Python or floats have none."""
    mine = gpt.calculate(expression)
    try:
        value = eval(compile(ast.parse(expression, mode="eval"), "", "eval"), {}) if len(expression) <= 200 else None
        value = value if value is not None and math.isfinite(value) else None
    except (ArithmeticError, SyntaxError):
        value = None
    if mine is None or value is None:
        assert mine is None and value is None
    elif isinstance(value, int):
        assert mine == str(value)
    else:
        assert float(mine) == pytest.approx(value, rel=1e-9, abs=1e-300)
        assert mine.strip("-0.") == "" or len(mine.strip("-0.").replace(".", "").strip("0")) <= 10
        assert not mine.endswith(".") and ("." not in mine or not mine.endswith("0"))


pieces = st.sampled_from([*"0123456789+-*/.(), '\"_abfrxjlo\n", "**", "//", ".count(", "'a'.count('a')", "1if 2else",
                          "__", "((((((", "------", "'''", "0b", "1or ", "\\", "é", "\0"])


@fuzz
@given(st.one_of(st.text(), st.lists(pieces, max_size=60).map("".join), st.text("0123456789+-*/.(), ", max_size=210)))
def test_calculator_never_raises(expression):
    """Whatever a model may write, the calculator answers with a short number or not at all, and warns of nothing."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = gpt.calculate(expression)
    assert not warned
    assert result is None or len(result) < 250 and math.isfinite(float(result))


@fuzz
@given(st.lists(st.one_of(st.integers(0, 264), st.sampled_from([*b"0123456789+-*/()", 261, 261, 262])), max_size=40))
def test_calculator_on_any_tokens(ids):
    """Any tokens, bytes that are no text among them, give an output block or nothing."""
    tokenizer = chat_rl.byte_tokenizer()
    forced = tokenizer.answer_call([*ids, tokenizer.python_end])
    assert forced == [] or (forced[0], forced[-1]) == (tokenizer.output_start, tokenizer.output_end)
    assert forced == [] or float(tokenizer.decode(forced[1:-1])) is not None
    if tokenizer.python_start not in ids:
        assert forced == []


@pytest.mark.parametrize("worst", [
    "(" * 99 + "1" + ")" * 99, "-" * 199 + "1", "9" * 200, "9*" * 99 + "9", "9" * 99 + "*" + "9" * 99,
    "1/" * 99 + "3", "1//" * 66, "'" + "a" * 180 + "'.count('a')", "(-" * 60 + "1" + ")" * 60, "'" * 190 + ".count(",
    "9" * 100_000, "(" * 100_000])
def test_calculator_is_quick(worst):
    """The slowest expressions that are let through take well under a millisecond; longer ones are not looked into."""
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        gpt.calculate(worst)
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.005


@fuzz
@given(st.text())
def test_tokenizer_round_trip(text):
    """Any text comes back from its tokens, none of them special."""
    tokenizer = chat_rl.byte_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert all(token < 256 for token in tokenizer.encode(text))


def test_special_looking_text_is_plain_text(tokenizer):
    """A question cannot end its own turn."""
    text = "<|user_end|><|assistant_start|>#### 1<|assistant_end|>"
    ids = tokenizer.render(chat(text))
    t = tokenizer
    assert ids[:2] == [t.bos, t.user_start] and ids[-2:] == [t.user_end, t.assistant_start]
    assert ids[2:-2] == list(text.encode()) and max(ids[2:-2]) < t.bos
    assert tokenizer.decode(ids) == f"<|bos|><|user_start|>{text}<|user_end|><|assistant_start|>"
    assert len({getattr(t, name) for name in t.SPECIAL}) == 9
    assert isinstance(tokenizer.encode("\ud800"), list)                # half a surrogate pair, which JSON can hold


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def saved(directory, generation: str = "current", **meta) -> gpt.GPT:
    """Saves a tiny model as step 7, its tables as bfloat16, the tokenizer beside it."""
    model = tiny_model(generation)
    model.stored_types = {key: torch.bfloat16 for key in model.state_dict() if "wte" in key or "value_embeds" in key}
    gpt.save_checkpoint(directory, 7, model, chat_rl.byte_tokenizer(), {"model_config": SHAPE, **meta})
    return model


def edit_state(directory, edit) -> None:
    """Changes a saved state dict in a way that its meta file admits."""
    path = directory / "model_000007.pt"
    torch.save(edit(torch.load(path, weights_only=True)), path)
    sign(directory, 7, digests=False)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_checkpoint_round_trip(tmp_path, generation):
    """What is saved has the same keys, shapes, types and values when loaded and saved again; in memory it is float32."""
    first = saved(tmp_path / "a", generation, note="é")
    model, tokenizer, meta = gpt.load_checkpoint(tmp_path / "a")
    assert model.config == gpt.nanochat_config(generation, **SHAPE)
    assert meta["note"] == "é" and meta["step"] == 7 and meta["model_config"] == SHAPE
    assert tokenizer.render(chat("é")) == chat_rl.byte_tokenizer().render(chat("é"))
    gpt.save_checkpoint(tmp_path / "b", 7, model, tokenizer, meta)
    one, two = (torch.load(tmp_path / name / "model_000007.pt", weights_only=True) for name in "ab")
    assert list(one) == list(two) == list(first.state_dict())
    for key, tensor in model.state_dict().items():
        table = "wte" in key or "value_embeds" in key
        assert one[key].dtype == two[key].dtype == (torch.bfloat16 if table else torch.float32)
        assert tensor.dtype == torch.float32 and torch.equal(one[key], two[key]) and torch.equal(tensor, one[key].float())
        torch.testing.assert_close(tensor, first.state_dict()[key], rtol=2 ** -8 if table else 0, atol=0)
    assert all(p.requires_grad for p in model.parameters())
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"model_000007.pt", "meta_000007.json", "tokenizer.pkl"}
    model.config = tiny_config(generation)                             # the model's alone: its layers have their own
    model.stored_types = {}
    ids = torch.tensor(random_prompts((20,)))
    first.load_state_dict(model.state_dict())
    assert torch.equal(model(ids), first(ids))


def test_checkpoint_holds_nothing_twice(tmp_path):
    """A file holds its own tensors, though in memory all parameters are views of one vector."""
    model = saved(tmp_path)
    stored = sum(x.nbytes for x in torch.load(tmp_path / "model_000007.pt", weights_only=True).values())
    gpt.flatten(model)
    gpt.save_checkpoint(tmp_path, 7, model, chat_rl.byte_tokenizer(), {"model_config": SHAPE})
    assert stored <= (tmp_path / "model_000007.pt").stat().st_size < stored + 30_000


def test_checkpoint_of_a_compiled_model(tmp_path):
    """The prefix that torch.compile gives to keys is taken off."""
    saved(tmp_path)
    edit_state(tmp_path, lambda state: {"_orig_mod." + key: x for key, x in state.items()})
    model, _, _ = gpt.load_checkpoint(tmp_path)
    assert "transformer.wte.weight" in model.state_dict() and set(model.stored_types) == set(model.state_dict())
    gpt.save_checkpoint(tmp_path / "b", 8, model, chat_rl.byte_tokenizer(), {"model_config": SHAPE})
    assert set(torch.load(tmp_path / "b" / "model_000008.pt", weights_only=True)) == set(model.state_dict())


def test_checkpoint_with_unpadded_tables(tmp_path):
    """Tables may have exactly vocab_size rows, as nanochat's had until December 2025."""
    model = gpt.GPT(gpt.nanochat_config("classic", **SHAPE, vocab_rows=265)).init_weights(0)
    gpt.save_checkpoint(tmp_path, 7, model, chat_rl.byte_tokenizer(), {"model_config": SHAPE})
    model, _, meta = gpt.load_checkpoint(tmp_path)
    assert model.lm_head.weight.shape == (265, 64) and meta["model_config"] == SHAPE
    assert logits_of(model, model(torch.tensor([[264]]))).shape == (1, 1, 265)


def test_tokenizer_beside_or_two_folders_up(tmp_path):
    """The tokenizer beside the model wins over that two folders up; without either both places are named."""
    folder, above = tmp_path / "chatsft_checkpoints" / "d1", tmp_path / "tokenizer" / "tokenizer.pkl"
    saved(folder)
    above.parent.mkdir()
    above.write_bytes(b"not looked at")
    assert gpt.load_checkpoint(folder)[1].vocab_size == 265
    shutil.move(folder / "tokenizer.pkl", above)
    assert gpt.load_checkpoint(folder)[1].vocab_size == 265
    above.unlink()
    with pytest.raises(gpt.UserError) as error:
        gpt.load_checkpoint(folder)
    assert str(above) in str(error.value) and str(folder / "tokenizer.pkl") in str(error.value)


def test_steps_that_are_complete(tmp_path):
    """The last step with both its files is loaded; a step that is not there is refused with those that are."""
    saved(tmp_path)
    model, tokenizer, meta = gpt.load_checkpoint(tmp_path)
    gpt.save_checkpoint(tmp_path, 12, model, tokenizer, {**meta, "note": 12})
    shutil.copy(tmp_path / "model_000012.pt", tmp_path / "model_000020.pt")
    assert gpt.load_checkpoint(tmp_path)[2]["note"] == 12 and "note" not in gpt.load_checkpoint(tmp_path, 7)[2]
    for step in (8, 20):
        with pytest.raises(gpt.UserError, match=f"step {step}.*: 7, 12$"):
            gpt.load_checkpoint(tmp_path, step)
    with pytest.raises(gpt.UserError, match="no checkpoint"):
        gpt.load_checkpoint(tmp_path / "nowhere")


def refusal(directory) -> str:
    """The message with which a checkpoint is refused: one line."""
    with pytest.raises(gpt.UserError) as error:
        gpt.load_checkpoint(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("edit, message", [
    (lambda state: {**state, "bigram_embed.weight": torch.zeros(2, 2)}, "unknown key bigram_embed.weight"),
    (lambda state: {k: x for k, x in state.items() if ".1.mlp.c_fc" not in k}, 'Missing key(s) in state_dict: "transformer.h.1.mlp.c_fc'),
    (lambda state: {k: x for k, x in state.items() if k != "transformer.wte.weight"}, "transformer.wte.weight"),
    (lambda state: {**state, "lm_head.weight": torch.zeros(320, 63)}, "lm_head.weight"),
    (lambda state: {**state, "lm_head.weight": torch.zeros(256, 64)}, "lm_head.weight"),
    (lambda state: {**state, "transformer.wte.weight": torch.zeros(())}, "model_000007.pt"),
    (lambda state: {k: torch.zeros(2, 20) if "ve_gate" in k else x for k, x in state.items()}, "width 20"),
    (lambda state: {k: x[:200] if len(x) == 320 else x for k, x in state.items()}, "200"),
    (lambda state: {**state, "lm_head.weight": "x"}, "model_000007.pt"),
    (lambda state: list(state.values()), "model_000007.pt"), (lambda state: {}, "model_000007.pt"),
    (lambda state: {3: torch.zeros(1)}, "model_000007.pt")],
    ids=["unknown", "missing", "no wte", "shape", "rows", "scalar", "gate", "fewer rows than tokens", "no tensor",
    "list",
         "empty", "number"])
def test_foreign_state_is_refused(tmp_path, edit, message):
    """A state dict that is none of the four generations' is refused by the file's name and the key's."""
    saved(tmp_path)
    edit_state(tmp_path, edit)
    text = refusal(tmp_path)
    assert message in text and "model_000007.pt" in text


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("damage", [
    lambda data: data[:len(data) // 2], lambda data: data[:-1], lambda data: b"", lambda data: b"text",
    lambda data: data[100:],
    lambda data: data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:]],
    ids=["half", "all but one", "empty", "text", "beheaded", "bit"])
def test_damaged_file_is_refused(tmp_path, damage, digests):
    """A broken model file is refused by name, even by a single bit where the meta file has digests."""
    saved(tmp_path)
    if not digests:
        edit_state(tmp_path, lambda state: state)
    path = tmp_path / "model_000007.pt"
    data = path.read_bytes()
    path.write_bytes(damage(data))
    if digests or len(path.read_bytes()) < len(data):
        assert str(path) in refusal(tmp_path)


@pytest.mark.parametrize("text", [
    b"{", b"", b"[]", b"{}", b"null", b"\xff\xfe{}", b'{"model_config": {}}', *(
        json.dumps({"model_config": {**SHAPE, **more}}).encode()
        for more in ({"bigram": 1}, {"n_layer": "3"}, {"n_head": 0}, {"n_head": 5}, {"n_layer": 4},
                     {"window_pattern": "?"}))])
def test_meta_that_is_none_is_refused(tmp_path, text):
    """A meta file that is no JSON or has another config is refused by a file's name."""
    saved(tmp_path)
    (tmp_path / "meta_000007.json").write_bytes(text)
    assert "_000007." in refusal(tmp_path)


def test_vocabulary_mismatch_is_refused(tmp_path):
    """A tokenizer of another vocabulary than the model's is refused, with both sizes."""
    saved(tmp_path)
    special = {f"<|{name}|>": 300 + i for i, name in enumerate(gpt.Tokenizer.SPECIAL)}
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("more", pat_str=".", special_tokens=special, mergeable_ranks=ranks)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    sign(tmp_path, 7)
    assert "309" in (text := refusal(tmp_path)) and "265" in text


@pytest.mark.parametrize("call", [os.system, eval], ids=["os.system", "eval"])
@pytest.mark.parametrize("name, wrap", [
    ("tokenizer.pkl", lambda bad, encoding, state: pickle.dumps(bad)),
    ("tokenizer.pkl", lambda bad, encoding, state: pickle.dumps([bad, encoding])),
    ("tokenizer.pkl", lambda bad, encoding, state: pickle.dumps(bad, protocol=0)),
    ("model_000007.pt", lambda bad, encoding, state: {**state, "lm_head.weight": bad}),
    ("model_000007.pt", lambda bad, encoding, state: bad)],
    ids=["tokenizer", "beside one", "protocol 0", "in a state", "model"])
def test_no_file_can_run_code(tmp_path, name, wrap, call):
    """A pickle that asks for anything but a tiktoken encoding is refused by name, and what it asks for is not done."""
    saved(tmp_path)
    bad, path = Touch(tmp_path / "touched", call), tmp_path / name
    content = wrap(bad, chat_rl.byte_tokenizer().encoding, torch.load(tmp_path / "model_000007.pt", weights_only=True))
    if name == "tokenizer.pkl":
        path.write_bytes(content)
        sign(tmp_path, 7)
    else:
        edit_state(tmp_path, lambda state: content)
    assert str(path) in refusal(tmp_path)
    assert not bad.path.exists()
    pickle.loads(pickle.dumps(bad))                # the plain unpickler does it
    assert bad.path.exists()


@pytest.mark.parametrize("content", [b"", b"text", *map(pickle.dumps, [
    {"a": 1}, None, tiktoken.Encoding("e", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={})])])
def test_foreign_tokenizer_is_refused(tmp_path, content):
    """A file that is no encoding with nanochat's special tokens is refused by name."""
    saved(tmp_path)
    (tmp_path / "tokenizer.pkl").write_bytes(content)
    sign(tmp_path, 7)
    assert str(tmp_path / "tokenizer.pkl") in refusal(tmp_path)


def test_failed_write_leaves_the_earlier_file(tmp_path):
    """A write that fails midway raises, and leaves the earlier file as it was and nothing beside it."""
    def failing(file):
        file.write(b"new")
        raise OSError("disk full")

    gpt.write_file(tmp_path / "x", b"old")
    for name in ("x", "y"):
        with pytest.raises(OSError, match="disk full"):
            gpt.write_file(tmp_path / name, failing)
    assert (tmp_path / "x").read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


def test_failed_save_leaves_earlier_checkpoints(tmp_path):
    """A checkpoint whose meta cannot be written is not there, and the one before it still loads; one whose optimizer state
    cannot be written loads, but a run cannot go on from it."""
    model, tokenizer, bad = saved(tmp_path), chat_rl.byte_tokenizer(), lambda: None
    with pytest.raises(TypeError, match="JSON"):
        gpt.save_checkpoint(tmp_path, 9, model, tokenizer, {"model_config": SHAPE, "bad": bad})
    assert gpt.checkpoint_steps(tmp_path) == [7] and gpt.load_checkpoint(tmp_path)[2]["step"] == 7
    with pytest.raises(Exception, match="pickle"):
        gpt.save_checkpoint(tmp_path, 9, model, tokenizer, {"model_config": SHAPE}, training={"bad": bad})
    assert gpt.checkpoint_steps(tmp_path) == [7, 9]
    _, _, meta = gpt.load_checkpoint(tmp_path)
    with pytest.raises(gpt.UserError, match="optim_000009.pt was not written"):
        gpt.load_training(tmp_path, meta, torch.device("cpu"))
    assert not list(tmp_path.glob("*.part"))


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers


@pytest.mark.parametrize("shape", [(64, 64), (128, 32), (32, 128), (2, 12), (1, 24)])
def test_orthogonalize_against_svd(shape):
    """Each matrix keeps its singular vectors, and its singular values, from 1 down to 1/300, go to 0.87 … 1.124."""
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(5, *shape, generator=generator), full_matrices=False)
    s = torch.logspace(0, -2.5, u.size(-1))
    for scale in (1.0, 1e-6, 1e6):
        x = scale * (u * s) @ v
        values = torch.diagonal(u.mT @ gpt.orthogonalize(x) @ v.mT, dim1=-2, dim2=-1)
        torch.testing.assert_close(gpt.orthogonalize(x), (u * values.unsqueeze(-2)) @ v, rtol=0, atol=1e-4)
        assert 0.86 < values.min() and values.max() < 1.13
    assert torch.equal(gpt.orthogonalize(torch.zeros(1, *shape)), torch.zeros(1, *shape))


def test_muon_by_hand():
    """Two steps of Muon are Nesterov momentum 0.95, orthogonalised, scaled by √max(1, rows / columns)."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in [(48, 12), (12, 48), (48, 12)]]
    params = [torch.nn.Parameter(x.clone()) for x in start]
    wanted = [x.double() for x in start]
    muon, averages = gpt.Muon(params, lr=0.1), [torch.zeros_like(x) for x in wanted]
    for _ in range(2):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator)
            averages[i] = 0.95 * averages[i] + 0.05 * p.grad.double()
            u, s, v = torch.linalg.svd(0.05 * p.grad.double() + 0.95 * averages[i], full_matrices=False)
            direction = gpt.orthogonalize((u * s @ v)[None])[0]
            assert (direction - u @ v).norm() < 0.15 * (u @ v).norm()
            wanted[i] -= 0.1 * (2.0 if p.shape == (48, 12) else 1.0) * direction
        muon.step()
    for p, x in zip(params, wanted):
        torch.testing.assert_close(p.detach().double(), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_optimizer_groups_are_nanochats(generation):
    """Every parameter is in exactly one group, at the table's rate and betas, weight decay in the two tables only."""
    model = tiny_model(generation)
    names, s = {id(p): name for name, p in model.named_parameters()}, (64 / 768) ** -0.5
    adamw, muon = gpt.make_optimizers(model, weight_decay=0.1)
    assert isinstance(adamw, torch.optim.AdamW)
    table = [("lm_head.", 0.004 * s, (0.8, 0.96), 0.1), ("transformer.wte.", 0.2 * s, (0.8, 0.995), 0.1),
             ("value_embeds.", 0.1 * s, (0.8, 0.995), 0.0), ("resid_lambdas", 0.005, (0.8, 0.95), 0.0),
             ("x0_lambdas", 0.5, (0.96, 0.95), 0.0), ("smear_", 0.2, (0.8, 0.95), 0.0), ("backout_", 0.2, (0.8, 0.95),
             0.0)]
    grouped = []
    for group in adamw.param_groups:
        for p in group["params"]:
            row, = [row for row in table if names[id(p)].startswith(row[0])]
            assert (group["lr"], group["betas"], group["weight_decay"]) == (pytest.approx(row[1]), *row[2:])
            grouped.append(names[id(p)])
        assert group["eps"] == 1e-10 and group["params"]
    for group in muon.param_groups:
        assert (group["lr"], group["momentum"]) == (0.02, 0.95) and not group.get("weight_decay")
        assert len({p.shape for p in group["params"]}) == 1
        grouped += [names[id(p)] for p in group["params"]]
        assert all(names[id(p)].startswith("transformer.h.") for p in group["params"])
    assert sorted(grouped) == sorted(names.values())
    rates = [group["lr"] for o in gpt.make_optimizers(model, 1.0, 2.0, 3.0) for group in o.param_groups]
    assert {2.0 * s, 1.0 * s, 3.0} <= set(rates)
    decays = {group["weight_decay"] for group in gpt.make_optimizers(model)[0].param_groups}
    assert decays == {0.0}


def test_a_full_gpu_is_blamed_on_no_file():
    """A run that cannot load its checkpoint for want of memory must not take it for damaged and begin anew."""
    with pytest.raises(torch.OutOfMemoryError), gpt.blaming("a file", "copy it"):
        raise torch.OutOfMemoryError("CUDA out of memory")
