#!/usr/bin/env bash
# What needs NVIDIA cards, all of it, on as many as there are: the GPU tests and the benchmarks at the size of an 8 B model.
#
#     bench/card.sh OUT TOKENIZER [SECONDS]
#
# OUT gets a log and the results of each part; TOKENIZER is a directory with a tokenizer for the random models; after
# SECONDS everything that still runs is ended. There are four lanes of parts, each with a card to itself where there are
# four. About an hour in all; ONLY=stack,train,… runs just those parts. LEAN= (130 GB of disk): rsync has an old copy.
set -uo pipefail
out=$(realpath -m "${1:?usage: bench/card.sh OUT TOKENIZER [SECONDS]}"); tok=$(realpath "$2"); limit=${3:-7200}
mkdir -p "$out"; cd "$(dirname "$0")/.."
mapfile -t cards < <(nvidia-smi --query-gpu=index --format=csv,noheader)
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader > "$out/cards.txt"
end=$((SECONDS + limit)); tests=(python3 -m pytest -q -p no:valkey -p no:cacheprovider -s)

part() { # NAME SECONDS COMMAND…: a line in OUT/parts.txt says how it ended
  local name=$1 most=$2 start=$SECONDS; shift 2
  [[ -z ${ONLY:-} || ,$ONLY, == *,$name,* ]] || return 0
  local left=$((end - SECONDS)); ((left < most)) && most=$left
  if ((most < 20)); then echo "$name: not run, no time" >> "$out/parts.txt"; return; fi
  timeout -k 15 "$most" "$@" > "$out/$name.log" 2>&1 < /dev/null
  echo "$name: exit $? after $((SECONDS - start)) s" >> "$out/parts.txt"
}

checks() {
  export CUDA_VISIBLE_DEVICES=$1 HOGWILD_TOKENIZER=$tok HOGWILD_GPU_RESTARTS=${RESTARTS:-5}
  if [ "$1" != "$2" ]; then
    CUDA_VISIBLE_DEVICES=$1,$2 part two-cards 90 "${tests[@]}" tests/gpu/test_cuda_ipc.py -k uuid
  fi
  local waited=()  # of one card: tests that don't mind each other
  part architectures 240 python3 tests/acceptance/architectures.py --device cuda --json "$out/architectures.json" \
    --table "$out/architectures.md" & waited+=($!)
  part ipc 240 "${tests[@]}" tests/gpu/test_cuda_ipc.py -k "not twenty" & waited+=($!)
  part partition-tests 400 "${tests[@]}" tests/gpu/test_partition_gpu.py & waited+=($!)
  wait "${waited[@]}"
  part units 600 "${tests[@]}" tests/gpu/test_engine_gpu.py tests/gpu/test_checkpoint_gpu.py
  # These look at all of the card's memory: nobody else may use it.
  part stack 900 "${tests[@]}" tests/gpu/test_stack_gpu.py ${STACK:+-k "$STACK"}
  part mps 180 "${tests[@]}" tests/gpu/test_mps.py
  part twenty 300 "${tests[@]}" tests/gpu/test_cuda_ipc.py -k twenty
}

disk() {
  export CUDA_VISIBLE_DEVICES=$1
  part checkpoint 1200 python3 bench/checkpoint.py --device cuda --mb 16000 ${LEAN---lean} --repeats 1 \
    --shares ${SHARES:-0.01 1.0 0.0001 0.1} ${CHECKPOINT:+--only $CHECKPOINT} --directory "$out/disk" \
    --out "$out/checkpoint.json"
  rm -rf "$out/disk"
  part attach 300 bash -c 'python3 bench/random_model.py qwen3-8b "$0/m" --tokenizer "$1" --device cuda &&
    python3 bench/attach.py --device cuda --model "$0/m" --repeats 2 --out "$0/attach.json"; rm -rf "$0/m"' "$out" "$tok"
}

coserve() { # NAME PARTS OPTION…
  local name=$1 parts=$2; shift 2
  part "$name" 1300 python3 bench/coserve.py --device cuda --shape qwen3-8b --model "$tok" --seconds 6 \
    --out "$out/$name.json" --parts "$parts" "$@"
}

serving() {
  export CUDA_VISIBLE_DEVICES=$1
  coserve coserve "${COSERVE:-share,pace,undivided}"
  part train 420 python3 bench/train.py --device cuda --shape qwen3-8b --tokens 4096 --steps 6 --memory-limit-gb 4 \
    --json "$out/train.json" \
    --kernels 30 --variants "${TRAIN:-none+compile,mini+compile,none+keep+compile,mini+keep+compile,trainer,apollo+keep+compile,trainer-apollo,mini+keep,loop}"
}

baselines() {
  export CUDA_VISIBLE_DEVICES=$1
  coserve reload reload
  coserve timeslice timeslice --streams 16
  local ours=mini+keep+compile ways=hf,mini+keep+compile
  part timesliced 200 python3 bench/interference.py --no-mps --variants $ways --json "$out/timesliced.json"
  ways+=,$ours:low,$ours:part=0.25:low,$ours:part=0.5:low,$ours:part=0.75:low
  part interference 500 python3 bench/interference.py --variants $ways --json "$out/interference.json"
}

cp docs/architectures.md "$out/"
lanes=(serving checks baselines disk)
for card in "${!cards[@]}"; do
  for ((lane = card; lane < ${#lanes[@]}; lane += ${#cards[@]})); do
    "${lanes[lane]}" "${cards[card]}" "${cards[(card + 1) % ${#cards[@]}]}"
  done &
done
wait
echo done >> "$out/parts.txt"
