"""The parameters of well-known models, as published: names and shapes, from which to plan without building the model.

GPT-2: Radford et al. 2019 (q, k and v fused; here stored (out, in)). Llama 3: Dubey et al. 2024 (arXiv 2407.21783).
Mixtral: Jiang et al. 2024 (arXiv 2401.04088). Kimi K2: arXiv 2507.20534. Experts are banks (experts, out, in), one parameter
per layer and projection. Data only: the command line lists the names without torch.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]

EMBEDDINGS = ("token_embedding.weight", "position_embedding.weight")
HEAD = "lm_head.weight"


def _gpt2(layers: int, width: int) -> Named:
    yield "token_embedding.weight", (50257, width)  # the head is tied to it
    yield "position_embedding.weight", (1024, width)
    for layer in range(layers):
        at = f"layers.{layer}"
        for name, out, into in (
            ("attention.qkv", 3 * width, width),
            ("attention.out", width, width),
            ("mlp.up", 4 * width, width),
            ("mlp.down", width, 4 * width),
        ):
            yield f"{at}.{name}.weight", (out, into)
            yield f"{at}.{name}.bias", (out,)
        yield from _norms(at, width, "weight", "bias")
    yield "norm.weight", (width,)
    yield "norm.bias", (width,)


def _llama(layers: int, width: int, key_value: int, inner: int, vocabulary: int, experts: int = 0) -> Named:
    yield "token_embedding.weight", (vocabulary, width)
    for layer in range(layers):
        at = f"layers.{layer}"
        for name, rows in (("q", width), ("k", key_value), ("v", key_value), ("out", width)):
            yield f"{at}.attention.{name}.weight", (rows, width)
        yield from _experts(at, experts, width, inner) if experts else _swiglu(f"{at}.mlp", width, inner)
        yield from _norms(at, width, "weight")
    yield "norm.weight", (width,)
    yield HEAD, (vocabulary, width)


def _kimi_k2() -> Named:
    """Kimi K2: 61 layers, the first with a dense MLP; latent attention of 64 heads (128 + 64 for q and k, 128 for v)."""
    width, heads, query_rank, key_value_rank, inner = 7168, 64, 1536, 512, 2048
    yield "token_embedding.weight", (163840, width)
    for layer in range(61):
        at = f"layers.{layer}"
        yield f"{at}.attention.q_down.weight", (query_rank, width)
        yield f"{at}.attention.q_up.weight", (heads * (128 + 64), query_rank)
        yield f"{at}.attention.kv_down.weight", (key_value_rank + 64, width)
        yield f"{at}.attention.kv_up.weight", (heads * (128 + 128), key_value_rank)
        yield f"{at}.attention.out.weight", (width, heads * 128)
        yield f"{at}.attention.q_norm.weight", (query_rank,)
        yield f"{at}.attention.kv_norm.weight", (key_value_rank,)
        if layer == 0:
            yield from _swiglu(f"{at}.mlp", width, 18432)
        else:
            yield from _experts(at, 384, width, inner)
            yield from _swiglu(f"{at}.shared", width, inner)
        yield from _norms(at, width, "weight")
    yield "norm.weight", (width,)
    yield HEAD, (163840, width)


def _swiglu(at: str, width: int, inner: int) -> Named:
    yield f"{at}.gate.weight", (inner, width)
    yield f"{at}.up.weight", (inner, width)
    yield f"{at}.down.weight", (width, inner)


def _experts(at: str, experts: int, width: int, inner: int) -> Named:
    yield f"{at}.router.weight", (experts, width)
    yield f"{at}.experts.gate", (experts, inner, width)
    yield f"{at}.experts.up", (experts, inner, width)
    yield f"{at}.experts.down", (experts, width, inner)


def _norms(at: str, width: int, *kinds: str) -> Named:
    for norm in ("attention_norm", "mlp_norm"):
        for kind in kinds:
            yield f"{at}.{norm}.{kind}", (width,)


MODEL_SHAPES: Mapping[str, tuple[tuple[str, Shape], ...]] = MappingProxyType(
    {
        "gpt2": tuple(_gpt2(12, 768)),
        "gpt2-medium": tuple(_gpt2(24, 1024)),
        "gpt2-large": tuple(_gpt2(36, 1280)),
        "gpt2-xl": tuple(_gpt2(48, 1600)),
        "llama3-8b": tuple(_llama(32, 4096, 1024, 14336, 128256)),
        "llama3-70b": tuple(_llama(80, 8192, 1024, 28672, 128256)),
        "mixtral-8x7b": tuple(_llama(32, 4096, 1024, 14336, 32000, experts=8)),
        "kimi-k2": tuple(_kimi_k2()),
    }
)

# (layers, heads times width of a head: the mean of q's and v's, share of the experts that a token is sent to)
MODEL_GEOMETRY: Mapping[str, tuple[int, int, float]] = MappingProxyType(
    {
        "gpt2": (12, 768, 1.0),
        "gpt2-medium": (24, 1024, 1.0),
        "gpt2-large": (36, 1280, 1.0),
        "gpt2-xl": (48, 1600, 1.0),
        "llama3-8b": (32, 4096, 1.0),
        "llama3-70b": (80, 8192, 1.0),
        "mixtral-8x7b": (32, 4096, 2 / 8),
        "kimi-k2": (61, 64 * (192 + 128) // 2, 8 / 384),
    }
)
