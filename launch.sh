#!/usr/bin/env bash
# The one front door: ./launch.sh VERB [CONFIG] [section.key=value …]
#
#   demo [DIR]                 the whole job on this machine, on sample photographs or your own folder
#   pack · index · verify · stats · simulate    pictures and shards (python -m shards VERB --help)
#   tokenizer · tokenize · pretrain · finetune CONFIG   under the deepspeed launcher, here or on HOSTFILE's hosts
#   doctor CONFIG [--json] [--seconds N]     the same processes look at hosts, data, devices and network, and end: go (0),
#                              go with warnings (1) or stop (2), with a cure for everything found
#   plan CONFIG --gpus 8,64,512 [--gpu h200] [--days 3] …   memory, time and cost of a training, without a GPU
#   slurm [pretrain|finetune|tokenizer|tokenize] CONFIG … --nodes N --gpus-per-node G [--time …] [--no-doctor]
#                              [--dry-run] [-- sbatch options]
#   slurm pack IMAGES SHARDS … [--cpus-per-task C]    writes a batch script into the run folder and submits it
#   stop RUN                   a run finishes its step, saves and ends, under whatever launcher
#   export · probe · report · watch   a run, finished or going (python -m pipeline VERB --help)
#   import · import-tokenizer  published weights come in (python -m pipeline VERB --help)
#   test [pytest options] · check · bench    the project's own checks and benchmarks
#   setup [peers]              only make the environment; with transformers, timm and DALL-E for `export --to` and parity
#
# Environment:
#   NPROC=2           processes on this machine (default: one per GPU, 2 without a GPU)
#   HOSTFILE=hosts    DeepSpeed hostfile ("host slots=8" per line): start on many hosts over ssh, with this environment's
#                     PYTHON*, NCCL_*, OMP_*, HF_HOME and the like (pipeline/carried.py), over them NAME=VALUE lines of
#                     ~/.deepspeed_env, ./.deepspeed_env or DS_ENV_FILE
#   MASTER_ADDR, MASTER_PORT   where the processes meet (default: the first host, and a port made from the process id;
#                     under SLURM both follow from the job)
#   BEITFORGE_PYTHON  a Python that already has everything installed; otherwise .venv is made from constraints.txt
#   PYTHON=python3    the Python (3.10-3.12) that .venv is made with
set -euo pipefail
# Paths are the caller's: the working folder stays, the packages are found by name.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

usage() { sed -n '2,27s/^# \{0,1\}//p' "$root/launch.sh"; }

fail() { echo "error: $*" >&2; exit 2; }

# .venv holds the pinned versions; its stamp is the digest of what it was made from, so a changed pin makes it anew.
setup() {
    if [ -n "${BEITFORGE_PYTHON:-}" ]; then python=$BEITFORGE_PYTHON; return; fi
    python=$root/.venv/bin/python
    local made_from stamp=$root/.venv/made-from
    made_from=$(sed -n "/^\[project/,/^\[tool/p" "$root/pyproject.toml" | cat "$root/constraints.txt" - | sha256sum | cut -d' ' -f1)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$made_from" ]; then return; fi
    # two starts at once: the second waits, then finds it made
    if command -v flock >/dev/null; then
        exec 9>"$root/.venv.lock"
        flock 9
        if [ "$(cat "$stamp" 2>/dev/null)" = "$made_from" ]; then exec 9>&-; return; fi
    fi
    local base=${PYTHON:-python3}
    "$base" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null ||
        fail "$base is not Python 3.10-3.12; name one: PYTHON=/path/to/python3.11 ./launch.sh …"
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base has no venv module; install it (Debian: apt-get install python3-venv), then run this again"
    echo "making .venv (once) …" >&2
    "$base" -m venv --clear "$root/.venv"
    local pip=("$python" -m pip install -qq --disable-pip-version-check -c "$root/constraints.txt")
    # torch first: asked for by another package, pip would take the newest
    "${pip[@]}" torch
    "${pip[@]}" -e "$root[train,fast,remote,demo,test]"
    echo "$made_from" >"$stamp"
    exec 9>&-
}

# The libraries that exports are checked by and parity is tested against. DALL-E names torchvision, whose wheel is for CUDA,
# among its needs, and uses nothing of it here.
peers() {
    [ -z "${BEITFORGE_PYTHON:-}" ] || fail "setup peers is for .venv; into $python install transformers, timm, DALL-E yourself"
    local made_from stamp=$root/.venv/peers-from
    made_from=$(cat "$root/.venv/made-from")
    [ "$(cat "$stamp" 2>/dev/null)" != "$made_from" ] || return 0
    local pip=("$python" -m pip install -qq --disable-pip-version-check -c "$root/constraints.txt")
    "${pip[@]}" transformers attrs requests
    "${pip[@]}" --no-deps DALL-E
    augment
    echo "$made_from" >"$stamp"
}

# timm, whose RandAugment `finetune` uses, likewise without torchvision. With BEITFORGE_PYTHON, `finetune` itself says what
# is missing.
augment() {
    [ -z "${BEITFORGE_PYTHON:-}" ] || return 0
    ! "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("timm") is None)' || return 0
    local pip=("$python" -m pip install -qq --disable-pip-version-check -c "$root/constraints.txt")
    "${pip[@]}" huggingface_hub
    "${pip[@]}" --no-deps timm
}

verb=${1:-}
[ $# -eq 0 ] || shift
case $verb in
    "" | -h | --help | help) usage; exit 0 ;;
    setup)
        [ $# -eq 0 ] || [ "$*" = peers ] || fail "setup takes nothing, or peers; not: $*"
        setup
        [ $# -eq 0 ] || peers ;;
    slurm) setup; [ "${1:-}" != finetune ] || augment; exec "$python" -m pipeline "$verb" "$@" ;;
    demo | plan | stop | export | probe | report | watch | import | import-tokenizer) setup; exec "$python" -m pipeline "$verb" "$@" ;;
    pack | index | verify | stats | simulate) setup; exec "$python" -m shards "$verb" "$@" ;;
    tokenizer | tokenize | pretrain | finetune | doctor)
        [ $# -gt 0 ] || fail "$verb needs a config: ./launch.sh $verb configs/NAME.yaml [section.key=value …]"
        setup
        case " $* " in *" -h "* | *" --help "*) exec "$python" -m pipeline "$verb" --help ;; esac
        [ "$verb" != finetune ] || augment
        exec "$python" -m pipeline launch "$verb" "$@" ;;
    test) setup; cd "$root"; exec "$python" -m pytest "$@" ;;
    check)
        setup
        cd "$root"
        "$python" -m ruff format --check .
        "$python" -m ruff check .
        "$python" -m mypy ;;
    bench)
        setup
        [ -n "${BEITFORGE_PYTHON:-}" ] || peers
        cd "$root"
        for name in ${*:-order loader loader_resume loader_memory faults demo zero_parity elastic masks views view_tokens tokenizer_precision online_tokens view_ablation evaluations}; do
            [ -f "benchmarks/$name.py" ] || fail "there is no benchmarks/$name.py"
            echo "== $name" >&2
            "$python" -m "benchmarks.$name"
        done ;;
    *) usage >&2; fail "there is no verb '$verb'" ;;
esac
