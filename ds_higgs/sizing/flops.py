"""How much a model computes for a token, and what share of a device's peak that is."""

from ds_higgs.sizing.inputs import ModelShape

# Dense bf16 tensor-core peak in FLOP/s, from the vendor's data sheets; the first name that is part of the device's.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def active_parameters(shape: ModelShape) -> int:
    """Weights of the layers that a position passes: attention and one of the two feed-forward paths."""
    attention = 2 * shape.hidden * shape.query_width + 2 * shape.hidden * shape.key_width
    return shape.num_layers * (attention + 3 * shape.hidden * shape.intermediate)


def peak_tokens_per_second(
    shape: ModelShape, *, device_name: str, num_devices: int, frozen: bool = True
) -> float | None:
    """Tokens that devices at their peak would train on in a second, None where the peak is not known.

    A run's tokens a second over this are its model FLOP utilisation. Counted are 4 FLOPs per active parameter and
    token (6 where the base is trained: frozen weights need no gradient), and not attention's scores, the heads, LoRA
    or what is recomputed.
    """
    peak = peak_flops(device_name)
    return None if peak is None else num_devices * peak / ((4 if frozen else 6) * active_parameters(shape))


def peak_flops(device_name: str) -> float | None:
    """The device's dense bf16 peak, None where it is not known."""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in device_name), None)
