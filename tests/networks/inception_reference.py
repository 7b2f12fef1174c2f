"""Features of torch-fidelity's own Inception on weights made by formula: what tests/networks/test_inception.py expects.

    python tests/networks/inception_reference.py     (an environment with torch and torch-fidelity 0.4.0, not ours)

writes inception_reference.json beside itself. Weights and pictures are functions of integers alone, so that both sides
make them anew.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SIZES = ((8, 8), (64, 48), (299, 299), (320, 300))
SHOWN = 24


def wave(count: int, phase: float) -> Tensor:
    """Numbers in (-1, 1) without a pattern that a convolution would see."""
    return torch.sin(torch.arange(count, dtype=torch.float64) * 12.9898 + phase).mul(43758.5453).frac()


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors by name: convolutions that keep the scale, batch norms away from the identity."""
    made = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        if name.endswith("num_batches_tracked"):
            made[name] = torch.zeros(shape, dtype=torch.int64)
            continue
        values = wave(math.prod(shape), float(number)).reshape(shape)
        if name.endswith(("running_var", "bn.weight")):
            values = 1 + values / 2
        elif len(shape) > 1:
            values = values * math.sqrt(6 / math.prod(shape[1:]))
        else:
            values = values / 5
        made[name] = values.float()
    return made


def pictures(size: tuple[int, int], count: int = 2) -> Tensor:
    """(count, 3, H, W) uint8."""
    values = wave(count * 3 * size[0] * size[1], 0.5).reshape(count, 3, *size)
    return ((values + 1) * 127.5).round().to(torch.uint8)


def main() -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.set_num_threads(1)
    shapes = json.loads(Path(sys.argv[1]).read_text()) if len(sys.argv) > 1 else _shapes_of_the_class()
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(weights({name: tuple(shape) for name, shape in shapes.items()}), file.name)
        network = FeatureExtractorInceptionV3("i", ["2048"], feature_extractor_weights_path=file.name)
    spatial: list[Tensor] = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, out: spatial.append(out.clone()))
    found = {}
    for size in SIZES:
        (features,) = network(pictures(size))
        maps = spatial.pop()[:, :7].permute(0, 2, 3, 1).flatten(1)
        found[f"{size[0]}x{size[1]}"] = {
            "features": features[:, :SHOWN].tolist(),
            "norms": features.double().norm(dim=1).tolist(),
            "spatial": maps[:, :SHOWN].tolist(),
            "spatial_norms": maps.double().norm(dim=1).tolist(),
        }
    content = {"shapes": {name: list(shape) for name, shape in shapes.items()}, "sizes": found}
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps(content) + "\n")
    print(target)


def _shapes_of_the_class() -> dict[str, list[int]]:
    """Of its own parameters: the constructor loads a file, so a class that loads nothing is asked."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    class Unloaded(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: object, **kwargs: object) -> None:  # type: ignore[override]
            pass

    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save({}, file.name)
        network = Unloaded("i", ["2048"], feature_extractor_weights_path=file.name)
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


if __name__ == "__main__":
    main()
