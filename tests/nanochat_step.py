"""nanochat's own RL step against this project's, by turns: the same checkpoint and questions of GSM8K, float32, on a CPU.

    git clone https://github.com/karpathy/nanochat && pip install rustbpe
    python tests/nanochat_step.py NANOCHAT_REPO CHECKPOINT_FOLDER [--data=FOLDER] [flags that both have: --num-samples=8]

NANOCHAT_REPO is of the checkpoint's generation. Its scripts/chat_rl.py runs as it is, but is handed the data, and evaluates
and prints nothing. Step 0, in which it compiles its optimizer, is not to be counted. nanochat learns from all completions, this
project from those with an advantage (run: their share of the tokens), in the last step from all of them too: the same work.
"""
import os
import runpy
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import datasets  # noqa: E402
import torch  # noqa: E402

import chat_rl  # noqa: E402
import gpt  # noqa: E402

HEAD = f"step  sampling, tokens/s: nanochat, here, ratio{'':5}whole step, s: nanochat, here, ratio{'':5}tokens{'':13}rewards{'':8}run"


def main(repo: Path, folder: Path, argv: list[str], base: Path, steps: int = 4) -> None:
    flags, theirs = chat_rl.settle_flags([*argv, "--dtype=float32"], "nanochat"), Counter(begun=time.perf_counter())
    (model, tokenizer), records, size = gpt.load_checkpoint(folder), chat_rl.load_records(flags.data), flags.examples_per_step
    examples = chat_rl.load_examples(flags, tokenizer, 2048, flags.data, "train")
    run = chat_rl.Run(flags, examples, {}, tokenizer, base, len(examples) // size, "", "", 0)
    learner = chat_rl.make_learner(run, model, {}, gpt.Ranks(torch.device("cpu")))
    chat_rl.questions_of_step = lambda run: examples[run.step * size:][:size]             # nanochat's order
    chat_rl.Group.learnable = lambda it: [x for x in zip(it.completions, it.advantages) if x[1] or run.step == steps - 1]
    (base / "chatsft_checkpoints").symlink_to(folder.resolve().parent)
    (base / "tokenizer").mkdir()
    tokenizer.save(base / "tokenizer")
    os.environ |= {"NANOCHAT_BASE_DIR": str(base), "NANOCHAT_DTYPE": "float32"}
    sys.path.insert(0, str(repo))
    from nanochat import common, engine

    def sampled(self, prompt: list[int], sample=engine.Engine.generate_batch, **settings) -> tuple:
        assert prompt in [example.prompt for example in chat_rl.questions_of_step(run)]
        begun = time.perf_counter()
        rows, masks = sample(self, prompt, **settings)
        theirs["sampling"] += time.perf_counter() - begun
        theirs["tokens"] += sum(min(len(row) - len(prompt) + 1, flags.max_new_tokens) for row in rows)  # they lack the end
        return rows, masks

    def log(_, metrics: dict) -> None:
        """In the place of nanochat's: when it has made a step it is our turn."""
        theirs["reward"] += metrics.get("reward", 0)
        if "lrm" in metrics:
            ended = time.perf_counter()
            ours, _ = chat_rl.step(run, learner)
            x, y, n = ended - theirs["begun"], time.perf_counter() - ended, ours["completion_length"] * size * flags.num_samples
            v, w = theirs["tokens"] / theirs["sampling"], n / ours["rollout_seconds"]
            print(f"{run.step:4}{v:25,.0f}{w:9,.0f}{w / v:7.1f}{x:26.2f}{y:9.2f}{x / y:7.1f}{theirs['tokens']:12,}{n:8,.0f}"
                  f"{theirs['reward']:9.3f}{ours['reward']:7.3f}{ours['advantage_tokens']:7.2f}", flush=True)
            run.step += 1
            theirs.clear(), theirs.update(begun=time.perf_counter())
            if run.step == steps:
                sys.exit()

    engine.Engine.generate_batch, common.DummyWandb.log, common.print0 = sampled, log, lambda *_: None
    datasets.load_dataset = lambda *_, split: datasets.Dataset.from_list([*records[split]])
    sys.argv = ["", "--device-type=cpu", f"--model-tag={folder.resolve().name}", "--eval-examples=0",
                *(flag for flag in argv if "--data=" not in flag)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n{HEAD}")
    runpy.run_path(str(repo / "scripts" / "chat_rl.py"), run_name="__main__")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as base:
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:], Path(base))
