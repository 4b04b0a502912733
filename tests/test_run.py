"""Whole runs of chat_rl.py: what they write, what changes nothing in them, and what they refuse."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import (ROOT, SMALL, chat, distance, edited, ended, environment, main, metrics, out, output, run, samples, started,
                      untimed, weights)

import chat_rl
import gpt

# Some groups of every step have something to learn.
LIVELY = [*SMALL, "--examples-per-step=16", "--num-samples=12", "--eval-examples=7"]

# A task of functions, put above what runs the file.
MINE = """
MADE["pairs"] = lambda: {"train": [{"q": f"{i} + 1", "a": i + 1} for i in range(20)], "test": [{"q": "5 + 5", "a": 10}] * 3}
GRADERS["last"] = lambda reference, text: float(text[-1:] in "13579" or text.endswith(reference))
TASKS["mine"] = dict(data="pairs", grader="last", prompt_key="q", answer_key="a")

if __name__ == "__main__":"""


def test_any_batch_and_any_ranks_give_the_same_run(base, tmp_path):
    """Whatever runs at once, on 1 rank, on 2 with an odd number of questions, or on more than there are questions: the same
    completions in training and evaluation; and the same metrics and weights to rounding. Lambdas cross to the ranks."""
    script = tmp_path / "edited.py"
    script.write_text((ROOT / "chat_rl.py").read_text().replace('\nif __name__ == "__main__":', MINE))
    shutil.copy(ROOT / "gpt.py", tmp_path)
    start = weights_of(base, "chatsft_checkpoints/adder/model_000150.pt")
    flags = [*LIVELY, "--task=mine", "--examples-per-step=3", "--eval-examples=3", "--max-steps=2", "--updates-per-rollout=2",
             "--init-lr-frac=0.5"]
    runs = {"all": (0, 10_000, 8), "ones": (0, 1, 1), "two": (2, 24, 5), "four": (4, 7, 3)}
    for name, (ranks, rollout_size, device_size) in runs.items():
        run(base, *flags, f"--name={name}", f"--rollout-batch-size={rollout_size}", f"--device-batch-size={device_size}",
            ranks=ranks, script=script)
    wanted, moved = metrics(base, "all"), weights_of(base, "chatrl_checkpoints/all/model_000002.pt") - start
    assert [line["grad_norm"] > 0 for line in wanted if "reward" in line] == [True, True]
    for name in runs:
        for step, kind in ((0, ""), (0, "_train"), (2, "")):
            assert samples(base, step, name, kind) == samples(base, step, "all", kind)
        for mine, other in zip(metrics(base, name), wanted, strict=True):
            assert untimed(mine) == pytest.approx(untimed(other), rel=1e-3, abs=1e-5) and mine.get("sampler_gap", 0) < 1e-5
        assert distance(weights_of(base, f"chatrl_checkpoints/{name}/model_000002.pt") - start, moved) < 2e-3


def weights_of(base: Path, name: str) -> torch.Tensor:
    """Those of the blocks, which are float32."""
    state = torch.load(base / name, weights_only=True)
    return torch.cat([x.flatten() for key, x in state.items() if key.startswith("transformer.h.")])


def test_what_a_run_writes(base, capfd):
    """Checkpoints with the SFT checkpoint's keys, shapes and types, metrics, samples, a curve, the scripts and the flags."""
    assert main(base, *LIVELY, "--max-steps=4", "--save-every=3", "--eval-every=2", "--eval-samples=4") == 0
    printed, folder = capfd.readouterr().out, out(base)
    assert {path.name for path in folder.iterdir()} == {
        *(name.format(step) for step in (3, 4) for name in ("model_00000{}.pt", "meta_00000{}.json", "optim_00000{}.pt")),
        *(f"samples_00000{step}.jsonl" for step in (0, 2, 4)), *(f"samples_00000{step}_train.jsonl" for step in (0, 2)),
        "tokenizer.pkl", "metrics.jsonl", "curve.png", "run.json", "chat_rl.py", "gpt.py"}
    for name in ("chat_rl.py", "gpt.py"):
        assert (folder / name).read_text() == (ROOT / name).read_text()
    assert json.loads((folder / "run.json").read_text())["flags"]["max_steps"] == 4
    assert "before " in printed and "after " in printed and str(folder) in printed
    assert [("greedy" in line, "reward" in line, line["step"]) for line in metrics(base)] == [
        (True, True, 0), (False, True, 1), (True, True, 2), (False, True, 3), (True, False, 4)]
    first, last = (torch.load(path, weights_only=True) for path in (
        base / "chatsft_checkpoints" / "adder" / "model_000150.pt", folder / "model_000004.pt"))
    assert [(key, x.dtype, x.shape) for key, x in first.items()] == [(key, x.dtype, x.shape) for key, x in last.items()]
    assert not torch.equal(first["lm_head.weight"], last["lm_head.weight"])
    for place, step in ((folder, 3), (folder, 4), (base / "chatsft_checkpoints" / "adder", 150)):
        model, tokenizer = gpt.load_checkpoint(place, step)
        assert tokenizer.decode(tokenizer.render(chat("1 + 1"))).endswith("1 + 1<|user_end|><|assistant_start|>")
        assert model.raw_config["n_embd"] == 64


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_run_keeps_the_first(base, capfd):
    """An earlier run of the name is moved to previous/, which is said; an evaluation alone goes to evaluations/ and touches
    no run. The first evaluation is the same every time, but for another seed."""
    place = base / "chatrl_checkpoints"
    assert main(base, *SMALL, "--max-steps=1") == 0 and "previous" not in capfd.readouterr().out
    (out(base) / "notes").write_text("someone's own")
    kept, first = contents(out(base)), metrics(base)
    for flags in ([], ["--seed=1"]):
        assert main(base, *SMALL, "--max-steps=0", *flags) == 0
        line, = metrics(base, "evaluations/adder")
        assert (untimed(line).items() <= first[0].items()) == (not flags)
        assert str(place / "evaluations" / "adder") in capfd.readouterr().out
    assert {path.name for path in place.glob("[!.]*")} == {"adder", "evaluations"} and contents(out(base)) == kept
    assert main(base, *SMALL, "--max-steps=1", "--temperature=0.5") == 0
    earlier, = (place / "previous").iterdir()
    assert contents(earlier) == kept and earlier.name.startswith("adder-") and str(earlier) in capfd.readouterr().out
    begun = metrics(base)[0]
    assert all((begun[key] == first[0][key]) == (key != "reward") for key in ("greedy", "pass@1", "reward"))
    assert not (out(base) / "notes").exists()


