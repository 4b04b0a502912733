"""What a run goes on from: after signals, kills, full disks, damaged and hostile files, other flags. Real processes.

    CHAT_RL_SOAK=1 python -m pytest tests/test_resume.py -k soak        # the long one: 20 kills
"""
import io
import json
import os
import pickle
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import (SMALL, Touch, assert_readable, assert_same_run, chat_rl, cut_back, edited, ended, full_disk, gpt, last_step, main,
                      metrics, out, output, reach, run, started, wait_for, weights)

STEPS = 12
RUN = [*SMALL, f"--max-steps={STEPS}", "--eval-every=5", "--save-every=1"]

# chat_rl with a fault of the given KIND in the steps STEPS; or one whose steps all take a fifth of a second longer.
TROUBLE = """
exact, questions = chat_rl.GRADERS["exact"], chat_rl.questions_of_step
kind, steps, now = os.environ["KIND"], set(map(int, os.environ.get("STEPS", "").split())), []

def faulty(reference, text):
    if kind == "slow":
        time.sleep(0.2 / 64)
    elif now and now[-1] in steps:
        if kind != "hang":
            return float(kind)
        print("hanging", flush=True)
        time.sleep(0.4)
    return exact(reference, text)

chat_rl.questions_of_step = lambda run: now.append(run.step) or questions(run)
chat_rl.GRADERS["exact"] = faulty
"""


@pytest.fixture
def trouble(base) -> Path:
    return edited(base, TROUBLE)


@pytest.fixture(scope="module")
def whole(adder_base, tmp_path_factory) -> Path:
    """A base folder with the uninterrupted run."""
    base = Path(shutil.copytree(adder_base, tmp_path_factory.mktemp("whole") / "base"))
    assert main(base, *RUN) == 0
    return base


@pytest.fixture
def finished(whole, tmp_path) -> Path:
    """A copy of the uninterrupted run, to damage."""
    return Path(shutil.copytree(whole, tmp_path / "finished"))


def one_line(text: str, *parts: str) -> None:
    """What chat_rl says of an error: one line, with these parts, and no traceback."""
    line, = [line for line in text.splitlines() if line.startswith("chat_rl: ")]
    assert "Traceback" not in text and all(str(part) in line for part in parts), text


# Signals


def test_stopped_and_resumed_is_never_stopped(base, trouble, whole):
    """SIGTERM in a rollout, SIGINT, SIGHUP and SIGKILL anywhere: the end is that of an uninterrupted run, whose bfloat16 tables
    go on in float32. All but the last exit with 128 and the signal's number within 10 s, and save the last completed step."""
    flags = [*RUN, "--save-every=100", "--resume"]
    with started(base, *flags, script=trouble, KIND="hang", STEPS="3") as process:
        wait_for(lambda: "hanging" in output(base), 120, "the rollout of step 3")
        process.send_signal(signal.SIGTERM)
        assert ended(process, base, 10) == 128 + signal.SIGTERM, output(base)
    assert f"nothing to resume in {out(base)}: beginning anew" in output(base) and "interrupted after 3 of 12 steps" in output(base)
    assert gpt.checkpoint_steps(out(base)) == [3]
    for number, step in ((signal.SIGINT, 5), (signal.SIGHUP, 7)):
        with started(base, *flags, script=trouble, KIND="slow") as process:
            reach(process, base, step)
            process.send_signal(number)
            assert ended(process, base, 10) == 128 + number, output(base)
        assert gpt.checkpoint_steps(out(base))[-1] == last_step(base) + 1
        assert_readable(base)
    with started(base, *flags, "--save-every=2", script=trouble, KIND="slow") as process:
        reach(process, base, 9)
        process.kill()
        assert ended(process, base, 10) == -signal.SIGKILL
    run(base, *flags)
    assert_same_run(base, whole)
    assert_readable(base)
    assert [x.dtype for x in weights(base, STEPS).values()].count(torch.bfloat16) == 2


@pytest.mark.parametrize("kills, steps", [(4, 12), pytest.param(20, 120, id="soak", marks=pytest.mark.skipif(
    "CHAT_RL_SOAK" not in os.environ, reason="takes minutes: set CHAT_RL_SOAK=1"))])
def test_killed_at_random_moments(base, trouble, tmp_path, kills, steps):
    """Kills of a run that saves at every step, every other one while a file is being written, change nothing."""
    whole, flags = Path(shutil.copytree(base, tmp_path / "whole")), [*RUN, f"--max-steps={steps}"]
    assert main(whole, *flags) == 0
    chance, hits = random.Random(kills), 0
    for i in range(kills):
        before = last_step(base)
        with started(base, *flags, "--resume", script=trouble, KIND="slow") as process:
            wait_for(lambda: last_step(base) > before or process.poll() is not None, 120, "another step")
            time.sleep(chance.uniform(0, 0.2))
            if i % 2:
                name = chance.choice(["model", "optim"])
                wait_for(lambda: any(out(base).glob(f"{name}_*.part")) or process.poll() is not None, 60, "a save", pause=0)
            hits += process.poll() is None
            process.kill()
    assert hits >= kills - 1, output(base)
    run(base, *flags, "--resume")
    assert_readable(base)
    assert_same_run(base, whole, step=steps)
    assert not list(out(base).glob("*.part"))


