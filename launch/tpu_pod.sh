#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice: makes the slice if it is not there, sets it up, starts train.py on
# all of its hosts.
#
#   REPO=https://github.com/OWNER/sheepop_jax SHARED=10.0.0.2:/runs \
#     launch/tpu_pod.sh --config configs/gpt2_124m.py --workdir /mnt/shared/gpt2
#
# What follows the script's name goes to train.py. The same line again goes on with the run, on a new
# slice if the old one was preempted. Delete it when done:
#   gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force
set -euo pipefail

: "${REPO:?the address that git clones this repository from}"
: "${SHARED:?an NFS export that all hosts can mount, for run directories}"
NAME=${NAME:-sheepop}
ZONE=${ZONE:-us-east5-a}
TYPE=${TYPE:-v5p-128} # counts TensorCores, two a chip: 64 chips, 16 hosts
IMAGE=${IMAGE:-v2-alpha-tpuv5}

state() {
  gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
    --format='value(state.state)' 2>/dev/null || echo MISSING
}
on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

case $(state) in
SUSPENDED | FAILED) # preempted: such a request never comes back by itself
  gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
  ;;
esac
if [ "$(state)" = MISSING ]; then
  # --spot: cheaper, and may be taken away at any time; what was saved stays.
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
# One process a host; jax finds the others in the slice's metadata. Words are quoted for the far shell.
printf -v words ' %q' "$@"
on_all_hosts "cd sheepop_jax && .venv/bin/python train.py --coordinator_address auto$words"
