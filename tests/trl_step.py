"""One GRPO step of TRL on the sums that README's recipe learns: 32 questions, 8 samples of up to 8 tokens, adapters of rank 32,
batches of 64, float32, on a CPU.

    pip install trl peft && python tests/trl_step.py FOLDER     # of a Hugging Face model: the seconds of a step
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import chat_rl  # noqa: E402


def main(folder: str) -> None:
    import peft
    import torch
    import transformers
    import trl
    from datasets import Dataset
    rows = [{"prompt": [{"role": "user", "content": row["question"] + " Reply with the number alone."}], "answer": str(row["answer"])}
            for row in chat_rl.make_sums()["train"][:128]]
    config = trl.GRPOConfig(
        use_cpu=True, bf16=False, fp16=False, report_to=[], save_strategy="no", max_steps=1, per_device_train_batch_size=64,
        gradient_accumulation_steps=4, generation_batch_size=256, num_generations=8, max_completion_length=8, beta=0.0, top_k=0,
        scale_rewards="none", loss_type="dapo", gradient_checkpointing=False, output_dir="/tmp/trl_step")
    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), args=config,
        processing_class=transformers.AutoTokenizer.from_pretrained(folder, padding_side="left"), train_dataset=Dataset.from_list(rows),
        reward_funcs=lambda completions, answer, **_: [float(c[0]["content"].strip() == a) for c, a in zip(completions, answer)],
        peft_config=peft.LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    start = time.perf_counter()
    trainer.train()
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1])
