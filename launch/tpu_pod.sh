#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice: creates the slice if it does not exist, installs the repository,
# and runs train.py on all hosts.
#
#   REPO=https://github.com/OWNER/sheepop_jax SHARED=10.0.0.2:/runs \
#     launch/tpu_pod.sh --config configs/gpt2_124m.py --workdir /mnt/shared/gpt2
#
# Arguments are passed to train.py. Run the same command again to resume, on a new slice if the old
# one was preempted. Delete the slice when done:
#   gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force
set -euo pipefail

: "${REPO:?git URL of this repository}"
: "${SHARED:?NFS export for run directories, mountable on all hosts}"
NAME=${NAME:-sheepop}
ZONE=${ZONE:-us-east5-a}
TYPE=${TYPE:-v5p-128} # TensorCores, two per chip: 64 chips, 16 hosts
IMAGE=${IMAGE:-v2-alpha-tpuv5}

state() {
  gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
    --format='value(state.state)' 2>/dev/null || echo MISSING
}
on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

case $(state) in
SUSPENDED | FAILED) # preempted: the request never restarts, so delete it
  gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
  ;;
esac
if [ "$(state)" = MISSING ]; then
  # --spot: cheaper, but can be preempted at any time; checkpoints are kept.
  gcloud compute tpus queued-resources create "$NAME" --zone="$ZONE" --node-id="$NAME" \
    --accelerator-type="$TYPE" --runtime-version="$IMAGE" --spot
fi
until [ "$(state)" = ACTIVE ]; do
  sleep 30
done

on_all_hosts "
  set -e
  [ -d sheepop_jax ] || git clone '$REPO' sheepop_jax
  cd sheepop_jax && ./setup.sh --accelerator tpu
  sudo mkdir -p /mnt/shared
  mountpoint -q /mnt/shared || sudo mount -t nfs '$SHARED' /mnt/shared"
# One process per host; JAX finds the others in the slice metadata. %q quotes for the remote shell.
printf -v words ' %q' "$@"
on_all_hosts "cd sheepop_jax && .venv/bin/python train.py --coordinator_address auto$words"
