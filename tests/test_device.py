"""A GPU that is none: CPU tensors that claim to be on cuda:0, so that a mistake in placement shows on any machine."""
import linecache
import sys
from collections import Counter
from dataclasses import replace
from typing import Any, Callable, Iterator

import pytest
import torch
from conftest import (ROOT, SHAPE, chat, cpu_learner, example, generate, gradient_of, group_of, policy_of, random_prompts,
                      scripted_model, state_of, tiny_model, weights_of)
from torch import Tensor
from torch.overrides import TorchFunctionMode

import chat_rl
import gpt

GENERATIONS = list(gpt.GENERATIONS)
GPU = "cuda:0"
POLICIES = [(1.0, 50), (0.7, 0), (1.0, 1)]          # temperature and top-k


def learner_of(model: gpt.GPT, dtype: torch.dtype = torch.float32) -> gpt.Learner:
    """On the device where the tests pretend that a GPU is."""
    return gpt.Learner(model, gpt.Ranks(torch.device(GPU)), dtype, chat_rl.Flags())


def groups_of(prompts: list[list[int]], completions: list[list[gpt.Completion]]) -> list[chat_rl.Group]:
    advantages = chat_rl.advantages_of([float(i % 2) for i in range(len(completions[0]))])
    return [group_of(example(i, prompt), rows, advantages)
            for i, (prompt, rows) in enumerate(zip(prompts, completions))]


# The device

ANSWERS = {"device": torch.device("cuda", 0), "is_cuda": True, "is_cpu": False}
WAITS = {"__bool__", "__int__", "__float__", "__index__", "__contains__", "__repr__", "__format__", "item", "tolist",
         "is_nonzero", "equal", "allclose", "nonzero", "argwhere", "masked_select", "bincount", "unique",
         "unique_consecutive"}
PRODUCT = {str(ROOT / name): name for name in ("gpt.py", "chat_rl.py")}


def on_gpu(x: Tensor) -> bool:
    return hasattr(x.untyped_storage(), "on_gpu")   # of the storage, which views, parameters and `.data` share


