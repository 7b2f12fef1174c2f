"""Numbers of the original code for tests/rewards/test_upstream.py, on the tiny weights of `tiny_networks`.

    python -m venv /tmp/upstream
    /tmp/upstream/bin/pip install torch torchvision transformers timm hpsv2 open_clip_torch
    pip download --no-deps image-reward==1.5 and unpack it into /tmp/image_reward
    /tmp/upstream/bin/python tests/rewards/upstream_reference.py /tmp/image_reward

Writes upstream_reference.json beside itself: cosines of PickScore and HPSv2 by OpenCLIP's network (open_clip_torch, and
HPSv2's own copy of it) behind torchvision's transforms, ImageReward by its own package. That package is of an older
transformers: what it imports from places that are gone is put back there first, none of its own code is changed.
The file in the tree is of torch 2.13.0, torchvision 0.28.0, open_clip_torch 3.3.0, hpsv2 1.2.0, transformers 5.23.0.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
import torchvision.transforms as T
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import tiny_networks
from tiny_networks import PROMPTS, SIZES, sampled
from tiny_networks import waves as images

OUT = Path(__file__).with_name("upstream_reference.json")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def filled() -> Any:
    return T.Compose([T.Resize(224, T.InterpolationMode.BICUBIC), T.CenterCrop(224), T.Normalize(MEAN, STD)])


def padded(image: Tensor) -> Tensor:
    from hpsv2.src.open_clip.transform import ResizeMaxSize

    return T.Normalize(MEAN, STD)(ResizeMaxSize(224)(image))


def open_clip_scores(module: Any, folder: Path, prepare: Any) -> dict[str, list[float]]:
    from transformers import CLIPTokenizer

    network = tiny_networks.hpsv2_folder(folder)
    vision = module.CLIPVisionCfg(layers=2, width=160, head_width=80, mlp_ratio=0.4, patch_size=14, image_size=224)
    vocabulary = network.config.text_config.vocab_size
    text = module.CLIPTextCfg(context_length=77, vocab_size=vocabulary, width=64, heads=1, layers=2)
    model = module.CLIP(embed_dim=768, vision_cfg=vision, text_cfg=text, quick_gelu=False).eval()
    for block in model.transformer.resblocks:  # no setting of OpenCLIP's for the width of the text's MLP
        block.mlp.c_fc, block.mlp.c_proj = torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)
    model.load_state_dict(tiny_networks.open_clip_weights(network))
    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    scores = {}
    for prompt in PROMPTS:
        own = tokenizer([prompt])["input_ids"][0]
        tokens = torch.tensor([own + [0] * (77 - len(own))])
        told = model.encode_text(tokens, normalize=True)
        for height, width in SIZES:
            seen = torch.stack([prepare(image) for image in images(height, width)])
            cosine = (model.encode_image(seen, normalize=True) @ told.T).squeeze(1)
            scores[f"{height}x{width} {prompt}"] = cosine.tolist()
    return scores


def image_reward_scores(package: str, folder: Path) -> dict[str, list[float]]:
    put_back_what_is_gone(package)
    from ImageReward.ImageReward import MLP
    from ImageReward.models.BLIP.med import BertConfig, BertModel
    from ImageReward.models.BLIP.vit import VisionTransformer
    from transformers import BertTokenizer

    weights = tiny_networks.image_reward_folder(folder)
    vision = VisionTransformer(img_size=224, patch_size=16, embed_dim=128, depth=2, num_heads=2, mlp_ratio=0.75)
    described = {
        "hidden_size": 64,
        "num_attention_heads": 1,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 64,
        "vocab_size": len(weights["blip.text_encoder.embeddings.word_embeddings.weight"]),
        "pad_token_id": 0,
    }
    config = BertConfig(**described)
    config.encoder_width, config.add_cross_attention = 128, True
    text, head = BertModel(config=config, add_pooling_layer=False), MLP(64)
    for prefix, module in (("blip.visual_encoder.", vision), ("blip.text_encoder.", text), ("mlp.", head)):
        own = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
        module.load_state_dict(own)
        module.eval()
    words = (folder / "vocab.txt").read_text().split()
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    scores = {}
    for prompt in PROMPTS:
        told = tokenizer([prompt], padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        for height, width in SIZES:
            seen = vision(filled()(images(height, width)))
            read = text(
                told.input_ids.expand(2, -1),
                attention_mask=told.attention_mask.expand(2, -1),
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
                return_dict=True,
            )
            reward = (head(read.last_hidden_state[:, 0]) - 0.16717362830052426) / 1.0333394966054072
            scores[f"{height}x{width} {prompt}"] = reward.squeeze(1).tolist()
    return scores


def give_hpsv2_its_vocabulary() -> None:
    """Its wheel comes without the file that it opens when imported; OpenCLIP's own is the same."""
    places = [Path(path) for path in sys.path]
    name = "bpe_simple_vocab_16e6.txt.gz"
    (theirs,) = (place / "hpsv2/src/open_clip" for place in places if (place / "hpsv2/src/open_clip").is_dir())
    (own,) = (place / "open_clip" / name for place in places if (place / "open_clip" / name).is_file())
    if not (theirs / name).exists():
        shutil.copy(own, theirs / name)


