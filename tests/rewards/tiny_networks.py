"""Prompt rewards with tiny random weights, in the true file layouts: what tests read in the place of gigabytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

SIZES = ((256, 256), (200, 300), (300, 231), (224, 224), (223, 100), (64, 64), (8, 8), (50, 33))
PROMPTS = ("a photo of a tabby cat", "dog")
"""What the reference numbers are of (`upstream_reference.py`)."""
WORDS = ("a", "cat", "dog", "photo", "of", "tabby", "##by", ",", ".")


def clip_tokenizer(folder: Path) -> int:
    """CLIP's byte pairs without merges but one: vocab.json and merges.txt. Returns the number of tokens."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    letters = [chr(byte) for byte in plain] + [chr(256 + index) for index in range(len(rest))]
    merges = ["c a", "ca t</w>"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return len(tokens)


def clip_config(vocabulary: int, *, image_size: int = 224, act: str = "gelu") -> dict[str, Any]:
    """A CLIPConfig with the ViT-H-14's proportions of heads, tiny in all else."""
    return {
        "model_type": "clip",
        "projection_dim": 768,  # what the aesthetic head takes
        "logit_scale_init_value": 2.6592,
        "vision_config": {
            "hidden_size": 160,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": image_size,
            "patch_size": 14,
            "hidden_act": act,
        },
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "vocab_size": vocabulary,
            "max_position_embeddings": 77,
            "hidden_act": act,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": 2,  # as the published descriptions have it: the end is then the largest token
            "pad_token_id": vocabulary - 1,
        },
    }