def tensors(thing: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and slices."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from tensors(part)
    elif isinstance(thing, slice):
        yield from tensors((thing.start, thing.stop, thing.step))


def project_line() -> str:
    """The innermost of the project's lines that are being run."""
    frame = sys._getframe()
    while frame and frame.f_code.co_filename not in PRODUCT:
        frame = frame.f_back
    if not frame:
        return "a test"
    path, number = frame.f_code.co_filename, frame.f_lineno
    return f"{PRODUCT[path]}:{number}: {linecache.getline(path, number).strip()}"


class FakeGPU(TorchFunctionMode):
    """Raises RuntimeError where CUDA does: a tensor of one dimension or more on the CPU meets one on the GPU. Counts by
    line of the project: `waits` of the host for what the GPU has queued, and apart from them `uploads`, which wait too
    where they are not non_blocking (those are not counted). `made` is the bytes of new GPU tensors by type. What C++
    does within one call goes unseen, and torch.load, torch.cuda and collectives do not know of it."""

    def __init__(self):
        super().__init__()
        self.waits, self.uploads, self.made = Counter(), Counter(), Counter()

    def wait(self, times: int = 1) -> None:
        self.waits.update({project_line(): times} if times else {})

    def copy(self, to_gpu: bool) -> None:
        (self.uploads if to_gpu else self.waits)[project_line()] += 1

    def refuse(self, what: str) -> None:
        raise RuntimeError(f"{project_line()}: {what}")

    def index(self, x: Tensor, index: Any, value: Any = None) -> None:
        """x[index], or x[index] = value. CUDA copies CPU indices over, and asks a mask for the number of its ones."""
        index = index if isinstance(index, tuple) else (index,)
        parts, lists = list(tensors(index)), sum(isinstance(i, (list, range)) for i in index)
        fill = value is not None and not (isinstance(value, Tensor) and (value.ndim or on_gpu(value)))     # a number
        if on_gpu(x):
            asked = sum(on_gpu(i) and (not i.ndim or i.dtype == torch.bool and not fill) for i in parts)
            self.wait(lists + asked + sum(bool(i.ndim) and not on_gpu(i) for i in parts))
        elif any(on_gpu(i) and i.ndim for i in parts):
            self.refuse("an index on the GPU into a tensor on the CPU")
        else:
            self.wait(sum(map(on_gpu, parts)))
        if isinstance(value, Tensor) and not fill and on_gpu(value) != on_gpu(x):
            if lists or any(i.ndim for i in parts):
                self.refuse("values on one device for places on another")
            self.copy(on_gpu(x))

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = function.__name__, dict(kwargs or {})
        if name in ("__get__", "__set__"):
            name = f"{name} {getattr(function.__self__, '__name__', '')}"
        if name == "pin_memory":
            return args[0]
        if name == "bmm" and "out_dtype" in kwargs:  # CUDA's alone
            function, kwargs = lambda x, y: x.float() @ y.float(), {}
        if name in ("cpu", "cuda"):
            name, function, args = "to", Tensor.to, (args[0], torch.device(name))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device(kwargs["device"])
        args = [torch.device(x) if name == "to" and isinstance(x, str) else x for x in args]
        inputs, data = list(tensors([args, *kwargs.values()])), args[0] if args else None
        target = next((x.type for x in (*args, kwargs.get("device")) if isinstance(x, torch.device)), None)
        if name == "to" and len(inputs) == 2:       # x.to(y)
            target, inputs = "cuda" if on_gpu(inputs[1]) else "cpu", inputs[:1]
        if name == "tensor" and not isinstance(data, Tensor):
            target = target or "cpu"
        gpu = [x for x in inputs if on_gpu(x)]
        cpu = [x for x in inputs if x.ndim and x.device.type == "cpu" and not on_gpu(x)]

        if gpu and name.startswith("__get__ ") and name[8:] in ANSWERS:
            return ANSWERS[name[8:]]
        if name in ("__getitem__", "__setitem__"):
            self.index(*args)
        elif name == "copy_":
            if on_gpu(data) != on_gpu(args[1]):
                self.copy(on_gpu(data))
        elif gpu and cpu and name not in ("__set__ data", "_has_compatible_shallow_copy_type"):
            self.refuse(f"{name} of {[*gpu[0].shape]} on the GPU with {[*cpu[0].shape]} on the CPU")
        elif gpu and name in ("numpy", "__array__"):
            self.refuse("no NumPy on the GPU")
        elif (gpu or target == "cuda") and kwargs.get("generator"):
            self.refuse("random numbers of the CPU's for the GPU")
        elif gpu and target == "cpu" and not name.startswith("new_") and not name.endswith("_like"):
            self.wait()
        elif gpu and name == "repeat_interleave":
            self.wait("output_size" not in kwargs and not isinstance([*args, kwargs.get("repeats")][1], int))
        elif gpu and (name in WAITS or name == "where" and len(args) == 1):
            self.wait()
        elif not gpu and target == "cuda" and name in ("to", "tensor", "as_tensor") and not kwargs.get("non_blocking"):
            self.copy(to_gpu=True)

        def here(x: Any) -> Any:
            return torch.device("cpu") if isinstance(x, torch.device) and x.type == "cuda" else x

        result = function(*map(here, args), **{key: here(x) for key, x in kwargs.items()})
        before = [x.untyped_storage() for x in inputs]
        if name in ("to", "as_tensor") and target in ("cpu", "cuda") and on_gpu(result) != (target == "cuda"):
            result = result.clone() if result.untyped_storage() in before else result     # it would have moved: a copy
        for x in tensors(result) if target == "cuda" or gpu and not target else ():
            storage = x.untyped_storage()
            if not on_gpu(x) and storage not in before:
                storage.on_gpu = True
                self.made[x.dtype] += storage.nbytes()
        return result


# It is like a GPU


MISTAKES = {
    "mask": lambda x, y: x.masked_fill(y > 0, 0.0),
    "operand": lambda x, y: x + y,
    "index into the CPU": lambda x, y: y[x.long()],
    "values": lambda x, y: x.__setitem__(x.long(), y),
    "gradient": lambda x, y: torch.autograd.backward([x.requires_grad_() * 1], [y]),
    "numpy": lambda x, y: x.numpy(),
    "random numbers": lambda x, y: x.normal_(generator=torch.Generator())}
if torch.__version__ < "2.11":                      # torch 2.10 itself takes it
    del MISTAKES["gradient"]
COSTS = {                                           # waits and uploads
    (0, 0): [lambda x, y: x + y.sum(), lambda x, y: x[x.long()], lambda x, y: x.__setitem__(x > 0, 1.0), lambda x, y: x.repeat_interleave(2),
             lambda x, y: y.tolist(), lambda x, y: y.pin_memory().to(GPU, non_blocking=True) + x],
    (1, 0): [lambda x, y: x.tolist(), lambda x, y: x.cpu() + y, lambda x, y: bool(x.sum()), lambda x, y: f"{x}", lambda x, y: x.nonzero(),
             lambda x, y: x[x > 0], lambda x, y: x[y.long()], lambda x, y: x[[0, 1]], lambda x, y: y.copy_(x), lambda x, y: y[:x[1].long()],
             lambda x, y: y.__setitem__(slice(3), x), lambda x, y: x.repeat_interleave(x.long())],
    (0, 1): [lambda x, y: torch.tensor([1.0, 2.0, 3.0], device=GPU) + x, lambda x, y: y.to(x) + x, lambda x, y: y.cuda() + x,
             lambda x, y: torch.as_tensor(y, device=GPU) + x, lambda x, y: x.copy_(y), lambda x, y: x.__setitem__(slice(3), y)]}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mixing_is_refused(mistake):
    with FakeGPU(), pytest.raises(RuntimeError, match="^a test: .*(GPU|device)"):
        mistake(torch.arange(3.0, device=GPU), torch.ones(3))


def test_costs_are_counted():
    """What is free, what waits and what uploads; and each result is where it should be."""
    for cost, calls in COSTS.items():
        for i, call in enumerate(calls):
            with FakeGPU() as device:
                x, y = torch.arange(3.0, device=GPU), torch.zeros(3)
                call(x, y)
                assert (device.waits.total(), device.uploads.total()) == cost, (cost, i)
                assert x.is_cuda and x.device == torch.device(GPU) and y.device.type == "cpu" and not y.is_cuda


# The project on it


def talkative(generation: str = "current") -> gpt.GPT:
    """A model whose answers end here and there, so that rows are dropped at many a position."""
    model = tiny_model(generation)
    model.lm_head.weight.data[chat_rl.byte_tokenizer().assistant_end] *= 4
    return model


@pytest.mark.parametrize("generation, temperature, top_k", [
    *((generation, 1.0, 50) for generation in GENERATIONS), ("current", 0.7, 0), ("current", 1.0, 1)])
def test_sampling(tokenizer, generation, temperature, top_k):
    """Prompts of several lengths, rows that stop and are dropped: what a CPU samples, and nothing is mixed."""
    model, prompts = talkative(generation), random_prompts()
    expected = generate(model, tokenizer, prompts, 8, 10, temperature, top_k)
    with FakeGPU():
        completions = generate(model.to(GPU), tokenizer, prompts, 8, 10, temperature, top_k)
    lengths = {len(c.tokens) for group in completions for c in group}
    for mine, other in zip(sum(completions, []), sum(expected, []), strict=True):
        assert mine.tokens.tolist() == other.tokens.tolist() and mine.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    assert len(lengths) > 1


@pytest.mark.parametrize("kind", ["plain", "dropping", "calling"])
def test_one_wait_per_position(tokenizer, kind):
    """And one at the end, however many rows are dropped and whatever the calculator is asked."""
    t, one, plus = tokenizer, *b"1+"
    script = {t.assistant_start: [t.python_start], t.python_start: [one], one: [plus, t.python_end], plus: [one],
              t.output_end: [t.python_start, t.assistant_end]}
    model = {"plain": scripted_model({}, ord("a")), "dropping": talkative(), "calling": scripted_model(script, t.assistant_end)}[kind]
    with FakeGPU() as device:
        model.to(GPU)
        device.uploads.clear()
        group, = generate(model, t, [t.render(chat("?"))], 80, 40)
    positions, lengths = max(len(c.tokens) for c in group), {len(c.tokens) for c in group}
    calls = sum(c.tokens.tolist().count(t.output_end) for c in group)
    assert {"plain": lengths == {40}, "dropping": len(lengths) > 10, "calling": calls > 100}[kind]
    assert positions <= device.waits.total() <= positions + 1, device.waits.most_common()
    assert kind != "plain" or device.uploads.total() <= 10, device.uploads.most_common()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_update(tokenizer, generation):
    """The gradient is a CPU's, and the optimizers run, again and without a wait but for the norm's."""
    prompts, model = random_prompts(), talkative(generation)
    completions = generate(model, tokenizer, prompts, 4, 8)
    completions[0][1].sampled[:2] = False
    groups, flags, reference = groups_of(prompts, completions), chat_rl.Flags(), cpu_learner(talkative(generation))
    chat_rl.backward(reference.model, groups, policy_of(model), flags)
    with FakeGPU() as device:
        learner = learner_of(model)
        chat_rl.backward(learner.model, groups, policy_of(model), flags)
        torch.testing.assert_close(gradient_of(learner.model).cpu(), gradient_of(reference.model))
        before = weights_of(learner.model).cpu()
        device.waits.clear(), device.uploads.clear()
        learner.update(7.0)
        learner.update(7.0, 0.5, 0.1)
        assert device.waits.total() <= 2 and not device.uploads, (device.waits.most_common(), device.uploads.most_common())
        assert all(p.is_cuda for p in learner.model.parameters()) and not torch.equal(weights_of(learner.model).cpu(), before)


def test_bfloat16_weights_with_float32_masters(tokenizer):
    """Nothing of the model's size is made in float32 but gradients, masters and averages, all at once and once."""
    model = tiny_model()
    size = sum(p.numel() for p in model.parameters())
    with FakeGPU() as device:
        learner = learner_of(model, torch.bfloat16)
        assert {p.dtype for p in learner.model.parameters()} == {torch.bfloat16}
        assert device.made[torch.float32] < 4 * 5.5 * size and device.made[torch.bfloat16] < 2 * 1.5 * size, device.made
        device.made.clear()
        completions = generate(learner.model, tokenizer, random_prompts(), 3, 4)
        assert device.made[torch.float32] < 4 * size
        chat_rl.backward(learner.model, groups_of(random_prompts(), completions), policy_of(model), chat_rl.Flags())
        assert gradient_of(learner.model).norm() > 0 and learner.update(1.0) > 0


def test_adapters_are_merged_on_the_host():
    """What is saved of a base on the device and of masters on the host."""
    config = replace(gpt.nanochat_config("current", **SHAPE, vocab_rows=320), lora_rank=2)
    model = gpt.build(config, {name: x.data for name, x in tiny_model().named_parameters()})
    with FakeGPU():
        learner = learner_of(model)
        for x in state_of(learner, "masters"):
            x.fill_(0.1)
        state = {**learner.model.state_dict(), **learner.save_state()["masters"]}
        merged = gpt.merge(learner.model, state)
    name = "transformer.h.0.attn.c_q.weight"
    torch.testing.assert_close(merged[name], state[name].cpu() + 16 * 2 * 0.01)
