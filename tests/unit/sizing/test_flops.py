"""What a token costs, and the share of a device's peak that a run reaches."""

import pytest

from ds_higgs.model.loading import released_model_config
from ds_higgs.sizing.flops import active_parameters, peak_tokens_per_second
from ds_higgs.sizing.shape import model_shape

HIDDEN, INTERMEDIATE, KEYS, LAYERS = 3072, 8192, 1024, 28


def test_the_released_model_passes_a_token_through_2_8_billion_weights():
    by_hand = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * INTERMEDIATE)
    assert active_parameters(model_shape(released_model_config())) == by_hand == pytest.approx(2.8e9, rel=0.02)


def test_peaks_are_of_all_devices_and_weights_that_learn_cost_half_as_much_again():
    shape = model_shape(released_model_config())
    one = peak_tokens_per_second(shape, device_name="NVIDIA H200", num_devices=1)
    assert one == pytest.approx(989e12 / (4 * active_parameters(shape)))
    assert peak_tokens_per_second(shape, device_name="NVIDIA H200", num_devices=8) == pytest.approx(8 * one)
    trained = peak_tokens_per_second(shape, device_name="NVIDIA H200", num_devices=1, frozen=False)
    assert trained == pytest.approx(one / 1.5)
    assert peak_tokens_per_second(shape, device_name="NVIDIA H100 PCIe", num_devices=1) < one
    assert peak_tokens_per_second(shape, device_name="another", num_devices=1) is None
