"""The sampler and the policy: against one row at a time written out, and each random number in its place."""
import math

import numpy
import pytest
import torch
from conftest import PROMPT_LENGTHS, SHAPE, completion, generate, random_prompts, scripted_model, tiny_model

import gpt

GENERATIONS = list(gpt.GENERATIONS)


@torch.inference_mode()
def plain_completion(model, tokenizer, prompt, key, sample, max_new_tokens, temperature, top_k, seed) -> gpt.Completion:
    """One row alone: the whole of it forward at each token, the distribution written out in float64."""
    tokens, mask, logprobs, forced = [], [], [], []
    numbers = gpt.uniforms(seed, key, sample, numpy.arange(max_new_tokens)).tolist()
    for t in range(max_new_tokens):
        raw = model.lm_head(model(torch.tensor([prompt + tokens]), gpt.Cache())[0, -1:])[0, :model.config.vocab_size].double()
        scores, ids = (15 * torch.tanh(raw / 15)).tolist(), list(range(len(raw)))
        if top_k:
            ids = sorted(ids, key=lambda i: -scores[i])[:top_k]
        weights = [math.exp(scores[i] / temperature) for i in ids]
        aim, reach = numbers[t] * sum(weights), 0.0
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
    return completion(tokens, mask, logprobs)


def assert_same(mine: gpt.Completion, other: gpt.Completion) -> None:
    assert mine.tokens.tolist() == other.tokens.tolist() and mine.sampled.tolist() == other.sampled.tolist()
    assert mine.logprobs == pytest.approx(other.logprobs, rel=0, abs=1e-5)


@pytest.mark.parametrize("generation, temperature, top_k", [
    *((generation, 1.0, 50) for generation in GENERATIONS),
    *(("current", *policy) for policy in [(1.0, 0), (0.5, 50), (2.0, 5), (0.7, 0), (1.3, 1000), (1.0, 1), (0.5, 1)])])
def test_generate_is_plain_sampling(tokenizer, generation, temperature, top_k):
    """All prompts in one batch give the tokens and logprobs that one row at a time gives, without a cache. Progress counts the
    completions."""
    model, prompts, ended = tiny_model(generation), random_prompts(), []
    model.lm_head.weight.data[tokenizer.assistant_end] *= 3            # so that rows stop at many places and are dropped
    groups = generate(model, tokenizer, prompts, 4, 24, temperature, top_k, seed=(5,), streams=[7, 8, 2 ** 40], progress=ended.append)
    assert sum(ended) == 12
    assert top_k == 1 or len({len(c.tokens) for group in groups for c in group}) > 2
    for prompt, key, group in zip(prompts, [7, 8, 2 ** 40], groups):
        for sample, mine in enumerate(group):
            assert_same(mine, plain_completion(model, tokenizer, prompt, key, sample, 24, temperature, top_k, 5))


def test_completions_depend_on_nothing_in_their_batch(tokenizer):
    """A completion is the same alone, beside other prompts, by its key in any place, and with fewer samples."""
    model, prompts = tiny_model(), random_prompts((3, 70, 21, 40, 9))
    model.lm_head.weight.data[tokenizer.assistant_end] *= 3
    together = generate(model, tokenizer, prompts, 5, 20, seed=(3, 1))
    for i, prompt in enumerate(prompts):
        alone, = generate(model, tokenizer, [prompt], 5, 20, seed=(3, 1), streams=[i])
        fewer, = generate(model, tokenizer, [prompt], 2, 20, seed=(3, 1), streams=[i])
        for mine, other in zip([*together[i], *together[i][:2]], [*alone, *fewer], strict=True):
            assert_same(mine, other)
    turned = generate(model, tokenizer, prompts[::-1], 5, 20, seed=(3, 1), streams=[4, 3, 2, 1, 0])
    for mine, other in zip(sum(together, []), sum(turned[::-1], []), strict=True):
        assert_same(mine, other)
    longer = generate(model, tokenizer, prompts, 5, 30, seed=(3, 1))
    assert [c.tokens.tolist() for c in sum(together, [])] == [c.tokens[:20].tolist() for c in sum(longer, [])]


