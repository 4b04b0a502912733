"""Whole runs of chat_rl.py: what they write, what changes nothing in them, and what they refuse."""
import json
import os
import pickle
import shutil
import statistics
from pathlib import Path

import matplotlib.image
import pytest
import tiktoken
import torch
from conftest import SMALL, chat, main, metrics, run, run_alone, sign, untimed, weights

import chat_rl
import gpt

# Some groups of every step have something to learn.
LIVELY = [*SMALL, "--examples-per-step=16", "--num-samples=12", "--eval-examples=7"]


def copies(base: Path, *tags: str) -> None:
    """Copies the checkpoint `adder` under other tags."""
    for tag in tags:
        shutil.copytree(base / "chatsft_checkpoints" / "adder", base / "chatsft_checkpoints" / tag)


def samples(base: Path, step: int, tag: str = "adder") -> list[dict]:
    path = base / "chatrl_checkpoints" / tag / f"samples_{step:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# What a run gives


def test_same_completions_in_any_batch_and_on_any_ranks(base):
    """1, 7 or all rows at once, on 1 rank or on 2 with an odd number of questions, sample the same completions in training
    and evaluation."""
    sizes = {"one": 1, "seven": 7, "all": 0, "ranks": 7}
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
             "grad_norm", "update_norm", "advantage_tokens", "parts_left_out", "sampler_gap", "ratio_max", "approx_kl",
             "clip_fraction", "lrm", "rollout_seconds", "update_seconds", "tokens_per_second"]


def test_what_a_run_writes(base, capsys, pictures):
    """Checkpoints that load here, with the SFT checkpoint's keys, shapes and types, metrics, samples and a curve."""
    model, tokenizer, meta = gpt.load_checkpoint(base / "chatsft_checkpoints" / "adder")
    model.stored_types = {key: torch.bfloat16 for key in model.state_dict() if "wte" in key or "value_embeds" in key}
    gpt.save_checkpoint(base / "chatsft_checkpoints" / "gpu", 5, model, tokenizer, meta)
    flags = ["--model-tag=gpu", "--max-steps=4", "--save-every=3", "--eval-every=2", "--eval-samples=4"]
    assert main(base, *LIVELY, *flags) == 0
    printed, out = capsys.readouterr().out, base / "chatrl_checkpoints" / "gpu"
    saved = {name.format(step) for step in (3, 4)
             for name in ("model_00000{}.pt", "meta_00000{}.json", "optim_00000{}.pt")}
    assert {path.name for path in out.iterdir()} == saved | {
        "tokenizer.pkl", "metrics.jsonl", "curve.png", *(f"samples_00000{step}.jsonl" for step in (0, 2, 4))}
    assert matplotlib.image.imread(out / "curve.png").std() > 0
    assert "before " in printed and "after " in printed and str(out) in printed

    lines = metrics(base, "gpu")
    assert [("reward" in line, line["step"]) for line in lines] == [
        (False, 0), (True, 0), (True, 1), (False, 2), (True, 2), (True, 3), (False, 4)]
    steps = [line for line in lines if "reward" in line]
    assert all(sorted(line) == sorted(STEP_KEYS) for line in steps)
    assert [line["lrm"] for line in steps] == [1.0, 0.75, 0.5, 0.25]
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
        _, again, meta_of_step = gpt.load_checkpoint(out, step)
        assert meta_of_step["step"] == step and meta_of_step["model_config"] == meta["model_config"]
        assert (meta_of_step["flags"]["max_steps"], meta_of_step["flags"]["temperature"]) == (4, 1.0)
        assert again.render(chat("1 + 1")) == tokenizer.render(chat("1 + 1"))
    adamw, muon = torch.load(out / "optim_000004.pt", weights_only=True)["optimizers"]
    assert muon["param_groups"][0]["lr"] == pytest.approx(0.02 * 0.02 * 0.25)
    assert adamw["param_groups"][0]["lr"] == pytest.approx(0.004 * (64 / 768) ** -0.5 * 0.02 * 0.25)


EVALUATION = "evaluations/adder"