def put_back_what_is_gone(package: str) -> None:
    """Names that the package imports, where it looks for them; of those it calls, the functions themselves."""
    import timm.layers
    import timm.models
    import transformers.modeling_utils as modeling
    from transformers.pytorch_utils import apply_chunking_to_forward, prune_linear_layer

    modeling.apply_chunking_to_forward, modeling.prune_linear_layer = apply_chunking_to_forward, prune_linear_layer
    modeling.find_pruneable_heads_and_indices = None
    modeling.PreTrainedModel.get_head_mask = lambda self, mask, layers: [None] * layers
    modeling.PreTrainedModel.invert_attention_mask = lambda self, mask: (
        (1.0 - mask[:, None, None, :].float()) * -10000.0
    )
    modeling.PreTrainedModel.init_weights = lambda self: None  # all weights are loaded
    files = types.ModuleType("transformers.file_utils")
    from transformers.utils import ModelOutput

    files.ModelOutput = ModelOutput
    checkpointing = types.ModuleType("fairscale.nn.checkpoint.checkpoint_activations")
    checkpointing.checkpoint_wrapper = None
    moved = types.ModuleType("timm.models.registry")
    moved.register_model = None
    layers = types.ModuleType("timm.models.layers")
    layers.trunc_normal_, layers.DropPath = timm.layers.trunc_normal_, timm.layers.DropPath
    helpers = types.ModuleType("timm.models.helpers")
    helpers.named_apply = helpers.adapt_input_conv = None
    modules = {
        "transformers.file_utils": files,
        "fairscale": types.ModuleType("fairscale"),
        "fairscale.nn": types.ModuleType("fairscale.nn"),
        "fairscale.nn.checkpoint": types.ModuleType("fairscale.nn.checkpoint"),
        "fairscale.nn.checkpoint.checkpoint_activations": checkpointing,
        "timm.models.registry": moved,
        "timm.models.layers": layers,
        "timm.models.helpers": helpers,
    }
    sys.modules.update(modules)
    for name, path in (
        ("ImageReward", ""),
        ("ImageReward.models", "models"),
        ("ImageReward.models.BLIP", "models/BLIP"),
    ):
        own = types.ModuleType(name)  # without its __init__, which imports training and downloads
        own.__path__ = [str(Path(package) / "ImageReward" / path)]
        sys.modules[name] = own
    blip = types.ModuleType("ImageReward.models.BLIP.blip_pretrain")
    blip.BLIP_Pretrain = None
    sys.modules["ImageReward.models.BLIP.blip_pretrain"] = blip


@torch.no_grad()
def main(package: str) -> None:
    give_hpsv2_its_vocabulary()
    import hpsv2.src.open_clip.model as hpsv2_model
    import open_clip.model as open_clip_model

    torch.set_num_threads(1)
    reference: dict[str, Any] = {"filled": {}, "padded": {}}
    for height, width in SIZES:
        both = images(height, width)
        reference["filled"][f"{height}x{width}"] = sampled(filled()(both))
        reference["padded"][f"{height}x{width}"] = sampled(torch.stack([padded(image) for image in both]))
    with tempfile.TemporaryDirectory() as folder:
        reference["open_clip"] = open_clip_scores(open_clip_model, Path(folder) / "clip", filled())
        reference["hpsv2"] = open_clip_scores(hpsv2_model, Path(folder) / "hpsv2", padded)
        reference["image_reward"] = image_reward_scores(package, Path(folder) / "image_reward")
    OUT.write_text(json.dumps(reference))


if __name__ == "__main__":
    main(sys.argv[1])