@pytest.mark.parametrize("top_k", [0, 50])
def test_a_greedy_sample_stands_beside_the_drawn_ones(tokenizer, top_k):
    """The last of each is what top-k 1 gives, the others are what they were."""
    model, prompts = tiny_model(), random_prompts()
    both = generate(model, tokenizer, prompts, 4, 20, 1.3, top_k, greedy=True)
    drawn, likeliest = generate(model, tokenizer, prompts, 3, 20, 1.3, top_k), generate(model, tokenizer, prompts, 1, 20, top_k=1)
    for together, *apart in zip(both, drawn, likeliest, strict=True):
        assert [c.tokens.tolist() for c in together] == [c.tokens.tolist() for c in sum(apart, [])]


def test_the_smallest_and_the_largest_number_draw_what_can_be_drawn():
    """No number is 0 or 1, which would draw a token of no probability: the ends of 2^26 numbers, among which every value of
    the grid is to be expected eight times."""
    numbers = [[x.min(), x.max()] for x in (gpt.uniforms(i, numpy.arange(2 ** 22)) for i in range(16))]
    numbers = numpy.array([min(numbers)[0], max(high for _, high in numbers)])
    assert 0 < numbers[0] < 2 ** -23 and 1 - 2 ** -23 < numbers[1] < 1
    logits = torch.tensor([-1e4, 0.0, 0.0, -1e4]).expand(2, -1)
    assert gpt.Policy(1.0, 0).draw(logits, torch.from_numpy(numbers))[0].tolist() == [1, 2]


def test_uniform_numbers():
    """Numbers are uniform between 0 and 1 along every counter, never 0 or 1, the same for any size, and alike for no two."""
    n, seen = 2 ** 11, []
    for place in range(4):
        counters = [numpy.arange(n) if at == place else numpy.array(3) for at in range(4)]
        streams = numpy.stack([gpt.uniforms(*counters, position) for position in range(3)], axis=1)
        alone = gpt.uniforms(*(5 if at == place else 3 for at in range(4)), numpy.arange(2))
        assert streams[5][:2].tolist() == alone.tolist()
        for x in numpy.array(streams).T.astype(float):
            ends = numpy.stack([numpy.arange(n), numpy.arange(1, n + 1)]) / n
            assert 0 < x.min() and x.max() < 1
            assert abs(numpy.sort(x) - ends).max() < 1.63 / math.sqrt(n)       # Kolmogorov and Smirnov's bound at 1 %
            assert abs(numpy.corrcoef(x[1:], x[:-1])[0, 1]) < 0.07
        seen += [stream[0] for i, stream in enumerate(streams) if i != 3]
    assert len(set(seen)) > 0.99 * len(seen)


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (1.0, 50), (0.6, 7), (1.7, 1), (1.0, 265), (1.0, 1000)])
def test_policy_logprobs_are_those_drawn_from(temperature, top_k):
    """The loss's logprobs are the log-softmax over the top k at temperature, and equal the sampler's."""
    raw = torch.randn(50, 265, generator=torch.Generator().manual_seed(0)) * 10
    policy = gpt.Policy(temperature, top_k, softcap=15.0)
    tokens, logprobs, _ = policy.draw(raw, torch.rand(50, generator=torch.Generator().manual_seed(1)))
    tokens = tokens.long()
    scores = 15 * torch.tanh(raw / 15) / temperature
    if 0 < top_k < 265:
        scores[raw < raw.sort(descending=True).values[:, top_k - 1:top_k]] = -torch.inf
    mine = policy.logprobs(raw, tokens)
    torch.testing.assert_close(mine, scores.log_softmax(dim=-1)[torch.arange(50), tokens], rtol=0, atol=1e-5)
    torch.testing.assert_close(mine, logprobs, rtol=0, atol=1e-5)