# Disks and files


def test_full_disk(finished, whole, capfd):
    """Where the disk is full (a limit on the size of files stands for it), there is one clear line and no half file; the run
    goes on from the last checkpoint once there is space."""
    cut_back(finished, 11)
    for size, status in ((400_000, 1), (60_000, 2)):        # no room for the weights, for the script
        with full_disk(size):
            assert main(finished, *RUN, "--resume") == status
        one_line(capfd.readouterr().err, out(finished), "File too large")
    assert_readable(finished)
    assert not list(out(finished).glob("*.part"))
    assert main(finished, *RUN, "--resume") == 0 and "passing over" not in capfd.readouterr().out
    assert_same_run(finished, whole)


def test_flags_may_change(finished, capfd):
    """Flags that are not given are the run's; those that are win, and are said in a line; another task and a rank of adapters
    are refused. More steps go on from the end, another step begins there, and what came after it is in previous/."""
    cut_back(finished, 11)
    plain = ["--model-tag=adder", "--resume"]
    for flag in ("--lora-rank=3", "--task=gsm8k"):
        assert main(finished, *plain, flag) == 2 and "--task and --lora-rank are a run's for good" in capfd.readouterr().err
    assert main(finished, *plain, "--matrix-lr=0.5", "--max-steps=14") == 0
    said = capfd.readouterr().out
    assert f"going on after 11 steps of {out(finished)}, begun from " in said
    assert ".pt, with --model-tag=adder --resume --matrix-lr=0.5 --max-steps=14\n" in said
    assert [line["step"] for line in metrics(finished) if "reward" in line] == list(range(14))
    assert gpt.checkpoint_steps(out(finished)) == list(range(1, 15))
    assert main(finished, *plain, "--max-steps=0") == 0 and "step 14/14" in capfd.readouterr().out       # evaluated again
    assert main(finished, f"--model-tag={out(finished)}", "--resume", "--model-step=13", "--max-steps=13") == 0
    assert "step 13/13" in capfd.readouterr().out and gpt.checkpoint_steps(out(finished))[-1] == 13
    assert "greedy" in metrics(finished)[-1] and "reward" not in metrics(finished)[-1]      # the step that it took there is another's now
    later, = (finished / "chatrl_checkpoints" / "previous").iterdir()
    assert {path.name for path in later.iterdir()} == {"model_000014.pt", "meta_000014.json", "optim_000014.pt", "samples_000014.jsonl"}
    for step in (13, 14):               # the second time it is a repetition
        assert main(finished, *plain, "--model-step=13", "--eval-every=100") == 0
        assert f"going on after {step} steps of" in capfd.readouterr().out and [line["step"] for line in metrics(finished)][-2:] == [13, 14]
    assert main(finished, *plain, "--max-steps=15", "--eval-every=100") == 0
    assert [line["step"] for line in metrics(finished) if "greedy" in line][-2:] == [14, 15] == [line["step"] for line in metrics(finished)][-2:]  # neither is lost


def test_the_source_need_not_be_there(finished, whole):
    """A run with all its weights goes on without the model that it began with, by its own folder, and by its name alone."""
    shutil.rmtree(finished / "chatsft_checkpoints")
    for flags in ([f"--model-tag={out(finished)}"], ["--name=adder"]):
        cut_back(finished, 11)
        assert main(finished, *flags, "--resume") == 0
        assert_same_run(finished, whole)
    assert not (finished / "chatsft_checkpoints").exists() and not (finished / "chatrl_checkpoints" / "previous").exists()


@pytest.mark.parametrize("rank", [0, 2])
def test_the_starter_and_adapters_go_on(base, tmp_path, rank):
    """By the run's name alone: the starter with its own rates, adapters on the model that they adapt; neither makes it anew."""
    (base / "chatsft_checkpoints" / "adder").rename(base / "chatsft_checkpoints" / "starter")
    flags = [*RUN, "--model-tag=starter", "--name=adder", "--max-steps=4", "--num-samples=4"]
    assert main(base, *flags, *[f"--lora-rank={rank}"] * (rank > 0)) == 0
    other = Path(shutil.copytree(base, tmp_path / "other"))
    cut_back(other, 3)
    assert main(other, "--name=adder", "--resume") == 0
    assert_same_run(other, base, step=4)
    about = json.loads((out(other) / "run.json").read_text())["flags"]
    assert (about["embedding_lr"], about["lora_rank"]) == (1.0, rank)
    cut_back(other, 3), shutil.rmtree(base / "chatsft_checkpoints"), shutil.rmtree(other / "chatsft_checkpoints")
    assert main(other, "--name=adder", "--resume") == (2 if rank else 0)
    assert not (base / "chatsft_checkpoints").exists() and not (other / "chatsft_checkpoints").exists()


