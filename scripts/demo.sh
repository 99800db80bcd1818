#!/usr/bin/env bash
# The main job from nothing, in about eleven minutes on two cores: captioned scenes are drawn, three
# generators and a noised CLIP train for a short while under mpiexec, and four prompts grow
# 64 -> 256 -> 1024. Run by `make demo`; everything lies under runs/demo and data/.
set -euo pipefail
# Two ranks, or one where there is one GPU: two ranks on one GPU are refused.
RANKS=${RANKS:-$(python -c 'import torch; print(min(torch.cuda.device_count(), 2) or 2)')}
DATA=${DATA:-data/demo}
RUNS=${RUNS:-runs/demo/cascade}
train() {
    echo; echo "== $1 $3"
    mpiexec -n "$RANKS" python "scripts/$1.py" "${@:2}" --num_workers 1 --seed 0 --ema_rate 0.98
}
python scripts/make_demo_data.py --source shapes --out_dir "$DATA/256" \
    --num_train 2000 --num_val 200 --image_size 256 --seed 0 --num_workers "$RANKS"
python scripts/make_demo_data.py --source shapes --out_dir "$DATA/1024" \
    --num_train 300 --num_val 40 --image_size 1024 --seed 1 --num_workers "$RANKS"
SMALL=(--data_dir "$DATA/256/train" --val_data_dir "$DATA/256/val")
LARGE=(--data_dir "$DATA/1024/train" --val_data_dir "$DATA/1024/val")
train train_generator --preset tiny-64 "${SMALL[@]}" --log_dir "$RUNS/base" \
    --first_caption_prob 0.5 --iterations 400 --log_interval 50 --eval_interval 200 --save_interval 400
train train_classifier --preset tiny-clip "${SMALL[@]}" --log_dir "$RUNS/clip" --batch_size 32 \
    --iterations 200 --log_interval 50 --eval_interval 100 --save_interval 200
train train_generator --preset tiny-256 "${SMALL[@]}" --log_dir "$RUNS/up256" --batch_size 8 \
    --iterations 250 --log_interval 50 --eval_interval 0 --save_interval 250 --num_preview 2
train train_generator --preset tiny-1024 "${LARGE[@]}" --log_dir "$RUNS/up1024" --batch_size 4 \
    --iterations 150 --log_interval 50 --eval_interval 0 --save_interval 150 --num_preview 0
echo; echo "== sample"
mpiexec -n "$RANKS" python scripts/sample.py --model_path "$RUNS" \
    --classifier_path "$RUNS/clip/best.pt" --classifier_scale 1.0 --guidance_scale 2 1 1 \
    --grid_size 2048 --log_dir runs/demo/samples --prompts \
    "a large red circle in the centre of a white background" "하늘색 배경의 큰 노란 별" \
    "a small green square left of a large purple circle" "a large orange cross on a navy background"
echo; echo "the pictures: open $(ls -t runs/demo/samples/grid*.jpg | head -n 1)"
