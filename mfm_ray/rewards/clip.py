"""CLIP networks as transformers' CLIPModel: read from its own folders, or converted from OpenCLIP's parameter layout.

    features(image), features(text): of length 1;  cosine = their inner product

OpenCLIP and transformers compute the same function with other names: one matrix for queries, keys and values,
projections that multiply from the other side. Texts are read to the end token, and attention is causal, so padding
changes nothing and none is added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mfm_ray.errors import InputError
from mfm_ray.hub import is_hub, local_folder
from mfm_ray.rewards.weights import count_layers, filled, first_file, read_tensors, shape_of, without_prefix

TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CLIP_FILES = ("config.json", "model.safetensors", *TOKENIZER_FILES)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HEAD = 64
_VISION_HEAD_H = 80
_NUMBERS = {"text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"}
"""Buffers 0, 1, ... that files of older releases hold."""


class Clip(nn.Module):
    """A frozen CLIPModel and its tokenizer, None where no text is read. image_size: of what the image encoder sees."""

    def __init__(self, network: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.network, self._tokenizer = network, tokenizer
        self.image_size = int(network.config.vision_config.image_size)  # type: ignore[union-attr,arg-type]
        self._longest = int(network.config.text_config.max_position_embeddings)  # type: ignore[union-attr,arg-type]

    def text_features(self, prompt: str) -> Tensor:
        """(D,), of length 1; a prompt beyond 77 tokens is cut."""
        tokens = self._tokenizer([prompt], truncation=True, max_length=self._longest, return_tensors="pt")["input_ids"]
        device = next(self.network.parameters()).device
        return _unit(self.network.get_text_features(tokens.to(device)).pooler_output)[0]  # type: ignore[operator]

    def image_features(self, pixels: Tensor) -> Tensor:
        """(N, D), of length 1; pixels (N, 3, size, size), normalised."""
        return _unit(self.network.get_image_features(pixels).pooler_output)  # type: ignore[operator]

    def cosine(self, pixels: Tensor, texts: Sequence[Tensor]) -> Tensor:
        """(N,) of pixels and text features, row by row."""
        # elementwise product and sum: unlike a matrix product it gives a row the same bits in every batch
        return (self.image_features(pixels) * torch.stack(list(texts))).sum(1)

    @property
    def logit_scale(self) -> Tensor:
        """exp of the learned scale of cosines."""
        scale: Tensor = self.network.logit_scale.exp()  # type: ignore[operator]
        return scale


def _unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def clip_of_folder(source: str | Path, *, tokenizer: str | Path | None, reads_texts: bool = True) -> Clip:
    """The CLIPModel of a transformers folder: config.json and model.safetensors or pytorch_model.bin.

    A file whose names all begin with `model.`, as RE-N-Y/pickscore packs them, may come without a description; it is
    then a ViT-H-14. tokenizer: folder of vocab.json and merges.txt; None: the same one. reads_texts: whether a
    tokenizer is needed at all. InputError.
    """
    folder = local_folder(source, key="source", files=CLIP_FILES)
    if is_hub(source) and not (folder / _WEIGHTS[0]).is_file():  # gigabytes, which most repositories hold twice
        folder = local_folder(source, key="source", files=(*CLIP_FILES, _WEIGHTS[1]))
    path = first_file(folder, _WEIGHTS, what="CLIPModel")
    tensors = without_prefix(read_tensors(path), "model.")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in _NUMBERS}
    config = _config_of(folder / "config.json")
    if config is None:
        config = _config_from_shapes(tensors, path)
    network = _network(config, tensors, path)
    if not reads_texts:
        return Clip(network, None)
    key = "source" if tokenizer is None else "tokenizer"
    return Clip(network, clip_tokenizer(tokenizer or folder, key=key, rows=_rows(tensors, path)))


def clip_of_open_clip(path: Path, *, tokenizer: str | Path) -> Clip:
    """The CLIPModel of a ViT-H-14 file in OpenCLIP's names, plain or packed with `model.` before each. InputError."""
    tensors = converted(without_prefix(read_tensors(path), "model."), path)
    network = _network(_config_from_shapes(tensors, path), tensors, path)
    return Clip(network, clip_tokenizer(tokenizer, key="tokenizer", rows=_rows(tensors, path)))


def clip_tokenizer(source: str | Path, *, key: str, rows: int) -> Any:
    """CLIP's BPE of a folder with vocab.json and merges.txt (or tokenizer.json). rows: of the token embedding.

    InputError where they are missing or damaged, or have more tokens than the network.
    """
    given = source
    folder = local_folder(source, key=key, files=TOKENIZER_FILES)
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise InputError(
                    f"{key}={given}: {name} is missing; name a folder with CLIP's vocab.json and merges.txt"
                )
    transformers = _transformers()
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # of the tokenizer's own parsers, in whatever class they raise
        reason = (str(error).strip().split("\n")[0] or type(error).__name__)[:160]
        raise InputError(f"{key}={given}: the tokenizer cannot be read: {reason}") from error
    if len(tokenizer) > rows:
        raise InputError(f"{key}={given}: the tokenizer has {len(tokenizer)} tokens, the network {rows}")
    return tokenizer


