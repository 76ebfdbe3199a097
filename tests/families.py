"""Models of published families at their published sizes, on the meta device, for tests of the routing.

    python tests/families.py            # writes tests/data/families.txt anew

Those of transformers are built from its own classes; the others are written here as small as their parameters allow.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import transformers as hf
from torch import nn

from ds_optforge.integrations.explanation import explained

SNAPSHOT = Path(__file__).parent / "data" / "families.txt"
CONFIG = {"name": "muon", "lr": 0.02, "weight_decay": 0.1, "adamw": {"lr": 0.001}}


class TorchvisionResNet(nn.Module):
    """ResNet-50 as torchvision names it: conv1, layer1 to layer4, fc."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for number, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
            layer = nn.Sequential()
            for block in range(blocks):
                bottleneck = nn.Module()
                bottleneck.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
                bottleneck.bn1 = nn.BatchNorm2d(width)
                bottleneck.conv2 = nn.Conv2d(width, width, 3, bias=False)
                bottleneck.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
                if block == 0:
                    bottleneck.downsample = nn.Sequential(
                        nn.Conv2d(inputs, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
                    )
                layer.append(bottleneck)
                inputs = 4 * width
            setattr(self, f"layer{number}", layer)
        self.fc = nn.Linear(2048, 1000)


class TorchvisionViT(nn.Module):
    """ViT-B/16 as torchvision names it: class_token, encoder.pos_embedding, nn.MultiheadAttention, heads.head."""

    def __init__(self) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, 768))
        self.conv_proj = nn.Conv2d(3, 768, 16)
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.zeros(1, 197, 768))
        self.encoder.layers = nn.Sequential()
        for _ in range(12):
            block = nn.Module()
            block.ln_1 = nn.LayerNorm(768)
            block.self_attention = nn.MultiheadAttention(768, 12)
            block.mlp = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Dropout(), nn.Linear(3072, 768))
            self.encoder.layers.append(block)
        self.encoder.ln = nn.LayerNorm(768)
        self.heads = nn.Sequential()
        self.heads.head = nn.Linear(768, 1000)


class MobileNet(nn.Module):
    """The first blocks of MobileNetV2 as torchvision names it: depthwise convolutions, classifier.1."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 32, 3, bias=False))
        for inputs, width in ((32, 96), (96, 144)):
            block = (nn.Conv2d(inputs, width, 1), nn.Conv2d(width, width, 3, groups=width), nn.BatchNorm2d(width))
            self.features.append(nn.Sequential(*block))
        self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(1280, 1000))


class ResNeXt(nn.Module):
    """A block of ResNeXt-50 32x4d: a convolution of 32 groups; spectral and weight norm beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(128, 128, 3, groups=32, bias=False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(128, 512))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(512, 128))
        self.up = nn.ConvTranspose2d(128, 64, 4, groups=2)
        self.fc = nn.Linear(64, 10)


