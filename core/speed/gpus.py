"""Data sheets of GPUs: peak FLOP/s, memory and bandwidth, by the name that the driver reports."""

from typing import NamedTuple

import torch


class GPU(NamedTuple):
    """What a vendor's data sheet says of a GPU; products are dense, sums in float32."""

    name: str
    half: float  # TFLOP/s of matrix multiplications in bfloat16 or float16
    single: float  # TFLOP/s in TF32, or else float32
    memory: float  # GB of 10^9 bytes
    bandwidth: float  # of that memory, GB/s
    dtype: str = 'bfloat16'  # of the two 16-bit formats, the one it multiplies at `half`; where both, bfloat16

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s of matrix multiplications in `dtype`."""
        return 1e12 * (self.single if dtype == 'float32' else self.half)


GPUS = (
    GPU('B200', 2250, 1125, 180, 7700),
    GPU('H200', 989, 495, 141, 4800),
    GPU('H100 PCIe', 756, 378, 80, 2000),
    GPU('H100 NVL', 835, 418, 94, 3900),
    GPU('H100', 989, 495, 80, 3350),
    GPU('A100 80GB', 312, 156, 80, 1935),  # PCIe; SXM: 2039 GB/s
    GPU('A100', 312, 156, 40, 1555),
    GPU('L40S', 362, 183, 48, 864),
    GPU('L4', 121, 60, 24, 300),
    GPU('A6000', 155, 77, 48, 768),
    GPU('4090', 165, 83, 24, 1008),
    GPU('3090', 71, 36, 24, 936),
    GPU('V100 32GB', 125, 15.7, 32, 900, 'float16'),
    GPU('V100', 125, 15.7, 16, 900, 'float16'),
    GPU('T4', 65, 8.1, 16, 320, 'float16'),
    GPU('MI300X', 1307, 654, 192, 5300),
)


def gpu_called(name: str) -> GPU | None:
    """The first entry of GPUS whose words are all in a name, in any case and with - or _ for blanks, or None."""
    words = set(name.lower().replace('-', ' ').replace('_', ' ').split())
    return next((gpu for gpu in GPUS if words.issuperset(gpu.name.lower().split())), None)


def gpu_of(device: str) -> GPU | None:
    """The entry of GPUS for a device, or None where there is none, as for CPUs."""
    return gpu_called(torch.cuda.get_device_name(device)) if device.startswith('cuda') else None


def peak_flops(device: str, dtype: str) -> float | None:
    """Peak FLOP/s of a GPU for matrix multiplications in `dtype`, or None where it is unknown, as for CPUs."""
    gpu = gpu_of(device)
    return gpu.flops(dtype) if gpu else None
