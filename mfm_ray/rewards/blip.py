"""ImageReward's network: BLIP's image encoder, its text encoder that attends to the image, and a linear head.

    reward = (head(text encoder(tokens; image encoder(pixels)) at [CLS]) - mean) / std

Read into transformers' BlipVisionModel and BlipTextModel, which compute the same with other names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfm_ray.errors import InputError
from mfm_ray.hub import local_folder
from mfm_ray.rewards.weights import count_layers, filled, read_tensors, shape_of

TOKENIZER_FILES = ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
_HEAD = 64
_UNUSED = (
    "blip.vision_proj.",
    "blip.text_proj.",
    "blip.text_encoder.pooler.",
    "blip.text_encoder.embeddings.position_ids",
)
"""Of BLIP's pretraining: the reward does not read them, and its files hold them."""
_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
}
_VISION_LAYER = {
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "attn.qkv.": "self_attn.qkv.",
    "attn.proj.": "self_attn.projection.",
    "mlp.": "mlp.",
}


class Blip(nn.Module):
    """The three parts, frozen, and the tokenizer. image_size: of what the image encoder sees."""

    def __init__(self, vision: nn.Module, text: nn.Module, head: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.vision, self.text, self.head, self._tokenizer = vision, text, head, tokenizer
        self.image_size = int(vision.config.image_size)  # type: ignore[union-attr,arg-type]

    def tokens(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Tokens and mask, (35,) each; a longer prompt is cut."""
        told = self._tokenizer(
            [prompt], padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        device = next(self.parameters()).device
        return told["input_ids"][0].to(device), told["attention_mask"][0].to(device)

    def reward(self, pixels: Tensor, texts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """(N,) of normalised pixels (N, 3, size, size) and N texts of `tokens`."""
        seen = self.vision(pixels).last_hidden_state
        ids, mask = (torch.stack(parts) for parts in zip(*texts, strict=True))
        read = self.text(
            ids,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        )
        return (self.head(read.last_hidden_state[:, 0]).squeeze(1) - MEAN) / STD


def linear_head(tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The head of ImageReward and of the aesthetic score. InputError for names or shapes that differ.

    Linear(D, 1024), (1024, 128), (128, 64), (64, 16), (16, 1), named `layers.0`, `.2`, `.4`, `.6`, `.7` for the dropout
    that was between them; there is nothing else between them.
    """
    _, width = shape_of(tensors, "layers.0.weight", 2, path)
    return filled(lambda: _Head(width), tensors, path)


class _Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (width, 1024, 128, 64, 16, 1)
        linear = [nn.Linear(one, other) for one, other in pairwise(sizes)]
        gaps = [nn.Identity() for _ in range(3)]
        self.layers = nn.Sequential(linear[0], gaps[0], linear[1], gaps[1], linear[2], gaps[2], linear[3], linear[4])

    def forward(self, features: Tensor) -> Tensor:
        scored: Tensor = self.layers(features)
        return scored


def read_blip(path: Path, *, tokenizer: str | Path, key: str) -> Blip:
    """The network of ImageReward.pt, or of model.safetensors as RE-N-Y/ImageReward packs it. InputError."""
    tensors = {name: tensor for name, tensor in read_tensors(path).items() if not name.startswith(_UNUSED)}
    parts: dict[str, dict[str, Tensor]] = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.": {}}
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in parts if name.startswith(prefix)), None)
        if prefix is None:
            raise InputError(f"{path}: unknown {name}")
        parts[prefix][name.removeprefix(prefix)] = tensor
    seen, read, head = parts.values()
    vision, text = _vision(seen, path), _text(read, path)
    rows, _ = shape_of(read, "embeddings.word_embeddings.weight", 2, path)
    return Blip(vision, text, linear_head(head, path), bert_tokenizer(tokenizer, key=key, rows=rows))


def bert_tokenizer(source: str | Path, *, key: str, rows: int) -> Any:
    """bert-base-uncased's WordPiece of a folder with vocab.txt, with BLIP's two tokens more. InputError."""
    import transformers

    folder = local_folder(source, key=key, files=TOKENIZER_FILES)
    if not (folder / "vocab.txt").is_file():
        raise InputError(f"{key}={source}: vocab.txt is missing; name a folder with that of bert-base-uncased")
    vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    if missing := [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in vocabulary]:
        raise InputError(f"{key}={source}: vocab.txt has no {missing[0]}")
    tokenizer = transformers.BertTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, do_lower_case=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    if len(tokenizer) > rows:
        raise InputError(f"{key}={source}: the tokenizer has {len(tokenizer)} tokens, the network {rows}")
    return tokenizer


def _vision(tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    from transformers import BlipVisionConfig, BlipVisionModel

    width, _, patch, _ = shape_of(tensors, "patch_embed.proj.weight", 4, path)
    _, positions, _ = shape_of(tensors, "pos_embed", 3, path)
    hidden, _ = shape_of(tensors, "blocks.0.mlp.fc1.weight", 2, path)
    if width % _HEAD:
        raise InputError(f"{path}: image encoder of width {width}, expected a multiple of {_HEAD}")
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=count_layers(tensors, "blocks.", path),
        num_attention_heads=width // _HEAD,
        image_size=patch * round((positions - 1) ** 0.5),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    return filled(lambda: BlipVisionModel(config), {_vision_name(name): t for name, t in tensors.items()}, path)


def _vision_name(name: str) -> str:
    if name.startswith("blocks."):
        _, number, rest = name.split(".", 2)
        for theirs, ours in _VISION_LAYER.items():
            if rest.startswith(theirs):
                return f"encoder.layers.{number}.{ours}{rest.removeprefix(theirs)}"
    for theirs, ours in _VISION.items():
        if name == theirs or (theirs.endswith(".") and name.startswith(theirs)):
            return ours + name.removeprefix(theirs)
    return name


def _text(tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vocabulary, width = shape_of(tensors, "embeddings.word_embeddings.weight", 2, path)
    length, _ = shape_of(tensors, "embeddings.position_embeddings.weight", 2, path)
    hidden, _ = shape_of(tensors, "encoder.layer.0.intermediate.dense.weight", 2, path)
    _, image_width = shape_of(tensors, "encoder.layer.0.crossattention.self.key.weight", 2, path)
    if width % _HEAD or length < MAX_TOKENS:
        raise InputError(f"{path}: text encoder of width {width} for {length} tokens, expected a multiple of {_HEAD}")
    config = BlipTextConfig(
        hidden_size=width,
        encoder_hidden_size=image_width,
        intermediate_size=hidden,
        num_hidden_layers=count_layers(tensors, "encoder.layer.", path),
        num_attention_heads=width // _HEAD,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # what gives its layers cross-attention; it is called as an encoder
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
        pad_token_id=0,
    )
    return filled(lambda: BlipTextModel(config, add_pooling_layer=False), tensors, path)