class LSTMLanguageModel(nn.Module):
    """The word language model of PyTorch's examples, medium (650 units): encoder, LSTM, decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(33278, 650)
        self.rnn = nn.LSTM(650, 650, num_layers=2)
        self.decoder = nn.Linear(650, 33278)


class NanoGPT(nn.Module):
    """nanoGPT's GPT-2 124M: Linears named as GPT-2's, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(50304, 768), "wpe": nn.Embedding(1024, 768)})
        self.transformer["h"] = nn.ModuleList()
        for _ in range(12):
            block = nn.Module()
            block.ln_1 = nn.LayerNorm(768)
            block.attn = nn.Module()
            block.attn.n_head = 12
            block.attn.c_attn = nn.Linear(768, 3 * 768)
            block.attn.c_proj = nn.Linear(768, 768)
            block.mlp = nn.ModuleDict({"c_fc": nn.Linear(768, 3072), "c_proj": nn.Linear(3072, 768)})
            self.transformer["h"].append(block)
        self.lm_head = nn.Linear(768, 50304, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight


class Mamba(nn.Module):
    """Mamba 130M as its authors name it; A_log and D are marked as free of decay."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.embedding = nn.Embedding(50280, 768)
        self.backbone.layers = nn.ModuleList()
        for _ in range(24):
            mixer = nn.Module()
            mixer.in_proj = nn.Linear(768, 3072, bias=False)
            mixer.conv1d = nn.Conv1d(1536, 1536, 4, groups=1536)
            mixer.x_proj = nn.Linear(1536, 80, bias=False)
            mixer.dt_proj = nn.Linear(48, 1536)
            mixer.A_log = nn.Parameter(torch.zeros(1536, 16))
            mixer.D = nn.Parameter(torch.ones(1536))
            mixer.A_log._no_weight_decay = mixer.D._no_weight_decay = True  # type: ignore[attr-defined]
            mixer.out_proj = nn.Linear(1536, 768, bias=False)
            self.backbone.layers.append(nn.ModuleDict({"mixer": mixer, "norm": nn.RMSNorm(768)}))
        self.lm_head = nn.Linear(768, 50280, bias=False)


def _lm(kind: str, **sizes: object) -> nn.Module:
    return hf.AutoModelForCausalLM.from_config(getattr(hf, f"{kind}Config")(**sizes))


def _of(model: str, config: str, **sizes: object) -> nn.Module:
    return getattr(hf, model)(getattr(hf, f"{config}Config")(**sizes))


_LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8}
_BACKBONE = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "Llama 3 8B": partial(_lm, "Llama", **_LLAMA_3, intermediate_size=14336),
    "Llama 3 70B": partial(
        _lm, "Llama", **_LLAMA_3, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64
    ),
    "Llama 4 Scout": partial(_lm, "Llama4Text"),
    "Llama 2 7B, classifier": partial(_of, "LlamaForSequenceClassification", "Llama"),
    "Qwen2 7B": partial(
        _lm,
        "Qwen2",
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "Qwen3 30B-A3B": partial(
        _lm, "Qwen3Moe", num_hidden_layers=48, num_key_value_heads=4, moe_intermediate_size=768, head_dim=128
    ),
    "Qwen3-Next 80B-A3B": partial(_lm, "Qwen3Next"),
    "Qwen2-VL 72B": partial(_of, "Qwen2VLForConditionalGeneration", "Qwen2VL"),
    "Mistral 7B": partial(_lm, "Mistral"),
    "Mixtral 8x7B": partial(_lm, "Mixtral"),
    "Gemma 2 9B": partial(
        _lm,
        "Gemma2",
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
    ),
    "Gemma 3n E4B": partial(_lm, "Gemma3nText"),
    "Phi-3 mini": partial(_lm, "Phi3"),
    "OLMo 2 7B": partial(_lm, "Olmo2", vocab_size=100352),
    "Command R": partial(_lm, "Cohere"),
    "DeepSeek-V3": partial(_lm, "DeepseekV3"),
    "Kimi K2": partial(
        _lm,
        "DeepseekV3",
        vocab_size=163840,
        num_attention_heads=64,
        num_key_value_heads=64,
        n_routed_experts=384,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "gpt-oss 20B": partial(_lm, "GptOss", num_hidden_layers=24, num_local_experts=32),
    "GPT-2": partial(_lm, "GPT2"),
    "GPT-NeoX 20B": partial(_lm, "GPTNeoX"),
    "GPT-J 6B": partial(_lm, "GPTJ"),
    "BLOOM 7B1": partial(_lm, "Bloom", hidden_size=4096, n_layer=30, n_head=32),
    "Falcon 7B": partial(_lm, "Falcon"),
    "Falcon 40B": partial(
        _lm,
        "Falcon",
        hidden_size=8192,
        num_hidden_layers=60,
        num_attention_heads=128,
        num_kv_heads=8,
        new_decoder_architecture=True,
    ),
    "MPT 7B": partial(_lm, "Mpt", d_model=4096, n_heads=32, n_layers=32, vocab_size=50432),
    "OPT 6.7B": partial(
        _lm,
        "OPT",
        hidden_size=4096,
        num_hidden_layers=32,
        ffn_dim=16384,
        num_attention_heads=32,
        word_embed_proj_dim=4096,
    ),
    "RWKV-4 7B": partial(_lm, "Rwkv"),
    "Mamba 2.8B": partial(_lm, "Mamba", hidden_size=2560, num_hidden_layers=64, tie_word_embeddings=False),
    "Codestral Mamba 7B (Mamba-2)": partial(_lm, "Mamba2"),
    "Jamba": partial(_lm, "Jamba"),
    "BERT base, pretraining": partial(_of, "BertForPreTraining", "Bert"),
    "RoBERTa base, classifier": partial(_of, "RobertaForSequenceClassification", "Roberta"),
    "ModernBERT base": partial(_of, "ModernBertForMaskedLM", "ModernBert"),
    "T5 base": partial(_of, "T5ForConditionalGeneration", "T5", d_model=768, d_ff=3072, num_layers=12, num_heads=12),
    "BART large": partial(_of, "BartForConditionalGeneration", "Bart"),
    "Whisper large": partial(
        _of,
        "WhisperForConditionalGeneration",
        "Whisper",
        d_model=1280,
        encoder_layers=32,
        decoder_layers=32,
        encoder_attention_heads=20,
        decoder_attention_heads=20,
        encoder_ffn_dim=5120,
        decoder_ffn_dim=5120,
    ),
    "wav2vec 2.0 base, CTC": partial(_of, "Wav2Vec2ForCTC", "Wav2Vec2"),
    "ViT base": partial(_of, "ViTForImageClassification", "ViT", num_labels=1000),
    "DINOv2 base": partial(_of, "Dinov2ForImageClassification", "Dinov2", num_labels=1000),
    "Swin tiny": partial(_of, "SwinForImageClassification", "Swin", num_labels=1000),
    "ConvNeXt tiny": partial(_of, "ConvNextForImageClassification", "ConvNext", num_labels=1000),
    "SegFormer b0": partial(_of, "SegformerForSemanticSegmentation", "Segformer", num_labels=150),
    "DETR, ResNet-50": lambda: hf.DetrForObjectDetection(
        hf.DetrConfig(**_BACKBONE, backbone_config=hf.ResNetConfig(out_features=["stage4"]), num_labels=91)
    ),
    "CLIP ViT-B/32": partial(_of, "CLIPModel", "CLIP"),
    "BLIP-2": partial(_of, "Blip2ForConditionalGeneration", "Blip2"),
    "Perceiver": partial(_of, "PerceiverForMaskedLM", "Perceiver"),
    "torchvision ResNet-50": TorchvisionResNet,
    "torchvision ViT-B/16": TorchvisionViT,
    "torchvision MobileNet": MobileNet,
    "ResNeXt, norms of weights": ResNeXt,
    "LSTM language model": LSTMLanguageModel,
    "nanoGPT 124M": NanoGPT,
    "Mamba 130M, its authors'": Mamba,
}


def build(family: str) -> nn.Module:
    """Make the model of a family on the meta device."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FAMILIES[family]()


def table(family: str) -> list[str]:
    """What Muon's configuration does to each weight of a family: a line for what is alike in all layers."""
    rows, _ = explained(build(family), CONFIG)
    lines = []
    for row in rows:
        route = row.route
        decay = "decays" if getattr(route.settings, "weight_decay", 0.0) else "-"
        shape = "x".join(map(str, route.shape)) or "()"
        members = f"{len(route.matrices)} of {'x'.join(map(str, route.matrices[0][1:]))}" if len(route.matrices) > 1 else ""
        stored = "stored (in, out)" if route.transposed and route.matrices else ""
        notes = "; ".join(note for note in (route.why, members, stored, route.fused) if note)
        count = f"{row.count} x " if row.count > 1 else ""
        lines.append(f"{route.settings.rule:5} {route.role:11} {decay:6} {row.name}  {count}{shape}  {notes}")
    return lines


def text(families: Iterable[str]) -> str:
    """The tables of these families, one after the other."""
    return "\n".join("\n".join([f"# {family}", *table(family), ""]) for family in families)


if __name__ == "__main__":
    SNAPSHOT.write_text(text(FAMILIES), encoding="utf-8")
    print(f"{SNAPSHOT}: {len(FAMILIES)} families", file=sys.stderr)