def test_a_second_run_keeps_the_first(base, capsys):
    """The earlier folder is moved to previous/<tag>-<n>, and said so; the first evaluation is the same every time."""
    out = base / "chatrl_checkpoints"
    assert main(base, *SMALL, "--max-steps=1") == 0
    assert {path.name for path in out.iterdir()} == {"adder", ".adder.lock"}
    first = metrics(base)
    assert len(first) == 3 and first[0]["step"] == 0 and "previous" not in capsys.readouterr().out
    for n, flags in ((1, ["--matrix-lr=1"]), (2, ["--temperature=0.5"])):
        kept = {path.name: path.read_bytes() for path in (out / "adder").iterdir()}
        assert main(base, *SMALL, "--max-steps=1", *flags) == 0
        place = out / "previous" / f"adder-{n}"
        assert {path.name: path.read_bytes() for path in place.iterdir()} == kept
        assert str(place) in capsys.readouterr().out
        assert metrics(base)[0] == first[0] and metrics(base)[1:] != first[1:]
    assert main(base, *SMALL, "--max-steps=1", "--seed=1") == 0
    assert metrics(base)[0] != first[0]


def test_an_evaluation_moves_nothing(base, capsys):
    """--max-steps=0 writes to evaluations/<tag> what the first evaluation of a run is, and touches no run."""
    out = base / "chatrl_checkpoints"
    assert main(base, *SMALL, "--max-steps=1") == 0
    kept, first = {path: path.read_bytes() for path in (out / "adder").iterdir()}, metrics(base)
    for flags in ([], ["--temperature=0.5"], ["--seed=1"]):
        assert main(base, *SMALL, "--max-steps=0", *flags) == 0
        assert {path.name for path in (out / EVALUATION).iterdir()} == {"metrics.jsonl", "samples_000000.jsonl", "curve.png"}
        line, = metrics(base, EVALUATION)
        assert (line == first[0]) == ("--seed=1" not in flags)
        assert str(out / EVALUATION) in capsys.readouterr().out
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


def gsm8k_rows(n: int) -> list[dict]:
    return [{"question": f"What is {i} + 3?", "answer": f"<<{i}+3={i + 3}>>{i + 3}.\n#### {i + 3}"} for i in range(n)]


def write_data(folder: Path, train: list[dict], test: list[dict]) -> Path:
    folder.mkdir()
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_gsm8k_from_a_local_folder(base, capsys):
    """Questions come from a local folder, tests in shuffle(seed=42) order; those too long are left out and counted."""
    import datasets
    long = {"question": "a" * 200, "answer": "#### 1"}
    data = write_data(base / "data", [*gsm8k_rows(20), long], [*gsm8k_rows(12), long, long])
    flags = [*SMALL, "--task=gsm8k", f"--data={data}", "--eval-examples=9", "--num-epochs=2"]
    flags.remove("--max-steps=3")
    assert main(base, *flags, "--examples-per-step=10") == 0
    printed = capsys.readouterr().out
    assert "1 of 21 train questions" in printed and "2 of 14 test questions" in printed
    assert [line["step"] for line in metrics(base) if "reward" in line] == [0, 1, 2, 3]     # two epochs of 20
    shuffled = datasets.load_dataset("json", data_files=str(data / "test.jsonl"), split="train").shuffle(seed=42)
    wanted = [row["question"] for row in shuffled if row["question"] != long["question"]][:9]
    assert [row["question"] for row in samples(base, 0)] == wanted


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


def refusal(base: Path, capsys, *flags: str) -> str:
    """The one line with which a run is refused, having written nothing."""
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in base.rglob("*")}
    status, text = main(base, *flags), capsys.readouterr().err
    assert status == 2 and text.count("\n") == 1 and text.endswith("\n"), text
    assert {path: path.stat().st_mtime_ns for path in base.rglob("*")} == before
    return text


@pytest.mark.parametrize("flag, words", [
    *((flag, [flag.split("=")[0]]) for flag in (
        "--num-samples=1", "--temperature=0", "--temperature=-1", "--temperature=nan", "--temperature=inf",
        "--matrix-lr=-1",
        "--matrix-lr=inf", "--top-k=-1", "--max-steps=-1", "--device-batch-size=0", "--eval-every=0", "--save-every=0",
        "--max-new-tokens=0", "--max-new-tokens=128", "--eval-examples=-1", "--rollout-batch-size=-1",
        "--examples-per-step=0",
        "--examples-per-step=100000", "--num-epochs=0", "--seed=1" + "0" * 30, "--no-such-flag", "--num-samples=two")),
    ("--model-tag=d99", ["d99", "adder"]), ("--model-tag=/no/such/folder", ["/no/such/folder", "adder"]),
    ("--model-step=3", ["3", "150"]), ("--dtype=float16", ["float16"]), ("--device-type=tpu", ["tpu"]),
    ("--task=chess", ["chess"])], ids=lambda value: value if isinstance(value, str) else "")
