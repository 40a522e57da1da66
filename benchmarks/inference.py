"""Time segmenting a whole volume by us, by MONAI's sliding window and by nnU-Net's predictor: same network, same input.

    python benchmarks/inference.py
    python benchmarks/inference.py --networks ResEnc-L --volume 256 --crop 128 --classes 20

All three see windows of the crop that overlap by half, weighted by a Gaussian, without mirroring, and return class
probabilities in fp32 (on CUDA under autocast to half precision, nnU-Net's way). They take turns; the ratio is theirs /
ours, the median of as many turns (above 1: ours is faster). Let nothing else run. Memory is that of the tensors at the
fullest moment, beyond weights and input. The difference is the largest of probabilities; nnU-Net adds up its logits in
half precision, which has no weights as small as those of a window's corners: in the volume's, its logits are rounded.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from monai.inferers import sliding_window_inference
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.encoders import NETWORKS
from benchmarks.measures import DEVICE, peak_bytes, seconds
from evaluation.inference import class_probabilities
from models import build_encoder
from models.architectures import segmentation_class

OVERLAP = 0.5


def ours(model: PreTrainedModel, volume: torch.Tensor, crop_size: tuple[int, ...]) -> torch.Tensor:
    """Probabilities `[K, X, Y, Z]` of a volume `[C, X, Y, Z]`; so do the others."""
    return class_probabilities(model, volume, [0.0] * len(volume), crop_size, OVERLAP, mirror=False)


@torch.inference_mode()
def monai(model: PreTrainedModel, volume: torch.Tensor, crop_size: tuple[int, ...]) -> torch.Tensor:
    logits = sliding_window_inference(
        volume[None], crop_size, 1, lambda crops: model(crops).logits, OVERLAP, mode="gaussian"
    )
    return logits[0].float().softmax(dim=0)


def nnunet(model: PreTrainedModel, volume: torch.Tensor, crop_size: tuple[int, ...]) -> torch.Tensor:
    predictor = nnUNetPredictor(OVERLAP, use_mirroring=False, device=DEVICE, allow_tqdm=False)
    predictor.network = _Logits(model)
    predictor.configuration_manager = SimpleNamespace(patch_size=crop_size)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=model.config.num_labels)
    return predictor.predict_sliding_window_return_logits(volume).float().softmax(dim=0)


class _Logits(torch.nn.Module):
    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        return self.model(crops).logits


def under_autocast(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    with torch.autocast(DEVICE.type, enabled=DEVICE.type == "cuda"):
        return call()


WAYS = {"ours": ours, "MONAI": monai, "nnU-Net": nnunet}


def build(name: str, crop: int, classes: int) -> PreTrainedModel:
    encoder = build_encoder(name.split("-")[0].lower(), (crop,) * 3, {}, **NETWORKS[name])
    names = {number: str(number) for number in range(classes)}
    return segmentation_class(encoder.config.model_type).from_encoder(encoder, names).to(DEVICE).eval()


def watched(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int, float]:
    """What is returned, bytes at the fullest moment, and seconds under the profiler that tells them."""
    results, peaks = [], []
    taken = seconds(lambda: peaks.append(peak_bytes(lambda: results.append(call()))))
    return results[0], peaks[0], taken


def rows(name: str, volume: int, crop: int, classes: int, repeats: int) -> list[str]:
    torch.manual_seed(0)
    model, image = build(name, crop, classes), torch.randn(1, *(volume,) * 3, device=DEVICE)
    calls = {way: partial(under_autocast, partial(run, model, image, (crop,) * 3)) for way, run in WAYS.items()}
    first = {way: watched(call) for way, call in calls.items()}  # also warms up
    memory = {way: peak for way, (_, peak, _) in first.items()}
    worst = {way: (result - first["ours"][0]).abs().max().item() for way, (result, _, _) in first.items()}
    times = [{way: taken for way, (_, _, taken) in first.items()}]
    del first
    times = [{way: seconds(call) for way, call in calls.items()} for _ in range(repeats)] or times
    lines = []
    for way in WAYS:
        median = statistics.median(turn[way] for turn in times)
        ratios = [turn[way] / turn["ours"] for turn in times]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        lines.append(f"|{name}|{way}|{median:.2f}|{ratio}|{memory[way] / 1e9:.2f}|{worst[way]:.1e}|")
    return lines


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--networks", nargs="+", choices=NETWORKS, default=["Primus-M", "ResEnc-L"])
    add("--volume", type=int, default=200, help="voxels on each axis (%(default)s)")
    add("--crop", type=int, default=160, help="voxels of a window on each axis (%(default)s)")
    add("--classes", type=int, default=3, help="with the background (%(default)s)")
    add("--repeats", type=int, default=3, help="turns (%(default)s); 0: timed while memory is measured")
    return parser.parse_args(arguments)


def main(asked: argparse.Namespace) -> None:
    print("|network|by|s|ratio|memory, GB|difference|\n|-|-|-|-|-|-|")
    for name in asked.networks:
        print("\n".join(rows(name, asked.volume, asked.crop, asked.classes, asked.repeats)), flush=True)


if __name__ == "__main__":
    main(parse_arguments())
