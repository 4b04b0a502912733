"""Whole runs of chat_rl.py: what they write, what changes nothing in them, and what they refuse."""
import json
import math
import os
import pickle
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import matplotlib.image
import pytest
import tiktoken
import torch
from conftest import ROOT, SMALL, chat, copies, main, metrics, run, run_alone, samples, untimed, weights

import chat_rl
import gpt

# Some groups of every step have something to learn.
LIVELY = [*SMALL, "--examples-per-step=16", "--num-samples=12", "--eval-examples=7"]


# ----------------------------------------------------------------------------------------------------------------------
# What a run gives


def test_same_completions_in_any_batch_and_on_any_ranks(base):
    """1, 7 or all rows at once, on 1 rank or on 2 with an odd number of questions, sample the same completions in training
    and evaluation."""
    sizes = {"one": 1, "seven": 7, "all": 10_000, "ranks": 7}
    copies(base, *sizes)
    for tag, size in sizes.items():
        flags = [*LIVELY, f"--model-tag={tag}", f"--rollout-batch-size={size}", "--device-batch-size=5", "--max-steps=2",
                 "--examples-per-step=15"]
        if tag == "ranks":
            run(base, *flags, ranks=2)
        else:
            assert main(base, *flags) == 0
    whole = metrics(base, "all")
    assert len(whole) == 4 and sum(line.get("grad_norm", 0) > 0 for line in whole) == 2
    for tag in sizes:
        for step in (0, 2):
            assert samples(base, step, tag) == samples(base, step, "all")
        for mine, other in zip(metrics(base, tag), whole, strict=True):
            assert untimed(mine) == pytest.approx(untimed(other), rel=1e-4, abs=1e-5)
            for key in ("reward", "completion_length", "truncated", "all_wrong", "pass@1", "pass@5", "greedy"):
                assert mine.get(key) == other.get(key)


STEP_KEYS = ["step", "reward", "all_right", "all_wrong", "completion_length", "truncated", "entropy", "grader_timeouts",
             "grad_norm", "advantage_tokens", "updates_left_out", "sampler_gap", "ratio_max", "approx_kl",
             "clip_fraction", "lr_fraction", "rollout_seconds", "update_seconds", "tokens_per_second"]


def test_what_a_run_writes(base, capfd, pictures):
    """Checkpoints that load here, with the SFT checkpoint's keys, shapes and types, metrics, samples and a curve."""
    model, tokenizer = gpt.load_checkpoint(base / "chatsft_checkpoints" / "adder")
    model.stored_types = {key: torch.bfloat16 for key in model.state_dict() if "wte" in key or "value_embeds" in key}
    gpt.save_checkpoint(base / "chatsft_checkpoints" / "gpu", 5, model, model.state_dict(), tokenizer)
    flags = ["--model-tag=gpu", "--max-steps=4", "--save-every=3", "--eval-every=2", "--eval-samples=4"]
    assert main(base, *LIVELY, *flags) == 0
    printed, out = capfd.readouterr().out, base / "chatrl_checkpoints" / "gpu"
    saved = {name.format(step) for step in (3, 4)
             for name in ("model_00000{}.pt", "meta_00000{}.json", "optim_00000{}.pt")}
    assert {path.name for path in out.iterdir()} == saved | {
        "tokenizer.pkl", "metrics.jsonl", "curve.png", "run.json", "chat_rl.py", "gpt.py",
        *(f"samples_00000{step}.jsonl" for step in (0, 2, 4)), *(f"samples_00000{step}_train.jsonl" for step in (0, 2))}
    assert (out / "chat_rl.py").read_text() == (ROOT / "chat_rl.py").read_text()
    assert json.loads((out / "run.json").read_text())["flags"]["max_steps"] == 4
    assert matplotlib.image.imread(out / "curve.png").std() > 0
    assert "before " in printed and "after " in printed and str(out) in printed

    lines = metrics(base, "gpu")
    assert [("reward" in line, line["step"]) for line in lines] == [
        (False, 0), (True, 0), (True, 1), (False, 2), (True, 2), (True, 3), (False, 4)]
    steps = [line for line in lines if "reward" in line]
    assert all(sorted(line) == sorted(STEP_KEYS) for line in steps)
    assert [line["lr_fraction"] for line in steps] == [0.02 * x for x in (1.0, 0.75, 0.5, 0.25)]
    for line in steps:
        assert line["sampler_gap"] < 1e-5 and line["entropy"] > 0
        assert 0 <= line["truncated"] <= 1 <= line["completion_length"] <= 6
        assert 0 <= line["reward"] <= 1 and line["all_right"] + line["all_wrong"] < 1 and line["grad_norm"] > 0
    for line in lines:
        if "greedy" in line:
            rows = samples(base, line["step"], "gpu")
            assert [sorted(row) for row in rows] == [["completions", "data", "question", "reference", "rewards", "scores"]] * 7
            assert all(len(row["completions"]) == 4 and row["rewards"] == row["scores"] for row in rows)
            right = [row["completions"].count(row["reference"]) for row in rows]
            assert right == [sum(row["rewards"]) for row in rows]
            for k in range(1, 5):
                scores = [chat_rl.pass_at_k(4, n, k) for n in right]
                expected = statistics.mean(scores), statistics.stdev(scores) / len(scores) ** 0.5
                assert (line[f"pass@{k}"], line[f"pass@{k}_error"]) == pytest.approx(expected)
            assert "pass@5" not in line and "greedy_error" in line

    first = torch.load(base / "chatsft_checkpoints" / "gpu" / "model_000005.pt", weights_only=True)
    last = weights(base, 4, "gpu")
    assert [(key, x.dtype, x.shape) for key, x in first.items()] == [(key, x.dtype, x.shape) for key, x in last.items()]
    assert first["transformer.wte.weight"].dtype == torch.bfloat16
    assert not torch.equal(first["lm_head.weight"], last["lm_head.weight"])
    for step in (3, 4):
        again = gpt.load_checkpoint(out, step)[1]
        assert again.render(chat("1 + 1")) == tokenizer.render(chat("1 + 1"))
    assert json.loads((out / "meta_000004.json").read_text())["model_config"] == model.raw_config