def test_model_tag_may_be_a_folder(base, tmp_path, monkeypatch):
    """A folder with a model and its tokenizer inside runs from anywhere, its name becomes the run's, and it is left alone, as
    is a run's own folder."""
    folder = tmp_path / "elsewhere" / "starter"
    shutil.copytree(base / "chatsft_checkpoints" / "adder", folder)
    shutil.rmtree(base / "chatsft_checkpoints")
    monkeypatch.chdir(folder)
    for tag, place, name in ((folder, folder, "starter"), (out(base, "starter"), out(base, "starter"), "again"),
                             (".", folder, "evaluations/starter")):
        before = contents(place)
        flags = [*SMALL, f"--model-tag={tag}", f"--max-steps={int('eval' not in name)}"]
        assert main(base, *flags, *["--name=again"] * (name == "again")) == 0 and (name != "again" or main(base, *flags) == 2)
        assert contents(place) == before and (out(base, name) / "metrics.jsonl").exists()
        assert json.loads((out(base, name) / "run.json").read_text())["flags"]["embedding_lr"] == 0.2     # not the starter's


def test_the_default_tag_is_the_largest(base):
    """Without --model-tag the largest d<N> is taken, by number; without any the newest folder."""
    flags = [flag for flag in SMALL if "tag" not in flag] + ["--max-steps=0"]
    adder, *others = [base / "chatsft_checkpoints" / tag for tag in ("adder", "older", "d9", "d12-long")]
    shutil.copytree(adder, others[0])
    os.utime(others[0], (1, 1))
    assert main(base, *flags) == 0 and metrics(base, "evaluations/adder")
    for other in others[1:]:
        shutil.copytree(adder, other)
    assert main(base, *flags) == 0 and metrics(base, "evaluations/d12-long")


