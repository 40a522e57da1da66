"""How far a step's losses and gradients in bf16 are from those in fp32, and a GPU's in fp32 from a CPU's.

    python benchmarks/precision.py recipes/resenc_l.yaml recipes/primus_m.yaml train.batch_size=2
    python benchmarks/precision.py recipes/resenc_l.yaml 'views.crop_size=[64,64,64]' 'views.cells=[5,5,5]' --cpu

Same weights, same batch (crops of the demo's head at 1 mm, or of noise), drop-path off, cuDNN choosing its kernels by
trial as in a run. The first table has what differs from fp32 without TF32 on the same device: the worst loss term (of
its size), the gradients of all weights together (norm of the difference over the norm), and the worst weight that is no
bias, with its name. With --cpu the same network is run on the CPU too. With --convolutions a second has each kind of
convolution of the networks alone, at the size it has there: output and both gradients in bf16 against fp32 of the same
bf16 numbers; to round the result to bf16 costs 1.7e-3. Overrides work as for train_cva.py.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measures import DEVICE
from benchmarks.script_runs import recipes_and_overrides
from data.demo import demo_volume
from data.nifti import read_volume
from data.stored_volume import HeldVolume
from data.stream import stack_views
from models.pretraining import Pretraining
from train_cva import CVARecipe, build_model, build_stream, make_batch
from training.estimate import noise_batch
from training.recipe import load_recipe

Step = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]  # losses and gradients, on the CPU


def step(model: Pretraining, batch: dict[str, torch.Tensor], precision: str, tf32: bool = False) -> Step:
    torch.backends.fp32_precision = "tf32" if tf32 else "ieee"
    model.precision = precision
    model.zero_grad()
    losses = model(**batch)
    losses["loss"].backward()
    terms = {name: losses[name].detach().cpu() for name in ("loss", *model.terms)}
    return terms, {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def compare(found: Step, reference: Step) -> str:
    """The numbers of a row."""
    losses = {name: float((found[0][name] - value).abs() / value.abs()) for name, value in reference[0].items()}
    term = max(losses, key=losses.get)
    whole = distance(
        *(torch.cat([gradients[name].flatten() for name in reference[1]]) for _, gradients in (found, reference))
    )
    each = {name: distance(found[1][name], value) for name, value in reference[1].items() if value.ndim > 1}
    worst = max(each, key=each.get)
    return f"{losses[term]:.1e} ({term})|{whole:.1e}|{each[worst]:.1e} ({worst})"


def print_steps(path: Path, overrides: list[str], with_cpu: bool, of_noise: bool) -> dict[tuple, nn.Module]:
    """The rows of a recipe; returns its convolutions by what they compute."""
    recipe = load_recipe(path, overrides, CVARecipe)
    if hasattr(recipe.model, "drop_path_rate"):  # which is drawn anew each time
        recipe = load_recipe(path, [*overrides, "model.drop_path_rate=0"], CVARecipe)
    torch.manual_seed(0)
    model, volumes = build_model(recipe), recipe.train.batch_size
    if of_noise:
        batch = noise_batch(build_stream, make_batch, recipe, volumes)
    else:
        stream = build_stream([HeldVolume(read_volume(demo_volume(), "RAS", (1.0, 1.0, 1.0))[None])], recipe)
        batch = make_batch(stack_views([stream[i] for i in range(volumes)]), torch.device("cpu"), recipe)
    label = f"|{recipe.name}, {2 * volumes} crops of {' x '.join(map(str, recipe.views.crop_size))}|"
    cpu = {precision: step(model, batch, precision) for precision in ("fp32", "bf16")} if with_cpu else {}
    if cpu:
        print(f"{label}CPU: bf16|CPU: fp32|{compare(cpu['bf16'], cpu['fp32'])}|", flush=True)
    model.to(DEVICE)
    batch = {key: value.to(DEVICE) for key, value in batch.items()}
    exact = step(model, batch, "fp32")
    if cpu:
        print(f"{label}fp32|CPU: fp32|{compare(exact, cpu['fp32'])}|", flush=True)
    for name, found in (("fp32, again", ("fp32",)), ("fp32 with TF32", ("fp32", True)), ("bf16", ("bf16",))):
        print(f"{label}{name}|fp32|{compare(step(model, batch, *found), exact)}|", flush=True)
    with watched_convolutions(model) as kinds, torch.no_grad():
        model(**batch)
    return kinds


@contextmanager
def watched_convolutions(model: nn.Module) -> Iterator[dict[tuple, nn.Module]]:
    """Fills up with one of each kind: the class, the sizes of weight and input, and the stride."""
    kinds: dict[tuple, nn.Module] = {}

    def note(module: nn.Module, inputs: tuple, _: torch.Tensor) -> None:
        kind = type(module).__name__, tuple(module.weight.shape), tuple(inputs[0].shape), module.stride[0]
        kinds.setdefault(kind, module)

    layers = [module for module in model.modules() if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d))]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    yield kinds
    for hook in hooks:
        hook.remove()


def print_convolution(kind: tuple, layer: nn.Module) -> float:
    """Its row, of random numbers; returns the largest difference."""
    x = torch.randn(kind[2], device=DEVICE).bfloat16()
    weight, bias = (p.detach().bfloat16() if p is not None else None for p in (layer.weight, layer.bias))
    probe = None
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        add = bias.to(dtype) if bias is not None else None
        if isinstance(layer, nn.ConvTranspose3d):
            y = nn.functional.conv_transpose3d(*inputs, add, layer.stride, layer.padding)
        else:
            y = nn.functional.conv3d(*inputs, add, layer.stride, layer.padding)
        probe = torch.randn_like(y).bfloat16() if probe is None else probe
        results.append([y.detach(), *torch.autograd.grad(y, inputs, probe.to(dtype))])
    apart = [distance(b.float(), a) for a, b in zip(*results)]
    name, sizes, shape, stride = kind
    print(f"|{name} {sizes}, stride {stride}|{shape}|{'|'.join(f'{each:.1e}' for each in apart)}|", flush=True)
    return max(apart)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="+", metavar="recipe.yaml | key.subkey=value")
    parser.add_argument("--cpu", action="store_true", help="and what a CPU computes: for small sizes")
    parser.add_argument("--noise", action="store_true", help="crops of a volume of noise")
    parser.add_argument("--convolutions", action="store_true", help="and each of them by itself")
    parser.add_argument(
        "--worst", type=float, default=float("inf"), help="what a convolution may differ by, else exit 1"
    )
    arguments = parser.parse_intermixed_args()
    recipes, overrides = recipes_and_overrides(arguments.arguments)
    torch.backends.cudnn.benchmark = True
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}")
    print("|recipe|what|against|losses, worst|gradients|worst weight|\n|" + "-|" * 6, flush=True)
    kinds = {}
    for path in recipes:
        kinds |= print_steps(path, overrides, arguments.cpu, arguments.noise)
    if not arguments.convolutions:
        return
    torch.backends.fp32_precision = "ieee"
    print("\n|convolution|input|output|gradient of the input|gradient of the weight|\n|" + "-|" * 5, flush=True)
    worst = max(print_convolution(kind, layer) for kind, layer in kinds.items())
    if not worst <= arguments.worst:
        sys.exit(f"a convolution in bf16 differs by {worst:.1e} from fp32")


if __name__ == "__main__":
    main()