EVALUATION = "evaluations/adder"


def test_a_second_run_keeps_the_first(base, capfd):
    """The earlier folder is moved to previous/<tag>-<time>, and said so; the first evaluation is the same every time."""
    out = base / "chatrl_checkpoints"
    assert main(base, *SMALL, "--max-steps=1") == 0
    assert {path.name for path in out.iterdir()} == {"adder", ".adder.lock"}
    first = metrics(base)
    assert len(first) == 3 and first[0]["step"] == 0 and "previous" not in capfd.readouterr().out
    for n, flags in ((1, ["--matrix-lr=1"]), (2, ["--temperature=0.5"])):
        kept = {path.name: path.read_bytes() for path in (out / "adder").iterdir()}
        assert main(base, *SMALL, "--max-steps=1", *flags) == 0
        place = max((out / "previous").iterdir(), key=lambda path: path.stat().st_ctime)
        assert len([*(out / "previous").iterdir()]) == n and place.name.startswith("adder-")
        assert {path.name: path.read_bytes() for path in place.iterdir()} == kept
        assert str(place) in capfd.readouterr().out
        assert untimed(metrics(base)[0]) == untimed(first[0]) and metrics(base)[1:] != first[1:]
    assert main(base, *SMALL, "--max-steps=1", "--seed=1") == 0
    assert untimed(metrics(base)[0]) != untimed(first[0])


def test_an_evaluation_moves_nothing(base, capfd):
    """--max-steps=0 writes to evaluations/<tag> what the first evaluation of a run is, and touches no run."""
    out = base / "chatrl_checkpoints"
    assert main(base, *SMALL, "--max-steps=1") == 0
    kept, first = {path: path.read_bytes() for path in (out / "adder").iterdir()}, metrics(base)
    for flags in ([], ["--temperature=0.5"], ["--seed=1"]):
        assert main(base, *SMALL, "--max-steps=0", *flags) == 0
        assert {path.name for path in (out / EVALUATION).iterdir()} == {
            "run.json", "chat_rl.py", "gpt.py", "metrics.jsonl", "samples_000000.jsonl", "curve.png"}
        line, = metrics(base, EVALUATION)
        assert (untimed(line) == untimed(first[0])) == ("--seed=1" not in flags)
        assert str(out / EVALUATION) in capfd.readouterr().out
    assert {path: path.read_bytes() for path in (out / "adder").iterdir()} == kept and not (out / "previous").exists()


