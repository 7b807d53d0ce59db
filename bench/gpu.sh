#!/usr/bin/env bash
# bash bench/gpu.sh PART OUT [--maps DIR] [--landcover DIR] [--vgg16 FILE]: see bench/gpu.py.
python=${PYTHON:-python3}
missing=$("$python" -c "import numpy, PIL, tqdm, matplotlib, filelock, torch" 2>&1) ||
  { echo "$python: ${missing##*$'\n'} (pip install -r requirements.txt)" >&2; exit 1; }
exec "$python" "$(dirname "$0")/gpu.py" "$@"
