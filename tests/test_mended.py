"""What once went wrong: a test for each defect that a hostile reading found. Those that need a process of their own share
one where they can, as every start costs seconds."""
import errno
import gc
import io
import json
import os
import pickle
import re
import shutil
import signal
import socket
import sys
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any, Iterator
from unittest.mock import MagicMock

import pytest
import torch
from conftest import (ROOT, SMALL, assert_same_run, chat_rl, cut_back, ended, gpt, main, metrics, out, output, run, started, untimed,
                      wait_for, weights)
from test_run import copies, gsm8k_rows, samples, write_data  # noqa: F401

STEPS = 3
RUN = [*SMALL, f"--max-steps={STEPS}", "--save-every=1", "--eval-every=1", "--keep-last=9"]


@pytest.fixture(scope="module")
def whole(adder_base, tmp_path_factory) -> Path:
    """A base folder with an uninterrupted run. Do not write into it: take `finished`."""
    base = Path(shutil.copytree(adder_base, tmp_path_factory.mktemp("whole") / "base"))
    assert report(base, *RUN)[0] == 0
    return base


@pytest.fixture
def finished(whole, tmp_path) -> Path:
    """A copy of the uninterrupted run, to damage."""
    return Path(shutil.copytree(whole, tmp_path / "finished"))


def report(base: Path, *flags: str) -> tuple[int, str, str]:
    """Runs chat_rl.py in this process: its exit status, stdout and stderr."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        status = main(base, *flags)
    return status, *(stream.buffer.getvalue().decode() for stream in streams)


def refused(base: Path, *flags: str) -> str:
    """The one line with which a run is refused."""
    status, text, error = report(base, *flags)
    assert status == 2 and error.count("\n") == 1 and error.startswith("chat_rl: "), (status, text, error)
    return error


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------------------------------
# 1. W&B


@pytest.mark.parametrize("broken", ["log", "Table", "finish"])
def test_1_weights_and_biases_fails_in_mid_run(base, monkeypatch, broken):
    """W&B that fails at a second log, a table or the end costs one warning, and nothing else."""
    wandb, calls, lost = MagicMock(name="wandb"), [], ConnectionResetError("Connection lost")

    def log(*args: Any, **more: Any) -> None:
        calls.append(args)
        if len(calls) > 1:
            raise lost

    for place in (wandb, wandb.init.return_value):
        if broken != "Table":               # a service that has died stays dead
            place.finish.side_effect = lost
        if broken == "log":
            place.log.side_effect = log
    if broken == "Table":
        wandb.Table.side_effect = RuntimeError("no table")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    status, text, error = report(base, *RUN, "--run=x")
    assert status == 0, error
    warnings = [line for line in (text + error).splitlines() if re.search("W&B|wandb|Weights", line)]
    assert len(warnings) == 1 and not re.search(r"\bspace\b", warnings[0]), text + error
    assert [line["step"] for line in metrics(base) if "reward" in line] == [0, 1, 2] and weights(base, STEPS)
    assert wandb.init.called and str(out(base)) in text


# ----------------------------------------------------------------------------------------------------------------------
# 2 and 3. Saves that take long, and two runs at once

# Hangs in the second save of a training state.
SLOW = """
import os, sys, time
sys.path.insert(0, os.environ["ROOT"])
import torch, chat_rl
save, states = torch.save, []

def slow(thing, *args, **more):
    if not all(isinstance(x, torch.Tensor) for x in thing.values()):        # all of a model are
        states.append(thing)
    if len(states) == 2:
        print("hanging", flush=True)
        time.sleep(300)
    return save(thing, *args, **more)

