#!/usr/bin/env bash
# Every run behind the README's table of the challenge: 12 settings x 4 seeds, each trained and
# scored on all 14 machines, one after the other on one GPU, or by Slurm where there is sbatch.
#
#     bash tests/all_runs.sh          # run again, it continues where it stopped
#
# "SEEDS=0 bash tests/all_runs.sh" makes one seed of each.
set -euo pipefail
cd "$(dirname "$0")/.."

while read -r name flags; do
  for seed in ${SEEDS:-0 1 2 3}; do
    run="--machine all --run runs/$name-seed$seed"
    echo "{ python train.py $run --seed $seed $flags && python score.py $run; } || exit 1"
  done
done > runs.txt <<END
lora
frozen --tuning frozen
full --tuning full
rank4 --rank 4
rank16 --rank 16
on-q --targets q
on-k --targets k
on-v --targets v
on-all-linear --targets q k v proj fc1 fc2
layers0-3 --layers 0 1 2 3
layers8-11 --layers 8 9 10 11
no-specaug --time-mask 0 --freq-mask 0
END

python data.py --machine all # once, before any run
python backbone.py
if command -v sbatch > /dev/null; then
  sbatch --wait --array="1-$(wc -l < runs.txt)" --gpus=1 --cpus-per-task=9 --requeue \
    --wrap 'eval "$(sed -n "${SLURM_ARRAY_TASK_ID}p" runs.txt)"'
else
  bash runs.txt
fi
python score.py --machine all --pretrained --pooling mean --run runs/ast
python evaluate.py --machine all --run runs/lora-seed? # one setting: mean ± deviation
python evaluate.py --machine all --run runs/ast runs/*-seed? # a line for each setting
