from __future__ import annotations

import pytest

from cadre.errors import UsageError
from cadre.plan.hardware import hardware, hardware_names


@pytest.mark.parametrize("name", hardware_names())
def test_every_figure_is_there_and_sourced(name):
    device = hardware(name.upper())
    assert device.name == name
    assert all(rate > 0 for rate in device.flops.values()) and device.flops.keys() == device.efficiency.keys()
    assert all(0 < share < 1 for share in device.efficiency.values())
    for value in (device.memory_bytes, device.memory_bandwidth, device.link_bandwidth, device.network_bandwidth, device.watts):
        assert value > 0
    assert device.rent >= 0 and device.node_size >= 1
    assert {"flops", "memory", "links", "watts", "rent", "efficiency"} <= device.sources.keys()
    assert all(device.sources.values())


def test_rates_are_dense_and_fp8_is_twice_bf16():
    assert hardware("h100").flops == {"bf16": 989.4e12, "fp8": 1978.9e12}
    for name in ("h100", "h800", "h200", "b200", "mi300x", "rtx4090"):
        flops = hardware(name).flops
        assert flops["fp8"] == pytest.approx(2 * flops["bf16"], rel=1e-3)
    assert "fp8" not in hardware("a100").flops


def test_the_h800_is_an_h100_with_slower_links_at_the_rent_of_the_v3_report():
    h100, h800 = hardware("h100"), hardware("h800")
    assert (h800.flops, h800.memory_bytes) == (h100.flops, h100.memory_bytes)
    assert h800.link_bandwidth == 200e9 < h100.link_bandwidth
    assert h800.rent == 2.0


@pytest.mark.parametrize(("name", "hint"), [("h10", "did you mean h100"), ("mi300", "mi300x"), ("tpu", "known: h100, h800")])
def test_an_unknown_device_is_refused_with_the_nearest(name, hint):
    with pytest.raises(UsageError, match=f"--hardware {name}: not in the catalogue; .*{hint}"):
        hardware(name)
