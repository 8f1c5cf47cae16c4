#!/bin/bash
# A TPU slice as a queued resource, and the same command on each of its hosts: `PROJECT=… ZONE=… MODEL=… ./tpu_queued_resource.sh`.
# With xpk on a GKE cluster, the same is one line:
#   xpk workload create --cluster "$CLUSTER" --workload jaxengine --tpu-type v5litepod-8 --docker-image "$IMAGE" \
#     --command "jaxengine generate $MODEL --distributed --reduction-leaves 8 --prompt '12+30='"
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${MODEL:?a model of eight key-value heads or more: its leaves are shared by eight chips}"
name=${NAME:-jaxengine}
where=(--project="$PROJECT" --zone="$ZONE")
gcloud compute tpus queued-resources create "$name" "${where[@]}" \
  --node-id="$name" --accelerator-type=v5litepod-8 --runtime-version=v2-alpha-tpuv5-lite
until gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' | grep -q ACTIVE; do
  sleep 30
done
gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="
  pip install --quiet 'jaxengine[tpu]' && jaxengine generate $MODEL --distributed --reduction-leaves 8 --prompt '12+30='"
