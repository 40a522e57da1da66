"""Time our encoders beside those of dynamic-network-architectures ("theirs"): same weights, same input, one run.

    python benchmarks/encoders.py --networks Primus-M ResEnc-L --crop 160 --precision bf16 --compile
    python benchmarks/encoders.py --loading

Ours and theirs take turns; each pair of runs gives a ratio theirs / ours (above 1: ours is faster), of which the table
has the median and extremes. Let nothing else run: a busy machine does not slow both equally. Memory is that of
the tensors at the fullest moment of a run, beyond weights and input. The difference is the largest of features (and
gradients) relative to the largest of theirs; in fp32, here without TF32, 1e-4 stops the script. Primus returns its
tokens, "masked" those of a visible quarter; ResEnc (crops of 64, 96, ...) returns the maps of all stages.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from dynamic_network_architectures.architectures.primus import Primus
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from dynamic_network_architectures.building_blocks import eva
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measures import DEVICE, peak_bytes, seconds
from models import PRIMUS_SIZES, PrimusConfig, PrimusModel, ResEncConfig, build_encoder
from models.conversion import to_reference

NETWORKS = {f"Primus-{size}": numbers for size, numbers in PRIMUS_SIZES.items()} | {"ResEnc-L": {}}


def their_network(c: PrimusConfig | ResEncConfig, weights: dict[str, torch.Tensor]) -> nn.Module:
    """Their network, encoder and decoder, with these weights in its encoder."""
    if c.model_type == "primus":
        sizes = c.hidden_size, c.patch_size, 2, c.num_hidden_layers, c.num_attention_heads, c.image_size
        network = Primus(1, *sizes, init_values=0.1, scale_attn_inner=True)
    elif c.model_type == "resenc":
        sizes = len(c.depths), c.hidden_sizes, nn.Conv3d, 3, c.strides, c.depths, 2, 1, True
        norm = nn.InstanceNorm3d, {"eps": c.norm_eps, "affine": True}
        network = ResidualEncoderUNet(1, *sizes, *norm, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True})
    else:
        raise ValueError(f"this script builds no {c.model_type} of theirs")
    network.load_state_dict(network.state_dict() | weights)
    return network


def functions_of(encoder: nn.Module, network: nn.Module, keep: torch.Tensor | None) -> list[Callable]:
    """Ours and theirs, from crops to a tuple of the same features; of the tokens `keep` `[B, K]` only, if given."""
    if encoder.config.model_type == "resenc":
        return [lambda crops: encoder(crops, output_hidden_states=True).hidden_states, network.encoder]
    if encoder.config.model_type != "primus":
        raise ValueError(f"this script cannot call a {encoder.config.model_type}")
    # their dropout of tokens was written for an older timm: give it the tokens, and its rotary table the heads' axis
    drop = None if keep is None else lambda tokens: (tokens.take_along_dim(keep[..., None], dim=1), keep)
    network.eva.patch_drop, eva.apply_keep_indices_nlc = drop, lambda _, table, kept: table[kept][:, None]
    embed = network.down_projection
    return [lambda crops: (encoder(crops, keep)[0],), lambda crops: network.eva(embed(crops).flatten(2).mT)[:1]]


def step(function: Callable, crops: torch.Tensor, bf16: bool, backward: bool) -> tuple[torch.Tensor, ...]:
    with torch.set_grad_enabled(backward), torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
        outputs = function(crops)
    if backward:
        outputs[-1].float().pow(3).mean().backward()  # the squares of normalised tokens have no gradient
    return outputs


def difference(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    return max((a - b).abs().max().item() for a, b in pairs) / max(b.abs().max().item() for _, b in pairs)


def compare(encoder: nn.Module, network: nn.Module, calls: list[Callable], limit: float, repeats: int) -> str:
    """The numbers of a row: first whether both compute the same, then time and memory."""
    worst = max(difference([pair]) for pair in zip(*(call() for call in calls), strict=True))
    if encoder.training:
        theirs = dict(network.named_parameters(remove_duplicate=False))
        ours = to_reference({name: weight.grad for name, weight in encoder.named_parameters()}, encoder.config)
        worst = max(worst, difference([(gradient, theirs[name].grad) for name, gradient in ours.items()]))
    assert worst < limit, f"ours and theirs differ by {worst:.1e}"
    pairs = []
    for measure in [seconds] * (1 + repeats) + [peak_bytes]:
        nn.ModuleList([encoder, network]).zero_grad()
        pairs.append([measure(call) for call in calls])
    _, *times, memory = pairs  # the first warms up
    medians = "|".join(f"{statistics.median(column):.4f}" for column in zip(*times))
    ratios = [theirs / ours for ours, theirs in times]
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    return f"{medians}|{ratio}|{memory[0] / 1e9:.3f}|{memory[1] / 1e9:.3f}|{worst:.1e}"


def print_rows(name: str, crop: int, arguments: argparse.Namespace) -> None:
    encoder = build_encoder(name.split("-")[0].lower(), (crop,) * 3, {}, **NETWORKS[name]).to(DEVICE)
    network = their_network(encoder.config, to_reference(encoder.state_dict(), encoder.config)).to(DEVICE)
    crops = torch.randn(arguments.batch, 1, crop, crop, crop, device=DEVICE)
    whats, bf16 = {"forward": None, "forward+backward": None}, arguments.precision == "bf16"
    if encoder.config.model_type == "primus":
        order = torch.rand(arguments.batch, (crop // 8) ** 3, device=DEVICE).argsort(dim=1)
        whats["masked forward+backward"] = order[:, : order.shape[1] // 4].sort(dim=1).values
    for what, mode in product(whats, ["eager", "compiled"] if arguments.compile else ["eager"]):
        backward = "backward" in what
        functions = functions_of(encoder.train(backward), network.train(backward), whats[what])
        if mode == "compiled":
            torch.compiler.reset()
            functions = [torch.compile(function, dynamic=False) for function in functions]
        calls = [partial(step, function, crops, bf16, backward) for function in functions]
        row = compare(encoder, network, calls, float("inf") if bf16 else 1e-4, arguments.repeats)
        print(f"|{name}|{crop}|{what}|{mode}|{row}|", flush=True)


def print_loading(repeats: int) -> None:
    encoder = PrimusModel(PrimusConfig())  # a Primus-M for 160^3
    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        torch.save(to_reference(encoder.state_dict(), encoder.config), f"{folder}/weights.pth")
        ways = {
            "PrimusModel.from_pretrained": lambda: PrimusModel.from_pretrained(folder),
            "safetensors.torch.load_file alone": lambda: load_file(f"{folder}/model.safetensors"),
            "torch.load and their network": lambda: their_network(encoder.config, torch.load(f"{folder}/weights.pth")),
        }
        rounds = [[seconds(way) for way in ways.values()] for _ in range(1 + repeats)][1:]
    print("|Primus-M for 160^3, from the page cache|s (min-max)|\n|-|-|")
    for way, taken in zip(ways, zip(*rounds)):
        print(f"|{way}|{statistics.median(taken):.3f} ({min(taken):.3f}-{max(taken):.3f})|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["Primus-M", "ResEnc-L"])
    parser.add_argument("--crop", nargs="+", type=int, default=[160])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loading", action="store_true", help="print only the seconds from disk to memory")
    arguments = parser.parse_args()
    torch.backends.fp32_precision = "ieee"
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {arguments.precision}")
    if arguments.loading:
        return print_loading(arguments.repeats)
    print("|network|crop|what|mode|ours s|theirs s|theirs/ours (min-max)|ours GB|theirs GB|difference|\n|" + "-|" * 10)
    for network, crop in product(arguments.networks, arguments.crop):
        print_rows(network, crop, arguments)


if __name__ == "__main__":
    main()