def test_model_tag_may_be_a_folder(base, tmp_path, monkeypatch):
    """A folder with a model and its tokenizer inside runs from anywhere, and its name becomes the tag."""
    folder = tmp_path / "elsewhere" / "published-model"
    shutil.copytree(base / "chatsft_checkpoints" / "adder", folder)
    shutil.rmtree(base / "chatsft_checkpoints")
    before = sorted(folder.iterdir())
    assert main(base, *SMALL, f"--model-tag={folder}", "--max-steps=1") == 0
    assert len(metrics(base, "published-model")) == 3 and weights(base, 1, "published-model")
    assert sorted(folder.iterdir()) == before
    monkeypatch.chdir(folder)
    assert main(base, *SMALL, "--model-tag=.", "--max-steps=0") == 0 and len(metrics(base, "evaluations/published-model")) == 1


def test_the_default_tag_is_the_largest(base):
    """Without --model-tag the largest d<N> is taken, by number; without any the newest folder."""
    flags = [flag for flag in SMALL if "tag" not in flag] + ["--max-steps=0"]
    copies(base, "older")
    os.utime(base / "chatsft_checkpoints" / "older", (1, 1))
    assert main(base, *flags) == 0 and metrics(base, EVALUATION)
    copies(base, "d9", "d12-long")
    assert main(base, *flags) == 0 and metrics(base, "evaluations/d12-long")


@pytest.mark.parametrize("more", [{"WANDB_MODE": "offline"}, {"WANDB_MODE": "online", "WANDB_API_KEY": "bad"}],
                         ids=["offline", "no account"])
def test_weights_and_biases(base, more):
    """W&B keeps an offline run in the run's folder; one that cannot be used warns, and the run goes on."""
    start = run_alone if more["WANDB_MODE"] == "offline" else run
    done = start(base, *SMALL, "--max-steps=1", "--run=x", HOME=str(base), **more)
    assert len(metrics(base)) == 3 and weights(base, 1)
    kept = list((base / "chatrl_checkpoints" / "adder").glob("wandb/offline-run-*/*.wandb"))
    assert (len(kept), done.stdout.count("warning: no W&B")) == ((1, 0) if "bad" not in more.values() else (0, 1))


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


def refusal(base: Path, capfd, *flags: str) -> str:
    """The one line with which a run is refused, having written nothing."""
    capfd.readouterr()
    before = {path: path.stat().st_mtime_ns for path in base.rglob("*")}
    status, text = main(base, *flags), capfd.readouterr().err
    assert status == 2 and text.count("\n") == 1 and text.endswith("\n"), text
    assert {path: path.stat().st_mtime_ns for path in base.rglob("*")} == before
    return text


@pytest.mark.parametrize("flag, words", [
    *((flag, [flag.split("=")[0]]) for flag in (
        "--num-samples=1", "--temperature=0", "--temperature=-1", "--temperature=nan", "--matrix-lr=-1", "--top-k=-3",
        "--max-steps=-1", "--device-batch-size=0", "--eval-every=0", "--save-every=0", "--max-new-tokens=0",
        "--max-new-tokens=128", "--eval-examples=-1", "--rollout-batch-size=0", "--examples-per-step=0",
        "--examples-per-step=100000", "--num-epochs=0", "--no-such-flag", "--num-samples=two", "--eval-temperature=0",
        "--max-ratio=-1", "--max-ratio=nan", "--updates-per-rollout=0", "--lr-schedule=cosine", "--grad-clip=-1",
        "--num-sample=4", "--keep-last=-1")),
    *((f"--clip={clip}", ["--clip"]) for clip in ("x", "-0.1", "nan", "1.5", "0.2,0.3")),
    ("--model-tag=d99", ["d99", "adder"]), ("--model-tag=/no/such/folder", ["/no/such/folder", "adder"]),
    ("--model-step=3", ["3", "150"]), ("--dtype=float16", ["float16"]), ("--device-type=tpu", ["tpu"]),
    ("--task=chess", ["chess", "gsm8k"]), ("--grader=vibes", ["vibes", "boxed-math"]),
    ("--chat-template-kwargs={}x", ["--chat-template-kwargs"]), ("--chat-template=x", ["--chat-template"])],
    ids=lambda value: value if isinstance(value, str) else "")
def test_bad_flags(base, capfd, flag, words):
    """A flag that is out of range, or names what is not there, ends the run with status 2 and one line that says so."""
    text = refusal(base, capfd, *SMALL, flag)
    assert all(word in text for word in words), text