def test_token_outside_the_top_k_counts_as_inside():
    """A token that rounding pushed past rank k takes the k-th place: a logprob like its, a finite gradient."""
    raw = torch.tensor([[5.0, 4.0, 3.0, 3.0 - 1e-6, -2.0]], requires_grad=True)
    just_inside, just_outside, far_outside = (gpt.Policy(1.0, 3, 15.0).logprobs(raw, torch.tensor([i])) for i in (2, 3, 4))
    assert just_outside.item() == pytest.approx(just_inside.item(), abs=1e-5)
    scores = 15 * torch.tanh(raw.detach()[0] / 15)
    assert far_outside.item() == pytest.approx(scores[[0, 1, 4]].log_softmax(dim=-1)[2].item(), abs=1e-5)
    gradient, = torch.autograd.grad((just_outside + far_outside).sum(), raw)
    assert gradient.isfinite().all() and gradient[0, 3] > 0 and gradient[0, 4] > 0 and gradient[0, 2] == 0
    assert gpt.Policy(1.0, 1, 15.0).logprobs(raw, torch.tensor([4])).item() == 0.0     # k = 1: all that there is to choose from
    tied = torch.tensor([[3.0, 2.0, 1.0, 1.0]], requires_grad=True)          # of two that are equal either may be inside
    grads = torch.cat([torch.autograd.grad(gpt.Policy(1.0, 3).logprobs(tied, torch.tensor([i])).sum(), tied)[0] for i in (2, 3)])
    p = torch.tensor([3.0, 2.0, 1.0]).softmax(dim=0)
    torch.testing.assert_close(grads, torch.stack([torch.stack([-p[0], -p[1], 1 - p[2], 0 * p[0]]), torch.stack([-p[0], -p[1], 0 * p[0], 1 - p[2]])]))


def test_stopped_rows_stop_costing(tokenizer):
    """No more rows run at a position than go on after it, but for one in four; questions run once, not once per row."""
    model, shapes = tiny_model(), []
    model.lm_head.weight.data[tokenizer.assistant_end] *= 3
    model.register_forward_pre_hook(lambda model, args: shapes.append(tuple(args[0].shape)))
    groups = generate(model, tokenizer, random_prompts(), 30, 20)
    lengths = [len(c.tokens) for group in groups for c in group]
    assert shapes[0] == (3, max(PROMPT_LENGTHS)) and len(shapes) == max(lengths)
    for t, (rows, width) in enumerate(shapes[1:]):
        assert width == 1 and rows * 0.75 < sum(length > t + 1 for length in lengths) <= rows
    assert shapes[-1][0] < 60


def test_generate_refuses_positions_beyond_the_last(tokenizer):
    """sequence_len positions are there; one more is an error rather than nonsense."""
    model, prompt = gpt.GPT(gpt.nanochat_config("current", **SHAPE, vocab_rows=320)).init_weights(0), random_prompts((38,))[0]
    assert len(generate(model, tokenizer, [prompt], 1, 10, top_k=1)[0][0].tokens) <= 10
    with pytest.raises(ValueError, match="48"):
        generate(model, tokenizer, [prompt], 1, 11)


def test_the_cache_grows_with_what_is_said(tokenizer, monkeypatch):
    """A limit of 300 tokens costs no room where rows end early; where they do not, the cache has grown to what they said."""
    rooms, append = [], gpt.Cache.append

    def note(cache, layer, new):
        own = append(cache, layer, new)
        rooms.append(cache.own[layer].size(3))
        return own

    monkeypatch.setattr(gpt.Cache, "append", note)
    for default, least, most in ((ord("a"), 300, 400), (tokenizer.assistant_end, 0, 64)):
        rooms.clear()
        groups = generate(scripted_model({256: [ord("a")]}, default), tokenizer, [[256]] * 2, 2, 300)
        assert (max(len(c.tokens) for c in sum(groups, [])) == 300) == (least == 300) and least <= max(rooms) <= most


@pytest.mark.parametrize("all_of_them", [True, False], ids=["top_k 0", "top_k"])
def test_draw_scales_by_the_total(all_of_them):
    """Probabilities add up to a little more or less than 1: the largest number still draws a token that has some, and the
    last of those."""
    totals = []
    for n in range(1001, 2001, 40):
        logits = torch.cat([torch.zeros(n), torch.full((3,), -1e4)]).unsqueeze(0)          # the last three never
        token, logprob = gpt.Policy(1.0, 0 if all_of_them else n + 3).draw(logits, torch.tensor([1 - 2 ** -24]))[:2]
        totals.append(float(logprob.double().exp()) * n)
        assert logprob.item() == pytest.approx(-math.log(n), abs=1e-5), n
        assert token.item() == n - 1 or not all_of_them
    assert min(totals) < 1 - 2 ** -24
