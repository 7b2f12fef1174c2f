"""The figures that trainings are compared by: an exact law as oracle, proper scores, common random numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mfm_ray.data.datasets import GMM_MEANS, GMM_VARIANCE, gmm
from mfm_ray.data.shards import write_shards
from mfm_ray.data_space import DataSpace
from mfm_ray.flow_map import FlowMap
from mfm_ray.networks.classifier import DigitClassifier
from mfm_ray.networks.gaussian import GaussianMixtureFlowMap, isotropic_mixture
from mfm_ray.storage import Storage
from mfm_ray.tuning.training_quality import HeldOutQuality, energy_score, figures_of


class Exact(GaussianMixtureFlowMap):
    """The exact map of the bundled mixture, its draws moved by `shift`; a parameter says where it computes."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__(isotropic_mixture(torch.tensor(GMM_MEANS), variance=GMM_VARIANCE), num_inner_steps=10)
        self.shift = torch.nn.Parameter(torch.tensor(shift))

    def forward(self, x_s: Tensor, s: Tensor, u: Tensor, **conditions: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x_s, s, u, **conditions) + self.shift


@pytest.fixture(scope="module")
def quality(tmp_path_factory: pytest.TempPathFactory) -> HeldOutQuality:
    data = Storage(tmp_path_factory.mktemp("gmm") / "data")
    write_shards(data, gmm(rows=512, heldout_rows=256))
    return HeldOutQuality(data=data, num_rows=128, num_draws=4, seed=0)


def test_the_exact_law_has_the_best_figures(quality: HeldOutQuality) -> None:
    exact, moved = quality(Exact()), quality(Exact(0.5))
    for name, mode in figures_of("gmm", has_classifier=False).items():
        if name != "seconds":
            assert mode == "min"
            assert exact[name] < moved[name], name
            assert exact[f"{name}_half_width"] > 0
    assert moved["posterior_error"] == pytest.approx(0.5 / 2**0.5 * 2**0.5, rel=0.4)  # |shift| along a mean direction
    assert exact["posterior_error"] < 0.15  # what two exact sets of 256 draws are apart


def test_all_models_see_the_same_rows_and_noise(quality: HeldOutQuality) -> None:
    assert quality(Exact()) == quality(Exact())


def test_images_are_judged_by_the_classifier_as_well(tmp_path: Path) -> None:
    from mfm_ray.data.datasets import digits
    from mfm_ray.networks import build_network

    write_shards(tmp_path / "data", digits())
    torch.manual_seed(0)
    judge = DigitClassifier(num_classes=10, event_shape=(1, 8, 8)).eval()
    space = DataSpace(kind="image", event_shape=(1, 8, 8))
    network: FlowMap = build_network(
        {"name": "residual_mlp", "width": 8, "num_blocks": 1}, space=space, num_classes=10
    ).eval()
    measured = HeldOutQuality(data=Storage(tmp_path / "data"), num_rows=32, num_draws=2, seed=0, classifier=judge)(
        network
    )
    wanted = set(figures_of("digits", has_classifier=True)) - {"seconds"}
    assert wanted <= set(measured)
    assert 0.1 <= measured["confidence"] <= 1 and measured["frechet"] >= 0


def test_the_energy_score_is_the_formula_and_proper() -> None:
    draws = torch.tensor([[[0.0], [2.0]], [[1.0], [1.0]]])
    truth = torch.tensor([[1.0], [4.0]])
    assert energy_score(draws, truth).tolist() == [1.0 - 1.0, 3.0]
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(4000, 2, generator=generator)
    scores = {
        spread: float(energy_score(spread * torch.randn(4000, 4, 2, generator=generator), truth).mean())
        for spread in (0.5, 1.0, 2.0)
    }
    assert scores[1.0] < min(scores[0.5], scores[2.0])
    with pytest.raises(ValueError, match="1 draws for each row"):
        energy_score(truth[:, None], truth)
