"""A teacher with another tokenizer, on the CPU: it writes digits, the student two digits in one token.

Half of the steps are on the student's own samples, tokenised again for the teacher; the others on answers of the data.
Arguments are overrides of the student's run: `python cross_tokenizer_distillation.py lmbda=0`, or
`loss=sorted_probabilities`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nemo_rl_core.config import finalize, load_config
from nemo_rl_core.models import load_model_config
from nemo_rl_core.training.trainer import Trainer

SMALL = {"learning_rate": 0.01, "policy": {"max_sequence_length": 32, "optimizer": {"eps": 1e-5}}}


def student_of_pairs(folder: Path) -> str:
    """The shape of a tiny model, and a tokenizer of characters and of pairs of digits."""
    folder.mkdir(parents=True, exist_ok=True)
    digits = "0123456789"
    pairs = [(a, b) for a in digits for b in digits]
    vocabulary = ["<eos>", *digits, "+", "=", *(a + b for a, b in pairs)]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, pairs))
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex("[0-9]+|."), "isolated")
    bpe.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    shape = load_model_config("scratch:qwen2-tiny").to_dict()
    shape |= {"vocab_size": len(vocabulary), "eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    return f"scratch:{folder}"


if __name__ == "__main__":
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(5, 10) for b in range(5, 10)]
    steps = {"batch_size": 25, "max_steps": 60, "run_dir": "runs/teacher"}
    teacher = Trainer({**SMALL, **steps, "algorithm": "sft", "model": "scratch:qwen2-tiny"})
    settings = {
        **SMALL,
        "algorithm": "cross_tokenizer_distillation",
        "model": student_of_pairs(Path("runs/student-shape")),
        "teacher": {"model_name": str(teacher.fit(rows).model_path)},
        "lmbda": 0.5,
        "batch_size": 25,
        "generation": {"max_new_tokens": 4},
        "max_steps": 40,
        "run_dir": "runs/student",
    }
    student = Trainer(finalize(load_config(settings, overrides=sys.argv[1:])))
    history = student.fit(rows).history
    for name in sorted({"train/divergence", "train/matched_kl", "train/aligned_fraction"} & history[0].keys()):
        print(f"{name} {history[0][name]:.3f} at first, {sum(step[name] for step in history[-5:]) / 5:.3f} at last")
