"""What learns: Muon and AdamW by hand, and weights, masters and averages that are held once over all ranks."""
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import cpu_learner, distance, on_ranks, state_of, tiny_model, weights_of

import chat_rl
import gpt


class Rates(NamedTuple):
    embedding_lr: float = 0.2
    unembedding_lr: float = 0.004
    matrix_lr: float = 0.02
    weight_decay: float = 0.0


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
    for shape, scale in (((2, 48, 12), 2.0), ((1, 12, 48), 1.0)):
        p, average = torch.randn(shape, generator=generator), torch.zeros(shape)
        wanted, mean = p.double(), average.double()
        for _ in range(2):
            g = torch.randn(shape, generator=generator)
            gpt.muon(p, g, average, 0.1)
            mean = 0.95 * mean + 0.05 * g.double()
            u, s, v = torch.linalg.svd(0.05 * g.double() + 0.95 * mean, full_matrices=False)
            direction = gpt.orthogonalize(u * s.unsqueeze(1) @ v)
            assert (direction - u @ v).norm() < 0.15 * (u @ v).norm()
            wanted -= 0.1 * scale * direction
        torch.testing.assert_close(p.double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("generation", gpt.GENERATIONS)
def test_recipes_are_nanochats(generation):
    """Every parameter learns at the table's rate and betas, with weight decay in the two tables only; matrices with Muon."""
    model, s = tiny_model(generation), (64 / 768) ** -0.5
    table = [("lm_head.", 0.004 * s, (0.8, 0.96), 0.1), ("transformer.wte.", 0.2 * s, (0.8, 0.995), 0.1),
             ("value_embeds.", 0.1 * s, (0.8, 0.995), 0.0), ("resid_lambdas", 0.005, (0.8, 0.95), 0.0),
             ("x0_lambdas", 0.5, (0.96, 0.95), 0.0), ("smear_", 0.2, (0.8, 0.95), 0.0), ("backout_", 0.2, (0.8, 0.95), 0.0)]
    for name, p in model.named_parameters():
        recipe = gpt.recipe_of(name, p.shape, model.config, Rates(weight_decay=0.1))
        if name.startswith("transformer.h."):
            assert (recipe.lr, recipe.muon, recipe.weight_decay) == (0.02, True, 0)
            continue
        row, = [row for row in table if name.startswith(row[0])]
        assert recipe == (False, pytest.approx(row[1]), *row[2], 1e-10, row[3])


@pytest.mark.parametrize("rank", [0, 4])
def test_recipes_of_other_models(rank):
    """AdamW throughout, matrices and adapters at the matrices' rate, norms and biases at the embedding's."""
    config = gpt.Config(65, 65, 2, 2, 1, 32, 16, 64, 99, qkv_bias=True, lora_rank=rank)
    model, rates = gpt.GPT(config), Rates(1.0, 2.0, 3.0, 0.5)
    for name, p in model.named_parameters():
        recipe = gpt.recipe_of(name, p.shape, config, rates)
        wanted = 2.0 if "lm_head" in name else 3.0 if p.ndim == 2 and "wte" not in name else 1.0
        assert recipe[:5] == (False, wanted, 0.9, 0.95, 1e-8)
        assert recipe.weight_decay == (0.5 if "lm_head" in name or "wte" in name else 0)
        assert p.requires_grad == ("lora_" in name or not rank)


def gradients(learner: gpt.Learner, seed: int) -> None:
    """The same for every parameter, wherever it lies."""
    for i, p in enumerate(p for p in learner.model.parameters() if p.requires_grad):
        p.grad.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + i)))


def models(kind: str) -> gpt.GPT:
    if kind == "nanochat":
        return tiny_model()
    config = gpt.Config(65, 65, 2, 2, 1, 32, 16, 64, 99, tied=True, qkv_bias=True, lora_rank=4 * (kind == "adapters"))
    model = gpt.GPT(config)
    for i, p in enumerate(model.parameters()):
        p.data.normal_(std=0.2, generator=torch.Generator().manual_seed(i))
    return model