def test_a_run_as_users_start_it(base):
    """Files are UTF-8 whatever the locale, W&B keeps an offline run in the run's folder, and no time is lost with importing
    transformers, which nanochat's models do not need."""
    (base / "tests.jsonl").write_text('{"question": "Combien coûte 1 €?", "answer": 1}', "utf-8")
    (base / "shots.json").write_text('[{"role": "user", "content": "Où?"}, {"role": "assistant", "content": "Là."}]', "utf-8")
    flags = [*SMALL, "--max-steps=1", "--run=x", "--eval-data=tests.jsonl", "--few-shot=shots.json"]
    env = environment(base, HOME=str(base), WANDB_MODE="offline", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done = subprocess.run([sys.executable, "-X", "importtime", ROOT / "chat_rl.py", *flags], env=env, cwd=base, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert samples(base, 0)[0]["question"] == "Combien coûte 1 €?" and "Combien" in done.stdout
    assert len([*out(base).glob("wandb/offline-run-*/*.wandb")]) == 1 and "warning: no W&B" not in done.stdout
    assert re.search(r"\| +torch$", done.stderr, re.M) and not re.search(r"\| +transformers$", done.stderr, re.M)


def test_without_an_account_at_weights_and_biases_it_warns(base):
    done = run(base, *SMALL, "--max-steps=1", "--run=x", HOME=str(base), WANDB_MODE="online", WANDB_API_KEY="bad")
    assert len(metrics(base)) == 2 and weights(base, 1) and done.stdout.count("warning: no W&B") == 1


STDOUT = "sys.stdout = sys.__stdout__ = open(1, 'w', encoding='utf-8', closefd=False); "
NO_TERMINAL = {
    "ascii": STDOUT.replace("utf-8", "ascii"),
    "closed": "os.close(1); sys.stdout = sys.__stdout__ = None",
    "full": "os.dup2(os.open('/dev/full', os.O_WRONLY), 1); " + STDOUT,
    "pipe": "ends = os.pipe(); os.dup2(ends[1], 1); [os.close(end) for end in ends]; " + STDOUT}


@pytest.mark.parametrize("kind", NO_TERMINAL)
def test_no_terminal(base, kind):
    """A run ends and saves where stdout is ASCII, closed, a full disk or a pipe that nobody reads."""
    done = run(base, *SMALL, "--max-steps=1", script=edited(base, NO_TERMINAL[kind]))
    assert done.stderr == "" and weights(base, 1) and len(metrics(base)) == 2
    assert ("pass@1" in done.stdout) == (kind == "ascii")


SLOW_RANK = """generate = gpt.generate
gpt.generate = lambda *given, **more: (time.sleep(0.5 * int(os.environ["RANK"])), generate(*given, **more))[1]"""


def test_tokens_per_second_of_many_ranks(base):
    """The tokens of all ranks are divided by the time of the slowest, also where rank 0 comes later, from its picture."""
    run(base, *SMALL, "--max-steps=2", "--save-every=1", script=edited(base, SLOW_RANK), ranks=2)
    lines = [line for line in metrics(base) if "reward" in line]
    assert len(lines) == 2 and all(line["tokens_per_second"] <= line["completion_length"] * 8 * 8 / 0.5 * 1.01 for line in lines), lines


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
        "--num-samples=1", "--temperature=0", "--temperature=nan", "--matrix-lr=-1", "--top-k=-3",
        "--max-steps=-1", "--device-batch-size=0", "--eval-every=0", "--max-new-tokens=128", "--eval-examples=-1",
        "--rollout-batch-size=0", "--examples-per-step=100000", "--no-such-flag", "--num-samples=two", "--max-ratio=nan",
        "--lr-schedule=cosine", "--num-sample=4", "--name=/tmp", "--name=..", f"--seed={2**64}")),
    *((f"--clip={clip}", ["--clip"]) for clip in ("x", "-0.1", "nan", "0.2,0.3")),
    ("--model-tag=d99", ["d99", "adder"]), ("--model-tag=/no/such/folder", ["/no/such/folder", "adder"]),
    ("--model-step=3", ["3", "150"]), ("--dtype=float16", ["float16"]), ("--device-type=tpu", ["tpu"]),
    *[("--device-type=cuda", ["--device-type"])] * (not torch.cuda.is_available()),
    ("--task=chess", ["chess", "gsm8k"]), ("--grader=vibes", ["vibes", "boxed-math"]),
    ("--chat-template-kwargs={}x", ["--chat-template-kwargs"]), ("--chat-template=x", ["--chat-template"])],
    ids=lambda value: value if isinstance(value, str) else "")
def test_bad_flags(base, capfd, flag, words):
    """A flag that is out of range, or names what is not there, ends the run with status 2 and one line that says so."""
    text = refusal(base, capfd, *SMALL, flag)
    assert all(word in text.replace("_", "-") for word in words), text


@pytest.mark.parametrize("given, bounds", [([], (0, math.inf)), (["0.2"], (0.8, 1.2)), (["0.2", "0.28"], (0.8, 1.28))])
def test_clips_are_read(given, bounds):
    flags = chat_rl.parse_flags(["--clip", *given] if given else [], {})
    assert chat_rl.bounds_of(flags) == pytest.approx(bounds)


