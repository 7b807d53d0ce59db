#!/usr/bin/env bash
# What a GPU should show, in the order of its worth, within so many minutes:
#
#     bash bench/gpu.sh MINUTES RESULTS [MAPS [LANDCOVER [VGG16]]]
#
# RESULTS    folder of small files: versions, tests, benchmarks, and of every run its evaluation,
#            metrics, losses.png and last sample grid. The runs themselves lie in RESULTS/runs.
# MAPS       pairs side by side (satellite | map); none: the demo world
# LANDCOVER  photographs with land cover, for the edits; none: the demo world
# VGG16      torchvision's weights, for mixlc_acgan.py; none: random features
#
# A second call goes on with the runs where the first one stopped. Without a GPU everything is of toy
# size: a test of this script.
set -u
cd "$(dirname "$0")/.."
minutes=${1:?minutes} results=$(realpath -m "${2:?folder of results}")
maps=${3:+--data "$(realpath "$3")"} landcover=${4:+--data "$(realpath "$4")"}
style="--style-features random"
[ -n "${5:-}" ] && style="--vgg16 $(realpath "$5")"
python=${PYTHON:-python}
end=$(($(date +%s) + 60 * minutes))
mkdir -p "$results/runs"

left() { echo $((end - $(date +%s))); }

# part NAME SECONDS COMMAND...: runs it for at most so long, and no longer than is left
part() {
  local name=$1 most=$2 began; shift 2
  began=$(date +%s)
  [ "$(left)" -lt "$most" ] && most=$(left)
  if [ "$most" -lt 5 ]; then echo "$name: no time left" | tee -a "$results/summary.txt"; return 0; fi
  timeout --signal=INT --kill-after=60 "$most" "$@" > "$results/$name.txt" 2>&1
  echo "$name: exit $? after $(($(date +%s) - began)) s" | tee -a "$results/summary.txt"
}

# train NAME SECONDS SCRIPT OPTIONS...: begins the run or goes on with it; keeps what is small
train() {
  local name=$1 most=$2 script=$3 run="$results/runs/$1"; shift 3
  if [ -f "$run/evaluation.json" ]; then echo "$name: done" | tee -a "$results/summary.txt"
  elif [ -f "$run/checkpoints/last.pt" ]; then
    part "$name" "$most" "$python" "$script.py" --resume --out "$run"
  else part "$name" "$most" "$python" "$script.py" "$@" $toy --cache "$results/cache" --out "$run"; fi
  if [ -f "$run/checkpoints/last.pt" ] && [ ! -f "$run/evaluation.json" ]; then  # stopped: measured as it is
    part "$name-evaluated" 120 "$python" "$script.py" --evaluate \
      --checkpoint "$run/checkpoints/last.pt" --out "$results/$name"
  fi
  mkdir -p "$results/$name"
  for file in evaluation.json config.json metrics.csv losses.png; do
    [ -f "$run/$file" ] && cp "$run/$file" "$results/$name/"
  done
  local grid; grid=$(ls "$run"/samples/*.png 2>/dev/null | tail -1)
  [ -n "$grid" ] && cp "$grid" "$results/$name/grid.png"
  return 0
}

if "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  toy="" steps="cuda and not compile" share=240
else
  toy="--size 64 --width 4 --epochs 1 --max-images 4 --batch-size 2 --val-images 4" share=60
  steps="bench_step and pix2pix and cpu-64-1-fast"
fi

part versions 60 "$python" -c "
import subprocess, sys, torch
print('python', sys.version.split()[0], 'torch', torch.__version__, 'cuda', torch.version.cuda)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU: toy sizes')
"
if [ -z "$toy" ]; then
  part tests 420 "$python" -m pytest -q -m cuda
  part bench_step 600 "$python" -m pytest bench/bench_step.py --benchmark-only -k "$steps" \
    --benchmark-json="$results/bench_step.json"
else
  part bench_step 120 "$python" -m pytest bench/bench_step.py -k "$steps"
fi
train sat2map $share pix2pix $maps --direction AtoB --save-every 50
train map2sat $share pix2pix $maps --direction BtoA --save-every 50
train cyclegan $((4 * share)) cyclegan $maps --save-every 50
train mixlc $share mixlc $landcover --batch-size 16
train mixlc_acgan $share mixlc_acgan $landcover $style
if [ -z "$toy" ]; then
  for bench in bench_epoch bench_generate; do
    part $bench 300 "$python" -m pytest bench/$bench.py --benchmark-only -k cuda \
      --benchmark-json="$results/$bench.json"
  done
fi
cat "$results/summary.txt"