def learn(ranks: gpt.Ranks, kind: str, dtype: torch.dtype, folder: Path, begin: int, end: int) -> None:
    """Three updates of each rank's gradient, from what is saved if there is any; rank 0 saves the end."""
    model = models(kind) if ranks.rank == 0 else None
    learner, path = gpt.Learner(model, ranks, dtype, Rates(0.1, 0.1, 0.1, 0.1)), folder / "state.pt"
    if begin:
        learner.load_state(torch.load(path) if ranks.rank == 0 else {})
    for i in range(begin, end):
        gradients(learner, i)
        for shard in learner.shards.values():
            shard.p.grad /= ranks.size
        learner.update(2.0, 0.5, 3.0)
    state = learner.save_state()
    sizes = ranks.all_gather(sum(x.nbytes for x in state_of(learner, "masters", "exp_avg", "exp_avg_sq")))
    if ranks.rank == 0:
        torch.save(state, path)
        torch.save({"weights": {name: x.clone() for name, x in learner.model.state_dict().items()}, "sizes": sizes},
                   folder / "end.pt")


@pytest.mark.parametrize("kind", ["nanochat", "huggingface", "adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_ranks_is_one(tmp_path, kind, dtype):
    """On 1 rank, on 2, and on 4 after a stop on 2, the same weights come out to rounding; after a stop on as many, bit for bit.
    The ranks' shares of masters and averages add up to those of one."""
    def end_of(name: str, size: int, *steps: int) -> dict:
        (tmp_path / name).mkdir(exist_ok=True)
        on_ranks(size, learn, kind, dtype, tmp_path / name, *steps)
        return torch.load(tmp_path / name / "end.pt")

    one, two, _ = end_of("one", 1, 0, 4), end_of("two", 2, 0, 4), end_of("stopped", 2, 0, 2)
    shutil.copytree(tmp_path / "stopped", tmp_path / "moved")
    resumed, moved = end_of("stopped", 2, 2, 4), end_of("moved", 4, 2, 4)
    start = models(kind).state_dict()
    for name, x in one["weights"].items():
        assert x.dtype == dtype and torch.equal(resumed["weights"][name], two["weights"][name])
        for other in (two, moved):
            close = dict(rtol=0, atol=2e-5) if dtype == torch.float32 else dict(rtol=0.01, atol=2e-3)
            torch.testing.assert_close(other["weights"][name], x, **close)
        assert torch.equal(x, start[name].to(dtype)) == ("lora_" not in name and kind == "adapters")
    for found in (two, moved):
        shares = found["sizes"]
        assert sum(shares) == one["sizes"][0] and max(shares) < 1.1 * sum(shares) / len(shares)


def test_masters_remember_what_bfloat16_forgets():
    """Steps too small for bfloat16 add up."""
    model = models("huggingface")
    start = weights_of(model)
    learner = gpt.Learner(model, gpt.Ranks(torch.device("cpu")), torch.bfloat16, Rates(1e-5, 1e-5, 1e-5))
    for _ in range(200):
        for p in learner.model.parameters():
            p.grad.fill_(1.0)
        learner.update(1.0)
    assert distance(weights_of(learner.model), start - 200e-5) < 2e-3
    assert {p.grad.dtype for p in learner.model.parameters()} == {torch.float32}
    state = learner.save_state()
    del state["masters"]["transformer.wte.weight"]
    with pytest.raises(KeyError, match="wte"):              # what is missing is not zeros
        learner.load_state(state)


def test_an_evaluation_holds_the_weights_alone():
    learner = gpt.Learner(tiny_model(), gpt.Ranks(torch.device("cpu")), torch.float32, None)
    assert not learner.shards and all(p.grad is None for p in learner.model.parameters())
    assert torch.equal(weights_of(learner.model), weights_of(tiny_model()))


def test_flags_reach_the_learner():
    for steps, recompute in ((0, False), (1, True)):
        run = SimpleNamespace(flags=chat_rl.Flags(recompute=recompute), num_steps=steps, step=0)
        learner = chat_rl.make_learner(run, tiny_model(), {}, gpt.Ranks(torch.device("cpu")))
        assert (bool(learner.shards), learner.model.recompute) == (steps > 0, recompute)


def test_what_is_not_finite_is_left_out():
    learner = cpu_learner(tiny_model())
    start = weights_of(learner.model)
    gradients(learner, 0)
    learner.model.lm_head.weight.grad[0, 0] = float("nan")
    assert not learner.update(1.0) < 1e9 and torch.equal(weights_of(learner.model), start)
    gradients(learner, 0)
    assert learner.update(1.0) > 0 and learner.updates == 1 and not torch.equal(weights_of(learner.model), start)
