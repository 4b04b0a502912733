"""README: its experiments are applied and run, its tables are held against the code."""
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Callable

import pytest
import torch
from conftest import ROOT, SMALL, metrics, run
from torch.distributed.launcher.api import LaunchConfig

import chat_rl

FLAGS = [*SMALL, "--max-steps=3", "--matrix-lr=1", "--max-new-tokens=4"]
README = (ROOT / "README.md").read_text()
SECTION = README.partition("## Change it")[2].partition("\n## ")[0]
EXPERIMENTS = {title: re.findall(r"```diff\n(.*?)```", part, re.S)
               for title, part in zip(re.findall(r"^\*\*(.+?)\*\*", SECTION, re.M), re.split(r"^\*\*", SECTION, flags=re.M)[1:])}


def apply(diffs: list[str], text: str) -> str:
    """The text with each diff applied, at the one place that it fits."""
    for diff in diffs:
        lines = diff.splitlines()
        old = "\n".join(line[1:] for line in lines if line[0] in " -") + "\n"
        new = "\n".join(line[1:] for line in lines if line[0] in " +") + "\n"
        assert text.count(old) == 1, f"fits {text.count(old)} places:\n{old}"
        text = text.replace(old, new)
    return text


def norms(base: Path) -> list[float]:
    return [line["grad_norm"] for line in metrics(base) if "reward" in line]


@pytest.fixture(scope="module")
def plain_norms(adder_base, tmp_path_factory) -> list[float]:
    """Gradient norms of the file as it is."""
    base = shutil.copytree(adder_base, tmp_path_factory.mktemp("plain") / "base")
    run(base, *FLAGS)
    return norms(base)


@pytest.mark.parametrize("title", EXPERIMENTS)
def test_experiment_runs(title, base, tmp_path, plain_norms):
    """The edited file runs, and does something else than the file as it is."""
    script = tmp_path / "edited" / "chat_rl.py"
    script.parent.mkdir()
    shutil.copy(ROOT / "gpt.py", script.parent)
    script.write_text(apply(EXPERIMENTS[title], (ROOT / "chat_rl.py").read_text()))
    for split in ("train", "test"):
        rows = [{"instruction": f"What is {i} + {i + 1}?", "output": f"So\n#### {2 * i + 1}"} for i in range(10, 30)]
        (base / "my_folder").mkdir(exist_ok=True)
        (base / "my_folder" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(base, *FLAGS, *["--task=mine"] * (title == "A new task"), script=script)
    assert len(norms(base)) == 3 and norms(base) != plain_norms


def test_flags_that_readme_names_are_there():
    """README's commands and texts name no flag that --help does not show."""
    known = {f.name for f in fields(chat_rl.Flags)} | {"help"}
    named = {name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-z][a-z_-]+)", README)}
    assert len(named) > 20 and named - known <= {
        "nproc_per_node", "max_restarts", "nnodes", "node_rank", "master_addr", "transformers", "dist"}


def test_files_that_readme_names_are_there():
    """Pictures and links into the repository lead somewhere."""
    for target in re.findall(r"\]\((?!http)(.+?)\)", README):
        assert (ROOT / target).exists(), target


def test_the_bench_runs(monkeypatch, capsys):
    """All that tests/bench.py measures, each once and on a small model."""
    import bench

    def once(work: Callable, repeat: int = 3) -> float:
        work()
        return 1.0

    for name, value in {"P": 2, "N": 4, "PROMPT": 5, "NEW": 16, "seconds": once}.items():
        monkeypatch.setattr(bench, name, value)
    bench.measure(2, 64, torch.device("cpu"), torch.float32)
    bench.against_transformers(2, 64, torch.device("cpu"), torch.float32)
    said = capsys.readouterr().out
    assert "rollout seconds" in said and "transformers.generate" in said


def test_torchrun_waits_for_a_save(monkeypatch):
    """README's torchrun commands give a save longer than torchrun's 30 s, where torch can, from 2.12 on."""
    name, seconds = re.search(r"^export (\w+)=(\d+).*\ntorchrun ", README, re.M).groups()
    monkeypatch.setenv(name, seconds)
    assert getattr(LaunchConfig(1, 1, 1), "shutdown_timeout", 600) == int(seconds) > 60
