#!/usr/bin/env bash
# Trains the built-in model on one GPU in two calls of at most 8 minutes, start-up included.
#
#   run_gpu.sh check OUT SPRITES [SECONDS]   every code path with few steps (graphs, resume, export, evaluation)
#   run_gpu.sh part1 OUT SPRITES             the autoencoder, 5 minutes
#   run_gpu.sh part2 OUT SPRITES START       transformer and text encoder with the autoencoder of the folder START; export,
#                                            evaluation, sheets
#
# Checkpoints, figures and pictures go to OUT, at most 8 files. LIMIT: seconds of a call. VAE_ARGS, DIT_ARGS: further
# options. When a training fails, it is tried again in the time that is left: the autoencoder with another seed, the
# transformer from its last checkpoint.
set -uo pipefail
mode=$1 out=$2 sprites=$3 extra=${4:-}
here=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4 PYTHONWARNINGS=ignore HF_HUB_DISABLE_PROGRESS_BARS=1
limit=${LIMIT:-465}
folder=$(mktemp -d)/builtin_model
mkdir -p "$out"

left() { # minutes until the limit, less $1 seconds
    awk -v s="$((limit - SECONDS - $1))" 'BEGIN { print (s > 5 ? s : 5) / 60 }'
}

train_vae() { # minutes, further options
    local minutes=$1
    shift
    timeout "$((limit - SECONDS + 30))" python3 -m train_builtin_model.train_vae --sprites "$sprites" --out "$out" \
        --max-minutes "$minutes" "$@" ${VAE_ARGS:-}
}

train_dit() { # seconds to leave for what follows, further options
    local reserve=$1
    shift
    timeout "$((limit - SECONDS + 30))" python3 -m train_builtin_model.train_dit --sprites "$sprites" --out "$out" \
        --max-minutes "$(left "$reserve")" "$@" ${DIT_ARGS:-}
}

again() { # the option that goes on from a checkpoint of network $1, if there is one
    if [ -f "$out/$1.json" ]; then echo --resume; fi
}

finish() { # share of the evaluation's prompts
    python3 -m train_builtin_model.export --out "$out" --folder "$folder" || return
    timeout 60 python3 -m train_builtin_model.contact_sheet --folder "$folder" --out "$out" >"$folder.sheets" 2>&1 &
    local sheets=$!
    timeout 150 python3 -m train_builtin_model.evaluate --folder "$folder" --sprites "$sprites" --batch 100 \
        --threads 4 --scale "$1" --json "$out/evaluation.json"
    local status=$?
    wait "$sheets"
    grep -E "kB$|Error" "$folder.sheets"
    return "$status"
}

case $mode in
check)
    seconds=${extra:-60}
    limit=$((4 * seconds + 120))
    short=(--log-every 20 --min-steps 40)
    vae=(--fill-seconds 3 --statistics 8)
    dit=(--fill-seconds 4 --save-seconds 5)
    train_vae "$(awk -v s="$seconds" 'BEGIN { print s / 180 }')" "${vae[@]}" "${short[@]}" || exit 3
    train_dit "$((limit - SECONDS - seconds / 3))" "${dit[@]}" "${short[@]}" --schedule 0 0.5 || exit 4
    train_dit "$((limit - SECONDS - seconds / 3))" "${dit[@]}" "${short[@]}" --schedule 0.5 1 --resume || exit 5
    finish "${SCALE:-0.05}" || exit 6
    ;;
part1)
    rm -f "$out"/vae*
    train_vae 4 || train_vae "$(awk -v m="$(left 20)" 'BEGIN { print (m < 4 ? m : 4) }')" --seed 2 || exit 3
    ;;
part2)
    rm -f "$out"/dit*
    cp "${extra:?the folder of part 1}"/vae* "$out/" && chmod u+w "$out"/*
    train_dit 60 || train_dit 60 --schedule 0.5 1 $(again dit) || exit 5
    finish "${SCALE:-1}" || exit 6
    rm -f "$out"/vae* # as in part 1
    ;;
*)
    echo "expected check, part1 or part2, not '$mode'" >&2
    exit 2
    ;;
esac
echo "$mode done after $SECONDS s"
