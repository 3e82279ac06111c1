#!/bin/sh
# Eight FLAN clients on SmolLM2-135M-Instruct by eight methods, one seed; the same line goes on where it
# was cut short:
#
#   scripts/flan_on_smollm2.sh DATA BASE OUT [SEEDS] [METHODS]
#
# DATA: a folder a client, train.jsonl and test.jsonl, of which the first 40 records test.
# BASE: what scripts/fetch_smollm2.py has made. OUT: gets data/, a run a method and seed, and the tables.
set -eu
data=$1 base=$2 out=$3 seeds=${4:-0}
methods=${5:-local,fedalt,fedit+ft,fedalt-relay,fedit,fedsa-lora,feddpa,fedalt-relay-kept}
for folder in "$data"/*/; do
  client=$out/data/$(basename "$folder")
  mkdir -p "$client"
  cp "$folder/train.jsonl" "$client/train.jsonl"
  head -n 40 "$folder/test.jsonl" > "$client/test.jsonl"
done
resume=
[ -d "$out/runs" ] && resume=--resume
exec "${PYTHON:-python}" -m fedalt compare --data "$out/data" --out "$out/runs" $resume \
  --methods "$methods" --seeds "$seeds" --jobs "${JOBS:-1}" -c "model.path=$base" -c model.dtype=bfloat16 \
  -c threads=1 -c rounds=3 -c train.max_steps=10 -c train.batch_size=4 -c train.learning_rate=1e-3 \
  -c lora.alpha=16 -c evaluate.every=3 -c evaluate.max_new_tokens=16 -c evaluate.parts=false \
  -c evaluate.batch_size=20