@pytest.mark.parametrize("argv, kind, wanted", [
    ([], "nanochat", dict(task="gsm8k", grader="number", data="openai/gsm8k:main", matrix_lr=0.02, top_k=50, grad_clip=0)),
    ([], "huggingface", dict(task="gsm8k-boxed", grader="boxed-number", top_k=0, grad_clip=1, lr_schedule="constant")),
    (["--lora-rank=4"], "huggingface", dict(matrix_lr=5e-5, top_k=0)),
    (["--lora-rank=4", "--matrix-lr=3"], "nanochat", dict(matrix_lr=3, init_lr_frac=1, task="gsm8k")),
    (["--task=think", "--system=x"], "nanochat", dict(grader="tagged-number", system="x")),
    ([], "starter", dict(task="arithmetic", num_samples=4, data="sums")),
    (["--num-samples=8", "--seed=7", "--num-samples=6"], "starter", dict(num_samples=6, seed=7, matrix_lr=0.25)),
    (["--task=think", "--suffix=y", "--seed=7", "--task=math"], "nanochat",
     dict(grader="boxed-math", prompt_key="problem", system="", suffix="y", seed=7))])
def test_what_wins(argv, kind, wanted):
    """What is given, the later before the earlier > the task > the kind of model > Flags."""
    flags = asdict(chat_rl.settle_flags(argv, kind))
    assert {key: flags[key] for key in wanted} == wanted


def test_help_shows_every_flag(base, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(base, "--help") == 0
    said, error = capfd.readouterr()
    assert error == "" and "sample from the k likeliest tokens" in said
    assert [name for name in asdict(chat_rl.Flags()) if "--" + name.replace("_", "-") not in said] == []


def test_bad_checkpoint_and_bad_folder(base, capfd):
    (base / "chatrl_checkpoints").write_text("in the way")
    assert str(base / "chatrl_checkpoints") in refusal(base, capfd, *SMALL)
    path = base / "chatsft_checkpoints" / "adder" / "model_000150.pt"
    path.write_bytes(path.read_bytes()[:5000])
    assert path.name in refusal(base, capfd, *SMALL)


def test_what_is_amiss_is_said_once(base):
    """Not by every rank."""
    done = run(base, *SMALL, "--task=chess", ranks=2, status=None)
    assert done.returncode != 0 and (done.stdout + done.stderr).count("chat_rl: invalid choice 'chess'") == 1
    assert not (base / "chatrl_checkpoints").exists()


def test_half_an_environment_of_torchrun_is_said(base, capfd, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    text = refusal(base, capfd, *SMALL)
    assert "WORLD_SIZE expected, but not set" in text and "start with torchrun, or unset RANK" in text


def test_all_weights_stay_and_the_last_two_states(base):
    assert main(base, *SMALL, "--max-steps=4", "--save-every=1", "--eval-every=9", "--eval-samples=1") == 0
    assert gpt.checkpoint_steps(out(base)) == [1, 2, 3, 4]
    assert sorted(path.name for path in out(base).glob("optim_*")) == ["optim_000003.pt", "optim_000004.pt"]


def test_a_run_by_an_earlier_ones_scripts(base):
    """They are copied although that run is moved away; a run that goes on moves its own kind of files away, and no other."""
    for script in (ROOT, out(base)):
        run(base, *SMALL, "--max-steps=1", script=script / "chat_rl.py")
    (out(base) / "optim_000002.pt.part").mkdir(), (out(base) / "1234567.out").touch()   # of a kill, of a queue
    assert (out(base) / "gpt.py").exists() and main(base, *SMALL, "--max-steps=3", "--resume") == 0 and weights(base, 3)
    assert (out(base) / "1234567.out").exists() and not list(out(base).glob("*.part"))


def test_two_runs_make_one_starter(tmp_path):
    script, flags = edited(tmp_path, "chat_rl.teach = lambda *given, **more: time.sleep(2)"), ["--max-steps=0", "--eval-examples=2"]
    with started(tmp_path, *flags, "--name=one", script=script) as first:
        said = run(tmp_path, *flags, "--name=two", script=script).stdout
        assert ended(first, tmp_path, 60) == 0 and (said + output(tmp_path)).count("making the starter") == 1


def test_the_source_is_seen_through_links(base, capfd):
    (base / "disk").mkdir(), (base / "chatrl_checkpoints").symlink_to(base / "disk")
    assert main(base, *SMALL, "--max-steps=1") == 0
    assert "give it another --name" in refusal(base, capfd, *SMALL, f"--model-tag={out(base)}")     # which it would move
    (base / "chatsft_checkpoints" / "mine").symlink_to(out(base))
    assert "give it another --name" in refusal(base, capfd, *SMALL, "--model-tag=mine", "--name=adder")