def randomised(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights of a size at which every part matters, none of them at its special first value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.dim() > 0:
                own = 1.0 if name.endswith("norm.weight") else 0.0
                weight.copy_(own + 0.1 * torch.randn(weight.shape, generator=generator))
    return network.eval()


def clip_folder(folder: Path, *, image_size: int = 224, act: str = "gelu", binary: bool = False) -> Any:
    """A transformers folder with tokenizer; returns the network."""
    from transformers import CLIPConfig, CLIPModel

    config = clip_config(clip_tokenizer(folder), image_size=image_size, act=act)
    network = randomised(CLIPModel(CLIPConfig.from_dict(config)))
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    if binary:
        numbers = torch.arange(77).expand(1, -1)
        torch.save({**weights, "text_model.embeddings.position_ids": numbers}, folder / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(weights, folder / "model.safetensors")
    return network


def open_clip_weights(network: Any) -> dict[str, Tensor]:
    """The same weights in OpenCLIP's names and layouts, written independently of the conversion that is tested."""
    weights = network.state_dict()
    theirs = {
        "logit_scale": weights["logit_scale"],
        "positional_embedding": weights["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": weights["text_model.embeddings.token_embedding.weight"],
        "text_projection": weights["text_projection.weight"].T.contiguous(),
        "ln_final.weight": weights["text_model.final_layer_norm.weight"],
        "ln_final.bias": weights["text_model.final_layer_norm.bias"],
        "visual.class_embedding": weights["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": weights["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": weights["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": weights["visual_projection.weight"].T.contiguous(),
    }
    for kind in ("weight", "bias"):
        theirs[f"visual.ln_pre.{kind}"] = weights[f"vision_model.pre_layrnorm.{kind}"]
        theirs[f"visual.ln_post.{kind}"] = weights[f"vision_model.post_layernorm.{kind}"]
    for tower, own in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        for layer in range(2):
            block, ours = f"{tower}.resblocks.{layer}", f"{own}.encoder.layers.{layer}"
            for kind in ("weight", "bias"):
                parts = [weights[f"{ours}.self_attn.{one}_proj.{kind}"] for one in "qkv"]
                theirs[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
                theirs[f"{block}.attn.out_proj.{kind}"] = weights[f"{ours}.self_attn.out_proj.{kind}"]
                theirs[f"{block}.ln_1.{kind}"] = weights[f"{ours}.layer_norm1.{kind}"]
                theirs[f"{block}.ln_2.{kind}"] = weights[f"{ours}.layer_norm2.{kind}"]
                theirs[f"{block}.mlp.c_fc.{kind}"] = weights[f"{ours}.mlp.fc1.{kind}"]
                theirs[f"{block}.mlp.c_proj.{kind}"] = weights[f"{ours}.mlp.fc2.{kind}"]
    return theirs


def hpsv2_folder(folder: Path, *, image_size: int = 224, packed: bool = False) -> Any:
    """xswu/HPSv2's file (or RE-N-Y/hpsv21's), and the tokenizer; returns the network as transformers has it."""
    from transformers import CLIPConfig, CLIPModel

    config = clip_config(clip_tokenizer(folder), image_size=image_size)
    network = randomised(CLIPModel(CLIPConfig.from_dict(config)))
    weights = open_clip_weights(network)
    if packed:
        safetensors.torch.save_file({f"model.{k}": v.clone() for k, v in weights.items()}, folder / "model.safetensors")
    else:
        torch.save({"epoch": 1, "state_dict": weights}, folder / "HPS_v2.1_compressed.pt")
    return network


def head_weights(width: int = 768, *, seed: int = 3) -> dict[str, Tensor]:
    """`layers.N.weight` and `.bias` of the five linear maps."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    weights = {}
    for number, (rows, columns) in sizes.items():
        weights[f"layers.{number}.weight"] = torch.randn(rows, columns, generator=generator) / columns**0.5
        weights[f"layers.{number}.bias"] = 0.1 * torch.randn(rows, generator=generator)
    return weights


def aesthetic_folder(folder: Path) -> dict[str, Tensor]:
    folder.mkdir(parents=True, exist_ok=True)
    weights = head_weights()
    torch.save(weights, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return weights


def image_reward_weights(*, vocabulary: int, image_size: int = 224, seed: int = 5) -> dict[str, Tensor]:
    """Names and layouts of ImageReward.pt; width 128 with two heads of 64, two layers, patches of 16."""
    generator = torch.Generator().manual_seed(seed)
    vision, text, hidden, patch = 128, 64, 96, 16
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, vision),
        "blip.visual_encoder.pos_embed": (1, 1 + (image_size // patch) ** 2, vision),
        "blip.visual_encoder.patch_embed.proj.weight": (vision, 3, patch, patch),
        "blip.visual_encoder.patch_embed.proj.bias": (vision,),
        "blip.visual_encoder.norm.weight": (vision,),
        "blip.visual_encoder.norm.bias": (vision,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (vocabulary, text),
        "blip.text_encoder.embeddings.position_embeddings.weight": (64, text),
        "blip.text_encoder.embeddings.LayerNorm.weight": (text,),
        "blip.text_encoder.embeddings.LayerNorm.bias": (text,),
        "blip.vision_proj.weight": (32, vision),
        "blip.vision_proj.bias": (32,),
        "blip.text_proj.weight": (32, text),
        "blip.text_proj.bias": (32,),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    for layer in range(2):
        block = f"blip.visual_encoder.blocks.{layer}"
        norm(f"{block}.norm1", vision)
        norm(f"{block}.norm2", vision)
        linear(f"{block}.attn.qkv", 3 * vision, vision)
        linear(f"{block}.attn.proj", vision, vision)
        linear(f"{block}.mlp.fc1", hidden, vision)
        linear(f"{block}.mlp.fc2", vision, hidden)
        block = f"blip.text_encoder.encoder.layer.{layer}"
        for attention, seen in (("attention", text), ("crossattention", vision)):
            linear(f"{block}.{attention}.self.query", text, text)
            linear(f"{block}.{attention}.self.key", text, seen)
            linear(f"{block}.{attention}.self.value", text, seen)
            linear(f"{block}.{attention}.output.dense", text, text)
            norm(f"{block}.{attention}.output.LayerNorm", text)
        linear(f"{block}.intermediate.dense", hidden, text)
        linear(f"{block}.output.dense", text, hidden)
        norm(f"{block}.output.LayerNorm", text)
    weights = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in weights:
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "LayerNorm.weight")):
            weights[name] += 1
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(64).expand(1, -1).clone()
    return {**weights, **{f"mlp.{name}": tensor for name, tensor in head_weights(text).items()}}


def bert_tokenizer(folder: Path) -> int:
    """vocab.txt of a few words. Returns the number of tokens, BLIP's two among them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return len(tokens) + 2


def image_reward_folder(folder: Path, *, image_size: int = 224, packed: bool = False) -> dict[str, Tensor]:
    """THUDM/ImageReward's file (or RE-N-Y/ImageReward's), with a tokenizer beside it."""
    weights = image_reward_weights(vocabulary=bert_tokenizer(folder), image_size=image_size)
    if packed:
        safetensors.torch.save_file(weights, folder / "model.safetensors")
    else:
        torch.save(weights, folder / "ImageReward.pt")
    return weights


def waves(height: int, width: int) -> Tensor:
    """Two images with waves of several lengths, overshooting [0, 1] where resizing sharpens."""
    y, x = torch.linspace(0, 1, height).view(-1, 1), torch.linspace(0, 1, width).view(1, -1)
    waves = [torch.sin(2 * torch.pi * (3 * k * x + 5 * y / k) + k) * 0.5 + 0.5 for k in (1, 2, 3, 4, 5, 6)]
    return torch.stack(waves).view(2, 3, height, width)


def sampled(pixels: Tensor) -> list[float]:
    """A few entries, enough to see any shift: each 2999th."""
    return [round(float(value), 7) for value in pixels.flatten()[::2999]]
