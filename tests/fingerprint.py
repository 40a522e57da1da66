"""Print a hash of the losses and final weights of tiny runs: equal before and after a change that moves no number.

    python tests/fingerprint.py

Five recipes, a few steps each on CPU ranks: plain data parallel on one and two ranks, and two of them under ZeRO-2,
ZeRO-3 and FSDP2. A hash is good for one machine and one version of torch, which are printed with it.
"""

import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch
from conftest import ROOT, TINY, blobs, config, launch, model_state, save_nifti

from training.metrics import read_metrics

RESENC = "model={architecture: resenc, hidden_sizes: [4, 8, 8], strides: [1, 2, 2], depths: [1, 1, 1]}"
NO_PRIMUS = [number for number in TINY if not number.startswith("model")]
RECIPES = {  # all but the first two under plain data parallel only
    "primus, cosine, drop-path, accumulation": [*TINY, "train.accumulate=2"],
    "resenc, c_cva": [*NO_PRIMUS, RESENC, "mask.block=16", "loss.consistency=c_cva", "loss.consistency_weight=0.2"],
    "primus, gram, teacher.path=same": [*TINY, "loss.consistency=gram", "teacher.path=same"],
    "primus, simclr": [
        *TINY,
        "mask.ratio=0",
        "loss={target: augmented, reconstruction_weight: 0, consistency: none, consistency_weight: 0, "
        "contrastive_weight: 1, temperature: 0.5}",
        "teacher=null",
    ],
    "primus, autoencoder, cubic independent views": [
        *TINY,
        "mask.ratio=0",
        "loss.consistency=none",
        "loss.consistency_weight=0",
        "loss.contrastive_weight=0",
        "views.interpolation=cubic",
        "views.independent={mirror: 0.5, rotation: {probability: 0.8, degrees: [30, 30, 30]}, "
        "zoom: {probability: 0.8, range: [0.7, 1.4]}}",
    ],
}
STRATEGIES = {1: ("ddp",), 2: ("ddp", "zero2", "zero3", "fsdp2")}


def fingerprint(output: Path) -> str:
    """Of the losses and gradient norms that a run logged, and of all weights that it ended with."""
    records = [
        [record[key] for key in ("step", "loss", "grad_norm")] for record in read_metrics(output / "metrics.jsonl")
    ]
    found = hashlib.sha256(json.dumps(records).encode())
    for name, tensor in sorted(model_state(output / "checkpoints" / f"step_{records[-1][0]}").items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    cpu = torch.backends.cpu.get_cpu_capability()
    print(f"torch {torch.__version__}, {platform.machine()} with {cpu}, {torch.get_num_threads()} threads")
    folder = Path(tempfile.mkdtemp())
    for seed in range(2):
        save_nifti(folder / "data" / f"{seed}.nii", blobs(seed))
    hashes = []
    for ranks, strategies in STRATEGIES.items():
        planned = [
            (name, strategy, folder / f"{strategy}_x{ranks}_{number}", numbers)
            for strategy in strategies
            for number, (name, numbers) in enumerate(RECIPES.items())
            if strategy == "ddp" or number < 2
        ]
        runs = [
            {
                "arguments": [
                    "--config",
                    str(config(strategy)),
                    "--data",
                    str(folder / "data"),
                    "--output",
                    str(output),
                    *numbers,
                ]
            }
            for _, strategy, output, numbers in planned
        ]
        (folder / "runs.json").write_text(json.dumps(runs))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        launch(folder / "runs.json", script=ROOT / "tests" / "several_runs.py", launcher=launcher)
        for name, strategy, output, _ in planned:
            hashes.append(fingerprint(output))
            print(f"{hashes[-1]}  {strategy} x {ranks}  {name}", flush=True)
    print(f"{hashlib.sha256(' '.join(hashes).encode()).hexdigest()[:16]}  all {len(hashes)} runs")


if __name__ == "__main__":
    main()