def test_a_way_back_is_gone_from_its_beginning(finished, monkeypatch):
    """Also where a signal ends it before its first step: what it left is in previous/, whole, and it goes on from there."""
    before = {path.name: path.stat().st_mtime_ns for path in out(finished).glob("*_0*.pt")}
    later = ["000012", "000012.part", "model_000012.pt.part"]    # a step in Hugging Face's format, what kills left
    for name in later:
        (out(finished) / name).mkdir()
    monkeypatch.setitem(chat_rl.GRADERS, "exact", lambda reference, text: float(os.kill(os.getpid(), signal.SIGTERM) or 0))
    for flags in (["--model-step=11", "--save-every=5"], []):
        assert main(finished, "--model-tag=adder", "--resume", *flags) == 128 + signal.SIGTERM
        assert gpt.checkpoint_steps(out(finished))[-1] == 11
    places = [out(finished), *(finished / "chatrl_checkpoints" / "previous").iterdir()]
    assert {path.name: path.stat().st_mtime_ns for place in places for path in place.glob("*_0*.pt")} == before and len(places) == 2
    assert all((places[1] / name).exists() and not (out(finished) / name).exists() for name in later)


def test_an_evaluation_that_is_made_again_is_another(finished):
    """Nothing of the earlier one stays in its line."""
    assert main(finished, "--model-tag=adder", "--resume", "--eval-samples=2") == 0
    assert "pass@2" in metrics(finished)[-1] and "pass@3" not in metrics(finished)[-1] and "pass@3" in metrics(finished)[0]


def test_two_runs_of_one_folder(base, trouble):
    """The second one is refused in a line that names the folder; the lock goes with its process."""
    with started(base, *RUN, script=trouble, KIND="hang", STEPS="2") as process:
        wait_for(lambda: "hanging" in output(base), 120, "the rollout of step 2")
        one_line(run(base, *RUN, "--resume", status=2).stderr, out(base), "another run")
        process.kill()
    run(base, *RUN, "--resume", "--max-steps=3")
    assert [line["step"] for line in metrics(base) if "reward" in line] == [0, 1, 2]


def test_damaged_and_hostile_states_are_passed_over(finished, tmp_path, capfd):
    """The run goes on from the last one that is whole, names the rest, and runs none of their code; where none is whole, it
    stops, and moves nothing."""
    states, bad, zipped = sorted(out(finished).glob("optim_*.pt")), Touch(tmp_path / "touched"), io.BytesIO()
    assert [path.name for path in states] == ["optim_000011.pt", "optim_000012.pt"]
    data = states[1].read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    torch.save({"masters": bad}, zipped)
    for content in (data[:-100], b"", flipped, pickle.dumps(bad), zipped.getvalue()):
        states[1].write_bytes(content)
        (out(finished) / "model_000012.pt").write_bytes(content)
        assert main(finished, *RUN, "--resume", "--max-steps=11") == 0
        said = capfd.readouterr().out
        assert f"passing over {states[1]}" in said and "step 11/11" in said and not bad.path.exists()
    assert not states[1].exists() and [main(finished, *RUN, "--resume")] == [0] and states[1].exists()
    for state in states:
        state.write_bytes(b"")
    before = {path: path.read_bytes() for path in out(finished).iterdir()}
    for more in ([], ["--model-step=11"]):
        assert main(finished, *RUN, "--resume", *more) == 2
        assert f"nothing to go on from in {out(finished)}: take another --model-step, of 000012, 000011, or" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in out(finished).iterdir()} == before


def test_steps_that_are_not_finite(base, trouble, pictures):
    """One is left out and said, and the run goes on; five in a row end it with status 1, with what was good saved."""
    flags = [*RUN, "--eval-every=100"]
    said = run(base, *flags, script=trouble, KIND="nan", STEPS="2 4 6 8 10").stdout
    assert [line.split()[1] for line in said.splitlines() if "not finite" in line] == [f"{step}/12" for step in (2, 4, 6, 8, 10)]
    for before, after, same in ((4, 5, True), (5, 6, False), (6, 7, True)):
        one, two = weights(base, before), weights(base, after)
        assert all(torch.equal(one[key], two[key]) for key in one) == same
    assert all(tensor.isfinite().all() for tensor in weights(base, STEPS).values())
    assert [line["grad_norm"] is None for line in metrics(base) if "grad_norm" in line] == [step in (2, 4, 6, 8, 10) for step in range(STEPS)]
    assert_readable(base)
    done = run(base, *flags, "--save-every=2", script=trouble, status=1, KIND="inf", STEPS="1 2 3 4 5 6 7")
    one_line(done.stderr, "not finite", "--resume")
    assert gpt.checkpoint_steps(out(base)) == [2, 4, 5]
    first, last = weights(base, 2), weights(base, 5)
    assert all(torch.equal(first[key], last[key]) for key in first)
    assert_readable(base)
