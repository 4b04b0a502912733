"""The model: against nanochat's own outputs, its cache against whole forwards, bfloat16 against itself."""

import numpy
import pytest
import torch
from conftest import SHARED, chat, generate, logits_of, policy_of, random_prompts, tiny_model, PROMPT_LENGTHS

import gpt
from reference import WINDOWED, random_state, reference_logits, write_checkpoint

GENERATIONS = list(gpt.GENERATIONS)


@pytest.fixture(scope="module", params=GENERATIONS)
def nanochat(request) -> tuple[gpt.GPT, gpt.Tokenizer, dict]:
    """A checkpoint of nanochat's and what nanochat made of it."""
    folder = SHARED / "fixtures" / "nanochat" / request.param
    if not folder.exists():
        pytest.skip(f"nanochat's reference outputs are not in {folder}")
    model, tokenizer = gpt.load_checkpoint(folder / "chatsft_checkpoints" / "d4")
    return model.float(), tokenizer, torch.load(folder / "reference.pt", weights_only=True)


@pytest.mark.parametrize("chunk", [0, 1, 7], ids=["plain", "cache of ones", "cache of sevens"])
@torch.inference_mode()
def test_logits_are_nanochats(nanochat, chunk):
    """Logits and logprobs are nanochat's to 1e-4, in one forward and through the cache a few tokens at a time."""
    model, _, reference = nanochat
    for prompt, full, logits, logprobs in zip(*(reference[key] for key in ("prompts", "full", "logits", "logp"))):
        if chunk:
            prefix, n = gpt.prefix_of(model, [prompt]), len(prompt)
            cache, rest = gpt.Cache(prefix, 1), torch.tensor([full[n:]])
            parts = [model(rest[:, i:i + chunk], cache) for i in range(0, len(full) - n, chunk)]
            mine, first = logits_of(model, torch.cat([prefix.hidden[:, None], *parts], dim=1))[0], n - 1
        else:
            mine, first = logits_of(model, model(torch.tensor([full]), gpt.Cache()))[0], 0
        torch.testing.assert_close(mine[-len(logits):], logits, rtol=0, atol=1e-4)
        taken = mine[:-1].log_softmax(dim=-1).gather(1, torch.tensor(full[first + 1:])[:, None])[:, 0]
        torch.testing.assert_close(taken, logprobs[first:], rtol=0, atol=1e-4)


def test_greedy_tokens_are_nanochats(nanochat):
    """All prompts in one batch are rendered and continued greedily as nanochat does."""
    model, tokenizer, reference = nanochat
    assert [tokenizer.render(chat(text)) for text in reference["texts"]] == reference["prompts"]
    completions = generate(model, tokenizer, reference["prompts"], 1, len(reference["greedy"][0]), top_k=1)
    assert [group[0].tokens.tolist() for group in completions] == reference["greedy"]
    assert all((group[0].logprobs == 0).all() for group in completions)


@pytest.mark.parametrize("generation", GENERATIONS)
@torch.inference_mode()
def test_cache_with_groups_and_dropped_rows(generation):
    """Rows that share their question's part of the cache get what a whole forward gives, whichever rows were dropped."""
    model, generator = tiny_model(generation), torch.Generator().manual_seed(0)
    assert min(model.config.windows, default=0) < max(PROMPT_LENGTHS)
    for drops in ([[1, 5, 8, 11], [0, 1, 2], [0, 1, 2, 3]],                   # some; a whole group; all but one
                  [[4, 5, 6, 7], [], [7, 6], [0, 2, 4], [0], [1]]):           # the middle group first, then one by one
        rows = [list(prompt) for prompt in random_prompts() for _ in range(4)]
        cache = gpt.Cache(gpt.prefix_of(model, random_prompts()), 4)
        for size, drop in zip([1, 4, 1, 6, 2, 9], [*drops, []]):
            ids = torch.randint(256, (len(rows), size), generator=generator)
            hidden = model(ids, cache)
            rows = [row + new for row, new in zip(rows, ids.tolist())]
            for row, mine in zip(rows, hidden):
                torch.testing.assert_close(mine, model(torch.tensor([row]), gpt.Cache())[0, -size:], rtol=0, atol=2e-5)
            kept = numpy.delete(numpy.arange(len(rows)), drop)
            cache.select(kept)
            assert cache.num_samples == numpy.bincount(cache.groups).max()      # no room for who is gone
            rows = [rows[i] for i in kept]
        assert len(rows) == 1


@pytest.mark.parametrize("offset", [0, 25, 159])
def test_scores_with_an_offset_cost_no_precision(tokenizer, offset):
    """In bfloat16 the sampler's logprobs are the trainer's to its rounding, also where biases of the keys add the same large
    number to all of a query's scores, as Qwen 2.5's do."""
    config = gpt.Config(vocab_size=265, vocab_rows=265, n_layer=6, n_head=4, n_kv_head=2, n_embd=64, head_dim=16, mlp_width=128,
                        max_positions=480, qkv_bias=True)
    model, generator = gpt.GPT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.08, generator=generator) if p.ndim == 2 else p.fill_(1.0 if "norm" in name else 0.0)
        for block in model.transformer.h:          # of the slowest pair of channels, which RoPE hardly turns: q·k = offset · √D
            for bias in (block.attn.c_q.bias, block.attn.c_k.bias):
                bias.view(-1, 16)[:, 7] = (offset * 4) ** 0.5
        model.transformer.wte.weight.normal_(std=1.0, generator=generator)
        model.lm_head.weight.normal_(std=0.3, generator=generator)
    model = model.to(torch.bfloat16)
    prompts, policy = random_prompts((60, 30)), policy_of(model, 1.0, 0)
    groups = generate(model, tokenizer, prompts, 4, 40, top_k=0)
    completions = sum(groups, [])
    prefix = gpt.prefix_of(model, prompts).rows(torch.tensor([0] * 4 + [1] * 4))
    with torch.no_grad():
        trained, _ = gpt.completion_logprobs(model, prefix, completions, policy)
    sampled = torch.cat([torch.from_numpy(c.logprobs) for c in completions])
    assert (trained - sampled).abs().mean() < 0.03


@pytest.mark.parametrize("generation", GENERATIONS)
@torch.inference_mode()
def test_logits_of_each_generation(tmp_path, generation):
    """Logits are those of a plain forward in float64, beyond both windows, to float32's rounding. A bfloat16 model is one to
    its last hidden state; its logits are float32, and as close as that type comes."""
    state = random_state(generation, WINDOWED)
    write_checkpoint(tmp_path / "d4", state, WINDOWED)
    model = gpt.load_checkpoint(tmp_path / "d4")[0]
    ids = torch.randint(265, (160,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = reference_logits({key: x.double() for key, x in state.items()}, WINDOWED, ids)
    assert wanted.shape == (160, 265) and 5 < wanted.abs().max() < 15
    torch.testing.assert_close(logits_of(model, model(torch.tensor([ids]), gpt.Cache()))[0].double(), wanted, rtol=0, atol=5e-5)
    hidden = model.bfloat16()(torch.tensor([ids]), gpt.Cache())[0]
    assert hidden.dtype == torch.bfloat16 and logits_of(model, hidden).dtype == torch.float32
    assert (logits_of(model, hidden) - wanted).norm() < 0.02 * wanted.norm()
