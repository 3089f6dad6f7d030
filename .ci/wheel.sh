#!/usr/bin/env bash
# Tests the wheel as its user has it: an empty environment, an empty folder, and a packaged recipe by its name.
# usage: .ci/wheel.sh [PYTHON [RECIPE]], where PYTHON has `build`, of the extra "test"
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3} recipe=${2:-digits}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

# The wheel is made from the source distribution, which thus proves to be complete.
"$python" -m build --outdir "$work/dist" . >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "$work"/dist/*.whl
mkdir "$work/empty"
cd "$work/empty"
small=(--config.teacher.name=resnet8 --config.teacher.width=0.25 --config.student.name=resnet8 --config.student.width=0.25)
"$work/venv/bin/python" -m cskd_jax.main --config="$recipe" --config.epochs=1 --config.teacher.epochs=1 \
    "${small[@]}" --config.dataset.data_dir=data --workdir=runs/student
# The report reads files other than Python code, which must be in the wheel too.
"$work/venv/bin/python" -m cskd_jax.report runs
test -s runs/student/results.json
test -s runs/report/report.html
echo "wheel: trained and reported from $(basename "$work"/dist/*.whl) alone"
