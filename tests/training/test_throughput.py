"""Rates from steps and seconds, and the peaks that they are compared with."""

from __future__ import annotations

import pytest
import torch

from mfm_ray.config import TrainConfig, load_config
from mfm_ray.data_space import DataSpace
from mfm_ray.networks import build_network
from mfm_ray.networks.flops import forward_flops
from mfm_ray.objectives import Term, build_objective
from mfm_ray.training.device_peaks import device_peak, memory_peak, peak_flops
from mfm_ray.training.throughput import Throughput


class Cheap(Term):
    name, forward_units = "cheap", 3.0

    def residual(self, *_):
        raise NotImplementedError


class Late(Cheap):
    name, forward_units = "late", 5.0

    def active(self, step):
        return step >= 10


def throughput(peak=None):
    return Throughput(terms=(Cheap(), Late()), forward_flops=100.0, rows=8, peak=peak)


def test_flops_are_counted_by_term_and_only_while_a_term_is_active():
    assert throughput().flops(range(5, 15)) == {"cheap": 10 * 3 * 100 * 8, "late": 5 * 5 * 100 * 8}


def test_rates_are_in_a_second_and_the_terms_sum_to_the_total():
    rates = throughput().rates(range(20, 30), 4.0)
    assert rates == {
        "steps_per_second": 2.5,
        "images_per_second": 20.0,
        "flops_per_second": 16000.0,
        "flops_per_second.cheap": 6000.0,
        "flops_per_second.late": 10000.0,
    }


def test_utilisation_is_told_where_the_peak_is_known():
    assert throughput(peak=64000.0).rates(range(20, 30), 4.0)["mfu"] == 0.25


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H200", 989.4, 66.9),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ],
)
def test_peaks_of_common_gpus_are_known_by_their_names(name, bf16, fp32):
    assert peak_flops(name, "bf16") == bf16 * 1e12
    assert peak_flops(name, "fp32") == fp32 * 1e12


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "AMD Instinct MI300X", "cpu"])
def test_other_devices_have_no_peak(name):
    assert peak_flops(name, "bf16") is None
    assert device_peak(torch.device("cpu"), "bf16") is None


def test_a_run_on_a_cpu_counts_its_own_network_and_has_no_utilisation():
    config = load_config("train", ["experiment=gmm", "network.width=16"])
    assert isinstance(config, TrainConfig)
    flow_map = build_network(config.network, space=DataSpace("coordinates", (2,)))
    terms = [weighted.term for weighted in build_objective(config.objective).terms]
    counted = Throughput.count(flow_map, terms, config, workers=2)
    rates = counted.rates(range(2), 1.0)
    each = 2 * config.global_batch_size * forward_flops(flow_map)
    assert rates["flops_per_second.diagonal"] == 3 * each
    assert rates["flops_per_second.semigroup"] == 5 * each
    assert "mfu" not in rates


def test_memory_on_a_cpu_is_that_of_the_process():
    before = memory_peak(torch.device("cpu"))
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert memory_peak(torch.device("cpu")) >= max(before, held.numel())
