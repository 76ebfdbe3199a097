"""Writes what the frameworks around the HF Trainer read: a Llama of one layer, its tokenizer and a data set.

python -m tests.frameworks.tiny FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(46)]
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
ROWS = 32  # of 4 words each to read and to write: rows of one length, so that every rank has as many tokens as the others


def write(folder: Path) -> None:
    """Write ``model/`` and ``data/``, the data in the forms of all frameworks."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, **special)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=50, num_hidden_layers=1, pad_token_id=0, bos_token_id=2, eos_token_id=3, **shape)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    numbers = torch.randint(len(WORDS), (ROWS, 2, 4), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [[" ".join(WORDS[number] for number in half) for half in row] for row in numbers]
    data = folder / "data"
    data.mkdir()
    alpaca = [{"instruction": first, "input": "", "output": second} for first, second in pairs]
    (data / "alpaca.json").write_text(json.dumps(alpaca))
    (data / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "alpaca.json"}}))
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    (data / "messages.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
