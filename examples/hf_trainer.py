"""Train a small Llama from scratch on bytes in the Hugging Face Trainer, with Muon on whole attention heads.

    deepspeed --num_gpus 2 examples/hf_trainer.py --zero_stage 2

The one line that a script needs is `ds_optforge.register(model)`. Needs `pip install 'ds-optforge[hf]'`. Writes
checkpoints and DIR/metrics.jsonl (`--out DIR`); `--resume CHECKPOINT` resumes from one.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ds_optforge
from workload import load_corpus

HEADS = 4
BATCH = 8  # sequences per rank


def deepspeed_config(zero_stage: int) -> dict[str, Any]:
    """A DeepSpeed configuration whose "auto" values the Trainer fills from TrainingArguments."""
    muon = {
        "name": "muon",
        "lr": "auto",
        "weight_decay": "auto",
        "adamw": {"lr": 0.003, "betas": [0.9, 0.95]},
        "overrides": [{"match": r"[qkv]_proj", "heads": HEADS}],
    }
    schedule = {"name": "cosine", "warmup_num_steps": "auto", "total_num_steps": "auto"}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": zero_stage},
        "optimizer": {"type": "OptForge", "params": muon},
        "scheduler": {"type": "OptForgeSchedule", "params": schedule},
    }


def main() -> None:
    """Train, and write the loss of each step."""
    args = parse_arguments()
    on_cpu = not torch.cuda.is_available()
    if on_cpu:  # else Accelerate counts one process, whatever the launcher started
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
    arguments = TrainingArguments(
        output_dir=args.out,
        deepspeed=deepspeed_config(args.zero_stage),
        accelerator_config={"use_configured_state": on_cpu},
        max_steps=args.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=0.02,
        weight_decay=0.01,
        warmup_steps=args.steps // 20,
        logging_steps=1,
        report_to=[],
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, tie_word_embeddings=True, **shape))
    ds_optforge.register(model)

    corpus = load_corpus(args.data)
    tokens, _ = corpus.batch(0, 0, args.steps * BATCH * arguments.world_size, args.sequence_length)
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tokens])
    trainer.train(resume_from_checkpoint=args.resume)
    if trainer.is_world_process_zero():
        rows = [{"step": entry["step"], "loss": entry["loss"]} for entry in trainer.state.log_history if "loss" in entry]
        Path(args.out, "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.distributed.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    """Parse the command line, whose options are named as in train.py."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--zero_stage", type=int, choices=(1, 2, 3), default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sequence-length", type=int, default=128, help="bytes in a sample")
    parser.add_argument("--data", help="text file, folder or glob (default: the standard library's .py files)")
    parser.add_argument("--out", default="runs/hf_trainer", help="folder for the results")
    parser.add_argument("--resume", help="a checkpoint folder of the Trainer")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    return parser.parse_args()


if __name__ == "__main__":
    main()