def test_bad_flags(base, capsys, flag, words):
    """A flag that is out of range, or names what is not there, ends the run with status 2 and one line that says so."""
    text = refusal(base, capsys, *SMALL, flag)
    assert all(word in text for word in words), text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
def test_no_such_device(base, capsys):
    """A device that is not there is refused."""
    assert "--device-type" in refusal(base, capsys, *SMALL, "--device-type=cuda")


def truncate(folder: Path) -> None:
    path = folder / "model_000150.pt"
    path.write_bytes(path.read_bytes()[:5000])


def make_foreign(folder: Path) -> None:
    path = folder / "model_000150.pt"
    torch.save({**torch.load(path, weights_only=True), "bigram_embed.weight": torch.zeros(1)}, path)
    sign(folder, 150)


def swap_tokenizer(folder: Path) -> None:
    special = {f"<|{name}|>": 400 + i for i, name in enumerate(gpt.Tokenizer.SPECIAL)}
    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding("e", pat_str=".", mergeable_ranks=ranks, special_tokens=special)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    sign(folder, 150)


@pytest.mark.parametrize("damage, words", [
    (truncate, ["model_000150.pt"]), (make_foreign, ["model_000150.pt", "bigram_embed.weight"]),
    (swap_tokenizer, ["409", "265"]),
    (lambda folder: (folder / "tokenizer.pkl").unlink(), ["tokenizer.pkl"]),
    (lambda folder: (folder / "meta_000150.json").write_text("{"), ["meta_000150.json"]),
    (lambda folder: (folder / "meta_000150.json").unlink(), ["adder"])],
    ids=["truncated", "foreign", "vocabulary", "no tokenizer", "broken meta", "no meta"])
def test_bad_checkpoint(base, capsys, damage, words):
    """A checkpoint that is broken or foreign is refused by the file's name."""
    folder = base / "chatsft_checkpoints" / "adder"
    damage(folder)
    text = refusal(base, capsys, *SMALL)
    assert all(word in text for word in words), text


ROWS = gsm8k_rows(9)


@pytest.mark.parametrize("train, test, words", [
    ([], ROWS, ["--data"]), (ROWS, [], ["--data"]), ([], [], ["--data"]),
    ([*ROWS, {"question": "?"}], ROWS, ["row 9", "train", "answer"]),
    ([*ROWS[:4], {"answer": "#### 1"}], ROWS, ["row 4", "train", "question"]),
    ([{"question": "?"}] * 9, [{"question": "?"}] * 9, ["row 0", "train", "answer"]),
    ([{"question": "?"}] * 9, ROWS, ["--data"]),
    (ROWS, [*ROWS[:3], {"question": "?"}, *ROWS[3:]], ["row 3", "test", "answer"]),
    (ROWS, None, ["--eval-data"]), (None, None, ["--data"])],
    ids=["no train rows", "no test rows", "no rows", "no answer", "no question", "no answers", "other columns",
         "no answer in test", "no test file", "no files"])
def test_bad_data(base, capsys, train, test, words):
    """Data that is not there says how to use a local folder; a row that lacks something is named by its place."""
    (base / "data").mkdir()
    for name, rows in (("train", train), ("test", test)):
        if rows is not None:
            (base / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = refusal(base, capsys, *SMALL, "--task=gsm8k", f"--data={base / 'data'}")
    assert all(word in text for word in words), text


def test_output_that_cannot_be_written(base, capsys):
    """Where the output folder cannot be made the run ends before it begins."""
    (base / "chatrl_checkpoints").write_text("in the way")
    assert "chatrl_checkpoints" in refusal(base, capsys, *SMALL)


@pytest.mark.parametrize("broken", [False, True], ids=["unreachable", "not JSON"])
def test_data_refused_by_a_process(base, broken):
    """Data that cannot be reached or read: the process prints one line, whatever `datasets` has to say, and ends with status 2."""
    data = []
    if broken:
        data = [f"--data={write_data(base / 'data', ROWS, ROWS)}"]
        (base / "data" / "train.jsonl").write_text("not JSON\n")
    done = (run if broken else run_alone)(base, *SMALL, "--task=gsm8k", *data, status=2)
    assert done.stderr.count("\n") == 1 and done.stdout == "", done.stderr
    assert "--data a local folder" in done.stderr and ("/data" if broken else "openai/gsm8k") in done.stderr
    assert not (base / "chatrl_checkpoints").exists()


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