@pytest.mark.parametrize("given, bounds", [([], (0, math.inf)), (["0.2"], (0.8, 1.2)), (["0.2", "0.28"], (0.8, 1.28))])
def test_clips_are_read(given, bounds):
    flags = chat_rl.parse_flags(["--clip", *given] if given else [], {})
    assert chat_rl.bounds_of(flags) == pytest.approx(bounds)


@pytest.mark.parametrize("argv, kind, before, wanted", [
    ([], "nanochat", [], dict(task="gsm8k", grader="number", data="openai/gsm8k:main", matrix_lr=0.02, top_k=50, grad_clip=0)),
    ([], "huggingface", [], dict(task="gsm8k-boxed", grader="boxed-number", top_k=0, grad_clip=1, lr_schedule="constant")),
    (["--lora-rank=4"], "huggingface", [], dict(matrix_lr=1e-4, top_k=0)),
    (["--lora-rank=4", "--matrix-lr=3"], "nanochat", [], dict(matrix_lr=3, init_lr_frac=1, task="gsm8k")),
    (["--task=think", "--system=x"], "nanochat", [], dict(grader="tagged-number", system="x")),
    ([], "starter", [], dict(task="arithmetic", num_samples=4, data="sums")),
    (["--num-samples=6"], "starter", ["--num-samples=8", "--seed=7"], dict(num_samples=6, seed=7, matrix_lr=0.25)),
    (["--task=math"], "nanochat", ["--task=think", "--suffix=y", "--seed=7"],
     dict(grader="boxed-math", prompt_key="problem", system="", suffix="y", seed=7)),
    (["--task=think"], "nanochat", ["--task=think", "--system=y"], dict(system="y"))])
def test_what_wins(argv, kind, before, wanted):
    """Given > given when the run was begun > the task > the kind of model > Flags; another task brings its own defaults."""
    flags = asdict(chat_rl.settle_flags([*before, *argv], kind))
    assert {key: flags[key] for key in wanted} == wanted


def test_help_shows_every_flag():
    done = subprocess.run([sys.executable, ROOT / "chat_rl.py", "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0 and done.stderr == ""
    for name in asdict(chat_rl.Flags()):
        assert "--" + name.replace("_", "-") in done.stdout, name
    assert "sample from the k likeliest tokens" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
def test_no_such_device(base, capfd):
    """A device that is not there is refused."""
    assert "--device-type" in refusal(base, capfd, *SMALL, "--device-type=cuda")


def truncate(folder: Path) -> None:
    path = folder / "model_000150.pt"
    path.write_bytes(path.read_bytes()[:5000])


def make_foreign(folder: Path) -> None:
    path = folder / "model_000150.pt"
    torch.save({**torch.load(path, weights_only=True), "bigram_embed.weight": torch.zeros(1)}, path)


def swap_tokenizer(folder: Path) -> None:
    special = {f"<|{name}|>": 400 + i for i, name in enumerate(gpt.Tokenizer.SPECIAL)}
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("e", pat_str=".", mergeable_ranks=ranks, special_tokens=special)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))


@pytest.mark.parametrize("damage, words", [
    (truncate, ["model_000150.pt"]), (make_foreign, ["model_000150.pt", "bigram_embed.weight"]),
    (swap_tokenizer, ["409", "265"]),
    (lambda folder: (folder / "tokenizer.pkl").unlink(), ["tokenizer.pkl"]),
    (lambda folder: (folder / "meta_000150.json").write_text("{"), ["meta_000150.json"]),
    (lambda folder: (folder / "meta_000150.json").unlink(), ["adder"])],
    ids=["truncated", "foreign", "vocabulary", "no tokenizer", "broken meta", "no meta"])
def test_bad_checkpoint(base, capfd, damage, words):
    """A checkpoint that is broken or foreign is refused by the file's name."""
    folder = base / "chatsft_checkpoints" / "adder"
    damage(folder)
    text = refusal(base, capfd, *SMALL)
    assert all(word in text for word in words), text


def test_output_that_cannot_be_written(base, capfd):
    """Where the output folder cannot be made the run ends before it begins."""
    (base / "chatrl_checkpoints").write_text("in the way")
    assert "chatrl_checkpoints" in refusal(base, capfd, *SMALL)