torch.save = slow
sys.exit(chat_rl.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def killed(adder_base, tmp_path_factory) -> tuple[Path, Path, list[tuple]]:
    """A run that is killed while it saves the training state of step 2: its base folder as it was then, the base folder,
    and the reports of the same command given once more before and after it was killed."""
    folder = tmp_path_factory.mktemp("killed")
    base = Path(shutil.copytree(adder_base, folder / "base"))
    (base / "slow.py").write_text(SLOW)
    with started(base, *RUN, script=base / "slow.py") as process:
        wait_for(lambda: "hanging" in output(base) or process.poll() is not None, 120, "a save")
        assert process.poll() is None, output(base)
        then = Path(shutil.copytree(base, folder / "then"))
        reports = [report(base, *RUN)]
        process.kill()
        assert ended(process, base, 10) == -signal.SIGKILL
        reports.append(report(base, *RUN, "--resume"))
    return then, base, reports


def test_2_a_model_is_safe_before_its_training_state(killed, whole, tmp_path):
    """Killed while the training state is written, a run leaves a model that loads and starts a run of its own; it goes on
    from the checkpoint before, to the end of a run that was never killed."""
    base = Path(shutil.copytree(killed[0], tmp_path / "base"))
    assert gpt.load_checkpoint(out(base))[2]["step"] == 2
    model, other = weights(base, 2), weights(whole, 2)
    assert all(torch.equal(model[key], tensor) for key, tensor in other.items())
    folder = Path(shutil.copytree(out(base), tmp_path / "result"))
    assert report(base, *SMALL, f"--model-tag={folder}", "--max-steps=1")[0] == 0
    before = metrics(base)
    status, text, error = report(base, *RUN, "--resume")
    assert status == 0, text + error
    assert metrics(base)[:2] == before[:2]                  # step 0 with its times: it was not run again
    assert_same_run(base, whole, step=STEPS)
    assert not list(out(base).glob("*.part"))


def test_2_torchrun_waits_for_a_save():
    """README's torchrun commands give a save longer than torchrun's 30 s."""
    lines = re.findall(r"^(?:\w+=\S+ )*torchrun .*", (ROOT / "README.md").read_text(), re.M)
    assert lines
    for line in lines:
        seconds = re.search(r"shutdown[-_]timeout[= ](\d+)", line, re.I)
        assert seconds and int(seconds[1]) > 60, line


def test_3_two_runs_of_one_tag(killed):
    """The second run of a tag is refused in one line that names the folder, and the first is not disturbed; the lock goes
    with its process."""
    then, base, ((status, _, error), after) = killed
    assert status == 2 and error.count("\n") == 1 and str(out(base)) in error and "Traceback" not in error, error
    assert after[0] == 0, after
    assert not (out(base).parent / "previous").exists()
    assert metrics(base)[:2] == metrics(then)[:2] and gpt.checkpoint_steps(out(base)) == [1, 2, 3]


# ----------------------------------------------------------------------------------------------------------------------
# 4. What a run is called, and what it moves


def test_4_a_run_may_go_on_from_a_result(finished):
    """--model-tag=<…>/chatrl_checkpoints/x starts a new run from a result, twice: the result stays where it is."""
    source, flags = out(finished), [*SMALL, f"--model-tag={out(finished)}", "--max-steps=1", "--matrix-lr=1"]
    before = files(source)
    for _ in range(2):
        status, text, error = report(finished, *flags)
        assert status == 0, error
        assert files(source) == before
        assert weights(finished, 1, "adder-2").keys() == weights(finished, STEPS).keys()
        evaluations = [line for line in metrics(finished, "adder-2") if "greedy" in line]
        assert [line["step"] for line in evaluations] == [0, 1]
        assert evaluations[0] == {**metrics(finished)[-1], "step": 0}       # it begins where the source ended
    before = files(out(finished, "adder-2"))
    assert report(finished, *flags, f"--model-tag={out(finished, 'adder-2')}")[0] == 0
    assert files(out(finished, "adder-2")) == before


def test_4_an_evaluation_moves_nothing(finished):
    """--max-steps=0 writes to evaluations/<name>, over the last one; an earlier run stays, and nothing is called saved."""
    before = files(out(finished))
    for n in (7, 5):
        status, text, error = report(finished, *SMALL, "--max-steps=0", f"--eval-examples={n}")
        assert status == 0 and "saved in" not in text and "pass@1" in text, text + error
        assert files(out(finished)) == before
        assert len(samples(finished, 0, "evaluations/adder")) == n
        assert [line["step"] for line in metrics(finished, "evaluations/adder")] == [0]
    assert not (out(finished).parent / "previous").exists()
    assert report(finished, *SMALL, f"--model-tag={out(finished)}", "--max-steps=0")[0] == 0       # as it is, a result
    assert files(out(finished)) == before


# ----------------------------------------------------------------------------------------------------------------------
# 5 to 8. What --resume takes


def test_5_resume_without_the_dtype(base):
    """A run with --dtype=bfloat16 goes on in bfloat16 where --dtype is not given again."""
    assert report(base, *RUN, "--dtype=bfloat16")[0] == 0
    kept = Path(shutil.copytree(base, base.parent / "kept"))
    cut_back(base, 1)
    status, text, error = report(base, "--model-tag=adder", "--resume")
    assert status == 0, error
    assert_same_run(base, kept, step=STEPS)


def test_6_resume_with_another_model(finished, whole, tmp_path):
    """A run is not resumed with another model or another step of it. The same model in another folder is the same."""
    cut_back(finished, 2)
    sft, other = finished / "chatsft_checkpoints" / "adder", tmp_path / "other" / "adder"
    other.mkdir(parents=True)
    for name in ("model_000001.pt", "meta_000001.json", "tokenizer.pkl"):
        shutil.copy(out(finished) / name, other)
    before = files(out(finished))
    assert "--model-" in refused(finished, *RUN, f"--model-tag={other}", "--resume")
    for name in ("model_000001.pt", "meta_000001.json"):
        shutil.copy(other / name, sft)
    assert "--model-" in refused(finished, *RUN, "--model-step=1", "--resume")
    assert files(out(finished)) == before
    for name in ("model_000001.pt", "meta_000001.json"):
        (sft / name).unlink()
    (tmp_path / "moved").mkdir()
    moved = shutil.move(sft, tmp_path / "moved")
    status, text, error = report(finished, *RUN, f"--model-tag={moved}", "--resume")
    assert status == 0, error
    assert_same_run(finished, whole, step=STEPS)


def test_6_resume_with_other_data(base):
    """A run is not resumed with other questions. The same questions in another folder are the same."""
    data = write_data(base / "data", gsm8k_rows(20), gsm8k_rows(9))
    flags = [*RUN, "--task=gsm8k", f"--data={data}"]
    assert report(base, *flags)[0] == 0
    kept = Path(shutil.copytree(base, base.parent / "kept"))
    cut_back(base, 2)
    rows = gsm8k_rows(20)
    rows[7]["question"] = rows[7]["question"].replace("3", "4")
    other = write_data(base / "other", rows, gsm8k_rows(9))
    assert "--data" in refused(base, *flags, f"--data={other}", "--resume")
    data.rename(base / "moved")
    other.rename(data)
    assert "--data" in refused(base, "--model-tag=adder", "--resume")
    status, text, error = report(base, *flags, f"--data={base / 'moved'}", "--resume")
    assert status == 0, error
    assert_same_run(base, kept, step=STEPS)


READERS: list[Counter] = []                 # each counts the files that are opened to be read, by path


def note_reads(event: str, args: tuple) -> None:
    if READERS and event == "open" and isinstance(args[0], (str, os.PathLike)) and args[2] & os.O_ACCMODE == os.O_RDONLY:
        READERS[-1][os.fspath(args[0])] += 1


sys.addaudithook(note_reads)                # for good: a hook cannot be taken away


@contextmanager
def reads_of_weights() -> Iterator[Counter]:
    """How often each file of tensors or a tokenizer was opened to be read, by path; to be looked at afterwards."""
    READERS.append(Counter())
    counts = Counter()
    try:
        yield counts
    finally:
        counts.update({path: n for path, n in READERS.pop().items() if path.endswith((".pt", ".pkl", ".part"))})


def test_7_files_are_read_once(finished, whole):
    """Loading opens each file once, and what is saved is not read back."""
    folder = finished / "chatsft_checkpoints" / "adder"
    with reads_of_weights() as reads:
        gpt.load_checkpoint(folder)
    assert reads == {str(folder / "model_000150.pt"): 1, str(folder / "tokenizer.pkl"): 1}
    cut_back(finished, 2)
    with reads_of_weights() as reads:
        assert report(finished, *RUN, "--resume")[0] == 0
    assert max(reads.values()) == 1, reads
    assert not [path for path in reads if f"{STEPS:06d}" in path or path.endswith(".part")], reads
    assert_same_run(finished, whole, step=STEPS)


def test_7_the_tokenizer_is_checked(finished):
    """A tokenizer of which a bit has changed is noticed, though it loads."""
    path = out(finished) / "tokenizer.pkl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"(?s:.)", b"(?s:/)"))
    assert path.read_bytes() != whole and pickle.loads(path.read_bytes()).n_vocab == 265
    with pytest.raises(gpt.UserError, match="tokenizer.pkl"):
        gpt.load_checkpoint(out(finished))
    status, text, error = report(finished, *RUN, "--resume")
    assert status in (0, 2) and "tokenizer.pkl" in text + error, text + error


def test_7_the_source_need_not_be_there(finished, whole):
    """A run goes on without the model that it began with, also one that named its step."""
    cut_back(finished, 2)
    path = out(finished) / "meta_000002.json"
    meta = json.loads(path.read_text())
    meta["flags"]["model_step"] = 150
    path.write_text(json.dumps({**meta, "seal": gpt.seal(meta)}))
    shutil.rmtree(finished / "chatsft_checkpoints")
    status, text, error = report(finished, *RUN, "--resume")
    assert status == 0, error
    assert_same_run(finished, whole, step=STEPS)


def test_8_damaged_metrics(finished, whole, pictures):
    """Lines of metrics.jsonl that are not UTF-8, not JSON or no metrics are passed over and counted."""
    cut_back(finished, 2)
    path = out(finished) / "metrics.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in kept] == [0, 0, 1, 1, 2, 2, 3]
    bad = [kept[0].replace(b"greedy", b"gr\xe5edy", 1), kept[1].replace(b'"', b"\x22\x22", 1), b"[1, 2]\n", b"3\n",
           kept[2].replace(b'"step"', b'"stdp"', 1)]
    path.write_bytes(b"".join([*bad, *kept[2:]]))
    status, text, error = report(finished, *RUN, "--resume")
    assert status == 0, error
    said = [re.sub(r"\S*/\S*", "", line) for line in text.splitlines() if "metrics.jsonl" in line]
    assert any(re.search(r"\b(5|five)\b", line) for line in said), text
    assert [untimed(line) for line in metrics(finished)] == [untimed(line) for line in metrics(whole)[2:]]


def test_8_renamed_metrics(finished, pictures):
    """Keys in which a bit has flipped do not end a run, though the lines are metrics: it goes on, to its end."""
    cut_back(finished, 2)
    path = out(finished) / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for i, key in enumerate(("pass@1_error", "entropy", "greedy_error", "completion_length")):
        assert f'"{key}"' in lines[i]
        lines[i] = lines[i].replace(f'"{key}"', f'"{key[:-1]}{chr(ord(key[-1]) ^ 1)}"')
    path.write_text("".join(lines))
    status, text, error = report(finished, *RUN, "--resume")
    assert status == 0 and weights(finished, STEPS), error


def test_8_a_saved_flag_that_is_not_known(base, monkeypatch):
    """A flag of another version's run is passed over in a line that names it."""
    metadata = next(f for f in fields(chat_rl.Flags) if f.name == "top_k").metadata
    more = make_dataclass("Flags", [("old_flag", "int", field(default=3, metadata=metadata))], bases=(chat_rl.Flags,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_rl, "Flags", more)
        assert report(base, *RUN)[0] == 0
    cut_back(base, 2)
    status, text, error = report(base, *RUN, "--resume")
    assert status == 0, error
    assert re.search("old[-_]flag", text + error) and gpt.checkpoint_steps(out(base)) == [1, 2, 3]


# ----------------------------------------------------------------------------------------------------------------------
# 10, 11 and 13 to 15. Flags, environments, memory, errors and numbers


def test_10_epochs_of_the_starter(base):
    """--num-epochs on the command line wins over the starter's number of steps."""
    copies(base, "starter")
    data = write_data(base / "data", gsm8k_rows(8), gsm8k_rows(4))
    flags = ["--model-tag=starter", "--task=gsm8k", f"--data={data}", "--num-epochs=2", "--max-new-tokens=6",
             "--num-samples=2", "--examples-per-step=4", "--device-batch-size=2"]
    status, text, error = report(base, *flags)
    assert status == 0, error
    assert [line["step"] for line in metrics(base, "starter") if "reward" in line] == [0, 1, 2, 3]


def test_11_world_size_without_rank(base, monkeypatch):
    """WORLD_SIZE alone, as some clusters set it, is no run on many ranks; at the worst it is refused in a line."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, text, error = report(base, *SMALL, "--max-steps=1")
    if status == 2:
        assert error.count("\n") == 1 and "WORLD_SIZE" in error
    else:
        assert status == 0 and len(metrics(base)) == 3, error


@pytest.fixture
def nothing_old() -> Iterator[None]:
    """For gc there is nothing but what comes: all that pytest and torch have made takes long to look through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def held() -> int:
    """Bytes of all tensors that this process holds, but for frozen ones."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.device.type == "cpu"]
    storages = [x.untyped_storage() for x in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_13_a_training_state_is_not_held(base, monkeypatch, nothing_old):
    """Once it goes on, a resumed run, here of a model with a bfloat16 table, holds no more tensors than one that was never
    interrupted."""
    path = base / "chatsft_checkpoints" / "adder" / "model_000150.pt"
    meta = path.with_name("meta_000150.json")
    model = torch.load(path, weights_only=True)
    torch.save(model | {"transformer.wte.weight": model["transformer.wte.weight"].bfloat16()}, path)
    meta.write_text(json.dumps({key: x for key, x in json.loads(meta.read_text()).items() if key not in ("sha256", "seal")}))
    del model
    save, sizes, flags = torch.save, [], [*RUN, "--save-every=2"]
    monkeypatch.setattr(torch, "save", lambda *args, **more: sizes.append(held()) or save(*args, **more))
    assert report(base, *flags)[0] == 0
    saves = len(sizes)
    cut_back(base, 2)
    assert report(base, *flags, "--resume")[0] == 0
    assert len(sizes) > saves and sizes[-1] < sizes[saves - 1] + 10_000, sizes


def test_14_not_every_error_is_the_disk(base, monkeypatch):
    """A save for which there is no memory does not blame the disk; a full disk is named, however torch says it."""
    def memory(*args: Any, **more: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes")

    def disk(*args: Any, **more: Any) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")  # noqa: B904

    for save in (disk, memory):
        monkeypatch.setattr(torch, "save", save)
        try:
            status, text, error = report(base, *RUN)
        except RuntimeError as unexpected:
            status, error = 1, str(unexpected)
        assert status == 1 and ("mend that" in error) == (save is disk), error
        assert ("No space left" if save is disk else "allocate") in error


NUMBERS = {"#### 1..5": None, "#### 12abc": "12", "#### 3/4": "3", "#### **5**": None, "#### 1.2.3": None, "#### ..5": None,
           "#### 1.5": "1.5", "#### .5": "0.5", "#### -3": "-3", "#### $1,000.00": "1000", "#### 7.": "7",
           "#### 4 #### 5": "5", "5": None, "#### five": None}


def solves(answer: str, text: str) -> bool:
    """Whether a text is an answer to a GSM8K question whose answer ends in a number."""
    task, answer = chat_rl.TASKS["gsm8k"], f"It is so.\n#### {answer}"
    if hasattr(task, "grader"):
        return task.grader(answer, text) == 1
    return task.reward(object.__new__(task), {"answer": answer}, text) == 1


@pytest.mark.parametrize("text", NUMBERS)
def test_15_numbers(text):
    """Which number, if any, a text gives as its answer."""
    candidates = {*NUMBERS.values(), *"0123456789", "12", "15", "0.75", "123", "1.2", "10"} - {None}
    assert {answer for answer in candidates if solves(answer, text)} == ({NUMBERS[text]} - {None})


# ----------------------------------------------------------------------------------------------------------------------
# 9, 12 and 16. Terminals, signals and ranks: all of them in forks of one process

# Runs chat_rl.py as a program in a fork for each of argv[1], a list of [code to run before, flags], all at once. What fork
# i prints is in <i>.out and <i>.err; the exit statuses are in statuses.
FORKS = """
import json, os, runpy, signal, sys, threading, time
from pathlib import Path
script = os.environ["ROOT"] + "/chat_rl.py"
sys.path.insert(0, os.environ["ROOT"])
import torch, chat_rl
pids = []
for i, (code, flags) in enumerate(json.loads(sys.argv[1])):
    pids.append(os.fork())
    if not pids[-1]:
        signal.alarm(200)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{i}.{name}", os.O_CREAT | os.O_WRONLY), number)
        sys.argv = [script, *flags]
        exec(code)
        runpy.run_path(script, run_name="__main__")
        sys.exit(99)
statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
Path("statuses").write_text(json.dumps(statuses))
"""

# Sends SIGHUP after the first step.
HANG_UP = """
def hang_up(path):
    while not path.exists() or '"reward"' not in path.read_text():
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGHUP)

path = Path(os.environ["NANOCHAT_BASE_DIR"], "chatrl_checkpoints", flags[-1].partition("=")[2], "metrics.jsonl")
signal.signal(signal.SIGHUP, signal.{})
threading.Thread(target=hang_up, args=(path,), daemon=True).start()
"""

# Rank 1 takes half a second longer to sample than rank 0, which takes longer than that to save.
RANK = """
os.environ.update(RANK="{rank}", LOCAL_RANK="{rank}", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT="{port}")
place = getattr(chat_rl.gpt, "Sampler", chat_rl.gpt)
generate, save = place.generate, torch.save

def slow_generate(*args, **more):
    time.sleep(0.5 * {rank})
    return generate(*args, **more)

def slow_save(*args, **more):
    time.sleep(0.4)
    return save(*args, **more)

place.generate, torch.save = slow_generate, slow_save
"""

STDOUT = "sys.stdout = sys.__stdout__ = open(1, 'w', encoding='utf-8', closefd=False); "
NO_TERMINAL = {
    "ascii": STDOUT.replace("utf-8", "ascii"),
    "closed": "os.close(1); sys.stdout = sys.__stdout__ = None",
    "full": "os.dup2(os.open('/dev/full', os.O_WRONLY), 1); " + STDOUT,
    "pipe": "ends = os.pipe(); os.dup2(ends[1], 1); [os.close(end) for end in ends]; " + STDOUT}
SSH_STEPS, NOHUP_STEPS, RANKS_STEPS = 300, 6, 2


@pytest.fixture(scope="module")
def forked(adder_base, tmp_path_factory) -> tuple[Path, dict[str, tuple[int, str, str]]]:
    """A base folder, and the exit status, stdout and stderr of each run in it, by its name: its tag and, where there are
    ranks, the rank."""
    base = Path(shutil.copytree(adder_base, tmp_path_factory.mktemp("forked") / "base"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cases = {kind: (code, ["--max-steps=1"]) for kind, code in NO_TERMINAL.items()}
    cases["ssh"] = HANG_UP.format("SIG_DFL"), [f"--max-steps={SSH_STEPS}"]
    cases["nohup"] = HANG_UP.format("SIG_IGN"), [f"--max-steps={NOHUP_STEPS}"]
    for rank in range(2):
        cases[f"ranks{rank}"] = RANK.format(rank=rank, port=port), [f"--max-steps={RANKS_STEPS}", "--save-every=1"]
    tags = [name.strip("01") for name in cases]
    copies(base, *dict.fromkeys(tags))
    runs = [[code, [*SMALL, *flags, f"--model-tag={tag}"]] for tag, (code, flags) in zip(tags, cases.values())]
    (base / "forks.py").write_text(FORKS)
    run(base, json.dumps(runs), script=base / "forks.py")
    statuses = json.loads((base / "statuses").read_text())
    said = [[(base / f"{i}.{name}").read_text() for name in ("out", "err")] for i in range(len(runs))]
    return base, {name: (status, *texts) for name, status, texts in zip(cases, statuses, said)}


@pytest.mark.parametrize("kind", NO_TERMINAL)
def test_9_no_terminal(forked, kind):
    """A run ends and saves where stdout is ASCII, closed, a full disk or a pipe that nobody reads."""
    base, reports = forked
    status, text, error = reports[kind]
    assert status == 0 and "Traceback" not in error and "Exception ignored" not in error, error
    assert weights(base, 1, kind) and len(metrics(base, kind)) == 3
    assert kind != "ascii" or text.isascii() and "pass@1" in text and str(out(base, kind)) in text


def test_12_a_closed_session(forked):
    """SIGHUP ends a run as SIGTERM does, with its last step saved, unless it was ignored from the start, as under nohup."""
    base, reports = forked
    status, text, error = reports["ssh"]
    assert status == 0 and "Traceback" not in error and "--resume" in text, (status, text, error)
    done = [line["step"] for line in metrics(base, "ssh") if "reward" in line]
    assert gpt.checkpoint_steps(out(base, "ssh")) == [done[-1] + 1] and len(done) < SSH_STEPS
    assert reports["nohup"][0] == 0 and gpt.checkpoint_steps(out(base, "nohup")) == [NOHUP_STEPS]


def test_16_tokens_per_second_of_many_ranks(forked):
    """The tokens of all ranks are divided by the time of the slowest, also where rank 0 comes later, from a save."""
    base, reports = forked
    assert reports["ranks0"][0] == reports["ranks1"][0] == 0, reports
    lines = [line for line in metrics(base, "ranks") if "reward" in line]
    assert len(lines) == RANKS_STEPS
    for line in lines:
        assert line["tokens_per_second"] <= line["completion_length"] * 8 * 8 / 0.5 * 1.01, line
