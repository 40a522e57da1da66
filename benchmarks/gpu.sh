#!/usr/bin/env bash
# Everything that only a GPU can tell, on one of them, in parts that are meant to take less than eight minutes each.
#
#   benchmarks/gpu.sh [--small] [--output FOLDER] [tests | steps | compiled | memory | views | encoders | resume ...]
#
# Without a name, all parts in this order. Each prints its tables and leaves them in FOLDER (runs/gpu) as PART.md and
# PART.json, with all that was said in PART.log. The exit code is 1 if a part failed or lacks a package; the last line
# says which. --small tries every part on a CPU, with tiny sizes: nothing that it prints is worth keeping.
# PEAK_TFLOPS is the device's dense rate in bf16 by its data sheet (989: H100, H200).
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=. PYTHONWARNINGS=ignore

small='' output=runs/gpu parts=()
while (($#)); do
    case $1 in
        --small) small=yes ;;
        --output) output=$2 && shift ;;
        tests | steps | compiled | memory | views | encoders | resume) parts+=("$1") ;;
        *) sed -n '2,/^set/{/^#/p}' "$0" >&2 && exit 2 ;;
    esac
    shift
done
((${#parts[@]})) || parts=(tests steps compiled memory views encoders resume)
mkdir -p "$output"

recipes=(recipes/primus_m.yaml recipes/resenc_l.yaml)
resenc=(recipes/resenc_l.yaml train.batch_size=2) attending=(recipes/primus_m.yaml)
cropped=("${recipes[@]}" train.batch_size=2 'views.crop_size=[64,64,64]' 'views.cells=[3,3,3]')
strategies=(ddp zero2 zero3 fsdp2) compiling=(ddp zero2 fsdp2) few=()
if [[ $small ]]; then
    export CUDA_VISIBLE_DEVICES=''
    recipes=(recipes/demo.yaml train.batch_size=2 run.workers=0 'views.crop_size=[32,32,32]' 'views.cells=[3,3,3]'
        'model.hidden_sizes=[4,8,8,8]' 'model.depths=[1,1,1,1]' heads.projector_size=32 heads.predictor_size=16)
    attending=(recipes/primus_m.yaml train.batch_size=2 'views.crop_size=[32,32,32]' 'views.cells=[3,3,3]')
    resenc=("${recipes[@]}") cropped=("${recipes[@]}") strategies=(ddp fsdp2) compiling=(ddp) few=(--steps 1)
elif ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU: --small tries the parts on a CPU" >&2
    exit 2
fi

part_tests() { # cuDNN has computed convolutions in bf16 wrong before, without a word: these first
    python benchmarks/precision.py "${resenc[@]}" --noise --convolutions --worst 0.01 || return
    if [[ $small ]]; then
        tested -k reading_back
    else
        tested
    fi
}

tested() { # a table of the tests; one that is skipped has told nothing
    local code
    python -m pytest -q -rA -p no:cacheprovider tests/test_gpu.py "$@" >"$output/pytest.log"
    code=$?
    cat "$output/pytest.log" >&2
    echo
    echo '| test | result |'
    echo '|---|---|'
    sed -nE 's/^(PASSED|FAILED|ERROR|SKIPPED) (.*)/| \2 | \1 |/p' "$output/pytest.log" | sed 's/ - .* |/ |/'
    ! grep -q '^SKIPPED' "$output/pytest.log" && return $code
}

part_steps() {
    python benchmarks/pretraining_step.py "${recipes[@]}" --strategies "${strategies[@]}" --peak-tflops "${PEAK_TFLOPS:-989}" "${few[@]}"
}

part_compiled() {
    python benchmarks/pretraining_step.py "${recipes[@]}" --strategies "${compiling[@]}" --peak-tflops "${PEAK_TFLOPS:-989}" "${few[@]}" \
        --variants run.compile=true --only-variants
}

part_memory() {
    python benchmarks/memory.py "${cropped[@]}" --ranks 1 --strategies "${strategies[@]}"
}

part_views() {
    if [[ $small ]]; then
        python benchmarks/views.py --batches 2 --repeats 0 --volume 40 train.batch_size=1 'views.crop_size=[32,32,32]' 'views.cells=[3,3,3]'
    else
        python benchmarks/views.py
    fi
}

part_encoders() {
    needs dynamic_network_architectures dynamic-network-architectures || return
    if [[ $small ]]; then
        python benchmarks/encoders.py --networks Primus-S --crop 32 --repeats 1 &&
            python benchmarks/losses.py --terms contrast --channels 32 --grid 4 --views 4 --contrast-cells 3 \
                --repeats 1 &&
            python benchmarks/attention.py "${attending[@]}" --math
    else
        python benchmarks/encoders.py --crop 128 --precision bf16 --compile &&
            python benchmarks/losses.py --terms contrast --contrast-cells 20 --repeats 3 &&
            python benchmarks/attention.py "${attending[@]}"
    fi
}

part_resume() {
    python benchmarks/resume.py "${cropped[@]}" --strategies "${strategies[@]}"
}

needs() { # a module, and the name of its package
    python -c "import importlib.util, sys; sys.exit(not importlib.util.find_spec('$1'))" && return
    echo "$2 is missing: pip install $2; docs/benchmarks.md says how without a registry" >&2
    return 1
}

failed=()
for part in "${parts[@]}"; do
    echo "== $part"
    SECONDS=0
    "part_$part" 2>"$output/$part.log" | tee "$output/$part.md"
    code=${PIPESTATUS[0]}
    python benchmarks/tables.py <"$output/$part.md" >"$output/$part.json" || code=1
    if ((code)); then
        failed+=("$part")
        tail -n 20 "$output/$part.log" >&2
    fi
    echo "== $part: $SECONDS s, exit $code"
done
if ((${#failed[@]})); then
    echo "failed: ${failed[*]} (of ${parts[*]}); see $output/PART.log"
    exit 1
fi
echo "all passed: ${parts[*]}; in $output"
