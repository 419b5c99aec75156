#!/usr/bin/env bash
# Trains on a TPU slice of Google Cloud: makes the slice if it is not there, installs jaxtune on every host, starts the
# same command on all of them and shows what host 0 prints.
#
#   TPU=my-pod ZONE=us-west4-a TYPE=v5litepod-16 BUCKET=my-bucket launch/tpu_pod.sh \
#     --config configs/pretrain_causal_lm.py --config.mesh.data=1 --config.mesh.fsdp=16
#
# The run does not need this terminal: the same line again shows it, or continues it. Where the slice was preempted it
# is made anew and the run goes on from its newest checkpoint; that is why the workdir is in a bucket (one with a
# hierarchical namespace, where renaming a folder is atomic): a host's disk goes with the host.
#   VERSION=…  TPU software of the hosts, by TYPE (v2-alpha-tpuv5-lite, v2-alpha-tpuv5, v2-alpha-tpuv6e, …)
#   QUEUE=1    waits in line for the slice (queued resource) instead of failing where none is free
#   SPOT=1     takes cheaper capacity, which may be preempted
#   KEEP=1     leaves the slice that it made running at the end; it costs money until it is deleted
set -euo pipefail

: "${TPU:?the name of the slice}" "${ZONE:?its zone}" "${TYPE:?its type, such as v5litepod-16}"
: "${BUCKET:?the name of the bucket for workdirs}"
VERSION=${VERSION:-v2-alpha-tpuv5-lite}
RUN=${RUN:-$TPU}
SOURCE=$(cd "$(dirname "$0")/.." && pwd)
LOCAL=$(mktemp -d)
trap 'rm -rf "$LOCAL"' EXIT
made=

tpu() { gcloud compute tpus tpu-vm "$@" --zone "$ZONE"; }
queue() { gcloud compute tpus queued-resources "$@" --zone "$ZONE"; }
state() { tpu describe "$TPU" --format 'value(state)' 2>/dev/null || true; }
on_all() { tpu ssh "$TPU" --worker=all --command "$1"; }

delete() {
  if [[ -n ${QUEUE:-} ]]; then queue delete "$TPU" --force --quiet; else tpu delete "$TPU" --quiet; fi
}

create() {
  case $(state) in
    READY) return ;;
    # A preempted slice keeps its name until it is deleted.
    PREEMPTED | TERMINATED | STOPPED) delete ;;
  esac
  made=1
  if [[ -n ${QUEUE:-} ]]; then
    # It may be in line already, from an earlier call.
    queue describe "$TPU" >/dev/null 2>&1 || queue create "$TPU" --node-id "$TPU" --accelerator-type "$TYPE" \
      --runtime-version "$VERSION" ${SPOT:+--spot}
    until [[ $(state) == READY ]]; do sleep 30; done
  else
    tpu create "$TPU" --accelerator-type "$TYPE" --version "$VERSION" ${SPOT:+--spot}
  fi
}

# shellcheck disable=SC2016  # what stands in single quotes is for the host's shell
running() { tpu ssh "$TPU" --worker=0 --command 'kill -0 "$(cat run.pid)"' >/dev/null 2>&1; }

start() {
  # Every host needs the same code: this checkout, without what it made.
  tar -czf "$LOCAL/jaxtune.tgz" -C "$SOURCE" --exclude=.git --exclude='.venv*' --exclude=./runs .
  # The number of hosts tells jaxtune that it is one of several; who they are, JAX reads from the slice's metadata.
  hosts=$(tpu describe "$TPU" --format 'value(networkEndpoints.len())')
  {
    echo "cd ~/jaxtune && export JAX_NUM_PROCESSES=$hosts"
    echo ".venv/bin/python -m jaxtune.main --workdir ~/bucket/$(printf '%q ' "$RUN" "$@")"
    echo 'echo $? >~/run.status'
  } >"$LOCAL/run.sh"
  tpu scp "$LOCAL/jaxtune.tgz" "$LOCAL/run.sh" "$TPU:" --worker=all
  # gcsfuse shows the bucket as a folder: what a run leaves there are ordinary files, and all hosts see the same ones.
  on_all "set -e
    mkdir -p ~/jaxtune ~/bucket && tar -xzf ~/jaxtune.tgz -C ~/jaxtune && cd ~/jaxtune
    command -v python3.11 >/dev/null && command -v gcsfuse >/dev/null || {
      curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/gcsfuse.asc >/dev/null
      echo \"deb [signed-by=/usr/share/keyrings/gcsfuse.asc] https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main\" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
      sudo apt-get update -q && sudo apt-get install -qy gcsfuse python3.11-venv
    }
    [ -d .venv ] || python3.11 -m venv .venv
    .venv/bin/pip install -q -e '.[tpu]'
    mountpoint -q ~/bucket || gcsfuse --implicit-dirs --rename-dir-limit 100000 '$BUCKET' ~/bucket
    rm -f ~/run.status
    setsid nohup bash ~/run.sh >~/run.log 2>&1 </dev/null & echo \$! >~/run.pid"
}

# Shows host 0's output to its end, then sets `status`; fails where the connection or the slice is lost.
# shellcheck disable=SC2016
follow() {
  tpu ssh "$TPU" --worker=0 --command 'tail -n +1 -F --pid="$(cat run.pid)" run.log' &&
    status=$(tpu ssh "$TPU" --worker=0 --command 'cat run.status')
}

status=1
while :; do
  create
  running || start "$@"
  if follow; then break; fi
  echo 'lost the connection to host 0: looking whether the slice was preempted' >&2
  sleep 30
done
[[ -z $made || -n ${KEEP:-} ]] || delete
exit "$status"
