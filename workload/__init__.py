"""The small GPT and the byte corpus that train.py, the benchmarks and the tests use."""

from workload.corpus import HEADERS, Corpus, DataError, load_corpus, micro_batch_rows
from workload.gpt import GPT, PRESETS, GPTConfig, build_model

__all__ = ["GPT", "HEADERS", "PRESETS", "Corpus", "DataError", "GPTConfig", "build_model", "load_corpus", "micro_batch_rows"]
