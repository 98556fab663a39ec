#!/usr/bin/env bash
# From a fresh machine to a distilled student: set-up, synthetic faces, teacher, students,
# evaluation, one table and one picture.
#   ./run_demo.sh            about a quarter of an hour on 2 CPU cores after the set-up; shows
#                            teacher > AdaDistill > standalone
#   ./run_demo.sh --quick    the same stages in a few minutes, on too little data to promise any
#                            order
# A GPU is used if there is one. The results go to output/demo (output/demo_quick), which is made
# anew.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch/environment.sh"

name=demo identities=300 images=11 pairs=500 benchmarks=()
teacher=iresnet18 teacher_epochs=4 batch=32
case "${1:-}" in
    --quick)
        name=demo_quick identities=70 images=10 pairs=40
        benchmarks=(--ijb-subjects 12 --tinyface-identities 20)
        teacher=mobilefacenet teacher_epochs=3 batch=16
        ;;
    "") ;;
    *) fail "unknown argument $1; usage: ./run_demo.sh [--quick]" ;;
esac

set_up requirement.txt "datasets, huggingface_hub, yaml"
computes_fast() {
    (cd "$root" && "$PYTHON" -c '
import sys, torch
from utils.precision import choose_precision
slow = choose_precision("auto", torch.device("cpu")) == "fp32"
sys.exit(slow and not torch.cuda.is_available())')
}
if [ "$name" = demo ] && ! computes_fast; then
    echo "This CPU has no bf16 arithmetic: a smaller set and teacher, to stay within 20 minutes"
    identities=240 images=10 pairs=300 teacher=mobilefacenet
fi
# the batch size and the learning rate below are meant for one process
export NPROC_PER_NODE=1
started=$SECONDS
data=$root/data/$name output=$root/output/$name
# the demo's own folder, nobody else writes there
rm -rf "$output"
stage() { printf '\n=== %s (%d s)\n' "$*" $((SECONDS - started)); }

stage "Synthetic faces: $identities identities x $images images;" \
    "pair sets, an IJB-like and a TinyFace-like set of others"
"$PYTHON" "$root/data/make_synthetic.py" --output "$data" \
    --identities "$identities" --images "$images" --pairs "$pairs" \
    ${benchmarks[@]+"${benchmarks[@]}"}

# torch.compile makes a CPU step a third faster, but needs a C++ compiler and a minute to start,
# which a quick run never earns back
can_compile() {
    "$PYTHON" -c '
import torch
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.compile(lambda x: x + 1)(torch.ones(8, device=device))' 2>/dev/null
}
compile=False
if [ "$name" = demo ] && can_compile; then
    compile=True
fi
# every run: the same images, scale, margin and learning rate; students: the same initial weights
# (seed) and one epoch
common=(dataset=synthetic "rec=$data" "val_rec=$data" "val_targets=[]" "batch_size=$batch"
        lr=0.8 s=32 m=0.3 "compile=$compile" num_workers=1 log_every=5)
student=(network=mobilefacenet num_epoch=1)

stage "Teacher: $teacher, $teacher_epochs epochs"
"$root/run_standalone.sh" "${common[@]}" "network=$teacher" "num_epoch=$teacher_epochs" \
    "milestones=$teacher_epochs" "output=$output/teacher"
last=$(basename "$(ls "$output"/teacher/*state.pth | sort -V | tail -n 1)" state.pth)
# its earlier epochs would only lengthen the evaluation below
for weights in "$output"/teacher/*backbone.pth; do
    [ "$weights" = "$output/teacher/${last}backbone.pth" ] || rm "$weights"
done
taught=("teacher=$teacher" "pretrained_teacher_path=$output/teacher/${last}backbone.pth"
        "pretrained_teacher_header_path=$output/teacher/${last}header.pth")

stage "Student on its own"
"$root/run_standalone.sh" "${common[@]}" "${student[@]}" \
    loss=ArcFace "output=$output/standalone"
stage "Student by AMLDistill (ArcDistill)"
"$root/run_AMLDistill.sh" "${common[@]}" "${student[@]}" "${taught[@]}" \
    loss=ArcFace "output=$output/AMLDistill"
stage "Student by AdaDistill (ArcFace, weighted alpha)"
"$root/run_AdaDistill.sh" "${common[@]}" "${student[@]}" "${taught[@]}" \
    loss=ArcFace adaptive_alpha=True "output=$output/AdaDistill_ArcFace"
stage "Student by AdaDistill (AdaFace, geometry margin)"
"$root/run_AdaDistill.sh" "${common[@]}" "${student[@]}" "${taught[@]}" \
    loss=AdaFace use_geom_margin=True geom_margin_warmup_epoch=0.5 \
    "output=$output/AdaDistill_AdaFace_geometry"

stage "Evaluation on people nobody was trained on"
sets=(--precision auto --features "$output/features"
      --val-data "$data" --val-targets frontal pose lowres --val-batch-size 32
      --ijb-root "$data/ijb" --ijb-targets IJBsynth --ijb-batch-size 32
      --tinyface-root "$data" --tinyface-targets tinyface --tinyface-batch-size 32)
"$PYTHON" "$root/eval/run_batch_eval.py" --checkpoint-dir "$output" \
    --checkpoint-suffix backbone.pth --report-dir "$output/reports" "${sets[@]}"

stage "One page about the student by AdaDistill," \
    "the IJB-like and the TinyFace-like set in CVLFace's layout"
weights=$(ls "$output"/AdaDistill_ArcFace/*backbone.pth | sort -V | tail -n 1)
"$PYTHON" "$root/eval/run_full_eval.py" --checkpoint "$weights" --report-dir "$output/reports" \
    --results-json "$output/reports/AdaDistill_ArcFace.json" "${sets[@]}" \
    --ijb-root "$data/ijb_arrow" --tinyface-root "$data/tinyface_arrow" > /dev/null
echo "$output/reports/report.html"

stage "Results"
"$PYTHON" "$root/eval/plot_curves.py" "$output" \
    --metrics "$output/reports/summary.csv" --picture "$output/curves.png"
echo "  $data/contact_sheet.png"
echo "Finished after $((SECONDS - started)) s"
