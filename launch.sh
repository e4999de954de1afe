#!/usr/bin/env bash
# Makes the environment, then runs `beitforge VERB …` in it (./launch.sh --help lists the verbs). Its own verbs:
#
#   test [pytest options] · check    the project's tests and static checks
#   bench [NAME … [OPTIONS]]         its benchmarks; `bench gpu --minutes 8 --out DIR`: all that needs a GPU, in one call
#   bundle OUT                       a folder that runs `bench gpu` on a machine that has a GPU and no network
#   setup [peers|loader_peers]
#                     only make the environment; peers: with transformers, timm and DALL-E for `export --to` and parity;
#                     loader_peers: the loaders that `bench loader` measures, each in .venv-NAME (1 GB of downloads)
#
# Environment:
#   BEITFORGE_PYTHON  a Python that already has everything installed; otherwise .venv is made from constraints.txt
#   PYTHON=python3    the Python (3.10-3.12) that .venv is made with
set -euo pipefail
# Paths are the caller's: the working folder stays, the package is found by name.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
fail() { echo "error: $*" >&2; exit 2; }

[ -d "$root/src/beitforge/pipeline" ] ||
    fail "src/beitforge/pipeline is no link to a folder: this copy lost its symbolic links (git: core.symlinks=true; else unpack with tar or unzip)"
export PYTHONPATH=$root/src${PYTHONPATH:+:$PYTHONPATH}
export BEITFORGE_COMMAND=${BEITFORGE_COMMAND:-./launch.sh}

usage() { sed -n '2,13s/^# \{0,1\}//p' "$root/launch.sh"; }

# .venv holds the pinned versions; its stamp is the digest of what it was made from, so a changed pin makes it anew.
setup() {
    if [ -n "${BEITFORGE_PYTHON:-}" ]; then python=$BEITFORGE_PYTHON; return; fi
    python=$root/.venv/bin/python
    local made_from stamp=$root/.venv/made-from
    made_from=$(sed -n "/^\[project/,/^\[tool/p" "$root/pyproject.toml" | cat "$root/constraints.txt" - | sha256sum | cut -d' ' -f1)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$made_from" ]; then return; fi
    # two starts at once: the second waits, then finds it made
    if command -v flock >/dev/null; then
        exec 9>>"$root/.venv.lock"
        flock 9
        if [ "$(cat "$stamp" 2>/dev/null)" = "$made_from" ]; then exec 9>&-; return; fi
    fi
    local base=${PYTHON:-python3}
    "$base" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null ||
        fail "$base is not Python 3.10-3.12; name one: PYTHON=/path/to/python3.11 ./launch.sh …"
    "$base" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$base has no venv module; install it (Debian: apt-get install python3-venv), then run this again"
    echo "making .venv (once) …" >&2
    if [ -d "$root/.venv" ] && [ ! -e "$root/.venv/made-from" ] && ! grep -qs launch.sh "$root/.venv.lock"; then
        fail "$root/.venv is not one that launch.sh made: move it away, or set BEITFORGE_PYTHON to its python"
    fi
    echo "launch.sh makes .venv" >"$root/.venv.lock"
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

# The loaders that `bench loader` measures, each in .venv-NAME from its pins; over the project's environment where it has
# our decode. One that does not install here is said and left out; `setup loader_peers` tries it again.
loader_peers() {
    local pins name folder made_from where='import sysconfig; print(sysconfig.get_paths()["purelib"])'
    for pins in "$root"/benchmarks/data/loader_peers/pins/*.txt; do
        name=$(basename "$pins" .txt) folder=$root/.venv-$(basename "$pins" .txt)
        made_from=$("$python" -c 'import sys; print(sys.executable, sys.version)' | cat "$pins" - | sha256sum | cut -d' ' -f1)
        [ "$(cat "$folder/made-from" "$folder/failed" 2>/dev/null)" != "$made_from" ] || continue
        echo "making .venv-$name (once) …" >&2
        "$python" -m venv --clear "$folder"
        if grep -q '^# over' "$pins"; then
            "$python" -c "$where" >"$("$folder/bin/python" -c "$where")/project.pth"
        fi
        if "$folder/bin/python" -m pip install -qq --disable-pip-version-check --no-deps -r "$pins" >"$folder/log" 2>&1; then
            echo "$made_from" >"$folder/made-from"
        else
            echo "$made_from" >"$folder/failed"
            echo "$name does not install here, and \`bench loader\` goes without it: $(tail -n 1 "$folder/log")" >&2
        fi
    done
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
    setup)
        case $* in "" | peers | loader_peers) ;; *) fail "setup takes nothing, peers or loader_peers; not: $*" ;; esac
        setup
        [ "$*" != peers ] || peers
        if [ "$*" = loader_peers ]; then rm -f "$root"/.venv-*/failed; loader_peers; fi ;;
    test)
        setup
        cd "$root"
        # two workers, each with whole files; `./launch.sh test -n 0 FILE` runs in one process
        workers=()
        if [ "$(nproc 2>/dev/null || echo 1)" -ge 2 ] && "$python" -c 'import xdist' 2>/dev/null; then
            workers=(-n 2 --dist loadfile --no-loadscope-reorder)
        fi
        exec "$python" -m pytest "${workers[@]}" "$@" ;;
    check)
        setup
        cd "$root"
        "$python" -m ruff format --check .
        "$python" -m ruff check .
        "$python" -m mypy ;;
    bench)
        setup
        [ -n "${BEITFORGE_PYTHON:-}" ] || peers
        from=$PWD
        cd "$root"
        names=() words=() last=
        for word in "$@"; do
            # what follows the first option is the benchmark's; its folder of results is the caller's
            if [ ${#words[@]} -eq 0 ] && [[ $word != -* ]]; then names+=("$word"); continue; fi
            if [ "$last" = --out ]; then word=$(cd "$from" && realpath -m -- "$word"); fi
            words+=("$word") last=$word
        done
        [ ${#names[@]} -gt 0 ] || names=(order pack lanes draws loader decoders regions loader_resume loader_memory opening slow_storage remote faults demo
            zero_parity elastic masks views view_tokens tokenize tokenizer_precision online_tokens view_ablation evaluations train_cpu saving attacks)
        for name in "${names[@]}"; do
            file=$(echo benchmarks/*/"$name".py)
            [ -f "$file" ] || fail "there is no benchmarks/*/$name.py"
            [ "$name" != loader ] || loader_peers
            echo "== $name" >&2
            "$python" -m "$(echo "${file%.py}" | tr / .)" "${words[@]}"
        done ;;
    bundle)
        [ $# -eq 1 ] || fail "bundle takes the folder to make, not: ${*:-nothing}"
        setup
        out=$(realpath -m -- "$1")
        cd "$root"
        exec "$python" -m benchmarks.gpu.bundle "$out" ;;
    "" | -h | --help | help) usage; echo; setup; exec "$python" -m beitforge --help ;;
    *)
        setup
        [ "$verb" != finetune ] && [ "$verb ${1:-}" != "slurm finetune" ] || augment
        exec "$python" -m beitforge "$verb" "$@" ;;
esac
