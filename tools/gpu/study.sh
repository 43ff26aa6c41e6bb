#!/bin/bash
# study.sh DATA OUT [SECONDS [FLAGS...]]: a part of the study's gpu preset on Imagenette, in one short visit to a
# machine with a GPU. Run it in the checkout's folder. The machine needs python3 with torch, triton, numpy and
# pillow (PYTHON names another interpreter), no network and no .venv.
#
#   DATA      Imagenette: a folder with train/ and val/, or a .zip that holds them
#   OUT       the folder to bring home: study_imagenette_gpu.json, which goes on from the one in results/;
#             study.txt, what tools.study printed; units.txt, what each unit printed
#   SECONDS   at most so long in all (590)
#   FLAGS     more flags of tools.study; they win over those given here
#
# It ends with the exit code of tools.study, which is 0 also when only a part of the study fitted into the time.
set -euo pipefail
data=${1:?expected a folder or a .zip of Imagenette} out=${2:?expected a folder for the results}
limit=${3:-590}
shift $(($# < 3 ? $# : 3))
python=${PYTHON:-python3}
work=runs/gpu-study
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/runs/gpu-cache/triton}
mkdir -p "$out" "$work/units"
if [ ! -e "$out/study_imagenette_gpu.json" ] && [ -e results/study_imagenette_gpu.json ]; then
    cp results/study_imagenette_gpu.json "$out"
fi

# JPEG files travel, a tenth of the pixels in size; a pack of pixels is what a GPU can be fed from.
if [ "${data%.zip}" != "$data" ]; then
    $python -m zipfile -e "$data" "$work/images"
    data=$work/images
fi
cores=$(env -u OMP_NUM_THREADS nproc)                                # nproc would answer with that variable
$python -m tools.pack "$data" "$work/imagenette" --short-side 0 --workers "$cores"

# A worker holds about three batches of 512 crops of 112 pixels, 20 MB each, in shared memory.
shared=$(($(df --output=avail -B1M /dev/shm | tail -n 1) / 60))
workers=$((cores > 13 ? 12 : cores - 1))
workers=$((shared < workers ? shared : workers))

# What is kept back: starting, saving what has to stop, tables, figures.
left=$((limit - SECONDS - 25))
if [ "$left" -lt 1 ]; then
    echo "error: $SECONDS of $limit s are gone before the study begins: expected 25 s more at least; give more" \
        "SECONDS" >&2
    exit 2
fi
minutes=$((left / 60)).$(printf %02d $((left % 60 * 100 / 60)))
echo "at $SECONDS of $limit s: $minutes minutes for the study; loader processes: $workers"
code=0
timeout -k 5 $((limit - SECONDS - 5)) $python -m tools.study --preset gpu --device cuda --data "$work/imagenette" \
    --methods MAE,MFF_MAE --minutes "$minutes" --workers "$workers" --output-dir "$out" \
    --study-dir "$work/units" "$@" 2>&1 | tee "$out/study.txt" || code=$?
find "$work/units" -name output.txt -exec tail -v -n +1 {} + > "$out/units.txt"
echo "at $SECONDS of $limit s: tools.study ended with code $code; $(ls "$out" | tr '\n' ' ')"
exit "$code"