def test_more_ranks_than_questions(base):
    """A rank without a question of its own, or without a group of a part, goes through the motions."""
    copies(base, "two")
    flags = [*LIVELY, "--examples-per-step=3", "--updates-per-rollout=2", "--eval-examples=1", "--max-steps=2"]
    assert main(base, *flags) == 0
    run(base, *flags, "--model-tag=two", ranks=4)
    for mine, other in zip(metrics(base, "two"), metrics(base), strict=True):
        assert untimed(mine) == pytest.approx(untimed(other), rel=1e-4, abs=1e-5)
    assert sum(line.get("grad_norm", 0) > 0 for line in metrics(base)) == 2


def test_what_is_amiss_is_said_once(base):
    """Not by every rank."""
    done = run(base, *SMALL, "--task=chess", ranks=2, status=None)
    assert done.returncode != 0 and (done.stdout + done.stderr).count("chat_rl: --task chess") == 1
    assert not (base / "chatrl_checkpoints").exists()


def test_half_an_environment_of_torchrun_is_said(base):
    done = run_alone(base, *SMALL, status=2, RANK="0")
    assert done.stderr == "chat_rl: RANK is set, but not MASTER_ADDR, MASTER_PORT, WORLD_SIZE: start with torchrun, or unset RANK\n"


def test_functions_as_task_cross_to_ranks(base, tmp_path):
    """A lambda as a grader and a lambda as a task's data work with torchrun as with python."""
    script = tmp_path / "edited.py"
    script.write_text((ROOT / "chat_rl.py").read_text().replace('\nif __name__ == "__main__":', """
MADE["pairs"] = lambda: {"train": [{"q": f"{i} + 1", "a": i + 1} for i in range(20)], "test": [{"q": "5 + 5", "a": 10}] * 3}
GRADERS["last"] = lambda reference, text: float(text[-1:] in "13579" or text.endswith(reference))
TASKS["mine"] = dict(data="pairs", grader="last", prompt_key="q", answer_key="a")

if __name__ == "__main__":"""))
    shutil.copy(ROOT / "gpt.py", tmp_path)
    copies(base, "two")
    flags = [*LIVELY, "--task=mine"]
    run(base, *flags, script=script)
    run(base, *flags, "--model-tag=two", script=script, ranks=2)
    assert any(line.get("reward") for line in metrics(base))
    for mine, other in zip(metrics(base, "two"), metrics(base), strict=True):
        assert untimed(mine) == pytest.approx(untimed(other), rel=1e-4, abs=1e-5)


def test_two_seeds_at_once(base):
    """--name gives each its folder; a run that begins from a result leaves it alone."""
    for seed in (1, 2):
        assert main(base, *SMALL, "--max-steps=1", f"--seed={seed}", f"--name=seed{seed}") == 0
    assert metrics(base, "seed1")[0] != metrics(base, "seed2")[0]
    folder = base / "chatrl_checkpoints" / "seed1"
    kept = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(base, *SMALL, f"--model-tag={folder}", "--max-steps=1") == 0
    assert {path: path.read_bytes() for path in folder.iterdir()} == kept and weights(base, 1, "seed1-2")


def test_evaluation_at_another_temperature(base):
    """--eval-temperature is that of the samples, not of the greedy answers, and not of training."""
    for name, flags in (("one", []), ("cold", ["--eval-temperature=0.01"]), ("warm", ["--temperature=3"])):
        assert main(base, *SMALL, "--max-steps=1", f"--name={name}", *flags) == 0
    one, cold, warm = (metrics(base, name)[0] for name in ("one", "cold", "warm"))
    assert cold["pass@1"] == pytest.approx(cold["greedy"], abs=0.07) and one == warm and cold["greedy"] == one["greedy"]


def test_keep_last_counts_weights(base):
    """It bounds whole checkpoints; without it all weights stay, and the last two states."""
    flags = [*SMALL, "--max-steps=5", "--save-every=1", "--eval-every=9", "--eval-samples=1"]
    for name, keep, models, states in (("all", 0, [1, 2, 3, 4, 5], [4, 5]), ("two", 2, [4, 5], [4, 5]), ("one", 1, [5], [5])):
        assert main(base, *flags, f"--name={name}", f"--keep-last={keep}") == 0
        folder = base / "chatrl_checkpoints" / name
        assert gpt.checkpoint_steps(folder) == models and len([*folder.glob("model_*")]) == len(models)
        assert [int(path.stem[-6:]) for path in sorted(folder.glob("optim_*"))] == states