def own_tokenizer_or(source: str | Path, otherwise: str) -> str | Path:
    """The source itself where it is a local folder with a tokenizer, else the other one."""
    if is_hub(source):
        return otherwise
    folder = Path(source)
    return source if any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")) else otherwise


def converted(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """OpenCLIP's names and layouts as transformers'. Names that it does not know stay as they are, to be refused."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "attn_mask":
            continue  # the causal mask, a constant
        if name in _RENAMED:
            result[_RENAMED[name]] = tensor
        elif name in _TRANSPOSED:
            result[_TRANSPOSED[name]] = tensor.T
        else:
            result.update(_converted_layer(name, tensor, path))
    return result


_RENAMED = {
    "logit_scale": "logit_scale",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_TOWERS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _converted_layer(name: str, tensor: Tensor, path: Path) -> dict[str, Tensor]:
    for theirs, ours in _TOWERS.items():
        if not name.startswith(theirs):
            continue
        number, _, rest = name.removeprefix(theirs).partition(".")
        part, _, kind = rest.rpartition(".")
        if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
            if tensor.shape[0] % 3:
                raise InputError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected a multiple of 3 rows")
            kind = rest.removeprefix("attn.in_proj_")
            split = dict(zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True))
            return {f"{ours}{number}.self_attn.{own}.{kind}": piece for own, piece in split.items()}
        if part in _PARTS:
            return {f"{ours}{number}.{_PARTS[part]}.{kind}": tensor}
    return {name: tensor}


def _config_of(path: Path) -> Any | None:
    """The CLIPConfig that a folder describes; None where it describes none."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        if "model_type" not in content:
            return None  # of another packaging
        if content["model_type"] != "clip":
            raise ValueError(f"describes a {content['model_type']!r}, expected 'clip'")
        return _transformers().CLIPConfig.from_dict(content)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise InputError(f"{path}: {str(error).strip().splitlines()[0][:160]}") from error


def _config_from_shapes(tensors: Mapping[str, Tensor], path: Path) -> Any:
    """A ViT-H-14 as the shapes have it: image heads of 80, text heads of 64, GELU in its exact form."""
    width, _, patch, _ = shape_of(tensors, "vision_model.embeddings.patch_embedding.weight", 4, path)
    positions, _ = shape_of(tensors, "vision_model.embeddings.position_embedding.weight", 2, path)
    vocabulary, text_width = shape_of(tensors, "text_model.embeddings.token_embedding.weight", 2, path)
    length, _ = shape_of(tensors, "text_model.embeddings.position_embedding.weight", 2, path)
    shared, _ = shape_of(tensors, "text_projection.weight", 2, path)
    hidden, _ = shape_of(tensors, "vision_model.encoder.layers.0.mlp.fc1.weight", 2, path)
    text_hidden, _ = shape_of(tensors, "text_model.encoder.layers.0.mlp.fc1.weight", 2, path)
    if width % _VISION_HEAD_H or text_width % _HEAD:
        raise InputError(f"{path}: widths {width} and {text_width}, expected those of a ViT-H-14 (heads of 80 and 64)")
    return _transformers().CLIPConfig(
        projection_dim=shared,
        vision_config={
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_hidden_layers": count_layers(tensors, "vision_model.encoder.layers.", path),
            "num_attention_heads": width // _VISION_HEAD_H,
            "patch_size": patch,
            "image_size": patch * round((positions - 1) ** 0.5),
            "hidden_act": "gelu",
        },
        text_config={
            "hidden_size": text_width,
            "intermediate_size": text_hidden,
            "num_hidden_layers": count_layers(tensors, "text_model.encoder.layers.", path),
            "num_attention_heads": text_width // _HEAD,
            "vocab_size": vocabulary,
            "max_position_embeddings": length,
            "hidden_act": "gelu",
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1,
        },
    )


def _network(config: Any, tensors: Mapping[str, Tensor], path: Path) -> nn.Module:
    return filled(lambda: _transformers().CLIPModel(config), tensors, path)


def _rows(tensors: Mapping[str, Tensor], path: Path) -> int:
    return shape_of(tensors, "text_model.embeddings.token_embedding.weight", 2, path)[0]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError("prompt rewards need transformers: pip install 'mfm_ray[rewards]'") from error
    return transformers
